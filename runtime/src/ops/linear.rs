//! Linear layers without bias.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{Assign, expect, expect_types, scratch, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{Shape, Tensor, TensorMut};
use crate::trainer::Step;

#[derive(Clone, Copy)]
enum Which {
    Forward,
    Dx(Assign),
    Dw,
}

#[derive(Clone, Copy)]
struct Linear {
    which: Which,
    /// Tokens, outputs, inputs.
    dims: (usize, usize, usize),
}

impl Operation for Linear {
    fn name(&self) -> &'static str {
        match self.which {
            Which::Forward => "linear",
            Which::Dx(_) => "linear_dx",
            Which::Dw => "linear_dw",
        }
    }

    fn flops(&self) -> u64 {
        let (tokens, outputs, inputs) = self.dims;
        2 * (tokens * outputs * inputs) as u64
    }

    fn sets(&self) -> Option<usize> {
        matches!(self.which, Which::Dw).then_some(0)
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let fresh = args.fresh();
        let (a, b) = (args.input::<f32>()?, args.input::<f32>()?);
        let out = args.output::<f32>()?;
        match self.which {
            Which::Forward => host::linear(&cx.workers, self.dims, a, b, out),
            Which::Dx(assign) => {
                host::linear_dx(&cx.workers, self.dims, a, b, out, assign == Assign::Add);
            }
            Which::Dw => {
                if fresh {
                    out.fill(0.0);
                }
                host::linear_dw(&cx.workers, self.dims, a, b, out);
            }
        }
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (a, b) = (args.input()?, args.input()?);
        let add = !args.fresh();
        let (out, scratch) = (args.output()?, args.output()?);
        let (q, d) = (cx.queue(a.dtype), self.dims);
        let (all, room) = ([a.address, b.address, out.address], scratch.address);
        // SAFETY: the sizes fit (checked by `dims`), on the device.
        words(unsafe {
            match self.which {
                Which::Forward => cuda::linear(q, d, all[0], all[1], all[2], room),
                Which::Dx(assign) => cuda::linear_dx(q, d, all, assign == Assign::Add, room),
                Which::Dw => cuda::linear_dw(q, d, all, add, room),
            }
        })
    }
}

fn launch(
    step: &Step<'_>,
    linear: Linear,
    inputs: [Tensor<'_>; 2],
    out: &mut TensorMut<'_>,
) -> Result<()> {
    let frame = step.frame();
    let mut scratch = scratch(step, &frame, |_| 0, || cuda::linear_scratch(linear.dims))?;
    step.launch(linear, &inputs, &[out.reborrow(), scratch.reborrow()])
}

/// Tokens, outputs and inputs, where x is `[.., k]`, weight `[n, k]` and y `[.., n]`.
fn dims(name: &'static str, x: Shape, weight: Shape, y: Shape) -> Result<(usize, usize, usize)> {
    let (n, k) = match weight.dims() {
        [n, k] => (*n, *k),
        _ => (0, 0),
    };
    let fits = n * k > 0
        && x.dims().last() == Some(&k)
        && y.dims().last() == Some(&n)
        && x.elements() / k == y.elements() / n;
    expect(name, fits, || {
        format!("x {x:?}, weight {weight:?} and y {y:?} do not fit")
    })?;
    Ok((x.elements() / k, n, k))
}

/// `y = x · weightᵀ`: x is `[.., k]`, weight `[n, k]`, y `[.., n]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn linear(
    step: &Step<'_>,
    x: &Tensor<'_>,
    weight: &Tensor<'_>,
    y: &mut TensorMut<'_>,
) -> Result<()> {
    expect_types("linear", &[x.dtype(), weight.dtype(), y.dtype()], &[])?;
    let dims = dims("linear", x.shape(), weight.shape(), y.shape())?;
    let which = Which::Forward;
    launch(step, Linear { which, dims }, [*x, *weight], y)
}

/// `dx = dy · weight`, or added to dx: dy is `[.., n]`, weight `[n, k]`, dx `[.., k]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn linear_dx(
    step: &Step<'_>,
    dy: &Tensor<'_>,
    weight: &Tensor<'_>,
    dx: &mut TensorMut<'_>,
    assign: Assign,
) -> Result<()> {
    expect_types("linear_dx", &[dy.dtype(), weight.dtype(), dx.dtype()], &[])?;
    let dims = dims("linear_dx", dx.shape(), weight.shape(), dy.shape())?;
    let which = Which::Dx(assign);
    launch(step, Linear { which, dims }, [*dy, *weight], dx)
}

/// `dweight += dyᵀ · x`: x is `[.., k]`, dy `[.., n]`, dweight `[n, k]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn linear_dw(
    step: &Step<'_>,
    x: &Tensor<'_>,
    dy: &Tensor<'_>,
    dweight: &mut TensorMut<'_>,
) -> Result<()> {
    expect_types("linear_dw", &[x.dtype(), dy.dtype()], &[dweight.dtype()])?;
    let dims = dims("linear_dw", x.shape(), dweight.shape(), dy.shape())?;
    let which = Which::Dw;
    launch(step, Linear { which, dims }, [*x, *dy], dweight)
}
