//! The kernels of a decoder's training step: operands, work, and how often a step launches each.
//!
//! The counts are those of `examples/decoder/src/layer.rs`, with the forward pass of a layer once, its
//! recomputation once (up to the product of gate and up) and its backward pass once.

use forebay_kernels::cpu::AdamW;
use forebay_kernels::cpu::ops::{AttentionDims, ClassifierDims, Direction, RopeDims};
use forebay_kernels::cuda::ops::{self, Queue};
use forebay_kernels::cuda::{CudaError, Element, check, sys};

use super::{Shapes, Work};

pub(super) type Done = Result<(), CudaError>;

/// What an operand holds, and its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill {
    /// Random values.
    Noise(usize),
    /// Random values above zero.
    Positive(usize),
    /// So many token ids below the second.
    Ids(usize, usize),
    /// Anything.
    Room(usize),
}

impl Fill {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Noise(bytes) | Self::Positive(bytes) | Self::Room(bytes) => *bytes,
            Self::Ids(count, _) => 4 * count,
        }
    }
}

/// Where a kernel's operands are.
pub(super) type Places = [u64; 12];

type Launch = dyn Fn(Queue<'_>, &Places) -> Done;

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) shape: String,
    pub(super) operands: Vec<Fill>,
    pub(super) work: Work,
    /// Launches of a step.
    pub(super) launches: u32,
    /// Queues it once.
    pub(super) run: Box<Launch>,
}

/// All of them.
pub(super) fn all(s: Shapes) -> Vec<Case> {
    let mut all = Vec::new();
    products(s, &mut all);
    rows(s, &mut all);
    elements(s, &mut all);
    attention(s, &mut all);
    ends(s, &mut all);
    states(s, &mut all);
    all
}

/// Launches of a step of what each layer launches `times` times.
fn per_layer(s: Shapes, times: usize) -> u32 {
    (s.layers * times) as u32
}

/// Adds a product and its gradients. The counts are of the forward pass with recomputation, and of each
/// of the two gradients.
fn product(all: &mut Vec<Case>, dims: (usize, usize, usize), forward: u32, backward: u32) {
    let (t, n, k) = dims;
    let (x, w, y) = (2 * t * k, 2 * n * k, 2 * t * n);
    let work = Work::Flops(2.0 * t as f64 * n as f64 * k as f64);
    let room = Fill::Room(ops::linear_scratch(dims));
    let shape = format!("{t} x {n} x {k}");
    all.push(Case {
        name: "linear",
        shape: shape.clone(),
        operands: vec![Fill::Noise(x), Fill::Noise(w), Fill::Room(y), room],
        work,
        launches: forward,
        run: Box::new(move |q, &[x, w, y, room, ..]| {
            // SAFETY: operands as long as the case says, used by this stream alone; so for all below.
            unsafe { ops::linear(q, dims, x, w, y, room) }
        }),
    });
    all.push(Case {
        name: "linear dx",
        shape: shape.clone(),
        operands: vec![Fill::Noise(y), Fill::Noise(w), Fill::Room(x), room],
        work,
        launches: backward,
        run: Box::new(move |q, &[dy, w, dx, room, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::linear_dx(q, dims, [dy, w, dx], false, room) }
        }),
    });
    all.push(Case {
        name: "linear dw",
        shape,
        operands: vec![Fill::Noise(x), Fill::Noise(y), Fill::Noise(2 * w), room],
        work,
        launches: backward,
        run: Box::new(move |q, &[x, dy, dw, room, ..]| {
            // SAFETY: as for `linear`; the gradient is f32.
            unsafe { ops::linear_dw(q, dims, [x, dy, dw], false, room) }
        }),
    });
}

fn products(s: Shapes, all: &mut Vec<Case>) {
    let (t, h, f) = (s.tokens, s.hidden, s.ffn);
    let each = |times| per_layer(s, times);
    // Queries, keys, values and output, each forward and again.
    product(all, (t, h, h), each(8), each(4));
    // Gate and up, each forward and again.
    product(all, (t, f, h), each(4), each(2));
    // Down is not recomputed.
    product(all, (t, h, f), each(1), each(1));
    // The classifier whole; a step has it in tiles, in `cross_entropy`.
    product(all, (t, s.vocabulary, h), 0, 0);
}

