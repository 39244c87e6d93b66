//! f16 and loss scaling: a step whose gradient overflows is skipped everywhere or nowhere, scales follow from
//! norms and from nothing else, and a power of two goes in and comes out again without a trace.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Accumulate, create, decoder_in, options, resume, tokens, with_budgets};
use forebay::{
    Ahead, DType, DynamicScale, HostArgs, HostContext, Init, LossScale, Model, Operation, Options,
    Policy, RandomInit, Section, SectionId, Stage, StageId, StageLease, Step, Trainer,
};
use forebay_decoder::{Batch, Decoder};

const STEPS: u64 = 10;
const POLICIES: [Policy; 4] = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk];

/// So high that the first steps overflow, and so quick to rise that it overflows again.
const HIGH: DynamicScale = DynamicScale {
    initial: 16_777_216.0,
    growth_interval: 2,
    growth: 4.0,
    backoff: 0.125,
    least: 1.0,
};

/// What a step shows: the bits of its loss, and its scale.
type Seen = (u32, f64);

fn step(trainer: &mut Trainer, decoder: &Decoder) -> Seen {
    let (ids, targets) = tokens(trainer.steps());
    let step = trainer.begin(5e-3).unwrap();
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    decoder.train_step(&step, &batch).unwrap();
    let scale = f64::from(step.loss_scale().unwrap());
    (step.finish().unwrap().loss.unwrap().to_bits(), scale)
}

fn train(trainer: &mut Trainer, decoder: &Decoder, steps: u64) -> Vec<Seen> {
    (0..steps).map(|_| step(trainer, decoder)).collect()
}

fn loss_of(seen: &Seen) -> f32 {
    f32::from_bits(seen.0)
}

fn eval(trainer: &mut Trainer, decoder: &Decoder) -> u32 {
    let (ids, targets) = tokens(50);
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    let step = trainer.eval().unwrap();
    assert_eq!(step.loss_scale().unwrap(), 1.0);
    let loss = decoder.eval_loss(&step, &batch).unwrap();
    step.finish().unwrap();
    loss.to_bits()
}

/// A run in a fresh folder; what its steps showed, and how many were skipped.
fn run(dtype: DType, steps: u64, change: impl Fn(&mut Options)) -> (Vec<Seen>, u64) {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(dtype);
    let mut options = options(folder.path());
    change(&mut options);
    let options = with_budgets(options, &decoder);
    let mut trainer = create(&decoder, &options);
    let seen = train(&mut trainer, &decoder, steps);
    trainer.settle().unwrap();
    (seen, trainer.skipped())
}

#[test]
fn in_f16_every_placement_gives_the_same_bits_and_scales_through_overflows() {
    for clip in [Some(0.5), None] {
        let with = |placement, lookahead, threads, ahead| {
            run(DType::F16, STEPS, |o| {
                (o.placement, o.lookahead, o.threads) = (placement, lookahead, threads);
                (o.clip, o.ahead) = (clip, ahead);
                o.loss_scale = LossScale::Dynamic(HIGH);
            })
        };
        let reference = with(Policy::Resident, 2, 1, Ahead::Never);
        let (seen, skipped) = &reference;
        let rises = seen.windows(2).filter(|pair| pair[1].1 > pair[0].1).count();
        println!("clip {clip:?}: {skipped} skipped, {rises} rises, {seen:?}");
        assert!(*skipped >= 2 && rises >= 1 && *skipped < STEPS - 3);
        // Losses are as they are without a scale: of the first step, whose gradient overflows, to the bit.
        let (plain, _) = run(DType::F16, 1, |o| o.loss_scale = LossScale::None);
        assert_eq!(plain[0], (seen[0].0, 1.0));
        for placement in POLICIES {
            for lookahead in [0, 1, 3] {
                for (threads, ahead) in [(1, Ahead::Always), (2, Ahead::Auto)] {
                    let got = with(placement, lookahead, threads, ahead);
                    let what = format!("{placement:?}, look-ahead {lookahead}, {ahead:?}");
                    assert_eq!(got, reference, "{what}, clip {clip:?}");
                }
            }
        }
        // The comparison can fail: other scales, other steps skipped.
        let other = run(DType::F16, STEPS, |o| {
            (o.placement, o.clip) = (Policy::Resident, clip);
            o.loss_scale = LossScale::Auto;
        });
        assert_ne!(other.0, reference.0);
    }
}

