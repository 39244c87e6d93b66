//! The `cuda` device: a GPU through the CUDA driver. Its memory is one allocation of exactly the
//! budget; copies and kernels go to three streams of its own, ordered by events and nothing else.
//!
//! No call of a step waits for the GPU. Where the engine will want to know that something is done,
//! an event is recorded behind it (a *mark*), and a thread for each stream waits for the marks in
//! turn, counts them as done and wakes the engine: asking is reading a number. The first failure
//! sticks, whoever meets it.
//!
//! A device that reaches no mark for two minutes while one is waited for has failed too. What it may still
//! touch is then kept for good, and that is said. `FOREBAY_DEVICE_PATIENCE` gives it more or less, in
//! seconds.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_kernels::cuda::{CudaError, Kernels, check, probe, sys};
use forebay_pinned::Arena;

use super::{Device, Event, Span, Stream};
use crate::Bytes;
use crate::error::{Error, Result};
use crate::operation::{CudaContext, Launch};
use crate::queue::{Notifier, Worked};
use crate::target::{ExternalStream, Target};

mod context;
mod watcher;

use context::{Context, HostWord, Memory, Registered};
use watcher::{Base, Mark, Shared, Watcher};

/// Copies behind one mark, at most: so long that a mark costs nothing, so short that nobody waits for it.
const MARK_BYTES: u64 = 4 << 20;

/// How long a device may be silent: no stage of a model takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// See the module.
pub(crate) struct CudaDevice {
    lanes: [Lane; 3],
    shared: Arc<Shared>,
    kernels: ManuallyDrop<Kernels>,
    memory: ManuallyDrop<Memory>,
    pinned: Vec<Registered>,
    fault: Arc<HostWord>,
    /// From where time is told, once somebody asked.
    base: Option<Arc<Base>>,
    // The last to go.
    context: Arc<Context>,
}

// SAFETY: what the driver gives out belongs to a context, not to a thread; calls come from one thread
// at a time (contract of `Device`).
unsafe impl Send for CudaDevice {}

/// A stream and what was recorded on it.
struct Lane {
    stream: sys::CUstream,
    /// Whether the stream is the caller's.
    given: bool,
    /// Operations queued.
    queued: u64,
    /// Operations that a mark stands behind.
    marked: u64,
    /// Bytes of copies since.
    unmarked_bytes: u64,
    /// Stands before the first operation behind the last mark, for the time it takes.
    start: Option<sys::CUevent>,
    /// Whether the stream waits for another before that operation.
    waits: bool,
    /// Marks that may not have been reached, oldest first.
    pending: VecDeque<Mark>,
    spare: Vec<sys::CUevent>,
    watcher: Watcher,
    shared: Arc<Shared>,
    /// Its device does not answer: nothing of it can be taken back.
    abandoned: bool,
}

impl CudaDevice {
    /// Takes the first device, all of `budget` on it, and the kernels.
    pub(crate) fn new(
        budget: u64,
        notifier: &Arc<Notifier>,
        compute: Option<ExternalStream>,
    ) -> Result<Self> {
        probe().map_err(refused)?;
        let context = Arc::new(Context::new().map_err(refused)?);
        let fault = Arc::new(HostWord::new().map_err(refused)?);
        let memory = Memory::new(budget).map_err(|error| Error::NoDevice {
            wanted: "cuda",
            why: format!(
                "{} of device memory cannot be had of {} free: {error}",
                Bytes(budget),
                Bytes(context.free_memory())
            ),
        })?;
        let kernels = Kernels::new(context.device(), fault.on_device()).map_err(refused)?;
        let patience = patience()?;
        let shared = Shared::new(patience, Arc::clone(&fault), Arc::clone(notifier));
        let shared = Arc::new(shared);
        let lane = |name: &str, given: Option<ExternalStream>| -> Result<Lane> {
            let watcher = Watcher::new(name, Arc::clone(&context), Arc::clone(&shared));
            let watcher = watcher.map_err(Error::system("starting a thread of the device"))?;
            let stream = match given {
                Some(stream) => stream.handle(),
                None => own_stream().map_err(refused)?,
            };
            Ok(Lane {
                stream,
                given: given.is_some(),
                queued: 0,
                marked: 0,
                unmarked_bytes: 0,
                start: None,
                waits: false,
                pending: VecDeque::with_capacity(256),
                spare: Vec::new(),
                watcher,
                shared: Arc::clone(&shared),
                abandoned: false,
            })
        };
        Ok(Self {
            lanes: [
                lane("fb-compute", compute)?,
                lane("fb-h2d", None)?,
                lane("fb-d2h", None)?,
            ],
            shared,
            kernels: ManuallyDrop::new(kernels),
            memory: ManuallyDrop::new(memory),
            pinned: Vec::new(),
            fault,
            base: None,
            context,
        })
    }

