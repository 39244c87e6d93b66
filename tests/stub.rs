//! The `cuda` device in training, on a stub of CUDA that runs what is queued late and in any legal
//! order (`tests/stub/`): bits, faults, silence and leaks, with no GPU.
//!
//! Each test runs itself again in a process that finds the stub.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "stub/harness.rs"]
mod harness;

use std::ffi::{CString, c_char, c_void};
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{create, decoder_in, go_on, options, split, train, try_step, with_budgets};
use forebay::nvme::sim::SimDisk;
use forebay::{
    Ahead, DType, DeviceChoice, Error, ExternalStream, Options, Policy, RandomInit, Result,
    Trainer, Updates,
};
use forebay_decoder::Decoder;
use forebay_kernels::cuda::{check, probe, sys};

/// The stub's own functions.
struct Stub {
    library: *mut c_void,
}

impl Stub {
    /// In the process that runs under the stub: the stub. In any other: runs `test` in such a process.
    fn enter(test: &str, settings: &[(&str, &str)]) -> Option<Self> {
        if std::env::var_os(harness::INSIDE).is_none() {
            if let Err(what) = harness::run(test, None, settings) {
                panic!("{what}");
            }
            return None;
        }
        // SAFETY: the library that the harness made sure is found.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null());
        Some(Self { library })
    }

    fn function(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: an open library and a string.
        let function = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!function.is_null(), "{name:?} is not the stub's");
        function
    }

    fn configure(&self, settings: &str) {
        let settings = CString::new(settings).unwrap();
        // SAFETY: the stub declares it so.
        let configure: extern "C" fn(*const c_char) =
            unsafe { std::mem::transmute(self.function("forebay_stub_configure")) };
        configure(settings.as_ptr());
    }

    fn count(&self, function: &str, this_thread: bool) -> u64 {
        let name = CString::new(function).unwrap();
        // SAFETY: the stub declares it so.
        let count: extern "C" fn(*const c_char, bool) -> u64 =
            unsafe { std::mem::transmute(self.function("forebay_stub_count")) };
        count(name.as_ptr(), this_thread)
    }

    fn number(&self, name: &str) -> u64 {
        // SAFETY: the stub declares it so.
        let number: extern "C" fn() -> u64 =
            unsafe { std::mem::transmute(self.function(&format!("forebay_stub_{name}"))) };
        number()
    }

    /// What was taken and not given back.
    fn held(&self) -> [u64; 2] {
        ["device_bytes", "objects"].map(|name| self.number(name))
    }
}

/// A training run, published after each step, on a simulated disk.
struct Setup {
    decoder: Decoder,
    options: Options,
}

const STEPS: u64 = 3;

impl Setup {
    fn new(dtype: DType, change: impl Fn(&mut Options)) -> Self {
        let decoder = decoder_in(dtype);
        let mut options = options(&PathBuf::from("disk"));
        change(&mut options);
        let options = with_budgets(options, &decoder);
        Self { decoder, options }
    }

    /// Goes on from what is on the disk; the bits of each step's loss.
    fn run(&self, disk: &SimDisk, bits: &mut Vec<(u64, u32)>) -> Result<()> {
        let options = Options {
            medium: Arc::new(disk.clone()),
            ..self.options.clone()
        };
        let mut trainer = go_on(&self.decoder, &options, disk)?;
        while trainer.steps() < STEPS {
            let step = trainer.steps();
            bits.push((step, try_step(&mut trainer, &self.decoder)?));
            trainer.publish("")?;
        }
        Ok(())
    }

    /// Under a fault: right bits up to a typed error, in bounded time; then, on a healed device, the
    /// rest of the right bits from the generation that stands.
    fn survives(&self, stub: &Stub, fault: &str, right: &[(u64, u32)]) -> Result<()> {
        let (disk, mut bits) = (SimDisk::new(1), Vec::new());
        stub.configure(fault);
        let start = Instant::now();
        let result = self.run(&disk, &mut bits);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(30), "{fault}: {took:?}");
        assert_eq!(bits, right[..bits.len()], "{fault}");
        assert_eq!(stub.number("violations"), 0, "{fault}");
        match &result {
            Ok(()) => assert_eq!(bits.len(), right.len(), "{fault}"),
            Err(Error::Device { .. } | Error::NoDevice { .. } | Error::Misuse(_)) => {}
            Err(other) => panic!("{fault}: {other}"),
        }
        stub.configure("");
        let mut rest = Vec::new();
        self.run(&disk, &mut rest).unwrap();
        let first = rest.first().map_or(STEPS, |(step, _)| *step);
        assert!(first <= bits.len() as u64, "{fault}: no step is left out");
        assert_eq!(rest, right[first as usize..], "{fault}");
        result
    }

    fn right(&self, stub: &Stub) -> Vec<(u64, u32)> {
        stub.configure("");
        let mut right = Vec::new();
        self.run(&SimDisk::new(1), &mut right).unwrap();
        assert_eq!(right.len() as u64, STEPS);
        right
    }
}

