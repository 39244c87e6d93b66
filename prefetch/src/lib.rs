//! Forebay's order: what moves when, as pure values and state machines.
//!
//! Nothing here does I/O, has a thread, a clock or `unsafe`. A [`Model`] says what there is, a
//! [`Placement`] where it lives under given budgets, a [`Plan`] which tasks a step consists of and
//! what each waits for, and a [`Scheduler`] is told what completed and answers what to start. The
//! engine drives it with real completions, [`simulate`] with a clock of its own, and [`bound`]
//! says how fast a step could be at best.
//!
//! ```
//! use forebay_prefetch::*;
//!
//! let layer = |name: &str| SectionSize { name: name.into(), elements: 1 << 20, param_bytes: 4 << 20, grad_slot_bytes: 4 << 20 };
//! let stage = |name: &str, s| StageSpec { name: name.into(), params: vec![SectionId(s)], ..Default::default() };
//! let backward = |name: &str, s| StageSpec { grads: vec![SectionId(s)], ..stage(name, s) };
//! let model = Model {
//!     sections: vec![layer("a"), layer("b")],
//!     stages: vec![stage("a", 0), stage("b", 1), backward("b'", 1), backward("a'", 0)],
//!     eval: vec![],
//! };
//! let budgets = Budgets { device_bytes: 16 << 20, pinned_bytes: 48 << 20 };
//! let placement = place(&model, budgets, &PlaceOptions::default())?;
//! let plan = Plan::training(&model, &placement)?;
//! let rates = Rates { stage_seconds: vec![0.01; 4], ..Rates::equal(1e9) };
//! let report = simulate(plan.into(), &rates, 10, 0);
//! assert!(report.step_seconds >= bound(&report.plan, &rates, false).seconds);
//! # Ok::<(), Error>(())
//! ```
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod bound;
mod build;
mod error;
mod keeps;
mod model;
mod parts;
mod placement;
mod plan;
mod scheduler;
mod sim;

pub use bound::{Bound, Rates, Traffic, bound};
pub use error::Error;
pub use model::{Model, SectionId, SectionSize, StageId, StageSpec, State, Tier, Timing};
pub use parts::Part;
pub use placement::{Budgets, GradHome, PlaceOptions, PlaceRates, Placement, Policy, place};
pub use plan::{
    ClaimRef, Dep, GradUse, LANES, Lane, Order, ParamSource, Plan, Pool, PoolId, PoolKind,
    StageUses, Task, TaskId, TaskKind, Window,
};
pub use scheduler::{LetGo, Scheduler, TaskRef};
pub use sim::{SimEvent, SimReport, simulate};
