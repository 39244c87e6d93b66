//! Who waited for whom: arrows from what let a task go to that task, or to the trainer's wait.
//!
//! Spans come to light in any order, so an arrow is drawn once both of its ends are there.

use std::collections::BTreeMap;

use forebay_prefetch::{LetGo, Order, Scheduler, TaskKind, TaskRef};

/// Steps after which an arrow whose ends did not both come to light is given up.
const STEPS: u64 = 3;
/// The most tasks that are named in a wait.
const NAMED: usize = 3;
/// How far inside its span an end of an arrow lies, in microseconds: viewers look for the span around it.
const INSIDE: f64 = 0.5;

/// A span: its lane, and when, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) lane: usize,
    pub(super) start: f64,
    pub(super) end: f64,
}

/// From one lane and time to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrow {
    pub(super) from: (usize, f64),
    pub(super) to: (usize, f64),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Links {
    places: BTreeMap<TaskRef, Place>,
    /// By task: what let it go.
    let_go: BTreeMap<TaskRef, TaskRef>,
    /// What let the trainer go.
    waits: Vec<(TaskRef, Place)>,
}

impl Links {
    /// A task has started.
    pub(super) fn started(&mut self, scheduler: &Scheduler, task: TaskRef) {
        if let Some(let_go) = let_go(scheduler, task) {
            self.let_go.insert(task, let_go.by);
        }
    }

    /// A task's span is known.
    pub(super) fn span(&mut self, task: TaskRef, place: Place) {
        self.places.insert(task, place);
    }

    /// The trainer's wait ended, by the end of this task.
    pub(super) fn wait(&mut self, by: TaskRef, place: Place) {
        self.waits.push((by, place));
    }

    /// Arrows whose ends are both there.
    pub(super) fn drawn(&mut self) -> Vec<Arrow> {
        let mut arrows = Vec::new();
        let places = &self.places;
        self.let_go
            .retain(|task, by| match (places.get(by), places.get(task)) {
                (Some(by), Some(task)) => {
                    arrows.extend(arrow(*by, *task));
                    false
                }
                _ => true,
            });
        self.waits.retain(|(by, wait)| match places.get(by) {
            Some(by) => {
                arrows.extend(arrow(*by, *wait));
                false
            }
            None => true,
        });
        let newest = places.last_key_value().map_or(0, |(task, _)| task.step);
        let young = |task: &TaskRef| task.step + STEPS > newest;
        self.let_go.retain(|task, _| young(task));
        self.waits.retain(|(by, _)| young(by));
        self.places.retain(|task, _| young(task));
        arrows
    }
}

/// From the end of a span into another, if that was still there then.
fn arrow(by: Place, task: Place) -> Option<Arrow> {
    let inside = |place: Place| INSIDE.min((place.end - place.start) / 2.0);
    let from = by.end - inside(by);
    let to = task.end - inside(task);
    (from <= to).then(|| Arrow {
        from: (by.lane, from),
        to: (task.lane, from.clamp(task.start.min(to), to)),
    })
}

/// What let a task go, what takes no time passed over.
fn let_go(scheduler: &Scheduler, task: TaskRef) -> Option<LetGo> {
    let mut let_go = scheduler.let_go(task)?;
    let kind = |task: TaskRef| scheduler.plan().task(task.id).kind;
    while matches!(kind(let_go.by), TaskKind::Norm | TaskKind::Commit) {
        let_go = scheduler.let_go(let_go.by)?;
    }
    Some(let_go)
}

/// What a stage waited for since some time of the scheduler's: what let it go, what let that go, and so on; and
/// the first of them that did so by its end.
pub(super) fn chain(
    scheduler: &Scheduler,
    stage: TaskRef,
    since: u64,
) -> (Vec<TaskRef>, Option<TaskRef>) {
    let (mut named, mut ended) = (Vec::new(), None);
    let mut task = stage;
    while let Some(let_go) = let_go(scheduler, task).filter(|let_go| let_go.at > since) {
        if named.len() < NAMED {
            named.push(let_go.by);
        } else if ended.is_some() {
            break;
        }
        if let_go.order == Order::Done {
            ended = ended.or(Some(let_go.by));
        }
        task = let_go.by;
    }
    (named, ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_prefetch::TaskId;

    fn task(step: u64, id: u32) -> TaskRef {
        let id = TaskId(id);
        TaskRef { step, id }
    }

    fn place(lane: usize, start: f64, end: f64) -> Place {
        Place { lane, start, end }
    }

    #[test]
    fn an_arrow_is_drawn_once_when_both_of_its_ends_are_there_and_never_backwards() {
        let mut links = Links::default();
        links.let_go.insert(task(0, 2), task(0, 1));
        links.span(task(0, 2), place(3, 10.0, 20.0));
        assert!(links.drawn().is_empty());
        links.span(task(0, 1), place(1, 2.0, 9.0));
        let arrows = links.drawn();
        assert_eq!(arrows.len(), 1);
        assert_eq!((arrows[0].from, arrows[0].to), ((1, 8.5), (3, 10.0)));
        assert!(links.drawn().is_empty());
        // Clocks that differ a little, and more than that.
        let late = |end| arrow(place(1, 0.0, end), place(2, 10.0, 20.0));
        assert_eq!(late(12.0).unwrap().to, (2, 11.5));
        assert!(late(21.0).is_none());
        // What never comes to light is forgotten.
        links.let_go.insert(task(1, 1), task(0, 9));
        links.wait(task(1, 9), place(4, 0.0, 1.0));
        links.span(task(9, 0), place(0, 0.0, 1.0));
        assert!(links.drawn().is_empty());
        assert!(links.let_go.is_empty() && links.waits.is_empty() && links.places.len() == 1);
    }
}
