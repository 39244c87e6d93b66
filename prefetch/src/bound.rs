//! The least time that a step can take, from what it moves and how fast each resource is
//! (ZeRO-Infinity section 4 asks the same as an efficiency; here it is a time).

use crate::model::Timing;
use crate::plan::{Lane, Plan, PoolKind, TaskKind, Window};

/// How fast each resource is, measured by bare code.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// Seconds of compute, by stage.
    pub stage_seconds: Vec<f64>,
    /// Bytes per second to the device.
    pub h2d: f64,
    /// Bytes per second from the device.
    pub d2h: f64,
    /// Bytes per second read from disk.
    pub disk_read: f64,
    /// Bytes per second written to disk; reads and writes share the disk.
    pub disk_write: f64,
    /// Elements per second updated by the CPU.
    pub cpu: f64,
    /// The same where what is overwritten is logged, ahead of the norm: for [`simulate`](crate::simulate).
    pub cpu_ahead: f64,
    /// Elements per second updated on the device; infinite where that time is in `stage_seconds`.
    pub device_update: f64,
}

impl Rates {
    /// Every resource at `rate`, and no compute.
    pub fn equal(rate: f64) -> Self {
        Self {
            stage_seconds: vec![],
            h2d: rate,
            d2h: rate,
            disk_read: rate,
            disk_write: rate,
            cpu: rate,
            cpu_ahead: rate,
            device_update: rate,
        }
    }

    pub(crate) fn seconds(&self, plan: &Plan, task: usize) -> f64 {
        let task = &plan.tasks()[task];
        let amount = task.amount as f64;
        match (task.lane, task.kind) {
            (_, TaskKind::Compute(stage)) => self
                .stage_seconds
                .get(stage.0 as usize)
                .copied()
                .unwrap_or(0.0),
            // On the device, of memory that is fast there.
            (
                _,
                TaskKind::GradNorm(_) | TaskKind::Norm | TaskKind::SwapParam(_) | TaskKind::Commit,
            ) => 0.0,
            (Lane::H2d, _) => amount / self.h2d,
            (Lane::D2h, _) => amount / self.d2h,
            (Lane::DiskRead, _) => amount / self.disk_read,
            (Lane::DiskWrite, _) => amount / self.disk_write,
            (Lane::Update, _) => amount / self.device_update,
            (Lane::Compute | Lane::Cpu, _) => amount / self.cpu,
        }
    }
}

/// What a step moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes to the device.
    pub h2d: u64,
    /// Bytes from the device.
    pub d2h: u64,
    /// Bytes read from disk.
    pub disk_read: u64,
    /// Bytes written to disk.
    pub disk_write: u64,
    /// Those of both that are optimizer states.
    pub disk_states: u64,
    /// Elements updated, on the CPU and on the device.
    pub updated: u64,
    /// Those of them that the CPU updates.
    pub updated_by_cpu: u64,
}

impl Traffic {
    /// Of one step of a plan.
    pub fn of(plan: &Plan) -> Self {
        let sum = |lane: Lane| {
            plan.tasks()
                .iter()
                .filter(|t| t.lane == lane)
                .map(|t| t.amount)
                .sum()
        };
        let updates = plan
            .tasks()
            .iter()
            .filter(|t| matches!(t.kind, TaskKind::Update(..)));
        let states = plan
            .tasks()
            .iter()
            .filter(|t| matches!(t.kind, TaskKind::ReadOptim(..) | TaskKind::WriteOptim(..)));
        Self {
            disk_states: states.map(|t| t.amount).sum(),
            h2d: sum(Lane::H2d),
            d2h: sum(Lane::D2h),
            disk_read: sum(Lane::DiskRead),
            disk_write: sum(Lane::DiskWrite),
            updated: updates.clone().map(|t| t.amount).sum(),
            updated_by_cpu: updates
                .filter(|t| t.lane == Lane::Cpu)
                .map(|t| t.amount)
                .sum(),
        }
    }
}

