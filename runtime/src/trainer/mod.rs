//! The training step on three tiers.

mod ahead;
mod delayed;
mod driver;
mod dry;
mod engine;
mod loss_scale;
mod norm;
mod on_device;
mod options;
mod places;
mod rates;
mod report;
mod scratch;
mod setup;
mod states;
mod step;
mod tasks;
mod telemetry;
mod trace;
mod update;
mod weights;

pub use dry::{Footprint, Pass, footprint};
pub use loss_scale::{DynamicScale, LossScale};
pub use options::{
    Adagrad, AdamW, Ahead, DeviceChoice, ExternalStream, IoChoice, Lamb, Lion, Moment, Optimizer,
    Options, Policy, Publish, Sgd, Target, Updates,
};
pub use rates::DeviceKeeps;
pub use report::{AheadReport, Ceilings, HopReport, PublishCost, Report, TierReport};
pub use setup::requirements;
pub use step::{Finished, Frame, StageLease, Step};
pub use weights::{RandomInit, Weights};

use std::sync::Arc;

use forebay_kernels::cpu::{Binding, Isa, Workers};
use forebay_nvme::Store;
use forebay_pinned::{Arena, Lock};
use forebay_prefetch as order;
use forebay_prefetch::Plan;
use serde::{Deserialize, Serialize};

use crate::device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::queue::{Notifier, WorkQueue};
use ahead::RunAhead;
use engine::{Engine, Parts, Pass as Walk};
use loss_scale::{ScaleState, Scaler};
use places::Places;
use scratch::Scratch;
use setup::{budgets, check_optimizer, chosen, disk, states_of};
use trace::{Shifts, Trace};
use update::Updater;

/// Updates of the optimizer's lane that may wait.
const LANE_DEPTH: usize = 64;

/// A model in training, its states spread over the tiers.
///
/// See the [crate] page for a whole trainer.
#[derive(Debug)]
pub struct Trainer {
    engine: Engine,
    scratch: Scratch,
    model: Arc<Model>,
    budgets: order::Budgets,
    user: String,
    lock: Lock,
    publish: PublishCost,
    /// How the states come to be, and how they are kept.
    states: String,
}

/// The trainer's own part of a generation.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    /// Training steps done.
    steps: u64,
    /// Those that were not skipped.
    applied: u64,
    /// What decides the next loss scale, if norms do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<ScaleState>,
    /// The user's text.
    user: String,
    /// How the states came to be, and how they are kept.
    #[serde(default = "first_states")]
    states: String,
}

/// Those of generations from before there were others.
fn first_states() -> String {
    "adamw with fp32 moments and fp32 masters".to_owned()
}

impl Trainer {
    /// Makes a new model in a new store. Nothing of it is durable before the first
    /// [`Trainer::publish`].
    ///
    /// # Errors
    /// Budgets too small (with the least that works), a disk folder that cannot be used, a store
    /// that is there already, a model that makes no sense.
    pub fn create(
        model: Model,
        footprint: Footprint,
        options: &Options,
        weights: &mut dyn Weights,
    ) -> Result<Self> {
        let mut trainer = Self::open(model, footprint, options, false)?;
        let model = Arc::clone(&trainer.model);
        trainer.engine.initialize(&model.sections, weights)?;
        Ok(trainer)
    }

