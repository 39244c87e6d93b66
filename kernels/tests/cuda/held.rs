//! The device's primary context, held for a test. Used by the tests of the whole too.

use forebay_kernels::cuda::{check, sys};

/// Given back on drop.
pub(crate) struct Held(pub(crate) sys::CUdevice);

impl Held {
    /// Of the first device, and current on this thread.
    pub(crate) fn new() -> Self {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, 0)).unwrap();
            let kept = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
            check("cuDevicePrimaryCtxRetain", kept).unwrap();
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context)).unwrap();
        }
        Self(device)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.0) };
    }
}
