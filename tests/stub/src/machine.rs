//! Streams, events, and the thread that runs what is queued: late, and in any order that they allow.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::call::{Done, Needs, code};
use crate::memory::Memory;
use crate::settings::{Random, Settings};
use crate::source::Signature;

/// The one device.
pub(crate) struct Machine {
    state: Mutex<State>,
    /// Something was queued.
    queued: Condvar,
    /// An event was reached, a stream ran empty, the device was lost.
    progress: Condvar,
}

/// The device; its thread starts with the first call.
pub(crate) fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    static STARTED: OnceLock<()> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| Machine {
        state: Mutex::new(State::new(Settings::environment())),
        queued: Condvar::new(),
        progress: Condvar::new(),
    });
    STARTED.get_or_init(|| {
        let thread = std::thread::Builder::new().name("cuda-stub".to_owned());
        let started = thread.spawn(|| machine.run());
        assert!(started.is_ok(), "the stub's thread cannot be started");
    });
    machine
}

/// One recording of an event.
#[derive(Default)]
pub(crate) struct Record {
    reached: OnceLock<Instant>,
    /// Let go by new settings, not reached.
    dropped: AtomicBool,
}

impl Record {
    fn over(&self) -> bool {
        self.reached.get().is_some() || self.dropped.load(Ordering::Relaxed)
    }
}

type Work = Box<dyn FnOnce() -> Result<(), Fault> + Send>;

/// Why an operation failed, and with it the device.
pub(crate) struct Fault {
    pub(crate) code: i32,
    pub(crate) what: String,
}

enum Op {
    Work {
        work: Work,
        /// Host memory that it touches.
        host: Option<(u64, u64)>,
    },
    Record(Arc<Record>),
    Wait(Arc<Record>),
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Op>,
    busy: bool,
    host: Option<(u64, u64)>,
}

#[derive(Default)]
struct Event {
    newest: Option<Arc<Record>>,
    timed: bool,
}

/// How this seed runs things.
struct Temper {
    /// Of so many pauses one is taken, of up to so many microseconds.
    pause: (u64, u64),
    /// About so many operations in a row come from one stream, if they can.
    burst: u64,
}

/// Everything, under one lock.
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) memory: Memory,
    pub(crate) executed: u64,
    pub(crate) violations: u64,
    pub(crate) modules: BTreeMap<u64, Vec<Arc<Signature>>>,
    /// Never forgotten: handles stay what they are.
    pub(crate) functions: Vec<Arc<Signature>>,
    pub(crate) retained: u64,
    /// The last kernel that was asked for and is not here, or what the device was lost for.
    pub(crate) detail: String,
    lost: Option<i32>,
    counts: HashMap<&'static str, u64>,
    streams: BTreeMap<u64, Stream>,
    events: HashMap<u64, Event>,
    handle: u64,
    random: Random,
    temper: Temper,
    favourite: Option<u64>,
}

impl State {
    fn new(settings: Settings) -> Self {
        let mut random = Random(settings.seed);
        let temper = Temper {
            pause: [(256, 100), (64, 300), (16, 200), (64, 2000)][random.below(4) as usize],
            burst: [1, 3, 16, 200][random.below(4) as usize],
        };
        Self {
            memory: Memory::default(),
            executed: 0,
            violations: 0,
            modules: BTreeMap::new(),
            functions: Vec::new(),
            retained: 0,
            detail: String::new(),
            lost: None,
            counts: HashMap::new(),
            // The null stream is always there.
            streams: BTreeMap::from([(0, Stream::default())]),
            events: HashMap::new(),
            handle: 1 << 20,
            random,
            temper,
            favourite: None,
            settings,
        }
    }

    /// Counts a call and says whether it may go on.
    pub(crate) fn enter(&mut self, function: &'static str, needs: Needs, current: bool) -> Done {
        let count = self.counts.entry(function).or_default();
        *count += 1;
        let (nth, fail) = (*count, &self.settings.fail);
        if let Some(fail) = fail.iter().find(|f| f.function == function && f.nth == nth) {
            return Err(fail.code);
        }
        match (needs, self.lost) {
            (Needs::Device | Needs::Context, Some(code)) => Err(code),
            (Needs::Context, None) if !current => Err(code::INVALID_CONTEXT),
            _ => Ok(()),
        }
    }

    /// Counts something that is no call.
    pub(crate) fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub(crate) fn count(&self, function: &str) -> u64 {
        self.counts.get(function).copied().unwrap_or(0)
    }

    pub(crate) fn objects(&self) -> u64 {
        let all = self.streams.len() - 1 + self.events.len() + self.modules.len();
        all as u64 + self.retained
    }

