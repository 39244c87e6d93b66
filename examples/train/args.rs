//! The command line of `train`.

use std::path::PathBuf;

use clap::Parser;
use forebay::{Bytes, DeviceChoice, Policy};

/// Train a decoder on text, its states spread over device memory, page-locked host memory and disk.
#[derive(Parser, Debug)]
#[command(version, about)]
pub struct Args {
    /// Steps of the whole run, those before --resume included
    #[arg(long, default_value_t = 150)]
    pub steps: u64,
    /// Sequences in a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub seq: u32,
    /// A Hugging Face config.json (Llama or Qwen3); by default a small byte-level Llama
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Files and folders of text; by default this project's own sources and documents
    #[arg(long, num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// auto, host or cuda
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Bytes of device memory, as 512MiB or 8GB; by default what lets a third of the layers stay
    #[arg(long, alias = "device-budget")]
    pub gpu_budget: Option<Bytes>,
    /// Bytes of page-locked host memory; by default what lets half of the optimizer states stay
    #[arg(long)]
    pub pinned_budget: Option<Bytes>,
    /// A folder for the disk tier; give it again for each further disk
    #[arg(long)]
    pub disk: Vec<PathBuf>,
    /// auto, resident, pinned or disk
    #[arg(long, default_value = "auto", value_parser = policy)]
    pub placement: Policy,
    /// Stages by which copies run ahead of compute; 0 turns overlap off
    #[arg(long, default_value_t = 2)]
    pub lookahead: u32,
    /// Threads of the host device and of the CPU optimizer; by default one a core
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Seed of the weights and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Peak learning rate
    #[arg(long, default_value_t = 3e-3)]
    pub lr: f64,
    /// Steps over which the learning rate rises to its peak
    #[arg(long, default_value_t = 15)]
    pub warmup: u64,
    /// Where the cosine decay ends, as a part of the peak
    #[arg(long, default_value_t = 0.1)]
    pub lr_floor: f64,
    /// Weight decay of matrices
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Largest global norm of a gradient; 0 turns clipping off
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Steps between generations on disk; 0: only at the end
    #[arg(long, default_value_t = 50)]
    pub publish: u64,
    /// Go on from the newest generation in --disk
    #[arg(long)]
    pub resume: bool,
    /// Stop after this many steps of this run and publish, as Ctrl-C would
    #[arg(long)]
    pub stop_after: Option<u64>,
    /// Slow the disk down to so many bytes per second, as 200MB
    #[arg(long, hide = true)]
    pub disk_throttle: Option<Bytes>,
    /// One JSON object a line: each step, then {"summary": ...}
    #[arg(long)]
    pub json: bool,
}

fn policy(text: &str) -> Result<Policy, String> {
    match text {
        "auto" => Ok(Policy::Auto),
        "resident" => Ok(Policy::Resident),
        "pinned" => Ok(Policy::Pinned),
        "disk" => Ok(Policy::Disk),
        _ => Err(format!("'{text}' is not a placement: use auto, resident, pinned or disk")),
    }
}

impl Args {
    /// The learning rate of a step: linear warm-up, then a cosine down to the floor.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        let floor = self.lr * self.lr_floor;
        floor + (self.lr - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}
