//! A stand-in for libcuda, libnvrtc and libcublasLt on machines with no GPU: one shared library that
//! a program finds under all three names.
//!
//! It keeps what CUDA promises about order and nothing more. What is queued on a stream runs later,
//! in order on that stream, and between streams in any order that events allow, drawn at random;
//! copies read and write page-locked memory when they run, not when they are called. Device memory is
//! memory of its own, filled with ones bits (NaN) before and after its life; what lies outside of it
//! is an illegal address. So what works here by luck of timing is rare, and what reads too early, or
//! reuses a place too early, gives other numbers.
//!
//! Settings come from environment variables, or as `NAME=value;NAME=value` through
//! [`forebay_stub_configure`], which also makes a lost device whole and forgets all counts:
//!
//! | variable | what |
//! |---|---|
//! | `FOREBAY_STUB_SEED` | which orders and delays (drawn from it; threads add their own) |
//! | `FOREBAY_STUB_FAIL` | `function:n:code`: the n-th call, from 1, fails so; several by commas |
//! | `FOREBAY_STUB_LOSE` | `n:code`: at the n-th operation run the device is lost, for good |
//! | `FOREBAY_STUB_STOP` | `n`: nothing runs from the n-th operation on, and nobody is told |
//! | `FOREBAY_STUB_IGNORE_WAITS` | `1`: streams do not wait for events (a planted defect) |
//! | `FOREBAY_STUB_EARLY_EVENTS` | `1`: events happen when they are recorded (another) |
//! | `FOREBAY_STUB_MEMORY` | bytes of device memory (256 MiB) |
//!
//! `driver` is libcuda, `compiler` libnvrtc, `blas` libcublasLt; `machine` holds streams, events and
//! memory and runs what is queued. Kernels are known by name and signature, as their CUDA source has
//! it, and computed by simple loops: `kernels` is the one table to extend.

mod blas;
mod call;
mod compiler;
mod driver;
mod kernels;
mod machine;
mod memory;
mod settings;
mod source;

use call::Text;
use machine::machine;

/// Sets everything anew: see the crate. Whoever still waits is let go.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_configure(settings: Text) {
    machine().configure(settings.get());
}

/// Calls of a function since the settings were made, or of any on the calling thread.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_count(function: Text, this_thread: bool) -> u64 {
    if this_thread {
        call::count_here(function.get())
    } else {
        machine().lock().count(function.get())
    }
}

/// Operations that have run since the settings were made.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_executed() -> u64 {
    machine().lock().executed
}

/// Bytes of device memory that are allocated.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_device_bytes() -> u64 {
    machine().lock().memory.allocated()
}

/// Everything else that was taken and not given back: streams, events, modules, page-locked ranges,
/// contexts, and handles and descriptors of cuBLASLt.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_objects() -> u64 {
    let state = machine().lock();
    let objects = state.objects() + state.memory.locked();
    drop(state);
    objects + blas::objects()
}

/// Uses that CUDA allows to go wrong: memory freed or unlocked under what is queued, say. Each
/// was printed.
#[unsafe(no_mangle)]
extern "C" fn forebay_stub_violations() -> u64 {
    machine().lock().violations
}
