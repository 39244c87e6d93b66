//! What a step's operations run on.

use std::sync::OnceLock;

use forebay_kernels::cuda;

use crate::error::{Error, Result};

/// What operations run on, as far as it matters to the sizes of their workspaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// The host device, on so many threads.
    Host {
        /// Threads of the operations.
        threads: usize,
    },
    /// A CUDA device.
    Cuda,
}

/// A CUDA stream of the caller's own, PyTorch's current one for instance, for a trainer to compute on: what
/// the caller queues there before a step comes before it, and what he queues after it comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternalStream(u64);

impl ExternalStream {
    /// From the driver's handle (a `CUstream`; a `cudaStream_t` is one).
    ///
    /// # Safety
    /// It is a stream of the first device's primary context (which trainers make current on the threads that
    /// call them, as CUDA's runtime does), and lives as long as any trainer that computes on it.
    pub unsafe fn new(stream: *mut std::ffi::c_void) -> Self {
        Self(stream as u64)
    }

    pub(crate) fn handle(self) -> cuda::sys::CUstream {
        self.0 as cuda::sys::CUstream
    }
}

/// On which device a trainer computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU where there is one that can be used, the host device elsewhere; or what the
    /// environment variable `FOREBAY_DEVICE` (`host` or `cuda`) says.
    #[default]
    Auto,
    /// The CPU, in the shape of a GPU.
    Host,
    /// The GPU, or an error that says what is missing.
    Cuda,
}

impl DeviceChoice {
    /// What that is on this machine; `threads` is for the host device.
    ///
    /// # Errors
    /// [`Error::NoDevice`] where a GPU is demanded and there is none.
    pub fn target(self, threads: usize) -> Result<Target> {
        let host = Target::Host { threads };
        match self.demanded()? {
            Self::Host => Ok(host),
            Self::Cuda => usable()
                .map(|()| Target::Cuda)
                .map_err(|why| Error::NoDevice {
                    wanted: "cuda",
                    why,
                }),
            Self::Auto if usable().is_ok() => Ok(Target::Cuda),
            Self::Auto => Ok(host),
        }
    }

    /// Why the host device computes where a GPU was not ruled out; nothing otherwise.
    pub fn fallback(self) -> Option<String> {
        match self.demanded() {
            Ok(Self::Auto) => usable().err(),
            _ => None,
        }
    }

    fn demanded(self) -> Result<Self> {
        match (self, std::env::var("FOREBAY_DEVICE")) {
            (Self::Auto, Ok(text)) => text
                .parse()
                .map_err(|why| Error::Misuse(format!("FOREBAY_DEVICE: {why}"))),
            _ => Ok(self),
        }
    }
}

/// Whether the GPU can be used; asked once.
fn usable() -> Result<(), String> {
    static USABLE: OnceLock<Result<(), String>> = OnceLock::new();
    let look = || cuda::usable().map(|_| ());
    USABLE
        .get_or_init(|| look().map_err(|error| error.to_string()))
        .clone()
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("'{text}' is not a device: use auto, host or cuda")),
        }
    }
}
