//! Results do not depend on where states live, how far ahead they move, how many threads compute,
//! or whether the run was cut into pieces: down to the bit.
#![allow(clippy::unwrap_used)]

mod common;

use common::{create, decoder, decoder_in, options, resume, split, train, with_budgets};
use forebay::{Ahead, AheadReport, DType, Options, Policy};

const STEPS: u64 = 8;
const POLICIES: [Policy; 4] = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk];

fn run(change: impl Fn(&mut Options)) -> Vec<u32> {
    run_in(DType::F32, change)
}

fn run_in(dtype: DType, change: impl Fn(&mut Options)) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(dtype);
    let mut options = options(folder.path());
    change(&mut options);
    let options = with_budgets(options, &decoder);
    train(&mut create(&decoder, &options), &decoder, STEPS)
}

#[test]
fn every_placement_look_ahead_and_thread_count_gives_the_same_bits() {
    for clip in [Some(0.5), None] {
        let reference = run(|o| (o.placement, o.clip) = (Policy::Resident, clip));
        let losses: Vec<f32> = reference.iter().map(|b| f32::from_bits(*b)).collect();
        assert!(losses[7] < losses[0] - 0.05, "it learns: {losses:?}");
        for placement in POLICIES {
            for lookahead in 0..=4 {
                for threads in [1, 2] {
                    let got = run(|o| {
                        (o.placement, o.clip) = (placement, clip);
                        (o.lookahead, o.threads) = (lookahead, threads);
                    });
                    assert_eq!(
                        got, reference,
                        "{placement:?}, look-ahead {lookahead}, {threads} threads, clip {clip:?}"
                    );
                }
            }
        }
        // The comparison can fail: another seed of anything that matters gives other bits.
        assert_ne!(
            run(|o| (o.clip, o.optimizer) = (clip, o.optimizer.with_decay(0.11))),
            reference
        );
    }
}

#[test]
fn in_bf16_too_every_placement_and_look_ahead_gives_the_same_bits() {
    let exact = run(|o| o.placement = Policy::Resident);
    for clip in [Some(0.5), None] {
        let with = |placement, lookahead| {
            run_in(DType::Bf16, |o| {
                (o.placement, o.lookahead, o.clip) = (placement, lookahead, clip);
            })
        };
        let reference = with(Policy::Resident, 2);
        for placement in POLICIES {
            for lookahead in [0, 1, 3] {
                let got = with(placement, lookahead);
                assert_eq!(got, reference, "{placement:?}, look-ahead {lookahead}");
            }
        }
        // It is another type, and the same model.
        for (low, exact) in reference.iter().zip(&exact) {
            let (low, exact) = (f32::from_bits(*low), f32::from_bits(*exact));
            assert!((low - exact).abs() < 0.02 * exact, "{low} for {exact}");
        }
        assert_ne!(reference, exact);
    }
}

#[test]
fn optimizer_states_split_between_device_host_and_disk_give_the_same_bits() {
    for (dtype, clip) in [(DType::F32, Some(0.5)), (DType::Bf16, None)] {
        let mut all = Vec::new();
        for placement in [Policy::Resident, Policy::Auto] {
            let mut gradients_out = Vec::new();
            for thirds in 0..=3 {
                let folder = tempfile::tempdir().unwrap();
                let decoder = decoder_in(dtype);
                let mut options = options(folder.path());
                (options.placement, options.clip) = (placement, clip);
                let options = split(options, &decoder, thirds);
                let mut trainer = create(&decoder, &options);
                let mut losses = train(&mut trainer, &decoder, STEPS);
                trainer.publish("").unwrap();
                let report = trainer.report();
                gradients_out.push(report.hops[1].bytes);
                let disk = report.traffic.disk_read > 0;
                let split = placement == Policy::Auto && thirds < 3;
                assert_eq!(disk, split, "{placement:?}, {thirds} thirds");
                drop(trainer);
                let mut trainer = resume(&decoder, &options);
                losses.extend(train(&mut trainer, &decoder, 2));
                all.push(losses);
            }
            assert!(
                gradients_out.is_sorted_by(|a, b| a > b),
                "{gradients_out:?}"
            );
            assert_eq!(gradients_out[3], 0, "with room for all nothing leaves");
        }
        assert!(all.iter().all(|losses| *losses == all[0]), "{all:?}");
    }
}

