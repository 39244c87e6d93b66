//! Sums.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{expect_tensor, expect_types, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{Tensor, TensorMut};
use crate::trainer::Step;

#[derive(Clone, Copy)]
struct Add;

impl Operation for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (a, b) = (args.input()?, args.input()?);
        host::add(&cx.workers, a, b, args.output()?);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (a, b, out) = (args.input()?, args.input()?, args.output()?);
        let q = cx.queue(out.dtype);
        // SAFETY: as many elements each (checked by `add`), on the device.
        words(unsafe { cuda::add(q, a.address, b.address, out.address, out.elements) })
    }
}

#[derive(Clone, Copy)]
struct AddAssign;

impl Operation for AddAssign {
    fn name(&self) -> &'static str {
        "add_assign"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let x = args.input()?;
        host::add_assign(&cx.workers, args.output()?, x);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (x, y) = (args.input()?, args.output()?);
        let q = cx.queue(y.dtype);
        // SAFETY: as many elements each (checked by `add_assign`), on the device.
        words(unsafe { cuda::add(q, y.address, x.address, y.address, y.elements) })
    }
}

/// `out = a + b`, all of one shape.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn add(step: &Step<'_>, a: &Tensor<'_>, b: &Tensor<'_>, out: &mut TensorMut<'_>) -> Result<()> {
    expect_types("add", &[out.dtype()], &[])?;
    for (label, tensor) in [("a", a), ("b", b)] {
        let got = (tensor.shape(), tensor.dtype());
        expect_tensor("add", label, got, out.shape(), out.dtype())?;
    }
    step.launch(Add, &[*a, *b], &[out.reborrow()])
}

/// `y += x`, both of one shape.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn add_assign(step: &Step<'_>, y: &mut TensorMut<'_>, x: &Tensor<'_>) -> Result<()> {
    expect_types("add_assign", &[y.dtype()], &[])?;
    expect_tensor(
        "add_assign",
        "x",
        (x.shape(), x.dtype()),
        y.shape(),
        y.dtype(),
    )?;
    step.launch(AddAssign, &[*x], &[y.reborrow()])
}

/// `to = from`, of one shape and type.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn copy(step: &Step<'_>, from: &Tensor<'_>, to: &mut TensorMut<'_>) -> Result<()> {
    expect_tensor(
        "copy",
        "from",
        (from.shape(), from.dtype()),
        to.shape(),
        to.dtype(),
    )?;
    step.copy(from.view, to.view)
}