#[test]
fn a_scale_that_is_asked_for_at_once_is_the_one_that_follows_from_the_norm_before() {
    let (late, _) = run(DType::F16, STEPS, |o| {
        o.placement = Policy::Resident;
        o.loss_scale = LossScale::Dynamic(HIGH);
    });
    for placement in POLICIES {
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder_in(DType::F16);
        let mut options = options(folder.path());
        (options.placement, options.loss_scale) = (placement, LossScale::Dynamic(HIGH));
        let options = with_budgets(options, &decoder);
        let mut trainer = create(&decoder, &options);
        let early = (0..STEPS).map(|_| {
            let (ids, targets) = tokens(trainer.steps());
            let step = trainer.begin(5e-3).unwrap();
            let scale = f64::from(step.loss_scale().unwrap());
            let batch = Batch {
                ids: &ids,
                targets: &targets,
            };
            decoder.train_step(&step, &batch).unwrap();
            (step.finish().unwrap().loss.unwrap().to_bits(), scale)
        });
        assert_eq!(early.collect::<Vec<_>>(), late, "{placement:?}");
    }
}

#[test]
fn a_step_that_overflows_changes_nothing_on_any_tier() {
    for clip in [Some(0.5), None] {
        for placement in POLICIES {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(DType::F16);
            let mut options = options(folder.path());
            (options.placement, options.clip) = (placement, clip);
            options.ahead = Ahead::Always;
            options.loss_scale = LossScale::Dynamic(HIGH);
            let options = with_budgets(options, &decoder);
            let mut trainer = create(&decoder, &options);
            let mut before = eval(&mut trainer, &decoder);
            let (mut stood, mut scale) = (0, trainer.loss_scale().unwrap());
            for index in 0..STEPS {
                let skipped = trainer.skipped();
                assert_eq!(step(&mut trainer, &decoder).1, scale);
                let after = eval(&mut trainer, &decoder);
                let skips = trainer.skipped() > skipped;
                let what = format!("{placement:?}, clip {clip:?}, step {index}");
                assert_eq!(after == before, skips, "{what}");
                let next = trainer.loss_scale().unwrap();
                assert_eq!(next < scale, skips, "{what}");
                assert_eq!(trainer.grad_norm().is_finite(), !skips, "{what}");
                stood += u64::from(!skips);
                (before, scale) = (after, next);
            }
            assert!(stood > 0 && stood < STEPS, "{stood}");
        }
    }
}

#[test]
fn a_run_cut_into_pieces_goes_on_with_its_scale_and_the_bits_of_the_whole() {
    for clip in [Some(0.5), None] {
        let (whole, _) = run(DType::F16, STEPS, |o| {
            (o.placement, o.clip) = (Policy::Resident, clip);
            o.loss_scale = LossScale::Dynamic(HIGH);
        });
        let run = |forget: bool| {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(DType::F16);
            let mut pieces = Vec::new();
            // Cut among the first overflows, and between two steps that count towards a rise.
            let cuts = [(Policy::Disk, 1), (Policy::Auto, 3), (Policy::Resident, 1)];
            let cuts = cuts.into_iter().chain([(Policy::Pinned, 5)]);
            for (index, (placement, steps)) in cuts.enumerate() {
                let mut options = options(folder.path());
                (options.placement, options.clip) = (placement, clip);
                options.loss_scale = LossScale::Dynamic(HIGH);
                if forget && index == 1 {
                    options.loss_scale = LossScale::None;
                }
                let options = with_budgets(options, &decoder);
                let mut trainer = match index {
                    0 => create(&decoder, &options),
                    _ => resume(&decoder, &options),
                };
                pieces.extend(train(&mut trainer, &decoder, steps));
                trainer.publish("").unwrap();
            }
            pieces
        };
        assert_eq!(run(false), whole, "clip {clip:?}");
        // A piece without scaling keeps none of it: the comparison can fail.
        assert_ne!(run(true), whole);
    }
}