#[test]
fn what_the_device_keeps_by_measured_rates_changes_no_bit() {
    // Of a CPU so slow that states are worth more than anything else on the device, and the other way round.
    let rates = |cpu, link| forebay::PlaceRates {
        cpu,
        cpu_ahead: 0.8 * cpu,
        h2d: link,
        d2h: link,
        disk_read: 1e9,
        disk_write: 1e9,
        device_update: f64::INFINITY,
        compute_s: 1e-3,
    };
    for (dtype, clip) in [(DType::F32, Some(0.5)), (DType::Bf16, None)] {
        let reference = run_in(dtype, |o| (o.placement, o.clip) = (Policy::Resident, clip));
        let mut mixed = [0; 2];
        for (index, rates) in [rates(1e5, 1e9), rates(1e9, 1e5)].into_iter().enumerate() {
            for part in 1..16 {
                let folder = tempfile::tempdir().unwrap();
                let decoder = decoder_in(dtype);
                let mut options = options(folder.path());
                (options.clip, options.ahead) = (clip, Ahead::Always);
                let budget = |placement| {
                    let options = Options {
                        placement,
                        ..options.clone()
                    };
                    with_budgets(options, &decoder).device_budget.unwrap()
                };
                let (least, most) = (budget(Policy::Disk), budget(Policy::Resident));
                options.device_budget = Some(least + (most - least) * part / 16);
                options.pinned_budget = Some(1 << 24);
                options.rates = Some(rates);
                let mut trainer = create(&decoder, &options);
                let keeps = trainer.report().keeps;
                let streams = keeps.params[0] < keeps.params[1];
                mixed[index] += u32::from(keeps.optim[0] > 0 && streams);
                let mut losses = train(&mut trainer, &decoder, STEPS - 2);
                trainer.publish("").unwrap();
                drop(trainer);
                let mut trainer = resume(&decoder, &options);
                losses.extend(train(&mut trainer, &decoder, 2));
                assert_eq!(losses, reference, "{part} of 16, {keeps}");
            }
        }
        // Where the CPU is slow, states stay while parameters of layers pass through; else only the embedding's, which
        // are read in place.
        assert!(mixed[0] > mixed[1] + 2, "{mixed:?}");
    }
}

/// A run whose states are in pinned memory, and what ran ahead of the norm in it. With `resident` parameters
/// the new ones take the place of gradients; else they have slabs of their own.
fn run_ahead(
    dtype: DType,
    resident: bool,
    clip: Option<f64>,
    ahead: Ahead,
) -> (Vec<u32>, AheadReport) {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(dtype);
    let mut options = options(folder.path());
    (options.clip, options.ahead) = (clip, ahead);
    let options = if resident {
        options.placement = Policy::Resident;
        split(options, &decoder, 0)
    } else {
        options.placement = Policy::Pinned;
        with_budgets(options, &decoder)
    };
    let mut trainer = create(&decoder, &options);
    let mut losses = train(&mut trainer, &decoder, STEPS);
    losses.push(eval(&mut trainer, &decoder));
    trainer.publish("").unwrap();
    let report = trainer.report();
    drop(trainer);
    let mut trainer = resume(&decoder, &options);
    losses.extend(train(&mut trainer, &decoder, 2));
    (losses, report.ahead)
}

