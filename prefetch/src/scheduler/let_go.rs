//! Who waited for whom: what came last of all that a task waited for.

use super::{Instance, Scheduler, Status, TaskRef};
use crate::plan::{Order, Task};

/// What came last of all that a task waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LetGo {
    /// When: [`Scheduler::now`] then.
    pub at: u64,
    /// The task that let it go.
    pub by: TaskRef,
    /// By its end, or by being issued.
    pub order: Order,
}

impl Scheduler {
    /// The time: how often it was told of something.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// What came last of all that a task waited for before it started: the task before it, the buffer that it
    /// took, how far compute or the updates had come. `None`: nothing, since its step began. For tasks of open
    /// steps, and of the last one that ended.
    pub fn let_go(&self, task: TaskRef) -> Option<LetGo> {
        self.kept(task.step)?.let_go[task.id.0 as usize]
    }

    /// The same, for one that starts now.
    pub(super) fn find_let_go(&self, task: TaskRef, spec: &Task) -> Option<LetGo> {
        let mut let_go = self.waited_for(task);
        let later =
            |a: Option<LetGo>, b: Option<LetGo>| a.into_iter().chain(b).max_by_key(|l| l.at);
        for pool in &spec.claims {
            let pool = &self.pools[pool.0 as usize];
            let buffer = pool.free.iter().position(|f| *f);
            let_go = later(let_go, buffer.and_then(|buffer| pool.freed[buffer]));
            // Its turn came when the claimant before it had all that it waited for.
            let_go = later(let_go, pool.turn);
        }
        let begun = self.instance(task.step).begun;
        let_go.filter(|let_go| let_go.at > begun)
    }

    /// What came last of what a task waited for, buffers left out.
    fn waited_for(&self, task: TaskRef) -> Option<LetGo> {
        let spec = self.plan.task(task.id);
        let deps = spec.deps.iter().filter_map(|dep| {
            let step = task.step.checked_sub(u64::from(dep.previous_step))?;
            self.noted(TaskRef { step, id: dep.task }, dep.order)
        });
        // One that runs ahead did not wait for it.
        let gate = self
            .gate(task)
            .filter(|norm| self.status(*norm) == Status::Done);
        let gate = gate.and_then(|norm| self.noted(norm, Order::Done));
        let counted = [self.cursor, self.updated];
        let moved = self.must_have_moved(task).into_iter().zip(counted);
        let windows = moved.zip(&self.moved_on).filter_map(|((must, is), kept)| {
            let known = is.saturating_sub(must) < kept.len() as u64;
            let place = must.checked_sub(1).filter(|_| known)? as usize;
            kept[place % kept.len()]
        });
        let room = self.made_room[spec.lane as usize];
        let all = deps.chain(gate).chain(windows).chain(room);
        all.max_by_key(|let_go| let_go.at)
    }

    /// When a task was issued or done.
    fn noted(&self, by: TaskRef, order: Order) -> Option<LetGo> {
        let at = self.kept(by.step)?.times[by.id.0 as usize][order as usize];
        (at > 0).then_some(LetGo { at, by, order })
    }

    /// Takes note of when a task was issued or done: now.
    pub(super) fn note(&mut self, by: TaskRef, order: Order) -> LetGo {
        self.now += 1;
        let at = self.now;
        let times = &mut self.instance_mut(by.step).times[by.id.0 as usize];
        times[order as usize] = at;
        if times[Order::Issued as usize] == 0 {
            times[Order::Issued as usize] = at;
        }
        LetGo { at, by, order }
    }

    /// A step that is open, or the last one that ended: its room is not used again yet.
    fn kept(&self, step: u64) -> Option<&Instance> {
        let mut all = self.open.iter().chain(&self.spare);
        all.find(|instance| instance.step == step)
    }
}

/// One more of what windows look at.
pub(super) fn count(counted: &mut u64, kept: &mut [Option<LetGo>], by: Option<LetGo>) {
    let place = *counted as usize % kept.len();
    kept[place] = by;
    *counted += 1;
}
