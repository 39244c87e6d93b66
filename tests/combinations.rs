//! Settings drawn at random, together: whatever a run computes, where its states live, how far ahead they move and
//! what else was chosen with it change no bit; and what makes no sense is refused.
//!
//! `FOREBAY_COMBINATIONS=1000` draws as many, `FOREBAY_COMBINATIONS_SEED=7` from that one on.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "combinations/draw.rs"]
mod draw;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Poison, tokens};
use draw::Event::{self, Crash, Discarded, Eval, Poisoned, Resume, Settle, Step};
use draw::{Case, RESIDENT, SLOW_CPU, Setting, one};
use forebay::nvme::sim::SimDisk;
use forebay::{
    Ahead, DType, Error, LossScale, Moment, Optimizer, Options, PlaceRates, Policy, Publish,
    RandomInit, SectionId, StageLease, Trainer, Updates,
};
use forebay_decoder::{Batch, Decoder};
use forebay_prefetch::Error as Refused;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

impl Setting {
    /// A trainer under this setting, new or from what is on the disk. Where its budgets are refused with the least
    /// that works, under that.
    fn open(&self, case: &Case, disk: &SimDisk, resume: bool) -> (Trainer, Decoder) {
        let decoder = case.decoder(self);
        let mut options = case.options(self);
        // Written to while the trainer lives, under no name.
        let folder = tempfile::tempdir().unwrap();
        options.trace = self.trace.then(|| folder.path().join("trace.json"));
        options.medium = Arc::new(disk.clone());
        let footprint = decoder.footprint(options.target().unwrap()).unwrap();
        let needs = |placement| {
            let options = Options {
                placement,
                ..options.clone()
            };
            forebay::requirements(decoder.model(), footprint, &options).unwrap()
        };
        let all = [Policy::Disk, Policy::Pinned, Policy::Resident].map(needs);
        let between = |of: [u64; 3], part: u64| {
            let (least, most) = (of.into_iter().min().unwrap(), of.into_iter().max().unwrap());
            least + (most - least) * part / 16
        };
        options.device_budget = Some(between(all.map(|b| b.device_bytes), self.device));
        options.pinned_budget = Some(between(all.map(|b| b.pinned_bytes), self.pinned));
        for _ in 0..3 {
            let model = decoder.model().clone();
            let made = match resume {
                true => Trainer::resume(model, footprint, &options),
                false => Trainer::create(model, footprint, &options, &mut RandomInit { seed: 5 }),
            };
            match made {
                Ok(trainer) => {
                    let needs = forebay::requirements(decoder.model(), footprint, &options);
                    let [_, pinned, _] = trainer.report().tiers;
                    let needs = needs.unwrap().pinned_bytes;
                    assert_eq!(pinned.peak_bytes, needs, "to the byte");
                    return (trainer, decoder);
                }
                Err(Error::Placement(Refused::DeviceBudget { have, least })) => {
                    assert!(have < least);
                    options.device_budget = Some(least);
                }
                Err(Error::Placement(Refused::PinnedBudget { have, least })) => {
                    assert!(have < least);
                    options.pinned_budget = Some(least);
                }
                Err(other) => panic!("{other}"),
            }
        }
        panic!("the least that works does not");
    }
}

/// A training step, or a forward pass; the bits of its loss.
fn step(trainer: &mut Trainer, decoder: &Decoder, event: Event) -> u32 {
    let number = match event {
        Eval => 50,
        _ => trainer.steps(),
    };
    let (ids, targets) = tokens(number);
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    if event == Eval {
        let step = trainer.eval().unwrap();
        let loss = decoder.eval_loss(&step, &batch).unwrap();
        step.finish().unwrap();
        return loss.to_bits();
    }
    let step = trainer.begin(5e-3).unwrap();
    let sections = decoder.model().sections();
    let mut observer = |lease: &StageLease<'_>, id: SectionId| {
        if matches!(event, Poisoned(which) if id.0 == which % sections.len() as u32) {
            let tensor = &sections[id.0 as usize].tensors()[0].name;
            step.launch(Poison, &[], &[lease.grad(id, tensor)?])?;
        }
        Ok(())
    };
    let walked = decoder.train_step_observed(&step, &batch, &mut observer);
    walked.unwrap();
    let finished = match event {
        Discarded => step.discard(),
        _ => step.finish(),
    };
    finished.unwrap().loss.unwrap().to_bits()
}

/// What a run shows: losses; once all is settled, what was skipped, the norm and the scale.
type Seen = Vec<(Event, [u64; 3])>;

