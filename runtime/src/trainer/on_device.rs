//! The optimizer on the device: sums of squares, and updates of sections whose states live there, as
//! operations on the compute stream, with the bits of the CPU's.

use std::sync::Arc;

use forebay_kernels::cpu::{
    AdamScalars, Exchange, Isa, NormIn, States, adamw_parallel, square_sum,
};
use forebay_kernels::cuda::ops::{self as cuda, SQUARE_SUMS};
use forebay_prefetch::{SectionId, Task, TaskRef};
use half::{bf16, f16};

use super::engine::{Engine, Sign};
use crate::device::{Span, Stream};
use crate::error::Result;
use crate::operation::{
    CudaArgs, CudaContext, DeviceSlice, HostArgs, HostContext, Launch, Operation,
};
use crate::ops;
use crate::tensor::{DType, Shape, Tensor, TensorMut, View};

/// The pieces of a sum of squares; the second tensor is theirs, in words.
#[derive(Clone, Copy)]
struct SquareSum(DType);

impl Operation for SquareSum {
    fn name(&self) -> &'static str {
        "gradient norm"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let values = match self.0 {
            DType::Bf16 => NormIn::Bf16(args.input::<bf16>()?),
            DType::F16 => NormIn::F16(args.input::<f16>()?),
            DType::F32 | DType::U32 => NormIn::F32(args.input::<f32>()?),
        };
        let bits = square_sum(&cx.workers, values).sum.to_bits();
        // As one piece: the others add nothing.
        let words = args.output::<u32>()?;
        words.fill(0);
        (words[0], words[1]) = (bits as u32, (bits >> 32) as u32);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let (values, sums) = (args.input()?, args.output()?);
        let q = cx.queue(self.0);
        // SAFETY: a gradient and the place of its pieces, on the device.
        let done = unsafe { cuda::square_sum(q, values.address, values.elements, sums.address) };
        done.map_err(|error| error.to_string())
    }
}

/// AdamW on a run of elements.
#[derive(Clone, Copy)]
struct Update {
    scalars: AdamScalars,
    dtype: DType,
}

impl Operation for Update {
    fn name(&self) -> &'static str {
        "update"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let states = States {
            master: args.output()?,
            m: args.output()?,
            v: args.output()?,
        };
        let exchange = match self.dtype {
            DType::Bf16 => Exchange::Bf16 {
                grad: args.input()?,
                param: args.output()?,
            },
            DType::F16 => Exchange::F16 {
                grad: args.input()?,
                param: args.output()?,
            },
            DType::F32 | DType::U32 => Exchange::F32 {
                grad: args.input()?,
                param: args.output()?,
            },
        };
        adamw_parallel(&cx.workers, Isa::best(), &self.scalars, states, exchange);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let grad = args.input()?;
        let states = [args.output()?, args.output()?, args.output()?];
        let param = args.output()?;
        let q = cx.queue(self.dtype);
        let states = states.map(|state: DeviceSlice| state.address);
        let from = (grad.address, self.dtype.element());
        let n = param.elements;
        // SAFETY: as many elements each, on the device.
        let done = unsafe { cuda::adamw(q, &self.scalars, from, states, param.address, n) };
        done.map_err(|error| error.to_string())
    }
}

fn view(address: u64, dtype: DType, elements: usize) -> View {
    let shape = Shape::from([elements]);
    View {
        address,
        dtype,
        shape,
    }
}

impl Engine {
    /// Sums the squares of a gradient while it is on the device, wherever it will be applied: memory is
    /// fastest there, and the CPU has more to do than it can.
    pub(super) fn grad_norm(
        &mut self,
        task: TaskRef,
        spec: &Task,
        section: SectionId,
    ) -> Result<()> {
        let plan = Arc::clone(self.scheduler().plan());
        let cast = self
            .model
            .cast_offset(&self.model.sections[section.0 as usize]);
        let in_slot = spec
            .slot
            .map(|claim| self.slot(&plan, task.step, claim) + cast.unwrap_or(0));
        let gradient = self.places.grad_here(section).or(in_slot);
        let Some(gradient) = gradient else {
            unreachable!("a whole gradient is in its slot");
        };
        let dtype = self.model.dtype;
        let values = view(gradient, dtype, spec.amount as usize);
        // Straight into the host's memory: a copy would queue behind those of whole gradients.
        let address = self.device.mapped(self.places.sums_target(section));
        let address = address.expect("the arena was made known to the device");
        let words = view(address, DType::U32, SQUARE_SUMS / 4);
        let launch = Launch::new(
            SquareSum(dtype),
            &[Tensor::new(values)],
            &[TensorMut::new(words)],
        )?;
        // SAFETY: the place is the gradient's until it has left, and the sums' is this section's own: it is read
        // after the event.
        unsafe { self.device.launch(launch.into_pinned()) };
        let event = self.device.newest(Stream::Compute);
        self.fly(task, Sign::Device(event));
        self.scheduler_mut().issued(task);
        Ok(())
    }

    pub(super) fn device_update(
        &mut self,
        task: TaskRef,
        section: SectionId,
        part: u32,
    ) -> Result<()> {
        let Some(gradient) = self.places.grad_here(section) else {
            unreachable!("a gradient that is applied on the device has a place there");
        };
        let scalars = self.step_scalars(task.step);
        let span = self.placement.parts(section)[part as usize];
        let range = span.first as usize..(span.first + span.elements) as usize;
        let states = self.places.states(section, part);
        let (param, dtype) = (self.resident(section), self.model.dtype);
        let bytes = dtype.bytes() as u64;
        for run in self.runs[section.0 as usize].iter() {
            let Some(shared) = run.within(&range) else {
                continue;
            };
            let (start, elements) = (shared.start as u64, shared.len());
            let state = |index: u64| {
                let first = index * span.elements + start - span.first;
                TensorMut::new(view(states + 4 * first, DType::F32, elements))
            };
            let param = TensorMut::new(view(param + bytes * start, dtype, elements));
            let grad = view(gradient + bytes * start, dtype, elements);
            let update = Update {
                scalars: *scalars.of(run),
                dtype,
            };
            let outputs = [state(0), state(1), state(2), param];
            let launch = Launch::new(update, &[Tensor::new(grad)], &outputs)?;
            // SAFETY: states, gradient and parameters of the part belong to this update.
            unsafe { self.device.launch(launch) };
        }
        let event = self.device.newest(Stream::Compute);
        self.fly(task, Sign::Device(event));
        self.scheduler_mut().issued(task);
        Ok(())
    }

    /// Queues the cast of a part's masters into its parameters.
    pub(super) fn derive_here(&mut self, section: SectionId, part: u32) -> Result<()> {
        let span = self.placement.parts(section)[part as usize];
        let (dtype, elements) = (self.model.dtype, span.elements as usize);
        let masters = self.places.states(section, part);
        let address = self.resident(section) + span.first * dtype.bytes() as u64;
        let param = view(address, dtype, elements);
        if dtype == DType::F32 {
            let to = Span {
                address,
                bytes: param.bytes(),
            };
            // SAFETY: both places are the part's own, and nothing else is under way on them.
            unsafe { self.device.copy(masters, to) };
        } else {
            let launch = ops::narrow(view(masters, DType::F32, elements), param)?;
            // SAFETY: as above.
            unsafe { self.device.launch(launch) };
        }
        Ok(())
    }
}
