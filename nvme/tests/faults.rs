//! The store over the simulated disk: faults of every kind at random, power cuts, and a fault at
//! every operation, each against a model of what may be there. FOREBAY_SIM_SEEDS sets the number of
//! seeds, FOREBAY_SIM_FIRST the first of them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forebay_nvme::sim::{Fault, SimDisk};
use forebay_nvme::{Copies, Direction, Error, Key, Layout, Options, StateKind, Store};
use forebay_pinned::Arena;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BYTES: [u64; 6] = [4096, 5000, 12_288, 300_000, 1, 70_000];

fn keys() -> Vec<(Key, u64)> {
    let states = [StateKind::Optim, StateKind::Param, StateKind::Grad];
    let key = |section, state| Key {
        section,
        state,
        part: 0,
    };
    (0..)
        .zip(BYTES)
        .map(|(i, bytes)| (key(i, states[i as usize % 3]), bytes))
        .collect()
}

fn layout() -> Layout {
    Layout::new("simulated", 5, keys().into_iter().map(|(k, b)| (k, b, "s")))
}

/// What version `version` of a key holds.
fn fill(key: Key, version: u32, out: &mut [u8]) {
    let name = u64::from(key.section) << 40 | u64::from(version);
    for (i, byte) in out.iter_mut().enumerate() {
        let mixed = (name ^ (i as u64) << 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *byte = ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8;
    }
}

/// The version of each key.
type Versions = BTreeMap<Key, u32>;

/// What may be on disk.
#[derive(Clone, Debug, Default)]
struct Model {
    current: Versions,
    /// At `hold`.
    held: Option<Versions>,
    /// By generation's text: what it holds. The newest that was acknowledged is `published`.
    generations: BTreeMap<String, Versions>,
    published: Option<String>,
    /// A publish that was not acknowledged may have happened all the same.
    maybe: Option<String>,
}

struct Run {
    seed: u64,
    disk: SimDisk,
    arena: Arena,
    options: Options,
    store: Option<Store>,
    model: Model,
    random: ChaCha8Rng,
    versions: u32,
    wrong: u64,
    /// Typed errors met.
    errors: u64,
    /// Why the store did not open.
    last: Option<Error>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let disk = SimDisk::new(seed);
        let folders = 1 + usize::from(random.random_bool(0.3));
        let options = Options {
            medium: Arc::new(disk.clone()),
            undo: random.random_bool(0.5),
            copies: [Copies::Two, Copies::One][usize::from(random.random_bool(0.3))],
            stall: Duration::from_secs(5),
            ..Options::new((0..folders).map(|i| format!("disk{i}")))
        };
        Self {
            seed,
            disk,
            arena: Arena::new(2 << 20).unwrap(),
            options,
            store: None,
            model: Model::default(),
            random,
            versions: 0,
            wrong: 0,
            errors: 0,
            last: None,
        }
    }

    /// Opens or makes the store, and takes note of which generation is there.
    fn open(&mut self) {
        self.store = None;
        let result = match Store::open(&self.arena, &layout(), &self.options) {
            Err(Error::NoGeneration { .. }) => {
                // Allowed only while nothing was acknowledged.
                self.expect_generation(None);
                Store::create(&self.arena, &layout(), &self.options)
            }
            other => other,
        };
        match result {
            Ok(store) => {
                if store.generation() > 0 {
                    self.expect_generation(Some(store.meta().to_owned()));
                }
                self.store = Some(store);
            }
            Err(error) => {
                self.errors += 1;
                self.last = Some(error);
            }
        }
    }

    fn expect_generation(&mut self, found: Option<String>) {
        let acknowledged = found == self.model.published;
        let attempted = found.is_some() && found == self.model.maybe;
        // Only a disk that put a write where the superblocks are can take an acknowledged
        // generation back.
        if !acknowledged && !attempted && self.disk.header_hits() == 0 {
            panic!(
                "found {found:?} where {:?} or {:?} was expected",
                self.model.published, self.model.maybe
            );
        }
        self.model.current = match &found {
            Some(text) => self.model.generations[text].clone(),
            None => Versions::new(),
        };
        self.model.published = found;
        self.model.maybe = None;
        self.model.held = None;
    }

    /// One operation of a user.
    fn act(&mut self) {
        let Some(store) = &mut self.store else {
            return self.open();
        };
        let keys = keys();
        let several = 1 + self.random.random_range(0..keys.len());
        match self.random.random_range(0..20) {
            0..=8 => {
                let chosen = rand::seq::index::sample(&mut self.random, keys.len(), several);
                let mut started = BTreeMap::new();
                for (key, bytes) in chosen.iter().map(|i| keys[i]) {
                    self.versions += 1;
                    let mut slab = self.arena.lease(bytes).unwrap();
                    fill(key, self.versions, &mut slab);
                    if store.write(key, slab).is_ok() {
                        started.insert(key, self.versions);
                    } else {
                        self.errors += 1;
                    }
                    if self.random.random_bool(0.05) {
                        store.cancel(key);
                    }
                }
                self.collect(started);
            }
            9..=15 => {
                let chosen = rand::seq::index::sample(&mut self.random, keys.len(), several);
                let mut started = BTreeMap::new();
                for (key, bytes) in chosen.iter().map(|i| keys[i]) {
                    let slab = self.arena.lease(bytes).unwrap();
                    match store.read(key, slab) {
                        Ok(()) => {
                            started.insert(key, 0);
                        }
                        Err(Error::Missing { .. }) => {
                            let known = self.model.current.contains_key(&key);
                            assert!(!known, "seed {}: {key:?} is lost", self.seed);
                        }
                        Err(_) => self.errors += 1,
                    }
                }
                self.collect(started);
            }
            16 if self.model.held.is_none() && self.options.undo => {
                store.hold();
                self.model.held = Some(self.model.current.clone());
            }
            17 if self.model.held.is_some() => {
                if self.random.random_bool(0.5) {
                    store.commit();
                    self.model.held = None;
                } else {
                    store.rollback();
                    let before = self.model.held.take().unwrap();
                    // Gradients are not held.
                    let now = std::mem::replace(&mut self.model.current, before);
                    self.model.current.retain(|k, _| k.state != StateKind::Grad);
                    let gradients = now.into_iter().filter(|(k, _)| k.state == StateKind::Grad);
                    self.model.current.extend(gradients);
                }
            }
            18 if self.model.held.is_none() => {
                let text = format!("generation at {}", self.versions);
                self.versions += 1;
                let mut durable = self.model.current.clone();
                durable.retain(|k, _| k.state != StateKind::Grad);
                self.model.generations.insert(text.clone(), durable);
                match store.publish(&text) {
                    Ok(_) => {
                        self.model.published = Some(text);
                        self.model.maybe = None;
                    }
                    Err(Error::Failed(_)) => self.errors += 1,
                    Err(_) => {
                        self.errors += 1;
                        self.model.maybe = Some(text);
                    }
                }
            }
            19 => self.open(),
            _ => {}
        }
    }

    /// Waits for what was started: the versions written, or 0 for reads.
    fn collect(&mut self, mut started: BTreeMap<Key, u32>) {
        let Some(store) = &mut self.store else { return };
        while !started.is_empty() {
            let Some(done) = store.try_next() else {
                // A disk that does not answer: an error within its time, never a hang.
                let stalled = matches!(store.health(), Err(Error::Stalled { .. }));
                assert!(stalled, "nothing came and nothing is said");
                self.errors += 1;
                self.open();
                return;
            };
            let version = started.remove(&done.key).unwrap();
            match (done.direction, done.result) {
                (Direction::Write, Ok(())) => {
                    self.model.current.insert(done.key, version);
                }
                (Direction::Write, Err(_)) => {
                    self.errors += 1;
                    // The version before stands, or is known to be gone.
                    if !store.contains(done.key) {
                        self.model.current.remove(&done.key);
                    }
                }
                (Direction::Read, Ok(())) => {
                    let expected = self.model.current.get(&done.key).copied();
                    let mut right = vec![0; done.slab.len()];
                    fill(done.key, expected.unwrap_or(0), &mut right);
                    self.wrong += u64::from(right[..] != done.slab[..]);
                }
                (Direction::Read, Err(_)) => self.errors += 1,
            }
        }
    }
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let first = number("FOREBAY_SIM_FIRST").unwrap_or(0);
    first..first + number("FOREBAY_SIM_SEEDS").unwrap_or(default)
}

