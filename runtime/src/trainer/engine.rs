//! The engine: drives the scheduler with real completions.
//!
//! It runs on the trainer's thread, inside the calls of a step. [`Engine::pump`] takes note of what
//! completed on the device, the disk and the optimizer's lane, and starts what may start then;
//! where the trainer must wait, the engine pumps and sleeps in turn.

use std::sync::Arc;
use std::time::Duration;

use forebay_nvme::{Done, Key, StateKind, Store};
use forebay_pinned::Arena;
use forebay_prefetch::{Lane, Placement, Plan, Scheduler, SectionId, TaskKind, TaskRef};

use super::ahead::RunAhead;
use super::loss_scale::Scaler;
use super::norm::Resolving;
use super::options::Publish;
use super::places::{Places, SlabPlace};
use super::telemetry::Telemetry;
use super::trace::Trace;
use super::update::{self, Run, StepScalars, Updater};
use crate::device::{Device, Event, Span, Stream};
use crate::error::{Error, Result};
use crate::model::{Model, StageId};
use crate::queue::{Notifier, Seq, WorkQueue};

/// How long the engine sleeps at most before it looks again: completions wake it earlier.
const NAP: Duration = Duration::from_millis(2);

/// What tells that a task is complete.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sign {
    Device(Event),
    Cpu(Seq),
}

/// A transfer of the disk and the task it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moving {
    pub(super) key: Key,
    pub(super) task: TaskRef,
    pub(super) place: SlabPlace,
}

/// What becomes of a step's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It is applied.
    Apply,
    /// It is thrown away.
    Discard,
}

/// What the engine walks through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Train,
    Eval,
    /// No stages: what applies a gradient that waits ([`super::delayed`]).
    Flush,
}

/// What belongs to one step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OpenStep {
    pub(super) lr: f64,
    /// Once the trainer has asked: by what the gradient is multiplied.
    pub(super) loss_scale: Option<f64>,
    /// Whether some of its gradients are whole: updates may have begun.
    pub(super) any_whole: bool,
    /// Once the trainer has ended it: what becomes of its gradient.
    pub(super) ending: Option<Ending>,
    /// Once the norm is known: what the updates use.
    pub(super) scalars: Option<StepScalars>,
    /// With delayed updates: the step whose gradient this one's updates apply.
    pub(super) applies: Option<u64>,
}

/// The two steps that may be open, and the one before: delayed updates use what its norm decided.
#[derive(Debug, Default)]
pub(super) struct OpenSteps([OpenStep; 3]);

impl OpenSteps {
    pub(super) fn of(&self, step: u64) -> &OpenStep {
        &self.0[(step % 3) as usize]
    }

    pub(super) fn of_mut(&mut self, step: u64) -> &mut OpenStep {
        &mut self.0[(step % 3) as usize]
    }
}

/// What the engine is made from.
pub(super) struct Parts {
    pub(super) model: Arc<Model>,
    pub(super) placement: Placement,
    pub(super) train: Arc<Plan>,
    pub(super) eval: Plan,
    pub(super) flush: Plan,
    pub(super) device: Box<dyn Device>,
    pub(super) store: Store,
    pub(super) arena: Arena,
    pub(super) places: Places,
    pub(super) updater: Updater,
    pub(super) lane: WorkQueue,
    pub(super) notifier: Arc<Notifier>,
    pub(super) clip: Option<f64>,
    pub(super) scaler: Scaler,
    pub(super) publish: Publish,
    pub(super) ahead: RunAhead,
    pub(super) trace: Option<Trace>,
}