/// Multiplies what a gradient holds, on the host device.
#[derive(Clone, Copy)]
struct Multiply(f32);

impl Operation for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
        let x = args.output::<f32>()?;
        x.iter_mut().for_each(|x| *x *= self.0);
        Ok(())
    }
}

#[test]
fn any_power_of_two_gives_the_bits_of_none_and_one_that_is_not_undone_does_not() {
    for (clip, placement) in [
        (Some(0.5), Policy::Auto),
        (None, Policy::Disk),
        (Some(1e9), Policy::Pinned),
    ] {
        let losses = |loss_scale| {
            let (seen, skipped) = run(DType::F32, STEPS, |o| {
                (o.placement, o.clip, o.loss_scale) = (placement, clip, loss_scale);
                o.ahead = Ahead::Always;
            });
            assert_eq!(skipped, 0);
            seen.iter().map(|seen| seen.0).collect::<Vec<_>>()
        };
        let reference = losses(LossScale::None);
        assert_eq!(losses(LossScale::Auto), reference);
        for scale in [0.125, 2.0, 1024.0, 1_048_576.0] {
            let got = losses(LossScale::Fixed(scale));
            assert_eq!(got, reference, "{scale}, {placement:?}, clip {clip:?}");
        }
        let dynamic = LossScale::Dynamic(HIGH);
        assert_eq!(losses(dynamic), reference, "it may change on the way");
    }
    // The control: gradients are multiplied, and nobody knows.
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(DType::F32);
    let mut options = with_budgets(options(folder.path()), &decoder);
    options.device = forebay::DeviceChoice::Host;
    let run = |factor: f32| {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            disk: vec![folder.path().to_owned()],
            ..options.clone()
        };
        let mut trainer = create(&decoder, &options);
        let losses = (0..STEPS).map(|_| {
            let (ids, targets) = tokens(trainer.steps());
            let step = trainer.begin(5e-3).unwrap();
            let mut observer = |lease: &StageLease<'_>, id: SectionId| {
                for tensor in decoder.model().sections()[id.0 as usize].tensors() {
                    let grad = lease.grad(id, &tensor.name)?;
                    step.launch(Multiply(factor), &[], &[grad])?;
                }
                Ok(())
            };
            let batch = Batch {
                ids: &ids,
                targets: &targets,
            };
            decoder
                .train_step_observed(&step, &batch, &mut observer)
                .unwrap();
            step.finish().unwrap().loss.unwrap().to_bits()
        });
        losses.collect::<Vec<_>>()
    };
    assert_ne!(run(1024.0), run(1.0));
}

#[test]
fn twenty_steps_in_f16_stay_with_those_in_f32_and_without_small_gradients_they_do_not() {
    let losses = |dtype, loss_scale| -> Vec<f32> {
        let (seen, skipped) = run(dtype, 20, |o| {
            o.placement = Policy::Auto;
            o.loss_scale = loss_scale;
        });
        println!("{dtype}, {loss_scale:?}: {skipped} skipped");
        seen.iter().map(loss_of).collect()
    };
    let exact = losses(DType::F32, LossScale::Auto);
    let off = |other: &[f32]| {
        let all = exact.iter().zip(other);
        all.map(|(a, b)| (a - b).abs() / a).fold(0.0, f32::max)
    };
    let (half, low) = (
        off(&losses(DType::F16, LossScale::Auto)),
        off(&losses(DType::Bf16, LossScale::Auto)),
    );
    println!("farthest from f32: f16 {half:.1e}, bf16 {low:.1e}");
    assert!(half < 4e-3, "{half}");
    assert!(half > 0.0, "it is another type");
    assert!(exact[19] < exact[0] - 0.1, "it learns: {exact:?}");
    // So small that most of a gradient is less than f16 can hold.
    let lost = off(&losses(DType::F16, LossScale::Fixed(2f64.powi(-12))));
    assert!(lost > 2.0 * half, "{lost}");
}

