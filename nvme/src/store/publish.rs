//! Publishing a generation: all data durable, then its map, then the superblocks that name it.

use twox_hash::XxHash3_64;

use super::map::MapPlace;
use super::open::now;
use super::own::plain;
use super::superblock::{COPIES, Superblock};
use super::{Map, Store};
use crate::Error;
use crate::buffer::Blocks;
use crate::medium::BLOCK;
use crate::owner::{Operation, Target};

impl Store {
    /// Makes all current versions, and `meta`, the published generation: durable, and what a
    /// crash from here on falls back to. No data is copied: costs a map and two syncs a file.
    /// Returns its number.
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
        let result = self.publish_now(meta);
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
        }
        result
    }

    fn publish_now(&mut self, meta: &str) -> Result<u64, Error> {
        let map = self.map(meta);
        let places = self.publish_map(map)?;
        self.catalog.published(places);
        meta.clone_into(&mut self.meta);
        Ok(self.catalog.generation)
    }

    /// Publishes another store's generation, whose extents are here.
    pub(super) fn publish_copy(&mut self, mut map: Map) -> Result<(), Error> {
        map.maps.clear();
        self.publish_map(map).map(|_| ())
    }

    /// Makes all that a map names durable, then the map, then the superblocks. The places of the map.
    fn publish_map(&mut self, mut map: Map) -> Result<Vec<MapPlace>, Error> {
        // Its own places are in it, too: numbers of at most 20 digits.
        let room = map.to_bytes().len() + 128 * COPIES * self.paths.len();
        map.maps = self.catalog.take_maps(room as u64, COPIES);
        let prepared = self.grow();
        if prepared.is_err() {
            self.catalog.give_maps(&map.maps);
        }
        prepared?;
        let text = map.to_bytes();
        for place in &map.maps {
            let mut blocks = Blocks::new(place.bytes);
            blocks[..text.len()].copy_from_slice(&text);
            let target = plain(place.file as usize, place.offset, place.bytes);
            self.write_back(target, blocks)?;
        }
        self.sync()?;
        // From here on a crash may leave the new generation: all of it is durable.
        let files = self.paths.len() as u32;
        let mut superblock = Superblock::new(self.catalog.store, files, map.generation);
        superblock.map_bytes = text.len() as u64;
        superblock.map_checksum = XxHash3_64::oneshot(&text);
        self.write_superblocks(&map.maps, &superblock)?;
        Ok(map.maps)
    }

    /// Writes a generation's superblocks: first the one copy in every file, then the other.
    pub(super) fn write_superblocks(
        &mut self,
        maps: &[MapPlace],
        superblock: &Superblock,
    ) -> Result<(), Error> {
        for copy in 0..COPIES {
            for place in maps.iter().skip(copy).step_by(COPIES) {
                let mut superblock = *superblock;
                superblock.file = place.file;
                superblock.map_offset = place.offset;
                let mut block = Blocks::new(BLOCK);
                superblock.write(&mut block);
                let offset = Superblock::place(superblock.generation, copy);
                let target = plain(place.file as usize, offset, BLOCK);
                self.write_back(target, block)?;
            }
            self.sync()?;
        }
        Ok(())
    }

    /// Writes blocks and reads them again: a map or a superblock that a disk lost or put elsewhere
    /// would be missed only when it is needed.
    fn write_back(&mut self, target: Target, blocks: Blocks) -> Result<(), Error> {
        let (blocks, _) = self.own(Operation::Write, target, blocks)?;
        let (read, _) = self.own(Operation::Read, target, Blocks::new(target.bytes))?;
        if blocks[..] == read[..] {
            return Ok(());
        }
        Err(Error::Damaged {
            path: self.volume.path(target.file as usize).to_owned(),
            what: format!(
                "the disk does not give back what was written at byte {}",
                target.offset
            ),
        })
    }

    pub(super) fn sync(&mut self) -> Result<(), Error> {
        for file in 0..self.paths.len() {
            let block = Blocks::new(BLOCK);
            self.own(Operation::Sync, plain(file, 0, 0), block)?;
        }
        Ok(())
    }

    fn map(&self, meta: &str) -> Map {
        let layout = &self.catalog.layout;
        let mut names: Vec<(u32, String)> = Vec::new();
        for item in &layout.items {
            if names
                .last()
                .is_none_or(|(section, _)| *section != item.key.section)
            {
                names.push((item.key.section, item.name.clone()));
            }
        }
        Map {
            generation: self.catalog.generation + 1,
            model: layout.model.clone(),
            fingerprint: layout.fingerprint,
            created: self.created,
            published: now(),
            names,
            extents: self.catalog.extents(),
            maps: Vec::new(),
            ledger: self.stats().life,
            meta: meta.to_owned(),
        }
    }
}
