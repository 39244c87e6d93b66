//! Where each state lives, from sizes and budgets.
//!
//! Device: sections of equal size form a *class* and share slots. A class with as many slots as
//! members is resident; otherwise its members pass through the slots in turn, a ring as in SE-MoE.
//! Where all parameters are resident and there is room still, optimizer states stay too, section by
//! section, with the gradient that they wait for.
//! A section that stages only gather from needs no slot at all where its parameters live in pinned
//! memory. Living there costs no more than passing through, one slab, so that is tried first.
//! Pinned memory: first what must pass through it, then what look-ahead wants, then gradients,
//! parameters and optimizer states as far as they go. The disk takes the rest.

use crate::Error;
use crate::model::{Model, SectionId, StageId, StageSpec, Tier, Timing};
use crate::parts::{Part, parts};
use crate::plan::{PoolId, PoolKind};
use class::Class;

mod class;
mod sizes;

/// Bytes that may be used on each tier; the disk takes what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Device memory.
    pub device_bytes: u64,
    /// Page-locked host memory.
    pub pinned_bytes: u64,
}

/// Which tiers states may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Each state on the fastest tier that has room.
    #[default]
    Auto,
    /// Parameters on the device, and optimizer states as far as there is room; the rest in pinned
    /// memory.
    Resident,
    /// Nothing on disk, and no optimizer states on the device; what the device cannot hold streams
    /// from pinned memory.
    Pinned,
    /// Everything on disk; the other tiers hold only what passes through.
    Disk,
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "resident" => Ok(Self::Resident),
            "pinned" => Ok(Self::Pinned),
            "disk" => Ok(Self::Disk),
            _ => Err(format!(
                "'{text}' is not a placement: use auto, resident, pinned or disk"
            )),
        }
    }
}

/// How to place.
#[derive(Clone, Copy, Debug)]
pub struct PlaceOptions {
    /// Which tiers.
    pub policy: Policy,
    /// Stages by which fetches run ahead.
    pub lookahead: u32,
    /// When sections are updated.
    pub timing: Timing,
    /// Most elements of a part.
    pub chunk_elements: u64,
    /// Ranks that every section is split over: no part crosses from one's elements to the next's.
    pub partitions: u32,
    /// Device memory that is not slots.
    pub scratch_bytes: u64,
    /// Pinned memory that is not slabs of states.
    pub pinned_fixed_bytes: u64,
    /// Pinned memory in which an update of the largest part logs what it overwrites, so that it may run before
    /// the norm; 0 if none may.
    pub undo_log_bytes: u64,
    /// What it needs more where new parameters take the gradient's place.
    pub undo_grad_bytes: u64,
}

impl Default for PlaceOptions {
    fn default() -> Self {
        Self {
            policy: Policy::Auto,
            lookahead: 2,
            timing: Timing::AfterNorm,
            chunk_elements: 4 << 20,
            partitions: 1,
            scratch_bytes: 0,
            pinned_fixed_bytes: 0,
            undo_log_bytes: 0,
            undo_grad_bytes: 0,
        }
    }
}

/// Where a whole gradient waits for its update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradHome {
    /// In a slab of the section's own.
    Slab,
    /// On disk; it passes through a shared slab.
    Disk,
    /// Nowhere: the update follows at once, from a shared slab.
    Passing,
    /// On the device, in a place of the section's own, where it is updated.
    Device,
}

/// Where everything lives. Made by [`place`].
#[derive(Clone, Debug)]
pub struct Placement {
    classes: Vec<Class>,
    class_of: Vec<usize>,
    param_home: Vec<Tier>,
    grad_home: Vec<GradHome>,
    parts: Vec<Vec<Part>>,
    /// For each training stage that leaves a checkpoint: where it waits.
    act_home: Vec<Option<Tier>>,
    act_bytes: u64,
    act_slots: u64,
    param_stage: Vec<u64>,
    grad_stage: Vec<u64>,
    optim_stage: u64,
    /// Slabs for what updates before the norm overwrite.
    undo: u64,
    options: PlaceOptions,
}

