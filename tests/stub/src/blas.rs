//! libcublasLt: products by loops, on layouts as they are described.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::call::{Done, Needs, Place, call, code};
use crate::kernels::{bf16, f16, from_bf16, from_f16};
use crate::machine::{Fault, State, machine};
use crate::memory;

const F32: i32 = 0;
const F16: i32 = 2;
const BF16: i32 = 14;
const INVALID: i32 = 7;
const EXECUTION_FAILED: i32 = 13;
const NOT_SUPPORTED: i32 = 15;

/// Handles, layouts, descriptors and preferences that were made and not destroyed.
static OBJECTS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn objects() -> u64 {
    OBJECTS.load(Ordering::Relaxed)
}

/// A matrix in columns.
#[derive(Clone, Copy)]
struct Matrix {
    kind: i32,
    rows: u64,
    cols: u64,
    pitch: i64,
}

/// Which sides are transposed.
#[derive(Clone, Copy, Default)]
struct Product {
    flip: [bool; 2],
}

#[repr(C)]
struct Algorithm([u64; 8]);

#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: i32,
    waves: f32,
    reserved: [i32; 4],
}

/// As `call`, with answers that are statuses of cuBLASLt: a lost device is a failed execution.
fn blas(name: &'static str, needs: Needs, body: impl FnOnce(&mut State) -> Done) -> i32 {
    match call(name, needs, body) {
        refused if refused > NOT_SUPPORTED + 1 => EXECUTION_FAILED,
        status => status,
    }
}

fn make<T>(place: &Place<*mut T>, value: T) -> Result<(), i32> {
    OBJECTS.fetch_add(1, Ordering::Relaxed);
    place.set(Box::into_raw(Box::new(value)))
}

