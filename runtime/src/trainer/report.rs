//! What a run used and did, beside what it could have done.

use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use forebay_kernels::cpu::{self, Exchange, Isa, Workers};
use forebay_pinned::Arena;
use forebay_prefetch::{Bound, Lane, Rates, Traffic, bound};

use super::rates::DeviceKeeps;
use super::setup::check_optimizer;
use super::{Options, Trainer, Updates};
use crate::bench::pcie;
use crate::error::{Error, Result};
use crate::target::Target;
use crate::tensor::DType;

/// Rates of this machine, measured by bare loops with no engine in them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes per second copied to the device.
    pub h2d: f64,
    /// Bytes per second copied from the device.
    pub d2h: f64,
    /// Bytes per second read from disk.
    pub disk_read: f64,
    /// Bytes per second written to disk.
    pub disk_write: f64,
    /// Elements per second that the optimizer updates on the CPU.
    pub adam: f64,
}

impl Ceilings {
    /// Measures those of a trainer's options and the type that its model computes in, in about a second,
    /// with up to 64 MiB of each disk and 80 MiB of memory (64 MiB of the GPU's) that are given back.
    ///
    /// # Errors
    /// An optimizer that cannot be had in this type; a disk folder or a device that cannot be used; threads refused.
    pub fn measure(options: &Options, dtype: DType) -> Result<Self> {
        check_optimizer(dtype, options)?;
        let (h2d, d2h) = match options.target()? {
            Target::Host { .. } => {
                let copy = copy_rate();
                (copy, copy)
            }
            Target::Cuda => pcie::gpu_rates()?,
        };
        let (mut disk_read, mut disk_write, mut seen) = (0.0, 0.0, Vec::new());
        for disk in &options.disk {
            // On a full disk a smaller piece has to do: whether the store fits is said by the store.
            let free = forebay_nvme::probe::free_bytes(disk)?;
            // Folders of one device share its bandwidth.
            let device = std::fs::metadata(disk).map(|m| m.dev());
            let device = device.map_err(Error::system(disk.display().to_string()))?;
            if seen.contains(&device) {
                continue;
            }
            seen.push(device);
            let rate = forebay_nvme::probe::disk(disk, (free / 4).min(64 << 20))?;
            disk_read += rate.read_bytes_per_s;
            disk_write += rate.write_bytes_per_s;
        }
        Ok(Self {
            h2d,
            d2h,
            disk_read,
            disk_write,
            adam: update_rate(options, dtype)?,
        })
    }
}

/// The best of a few bare copies by one thread.
fn copy_rate() -> f64 {
    let bytes = 32 << 20;
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let time = (0..5).map(|_| {
        let start = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        start.elapsed().as_secs_f64()
    });
    bytes as f64 / time.fold(f64::INFINITY, f64::min)
}

/// Elements per second of the options' optimizer, its states as they are kept.
fn update_rate(options: &Options, dtype: DType) -> Result<f64> {
    let workers = Workers::new(options.threads, "fb-ceiling");
    let workers = workers.map_err(Error::system("starting threads"))?;
    let (elements, format): (usize, _) = (4 << 20, options.format());
    // Memory as the trainer's own has it: in huge pages where they can be had.
    let each = dtype.bytes() as u64;
    let bytes = [format.bytes(), each, each].map(|each| each * elements as u64);
    let arena = Arena::new(bytes.iter().sum())?;
    let mut slabs = Vec::new();
    for bytes in bytes {
        let mut slab = arena.lease(bytes)?;
        // In either type a number of a common size.
        slab.fill(0x3f);
        slabs.push(slab);
    }
    let [states, grad, param] = slabs.as_mut_slice() else {
        unreachable!("three were taken");
    };
    let scalars = options.optimizer.at(1, 1e-3, 1.0);
    let times = (0..4).map(|_| {
        let start = Instant::now();
        let stored = format.view(&mut states[..], elements, 0..elements);
        let exchange = match (dtype, options.split_master) {
            (DType::Bf16, true) => Exchange::Bf16 {
                grad: bytemuck::cast_slice(&grad[..]),
                param: bytemuck::cast_slice_mut(&mut param[..]),
            },
            (DType::Bf16, false) => Exchange::InPlaceBf16(bytemuck::cast_slice_mut(&mut grad[..])),
            (DType::F16, _) => Exchange::InPlaceF16(bytemuck::cast_slice_mut(&mut grad[..])),
            (DType::F32 | DType::U32, _) => {
                Exchange::InPlaceF32(bytemuck::cast_slice_mut(&mut grad[..]))
            }
        };
        cpu::update(&workers, Isa::best(), &scalars, stored, exchange);
        start.elapsed().as_secs_f64()
    });
    Ok(elements as f64 / times.fold(f64::INFINITY, f64::min))
}

/// A tier's budget and what was used of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierReport {
    /// Its name.
    pub name: &'static str,
    /// Bytes allowed; for the disk, bytes of its files.
    pub budget_bytes: u64,
    /// The most bytes in use at once.
    pub peak_bytes: u64,
}

/// What moved over one hop.
#[derive(Clone, Debug, PartialEq)]
pub struct HopReport {
    /// From where to where.
    pub name: &'static str,
    /// Bytes, in all training steps of this run.
    pub bytes: u64,
    /// Seconds in which something was moving.
    pub busy_s: f64,
}

