//! libcuda: what Forebay calls of it, under the driver's own names and contracts.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use crate::call::{Done, Needs, Place, Text, call, code, count, make_current};
use crate::kernels;
use crate::machine::{Fault, Machine, Record, State, machine};
use crate::memory;
use crate::source::{self, Parameter};

/// Exports functions: name, arguments, what it needs, and its body.
macro_rules! driver {
    ($($name:ident($($arg:ident: $of:ty),* $(,)?) $needs:ident |$state:ident| $body:expr;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $of),*) -> i32 {
            call(stringify!($name), Needs::$needs, |$state| $body)
        }
    )*};
}

driver! {
    cuInit(flags: u32) Nothing |_state| if flags == 0 { Ok(()) } else { Err(code::INVALID_VALUE) };
    cuDriverGetVersion(version: Place<i32>) Nothing |_state| version.set(13000);
    cuDeviceGetCount(count: Place<i32>) Nothing |_state| count.set(1);
    cuDeviceGet(device: Place<i32>, ordinal: i32) Nothing |_state| match ordinal {
        0 => device.set(0),
        _ => Err(101),
    };
    cuDeviceGetAttribute(value: Place<i32>, which: u32, _device: i32) Nothing |state| match which {
        16 => value.set(4),  // multiprocessors
        75 => value.set(state.settings.capability as i32),
        76 => value.set(0),
        97 => value.set(227 << 10),
        _ => value.set(1),
    };
    cuDevicePrimaryCtxRetain(context: Place<u64>, _device: i32) Device |state| {
        context.set(16)?;
        state.retained += 1;
        Ok(())
    };
    cuDevicePrimaryCtxRelease_v2(_device: i32) Nothing |state| release(state);
    cuCtxSetCurrent(context: u64) Nothing |_state| {
        make_current(context != 0);
        Ok(())
    };
    cuCtxPushCurrent_v2(_context: u64) Device |_state| {
        make_current(true);
        Ok(())
    };
    cuCtxPopCurrent_v2(context: Place<u64>) Nothing |_state| {
        make_current(false);
        context.set(16)
    };

    cuMemGetInfo_v2(free: Place<usize>, total: Place<usize>) Context |state| {
        let most = state.settings.memory;
        total.set(most as usize)?;
        free.set((most - state.memory.allocated()) as usize)
    };
    cuMemAlloc_v2(address: Place<u64>, bytes: usize) Context |state| {
        let most = state.settings.memory;
        address.set(state.memory.allocate(bytes as u64, most)?)
    };
    cuMemHostAlloc(address: Place<u64>, bytes: usize, _flags: u32) Context |state| {
        address.set(state.memory.allocate_host(bytes as u64)?)
    };
    cuMemHostGetDevicePointer_v2(device: Place<u64>, host: u64, _flags: u32) Context |state| {
        device.set(state.memory.mapped(host)?)
    };
    cuMemFreeHost(address: u64) Nothing |state| {
        unused(state, address, 1);
        state.memory.free_host(address)?;
        state.lost().map_or(Ok(()), Err)
    };
    cuMemHostRegister_v2(address: u64, bytes: usize, _flags: u32) Context |state| {
        state.memory.register(address, bytes as u64)
    };
    cuMemHostUnregister(address: u64) Nothing |state| {
        let bytes = state.memory.unregister(address)?;
        unused(state, address, bytes);
        state.lost().map_or(Ok(()), Err)
    };

    cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) Context |state| {
        copy_in(state, to, from, bytes as u64, stream)
    };
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) Context |state| {
        let bytes = bytes as u64;
        device(state, to, bytes)?;
        device(state, from, bytes)?;
        state.push(stream, None, move || {
            touch("a copy", &[(from, bytes), (to, bytes)])?;
            memory::write(to, &memory::read(from, bytes));
            Ok(())
        })
    };
    cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: u64) Context |state| {
        let bytes = bytes as u64;
        device(state, to, bytes)?;
        state.push(stream, None, move || {
            touch("a memset", &[(to, bytes)])?;
            memory::write(to, &vec![value; bytes as usize]);
            Ok(())
        })
    };

    cuStreamCreate(stream: Place<u64>, _flags: u32) Context |state| stream.set(state.new_stream());
    cuStreamDestroy_v2(stream: u64) Context |state| state.end_stream(stream);
    cuStreamWaitEvent(stream: u64, event: u64, _flags: u32) Context |state| {
        state.wait_event(stream, event)
    };
    cuStreamQuery(stream: u64) Context |state| match state.is_empty(stream)? {
        true => Ok(()),
        false => Err(code::NOT_READY),
    };
    cuEventCreate(event: Place<u64>, flags: u32) Context |state| {
        event.set(state.new_event(flags & 2 == 0))
    };
    cuEventDestroy_v2(event: u64) Nothing |state| {
        state.end_event(event)?;
        state.lost().map_or(Ok(()), Err)
    };
    cuEventRecord(event: u64, stream: u64) Context |state| state.record(event, stream);
    cuEventQuery(event: u64) Context |state| match state.newest(event)? {
        Some(record) => Machine::query(&record),
        None => Ok(()),
    };
    cuEventElapsedTime(millis: Place<f32>, start: u64, end: u64) Context |state| {
        millis.set(state.elapsed(start, end)?)
    };

    cuModuleLoadData(module: Place<u64>, image: Text) Context |state| {
        let signatures = source::signatures(image.get());
        if signatures.is_empty() {
            return Err(200); // an invalid image
        }
        let handle = state.new_handle();
        let signatures = signatures.into_iter().map(Arc::new).collect();
        state.modules.insert(handle, signatures);
        module.set(handle)
    };
    cuModuleUnload(module: u64) Nothing |state| {
        state.modules.remove(&module).ok_or(code::INVALID_HANDLE)?;
        state.lost().map_or(Ok(()), Err)
    };
    cuModuleGetFunction(function: Place<u64>, module: u64, name: Text) Context |state| {
        find(state, &function, module, name.get())
    };
    cuFuncSetAttribute(_function: u64, which: u32, value: i32) Context |_state| {
        // Dynamic shared memory, of which an H100 has 227 KiB a block.
        if which == 8 && value > 227 << 10 { Err(code::INVALID_VALUE) } else { Ok(()) }
    };
}

