//! The state machine that walks a plan: told what completed, it answers what to start.
//!
//! Why it cannot deadlock: the tasks of a step stand in an order in which the step could run one
//! by one; each lane starts its first *ready* task in that order; each pool grants its buffers in
//! that order. So the earliest unfinished task always finds its dependencies complete, its lane
//! free in time, and its pools with what they would hold had everything before it run alone.

mod let_go;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::model::StageId;
use crate::plan::{ClaimRef, LANES, Lane, Order, Plan, PoolId, TaskId, TaskKind, Window};
pub use let_go::LetGo;

/// A task of a certain step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskRef {
    /// The step, counted by [`Scheduler::begin_step`] from 0.
    pub step: u64,
    /// The task.
    pub id: TaskId,
}

/// Steps that may be open at once: one finishing its updates, one in compute.
const OPEN_STEPS: usize = 2;

/// Tasks that may be started and unfinished at once, by lane. Device lanes run ahead by events;
/// disks want depth; the optimizer wants its next piece at hand.
const IN_FLIGHT: [usize; LANES.len()] = [usize::MAX, 8, 8, 16, 16, 2, usize::MAX];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Waiting,
    Ready,
    Started,
    Issued,
    Done,
}

#[derive(Debug)]
struct Instance {
    step: u64,
    status: Vec<Status>,
    /// Dependencies that do not hold yet.
    missing: Vec<u32>,
    /// Per claim of the plan, the buffer granted.
    buffers: Vec<u32>,
    /// When each task was issued and done; 0: not yet.
    times: Vec<[u64; 2]>,
    let_go: Vec<Option<LetGo>>,
    begun: u64,
    left: usize,
}

/// An edge from a task to one that comes after it.
#[derive(Clone, Copy, Debug)]
struct Successor {
    task: TaskId,
    order: Order,
}

#[derive(Debug)]
struct PoolState {
    free: Vec<bool>,
    /// Claiming tasks in plan order, once per claim.
    claimants: Vec<TaskId>,
    /// The claim to grant next: step, and position among the claimants.
    next: (u64, usize),
    /// What freed each buffer last, and what let the last claimant go.
    freed: Vec<Option<LetGo>>,
    turn: Option<LetGo>,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    plan: Arc<Plan>,
    same_step: Vec<Vec<Successor>>,
    next_step: Vec<Vec<Successor>>,
    first_claim: Vec<u32>,
    open: VecDeque<Instance>,
    /// The one that was open last comes last: it is looked at until it is used again.
    spare: VecDeque<Instance>,
    begun: u64,
    pools: Vec<PoolState>,
    ready: [Vec<TaskRef>; LANES.len()],
    in_flight: [usize; LANES.len()],
    /// Compute stages done, over all steps: the position look-ahead is measured from.
    cursor: u64,
    /// Updates from disk done, over all steps.
    updated: u64,
    /// What is told is counted, and that is the time.
    now: u64,
    /// What ended each stage, and each update from disk, of the last steps: by their number in all steps.
    moved_on: [Vec<Option<LetGo>>; 2],
    /// By lane: the last task that ended while no other could start.
    made_room: [Option<LetGo>; LANES.len()],
}

impl Scheduler {
    /// A machine at the start of its first step. Allocates everything it will ever need.
    pub fn new(plan: Arc<Plan>) -> Self {
        let count = plan.tasks().len();
        let mut same_step = vec![Vec::new(); count];
        let mut next_step = vec![Vec::new(); count];
        let mut first_claim = Vec::with_capacity(count);
        let mut claims = 0;
        let mut pools: Vec<PoolState> = plan
            .pools()
            .iter()
            .map(|p| PoolState {
                free: vec![true; p.buffers as usize],
                claimants: Vec::new(),
                next: (0, 0),
                freed: vec![None; p.buffers as usize],
                turn: None,
            })
            .collect();
        for (id, task) in (0..).map(TaskId).zip(plan.tasks()) {
            for dep in &task.deps {
                let list = if dep.previous_step {
                    &mut next_step
                } else {
                    &mut same_step
                };
                list[dep.task.0 as usize].push(Successor {
                    task: id,
                    order: dep.order,
                });
            }
            first_claim.push(claims);
            claims += task.claims.len() as u32;
            for pool in &task.claims {
                pools[pool.0 as usize].claimants.push(id);
            }
        }
        let instance = || Instance {
            step: u64::MAX,
            status: vec![Status::Waiting; count],
            missing: vec![0; count],
            buffers: vec![u32::MAX; claims as usize],
            times: vec![[0; 2]; count],
            let_go: vec![None; count],
            begun: 0,
            left: 0,
        };
        let kept = |each: usize| vec![None; OPEN_STEPS * each.max(1)];
        let moved_on = [
            kept(plan.stages().len()),
            kept(plan.staged_updates as usize),
        ];
        Self {
            same_step,
            next_step,
            first_claim,
            open: VecDeque::with_capacity(OPEN_STEPS),
            spare: (0..OPEN_STEPS).map(|_| instance()).collect(),
            begun: 0,
            pools,
            ready: LANES.map(|_| Vec::with_capacity(OPEN_STEPS * count)),
            in_flight: [0; LANES.len()],
            cursor: 0,
            updated: 0,
            now: 0,
            moved_on,
            made_room: [None; LANES.len()],
            plan,
        }
    }

