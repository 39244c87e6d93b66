//! Every optimizer, and every way to keep its states: the same bits wherever states live, whether updates ran ahead of
//! the norm, and after a resume.
#![allow(clippy::unwrap_used)]

mod common;

use common::{create, decoder_in, options, resume, train, with_budgets};
use forebay::{Ahead, DType, Error, Moment, Optimizer, Options, Policy, Updates};

const STEPS: u64 = 5;
const NAMES: [&str; 5] = ["adamw", "sgd", "lion", "adagrad", "lamb"];
const POLICIES: [Policy; 4] = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk];

/// A way to keep states.
#[derive(Clone, Copy, Debug)]
struct Kept {
    dtype: DType,
    moments: Moment,
    split: bool,
}

fn kept(dtype: DType, moments: Moment, split: bool) -> Kept {
    Kept {
        dtype,
        moments,
        split,
    }
}

/// Five steps, and two more after a resume.
fn run(name: &str, kept: Kept, change: impl Fn(&mut Options)) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(kept.dtype);
    let mut options = options(folder.path());
    options.optimizer = name.parse().unwrap();
    (options.moments, options.split_master) = (kept.moments, kept.split);
    // One that does not fire.
    options.clip = Some(1e9);
    if name == "lamb" {
        options.optimizer_chunk = None;
    }
    change(&mut options);
    let options = with_budgets(options, &decoder);
    let mut trainer = create(&decoder, &options);
    let mut losses = train(&mut trainer, &decoder, STEPS);
    trainer.publish("").unwrap();
    drop(trainer);
    losses.extend(train(&mut resume(&decoder, &options), &decoder, 2));
    losses
}

fn all_placements(name: &str, kept: Kept) -> Vec<u32> {
    let reference = run(name, kept, |o| o.placement = Policy::Resident);
    // LAMB cannot.
    let always = match name {
        "lamb" => Ahead::Auto,
        _ => Ahead::Always,
    };
    for placement in POLICIES {
        for (lookahead, clip, ahead) in [
            (2, Some(1e9), always),
            (0, Some(1e9), Ahead::Never),
            (1, None, always),
        ] {
            let got = run(name, kept, |o| {
                (o.placement, o.lookahead) = (placement, lookahead);
                (o.clip, o.ahead) = (clip, ahead);
            });
            assert_eq!(
                got, reference,
                "{name} {kept:?} {placement:?} {lookahead} {clip:?}"
            );
        }
    }
    // A clip that fires undoes what ran ahead.
    let clipped = |placement, ahead| {
        run(name, kept, |o| {
            (o.placement, o.clip, o.ahead) = (placement, Some(0.01), ahead);
        })
    };
    let waited = clipped(Policy::Resident, Ahead::Never);
    for placement in POLICIES {
        let got = clipped(placement, always);
        assert_eq!(got, waited, "{name} {kept:?} {placement:?}, undone");
    }
    reference
}

#[test]
fn every_optimizer_gives_the_same_bits_on_every_tier() {
    let mut seen = Vec::new();
    for name in NAMES {
        let losses = all_placements(name, kept(DType::F32, Moment::F32, false));
        assert!(!seen.contains(&losses), "{name} does what another does");
        seen.push(losses);
    }
}

#[test]
fn a_split_master_has_the_bits_of_a_whole_one_on_every_tier() {
    for name in ["adamw", "lamb"] {
        let whole = run(name, kept(DType::Bf16, Moment::F32, false), |_| {});
        let split = all_placements(name, kept(DType::Bf16, Moment::F32, true));
        assert_eq!(split, whole, "{name}");
    }
}

#[test]
fn bf16_moments_give_the_same_bits_on_every_tier_and_others_than_fp32_ones() {
    for name in ["adamw", "sgd"] {
        let wide = run(name, kept(DType::Bf16, Moment::F32, false), |_| {});
        let narrow = all_placements(name, kept(DType::Bf16, Moment::Bf16, false));
        assert_ne!(narrow, wide, "{name}");
        let (wide, narrow) = (f32::from_bits(wide[6]), f32::from_bits(narrow[6]));
        assert!(
            (wide - narrow).abs() < 0.02 * wide,
            "{name}: {narrow} for {wide}"
        );
        let both = all_placements(name, kept(DType::Bf16, Moment::Bf16, true));
        assert_eq!(f32::from_bits(both[6]), narrow, "{name}, split");
    }
}

