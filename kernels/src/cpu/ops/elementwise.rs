//! Sums of tensors: residual connections.

use super::piece;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

const CHUNK: usize = 16 << 10;

/// `out = a + b`.
pub fn add(w: &Workers, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!((a.len(), b.len()), (out.len(), out.len()), "sizes of a sum");
    let len = out.len();
    let out = Shared::new(out);
    w.run(len.div_ceil(CHUNK), &|chunk, _| {
        let range = piece(chunk, CHUNK, len);
        // SAFETY: chunks do not overlap.
        let out = unsafe { out.piece(range.clone()) };
        for ((out, a), b) in out.iter_mut().zip(&a[range.clone()]).zip(&b[range]) {
            *out = a + b;
        }
    });
}

/// `y += x`.
pub fn add_assign(w: &Workers, y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "sizes of a sum");
    let len = y.len();
    let y = Shared::new(y);
    w.run(len.div_ceil(CHUNK), &|chunk, _| {
        let range = piece(chunk, CHUNK, len);
        // SAFETY: chunks do not overlap.
        let y = unsafe { y.piece(range.clone()) };
        y.iter_mut().zip(&x[range]).for_each(|(y, x)| *y += x);
    });
}