/// These block, so they must not hold the lock.
macro_rules! blocking {
    ($($name:ident($($arg:ident: $of:ty),*) |$state:ident| $before:expr, $wait:expr;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $of),*) -> i32 {
            let mut found = None;
            let asked = call(stringify!($name), Needs::Context, |$state| {
                found = Some($before?);
                Ok(())
            });
            match found {
                Some(found) => $wait(found).err().unwrap_or(0),
                None => asked,
            }
        }
    )*};
}

blocking! {
    cuCtxSynchronize() |_state| Ok::<_, i32>(()), |()| machine().wait_until(State::all_empty);
    cuStreamSynchronize(stream: u64) |state| state.is_empty(stream).map(|_| stream), |stream| {
        machine().wait_until(|state: &State| state.is_empty(stream) != Ok(false))
    };
    cuEventSynchronize(event: u64) |state| state.newest(event), reached;
    cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) |state| {
        copy_out(state, to, from, bytes as u64, stream)
    }, |blocks| if blocks {
        // To memory that is not page-locked the driver returns when the bytes are there.
        count("a copy that blocks");
        machine().wait_until(|state: &State| state.is_empty(stream) != Ok(false))
    } else {
        Ok(())
    };
    cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) |state| {
        copy_out(state, to, from, bytes as u64, 0)
    }, |_| machine().wait_until(State::all_empty);
    cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) |state| {
        copy_in(state, to, from, bytes as u64, 0)
    }, |()| machine().wait_until(State::all_empty);
    cuMemsetD8_v2(to: u64, value: u8, bytes: usize) |state| {
        device(state, to, bytes as u64)
    }, |()| machine().wait_until(State::all_empty).map(|()| {
        memory::write(to, &vec![value; bytes]);
    });
}