#[test]
fn updates_ahead_of_the_norm_give_the_bits_of_those_that_wait_whether_they_stand_or_not() {
    for dtype in [DType::F32, DType::Bf16] {
        for resident in [false, true] {
            // Never, in every step, and without clipping; the first is seldom and the last never undone.
            for (clip, undone) in [(Some(1e9), 0), (Some(0.01), STEPS), (None, 0)] {
                let run = |ahead| run_ahead(dtype, resident, clip, ahead);
                let (waited, none) = run(Ahead::Never);
                assert_eq!(none, AheadReport::default());
                let (losses, ahead) = run(Ahead::Always);
                let what = format!("{dtype}, resident: {resident}, clip {clip:?}");
                assert_eq!(losses, waited, "{what}");
                assert_eq!((ahead.steps, ahead.undone), (STEPS, undone), "{what}");
                assert!(ahead.elements > 0, "{what}");
                // The first steps are too much for the log: what they leave comes after the norm.
                assert!(
                    ahead.left > 0 && ahead.left <= ahead.elements,
                    "{what}: {ahead:?}"
                );
                // By itself it runs ahead as long as that pays.
                let (losses, ahead) = run(Ahead::Auto);
                assert_eq!(losses, waited, "{what}");
                assert_eq!(ahead.undone, undone.min(ahead.steps), "{what}");
                assert!(ahead.steps > 0, "{what}");
                assert_eq!(ahead.steps == STEPS, undone == 0, "{what}: {ahead:?}");
            }
        }
    }
}

#[test]
fn gradients_of_micro_batches_add_up_to_the_same_bits_on_every_tier() {
    for (dtype, clip) in [(DType::F32, Some(0.5)), (DType::Bf16, Some(1e9))] {
        let run = |placement, lookahead, pieces: usize, ahead| {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(dtype).in_micro_batches(pieces).unwrap();
            let mut options = options(folder.path());
            (options.placement, options.lookahead) = (placement, lookahead);
            (options.clip, options.ahead) = (clip, ahead);
            let options = with_budgets(options, &decoder);
            train(&mut create(&decoder, &options), &decoder, STEPS)
        };
        let reference = run(Policy::Resident, 2, 2, Ahead::Never);
        for placement in POLICIES {
            for lookahead in [0, 2] {
                let losses = run(placement, lookahead, 2, Ahead::Always);
                assert_eq!(losses, reference, "{placement:?}, look-ahead {lookahead}");
            }
        }
        let whole = run(Policy::Resident, 2, 1, Ahead::Never);
        for (a, b) in whole.iter().zip(&reference) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
            assert!((a - b).abs() < 0.02 * a, "{a} for {b}");
        }
    }
    // That is what they are for.
    let scratch = |pieces| {
        let config = forebay_decoder::Config::preset("125m").unwrap();
        let decoder = forebay_decoder::Decoder::new(config, 16, 512).unwrap();
        let decoder = decoder.in_micro_batches(pieces).unwrap();
        let footprint = decoder.footprint(forebay::Target::Cuda).unwrap();
        footprint.scratch_bytes
    };
    let (whole, pieces) = (scratch(1), scratch(16));
    assert!(3 * pieces < 2 * whole, "{pieces} bytes of {whole}");
}

#[test]
fn a_discarded_step_changes_nothing_on_any_tier() {
    for (clip, dtype) in [(Some(0.5), DType::F32), (None, DType::Bf16)] {
        for placement in POLICIES {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(dtype);
            let mut options = options(folder.path());
            (options.placement, options.clip) = (placement, clip);
            options.ahead = Ahead::Always;
            let options = match placement {
                Policy::Auto => split(options, &decoder, 1),
                _ => with_budgets(options, &decoder),
            };
            let mut trainer = create(&decoder, &options);
            train(&mut trainer, &decoder, 2);
            let before = eval(&mut trainer, &decoder);
            for _ in 0..2 {
                let (ids, targets) = common::tokens(trainer.steps());
                let batch = forebay_decoder::Batch {
                    ids: &ids,
                    targets: &targets,
                };
                let step = trainer.begin(5e-3).unwrap();
                decoder.train_step(&step, &batch).unwrap();
                assert!(step.discard().unwrap().loss.unwrap().is_finite());
            }
            assert_eq!(eval(&mut trainer, &decoder), before, "{placement:?}");
            assert_eq!((trainer.steps(), trainer.skipped()), (4, 0));
            train(&mut trainer, &decoder, 1);
            assert_ne!(eval(&mut trainer, &decoder), before, "it goes on learning");
        }
    }
}