/// See the module. The order of fields is the order of their end: first everything that may touch
/// memory, then the memory.
pub(crate) struct Engine {
    pub(super) lane: WorkQueue,
    pub(super) device: Box<dyn Device>,
    pub(super) store: Store,
    pub(super) ahead: RunAhead,
    pub(super) places: Places,
    pub(super) arena: Arena,
    pub(super) updater: Arc<Updater>,
    pub(super) notifier: Arc<Notifier>,
    pub(super) model: Arc<Model>,
    pub(super) placement: Placement,
    pub(super) schedulers: [Scheduler; 3],
    pub(super) pass: Pass,
    pub(super) flying: Vec<(TaskRef, Sign)>,
    pub(super) moving: Vec<Moving>,
    pub(super) runs: Vec<Arc<[Run]>>,
    pub(super) open: OpenSteps,
    /// The newest training step, as the scheduler counts them.
    pub(super) newest: u64,
    /// With delayed updates: the newest step whose gradient nothing has applied yet.
    pub(super) waiting: Option<u64>,
    pub(super) clip: Option<f64>,
    /// As far as norms are known.
    pub(super) scaler: Scaler,
    pub(super) publish: Publish,
    /// Steps that were applied and not skipped: the count of the bias corrections.
    pub(super) applied: u64,
    /// Training steps begun.
    pub(super) steps: u64,
    pub(super) last_norm: f64,
    pub(super) skipped: u64,
    pub(super) holding: bool,
    /// Whether a pass was begun and neither finished nor dropped.
    pub(super) walking: bool,
    pub(super) resolving: Option<Resolving>,
    /// The norm of a step that the trainer has not ended yet.
    pub(super) held: Option<TaskRef>,
    pub(super) stage: Option<(StageId, TaskRef)>,
    pub(super) loss: Option<Event>,
    pub(super) input_used: u64,
    pub(super) input_last: [Option<Event>; 2],
    /// Tensors of gradients that nothing was added to yet, of the stage that was entered.
    pub(super) unwritten: Vec<Span>,
    pub(super) failed: Option<String>,
    pub(super) telemetry: Telemetry,
    pub(super) trace: Option<Trace>,
}