    pub(crate) fn lost(&self) -> Option<i32> {
        self.lost
    }

    pub(crate) fn violation(&mut self, what: &str) {
        self.violations += 1;
        eprintln!("cuda stub: {what}");
    }

    pub(crate) fn new_handle(&mut self) -> u64 {
        self.handle += 16;
        self.handle
    }

    pub(crate) fn new_stream(&mut self) -> u64 {
        let handle = self.new_handle();
        self.streams.insert(handle, Stream::default());
        handle
    }

    pub(crate) fn end_stream(&mut self, stream: u64) -> Done {
        let queued = self.stream(stream)?;
        if !queued.queue.is_empty() || queued.busy {
            self.violation("a stream is destroyed with work queued");
        }
        self.streams.remove(&stream);
        Ok(())
    }

    fn stream(&mut self, stream: u64) -> Result<&mut Stream, i32> {
        self.streams.get_mut(&stream).ok_or(code::INVALID_HANDLE)
    }

    /// Queues work; `host` is the page-locked memory that it touches.
    pub(crate) fn push(
        &mut self,
        stream: u64,
        host: Option<(u64, u64)>,
        work: impl FnOnce() -> Result<(), Fault> + Send + 'static,
    ) -> Done {
        let work = Box::new(work);
        let stream = self.stream(stream)?;
        stream.queue.push_back(Op::Work { work, host });
        machine().queued.notify_one();
        Ok(())
    }

    pub(crate) fn new_event(&mut self, timed: bool) -> u64 {
        let handle = self.new_handle();
        let newest = None;
        self.events.insert(handle, Event { newest, timed });
        handle
    }

    pub(crate) fn end_event(&mut self, event: u64) -> Done {
        let known = self.events.remove(&event);
        known.map(|_| ()).ok_or(code::INVALID_HANDLE)
    }

    pub(crate) fn record(&mut self, event: u64, stream: u64) -> Done {
        let record = Arc::<Record>::default();
        if self.settings.early_events {
            let _ = record.reached.set(Instant::now());
        }
        let known = self.events.get_mut(&event).ok_or(code::INVALID_HANDLE)?;
        known.newest = Some(Arc::clone(&record));
        self.stream(stream)?.queue.push_back(Op::Record(record));
        machine().queued.notify_one();
        Ok(())
    }

    /// The newest recording of an event, if it was ever recorded.
    pub(crate) fn newest(&self, event: u64) -> Result<Option<Arc<Record>>, i32> {
        let known = self.events.get(&event).ok_or(code::INVALID_HANDLE)?;
        Ok(known.newest.clone())
    }

    pub(crate) fn wait_event(&mut self, stream: u64, event: u64) -> Done {
        let record = self.newest(event)?;
        let ignored = self.settings.ignore_waits;
        let stream = self.stream(stream)?;
        if let Some(record) = record.filter(|_| !ignored) {
            stream.queue.push_back(Op::Wait(record));
            machine().queued.notify_one();
        }
        Ok(())
    }

    /// Milliseconds between two events.
    pub(crate) fn elapsed(&self, start: u64, end: u64) -> Result<f32, i32> {
        let when = |event| {
            let known = self.events.get(&event).ok_or(code::INVALID_HANDLE)?;
            let record = known.newest.as_ref().filter(|_| known.timed);
            let record = record.ok_or(code::INVALID_HANDLE)?;
            record.reached.get().copied().ok_or(code::NOT_READY)
        };
        let (start, end) = (when(start)?, when(end)?);
        let forward = end.saturating_duration_since(start).as_secs_f32();
        Ok((forward - start.saturating_duration_since(end).as_secs_f32()) * 1e3)
    }

    pub(crate) fn is_empty(&self, stream: u64) -> Result<bool, i32> {
        let stream = self.streams.get(&stream).ok_or(code::INVALID_HANDLE)?;
        Ok(stream.queue.is_empty() && !stream.busy)
    }

    pub(crate) fn all_empty(&self) -> bool {
        self.streams.values().all(|s| s.queue.is_empty() && !s.busy)
    }

    /// Whether anything that is queued touches this host memory.
    pub(crate) fn in_use(&self, address: u64, bytes: u64) -> bool {
        let touches = |host: &Option<(u64, u64)>| {
            host.is_some_and(|(at, n)| at < address + bytes && address < at + n)
        };
        self.streams.values().any(|stream| {
            touches(&stream.host)
                || stream.queue.iter().any(|op| match op {
                    Op::Work { host, .. } => touches(host),
                    _ => false,
                })
        })
    }

    fn lose(&mut self, code: i32, what: &str) {
        if self.lost.is_none() {
            self.lost = Some(code);
            self.detail = what.to_owned();
        }
        // Nothing touches anything any more.
        self.streams.values_mut().for_each(|s| s.queue.clear());
    }

