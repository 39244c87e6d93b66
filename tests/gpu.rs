//! What only a real GPU can show: memory that comes back, budgets that do not fit, a kernel that
//! traps. Without a GPU nothing is tried, and that is said; `FOREBAY_REQUIRE_GPU=1` makes it a failure.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks)]

mod common;
#[path = "../kernels/tests/cuda/held.rs"]
mod held;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{create, decoder, options, resume, with_budgets};
use forebay::{
    Args, CudaArgs, CudaContext, DeviceChoice, Footprint, HostArgs, HostContext, Operation,
    Options, RandomInit, SectionId, StageLease, Trainer,
};
use forebay_decoder::Batch;
use forebay_kernels::cuda::{check, sys};
use held::Held;

/// Whether there is a GPU; says so if not.
fn there() -> bool {
    match DeviceChoice::Cuda.target(1) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("FOREBAY_REQUIRE_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
            false
        }
    }
}

fn cuda_options(folder: &Path) -> Options {
    let mut options = options(folder);
    options.device = DeviceChoice::Cuda;
    with_budgets(options, &decoder())
}

/// Bytes of device memory that nobody uses.
fn free(_: &Held) -> u64 {
    let (mut free, mut all) = (0, 0);
    let done = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut all) };
    check("cuMemGetInfo", done).unwrap();
    free as u64
}

#[test]
fn opening_and_closing_leaves_the_device_memory_as_it_was() {
    if !there() {
        return;
    }
    let cycles = std::env::var("FOREBAY_CYCLES").map_or(20, |n| n.parse().unwrap());
    // Held: memory can be asked for, and opening a device is quick.
    let held = Held::new();
    let mut before = None;
    for cycle in 0..cycles {
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder();
        let mut trainer = create(&decoder, &cuda_options(folder.path()));
        common::train(&mut trainer, &decoder, 2);
        let open = free(&held);
        drop(trainer);
        let closed = free(&held);
        assert!(closed > open, "it took memory and gave it back");
        // What the driver keeps for itself after the first use stays.
        let first = *before.get_or_insert(closed);
        assert_eq!(closed, first, "after {cycle} cycles");
    }
    println!("{cycles} cycles, {} bytes free after each", free(&held));
}

#[test]
fn more_memory_than_there_is_is_refused_with_what_is_free() {
    if !there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder();
    let footprint = Footprint {
        scratch_bytes: 1 << 42,
        ..decoder.footprint(forebay::Target::Cuda).unwrap()
    };
    let mut options = cuda_options(folder.path());
    options.device_budget = Some(1 << 43);
    let model = decoder.model().clone();
    let mut weights = RandomInit { seed: 1 };
    let error = Trainer::create(model, footprint, &options, &mut weights).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("of device memory") && text.contains("free"),
        "{text}"
    );
}

#[derive(Clone, Copy)]
struct Trap;

impl Operation for Trap {
    fn name(&self) -> &'static str {
        "trap"
    }

    fn host(&self, _: &HostContext, _: HostArgs<'_>) -> Result<(), String> {
        Err("not here".to_owned())
    }

    fn cuda(&self, cx: &CudaContext<'_>, _: CudaArgs<'_>) -> Result<(), String> {
        const SOURCE: &str = r#"extern "C" __global__ void gpu_test_trap() { asm("trap;"); }"#;
        let name = ("gpu_test_trap", None);
        let done = cx.kernels.source("gpu_test", SOURCE).and_then(|()| unsafe {
            cx.kernels
                .launch(cx.stream, name, [1; 3], [1; 2], 0, &mut Args::new())
        });
        done.map_err(|error| error.to_string())
    }
}

/// The process of the test below: the context is lost for good.
#[test]
fn trapping_child() {
    let Some(folder) = std::env::var_os("FOREBAY_TEST_TRAP") else {
        return;
    };
    let decoder = decoder();
    let options = cuda_options(Path::new(&folder));
    let mut trainer = create(&decoder, &options);
    common::train(&mut trainer, &decoder, 3);
    trainer.publish("before").unwrap();
    let start = Instant::now();
    let (ids, targets) = common::tokens(trainer.steps());
    let step = trainer.begin(1e-3).unwrap();
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    let mut observer = |_: &StageLease<'_>, id: SectionId| match id {
        SectionId(2) => step.launch(Trap, &[], &[]),
        _ => Ok(()),
    };
    let walked = decoder.train_step_observed(&step, &batch, &mut observer);
    let error = walked
        .and_then(|()| step.finish().map(|_| ()))
        .and_then(|()| trainer.settle())
        .unwrap_err();
    assert!(matches!(error, forebay::Error::Device { .. }), "{error}");
    println!("{error}");
    assert!(trainer.publish("after").is_err(), "it is lost for good");
    drop(trainer);
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    // Host and disk are as they were: the run goes on elsewhere.
    let mut elsewhere = common::options(Path::new(&folder));
    elsewhere.device = DeviceChoice::Host;
    let options = with_budgets(elsewhere, &decoder);
    let mut trainer = resume(&decoder, &options);
    assert_eq!((trainer.steps(), trainer.user()), (3, "before"));
    common::train(&mut trainer, &decoder, 1);
}

#[test]
fn after_a_kernel_that_traps_the_run_fails_in_bounded_time_and_resumes_elsewhere() {
    if !there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["trapping_child", "--exact", "--nocapture"])
        .env("FOREBAY_TEST_TRAP", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    println!("{said}{}", String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success());
}
