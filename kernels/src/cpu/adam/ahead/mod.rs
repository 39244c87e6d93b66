//! Updates that may have to be undone: a log of what they overwrite.
//!
//! Before the norm of a whole gradient is known, an update counts on it not being clipped. To copy the old
//! states out would be 12 bytes an element beside the 28 that an update moves. But each old value follows from
//! the new ones and the gradient, up to rounding: the log holds what rounding took, the distance in units
//! of the last place, in one byte. Where that does not fit (a value that was tiny beside what was added to it),
//! the old values of a block stand in the log as they are. So it is 3 to 4 bytes an element, and exact.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::past_caches::{self, LINE};
use super::paths::{StateSlices, Value};
use super::{AdamScalars, CHUNK, Exchange, Pieces, Source, States, Update, Visit};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;
pub(in crate::cpu) use log::UNIT;
use log::{Room, UNIT_LOG, WHOLE};

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
    ahead_of(workers, isa, scalars, &Pieces::new(states, exchange), kept)
}

/// As [`adamw_ahead`], of states however they are kept.
pub(in crate::cpu) fn ahead_of<S: Source>(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    all: &S,
    kept: Kept<'_>,
) -> usize {
    let left = AtomicUsize::new(0);
    units(workers, isa, all, kept, &|unit, room| {
        let elements = unit.range.len();
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
    rest_of(workers, isa, scalars, &Pieces::new(states, exchange), kept);
}

/// As [`adamw_rest`], of states however they are kept.
pub(in crate::cpu) fn rest_of<S: Source>(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    all: &S,
    kept: Kept<'_>,
) {
    units(workers, isa, all, kept, &|unit, _| {
        if !unit.whole() {
            // SAFETY: units do not overlap, and the machine runs it (checked).
            unsafe { unit.all.visit(unit.range, Update(isa, scalars)) };
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
    undo_of(workers, isa, scalars, &Pieces::new(states, exchange), kept);
}

/// As [`adamw_undo`], of states however they are kept.
pub(in crate::cpu) fn undo_of<S: Source>(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    all: &S,
    kept: Kept<'_>,
) {
    units(workers, isa, all, kept, &|unit, room| {
        if unit.whole() {
            // SAFETY: units do not overlap, and the machine runs it (checked).
            unsafe { unit.undo(isa, scalars, room) };
        }
    });
}

/// Calls `f` with every unit, on all workers.
fn units<S: Source>(
    workers: &Workers,
    isa: Isa,
    all: &S,
    kept: Kept<'_>,
    f: &(dyn Fn(Unit<'_, S>, &mut Room) + Sync),
) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let len = all.len();
    let bytes = all.bytes_in_place();
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
                all,
                range: start..end,
                log,
                grad,
            };
            f(unit, &mut room);
        }
        // What went past the caches is there before the chunk counts as done.
        past_caches::fence();
    });
}

/// Elements that are logged together.
struct Unit<'u, S> {
    all: &'u S,
    range: Range<usize>,
    log: &'u mut [u8],
    /// The bytes of the gradient, if the parameter takes its place.
    grad: &'u mut [u8],
}

impl<S: Source> Unit<'_, S> {
    fn whole(&self) -> bool {
        self.log[0] == WHOLE
    }

    /// Updates it and writes the log; whether that fit.
    ///
    /// # Safety
    /// Its elements are in no other piece alive, and this machine runs `isa`.
    unsafe fn ahead(self, isa: Isa, scalars: &AdamScalars, room: &mut Room) -> bool {
        let work = Ahead {
            isa,
            scalars,
            kept: self.grad,
            room: &mut *room,
        };
        // SAFETY: by the contract above.
        let used = unsafe { self.all.visit(self.range, work) };
        if used.is_none() {
            room.log[0] = 0;
        }
        past_caches::copy(&mut self.log[..used.unwrap_or(LINE)], &room.log);
        used.is_some()
    }

    /// # Safety
    /// As for [`Unit::ahead`].
    unsafe fn undo(self, isa: Isa, scalars: &AdamScalars, room: &mut Room) {
        let work = Undo {
            isa,
            scalars,
            log: self.log,
            kept: self.grad,
            room,
        };
        // SAFETY: by the contract above.
        unsafe { self.all.visit(self.range, work) };
    }
}

/// An update with its log: the bytes of it that are used, if it fits. The machine runs the instruction set.
struct Ahead<'w> {
    isa: Isa,
    scalars: &'w AdamScalars,
    kept: &'w mut [u8],
    room: &'w mut Room,
}

impl Visit for Ahead<'_> {
    type Output = Option<usize>;

    unsafe fn apart<G: Value, P: Value>(
        self,
        states: StateSlices<'_>,
        grad: &[G],
        param: &mut [P],
    ) -> Option<usize> {
        // SAFETY: the machine runs it.
        unsafe { run_ahead(self.isa, self.scalars, states, grad, param, self.room) }
    }

    unsafe fn in_place<T: Value>(self, states: StateSlices<'_>, both: &mut [T]) -> Option<usize> {
        let mut grad = [T::zeroed(); UNIT];
        let grad = &mut grad[..both.len()];
        grad.copy_from_slice(both);
        // SAFETY: the machine runs it.
        let used = unsafe { run_ahead(self.isa, self.scalars, states, grad, both, self.room) };
        match used {
            Some(_) => past_caches::copy(self.kept, bytemuck::cast_slice(grad)),
            None => both.copy_from_slice(grad),
        }
        used
    }
}

/// What takes that back. The machine runs the instruction set.
struct Undo<'w> {
    isa: Isa,
    scalars: &'w AdamScalars,
    log: &'w [u8],
    kept: &'w [u8],
    room: &'w mut Room,
}

impl Visit for Undo<'_> {
    type Output = ();

    unsafe fn apart<G: Value, P: Value>(self, states: StateSlices<'_>, grad: &[G], _: &mut [P]) {
        // SAFETY: the machine runs it.
        unsafe { run_undo(self.isa, self.scalars, states, grad, self.log, self.room) };
    }

    unsafe fn in_place<T: Value>(self, states: StateSlices<'_>, both: &mut [T]) {
        bytemuck::cast_slice_mut(both).copy_from_slice(self.kept);
        // SAFETY: the machine runs it.
        unsafe { run_undo(self.isa, self.scalars, states, both, self.log, self.room) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn ahead_avx2<G: Value, P: Value>(
    s: &AdamScalars,
    states: StateSlices<'_>,
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
    states: StateSlices<'_>,
    grad: &[G],
    log: &[u8],
    room: &mut Room,
) {
    log::undo(s, states, grad, log, &mut room.quotient);
}

/// # Safety
/// This machine runs `isa`.
unsafe fn run_ahead<G: Value, P: Value>(
    isa: Isa,
    s: &AdamScalars,
    states: StateSlices<'_>,
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
    states: StateSlices<'_>,
    grad: &[G],
    log: &[u8],
    room: &mut Room,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above; what has AVX-512 has AVX2.
        Isa::Avx2 | Isa::Avx512 => unsafe { undo_avx2(s, states, grad, log, room) },
        _ => log::undo(s, states, grad, log, &mut room.quotient),
    }
}
