//! Numbers on a CUDA device: the same operations as [`crate::cpu`], as CUDA C++ compiled by NVRTC at
//! first use (and kept on disk), and cuBLASLt for matrix products.
//!
//! Nothing here owns device memory, a context or a stream: addresses and streams are the caller's.
//! The driver, NVRTC and cuBLASLt are looked for at run time; without them everything still builds
//! and [`probe`] says in a sentence what is missing.
//!
//! Sources are `cu/*.cu`, all behind `cu/common.cuh`; [`Kernels`] holds what was compiled for one
//! device, and each operation is a function of [`ops`].

mod attention;
mod compile;
mod error;
mod kernels;
mod library;
mod matmul;
pub mod ops;
mod optimizers;

pub use error::{CudaError, check};
pub use kernels::{Args, Element, Kernels};
pub use library::{Found, elapsed, free_bytes, libraries, probe, usable, versions};

/// The driver's own types, as cudarc names them.
pub use cudarc::driver::sys;
