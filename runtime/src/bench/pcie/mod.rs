//! The link between pinned memory and the device: copies through slabs, slots, streams and events as the
//! engine makes them, beside bare copies; and the way from the disk to the device, beside the slower of
//! the disk and the link.
//!
//! On the host device the link is copies of memory by its threads.

mod bare;
mod chain;
mod ours;

use std::path::PathBuf;

use super::{Duel, duel, gpu};
use crate::error::{Error, Result};
use crate::machine::{self, Link};
use crate::target::{DeviceChoice, Target};
use bare::Bare;
use ours::Ours;

/// How long a slice takes at least, in seconds: so long that it does not count how soon a thread that
/// sleeps learns of its end.
const SLICE_SECONDS: f64 = 0.04;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// On which device.
    pub device: DeviceChoice,
    /// Bytes of a copy, multiples of 4 KiB; those that do not fit into free memory are left out.
    pub sizes: Vec<u64>,
    /// Rounds of each size and way: at least three slices of 40 ms each.
    pub rounds: u32,
    /// A folder on a disk, for the way from there to the device.
    pub disk: Option<PathBuf>,
    /// Bytes of the file in it.
    pub disk_bytes: u64,
}

/// Which way copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    H2d,
    /// From the device.
    D2h,
    /// Both at once, their bytes added.
    Both,
}

impl Way {
    fn into_device(self) -> bool {
        self != Self::D2h
    }

    fn out_of_device(self) -> bool {
        self != Self::H2d
    }
}

/// What was found for one size and way.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Bytes of a copy.
    pub size: u64,
    /// Which way.
    pub way: Way,
    /// Copies of a slice, each way, all queued at once.
    pub copies: u64,
    /// Ours beside bare copies.
    pub duel: Duel,
    /// The ratio to reach, where there is one.
    pub target: Option<f64>,
}

/// What was found between disk and device.
#[derive(Clone, Debug)]
pub struct Chain {
    /// How I/O was done.
    pub io: String,
    /// Bare reads, bytes per second, median.
    pub disk_bytes_per_s: f64,
    /// Bare copies to the device, bytes per second, median.
    pub link_bytes_per_s: f64,
    /// Extents read, verified and copied to the device, beside the slower of the two.
    pub duel: Duel,
    /// The ratio to reach.
    pub target: f64,
}

/// Everything found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// Whether the link is copies of memory, on the host device.
    pub memory_copies: bool,
    /// The link of a GPU, where the system says.
    pub link: Option<Link>,
    /// Whether pinned memory is page-locked.
    pub pinned: String,
    /// Bytes over which copies move, each way.
    pub window: u64,
    /// By size, each way.
    pub outcomes: Vec<Outcome>,
    /// Sizes that do not fit into free memory.
    pub left_out: Vec<u64>,
    /// Between disk and device, where a disk was given.
    pub chain: Option<Chain>,
}

/// The memory that copies go over: two slabs and two slots of `window` bytes, the first ones for the way
/// to the device.
#[derive(Clone, Copy, Debug)]
struct Places {
    slabs: [u64; 2],
    slots: [u64; 2],
    window: u64,
}

/// A slice's work.
#[derive(Clone, Copy, Debug)]
struct Batch {
    way: Way,
    size: u64,
    copies: u64,
}

impl Batch {
    fn bytes(self) -> f64 {
        let ways = if self.way == Way::Both { 2.0 } else { 1.0 };
        ways * self.size as f64 * self.copies as f64
    }

    /// Where in the window a piece is: copies go round, so that they come from memory, not caches.
    fn offset(self, piece: u64, window: u64) -> u64 {
        piece % (window / self.size) * self.size
    }
}

/// Measures. `progress` is told what is being done.
///
/// # Errors
/// [`Error::NoDevice`]; [`Error::Misuse`] for sizes that cannot be; [`Error::Measure`] where nothing
/// fits, or bare code is refused; those of the disk.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    if let Some(size) = plan
        .sizes
        .iter()
        .find(|s| **s < 4096 || !s.is_multiple_of(4096))
    {
        return Err(Error::Misuse(format!(
            "copies of {size} bytes: give multiples of 4KiB"
        )));
    }
    let target = plan.device.target(1)?;
    progress("taking memory");
    let (window, sizes, left_out) = fitting(target, &plan.sizes)?;
    let mut ours = Ours::new(target, window)?;
    let mut bare = match target {
        Target::Host { .. } => Bare::Host(ours.places()),
        Target::Cuda => Bare::cuda(window)?,
    };
    let mut outcomes = Vec::new();
    for size in sizes {
        for way in [Way::H2d, Way::D2h, Way::Both] {
            progress(&format!("{} {way:?}", crate::Bytes(size)));
            outcomes.push(compare(plan.rounds, way, size, &mut ours, &mut bare)?);
        }
    }
    let chain = match &plan.disk {
        None => None,
        Some(folder) => Some(chain::run(plan, folder, &mut ours, &mut bare, progress)?),
    };
    Ok(Report {
        device: ours.device.name(),
        memory_copies: target != Target::Cuda,
        link: (target == Target::Cuda).then(machine::link).flatten(),
        pinned: ours.arena.lock().to_string(),
        window,
        outcomes,
        left_out,
        chain,
    })
}

