//! What the tests run on: a device, buffers on it, random values, and how close is close.

use forebay_kernels::cpu::{self, Workers};
use forebay_kernels::cuda::ops::Queue;
use forebay_kernels::cuda::{Element, Kernels, check, probe, sys};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::held::Held;

/// The order of fields is that of their end: the context goes last.
pub(crate) struct Gpu {
    pub(crate) kernels: Kernels,
    pub(crate) fault: Buffer,
    _held: Held,
}

/// Device memory of a test.
pub(crate) struct Buffer {
    pub(crate) address: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn new(bytes: usize) -> Self {
        let mut address = 0;
        let done = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(16)) };
        check("cuMemAlloc", done).unwrap();
        // Whoever reads what was never written finds NaN.
        let done = unsafe { sys::cuMemsetD8_v2(address, 0xff, bytes) };
        check("cuMemsetD8", done).unwrap();
        Self { address, bytes }
    }

    pub(crate) fn of<T: Copy>(values: &[T]) -> Self {
        let all = Self::new(size_of_val(values));
        let done = unsafe { sys::cuMemcpyHtoD_v2(all.address, values.as_ptr().cast(), all.bytes) };
        check("cuMemcpyHtoD", done).unwrap();
        all
    }

    pub(crate) fn get<T: Copy + Default>(&self) -> Vec<T> {
        let mut values = vec![T::default(); self.bytes / size_of::<T>()];
        let done = unsafe {
            check("cuCtxSynchronize", sys::cuCtxSynchronize()).unwrap();
            sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), self.address, self.bytes)
        };
        check("cuMemcpyDtoH", done).unwrap();
        values
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Page-locked host memory of a test, as kernels see it.
pub(crate) struct Mapped {
    host: *mut std::ffi::c_void,
    pub(crate) address: u64,
}

impl Mapped {
    /// With what a buffer holds.
    pub(crate) fn of(buffer: &Buffer) -> Self {
        let mut all = Self {
            host: std::ptr::null_mut(),
            address: 0,
        };
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        unsafe {
            let done = sys::cuMemHostAlloc(&raw mut all.host, buffer.bytes, flags);
            check("cuMemHostAlloc", done).unwrap();
            let done = sys::cuMemHostGetDevicePointer_v2(&raw mut all.address, all.host, 0);
            check("cuMemHostGetDevicePointer", done).unwrap();
            let done = sys::cuMemcpyDtoH_v2(all.host, buffer.address, buffer.bytes);
            check("cuMemcpyDtoH", done).unwrap();
        }
        all
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        unsafe { sys::cuMemFreeHost(self.host) };
    }
}

/// Values in the type under test, and what they are in f32.
pub(crate) struct Values {
    pub(crate) element: Element,
    pub(crate) exact: Vec<f32>,
}

impl Values {
    pub(crate) fn on_device(&self) -> Buffer {
        match self.element {
            Element::F32 => Buffer::of(&self.exact),
            element => {
                let low = self.exact.iter().map(|x| bits(element, *x));
                Buffer::of(&low.collect::<Vec<u16>>())
            }
        }
    }
}

/// As a type of two bytes has it, rounded as the CPU rounds.
pub(crate) fn bits(element: Element, x: f32) -> u16 {
    match element {
        Element::F16 => cpu::round_to_f16(x).to_bits(),
        _ => cpu::round_to_bf16(x).to_bits(),
    }
}

pub(crate) fn floats(element: Element, buffer: &Buffer) -> Vec<f32> {
    match element {
        Element::F32 => buffer.get(),
        Element::Bf16 => {
            let low = buffer.get::<u16>();
            low.iter()
                .map(|x| f32::from_bits(u32::from(*x) << 16))
                .collect()
        }
        Element::F16 => {
            let low = buffer.get::<u16>().into_iter();
            low.map(|x| half::f16::from_bits(x).to_f32()).collect()
        }
    }
}

pub(crate) struct Trial<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) element: Element,
    pub(crate) workers: Workers,
    pub(crate) random: ChaCha8Rng,
}

impl Trial<'_> {
    pub(crate) fn queue(&self) -> Queue<'_> {
        Queue {
            kernels: &self.gpu.kernels,
            stream: std::ptr::null_mut(),
            element: self.element,
        }
    }

    pub(crate) fn values(&mut self, n: usize, scale: f32) -> Values {
        let element = self.element;
        let exact = (0..n).map(|_| {
            let x = self.random.random_range(-scale..scale);
            match element {
                Element::F32 => x,
                Element::Bf16 => cpu::round_to_bf16(x).to_f32(),
                Element::F16 => cpu::round_to_f16(x).to_f32(),
            }
        });
        let exact = exact.collect();
        Values { element, exact }
    }

    pub(crate) fn room(&self, n: usize) -> Buffer {
        Buffer::new(n * self.element.bytes())
    }

    /// ‖a-b‖/‖b‖ within what the type allows.
    pub(crate) fn close(&self, what: &str, got: &[f32], wanted: &[f32]) {
        self.within(
            what,
            got,
            wanted,
            match self.element {
                Element::F32 => 3e-6,
                Element::Bf16 => 4e-3,
                Element::F16 => 1e-3,
            },
        );
    }

    pub(crate) fn within(&self, what: &str, got: &[f32], wanted: &[f32], limit: f64) {
        assert_eq!(got.len(), wanted.len(), "{what}");
        let (mut off, mut size) = (0.0f64, 0.0f64);
        for (a, b) in got.iter().zip(wanted) {
            off += (f64::from(*a) - f64::from(*b)).powi(2);
            size += f64::from(*b).powi(2);
        }
        let error = (off / size.max(1e-30)).sqrt();
        println!("{what} {:?}: {error:.1e}", self.element);
        // Next to nothing f16 has steps of 2^-24, whatever is beside them.
        let steps = (got.len() as f64).sqrt() * 2f64.powi(-24);
        let next_to_nothing = self.element == Element::F16 && off.sqrt() <= steps;
        assert!(
            error <= limit || next_to_nothing,
            "{what} {:?}: {error:e} > {limit:e}",
            self.element
        );
    }
}

/// Runs `test` in each type, or says that it did not.
pub(crate) fn on_a_gpu(test: impl Fn(&mut Trial<'_>)) {
    if let Err(error) = probe().and_then(|_| forebay_kernels::cuda::libraries()) {
        assert!(std::env::var_os("FOREBAY_REQUIRE_GPU").is_none(), "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    let held = Held::new();
    let fault = Buffer::of(&[0u32; 4]);
    let kernels = Kernels::new(held.0, fault.address).unwrap();
    let gpu = Gpu {
        kernels,
        fault,
        _held: held,
    };
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    for element in [Element::F32, Element::Bf16, Element::F16] {
        println!("seed {seed}");
        let workers =
            Workers::new(std::thread::available_parallelism().unwrap().into(), "t").unwrap();
        let random = ChaCha8Rng::seed_from_u64(seed);
        test(&mut Trial {
            gpu: &gpu,
            element,
            workers,
            random,
        });
    }
    assert_eq!(gpu.fault.get::<u32>()[0], 0, "no input was bad");
}
