//! The classifier with its loss.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{expect, expect_tensor, expect_types, scratch, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{DType, Tensor, TensorMut};
use crate::trainer::Step;

pub use forebay_kernels::cpu::ops::IGNORED;

#[derive(Clone, Copy)]
struct CrossEntropy {
    dims: host::ClassifierDims,
    scale: f32,
    /// Of the gradients beside, if they are wanted.
    grads: Option<f32>,
}

impl Operation for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn flops(&self) -> u64 {
        let products = if self.grads.is_some() { 3 } else { 1 };
        let dims = self.dims;
        2 * (products * dims.tokens * dims.vocabulary * dims.hidden) as u64
    }

    fn sets(&self) -> Option<usize> {
        self.grads.map(|_| 3)
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let fresh = args.fresh();
        let (x, weight, targets) = (args.input()?, args.input()?, args.input()?);
        let (loss, scratch) = (args.output::<f32>()?, args.output()?);
        let grads = match self.grads {
            Some(scale) => {
                let (dx, dweight) = (args.output()?, args.output::<f32>()?);
                if fresh {
                    dweight.fill(0.0);
                }
                Some(host::ClassifierGrads { dx, dweight, scale })
            }
            None => None,
        };
        let Self { dims, scale, .. } = *self;
        let (w, loss) = (&cx.workers, &mut loss[0]);
        host::cross_entropy(w, dims, x, weight, targets, scale, loss, grads, scratch)
            .map_err(|e| e.to_string())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let add = !args.fresh();
        let (x, weight, targets) = (args.input()?, args.input()?, args.input()?);
        let (loss, scratch) = (args.output()?, args.output()?);
        let grads = match self.grads {
            Some(scale) => {
                let grads = [args.output()?.address, args.output()?.address];
                Some(cuda::ClassifierGrads { grads, add, scale })
            }
            None => None,
        };
        let from = [x.address, weight.address, targets.address];
        let (q, to, room) = (cx.queue(x.dtype), loss.address, scratch.address);
        // SAFETY: the shapes fit (checked by `cross_entropy`), on the device.
        words(unsafe { cuda::cross_entropy(q, self.dims, from, self.scale, to, grads, room) })
    }
}

/// Where the gradients of the classifier go.
#[derive(Debug)]
pub struct ClassifierGrads<'a> {
    /// `[tokens, hidden]`, set.
    pub dx: TensorMut<'a>,
    /// `[vocabulary, hidden]`, added to.
    pub dweight: TensorMut<'a>,
    /// By what both are multiplied, and the loss is not: [`Step::loss_scale`].
    pub loss_scale: f32,
}

/// `loss = scale · Σ over counted tokens of (logsumexp(x · weightᵀ) - the target's logit)`, with
/// its gradients if wanted; logits are never held whole (Cut Cross-Entropy, arXiv 2411.09009).
///
/// x is `[tokens, hidden]`, weight `[vocabulary, hidden]`, targets `[tokens]` u32 with [`IGNORED`] for
/// those that do not count, loss one f32. A target outside the vocabulary fails the device.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn cross_entropy(
    step: &Step<'_>,
    x: &Tensor<'_>,
    weight: &Tensor<'_>,
    targets: &Tensor<'_>,
    scale: f32,
    loss: &mut TensorMut<'_>,
    grads: Option<ClassifierGrads<'_>>,
) -> Result<()> {
    let name = "cross_entropy";
    let (tokens, hidden, vocabulary) = match (x.shape().dims(), weight.shape().dims()) {
        ([t, h], [v, k]) if h == k => (*t, *h, *v),
        _ => (0, 0, 0),
    };
    expect(name, tokens * hidden * vocabulary > 0, || {
        format!(
            "x {:?} and weight {:?} do not fit",
            x.shape(),
            weight.shape()
        )
    })?;
    expect_types(name, &[x.dtype(), weight.dtype()], &[])?;
    let targets_are = (targets.shape().elements(), targets.dtype());
    expect(name, targets_are == (tokens, DType::U32), || {
        format!("targets must be {tokens} u32, are {targets:?}")
    })?;
    expect_tensor(name, "loss", (loss.shape(), loss.dtype()), [1], DType::F32)?;
    let dims = host::ClassifierDims {
        tokens,
        hidden,
        vocabulary,
    };
    let frame = step.frame();
    let floats = |threads| host::cross_entropy_scratch(dims, threads);
    let bytes = || cuda::cross_entropy_scratch(x.dtype().element(), dims);
    let mut scratch = scratch(step, &frame, floats, bytes)?;
    let op = CrossEntropy {
        dims,
        scale,
        grads: grads.as_ref().map(|grads| grads.loss_scale),
    };
    let inputs = [*x, *weight, *targets];
    let Some(ClassifierGrads {
        mut dx,
        mut dweight,
        ..
    }) = grads
    else {
        return step.launch(op, &inputs, &[loss.reborrow(), scratch.reborrow()]);
    };
    expect_tensor(name, "dx", (dx.shape(), dx.dtype()), x.shape(), x.dtype())?;
    let got = (dweight.shape(), dweight.dtype());
    expect_tensor(name, "dweight", got, weight.shape(), DType::F32)?;
    step.launch(
        op,
        &inputs,
        &[
            loss.reborrow(),
            scratch.reborrow(),
            dx.reborrow(),
            dweight.reborrow(),
        ],
    )
}
