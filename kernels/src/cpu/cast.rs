//! Between f32 and the types of two bytes, under the one rule that each has in the numerics contract.

use half::{bf16, f16};

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

/// Rounds to f16 as IEEE 754 does by default: to nearest, halves to even, subnormals kept, too large infinite. NaN
/// stays a (quiet) NaN with the upper bits of what it carried.
///
/// In integers and one sum, without branches: compilers make vectors of it on any machine, and no path has other
/// bits.
#[inline(always)]
pub fn round_to_f16(value: f32) -> f16 {
    /// The least f32 that is a normal f16, and what is too large for one whatever it is rounded to.
    const NORMAL: u32 = 113 << 23;
    const TOO_LARGE: u32 = 143 << 23;
    const INFINITE: u32 = 255 << 23;
    /// 0.5, whose last place is that of subnormal f16: added, it rounds to them.
    const HALF: u32 = 126 << 23;
    let bits = value.to_bits();
    let sign = bits & 0x8000_0000;
    let size = bits ^ sign;
    let odd = (size >> 13) & 1;
    let normal = size.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let tiny = (f32::from_bits(size) + f32::from_bits(HALF))
        .to_bits()
        .wrapping_sub(HALF);
    let quiet = 0x7e00 | ((size >> 13) & 0x3ff);
    let finite = if size < NORMAL { tiny } else { normal };
    let beyond = if size > INFINITE { quiet } else { 0x7c00 };
    let rounded = if size < TOO_LARGE { finite } else { beyond };
    f16::from_bits((rounded | (sign >> 16)) as u16)
}

/// As f32; exact. NaN becomes quiet.
#[inline(always)]
pub fn widen_f16(value: f16) -> f32 {
    /// 2^-14, the least normal f16.
    const LEAST: u32 = 113 << 23;
    let bits = u32::from(value.to_bits());
    let shifted = (bits & 0x7fff) << 13;
    let normal = shifted + (112 << 23);
    // A subnormal is what stands behind the point of 2^-14, less that.
    let tiny = (f32::from_bits(shifted + LEAST) - f32::from_bits(LEAST)).to_bits();
    let quiet = if shifted & 0x007f_e000 == 0 {
        0
    } else {
        1 << 22
    };
    let beyond = (normal + (112 << 23)) | quiet;
    let exponent = shifted >> 23;
    let finite = if exponent == 0 { tiny } else { normal };
    let wide = if exponent == 31 { beyond } else { finite };
    f32::from_bits(wide | ((bits & 0x8000) << 16))
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

fn narrow(from: &[f32], to: &mut [f16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = round_to_f16(*from);
    }
}

fn widen(from: &[f16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widen_f16(*from);
    }
}

/// With the instructions that are made for it: the same bits (the tests compare all).
#[cfg(target_arch = "x86_64")]
mod f16c {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps,
        _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_storeu_ps,
    };

    use half::f16;

    #[target_feature(enable = "f16c")]
    pub(super) fn narrow(from: &[f32], to: &mut [f16]) {
        let (from, from_rest) = from.as_chunks::<8>();
        let (to, to_rest) = to.as_chunks_mut::<8>();
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: eight of each, wherever they are.
            unsafe {
                let wide = _mm256_loadu_ps(from.as_ptr());
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
                _mm_storeu_si128(to.as_mut_ptr().cast(), halves);
            }
        }
        super::narrow(from_rest, to_rest);
    }

    #[target_feature(enable = "f16c")]
    pub(super) fn widen(from: &[f16], to: &mut [f32]) {
        let (from, from_rest) = from.as_chunks::<8>();
        let (to, to_rest) = to.as_chunks_mut::<8>();
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: eight of each, wherever they are.
            unsafe {
                let halves = _mm_loadu_si128(from.as_ptr().cast());
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        super::widen(from_rest, to_rest);
    }
}

/// Casts a slice, each value as [`round_to_f16`] does.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    assert_eq!(from.len(), to.len(), "a cast keeps the length");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") {
        // SAFETY: the machine has it.
        return unsafe { f16c::narrow(from, to) };
    }
    narrow(from, to);
}

/// Casts a slice, each value as [`widen_f16`] does.
///
/// # Panics
/// If the lengths differ.
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "a cast keeps the length");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") {
        // SAFETY: the machine has it.
        return unsafe { f16c::widen(from, to) };
    }
    widen(from, to);
}
