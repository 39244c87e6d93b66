//! The store on disks that fail inside the real kernel: a FUSE file under a loop device under ext4
//! (unreadable sectors, bit rot, lost writes, slow ones), a loop device whose backing file was cut,
//! a full tmpfs, an fsync that lies the second time, a memlock limit. Needs root.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use forebay_nvme::{Error, IoChoice, Key, Layout, Options, StateKind, Store, Tuning, probe};
use forebay_pinned::{Arena, Slab};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

const BYTES: u64 = 300_000;
const BLOCK: usize = 4096;

fn key(section: u32) -> Key {
    Key {
        section,
        state: StateKind::Optim,
        part: 0,
    }
}

fn layout() -> Layout {
    Layout::new(
        "m",
        1,
        (0..6).map(|s| (key(s), BYTES, format!("layer {s}"))),
    )
}

/// Fills a key's version with blocks that say whose they are.
fn fill(section: u32, version: u32, out: &mut [u8]) {
    for (index, block) in out.chunks_mut(16).enumerate() {
        let mut word = marker(section, version).to_vec();
        word.extend((index as u64).to_le_bytes());
        block.copy_from_slice(&word[..block.len()]);
    }
}

fn marker(section: u32, version: u32) -> [u8; 8] {
    (0xf0be_ba00_0000_0000 | u64::from(section) << 16 | u64::from(version)).to_le_bytes()
}

fn write(store: &mut Store, arena: &Arena, section: u32, version: u32) -> Result<(), Error> {
    let mut slab = arena.lease(BYTES).unwrap();
    fill(section, version, &mut slab);
    store.write(key(section), slab)?;
    store.wait().map(|_| ())
}

fn read(store: &mut Store, arena: &Arena, section: u32) -> Result<Slab, Error> {
    store.read(key(section), arena.lease(BYTES).unwrap())?;
    Ok(store.wait()?.slab)
}

fn holds(store: &mut Store, arena: &Arena, section: u32, version: u32) {
    let mut right = vec![0; BYTES as usize];
    fill(section, version, &mut right);
    let slab = read(store, arena, section).unwrap();
    assert!(slab[..] == right[..], "section {section}");
}

