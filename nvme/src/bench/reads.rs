//! Bare reads by themselves, for whoever measures what goes on behind a store.

use std::path::Path;

use forebay_pinned::Arena;

use super::bare::Bare;
use super::{Kind, window};
use crate::io::Tuning;
use crate::{Error, Key, Store};

/// A bare io_uring loop over extents that a store leaves to it: the ceiling of reading them. No
/// checksum, no other thread.
pub struct BareReads<'a> {
    bare: Bare<'a>,
    window: u64,
}

impl<'a> BareReads<'a> {
    /// Bare reads of these keys, extents of [`super::EXTENT`] bytes each, of a store with one folder,
    /// through the first bytes of an arena of [`super::SLICE`] bytes.
    ///
    /// # Errors
    /// [`Error::Folder`]; [`Error::Misuse`] where none of the keys was written.
    pub fn of(
        store: &Store,
        folder: &Path,
        keys: impl IntoIterator<Item = Key>,
        arena: &'a Arena,
        tuning: Tuning,
    ) -> Result<Self, Error> {
        let places: Vec<u64> = keys.into_iter().filter_map(|k| store.place(k)).collect();
        if places.is_empty() {
            return Err(Error::Misuse("bare reads of nothing".to_owned()));
        }
        let data = crate::folders::data_path(folder);
        let mut bare = Bare::open(&data, places, arena, tuning)?;
        bare.set(tuning.block, tuning.depth);
        Ok(Self {
            bare,
            window: window(tuning.block, tuning.depth),
        })
    }

    /// Bytes of the arena that are enough to keep the disk's queue full: whoever is compared with
    /// this may use as many.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Reads [`super::SLICE`] bytes, the queue kept full; bytes per second.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn slice(&mut self) -> Result<f64, Error> {
        Ok(self.bare.slice(Kind::Read, (1, 0))?.rate())
    }
}

impl std::fmt::Debug for BareReads<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BareReads through {} bytes", self.window)
    }
}
