//! What a CUDA device can refuse.

use std::ffi::CStr;

use cudarc::driver::sys;

/// Why something on a CUDA device cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver, or no device behind it.
    #[error("{0}")]
    NoDevice(String),
    /// A library of CUDA's is not there.
    #[error(
        "{library} cannot be loaded ({why}); install CUDA's run-time libraries (12 or 13), or name \
         the folder that holds it in FOREBAY_CUDA_LIBRARIES"
    )]
    NoLibrary {
        /// Which.
        library: &'static str,
        /// What the loader said.
        why: String,
    },
    /// The device cannot run the kernels.
    #[error("{name} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed")]
    TooOld {
        /// The device.
        name: String,
        /// Its compute capability, before the point.
        major: i32,
        /// And behind it.
        minor: i32,
    },
    /// The driver refused a call.
    #[error("{call}: {what}")]
    Driver {
        /// Which.
        call: &'static str,
        /// The driver's own words.
        what: String,
    },
    /// A kernel does not compile.
    #[error("compiling {file} for {arch}: {log}")]
    Compile {
        /// The source.
        file: String,
        /// For what.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// cuBLASLt refused a call.
    #[error("cuBLASLt, {what}: {status}")]
    Blas {
        /// Which.
        what: String,
        /// Its status.
        status: String,
    },
}

/// The driver's result as an error that names the call.
///
/// # Errors
/// [`CudaError::Driver`] for everything but success.
pub fn check(call: &'static str, result: sys::CUresult) -> Result<(), CudaError> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: a valid place for the answer; the driver was loaded, or there were no result.
    let found = unsafe { sys::cuGetErrorString(result, &raw mut text) };
    let what = if found == sys::CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: a constant string of the driver's.
        let words = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        format!("{words} ({result:?})")
    } else {
        format!("{result:?}")
    };
    Err(CudaError::Driver { call, what })
}
