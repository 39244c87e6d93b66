//! The rates by which a placement chooses what the device keeps, and what it chose.

use forebay_prefetch::{
    GradHome, Model as Order, PlaceRates, Placement, Policy, SectionId, StageId, Tier,
};

use super::options::Options;
use super::report::Ceilings;
use crate::bench::{adam, pcie};
use crate::error::Result;
use crate::model::Model;
use crate::target::Target;

/// Parameters over which the optimizer is timed: past the caches. For smaller models nothing is measured unasked.
const ELEMENTS: u64 = 64 << 20;

impl Ceilings {
    /// What the placement of a model weighs ([`Options::rates`]): these, and AdamW on as much memory as the model's
    /// states take, but at most 1.3 GiB, which are given back. That takes half a second. Of the device nothing is
    /// known yet.
    ///
    /// # Errors
    /// Memory or threads refused.
    pub fn rates(&self, options: &Options, model: &Model) -> Result<PlaceRates> {
        let rates = adam::rates(options.threads, model.elements().min(ELEMENTS))?;
        // Measured in bf16, bound by memory.
        let bytes = 24 + 2 * model.dtype.bytes() as u64;
        let [cpu, cpu_ahead] = rates.map(|rate| rate * adam::BYTES as f64 / bytes as f64);
        Ok(PlaceRates {
            cpu,
            cpu_ahead,
            h2d: self.h2d,
            d2h: self.d2h,
            disk_read: self.disk_read,
            disk_write: self.disk_write,
            device_update: f64::INFINITY,
            compute_s: 0.0,
        })
    }
}

/// The rates of a GPU's machine, where there is something to choose and nobody gave them. A machine that cannot be
/// measured is placed for in the usual order.
pub(super) fn wanted(
    options: &Options,
    target: Target,
    model: &Model,
    usual: &Placement,
) -> Option<PlaceRates> {
    let open = options.rates.is_none() && options.placement == Policy::Auto;
    let large = target == Target::Cuda && model.elements() >= ELEMENTS;
    // The disk's rates are for the caller to measure.
    if !open || !large || usual.disk_bytes() > 0 {
        return None;
    }
    let [here, all] = DeviceKeeps::of(&model.order(), usual).optim;
    if here == all {
        return None;
    }
    let (h2d, d2h) = pcie::gpu_rates().ok()?;
    // So slow that no choice goes there.
    let disk = 1.0;
    let ceilings = Ceilings {
        h2d,
        d2h,
        disk_read: disk,
        disk_write: disk,
        adam: 0.0,
    };
    ceilings.rates(options, model).ok()
}

/// What the device keeps from step to step, of how much: the rest passes through, or is elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceKeeps {
    /// Elements whose parameters stay, and all.
    pub params: [u64; 2],
    /// Activation checkpoints that wait there, and all.
    pub checkpoints: [u64; 2],
    /// Elements whose optimizer states stay, and all that are trained.
    pub optim: [u64; 2],
}

impl DeviceKeeps {
    pub(super) fn of(order: &Order, placement: &Placement) -> Self {
        let mut keeps = Self::default();
        let add = |to: &mut [u64; 2], amount, here| {
            to[0] += amount * u64::from(here);
            to[1] += amount;
        };
        for (id, section) in (0..).map(SectionId).zip(&order.sections) {
            add(&mut keeps.params, section.elements, placement.resident(id));
            if order.stages.iter().any(|stage| stage.grads.contains(&id)) {
                let here = placement.grad_home(id) == GradHome::Device;
                add(&mut keeps.optim, section.elements, here);
            }
        }
        for stage in (0..order.stages.len() as u32).map(StageId) {
            if let Some(home) = placement.act_home(stage) {
                add(&mut keeps.checkpoints, 1, home == Tier::Device);
            }
        }
        keeps
    }
}

impl std::fmt::Display for DeviceKeeps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let share = |[here, all]: [u64; 2]| 100.0 * here as f64 / all.max(1) as f64;
        write!(
            f,
            "{:.0} % of the parameters, {} of {} checkpoints, {:.0} % of the optimizer states",
            share(self.params),
            self.checkpoints[0],
            self.checkpoints[1],
            share(self.optim)
        )
    }
}
