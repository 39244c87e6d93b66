//! Models, budgets, and the validator: it knows nothing of how plans are built and follows versions of the
//! data.
#![allow(dead_code)]

use std::collections::HashMap;

use forebay_prefetch::*;

pub(crate) const MIB: u64 = 1 << 20;

/// A decoder-shaped model: an embedding tied to the head or not, layers, a norm.
pub(crate) fn decoder(
    layers: u32,
    layer_bytes: u64,
    embed_bytes: u64,
    tied: bool,
    act: u64,
) -> Model {
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

/// The same model with a first stage that only gathers rows of the embedding.
pub(crate) fn gathering(mut model: Model) -> Model {
    for stages in [&mut model.stages, &mut model.eval] {
        stages[0].gathers = std::mem::take(&mut stages[0].params);
    }
    model
}

/// Whether the first stage of a pass reads the embedding in pinned memory.
pub(crate) fn in_place(plan: &Plan) -> bool {
    plan.stages()[0].params == [(SectionId(0), ParamSource::Mapped)]
}

pub(crate) fn options(policy: Policy, lookahead: u32, timing: Timing) -> PlaceOptions {
    PlaceOptions {
        policy,
        lookahead,
        timing,
        chunk_elements: 1 << 16,
        undo_log_bytes: 4 << 16,
        undo_grad_bytes: 4 << 16,
        ..Default::default()
    }
}

pub(crate) const ALL: Budgets = Budgets {
    device_bytes: u64::MAX / 4,
    pinned_bytes: u64::MAX / 4,
};

pub(crate) fn least(model: &Model, options: &PlaceOptions) -> Budgets {
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
pub(crate) fn validate(
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
                if *source == ParamSource::Mapped {
                    let gathers = model.stages[index].gathers.contains(section);
                    if !gathers || placement.param_home(*section) != Tier::Pinned {
                        return Err("reads in place what is not there, or not gathered".into());
                    }
                }
                // Until the norm is known, updates may be undone.
                if step > 0 && find(TaskKind::Update(*section, 0), 0).is_some() {
                    let norm = find(TaskKind::Norm, step - 1);
                    before(norm, compute, "computes on what may be undone")?;
                    let fetch = find(TaskKind::FetchParam(*section), step);
                    before(norm, fetch, "fetches what may be undone")?;
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
        let mut ahead = 0;
        for section in (0..model.sections.len() as u32).map(SectionId) {
            let out = find(TaskKind::GradOut(section), step);
            let summed = find(TaskKind::GradNorm(section), step);
            before(summed, out, "lets a gradient go before it is summed")?;
            before(summed, norm, "the norm lacks a section")?;
            for part in 0..placement.parts(section).len() as u32 {
                let update = find(TaskKind::Update(section, part), step);
                let kind = TaskKind::Update(section, part);
                let spec = plan.tasks().iter().find(|task| task.kind == kind);
                // Of a split master: from disk, or in a slab.
                let old = spec.and_then(|spec| spec.param).map(|claim| claim.task);
                let read = old.map(|id| times[&TaskRef { step, id }]);
                before(read, update, "no old parameters")?;
                let by_cpu = spec.is_some_and(|spec| spec.lane == Lane::Cpu);
                if placement.options().split && by_cpu && old.is_none() {
                    let slab = placement.param_slab(section);
                    slab.then_some(()).ok_or("no slab of old parameters")?;
                }
                before(
                    out.or(summed),
                    update,
                    "updates before the gradient is there",
                )?;
                let stays = placement.grad_home(section) == GradHome::Slab
                    && placement.parts(section)[part as usize].home == Tier::Pinned
                    && old.is_none();
                let early = before(norm, update, "updates before the norm");
                if stays {
                    ahead += u64::from(early.is_err());
                    for kind in [TaskKind::PushParam(section), TaskKind::WriteParam(section)] {
                        before(norm, find(kind, step), "shows what may be undone")?;
                    }
                } else if plan.timing() == Timing::AfterNorm {
                    early?;
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
        let may = plan.tasks().iter().filter(|t| t.window == Window::Norm);
        if plan.undo_buffers() > may.count() as u64 {
            return Err("room to undo more than runs ahead".into());
        }
        if ahead > plan.undo_buffers() {
            return Err(format!("{ahead} updates ran before the norm"));
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

pub(crate) fn rates(model: &Model, compute: f64, link: f64, disk: f64) -> Rates {
    let stage_seconds = vec![compute; model.stages.len()];
    Rates {
        stage_seconds,
        h2d: link,
        d2h: link,
        disk_read: disk,
        disk_write: disk,
        cpu: 1e12,
        cpu_ahead: 7e11,
        device_update: 1e11,
    }
}

pub(crate) fn least_device(least: Budgets) -> Budgets {
    Budgets {
        device_bytes: least.device_bytes,
        ..ALL
    }
}
