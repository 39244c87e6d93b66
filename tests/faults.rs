//! Training over the simulated disk: a fault at every operation of a short run. Whatever happens, the
//! outcome is the right bits, or a typed error with the old or the new generation on disk, from which
//! the run goes on to the right bits.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{decoder, go_on, options, try_step, with_budgets};
use forebay::nvme;
use forebay::nvme::sim::{Fault, SimDisk};
use forebay::{Error, Options, Policy, Result, Trainer, Updates};
use forebay_decoder::Decoder;

const STEPS: u64 = 3;

struct Setup {
    decoder: Decoder,
    options: Options,
}

impl Setup {
    /// States, parameters and gradients on disk; updates early, with undo, or after the norm.
    fn new(clip: Option<f64>) -> Self {
        Self::with(clip, Updates::Exact)
    }

    fn with(clip: Option<f64>, updates: Updates) -> Self {
        let decoder = decoder();
        let mut options = options(&PathBuf::from("disk"));
        options.placement = Policy::Disk;
        (options.clip, options.updates) = (clip, updates);
        let options = with_budgets(options, &decoder);
        Self { decoder, options }
    }

    fn on(&self, disk: &SimDisk) -> Options {
        Options {
            medium: Arc::new(disk.clone()),
            ..self.options.clone()
        }
    }

    /// Trains to the last step, publishing each; the bits of each step's loss.
    fn run(&self, disk: &SimDisk, bits: &mut Vec<(u64, u32)>) -> Result<()> {
        let options = self.on(disk);
        let mut trainer = go_on(&self.decoder, &options, disk)?;
        while trainer.steps() < STEPS {
            let step = trainer.steps();
            let loss = try_step(&mut trainer, &self.decoder)?;
            bits.push((step, loss));
            trainer.publish(&trainer.steps().to_string())?;
        }
        Ok(())
    }
}

#[test]
fn a_fault_at_any_operation_of_a_run_is_the_right_bits_or_an_error_to_resume_from() {
    // Every k-th operation; CI tries each.
    let stride: u64 = std::env::var("FOREBAY_FAULT_STRIDE").map_or(23, |n| n.parse().unwrap());
    for (clip, updates) in [
        (Some(0.5), Updates::Exact),
        (None, Updates::Exact),
        (Some(0.5), Updates::Delayed),
    ] {
        let setup = Setup::with(clip, updates);
        let whole = SimDisk::new(1);
        let mut right = Vec::new();
        setup.run(&whole, &mut right).unwrap();
        assert_eq!(right.len() as u64, STEPS);
        let operations = whole.operations();
        for fault in Fault::ALL {
            let (mut errors, mut silent) = (0, 0);
            for at in (stride / 2 % operations..operations).step_by(stride as usize) {
                let disk = SimDisk::new(at);
                disk.schedule(at, fault);
                let mut bits = Vec::new();
                let what = format!("{fault:?} at {at} of {operations}, clip {clip:?}, {updates:?}");
                let result = setup.run(&disk, &mut bits);
                for (step, loss) in &bits {
                    assert_eq!(*loss, right[*step as usize].1, "{what}: step {step}");
                }
                match &result {
                    Ok(()) => silent += 1,
                    Err(Error::Disk(_) | Error::Misuse(_) | Error::Generation { .. }) => {
                        errors += 1
                    }
                    Err(other) => panic!("{what}: {other}"),
                }
                disk.heal();
                finish(&setup, &disk, fault, &right, &what);
            }
            println!(
                "clip {clip:?}, {updates:?}, {fault:?}: {errors} errors, {silent} without harm"
            );
        }
    }
}

