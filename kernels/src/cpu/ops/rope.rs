//! Rotary position embedding (Su et al., arXiv 2104.09864) in the rotate-half form of Hugging
//! Face: element i of a head turns with element i + d/2, by position · theta^(-2i/d).

use super::piece;
use crate::cpu::Workers;
use crate::cpu::shared::Shared;

/// Which way to turn: the backward pass turns back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By the angle.
    Forward,
    /// By minus the angle.
    Backward,
}

/// Sizes of [`rope`].
#[derive(Clone, Copy, Debug)]
pub struct RopeDims {
    /// Tokens of a sequence; positions start at 0 in each.
    pub seq: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Base of the wavelengths.
    pub theta: f64,
}

/// Positions that one piece turns.
const POSITIONS: usize = 16;

/// Turns x, `[tokens, heads, head_dim]`, in place.
pub fn rope(w: &Workers, dims: RopeDims, x: &mut [f32], direction: Direction) {
    let RopeDims {
        seq,
        heads,
        head_dim,
        theta,
    } = dims;
    let (width, half) = (heads * head_dim, head_dim / 2);
    assert_eq!(head_dim % 2, 0, "a head has an even number of elements");
    assert_eq!(x.len() % (width * seq), 0, "whole sequences");
    let batch = x.len() / (width * seq);
    let x = Shared::new(x);
    let sign = if direction == Direction::Forward {
        1.0
    } else {
        -1.0
    };
    w.run(seq.div_ceil(POSITIONS), &|block, _| {
        for position in piece(block, POSITIONS, seq) {
            for i in 0..half {
                // As the reference computes it: frequency and angle in f32.
                let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64) as f32;
                let angle = f64::from(position as f32 * frequency);
                let (cos, sin) = (angle.cos() as f32, (sign * angle.sin()) as f32);
                for row in (0..batch).map(|b| b * seq + position) {
                    for head in 0..heads {
                        let at = row * width + head * head_dim + i;
                        // SAFETY: each position belongs to one block.
                        let (a, b) = unsafe {
                            (
                                &mut x.piece(at..at + 1)[0],
                                &mut x.piece(at + half..at + half + 1)[0],
                            )
                        };
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            }
        }
    });
}
