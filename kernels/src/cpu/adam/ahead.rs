//! Updates that may have to be undone: what they overwrite is kept.
//!
//! Before the norm of a whole gradient is known, an update counts on it not being clipped. Each piece is
//! copied out while it is in the caches for its update anyway, so that keeping costs the writes alone: 12
//! bytes an element, and the gradient's where the new parameter takes its place.

use bytemuck::NoUninit;

use super::{AdamScalars, CHUNK, Exchange, Pieces, Sides, States};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;

/// Room for what an update overwrites.
#[derive(Debug)]
pub struct Kept<'a> {
    /// As long as the states.
    pub states: States<'a>,
    /// The bytes of the gradient, for exchanges in place; nothing for others.
    pub grad: &'a mut [u8],
}

/// As [`adamw_parallel`](super::adamw_parallel), keeping what is overwritten.
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adamw_ahead(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    states: States<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let len = states.master.len();
    let (all, room) = (Pieces::new(states, exchange), Room::new(kept));
    room.check(&all, len);
    workers.run(len.div_ceil(CHUNK), &|chunk, _| {
        let (start, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(len));
        // SAFETY: chunks do not overlap.
        unsafe {
            room.each(&all, start, end, past_caches, past_caches);
            all.update(isa, scalars, start, end);
        }
    });
}

/// Takes back what [`adamw_ahead`] did to the same memory: states, and the gradient of an exchange in place.
/// A parameter that has a place of its own stays as it is.
///
/// # Panics
/// If lengths differ.
pub fn adamw_undo(workers: &Workers, states: States<'_>, exchange: Exchange<'_>, kept: Kept<'_>) {
    let len = states.master.len();
    let (all, room) = (Pieces::new(states, exchange), Room::new(kept));
    room.check(&all, len);
    workers.run(len.div_ceil(CHUNK), &|chunk, _| {
        let (start, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(len));
        // SAFETY: chunks do not overlap.
        unsafe {
            room.each(
                &all,
                start,
                end,
                |kept, now| now.copy_from_slice(kept),
                |kept, now| now.copy_from_slice(kept),
            );
        }
    });
}

/// [`Kept`], to be cut into pieces.
struct Room<'a> {
    states: [Shared<'a, f32>; 3],
    grad: Shared<'a, u8>,
    lens: [usize; 4],
}

impl<'a> Room<'a> {
    fn new(kept: Kept<'a>) -> Self {
        let States { master, m, v } = kept.states;
        Self {
            lens: [master.len(), m.len(), v.len(), kept.grad.len()],
            states: [master, m, v].map(Shared::new),
            grad: Shared::new(kept.grad),
        }
    }

    fn check(&self, all: &Pieces<'_>, len: usize) {
        let wanted = [len, len, len, len * all.sides.bytes_in_place()];
        assert_eq!(self.lens, wanted, "room for exactly what is overwritten");
    }

    /// Calls `states` on each state of a run, with the room for it, and `grad` on the gradient's bytes if
    /// the exchange is in place.
    ///
    /// # Safety
    /// Elements `start..end` are in no other piece alive.
    unsafe fn each(
        &self,
        all: &Pieces<'_>,
        start: usize,
        end: usize,
        states: impl Fn(&mut [f32], &mut [f32]),
        grad: impl Fn(&mut [u8], &mut [u8]),
    ) {
        // SAFETY: disjoint by the contract above, of the room as of the states.
        unsafe {
            for (room, state) in self.states.iter().zip([&all.master, &all.m, &all.v]) {
                states(room.piece(start..end), state.piece(start..end));
            }
            let bytes = all.sides.bytes_in_place();
            let room = self.grad.piece(start * bytes..end * bytes);
            match &all.sides {
                Sides::InPlaceF32(both) => {
                    grad(room, bytemuck::cast_slice_mut(both.piece(start..end)));
                }
                Sides::InPlaceBf16(both) => {
                    grad(room, bytemuck::cast_slice_mut(both.piece(start..end)));
                }
                _ => {}
            }
        }
    }
}

/// Bytes of a line of the caches.
const LINE: usize = 64;

/// Copies `from` past the caches where whole lines of `to` are written: they are not read again soon, and a
/// line that is only written need not be read first.
fn past_caches<T: NoUninit + bytemuck::AnyBitPattern>(to: &mut [T], from: &mut [T]) {
    let (to, from): (&mut [u8], &[u8]) = (bytemuck::cast_slice_mut(to), bytemuck::cast_slice(from));
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    to[..head].copy_from_slice(&from[..head]);
    let (to, from) = (&mut to[head..], &from[head..]);
    let (lines, tail) = to.as_chunks_mut::<LINE>();
    let (from, from_tail) = from.as_chunks::<LINE>();
    for (to, from) in lines.iter_mut().zip(from) {
        line_past_caches(to, from);
    }
    tail.copy_from_slice(from_tail);
    super::paths::fence();
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn line_past_caches(to: &mut [u8; LINE], from: &[u8; LINE]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let (to, from) = (
        to.as_mut_ptr().cast::<__m128i>(),
        from.as_ptr().cast::<__m128i>(),
    );
    for part in 0..4 {
        // SAFETY: lines of 64 bytes; `to` is aligned to as many (`past_caches` began at such a one).
        unsafe { _mm_stream_si128(to.add(part), _mm_loadu_si128(from.add(part))) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn line_past_caches(to: &mut [u8; LINE], from: &[u8; LINE]) {
    *to = *from;
}
