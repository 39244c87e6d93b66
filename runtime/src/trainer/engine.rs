//! The engine: drives the scheduler with real completions.
//!
//! It runs on the trainer's thread, inside the calls of a step. [`Engine::pump`] takes note of what
//! completed on the device, the disk and the optimizer's lane, and starts what may start then;
//! where the trainer must wait, the engine pumps and sleeps in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay_kernels::cpu::{AdamScalars, AdamW};
use forebay_nvme::{Key, StateKind, Store};
use forebay_pinned::Arena;
use forebay_prefetch::{
    ClaimRef, GradHome, Lane, ParamSource, Placement, Plan, Scheduler, SectionId, Task, TaskKind,
    TaskRef, Tier, Timing,
};

use super::dry::Pass;
use super::places::{Places, READ_BYTES, SlabPlace};
use super::step::{Driver, Finished};
use super::telemetry::Telemetry;
use super::update::{self, Optimizer, PartPlace, Run, StepScalars};
use crate::device::{Device, Event, Span, Stream};
use crate::error::{Error, Result};
use crate::model::{Model, StageId};
use crate::operation::Launch;
use crate::queue::{Notifier, Seq, WorkQueue};
use crate::tensor::View;

/// How long the engine sleeps at most before it looks again: completions wake it earlier.
const NAP: Duration = Duration::from_millis(2);

/// What tells that a task is complete.
#[derive(Clone, Copy, Debug)]
enum Sign {
    Device(Event),
    Cpu(Seq),
}

/// A transfer of the disk and the task it is for.
#[derive(Clone, Copy, Debug)]
struct Moving {
    key: Key,
    task: TaskRef,
    place: SlabPlace,
}

/// What belongs to one step of the two that may be open.
#[derive(Clone, Copy, Debug, Default)]
struct OpenStep {
    lr: f64,
    /// Once the norm is known: what the updates use.
    scalars: Option<StepScalars>,
}

/// What the engine is made from.
pub(super) struct Parts {
    pub(super) model: Arc<Model>,
    pub(super) placement: Placement,
    pub(super) train: Plan,
    pub(super) eval: Plan,
    pub(super) device: Box<dyn Device>,
    pub(super) store: Store,
    pub(super) arena: Arena,
    pub(super) places: Places,
    pub(super) optimizer: Optimizer,
    pub(super) lane: WorkQueue,
    pub(super) notifier: Arc<Notifier>,
    pub(super) adam: AdamW,
    pub(super) clip: Option<f64>,
}

/// See the module. The order of fields is the order of their end: first everything that may touch
/// memory, then the memory.
pub(crate) struct Engine {
    lane: WorkQueue,
    pub(super) device: Box<dyn Device>,
    pub(super) store: Store,
    pub(super) places: Places,
    pub(super) arena: Arena,
    optimizer: Arc<Optimizer>,
    notifier: Arc<Notifier>,
    model: Arc<Model>,
    pub(super) placement: Placement,
    schedulers: [Scheduler; 2],
    pass: Pass,
    flying: Vec<(TaskRef, Sign)>,
    moving: Vec<Moving>,
    runs: Vec<Arc<[Run]>>,
    /// Per section, the bits of the sum of squares of its gradient.
    sums: Arc<[AtomicU64]>,
    open: [OpenStep; 2],
    adam: AdamW,
    clip: Option<f64>,
    /// Steps that were applied and not skipped: the count of the bias corrections.
    pub(super) applied: u64,
    /// Training steps begun.
    pub(super) steps: u64,
    pub(super) last_norm: f64,
    pub(super) skipped: u64,
    holding: bool,
    /// A step whose gradient was not finite and whose early updates are being undone.
    undoing: Option<TaskRef>,
    stage: Option<(StageId, TaskRef)>,
    loss: Option<Event>,
    input_used: u64,
    input_last: [Option<Event>; 2],
    failed: Option<String>,
    pub(super) telemetry: Telemetry,
}

