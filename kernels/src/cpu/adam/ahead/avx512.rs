//! The loop of [`log::ahead`] with the instructions of AVX-512: one pass, everything of a block in registers, and
//! old values written out only where they must be. Compilers do not find it: the branch in its middle keeps
//! them from vectors.
//!
//! The arithmetic is that of [`element`](super::super::element) and [`Back`], operation for operation; the tests
//! hold the bits against each other.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _mm_storeu_si128, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cmpgt_epu32_mask,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_cvtps_ph, _mm512_div_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_or_epi32,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_sqrt_ps, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_epi32, _mm512_sub_ps,
};

use super::super::AdamScalars;
use super::super::paths::{StateSlices, Value};
use super::log::{self, BLOCK, Back, Room, Writer};

/// As [`log::ahead`].
#[target_feature(enable = "avx2,fma,avx512f")]
pub(super) fn ahead<G: Value, P: Value>(
    s: &AdamScalars,
    states: StateSlices<'_>,
    grad: &[G],
    param: &mut [P],
    room: &mut Room,
) -> Option<usize> {
    let n = grad.len();
    if !n.is_multiple_of(BLOCK) {
        // The last unit of a run.
        return log::ahead(s, states, grad, param, room);
    }
    let back = Back::new(s);
    let all = |x: f32| _mm512_set1_ps(x);
    let (scale, keep, eps, root) = (
        all(s.grad_scale),
        all(s.keep),
        all(s.eps),
        all(s.root_correction),
    );
    let (beta1, rest1, by_beta1) = (all(s.beta1), all(s.one_minus_beta1), all(back.by_beta1));
    let (beta2, rest2, by_beta2) = (all(s.beta2), all(s.one_minus_beta2), all(back.by_beta2));
    let (rate, back_rate, by_keep) = (all(s.minus_rate), all(-s.minus_rate), all(back.by_keep));
    let (p, m, v) = (&mut states.0[..n], &mut states.1[..n], &mut states.2[..n]);
    let mut writer = Writer::new(&mut room.log);
    for block in 0..n / BLOCK {
        let at = block * BLOCK;
        let range = at..at + BLOCK;
        let (g, old) = (
            load(&grad[range.clone()]),
            [&*p, &*m, &*v].map(|x| load(&x[range.clone()])),
        );
        let [old_p, old_m, old_v] = old;
        let g = _mm512_mul_ps(g, scale);
        let to_m = _mm512_mul_ps(rest1, g);
        let new_m = _mm512_fmadd_ps(beta1, old_m, to_m);
        let to_v = _mm512_mul_ps(_mm512_mul_ps(rest2, g), g);
        let new_v = _mm512_fmadd_ps(beta2, old_v, to_v);
        let denominator = _mm512_fmadd_ps(_mm512_sqrt_ps(new_v), root, eps);
        let quotient = _mm512_div_ps(new_m, denominator);
        let new_p = _mm512_fmadd_ps(rate, quotient, _mm512_mul_ps(old_p, keep));
        let near = [
            _mm512_mul_ps(_mm512_fmadd_ps(back_rate, quotient, new_p), by_keep),
            _mm512_mul_ps(_mm512_sub_ps(new_m, to_m), by_beta1),
            _mm512_mul_ps(_mm512_sub_ps(new_v, to_v), by_beta2),
        ];
        let mut far = [0; 3];
        for which in 0..3 {
            let bits = _mm512_castps_si512;
            let step = _mm512_sub_epi32(bits(old[which]), bits(near[which]));
            let beyond = _mm512_add_epi32(step, _mm512_set1_epi32(128));
            far[which] = _mm512_cmpgt_epu32_mask(beyond, _mm512_set1_epi32(255));
            store_steps(step, &mut writer.steps(which)[range.clone()]);
        }
        if far[0] | far[1] | far[2] != 0 && !write_out(&mut writer, block, far, old) {
            let states = (&mut p[..at], &mut m[..at], &mut v[..at]);
            log::undo(s, states, &grad[..at], writer.written(), &mut room.quotient);
            return None;
        }
        store(new_p, &mut p[range.clone()]);
        store(new_m, &mut m[range.clone()]);
        store(new_v, &mut v[range.clone()]);
        store(new_p, &mut param[range]);
    }
    Some(writer.end())
}

/// Writes out those states of a block that do not fit; whether there is room.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,avx512f")]
fn write_out(writer: &mut Writer<'_>, block: usize, far: [u16; 3], old: [__m512; 3]) -> bool {
    (0..3).all(|which| {
        let mut values = [0.0; BLOCK];
        store(old[which], &mut values);
        far[which] == 0 || writer.write_out(block, which, &values)
    })
}

/// Sixteen values in f32.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f")]
fn load<T: Value>(from: &[T]) -> __m512 {
    assert_eq!(from.len(), BLOCK);
    if size_of::<T>() == size_of::<f32>() {
        // SAFETY: sixteen of them: a `Value` of four bytes is an f32.
        return unsafe { _mm512_loadu_ps(from.as_ptr().cast()) };
    }
    // SAFETY: sixteen of them: a `Value` of two bytes is a bf16 or an f16.
    let halves = unsafe { _mm256_loadu_si256(from.as_ptr().cast::<__m256i>()) };
    if T::F16 {
        return _mm512_cvtph_ps(halves);
    }
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

/// Sixteen values from f32, rounded as [`Value::put`] does.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f")]
fn store<T: Value>(values: __m512, to: &mut [T]) {
    assert_eq!(to.len(), BLOCK);
    if size_of::<T>() == size_of::<f32>() {
        // SAFETY: as for `load`.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), values) };
        return;
    }
    if T::F16 {
        let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values);
        // SAFETY: as for `load`.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast::<__m256i>(), halves) };
        return;
    }
    let bits = _mm512_castps_si512(values);
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, _mm512_setzero_ps());
    let high: __m512i = _mm512_srli_epi32::<16>(bits);
    let rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    let halves = _mm512_cvtepi32_epi16(rounded);
    // SAFETY: as for `load`.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast::<__m256i>(), halves) };
}

/// The low byte of each.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f")]
fn store_steps(steps: __m512i, to: &mut [u8]) {
    assert_eq!(to.len(), BLOCK);
    // SAFETY: sixteen bytes (checked).
    unsafe {
        _mm_storeu_si128(
            to.as_mut_ptr().cast::<__m128i>(),
            _mm512_cvtepi32_epi8(steps),
        )
    };
}
