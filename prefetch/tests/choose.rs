//! What the device keeps, chosen by measured rates.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use forebay_prefetch::*;
use proptest::prelude::*;

/// Preset 1.3b in bf16 for 8 sequences of 1,024 tokens, tied.
fn large() -> Model {
    let layer = 4 * 2048 * 2048 + 3 * 2048 * 5504 + 2 * 2048;
    let embed = 50_304 * 2048;
    let mut model = gathering(decoder(24, 4 * layer, 4 * embed, true, 8192 * 2048 * 2));
    model.sections[1].elements = 2048;
    for section in &mut model.sections {
        section.param_bytes = 2 * section.elements;
        section.grad_slot_bytes = 6 * section.elements;
    }
    model
}

/// As measured beside an H200.
const H200: PlaceRates = PlaceRates {
    cpu: 4.9e9,
    cpu_ahead: 3.9e9,
    h2d: 55e9,
    d2h: 55e9,
    disk_read: 2e9,
    disk_write: 2e9,
    device_update: 1e11,
    compute_s: 0.158,
};

fn large_options(rates: Option<PlaceRates>) -> PlaceOptions {
    let chunk = 4 << 20;
    PlaceOptions {
        chunk_elements: chunk,
        scratch_bytes: 877_199_616,
        undo_log_bytes: chunk * 42 / 10,
        undo_grad_bytes: 2 * chunk,
        rates,
        ..Default::default()
    }
}

fn gib(device: u64) -> Budgets {
    Budgets {
        device_bytes: device << 30,
        pinned_bytes: 64 << 30,
    }
}

/// A step on a simulator that knows nothing of how the choice was made: compute as the GPU's trace shows it.
fn step(model: &Model, placement: &Placement) -> SimReport {
    let seconds = |stage: &StageSpec| match stage.name.as_str() {
        "forward" => 1.6e-3,
        "backward" => 4.6e-3,
        "head" => 8.6e-3,
        _ => 0.2e-3,
    };
    let rates = Rates {
        stage_seconds: model.stages.iter().map(seconds).collect(),
        h2d: H200.h2d,
        d2h: H200.d2h,
        disk_read: H200.disk_read,
        disk_write: H200.disk_write,
        cpu: H200.cpu,
        cpu_ahead: H200.cpu_ahead,
        device_update: H200.device_update,
    };
    let plan = Arc::new(Plan::training(model, placement).unwrap());
    let report = simulate(plan, &rates, 12, 0);
    validate(model, placement, &report, 12).unwrap();
    report
}

/// Sections whose states, and whose parameters, the device keeps, and checkpoints.
fn kept(model: &Model, placement: &Placement) -> [usize; 3] {
    let sections = || (0..model.sections.len() as u32).map(SectionId);
    let stages = (0..model.stages.len() as u32).map(StageId);
    [
        sections()
            .filter(|s| placement.grad_home(*s) == GradHome::Device)
            .count(),
        sections().filter(|s| placement.resident(*s)).count(),
        stages
            .filter(|s| placement.act_home(*s) == Some(Tier::Device))
            .count(),
    ]
}

#[test]
fn a_larger_budget_is_never_predicted_slower_and_the_choice_never_loses_to_the_usual_order() {
    let model = large();
    let mut least = f64::INFINITY;
    println!(
        "GPU GiB | usual ms | states, params, checkpoints | chosen ms | states, params, checkpoints"
    );
    for budget in 5..=28 {
        let placed = |rates| place(&model, gib(budget), &large_options(rates)).unwrap();
        let [usual, chosen] = [None, Some(H200)].map(placed);
        assert!(chosen.device_bytes() <= gib(budget).device_bytes);
        let [before, after] = [&usual, &chosen].map(|placement| step(&model, placement));
        let ms = |report: &SimReport| report.step_seconds * 1e3;
        println!(
            "{budget:>7} | {:>8.1} | {:?} | {:>9.1} | {:?}",
            ms(&before),
            kept(&model, &usual),
            ms(&after),
            kept(&model, &chosen)
        );
        assert!(after.step_seconds <= before.step_seconds * (1.0 + 1e-9));
        // Copies take of the memory that the rest works on; see `choose`.
        let copies = |lane| after.busy[lane as usize];
        let weighed = after.step_seconds + 0.125 * (copies(Lane::H2d) + copies(Lane::D2h));
        // Beyond what the CPU hides, the GPU's own updates add half a percent at most.
        assert!(
            weighed < 1.005 * least,
            "{weighed} at {budget} GiB, {least} with less"
        );
        least = least.min(weighed);
        if (5..=13).contains(&budget) {
            assert!(
                after.step_seconds < 0.93 * before.step_seconds,
                "{budget} GiB"
            );
        }
    }
}

