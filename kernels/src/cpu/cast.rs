//! Between f32 and bf16, under the one rule of the numerics contract.

use half::bf16;

/// Rounds to bf16, halves away from zero in magnitude: `(bits + 0x8000) >> 16`. Too large becomes
/// infinite; NaN stays a (quiet) NaN.
///
/// Not round-half-even: under this rule an fp32 master splits losslessly into the bf16 parameter
/// and a signed 16-bit rest.
#[inline(always)]
pub fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x8000) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x0040;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded })
}

/// Casts a slice.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "a cast keeps the length");
    for (to, from) in to.iter_mut().zip(from) {
        *to = round_to_bf16(*from);
    }
}

/// Casts a slice; exact.
///
/// # Panics
/// If the lengths differ.
pub fn bf16_to_f32(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "a cast keeps the length");
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}
