//! Checkpoints of every n-th layer only: the same bits, for less of memory and of the link.
#![allow(clippy::unwrap_used)]

mod common;

use common::{BATCH, SEQ, create, options, resume, tokens, with_budgets};
use forebay::{DType, Options, Policy, SectionId, StageLease, Trainer};
use forebay_decoder::{Batch, Config, Decoder, Family};

const LAYERS: usize = 5;
/// Those that divide the layers, those that do not, and more than there are.
const INTERVALS: [usize; 6] = [1, 2, 3, 4, 5, 9];

fn decoder(family: Family, dtype: DType, pieces: usize, every: usize) -> Decoder {
    let config = Config {
        family,
        layers: LAYERS,
        ..common::config()
    };
    let decoder = Decoder::compute_in(dtype, config, BATCH, SEQ).unwrap();
    let decoder = decoder.in_micro_batches(pieces).unwrap();
    decoder.with_checkpoints_every(every).unwrap()
}

/// The bits of a step's loss and of each gradient.
fn step(trainer: &mut Trainer, decoder: &Decoder) -> Vec<u32> {
    let (ids, targets) = tokens(trainer.steps());
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    let sections = decoder.model().sections();
    let mut bits = Vec::new();
    let step = trainer.begin(5e-3).unwrap();
    let mut observer = |lease: &StageLease<'_>, id: SectionId| {
        for tensor in sections[id.0 as usize].tensors() {
            let mut values = vec![0.0; tensor.shape.elements()];
            let grad = lease.grad(id, &tensor.name)?;
            step.read(&grad.as_ref(), &mut values)?;
            bits.extend(values.iter().map(|v: &f32| v.to_bits()));
        }
        Ok(())
    };
    decoder
        .train_step_observed(&step, &batch, &mut observer)
        .unwrap();
    bits.push(step.finish().unwrap().loss.unwrap().to_bits());
    bits
}

fn run(decoder: &Decoder, change: impl Fn(&mut Options)) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    change(&mut options);
    let options = with_budgets(options, decoder);
    let mut trainer = create(decoder, &options);
    (0..3).flat_map(|_| step(&mut trainer, decoder)).collect()
}

#[test]
fn every_interval_gives_the_same_losses_and_gradients() {
    for family in [Family::Llama, Family::Qwen3] {
        for (dtype, pieces) in [
            (DType::F32, 1),
            (DType::F32, 2),
            (DType::Bf16, 1),
            (DType::Bf16, 2),
        ] {
            let with = |every, placement, lookahead| {
                let decoder = decoder(family, dtype, pieces, every);
                run(&decoder, |o| {
                    (o.placement, o.lookahead) = (placement, lookahead)
                })
            };
            let reference = with(1, Policy::Resident, 2);
            for every in INTERVALS {
                for (placement, lookahead) in [
                    (Policy::Resident, 2),
                    (Policy::Pinned, 1),
                    (Policy::Auto, 3),
                    (Policy::Disk, 0),
                ] {
                    let what = format!("{family:?}, {dtype}, {pieces} pieces, every {every}");
                    let got = with(every, placement, lookahead);
                    assert!(got == reference, "{what}, {placement:?}");
                }
            }
            // It can fail.
            let other = decoder(family, dtype, pieces, 2);
            let other = run(&other, |o| o.optimizer = o.optimizer.with_decay(0.11));
            assert_ne!(other, reference);
        }
    }
}

#[test]
fn a_run_goes_on_with_another_interval() {
    let folder = tempfile::tempdir().unwrap();
    let first = decoder(Family::Llama, DType::F32, 1, 1);
    let mut trainer = create(&first, &with_budgets(options(folder.path()), &first));
    let mut bits = step(&mut trainer, &first);
    trainer.publish("").unwrap();
    drop(trainer);
    let second = decoder(Family::Llama, DType::F32, 1, 3);
    let mut trainer = resume(&second, &with_budgets(options(folder.path()), &second));
    bits.extend(step(&mut trainer, &second));
    bits.extend(step(&mut trainer, &second));
    assert_eq!(bits, run(&first, |_| ()));
}

#[test]
fn an_interval_of_n_keeps_and_moves_an_nth_of_the_checkpoints() {
    let state = (BATCH * SEQ * common::config().hidden * 4) as u64;
    let of = |every| {
        let decoder = decoder(Family::Llama, DType::F32, 1, every);
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        (options.placement, options.ahead) = (Policy::Disk, forebay::Ahead::Never);
        let options = with_budgets(options, &decoder);
        let report = create(&decoder, &options).report();
        let budgets = [options.device_budget, options.pinned_budget].map(Option::unwrap);
        (report.keeps.checkpoints[1], report.traffic.d2h, budgets)
    };
    let (all, out, [device, pinned]) = of(1);
    assert_eq!(all, LAYERS as u64);
    // Of groups of two layers the last one is a single layer; the last group needs no checkpoint.
    for (every, left) in [(2, 2), (3, 1), (4, 1), (5, 0), (9, 0)] {
        let (checkpoints, d2h, budgets) = of(every);
        assert_eq!(checkpoints, left, "every {every}");
        assert_eq!(out - d2h, (all - left) * state, "every {every}");
        // In whole pages.
        let slab = state.next_multiple_of(4096);
        assert_eq!(pinned - budgets[1], (all - left) * slab, "every {every}");
        // For it a group's inputs are in scratch memory.
        let grown = budgets[0].saturating_sub(device);
        assert!(
            grown > 0 && grown <= every.min(LAYERS) as u64 * state,
            "every {every}: {grown}"
        );
    }
}

#[test]
fn an_interval_of_nothing_is_refused() {
    let decoder = decoder(Family::Llama, DType::F32, 1, 1);
    let error = decoder.with_checkpoints_every(0).unwrap_err().to_string();
    assert!(error.contains("1 or more"), "{error}");
}
