//! What runs compute, and the settings that they do not depend on, drawn from a seed.

use std::path::PathBuf;

use forebay::{
    Ahead, DType, DynamicScale, LossScale, Moment, Optimizer, Options, PlaceRates, Policy, Publish,
    Sgd, Updates,
};
use forebay_decoder::{Config, Decoder};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::common::{self, config, options};

/// What happens in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Event {
    Step,
    /// A step in which the gradient of a section, counted around, is infinite.
    Poisoned(u32),
    Discarded,
    Eval,
    Settle,
    Publish,
    /// Everything is published, and the run goes on from there under the next settings.
    Resume,
    /// The trainer goes away, then the disk's power, and the run goes on from what was published last.
    Crash,
}
use Event::{Crash, Discarded, Eval, Poisoned, Resume, Settle, Step};

/// What a run computes.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) layers: usize,
    pub(crate) tied: bool,
    pub(crate) dtype: DType,
    pub(crate) micro_batches: usize,
    pub(crate) optimizer: Optimizer,
    pub(crate) moments: Moment,
    pub(crate) split_master: bool,
    pub(crate) updates: Updates,
    pub(crate) clip: Option<f64>,
    pub(crate) loss_scale: LossScale,
    pub(crate) events: Vec<Event>,
}

/// What it does not depend on.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) policy: Policy,
    /// Sixteenths of what is between the least and the most.
    pub(crate) device: u64,
    pub(crate) pinned: u64,
    pub(crate) lookahead: u32,
    pub(crate) threads: usize,
    pub(crate) ahead: Ahead,
    pub(crate) rates: Option<PlaceRates>,
    pub(crate) checkpoints_every: usize,
    pub(crate) chunk: Option<u64>,
    pub(crate) partitions: u32,
    pub(crate) publish: Publish,
    pub(crate) bind: bool,
    pub(crate) trace: bool,
}

/// What others are compared with: everything on the device, every update after its norm.
pub(crate) const RESIDENT: Setting = Setting {
    policy: Policy::Resident,
    device: 16,
    pinned: 16,
    lookahead: 2,
    threads: 1,
    ahead: Ahead::Never,
    rates: None,
    checkpoints_every: 1,
    chunk: None,
    partitions: 1,
    publish: Publish::Often,
    bind: false,
    trace: false,
};

pub(crate) const POLICIES: [Policy; 6] = [
    Policy::Auto,
    Policy::Auto,
    Policy::Auto,
    Policy::Resident,
    Policy::Pinned,
    Policy::Disk,
];

/// States are worth more than anything else on the device.
pub(crate) const SLOW_CPU: PlaceRates = PlaceRates {
    cpu: 1e5,
    cpu_ahead: 8e4,
    h2d: 1e9,
    d2h: 1e9,
    disk_read: 1e9,
    disk_write: 1e9,
    device_update: f64::INFINITY,
    compute_s: 1e-3,
};

/// Overflows at once, and again as soon as it may.
pub(crate) const HIGH: DynamicScale = DynamicScale {
    initial: 16_777_216.0,
    growth_interval: 2,
    growth: 4.0,
    backoff: 0.125,
    least: 1.0,
};

pub(crate) fn one<T: Copy>(random: &mut ChaCha8Rng, of: &[T]) -> T {
    *of.choose(random).unwrap()
}

impl Case {
    pub(crate) fn draw(random: &mut ChaCha8Rng) -> Self {
        let r = random;
        let dtype = one(r, &[DType::F32, DType::Bf16, DType::Bf16, DType::F16]);
        let optimizer = one(r, &["adamw", "adamw", "sgd", "lion", "adagrad", "lamb"]);
        let optimizer = match optimizer.parse().unwrap() {
            Optimizer::Sgd(sgd) => Optimizer::Sgd(Sgd {
                momentum: one(r, &[0.9, 0.0]),
                nesterov: r.random(),
                ..sgd
            }),
            other => other,
        };
        let split_master = dtype == DType::Bf16 && r.random_bool(0.6);
        let events = 4 + r.random_range(0..8);
        let events = (0..events).map(|_| match r.random_range(0..20) {
            0 | 8 => Poisoned(r.random_range(0..8)),
            7 => Crash,
            1 => Discarded,
            2 => Eval,
            3 => Settle,
            4 => Event::Publish,
            5 | 6 => Resume,
            _ => Step,
        });
        let events = [Step].into_iter().chain(events.collect::<Vec<_>>());
        let events = events.chain([Step, Eval]).collect();
        Self {
            layers: r.random_range(1..7),
            tied: r.random(),
            dtype,
            micro_batches: r.random_range(1..3),
            optimizer,
            moments: match optimizer {
                Optimizer::Adagrad(_) => Moment::F32,
                _ => one(r, &[Moment::F32, Moment::Bf16]),
            },
            split_master,
            updates: match split_master {
                true => Updates::Exact,
                false => one(r, &[Updates::Exact, Updates::Exact, Updates::Delayed]),
            },
            clip: one(r, &[None, Some(1e9), Some(0.5), Some(0.01)]),
            loss_scale: one(
                r,
                &[
                    LossScale::Auto,
                    LossScale::None,
                    LossScale::Fixed(1024.0),
                    LossScale::Dynamic(HIGH),
                ],
            ),
            events,
        }
    }