    /// Runs `work` on a stream, timed from the first one behind a mark.
    fn queue(
        &mut self,
        name: &'static str,
        stream: Stream,
        work: impl FnOnce(sys::CUstream, &Kernels) -> Result<(), String>,
    ) -> u64 {
        self.context.bind();
        let lane = &mut self.lanes[stream as usize];
        lane.queued += 1;
        if self.shared.failure().is_some() {
            return lane.queued;
        }
        let mut done = Ok(());
        if lane.start.is_none() {
            done = lane.begin();
        }
        if let Err(what) = done.and_then(|()| work(lane.stream, &self.kernels)) {
            self.shared.fail(name, what);
        }
        lane.queued
    }

    /// The event of a copy. Small ones in a row share a mark, for each costs the link a moment: it is made
    /// when one of them is asked for.
    fn copied(&mut self, stream: Stream, bytes: u64) -> Event {
        let lane = &mut self.lanes[stream as usize];
        lane.unmarked_bytes += bytes;
        if lane.unmarked_bytes >= MARK_BYTES {
            return self.mark(stream);
        }
        let seq = lane.queued;
        Event { stream, seq }
    }

    fn mark_upto(&mut self, event: Event) {
        if self.lanes[event.stream as usize].marked < event.seq {
            self.mark(event.stream);
        }
    }

    fn mark(&mut self, stream: Stream) -> Event {
        self.context.bind();
        let lane = &mut self.lanes[stream as usize];
        if let Err(what) = lane.mark() {
            self.shared.fail("an event", what);
        }
        let seq = lane.queued;
        Event { stream, seq }
    }
}

impl Lane {
    /// Takes the time from here. On a stream that is at work it is the end of what goes before: each
    /// event between two copies costs the link a moment.
    fn begin(&mut self) -> Result<(), String> {
        let done = self.watcher.done();
        self.start = Some(match self.pending.back_mut() {
            Some(mark) if !self.waits && !self.given && mark.seq > done => {
                mark.lent = true;
                mark.end
            }
            _ => self.record()?,
        });
        self.waits = false;
        Ok(())
    }

