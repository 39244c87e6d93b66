//! How a plan is built: one pass over the stages in compute order, emitting each task where it
//! would stand if the step ran one task at a time.

use crate::keeps::keeps;
use crate::model::{Model, SectionId, StageId, StageSpec, Tier, Timing};
use crate::placement::{GradHome, Placement};
use crate::plan::{
    ClaimRef, Dep, GradUse, Lane, Order, ParamSource, Plan, PoolId, PoolKind, StageUses, Task,
    TaskId, TaskKind, Window,
};

mod delayed;

pub(crate) use delayed::flush;

pub(crate) fn training(model: &Model, placement: &Placement) -> Plan {
    let mut builder = Builder::new(model, &model.stages, placement);
    for stage in 0..model.stages.len() {
        builder.stage(StageId(stage as u32));
    }
    builder.norm_and_updates();
    builder.commit();
    builder.link_steps();
    builder.finish()
}

pub(crate) fn evaluation(model: &Model, placement: &Placement) -> Plan {
    let mut builder = Builder::new(model, &model.eval, placement);
    for stage in 0..model.eval.len() {
        builder.stage(StageId(stage as u32));
    }
    builder.finish()
}

struct Builder<'a> {
    model: &'a Model,
    stages: &'a [StageSpec],
    placement: &'a Placement,
    tasks: Vec<Task>,
    uses: Vec<StageUses>,
    /// For each stage and section: whether the slot stays until the section's next use.
    keeps: Vec<Vec<SectionId>>,
    sections: Vec<Progress>,
    /// Stage by stage, the checkpoint's slot or the task that copied it out.
    acts: Vec<Act>,
    staged_updates: u32,
    /// The tasks of a training step that there is one of.
    norm: Option<TaskId>,
    commit: Option<TaskId>,
}

/// What has been planned for a section so far.
#[derive(Clone, Default)]
struct Progress {
    /// The slot that it stays in.
    kept: Option<ClaimRef>,
    /// Its first read, fetch or use in the step.
    first: Option<TaskId>,
    /// The first stage that reads it in pinned memory.
    mapped: Option<TaskId>,
    /// Its newest read.
    read: Option<TaskId>,
    /// Its fetches.
    fetches: Vec<TaskId>,
    /// The newest stage that uses it in its own slot, or reads it in pinned memory.
    user: Option<TaskId>,
    grad_slot: Option<ClaimRef>,
    /// The gradient's slab, if from a pool.
    grad_slab: Option<ClaimRef>,
    norm: Option<TaskId>,
    /// What brings the gradient to pinned memory.
    out: Option<TaskId>,
    spill: Option<TaskId>,
    /// What brings the gradient back from disk.
    grad_read: Option<TaskId>,
    updates: Vec<TaskId>,
    /// What puts the new parameters where they live.
    settled: Option<TaskId>,
    /// Per part: the reads and writes of its states.
    states: Vec<(Option<TaskId>, Option<TaskId>)>,
}

#[derive(Clone, Copy, Default)]
struct Act {
    slot: Option<ClaimRef>,
    saved: Option<TaskId>,
}

fn after(task: TaskId) -> Dep {
    Dep {
        task,
        previous_step: false,
        order: Order::Done,
    }
}

fn issued(task: TaskId) -> Dep {
    Dep {
        order: Order::Issued,
        ..after(task)
    }
}

fn previous(dep: Dep) -> Dep {
    Dep {
        previous_step: true,
        ..dep
    }
}

impl<'a> Builder<'a> {
    fn new(model: &'a Model, stages: &'a [StageSpec], placement: &'a Placement) -> Self {
        Self {
            model,
            stages,
            placement,
            tasks: Vec::new(),
            uses: vec![StageUses::default(); stages.len()],
            keeps: keeps(stages, model, placement),
            sections: vec![Progress::default(); model.sections.len()],
            acts: vec![Act::default(); stages.len()],
            staged_updates: 0,
            norm: None,
            commit: None,
        }
    }

    fn add(&mut self, kind: TaskKind, lane: Lane, amount: u64, deps: Vec<Dep>) -> TaskId {
        self.tasks.push(Task {
            kind,
            lane,
            deps,
            claims: Vec::new(),
            frees: Vec::new(),
            window: Window::Open,
            slot: None,
            slab: None,
            states: None,
            param: None,
            amount,
        });
        TaskId(self.tasks.len() as u32 - 1)
    }

    fn at(&mut self, task: TaskId) -> &mut Task {
        &mut self.tasks[task.0 as usize]
    }