/// Places a model under budgets.
///
/// # Errors
/// [`Error::DeviceBudget`] or [`Error::PinnedBudget`] with the least that works, and what
/// [`Model::validate`] finds.
pub fn place(model: &Model, budgets: Budgets, options: &PlaceOptions) -> Result<Placement, Error> {
    model.validate()?;
    let filled = |in_place: bool| {
        let mut placement = Placement::least(model, options, in_place);
        placement.fill_device(model, budgets.device_bytes)?;
        placement.fill_pinned(model, budgets)?;
        placement.keep_undo(budgets.pinned_bytes);
        Ok(placement)
    };
    if matches!(options.policy, Policy::Resident | Policy::Disk) {
        return filled(false);
    }
    filled(true).or_else(|first| match (first, filled(false)) {
        (_, Ok(placement)) => Ok(placement),
        (
            Error::PinnedBudget { have, least },
            Err(Error::PinnedBudget {
                least: with_slots, ..
            }),
        ) => Err(Error::PinnedBudget {
            have,
            least: least.min(with_slots),
        }),
        // Without slots it takes less of the device.
        (first, Err(_)) => Err(first),
    })
}

impl Placement {
    /// As little of every fast tier as a step needs. With `in_place`, what stages only gather from is
    /// read in pinned memory.
    fn least(model: &Model, options: &PlaceOptions, in_place: bool) -> Self {
        let mut classes: Vec<Class> = Vec::new();
        let mut class_of = Vec::new();
        let mut param_home = Vec::new();
        for (id, section) in model.sections.iter().enumerate() {
            let index = classes
                .iter()
                .position(|c| c.fits(section))
                .unwrap_or_else(|| {
                    classes.push(Class::new(section));
                    classes.len() - 1
                });
            let id = SectionId(id as u32);
            let in_place = in_place && model.only_gathered(id);
            classes[index].members.push(id);
            classes[index].slotted.extend((!in_place).then_some(id));
            param_home.push(if in_place { Tier::Pinned } else { Tier::Disk });
            class_of.push(index);
        }
        for class in &mut classes {
            class.set_least(model);
        }
        let parts = model.sections.iter().map(|s| parts(s.elements, options));
        let saves = |s: &StageSpec| s.saves.map(|_| Tier::Pinned);
        let count = model.sections.len();
        let mut placement = Self {
            param_stage: vec![0; classes.len()],
            grad_stage: vec![0; classes.len()],
            class_of,
            param_home,
            grad_home: vec![GradHome::Disk; count],
            parts: parts.collect(),
            act_home: model.stages.iter().map(saves).collect(),
            act_bytes: model
                .stages
                .iter()
                .filter_map(|s| s.saves)
                .max()
                .unwrap_or(0),
            act_slots: u64::from(model.stages.iter().any(|s| s.saves.is_some())),
            optim_stage: 1,
            undo: 0,
            options: *options,
            classes,
        };
        placement.set_grad_homes(false);
        placement.stage(false);
        placement
    }

