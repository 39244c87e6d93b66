//! Plans of random models under random budgets, run by the simulator and checked by a validator
//! that knows nothing of how plans are built.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use forebay_prefetch::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_plan_ends_within_its_pools_and_on_the_right_versions(
        layers in 1u32..9, tied: bool, gather: bool, layer in 1u64..40, embed in 0u64..60,
        lookahead in 0u32..5, immediate: bool, split: bool, chunk in 12u32..17, policy in 0usize..4,
        device in 0u64..100, pinned in 0u64..100, seed in 1u64.., speeds in prop::array::uniform3(0u32..4),
    ) {
        // Of a size of its own, or sharing slots with the layers.
        let embed = if embed == 0 { layer } else { embed };
        let model = decoder(layers, layer * 16384, embed * 16384, tied, 8192);
        let model = if gather { gathering(model) } else { model };
        let timing = if immediate && !split { Timing::Immediate } else { Timing::AfterNorm };
        let policy = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk][policy];
        let chunk_elements = 1 << chunk;
        let undo_log_bytes = 4 << chunk;
        let options = PlaceOptions {
            split, chunk_elements, undo_log_bytes, ..options(policy, lookahead, timing)
        };
        let least = least(&model, &options);
        let most = place(&model, ALL, &options).unwrap();
        let between = |least: u64, most: u64, part: u64| least + most.saturating_sub(least) * part / 90;
        let device_bytes = between(least.device_bytes, most.device_bytes(), device);
        // What pinned memory must hold depends on what the device holds.
        let with = |pinned_bytes| place(&model, Budgets { device_bytes, pinned_bytes }, &options);
        let least = match with(0).unwrap_err() {
            Error::PinnedBudget { least, .. } => least,
            other => return Err(TestCaseError::fail(other.to_string())),
        };
        let most = with(ALL.pinned_bytes).unwrap().pinned_bytes();
        let budgets = Budgets { device_bytes, pinned_bytes: between(least, most, pinned) };
        let placement = with(budgets.pinned_bytes).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(placement.device_bytes() <= budgets.device_bytes);
        prop_assert!(placement.pinned_bytes() <= budgets.pinned_bytes);
        let speed = speeds.map(|s| 10f64.powi(s as i32 + 6));
        let rates = rates(&model, 1.0 / speed[0] * 1e5, speed[1], speed[2]);
        let plan = Arc::new(Plan::training(&model, &placement).unwrap());
        let report = simulate(Arc::clone(&plan), &rates, 3, seed);
        validate(&model, &placement, &report, 3).map_err(TestCaseError::fail)?;
        prop_assert_eq!(&simulate(plan, &rates, 3, seed).trace, &report.trace, "same seed, same trace");
        let eval = Arc::new(Plan::evaluation(&model, &placement).unwrap());
        prop_assert_eq!(in_place(&eval), in_place(&report.plan));
        simulate(eval, &rates, 3, seed);
    }

    #[test]
    fn the_least_budgets_in_errors_are_exact(
        layers in 1u32..9, tied: bool, gather: bool, layer in 1u64..40, lookahead in 0u32..5,
        immediate: bool, split: bool, policy in 0usize..4,
    ) {
        let model = decoder(layers, layer * 16384, 50_000 * 4, tied, 8192);
        let model = if gather { gathering(model) } else { model };
        let timing = if immediate && !split { Timing::Immediate } else { Timing::AfterNorm };
        let policy = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk][policy];
        let options = PlaceOptions { split, ..options(policy, lookahead, timing) };
        let least = least(&model, &options);
        prop_assert!(place(&model, least, &options).is_ok());
        let less = Budgets { device_bytes: least.device_bytes - 1, ..least };
        prop_assert!(place(&model, less, &options).is_err());
        let less = Budgets { pinned_bytes: least.pinned_bytes - 1, ..least };
        prop_assert!(place(&model, less, &options).is_err());
    }
}

