//! Making, opening and looking at stores: what the headers of the files say.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forebay_pinned::Arena;
use twox_hash::XxHash3_64;

use super::catalog::Catalog;
use super::map::MapPlace;
use super::superblock::{COPIES, FORMAT, Found, HEADER, Superblock};
use super::{Copies, Ledger, Map, MapExtent, OWN, Options, Store};
use crate::Error;
use crate::buffer::{Blocks, Buffer};
use crate::checksum::{GRANULE, partial, seed};
use crate::io::Tuning;
use crate::key::Layout;
use crate::medium::{Access, BLOCK, Medium, Volume};
use crate::owner::{Fault, Operation, Owner, Priority, Target, Transfer};

/// More than any real map has.
const MAP_BYTES_MAX: u64 = 1 << 30;
/// Bytes read or written at once by the store itself: a multiple of a granule.
const PIECE: u64 = 16 * GRANULE;

/// What the headers of a store's files say.
struct Header {
    store: u64,
    generation: u64,
    /// Files of the store.
    files: u32,
    /// By folder given: which file of the store it holds, if it says so.
    index: Vec<Option<u32>>,
    /// The good superblocks of the newest generation.
    newest: Vec<(usize, Superblock)>,
    /// By folder given: superblocks that are not whole.
    damaged: Vec<usize>,
}

/// A look at a store without owning it.
pub(crate) struct Look {
    pub(crate) store: u64,
    pub(crate) files: u32,
    pub(crate) map: Map,
    /// Superblocks that are not whole.
    pub(crate) damaged: usize,
    /// By folder given: which file of the store it holds.
    index: Vec<Option<u32>>,
    pub(crate) volume: Box<dyn Volume>,
    pub(crate) owner: Owner,
}

impl Look {
    /// Which of the folders given holds a file.
    pub(crate) fn place(&self, file: u32) -> usize {
        let place = self.index.iter().position(|i| *i == Some(file));
        place.unwrap_or(file as usize)
    }

    /// Hands an extent on in pieces; its checksum.
    pub(crate) fn stream(&mut self, extent: &MapExtent, to: Sink<'_>) -> Result<u64, Error> {
        let place = self.place(extent.file);
        stream(
            &mut self.owner,
            &*self.volume,
            place,
            self.store,
            extent,
            to,
        )
    }

    /// Refuses unless all files of the store are there.
    pub(crate) fn all_files(&self, paths: &[PathBuf]) -> Result<(), Error> {
        let order: Vec<_> = (0..self.files).map(Some).collect();
        let mut index = self.index.clone();
        index.sort_unstable();
        if index == order {
            return Ok(());
        }
        Err(Error::Folders {
            path: paths[0].clone(),
            what: format!("the store is spread over {} folders; give each", self.files),
        })
    }
}

