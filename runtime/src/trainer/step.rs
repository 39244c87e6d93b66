//! A step as the trainer walks through it: stages in order, leases on what is on the device,
//! scratch memory in frames.
//!
//! Lifetimes do the bookkeeping: a tensor cannot outlive the lease or frame it came from, a lease
//! cannot outlive its step, and a step borrows the trainer, so there is one at a time.
//!
//! ```compile_fail
//! # use forebay::*;
//! # fn f(step: &Step<'_>, stage: StageId, layer: SectionId) -> Result<()> {
//! let weight = {
//!     let lease = step.enter(stage)?;
//!     lease.param(layer, "weight")?
//! }; // the lease ended: its slot may hold another section by now
//! drop(weight);
//! # Ok(())
//! # }
//! ```

use std::cell::RefCell;

use super::engine::Ending;
use super::scratch::Scratch;
use crate::device::Span;
use crate::error::{Error, Result};
use crate::model::{Model, SectionId, Stage, StageId};
use crate::operation::{Launch, Operation};
use crate::target::Target;
use crate::tensor::{DType, Shape, Tensor, TensorMut, View};

/// What a step is walked on: the engine, or a dry run that only measures.
pub(crate) trait Driver {
    /// Blocks until the stage's sections are on the device, or ordered to be before what is
    /// launched next.
    fn enter(&mut self, stage: StageId) -> Result<()>;
    /// Everything of the stage is queued.
    fn leave(&mut self, stage: StageId);
    /// Where a section's parameters are; it belongs to the stage entered last.
    fn param(&self, section: SectionId) -> u64;
    /// Where a section's gradient accumulates.
    fn grad(&self, section: SectionId) -> u64;
    /// Where the stage saves its activation checkpoint.
    fn saved(&self, saver: StageId) -> u64;
    /// What the next operation computes; only a dry run wants to know.
    fn foresee(&mut self, _flops: u64) {}
    /// Queues an operation.
    fn launch(&mut self, launch: Launch) -> Result<()>;
    /// Queues a copy within the device.
    fn copy(&mut self, from: View, to: Span) -> Result<()>;
    /// Queues token ids into device memory.
    fn upload(&mut self, values: &[u32], to: Span) -> Result<()>;
    /// Queues the copy of the loss to the host.
    fn loss(&mut self, from: View) -> Result<()>;
    /// Copies to the host and waits.
    fn read(&mut self, from: View, out: &mut [f32]) -> Result<()>;
    /// By what the gradient of the loss is to be multiplied.
    fn loss_scale(&mut self) -> Result<f64>;
    /// What operations run on.
    fn target(&self) -> Target;
    /// All stages were left: the loss, once it is known.
    fn finish(&mut self, ending: Ending) -> Result<Finished>;
    /// The step was dropped on the way.
    fn abandon(&mut self);
}

/// What a finished step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finished {
    /// The number of the step, from 0.
    pub step: u64,
    /// The loss that the step reported through [`Step::loss`], if it did.
    pub loss: Option<f32>,
}

/// One pass over the stages of a model, for training or evaluation.
///
/// Every call but [`Step::read`] only queues work and returns.
pub struct Step<'t> {
    core: RefCell<Core<'t>>,
    model: &'t Model,
    stages: &'t [Stage],
}

struct Core<'t> {
    driver: &'t mut dyn Driver,
    scratch: &'t mut Scratch,
    /// The stage that may be entered next.
    next: u32,
    /// Whether a lease on the stage before is alive.
    inside: bool,
    finished: bool,
}

impl<'t> Step<'t> {
    pub(crate) fn new(
        driver: &'t mut dyn Driver,
        scratch: &'t mut Scratch,
        model: &'t Model,
        stages: &'t [Stage],
    ) -> Self {
        scratch.reset();
        let core = Core {
            driver,
            scratch,
            next: 0,
            inside: false,
            finished: false,
        };
        Self {
            core: RefCell::new(core),
            model,
            stages,
        }
    }