    pub(crate) fn decoder(&self, setting: &Setting) -> Decoder {
        let config = Config {
            layers: self.layers,
            tied: self.tied,
            ..config()
        };
        Decoder::compute_in(self.dtype, config, common::BATCH, common::SEQ)
            .unwrap()
            .in_micro_batches(self.micro_batches)
            .unwrap()
            .with_checkpoints_every(setting.checkpoints_every)
            .unwrap()
    }

    pub(crate) fn options(&self, setting: &Setting) -> Options {
        let mut options = options(&PathBuf::from("disk"));
        options.optimizer = self.optimizer;
        (options.moments, options.split_master) = (self.moments, self.split_master);
        (options.updates, options.clip) = (self.updates, self.clip);
        (options.loss_scale, options.partitions) = (self.loss_scale, setting.partitions);
        (options.optimizer_chunk, options.placement) = (setting.chunk, setting.policy);
        (options.lookahead, options.threads) = (setting.lookahead, setting.threads);
        (options.ahead, options.rates) = (setting.ahead, setting.rates);
        (options.publish, options.bind_threads) = (setting.publish, setting.bind);
        options
    }
}

impl Setting {
    pub(crate) fn draw(random: &mut ChaCha8Rng, case: &Case) -> Self {
        let r = random;
        // Now and then one next to nothing, or no limit.
        let rate = |r: &mut ChaCha8Rng, from: f64, to: f64| match r.random_range(0..40) {
            0 => one(r, &[1e-300, f64::INFINITY]),
            _ => 10f64.powf(r.random_range(from..to)),
        };
        let rates = r.random_bool(0.7).then(|| {
            // Mostly so slow that states are worth more than parameters on the device.
            let most = one(r, &[5.0, 5.0, 10.0]);
            let cpu = rate(r, 4.0, most);
            PlaceRates {
                cpu,
                cpu_ahead: cpu * r.random_range(0.5..1.0),
                h2d: rate(r, 6.0, 11.0),
                d2h: rate(r, 6.0, 11.0),
                disk_read: rate(r, 5.0, 10.0),
                disk_write: rate(r, 5.0, 10.0),
                device_update: one(r, &[f64::INFINITY, 1e7, 1e11]),
                compute_s: 10f64.powf(r.random_range(-5.0..0.0)),
            }
        });
        let part = |r: &mut ChaCha8Rng| match r.random_range(0..5) {
            0 => 0,
            1 => 16,
            _ => r.random_range(0..17),
        };
        let aheads = match case.updates {
            Updates::Exact if !case.optimizer.whole_tensors() => {
                &[Ahead::Auto, Ahead::Always, Ahead::Never][..]
            }
            Updates::Exact | Updates::Delayed => &[Ahead::Auto, Ahead::Never],
        };
        let has = |event| case.events.contains(&event);
        let publishes = [Publish::Often, Publish::End, Publish::Never];
        let publishes = match (has(Resume), has(Crash), has(Event::Publish)) {
            (_, true, true) => &publishes[..1],
            (false, false, _) => &publishes,
            _ => &publishes[..2],
        };
        let whole = case.optimizer.whole_tensors();
        Self {
            policy: one(r, &POLICIES),
            device: part(r),
            pinned: part(r),
            lookahead: r.random_range(0..5),
            threads: r.random_range(1..4),
            ahead: one(r, aheads),
            rates,
            checkpoints_every: r.random_range(1..6),
            chunk: match whole {
                true => None,
                false => one(r, &[None, Some(4096), Some(1000), Some(777)]),
            },
            partitions: if whole { 1 } else { r.random_range(1..4) },
            publish: one(r, publishes),
            bind: r.random_bool(0.2),
            trace: r.random_bool(0.2),
        }
    }
}