#[test]
fn states_take_the_bytes_that_their_format_says() {
    let bytes = |name: &str, kept: Kept| {
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder_in(kept.dtype);
        let mut options = options(folder.path());
        options.optimizer = name.parse().unwrap();
        (options.moments, options.split_master) = (kept.moments, kept.split);
        options.placement = Policy::Disk;
        let options = with_budgets(options, &decoder);
        let elements = decoder.model().elements();
        let traffic = create(&decoder, &options).report().traffic;
        (
            options.state_bytes(),
            (traffic.disk_write as f64 / elements as f64).round(),
        )
    };
    let f32s = |split| kept(DType::Bf16, Moment::F32, split);
    // States, gradients and parameters, once each.
    assert_eq!(bytes("adamw", f32s(false)), (12, 16.0));
    assert_eq!(bytes("adamw", f32s(true)), (10, 14.0));
    let bf16s = kept(DType::Bf16, Moment::Bf16, true);
    assert_eq!(bytes("adamw", bf16s), (6, 10.0));
    assert_eq!(bytes("lion", f32s(false)), (8, 12.0));
}

#[test]
fn delayed_updates_give_the_same_bits_on_every_tier_whatever_the_optimizer() {
    // In f16 under a scale that the first steps overflow.
    for (name, dtype) in [("sgd", DType::F16), ("lamb", DType::Bf16)] {
        let kept = kept(dtype, Moment::Bf16, false);
        let delayed = |placement| {
            run(name, kept, |o| {
                (o.placement, o.updates) = (placement, Updates::Delayed);
            })
        };
        let reference = delayed(Policy::Resident);
        for placement in POLICIES {
            assert_eq!(delayed(placement), reference, "{name} {placement:?}");
        }
        assert_ne!(run(name, kept, |_| {}), reference, "{name}");
    }
}

fn refused(change: impl Fn(&mut Options)) -> String {
    refused_in(DType::F32, change)
}

fn refused_in(dtype: DType, change: impl Fn(&mut Options)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let decoder = decoder_in(dtype);
    let mut options = with_budgets(options(folder.path()), &decoder);
    change(&mut options);
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let error = forebay::requirements(decoder.model(), footprint, &options).unwrap_err();
    assert!(matches!(error, Error::Misuse(_)), "{error}");
    error.to_string()
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_do() {
    let what = refused(|o| o.split_master = true);
    assert!(what.contains("bf16") && what.contains("fp32"), "{what}");
    let what = refused_in(DType::Bf16, |o| {
        (o.split_master, o.updates) = (true, Updates::Delayed);
    });
    assert!(what.contains("one or the other"), "{what}");
    let what = refused(|o| {
        (o.optimizer, o.ahead) = ("lamb".parse().unwrap(), Ahead::Always);
    });
    assert!(what.contains("auto"), "{what}");
    let what = refused(|o| o.optimizer = "lamb".parse().unwrap());
    assert!(what.contains("optimizer_chunk"), "{what}");
    let what = refused(|o| {
        (o.optimizer, o.moments) = ("adagrad".parse().unwrap(), Moment::Bf16);
    });
    assert!(what.contains("fp32"), "{what}");
    let what = "adam".parse::<Optimizer>().unwrap_err();
    assert!(what.contains("adamw") && what.contains("lamb"), "{what}");
}

#[test]
fn a_generation_of_other_states_is_refused_by_name() {
    let kinds = [
        (
            "adamw",
            Moment::F32,
            false,
            "adamw with fp32 moments and fp32",
        ),
        (
            "adamw",
            Moment::Bf16,
            false,
            "adamw with bf16 moments and fp32",
        ),
        (
            "adamw",
            Moment::F32,
            true,
            "adamw with fp32 moments and split",
        ),
        ("lamb", Moment::F32, false, "lamb"),
        ("lion", Moment::F32, false, "lion"),
        ("sgd", Moment::F32, false, "sgd"),
    ];
    let decoder = decoder_in(DType::Bf16);
    let with = |folder: &std::path::Path, kind: usize| {
        let (name, moments, split, _) = kinds[kind];
        let mut options = options(folder);
        options.optimizer = name.parse().unwrap();
        (options.moments, options.split_master) = (moments, split);
        options.optimizer_chunk = None;
        with_budgets(options, &decoder)
    };
    for made in 0..kinds.len() {
        let folder = tempfile::tempdir().unwrap();
        let options = with(folder.path(), made);
        let mut trainer = create(&decoder, &options);
        train(&mut trainer, &decoder, 1);
        trainer.publish("").unwrap();
        drop(trainer);
        for asked in (0..kinds.len()).filter(|asked| *asked != made) {
            let other = with(folder.path(), asked);
            let footprint = decoder.footprint(other.target().unwrap()).unwrap();
            let model = decoder.model().clone();
            let error = forebay::Trainer::resume(model, footprint, &other).unwrap_err();
            let what = error.to_string();
            let both = [made, asked].map(|kind| what.contains(kinds[kind].3));
            assert_eq!(both, [true; 2], "{what}");
        }
        assert_eq!(resume(&decoder, &options).steps(), 1);
    }
}
