//! What a placement takes of each tier, and its pools of buffers.

use super::{GradHome, PlaceOptions, Placement};
use crate::model::{SectionId, Tier};
use crate::parts::Part;
use crate::plan::{Pool, PoolKind};

const DEVICE_ALIGN: u64 = 256;
const PINNED_ALIGN: u64 = 4096;

impl Placement {
    /// Bytes of a part's optimizer states.
    pub fn optim_bytes(&self, part: &Part) -> u64 {
        self.options.optim_bytes * part.elements
    }

    fn act_slabs(&self) -> u64 {
        self.act_home
            .iter()
            .flatten()
            .filter(|h| **h == Tier::Pinned)
            .count() as u64
    }

    /// Device memory that the placement takes, scratch included.
    pub fn device_bytes(&self) -> u64 {
        let round = |bytes: u64| bytes.next_multiple_of(DEVICE_ALIGN);
        let classes = self.classes.iter().map(|c| {
            let slots = c.param_slots.saturating_add(c.own.len() as u64);
            let params = slots.saturating_mul(round(c.param_bytes));
            params.saturating_add(c.grad_slots.saturating_mul(round(c.grad_slot_bytes)))
        });
        let here = self
            .parts
            .iter()
            .flatten()
            .filter(|p| p.home == Tier::Device);
        // The gradients that wait for an update here.
        let sections = self.grad_home.iter().zip(&self.class_of);
        let grads = sections
            .filter(|(home, _)| **home == GradHome::Device)
            .map(|(_, class)| round(self.classes[*class].param_bytes));
        round(self.options.scratch_bytes)
            + here.map(|p| round(self.optim_bytes(p))).sum::<u64>()
            + grads.sum::<u64>()
            + self.act_slots * round(self.act_bytes)
            + classes.sum::<u64>()
    }

    /// Pinned memory that the placement takes.
    pub fn pinned_bytes(&self) -> u64 {
        let round = |bytes: u64| bytes.next_multiple_of(PINNED_ALIGN);
        let mut bytes = round(self.options.pinned_fixed_bytes);
        bytes += self.act_slabs() * round(self.act_bytes);
        for (section, class) in self.class_of.iter().enumerate() {
            let slab = round(self.classes[*class].param_bytes);
            bytes += slab * u64::from(self.param_slab(SectionId(section as u32)));
            bytes += slab * u64::from(self.grad_home[section] == GradHome::Slab);
        }
        for (index, class) in self.classes.iter().enumerate() {
            bytes += (self.param_stage[index] + self.grad_stage[index]) * round(class.param_bytes);
        }
        let homes = self
            .parts
            .iter()
            .flatten()
            .filter(|p| p.home == Tier::Pinned);
        bytes += homes.map(|p| round(self.optim_bytes(p))).sum::<u64>();
        bytes += self.undo * self.undo_slab_bytes();
        bytes + self.optim_stage * round(self.optim_stage_bytes())
    }

    /// Bytes of states whose home is the disk.
    pub fn disk_bytes(&self) -> u64 {
        let mut bytes = 0;
        for (section, class) in self.class_of.iter().enumerate() {
            let size = self.classes[*class].param_bytes;
            bytes += size * u64::from(self.param_home[section] == Tier::Disk);
            bytes += size * u64::from(self.grad_home[section] == GradHome::Disk);
        }
        let parts = self.parts.iter().flatten().filter(|p| p.home == Tier::Disk);
        bytes + parts.map(|p| self.optim_bytes(p)).sum::<u64>()
    }

    /// Bytes of one shared slab for optimizer states: those of the largest part.
    pub(crate) fn optim_stage_bytes(&self) -> u64 {
        self.parts
            .iter()
            .flatten()
            .map(|p| self.optim_bytes(p))
            .max()
            .unwrap_or(0)
    }

    /// Bytes of a slab for what an update overwrites.
    pub fn undo_slab_bytes(&self) -> u64 {
        let mut sections = (0..self.grad_home.len() as u32).map(SectionId);
        let in_place = !self.options.split
            && sections.any(|s| self.grad_home(s) == GradHome::Slab && !self.param_slab(s));
        let PlaceOptions {
            undo_log_bytes,
            undo_grad_bytes,
            ..
        } = self.options;
        let grad = if in_place { undo_grad_bytes } else { 0 };
        (undo_log_bytes + grad).next_multiple_of(PINNED_ALIGN)
    }

    /// Bytes of states that do not live on disk: what a generation writes. A split master is of no use without
    /// its parameters.
    pub fn volatile_bytes(&self) -> u64 {
        let parts = self.parts.iter().flatten();
        let volatile = parts.filter(|p| p.home != Tier::Disk);
        let optim: u64 = volatile.map(|p| self.optim_bytes(p)).sum();
        let sections = self.param_home.iter().zip(&self.class_of);
        let params = sections
            .filter(|(home, _)| self.options.split && **home != Tier::Disk)
            .map(|(_, class)| self.classes[*class].param_bytes);
        optim + params.sum::<u64>()
    }

    /// All pools of buffers, by [`PoolId`](crate::PoolId). Buffers of a pool have one size.
    pub fn pools(&self) -> Vec<Pool> {
        let mut pools = vec![
            Pool {
                kind: PoolKind::ActSlot,
                buffers: self.act_slots,
                bytes: self.act_bytes,
            },
            Pool {
                kind: PoolKind::OptimStage,
                buffers: self.optim_stage,
                bytes: self.optim_stage_bytes(),
            },
        ];
        for (index, class) in self.classes.iter().enumerate() {
            let pool = |kind, buffers| Pool {
                kind,
                buffers,
                bytes: class.param_bytes,
            };
            pools.extend([
                pool(PoolKind::ParamSlot, class.param_slots),
                Pool {
                    bytes: class.grad_slot_bytes,
                    ..pool(PoolKind::GradSlot, class.grad_slots)
                },
                pool(PoolKind::ParamStage, self.param_stage[index]),
                pool(PoolKind::GradStage, self.grad_stage[index]),
                pool(PoolKind::OwnSlot, class.own.len() as u64),
            ]);
        }
        pools
    }
}