    /// Enters the next stage. Blocks until the device holds, or is about to hold, its sections.
    ///
    /// # Errors
    /// [`Error::Misuse`] if it is not the stage's turn or the lease before is still alive; and
    /// whatever failed on the way of its sections.
    pub fn enter(&self, stage: StageId) -> Result<StageLease<'_>> {
        let mut core = self.core.borrow_mut();
        let spec = self.stages.get(stage.0 as usize).ok_or_else(|| {
            Error::Misuse(format!(
                "stage {} of {} does not exist",
                stage.0,
                self.stages.len()
            ))
        })?;
        if core.inside || stage.0 != core.next {
            let due = self
                .stages
                .get(core.next as usize)
                .map_or("none", |s| s.name.as_str());
            let what = if core.inside {
                "drop the lease before"
            } else {
                "stages run in order"
            };
            return Err(Error::Misuse(format!(
                "stage '{}' entered when '{due}' is due: {what}",
                spec.name
            )));
        }
        core.driver.enter(stage)?;
        core.inside = true;
        core.next += 1;
        Ok(StageLease {
            step: self,
            model: self.model,
            spec,
            id: stage,
        })
    }

    /// A region of scratch memory, returned when the frame is dropped. Frames nest.
    pub fn frame(&self) -> Frame<'_> {
        let index = self.core.borrow_mut().scratch.push();
        Frame { step: self, index }
    }

    /// Brings token ids to the device; they stay there as long as the step.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape holds another number of values; [`Error::Scratch`].
    pub fn upload(&self, values: &[u32], shape: impl Into<Shape>) -> Result<Tensor<'_>> {
        let shape = shape.into();
        if shape.elements() != values.len() {
            let what = format!("{} values do not fill {shape:?}", values.len());
            return Err(Error::Shape {
                operation: "upload",
                what,
            });
        }
        let mut core = self.core.borrow_mut();
        let address = core.scratch.reserve(size_of_val(values) as u64)?;
        let view = View {
            address,
            dtype: DType::U32,
            shape,
        };
        core.driver.upload(
            values,
            Span {
                address,
                bytes: view.bytes(),
            },
        )?;
        Ok(Tensor::new(view))
    }

    /// A tensor of this type that lives as long as the step; what it holds is undefined until written.
    ///
    /// # Errors
    /// [`Error::Scratch`].
    pub fn tensor(&self, dtype: DType, shape: impl Into<Shape>) -> Result<TensorMut<'_>> {
        let shape = shape.into();
        let bytes = (shape.elements() * dtype.bytes()) as u64;
        let address = self.core.borrow_mut().scratch.reserve(bytes)?;
        Ok(TensorMut::new(View {
            address,
            dtype,
            shape,
        }))
    }

    /// What a stage gathers from may lie outside the device: operations read it and nothing else does,
    /// wherever it lies.
    fn not_gathered(&self, from: View) -> Result<()> {
        let core = self.core.borrow();
        let entered = core.next.checked_sub(1).filter(|_| core.inside);
        let stage = entered.and_then(|index| self.stages.get(index as usize));
        let gathered = stage.iter().flat_map(|stage| &stage.gathers).find(|id| {
            let elements = self.model.sections[id.0 as usize].elements();
            let section = Span {
                address: core.driver.param(**id),
                bytes: elements * self.model.dtype.bytes() as u64,
            };
            section.overlaps(from.span())
        });
        match gathered {
            None => Ok(()),
            Some(id) => Err(Error::Misuse(format!(
                "'{}' is gathered from and cannot be copied; name it in the stage's params",
                self.model.sections[id.0 as usize].name
            ))),
        }
    }

    /// Copies a tensor to another place of as many bytes, on the device.
    pub(crate) fn copy(&self, from: View, to: View) -> Result<()> {
        self.not_gathered(from)?;
        let to = Span {
            address: to.address,
            bytes: to.bytes(),
        };
        self.core.borrow_mut().driver.copy(from, to)
    }

    /// Names the step's loss, an f32 tensor of one element, for [`Step::finish`] to report.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is anything else.
    pub fn loss(&self, loss: &Tensor<'_>) -> Result<()> {
        if loss.shape().elements() != 1 || loss.dtype() != DType::F32 {
            let what = format!("a loss is one f32, not {loss:?}");
            return Err(Error::Shape {
                operation: "loss",
                what,
            });
        }
        self.not_gathered(loss.view)?;
        self.core.borrow_mut().driver.loss(loss.view)
    }

    /// Copies a tensor of f32, bf16 or f16 to the host, waiting for all that was queued: for logits and
    /// tests, not for the path of a step.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` has another length or the type is another; [`Error::Scratch`], for
    /// what is not f32 is cast on the device; the device's failure.
    pub fn read(&self, tensor: &Tensor<'_>, out: &mut [f32]) -> Result<()> {
        if tensor.shape().elements() != out.len() || tensor.dtype() == DType::U32 {
            let what = format!("{tensor:?} does not fit {} f32 values", out.len());
            return Err(Error::Shape {
                operation: "read",
                what,
            });
        }
        self.not_gathered(tensor.view)?;
        if tensor.dtype() == DType::F32 {
            return self.core.borrow_mut().driver.read(tensor.view, out);
        }
        let frame = self.frame();
        let mut wide = frame.tensor_of(DType::F32, tensor.shape())?;
        crate::ops::cast(self, tensor, &mut wide)?;
        self.core.borrow_mut().driver.read(wide.view, out)
    }

    /// By what this step has to multiply the gradient of its loss, before anything follows from it: a power of two,
    /// and 1 without [scaling](crate::Options::loss_scale). All gradients of the step are then those of the loss times
    /// this; norms and updates divide by it. The loss that is reported is not multiplied.
    ///
    /// Where the scale depends on the norm of the step before, that is waited for: ask late, where the loss is.
    ///
    /// # Errors
    /// [`Error::Misuse`] where the step has a scale and first asks for it once a gradient is whole; whatever failed in
    /// the step before.
    pub fn loss_scale(&self) -> Result<f32> {
        // Exact: see `LossScale` for its range.
        Ok(self.core.borrow_mut().driver.loss_scale()? as f32)
    }

    /// Queues an operation: one of [`crate::ops`] or your own. Outputs are handed over for the call
    /// ([`TensorMut::reborrow`]).
    ///
    /// # Errors
    /// [`Error::Shape`] if an output overlaps another tensor of the call. [`Error::Scratch`], for on
    /// the host device bf16 and f16 tensors are widened for the operation.
    pub fn launch<O: Operation>(
        &self,
        operation: O,
        inputs: &[Tensor<'_>],
        outputs: &[TensorMut<'_>],
    ) -> Result<()> {
        let mut launch = Launch::new(operation, inputs, outputs)?;
        let mut core = self.core.borrow_mut();
        core.driver.foresee(operation.flops());
        let Core {
            driver, scratch, ..
        } = &mut *core;
        let floats = match driver.target() {
            Target::Host { .. } => launch.wide_floats(),
            Target::Cuda => 0,
        };
        // What comes next on the compute stream may have the room again: it runs later.
        let frame = scratch.push();
        let room = scratch.allocate(frame, 4 * floats);
        scratch.pop(frame);
        if floats > 0 {
            launch.widen_in(room?);
        }
        driver.launch(launch)
    }

    /// The type that the model computes in.
    pub fn dtype(&self) -> DType {
        self.model.dtype
    }

    /// What operations run on, for the size of their workspaces.
    pub fn target(&self) -> Target {
        self.core.borrow().driver.target()
    }

    /// Ends the step. Returns once the loss is known; gradients, updates and writes go on behind.
    ///
    /// # Errors
    /// [`Error::Misuse`] if stages are missing, or losses are scaled and [`Step::loss_scale`] was not asked for;
    /// whatever failed on the way.
    pub fn finish(self) -> Result<Finished> {
        self.end(Ending::Apply)
    }

    /// Ends the step as [`Step::finish`] does, but throws its gradient away: states and parameters stay as they
    /// are, as after a gradient that is not finite. For a loss that says that something went wrong.
    ///
    /// # Errors
    /// As [`Step::finish`].
    pub fn discard(self) -> Result<Finished> {
        self.end(Ending::Discard)
    }

    fn end(self, ending: Ending) -> Result<Finished> {
        let mut core = self.core.borrow_mut();
        if core.next as usize != self.stages.len() {
            let due = &self.stages[core.next as usize].name;
            return Err(Error::Misuse(format!(
                "the step was finished before stage '{due}' ran"
            )));
        }
        core.finished = true;
        core.driver.finish(ending)
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        let core = self.core.get_mut();
        if !core.finished {
            core.driver.abandon();
        }
    }
}

impl std::fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Step of '{}' before stage {}",
            self.model.name,
            self.core.borrow().next
        )
    }
}