fn disk_only(options: &mut Options) {
    options.placement = Policy::Disk;
}

#[test]
fn in_every_order_that_events_allow_every_placement_gives_the_same_bits() {
    let test = "in_every_order_that_events_allow_every_placement_gives_the_same_bits";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    for (dtype, clip) in [
        (DType::F32, Some(0.5)),
        (DType::F32, None),
        (DType::Bf16, Some(0.5)),
        (DType::Bf16, None),
        (DType::F16, Some(0.5)),
        (DType::F16, None),
    ] {
        let run = |placement, lookahead| {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(dtype);
            let mut options = options(folder.path());
            (options.placement, options.lookahead) = (placement, lookahead);
            options.clip = clip;
            let options = with_budgets(options, &decoder);
            train(&mut create(&decoder, &options), &decoder, 4)
        };
        stub.configure("SEED=0");
        let reference = run(Policy::Resident, 2);
        let losses: Vec<f32> = reference.iter().map(|b| f32::from_bits(*b)).collect();
        assert!(losses.iter().all(|l| l.is_finite()), "{losses:?}");
        let mut seed = 0;
        for placement in [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk] {
            for lookahead in 0..=3 {
                seed += 1;
                stub.configure(&format!("SEED={seed}"));
                let got = run(placement, lookahead);
                let what = format!("{placement:?}, look-ahead {lookahead}, seed {seed}");
                assert_eq!(got, reference, "{what}");
                // Rows of the embedding, where it lives in pinned memory.
                let gathers = matches!(placement, Policy::Auto | Policy::Pinned);
                let gathered = stub.count("host memory read by a kernel", false) > 0;
                assert_eq!(gathered, gathers, "{what}");
                assert_eq!(stub.held(), [0; 2], "{what}");
                assert_eq!(stub.number("violations"), 0, "{what}");
            }
        }
        // The comparison can fail: where streams do not wait for each other, or events come early.
        for defect in ["IGNORE_WAITS=1", "EARLY_EVENTS=1"] {
            let wrong = |seed| {
                stub.configure(&format!("SEED={seed};{defect}"));
                // Other bits, or a checksum that does not hold.
                let got = catch_unwind(|| run(Policy::Disk, 3));
                got.ok().is_none_or(|got| got != reference)
            };
            assert!((0..8).any(wrong), "{defect} goes unnoticed");
        }
    }
}

#[test]
fn delayed_updates_give_the_same_bits_in_every_order_that_events_allow() {
    let test = "delayed_updates_give_the_same_bits_in_every_order_that_events_allow";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    for (dtype, clip) in [(DType::F32, Some(0.1)), (DType::Bf16, None)] {
        let run = |placement, thirds: Option<u64>, lookahead| {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(dtype);
            let mut options = options(folder.path());
            (options.placement, options.lookahead) = (placement, lookahead);
            (options.clip, options.updates) = (clip, Updates::Delayed);
            let options = match thirds {
                Some(thirds) => split(options, &decoder, thirds),
                None => with_budgets(options, &decoder),
            };
            let mut trainer = create(&decoder, &options);
            let mut bits = train(&mut trainer, &decoder, 4);
            trainer.publish("").unwrap();
            bits.extend(train(&mut trainer, &decoder, 2));
            bits
        };
        stub.configure("SEED=0");
        let reference = run(Policy::Resident, None, 2);
        let mut seed = 0;
        for (placement, thirds) in [
            (Policy::Auto, None),
            (Policy::Auto, Some(1)),
            (Policy::Resident, None),
            (Policy::Resident, Some(0)),
            (Policy::Resident, Some(1)),
            (Policy::Pinned, None),
            (Policy::Disk, None),
        ] {
            for lookahead in [0, 1, 3] {
                seed += 1;
                stub.configure(&format!("SEED={seed}"));
                let got = run(placement, thirds, lookahead);
                let what =
                    format!("{placement:?}, {thirds:?}, look-ahead {lookahead}, seed {seed}");
                assert_eq!(got, reference, "{what}");
                assert_eq!(stub.held(), [0; 2], "{what}");
                assert_eq!(stub.number("violations"), 0, "{what}");
            }
        }
        // Where streams do not wait for each other, the new gradient and the new parameters meet in a slab.
        let wrong = |seed| {
            stub.configure(&format!("SEED={seed};IGNORE_WAITS=1"));
            let got = catch_unwind(|| run(Policy::Resident, Some(0), 3));
            got.ok().is_none_or(|got| got != reference)
        };
        assert!((0..8).any(wrong), "it goes unnoticed");
    }
}

