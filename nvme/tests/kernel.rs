//! The store on disks that fail inside the real kernel: a FUSE file under a loop device under ext4
//! (unreadable sectors, bit rot, lost writes, slow ones), a loop device whose backing file was cut,
//! a full tmpfs, an fsync that lies the second time, a memlock limit. Needs root.
#![allow(clippy::unwrap_used)]

mod failing;

use std::path::Path;
use std::process::Command;
use std::slice::from_ref;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use failing::{BLOCK, Harm, Setup, harmful, root, run};

use forebay_nvme::{
    Error, Folders, IoChoice, Key, Layout, Options, StateKind, Store, Tuning, probe, snapshot,
};
use forebay_pinned::{Arena, Slab};

const BYTES: u64 = 300_000;

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
fn a_snapshot_shares_its_data_where_the_file_system_can_and_is_untouched_by_what_follows() {
    if !root() {
        return;
    }
    let mut setup = Setup::new();
    let Some(xfs) = setup.xfs() else { return };
    let (folder, copy, other) = (xfs.join("store"), xfs.join("copy"), setup.folder("other"));
    [&folder, &copy]
        .iter()
        .for_each(|f| std::fs::create_dir(f).unwrap());
    let arena = Arena::new(8 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options(&folder, IoChoice::Auto)).unwrap();
    (0..6).for_each(|s| write(&mut store, &arena, s, 1).unwrap());
    store.publish("kept").unwrap();
    drop(store);
    let kept = snapshot(from_ref(&folder), from_ref(&copy), &Folders).unwrap();
    assert!(
        kept.shared && kept.generation == 1 && kept.bytes == 6 * BYTES,
        "{kept:?}"
    );
    // To another file system it is copied.
    let copied = snapshot(from_ref(&folder), from_ref(&other), &Folders).unwrap();
    assert!(!copied.shared);
    let mut store = Store::open(&arena, &layout(), &options(&folder, IoChoice::Auto)).unwrap();
    for version in 2..5 {
        (0..6).for_each(|s| write(&mut store, &arena, s, version).unwrap());
        store.publish("later").unwrap();
    }
    drop(store);
    for snapshot in [copy, other] {
        let mut store =
            Store::open(&arena, &layout(), &options(&snapshot, IoChoice::Auto)).unwrap();
        assert_eq!(store.meta(), "kept");
        (0..6).for_each(|s| holds(&mut store, &arena, s, 1));
        write(&mut store, &arena, 0, 9).unwrap();
        store.publish("goes on").unwrap();
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