    fn fill_device(&mut self, model: &Model, budget: u64) -> Result<(), Error> {
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
            self.keep_on_device(budget);
        }
        for section in 0..model.sections.len() {
            if self.resident(SectionId(section as u32)) {
                self.param_home[section] = Tier::Device;
            }
        }
        let all_here = self.classes.iter().all(Class::resident);
        let may = matches!(self.options.policy, Policy::Auto | Policy::Resident);
        if all_here && may {
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
                trial.grad_home[section] = GradHome::Device;
                for part in &mut trial.parts[section] {
                    part.home = Tier::Device;
                }
            }
            if trial.device_bytes() <= budget {
                *self = trial;
            }
        }
    }

    /// A section that was to be read in pinned memory gets a slot of its own.
    fn give_slot(&mut self, section: usize) {
        let id = SectionId(section as u32);
        let class = &mut self.classes[self.class_of[section]];
        if class.resident() && !class.slotted.contains(&id) {
            class.slotted.push(id);
            class.param_slots += 1;
            self.param_home[section] = Tier::Device;
        }
    }

    /// What the device has room for beyond that: checkpoints first (each byte kept saves two
    /// moves), the latest first (they wait shortest), then parameters.
    fn keep_on_device(&mut self, budget: u64) {
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
        for class in 0..self.classes.len() {
            let slotted = self.classes[class].slotted.len() as u64;
            self.grow(budget, slotted, |p| &mut p.classes[class].param_slots);
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

    fn fill_pinned(&mut self, model: &Model, budgets: Budgets) -> Result<(), Error> {
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
    fn keep_undo(&mut self, budget: u64) {
        let stays = |section: usize| self.grad_home[section] == GradHome::Slab;
        let sections = self.parts.iter().enumerate().filter(|(s, _)| stays(*s));
        let parts = sections.flat_map(|(_, parts)| parts);
        let may = parts.filter(|p| p.home == Tier::Pinned).count() as u64;
        let left = budget.saturating_sub(self.pinned_bytes());
        if self.options.undo_log_bytes > 0 && may > 0 {
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
        if self.options.timing == Timing::AfterNorm {
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

    fn set_grad_homes(&mut self, in_pinned: bool) {
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
    fn stage(&mut self, ahead: bool) {
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
            let passes = |s: usize| matches!(self.grad_home[s], GradHome::Disk | GradHome::Passing);
            let grads = count(&passes);
            self.param_stage[index] = wanted(params, 2 + lookahead);
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

    /// How many slabs there are for what updates before the norm overwrite.
    pub fn undo_buffers(&self) -> u64 {
        self.undo
    }

    /// Where a section's parameters live.
    pub fn param_home(&self, section: SectionId) -> Tier {
        self.param_home[section.0 as usize]
    }

    /// Where a section's gradient waits for its update.
    pub fn grad_home(&self, section: SectionId) -> GradHome {
        self.grad_home[section.0 as usize]
    }

    /// A section's parts, in order.
    pub fn parts(&self, section: SectionId) -> &[Part] {
        &self.parts[section.0 as usize]
    }

    /// Where a stage's activation checkpoint waits, if it leaves one.
    pub fn act_home(&self, stage: StageId) -> Option<Tier> {
        self.act_home[stage.0 as usize]
    }

    /// Bytes of a checkpoint's slot or slab.
    pub fn act_bytes(&self) -> u64 {
        self.act_bytes
    }

    /// What it was placed with.
    pub fn options(&self) -> &PlaceOptions {
        &self.options
    }

    /// Whether a section has a slot of its own.
    pub fn resident(&self, section: SectionId) -> bool {
        let class = &self.classes[self.class_of[section.0 as usize]];
        class.resident() && class.slotted.contains(&section)
    }

    /// The pool of a kind that serves a section.
    pub(crate) fn pool(&self, kind: PoolKind, section: SectionId) -> PoolId {
        PoolId::new(kind, self.class_of[section.0 as usize])
    }

    /// A section's place among those of its size: the slot of a resident section.
    pub fn member(&self, section: SectionId) -> u32 {
        let class = &self.classes[self.class_of[section.0 as usize]];
        class
            .slotted
            .iter()
            .position(|m| *m == section)
            .unwrap_or(0) as u32
    }

    /// The pool of a section's parameter slots.
    pub fn param_pool(&self, section: SectionId) -> PoolId {
        self.pool(PoolKind::ParamSlot, section)
    }

    /// The pool of shared slabs that a section's gradient passes through, if it has none of its own.
    pub fn grad_stage_pool(&self, section: SectionId) -> PoolId {
        self.pool(PoolKind::GradStage, section)
    }

    /// The pool of shared slabs that optimizer states pass through.
    pub fn optim_stage_pool(&self) -> PoolId {
        PoolId::new(PoolKind::OptimStage, 0)
    }

    pub(crate) fn class(&self, section: SectionId) -> usize {
        self.class_of[section.0 as usize]
    }

    pub(crate) fn param_slots(&self, class: usize) -> (u64, u64) {
        (
            self.classes[class].param_slots,
            self.classes[class].param_slots_min,
        )
    }
}
