//! Updates that come a step late ([`Timing::Delayed`]; ZeRO-Offload, section 5.2).
//!
//! The gradient of a step waits where it arrived, and the next step's plan updates with it while that step
//! computes. New parameters take the gradient's place meanwhile, and come to where parameters live behind
//! everything that reads the old ones in the step; then the new gradient may have the place. So a step knows its clip
//! factor before it begins, and nothing of it waits for the backward pass.

use super::{Builder, after, issued, previous};
use crate::model::{Model, SectionId, Timing};
use crate::placement::{GradHome, Placement};
use crate::plan::{Dep, Plan, TaskKind};

/// The plan that applies the gradients that wait, with no step behind it.
pub(crate) fn flush(model: &Model, placement: &Placement) -> Plan {
    let mut builder = Builder::new(model, &[], placement);
    if builder.delayed() {
        let mut waiting: Vec<SectionId> = (0..model.sections.len() as u32)
            .map(SectionId)
            .filter(|s| model.grad_span(*s).is_some())
            .collect();
        waiting.sort_by_key(|s| model.first_use(*s));
        for section in waiting {
            builder.updates_of_waiting(section);
        }
    }
    builder.finish()
}

impl Builder<'_> {
    pub(super) fn delayed(&self) -> bool {
        self.placement.options().timing == Timing::Delayed
    }

    /// Updates a section with the gradient of the step before, and brings the new parameters to where they live
    /// once the stages so far have read the old ones. Stands in front of what ends the new gradient, in whose
    /// order it is due.
    fn updates_of_waiting(&mut self, section: SectionId) {
        match self.placement.grad_home(section) {
            GradHome::Device => {
                let user = self.progress(section).user;
                self.updates_on_device(section, user.map(issued));
            }
            GradHome::Slab | GradHome::Passing => self.updates(section, None),
            GradHome::Disk => {
                let read = self.read_grad(section, Vec::new());
                self.progress(section).grad_read = Some(read);
                self.updates(section, Some(after(read)));
            }
        }
    }

    /// What has read a section's parameters by then. A copy to the device waits here and not on its stream, where
    /// it would stand in the way of others.
    pub(super) fn read_through(&self, section: SectionId) -> Vec<Dep> {
        let progress = &self.sections[section.0 as usize];
        let fetches = progress.fetches.iter().copied();
        fetches
            .chain(progress.read)
            .chain(progress.user)
            .map(after)
            .collect()
    }

    /// Has the gradient that waits applied. What must have left its place before the next one comes.
    pub(super) fn place_freed(&mut self, section: SectionId) -> Vec<Dep> {
        if !self.delayed() {
            return Vec::new();
        }
        self.updates_of_waiting(section);
        let progress = &self.sections[section.0 as usize];
        let Some(settled) = progress.settled else {
            return progress.updates.iter().copied().map(issued).collect();
        };
        let pushed = matches!(self.tasks[settled.0 as usize].kind, TaskKind::PushParam(_));
        vec![if pushed { issued } else { after }(settled)]
    }

    /// What updates need of the step before: its gradient, and the norm of all of it. The sums that make the norm
    /// are not overwritten before it is known.
    pub(super) fn link_waiting(&mut self) {
        for progress in self.sections.clone() {
            let norm = self.norm.map(after).map(previous);
            if let Some(sum) = progress.norm {
                self.at(sum).deps.extend(norm);
            }
            let spill = progress.spill.map(after).map(previous);
            if let Some(read) = progress.grad_read {
                self.at(read).deps.extend(spill);
            }
            let out = progress.out.filter(|_| progress.grad_read.is_none());
            for update in progress.updates {
                let arrived = out.map(after).map(previous);
                self.at(update).deps.extend(arrived.into_iter().chain(norm));
            }
        }
    }
}
