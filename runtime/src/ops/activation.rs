//! Gated activations.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{expect_tensor, expect_types, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{Tensor, TensorMut};
use crate::trainer::Step;

#[derive(Clone, Copy)]
struct Forward;

impl Operation for Forward {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (gate, up) = (args.input()?, args.input()?);
        host::swiglu(&cx.workers, gate, up, args.output()?);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (gate, up, out) = (args.input()?, args.input()?, args.output()?);
        let q = cx.queue(out.dtype);
        // SAFETY: as many elements each (checked by `swiglu`), on the device.
        words(unsafe { cuda::swiglu(q, gate.address, up.address, out.address, out.elements) })
    }
}

#[derive(Clone, Copy)]
struct Backward;

impl Operation for Backward {
    fn name(&self) -> &'static str {
        "swiglu_backward"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (gate, up, dout) = (args.input()?, args.input()?, args.input()?);
        host::swiglu_backward(&cx.workers, gate, up, dout, args.output()?, args.output()?);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (gate, up, dout) = (args.input()?, args.input()?, args.input()?);
        let (dgate, dup) = (args.output()?, args.output()?);
        let from = [gate.address, up.address, dout.address];
        let to = [dgate.address, dup.address];
        // SAFETY: as many elements each (checked by `swiglu_backward`), on the device.
        words(unsafe { cuda::swiglu_backward(cx.queue(dout.dtype), from, to, dout.elements) })
    }
}

/// `out = silu(gate) * up`, all of one shape.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn swiglu(
    step: &Step<'_>,
    gate: &Tensor<'_>,
    up: &Tensor<'_>,
    out: &mut TensorMut<'_>,
) -> Result<()> {
    let (shape, dtype) = (out.shape(), out.dtype());
    expect_types("swiglu", &[dtype], &[])?;
    for (label, tensor) in [("gate", gate), ("up", up)] {
        expect_tensor(
            "swiglu",
            label,
            (tensor.shape(), tensor.dtype()),
            shape,
            dtype,
        )?;
    }
    step.launch(Forward, &[*gate, *up], &[out.reborrow()])
}

/// The gradients of [`swiglu`]; dgate and dup are set.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn swiglu_backward(
    step: &Step<'_>,
    gate: &Tensor<'_>,
    up: &Tensor<'_>,
    dout: &Tensor<'_>,
    dgate: &mut TensorMut<'_>,
    dup: &mut TensorMut<'_>,
) -> Result<()> {
    let (name, shape, dtype) = ("swiglu_backward", dout.shape(), dout.dtype());
    expect_types(name, &[dtype], &[])?;
    for (label, tensor) in [
        ("gate", gate),
        ("up", up),
        ("dgate", &dgate.as_ref()),
        ("dup", &dup.as_ref()),
    ] {
        expect_tensor(name, label, (tensor.shape(), tensor.dtype()), shape, dtype)?;
    }
    step.launch(
        Backward,
        &[*gate, *up, *dout],
        &[dgate.reborrow(), dup.reborrow()],
    )
}
