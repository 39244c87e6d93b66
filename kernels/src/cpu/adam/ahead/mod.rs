//! Updates that may have to be undone: a log of what they overwrite.
//!
//! Before the norm of a whole gradient is known, an update counts on it not being clipped. To copy the old
//! states out would be 12 bytes an element beside the 28 that an update moves. But each old value follows from
//! the new ones and the gradient, up to rounding: the log holds what rounding took, the distance in units
//! of the last place, in one byte. Where that does not fit (a value that was tiny beside what was added to it),
//! the old values of a block stand in the log as they are. So it is 3 to 4 bytes an element, and exact.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::paths::{Value, fence};
use super::{AdamScalars, CHUNK, Exchange, Pieces, Sides, States};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;
use log::{LINE, Room, Triple, UNIT, UNIT_LOG, WHOLE};

#[cfg(target_arch = "x86_64")]
mod avx512;
mod log;

/// Bytes of the log of an update of so many elements.
pub const fn log_bytes(elements: usize) -> usize {
    elements.div_ceil(UNIT) * UNIT_LOG
}

/// Room for what an update overwrites.
#[derive(Debug)]
pub struct Kept<'a> {
    /// [`log_bytes`] of its elements.
    pub log: &'a mut [u8],
    /// The bytes of the gradient, for exchanges in place; nothing for others.
    pub grad: &'a mut [u8],
}

impl Kept<'_> {
    /// The same room, for a shorter time.
    pub fn reborrow(&mut self) -> Kept<'_> {
        Kept {
            log: self.log,
            grad: self.grad,
        }
    }
}

/// As [`adamw_parallel`](super::adamw_parallel), so that it can be undone. Elements whose log does not fit are
/// left as they are, for [`adamw_rest`]; how many that were.
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
) -> usize {
    let left = AtomicUsize::new(0);
    units(workers, isa, states, exchange, kept, &|unit, room| {
        let elements = unit.end - unit.start;
        // SAFETY: units do not overlap, and the machine runs it (checked).
        if !unsafe { unit.ahead(isa, scalars, room) } {
            left.fetch_add(elements, Ordering::Relaxed);
        }
    });
    left.into_inner()
}

/// Updates what [`adamw_ahead`] left as it was.
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adamw_rest(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    states: States<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) {
    units(workers, isa, states, exchange, kept, &|unit, _| {
        if !unit.whole() {
            // SAFETY: units do not overlap, and the machine runs it (checked).
            unsafe { unit.all.update(isa, scalars, unit.start, unit.end) };
        }
    });
}

/// Takes back what [`adamw_ahead`] did with these scalars to the same memory: states, and the gradient of an
/// exchange in place. A parameter that has a place of its own stays as it is.
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adamw_undo(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    states: States<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) {
    units(workers, isa, states, exchange, kept, &|unit, room| {
        if unit.whole() {
            // SAFETY: units do not overlap, and the machine runs it (checked).
            unsafe { unit.undo(isa, scalars, room) };
        }
    });
}

/// Calls `f` with every unit, on all workers.
fn units(
    workers: &Workers,
    isa: Isa,
    states: States<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
    f: &(dyn Fn(Unit<'_, '_>, &mut Room) + Sync),
) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let len = states.master.len();
    let all = Pieces::new(states, exchange);
    let bytes = all.sides.bytes_in_place();
    assert_eq!(
        (kept.log.len(), kept.grad.len()),
        (log_bytes(len), len * bytes),
        "room for exactly what is overwritten"
    );
    let (log, grad) = (Shared::new(kept.log), Shared::new(kept.grad));
    workers.run(len.div_ceil(CHUNK), &|chunk, _| {
        let end = ((chunk + 1) * CHUNK).min(len);
        let mut room = Room::new();
        for start in (chunk * CHUNK..end).step_by(UNIT) {
            let (end, index) = ((start + UNIT).min(end), start / UNIT);
            // SAFETY: units do not overlap, nor do their logs.
            let (log, grad) = unsafe {
                (
                    log.piece(index * UNIT_LOG..(index + 1) * UNIT_LOG),
                    grad.piece(start * bytes..end * bytes),
                )
            };
            let unit = Unit {
                all: &all,
                start,
                end,
                log,
                grad,
            };
            f(unit, &mut room);
        }
        // What went past the caches is there before the chunk counts as done.
        fence();
    });
}

/// Elements that are logged together.
struct Unit<'u, 'a> {
    all: &'u Pieces<'a>,
    start: usize,
    end: usize,
    log: &'u mut [u8],
    /// The bytes of the gradient, if the parameter takes its place.
    grad: &'u mut [u8],
}