impl Engine {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            model,
            placement,
            train,
            eval,
            device,
            store,
            arena,
            ..
        } = parts;
        let tasks = train.tasks().len().max(eval.tasks().len());
        let notifier = Arc::clone(&parts.notifier);
        store.on_end(move || notifier.notify());
        Self {
            lane: parts.lane,
            store,
            places: parts.places,
            arena,
            optimizer: Arc::new(parts.optimizer),
            notifier: parts.notifier,
            runs: model.sections.iter().map(update::runs).collect(),
            sums: model.sections.iter().map(|_| AtomicU64::new(0)).collect(),
            telemetry: Telemetry::new(&train),
            schedulers: [
                Scheduler::new(Arc::new(train)),
                Scheduler::new(Arc::new(eval)),
            ],
            pass: Pass::Train,
            flying: Vec::with_capacity(2 * tasks),
            moving: Vec::with_capacity(128),
            open: [OpenStep::default(); 2],
            adam: parts.adam,
            clip: parts.clip,
            applied: 0,
            steps: 0,
            last_norm: 0.0,
            skipped: 0,
            holding: false,
            undoing: None,
            stage: None,
            loss: None,
            input_used: 0,
            input_last: [None; 2],
            failed: None,
            device,
            model,
            placement,
        }
    }

    /// Opens a pass.
    pub(super) fn begin(&mut self, pass: Pass, lr: f64) -> Result<()> {
        self.check()?;
        if pass != self.pass {
            self.settle()?;
            self.pass = pass;
        }
        self.wait_until(|engine| engine.scheduler().can_begin())?;
        let step = self.schedulers[pass as usize].begin_step();
        self.input_used = 0;
        if pass == Pass::Train {
            self.open[(step % 2) as usize] = OpenStep { lr, scalars: None };
            self.steps += 1;
            self.telemetry.begin_step();
        }
        // The token ids of two steps ago may still be on their way.
        if let Some(event) = self.input_last[self.half()].take() {
            self.wait_for(event)?;
        }
        self.pump().map(|_| ())
    }

    /// Waits until every task of every step is done.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.check()?;
        self.wait_until(|engine| engine.scheduler().idle())
    }

    /// Remembers the first failure: what was under way when it happened is not to be trusted.
    pub(super) fn sticky<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed.get_or_insert_with(|| error.to_string());
        }
        result
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(Error::Misuse(format!(
                "this trainer failed earlier ({why}); close it and resume from the last generation"
            ))),
        }
    }

    /// Blocks until an event of the device.
    pub(super) fn wait_for(&mut self, event: Event) -> Result<()> {
        let mut reached = false;
        while !reached {
            reached = self.device.query(event)?;
            let moved = self.pump()?;
            if !reached && !moved {
                self.notifier.wait(NAP);
            }
        }
        Ok(())
    }

    pub(super) fn wait_until(&mut self, holds: impl Fn(&Self) -> bool) -> Result<()> {
        while !holds(self) {
            if !self.pump()? {
                self.notifier.wait(NAP);
            }
        }
        Ok(())
    }

    fn scheduler(&self) -> &Scheduler {
        &self.schedulers[self.pass as usize]
    }

    fn scheduler_mut(&mut self) -> &mut Scheduler {
        &mut self.schedulers[self.pass as usize]
    }

    fn half(&self) -> usize {
        (self.telemetry.passes() % 2) as usize
    }

    /// Takes note of completions and starts what may start; whether anything happened.
    fn pump(&mut self) -> Result<bool> {
        let mut moved = false;
        let mut index = 0;
        while index < self.flying.len() {
            let (task, sign) = self.flying[index];
            let done = match sign {
                Sign::Device(event) => self.device.query(event)?,
                Sign::Cpu(seq) => self.lane_reached(seq)?,
            };
            if done {
                self.flying.remove(index);
                self.done(task);
                moved = true;
            } else {
                index += 1;
            }
        }
        while let Some(done) = self.store.try_next() {
            moved = true;
            let index = self.moving.iter().position(|m| m.key == done.key);
            let Moving { task, place, .. } = self
                .moving
                .swap_remove(index.expect("every transfer was noted"));
            self.places.return_slab(place, done.slab);
            done.result?;
            self.done(task);
        }
        self.undo_if_ready()?;
        while self.store.can_start() {
            let Some(task) = self.scheduler_mut().next() else {
                break;
            };
            self.start(task)?;
            moved = true;
        }
        Ok(moved)
    }

    fn lane_reached(&self, seq: Seq) -> Result<bool> {
        match self.lane.failure() {
            Some(f) => Err(Error::Device {
                operation: f.operation,
                what: f.what,
            }),
            None => Ok(self.lane.reached(seq)),
        }
    }

    fn done(&mut self, task: TaskRef) {
        let plan = Arc::clone(self.scheduler().plan());
        let spec = plan.task(task.id);
        if self.pass == Pass::Train {
            self.telemetry.done(spec, self.device.busy(Stream::Compute));
        }
        self.scheduler_mut().done(task);
    }

    /// Starts a task that the scheduler let go.
    fn start(&mut self, task: TaskRef) -> Result<()> {
        let plan = Arc::clone(self.scheduler().plan());
        let spec = plan.task(task.id);
        match spec.kind {
            TaskKind::ReadParam(s) => self.read(task, spec, key(s, StateKind::Param, 0)),
            TaskKind::ReadGrad(s) => self.read(task, spec, key(s, StateKind::Grad, 0)),
            TaskKind::ReadOptim(s, part) => self.read(task, spec, key(s, StateKind::Optim, part)),
            TaskKind::WriteParam(s) => self.write(task, spec, key(s, StateKind::Param, 0)),
            TaskKind::SpillGrad(s) => self.write(task, spec, key(s, StateKind::Grad, 0)),
            TaskKind::WriteOptim(s, part) => self.write(task, spec, key(s, StateKind::Optim, part)),
            TaskKind::FetchParam(_)
            | TaskKind::PushParam(_)
            | TaskKind::RestoreAct(_)
            | TaskKind::SaveAct(_)
            | TaskKind::GradOut(_) => {
                self.copy_task(task, spec);
                Ok(())
            }
            TaskKind::GradNorm(section) => {
                self.grad_norm(task, spec, section);
                Ok(())
            }
            TaskKind::Update(section, part) => {
                self.update(task, spec, section, part);
                Ok(())
            }
            TaskKind::Norm => {
                self.norm(task);
                Ok(())
            }
            TaskKind::Commit => {
                if self.holding {
                    self.store.commit();
                    self.holding = false;
                }
                self.done(task);
                Ok(())
            }
            TaskKind::Compute(_) => unreachable!("the trainer starts stages"),
        }
    }

    fn claimed(&self, plan: &Plan, step: u64, claim: ClaimRef) -> SlabPlace {
        let pool = plan.task(claim.task).claims[claim.claim as usize];
        SlabPlace::Pool(pool, self.scheduler().buffer(step, claim))
    }

    fn slot(&self, plan: &Plan, step: u64, claim: ClaimRef) -> u64 {
        let pool = plan.task(claim.task).claims[claim.claim as usize];
        self.places.slot(pool, self.scheduler().buffer(step, claim))
    }

    /// The slab that a task works on: from a pool, or the section's own.
    fn slab_place(&self, task: TaskRef, spec: &Task) -> SlabPlace {
        let plan = self.scheduler().plan();
        match (spec.kind, spec.slab, spec.states) {
            (TaskKind::ReadOptim(s, p) | TaskKind::WriteOptim(s, p), _, states) => states
                .map_or(SlabPlace::Optim(s, p), |claim| {
                    self.claimed(plan, task.step, claim)
                }),
            (_, Some(claim), _) => self.claimed(plan, task.step, claim),
            (
                TaskKind::GradOut(s)
                | TaskKind::GradNorm(s)
                | TaskKind::PushParam(s)
                | TaskKind::WriteParam(s)
                | TaskKind::Update(s, _),
                None,
                _,
            ) => SlabPlace::Grad(s),
            _ => unreachable!("the plan gives every other task its slab"),
        }
    }

    fn read(&mut self, task: TaskRef, spec: &Task, key: Key) -> Result<()> {
        let place = self.slab_place(task, spec);
        let slab = self.places.take_slab(place);
        self.moving.push(Moving { key, task, place });
        self.store.read(key, slab)?;
        Ok(())
    }

    fn write(&mut self, task: TaskRef, spec: &Task, key: Key) -> Result<()> {
        let immediate = self.scheduler().plan().timing() == Timing::Immediate;
        if immediate && key.state != StateKind::Grad && !self.holding {
            self.store.hold();
            self.holding = true;
        }
        let place = self.slab_place(task, spec);
        let slab = self.places.take_slab(place);
        self.moving.push(Moving { key, task, place });
        self.store.write(key, slab)?;
        Ok(())
    }

    /// Queues a copy between pinned memory and the device, behind what it depends on.
    fn copy_task(&mut self, task: TaskRef, spec: &Task) {
        let plan = Arc::clone(self.scheduler().plan());
        let bytes = spec.amount;
        let address = match (spec.slot, spec.kind) {
            (Some(claim), _) => self.slot(&plan, task.step, claim),
            (None, TaskKind::PushParam(section)) => self.resident(section),
            _ => unreachable!("every other copy has a slot from a pool"),
        };
        let span = Span { address, bytes };
        let memory = match spec.kind {
            TaskKind::SaveAct(stage) | TaskKind::RestoreAct(stage) => {
                self.places.act(stage).address()
            }
            TaskKind::FetchParam(section) => match &self.places.param[section.0 as usize] {
                Some(slab) if spec.slab.is_none() => slab.address(),
                _ => self.places.get(self.slab_place(task, spec)).address(),
            },
            _ => self.places.get(self.slab_place(task, spec)).address(),
        };
        let stream = if spec.lane == Lane::H2d {
            Stream::H2d
        } else {
            Stream::D2h
        };
        self.order(stream, task);
        // SAFETY: the slot and the slab belong to this task until it is done: the scheduler gives
        // their buffers to no other before, and everything that used them before is done or
        // ordered before this by `order`.
        let event = unsafe {
            match spec.lane {
                Lane::H2d => self.device.copy_in(stream, span, memory),
                _ => self.device.copy_out(stream, span, memory),
            }
        };
        self.flying.push((task, Sign::Device(event)));
        self.scheduler_mut().issued(task);
    }

    /// Makes a stream wait for what `task` depends on and is still under way on the device.
    fn order(&mut self, stream: Stream, task: TaskRef) {
        let scheduler = &self.schedulers[self.pass as usize];
        for earlier in scheduler.unfinished_deps(task) {
            let sign = self
                .flying
                .iter()
                .find(|(t, _)| *t == earlier)
                .map(|(_, sign)| *sign);
            if let Some(Sign::Device(event)) = sign {
                self.device.wait(stream, event);
            }
        }
    }

    /// The slot of a section that stays on the device.
    pub(super) fn resident(&self, section: SectionId) -> u64 {
        let pool = self.placement.param_pool(section);
        self.places.slot(pool, self.placement.member(section))
    }

    fn grad_norm(&mut self, task: TaskRef, spec: &Task, section: SectionId) {
        let grad = self.places.get(self.slab_place(task, spec)).address() as usize;
        let (optimizer, sums) = (Arc::clone(&self.optimizer), Arc::clone(&self.sums));
        let elements = spec.amount as usize;
        let seq = self.lane.push("gradient norm", move || {
            // SAFETY: the slab belongs to the gradient until its update is done.
            let sum = unsafe { update::norm(&optimizer, grad as *const f32, elements) };
            sums[section.0 as usize].store(sum.sum.to_bits(), Ordering::Release);
            Ok(())
        });
        self.flying.push((task, Sign::Cpu(seq)));
    }

    /// All sums are known: the clip factor, and whether the step is skipped.
    fn norm(&mut self, task: TaskRef) {
        // In the order of the sections, so that the bits do not depend on that of completions.
        let sum: f64 = self
            .sums
            .iter()
            .map(|s| f64::from_bits(s.load(Ordering::Acquire)))
            .sum();
        let norm = sum.sqrt();
        self.last_norm = norm;
        let finite = norm.is_finite();
        let scale = match self.clip {
            Some(clip) => (clip / (norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        let scalars = if finite {
            self.applied += 1;
            self.scalars(task.step, self.applied, scale)
        } else {
            self.skipped += 1;
            let unchanged = AdamScalars::unchanged();
            StepScalars {
                decayed: unchanged,
                plain: unchanged,
            }
        };
        self.open[(task.step % 2) as usize].scalars = Some(scalars);
        let early = (0..self.model.sections.len() as u32).map(SectionId);
        let early = |engine: &Self| {
            early
                .clone()
                .any(|s| engine.placement.grad_home(s) == GradHome::Passing)
        };
        if !finite && early(self) {
            self.undoing = Some(task);
        } else {
            self.done(task);
        }
    }

    fn scalars(&self, step: u64, applied: u64, scale: f64) -> StepScalars {
        let lr = self.open[(step % 2) as usize].lr;
        let plain = AdamW {
            weight_decay: 0.0,
            ..self.adam
        };
        StepScalars {
            decayed: self.adam.at(applied, lr, scale),
            plain: plain.at(applied, lr, scale),
        }
    }

    fn update(&mut self, task: TaskRef, spec: &Task, section: SectionId, part: u32) {
        let index = section.0 as usize;
        let states = match spec.states {
            Some(claim) => self.claimed(&Arc::clone(self.scheduler().plan()), task.step, claim),
            None => SlabPlace::Optim(section, part),
        };
        let span = self.placement.parts(section)[part as usize];
        let place = PartPlace {
            states: self.places.get(states).address().cast(),
            grad: self
                .places
                .get(self.slab_place(task, spec))
                .address()
                .cast(),
            param: self.places.param[index]
                .as_ref()
                .map(|slab| slab.address().cast()),
            first: span.first as usize,
            elements: span.elements as usize,
        };
        // Before the norm (`Timing::Immediate`) the step counts as one that will be applied.
        let known = self.open[(task.step % 2) as usize].scalars;
        let scalars = known.unwrap_or_else(|| self.scalars(task.step, self.applied + 1, 1.0));
        let (optimizer, runs) = (Arc::clone(&self.optimizer), Arc::clone(&self.runs[index]));
        let seq = self.lane.push("update", move || {
            let place = place;
            // SAFETY: states, gradient and parameters belong to this update until it is done: the
            // scheduler starts nothing that reads the parameters, or writes any of them, before.
            unsafe { update::update(&optimizer, &scalars, &runs, place) };
            Ok(())
        });
        self.flying.push((task, Sign::Cpu(seq)));
    }

    /// After a gradient that was not finite: once the early updates of the step have all come
    /// through, the old extents are made current again and the parameters derived from them.
    fn undo_if_ready(&mut self) -> Result<()> {
        let Some(norm) = self.undoing else {
            return Ok(());
        };
        let plan = Arc::clone(self.scheduler().plan());
        let passing = |s: SectionId| self.placement.grad_home(s) == GradHome::Passing;
        let pending = (0..)
            .map(forebay_prefetch::TaskId)
            .zip(plan.tasks())
            .any(|(id, task)| {
                let early = match task.kind {
                    TaskKind::Update(s, _)
                    | TaskKind::WriteOptim(s, _)
                    | TaskKind::WriteParam(s)
                    | TaskKind::PushParam(s) => passing(s),
                    _ => false,
                };
                early
                    && !self.scheduler().is_done(TaskRef {
                        step: norm.step,
                        id,
                    })
            });
        if pending {
            return Ok(());
        }
        self.undoing = None;
        if self.holding {
            self.store.rollback();
            self.holding = false;
        }
        for section in (0..self.model.sections.len() as u32).map(SectionId) {
            let on_disk = self.placement.param_home(section) == Tier::Disk;
            if self.placement.grad_home(section) == GradHome::Passing && !on_disk {
                self.derive_param(section)?;
            }
        }
        self.done(norm);
        Ok(())
    }

    /// Sleeps until something completes, or a little.
    pub(super) fn nap(&self) {
        self.notifier.wait(NAP);
    }

    pub(super) fn section_bytes(&self, section: SectionId) -> u64 {
        self.model.sections[section.0 as usize].elements() * 4
    }

    /// Time that each lane worked: compute, to the device, from the device, the optimizer.
    pub(super) fn busy(&self) -> [Duration; 4] {
        [
            self.device.busy(Stream::Compute),
            self.device.busy(Stream::H2d),
            self.device.busy(Stream::D2h),
            self.lane.busy(),
        ]
    }

    pub(super) fn plan(&self) -> &Arc<Plan> {
        self.schedulers[Pass::Train as usize].plan()
    }
}

pub(super) fn key(section: SectionId, state: StateKind, part: u32) -> Key {
    Key {
        section: section.0,
        state,
        part,
    }
}

impl Driver for Engine {
    fn enter(&mut self, stage: StageId) -> Result<()> {
        let result = self.enter_stage(stage);
        self.sticky(result)
    }

    fn leave(&mut self, stage: StageId) {
        if let Some((id, task)) = self.stage.filter(|(id, _)| *id == stage) {
            debug_assert_eq!(id, stage);
            let event = self.device.newest(Stream::Compute);
            self.flying.push((task, Sign::Device(event)));
            self.scheduler_mut().issued(task);
        }
    }

    fn param(&self, section: SectionId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let uses = &plan.stages()[stage.0 as usize];
        match uses.params.iter().find(|(s, _)| *s == section) {
            Some((_, ParamSource::Fetched(claim))) => self.slot(plan, task.step, *claim),
            _ => self.resident(section),
        }
    }

    fn grad(&self, section: SectionId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let grads = &plan.stages()[stage.0 as usize].grads;
        let claim = grads
            .iter()
            .find(|(s, ..)| *s == section)
            .map(|(_, claim, _)| *claim);
        claim.map_or(0, |claim| self.slot(plan, task.step, claim))
    }

    fn saved(&self, _saver: StageId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let uses = &plan.stages()[stage.0 as usize];
        let claim = uses.save.or(uses.restore);
        claim.map_or(0, |claim| self.slot(plan, task.step, claim))
    }

    fn launch(&mut self, launch: Launch) -> Result<()> {
        // SAFETY: views come from leases and frames: inside device memory; outputs overlap nothing
        // (checked by `Launch::new`); and the scheduler keeps copies off what a stage uses.
        unsafe { self.device.launch(launch) };
        Ok(())
    }

    fn copy(&mut self, from: View, to: Span) -> Result<()> {
        // SAFETY: as for `launch`: a checkpoint's slot and a tensor of the stage.
        unsafe { self.device.copy(from.address, to) };
        Ok(())
    }

    fn upload(&mut self, values: &[u32], to: Span) -> Result<()> {
        let half = self.half();
        let input = &mut self.places.inputs[half];
        let start = self.input_used as usize;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let Some(place) = input.get_mut(start..start + bytes.len()) else {
            return Err(Error::Misuse(
                "more token ids than the footprint was measured with; measure it again".to_owned(),
            ));
        };
        place.copy_from_slice(bytes);
        self.input_used += bytes.len() as u64;
        // SAFETY: this half is written again only after the event; `to` is scratch of this step.
        let event = unsafe { self.device.copy_in(Stream::Compute, to, place.as_ptr()) };
        self.input_last[half] = Some(event);
        Ok(())
    }

    fn loss(&mut self, from: View) -> Result<()> {
        let span = Span {
            address: from.address,
            bytes: from.bytes(),
        };
        let target = self.places.small.address();
        // SAFETY: only `finish` reads it, after the event, and before the next step's loss.
        self.loss = Some(unsafe { self.device.copy_out(Stream::Compute, span, target) });
        Ok(())
    }

    fn read(&mut self, from: View, out: &mut [f32]) -> Result<()> {
        let piece = READ_BYTES as usize / 4;
        for (index, out) in out.chunks_mut(piece).enumerate() {
            let address = from.address + (index * piece * 4) as u64;
            let span = Span {
                address,
                bytes: size_of_val(out) as u64,
            };
            let target = self.places.read.address();
            // SAFETY: waited for at once; nobody else uses the piece.
            let event = unsafe { self.device.copy_out(Stream::Compute, span, target) };
            let waited = self.wait_for(event);
            self.sticky(waited)?;
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
            bytes.copy_from_slice(&self.places.read[..bytes.len()]);
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        self.device.threads()
    }

    fn finish(&mut self) -> Result<Finished> {
        let result = self.finish_pass();
        self.sticky(result)
    }

    fn abandon(&mut self) {
        self.failed
            .get_or_insert_with(|| "a step was dropped before its end".to_owned());
    }
}

impl Engine {
    fn enter_stage(&mut self, stage: StageId) -> Result<()> {
        self.check()?;
        let id = forebay_prefetch::StageId(stage.0);
        let task = loop {
            let moved = self.pump()?;
            if let Some(task) = self.scheduler_mut().try_start_compute(id) {
                break task;
            }
            if !moved {
                self.telemetry.waiting();
                self.notifier.wait(NAP);
            }
        };
        self.telemetry.entered();
        self.order(Stream::Compute, task);
        self.stage = Some((stage, task));
        let plan = Arc::clone(self.scheduler().plan());
        for (section, claim, first) in &plan.stages()[stage.0 as usize].grads {
            if *first {
                let address = self.slot(&plan, task.step, *claim);
                let bytes = self.section_bytes(*section);
                // SAFETY: the slot was just claimed for this gradient.
                unsafe { self.device.zero(Span { address, bytes }) };
            }
        }
        Ok(())
    }

    fn finish_pass(&mut self) -> Result<Finished> {
        self.stage = None;
        let loss = match self.loss.take() {
            None => None,
            Some(event) => {
                self.wait_for(event)?;
                let bytes = self.places.small.first_chunk::<4>();
                bytes.map(|b| f32::from_le_bytes(*b))
            }
        };
        if self.pass == Pass::Eval {
            self.wait_until(|engine| engine.scheduler().idle())?;
        } else {
            self.telemetry.end_step(Instant::now());
        }
        self.telemetry.end_pass();
        Ok(Finished {
            step: self.steps.saturating_sub(1),
            loss,
        })
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Engine on {} after {} steps",
            self.device.name(),
            self.steps
        )
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Nothing may touch slots or slabs once they go: streams and the lane are emptied here,
        // the disk's thread by the store's own end.
        self.device.drain();
        self.lane.drain();
    }
}