    /// The plan it walks.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Whether another step may begin.
    pub fn can_begin(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Opens the next step and returns its number.
    ///
    /// # Panics
    /// Unless [`Scheduler::can_begin`].
    pub fn begin_step(&mut self) -> u64 {
        let mut instance = self
            .spare
            .pop_front()
            .expect("as many steps are open as may be");
        let step = self.begun;
        self.begun += 1;
        instance.step = step;
        instance.left = self.plan.tasks().len();
        instance.begun = self.now;
        instance.buffers.fill(u32::MAX);
        instance.times.fill([0; 2]);
        instance.let_go.fill(None);
        let previous = self.open.back();
        for (index, task) in self.plan.tasks().iter().enumerate() {
            let holds = |dep: &&crate::plan::Dep| {
                let status = match previous {
                    Some(previous) => previous.status[dep.task.0 as usize],
                    None => Status::Done,
                };
                dep.previous_step && satisfied(status, dep.order)
            };
            let held = task.deps.iter().filter(holds).count();
            instance.missing[index] = (task.deps.len() - held) as u32;
            instance.status[index] = Status::Waiting;
        }
        self.open.push_back(instance);
        for index in 0..self.plan.tasks().len() {
            self.ready_if(TaskRef {
                step,
                id: TaskId(index as u32),
            });
        }
        step
    }

    /// The next task that may start now; `None` until something completes. Compute tasks start
    /// through [`Scheduler::try_start_compute`] alone.
    #[expect(
        clippy::should_implement_trait,
        reason = "it is a machine to poll, not a sequence"
    )]
    pub fn next(&mut self) -> Option<TaskRef> {
        for lane in LANES.into_iter().filter(|l| *l != Lane::Compute) {
            if self.in_flight[lane as usize] >= IN_FLIGHT[lane as usize] {
                continue;
            }
            let may = |task: &&TaskRef| self.in_window(**task) && self.can_claim(**task);
            let found = self.ready[lane as usize].iter().find(may).copied();
            if let Some(task) = found {
                self.start(task);
                return Some(task);
            }
        }
        None
    }

    /// An update in pinned memory that may start before the norm of its step is known, if one can: of those
    /// whose gradients are whole the one that the next forward pass needs first. Whoever starts it keeps
    /// what it overwrites until the norm is done, and has made good for it by then: what the norm does to
    /// a gradient (clipping, skipping the step) came too late for it.
    pub fn next_ahead(&mut self) -> Option<TaskRef> {
        let lane = Lane::Cpu as usize;
        if self.in_flight[lane] >= IN_FLIGHT[lane] {
            return None;
        }
        let gated = |task: &&TaskRef| {
            let spec = self.plan.task(task.id);
            spec.window == Window::Norm && !self.in_window(**task)
        };
        let task = self.ready[lane].iter().find(gated).copied()?;
        self.start(task);
        Some(task)
    }

    /// Starts a stage of the newest step if everything it needs is there.
    pub fn try_start_compute(&mut self, stage: StageId) -> Option<TaskRef> {
        let id = self.plan.stages()[stage.0 as usize].task?;
        let task = TaskRef {
            step: self.begun.checked_sub(1)?,
            id,
        };
        if self.status(task) != Status::Ready || !self.can_claim(task) {
            return None;
        }
        self.start(task);
        Some(task)
    }

    /// Told by the driver: the work of a task on a device lane is in its stream.
    pub fn issued(&mut self, task: TaskRef) {
        self.set(task, Status::Issued);
        self.note(task, Order::Issued);
        self.advance(task, Order::Issued);
    }

    /// Told by the driver: a task is complete. Its buffers return to their pools.
    pub fn done(&mut self, task: TaskRef) {
        let was = self.status(task);
        self.set(task, Status::Done);
        let ended = Some(self.note(task, Order::Done));
        let plan = Arc::clone(&self.plan);
        let spec = plan.task(task.id);
        let lane = spec.lane as usize;
        if self.in_flight[lane] == IN_FLIGHT[lane] {
            self.made_room[lane] = ended;
        }
        self.in_flight[lane] -= 1;
        for &claim in &spec.frees {
            let pool = plan.task(claim.task).claims[claim.claim as usize];
            let buffer = self.buffer(task.step, claim);
            let pool = &mut self.pools[pool.0 as usize];
            pool.free[buffer as usize] = true;
            pool.freed[buffer as usize] = ended;
        }
        let [stages, updates] = &mut self.moved_on;
        match spec.kind {
            TaskKind::Compute(_) => let_go::count(&mut self.cursor, stages, ended),
            TaskKind::WriteOptim(..) => let_go::count(&mut self.updated, updates, ended),
            _ => {}
        }
        if was != Status::Issued {
            self.advance(task, Order::Issued);
        }
        self.advance(task, Order::Done);
        self.instance_mut(task.step).left -= 1;
        while self.open.front().is_some_and(|i| i.left == 0) {
            // The step after has taken note of all of its tasks by now.
            self.spare.extend(self.open.pop_front());
        }
    }

    /// The buffer that a claim of an open step was granted.
    ///
    /// # Panics
    /// If the claiming task has not started.
    pub fn buffer(&self, step: u64, claim: ClaimRef) -> u32 {
        let index = self.first_claim[claim.task.0 as usize] + claim.claim;
        let buffer = self.instance(step).buffers[index as usize];
        assert_ne!(
            buffer,
            u32::MAX,
            "a buffer was asked for before its task started"
        );
        buffer
    }

    /// The tasks that come before `task` on the device and are issued but not done: the driver
    /// makes the stream wait for them.
    pub fn unfinished_deps(&self, task: TaskRef) -> impl Iterator<Item = TaskRef> {
        self.plan.task(task.id).deps.iter().filter_map(move |dep| {
            let step = task.step.checked_sub(u64::from(dep.previous_step))?;
            let earlier = TaskRef { step, id: dep.task };
            (self.is_open(step) && self.status(earlier) == Status::Issued).then_some(earlier)
        })
    }

    /// Whether a task is complete.
    pub fn is_done(&self, task: TaskRef) -> bool {
        !self.is_open(task.step) && task.step < self.begun
            || self.is_open(task.step) && self.status(task) == Status::Done
    }

    /// Whether every task of every step begun is complete.
    pub fn idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Buffers of a pool that are taken.
    pub fn taken(&self, pool: PoolId) -> usize {
        self.pools[pool.0 as usize]
            .free
            .iter()
            .filter(|f| !**f)
            .count()
    }

    fn start(&mut self, task: TaskRef) {
        let plan = Arc::clone(&self.plan);
        let spec = plan.task(task.id);
        let let_go = self.find_let_go(task, spec);
        self.instance_mut(task.step).let_go[task.id.0 as usize] = let_go;
        for (index, pool) in spec.claims.iter().enumerate() {
            let pool = &mut self.pools[pool.0 as usize];
            let buffer = pool
                .free
                .iter()
                .position(|f| *f)
                .expect("checked by can_claim");
            pool.free[buffer] = false;
            pool.turn = let_go;
            pool.next.1 += 1;
            if pool.next.1 == pool.claimants.len() {
                pool.next = (pool.next.0 + 1, 0);
            }
            let claim = self.first_claim[task.id.0 as usize] as usize + index;
            self.instance_mut(task.step).buffers[claim] = buffer as u32;
        }
        let ready = &mut self.ready[spec.lane as usize];
        if let Ok(position) = ready.binary_search(&task) {
            ready.remove(position);
        }
        self.in_flight[spec.lane as usize] += 1;
        self.set(task, Status::Started);
    }

    fn in_window(&self, task: TaskRef) -> bool {
        let [stages, updates] = self.must_have_moved(task);
        stages <= self.cursor
            && updates <= self.updated
            && self
                .gate(task)
                .is_none_or(|norm| self.status(norm) == Status::Done)
    }

    /// How many stages and updates from disk must be done before a task is in its window.
    fn must_have_moved(&self, task: TaskRef) -> [u64; 2] {
        let ahead = u64::from(self.plan.lookahead);
        let stages = self.plan.stages().len() as u64;
        let stage = |id: StageId| task.step * stages + u64::from(id.0);
        match self.plan.task(task.id).window {
            Window::Open | Window::Norm => [0, 0],
            Window::Fetch(id) => [stage(id).saturating_sub(ahead), 0],
            Window::Read(id) => [stage(id).saturating_sub(ahead + ahead.min(1)), 0],
            Window::Update(n) => {
                let update = task.step * u64::from(self.plan.staged_updates) + u64::from(n);
                [0, update.saturating_sub(ahead)]
            }
        }
    }

    /// The norm that must be known before a task is in its window.
    fn gate(&self, task: TaskRef) -> Option<TaskRef> {
        let step = task.step;
        let gated = self.plan.task(task.id).window == Window::Norm;
        self.plan
            .norm
            .filter(|_| gated)
            .map(|id| TaskRef { step, id })
    }

    /// Whether it is the turn of all of a task's claims, and buffers are there.
    fn can_claim(&self, task: TaskRef) -> bool {
        let claims = &self.plan.task(task.id).claims;
        claims.iter().enumerate().all(|(index, id)| {
            let earlier = claims[..index].iter().filter(|c| *c == id).count();
            let pool = &self.pools[id.0 as usize];
            // A task's claims on one pool stand one after the other.
            let turn = pool.next.0 == task.step && pool.claimants[pool.next.1] == task.id;
            turn && pool.free.iter().filter(|f| **f).count() > earlier
        })
    }

    fn ready_if(&mut self, task: TaskRef) {
        let instance = self.instance_mut(task.step);
        let index = task.id.0 as usize;
        if instance.missing[index] == 0 && instance.status[index] == Status::Waiting {
            instance.status[index] = Status::Ready;
            let ready = &mut self.ready[self.plan.task(task.id).lane as usize];
            let position = ready.partition_point(|t| *t < task);
            ready.insert(position, task);
        }
    }

    /// Lets the successors of a task know.
    fn advance(&mut self, task: TaskRef, order: Order) {
        for same in [true, false] {
            let step = task.step + u64::from(!same);
            if !self.is_open(step) {
                continue;
            }
            let count = self.successors(same, task.id).len();
            for index in 0..count {
                let successor = self.successors(same, task.id)[index];
                if successor.order == order {
                    self.instance_mut(step).missing[successor.task.0 as usize] -= 1;
                    self.ready_if(TaskRef {
                        step,
                        id: successor.task,
                    });
                }
            }
        }
    }

    fn successors(&self, same_step: bool, id: TaskId) -> &[Successor] {
        let lists = if same_step {
            &self.same_step
        } else {
            &self.next_step
        };
        &lists[id.0 as usize]
    }

    fn is_open(&self, step: u64) -> bool {
        self.open.iter().any(|i| i.step == step)
    }

    fn status(&self, task: TaskRef) -> Status {
        self.instance(task.step).status[task.id.0 as usize]
    }

    fn set(&mut self, task: TaskRef, status: Status) {
        self.instance_mut(task.step).status[task.id.0 as usize] = status;
    }

    fn instance(&self, step: u64) -> &Instance {
        self.open
            .iter()
            .find(|i| i.step == step)
            .expect("the step is open")
    }

    fn instance_mut(&mut self, step: u64) -> &mut Instance {
        self.open
            .iter_mut()
            .find(|i| i.step == step)
            .expect("the step is open")
    }
}

fn satisfied(status: Status, order: Order) -> bool {
    match order {
        Order::Issued => matches!(status, Status::Issued | Status::Done),
        Order::Done => status == Status::Done,
    }
}