/// A section of weights that grow by themselves, for a trainer that asks for no scale.
fn own_trainer(folder: &std::path::Path, dtype: DType, loss_scale: LossScale) -> Trainer {
    let mut model = Model::new("own").compute_in(dtype);
    let section = Section::new("w").tensor("w", [64, 64], Init::Normal(0.1));
    let section = model.section(section);
    model.train_stage(Stage::new("all").params([section]).grads([section]));
    let mut options = Options::new([folder.to_owned()]);
    options.device = forebay::DeviceChoice::Host;
    (options.placement, options.loss_scale, options.threads) = (Policy::Resident, loss_scale, 1);
    let target = options.target().unwrap();
    let needs =
        forebay::footprint(&model, forebay::Pass::Train, target, |s| walk(s, false)).unwrap();
    let budgets = forebay::requirements(&model, needs, &options).unwrap();
    options.device_budget = Some(budgets.device_bytes);
    options.pinned_budget = Some(budgets.pinned_bytes);
    Trainer::create(model, needs, &options, &mut RandomInit { seed: 3 }).unwrap()
}

fn walk(step: &Step<'_>, asks: bool) -> forebay::Result<()> {
    let lease = step.enter(StageId::from(0))?;
    let weight = lease.param(SectionId(0), "w")?;
    step.launch(Accumulate, &[weight], &[lease.grad(SectionId(0), "w")?])?;
    if asks {
        step.loss_scale()?;
    }
    Ok(())
}

#[test]
fn a_step_that_does_not_ask_for_its_scale_is_refused_where_there_is_one() {
    let scaled = [
        (DType::F16, LossScale::Auto),
        (DType::F32, LossScale::Fixed(8.0)),
        (DType::Bf16, LossScale::Dynamic(DynamicScale::default())),
    ];
    for (dtype, loss_scale) in scaled {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = own_trainer(folder.path(), dtype, loss_scale);
        for ask in [true, true] {
            let step = trainer.begin(1e-2).unwrap();
            walk(&step, ask).unwrap();
            step.finish().unwrap();
        }
        // What is thrown away needs none.
        let step = trainer.begin(1e-2).unwrap();
        walk(&step, false).unwrap();
        step.discard().unwrap();
        let step = trainer.begin(1e-2).unwrap();
        walk(&step, false).unwrap();
        let error = step.finish().unwrap_err().to_string();
        assert!(error.contains("Step::loss_scale"), "{error}");
        // Nothing of that step becomes a generation.
        let error = trainer.publish("").unwrap_err().to_string();
        assert!(error.contains("failed earlier"), "{error}");
    }
    for (dtype, loss_scale) in [
        (DType::F16, LossScale::None),
        (DType::F32, LossScale::Auto),
        (DType::Bf16, LossScale::Auto),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = own_trainer(folder.path(), dtype, loss_scale);
        let step = trainer.begin(1e-2).unwrap();
        walk(&step, false).unwrap();
        step.finish().unwrap();
        assert_eq!(trainer.loss_scale(), None);
        trainer.publish("").unwrap();
    }
}

#[test]
fn a_step_that_asks_for_its_scale_behind_a_whole_gradient_is_refused_where_there_is_one() {
    for (loss_scale, late) in [(LossScale::Fixed(8.0), true), (LossScale::None, false)] {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = own_trainer(folder.path(), DType::F32, loss_scale);
        let step = trainer.begin(1e-2).unwrap();
        // Its stage is over at the end of this.
        walk(&step, false).unwrap();
        match step.loss_scale() {
            Ok(scale) => assert!(!late && scale == 1.0),
            Err(error) => assert!(late && error.to_string().contains("where the loss is")),
        }
        drop(step.discard());
        assert_eq!(trainer.publish("").is_err(), late);
    }
}

#[test]
fn a_scale_that_cannot_be_undone_exactly_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(DType::F32);
    let mut options = with_budgets(options(folder.path()), &decoder);
    options.loss_scale = LossScale::Fixed(1000.0);
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let model = decoder.model().clone();
    let made = Trainer::create(model, footprint, &options, &mut RandomInit { seed: 5 });
    let error = made.map(drop).unwrap_err().to_string();
    assert!(error.contains("512 or 1024"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