/// The window that copies go over, the sizes that fit into it, and those that do not. Half of the free
/// memory stays free.
fn fitting(target: Target, sizes: &[u64]) -> Result<(u64, Vec<u64>, Vec<u64>)> {
    let host = machine::free_memory() / 8;
    let (most, least) = match target {
        // Two slabs and two slots, which bare copies use too.
        Target::Host { .. } => (host, 64 << 20),
        // Two slabs and two slots for ours, and as many for bare copies.
        Target::Cuda => {
            let gpu = gpu::Gpu::new().map_err(|error| Error::Measure {
                what: "copies",
                why: error.to_string(),
            })?;
            (host.min(gpu.free_bytes() / 5), 256 << 20)
        }
    };
    let most = most.max(4 << 20) & !0xfff;
    let (fit, left_out): (Vec<u64>, Vec<u64>) = sizes.iter().partition(|s| **s <= most);
    let Some(largest) = fit.iter().max() else {
        return Err(Error::Measure {
            what: "copies",
            why: format!(
                "no size fits: at most {} with the memory that is free; give smaller --sizes",
                crate::Bytes(most)
            ),
        });
    };
    Ok((least.min(most).max(*largest), fit, left_out))
}

fn compare(rounds: u32, way: Way, size: u64, ours: &mut Ours, bare: &mut Bare) -> Result<Outcome> {
    let batch = sized(way, size, bare)?;
    let duel = duel(
        rounds,
        // SAFETY: slices run in turn; ours waits for its own before it returns.
        &mut || unsafe { bare.slice(batch) },
        &mut || ours.slice(batch),
    )?;
    let target = match (size, way) {
        (0x10_0000, _) => Some(0.90),
        (0x100_0000.., Way::Both) => Some(0.97),
        (0x100_0000.., _) => Some(0.98),
        _ => None,
    };
    Ok(Outcome {
        size,
        way,
        copies: batch.copies,
        duel,
        target,
    })
}

/// As many copies as fill a slice, at the rate of bare ones.
fn sized(way: Way, size: u64, bare: &mut Bare) -> Result<Batch> {
    let mut batch = Batch {
        way,
        size,
        copies: ((16 << 20) / size).max(1),
    };
    for _ in 0..2 {
        // SAFETY: nothing else uses the places: ours is between slices.
        let slice = unsafe { bare.slice(batch)? };
        let copies = batch.copies as f64 * SLICE_SECONDS / slice.seconds.max(1e-6);
        batch.copies = (copies.ceil() as u64).clamp(1, 1 << 20);
    }
    Ok(batch)
}

/// Bare copies to a GPU and from it, bytes per second: the best of a few of 32 MiB each.
pub(crate) fn gpu_rates() -> Result<(f64, f64)> {
    const WINDOW: u64 = 32 << 20;
    let mut bare = Bare::cuda(WINDOW)?;
    let mut best = |way| -> Result<f64> {
        let (size, copies) = (WINDOW, 4);
        let batch = Batch { way, size, copies };
        let mut rate = 0.0f64;
        for _ in 0..4 {
            // SAFETY: there are no places of the host device's.
            rate = rate.max(unsafe { bare.slice(batch)? }.rate());
        }
        Ok(rate)
    };
    Ok((best(Way::H2d)?, best(Way::D2h)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_batch_lie_in_the_window_and_go_round() {
        let batch = Batch {
            way: Way::Both,
            size: 3 << 12,
            copies: 100,
        };
        let window = 10 << 12;
        let offsets: Vec<_> = (0..4).map(|piece| batch.offset(piece, window)).collect();
        assert_eq!(offsets, [0, 3 << 12, 6 << 12, 0]);
        assert_eq!(batch.bytes(), 2.0 * 300.0 * 4096.0);
    }

    #[test]
    fn sizes_that_do_not_fit_are_left_out_and_nothing_is_an_error() {
        let host = Target::Host { threads: 1 };
        let (window, fit, left_out) = fitting(host, &[1 << 16, 1 << 60]).unwrap();
        assert!((1 << 16..1 << 60).contains(&window));
        assert_eq!((fit, left_out), (vec![1 << 16], vec![1 << 60]));
        let error = fitting(host, &[1 << 60]).unwrap_err().to_string();
        assert!(error.contains("no size fits"), "{error}");
    }
}