/// # Safety
/// `value` was made by `make` and is destroyed once.
unsafe fn destroy<T>(name: &'static str, value: *mut T) -> i32 {
    blas(name, Needs::Nothing, |_| {
        OBJECTS.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: by the contract above.
        drop(unsafe { Box::from_raw(value) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtGetVersion() -> usize {
    139_999
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtCreate(handle: Place<*mut u64>) -> i32 {
    blas("cublasLtCreate", Needs::Device, |_| make(&handle, 0))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtDestroy(handle: *mut u64) -> i32 {
    // SAFETY: the contract of the call; so for all that follow.
    unsafe { destroy("cublasLtDestroy", handle) }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutCreate(
    layout: Place<*mut Matrix>,
    kind: i32,
    rows: u64,
    cols: u64,
    pitch: i64,
) -> i32 {
    blas("cublasLtMatrixLayoutCreate", Needs::Nothing, |_| {
        if ![F32, F16, BF16].contains(&kind) || pitch < rows as i64 {
            return Err(INVALID);
        }
        make(
            &layout,
            Matrix {
                kind,
                rows,
                cols,
                pitch,
            },
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut Matrix) -> i32 {
    // SAFETY: the contract of the call.
    unsafe { destroy("cublasLtMatrixLayoutDestroy", layout) }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescCreate(desc: Place<*mut Product>, _: i32, scale: i32) -> i32 {
    blas("cublasLtMatmulDescCreate", Needs::Nothing, |_| {
        if scale != F32 {
            return Err(INVALID);
        }
        make(&desc, Product::default())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescDestroy(desc: *mut Product) -> i32 {
    // SAFETY: the contract of the call.
    unsafe { destroy("cublasLtMatmulDescDestroy", desc) }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescSetAttribute(
    desc: *mut Product,
    which: i32,
    value: *const i32,
    bytes: usize,
) -> i32 {
    blas("cublasLtMatmulDescSetAttribute", Needs::Nothing, |_| {
        // Transposition of the left side and of the right one; nothing else is understood.
        let side = match which {
            3 => 0,
            4 => 1,
            _ => return Err(NOT_SUPPORTED),
        };
        if bytes != 4 {
            return Err(INVALID);
        }
        // SAFETY: the contract of the call: a descriptor, and a value of four bytes.
        unsafe { (*desc).flip[side] = *value == 1 };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceCreate(preference: Place<*mut u64>) -> i32 {
    blas("cublasLtMatmulPreferenceCreate", Needs::Nothing, |_| {
        make(&preference, 0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut u64) -> i32 {
    // SAFETY: the contract of the call.
    unsafe { destroy("cublasLtMatmulPreferenceDestroy", preference) }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    _preference: *mut u64,
    _which: i32,
    _value: *const u8,
    _bytes: usize,
) -> i32 {
    call(
        "cublasLtMatmulPreferenceSetAttribute",
        Needs::Nothing,
        |_| Ok(()),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *mut u64,
    desc: *const Product,
    a: *const Matrix,
    b: *const Matrix,
    _c: *const Matrix,
    d: *const Matrix,
    _preference: *mut u64,
    _asked: i32,
    found: Place<Heuristic>,
    count: Place<i32>,
) -> i32 {
    blas("cublasLtMatmulAlgoGetHeuristic", Needs::Device, |_| {
        // SAFETY: the contract of the call: descriptors that were made.
        let (desc, a, b, d) = unsafe { (*desc, *a, *b, *d) };
        sizes(desc, a, b, d)?;
        count.set(1)?;
        found.set(Heuristic {
            algorithm: Algorithm([1; 8]),
            workspace: 0,
            state: 0,
            waves: 1.0,
            reserved: [0; 4],
        })
    })
}

/// Rows, columns and the length of the sums.
fn sizes(desc: Product, a: Matrix, b: Matrix, d: Matrix) -> Result<[usize; 3], i32> {
    let turned = |m: Matrix, flip| match flip {
        true => (m.cols, m.rows),
        false => (m.rows, m.cols),
    };
    let ((rows, inner), (other, cols)) = (turned(a, desc.flip[0]), turned(b, desc.flip[1]));
    let fits = inner == other && (rows, cols) == (d.rows, d.cols) && a.kind == b.kind;
    match fits {
        true => Ok([rows, cols, inner].map(|n| n as usize)),
        false => Err(INVALID),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmul(
    _handle: *mut u64,
    desc: *const Product,
    alpha: *const f32,
    a: u64,
    a_layout: *const Matrix,
    b: u64,
    b_layout: *const Matrix,
    beta: *const f32,
    c: u64,
    _c_layout: *const Matrix,
    d: u64,
    d_layout: *const Matrix,
    algorithm: *const Algorithm,
    room: u64,
    room_bytes: usize,
    stream: u64,
) -> i32 {
    blas("cublasLtMatmul", Needs::Context, |state| {
        // SAFETY: the contract of the call: descriptors that were made, an algorithm that was found, two
        // numbers in host memory.
        let (desc, layouts, alpha, beta, algorithm) = unsafe {
            let layouts = [*a_layout, *b_layout, *d_layout];
            (*desc, layouts, *alpha, *beta, &*algorithm)
        };
        if c != d || algorithm.0 != [1; 8] {
            return Err(NOT_SUPPORTED);
        }
        let [a_layout, b_layout, d_layout] = layouts;
        let sizes = sizes(desc, a_layout, b_layout, d_layout)?;
        state.push(stream, None, move || {
            let (a, b) = (load(a, a_layout)?, load(b, b_layout)?);
            let old = load(d, d_layout)?;
            check(room, room_bytes as u64)?;
            // Whatever was there is lost to an algorithm that works in it.
            memory::write(room, &vec![0xff; room_bytes]);
            let result = product(desc, sizes, [&a, &b], &old, alpha, beta);
            store(d, d_layout, &result);
            Ok(())
        })
    })
}

/// Columns one after another, without what is between them.
fn product(
    desc: Product,
    [rows, cols, inner]: [usize; 3],
    [a, b]: [&[f32]; 2],
    old: &[f32],
    alpha: f32,
    beta: f32,
) -> Vec<f32> {
    // Sums along memory: a by rows, b by columns.
    let turn = |m: &[f32], lines: usize, flip: bool| -> Vec<f32> {
        if flip {
            return m.to_vec();
        }
        let at = |i: usize| m[i % inner * lines + i / inner];
        (0..lines * inner).map(at).collect()
    };
    let (a, b) = (turn(a, rows, desc.flip[0]), turn(b, cols, !desc.flip[1]));
    let mut out = vec![0.0; rows * cols];
    for (i, out) in out.iter_mut().enumerate() {
        let (row, col) = (i % rows, i / rows);
        let x = &a[row * inner..(row + 1) * inner];
        let y = &b[col * inner..(col + 1) * inner];
        let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
        let sum = products.sum::<f64>() as f32;
        let before = if beta == 0.0 { 0.0 } else { beta * old[i] };
        *out = alpha * sum + before;
    }
    out
}

fn check(address: u64, bytes: u64) -> Result<(), Fault> {
    match machine().lock().memory.reachable(address, bytes) {
        true => Ok(()),
        false => Err(Fault {
            code: code::ILLEGAL_ADDRESS,
            what: format!("a product touches {bytes} bytes at {address:#x}"),
        }),
    }
}

fn size(kind: i32) -> u64 {
    if kind == F32 { 4 } else { 2 }
}

fn load(address: u64, m: Matrix) -> Result<Vec<f32>, Fault> {
    let element = size(m.kind);
    let mut all = Vec::new();
    for col in 0..m.cols {
        let start = address + col * m.pitch as u64 * element;
        check(start, m.rows * element)?;
        let bytes = memory::read(start, m.rows * element);
        match m.kind {
            F32 => all.extend(bytes.as_chunks().0.iter().map(|c| f32::from_le_bytes(*c))),
            F16 => all.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|c| from_f16(u16::from_le_bytes(*c))),
            ),
            _ => all.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|c| from_bf16(u16::from_le_bytes(*c))),
            ),
        }
    }
    Ok(all)
}

fn store(address: u64, m: Matrix, values: &[f32]) {
    for (col, values) in values.chunks(m.rows as usize).enumerate() {
        let bytes: Vec<u8> = match m.kind {
            F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            F16 => values.iter().flat_map(|v| f16(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| bf16(*v).to_le_bytes()).collect(),
        };
        let start = address + col as u64 * m.pitch as u64 * size(m.kind);
        memory::write(start, &bytes);
    }
}
