//! `forebay bench`: what this machine can do, and what Forebay takes of it.

mod adam;
mod kernels;
mod nvme;
mod pcie;
mod step;

use forebay::nvme::bench::Interval;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Measure what the machine can do, and what Forebay takes of it
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Bench {
    Adam(adam::Adam),
    Kernels(kernels::Kernels),
    Nvme(nvme::Nvme),
    Pcie(pcie::Pcie),
    Step(step::Step),
}

impl Bench {
    pub(crate) fn run(&self) -> Result<(), String> {
        match self {
            Self::Adam(adam) => adam.run(),
            Self::Kernels(kernels) => kernels.run(),
            Self::Nvme(nvme) => nvme.run(),
            Self::Pcie(pcie) => pcie.run(),
            Self::Step(step) => step.run(),
        }
    }
}

/// Runs `work`, showing what it says that it does.
fn with_progress<T>(work: impl FnOnce(&mut dyn FnMut(&str)) -> T) -> T {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{elapsed} {msg}") {
        bar.set_style(style);
    }
    let result = work(&mut |what| {
        bar.set_message(what.to_owned());
        bar.tick();
    });
    bar.finish_and_clear();
    result
}

fn interval(i: &Interval) -> String {
    format!("{:.3} ({:.3} to {:.3})", i.median, i.low, i.high)
}

fn array(i: &Interval) -> serde_json::Value {
    json!([i.median, i.low, i.high])
}
