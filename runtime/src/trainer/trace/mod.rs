//! A run as a picture: what each lane did when, as Chrome's trace format (JSON that Perfetto and
//! chrome://tracing open).
//!
//! Device lanes show when the device itself worked, by its own clock; the disk's lanes when transfers
//! were asked for and came back; the optimizer's workers each their part of an update; the trainer's when it
//! could not enter a stage, and what that waited for, and when it waited for the loss. Arrows go from what let a
//! task go to that task.

mod links;
mod shifts;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use forebay_prefetch::{Lane, Plan, Scheduler, TaskKind, TaskRef};

use crate::device::{Device, Event, Stream};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::queue::{Seq, Worked};
use links::{Links, Place};
pub(super) use shifts::Shifts;

/// The lanes that there are one of, by their number in the file.
const LANES: [&str; 5] = [
    "compute",
    "to the device",
    "from the device",
    "optimizer (CPU)",
    "trainer waits",
];
const CPU: usize = 3;
const TRAINER: usize = 4;
/// The first of those that there are several of: the optimizer's workers, reads and writes of the disk.
const WORKERS: usize = 1_000;
const DISK: [(usize, &str); 2] = [(10_000, "disk read"), (20_000, "disk write")];

/// See the module.
pub(super) struct Trace {
    out: BufWriter<File>,
    model: Arc<Model>,
    plan: Arc<Plan>,
    base: Instant,
    /// By lane: what ends at an event of the device, or at a place in the optimizer's queue.
    labels: [BTreeMap<u64, TaskRef>; 4],
    /// When work began whose end is still to come.
    open: [Option<Instant>; 4],
    /// Transfers under way, reads and writes: the task and when it was asked for.
    transfers: [Vec<Option<(TaskRef, Instant)>>; 2],
    /// Since when the trainer waits: the time, and the scheduler's.
    waiting: Option<(Instant, u64)>,
    links: Links,
    arrows: u64,
    /// Spans of workers that there was no room for.
    lost: u64,
    failed: bool,
}

impl Trace {
    pub(super) fn new(
        path: &Path,
        model: &Arc<Model>,
        plan: &Arc<Plan>,
        threads: usize,
    ) -> Result<Self> {
        let file =
            File::create(path).map_err(Error::system(format!("the trace {}", path.display())))?;
        let mut trace = Self {
            out: BufWriter::new(file),
            model: Arc::clone(model),
            plan: Arc::clone(plan),
            base: Instant::now(),
            labels: Default::default(),
            open: [None; 4],
            transfers: Default::default(),
            waiting: None,
            links: Links::default(),
            arrows: 0,
            lost: 0,
            failed: false,
        };
        trace.line(format_args!("{{\"traceEvents\":[{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{{\"name\":\"forebay\"}}}}"));
        for (lane, name) in LANES.into_iter().enumerate() {
            trace.name(lane, name);
        }
        for worker in 0..threads.max(1) {
            trace.name(WORKERS + worker, &format!("optimizer worker {worker}"));
        }
        Ok(trace)
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        // A full disk ends the trace, not the run.
        self.failed = self.failed || writeln!(self.out, "{text}").is_err();
    }

    fn name(&mut self, lane: usize, name: &str) {
        self.line(format_args!(
            ",{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":{lane},\"args\":{{\"name\":\"{name}\"}}}}\n\
             ,{{\"name\":\"thread_sort_index\",\"ph\":\"M\",\"pid\":1,\"tid\":{lane},\"args\":{{\"sort_index\":{lane}}}}}"
        ));
    }

    fn event(&mut self, lane: usize, name: &str, worked: Worked, args: &str) -> Place {
        let micros = |at: Instant| at.saturating_duration_since(self.base).as_secs_f64() * 1e6;
        let start = micros(worked.start);
        let end = micros(worked.end).max(start);
        let name = serde_json::Value::from(name);
        self.line(format_args!(
            ",{{\"name\":{name},\"ph\":\"X\",\"pid\":1,\"tid\":{lane},\"ts\":{start:.3},\"dur\":{:.3},\"args\":{{{args}}}}}",
            end - start
        ));
        Place { lane, start, end }
    }

