//! All kernels, compiled for one device, and how one is launched.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::sys;

use super::compile::{Source, image};
use super::error::{CudaError, check};
use super::library;
use super::matmul::Blas;

macro_rules! source {
    ($file:literal, $fuse:literal) => {
        Source {
            file: $file,
            text: include_str!(concat!("cu/", $file, ".cu")),
            fuse: $fuse,
        }
    };
}

const SOURCES: [Source; 10] = [
    source!("adam", false),
    source!("attention", true),
    Source {
        file: "attention_mma",
        text: concat!(
            include_str!("cu/mma.cuh"),
            include_str!("cu/attention_mma.cuh"),
            include_str!("cu/attention_mma.cu")
        ),
        fuse: true,
    },
    // A source of its own, for sources are compiled side by side.
    Source {
        file: "attention_mma_f16",
        text: concat!(
            include_str!("cu/mma.cuh"),
            include_str!("cu/attention_mma.cuh"),
            include_str!("cu/attention_mma_f16.cu")
        ),
        fuse: true,
    },
    source!("cross_entropy", true),
    source!("elementwise", true),
    source!("embedding", true),
    source!("norm", true),
    source!("optimizers", false),
    source!("rope", false),
];

/// The type of activations and parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

impl Element {
    /// Bytes of one.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// A kernel without the type, and the type.
type Name = (&'static str, Option<Element>);

/// What operations need on one device: its kernels and cuBLASLt.
///
/// All calls come from one thread at a time, with the device's context current.
pub struct Kernels {
    /// By the name of their source.
    modules: RefCell<Vec<(&'static str, sys::CUmodule)>>,
    arch: String,
    /// With the most shared memory that each may have.
    functions: RefCell<HashMap<Name, (sys::CUfunction, u32)>>,
    pub(super) blas: Blas,
    pub(super) multiprocessors: u32,
    /// The most shared memory that a block may have, in bytes.
    pub(super) shared: usize,
    /// A word of mapped host memory that kernels set when they meet bad input.
    pub(super) fault: u64,
}

impl Kernels {
    /// Compiles, or finds, all kernels for the device of the current context. `fault` is the
    /// device's address of a word of host memory: see [`super::ops`].
    ///
    /// # Errors
    /// [`CudaError`]: a library that is missing, a device that is too old, the driver's refusals.
    pub fn new(device: sys::CUdevice, fault: u64) -> Result<Self, CudaError> {
        use sys::CUdevice_attribute_enum as Attribute;
        library::usable()?;
        let attribute = |which| -> Result<i32, CudaError> {
            let mut value = 0;
            // SAFETY: a valid place, and a device that the caller has.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
            check("cuDeviceGetAttribute", result).map(|()| value)
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let all = Self {
            modules: RefCell::default(),
            arch: format!("sm_{major}{minor}"),
            functions: RefCell::default(),
            blas: Blas::new()?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            fault,
        };
        // At the first use ever they are compiled, which takes seconds each.
        let images = std::thread::scope(|scope| {
            let arch = &all.arch;
            let images = SOURCES
                .each_ref()
                .map(|source| scope.spawn(|| image(source, arch)));
            images.map(std::thread::ScopedJoinHandle::join)
        });
        for (source, image) in SOURCES.iter().zip(images) {
            let died = |_| CudaError::Compile {
                file: source.file.to_owned(),
                arch: all.arch.clone(),
                log: "the compiler's thread died".to_owned(),
            };
            all.load(source, &image.map_err(died)??)?;
        }
        Ok(all)
    }

    /// Adds kernels of one's own: `text` is CUDA C++, compiled behind `cu/common.cuh` at first use. Their
    /// names must be no other kernel's. What is there already under `file` stays.
    ///
    /// # Errors
    /// [`CudaError::Compile`] with the compiler's words; the driver's refusals.
    pub fn source(&self, file: &'static str, text: &'static str) -> Result<(), CudaError> {
        if self.modules.borrow().iter().any(|(name, _)| *name == file) {
            return Ok(());
        }
        let fuse = true;
        let source = Source { file, text, fuse };
        self.load(&source, &image(&source, &self.arch)?)
    }

    fn load(&self, source: &Source, image: &[u8]) -> Result<(), CudaError> {
        let mut module = std::ptr::null_mut();
        // SAFETY: an image that NVRTC made, whole (its sum was checked), in the current context.
        let result =
            unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast::<c_void>()) };
        check("cuModuleLoadData", result)?;
        self.modules.borrow_mut().push((source.file, module));
        Ok(())
    }

    fn function(
        &self,
        name: &'static str,
        element: Option<Element>,
        shared: u32,
    ) -> Result<sys::CUfunction, CudaError> {
        let known = self.functions.borrow().get(&(name, element)).copied();
        if let Some((function, most)) = known {
            if shared > most {
                self.share(name, element, function, shared)?;
            }
            return Ok(function);
        }
        let full = match element {
            Some(element) => format!("{name}_{}", element.suffix()),
            None => name.to_owned(),
        };
        let symbol = CString::new(full).map_err(|e| CudaError::NoDevice(e.to_string()))?;
        let mut function = std::ptr::null_mut();
        let mut result = sys::CUresult::CUDA_ERROR_NOT_FOUND;
        for (_, module) in &*self.modules.borrow() {
            // SAFETY: modules of this context, loaded as long as this lives.
            result =
                unsafe { sys::cuModuleGetFunction(&raw mut function, *module, symbol.as_ptr()) };
            if result == sys::CUresult::CUDA_SUCCESS {
                break;
            }
        }
        check("cuModuleGetFunction", result)?;
        self.share(name, element, function, shared)?;
        Ok(function)
    }

    /// Lets a function have so much shared memory, and takes note of it.
    fn share(
        &self,
        name: &'static str,
        element: Option<Element>,
        function: sys::CUfunction,
        shared: u32,
    ) -> Result<(), CudaError> {
        let most = shared.max(48 << 10);
        if most > 48 << 10 {
            let which =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // As much of the cache as there is, so that as many blocks share it as fit.
            let carveout =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            for (which, value) in [(which, most as i32), (carveout, 100)] {
                // SAFETY: a function of this context.
                let result = unsafe { sys::cuFuncSetAttribute(function, which, value) };
                check("cuFuncSetAttribute", result)?;
            }
        }
        self.functions
            .borrow_mut()
            .insert((name, element), (function, most));
        Ok(())
    }

    /// Queues a kernel: `name`, or `name_float`, `name_bf16` or `name_f16` where a type is given.
    ///
    /// # Errors
    /// The driver's refusals.
    ///
    /// # Safety
    /// The arguments are what the kernel takes, in its order; what it reads and writes is the
    /// caller's until the stream has come past it.
    pub unsafe fn launch(
        &self,
        stream: sys::CUstream,
        (name, element): (&'static str, Option<Element>),
        grid: [u32; 3],
        block: [u32; 2],
        shared: u32,
        args: &mut Args,
    ) -> Result<(), CudaError> {
        let function = self.function(name, element, shared)?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MOST];
        for (pointer, value) in pointers.iter_mut().zip(&mut args.values[..args.count]) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        // SAFETY: by the contract above; the arguments are copied before the call returns.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                1,
                shared,
                stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result)
    }

    /// Blocks of 256 threads for `n` packs of 16 bytes: enough to fill the device, no more.
    pub(super) fn blocks(&self, n: usize) -> [u32; 3] {
        let most = self.multiprocessors as usize * 16;
        [n.div_ceil(256).clamp(1, most) as u32, 1, 1]
    }
}

/// The device's name, for people.
pub(super) fn device_name(device: sys::CUdevice) -> String {
    let mut name = [0u8; 128];
    // SAFETY: a buffer as long as is said.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device) };
    let end = name.iter().position(|c| *c == 0).unwrap_or(0);
    match result {
        sys::CUresult::CUDA_SUCCESS => String::from_utf8_lossy(&name[..end]).into_owned(),
        _ => "a CUDA device".to_owned(),
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        for (_, module) in self.modules.get_mut().drain(..) {
            // SAFETY: loaded by `new`, used by nobody any more. A context that is lost refuses.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernels for {}", self.arch)
    }
}

// SAFETY: modules, functions and the handle belong to a context, not to a thread.
unsafe impl Send for Kernels {}

const MOST: usize = 16;

/// A value of up to 64 bytes in a place of its own.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
struct Value([u8; 64]);

/// The arguments of a kernel.
#[derive(Debug)]
pub struct Args {
    values: [Value; MOST],
    count: usize,
}

impl Args {
    /// None yet.
    #[expect(
        clippy::new_without_default,
        reason = "an empty list of arguments is only a start"
    )]
    pub fn new() -> Self {
        Self {
            values: [Value([0; 64]); MOST],
            count: 0,
        }
    }

    /// One more, by its bytes: a number, an address, or a struct laid out as C does.
    ///
    /// # Panics
    /// For more than 16.
    #[must_use]
    pub fn with<T: Copy>(mut self, value: T) -> Self {
        const { assert!(size_of::<T>() <= 64 && align_of::<T>() <= 16) };
        let place = &mut self.values[self.count];
        // SAFETY: the place is as large and as aligned as was checked above.
        unsafe { place.0.as_mut_ptr().cast::<T>().write(value) };
        self.count += 1;
        self
    }
}
