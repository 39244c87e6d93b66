//! Sections that stages only gather rows from: where they live, and when they are read there.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use forebay_prefetch::*;

#[test]
fn a_table_that_is_only_gathered_from_is_read_in_pinned_memory_and_never_copied_to_the_device() {
    let table = 8 * MIB;
    let whole = decoder(4, MIB, table, false, 4096);
    let rows = gathering(whole.clone());
    for (policy, timing) in [
        (Policy::Pinned, Timing::AfterNorm),
        (Policy::Auto, Timing::AfterNorm),
        (Policy::Auto, Timing::Immediate),
    ] {
        let options = options(policy, 2, timing);
        // Room for a slot that the table and the head share, or for the head's alone.
        let budgets = least_device(least(&whole, &options));
        assert_eq!(least(&rows, &options).device_bytes, budgets.device_bytes);
        let h2d = |model: &Model, gathered: bool| {
            let placement = place(model, budgets, &options).unwrap();
            let plan = Plan::training(model, &placement).unwrap();
            assert_eq!(in_place(&plan), gathered);
            Traffic::of(&plan).h2d
        };
        assert_eq!(h2d(&whole, false) - h2d(&rows, true), table);
    }
    // With a size of its own the table would stay on the device, and be copied there in every step.
    let mut whole = whole;
    let head = whole.sections.last_mut().unwrap();
    (head.elements, head.param_bytes, head.grad_slot_bytes) = (MIB, 4 * MIB, 4 * MIB);
    let rows = gathering(whole.clone());
    let options = options(Policy::Auto, 2, Timing::AfterNorm);
    let [with, without] = [&whole, &rows].map(|model| least(model, &options));
    assert_eq!(with.device_bytes - without.device_bytes, table);
    assert_eq!(without.pinned_bytes - with.pinned_bytes, table);
    // Where the device has room for its optimizer states too, it lives there with them.
    let placement = place(&rows, ALL, &options).unwrap();
    assert_eq!(placement.grad_home(SectionId(0)), GradHome::Device);
    assert!(placement.resident(SectionId(0)));
    // One that is never updated needs room for itself alone.
    let mut frozen = rows.clone();
    frozen.stages.last_mut().unwrap().grads.clear();
    let little = Budgets {
        device_bytes: least(&frozen, &options).device_bytes + table + 16 * MIB,
        ..ALL
    };
    let placed = [&rows, &frozen].map(|model| place(model, little, &options).unwrap());
    assert_eq!(placed.map(|p| p.resident(SectionId(0))), [false, true]);
    // What room the device has then, too little for its states, is used where pinned memory is short.
    let short = Budgets {
        device_bytes: with.device_bytes + 22 * MIB,
        pinned_bytes: 40 * MIB,
    };
    let placement = place(&rows, short, &options).unwrap();
    assert!(placement.resident(SectionId(0)) && placement.disk_bytes() > 0);
    let enough = Budgets {
        pinned_bytes: 140 * MIB,
        ..short
    };
    let placement = place(&rows, enough, &options).unwrap();
    assert!(!placement.resident(SectionId(0)) && placement.disk_bytes() == 0);
}

#[test]
fn a_table_that_a_later_stage_needs_whole_is_gathered_from_before_it_is_fetched() {
    let model = gathering(decoder(4, MIB, MIB, true, 4096));
    let options = options(Policy::Pinned, 2, Timing::AfterNorm);
    let placement = place(&model, least_device(least(&model, &options)), &options).unwrap();
    let plan = Plan::training(&model, &placement).unwrap();
    assert!(in_place(&plan));
    let head = &plan.stages()[5].params;
    assert!(
        head.iter()
            .any(|(s, p)| *s == SectionId(0) && matches!(p, ParamSource::Fetched(_)))
    );
    // The fetch may run ahead of the gather, but not of the update, on however slow a CPU.
    let stage = |gathers, params, grads| StageSpec {
        gathers,
        params,
        grads,
        ..Default::default()
    };
    let [a, b] = [0, 1].map(|id| vec![SectionId(id)]);
    let few = Model {
        sections: model.sections[2..4].to_vec(),
        stages: vec![
            stage(a.clone(), vec![], vec![]),
            stage(vec![], a.clone(), a),
            stage(vec![], b.clone(), b),
        ],
        eval: vec![],
    };
    let few_placed = place(&few, least_device(least(&few, &options)), &options).unwrap();
    let plan = Arc::new(Plan::training(&few, &few_placed).unwrap());
    assert!(in_place(&plan));
    let mut rates = rates(&few, 0.01, 1e9, 1e8);
    rates.cpu = 1e6;
    let report = simulate(plan, &rates, 3, 0);
    assert_eq!(validate(&few, &few_placed, &report, 3), Ok(()));
    // On disk it is fetched for the gather too.
    let options = self::options(Policy::Disk, 2, Timing::AfterNorm);
    let placement = place(&model, least_device(least(&model, &options)), &options).unwrap();
    assert!(!in_place(&Plan::training(&model, &placement).unwrap()));
}

#[test]
fn the_validator_notices_a_table_that_is_read_in_place_before_it_is_updated() {
    let model = gathering(decoder(3, MIB, MIB / 2, false, 4096));
    let options = options(Policy::Pinned, 2, Timing::AfterNorm);
    let placement = place(&model, least_device(least(&model, &options)), &options).unwrap();
    let plan = Arc::new(Plan::training(&model, &placement).unwrap());
    assert!(in_place(&plan));
    let good = simulate(plan, &rates(&model, 0.01, 1e9, 1e8), 3, 0);
    assert_eq!(validate(&model, &placement, &good, 3), Ok(()));
    let gathers = |e: &&SimEvent| e.kind == TaskKind::Compute(StageId(0)) && e.task.step == 1;
    let start = good.trace.iter().find(gathers).unwrap().start;
    let mut planted = 0;
    for (index, event) in good.trace.iter().enumerate() {
        // The update before ends too late, or that of its own step starts too early.
        let (step, time) = (event.task.step, start);
        if matches!(event.kind, TaskKind::Update(SectionId(0), _)) && step < 2 {
            let mut bad = good.clone();
            let moved = &mut bad.trace[index];
            (moved.start, moved.end) = match step {
                0 => (moved.start, time + 1e-9),
                _ => (time, moved.end),
            };
            let error = validate(&model, &placement, &bad, 3).unwrap_err();
            assert!(error.contains("parameters"), "{error}");
            planted += 1;
        }
    }
    assert!(planted >= 2, "{planted}");
}
