//! The store on a real disk, on io_uring and on threads: round trips, damage, crashes, undo.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};

use forebay_nvme::{Error, IoChoice, Key, Layout, Options, StateKind, Store, Tuning, probe};
use forebay_pinned::{Arena, Slab};

const BYTES: [u64; 4] = [5000, 4096, 3 << 20, 1];

fn key(section: u32, state: StateKind) -> Key {
    Key {
        section,
        state,
        part: 0,
    }
}

fn layout() -> Layout {
    let states = [StateKind::Param, StateKind::Grad, StateKind::Optim];
    let all = (0..)
        .zip(BYTES)
        .flat_map(|(s, bytes)| states.map(|state| (key(s, state), bytes, format!("section {s}"))));
    Layout::new("test model", 77, all)
}

fn options(paths: &[&Path], io: IoChoice) -> Options {
    Options {
        tuning: Some(Tuning {
            io,
            ..Tuning::default()
        }),
        undo: true,
        ..Options::new(paths.iter().copied())
    }
}

/// What version `version` of a key holds.
fn byte(key: Key, version: u32, i: usize) -> u8 {
    let name = u64::from(key.section) * 31 + key.state as u64 * 7 + u64::from(version) * 1013;
    let mixed = (i as u64 | name << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

fn write(store: &mut Store, arena: &Arena, key: Key, version: u32) {
    let mut slab = arena.lease(BYTES[key.section as usize]).unwrap();
    slab.iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = byte(key, version, i));
    store.write(key, slab).unwrap();
    store.wait().unwrap();
}

fn read(store: &mut Store, arena: &Arena, key: Key) -> Result<Slab, Error> {
    store.read(key, arena.lease(BYTES[key.section as usize]).unwrap())?;
    Ok(store.wait()?.slab)
}

fn holds(store: &mut Store, arena: &Arena, key: Key, version: u32) -> bool {
    let slab = read(store, arena, key).unwrap();
    slab.iter()
        .enumerate()
        .all(|(i, b)| *b == byte(key, version, i))
}

fn choices() -> Vec<IoChoice> {
    match probe::io_uring() {
        Ok(()) => vec![IoChoice::Uring, IoChoice::Threads],
        Err(why) => {
            eprintln!("not run on io_uring: {why}");
            vec![IoChoice::Threads]
        }
    }
}

#[test]
fn what_is_published_comes_back_and_what_is_not_does_not() {
    for io in choices() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = options(&[one.path(), two.path()], io);
        let arena = Arena::new(16 << 20).unwrap();
        let mut store = Store::create(&arena, &layout(), &options).unwrap();
        let keys: Vec<Key> = (0..4)
            .flat_map(|s| [key(s, StateKind::Param), key(s, StateKind::Optim)])
            .collect();
        for version in 1..=5 {
            keys.iter()
                .for_each(|k| write(&mut store, &arena, *k, version));
            write(&mut store, &arena, key(2, StateKind::Grad), version);
            assert!(keys.iter().all(|k| holds(&mut store, &arena, *k, version)));
            if version % 2 == 0 {
                store.publish(&format!("version {version}")).unwrap();
            }
        }
        drop(store);
        let mut store = Store::open(&arena, &layout(), &options).unwrap();
        assert_eq!((store.meta(), store.generation()), ("version 4", 2));
        assert!(keys.iter().all(|k| holds(&mut store, &arena, *k, 4)));
        let missing = read(&mut store, &arena, key(2, StateKind::Grad));
        assert!(
            matches!(missing, Err(Error::Missing { .. })),
            "gradients are not published"
        );
        let stats = store.stats();
        let payload: u64 = BYTES.iter().map(|b| 2 * b.next_multiple_of(4096)).sum();
        let header = 2 * 2 * (64 << 10);
        assert!(
            (payload..=payload + header).contains(&stats.read_bytes),
            "and headers and a map"
        );
        assert_eq!(
            (stats.payload_read_bytes, stats.written_bytes),
            (2 * BYTES.iter().sum::<u64>(), 0)
        );
        assert!(stats.life.written_bytes >= 4 * payload);
    }
}

