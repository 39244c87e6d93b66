//! The files of a store: data, manifest and lock, made and opened with care.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Error;

/// Extents and transfers are multiples of this: the largest logical block in use.
pub(crate) const BLOCK: u64 = 4096;

const LOCK: &str = "store.lock";
/// A killed process, or a child between fork and exec, holds a lock a moment longer.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
pub(crate) const MANIFEST: &str = "generation.forebay";
const MANIFEST_NEW: &str = "generation.new";
/// More than any real manifest has.
const MANIFEST_BYTES_MAX: u64 = 256 << 20;

fn folder(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Folder { path, source }
}

/// Options for a file of ours: private, and never through a link.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

/// The data file of a folder.
pub(crate) fn data_path(path: &Path, index: usize) -> PathBuf {
    path.join(format!("data-{index}.forebay"))
}

/// Opens a data file past the page cache; where the file system has no direct I/O, through it.
pub(crate) fn open_data(path: &Path, create: bool) -> Result<File, Error> {
    let mut direct = options();
    direct
        .create(create)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_DIRECT);
    match direct.open(path) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => options().create(create).open(path),
        other => other,
    }
    .map_err(folder(path))
}

/// Takes the folder for this process, until the file is closed.
pub(crate) fn lock(path: &Path) -> Result<File, Error> {
    let mut file = options()
        .create(true)
        .open(path.join(LOCK))
        .map_err(folder(path))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    // SAFETY: a plain call on a file that is open.
    while unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        if Instant::now() < deadline {
            std::thread::sleep(LOCK_PATIENCE / 50);
            continue;
        }
        let mut owner = String::new();
        // The number is a courtesy; without it the error still says what is wrong.
        let _ = file.read_to_string(&mut owner);
        return Err(Error::Locked {
            path: path.to_owned(),
            owner: owner.trim().to_owned(),
        });
    }
    file.set_len(0).map_err(folder(path))?;
    write!(file, "{}", std::process::id()).map_err(folder(path))?;
    Ok(file)
}

/// Bytes free for this user on the folder's file system.
pub(crate) fn free_bytes(path: &Path) -> Result<u64, Error> {
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| folder(path)(io::ErrorKind::InvalidInput.into()))?;
    // SAFETY: all-zero is a valid `statvfs`, which the call fills.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and `stat` is ours.
    if unsafe { libc::statvfs(c_path.as_ptr(), &mut stat) } != 0 {
        return Err(folder(path)(io::Error::last_os_error()));
    }
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Makes a file at least `bytes` long with the space really reserved, so that a full disk is met
/// now and not in the middle of a run.
pub(crate) fn reserve(file: &File, path: &Path, bytes: u64) -> Result<(), Error> {
    let len = file.metadata().map_err(folder(path))?.len();
    if len >= bytes {
        return Ok(());
    }
    // SAFETY: a plain call on a file that is open.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Not every file system reserves; the space was checked against what is free.
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => file.set_len(bytes).map_err(folder(path)),
        Some(libc::ENOSPC) => {
            let free = free_bytes(path.parent().unwrap_or(path))?;
            Err(Error::Space {
                path: path.to_owned(),
                needed: bytes - len,
                free,
            })
        }
        _ => Err(folder(path)(error)),
    }
}

/// Writes a manifest so that after a crash at any instant the old or the new one stands.
pub(crate) fn publish_manifest(path: &Path, text: &str) -> io::Result<()> {
    let new = path.join(MANIFEST_NEW);
    let mut file = options().create(true).truncate(true).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path.join(MANIFEST))?;
    File::open(path)?.sync_all()
}

/// The manifest's text, if there is one.
pub(crate) fn read_manifest(path: &Path) -> Result<Option<String>, Error> {
    let full = path.join(MANIFEST);
    let mut file = match options().open(&full) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(folder(&full)(e)),
    };
    let fail = |what: &str| Error::Manifest {
        path: full.clone(),
        what: what.to_owned(),
    };
    if file.metadata().map_err(folder(path))?.len() > MANIFEST_BYTES_MAX {
        return Err(fail("too large to be a manifest"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)
        .map_err(|_| fail("not text"))?;
    Ok(Some(text))
}
