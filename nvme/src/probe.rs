//! What the disk of a machine can do, found by doing it.

use std::io;
use std::path::Path;
use std::time::Instant;

use forebay_pinned::Arena;

use crate::io::UringIo;
use crate::{Error, Key, Layout, Options, StateKind, Store};

/// Rates of a disk, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiskRate {
    /// Reading.
    pub read_bytes_per_s: f64,
    /// Writing.
    pub write_bytes_per_s: f64,
}

/// Whether io_uring works here: one real operation, not only the set-up.
///
/// # Errors
/// Why not, and what to change.
pub fn io_uring() -> Result<(), String> {
    UringIo::works()
}

/// Bytes free for this user in a folder.
///
/// # Errors
/// [`Error::Folder`].
pub fn free_bytes(folder: &Path) -> Result<u64, Error> {
    crate::folders::free_bytes(folder)
}

/// Writes `bytes` of real data to a file in `folder`, past the page cache, and reads them back.
/// (A file that was reserved and never written reads faster than any disk.)
///
/// # Errors
/// What keeps a store from working there.
pub fn disk(folder: &Path, bytes: u64) -> Result<DiskRate, Error> {
    let pieces = 16;
    let piece = (bytes / pieces).next_multiple_of(4096).max(64 << 10);
    let arena = Arena::new(pieces * piece).map_err(|e| Error::Folder {
        path: folder.into(),
        source: io::Error::other(e),
    })?;
    let scratch = folder.join(format!(".forebay-probe-{}", std::process::id()));
    std::fs::create_dir(&scratch).map_err(|source| Error::Folder {
        path: folder.into(),
        source,
    })?;
    let result = measure(&arena, &scratch, pieces, piece);
    // The figures stand whether or not the leftovers go.
    let _ = std::fs::remove_dir_all(&scratch);
    result
}

fn measure(arena: &Arena, folder: &Path, pieces: u64, piece: u64) -> Result<DiskRate, Error> {
    let key = |part: u64| Key {
        section: 0,
        state: StateKind::Grad,
        part: part as u32,
    };
    let layout = Layout::new("probe", 0, (0..pieces).map(|p| (key(p), piece, "probe")));
    let mut store = Store::create(arena, &layout, &Options::new([folder]))?;
    let mut slabs = Vec::new();
    for part in 0..pieces {
        let mut slab = arena.lease(piece).map_err(|e| Error::Folder {
            path: folder.into(),
            source: io::Error::other(e),
        })?;
        // Not zeros: some disks make short work of those.
        let (words, _) = slab.as_chunks_mut::<8>();
        for (i, word) in words.iter_mut().enumerate() {
            *word = (i as u64 ^ (part << 40))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes();
        }
        slabs.push(slab);
    }
    let mut run = |write: bool, slabs: Vec<forebay_pinned::Slab>| {
        let start = Instant::now();
        let count = slabs.len();
        for (part, slab) in (0..).zip(slabs) {
            if write {
                store.write(key(part), slab)?
            } else {
                store.read(key(part), slab)?
            }
        }
        let back: Result<Vec<_>, Error> = (0..count).map(|_| Ok(store.wait()?.slab)).collect();
        let rate = (pieces * piece) as f64 / start.elapsed().as_secs_f64();
        Ok::<_, Error>((rate, back?))
    };
    // The first writes also make the file system find room: the best of a few rounds counts.
    let mut best = DiskRate {
        read_bytes_per_s: 0.0,
        write_bytes_per_s: 0.0,
    };
    for _ in 0..3 {
        let (write, back) = run(true, slabs)?;
        let (read, back) = run(false, back)?;
        best.write_bytes_per_s = best.write_bytes_per_s.max(write);
        best.read_bytes_per_s = best.read_bytes_per_s.max(read);
        slabs = back;
    }
    Ok(best)
}
