//! `forebay bench step`: an offloaded training step beside the least that it could take.

use std::path::{Path, PathBuf};
use std::time::Instant;

use forebay::bench::{adam, traffic};
use forebay::{
    Ahead, Bound, Bytes, Ceilings, DType, DeviceChoice, Error, Footprint, Moment, Optimizer,
    Options, PlaceRates, Policy, Publish, RandomInit, Report, Result, Target, Trainer, Updates,
    requirements,
};
use forebay_decoder::{Batch, Config, Decoder};
use serde_json::json;

use super::with_progress;

/// A training step whose states do not fit on the device, beside its ceilings in the same run: the same step
/// resident on the device, and bare code that moves the step's bytes. A Llama on random tokens
#[derive(clap::Args, Debug)]
pub(crate) struct Step {
    /// Its size: 125m, 350m, 1.3b, 3b, 7b, 10b or 13b [default: 1.3b on a GPU, and on the host device the small
    /// model of the example train]
    #[arg(long)]
    preset: Option<String>,
    /// Sequences in a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Pieces in which a layer takes the batch; gradients add up
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    micro_batches: u32,
    /// Layers for each activation checkpoint; those between are computed again
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    checkpoint_every: u32,
    /// Tokens in a sequence [default: 1024, for the small model 128]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    seq: Option<u32>,
    /// bf16, fp16 or fp32 [default: bf16 on a GPU, fp32 on the host device]
    #[arg(long)]
    dtype: Option<DType>,
    /// auto, host or cuda
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Bytes of device memory of the offloaded step, as 5GiB [default: half of what the resident one takes]
    #[arg(long)]
    gpu_budget: Option<Bytes>,
    /// Bytes of page-locked host memory [default: what the placement can use, up to half of what is free]
    #[arg(long)]
    pinned_budget: Option<Bytes>,
    /// auto, resident or pinned: with the first two optimizer states stay on the device where it has room
    #[arg(long, default_value = "pinned", value_parser = placement)]
    placement: Policy,
    /// Whether the norm of the gradient clips every step, or none
    #[arg(long, default_value = "never", value_parser = ["never", "always"])]
    clips: String,
    /// Update before the norm of the gradient is known: auto, always or never
    #[arg(long, default_value = "auto")]
    ahead: Ahead,
    /// adamw, sgd, lion, adagrad or lamb
    #[arg(long, default_value = "adamw")]
    optimizer: Optimizer,
    /// Type of the optimizer's moments, fp32 or bf16
    #[arg(long, default_value = "fp32")]
    moments: Moment,
    /// Keep the fp32 master as the 16 bits that a bf16 parameter is short of it
    #[arg(long)]
    split_master: bool,
    /// Apply a gradient beside the next step, an approximation: the bound has no backward pass before updates
    #[arg(long, conflicts_with = "ahead")]
    delayed_update: bool,
    /// Steps that are timed, of each kind
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    steps: u32,
    /// Threads of the optimizer and of the host device [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Bind the optimizer's threads to a CPU each, and those of the bare pass over its states
    #[arg(long)]
    bind_threads: bool,
    /// Leave the resident step out, where it takes too long or too much
    #[arg(long)]
    skip_resident: bool,
    /// A folder for a file that stays empty of states [default: the system's for temporary files]
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Writes what each lane did when, for Perfetto or chrome://tracing
    #[arg(long)]
    trace: Option<PathBuf>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Steps before those that are timed: kernels are compiled, products choose their algorithms.
const WARM_UP: u32 = 3;
/// The same before steps whose gradients are thrown away: by then updates have ceased to run ahead.
const WARM_UP_ALONE: u32 = 8;

/// What one way to place the states reached.
struct Reached {
    /// Seconds of a whole step, median.
    step_s: f64,
    /// Seconds of a step without its update: forward and backward.
    alone_s: f64,
    report: Report,
}

/// Everything found.
struct Found {
    parameters: u64,
    tokens: u64,
    resident: Option<Reached>,
    ours: Reached,
    /// Before our steps and behind them.
    traffic: [traffic::Report; 2],
    bound: Bound,
}

impl Found {
    /// The step's bare traffic, the mean of before and behind.
    fn together_s(&self) -> f64 {
        self.traffic.iter().map(|t| t.together_s).sum::<f64>() / 2.0
    }

