//! Updates that may have to be undone: a log of what they overwrite.
//!
//! Before the norm of a whole gradient is known, an update counts on it not being clipped. To copy the old
//! states out would be 12 bytes an element beside the 28 that an update moves. But each old value follows from
//! the new ones and the gradient, up to rounding: the log holds what rounding took, the distance in units
//! of the last place, in one byte. Where that does not fit (a value that was tiny beside what was added to it),
//! the old values of a block stand in the log as they are. So it is 3 to 4 bytes an element, and exact.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::paths::{Value, fence};
use super::{AdamScalars, CHUNK, Exchange, Pieces, Sides, States, element};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;

/// Elements that are logged together: while they are at work, the log is in the first-level cache.
const UNIT: usize = 1024;
/// Elements whose old values are written out together: a line of the caches of each state.
const BLOCK: usize = 16;
const LINE: usize = 64;
/// Bytes of a unit's log: a line that says whether it was updated, for each block which states are written out,
/// three bytes an element, and room for what is written out.
const UNIT_LOG: usize = 4 * UNIT + 2 * LINE;
const WHOLE: u8 = 1;
const MASKS: usize = LINE;
const STEPS: usize = MASKS + UNIT / BLOCK;
const OUT: usize = STEPS + 3 * UNIT;

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
/// left as they are, for [`adamw_rest`]; how many pieces that were.
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
        // SAFETY: units do not overlap, and the machine runs it (checked).
        let whole = unsafe { unit.ahead(isa, scalars, room) };
        left.fetch_add(usize::from(!whole), Ordering::Relaxed);
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

type Triple<'a> = (&'a mut [f32], &'a mut [f32], &'a mut [f32]);

/// What a worker needs for a unit, on its stack and so in its caches.
#[repr(align(64))]
struct Room {
    log: [u8; UNIT_LOG],
    /// The states before: master, first and second moment.
    old: [[f32; UNIT]; 3],
    grad: [f32; UNIT],
    quotient: [f32; UNIT],
    /// Elements whose distance does not fit into a byte.
    far: [u8; UNIT],
}

impl Room {
    fn new() -> Self {
        Self {
            log: [0; UNIT_LOG],
            old: [[0.0; UNIT]; 3],
            grad: [0.0; UNIT],
            quotient: [0.0; UNIT],
            far: [0; UNIT],
        }
    }
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

/// The inverse of [`element`], nearly, and the same on every path: each state before, from what it is now.
struct Back<'s> {
    s: &'s AdamScalars,
    by_keep: f32,
    by_beta1: f32,
    by_beta2: f32,
}

impl<'s> Back<'s> {
    fn new(s: &'s AdamScalars) -> Self {
        Self {
            s,
            by_keep: 1.0 / s.keep,
            by_beta1: 1.0 / s.beta1,
            by_beta2: 1.0 / s.beta2,
        }
    }

    /// What moved the master: from the moments after it.
    #[inline(always)]
    fn quotient(&self, m: f32, v: f32) -> f32 {
        m / v.sqrt().mul_add(self.s.root_correction, self.s.eps)
    }

    #[inline(always)]
    fn master(&self, p: f32, quotient: f32) -> f32 {
        (-self.s.minus_rate).mul_add(quotient, p) * self.by_keep
    }

    #[inline(always)]
    fn first(&self, m: f32, grad: f32) -> f32 {
        let g = grad * self.s.grad_scale;
        (m - self.s.one_minus_beta1 * g) * self.by_beta1
    }

    #[inline(always)]
    fn second(&self, v: f32, grad: f32) -> f32 {
        let g = grad * self.s.grad_scale;
        (v - (self.s.one_minus_beta2 * g) * g) * self.by_beta2
    }
}

// What follows are simple loops, one after the other, over what is in the nearest caches: that is what
// compilers make fast.

/// Logs one of the three states, which was `old` and is `now`; `other` is what else `near` looks at. Whether
/// there was room.
#[inline(always)]
fn log_state(
    log: &mut [u8; UNIT_LOG],
    out: &mut usize,
    far: &mut [u8],
    which: usize,
    [old, now, other]: [&[f32]; 3],
    near: impl Fn(f32, f32) -> f32,
) -> bool {
    let n = old.len();
    let steps = &mut log[STEPS + which * UNIT..][..n];
    let (now, other, far) = (&now[..n], &other[..n], &mut far[..n]);
    for i in 0..n {
        let near = near(now[i], other[i]).to_bits();
        let step = old[i].to_bits().wrapping_sub(near).cast_signed();
        steps[i] = step as u8;
        far[i] = u8::from(step != i32::from(step as i8));
    }
    for (block, (far, old)) in far.chunks(BLOCK).zip(old.chunks(BLOCK)).enumerate() {
        let any = match far.first_chunk() {
            Some(all) => u128::from_ne_bytes(*all) != 0,
            None => far.contains(&1),
        };
        if !any {
            continue;
        }
        let Some(room) = log.get_mut(*out..*out + LINE) else {
            return false;
        };
        let bytes: &[u8] = bytemuck::cast_slice(old);
        room[..bytes.len()].copy_from_slice(bytes);
        *out += LINE;
        log[MASKS + block] |= 1 << which;
    }
    true
}

