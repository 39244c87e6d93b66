//! The frame: states, whatever they are kept in, pass through a worker's nearest caches as f32, a block at a time.
//! Blocks are short, so that memory is read as a loop over single elements reads it: in as many streams as there are
//! arrays, none of which rests for long.
//!
//! An update that may have to be undone copies what it overwrites aside as it is stored.

use std::ops::Range;

use half::bf16;

use super::Scalars;
use super::format::{MasterOf, Moment, MomentOf, StateFormat, Stored, join, split};
use super::rules::Rule;
use crate::cpu::adam::past_caches::{self, LINE};
use crate::cpu::adam::paths::Value;
use crate::cpu::adam::{CHUNK, Exchange, Kept, Sides, VisitSides};
use crate::cpu::isa::Isa;
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;

/// Elements whose log stands together.
pub(super) const UNIT: usize = 1024;
/// Elements that pass through together.
const BLOCK: usize = 128;

/// Bytes of the log of an update of so many elements: of each unit a line that says whether it was updated, and its
/// states; of a split master the parameters too.
pub(super) fn log_bytes(format: StateFormat, elements: usize) -> usize {
    let split = format.master == super::Master::Split;
    let element = format.bytes() as usize + if split { 2 } else { 0 };
    elements.div_ceil(UNIT) * unit_log(element)
}

fn unit_log(element_bytes: usize) -> usize {
    LINE + (UNIT * element_bytes).next_multiple_of(LINE)
}

/// A block in f32.
#[repr(align(64))]
struct Room {
    g: [f32; BLOCK],
    p: [f32; BLOCK],
    m: [f32; BLOCK],
    v: [f32; BLOCK],
}

enum Masters<'a> {
    F32(Shared<'a, f32>),
    Rest(Shared<'a, u16>),
}

enum Moments<'a> {
    None,
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

/// All memory of an update, to be cut into units.
pub(super) struct All<'a> {
    master: Masters<'a>,
    moments: [Moments<'a>; 2],
    sides: Sides<'a>,
    pub(super) len: usize,
}

impl<'a> All<'a> {
    pub(super) fn new(stored: Stored<'a>, exchange: Exchange<'a>) -> Self {
        let (grad, param) = exchange.lens();
        let (len, split) = match &stored.master {
            MasterOf::F32(it) => (it.len(), false),
            MasterOf::Rest(it) => (it.len(), true),
        };
        let fits = |moment: &MomentOf<'_>| match moment {
            MomentOf::None => true,
            MomentOf::F32(it) => it.len() == len,
            MomentOf::Bf16(it) => it.len() == len,
        };
        let same = stored.moments.iter().all(fits) && (grad, param) == (len, len);
        assert!(same, "states, gradient and parameter differ in length");
        if split {
            exchange.check_split();
        }
        Self {
            master: match stored.master {
                MasterOf::F32(it) => Masters::F32(Shared::new(it)),
                MasterOf::Rest(it) => Masters::Rest(Shared::new(it)),
            },
            moments: stored.moments.map(|moment| match moment {
                MomentOf::None => Moments::None,
                MomentOf::F32(it) => Moments::F32(Shared::new(it)),
                MomentOf::Bf16(it) => Moments::Bf16(Shared::new(it)),
            }),
            sides: Sides::new(exchange),
            len,
        }
    }

    /// The states of some elements.
    ///
    /// # Safety
    /// They are in no other piece alive.
    unsafe fn piece(&self, range: Range<usize>) -> Stored<'_> {
        // SAFETY: by the contract above.
        unsafe {
            Stored {
                master: match &self.master {
                    Masters::F32(it) => MasterOf::F32(it.piece(range.clone())),
                    Masters::Rest(it) => MasterOf::Rest(it.piece(range.clone())),
                },
                moments: [0, 1].map(|which: usize| match &self.moments[which] {
                    Moments::None => MomentOf::None,
                    Moments::F32(it) => MomentOf::F32(it.piece(range.clone())),
                    Moments::Bf16(it) => MomentOf::Bf16(it.piece(range.clone())),
                }),
            }
        }
    }

    /// Takes some elements through `work`, on the instruction set.
    ///
    /// # Safety
    /// They are in no other piece alive, and this machine runs `isa`.
    pub(super) unsafe fn work(&self, isa: Isa, range: Range<usize>, work: Work<'_>) {
        // SAFETY: by the contract above.
        unsafe {
            let stored = self.piece(range.clone());
            self.sides.visit(range, Through { isa, work, stored });
        }
    }

    /// The bytes of an element's states that an update overwrites.
    fn logged_bytes(&self) -> usize {
        // Of a split master the parameter is the other half.
        let master = 4;
        let moment = |m: &Moments<'_>| match m {
            Moments::None => 0,
            Moments::F32(_) => Moment::F32.bytes(),
            Moments::Bf16(_) => Moment::Bf16.bytes(),
        };
        master + self.moments.iter().map(moment).sum::<u64>() as usize
    }
}

