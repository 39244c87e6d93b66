//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467): y = weight * x / sqrt(mean(x²) + eps).

use super::piece;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

const ROWS: usize = 32;
/// Partial sums of the weight's gradient, whatever the number of rows.
const BLOCKS: usize = 32;

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (blocks, rest) = x.as_chunks::<8>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += x * x;
        }
    }
    let sum: f32 = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// Normalizes each row: x and y are `[rows, cols]`, weight `[cols]`.
pub fn rms_norm(w: &Workers, cols: usize, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert_eq!((x.len(), weight.len()), (y.len(), cols), "sizes of a norm");
    let rows = x.len() / cols;
    let y = Shared::new(y);
    w.run(rows.div_ceil(ROWS), &|block, _| {
        for row in piece(block, ROWS, rows) {
            let x = &x[row * cols..(row + 1) * cols];
            // SAFETY: each row belongs to one block.
            let y = unsafe { y.piece(row * cols..(row + 1) * cols) };
            let scale = inverse_rms(x, eps);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = weight * (x * scale);
            }
        }
    });
}

/// Floats of scratch that [`rms_norm_backward`] takes.
pub fn rms_norm_backward_scratch(cols: usize) -> usize {
    BLOCKS * cols
}

/// The gradients of [`rms_norm`]: dx is set or added to, dweight added to.
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub fn rms_norm_backward(
    w: &Workers,
    cols: usize,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    add: bool,
    dweight: &mut [f32],
    scratch: &mut [f32],
) {
    assert_eq!((x.len(), x.len()), (dy.len(), dx.len()), "sizes of a norm");
    assert_eq!(
        (weight.len(), dweight.len()),
        (cols, cols),
        "sizes of a norm"
    );
    let rows = x.len() / cols;
    let per_block = rows.div_ceil(BLOCKS);
    let partial = &mut scratch[..BLOCKS * cols];
    let (dx, shared) = (Shared::new(dx), Shared::new(partial));
    w.run(BLOCKS, &|block, _| {
        // SAFETY: each block has a row of partial sums of its own.
        let partial = unsafe { shared.piece(block * cols..(block + 1) * cols) };
        partial.fill(0.0);
        for row in piece(block, per_block, rows) {
            let range = row * cols..(row + 1) * cols;
            let (x, dy) = (&x[range.clone()], &dy[range.clone()]);
            // SAFETY: each row belongs to one block.
            let dx = unsafe { dx.piece(range) };
            backward_row(x, weight, eps, dy, dx, add, partial);
        }
    });
    for block in partial.chunks_exact(cols) {
        for (dweight, partial) in dweight.iter_mut().zip(block) {
            *dweight += partial;
        }
    }
}

fn backward_row(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    add: bool,
    dweight: &mut [f32],
) {
    let scale = inverse_rms(x, eps);
    let mut dot = 0.0f32;
    for (((x, dy), weight), dweight) in x.iter().zip(dy).zip(weight).zip(dweight) {
        dot += x * dy * weight;
        *dweight += dy * (x * scale);
    }
    let pull = dot * scale * scale * scale / x.len() as f32;
    for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
        let gradient = weight * dy * scale - x * pull;
        *dx = if add { *dx + gradient } else { gradient };
    }
}
