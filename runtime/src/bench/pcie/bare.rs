//! The ceiling of the link: bare copies in a plain loop, and no engine. On a GPU between the driver's own
//! page-locked memory and its own device memory, on its own streams; on the host device a thread each
//! way that copies memory.

use std::time::Instant;

use forebay_kernels::cuda::{CudaError, check, sys};

use super::super::Slice;
use super::super::gpu::{BareStream, COPIES, DeviceMemory, Gpu, HostMemory, failed};
use super::{Batch, Places};
use crate::error::Result;
use crate::nvme::bench::{cpu_seconds, noise};

/// See the module.
pub(super) enum Bare {
    /// Between the places that ours uses too.
    Host(Places),
    Cuda(Box<Cuda>),
}

impl Bare {
    pub(super) fn cuda(window: u64) -> Result<Self> {
        let cuda = Cuda::new(window).map_err(failed(COPIES))?;
        Ok(Self::Cuda(Box::new(cuda)))
    }

    /// One slice.
    ///
    /// # Safety
    /// Nobody else uses the places of [`Bare::Host`] meanwhile.
    pub(super) unsafe fn slice(&mut self, batch: Batch) -> Result<Slice> {
        let (cpu, start) = (cpu_seconds(), Instant::now());
        match self {
            // SAFETY: by the contract above.
            Self::Host(places) => unsafe { memory(*places, batch) },
            Self::Cuda(cuda) => cuda.copies(batch).map_err(failed(COPIES))?,
        }
        Ok(Slice {
            bytes: batch.bytes(),
            seconds: start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - cpu,
        })
    }
}

/// # Safety
/// The places are the caller's.
unsafe fn memory(places: Places, batch: Batch) {
    let one_way = |from: u64, to: u64| {
        for piece in 0..batch.copies {
            let at = batch.offset(piece, places.window);
            // SAFETY: both places are `window` bytes, and the caller's.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (from + at) as *const u8,
                    (to + at) as *mut u8,
                    batch.size as usize,
                );
            }
        }
    };
    std::thread::scope(|scope| {
        if batch.way.into_device() {
            scope.spawn(|| one_way(places.slabs[0], places.slots[0]));
        }
        if batch.way.out_of_device() {
            scope.spawn(|| one_way(places.slots[1], places.slabs[1]));
        }
    });
}

pub(super) struct Cuda {
    // The streams go first, and wait for what they were given.
    streams: [BareStream; 2],
    host: [HostMemory; 2],
    device: [DeviceMemory; 2],
    window: u64,
}

impl Cuda {
    fn new(window: u64) -> Result<Self, CudaError> {
        let gpu = Gpu::new()?;
        let mut all = Self {
            streams: [BareStream::new(&gpu)?, BareStream::new(&gpu)?],
            host: [
                HostMemory::new(&gpu, window)?,
                HostMemory::new(&gpu, window)?,
            ],
            device: [
                DeviceMemory::new(&gpu, window)?,
                DeviceMemory::new(&gpu, window)?,
            ],
            window,
        };
        noise(all.host[0].bytes(), 1);
        for device in &all.device {
            let from = all.host[0].address();
            // SAFETY: both places are `window` bytes, and live past the wait.
            let done = unsafe {
                sys::cuMemcpyHtoDAsync_v2(
                    device.address(),
                    from.cast(),
                    window as usize,
                    all.streams[0].stream,
                )
            };
            check("cuMemcpyHtoDAsync", done)?;
        }
        all.streams[0].synchronize()?;
        Ok(all)
    }

    fn copies(&mut self, batch: Batch) -> Result<(), CudaError> {
        let (size, [h2d, d2h]) = (batch.size as usize, &self.streams);
        for piece in 0..batch.copies {
            let at = batch.offset(piece, self.window);
            if batch.way.into_device() {
                let from = self.host[0].address().wrapping_add(at as usize);
                let to = self.device[0].address() + at;
                // SAFETY: both places lie in memory of this value, which outlives its streams.
                let done = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), size, h2d.stream) };
                check("cuMemcpyHtoDAsync", done)?;
            }
            if batch.way.out_of_device() {
                let to = self.host[1].address().wrapping_add(at as usize);
                let from = self.device[1].address() + at;
                // SAFETY: as above.
                let done = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, size, d2h.stream) };
                check("cuMemcpyDtoHAsync", done)?;
            }
        }
        h2d.synchronize()?;
        d2h.synchronize()
    }
}
