//! What each worker of the CPU optimizer did, from the optimizer's thread to the trace.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;
use forebay_kernels::cpu::{Shift, Workers};
use forebay_prefetch::{Plan, TaskKind, TaskRef};

/// Room for so many times what the updates of a step need: two steps may be open, and updates may be made twice.
const STEPS: usize = 4;

/// One worker's part of an update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Worker {
    pub(super) task: TaskRef,
    pub(super) shift: Shift,
}

/// Written without a lock or an allocation, read when the trace is. What finds no room is counted.
#[derive(Debug)]
pub(in super::super) struct Shifts {
    queue: ArrayQueue<Worker>,
    lost: AtomicU64,
}

impl Shifts {
    /// Has the workers note what they do.
    pub(in super::super) fn new(workers: &Workers, plan: &Plan) -> Self {
        workers.watch();
        let update = |kind: &TaskKind| matches!(kind, TaskKind::Update(..));
        let updates = plan
            .tasks()
            .iter()
            .filter(|task| update(&task.kind))
            .count();
        Self {
            queue: ArrayQueue::new(STEPS * workers.threads() * updates.max(1)),
            lost: AtomicU64::new(0),
        }
    }

    /// Takes over what the workers noted, for this task.
    pub(in super::super) fn note(&self, workers: &Workers, task: TaskRef) {
        workers.shifts(|shift| {
            if self.queue.push(Worker { task, shift }).is_err() {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    pub(super) fn next(&self) -> Option<Worker> {
        self.queue.pop()
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}
