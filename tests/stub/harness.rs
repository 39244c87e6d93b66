//! How a test runs under the stub of CUDA: again, in a process of its own, in which the loader finds the
//! stub under the names of CUDA's libraries. Shared by tests that cannot share a crate.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the processes that run under the stub.
pub(crate) const INSIDE: &str = "FOREBAY_UNDER_STUB";

/// The stub, which cargo puts beside the tests of whatever depends on it.
pub(crate) fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let library = test.with_file_name("libforebay_cuda_stub.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// Runs a test of this executable (by its full name, or all whose names begin so, but `except` one) under the
/// stub; what it printed if it fails or takes longer than it should.
pub(crate) fn run(
    test: &str,
    except: Option<&str>,
    settings: &[(&str, &str)],
) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    // With and without versions: where CUDA's own are installed, none of them may be found instead.
    for name in [
        "libcuda.so",
        "libcuda.so.1",
        "libnvrtc.so",
        "libcublasLt.so",
        "libnvrtc.so.13",
        "libcublasLt.so.13",
        "libnvrtc-builtins.so.13.0",
    ] {
        std::os::unix::fs::symlink(library(), folder.path().join(name)).unwrap();
    }
    let output = folder.path().join("output");
    let file = std::fs::File::create(&output).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(test).args(["--test-threads=1", "--nocapture"]);
    match except {
        Some(except) => command.args(["--skip", except]),
        None => command.arg("--exact"),
    };
    let mut child = command
        .env(INSIDE, "1")
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FOREBAY_KERNELS", folder.path().join("kernels"))
        .env("FOREBAY_DEVICE", "cuda")
        .env("FOREBAY_REQUIRE_GPU", "1")
        .envs(settings.iter().copied())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let ended = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status.success().then_some(()).ok_or("it failed"),
            None if start.elapsed() > Duration::from_secs(120) => {
                child.kill().unwrap();
                child.wait().unwrap();
                break Err("it did not end within 120 s");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let said = String::from_utf8_lossy(&std::fs::read(&output).unwrap()).into_owned();
    ended.map_err(|what| format!("{what}, under the stub with {settings:?}:\n{said}"))?;
    println!("{said}");
    Ok(())
}
