//! Overlap on the host device, in real time: with a throttled disk that takes as long as compute,
//! a step takes little more than one of the two.
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use forebay::{
    Bound, Ceilings, DType, HostArgs, HostContext, Init, Model, Operation, Options, Pass, Policy,
    RandomInit, Section, SectionId, Stage, StageId, Step, Trainer, Updates,
};

const LAYERS: u32 = 12;
const WIDTH: usize = 256;
/// Time that a stage computes. Sleeping computes nothing and disturbs nobody: what is tested is
/// who waits for whom, on a machine with few cores and much noise.
const STAGE: Duration = Duration::from_millis(8);

#[derive(Clone, Copy)]
struct Compute;

impl Operation for Compute {
    fn name(&self) -> &'static str {
        "compute"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let (param, out) = (args.input::<f32>()?, args.output::<f32>()?);
        std::thread::sleep(STAGE);
        out.iter_mut()
            .zip(param)
            .for_each(|(out, param)| *out += param);
        Ok(())
    }
}

fn walk(step: &Step<'_>) -> forebay::Result<()> {
    let mut x = step.tensor(DType::F32, [WIDTH, WIDTH])?;
    for layer in 0..LAYERS {
        let lease = step.enter(StageId::from(layer))?;
        step.launch(
            Compute,
            &[lease.param(SectionId(layer), "w")?],
            &[x.reborrow()],
        )?;
    }
    step.loss(&x.as_ref().reshape([WIDTH * WIDTH])?.rows(0, 1)?)?;
    for layer in (0..LAYERS).rev() {
        let lease = step.enter(StageId::from(2 * LAYERS - 1 - layer))?;
        let grad = lease.grad(SectionId(layer), "w")?;
        step.launch(Compute, &[lease.param(SectionId(layer), "w")?], &[grad])?;
    }
    Ok(())
}

/// One run at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Step time over bound with states on a disk so slow that it takes as long as compute.
fn ratio(lookahead: u32) -> f64 {
    let (step, bound) = seconds(lookahead, None, Updates::Exact);
    step / bound.seconds
}

/// The seconds of a step, and the bound.
fn seconds(lookahead: u32, clip: Option<f64>, updates: Updates) -> (f64, Bound) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut model = Model::new("overlap");
    for layer in 0..LAYERS {
        let normal = Init::Normal(1e-3);
        let section = Section::new(format!("{layer}")).tensor("w", [WIDTH, WIDTH], normal);
        let id = model.section(section);
        model.train_stage(Stage::new(format!("{layer}")).params([id]));
    }
    for layer in (0..LAYERS).rev() {
        let id = SectionId(layer);
        model.train_stage(Stage::new(format!("{layer} back")).params([id]).grads([id]));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut options = Options::new([folder.path().to_owned()]);
    // Its operation has no other version.
    options.device = forebay::DeviceChoice::Host;
    (options.threads, options.lookahead, options.clip) = (1, lookahead, clip);
    options.updates = updates;
    options.placement = Policy::Auto;
    let section = (WIDTH * WIDTH) as u64;
    // Parameters stream from pinned memory; optimizer states are all on disk.
    options.optimizer_chunk = Some(section / 4);
    options.device_budget = Some((3 + 2 + 1) * 4 * section);
    // Where they wait for the norm, gradients stay there too.
    let sections = match clip {
        Some(_) => 2 * LAYERS + 6,
        None => LAYERS + 12,
    };
    options.pinned_budget = Some(u64::from(sections) * 4 * section);
    let compute = STAGE.as_secs_f64() * 2.0 * f64::from(LAYERS);
    let bytes = 24 * section * u64::from(LAYERS);
    options.disk_throttle = Some((bytes as f64 / compute) as u64);
    let footprint = forebay::footprint(
        &model,
        Pass::Train,
        forebay::Target::Host { threads: 1 },
        walk,
    )
    .unwrap();
    let mut weights = RandomInit { seed: 1 };
    let mut trainer = Trainer::create(model, footprint, &options, &mut weights).unwrap();
    for _ in 0..8 {
        let step = trainer.begin(1e-3).unwrap();
        walk(&step).unwrap();
        step.finish().unwrap();
    }
    trainer.settle().unwrap();
    let report = trainer.report();
    let share = report.traffic.disk_read + report.traffic.disk_write;
    assert!(
        share * 10 >= bytes * 9,
        "the states are on disk: {:?}",
        report.traffic
    );
    let disk = options.disk_throttle.unwrap() as f64;
    // Everything else is far from binding.
    let ceilings = Ceilings {
        h2d: 5e9,
        d2h: 5e9,
        disk_read: disk,
        disk_write: disk,
        adam: 5e8,
    };
    let bound = report.bound(&ceilings);
    println!(
        "look-ahead {lookahead}, {updates}: step {:.0} ms, {bound:?}",
        report.step_s * 1e3
    );
    (report.step_s, bound)
}

#[test]
fn with_a_disk_as_slow_as_compute_a_step_takes_little_more_than_one_of_them() {
    let (on, off) = (ratio(2), ratio(0));
    println!("step / bound: {on:.2}, with look-ahead off {off:.2}");
    assert!(on <= 1.3, "{on:.2}");
    assert!(
        off > 1.3,
        "the test can fail: without look-ahead it is {off:.2}"
    );
}

#[test]
fn where_each_step_clips_a_delayed_one_takes_little_more_than_the_disk_or_compute_and_an_exact_one_does()
 {
    let clip = Some(1e-9);
    // Each beside what it spent in compute itself: the machine may be busy with other things in one of them.
    let ratio = |updates| {
        let (step, bound) = seconds(2, clip, updates);
        step / bound.compute
    };
    let (delayed, exact) = (ratio(Updates::Delayed), ratio(Updates::Exact));
    println!("step / compute: delayed {delayed:.2}, exact {exact:.2}");
    assert!(delayed <= 1.25, "{delayed:.2}");
    assert!(exact > 1.25, "{exact:.2}");
}