/// What publishing costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublishCost {
    /// Bytes on disk of a new store that publishes often, at the end, or never.
    pub space: [u64; 3],
    /// Bytes written for each generation, beside its map: states that live in pinned memory or on the
    /// device. Those on disk are part of it where they are.
    pub bytes: u64,
}

/// Updates ahead of the norm ([`Ahead`](crate::Ahead)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadReport {
    /// Steps of which some ran ahead.
    pub steps: u64,
    /// Those of them that were undone.
    pub undone: u64,
    /// Elements that were updated ahead, in all steps.
    pub elements: u64,
    /// Those of them whose log did not fit, and which waited for the norm after all.
    pub left: u64,
}

impl AheadReport {
    /// Steps in which they stood.
    pub fn stood(&self) -> u64 {
        self.steps - self.undone
    }
}

/// What a run used and did.
#[derive(Clone, Debug)]
pub struct Report {
    /// What publishing costs.
    pub publish: PublishCost,
    /// The device.
    pub device: String,
    /// How the disk is driven.
    pub disk: String,
    /// Whether pinned memory is page-locked, and what to do if not.
    pub lock: String,
    /// The optimizer, and how its states are kept.
    pub states: String,
    /// The CPU optimizer's threads, and whether they are bound to CPUs.
    pub threads: String,
    /// Device, pinned memory, disk.
    pub tiers: [TierReport; 3],
    /// Host to device, device to host, disk reads, disk writes.
    pub hops: [HopReport; 4],
    /// Training steps of this run.
    pub steps: u64,
    /// The median step, in seconds.
    pub step_s: f64,
    /// When gradients are applied.
    pub updates: Updates,
    /// Updates ahead of the norm.
    pub ahead: AheadReport,
    /// Bytes that a step moves by plan.
    pub traffic: Traffic,
    /// What the device has room for.
    pub keeps: DeviceKeeps,
    /// Mean seconds of compute, by stage.
    pub stage_s: Vec<f64>,
    /// Bytes that the disk was asked for and did, since the store was opened and in its life.
    pub disk_stats: forebay_nvme::Stats,
    plan: std::sync::Arc<forebay_prefetch::Plan>,
}

impl Report {
    /// The least time that a step could take at these rates, with updates ahead of the norm if they stood in
    /// most steps. Compute is what the device spent in operations in this run.
    pub fn bound(&self, ceilings: &Ceilings) -> Bound {
        let rates = Rates {
            stage_seconds: self.stage_s.clone(),
            h2d: ceilings.h2d,
            d2h: ceilings.d2h,
            disk_read: ceilings.disk_read,
            disk_write: ceilings.disk_write,
            cpu: ceilings.adam,
            cpu_ahead: ceilings.adam,
            // Seen by the device as compute, of the stage after.
            device_update: f64::INFINITY,
        };
        bound(&self.plan, &rates, 2 * self.ahead.stood() > self.steps)
    }
}

pub(super) fn report(trainer: &Trainer) -> Report {
    let engine = &trainer.engine;
    let (telemetry, stats) = (&engine.telemetry, engine.store.stats());
    let [_, h2d, d2h, _] = engine.busy();
    let moved = |lane: Lane| telemetry.moved[lane as usize];
    let hop = |name, lane, busy: std::time::Duration| HopReport {
        name,
        bytes: moved(lane),
        busy_s: busy.as_secs_f64(),
    };
    let tier = |name, budget_bytes, peak_bytes| TierReport {
        name,
        budget_bytes,
        peak_bytes,
    };
    let used = engine.placement.device_bytes() - engine.places.scratch.bytes;
    let mut times = telemetry.step_seconds.clone();
    times.sort_by(f64::total_cmp);
    Report {
        publish: trainer.publish,
        device: engine.device.name(),
        disk: engine.store.describe().to_owned(),
        lock: trainer.lock.to_string(),
        states: trainer.states.clone(),
        threads: {
            let updater = &engine.updater;
            let (threads, binding) = (updater.workers.threads(), &updater.binding);
            format!("{threads}, {binding}")
        },
        tiers: [
            tier(
                "device",
                trainer.budgets.device_bytes,
                used + trainer.scratch.peak(),
            ),
            tier("pinned", trainer.budgets.pinned_bytes, engine.arena.peak()),
            tier("disk", stats.file_bytes, stats.file_bytes),
        ],
        hops: [
            hop("pinned to device", Lane::H2d, h2d),
            hop("device to pinned", Lane::D2h, d2h),
            hop("disk to pinned", Lane::DiskRead, stats.busy),
            hop("pinned to disk", Lane::DiskWrite, stats.busy),
        ],
        steps: telemetry.steps,
        step_s: times.get(times.len() / 2).copied().unwrap_or(0.0),
        updates: if engine.delayed() {
            Updates::Delayed
        } else {
            Updates::Exact
        },
        ahead: engine.ahead.report,
        traffic: Traffic::of(engine.plan()),
        keeps: DeviceKeeps::of(&trainer.model.order(), &engine.placement),
        stage_s: telemetry.stage_means(),
        disk_stats: stats,
        plan: std::sync::Arc::clone(engine.plan()),
    }
}
