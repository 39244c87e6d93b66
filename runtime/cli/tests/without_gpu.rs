//! What a user is told where a GPU is missing or cannot be used: one line that says what to do, and the host
//! device computes unless the GPU was demanded. What is missing is left out of the stub's folder.
#![allow(clippy::unwrap_used)]

#[path = "../../../tests/cli/mod.rs"]
mod cli;
#[path = "../../../tests/stub/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::process::{Command, Output};

use cli::{Place, check_refusal, train};

const DRIVER: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
const NVRTC: [&str; 2] = ["libnvrtc.so", "libnvrtc.so.13"];
const BLAS: [&str; 2] = ["libcublasLt.so", "libcublasLt.so.13"];

/// A command that finds these of CUDA's libraries, in this order, and no others where none are installed.
fn with(place: &Place, libraries: &[[&str; 2]], mut command: Command) -> Command {
    let folder = place.path("libraries");
    std::fs::create_dir(&folder).unwrap();
    for name in libraries.iter().flatten() {
        std::os::unix::fs::symlink(harness::library(), folder.join(name)).unwrap();
    }
    command
        .env("LD_LIBRARY_PATH", folder)
        .env_remove("FOREBAY_DEVICE")
        .current_dir(place.root.path());
    command
}

fn small(
    place: &Place,
    device: &str,
    libraries: &[[&str; 2]],
    settings: &[(&str, &str)],
) -> Output {
    let mut command = train();
    command
        .args([
            "--steps", "2", "--batch", "2", "--seq", "32", "--device", device,
        ])
        .arg("--data")
        .arg(place.path("text.txt"))
        .arg("--disk")
        .arg(place.path("disk"));
    with(place, libraries, command)
        .envs(settings.iter().copied())
        .output()
        .unwrap()
}

/// Demanded, a GPU that cannot be used is refused with these words; left to the run, they are why the host
/// device computes.
fn told(libraries: &[[&str; 2]], settings: &[(&str, &str)], words: &[&str]) {
    let place = Place::new();
    let refused = small(&place, "cuda", libraries, settings);
    check_refusal(&refused, "--device cuda", words);
    let place = Place::new();
    let output = small(&place, "auto", libraries, settings);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let line = said
        .lines()
        .find(|line| line.starts_with("device: "))
        .unwrap();
    assert!(line.contains("host"), "{line}");
    for word in words {
        assert!(line.contains(word), "{line} (no '{word}')");
    }
}

/// Where CUDA itself is installed its libraries are found after all.
fn installed() -> bool {
    let installed = forebay_kernels::cuda::usable().is_ok();
    if installed {
        eprintln!("skipped: this machine has what is to be missing");
    }
    installed
}

#[test]
fn without_a_driver() {
    if !installed() {
        told(&[], &[], &["no CUDA driver is installed"]);
    }
}

#[test]
fn without_nvrtc() {
    if !installed() {
        let words = ["libnvrtc cannot be loaded", "FOREBAY_CUDA_LIBRARIES"];
        told(&[DRIVER, BLAS], &[], &words);
    }
}

#[test]
fn without_cublaslt() {
    if !installed() {
        let words = ["libcublasLt cannot be loaded", "FOREBAY_CUDA_LIBRARIES"];
        told(&[DRIVER, NVRTC], &[], &words);
    }
}

#[test]
fn with_a_gpu_that_is_too_old() {
    if !installed() {
        let words = ["compute capability 7.0", "8.0 (Ampere) or newer"];
        let old = [("FOREBAY_STUB_CAPABILITY", "7")];
        told(&[DRIVER, NVRTC, BLAS], &old, &words);
    }
}

#[test]
fn doctor_says_what_the_gpu_lacks() {
    if installed() {
        return;
    }
    let place = Place::new();
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_forebay"));
    doctor.args(["doctor", "--disk"]).arg(place.path("disk"));
    let output = with(&place, &[DRIVER, BLAS], doctor).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find(|line| line.contains("GPU")).unwrap();
    assert!(line.starts_with("note"), "{line}");
    assert!(said.contains("libnvrtc cannot be loaded"), "{said}");
}
