//! Plans of random models under random budgets, run by the simulator and checked by a validator
//! that knows nothing of how plans are built: it follows versions of the data.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;

use forebay_prefetch::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// A decoder-shaped model: an embedding tied to the head or not, layers, a norm.
fn decoder(layers: u32, layer_bytes: u64, embed_bytes: u64, tied: bool, act: u64) -> Model {
    let section = |name: String, bytes: u64| SectionSize {
        name,
        elements: bytes / 4,
        param_bytes: bytes,
        grad_slot_bytes: bytes,
    };
    let mut sections = vec![
        section("embed".into(), embed_bytes),
        section("norm".into(), 4096),
    ];
    sections.extend((0..layers).map(|i| section(format!("layer {i}"), layer_bytes)));
    let head = if tied {
        SectionId(0)
    } else {
        sections.push(section("head".into(), embed_bytes));
        SectionId(layers + 2)
    };
    let stage = |name: &str, params: Vec<SectionId>| StageSpec {
        name: name.into(),
        params,
        ..Default::default()
    };
    let mut stages = vec![stage("embed", vec![SectionId(0)])];
    for i in 0..layers {
        stages.push(StageSpec {
            saves: Some(act),
            ..stage("forward", vec![SectionId(i + 2)])
        });
    }
    let eval = {
        let mut eval = stages.clone();
        eval.iter_mut().for_each(|s| s.saves = None);
        eval.push(stage("head", vec![SectionId(1), head]));
        eval
    };
    let both = vec![SectionId(1), head];
    stages.push(StageSpec {
        grads: both.clone(),
        ..stage("head", both)
    });
    for i in (0..layers).rev() {
        stages.push(StageSpec {
            grads: vec![SectionId(i + 2)],
            restores: Some(StageId(i + 1)),
            ..stage("backward", vec![SectionId(i + 2)])
        });
    }
    stages.push(StageSpec {
        grads: vec![SectionId(0)],
        ..stage("embed backward", vec![])
    });
    Model {
        sections,
        stages,
        eval,
    }
}

fn options(policy: Policy, lookahead: u32, timing: Timing) -> PlaceOptions {
    PlaceOptions {
        policy,
        lookahead,
        timing,
        chunk_elements: 1 << 16,
        ..Default::default()
    }
}

const ALL: Budgets = Budgets {
    device_bytes: u64::MAX / 4,
    pinned_bytes: u64::MAX / 4,
};

fn least(model: &Model, options: &PlaceOptions) -> Budgets {
    let device = match place(
        model,
        Budgets {
            device_bytes: 0,
            ..ALL
        },
        options,
    )
    .unwrap_err()
    {
        Error::DeviceBudget { least, .. } => least,
        other => panic!("{other}"),
    };
    let budgets = Budgets {
        device_bytes: device,
        pinned_bytes: 0,
    };
    match place(model, budgets, options).unwrap_err() {
        Error::PinnedBudget { least, .. } => Budgets {
            device_bytes: device,
            pinned_bytes: least,
        },
        other => panic!("{other}"),
    }
}

