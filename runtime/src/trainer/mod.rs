//! The training step on three tiers.

mod driver;
mod dry;
mod engine;
mod options;
mod places;
mod report;
mod scratch;
mod states;
mod step;
mod tasks;
mod telemetry;
mod update;
mod weights;

pub use dry::{Footprint, Pass, footprint};
pub use options::{AdamW, DeviceChoice, IoChoice, Options, Policy};
pub use report::{Ceilings, HopReport, Report, TierReport};
pub use step::{Finished, Frame, StageLease, Step};
pub use weights::{RandomInit, Weights};

use std::sync::Arc;

use forebay_kernels::cpu::{Isa, Workers};
use forebay_nvme::{Layout, StateKind, Store};
use forebay_pinned::{Arena, Lock};
use forebay_prefetch as order;
use forebay_prefetch::{GradHome, Placement, Plan, SectionId, Tier, Timing};
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::device::host::HostDevice;
use crate::error::{Error, Result};
use crate::machine;
use crate::model::Model;
use crate::queue::{Notifier, WorkQueue};
use crate::tensor::DType;
use engine::{Engine, Parts, key};
use places::Places;
use scratch::Scratch;
use update::Optimizer;

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
}

/// The trainer's own part of a generation.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    /// Training steps done.
    steps: u64,
    /// Those that were not skipped.
    applied: u64,
    /// The user's text.
    user: String,
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
        let mut trainer = Self::open(model, footprint, options, true)?;
        let store = &trainer.engine.store;
        let meta: Meta = serde_json::from_str(store.meta()).map_err(|e| Error::Generation {
            generation: store.generation(),
            path: store.path().to_owned(),
            what: format!("its trainer's part cannot be read ({e}); start anew elsewhere"),
        })?;
        trainer.engine.steps = meta.steps;
        trainer.engine.applied = meta.applied;
        trainer.user = meta.user;
        trainer.engine.restore()?;
        Ok(trainer)
    }

    fn open(model: Model, footprint: Footprint, options: &Options, resume: bool) -> Result<Self> {
        options.device.check()?;
        model.validate()?;
        let order_model = model.order(DType::F32);
        let budgets = budgets(options)?;
        let placement = place(&order_model, footprint, options, budgets)?;
        let store_layout = layout(&model, &order_model, &placement);
        let notifier = Arc::new(Notifier::default());
        let device = HostDevice::new(placement.device_bytes(), options.threads, &notifier)?;
        let arena = Arena::new(placement.pinned_bytes())?;
        let places = Places::take(&order_model, &placement, footprint, device.memory(), &arena)?;
        let mut store_options = forebay_nvme::Options::new(options.disk.iter());
        store_options.io = options.io;
        store_options.throttle = options.disk_throttle;
        store_options.undo = options.clip.is_none();
        let open = if resume { Store::open } else { Store::create };
        let store = open(&arena, &store_layout, &store_options)?;
        let workers = Workers::new(options.threads, "fb-adam")
            .map_err(Error::system("starting the optimizer's threads"))?;
        let lane = WorkQueue::new("fb-optimizer", LANE_DEPTH, Arc::clone(&notifier))
            .map_err(Error::system("starting the optimizer's lane"))?;
        let model = Arc::new(model);
        let scratch = Scratch::new(places.scratch);
        let lock = arena.lock().clone();
        let engine = Engine::new(Parts {
            train: Plan::training(&order_model, &placement)?,
            eval: Plan::evaluation(&order_model, &placement)?,
            model: Arc::clone(&model),
            optimizer: Optimizer {
                workers,
                isa: Isa::best(),
            },
            device: Box::new(device),
            adam: options.optimizer,
            clip: options.clip,
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
        })
    }

    /// Begins a training step at this learning rate. What can be fetched is fetched at once.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn begin(&mut self, lr: f64) -> Result<Step<'_>> {
        let begun = self.engine.begin(Pass::Train, lr);
        self.engine.sticky(begun)?;
        Ok(Step::new(
            &mut self.engine,
            &mut self.scratch,
            &self.model,
            &self.model.train,
        ))
    }

    /// Begins a forward pass without gradients. Updates under way are waited for.
    ///
    /// # Errors
    /// If an earlier step failed.
    pub fn eval(&mut self) -> Result<Step<'_>> {
        self.settle()?;
        let begun = self.engine.begin(Pass::Eval, 0.0);
        self.engine.sticky(begun)?;
        Ok(Step::new(
            &mut self.engine,
            &mut self.scratch,
            &self.model,
            &self.model.eval,
        ))
    }

    /// Waits until all updates and writes are done.
    ///
    /// # Errors
    /// The first of their failures.
    pub fn settle(&mut self) -> Result<()> {
        let settled = self.engine.settle();
        self.engine.sticky(settled)
    }

    /// Makes all states durable as a new generation, with a text of the user's own (a schedule, a
    /// data position). Returns its number.
    ///
    /// # Errors
    /// The disk's failure; the generation before stands then.
    pub fn publish(&mut self, user: &str) -> Result<u64> {
        self.settle()?;
        let Engine { steps, applied, .. } = self.engine;
        let meta = Meta {
            steps,
            applied,
            user: user.to_owned(),
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

    /// The global norm of the newest gradient whose norm is known, before clipping.
    pub fn grad_norm(&self) -> f64 {
        self.engine.last_norm
    }

    /// Steps skipped because a gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.engine.skipped
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

/// The budgets that `policy` needs for a model: what `resident` and `pinned` raise theirs to.
///
/// # Errors
/// A model that makes no sense.
pub fn requirements(
    model: &Model,
    footprint: Footprint,
    options: &Options,
) -> Result<order::Budgets> {
    model.validate()?;
    let order_model = model.order(DType::F32);
    // As much as there could be; far from overflow.
    let most = u64::MAX / 4;
    let budgets = order::Budgets {
        device_bytes: options.device_budget.unwrap_or(most),
        pinned_bytes: options.pinned_budget.unwrap_or(most),
    };
    let placement = place(&order_model, footprint, options, budgets)?;
    Ok(order::Budgets {
        device_bytes: placement.device_bytes(),
        pinned_bytes: placement.pinned_bytes(),
    })
}

/// The user's text in the newest generation of a store, without opening the store: a run reads its
/// own recipe from it before it resumes.
///
/// # Errors
/// No generation there, or a damaged one.
pub fn stored_user_text(path: &std::path::Path) -> Result<String> {
    let (generation, meta) = forebay_nvme::Store::peek(path)?;
    let meta: Meta = serde_json::from_str(&meta).map_err(|e| Error::Generation {
        generation,
        path: path.to_owned(),
        what: format!("its trainer's part cannot be read ({e}); start anew elsewhere"),
    })?;
    Ok(meta.user)
}

fn budgets(options: &Options) -> Result<order::Budgets> {
    let default = machine::default_budgets();
    Ok(order::Budgets {
        device_bytes: options.device_budget.unwrap_or(default.device_bytes),
        pinned_bytes: options.pinned_budget.unwrap_or(default.pinned_bytes),
    })
}

fn place(
    model: &order::Model,
    footprint: Footprint,
    options: &Options,
    budgets: order::Budgets,
) -> Result<Placement> {
    let elements = || model.sections.iter().map(|s| s.elements);
    let largest = elements().max().unwrap_or(0);
    let place_options = order::PlaceOptions {
        policy: options.placement,
        lookahead: options.lookahead,
        timing: if options.clip.is_some() {
            Timing::AfterNorm
        } else {
            Timing::Immediate
        },
        chunk_elements: options
            .optimizer_chunk
            .unwrap_or_else(|| chunk(elements().sum()))
            .min(largest),
        scratch_bytes: footprint.scratch_bytes,
        pinned_fixed_bytes: places::fixed_bytes(footprint),
    };
    Ok(order::place(model, budgets, &place_options)?)
}

/// Elements of a part, from the model alone, so that a store opens under any budget: large enough
/// for disks (1 to 48 MiB of states), small enough that the few on their way are a small part of
/// the whole.
fn chunk(elements: u64) -> u64 {
    (elements / 128).clamp(64 << 10, 4 << 20)
}

/// Everything that the store may hold under a placement.
fn layout(model: &Model, order_model: &order::Model, placement: &Placement) -> Layout {
    let mut extents = Vec::new();
    for (id, section) in (0..).map(SectionId).zip(&order_model.sections) {
        let mut add = |state, part, bytes| {
            extents.push((key(id, state, part), bytes, section.name.clone()));
        };
        for (index, part) in (0..).zip(placement.parts(id)) {
            add(StateKind::Optim, index, 12 * part.elements);
        }
        if placement.param_home(id) == Tier::Disk {
            add(StateKind::Param, 0, section.param_bytes);
        }
        if placement.grad_home(id) == GradHome::Disk {
            add(StateKind::Grad, 0, section.param_bytes);
        }
    }
    Layout::new(&model.name, model.fingerprint(), extents)
}