/// All faults at once; the trace of the run.
fn chaos(seed: u64) -> (u64, u64) {
    let mut run = Run::new(seed);
    let level = [0.002, 0.01, 0.04][seed as usize % 3];
    for fault in Fault::ALL {
        let chance = match fault {
            Fault::Stuck | Fault::PowerCut => level / 20.0,
            _ => level / 4.0,
        };
        run.disk.set_chance(fault, chance);
    }
    for _ in 0..60 {
        run.act();
    }
    assert_eq!(run.wrong, 0, "seed {seed}: wrong bytes were returned");
    (run.disk.trace(), run.errors)
}

#[test]
fn with_all_faults_at_once_no_wrong_byte_and_no_hang() {
    let seeds = seeds(60);
    let count = seeds.end - seeds.start;
    let mut errors = 0;
    for seed in seeds {
        errors += chaos(seed).1;
    }
    println!("{count} seeds, {errors} typed errors, no wrong byte");
    assert!(errors > count / 4, "faults were met: {errors}");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let first = seeds(0).start;
    let traces: Vec<_> = (first..first + 50).map(chaos).collect();
    for (seed, trace) in (first..).zip(&traces) {
        assert_eq!(chaos(seed), *trace, "seed {seed}");
    }
    let mut different: Vec<_> = traces.iter().map(|t| t.0).collect();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), 50, "seeds differ");
}

