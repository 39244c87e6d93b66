//! The engine as a step drives it.

use std::sync::Arc;
use std::time::Instant;

use forebay_prefetch::{ParamSource, SectionId, TaskRef};

use super::engine::{Ending, Engine, Pass, Sign};
use super::places::READ_BYTES;
use super::step::{Driver, Finished};
use crate::device::{Span, Stream};
use crate::error::{Error, Result};
use crate::model::StageId;
use crate::operation::Launch;
use crate::ops;
use crate::target::Target;
use crate::tensor::{DType, Shape, View};

impl Driver for Engine {
    fn enter(&mut self, stage: StageId) -> Result<()> {
        let result = self.enter_stage(stage);
        self.sticky(result)
    }

    fn leave(&mut self, stage: StageId) {
        if let Some((id, task)) = self.stage.filter(|(id, _)| *id == stage) {
            debug_assert_eq!(id, stage);
            // What nothing was added to is zero.
            self.zero_unwritten(|_| true);
            self.cast_gradients(stage, task);
            let event = self.device.newest(Stream::Compute);
            self.fly(task, Sign::Device(event));
            self.scheduler_mut().issued(task);
        }
    }

    fn param(&self, section: SectionId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let uses = &plan.stages()[stage.0 as usize];
        match uses.params.iter().find(|(s, _)| *s == section) {
            Some((_, ParamSource::Fetched(claim))) => self.slot(plan, task.step, *claim),
            Some((_, ParamSource::Mapped)) => self.mapped(section),
            _ => self.resident(section),
        }
    }

    fn grad(&self, section: SectionId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let grads = &plan.stages()[stage.0 as usize].grads;
        let claim = grads
            .iter()
            .find(|grad| grad.section == section)
            .map(|grad| grad.slot);
        claim.map_or(0, |claim| self.slot(plan, task.step, claim))
    }

    fn saved(&self, _saver: StageId) -> u64 {
        let Some((stage, task)) = self.stage else {
            return 0;
        };
        let plan = self.scheduler().plan();
        let uses = &plan.stages()[stage.0 as usize];
        let claim = uses.save.or(uses.restore);
        claim.map_or(0, |claim| self.slot(plan, task.step, claim))
    }

    fn launch(&mut self, mut launch: Launch) -> Result<()> {
        self.begin_gradients(&mut launch);
        // SAFETY: views come from leases and frames: inside device memory, or a slab that a stage gathers
        // from; outputs overlap nothing (checked by `Launch::new`); and the scheduler keeps copies and
        // updates off what a stage uses.
        unsafe { self.device.launch(launch) };
        Ok(())
    }

    fn copy(&mut self, from: View, to: Span) -> Result<()> {
        self.zero_unwritten(|span| span.overlaps(from.span()) || span.overlaps(to));
        // SAFETY: as for `launch`: a checkpoint's slot and a tensor of the stage.
        unsafe { self.device.copy(from.address, to) };
        Ok(())
    }

    fn upload(&mut self, values: &[u32], to: Span) -> Result<()> {
        let half = self.half();
        let input = &mut self.places.inputs[half];
        let start = self.input_used as usize;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let Some(place) = input.get_mut(start..start + bytes.len()) else {
            return Err(Error::Misuse(
                "more token ids than the footprint was measured with; measure it again".to_owned(),
            ));
        };
        place.copy_from_slice(bytes);
        self.input_used += bytes.len() as u64;
        // SAFETY: this half is written again only after the event; `to` is scratch of this step.
        unsafe { self.device.copy_in(Stream::Compute, to, place.as_ptr()) };
        // A mark of its own: what comes next on the stream may come much later.
        self.input_last[half] = Some(self.device.newest(Stream::Compute));
        Ok(())
    }

    fn loss(&mut self, from: View) -> Result<()> {
        self.zero_unwritten(|span| span.overlaps(from.span()));
        let span = Span {
            address: from.address,
            bytes: from.bytes(),
        };
        let target = self.places.small.address();
        // SAFETY: only `finish` reads it, after the event, and before the next step's loss.
        self.loss = Some(unsafe { self.device.copy_out(Stream::Compute, span, target) });
        Ok(())
    }

    fn read(&mut self, from: View, out: &mut [f32]) -> Result<()> {
        self.zero_unwritten(|span| span.overlaps(from.span()));
        let piece = READ_BYTES as usize / 4;
        for (index, out) in out.chunks_mut(piece).enumerate() {
            let address = from.address + (index * piece * 4) as u64;
            let span = Span {
                address,
                bytes: size_of_val(out) as u64,
            };
            let target = self.places.read.address();
            // SAFETY: waited for at once; nobody else uses the piece.
            let event = unsafe { self.device.copy_out(Stream::Compute, span, target) };
            let waited = self.wait_for(event);
            self.sticky(waited)?;
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
            bytes.copy_from_slice(&self.places.read[..bytes.len()]);
        }
        Ok(())
    }

    fn loss_scale(&mut self) -> Result<f64> {
        let scale = self.scale_of_step();
        self.sticky(scale)
    }

    fn target(&self) -> Target {
        self.device.target()
    }

    fn finish(&mut self, ending: Ending) -> Result<Finished> {
        let result = self.finish_pass(ending);
        self.sticky(result)
    }

    fn abandon(&mut self) {
        self.drop_step();
    }
}

