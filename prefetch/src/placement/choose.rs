//! What the device keeps, chosen by measured rates.
//!
//! A byte of the device can hold a checkpoint, parameters or optimizer states. What that saves depends on what
//! binds: the link, which moves the first two, or the CPU, which updates what the device does not. So several
//! ways to divide the device are tried on the simulator, and the one that promises the shortest step is taken.

use std::sync::Arc;

use super::{Budgets, GradHome, PlaceOptions, Placement, place_with};
use crate::bound::{Rates, Traffic, bound};
use crate::model::{Model, SectionId, StageSpec};
use crate::sim::simulate;

/// How fast the resources are that a placement weighs against each other, measured by bare code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlaceRates {
    /// Elements per second updated by the CPU.
    pub cpu: f64,
    /// The same with the log of updates ahead of the norm.
    pub cpu_ahead: f64,
    /// Bytes per second to the device.
    pub h2d: f64,
    /// Bytes per second from the device.
    pub d2h: f64,
    /// Bytes per second read from disk.
    pub disk_read: f64,
    /// Bytes per second written to disk.
    pub disk_write: f64,
    /// Elements per second updated on the device; infinite where that is not known.
    pub device_update: f64,
    /// Seconds of a step's compute, forward and backward, to within a third or so; 0 where that is not known, and
    /// then nothing is chosen: whether updates or copies are hidden by compute is what matters.
    pub compute_s: f64,
}

/// What the device holds before the rest of it is filled in the usual order.
#[derive(Clone, Debug)]
pub(super) struct Keep {
    /// Sections of which everything stays: parameters, gradient and optimizer states.
    pub(super) own: Vec<SectionId>,
    /// Whether checkpoints come before parameters.
    pub(super) acts_first: bool,
    /// Whether optimizer states of others may follow, where all parameters are there.
    pub(super) states: bool,
}

impl Keep {
    pub(super) fn usual() -> Self {
        Self {
            own: Vec::new(),
            acts_first: true,
            states: true,
        }
    }

    fn own(sections: &[SectionId], acts_first: bool) -> Self {
        Self {
            own: sections.to_vec(),
            acts_first,
            states: false,
        }
    }
}

/// Parts, about, of a model that is simulated.
const PARTS: u64 = 512;
/// Steps that are simulated; the second half counts.
const STEPS: u64 = 6;
/// What a second of copies takes of the memory that compute and updates work on, on either side, in seconds.
/// From figures of an H200: forward and backward of 171 ms take 184 with some 110 ms of copies beside them.
const BESIDE: f64 = 0.125;
/// Seconds of a step that are not worth simulating: the clock is in nanoseconds.
const TOO_LONG: f64 = 1e6;
/// What another way must promise to be preferred to the usual one.
const GAIN: f64 = 0.98;

impl PlaceRates {
    /// What is wrong with them, in one line.
    ///
    /// # Errors
    /// A rate that is not more than 0, or seconds that are no number.
    pub fn check(&self) -> Result<(), String> {
        let rates = [
            ("cpu", self.cpu),
            ("cpu_ahead", self.cpu_ahead),
            ("h2d", self.h2d),
            ("d2h", self.d2h),
            ("disk_read", self.disk_read),
            ("disk_write", self.disk_write),
            ("device_update", self.device_update),
        ];
        if let Some((name, rate)) = rates
            .into_iter()
            .find(|(_, rate)| rate.is_nan() || *rate <= 0.0)
        {
            return Err(format!("a rate of {rate} ({name}): use more than 0"));
        }
        match self.compute_s {
            seconds if seconds >= 0.0 && seconds.is_finite() => Ok(()),
            seconds => Err(format!("{seconds} seconds of compute: use 0 or more")),
        }
    }

