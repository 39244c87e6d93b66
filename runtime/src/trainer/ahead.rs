//! Updates that run ahead of the norm.
//!
//! While the backward pass goes on, the optimizer's threads have nothing that is certain to do: the norm of
//! the whole gradient is known only at the end, and with it the clip factor, and whether the step counts at
//! all. But clipping is rare in most of a training run, and so are gradients that are not finite. So sections
//! whose gradients are whole are updated as if there were none, with a log of what that overwrites. If the norm then says otherwise, the old states are brought back and updated anew: the
//! bits are those of a run that waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_pinned::Slab;
use forebay_prefetch::{SectionId, TaskKind, TaskRef};

use super::engine::{Engine, Pass, Sign};
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
    kept: Kept,
    done: bool,
}

/// A slab for what an update overwrites.
#[derive(Debug)]
struct Kept {
    slab: Slab,
    /// Elements that the update left, for want of room in the log.
    left: Arc<AtomicU64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct RunAhead {
    choice: Ahead,
    free: Vec<Kept>,
    begun: Vec<Begun>,
    clock: Arc<Clock>,
    judge: Judge,
    pub(super) report: AheadReport,
}

impl Begun {
    fn left(&self) -> u64 {
        self.kept.left.load(Ordering::Relaxed)
    }
}

impl RunAhead {
    pub(super) fn new(choice: Ahead, slabs: Vec<Slab>) -> Self {
        Self {
            choice,
            begun: Vec::with_capacity(slabs.len()),
            free: slabs
                .into_iter()
                .map(|slab| Kept {
                    slab,
                    left: Arc::default(),
                })
                .collect(),
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
        self.judge.saw(stands);
    }

    /// All of it is as the norm says.
    pub(super) fn over(&mut self, stood: bool) {
        let Clock {
            ahead, again_ns, ..
        } = &*self.clock;
        let elements = ahead.swap(0, Ordering::Relaxed);
        let again = Duration::from_nanos(again_ns.swap(0, Ordering::Relaxed));
        let left: u64 = self.begun.iter().map(Begun::left).sum();
        if self.any() {
            let gained = self.clock.late_seconds(elements.saturating_sub(left));
            self.judge.weigh(gained, (!stood).then_some(again));
        }
        self.report.elements += elements;
        self.report.left += left;
        self.free
            .extend(self.begun.drain(..).map(|begun| begun.kept));
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
    /// Elements of the step whose norm is to come, or just came.
    ahead: AtomicU64,
    again_ns: AtomicU64,
}

impl Clock {
    pub(super) fn add(&self, work: Work, elements: usize, took: Duration) {
        let elements = elements as u64;
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        match work {
            Work::Update => {
                self.late_elements.fetch_add(elements, Ordering::Relaxed);
                self.late_ns.fetch_add(ns, Ordering::Relaxed);
            }
            Work::Ahead => drop(self.ahead.fetch_add(elements, Ordering::Relaxed)),
            Work::Again(_) => drop(self.again_ns.fetch_add(ns, Ordering::Relaxed)),
            Work::Rest => {}
        }
    }

    /// What so many elements would have taken after the norm, once some did.
    fn late_seconds(&self, elements: u64) -> Option<f64> {
        let late = self.late_elements.load(Ordering::Relaxed);
        let seconds = self.late_ns.load(Ordering::Relaxed) as f64 / 1e9;
        (late > 0).then(|| elements as f64 * seconds / late as f64)
    }
}

/// Whether running ahead pays: what it gains in a step that stands against what it loses in one that does
/// not, by what steps showed.
#[derive(Debug, Default)]
struct Judge {
    /// The part of recent steps that would not have stood.
    risk: f64,
    /// Seconds, once they were seen.
    gained: Option<f64>,
    lost: Option<f64>,
}

impl Judge {
    /// How much the newest step counts.
    const NEWEST: f64 = 1.0 / 8.0;
    /// What is lost beside what is gained, until it was seen: the states are brought back and updated again,
    /// about 30 and 28 bytes an element for 28.
    const LOST: f64 = 2.0;

    fn saw(&mut self, stands: bool) {
        self.risk += Self::NEWEST * (f64::from(u8::from(!stands)) - self.risk);
    }

    /// What running ahead was worth, in seconds of work behind the norm, and what it took to make good for.
    fn weigh(&mut self, gained: Option<f64>, again: Option<Duration>) {
        self.gained = gained.or(self.gained);
        self.lost = again.map(|again| again.as_secs_f64()).or(self.lost);
    }

    fn worth(&self) -> bool {
        let seen = self.gained.zip(self.lost);
        let (gained, lost) = seen.unwrap_or((1.0, Self::LOST));
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
            let place = self.place_ahead(task, section, part, &kept.slab);
            let left = Some(Arc::clone(&kept.left));
            let scalars = self.step_scalars(task.step);
            self.ahead.begun.push(Begun {
                task,
                section,
                part,
                scalars,
                kept,
                done: false,
            });
            let seq = self.queue_update(task, section, Work::Ahead, place, scalars, left);
            self.fly(task, Sign::Cpu(seq));
        }
        any
    }

    fn place_ahead(&self, task: TaskRef, section: SectionId, part: u32, kept: &Slab) -> PartPlace {
        let spec = self.scheduler().plan().task(task.id);
        let mut place = self.part_place(task, spec, section, part);
        // The gradient at the end, from the start of a line of the caches, where the parameter takes its place.
        let in_place = place.param.is_none();
        let grad = place.elements * place.dtype.bytes() * usize::from(in_place);
        let grad = (kept.len() - grad) & !63;
        place.kept = Some((kept.address(), kept.address().wrapping_add(grad)));
        place
    }

    /// What ran ahead, done with as the norm says: if it stands, what it left over is updated, and else it is
    /// taken back and updated anew. The last piece of that work.
    pub(super) fn make_good(&mut self, stands: bool) -> Option<Seq> {
        let mut last = None;
        for index in 0..self.ahead.begun.len() {
            let begun = &self.ahead.begun[index];
            if stands && begun.left() == 0 {
                continue;
            }
            let (task, section, before) = (begun.task, begun.section, begun.scalars);
            let place = self.place_ahead(task, section, begun.part, &begun.kept.slab);
            let work = if stands {
                Work::Rest
            } else {
                Work::Again(before)
            };
            let scalars = self.step_scalars(task.step);
            let seq = self.queue_update(task, section, work, place, scalars, None);
            if let Some((trace, _)) = self.tracing() {
                trace.on_cpu(seq, task);
            }
            last = Some(seq);
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
        let tenth = Duration::from_millis(100);
        let fails = (0..).find(|_| {
            judge.saw(false);
            judge.weigh(Some(0.1), Some(2 * tenth));
            !judge.worth()
        });
        assert!((2..5).contains(&fails.unwrap_or(0)), "{fails:?}");
        let stands = (0..).find(|_| {
            judge.saw(true);
            judge.worth()
        });
        assert!(stands.unwrap_or(99) < 5, "{stands:?}");
        // Where undoing costs little it goes on with more of it.
        judge.weigh(Some(0.1), Some(tenth / 10));
        let fails = (0..40).find(|_| {
            judge.saw(false);
            !judge.worth()
        });
        assert!(fails.unwrap_or(99) > 8, "{fails:?}");
        // Where all of it is left for want of room in the log, nothing is gained.
        let mut judge = Judge::default();
        judge.weigh(Some(0.0), Some(tenth));
        judge.saw(false);
        assert!(!judge.worth());
    }
}