    /// An event, recorded here and now.
    fn record(&mut self) -> Result<sys::CUevent, String> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => {
                let mut event = std::ptr::null_mut();
                let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
                // SAFETY: a valid place, in the current context.
                let made = unsafe { sys::cuEventCreate(&raw mut event, flags) };
                check("cuEventCreate", made).map_err(|e| e.to_string())?;
                event
            }
        };
        // SAFETY: an event and a stream of this device.
        let recorded = unsafe { sys::cuEventRecord(event, self.stream) };
        if let Err(error) = check("cuEventRecord", recorded) {
            self.spare.push(event);
            return Err(error.to_string());
        }
        Ok(event)
    }

    /// Puts a mark behind all that was queued, if there is none.
    fn mark(&mut self) -> Result<(), String> {
        // What was reached is not needed any more.
        let done = self.watcher.done();
        while self.pending.front().is_some_and(|mark| mark.seq <= done) {
            if let Some(mark) = self.pending.pop_front() {
                self.spare.extend(mark.own().into_iter().flatten());
            }
        }
        if self.marked == self.queued {
            return Ok(());
        }
        let end = self.record()?;
        let mark = Mark {
            seq: self.queued,
            start: self.start.take(),
            end,
            lent: false,
        };
        self.marked = self.queued;
        self.unmarked_bytes = 0;
        if self.pending.is_empty() {
            self.shared.heard();
        }
        self.pending.push_back(mark);
        self.watcher.expect(mark);
        Ok(())
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("cuda ({})", self.context.name())
    }

    fn memory(&self) -> Span {
        self.memory.span()
    }

    fn pin(&mut self, arena: &Arena) -> Result<()> {
        self.context.bind();
        let registered = Registered::new(arena).map_err(|error| Error::NoDevice {
            wanted: "cuda",
            why: format!(
                "{} of host memory cannot be page-locked for it: {error}",
                Bytes(arena.capacity())
            ),
        })?;
        self.pinned.push(registered);
        Ok(())
    }

    fn mapped(&self, host: *const u8) -> Option<u64> {
        self.pinned.iter().find_map(|arena| arena.on_device(host))
    }

    unsafe fn copy_in(&mut self, stream: Stream, to: Span, source: *const u8) -> Event {
        assert!(self.memory().contains(to), "a copy outside device memory");
        self.queue("copy in", stream, |stream, _| {
            // SAFETY: the caller keeps both places until the event (contract of `copy_in`).
            let done = unsafe {
                sys::cuMemcpyHtoDAsync_v2(to.address, source.cast(), to.bytes as usize, stream)
            };
            check("cuMemcpyHtoDAsync", done).map_err(|e| e.to_string())
        });
        self.copied(stream, to.bytes)
    }

    unsafe fn copy_out(&mut self, stream: Stream, from: Span, target: *mut u8) -> Event {
        assert!(self.memory().contains(from), "a copy outside device memory");
        self.queue("copy out", stream, |stream, _| {
            // SAFETY: the caller keeps both places until the event (contract of `copy_out`).
            let done = unsafe {
                sys::cuMemcpyDtoHAsync_v2(target.cast(), from.address, from.bytes as usize, stream)
            };
            check("cuMemcpyDtoHAsync", done).map_err(|e| e.to_string())
        });
        self.copied(stream, from.bytes)
    }

    unsafe fn copy(&mut self, from: u64, to: Span) {
        let source = Span {
            address: from,
            bytes: to.bytes,
        };
        let inside = self.memory().contains(source) && self.memory().contains(to);
        assert!(inside, "a copy outside device memory");
        self.queue("copy", Stream::Compute, |stream, _| {
            // SAFETY: both places are device memory, ordered by the caller.
            let done =
                unsafe { sys::cuMemcpyDtoDAsync_v2(to.address, from, to.bytes as usize, stream) };
            check("cuMemcpyDtoDAsync", done).map_err(|e| e.to_string())
        });
    }

    unsafe fn launch(&mut self, launch: Launch) {
        let pinned = |span| self.pinned.iter().any(|arena| arena.span().contains(span));
        assert!(
            launch.lies_in(self.memory(), pinned),
            "'{}' was given memory outside the device",
            launch.name()
        );
        self.queue(launch.name(), Stream::Compute, |stream, kernels| {
            // SAFETY: memory that kernels may read or write so (checked above), ordered and disjoint by the
            // contract of `launch`.
            unsafe { launch.queue_on_cuda(&CudaContext { kernels, stream }) }
        });
    }

    unsafe fn zero(&mut self, span: Span) {
        assert!(self.memory().contains(span), "zeros outside device memory");
        self.queue("zero", Stream::Compute, |stream, _| {
            // SAFETY: by the contract of `zero`, as in `copy_in`.
            let done =
                unsafe { sys::cuMemsetD8Async(span.address, 0, span.bytes as usize, stream) };
            check("cuMemsetD8Async", done).map_err(|e| e.to_string())
        });
    }

    fn newest(&mut self, stream: Stream) -> Event {
        self.mark(stream)
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        self.mark_upto(event);
        let from = &self.lanes[event.stream as usize];
        if stream == event.stream || from.watcher.done() >= event.seq {
            return;
        }
        let Some(mark) = from.pending.iter().find(|mark| mark.seq >= event.seq) else {
            // Every event that was handed out has a mark.
            return;
        };
        let end = mark.end;
        self.context.bind();
        // The time that a stream waits is not work.
        let lane = &mut self.lanes[stream as usize];
        let mut done = lane.mark();
        if done.is_ok() {
            // SAFETY: a stream and an event of this device, recorded before.
            let waits = unsafe { sys::cuStreamWaitEvent(lane.stream, end, 0) };
            done = check("cuStreamWaitEvent", waits).map_err(|e| e.to_string());
            lane.waits = true;
        }
        if let Err(what) = done {
            self.shared.fail("waiting for an event", what);
        }
    }

    fn query(&mut self, event: Event) -> Result<bool> {
        self.mark_upto(event);
        // Before the failure: what is done is done well only if there was none until then.
        let reached = self.lanes[event.stream as usize].watcher.done() >= event.seq;
        if !reached && self.shared.overdue(None) && !self.answers() {
            self.shared.give_up();
        }
        match self.shared.failure() {
            Some(failure) => Err(Error::Device {
                operation: failure.operation,
                what: failure.what,
            }),
            None => Ok(reached),
        }
    }

    fn drain(&mut self) {
        self.ended();
    }

    fn target(&self) -> Target {
        Target::Cuda
    }

    fn busy(&self, stream: Stream) -> Duration {
        self.lanes[stream as usize].watcher.busy()
    }

    fn worked(&mut self, stream: Stream) -> Vec<Worked> {
        if self.base.as_ref().is_none_or(|base| base.is_old()) && self.shared.failure().is_none() {
            self.context.bind();
            self.base = Base::new().map(Arc::new);
        }
        let base = self.base.clone();
        self.lanes[stream as usize].watcher.worked(base)
    }
}

