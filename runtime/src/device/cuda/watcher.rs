//! A thread for each stream: waits for its marks in turn, so that nobody else has to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, unbounded};
use forebay_kernels::cuda::{CudaError, check, elapsed, sys};

use super::context::{Context, HostWord};
use crate::queue::{Failure, Notifier, Worked};

/// Events around what was queued up to some operation.
#[derive(Clone, Copy)]
pub(super) struct Mark {
    /// Operations of the stream that it stands behind.
    pub(super) seq: u64,
    pub(super) start: Option<sys::CUevent>,
    pub(super) end: sys::CUevent,
    /// Whether the end is the start of the next mark too, which owns it then.
    pub(super) lent: bool,
}

impl Mark {
    /// The events that are its own.
    pub(super) fn own(self) -> [Option<sys::CUevent>; 2] {
        [self.start, (!self.lent).then_some(self.end)]
    }
}

// SAFETY: events belong to a context, not to a thread.
unsafe impl Send for Mark {}

/// What the threads and the device share: the first failure, when the device last answered, and who
/// is woken.
pub(super) struct Shared {
    patience: Duration,
    began: Instant,
    /// When a mark was reached, or work began on an idle stream, in nanoseconds since `began`.
    heard_ns: AtomicU64,
    given_up: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
    fault: Arc<HostWord>,
    notifier: Arc<Notifier>,
}

impl Shared {
    pub(super) fn new(patience: Duration, fault: Arc<HostWord>, notifier: Arc<Notifier>) -> Self {
        Self {
            patience,
            began: Instant::now(),
            heard_ns: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            fault,
            notifier,
        }
    }

    /// The device gave a sign of life, or has nothing to give one for.
    pub(super) fn heard(&self) {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.heard_ns.store(now, Ordering::Relaxed);
    }

    /// Whether the device has been silent for longer than it is given, since `from` at the earliest.
    /// For one that is waited for.
    pub(super) fn overdue(&self, from: Option<Instant>) -> bool {
        let heard = Duration::from_nanos(self.heard_ns.load(Ordering::Relaxed));
        let silence = self.began.elapsed().saturating_sub(heard);
        from.map_or(silence, |from| from.elapsed().min(silence)) > self.patience
    }

    /// Waits for the device no more.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        let what = format!("it has not answered for {:?}", self.patience);
        self.fail("what was queued", what);
    }

    pub(super) fn given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Takes note of a failure; the first one sticks.
    pub(super) fn fail(&self, operation: &'static str, what: String) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(Failure { operation, what });
        self.failed.store(true, Ordering::Release);
        drop(failure);
        self.notifier.notify();
    }

    pub(super) fn failure(&self) -> Option<Failure> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone()
    }
}

#[derive(Default)]
struct Progress {
    done: AtomicU64,
    busy_ns: AtomicU64,
    log: Mutex<Log>,
    logs: AtomicBool,
}

impl Drop for Base {
    fn drop(&mut self) {
        // SAFETY: made by `new`; whoever told time by it is done.
        let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}

#[derive(Default)]
struct Log {
    base: Option<Arc<Base>>,
    worked: Vec<Worked>,
}

/// An event, and when it was.
pub(super) struct Base {
    event: sys::CUevent,
    at: Instant,
}

// SAFETY: events belong to a context, not to a thread.
unsafe impl Send for Base {}
// SAFETY: only read.
unsafe impl Sync for Base {}

impl Base {
    /// Now, on a stream of its own: what is queued on others is not waited for.
    pub(super) fn new() -> Option<Self> {
        let (mut event, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: valid places; then an event and a stream of this context, which is let go.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&raw mut event, 0)).ok()?;
            let mut base = Self {
                event,
                at: Instant::now(),
            };
            check(
                "cuStreamCreate",
                sys::cuStreamCreate(&raw mut stream, flags),
            )
            .ok()?;
            let recorded = check("cuEventRecord", sys::cuEventRecord(event, stream));
            let come = check("cuEventSynchronize", sys::cuEventSynchronize(event));
            base.at = Instant::now();
            let _ = sys::cuStreamDestroy_v2(stream);
            recorded.and(come).ok().map(|()| base)
        }
    }

    /// Whether times told from it get coarse: milliseconds come in single precision, and clocks drift.
    pub(super) fn is_old(&self) -> bool {
        self.at.elapsed() > Duration::from_secs(30)
    }

    fn instant(&self, event: sys::CUevent) -> Option<Instant> {
        // SAFETY: both were recorded, and have come.
        let millis = unsafe { elapsed(self.event, event).ok()? };
        self.at
            .checked_add(Duration::try_from_secs_f64(f64::from(millis) * 1e-3).ok()?)
    }

    /// Before a mark's events are recorded anew.
    fn worked(&self, mark: Mark) -> Option<Worked> {
        let end = self.instant(mark.end)?;
        let start = mark
            .start
            .and_then(|start| self.instant(start))
            .unwrap_or(end);
        let upto = mark.seq;
        Some(Worked { upto, start, end })
    }
}