/// What is done to a block while it is in the nearest caches.
#[derive(Clone, Copy)]
pub(super) enum Work<'w> {
    /// The whole update.
    Update(&'w Scalars),
    /// LAMB's first pass: moments; and the sums of squares, lane by lane, of masters and of their directions.
    Moments(&'w super::LambScalars, &'w Lanes),
    /// LAMB's second pass, with the factor of the direction.
    Move(&'w super::LambScalars, f32),
}

/// Sums of squares of masters and directions.
#[derive(Default)]
pub(super) struct Lanes {
    pub(super) p: [std::cell::Cell<f64>; 16],
    pub(super) u: [std::cell::Cell<f64>; 16],
}

/// Elements on their way through.
struct Through<'t> {
    isa: Isa,
    work: Work<'t>,
    stored: Stored<'t>,
}

impl VisitSides for Through<'_> {
    type Output = ();

    unsafe fn apart<G: Value, P: Value>(self, grad: &[G], param: &mut [P]) {
        // SAFETY: the machine runs it.
        unsafe { blocks_on(self.isa, self.work, self.stored, Some(grad), param) };
    }

    unsafe fn in_place<T: Value>(self, both: &mut [T]) {
        // SAFETY: the machine runs it.
        unsafe { blocks_on::<T, T>(self.isa, self.work, self.stored, None, both) };
    }
}

#[inline(always)]
fn widen<G: Value>(from: &[G], to: &mut [f32; BLOCK]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.get();
    }
}

/// The bits of parameters of two bytes.
#[inline(always)]
pub(super) fn halves<P: Value>(param: &mut [P]) -> &mut [u16] {
    bytemuck::cast_slice_mut(param)
}

/// Takes elements through a block at a time; without `grad` the gradient is what the parameter replaces.
#[inline(always)]
fn blocks<G: Value, P: Value>(
    work: Work<'_>,
    mut stored: Stored<'_>,
    grad: Option<&[G]>,
    param: &mut [P],
) {
    let mut room = Room {
        g: [0.0; BLOCK],
        p: [0.0; BLOCK],
        m: [0.0; BLOCK],
        v: [0.0; BLOCK],
    };
    for start in (0..param.len()).step_by(BLOCK) {
        let at = start..(start + BLOCK).min(param.len());
        let param = &mut param[at.clone()];
        match grad {
            Some(grad) => widen(&grad[at.clone()][..param.len()], &mut room.g),
            None => widen(param, &mut room.g),
        }
        match param.len() {
            BLOCK => pass::<P, true>(work, stored.part(at), param, &mut room),
            _ => pass::<P, false>(work, stored.part(at), param, &mut room),
        }
    }
}