/// Goes on on the healed disk, from whatever generation is there.
fn finish(setup: &Setup, disk: &SimDisk, fault: Fault, right: &[(u64, u32)], what: &str) {
    let mut bits = Vec::new();
    match setup.run(disk, &mut bits) {
        Ok(()) => {}
        // A disk that lied about a write: found when it is read, and a snapshot is the only help.
        Err(Error::Disk(nvme::Error::Checksum { .. } | nvme::Error::Damaged { .. }))
            if matches!(fault, Fault::Lost | Fault::Misdirected) =>
        {
            return;
        }
        Err(other) => panic!("{what}, then: {other}"),
    }
    for (step, loss) in &bits {
        assert_eq!(
            *loss, right[*step as usize].1,
            "{what}: resumed at step {step}"
        );
    }
    let first = bits.first().map_or(STEPS, |b| b.0);
    assert_eq!(
        bits.len() as u64,
        STEPS - first,
        "{what}: no step is left out"
    );
}

#[test]
fn states_written_as_two_partitions_open_as_one_and_the_other_way() {
    let whole = {
        let setup = Setup::new(Some(0.5));
        let mut bits = Vec::new();
        setup.run(&SimDisk::new(1), &mut bits).unwrap();
        bits
    };
    for (before, after) in [
        ((2, 4096), (1, 4096)),
        ((1, 1 << 20), (2, 512)),
        ((3, 700), (2, 900)),
    ] {
        let disk = SimDisk::new(2);
        let mut bits = Vec::new();
        for ((partitions, chunk), steps) in [(before, 1), (after, 2), (before, STEPS)] {
            let mut setup = Setup::new(Some(0.5));
            (setup.options.device_budget, setup.options.pinned_budget) = (None, None);
            setup.options.partitions = partitions;
            setup.options.optimizer_chunk = Some(chunk);
            setup.options = with_budgets(setup.options, &setup.decoder);
            let options = setup.on(&disk);
            let mut trainer = go_on(&setup.decoder, &options, &disk).unwrap();
            while trainer.steps() < steps {
                let step = trainer.steps();
                bits.push((step, try_step(&mut trainer, &setup.decoder).unwrap()));
            }
            trainer.publish("").unwrap();
        }
        assert_eq!(bits, whole, "{before:?} then {after:?}");
    }
}

#[test]
fn damage_is_noticed_in_parts_that_are_put_together_too() {
    let disk = SimDisk::new(2);
    let mut setup = Setup::new(Some(0.5));
    setup.run(&disk, &mut Vec::new()).unwrap();
    let path = PathBuf::from("disk/data.forebay");
    let contents = disk.contents(&path).unwrap();
    // Any word of the states: an exponent of a number that is neither 0 nor text.
    let at = (1 << 17..contents.len())
        .find(|i| contents[*i] == 0x3d)
        .unwrap();
    setup.options.optimizer_chunk = Some(512);
    (setup.options.device_budget, setup.options.pinned_budget) = (None, None);
    setup.options = with_budgets(setup.options, &setup.decoder);
    let open = || {
        let options = setup.on(&disk);
        let footprint = setup.decoder.footprint(options.target().unwrap()).unwrap();
        Trainer::resume(setup.decoder.model().clone(), footprint, &options)
    };
    let places: Vec<usize> = (at..contents.len()).step_by(40_009).collect();
    let mut noticed = 0;
    for at in &places {
        disk.rot(&path, *at as u64, 1);
        match open() {
            Err(Error::Disk(nvme::Error::Checksum { .. })) => noticed += 1,
            // Free space, or the generation before.
            Ok(_) => {}
            Err(other) => panic!("{other}"),
        }
        disk.rot(&path, *at as u64, 1);
    }
    assert!(noticed > places.len() / 4, "{noticed} of {}", places.len());
    open().unwrap();
}

#[test]
fn a_disk_that_stops_answering_ends_the_run_in_its_time() {
    let setup = Setup::new(None);
    let whole = SimDisk::new(1);
    setup.run(&whole, &mut Vec::new()).unwrap();
    let disk = SimDisk::new(1);
    disk.schedule(whole.operations() / 2, Fault::Stuck);
    let start = std::time::Instant::now();
    let error = setup.run(&disk, &mut Vec::new()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("has not answered for 120s"), "{text}");
    assert!(
        start.elapsed().as_secs() < 60,
        "simulated time passes faster"
    );
}
