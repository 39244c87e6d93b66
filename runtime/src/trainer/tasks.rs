//! What each kind of task does: its transfer, copy or piece of the optimizer's work, on the places
//! that the plan gave it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use forebay_nvme::{Key, StateKind};
use forebay_prefetch::{ClaimRef, Lane, Plan, SectionId, Task, TaskKind, TaskRef, Timing};

use super::engine::{Engine, Moving, Sign};
use super::places::SlabPlace;
use super::update::{self, PartPlace, StepScalars, Work};
use crate::device::{Span, Stream};
use crate::error::Result;
use crate::queue::Seq;

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
            // Made of old ones, in their own slab.
            (TaskKind::PushParam(s), ..) if self.placement.param_slab(s) => SlabPlace::Param(s),
            (_, Some(claim), _) => self.claimed(plan, task.step, claim),
            (
                TaskKind::GradOut(s)
                | TaskKind::PushParam(s)
                | TaskKind::WriteParam(s)
                | TaskKind::SwapParam(s)
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
        if let Some((trace, scheduler)) = self.tracing() {
            trace.started(scheduler, task);
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

    pub(super) fn update(&mut self, task: TaskRef, spec: &Task, section: SectionId, part: u32) {
        let place = self.part_place(task, spec, section, part);
        let scalars = self.update_scalars(task);
        let seq = self.queue_update(task, section, Work::Update, place, scalars, None);
        self.fly(task, Sign::Cpu(seq));
    }

    /// Where the update of a part finds what it works on.
    pub(super) fn part_place(
        &self,
        task: TaskRef,
        spec: &Task,
        section: SectionId,
        part: u32,
    ) -> PartPlace {
        let states = match spec.states {
            Some(claim) => self.claimed(self.scheduler().plan(), task.step, claim),
            None => SlabPlace::Optim(section, part),
        };
        let span = self.placement.parts(section)[part as usize];
        let plan = self.scheduler().plan();
        let own = self.places.param[section.0 as usize].as_ref();
        // A slab that the step still reads from is not written.
        let own = own.filter(|_| !self.delayed());
        let old = spec.param.map(|claim| self.claimed(plan, task.step, claim));
        let param = old.map(|place| self.places.get(place)).or(own);
        PartPlace {
            states: self.places.get(states).address(),
            grad: self.places.get(self.slab_place(task, spec)).address(),
            param: param.map(|slab| slab.address()),
            kept: None,
            dtype: self.model.dtype,
            first: span.first as usize,
            elements: span.elements as usize,
        }
    }

    /// Hands the optimizer's work on a part to its lane. `left` is told what an update ahead left.
    pub(super) fn queue_update(
        &mut self,
        task: TaskRef,
        section: SectionId,
        work: Work,
        place: PartPlace,
        scalars: StepScalars,
        left: Option<Arc<AtomicU64>>,
    ) -> Seq {
        let (updater, clock) = (Arc::clone(&self.updater), self.ahead.clock());
        let runs = Arc::clone(&self.runs[section.0 as usize]);
        self.lane.push(work.name(), move || {
            let place = place;
            let start = Instant::now();
            // SAFETY: states, gradient, parameters and what is kept belong to this update until it is
            // done: the scheduler starts nothing that reads the parameters, or writes any of them, before.
            let done = unsafe { update::work(&updater, work, &scalars, &runs, place) };
            if let Some(shifts) = &updater.shifts {
                shifts.note(&updater.workers, task);
            }
            if let Some(rest) = done {
                clock.add(work, place.elements, start.elapsed());
                if let Some(left) = left {
                    left.store(rest as u64, Ordering::Relaxed);
                }
            }
            Ok(())
        })
    }
}
