//! The rates by which a placement chooses what the device keeps, and what it chose.

use forebay_prefetch::{
    GradHome, Model as Order, PlaceRates, Placement, Policy, Pool, PoolKind, SectionId, StageId,
    Tier,
};

use super::dry::Footprint;
use super::options::Options;
use super::report::Ceilings;
use crate::bench::{adam, kernels, pcie};
use crate::error::Result;
use crate::model::Model;
use crate::target::Target;

/// Parameters over which the optimizer is timed: past the caches. For smaller models nothing is measured.
const ELEMENTS: u64 = 64 << 20;
/// Rows and columns of the product that is timed.
const PRODUCT: usize = 4096;
/// A step's compute beside that of its matrix products at the rate of a large one. Measured on an H200: 158 ms for 84
/// TFLOP of preset 1.3b, at some 700 TFLOP/s.
const ALL_COMPUTE: f64 = 1.35;

impl Ceilings {
    /// What the placement of a model weighs ([`Options::rates`]): these, AdamW on memory past the caches, and a matrix
    /// product for what a step computes by its footprint. Measured in a second or two, with 1.3 GiB of memory and 0.7 GiB
    /// of the GPU's, which are given back. None where there is nothing to choose by them: without a GPU, for
    /// another placement than [`Policy::Auto`], or for a model of less than 64 Mi parameters; and where one of them
    /// is no rate.
    ///
    /// # Errors
    /// Memory, threads or the device refused.
    pub fn rates(
        &self,
        options: &Options,
        model: &Model,
        footprint: Footprint,
    ) -> Result<Option<PlaceRates>> {
        if !chooses(options, model)? {
            return Ok(None);
        }
        let rates = adam::rates(options.threads, ELEMENTS)?;
        // Measured in bf16, bound by memory: states, gradient and parameter pass once.
        let bytes = options.update_bytes(model.dtype);
        let [cpu, cpu_ahead] = rates.map(|rate| rate * adam::BYTES as f64 / bytes as f64);
        let rates = PlaceRates {
            cpu,
            cpu_ahead,
            h2d: self.h2d,
            d2h: self.d2h,
            disk_read: self.disk_read,
            disk_write: self.disk_write,
            // At the rate of its own memory, a tenth of compute at most.
            device_update: f64::INFINITY,
            compute_s: ALL_COMPUTE * footprint.flops as f64
                / kernels::product_rate(model.dtype, PRODUCT)?,
        };
        // A full disk has none.
        Ok(Some(rates).filter(|rates| rates.check().is_ok()))
    }
}

/// Whether a placement has something to choose by rates.
fn chooses(options: &Options, model: &Model) -> Result<bool> {
    let large = options.placement == Policy::Auto && model.elements() >= ELEMENTS;
    Ok(large && options.target()? == Target::Cuda)
}

/// The rates for a trainer to which none were given, where its usual placement leaves the CPU something to update. A
/// machine that cannot be measured is placed for in the usual order.
pub(super) fn unasked(
    options: &Options,
    model: &Model,
    footprint: Footprint,
    usual: &Placement,
) -> Option<PlaceRates> {
    let [here, all] = DeviceKeeps::of(&model.order(), usual).optim;
    // The disk's rates are for the caller to measure.
    let open = options.rates.is_none() && usual.disk_bytes() == 0 && here < all;
    if !open || !chooses(options, model).ok()? {
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
    ceilings.rates(options, model, footprint).ok()?
}

/// What the device has room for, of how much: the rest passes through, or is elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceKeeps {
    /// Bytes of parameters' slots, and of all parameters.
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
        let slots = |pool: &Pool| matches!(pool.kind, PoolKind::ParamSlot | PoolKind::OwnSlot);
        let slots = placement.pools().into_iter().filter(slots);
        keeps.params[0] = slots.map(|pool| pool.buffers * pool.bytes).sum();
        for (id, section) in (0..).map(SectionId).zip(&order.sections) {
            keeps.params[1] += section.param_bytes;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Init, Section};

    #[test]
    fn without_a_gpu_or_a_large_model_nothing_is_measured_and_nothing_chosen() {
        let model = |elements: usize| {
            let mut model = Model::new("one");
            model.section(Section::new("a").tensor("w", [elements], Init::Constant(0.0)));
            model
        };
        let mut options = Options::new([]);
        options.device = crate::DeviceChoice::Host;
        assert!(!chooses(&options, &model(1 << 30)).unwrap());
        let ceilings = Ceilings {
            h2d: 1.0,
            d2h: 1.0,
            disk_read: 1.0,
            disk_write: 1.0,
            adam: 1.0,
        };
        let footprint = Footprint::default();
        let rates = ceilings.rates(&options, &model(1 << 30), footprint);
        assert_eq!(rates.unwrap(), None);
    }

    #[test]
    fn what_the_device_has_room_for_is_said_in_shares() {
        let keeps = DeviceKeeps {
            params: [1, 1],
            checkpoints: [0, 24],
            optim: [3, 8],
        };
        let text = "100 % of the parameters, 0 of 24 checkpoints, 38 % of the optimizer states";
        assert_eq!(keeps.to_string(), text);
    }
}
