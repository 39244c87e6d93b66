//! The operations of decoder models, on whichever device the step runs on.
//!
//! Each takes the [`Step`] it belongs to, reads [`Tensor`](crate::Tensor)s and writes
//! [`TensorMut`]s, all row-major. Parameters and activations of a call are of one
//! type, f32, bf16 or f16; gradients of weights, losses and sums are f32. Shapes and types are checked here, before anything is queued; what an operation needs besides is taken from the
//! step's scratch memory. Gradients of weights are *added* to, those of activations overwritten,
//! except where a parameter says otherwise. An operation of your own goes the same way:
//! [`Operation`](crate::Operation).

mod activation;
mod attention;
mod cast;
mod cross_entropy;
mod elementwise;
mod embedding;
mod linear;
mod norm;
mod rope;

pub use activation::{swiglu, swiglu_backward};
pub use attention::{AttentionOutput, AttentionShape, attention, attention_backward};
pub use cast::cast;
pub(crate) use cast::narrow;
pub use cross_entropy::{ClassifierGrads, IGNORED, cross_entropy};
pub use elementwise::{add, add_assign, copy};
pub use embedding::{embedding, embedding_backward};
pub use linear::{linear, linear_dw, linear_dx};
pub use norm::{rms_norm, rms_norm_backward};
pub use rope::{Rotation, rope};

use crate::error::{Error, Result};
use crate::target::Target;
use crate::tensor::{DType, Shape, TensorMut};
use crate::trainer::{Frame, Step};

/// Whether a backward operation overwrites its result or adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assign {
    /// The result replaces what was there.
    Set,
    /// The result is added to what was there.
    Add,
}

/// Refuses with the operation's name unless `holds`.
fn expect(operation: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Shape {
            operation,
            what: what(),
        })
    }
}

/// Refuses unless a tensor has exactly this shape and type.
fn expect_tensor(
    operation: &'static str,
    name: &str,
    got: (Shape, DType),
    shape: impl Into<Shape>,
    dtype: DType,
) -> Result<()> {
    let wanted = shape.into();
    expect(operation, got == (wanted, dtype), || {
        format!(
            "{name} must be {dtype:?} {wanted:?}, is {:?} {:?}",
            got.1, got.0
        )
    })
}

/// Refuses unless all activations and parameters of a call are of one type that operations compute
/// in, and what accumulates (gradients of weights, losses) is f32.
fn expect_types(operation: &'static str, compute: &[DType], sums: &[DType]) -> Result<()> {
    let fits = compute
        .first()
        .is_some_and(|first| *first != DType::U32 && compute.iter().all(|dtype| dtype == first));
    expect(
        operation,
        fits && sums.iter().all(|dtype| *dtype == DType::F32),
        || {
            format!(
                "parameters and activations are {compute:?} and sums {sums:?}; the former must be all \
             F32, Bf16 or F16, the latter F32"
            )
        },
    )
}

/// What a CUDA kernel refused, in words.
fn words(done: Result<(), forebay_kernels::cuda::CudaError>) -> Result<(), String> {
    done.map_err(|error| error.to_string())
}

/// Memory for an operation to work in: floats on the host device, bytes on a CUDA device.
fn scratch<'f>(
    step: &Step<'_>,
    frame: &'f Frame<'_>,
    host_floats: impl FnOnce(usize) -> usize,
    cuda_bytes: impl FnOnce() -> usize,
) -> Result<TensorMut<'f>> {
    frame.tensor_of(
        DType::F32,
        [match step.target() {
            Target::Host { threads } => host_floats(threads),
            Target::Cuda => cuda_bytes().div_ceil(DType::F32.bytes()),
        }],
    )
}
