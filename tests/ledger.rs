//! Bytes: with optimizer states on disk and parameters in memory a step moves 24 bytes of payload a
//! parameter, and what a choice of publishing costs is what it says.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{create, decoder, options, resume, train, with_budgets};
use forebay::nvme::sim::SimDisk;
use forebay::{Options, Policy, Publish};

/// All optimizer states on disk, all parameters in pinned memory.
fn states_on_disk(folder: &std::path::Path, clip: Option<f64>) -> Options {
    let decoder = decoder();
    let mut options = options(folder);
    options.placement = Policy::Disk;
    options.clip = clip;
    let least = with_budgets(options.clone(), &decoder);
    // Parameters come before states as room grows.
    options.placement = Policy::Auto;
    options.device_budget = least.device_budget;
    let elements = decoder.model().elements();
    for extra in 0..64 {
        options.pinned_budget = Some(least.pinned_budget.unwrap() + extra * elements / 8);
        let scratch = Options {
            medium: Arc::new(SimDisk::new(0)),
            ..options.clone()
        };
        let traffic = create(&decoder, &scratch).report().traffic;
        if (traffic.disk_read, traffic.disk_write) == (12 * elements, 12 * elements) {
            return options;
        }
    }
    panic!("no budget keeps parameters, and only parameters, in memory");
}

#[test]
fn a_step_moves_24_bytes_of_payload_a_parameter() {
    for clip in [Some(0.5), None] {
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder();
        let options = states_on_disk(folder.path(), clip);
        let mut trainer = create(&decoder, &options);
        // Elements, what aligns tensors included.
        let elements: u64 = trainer.model().elements();
        let traffic = trainer.report().traffic;
        assert_eq!(
            (traffic.disk_read, traffic.disk_write),
            (12 * elements, 12 * elements)
        );
        assert_eq!(traffic.disk_states, 24 * elements, "and nothing else");
        train(&mut trainer, &decoder, 2);
        trainer.settle().unwrap();
        let before = trainer.report().disk_stats;
        train(&mut trainer, &decoder, 5);
        trainer.settle().unwrap();
        let after = trainer.report().disk_stats;
        let read = after.payload_read_bytes - before.payload_read_bytes;
        let written = after.payload_written_bytes - before.payload_written_bytes;
        assert_eq!(
            (read, written),
            (5 * 12 * elements, 5 * 12 * elements),
            "clip {clip:?}"
        );
        // Whole blocks: for parts of these sizes a few percent more.
        let blocks = after.written_bytes - before.written_bytes;
        assert!(
            blocks >= written && blocks < written + written / 8,
            "{blocks} of {written}"
        );
    }
}

#[test]
fn each_way_of_publishing_takes_the_space_that_it_says_and_gives_the_same_bits() {
    let decoder = decoder();
    let mut all = Vec::new();
    let mut spaces = Vec::new();
    for publish in [Publish::Often, Publish::End, Publish::Never] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = states_on_disk(folder.path(), Some(0.5));
        options.publish = publish;
        let mut trainer = create(&decoder, &options);
        let said = trainer.report().publish.space[publish as usize];
        let bits = train(&mut trainer, &decoder, 4);
        trainer.settle().unwrap();
        let used = std::fs::metadata(folder.path().join("data.forebay"))
            .unwrap()
            .len();
        assert_eq!(used, said, "{publish:?}");
        spaces.push(used);
        if publish == Publish::Never {
            let error = trainer.publish("").unwrap_err().to_string();
            assert!(error.contains("never"), "{error}");
            drop(trainer);
            let footprint = decoder.footprint(options.target().unwrap()).unwrap();
            let model = decoder.model().clone();
            let error = forebay::Trainer::resume(model, footprint, &options).unwrap_err();
            assert!(error.to_string().contains("write over"), "{error}");
        } else {
            trainer.publish("").unwrap();
            drop(trainer);
            let mut resumed = resume(&decoder, &options);
            assert_eq!(resumed.steps(), 4);
            let more = train(&mut resumed, &decoder, 2);
            all.push((bits.clone(), more));
        }
    }
    assert_eq!(all[0], all[1]);
    assert!(
        spaces[1] < spaces[0] && spaces[2] <= spaces[1],
        "{spaces:?}"
    );
}

#[test]
fn a_failed_publish_at_the_end_leaves_the_generation_that_was_resumed() {
    let decoder = decoder();
    let folder = tempfile::tempdir().unwrap();
    let mut options = states_on_disk(folder.path(), None);
    let mut trainer = create(&decoder, &options);
    train(&mut trainer, &decoder, 1);
    trainer.publish("first").unwrap();
    let right = train(&mut trainer, &decoder, 3);
    drop(trainer);
    // Opened for publishing at the end, and never getting there.
    options.publish = Publish::End;
    let mut trainer = resume(&decoder, &options);
    train(&mut trainer, &decoder, 3);
    drop(trainer);
    let mut trainer = resume(&decoder, &options);
    assert_eq!((trainer.steps(), trainer.user()), (1, "first"));
    assert_eq!(train(&mut trainer, &decoder, 3), right);
}
