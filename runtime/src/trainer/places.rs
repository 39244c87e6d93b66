//! Every place of the two fast tiers, taken once when the trainer opens: slots in device memory,
//! slabs of the arena.

use forebay_kernels::cpu::Optimizer;
use forebay_kernels::cuda::ops::{LAMB_SUMS, SQUARE_SUMS};
use forebay_pinned::{Arena, Slab};
use forebay_prefetch::{
    GradHome, Model as Order, Placement, PoolId, PoolKind, SectionId, StageId, Tier,
};

use super::dry::Footprint;
use crate::device::Span;
use crate::error::Result;

const DEVICE_ALIGN: u64 = 256;
/// Device memory is read back to the host in pieces of this size.
pub(super) const READ_BYTES: u64 = 64 << 10;
const SMALL_BYTES: u64 = 4096;

/// Pinned memory that a trainer takes besides slabs of states: token ids of two steps, the piece
/// for reading back, the loss, the sums of squares of each section.
pub(super) fn fixed_bytes(footprint: Footprint, sections: usize, optimizer: &Optimizer) -> u64 {
    // A lease takes a page even for nothing.
    let page = |bytes: u64| bytes.max(1).next_multiple_of(SMALL_BYTES);
    2 * page(footprint.input_bytes)
        + READ_BYTES
        + SMALL_BYTES
        + page((sections * sums_bytes(optimizer)) as u64)
}

/// Device memory that is not slots: scratch.
pub(super) fn device_fixed_bytes(footprint: Footprint) -> u64 {
    footprint.scratch_bytes.next_multiple_of(DEVICE_ALIGN)
}

/// Bytes of the sums of one section.
fn sums_bytes(optimizer: &Optimizer) -> usize {
    match optimizer.whole_tensors() {
        true => LAMB_SUMS,
        false => SQUARE_SUMS,
    }
}

/// A slab's place while it is with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlabPlace {
    Pool(PoolId, u32),
    Param(SectionId),
    Grad(SectionId),
    Optim(SectionId, u32),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Places {
    /// By pool: the address of each device buffer.
    slots: Vec<Vec<u64>>,
    /// By pool: the slab of each pinned buffer; `None` while the disk has it.
    slabs: Vec<Vec<Option<Slab>>>,
    pub(super) param: Vec<Option<Slab>>,
    grad: Vec<Option<Slab>>,
    optim: Vec<Vec<Option<Slab>>>,
    /// By section and part: the states of those that are updated on the device.
    states: Vec<Vec<u64>>,
    /// By section: where the gradients of those wait.
    grads_here: Vec<Option<u64>>,
    acts: Vec<Option<Slab>>,
    pub(super) inputs: [Slab; 2],
    pub(super) read: Slab,
    pub(super) small: Slab,
    pub(super) scratch: Span,
    /// The pieces of each section's sum of squares; and by LAMB of two.
    sums: Slab,
    /// Bytes of a section's.
    sums_bytes: usize,
}

impl Places {
    pub(super) fn take(
        order: &Order,
        placement: &Placement,
        footprint: Footprint,
        device: Span,
        arena: &Arena,
        optimizer: &Optimizer,
    ) -> Result<Self> {
        let mut next = device.address;
        let mut slot = |bytes: u64| {
            let address = next;
            next += bytes.next_multiple_of(DEVICE_ALIGN);
            address
        };
        let (mut slots, mut slabs) = (Vec::new(), Vec::new());
        for pool in placement.pools() {
            let on_device = matches!(
                pool.kind,
                PoolKind::ActSlot | PoolKind::ParamSlot | PoolKind::OwnSlot | PoolKind::GradSlot
            );
            let (devices, pinned) = if on_device {
                (pool.buffers, 0)
            } else {
                (0, pool.buffers)
            };
            slots.push((0..devices).map(|_| slot(pool.bytes)).collect());
            let leases: Result<Vec<_>, _> = (0..pinned)
                .map(|_| arena.lease(pool.bytes).map(Some))
                .collect();
            slabs.push(leases?);
        }
        let lease = |wanted: bool, bytes: u64| wanted.then(|| arena.lease(bytes)).transpose();
        let (mut param, mut grad, mut optim) = (Vec::new(), Vec::new(), Vec::new());
        let (mut states, mut grads_here) = (Vec::new(), Vec::new());
        for (id, section) in (0..).map(SectionId).zip(&order.sections) {
            let bytes = section.param_bytes;
            param.push(lease(placement.param_slab(id), bytes)?);
            grad.push(lease(placement.grad_home(id) == GradHome::Slab, bytes)?);
            let parts = placement.parts(id).iter();
            let parts = parts.map(|p| lease(p.home == Tier::Pinned, placement.optim_bytes(p)));
            optim.push(parts.collect::<Result<Vec<_>, _>>()?);
            let here = placement
                .parts(id)
                .iter()
                .filter(|p| p.home == Tier::Device);
            states.push(here.map(|p| slot(placement.optim_bytes(p))).collect());
            let waits = placement.grad_home(id) == GradHome::Device;
            grads_here.push(waits.then(|| slot(section.param_bytes)));
        }
        let acts = (0..order.stages.len() as u32).map(|stage| {
            let pinned = placement.act_home(StageId(stage)) == Some(Tier::Pinned);
            lease(pinned, placement.act_bytes())
        });
        let input = || arena.lease(footprint.input_bytes);
        // Sections without gradients add nothing.
        let sums_bytes = sums_bytes(optimizer);
        let mut sums = arena.lease((order.sections.len() * sums_bytes) as u64)?;
        sums.fill(0);
        Ok(Self {
            acts: acts.collect::<Result<_, _>>()?,
            inputs: [input()?, input()?],
            read: arena.lease(READ_BYTES)?,
            small: arena.lease(SMALL_BYTES)?,
            scratch: Span {
                address: slot(footprint.scratch_bytes),
                bytes: footprint.scratch_bytes.next_multiple_of(DEVICE_ALIGN),
            },
            sums,
            sums_bytes,
            states,
            grads_here,
            slots,
            slabs,
            param,
            grad,
            optim,
        })
    }

