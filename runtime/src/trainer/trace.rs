//! A run as a picture: what each lane did when, as Chrome's trace format (JSON that Perfetto and
//! chrome://tracing open).
//!
//! Device lanes show when the device itself worked, by its own clock; the disk's lanes when transfers
//! were asked for and came back; the trainer's when it waited for a stage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use forebay_prefetch::{Plan, TaskKind, TaskRef};

use crate::device::{Device, Event, Stream};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::queue::{Seq, Worked};

/// The lanes, by their number in the file.
const LANES: [&str; 6] = [
    "compute",
    "to the device",
    "from the device",
    "optimizer (CPU)",
    "trainer waits for",
    "disk",
];
const CPU: usize = 3;
const TRAINER: usize = 4;
const DISK: usize = 5;

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
    /// Transfers under way: the task, its lane and when it was asked for.
    transfers: Vec<Option<(TaskRef, Instant)>>,
    waiting: Option<Instant>,
    failed: bool,
}

impl Trace {
    pub(super) fn new(path: &Path, model: &Arc<Model>, plan: &Arc<Plan>) -> Result<Self> {
        let file =
            File::create(path).map_err(Error::system(format!("the trace {}", path.display())))?;
        let mut trace = Self {
            out: BufWriter::new(file),
            model: Arc::clone(model),
            plan: Arc::clone(plan),
            base: Instant::now(),
            labels: Default::default(),
            open: [None; 4],
            transfers: Vec::new(),
            waiting: None,
            failed: false,
        };
        trace.line(format_args!("{{\"traceEvents\":[{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{{\"name\":\"forebay\"}}}}"));
        for (lane, name) in LANES.into_iter().enumerate().take(DISK) {
            trace.name(lane, name);
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

    fn event(&mut self, lane: usize, name: &str, step: u64, worked: Worked) {
        let micros = |at: Instant| at.saturating_duration_since(self.base).as_secs_f64() * 1e6;
        let (start, end) = (micros(worked.start), micros(worked.end));
        let name = serde_json::Value::from(name);
        self.line(format_args!(
            ",{{\"name\":{name},\"ph\":\"X\",\"pid\":1,\"tid\":{lane},\"ts\":{start:.3},\"dur\":{:.3},\"args\":{{\"step\":{step}}}}}",
            (end - start).max(0.0)
        ));
    }

    /// A task whose work on the device ends with this event.
    pub(super) fn on_device(&mut self, event: Event, task: TaskRef) {
        self.labels[event.stream as usize].insert(event.seq, task);
    }

    /// A task at this place in the optimizer's queue.
    pub(super) fn on_cpu(&mut self, seq: Seq, task: TaskRef) {
        self.labels[CPU].insert(seq, task);
    }

    pub(super) fn transfer_starts(&mut self, task: TaskRef) {
        let slot = self.transfers.iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.transfers.push(None);
            let slot = self.transfers.len() - 1;
            self.name(DISK + slot, &format!("{} {slot}", LANES[DISK]));
            slot
        });
        self.transfers[slot] = Some((task, Instant::now()));
    }

    pub(super) fn transfer_ends(&mut self, task: TaskRef) {
        let of = |t: &Option<(TaskRef, Instant)>| t.is_some_and(|(t, _)| t == task);
        let Some(slot) = self.transfers.iter().position(of) else {
            return;
        };
        if let Some((_, start)) = self.transfers[slot].take() {
            let end = Instant::now();
            let upto = 0;
            let worked = Worked { upto, start, end };
            self.event(DISK + slot, &self.words(task), task.step, worked);
        }
    }

    pub(super) fn waiting(&mut self) {
        self.waiting.get_or_insert_with(Instant::now);
    }

    /// The trainer entered a stage, having waited or not.
    pub(super) fn entered(&mut self, task: TaskRef) {
        if let Some(start) = self.waiting.take() {
            let (upto, end) = (0, Instant::now());
            let worked = Worked { upto, start, end };
            self.event(TRAINER, &self.words(task), task.step, worked);
        }
    }

    /// Writes what the device and the optimizer's thread did since the last time.
    pub(super) fn collect(&mut self, device: &mut dyn Device, cpu: Vec<Worked>) {
        let streams = [Stream::Compute, Stream::H2d, Stream::D2h];
        let device = streams.map(|stream| (stream as usize, device.worked(stream)));
        for (lane, all) in device.into_iter().chain([(CPU, cpu)]) {
            for worked in all {
                self.worked(lane, worked);
            }
        }
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
        let Some((_, first)) = ended.first_key_value() else {
            self.open[lane] = Some(worked.start);
            return;
        };
        let names: Vec<_> = ended.values().map(|task| self.words(*task)).collect();
        self.event(lane, &names.join(", "), first.step, worked);
    }

    /// A task for people.
    fn words(&self, task: TaskRef) -> String {
        words(self.plan.task(task.id).kind, &self.model)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.line(format_args!("]}}"));
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
        TaskKind::ReadOptim(s, part) => format!("read states {} {part}", section(s)),
        TaskKind::Update(s, part) => format!("update {} {part}", section(s)),
        TaskKind::WriteOptim(s, part) => format!("write states {} {part}", section(s)),
        TaskKind::WriteParam(s) => format!("write {}", section(s)),
        TaskKind::PushParam(s) => format!("push {}", section(s)),
        TaskKind::SwapParam(s) => format!("swap {}", section(s)),
        TaskKind::Norm => "norm".to_owned(),
        TaskKind::Commit => "commit".to_owned(),
    }
}
