//! Finding the driver, NVRTC and cuBLASLt, before anything calls them: cudarc panics where they are
//! missing.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::error::{CudaError, check};

/// What was found, for people.
#[derive(Clone, Debug)]
pub struct Found {
    /// CUDA version of the driver, as 13000 for 13.0.
    pub driver: i32,
    /// The first device's name.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Of which are free.
    pub free_bytes: u64,
    /// Its place on the bus as `/sys/bus/pci/devices` has it, where the driver says.
    pub bus: Option<String>,
}

/// Whether there is a driver with a device; asked once.
///
/// # Errors
/// [`CudaError::NoDevice`], in a sentence.
pub fn probe() -> Result<Found, CudaError> {
    static FOUND: OnceLock<Result<Found, CudaError>> = OnceLock::new();
    FOUND.get_or_init(look).clone()
}

fn look() -> Result<Found, CudaError> {
    let no = |why: String| CudaError::NoDevice(why);
    if let Err(error) = open("libcuda.so.1") {
        return Err(no(format!("no CUDA driver is installed ({error})")));
    }
    // SAFETY: the library is there; cuInit may be called at any time, from any thread.
    check("cuInit", unsafe { sys::cuInit(0) })
        .map_err(|error| no(format!("the CUDA driver finds no usable device: {error}")))?;
    let (mut driver, mut devices) = (0, 0);
    // SAFETY: valid places for the answers.
    unsafe {
        check(
            "cuDriverGetVersion",
            sys::cuDriverGetVersion(&raw mut driver),
        )?;
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut devices))?;
    }
    if devices == 0 {
        return Err(no("the CUDA driver finds no device".to_owned()));
    }
    if driver < 12000 {
        let (major, minor) = (driver / 1000, driver % 1000 / 10);
        return Err(no(format!(
            "the driver is for CUDA {major}.{minor}; 12.0 (driver 525) or newer is needed"
        )));
    }
    first(driver)
}

/// Bytes of the first device's memory that are free now.
///
/// # Errors
/// As [`probe`]; the driver's refusals.
pub fn free_bytes() -> Result<u64, CudaError> {
    first(probe()?.driver).map(|found| found.free_bytes)
}

/// Looks at the first device.
fn first(driver: i32) -> Result<Found, CudaError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let (mut device, mut context) = (0, std::ptr::null_mut());
    let (mut major, mut minor, mut free, mut total) = (0, 0, 0, 0);
    // SAFETY: valid places; the context is taken for the question and given back. Whatever was
    // current on this thread is again.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, 0))?;
        for (which, to) in [
            (
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                &mut major,
            ),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                &mut minor,
            ),
        ] {
            check(
                "cuDeviceGetAttribute",
                sys::cuDeviceGetAttribute(to, which, device),
            )?;
        }
        let kept = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
        check("cuDevicePrimaryCtxRetain", kept)?;
        let mut asked = check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context));
        if asked.is_ok() {
            asked = check(
                "cuMemGetInfo",
                sys::cuMemGetInfo_v2(&raw mut free, &raw mut total),
            );
            let _ = sys::cuCtxPopCurrent_v2(&raw mut context);
        }
        let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
        asked?;
    }
    Ok(Found {
        driver,
        name: super::kernels::device_name(device),
        capability: (major, minor),
        total_bytes: total as u64,
        free_bytes: free as u64,
        bus: bus(device),
    })
}

fn bus(device: sys::CUdevice) -> Option<String> {
    use sys::CUdevice_attribute_enum as Attribute;
    let ask = |which| {
        let mut value = 0;
        // SAFETY: a valid place, and a device that was just got.
        let asked = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
        check("cuDeviceGetAttribute", asked).ok().map(|()| value)
    };
    let domain = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    Some(format!("{domain:04x}:{bus:02x}:{slot:02x}.0"))
}

/// Whether the first device can compute: a driver, a device that the kernels run on, and the libraries
/// that they need.
///
/// # Errors
/// [`CudaError::NoDevice`], [`CudaError::TooOld`], [`CudaError::NoLibrary`].
pub fn usable() -> Result<Found, CudaError> {
    let found = probe()?;
    let (major, minor) = found.capability;
    if major < 8 {
        let name = found.name;
        return Err(CudaError::TooOld { name, major, minor });
    }
    libraries().map(|()| found)
}

/// Makes sure that NVRTC and cuBLASLt are there, and stay; asked once.
///
/// # Errors
/// [`CudaError::NoLibrary`].
pub fn libraries() -> Result<(), CudaError> {
    kept().map(|_| ())
}

