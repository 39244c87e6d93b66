//! What let a task go is what was told last before it could start, by a driver that tells one thing at a time.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use forebay_prefetch::*;

/// Tells the scheduler one thing at a time, in a seeded order, and looks after each what may start.
struct Teller {
    scheduler: Scheduler,
    /// Started: whether they are on the device and not issued yet.
    running: Vec<(TaskRef, bool)>,
    random: u64,
    /// What was told last, while nothing else happened since.
    last: Option<(TaskRef, Order)>,
    /// Tasks that started right after something was told, by their kind of window and what it was.
    seen: BTreeMap<(String, bool), u32>,
}

impl Teller {
    fn pick(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below as u64) as usize
    }

    fn run(&mut self, task: TaskRef) {
        let lane = self.scheduler.plan().task(task.id).lane;
        self.running.push((task, lane.on_device()));
    }

    fn drain(&mut self) {
        while let Some(task) = self.scheduler.next() {
            self.check(task);
            self.run(task);
        }
    }

    fn check(&mut self, task: TaskRef) {
        let let_go = self.scheduler.let_go(task);
        let Some((by, order)) = self.last else { return };
        let let_go = let_go.unwrap_or_else(|| panic!("{task:?} waited for {by:?}"));
        assert_eq!(
            let_go.at,
            self.scheduler.now(),
            "{task:?}: {let_go:?}, {by:?}"
        );
        assert_eq!((let_go.by, let_go.order), (by, order), "{task:?}");
        let window = format!("{:?}", self.scheduler.plan().task(task.id).window);
        let window = window.split('(').next().unwrap().to_owned();
        *self.seen.entry((window, order == Order::Done)).or_default() += 1;
    }

    /// Tells of the issue or the end of something that runs.
    fn tell(&mut self) {
        let index = self.pick(self.running.len());
        let (task, to_issue) = self.running[index];
        if to_issue {
            self.running[index].1 = false;
            self.scheduler.issued(task);
            self.last = Some((task, Order::Issued));
        } else {
            self.running.swap_remove(index);
            self.scheduler.done(task);
            self.last = Some((task, Order::Done));
        }
        self.drain();
    }

    fn enter(&mut self, stage: StageId) {
        // Nothing was told since the trainer came here.
        self.last = None;
        loop {
            if let Some(task) = self.scheduler.try_start_compute(stage) {
                self.check(task);
                self.last = None;
                self.run(task);
                self.drain();
                return;
            }
            self.tell();
        }
    }
}

#[test]
fn what_was_told_last_before_a_task_could_start_let_it_go() {
    let mut seen = BTreeMap::new();
    for (seed, policy) in (1..).zip([Policy::Auto, Policy::Pinned, Policy::Disk]) {
        for timing in [Timing::AfterNorm, Timing::Immediate] {
            // With more slots and slabs it is one's turn that comes last.
            for (gathers, more) in [(false, 0), (true, 0), (false, 3 * MIB), (true, 6 * MIB)] {
                let model = decoder(6, MIB, MIB / 2, seed % 2 == 0, 8192);
                let model = if gathers { gathering(model) } else { model };
                let options = options(policy, 2, timing);
                let mut budgets = least(&model, &options);
                budgets.device_bytes += more;
                budgets.pinned_bytes += 4 * more;
                let placement = place(&model, budgets, &options).unwrap();
                let plan = Arc::new(Plan::training(&model, &placement).unwrap());
                let stages = plan.stages().len() as u32;
                let mut teller = Teller {
                    scheduler: Scheduler::new(plan),
                    running: Vec::new(),
                    random: seed,
                    last: None,
                    seen: std::mem::take(&mut seen),
                };
                for _ in 0..5 {
                    while !teller.scheduler.can_begin() {
                        teller.tell();
                    }
                    teller.scheduler.begin_step();
                    teller.last = None;
                    teller.drain();
                    (0..stages).for_each(|stage| teller.enter(StageId(stage)));
                }
                while !teller.scheduler.idle() {
                    teller.tell();
                }
                seen = teller.seen;
            }
        }
    }
    // Each kind of wait was met: for a task, for one to be issued, and for each window.
    for window in ["Open", "Fetch", "Read", "Update", "Norm"] {
        let met = |done| seen.get(&(window.to_owned(), done)).copied().unwrap_or(0);
        assert!(met(true) > 20, "{window}: {seen:?}");
        assert!(window != "Open" || met(false) > 20, "{seen:?}");
    }
}
