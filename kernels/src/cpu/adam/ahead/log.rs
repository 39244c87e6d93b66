//! The log of a unit, and the loops that write and read it on any machine: simple ones, one after the other,
//! over what is in the nearest caches, for that is what compilers make fast.

use super::super::past_caches::LINE;
use super::super::paths::{StateSlices, Value};
use super::super::{AdamScalars, element};

/// Elements that are logged together: while they are at work, the log is in the first-level cache.
pub(in crate::cpu) const UNIT: usize = 1024;
/// Elements whose old values are written out together: a line of the caches of each state.
pub(super) const BLOCK: usize = 16;
/// Bytes of a unit's log: a line that says whether it was updated, for each block which states are written out,
/// three bytes an element, and room for what is written out.
pub(super) const UNIT_LOG: usize = 4 * UNIT + 2 * LINE;
pub(super) const WHOLE: u8 = 1;
const MASKS: usize = LINE;
const STEPS: usize = MASKS + UNIT / BLOCK;
const OUT: usize = STEPS + 3 * UNIT;

/// What a worker needs for a unit, on its stack and so in its caches.
#[repr(align(64))]
pub(super) struct Room {
    pub(super) log: [u8; UNIT_LOG],
    /// The states before: master, first and second moment.
    old: [[f32; UNIT]; 3],
    pub(super) quotient: [f32; UNIT],
    /// By state, elements whose distance does not fit into a byte.
    far: [[u8; UNIT]; 3],
}

impl Room {
    pub(super) fn new() -> Self {
        Self {
            log: [0; UNIT_LOG],
            old: [[0.0; UNIT]; 3],
            quotient: [0.0; UNIT],
            far: [[0; UNIT]; 3],
        }
    }
}

/// A unit's log while it is written.
pub(super) struct Writer<'l> {
    log: &'l mut [u8; UNIT_LOG],
    out: usize,
}

impl<'l> Writer<'l> {
    pub(super) fn new(log: &'l mut [u8; UNIT_LOG]) -> Self {
        log[MASKS..STEPS].fill(0);
        Self { log, out: OUT }
    }

    /// Where the distances of a state's elements stand.
    #[inline(always)]
    pub(super) fn steps(&mut self, which: usize) -> &mut [u8; UNIT] {
        let steps = self.log[STEPS + which * UNIT..].first_chunk_mut();
        steps.expect("a byte for each element of each state")
    }

    /// Writes out what a state was in a block; whether there is room. Blocks come in order, and in each of them
    /// the states.
    #[inline(always)]
    pub(super) fn write_out(&mut self, block: usize, which: usize, old: &[f32]) -> bool {
        let Some(room) = self.log.get_mut(self.out..self.out + LINE) else {
            return false;
        };
        let bytes: &[u8] = bytemuck::cast_slice(old);
        room[..bytes.len()].copy_from_slice(bytes);
        self.out += LINE;
        self.log[MASKS + block] |= 1 << which;
        true
    }

    /// What was written so far.
    pub(super) fn written(&self) -> &[u8] {
        &self.log[..]
    }

    /// Says that the unit was updated; the bytes of the log that are used.
    pub(super) fn end(self) -> usize {
        self.log[0] = WHOLE;
        self.out
    }
}

/// The inverse of [`element`], nearly, and the same on every path: each state before, from what it is now.
pub(super) struct Back<'s> {
    s: &'s AdamScalars,
    pub(super) by_keep: f32,
    pub(super) by_beta1: f32,
    pub(super) by_beta2: f32,
}

