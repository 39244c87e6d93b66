//! Causal self-attention with grouped heads.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;

use super::{expect_tensor, expect_types, scratch, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{DType, Tensor, TensorMut};
use crate::trainer::Step;

pub use forebay_kernels::cpu::ops::AttentionDims as AttentionShape;

#[derive(Clone, Copy)]
struct Forward(AttentionShape);

impl Operation for Forward {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn flops(&self) -> u64 {
        flops(self.0, 2)
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (q, k, v) = (args.input()?, args.input()?, args.input()?);
        let (out, lse, scratch) = (args.output()?, args.output()?, args.output()?);
        host::attention(&cx.workers, self.0, q, k, v, out, lse, scratch);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (q, k, v) = (args.input()?, args.input()?, args.input()?);
        let (out, lse) = (args.output()?, args.output()?);
        let from = [q.address, k.address, v.address];
        let queue = cx.queue(out.dtype);
        // SAFETY: the shapes fit (checked by `attention`), on the device.
        words(unsafe { cuda::attention(queue, self.0, from, out.address, lse.address) })
    }
}

/// Of so many products of scores: half of each is masked.
fn flops(shape: AttentionShape, products: usize) -> u64 {
    let pairs = shape.batch * shape.heads * shape.seq * shape.seq;
    (products * pairs * shape.head_dim) as u64
}

#[derive(Clone, Copy)]
struct Backward(AttentionShape);

impl Operation for Backward {
    fn name(&self) -> &'static str {
        "attention_backward"
    }

    fn flops(&self) -> u64 {
        flops(self.0, 5)
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let qkv = (args.input()?, args.input()?, args.input()?);
        let rest = (args.input()?, args.input()?, args.input()?);
        let (dq, dk, dv, scratch) = (
            args.output()?,
            args.output()?,
            args.output()?,
            args.output()?,
        );
        host::attention_backward(&cx.workers, self.0, qkv, rest, dq, dk, dv, scratch);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let mut input = || args.input().map(|place| (place.address, place.dtype));
        let ((q, dtype), (k, _), (v, _)) = (input()?, input()?, input()?);
        let rest = [input()?.0, input()?.0, input()?.0];
        let mut output = || args.output().map(|place| place.address);
        let (grads, room) = ([output()?, output()?, output()?], output()?);
        let queue = cx.queue(dtype);
        // SAFETY: the shapes fit (checked by `attention_backward`), on the device.
        words(unsafe { cuda::attention_backward(queue, self.0, [q, k, v], rest, grads, room) })
    }
}

/// What a forward pass of attention leaves for the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOutput<'a> {
    /// `[tokens, heads, head_dim]`.
    pub out: Tensor<'a>,
    /// Log-sum-exp of the scores, `[batch, heads, seq]`.
    pub lse: Tensor<'a>,
}

fn check(name: &'static str, shape: AttentionShape, qkv: [&Tensor<'_>; 3]) -> Result<()> {
    let AttentionShape {
        batch,
        seq,
        heads,
        kv_heads,
        head_dim,
    } = shape;
    expect_types(name, &[qkv[0].dtype()], &[])?;
    super::expect(name, kv_heads > 0 && heads % kv_heads.max(1) == 0, || {
        format!("{heads} heads are not a multiple of {kv_heads} key and value heads")
    })?;
    for (label, tensor, heads) in [
        ("q", qkv[0], heads),
        ("k", qkv[1], kv_heads),
        ("v", qkv[2], kv_heads),
    ] {
        let shape = [batch * seq, heads, head_dim];
        expect_tensor(
            name,
            label,
            (tensor.shape(), tensor.dtype()),
            shape,
            qkv[0].dtype(),
        )?;
    }
    Ok(())
}

/// `out = softmax(q · kᵀ / sqrt(head_dim), causal) · v`. q and out are `[tokens, heads, head_dim]`,
/// k and v `[tokens, kv_heads, head_dim]`, lse `[batch, heads, seq]` in f32.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn attention(
    step: &Step<'_>,
    shape: AttentionShape,
    [q, k, v]: [&Tensor<'_>; 3],
    out: &mut TensorMut<'_>,
    lse: &mut TensorMut<'_>,
) -> Result<()> {
    let name = "attention";
    check(name, shape, [q, k, v])?;
    expect_tensor(
        name,
        "out",
        (out.shape(), out.dtype()),
        q.shape(),
        q.dtype(),
    )?;
    let rows = [shape.batch, shape.heads, shape.seq];
    expect_tensor(name, "lse", (lse.shape(), lse.dtype()), rows, DType::F32)?;
    let frame = step.frame();
    let floats = |threads| host::attention_scratch(shape, threads);
    let mut scratch = scratch(step, &frame, floats, || 0)?;
    step.launch(
        Forward(shape),
        &[*q, *k, *v],
        &[out.reborrow(), lse.reborrow(), scratch.reborrow()],
    )
}

/// The gradients of [`attention`] for q, k and v, which are set.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Scratch`](crate::Error::Scratch).
pub fn attention_backward(
    step: &Step<'_>,
    shape: AttentionShape,
    [q, k, v]: [&Tensor<'_>; 3],
    output: AttentionOutput<'_>,
    dout: &Tensor<'_>,
    [mut dq, mut dk, mut dv]: [TensorMut<'_>; 3],
) -> Result<()> {
    let name = "attention_backward";
    check(name, shape, [q, k, v])?;
    check(name, shape, [&dq.as_ref(), &dk.as_ref(), &dv.as_ref()])?;
    expect_types(name, &[q.dtype(), dq.dtype()], &[output.lse.dtype()])?;
    for (label, tensor) in [("out", &output.out), ("dout", dout)] {
        expect_tensor(
            name,
            label,
            (tensor.shape(), tensor.dtype()),
            q.shape(),
            q.dtype(),
        )?;
    }
    let frame = step.frame();
    let floats = |threads| host::attention_scratch(shape, threads);
    let bytes = || cuda::attention_backward_scratch(shape);
    let mut scratch = scratch(step, &frame, floats, bytes)?;
    let inputs = [*q, *k, *v, output.out, output.lse, *dout];
    step.launch(
        Backward(shape),
        &inputs,
        &[
            dq.reborrow(),
            dk.reborrow(),
            dv.reborrow(),
            scratch.reborrow(),
        ],
    )
}
