//! What every device must do, tried on all that are here: order within a stream, order between
//! streams by events alone, errors that stick.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_kernels::cuda::Args;
use forebay_pinned::Slab;

use super::*;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::ops;
use crate::target::DeviceChoice;
use crate::tensor::{DType, Shape, Tensor, TensorMut, View};

/// Adds one to every element, after a while.
#[derive(Clone, Copy)]
struct SlowIncrement(u64);

const INCREMENT: &str = r#"
extern "C" __global__ void slow_increment(float* x, u64 n, u64 nanoseconds) {
    u64 start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) x[i] += 1.0f;
}
extern "C" __global__ void trap() { asm("trap;"); }
"#;

impl Operation for SlowIncrement {
    fn name(&self) -> &'static str {
        "slow increment"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        std::thread::sleep(Duration::from_millis(self.0));
        args.output::<f32>()?.iter_mut().for_each(|x| *x += 1.0);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let x = args.output()?;
        let args = Args::new().with(x.address).with(x.elements as u64);
        let mut args = args.with(self.0 * 1_000_000);
        let source = cx.kernels.source("tests", INCREMENT);
        source.map_err(|e| e.to_string())?;
        let name = ("slow_increment", None);
        // SAFETY: as the kernel takes them.
        let done = unsafe {
            cx.kernels
                .launch(cx.stream, name, [1; 3], [256, 1], 0, &mut args)
        };
        done.map_err(|e| e.to_string())
    }
}

#[derive(Clone, Copy)]
struct Fail;

impl Operation for Fail {
    fn name(&self) -> &'static str {
        "fail"
    }

    fn host(&self, _: &HostContext, _: HostArgs<'_>) -> Result<(), String> {
        Err("on purpose".to_owned())
    }

    fn cuda(&self, _: &CudaContext<'_>, _: CudaArgs<'_>) -> Result<(), String> {
        Err("on purpose".to_owned())
    }
}

