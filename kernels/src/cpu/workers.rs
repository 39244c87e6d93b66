//! A pool of own threads for work that is cut into chunks.
//!
//! Work often comes in a row, and to wake a thread takes as long as a small piece of it: threads look for more a
//! little while before they sleep.
//!
//! The caller's thread takes part. Which thread runs which chunk is left to chance, so work is cut
//! in a way that does not depend on the number of threads, and results do not either.
//!
//! Threads may be bound to a CPU each ([`Workers::bind`]), and what each did when may be looked at
//! ([`Workers::watch`]).

use std::any::Any;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::cores::{self, Binding, Cores};

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
    watch: OnceLock<Watch>,
}

/// What one worker did: from the beginning of its first chunk to the end of its last.
#[derive(Clone, Copy, Debug)]
pub struct Shift {
    /// Which worker; 0 is the thread that called [`Workers::run`].
    pub worker: usize,
    /// When its first chunk began.
    pub start: Instant,
    /// When its last chunk ended.
    pub end: Instant,
    /// Chunks that it took.
    pub chunks: u64,
}

/// A place for each worker to note its shift, which nobody else writes meanwhile.
struct Watch {
    base: Instant,
    shifts: Box<[Noted]>,
}

/// Nanoseconds since the base, on a line of the caches of its own. No chunks: no shift.
#[derive(Default)]
#[repr(align(128))]
struct Noted {
    start: AtomicU64,
    end: AtomicU64,
    chunks: AtomicU64,
}

impl Watch {
    fn note(&self, worker: usize, start: Instant, chunks: u64) {
        let since = |at: Instant| {
            let ns = at.saturating_duration_since(self.base).as_nanos();
            u64::try_from(ns).unwrap_or(u64::MAX)
        };
        let noted = &self.shifts[worker];
        let before = noted.chunks.load(Ordering::Relaxed);
        if before == 0 {
            noted.start.store(since(start), Ordering::Relaxed);
        }
        noted.end.store(since(Instant::now()), Ordering::Relaxed);
        noted.chunks.store(before + chunks, Ordering::Relaxed);
    }
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
            watch: OnceLock::new(),
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

    /// Binds each thread to a CPU of its own, in the order of [`Cores`], the first for `caller`: the thread that
    /// will call [`Workers::run`], this one if none is given. Where there are more threads than CPUs, or the
    /// system refuses one, all stay free.
    ///
    /// For a process that has these CPUs to itself: whoever else is bound to them, or works on them, slows the
    /// whole pool down.
    pub fn bind(&self, caller: Option<&JoinHandle<()>>) -> Binding {
        let allowed = match Cores::allowed() {
            Ok(allowed) => allowed,
            Err(error) => return Binding::Refused(error.to_string()),
        };
        let cpus = allowed.cpus();
        if cpus.len() < self.threads() {
            let (threads, cpus) = (self.threads(), cpus.len());
            return Binding::Refused(format!("{threads} threads on {cpus} CPUs"));
        }
        let cpus = &cpus[..self.threads()];
        // SAFETY: asks only who this is.
        let this = || unsafe { libc::pthread_self() };
        let caller = caller.map_or_else(this, JoinHandleExt::as_pthread_t);
        let own = self.threads.iter().map(JoinHandleExt::as_pthread_t);
        let threads = || std::iter::once(caller).chain(own.clone());
        for (thread, cpu) in threads().zip(cpus) {
            // SAFETY: this one, or one whose handle is borrowed.
            if let Err(error) = unsafe { cores::bind(thread, &[*cpu]) } {
                for thread in threads() {
                    // SAFETY: as above. What was refused was never bound.
                    let _ = unsafe { cores::bind(thread, allowed.cpus()) };
                }
                return Binding::Refused(format!("CPU {cpu}: {error}"));
            }
        }
        Binding::Bound(cpus.to_vec())
    }

    /// From here on each worker notes when it works, for [`Workers::shifts`]. Without it that costs nothing.
    pub fn watch(&self) {
        self.pool.watch.get_or_init(|| Watch {
            base: Instant::now(),
            shifts: (0..self.threads()).map(|_| Noted::default()).collect(),
        });
    }

