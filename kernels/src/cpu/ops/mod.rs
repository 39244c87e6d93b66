//! The decoder's operations: plain slices in f32, row-major, spread over workers.
//!
//! Each is cut into pieces that do not depend on the number of threads, and each element of a
//! result is computed by one piece in a fixed order, so the bits do not depend on threads either.
//! Scratch memory comes from the caller. Lengths are asserted; ids that name no row are errors.

mod attention;
mod cross_entropy;
mod elementwise;
mod embedding;
mod matmul;
mod norm;
mod rope;
mod swiglu;

pub use attention::{AttentionDims, attention, attention_backward, attention_scratch};
pub use cross_entropy::{
    ClassifierDims, ClassifierGrads, IGNORED, cross_entropy, cross_entropy_scratch,
};
pub use elementwise::{add, add_assign};
pub use embedding::{embedding, embedding_backward};
pub use matmul::{linear, linear_dw, linear_dx};
pub use norm::{rms_norm, rms_norm_backward, rms_norm_backward_scratch};
pub use rope::{Direction, RopeDims, rope};
pub use swiglu::{swiglu, swiglu_backward};

/// Where piece `index` of `len` elements, `size` at a time, lies.
fn piece(index: usize, size: usize, len: usize) -> std::ops::Range<usize> {
    (index * size).min(len)..((index + 1) * size).min(len)
}
