//! Buffers and files over the life of a store: dropped, cancelled, timed out or panicked with I/O in
//! flight, and opened and closed many times. Run under AddressSanitizer too (`.ci/asan.sh`).
//! FOREBAY_CYCLES sets the number of openings.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forebay_nvme::io::{Completion, Io, IoOp, Region, Request, Wake};
use forebay_nvme::medium::{Access, IoMaker, Medium, Volume};
use forebay_nvme::{Error, Key, Layout, Options, StateKind, Store, Tuning};
use forebay_pinned::Arena;

const BYTES: u64 = 3 << 20;

fn key(section: u32) -> Key {
    Key {
        section,
        state: StateKind::Optim,
        part: 0,
    }
}

fn layout() -> Layout {
    Layout::new("m", 1, (0..8).map(|s| (key(s), BYTES, "s")))
}

/// A disk on a thread of its own that answers late: after `delay`, or never.
#[derive(Clone, Debug)]
struct Late {
    delay: Duration,
    bytes: Arc<Mutex<Vec<u8>>>,
    /// While set, nothing is answered.
    silent: Arc<Mutex<bool>>,
    /// Requests that it was given in its life.
    asked: Arc<AtomicUsize>,
    panics: Arc<Mutex<bool>>,
}

impl Late {
    fn new(delay: Duration) -> Self {
        Self {
            delay,
            bytes: Arc::default(),
            silent: Arc::default(),
            asked: Arc::default(),
            panics: Arc::default(),
        }
    }
}

impl Medium for Late {
    fn open(&self, folders: &[PathBuf], _: Access) -> Result<Box<dyn Volume>, Error> {
        let path = folders[0].clone();
        Ok(Box::new(LateVolume(self.clone(), path)))
    }
}

struct LateVolume(Late, PathBuf);

