//! The superblock: which generation stands, and where its map is.
//!
//! A data file begins with four: two copies for generations of either parity. A generation is
//! published by writing the two copies of its parity, one after the other with a sync between, so
//! that those of the generation before stay whole whatever happens and a crash tears one copy at
//! most: with both damaged, a generation that stood is lost, and no older one is taken for it.
//! Copy `c` points to copy `c` of the map.
//!
//! In every format a superblock is one block that begins with the magic and the format's number and
//! ends with the XXH3 of the rest: damage is told from another format.

use bytemuck::{Pod, Zeroable};
use twox_hash::XxHash3_64;

use crate::medium::BLOCK;

/// Version of the format. A store of an older one is opened if this code still knows how to, which
/// is said here: there is none yet (version 1 was never released). A newer one never is.
pub const FORMAT: u32 = 2;
const MAGIC: [u8; 8] = *b"FOREBAY\0";
/// Copies of each superblock and each map.
pub(crate) const COPIES: usize = 2;
/// Bytes at the start of each data file that hold no extents.
pub(crate) const HEADER: u64 = 64 << 10;

/// One copy. Little-endian on disk, as every machine that this runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Superblock {
    magic: [u8; 8],
    pub(crate) format: u32,
    /// Which of the store's files this is, and how many there are.
    pub(crate) file: u32,
    pub(crate) files: u32,
    _pad: u32,
    /// The same in all files of a store.
    pub(crate) store: u64,
    pub(crate) generation: u64,
    pub(crate) map_offset: u64,
    pub(crate) map_bytes: u64,
    pub(crate) map_checksum: u64,
}

/// What a block that should hold a superblock holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing was ever written.
    Blank,
    /// It is of another format.
    Format(u32),
    /// It is damaged, or something else.
    Damaged,
    Good(Superblock),
}

impl Superblock {
    pub(crate) fn new(store: u64, files: u32, generation: u64) -> Self {
        Self {
            magic: MAGIC,
            format: FORMAT,
            files,
            store,
            generation,
            ..Self::zeroed()
        }
    }

    /// Where in the file copy `copy` of the superblock of a generation is.
    pub(crate) fn place(generation: u64, copy: usize) -> u64 {
        (generation % 2) * BLOCK + copy as u64 * (HEADER / 2)
    }

    pub(crate) fn write(self, block: &mut [u8]) {
        block.fill(0);
        block[..size_of::<Self>()].copy_from_slice(bytemuck::bytes_of(&self));
        let rest = block.len() - 8;
        let checksum = XxHash3_64::oneshot(&block[..rest]);
        block[rest..].copy_from_slice(&checksum.to_le_bytes());
    }

    pub(crate) fn read(block: &[u8]) -> Found {
        if block.iter().all(|byte| *byte == 0) {
            return Found::Blank;
        }
        let Some((rest, checksum)) = block.split_last_chunk::<8>() else {
            return Found::Damaged;
        };
        let Some(bytes) = rest.get(..size_of::<Self>()) else {
            return Found::Damaged;
        };
        let read: Self = bytemuck::pod_read_unaligned(bytes);
        if read.magic != MAGIC || XxHash3_64::oneshot(rest) != u64::from_le_bytes(*checksum) {
            return Found::Damaged;
        }
        if read.format != FORMAT {
            return Found::Format(read.format);
        }
        Found::Good(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = Superblock {
            map_offset: 65536,
            map_bytes: 100,
            ..Superblock::new(7, 1, 3)
        };
        let mut block = vec![0; BLOCK as usize];
        good.write(&mut block);
        let Found::Good(read) = Superblock::read(&block) else {
            panic!("not read back");
        };
        assert_eq!((read.generation, read.map_bytes), (3, 100));
        for bit in (0..size_of::<Superblock>() * 8).chain([4095 * 8, 2000 * 8]) {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Superblock::read(&damaged), Found::Damaged, "bit {bit}");
        }
        let newer = Superblock {
            format: FORMAT + 1,
            ..good
        };
        newer.write(&mut block);
        assert_eq!(Superblock::read(&block), Found::Format(FORMAT + 1));
        assert_eq!(Superblock::read(&vec![0; 4096]), Found::Blank);
        assert_eq!(Superblock::read(&[1, 2, 3]), Found::Damaged);
    }

    #[test]
    fn the_copies_of_two_generations_in_a_row_do_not_overlap() {
        let places: Vec<u64> = (0..4)
            .map(|i| Superblock::place(i / 2, i as usize % 2))
            .collect();
        for (i, place) in places.iter().enumerate() {
            assert!(place + BLOCK <= HEADER);
            assert!(places[..i].iter().all(|p| p != place));
        }
    }
}