/// What a lease or frame needs of its step, whatever the step borrows.
trait Host {
    fn tensor(&self, frame: usize, dtype: Option<DType>, shape: Shape) -> Result<View>;
    fn pop(&self, frame: usize);
    fn param(&self, section: SectionId) -> u64;
    fn grad(&self, section: SectionId) -> u64;
    fn saved(&self, saver: StageId) -> u64;
    fn copy(&self, from: View, to: Span) -> Result<()>;
    fn leave(&self, stage: StageId);
}

impl Host for Step<'_> {
    fn tensor(&self, frame: usize, dtype: Option<DType>, shape: Shape) -> Result<View> {
        let dtype = dtype.unwrap_or(self.model.dtype);
        let bytes = (shape.elements() * dtype.bytes()) as u64;
        let address = self.core.borrow_mut().scratch.allocate(frame, bytes)?;
        Ok(View {
            address,
            dtype,
            shape,
        })
    }

    fn pop(&self, frame: usize) {
        self.core.borrow_mut().scratch.pop(frame);
    }

    fn param(&self, section: SectionId) -> u64 {
        self.core.borrow().driver.param(section)
    }

    fn grad(&self, section: SectionId) -> u64 {
        self.core.borrow().driver.grad(section)
    }

    fn saved(&self, saver: StageId) -> u64 {
        self.core.borrow().driver.saved(saver)
    }

    fn copy(&self, from: View, to: Span) -> Result<()> {
        self.not_gathered(from)?;
        self.core.borrow_mut().driver.copy(from, to)
    }

    fn leave(&self, stage: StageId) {
        let mut core = self.core.borrow_mut();
        core.inside = false;
        core.driver.leave(stage);
    }
}