/// Follows what each task would read and write, by version: the number of updates in it.
fn validate(
    model: &Model,
    placement: &Placement,
    report: &SimReport,
    steps: u64,
) -> Result<(), String> {
    let plan = &report.plan;
    let mut times: HashMap<TaskRef, (f64, f64)> = HashMap::new();
    for event in &report.trace {
        if times.insert(event.task, (event.start, event.end)).is_some() {
            return Err(format!("{:?} ran twice", event.kind));
        }
    }
    if times.len() as u64 != steps * plan.tasks().len() as u64 {
        return Err(format!("{} tasks ran", times.len()));
    }
    let find = |kind: TaskKind, step: u64| {
        let id = plan.tasks().iter().position(|t| t.kind == kind)?;
        times
            .get(&TaskRef {
                step,
                id: TaskId(id as u32),
            })
            .copied()
    };
    let before = |a: Option<(f64, f64)>, b: Option<(f64, f64)>, what: &str| match (a, b) {
        (Some(a), Some(b)) if a.1 > b.0 => Err(format!("{what}: ends {} starts {}", a.1, b.0)),
        _ => Ok(()),
    };
    for step in 0..steps {
        for (index, uses) in plan.stages().iter().enumerate() {
            let stage = StageId(index as u32);
            let compute = find(TaskKind::Compute(stage), step);
            for (section, source) in &uses.params {
                let parts = placement.parts(*section).len() as u32;
                if let ParamSource::Fetched(slot) = source {
                    let fetched = times[&TaskRef {
                        step,
                        id: slot.task,
                    }];
                    before(
                        Some(fetched),
                        compute,
                        "computes before its parameters are there",
                    )?;
                }
                // The version: all updates of the step before, brought home, come first.
                let uses_of = |kind| plan.tasks().iter().any(|t| t.kind == kind);
                for part in 0..parts {
                    let update =
                        (step > 0).then(|| find(TaskKind::Update(*section, part), step - 1));
                    before(
                        update.flatten(),
                        compute,
                        "computes on parameters not yet updated",
                    )?;
                    if uses_of(TaskKind::FetchParam(*section)) {
                        let fetch = find(TaskKind::FetchParam(*section), step);
                        before(
                            update.flatten(),
                            fetch,
                            "fetches parameters not yet updated",
                        )?;
                    }
                    let mine = find(TaskKind::Update(*section, part), step);
                    before(
                        compute,
                        mine,
                        "updates parameters that are still to be used",
                    )?;
                }
                for kind in [
                    TaskKind::PushParam(*section),
                    TaskKind::WriteParam(*section),
                ] {
                    let settled = (step > 0).then(|| find(kind, step - 1)).flatten();
                    before(
                        settled,
                        compute,
                        "computes before the new parameters came home",
                    )?;
                    if matches!(kind, TaskKind::WriteParam(_)) {
                        let read = find(TaskKind::ReadParam(*section), step);
                        before(settled, read, "reads parameters before they were written")?;
                    }
                }
            }
            if let Some(saver) = model.stages[index].restores {
                before(
                    find(TaskKind::RestoreAct(saver), step),
                    compute,
                    "computes before restore",
                )?;
                let saved = find(TaskKind::SaveAct(saver), step);
                before(
                    saved,
                    find(TaskKind::RestoreAct(saver), step),
                    "restores before saving",
                )?;
            }
            for section in &model.stages[index].grads {
                let out = find(TaskKind::GradOut(*section), step);
                before(compute, out, "takes a gradient that is not whole")?;
                let summed = find(TaskKind::GradNorm(*section), step);
                before(compute, summed, "sums a gradient that is not whole")?;
            }
        }
        let norm = find(TaskKind::Norm, step);
        for section in (0..model.sections.len() as u32).map(SectionId) {
            let out = find(TaskKind::GradOut(section), step);
            let summed = find(TaskKind::GradNorm(section), step);
            before(out, summed, "sums a gradient that is not there")?;
            before(summed, norm, "the norm lacks a section")?;
            for part in 0..placement.parts(section).len() as u32 {
                let update = find(TaskKind::Update(section, part), step);
                before(summed, update, "updates before the gradient is there")?;
                if plan.timing() == Timing::AfterNorm {
                    before(norm, update, "updates before the norm")?;
                }
                before(
                    find(TaskKind::ReadOptim(section, part), step),
                    update,
                    "no states",
                )?;
                before(
                    update,
                    find(TaskKind::WriteOptim(section, part), step),
                    "old states",
                )?;
                let earlier =
                    (step > 0).then(|| find(TaskKind::WriteOptim(section, part), step - 1));
                let read = find(TaskKind::ReadOptim(section, part), step);
                before(
                    earlier.flatten(),
                    read,
                    "reads states before they were written",
                )?;
            }
        }
    }
    // No extent is under way twice at once.
    let mut disk: Vec<_> = report
        .trace
        .iter()
        .filter_map(|e| {
            let extent = match e.kind {
                TaskKind::ReadParam(s) | TaskKind::WriteParam(s) => (s, 0, 0),
                TaskKind::ReadGrad(s) | TaskKind::SpillGrad(s) => (s, 1, 0),
                TaskKind::ReadOptim(s, p) | TaskKind::WriteOptim(s, p) => (s, 2, p),
                _ => return None,
            };
            Some((extent, e.start, e.end))
        })
        .collect();
    disk.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    for pair in disk.windows(2) {
        if pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1 {
            return Err(format!("{:?} is under way twice", pair[0].0));
        }
    }
    for (pool, peak) in plan.pools().iter().zip(&report.peaks) {
        if *peak as u64 > pool.buffers {
            return Err(format!("{:?} held {peak} of {}", pool.kind, pool.buffers));
        }
    }
    Ok(())
}

fn rates(model: &Model, compute: f64, link: f64, disk: f64) -> Rates {
    let stage_seconds = vec![compute; model.stages.len()];
    Rates {
        stage_seconds,
        h2d: link,
        d2h: link,
        disk_read: disk,
        disk_write: disk,
        cpu: 1e12,
        device_update: 1e11,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_plan_ends_within_its_pools_and_on_the_right_versions(
        layers in 1u32..9, tied: bool, layer in 1u64..40, embed in 1u64..60,
        lookahead in 0u32..5, immediate: bool, policy in 0usize..4,
        device in 0u64..100, pinned in 0u64..100, seed in 1u64.., speeds in prop::array::uniform3(0u32..4),
    ) {
        let model = decoder(layers, layer * 16384, embed * 16384, tied, 8192);
        let timing = if immediate { Timing::Immediate } else { Timing::AfterNorm };
        let policy = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk][policy];
        let options = options(policy, lookahead, timing);
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
        simulate(eval, &rates, 3, seed);
    }

    #[test]
    fn the_least_budgets_in_errors_are_exact(
        layers in 1u32..9, tied: bool, layer in 1u64..40, lookahead in 0u32..5, immediate: bool,
        policy in 0usize..4,
    ) {
        let model = decoder(layers, layer * 16384, 50_000 * 4, tied, 8192);
        let timing = if immediate { Timing::Immediate } else { Timing::AfterNorm };
        let policy = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk][policy];
        let options = options(policy, lookahead, timing);
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
        device_update: f64::INFINITY,
    };
    let bound = bound(&plan, &rates);
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

fn least_device(least: Budgets) -> Budgets {
    Budgets {
        device_bytes: least.device_bytes,
        ..ALL
    }
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
    assert!(broken(|m| m.eval[0].grads.push(SectionId(0))).contains("no gradients"));
    assert!(broken(|m| m.sections[0].elements = 0).contains("empty"));
}
