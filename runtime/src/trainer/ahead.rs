//! Updates that run ahead of the norm.
//!
//! While the backward pass goes on, the optimizer's threads have nothing that is certain to do: the norm of
//! the whole gradient, and with it the clip factor, is known only at the end. But clipping is rare in most
//! of a training run. So sections whose gradients are whole are updated as if there were none, and what
//! that overwrites is kept until the norm is known. If it says otherwise, the old states are brought back and
//! updated anew: the bits are those of a run that waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_pinned::Slab;
use forebay_prefetch::{SectionId, TaskKind, TaskRef};

use super::dry::Pass;
use super::engine::{Engine, Sign};
use super::options::Ahead;
use super::update::Work;
use crate::queue::Seq;

/// An update that ran, or runs, before the norm of its step.
#[derive(Debug)]
struct Begun {
    task: TaskRef,
    section: SectionId,
    part: u32,
    kept: Slab,
    done: bool,
    /// The norm let it stand: what was kept is not needed.
    stands: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct RunAhead {
    choice: Ahead,
    free: Vec<Slab>,
    begun: Vec<Begun>,
    clock: Arc<Clock>,
    judge: Judge,
    /// Steps of which something ran ahead, and those of them that were undone.
    pub(super) steps: u64,
    pub(super) undone: u64,
}

impl RunAhead {
    pub(super) fn new(choice: Ahead, slabs: Vec<Slab>) -> Self {
        Self {
            choice,
            begun: Vec::with_capacity(slabs.len()),
            free: slabs,
            clock: Arc::default(),
            judge: Judge::default(),
            steps: 0,
            undone: 0,
        }
    }

    pub(super) fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.clock)
    }

    /// Whether anything is to be made good for.
    pub(super) fn any(&self) -> bool {
        self.begun.iter().any(|begun| !begun.stands)
    }

    /// Whether something of that is still at work.
    pub(super) fn running(&self) -> bool {
        self.begun.iter().any(|begun| !begun.stands && !begun.done)
    }

    /// A task is complete.
    pub(super) fn done(&mut self, task: TaskRef) {
        if let Some(begun) = self.begun.iter_mut().find(|begun| begun.task == task) {
            begun.done = true;
            self.release();
        }
    }

    /// The norm of the step is known: whether what ran ahead of it stands.
    pub(super) fn decided(&mut self, stands: bool) {
        let ahead = self.any();
        self.steps += u64::from(ahead);
        self.undone += u64::from(ahead && !stands);
        let elements = self.clock.ahead_elements.swap(0, Ordering::Relaxed);
        self.judge.saw(stands, self.clock.late_seconds(elements));
        if stands {
            self.begun.iter_mut().for_each(|begun| begun.stands = true);
            self.release();
        }
    }

    /// All is made good for, in this time.
    pub(super) fn undone(&mut self, took: Duration) {
        self.judge.lost = took.as_secs_f64();
        self.begun.iter_mut().for_each(|begun| begun.stands = true);
        self.release();
    }

    fn release(&mut self) {
        while let Some(over) = self.begun.iter().position(|b| b.done && b.stands) {
            self.free.push(self.begun.swap_remove(over).kept);
        }
    }

    fn wanted(&self) -> bool {
        !self.free.is_empty()
            && match self.choice {
                Ahead::Auto => self.judge.worth(),
                Ahead::Always => true,
                Ahead::Never => false,
            }
    }
}

/// What the optimizer's work took.
#[derive(Debug, Default)]
pub(super) struct Clock {
    late_elements: AtomicU64,
    late_ns: AtomicU64,
    ahead_elements: AtomicU64,
}

impl Clock {
    pub(super) fn add(&self, work: Work, elements: usize, took: Duration) {
        let elements = elements as u64;
        match work {
            Work::Update => {
                let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                self.late_elements.fetch_add(elements, Ordering::Relaxed);
                self.late_ns.fetch_add(ns, Ordering::Relaxed);
            }
            Work::Ahead => drop(self.ahead_elements.fetch_add(elements, Ordering::Relaxed)),
            Work::Again => {}
        }
    }