    /// `task` takes a buffer.
    fn claim(&mut self, task: TaskId, pool: PoolId) -> ClaimRef {
        let claims = &mut self.at(task).claims;
        claims.push(pool);
        ClaimRef {
            task,
            claim: claims.len() as u32 - 1,
        }
    }

    fn bytes(&self, section: SectionId) -> u64 {
        self.model.sections[section.0 as usize].param_bytes
    }

    fn progress(&mut self, section: SectionId) -> &mut Progress {
        &mut self.sections[section.0 as usize]
    }

    fn stage(&mut self, stage: StageId) {
        let index = stage.0 as usize;
        let spec = &self.stages[index];
        let mut deps = Vec::new();
        let mut frees = Vec::new();
        for section in spec.reads() {
            let source = if in_place(spec, self.placement, section) {
                ParamSource::Mapped
            } else {
                self.param(stage, section)
            };
            if let ParamSource::Fetched(slot) = source {
                deps.push(issued(slot.task));
                let kept = self.keeps[index].contains(&section);
                self.progress(section).kept = kept.then_some(slot);
                if !kept {
                    frees.push(slot);
                }
            }
            self.uses[index].params.push((section, source));
        }
        let restore = spec.restores.map(|saver| self.restore(stage, saver));
        if let Some(slot) = restore {
            deps.push(issued(slot.task));
            frees.push(slot);
        }
        let compute = self.add(TaskKind::Compute(stage), Lane::Compute, 0, deps);
        self.at(compute).frees = frees;
        for (section, source) in self.uses[index].params.clone() {
            let progress = self.progress(section);
            if !matches!(source, ParamSource::Fetched(_)) {
                progress.user = Some(compute);
            }
            let first = match source {
                ParamSource::Mapped => &mut progress.mapped,
                ParamSource::Resident | ParamSource::Fetched(_) => &mut progress.first,
            };
            first.get_or_insert(compute);
        }
        self.uses[index].task = Some(compute);
        self.uses[index].restore = restore;
        if let Some(bytes) = spec.saves {
            self.save(stage, compute, bytes);
        }
        for &section in &spec.grads {
            self.grad(index, compute, section);
        }
    }

    /// Has the parameters of a section on the device before a stage.
    fn param(&mut self, stage: StageId, section: SectionId) -> ParamSource {
        if self.placement.resident(section) {
            return ParamSource::Resident;
        }
        if let Some(kept) = self.progress(section).kept {
            return ParamSource::Fetched(kept);
        }
        let bytes = self.bytes(section);
        let staged = (self.placement.param_home(section) == Tier::Disk).then(|| {
            // An extent is read by one transfer at a time.
            let before = self.progress(section).read.map(after).into_iter().collect();
            let read = self.add(TaskKind::ReadParam(section), Lane::DiskRead, bytes, before);
            self.progress(section).read = Some(read);
            self.at(read).window = Window::Read(stage);
            let slab = self.claim(read, self.placement.pool(PoolKind::ParamStage, section));
            self.at(read).slab = Some(slab);
            self.progress(section).first.get_or_insert(read);
            slab
        });
        let deps = staged.iter().map(|slab| after(slab.task)).collect();
        let fetch = self.add(TaskKind::FetchParam(section), Lane::H2d, bytes, deps);
        self.at(fetch).window = Window::Fetch(stage);
        let slot = self.claim(fetch, self.placement.pool(PoolKind::ParamSlot, section));
        self.at(fetch).slot = Some(slot);
        self.at(fetch).slab = staged;
        self.at(fetch).frees.extend(staged);
        self.progress(section).fetches.push(fetch);
        self.progress(section).first.get_or_insert(fetch);
        ParamSource::Fetched(slot)
    }

    fn save(&mut self, stage: StageId, compute: TaskId, bytes: u64) {
        let slot = self.claim(compute, PoolId::new(PoolKind::ActSlot, 0));
        let act = &mut self.acts[stage.0 as usize];
        act.slot = Some(slot);
        self.uses[stage.0 as usize].save = Some(slot);
        if self.placement.act_home(stage) == Some(Tier::Pinned) {
            let save = self.add(
                TaskKind::SaveAct(stage),
                Lane::D2h,
                bytes,
                vec![issued(compute)],
            );
            self.at(save).slot = Some(slot);
            self.at(save).frees.push(slot);
            self.acts[stage.0 as usize].saved = Some(save);
        }
    }