fn rows(s: Shapes, all: &mut Vec<Case>) {
    let (t, h) = (s.tokens, s.hidden);
    let (state, eps) = (2 * t * h, 1e-5);
    let shape = format!("{t} x {h}");
    all.push(Case {
        name: "rms_norm",
        shape: shape.clone(),
        operands: vec![Fill::Noise(state), Fill::Noise(2 * h), Fill::Room(state)],
        work: Work::Bytes((2 * state + 2 * h) as f64),
        launches: per_layer(s, 4) + 1,
        run: Box::new(move |q, &[x, w, y, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::rms_norm(q, (t, h), x, w, eps, y) }
        }),
    });
    let room = Fill::Room(ops::rms_norm_backward_scratch(h));
    all.push(Case {
        name: "rms_norm_backward",
        shape,
        operands: vec![
            Fill::Noise(state),
            Fill::Noise(2 * h),
            Fill::Noise(state),
            Fill::Noise(state),
            Fill::Noise(4 * h),
            room,
        ],
        // x, dy, dx read and written; the weight, and its gradient read and written.
        work: Work::Bytes((4 * state + 10 * h) as f64),
        launches: per_layer(s, 2) + 1,
        run: Box::new(move |q, &[x, w, dy, dx, dw, room, ..]| {
            // SAFETY: as for `linear`; the weight's gradient is f32.
            unsafe { ops::rms_norm_backward(q, (t, h), [x, w, dy], eps, dx, true, dw, room) }
        }),
    });
    let dims = RopeDims {
        seq: s.seq,
        heads: s.heads,
        head_dim: h / s.heads,
        theta: 1e4,
    };
    all.push(Case {
        name: "rope",
        shape: format!("{t} x {} x {}", s.heads, h / s.heads),
        operands: vec![Fill::Noise(state)],
        work: Work::Bytes(2.0 * state as f64),
        launches: per_layer(s, 6),
        run: Box::new(move |q, &[x, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::rope(q, dims, x, t, Direction::Forward) }
        }),
    });
}

fn elements(s: Shapes, all: &mut Vec<Case>) {
    let (wide, n) = (s.tokens * s.ffn, s.tokens * s.hidden);
    let some = |n: usize| Fill::Noise(2 * n);
    all.push(Case {
        name: "swiglu",
        shape: format!("{} x {}", s.tokens, s.ffn),
        operands: vec![some(wide), some(wide), some(wide)],
        work: Work::Bytes(6.0 * wide as f64),
        launches: per_layer(s, 2),
        run: Box::new(move |q, &[gate, up, out, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::swiglu(q, gate, up, out, wide) }
        }),
    });
    all.push(Case {
        name: "swiglu_backward",
        shape: format!("{} x {}", s.tokens, s.ffn),
        operands: vec![some(wide); 5],
        work: Work::Bytes(10.0 * wide as f64),
        launches: per_layer(s, 1),
        run: Box::new(move |q, &[gate, up, dout, dgate, dup, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::swiglu_backward(q, [gate, up, dout], [dgate, dup], wide) }
        }),
    });
    all.push(Case {
        name: "add",
        shape: format!("{} x {}", s.tokens, s.hidden),
        operands: vec![some(n); 3],
        work: Work::Bytes(6.0 * n as f64),
        launches: per_layer(s, 3),
        run: Box::new(move |q, &[a, b, out, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::add(q, a, b, out, n) }
        }),
    });
}

fn attention(s: Shapes, all: &mut Vec<Case>) {
    let dims = AttentionDims {
        batch: s.tokens / s.seq,
        seq: s.seq,
        heads: s.heads,
        kv_heads: s.heads,
        head_dim: s.hidden / s.heads,
    };
    let state = 2 * s.tokens * s.hidden;
    let lse = 4 * s.tokens * s.heads;
    // A product of queries and keys, of which half counts.
    let one = (s.tokens * s.hidden) as f64 * s.seq as f64;
    let shape = format!("{} x {} x {}", dims.batch, dims.heads, dims.seq);
    let shape = format!("{shape} x {}", dims.head_dim);
    all.push(Case {
        name: "attention",
        shape: shape.clone(),
        operands: [vec![Fill::Noise(state); 4], vec![Fill::Room(lse)]].concat(),
        work: Work::Flops(2.0 * one),
        launches: per_layer(s, 2),
        run: Box::new(move |q, &[query, key, value, out, lse, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::attention(q, dims, [query, key, value], out, lse) }
        }),
    });
    let room = Fill::Room(ops::attention_backward_scratch(dims));
    all.push(Case {
        name: "attention_backward",
        shape,
        operands: [vec![Fill::Noise(state); 8], vec![Fill::Positive(lse), room]].concat(),
        work: Work::Flops(5.0 * one),
        launches: per_layer(s, 1),
        run: Box::new(
            move |q, &[query, key, value, out, dout, dq, dk, dv, lse, room, ..]| {
                let (from, to) = ([query, key, value], [dq, dk, dv]);
                // SAFETY: as for `linear`.
                unsafe { ops::attention_backward(q, dims, from, [out, lse, dout], to, room) }
            },
        ),
    });
}

