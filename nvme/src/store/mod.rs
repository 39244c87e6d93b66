//! Extents and generations over the I/O.

mod catalog;
mod gather;
mod header;
mod map;
mod open;
mod options;
mod own;
mod publish;
mod space;
mod superblock;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forebay_pinned::{Arena, Slab};

use crate::Error;
use crate::buffer::Buffer;
use crate::key::{Key, Layout, StateKind};
use crate::medium::{Medium, Volume, padded};
use crate::owner::{
    Direction, Ended, Fault, Operation, Owner, Priority, TRANSFERS, Target, Transfer,
};
use catalog::{Catalog, Extent};
pub(crate) use header::{Look, look};
pub use map::Ledger;
pub(crate) use map::{Map, MapExtent};
pub(crate) use open::copy;
pub use options::{Copies, Options};
pub use superblock::FORMAT;

/// A transfer that ended, with its slab.
#[derive(Debug)]
pub struct Done {
    /// What was moved.
    pub key: Key,
    /// Which way.
    pub direction: Direction,
    /// The memory, back.
    pub slab: Slab,
    /// Whether it went well. After a failed read the slab's contents mean nothing.
    pub result: Result<(), Error>,
}

/// What a store has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Bytes read, whole blocks.
    pub read_bytes: u64,
    /// Bytes written, whole blocks, maps and superblocks included.
    pub written_bytes: u64,
    /// Bytes of states read: what was asked for.
    pub payload_read_bytes: u64,
    /// Bytes of states written.
    pub payload_written_bytes: u64,
    /// Time in which at least one transfer was under way.
    pub busy: Duration,
    /// Bytes of the data files.
    pub file_bytes: u64,
    /// The same and more over the store's whole life.
    pub life: Ledger,
}

/// A store of states on disk. See the crate.
pub struct Store {
    // The order of fields is that of their end: I/O first, then the right to the files.
    owner: Owner,
    volume: Box<dyn Volume>,
    paths: Vec<PathBuf>,
    catalog: Catalog,
    /// Lengths of the files.
    lens: Vec<u64>,
    meta: String,
    created: u64,
    life_before: Ledger,
    payload_read: u64,
    payload_written: u64,
    opened: Instant,
    in_flight: usize,
    /// Transfers started, and by key the number of its newest.
    started: u64,
    numbers: Vec<u64>,
    failed: Option<String>,
}

/// Tag of the store's own transfers.
const OWN: u32 = u32::MAX;

impl Store {
    /// Makes a new store. Space for all of it is reserved before this returns.
    ///
    /// # Errors
    /// [`Error::Folder`], [`Error::Exists`], [`Error::Locked`], [`Error::Space`].
    pub fn create(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        open::create(arena, layout, options)
    }

    /// Opens the published generation of a store. The folders may have other names and another
    /// order than when it was made.
    ///
    /// # Errors
    /// [`Error::NoGeneration`], [`Error::Damaged`], [`Error::Format`], [`Error::Folders`],
    /// [`Error::OtherModel`], and those of [`Store::create`].
    pub fn open(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        open::open(arena, layout, options)
    }

    /// The number and the user's part of the published generation in a folder, without opening
    /// the store.
    ///
    /// # Errors
    /// [`Error::Folder`], [`Error::NoGeneration`], [`Error::Damaged`], [`Error::Format`].
    pub fn peek(path: &Path, medium: &dyn Medium) -> Result<(u64, String), Error> {
        let look = look(&[path.to_owned()], medium)?;
        Ok((look.map.generation, look.map.meta))
    }

    /// Bytes that a new store of this layout takes on disk, all folders together.
    pub fn space(layout: &Layout, options: &Options) -> u64 {
        let files = options.paths.len().max(1);
        let catalog = Catalog::new(0, layout, None, files, options);
        (0..files).map(|file| catalog.end(file)).sum()
    }

    /// Has `notify` called, on another thread, after transfers ended. Once.
    pub fn on_end(&self, notify: impl Fn() + Send + Sync + 'static) {
        self.owner.on_end(Box::new(notify));
    }

    /// Where in its file the current version of a key is.
    pub(crate) fn place(&self, key: Key) -> Option<u64> {
        let found = self.catalog.layout.find(key)?;
        self.catalog.entries[found].current.map(|e| e.offset)
    }

    /// Whether a version of the key is there to be read.
    pub fn contains(&self, key: Key) -> bool {
        let found = self.catalog.layout.find(key);
        found.is_some_and(|i| self.catalog.entries[i].current.is_some())
    }

    /// Whether another transfer may start.
    pub fn can_start(&self) -> bool {
        self.in_flight < TRANSFERS
    }

    /// Starts reading the current version of a key into the first bytes of the slab.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Misuse`] if the slab is too small, the key unknown or under
    /// way, or [`Store::can_start`] says no.
    pub fn read(&mut self, key: Key, slab: Slab) -> Result<(), Error> {
        let (index, target, checksum) = self.begin_read(key, &slab)?;
        let priority = match key.state {
            StateKind::Param => Priority::Urgent,
            _ => Priority::Normal,
        };
        self.start(
            index,
            Operation::Read,
            priority,
            target,
            slab,
            Some(checksum),
        );
        Ok(())
    }