#[inline(always)]
fn pass<P: Value, const WHOLE: bool>(
    work: Work<'_>,
    stored: Stored<'_>,
    param: &mut [P],
    room: &mut Room,
) {
    // Of whole blocks the compiler knows the length.
    let n = if WHOLE { BLOCK } else { param.len() };
    let param = &mut param[..n];
    let Stored {
        mut master,
        mut moments,
    } = stored;
    match &master {
        MasterOf::F32(from) => room.p[..n].copy_from_slice(&from[..n]),
        MasterOf::Rest(rest) => {
            let (rest, param) = (&rest[..n], &halves(param)[..n]);
            for ((to, rest), param) in room.p[..n].iter_mut().zip(rest).zip(param) {
                *to = join(*param, *rest);
            }
        }
    }
    for (moment, to) in moments.iter().zip([&mut room.m, &mut room.v]) {
        match moment {
            MomentOf::None => to[..n].fill(0.0),
            MomentOf::F32(from) => to[..n].copy_from_slice(&from[..n]),
            MomentOf::Bf16(from) => widen(&from[..n], to),
        }
    }
    match work {
        Work::Update(Scalars::Unchanged) => {}
        Work::Update(Scalars::AdamW(s)) => each(s, n, room),
        Work::Update(Scalars::Sgd(s)) => each(s, n, room),
        Work::Update(Scalars::Lion(s)) => each(s, n, room),
        Work::Update(Scalars::Adagrad(s)) => each(s, n, room),
        Work::Update(Scalars::Lamb(_)) => unreachable!("LAMB takes two passes"),
        Work::Moments(s, _) => {
            for i in 0..n {
                (room.m[i], room.v[i]) = s.moments(room.g[i], room.m[i], room.v[i]);
            }
        }
        Work::Move(s, factor) => {
            for i in 0..n {
                let u = s.direction(room.p[i], room.m[i], room.v[i]);
                room.p[i] = factor.mul_add(u, room.p[i]);
            }
        }
    }
    if !matches!(work, Work::Update(Scalars::Unchanged) | Work::Move(..)) {
        for (moment, from) in moments.iter_mut().zip([&mut room.m, &mut room.v]) {
            match moment {
                MomentOf::None => {}
                MomentOf::F32(to) => to[..n].copy_from_slice(&from[..n]),
                MomentOf::Bf16(to) => {
                    for (to, from) in to[..n].iter_mut().zip(from) {
                        *to = bf16::put(*from);
                        // As it is stored, for who goes on with it.
                        *from = to.get();
                    }
                }
            }
        }
    }
    if let Work::Moments(s, lanes) = work {
        return sums(s, lanes, n, room);
    }
    match &mut master {
        MasterOf::F32(to) => {
            let to = &mut to[..n];
            for i in 0..n {
                to[i] = room.p[i];
                param[i] = P::put(room.p[i]);
            }
        }
        MasterOf::Rest(to) => {
            let (param, to) = (&mut halves(param)[..n], &mut to[..n]);
            for i in 0..n {
                (param[i], to[i]) = split(room.p[i]);
            }
        }
    }
}

#[inline(always)]
fn each<R: Rule>(rule: &R, n: usize, room: &mut Room) {
    let (g, p) = (&room.g[..n], &mut room.p[..n]);
    let (m, v) = (&mut room.m[..n], &mut room.v[..n]);
    for i in 0..n {
        (p[i], m[i], v[i]) = rule.element(g[i], p[i], m[i], v[i]);
    }
}

/// Adds a block's squares to their lanes: blocks begin at multiples of 16.
#[inline(always)]
fn sums(s: &super::LambScalars, lanes: &Lanes, n: usize, room: &mut Room) {
    for i in 0..n {
        room.g[i] = s.direction(room.p[i], room.m[i], room.v[i]);
    }
    for (lanes, values) in [(&lanes.p, &room.p), (&lanes.u, &room.g)] {
        let mut sums = lanes.each_ref().map(std::cell::Cell::get);
        for (i, value) in values[..n].iter().enumerate() {
            let value = f64::from(*value);
            sums[i % 16] += value * value;
        }
        for (lane, sum) in lanes.iter().zip(sums) {
            lane.set(sum);
        }
    }
}

macro_rules! path {
    ($module:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn blocks<G: Value, P: Value>(
                work: Work<'_>,
                stored: Stored<'_>,
                grad: Option<&[G]>,
                param: &mut [P],
            ) {
                super::blocks(work, stored, grad, param);
            }
        }
    };
}

path!(avx2, "avx2,fma");
path!(avx512, "avx2,fma,avx512f");

/// # Safety
/// This machine runs `isa`.
unsafe fn blocks_on<G: Value, P: Value>(
    isa: Isa,
    work: Work<'_>,
    stored: Stored<'_>,
    grad: Option<&[G]>,
    param: &mut [P],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx2 => unsafe { avx2::blocks(work, stored, grad, param) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the contract above.
        Isa::Avx512 => unsafe { avx512::blocks(work, stored, grad, param) },
        _ => blocks(work, stored, grad, param),
    }
}

/// Calls `f` with the bounds of every chunk, on all workers.
fn chunks(workers: &Workers, len: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    workers.run(len.div_ceil(CHUNK), &|chunk, _| {
        f(chunk * CHUNK..((chunk + 1) * CHUNK).min(len));
    });
}

