//! Steps that are undone, or never end, while other things are under way.
#![allow(clippy::unwrap_used)]

mod common;

use common::Accumulate;

use forebay::{
    Init, Model, Options, Pass, Policy, RandomInit, Section, SectionId, Stage, StageId, Step,
    Trainer,
};

const FROZEN: u32 = 20;
const WIDTH: usize = 256;
const TRAINED: usize = 64;

/// Sections that no stage trains pass through from disk; one of another size is trained, and stays on the
/// device.
fn model() -> Model {
    let mut model = Model::new("frozen");
    let normal = Init::Normal(1e-3);
    let section = |name: String| Section::new(name).tensor("w", [WIDTH, WIDTH], normal);
    for layer in 0..FROZEN {
        let id = model.section(section(format!("frozen {layer}")));
        model.train_stage(Stage::new(format!("{layer}")).params([id]));
    }
    let trained = model.section(Section::new("trained").tensor("w", [TRAINED, WIDTH], normal));
    let last = Stage::new("trained").params([trained]).grads([trained]);
    model.train_stage(last);
    model
}

fn walk(step: &Step<'_>) -> forebay::Result<()> {
    let frame = step.frame();
    let mut x = frame.tensor([WIDTH, WIDTH])?;
    for layer in 0..FROZEN {
        let lease = step.enter(StageId::from(layer))?;
        let w = lease.param(SectionId(layer), "w")?;
        if layer == 0 {
            forebay::ops::copy(step, &w, &mut x)?;
        } else {
            step.launch(Accumulate, &[w], &[x.reborrow()])?;
        }
    }
    let lease = step.enter(StageId::from(FROZEN))?;
    let w = lease.param(SectionId(FROZEN), "w")?;
    step.launch(Accumulate, &[w], &[x.rows(0, TRAINED)?])?;
    step.loss(&x.as_ref().rows(0, 1)?.reshape([WIDTH])?.rows(0, 1)?)?;
    let grad = lease.grad(SectionId(FROZEN), "w")?;
    step.launch(Accumulate, &[x.as_ref().rows(0, TRAINED)?], &[grad])
}

fn trainer(folder: &std::path::Path, placement: Policy) -> Trainer {
    let mut options = Options::new([folder.to_owned()]);
    // Its operation has no other version.
    options.device = forebay::DeviceChoice::Host;
    (options.placement, options.clip, options.threads) = (placement, None, 1);
    options.optimizer_chunk = Some(16384);
    options.disk_throttle = (placement == Policy::Disk).then_some(200_000_000);
    let target = options.target().unwrap();
    let footprint = forebay::footprint(&model(), Pass::Train, target, walk).unwrap();
    let needs = forebay::requirements(&model(), footprint, &options).unwrap();
    options.device_budget = Some(match placement {
        // A few slots for what passes through.
        Policy::Disk => footprint.scratch_bytes + (3 << 20),
        _ => needs.device_bytes,
    });
    options.pinned_budget = Some(needs.pinned_bytes);
    Trainer::create(model(), footprint, &options, &mut RandomInit { seed: 3 }).unwrap()
}

/// Steps, every second one thrown away; the bits of their losses.
fn run(placement: Policy) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(folder.path(), placement);
    let step = |index: u32| {
        let step = trainer.begin(1e-2).unwrap();
        walk(&step).unwrap();
        let finished = match index % 2 {
            0 => step.finish().unwrap(),
            _ => step.discard().unwrap(),
        };
        finished.loss.unwrap().to_bits()
    };
    (0..12).map(step).collect()
}

#[test]
fn undoing_what_is_on_disk_leaves_other_transfers_alone() {
    let resident = run(Policy::Resident);
    assert_ne!(resident[0], resident[11], "it learns");
    assert_eq!(
        resident[2], resident[1],
        "what is thrown away changes nothing"
    );
    for _ in 0..3 {
        assert_eq!(run(Policy::Disk), resident);
    }
}

#[test]
fn a_step_that_is_leaked_counts_as_dropped() {
    for eval in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(folder.path(), Policy::Resident);
        let step = trainer.begin(1e-2).unwrap();
        walk(&step).unwrap();
        std::mem::forget(step);
        let error = if eval {
            trainer.settle().unwrap_err()
        } else {
            trainer.begin(1e-2).map(drop).unwrap_err()
        };
        assert!(
            error.to_string().contains("dropped before its end"),
            "{error}"
        );
    }
}
