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
//!
//! That is the usual order. With measured rates ([`PlaceOptions::rates`]) other orders are weighed against it,
//! by the step that each promises.

use crate::Error;
use crate::model::{Model, SectionId, StageId, StageSpec, Tier, Timing};
use crate::parts::{Part, parts};
use crate::plan::{PoolId, PoolKind};
use choose::Keep;
use class::Class;

mod choose;
mod class;
mod device;
mod pinned;
mod sizes;

pub use choose::PlaceRates;

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
    /// Bytes of an element's optimizer states.
    pub optim_bytes: u64,
    /// Whether the master is kept as what the parameter is short of it. Then an update needs the old
    /// parameter: where the CPU makes it, parameters have a slab of their own or come from disk for it. No
    /// update runs before the norm but those that can be undone there.
    pub split: bool,
    /// How fast things are, for [`Policy::Auto`] to choose by what the device keeps. Without them it keeps
    /// checkpoints first, then parameters, then optimizer states.
    pub rates: Option<PlaceRates>,
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
            optim_bytes: 12,
            split: false,
            rates: None,
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
    let usual = place_with(model, budgets, options, &Keep::usual());
    match (options.policy, options.rates) {
        (Policy::Auto, Some(rates)) => Ok(choose::choose(model, budgets, options, &rates, usual?)),
        _ => usual,
    }
}

fn place_with(
    model: &Model,
    budgets: Budgets,
    options: &PlaceOptions,
    keep: &Keep,
) -> Result<Placement, Error> {
    let filled = |in_place: bool| {
        let mut placement = Placement::least(model, options, in_place, keep);
        placement.fill_device(model, budgets.device_bytes, keep)?;
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
    fn least(model: &Model, options: &PlaceOptions, in_place: bool, keep: &Keep) -> Self {
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
            let own = keep.own.contains(&id);
            let in_place = in_place && model.only_gathered(id) && !own;
            classes[index].members.push(id);
            classes[index].own.extend(own.then_some(id));
            let slotted = !in_place && !own;
            classes[index].slotted.extend(slotted.then_some(id));
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
        for section in &keep.own {
            placement.keep_states(section.0 as usize);
        }
        placement.set_grad_homes(false);
        placement.stage(false);
        placement
    }

    /// How many slabs there are for what updates before the norm overwrite.
    pub fn undo_buffers(&self) -> u64 {
        self.undo
    }

    /// Where a section's parameters live.
    pub fn param_home(&self, section: SectionId) -> Tier {
        self.param_home[section.0 as usize]
    }

    /// Whether a section's parameters have a slab of their own in pinned memory: because they live there, or because the
    /// CPU makes new ones of them.
    pub fn param_slab(&self, section: SectionId) -> bool {
        match self.param_home(section) {
            Tier::Pinned => true,
            Tier::Device => self.options.split && self.grad_home(section) != GradHome::Device,
            Tier::Disk => false,
        }
    }

    /// Whether an update on the CPU makes new parameters of old ones that live on disk.
    pub(crate) fn update_reads_param(&self, section: SectionId) -> bool {
        self.options.split && self.param_home(section) == Tier::Disk
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
        class.own.contains(&section) || class.resident() && class.slotted.contains(&section)
    }

    /// The pool of a kind that serves a section.
    pub(crate) fn pool(&self, kind: PoolKind, section: SectionId) -> PoolId {
        PoolId::new(kind, self.class_of[section.0 as usize])
    }

    /// A section's place among those of its size: the slot of a resident section.
    pub fn member(&self, section: SectionId) -> u32 {
        let class = &self.classes[self.class_of[section.0 as usize]];
        let place = |members: &[SectionId]| members.iter().position(|m| *m == section);
        let place = place(&class.own).or_else(|| place(&class.slotted));
        place.unwrap_or(0) as u32
    }

    /// The pool of a section's parameter slots.
    pub fn param_pool(&self, section: SectionId) -> PoolId {
        let class = &self.classes[self.class_of[section.0 as usize]];
        let kind = if class.own.contains(&section) {
            PoolKind::OwnSlot
        } else {
            PoolKind::ParamSlot
        };
        self.pool(kind, section)
    }

    /// The pool of shared slabs that a section's gradient passes through, if it has none of its own.
    pub fn grad_stage_pool(&self, section: SectionId) -> PoolId {
        self.pool(PoolKind::GradStage, section)
    }

    /// The pool of shared slabs that a section's parameters pass through.
    pub fn param_stage_pool(&self, section: SectionId) -> PoolId {
        self.pool(PoolKind::ParamStage, section)
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
