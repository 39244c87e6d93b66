//! From CUDA C++ to what a device runs: NVRTC, with what it made kept on disk.

use std::ffi::{CStr, CString, c_char};
use std::hash::{Hash, Hasher};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};

use super::error::CudaError;
use super::library;

/// A source file.
pub(super) struct Source {
    pub(super) file: &'static str,
    pub(super) text: &'static str,
    /// Whether products and sums may be fused where that is not written.
    pub(super) fuse: bool,
}

const COMMON: &str = include_str!("cu/common.cuh");

/// The image of a source for an architecture such as `sm_90`: from disk, or compiled.
pub(super) fn image(source: &Source, arch: &str) -> Result<Vec<u8>, CudaError> {
    let place = place(source, arch);
    if let Some(kept) = place.as_ref().and_then(|p| std::fs::read(p).ok())
        && let Some(image) = opened(&kept)
    {
        return Ok(image);
    }
    let image = compile(source, arch)?;
    if let Some(place) = place {
        // A cache that cannot be written costs time and nothing else.
        let _ = keep(&place, &image);
    }
    Ok(image)
}

fn version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: valid places; the library is there (`libraries` was asked).
    let _ = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    (major, minor)
}

/// Where the image is kept: `$FOREBAY_KERNELS`, or the user's cache folder; named by all that it
/// was made from.
fn place(source: &Source, arch: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("FOREBAY_KERNELS") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
            cache.or_else(home)?.join("forebay").join("kernels")
        }
    };
    let library = library::libraries().is_ok().then(version);
    let mut hash = std::hash::DefaultHasher::new();
    (COMMON, source.text, source.fuse, library).hash(&mut hash);
    let name = format!("{}-{arch}-{:016x}.cubin", source.file, hash.finish());
    Some(folder.join(name))
}

/// Images are kept with their sum in front: half a file is no image.
fn keep(place: &std::path::Path, image: &[u8]) -> std::io::Result<()> {
    let folder = place.parent().unwrap_or(place);
    std::fs::create_dir_all(folder)?;
    let half = place.with_extension(format!("{}.half", std::process::id()));
    let mut bytes = sum(image).to_le_bytes().to_vec();
    bytes.extend(image);
    std::fs::write(&half, bytes)?;
    std::fs::rename(half, place)
}

fn opened(kept: &[u8]) -> Option<Vec<u8>> {
    let (front, image) = kept.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*front) == sum(image)).then(|| image.to_vec())
}

fn sum(image: &[u8]) -> u64 {
    let mut hash = std::hash::DefaultHasher::new();
    image.hash(&mut hash);
    hash.finish()
}

fn compile(source: &Source, arch: &str) -> Result<Vec<u8>, CudaError> {
    library::libraries()?;
    let failed = |log: String| CudaError::Compile {
        file: source.file.to_owned(),
        arch: arch.to_owned(),
        log,
    };
    let said = |error: result::NvrtcError| failed(format!("{error:?}"));
    let text = CString::new(format!("{COMMON}\n#line 1\n{}", source.text))
        .map_err(|error| failed(error.to_string()))?;
    let name = CString::new(source.file).map_err(|error| failed(error.to_string()))?;
    let program = result::create_program(&text, Some(&name)).map_err(said)?;
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
    ];
    if !source.fuse {
        options.push("--fmad=false".to_owned());
    }
    // SAFETY: the program was just made, and is destroyed once, at the end.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let image = match compiled {
            Ok(()) => cubin(program).map_err(said),
            Err(error) => {
                let log = result::get_program_log(program).unwrap_or_default();
                Err(failed(format!("{error:?}\n{}", words(&log))))
            }
        };
        let _ = result::destroy_program(program);
        image
    }
}

/// # Safety
/// A program that was compiled.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: by the contract above; the image is as long as was just said.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut image = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(image)
    }
}

fn words(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}