#[test]
fn after_a_power_cut_the_old_or_the_new_generation_is_there_whole() {
    let (mut cuts, mut news) = (0, 0);
    // Each seed has about eight cuts.
    let seeds = seeds(160);
    let seeds = seeds.start..seeds.start + (seeds.end - seeds.start).div_ceil(8);
    for seed in seeds.clone() {
        let mut run = Run::new(seed ^ 0xc0ffee << 20);
        // The power goes at a random operation, and again.
        let mut next = run.random.random_range(5..150);
        for _ in 0..80 {
            let before = run.disk.happened().len();
            run.disk
                .schedule(run.disk.operations() + next, Fault::PowerCut);
            for _ in 0..6 {
                run.act();
            }
            run.disk.heal();
            if run.disk.happened().len() > before {
                cuts += 1;
                run.open();
                // Everything the generation names is there, bit for bit.
                let model = run.model.clone();
                let Some(store) = &mut run.store else {
                    panic!(
                        "seed {seed}: a disk without faults does not open: {:?}",
                        run.last
                    );
                };
                for (key, version) in &model.current {
                    let bytes = keys().iter().find(|(k, _)| k == key).unwrap().1;
                    store.read(*key, run.arena.lease(bytes).unwrap()).unwrap();
                    let slab = store.wait().unwrap().slab;
                    let mut right = vec![0; bytes as usize];
                    fill(*key, *version, &mut right);
                    assert!(right[..] == slab[..], "seed {seed}: {key:?}");
                }
                news += u64::from(!model.current.is_empty());
            }
            next = run.random.random_range(5..150);
        }
        assert_eq!(run.wrong, 0, "seed {seed}");
    }
    println!("{cuts} power cuts, {news} with something to lose");
    assert!(cuts >= seeds.end - seeds.start && news > cuts / 4);
}