/// Whether this process may mount. In CI it must be able to.
fn root() -> bool {
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

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What is to be taken back, last first.
struct Setup {
    undo: Vec<Vec<String>>,
    fuse: Option<BackgroundSession>,
    folder: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self {
            undo: Vec::new(),
            fuse: None,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn undo(&mut self, words: &[&str]) {
        self.undo
            .push(words.iter().map(ToString::to_string).collect());
    }

    /// A loop device on a file, with ext4 on it, mounted.
    fn ext4(&mut self, file: &Path, direct: bool) -> PathBuf {
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

    fn tmpfs(&mut self, options: &str) -> PathBuf {
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
enum Harm {
    Unreadable,
    Unwritable,
    Rotten,
    Lost,
}

/// A marker, and what happens to blocks that begin with it.
type Rule = ([u8; 8], Harm);

#[derive(Clone, Default)]
struct Rules {
    harm: Arc<Mutex<Vec<Rule>>>,
    delay: Arc<Mutex<Duration>>,
    syncs: Arc<AtomicU64>,
    /// Writes and syncs in their order: the syncs as zero lengths.
    order: Arc<Mutex<VecDeque<usize>>>,
}

impl Rules {
    fn set(&self, marker: [u8; 8], harm: Harm) {
        self.harm.lock().unwrap().push((marker, harm));
    }

    fn heal(&self) {
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
struct OneFile {
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
fn harmful() -> (Setup, Rules, PathBuf) {
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

fn choices() -> Vec<IoChoice> {
    match probe::io_uring() {
        Ok(()) => vec![IoChoice::Uring, IoChoice::Threads],
        Err(_) => vec![IoChoice::Threads],
    }
}

fn options(folder: &Path, io: IoChoice) -> Options {
    Options {
        tuning: Some(Tuning {
            io,
            ..Tuning::default()
        }),
        ..Options::new([folder])
    }
}

#[test]
fn unreadable_sectors_bit_rot_and_lost_writes_are_errors_that_name_the_place() {
    if !root() {
        return;
    }
    for io in choices() {
        let (_setup, rules, folder) = harmful();
        let arena = Arena::new(8 << 20).unwrap();
        let mut store = Store::create(&arena, &layout(), &options(&folder, io)).unwrap();
        (0..6).for_each(|s| write(&mut store, &arena, s, 1).unwrap());
        let before = rules.syncs.load(Ordering::SeqCst);
        store.publish("1").unwrap();
        let syncs = rules.syncs.load(Ordering::SeqCst) - before;
        assert!(
            syncs >= 3,
            "data, and each copy of the superblock: {syncs} syncs reached the disk"
        );

        rules.set(marker(2, 1), Harm::Unreadable);
        match read(&mut store, &arena, 2).unwrap_err() {
            Error::Io {
                operation: "reading",
                what,
                path,
                offset,
                source,
            } => {
                assert!(what.contains("layer 2"), "{what}");
                assert_eq!(path, folder.join("data.forebay"));
                assert!(offset >= 65536);
                assert_eq!(source.raw_os_error(), Some(libc::EIO));
            }
            other => panic!("{other}"),
        }
        holds(&mut store, &arena, 3, 1);
        rules.heal();
        holds(&mut store, &arena, 2, 1);

        rules.set(marker(4, 1), Harm::Rotten);
        let error = read(&mut store, &arena, 4).unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }), "{error}");
        assert!(error.to_string().contains("layer 4"), "{error}");
        rules.heal();

        // Acknowledged, synced, and gone.
        rules.set(marker(5, 2), Harm::Lost);
        write(&mut store, &arena, 5, 2).unwrap();
        store.publish("2").unwrap();
        rules.heal();
        let error = read(&mut store, &arena, 5).unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }), "{error}");

        rules.set(marker(1, 3), Harm::Unwritable);
        let error = write(&mut store, &arena, 1, 3).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Io {
                    operation: "writing",
                    ..
                }
            ),
            "{error}"
        );
        rules.heal();
        holds(&mut store, &arena, 1, 1);
        drop(store);
        let mut store = Store::open(&arena, &layout(), &options(&folder, io)).unwrap();
        assert_eq!(store.meta(), "2");
        (0..5).for_each(|s| holds(&mut store, &arena, s, 1));
    }
}

#[test]
fn a_slow_disk_is_waited_for_and_a_generation_is_synced_before_it_is_named() {
    if !root() {
        return;
    }
    let (_setup, rules, folder) = harmful();
    let arena = Arena::new(8 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options(&folder, IoChoice::Auto)).unwrap();
    *rules.delay.lock().unwrap() = Duration::from_millis(10);
    rules.order.lock().unwrap().clear();
    let start = Instant::now();
    (0..6).for_each(|s| write(&mut store, &arena, s, 1).unwrap());
    store.publish("slow").unwrap();
    assert!(start.elapsed() > Duration::from_millis(60));
    let order: Vec<usize> = rules.order.lock().unwrap().iter().copied().collect();
    // Data and maps, a sync, a superblock, a sync, its copy, a sync.
    let syncs: Vec<usize> = (0..order.len()).filter(|i| order[*i] == 0).collect();
    assert!(syncs.len() >= 3, "{order:?}");
    // The file system's own writes are smaller.
    let ours = |range: &[usize]| range.iter().filter(|n| **n >= BLOCK).sum::<usize>();
    let between = |a: usize, b: usize| ours(&order[syncs[a] + 1..syncs[b]]);
    let n = syncs.len();
    assert_eq!(
        (between(n - 3, n - 2), between(n - 2, n - 1)),
        (4096, 4096),
        "{order:?}"
    );
    assert!(
        order[..syncs[n - 3]].iter().sum::<usize>() as u64 >= 6 * BYTES,
        "{order:?}"
    );
    drop(store);
    rules.heal();
    let mut store = Store::open(&arena, &layout(), &options(&folder, IoChoice::Auto)).unwrap();
    (0..6).for_each(|s| holds(&mut store, &arena, s, 1));
}

#[test]
fn a_disk_that_was_cut_short_is_an_error_for_what_is_gone_and_for_nothing_else() {
    if !root() {
        return;
    }
    for io in choices() {
        let mut setup = Setup::new();
        let file = setup.folder("files").join("disk");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        let folder = setup.ext4(&file, true);
        let arena = Arena::new(8 << 20).unwrap();
        let mut store = Store::create(&arena, &layout(), &options(&folder, io)).unwrap();
        (0..6).for_each(|s| write(&mut store, &arena, s, 1).unwrap());
        store.publish("").unwrap();
        // The loop device still has its old size: its sectors are unreadable from somewhere in the
        // middle of the store's file on.
        let map = run(
            "filefrag",
            &[
                "-e",
                "-b512",
                &folder.join("data.forebay").display().to_string(),
            ],
        );
        let first = map.lines().find_map(|l| {
            l.trim()
                .strip_prefix("0:")?
                .split(':')
                .nth(1)?
                .split("..")
                .next()?
                .trim()
                .parse::<u64>()
                .ok()
        });
        let start = first.expect("a first extent") * 512;
        let cut = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        cut.set_len(start + 65536 + 2 * 303_104).unwrap();
        let results: Vec<_> = (0..6).map(|s| read(&mut store, &arena, s)).collect();
        assert!(
            results[0].is_ok() && results[1].is_ok(),
            "what is there is read"
        );
        for result in &results[3..] {
            let error = result.as_ref().unwrap_err();
            let named = error.to_string().contains("data.forebay");
            assert!(
                matches!(error, Error::Io { .. } | Error::Checksum { .. }) && named,
                "{error}"
            );
        }
        cut.set_len(64 << 20).unwrap();
    }
}

#[test]
fn a_full_tmpfs_is_found_before_the_run_and_a_sync_that_failed_is_never_believed() {
    if !root() {
        return;
    }
    let mut setup = Setup::new();
    let tmpfs = setup.tmpfs("size=10m");
    let arena = Arena::new(8 << 20).unwrap();
    let large = Layout::new("m", 1, (0..40).map(|s| (key(s), BYTES, "s")));
    let error = Store::create(&arena, &large, &options(&tmpfs, IoChoice::Auto)).unwrap_err();
    assert!(matches!(error, Error::Space { .. }), "{error}");
    std::fs::remove_file(tmpfs.join("data.forebay")).unwrap();

    // The trap: a sparse disk larger than what is under it. ext4 has room, the disk has not. A
    // first sync says so; a second one would not.
    let file = tmpfs.join("sparse");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let folder = setup.ext4(&file, false);
    let mut trap = options(&folder, IoChoice::Auto);
    trap.prewrite = false;
    let mut store = Store::create(&arena, &large, &trap).unwrap();
    let mut failed = None;
    for section in 0..40 {
        if let Err(error) = write(&mut store, &arena, section, 1) {
            failed = Some(error);
            break;
        }
    }
    let published = store.publish("1");
    match (&failed, &published) {
        (None, Err(Error::Io { .. } | Error::Damaged { .. })) => {
            let again = store.publish("1").unwrap_err();
            assert!(matches!(again, Error::Failed(_)), "{again}");
        }
        (Some(Error::Io { .. }), _) => {}
        other => panic!("{other:?}"),
    }
    drop(store);
    // Whatever was published is whole, or nothing was.
    match Store::open(&arena, &large, &trap) {
        Err(_) => {}
        Ok(mut store) => {
            for section in 0..40 {
                match read(&mut store, &arena, section) {
                    Ok(slab) => {
                        let mut right = vec![0; BYTES as usize];
                        fill(section, 1, &mut right);
                        assert!(slab[..] == right[..]);
                    }
                    Err(error) => assert!(failed.is_some(), "{error}"),
                }
            }
        }
    }
}

#[test]
fn under_a_memlock_limit_it_says_so_and_works() {
    const CHILD: &str = "FOREBAY_TEST_MEMLOCK_CHILD";
    const NAME: &str = "under_a_memlock_limit_it_says_so_and_works";
    if std::env::var_os(CHILD).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let arena = Arena::new(8 << 20).unwrap();
        let lock = arena.lock().to_string();
        assert!(
            lock.contains("memlock") || lock.contains("ulimit"),
            "{lock}"
        );
        let mut store =
            Store::create(&arena, &layout(), &options(folder.path(), IoChoice::Auto)).unwrap();
        println!("{lock}; {}", store.describe());
        (0..6).for_each(|s| write(&mut store, &arena, s, 1).unwrap());
        store.publish("").unwrap();
        (0..6).for_each(|s| holds(&mut store, &arena, s, 1));
        return;
    }
    if !root() {
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let status = Command::new("setpriv")
        .args([
            "--bounding-set=-ipc_lock",
            "--inh-caps=-ipc_lock",
            "prlimit",
            "--memlock=65536:65536",
        ])
        .arg(exe)
        .args(["--exact", NAME, "--nocapture"])
        .env(CHILD, "1")
        .status();
    assert!(status.unwrap().success());
}