/// Optimizer states on disk, parameters and checkpoints streaming over the link, and compute, link
/// and disk equally busy. A backward stage takes two forward stages.
fn balanced(lookahead: u32, timing: Timing) -> (SimReport, Bound) {
    let model = decoder(24, MIB, 64 << 10, true, MIB);
    let options = options(Policy::Auto, lookahead, timing);
    let device_bytes = least(&model, &options).device_bytes + 5 * MIB;
    // The least pinned memory with which all parameters live there.
    let placement = (0..)
        .map(|n| Budgets {
            device_bytes,
            pinned_bytes: n * MIB / 2,
        })
        .filter_map(|budgets| place(&model, budgets, &options).ok())
        .find(|p| (0..26).all(|s| p.param_home(SectionId(s)) != Tier::Disk))
        .unwrap();
    let on_disk = (0..26).flat_map(|s| placement.parts(SectionId(s)).iter());
    assert!(on_disk.clone().filter(|p| p.home == Tier::Disk).count() * 10 > on_disk.count() * 9);
    let plan = Plan::training(&model, &placement).unwrap();
    let traffic = Traffic::of(&plan);
    let weight = |s: &StageSpec| if s.grads.is_empty() { 1.0 } else { 2.0 };
    let all: f64 = model.stages.iter().map(weight).sum();
    let rates = Rates {
        stage_seconds: model.stages.iter().map(|s| weight(s) / all).collect(),
        h2d: traffic.h2d as f64,
        d2h: traffic.h2d as f64,
        disk_read: (traffic.disk_read + traffic.disk_write) as f64,
        disk_write: (traffic.disk_read + traffic.disk_write) as f64,
        cpu: 4.0 * traffic.updated as f64,
        cpu_ahead: 3.0 * traffic.updated as f64,
        device_update: f64::INFINITY,
    };
    let bound = bound(&plan, &rates, false);
    (simulate(plan.into(), &rates, 20, 0), bound)
}

#[test]
fn with_balanced_compute_link_and_disk_a_step_takes_what_the_slowest_takes() {
    let (report, bound) = balanced(2, Timing::Immediate);
    assert!(
        (bound.compute - 1.0).abs() < 1e-6 && (bound.disk - 1.0).abs() < 1e-6,
        "{bound:?}"
    );
    assert!(
        (bound.link - 1.0).abs() < 1e-6 && bound.seconds < 1.0 + 1e-6,
        "{bound:?}"
    );
    let ratio = report.step_seconds / bound.seconds;
    assert!(
        (1.0 - 1e-6..=1.15).contains(&ratio),
        "step / bound = {ratio}"
    );
    // The same with look-ahead off: the test can fail.
    let (report, bound) = balanced(0, Timing::Immediate);
    let ratio = report.step_seconds / bound.seconds;
    assert!(ratio > 1.5, "without look-ahead: {ratio}");
}

#[test]
fn after_the_norm_a_step_is_near_its_own_bound() {
    let (report, bound) = balanced(2, Timing::AfterNorm);
    let ratio = report.step_seconds / bound.seconds;
    assert!(
        (1.0 - 1e-6..=1.15).contains(&ratio),
        "step / bound = {ratio}, {bound:?}"
    );
}