#[test]
fn what_binds_decides_what_the_device_keeps() {
    let model = large();
    let with = |rates| {
        kept(
            &model,
            &place(&model, gib(12), &large_options(Some(rates))).unwrap(),
        )
    };
    let usual = kept(
        &model,
        &place(&model, gib(12), &large_options(None)).unwrap(),
    );
    let [states, params, acts] = with(H200);
    assert!(
        states > usual[0] && params < usual[1],
        "{states}, {params}, {acts}"
    );
    // A CPU that keeps up, behind a slow link.
    let link = PlaceRates {
        cpu: 4e10,
        cpu_ahead: 4e10,
        h2d: 12e9,
        d2h: 12e9,
        ..H200
    };
    assert_eq!(with(link), usual);
    // Compute hides all the rest; ties are the usual order's.
    let slow = PlaceRates {
        compute_s: 3.0,
        ..H200
    };
    assert_eq!(with(slow), usual);
    // It need not be known exactly, but it must be known.
    let about = |part| {
        with(PlaceRates {
            compute_s: part * H200.compute_s,
            device_update: f64::INFINITY,
            ..H200
        })
    };
    assert!(about(0.7)[0] > usual[0] && about(1.2)[0] > usual[0]);
    assert_eq!(about(0.0), usual);
    // Rates that are no rates do no harm.
    for nonsense in [0.0, 1e-12, f64::INFINITY, f64::NAN] {
        with(PlaceRates {
            cpu: nonsense,
            cpu_ahead: nonsense,
            h2d: nonsense,
            d2h: nonsense,
            disk_read: nonsense,
            disk_write: nonsense,
            device_update: nonsense,
            compute_s: 1.0,
        });
    }
}

#[test]
fn rates_that_make_no_sense_are_named_and_those_next_to_nothing_do_no_harm() {
    H200.check().unwrap();
    for wrong in [0.0, -1.0, f64::NAN] {
        let what = PlaceRates { d2h: wrong, ..H200 }.check().unwrap_err();
        assert!(
            what.contains("d2h") && what.contains("more than 0"),
            "{what}"
        );
    }
    for compute_s in [-1.0, f64::INFINITY, f64::NAN] {
        PlaceRates { compute_s, ..H200 }.check().unwrap_err();
    }
    // No bound looks at this one.
    let cpu_ahead = 1e-300;
    let rates = PlaceRates { cpu_ahead, ..H200 };
    rates.check().unwrap();
    place(&large(), gib(8), &large_options(Some(rates))).unwrap();
}

#[test]
fn only_auto_chooses_and_only_with_rates() {
    let model = large();
    let placed = |policy, rates| {
        let options = PlaceOptions {
            policy,
            ..large_options(rates)
        };
        let placement = place(&model, gib(12), &options).unwrap();
        (kept(&model, &placement), placement.pools())
    };
    for policy in [Policy::Resident, Policy::Pinned, Policy::Disk] {
        assert_eq!(placed(policy, Some(H200)), placed(policy, None));
    }
    assert_eq!(placed(Policy::Pinned, Some(H200)).0[0], 0);
    assert_ne!(placed(Policy::Auto, Some(H200)), placed(Policy::Auto, None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_chosen_plan_ends_within_its_pools_and_on_the_right_versions(
        layers in 1u32..9, tied: bool, gather: bool, layer in 1u64..40, embed in 0u64..60,
        lookahead in 0u32..5, immediate: bool, split: bool, device in 0u64..100, pinned in 0u64..100,
        seed in 1u64.., speeds in prop::array::uniform4(0u32..4),
    ) {
        let embed = if embed == 0 { layer } else { embed };
        let model = decoder(layers, layer * 16384, embed * 16384, tied, 8192);
        let model = if gather { gathering(model) } else { model };
        let timing = if immediate && !split { Timing::Immediate } else { Timing::AfterNorm };
        let usual = PlaceOptions { split, ..options(Policy::Auto, lookahead, timing) };
        let least = least(&model, &usual);
        let most = place(&model, ALL, &usual).unwrap();
        let device_bytes = least.device_bytes + (most.device_bytes() - least.device_bytes) * device / 100;
        let with = |pinned_bytes, options| place(&model, Budgets { device_bytes, pinned_bytes }, options);
        let floor = match with(0, &usual).unwrap_err() {
            Error::PinnedBudget { least, .. } => least,
            other => return Err(TestCaseError::fail(other.to_string())),
        };
        let most = with(ALL.pinned_bytes, &usual).unwrap().pinned_bytes();
        let pinned_bytes = floor + most.saturating_sub(floor) * pinned / 90;
        let speed = speeds.map(|s| 10f64.powi(s as i32 + 6));
        let rates = PlaceRates {
            cpu: speed[3],
            cpu_ahead: 0.8 * speed[3],
            h2d: speed[1],
            d2h: speed[1],
            disk_read: speed[2],
            disk_write: speed[2],
            device_update: 1e9,
            compute_s: 1e5 / speed[0],
        };
        let options = PlaceOptions { rates: Some(rates), ..usual };
        let placement = with(pinned_bytes, &options).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(placement.device_bytes() <= device_bytes);
        prop_assert!(placement.pinned_bytes() <= pinned_bytes);
        let rates = common::rates(&model, 1.0 / speed[0] * 1e5, speed[1], speed[2]);
        let plan = Arc::new(Plan::training(&model, &placement).unwrap());
        let report = simulate(plan, &rates, 3, seed);
        validate(&model, &placement, &report, 3).map_err(TestCaseError::fail)?;
        simulate(Arc::new(Plan::evaluation(&model, &placement).unwrap()), &rates, 3, seed);
    }
}
