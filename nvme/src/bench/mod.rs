//! What a disk can do, and what the store takes of it: slices of bare I/O and of the store's, in turn,
//! on the same file.
//!
//! The ceiling is a bare io_uring loop: no store, no checksum, no copy. Extents of both lie in turn in
//! one file, and pass through the same memory. A round is a slice of bare
//! I/O, one through the store and a second bare one, in an order that changes; the ratio of a round
//! is store to bare, its control bare to bare. Given are medians with 95 % intervals.

mod bare;
mod reads;
mod stats;
mod tune;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forebay_pinned::{Arena, Slab};

use crate::checksum::GRANULE;
use crate::io::{IoChoice, Tuning};
use crate::{Copies, Direction, Error, Key, Layout, Options, StateKind, Store};
use bare::Bare;
pub use bare::noise;
pub use reads::BareReads;
use stats::percentiles;
pub use stats::{Interval, Percentiles, cpu_seconds, median};

/// Bytes of a slice.
pub const SLICE: u64 = 128 << 20;
/// Bytes of an extent: a part of optimizer states of some hundred thousand elements.
pub const EXTENT: u64 = 4 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A folder on the disk.
    pub folder: PathBuf,
    /// Bytes of the file, half for bare slices and half for the store's.
    pub size: u64,
    /// Bytes of a request; `None`: what is fastest.
    pub block: Option<u32>,
    /// Requests under way; `None`: what is fastest.
    pub depth: Option<u32>,
    /// Reads to writes of the mixed slices.
    pub mix: (u32, u32),
    /// Rounds of each kind.
    pub rounds: u32,
    /// See [`Tuning`].
    pub sqpoll: bool,
    /// See [`Tuning`].
    pub iopoll: bool,
}

/// What a slice does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    Mixed,
}

/// One slice.
#[derive(Clone, Debug, Default)]
struct Slice {
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
    latencies: Vec<Duration>,
}

impl Slice {
    fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

/// What was found for one kind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The kind.
    pub kind: Kind,
    /// Bytes per second of bare slices, median.
    pub bare_bytes_per_s: f64,
    /// Bytes per second through the store, median.
    pub store_bytes_per_s: f64,
    /// Store to bare.
    pub ratio: Interval,
    /// Bare to bare.
    pub control: Interval,
    /// CPU seconds of the whole process for each 10^9 bytes: bare.
    pub bare_cpu_s_per_gb: f64,
    /// The same through the store, checksums included.
    pub store_cpu_s_per_gb: f64,
    /// From request to completion: bare, a block each.
    pub bare_latency: Percentiles,
    /// From asking to having it verified: an extent of 4 MiB each.
    pub store_latency: Percentiles,
}

/// A block and a depth that were tried.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// Bytes of a request.
    pub block: u32,
    /// Requests under way.
    pub depth: u32,
    /// Bytes per second of reads.
    pub read_bytes_per_s: f64,
    /// Bytes per second of writes.
    pub write_bytes_per_s: f64,
}

impl Trial {
    /// The rate of reading and writing as much.
    pub fn both(&self) -> f64 {
        2.0 / (1.0 / self.read_bytes_per_s + 1.0 / self.write_bytes_per_s)
    }
}

/// Everything found.
#[derive(Clone, Debug)]
pub struct Report {
    /// How I/O was done.
    pub io: String,
    /// Bytes of a request.
    pub block: u32,
    /// Requests under way.
    pub depth: u32,
    /// What was tried to find them.
    pub trials: Vec<Trial>,
    /// Where the profile is kept; nothing if block and depth were given.
    pub profile: Option<PathBuf>,
    /// Read, write, mixed.
    pub outcomes: Vec<Outcome>,
}

/// Whether a block of so many bytes can be measured: an extent of the bench is whole blocks of it.
pub fn block_fits(bytes: u64) -> bool {
    bytes >= GRANULE && bytes.is_multiple_of(GRANULE) && EXTENT.is_multiple_of(bytes)
}

/// Measures, in a folder of its own that is removed. `progress` is told what is being done.
///
/// # Errors
/// [`Error::Space`], [`Error::Folder`]; [`Error::Misuse`] of a block that does not fit; io_uring
/// refused, as there is no ceiling without it.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let scratch = plan
        .folder
        .join(format!(".forebay-bench-{}", std::process::id()));
    let failed = |source| Error::Folder {
        path: plan.folder.clone(),
        source,
    };
    std::fs::create_dir(&scratch).map_err(failed)?;
    let result = measure(plan, &scratch, progress);
    // The figures stand whether or not the leftovers go.
    let _ = std::fs::remove_dir_all(&scratch);
    result
}

