//! Making and opening stores.

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use forebay_pinned::Arena;

use super::catalog::Catalog;
use super::header::{Look, check_folders, order, published, read_map, survey};
use super::map::MapPlace;
use super::own::{PIECE, finished, plain, stalled, transfer};
use super::superblock::{COPIES, FORMAT, Superblock};
use super::{Copies, Ledger, Map, MapExtent, Options, Store};
use crate::Error;
use crate::buffer::Blocks;
use crate::io::Tuning;
use crate::key::Layout;
use crate::medium::{Access, BLOCK, Medium, Volume};
use crate::owner::{Operation, Owner};

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
            std::thread::sleep(std::time::Duration::from_micros(50));
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
