//! Which block and depth a disk likes.
//!
//! A disk's rate drifts by more than its settings differ, so one pass over all of them finds only who
//! deserves a second look; what then replaces the usual setting has to win slice against slice.

use std::path::PathBuf;

use super::bare::Bare;
use super::stats::median;
use super::{Kind, Plan, Trial};
use crate::Error;
use crate::profile::Profile;

/// Bytes of a request, and requests under way.
type Setting = (u32, u32);

/// Large enough to cost little CPU, small enough to hold up nothing urgent, and with bytes enough
/// under way that a disk stays busy while the store sums a piece.
const USUAL: Setting = (1 << 20, 8);
/// Bytes under way at most: what is urgent waits for all of them.
const UNDER_WAY: u64 = 16 << 20;
/// How much faster another setting has to be.
const MARGIN: f64 = 1.05;
/// Settings given a second look, and rounds of it.
const RIVALS: usize = 3;
const ROUNDS: usize = 5;

/// Tries blocks and depths on the bare device: all of them, and the one to take.
pub(super) fn tune(
    plan: &Plan,
    bare: &mut Bare<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<(Vec<Trial>, u32, u32), Error> {
    let blocks = plan
        .block
        .map_or(vec![256 << 10, 1 << 20, 4 << 20], |b| vec![b]);
    let depths = plan.depth.map_or(vec![4, 8, 16, 32, 64], |d| vec![d]);
    if let ([block], [depth]) = (&blocks[..], &depths[..]) {
        return Ok((Vec::new(), *block, *depth));
    }
    let mut measure = |(block, depth): Setting| {
        progress(&format!(
            "trying blocks of {} KiB, depth {depth}",
            block >> 10
        ));
        bare.set(block, depth);
        Ok(Trial {
            block,
            depth,
            read_bytes_per_s: bare.slice(Kind::Read, plan.mix)?.rate(),
            write_bytes_per_s: bare.slice(Kind::Write, plan.mix)?.rate(),
        })
    };
    let mut trials: Vec<Trial> = Vec::new();
    for block in blocks {
        for depth in &depths {
            if plan.depth.is_some() || u64::from(block) * u64::from(*depth) <= UNDER_WAY {
                trials.push(measure((block, *depth))?);
            }
        }
    }
    let (block, depth) = settle(&mut trials, &mut measure)?;
    Ok((trials, block, depth))
}

/// The usual setting, or the nearest that was tried, unless another wins against it slice by slice.
fn settle(
    trials: &mut [Trial],
    measure: &mut dyn FnMut(Setting) -> Result<Trial, Error>,
) -> Result<Setting, Error> {
    let distance = |t: &Trial| (t.block.abs_diff(USUAL.0), t.depth.abs_diff(USUAL.1));
    let Some(usual) = (0..trials.len()).min_by_key(|i| distance(&trials[*i])) else {
        return Ok(USUAL);
    };
    let mut rivals: Vec<usize> = (0..trials.len()).filter(|i| *i != usual).collect();
    rivals.sort_by(|a, b| trials[*b].both().total_cmp(&trials[*a].both()));
    let mut best = usual;
    for rival in rivals.into_iter().take(RIVALS) {
        let mut ratios = Vec::new();
        for _ in 0..ROUNDS {
            let mut rates = [0.0; 2];
            // There and back, so that a steady drift favours neither.
            for i in [best, rival, rival, best] {
                let trial = measure((trials[i].block, trials[i].depth))?;
                rates[usize::from(i == rival)] += trial.both();
                if trial.both() > trials[i].both() {
                    trials[i] = trial;
                }
            }
            ratios.push(rates[1] / rates[0]);
        }
        if median(ratios) > MARGIN {
            best = rival;
        }
    }
    Ok((trials[best].block, trials[best].depth))
}

/// Keeps a disk's profile for the stores to come.
pub(super) fn keep(trials: &[Trial], block: u32, depth: u32, plan: &Plan) -> Option<PathBuf> {
    let chosen = trials
        .iter()
        .find(|t| (t.block, t.depth) == (block, depth))?;
    let profile = Profile {
        block,
        depth,
        read_bytes_per_s: chosen.read_bytes_per_s,
        write_bytes_per_s: chosen.write_bytes_per_s,
        measured: std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs()),
    };
    // Without a home the figures are all there is.
    profile.keep(&plan.folder).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that is a tenth faster at every call, for a while.
    fn settled(rate: impl Fn(Setting) -> f64) -> Setting {
        let mut calls = 0;
        let mut measure = |(block, depth): Setting| {
            calls += 1;
            let rate = rate((block, depth)) * (1.0 + f64::from(calls % 20) / 10.0);
            Ok(Trial {
                block,
                depth,
                read_bytes_per_s: rate,
                write_bytes_per_s: rate,
            })
        };
        let settings = [256 << 10, 1 << 20, 4 << 20]
            .into_iter()
            .flat_map(|block| [4, 8, 16, 32].map(|depth| (block, depth)));
        let mut trials: Vec<Trial> = settings.map(|s| measure(s).unwrap()).collect();
        settle(&mut trials, &mut measure).unwrap()
    }

    #[test]
    fn a_disk_that_drifts_keeps_the_usual_setting() {
        assert_eq!(settled(|_| 1.0), USUAL);
        assert_eq!(settled(|(_, depth)| f64::from(depth).powf(0.01)), USUAL);
    }

    #[test]
    fn a_setting_that_is_clearly_faster_is_taken() {
        let fast = (256 << 10, 32);
        assert_eq!(settled(|s| if s == fast { 2.0 } else { 1.0 }), fast);
    }
}