    /// Takes note of a read and says where from, and what the checksum must be.
    pub(crate) fn begin_read(
        &mut self,
        key: Key,
        slab: &Slab,
    ) -> Result<(usize, Target, u64), Error> {
        let index = self.check(key, slab)?;
        let Some((target, checksum)) = self.catalog.begin_read(index) else {
            return Err(Error::Missing {
                what: self.catalog.layout.describe(key),
            });
        };
        self.in_flight += 1;
        Ok((index, target, checksum))
    }

    /// Starts writing the first bytes of the slab as the new version of a key. It goes to a place
    /// that neither the published generation nor what is held uses.
    ///
    /// # Errors
    /// [`Error::Misuse`] as for [`Store::read`]; [`Error::Space`] if the store has to grow and cannot.
    pub fn write(&mut self, key: Key, slab: Slab) -> Result<(), Error> {
        let priority = match key.state {
            StateKind::Grad => Priority::Spill,
            _ => Priority::Normal,
        };
        self.write_with(key, slab, priority)
    }

    /// [`Store::write`] at a priority of the caller's.
    ///
    /// # Errors
    /// As there.
    pub fn write_with(&mut self, key: Key, slab: Slab, priority: Priority) -> Result<(), Error> {
        let (index, target) = self.begin_write(key, &slab, true)?;
        self.start(index, Operation::Write, priority, target, slab, None);
        Ok(())
    }

    /// Takes note of a write and says where to.
    pub(crate) fn begin_write(
        &mut self,
        key: Key,
        slab: &Slab,
        in_place: bool,
    ) -> Result<(usize, Target), Error> {
        let index = self.check(key, slab)?;
        let target = self.catalog.begin_write(index, in_place);
        if let Err(error) = self.grow() {
            self.catalog.undo_write(index);
            return Err(error);
        }
        self.in_flight += 1;
        Ok((index, target))
    }

    fn start(
        &mut self,
        index: usize,
        operation: Operation,
        priority: Priority,
        target: Target,
        slab: Slab,
        expected: Option<u64>,
    ) {
        self.started += 1;
        self.numbers[index] = self.started;
        self.owner.ask(Transfer {
            tag: index as u32,
            number: self.started,
            operation,
            priority,
            target,
            buffer: Buffer::Slab(slab),
            expected,
        });
    }

    /// Gives a transfer under way up. It still ends, with [`Error::Cancelled`] unless it was too
    /// late, and only then is its slab free: the disk may write there until then.
    pub fn cancel(&mut self, key: Key) {
        if let Some(index) = self.catalog.layout.find(key)
            && self.catalog.entries[index].under_way.is_some()
        {
            self.owner.cancel(self.numbers[index]);
        }
    }

    fn check(&self, key: Key, slab: &Slab) -> Result<usize, Error> {
        self.health()?;
        let misuse = |what: &str| {
            let name = self.catalog.layout.describe(key);
            Err(Error::Misuse(format!("{name}: {what}")))
        };
        let Some(index) = self.catalog.layout.find(key) else {
            return misuse("not in the layout");
        };
        let bytes = self.catalog.layout.bytes(index);
        if (slab.len() as u64) < bytes || slab.padded_len() < padded(bytes) {
            return misuse("the slab is smaller than the extent");
        }
        if self.catalog.entries[index].under_way.is_some() {
            return misuse("a transfer of it is under way");
        }
        if !self.can_start() {
            return misuse("too many transfers are under way");
        }
        Ok(index)
    }

    /// Makes the files as long as the catalog wants them.
    fn grow(&mut self) -> Result<(), Error> {
        for file in 0..self.lens.len() {
            let end = self.catalog.end(file);
            if end > self.lens[file] {
                self.volume.reserve(file, end)?;
                self.lens[file] = end;
            }
        }
        Ok(())
    }

    /// A transfer that has ended, if one has. Neither waits nor allocates.
    pub fn try_next(&mut self) -> Option<Done> {
        let Ended {
            tag,
            operation,
            buffer,
            result,
        } = self.owner.next()?;
        let index = tag as usize;
        let key = self.catalog.layout.items[index].key;
        let direction = match operation {
            Operation::Write => Direction::Write,
            _ => Direction::Read,
        };
        let result = self.end(index, direction, result);
        let Buffer::Slab(slab) = buffer else {
            unreachable!("only slabs carry the tag of a key");
        };
        Some(Done {
            key,
            direction,
            slab,
            result,
        })
    }