    /// Goes on from the published generation of a store. Placement, budgets, look-ahead, threads
    /// and folders' names may differ from the run before; the bits of the results do not.
    ///
    /// # Errors
    /// As [`Trainer::create`]; no generation there, another model's, or a damaged one.
    pub fn resume(model: Model, footprint: Footprint, options: &Options) -> Result<Self> {
        if options.publish == Publish::Never {
            let what = "a resumed run that never publishes would write over the generation that it \
                        resumes; publish at the end, or resume a snapshot";
            return Err(Error::Misuse(what.to_owned()));
        }
        let mut trainer = Self::open(model, footprint, options, true)?;
        let store = &trainer.engine.store;
        let meta: Meta = serde_json::from_str(store.meta()).map_err(|e| Error::Generation {
            generation: store.generation(),
            path: store.path().to_owned(),
            what: format!("its trainer's part cannot be read ({e}); start anew elsewhere"),
        })?;
        let (stored, ours) = (meta.states, states_of(options));
        if stored != ours {
            return Err(Error::Generation {
                generation: store.generation(),
                path: store.path().to_owned(),
                what: format!(
                    "its states are of {stored}, and the options say {ours}; resume it as it was made"
                ),
            });
        }
        trainer.engine.steps = meta.steps;
        trainer.engine.applied = meta.applied;
        trainer.engine.scaler.restore(meta.loss_scale);
        trainer.user = meta.user;
        trainer.engine.restore()?;
        Ok(trainer)
    }

    fn open(model: Model, footprint: Footprint, options: &Options, resume: bool) -> Result<Self> {
        let target = options.target()?;
        model.validate()?;
        check_optimizer(model.dtype, options)?;
        let scaler = Scaler::new(options.loss_scale, model.dtype)?;
        let order_model = model.order();
        let budgets = budgets(options)?;
        let placement = chosen(&model, &order_model, footprint, options, budgets)?;
        let train = Arc::new(Plan::training(&order_model, &placement)?);
        let model = Arc::new(model);
        // Before anything is made that would be left behind.
        let trace = options.trace.as_deref();
        let trace = trace
            .map(|path| Trace::new(path, &model, &train, options.threads))
            .transpose()?;
        let (store_layout, store_options) = disk(&model, &order_model, &placement, options);
        let notifier = Arc::new(Notifier::default());
        let arena = Arena::new(placement.pinned_bytes())?;
        let mut device = device::open(target, placement.device_bytes(), &notifier, options.stream)?;
        device.pin(&arena)?;
        let places = Places::take(
            &order_model,
            &placement,
            footprint,
            device.memory(),
            &arena,
            &options.optimizer,
        )?;
        let undo = (0..placement.undo_buffers()).map(|_| arena.lease(placement.undo_slab_bytes()));
        let undo = undo.collect::<Result<Vec<_>, _>>()?;
        let open = if resume { Store::open } else { Store::create };
        let store = open(&arena, &store_layout, &store_options)?;
        let workers = Workers::new(options.threads, "fb-adam")
            .map_err(Error::system("starting the optimizer's threads"))?;
        // All that is undone in a step may wait besides.
        let depth = LANE_DEPTH + placement.undo_buffers() as usize;
        let lane = WorkQueue::new("fb-optimizer", depth, Arc::clone(&notifier))
            .map_err(Error::system("starting the optimizer's lane"))?;
        let shifts = trace.as_ref().map(|_| Shifts::new(&workers, &train));
        let binding = if options.bind_threads {
            workers.bind(lane.thread())
        } else {
            Binding::Free
        };
        let scratch = Scratch::new(places.scratch);
        let lock = arena.lock().clone();
        let cost = PublishCost {
            space: [Publish::Often, Publish::End, Publish::Never].map(|publish| {
                let options = Options {
                    publish,
                    ..options.clone()
                };
                let (layout, options) = disk(&model, &order_model, &placement, &options);
                Store::space(&layout, &options)
            }),
            bytes: placement.volatile_bytes(),
        };
        let engine = Engine::new(Parts {
            train,
            eval: Plan::evaluation(&order_model, &placement)?,
            flush: Plan::flush(&order_model, &placement)?,
            model: Arc::clone(&model),
            updater: Updater {
                workers,
                binding,
                shifts,
                isa: Isa::best(),
                optimizer: options.optimizer,
                format: options.format(),
            },
            device,
            clip: options.clip,
            scaler,
            publish: options.publish,
            ahead: RunAhead::new(options.ahead, undo),
            trace,
            placement,
            store,
            arena,
            places,
            lane,
            notifier,
        });
        Ok(Self {
            engine,
            scratch,
            model,
            budgets,
            user: String::new(),
            lock,
            publish: cost,
            states: states_of(options),
        })
    }

