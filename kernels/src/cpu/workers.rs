//! A pool of own threads for work that is cut into chunks.
//!
//! Work often comes in a row, and to wake a thread takes as long as a small piece of it: threads look for more a
//! little while before they sleep.
//!
//! The caller's thread takes part. Which thread runs which chunk is left to chance, so work is cut
//! in a way that does not depend on the number of threads, and results do not either.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for more work before it sleeps: about what it takes to wake some.
const AWAKE: Duration = Duration::from_micros(50);

type Work = dyn Fn(usize, usize) + Sync;

/// A job as the workers see it. The pointer is valid while `running` may rise or is above zero.
#[derive(Clone, Copy)]
struct Job {
    work: *const Work,
    chunks: usize,
}

// SAFETY: the work is `Sync`, and `Workers::run` outlives every use of the pointer.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Counts jobs, so that a worker takes part in each once.
    number: u64,
    /// Workers inside the job.
    running: usize,
    panic: Option<Box<dyn Any + Send>>,
    closing: bool,
}

struct Pool {
    state: Mutex<State>,
    started: Condvar,
    finished: Condvar,
    next: AtomicUsize,
    /// [`State::number`] and [`State::running`], to be looked at without the lock.
    number: AtomicU64,
    running: AtomicUsize,
}

/// See the module. Dropping it ends its threads.
pub struct Workers {
    pool: Arc<Pool>,
    /// One job at a time; a second caller waits.
    turn: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// A pool that computes on `threads` threads (at least one), the caller's among them.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(threads: usize, name: &str) -> std::io::Result<Self> {
        let pool = Arc::new(Pool {
            state: Mutex::default(),
            started: Condvar::new(),
            finished: Condvar::new(),
            next: AtomicUsize::new(0),
            number: AtomicU64::new(0),
            running: AtomicUsize::new(0),
        });
        let mut workers = Self {
            pool,
            turn: Mutex::new(()),
            threads: Vec::new(),
        };
        for index in 1..threads.max(1) {
            let pool = Arc::clone(&workers.pool);
            let builder = std::thread::Builder::new().name(format!("{name}-{index}"));
            workers
                .threads
                .push(builder.spawn(move || serve(&pool, index))?);
        }
        Ok(workers)
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work(chunk, worker)` once for each chunk below `chunks`; returns when all are done.
    /// `worker` is below [`Workers::threads`], and no two calls with the same one run at once.
    /// Allocates nothing.
    ///
    /// # Panics
    /// With the panic of `work`, once every thread has left it.
    pub fn run(&self, chunks: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.threads.is_empty() || chunks <= 1 {
            (0..chunks).for_each(|chunk| work(chunk, 0));
            return;
        }
        // SAFETY: only the lifetime is forgotten; this function returns after the last use.
        let work: *const Work =
            unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), &'static Work>(work) };
        let job = Job { work, chunks };
        self.pool.next.store(0, Ordering::Relaxed);
        {
            let mut state = lock(&self.pool.state);
            state.job = Some(job);
            state.number += 1;
            self.pool.number.store(state.number, Ordering::Release);
        }
        self.pool.started.notify_all();
        // SAFETY: the work is alive: it was borrowed by this call.
        let mine = catch_unwind(AssertUnwindSafe(|| unsafe {
            take_part(&self.pool, job, 0)
        }));
        let mut state = lock(&self.pool.state);
        // From here on no worker begins; those inside are waited for.
        state.job = None;
        if state.running > 0 {
            drop(state);
            soon(|| self.pool.running.load(Ordering::Acquire) == 0);
            state = lock(&self.pool.state);
        }
        while state.running > 0 {
            state = self
                .pool
                .finished
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let theirs = state.panic.take();
        drop(state);
        if let Some(panic) = mine.err().or(theirs) {
            drop(_turn);
            resume_unwind(panic);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        lock(&self.pool.state).closing = true;
        self.pool.started.notify_all();
        for thread in self.threads.drain(..) {
            // Panics of work were caught and handed to the caller.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers on {} threads", self.threads())
    }
}

/// # Safety
/// The job's work is alive until this returns.
unsafe fn take_part(pool: &Pool, job: Job, worker: usize) {
    // SAFETY: by the contract above.
    let work = unsafe { &*job.work };
    loop {
        let chunk = pool.next.fetch_add(1, Ordering::Relaxed);
        if chunk >= job.chunks {
            return;
        }
        work(chunk, worker);
    }
}

fn serve(pool: &Pool, worker: usize) {
    let (mut seen, mut looked) = (0, true);
    let mut state = lock(&pool.state);
    loop {
        if state.closing {
            return;
        }
        let job = state.job.filter(|_| state.number != seen);
        let Some(job) = job else {
            if !looked {
                let number = state.number;
                drop(state);
                soon(|| pool.number.load(Ordering::Acquire) != number);
                state = lock(&pool.state);
                looked = true;
                continue;
            }
            state = pool
                .started
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        seen = state.number;
        looked = false;
        state.running += 1;
        pool.running.store(state.running, Ordering::Release);
        drop(state);
        // SAFETY: `running` was raised while the job stood, and `run` waits for it to fall.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { take_part(pool, job, worker) }));
        state = lock(&pool.state);
        state.running -= 1;
        pool.running.store(state.running, Ordering::Release);
        if let Err(panic) = result {
            state.panic.get_or_insert(panic);
        }
        if state.running == 0 {
            pool.finished.notify_all();
        }
    }
}

/// Looks again and again whether something holds, for a little while.
fn soon(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() && start.elapsed() < AWAKE {
        for _ in 0..8 {
            std::hint::spin_loop();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn each_chunk_runs_once_on_a_worker_of_its_own() {
        let workers = Workers::new(3, "test").unwrap();
        for chunks in [0, 1, 2, 7, 1000] {
            let seen: Vec<AtomicU32> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
            let busy: Vec<AtomicU32> = (0..3).map(|_| AtomicU32::new(0)).collect();
            workers.run(chunks, &|chunk, worker| {
                assert_eq!(busy[worker].fetch_add(1, Ordering::SeqCst), 0);
                seen[chunk].fetch_add(1, Ordering::SeqCst);
                busy[worker].fetch_sub(1, Ordering::SeqCst);
            });
            assert!(seen.iter().all(|s| s.load(Ordering::SeqCst) == 1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let workers = Workers::new(2, "test").unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            workers.run(50, &|chunk, _| assert_ne!(chunk, 31, "on purpose"));
        }));
        assert!(result.is_err());
        let count = AtomicU32::new(0);
        workers.run(50, &|_, _| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(count.load(Ordering::SeqCst), 50);
    }

    #[test]
    fn two_callers_take_turns() {
        let workers = Workers::new(2, "test").unwrap();
        let count = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        workers.run(5, &|_, _| {
                            count.fetch_add(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::SeqCst), 4000);
    }
}