    /// Rates of the simulator, compute shared out by what stages read: a backward stage computes forward
    /// again, and then twice as much.
    fn of_stages(&self, model: &Model) -> Rates {
        let weight = |stage: &StageSpec| {
            let elements = |id: &SectionId| model.sections[id.0 as usize].elements as f64;
            let passes = if stage.grads.is_empty() { 1.0 } else { 3.0 };
            passes * stage.params.iter().map(elements).sum::<f64>()
        };
        let all: f64 = model.stages.iter().map(weight).sum();
        let share = |stage| self.compute_s * weight(stage) / all.max(1.0);
        Rates {
            stage_seconds: model.stages.iter().map(share).collect(),
            h2d: self.h2d,
            d2h: self.d2h,
            disk_read: self.disk_read,
            disk_write: self.disk_write,
            cpu: self.cpu,
            cpu_ahead: self.cpu_ahead,
            device_update: self.device_update,
        }
    }
}

/// The placement that promises the shortest step: the usual one where no other promises a clearly shorter one.
pub(super) fn choose(
    model: &Model,
    budgets: Budgets,
    options: &PlaceOptions,
    rates: &PlaceRates,
    usual: Placement,
) -> Placement {
    let trained = |s: &SectionId| model.grad_span(*s).is_some();
    let here = |s: SectionId| usual.grad_home(s) == GradHome::Device;
    if rates.compute_s <= 0.0 || model.section_ids().filter(trained).all(here) {
        return usual;
    }
    let rates = rates.of_stages(model);
    let coarse = coarser(model, options);
    // Seconds of a step, or infinity if that is no less than `least`.
    let promise = |keep: &Keep, placement: &Placement, least: f64| {
        let coarse = coarse.and_then(|options| place_with(model, budgets, &options, keep).ok());
        promise(model, coarse.as_ref().unwrap_or(placement), &rates, least)
    };
    let place = |keep: &Keep| place_with(model, budgets, options, keep).ok();
    let own = all_that_fit(model, |own| place(&Keep::own(own, true)).is_some());
    let promised = promise(&Keep::usual(), &usual, f64::INFINITY);
    let mut best = (GAIN * promised, usual);
    // Most first: what follows is mostly ruled out by its bound.
    for count in (0..=own.len()).rev() {
        for acts_first in [true, false] {
            let keep = Keep::own(&own[..count], acts_first);
            let Some(placement) = place(&keep) else {
                continue;
            };
            let promised = promise(&keep, &placement, best.0);
            if promised < best.0 {
                best = (promised, placement);
            }
        }
    }
    best.1
}

/// Options with parts so large that a step of a large model is simulated in little time, if these are not.
fn coarser(model: &Model, options: &PlaceOptions) -> Option<PlaceOptions> {
    let elements: u64 = model.sections.iter().map(|s| s.elements).sum();
    let times = elements / PARTS / options.chunk_elements.max(1);
    (times > 1).then(|| PlaceOptions {
        chunk_elements: times * options.chunk_elements,
        undo_log_bytes: times * options.undo_log_bytes,
        undo_grad_bytes: times * options.undo_grad_bytes,
        ..*options
    })
}

/// The sections that can have everything on the device at once, in the order in which a forward pass needs them:
/// the gradients of the others are whole first, and their parameters needed last.
fn all_that_fit(model: &Model, fit: impl Fn(&[SectionId]) -> bool) -> Vec<SectionId> {
    let mut order: Vec<SectionId> = model.section_ids().collect();
    order.retain(|s| model.grad_span(*s).is_some());
    order.sort_by_key(|s| model.first_use(*s));
    let mut own = Vec::with_capacity(order.len());
    for section in order {
        own.push(section);
        if !fit(&own) {
            own.pop();
        }
    }
    own
}

/// Seconds of a step, or infinity where its bound is no less than `least`.
fn promise(model: &Model, placement: &Placement, rates: &Rates, least: f64) -> f64 {
    let plan = Arc::new(crate::build::training(model, placement));
    let moved = Traffic::of(&plan);
    let copies = moved.h2d as f64 / rates.h2d + moved.d2h as f64 / rates.d2h;
    let at_least = bound(&plan, rates, true).seconds + BESIDE * copies;
    if at_least >= least {
        return f64::INFINITY;
    }
    if at_least > TOO_LONG {
        return at_least;
    }
    simulate(plan, rates, STEPS, 0).step_seconds + BESIDE * copies
}
