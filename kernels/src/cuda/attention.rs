//! Causal attention: on tensor cores where they serve, else on the plain ones.

use super::kernels::{Args, Element};
use super::ops::{Done, Queue};
use crate::cpu::ops::AttentionDims;

#[derive(Clone, Copy)]
#[repr(C)]
struct Dims {
    batch: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    d: u32,
}

/// Rows of a tile of the kernels for plain cores.
const ROWS: usize = 32;

impl Dims {
    fn of(dims: AttentionDims) -> Self {
        Self {
            batch: dims.batch as u32,
            seq: dims.seq as u32,
            heads: dims.heads as u32,
            kv_heads: dims.kv_heads as u32,
            d: dims.head_dim as u32,
        }
    }
}

fn tiles(seq: usize) -> u32 {
    seq.div_ceil(ROWS) as u32
}

/// The kernels for tensor cores, for one size of heads: forward, dq, dk and dv.
struct Tensor {
    names: [&'static str; 3],
    shared: [usize; 3],
}

/// Rows of their tiles, but for the queries of the forward kernel.
const TILE: usize = 64;
const QUERIES: usize = 128;
const THREADS: u32 = 128;

impl Tensor {
    /// Where they serve: bf16 and f16, sizes they are made for, all of `tensors` aligned to 16 bytes, and a
    /// device with enough shared memory.
    fn of(q: Queue<'_>, dims: AttentionDims, tensors: &[u64]) -> Option<Self> {
        macro_rules! names {
            ($d:literal) => {
                match q.element {
                    Element::F32 => return None,
                    Element::Bf16 => names!("", $d),
                    Element::F16 => names!("f16_", $d),
                }
            };
            ($t:literal, $d:literal) => {
                [
                    concat!("attention_mma_", $t, $d),
                    concat!("attention_mma_backward_q_", $t, $d),
                    concat!("attention_mma_backward_kv_", $t, $d),
                ]
            };
        }
        let names = match dims.head_dim {
            32 => names!(32),
            64 => names!(64),
            96 => names!(96),
            128 => names!(128),
            _ => return None,
        };
        // Six tiles in each; then 4 sums of each thread; lse and delta of a tile; of two tiles, and P of one.
        let tiles = 6 * TILE * dims.head_dim * 2;
        let rows = 2 * 4 * TILE;
        let shared = [
            tiles + 4 * 4 * THREADS as usize,
            tiles + rows,
            tiles + 2 * rows + TILE * TILE * 2,
        ];
        let serve = tensors.iter().all(|address| address % 16 == 0)
            && shared.iter().all(|bytes| *bytes <= q.kernels.shared);
        serve.then_some(Self { names, shared })
    }

    /// Queues kernel `which`: a block for each tile of `rows` rows and each of `heads` heads.
    ///
    /// # Safety
    /// As [`Kernels::launch`].
    unsafe fn launch(
        &self,
        q: Queue<'_>,
        which: usize,
        (heads, rows): (usize, usize),
        dims: AttentionDims,
        args: &mut Args,
    ) -> Done {
        let grid = [(dims.batch * heads * dims.seq.div_ceil(rows)) as u32, 1, 1];
        let (name, shared) = ((self.names[which], None), self.shared[which] as u32);
        // SAFETY: by the contract above.
        unsafe {
            q.kernels
                .launch(q.stream, name, grid, [THREADS, 1], shared, args)
        }
    }
}

/// Causal attention: out and lse from q, k and v.
///
/// # Safety
/// See [`add`](super::ops::add).
pub unsafe fn attention(
    q: Queue<'_>,
    dims: AttentionDims,
    [query, key, value]: [u64; 3],
    out: u64,
    lse: u64,
) -> Done {
    let args = Args::new().with(query).with(key).with(value);
    let mut args = args.with(out).with(lse).with(Dims::of(dims));
    if let Some(tensor) = Tensor::of(q, dims, &[query, key, value, out]) {
        // SAFETY: as `attention_mma_64` takes them, by the contract above.
        return unsafe { tensor.launch(q, 0, (dims.heads, QUERIES), dims, &mut args) };
    }
    let shared = (3 * ROWS * (dims.head_dim + 1) + ROWS * (ROWS + 1)) * 4;
    let grid = [tiles(dims.seq), dims.heads as u32, dims.batch as u32];
    let name = ("attention", Some(q.element));
    // SAFETY: as `attention_float` takes them.
    unsafe {
        q.kernels
            .launch(q.stream, name, grid, [256, 1], shared as u32, &mut args)
    }
}

/// Bytes that [`attention_backward`] works in.
pub fn attention_backward_scratch(dims: AttentionDims) -> usize {
    dims.batch * dims.heads * dims.seq * 4
}

/// The gradients of [`attention`] for q, k and v, set.
///
/// # Safety
/// See [`add`](super::ops::add).
pub unsafe fn attention_backward(
    q: Queue<'_>,
    dims: AttentionDims,
    [query, key, value]: [u64; 3],
    [out, lse, dout]: [u64; 3],
    [dq, dk, dv]: [u64; 3],
    scratch: u64,
) -> Done {
    let n = Dims::of(dims);
    let all = [query, key, value, out, dout, dq, dk, dv];
    if let Some(tensor) = Tensor::of(q, dims, &all) {
        let args = || Args::new().with(query).with(key).with(value);
        let mut for_q = args().with(out).with(lse).with(dout);
        for_q = for_q.with(scratch).with(dq).with(n);
        let mut for_kv = args().with(lse).with(scratch).with(dout);
        for_kv = for_kv.with(dk).with(dv).with(n);
        // SAFETY: as the kernels take them, by the contract above; the first leaves delta in scratch.
        unsafe {
            tensor.launch(q, 1, (dims.heads, TILE), dims, &mut for_q)?;
            return tensor.launch(q, 2, (dims.kv_heads, TILE), dims, &mut for_kv);
        }
    }
    let some = Some(q.element);
    let mut delta = Args::new().with(out).with(dout).with(scratch).with(n);
    let args = || Args::new().with(query).with(key).with(value).with(lse);
    let args = || args().with(scratch).with(dout);
    let (mut for_q, mut for_kv) = (args().with(dq).with(n), args().with(dk).with(dv).with(n));
    let shared = (4 * ROWS * (dims.head_dim + 1) + 2 * ROWS * (ROWS + 1)) * 4;
    let rows = dims.batch * dims.seq * dims.heads;
    let (batch, heads) = (dims.batch as u32, dims.heads as u32);
    // SAFETY: as the kernels take them.
    unsafe {
        let launch = |name, grid, shared, args: &mut Args| {
            q.kernels
                .launch(q.stream, (name, some), grid, [256, 1], shared, args)
        };
        launch(
            "attention_delta",
            [rows.div_ceil(8) as u32, 1, 1],
            0,
            &mut delta,
        )?;
        let grid = [tiles(dims.seq), heads, batch];
        launch("attention_backward_q", grid, shared as u32, &mut for_q)?;
        let grid = [tiles(dims.seq), dims.kv_heads as u32, batch];
        launch("attention_backward_kv", grid, shared as u32, &mut for_kv)
    }
}