    /// A span in which tasks were done.
    fn tasks(&mut self, lane: usize, tasks: &[TaskRef], worked: Worked) {
        let names: Vec<_> = tasks.iter().map(|task| self.words(*task)).collect();
        let mut args = format!("\"step\":{}", tasks.first().map_or(0, |task| task.step));
        let specs = tasks.iter().map(|task| self.plan.task(task.id));
        let (mut elements, mut bytes) = (0, 0);
        for spec in specs {
            match spec.kind {
                TaskKind::Update(..) => elements += spec.amount,
                _ => bytes += spec.amount,
            }
        }
        for (what, amount) in [("elements", elements), ("bytes", bytes)] {
            if amount > 0 {
                args += &format!(",\"{what}\":{amount}");
            }
        }
        let place = self.event(lane, &names.join(", "), worked, &args);
        for task in tasks {
            self.links.span(*task, place);
        }
    }

    /// A task whose work on the device ends with this event.
    pub(super) fn on_device(&mut self, event: Event, task: TaskRef) {
        self.labels[event.stream as usize].insert(event.seq, task);
    }

    /// A task at this place in the optimizer's queue.
    pub(super) fn on_cpu(&mut self, seq: Seq, task: TaskRef) {
        self.labels[CPU].insert(seq, task);
    }

    /// A task has started.
    pub(super) fn started(&mut self, scheduler: &Scheduler, task: TaskRef) {
        self.links.started(scheduler, task);
    }

    pub(super) fn transfer_starts(&mut self, task: TaskRef) {
        let way = self.way(task);
        let slot = self.transfers[way].iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.transfers[way].push(None);
            let slot = self.transfers[way].len() - 1;
            let (first, name) = DISK[way];
            self.name(first + slot, &format!("{name} {slot}"));
            slot
        });
        self.transfers[way][slot] = Some((task, Instant::now()));
    }

    pub(super) fn transfer_ends(&mut self, task: TaskRef) {
        let way = self.way(task);
        let of = |t: &Option<(TaskRef, Instant)>| t.is_some_and(|(t, _)| t == task);
        let Some(slot) = self.transfers[way].iter().position(of) else {
            return;
        };
        if let Some((_, start)) = self.transfers[way][slot].take() {
            self.tasks(DISK[way].0 + slot, &[task], until_now(start));
        }
    }

    /// 0: it reads, 1: it writes.
    fn way(&self, task: TaskRef) -> usize {
        usize::from(self.plan.task(task.id).lane == Lane::DiskWrite)
    }

    pub(super) fn waiting(&mut self, scheduler: &Scheduler) {
        let since = || (Instant::now(), scheduler.now());
        self.waiting.get_or_insert_with(since);
    }

    /// The trainer entered a stage, having waited or not.
    pub(super) fn entered(&mut self, scheduler: &Scheduler, stage: TaskRef) {
        let Some((start, since)) = self.waiting.take() else {
            return;
        };
        let (named, ended) = links::chain(scheduler, stage, since);
        let named: Vec<_> = named.iter().map(|task| self.words(*task)).collect();
        let named = named.join(" <- ");
        let what = match named.as_str() {
            "" => "",
            _ => " waits for ",
        };
        let name = format!("{}{what}{named}", self.words(stage));
        let args = format!("\"step\":{}", stage.step);
        let place = self.event(TRAINER, &name, until_now(start), &args);
        if let Some(by) = ended {
            self.links.wait(by, place);
        }
    }

    /// The trainer has the loss of a step, for which it waited.
    pub(super) fn has_loss(&mut self, step: u64) {
        if let Some((start, _)) = self.waiting.take() {
            let args = format!("\"step\":{step}");
            self.event(TRAINER, "waits for the loss", until_now(start), &args);
        }
    }

    /// Writes what the device, the optimizer's thread and its workers did since the last time.
    pub(super) fn collect(
        &mut self,
        device: &mut dyn Device,
        cpu: Vec<Worked>,
        shifts: Option<&Shifts>,
    ) {
        let streams = [Stream::Compute, Stream::H2d, Stream::D2h];
        let device = streams.map(|stream| (stream as usize, device.worked(stream)));
        for (lane, all) in device.into_iter().chain([(CPU, cpu)]) {
            for worked in all {
                self.worked(lane, worked);
            }
        }
        while let Some(worker) = shifts.and_then(Shifts::next) {
            self.worker(worker);
        }
        self.lost += shifts.map_or(0, Shifts::lost);
        for arrow in self.links.drawn() {
            let id = self.arrows;
            self.arrows += 1;
            for (end, (lane, at)) in [("s", arrow.from), ("f\",\"bp\":\"e", arrow.to)] {
                self.line(format_args!(
                    ",{{\"name\":\"lets go\",\"cat\":\"waits\",\"ph\":\"{end}\",\"id\":{id},\"pid\":1,\"tid\":{lane},\"ts\":{at:.3}}}"
                ));
            }
        }
    }

    /// A worker's part of an update.
    fn worker(&mut self, worker: shifts::Worker) {
        let shifts::Worker { task, shift } = worker;
        let worked = Worked {
            upto: 0,
            start: shift.start,
            end: shift.end,
        };
        let elements = self.plan.task(task.id).amount;
        let args = format!(
            "\"step\":{},\"update_elements\":{elements},\"chunks\":{}",
            task.step, shift.chunks
        );
        self.event(WORKERS + shift.worker, &self.words(task), worked, &args);
    }

    /// What was worked until now was no task's: states were loaded or published, or a model evaluated.
    pub(super) fn cut(&mut self) {
        self.open = [None; 4];
        self.waiting = None;
    }

    /// Work that ends a task, ends several, or is the beginning of one.
    fn worked(&mut self, lane: usize, mut worked: Worked) {
        worked.start = self.open[lane].take().unwrap_or(worked.start);
        let rest = self.labels[lane].split_off(&(worked.upto + 1));
        let ended = std::mem::replace(&mut self.labels[lane], rest);
        if ended.is_empty() {
            self.open[lane] = Some(worked.start);
            return;
        }
        let tasks: Vec<_> = ended.into_values().collect();
        self.tasks(lane, &tasks, worked);
    }

    /// A task for people.
    fn words(&self, task: TaskRef) -> String {
        words(self.plan.task(task.id).kind, &self.model)
    }
}

