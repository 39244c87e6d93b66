//! RMSNorm.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{Assign, expect, expect_types, scratch, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{Shape, Tensor, TensorMut};
use crate::trainer::Step;

#[derive(Clone, Copy)]
struct Forward {
    cols: usize,
    eps: f32,
}

impl Operation for Forward {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (x, weight) = (args.input::<f32>()?, args.input::<f32>()?);
        host::rms_norm(
            &cx.workers,
            self.cols,
            x,
            weight,
            self.eps,
            args.output::<f32>()?,
        );
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (x, weight, y) = (args.input()?, args.input()?, args.output()?);
        let size = (x.elements / self.cols, self.cols);
        let q = cx.queue(y.dtype);
        // SAFETY: the sizes fit (checked by `rms_norm`), on the device.
        let done =
            unsafe { cuda::rms_norm(q, size, x.address, weight.address, self.eps, y.address) };
        words(done)
    }
}

#[derive(Clone, Copy)]
struct Backward {
    cols: usize,
    eps: f32,
    assign: Assign,
}

impl Operation for Backward {
    fn name(&self) -> &'static str {
        "rms_norm_backward"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (x, weight, dy) = (args.input()?, args.input()?, args.input()?);
        let (dx, dweight, scratch) = (args.output()?, args.output()?, args.output()?);
        let (w, add) = (&cx.workers, self.assign == Assign::Add);
        host::rms_norm_backward(
            w, self.cols, x, weight, self.eps, dy, dx, add, dweight, scratch,
        );
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (x, weight, dy) = (args.input()?, args.input()?, args.input()?);
        let (dx, dweight, scratch) = (args.output()?, args.output()?, args.output()?);
        let from = [x.address, weight.address, dy.address];
        let size = (x.elements / self.cols, self.cols);
        let (q, add) = (cx.queue(dx.dtype), self.assign == Assign::Add);
        let (to, dw) = (dx.address, dweight.address);
        // SAFETY: the sizes fit (checked by `rms_norm_backward`), on the device.
        words(unsafe {
            cuda::rms_norm_backward(q, size, from, self.eps, to, add, dw, scratch.address)
        })
    }
}

fn cols(name: &'static str, x: Shape, weight: Shape, others: &[Shape]) -> Result<usize> {
    let cols = weight.elements();
    let fits = weight.dims().len() == 1
        && x.dims().last() == Some(&cols)
        && others.iter().all(|s| s.elements() == x.elements());
    expect(name, fits, || {
        format!("x {x:?}, weight {weight:?} and {others:?} do not fit")
    })?;
    Ok(cols)
}

/// `y = weight * x / sqrt(mean(x²) + eps)` over the last dimension, which weight is as long as.
/// For QK-norm, give x as `[.., heads, head_dim]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn rms_norm(
    step: &Step<'_>,
    x: &Tensor<'_>,
    weight: &Tensor<'_>,
    eps: f32,
    y: &mut TensorMut<'_>,
) -> Result<()> {
    expect_types("rms_norm", &[x.dtype(), weight.dtype(), y.dtype()], &[])?;
    let cols = cols("rms_norm", x.shape(), weight.shape(), &[y.shape()])?;
    step.launch(Forward { cols, eps }, &[*x, *weight], &[y.reborrow()])
}

/// The gradients of [`rms_norm`]: dx is set or added to, dweight added to.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
#[expect(clippy::too_many_arguments, reason = "the tensors of the operation")]
pub fn rms_norm_backward(
    step: &Step<'_>,
    x: &Tensor<'_>,
    weight: &Tensor<'_>,
    eps: f32,
    dy: &Tensor<'_>,
    dx: &mut TensorMut<'_>,
    assign: Assign,
    dweight: &mut TensorMut<'_>,
) -> Result<()> {
    let name = "rms_norm_backward";
    let compute = [x.dtype(), weight.dtype(), dy.dtype(), dx.dtype()];
    expect_types(name, &compute, &[dweight.dtype()])?;
    let cols = cols(name, x.shape(), weight.shape(), &[dy.shape(), dx.shape()])?;
    let same = dweight.shape() == weight.shape();
    expect(name, same, || {
        format!("weight {:?}, dweight {:?}", weight.shape(), dweight.shape())
    })?;
    let frame = step.frame();
    let floats = |_| host::rms_norm_backward_scratch(cols);
    let bytes = || cuda::rms_norm_backward_scratch(cols);
    let mut scratch = scratch(step, &frame, floats, bytes)?;
    let op = Backward { cols, eps, assign };
    step.launch(
        op,
        &[*x, *weight, *dy],
        &[dx.reborrow(), dweight.reborrow(), scratch.reborrow()],
    )
}
