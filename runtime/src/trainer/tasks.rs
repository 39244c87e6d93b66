//! What each kind of task does: its transfer, copy or piece of the optimizer's work, on the places
//! that the plan gave it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_kernels::cpu::AdamW;
use forebay_nvme::{Key, StateKind};
use forebay_prefetch::{
    ClaimRef, GradHome, Lane, Plan, SectionId, Task, TaskId, TaskKind, TaskRef, Tier, Timing,
};

use super::engine::{Engine, Moving, Sign};
use super::places::SlabPlace;
use super::update::{self, PartPlace, StepScalars};
use crate::device::{Span, Stream};
use crate::error::Result;

impl Engine {
    pub(super) fn claimed(&self, plan: &Plan, step: u64, claim: ClaimRef) -> SlabPlace {
        let pool = plan.task(claim.task).claims[claim.claim as usize];
        SlabPlace::Pool(pool, self.scheduler().buffer(step, claim))
    }

    pub(super) fn slot(&self, plan: &Plan, step: u64, claim: ClaimRef) -> u64 {
        let pool = plan.task(claim.task).claims[claim.claim as usize];
        self.places.slot(pool, self.scheduler().buffer(step, claim))
    }

    /// The slab that a task works on: from a pool, or the section's own.
    pub(super) fn slab_place(&self, task: TaskRef, spec: &Task) -> SlabPlace {
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

    pub(super) fn read(&mut self, task: TaskRef, spec: &Task, key: Key) -> Result<()> {
        let place = self.slab_place(task, spec);
        let slab = self.places.take_slab(place);
        self.moving.push(Moving { key, task, place });
        self.trace_transfer(task);
        self.store.read(key, slab)?;
        Ok(())
    }

    pub(super) fn write(&mut self, task: TaskRef, spec: &Task, key: Key) -> Result<()> {
        let immediate = self.scheduler().plan().timing() == Timing::Immediate;
        if immediate && key.state != StateKind::Grad && !self.holding {
            self.store.hold();
            self.holding = true;
        }
        let place = self.slab_place(task, spec);
        let slab = self.places.take_slab(place);
        self.moving.push(Moving { key, task, place });
        self.trace_transfer(task);
        self.store.write(key, slab)?;
        Ok(())
    }

    fn trace_transfer(&mut self, task: TaskRef) {
        if let Some(trace) = self.tracing() {
            trace.transfer_starts(task);
        }
    }

    /// Queues a copy between pinned memory and the device, behind what it depends on.
    pub(super) fn copy_task(&mut self, task: TaskRef, spec: &Task) {
        let plan = Arc::clone(self.scheduler().plan());
        let bytes = spec.amount;
        let address = match (spec.slot, spec.kind) {
            (Some(claim), TaskKind::GradOut(section)) => {
                let section = &self.model.sections[section.0 as usize];
                let offset = self.model.cast_offset(section).unwrap_or(0);
                self.slot(&plan, task.step, claim) + offset
            }
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
        self.fly(task, Sign::Device(event));
        self.scheduler_mut().issued(task);
    }

    /// Makes a stream wait for what `task` depends on and is still under way on the device.
    pub(super) fn order(&mut self, stream: Stream, task: TaskRef) {
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

    /// Where operations find the parameters of a section that a stage reads in pinned memory.
    pub(super) fn mapped(&self, section: SectionId) -> u64 {
        let slab = self.places.param[section.0 as usize].as_ref();
        let slab = slab.expect("the plan reads in place what lives in pinned memory");
        let address = self.device.mapped(slab.address());
        address.expect("the arena was made known to the device")
    }

    pub(super) fn grad_norm(&mut self, task: TaskRef, spec: &Task, section: SectionId) {
        let grad = self.places.get(self.slab_place(task, spec)).address() as usize;
        let (optimizer, sums) = (Arc::clone(&self.optimizer), Arc::clone(&self.sums));
        let (elements, dtype) = (spec.amount as usize, self.model.dtype);
        let seq = self.lane.push("gradient norm", move || {
            // SAFETY: the slab belongs to the gradient until its update is done.
            let sum = unsafe { update::norm(&optimizer, grad, dtype, elements) };
            sums[section.0 as usize].store(sum.sum.to_bits(), Ordering::Release);
            Ok(())
        });
        self.fly(task, Sign::Cpu(seq));
    }

    /// All sums are known: the clip factor, and whether the step is skipped.
    pub(super) fn norm(&mut self, task: TaskRef) {
        // In the order of the sections, so that the bits do not depend on that of completions.
        let of = |(section, sum): (SectionId, &AtomicU64)| {
            if self.placement.grad_home(section) == GradHome::Device {
                self.places.sum(section)
            } else {
                f64::from_bits(sum.load(Ordering::Acquire))
            }
        };
        let sections = (0..).map(SectionId);
        let sum: f64 = sections.zip(self.sums.iter()).map(of).sum();
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
            StepScalars::unchanged()
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

    pub(super) fn scalars(&self, step: u64, applied: u64, scale: f64) -> StepScalars {
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

    /// What the updates of a step use. Before the norm (`Timing::Immediate`) the step counts as one
    /// that will be applied.
    pub(super) fn step_scalars(&self, step: u64) -> StepScalars {
        let known = self.open[(step % 2) as usize].scalars;
        known.unwrap_or_else(|| self.scalars(step, self.applied + 1, 1.0))
    }

    pub(super) fn update(&mut self, task: TaskRef, spec: &Task, section: SectionId, part: u32) {
        let index = section.0 as usize;
        let states = match spec.states {
            Some(claim) => self.claimed(&Arc::clone(self.scheduler().plan()), task.step, claim),
            None => SlabPlace::Optim(section, part),
        };
        let span = self.placement.parts(section)[part as usize];
        let place = PartPlace {
            states: self.places.get(states).address().cast(),
            grad: self.places.get(self.slab_place(task, spec)).address(),
            param: self.places.param[index].as_ref().map(|slab| slab.address()),
            dtype: self.model.dtype,
            first: span.first as usize,
            elements: span.elements as usize,
        };
        let scalars = self.step_scalars(task.step);
        let (optimizer, runs) = (Arc::clone(&self.optimizer), Arc::clone(&self.runs[index]));
        let seq = self.lane.push("update", move || {
            let place = place;
            // SAFETY: states, gradient and parameters belong to this update until it is done: the
            // scheduler starts nothing that reads the parameters, or writes any of them, before.
            unsafe { update::update(&optimizer, &scalars, &runs, place) };
            Ok(())
        });
        self.fly(task, Sign::Cpu(seq));
    }

    /// After a gradient that was not finite: once the early updates of the step have all come
    /// through, the old extents are made current again and the parameters derived from them.
    pub(super) fn undo_if_ready(&mut self) -> Result<()> {
        let Some(norm) = self.undoing else {
            return Ok(());
        };
        let plan = Arc::clone(self.scheduler().plan());
        let passing = |s: SectionId| self.placement.grad_home(s) == GradHome::Passing;
        let pending = (0..).map(TaskId).zip(plan.tasks()).any(|(id, task)| {
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
}
