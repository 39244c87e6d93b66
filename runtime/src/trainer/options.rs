//! How a trainer is opened.

use std::path::PathBuf;
use std::sync::Arc;

pub use forebay_kernels::cpu::{Adagrad, AdamW, Lamb, Lion, Moment, Optimizer, Sgd};
use forebay_kernels::cpu::{Master, StateFormat};
pub use forebay_nvme::IoChoice;
use forebay_nvme::medium::Medium;
use forebay_prefetch::PlaceRates;
pub use forebay_prefetch::Policy;

use super::loss_scale::LossScale;
use crate::error::Result;
pub use crate::target::{DeviceChoice, ExternalStream, Target};
use crate::tensor::DType;

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
    /// Where pinned memory is left to log what is overwritten (4.2 bytes a parameter of AdamW with fp32 moments, else
    /// its states'; and the gradient's where the device has the parameter and the master is not split), as long as
    /// that pays. Never with LAMB, whose steps need the norms of whole tensors first.
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

/// When a step's gradient is applied. It is part of what a run computes, unlike [`Ahead`] and the placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Updates {
    /// Before the next step computes: AdamW as written.
    #[default]
    Exact,
    /// Beside the next step, which still computes on the parameters from before; the step after it sees them
    /// updated. An approximation (one-step delayed update: ZeRO-Offload, section 5.2) in which a step takes the
    /// longer of computing and updating where the exact one takes their sum, as where every step clips. Results
    /// still depend on no placement, look-ahead or thread count. But [`Trainer::settle`](crate::Trainer::settle),
    /// [`Trainer::publish`](crate::Trainer::publish) and [`Trainer::eval`](crate::Trainer::eval) apply the gradient
    /// that waits, so that the step after them is not delayed: a run has the bits of another that does them behind
    /// the same steps. Nothing runs ahead of the norm ([`Ahead`]).
    Delayed,
}

impl std::fmt::Display for Updates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Delayed => "delayed by a step (approximate)",
        })
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
    /// How fast this machine is ([`Ceilings::rates`](crate::Ceilings::rates)), for [`Policy::Auto`] to choose by what
    /// the device keeps. With `None` that is measured when the trainer opens, if there is a GPU, a model of 64 Mi
    /// parameters or more, and no work for the disk; else the device keeps checkpoints first, then parameters,
    /// then optimizer states.
    pub rates: Option<PlaceRates>,
    /// Stages by which copies to the device run ahead of compute; reads from disk run one more
    /// ahead. 0 turns overlap off.
    pub lookahead: u32,
    /// Threads of the host device and of the CPU optimizer, each. Results do not depend on it.
    pub threads: usize,
    /// Binds the CPU optimizer's threads to a CPU each: one a physical core first, among those that the process
    /// may use. Off by default: another process (or trainer) that does so too would take the same ones, and
    /// what works beside the optimizer (the host device, the disk's thread, a user's own) is driven off its CPU
    /// where it could have moved on. Where the system refuses, [`Report::threads`](crate::Report) says so.
    pub bind_threads: bool,
    /// The optimizer. Its learning rate is given anew at each step.
    pub optimizer: Optimizer,
    /// The type of the optimizer's moments. In bf16 they take half the bytes, and results are others.
    pub moments: Moment,
    /// Whether the fp32 master is kept as the 16 bits that the bf16 parameter is short of it, so that nothing is
    /// stored twice. Results do not depend on it. For models that compute in bf16; sections whose states are on
    /// disk are then updated after the norm, with clipping or without.
    pub split_master: bool,
    /// The largest global norm of a step's gradient; larger ones are scaled down to it. With
    /// `None`, sections whose states are on disk are updated before the backward pass has ended.
    pub clip: Option<f64>,
    /// By what steps multiply the gradient of their loss. Where it is not nothing, a step has to ask for it
    /// ([`Step::loss_scale`](crate::Step::loss_scale)).
    pub loss_scale: LossScale,
    /// Whether updates run before the norm that `clip` looks at is known.
    pub ahead: Ahead,
    /// Whether a step's gradient is applied before the next step or beside it.
    pub updates: Updates,
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

    /// Bytes of the optimizer states of an element.
    pub fn state_bytes(&self) -> u64 {
        self.format().bytes()
    }

    /// Bytes of memory that the update of an element moves in one pass: its states read and written, the gradient read
    /// and the parameter written, both of this type; of a split master the old parameter is read too.
    pub fn update_bytes(&self, dtype: DType) -> u64 {
        let sides = 2 + u64::from(self.split_master);
        2 * self.state_bytes() + sides * dtype.bytes() as u64
    }

    /// How the states of an element are kept.
    pub(crate) fn format(&self) -> StateFormat {
        StateFormat {
            master: match self.split_master {
                true => Master::Split,
                false => Master::F32,
            },
            moment: self.moments,
            moments: self.optimizer.moments(),
        }
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
            rates: None,
            lookahead: 2,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            bind_threads: false,
            optimizer: Optimizer::AdamW(AdamW {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
            }),
            moments: Moment::F32,
            split_master: false,
            clip: Some(1.0),
            loss_scale: LossScale::Auto,
            ahead: Ahead::Auto,
            updates: Updates::Exact,
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
