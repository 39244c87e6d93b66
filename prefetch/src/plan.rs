//! The plan of a step: tasks in an order in which the step could run one by one.

use crate::Error;
use crate::model::{Model, SectionId, StageId, Timing};
use crate::placement::Placement;

/// What does a task's work. Each is in order of its own only where the engine makes it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The device's compute stream.
    Compute,
    /// Copies to the device.
    H2d,
    /// Copies from the device.
    D2h,
    /// Reads from disk.
    DiskRead,
    /// Writes to disk.
    DiskWrite,
    /// The optimizer's threads.
    Cpu,
    /// Sums of squares of gradients, and the optimizer on the device: on the compute stream.
    Update,
}

/// All lanes, in the order of their discriminants.
pub const LANES: [Lane; 7] = [
    Lane::Compute,
    Lane::H2d,
    Lane::D2h,
    Lane::DiskRead,
    Lane::DiskWrite,
    Lane::Cpu,
    Lane::Update,
];

impl Lane {
    /// Whether the device itself orders this lane's work by events.
    pub fn on_device(self) -> bool {
        matches!(self, Self::Compute | Self::H2d | Self::D2h | Self::Update)
    }
}

/// A task, by its place in [`Plan::tasks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub u32);

/// What a task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskKind {
    /// Reads parameters from disk into a shared slab.
    ReadParam(SectionId),
    /// Copies parameters from pinned memory to a slot.
    FetchParam(SectionId),
    /// The trainer's operations of a stage.
    Compute(StageId),
    /// Copies an activation checkpoint out.
    SaveAct(StageId),
    /// Copies the checkpoint that this stage left back in.
    RestoreAct(StageId),
    /// Copies a whole gradient out.
    GradOut(SectionId),
    /// Sums the squares of a whole gradient, on the device.
    GradNorm(SectionId),
    /// Writes a gradient to disk.
    SpillGrad(SectionId),
    /// Reads a gradient back.
    ReadGrad(SectionId),
    /// All sums of squares are known: clip factor and overflow. Costs nothing.
    Norm,
    /// Reads a part's optimizer states from disk.
    ReadOptim(SectionId, u32),
    /// Updates a part, with [`Timing::Delayed`] with the gradient of the step before. On the device the new
    /// parameters go to the section's own slot; on the CPU to the section's slab if its parameters live in pinned
    /// memory and nothing is delayed, and else over the gradient.
    Update(SectionId, u32),
    /// Writes a part's optimizer states to disk.
    WriteOptim(SectionId, u32),
    /// Writes updated parameters to disk.
    WriteParam(SectionId),
    /// Copies updated parameters to the section's own slot.
    PushParam(SectionId),
    /// Makes the slab with updated parameters that of the section's parameters, and the other way round. Costs
    /// nothing.
    SwapParam(SectionId),
    /// All of the step's updates are where they belong. Costs nothing.
    Commit,
}

/// How much of the earlier task must have happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It is in its stream; the device orders the two by an event.
    Issued,
    /// It is complete.
    Done,
}

/// A task that comes before another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dep {
    /// The earlier task.
    pub task: TaskId,
    /// Whether that of the step before is meant.
    pub previous_step: bool,
    /// What must have happened.
    pub order: Order,
}

/// How far ahead of compute a task may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// As soon as its dependencies hold.
    Open,
    /// A copy to the device for this stage.
    Fetch(StageId),
    /// A read from disk for this stage: one stage more ahead.
    Read(StageId),
    /// The read for the n-th update from disk in the step.
    Update(u32),
    /// Once the norm of its step is known; an update in pinned memory may run before that, at the driver's
    /// risk ([`Scheduler::next_ahead`](crate::Scheduler::next_ahead)).
    Norm,
}

/// What a pool's buffers are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// Device: activation checkpoints.
    ActSlot,
    /// Pinned: optimizer states of a part that lives on disk.
    OptimStage,
    /// Device: parameters of a class.
    ParamSlot,
    /// Device: parameters of those of a class that stay while others pass through its slots.
    OwnSlot,
    /// Device: gradients of a class.
    GradSlot,
    /// Pinned: parameters of a class that live on disk.
    ParamStage,
    /// Pinned: gradients of a class that have no slab of their own.
    GradStage,
}

/// A pool, by its place in [`Placement::pools`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

impl PoolId {
    /// The pool of a kind (of a class, where there is one for each).
    pub(crate) fn new(kind: PoolKind, class: usize) -> Self {
        let in_class = match kind {
            PoolKind::ActSlot => return Self(0),
            PoolKind::OptimStage => return Self(1),
            PoolKind::ParamSlot => 0,
            PoolKind::GradSlot => 1,
            PoolKind::ParamStage => 2,
            PoolKind::GradStage => 3,
            PoolKind::OwnSlot => 4,
        };
        Self(2 + 5 * class as u32 + in_class)
    }
}