/// One transfer that is the store's own, with nothing else under way.
pub(crate) fn own(
    owner: &mut Owner,
    volume: &dyn Volume,
    operation: Operation,
    target: Target,
    buffer: Blocks,
) -> Result<(Blocks, u64), Error> {
    owner.ask(transfer(operation, target, buffer));
    loop {
        if let Some(ended) = owner.next() {
            return finished(volume, operation, &target, ended);
        }
        stalled(owner)?;
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Takes pieces of an extent: where they begin in it, and the bytes, not yet verified.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), Error>;

/// Reads an extent through a small buffer and hands it on in pieces; its checksum, which is to be
/// compared before the pieces are believed.
pub(super) fn stream(
    owner: &mut Owner,
    volume: &dyn Volume,
    place: usize,
    store: u64,
    extent: &MapExtent,
    to: Sink<'_>,
) -> Result<u64, Error> {
    let seed = seed(
        store,
        extent.key,
        extent.file,
        extent.offset,
        extent.generation,
    );
    let (bytes, mut start, mut sum) = (extent.bytes(), 0, 0u64);
    let mut blocks = Blocks::new(PIECE.min(bytes));
    while start < bytes {
        let length = PIECE.min(bytes - start);
        let target = plain(place, extent.offset + start, length);
        (blocks, _) = own(owner, volume, Operation::Read, target, blocks)?;
        let data = &blocks[..length as usize];
        sum = sum.wrapping_add(partial(seed, start, data));
        to(start, data)?;
        start += length;
    }
    Ok(sum)
}

fn transfer(operation: Operation, target: Target, buffer: Blocks) -> Transfer {
    Transfer {
        tag: OWN,
        number: 0,
        operation,
        priority: Priority::Checkpoint,
        target,
        buffer: Buffer::Blocks(buffer),
        expected: None,
    }
}

fn stalled(owner: &Owner) -> Result<(), Error> {
    match owner.stalled() {
        None => Ok(()),
        Some(stall) => Err(Error::Stalled {
            why: stall.why,
            requests: stall.requests,
            what: "of the store's map".into(),
        }),
    }
}

fn finished(
    volume: &dyn Volume,
    operation: Operation,
    target: &Target,
    ended: crate::owner::Ended,
) -> Result<(Blocks, u64), Error> {
    let Buffer::Blocks(blocks) = ended.buffer else {
        unreachable!("slabs carry the tag of a key");
    };
    match ended.result {
        Ok(checksum) => Ok((blocks, checksum)),
        Err(Fault::Io { offset, source }) => Err(Error::Io {
            operation: match operation {
                Operation::Read => "reading",
                Operation::Write => "writing",
                Operation::Sync => "syncing",
            },
            what: "the store's map".into(),
            path: volume.path(target.file as usize).to_owned(),
            offset,
            source,
        }),
        Err(Fault::Checksum | Fault::Cancelled) => unreachable!("not asked for"),
    }
}

/// A piece of a file that has no checksum of its own.
pub(crate) fn plain(file: usize, offset: u64, bytes: u64) -> Target {
    Target {
        file: file as u32,
        offset,
        bytes,
        seed: 0,
        start: 0,
    }
}

/// Reads the headers of all files; `None` where nothing was ever published.
fn survey(owner: &mut Owner, volume: &dyn Volume, folders: usize) -> Result<Option<Header>, Error> {
    let mut good: Vec<(usize, Superblock)> = Vec::new();
    let mut other_format = None;
    let mut damaged = vec![0; folders];
    let mut unpublished = true;
    // Files and parities whose superblocks are damaged in both copies.
    let mut lost = Vec::new();
    for (file, damaged) in damaged.iter_mut().enumerate() {
        let len = volume.len(file).map_err(|source| Error::Folder {
            path: volume.path(file).to_owned(),
            source,
        })?;
        if len < HEADER {
            continue;
        }
        let target = plain(file, 0, HEADER);
        let (header, _) = own(owner, volume, Operation::Read, target, Blocks::new(HEADER))?;
        for generation in 0..2 {
            let before = *damaged;
            for copy in 0..COPIES {
                let place = Superblock::place(generation, copy) as usize;
                let found = Superblock::read(&header[place..place + BLOCK as usize]);
                // Generation 0 is written when a store is made, and before any other.
                unpublished &= generation == 0 || found == Found::Blank;
                match found {
                    Found::Blank => {}
                    Found::Damaged => *damaged += 1,
                    Found::Format(version) => other_format = Some((file, version)),
                    Found::Good(superblock) => good.push((file, superblock)),
                }
            }
            if *damaged - before == COPIES {
                lost.push((file, generation));
            }
        }
    }
    if let Some((file, version)) = other_format {
        return Err(Error::Format {
            path: volume.path(file).to_owned(),
            version,
        });
    }
    let Some((_, first)) = good.first().copied() else {
        return match damaged.iter().position(|d| *d > 0) {
            None => Ok(None),
            Some(_) if unpublished => Ok(None),
            Some(file) => Err(Error::Damaged {
                path: volume.path(file).to_owned(),
                what: "every superblock is damaged, or it is not a store".into(),
            }),
        };
    };
    let generation = good.iter().map(|(_, s)| s.generation).max().unwrap_or(0);
    if let Some((file, _)) = lost.iter().find(|(_, parity)| *parity != generation % 2) {
        return Err(Error::Damaged {
            path: volume.path(*file).to_owned(),
            what: format!("both superblocks of a generation after {generation} are damaged"),
        });
    }
    if generation == 0 {
        // Made, perhaps more than once, and never published.
        return Ok(None);
    }
    if let Some((file, _)) = good.iter().find(|(_, s)| s.store != first.store) {
        return Err(Error::Folders {
            path: volume.path(*file).to_owned(),
            what: format!("belongs to another store than {}", volume.path(0).display()),
        });
    }
    let index = |file: usize| good.iter().find(|(f, _)| *f == file).map(|(_, s)| s.file);
    Ok(Some(Header {
        store: first.store,
        generation,
        files: first.files,
        index: (0..folders).map(index).collect(),
        newest: good
            .into_iter()
            .filter(|(_, s)| s.generation == generation)
            .collect(),
        damaged,
    }))
}

fn published(header: Option<Header>, paths: &[PathBuf]) -> Result<Header, Error> {
    header.ok_or_else(|| Error::NoGeneration {
        path: paths[0].clone(),
    })
}

/// The map of the newest generation, from whichever copy is whole. An older generation is no
/// substitute: its extents may have been written over.
fn read_map(owner: &mut Owner, volume: &dyn Volume, header: &Header) -> Result<Map, Error> {
    let mut why = Error::Damaged {
        path: volume.path(0).to_owned(),
        what: format!(
            "generation {}: its map is damaged in every copy",
            header.generation
        ),
    };
    for (file, superblock) in &header.newest {
        let Superblock {
            map_offset: offset,
            map_bytes: bytes,
            ..
        } = *superblock;
        let len = volume.len(*file).unwrap_or(0);
        let end = offset.checked_add(bytes);
        let inside = bytes <= MAP_BYTES_MAX && end.is_some_and(|end| end <= len);
        if !inside || !offset.is_multiple_of(BLOCK) {
            continue;
        }
        let target = plain(*file, offset, bytes);
        let read = own(owner, volume, Operation::Read, target, Blocks::new(bytes));
        let blocks = match read {
            Ok((blocks, _)) => blocks,
            Err(error @ Error::Stalled { .. }) => return Err(error),
            Err(error) => {
                why = error;
                continue;
            }
        };
        let text = &blocks[..bytes as usize];
        if XxHash3_64::oneshot(text) != superblock.map_checksum {
            continue;
        }
        let map = Map::parse(volume.path(*file), text, header.files)?;
        if map.generation == header.generation {
            return Ok(map);
        }
    }
    Err(why)
}

/// Opens a store for looking at.
pub(crate) fn look(paths: &[PathBuf], medium: &dyn Medium) -> Result<Look, Error> {
    // The owner may publish meanwhile and write over the map that is being read: then there is a
    // newer one.
    let mut tries = 0;
    loop {
        tries += 1;
        match look_once(paths, medium) {
            Err(Error::Damaged { .. }) if tries < 5 => {}
            result => return result,
        }
    }
}

fn look_once(paths: &[PathBuf], medium: &dyn Medium) -> Result<Look, Error> {
    let volume = medium.open(paths, Access::Look)?;
    let defaults = Options::new(paths.iter());
    let tuning = Tuning::default();
    let inline = medium.simulated();
    let mut owner =
        Owner::start(&*volume, None, tuning, defaults.patience(), inline).map_err(|source| {
            Error::Folder {
                path: paths[0].clone(),
                source,
            }
        })?;
    let header = survey(&mut owner, &*volume, paths.len())?;
    let header = published(header, paths)?;
    let map = read_map(&mut owner, &*volume, &header)?;
    Ok(Look {
        store: header.store,
        files: header.files,
        damaged: header.damaged.iter().sum(),
        index: header.index,
        map,
        volume,
        owner,
    })
}

fn start(
    arena: &Arena,
    options: &Options,
    paths: &[PathBuf],
    access: Access,
) -> Result<(Box<dyn Volume>, Owner), Error> {
    if paths.is_empty() {
        return Err(Error::Misuse("a store needs at least one folder".into()));
    }
    let volume = options.medium.open(paths, access)?;
    let inline = options.medium.simulated();
    let owner = Owner::start(
        &*volume,
        Some(arena),
        options.tuned(),
        options.patience(),
        inline,
    )
    .map_err(|source| Error::Folder {
        path: paths[0].clone(),
        source,
    })?;
    Ok((volume, owner))
}

pub(super) fn create(arena: &Arena, layout: &Layout, options: &Options) -> Result<Store, Error> {
    let options = &options.with_rates();
    let (volume, mut owner) = start(arena, options, &options.paths, Access::Create)?;
    let files = options.paths.len();
    if survey(&mut owner, &*volume, files)?.is_some() {
        return Err(Error::Exists {
            path: options.paths[0].clone(),
        });
    }
    let catalog = Catalog::new(fresh_id(), layout, None, files, options);
    check_space(&*volume, &catalog, layout, options)?;
    let mut store = assemble(volume, owner, options.paths.clone(), catalog, None)?;
    store.grow()?;
    if options.prewrite && !options.medium.simulated() {
        for file in 0..files {
            store.zero(file)?;
        }
    }
    // What a first publish left that was cut short goes first, so that damage to the superblocks of
    // generation 0 is known for what it is.
    for (file, copy) in store.superblocks() {
        let target = plain(file, Superblock::place(1, copy), BLOCK);
        store.own(Operation::Write, target, Blocks::new(BLOCK))?;
    }
    store.sync()?;
    let none = MapPlace {
        file: 0,
        offset: 0,
        bytes: 0,
    };
    let nowhere: Vec<MapPlace> = (0..files as u32)
        .flat_map(|file| [MapPlace { file, ..none }; COPIES])
        .collect();
    store.write_superblocks(
        &nowhere,
        &Superblock::new(store.catalog.store, files as u32, 0),
    )?;
    store.volume.sync_names()?;
    Ok(store)
}

pub(super) fn open(arena: &Arena, layout: &Layout, options: &Options) -> Result<Store, Error> {
    let options = &options.with_rates();
    let mut paths = options.paths.clone();
    let (mut volume, mut owner) = start(arena, options, &paths, Access::Own)?;
    let mut header = survey(&mut owner, &*volume, paths.len())?;
    if let Some(order) = header.as_ref().and_then(|h| order(&h.index)) {
        // Given in another order than the store's own.
        paths = order.iter().map(|i| options.paths[*i].clone()).collect();
        drop((owner, volume));
        (volume, owner) = start(arena, options, &paths, Access::Own)?;
        header = survey(&mut owner, &*volume, paths.len())?;
    }
    let header = published(header, &paths)?;
    check_folders(&header, &paths)?;
    let map = read_map(&mut owner, &*volume, &header)?;
    if map.fingerprint != layout.fingerprint {
        return Err(Error::OtherModel {
            path: paths.swap_remove(0),
            expected: layout.model.clone(),
            found: map.model,
        });
    }
    let whole = header.newest.len() == COPIES * paths.len();
    let newest = header.newest[0].1;
    let maps = map.maps.clone();
    let catalog = Catalog::new(header.store, layout, Some(&map), paths.len(), options);
    let mut store = assemble(volume, owner, paths, catalog, Some(map))?;
    if !whole {
        // A crash came between the copies, or one has gone: they are made whole before anything
        // that an older generation names is written over.
        store.write_superblocks(&maps, &newest)?;
    }
    store.grow()?;
    Ok(store)
}

/// The order in which the folders make up the store, if they do and it is not the one given.
fn order(index: &[Option<u32>]) -> Option<Vec<usize>> {
    let place = |file: usize| index.iter().position(|i| *i == Some(file as u32));
    let order: Option<Vec<usize>> = (0..index.len()).map(place).collect();
    order.filter(|order| !order.is_sorted())
}

fn check_folders(header: &Header, paths: &[PathBuf]) -> Result<(), Error> {
    let wrong = |path: &PathBuf, what: String| Error::Folders {
        path: path.clone(),
        what,
    };
    let (stored, given) = (header.files as usize, paths.len());
    if stored != given {
        let what = format!(
            "the store is spread over {stored} folders and {given} were given; give each with --disk"
        );
        return Err(wrong(&paths[0], what));
    }
    for (place, index) in header.index.iter().enumerate() {
        if *index != Some(place as u32) {
            let what = format!(
                "this is not part {} of {stored} of the store (its header is blank, damaged or \
                 another part's)",
                place + 1
            );
            return Err(wrong(&paths[place], what));
        }
    }
    Ok(())
}

fn check_space(
    volume: &dyn Volume,
    catalog: &Catalog,
    layout: &Layout,
    options: &Options,
) -> Result<(), Error> {
    for (file, path) in options.paths.iter().enumerate() {
        let len = volume.len(file).unwrap_or(0);
        let needed = catalog.end(file).saturating_sub(len);
        let free = volume.free(file)?;
        if needed <= free {
            continue;
        }
        let less = Options {
            copies: Copies::One,
            ..options.clone()
        };
        let less = Catalog::new(0, layout, None, options.paths.len(), &less).end(file);
        let instead = if less.saturating_sub(len) <= free && options.copies == Copies::Two {
            format!("--publish end or never needs {less} and fits, or ")
        } else {
            String::new()
        };
        return Err(Error::Space {
            path: path.clone(),
            needed,
            free,
            instead,
        });
    }
    Ok(())
}

/// Makes a store in other folders that holds the generation looked at, every byte verified.
pub(crate) fn copy(look: &mut Look, to: &[PathBuf], medium: &dyn Medium) -> Result<(), Error> {
    let tuning = Tuning::default();
    let mut options = Options::new(to.iter());
    options.copies = Copies::One;
    options.slack = 0;
    options.prewrite = false;
    // The places are the same: what makes a checksum its own stays as it is.
    let volume = medium.open(to, Access::Create)?;
    let patience = options.patience();
    let owner = Owner::start(&*volume, None, tuning, patience, medium.simulated());
    let owner = owner.map_err(|source| Error::Folder {
        path: to[0].clone(),
        source,
    })?;
    let files = to.len();
    let layout = Layout {
        model: look.map.model.clone(),
        fingerprint: look.map.fingerprint,
        items: Vec::new(),
    };
    let mut before = look.map.clone();
    before.maps.clear();
    let catalog = Catalog::new(look.store, &layout, Some(&before), files, &options);
    let map = look.map.clone();
    let mut store = assemble(volume, owner, to.to_vec(), catalog, Some(map))?;
    store.grow()?;
    for extent in look.map.extents.clone() {
        let place = look.place(extent.file);
        let copied = store.copy_extent(look, &extent)?;
        if copied != extent.checksum {
            return Err(Error::Checksum {
                what: crate::key::describe(extent.key, look.map.name(extent.key.section)),
                path: look.volume.path(place).to_owned(),
                offset: extent.offset,
                generation: extent.generation,
            });
        }
    }
    store.volume.sync_names()?;
    store.publish_copy(look.map.clone())
}

fn assemble(
    volume: Box<dyn Volume>,
    owner: Owner,
    paths: Vec<PathBuf>,
    catalog: Catalog,
    map: Option<Map>,
) -> Result<Store, Error> {
    let items = catalog.layout.items.len();
    let mut lens = Vec::new();
    for (file, path) in paths.iter().enumerate() {
        lens.push(volume.len(file).map_err(|source| Error::Folder {
            path: path.clone(),
            source,
        })?);
    }
    Ok(Store {
        owner,
        volume,
        paths,
        catalog,
        lens,
        created: map.as_ref().map_or_else(now, |m| m.created),
        life_before: map.as_ref().map_or_else(Ledger::default, |m| m.ledger),
        meta: map.map_or_else(String::new, |m| m.meta),
        payload_read: 0,
        payload_written: 0,
        opened: Instant::now(),
        in_flight: 0,
        started: 0,
        numbers: vec![0; items],
        failed: None,
    })
}

impl Store {
    /// Every file with each of its copies.
    fn superblocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let files = self.paths.len();
        (0..files).flat_map(|file| (0..COPIES).map(move |copy| (file, copy)))
    }

    /// Copies an extent to the same place of this store; its checksum.
    fn copy_extent(&mut self, look: &mut Look, extent: &MapExtent) -> Result<u64, Error> {
        look.stream(extent, &mut |start, data| {
            let mut blocks = Blocks::new(data.len() as u64);
            blocks[..data.len()].copy_from_slice(data);
            let target = plain(
                extent.file as usize,
                extent.offset + start,
                data.len() as u64,
            );
            self.own(Operation::Write, target, blocks).map(|_| ())
        })
    }

    /// Writes all of a file once: blocks that were reserved and never written behave unlike a disk.
    fn zero(&mut self, file: usize) -> Result<(), Error> {
        let end = self.catalog.end(file);
        let (mut next, mut under_way) = (0, 0);
        let mut buffers: Vec<Blocks> = (0..4).map(|_| Blocks::new(PIECE.min(end))).collect();
        while next < end || under_way > 0 {
            if next < end
                && let Some(buffer) = buffers.pop()
            {
                let target = plain(file, next, PIECE.min(end - next));
                next += target.bytes;
                self.owner.ask(transfer(Operation::Write, target, buffer));
                under_way += 1;
                continue;
            }
            if let Some(ended) = self.owner.next() {
                under_way -= 1;
                let target = plain(file, 0, 0);
                let (buffer, _) = finished(&*self.volume, Operation::Write, &target, ended)?;
                buffers.push(buffer);
                continue;
            }
            stalled(&self.owner)?;
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A number that no other store has.
fn fresh_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's own source of a random seed.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u64(now());
    hasher.finish()
}

const _: () = assert!(FORMAT == 2, "say above how older formats are opened");