/// Runs a case; each resume takes the next setting. With one alone the run is not cut where it would be resumed.
fn run(case: &Case, settings: &[Setting]) -> Seen {
    let disk = SimDisk::new(1);
    let mut next = settings.iter().cycle();
    let mut setting = next.next().unwrap();
    let (mut trainer, mut decoder) = setting.open(case, &disk, false);
    // A trainer that has just been opened knows no norm.
    let (mut seen, mut stepped) = (Seen::new(), false);
    // Steps skipped before the trainer was opened, and by it before it was last published as for a resume.
    let (mut skipped, mut published) = (0, 0);
    for event in &case.events {
        match event {
            Settle => trainer.settle().unwrap(),
            // Once, at the end; or never.
            Event::Publish if setting.publish != Publish::Often => trainer.settle().unwrap(),
            Event::Publish => {
                trainer.settle().unwrap();
                let before = trainer.report().disk_stats.payload_written_bytes;
                trainer.publish("").unwrap();
                let report = trainer.report();
                let written = report.disk_stats.payload_written_bytes - before;
                assert_eq!(
                    written, report.publish.bytes,
                    "as a generation was said to take"
                );
            }
            Resume if settings.len() == 1 => {
                trainer.publish("").unwrap();
                (stepped, published) = (false, trainer.skipped());
                continue;
            }
            Resume | Crash => {
                skipped += std::mem::take(&mut published);
                stepped = false;
                if *event == Resume {
                    trainer.publish("").unwrap();
                    skipped += trainer.skipped();
                }
                let stands = trainer.generation() > 0;
                caps(case, &trainer);
                drop(trainer);
                if *event == Crash {
                    disk.power_cut();
                }
                setting = next.next().unwrap();
                (trainer, decoder) = setting.open(case, &disk, stands);
                continue;
            }
            _ => {
                let loss = step(&mut trainer, &decoder, *event);
                stepped |= *event != Eval;
                seen.push((*event, [loss.into(), 0, 0]));
            }
        }
        if !matches!(event, Step | Poisoned(_) | Discarded) {
            let scale = trainer.loss_scale().unwrap_or_default().to_bits();
            let norm = stepped.then(|| trainer.grad_norm().to_bits());
            seen.push((
                *event,
                [skipped + trainer.skipped(), scale, norm.unwrap_or(0)],
            ));
        }
    }
    caps(case, &trainer);
    if case.updates == Updates::Exact {
        moves_what_it_says(&mut trainer, &decoder);
    }
    seen
}

/// Steps move those bytes to and from disk that the report says.
fn moves_what_it_says(trainer: &mut Trainer, decoder: &Decoder) {
    let (skipped, before) = (trainer.skipped(), trainer.report().disk_stats);
    for _ in 0..2 {
        step(trainer, decoder, Step);
    }
    trainer.settle().unwrap();
    // What is undone is read again.
    if trainer.skipped() == skipped {
        let report = trainer.report();
        let after = report.disk_stats;
        let read = after.payload_read_bytes - before.payload_read_bytes;
        let written = after.payload_written_bytes - before.payload_written_bytes;
        let said = (report.traffic.disk_read, report.traffic.disk_write);
        assert_eq!((read, written), (2 * said.0, 2 * said.1));
    }
}

/// Trainers that met each of [`MEETINGS`].
static MET: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
const MEETINGS: [&str; 6] = [
    "states on the device while parameters pass through",
    "states on the device and on disk",
    "updates ahead that stood",
    "updates ahead that were undone",
    "a split master on the device while parameters pass through",
    "delayed updates with work for the disk",
];

/// Budgets are hard caps. Takes note of what the trainer met.
fn caps(case: &Case, trainer: &Trainer) {
    let report = trainer.report();
    for tier in &report.tiers[..2] {
        assert!(tier.peak_bytes <= tier.budget_bytes, "{tier:?}");
    }
    let (keeps, disk) = (report.keeps, report.traffic.disk_write > 0);
    let some = keeps.optim[0] > 0 && keeps.optim[0] < keeps.optim[1];
    let met = [
        some && keeps.params[0] < keeps.params[1],
        some && disk,
        report.ahead.stood() > 0,
        report.ahead.undone > 0,
        some && keeps.params[0] < keeps.params[1] && case.split_master,
        case.updates == Updates::Delayed && disk,
    ];
    for (count, met) in MET.iter().zip(met) {
        count.fetch_add(met.into(), Ordering::Relaxed);
    }
}

