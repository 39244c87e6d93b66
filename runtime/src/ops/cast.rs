//! Between types.

use forebay_kernels::cpu::{f32_to_bf16, f32_to_f16};
use forebay_kernels::cuda::ops as cuda;
use half::{bf16, f16};

use super::{expect, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Launch, Operation};
use crate::tensor::{DType, Tensor, TensorMut, View};
use crate::trainer::Step;

#[derive(Clone, Copy)]
struct Cast;

impl Operation for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        // Both arrive as f32; rounding follows.
        let from = args.input::<f32>()?;
        args.output::<f32>()?.copy_from_slice(from);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (from, to) = (args.input()?, args.output()?);
        let q = cx.queue(to.dtype);
        // SAFETY: as many elements each (checked by `cast`), on the device.
        words(unsafe {
            cuda::cast(
                q,
                (from.address, from.dtype.element()),
                to.address,
                to.elements,
            )
        })
    }
}

/// `to = from`, rounded (f32 to bf16: half up; f32 to f16: to nearest even) or exactly (to f32).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for other types or shapes; [`Error::Scratch`](crate::Error::Scratch).
pub fn cast(step: &Step<'_>, from: &Tensor<'_>, to: &mut TensorMut<'_>) -> Result<()> {
    let types = [from.dtype(), to.dtype()];
    let fits = from.shape() == to.shape()
        && matches!(
            types,
            [DType::F32, DType::Bf16 | DType::F16] | [DType::Bf16 | DType::F16, DType::F32]
        );
    expect("cast", fits, || {
        format!("{from:?} cannot be cast to {to:?}")
    })?;
    step.launch(Cast, &[*from], &[to.reborrow()])
}

/// The gradient that leaves, from the sums in f32 that it was.
#[derive(Clone, Copy)]
struct Narrow(DType);

impl Operation for Narrow {
    fn name(&self) -> &'static str {
        "gradient cast"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let from = args.input::<f32>()?;
        match self.0 {
            DType::F16 => f32_to_f16(from, args.output::<f16>()?),
            _ => f32_to_bf16(from, args.output::<bf16>()?),
        }
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, args: CudaArgs<'_>) -> Result<(), String> {
        Cast.cuda(cx, args)
    }
}

/// The launch that casts sums in f32 to bf16 or f16, for the engine itself: it needs no room to widen in.
pub(crate) fn narrow(from: View, to: View) -> Result<Launch> {
    Launch::new(
        Narrow(to.dtype),
        &[Tensor::new(from)],
        &[TensorMut::new(to)],
    )
}