#[test]
fn it_computes_on_a_stream_of_the_callers_own_and_leaves_it_to_him() {
    let test = "it_computes_on_a_stream_of_the_callers_own_and_leaves_it_to_him";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    let (mut device, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: valid places; a context that is kept to the end of the process.
    let given = unsafe {
        probe().unwrap();
        check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, 0)).unwrap();
        let kept = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
        check("cuDevicePrimaryCtxRetain", kept).unwrap();
        check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context)).unwrap();
        let made = sys::cuStreamCreate(&raw mut stream, 0);
        check("cuStreamCreate", made).unwrap();
        ExternalStream::new(stream.cast())
    };
    let run = |stream| {
        let setup = Setup::new(DType::F32, |o| {
            (o.placement, o.stream) = (Policy::Disk, stream)
        });
        setup.right(&stub)
    };
    let own = run(None);
    let held = stub.held();
    assert_eq!(stub.count("cuStreamCreate", false), 3);
    assert_eq!(run(Some(given)), own);
    assert_eq!(
        stub.count("cuStreamCreate", false),
        2,
        "those of the copies"
    );
    assert_eq!(stub.held(), held, "the stream is still there");
    // The default stream, which is PyTorch's current one unless told otherwise.
    // SAFETY: it is always there.
    let default = unsafe { ExternalStream::new(std::ptr::null_mut()) };
    assert_eq!(run(Some(default)), own);
    // SAFETY: a stream that lives.
    check("cuStreamQuery", unsafe { sys::cuStreamQuery(stream) }).unwrap();
    let setup = Setup::new(DType::F32, |o| {
        (o.device, o.stream) = (DeviceChoice::Host, Some(given))
    });
    let refused = setup.run(&SimDisk::new(1), &mut Vec::new()).unwrap_err();
    assert!(
        refused.to_string().contains("the host device computes"),
        "{refused}"
    );
}

#[test]
fn in_a_steady_step_the_trainers_thread_makes_no_call_that_waits_or_allocates() {
    let test = "in_a_steady_step_the_trainers_thread_makes_no_call_that_waits_or_allocates";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    const WAITING: [&str; 17] = [
        "a copy that blocks",
        "cuCtxSynchronize",
        "cuEventCreate",
        "cuEventSynchronize",
        "cuMemAlloc_v2",
        "cuMemFreeHost",
        "cuMemFree_v2",
        "cuMemHostAlloc",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
        "cuMemcpyDtoH_v2",
        "cuMemcpyHtoD_v2",
        "cuModuleGetFunction",
        "cuModuleLoadData",
        "cuStreamCreate",
        "cuStreamQuery",
        "cuStreamSynchronize",
    ];
    for placement in [Policy::Auto, Policy::Disk, Policy::Resident] {
        stub.configure("SEED=3");
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder_in(DType::F32);
        let mut options = options(folder.path());
        options.placement = placement;
        let options = with_budgets(options, &decoder);
        let mut trainer = create(&decoder, &options);
        let calls = || WAITING.map(|function| (function, stub.count(function, true)));
        // So many events as two steps can have under way are made in the first ones.
        train(&mut trainer, &decoder, 6);
        let (before, launched) = (calls(), stub.count("cuLaunchKernel", true));
        train(&mut trainer, &decoder, 6);
        let after = calls();
        for ((function, before), (_, after)) in before.iter().zip(&after) {
            // A run that gets further ahead than ever before needs a few more events.
            let most = if *function == "cuEventCreate" { 40 } else { 0 };
            assert!(after - before <= most, "{placement:?}: {function}");
        }
        // The counts are of this thread, and of calls like these.
        assert!(stub.count("cuLaunchKernel", true) > launched + 100);
        assert!(before.iter().any(|(f, n)| *f == "cuMemAlloc_v2" && *n > 0));
        assert!(stub.count("cuEventSynchronize", false) > 0);
    }
}

