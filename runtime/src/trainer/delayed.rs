//! Updates beside the next step ([`Updates::Delayed`](super::Updates)).
//!
//! The plan of a step holds the updates with the gradient of the step before. So a step's gradient waits until
//! the next one begins, and the first step's updates have none: they cast the masters, which changes nothing.
//! Whoever asks for parameters of all gradients so far has the one that waits applied by a plan of updates alone; the
//! step behind that is like the first.

use forebay_prefetch::{SectionId, Task, TaskRef, Timing};

use super::engine::{Engine, Pass};
use super::update::StepScalars;
use crate::device::Stream;
use crate::error::Result;

impl Engine {
    /// Whether a step's updates apply the gradient of the step before.
    pub(super) fn delayed(&self) -> bool {
        self.placement.options().timing == Timing::Delayed
    }

    /// What an update uses: the scalars of the step whose gradient it applies.
    pub(super) fn update_scalars(&self, task: TaskRef) -> StepScalars {
        if !self.delayed() {
            return self.step_scalars(task.step);
        }
        let gradient = self.applies(task);
        gradient.map_or_else(StepScalars::unchanged, |step| self.step_scalars(step))
    }

    /// The step whose gradient the updates beside a delayed task apply, if there is one.
    pub(super) fn applies(&self, task: TaskRef) -> Option<u64> {
        match self.pass {
            Pass::Flush => self.waiting,
            Pass::Train | Pass::Eval => self.open.of(task.step).applies,
        }
    }

    /// Applies the gradient that waits, if one does. Nothing else is under way.
    pub(super) fn flush(&mut self) -> Result<()> {
        if self.waiting.is_none() {
            return Ok(());
        }
        self.pass = Pass::Flush;
        self.scheduler_mut().begin_step();
        let flushed = self.wait_until(|engine| engine.scheduler().idle());
        self.pass = Pass::Train;
        flushed?;
        self.waiting = None;
        self.telemetry.pause(self.device.busy(Stream::Compute));
        self.cut_trace();
        Ok(())
    }

    /// The slab in which the new parameters are becomes the parameters', and theirs takes the next gradient.
    pub(super) fn swap_param(&mut self, task: TaskRef, spec: &Task, section: SectionId) {
        let place = self.slab_place(task, spec);
        self.places.swap_param(section, place);
        self.done(task);
    }
}
