//! The map of a generation: everything that is in it, and where. JSON, so that it can be read
//! without this code; its checksum is in the superblock.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::key::{Key, Shape};
use crate::medium::{BLOCK, padded};

use super::superblock::HEADER;

/// Bytes moved in a store's whole life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Bytes read from disk, whole blocks.
    pub read_bytes: u64,
    /// Bytes written to disk, whole blocks, those of maps and superblocks included.
    pub written_bytes: u64,
    /// Bytes of states that were asked to be written.
    pub payload_written_bytes: u64,
    /// Seconds for which the store was open.
    pub open_s: f64,
}

/// A published generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Map {
    pub(crate) generation: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: u64,
    /// Seconds since 1970 when the store was made, and when this generation was.
    pub(crate) created: u64,
    pub(crate) published: u64,
    /// Names of sections, by number.
    pub(crate) names: Vec<(u32, String)>,
    pub(crate) extents: Vec<MapExtent>,
    /// In each file, the places of this map's copies.
    pub(crate) maps: Vec<MapPlace>,
    pub(crate) ledger: Ledger,
    /// The user's own part.
    pub(crate) meta: String,
}

/// One extent of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapExtent {
    pub(crate) key: Key,
    pub(crate) shape: Shape,
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) checksum: u64,
    /// The generation that wrote it.
    pub(crate) generation: u64,
}

impl MapExtent {
    pub(crate) fn bytes(&self) -> u64 {
        // Checked when the map was read.
        self.shape.bytes().unwrap_or(0)
    }
}

/// Where a copy of the map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapPlace {
    pub(crate) file: u32,
    pub(crate) offset: u64,
    /// Bytes reserved for it.
    pub(crate) bytes: u64,
}

impl Map {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always serializes")
    }

    /// Reads a map that anyone may have written, of a store of so many files.
    pub(crate) fn parse(path: &Path, bytes: &[u8], files: u32) -> Result<Self, Error> {
        let fail = |what: String| Error::Damaged {
            path: path.to_owned(),
            what,
        };
        let map: Self = serde_json::from_slice(bytes).map_err(|e| fail(format!("its map: {e}")))?;
        let mut runs: Vec<(u32, u64, u64)> = Vec::new();
        for extent in &map.extents {
            let bytes = extent.shape.bytes();
            let bytes = bytes.ok_or_else(|| fail("an extent without bounds".into()))?;
            extent
                .shape
                .first
                .checked_add(extent.shape.elements)
                .ok_or_else(|| fail("an extent without bounds".into()))?;
            runs.push((extent.file, extent.offset, padded(bytes)));
        }
        runs.extend(map.maps.iter().map(|m| (m.file, m.offset, m.bytes)));
        runs.sort_unstable();
        for (file, offset, bytes) in &runs {
            let end = offset.checked_add(*bytes);
            let sound = *file < files
                && *offset >= HEADER
                && offset.is_multiple_of(BLOCK)
                && end.is_some_and(|end| end < 1 << 60);
            if !sound {
                return Err(fail("an extent lies outside its file".into()));
            }
        }
        if runs
            .windows(2)
            .any(|w| w[0].0 == w[1].0 && w[0].1 + w[0].2 > w[1].1)
        {
            return Err(fail("two extents overlap".into()));
        }
        Ok(map)
    }

    pub(crate) fn name(&self, section: u32) -> &str {
        let found = self.names.iter().find(|(number, _)| *number == section);
        found.map_or("?", |(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StateKind;

    fn map() -> Map {
        let extent = MapExtent {
            key: Key {
                section: 1,
                state: StateKind::Optim,
                part: 2,
            },
            shape: Shape::bytes_only(100),
            file: 0,
            offset: HEADER,
            checksum: 7,
            generation: 3,
        };
        Map {
            generation: 3,
            model: "m".into(),
            fingerprint: 9,
            created: 1,
            published: 2,
            names: vec![(1, "layer".into())],
            extents: vec![extent],
            maps: vec![MapPlace {
                file: 0,
                offset: HEADER + BLOCK,
                bytes: BLOCK,
            }],
            ledger: Ledger::default(),
            meta: "{\"step\":1}".into(),
        }
    }

    fn parse(map: &Map) -> Result<Map, Error> {
        Map::parse(Path::new("x"), &map.to_bytes(), 1)
    }

    #[test]
    fn a_map_survives_its_text() {
        assert_eq!(parse(&map()).unwrap(), map());
    }

    #[test]
    fn a_hostile_map_is_an_error() {
        let change = |change: &dyn Fn(&mut Map)| {
            let mut hostile = map();
            change(&mut hostile);
            assert!(parse(&hostile).is_err(), "{hostile:?}");
        };
        change(&|m| m.extents[0].shape.elements = u64::MAX);
        change(&|m| m.extents[0].shape.components = u32::MAX);
        change(&|m| m.extents[0].shape.first = u64::MAX);
        change(&|m| m.extents[0].file = 1);
        change(&|m| m.extents[0].offset = HEADER + 1);
        change(&|m| m.extents[0].offset = 0);
        change(&|m| m.extents[0].offset = u64::MAX - 4095);
        change(&|m| m.extents[0].offset = HEADER + BLOCK);
        change(&|m| m.maps[0].bytes = u64::MAX);
        for text in ["", "{}", "[", "{\"generation\":1}"] {
            assert!(Map::parse(Path::new("x"), text.as_bytes(), 1).is_err());
        }
    }
}