#[test]
fn a_call_that_fails_is_an_error_to_resume_from_and_nothing_leaks() {
    let test = "a_call_that_fails_is_an_error_to_resume_from_and_nothing_leaks";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    // What opens a device, what a step calls; and whether the device refuses or is not noticed to.
    const CALLS: [(&str, i32); 21] = [
        ("cuDevicePrimaryCtxRetain", 2),
        ("cuMemHostAlloc", 2),
        ("cuMemHostGetDevicePointer_v2", 1),
        ("cuMemAlloc_v2", 2),
        ("cuModuleLoadData", 209),
        ("cuModuleGetFunction", 500),
        ("cublasLtCreate", 3),
        ("cublasLtMatmulAlgoGetHeuristic", 15),
        ("cublasLtMatmul", 13),
        ("cuMemHostRegister_v2", 2),
        ("cuStreamCreate", 2),
        ("cuEventCreate", 2),
        ("cuEventRecord", 400),
        ("cuEventSynchronize", 719),
        ("cuEventElapsedTime", 600),
        ("cuStreamWaitEvent", 400),
        ("cuMemcpyHtoDAsync_v2", 700),
        ("cuMemcpyDtoHAsync_v2", 700),
        ("cuMemcpyDtoDAsync_v2", 700),
        ("cuMemsetD8Async", 700),
        ("cuLaunchKernel", 701),
    ];
    let setup = Setup::new(DType::F32, disk_only);
    // The target is asked for once a process; not under a fault.
    let right = setup.right(&stub);
    let totals = CALLS.map(|(function, _)| stub.count(function, false));
    let mut errors = 0;
    for ((function, code), total) in CALLS.into_iter().zip(totals) {
        assert!(total > 0, "{function} is not called at all");
        for nth in [1, total / 2, total * 4 / 5] {
            if nth == 0 {
                continue;
            }
            let fault = format!("FAIL={function}:{nth}:{code}");
            let result = setup.survives(&stub, &fault, &right);
            // How often events are made and waited for depends on timing; a kernel is asked for in
            // modules that do not have it.
            let sure = nth == 1 || !function.starts_with("cuEvent");
            let sure = sure && function != "cuModuleGetFunction";
            assert!(result.is_err() || !sure, "{fault} goes unnoticed");
            errors += u64::from(result.is_err());
            assert_eq!(stub.held(), [0; 2], "{fault}");
        }
    }
    println!("{errors} errors");
}

#[test]
fn a_device_that_is_lost_at_any_operation_leaves_a_generation_to_resume() {
    let test = "a_device_that_is_lost_at_any_operation_leaves_a_generation_to_resume";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    // States on disk, and in pinned memory where updates run ahead of the norm.
    for (placement, clip) in [
        (Policy::Disk, Some(0.5)),
        (Policy::Disk, None),
        (Policy::Pinned, Some(0.5)),
        (Policy::Pinned, Some(1e9)),
    ] {
        let setup = Setup::new(DType::F32, |o| {
            (o.placement, o.clip, o.ahead) = (placement, clip, Ahead::Always);
        });
        let right = setup.right(&stub);
        let operations = stub.number("executed");
        for at in (1..operations).step_by(operations as usize / 12) {
            let fault = format!("LOSE={at}:719");
            let error = setup.survives(&stub, &fault, &right).unwrap_err();
            let text = error.to_string();
            // cuBLASLt has no words for it.
            let said = ["on purpose", "EXECUTION_FAILED"];
            assert!(said.iter().any(|s| text.contains(s)), "{fault}: {text}");
        }
    }
}

#[test]
fn a_device_that_never_answers_is_given_up_in_bounded_time() {
    let test = "a_device_that_never_answers_is_given_up_in_bounded_time";
    let Some(stub) = Stub::enter(test, &[("FOREBAY_DEVICE_PATIENCE", "1.5")]) else {
        return;
    };
    let setup = Setup::new(DType::F32, disk_only);
    let right = setup.right(&stub);
    let operations = stub.number("executed");
    for at in [0, 1, operations / 3, operations / 2, operations - 1] {
        let fault = format!("STOP={at}");
        let before = stub.held();
        let error = setup.survives(&stub, &fault, &right).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("has not answered for 1.5s"), "{text}");
        // It is the device's for good: given up, not given back.
        assert!(stub.held()[0] > before[0]);
    }
}

#[test]
fn a_thousand_devices_opened_and_closed_leave_nothing_behind() {
    let test = "a_thousand_devices_opened_and_closed_leave_nothing_behind";
    let Some(stub) = Stub::enter(test, &[]) else {
        return;
    };
    let setup = Setup::new(DType::F32, |o| o.placement = Policy::Resident);
    let options = setup.options.clone();
    let decoder = &setup.decoder;
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads();
    for cycle in 0..1000 {
        let options = Options {
            medium: Arc::new(SimDisk::new(cycle)),
            ..options.clone()
        };
        let model = decoder.model().clone();
        let seed = &mut RandomInit { seed: 5 };
        let mut trainer = Trainer::create(model, footprint, &options, seed).unwrap();
        if cycle % 100 == 0 {
            train(&mut trainer, decoder, 1);
            assert_ne!(stub.held(), [0; 2], "what is held is seen");
        }
        drop(trainer);
        assert_eq!(stub.held(), [0; 2], "cycle {cycle}");
    }
    assert_eq!(stub.number("violations"), 0);
    assert_eq!(threads(), before);
}