/// The least time of a step and what it is made of, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Compute alone.
    pub compute: f64,
    /// The busier direction of the link.
    pub link: f64,
    /// The disk.
    pub disk: f64,
    /// The optimizer.
    pub cpu: f64,
    /// The bound.
    pub seconds: f64,
    /// What it is: `compute`, `link`, `disk`, `cpu`, or `backward + ...` where updates wait for
    /// the norm of the whole gradient.
    pub by: &'static str,
}

/// The least time of a step of `plan` at `rates`.
///
/// With [`Timing::AfterNorm`] what follows the norm cannot hide behind the backward pass: backward +
/// max(forward, optimizer, the disk's work for both), where that is more; with [`Timing::Delayed`] all of it
/// can. With `ahead`, as many updates as
/// there are buffers to undo them do not follow the norm. What their log costs is not part of it.
pub fn bound(plan: &Plan, rates: &Rates, ahead: bool) -> Bound {
    let sum = |pick: &dyn Fn(usize) -> bool| -> f64 {
        (0..plan.tasks().len())
            .filter(|t| pick(*t))
            .map(|t| rates.seconds(plan, t))
            // From a positive zero: the sum of nothing would print as -0.
            .fold(0.0, |sum, seconds| sum + seconds)
    };
    let lane = |lane: Lane| sum(&|t| plan.tasks()[t].lane == lane);
    let disk = lane(Lane::DiskRead) + lane(Lane::DiskWrite);
    let parts = [
        (lane(Lane::Compute) + lane(Lane::Update), "compute"),
        (lane(Lane::H2d).max(lane(Lane::D2h)), "link"),
        (disk, "disk"),
        (lane(Lane::Cpu), "cpu"),
    ];
    let mut best = parts
        .into_iter()
        .fold((0.0, "compute"), |a, b| if b.0 > a.0 { b } else { a });
    if plan.timing() == Timing::AfterNorm {
        let split = plan.forward_stages().min(rates.stage_seconds.len());
        let forward: f64 = rates.stage_seconds[..split].iter().sum();
        let backward: f64 = rates.stage_seconds[split..].iter().sum();
        // What the disk does between the norm and the end of the next forward pass. Reads of
        // states may run before the norm, and writes after the forward pass, as far as buffers go.
        let states = plan.pools().iter().find(|p| p.kind == PoolKind::OptimStage);
        let buffered = states.map_or(0.0, |p| (p.buffers * p.bytes) as f64);
        let buffered = buffered / rates.disk_read + buffered / rates.disk_write;
        let read = |t: &crate::plan::Task| match t.window {
            Window::Read(stage) => (stage.0 as usize) < split,
            _ => false,
        };
        let updating = sum(&|t| {
            let task = &plan.tasks()[t];
            use TaskKind::{ReadGrad, ReadOptim, WriteOptim, WriteParam};
            let update = matches!(
                task.kind,
                ReadGrad(_) | ReadOptim(..) | WriteOptim(..) | WriteParam(_)
            );
            update || read(task)
        });
        let mut early: Vec<f64> = (0..plan.tasks().len())
            .filter(|t| ahead && plan.tasks()[*t].window == Window::Norm)
            .map(|t| rates.seconds(plan, t))
            .collect();
        early.sort_by(|a, b| b.total_cmp(a));
        let early: f64 = early.iter().take(plan.undo_buffers() as usize).sum();
        for (seconds, by) in [
            (forward, "backward + forward"),
            (updating - buffered, "backward + disk"),
            (parts[3].0 - early, "backward + cpu"),
        ] {
            if backward + seconds > best.0 * (1.0 + 1e-9) {
                best = (backward + seconds, by);
            }
        }
    }
    Bound {
        compute: parts[0].0,
        link: parts[1].0,
        disk: parts[2].0,
        cpu: parts[3].0,
        seconds: best.0,
        by: best.1,
    }
}
