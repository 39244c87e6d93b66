//! Extents and generations over the I/O.

mod manifest;
mod places;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_pinned::{Arena, Slab};
use twox_hash::XxHash3_64;

use crate::Error;
use crate::files::{self, BLOCK};
use crate::io::IoChoice;
use crate::key::{Key, Layout, StateKind};
use crate::owner::{Direction, Ended, Fault, Owner, TRANSFERS, Target, Transfer};
use manifest::{Manifest, ManifestExtent};
use places::{PLACES, Places};

/// How a store is made or opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folders, each on a disk of its own; the first holds the manifest.
    pub paths: Vec<PathBuf>,
    /// How to do I/O.
    pub io: IoChoice,
    /// Slows the disk down to so many bytes per second.
    pub throttle: Option<u64>,
    /// Whether steps are to be undone ([`Store::hold`]): costs a third place for each extent.
    pub undo: bool,
}

impl Options {
    /// Defaults, for these folders.
    pub fn new<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        Self {
            paths: paths.into_iter().map(Into::into).collect(),
            io: IoChoice::Auto,
            throttle: None,
            undo: false,
        }
    }
}

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
    /// Bytes written, whole blocks.
    pub written_bytes: u64,
    /// Time in which at least one transfer was under way.
    pub busy: Duration,
    /// Bytes of the data files.
    pub file_bytes: u64,
    /// Bytes written in the store's whole life.
    pub life_written_bytes: u64,
}

/// Where a version of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    offset: u64,
    checksum: u64,
    generation: u64,
}

/// A key's versions. Each that is there has a place of its own.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    places: Places,
    current: Option<Extent>,
    published: Option<Extent>,
    /// What was current at [`Store::hold`], once it was written over.
    held: Option<Option<Extent>>,
    /// What a transfer under way will make current, or reads.
    under_way: Option<Extent>,
}

/// A store of states on disk. See the crate.
pub struct Store {
    owner: Owner,
    files: Vec<File>,
    /// Held for its lock.
    _lock: File,
    paths: Vec<PathBuf>,
    layout: Layout,
    entries: Vec<Entry>,
    generation: u64,
    meta: String,
    life_written_before: u64,
    file_bytes: u64,
    holding: bool,
    in_flight: usize,
    failed: Option<String>,
}

impl Store {
    /// Makes a new store. Space for all of it is reserved before this returns.
    ///
    /// # Errors
    /// [`Error::Folder`], [`Error::Exists`], [`Error::Locked`], [`Error::Space`].
    pub fn create(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        let (first, lock) = take_folders(options)?;
        if files::read_manifest(&first)?.is_some() {
            return Err(Error::Exists { path: first });
        }
        Self::assemble(arena, layout, options, lock, None)
    }

    /// Opens the published generation of a store.
    ///
    /// # Errors
    /// [`Error::NoGeneration`], [`Error::Manifest`], [`Error::OtherModel`], and those of
    /// [`Store::create`].
    pub fn open(arena: &Arena, layout: &Layout, options: &Options) -> Result<Self, Error> {
        let (first, lock) = take_folders(options)?;
        let text = files::read_manifest(&first)?.ok_or_else(|| Error::NoGeneration {
            path: first.clone(),
        })?;
        let manifest = Manifest::parse(&first, &text)?;
        if manifest.fingerprint != layout.fingerprint {
            return Err(Error::OtherModel {
                path: first,
                expected: layout.model.clone(),
                found: manifest.model,
            });
        }
        if manifest.paths != options.paths.len() {
            let what = format!(
                "the store is spread over {} folders and {} were given",
                manifest.paths,
                options.paths.len()
            );
            return Err(Error::Manifest { path: first, what });
        }
        Self::assemble(arena, layout, options, lock, Some(manifest))
    }

    /// The number and the user's part of the published generation in a folder, without opening
    /// the store.
    ///
    /// # Errors
    /// [`Error::Folder`], [`Error::NoGeneration`], [`Error::Manifest`].
    pub fn peek(path: &Path) -> Result<(u64, String), Error> {
        let text = files::read_manifest(path)?.ok_or_else(|| Error::NoGeneration {
            path: path.to_owned(),
        })?;
        let manifest = Manifest::parse(path, &text)?;
        Ok((manifest.generation, manifest.meta))
    }