    pub(super) fn slot(&self, pool: PoolId, buffer: u32) -> u64 {
        self.slots[pool.0 as usize][buffer as usize]
    }

    /// Where the states of a part that is updated on the device are: `[master | m | v]`.
    pub(super) fn states(&self, section: SectionId, part: u32) -> u64 {
        self.states[section.0 as usize][part as usize]
    }

    /// Where the gradient of a section that is updated on the device waits for it.
    pub(super) fn grad_here(&self, section: SectionId) -> Option<u64> {
        self.grads_here[section.0 as usize]
    }

    /// Where the pieces of a section's sum of squares go.
    pub(super) fn sums_target(&self, section: SectionId) -> *mut u8 {
        // One a section, as many as there are parameters.
        let index = section.0 as usize;
        assert!(index < self.param.len(), "a section of the model");
        // By its address: no slice may stand over what the device writes, and it may write others' meanwhile.
        self.sums.address().wrapping_add(index * self.sums_bytes)
    }

    /// The pieces that came, added in order; for a section whose sum's event has come.
    pub(super) fn sum(&self, section: SectionId) -> f64 {
        let pieces = self.sums_target(section).cast::<f64>();
        (0..SQUARE_SUMS / size_of::<f64>())
            // SAFETY: inside the slab, which begins at a page. Volatile: the device wrote it.
            .map(|index| unsafe { pieces.add(index).read_volatile() })
            .sum()
    }

    pub(super) fn act(&self, stage: StageId) -> &Slab {
        self.acts[stage.0 as usize]
            .as_ref()
            .expect("the checkpoint passes through pinned memory")
    }

    pub(super) fn get(&self, place: SlabPlace) -> &Slab {
        let slab = match place {
            SlabPlace::Pool(pool, buffer) => &self.slabs[pool.0 as usize][buffer as usize],
            SlabPlace::Param(section) => &self.param[section.0 as usize],
            SlabPlace::Grad(section) => &self.grad[section.0 as usize],
            SlabPlace::Optim(section, part) => &self.optim[section.0 as usize][part as usize],
        };
        slab.as_ref()
            .expect("the plan uses no slab that is with the disk")
    }

    fn place(&mut self, place: SlabPlace) -> &mut Option<Slab> {
        match place {
            SlabPlace::Pool(pool, buffer) => &mut self.slabs[pool.0 as usize][buffer as usize],
            SlabPlace::Param(section) => &mut self.param[section.0 as usize],
            SlabPlace::Grad(section) => &mut self.grad[section.0 as usize],
            SlabPlace::Optim(section, part) => &mut self.optim[section.0 as usize][part as usize],
        }
    }

    /// Hands a slab out, to the disk.
    pub(super) fn take_slab(&mut self, place: SlabPlace) -> Slab {
        self.place(place)
            .take()
            .expect("the plan uses no slab that is with the disk")
    }

    /// Makes a slab that of a section's parameters, and takes theirs in its place.
    pub(super) fn swap_param(&mut self, section: SectionId, with: SlabPlace) {
        let mut slab = self.place(with).take();
        std::mem::swap(&mut slab, &mut self.param[section.0 as usize]);
        *self.place(with) = slab;
    }

    /// Takes a slab back.
    pub(super) fn return_slab(&mut self, place: SlabPlace, slab: Slab) {
        *self.place(place) = Some(slab);
    }
}