impl Volume for LateVolume {
    fn path(&self, _: usize) -> &Path {
        &self.1
    }
    fn len(&self, _: usize) -> std::io::Result<u64> {
        Ok(self.0.bytes.lock().unwrap().len() as u64)
    }
    fn free(&self, _: usize) -> Result<u64, Error> {
        Ok(1 << 40)
    }
    fn reserve(&mut self, _: usize, bytes: u64) -> Result<(), Error> {
        let mut all = self.0.bytes.lock().unwrap();
        let len = all.len().max(bytes as usize);
        all.resize(len, 0);
        Ok(())
    }
    fn sync_names(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn io(&self, _: Option<Region>, _: Tuning) -> std::io::Result<IoMaker> {
        let late = self.0.clone();
        Ok(Box::new(move || {
            Ok(Box::new(LateIo {
                late,
                pending: VecDeque::new(),
            }))
        }))
    }
}

struct LateIo {
    late: Late,
    pending: VecDeque<(Instant, Request)>,
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl Io for LateIo {
    unsafe fn submit(&mut self, request: Request) -> bool {
        let delay = match request.op {
            IoOp::Sync => Duration::ZERO,
            _ => self.late.delay,
        };
        self.pending.push_back((Instant::now() + delay, request));
        self.late.asked.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        let until = Instant::now()
            + timeout
                .unwrap_or(Duration::from_millis(1))
                .min(Duration::from_millis(1));
        let due = self.pending.front().map(|p| p.0);
        let until = due.map_or(until, |due| due.min(until));
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        if *self.late.silent.lock().unwrap() {
            return;
        }
        let several = self.pending.len() > 4;
        assert!(
            !(several && *self.late.panics.lock().unwrap()),
            "panics on purpose"
        );
        while self.pending.front().is_some_and(|p| p.0 <= Instant::now()) {
            let (_, request) = self.pending.pop_front().unwrap();
            let (start, len) = (request.offset as usize, request.len as usize);
            let mut all = self.late.bytes.lock().unwrap();
            // SAFETY: the owner keeps the memory until the completion. If it did not, this is where
            // the sanitizer would see it.
            unsafe {
                match request.op {
                    IoOp::Read => request.memory.copy_from(all[start..].as_ptr(), len),
                    IoOp::Write => all[start..].as_mut_ptr().copy_from(request.memory, len),
                    IoOp::Sync => {}
                }
            }
            completions.push(Completion {
                id: request.id,
                result: request.len as i32,
            });
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }

    fn describe(&self) -> String {
        "late".into()
    }
}

fn store(late: &Late, arena: &Arena) -> Store {
    patient_store(late, arena, Duration::from_millis(300))
}

fn patient_store(late: &Late, arena: &Arena, stall: Duration) -> Store {
    let options = Options {
        medium: Arc::new(late.clone()),
        prewrite: false,
        stall,
        close: Duration::from_millis(200),
        ..Options::new(["late"])
    };
    Store::create(arena, &layout(), &options).unwrap()
}

/// Starts writes of all keys.
fn start(store: &mut Store, arena: &Arena) {
    for section in 0..8 {
        let mut slab = arena.lease(BYTES).unwrap();
        slab.fill(section as u8 + 1);
        store.write(key(section), slab).unwrap();
    }
}

#[test]
fn dropped_with_io_in_flight_it_waits_for_the_memory() {
    let late = Late::new(Duration::from_millis(5));
    let arena = Arena::new(8 * BYTES).unwrap();
    let mut all = store(&late, &arena);
    start(&mut all, &arena);
    drop(all);
    assert_eq!(
        arena.used(),
        0,
        "every slab came back, none before its completion"
    );
    let bytes = late.bytes.lock().unwrap();
    let written = (1..=8u8).all(|n| bytes.chunks(4096).any(|c| c.iter().all(|b| *b == n)));
    assert!(written, "what was asked was done");
}

#[test]
fn a_cancelled_transfer_ends_when_the_disk_has_let_go_of_its_memory() {
    let late = Late::new(Duration::ZERO);
    let arena = Arena::new(8 * BYTES).unwrap();
    let mut store = patient_store(&late, &arena, Duration::from_secs(60));
    *late.silent.lock().unwrap() = true;
    let before = late.asked.load(Ordering::Relaxed);
    start(&mut store, &arena);
    // The queue is 32 deep and these are 24 requests: the disk has all of them, and answers none.
    let begin = Instant::now();
    while late.asked.load(Ordering::Relaxed) < before + 24 {
        assert!(begin.elapsed() < Duration::from_secs(30), "not all asked");
        std::thread::yield_now();
    }
    (0..8).for_each(|section| store.cancel(key(section)));
    // Time for the disk's owner to see it, and to do the wrong thing.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(
        arena.used(),
        8 * BYTES,
        "nothing is free while the disk may write"
    );
    *late.silent.lock().unwrap() = false;
    let (mut cancelled, mut done) = (0, 0);
    for _ in 0..8 {
        match store.wait() {
            Ok(_) => done += 1,
            Err(Error::Cancelled { .. }) => cancelled += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(cancelled + done, 8);
    assert!(cancelled > 0);
    assert_eq!(arena.used(), 0);
    // And the store goes on.
    start(&mut store, &arena);
    (0..8).for_each(|_| drop(store.wait().unwrap()));
    store.publish("").unwrap();
}

#[test]
fn a_disk_that_never_answers_is_an_error_in_time_and_keeps_the_memory() {
    let late = Late::new(Duration::ZERO);
    let arena = Arena::new(8 * BYTES).unwrap();
    let mut all = store(&late, &arena);
    *late.silent.lock().unwrap() = true;
    start(&mut all, &arena);
    let begin = Instant::now();
    let error = loop {
        match all.wait() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, Error::Stalled { requests, .. } if requests > 0),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert!(all.publish("").is_err());
    let begin = Instant::now();
    drop(all);
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "closing is bounded"
    );
    assert!(
        arena.used() >= BYTES,
        "what the disk may still touch is never leased again"
    );
}

#[test]
fn closing_gives_up_after_its_deadline() {
    // Slower than the patience of closing, quicker than that for a stall.
    let late = Late::new(Duration::from_millis(250));
    let arena = Arena::new(8 * BYTES).unwrap();
    let mut all = store_slow(&late, &arena);
    start(&mut all, &arena);
    let begin = Instant::now();
    drop(all);
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_millis(50) && took < Duration::from_millis(240),
        "{took:?}"
    );
    assert_eq!(arena.used(), 8 * BYTES, "left to the disk");
    // The thread that was left goes on to its end, and then gives everything back.
    let patience = Instant::now() + Duration::from_secs(5);
    while arena.used() > 0 && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(arena.used(), 0);
}

fn store_slow(late: &Late, arena: &Arena) -> Store {
    let quick = Late {
        delay: Duration::ZERO,
        ..late.clone()
    };
    drop(store(&quick, arena));
    late.bytes.lock().unwrap().fill(0);
    let options = Options {
        medium: Arc::new(late.clone()),
        prewrite: false,
        stall: Duration::from_secs(5),
        close: Duration::from_millis(60),
        ..Options::new(["late"])
    };
    Store::create(arena, &layout(), &options).unwrap()
}

#[test]
fn a_panic_on_the_disk_thread_leaks_what_is_under_way_and_hangs_nobody() {
    let late = Late::new(Duration::from_millis(3));
    let arena = Arena::new(8 * BYTES).unwrap();
    let mut all = store(&late, &arena);
    *late.panics.lock().unwrap() = true;
    let begin = Instant::now();
    for section in 0..8 {
        // The panic may come before all are asked for.
        if all
            .write(key(section), arena.lease(BYTES).unwrap())
            .is_err()
        {
            break;
        }
    }
    let error = loop {
        match all.wait() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Stalled { .. }), "{error}");
    drop(all);
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert!(arena.used() > 0, "buffers under way are never leased again");
}

/// File descriptors, locked bytes and resident bytes of this process.
fn holdings() -> [u64; 3] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    };
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    [files, kib("VmLck:"), kib("VmRSS:")]
}