    fn restore(&mut self, stage: StageId, saver: StageId) -> ClaimRef {
        let act = self.acts[saver.0 as usize];
        match (act.saved, act.slot) {
            (None, Some(slot)) => slot,
            (saved, _) => {
                let bytes = self.stages[saver.0 as usize].saves.unwrap_or(0);
                let deps = saved.into_iter().map(after).collect();
                let restore = self.add(TaskKind::RestoreAct(saver), Lane::H2d, bytes, deps);
                self.at(restore).window = Window::Fetch(stage);
                let slot = self.claim(restore, PoolId::new(PoolKind::ActSlot, 0));
                self.at(restore).slot = Some(slot);
                slot
            }
        }
    }

    /// A stage adds to a gradient: it starts with the first such stage and leaves after the last.
    fn grad(&mut self, stage: usize, compute: TaskId, section: SectionId) {
        let Some((first, last)) = self.model.grad_span(section) else {
            return;
        };
        if first == stage {
            let pool = self.placement.pool(PoolKind::GradSlot, section);
            let slot = self.claim(compute, pool);
            self.progress(section).grad_slot = Some(slot);
        }
        let Some(slot) = self.progress(section).grad_slot else {
            return;
        };
        self.uses[stage].grads.push(GradUse {
            section,
            slot,
            first: first == stage,
            last: last == stage,
        });
        if last != stage {
            return;
        }
        let elements = self.model.sections[section.0 as usize].elements;
        let home = self.placement.grad_home(section);
        let mut free = self.place_freed(section);
        let mut deps = vec![issued(compute)];
        if home == GradHome::Device {
            deps.append(&mut free);
        }
        let norm = self.add(TaskKind::GradNorm(section), Lane::Update, elements, deps);
        self.at(norm).slot = Some(slot);
        self.progress(section).norm = Some(norm);
        if home == GradHome::Device {
            // By then the gradient is in its own place.
            self.at(norm).frees.push(slot);
            return;
        }
        let bytes = self.bytes(section);
        free.push(issued(norm));
        let out = self.add(TaskKind::GradOut(section), Lane::D2h, bytes, free);
        self.at(out).slot = Some(slot);
        self.at(out).frees.push(slot);
        let slab = (home != GradHome::Slab)
            .then(|| self.claim(out, self.placement.pool(PoolKind::GradStage, section)));
        self.at(out).slab = slab;
        self.progress(section).out = Some(out);
        self.progress(section).grad_slab = slab;
        match home {
            GradHome::Slab | GradHome::Device => {}
            GradHome::Passing => self.updates(section, Some(after(out))),
            GradHome::Disk => {
                let deps = vec![after(out)];
                let spill = self.add(TaskKind::SpillGrad(section), Lane::DiskWrite, bytes, deps);
                self.at(spill).slab = slab;
                self.at(spill).frees.extend(slab);
                self.progress(section).spill = Some(spill);
            }
        }
    }

    /// Brings a gradient back from disk.
    fn read_grad(&mut self, section: SectionId, deps: Vec<Dep>) -> TaskId {
        let bytes = self.bytes(section);
        let read = self.add(TaskKind::ReadGrad(section), Lane::DiskRead, bytes, deps);
        let slab = self.claim(read, self.placement.pool(PoolKind::GradStage, section));
        self.at(read).slab = Some(slab);
        self.progress(section).grad_slab = Some(slab);
        read
    }

