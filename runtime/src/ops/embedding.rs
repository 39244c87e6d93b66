//! Rows of a table by token id.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::ops as cuda;
use half::{bf16, f16};

use super::{expect, expect_tensor, expect_types, scratch, words};
use crate::error::Result;
use crate::operation::{CudaArgs, CudaContext, HostArgs, HostContext, Operation};
use crate::tensor::{DType, Shape, Tensor, TensorMut};
use crate::trainer::Step;

#[derive(Clone, Copy)]
struct Forward {
    cols: usize,
    table: DType,
}

impl Operation for Forward {
    fn name(&self) -> &'static str {
        "embedding"
    }

    /// All of the table would be widened for a few of its rows.
    fn takes_as_is(&self) -> Option<usize> {
        Some(1)
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (w, cols, ids) = (&cx.workers, self.cols, args.input()?);
        let done = match self.table {
            DType::Bf16 => host::embedding::<bf16>(w, cols, ids, args.input()?, args.output()?),
            DType::F16 => host::embedding::<f16>(w, cols, ids, args.input()?, args.output()?),
            DType::F32 | DType::U32 => {
                host::embedding::<f32>(w, cols, ids, args.input()?, args.output()?)
            }
        };
        done.map_err(|e| e.to_string())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (ids, table, out) = (args.input()?, args.input()?, args.output()?);
        let size = (table.elements / self.cols, self.cols);
        let q = cx.queue(out.dtype);
        let (from, to) = (table.address, out.address);
        // SAFETY: the sizes fit (checked by `embedding`), on the device.
        words(unsafe { cuda::embedding(q, size, ids.address, ids.elements, from, to) })
    }
}

#[derive(Clone, Copy)]
struct Backward {
    cols: usize,
}

impl Operation for Backward {
    fn name(&self) -> &'static str {
        "embedding_backward"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (ids, dout) = (args.input()?, args.input()?);
        host::embedding_backward(&cx.workers, self.cols, ids, dout, args.output()?)
            .map_err(|e| e.to_string())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (ids, dout) = (args.input()?, args.input()?);
        let (dtable, scratch) = (args.output()?, args.output()?);
        let size = (dtable.elements / self.cols, self.cols);
        let q = cx.queue(dout.dtype);
        let (from, to) = (dout.address, dtable.address);
        let (at, n) = (ids.address, ids.elements);
        // SAFETY: the sizes fit (checked by `embedding_backward`), on the device.
        words(unsafe { cuda::embedding_backward(q, size, at, n, from, to, scratch.address) })
    }
}

fn cols(name: &'static str, ids: &Tensor<'_>, table: Shape, rows: Shape) -> Result<usize> {
    let tokens = ids.shape().elements();
    expect_tensor(
        name,
        "ids",
        (ids.shape(), ids.dtype()),
        ids.shape(),
        DType::U32,
    )?;
    let cols = table.dims().last().copied().unwrap_or(0);
    let fits = table.dims().len() == 2 && rows.elements() == tokens * cols;
    expect(name, fits, || {
        format!("{tokens} ids, table {table:?} and rows {rows:?} do not fit")
    })?;
    Ok(cols)
}

/// `out[t] = table[ids[t]]`: ids are u32, table is `[vocabulary, cols]`, out `[tokens, cols]`. An id
/// outside the vocabulary fails the device.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn embedding(
    step: &Step<'_>,
    ids: &Tensor<'_>,
    table: &Tensor<'_>,
    out: &mut TensorMut<'_>,
) -> Result<()> {
    let name = "embedding";
    expect_types(name, &[table.dtype(), out.dtype()], &[])?;
    let cols = cols(name, ids, table.shape(), out.shape())?;
    let operation = Forward {
        cols,
        table: table.dtype(),
    };
    step.launch(operation, &[*ids, *table], &[out.reborrow()])
}

/// `dtable[ids[t]] += dout[t]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape).
pub fn embedding_backward(
    step: &Step<'_>,
    ids: &Tensor<'_>,
    dout: &Tensor<'_>,
    dtable: &mut TensorMut<'_>,
) -> Result<()> {
    let name = "embedding_backward";
    expect_types(name, &[dout.dtype()], &[dtable.dtype()])?;
    let cols = cols(name, ids, dtable.shape(), dout.shape())?;
    let frame = step.frame();
    let bytes = || cuda::embedding_backward_scratch(ids.shape().elements());
    let mut scratch = scratch(step, &frame, |_| 0, bytes)?;
    let outputs = [dtable.reborrow(), scratch.reborrow()];
    step.launch(Backward { cols }, &[*ids, *dout], &outputs)
}