#[test]
fn a_run_cut_into_pieces_gives_the_bits_of_the_whole_run() {
    for (clip, dtype) in [
        (Some(0.5), DType::F32),
        (None, DType::F32),
        (Some(0.5), DType::Bf16),
        (None, DType::Bf16),
    ] {
        let whole = run_in(dtype, |o| (o.placement, o.clip) = (Policy::Resident, clip));
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder_in(dtype);
        let mut pieces = Vec::new();
        for (index, (placement, steps)) in [
            (Policy::Auto, 3),
            (Policy::Disk, 2),
            (Policy::Resident, 1),
            (Policy::Pinned, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let mut options = options(folder.path());
            (options.placement, options.clip) = (placement, clip);
            options.lookahead = index as u32;
            let options = with_budgets(options, &decoder);
            let mut trainer = if index == 0 {
                create(&decoder, &options)
            } else {
                resume(&decoder, &options)
            };
            assert_eq!(trainer.steps(), pieces.len() as u64);
            pieces.extend(train(&mut trainer, &decoder, steps));
            trainer.publish("").unwrap();
        }
        assert_eq!(pieces, whole);
    }
}

#[test]
fn evaluating_and_publishing_between_steps_changes_no_bit() {
    let whole = run(|o| o.placement = Policy::Auto);
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder();
    let options = with_budgets(options(folder.path()), &decoder);
    let mut trainer = create(&decoder, &options);
    let mut bits = Vec::new();
    for _ in 0..STEPS {
        bits.push(common::step(&mut trainer, &decoder));
        let (ids, targets) = common::tokens(99);
        let step = trainer.eval().unwrap();
        let batch = forebay_decoder::Batch {
            ids: &ids,
            targets: &targets,
        };
        let loss = decoder.eval_loss(&step, &batch).unwrap();
        step.finish().unwrap();
        assert!(loss.is_finite());
        trainer.publish("").unwrap();
    }
    assert_eq!(bits, whole);
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_whole_step_on_every_tier() {
    for (clip, dtype) in [
        (Some(0.5), DType::F32),
        (None, DType::F32),
        (None, DType::Bf16),
    ] {
        for placement in POLICIES {
            let folder = tempfile::tempdir().unwrap();
            let decoder = decoder_in(dtype);
            let mut options = options(folder.path());
            (options.placement, options.clip) = (placement, clip);
            // Under Auto some of the states are on the device, some in pinned memory, some on disk.
            let options = match placement {
                Policy::Auto => split(options, &decoder, 1),
                _ => with_budgets(options, &decoder),
            };
            let mut trainer = create(&decoder, &options);
            train(&mut trainer, &decoder, 2);
            let before = eval(&mut trainer, &decoder);
            // The last gradient to leave is poisoned: with early updates, those of the others are
            // well under way before the norm is known.
            poisoned(&mut trainer, &decoder);
            trainer.settle().unwrap();
            assert_eq!(trainer.skipped(), 1);
            assert_eq!(
                eval(&mut trainer, &decoder),
                before,
                "{placement:?}, clip {clip:?}"
            );
            train(&mut trainer, &decoder, 1);
            assert_ne!(eval(&mut trainer, &decoder), before, "it goes on learning");
        }
    }
}

fn eval(trainer: &mut forebay::Trainer, decoder: &forebay_decoder::Decoder) -> u32 {
    let (ids, targets) = common::tokens(50);
    let step = trainer.eval().unwrap();
    let batch = forebay_decoder::Batch {
        ids: &ids,
        targets: &targets,
    };
    let loss = decoder.eval_loss(&step, &batch).unwrap();
    step.finish().unwrap();
    loss.to_bits()
}

/// A step in which one section's gradient is infinite.
fn poisoned(trainer: &mut forebay::Trainer, decoder: &forebay_decoder::Decoder) {
    let (ids, targets) = common::tokens(trainer.steps());
    let step = trainer.begin(5e-3).unwrap();
    let mut observer = |lease: &forebay::StageLease<'_>, id: forebay::SectionId| {
        // The embedding comes last: everything else is on its way by then.
        if id == forebay::SectionId(0) {
            let grad = lease.grad(id, "weight")?;
            step.launch(common::Poison, &[], &[grad])?;
        }
        Ok(())
    };
    let batch = forebay_decoder::Batch {
        ids: &ids,
        targets: &targets,
    };
    decoder
        .train_step_observed(&step, &batch, &mut observer)
        .unwrap();
    step.finish().unwrap();
}
