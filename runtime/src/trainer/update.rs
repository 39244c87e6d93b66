//! The optimizer's work on one section: the AdamW update of its parts, as closures for the CPU lane.
//!
//! A part's states lie in one slab, `[master | m | v]`, each of the part's elements in f32. The
//! gradient is read where the copy from the device left it. The new parameters go to the
//! section's own slab in pinned memory if it has one there, and else over the gradient.

use std::ops::Range;
use std::sync::Arc;

use forebay_kernels::cpu::{
    AdamScalars, Exchange, Isa, Kept, States, Workers, adamw_ahead, adamw_parallel, adamw_rest,
    adamw_undo, f32_to_bf16, f32_to_f16, log_bytes,
};

use crate::model::{Model, Section};
use crate::tensor::DType;

/// A run of elements of a section that weight decay treats alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    elements: Range<usize>,
    decay: bool,
}

/// The runs of a section, in order, covering it (padding joins the tensor before it).
pub(super) fn runs(section: &Section) -> Arc<[Run]> {
    let mut runs: Vec<Run> = Vec::new();
    for (start, tensor) in section.places() {
        match runs.last_mut() {
            Some(last) if last.decay == tensor.decay => {}
            Some(last) => {
                last.elements.end = start;
                runs.push(Run {
                    elements: start..start,
                    decay: tensor.decay,
                });
            }
            None => runs.push(Run {
                elements: 0..0,
                decay: tensor.decay,
            }),
        }
    }
    if let Some(last) = runs.last_mut() {
        last.elements.end = section.elements() as usize;
    }
    runs.into()
}

/// Worker threads and instruction set of the CPU optimizer.
#[derive(Debug)]
pub(super) struct Optimizer {
    pub(super) workers: Workers,
    pub(super) isa: Isa,
}

/// Where one part of a section is updated.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartPlace {
    /// `[master | m | v]` of the part.
    pub(super) states: *mut f32,
    /// The section's gradient, from its first element.
    pub(super) grad: *mut u8,
    /// The section's parameters if they have a slab of their own.
    pub(super) param: Option<*mut u8>,
    /// Where an update logs what it overwrites, and keeps a gradient that it replaces.
    pub(super) kept: Option<(*mut u8, *mut u8)>,
    /// The type of gradient and parameters.
    pub(super) dtype: DType,
    /// First element of the part in the section.
    pub(super) first: usize,
    /// Elements of the part.
    pub(super) elements: usize,
}

// SAFETY: plain addresses; who may touch them when is the engine's business (see `work`).
unsafe impl Send for PartPlace {}

/// Scalars of a step, with weight decay and without.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepScalars {
    pub(super) decayed: AdamScalars,
    pub(super) plain: AdamScalars,
}

impl StepScalars {
    /// Those of a step that changes nothing: parameters are cast from their masters.
    pub(super) fn unchanged() -> Self {
        let unchanged = AdamScalars::unchanged();
        Self {
            decayed: unchanged,
            plain: unchanged,
        }
    }

    /// Whether the step changes nothing.
    fn is_unchanged(&self) -> bool {
        self.decayed.is_unchanged()
    }

    /// Those of a run.
    pub(super) fn of(&self, run: &Run) -> &AdamScalars {
        if run.decay {
            &self.decayed
        } else {
            &self.plain
        }
    }
}

impl Run {
    /// The elements that it shares with a part, if any.
    pub(super) fn within(&self, part: &Range<usize>) -> Option<Range<usize>> {
        let start = self.elements.start.max(part.start);
        let end = self.elements.end.min(part.end);
        (start < end).then_some(start..end)
    }
}

/// Pinned memory in which an update of so many elements logs what it overwrites, and what it needs more for a
/// gradient that it replaces.
pub(super) fn undo_room(model: &Model, elements: u64) -> (u64, u64) {
    // Parts begin and end at multiples of this.
    let elements = elements.next_multiple_of(64);
    // Each run has a log of its own.
    let most = model.sections.iter().map(|s| runs(s).len()).max();
    let log = log_bytes(elements as usize) + most.unwrap_or(0) * log_bytes(1);
    (log as u64, elements * model.dtype.bytes() as u64)
}

/// What is done to a part.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Its update.
    Update,
    /// Its update before the norm is known: what is overwritten goes to [`PartPlace::kept`].
    Ahead,
    /// What that left over.
    Rest,
    /// What it did, with these scalars, is taken back (parameters with a slab of their own stay as they are), and
    /// the update made anew.
    Again(StepScalars),
}

impl Work {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Update => "update",
            Self::Ahead => "update ahead",
            Self::Rest => "rest of an update",
            Self::Again(_) => "update again",
        }
    }
}

