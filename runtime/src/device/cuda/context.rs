//! The device's primary context (the one that PyTorch uses too), memory in it and host memory known to it.

use forebay_kernels::cuda::{CudaError, check, sys};
use forebay_pinned::Arena;

use crate::device::Span;

/// The primary context of the first device, kept alive.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: contexts belong to the process; the driver's calls may come from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Takes it and makes it current on this thread.
    pub(super) fn new() -> Result<Self, CudaError> {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: valid places; `probe` has initialized the driver.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, 0))?;
            let kept = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
            check("cuDevicePrimaryCtxRetain", kept)?;
        }
        let all = Self { device, context };
        all.bind();
        Ok(all)
    }

    /// Makes it current on this thread.
    pub(super) fn bind(&self) {
        // SAFETY: a context that is kept. What a lost one refuses, the next call says.
        let _ = unsafe { sys::cuCtxSetCurrent(self.context) };
    }

    pub(super) fn device(&self) -> sys::CUdevice {
        self.device
    }

    pub(super) fn name(&self) -> String {
        let mut name = [0u8; 128];
        // SAFETY: a buffer as long as is said.
        let done = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, self.device) };
        let end = name.iter().position(|c| *c == 0).unwrap_or(0);
        match check("cuDeviceGetName", done) {
            Ok(()) => String::from_utf8_lossy(&name[..end]).into_owned(),
            Err(_) => "unknown".to_owned(),
        }
    }

    pub(super) fn free_memory(&self) -> u64 {
        let (mut free, mut all) = (0, 0);
        // SAFETY: valid places, in the current context.
        let done = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut all) };
        check("cuMemGetInfo", done).map_or(0, |()| free as u64)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: taken by `new`, given back once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// One allocation of device memory.
pub(super) struct Memory {
    address: u64,
    bytes: u64,
}

impl Memory {
    pub(super) fn new(bytes: u64) -> Result<Self, CudaError> {
        let mut address = 0;
        // SAFETY: a valid place, in the current context.
        let done = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1) as usize) };
        check("cuMemAlloc", done)?;
        Ok(Self { address, bytes })
    }

    pub(super) fn span(&self) -> Span {
        Span {
            address: self.address,
            bytes: self.bytes,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; the streams are empty.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// An arena of host memory that copies and kernels of the device reach by themselves.
pub(super) struct Registered {
    arena: Arena,
    /// Where kernels find it.
    on_device: u64,
}

impl Registered {
    pub(super) fn new(arena: &Arena) -> Result<Self, CudaError> {
        let (base, bytes) = (arena.base().cast(), arena.capacity());
        // Mapped, so that kernels can read it; known to every context; never write-combined.
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: mapped memory, kept until it is unregistered.
        let done = unsafe { sys::cuMemHostRegister_v2(base, bytes as usize, flags) };
        check("cuMemHostRegister", done)?;
        // From here on it is given back.
        let mut all = Self {
            arena: arena.clone(),
            on_device: 0,
        };
        // SAFETY: a valid place, and memory that was just registered to be mapped.
        let mapped = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut all.on_device, base, 0) };
        check("cuMemHostGetDevicePointer", mapped)?;
        Ok(all)
    }

    /// All of it, as kernels see it.
    pub(super) fn span(&self) -> Span {
        Span {
            address: self.on_device,
            bytes: self.arena.capacity(),
        }
    }

    /// Where kernels find a byte of it.
    pub(super) fn on_device(&self, host: *const u8) -> Option<u64> {
        let offset = (host as u64).checked_sub(self.arena.base() as u64)?;
        (offset < self.arena.capacity()).then(|| self.on_device + offset)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered by `new`, still mapped, used by no stream.
        let _ = unsafe { sys::cuMemHostUnregister(self.arena.base().cast()) };
    }
}

/// A word of host memory that kernels can write.
pub(super) struct HostWord {
    host: *mut u32,
    device: u64,
}

// SAFETY: read and written as one word, volatile, by whoever likes.
unsafe impl Send for HostWord {}
// SAFETY: as above.
unsafe impl Sync for HostWord {}

impl HostWord {
    pub(super) fn new() -> Result<Self, CudaError> {
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: valid places, in the current context; the word is written before it is shared.
        unsafe {
            let allocated = sys::cuMemHostAlloc(&raw mut host, 64, flags);
            check("cuMemHostAlloc", allocated)?;
            host.cast::<u32>().write(0);
        }
        // From here on it is given back.
        let mut word = Self {
            host: host.cast(),
            device: 0,
        };
        // SAFETY: a valid place, and memory that was just allocated to be mapped.
        let mapped = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut word.device, host, 0) };
        check("cuMemHostGetDevicePointer", mapped)?;
        Ok(word)
    }

    pub(super) fn on_device(&self) -> u64 {
        self.device
    }

    pub(super) fn get(&self) -> u32 {
        // SAFETY: a word of memory that lives as long as this.
        unsafe { self.host.read_volatile() }
    }
}

impl Drop for HostWord {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; no kernel runs any more.
        let _ = unsafe { sys::cuMemFreeHost(self.host.cast()) };
    }
}
