//! A driver with a clock of its own: each lane does one thing at a time, at a given rate.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use crate::bound::Rates;
use crate::model::StageId;
use crate::plan::{LANES, Lane, Plan, TaskKind};
use crate::scheduler::{Scheduler, TaskRef};

/// One task as it ran.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimEvent {
    /// Which.
    pub task: TaskRef,
    /// Its work.
    pub kind: TaskKind,
    /// Seconds from the start of the run.
    pub start: f64,
    /// Seconds from the start of the run.
    pub end: f64,
}

/// What a simulated run showed.
#[derive(Clone, Debug)]
pub struct SimReport {
    /// The plan that ran.
    pub plan: Arc<Plan>,
    /// Seconds a step takes once the pipeline is full: the mean over the second half.
    pub step_seconds: f64,
    /// Seconds that each lane worked in a mean step, in the order of [`LANES`].
    pub busy: [f64; LANES.len()],
    /// The most buffers of each pool in use at once.
    pub peaks: Vec<usize>,
    /// Every task, in order of completion.
    pub trace: Vec<SimEvent>,
}

/// Time in whole nanoseconds, so that it orders.
type Nanos = u64;

struct Simulation<'a> {
    scheduler: Scheduler,
    rates: &'a Rates,
    now: Nanos,
    /// When each server is free: one a lane, but one for both directions of the disk, and one for all
    /// that runs on the compute stream.
    free: [Nanos; LANES.len()],
    ends: HashMap<TaskRef, (Nanos, Nanos)>,
    running: BinaryHeap<Reverse<(Nanos, TaskRef)>>,
    /// State of a small generator that stretches tasks; 0 for none.
    jitter: u64,
    trace: Vec<SimEvent>,
    busy: [Nanos; LANES.len()],
    peaks: Vec<usize>,
    /// Updates that began before the norm of their step, which is still to come.
    ahead: u64,
}

/// Runs `steps` steps, none of whose gradients is clipped or skipped: updates run before the norm as far as
/// the plan has buffers to undo them. A `seed` other than 0 stretches every task by up to 30 %, so that orders of
/// completion vary; equal seeds give equal traces.
///
/// # Panics
/// If the plan cannot go on: a fault of the plan, which tests look for.
pub fn simulate(plan: Arc<Plan>, rates: &Rates, steps: u64, seed: u64) -> SimReport {
    let mut simulation = Simulation {
        peaks: vec![0; plan.pools().len()],
        scheduler: Scheduler::new(Arc::clone(&plan)),
        rates,
        now: 0,
        free: [0; LANES.len()],
        ends: HashMap::new(),
        running: BinaryHeap::new(),
        jitter: seed,
        trace: Vec::new(),
        busy: [0; LANES.len()],
        ahead: 0,
    };
    let mut step_ends = Vec::new();
    for _ in 0..steps {
        while !simulation.scheduler.can_begin() {
            simulation.turn();
        }
        simulation.scheduler.begin_step();
        for stage in 0..plan.stages().len() {
            simulation.enter(StageId(stage as u32));
        }
        // The trainer waits for the loss: here, for the end of the forward pass.
        step_ends.push(simulation.free[Lane::Compute as usize]);
    }
    while !simulation.scheduler.idle() {
        simulation.turn();
    }
    let half = step_ends.len() / 2;
    let spans = (step_ends.len() - 1 - half).max(1) as f64;
    let last = step_ends.last().copied().unwrap_or(0);
    SimReport {
        plan,
        step_seconds: (last - step_ends[half.min(step_ends.len() - 1)]) as f64 / 1e9 / spans,
        busy: simulation
            .busy
            .map(|b| b as f64 / 1e9 / steps.max(1) as f64),
        peaks: simulation.peaks,
        trace: simulation.trace,
    }
}

impl Simulation<'_> {
    fn enter(&mut self, stage: StageId) {
        loop {
            self.start_all();
            if let Some(task) = self.scheduler.try_start_compute(stage) {
                self.begin(task);
                return;
            }
            self.turn();
        }
    }

    fn start_all(&mut self) {
        while let Some(task) = self.scheduler.next() {
            self.begin(task);
        }
        while self.ahead < self.scheduler.plan().undo_buffers() {
            let Some(task) = self.scheduler.next_ahead() else {
                break;
            };
            self.ahead += 1;
            let amount = self.scheduler.plan().task(task.id).amount as f64;
            self.run(task, amount / self.rates.cpu_ahead);
        }
        for (index, peak) in self.peaks.iter_mut().enumerate() {
            *peak = (*peak).max(self.scheduler.taken(crate::plan::PoolId(index as u32)));
        }
    }

    /// Starts what can start and lets time pass until the next completion.
    fn turn(&mut self) {
        self.start_all();
        let Reverse((end, task)) = self
            .running
            .pop()
            .expect("nothing runs and nothing can start");
        self.now = end;
        self.scheduler.done(task);
        if Some(task.id) == self.scheduler.plan().norm {
            self.ahead = 0;
        }
        if let Some((start, end)) = self.ends.remove(&task) {
            let kind = self.scheduler.plan().task(task.id).kind;
            let seconds = |t: Nanos| t as f64 / 1e9;
            self.trace.push(SimEvent {
                task,
                kind,
                start: seconds(start),
                end: seconds(end),
            });
        }
    }

    fn begin(&mut self, task: TaskRef) {
        let index = task.id.0 as usize;
        let seconds = self.rates.seconds(self.scheduler.plan(), index);
        self.run(task, seconds);
    }

    fn run(&mut self, task: TaskRef, seconds: f64) {
        let lane = self.scheduler.plan().task(task.id).lane;
        let server = match lane {
            Lane::DiskWrite => Lane::DiskRead,
            Lane::Update => Lane::Compute,
            lane => lane,
        } as usize;
        // On the device an event orders it behind what is issued and not done.
        let after = self
            .scheduler
            .unfinished_deps(task)
            .filter_map(|d| self.ends.get(&d));
        let ready = after.map(|e| e.1).max().unwrap_or(0).max(self.now);
        let length = (seconds * self.stretch() * 1e9).round() as Nanos;
        let start = ready.max(self.free[server]);
        // At rates next to nothing there is no end.
        let end = start.saturating_add(length);
        self.free[server] = end;
        let busy = &mut self.busy[lane as usize];
        *busy = busy.saturating_add(length);
        self.ends.insert(task, (start, end));
        self.running.push(Reverse((end, task)));
        if lane.on_device() {
            self.scheduler.issued(task);
        }
    }

    fn stretch(&mut self) -> f64 {
        if self.jitter == 0 {
            return 1.0;
        }
        // Xorshift: enough to shake up the order of completions.
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        1.0 + 0.3 * (self.jitter % 1000) as f64 / 1000.0
    }
}