/// From some time on.
fn until_now(start: Instant) -> Worked {
    Worked {
        upto: 0,
        start,
        end: Instant::now(),
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.line(format_args!("]}}"));
        if self.lost > 0 {
            eprintln!(
                "forebay: {} spans of workers are missing in the trace",
                self.lost
            );
        }
        if self.failed || self.out.flush().is_err() {
            eprintln!("forebay: the trace could not be written whole (is the disk full?)");
        }
    }
}

fn words(kind: TaskKind, model: &Model) -> String {
    let section = |s: forebay_prefetch::SectionId| model.sections[s.0 as usize].name.as_str();
    let stage = |s: forebay_prefetch::StageId| {
        model
            .train
            .get(s.0 as usize)
            .map_or("", |stage| stage.name.as_str())
    };
    match kind {
        TaskKind::Compute(s) => stage(s).to_owned(),
        TaskKind::ReadParam(s) => format!("read {}", section(s)),
        TaskKind::FetchParam(s) => format!("fetch {}", section(s)),
        TaskKind::SaveAct(s) => format!("save {}", stage(s)),
        TaskKind::RestoreAct(s) => format!("restore {}", stage(s)),
        TaskKind::GradOut(s) => format!("gradient {}", section(s)),
        TaskKind::GradNorm(s) => format!("norm {}", section(s)),
        TaskKind::SpillGrad(s) => format!("spill gradient {}", section(s)),
        TaskKind::ReadGrad(s) => format!("read gradient {}", section(s)),
        TaskKind::ReadOptim(s, part) => format!("read states {} part {part}", section(s)),
        TaskKind::Update(s, part) => format!("update {} part {part}", section(s)),
        TaskKind::WriteOptim(s, part) => format!("write states {} part {part}", section(s)),
        TaskKind::WriteParam(s) => format!("write {}", section(s)),
        TaskKind::PushParam(s) => format!("push {}", section(s)),
        TaskKind::SwapParam(s) => format!("swap {}", section(s)),
        TaskKind::Norm => "norm".to_owned(),
        TaskKind::Commit => "commit".to_owned(),
    }
}
