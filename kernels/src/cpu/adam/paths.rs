//! The one loop, compiled for each instruction set.
//!
//! The compiler turns `f32::mul_add`, `sqrt` and `/` into the vector instructions of whatever a
//! function is compiled for, each correctly rounded as the scalar one; there are no intrinsics to
//! keep in step.

use half::{bf16, f16};

use super::past_caches::{self, Line};
use super::{AdamScalars, element};
use crate::cpu::cast::{f16_to_f32, f32_to_f16, round_to_bf16, round_to_f16, widen_f16};
use crate::cpu::isa::Isa;

/// A type in which gradients come and parameters leave.
pub(in crate::cpu) trait Value: bytemuck::Pod {
    /// Whether it is f16: of two types of two bytes.
    const F16: bool = false;
    fn get(self) -> f32;
    fn put(value: f32) -> Self;
}

impl Value for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn put(value: f32) -> Self {
        value
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn put(value: f32) -> Self {
        round_to_bf16(value)
    }
}

impl Value for f16 {
    const F16: bool = true;
    #[inline(always)]
    fn get(self) -> f32 {
        widen_f16(self)
    }
    #[inline(always)]
    fn put(value: f32) -> Self {
        round_to_f16(value)
    }
}

/// Elements that fill a line of the caches in bf16.
const LINE: usize = past_caches::LINE / 2;

/// Fills `out` by index, past the caches where whole lines of it go: what is written is not read again here,
/// and a line that is only written need not be read first.
#[inline(always)]
pub(super) fn streamed(out: &mut [bf16], mut value: impl FnMut(usize) -> bf16) {
    let head = past_caches::head(out);
    for (i, out) in out[..head].iter_mut().enumerate() {
        *out = value(i);
    }
    let mut done = head;
    let (lines, tail) = out[head..].as_chunks_mut::<LINE>();
    for line in lines {
        let mut room = Line([0; past_caches::LINE]);
        let values: &mut [bf16; LINE] = bytemuck::cast_mut(&mut room.0);
        for (k, out) in values.iter_mut().enumerate() {
            *out = value(done + k);
        }
        past_caches::store(bytemuck::cast_mut(line), &room.0);
        done += LINE;
    }
    for (k, out) in tail.iter_mut().enumerate() {
        *out = value(done + k);
    }
    past_caches::fence();
}

/// Of master, first and second moment.
pub(super) type StateSlices<'a> = (&'a mut [f32], &'a mut [f32], &'a mut [f32]);

#[inline(always)]
fn split<G: Value, P: Value>(
    s: &AdamScalars,
    states: StateSlices<'_>,
    grad: &[G],
    param: &mut [P],
) {
    let len = grad.len();
    let (master, m, v) = (
        &mut states.0[..len],
        &mut states.1[..len],
        &mut states.2[..len],
    );
    let param = &mut param[..len];
    for i in 0..len {
        (master[i], m[i], v[i]) = element(s, grad[i].get(), master[i], m[i], v[i]);
        param[i] = P::put(master[i]);
    }
}

#[inline(always)]
fn in_place<T: Value>(s: &AdamScalars, states: StateSlices<'_>, both: &mut [T]) {
    let len = both.len();
    let (master, m, v) = (
        &mut states.0[..len],
        &mut states.1[..len],
        &mut states.2[..len],
    );
    for i in 0..len {
        (master[i], m[i], v[i]) = element(s, both[i].get(), master[i], m[i], v[i]);
        both[i] = T::put(master[i]);
    }
}

macro_rules! path {
    ($module:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn split<G: Value, P: Value>(
                s: &AdamScalars,
                states: StateSlices<'_>,
                grad: &[G],
                param: &mut [P],
            ) {
                super::split(s, states, grad, param);
            }

            #[target_feature(enable = $features)]
            pub(super) fn in_place<T: Value>(
                s: &AdamScalars,
                states: StateSlices<'_>,
                both: &mut [T],
            ) {
                super::in_place(s, states, both);
            }
        }
    };
}

path!(avx2, "avx2,fma");
path!(avx512, "avx2,fma,avx512f");

/// Elements that are converted from and to f16 at a time, in the nearest caches: that way it takes one instruction
/// for eight of them, which loops written for any type do not come by.
const BLOCK: usize = 1024;

/// A block in f32.
fn wide<'a, T: Value>(block: &'a [T], room: &'a mut [f32; BLOCK]) -> &'a [f32] {
    let room = &mut room[..block.len()];
    match T::F16 {
        true => f16_to_f32(bytemuck::cast_slice(block), room),
        false => room.iter_mut().zip(block).for_each(|(w, x)| *w = x.get()),
    }
    room
}

fn narrow<T: Value>(block: &[f32], to: &mut [T]) {
    match T::F16 {
        true => f32_to_f16(block, bytemuck::cast_slice_mut(to)),
        false => to.iter_mut().zip(block).for_each(|(p, x)| *p = T::put(*x)),
    }
}

/// Calls `f` with the states of each block, and where it is.
fn blocks(states: StateSlices<'_>, mut f: impl FnMut(StateSlices<'_>, std::ops::Range<usize>)) {
    let len = states.0.len();
    for start in (0..len).step_by(BLOCK) {
        let at = start..(start + BLOCK).min(len);
        let block = (
            &mut states.0[at.clone()],
            &mut states.1[at.clone()],
            &mut states.2[at.clone()],
        );
        f(block, at);
    }
}

/// Updates a piece, the parameter going elsewhere than the gradient.
///
/// # Safety
/// This machine runs `isa`.
pub(super) unsafe fn run<G: Value, P: Value>(
    isa: Isa,
    s: &AdamScalars,
    states: StateSlices<'_>,
    grad: &[G],
    param: &mut [P],
) {
    if s.is_unchanged() {
        for (param, master) in param.iter_mut().zip(&*states.0) {
            *param = P::put(*master);
        }
        return;
    }
    if G::F16 || P::F16 {
        let (mut grads, mut params) = ([0.0; BLOCK], [0.0; BLOCK]);
        return blocks(states, |states, at| {
            let params = &mut params[..at.len()];
            let grads = wide(&grad[at.clone()], &mut grads);
            // SAFETY: by the contract above.
            unsafe { run(isa, s, states, grads, params) };
            narrow(params, &mut param[at]);
        });
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::split(s, states, grad, param) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::split(s, states, grad, param) },
        _ => split(s, states, grad, param),
    }
}

/// Updates a piece, the parameter replacing the gradient.
///
/// # Safety
/// This machine runs `isa`.
pub(super) unsafe fn run_in_place<T: Value>(
    isa: Isa,
    s: &AdamScalars,
    states: StateSlices<'_>,
    both: &mut [T],
) {
    if s.is_unchanged() {
        for (param, master) in both.iter_mut().zip(&*states.0) {
            *param = T::put(*master);
        }
        return;
    }
    if T::F16 {
        let mut room = [0.0; BLOCK];
        return blocks(states, |states, at| {
            let (both, len) = (&mut both[at.clone()], at.len());
            wide(both, &mut room);
            // SAFETY: by the contract above.
            unsafe { run_in_place(isa, s, states, &mut room[..len]) };
            narrow(&room[..len], both);
        });
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::in_place(s, states, both) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::in_place(s, states, both) },
        _ => in_place(s, states, both),
    }
}
