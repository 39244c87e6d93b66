//! `train` as a user meets it: the main job end to end, and every bad input as one line that says what
//! to do.
#![allow(clippy::unwrap_used)]

mod cli;

use std::path::PathBuf;
use std::process::Command;

use cli::{Place, check_refusal, flip, losses, newest_map, train};

#[test]
fn json_gives_a_line_a_step_and_a_summary_with_peaks_within_budgets() {
    let place = Place::new();
    let output = place.run(&["--json"]);
    assert_eq!(losses(&output).len(), 4);
    let text = String::from_utf8_lossy(&output.stdout);
    let step: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let bits = u32::from_str_radix(step["loss_bits"].as_str().unwrap(), 16).unwrap();
    assert_eq!(
        f64::from(f32::from_bits(bits)),
        step["loss"].as_f64().unwrap()
    );
    assert!(step["step"] == 0 && step["tokens_per_s"].is_f64() && step["step_s"].is_f64());
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let summary = &last["summary"];
    let number = |key: &str| {
        summary[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{key}: {summary}"))
    };
    for key in [
        "disk_bytes",
        "read_bytes",
        "written_bytes",
        "h2d_bytes",
        "d2h_bytes",
        "step_s",
        "bound_s",
        "params",
    ] {
        assert!(number(key) > 0.0, "{key}");
    }
    assert!(number("device_peak_bytes") <= number("device_budget_bytes"));
    assert!(number("pinned_peak_bytes") <= number("pinned_budget_bytes"));
    assert!(summary["device"].is_string() && summary["bound_by"].is_string());
}

#[test]
fn a_run_in_pieces_under_other_placements_prints_the_bits_of_the_whole() {
    let place = Place::new();
    let whole = losses(&place.run(&["--json", "--placement", "resident"]));
    std::fs::remove_dir_all(place.path("disk")).unwrap();
    std::fs::create_dir(place.path("disk")).unwrap();
    let mut pieces = losses(&place.run(&["--json", "--stop-after", "1"]));
    let more = [
        "--json",
        "--resume",
        "--stop-after",
        "2",
        "--placement",
        "disk",
        "--threads",
        "1",
    ];
    pieces.extend(losses(&place.bare(&more)));
    pieces.extend(losses(&place.bare(&[
        "--json",
        "--resume",
        "--lookahead",
        "0",
    ])));
    assert_eq!(pieces, whole);
}

#[test]
fn delayed_updates_are_named_approximate_and_a_resumed_run_goes_on_with_them() {
    let place = Place::new();
    let summary = |output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["summary"]["updates"].as_str().unwrap().to_owned()
    };
    let fresh = |flags: &[&str]| {
        std::fs::remove_dir_all(place.path("disk")).unwrap();
        std::fs::create_dir(place.path("disk")).unwrap();
        place.run(flags)
    };
    let exact = fresh(&["--json"]);
    let every = ["--json", "--delayed-update", "--publish", "every", "2"];
    let whole = fresh(&every);
    assert_eq!(summary(&exact), "exact");
    assert_eq!(summary(&whole), "delayed by a step (approximate)");
    let (exact, whole) = (losses(&exact), losses(&whole));
    assert_eq!(exact[0], whole[0]);
    assert_ne!(exact[1], whole[1], "the first gradient is not applied yet");
    let mut pieces = losses(&fresh(&["--json", "--delayed-update", "--stop-after", "2"]));
    let rest = place.bare(&["--json", "--resume", "--placement", "pinned"]);
    assert!(summary(&rest).contains("approximate"));
    pieces.extend(losses(&rest));
    assert_eq!(pieces, whole);
    let words = fresh(&["--delayed-update"]);
    let words = String::from_utf8_lossy(&words.stdout).into_owned();
    assert_eq!(words.matches("delayed by a step (approximate)").count(), 2);
}

#[test]
fn in_fp16_it_says_the_scale_of_the_loss_and_a_resumed_run_keeps_its_own() {
    let place = Place::new();
    let json = |output: &std::process::Output| -> Vec<serde_json::Value> {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap()
    };
    let fp16 = ["--json", "--dtype", "fp16"];
    let lines = json(&place.run(&[&fp16[..], &["--stop-after", "2"]].concat()));
    let (step, summary) = (&lines[0], &lines.last().unwrap()["summary"]);
    assert_eq!(summary["dtype"], "fp16");
    assert!(step["loss_scale"].is_f64() && step["skipped_steps"].is_u64());
    let scale = summary["loss_scale"].as_f64().unwrap();
    let halved = summary["skipped_steps"].as_f64().unwrap();
    assert_eq!(scale, 65536.0 * 0.5f64.powf(halved));
    let lines = json(&place.bare(&["--json", "--resume", "--stop-after", "1"]));
    let left = &lines.last().unwrap()["summary"];
    let more = left["skipped_steps"].as_f64().unwrap();
    assert_eq!(
        left["loss_scale"].as_f64().unwrap(),
        scale * 0.5f64.powf(more)
    );
    let lines = json(&place.bare(&["--json", "--resume", "--loss-scale", "128"]));
    assert_eq!(lines.last().unwrap()["summary"]["loss_scale"], 128.0);
    let table = String::from_utf8(place.bare(&["--resume", "--steps", "5"]).stdout).unwrap();
    assert!(table.contains("loss scale is 128"), "{table}");
    place.refused(&["--loss-scale", "100"], &["64 or 128"]);
}

