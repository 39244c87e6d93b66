//! LAMB in two passes over a tensor: moments and norms first, then the step.
//!
//! The norms are sums in the order of [`square_sum`](crate::cpu::square_sum), so that the device has their bits.

use std::ops::Range;

use super::LambScalars;
use super::frame::{All, Lanes, Work};
use crate::cpu::isa::Isa;
use crate::cpu::norm::{PIECES, STRANDS, strand_of};
use crate::cpu::shared::Shared;
use crate::cpu::workers::Workers;

pub(super) fn update(workers: &Workers, isa: Isa, scalars: &LambScalars, all: &All<'_>) {
    let strand = strand_of(all.len);
    let mut sums = [[0.0; 2]; PIECES];
    let shared = Shared::new(&mut sums);
    workers.run(PIECES, &|piece, _| {
        let mut own = [0.0; 2];
        for at in piece * STRANDS..(piece + 1) * STRANDS {
            let lanes = Lanes::default();
            let range = strand_at(all.len, strand, at);
            // SAFETY: strands do not overlap, and the machine runs it (checked by the caller).
            unsafe { all.work(isa, range, Work::Moments(scalars, &lanes)) };
            let sum =
                |lanes: &[std::cell::Cell<f64>; 16]| lanes.iter().map(|x| x.get()).sum::<f64>();
            own[0] += sum(&lanes.p);
            own[1] += sum(&lanes.u);
        }
        // SAFETY: each piece has an element of its own.
        let of_piece = unsafe { shared.piece(piece..piece + 1) };
        of_piece[0] = own;
    });
    let norm = |which: usize| sums.iter().map(|piece| piece[which]).sum::<f64>().sqrt();
    let factor = factor(scalars.minus_lr, norm(0), norm(1));
    workers.run(PIECES, &|piece, _| {
        for at in piece * STRANDS..(piece + 1) * STRANDS {
            let range = strand_at(all.len, strand, at);
            // SAFETY: as above.
            unsafe { all.work(isa, range, Work::Move(scalars, factor)) };
        }
    });
}

/// By what the direction is multiplied: the learning rate and the ratio of the norms of masters and direction.
fn factor(minus_lr: f32, master: f64, direction: f64) -> f32 {
    let ratio = if master > 0.0 && direction > 0.0 {
        master / direction
    } else {
        1.0
    };
    (f64::from(minus_lr) * ratio) as f32
}

/// The elements of a strand.
fn strand_at(len: usize, strand: usize, at: usize) -> Range<usize> {
    (at * strand).min(len)..((at + 1) * strand).min(len)
}