/// A region of scratch memory.
pub struct Frame<'s> {
    step: &'s dyn Host,
    index: usize,
}

impl Frame<'_> {
    /// A tensor in this frame, in the model's type; what it holds is undefined until it is written.
    ///
    /// # Errors
    /// [`Error::Scratch`] when scratch memory is used up; [`Error::Misuse`] while a frame opened
    /// later is alive.
    pub fn tensor(&self, shape: impl Into<Shape>) -> Result<TensorMut<'_>> {
        let view = self.step.tensor(self.index, None, shape.into())?;
        Ok(TensorMut::new(view))
    }

    /// As [`Frame::tensor`], of this type: for sums, losses and the like, which are f32 in any model.
    ///
    /// # Errors
    /// As [`Frame::tensor`].
    pub fn tensor_of(&self, dtype: DType, shape: impl Into<Shape>) -> Result<TensorMut<'_>> {
        let view = self.step.tensor(self.index, Some(dtype), shape.into())?;
        Ok(TensorMut::new(view))
    }
}

impl Drop for Frame<'_> {
    fn drop(&mut self) {
        self.step.pop(self.index);
    }
}

impl std::fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame {}", self.index)
    }
}

/// The right to use the sections of a stage; ends when the last operation queued before its drop
/// has run.
pub struct StageLease<'s> {
    step: &'s dyn Host,
    model: &'s Model,
    spec: &'s Stage,
    id: StageId,
}

