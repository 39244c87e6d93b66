//! What the store knows of its extents: where each version of each key is, what may be written over,
//! what a generation names. Pure: it does no I/O and never waits.

use super::map::{Map, MapExtent, MapPlace};
use super::space::{Class, Space};
use super::{Copies, Options};
use crate::checksum::seed;
use crate::key::{Key, Layout, StateKind};
use crate::medium::padded;
use crate::owner::Target;

/// Where a version of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) checksum: u64,
    pub(crate) generation: u64,
}

/// A key's versions. Each that is there has a place of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) file: u32,
    class: usize,
    pub(crate) current: Option<Extent>,
    published: Option<Extent>,
    /// What was current at [`Catalog::hold`], once it was written over.
    held: Option<Option<Extent>>,
    /// What a transfer under way will make current, or reads.
    pub(crate) under_way: Option<Extent>,
    /// What was current and is being written over.
    replaced: Option<Extent>,
}

impl Entry {
    /// Whether a version that must not be lost is there.
    fn keeps(&self, offset: u64) -> bool {
        let kept = [self.published, self.held.flatten()];
        kept.iter().flatten().any(|e| e.offset == offset)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub(crate) store: u64,
    pub(crate) layout: Layout,
    pub(crate) entries: Vec<Entry>,
    classes: Vec<Class>,
    spaces: Vec<Space>,
    /// Extents of the opened generation that the layout does not know: kept until the next one.
    pub(crate) foreign: Vec<MapExtent>,
    /// Places of the published map.
    maps: Vec<MapPlace>,
    pub(crate) generation: u64,
    holding: bool,
}

impl Catalog {
    /// Gives every key its places; extents of a published generation keep theirs.
    pub(crate) fn new(
        store: u64,
        layout: &Layout,
        published: Option<&Map>,
        files: usize,
        options: &Options,
    ) -> Self {
        let old = published.map_or(&[][..], |m| &m.extents);
        let maps = published.map_or_else(Vec::new, |m| m.maps.clone());
        let mut spaces = spaces(old, &maps, files);
        let mut foreign = old.to_vec();
        let mut filled = vec![0.0f64; files];
        let mut classes: Vec<Class> = Vec::new();
        let mut entries = Vec::new();
        for (index, item) in layout.items.iter().enumerate() {
            let mine = |e: &MapExtent| e.key == item.key && e.shape == item.shape;
            let kept = foreign.iter().position(mine);
            let kept = kept.map(|i| foreign.swap_remove(i));
            let bytes = padded(layout.bytes(index));
            let file = match kept {
                Some(extent) => extent.file as usize,
                None => lightest(&filled, bytes, &options.rates),
            };
            filled[file] += bytes as f64;
            let same = |c: &Class| c.file as usize == file && c.bytes == bytes;
            let class = classes.iter().position(same).unwrap_or_else(|| {
                classes.push(Class {
                    file: file as u32,
                    bytes,
                    keys: 0,
                    free: Default::default(),
                });
                classes.len() - 1
            });
            classes[class].keys += 1;
            let extent = kept.map(|e| Extent {
                offset: e.offset,
                checksum: e.checksum,
                generation: e.generation,
            });
            entries.push(Entry {
                file: file as u32,
                class,
                current: extent,
                published: extent,
                held: None,
                under_way: None,
                replaced: None,
            });
        }
        let copies = options.copies.of_published(published.is_some());
        // One copy of everything after the other: what is used in order lies in order.
        let most = copies + 1 + u64::from(options.undo);
        for round in 0..most {
            for (entry, item) in entries.iter().zip(&layout.items) {
                let gradient = item.key.state == StateKind::Grad;
                let wanted = match gradient {
                    true => 1,
                    false => copies + u64::from(options.undo),
                };
                let owned = u64::from(entry.published.is_some());
                let class = &mut classes[entry.class];
                if round >= owned && round < wanted {
                    let offset = spaces[entry.file as usize].take(class.bytes);
                    class.free.push_back(offset);
                }
            }
        }
        if copies == 1 && !options.undo {
            for class in &mut classes {
                for _ in 0..class.keys.min(options.slack) {
                    let offset = spaces[class.file as usize].take(class.bytes);
                    class.free.push_back(offset);
                }
            }
        }
        for class in &mut classes {
            // Room for all that could ever be free, so that freeing does not allocate.
            let most = (class.keys * (most + 1)) as usize;
            class.free.reserve(most.saturating_sub(class.free.len()));
        }
        Self {
            store,
            layout: layout.clone(),
            entries,
            classes,
            spaces,
            foreign,
            maps,
            generation: published.map_or(0, |m| m.generation),
            holding: false,
        }
    }

