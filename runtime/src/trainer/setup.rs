//! What a trainer is opened with, from options and model: whether they go together, budgets, the placement, and what
//! the store is to hold.

use std::sync::Arc;

use forebay_nvme::{Copies, IoChoice, Item, Layout, Shape, StateKind};
use forebay_prefetch as order;
use forebay_prefetch::{GradHome, Placement, SectionId, Tier, Timing};

use super::dry::Footprint;
use super::engine::key;
use super::options::{Ahead, Moment, Options, Publish, Updates};
use super::{places, rates, update};
use crate::error::{Error, Result};
use crate::machine;
use crate::model::Model;
use crate::tensor::DType;

/// The budgets that a placement can use for a model: what `resident` and `pinned` raise theirs to. Of pinned
/// memory that is more than the least, by the room to undo updates that run ahead of the norm ([`Ahead::Auto`]): with
/// [`Ahead::Never`] it is the least.
///
/// # Errors
/// A model that makes no sense.
pub fn requirements(
    model: &Model,
    footprint: Footprint,
    options: &Options,
) -> Result<order::Budgets> {
    model.validate()?;
    check_optimizer(model.dtype, options)?;
    let order_model = model.order();
    // As much as there could be; far from overflow.
    let most = u64::MAX / 4;
    let budgets = order::Budgets {
        device_bytes: options.device_budget.unwrap_or(most),
        pinned_bytes: options.pinned_budget.unwrap_or(most),
    };
    let placement = place(model, &order_model, footprint, options, budgets)?;
    Ok(order::Budgets {
        device_bytes: placement.device_bytes(),
        pinned_bytes: placement.pinned_bytes(),
    })
}

/// The optimizer and the format of its states, for people; in a generation too.
pub(super) fn states_of(options: &Options) -> String {
    let moments = match (options.optimizer.moments(), options.moments) {
        (0, _) => "no moments",
        (_, Moment::F32) => "fp32 moments",
        (_, Moment::Bf16) => "bf16 moments",
    };
    let master = if options.split_master {
        "split"
    } else {
        "fp32"
    };
    format!(
        "{} with {moments} and {master} masters",
        options.optimizer.name()
    )
}

/// Whether the optimizer can be had on a model that computes in this type.
pub(super) fn check_optimizer(dtype: DType, options: &Options) -> Result<()> {
    let misuse = |what: String| Err(Error::Misuse(what));
    if let Err(what) = options.optimizer.check(options.format()) {
        return misuse(what);
    }
    if options.split_master && dtype != DType::Bf16 {
        return misuse(format!(
            "the split master is for models that compute in bf16; this one computes in {dtype}"
        ));
    }
    if options.split_master && options.updates == Updates::Delayed {
        let what = "delayed updates keep new parameters beside the old ones, and a split master has one of both: \
                    use one or the other";
        return misuse(what.to_owned());
    }
    if options.ahead == Ahead::Always && options.optimizer.log_bytes(options.format(), 1).is_none()
    {
        let name = options.optimizer.name();
        return misuse(format!(
            "{name} cannot update ahead of the norm, for its steps need those of whole tensors; leave Ahead at auto"
        ));
    }
    if options.optimizer.whole_tensors()
        && (options.optimizer_chunk.is_some() || options.partitions > 1)
    {
        return misuse(format!(
            "{} scales whole tensors: leave optimizer_chunk alone, and partitions at 1",
            options.optimizer.name()
        ));
    }
    Ok(())
}

pub(super) fn budgets(options: &Options) -> Result<order::Budgets> {
    if let (Some(device_bytes), Some(pinned_bytes)) = (options.device_budget, options.pinned_budget)
    {
        return Ok(order::Budgets {
            device_bytes,
            pinned_bytes,
        });
    }
    let default = machine::default_budgets(options.target()?);
    Ok(order::Budgets {
        device_bytes: options.device_budget.unwrap_or(default.device_bytes),
        pinned_bytes: options.pinned_budget.unwrap_or(default.pinned_bytes),
    })
}

/// A trainer's placement, with rates measured for it where none were given.
pub(super) fn chosen(
    model: &Model,
    order_model: &order::Model,
    footprint: Footprint,
    options: &Options,
    budgets: order::Budgets,
) -> Result<Placement> {
    let usual = place(model, order_model, footprint, options, budgets)?;
    let Some(rates) = rates::unasked(options, model, footprint, &usual) else {
        return Ok(usual);
    };
    let options = Options {
        rates: Some(rates),
        ..options.clone()
    };
    place(model, order_model, footprint, &options, budgets)
}

