//! What the device holds: what overlap wants, then checkpoints and parameters, then optimizer states.

use super::choose::Keep;
use super::class::Class;
use super::{GradHome, Placement, Policy};
use crate::Error;
use crate::model::{Model, SectionId, Tier, Timing};

impl Placement {
    pub(super) fn fill_device(
        &mut self,
        model: &Model,
        budget: u64,
        keep: &Keep,
    ) -> Result<(), Error> {
        let ahead = u64::from(self.options.lookahead);
        if self.options.policy == Policy::Resident {
            self.classes.iter_mut().for_each(|c| {
                c.param_slots = c.slotted.len() as u64;
                c.grad_slots = c.members.len().min(c.grad_slots_min as usize + 1) as u64;
            });
            let all = (0..self.act_home.len()).collect::<Vec<_>>();
            self.keep_acts(&all);
        }
        if self.device_bytes() > budget {
            return Err(Error::DeviceBudget {
                have: budget,
                least: self.device_bytes(),
            });
        }
        // What overlap wants: room for the stages ahead, for gradients on their way out, and for
        // checkpoints on their way out and back.
        for class in 0..self.classes.len() {
            let slotted = self.classes[class].slotted.len() as u64;
            let wanted = (self.classes[class].param_slots_min + ahead).min(slotted);
            self.grow(budget, wanted, |p| &mut p.classes[class].param_slots);
            let members = self.classes[class].members.len() as u64;
            let wanted = (self.classes[class].grad_slots_min + ahead.min(1)).min(members);
            self.grow(budget, wanted, |p| &mut p.classes[class].grad_slots);
        }
        if self.act_slots > 0 {
            let saves = self.act_home.iter().flatten().count() as u64;
            self.grow(budget, saves.min(1 + ahead), |p| &mut p.act_slots);
        }
        if self.options.policy != Policy::Disk {
            self.keep_on_device(budget, keep);
        }
        if self.options.timing == Timing::Delayed {
            // A gradient leaves only once new parameters have come through its place in pinned memory.
            for class in 0..self.classes.len() {
                let members = self.classes[class].members.len() as u64;
                let wanted = (self.classes[class].grad_slots_min + 2 * ahead.min(1)).min(members);
                self.grow(budget, wanted, |p| &mut p.classes[class].grad_slots);
            }
        }
        for section in 0..model.sections.len() {
            if self.resident(SectionId(section as u32)) {
                self.param_home[section] = Tier::Device;
            }
        }
        let all_here = self.classes.iter().all(Class::resident);
        let may = matches!(self.options.policy, Policy::Auto | Policy::Resident);
        if all_here && may && keep.states {
            self.keep_optim_on_device(model, budget);
        }
        Ok(())
    }

    /// Optimizer states on the device, of the sections that the next forward pass needs first: the
    /// others have the time until they are needed. What is gathered from comes to the device with its
    /// states, for its new parameters, copied in every step, would be more than the rows; or freely, where
    /// it is never updated.
    fn keep_optim_on_device(&mut self, model: &Model, budget: u64) {
        let mut sections: Vec<usize> = (0..model.sections.len()).collect();
        sections.sort_by_key(|s| model.first_use(SectionId(*s as u32)));
        for section in sections {
            let mut trial = self.clone();
            trial.give_slot(section);
            if model.grad_span(SectionId(section as u32)).is_some() {
                trial.keep_states(section);
            }
            if trial.device_bytes() <= budget {
                *self = trial;
            }
        }
    }

    /// A section's optimizer states live on the device, and its gradient waits there.
    pub(super) fn keep_states(&mut self, section: usize) {
        self.grad_home[section] = GradHome::Device;
        for part in &mut self.parts[section] {
            part.home = Tier::Device;
        }
    }

    /// A section that was to be read in pinned memory gets a slot of its own.
    pub(super) fn give_slot(&mut self, section: usize) {
        let id = SectionId(section as u32);
        let class = &mut self.classes[self.class_of[section]];
        let has_one = class.slotted.contains(&id) || class.own.contains(&id);
        if class.resident() && !has_one {
            class.slotted.push(id);
            class.param_slots += 1;
            self.param_home[section] = Tier::Device;
        }
    }

    /// What the device has room for beyond that: checkpoints first (each byte kept saves two
    /// moves), then parameters; or the other way round.
    fn keep_on_device(&mut self, budget: u64, keep: &Keep) {
        if keep.acts_first {
            self.keep_acts_on_device(budget);
        }
        for class in 0..self.classes.len() {
            let slotted = self.classes[class].slotted.len() as u64;
            self.grow(budget, slotted, |p| &mut p.classes[class].param_slots);
        }
        if !keep.acts_first {
            self.keep_acts_on_device(budget);
        }
    }

    /// As many checkpoints as there is room for, the latest first: they wait shortest.
    fn keep_acts_on_device(&mut self, budget: u64) {
        let savers: Vec<usize> = (0..self.act_home.len())
            .filter(|s| self.act_home[*s].is_some())
            .collect();
        for keep in (1..=savers.len()).rev() {
            let mut trial = self.clone();
            trial.keep_acts(&savers[savers.len() - keep..]);
            if trial.device_bytes() <= budget {
                *self = trial;
                break;
            }
        }
    }

    /// These stages' checkpoints stay on the device; the others pass through slots.
    fn keep_acts(&mut self, keep: &[usize]) {
        let mut kept = 0;
        for &stage in keep {
            if let Some(home) = &mut self.act_home[stage] {
                *home = Tier::Device;
                kept += 1;
            }
        }
        let passing = self.act_home.iter().flatten().any(|h| *h == Tier::Pinned);
        let before = self.act_slots;
        self.act_slots = kept + if passing { before } else { 0 };
    }

    /// Raises a count towards `wanted`, as far as the device budget goes.
    fn grow(&mut self, budget: u64, wanted: u64, count: impl Fn(&mut Self) -> &mut u64) {
        while *count(self) < wanted {
            *count(self) += 1;
            if self.device_bytes() > budget {
                *count(self) -= 1;
                return;
            }
        }
    }
}