    /// The length that a file must have.
    pub(crate) fn end(&self, file: usize) -> u64 {
        self.spaces[file].end()
    }

    /// What reading the current version takes, and what its checksum must be.
    pub(crate) fn begin_read(&mut self, index: usize) -> Option<(Target, u64)> {
        let extent = self.entries[index].current?;
        self.entries[index].under_way = Some(extent);
        Some((self.target(index, &extent), extent.checksum))
    }

    /// Where a new version goes: to a place that neither the published generation nor what is held
    /// uses. The file may have to grow for it: see [`Catalog::end`].
    /// Without `in_place` it is a place of its own even where the current version could go.
    pub(crate) fn begin_write(&mut self, index: usize, in_place: bool) -> Target {
        let key = self.layout.items[index].key;
        let holding = self.holding && key.state != StateKind::Grad;
        let entry = &mut self.entries[index];
        if holding && entry.held.is_none() {
            entry.held = Some(entry.current);
        }
        let class = &mut self.classes[entry.class];
        let disposable = entry.current.filter(|e| in_place && !entry.keeps(e.offset));
        let offset = match (class.free.pop_front(), disposable) {
            (Some(offset), _) => offset,
            (None, Some(current)) => {
                // Half written it is neither the old version nor the new one.
                entry.replaced = entry.current.take();
                current.offset
            }
            (None, None) => self.spaces[entry.file as usize].take(class.bytes),
        };
        let extent = Extent {
            offset,
            checksum: 0,
            generation: self.generation + 1,
        };
        entry.under_way = Some(extent);
        self.target(index, &extent)
    }

    /// Nothing was written after all.
    pub(crate) fn undo_write(&mut self, index: usize) {
        let entry = &mut self.entries[index];
        let under_way = entry.under_way.take();
        match entry.replaced.take() {
            Some(replaced) => entry.current = Some(replaced),
            None => self.free(index, under_way),
        }
    }

    fn target(&self, index: usize, extent: &Extent) -> Target {
        let (key, file) = (self.layout.items[index].key, self.entries[index].file);
        Target {
            file,
            offset: extent.offset,
            bytes: self.layout.bytes(index),
            seed: seed(self.store, key, file, extent.offset, extent.generation),
            start: 0,
        }
    }

    /// The end of a write: with its checksum the new version is current; without, its place is free.
    pub(crate) fn end_write(&mut self, index: usize, checksum: Option<u64>) {
        let entry = &mut self.entries[index];
        let Some(extent) = entry.under_way.take() else {
            return;
        };
        entry.replaced = None;
        let freed = match checksum {
            Some(checksum) => entry.current.replace(Extent { checksum, ..extent }),
            None => Some(extent),
        };
        self.free(index, freed);
    }

    pub(crate) fn end_read(&mut self, index: usize) -> Option<Extent> {
        self.entries[index].under_way.take()
    }

    /// Frees a version's place unless something else needs it.
    fn free(&mut self, index: usize, version: Option<Extent>) {
        let entry = &self.entries[index];
        if let Some(extent) = version
            && !entry.keeps(extent.offset)
            && entry.current.is_none_or(|c| c.offset != extent.offset)
        {
            self.classes[entry.class].free.push_back(extent.offset);
        }
    }

    pub(crate) fn hold(&mut self) {
        self.holding = true;
    }

