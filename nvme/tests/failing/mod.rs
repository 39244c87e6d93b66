//! Disks that fail inside the kernel, and mounts that are taken back.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

pub(crate) const BLOCK: usize = 4096;

/// Whether this process may mount. In CI it must be able to.
pub(crate) fn root() -> bool {
    // SAFETY: no arguments, cannot fail.
    let root = unsafe { libc::geteuid() } == 0 && Path::new("/dev/fuse").exists();
    assert!(
        root || std::env::var_os("FOREBAY_CI").is_none(),
        "CI needs root, /dev/fuse and loop devices"
    );
    if !root {
        eprintln!("not run: needs root");
    }
    root
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What is to be taken back, last first.
pub(crate) struct Setup {
    undo: Vec<Vec<String>>,
    fuse: Option<BackgroundSession>,
    folder: tempfile::TempDir,
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self {
            undo: Vec::new(),
            fuse: None,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn undo(&mut self, words: &[&str]) {
        self.undo
            .push(words.iter().map(ToString::to_string).collect());
    }

    /// A loop device on a file, with ext4 on it, mounted.
    pub(crate) fn ext4(&mut self, file: &Path, direct: bool) -> PathBuf {
        let direct = format!("--direct-io={}", if direct { "on" } else { "off" });
        let device = run(
            "losetup",
            &[&direct, "-f", "--show", &file.display().to_string()],
        );
        self.undo(&["losetup", "-d", &device]);
        run(
            "mkfs.ext4",
            &[
                "-q",
                "-F",
                "-E",
                "lazy_itable_init=0",
                "-O",
                "^has_journal",
                &device,
            ],
        );
        let mount = self.folder("ext4");
        run("mount", &[&device, &mount.display().to_string()]);
        self.undo(&["umount", &mount.display().to_string()]);
        mount
    }

    /// XFS on a loop device: it can share blocks between files.
    pub(crate) fn xfs(&mut self) -> Option<PathBuf> {
        if Command::new("mkfs.xfs").arg("-V").output().is_err() {
            assert!(
                std::env::var_os("FOREBAY_CI").is_none(),
                "CI needs mkfs.xfs (xfsprogs)"
            );
            eprintln!("not run: needs mkfs.xfs");
            return None;
        }
        let file = self.folder("files").join("xfs");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(512 << 20)
            .unwrap();
        let device = run("losetup", &["-f", "--show", &file.display().to_string()]);
        self.undo(&["losetup", "-d", &device]);
        run("mkfs.xfs", &["-q", "-m", "reflink=1", &device]);
        let mount = self.folder("xfs");
        run("mount", &[&device, &mount.display().to_string()]);
        self.undo(&["umount", &mount.display().to_string()]);
        Some(mount)
    }

    pub(crate) fn tmpfs(&mut self, options: &str) -> PathBuf {
        let path = self.folder("tmpfs");
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                options,
                "tmpfs",
                &path.display().to_string(),
            ],
        );
        self.undo(&["umount", &path.display().to_string()]);
        path
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        while let Some(words) = self.undo.pop() {
            // The kernel takes a moment to put away a ring.
            for _ in 0..100 {
                let output = Command::new(&words[0]).args(&words[1..]).output();
                if output.is_ok_and(|o| o.status.success()) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        self.fuse = None;
    }
}

/// What the FUSE file does to blocks that hold a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    Unreadable,
    Unwritable,
    Rotten,
    Lost,
}

/// A marker, and what happens to blocks that begin with it.
type Rule = ([u8; 8], Harm);

#[derive(Clone, Default)]
pub(crate) struct Rules {
    harm: Arc<Mutex<Vec<Rule>>>,
    pub(crate) delay: Arc<Mutex<Duration>>,
    pub(crate) syncs: Arc<AtomicU64>,
    /// Writes and syncs in their order: the syncs as zero lengths.
    pub(crate) order: Arc<Mutex<VecDeque<usize>>>,
}

impl Rules {
    pub(crate) fn set(&self, marker: [u8; 8], harm: Harm) {
        self.harm.lock().unwrap().push((marker, harm));
    }

    pub(crate) fn heal(&self) {
        self.harm.lock().unwrap().clear();
        *self.delay.lock().unwrap() = Duration::ZERO;
    }

    fn of(&self, block: &[u8]) -> Option<Harm> {
        let harm = self.harm.lock().unwrap();
        harm.iter()
            .find(|(marker, _)| block.starts_with(marker))
            .map(|h| h.1)
    }
}

/// A file system of one file, `disk`.
pub(crate) struct OneFile {
    bytes: Mutex<Vec<u8>>,
    rules: Rules,
}

const FILE: INodeNo = INodeNo(2);

impl OneFile {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let file = ino == FILE;
        let size = if file {
            self.bytes.lock().unwrap().len() as u64
        } else {
            0
        };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&Duration::ZERO, &self.attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // No page cache between: what the disk does is seen.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        std::thread::sleep(*self.rules.delay.lock().unwrap());
        let bytes = self.bytes.lock().unwrap();
        let start = (offset as usize).min(bytes.len());
        let mut data = bytes[start..(start + size as usize).min(bytes.len())].to_vec();
        for block in data.chunks_mut(BLOCK) {
            match self.rules.of(block) {
                Some(Harm::Unreadable) => return reply.error(Errno::EIO),
                Some(Harm::Rotten) => block[77] ^= 8,
                _ => {}
            }
        }
        reply.data(&data);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        std::thread::sleep(*self.rules.delay.lock().unwrap());
        let mut bytes = self.bytes.lock().unwrap();
        for (index, block) in data.chunks(BLOCK).enumerate() {
            match self.rules.of(block) {
                Some(Harm::Unwritable) => return reply.error(Errno::EIO),
                Some(Harm::Lost) => continue,
                _ => {}
            }
            let start = offset as usize + index * BLOCK;
            if start + block.len() > bytes.len() {
                return reply.error(Errno::ENOSPC);
            }
            bytes[start..start + block.len()].copy_from_slice(block);
        }
        self.rules.order.lock().unwrap().push_back(data.len());
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.rules.syncs.fetch_add(1, Ordering::SeqCst);
        self.rules.order.lock().unwrap().push_back(0);
        reply.ok();
    }
}

/// ext4 on a loop device on a FUSE file that does harm.
pub(crate) fn harmful() -> (Setup, Rules, PathBuf) {
    let mut setup = Setup::new();
    let rules = Rules::default();
    let file = OneFile {
        bytes: Mutex::new(vec![0; 48 << 20]),
        rules: rules.clone(),
    };
    let mount = setup.folder("fuse");
    setup.fuse = Some(fuser::spawn_mount(file, &mount, &Config::default()).unwrap());
    let disk = mount.join("disk");
    // Without this the size reads as 0.
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 48 << 20);
    let folder = setup.ext4(&disk, true);
    (setup, rules, folder)
}