#[test]
fn interrupted_it_publishes_and_says_how_to_resume() {
    let place = Place::new();
    let mut command = train();
    command
        .args(["--batch", "2", "--seq", "32", "--json", "--disk"])
        .arg(place.path("disk"));
    command.arg("--data").arg(place.path("text.txt"));
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    // Past the first steps, long before the last.
    std::thread::sleep(std::time::Duration::from_secs(3));
    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let first = losses(&output);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("--resume --disk"),
        "{output:?}"
    );
    let output = place.bare(&["--json", "--resume", "--stop-after", "1"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let next: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(next["step"].as_u64().unwrap(), first.len() as u64);
}

#[test]
fn bad_flags_and_budgets_are_one_line_that_says_what_to_do() {
    let place = Place::new();
    place.refused(
        &["--gpu-budget", "1MiB"],
        &["device budget", "at least", "--gpu-budget"],
    );
    place.refused(
        &["--pinned-budget", "64KiB"],
        &["pinned budget", "at least", "--pinned-budget"],
    );
    place.refused(
        &["--placement", "resident", "--gpu-budget", "4MiB"],
        &["device budget", "at least", "--gpu-budget"],
    );
    place.refused(
        &["--placement", "pinned", "--pinned-budget", "4MiB"],
        &["pinned budget", "at least"],
    );
    place.refused(&["--device", "cuda"], &["no cuda device", "--device host"]);
    place.refused(&["--lr", "nan"], &["--lr"]);
    for (flags, words) in [
        (["--placement", "tape"], "auto, resident, pinned or disk"),
        (["--gpu-budget", "12XB"], "512MiB"),
        (["--device", "tpu"], "auto, host or cuda"),
        (["--batch", "0"], "--batch"),
    ] {
        place.refused(&flags, &[words]);
    }
}

#[test]
fn where_checkpoints_do_not_fit_auto_keeps_fewer_and_says_so() {
    let place = Place::new();
    let run = |every: &str, device: u64, pinned: u64| {
        let _ = std::fs::remove_dir_all(place.path("disk"));
        std::fs::create_dir(place.path("disk")).unwrap();
        let (device, pinned) = (device.to_string(), pinned.to_string());
        let budgets = ["--gpu-budget", &device, "--pinned-budget", &pinned];
        let flags = ["--placement", "disk", "--json", "--checkpoint-every", every];
        place.run(&[&flags[..], &budgets[..]].concat())
    };
    let least = |output: &std::process::Output| -> u64 {
        let text = String::from_utf8_lossy(&output.stderr);
        let mut words = text.split_whitespace().skip_while(|w| *w != "least");
        words.nth(1).unwrap().parse().unwrap()
    };
    let interval = |output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["summary"]["checkpoint_every"].as_u64().unwrap()
    };
    // Room for a few states more than the least.
    let device = least(&run("1", 1, 1 << 30)) + (1 << 20);
    let pinned = least(&run("1", device, 1));
    let whole = run("auto", device, pinned);
    assert_eq!((interval(&whole), losses(&whole).len()), (1, 4));
    let less = ["1", "auto"].map(|every| run(every, device, pinned - 1));
    check_refusal(&less[0], "all checkpoints", &["pinned budget", "at least"]);
    assert_eq!(losses(&less[1]), losses(&whole));
    assert_eq!(interval(&less[1]), 2);
    place.refused(
        &["--checkpoint-every", "0"],
        &["--checkpoint-every", "auto"],
    );
}