    pub(crate) fn commit(&mut self) {
        self.holding = false;
        for index in 0..self.entries.len() {
            if let Some(held) = self.entries[index].held.take() {
                self.free(index, held);
            }
        }
    }

    pub(crate) fn rollback(&mut self) {
        self.holding = false;
        for index in 0..self.entries.len() {
            if let Some(held) = self.entries[index].held.take() {
                let discarded = std::mem::replace(&mut self.entries[index].current, held);
                self.free(index, discarded);
            }
        }
    }

    /// The extents of the next generation: all current versions.
    pub(crate) fn extents(&self) -> Vec<MapExtent> {
        let all = self.entries.iter().zip(&self.layout.items);
        let durable = all.filter(|(_, item)| item.key.state != StateKind::Grad);
        durable
            .filter_map(|(entry, item)| {
                entry.current.map(|extent| MapExtent {
                    key: item.key,
                    shape: item.shape,
                    file: entry.file,
                    offset: extent.offset,
                    checksum: extent.checksum,
                    generation: extent.generation,
                })
            })
            .collect()
    }

    /// Places for the copies of a new map, in every file.
    pub(crate) fn take_maps(&mut self, bytes: u64, copies: usize) -> Vec<MapPlace> {
        let mut places = Vec::new();
        for (file, space) in (0..).zip(&mut self.spaces) {
            for _ in 0..copies {
                let bytes = padded(bytes);
                let offset = space.take(bytes);
                places.push(MapPlace {
                    file,
                    offset,
                    bytes,
                });
            }
        }
        places
    }

    pub(crate) fn give_maps(&mut self, places: &[MapPlace]) {
        for place in places {
            self.spaces[place.file as usize].give(place.offset, place.bytes);
        }
    }

    /// Takes note that the generation with this map stands: what only the one before used is free.
    pub(crate) fn published(&mut self, maps: Vec<MapPlace>) {
        self.generation += 1;
        for index in 0..self.entries.len() {
            let gradient = self.layout.items[index].key.state == StateKind::Grad;
            let current = self.entries[index].current.filter(|_| !gradient);
            let before = std::mem::replace(&mut self.entries[index].published, current);
            self.free(index, before);
        }
        for extent in std::mem::take(&mut self.foreign) {
            self.spaces[extent.file as usize].give(extent.offset, padded(extent.bytes()));
        }
        let before = std::mem::replace(&mut self.maps, maps);
        self.give_maps(&before);
    }

    /// Extents of the opened generation that hold elements of a state, in other parts than the
    /// layout's.
    pub(crate) fn foreign_of(&self, key: Key) -> impl Iterator<Item = &MapExtent> {
        self.foreign
            .iter()
            .filter(move |e| e.key.section == key.section && e.key.state == key.state)
    }
}

fn spaces(extents: &[MapExtent], maps: &[MapPlace], files: usize) -> Vec<Space> {
    let of = |file: usize| {
        let extents = extents
            .iter()
            .map(|e| (e.file, e.offset, padded(e.bytes())));
        let maps = maps.iter().map(|m| (m.file, m.offset, m.bytes));
        let all = extents.chain(maps).filter(|e| e.0 as usize == file);
        Space::new(all.map(|e| (e.1, e.2)).collect())
    };
    (0..files).map(of).collect()
}

/// The file that would be done first if it took `bytes` more.
fn lightest(filled: &[f64], bytes: u64, rates: &[f64]) -> usize {
    let rate = |file: usize| rates.get(file).copied().filter(|r| *r > 0.0).unwrap_or(1.0);
    let time = |file: usize| (filled[file] + bytes as f64) / rate(file);
    (0..filled.len())
        .min_by(|a, b| time(*a).total_cmp(&time(*b)))
        .unwrap_or(0)
}

impl Copies {
    /// How many copies of each durable extent are to have a place from the start.
    fn of_published(self, published: bool) -> u64 {
        match self {
            Self::Two => 2,
            Self::One => 1 + u64::from(published),
        }
    }
}

#[cfg(test)]
mod tests;
