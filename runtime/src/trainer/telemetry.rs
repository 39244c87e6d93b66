//! What a run did: bytes by hop, time by lane and stage.

use std::time::{Duration, Instant};

use forebay_prefetch::{LANES, Plan, Task, TaskKind};

/// Counters of a trainer's training steps.
#[derive(Debug)]
pub(super) struct Telemetry {
    /// Bytes (or elements) moved, by lane.
    pub(super) moved: [u64; LANES.len()],
    /// Seconds of compute, by stage: of the first step, in which much is done for the first time, and
    /// summed over the others.
    stage_seconds: [Vec<f64>; 2],
    /// When each step's end was seen, kept as sums: the time between ends.
    pub(super) step_seconds: Vec<f64>,
    last_end: Option<Instant>,
    compute_seen: Duration,
    /// Stages computed, for the mean of `stage_seconds`.
    pub(super) steps: u64,
    passes: u64,
}

/// Steps whose times are kept.
const STEPS_KEPT: usize = 1 << 16;

impl Telemetry {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            moved: [0; LANES.len()],
            stage_seconds: [(); 2].map(|()| vec![0.0; plan.stages().len()]),
            step_seconds: Vec::with_capacity(STEPS_KEPT),
            last_end: None,
            compute_seen: Duration::ZERO,
            steps: 0,
            passes: 0,
        }
    }

    pub(super) fn begin_step(&mut self) {
        self.last_end.get_or_insert_with(Instant::now);
    }

    pub(super) fn end_step(&mut self, now: Instant) {
        if let Some(last) = self.last_end.replace(now)
            && self.step_seconds.len() < STEPS_KEPT
        {
            self.step_seconds.push((now - last).as_secs_f64());
        }
        self.steps += 1;
    }

    /// Time between steps that is not theirs: evaluation, publishing.
    pub(super) fn pause(&mut self, compute_busy: Duration) {
        self.last_end = None;
        self.compute_seen = compute_busy;
    }

    pub(super) fn end_pass(&mut self) {
        self.passes += 1;
    }

    pub(super) fn passes(&self) -> u64 {
        self.passes
    }

    pub(super) fn done(&mut self, step: u64, task: &Task, compute_busy: Duration) {
        self.moved[task.lane as usize] += task.amount;
        if let TaskKind::Compute(stage) = task.kind {
            let spent = compute_busy.saturating_sub(self.compute_seen);
            self.compute_seen = compute_busy;
            self.stage_seconds[usize::from(step > 0)][stage.0 as usize] += spent.as_secs_f64();
        }
    }

    /// Mean seconds of compute, by stage.
    pub(super) fn stage_means(&self) -> Vec<f64> {
        let [first, others] = &self.stage_seconds;
        match self.steps {
            0 | 1 => first.clone(),
            steps => others.iter().map(|s| s / (steps - 1) as f64).collect(),
        }
    }
}