/// The two ends of the model.
fn ends(s: Shapes, all: &mut Vec<Case>) {
    let (t, h, v) = (s.tokens, s.hidden, s.vocabulary);
    let (state, table, ids) = (2 * t * h, 2 * v * h, Fill::Ids(t, v));
    let mut named = super::ids(t, v);
    named.sort_unstable();
    named.dedup();
    all.push(Case {
        name: "embedding",
        shape: format!("{t} of {v} x {h}"),
        operands: vec![ids, Fill::Noise(table), Fill::Room(state)],
        work: Work::Bytes((named.len() * 2 * h + state + 4 * t) as f64),
        launches: 1,
        run: Box::new(move |q, &[ids, table, out, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::embedding(q, (v, h), ids, t, table, out) }
        }),
    });
    let room = Fill::Room(ops::embedding_backward_scratch(t));
    all.push(Case {
        name: "embedding_backward",
        shape: format!("{t} of {v} x {h}"),
        operands: vec![ids, Fill::Noise(state), Fill::Noise(2 * table), room],
        // Rows that tokens name, read and written in f32.
        work: Work::Bytes((named.len() * 8 * h + state + 4 * t) as f64),
        launches: 1,
        run: Box::new(move |q, &[ids, dout, dtable, room, ..]| {
            // SAFETY: as for `linear`; the table's gradient is f32.
            unsafe { ops::embedding_backward(q, (v, h), ids, t, dout, dtable, room) }
        }),
    });
    let dims = ClassifierDims {
        tokens: t,
        hidden: h,
        vocabulary: v,
    };
    let room = Fill::Room(ops::cross_entropy_scratch(Element::Bf16, dims));
    let scale = 1.0 / t as f32;
    all.push(Case {
        name: "cross_entropy",
        shape: format!("{t} x {v} x {h}, with gradients"),
        operands: vec![
            Fill::Noise(state),
            Fill::Noise(table),
            ids,
            Fill::Room(4),
            Fill::Room(state),
            Fill::Noise(2 * table),
            room,
        ],
        work: Work::Flops(6.0 * t as f64 * v as f64 * h as f64),
        launches: 1,
        run: Box::new(move |q, &[x, w, targets, loss, dx, dw, room, ..]| {
            // SAFETY: as for `linear`; the weight's gradient is f32.
            unsafe {
                let (grads, add) = ([dx, dw], false);
                let grads = Some(ops::ClassifierGrads {
                    grads,
                    add,
                    scale: 1.0,
                });
                ops::cross_entropy(q, dims, [x, w, targets], scale, loss, grads, room)
            }
        }),
    });
}

/// What is done for each parameter: for as many as a layer has.
fn states(s: Shapes, all: &mut Vec<Case>) {
    let n = 4 * s.hidden * s.hidden + 3 * s.hidden * s.ffn + 2 * s.hidden;
    // The table in parts as large as a layer.
    let parts = (s.layers + (s.vocabulary * s.hidden + n / 2) / n) as u32;
    let shape = format!("{n}");
    all.push(Case {
        name: "zero",
        shape: format!("{n} f32"),
        operands: vec![Fill::Room(4 * n)],
        work: Work::Bytes(4.0 * n as f64),
        launches: parts,
        run: Box::new(move |q, &[to, ..]| {
            // SAFETY: as for `linear`.
            let done = unsafe { sys::cuMemsetD8Async(to, 0, 4 * n, q.stream) };
            check("cuMemsetD8Async", done)
        }),
    });
    all.push(Case {
        name: "cast",
        shape: format!("{n} f32 to bf16"),
        operands: vec![Fill::Noise(4 * n), Fill::Room(2 * n)],
        work: Work::Bytes(6.0 * n as f64),
        launches: parts,
        run: Box::new(move |q, &[from, to, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::cast(q, (from, Element::F32), to, n) }
        }),
    });
    // The two below are the CPU's where states are offloaded.
    let here = if s.resident { parts } else { 0 };
    let adam = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let scalars = adam.at(2, 1e-3, 1.0);
    all.push(Case {
        name: "adamw",
        shape: format!("{shape}, bf16 gradient and parameter"),
        operands: vec![
            Fill::Noise(2 * n),
            Fill::Noise(4 * n),
            Fill::Noise(4 * n),
            Fill::Positive(4 * n),
            Fill::Room(2 * n),
        ],
        work: Work::Bytes(28.0 * n as f64),
        launches: here,
        run: Box::new(move |q, &[grad, master, m, v, param, ..]| {
            let grad = (grad, Element::Bf16);
            // SAFETY: as for `linear`.
            unsafe { ops::adamw(q, &scalars, grad, [master, m, v], param, n) }
        }),
    });
    all.push(Case {
        name: "square_sum",
        shape: format!("{shape} bf16"),
        operands: vec![Fill::Noise(2 * n), Fill::Room(ops::SQUARE_SUMS)],
        work: Work::Bytes(2.0 * n as f64),
        launches: here,
        run: Box::new(move |q, &[values, sums, ..]| {
            // SAFETY: as for `linear`.
            unsafe { ops::square_sum(q, values, n, sums) }
        }),
    });
}
