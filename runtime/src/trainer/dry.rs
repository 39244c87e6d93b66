//! A step on nothing: no device, no memory, only the measure of what the step asks for.

use super::engine::Ending;
use super::scratch::Scratch;
use super::step::{Driver, Finished, Step};
use crate::device::Span;
use crate::error::Result;
use crate::model::{Model, SectionId, Stage, StageId};
use crate::operation::Launch;
use crate::target::Target;
use crate::tensor::View;

/// What a pass over the model needs besides its sections, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Scratch memory on the device.
    pub scratch_bytes: u64,
    /// Token ids uploaded in one step.
    pub input_bytes: u64,
    /// Floating-point operations of its matrix products: not bytes, and not demanded.
    pub flops: u64,
}

impl Footprint {
    /// Enough for either of two passes.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            scratch_bytes: self.scratch_bytes.max(other.scratch_bytes),
            input_bytes: self.input_bytes.max(other.input_bytes),
            flops: self.flops.max(other.flops),
        }
    }
}

/// Which stages of a model a pass walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The training step.
    Train,
    /// The forward pass without gradients.
    Eval,
}

impl Pass {
    pub(crate) fn stages(self, model: &Model) -> &[Stage] {
        match self {
            Self::Train => &model.train,
            Self::Eval => &model.eval,
        }
    }
}

/// Walks `pass` through once without a device or memory, and measures what it asks for: a trainer
/// need not count its scratch memory by hand. `target` is what the trainer's
/// options say: [`Options::target`](crate::Options::target).
///
/// # Errors
/// Whatever `walk` returns, wrong shapes and stages out of order included.
pub fn footprint(
    model: &Model,
    pass: Pass,
    target: Target,
    walk: impl FnOnce(&Step<'_>) -> Result<()>,
) -> Result<Footprint> {
    // Addresses far from each other and from zero, so that overlap checks mean something.
    let mut scratch = Scratch::new(Span {
        address: 1 << 62,
        bytes: 1 << 60,
    });
    let mut dry = Dry {
        target,
        input_bytes: 0,
        flops: 0,
    };
    let step = Step::new(&mut dry, &mut scratch, model, pass.stages(model));
    walk(&step)?;
    step.finish()?;
    Ok(Footprint {
        scratch_bytes: scratch.peak(),
        input_bytes: dry.input_bytes,
        flops: dry.flops,
    })
}

struct Dry {
    target: Target,
    input_bytes: u64,
    flops: u64,
}

impl Driver for Dry {
    fn enter(&mut self, _: StageId) -> Result<()> {
        Ok(())
    }
    fn leave(&mut self, _: StageId) {}
    fn param(&self, section: SectionId) -> u64 {
        (1 << 58) + (u64::from(section.0) << 36)
    }
    fn grad(&self, section: SectionId) -> u64 {
        (1 << 59) + (u64::from(section.0) << 36)
    }
    fn saved(&self, saver: StageId) -> u64 {
        (1 << 60) + (u64::from(saver.0) << 36)
    }
    fn foresee(&mut self, flops: u64) {
        self.flops += flops;
    }
    fn launch(&mut self, _: Launch) -> Result<()> {
        Ok(())
    }
    fn copy(&mut self, _: View, _: Span) -> Result<()> {
        Ok(())
    }
    fn upload(&mut self, values: &[u32], _: Span) -> Result<()> {
        self.input_bytes += size_of_val(values) as u64;
        Ok(())
    }
    fn loss(&mut self, _: View) -> Result<()> {
        Ok(())
    }
    fn read(&mut self, _: View, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }
    fn loss_scale(&mut self) -> Result<f64> {
        Ok(1.0)
    }
    fn target(&self) -> Target {
        self.target
    }
    fn finish(&mut self, _: Ending) -> Result<Finished> {
        Ok(Finished {
            step: 0,
            loss: None,
        })
    }
    fn abandon(&mut self) {}
}
