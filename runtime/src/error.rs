//! The one error type of the runtime: what happened, with the numbers a person needs to act.

use std::path::PathBuf;

use crate::Bytes;

/// What the runtime can refuse or fail at. Every message is one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The budgets cannot hold the model; the message names the least that works.
    #[error("{0}")]
    Placement(#[from] forebay_prefetch::Error),
    /// The disk tier refused or failed.
    #[error("{0}")]
    Disk(#[from] forebay_nvme::Error),
    /// The arena of page-locked memory refused.
    #[error("{0}")]
    Pinned(#[from] forebay_pinned::Error),
    /// A tensor handed to an operation has the wrong shape or type.
    #[error("{operation}: {what}")]
    Shape {
        /// The operation that refused.
        operation: &'static str,
        /// What it expected and what it got.
        what: String,
    },
    /// A kernel refused its input, or an operation panicked: the device is lost from here on.
    #[error("the device failed in '{operation}': {what}; close this trainer and resume it")]
    Device {
        /// The operation that failed first.
        operation: &'static str,
        /// Why.
        what: String,
    },
    /// No device of the wanted kind is here.
    #[error("no {wanted} device: {why}; use --device host (or auto)")]
    NoDevice {
        /// The kind asked for.
        wanted: &'static str,
        /// Why there is none.
        why: String,
    },
    /// The trainer used the API out of order.
    #[error("{0}")]
    Misuse(String),
    /// Scratch memory of the step is used up.
    #[error(
        "scratch memory exhausted: {wanted} wanted, {free} of {capacity} free; measure the step \
         again with forebay::footprint"
    )]
    Scratch {
        /// Bytes asked for.
        wanted: Bytes,
        /// Bytes left.
        free: Bytes,
        /// Bytes declared when the trainer was opened.
        capacity: Bytes,
    },
    /// The model given does not make sense.
    #[error("model: {0}")]
    Model(String),
    /// A generation's trainer part could not be read.
    #[error("generation {generation} in {path}: {what}")]
    Generation {
        /// Its number.
        generation: u64,
        /// The store's first path.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A measurement could not be made.
    #[error("cannot measure {what}: {why}")]
    Measure {
        /// What was to be measured.
        what: &'static str,
        /// Why it cannot be, and what to do.
        why: String,
    },
    /// The operating system refused a thread, a file or memory.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A result of the runtime.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
