//! AdamW's log on a split master: whole masters for a unit, and parted again behind it.

use std::ops::Range;

use super::format::{MasterOf, MomentOf, Stored, join, split};
use super::frame::halves;
use crate::cpu::adam::ahead::UNIT;
use crate::cpu::adam::paths::Value;
use crate::cpu::adam::{Exchange, Sides, Source, Visit, VisitSides};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;

/// The memory of an update whose master is split and whose moments are f32.
pub(super) struct Halves<'a> {
    rest: Shared<'a, u16>,
    m: Shared<'a, f32>,
    v: Shared<'a, f32>,
    sides: Sides<'a>,
    len: usize,
    isa: Isa,
}

impl<'a> Halves<'a> {
    /// That, if it is. The machine runs `isa`.
    pub(super) fn new(
        stored: Stored<'a>,
        exchange: Exchange<'a>,
        isa: Isa,
    ) -> Result<Self, (Stored<'a>, Exchange<'a>)> {
        match (stored.master, stored.moments) {
            (MasterOf::Rest(rest), [MomentOf::F32(m), MomentOf::F32(v)]) => {
                let len = rest.len();
                let (grad, param) = exchange.lens();
                let same = [m.len(), v.len(), grad, param].iter().all(|l| *l == len);
                assert!(same, "states, gradient and parameter differ in length");
                exchange.check_split();
                Ok(Self {
                    rest: Shared::new(rest),
                    m: Shared::new(m),
                    v: Shared::new(v),
                    sides: Sides::new(exchange),
                    len,
                    isa,
                })
            }
            (master, moments) => Err((Stored { master, moments }, exchange)),
        }
    }
}

impl Source for Halves<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn bytes_in_place(&self) -> usize {
        0
    }

    unsafe fn visit<V: Visit>(&self, range: Range<usize>, visitor: V) -> V::Output {
        // SAFETY: by the same contract.
        unsafe {
            let (m, v) = (self.m.piece(range.clone()), self.v.piece(range.clone()));
            let rest = self.rest.piece(range.clone());
            self.sides.visit(
                range,
                Whole {
                    isa: self.isa,
                    rest,
                    m,
                    v,
                    visitor,
                },
            )
        }
    }
}

struct Whole<'w, V> {
    isa: Isa,
    rest: &'w mut [u16],
    m: &'w mut [f32],
    v: &'w mut [f32],
    visitor: V,
}

impl<V: Visit> VisitSides for Whole<'_, V> {
    type Output = V::Output;

    unsafe fn apart<G: Value, P: Value>(self, grad: &[G], param: &mut [P]) -> V::Output {
        let mut whole = [0.0; UNIT];
        let whole = &mut whole[..grad.len()];
        // SAFETY: the machine runs it.
        unsafe { join_on(self.isa, whole, self.rest, halves(param)) };
        // SAFETY: by the same contract.
        let output = unsafe {
            self.visitor
                .apart((&mut *whole, self.m, self.v), grad, param)
        };
        // SAFETY: the machine runs it.
        unsafe { split_on(self.isa, whole, self.rest, halves(param)) };
        output
    }

    unsafe fn in_place<T: Value>(self, _: &mut [T]) -> V::Output {
        unreachable!("a split master has a parameter of its own")
    }
}

#[inline(always)]
fn join_all(whole: &mut [f32], rest: &[u16], param: &[u16]) {
    for ((whole, rest), param) in whole.iter_mut().zip(rest).zip(param) {
        *whole = join(*param, *rest);
    }
}

#[inline(always)]
fn split_all(whole: &[f32], rest: &mut [u16], param: &mut [u16]) {
    for ((whole, rest), param) in whole.iter().zip(rest).zip(param) {
        (*param, *rest) = split(*whole);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn join_avx2(whole: &mut [f32], rest: &[u16], param: &[u16]) {
    join_all(whole, rest, param);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn split_avx2(whole: &[f32], rest: &mut [u16], param: &mut [u16]) {
    split_all(whole, rest, param);
}

/// # Safety
/// This machine runs `isa`.
unsafe fn join_on(isa: Isa, whole: &mut [f32], rest: &[u16], param: &[u16]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above; what has AVX-512 has AVX2.
        Isa::Avx2 | Isa::Avx512 => unsafe { join_avx2(whole, rest, param) },
        _ => join_all(whole, rest, param),
    }
}

/// # Safety
/// This machine runs `isa`.
unsafe fn split_on(isa: Isa, whole: &[f32], rest: &mut [u16], param: &mut [u16]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above; what has AVX-512 has AVX2.
        Isa::Avx2 | Isa::Avx512 => unsafe { split_avx2(whole, rest, param) },
        _ => split_all(whole, rest, param),
    }
}
