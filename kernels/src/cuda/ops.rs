//! The operations, queued on a stream. Shapes are checked by the caller; tensors are addresses in
//! device memory, row-major, aligned to their elements.
//!
//! Where an operation needs memory to work in, a function beside it says how many bytes. Bad input
//! that only the device can see (a token id outside the vocabulary) sets the fault word of
//! [`Kernels`] to one more than its position, and nothing else is touched for it.

use cudarc::driver::sys::CUstream;

pub use super::attention::{attention, attention_backward, attention_backward_scratch};
use super::error::CudaError;
use super::kernels::{Args, Element, Kernels};
use super::matmul::{Product, workspace};
use super::optimizers::of_types;
pub use super::optimizers::{LAMB_SUMS, StatesAt, update};
use crate::cpu::ops::{ClassifierDims, Direction, RopeDims};
use crate::cpu::{AdamScalars, SQUARE_SUM_PIECES, square_sum_strand};

/// Where an operation is queued, and in what type it computes.
#[derive(Clone, Copy, Debug)]
pub struct Queue<'a> {
    /// The device's kernels.
    pub kernels: &'a Kernels,
    /// The stream.
    pub stream: CUstream,
    /// The type of activations and parameters; sums and gradients of parameters are f32.
    pub element: Element,
}

pub(super) type Done = Result<(), CudaError>;

/// Floats that one block of [`rms_norm_backward`] leaves for each column.
const NORM_BLOCKS: u32 = 528;
/// Bytes of logits that are held at a time: with a vocabulary of 50,000, 1,024 tokens, whose products
/// just fill a large GPU.
const LOGITS: usize = 200 << 20;

fn pieces(element: Element, n: usize) -> usize {
    n.div_ceil(16 / element.bytes())
}

