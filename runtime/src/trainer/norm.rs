//! What the norm of the whole gradient decides: the clip factor, whether the step counts, and whether what
//! was updated before it stands.

use std::sync::Arc;

use forebay_prefetch::{GradHome, SectionId, TaskId, TaskKind, TaskRef, Tier};

use super::engine::{Ending, Engine, Pass};
use super::update::StepScalars;
use crate::error::{Error, Result};
use crate::queue::Seq;

/// A step that ran ahead of its norm, which is known now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resolving {
    /// The task that ends with it.
    norm: TaskRef,
    /// Whether what ran ahead was right to.
    stands: bool,
    /// Once all of it has come through: the last piece of work that makes good for what is in pinned memory.
    last: Option<Seq>,
}

impl Engine {
    /// All sums are known.
    pub(super) fn norm(&mut self, task: TaskRef) -> Result<()> {
        let Some(ending) = self.open.of(task.step).ending else {
            // The trainer may discard the step yet.
            self.held = Some(task);
            return Ok(());
        };
        // In the order of the sections, so that the bits do not depend on that of completions.
        let sum: f64 = self
            .sections()
            .map(|section| self.places.sum(section))
            .sum();
        // Exact: the scale is a power of two.
        let norm = sum.sqrt() / self.scale_at(task.step);
        self.last_norm = norm;
        let clip = match self.clip {
            Some(clip) => (clip / (norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        if ending == Ending::Apply {
            self.scaler.saw(norm.is_finite());
        }
        let counts = norm.is_finite() && ending == Ending::Apply;
        let scalars = if counts {
            self.applied += 1;
            self.scalars(task.step, self.applied, clip)
        } else {
            self.skipped += u64::from(ending == Ending::Apply);
            StepScalars::unchanged()
        };
        self.open.of_mut(task.step).scalars = Some(scalars);
        // Early updates counted on a step like this one.
        let stands = counts && clip == 1.0;
        self.ahead.decided(stands);
        if !self.ahead.any() && (stands || !self.any_passing()) {
            self.done(task);
            return Ok(());
        }
        self.resolving = Some(Resolving {
            norm: task,
            stands,
            last: None,
        });
        self.resolve_if_ready()
    }

    /// Whether sections are updated from disk before the norm. Without clipping, that is.
    fn any_passing(&self) -> bool {
        self.sections().any(|section| self.passes(section))
    }

    fn sections(&self) -> impl Iterator<Item = SectionId> + use<> {
        (0..self.model.sections.len() as u32).map(SectionId)
    }

    fn passes(&self, section: SectionId) -> bool {
        self.placement.grad_home(section) == GradHome::Passing
    }

    fn scalars(&self, step: u64, applied: u64, clip: f64) -> StepScalars {
        let lr = self.open.of(step).lr;
        let scale = clip / self.scale_at(step);
        let optimizer = self.updater.optimizer;
        StepScalars {
            decayed: optimizer.at(applied, lr, scale),
            plain: optimizer.without_decay().at(applied, lr, scale),
        }
    }

    /// By what the gradient of a step is multiplied: 1 if the trainer did not ask.
    fn scale_at(&self, step: u64) -> f64 {
        self.open.of(step).loss_scale.unwrap_or(1.0)
    }

    /// By what the step at hand multiplies the gradient of its loss. Where that depends on the norm of the step
    /// before, it is waited for: no update of that step ends before it either.
    pub(super) fn scale_of_step(&mut self) -> Result<f64> {
        if self.pass == Pass::Eval {
            return Ok(1.0);
        }
        let now = self.newest;
        if let Some(known) = self.open.of(now).loss_scale {
            return Ok(known);
        }
        if self.scaler.on() && self.open.of(now).any_whole {
            let what = "the step asks for its loss scale when gradients are whole already: ask for it where the \
                        loss is";
            return Err(Error::Misuse(what.to_owned()));
        }
        if self.scaler.follows_norms() && now > 0 {
            self.wait_until(|engine| engine.open.of(now - 1).scalars.is_some())?;
        }
        let scale = self.scaler.scale();
        self.open.of_mut(now).loss_scale = Some(scale);
        Ok(scale)
    }

    /// Refuses a gradient that would be divided by a scale that it was never multiplied by.
    pub(super) fn check_scaled(&self, ending: Ending) -> Result<()> {
        let asked = self.open.of(self.newest).loss_scale.is_some();
        if self.pass == Pass::Eval || ending == Ending::Discard || !self.scaler.on() || asked {
            return Ok(());
        }
        let what = "the step never asked for its loss scale: multiply the gradient of the loss by \
                    Step::loss_scale, or set Options::loss_scale to none";
        Err(Error::Misuse(what.to_owned()))
    }

    /// What the updates of a step use. Before the norm the step counts as one that will be applied, and not
    /// clipped.
    pub(super) fn step_scalars(&self, step: u64) -> StepScalars {
        let known = self.open.of(step).scalars;
        known.unwrap_or_else(|| self.scalars(step, self.applied + 1, 1.0))
    }

    /// Once what ran ahead of the norm has come through: what it left over is updated. If it does not stand, what
    /// it overwrote is brought back and updated as the norm says; on disk the old extents are made current
    /// again, and the parameters derived from them.
    pub(super) fn resolve_if_ready(&mut self) -> Result<()> {
        let Some(resolving) = self.resolving else {
            return Ok(());
        };
        if let Some(last) = resolving.last {
            return match self.lane_reached(last)? {
                true => self.resolved(resolving),
                false => Ok(()),
            };
        }
        let step = resolving.norm.step;
        if self.ahead.running() || !resolving.stands && self.passing_under_way(step) {
            return Ok(());
        }
        if !resolving.stands {
            self.roll_back()?;
        }
        match self.make_good(resolving.stands) {
            None => self.resolved(resolving),
            last => {
                self.resolving = Some(Resolving { last, ..resolving });
                Ok(())
            }
        }
    }

    fn roll_back(&mut self) -> Result<()> {
        if self.holding {
            self.store.rollback();
            self.holding = false;
        }
        for section in self.sections() {
            let on_disk = self.placement.param_home(section) == Tier::Disk;
            if self.passes(section) && !on_disk {
                self.derive_param(section)?;
            }
        }
        Ok(())
    }

    fn resolved(&mut self, resolving: Resolving) -> Result<()> {
        self.resolving = None;
        self.ahead.over(resolving.stands);
        self.done(resolving.norm);
        Ok(())
    }

    /// Whether updates from disk that run before the norm are not through.
    fn passing_under_way(&self, step: u64) -> bool {
        let plan = Arc::clone(self.scheduler().plan());
        (0..).map(TaskId).zip(plan.tasks()).any(|(id, task)| {
            let early = match task.kind {
                TaskKind::Update(s, _)
                | TaskKind::WriteOptim(s, _)
                | TaskKind::WriteParam(s)
                | TaskKind::PushParam(s) => self.passes(s),
                _ => false,
            };
            early && !self.scheduler().is_done(TaskRef { step, id })
        })
    }
}