    fn assemble(
        arena: &Arena,
        layout: &Layout,
        options: &Options,
        lock: File,
        manifest: Option<Manifest>,
    ) -> Result<Self, Error> {
        let published = manifest.as_ref().map_or(&[][..], |m| &m.extents);
        let (places, sizes) = places::assign(layout, published, options.paths.len(), options.undo);
        let data = open_files(&options.paths, &sizes, manifest.is_none())?;
        let entries = places
            .iter()
            .zip(&layout.extents)
            .map(|(places, (key, bytes, _))| {
                let extent = published
                    .iter()
                    .find(|e| e.key == *key && e.bytes == *bytes);
                let extent = extent.map(|e| Extent {
                    offset: e.offset,
                    checksum: e.checksum,
                    generation: e.generation,
                });
                Entry {
                    places: *places,
                    current: extent,
                    published: extent,
                    ..Entry::default()
                }
            });
        let clones: std::io::Result<Vec<File>> = data.iter().map(File::try_clone).collect();
        let started = clones
            .and_then(|files| Owner::start(arena, files, options.io, options.throttle))
            .map_err(|source| Error::Folder {
                path: options.paths[0].clone(),
                source,
            });
        Ok(Self {
            owner: started?,
            files: data,
            _lock: lock,
            paths: options.paths.clone(),
            layout: layout.clone(),
            entries: entries.collect(),
            generation: manifest.as_ref().map_or(0, |m| m.generation),
            life_written_before: manifest.as_ref().map_or(0, |m| m.written_bytes),
            meta: manifest.map_or_else(String::new, |m| m.meta),
            file_bytes: sizes.iter().sum(),
            holding: false,
            in_flight: 0,
            failed: None,
        })
    }

    /// Bytes that a store of this layout takes on disk, all folders together.
    pub fn space(layout: &Layout, undo: bool) -> u64 {
        places::assign(layout, &[], 1, undo).1.iter().sum()
    }

    /// Has `notify` called, on another thread, after transfers ended. Once.
    pub fn on_end(&self, notify: impl Fn() + Send + Sync + 'static) {
        self.owner.on_end(Box::new(notify));
    }

    /// Whether a version of the key is there to be read.
    pub fn contains(&self, key: Key) -> bool {
        self.layout
            .find(key)
            .is_some_and(|i| self.entries[i].current.is_some())
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
        let index = self.check(key, &slab)?;
        let Some(extent) = self.entries[index].current else {
            return Err(Error::Missing {
                what: self.layout.describe(key),
            });
        };
        self.start(index, Direction::Read, extent, slab);
        Ok(())
    }

    /// Starts writing the first bytes of the slab as the new version of a key. It goes to a place
    /// that neither the published generation nor what is held uses.
    ///
    /// # Errors
    /// [`Error::Misuse`] as for [`Store::read`].
    pub fn write(&mut self, key: Key, slab: Slab) -> Result<(), Error> {
        let index = self.check(key, &slab)?;
        let holding = self.holding && key.state != StateKind::Grad;
        let entry = &mut self.entries[index];
        if holding && entry.held.is_none() {
            entry.held = Some(entry.current);
        }
        let keep = [entry.published, entry.held.flatten()];
        let taken = |offset: u64| keep.iter().flatten().any(|e| e.offset == offset);
        let place = entry.places.offsets.iter().flatten().find(|o| !taken(**o));
        let Some(offset) = place.copied() else {
            let what = format!(
                "no place to write {}; open it with undo",
                self.layout.describe(key)
            );
            return Err(Error::Misuse(what));
        };
        if entry.current.is_some_and(|e| e.offset == offset) {
            // Half written it is neither the old version nor the new one.
            entry.current = None;
        }
        let extent = Extent {
            offset,
            checksum: 0,
            generation: self.generation + 1,
        };
        self.start(index, Direction::Write, extent, slab);
        Ok(())
    }