#[test]
fn where_the_optimizer_binds_updates_run_ahead_of_the_norm() {
    let model = decoder(24, MIB, 64 << 10, true, MIB);
    let step = |ahead: bool, room: u64| {
        let options = options(Policy::Pinned, 2, Timing::AfterNorm);
        let without = PlaceOptions {
            undo_log_bytes: 0,
            ..options
        };
        let options = if ahead { options } else { without };
        let most = place(&model, ALL, &without).unwrap();
        let budgets = Budgets {
            pinned_bytes: most.pinned_bytes() + room,
            ..ALL
        };
        let placement = place(&model, budgets, &options).unwrap();
        assert!(placement.pinned_bytes() <= budgets.pinned_bytes);
        let plan = Plan::training(&model, &placement).unwrap();
        let weight = |s: &StageSpec| if s.grads.is_empty() { 1.0 } else { 2.0 };
        let all: f64 = model.stages.iter().map(weight).sum();
        let updated = Traffic::of(&plan).updated as f64;
        let rates = Rates {
            stage_seconds: model.stages.iter().map(|s| weight(s) / all).collect(),
            cpu: updated / 2.0,
            // Half as slow again.
            cpu_ahead: updated / 3.0,
            ..Rates::equal(1e12)
        };
        let bounds = [false, true].map(|ahead| bound(&plan, &rates, ahead).seconds);
        let report = simulate(plan.into(), &rates, 20, 0);
        validate(&model, &placement, &report, 20).unwrap();
        (report.step_seconds, bounds)
    };
    // Backward takes 2 / 3 of a second and all updates 2.
    let (alone, bounds) = step(false, 64 * MIB);
    assert!((bounds[0] - 8.0 / 3.0).abs() < 0.02 && bounds[1] == bounds[0]);
    assert!((bounds[0]..1.02 * bounds[0]).contains(&alone), "{alone}");
    // Ahead of the norm two thirds of a second do the work of four ninths: 2.22 at best.
    let (ahead, all) = step(true, 64 * MIB);
    assert!(
        all[0] == bounds[0] && (all[1] - 2.0).abs() < 1e-6,
        "{all:?}"
    );
    assert!((2.22..2.32).contains(&ahead), "{ahead}");
    // With room for a few only, something is gained.
    let (some, few) = step(true, 2 * MIB);
    assert!(few[1] < all[0] && few[1] > all[1], "{few:?}");
    assert!(some < alone - 0.05 && some > ahead + 0.05, "{some}");
}

#[test]
fn resident_states_move_nothing_but_gradients_and_new_parameters() {
    let model = decoder(4, MIB, MIB, false, 4096);
    let options = options(Policy::Resident, 2, Timing::AfterNorm);
    let bytes: u64 = model.sections.iter().map(|s| s.param_bytes).sum();
    let moved = |budgets: Budgets| {
        let placement = place(&model, budgets, &options).unwrap();
        assert!(placement.device_bytes() <= budgets.device_bytes);
        let traffic = Traffic::of(&Plan::training(&model, &placement).unwrap());
        assert_eq!((traffic.disk_read, traffic.disk_write), (0, 0));
        assert_eq!(traffic.updated, bytes / 4);
        (traffic.h2d, traffic.d2h)
    };
    let least = least(&model, &options);
    assert_eq!(moved(least_device(least)), (bytes, bytes));
    // With room for the optimizer too, nothing leaves the device.
    assert_eq!(moved(ALL), (0, 0));
    // And with room for a part of it, the rest does.
    let states = 3 * bytes;
    let half = Budgets {
        device_bytes: least.device_bytes + states / 2,
        ..ALL
    };
    let (h2d, d2h) = moved(half);
    assert!(
        h2d == d2h && (bytes / 4..bytes * 3 / 4).contains(&h2d),
        "{h2d}"
    );
}

#[test]
fn states_on_disk_move_24_bytes_an_element() {
    let model = decoder(4, MIB, MIB, false, 4096);
    let placement = place(&model, ALL, &options(Policy::Disk, 2, Timing::Immediate)).unwrap();
    let elements: u64 = model.sections.iter().map(|s| s.elements).sum();
    let plan = Plan::training(&model, &placement).unwrap();
    let states = |lane| -> u64 {
        let of = |t: &&Task| matches!(t.kind, TaskKind::ReadOptim(..) | TaskKind::WriteOptim(..));
        plan.tasks()
            .iter()
            .filter(of)
            .filter(|t| t.lane == lane)
            .map(|t| t.amount)
            .sum()
    };
    assert_eq!(
        (states(Lane::DiskRead), states(Lane::DiskWrite)),
        (12 * elements, 12 * elements)
    );
}

