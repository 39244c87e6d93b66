use super::super::superblock::HEADER;
use super::*;

fn layout(extents: u32) -> Layout {
    let items = (0..extents).map(|i| {
        let state = [StateKind::Param, StateKind::Optim, StateKind::Grad][i as usize % 3];
        let key = Key {
            section: i,
            state,
            part: 0,
        };
        (key, 1000 + 5000 * u64::from(i % 7), "s")
    });
    Layout::new("m", 0, items)
}

fn options(copies: Copies, undo: bool) -> Options {
    Options {
        copies,
        undo,
        ..Options::new(["a"])
    }
}

/// Every version that is there, and every free place: none may overlap.
fn check(catalog: &Catalog) {
    let mut runs: Vec<(u32, u64, u64)> = Vec::new();
    for entry in &catalog.entries {
        let bytes = catalog.classes[entry.class].bytes;
        let versions = [
            entry.current,
            entry.published,
            entry.held.flatten(),
            entry.under_way,
        ];
        let mut offsets: Vec<u64> = versions.iter().flatten().map(|e| e.offset).collect();
        offsets.sort_unstable();
        offsets.dedup();
        runs.extend(offsets.iter().map(|o| (entry.file, *o, bytes)));
    }
    for class in &catalog.classes {
        runs.extend(class.free.iter().map(|o| (class.file, *o, class.bytes)));
    }
    runs.extend(catalog.maps.iter().map(|m| (m.file, m.offset, m.bytes)));
    let foreign = catalog.foreign.iter();
    runs.extend(foreign.map(|e| (e.file, e.offset, padded(e.bytes()))));
    runs.sort_unstable();
    for pair in runs.windows(2) {
        assert!(
            pair[0].0 < pair[1].0 || pair[0].1 + pair[0].2 <= pair[1].1,
            "{pair:?}"
        );
    }
    for (file, offset, bytes) in runs {
        assert!(offset >= HEADER && offset + bytes <= catalog.end(file as usize));
    }
}

#[test]
fn versions_never_overlap_and_what_must_stay_is_never_written_over() {
    for (copies, undo) in [
        (Copies::Two, false),
        (Copies::Two, true),
        (Copies::One, false),
        (Copies::One, true),
    ] {
        let mut catalog = Catalog::new(1, &layout(30), None, 2, &options(copies, undo));
        let length = catalog.end(0) + catalog.end(1);
        check(&catalog);
        let mut seed = 3u64;
        let mut next = move |n: usize| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        let mut held = false;
        for _ in 0..5000 {
            let index = next(30);
            match next(40) {
                0 if undo && !held => {
                    catalog.hold();
                    held = true;
                }
                1 if held => {
                    catalog.commit();
                    held = false;
                }
                2 if held => {
                    catalog.rollback();
                    held = false;
                }
                3 if !held => {
                    let maps = catalog.take_maps(3000, 2);
                    catalog.published(maps);
                }
                4 => catalog.end_write(index, None),
                _ => {
                    let before = catalog.entries[index];
                    let target = catalog.begin_write(index, true);
                    let kept = [before.published, before.held.flatten()];
                    assert!(kept.iter().flatten().all(|e| e.offset != target.offset));
                    check(&catalog);
                    let sum = (next(8) > 0).then_some(7);
                    catalog.end_write(index, sum);
                }
            }
            check(&catalog);
        }
        if copies == Copies::Two {
            let maps = 2 * 2 * 2 * 4096;
            assert!(
                catalog.end(0) + catalog.end(1) <= length + maps,
                "places were enough"
            );
        }
    }
}

#[test]
fn a_generation_of_another_layout_keeps_its_places_until_the_next() {
    let mut catalog = Catalog::new(1, &layout(30), None, 2, &options(Copies::Two, false));
    for index in 0..30 {
        catalog.begin_write(index, true);
        catalog.end_write(index, Some(index as u64));
    }
    let maps = catalog.take_maps(3000, 2);
    let map = Map {
        generation: 1,
        model: String::new(),
        fingerprint: 0,
        created: 0,
        published: 0,
        names: Vec::new(),
        extents: catalog.extents(),
        maps,
        ledger: Default::default(),
        meta: String::new(),
    };
    // Half of the keys, the rest unknown: nothing of the generation is given away.
    let mut catalog = Catalog::new(1, &layout(15), Some(&map), 2, &options(Copies::Two, true));
    check(&catalog);
    assert_eq!(
        catalog.foreign.len(),
        10,
        "those of 15 to 29 that are no gradients"
    );
    for index in 0..15 {
        catalog.begin_write(index, true);
        catalog.end_write(index, Some(1));
        check(&catalog);
    }
    let end = catalog.end(0) + catalog.end(1);
    let maps = catalog.take_maps(3000, 2);
    catalog.published(maps);
    check(&catalog);
    assert!(catalog.foreign.is_empty());
    let again = catalog.take_maps(3000, 2);
    assert!(
        end + 8 * 4096 >= catalog.end(0) + catalog.end(1),
        "{again:?} fit in what was freed"
    );
}

#[test]
fn extents_are_spread_in_proportion_to_the_rates() {
    let options = Options {
        rates: vec![3.0, 1.0],
        ..options(Copies::Two, false)
    };
    let catalog = Catalog::new(1, &layout(300), None, 2, &options);
    let share = catalog.end(0) as f64 / (catalog.end(0) + catalog.end(1)) as f64;
    assert!((0.73..0.77).contains(&share), "{share}");
}

#[test]
fn a_write_that_did_not_happen_changes_nothing() {
    for published in [false, true] {
        let mut catalog = Catalog::new(1, &layout(3), None, 1, &options(Copies::Two, false));
        // The third is a gradient: one place, written over.
        for index in 0..3 {
            for round in 0..3 {
                catalog.begin_write(index, true);
                catalog.end_write(index, Some(round));
                if published {
                    catalog.published(Vec::new());
                }
            }
            let before = catalog.entries[index].current;
            let free = catalog.classes[catalog.entries[index].class].free.len();
            catalog.begin_write(index, true);
            catalog.undo_write(index);
            assert!(before.is_some());
            assert_eq!(catalog.entries[index].current, before, "key {index}");
            assert_eq!(
                catalog.classes[catalog.entries[index].class].free.len(),
                free
            );
            check(&catalog);
        }
    }
}
