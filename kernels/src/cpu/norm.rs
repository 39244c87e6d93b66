//! The sum of squares of a gradient: what clipping by global norm and overflow checks need.

use half::{bf16, f16};

use super::cast::widen_f16;
use super::shared::Shared;
use super::workers::Workers;

/// Pieces that a sum is cut into, whatever its length and the number of threads: enough of them,
/// and of strands and lanes, that a GPU adds in this order at the speed of its memory.
pub(crate) const PIECES: usize = 512;
/// Strands of a piece.
pub(crate) const STRANDS: usize = 16;
/// Lanes of a strand: each adds every 16th value.
const LANES: usize = 16;

/// Values of a strand.
pub(crate) fn strand_of(len: usize) -> usize {
    len.div_ceil(PIECES * STRANDS).next_multiple_of(LANES)
}

/// The values of a gradient.
#[derive(Clone, Copy, Debug)]
pub enum NormIn<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

/// A sum of squares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SquareSum {
    /// The sum, in f64: no f32 squared overflows it.
    pub sum: f64,
}

impl SquareSum {
    /// Whether every value was finite.
    pub fn finite(self) -> bool {
        self.sum.is_finite()
    }

    /// The sum of both; combine in a fixed order for equal bits.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
        }
    }
}

/// Sums the squares of all values, in f64, in a fixed order.
pub fn square_sum(workers: &Workers, values: NormIn<'_>) -> SquareSum {
    let len = match values {
        NormIn::F32(v) => v.len(),
        NormIn::Bf16(v) => v.len(),
        NormIn::F16(v) => v.len(),
    };
    let strand = strand_of(len);
    let mut sums = [0.0; PIECES];
    let shared = Shared::new(&mut sums);
    workers.run(PIECES, &|i, _| {
        let strands = i * STRANDS..(i + 1) * STRANDS;
        let strands = strands.map(|at| (at * strand).min(len)..((at + 1) * strand).min(len));
        let sum = strands.fold(0.0, |sum, range| {
            sum + match values {
                NormIn::F32(v) => sum_of(&v[range], |x| f64::from(*x)),
                NormIn::Bf16(v) => sum_of(&v[range], |x| f64::from(x.to_f32())),
                NormIn::F16(v) => sum_of(&v[range], |x| f64::from(widen_f16(*x))),
            }
        });
        // SAFETY: each chunk has an element of its own.
        let own = unsafe { shared.piece(i..i + 1) };
        own[0] = sum;
    });
    SquareSum {
        sum: sums.iter().sum(),
    }
}

fn sum_of<T>(values: &[T], as_f64: impl Fn(&T) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (lane, value) in lanes.iter_mut().zip(block) {
            let value = as_f64(value);
            *lane += value * value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        let value = as_f64(value);
        *lane += value * value;
    }
    lanes.iter().sum()
}
