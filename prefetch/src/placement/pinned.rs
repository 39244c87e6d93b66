//! What pinned memory holds: what passes through it, then gradients, parameters and optimizer states as far as
//! they go, then room to undo updates. The disk takes the rest.

use super::{Budgets, GradHome, Placement, Policy};
use crate::Error;
use crate::model::{Model, SectionId, Tier, Timing};

impl Placement {
    /// As it would be with no need of a disk.
    fn full(&self) -> Self {
        let mut full = self.clone();
        for section in 0..full.param_home.len() {
            full.keep_param(section);
            full.keep_optim(section);
        }
        full.set_grad_homes(true);
        full.stage(true);
        full
    }

    pub(super) fn fill_pinned(&mut self, model: &Model, budgets: Budgets) -> Result<(), Error> {
        let budget = budgets.pinned_bytes;
        let mut full = self.full();
        if full.pinned_bytes() > budget {
            // What could be read in place is in the way of more than it would save.
            for section in 0..model.sections.len() {
                let mut trial = self.clone();
                trial.give_slot(section);
                if trial.device_bytes() <= budgets.device_bytes {
                    *self = trial;
                }
            }
            full = self.full();
        }
        match self.options.policy {
            Policy::Resident | Policy::Pinned if full.pinned_bytes() > budget => {
                return Err(Error::PinnedBudget {
                    have: budget,
                    least: full.pinned_bytes(),
                });
            }
            Policy::Resident | Policy::Pinned => {
                *self = full;
                return Ok(());
            }
            Policy::Auto if full.pinned_bytes() <= budget => {
                *self = full;
                return Ok(());
            }
            Policy::Auto | Policy::Disk => {}
        }
        self.set_grad_homes(false);
        self.stage(false);
        if self.pinned_bytes() > budget {
            return Err(Error::PinnedBudget {
                have: budget,
                least: self.pinned_bytes(),
            });
        }
        let ahead = self.try_pinned(budget, |p| p.stage(true));
        if self.options.policy == Policy::Auto {
            self.keep_in_pinned(model, budget, ahead);
        }
        Ok(())
    }

    /// Room to undo updates that run before the norm, from what is left.
    pub(super) fn keep_undo(&mut self, budget: u64) {
        let stays = |section: usize| {
            let waits = self.update_reads_param(SectionId(section as u32));
            self.grad_home[section] == GradHome::Slab && !waits
        };
        let sections = self.parts.iter().enumerate().filter(|(s, _)| stays(*s));
        let parts = sections.flat_map(|(_, parts)| parts);
        let may = parts.filter(|p| p.home == Tier::Pinned).count() as u64;
        let left = budget.saturating_sub(self.pinned_bytes());
        let ahead = self.options.timing != Timing::Delayed;
        if ahead && self.options.undo_log_bytes > 0 && may > 0 {
            self.undo = may.min(left / self.undo_slab_bytes());
        }
    }

    /// Gradients first (they would travel twice), then parameters (read twice a step), then
    /// optimizer states, part by part.
    fn keep_in_pinned(&mut self, model: &Model, budget: u64, ahead: bool) {
        let sections = 0..model.sections.len();
        let here: Vec<bool> = self
            .grad_home
            .iter()
            .map(|h| *h != GradHome::Device)
            .collect();
        if self.options.timing != Timing::Immediate {
            for section in sections.clone().filter(|s| here[*s]) {
                self.try_pinned(budget, |p| {
                    p.grad_home[section] = GradHome::Slab;
                    p.stage(ahead);
                });
            }
        } else {
            self.wait_in_pinned(model, budget, ahead);
        }
        for section in sections.clone() {
            self.try_pinned(budget, |p| {
                p.keep_param(section);
                p.stage(ahead);
            });
        }
        for section in sections.filter(|s| here[*s]) {
            if self.options.timing == Timing::Immediate {
                self.try_pinned(budget, |p| {
                    p.keep_optim(section);
                    p.grad_home[section] = GradHome::Slab;
                    p.stage(ahead);
                });
                continue;
            }
            for part in 0..self.parts[section].len() {
                self.try_pinned(budget, |p| {
                    p.parts[section][part].home = Tier::Pinned;
                    p.stage(ahead);
                });
            }
        }
    }

