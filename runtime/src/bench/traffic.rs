//! The ceiling of an offloaded step: how long bare code takes to move what such a step moves, with nothing
//! that waits for anything. Threads go over the optimizer's states with next to no arithmetic (28 bytes a
//! parameter in bf16), while copies run both ways over the link.

use std::cell::RefCell;
use std::time::Instant;

use forebay_kernels::cuda::{CudaError, check, sys};
use forebay_pinned::Arena;

use super::adam::{Memory, ROOM, cpus};
use super::gpu::{BareStream, COPIES, DeviceMemory, Gpu, HostMemory, failed};
use crate::error::Result;
use crate::machine;
use crate::nvme::bench::median;
use crate::target::{DeviceChoice, Target};

/// What a step moves.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// On which device.
    pub device: DeviceChoice,
    /// The optimizer's threads.
    pub threads: usize,
    /// Whether they are bound to a CPU each.
    pub bind: bool,
    /// Parameters that the CPU updates.
    pub elements: u64,
    /// Bytes copied to the device.
    pub h2d_bytes: u64,
    /// Bytes copied from it.
    pub d2h_bytes: u64,
    /// How often each is measured.
    pub rounds: u32,
}

/// Seconds of a step's traffic, medians.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// The pass over the states alone.
    pub adam_s: f64,
    /// The copies alone, both ways at once.
    pub copies_s: f64,
    /// Both together.
    pub together_s: f64,
    /// The slowest of these to the fastest.
    pub spread: f64,
}

/// Copies of at most so many bytes.
const PIECE: u64 = 64 << 20;
/// Bytes each way that copies go over again and again: past the caches.
const WINDOW: u64 = 256 << 20;
/// Elements of the pass at most: past the caches too.
const ELEMENTS: u64 = 128 << 20;

/// Measures.
///
/// # Errors
/// Memory, threads or the device refused.
pub fn run(plan: &Plan) -> Result<Report> {
    let threads = plan.threads.max(1);
    let room = (machine::free_memory() / 4 / ROOM).max(1);
    let elements = plan.elements.clamp(1, ELEMENTS).min(room);
    let passes = (plan.elements / elements).max(1);
    // What whole passes leave out, or do too much, is a matter of proportion.
    let scale = plan.elements as f64 / (elements * passes) as f64;
    let arena = Arena::new(ROOM * elements + 5 * 4096)?;
    let memory = RefCell::new(Memory::new(&arena, elements)?);
    let cpus = cpus(threads, plan.bind);
    let adam = |streams| {
        let passes = u32::try_from(passes).unwrap_or(u32::MAX);
        memory.borrow_mut().bare(threads, &cpus, streams, passes);
    };
    let link = match plan.device.target(threads)? {
        Target::Cuda => Link::Gpu(Gpus::new().map_err(failed(COPIES))?),
        Target::Host { .. } => Link::Memory,
    };
    let bytes = [plan.h2d_bytes, plan.d2h_bytes];
    let scaled = bytes.map(|b| (b as f64 / scale.max(1e-9)) as u64);
    let mut run = Measured::default();
    if plan.elements > 0 {
        adam(false);
    }
    let alone = |streams| {
        let start = Instant::now();
        adam(streams);
        start.elapsed().as_secs_f64()
    };
    let streams = plan.elements > 0 && alone(true) < alone(false);
    for _ in 0..plan.rounds.max(1) {
        run.copies.push(link.copy(bytes, &|| ())?);
        if plan.elements == 0 {
            run.adam.push(0.0);
            run.together.push(run.copies[run.copies.len() - 1]);
            continue;
        }
        run.adam.push(scale * alone(streams));
        let both = link.copy(scaled, &|| adam(streams))?;
        run.together.push(scale * both);
    }
    let most = run.together.iter().copied().fold(0.0, f64::max);
    let least = run.together.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(Report {
        adam_s: median(run.adam),
        copies_s: median(run.copies),
        together_s: median(run.together),
        spread: most / least,
    })
}

/// Seconds, by round.
#[derive(Default)]
struct Measured {
    adam: Vec<f64>,
    copies: Vec<f64>,
    together: Vec<f64>,
}

