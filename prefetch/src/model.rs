//! The model as plans see it: sizes of sections, and stages in compute order.

use crate::Error;

/// A section, by its place in [`Model::sections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionId(pub u32);

/// A stage, by its place in [`Model::stages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StageId(pub u32);

/// What is kept for a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Parameters in the compute type.
    Param,
    /// Gradients in the compute type.
    Grad,
    /// fp32 master, first and second moment: 12 bytes an element.
    Optim,
}

/// Where a state can live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Device memory.
    Device,
    /// Page-locked host memory.
    Pinned,
    /// Files on disks.
    Disk,
}

/// When the optimizer may update a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Timing {
    /// After the norm of the whole step's gradient is known: exact clipping. What lives in pinned memory may run
    /// ahead of it, to be undone ([`Window::Norm`](crate::Window::Norm)).
    #[default]
    AfterNorm,
    /// As soon as the section's gradient is whole, where its states live on disk (a write there
    /// can be undone if the gradient turns out not to be finite); the others as with
    /// [`Timing::AfterNorm`].
    Immediate,
    /// Beside the next step, which still computes on the parameters from before: one-step delayed update
    /// (ZeRO-Offload, section 5.2). The norm is known by then, and no update holds compute up. It is another
    /// optimizer than the others, an approximation of it.
    Delayed,
}

/// The size of a section.
#[derive(Clone, Debug)]
pub struct SectionSize {
    /// Its name, for messages.
    pub name: String,
    /// Its elements.
    pub elements: u64,
    /// Bytes of its parameters, and of its gradient, in the compute type.
    pub param_bytes: u64,
    /// Bytes in which its gradient accumulates on the device: sums in f32 and, where the compute
    /// type is another, the gradient that leaves, behind them.
    pub grad_slot_bytes: u64,
}

/// What a stage needs and leaves.
#[derive(Clone, Debug, Default)]
pub struct StageSpec {
    /// Its name, for messages.
    pub name: String,
    /// Sections whose parameters it reads on the device.
    pub params: Vec<SectionId>,
    /// Sections of whose parameters it reads a few rows: on the device or in pinned memory.
    pub gathers: Vec<SectionId>,
    /// Sections to whose gradients it adds.
    pub grads: Vec<SectionId>,
    /// Bytes of the activation checkpoint that it leaves.
    pub saves: Option<u64>,
    /// The stage whose checkpoint it reads.
    pub restores: Option<StageId>,
}

impl StageSpec {
    /// Sections whose parameters it reads in either way.
    pub(crate) fn reads(&self) -> impl Iterator<Item = SectionId> {
        self.params.iter().chain(&self.gathers).copied()
    }
}

/// A model: its sections, the stages of one training step (forward, loss, backward) and those of
/// a forward pass without gradients.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// All sections.
    pub sections: Vec<SectionSize>,
    /// The stages of a training step in compute order.
    pub stages: Vec<StageSpec>,
    /// The stages of a forward pass in compute order; they keep no gradients and checkpoints.
    pub eval: Vec<StageSpec>,
}

impl Model {
    /// Checks that stages name what exists, in an order in which it exists.
    ///
    /// # Errors
    /// [`Error::Stage`], [`Error::EmptySection`].
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(empty) = self
            .sections
            .iter()
            .find(|s| s.elements == 0 || s.param_bytes == 0)
        {
            return Err(Error::EmptySection {
                section: empty.name.clone(),
            });
        }
        for (index, stage) in self.stages.iter().enumerate() {
            let fail = |what: String| {
                Err(Error::Stage {
                    stage: stage.name.clone(),
                    what,
                })
            };
            if let Some(what) = self.misuse(stage) {
                return fail(what);
            }
            if let Some(StageId(saver)) = stage.restores {
                let earlier = self.stages[..index].get(saver as usize);
                if earlier.is_none_or(|s| s.saves.is_none()) {
                    return fail(format!(
                        "restores stage {saver}, which leaves no checkpoint before"
                    ));
                }
                if self.stages[..index]
                    .iter()
                    .any(|s| s.restores == stage.restores)
                {
                    return fail(format!("stage {saver}'s checkpoint is restored twice"));
                }
            }
            let restored = |s: &StageSpec| s.restores == Some(StageId(index as u32));
            if stage.saves.is_some() && !self.stages[index + 1..].iter().any(restored) {
                return fail("leaves a checkpoint that no later stage restores".to_owned());
            }
        }
        for (index, stage) in self.stages.iter().enumerate() {
            let late = stage
                .reads()
                .find(|s| self.grad_span(*s).is_some_and(|g| g.1 < index));
            if let Some(section) = late {
                let name = &self.sections[section.0 as usize].name;
                let what = format!(
                    "reads '{name}' after its gradient is whole: it may be updated by then"
                );
                return Err(Error::Stage {
                    stage: stage.name.clone(),
                    what,
                });
            }
        }
        for stage in &self.eval {
            let keeps =
                !stage.grads.is_empty() || stage.saves.is_some() || stage.restores.is_some();
            let what = if keeps {
                Some("a forward pass keeps no gradients and no checkpoints".to_owned())
            } else {
                self.misuse(stage)
            };
            if let Some(what) = what {
                return Err(Error::Stage {
                    stage: stage.name.clone(),
                    what,
                });
            }
        }
        Ok(())
    }

    /// Its sections' ids, in order.
    pub(crate) fn section_ids(&self) -> impl Iterator<Item = SectionId> + use<> {
        (0..self.sections.len() as u32).map(SectionId)
    }

    fn misuse(&self, stage: &StageSpec) -> Option<String> {
        for list in [&stage.params, &stage.gathers, &stage.grads] {
            for (i, id) in list.iter().enumerate() {
                if id.0 as usize >= self.sections.len() {
                    return Some(format!("names section {}, which does not exist", id.0));
                }
                if list[..i].contains(id) {
                    return Some(format!("names section {} twice", id.0));
                }
            }
        }
        let whole = |id: &&SectionId| stage.params.contains(id);
        let both = stage.gathers.iter().find(whole)?;
        let name = &self.sections[both.0 as usize].name;
        Some(format!(
            "names '{name}' in its params and in its gathers; what it needs whole it finds whole"
        ))
    }

    /// The first and last stage that adds to a section's gradient.
    pub(crate) fn grad_span(&self, section: SectionId) -> Option<(usize, usize)> {
        let adds = |s: &StageSpec| s.grads.contains(&section);
        Some((
            self.stages.iter().position(adds)?,
            self.stages.iter().rposition(adds)?,
        ))
    }

    /// The first training stage that reads a section, for the order of updates.
    pub(crate) fn first_use(&self, section: SectionId) -> usize {
        self.stages
            .iter()
            .position(|s| s.reads().any(|read| read == section))
            .unwrap_or(usize::MAX)
    }

    /// Whether no stage ever needs the whole of a section that some stage gathers from.
    pub(crate) fn only_gathered(&self, section: SectionId) -> bool {
        let mut stages = self.stages.iter().chain(&self.eval);
        let gathered = stages.clone().any(|s| s.gathers.contains(&section));
        gathered && !stages.any(|s| s.params.contains(&section))
    }
}