    fn check(&self, key: Key, slab: &Slab) -> Result<usize, Error> {
        let misuse = |what: &str| {
            Err(Error::Misuse(format!(
                "{}: {what}",
                self.layout.describe(key)
            )))
        };
        let Some(index) = self.layout.find(key) else {
            return misuse("not in the layout");
        };
        let bytes = self.layout.extents[index].1;
        if (slab.len() as u64) < bytes || slab.padded_len() < bytes.next_multiple_of(BLOCK) {
            return misuse("the slab is smaller than the extent");
        }
        if self.entries[index].under_way.is_some() {
            return misuse("a transfer of it is under way");
        }
        if !self.can_start() {
            return misuse("too many transfers are under way");
        }
        Ok(index)
    }

    fn start(&mut self, index: usize, direction: Direction, extent: Extent, slab: Slab) {
        let (key, bytes, _) = self.layout.extents[index];
        let entry = &mut self.entries[index];
        entry.under_way = Some(extent);
        let file = entry.places.file;
        let seed = seed(key, file, &extent);
        let target = Target {
            file,
            offset: extent.offset,
            bytes,
            seed,
        };
        let checksum = extent.checksum;
        self.in_flight += 1;
        self.owner.ask(Transfer {
            tag: index as u32,
            direction,
            target,
            slab,
            checksum,
        });
    }

    /// A transfer that has ended, if one has. Neither waits nor allocates.
    pub fn try_next(&mut self) -> Option<Done> {
        let Ended {
            tag,
            direction,
            slab,
            result,
        } = self.owner.next()?;
        self.in_flight -= 1;
        let index = tag as usize;
        let key = self.layout.extents[index].0;
        let entry = &mut self.entries[index];
        let extent = entry.under_way.take();
        let result = match (result, extent) {
            (Ok(checksum), Some(extent)) => {
                if direction == Direction::Write {
                    entry.current = Some(Extent { checksum, ..extent });
                }
                Ok(())
            }
            (Err(fault), extent) => Err(self.fault(index, direction, extent, fault)),
            (Ok(_), None) => Ok(()),
        };
        Some(Done {
            key,
            direction,
            slab,
            result,
        })
    }