fn place(
    model: &Model,
    order_model: &order::Model,
    footprint: Footprint,
    options: &Options,
    budgets: order::Budgets,
) -> Result<Placement> {
    let elements = || order_model.sections.iter().map(|s| s.elements);
    let largest = elements().max().unwrap_or(0);
    let chunk = match options.optimizer_chunk {
        // Whole tensors, and so whole sections.
        _ if options.optimizer.whole_tensors() => largest,
        Some(chunk) => chunk.min(largest),
        None => chunk(elements().sum()).min(largest),
    };
    if let Some(Err(what)) = options.rates.map(|rates| rates.check()) {
        return Err(Error::Misuse(what));
    }
    let (format, timing) = (options.format(), timing(options));
    if timing == Timing::Delayed && options.ahead == Ahead::Always {
        let what = "with delayed updates none runs ahead of the norm, which is known before them; leave Ahead at \
                    auto, or the updates exact";
        return Err(Error::Misuse(what.to_owned()));
    }
    let (undo_log_bytes, undo_grad_bytes) = match options.ahead {
        _ if timing == Timing::Delayed => (0, 0),
        Ahead::Never => (0, 0),
        Ahead::Auto | Ahead::Always => update::undo_room(model, chunk, &options.optimizer, format),
    };
    let place_options = order::PlaceOptions {
        policy: options.placement,
        lookahead: options.lookahead,
        timing,
        chunk_elements: chunk,
        partitions: options.partitions,
        scratch_bytes: places::device_fixed_bytes(footprint),
        pinned_fixed_bytes: places::fixed_bytes(
            footprint,
            model.sections.len(),
            &options.optimizer,
        ),
        undo_log_bytes,
        undo_grad_bytes,
        optim_bytes: format.bytes(),
        split: options.split_master,
        rates: options.rates,
    };
    Ok(order::place(order_model, budgets, &place_options)?)
}

fn timing(options: &Options) -> Timing {
    match (options.updates, options.clip) {
        (Updates::Delayed, _) => Timing::Delayed,
        (Updates::Exact, Some(_)) => Timing::AfterNorm,
        // A split master's old parameters are gone once the new ones stand.
        (Updates::Exact, None) if options.split_master => Timing::AfterNorm,
        (Updates::Exact, None) => Timing::Immediate,
    }
}

/// Elements of a part, from the model alone, so that a store opens under any budget: large enough
/// for disks (1 to 48 MiB of states), small enough that the few on their way are a small part of
/// the whole.
fn chunk(elements: u64) -> u64 {
    (elements / 128).clamp(64 << 10, 4 << 20)
}

/// Everything that the store may hold under a placement, and how it is to hold it.
pub(super) fn disk(
    model: &Model,
    order_model: &order::Model,
    placement: &Placement,
    options: &Options,
) -> (Layout, forebay_nvme::Options) {
    let mut items = Vec::new();
    let bytes = model.dtype.bytes() as u32;
    let format = options.format();
    let moment = match format.moments {
        0 => format.master_bytes() as u32,
        _ => format.moment.bytes() as u32,
    };
    for (id, section) in (0..).map(SectionId).zip(&order_model.sections) {
        let mut add = |state, part, first, elements, components| {
            items.push(Item {
                key: key(id, state, part),
                shape: Shape {
                    first,
                    elements,
                    components,
                    element_bytes: if state == StateKind::Optim {
                        moment
                    } else {
                        bytes
                    },
                    lead_bytes: match state {
                        StateKind::Optim if moment != format.master_bytes() as u32 => {
                            format.master_bytes() as u32
                        }
                        _ => 0,
                    },
                },
                name: section.name.clone(),
            });
        };
        for (index, part) in (0..).zip(placement.parts(id)) {
            // What lives in pinned memory goes to disk with a generation only.
            if part.home == Tier::Disk || options.publish != Publish::Never {
                add(
                    StateKind::Optim,
                    index,
                    part.first,
                    part.elements,
                    1 + format.moments,
                );
            }
        }
        let elements = section.elements;
        let volatile = options.split_master && options.publish != Publish::Never;
        if placement.param_home(id) == Tier::Disk || volatile {
            add(StateKind::Param, 0, 0, elements, 1);
        }
        if placement.grad_home(id) == GradHome::Disk {
            add(StateKind::Grad, 0, 0, elements, 1);
        }
    }
    let name = match model.dtype {
        DType::F32 => model.name.clone(),
        other => format!("{} in {other}", model.name),
    };
    let layout = Layout::new(&name, model.fingerprint(), items);
    let mut store = forebay_nvme::Options::new(options.disk.iter());
    store.medium = Arc::clone(&options.medium);
    let mut tuning = store.tuned();
    if options.io != IoChoice::Auto {
        tuning.io = options.io;
    }
    tuning.throttle = options.disk_throttle;
    store.tuning = Some(tuning);
    store.undo = timing(options) == Timing::Immediate;
    store.copies = match options.publish {
        Publish::Often => Copies::Two,
        Publish::End | Publish::Never => Copies::One,
    };
    // As many writes are under way as there are slabs to write from.
    let pools = placement.pools();
    let slabs = pools.iter().map(|pool| pool.buffers);
    store.slack = slabs.max().unwrap_or(1);
    (layout, store)
}
