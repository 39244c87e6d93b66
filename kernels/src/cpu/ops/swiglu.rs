//! SwiGLU (Shazeer, arXiv 2002.05202): out = silu(gate) * up.

use super::piece;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

const CHUNK: usize = 8 << 10;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `out = gate * sigmoid(gate) * up`, all of one length.
pub fn swiglu(w: &Workers, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(
        (gate.len(), up.len()),
        (out.len(), out.len()),
        "sizes of a SwiGLU"
    );
    let len = out.len();
    let out = Shared::new(out);
    w.run(len.div_ceil(CHUNK), &|chunk, _| {
        let range = piece(chunk, CHUNK, len);
        // SAFETY: chunks do not overlap.
        let out = unsafe { out.piece(range.clone()) };
        for ((out, gate), up) in out.iter_mut().zip(&gate[range.clone()]).zip(&up[range]) {
            *out = gate * sigmoid(*gate) * up;
        }
    });
}

/// The gradients of [`swiglu`]; dgate and dup are set.
pub fn swiglu_backward(
    w: &Workers,
    gate: &[f32],
    up: &[f32],
    dout: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let len = dout.len();
    assert_eq!(
        [gate.len(), up.len(), dgate.len(), dup.len()],
        [len; 4],
        "sizes of a SwiGLU"
    );
    let (dgate, dup) = (Shared::new(dgate), Shared::new(dup));
    w.run(len.div_ceil(CHUNK), &|chunk, _| {
        let range = piece(chunk, CHUNK, len);
        // SAFETY: chunks do not overlap.
        let (dgate, dup) = unsafe { (dgate.piece(range.clone()), dup.piece(range.clone())) };
        for (at, i) in range.enumerate() {
            let s = sigmoid(gate[i]);
            dup[at] = dout[i] * gate[i] * s;
            dgate[at] = dout[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        }
    });
}
