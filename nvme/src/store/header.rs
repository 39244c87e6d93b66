//! What the headers of a store's files say: which generation stands, and whether they are its files.

use std::path::PathBuf;

use twox_hash::XxHash3_64;

use super::own::{Sink, own, plain, stream};
use super::superblock::{COPIES, Found, HEADER, Superblock};
use super::{Map, MapExtent, Options};
use crate::Error;
use crate::buffer::Blocks;
use crate::io::Tuning;
use crate::medium::{Access, BLOCK, Medium, Volume};
use crate::owner::{Operation, Owner};

/// More than any real map has.
const MAP_BYTES_MAX: u64 = 1 << 30;

/// What the headers of a store's files say.
pub(super) struct Header {
    pub(super) store: u64,
    pub(super) generation: u64,
    /// Files of the store.
    pub(super) files: u32,
    /// By folder given: which file of the store it holds, if it says so.
    pub(super) index: Vec<Option<u32>>,
    /// The good superblocks of the newest generation.
    pub(super) newest: Vec<(usize, Superblock)>,
    /// By folder given: superblocks that are not whole.
    pub(super) damaged: Vec<usize>,
}

/// Reads the headers of all files; `None` where nothing was ever published.
pub(super) fn survey(
    owner: &mut Owner,
    volume: &dyn Volume,
    folders: usize,
) -> Result<Option<Header>, Error> {
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

pub(super) fn published(header: Option<Header>, paths: &[PathBuf]) -> Result<Header, Error> {
    header.ok_or_else(|| Error::NoGeneration {
        path: paths[0].clone(),
    })
}

/// The map of the newest generation, from whichever copy is whole. An older generation is no
/// substitute: its extents may have been written over.
pub(super) fn read_map(
    owner: &mut Owner,
    volume: &dyn Volume,
    header: &Header,
) -> Result<Map, Error> {
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

/// The order in which the folders make up the store, if they do and it is not the one given.
pub(super) fn order(index: &[Option<u32>]) -> Option<Vec<usize>> {
    let place = |file: usize| index.iter().position(|i| *i == Some(file as u32));
    let order: Option<Vec<usize>> = (0..index.len()).map(place).collect();
    order.filter(|order| !order.is_sorted())
}

pub(super) fn check_folders(header: &Header, paths: &[PathBuf]) -> Result<(), Error> {
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
