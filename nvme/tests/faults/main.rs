//! The store over the simulated disk: faults of every kind at random, power cuts, and a fault at
//! every operation, each against a model of what may be there. FOREBAY_SIM_SEEDS sets the number of
//! seeds, FOREBAY_SIM_FIRST the first of them.
#![allow(clippy::unwrap_used)]

mod planned;
mod random;

use forebay_nvme::{Key, Layout, StateKind};

const BYTES: [u64; 6] = [4096, 5000, 12_288, 300_000, 1, 70_000];

fn keys() -> Vec<(Key, u64)> {
    let states = [StateKind::Optim, StateKind::Param, StateKind::Grad];
    let key = |section, state| Key {
        section,
        state,
        part: 0,
    };
    (0..)
        .zip(BYTES)
        .map(|(i, bytes)| (key(i, states[i as usize % 3]), bytes))
        .collect()
}

fn layout() -> Layout {
    Layout::new("simulated", 5, keys().into_iter().map(|(k, b)| (k, b, "s")))
}

/// What version `version` of a key holds.
fn fill(key: Key, version: u32, out: &mut [u8]) {
    let name = u64::from(key.section) << 40 | u64::from(version);
    for (i, byte) in out.iter_mut().enumerate() {
        let mixed = (name ^ (i as u64) << 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *byte = ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8;
    }
}