/// Brings back one of the three states.
#[inline(always)]
fn read_state(
    log: &[u8],
    out: &mut usize,
    which: usize,
    now: &mut [f32],
    other: &[f32],
    near: impl Fn(f32, f32) -> f32,
) {
    let steps = &log[STEPS + which * UNIT..];
    for ((now, other), step) in now.iter_mut().zip(other).zip(steps) {
        let step = i32::from(step.cast_signed()).cast_unsigned();
        *now = f32::from_bits(near(*now, *other).to_bits().wrapping_add(step));
    }
    for (block, now) in now.chunks_mut(BLOCK).enumerate() {
        if log[MASKS + block] & (1 << which) != 0 {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(now);
            bytes.copy_from_slice(&log[*out..*out + bytes.len()]);
            *out += LINE;
        }
    }
}

/// Updates a unit and writes its log: the bytes of it that are used, or `None` if they do not suffice. Then
/// the states are as they were; the parameter is not.
#[inline(always)]
fn ahead<G: Value, P: Value>(
    s: &AdamScalars,
    states: Triple<'_>,
    grad: &[G],
    param: &mut [P],
    room: &mut Room,
) -> Option<usize> {
    let (n, back) = (grad.len(), Back::new(s));
    let [old_p, old_m, old_v] = room.old.each_mut().map(|old| &mut old[..n]);
    let (g, q) = (&mut room.grad[..n], &mut room.quotient[..n]);
    let (p, m, v) = (&mut states.0[..n], &mut states.1[..n], &mut states.2[..n]);
    let param = &mut param[..n];
    for i in 0..n {
        (old_p[i], old_m[i], old_v[i], g[i]) = (p[i], m[i], v[i], grad[i].get());
        (p[i], m[i], v[i]) = element(s, g[i], p[i], m[i], v[i]);
        q[i] = back.quotient(m[i], v[i]);
        param[i] = P::put(p[i]);
    }
    let (log, far) = (&mut room.log, &mut room.far);
    log[MASKS..STEPS].fill(0);
    let mut out = OUT;
    let whole = log_state(log, &mut out, far, 0, [old_p, p, q], |p, q| {
        back.master(p, q)
    }) && log_state(log, &mut out, far, 1, [old_m, m, g], |m, g| {
        back.first(m, g)
    }) && log_state(log, &mut out, far, 2, [old_v, v, g], |v, g| {
        back.second(v, g)
    });
    if !whole {
        p.copy_from_slice(old_p);
        m.copy_from_slice(old_m);
        v.copy_from_slice(old_v);
        return None;
    }
    log[0] = WHOLE;
    Some(out)
}

/// Brings back the states of a unit.
#[inline(always)]
fn undo<G: Value>(s: &AdamScalars, states: Triple<'_>, grad: &[G], log: &[u8], room: &mut Room) {
    let (n, back) = (grad.len(), Back::new(s));
    let (g, q) = (&mut room.grad[..n], &mut room.quotient[..n]);
    let (p, m, v) = (&mut states.0[..n], &mut states.1[..n], &mut states.2[..n]);
    for i in 0..n {
        g[i] = grad[i].get();
        q[i] = back.quotient(m[i], v[i]);
    }
    let mut out = OUT;
    read_state(log, &mut out, 0, p, q, |p, q| back.master(p, q));
    read_state(log, &mut out, 1, m, g, |m, g| back.first(m, g));
    read_state(log, &mut out, 2, v, g, |v, g| back.second(v, g));
}

macro_rules! path {
    ($module:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn ahead<G: Value, P: Value>(
                s: &AdamScalars,
                states: Triple<'_>,
                grad: &[G],
                param: &mut [P],
                room: &mut Room,
            ) -> Option<usize> {
                super::ahead(s, states, grad, param, room)
            }

            #[target_feature(enable = $features)]
            pub(super) fn undo<G: Value>(
                s: &AdamScalars,
                states: Triple<'_>,
                grad: &[G],
                log: &[u8],
                room: &mut Room,
            ) {
                super::undo(s, states, grad, log, room);
            }
        }
    };
}

path!(avx2, "avx2,fma");
path!(avx512, "avx2,fma,avx512f");

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
        Isa::Avx2 => unsafe { avx2::ahead(s, states, grad, param, room) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::ahead(s, states, grad, param, room) },
        _ => ahead(s, states, grad, param, room),
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
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::undo(s, states, grad, log, room) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::undo(s, states, grad, log, room) },
        _ => undo(s, states, grad, log, room),
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
    fence();
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
