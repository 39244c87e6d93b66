//! Forebay's host tier: one arena of page-locked memory with a hard cap.
//!
//! The arena is one mapping, locked and faulted in when it is made, so that it can be registered
//! once with a GPU driver and once with io_uring, and nothing on the path of a step allocates. A
//! [`Slab`] is a leased piece of it, owned by whoever holds the value: an operation that needs the
//! memory takes the slab and gives it back with its result.
//!
//! ```
//! use forebay_pinned::Arena;
//!
//! let arena = Arena::new(1 << 20)?;
//! let mut slab = arena.lease(1000)?;
//! slab.fill(7);
//! assert_eq!((slab.len(), arena.used()), (1000, 4096));
//! drop(slab);
//! assert_eq!((arena.used(), arena.peak()), (0, 4096));
//! # Ok::<(), forebay_pinned::Error>(())
//! ```
#![deny(missing_docs)]

mod arena;
mod error;
mod free_list;
mod mapping;

pub use arena::{ALIGN, Arena, Slab};
pub use error::Error;
pub use mapping::Lock;
