//! The async face: extents as futures, verified, and buffers that outlive a dropped future.
#![allow(clippy::unwrap_used)]

use forebay_nvme::aio::AsyncStore;
use forebay_nvme::{Error, Key, Layout, Options, StateKind, Store, probe};
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
    Layout::new("m", 1, (0..6).map(|s| (key(s), BYTES, "s")))
}

fn filled(arena: &Arena, seed: u32) -> Slab {
    let mut slab = arena.lease(BYTES).unwrap();
    for (i, byte) in slab.iter_mut().enumerate() {
        *byte = (i as u32).wrapping_mul(seed * 2 + 1).to_le_bytes()[1];
    }
    slab
}

#[test]
fn what_one_face_writes_the_other_reads_and_damage_is_noticed() {
    if let Err(why) = probe::io_uring() {
        eprintln!("not run: {why}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new([folder.path()]);
    let arena = Arena::new(8 << 20).unwrap();
    tokio_uring::start(async {
        let store = std::rc::Rc::new(AsyncStore::create(&arena, &layout(), &options).unwrap());
        let tasks: Vec<_> = (0..6)
            .map(|s| {
                let (store, slab) = (std::rc::Rc::clone(&store), filled(&arena, s));
                tokio_uring::spawn(async move { store.write(key(s), slab).await.map(drop) })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let slab = store
            .read(key(3), arena.lease(BYTES).unwrap())
            .await
            .unwrap();
        assert_eq!(slab[..], filled(&arena, 3)[..]);
        // A key that is under way is refused; a small slab too.
        let first = store.read(key(1), arena.lease(BYTES).unwrap());
        let small = store.read(key(1), arena.lease(10).unwrap()).await;
        assert!(matches!(small, Err(Error::Misuse(_))));
        first.await.unwrap();
        store.publish("by futures").unwrap();
    });
    assert_eq!(arena.used(), 0);
    let mut store = Store::open(&arena, &layout(), &options).unwrap();
    assert_eq!(store.meta(), "by futures");
    for s in 0..6 {
        store.read(key(s), arena.lease(BYTES).unwrap()).unwrap();
        assert_eq!(store.wait().unwrap().slab[..], filled(&arena, s)[..]);
    }
    drop(store);
    // Damage, found by the other face.
    let path = folder.path().join("data.forebay");
    let mut bytes = std::fs::read(&path).unwrap();
    let start = filled(&arena, 5)[..4096].to_vec();
    let at = bytes.chunks(4096).position(|c| c == start).unwrap() * 4096;
    bytes[at + 1000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    tokio_uring::start(async {
        let store = AsyncStore::open(&arena, &layout(), &options).unwrap();
        assert_eq!(store.meta(), "by futures");
        let error = store
            .read(key(5), arena.lease(BYTES).unwrap())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }), "{error}");
        store
            .read(key(4), arena.lease(BYTES).unwrap())
            .await
            .unwrap();
    });
}

#[test]
fn a_dropped_future_leaves_its_buffer_with_the_kernel_and_the_store_usable() {
    if probe::io_uring().is_err() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new([folder.path()]);
    let arena = Arena::new(8 << 20).unwrap();
    tokio_uring::start(async {
        let store = AsyncStore::create(&arena, &layout(), &options).unwrap();
        store
            .write(key(0), filled(&arena, 1))
            .await
            .map(drop)
            .unwrap();
        for _ in 0..20 {
            let mut write = Box::pin(store.write(key(0), filled(&arena, 2)));
            // Polled once, then dropped with the write under way.
            std::future::poll_fn(|context| {
                let _ = write.as_mut().poll(context);
                std::task::Poll::Ready(())
            })
            .await;
            drop(write);
            // The version before stands.
            let slab = store
                .read(key(0), arena.lease(BYTES).unwrap())
                .await
                .unwrap();
            assert_eq!(slab[..], filled(&arena, 1)[..]);
        }
        store
            .write(key(0), filled(&arena, 3))
            .await
            .map(drop)
            .unwrap();
        store.publish("").unwrap();
        let slab = store
            .read(key(0), arena.lease(BYTES).unwrap())
            .await
            .unwrap();
        assert_eq!(slab[..], filled(&arena, 3)[..]);
    });
    assert_eq!(
        arena.used(),
        0,
        "every buffer came back once the kernel was done"
    );
}
