//! Budgets that are too small are refused, with the least that works; and that works.
#![allow(clippy::unwrap_used)]

mod common;

use common::{create, decoder, options, step};
use forebay::Policy;

#[test]
fn a_budget_one_page_below_the_least_is_refused_with_the_least() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder();
    let mut options = options(folder.path());
    options.placement = Policy::Disk;
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let refused = |options: &forebay::Options| {
        let model = decoder.model().clone();
        let seed = &mut forebay::RandomInit { seed: 1 };
        forebay::Trainer::create(model, footprint, options, seed)
            .unwrap_err()
            .to_string()
    };
    let least = |text: &str| -> u64 {
        let words: Vec<&str> = text.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "least").unwrap();
        words[at + 1].parse().unwrap()
    };
    (options.device_budget, options.pinned_budget) = (Some(1), Some(1 << 30));
    let device = least(&refused(&options));
    (options.device_budget, options.pinned_budget) = (Some(device), Some(1));
    let pinned = least(&refused(&options));
    options.pinned_budget = Some(pinned - 1);
    assert!(refused(&options).contains("--pinned-budget"));
    options.pinned_budget = Some(pinned);
    let mut trainer = create(&decoder, &options);
    step(&mut trainer, &decoder);
}
