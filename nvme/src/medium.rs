//! The seam below the store: what its files lie on. Real folders ([`Folders`](crate::Folders)), or a
//! [simulated disk](crate::sim).

use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::io::{Io, Region, Tuning};

/// Blocks of direct I/O: extents and transfers are multiples of this, the largest in use.
pub const BLOCK: u64 = 4096;

/// What a volume is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To make a store: files are made where there are none.
    Create,
    /// To use a store: one owner at a time.
    Own,
    /// To look at a store that another may be using.
    Look,
}

/// Where stores can be.
pub trait Medium: Debug + Send + Sync {
    /// Opens the data file of each folder.
    ///
    /// # Errors
    /// [`Error::Folder`], [`Error::Locked`], [`Error::NoGeneration`].
    fn open(&self, folders: &[PathBuf], access: Access) -> Result<Box<dyn Volume>, Error>;

    /// Whether I/O is done on the thread that asks for its results: a simulation, in an order of its
    /// own choice.
    fn simulated(&self) -> bool {
        false
    }
}

/// The data files of one store, open. Given up on drop, with the right to own them.
pub trait Volume: Send {
    /// The path of a file.
    fn path(&self, file: usize) -> &Path;

    /// Its length in bytes.
    ///
    /// # Errors
    /// The system's.
    fn len(&self, file: usize) -> io::Result<u64>;

    /// Bytes that could be added to it.
    ///
    /// # Errors
    /// [`Error::Folder`].
    fn free(&self, file: usize) -> Result<u64, Error>;

    /// Makes it at least `bytes` long, with the space really there.
    ///
    /// # Errors
    /// [`Error::Space`], [`Error::Folder`].
    fn reserve(&mut self, file: usize, bytes: u64) -> Result<(), Error>;

    /// Makes the files' names durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn sync_names(&mut self) -> Result<(), Error>;

    /// What makes the I/O on the files, on the thread that will use it.
    ///
    /// # Errors
    /// The system's.
    fn io(&self, region: Option<Region>, tuning: Tuning) -> io::Result<IoMaker>;
}

/// Makes an [`Io`].
pub type IoMaker = Box<dyn FnOnce() -> io::Result<Box<dyn Io>> + Send>;

/// Whole blocks for so many bytes, one at least.
pub(crate) fn padded(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(BLOCK)
}