    /// What each worker did since this was called last; for the thread that calls [`Workers::run`], behind it.
    pub fn shifts(&self, mut each: impl FnMut(Shift)) {
        let Some(watch) = self.pool.watch.get() else {
            return;
        };
        for (worker, noted) in watch.shifts.iter().enumerate() {
            let chunks = noted.chunks.swap(0, Ordering::Relaxed);
            if chunks > 0 {
                let at =
                    |ns: &AtomicU64| watch.base + Duration::from_nanos(ns.load(Ordering::Relaxed));
                each(Shift {
                    worker,
                    start: at(&noted.start),
                    end: at(&noted.end),
                    chunks,
                });
            }
        }
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
            let start = self.pool.watch.get().map(|watch| (watch, Instant::now()));
            (0..chunks).for_each(|chunk| work(chunk, 0));
            if let Some((watch, start)) = start.filter(|_| chunks > 0) {
                watch.note(0, start, chunks as u64);
            }
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
    let watch = pool.watch.get();
    let (mut start, mut chunks) = (None, 0);
    loop {
        let chunk = pool.next.fetch_add(1, Ordering::Relaxed);
        if chunk >= job.chunks {
            break;
        }
        if chunks == 0 {
            start = watch.map(|watch| (watch, Instant::now()));
        }
        work(chunk, worker);
        chunks += 1;
    }
    if let Some((watch, start)) = start {
        watch.note(worker, start, chunks);
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
    fn shifts_say_who_took_which_part_and_lie_within_the_call() {
        let workers = Workers::new(3, "test").unwrap();
        let mut shifts = Vec::new();
        workers.run(5, &|_, _| ());
        workers.shifts(|shift| shifts.push(shift));
        assert!(shifts.is_empty(), "nobody watched");
        workers.watch();
        for chunks in [1, 60] {
            let taken = [0; 3].map(AtomicU64::new);
            let start = Instant::now();
            // Two jobs of one piece of work.
            for _ in 0..2 {
                workers.run(chunks, &|_, worker| {
                    taken[worker].fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(200));
                });
            }
            let end = Instant::now();
            shifts.clear();
            workers.shifts(|shift| shifts.push(shift));
            for (worker, taken) in taken.iter().map(|t| t.load(Ordering::Relaxed)).enumerate() {
                let shift = shifts.iter().find(|shift| shift.worker == worker);
                assert_eq!(shift.map_or(0, |shift| shift.chunks), taken);
                let Some(shift) = shift else { continue };
                assert!(start <= shift.start && shift.end <= end, "{shift:?}");
                assert!(shift.end - shift.start >= Duration::from_micros(200) * taken as u32);
            }
            workers.shifts(|shift| panic!("{shift:?} was told already"));
        }
    }

    #[test]
    fn bound_threads_run_on_a_cpu_each_and_the_caller_is_free_where_another_thread_calls() {
        let all = Cores::allowed().unwrap();
        let threads = all.cpus().len();
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let caller = std::thread::spawn(move || {
            let _ = held.recv();
            assert_eq!(Cores::allowed().unwrap().cpus().len(), 1);
        });
        let workers = Workers::new(threads, "test").unwrap();
        let bound = workers.bind(Some(&caller));
        assert_eq!(bound, Binding::Bound(all.cpus().to_vec()));
        assert_eq!(Cores::allowed().unwrap(), all, "this thread is as it was");
        workers.run(1000, &|_, worker| {
            if worker > 0 {
                // SAFETY: no memory is touched.
                assert_eq!(unsafe { libc::sched_getcpu() }, all.cpus()[worker] as i32);
            }
        });
        drop(hold);
        caller.join().unwrap();
        // More threads than CPUs.
        let workers = Workers::new(threads + 1, "test").unwrap();
        let refused = workers.bind(None);
        assert!(matches!(refused, Binding::Refused(_)), "{refused}");
        assert_eq!(Cores::allowed().unwrap(), all);
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
