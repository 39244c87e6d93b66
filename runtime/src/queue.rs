//! Work in order on a thread of its own: the streams of the `host` device, and the lane of the
//! CPU optimizer.
//!
//! A [`WorkQueue`] runs tasks one after another in the order in which they were pushed. The n-th
//! task pushed is [`Seq`] n, and is complete once the queue's counter has reached n: an event
//! costs nothing. Tasks are closures stored inline, so that pushing one allocates nothing. The
//! first failure sticks: what comes after it is skipped, and whoever asks is told.

use std::mem::{MaybeUninit, size_of};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;

/// The position of a task in its queue; the first is 1.
pub(crate) type Seq = u64;

/// What a queue or stream did up to some place, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Worked {
    /// The last task of it.
    pub(crate) upto: Seq,
    pub(crate) start: Instant,
    pub(crate) end: Instant,
}

/// A failure that a queue remembers.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) operation: &'static str,
    pub(crate) what: String,
}

/// Wakes whoever waits for completions of any kind.
#[derive(Debug, Default)]
pub(crate) struct Notifier {
    signalled: Mutex<bool>,
    condition: Condvar,
}

impl Notifier {
    pub(crate) fn notify(&self) {
        *lock(&self.signalled) = true;
        self.condition.notify_one();
    }

    /// Sleeps until the next notification, or one since the last wait, or the timeout.
    pub(crate) fn wait(&self, timeout: Duration) {
        let mut signalled = lock(&self.signalled);
        if !*signalled {
            signalled = self
                .condition
                .wait_timeout(signalled, timeout)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *signalled = false;
    }
}

const TASK_WORDS: usize = 112;
/// The name of a task that only waits.
const WAIT: &str = "wait";

/// A closure in place, called at most once.
struct Task {
    name: &'static str,
    storage: [MaybeUninit<u64>; TASK_WORDS],
    /// Takes the closure out of the storage, and runs it if told to.
    call: unsafe fn(*mut u8, bool) -> Result<(), String>,
    taken: bool,
}

impl Task {
    fn new<F>(name: &'static str, work: F) -> Self
    where
        F: FnOnce() -> Result<(), String> + Send + 'static,
    {
        const {
            assert!(
                size_of::<F>() <= TASK_WORDS * 8,
                "a task captures too much to be stored inline"
            );
            assert!(align_of::<F>() <= align_of::<u64>());
        }
        /// # Safety
        /// `place` holds an initialized `F`, which this call takes out.
        unsafe fn call<F: FnOnce() -> Result<(), String>>(
            place: *mut u8,
            run: bool,
        ) -> Result<(), String> {
            // SAFETY: by the contract above, and `Task::taken` keeps it to one call.
            let work = unsafe { place.cast::<F>().read() };
            if run { work() } else { Ok(()) }
        }
        let mut task = Self {
            name,
            storage: [MaybeUninit::uninit(); TASK_WORDS],
            call: call::<F>,
            taken: false,
        };
        // SAFETY: size and alignment were checked above.
        unsafe { task.storage.as_mut_ptr().cast::<F>().write(work) };
        task
    }

    fn take(&mut self, run: bool) -> Result<(), String> {
        assert!(
            !std::mem::replace(&mut self.taken, true),
            "a task runs once"
        );
        // SAFETY: `new` wrote the closure that `call` was made for, and it was not taken before.
        unsafe { (self.call)(self.storage.as_mut_ptr().cast(), run) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.taken {
            // Taking without running drops the closure.
            let _ = self.take(false);
        }
    }
}

// SAFETY: only closures that are `Send` are stored (bound of `Task::new`).
unsafe impl Send for Task {}

struct Shared {
    tasks: ArrayQueue<Task>,
    /// Guards sleeping only; the work itself goes through the lock-free queue.
    sleep: Mutex<()>,
    pushed: Condvar,
    finished: Condvar,
    done: AtomicU64,
    busy_ns: AtomicU64,
    waited_ns: AtomicU64,
    closing: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
    /// What was worked, once somebody asked for it.
    log: Mutex<Option<Vec<Worked>>>,
    logs: AtomicBool,
    notifier: Arc<Notifier>,
}

impl Shared {
    fn reached(&self, seq: Seq) -> bool {
        self.done.load(Ordering::Acquire) >= seq
    }

    fn wait(&self, seq: Seq) {
        let mut guard = lock(&self.sleep);
        while !self.reached(seq) {
            guard = self
                .finished
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// See the module.
pub(crate) struct WorkQueue {
    shared: Arc<Shared>,
    pushed: Seq,
    thread: Option<JoinHandle<()>>,
}

/// A cheap handle by which another thread can wait for a queue's progress.
#[derive(Clone)]
pub(crate) struct Progress(Arc<Shared>);

impl Progress {
    /// Blocks until task `seq` of the queue is complete.
    pub(crate) fn wait(&self, seq: Seq) {
        self.0.wait(seq);
    }
}

impl WorkQueue {
    /// Starts the thread. At most `depth` tasks wait; `push` blocks beyond.
    pub(crate) fn new(name: &str, depth: usize, notifier: Arc<Notifier>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            tasks: ArrayQueue::new(depth),
            sleep: Mutex::new(()),
            pushed: Condvar::new(),
            finished: Condvar::new(),
            done: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            waited_ns: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            log: Mutex::new(None),
            logs: AtomicBool::new(false),
            notifier,
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&theirs))?;
        Ok(Self {
            shared,
            pushed: 0,
            thread: Some(thread),
        })
    }

    /// Queues `work` and says where it stands.
    pub(crate) fn push<F>(&mut self, name: &'static str, work: F) -> Seq
    where
        F: FnOnce() -> Result<(), String> + Send + 'static,
    {
        let mut task = Task::new(name, work);
        while let Err(back) = self.shared.tasks.push(task) {
            task = back;
            // Full: wait until at least one more is done.
            let guard = lock(&self.shared.sleep);
            if self.shared.tasks.is_full() {
                let (guard, _) = self
                    .shared
                    .finished
                    .wait_timeout(guard, Duration::from_millis(5))
                    .unwrap_or_else(PoisonError::into_inner);
                drop(guard);
            }
        }
        self.pushed += 1;
        drop(lock(&self.shared.sleep));
        self.shared.pushed.notify_one();
        self.pushed
    }

    /// Queues a wait: what is pushed from here on starts after task `seq` of `other`. The wait is
    /// not counted as busy time.
    pub(crate) fn push_wait(&mut self, other: Progress, seq: Seq) -> Seq {
        let own = Arc::clone(&self.shared);
        self.push(WAIT, move || {
            let start = Instant::now();
            other.wait(seq);
            let waited = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            own.waited_ns.fetch_add(waited, Ordering::Relaxed);
            Ok(())
        })
    }

    /// The thread.
    pub(crate) fn thread(&self) -> Option<&JoinHandle<()>> {
        self.thread.as_ref()
    }

    /// The position of the newest task.
    pub(crate) fn newest(&self) -> Seq {
        self.pushed
    }

    /// Whether task `seq` is complete (or was skipped after a failure).
    pub(crate) fn reached(&self, seq: Seq) -> bool {
        self.shared.reached(seq)
    }

    /// A handle to wait for this queue from another thread.
    pub(crate) fn progress(&self) -> Progress {
        Progress(Arc::clone(&self.shared))
    }

    /// Blocks until all that was pushed is complete.
    pub(crate) fn drain(&self) {
        self.shared.wait(self.pushed);
    }

    /// Time spent inside tasks so far, waits for other queues not counted.
    pub(crate) fn busy(&self) -> Duration {
        let waited = self.shared.waited_ns.load(Ordering::Relaxed);
        Duration::from_nanos(
            self.shared
                .busy_ns
                .load(Ordering::Relaxed)
                .saturating_sub(waited),
        )
    }

    /// What was worked since this was called last; from the first call on it is kept for it.
    pub(crate) fn worked(&self) -> Vec<Worked> {
        self.shared.logs.store(true, Ordering::Relaxed);
        let kept = lock(&self.shared.log).replace(Vec::new());
        kept.unwrap_or_default()
    }

    /// The first failure, if there was one.
    pub(crate) fn failure(&self) -> Option<Failure> {
        if self.shared.failed.load(Ordering::Acquire) {
            lock(&self.shared.failure).clone()
        } else {
            None
        }
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        drop(lock(&self.shared.sleep));
        self.shared.pushed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic inside a task was caught; the thread itself has nothing to say.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for WorkQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let done = self.shared.done.load(Ordering::Relaxed);
        write!(f, "WorkQueue {done} of {} done", self.pushed)
    }
}

fn run(shared: &Shared) {
    loop {
        let Some(mut task) = shared.tasks.pop() else {
            let guard = lock(&shared.sleep);
            if !shared.tasks.is_empty() {
                continue;
            }
            if shared.closing.load(Ordering::Acquire) {
                return;
            }
            drop(
                shared
                    .pushed
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
            );
            continue;
        };
        if !shared.failed.load(Ordering::Relaxed) {
            execute(shared, &mut task);
        }
        drop(task);
        shared.done.fetch_add(1, Ordering::Release);
        drop(lock(&shared.sleep));
        shared.finished.notify_all();
        shared.notifier.notify();
    }
}

fn execute(shared: &Shared, task: &mut Task) {
    let start = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| task.take(true))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(format!("panicked: {text}"))
    });
    if let Err(what) = result {
        *lock(&shared.failure) = Some(Failure {
            operation: task.name,
            what,
        });
        shared.failed.store(true, Ordering::Release);
    }
    let end = Instant::now();
    let busy = u64::try_from((end - start).as_nanos()).unwrap_or(u64::MAX);
    shared.busy_ns.fetch_add(busy, Ordering::Relaxed);
    if shared.logs.load(Ordering::Relaxed)
        && task.name != WAIT
        && let Some(log) = &mut *lock(&shared.log)
    {
        let upto = shared.done.load(Ordering::Relaxed) + 1;
        log.push(Worked { upto, start, end });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(depth: usize) -> WorkQueue {
        WorkQueue::new("test", depth, Arc::new(Notifier::default())).unwrap()
    }

    #[test]
    fn tasks_run_in_order_and_a_full_queue_waits() {
        let mut queue = queue(2);
        let seen = Arc::new(Mutex::new(Vec::new()));
        for i in 0..50 {
            let seen = Arc::clone(&seen);
            queue.push("note", move || {
                seen.lock().unwrap().push(i);
                Ok(())
            });
        }
        queue.drain();
        assert_eq!(*seen.lock().unwrap(), (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_failure_sticks_and_the_rest_is_skipped() {
        let mut queue = queue(8);
        let ran = Arc::new(AtomicBool::new(false));
        queue.push("good", || Ok(()));
        queue.push("bad", || panic!("on purpose"));
        let flag = Arc::clone(&ran);
        queue.push("after", move || {
            flag.store(true, Ordering::SeqCst);
            Ok(())
        });
        queue.drain();
        let failure = queue.failure().unwrap();
        assert_eq!(
            (failure.operation, failure.what.as_str()),
            ("bad", "panicked: on purpose")
        );
        assert!(!ran.load(Ordering::SeqCst));
    }

    #[test]
    fn a_queue_dropped_early_still_runs_what_it_was_given() {
        let count = Arc::new(AtomicU64::new(0));
        let mut queue = queue(64);
        for _ in 0..64 {
            let count = Arc::clone(&count);
            queue.push("count", move || {
                count.fetch_add(1, Ordering::SeqCst);
                Ok(())
            });
        }
        drop(queue);
        assert_eq!(count.load(Ordering::SeqCst), 64);
        assert_eq!(Arc::strong_count(&count), 1, "every closure was dropped");
    }
}