impl Engine {
    fn enter_stage(&mut self, stage: StageId) -> Result<()> {
        self.check()?;
        let id = forebay_prefetch::StageId(stage.0);
        let task = loop {
            let moved = self.pump()?;
            if let Some(task) = self.scheduler_mut().try_start_compute(id) {
                break task;
            }
            if !moved {
                if let Some((trace, scheduler)) = self.tracing() {
                    trace.waiting(scheduler);
                }
                self.nap();
            }
        };
        if let Some((trace, scheduler)) = self.tracing() {
            trace.entered(scheduler, task);
        }
        self.order(Stream::Compute, task);
        self.stage = Some((stage, task));
        let plan = Arc::clone(self.scheduler().plan());
        for grad in plan.stages()[stage.0 as usize]
            .grads
            .iter()
            .filter(|grad| grad.first)
        {
            let address = self.slot(&plan, task.step, grad.slot);
            self.expect_gradient(address, grad.section);
        }
        Ok(())
    }

    /// A gradient slot that nothing was added to yet: its tensors are to be set by the first operation
    /// that adds to them, or zeroed before it; what lies between them is zero.
    fn expect_gradient(&mut self, slot: u64, section: SectionId) {
        let model = Arc::clone(&self.model);
        let section = &model.sections[section.0 as usize];
        let mut end = slot;
        let all = slot + 4 * section.elements();
        for (start, tensor) in section.places() {
            let tensor = Span {
                address: slot + 4 * start as u64,
                bytes: 4 * tensor.shape.elements() as u64,
            };
            self.zero(end, tensor.address);
            self.unwritten.push(tensor);
            end = tensor.address + tensor.bytes;
        }
        self.zero(end, all);
    }

    fn zero(&mut self, address: u64, end: u64) {
        let bytes = end - address;
        if bytes > 0 {
            // SAFETY: of a slot that was claimed for this gradient; nobody has used it yet.
            unsafe { self.device.zero(Span { address, bytes }) };
        }
    }

    fn zero_unwritten(&mut self, which: impl Fn(Span) -> bool) {
        let mut index = 0;
        while let Some(span) = self.unwritten.get(index).copied() {
            if which(span) {
                self.unwritten.swap_remove(index);
                self.zero(span.address, span.address + span.bytes);
            } else {
                index += 1;
            }
        }
    }

    /// Gradients that an operation is the first to touch: it sets them where it can.
    fn begin_gradients(&mut self, launch: &mut Launch) {
        let set = |span: &Span| launch.can_set(span.address, span.bytes);
        if let Some(index) = self.unwritten.iter().position(set) {
            self.unwritten.swap_remove(index);
            launch.set_fresh();
        }
        if !self.unwritten.is_empty() {
            self.zero_unwritten(|span| launch.views().any(|view| span.overlaps(view.span())));
        }
    }

    /// Gradients that are whole now leave in the model's type: it is beside the sums, if they are not what leaves
    /// themselves.
    fn cast_gradients(&mut self, stage: StageId, task: TaskRef) {
        let plan = Arc::clone(self.scheduler().plan());
        for grad in plan.stages()[stage.0 as usize]
            .grads
            .iter()
            .filter(|grad| grad.last)
        {
            self.open.of_mut(task.step).any_whole = true;
            let section = &self.model.sections[grad.section.0 as usize];
            let Some(offset) = self.model.cast_offset(section) else {
                continue;
            };
            if self.places.grad_here(grad.section).is_some() {
                // Its place may not be free yet.
                continue;
            }
            let address = self.slot(&plan, task.step, grad.slot);
            let cast = self.cast_gradient(grad.section, address, address + offset);
            if let Err(error) = cast {
                self.failed.get_or_insert_with(|| error.to_string());
            }
        }
    }

    /// Queues the cast of a gradient's sums to the model's type.
    pub(super) fn cast_gradient(&mut self, section: SectionId, sums: u64, to: u64) -> Result<()> {
        let dtype = self.model.dtype;
        let elements = self.model.sections[section.0 as usize].elements() as usize;
        let view = |address, dtype| View {
            address,
            dtype,
            shape: Shape::from([elements]),
        };
        let (sums, target) = (view(sums, DType::F32), view(to, dtype));
        if dtype == DType::F32 {
            // SAFETY: the gradient's slot, and its own place.
            unsafe { self.device.copy(sums.address, target.span()) };
        } else {
            let launch = ops::narrow(sums, target)?;
            // SAFETY: the gradient's slot, and its own place or the rest of the slot.
            unsafe { self.device.launch(launch) };
        }
        Ok(())
    }

    fn finish_pass(&mut self, ending: Ending) -> Result<Finished> {
        self.walking = false;
        let step = self.stage.map_or(0, |(_, task)| task.step);
        self.check_scaled(ending)?;
        if let Some((_, task)) = self.stage.take().filter(|_| self.pass == Pass::Train) {
            self.open.of_mut(task.step).ending = Some(ending);
        }
        if let Some(norm) = self.held.take() {
            self.norm(norm)?;
        }
        let loss = match self.loss.take() {
            None => None,
            Some(event) => {
                if let Some((trace, scheduler)) = self.tracing() {
                    trace.waiting(scheduler);
                }
                self.wait_for(event)?;
                if let Some((trace, _)) = self.tracing() {
                    trace.has_loss(step);
                }
                let bytes = self.places.small.first_chunk::<4>();
                bytes.map(|b| f32::from_le_bytes(*b))
            }
        };
        if self.pass == Pass::Eval {
            self.wait_until(|engine| engine.scheduler().idle())?;
        } else {
            self.telemetry.end_step(Instant::now());
        }
        self.telemetry.end_pass();
        if self.pass == Pass::Train {
            self.collect_trace();
        } else {
            self.cut_trace();
        }
        Ok(Finished {
            step: self.steps.saturating_sub(1),
            loss,
        })
    }
}
