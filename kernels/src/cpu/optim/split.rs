//! AdamW's log on a split master: whole masters for a unit, and parted again behind it.

use std::ops::Range;

use super::format::{MasterOf, MomentOf, Stored, join, split};
use super::frame::halves;
use crate::cpu::adam::ahead::UNIT;
use crate::cpu::adam::paths::Value;
use crate::cpu::adam::{Exchange, Sides, Source, Visit, VisitSides};
use crate::cpu::shared::Shared;

/// The memory of an update whose master is split and whose moments are f32.
pub(super) struct Halves<'a> {
    rest: Shared<'a, u16>,
    m: Shared<'a, f32>,
    v: Shared<'a, f32>,
    sides: Sides<'a>,
    len: usize,
}

impl<'a> Halves<'a> {
    /// That, if it is.
    pub(super) fn new(
        stored: Stored<'a>,
        exchange: Exchange<'a>,
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
        for ((whole, rest), param) in whole.iter_mut().zip(&*self.rest).zip(&*halves(param)) {
            *whole = join(*param, *rest);
        }
        // SAFETY: by the same contract.
        let output = unsafe {
            self.visitor
                .apart((&mut *whole, self.m, self.v), grad, param)
        };
        for ((whole, rest), param) in whole.iter().zip(self.rest).zip(halves(param)) {
            (*param, *rest) = split(*whole);
        }
        output
    }

    unsafe fn in_place<T: Value>(self, _: &mut [T]) -> V::Output {
        unreachable!("a split master has a parameter of its own")
    }
}