/// Buffers of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// What they are for.
    pub kind: PoolKind,
    /// How many there are.
    pub buffers: u64,
    /// Bytes of each.
    pub bytes: u64,
}

/// A buffer, named by the task that took it from its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimRef {
    /// The claiming task, of the same step.
    pub task: TaskId,
    /// Which of its claims.
    pub claim: u32,
}

/// One task of a step.
#[derive(Clone, Debug)]
pub struct Task {
    /// What it does.
    pub kind: TaskKind,
    /// What does it.
    pub lane: Lane,
    /// What comes before it.
    pub deps: Vec<Dep>,
    /// Pools from which it takes a buffer when it starts.
    pub claims: Vec<PoolId>,
    /// Buffers that return to their pools when it is done.
    pub frees: Vec<ClaimRef>,
    /// How far ahead it may start.
    pub window: Window,
    /// The buffer on the device that it works on, if it is from a pool.
    pub slot: Option<ClaimRef>,
    /// The buffer in pinned memory that it works on, if it is from a pool.
    pub slab: Option<ClaimRef>,
    /// For updates: the buffer of the states, if it is from a pool.
    pub states: Option<ClaimRef>,
    /// For updates: the buffer of the old parameters, if they are from a pool; the new ones take their place.
    pub param: Option<ClaimRef>,
    /// Bytes that it moves, or elements that it updates.
    pub amount: u64,
}

/// Where a stage finds a section's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamSource {
    /// In the section's own slot.
    Resident,
    /// In the slot that this task filled.
    Fetched(ClaimRef),
    /// In the section's own slab, which the stage reads from the device.
    Mapped,
}

/// A gradient that a stage adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GradUse {
    /// Whose.
    pub section: SectionId,
    /// Where it accumulates.
    pub slot: ClaimRef,
    /// Whether the stage is the first to use the slot, and finds it undefined.
    pub first: bool,
    /// Whether the gradient is whole after it.
    pub last: bool,
}

/// Where a stage finds what it uses.
#[derive(Clone, Debug, Default)]
pub struct StageUses {
    /// The stage's task.
    pub task: Option<TaskId>,
    /// Its parameters, those that it gathers from included.
    pub params: Vec<(SectionId, ParamSource)>,
    /// The gradients that it adds to.
    pub grads: Vec<GradUse>,
    /// The slot for the checkpoint that it leaves.
    pub save: Option<ClaimRef>,
    /// The slot with the checkpoint that it reads.
    pub restore: Option<ClaimRef>,
}

/// The tasks of a step, the same in every step.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) tasks: Vec<Task>,
    pub(crate) stages: Vec<StageUses>,
    pub(crate) pools: Vec<Pool>,
    pub(crate) lookahead: u32,
    pub(crate) timing: Timing,
    /// Stages before the first that makes gradients.
    pub(crate) forward_stages: usize,
    /// Updates whose states come from disk.
    pub(crate) staged_updates: u32,
    /// The task of the norm, in a training step.
    pub(crate) norm: Option<TaskId>,
    /// Updates that may run before the norm at once: buffers for what they overwrite.
    pub(crate) undo_buffers: u64,
}

impl Plan {
    /// The plan of a training step.
    ///
    /// # Errors
    /// What [`Model::validate`] finds.
    pub fn training(model: &Model, placement: &Placement) -> Result<Self, Error> {
        model.validate()?;
        Ok(crate::build::training(model, placement))
    }

    /// The plan that applies the gradients which wait behind a step with [`Timing::Delayed`]; empty with any other.
    ///
    /// # Errors
    /// What [`Model::validate`] finds.
    pub fn flush(model: &Model, placement: &Placement) -> Result<Self, Error> {
        model.validate()?;
        Ok(crate::build::flush(model, placement))
    }

    /// The plan of a forward pass without gradients, under the same placement.
    ///
    /// # Errors
    /// What [`Model::validate`] finds.
    pub fn evaluation(model: &Model, placement: &Placement) -> Result<Self, Error> {
        model.validate()?;
        Ok(crate::build::evaluation(model, placement))
    }

    /// The tasks in sequential order.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// The task of an id.
    pub fn task(&self, id: TaskId) -> &Task {
        &self.tasks[id.0 as usize]
    }

    /// What each stage uses and where it is.
    pub fn stages(&self) -> &[StageUses] {
        &self.stages
    }

    /// The pools of buffers.
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// When sections are updated.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Stages before the first that makes gradients.
    pub fn forward_stages(&self) -> usize {
        self.forward_stages
    }

    /// Updates that may run before the norm of their step is known, and be undone: as many as there are
    /// buffers for what they overwrite.
    pub fn undo_buffers(&self) -> u64 {
        self.undo_buffers
    }
}
