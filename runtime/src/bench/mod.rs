//! What the link and the kernels reach, beside bare code in the same run. (The disk's part is
//! [`crate::nvme::bench`].)
//!
//! As there, a round is a slice of bare code, one of ours and a second bare one, in an order that
//! changes; the ratio of a round is ours to bare, its control bare to bare. Given are medians with 95 %
//! intervals.

pub mod adam;
mod gpu;
pub mod kernels;
pub mod pcie;
pub mod traffic;

use crate::error::Result;
use crate::nvme::bench::{Interval, median};

/// One slice.
#[derive(Clone, Copy, Debug)]
struct Slice {
    bytes: f64,
    seconds: f64,
    cpu_seconds: f64,
}

impl Slice {
    fn rate(&self) -> f64 {
        self.bytes / self.seconds
    }
}

/// Ours beside bare code.
#[derive(Clone, Debug)]
pub struct Duel {
    /// Bytes per second of bare code, median.
    pub bare_bytes_per_s: f64,
    /// Bytes per second of ours, median.
    pub ours_bytes_per_s: f64,
    /// Ours to bare.
    pub ratio: Interval,
    /// Bare to bare.
    pub control: Interval,
    /// CPU seconds of the whole process for each 10^9 bytes: bare.
    pub bare_cpu_s_per_gb: f64,
    /// The same with ours.
    pub ours_cpu_s_per_gb: f64,
}

/// Takes `rounds` rounds.
fn duel(
    rounds: u32,
    bare: &mut dyn FnMut() -> Result<Slice>,
    ours: &mut dyn FnMut() -> Result<Slice>,
) -> Result<Duel> {
    let (mut bares, mut through) = (Vec::new(), Vec::new());
    let (mut ratios, mut controls) = (Vec::new(), Vec::new());
    // One of each to warm up.
    bare()?;
    ours()?;
    for round in 0..rounds {
        let (first, own, second);
        match round % 3 {
            0 => (first, own, second) = (bare()?, ours()?, bare()?),
            1 => (own, first, second) = (ours()?, bare()?, bare()?),
            _ => (second, first, own) = (bare()?, bare()?, ours()?),
        }
        ratios.push(own.rate() / first.rate());
        controls.push(second.rate() / first.rate());
        bares.extend([first, second]);
        through.push(own);
    }
    let rate = |slices: &[Slice]| median(slices.iter().map(Slice::rate).collect());
    let cpu = |slices: &[Slice]| {
        let cpu: f64 = slices.iter().map(|s| s.cpu_seconds).sum();
        cpu / (slices.iter().map(|s| s.bytes).sum::<f64>() / 1e9)
    };
    Ok(Duel {
        bare_bytes_per_s: rate(&bares),
        ours_bytes_per_s: rate(&through),
        ratio: Interval::of(&ratios),
        control: Interval::of(&controls),
        bare_cpu_s_per_gb: cpu(&bares),
        ours_cpu_s_per_gb: cpu(&through),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duel_pairs_slices_of_the_same_round() {
        // A machine that doubles its speed from one round to the next: ratios stay what they are.
        let calls = std::cell::Cell::new(0u32);
        let slice = |factor: f64| {
            // Two calls warm up, three make a round.
            let round = calls.get().saturating_sub(2) / 3;
            calls.set(calls.get() + 1);
            Ok(Slice {
                bytes: 1e9 * factor * 2f64.powi(round as i32),
                seconds: 1.0,
                cpu_seconds: 0.5,
            })
        };
        let duel = duel(9, &mut || slice(1.0), &mut || slice(0.75)).unwrap();
        assert_eq!((duel.ratio.low, duel.ratio.high), (0.75, 0.75));
        assert_eq!((duel.control.low, duel.control.high), (1.0, 1.0));
        assert_eq!(duel.ours_bytes_per_s, 0.75e9 * 16.0);
        assert_eq!(calls.get(), 29);
    }
}