/// Writes two generations and reads all back. Ends at the first error.
fn short_run(disk: &SimDisk) -> Result<(), Error> {
    let options = Options {
        medium: Arc::new(disk.clone()),
        stall: Duration::from_secs(5),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let durable = || {
        keys()
            .into_iter()
            .filter(|(k, _)| k.state != StateKind::Grad)
    };
    let mut store = Store::create(&arena, &layout(), &options)?;
    for version in 1..=2 {
        for (key, bytes) in durable() {
            let mut slab = arena.lease(bytes).unwrap();
            fill(key, version, &mut slab);
            store.write(key, slab)?;
            store.wait()?;
        }
        store.publish(&version.to_string())?;
    }
    drop(store);
    let mut store = Store::open(&arena, &layout(), &options)?;
    assert_eq!(store.meta(), "2");
    for (key, bytes) in durable() {
        store.read(key, arena.lease(bytes).unwrap())?;
        let slab = store.wait()?.slab;
        let mut right = vec![0; bytes as usize];
        fill(key, 2, &mut right);
        assert!(right[..] == slab[..], "{key:?}");
    }
    Ok(())
}

#[test]
fn one_fault_at_every_operation_is_an_error_or_does_not_matter_and_loses_nothing() {
    let whole = SimDisk::new(1);
    short_run(&whole).unwrap();
    let operations = whole.operations();
    for fault in Fault::ALL {
        let (mut failed, mut passed) = (0, 0);
        for at in 0..operations {
            let disk = SimDisk::new(1);
            disk.schedule(at, fault);
            let result = short_run(&disk);
            let met = !disk.happened().is_empty();
            match (fault, &result) {
                (Fault::Short | Fault::Interrupted, result) => {
                    assert!(result.is_ok(), "{fault:?} at {at}: {result:?}");
                }
                (_, Ok(())) => passed += u64::from(met),
                (_, Err(_)) => failed += 1,
            }
            // What is there afterwards is the first generation, the second, or none yet.
            disk.heal();
            match Store::peek(Path::new("disk"), &disk) {
                Ok((generation, text)) => {
                    assert_eq!(generation.to_string(), text);
                    verify(&disk, generation as u32, fault, at);
                }
                Err(Error::NoGeneration { .. }) => assert!(result.is_err()),
                Err(other) => panic!("{fault:?} at {at}: {other}"),
            }
        }
        println!("{fault:?}: {failed} errors, {passed} without harm, of {operations} operations");
        if !matches!(fault, Fault::Short | Fault::Interrupted) {
            assert!(failed > 0, "{fault:?} is never noticed");
        }
    }
}

fn verify(disk: &SimDisk, version: u32, fault: Fault, at: u64) {
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::open(&arena, &layout(), &options).unwrap();
    for (key, bytes) in keys()
        .into_iter()
        .filter(|(k, _)| k.state != StateKind::Grad)
    {
        store.read(key, arena.lease(bytes).unwrap()).unwrap();
        match store.wait() {
            Ok(done) => {
                let mut right = vec![0; bytes as usize];
                fill(key, version, &mut right);
                assert!(right[..] == done.slab[..], "{fault:?} at {at}: {key:?}");
            }
            // The disk lied about a write: that cannot be undone, only noticed.
            Err(Error::Checksum { .. }) => {
                assert!(
                    matches!(fault, Fault::Lost | Fault::Misdirected),
                    "{fault:?} at {at}"
                );
            }
            Err(other) => panic!("{fault:?} at {at}: {other}"),
        }
    }
}

#[test]
fn a_second_sync_after_a_failed_one_is_not_believed() {
    let disk = SimDisk::new(3);
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    let (key, bytes) = keys()[0];
    let mut slab = arena.lease(bytes).unwrap();
    fill(key, 1, &mut slab);
    store.write(key, slab).unwrap();
    store.wait().unwrap();
    // Two copies of the map, written and read again; then the sync.
    disk.schedule(disk.operations() + 4, Fault::Error);
    let error = store.publish("1").unwrap_err();
    assert!(error.to_string().starts_with("syncing"), "{error}");
    assert!(matches!(store.publish("1"), Err(Error::Failed(_))));
    drop(store);
    disk.power_cut();
    let gone = Store::open(&arena, &layout(), &options).unwrap_err();
    assert!(matches!(gone, Error::NoGeneration { .. }), "{gone}");
}

#[test]
fn superblocks_and_maps_have_copies_and_a_stale_generation_is_no_substitute() {
    let place = Path::new("disk/data.forebay");
    for (rotten, opens) in [
        (vec![4096u64 + 8], Some(1)),
        (vec![4096 + 8, 4096 + 32768 + 8], None),
        // It may have been generation 2.
        (vec![0, 32768], None),
        (vec![4096], Some(1)),
    ] {
        let disk = SimDisk::new(9);
        let options = Options {
            medium: Arc::new(disk.clone()),
            ..Options::new(["disk"])
        };
        let arena = Arena::new(2 << 20).unwrap();
        let mut store = Store::create(&arena, &layout(), &options).unwrap();
        store.publish("1").unwrap();
        drop(store);
        // Generation 1 has the second block of each half, the unpublished generation 0 the first.
        rotten.iter().for_each(|byte| disk.rot(place, *byte, 3));
        match (Store::open(&arena, &layout(), &options), opens) {
            (Ok(store), Some(generation)) => assert_eq!(store.generation(), generation),
            (Err(Error::Damaged { .. }), None) => {
                let error = Store::create(&arena, &layout(), &options).unwrap_err();
                assert!(
                    matches!(error, Error::Damaged { .. }),
                    "not written over: {error}"
                );
            }
            (result, _) => panic!("{rotten:?}: {result:?}"),
        }
    }
    // Both copies of the newest map: the generation before is whole, and is not taken for it.
    let disk = SimDisk::new(9);
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    store.publish("first").unwrap();
    store.publish("second").unwrap();
    drop(store);
    let contents = disk.contents(place).unwrap();
    let text = b"\"meta\":\"second\"";
    let found: Vec<usize> = (0..contents.len() - text.len())
        .filter(|i| contents[*i..].starts_with(text))
        .collect();
    assert_eq!(found.len(), 2, "two copies");
    disk.rot(place, found[0] as u64, 0);
    assert_eq!(
        Store::open(&arena, &layout(), &options).unwrap().meta(),
        "second"
    );
    disk.rot(place, found[1] as u64, 0);
    let error = Store::open(&arena, &layout(), &options).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
}

#[test]
fn a_full_disk_is_an_error_that_loses_nothing() {
    let disk = SimDisk::new(4);
    disk.set_capacity(1 << 20);
    let options = Options {
        medium: Arc::new(disk.clone()),
        copies: Copies::One,
        slack: 1,
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let bytes = 80_000;
    let key = |section| Key {
        section,
        state: StateKind::Optim,
        part: 0,
    };
    let layout = Layout::new("full", 6, (0..10).map(|i| (key(i), bytes, "s")));
    let two = Options {
        copies: Copies::Two,
        ..options.clone()
    };
    let error = Store::create(&arena, &layout, &two).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("--publish end or never needs"), "{text}");
    let mut store = Store::create(&arena, &layout, &options).unwrap();
    // One copy of each: after a generation stands there is room for some new versions, not for all.
    let mut full = 0;
    for version in 1..=3 {
        for section in 0..10 {
            let mut slab = arena.lease(bytes).unwrap();
            fill(key(section), version, &mut slab);
            match store.write(key(section), slab) {
                Ok(()) => drop(store.wait().unwrap()),
                Err(Error::Space { .. }) => full += 1,
                Err(other) => panic!("{other}"),
            }
        }
        if version == 1 {
            assert_eq!(full, 0);
            store.publish("1").unwrap();
        }
    }
    assert!(full > 5, "the disk was full");
    drop(store);
    let error = Store::open(&arena, &layout, &options).unwrap_err();
    assert!(
        matches!(error, Error::Space { .. }),
        "it says so at once: {error}"
    );
    disk.set_capacity(2 << 20);
    let mut store = Store::open(&arena, &layout, &options).unwrap();
    for section in 0..10 {
        store
            .read(key(section), arena.lease(bytes).unwrap())
            .unwrap();
        let mut right = vec![0; bytes as usize];
        fill(key(section), 1, &mut right);
        assert!(right[..] == store.wait().unwrap().slab[..]);
    }
}
