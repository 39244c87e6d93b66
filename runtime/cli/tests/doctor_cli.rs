//! `forebay doctor` as a user meets it.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn doctor_prints_each_fact_and_names_a_folder_that_is_not_there() {
    let doctor = || Command::new(env!("CARGO_BIN_EXE_forebay"));
    let folder = tempfile::tempdir().unwrap();
    let output = doctor()
        .args(["doctor", "--disk"])
        .arg(folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for fact in [
        "GPU",
        "CPU",
        "memory",
        "memlock",
        "huge pages",
        "io_uring",
        "disk space",
        "disk speed",
        "default budgets",
    ] {
        assert!(text.contains(fact), "{fact} in {text}");
    }
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "it leaves nothing behind"
    );
    let output = doctor()
        .args(["doctor", "--json", "--disk", "/nowhere"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let facts: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        facts
            .iter()
            .any(|f| f["standing"] == "FAIL" && f["mend"].is_string())
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere"));
}