const COUNT: &str = "FOREBAY_COMBINATIONS";
const MANY: u64 = 24;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn whatever_is_chosen_together_what_a_run_computes_does_not_depend_on_where() {
    let first = number("FOREBAY_COMBINATIONS_SEED", 1);
    for seed in first..first + number(COUNT, MANY) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let case = Case::draw(&mut random);
        // A split master has the bits of a whole one.
        let whole = Case {
            split_master: false,
            ..case.clone()
        };
        println!("seed {seed}: {case:?}");
        let reference = run(&whole, &[RESIDENT]);
        for _ in 0..3 {
            let settings: [_; 3] = std::array::from_fn(|_| Setting::draw(&mut random, &case));
            println!("    {settings:?}");
            let got = run(&case, &settings);
            assert_eq!(got, reference, "seed {seed}\n{case:?}\n{settings:?}");
        }
    }
    for (count, what) in MET.iter().zip(MEETINGS) {
        let count = count.load(Ordering::Relaxed);
        println!("{count} met {what}");
        assert!(count > 0 || number(COUNT, MANY) < MANY, "none met {what}");
    }
}

#[test]
fn what_a_run_computes_shows() {
    for seed in 0..8 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let case = Case {
            loss_scale: LossScale::None,
            events: vec![Step, Step, Step, Eval],
            ..Case::draw(&mut random)
        };
        let setting = Setting::draw(&mut random, &case);
        let reference = run(&case, &[RESIDENT]);
        assert_eq!(run(&case, std::slice::from_ref(&setting)), reference);
        let decayed = Case {
            optimizer: case.optimizer.with_decay(10.0),
            ..case.clone()
        };
        let discarded = Case {
            events: vec![Step, Discarded, Step, Eval],
            ..case.clone()
        };
        let skipped = Case {
            events: vec![Step, Poisoned(1), Step, Eval],
            ..case
        };
        for other in [decayed, discarded, skipped] {
            let got = run(&other, std::slice::from_ref(&setting));
            assert_ne!(got, reference, "seed {seed}\n{other:?}");
        }
    }
}

#[test]
fn what_makes_no_sense_together_is_refused_before_anything_is_made() {
    let (mut taken, mut refused) = (0, 0);
    for seed in 0..200 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let r = &mut random;
        let case = Case {
            dtype: one(r, &[DType::F32, DType::Bf16, DType::F16]),
            split_master: r.random(),
            moments: one(r, &[Moment::F32, Moment::Bf16]),
            updates: one(r, &[Updates::Exact, Updates::Delayed]),
            loss_scale: one(r, &[LossScale::Auto, LossScale::Fixed(1000.0)]),
            ..Case::draw(r)
        };
        let wrong = one(r, &[0.0, -1.0, f64::NAN]);
        let wrong = PlaceRates {
            h2d: wrong,
            ..SLOW_CPU
        };
        let setting = Setting {
            rates: one(r, &[None, Some(SLOW_CPU), Some(wrong)]),
            ahead: one(r, &[Ahead::Auto, Ahead::Always]),
            partitions: 1 + u32::from(r.random_bool(0.3)),
            ..Setting::draw(r, &case)
        };
        let (disk, decoder) = (SimDisk::new(1), case.decoder(&setting));
        let mut options = case.options(&setting);
        options.medium = Arc::new(disk.clone());
        (options.device_budget, options.pinned_budget) = (Some(1 << 30), Some(1 << 30));
        let footprint = decoder.footprint(options.target().unwrap()).unwrap();
        let model = decoder.model().clone();
        let made = Trainer::create(model, footprint, &options, &mut RandomInit { seed: 5 });
        let (delayed, whole) = (
            case.updates == Updates::Delayed,
            case.optimizer.whole_tensors(),
        );
        let adagrad = matches!(case.optimizer, Optimizer::Adagrad(_));
        let right = [
            !case.split_master || case.dtype == DType::Bf16 && !delayed,
            !adagrad || case.moments == Moment::F32,
            !(delayed || whole) || setting.ahead != Ahead::Always,
            !whole || setting.chunk.is_none() && setting.partitions == 1,
            case.loss_scale != LossScale::Fixed(1000.0),
            setting.rates.is_none_or(|rates| rates.h2d > 0.0),
        ];
        let what = format!("seed {seed}\n{case:?}\n{setting:?}");
        match made {
            Ok(_) => assert!(right.iter().all(|r| *r), "{what}"),
            Err(Error::Misuse(why)) => {
                assert!(!right.iter().all(|r| *r), "{why}\n{what}");
                assert!(!why.contains('\n'), "{why}");
                let there = forebay::nvme::Store::peek(&options.disk[0], &disk);
                assert!(there.is_err(), "{what}");
                refused += 1;
                continue;
            }
            Err(other) => panic!("{other}\n{what}"),
        }
        taken += 1;
    }
    assert!(taken > 5 && refused > 50, "{taken}, {refused}");
}