#[test]
fn damage_moved_data_and_a_cut_file_are_errors_and_the_rest_stays_usable() {
    for io in choices() {
        let folder = tempfile::tempdir().unwrap();
        let arena = Arena::new(16 << 20).unwrap();
        let options = options(&[folder.path()], io);
        let mut store = Store::create(&arena, &layout(), &options).unwrap();
        let (a, b) = (key(0, StateKind::Optim), key(1, StateKind::Optim));
        for k in [a, b, key(2, StateKind::Optim)] {
            write(&mut store, &arena, k, 1);
        }
        store.publish("").unwrap();
        drop(store);
        let data = folder.path().join("data.forebay");
        let whole = std::fs::read(&data).unwrap();
        let find = |k: Key| {
            let start: Vec<u8> = (0..200).map(|i| byte(k, 1, i)).collect();
            whole.windows(200).position(|w| w == start).unwrap()
        };
        let mut damaged = whole.clone();
        damaged[find(a) + 77] ^= 4;
        std::fs::write(&data, &damaged).unwrap();
        let mut store = Store::open(&arena, &layout(), &options).unwrap();
        let error = read(&mut store, &arena, a).unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }), "{error}");
        for word in ["Optim of section 'section 0'", "data.forebay", "not used"] {
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(holds(&mut store, &arena, b, 1), "others stay usable");
        drop(store);
        // A misdirected write: good data, with a good checksum, of another place.
        let mut moved = whole.clone();
        moved.copy_within(find(a)..find(a) + 4096, find(b));
        std::fs::write(&data, &moved).unwrap();
        let mut store = Store::open(&arena, &layout(), &options).unwrap();
        assert!(matches!(
            read(&mut store, &arena, b),
            Err(Error::Checksum { .. })
        ));
        drop(store);
        std::fs::write(&data, &whole).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&data).unwrap();
        let mut store = Store::open(&arena, &layout(), &options).unwrap();
        file.set_len(find(key(2, StateKind::Optim)) as u64 + 8192)
            .unwrap();
        let error = read(&mut store, &arena, key(2, StateKind::Optim)).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Io {
                    operation: "reading",
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn between_hold_and_rollback_nothing_happened() {
    let folder = tempfile::tempdir().unwrap();
    let arena = Arena::new(16 << 20).unwrap();
    let options = options(&[folder.path()], IoChoice::Auto);
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    let (a, b) = (key(0, StateKind::Optim), key(2, StateKind::Optim));
    write(&mut store, &arena, a, 1);
    store.publish("").unwrap();
    write(&mut store, &arena, a, 2);
    store.hold();
    write(&mut store, &arena, a, 3);
    write(&mut store, &arena, a, 4);
    write(&mut store, &arena, b, 1);
    assert!(holds(&mut store, &arena, a, 4));
    store.rollback();
    assert!(holds(&mut store, &arena, a, 2));
    assert!(!store.contains(b));
    store.hold();
    write(&mut store, &arena, a, 5);
    store.commit();
    write(&mut store, &arena, a, 6);
    assert!(holds(&mut store, &arena, a, 6));
    drop(store);
    let mut store = Store::open(&arena, &layout(), &options).unwrap();
    assert!(
        holds(&mut store, &arena, a, 1),
        "the published version was never written over"
    );
}

#[test]
fn a_store_has_one_owner_private_files_and_no_links() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let arena = Arena::new(1 << 20).unwrap();
    let options = options(&[folder.path()], IoChoice::Auto);
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    let error = Store::create(&arena, &layout(), &options).unwrap_err();
    let pid = std::process::id().to_string();
    assert!(
        matches!(&error, Error::Locked { owner, .. } if *owner == pid),
        "{error}"
    );
    store.publish("").unwrap();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().mode() & 0o777,
            0o600,
            "{:?}",
            entry.file_name()
        );
    }
    drop(store);
    assert!(matches!(
        Store::create(&arena, &layout(), &options),
        Err(Error::Exists { .. })
    ));
    let other = Layout::new("another", 78, [(key(0, StateKind::Optim), 10, "x")]);
    let error = Store::open(&arena, &other, &options).unwrap_err();
    assert!(
        error.to_string().contains("'test model', not 'another'"),
        "{error}"
    );

    let elsewhere = tempfile::tempdir().unwrap();
    let linked = tempfile::tempdir().unwrap();
    symlink(
        elsewhere.path().join("target"),
        linked.path().join("data.forebay"),
    )
    .unwrap();
    let options = Options::new([linked.path()]);
    assert!(matches!(
        Store::create(&arena, &layout(), &options),
        Err(Error::Folder { .. })
    ));
    assert!(
        !elsewhere.path().join("target").exists(),
        "nothing was written through the link"
    );
}

