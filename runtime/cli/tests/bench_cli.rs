//! `forebay bench` as a user meets it: on the host device, with tiny sizes, figures are there and make
//! sense; wrong flags and a missing GPU are one line that says what to do.
#![allow(clippy::unwrap_used)]

#[path = "../../../tests/cli/mod.rs"]
mod cli;

use std::process::{Command, Output};

use cli::check_refusal;
use serde_json::Value;

fn bench(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.arg("bench").args(words).output().unwrap()
}

fn json(words: &[&str]) -> Value {
    let output = bench(words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(words: &[&str], expected: &[&str]) {
    check_refusal(&bench(words), &format!("{words:?}"), expected);
}

/// A ratio with its interval around it, each rate more than nothing and less than any machine has.
fn plausible(found: &Value) {
    for name in ["bare_bytes_per_s", "ours_bytes_per_s"] {
        let rate = found[name].as_f64().unwrap();
        assert!((1e6..1e13).contains(&rate), "{name} in {found}");
    }
    for name in ["ratio", "control"] {
        let [median, low, high] = [0, 1, 2].map(|i| found[name][i].as_f64().unwrap());
        assert!(low <= median && median <= high, "{name} in {found}");
        assert!((0.02..50.0).contains(&median), "{name} in {found}");
    }
    if let Some(target) = found["target"].as_f64() {
        let high = found["ratio"][2].as_f64().unwrap();
        assert_eq!(found["met"], high >= target, "{found}");
    }
}

const HOST: [&str; 7] = [
    "pcie", "--device", "host", "--json", "--rounds", "3", "--sizes",
];

#[test]
fn on_the_host_device_copies_of_each_size_go_each_way_beside_bare_ones() {
    let found = json(&[&HOST[..], &["64KiB,1MiB"]].concat());
    assert_eq!(found["memory_copies"], true);
    assert!(found["link"].as_str().unwrap().contains("copies of memory"));
    assert!(found["disk"].is_null());
    let outcomes = found["outcomes"].as_array().unwrap();
    let ways: Vec<_> = outcomes
        .iter()
        .map(|o| (o["size"].as_u64().unwrap(), o["way"].as_str().unwrap()))
        .collect();
    let each = |size| ["h2d", "d2h", "both"].map(|way| (size, way));
    assert_eq!(ways, [each(1 << 16), each(1 << 20)].concat());
    for outcome in outcomes {
        plausible(&outcome["found"]);
        let mebi = outcome["size"] == 1 << 20;
        assert_eq!(outcome["found"]["target"].as_f64(), mebi.then_some(0.9));
    }
}

#[test]
fn what_does_not_fit_is_left_out_and_said() {
    let found = json(&[&HOST[..], &["64KiB,512TiB"]].concat());
    assert_eq!(found["outcomes"].as_array().unwrap().len(), 3);
    assert_eq!(found["left_out"][0], 512u64 << 40);
    refused(
        &[&HOST[..], &["512TiB"]].concat(),
        &["no size fits", "--sizes"],
    );
}

#[test]
fn from_a_disk_to_the_device_beside_the_slower_of_both() {
    if forebay::nvme::probe::io_uring().is_err() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().display().to_string();
    let words = ["64KiB", "--disk", &disk, "--disk-size", "512MiB"];
    let found = json(&[&HOST[..], &words].concat());
    let chain = &found["disk"];
    plausible(&chain["found"]);
    assert_eq!(chain["found"]["target"], 0.95);
    let rate = |name: &str| chain[name].as_f64().unwrap();
    let slower = rate("bare_disk_bytes_per_s").min(rate("bare_h2d_bytes_per_s"));
    let bare = chain["found"]["bare_bytes_per_s"].as_f64().unwrap();
    assert!((0.3..3.0).contains(&(bare / slower)), "{chain}");
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "it leaves nothing"
    );
}

#[test]
fn adamw_beside_a_bare_pass_over_its_memory() {
    let words = [
        "adam",
        "--json",
        "--rounds",
        "3",
        "--millions",
        "1,900000",
        "--threads",
        "2",
    ];
    let found = json(&words);
    let outcomes = found["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0]["parameters"], 1_000_000);
    plausible(&outcomes[0]);
    assert_eq!(found["left_out"][0].as_u64(), Some(900_000_000_000));
    refused(&["adam", "--millions", "0"], &["--millions 0", "from 1"]);
}

#[test]
fn adamw_on_bound_threads_beside_free_ones() {
    for bind in ["on", "both", "off"] {
        let words = [
            "adam",
            "--json",
            "--rounds",
            "3",
            "--millions",
            "1",
            "--threads",
            "1",
        ];
        let found = json(&[&words[..], &["--bind", bind]].concat());
        let outcome = &found["outcomes"][0];
        plausible(outcome);
        let binding = found["binding"].as_str().unwrap();
        assert_eq!(
            binding.starts_with("bound to CPUs "),
            bind != "off",
            "{binding}"
        );
        assert_eq!(
            outcome["bound_to_free"].is_array(),
            bind == "both",
            "{outcome}"
        );
    }
    let wrong = bench(&["adam", "--bind", "maybe"]);
    let error = String::from_utf8_lossy(&wrong.stderr);
    assert!(
        !wrong.status.success() && error.contains("off, on or both"),
        "{error}"
    );
}

#[test]
fn updates_with_a_log_beside_the_same_pass() {
    let words = [
        "adam",
        "--json",
        "--rounds",
        "3",
        "--millions",
        "1",
        "--ahead",
    ];
    let found = json(&words);
    plausible(&found["outcomes"][0]);
}

#[test]
fn an_offloaded_step_beside_its_ceilings() {
    let base = [
        "step", "--json", "--device", "host", "--batch", "2", "--steps", "3",
    ];
    for clips in ["never", "always"] {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().to_str().unwrap();
        let found = json(&[&base[..], &["--clips", clips, "--disk", disk]].concat());
        let seconds = |value: &serde_json::Value| value.as_f64().unwrap();
        let (ours, resident) = (&found["offloaded"], &found["resident"]);
        for reached in [ours, resident] {
            assert!(seconds(&reached["step_s"]) > 0.0, "{found}");
            assert!(seconds(&reached["forward_backward_s"]) > 0.0, "{found}");
        }
        let peak = |reached: &serde_json::Value| reached["device_peak_bytes"].as_u64().unwrap();
        assert!(peak(ours) < peak(resident), "{found}");
        assert!(
            seconds(&found["bound_s"]) >= seconds(&resident["step_s"]),
            "{found}"
        );
        assert!(seconds(&found["traffic"][0]["together_s"]) > 0.0, "{found}");
        let (steps, ahead) = (&ours["steps"], &ours["ahead_steps"]);
        let undone = ours["undone_steps"].as_u64().unwrap();
        match clips {
            "never" => assert!(steps == ahead && undone == 0, "{found}"),
            _ => assert!(Some(undone) == ahead.as_u64() && undone > 0, "{found}"),
        }
        // The folder of its own is gone.
        assert_eq!(std::fs::read_dir(disk).unwrap().count(), 0);
    }
    let found = json(&[&base[..], &["--clips", "always", "--delayed-update"]].concat());
    assert_eq!(found["updates"], "delayed by a step (approximate)");
    let ours = &found["offloaded"];
    assert!(ours["step_s"].as_f64().unwrap() > 0.0 && ours["ahead_steps"] == 0);
    assert!(!found["bound_by"].as_str().unwrap().contains("backward"));
    refused(
        &["step", "--preset", "2b", "--device", "host"],
        &["2b", "1.3b"],
    );
}

#[test]
fn wrong_flags_say_what_would_be_right() {
    refused(&[&HOST[..], &["5000"]].concat(), &["--sizes", "4KiB"]);
    refused(
        &[&HOST[..], &["64KiB", "--disk", "/nowhere"]].concat(),
        &["/nowhere"],
    );
    let words = ["64KiB", "--disk", ".", "--disk-size", "1MiB"];
    refused(&[&HOST[..], &words].concat(), &["--disk-size", "512MiB"]);
    // Clap's own errors have a line more.
    for words in [
        ["pcie", "--sizes", "many"],
        ["pcie", "--device", "tpu"],
        ["pcie", "--rounds", "1"],
    ] {
        let output = bench(&words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains(words[1]),
            "{error}"
        );
    }
    refused(&["kernels", "--seq", "1000"], &["whole sequences"]);
}

#[test]
fn without_a_gpu_there_are_no_kernels_to_measure_and_it_says_why() {
    if forebay::DeviceChoice::Cuda.target(1).is_ok() {
        return;
    }
    refused(&["kernels"], &["cannot measure kernels", "CUDA"]);
    refused(&["pcie", "--device", "cuda"], &["no cuda device"]);
}
