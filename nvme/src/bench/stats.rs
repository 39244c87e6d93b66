//! Medians, percentiles, and how sure they are.

use std::time::Duration;

/// A median with its 95 % interval, by bootstrap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The median.
    pub median: f64,
    /// Below it in 2.5 % of resamples.
    pub low: f64,
    /// Above it in 2.5 % of resamples.
    pub high: f64,
}

impl Interval {
    /// Of some values.
    pub fn of(values: &[f64]) -> Self {
        const RESAMPLES: usize = 4000;
        let mut seed = 0x1234_5678_9abc_def1u64;
        let mut draw = |n: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % n.max(1) as u64) as usize
        };
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                median(
                    (0..values.len())
                        .map(|_| values[draw(values.len())])
                        .collect(),
                )
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        Self {
            median: median(values.to_vec()),
            low: medians[RESAMPLES / 40],
            high: medians[RESAMPLES - 1 - RESAMPLES / 40],
        }
    }
}

/// The middle value; of none, 0.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Latencies below which 50, 99 and 99.9 % are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Half.
    pub p50: Duration,
    /// 99 %.
    pub p99: Duration,
    /// 99.9 %.
    pub p999: Duration,
}

pub(super) fn percentiles(mut values: Vec<Duration>) -> Percentiles {
    values.sort_unstable();
    let at = |share: f64| {
        let index = (values.len() as f64 * share) as usize;
        values
            .get(index.min(values.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    };
    Percentiles {
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
    }
}

/// CPU time of this process so far, its kernel threads included.
pub fn cpu_seconds() -> f64 {
    // SAFETY: all-zero is a valid `rusage`, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_median_and_narrows_with_more_values() {
        let values = |n: usize| -> Vec<f64> {
            (0..n)
                .map(|i| 1.0 + ((i * 37) % 101) as f64 / 1000.0)
                .collect()
        };
        let (few, many) = (Interval::of(&values(10)), Interval::of(&values(1000)));
        for interval in [few, many] {
            assert!(interval.low <= interval.median && interval.median <= interval.high);
        }
        assert!(many.high - many.low < few.high - few.low);
        assert!((many.median - 1.05).abs() < 0.005);
        assert_eq!(median(vec![3.0, 1.0, 2.0, 10.0]), 2.5);
    }

    #[test]
    fn percentiles_are_of_the_sorted_values() {
        let values = (0..1000).rev().map(Duration::from_micros).collect();
        let found = percentiles(values);
        assert_eq!(found.p50, Duration::from_micros(500));
        assert_eq!(found.p99, Duration::from_micros(990));
        assert_eq!(found.p999, Duration::from_micros(999));
        assert_eq!(percentiles(Vec::new()), Percentiles::default());
    }
}