    fn fault(
        &mut self,
        index: usize,
        direction: Direction,
        extent: Option<Extent>,
        fault: Fault,
    ) -> Error {
        let what = self.layout.describe(self.layout.extents[index].0);
        let file = self.entries[index].places.file as usize;
        let path = files::data_path(&self.paths[file], file);
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
            Fault::Io { offset, source } => {
                let operation = match direction {
                    Direction::Read => "reading",
                    Direction::Write => "writing",
                };
                Error::Io {
                    operation,
                    what,
                    path,
                    offset,
                    source,
                }
            }
        }
    }

    /// Waits for a transfer to end.
    ///
    /// # Errors
    /// [`Error::Misuse`] if none is under way; the transfer's own failure.
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
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// From here to [`Store::commit`], writes keep what is current now.
    pub fn hold(&mut self) {
        self.holding = true;
    }

    /// What was written since [`Store::hold`] stays.
    pub fn commit(&mut self) {
        self.holding = false;
        self.entries.iter_mut().for_each(|e| e.held = None);
    }

    /// What was current at [`Store::hold`] is current again. No transfer may be under way.
    pub fn rollback(&mut self) {
        self.holding = false;
        for entry in &mut self.entries {
            if let Some(held) = entry.held.take() {
                entry.current = held;
            }
        }
    }

    /// Makes all current versions, and `meta`, the published generation: durable, and what a
    /// crash from here on falls back to. Returns its number.
    ///
    /// # Errors
    /// [`Error::Misuse`] while transfers are under way; [`Error::Io`] if anything cannot be made
    /// durable, after which nothing more is published ([`Error::Failed`]): a second fsync may
    /// report success for data that the first one lost.
    pub fn publish(&mut self, meta: &str) -> Result<u64, Error> {
        if let Some(why) = &self.failed {
            return Err(Error::Failed(why.clone()));
        }
        if self.in_flight > 0 {
            return Err(Error::Misuse(
                "publish while transfers are under way".into(),
            ));
        }
        let manifest = self.manifest(meta);
        let result = self.make_durable(&manifest);
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
        }
        result?;
        self.generation = manifest.generation;
        meta.clone_into(&mut self.meta);
        for (entry, (key, ..)) in self.entries.iter_mut().zip(&self.layout.extents) {
            entry.published = entry.current.filter(|_| key.state != StateKind::Grad);
        }
        Ok(self.generation)
    }

    fn manifest(&self, meta: &str) -> Manifest {
        let all = self.entries.iter().zip(&self.layout.extents);
        let durable = all.filter(|(_, (key, ..))| key.state != StateKind::Grad);
        let extents = durable.filter_map(|(entry, (key, bytes, _))| {
            entry.current.map(|extent| ManifestExtent {
                key: *key,
                file: entry.places.file,
                offset: extent.offset,
                bytes: *bytes,
                checksum: extent.checksum,
                generation: extent.generation,
            })
        });
        Manifest {
            generation: self.generation + 1,
            model: self.layout.model.clone(),
            fingerprint: self.layout.fingerprint,
            paths: self.paths.len(),
            extents: extents.collect(),
            written_bytes: self.stats().life_written_bytes,
            meta: meta.to_owned(),
        }
    }

    fn make_durable(&self, manifest: &Manifest) -> Result<(), Error> {
        let failed = |path: PathBuf, source| Error::Io {
            operation: "syncing",
            what: format!("generation {}", manifest.generation),
            path,
            offset: 0,
            source,
        };
        for (index, file) in self.files.iter().enumerate() {
            let path = || files::data_path(&self.paths[index], index);
            file.sync_data().map_err(|source| failed(path(), source))?;
        }
        let path = &self.paths[0];
        files::publish_manifest(path, &manifest.to_text())
            .map_err(|source| failed(path.join(files::MANIFEST), source))
    }

    /// The user's part of the published generation.
    pub fn meta(&self) -> &str {
        &self.meta
    }

    /// The number of the published generation; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
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
        let written_bytes = counters.written_bytes.load(Ordering::Relaxed);
        Stats {
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            written_bytes,
            busy: Duration::from_nanos(counters.busy_ns.load(Ordering::Relaxed)),
            file_bytes: self.file_bytes,
            life_written_bytes: self.life_written_before + written_bytes,
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Store in {} at generation {}",
            self.path().display(),
            self.generation
        )
    }
}

/// Mixes what makes an extent its own into the checksum's seed: data of another key, place or
/// generation does not match.
fn seed(key: Key, file: u32, extent: &Extent) -> u64 {
    let mut bytes = [0u8; 32];
    let fields = [key.section, key.state as u32, key.part, file];
    for (place, field) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(fields) {
        *place = field.to_le_bytes();
    }
    bytes[16..24].copy_from_slice(&extent.offset.to_le_bytes());
    bytes[24..].copy_from_slice(&extent.generation.to_le_bytes());
    XxHash3_64::oneshot(&bytes)
}

/// Checks the folders and locks the first.
fn take_folders(options: &Options) -> Result<(PathBuf, File), Error> {
    for path in &options.paths {
        let folder = |source| Error::Folder {
            path: path.clone(),
            source,
        };
        let kind = std::fs::metadata(path).map_err(folder)?;
        if !kind.is_dir() {
            return Err(folder(std::io::ErrorKind::NotADirectory.into()));
        }
    }
    let Some(first) = options.paths.first() else {
        return Err(Error::Misuse("a store needs at least one folder".into()));
    };
    Ok((first.clone(), files::lock(first)?))
}

fn open_files(paths: &[PathBuf], sizes: &[u64], create: bool) -> Result<Vec<File>, Error> {
    let mut open = Vec::new();
    for (index, (path, bytes)) in paths.iter().zip(sizes).enumerate() {
        let full = files::data_path(path, index);
        let before = std::fs::metadata(&full).map_or(0, |m| m.len());
        let needed = bytes.saturating_sub(before);
        let free = files::free_bytes(path)?;
        if needed > free {
            return Err(Error::Space {
                path: path.clone(),
                needed,
                free,
            });
        }
        let file = files::open_data(&full, create)?;
        files::reserve(&file, &full, *bytes)?;
        open.push(file);
    }
    Ok(open)
}

const _: () = assert!(PLACES >= 3, "published, held and current");
