//! `forebay trace`: idle time told by what was under way, and files that are none of ours as one line.
#![allow(clippy::unwrap_used)]

#[path = "../../../tests/cli/mod.rs"]
mod cli;

use std::path::Path;
use std::process::{Command, Output};

use cli::{Place, check_refusal};
use serde_json::{Value, json};

fn trace(path: &Path, flags: &[&str]) -> Output {
    let mut forebay = Command::new(env!("CARGO_BIN_EXE_forebay"));
    forebay.arg("trace").arg(path).args(flags).output().unwrap()
}

fn found(path: &Path, flags: &[&str]) -> Value {
    let output = trace(path, &[&["--json"], flags].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(path: &Path, flags: &[&str], words: &[&str]) {
    check_refusal(&trace(path, flags), &format!("{flags:?}"), words);
}

fn close(value: &Value, wanted: f64) {
    let value = value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"));
    assert!(
        (value - wanted).abs() < 1e-9 + 1e-6 * wanted,
        "{value}, not {wanted}"
    );
}

/// Five steps of a second each, and in each of them: compute in the first 0.5 s, the optimizer from 0.4 to 0.8
/// (of two workers one, for half of it), a copy to the device from 0.7 to 0.9.
fn drawn() -> Value {
    let lanes = [
        "compute",
        "to the device",
        "optimizer (CPU)",
        "trainer waits",
        "optimizer worker 0",
    ];
    let lanes = lanes.iter().chain(&["optimizer worker 1", "disk read 0"]);
    let mut events: Vec<_> = (0..)
        .zip(lanes)
        .map(|(tid, name)| json!({"name": "thread_name", "ph": "M", "tid": tid, "args": {"name": name}}))
        .collect();
    for step in 0..5 {
        let mut span = |tid: u32, name: &str, from: f64, seconds: f64| {
            let ts = 1e6 * (f64::from(step) + 7.0 + from);
            let args = json!({"step": step});
            events.push(json!({"name": name, "ph": "X", "tid": tid, "ts": ts, "dur": 1e6 * seconds, "args": args}));
        };
        span(0, "layer 0", 0.0, 0.3);
        span(0, "layer 1", 0.3, 0.2);
        span(1, "fetch", 0.7, 0.2);
        span(2, "update", 0.4, 0.4);
        span(3, "layer 1 waits for fetch", 0.85, 0.1);
        span(4, "update", 0.4, 0.2);
    }
    json!({"traceEvents": events})
}

#[test]
fn idle_time_is_told_by_what_was_under_way_meanwhile() {
    let place = Place::new();
    let path = place.path("trace.json");
    std::fs::write(&path, drawn().to_string()).unwrap();
    let all = found(&path, &[]);
    assert_eq!(
        (&all["first_step"], &all["last_step"]),
        (&json!(2), &json!(3))
    );
    close(&all["step_s"], 1.0);
    close(&all["compute_busy_s"], 1.0);
    close(&all["compute_idle_s"], 1.0);
    let idle = &all["idle"];
    for (cause, share, alone) in [
        ("optimizer", 0.6, 0.4),
        ("to_device", 0.4, 0.2),
        ("disk_read", 0.0, 0.0),
    ] {
        close(&idle[cause]["share"], share);
        close(&idle[cause]["alone"], alone);
    }
    close(&all["idle_unexplained"], 0.2);
    close(&all["idle_unexplained_waiting"], 0.1);
    close(&all["workers_worked"], 0.25);
    assert_eq!(all["waits"][0]["what"], "layer 1 waits for fetch");
    close(&all["waits"][0]["s"], 0.2);
    let first = found(&path, &["--from", "0", "--to", "0"]);
    close(&first["wall_s"], 1.0);
    let output = trace(&path, &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for words in [
        "steps 2 to 3: 1000.000 ms",
        "500.000 ms idle (50.0 %)",
        "layer 1 waits for fetch",
    ] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn of_a_run_it_finds_what_looking_at_many_instants_finds() {
    let place = Place::new();
    let path = place.path("trace.json");
    let name = path.display().to_string();
    let sizes = ["--steps", "6", "--batch", "2", "--seq", "32"];
    let output = place.bare(&[&["--json", "--trace", &name], &sizes[..]].concat());
    assert!(output.status.success());
    let all = found(&path, &[]);
    let file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = file["traceEvents"].as_array().unwrap();
    let spans = |lane: &str| -> Vec<(f64, f64, u64)> {
        let named = |e: &&Value| {
            let name = e["args"]["name"].as_str().unwrap_or("");
            e["name"] == "thread_name" && name.starts_with(lane)
        };
        let tids: Vec<_> = events.iter().filter(named).map(|e| &e["tid"]).collect();
        let ours = events
            .iter()
            .filter(|e| e["ph"] == "X" && tids.contains(&&e["tid"]));
        let number = |e: &Value| e.as_f64().unwrap();
        let span = |e: &Value| {
            let (start, step) = (number(&e["ts"]), e["args"]["step"].as_u64().unwrap());
            (start, start + number(&e["dur"]), step)
        };
        ours.map(span).collect()
    };
    let compute = spans("compute");
    let begin = |step| {
        let starts = compute.iter().filter(|s| s.2 == step).map(|s| s.0);
        starts.fold(f64::INFINITY, f64::min)
    };
    let (from, to) = (begin(2), begin(5));
    let instants: Vec<f64> = (0..20_000)
        .map(|i| from + (to - from) * (f64::from(i) + 0.5) / 2e4)
        .collect();
    let within = |spans: &[(f64, f64, u64)], at: f64| spans.iter().any(|s| s.0 <= at && at < s.1);
    let idle: Vec<f64> = instants
        .into_iter()
        .filter(|at| !within(&compute, *at))
        .collect();
    let near = |value: &Value, wanted: f64| {
        let value = value.as_f64().unwrap();
        assert!((value - wanted).abs() < 0.02, "{value}, not {wanted}");
    };
    let seconds = all["wall_s"].as_f64().unwrap();
    near(
        &json!(all["compute_idle_s"].as_f64().unwrap() / seconds),
        idle.len() as f64 / 2e4,
    );
    let causes = [
        ("optimizer", "optimizer (CPU)"),
        ("to_device", "to the device"),
        ("from_device", "from the device"),
        ("disk_read", "disk read"),
        ("disk_write", "disk write"),
    ];
    let causes = causes.map(|(key, lane)| (key, spans(lane)));
    for (key, spans) in &causes {
        let part = idle.iter().filter(|at| within(spans, **at)).count();
        near(&all["idle"][key]["share"], part as f64 / idle.len() as f64);
    }
    let none = |at: &&f64| !causes.iter().any(|(_, spans)| within(spans, **at));
    near(
        &all["idle_unexplained"],
        idle.iter().filter(none).count() as f64 / idle.len() as f64,
    );
}

#[test]
fn files_that_are_broken_or_none_of_ours_are_one_line() {
    let place = Place::new();
    let path = place.path("trace.json");
    refused(&path, &[], &["trace.json", "No such file"]);
    let whole = drawn().to_string();
    for (text, words) in [
        ("", "breaks off"),
        (&whole[..whole.len() / 2], "breaks off"),
        ("line 1\nline 2\n", "not what train --trace writes"),
        ("[1, 2]", "not what train --trace writes"),
        (
            r#"{"traceEvents": [{"ph": 3}]}"#,
            "not what train --trace writes",
        ),
        (r#"{"traceEvents": []}"#, "no steps in it"),
        (
            r#"{"traceEvents": [{"name": "a", "ph": "X", "ts": 1, "dur": 2}]}"#,
            "no steps in it",
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        refused(&path, &[], &["trace.json", words]);
    }
    std::fs::write(&path, &whole).unwrap();
    for flags in [
        ["--from", "4"],
        ["--to", "4"],
        ["--to", "0"],
        ["--to", "18446744073709551615"],
    ] {
        refused(&path, &flags, &["steps 0 to 4 are in it", "--from"]);
    }
    let reversed = whole.replace("\"ts\":", "\"ts\":-");
    std::fs::write(&path, &reversed).unwrap();
    refused(&path, &[], &["damaged"]);
}
