//! How a trainer is opened.

use std::path::PathBuf;
use std::sync::Arc;

pub use forebay_kernels::cpu::AdamW;
pub use forebay_nvme::IoChoice;
use forebay_nvme::medium::Medium;
pub use forebay_prefetch::Policy;

use super::loss_scale::LossScale;
use crate::error::Result;
pub use crate::target::{DeviceChoice, ExternalStream, Target};

/// How often [`Trainer::publish`](crate::Trainer::publish) will be called: what the disk must keep for
/// it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Publish {
    /// At any time: the disk holds each state twice, the published version and the next.
    #[default]
    Often,
    /// Once, at the end: a new store holds each state once (a resumed one keeps what it resumed).
    /// Until then a crash leaves what there was before the run.
    End,
    /// Never: the disk is swap, each state on it held once. Nothing survives the run.
    Never,
}

/// Whether sections whose states are in pinned memory are updated while the backward pass goes on, before the
/// norm of the whole gradient is known. Where it then clips or skips the step, what they overwrote is brought
/// back and updated anew. Results do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ahead {
    /// Where pinned memory is left to log what is overwritten (4.2 bytes a parameter, and the gradient's where the
    /// device has the parameter), as long as that pays.
    #[default]
    Auto,
    /// Where memory is left, in every step.
    Always,
    /// Never: updates wait for the norm.
    Never,
}

impl std::str::FromStr for Ahead {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(format!("'{text}': use auto, always or never")),
        }
    }
}

/// What a trainer may use and how it updates. Start from [`Options::new`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The device that computes.
    pub device: DeviceChoice,
    /// The CUDA stream to compute on, where it is not to be one of the trainer's own.
    pub stream: Option<ExternalStream>,
    /// Bytes of device memory: parameters, gradients, activations and scratch, and optimizer states where
    /// there is room still. `None`: from what the machine has free.
    pub device_budget: Option<u64>,
    /// Bytes of page-locked host memory. `None`: from what the machine has free.
    pub pinned_budget: Option<u64>,
    /// Folders of the disk tier, each on a disk of its own; at least one.
    pub disk: Vec<PathBuf>,
    /// Where states may live.
    pub placement: Policy,
    /// Stages by which copies to the device run ahead of compute; reads from disk run one more
    /// ahead. 0 turns overlap off.
    pub lookahead: u32,
    /// Threads of the host device and of the CPU optimizer, each. Results do not depend on it.
    pub threads: usize,
    /// The optimizer. Its learning rate is given anew at each step.
    pub optimizer: AdamW,
    /// The largest global norm of a step's gradient; larger ones are scaled down to it. With
    /// `None`, sections whose states are on disk are updated before the backward pass has ended.
    pub clip: Option<f64>,
    /// By what steps multiply the gradient of their loss. Where it is not nothing, a step has to ask for it
    /// ([`Step::loss_scale`](crate::Step::loss_scale)).
    pub loss_scale: LossScale,
    /// Whether updates run before the norm that `clip` looks at is known.
    pub ahead: Ahead,
    /// Most elements updated in one piece; `None`: a 128th of the model, from 64 Ki to 4 Mi.
    pub optimizer_chunk: Option<u64>,
    /// Ranks that every section's optimizer states are split over. One process still holds them all.
    pub partitions: u32,
    /// How often generations will be published.
    pub publish: Publish,
    /// What the disk's folders are on: real ones, or a simulated disk.
    pub medium: Arc<dyn Medium>,
    /// How the disk is driven.
    pub io: IoChoice,
    /// A file for a picture of the run: what each lane did when, in Chrome's trace format.
    pub trace: Option<PathBuf>,
    /// Slows the disk down to this many bytes per second, for experiments and tests.
    pub disk_throttle: Option<u64>,
}

impl Options {
    /// What the operations will run on: what [`footprint`](crate::footprint) must be told.
    ///
    /// # Errors
    /// [`Error::NoDevice`](crate::Error::NoDevice) where a GPU is demanded and there is none.
    pub fn target(&self) -> Result<Target> {
        self.device.target(self.threads)
    }

    /// Defaults: automatic device, budgets and placement, look-ahead 2, clipping at 1.0, AdamW
    /// with betas 0.9 and 0.95 and weight decay 0.1.
    pub fn new(disk: impl IntoIterator<Item = PathBuf>) -> Self {
        Self {
            device: DeviceChoice::Auto,
            stream: None,
            device_budget: None,
            pinned_budget: None,
            disk: disk.into_iter().collect(),
            placement: Policy::Auto,
            lookahead: 2,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            optimizer: AdamW {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
            },
            clip: Some(1.0),
            loss_scale: LossScale::Auto,
            ahead: Ahead::Auto,
            optimizer_chunk: None,
            partitions: 1,
            publish: Publish::Often,
            medium: Arc::new(forebay_nvme::Folders),
            io: IoChoice::Auto,
            trace: None,
            disk_throttle: None,
        }
    }
}