    /// Updates the parts of a section whose gradient is in pinned memory, and brings the new parameters
    /// to where they live. Where both it and the states stay there until the next step, an update may run
    /// before the norm.
    fn updates(&mut self, section: SectionId, ready: Option<Dep>) {
        let slab = self.progress(section).grad_slab;
        let stays = self.placement.grad_home(section) == GradHome::Slab;
        let out = self.progress(section).out.map(after);
        let old = self
            .placement
            .update_reads_param(section)
            .then(|| self.old_params(section, ready));
        let mut updates = Vec::new();
        let mut states = Vec::new();
        for (index, part) in self.placement.parts(section).to_vec().iter().enumerate() {
            let index = index as u32;
            // What it makes of old parameters from disk waits for them.
            let gated = stays && part.home == Tier::Pinned && !self.delayed() && old.is_none();
            let mut deps: Vec<Dep> = out.into_iter().collect();
            deps.extend(ready.filter(|_| !gated));
            let staged = (part.home == Tier::Disk).then(|| {
                let bytes = self.placement.optim_bytes(part);
                let kind = TaskKind::ReadOptim(section, index);
                // A read of states waits for its turn only; unless nothing may run ahead, or an
                // undone step would need the buffer (see `Timing::Immediate`).
                let options = self.placement.options();
                let waits = options.lookahead == 0 || options.timing == Timing::Immediate;
                let waits = ready.filter(|_| waits);
                let read = self.add(kind, Lane::DiskRead, bytes, waits.into_iter().collect());
                self.at(read).window = Window::Update(self.staged_updates);
                self.staged_updates += 1;
                let buffer = self.claim(read, PoolId::new(PoolKind::OptimStage, 0));
                self.at(read).states = Some(buffer);
                buffer
            });
            deps.extend(staged.map(|s| after(s.task)));
            deps.extend(old.map(|s| after(s.task)));
            let update = self.add(
                TaskKind::Update(section, index),
                Lane::Cpu,
                part.elements,
                deps,
            );
            if gated {
                self.at(update).window = Window::Norm;
            }
            self.at(update).slab = slab;
            self.at(update).states = staged;
            self.at(update).param = old;
            updates.push(update);
            let write = staged.map(|buffer| {
                let kind = TaskKind::WriteOptim(section, index);
                let write = self.add(
                    kind,
                    Lane::DiskWrite,
                    self.placement.optim_bytes(part),
                    vec![after(update)],
                );
                self.at(write).states = Some(buffer);
                self.at(write).frees.push(buffer);
                write
            });
            states.push((staged.map(|s| s.task), write));
        }
        self.settle(section, [slab, old], ready, &updates);
        let progress = self.progress(section);
        progress.updates = updates;
        progress.states = states;
    }

    /// Reads the parameters of which an update makes new ones.
    fn old_params(&mut self, section: SectionId, ready: Option<Dep>) -> ClaimRef {
        let before = self.progress(section).read.map(after);
        let deps = before.into_iter().chain(ready).collect();
        let bytes = self.bytes(section);
        let read = self.add(TaskKind::ReadParam(section), Lane::DiskRead, bytes, deps);
        let slab = self.claim(read, self.placement.pool(PoolKind::ParamStage, section));
        self.at(read).slab = Some(slab);
        slab
    }

    /// Updates the parts of a section on the device, where its gradient waits in its own place.
    fn updates_on_device(&mut self, section: SectionId, ready: Option<Dep>) {
        for (index, part) in (0..).zip(self.placement.parts(section).to_vec()) {
            let kind = TaskKind::Update(section, index);
            let deps = ready.into_iter().collect();
            let update = self.add(kind, Lane::Update, part.elements, deps);
            self.progress(section).updates.push(update);
        }
    }

    fn settle(
        &mut self,
        section: SectionId,
        [slab, old]: [Option<ClaimRef>; 2],
        ready: Option<Dep>,
        updates: &[TaskId],
    ) {
        // An update that may be undone does not show elsewhere before the norm.
        let mut deps: Vec<Dep> = updates.iter().copied().map(after).chain(ready).collect();
        if self.delayed() {
            deps.extend(self.read_through(section));
        }
        let bytes = self.bytes(section);
        let settled = match self.placement.param_home(section) {
            Tier::Device => self.add(TaskKind::PushParam(section), Lane::H2d, bytes, deps),
            Tier::Disk => self.add(TaskKind::WriteParam(section), Lane::DiskWrite, bytes, deps),
            Tier::Pinned if self.delayed() => {
                self.add(TaskKind::SwapParam(section), Lane::Cpu, 0, deps)
            }
            Tier::Pinned => {
                // The last update frees the gradient; with several parts they may end in any
                // order, so each but the last one comes before the last.
                if let (Some(slab), Some((last, before))) = (slab, updates.split_last()) {
                    let before: Vec<Dep> = before.iter().copied().map(after).collect();
                    self.at(*last).deps.extend(before);
                    self.at(*last).frees.push(slab);
                }
                return;
            }
        };
        self.at(settled).slab = old.or(slab);
        self.at(settled).frees.extend(slab.into_iter().chain(old));
        self.progress(section).settled = Some(settled);
    }