/// See the module.
pub(super) struct Watcher {
    progress: Arc<Progress>,
    marks: Option<Sender<Mark>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub(super) fn new(
        name: &str,
        context: Arc<Context>,
        shared: Arc<Shared>,
    ) -> std::io::Result<Self> {
        let (marks, expected) = unbounded::<Mark>();
        let progress = Arc::<Progress>::default();
        let theirs = Arc::clone(&progress);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                context.bind();
                for mark in expected {
                    match wait(mark) {
                        Ok(busy) => {
                            theirs.busy_ns.fetch_add(busy, Ordering::Relaxed);
                            let fault = shared.fault.get();
                            if fault > 0 {
                                let what = format!(
                                    "the token id at position {} is outside the vocabulary",
                                    fault - 1
                                );
                                shared.fail("a token id", what);
                            }
                        }
                        Err(error) => shared.fail("what ran on the device", error.to_string()),
                    }
                    if theirs.logs.load(Ordering::Relaxed) {
                        let mut log = theirs.log.lock().unwrap_or_else(PoisonError::into_inner);
                        let worked = log.base.as_ref().and_then(|base| base.worked(mark));
                        log.worked.extend(worked);
                    }
                    shared.heard();
                    theirs.done.store(mark.seq, Ordering::Release);
                    shared.notifier.notify();
                }
            })?;
        Ok(Self {
            progress,
            marks: Some(marks),
            thread: Some(thread),
        })
    }

    pub(super) fn expect(&self, mark: Mark) {
        if let Some(marks) = &self.marks {
            // The thread ends after the last mark was sent.
            let _ = marks.send(mark);
        }
    }

    /// What was worked since this was called last, told from `base`.
    pub(super) fn worked(&self, base: Option<Arc<Base>>) -> Vec<Worked> {
        let mut log = self
            .progress
            .log
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        log.base = base;
        self.progress.logs.store(true, Ordering::Relaxed);
        std::mem::take(&mut log.worked)
    }

    /// Operations that are done.
    pub(super) fn done(&self) -> u64 {
        self.progress.done.load(Ordering::Acquire)
    }

    /// Time from the starts of marks to their ends.
    pub(super) fn busy(&self) -> Duration {
        Duration::from_nanos(self.progress.busy_ns.load(Ordering::Relaxed))
    }

    /// Leaves the thread to itself: its device does not answer.
    pub(super) fn abandon(&mut self) {
        drop(self.marks.take());
        drop(self.thread.take());
    }

    /// Waits for all marks and ends the thread.
    pub(super) fn end(&mut self) {
        drop(self.marks.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for a mark; the nanoseconds since its start.
fn wait(mark: Mark) -> Result<u64, CudaError> {
    // SAFETY: events of this context; they are recorded anew only after this mark is done, and an end
    // that is lent only after the next one is.
    unsafe {
        check("cuEventSynchronize", sys::cuEventSynchronize(mark.end))?;
        let Some(start) = mark.start else {
            return Ok(0);
        };
        Ok((f64::from(elapsed(start, mark.end)?) * 1e6) as u64)
    }
}
