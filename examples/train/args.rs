//! The command line of `train`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use forebay::{Ahead, Bytes, DType, DeviceChoice, LossScale, Moment, Optimizer, Policy, Target};
use serde::{Deserialize, Serialize};

/// Train a decoder on text, its states spread over device memory, page-locked host memory and disk.
#[derive(Parser, Debug)]
#[command(version, about)]
pub(crate) struct Args {
    /// Steps of the whole run, those before --resume included [default: 300]
    #[arg(long)]
    pub(crate) steps: Option<u64>,
    /// Sequences in a step [default: 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) batch: Option<u32>,
    /// Pieces in which a layer takes the batch, so that activations take less device memory; gradients add up
    /// [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) micro_batches: Option<u32>,
    /// Layers for each activation checkpoint: with N, memory and traffic for an N-th of them, N states of a
    /// layer in device memory, and layers computed forward once more; auto takes the least with which the
    /// model fits. Results do not depend on it
    #[arg(long, default_value = "auto", value_name = "N | auto", value_parser = checkpoint_every)]
    pub(crate) checkpoint_every: CheckpointEvery,
    /// Tokens in a sequence [default: 128, with --preset 1024]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    pub(crate) seq: Option<u32>,
    /// A Hugging Face config.json (Llama or Qwen3); by default a small byte-level Llama
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// A Llama of this size instead: 125m, 350m, 1.3b, 3b, 7b, 10b or 13b
    #[arg(long, conflicts_with = "config")]
    pub(crate) preset: Option<String>,
    /// Type of parameters and activations, bf16, fp16 or fp32 [default: bf16 on a GPU, fp32 on the host
    /// device]; masters, moments and sums are fp32
    #[arg(long)]
    pub(crate) dtype: Option<DType>,
    /// By what gradients are multiplied on their way, so that small ones are not lost: none, dynamic (halved when
    /// they overflow, doubled after 2000 steps without), or a power of two [default: dynamic in fp16, else none]
    #[arg(long)]
    pub(crate) loss_scale: Option<LossScale>,
    /// Files and folders of text; by default this project's own sources and documents
    #[arg(long, num_args = 1..)]
    pub(crate) data: Vec<PathBuf>,
    /// auto, host or cuda
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// Bytes of device memory, as 512MiB or 8GB; by default what the model needs, up to what is free on a
    /// GPU or a quarter of the machine's on the host device, and for the small model what lets a third
    /// of its layers stay
    #[arg(long, alias = "device-budget")]
    pub(crate) gpu_budget: Option<Bytes>,
    /// Bytes of page-locked host memory; by default what is needed, up to half of what is free (a quarter
    /// on the host device), and for the small model what lets half of its optimizer states stay
    #[arg(long)]
    pub(crate) pinned_budget: Option<Bytes>,
    /// A folder for the disk tier; give it again for each further disk
    #[arg(long)]
    pub(crate) disk: Vec<PathBuf>,
    /// auto, resident, pinned or disk
    #[arg(long, default_value = "auto")]
    pub(crate) placement: Policy,
    /// Stages by which copies run ahead of compute; 0 turns overlap off
    #[arg(long, default_value_t = 2)]
    pub(crate) lookahead: u32,
    /// Threads of the host device and of the CPU optimizer; by default one a core
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Bind the CPU optimizer's threads to a CPU each; for a machine that has nothing else to do
    #[arg(long)]
    pub(crate) bind_threads: bool,
    /// Seed of the weights and of the order of the data [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// adamw, sgd (with momentum 0.9), lion, adagrad or lamb [default: adamw]
    #[arg(long)]
    pub(crate) optimizer: Option<String>,
    /// Type of the optimizer's moments, fp32 or bf16: half the memory, other results [default: fp32]
    #[arg(long)]
    pub(crate) moments: Option<String>,
    /// Keep the fp32 master as the 16 bits that a bf16 parameter is short of it: the same results, 2 bytes less a
    /// parameter
    #[arg(long)]
    pub(crate) split_master: bool,
    /// Peak learning rate [default: 0.003; with sgd 0.1, adagrad 0.01, lion 0.0003]
    #[arg(long)]
    pub(crate) lr: Option<f64>,
    /// Steps over which the learning rate rises to its peak [default: 15]
    #[arg(long)]
    pub(crate) warmup: Option<u64>,
    /// Where the cosine decay ends, as a part of the peak [default: 0.1]
    #[arg(long)]
    pub(crate) lr_floor: Option<f64>,
    /// Weight decay of matrices [default: 0.1]
    #[arg(long)]
    pub(crate) weight_decay: Option<f64>,
    /// Largest global norm of a gradient; 0 turns clipping off [default: 1]
    #[arg(long)]
    pub(crate) clip: Option<f64>,
    /// Update before the norm of the whole gradient is known, and do it anew where that then clips: auto (as
    /// long as it pays, where pinned memory is left for a log of 4 to 6 bytes a parameter), always, never.
    /// Results do not depend on it
    #[arg(long, default_value = "auto")]
    pub(crate) ahead: Ahead,
    /// Apply a step's gradient beside the next step, which computes on the parameters from before (ZeRO-Offload's
    /// one-step delayed update): faster where updates hold steps up, as where each one clips. An approximation: the
    /// losses are others. A generation has every gradient in it, so when they are made matters too
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) delayed_update: Option<bool>,
    /// When to make a generation, from which --resume goes on: `every N` steps, `end` (and when
    /// stopped), or `never` (the disk is swap: half the space, and nothing survives) [default: every
    /// 50]
    #[arg(long, num_args = 1..=2, value_names = ["every N | end | never"])]
    pub(crate) publish: Vec<String>,
    /// Terabytes that the disk is rated to endure (TBW), as 600TB: says how long that will last
    #[arg(long)]
    pub(crate) tbw: Option<Bytes>,
    /// Go on from the newest generation in --disk; what belongs to the run (--steps, --batch,
    /// --lr and the like) is as it was, unless given anew
    #[arg(long)]
    pub(crate) resume: bool,
    /// Stop after this many steps of this run and publish, as Ctrl-C would
    #[arg(long)]
    pub(crate) stop_after: Option<u64>,
    /// Slow the disk down to so many bytes per second, as 200MB
    #[arg(long, hide = true)]
    pub(crate) disk_throttle: Option<Bytes>,
    /// Write what each lane did when to this file, for Perfetto or chrome://tracing
    #[arg(long)]
    pub(crate) trace: Option<PathBuf>,
    /// One JSON object a line: each step, then {"summary": ...}
    #[arg(long)]
    pub(crate) json: bool,
}