#[test]
fn bad_data_and_configurations_are_one_line_that_says_what_to_do() {
    let place = Place::new();
    place.refused(
        &["--data", "/nowhere/at/all"],
        &["--data /nowhere/at/all", "no such"],
    );
    std::fs::write(place.path("empty"), "").unwrap();
    let empty = place.path("empty").display().to_string();
    place.refused(&["--data", &empty], &["0 bytes of text", "--data"]);
    let config = |text: &str| {
        let path = place.path("config.json");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    place.refused(&["--config", "/nowhere.json"], &["/nowhere.json"]);
    place.refused(&["--config", &config("{")], &["config.json"]);
    let good = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256"#;
    for (more, words) in [
        ("", ["config.json", "EOF"]),
        (
            r#", "rope_scaling": {"rope_type": "yarn"}}"#,
            ["rope_type", "yarn"],
        ),
        (r#", "head_dim": 7}"#, ["head_dim", "even"]),
        (
            r#", "num_key_value_heads": 3}"#,
            ["num_key_value_heads", "divide"],
        ),
        (
            r#", "attention_bias": true}"#,
            ["attention_bias", "no biases"],
        ),
        (
            r#", "num_key_value_heads": 99999999999}"#,
            ["num_key_value_heads", "size"],
        ),
    ] {
        place.refused(&["--config", &config(&format!("{good}{more}"))], &words);
    }
    let other = config(&good.replace("llama", "mamba"));
    place.refused(&["--config", &other], &["config.json"]);
    std::fs::write(place.path("config.json"), format!("{good}}}")).unwrap();
    let fine = place.path("config.json").display().to_string();
    assert!(place.run(&["--config", &fine, "--json"]).status.success());
    let small = config(&format!("{}}}", good.replace("256", "100")));
    place.refused(&["--config", &small], &["vocab_size", "256"]);
}

#[test]
fn stores_that_are_damaged_taken_or_of_another_model_are_refused_and_not_touched() {
    let place = Place::new();
    let resume = |words: &[&str]| {
        check_refusal(&place.bare(&["--resume", "--steps", "9"]), "resume", words);
    };
    resume(&["no published generation", "without --resume"]);
    place.refused(&["--disk", "/nowhere"], &["/nowhere", "--disk"]);
    assert!(place.run(&["--json"]).status.success());
    place.refused(&[], &["already holds a store", "--resume"]);

    let config = place.path("other.json");
    let text = r#"{"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}"#;
    std::fs::write(&config, text).unwrap();
    let output = place.bare(&["--resume", "--config", &config.display().to_string()]);
    check_refusal(&output, "another model", &["Qwen3", "Llama", "--disk"]);

    let data = place.path("disk/data.forebay");
    let (maps, extents) = newest_map(&data);
    flip(&data, &maps[..1], || {
        let output = place.bare(&["--resume", "--stop-after", "0", "--json"]);
        assert!(output.status.success(), "the map has a copy");
    });
    let (maps, extents_now) = newest_map(&data);
    assert!(!extents.is_empty());
    flip(&data, &maps, || {
        resume(&["data.forebay", "map is damaged", "snapshot"])
    });
    // The first extent of the last published generation, and the last.
    for at in extents_now {
        flip(&data, &[at + 100], || {
            resume(&["checksum", "data.forebay", "damaged"])
        });
    }
    let lock = std::fs::File::open(place.path("disk/store.lock")).unwrap();
    lock.lock().unwrap();
    resume(&["in use by process", "stop it"]);
    lock.unlock().unwrap();
    assert!(
        place
            .bare(&["--resume", "--steps", "5", "--json"])
            .status
            .success(),
        "still whole"
    );
}

#[test]
fn a_disk_that_is_read_only_or_too_full_is_refused_before_the_run() {
    let place = Place::new();
    for (options, words) in [
        ("ro,size=16m", ["--disk", "writable"]),
        ("size=4m", ["bytes free", "needs"]),
    ] {
        let Some(mounted) = Mount::new(place.path("disk"), options) else {
            return;
        };
        place.refused(&[], &words);
        drop(mounted);
    }
    let output = place.run(&["--json"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

/// A small file system in memory; needs root, and says so where it cannot be had.
struct Mount(PathBuf);

impl Mount {
    fn new(path: PathBuf, options: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&path);
        if mount.output().is_ok_and(|o| o.status.success()) {
            return Some(Self(path));
        }
        assert!(
            std::env::var_os("FOREBAY_CI").is_none(),
            "mounting needs root, and CI has it"
        );
        eprintln!("not run: mounting a tmpfs needs root");
        None
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The kernel takes a moment to put away the ring of a process that has ended.
        for _ in 0..50 {
            let output = Command::new("umount").arg(&self.0).output();
            if output.is_ok_and(|o| o.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("{} stays mounted", self.0.display());
    }
}

#[test]
fn it_trains_with_any_optimizer_says_which_and_goes_on_with_it() {
    let place = Place::new();
    let summary = |output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["summary"]["optimizer"].as_str().unwrap().to_owned()
    };
    let flags = ["--json", "--dtype", "bf16", "--optimizer", "lion"];
    let flags = [&flags[..], &["--moments", "bf16", "--split-master"]].concat();
    let first = place.run(&[&flags[..], &["--stop-after", "2"]].concat());
    assert_eq!(summary(&first), "lion with bf16 moments and split masters");
    let rest = place.bare(&["--json", "--resume", "--stop-after", "1"]);
    assert_eq!(summary(&rest), summary(&first));
    place.refused(&["--resume", "--optimizer", "sgd"], &["lion", "sgd"]);
    place.refused(&["--split-master", "--dtype", "fp32"], &["bf16"]);
    place.refused(&["--optimizer", "adam"], &["adamw, sgd, lion"]);
    place.refused(&["--optimizer", "adagrad", "--moments", "bf16"], &["fp32"]);
}
