//! Forebay's disk tier: verified direct I/O, extents and generations.
//!
//! A [`Store`] keeps the states of a model in one file a disk. Every write goes to an extent that
//! the published generation does not use, so that a crash leaves the old or the new generation and
//! never a mix; every read is verified against a checksum that covers the data and where it
//! belongs. Reads and writes take a [`Slab`](forebay_pinned::Slab) and give it back with their
//! result: while the kernel may touch it, nobody else can.
//!
//! ```
//! use forebay_nvme::*;
//! use forebay_pinned::Arena;
//!
//! # let folder = tempfile::tempdir()?;
//! let arena = Arena::new(1 << 20)?;
//! let key = Key { section: 0, state: StateKind::Optim, part: 0 };
//! let layout = Layout::new("tiny", 1, [(key, 100_000, "layer 0")]);
//! let mut store = Store::create(&arena, &layout, &Options::new([folder.path()]))?;
//!
//! let mut slab = arena.lease(100_000)?;
//! slab.fill(7);
//! store.write(key, slab)?;
//! let done = store.wait()?;
//! store.publish("step 1")?;
//!
//! store.read(key, done.slab)?;
//! assert!(store.wait()?.slab.iter().all(|byte| *byte == 7));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]

#[cfg(feature = "tokio-uring")]
pub mod aio;
pub mod bench;
mod buffer;
mod checksum;
mod error;
mod folders;
mod inspect;
pub mod io;
mod key;
pub mod medium;
mod owner;
pub mod probe;
pub mod profile;
pub mod sim;
mod store;

pub use error::Error;
pub use folders::Folders;
pub use inspect::{ExtentInfo, Inspection, Snapshot, inspect, snapshot};
pub use io::{IoChoice, Tuning};
pub use key::{Item, Key, Layout, Shape, StateKind};
pub use owner::{Direction, Priority};
pub use store::{Copies, Done, FORMAT, Ledger, Options, Stats, Store};
