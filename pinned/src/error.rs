//! What the arena can refuse.

use std::io;

/// Why memory was not to be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The budget is used up.
    #[error(
        "pinned memory exhausted: {wanted} bytes wanted, {free} of {capacity} free (largest piece \
         {largest_free}); raise the pinned budget"
    )]
    Exhausted {
        /// Bytes asked for, rounded to the arena's alignment.
        wanted: u64,
        /// Bytes free in all.
        free: u64,
        /// The largest contiguous piece that is free.
        largest_free: u64,
        /// The arena's size.
        capacity: u64,
    },
    /// The system would not map the arena at all.
    #[error("mapping {bytes} bytes of host memory: {source}; lower the pinned budget")]
    Map {
        /// Bytes wanted.
        bytes: u64,
        /// The system's reason.
        source: io::Error,
    },
}
