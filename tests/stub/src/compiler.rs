//! libnvrtc: its "images" are the sources themselves, which the driver's half reads signatures from.

use std::ffi::c_char;

use crate::call::{Done, Needs, Place, Text};
use crate::machine::State;
use crate::memory;
use crate::source;

/// As `call::call`, with answers that are results of NVRTC.
fn call(name: &'static str, needs: Needs, body: impl FnOnce(&mut State) -> Done) -> i32 {
    match crate::call::call(name, needs, body) {
        refused if refused > 12 => 11, // an internal error
        result => result,
    }
}

struct Program {
    /// Ends with a zero.
    text: Vec<u8>,
    log: Vec<u8>,
}

/// # Safety
/// A program that `nvrtcCreateProgram` made and nobody destroyed.
unsafe fn program<'a>(program: *mut Program) -> &'a mut Program {
    // SAFETY: by the contract above; one thread at a time, as NVRTC demands.
    unsafe { &mut *program }
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcVersion(major: Place<i32>, minor: Place<i32>) -> i32 {
    // No real version: images that are kept on disk are told from real ones by it.
    call("nvrtcVersion", Needs::Nothing, |_| {
        major.set(13)?;
        minor.set(999)
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCreateProgram(
    made: Place<*mut Program>,
    text: Text,
    _name: Text,
    _headers: i32,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> i32 {
    call("nvrtcCreateProgram", Needs::Nothing, |_| {
        let mut text = text.get().as_bytes().to_vec();
        text.push(0);
        let log = vec![0];
        made.set(Box::into_raw(Box::new(Program { text, log })))
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCompileProgram(made: *mut Program, _: i32, _: *const *const c_char) -> i32 {
    call("nvrtcCompileProgram", Needs::Nothing, |_| {
        // SAFETY: the contract of the call.
        let program = unsafe { program(made) };
        let text = String::from_utf8_lossy(&program.text);
        if source::signatures(&text).is_empty() {
            program.log = b"the stub finds no kernel in it\0".to_vec();
            return Err(6); // a compilation error
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBINSize(made: *mut Program, bytes: Place<usize>) -> i32 {
    call("nvrtcGetCUBINSize", Needs::Nothing, |_| {
        // SAFETY: the contract of the call.
        bytes.set(unsafe { program(made) }.text.len())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBIN(made: *mut Program, image: u64) -> i32 {
    call("nvrtcGetCUBIN", Needs::Nothing, |_| {
        // SAFETY: the contract of the call.
        memory::write(image, &unsafe { program(made) }.text);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetProgramLogSize(made: *mut Program, bytes: Place<usize>) -> i32 {
    call("nvrtcGetProgramLogSize", Needs::Nothing, |_| {
        // SAFETY: the contract of the call.
        bytes.set(unsafe { program(made) }.log.len())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetProgramLog(made: *mut Program, log: u64) -> i32 {
    call("nvrtcGetProgramLog", Needs::Nothing, |_| {
        // SAFETY: the contract of the call.
        memory::write(log, &unsafe { program(made) }.log);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcDestroyProgram(made: Place<*mut Program>) -> i32 {
    call("nvrtcDestroyProgram", Needs::Nothing, |_| {
        let program = made.replace(std::ptr::null_mut())?;
        // SAFETY: from `nvrtcCreateProgram`, destroyed once: the place holds null from here on.
        drop(unsafe { Box::from_raw(program) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetErrorString(_result: i32) -> *const c_char {
    c"an error of the stub's".as_ptr()
}