impl Engine {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            model,
            placement,
            train,
            eval,
            flush,
            device,
            store,
            arena,
            ..
        } = parts;
        let tasks = [&*train, &eval, &flush].map(|plan| plan.tasks().len());
        let tasks = tasks.into_iter().max().unwrap_or(0);
        let notifier = Arc::clone(&parts.notifier);
        store.on_end(move || notifier.notify());
        let mut engine = Self {
            lane: parts.lane,
            store,
            places: parts.places,
            arena,
            notifier: parts.notifier,
            runs: model
                .sections
                .iter()
                .map(|s| update::runs(s, &parts.updater.optimizer))
                .collect(),
            updater: Arc::new(parts.updater),
            telemetry: Telemetry::new(&train),
            schedulers: [train, Arc::new(eval), Arc::new(flush)].map(Scheduler::new),
            pass: Pass::Train,
            flying: Vec::with_capacity(2 * tasks),
            moving: Vec::with_capacity(128),
            open: OpenSteps::default(),
            newest: 0,
            waiting: None,
            clip: parts.clip,
            scaler: parts.scaler,
            publish: parts.publish,
            ahead: parts.ahead,
            applied: 0,
            steps: 0,
            last_norm: 0.0,
            skipped: 0,
            holding: false,
            walking: false,
            resolving: None,
            held: None,
            stage: None,
            loss: None,
            input_used: 0,
            input_last: [None; 2],
            unwritten: Vec::with_capacity(64),
            failed: None,
            trace: parts.trace,
            device,
            model,
            placement,
        };
        // From here on there is something to collect.
        engine.collect_trace();
        engine
    }

    /// Opens a pass.
    pub(super) fn begin(&mut self, pass: Pass, lr: f64) -> Result<()> {
        self.check_walked()?;
        if pass != self.pass {
            self.settle()?;
            self.pass = pass;
        }
        self.wait_until(|engine| engine.scheduler().can_begin())?;
        let step = self.schedulers[pass as usize].begin_step();
        self.input_used = 0;
        if pass == Pass::Train {
            let applies = self.delayed().then(|| self.waiting.replace(step)).flatten();
            *self.open.of_mut(step) = OpenStep {
                lr,
                applies,
                ..OpenStep::default()
            };
            self.newest = step;
            self.steps += 1;
            self.telemetry.begin_step();
        }
        // The token ids of two steps ago may still be on their way.
        if let Some(event) = self.input_last[self.half()].take() {
            self.wait_for(event)?;
        }
        self.walking = true;
        self.pump().map(|_| ())
    }

    /// Waits until every task of every step is done, and every gradient applied.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.check_walked()?;
        self.wait_until(|engine| engine.scheduler().idle())?;
        self.flush()
    }

    /// Remembers the first failure: what was under way when it happened is not to be trusted.
    pub(super) fn sticky<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed.get_or_insert_with(|| error.to_string());
        }
        result
    }

    /// As [`Engine::check`]; a step that was leaked counts as dropped.
    fn check_walked(&mut self) -> Result<()> {
        if std::mem::take(&mut self.walking) {
            self.drop_step();
        }
        self.check()
    }

    pub(super) fn drop_step(&mut self) {
        self.walking = false;
        self.failed
            .get_or_insert_with(|| "a step was dropped before its end".to_owned());
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

    pub(super) fn scheduler(&self) -> &Scheduler {
        &self.schedulers[self.pass as usize]
    }

    pub(super) fn scheduler_mut(&mut self) -> &mut Scheduler {
        &mut self.schedulers[self.pass as usize]
    }

    pub(super) fn half(&self) -> usize {
        (self.telemetry.passes() % 2) as usize
    }

    /// Takes note of completions and starts what may start; whether anything happened.
    pub(super) fn pump(&mut self) -> Result<bool> {
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
        self.store.health()?;
        while let Some(done) = self.store.try_next() {
            moved = true;
            self.moved(done)?;
        }
        self.resolve_if_ready()?;
        while self.store.can_start() {
            let Some(task) = self.scheduler_mut().next() else {
                break;
            };
            self.start(task)?;
            moved = true;
        }
        moved |= self.run_ahead();
        Ok(moved)
    }

    /// A transfer of a task has ended.
    pub(super) fn moved(&mut self, done: Done) -> Result<()> {
        let index = self.moving.iter().position(|m| m.key == done.key);
        let Moving { task, place, .. } = self
            .moving
            .swap_remove(index.expect("every transfer was noted"));
        self.places.return_slab(place, done.slab);
        if let Some((trace, _)) = self.tracing() {
            trace.transfer_ends(task);
        }
        done.result?;
        self.done(task);
        Ok(())
    }

    pub(super) fn lane_reached(&self, seq: Seq) -> Result<bool> {
        // Before the failure, as devices do.
        let reached = self.lane.reached(seq);
        match self.lane.failure() {
            Some(f) => Err(Error::Device {
                operation: f.operation,
                what: f.what,
            }),
            None => Ok(reached),
        }
    }

    pub(super) fn done(&mut self, task: TaskRef) {
        let plan = Arc::clone(self.scheduler().plan());
        let spec = plan.task(task.id);
        if self.pass == Pass::Train {
            let busy = self.device.busy(Stream::Compute);
            self.telemetry.done(task.step, spec, busy);
            if matches!(spec.kind, TaskKind::Update(..)) {
                self.ahead.done(task);
            }
        }
        self.scheduler_mut().done(task);
    }

    /// Starts a task that the scheduler let go.
    pub(super) fn start(&mut self, task: TaskRef) -> Result<()> {
        let plan = Arc::clone(self.scheduler().plan());
        let spec = plan.task(task.id);
        match spec.kind {
            TaskKind::ReadParam(s) => self.read(task, spec, key(s, StateKind::Param, 0)),
            TaskKind::ReadGrad(_) if self.delayed() && self.applies(task).is_none() => {
                self.done(task);
                Ok(())
            }
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
            TaskKind::GradNorm(section) => self.grad_norm(task, spec, section),
            TaskKind::Update(section, part) if spec.lane == Lane::Update => {
                self.device_update(task, section, part)
            }
            TaskKind::Update(section, part) => {
                self.update(task, spec, section, part);
                Ok(())
            }
            TaskKind::SwapParam(section) => {
                self.swap_param(task, spec, section);
                Ok(())
            }
            TaskKind::Norm => self.norm(task),
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

    /// Takes note of a task that is under way, and by what its end is known.
    pub(super) fn fly(&mut self, task: TaskRef, sign: Sign) {
        self.flying.push((task, sign));
        if let Some((trace, scheduler)) = self.tracing() {
            trace.started(scheduler, task);
            match sign {
                Sign::Device(event) => trace.on_device(event, task),
                Sign::Cpu(seq) => trace.on_cpu(seq, task),
            }
        }
    }

    /// The trace, if one is written and this is a training step, and who knows what waited for what.
    pub(super) fn tracing(&mut self) -> Option<(&mut Trace, &Scheduler)> {
        let scheduler = &self.schedulers[self.pass as usize];
        let trace = self.trace.as_mut().filter(|_| self.pass == Pass::Train);
        trace.map(|trace| (trace, scheduler))
    }

    /// Writes what the trace has waited for.
    pub(super) fn collect_trace(&mut self) {
        if let Some(trace) = &mut self.trace {
            let shifts = self.updater.shifts.as_ref();
            trace.collect(&mut *self.device, self.lane.worked(), shifts);
        }
    }

    /// Leaves out of the trace what was no step's, now that all of it is done.
    pub(super) fn cut_trace(&mut self) {
        self.collect_trace();
        if let Some(trace) = &mut self.trace {
            trace.cut();
        }
    }

    /// Sleeps until something completes, or a little.
    pub(super) fn nap(&self) {
        self.notifier.wait(NAP);
    }

    /// Bytes of a section's parameters.
    pub(super) fn section_bytes(&self, section: SectionId) -> u64 {
        self.model.sections[section.0 as usize].elements() * self.model.dtype.bytes() as u64
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
        self.collect_trace();
    }
}