    /// A stream whose next operation may run.
    fn pick(&mut self) -> Option<u64> {
        if self.settings.stop.is_some_and(|stop| self.executed >= stop) {
            return None;
        }
        // What is reached is waited for no more.
        for stream in self.streams.values_mut() {
            while matches!(stream.queue.front(), Some(Op::Wait(record)) if record.over()) {
                stream.queue.pop_front();
                machine().progress.notify_all();
            }
        }
        let ready = |s: &Stream| matches!(s.queue.front(), Some(Op::Work { .. } | Op::Record(_)));
        let able: Vec<u64> = self
            .streams
            .iter()
            .filter_map(|(id, s)| ready(s).then_some(*id))
            .collect();
        if able.is_empty() {
            return None;
        }
        if let Some(same) = self.favourite.filter(|f| able.contains(f))
            && self.random.below(self.temper.burst) > 0
        {
            return Some(same);
        }
        self.favourite = Some(able[self.random.below(able.len() as u64) as usize]);
        self.favourite
    }

    fn pause(&mut self) -> Option<Duration> {
        let (often, longest) = self.temper.pause;
        let pause = self.random.below(often) == 0;
        pause.then(|| Duration::from_micros(self.random.below(longest)))
    }
}

impl Machine {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New settings; what stands is kept, what is queued is dropped, whoever waits is let go.
    pub(crate) fn configure(&self, settings: &str) {
        let mut state = self.lock();
        let old = std::mem::replace(&mut *state, State::new(Settings::parse(settings)));
        for record in old.events.values().filter_map(|e| e.newest.as_ref()) {
            record.dropped.store(true, Ordering::Relaxed);
        }
        for op in old.streams.values().flat_map(|s| &s.queue) {
            if let Op::Record(record) | Op::Wait(record) = op {
                record.dropped.store(true, Ordering::Relaxed);
            }
        }
        state.memory = old.memory;
        state.modules = old.modules;
        state.functions = old.functions;
        state.retained = old.retained;
        state.events = old.events;
        state.handle = old.handle;
        for (id, stream) in old.streams {
            let (busy, host) = (stream.busy, stream.host);
            let queue = VecDeque::new();
            state.streams.insert(id, Stream { queue, busy, host });
        }
        drop(state);
        self.queued.notify_one();
        self.progress.notify_all();
    }

    /// Blocks until `over`, or the device is lost: then the code.
    pub(crate) fn wait_until(&self, over: impl Fn(&State) -> bool) -> Done {
        let mut state = self.lock();
        loop {
            if let Some(code) = state.lost {
                return Err(code);
            }
            if over(&state) {
                return Ok(());
            }
            let waited = self.progress.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn wait_for(&self, record: &Record) -> Done {
        self.wait_until(|_| record.over())
    }

    pub(crate) fn query(record: &Record) -> Done {
        if record.over() {
            Ok(())
        } else {
            Err(code::NOT_READY)
        }
    }

    fn run(&self) {
        loop {
            let mut state = self.lock();
            while state.pick().is_none() {
                let waited = self.queued.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
            if let Some(pause) = state.pause() {
                drop(state);
                std::thread::sleep(pause);
                state = self.lock();
            }
            if let Some(stream) = state.pick() {
                self.step(state, stream);
            }
        }
    }

    /// Runs the first operation of a stream.
    fn step(&self, mut state: MutexGuard<'_, State>, id: u64) {
        let Ok(stream) = state.stream(id) else { return };
        let mut done = Ok(());
        match stream.queue.pop_front() {
            Some(Op::Record(record)) => {
                let _ = record.reached.set(Instant::now());
                drop(state);
            }
            Some(Op::Work { work, host }) => {
                (stream.busy, stream.host) = (true, host);
                drop(state);
                done = work();
                let mut state = self.lock();
                // New settings count from their own beginning; this may be from before them.
                state.executed += 1;
                if let Ok(stream) = state.stream(id) {
                    (stream.busy, stream.host) = (false, None);
                }
                let lose = state.settings.lose;
                if let Some((nth, code)) = lose.filter(|(nth, _)| state.executed == *nth) {
                    state.lose(code, &format!("lost at operation {nth} on purpose"));
                }
                let more = state.streams.get(&id).is_some_and(|s| !s.queue.is_empty());
                if more && state.lost.is_none() && done.is_ok() {
                    return;
                }
            }
            _ => return,
        }
        if let Err(Fault { code, what }) = done {
            eprintln!("cuda stub: {what}");
            self.lock().lose(code, &what);
        }
        self.progress.notify_all();
    }
}
