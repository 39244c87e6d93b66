//! Plans whose updates come a step late: of random models under random budgets, checked by a validator that
//! knows nothing of how plans are built; and what they gain where the optimizer binds.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{ALL, MIB, decoder, gathering, least, options, rates};
use forebay_prefetch::*;
use proptest::prelude::*;

type Span = (f64, f64);

/// The times of a run's tasks, by kind and step; several of a kind where a step has several.
struct Times(HashMap<(TaskKind, u64), Vec<Span>>);

impl Times {
    fn of(report: &SimReport) -> Self {
        let mut times: HashMap<_, Vec<Span>> = HashMap::new();
        for event in &report.trace {
            let all = times.entry((event.kind, event.task.step)).or_default();
            all.push((event.start, event.end));
        }
        Self(times)
    }

    fn all(&self, kind: TaskKind, step: u64) -> &[Span] {
        self.0.get(&(kind, step)).map_or(&[], Vec::as_slice)
    }

    /// That every task of a kind and step ends before any of another starts.
    fn before(&self, a: (TaskKind, u64), b: (TaskKind, u64)) -> Result<(), String> {
        for first in self.all(a.0, a.1) {
            for second in self.all(b.0, b.1) {
                if first.1 > second.0 {
                    return Err(format!(
                        "{a:?} ends {} and {b:?} starts {}",
                        first.1, second.0
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Follows what each task reads and writes: which gradient is in a place, and which parameters a stage sees.
fn validate(
    model: &Model,
    placement: &Placement,
    report: &SimReport,
    steps: u64,
) -> Result<(), String> {
    let plan = &report.plan;
    if report.trace.len() as u64 != steps * plan.tasks().len() as u64 {
        return Err(format!("{} tasks ran", report.trace.len()));
    }
    let times = Times::of(report);
    let sections = (0..model.sections.len() as u32).map(SectionId);
    for section in sections.filter(|s| model.stages.iter().any(|m| m.grads.contains(s))) {
        let updates = |kind: fn(SectionId, u32) -> TaskKind| {
            let parts = 0..placement.parts(section).len() as u32;
            parts.map(move |part| kind(section, part))
        };
        // All that reads the section's parameters in a step.
        let mut reads = vec![TaskKind::ReadParam(section), TaskKind::FetchParam(section)];
        for (index, uses) in plan.stages().iter().enumerate() {
            let own = |(s, source): &(SectionId, ParamSource)| {
                *s == section && !matches!(source, ParamSource::Fetched(_))
            };
            if uses.params.iter().any(own) {
                reads.push(TaskKind::Compute(StageId(index as u32)));
            }
        }
        let settles = [
            TaskKind::PushParam(section),
            TaskKind::WriteParam(section),
            TaskKind::SwapParam(section),
        ];
        let on_device = placement.grad_home(section) == GradHome::Device;
        let settled = settles.iter().any(|kind| !times.all(*kind, 0).is_empty());
        if settled == on_device {
            return Err(format!("{section:?} is brought home {settled}"));
        }
        for step in 0..steps {
            let now = |kind| (kind, step);
            // The stage that ends the gradient, and what takes the gradient away.
            let last = model
                .stages
                .iter()
                .rposition(|s| s.grads.contains(&section))
                .unwrap();
            let whole = now(TaskKind::Compute(StageId(last as u32)));
            times.before(whole, now(TaskKind::GradNorm(section)))?;
            times.before(now(TaskKind::GradNorm(section)), now(TaskKind::Norm))?;
            times.before(
                now(TaskKind::GradNorm(section)),
                now(TaskKind::GradOut(section)),
            )?;
            times.before(
                now(TaskKind::GradOut(section)),
                now(TaskKind::SpillGrad(section)),
            )?;
            for update in updates(TaskKind::Update) {
                if times.all(update, step).len() != 1 {
                    return Err(format!(
                        "{update:?} ran {} times",
                        times.all(update, step).len()
                    ));
                }
                // The old gradient's place is the new one's only behind what the old one is for.
                let next = if on_device {
                    TaskKind::GradNorm
                } else {
                    TaskKind::GradOut
                };
                times.before(now(update), now(next(section)))?;
                times.before(now(TaskKind::ReadGrad(section)), now(update))?;
                for settle in settles {
                    times.before(now(update), now(settle))?;
                    times.before(now(settle), now(TaskKind::GradOut(section)))?;
                }
                if on_device {
                    // In place: behind every stage of the step.
                    for read in &reads {
                        times.before(now(*read), now(update))?;
                    }
                }
                let Some(before) = step.checked_sub(1).map(|step| move |kind| (kind, step)) else {
                    continue;
                };
                for arrival in [
                    TaskKind::Norm,
                    TaskKind::GradOut(section),
                    TaskKind::SpillGrad(section),
                ] {
                    times.before(before(arrival), now(update))?;
                }
                times.before(before(update), now(update))?;
            }
            for (read, write) in updates(TaskKind::ReadOptim).zip(updates(TaskKind::WriteOptim)) {
                let TaskKind::ReadOptim(_, part) = read else {
                    unreachable!()
                };
                times.before(now(read), now(TaskKind::Update(section, part)))?;
                times.before(now(TaskKind::Update(section, part)), now(write))?;
                if step > 0 {
                    times.before((write, step - 1), now(read))?;
                }
            }
            // A step's stages see the parameters from before its updates, all of them.
            for read in &reads {
                for settle in settles {
                    times.before(now(*read), now(settle))?;
                    if step > 0 {
                        times.before((settle, step - 1), now(*read))?;
                    }
                }
                if on_device && step > 0 {
                    for update in updates(TaskKind::Update) {
                        times.before((update, step - 1), now(*read))?;
                    }
                }
            }
            if step > 0 {
                // The sums are read before the next ones come.
                times.before((TaskKind::Norm, step - 1), now(TaskKind::GradNorm(section)))?;
                times.before(
                    (TaskKind::SpillGrad(section), step - 1),
                    now(TaskKind::ReadGrad(section)),
                )?;
            }
        }
    }
    for (pool, peak) in plan.pools().iter().zip(&report.peaks) {
        if *peak as u64 > pool.buffers {
            return Err(format!("{:?} held {peak} of {}", pool.kind, pool.buffers));
        }
    }
    Ok(())
}

/// Whether every task of a kind waits, at whatever remove, for those of another kind in the step before.
fn waits(plan: &Plan, kind: TaskKind, for_: TaskKind) -> bool {
    let all = (0..).map(TaskId).zip(plan.tasks());
    let of = |kind: TaskKind| {
        let of_kind = all.clone().filter(move |(_, task)| task.kind == kind);
        of_kind.map(|(id, _)| id)
    };
    of(kind).all(|id| {
        let (mut reached, mut next) = (vec![[false; 2]; plan.tasks().len()], vec![(id, true)]);
        while let Some((id, now)) = next.pop() {
            if std::mem::replace(&mut reached[id.0 as usize][usize::from(now)], true) {
                continue;
            }
            for dep in &plan.task(id).deps {
                if now || !dep.previous_step {
                    next.push((dep.task, now && !dep.previous_step));
                }
            }
        }
        of(for_).all(|id| reached[id.0 as usize][0])
    })
}

/// How often each kind of task stands in a plan.
fn kinds(plan: &Plan, pick: impl Fn(&TaskKind) -> bool) -> usize {
    plan.tasks().iter().filter(|t| pick(&t.kind)).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_delayed_plan_ends_within_its_pools_and_each_stage_sees_the_parameters_of_its_step(
        layers in 1u32..9, tied: bool, gather: bool, layer in 1u64..40, embed in 0u64..60,
        lookahead in 0u32..5, policy in 0usize..4,
        device in 0u64..100, pinned in 0u64..100, seed in 1u64.., speeds in prop::array::uniform4(0u32..4),
    ) {
        let embed = if embed == 0 { layer } else { embed };
        let model = decoder(layers, layer * 16384, embed * 16384, tied, 8192);
        let model = if gather { gathering(model) } else { model };
        let policy = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk][policy];
        let options = options(policy, lookahead, Timing::Delayed);
        let least = least(&model, &options);
        let most = place(&model, ALL, &options).unwrap();
        let between = |least: u64, most: u64, part: u64| least + most.saturating_sub(least) * part / 90;
        let device_bytes = between(least.device_bytes, most.device_bytes(), device);
        let with = |pinned_bytes| place(&model, Budgets { device_bytes, pinned_bytes }, &options);
        let least = match with(0).unwrap_err() {
            Error::PinnedBudget { least, .. } => least,
            other => return Err(TestCaseError::fail(other.to_string())),
        };
        let most = with(ALL.pinned_bytes).unwrap().pinned_bytes();
        let placement = with(between(least, most, pinned)).unwrap();
        prop_assert_eq!(placement.undo_buffers(), 0, "nothing is to be undone");
        let speed = speeds.map(|s| 10f64.powi(s as i32 + 6));
        let rates = Rates {
            cpu: speed[3],
            device_update: 10.0 * speed[3],
            ..rates(&model, 1.0 / speed[0] * 1e5, speed[1], speed[2])
        };
        let plan = Arc::new(Plan::training(&model, &placement).unwrap());
        let report = simulate(Arc::clone(&plan), &rates, 4, seed);
        validate(&model, &placement, &report, 4).map_err(TestCaseError::fail)?;
        // What equal speeds may bring about, another machine's need not.
        for section in (0..model.sections.len() as u32).map(SectionId) {
            for (task, earlier) in [
                (TaskKind::GradNorm(section), TaskKind::Norm),
                (TaskKind::ReadGrad(section), TaskKind::SpillGrad(section)),
                (TaskKind::Update(section, 0), TaskKind::Norm),
                (TaskKind::Update(section, 0), TaskKind::GradOut(section)),
            ] {
                prop_assert!(waits(&plan, task, earlier), "{task:?} for {earlier:?}");
            }
        }
        prop_assert!(!waits(&plan, TaskKind::Norm, TaskKind::Commit), "nor does all wait for all");
        let exact = PlaceOptions { timing: Timing::AfterNorm, ..*placement.options() };
        let exact = place(&model, Budgets { device_bytes, pinned_bytes: placement.pinned_bytes() }, &exact);
        if let Ok(exact) = exact {
            let exact = Plan::training(&model, &exact).unwrap();
            prop_assert!(bound(&plan, &rates, false).seconds <= 1.0001 * bound(&exact, &rates, false).seconds
                || Traffic::of(&plan) != Traffic::of(&exact));
        }
        // What applies the last gradient: each update once, and nothing else.
        let flush = Arc::new(Plan::flush(&model, &placement).unwrap());
        let update = |k: &TaskKind| matches!(k, TaskKind::Update(..));
        prop_assert_eq!(kinds(&flush, update), kinds(&plan, update));
        prop_assert_eq!(kinds(&flush, |k| matches!(k, TaskKind::Compute(_) | TaskKind::GradOut(_))), 0);
        prop_assert_eq!(simulate(Arc::clone(&flush), &rates, 1, seed).trace.len(), flush.tasks().len());
    }
}

#[test]
fn the_validator_notices_a_delayed_trace_that_is_out_of_order() {
    let model = decoder(3, MIB, MIB, true, 4096);
    let run = |policy, device: bool| {
        let options = options(policy, 2, Timing::Delayed);
        let device_bytes = least(&model, &options).device_bytes;
        let budgets = Budgets {
            device_bytes: if device {
                ALL.device_bytes
            } else {
                device_bytes
            },
            ..ALL
        };
        let placement = place(&model, budgets, &options).unwrap();
        let plan = Arc::new(Plan::training(&model, &placement).unwrap());
        let good = simulate(plan, &rates(&model, 0.01, 1e9, 1e8), 4, 0);
        assert_eq!(validate(&model, &placement, &good, 4), Ok(()));
        (placement, good)
    };
    let all = [
        run(Policy::Disk, false),
        run(Policy::Pinned, false),
        run(Policy::Resident, false),
        run(Policy::Resident, true),
    ];
    type Pick = fn(&TaskKind) -> bool;
    let planted: [(usize, Pick, bool); 9] = [
        (0, |k| matches!(k, TaskKind::WriteParam(SectionId(3))), true),
        (
            0,
            |k| matches!(k, TaskKind::WriteParam(SectionId(3))),
            false,
        ),
        (
            0,
            |k| matches!(k, TaskKind::ReadOptim(SectionId(3), _)),
            true,
        ),
        (1, |k| matches!(k, TaskKind::SwapParam(SectionId(3))), true),
        (1, |k| matches!(k, TaskKind::SwapParam(SectionId(3))), false),
        (1, |k| matches!(k, TaskKind::Update(SectionId(3), 0)), true),
        (2, |k| matches!(k, TaskKind::PushParam(SectionId(3))), true),
        (2, |k| matches!(k, TaskKind::PushParam(SectionId(3))), false),
        (3, |k| matches!(k, TaskKind::Update(SectionId(3), 0)), true),
    ];
    for (run, pick, early) in planted {
        let (placement, good) = &all[run];
        let mut bad = good.clone();
        let mut of_step_2 = bad.trace.iter_mut().filter(|e| e.task.step == 2);
        let event = of_step_2.find(|e| pick(&e.kind)).unwrap();
        (event.start, event.end) = if early { (0.0, 1e-9) } else { (1e9, 1e9) };
        let kind = event.kind;
        assert!(
            validate(&model, placement, &bad, 4).is_err(),
            "{kind:?} moved, early: {early}"
        );
    }
}

/// A step in which the CPU's updates take as long as forward and backward together, and a clip fires: seconds, and
/// the bound.
fn balanced(policy: Policy, timing: Timing) -> (f64, f64, f64) {
    let model = decoder(24, MIB, 64 << 10, true, MIB);
    let options = PlaceOptions {
        // Where all is clipped, nothing that ran ahead stands.
        undo_log_bytes: 0,
        ..options(policy, 2, timing)
    };
    // Room for a third gradient, and not for optimizer states.
    let more = if policy == Policy::Pinned { 4 } else { 1 };
    let budgets = Budgets {
        device_bytes: least(&model, &options).device_bytes + more * MIB,
        ..ALL
    };
    let placement = place(&model, budgets, &options).unwrap();
    let plan = Plan::training(&model, &placement).unwrap();
    let weight = |s: &StageSpec| if s.grads.is_empty() { 1.0 } else { 2.0 };
    let all: f64 = model.stages.iter().map(weight).sum();
    let traffic = Traffic::of(&plan);
    assert!(100 * traffic.updated_by_cpu > 99 * traffic.updated);
    let link = 2.0 * traffic.h2d.max(traffic.d2h) as f64;
    let rates = Rates {
        stage_seconds: model.stages.iter().map(|s| weight(s) / all).collect(),
        cpu: traffic.updated_by_cpu as f64,
        device_update: f64::INFINITY,
        ..Rates::equal(link)
    };
    let bound = bound(&plan, &rates, false);
    let report = simulate(plan.into(), &rates, 20, 0);
    (report.step_seconds, bound.seconds, bound.compute)
}

#[test]
fn where_compute_and_the_cpu_balance_and_each_step_clips_a_delayed_step_takes_as_long_as_one_of_them()
 {
    for policy in [Policy::Pinned, Policy::Resident] {
        let (step, bound, compute) = balanced(policy, Timing::Delayed);
        assert!((bound - compute).abs() < 1e-6 && (compute - 1.0).abs() < 1e-6);
        assert!((1.0 - 1e-6..1.02).contains(&step), "{policy:?}: {step}");
        // Backward, and then all updates: what it takes where nothing is delayed.
        let (exact, bound, _) = balanced(policy, Timing::AfterNorm);
        assert!((bound - 5.0 / 3.0).abs() < 0.02, "{bound}");
        assert!(exact > bound - 1e-6, "{policy:?}: {exact}");
    }
}
