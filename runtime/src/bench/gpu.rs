//! What bare code needs of a GPU, straight from the driver: a context, memory, streams, events. No
//! engine in it.

use std::rc::Rc;

use forebay_kernels::cuda::{CudaError, check, elapsed, sys};

use crate::error::Error;

/// What bare copies are called where they fail.
pub(super) const COPIES: &str = "bare copies";

/// What could not be measured, and why.
pub(super) fn failed(what: &'static str) -> impl Fn(CudaError) -> Error {
    move |error| Error::Measure {
        what,
        why: error.to_string(),
    }
}

/// The primary context of the first device, kept, and current on the thread that took it.
pub(super) struct Gpu {
    pub(super) device: sys::CUdevice,
}

impl Gpu {
    /// [`forebay_kernels::cuda::probe`] must have found a device.
    pub(super) fn new() -> Result<Rc<Self>, CudaError> {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: valid places; the driver was initialized by `probe`.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, 0))?;
            let kept = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
            check("cuDevicePrimaryCtxRetain", kept)?;
            let gpu = Self { device };
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            Ok(Rc::new(gpu))
        }
    }

    pub(super) fn free_bytes(&self) -> u64 {
        let (mut free, mut all) = (0, 0);
        // SAFETY: valid places, in the current context.
        let asked = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut all) };
        check("cuMemGetInfo", asked).map_or(0, |()| free as u64)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: taken by `new`, given back once; whatever lies in it keeps this alive.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// An allocation on the device.
pub(super) struct DeviceMemory {
    address: u64,
    _gpu: Rc<Gpu>,
}

impl DeviceMemory {
    pub(super) fn new(gpu: &Rc<Gpu>, bytes: u64) -> Result<Self, CudaError> {
        let mut address = 0;
        // SAFETY: a valid place, in the current context.
        let done = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(16) as usize) };
        check("cuMemAlloc", done)?;
        let _gpu = Rc::clone(gpu);
        Ok(Self { address, _gpu })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`. The driver waits for what still uses it.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Page-locked memory of the driver's own.
pub(super) struct HostMemory {
    address: *mut u8,
    bytes: usize,
    _gpu: Rc<Gpu>,
}

impl HostMemory {
    pub(super) fn new(gpu: &Rc<Gpu>, bytes: u64) -> Result<Self, CudaError> {
        let mut address = std::ptr::null_mut();
        // SAFETY: a valid place, in the current context.
        let done = unsafe { sys::cuMemHostAlloc(&raw mut address, bytes as usize, 0) };
        check("cuMemHostAlloc", done)?;
        let (address, bytes) = (address.cast::<u8>(), bytes as usize);
        // SAFETY: as long as was just allocated.
        unsafe { address.write_bytes(0x5a, bytes) };
        Ok(Self {
            address,
            bytes,
            _gpu: Rc::clone(gpu),
        })
    }

    pub(super) fn address(&self) -> *mut u8 {
        self.address
    }

    /// Its bytes; for when no copy is under way.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and written by `new`, this value's alone.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; streams that used it were waited for.
        let _ = unsafe { sys::cuMemFreeHost(self.address.cast()) };
    }
}

/// A stream of its own.
pub(super) struct BareStream {
    pub(super) stream: sys::CUstream,
    _gpu: Rc<Gpu>,
}

impl BareStream {
    pub(super) fn new(gpu: &Rc<Gpu>) -> Result<Self, CudaError> {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a valid place, in the current context.
        let made = unsafe { sys::cuStreamCreate(&raw mut stream, flags) };
        check("cuStreamCreate", made)?;
        let _gpu = Rc::clone(gpu);
        Ok(Self { stream, _gpu })
    }

    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: a stream that lives.
        let done = unsafe { sys::cuStreamSynchronize(self.stream) };
        check("cuStreamSynchronize", done)
    }

    /// An event, recorded here and now.
    pub(super) fn record(&self) -> Result<Moment, CudaError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a valid place, in the current context; then an event and a stream that live.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&raw mut event, 0))?;
            let moment = Moment(event);
            let recorded = sys::cuEventRecord(event, self.stream);
            check("cuEventRecord", recorded).map(|()| moment)
        }
    }
}

impl Drop for BareStream {
    fn drop(&mut self) {
        let _ = self.synchronize();
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}

/// An event with its time; it must go before its stream's context does.
pub(super) struct Moment(sys::CUevent);

impl Moment {
    /// Seconds from an earlier one, once both have come.
    pub(super) fn since(&self, earlier: &Self) -> Result<f64, CudaError> {
        // SAFETY: both were recorded, in the context that is kept.
        let millis = unsafe { elapsed(earlier.0, self.0)? };
        Ok(f64::from(millis) * 1e-3)
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // SAFETY: made by `record`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