fn measure(plan: &Plan, folder: &Path, progress: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    if let Some(block) = plan.block.filter(|b| !block_fits(u64::from(*b))) {
        return Err(Error::Misuse(format!("blocks of {block} bytes")));
    }
    let extents = (plan.size / 2 / EXTENT).max(2 * SLICE / EXTENT);
    let keys = (0..2 * extents).map(|part| (key(part), EXTENT, "bench"));
    let layout = Layout::new("bench", 0, keys);
    let mut options = Options::new([folder]);
    options.copies = Copies::One;
    let mut tuning = Tuning {
        io: IoChoice::Uring,
        sqpoll: plan.sqpoll,
        iopoll: plan.iopoll,
        ..Tuning::default()
    };
    options.tuning = Some(tuning);
    progress("writing the file once");
    let data = crate::folders::data_path(folder);
    let arena = Arena::new(SLICE)
        .map_err(|error| Error::Misuse(format!("no memory to measure with: {error}")))?;
    let store = StoreLoop::new(&arena, &layout, &options, plan.mix)?;
    let mut bare = Bare::open(&data, store.places_of_bare(), &arena, tuning)?;
    let (trials, block, depth) = tune::tune(plan, &mut bare, progress)?;
    (tuning.block, tuning.depth) = (block, depth);
    let profile = if plan.block.is_none() && plan.depth.is_none() {
        tune::keep(&trials, block, depth, plan)
    } else {
        None
    };
    progress("writing every extent of the store");
    drop(store);
    options.tuning = Some(tuning);
    let mut store = StoreLoop::new(&arena, &layout, &options, plan.mix)?;
    bare.set(block, depth);
    bare.move_to(store.places_of_bare())?;
    let mut outcomes = Vec::new();
    for kind in [Kind::Read, Kind::Write, Kind::Mixed] {
        outcomes.push(compare(kind, plan, &mut bare, &mut store, progress)?);
    }
    Ok(Report {
        io: store.store.describe().to_owned(),
        block,
        depth,
        trials,
        profile,
        outcomes,
    })
}

fn compare(
    kind: Kind,
    plan: &Plan,
    bare: &mut Bare<'_>,
    store: &mut StoreLoop,
    progress: &mut dyn FnMut(&str),
) -> Result<Outcome, Error> {
    let (mut bares, mut stores) = (Vec::new(), Vec::new());
    let (mut ratios, mut controls) = (Vec::new(), Vec::new());
    // One of each to warm up.
    bare.slice(kind, plan.mix)?;
    store.slice(kind)?;
    for round in 0..plan.rounds {
        progress(&format!("{kind:?}: round {} of {}", round + 1, plan.rounds));
        let (first, through, second);
        match round % 3 {
            0 => {
                first = bare.slice(kind, plan.mix)?;
                through = store.slice(kind)?;
                second = bare.slice(kind, plan.mix)?;
            }
            1 => {
                through = store.slice(kind)?;
                first = bare.slice(kind, plan.mix)?;
                second = bare.slice(kind, plan.mix)?;
            }
            _ => {
                second = bare.slice(kind, plan.mix)?;
                first = bare.slice(kind, plan.mix)?;
                through = store.slice(kind)?;
            }
        }
        ratios.push(through.rate() / first.rate());
        controls.push(second.rate() / first.rate());
        bares.extend([first, second]);
        stores.push(through);
    }
    let cpu = |slices: &[Slice]| {
        let (cpu, bytes) = slices.iter().fold((0.0, 0), |(cpu, bytes), s| {
            (cpu + s.cpu_seconds, bytes + s.bytes)
        });
        cpu / (bytes as f64 / 1e9)
    };
    let rate = |slices: &[Slice]| median(slices.iter().map(Slice::rate).collect());
    let latency = |slices: &[Slice]| {
        percentiles(
            slices
                .iter()
                .flat_map(|s| s.latencies.iter().copied())
                .collect(),
        )
    };
    Ok(Outcome {
        kind,
        bare_bytes_per_s: rate(&bares),
        store_bytes_per_s: rate(&stores),
        ratio: Interval::of(&ratios),
        control: Interval::of(&controls),
        bare_cpu_s_per_gb: cpu(&bares),
        store_cpu_s_per_gb: cpu(&stores),
        bare_latency: latency(&bares),
        store_latency: latency(&stores),
    })
}

/// Bytes of memory that slices use: enough that the device's queue is full while extents that have
/// ended are taken note of.
fn window(block: u32, depth: u32) -> u64 {
    let queue = u64::from(block) * u64::from(depth);
    (2 * queue.next_multiple_of(EXTENT) + 4 * EXTENT).min(SLICE)
}

/// Slices through a store: extents in order, several under way.
struct StoreLoop {
    store: Store,
    slabs: Vec<Slab>,
    extents: u64,
    /// From one extent of these to the next.
    step: u64,
    next: [u64; 2],
    mix: (u32, u32),
    started: Vec<Instant>,
    slabs_most: usize,
}