/// Works on one part. How many elements an update ahead left; `None` if there was nothing to do.
///
/// # Safety
/// The place is mapped for its elements, and nobody else touches it until this returns.
pub(super) unsafe fn work(
    optimizer: &Optimizer,
    work: Work,
    scalars: &StepScalars,
    runs: &[Run],
    place: PartPlace,
) -> Option<usize> {
    let (workers, isa) = (&optimizer.workers, optimizer.isa);
    if matches!(work, Work::Update) && place.param.is_some() && scalars.is_unchanged() {
        // The parameters are what their masters are cast to already.
        return None;
    }
    let mut left = 0;
    let each =
        |run: &Run, mut states: States<'_>, mut exchange: Exchange<'_>, kept: Option<Kept<'_>>| {
            let scalars = scalars.of(run);
            match (work, kept) {
                (Work::Ahead, Some(kept)) => {
                    left += adamw_ahead(workers, isa, scalars, states, exchange, kept);
                }
                (Work::Rest, Some(kept)) => {
                    adamw_rest(workers, isa, scalars, states, exchange, kept);
                }
                (Work::Again(before), Some(kept)) => {
                    let (old, e) = (states.reborrow(), exchange.reborrow());
                    adamw_undo(workers, isa, before.of(run), old, e, kept);
                    adamw_parallel(workers, isa, scalars, states, exchange);
                }
                (Work::Ahead | Work::Rest | Work::Again(_), None) => {
                    unreachable!("what runs ahead has room to be undone")
                }
                (Work::Update, _) => adamw_parallel(workers, isa, scalars, states, exchange),
            }
        };
    // SAFETY: by the caller's contract.
    unsafe { each_run(runs, place, each) };
    Some(left)
}

/// Calls `f` with each run of a part: its states, gradient and parameter, and the room to keep them.
///
/// # Safety
/// As for [`work`].
unsafe fn each_run(
    runs: &[Run],
    place: PartPlace,
    mut f: impl FnMut(&Run, States<'_>, Exchange<'_>, Option<Kept<'_>>),
) {
    let part = place.first..place.first + place.elements;
    let mut logged = 0;
    for run in runs {
        let Some(shared) = run.within(&part) else {
            continue;
        };
        let (start, len) = (shared.start, shared.len());
        let inside = start - part.start;
        let bytes = place.dtype.bytes();
        // SAFETY: the ranges lie inside the part and the section, by the caller's contract; the
        // three state arrays do not overlap each other, and gradient, parameter and what is kept are
        // different slabs.
        let (states, exchange, kept) = unsafe {
            let states = |base: *mut f32| {
                let state = |i: usize| {
                    std::slice::from_raw_parts_mut(base.add(i * place.elements + inside), len)
                };
                States {
                    master: state(0),
                    m: state(1),
                    v: state(2),
                }
            };
            let exchange = match (place.dtype, place.param) {
                (DType::Bf16, Some(param)) => Exchange::Bf16 {
                    grad: run_of(place.grad, start, len),
                    param: run_of(param, start, len),
                },
                (DType::Bf16, None) => Exchange::InPlaceBf16(run_of(place.grad, start, len)),
                (DType::F16, Some(param)) => Exchange::F16 {
                    grad: run_of(place.grad, start, len),
                    param: run_of(param, start, len),
                },
                (DType::F16, None) => Exchange::InPlaceF16(run_of(place.grad, start, len)),
                (_, Some(param)) => Exchange::F32 {
                    grad: run_of(place.grad, start, len),
                    param: run_of(param, start, len),
                },
                (_, None) => Exchange::InPlaceF32(run_of(place.grad, start, len)),
            };
            let in_place = if place.param.is_none() { bytes } else { 0 };
            let kept = place.kept.map(|(log, grad)| Kept {
                log: run_of(log, logged, log_bytes(len)),
                grad: run_of(grad, in_place * inside, in_place * len),
            });
            (states(place.states), exchange, kept)
        };
        logged += log_bytes(len);
        f(run, states, exchange, kept);
    }
}

/// Elements of an array that begins at `base`.
///
/// # Safety
/// They are mapped, of this type, and nobody else touches them as long as the slice lives.
unsafe fn run_of<'a, T>(base: *mut u8, start: usize, len: usize) -> &'a mut [T] {
    // SAFETY: by the contract above.
    unsafe { std::slice::from_raw_parts_mut(base.cast::<T>().add(start), len) }
}

/// Puts parameters where they live, cast from their masters.
///
/// # Safety
/// `to` is the address of the first of as many elements of this type, which nobody else touches until
/// this returns.
pub(super) unsafe fn cast_masters(masters: &[f32], to: *mut u8, dtype: DType) {
    // SAFETY: by the contract above.
    unsafe {
        match dtype {
            DType::Bf16 => f32_to_bf16(masters, run_of(to, 0, masters.len())),
            DType::F16 => f32_to_f16(masters, run_of(to, 0, masters.len())),
            DType::F32 | DType::U32 => run_of(to, 0, masters.len()).copy_from_slice(masters),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Init;

    #[test]
    fn runs_cover_a_section_and_part_where_decay_changes() {
        let zero = Init::Constant(0.0);
        let section = Section::new("layer")
            .tensor("norm", [10], zero)
            .tensor("a", [3, 5], zero)
            .tensor("b", [70, 1], zero)
            .tensor("other norm", [1], zero);
        let runs = runs(&section);
        let expected = [(0..64, false), (64..256, true), (256..320, false)];
        assert_eq!(runs.len(), expected.len());
        for (run, (elements, decay)) in runs.iter().zip(expected) {
            assert_eq!((run.elements.clone(), run.decay), (elements, decay));
        }
    }
}
