//! Causal self-attention with grouped heads (Ainslie et al., arXiv 2305.13245), tile by tile over
//! the queries, so that scores are never held whole; the backward pass recomputes them from the
//! saved log-sum-exp (Dao, FlashAttention-2, arXiv 2307.08691).

use super::matmul::{Matrix, product};
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

/// Queries in a tile.
const QUERIES: usize = 64;

/// Sizes of attention. `heads` is a multiple of `kv_heads`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDims {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl AttentionDims {
    fn q_len(self) -> usize {
        self.batch * self.seq * self.heads * self.head_dim
    }

    fn kv_len(self) -> usize {
        self.batch * self.seq * self.kv_heads * self.head_dim
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Where head `head` of sequence `b` starts among `heads`, and the stride between tokens.
    fn head(self, b: usize, head: usize, heads: usize) -> (usize, usize) {
        (
            (b * self.seq * heads + head) * self.head_dim,
            heads * self.head_dim,
        )
    }

    /// Calls `tile` for each tile of queries: first query and how many.
    fn tiles(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.seq)
            .step_by(QUERIES)
            .map(move |first| (first, QUERIES.min(self.seq - first)))
    }

    fn tile_floats(self) -> usize {
        QUERIES * self.seq
    }
}

/// Floats of scratch that [`attention`] and [`attention_backward`] take on so many threads.
pub fn attention_scratch(dims: AttentionDims, threads: usize) -> usize {
    threads * (2 * dims.tile_floats() + QUERIES)
}

/// One head of a tensor `[batch, seq, heads, head_dim]`.
fn head_of(slice: &[f32], (start, stride): (usize, usize), first: usize) -> Matrix {
    Matrix {
        start: slice[start + first * stride..].as_ptr(),
        row_stride: stride,
        col_stride: 1,
    }
}

/// `out = softmax(q·kᵀ / sqrt(d), causal)·v` and the log-sum-exp of each row of scores.
///
/// q and out are `[batch, seq, heads, head_dim]`; k and v `[batch, seq, kv_heads, head_dim]`; lse
/// `[batch, heads, seq]`.
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub fn attention(
    w: &Workers,
    dims: AttentionDims,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
    scratch: &mut [f32],
) {
    assert_eq!(
        (q.len(), out.len()),
        (dims.q_len(), dims.q_len()),
        "sizes of attention"
    );
    assert_eq!(
        (k.len(), v.len()),
        (dims.kv_len(), dims.kv_len()),
        "sizes of attention"
    );
    assert_eq!(
        lse.len(),
        dims.batch * dims.heads * dims.seq,
        "sizes of attention"
    );
    let per_worker = 2 * dims.tile_floats() + QUERIES;
    assert!(
        scratch.len() >= w.threads() * per_worker,
        "scratch of attention"
    );
    let (out, lse, scratch) = (Shared::new(out), Shared::new(lse), Shared::new(scratch));
    let group = dims.heads / dims.kv_heads;
    w.run(dims.batch * dims.heads, &|item, worker| {
        let (b, head) = (item / dims.heads, item % dims.heads);
        let (of_q, of_kv) = (
            dims.head(b, head, dims.heads),
            dims.head(b, head / group, dims.kv_heads),
        );
        // SAFETY: a worker runs one item at a time; each item has rows of `lse` of its own.
        let (scratch, lse) = unsafe {
            (
                scratch.piece(worker * per_worker..(worker + 1) * per_worker),
                lse.piece(item * dims.seq..(item + 1) * dims.seq),
            )
        };
        let scores = &mut scratch[..dims.tile_floats()];
        for (first, rows) in dims.tiles() {
            let keys = first + rows;
            // SAFETY: the factors are heads of tensors whose lengths were checked; `scores` holds
            // a tile; tiles of this head of `out` are written by this item alone.
            unsafe {
                let (q, k) = (head_of(q, of_q, first), head_of(k, of_kv, 0).transposed());
                let sizes = (rows, keys, dims.head_dim);
                product(sizes, scores.as_mut_ptr(), keys, false, q, k, dims.scale());
                for row in 0..rows {
                    let scores = &mut scores[row * keys..(row + 1) * keys];
                    lse[first + row] = softmax(scores, first + row + 1);
                }
                let out = out.at(of_q.0 + first * of_q.1);
                let p = Matrix::rows(scores, keys);
                let sizes = (rows, dims.head_dim, keys);
                product(sizes, out, of_q.1, false, p, head_of(v, of_kv, 0), 1.0);
            }
        }
    });
}

/// Softmax over the first `seen` scores, zeros behind; returns the log-sum-exp.
fn softmax(scores: &mut [f32], seen: usize) -> f32 {
    let (seen, hidden) = scores.split_at_mut(seen);
    hidden.fill(0.0);
    let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in seen.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    let inverse = 1.0 / sum;
    seen.iter_mut().for_each(|score| *score *= inverse);
    max + sum.ln()
}

