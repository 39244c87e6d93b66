//! One fault at a time, where it was planned: at every operation, at a sync, in a superblock, on a full disk.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forebay_nvme::sim::{Fault, SimDisk};
use forebay_nvme::{Copies, Error, Key, Layout, Options, StateKind, Store};
use forebay_pinned::Arena;

use crate::{fill, keys, layout};

/// Writes two generations and reads all back. Ends at the first error.
fn short_run(disk: &SimDisk) -> Result<(), Error> {
    let options = Options {
        medium: Arc::new(disk.clone()),
        stall: Duration::from_secs(5),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let durable = || {
        keys()
            .into_iter()
            .filter(|(k, _)| k.state != StateKind::Grad)
    };
    let mut store = Store::create(&arena, &layout(), &options)?;
    for version in 1..=2 {
        for (key, bytes) in durable() {
            let mut slab = arena.lease(bytes).unwrap();
            fill(key, version, &mut slab);
            store.write(key, slab)?;
            store.wait()?;
        }
        store.publish(&version.to_string())?;
    }
    drop(store);
    let mut store = Store::open(&arena, &layout(), &options)?;
    assert_eq!(store.meta(), "2");
    for (key, bytes) in durable() {
        store.read(key, arena.lease(bytes).unwrap())?;
        let slab = store.wait()?.slab;
        let mut right = vec![0; bytes as usize];
        fill(key, 2, &mut right);
        assert!(right[..] == slab[..], "{key:?}");
    }
    Ok(())
}

#[test]
fn one_fault_at_every_operation_is_an_error_or_does_not_matter_and_loses_nothing() {
    let whole = SimDisk::new(1);
    short_run(&whole).unwrap();
    let operations = whole.operations();
    for fault in Fault::ALL {
        let (mut failed, mut passed) = (0, 0);
        for at in 0..operations {
            let disk = SimDisk::new(1);
            disk.schedule(at, fault);
            let result = short_run(&disk);
            let met = !disk.happened().is_empty();
            match (fault, &result) {
                (Fault::Short | Fault::Interrupted, result) => {
                    assert!(result.is_ok(), "{fault:?} at {at}: {result:?}");
                }
                (_, Ok(())) => passed += u64::from(met),
                (_, Err(_)) => failed += 1,
            }
            // What is there afterwards is the first generation, the second, or none yet.
            disk.heal();
            match Store::peek(Path::new("disk"), &disk) {
                Ok((generation, text)) => {
                    assert_eq!(generation.to_string(), text);
                    verify(&disk, generation as u32, fault, at);
                }
                Err(Error::NoGeneration { .. }) => assert!(result.is_err()),
                Err(other) => panic!("{fault:?} at {at}: {other}"),
            }
        }
        println!("{fault:?}: {failed} errors, {passed} without harm, of {operations} operations");
        if !matches!(fault, Fault::Short | Fault::Interrupted) {
            assert!(failed > 0, "{fault:?} is never noticed");
        }
    }
}

fn verify(disk: &SimDisk, version: u32, fault: Fault, at: u64) {
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::open(&arena, &layout(), &options).unwrap();
    for (key, bytes) in keys()
        .into_iter()
        .filter(|(k, _)| k.state != StateKind::Grad)
    {
        store.read(key, arena.lease(bytes).unwrap()).unwrap();
        match store.wait() {
            Ok(done) => {
                let mut right = vec![0; bytes as usize];
                fill(key, version, &mut right);
                assert!(right[..] == done.slab[..], "{fault:?} at {at}: {key:?}");
            }
            // The disk lied about a write: that cannot be undone, only noticed.
            Err(Error::Checksum { .. }) => {
                assert!(
                    matches!(fault, Fault::Lost | Fault::Misdirected),
                    "{fault:?} at {at}"
                );
            }
            Err(other) => panic!("{fault:?} at {at}: {other}"),
        }
    }
}

#[test]
fn a_second_sync_after_a_failed_one_is_not_believed() {
    let disk = SimDisk::new(3);
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    let (key, bytes) = keys()[0];
    let mut slab = arena.lease(bytes).unwrap();
    fill(key, 1, &mut slab);
    store.write(key, slab).unwrap();
    store.wait().unwrap();
    // Two copies of the map, written and read again; then the sync.
    disk.schedule(disk.operations() + 4, Fault::Error);
    let error = store.publish("1").unwrap_err();
    assert!(error.to_string().starts_with("syncing"), "{error}");
    assert!(matches!(store.publish("1"), Err(Error::Failed(_))));
    drop(store);
    disk.power_cut();
    let gone = Store::open(&arena, &layout(), &options).unwrap_err();
    assert!(matches!(gone, Error::NoGeneration { .. }), "{gone}");
}

#[test]
fn superblocks_and_maps_have_copies_and_a_stale_generation_is_no_substitute() {
    let place = Path::new("disk/data.forebay");
    for (rotten, opens) in [
        (vec![4096u64 + 8], Some(1)),
        (vec![4096 + 8, 4096 + 32768 + 8], None),
        // It may have been generation 2.
        (vec![0, 32768], None),
        (vec![4096], Some(1)),
    ] {
        let disk = SimDisk::new(9);
        let options = Options {
            medium: Arc::new(disk.clone()),
            ..Options::new(["disk"])
        };
        let arena = Arena::new(2 << 20).unwrap();
        let mut store = Store::create(&arena, &layout(), &options).unwrap();
        store.publish("1").unwrap();
        drop(store);
        // Generation 1 has the second block of each half, the unpublished generation 0 the first.
        rotten.iter().for_each(|byte| disk.rot(place, *byte, 3));
        match (Store::open(&arena, &layout(), &options), opens) {
            (Ok(store), Some(generation)) => assert_eq!(store.generation(), generation),
            (Err(Error::Damaged { .. }), None) => {
                let error = Store::create(&arena, &layout(), &options).unwrap_err();
                assert!(
                    matches!(error, Error::Damaged { .. }),
                    "not written over: {error}"
                );
            }
            (result, _) => panic!("{rotten:?}: {result:?}"),
        }
    }
    // Both copies of the newest map: the generation before is whole, and is not taken for it.
    let disk = SimDisk::new(9);
    let options = Options {
        medium: Arc::new(disk.clone()),
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let mut store = Store::create(&arena, &layout(), &options).unwrap();
    store.publish("first").unwrap();
    store.publish("second").unwrap();
    drop(store);
    let contents = disk.contents(place).unwrap();
    let text = b"\"meta\":\"second\"";
    let found: Vec<usize> = (0..contents.len() - text.len())
        .filter(|i| contents[*i..].starts_with(text))
        .collect();
    assert_eq!(found.len(), 2, "two copies");
    disk.rot(place, found[0] as u64, 0);
    assert_eq!(
        Store::open(&arena, &layout(), &options).unwrap().meta(),
        "second"
    );
    disk.rot(place, found[1] as u64, 0);
    let error = Store::open(&arena, &layout(), &options).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
}

#[test]
fn a_full_disk_is_an_error_that_loses_nothing() {
    let disk = SimDisk::new(4);
    disk.set_capacity(1 << 20);
    let options = Options {
        medium: Arc::new(disk.clone()),
        copies: Copies::One,
        slack: 1,
        ..Options::new(["disk"])
    };
    let arena = Arena::new(2 << 20).unwrap();
    let bytes = 80_000;
    let key = |section| Key {
        section,
        state: StateKind::Optim,
        part: 0,
    };
    let layout = Layout::new("full", 6, (0..10).map(|i| (key(i), bytes, "s")));
    let two = Options {
        copies: Copies::Two,
        ..options.clone()
    };
    let error = Store::create(&arena, &layout, &two).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("--publish end or never needs"), "{text}");
    let mut store = Store::create(&arena, &layout, &options).unwrap();
    // One copy of each: after a generation stands there is room for some new versions, not for all.
    let mut full = 0;
    for version in 1..=3 {
        for section in 0..10 {
            let mut slab = arena.lease(bytes).unwrap();
            fill(key(section), version, &mut slab);
            match store.write(key(section), slab) {
                Ok(()) => drop(store.wait().unwrap()),
                Err(Error::Space { .. }) => full += 1,
                Err(other) => panic!("{other}"),
            }
        }
        if version == 1 {
            assert_eq!(full, 0);
            store.publish("1").unwrap();
        }
    }
    assert!(full > 5, "the disk was full");
    drop(store);
    let error = Store::open(&arena, &layout, &options).unwrap_err();
    assert!(
        matches!(error, Error::Space { .. }),
        "it says so at once: {error}"
    );
    disk.set_capacity(2 << 20);
    let mut store = Store::open(&arena, &layout, &options).unwrap();
    for section in 0..10 {
        store
            .read(key(section), arena.lease(bytes).unwrap())
            .unwrap();
        let mut right = vec![0; bytes as usize];
        fill(key(section), 1, &mut right);
        assert!(right[..] == store.wait().unwrap().slab[..]);
    }
}
