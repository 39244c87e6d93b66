//! Rotary position embedding.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{expect, expect_types, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::TensorMut;
use crate::trainer::Step;

pub use forebay_kernels::cpu::ops::Direction as Rotation;

#[derive(Clone, Copy)]
struct Rope {
    dims: host::RopeDims,
    direction: Rotation,
}

impl Operation for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        host::rope(
            &cx.workers,
            self.dims,
            args.output::<f32>()?,
            self.direction,
        );
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let x = args.output()?;
        let tokens = x.elements / (self.dims.heads * self.dims.head_dim);
        let q = cx.queue(x.dtype);
        // SAFETY: whole sequences (checked by `rope`), on the device.
        words(unsafe { cuda::rope(q, self.dims, x.address, tokens, self.direction) })
    }
}

/// Turns x, `[tokens, heads, head_dim]`, in place, in the rotate-half form; positions start at 0 in
/// each sequence of `seq` tokens, and `theta` is the base of the wavelengths.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn rope(
    step: &Step<'_>,
    x: &mut TensorMut<'_>,
    seq: usize,
    theta: f64,
    direction: Rotation,
) -> Result<()> {
    expect_types("rope", &[x.dtype()], &[])?;
    let shape = x.shape();
    let [tokens, heads, head_dim] = match shape.dims() {
        [t, h, d] => [*t, *h, *d],
        _ => [0; 3],
    };
    let fits = shape.elements() > 0 && head_dim % 2 == 0 && seq > 0 && tokens % seq == 0;
    expect("rope", fits, || {
        format!("x {shape:?} is not [tokens, heads, even head_dim] of sequences of {seq}")
    })?;
    let dims = host::RopeDims {
        seq,
        heads,
        head_dim,
        theta,
    };
    step.launch(Rope { dims, direction }, &[], &[x.reborrow()])
}