/// Waits for all that is queued, as the driver does; on a lost device frees at once.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> i32 {
    let asked = call("cuMemFree_v2", Needs::Nothing, |_| Ok(()));
    if asked != 0 {
        return asked;
    }
    let waited = machine().wait_until(State::all_empty);
    let freed = machine().lock().memory.free(address);
    waited.and(freed).err().unwrap_or(0)
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared: u32,
    stream: u64,
    arguments: *const *const u8,
    _extra: *const u8,
) -> i32 {
    call("cuLaunchKernel", Needs::Context, |state| {
        let index = (function as usize).wrapping_sub(1);
        let signature = state.functions.get(index).ok_or(code::INVALID_HANDLE)?;
        let signature = Arc::clone(signature);
        let threads = block_x * block_y * block_z;
        if grid_x * grid_y * grid_z == 0 || threads == 0 || threads > 1024 {
            return Err(code::INVALID_VALUE);
        }
        let mut values = Vec::new();
        for (index, Parameter { bytes, .. }) in signature.parameters.iter().enumerate() {
            // SAFETY: the contract of the call: an array of pointers to the kernel's arguments, each
            // as long as the kernel declares it.
            let place = unsafe { *arguments.add(index) };
            values.push(memory::read(place as u64, *bytes as u64));
        }
        let grid = [grid_x, grid_y, grid_z];
        state.push(stream, None, move || kernels::run(&signature, values, grid))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(result: i32, text: Place<*const c_char>) -> i32 {
    call("cuGetErrorString", Needs::Nothing, |state| {
        let known = match result {
            code::INVALID_VALUE => "invalid argument",
            code::OUT_OF_MEMORY => "out of memory",
            code::INVALID_CONTEXT => "invalid device context",
            code::INVALID_HANDLE => "invalid resource handle",
            code::NOT_FOUND => "named symbol not found",
            code::NOT_READY => "device not ready",
            code::ILLEGAL_ADDRESS => "an illegal memory access was encountered",
            code::ILLEGAL_INSTRUCTION => "an illegal instruction was encountered",
            _ => "an error of the stub's",
        };
        let detailed = state.lost() == Some(result) || result == code::NOT_FOUND;
        let words = match state.detail.as_str() {
            detail if detailed && !detail.is_empty() => format!("{known} [stub: {detail}]"),
            _ => known.to_owned(),
        };
        // Constant for as long as the process lives, as the driver's are.
        let words = CString::new(words).map_err(|_| code::INVALID_VALUE)?;
        text.set(words.into_raw().cast_const())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut u8, room: i32, _device: i32) -> i32 {
    call("cuDeviceGetName", Needs::Nothing, |_| {
        let text = b"stub\0";
        if (room as usize) < text.len() {
            return Err(code::INVALID_VALUE);
        }
        memory::write(name as u64, text);
        Ok(())
    })
}

fn reached(record: Option<Arc<Record>>) -> Done {
    record.map_or(Ok(()), |record| machine().wait_for(&record))
}

fn device(state: &State, address: u64, bytes: u64) -> Done {
    match state.memory.on_device(address, bytes) {
        true => Ok(()),
        false => Err(code::INVALID_VALUE),
    }
}

/// When it runs: what it touches must still be there.
fn touch(what: &str, ranges: &[(u64, u64)]) -> Result<(), Fault> {
    let state = machine().lock();
    match ranges
        .iter()
        .find(|(at, n)| !state.memory.reachable(*at, *n))
    {
        None => Ok(()),
        Some((address, bytes)) => Err(Fault {
            code: code::ILLEGAL_ADDRESS,
            what: format!("{what} touches {bytes} bytes at {address:#x}"),
        }),
    }
}

fn copy_in(state: &mut State, to: u64, from: u64, bytes: u64, stream: u64) -> Done {
    device(state, to, bytes)?;
    if state.memory.on_device(from, 1) {
        return Err(code::INVALID_VALUE);
    }
    // The driver copies what is not page-locked into memory of its own before it returns.
    let locked = state.memory.is_locked(from, bytes)?;
    let staged = (!locked).then(|| memory::read(from, bytes));
    state.push(stream, locked.then_some((from, bytes)), move || {
        touch("a copy in", &[(to, bytes)])?;
        memory::write(to, &staged.unwrap_or_else(|| memory::read(from, bytes)));
        Ok(())
    })
}

/// Whether the caller must wait for it.
fn copy_out(state: &mut State, to: u64, from: u64, bytes: u64, stream: u64) -> Result<bool, i32> {
    device(state, from, bytes)?;
    if state.memory.on_device(to, 1) {
        return Err(code::INVALID_VALUE);
    }
    let locked = state.memory.is_locked(to, bytes)?;
    state.push(stream, Some((to, bytes)), move || {
        touch("a copy out", &[(from, bytes)])?;
        memory::write(to, &memory::read(from, bytes));
        Ok(())
    })?;
    Ok(!locked)
}

fn unused(state: &mut State, address: u64, bytes: u64) {
    if state.in_use(address, bytes) {
        state.violation("host memory is given back under a copy");
    }
}

fn release(state: &mut State) -> Done {
    state.retained = state.retained.checked_sub(1).ok_or(code::INVALID_CONTEXT)?;
    if state.retained == 0 && state.lost().is_none() && !state.all_empty() {
        state.violation("the context ends with work queued");
    }
    Ok(())
}

fn find(state: &mut State, function: &Place<u64>, module: u64, name: &str) -> Done {
    let module = state.modules.get(&module).ok_or(code::INVALID_HANDLE)?;
    let Some(signature) = module.iter().find(|s| s.name == name).cloned() else {
        if state.detail.is_empty() {
            state.detail = format!("no module has a kernel '{name}'");
        }
        return Err(code::NOT_FOUND);
    };
    if !kernels::known(name) {
        state.detail = format!("'{name}' is not in the table of tests/stub/src/kernels");
        eprintln!("cuda stub: {}", state.detail);
        return Err(code::NOT_FOUND);
    }
    state.detail.clear();
    state.functions.push(signature);
    function.set(state.functions.len() as u64)
}
