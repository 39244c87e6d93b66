//! Looking at a store, checking every byte of it, and keeping a generation of it.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::key::Key;
use crate::medium::{Access, Medium};
use crate::store::{Ledger, Look, MapExtent, copy, look};

/// What a store holds.
#[derive(Debug)]
pub struct Inspection {
    /// The published generation.
    pub generation: u64,
    /// The model's name.
    pub model: String,
    /// The user's own part.
    pub meta: String,
    /// Seconds since 1970 when the store was made.
    pub created: u64,
    /// And when the generation was published.
    pub published: u64,
    /// Bytes moved in the store's life, until then.
    pub ledger: Ledger,
    /// Files that the store is spread over.
    pub files: u32,
    /// Lengths of the files that were looked at.
    pub file_bytes: Vec<u64>,
    /// Copies of superblocks that are not whole, in those files.
    pub damaged_superblocks: usize,
    /// The extents, by section and state.
    pub extents: Vec<ExtentInfo>,
}

/// An extent of the generation.
#[derive(Clone, Debug)]
pub struct ExtentInfo {
    /// Its name.
    pub key: Key,
    /// The section's name.
    pub section: String,
    /// Which of the store's files it is in.
    pub file: u32,
    /// Where in it.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// The section's elements that it holds: the first, and how many.
    pub elements: (u64, u64),
    /// The generation that wrote it.
    pub generation: u64,
    /// What checking it found: nothing if it was not checked.
    pub checked: Option<Result<(), String>>,
}

impl Inspection {
    /// Extents that were checked and found damaged.
    pub fn damaged(&self) -> impl Iterator<Item = &ExtentInfo> {
        self.extents
            .iter()
            .filter(|e| matches!(e.checked, Some(Err(_))))
    }
}

/// Looks at the published generation of a store; with `verify` reads all of it, for which nobody else
/// may be using it. `progress` is told how many bytes were checked.
///
/// # Errors
/// As [`Store::peek`](crate::Store::peek); with `verify`, [`Error::Locked`], and [`Error::Folders`] if
/// not all folders of the store are given. A damaged extent is no error: it is in the result.
pub fn inspect(
    folders: &[PathBuf],
    medium: &dyn Medium,
    verify: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<Inspection, Error> {
    // Held while all is read.
    let _lock = verify
        .then(|| medium.open(folders, Access::Own))
        .transpose()?;
    let mut look = look(folders, medium)?;
    if verify {
        look.all_files(folders)?;
    }
    let mut extents = Vec::new();
    for extent in look.map.extents.clone() {
        let checked = verify.then(|| check(&mut look, &extent, progress));
        extents.push(ExtentInfo {
            key: extent.key,
            section: look.map.name(extent.key.section).to_owned(),
            file: extent.file,
            offset: extent.offset,
            bytes: extent.bytes(),
            elements: (extent.shape.first, extent.shape.elements),
            generation: extent.generation,
            checked: checked.transpose()?,
        });
    }
    let len = |file| look.volume.len(file).unwrap_or(0);
    Ok(Inspection {
        generation: look.map.generation,
        file_bytes: (0..folders.len()).map(len).collect(),
        damaged_superblocks: look.damaged,
        files: look.files,
        extents,
        model: look.map.model,
        meta: look.map.meta,
        created: look.map.created,
        published: look.map.published,
        ledger: look.map.ledger,
    })
}

/// Reads an extent. The outer error is one that ends the reading of anything.
fn check(
    look: &mut Look,
    extent: &MapExtent,
    progress: &mut dyn FnMut(u64),
) -> Result<Result<(), String>, Error> {
    let read = look.stream(extent, &mut |_, data| {
        progress(data.len() as u64);
        Ok(())
    });
    match read {
        Ok(sum) if sum == extent.checksum => Ok(Ok(())),
        Ok(_) => Ok(Err("the checksum does not match".into())),
        Err(error @ Error::Stalled { .. }) => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// What a snapshot took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The generation kept.
    pub generation: u64,
    /// Bytes of its states.
    pub bytes: u64,
    /// Whether the file system shares the data until either side changes.
    pub shared: bool,
}

/// Keeps the published generation of a store in other folders, one for each of its own: they are a
/// store from then on. Where the file system can, no data is copied; else all of it is, verified.
/// Nobody may be using the store meanwhile.
///
/// # Errors
/// [`Error::Exists`] if there is something in the other folders; [`Error::Checksum`] if the generation
/// is damaged; [`Error::Space`], [`Error::Folder`], [`Error::Locked`].
pub fn snapshot(from: &[PathBuf], to: &[PathBuf], medium: &dyn Medium) -> Result<Snapshot, Error> {
    if from.len() != to.len() {
        return Err(Error::Misuse(format!(
            "a snapshot of {} folders needs as many new ones, not {}",
            from.len(),
            to.len()
        )));
    }
    let _lock = medium.open(from, Access::Own)?;
    let mut look = look(from, medium)?;
    look.all_files(from)?;
    for folder in to {
        let occupied = std::fs::read_dir(folder).map(|mut entries| entries.next().is_some());
        match occupied {
            Ok(false) => {}
            Ok(true) => {
                return Err(Error::Exists {
                    path: folder.clone(),
                });
            }
            Err(source) => {
                return Err(Error::Folder {
                    path: folder.clone(),
                    source,
                });
            }
        }
    }
    let mut shared = true;
    for (from, to) in from.iter().zip(to) {
        shared = shared && reflink(from, to)?;
    }
    if !shared {
        copy(&mut look, to, medium)?;
    }
    let bytes = look.map.extents.iter().map(MapExtent::bytes).sum();
    Ok(Snapshot {
        generation: look.map.generation,
        bytes,
        shared,
    })
}

/// Has the file system share a data file, if it can.
fn reflink(from: &Path, to: &Path) -> Result<bool, Error> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Folder { path, source }
    };
    let source = std::fs::File::open(crate::folders::data_path(from)).map_err(failed(from))?;
    let mut options = std::fs::OpenOptions::new();
    options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW);
    let path = crate::folders::data_path(to);
    let target = options.open(&path).map_err(failed(to))?;
    // SAFETY: a plain call on two open files.
    let result = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) };
    if result == 0 {
        target.sync_all().map_err(failed(to))?;
        let folder = std::fs::File::open(to).and_then(|f| f.sync_all());
        folder.map_err(failed(to))?;
        return Ok(true);
    }
    std::fs::remove_file(&path).map_err(failed(to))?;
    Ok(false)
}