    /// The sections that wait for the norm, in the order in which the next forward needs them.
    fn norm_and_updates(&mut self) {
        let norms = self
            .sections
            .iter()
            .filter_map(|p| p.norm)
            .map(after)
            .collect();
        let norm = self.add(TaskKind::Norm, Lane::Cpu, 0, norms);
        self.norm = Some(norm);
        if self.delayed() {
            return;
        }
        let mut waiting: Vec<SectionId> = (0..self.model.sections.len() as u32)
            .map(SectionId)
            .filter(|s| self.sections[s.0 as usize].norm.is_some())
            .filter(|s| self.placement.grad_home(*s) != GradHome::Passing)
            .collect();
        waiting.sort_by_key(|s| self.model.first_use(*s));
        for section in waiting {
            let mut ready = after(norm);
            if self.placement.grad_home(section) == GradHome::Device {
                self.updates_on_device(section, Some(ready));
                continue;
            }
            if let Some(spill) = self.progress(section).spill {
                let deps = vec![after(spill), after(norm)];
                ready = after(self.read_grad(section, deps));
            }
            self.updates(section, Some(ready));
        }
    }

    fn commit(&mut self) {
        let ends = |t: &Task| {
            matches!(
                t.kind,
                TaskKind::Norm
                    | TaskKind::Update(..)
                    | TaskKind::WriteOptim(..)
                    | TaskKind::WriteParam(_)
                    | TaskKind::PushParam(_)
                    | TaskKind::SwapParam(_)
            )
        };
        let tasks = (0..).map(TaskId).zip(&self.tasks);
        let deps = tasks
            .filter(|(_, t)| ends(t))
            .map(|(id, _)| after(id))
            .collect();
        self.commit = Some(self.add(TaskKind::Commit, Lane::Cpu, 0, deps));
    }

    /// What the step before must have done. Its tasks have the same ids.
    fn link_steps(&mut self) {
        if self.delayed() {
            self.link_waiting();
        }
        let immediate = self.placement.options().timing == Timing::Immediate;
        let (norm, commit) = (self.norm, self.commit);
        for progress in self.sections.clone() {
            // A fetch may run ahead of the stage that reads in place, and the other way round.
            let read = progress.first.is_some() || progress.mapped.is_some();
            // One that no stage reads is first met where its gradient begins.
            let begins = progress.grad_slot.filter(|_| !read).map(|slot| slot.task);
            for first in [progress.first, progress.mapped, begins]
                .into_iter()
                .flatten()
            {
                let on_device = self.at(first).lane.on_device();
                let settled = progress.settled.map(|task| {
                    let pushed = matches!(self.at(task).kind, TaskKind::PushParam(_));
                    if pushed && on_device {
                        issued(task)
                    } else {
                        after(task)
                    }
                });
                let update = |task: TaskId| {
                    if on_device && self.tasks[task.0 as usize].lane.on_device() {
                        issued(task)
                    } else {
                        after(task)
                    }
                };
                let updates = settled.map_or_else(
                    || progress.updates.iter().copied().map(update).collect(),
                    |s| vec![s],
                );
                // Until the norm, an update may be undone; not one that waited for it in the step before.
                let may = !progress.updates.is_empty() && !self.delayed();
                let undone = norm.filter(|_| may).map(after);
                let deps = updates.into_iter().chain(undone).map(previous);
                self.at(first).deps.extend(deps.collect::<Vec<_>>());
            }
            for (read, write) in &progress.states {
                if let (Some(read), Some(write)) = (read, write) {
                    let undone = norm.filter(|_| immediate).map(after);
                    let deps = undone.into_iter().chain([after(*write)]).map(previous);
                    self.at(*read).deps.extend(deps);
                }
            }
        }
        for index in 0..self.tasks.len() {
            let task = &mut self.tasks[index];
            // Old extents stand until the step before is committed.
            let writes = matches!(
                task.kind,
                TaskKind::WriteOptim(..) | TaskKind::WriteParam(_)
            );
            if let (true, true, Some(commit)) = (immediate, writes, commit) {
                task.deps.push(previous(after(commit)));
            }
        }
    }

    fn finish(self) -> Plan {
        let options = self.placement.options();
        let forward_stages = self
            .stages
            .iter()
            .position(|s| !s.grads.is_empty())
            .unwrap_or(self.stages.len());
        Plan {
            tasks: self.tasks,
            stages: self.uses,
            pools: self.placement.pools(),
            lookahead: options.lookahead,
            timing: options.timing,
            forward_stages,
            staged_updates: self.staged_updates,
            norm: self.norm,
            undo_buffers: self.placement.undo_buffers(),
        }
    }
}

/// Whether a stage reads a section in pinned memory.
pub(crate) fn in_place(stage: &StageSpec, placement: &Placement, section: SectionId) -> bool {
    placement.param_home(section) == Tier::Pinned && stage.gathers.contains(&section)
}
