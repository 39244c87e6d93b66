//! Bringing states to their places: of a new model, of a stored one, and after a step was undone;
//! and making them a generation.

use std::time::Duration;

use forebay_nvme::{Done, Key, Priority, StateKind};
use forebay_pinned::Slab;
use forebay_prefetch::{GradHome, SectionId, Tier};

use super::engine::{Engine, key};
use super::places::SlabPlace;
use super::update;
use super::weights::Weights;
use crate::device::{Span, Stream};
use crate::error::Result;
use crate::model::Section;

/// Where the states of a part come from.
enum Source<'a> {
    /// fp32 values of the whole section; moments are zero.
    New(&'a [f32]),
    /// The store.
    Stored,
}

impl Engine {
    /// Fills all states with first weights, section by section.
    pub(super) fn initialize(
        &mut self,
        sections: &[Section],
        from: &mut dyn Weights,
    ) -> Result<()> {
        let largest = sections.iter().map(Section::elements).max().unwrap_or(0);
        let mut master = vec![0.0f32; largest as usize];
        for (id, section) in (0..).map(SectionId).zip(sections) {
            let master = &mut master[..section.elements() as usize];
            master.fill(0.0);
            for (start, tensor) in section.places() {
                let out = &mut master[start..start + tensor.shape.elements()];
                from.fill(section, tensor, out)?;
            }
            self.load(id, &Source::New(master))?;
        }
        Ok(())
    }

    /// Brings the states of the opened generation to their places.
    pub(super) fn restore(&mut self) -> Result<()> {
        for section in (0..self.places.param.len() as u32).map(SectionId) {
            self.load(section, &Source::Stored)?;
        }
        Ok(())
    }

    /// Derives a section's parameters anew from its stored master.
    pub(super) fn derive_param(&mut self, section: SectionId) -> Result<()> {
        self.load(section, &Source::Stored)
    }

    fn load(&mut self, section: SectionId, source: &Source<'_>) -> Result<()> {
        let param_home = self.placement.param_home(section);
        let stored = matches!(source, Source::Stored)
            && param_home == Tier::Disk
            && self.store.contains(key(section, StateKind::Param, 0));
        let staging = match self.placement.grad_home(section) {
            GradHome::Slab => SlabPlace::Grad(section),
            _ => SlabPlace::Pool(self.placement.grad_stage_pool(section), 0),
        };
        for (index, part) in (0..).zip(self.placement.parts(section).to_vec()) {
            let home = part.home == Tier::Pinned;
            let name = key(section, StateKind::Optim, index);
            if stored && !home && self.store.contains(name) {
                continue;
            }
            let place = if home {
                SlabPlace::Optim(section, index)
            } else {
                SlabPlace::Pool(self.placement.optim_stage_pool(), 0)
            };
            let (first, elements) = (part.first as usize, part.elements as usize);
            let mut slab = self.places.take_slab(place);
            match source {
                Source::New(master) => {
                    let states: &mut [f32] = bytemuck::cast_slice_mut(&mut slab[..12 * elements]);
                    let (new, moments) = states.split_at_mut(elements);
                    new.copy_from_slice(&master[first..first + elements]);
                    moments.fill(0.0);
                    if !home {
                        slab = self.transfer(name, slab, true)?;
                    }
                }
                Source::Stored if self.store.contains(name) => {
                    slab = self.transfer(name, slab, false)?;
                }
                // Stored in other parts: by more ranks, or in larger pieces.
                Source::Stored => {
                    self.store.gather(name, &mut slab[..12 * elements])?;
                    if !home {
                        slab = self.transfer(name, slab, true)?;
                    }
                }
            }
            if !stored {
                let target = match &mut self.places.param[section.0 as usize] {
                    Some(home) => home.address(),
                    None => self.places.get(staging).address(),
                };
                let dtype = self.model.dtype;
                let masters: &[f32] = bytemuck::cast_slice(&slab[..4 * elements]);
                // SAFETY: nothing is under way on either slab; the part lies inside the section.
                unsafe { update::cast_masters(masters, target.add(first * dtype.bytes()), dtype) };
            }
            self.places.return_slab(place, slab);
        }
        match param_home {
            Tier::Device => self.push_now(section, staging),
            Tier::Disk if !stored => {
                let slab = self.places.take_slab(staging);
                let slab = self.transfer(key(section, StateKind::Param, 0), slab, true)?;
                self.places.return_slab(staging, slab);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn push_now(&mut self, section: SectionId, from: SlabPlace) -> Result<()> {
        let address = self.resident(section);
        let bytes = self.section_bytes(section);
        let source = self.places.get(from).address();
        // SAFETY: waited for at once, while nothing else is under way on either place.
        let event = unsafe {
            self.device
                .copy_in(Stream::H2d, Span { address, bytes }, source)
        };
        while !self.device.query(event)? {
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// Writes what lives in pinned memory and publishes everything with the trainer's own part.
    pub(super) fn publish(&mut self, meta: &str) -> Result<u64> {
        self.settle()?;
        let mut places = Vec::new();
        for section in (0..self.places.param.len() as u32).map(SectionId) {
            let parts = (0..).zip(self.placement.parts(section));
            let pinned = parts.filter(|(_, part)| part.home == Tier::Pinned);
            places.extend(pinned.map(|(index, _)| (section, index)));
        }
        let mut under_way = Vec::new();
        for (section, index) in places {
            while !self.store.can_start() {
                self.collect_one(&mut under_way)?;
            }
            let place = SlabPlace::Optim(section, index);
            let name = key(section, StateKind::Optim, index);
            let slab = self.places.take_slab(place);
            self.store.write_with(name, slab, Priority::Checkpoint)?;
            under_way.push((name, place));
        }
        while !under_way.is_empty() {
            self.collect_one(&mut under_way)?;
        }
        let generation = self.store.publish(meta)?;
        self.telemetry.pause(self.device.busy(Stream::Compute));
        Ok(generation)
    }

    fn collect_one(&mut self, under_way: &mut Vec<(Key, SlabPlace)>) -> Result<()> {
        let done = self.next_done()?;
        let index = under_way.iter().position(|(key, _)| *key == done.key);
        let (_, place) = under_way.swap_remove(index.expect("every transfer was noted"));
        self.places.return_slab(place, done.slab);
        Ok(done.result?)
    }

    /// One transfer, waited for, while no other is under way.
    fn transfer(&mut self, key: Key, slab: Slab, write: bool) -> Result<Slab> {
        if write {
            self.store.write(key, slab)?
        } else {
            self.store.read(key, slab)?
        }
        let done = self.next_done()?;
        done.result?;
        Ok(done.slab)
    }

    fn next_done(&mut self) -> Result<Done> {
        loop {
            if let Some(done) = self.store.try_next() {
                return Ok(done);
            }
            self.store.health()?;
            self.nap();
        }
    }
}