    /// With updates during the backward pass the disk would rest in the forward pass. So a third
    /// of the gradients (as forward is a third of a step), spread evenly, waits in pinned memory,
    /// and their sections are updated under the next forward pass.
    fn wait_in_pinned(&mut self, model: &Model, budget: u64, ahead: bool) {
        let mut sections: Vec<usize> = (0..model.sections.len()).collect();
        sections.sort_by_key(|s| model.first_use(SectionId(*s as u32)));
        let (mut seen, mut waiting) = (0, 0);
        for section in sections {
            let elements = model.sections[section].elements;
            seen += elements;
            if self.grad_home[section] == GradHome::Device || 3 * (waiting + elements) > seen {
                continue;
            }
            let fits = self.try_pinned(budget, |p| {
                p.grad_home[section] = GradHome::Slab;
                p.stage(ahead);
            });
            waiting += elements * u64::from(fits);
        }
    }

    fn try_pinned(&mut self, budget: u64, change: impl FnOnce(&mut Self)) -> bool {
        let mut trial = self.clone();
        change(&mut trial);
        let fits = trial.pinned_bytes() <= budget;
        if fits {
            *self = trial;
        }
        fits
    }

    fn keep_param(&mut self, section: usize) {
        if self.param_home[section] == Tier::Disk {
            self.param_home[section] = Tier::Pinned;
        }
    }

    fn keep_optim(&mut self, section: usize) {
        for part in &mut self.parts[section] {
            if part.home == Tier::Disk {
                part.home = Tier::Pinned;
            }
        }
    }

    pub(super) fn set_grad_homes(&mut self, in_pinned: bool) {
        for section in 0..self.grad_home.len() {
            if self.grad_home[section] == GradHome::Device {
                continue;
            }
            let all_on_disk = self.parts[section].iter().all(|p| p.home == Tier::Disk);
            self.grad_home[section] = match self.options.timing {
                Timing::Immediate if all_on_disk => GradHome::Passing,
                _ if in_pinned => GradHome::Slab,
                _ => GradHome::Disk,
            };
        }
    }

    /// Sizes the shared slabs for what passes through pinned memory: one of each kind, or as many
    /// as overlap wants.
    pub(super) fn stage(&mut self, ahead: bool) {
        let lookahead = u64::from(self.options.lookahead);
        let wanted = |passing: usize, most: u64| match passing {
            0 => 0,
            n if ahead => most.min(n as u64),
            _ => 1,
        };
        for (index, class) in self.classes.iter().enumerate() {
            let count = |holds: &dyn Fn(usize) -> bool| {
                class.members.iter().filter(|s| holds(s.0 as usize)).count()
            };
            let params = count(&|s| self.param_home[s] == Tier::Disk);
            // Those of a split master pass through one when they are loaded and published.
            let here = |s: usize| self.options.split && self.grad_home[s] == GradHome::Device;
            let any_here = u64::from(count(&here) > 0);
            let passes = |s: usize| matches!(self.grad_home[s], GradHome::Disk | GradHome::Passing);
            let grads = count(&passes);
            self.param_stage[index] = wanted(params, 2 + lookahead).max(any_here);
            self.grad_stage[index] = wanted(grads, 2 + lookahead.min(1));
        }
        let parts = self
            .parts
            .iter()
            .flatten()
            .filter(|p| p.home == Tier::Disk)
            .count();
        // What lives on the device comes and goes through one too, when it is loaded and published.
        let any_here = self.grad_home.contains(&GradHome::Device);
        self.optim_stage = wanted(parts, 1 + lookahead.max(1) * 2).max(u64::from(any_here));
    }
}
