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
const UNIT: usize = 2048;
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
    units(workers, isa, states, exchange, kept, &|unit| {
        // SAFETY: units do not overlap, and the machine runs it (checked).
        let whole = unsafe { unit.ahead(isa, scalars) };
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
    units(workers, isa, states, exchange, kept, &|unit| {
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
    units(workers, isa, states, exchange, kept, &|unit| {
        if unit.whole() {
            // SAFETY: units do not overlap, and the machine runs it (checked).
            unsafe { unit.undo(isa, scalars) };
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
    f: &(dyn Fn(Unit<'_, '_>) + Sync),
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
        for start in (chunk * CHUNK..end).step_by(UNIT) {
            let (end, index) = ((start + UNIT).min(end), start / UNIT);
            // SAFETY: units do not overlap, nor do their logs.
            let (log, grad) = unsafe {
                (
                    log.piece(index * UNIT_LOG..(index + 1) * UNIT_LOG),
                    grad.piece(start * bytes..end * bytes),
                )
            };
            f(Unit {
                all: &all,
                start,
                end,
                log,
                grad,
            });
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

/// On the stack, and so in the caches.
#[repr(align(64))]
struct Near<T, const N: usize>([T; N]);

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
    unsafe fn ahead(self, isa: Isa, scalars: &AdamScalars) -> bool {
        let range = self.start..self.end;
        let mut log = Near([0; UNIT_LOG]);
        // SAFETY: disjoint by the contract above.
        let used = unsafe {
            let states = self.states();
            let log = &mut log.0;
            match &self.all.sides {
                Sides::F32(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    log,
                ),
                Sides::Bf16(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    log,
                ),
                Sides::F32ToBf16(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    log,
                ),
                Sides::Bf16ToF32(grad, param) => run_ahead(
                    isa,
                    scalars,
                    states,
                    &grad[range.clone()],
                    param.piece(range),
                    log,
                ),
                Sides::InPlaceF32(both) => {
                    in_place(isa, scalars, states, both.piece(range), log, self.grad)
                }
                Sides::InPlaceBf16(both) => {
                    in_place(isa, scalars, states, both.piece(range), log, self.grad)
                }
            }
        };
        past_caches(&mut self.log[..used.unwrap_or(LINE)], &log.0);
        used.is_some()
    }

    /// # Safety
    /// As for [`Unit::ahead`].
    unsafe fn undo(self, isa: Isa, scalars: &AdamScalars) {
        let range = self.start..self.end;
        let log: &[u8] = self.log;
        // SAFETY: disjoint by the contract above.
        unsafe {
            let states = self.states();
            match &self.all.sides {
                Sides::F32(grad, _) | Sides::F32ToBf16(grad, _) => {
                    run_undo(isa, scalars, states, &grad[range], log);
                }
                Sides::Bf16(grad, _) | Sides::Bf16ToF32(grad, _) => {
                    run_undo(isa, scalars, states, &grad[range], log);
                }
                Sides::InPlaceF32(both) => {
                    let both = both.piece(range);
                    bytemuck::cast_slice_mut(both).copy_from_slice(self.grad);
                    run_undo(isa, scalars, states, both, log);
                }
                Sides::InPlaceBf16(both) => {
                    let both = both.piece(range);
                    bytemuck::cast_slice_mut(both).copy_from_slice(self.grad);
                    run_undo(isa, scalars, states, both, log);
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
    log: &mut [u8; UNIT_LOG],
    kept: &mut [u8],
) -> Option<usize> {
    let mut grad = Near([T::zeroed(); UNIT]);
    let grad = &mut grad.0[..both.len()];
    grad.copy_from_slice(both);
    // SAFETY: by the contract above.
    let used = unsafe { run_ahead(isa, scalars, states, grad, both, log) };
    match used {
        Some(_) => past_caches(kept, bytemuck::cast_slice(grad)),
        None => both.copy_from_slice(grad),
    }
    used
}

/// What leads back from new values to old ones, up to rounding.
struct Back {
    inverse_beta1: f32,
    inverse_beta2: f32,
    inverse_keep: f32,
}

impl Back {
    fn new(s: &AdamScalars) -> Self {
        Self {
            inverse_beta1: 1.0 / s.beta1,
            inverse_beta2: 1.0 / s.beta2,
            inverse_keep: 1.0 / s.keep,
        }
    }

    /// The inverse of [`element`], nearly; the same on every path.
    #[inline(always)]
    fn estimate(&self, s: &AdamScalars, grad: f32, p: f32, m: f32, v: f32) -> [f32; 3] {
        let g = grad * s.grad_scale;
        let denominator = v.sqrt().mul_add(s.root_correction, s.eps);
        let before = (-s.minus_rate).mul_add(m / denominator, p);
        [
            before * self.inverse_keep,
            (m - s.one_minus_beta1 * g) * self.inverse_beta1,
            (v - (s.one_minus_beta2 * g) * g) * self.inverse_beta2,
        ]
    }
}

/// Of master, first and second moment.
type Block = [[f32; BLOCK]; 3];

/// Where the log of a unit is being written.
struct Writer<'l> {
    log: &'l mut [u8; UNIT_LOG],
    block: usize,
    out: usize,
}

impl Writer<'_> {
    /// Updates a block and logs what it was; `None` if that does not fit.
    #[inline(always)]
    fn block(
        &mut self,
        s: &AdamScalars,
        back: &Back,
        old: &Block,
        grad: &[f32; BLOCK],
    ) -> Option<Block> {
        let mut new = [[0.0; BLOCK]; 3];
        let mut steps = [[0i32; BLOCK]; 3];
        for k in 0..BLOCK {
            let (p, m, v) = element(s, grad[k], old[0][k], old[1][k], old[2][k]);
            let near = back.estimate(s, grad[k], p, m, v);
            (new[0][k], new[1][k], new[2][k]) = (p, m, v);
            for i in 0..3 {
                steps[i][k] = (old[i][k].to_bits().wrapping_sub(near[i].to_bits())).cast_signed();
            }
        }
        let mut mask = 0;
        for i in 0..3 {
            let far = steps[i]
                .iter()
                .fold(0, |far, step| far | (step.wrapping_add(128) & !0xff));
            if far == 0 {
                let at = STEPS + (3 * self.block + i) * BLOCK;
                for (byte, step) in self.log[at..at + BLOCK].iter_mut().zip(&steps[i]) {
                    *byte = *step as u8;
                }
                continue;
            }
            let room = self.log.get_mut(self.out..self.out + LINE)?;
            room.copy_from_slice(bytemuck::cast_slice(&old[i]));
            self.out += LINE;
            mask |= 1 << i;
        }
        self.log[MASKS + self.block] = mask;
        self.block += 1;
        Some(new)
    }
}

/// How a unit's log is read.
struct Reader<'l> {
    log: &'l [u8],
    block: usize,
    out: usize,
}

impl Reader<'_> {
    /// The old values of a block.
    #[inline(always)]
    fn block(&mut self, s: &AdamScalars, back: &Back, new: &Block, grad: &[f32; BLOCK]) -> Block {
        let mut old = [[0.0; BLOCK]; 3];
        let mask = self.log[MASKS + self.block];
        for k in 0..BLOCK {
            let near = back.estimate(s, grad[k], new[0][k], new[1][k], new[2][k]);
            for i in 0..3 {
                let step = self.log[STEPS + (3 * self.block + i) * BLOCK + k].cast_signed();
                let bits = near[i]
                    .to_bits()
                    .wrapping_add(i32::from(step).cast_unsigned());
                old[i][k] = f32::from_bits(bits);
            }
        }
        for (i, old) in old.iter_mut().enumerate() {
            if mask & (1 << i) != 0 {
                let out = &self.log[self.out..self.out + LINE];
                bytemuck::cast_slice_mut(old).copy_from_slice(out);
                self.out += LINE;
            }
        }
        self.block += 1;
        old
    }
}

/// A block of a unit; past its end are zeros.
#[inline(always)]
fn load<G: Value>(states: &Triple<'_>, grad: &[G], start: usize) -> (Block, [f32; BLOCK]) {
    let n = BLOCK.min(grad.len() - start);
    let (mut block, mut g) = ([[0.0; BLOCK]; 3], [0.0; BLOCK]);
    if n == BLOCK {
        // The same with a length that is known.
        for (to, from) in block.iter_mut().zip([&states.0, &states.1, &states.2]) {
            to.copy_from_slice(&from[start..start + BLOCK]);
        }
        for (to, from) in g.iter_mut().zip(&grad[start..start + BLOCK]) {
            *to = from.get();
        }
        return (block, g);
    }
    for (to, from) in block.iter_mut().zip([&states.0, &states.1, &states.2]) {
        to[..n].copy_from_slice(&from[start..start + n]);
    }
    for (to, from) in g.iter_mut().zip(&grad[start..]) {
        *to = from.get();
    }
    (block, g)
}

#[inline(always)]
fn store(states: &mut Triple<'_>, start: usize, block: &Block) {
    let n = BLOCK.min(states.0.len() - start);
    let states = [&mut *states.0, &mut *states.1, &mut *states.2];
    for (to, from) in states.into_iter().zip(block) {
        if n == BLOCK {
            to[start..start + BLOCK].copy_from_slice(from);
        } else {
            to[start..start + n].copy_from_slice(&from[..n]);
        }
    }
}

/// Updates a unit and writes its log: the bytes of it that are used, or `None` if they do not suffice. Then
/// the states are as they were.
#[inline(always)]
fn ahead<G: Value, P: Value>(
    s: &AdamScalars,
    mut states: Triple<'_>,
    grad: &[G],
    param: &mut [P],
    log: &mut [u8; UNIT_LOG],
) -> Option<usize> {
    let back = Back::new(s);
    let mut writer = Writer {
        log,
        block: 0,
        out: OUT,
    };
    for start in (0..grad.len()).step_by(BLOCK) {
        let (old, g) = load(&states, grad, start);
        let Some(new) = writer.block(s, &back, &old, &g) else {
            let log = &*writer.log;
            undo(s, states, &grad[..start], log);
            return None;
        };
        store(&mut states, start, &new);
        for (param, master) in param[start..].iter_mut().zip(&new[0]) {
            *param = P::put(*master);
        }
    }
    writer.log[0] = WHOLE;
    Some(writer.out)
}

/// Brings back the states of as many elements as there are gradients.
#[inline(always)]
fn undo<G: Value>(s: &AdamScalars, mut states: Triple<'_>, grad: &[G], log: &[u8]) {
    let back = Back::new(s);
    let mut reader = Reader {
        log,
        block: 0,
        out: OUT,
    };
    for start in (0..grad.len()).step_by(BLOCK) {
        let (new, g) = load(&states, grad, start);
        let old = reader.block(s, &back, &new, &g);
        store(&mut states, start, &old);
    }
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
                log: &mut [u8; UNIT_LOG],
            ) -> Option<usize> {
                super::ahead(s, states, grad, param, log)
            }

            #[target_feature(enable = $features)]
            pub(super) fn undo<G: Value>(
                s: &AdamScalars,
                states: Triple<'_>,
                grad: &[G],
                log: &[u8],
            ) {
                super::undo(s, states, grad, log);
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
    log: &mut [u8; UNIT_LOG],
) -> Option<usize> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::ahead(s, states, grad, param, log) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::ahead(s, states, grad, param, log) },
        _ => ahead(s, states, grad, param, log),
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
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::undo(s, states, grad, log) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::undo(s, states, grad, log) },
        _ => undo(s, states, grad, log),
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