impl StoreLoop {
    /// A new store, every extent of it written once.
    fn new(
        arena: &Arena,
        layout: &Layout,
        options: &Options,
        mix: (u32, u32),
    ) -> Result<Self, Error> {
        let store = Store::create(arena, layout, options)?;
        let waiting = std::thread::current();
        store.on_end(move || waiting.unpark());
        let tuning = options.tuned();
        let mut slabs = Vec::new();
        for number in 0..window(tuning.block, tuning.depth) / EXTENT {
            let slab = arena.lease(EXTENT);
            let mut slab = slab.map_err(|e| Error::Misuse(e.to_string()))?;
            bare::noise(&mut slab, number);
            slabs.push(slab);
        }
        let keys = layout.items.len() as u64;
        let mut all = Self {
            store,
            slabs_most: slabs.len(),
            slabs,
            extents: keys,
            step: 1,
            next: [0; 2],
            mix,
            started: vec![Instant::now(); keys as usize],
        };
        for _ in 0..(keys * EXTENT).div_ceil(SLICE) {
            all.slice(Kind::Write)?;
        }
        // From now on every other extent is the bare loop's: where on a disk bytes lie changes its
        // rate by more than a store does.
        (all.extents, all.step, all.next) = (keys / 2, 2, [0; 2]);
        Ok(all)
    }

    /// Where in the file the extents are that the store leaves to the bare loop.
    fn places_of_bare(&self) -> Vec<u64> {
        let keys = (0..self.extents).map(|n| key(n * self.step + 1));
        keys.filter_map(|key| self.store.place(key)).collect()
    }

    fn slice(&mut self, kind: Kind) -> Result<Slice, Error> {
        let (mut slice, cpu, start) = (Slice::default(), cpu_seconds(), Instant::now());
        let mut asked = 0;
        while slice.bytes < SLICE {
            while asked < SLICE / EXTENT
                && let Some(slab) = self.slabs.pop()
            {
                let write = writes(kind, asked, self.mix);
                // Reads and writes go round, half a turn apart.
                let next = &mut self.next[usize::from(write)];
                let offset = if write { 0 } else { self.extents / 2 };
                let key = key((*next + offset) % self.extents * self.step);
                *next += 1;
                self.started[key.part as usize] = Instant::now();
                if write {
                    self.store.write(key, slab)?;
                } else {
                    self.store.read(key, slab)?;
                }
                asked += 1;
            }
            let Some(done) = self.store.try_next() else {
                self.store.health()?;
                std::thread::park_timeout(Duration::from_millis(50));
                continue;
            };
            done.result?;
            debug_assert!([Direction::Read, Direction::Write].contains(&done.direction));
            slice
                .latencies
                .push(self.started[done.key.part as usize].elapsed());
            slice.bytes += EXTENT;
            self.slabs.push(done.slab);
        }
        debug_assert_eq!(self.slabs.len(), self.slabs_most);
        slice.seconds = start.elapsed().as_secs_f64();
        slice.cpu_seconds = cpu_seconds() - cpu;
        Ok(slice)
    }
}

fn key(part: u64) -> Key {
    Key {
        section: 0,
        state: StateKind::Optim,
        part: part as u32,
    }
}

/// Whether operation number `index` of a slice writes.
fn writes(kind: Kind, index: u64, mix: (u32, u32)) -> bool {
    match kind {
        Kind::Read => false,
        Kind::Write => true,
        Kind::Mixed => {
            let (reads, writes) = (u64::from(mix.0), u64::from(mix.1));
            // Spread evenly.
            let upto = |n: u64| n * writes / (reads + writes).max(1);
            upto(index + 1) > upto(index)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_what_was_asked_for() {
        let count = |mix| (0..100).filter(|i| writes(Kind::Mixed, *i, mix)).count();
        assert_eq!((count((1, 1)), count((3, 1)), count((0, 1))), (50, 25, 100));
        assert!(!writes(Kind::Read, 3, (1, 1)) && writes(Kind::Write, 3, (1, 1)));
    }

    #[test]
    fn it_measures_a_small_file_and_leaves_nothing() {
        if crate::probe::io_uring().is_err() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan {
            folder: folder.path().to_owned(),
            size: 256 << 20,
            block: Some(1 << 20),
            depth: Some(8),
            mix: (1, 1),
            rounds: 3,
            sqpoll: false,
            iopoll: false,
        };
        let report = run(&plan, &mut |_| {}).unwrap();
        assert_eq!(report.outcomes.len(), 3);
        for outcome in &report.outcomes {
            assert!(
                outcome.ratio.median > 0.1 && outcome.ratio.median < 10.0,
                "{outcome:?}"
            );
            assert!(outcome.store_latency.p50 <= outcome.store_latency.p999);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