impl<'s> Back<'s> {
    pub(super) fn new(s: &'s AdamScalars) -> Self {
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

/// Distances of one of the three states, which was `old` and is `now`; `other` is what else `near` looks at.
#[inline(always)]
fn distances<T: Value>(
    steps: &mut [u8],
    far: &mut [u8],
    [old, now]: [&[f32]; 2],
    other: &[T],
    near: impl Fn(f32, f32) -> f32,
) {
    let n = old.len();
    let (steps, far) = (&mut steps[..n], &mut far[..n]);
    let (now, other) = (&now[..n], &other[..n]);
    for i in 0..n {
        let near = near(now[i], other[i].get()).to_bits();
        let step = old[i].to_bits().wrapping_sub(near).cast_signed();
        steps[i] = step as u8;
        far[i] = u8::from(step != i32::from(step as i8));
    }
}

/// Updates a unit and writes its log: the bytes of it that are used, or `None` if they do not suffice. Then
/// the states are as they were; the parameter is not.
#[inline(always)]
pub(super) fn ahead<G: Value, P: Value>(
    s: &AdamScalars,
    states: StateSlices<'_>,
    grad: &[G],
    param: &mut [P],
    room: &mut Room,
) -> Option<usize> {
    let (n, back) = (grad.len(), Back::new(s));
    let [old_p, old_m, old_v] = room.old.each_mut().map(|old| &mut old[..n]);
    let q = &mut room.quotient[..n];
    let (p, m, v) = (&mut states.0[..n], &mut states.1[..n], &mut states.2[..n]);
    let param = &mut param[..n];
    for i in 0..n {
        (old_p[i], old_m[i], old_v[i]) = (p[i], m[i], v[i]);
        let new = element(s, grad[i].get(), p[i], m[i], v[i]);
        (p[i], m[i], v[i]) = new;
        q[i] = back.quotient(new.1, new.2);
        param[i] = P::put(new.0);
    }
    let mut writer = Writer::new(&mut room.log);
    let [far_p, far_m, far_v] = room.far.each_mut();
    distances(writer.steps(0), far_p, [old_p, p], q, |p, q| {
        back.master(p, q)
    });
    distances(writer.steps(1), far_m, [old_m, m], grad, |m, g| {
        back.first(m, g)
    });
    distances(writer.steps(2), far_v, [old_v, v], grad, |v, g| {
        back.second(v, g)
    });
    for block in 0..n.div_ceil(BLOCK) {
        let range = block * BLOCK..n.min((block + 1) * BLOCK);
        for which in 0..3 {
            let far = &room.far[which][range.clone()];
            let any = match far.first_chunk() {
                Some(all) => u128::from_ne_bytes(*all) != 0,
                None => far.contains(&1),
            };
            if any && !writer.write_out(block, which, &room.old[which][range.clone()]) {
                for (state, old) in [p, m, v].into_iter().zip(&room.old) {
                    state.copy_from_slice(&old[..n]);
                }
                return None;
            }
        }
    }
    Some(writer.end())
}

/// Brings back the states of as many elements as there are gradients, from the start of a unit.
#[inline(always)]
pub(super) fn undo<G: Value>(
    s: &AdamScalars,
    states: StateSlices<'_>,
    grad: &[G],
    log: &[u8],
    quotient: &mut [f32; UNIT],
) {
    let (n, back) = (grad.len(), Back::new(s));
    let q = &mut quotient[..n];
    let (p, m, v) = (&mut states.0[..n], &mut states.1[..n], &mut states.2[..n]);
    for i in 0..n {
        q[i] = back.quotient(m[i], v[i]);
    }
    let steps = |which: usize| &log[STEPS + which * UNIT..][..n];
    step_back(steps(0), p, q, |p, q| back.master(p, q));
    step_back(steps(1), m, grad, |m, g| back.first(m, g));
    step_back(steps(2), v, grad, |v, g| back.second(v, g));
    let mut out = OUT;
    for block in 0..n.div_ceil(BLOCK) {
        let range = block * BLOCK..n.min((block + 1) * BLOCK);
        for (which, state) in [&mut *p, &mut *m, &mut *v].into_iter().enumerate() {
            if log[MASKS + block] & (1 << which) != 0 {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut state[range.clone()]);
                bytes.copy_from_slice(&log[out..out + bytes.len()]);
                out += LINE;
            }
        }
    }
}

#[inline(always)]
fn step_back<T: Value>(steps: &[u8], now: &mut [f32], other: &[T], near: impl Fn(f32, f32) -> f32) {
    for ((now, other), step) in now.iter_mut().zip(other).zip(steps) {
        let step = i32::from(step.cast_signed()).cast_unsigned();
        *now = f32::from_bits(near(*now, other.get()).to_bits().wrapping_add(step));
    }
}