/// What --checkpoint-every says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckpointEvery {
    /// The least with which the model fits.
    Auto,
    /// So many layers.
    Layers(usize),
}

fn checkpoint_every(text: &str) -> std::result::Result<CheckpointEvery, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(CheckpointEvery::Auto),
        (_, Ok(layers)) if layers > 0 => Ok(CheckpointEvery::Layers(layers)),
        _ => Err("use auto or a number of layers, 1 or more".to_owned()),
    }
}

/// When a run publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Every(u64),
    End,
    Never,
}

impl Args {
    /// What --publish says.
    pub(crate) fn when(&self) -> Result<When> {
        let words: Vec<&str> = self.publish.iter().map(String::as_str).collect();
        let (number, when) = match words[..] {
            [] => return Ok(When::Every(50)),
            ["end" | "0"] => return Ok(When::End),
            ["never"] => return Ok(When::Never),
            ["every", number] | [number] => (number, number.parse()),
            _ => bail!("--publish {}: use every N, end or never", words.join(" ")),
        };
        match when {
            Ok(steps) if steps > 0 => Ok(When::Every(steps)),
            _ => bail!("--publish {number}: use every N (a number of steps), end or never"),
        }
    }
}

/// What a run is, apart from where it runs: kept in every generation, so that a resumed run is the
/// same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub(crate) steps: u64,
    pub(crate) batch: u32,
    pub(crate) seq: u32,
    #[serde(default = "one")]
    pub(crate) micro_batches: u32,
    pub(crate) seed: u64,
    pub(crate) lr: f64,
    pub(crate) warmup: u64,
    pub(crate) lr_floor: f64,
    pub(crate) weight_decay: f64,
    pub(crate) clip: f64,
    #[serde(default)]
    pub(crate) delayed_update: bool,
    /// What the model computes in.
    #[serde(default = "fp32")]
    pub(crate) dtype: String,
    #[serde(default = "adamw")]
    pub(crate) optimizer: String,
    #[serde(default = "fp32")]
    pub(crate) moments: String,
    #[serde(default)]
    pub(crate) split_master: bool,
    /// As --loss-scale takes it.
    #[serde(default = "auto")]
    pub(crate) loss_scale: String,
}

