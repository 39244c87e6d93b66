//! Updates that run ahead of the norm.
//!
//! While the backward pass goes on, the optimizer's threads have nothing that is certain to do: the norm of
//! the whole gradient, and with it the clip factor, is known only at the end. But clipping is rare in most
//! of a training run. So sections whose gradients are whole are updated as if there were none, with a log of
//! what that overwrites. If the norm then says otherwise, the old states are brought back and updated anew: the
//! bits are those of a run that waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_pinned::Slab;
use forebay_prefetch::{SectionId, TaskKind, TaskRef};

use super::dry::Pass;
use super::engine::{Engine, Sign};
use super::options::Ahead;
use super::report::AheadReport;
use super::update::{PartPlace, StepScalars, Work};
use crate::queue::Seq;

/// An update that ran, or runs, before the norm of its step.
#[derive(Debug)]
struct Begun {
    task: TaskRef,
    section: SectionId,
    part: u32,
    scalars: StepScalars,
    kept: Slab,
    done: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct RunAhead {
    choice: Ahead,
    free: Vec<Slab>,
    begun: Vec<Begun>,
    clock: Arc<Clock>,
    judge: Judge,
    pub(super) report: AheadReport,
}

impl RunAhead {
    pub(super) fn new(choice: Ahead, slabs: Vec<Slab>) -> Self {
        Self {
            choice,
            begun: Vec::with_capacity(slabs.len()),
            free: slabs,
            clock: Arc::default(),
            judge: Judge::default(),
            report: AheadReport::default(),
        }
    }

    pub(super) fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.clock)
    }

    pub(super) fn any(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Whether something of it is still at work.
    pub(super) fn running(&self) -> bool {
        self.begun.iter().any(|begun| !begun.done)
    }

    /// A task is complete.
    pub(super) fn done(&mut self, task: TaskRef) {
        if let Some(begun) = self.begun.iter_mut().find(|begun| begun.task == task) {
            begun.done = true;
        }
    }

    /// The norm of the step is known: whether what ran ahead of it stands.
    pub(super) fn decided(&mut self, stands: bool) {
        self.report.steps += u64::from(self.any());
        self.report.undone += u64::from(self.any() && !stands);
        let elements = self.clock.ahead_elements.load(Ordering::Relaxed);
        self.judge.saw(stands, self.clock.late_seconds(elements));
    }

    /// All of it is as the norm says, after this time.
    pub(super) fn over(&mut self, stood: bool, took: Duration) {
        if !stood && self.any() {
            self.judge.lost = took.as_secs_f64();
        }
        self.free
            .extend(self.begun.drain(..).map(|begun| begun.kept));
        self.report.elements += self.clock.ahead_elements.swap(0, Ordering::Relaxed);
        self.report.left += self.clock.left.swap(0, Ordering::Relaxed);
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
    /// Of the step whose norm is to come.
    ahead_elements: AtomicU64,
    /// Pieces of those that are still to be updated.
    left: AtomicU64,
}

impl Clock {
    pub(super) fn add(&self, work: Work, elements: usize, left: usize, took: Duration) {
        let elements = elements as u64;
        match work {
            Work::Update => {
                let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                self.late_elements.fetch_add(elements, Ordering::Relaxed);
                self.late_ns.fetch_add(ns, Ordering::Relaxed);
            }
            Work::Ahead => {
                self.ahead_elements.fetch_add(elements, Ordering::Relaxed);
                self.left.fetch_add(left as u64, Ordering::Relaxed);
            }
            Work::Rest | Work::Again(_) => {}
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
        let may = self.pass == Pass::Train && self.resolving.is_none();
        while may && self.ahead.wanted() {
            let Some(task) = self.scheduler_mut().next_ahead() else {
                break;
            };
            any = true;
            let kind = self.scheduler().plan().task(task.id).kind;
            let TaskKind::Update(section, part) = kind else {
                unreachable!("only updates wait for the norm with what they need");
            };
            let kept = self.ahead.free.pop().expect("one is free");
            let place = self.place_ahead(task, section, part, &kept);
            let scalars = self.step_scalars(task.step);
            self.ahead.begun.push(Begun {
                task,
                section,
                part,
                scalars,
                kept,
                done: false,
            });
            let seq = self.queue_update(section, Work::Ahead, place, scalars);
            self.fly(task, Sign::Cpu(seq));
        }
        any
    }

    fn place_ahead(&self, task: TaskRef, section: SectionId, part: u32, kept: &Slab) -> PartPlace {
        let spec = self.scheduler().plan().task(task.id);
        let mut place = self.part_place(task, spec, section, part);
        // The gradient at the end, from the start of a line of the caches.
        let grad = (kept.len() - place.elements * place.dtype.bytes()) & !63;
        place.kept = Some((kept.address(), kept.address().wrapping_add(grad)));
        place
    }

    /// What ran ahead, done with as the norm says, in the order in which the next forward pass needs it: if it
    /// stands, what it left over is updated, and else it is taken back and updated anew. The last piece of
    /// that work.
    pub(super) fn make_good(&mut self, stands: bool) -> Option<Seq> {
        if stands && self.ahead.clock.left.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut last = None;
        self.ahead.begun.sort_unstable_by_key(|begun| begun.task);
        for index in 0..self.ahead.begun.len() {
            let begun = &self.ahead.begun[index];
            let (task, section, before) = (begun.task, begun.section, begun.scalars);
            let place = self.place_ahead(task, section, begun.part, &begun.kept);
            let work = if stands {
                Work::Rest
            } else {
                Work::Again(before)
            };
            let scalars = self.step_scalars(task.step);
            last = Some(self.queue_update(section, work, place, scalars));
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