    /// What so many elements would have taken after the norm.
    fn late_seconds(&self, elements: u64) -> f64 {
        let per = self.late_ns.load(Ordering::Relaxed) as f64 / 1e9;
        elements as f64 * per / self.late_elements.load(Ordering::Relaxed).max(1) as f64
    }
}

/// Whether running ahead pays: what it gains in a step that stands against what it loses in one that does
/// not, by what steps showed.
#[derive(Debug, Default)]
struct Judge {
    /// The part of recent steps that would not have stood.
    risk: f64,
    /// Seconds.
    gained: f64,
    /// Seconds; none of which are known at first.
    lost: f64,
}

impl Judge {
    /// How much the newest step counts.
    const NEWEST: f64 = 1.0 / 8.0;
    /// What is lost beside what is gained, until it was seen: the states are written back and updated again,
    /// 24 and 28 bytes an element for 28.
    const LOST: f64 = 2.0;

    fn saw(&mut self, stands: bool, seconds: f64) {
        self.risk += Self::NEWEST * (f64::from(u8::from(!stands)) - self.risk);
        if seconds > 0.0 {
            self.gained = seconds;
        }
    }

    fn worth(&self) -> bool {
        let (gained, lost) = if self.gained > 0.0 && self.lost > 0.0 {
            (self.gained, self.lost)
        } else {
            (1.0, Self::LOST)
        };
        (1.0 - self.risk) * gained > self.risk * lost
    }
}

impl Engine {
    /// Starts updates whose norm is to come, as long as that pays and what they overwrite can be kept;
    /// whether one was started.
    pub(super) fn run_ahead(&mut self) -> bool {
        let mut any = false;
        let may = self.pass == Pass::Train && self.undoing.is_none();
        while may && self.ahead.wanted() {
            let Some(task) = self.scheduler_mut().next_ahead() else {
                break;
            };
            any = true;
            let plan = Arc::clone(self.scheduler().plan());
            let spec = plan.task(task.id);
            let TaskKind::Update(section, part) = spec.kind else {
                unreachable!("only updates wait for the norm with what they need");
            };
            let kept = self.ahead.free.pop().expect("one is free");
            let mut place = self.part_place(task, spec, section, part);
            place.kept = Some(kept.address());
            self.ahead.begun.push(Begun {
                task,
                section,
                part,
                kept,
                done: false,
                stands: false,
            });
            let scalars = self.step_scalars(task.step);
            let seq = self.queue_update(section, Work::Ahead, place, scalars);
            self.fly(task, Sign::Cpu(seq));
        }
        any
    }

    /// Takes back what ran ahead and updates it as the norm says, in the order in which the next forward pass
    /// needs it; the last piece of that work.
    pub(super) fn again(&mut self) -> Option<Seq> {
        let plan = Arc::clone(self.scheduler().plan());
        let mut last = None;
        self.ahead.begun.sort_by_key(|begun| begun.task);
        for index in 0..self.ahead.begun.len() {
            let begun = &self.ahead.begun[index];
            if begun.stands {
                continue;
            }
            let (task, section, part) = (begun.task, begun.section, begun.part);
            let kept = begun.kept.address();
            let mut place = self.part_place(task, plan.task(task.id), section, part);
            place.kept = Some(kept);
            let scalars = self.step_scalars(task.step);
            last = Some(self.queue_update(section, Work::Again, place, scalars));
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_ahead_ends_when_steps_are_undone_and_comes_back() {
        let mut judge = Judge::default();
        assert!(judge.worth(), "nothing is known against it");
        let fails = (0..).find(|_| {
            judge.saw(false, 0.1);
            judge.lost = 0.2;
            !judge.worth()
        });
        assert!((2..5).contains(&fails.unwrap_or(0)), "{fails:?}");
        let stands = (0..).find(|_| {
            judge.saw(true, 0.0);
            judge.worth()
        });
        assert!(stands.unwrap_or(99) < 5, "{stands:?}");
        // Where undoing costs little it goes on with more of it.
        judge.lost = 0.01;
        let fails = (0..40).find(|_| {
            judge.saw(false, 0.1);
            !judge.worth()
        });
        assert!(fails.unwrap_or(99) > 8, "{fails:?}");
    }
}
