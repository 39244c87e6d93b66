//! The decoder on the real trainer: both families learn, and what it measures of itself is true.
#![allow(clippy::unwrap_used)]

use forebay::{DeviceChoice, Options, RandomInit, Target, Trainer};
use forebay_decoder::{Batch, Config, Decoder, Family, Positions};

fn config(family: Family, tied: bool) -> Config {
    Config {
        family,
        hidden: 32,
        intermediate: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocabulary: 20,
        tied,
        ..Config::byte_level()
    }
}

fn open(decoder: &Decoder, folder: &std::path::Path) -> Trainer {
    let mut options = Options::new([folder.to_owned()]);
    options.threads = 2;
    (options.device_budget, options.pinned_budget) = (Some(4 << 20), Some(4 << 20));
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let mut seed = RandomInit { seed: 3 };
    Trainer::create(decoder.model().clone(), footprint, &options, &mut seed).unwrap()
}

#[test]
fn both_families_learn_a_pattern_and_then_predict_it() {
    for (family, tied) in [(Family::Llama, false), (Family::Qwen3, true)] {
        let folder = tempfile::tempdir().unwrap();
        let decoder = Decoder::new(config(family, tied), 2, 20).unwrap();
        let mut trainer = open(&decoder, folder.path());
        // Each token follows from the two before it.
        let text: Vec<u32> = (0..21)
            .scan((1, 2), |s, _| {
                *s = (s.1, (s.0 * 3 + s.1) % 20);
                Some(s.1)
            })
            .collect();
        let ids = [&text[..20], &text[..20]].concat();
        let targets = [&text[1..], &text[1..]].concat();
        let mut losses = Vec::new();
        for _ in 0..80 {
            let step = trainer.begin(5e-3).unwrap();
            decoder
                .train_step(
                    &step,
                    &Batch {
                        ids: &ids,
                        targets: &targets,
                    },
                )
                .unwrap();
            losses.push(step.finish().unwrap().loss.unwrap());
        }
        assert!(
            losses[0] > 2.5 && losses[79] < 0.2,
            "{family:?}: {losses:?}"
        );
        let step = trainer.eval().unwrap();
        let logits = decoder
            .logits(&step, &text[..12], 12, Positions::Last)
            .unwrap();
        step.finish().unwrap();
        let best = (0..20)
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
            .unwrap();
        assert_eq!(best as u32, text[12], "{family:?}");
    }
}

#[test]
fn the_footprint_is_what_a_step_really_uses() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = Decoder::new(config(Family::Qwen3, false), 2, 20).unwrap();
    let footprint = decoder.footprint(Target::Host { threads: 2 }).unwrap();
    let options = Options {
        threads: 2,
        ..Options::new([folder.path().to_owned()])
    };
    let mut less = footprint;
    less.scratch_bytes -= 4096;
    let run = |footprint, folder: &std::path::Path| -> forebay::Result<()> {
        let mut options = Options::new([folder.to_owned()]);
        (options.threads, options.device) = (2, DeviceChoice::Host);
        (options.device_budget, options.pinned_budget) = (Some(4 << 20), Some(4 << 20));
        let mut seed = RandomInit { seed: 3 };
        let mut trainer = Trainer::create(decoder.model().clone(), footprint, &options, &mut seed)?;
        let step = trainer.begin(1e-3)?;
        decoder.train_step(
            &step,
            &Batch {
                ids: &[1; 40],
                targets: &[2; 40],
            },
        )?;
        step.finish().map(|_| ())
    };
    assert_eq!(options.threads, 2);
    run(footprint, folder.path()).unwrap();
    let other = tempfile::tempdir().unwrap();
    let error = run(less, other.path()).unwrap_err();
    assert!(matches!(error, forebay::Error::Scratch { .. }), "{error}");
    assert!(error.to_string().contains("forebay::footprint"));
}

#[test]
fn the_footprint_foresees_the_products_of_a_step_and_of_layers_computed_again() {
    let config = Config {
        layers: 5,
        ..config(Family::Llama, false)
    };
    let (tokens, seq, heads, head_dim) = (40, 20, 4, 8);
    let flops = |every| {
        let decoder = Decoder::new(config.clone(), tokens / seq, seq).unwrap();
        let decoder = decoder.with_checkpoints_every(every).unwrap();
        let footprint = decoder.footprint(Target::Host { threads: 1 }).unwrap();
        footprint.flops as usize
    };
    let product = |n: usize, k: usize| 2 * tokens * n * k;
    // Queries and output, keys and values; gate and up; down. Scores and their sums, of which half are masked.
    let attention = 2 * product(32, 32) + 2 * product(16, 32);
    let (wide, down) = (2 * product(64, 32), product(32, 64));
    let scores = tokens * seq * heads * head_dim;
    let forward = attention + wide + down + 2 * scores;
    // Forward again but for what is down last, and each product twice for its gradients.
    let backward = forward - down + 2 * (attention + wide + down) + 5 * scores;
    assert_eq!(flops(1), 5 * (forward + backward) + 3 * product(20, 32));
    // Of groups of two, three and more layers: all but the last one of each, and none of the last group.
    for (every, again) in [(2, 2), (3, 2), (4, 3), (5, 0)] {
        assert_eq!(flops(every) - flops(1), again * forward, "every {every}");
    }
}

#[test]
fn an_id_outside_the_vocabulary_fails_the_device_and_says_so_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = Decoder::new(config(Family::Llama, false), 1, 4).unwrap();
    let mut trainer = open(&decoder, folder.path());
    let step = trainer.begin(1e-3).unwrap();
    let bad = Batch {
        ids: &[1, 2, 99, 3],
        targets: &[1; 4],
    };
    let error = decoder
        .train_step(&step, &bad)
        .and_then(|()| step.finish().map(|_| ()))
        .unwrap_err();
    // The host device names the id, a GPU its position.
    let words = ["token id 99", "token id at position 2"];
    let named = words.iter().any(|w| error.to_string().contains(w));
    assert!(named, "{error}");
    let error = trainer.begin(1e-3).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("resume from the last generation"),
        "{error}"
    );
}

#[test]
fn using_a_step_out_of_order_is_an_error_not_a_wrong_result() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = Decoder::new(config(Family::Llama, false), 1, 4).unwrap();
    let mut trainer = open(&decoder, folder.path());
    let step = trainer.begin(1e-3).unwrap();
    assert!(
        step.enter(forebay::StageId::from(1))
            .unwrap_err()
            .to_string()
            .contains("'embed' is due")
    );
    let lease = step.enter(forebay::StageId::from(0)).unwrap();
    assert!(
        step.enter(forebay::StageId::from(1)).is_err(),
        "the lease before is alive"
    );
    assert!(
        lease.param(forebay::SectionId(1), "weight").is_err(),
        "not declared by the stage"
    );
    assert!(
        lease.param(forebay::SectionId(0), "wait").is_err(),
        "no such tensor"
    );
    assert!(lease.grad(forebay::SectionId(0), "weight").is_err());
    drop(lease);
    assert!(
        step.finish()
            .unwrap_err()
            .to_string()
            .contains("before stage 'layer 0 forward' ran")
    );
    let error = trainer.begin(1e-3).unwrap_err();
    assert!(
        error.to_string().contains("dropped before its end"),
        "{error}"
    );
}
