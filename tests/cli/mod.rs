//! The command lines as a user runs them, and the files that they leave. Shared by the tests of `train` and of
//! the `forebay` command, which another package makes.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The example's executable: cargo names it only for binaries.
pub(crate) fn train() -> Command {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let path = PATH.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let path = test
            .parent()
            .unwrap()
            .parent()
            .unwrap()
            .join("examples/train");
        // `cargo test --test` alone leaves an older one as it is.
        let mut cargo = Command::new(env!("CARGO"));
        let release = (!cfg!(debug_assertions)).then_some("--release");
        cargo
            .args(["build", "-q", "-p", "forebay", "--example", "train"])
            .args(release);
        let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.unwrap().success());
        path
    });
    Command::new(path)
}

/// A folder with text to train on and an empty one for the disk tier.
pub(crate) struct Place {
    pub(crate) root: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let text: String = (0..4000)
            .map(|i| format!("line {} of {}\n", i, i * i % 97))
            .collect();
        std::fs::write(root.path().join("text.txt"), text).unwrap();
        std::fs::create_dir(root.path().join("disk")).unwrap();
        Self { root }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A run of a few small steps with these flags besides.
    pub(crate) fn run(&self, flags: &[&str]) -> Output {
        let mut command = train();
        command.args(["--steps", "4", "--batch", "2", "--seq", "32"]);
        self.finish(command, flags)
    }

    /// A run with nothing but the data and these flags.
    pub(crate) fn bare(&self, flags: &[&str]) -> Output {
        self.finish(train(), flags)
    }

    fn finish(&self, mut command: Command, flags: &[&str]) -> Output {
        if !flags.contains(&"--data") {
            command.arg("--data").arg(self.path("text.txt"));
        }
        if !flags.contains(&"--disk") {
            command.arg("--disk").arg(self.path("disk"));
        }
        command
            .args(flags)
            .current_dir(self.root.path())
            .output()
            .unwrap()
    }

    /// What `run` says when it refuses: one line, with all of these words in it.
    pub(crate) fn refused(&self, flags: &[&str], words: &[&str]) {
        check_refusal(&self.run(flags), &format!("{flags:?}"), words);
    }
}

pub(crate) fn check_refusal(output: &Output, what: &str, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{what} passed");
    assert!(
        output.stdout.is_empty(),
        "{what} printed {}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert_eq!(text.trim_end().lines().count(), 1, "{what}: {text}");
    assert!(text.starts_with("error: "), "{what}: {text}");
    for word in words {
        assert!(text.contains(word), "{what} says: {text} (no '{word}')");
    }
}

pub(crate) fn losses(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text.lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .filter_map(|v| Some(v.get("loss_bits")?.as_str()?.to_owned()))
        .collect()
}

/// Of the newest generation: a byte of each copy of its map, and the offsets of its first and last
/// extent.
pub(crate) fn newest_map(data: &Path) -> (Vec<u64>, Vec<u64>) {
    let bytes = std::fs::read(data).unwrap();
    let start = b"{\"generation\":";
    let starts = (0..bytes.len())
        .step_by(4096)
        .filter(|at| bytes[*at..].starts_with(start));
    let maps = starts.filter_map(|at| {
        let text = serde_json::Deserializer::from_slice(&bytes[at..]);
        let map = text.into_iter::<serde_json::Value>().next()?.ok()?;
        Some((map["generation"].as_u64()?, at as u64 + 20, map))
    });
    let maps: Vec<_> = maps.collect();
    let newest = maps.iter().map(|m| m.0).max().unwrap();
    let copies: Vec<_> = maps.iter().filter(|m| m.0 == newest).collect();
    let extents = copies[0].2["extents"].as_array().unwrap();
    let offset = |e: &serde_json::Value| e["offset"].as_u64().unwrap();
    let ends = vec![offset(&extents[0]), offset(extents.last().unwrap())];
    (copies.iter().map(|m| m.1).collect(), ends)
}

/// Flips a bit of each of these bytes of a file for the time of `work`.
pub(crate) fn flip(path: &Path, at: &[u64], work: impl Fn()) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let change = || {
        for at in at {
            let mut byte = [0];
            file.read_exact_at(&mut byte, *at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], *at).unwrap();
        }
    };
    change();
    work();
    change();
}