/// NVRTC and cuBLASLt.
fn kept() -> Result<&'static [Kept; 2], CudaError> {
    static FOUND: OnceLock<Result<[Kept; 2], CudaError>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // NVRTC loads its builtins by name, from where they already are.
        let _ = keep("libnvrtc-builtins", &["13.0", "12.9", "12.8", "13", "12"]);
        let nvrtc = keep("libnvrtc", &["13", "12"])?;
        Ok([nvrtc, keep("libcublasLt", &["13", "12"])?])
    });
    found.as_ref().map_err(Clone::clone)
}

/// The versions of NVRTC and cuBLASLt, for people; nothing where they do not say.
pub fn versions() -> Option<[String; 2]> {
    let [nvrtc, blas] = kept().ok()?;
    let (mut major, mut minor) = (0i32, 0i32);
    // SAFETY: functions of these names and types in libraries that stay loaded.
    let blas = unsafe {
        let ask = nvrtc.get::<unsafe extern "C" fn(*mut i32, *mut i32) -> i32>(b"nvrtcVersion\0");
        if ask.ok()?(&raw mut major, &raw mut minor) != 0 {
            return None;
        }
        blas.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion\0")
            .ok()?()
    };
    // 120805 and 130002: a hundred minors since 12.
    let blas = format!("{}.{}.{}", blas / 10_000, blas % 10_000 / 100, blas % 100);
    Some([format!("{major}.{minor}"), blas])
}

/// A library that is never unloaded: cudarc finds it by its name from now on.
type Kept = std::mem::ManuallyDrop<libloading::Library>;

/// Milliseconds from one event to another.
///
/// cudarc's names are those of CUDA 13, whose libraries it then finds; of what is called here only this
/// function is named otherwise in older drivers, and all have the old name.
///
/// # Errors
/// The driver's refusals.
///
/// # Safety
/// Events of the current context.
pub unsafe fn elapsed(start: sys::CUevent, end: sys::CUevent) -> Result<f32, CudaError> {
    type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
    static ELAPSED: OnceLock<Option<Elapsed>> = OnceLock::new();
    let found = ELAPSED.get_or_init(|| {
        // SAFETY: the driver's library, which is loaded and stays; a function of this type in all of
        // its versions.
        unsafe {
            let driver = libloading::Library::new("libcuda.so.1").ok()?;
            let function = driver.get::<Elapsed>(b"cuEventElapsedTime").ok()?;
            let function = *function;
            std::mem::forget(driver);
            Some(function)
        }
    });
    let Some(function) = found else {
        let why = "the CUDA driver has no cuEventElapsedTime".to_owned();
        return Err(CudaError::NoDevice(why));
    };
    let mut millis = 0.0;
    // SAFETY: a valid place, and events by the contract above.
    check("cuEventElapsedTime", unsafe {
        function(&raw mut millis, start, end)
    })?;
    Ok(millis)
}

fn open(name: impl AsRef<std::ffi::OsStr>) -> Result<Kept, String> {
    // SAFETY: a library of the system's own; its initializers are trusted as the linker would.
    match unsafe { libloading::Library::new(name.as_ref()) } {
        Ok(library) => Ok(std::mem::ManuallyDrop::new(library)),
        Err(error) => Err(error.to_string()),
    }
}

fn keep(library: &'static str, versions: &[&str]) -> Result<Kept, CudaError> {
    let names: Vec<String> = versions
        .iter()
        .map(|v| format!("{library}.so.{v}"))
        .chain([format!("{library}.so")])
        .collect();
    let mut why = String::new();
    for name in &names {
        match open(name) {
            Ok(found) => return Ok(found),
            Err(error) if why.is_empty() => why = error,
            Err(_) => {}
        }
    }
    for folder in folders() {
        for path in names.iter().map(|name| folder.join(name)) {
            if path.exists() {
                match open(&path) {
                    Ok(found) => return Ok(found),
                    Err(error) => why = error,
                }
            }
        }
    }
    Err(CudaError::NoLibrary { library, why })
}

/// Where CUDA's libraries may be that the loader does not look for.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(own) = std::env::var_os("FOREBAY_CUDA_LIBRARIES") {
        folders.extend(std::env::split_paths(&own));
    }
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(name) {
            folders.push(Path::new(&home).join("lib64"));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    // The packages that PyTorch brings along, in an environment that is active or the system's.
    let environment = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    for root in environment
        .into_iter()
        .chain(["/usr".into(), "/usr/local".into()])
    {
        let Ok(versions) = std::fs::read_dir(root.join("lib")) else {
            continue;
        };
        for version in versions.flatten().map(|entry| entry.path()) {
            for packages in ["site-packages", "dist-packages"] {
                for part in ["cu13", "cuda_nvrtc", "cublas"] {
                    folders.push(version.join(packages).join("nvidia").join(part).join("lib"));
                }
            }
        }
    }
    folders
}