pub(super) fn update(workers: &Workers, isa: Isa, scalars: &Scalars, all: &All<'_>) {
    chunks(workers, all.len, &|range| {
        // SAFETY: chunks do not overlap, and the machine runs it (checked by the caller).
        unsafe { all.work(isa, range, Work::Update(scalars)) };
    });
}

/// Updates, and logs what that overwrites.
pub(super) fn ahead(workers: &Workers, isa: Isa, scalars: &Scalars, all: &All<'_>, kept: Kept<'_>) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    logged(workers, all, kept, &|range, log, grad| {
        // SAFETY: units do not overlap, and the machine runs it (checked).
        unsafe {
            let keep = Overwritten {
                stored: all.piece(range.clone()),
                log,
                grad,
                back: false,
            };
            all.sides.visit(range.clone(), keep);
            all.work(isa, range, Work::Update(scalars));
        }
    });
}

/// Takes that back.
pub(super) fn undo(workers: &Workers, all: &All<'_>, kept: Kept<'_>) {
    logged(workers, all, kept, &|range, log, grad| {
        // SAFETY: units do not overlap.
        unsafe {
            let back = Overwritten {
                stored: all.piece(range.clone()),
                log,
                grad,
                back: true,
            };
            all.sides.visit(range, back);
        }
    });
}

/// Is given a unit's bounds, its log and room for its gradient.
type LoggedUnit<'f> = dyn Fn(Range<usize>, &mut [u8], &mut [u8]) + Sync + 'f;

/// Calls `f` with every unit.
fn logged(workers: &Workers, all: &All<'_>, kept: Kept<'_>, f: &LoggedUnit<'_>) {
    let bytes = all.sides.bytes_in_place();
    let unit_log = unit_log(all.logged_bytes());
    assert_eq!(
        (kept.log.len(), kept.grad.len()),
        (all.len.div_ceil(UNIT) * unit_log, all.len * bytes),
        "room for exactly what is overwritten"
    );
    let (log, grad) = (Shared::new(kept.log), Shared::new(kept.grad));
    chunks(workers, all.len, &|chunk| {
        for start in chunk.clone().step_by(UNIT) {
            let (end, index) = ((start + UNIT).min(chunk.end), start / UNIT);
            // SAFETY: units do not overlap, nor do their logs.
            let (log, grad) = unsafe {
                (
                    log.piece(index * unit_log..(index + 1) * unit_log),
                    grad.piece(start * bytes..end * bytes),
                )
            };
            f(start..end, log, grad);
        }
        past_caches::fence();
    });
}

/// What an update of a unit overwrites, to be kept or brought back.
struct Overwritten<'o> {
    stored: Stored<'o>,
    log: &'o mut [u8],
    grad: &'o mut [u8],
    back: bool,
}

impl Overwritten<'_> {
    fn states(self, param: Option<&mut [u16]>) {
        let Stored { master, moments } = self.stored;
        let mut log = &mut self.log[LINE..];
        let mut each = |state: &mut [u8]| {
            let (own, rest) = std::mem::take(&mut log).split_at_mut(state.len());
            log = rest;
            match self.back {
                true => state.copy_from_slice(own),
                false => past_caches::copy(own, state),
            }
        };
        match master {
            MasterOf::F32(it) => each(bytemuck::cast_slice_mut(it)),
            MasterOf::Rest(it) => {
                each(bytemuck::cast_slice_mut(it));
                each(bytemuck::cast_slice_mut(param.unwrap_or_default()));
            }
        }
        for moment in moments {
            match moment {
                MomentOf::None => {}
                MomentOf::F32(it) => each(bytemuck::cast_slice_mut(it)),
                MomentOf::Bf16(it) => each(bytemuck::cast_slice_mut(it)),
            }
        }
    }
}

impl VisitSides for Overwritten<'_> {
    type Output = ();

    unsafe fn apart<G: Value, P: Value>(self, _: &[G], param: &mut [P]) {
        let param = matches!(self.stored.master, MasterOf::Rest(_)).then(|| halves(param));
        self.states(param);
    }

    unsafe fn in_place<T: Value>(mut self, both: &mut [T]) {
        let (grad, both) = (
            std::mem::take(&mut self.grad),
            bytemuck::cast_slice_mut(both),
        );
        match self.back {
            true => both.copy_from_slice(grad),
            false => past_caches::copy(grad, both),
        }
        self.states(None);
    }
}