    /// Takes note of the end of a transfer.
    pub(crate) fn end(
        &mut self,
        index: usize,
        direction: Direction,
        result: Result<u64, Fault>,
    ) -> Result<(), Error> {
        self.in_flight -= 1;
        let bytes = self.catalog.layout.bytes(index);
        let extent = self.catalog.entries[index].under_way;
        let payload = match direction {
            Direction::Write => {
                let checksum = result.as_ref().ok().copied();
                self.catalog.end_write(index, checksum);
                &mut self.payload_written
            }
            Direction::Read => {
                self.catalog.end_read(index);
                &mut self.payload_read
            }
        };
        match result {
            Ok(_) => {
                *payload += bytes;
                Ok(())
            }
            Err(fault) => Err(self.fault(index, direction, extent, fault)),
        }
    }

    fn fault(
        &self,
        index: usize,
        direction: Direction,
        extent: Option<Extent>,
        fault: Fault,
    ) -> Error {
        let what = self
            .catalog
            .layout
            .describe(self.catalog.layout.items[index].key);
        let path = self.volume.path(self.catalog.entries[index].file as usize);
        let path = path.to_owned();
        match fault {
            Fault::Checksum => {
                let (offset, generation) = extent.map_or((0, 0), |e| (e.offset, e.generation));
                Error::Checksum {
                    what,
                    path,
                    offset,
                    generation,
                }
            }
            Fault::Io { offset, source } => Error::Io {
                operation: match direction {
                    Direction::Read => "reading",
                    Direction::Write => "writing",
                },
                what,
                path,
                offset,
                source,
            },
            Fault::Cancelled => Error::Cancelled { what },
        }
    }

    /// Whether the disk still answers.
    ///
    /// # Errors
    /// [`Error::Stalled`], for good.
    pub fn health(&self) -> Result<(), Error> {
        let Some(stall) = self.owner.stalled() else {
            return Ok(());
        };
        let item = self.catalog.layout.items.get(stall.tag as usize);
        Err(Error::Stalled {
            why: stall.why,
            requests: stall.requests,
            what: item.map_or("the map".into(), |i| crate::key::describe(i.key, &i.name)),
        })
    }

    /// Waits for a transfer to end.
    ///
    /// # Errors
    /// [`Error::Misuse`] if none is under way; the transfer's own failure; [`Error::Stalled`].
    pub fn wait(&mut self) -> Result<Done, Error> {
        loop {
            if let Some(mut done) = self.try_next() {
                std::mem::replace(&mut done.result, Ok(()))?;
                return Ok(done);
            }
            if self.in_flight == 0 {
                return Err(Error::Misuse(
                    "waited for a transfer and none is under way".into(),
                ));
            }
            self.health()?;
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// One of the store's own transfers, with nothing else under way.
    fn own(
        &mut self,
        operation: Operation,
        target: Target,
        buffer: crate::buffer::Blocks,
    ) -> Result<(crate::buffer::Blocks, u64), Error> {
        let volume = &*self.volume;
        own::own(&mut self.owner, volume, operation, target, buffer)
    }

    /// From here to [`Store::commit`], writes keep what is current now.
    pub fn hold(&mut self) {
        self.catalog.hold();
    }

    /// What was written since [`Store::hold`] stays.
    pub fn commit(&mut self) {
        self.catalog.commit();
    }

    /// What was current at [`Store::hold`] is current again. No transfer may be under way.
    pub fn rollback(&mut self) {
        self.catalog.rollback();
    }

    /// A transfer whose end nobody will take note of: a write's place stays unused.
    #[cfg(feature = "tokio-uring")]
    pub(crate) fn abandon(&mut self, index: usize) {
        self.in_flight -= 1;
        self.catalog.end_read(index);
    }

    #[cfg(feature = "tokio-uring")]
    pub(crate) fn files(&self) -> usize {
        self.paths.len()
    }

    #[cfg(feature = "tokio-uring")]
    pub(crate) fn data_path(&self, file: usize) -> &Path {
        self.volume.path(file)
    }

    /// The user's part of the published generation.
    pub fn meta(&self) -> &str {
        &self.meta
    }

    /// The number of the published generation; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.catalog.generation
    }

    /// The first folder.
    pub fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// How I/O is done, in words.
    pub fn describe(&self) -> &str {
        self.owner.describe()
    }

    /// What it has done.
    pub fn stats(&self) -> Stats {
        let counters = self.owner.counters();
        let read_bytes = counters.read_bytes.load(Ordering::Relaxed);
        let written_bytes = counters.written_bytes.load(Ordering::Relaxed);
        let before = &self.life_before;
        Stats {
            read_bytes,
            written_bytes,
            payload_read_bytes: self.payload_read,
            payload_written_bytes: self.payload_written,
            busy: Duration::from_nanos(counters.busy_ns.load(Ordering::Relaxed)),
            file_bytes: self.lens.iter().sum(),
            life: Ledger {
                read_bytes: before.read_bytes + read_bytes,
                written_bytes: before.written_bytes + written_bytes,
                payload_written_bytes: before.payload_written_bytes + self.payload_written,
                open_s: before.open_s + self.opened.elapsed().as_secs_f64(),
            },
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (path, generation) = (self.path().display(), self.generation());
        write!(f, "Store in {path} at generation {generation}")
    }
}