impl<'u> Unit<'u, '_> {
    fn whole(&self) -> bool {
        self.log[0] == WHOLE
    }

    /// # Safety
    /// Its elements are in no other piece alive.
    unsafe fn states(&self) -> Triple<'u> {
        let range = self.start..self.end;
        let Pieces { master, m, v, .. }: &'u Pieces<'_> = self.all;
        // SAFETY: disjoint by the contract above.
        unsafe {
            (
                master.piece(range.clone()),
                m.piece(range.clone()),
                v.piece(range),
            )
        }
    }

    /// Updates it and writes the log; whether that fit.
    ///
    /// # Safety
    /// Its elements are in no other piece alive, and this machine runs `isa`.
    unsafe fn ahead(self, isa: Isa, scalars: &AdamScalars, room: &mut Room) -> bool {
        let range = self.start..self.end;
        // SAFETY: disjoint by the contract above.
        let used = unsafe {
            let states = self.states();
            match &self.all.sides {
                Sides::F32(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    room,
                ),
                Sides::Bf16(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    room,
                ),
                Sides::F32ToBf16(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    room,
                ),
                Sides::Bf16ToF32(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    room,
                ),
                Sides::InPlaceF32(both) => {
                    in_place(isa, scalars, states, both.piece(range), self.grad, room)
                }
                Sides::InPlaceBf16(both) => {
                    in_place(isa, scalars, states, both.piece(range), self.grad, room)
                }
            }
        };
        if used.is_none() {
            room.log[0] = 0;
        }
        past_caches(&mut self.log[..used.unwrap_or(LINE)], &room.log);
        used.is_some()
    }

    /// # Safety
    /// As for [`Unit::ahead`].
    unsafe fn undo(self, isa: Isa, scalars: &AdamScalars, room: &mut Room) {
        let range = self.start..self.end;
        let log: &[u8] = self.log;
        // SAFETY: disjoint by the contract above.
        unsafe {
            let states = self.states();
            match &self.all.sides {
                Sides::F32(grad, _) | Sides::F32ToBf16(grad, _) => {
                    run_undo(isa, scalars, states, &grad[range], log, room);
                }
                Sides::Bf16(grad, _) | Sides::Bf16ToF32(grad, _) => {
                    run_undo(isa, scalars, states, &grad[range], log, room);
                }
                Sides::InPlaceF32(both) => {
                    let both = both.piece(range);
                    bytemuck::cast_slice_mut(both).copy_from_slice(self.grad);
                    run_undo(isa, scalars, states, both, log, room);
                }
                Sides::InPlaceBf16(both) => {
                    let both = both.piece(range);
                    bytemuck::cast_slice_mut(both).copy_from_slice(self.grad);
                    run_undo(isa, scalars, states, both, log, room);
                }
            }
        }
    }
}

/// # Safety
/// This machine runs `isa`.
unsafe fn in_place<T: Value + bytemuck::Pod>(
    isa: Isa,
    scalars: &AdamScalars,
    states: Triple<'_>,
    both: &mut [T],
    kept: &mut [u8],
    room: &mut Room,
) -> Option<usize> {
    let mut grad = [T::zeroed(); UNIT];
    let grad = &mut grad[..both.len()];
    grad.copy_from_slice(both);
    // SAFETY: by the contract above.
    let used = unsafe { run_ahead(isa, scalars, states, grad, both, room) };
    match used {
        Some(_) => past_caches(kept, bytemuck::cast_slice(grad)),
        None => both.copy_from_slice(grad),
    }
    used
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn ahead_avx2<G: Value, P: Value>(
    s: &AdamScalars,
    states: Triple<'_>,
    grad: &[G],
    param: &mut [P],
    room: &mut Room,
) -> Option<usize> {
    log::ahead(s, states, grad, param, room)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn undo_avx2<G: Value>(
    s: &AdamScalars,
    states: Triple<'_>,
    grad: &[G],
    log: &[u8],
    room: &mut Room,
) {
    log::undo(s, states, grad, log, room.quotient());
}

/// # Safety
/// This machine runs `isa`.
unsafe fn run_ahead<G: Value, P: Value>(
    isa: Isa,
    s: &AdamScalars,
    states: Triple<'_>,
    grad: &[G],
    param: &mut [P],
    room: &mut Room,
) -> Option<usize> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { ahead_avx2(s, states, grad, param, room) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::ahead(s, states, grad, param, room) },
        _ => log::ahead(s, states, grad, param, room),
    }
}

/// # Safety
/// This machine runs `isa`.
unsafe fn run_undo<G: Value>(
    isa: Isa,
    s: &AdamScalars,
    states: Triple<'_>,
    grad: &[G],
    log: &[u8],
    room: &mut Room,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above; what has AVX-512 has AVX2.
        Isa::Avx2 | Isa::Avx512 => unsafe { undo_avx2(s, states, grad, log, room) },
        _ => log::undo(s, states, grad, log, room.quotient()),
    }
}

/// Copies as much of `from` as `to` is long, past the caches where whole lines of `to` are written: they are
/// not read again soon, and a line that is only written need not be read first.
fn past_caches(to: &mut [u8], from: &[u8]) {
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let from = &from[..to.len()];
    to[..head].copy_from_slice(&from[..head]);
    let (to, from) = (&mut to[head..], &from[head..]);
    let (lines, tail) = to.as_chunks_mut::<LINE>();
    let (from, from_tail) = from.as_chunks::<LINE>();
    for (to, from) in lines.iter_mut().zip(from) {
        line_past_caches(to, from);
    }
    tail.copy_from_slice(from_tail);
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
