//! The store as a user meets it: `forebay inspect` and `snapshot`, several disks, ways of publishing,
//! and every way in which a store can be wrong, as one line that says what to do.
#![allow(clippy::unwrap_used)]

#[path = "../../../tests/cli/mod.rs"]
mod cli;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cli::{Place, check_refusal, flip, losses, newest_map, train};

fn forebay(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args(words)
        .output()
        .unwrap()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn said(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What `forebay` says when it refuses: one line at the end, nothing else on standard error.
fn refused(words: &[&str], expected: &[&str]) {
    let output = forebay(words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{words:?} passed");
    assert_eq!(error.trim_end().lines().count(), 1, "{words:?}: {error}");
    for word in expected {
        assert!(
            error.contains(word),
            "{words:?} says: {error} (no '{word}')"
        );
    }
}

#[test]
fn inspect_lists_and_checks_and_names_what_is_damaged() {
    let place = Place::new();
    let disk = text(&place.path("disk"));
    said(&place.run(&["--json", "--placement", "disk"]));
    let listed = said(&forebay(&["inspect", &disk]));
    for word in [
        "generation 2 of",
        "layers.0",
        "Optim",
        "Param",
        "in its life",
        "open for",
    ] {
        assert!(listed.contains(word), "no '{word}' in:\n{listed}");
    }
    assert!(
        !listed.contains("  ok") && listed.contains("  -"),
        "nothing was checked:\n{listed}"
    );
    let checked = said(&forebay(&["inspect", &disk, "--verify", "--tbw", "600TB"]));
    assert!(
        checked.contains("  ok") && checked.contains("days of such use"),
        "{checked}"
    );
    let json = said(&forebay(&["inspect", &disk, "--verify", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let extents = json["extents"].as_array().unwrap();
    assert!(extents.len() > 20 && extents.iter().all(|e| e["check"] == "ok"));
    let sum: u64 = extents
        .iter()
        .filter(|e| e["state"] == "Optim")
        .map(|e| e["elements"].as_u64().unwrap())
        .sum();
    let bytes: u64 = extents
        .iter()
        .filter(|e| e["state"] == "Optim")
        .map(|e| e["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(bytes, 12 * sum);

    let data = place.path("disk/data.forebay");
    let (maps, ends) = newest_map(&data);
    flip(&data, &[ends[1] + 5], || {
        let output = forebay(&["inspect", &disk, "--verify"]);
        let table = String::from_utf8_lossy(&output.stdout);
        assert!(table.contains("DAMAGED part"), "{table}");
        refused(
            &["inspect", &disk, "--verify"],
            &["1 of", "are damaged", "section '", "snapshot"],
        );
        said(&forebay(&["inspect", &disk]));
        let copy = text(&place.path("copy"));
        refused(
            &["snapshot", &disk, "--to", &copy],
            &["checksum", "data.forebay"],
        );
        refused(&["inspect", &copy], &["no published generation"]);
    });
    flip(&data, &maps, || {
        refused(&["inspect", &disk], &["data.forebay", "map is damaged"])
    });
    flip(&data, &[8], || {
        // One of four: its copy is whole.
        let listed = said(&forebay(&["inspect", &disk]));
        assert!(listed.contains("1 superblocks are damaged"), "{listed}");
    });
    said(&forebay(&["inspect", &disk, "--verify"]));
}

#[test]
fn what_is_no_store_is_said_to_be_none() {
    let place = Place::new();
    let disk = text(&place.path("disk"));
    refused(
        &["inspect", "/nowhere/at/all"],
        &["/nowhere/at/all", "No such file"],
    );
    refused(&["inspect", &disk], &[&disk, "no published generation"]);
    let data = place.path("disk/data.forebay");
    std::fs::write(&data, vec![7; 1 << 17]).unwrap();
    refused(
        &["inspect", &disk],
        &[
            "data.forebay",
            "every superblock is damaged, or it is not a store",
        ],
    );
    place.refused(&[], &["data.forebay", "not a store"]);
    assert_eq!(
        std::fs::read(&data).unwrap(),
        vec![7; 1 << 17],
        "nothing was written over"
    );
    std::fs::remove_file(&data).unwrap();

    // The first format, and one that is not there yet.
    std::fs::write(
        place.path("disk/generation.forebay"),
        "forebay generation 1 0\n{}\n",
    )
    .unwrap();
    refused(&["inspect", &disk], &["format 1", "reads format 2"]);
    std::fs::remove_file(place.path("disk/generation.forebay")).unwrap();
    said(&place.run(&["--json"]));
    newer(&data);
    refused(&["inspect", &disk], &["format 3", "reads format 2"]);
    let resumed = place.bare(&["--resume", "--json"]);
    check_refusal(&resumed, "a newer format", &["format 3", "reads format 2"]);
}

/// Makes a newer format of every superblock.
fn newer(data: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(data)
        .unwrap();
    for at in [0, 4096, 32768, 36864] {
        let mut block = vec![0; 4096];
        file.read_exact_at(&mut block, at).unwrap();
        block[8] = 3;
        let checksum = twox_hash::XxHash3_64::oneshot(&block[..4088]);
        block[4088..].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&block, at).unwrap();
    }
}

#[test]
fn a_snapshot_is_a_store_to_resume_from() {
    let place = Place::new();
    let (disk, copy) = (text(&place.path("disk")), place.path("deep/copy"));
    said(&place.run(&["--json", "--stop-after", "2"]));
    let kept = said(&forebay(&["snapshot", &disk, "--to", &text(&copy)]));
    assert!(
        kept.starts_with("generation ") && kept.contains("of states"),
        "{kept}"
    );
    let rest = losses(&place.bare(&["--json", "--resume"]));
    let again = losses(&place.bare(&["--json", "--resume", "--disk", &text(&copy)]));
    assert_eq!(rest, again);
    assert_eq!(rest.len(), 2);
    refused(
        &["snapshot", &disk, "--to", &text(&copy)],
        &["already holds"],
    );
    refused(
        &[
            "snapshot",
            &disk,
            "--to",
            &text(&copy),
            &text(&place.path("b")),
        ],
        &["1 folders", "not 2"],
    );
    // While somebody owns it there is no looking away.
    let lock = std::fs::File::open(place.path("disk/store.lock")).unwrap();
    lock.lock().unwrap();
    for words in [
        vec!["snapshot", &disk, "--to", "x"],
        vec!["inspect", &disk, "--verify"],
    ] {
        let mut words: Vec<String> = words.into_iter().map(String::from).collect();
        if words[0] == "snapshot" {
            words[3] = text(&place.path("x"));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        refused(&words, &["in use by process", "stop it"]);
    }
    said(&forebay(&["inspect", &disk]));
}

#[test]
fn several_disks_are_one_store_in_any_order_and_each_is_missed() {
    let place = Place::new();
    let disks: Vec<PathBuf> = (0..3).map(|i| place.path(&format!("disk{i}"))).collect();
    disks.iter().for_each(|d| std::fs::create_dir(d).unwrap());
    let flags = |order: &[usize], more: &[&str]| {
        let mut flags: Vec<String> = more.iter().map(ToString::to_string).collect();
        for index in order {
            flags.extend(["--disk".into(), text(&disks[*index])]);
        }
        flags
    };
    let run = |order: &[usize], more: &[&str]| {
        let flags = flags(order, more);
        place.bare(&flags.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let small = ["--json", "--steps", "4", "--batch", "2", "--seq", "32"];
    let whole = losses(&place.run(&["--json"]));
    let first = losses(&run(
        &[0, 1, 2],
        &[&small[..], &["--stop-after", "2"]].concat(),
    ));
    for disk in &disks {
        let bytes = std::fs::metadata(disk.join("data.forebay")).unwrap().len();
        assert!(bytes > 1 << 20, "{bytes} on {disk:?}");
    }
    let second = losses(&run(&[2, 0, 1], &["--json", "--resume"]));
    assert_eq!([first, second].concat(), whole);
    let output = run(&[0, 2], &["--resume"]);
    check_refusal(
        &output,
        "one missing",
        &["spread over 3 folders and 2 were given", "--disk"],
    );
    let output = run(&[0, 1, 1], &["--resume"]);
    check_refusal(&output, "one twice", &["disk1", "given twice"]);
    let all: Vec<String> = disks.iter().map(|d| text(d)).collect();
    said(&forebay(&[
        "inspect", &all[1], &all[2], &all[0], "--verify",
    ]));
    refused(
        &["inspect", &all[1], "--verify"],
        &["3 folders", "give each"],
    );
    said(&forebay(&["inspect", &all[1]]));
    // One disk fails: the error names its file.
    std::fs::OpenOptions::new()
        .write(true)
        .open(disks[1].join("data.forebay"))
        .unwrap()
        .set_len(70_000)
        .unwrap();
    let output = run(&[0, 1, 2], &["--resume", "--stop-after", "1"]);
    check_refusal(&output, "one cut", &["disk1/data.forebay"]);
    // A part of another store.
    std::fs::remove_dir_all(&disks[1]).unwrap();
    std::fs::create_dir(&disks[1]).unwrap();
    std::fs::copy(
        place.path("disk/data.forebay"),
        disks[1].join("data.forebay"),
    )
    .unwrap();
    let output = run(&[0, 1, 2], &["--resume"]);
    check_refusal(&output, "another's", &["disk1", "belongs to another store"]);
}

#[test]
fn each_way_of_publishing_says_what_it_costs_and_does_what_it_says() {
    let place = Place::new();
    let whole = losses(&place.run(&["--json"]));
    for (name, words, survives, says) in [
        ("often", &["every", "2"][..], true, "publish every 2 steps"),
        ("end", &["end"], true, "publish at the end"),
        ("never", &["never"], false, "NOT crash-safe"),
    ] {
        let disk = place.path(name);
        std::fs::create_dir(&disk).unwrap();
        let disk = text(&disk);
        let mut flags = vec!["--disk", &disk, "--tbw", "600TB", "--publish"];
        flags.extend(words);
        let output = place.run(&flags);
        let table = said(&output);
        for word in [says, "disk ledger", "lasts"] {
            assert!(table.contains(word), "{name}: no '{word}' in\n{table}");
        }
        let look = forebay(&["inspect", &disk]);
        assert_eq!(look.status.success(), survives, "{name}");
        // Anew in the same folder, where there is nothing to lose.
        if !survives {
            flags.push("--json");
            assert_eq!(losses(&place.run(&flags)), whole);
        }
    }
    for (words, expected) in [
        (&["every", "0"][..], "every N"),
        (&["sometimes"], "every N"),
        (&["every", "x"], "a number of steps"),
    ] {
        let mut flags = vec!["--publish"];
        flags.extend(words);
        place.refused(&flags, &["--publish", expected]);
    }
    let output = place.bare(&["--resume", "--publish", "never"]);
    check_refusal(
        &output,
        "resume and never",
        &["write over", "--publish end", "snapshot"],
    );
    let again = place.bare(&["--resume", "--steps", "6", "--publish", "end", "--json"]);
    assert_eq!(losses(&again).len(), 2);
}

#[test]
fn a_limit_on_file_sizes_is_an_error_before_the_run() {
    let place = Place::new();
    let output = Command::new("prlimit")
        .arg("--fsize=9000000")
        .arg(train().get_program())
        .args(["--steps", "2", "--data"])
        .arg(place.path("text.txt"))
        .arg("--disk")
        .arg(place.path("disk"))
        .output()
        .unwrap();
    check_refusal(&output, "a file size limit", &["too large", "--disk"]);
}

#[test]
fn bench_measures_a_disk_and_refuses_what_makes_no_sense() {
    let place = Place::new();
    let disk = text(&place.path("disk"));
    for (words, expected) in [
        (&["--block", "100KiB"][..], "give 256KiB"),
        (&["--size", "1MiB"], "at least 256MiB"),
        (&["--mix", "0:0"], "READS:WRITES"),
        (&["--block", "4MiB", "--depth", "64"], "128MiB"),
        (&["--disk", "/nowhere"], "/nowhere"),
    ] {
        let mut all = vec!["bench", "nvme", "--disk", &disk];
        if words[0] == "--disk" {
            all.truncate(2);
        }
        all.extend(words);
        let output = forebay(&all);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains(expected),
            "{words:?}: {error}"
        );
    }
    if forebay::nvme::probe::io_uring().is_err() {
        return;
    }
    let words = [
        "bench", "nvme", "--disk", &disk, "--size", "256MiB", "--rounds", "3",
    ];
    let mut bench = Command::new(env!("CARGO_BIN_EXE_forebay"));
    bench
        .args(words)
        .args(["--depth", "8", "--block", "1MiB", "--json"]);
    let output = bench
        .env("FOREBAY_PROFILES", place.path("profiles"))
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_str(&said(&output)).unwrap();
    let outcomes = json["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 3);
    for outcome in outcomes {
        assert!(outcome["ratio"][0].as_f64().unwrap() > 0.05, "{outcome}");
        assert!(outcome["store_cpu_s_per_gb"].as_f64().unwrap() > 0.0);
    }
    assert!(
        !place.path("profiles").exists(),
        "block and depth were given: nothing was found"
    );
    assert_eq!(
        std::fs::read_dir(place.path("disk")).unwrap().count(),
        0,
        "nothing is left"
    );
}