#[test]
fn the_validator_notices_a_trace_that_is_out_of_order() {
    let model = decoder(3, MIB, MIB, true, 4096);
    let placement = place(&model, ALL, &options(Policy::Disk, 2, Timing::AfterNorm)).unwrap();
    let plan = Arc::new(Plan::training(&model, &placement).unwrap());
    let good = simulate(plan, &rates(&model, 0.01, 1e9, 1e8), 3, 0);
    assert_eq!(validate(&model, &placement, &good, 3), Ok(()));
    let planted: [fn(&TaskKind) -> bool; 4] = [
        |k| matches!(k, TaskKind::FetchParam(_)),
        |k| matches!(k, TaskKind::Update(..)),
        |k| matches!(k, TaskKind::ReadOptim(..)),
        |k| matches!(k, TaskKind::GradOut(_)),
    ];
    for early in planted {
        let mut bad = good.clone();
        let event = bad.trace.iter_mut().rfind(|e| early(&e.kind)).unwrap();
        (event.start, event.end) = (0.0, 1e-9);
        // A fetch that ends late is as bad as one that starts early.
        if matches!(event.kind, TaskKind::FetchParam(_)) {
            event.end = 1e9;
        }
        assert!(
            validate(&model, &placement, &bad, 3).is_err(),
            "{:?} moved",
            event_kind(&bad, early)
        );
    }
}

fn event_kind(report: &SimReport, pick: fn(&TaskKind) -> bool) -> TaskKind {
    report.trace.iter().rfind(|e| pick(&e.kind)).unwrap().kind
}

#[test]
fn stages_that_make_no_sense_are_refused() {
    let model = decoder(2, MIB, MIB, true, 4096);
    let broken = |change: fn(&mut Model)| {
        let mut model = model.clone();
        change(&mut model);
        model.validate().unwrap_err().to_string()
    };
    assert!(broken(|m| m.stages[0].params.push(SectionId(99))).contains("does not exist"));
    assert!(broken(|m| m.stages[1].restores = Some(StageId(4))).contains("no checkpoint before"));
    assert!(broken(|m| m.stages[0].saves = Some(1)).contains("no later stage"));
    assert!(broken(|m| m.stages.last_mut().unwrap().params.push(SectionId(3))).contains("whole"));
    let late = broken(|m| m.stages.last_mut().unwrap().gathers.push(SectionId(3)));
    assert!(late.contains("whole"));
    assert!(broken(|m| m.eval[0].gathers.push(SectionId(99))).contains("does not exist"));
    let both = broken(|m| m.stages[0].gathers.push(SectionId(0)));
    assert!(both.contains("'embed' in its params and in its gathers"));
    assert!(broken(|m| m.eval[0].grads.push(SectionId(0))).contains("no gradients"));
    assert!(broken(|m| m.sections[0].elements = 0).contains("empty"));
}

#[test]
fn what_waits_for_old_parameters_from_disk_has_no_room_to_be_undone() {
    let model = decoder(6, 10 * 16384, 10 * 16384, true, 8192);
    let chunk = 1 << 12;
    let options = PlaceOptions {
        split: true,
        chunk_elements: chunk,
        undo_log_bytes: 4 * chunk,
        ..options(Policy::Auto, 2, Timing::AfterNorm)
    };
    let device_bytes = least(&model, &options).device_bytes;
    let with = |pinned_bytes| {
        let budgets = Budgets {
            device_bytes,
            pinned_bytes,
        };
        place(&model, budgets, &options)
    };
    let least = match with(0) {
        Err(Error::PinnedBudget { least, .. }) => least,
        other => panic!("{other:?}"),
    };
    let most = with(ALL.pinned_bytes).unwrap().pinned_bytes();
    let (mut wait, mut run) = (0, 0);
    for part in 0..400 {
        let placement = with(least + (most - least) * part / 400).unwrap();
        let plan = Plan::training(&model, &placement).unwrap();
        let tasks = || plan.tasks().iter();
        let gated = tasks().filter(|t| t.window == Window::Norm);
        assert!(gated.clone().all(|t| t.param.is_none()));
        assert!(plan.undo_buffers() <= gated.count() as u64);
        // States in pinned memory, and parameters on disk.
        wait += tasks()
            .filter(|t| t.param.is_some() && t.states.is_none())
            .count();
        run += plan.undo_buffers();
    }
    assert!(wait > 0 && run > 0, "{wait} wait, {run} run ahead");
}