    /// The largest of the bound by this run's own compute and the resident step.
    fn bound(&self) -> (f64, &'static str) {
        let own = (self.bound.seconds, self.bound.by);
        match &self.resident {
            Some(resident) if resident.step_s > own.0 => (resident.step_s, "the resident step"),
            _ => own,
        }
    }
}

impl Step {
    pub(super) fn run(&self) -> std::result::Result<(), String> {
        let found = with_progress(|progress| self.measure(progress));
        let found = found.map_err(|error| error.to_string())?;
        if self.json {
            println!("{}", object(&found));
        } else {
            self.table(&found);
        }
        Ok(())
    }

    fn measure(&self, progress: &mut dyn FnMut(&str)) -> Result<Found> {
        let folder = Folder::new(self.disk.as_deref())?;
        let mut options = self.options(&folder.0);
        let target = options.target()?;
        let decoder = self.decoder(target)?;
        let footprint = decoder.footprint(target)?;
        let needs = |options: &Options| requirements(decoder.model(), footprint, options);
        let mut resident = Options {
            placement: Policy::Resident,
            updates: Updates::Exact,
            device_budget: None,
            pinned_budget: None,
            trace: None,
            ..options.clone()
        };
        let takes = needs(&resident)?;
        (resident.device_budget, resident.pinned_budget) =
            (Some(takes.device_bytes), Some(takes.pinned_bytes));
        let machine = forebay::machine::default_budgets(target);
        let fits = takes.device_bytes <= machine.device_bytes
            && takes.pinned_bytes <= machine.pinned_bytes;
        let resident = if fits && !self.skip_resident {
            progress("the resident step");
            let mut trainer = self.open(&decoder, &resident)?;
            Some(self.reach(&decoder, &mut trainer, target)?)
        } else {
            None
        };
        options.device_budget.get_or_insert(takes.device_bytes / 2);
        progress("rates of this machine");
        options.rates = rates(&options, &decoder, footprint, resident.as_ref())?;
        let pinned = needs(&options)?.pinned_bytes.min(machine.pinned_bytes);
        options.pinned_budget.get_or_insert(pinned);
        let dtype = decoder.model().dtype();
        let plan = |report: &Report| traffic::Plan {
            device: self.device,
            threads: options.threads,
            bind: options.bind_threads,
            // As many bytes as ours moves.
            elements: report.traffic.updated_by_cpu * options.update_bytes(dtype) / adam::BYTES,
            h2d_bytes: report.traffic.h2d,
            d2h_bytes: report.traffic.d2h,
            rounds: 3,
        };
        let mut trainer = self.open(&decoder, &options)?;
        progress("bare traffic");
        let before = traffic::run(&plan(&trainer.report()))?;
        progress("the offloaded step");
        let ours = self.reach(&decoder, &mut trainer, target)?;
        progress("bare traffic");
        let behind = traffic::run(&plan(&ours.report))?;
        let together = (before.together_s + behind.together_s) / 2.0;
        let copies = (before.copies_s + behind.copies_s) / 2.0;
        let rate = |amount: u64, seconds: f64| match amount {
            0 => f64::INFINITY,
            amount => amount as f64 / seconds,
        };
        let moved = ours.report.traffic;
        let bound = ours.report.bound(&Ceilings {
            h2d: rate(moved.h2d.max(moved.d2h), copies),
            d2h: rate(moved.h2d.max(moved.d2h), copies),
            disk_read: f64::INFINITY,
            disk_write: f64::INFINITY,
            // With the copies beside it.
            adam: rate(moved.updated_by_cpu, together),
        });
        Ok(Found {
            parameters: decoder.model().parameters(),
            tokens: u64::from(self.batch) * self.seq(target) as u64,
            resident,
            ours,
            traffic: [before, behind],
            bound,
        })
    }

    fn options(&self, folder: &Path) -> Options {
        let mut options = Options::new([folder.to_owned()]);
        options.device = self.device;
        options.device_budget = self.gpu_budget.map(|bytes| bytes.0);
        options.pinned_budget = self.pinned_budget.map(|bytes| bytes.0);
        (options.placement, options.ahead) = (self.placement, self.ahead);
        (options.optimizer, options.moments) = (self.optimizer, self.moments);
        options.split_master = self.split_master;
        if self.delayed_update {
            options.updates = Updates::Delayed;
        }
        // A norm that is looked at in every step, and one that every gradient exceeds.
        options.clip = Some(if self.clips == "always" { 1e-6 } else { 1e12 });
        if let Some(threads) = self.threads {
            options.threads = threads as usize;
        }
        options.bind_threads = self.bind_threads;
        options.publish = Publish::Never;
        options.trace.clone_from(&self.trace);
        options
    }

    fn small(&self, target: Target) -> bool {
        self.preset.is_none() && target != Target::Cuda
    }