impl StageLease<'_> {
    /// A parameter tensor of one of the stage's sections, those that it gathers from included.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the stage did not declare the section or it has no such tensor.
    pub fn param(&self, section: SectionId, tensor: &str) -> Result<Tensor<'_>> {
        let dtype = self.model.dtype;
        let declared = if self.spec.gathers.contains(&section) {
            &self.spec.gathers
        } else {
            &self.spec.params
        };
        let (start, shape) = self.place(declared, "params or gathers", section, tensor)?;
        let address = self.step.param(section) + start * dtype.bytes() as u64;
        Ok(Tensor::new(View {
            address,
            dtype,
            shape,
        }))
    }

    /// The gradient accumulator of a tensor, in f32; operations add to it. Of the loss times
    /// [`Step::loss_scale`].
    ///
    /// # Errors
    /// [`Error::Misuse`] if the stage did not declare the section or it has no such tensor.
    pub fn grad(&self, section: SectionId, tensor: &str) -> Result<TensorMut<'_>> {
        let (start, shape) = self.place(&self.spec.grads, "grads", section, tensor)?;
        let address = self.step.grad(section) + start * DType::F32.bytes() as u64;
        Ok(TensorMut::new(View {
            address,
            dtype: DType::F32,
            shape,
        }))
    }

    /// Leaves `x` as the stage's activation checkpoint.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the stage declared none; [`Error::Shape`] for another shape.
    pub fn save(&self, x: &Tensor<'_>) -> Result<()> {
        let shape = self.spec.saves.ok_or_else(|| {
            Error::Misuse(format!("stage '{}' declared no checkpoint", self.spec.name))
        })?;
        let dtype = self.model.dtype;
        if x.shape().elements() != shape.elements() || x.dtype() != dtype {
            let what = format!("the checkpoint is {dtype:?} {shape:?}, not {x:?}");
            return Err(Error::Shape {
                operation: "save",
                what,
            });
        }
        let to = Span {
            address: self.step.saved(self.id),
            bytes: x.view.bytes(),
        };
        self.step.copy(x.view, to)
    }

    /// The activation checkpoint that this stage restores.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the stage declared none.
    pub fn saved(&self) -> Result<Tensor<'_>> {
        let shape = |saver: StageId| self.model.train.get(saver.0 as usize).and_then(|s| s.saves);
        let (saver, shape) = self
            .spec
            .restores
            .and_then(|saver| Some((saver, shape(saver)?)))
            .ok_or_else(|| {
                Error::Misuse(format!("stage '{}' restores no checkpoint", self.spec.name))
            })?;
        Ok(Tensor::new(View {
            address: self.step.saved(saver),
            dtype: self.model.dtype,
            shape,
        }))
    }

    fn place(
        &self,
        declared: &[SectionId],
        kind: &str,
        section: SectionId,
        tensor: &str,
    ) -> Result<(u64, Shape)> {
        if !declared.contains(&section) {
            return Err(Error::Misuse(format!(
                "stage '{}' uses section {} without declaring it in its {kind}",
                self.spec.name, section.0
            )));
        }
        let section = &self.model.sections[section.0 as usize];
        section
            .places()
            .find(|(_, spec)| spec.name == tensor)
            .map(|(start, spec)| (start as u64, spec.shape))
            .ok_or_else(|| {
                Error::Misuse(format!(
                    "section '{}' has no tensor '{tensor}'",
                    section.name
                ))
            })
    }
}

impl Drop for StageLease<'_> {
    fn drop(&mut self) {
        self.step.leave(self.id);
    }
}

impl std::fmt::Debug for StageLease<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StageLease '{}'", self.spec.name)
    }
}
