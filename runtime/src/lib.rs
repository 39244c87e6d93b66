//! Forebay: a heterogeneous memory offload runtime, for models larger than the GPU.
//!
//! A model is a list of **sections** (tensors that move together) and of **stages** (what a step
//! computes, in order, and which sections each stage uses). The runtime keeps the sections' states
//! on the device, in page-locked memory and on disk, under budgets, and has each in place just
//! before it is used (ZeRO-Infinity, arXiv 2104.07857). A trainer walks through a [`Step`], takes a
//! lease on each stage and queues operations: [`ops`], or its own.
//!
//! Here is a whole trainer: a linear model that learns the sum of its inputs, with an operation of
//! its own for the loss.
//!
//! ```
//! use forebay::*;
//!
//! /// loss = mean (y - target)², dy its gradient
//! #[derive(Clone, Copy)]
//! struct SquaredError;
//!
//! impl Operation for SquaredError {
//!     fn name(&self) -> &'static str { "squared_error" }
//!     fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
//!         let (x, y) = (args.input::<u32>()?, args.input::<f32>()?);
//!         let (loss, dy) = (args.output::<f32>()?, args.output::<f32>()?);
//!         loss[0] = 0.0;
//!         for (i, y) in y.iter().enumerate() {
//!             let target = x[4 * i..4 * i + 4].iter().sum::<u32>() as f32;
//!             loss[0] += (y - target).powi(2) / dy.len() as f32;
//!             dy[i] = 2.0 * (y - target) / dy.len() as f32;
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let mut model = Model::new("sum");
//! let table = model.section(Section::new("table").tensor("w", [8, 16], Init::Normal(0.3)));
//! let head = model.section(Section::new("head").tensor("w", [1, 64], Init::Normal(0.3)));
//! let both = [table, head];
//! let stage = model.train_stage(Stage::new("all").params(both).grads(both));
//!
//! let walk = |step: &Step<'_>, x: &[u32]| -> Result<()> {
//!     let ids = step.upload(x, [32, 4])?;
//!     let lease = step.enter(stage)?;
//!     let frame = step.frame();
//!     let mut rows = frame.tensor([32 * 4, 16])?;
//!     ops::embedding(step, &ids, &lease.param(table, "w")?, &mut rows)?;
//!     let (mut y, mut dy) = (frame.tensor([32, 1])?, frame.tensor([32, 1])?);
//!     let rows = rows.as_ref().reshape([32, 64])?;
//!     ops::linear(step, &rows, &lease.param(head, "w")?, &mut y)?;
//!     let mut loss = frame.tensor([1])?;
//!     step.launch(SquaredError, &[ids, y.as_ref()], &[loss.reborrow(), dy.reborrow()])?;
//!     step.loss(&loss.as_ref())?;
//!     ops::linear_dw(step, &rows, &dy.as_ref(), &mut lease.grad(head, "w")?)?;
//!     let mut drows = frame.tensor([32, 64])?;
//!     ops::linear_dx(step, &dy.as_ref(), &lease.param(head, "w")?, &mut drows, ops::Assign::Set)?;
//!     ops::embedding_backward(step, &ids, &drows.as_ref(), &mut lease.grad(table, "w")?)
//! };
//!
//! # let folder = tempfile::tempdir().unwrap();
//! let mut options = Options::new([folder.path().to_owned()]);
//! (options.device_budget, options.pinned_budget) = (Some(1 << 20), Some(1 << 20));
//! let needs = footprint(&model, Pass::Train, options.target()?, |step| walk(step, &[0; 128]))?;
//! let mut trainer = Trainer::create(model, needs, &options, &mut RandomInit { seed: 7 })?;
//! let mut losses = Vec::new();
//! for index in 0..200u32 {
//!     let x: Vec<u32> = (0..128).map(|i| (i * 37 + index * 101 + i * i) % 8).collect();
//!     let step = trainer.begin(0.03)?;
//!     walk(&step, &x)?;
//!     losses.extend(step.finish()?.loss);
//! }
//! trainer.publish("200 steps")?; // Trainer::resume goes on from here, to the bit
//! assert!(losses[199] < 0.05 * losses[0], "{} to {}", losses[0], losses[199]);
//! # Ok::<(), Error>(())
//! ```
#![deny(missing_docs)]

pub mod bench;
mod bytes;
mod device;
mod error;
pub mod machine;
mod model;
mod operation;
pub mod ops;
mod queue;
mod target;
mod tensor;
mod trainer;

pub use bytes::{Bytes, BytesError};
pub use error::{Error, Result};
pub use forebay_kernels::cuda::Args;
pub use forebay_nvme as nvme;
pub use forebay_prefetch::{Bound, Budgets, PlaceRates, Traffic};
pub use model::{Init, Model, Section, SectionId, Stage, StageId, TensorSpec};
pub use operation::{
    CudaArgs, CudaContext, DeviceSlice, Element, HostArgs, HostContext, Operation,
};
pub use tensor::{DType, Shape, Tensor, TensorMut};
pub use trainer::{
    Adagrad, AdamW, Ahead, AheadReport, Ceilings, DeviceChoice, DeviceKeeps, DynamicScale,
    ExternalStream, Finished, Footprint, Frame, HopReport, IoChoice, Lamb, Lion, LossScale, Moment,
    Optimizer, Options, Pass, Policy, Publish, PublishCost, RandomInit, Report, Sgd, StageLease,
    Step, Target, TierReport, Trainer, Updates, Weights, footprint, requirements, stored_user_text,
};
