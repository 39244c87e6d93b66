//! The classifier and its loss in one, tiled over the vocabulary: logits are never held whole
//! (Wijmans et al., Cut Your Losses, arXiv 2411.09009).

use super::embedding::check;
use super::matmul::{Matrix, product};
use std::ops::Range;

use super::piece;
use crate::KernelError;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

/// A target that does not count.
pub const IGNORED: u32 = u32::MAX;

const TOKENS: usize = 64;
const TILE: usize = 512;

/// Sizes of the classifier.
#[derive(Clone, Copy, Debug)]
pub struct ClassifierDims {
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x and of the weight.
    pub hidden: usize,
    /// Rows of the weight.
    pub vocabulary: usize,
}

/// Where the gradients go.
#[derive(Debug)]
pub struct ClassifierGrads<'a> {
    /// `[tokens, hidden]`, set.
    pub dx: &'a mut [f32],
    /// `[vocabulary, hidden]`, added to.
    pub dweight: &'a mut [f32],
    /// By what both are multiplied, and the loss is not: a loss scale.
    pub scale: f32,
}

/// Floats of scratch that [`cross_entropy`] takes on so many threads.
pub fn cross_entropy_scratch(dims: ClassifierDims, threads: usize) -> usize {
    2 * dims.tokens + threads * TOKENS * TILE
}

/// The loss `scale * sum over counted tokens of (logsumexp(x·weightᵀ) - the target's logit)`, and
/// its gradients. With scale = 1 / counted tokens that is the mean cross-entropy in nats.
///
/// # Errors
/// [`KernelError::IdOutOfRange`] for a target that is neither a row of the weight nor [`IGNORED`].
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub fn cross_entropy(
    w: &Workers,
    dims: ClassifierDims,
    x: &[f32],
    weight: &[f32],
    targets: &[u32],
    scale: f32,
    loss: &mut f32,
    grads: Option<ClassifierGrads<'_>>,
    scratch: &mut [f32],
) -> Result<(), KernelError> {
    let ClassifierDims {
        tokens,
        hidden,
        vocabulary,
    } = dims;
    assert_eq!(
        (x.len(), targets.len()),
        (tokens * hidden, tokens),
        "sizes of a classifier"
    );
    assert_eq!(weight.len(), vocabulary * hidden, "sizes of a classifier");
    for (position, target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORED) {
        check(&[*target], vocabulary).map_err(|_| KernelError::IdOutOfRange {
            id: *target,
            position,
            vocabulary,
        })?;
    }
    let (rows, tiles) = scratch.split_at_mut(2 * tokens);
    let (lse, losses) = rows.split_at_mut(tokens);
    let classifier = Classifier {
        dims,
        x,
        weight,
        targets,
        scale: grads.as_ref().map_or(scale, |grads| scale * grads.scale),
    };
    let (dx, dweight) = match grads {
        Some(grads) => (Some(grads.dx), Some(grads.dweight)),
        None => (None, None),
    };
    classifier.rows(w, lse, losses, dx, tiles);
    if let Some(dweight) = dweight {
        classifier.columns(w, lse, dweight, tiles);
    }
    let sum: f64 = losses.iter().map(|l| f64::from(*l)).sum();
    *loss = (sum * f64::from(scale)) as f32;
    Ok(())
}

struct Classifier<'a> {
    dims: ClassifierDims,
    x: &'a [f32],
    weight: &'a [f32],
    targets: &'a [u32],
    /// Of the gradients.
    scale: f32,
}

