//! Rows of a table by token id, and the gradient back into the table.

use super::piece;
use crate::KernelError;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

const TOKENS: usize = 64;
/// Ranges of the vocabulary, each filled by one piece in the order of the tokens.
const RANGES: usize = 32;

pub(super) fn check(ids: &[u32], vocabulary: usize) -> Result<(), KernelError> {
    match ids.iter().position(|id| *id as usize >= vocabulary) {
        None => Ok(()),
        Some(position) => Err(KernelError::IdOutOfRange {
            id: ids[position],
            position,
            vocabulary,
        }),
    }
}

/// `out[t] = table[ids[t]]`: table is `[vocabulary, cols]` in f32, bf16 or f16, out `[tokens, cols]`.
///
/// # Errors
/// [`KernelError::IdOutOfRange`].
pub fn embedding<T: Copy + Sync + Into<f32>>(
    w: &Workers,
    cols: usize,
    ids: &[u32],
    table: &[T],
    out: &mut [f32],
) -> Result<(), KernelError> {
    assert_eq!(out.len(), ids.len() * cols, "sizes of an embedding");
    check(ids, table.len() / cols)?;
    let out = Shared::new(out);
    w.run(ids.len().div_ceil(TOKENS), &|block, _| {
        for t in piece(block, TOKENS, ids.len()) {
            let id = ids[t] as usize;
            // SAFETY: each token belongs to one block.
            let out = unsafe { out.piece(t * cols..(t + 1) * cols) };
            let row = &table[id * cols..(id + 1) * cols];
            out.iter_mut()
                .zip(row)
                .for_each(|(out, x)| *out = (*x).into());
        }
    });
    Ok(())
}

/// `dtable[ids[t]] += dout[t]`, in the order of the tokens.
///
/// # Errors
/// [`KernelError::IdOutOfRange`].
pub fn embedding_backward(
    w: &Workers,
    cols: usize,
    ids: &[u32],
    dout: &[f32],
    dtable: &mut [f32],
) -> Result<(), KernelError> {
    assert_eq!(dout.len(), ids.len() * cols, "sizes of an embedding");
    let vocabulary = dtable.len() / cols;
    check(ids, vocabulary)?;
    let size = vocabulary.div_ceil(RANGES);
    let dtable = Shared::new(dtable);
    w.run(RANGES, &|index, _| {
        let range = piece(index, size, vocabulary);
        for (t, id) in ids.iter().enumerate() {
            let id = *id as usize;
            if range.contains(&id) {
                // SAFETY: each row belongs to one range.
                let row = unsafe { dtable.piece(id * cols..(id + 1) * cols) };
                let dout = &dout[t * cols..(t + 1) * cols];
                row.iter_mut()
                    .zip(dout)
                    .for_each(|(row, dout)| *row += dout);
            }
        }
    });
    Ok(())
}
