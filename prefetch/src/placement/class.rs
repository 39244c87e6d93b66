//! Sections of one size, and the slots that they share.

use crate::model::{Model, SectionId, SectionSize, StageSpec};

/// Sections of one size.
#[derive(Clone, Debug)]
pub(super) struct Class {
    pub(super) param_bytes: u64,
    pub(super) grad_slot_bytes: u64,
    pub(super) members: Vec<SectionId>,
    /// Members whose parameters stay in slots or pass through them; the others have slots of their own, or are
    /// read in pinned memory and never come.
    pub(super) slotted: Vec<SectionId>,
    /// Members with slots of their own, whoever else passes through the slots of the class.
    pub(super) own: Vec<SectionId>,
    pub(super) param_slots: u64,
    pub(super) param_slots_min: u64,
    pub(super) grad_slots: u64,
    pub(super) grad_slots_min: u64,
}

impl Class {
    pub(super) fn new(section: &SectionSize) -> Self {
        Self {
            param_bytes: section.param_bytes,
            grad_slot_bytes: section.grad_slot_bytes,
            members: Vec::new(),
            slotted: Vec::new(),
            own: Vec::new(),
            param_slots: 0,
            param_slots_min: 0,
            grad_slots: 0,
            grad_slots_min: 0,
        }
    }

    /// Whether there is a slot for each member that needs one.
    pub(super) fn resident(&self) -> bool {
        self.param_slots >= self.slotted.len() as u64
    }

    pub(super) fn fits(&self, section: &SectionSize) -> bool {
        (self.param_bytes, self.grad_slot_bytes) == (section.param_bytes, section.grad_slot_bytes)
    }

    pub(super) fn set_least(&mut self, model: &Model) {
        let of_class = |s: &StageSpec| s.reads().filter(|s| self.slotted.contains(s)).count();
        let stages = model.stages.iter().chain(&model.eval);
        self.param_slots_min = stages.map(of_class).max().unwrap_or(0) as u64;
        let spans: Vec<_> = self
            .members
            .iter()
            .filter_map(|m| model.grad_span(*m))
            .collect();
        let live = |stage: usize| {
            spans
                .iter()
                .filter(|s| s.0 <= stage && stage <= s.1)
                .count()
        };
        self.grad_slots_min = (0..model.stages.len()).map(live).max().unwrap_or(0) as u64;
        self.param_slots = self.param_slots_min;
        self.grad_slots = self.grad_slots_min;
    }
}