impl Classifier<'_> {
    /// Logits of a block of tokens and a tile of the vocabulary.
    fn logits(&self, tokens: &Range<usize>, tile: &Range<usize>, out: &mut [f32]) {
        let hidden = self.dims.hidden;
        let x = &self.x[tokens.start * hidden..tokens.end * hidden];
        let weight = &self.weight[tile.start * hidden..tile.end * hidden];
        let out = &mut out[..tokens.len() * tile.len()];
        let (a, b) = (
            Matrix::rows(x, hidden),
            Matrix::rows(weight, hidden).transposed(),
        );
        // SAFETY: the slices were just cut to these sizes.
        unsafe {
            let sizes = (tokens.len(), tile.len(), hidden);
            product(sizes, out.as_mut_ptr(), tile.len(), false, a, b, 1.0);
        }
    }

    /// Logits become their gradients; `lse` is of this block of tokens.
    fn dlogits(&self, tokens: &Range<usize>, tile: &Range<usize>, lse: &[f32], logits: &mut [f32]) {
        for (row, t) in tokens.clone().enumerate() {
            let logits = &mut logits[row * tile.len()..(row + 1) * tile.len()];
            if self.targets[t] == IGNORED {
                logits.fill(0.0);
                continue;
            }
            for logit in logits.iter_mut() {
                *logit = self.scale * (*logit - lse[row]).exp();
            }
            let target = self.targets[t] as usize;
            if tile.contains(&target) {
                logits[target - tile.start] -= self.scale;
            }
        }
    }

    fn tiles(&self) -> impl Iterator<Item = Range<usize>> {
        let vocabulary = self.dims.vocabulary;
        (0..vocabulary.div_ceil(TILE)).map(move |i| piece(i, TILE, vocabulary))
    }

    /// Loss, log-sum-exp and dx, block of tokens by block of tokens.
    fn rows(
        &self,
        w: &Workers,
        lse: &mut [f32],
        losses: &mut [f32],
        dx: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let ClassifierDims { tokens, hidden, .. } = self.dims;
        let dx = dx.map(|dx| {
            assert_eq!(dx.len(), tokens * hidden, "sizes of a classifier");
            Shared::new(dx)
        });
        let (lse, losses) = (Shared::new(lse), Shared::new(losses));
        let scratch = Shared::new(scratch);
        w.run(tokens.div_ceil(TOKENS), &|block, worker| {
            let range = piece(block, TOKENS, tokens);
            // SAFETY: a worker runs one block at a time; each token belongs to one block.
            let (scratch, lse_of_block, losses) = unsafe {
                (
                    scratch.piece(worker * TOKENS * TILE..(worker + 1) * TOKENS * TILE),
                    lse.piece(range.clone()),
                    losses.piece(range.clone()),
                )
            };
            self.losses(&range, lse_of_block, losses, scratch);
            let Some(dx) = &dx else { return };
            for (index, tile) in self.tiles().enumerate() {
                self.logits(&range, &tile, scratch);
                self.dlogits(&range, &tile, lse_of_block, scratch);
                let weight = &self.weight[tile.start * hidden..tile.end * hidden];
                let dlogits = Matrix::rows(scratch, tile.len());
                let sizes = (range.len(), hidden, tile.len());
                // SAFETY: factors of these sizes; each token's row of dx belongs to this block.
                unsafe {
                    let dx = dx.at(range.start * hidden);
                    product(
                        sizes,
                        dx,
                        hidden,
                        index > 0,
                        dlogits,
                        Matrix::rows(weight, hidden),
                        1.0,
                    );
                }
            }
        });
    }

    /// The losses of a block of tokens, by an online log-sum-exp over tiles.
    fn losses(
        &self,
        range: &Range<usize>,
        lse: &mut [f32],
        losses: &mut [f32],
        scratch: &mut [f32],
    ) {
        let mut max = [f32::NEG_INFINITY; TOKENS];
        let mut sum = [0.0f32; TOKENS];
        let mut hit = [0.0f32; TOKENS];
        for tile in self.tiles() {
            self.logits(range, &tile, scratch);
            for (row, t) in range.clone().enumerate() {
                let logits = &scratch[row * tile.len()..(row + 1) * tile.len()];
                let highest = logits.iter().copied().fold(max[row], f32::max);
                let fresh: f32 = logits.iter().map(|l| (l - highest).exp()).sum();
                sum[row] = sum[row] * (max[row] - highest).exp() + fresh;
                max[row] = highest;
                let target = self.targets[t] as usize;
                if tile.contains(&target) {
                    hit[row] = logits[target - tile.start];
                }
            }
        }
        for (row, t) in range.clone().enumerate() {
            lse[row] = max[row] + sum[row].ln();
            losses[row] = if self.targets[t] == IGNORED {
                0.0
            } else {
                lse[row] - hit[row]
            };
        }
    }

    /// dweight, tile of the vocabulary by tile of the vocabulary, tokens in order.
    fn columns(&self, w: &Workers, lse: &[f32], dweight: &mut [f32], scratch: &mut [f32]) {
        let ClassifierDims {
            tokens,
            hidden,
            vocabulary,
        } = self.dims;
        assert_eq!(dweight.len(), vocabulary * hidden, "sizes of a classifier");
        let (dweight, scratch) = (Shared::new(dweight), Shared::new(scratch));
        // Narrower than a tile of the rows' pass, so that a small vocabulary spreads over threads.
        const COLUMNS: usize = TILE / 8;
        w.run(vocabulary.div_ceil(COLUMNS), &|index, worker| {
            let tile = piece(index, COLUMNS, vocabulary);
            // SAFETY: a worker runs one tile at a time.
            let scratch =
                unsafe { scratch.piece(worker * TOKENS * TILE..(worker + 1) * TOKENS * TILE) };
            for block in 0..tokens.div_ceil(TOKENS) {
                let range = piece(block, TOKENS, tokens);
                self.logits(&range, &tile, scratch);
                self.dlogits(&range, &tile, &lse[range.clone()], scratch);
                let x = &self.x[range.start * hidden..range.end * hidden];
                let dlogits = Matrix::rows(scratch, tile.len()).transposed();
                let sizes = (tile.len(), hidden, range.len());
                // SAFETY: factors of these sizes; each row of dweight belongs to one tile.
                unsafe {
                    let dweight = dweight.at(tile.start * hidden);
                    product(
                        sizes,
                        dweight,
                        hidden,
                        true,
                        dlogits,
                        Matrix::rows(x, hidden),
                        1.0,
                    );
                }
            }
        });
    }
}