/// The gradients of [`attention`]; dq, dk and dv are set.
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub fn attention_backward(
    w: &Workers,
    dims: AttentionDims,
    (q, k, v): (&[f32], &[f32], &[f32]),
    (out, lse, dout): (&[f32], &[f32], &[f32]),
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    scratch: &mut [f32],
) {
    assert_eq!(
        [q.len(), out.len(), dout.len(), dq.len()],
        [dims.q_len(); 4],
        "sizes of attention"
    );
    assert_eq!(
        [k.len(), v.len(), dk.len(), dv.len()],
        [dims.kv_len(); 4],
        "sizes of attention"
    );
    assert_eq!(
        lse.len(),
        dims.batch * dims.heads * dims.seq,
        "sizes of attention"
    );
    let per_worker = 2 * dims.tile_floats() + QUERIES;
    assert!(
        scratch.len() >= w.threads() * per_worker,
        "scratch of attention"
    );
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let scratch = Shared::new(scratch);
    let group = dims.heads / dims.kv_heads;
    w.run(dims.batch * dims.kv_heads, &|item, worker| {
        let (b, kv_head) = (item / dims.kv_heads, item % dims.kv_heads);
        let of_kv = dims.head(b, kv_head, dims.kv_heads);
        // SAFETY: a worker runs one item at a time.
        let scratch = unsafe { scratch.piece(worker * per_worker..(worker + 1) * per_worker) };
        let (p, rest) = scratch.split_at_mut(dims.tile_floats());
        let (ds, delta) = rest.split_at_mut(dims.tile_floats());
        for t in 0..dims.seq {
            let at = of_kv.0 + t * of_kv.1;
            // SAFETY: this head of dk and dv is written by this item alone.
            unsafe {
                dk.piece(at..at + dims.head_dim).fill(0.0);
                dv.piece(at..at + dims.head_dim).fill(0.0);
            }
        }
        for head in kv_head * group..(kv_head + 1) * group {
            let of_q = dims.head(b, head, dims.heads);
            let lse = &lse[(b * dims.heads + head) * dims.seq..][..dims.seq];
            for (first, rows) in dims.tiles() {
                let keys = first + rows;
                // SAFETY: factors are heads of tensors whose lengths were checked; p and ds hold a
                // tile; this head of dq, dk and dv is written by this item alone.
                unsafe {
                    let q = head_of(q, of_q, first);
                    let dout_tile = head_of(dout, of_q, first);
                    let (k, v) = (head_of(k, of_kv, 0), head_of(v, of_kv, 0));
                    let sizes = (rows, keys, dims.head_dim);
                    product(
                        sizes,
                        p.as_mut_ptr(),
                        keys,
                        false,
                        q,
                        k.transposed(),
                        dims.scale(),
                    );
                    product(
                        sizes,
                        ds.as_mut_ptr(),
                        keys,
                        false,
                        dout_tile,
                        v.transposed(),
                        1.0,
                    );
                    for row in 0..rows {
                        let at = of_q.0 + (first + row) * of_q.1;
                        let dot = out[at..at + dims.head_dim].iter().zip(&dout[at..]);
                        delta[row] = dot.map(|(o, d)| o * d).sum();
                        let tile = row * keys..(row + 1) * keys;
                        let seen = first + row + 1;
                        let (lse, delta) = (lse[first + row], delta[row]);
                        softmax_backward(&mut p[tile.clone()], &mut ds[tile], seen, lse, delta);
                    }
                    let (p, ds) = (Matrix::rows(p, keys), Matrix::rows(ds, keys));
                    let by_key = (keys, dims.head_dim, rows);
                    product(
                        by_key,
                        dv.at(of_kv.0),
                        of_kv.1,
                        true,
                        p.transposed(),
                        dout_tile,
                        1.0,
                    );
                    let scale = dims.scale();
                    product(
                        by_key,
                        dk.at(of_kv.0),
                        of_kv.1,
                        true,
                        ds.transposed(),
                        q,
                        scale,
                    );
                    let dq = dq.at(of_q.0 + first * of_q.1);
                    product((rows, dims.head_dim, keys), dq, of_q.1, false, ds, k, scale);
                }
            }
        }
    });
}

/// Scores become probabilities, and their gradient that of the scores.
fn softmax_backward(p: &mut [f32], ds: &mut [f32], seen: usize, lse: f32, delta: f32) {
    for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
        *p = (*p - lse).exp();
        *ds = *p * (*ds - delta);
    }
    p[seen..].fill(0.0);
    ds[seen..].fill(0.0);
}
