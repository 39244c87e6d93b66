//! The optimizer's work on one section: the updates of its parts, as closures for the CPU lane.
//!
//! A part's states lie in one slab, component after component: the master, then moments. The
//! gradient is read where the copy from the device left it. The new parameters go to the
//! section's own slab in pinned memory if it has one there, and else over the gradient.

use std::ops::Range;
use std::sync::Arc;

use forebay_kernels::cpu::{
    self, Binding, Exchange, Isa, Kept, Optimizer, Scalars, StateFormat, Stored, Workers,
    f32_to_bf16, f32_to_f16, update_ahead, update_rest, update_undo,
};

use super::trace::Shifts;
use crate::model::{Model, Section};
use crate::tensor::DType;

/// A run of elements of a section that the optimizer treats alike: those that weight decay does, or a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    elements: Range<usize>,
    decay: bool,
}

/// The runs of a section, in order, covering it (padding joins the tensor before it).
pub(super) fn runs(section: &Section, optimizer: &Optimizer) -> Arc<[Run]> {
    let whole = optimizer.whole_tensors();
    let mut runs: Vec<Run> = Vec::new();
    for (start, tensor) in section.places() {
        match runs.last_mut() {
            Some(last) if last.decay == tensor.decay && !whole => {}
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

/// What the CPU updates with.
#[derive(Debug)]
pub(super) struct Updater {
    pub(super) workers: Workers,
    pub(super) binding: Binding,
    /// What each worker does, while a trace is written.
    pub(super) shifts: Option<Shifts>,
    pub(super) isa: Isa,
    pub(super) optimizer: Optimizer,
    pub(super) format: StateFormat,
}

/// Where one part of a section is updated.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartPlace {
    /// The part's states.
    pub(super) states: *mut u8,
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
    pub(super) decayed: Scalars,
    pub(super) plain: Scalars,
}

impl StepScalars {
    /// Those of a step that changes nothing: parameters are cast from their masters.
    pub(super) fn unchanged() -> Self {
        Self {
            decayed: Scalars::Unchanged,
            plain: Scalars::Unchanged,
        }
    }

    /// Whether the step changes nothing.
    fn is_unchanged(&self) -> bool {
        self.decayed.is_unchanged()
    }

    /// Those of a run.
    pub(super) fn of(&self, run: &Run) -> &Scalars {
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
/// gradient that it replaces; nothing where none may run ahead.
pub(super) fn undo_room(
    model: &Model,
    elements: u64,
    optimizer: &Optimizer,
    format: StateFormat,
) -> (u64, u64) {
    // Parts begin and end at multiples of this.
    let elements = elements.next_multiple_of(64);
    // Each run has a log of its own.
    let most = model
        .sections
        .iter()
        .map(|s| runs(s, optimizer).len())
        .max();
    let log = |elements| optimizer.log_bytes(format, elements);
    match log(elements as usize).zip(log(1)) {
        None => (0, 0),
        Some((all, one)) => (
            (all + most.unwrap_or(0) * one) as u64,
            elements * model.dtype.bytes() as u64,
        ),
    }
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
    updater: &Updater,
    work: Work,
    scalars: &StepScalars,
    runs: &[Run],
    place: PartPlace,
) -> Option<usize> {
    let (workers, isa) = (&updater.workers, updater.isa);
    if matches!(work, Work::Update) && place.param.is_some() && scalars.is_unchanged() {
        // The parameters are what their masters are cast to already.
        return None;
    }
    let mut left = 0;
    let each =
        |run: &Run, mut states: Stored<'_>, mut exchange: Exchange<'_>, kept: Option<Kept<'_>>| {
            let scalars = scalars.of(run);
            match (work, kept) {
                (Work::Ahead, Some(kept)) => {
                    left += update_ahead(workers, isa, scalars, states, exchange, kept);
                }
                (Work::Rest, Some(kept)) => {
                    update_rest(workers, isa, scalars, states, exchange, kept);
                }
                (Work::Again(before), Some(kept)) => {
                    let (old, e) = (states.reborrow(), exchange.reborrow());
                    update_undo(workers, isa, before.of(run), old, e, kept);
                    cpu::update(workers, isa, scalars, states, exchange);
                }
                (Work::Ahead | Work::Rest | Work::Again(_), None) => {
                    unreachable!("what runs ahead has room to be undone")
                }
                (Work::Update, _) => cpu::update(workers, isa, scalars, states, exchange),
            }
        };
    // SAFETY: by the caller's contract.
    unsafe { each_run(updater, runs, place, each) };
    Some(left)
}

/// Calls `f` with each run of a part: its states, gradient and parameter, and the room to keep them.
///
/// # Safety
/// As for [`work`].
unsafe fn each_run(
    updater: &Updater,
    runs: &[Run],
    place: PartPlace,
    mut f: impl FnMut(&Run, Stored<'_>, Exchange<'_>, Option<Kept<'_>>),
) {
    let part = place.first..place.first + place.elements;
    let (format, mut logged) = (updater.format, 0);
    let log_bytes = |elements| updater.optimizer.log_bytes(format, elements).unwrap_or(0);
    for run in runs {
        let Some(shared) = run.within(&part) else {
            continue;
        };
        let (start, len) = (shared.start, shared.len());
        let inside = start - part.start;
        let bytes = place.dtype.bytes();
        // SAFETY: the ranges lie inside the part and the section, by the caller's contract; states,
        // gradient, parameter and what is kept are different slabs.
        let (states, exchange, kept) = unsafe {
            let bytes_of_part = format.bytes() as usize * place.elements;
            let states: &mut [u8] = run_of(place.states, 0, bytes_of_part);
            let states = format.view(states, place.elements, inside..inside + len);
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
            (states, exchange, kept)
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
        let adam = crate::Options::new([]).optimizer;
        let runs = runs(&section, &adam);
        let expected = [(0..64, false), (64..256, true), (256..320, false)];
        assert_eq!(runs.len(), expected.len());
        for (run, (elements, decay)) in runs.iter().zip(expected) {
            assert_eq!((run.elements.clone(), run.decay), (elements, decay));
        }
    }
}
