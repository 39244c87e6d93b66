//! `kill -9` at random instants: what is resumed is always the old or the new generation, and goes
//! on with the bits of the uninterrupted run. FOREBAY_KILL_ROUNDS sets the number of kills.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{create, decoder, options, resume, step, with_budgets};
use forebay::{Ahead, Policy};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FOLDER: &str = "FOREBAY_TEST_KILL_FOLDER";
const NAME: &str = "killed_at_any_instant_a_run_resumes_on_the_bits_of_the_whole_run";
const STEPS: u64 = 400;
const PUBLISH: u64 = 3;

/// Trains and tells of each step and generation, until it is killed or done.
fn child(folder: &Path) {
    let decoder = decoder();
    let mut options = options(folder);
    options.placement = Policy::Auto;
    // Each timing of updates, the one kept with the folder: behind the norm, before it on disk, and ahead of it in
    // pinned memory.
    options.clip = (!folder.ends_with("early")).then_some(0.5);
    if folder.ends_with("ahead") {
        (options.placement, options.ahead) = (Policy::Pinned, Ahead::Always);
    }
    let options = with_budgets(options, &decoder);
    let exists = forebay::stored_user_text(folder).is_ok();
    let mut trainer = if exists {
        resume(&decoder, &options)
    } else {
        create(&decoder, &options)
    };
    let mut out = std::io::stdout();
    writeln!(out, "opened {}", trainer.steps()).unwrap();
    while trainer.steps() < STEPS {
        let index = trainer.steps();
        writeln!(out, "step {index} {}", step(&mut trainer, &decoder)).unwrap();
        if trainer.steps().is_multiple_of(PUBLISH) {
            trainer.publish("").unwrap();
            writeln!(out, "published {}", trainer.steps()).unwrap();
        }
    }
}

/// What a killed child said: its last published step, checked against all that is known.
fn check(text: &str, published: u64, known: &mut HashMap<u64, u32>) -> u64 {
    let mut newest = published;
    for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["opened", at] => {
                let at: u64 = at.parse().unwrap();
                // Old or new: at most the generation that was being published is ahead of it.
                assert!(
                    at == published || at == published + PUBLISH,
                    "{at} after {published}"
                );
                newest = at;
            }
            ["step", index, bits] => {
                let (index, bits) = (index.parse().unwrap(), bits.parse().unwrap());
                assert_eq!(*known.entry(index).or_insert(bits), bits, "step {index}");
            }
            ["published", at] => newest = at.parse().unwrap(),
            _ => {}
        }
    }
    newest
}

#[test]
fn killed_at_any_instant_a_run_resumes_on_the_bits_of_the_whole_run() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return child(Path::new(&folder));
    }
    let rounds: u32 = std::env::var("FOREBAY_KILL_ROUNDS").map_or(12, |n| n.parse().unwrap());
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("{rounds} rounds, seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for name in ["late", "early", "ahead"] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let (mut published, mut known) = (0, HashMap::new());
        let (mut kills, mut advanced) = (0, 0);
        while kills < rounds.div_ceil(3) {
            let out = std::fs::File::create(root.path().join("out")).unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", NAME, "--nocapture"])
                .env(FOLDER, &folder)
                .stdout(out)
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(rng.random_range(5..350)));
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            let text = std::fs::read_to_string(root.path().join("out")).unwrap();
            let newest = check(&text, published, &mut known);
            advanced += u64::from(newest > published);
            published = newest;
            if published + 20 > STEPS {
                // Near its end: begin anew, on the bits that are known by now.
                std::fs::remove_dir_all(&folder).unwrap();
                std::fs::create_dir(&folder).unwrap();
                published = 0;
            }
        }
        assert!(advanced > 0, "no round got as far as a generation");
        // What every killed run said is what the uninterrupted one says.
        let whole = tempfile::tempdir().unwrap();
        let decoder = decoder();
        let mut options = options(whole.path());
        options.placement = Policy::Resident;
        options.clip = (name != "early").then_some(0.5);
        let options = with_budgets(options, &decoder);
        let mut trainer = create(&decoder, &options);
        let last = known.keys().max().copied().unwrap();
        for index in 0..=last {
            let bits = step(&mut trainer, &decoder);
            assert!(
                known.get(&index).is_none_or(|k| *k == bits),
                "{name}: step {index}"
            );
        }
        println!("{name}: {kills} kills, {advanced} of them past a new generation, {last} steps");
    }
}