enum Link {
    Gpu(Gpus),
    /// The host device's: copies of memory.
    Memory,
}

impl Link {
    /// Copies so many bytes to the device and from it, while this thread does something else; the seconds
    /// until both are done.
    fn copy(&self, bytes: [u64; 2], meanwhile: &dyn Fn()) -> Result<f64> {
        let start = Instant::now();
        match self {
            Self::Gpu(gpu) => {
                gpu.queue(bytes).map_err(failed(COPIES))?;
                meanwhile();
                gpu.wait().map_err(failed(COPIES))?;
            }
            Self::Memory => {
                std::thread::scope(|scope| {
                    for bytes in bytes.into_iter().filter(|b| *b > 0) {
                        scope.spawn(move || in_memory(bytes));
                    }
                    meanwhile();
                });
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Pieces that cover `bytes`, and where each begins in the window.
fn pieces(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..bytes.div_ceil(PIECE)).map(move |piece| {
        let begun = piece * PIECE;
        (begun % WINDOW, PIECE.min(bytes - begun))
    })
}

fn in_memory(bytes: u64) {
    let window = bytes.min(WINDOW) as usize;
    let (from, mut to) = (vec![1u8; window], vec![2u8; window]);
    for (at, piece) in pieces(bytes) {
        let range = at as usize..(at + piece) as usize;
        to[range.clone()].copy_from_slice(std::hint::black_box(&from[range]));
        std::hint::black_box(&mut to);
    }
}

/// Memory of both sides, and a stream each way.
struct Gpus {
    // The streams go first, and wait for what they were given.
    streams: [BareStream; 2],
    host: [HostMemory; 2],
    device: [DeviceMemory; 2],
}

impl Gpus {
    fn new() -> Result<Self, CudaError> {
        let gpu = Gpu::new()?;
        let host = || HostMemory::new(&gpu, WINDOW);
        let device = || DeviceMemory::new(&gpu, WINDOW);
        Ok(Self {
            streams: [BareStream::new(&gpu)?, BareStream::new(&gpu)?],
            host: [host()?, host()?],
            device: [device()?, device()?],
        })
    }

    fn queue(&self, bytes: [u64; 2]) -> Result<(), CudaError> {
        let ([h2d, d2h], [from, to]) = (&self.streams, &self.host);
        for (at, piece) in pieces(bytes[0]) {
            let from = from.address().wrapping_add(at as usize).cast();
            let to = self.device[0].address() + at;
            // SAFETY: both places lie in memory of this value, which outlives its streams.
            let done = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, piece as usize, h2d.stream) };
            check("cuMemcpyHtoDAsync", done)?;
        }
        for (at, piece) in pieces(bytes[1]) {
            let to = to.address().wrapping_add(at as usize).cast();
            let from = self.device[1].address() + at;
            // SAFETY: as above.
            let done = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, piece as usize, d2h.stream) };
            check("cuMemcpyDtoHAsync", done)?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.streams.iter().try_for_each(BareStream::synchronize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_together_take_at_least_what_each_takes_and_pieces_cover_all_bytes() {
        for bytes in [0, 1, PIECE, 3 * WINDOW + 17] {
            let all: Vec<_> = pieces(bytes).collect();
            assert_eq!(all.iter().map(|p| p.1).sum::<u64>(), bytes);
            assert!(all.iter().all(|(at, piece)| at + piece <= WINDOW));
        }
        let plan = Plan {
            device: DeviceChoice::Host,
            threads: 1,
            bind: true,
            elements: 3_000_000,
            h2d_bytes: 40 << 20,
            d2h_bytes: 20 << 20,
            rounds: 3,
        };
        let report = run(&plan).unwrap();
        let most = report.adam_s.max(report.copies_s);
        assert!(report.adam_s > 0.0 && report.copies_s > 0.0, "{report:?}");
        assert!(report.together_s > 0.5 * most, "{report:?}");
        let nothing = Plan {
            elements: 0,
            ..plan
        };
        assert_eq!(run(&nothing).unwrap().adam_s, 0.0);
    }
}
