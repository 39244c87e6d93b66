//! The async face (feature `tokio-uring`): the same extents, read and written from async code.
//!
//! An [`AsyncStore`] lives on the thread of a `tokio_uring` runtime and is used by its tasks. Transfers
//! are as verified as a [`Store`]'s, and a slab belongs to its operation until the kernel is done with
//! it, even if the future is dropped.
//!
//! Limits: the crate below is behind on releases and knows neither registered buffers of an arena nor
//! priorities; one request moves a whole extent; [`AsyncStore::publish`] blocks its thread for the time
//! of a few syncs; a write whose future is dropped leaves its place unused until the store is opened
//! again.
//!
//! ```no_run
//! use forebay_nvme::{aio::AsyncStore, *};
//! use forebay_pinned::Arena;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let arena = Arena::new(1 << 20)?;
//! let key = Key { section: 0, state: StateKind::Optim, part: 0 };
//! let layout = Layout::new("tiny", 1, [(key, 100_000, "layer 0")]);
//! tokio_uring::start(async {
//!     let store = AsyncStore::create(&arena, &layout, &Options::new(["/mnt/nvme"]))?;
//!     let slab = store.write(key, arena.lease(100_000)?).await?;
//!     store.publish("step 1")?;
//!     let slab = store.read(key, slab).await?;
//!     # drop(slab);
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! })
//! # }
//! ```

use std::cell::RefCell;
use std::io;

use forebay_pinned::{Arena, Slab};
use tokio_uring::buf::{BoundedBuf, IoBuf, IoBufMut};
use tokio_uring::fs::File;

use crate::checksum::partial;
use crate::key::Key;
use crate::medium::{Access, BLOCK, padded};
use crate::owner::{Direction, Fault, Target};
use crate::{Error, Layout, Options, Store};

/// A store whose transfers are futures. See the module.
#[derive(Debug)]
pub struct AsyncStore {
    store: RefCell<Store>,
    files: Vec<Data>,
}

struct Data(File);

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a data file")
    }
}

/// A slab on loan to the kernel, all of its whole blocks.
struct Loan(Slab);

// SAFETY: a slab's memory does not move and stays leased as long as the slab lives, which the
// operation owns.
unsafe impl IoBuf for Loan {
    fn stable_ptr(&self) -> *const u8 {
        self.0.address()
    }
    fn bytes_init(&self) -> usize {
        self.0.padded_len() as usize
    }
    fn bytes_total(&self) -> usize {
        self.0.padded_len() as usize
    }
}

// SAFETY: as above; the lease is exclusive.
unsafe impl IoBufMut for Loan {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.address()
    }
    unsafe fn set_init(&mut self, _: usize) {}
}

impl AsyncStore {
    /// As [`Store::create`]. Blocks.
    ///
    /// # Errors
    /// As there.
    pub fn create(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        Self::on(Store::create(arena, layout, options)?)
    }

    /// As [`Store::open`]. Blocks.
    ///
    /// # Errors
    /// As there.
    pub fn open(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        Self::on(Store::open(arena, layout, options)?)
    }

    fn on(store: Store) -> Result<Self, Error> {
        let files: Result<Vec<Data>, Error> = (0..store.files())
            .map(|file| {
                let std = crate::folders::open_data(store.data_path(file), Access::Own)?;
                Ok(Data(File::from_std(std)))
            })
            .collect();
        Ok(Self {
            files: files?,
            store: RefCell::new(store),
        })
    }

    /// Reads the current version of a key into the first bytes of the slab, verified.
    ///
    /// # Errors
    /// As [`Store::read`] and [`Store::wait`].
    pub async fn read(&self, key: Key, slab: Slab) -> Result<Slab, Error> {
        let (index, target, checksum) = self.store.borrow_mut().begin_read(key, &slab)?;
        let pending = Pending::new(self, index, Direction::Read);
        let (slab, moved) = self.transfer(&target, slab, Direction::Read).await;
        let result = moved.and_then(|()| {
            let found = partial(target.seed, 0, &slab[..target.bytes as usize]);
            if found == checksum {
                Ok(found)
            } else {
                Err(Fault::Checksum)
            }
        });
        pending.end(result)?;
        Ok(slab)
    }

    /// Writes the first bytes of the slab as the new version of a key.
    ///
    /// # Errors
    /// As [`Store::write`] and [`Store::wait`].
    pub async fn write(&self, key: Key, slab: Slab) -> Result<Slab, Error> {
        let (index, target) = self.store.borrow_mut().begin_write(key, &slab, false)?;
        let pending = Pending::new(self, index, Direction::Write);
        let checksum = partial(target.seed, 0, &slab[..target.bytes as usize]);
        let (slab, moved) = self.transfer(&target, slab, Direction::Write).await;
        pending.end(moved.map(|()| checksum))?;
        Ok(slab)
    }

    /// As [`Store::publish`]. Blocks; no transfer may be under way.
    ///
    /// # Errors
    /// As there.
    pub fn publish(&self, meta: &str) -> Result<u64, Error> {
        self.store.borrow_mut().publish(meta)
    }

    /// The user's part of the published generation.
    pub fn meta(&self) -> String {
        self.store.borrow().meta().to_owned()
    }

    /// Moves all blocks of a target; the rest of a short transfer is asked for again.
    async fn transfer(
        &self,
        target: &Target,
        slab: Slab,
        direction: Direction,
    ) -> (Slab, Result<(), Fault>) {
        let file = &self.files[target.file as usize].0;
        let all = padded(target.bytes);
        let (mut loan, mut done) = (Loan(slab), 0);
        while done < all {
            let piece = loan.slice(done as usize..all as usize);
            let offset = target.offset + done;
            let (result, piece) = match direction {
                Direction::Read => file.read_at(piece, offset).await,
                Direction::Write => file.write_at(piece, offset).submit().await,
            };
            loan = piece.into_inner();
            let source = match result {
                Ok(moved) if moved as u64 == all - done => break,
                // What is left must start at a block again.
                Ok(moved) if moved > 0 => {
                    done += moved as u64 / BLOCK * BLOCK;
                    continue;
                }
                Ok(_) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            return (loan.0, Err(Fault::Io { offset, source }));
        }
        (loan.0, Ok(()))
    }
}

/// A transfer that has begun; given up if its future is dropped.
struct Pending<'a> {
    store: &'a AsyncStore,
    index: usize,
    direction: Direction,
    ended: bool,
}

impl<'a> Pending<'a> {
    fn new(store: &'a AsyncStore, index: usize, direction: Direction) -> Self {
        Self {
            store,
            index,
            direction,
            ended: false,
        }
    }

    fn end(mut self, result: Result<u64, Fault>) -> Result<(), Error> {
        self.ended = true;
        let mut store = self.store.store.borrow_mut();
        store.end(self.index, self.direction, result)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // The kernel may still be at it: a write's place must not be given to another.
            self.store.store.borrow_mut().abandon(self.index);
        }
    }
}
