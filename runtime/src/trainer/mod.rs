//! The training step on three tiers.

mod dry;
mod scratch;
mod step;

pub use dry::{Footprint, Pass, footprint};
pub use step::{Finished, Frame, StageLease, Step};