impl CudaDevice {
    /// Asks the device itself, before it is given up: a process that was stopped for a while hears of
    /// what was done meanwhile only when its threads run again.
    fn answers(&self) -> bool {
        self.context.bind();
        let ended = |lane: &Lane| {
            let done = lane.watcher.done();
            let next = lane.pending.iter().find(|mark| mark.seq > done);
            next.is_some_and(|mark| {
                // SAFETY: an event of this device.
                let asked = unsafe { sys::cuEventQuery(mark.end) };
                asked != sys::CUresult::CUDA_ERROR_NOT_READY
            })
        };
        let answers = self.lanes.iter().any(ended);
        if answers {
            self.shared.heard();
        }
        answers
    }

    /// Waits until all streams are empty; false for a device that does not answer.
    fn ended(&mut self) -> bool {
        self.context.bind();
        // On a stream of the caller's what he queued after us is not waited for.
        for lane in self.lanes.iter_mut().filter(|lane| lane.given) {
            if let Err(what) = lane.mark() {
                self.shared.fail("an event", what);
            }
        }
        let start = Instant::now();
        let ready = |lane: &Lane| {
            // SAFETY: a stream of this device. A device that is lost refuses at once, and touches
            // nothing any more.
            let empty = || unsafe {
                sys::cuStreamQuery(lane.stream) != sys::CUresult::CUDA_ERROR_NOT_READY
            };
            // And all that it did is counted.
            (lane.given || empty()) && lane.watcher.done() >= lane.marked
        };
        let mut nap = Duration::from_micros(20);
        while !self.lanes.iter().all(ready) {
            if self.shared.overdue(Some(start)) {
                self.shared.give_up();
            }
            if self.shared.given_up() {
                return false;
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(1));
        }
        true
    }

    /// Keeps all that the device may still touch, until the process ends.
    fn abandon(&mut self) {
        eprintln!(
            "forebay: the GPU did not answer for {:?}; its memory and what it may touch of the \
             host's are left to it until the process ends",
            self.shared.patience()
        );
        for lane in &mut self.lanes {
            lane.abandoned = true;
            lane.watcher.abandon();
        }
        self.pinned.drain(..).for_each(std::mem::forget);
        std::mem::forget(Arc::clone(&self.fault));
        std::mem::forget(Arc::clone(&self.context));
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if !self.ended() {
            self.abandon();
            return;
        }
        self.pinned.clear();
        // SAFETY: dropped here and nowhere else; the streams are empty.
        unsafe {
            ManuallyDrop::drop(&mut self.kernels);
            ManuallyDrop::drop(&mut self.memory);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.abandoned {
            return;
        }
        // It is empty, so every mark is reached.
        self.watcher.end();
        let events = self.pending.drain(..).flat_map(Mark::own);
        let events = events.chain([self.start.take()]).flatten();
        for event in events.chain(self.spare.drain(..)) {
            // SAFETY: made by `record`, used by nobody any more.
            let _ = unsafe { sys::cuEventDestroy_v2(event) };
        }
        if !self.given {
            // SAFETY: made by `own_stream`.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}

/// How long this process lets a device be silent.
fn patience() -> Result<Duration> {
    let Ok(text) = std::env::var("FOREBAY_DEVICE_PATIENCE") else {
        return Ok(PATIENCE);
    };
    let seconds = text.parse().ok().filter(|s: &f64| *s > 0.0);
    let patience = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    patience.ok_or_else(|| {
        let what = format!("FOREBAY_DEVICE_PATIENCE: '{text}' is not a number of seconds");
        Error::Misuse(what)
    })
}

/// One that does not wait for the default stream.
fn own_stream() -> std::result::Result<sys::CUstream, CudaError> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: a valid place, in the current context.
    let made = unsafe { sys::cuStreamCreate(&raw mut stream, flags) };
    check("cuStreamCreate", made).map(|()| stream)
}

fn refused(error: CudaError) -> Error {
    Error::NoDevice {
        wanted: "cuda",
        why: error.to_string(),
    }
}
