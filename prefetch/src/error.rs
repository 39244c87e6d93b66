//! Why a model cannot be placed or planned.

/// What placing and planning can refuse. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device budget cannot hold one step.
    #[error(
        "the device budget of {have} bytes is too small: this model needs at least {least} bytes \
         with this batch and placement; give --gpu-budget {least} or more"
    )]
    DeviceBudget {
        /// The budget given.
        have: u64,
        /// The least that works.
        least: u64,
    },
    /// The pinned budget cannot hold what must pass through it.
    #[error(
        "the pinned budget of {have} bytes is too small: this model needs at least {least} bytes \
         with this placement; give --pinned-budget {least} or more"
    )]
    PinnedBudget {
        /// The budget given.
        have: u64,
        /// The least that works.
        least: u64,
    },
    /// The model's stages do not make sense.
    #[error("stage '{stage}': {what}")]
    Stage {
        /// The stage's name.
        stage: String,
        /// What is wrong.
        what: String,
    },
    /// A section has no size.
    #[error("section '{section}' is empty")]
    EmptySection {
        /// The section's name.
        section: String,
    },
}
