//! Real folders, each on a disk of its own: files made and opened with care.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Error;
use crate::io::{Region, Tuning, open_io};
use crate::medium::{Access, BLOCK, IoMaker, Medium, Volume};

const DATA: &str = "data.forebay";
const LOCK: &str = "store.lock";
/// What the first format, never released, called its manifest.
const FIRST_FORMAT: &str = "generation.forebay";
/// A killed process, or a child between fork and exec, holds a lock a moment longer.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Folders of the file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Folders;

impl Medium for Folders {
    fn open(&self, folders: &[PathBuf], access: Access) -> Result<Box<dyn Volume>, Error> {
        let mut files = Vec::new();
        for path in folders {
            let kind = std::fs::metadata(path).map_err(folder(path))?;
            if !kind.is_dir() {
                return Err(folder(path)(io::ErrorKind::NotADirectory.into()));
            }
            let same = |other: &&PathBuf| other.canonicalize().ok() == path.canonicalize().ok();
            if folders.iter().filter(same).count() > 1 {
                let what = format!("{} is given twice", path.display());
                return Err(Error::Misuse(what));
            }
            let data = data_path(path);
            if path.join(FIRST_FORMAT).exists() {
                return Err(Error::Format {
                    path: data,
                    version: 1,
                });
            }
            if access != Access::Create && !data.exists() {
                return Err(Error::NoGeneration { path: path.clone() });
            }
            let lock = match access {
                Access::Look => None,
                Access::Create | Access::Own => Some(lock(path)?),
            };
            let file = open_data(&data, access)?;
            check_alignment(&file, &data)?;
            files.push(OpenFile {
                _lock: lock,
                file,
                folder: path.clone(),
                path: data,
            });
        }
        Ok(Box::new(OpenFolders { files }))
    }
}

struct OpenFile {
    /// Held for its lock.
    _lock: Option<File>,
    file: File,
    folder: PathBuf,
    path: PathBuf,
}

struct OpenFolders {
    files: Vec<OpenFile>,
}

impl Volume for OpenFolders {
    fn path(&self, file: usize) -> &Path {
        &self.files[file].path
    }

    fn len(&self, file: usize) -> io::Result<u64> {
        Ok(self.files[file].file.metadata()?.len())
    }

    fn free(&self, file: usize) -> Result<u64, Error> {
        free_bytes(&self.files[file].folder)
    }

    fn reserve(&mut self, file: usize, bytes: u64) -> Result<(), Error> {
        let OpenFile { file, folder, .. } = &self.files[file];
        reserve(file, folder, bytes)
    }

    fn sync_names(&mut self) -> Result<(), Error> {
        for OpenFile { folder, .. } in &self.files {
            let synced = File::open(folder).and_then(|f| f.sync_all());
            synced.map_err(|source| Error::Io {
                operation: "syncing",
                what: "the folder".into(),
                path: folder.clone(),
                offset: 0,
                source,
            })?;
        }
        Ok(())
    }

    fn io(&self, region: Option<Region>, tuning: Tuning) -> io::Result<IoMaker> {
        let files: io::Result<Vec<File>> = self.files.iter().map(|f| f.file.try_clone()).collect();
        let files = files?;
        Ok(Box::new(move || open_io(files, region, tuning)))
    }
}

/// The data file of a folder.
pub(crate) fn data_path(folder: &Path) -> PathBuf {
    folder.join(DATA)
}

fn folder(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Folder { path, source }
}

/// Options for a file of ours: private, and never through a link.
fn options(access: Access, flags: i32) -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(access != Access::Look)
        .create(access == Access::Create)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | flags);
    options
}

/// Opens a data file past the page cache; where the file system has no direct I/O, through it.
pub(crate) fn open_data(path: &Path, access: Access) -> Result<File, Error> {
    match options(access, libc::O_DIRECT).open(path) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => options(access, 0).open(path),
        other => other,
    }
    .map_err(folder(path))
}

/// Direct I/O in blocks of ours must be possible; where the file system does not tell, it is tried
/// by the first transfer.
fn check_alignment(file: &File, path: &Path) -> Result<(), Error> {
    // SAFETY: all-zero is a valid `statx`, which the call fills.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: an empty path names the open file itself; `stat` is ours.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            mask,
            &mut stat,
        )
    };
    let told = result == 0 && stat.stx_mask & mask != 0;
    let wanted = stat.stx_dio_mem_align.max(stat.stx_dio_offset_align);
    if told && u64::from(wanted) > BLOCK {
        let what = format!("direct I/O here wants blocks of {wanted} bytes, more than {BLOCK}");
        return Err(folder(path)(io::Error::new(
            io::ErrorKind::Unsupported,
            what,
        )));
    }
    Ok(())
}

/// Takes the folder for this process, until the file is closed.
fn lock(path: &Path) -> Result<File, Error> {
    let mut file = options(Access::Create, 0)
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
fn reserve(file: &File, path: &Path, bytes: u64) -> Result<(), Error> {
    let len = file.metadata().map_err(folder(path))?.len();
    if len >= bytes {
        return Ok(());
    }
    let space = |free| Error::Space {
        path: path.to_owned(),
        needed: bytes - len,
        free,
        instead: String::new(),
    };
    let free = free_bytes(path)?;
    if free < bytes - len {
        return Err(space(free));
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
        Some(libc::ENOSPC) => Err(space(free_bytes(path)?)),
        _ => Err(folder(path)(error)),
    }
}