#[test]
fn opened_and_closed_ten_thousand_times_it_leaves_nothing_behind() {
    const CHILD: &str = "FOREBAY_TEST_CYCLES_CHILD";
    const NAME: &str = "opened_and_closed_ten_thousand_times_it_leaves_nothing_behind";
    if std::env::var_os(CHILD).is_none() {
        // In a process of its own: other tests of this one open files too.
        let exe = std::env::current_exe().unwrap();
        let mut child = std::process::Command::new(exe);
        let status = child
            .args(["--exact", NAME, "--nocapture"])
            .env(CHILD, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let cycles: u32 = std::env::var("FOREBAY_CYCLES").map_or(200, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new([folder.path()]);
    let layout = Layout::new("m", 1, (0..4).map(|s| (key(s), 20_000, "s")));
    let cycle = |index: u32| {
        let arena = Arena::new(1 << 20).unwrap();
        let mut store = Store::open(&arena, &layout, &options)
            .or_else(|_| Store::create(&arena, &layout, &options))
            .unwrap();
        for section in 0..4 {
            let mut slab = arena.lease(20_000).unwrap();
            slab.fill(index as u8);
            store.write(key(section), slab).unwrap();
        }
        (0..4).for_each(|_| drop(store.wait().unwrap()));
        store
            .read(key(index % 4), arena.lease(20_000).unwrap())
            .unwrap();
        assert!(store.wait().unwrap().slab.iter().all(|b| *b == index as u8));
        store.publish("").unwrap();
    };
    (0..50).for_each(cycle);
    let before = holdings();
    (50..50 + cycles).for_each(cycle);
    let mut after = holdings();
    for _ in 0..100 {
        // Rings are put away by the kernel in its own time.
        if after[..2] == before[..2] {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        after = holdings();
    }
    println!("{cycles} cycles: files, locked and resident bytes {before:?}, then {after:?}");
    assert_eq!(after[..2], before[..2], "files and locked memory");
    assert!(
        after[2] < before[2] + (2 << 20),
        "resident memory: {before:?} {after:?}"
    );
}
