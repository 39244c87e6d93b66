//! Faults of every kind at random, and power cuts, against a model of what may be there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_nvme::sim::{Fault, SimDisk};
use forebay_nvme::{Copies, Direction, Error, Key, Options, StateKind, Store};
use forebay_pinned::Arena;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{fill, keys, layout};

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
