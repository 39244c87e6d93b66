//! The optimizer on the device: sums of squares, and updates of sections whose states live there, as
//! operations on the compute stream, with the bits of the CPU's.

use std::sync::Arc;

use forebay_kernels::cpu::{self, Exchange, Isa, NormIn, Scalars, StateFormat, square_sum};
use forebay_kernels::cuda::ops::{self as cuda, SQUARE_SUMS, StatesAt};
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

/// The update of a run of elements of a part, whose states are the first output, as words, and the run's parameters
/// the second; then memory for sums.
#[derive(Clone, Copy)]
struct Update {
    scalars: Scalars,
    dtype: DType,
    format: StateFormat,
    /// Elements of the part, and the first of the run.
    part: usize,
    first: usize,
}

impl Operation for Update {
    fn name(&self) -> &'static str {
        "update"
    }

    fn host(&self, cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let states = bytemuck::cast_slice_mut(args.output::<u32>()?);
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
        let (grads, _) = exchange.lens();
        let run = self.first..self.first + grads;
        let states = self.format.view(states, self.part, run);
        cpu::update(&cx.workers, Isa::best(), &self.scalars, states, exchange);
        Ok(())
    }

    fn cuda(&self, cx: &CudaContext<'_>, mut args: CudaArgs<'_>) -> Result<(), String> {
        let grad = args.input()?;
        let states: DeviceSlice = args.output()?;
        let (param, sums) = (args.output()?, args.output()?);
        let q = cx.queue(self.dtype);
        let states = StatesAt {
            format: self.format,
            address: states.address,
            elements: self.part as u64,
            first: self.first as u64,
        };
        let from = (grad.address, self.dtype.element());
        let n = param.elements;
        // SAFETY: as many elements each, on the device; the sums are the section's own.
        let done = unsafe {
            cuda::update(
                q,
                &self.scalars,
                from,
                states,
                param.address,
                n,
                sums.address,
            )
        };
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
        let Some(claim) = spec.slot else {
            unreachable!("a whole gradient is in its slot");
        };
        let slot = self.slot(&plan, task.step, claim);
        let gradient = if let Some(place) = self.places.grad_here(section) {
            // To where it waits for its update on the device; the one before has been applied.
            self.cast_gradient(section, slot, place)?;
            place
        } else {
            let section = &self.model.sections[section.0 as usize];
            slot + self.model.cast_offset(section).unwrap_or(0)
        };
        let dtype = self.model.dtype;
        let values = view(gradient, dtype, spec.amount as usize);
        // Straight into the host's memory: a copy would queue behind those of whole gradients.
        let address = self.sums_address(section);
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

    fn sums_address(&self, section: SectionId) -> u64 {
        let address = self.device.mapped(self.places.sums_target(section));
        address.expect("the arena was made known to the device")
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
        let scalars = self.update_scalars(task);
        let span = self.placement.parts(section)[part as usize];
        let range = span.first as usize..(span.first + span.elements) as usize;
        let states = self.places.states(section, part);
        let (param, dtype) = (self.resident(section), self.model.dtype);
        let bytes = dtype.bytes() as u64;
        let sums = self.sums_address(section);
        for run in self.runs[section.0 as usize].iter() {
            let Some(shared) = run.within(&range) else {
                continue;
            };
            let (start, elements) = (shared.start as u64, shared.len());
            let param = TensorMut::new(view(param + bytes * start, dtype, elements));
            let grad = view(gradient + bytes * start, dtype, elements);
            let update = Update {
                scalars: *scalars.of(run),
                dtype,
                format: self.updater.format,
                part: span.elements as usize,
                first: (start - span.first) as usize,
            };
            let words = self.placement.optim_bytes(&span) as usize / 4;
            let states = TensorMut::new(view(states, DType::U32, words));
            // Read when the norm was; of no use to others since.
            let sums = TensorMut::new(view(sums, DType::U32, 1));
            let outputs = [states, param, sums];
            let launch = Launch::new(update, &[Tensor::new(grad)], &outputs)?;
            // SAFETY: states, gradient, parameters and sums of the part belong to this update.
            unsafe { self.device.launch(launch.into_pinned()) };
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