fn one() -> u32 {
    1
}

fn adamw() -> String {
    "adamw".to_owned()
}

fn fp32() -> String {
    DType::F32.to_string()
}

fn auto() -> String {
    LossScale::Auto.to_string()
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            steps: 300,
            batch: 8,
            seq: 128,
            micro_batches: one(),
            seed: 0,
            lr: 3e-3,
            warmup: 15,
            lr_floor: 0.1,
            weight_decay: 0.1,
            clip: 1.0,
            delayed_update: false,
            dtype: fp32(),
            optimizer: adamw(),
            moments: fp32(),
            split_master: false,
            loss_scale: auto(),
        }
    }
}

impl Recipe {
    /// The recipe of a new run, before the command line.
    pub(crate) fn new(args: &Args, target: Target) -> Self {
        let mut recipe = Self::default();
        if args.preset.is_some() {
            recipe.seq = 1024;
        }
        recipe.lr = match args.optimizer.as_deref() {
            Some("sgd") => 0.1,
            Some("adagrad") => 0.01,
            Some("lion") => 3e-4,
            _ => recipe.lr,
        };
        if target == Target::Cuda {
            recipe.dtype = DType::Bf16.to_string();
        }
        recipe
    }

    /// This recipe with what the command line gives.
    pub(crate) fn with(self, args: &Args) -> Result<Self> {
        let recipe = Self {
            steps: args.steps.unwrap_or(self.steps),
            batch: args.batch.unwrap_or(self.batch),
            seq: args.seq.unwrap_or(self.seq),
            micro_batches: args.micro_batches.unwrap_or(self.micro_batches),
            seed: args.seed.unwrap_or(self.seed),
            lr: args.lr.unwrap_or(self.lr),
            warmup: args.warmup.unwrap_or(self.warmup),
            lr_floor: args.lr_floor.unwrap_or(self.lr_floor),
            weight_decay: args.weight_decay.unwrap_or(self.weight_decay),
            clip: args.clip.unwrap_or(self.clip),
            delayed_update: args.delayed_update.unwrap_or(self.delayed_update),
            dtype: args.dtype.map_or(self.dtype, |dtype| dtype.to_string()),
            optimizer: args.optimizer.clone().unwrap_or(self.optimizer),
            moments: args.moments.clone().unwrap_or(self.moments),
            split_master: args.split_master || self.split_master,
            loss_scale: args.loss_scale.map_or(self.loss_scale, |s| s.to_string()),
        };
        recipe.optimizer()?;
        recipe.moments()?;
        for (flag, value) in [
            ("--lr", recipe.lr),
            ("--lr-floor", recipe.lr_floor),
            ("--weight-decay", recipe.weight_decay),
            ("--clip", recipe.clip),
        ] {
            if !value.is_finite() || value < 0.0 {
                bail!("{flag} {value}: give a number that is not negative");
            }
        }
        Ok(recipe)
    }

    pub(crate) fn dtype(&self) -> Result<DType> {
        self.dtype.parse().map_err(anyhow::Error::msg)
    }

    pub(crate) fn optimizer(&self) -> Result<Optimizer> {
        let optimizer: Optimizer = self.optimizer.parse().map_err(anyhow::Error::msg)?;
        Ok(optimizer.with_decay(self.weight_decay))
    }

    pub(crate) fn moments(&self) -> Result<Moment> {
        self.moments.parse().map_err(anyhow::Error::msg)
    }

    pub(crate) fn loss_scale(&self) -> Result<LossScale> {
        self.loss_scale.parse().map_err(anyhow::Error::msg)
    }

    /// The learning rate of a step: linear warm-up, then a cosine down to the floor.
    pub(crate) fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        let floor = self.lr * self.lr_floor;
        floor + (self.lr - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}