/// All that are here. `FOREBAY_REQUIRE_GPU=1` makes a missing GPU a failure.
fn devices() -> Vec<Box<dyn Device>> {
    let mut targets = vec![Target::Host { threads: 2 }];
    match DeviceChoice::Cuda.target(2) {
        Ok(cuda) => targets.push(cuda),
        Err(error) if std::env::var_os("FOREBAY_REQUIRE_GPU").is_some() => panic!("{error}"),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    let open = |target| open(target, 1 << 20, &Arc::new(Notifier::default()), None).unwrap();
    targets.into_iter().map(open).collect()
}

fn view(device: &dyn Device, at: u64, elements: usize) -> View {
    let address = device.memory().address + at;
    View {
        address,
        dtype: DType::F32,
        shape: Shape::from([elements]),
    }
}

fn span(view: View) -> Span {
    Span {
        address: view.address,
        bytes: view.bytes(),
    }
}

fn increment(device: &mut dyn Device, view: View, millis: u64) {
    let output = [TensorMut::new(view)];
    let launch = Launch::new(SlowIncrement(millis), &[], &output).unwrap();
    // SAFETY: the view is in device memory, and what uses it is ordered by the test.
    unsafe { device.launch(launch) };
}

#[test]
fn streams_run_in_order_and_wait_for_each_other_by_events_alone() {
    for mut device in devices() {
        let device = &mut *device;
        let place = view(device, 256, 1000);
        let source = vec![1.0f32; 1000];
        let mut back = vec![0.0f32; 1000];
        for round in 0..5 {
            // SAFETY: `source` and `back` outlive the drain below; events order the streams.
            let last = unsafe {
                let copied = device.copy_in(Stream::H2d, span(place), source.as_ptr().cast());
                device.wait(Stream::Compute, copied);
                increment(device, place, 20);
                increment(device, place, 20);
                let computed = device.newest(Stream::Compute);
                assert!(
                    !device.query(computed).unwrap(),
                    "it takes 40 ms and was only queued"
                );
                device.wait(Stream::D2h, computed);
                let out = device.copy_out(Stream::D2h, span(place), back.as_mut_ptr().cast());
                device.wait(Stream::H2d, out);
                out
            };
            while !device.query(last).unwrap() {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(back.iter().all(|x| *x == 3.0), "round {round}: {}", back[0]);
        }
        device.drain();
        let busy = device.busy(Stream::Compute);
        assert!(busy >= Duration::from_millis(200), "{busy:?}");
        assert!(device.busy(Stream::D2h) < busy, "waiting is not work");
    }
}

#[test]
fn a_stream_that_rests_between_events_is_not_busy_then() {
    for mut device in devices() {
        let device = &mut *device;
        let place = view(device, 0, 64);
        let (rest, began) = (Duration::from_millis(5), Instant::now());
        for _ in 0..10 {
            let marks = [(); 3].map(|()| {
                increment(device, place, 1);
                device.newest(Stream::Compute)
            });
            while !device.query(marks[2]).unwrap() {
                std::thread::sleep(Duration::from_micros(100));
            }
            std::thread::sleep(rest);
        }
        let (busy, worked) = (device.busy(Stream::Compute), began.elapsed() - 10 * rest);
        let least = Duration::from_millis(30);
        assert!(
            busy >= least && busy <= worked,
            "busy for {busy:?} of at most {worked:?}"
        );
    }
}

#[test]
fn a_stream_that_waits_behind_work_of_its_own_is_not_busy_then() {
    for mut device in devices() {
        let device = &mut *device;
        let place = view(device, 0, 64);
        let mut back = vec![0.0f32; 64];
        for _ in 0..3 {
            increment(device, place, 40);
            let computed = device.newest(Stream::Compute);
            device.wait(Stream::D2h, computed);
            // SAFETY: `back` outlives the drain below; events order the streams.
            unsafe { device.copy_out(Stream::D2h, span(place), back.as_mut_ptr().cast()) };
        }
        let last = device.newest(Stream::D2h);
        while !device.query(last).unwrap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        device.drain();
        let busy = device.busy(Stream::D2h);
        // The stub does one thing at a time: others' work may come between a start and its end.
        let stub = std::env::var_os(harness::INSIDE).is_some();
        assert!(
            stub || busy < Duration::from_millis(40),
            "busy for {busy:?}"
        );
    }
}

#[test]
fn zeros_and_copies_stay_on_the_compute_stream() {
    for mut device in devices() {
        let device = &mut *device;
        let (a, b) = (view(device, 0, 64), view(device, 1024, 64));
        let mut back = vec![9.0f32; 64];
        // SAFETY: everything is on one stream; `back` outlives the drain.
        unsafe {
            device.zero(span(a));
            increment(device, a, 0);
            device.copy(a.address, span(b));
            increment(device, a, 0);
            device.copy_out(Stream::Compute, span(b), back.as_mut_ptr().cast());
        }
        device.drain();
        assert!(back.iter().all(|x| *x == 1.0));
    }
}

#[test]
fn the_first_failure_sticks_to_every_stream() {
    for mut device in devices() {
        let device = &mut *device;
        // SAFETY: it touches no memory.
        unsafe { device.launch(Launch::new(Fail, &[], &[]).unwrap()) };
        let event = device.newest(Stream::Compute);
        device.drain();
        for event in [
            event,
            Event {
                stream: Stream::H2d,
                seq: 0,
            },
        ] {
            let error = device.query(event).unwrap_err();
            assert!(error.to_string().contains("'fail': on purpose"), "{error}");
        }
    }
}

#[test]
fn outputs_that_overlap_anything_are_refused_before_they_are_queued() {
    for mut device in devices() {
        let device = &mut *device;
        let (a, b) = (view(device, 0, 64), view(device, 128, 64));
        let refused = Launch::new(SlowIncrement(0), &[Tensor::new(a)], &[TensorMut::new(b)]);
        assert!(
            refused.is_err(),
            "the last half of one is the first half of the other"
        );
        let outputs = [TensorMut::new(a), TensorMut::new(b)];
        assert!(Launch::new(SlowIncrement(0), &[], &outputs).is_err());
    }
}

/// Page-locked memory that a device knows, and a view of it as operations see it.
fn pinned(device: &mut dyn Device) -> (Slab, View) {
    let arena = Arena::new(1 << 16).unwrap();
    // The view is not where the arena begins.
    let (before, slab) = (arena.lease(4096).unwrap(), arena.lease(4096).unwrap());
    device.pin(&arena).unwrap();
    drop(before);
    let address = device.mapped(slab.address()).unwrap();
    let shape = Shape::from([64]);
    let dtype = DType::F32;
    (
        slab,
        View {
            address,
            dtype,
            shape,
        },
    )
}

fn narrowed(device: &dyn Device) -> View {
    View {
        dtype: DType::Bf16,
        ..view(device, 1 << 16, 64)
    }
}

#[test]
fn operations_read_memory_that_was_pinned_as_it_is_when_they_run() {
    for mut device in devices() {
        let device = &mut *device;
        assert_eq!(device.mapped([0u8; 8].as_ptr()), None);
        let (mut slab, table) = pinned(device);
        let to = narrowed(device);
        for value in [1.0f32, 2.0] {
            bytemuck::cast_slice_mut(&mut slab[..256]).fill(value);
            let mut back = vec![half::bf16::ZERO; 64];
            // SAFETY: nobody writes the slab before the drain, which `back` outlives.
            unsafe {
                device.launch(ops::narrow(table, to).unwrap());
                device.copy_out(Stream::Compute, span(to), back.as_mut_ptr().cast());
            }
            device.drain();
            assert!(back.iter().all(|x| x.to_f32() == value), "{}", back[0]);
        }
        // The arena ends where it ends.
        let end = slab.address().wrapping_add((1 << 16) - 4096);
        assert!(device.mapped(end.wrapping_sub(1)).is_some());
        assert_eq!(device.mapped(end), None);
    }
}

#[test]
#[should_panic(expected = "outside the device")]
fn an_operation_never_writes_memory_that_was_pinned() {
    let mut device = devices().swap_remove(0);
    let (_slab, place) = pinned(&mut *device);
    increment(&mut *device, place, 0);
}

#[test]
#[should_panic(expected = "outside the device")]
fn an_operation_never_reads_beyond_memory_that_was_pinned() {
    let mut device = devices().swap_remove(0);
    let (_slab, mut place) = pinned(&mut *device);
    place.shape = Shape::from([(1 << 16) / 4]);
    let launch = ops::narrow(place, narrowed(&*device)).unwrap();
    // SAFETY: it panics before anything is touched.
    unsafe { device.launch(launch) };
}

#[test]
#[should_panic(expected = "outside device memory")]
fn a_copy_outside_the_budget_never_starts() {
    let mut device = devices().swap_remove(0);
    let end = device.memory().address + device.memory().bytes;
    let beyond = Span {
        address: end - 4,
        bytes: 8,
    };
    // SAFETY: it panics before anything is touched.
    unsafe { device.copy_in(Stream::H2d, beyond, [0u8; 8].as_ptr()) };
}

#[path = "../../../tests/stub/harness.rs"]
pub(crate) mod harness;

/// All of the above, on the `cuda` device, with no GPU: on a stub of CUDA, in many legal orders.
#[test]
fn the_stub_of_cuda_conforms_in_every_order_and_a_broken_one_does_not() {
    let own = "the_stub_of_cuda";
    let run = |settings: &[(&str, &str)]| harness::run("device::tests::", Some(own), settings);
    let seeds = std::env::var("FOREBAY_STUB_SEEDS").map_or(8, |n| n.parse().unwrap());
    for seed in 0..seeds {
        run(&[("FOREBAY_STUB_SEED", &seed.to_string())]).unwrap();
    }
    for defect in ["FOREBAY_STUB_IGNORE_WAITS", "FOREBAY_STUB_EARLY_EVENTS"] {
        let seeds = (0..5).map(|seed: u32| seed.to_string());
        let noticed = |seed: String| run(&[(defect, "1"), ("FOREBAY_STUB_SEED", &seed)]).is_err();
        assert!(seeds.into_iter().any(noticed), "{defect} goes unnoticed");
    }
}