/// `out = a + b`, n elements each; out may be a.
///
/// # Safety
/// The tensors are as said and the stream's until it has come past this; so for all below.
pub unsafe fn add(q: Queue<'_>, a: u64, b: u64, out: u64, n: usize) -> Done {
    let mut args = Args::new().with(a).with(b).with(out).with(n as u64);
    let name = ("add", Some(q.element));
    let grid = q.kernels.blocks(pieces(q.element, n));
    // SAFETY: as `add_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}

/// `out = silu(gate) * up`, n elements each.
///
/// # Safety
/// See [`add`].
pub unsafe fn swiglu(q: Queue<'_>, gate: u64, up: u64, out: u64, n: usize) -> Done {
    let mut args = Args::new().with(gate).with(up).with(out).with(n as u64);
    let name = ("swiglu", Some(q.element));
    let grid = q.kernels.blocks(pieces(q.element, n));
    // SAFETY: as `swiglu_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}

/// The gradients of [`swiglu`], set.
///
/// # Safety
/// See [`add`].
pub unsafe fn swiglu_backward(
    q: Queue<'_>,
    [gate, up, dout]: [u64; 3],
    [dgate, dup]: [u64; 2],
    n: usize,
) -> Done {
    let args = Args::new().with(gate).with(up).with(dout);
    let mut args = args.with(dgate).with(dup).with(n as u64);
    let name = ("swiglu_backward", Some(q.element));
    let grid = q.kernels.blocks(pieces(q.element, n));
    // SAFETY: as `swiglu_backward_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}

/// Threads along a row, and rows of a block.
fn row_block(cols: usize) -> [u32; 2] {
    match cols {
        0..=256 => [32, 8],
        257..1024 => [128, 2],
        _ => [256, 1],
    }
}

/// Which of a norm's kernels: those that hold 1, 2 or 4 packs of 16 bytes a thread in registers, where
/// rows are whole packs, few enough, and every tensor is aligned to them; else the first.
fn norm_kernel(
    q: Queue<'_>,
    cols: usize,
    tensors: &[u64],
    names: [&'static str; 4],
) -> (&'static str, Option<Element>) {
    let per_pack = 16 / q.element.bytes();
    let whole = cols.is_multiple_of(per_pack) && tensors.iter().all(|t| t % 16 == 0);
    let name = match (cols / per_pack).div_ceil(row_block(cols)[0] as usize) {
        1 if whole => names[1],
        2 if whole => names[2],
        3 | 4 if whole => names[3],
        _ => names[0],
    };
    (name, Some(q.element))
}

/// `y = weight * x / sqrt(mean(x²) + eps)`, each of `rows` rows.
///
/// # Safety
/// See [`add`].
pub unsafe fn rms_norm(
    q: Queue<'_>,
    (rows, cols): (usize, usize),
    x: u64,
    weight: u64,
    eps: f32,
    y: u64,
) -> Done {
    let block = row_block(cols);
    let args = Args::new().with(x).with(weight).with(y);
    let mut args = args.with(rows as u64).with(cols as u32).with(eps);
    let grid = [rows.div_ceil(block[1] as usize) as u32, 1, 1];
    let names = ["rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_4"];
    let name = norm_kernel(q, cols, &[x, weight, y], names);
    // SAFETY: as `rms_norm_float` takes them.
    unsafe { q.kernels.launch(q.stream, name, grid, block, 0, &mut args) }
}

/// Bytes that [`rms_norm_backward`] works in.
pub fn rms_norm_backward_scratch(cols: usize) -> usize {
    NORM_BLOCKS as usize * cols * 4
}

/// The gradients of [`rms_norm`]: dx set or added to, dweight (f32) added to.
///
/// # Safety
/// See [`add`].
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub unsafe fn rms_norm_backward(
    q: Queue<'_>,
    (rows, cols): (usize, usize),
    [x, weight, dy]: [u64; 3],
    eps: f32,
    dx: u64,
    add: bool,
    dweight: u64,
    scratch: u64,
) -> Done {
    let block = row_block(cols);
    let args = Args::new()
        .with(x)
        .with(weight)
        .with(dy)
        .with(dx)
        .with(scratch);
    let args = args.with(rows as u64).with(cols as u32).with(eps);
    let mut args = args.with(u32::from(add));
    let shared = block[1] * cols as u32 * 4;
    let names = [
        "rms_norm_backward",
        "rms_norm_backward_1",
        "rms_norm_backward_2",
        "rms_norm_backward_4",
    ];
    let name = norm_kernel(q, cols, &[x, weight, dy, dx], names);
    let mut sums = Args::new().with(scratch).with(dweight).with(NORM_BLOCKS);
    sums = sums.with(cols as u32);
    let columns = [cols.div_ceil(32) as u32, 1, 1];
    // SAFETY: as `rms_norm_backward_float` and `column_sums` take them.
    unsafe {
        let grid = [NORM_BLOCKS, 1, 1];
        q.kernels
            .launch(q.stream, name, grid, block, shared, &mut args)?;
        let name = ("column_sums", None);
        q.kernels
            .launch(q.stream, name, columns, [32, 32], 0, &mut sums)
    }
}

/// Turns x, `[tokens, heads, head_dim]`, in place.
///
/// # Safety
/// See [`add`].
pub unsafe fn rope(q: Queue<'_>, dims: RopeDims, x: u64, tokens: usize, way: Direction) -> Done {
    let (seq, heads, half) = (dims.seq, dims.heads, dims.head_dim / 2);
    let sign = match way {
        Direction::Forward => 1.0f32,
        Direction::Backward => -1.0,
    };
    let batch = tokens / seq;
    let args = Args::new().with(x).with(seq as u32).with(batch as u32);
    let args = args.with(heads as u32).with(dims.head_dim as u32);
    let mut args = args.with(dims.theta.log2()).with(sign);
    // Some 8 packs a thread, so that what a block does once for its position is little.
    let packs = batch * heads * half.div_ceil(16 / q.element.bytes());
    let splits = packs.div_ceil(256 * 8) as u32;
    let (grid, shared) = ([seq as u32, splits.max(1), 1], 8 * half as u32);
    let name = ("rope", Some(q.element));
    // SAFETY: as `rope_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], shared, &mut args)
    }
}

/// Rows of a table, `[vocabulary, cols]`, by id.
///
/// # Safety
/// See [`add`].
pub unsafe fn embedding(
    q: Queue<'_>,
    (vocabulary, cols): (usize, usize),
    ids: u64,
    tokens: usize,
    table: u64,
    out: u64,
) -> Done {
    let args = Args::new().with(ids).with(table).with(out);
    let args = args.with(vocabulary as u32).with(cols as u32);
    let mut args = args.with(q.kernels.fault);
    let name = ("embedding", Some(q.element));
    let grid = [tokens as u32, 1, 1];
    // SAFETY: as `embedding_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}

/// Bytes that [`embedding_backward`] works in.
pub fn embedding_backward_scratch(tokens: usize) -> usize {
    2 * tokens * 4
}

/// The gradient of [`embedding`] for the table (f32), added to.
///
/// # Safety
/// See [`add`].
pub unsafe fn embedding_backward(
    q: Queue<'_>,
    (vocabulary, cols): (usize, usize),
    ids: u64,
    tokens: usize,
    dout: u64,
    dtable: u64,
    scratch: u64,
) -> Done {
    let (next, first) = (scratch, scratch + 4 * tokens as u64);
    let chains = Args::new().with(ids).with(next).with(first);
    let chains = chains.with(tokens as u32).with(vocabulary as u32);
    let mut chains = chains.with(q.kernels.fault);
    let args = Args::new().with(ids).with(next).with(first).with(dout);
    let mut args = args.with(dtable).with(tokens as u32).with(cols as u32);
    // SAFETY: as `embedding_chains` and `embedding_backward_float` take them.
    unsafe {
        let grid = [tokens.div_ceil(8) as u32, 1, 1];
        let name = ("embedding_chains", None);
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut chains)?;
        let name = ("embedding_backward", Some(q.element));
        let grid = [tokens as u32, 1, 1];
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}

/// Bytes that [`linear`], [`linear_dx`] and [`linear_dw`] work in, for (t, n, k).
pub const fn linear_scratch(dims: (usize, usize, usize)) -> usize {
    workspace(dims)
}

/// `y = x · weightᵀ`: x `[t, k]`, weight `[n, k]`, y `[t, n]`, where dims are (t, n, k).
///
/// # Safety
/// See [`add`].
pub unsafe fn linear(
    q: Queue<'_>,
    (t, n, k): (usize, usize, usize),
    x: u64,
    weight: u64,
    y: u64,
    scratch: u64,
) -> Done {
    let product = Product {
        size: (t, n, k),
        transposed: (false, true),
        pitch: (k, k, n),
        element: q.element,
        result: q.element,
        add: false,
    };
    // SAFETY: by the contract above.
    unsafe {
        q.kernels
            .product(q.stream, product, 1.0, [x, weight, y], scratch)
    }
}

/// `dx = dy · weight`, set or added to.
///
/// # Safety
/// See [`add`].
pub unsafe fn linear_dx(
    q: Queue<'_>,
    (t, n, k): (usize, usize, usize),
    [dy, weight, dx]: [u64; 3],
    add: bool,
    scratch: u64,
) -> Done {
    let product = Product {
        size: (t, k, n),
        transposed: (false, false),
        pitch: (n, k, k),
        element: q.element,
        result: q.element,
        add,
    };
    // SAFETY: by the contract above.
    unsafe {
        q.kernels
            .product(q.stream, product, 1.0, [dy, weight, dx], scratch)
    }
}

/// `dweight = dyᵀ · x`, in f32, set or added to.
///
/// # Safety
/// See [`add`].
pub unsafe fn linear_dw(
    q: Queue<'_>,
    (t, n, k): (usize, usize, usize),
    [x, dy, dweight]: [u64; 3],
    add: bool,
    scratch: u64,
) -> Done {
    let product = Product {
        size: (n, k, t),
        transposed: (true, false),
        pitch: (n, k, k),
        element: q.element,
        result: Element::F32,
        add,
    };
    // SAFETY: by the contract above.
    unsafe {
        q.kernels
            .product(q.stream, product, 1.0, [dy, x, dweight], scratch)
    }
}

/// How the classifier's work is cut: tokens at a time, and elements from one row of logits to the
/// next (a multiple of 8, as tensor cores want).
fn classifier_tile(dims: ClassifierDims) -> (usize, usize) {
    let pitch = dims.vocabulary.next_multiple_of(8);
    let fit = (LOGITS / (4 * pitch) / 128 * 128).max(128);
    (fit.min(dims.tokens), pitch)
}

/// Bytes that [`cross_entropy`] works in.
pub fn cross_entropy_scratch(element: Element, dims: ClassifierDims) -> usize {
    let (tile, pitch) = classifier_tile(dims);
    let low = match element {
        Element::F32 => 0,
        Element::Bf16 | Element::F16 => (tile * pitch * 2).next_multiple_of(256),
    };
    workspace((tile, dims.hidden, pitch))
        + (tile * pitch * 4).next_multiple_of(256)
        + low
        + 4 * dims.tokens
}

/// Where the gradients of [`cross_entropy`] go.
#[derive(Clone, Copy, Debug)]
pub struct ClassifierGrads {
    /// dx (set), and dweight in f32.
    pub grads: [u64; 2],
    /// Whether dweight is added to, or set.
    pub add: bool,
    /// By what both are multiplied, and the loss is not: a loss scale.
    pub scale: f32,
}

/// The classifier with its loss: see [`crate::cpu::ops::cross_entropy`].
///
/// # Safety
/// See [`add`].
pub unsafe fn cross_entropy(
    q: Queue<'_>,
    dims: ClassifierDims,
    [x, weight, targets]: [u64; 3],
    scale: f32,
    loss: u64,
    grads: Option<ClassifierGrads>,
    scratch: u64,
) -> Done {
    let (tile, pitch) = classifier_tile(dims);
    let (hidden, vocabulary) = (dims.hidden, dims.vocabulary);
    let bytes = q.element.bytes();
    let room = scratch;
    let logits = room + workspace((tile, hidden, pitch)) as u64;
    let after = logits + (tile * pitch * 4).next_multiple_of(256) as u64;
    let (dlogits, losses) = match q.element {
        Element::F32 => (logits, after),
        Element::Bf16 | Element::F16 => (
            after,
            after + (tile * pitch * 2).next_multiple_of(256) as u64,
        ),
    };
    let forward = |tokens| Product {
        size: (tokens, vocabulary, hidden),
        transposed: (false, true),
        pitch: (hidden, hidden, pitch),
        element: q.element,
        result: Element::F32,
        add: false,
    };
    for start in (0..dims.tokens).step_by(tile) {
        let tokens = tile.min(dims.tokens - start);
        let row = (start * hidden * bytes) as u64;
        let args = Args::new().with(logits).with(targets + 4 * start as u64);
        let args = args.with(losses + 4 * start as u64).with(dlogits);
        let args = args
            .with(vocabulary as u32)
            .with(pitch as u64)
            .with(pitch as u64);
        let grad_scale = grads.map_or(scale, |grads| scale * grads.scale);
        let args = args.with(grad_scale).with(u32::from(grads.is_some()));
        let mut args = args.with(q.kernels.fault);
        let name = ("cross_entropy", Some(q.element));
        // SAFETY: by the contract above; tiles lie in scratch.
        unsafe {
            let all = [x + row, weight, logits];
            q.kernels
                .product(q.stream, forward(tokens), 1.0, all, room)?;
            let grid = [tokens as u32, 1, 1];
            q.kernels
                .launch(q.stream, name, grid, [1024, 1], 0, &mut args)?;
            let Some(ClassifierGrads { grads, add, .. }) = grads else {
                continue;
            };
            let [dx, dweight] = grads;
            let for_x = Product {
                size: (tokens, hidden, vocabulary),
                transposed: (false, false),
                pitch: (pitch, hidden, hidden),
                result: q.element,
                ..forward(tokens)
            };
            let all = [dlogits, weight, dx + row];
            q.kernels.product(q.stream, for_x, 1.0, all, room)?;
            let for_weight = Product {
                size: (vocabulary, hidden, tokens),
                transposed: (true, false),
                pitch: (pitch, hidden, hidden),
                result: Element::F32,
                add: add || start > 0,
                ..for_x
            };
            let all = [dlogits, x + row, dweight];
            q.kernels.product(q.stream, for_weight, 1.0, all, room)?;
        }
    }
    let mut args = Args::new().with(losses).with(loss);
    args = args.with(dims.tokens as u32).with(scale);
    // SAFETY: as `scaled_sum` takes them.
    unsafe {
        let name = ("scaled_sum", None);
        q.kernels
            .launch(q.stream, name, [1, 1, 1], [1024, 1], 0, &mut args)
    }
}

/// Casts n elements from the type `from.1`, which is f32 where the queue's is not, to the queue's.
///
/// # Safety
/// See [`add`].
pub unsafe fn cast(q: Queue<'_>, from: (u64, Element), to: u64, n: usize) -> Done {
    let name = match (from.1, q.element) {
        (_, Element::Bf16) => "cast_to_bf16",
        (_, Element::F16) => "cast_to_f16",
        (Element::F16, Element::F32) => "cast_f16_to_float",
        (_, Element::F32) => "cast_to_float",
    };
    let mut args = Args::new().with(from.0).with(to).with(n as u64);
    let grid = q.kernels.blocks(n.div_ceil(8));
    // SAFETY: as the kernel takes them.
    unsafe {
        q.kernels
            .launch(q.stream, (name, None), grid, [256, 1], 0, &mut args)
    }
}

/// AdamW on n elements with the bits of [`crate::cpu::adamw`]: the gradient's type is `grad.1`, the
/// parameter's the queue's.
///
/// # Panics
/// For bf16 together with f16.
///
/// # Safety
/// See [`add`].
pub unsafe fn adamw(
    q: Queue<'_>,
    scalars: &AdamScalars,
    grad: (u64, Element),
    [master, m, v]: [u64; 3],
    param: u64,
    n: usize,
) -> Done {
    let name = of_types!("adamw", grad.1, q.element);
    let args = Args::new().with(scalars.as_array());
    let args = args.with(u32::from(scalars.is_unchanged())).with(grad.0);
    let args = args.with(master).with(m).with(v).with(param);
    let mut args = args.with(n as u64);
    let grid = q.kernels.blocks(n.div_ceil(4));
    // SAFETY: as the kernel takes them.
    unsafe {
        q.kernels
            .launch(q.stream, (name, None), grid, [256, 1], 0, &mut args)
    }
}

/// Bytes of [`square_sum`]'s result: pieces in f64, to be added in order.
pub const SQUARE_SUMS: usize = SQUARE_SUM_PIECES * 8;

/// The square sum of n elements with the bits of [`crate::cpu::square_sum`], once its pieces are
/// added in order.
///
/// # Safety
/// See [`add`].
pub unsafe fn square_sum(q: Queue<'_>, values: u64, n: usize, sums: u64) -> Done {
    let strand = square_sum_strand(n) as u64;
    let mut args = Args::new()
        .with(values)
        .with(n as u64)
        .with(strand)
        .with(sums);
    let name = ("square_sum", Some(q.element));
    let grid = [SQUARE_SUM_PIECES as u32, 1, 1];
    // SAFETY: as `square_sum_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], 0, &mut args)
    }
}