    fn seq(&self, target: Target) -> usize {
        let usual = if self.small(target) { 128 } else { 1024 };
        self.seq.map_or(usual, |seq| seq as usize)
    }

    fn decoder(&self, target: Target) -> Result<Decoder> {
        let config = if self.small(target) {
            Config::byte_level()
        } else {
            let name = self.preset.as_deref().unwrap_or("1.3b");
            Config::preset(name).ok_or_else(|| {
                let names: Vec<_> = Config::presets().collect();
                Error::Misuse(format!("--preset {name}: use one of {}", names.join(", ")))
            })?
        };
        let usual = match target {
            Target::Cuda => DType::Bf16,
            _ => DType::F32,
        };
        let dtype = self.dtype.unwrap_or(usual);
        Decoder::compute_in(dtype, config, self.batch as usize, self.seq(target))?
            .with_checkpoints_every(self.checkpoint_every as usize)?
            .in_micro_batches(self.micro_batches as usize)
    }

    fn open(&self, decoder: &Decoder, options: &Options) -> Result<Trainer> {
        let footprint = decoder.footprint(options.target()?)?;
        let model = decoder.model().clone();
        Trainer::create(model, footprint, options, &mut RandomInit { seed: 0 })
    }

    /// Steps, and then steps whose gradients are thrown away.
    fn reach(&self, decoder: &Decoder, trainer: &mut Trainer, target: Target) -> Result<Reached> {
        let seq = self.seq(target);
        let ids = |count: usize, salt: u64| -> Vec<u32> {
            let vocabulary = decoder.config().vocabulary as u64;
            // Any that differ: multiplication with a large odd number shakes the bits.
            let mix = |i: u64| (i + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            (0..count as u64)
                .map(|i| (mix(i) % vocabulary) as u32)
                .collect()
        };
        let count = self.batch as usize * seq;
        let time = |trainer: &mut Trainer, warm_up: u32, discard: bool| -> Result<f64> {
            let (mut seconds, mut start) = (Vec::new(), Instant::now());
            for index in 0..warm_up + self.steps {
                let salt = u64::from(index) << 32;
                let batch = Batch {
                    ids: &ids(count, salt),
                    targets: &ids(count, salt | 1 << 31),
                };
                let step = trainer.begin(1e-4)?;
                decoder.train_step(&step, &batch)?;
                if discard {
                    step.discard()?;
                } else {
                    step.finish()?;
                }
                if index >= warm_up {
                    seconds.push(start.elapsed().as_secs_f64());
                }
                start = Instant::now();
            }
            seconds.sort_by(f64::total_cmp);
            Ok(seconds[seconds.len() / 2])
        };
        let step_s = time(trainer, WARM_UP, false)?;
        trainer.settle()?;
        let report = trainer.report();
        let alone_s = time(trainer, WARM_UP_ALONE, true)?;
        Ok(Reached {
            step_s,
            alone_s,
            report,
        })
    }

    fn table(&self, found: &Found) {
        let (ours, tokens) = (&found.ours, found.tokens as f64);
        println!(
            "{}; {:.2} M parameters, {} tokens a step; clips {}; {}; updates {}",
            ours.report.device,
            found.parameters as f64 / 1e6,
            found.tokens,
            self.clips,
            ours.report.states,
            ours.report.updates
        );
        let line = |what: &str, seconds: f64, more: String| {
            println!("{what:<44} {:>9.1} ms  {more}", seconds * 1e3);
        };
        match &found.resident {
            Some(resident) => {
                let rate = format!("{:.0} tokens/s", tokens / resident.step_s);
                line("resident step", resident.step_s, rate);
                line("  forward and backward", resident.alone_s, String::new());
            }
            None => println!("resident step: left out, or more than the device has"),
        }
        let mean =
            |pick: fn(&traffic::Report) -> f64| found.traffic.iter().map(pick).sum::<f64>() / 2.0;
        let updated = ours.report.traffic.updated_by_cpu;
        let rate = format!(
            "{:.2} Gparam/s",
            updated as f64 / mean(|t| t.adam_s).max(1e-12) / 1e9
        );
        line(
            "bare pass over the optimizer's states",
            mean(|t| t.adam_s),
            rate,
        );
        let moved = ours.report.traffic;
        let bytes = format!(
            "{} to the device, {} from it",
            Bytes(moved.h2d),
            Bytes(moved.d2h)
        );
        line("bare copies", mean(|t| t.copies_s), bytes);
        let [first, second] = found.traffic;
        let spread = format!(
            "{:.3} from one time to the other, {:.3} within",
            second.together_s / first.together_s,
            first.spread.max(second.spread)
        );
        line("both together", found.together_s(), spread);
        let (bound, by) = found.bound();
        line("bound", bound, format!("by {by}"));
        let ratio = format!(
            "{:.3} x bound, {:.0} tokens/s",
            ours.step_s / bound,
            tokens / ours.step_s
        );
        line("offloaded step", ours.step_s, ratio);
        let against = found.resident.as_ref().map_or(String::new(), |resident| {
            format!(
                "{:.3} of the resident speed",
                resident.alone_s / ours.alone_s
            )
        });
        line("  forward and backward", ours.alone_s, against);
        println!("the device has room for {}", ours.report.keeps);
        println!("the optimizer's threads: {}", ours.report.threads);
        let [device, pinned, _] = &ours.report.tiers;
        println!(
            "peaks: device {} of {}, pinned {} of {}",
            Bytes(device.peak_bytes),
            Bytes(device.budget_bytes),
            Bytes(pinned.peak_bytes),
            Bytes(pinned.budget_bytes)
        );
        let ahead = ours.report.ahead;
        let all = (updated * ours.report.steps).max(1) as f64;
        println!(
            "ahead of the gradient's norm in {} of {} steps, {} of them undone: {:.1} % of the CPU's updates, \
             {:.1} % of them left for it",
            ahead.steps,
            ours.report.steps,
            ahead.undone,
            100.0 * ahead.elements as f64 / all,
            100.0 * ahead.left as f64 / (ahead.elements as f64).max(1.0)
        );
    }
}

fn object(found: &Found) -> serde_json::Value {
    let reached = |reached: &Reached| {
        let [device, pinned, _] = &reached.report.tiers;
        json!({
            "step_s": reached.step_s,
            "forward_backward_s": reached.alone_s,
            "device_keeps": {
                "params": reached.report.keeps.params,
                "checkpoints": reached.report.keeps.checkpoints,
                "optim": reached.report.keeps.optim,
            },
            "device_peak_bytes": device.peak_bytes,
            "pinned_peak_bytes": pinned.peak_bytes,
            "ahead_steps": reached.report.ahead.steps,
            "undone_steps": reached.report.ahead.undone,
            "ahead_elements": reached.report.ahead.elements,
            "ahead_left_over": reached.report.ahead.left,
            "steps": reached.report.steps,
        })
    };
    let traffic = |t: &traffic::Report| {
        json!({
            "adam_s": t.adam_s,
            "copies_s": t.copies_s,
            "together_s": t.together_s,
            "spread": t.spread,
        })
    };
    let (bound_s, bound_by) = found.bound();
    json!({
        "optimizer": found.ours.report.states,
        "updates": found.ours.report.updates.to_string(),
        "device": found.ours.report.device,
        "threads": found.ours.report.threads,
        "parameters": found.parameters,
        "tokens": found.tokens,
        "resident": found.resident.as_ref().map(reached),
        "traffic": found.traffic.each_ref().map(traffic),
        "bound_s": bound_s,
        "bound_by": bound_by,
        "offloaded": reached(&found.ours),
    })
}

/// What the placement of the offloaded step is chosen by; of the GPU itself, what the resident step took.
fn rates(
    options: &Options,
    decoder: &Decoder,
    footprint: Footprint,
    resident: Option<&Reached>,
) -> Result<Option<PlaceRates>> {
    let model = decoder.model();
    let mut rates = Ceilings::measure(options, model.dtype())?.rates(options, model, footprint)?;
    if let (Some(rates), Some(resident)) = (&mut rates, resident) {
        rates.compute_s = resident.alone_s;
        let update_s = resident.step_s - resident.alone_s;
        if update_s > 0.0 {
            rates.device_update = model.elements() as f64 / update_s;
        }
    }
    Ok(rates)
}

/// The disk's traffic has no ceiling here.
fn placement(text: &str) -> std::result::Result<Policy, String> {
    match text.parse()? {
        Policy::Disk => Err("what is on disk is not measured here; use bench nvme".to_owned()),
        policy => Ok(policy),
    }
}

/// A folder of its own that goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(parent: Option<&Path>) -> Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let folder = parent.join(format!("forebay-bench-{}", std::process::id()));
        // Not one that is there already: it goes with us.
        match std::fs::create_dir(&folder) {
            Ok(()) => Ok(Self(folder)),
            Err(error) => Err(Error::Misuse(format!(
                "making {}: {error}; give --disk a folder that can be written",
                folder.display()
            ))),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