    /// Begins a training step at this learning rate. What can be fetched is fetched at once.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn begin(&mut self, lr: f64) -> Result<Step<'_>> {
        let begun = self.engine.begin(Walk::Train, lr);
        self.engine.sticky(begun)?;
        Ok(Step::new(
            &mut self.engine,
            &mut self.scratch,
            &self.model,
            &self.model.train,
        ))
    }

    /// Begins a forward pass without gradients. Updates under way are waited for, as [`Trainer::settle`] does.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn eval(&mut self) -> Result<Step<'_>> {
        self.settle()?;
        let begun = self.engine.begin(Walk::Eval, 0.0);
        self.engine.sticky(begun)?;
        Ok(Step::new(
            &mut self.engine,
            &mut self.scratch,
            &self.model,
            &self.model.eval,
        ))
    }

    /// Waits until all updates and writes are done, with [`Updates::Delayed`] those of the newest gradient too.
    ///
    /// # Errors
    /// The first of their failures.
    pub fn settle(&mut self) -> Result<()> {
        let settled = self.engine.settle();
        self.engine.sticky(settled)
    }

    /// Makes all states durable as a new generation, with a text of the user's own (a schedule, a
    /// data position), settled as by [`Trainer::settle`]. Returns its number.
    ///
    /// # Errors
    /// The disk's failure; the generation before stands then. [`Error::Misuse`] under
    /// [`Publish::Never`].
    pub fn publish(&mut self, user: &str) -> Result<u64> {
        if self.engine.publish == Publish::Never {
            let what = "this run was opened never to publish; open it with another Publish";
            return Err(Error::Misuse(what.to_owned()));
        }
        self.settle()?;
        let Engine { steps, applied, .. } = self.engine;
        let meta = Meta {
            steps,
            applied,
            loss_scale: self.engine.scaler.state(),
            user: user.to_owned(),
            states: self.states.clone(),
        };
        let text = serde_json::to_string(&meta).map_err(|e| Error::Misuse(e.to_string()))?;
        let published = self.engine.publish(&text);
        user.clone_into(&mut self.user);
        self.engine.sticky(published)
    }

    /// Training steps done, those of earlier runs included.
    pub fn steps(&self) -> u64 {
        self.engine.steps
    }

    /// By what the next step is to multiply the gradient of its loss, as far as norms are known by now; nothing
    /// without [loss scaling](Options::loss_scale).
    pub fn loss_scale(&self) -> Option<f64> {
        let scaler = &self.engine.scaler;
        scaler.on().then(|| scaler.scale())
    }

    /// The global norm of the newest gradient whose norm is known, before clipping and without the loss scale.
    pub fn grad_norm(&self) -> f64 {
        self.engine.last_norm
    }

    /// Steps skipped because a gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.engine.skipped
    }

    /// The number of the published generation; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.engine.store.generation()
    }

    /// The user's text in the opened or last published generation.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Budgets, peaks, bytes and times so far.
    pub fn report(&self) -> Report {
        report::report(self)
    }
}

/// The user's text in the newest generation of a store, without opening the store: a run reads its
/// own recipe from it before it resumes.
///
/// # Errors
/// No generation there, or a damaged one.
pub fn stored_user_text(path: &std::path::Path) -> Result<String> {
    let (generation, meta) = Store::peek(path, &forebay_nvme::Folders)?;
    let meta: Meta = serde_json::from_str(&meta).map_err(|e| Error::Generation {
        generation,
        path: path.to_owned(),
        what: format!("its trainer's part cannot be read ({e}); start anew elsewhere"),
    })?;
    Ok(meta.user)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_names_no_optimizer_is_of_the_first_one() {
        let meta: Meta = serde_json::from_str(r#"{"steps":3,"applied":2,"user":""}"#).unwrap();
        assert_eq!(meta.states, states_of(&Options::new([])));
    }
}
