//! The ceiling of an update: a pass over the same memory, in the same order, with next to no arithmetic.

use half::bf16;

use super::paths::streamed;
use super::{Isa, States};

#[inline(always)]
fn pass(states: States<'_>, grad: &[bf16], param: &mut [bf16], stream: bool) {
    let len = grad.len();
    let (p, m, v) = (
        &mut states.master[..len],
        &mut states.m[..len],
        &mut states.v[..len],
    );
    let param = &mut param[..len];
    let mut one = |i: usize| {
        let g = f32::from_bits(u32::from(grad[i].to_bits()) << 16);
        (p[i], m[i], v[i]) = (p[i] + g, m[i] + g, v[i] + g);
        bf16::from_bits((p[i].to_bits() >> 16) as u16)
    };
    if stream {
        streamed(param, one);
    } else {
        for (i, param) in param.iter_mut().enumerate() {
            *param = one(i);
        }
    }
}

macro_rules! path {
    ($name:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name(states: States<'_>, grad: &[bf16], param: &mut [bf16], stream: bool) {
            pass(states, grad, param, stream);
        }
    };
}

path!(avx2, "avx2,fma");
path!(avx512, "avx2,fma,avx512f");

/// Reads a gradient and the states and writes the states and a parameter, 28 bytes an element, on this
/// thread; with `stream` the parameter goes past the caches.
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adam_traffic(isa: Isa, states: States<'_>, grad: &[bf16], param: &mut [bf16], stream: bool) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: it runs here.
        Isa::Avx2 => unsafe { avx2(states, grad, param, stream) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: it runs here.
        Isa::Avx512 => unsafe { avx512(states, grad, param, stream) },
        _ => pass(states, grad, param, stream),
    }
}