#[test]
fn misuse_is_an_error_and_gives_the_slab_up_to_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let arena = Arena::new(1 << 20).unwrap();
    let mut store = Store::create(
        &arena,
        &layout(),
        &options(&[folder.path()], IoChoice::Auto),
    )
    .unwrap();
    let small = arena.lease(100).unwrap();
    let error = store.write(key(0, StateKind::Optim), small).unwrap_err();
    assert!(
        error.to_string().contains("smaller than the extent"),
        "{error}"
    );
    let slab = arena.lease(5000).unwrap();
    assert!(
        store.write(key(9, StateKind::Optim), slab).is_err(),
        "not in the layout"
    );
    assert!(matches!(store.wait(), Err(Error::Misuse(_))));
    let (one, two) = (arena.lease(5000).unwrap(), arena.lease(5000).unwrap());
    store.write(key(0, StateKind::Optim), one).unwrap();
    assert!(
        store.write(key(0, StateKind::Optim), two).is_err(),
        "under way"
    );
    assert!(
        matches!(store.publish(""), Err(Error::Misuse(_))),
        "publish while under way"
    );
    store.wait().unwrap();
    assert_eq!(arena.used(), 0);
}

#[test]
fn files_and_memory_do_not_leak_over_many_openings() {
    let folder = tempfile::tempdir().unwrap();
    let arena = Arena::new(1 << 20).unwrap();
    let options = options(&[folder.path()], IoChoice::Auto);
    Store::create(&arena, &layout(), &options)
        .unwrap()
        .publish("")
        .unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let cycle = || {
        let mut store = Store::open(&arena, &layout(), &options).unwrap();
        write(&mut store, &arena, key(0, StateKind::Optim), 1);
        store.publish("").unwrap();
    };
    (0..3).for_each(|_| cycle());
    let before = open();
    (0..100).for_each(|_| cycle());
    // Other tests of this process open files too; a leak would be hundreds.
    assert!(
        open() < before + 60,
        "{} files before, {} after",
        before,
        open()
    );
    assert_eq!(arena.used(), 0);
}

const FOLDER: &str = "FOREBAY_TEST_CRASH_FOLDER";
const CRASH: &str = "killed_at_any_instant_the_old_or_the_new_generation_is_there_whole";

/// Writes version after version of everything and publishes each, until it is killed.
fn child(folder: &Path) {
    let arena = Arena::new(16 << 20).unwrap();
    let options = options(&[folder], IoChoice::Auto);
    let mut store = Store::open(&arena, &layout(), &options)
        .or_else(|_| Store::create(&arena, &layout(), &options))
        .unwrap();
    let mut version = store.meta().parse().unwrap_or(0);
    loop {
        version += 1;
        for section in 0..4 {
            write(&mut store, &arena, key(section, StateKind::Optim), version);
        }
        store.publish(&version.to_string()).unwrap();
        println!("published {version}");
    }
}

#[test]
fn killed_at_any_instant_the_old_or_the_new_generation_is_there_whole() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return child(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let arena = Arena::new(16 << 20).unwrap();
    let (mut known, mut rounds_ahead) = (0, 0);
    for round in 0..100u64 {
        // A busy machine needs longer to get somewhere.
        if round >= 20 && rounds_ahead > 5 {
            break;
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", CRASH, "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Spread over a publish and more, a little later each round.
        std::thread::sleep(std::time::Duration::from_micros(20_000 + round * 3_700));
        child.kill().unwrap();
        child.wait().unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        let said = text
            .lines()
            .filter_map(|l| l.strip_prefix("published ")?.parse().ok());
        let said: u32 = said.max().unwrap_or(known);
        let options = options(&[folder.path()], IoChoice::Auto);
        match Store::open(&arena, &layout(), &options) {
            Ok(mut store) => {
                let version: u32 = store.meta().parse().unwrap();
                assert!(
                    version == said || version == said + 1,
                    "{version} where {said} was said"
                );
                for section in 0..4 {
                    let k = key(section, StateKind::Optim);
                    assert!(holds(&mut store, &arena, k, version), "section {section}");
                }
                rounds_ahead += u32::from(version > known);
                known = version;
            }
            Err(Error::NoGeneration { .. }) => assert_eq!(said, 0),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(
        rounds_ahead > 5,
        "most rounds got somewhere: {rounds_ahead}"
    );
}
