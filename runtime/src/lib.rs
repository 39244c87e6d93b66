//! Forebay: a heterogeneous memory offload runtime.
#![deny(missing_docs)]

mod bytes;
mod device;
mod error;
pub mod machine;
mod model;
mod operation;
pub mod ops;
mod queue;
mod tensor;
mod trainer;

pub use bytes::{Bytes, BytesError};
pub use error::{Error, Result};
pub use forebay_prefetch::{Bound, Budgets};
pub use model::{Init, Model, Section, SectionId, Stage, StageId, TensorSpec};
pub use operation::{Element, HostArgs, HostContext, Operation};
pub use tensor::{DType, Shape, Tensor, TensorMut};
pub use trainer::{
    AdamW, Ceilings, DeviceChoice, Finished, Footprint, Frame, HopReport, IoChoice, Options, Pass,
    Policy, RandomInit, Report, StageLease, Step, TierReport, Trainer, Weights, footprint,
    requirements, stored_user_text,
};
