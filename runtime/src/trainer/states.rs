//! Bringing states to their places: of a new model, of a stored one, and after a step was undone;
//! and making them a generation.

use std::time::Duration;

use forebay_kernels::cpu::Master;
use forebay_nvme::{Done, Key, Priority, StateKind};
use forebay_pinned::Slab;
use forebay_prefetch::{GradHome, PoolId, SectionId, Tier};

use super::engine::{Engine, key};
use super::places::SlabPlace;
use super::update;
use super::weights::Weights;
use crate::device::{Event, Span, Stream};
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
        self.cut_trace();
        Ok(())
    }

    /// Brings the states of the opened generation to their places.
    pub(super) fn restore(&mut self) -> Result<()> {
        for section in (0..self.places.param.len() as u32).map(SectionId) {
            self.load(section, &Source::Stored)?;
        }
        self.cut_trace();
        Ok(())
    }

    /// Derives a section's parameters anew from its stored master.
    pub(super) fn derive_param(&mut self, section: SectionId) -> Result<()> {
        self.load(section, &Source::Stored)
    }

    fn load(&mut self, section: SectionId, source: &Source<'_>) -> Result<()> {
        if self.placement.grad_home(section) == GradHome::Device {
            return self.load_on_device(section, source);
        }
        let param_home = self.placement.param_home(section);
        let name = key(section, StateKind::Param, 0);
        let stored = matches!(source, Source::Stored) && self.store.contains(name);
        let there = stored && param_home == Tier::Disk;
        let staging = match self.placement.grad_home(section) {
            _ if self.placement.param_slab(section) => SlabPlace::Param(section),
            GradHome::Slab => SlabPlace::Grad(section),
            _ => SlabPlace::Pool(self.placement.grad_stage_pool(section), 0),
        };
        // Parameters of a split master are no less a state than what is kept beside them.
        let resumed = matches!(source, Source::Stored);
        let derived = !(stored || self.split() && resumed);
        for (index, part) in (0..).zip(self.placement.parts(section).to_vec()) {
            let home = part.home == Tier::Pinned;
            let optim = key(section, StateKind::Optim, index);
            if there && !home && self.store.contains(optim) {
                continue;
            }
            let place = if home {
                SlabPlace::Optim(section, index)
            } else {
                SlabPlace::Pool(self.placement.optim_stage_pool(), 0)
            };
            self.load_part(section, index, place, source)?;
            if !(home || resumed && self.store.contains(optim)) {
                let slab = self.places.take_slab(place);
                let slab = self.transfer(optim, slab, true)?;
                self.places.return_slab(place, slab);
            }
            if derived {
                let (first, elements) = (part.first as usize, part.elements as usize);
                let (states, dtype) = (self.places.get(place), self.model.dtype);
                let masters = match source {
                    Source::New(masters) => &masters[first..first + elements],
                    Source::Stored => bytemuck::cast_slice(&states[..4 * elements]),
                };
                let target = self.places.get(staging).address();
                // SAFETY: nothing is under way on either slab; the part lies inside the section.
                unsafe { update::cast_masters(masters, target.add(first * dtype.bytes()), dtype) };
            }
        }
        if !derived && !there {
            let slab = self.places.take_slab(staging);
            let slab = self.transfer(name, slab, false)?;
            self.places.return_slab(staging, slab);
        }
        match param_home {
            Tier::Device => self.push_now(section, staging),
            Tier::Disk if !there => {
                let slab = self.places.take_slab(staging);
                let slab = self.transfer(name, slab, true)?;
                self.places.return_slab(staging, slab);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Brings the states of a part to a slab.
    fn load_part(
        &mut self,
        section: SectionId,
        index: u32,
        place: SlabPlace,
        source: &Source<'_>,
    ) -> Result<()> {
        let part = self.placement.parts(section)[index as usize];
        let (first, elements) = (part.first as usize, part.elements as usize);
        let bytes = self.placement.optim_bytes(&part) as usize;
        let name = key(section, StateKind::Optim, index);
        let mut slab = self.places.take_slab(place);
        match source {
            Source::New(masters) => {
                let format = self.updater.format;
                format.fill(&mut slab[..bytes], &masters[first..first + elements]);
            }
            Source::Stored if self.store.contains(name) => {
                slab = self.transfer(name, slab, false)?;
            }
            // Stored in other parts: by more ranks, or in larger pieces.
            Source::Stored => self.store.gather(name, &mut slab[..bytes])?,
        }
        self.places.return_slab(place, slab);
        Ok(())
    }

    fn split(&self) -> bool {
        self.updater.format.master == Master::Split
    }

    /// As [`Engine::load`], for a section that is updated on the device.
    fn load_on_device(&mut self, section: SectionId, source: &Source<'_>) -> Result<()> {
        let place = SlabPlace::Pool(self.placement.optim_stage_pool(), 0);
        for (index, part) in (0..).zip(self.placement.parts(section).to_vec()) {
            self.load_part(section, index, place, source)?;
            let to = Span {
                address: self.places.states(section, index),
                bytes: self.placement.optim_bytes(&part),
            };
            let from = self.places.get(place).address();
            // SAFETY: waited for at once, while nothing else is under way on either place.
            let event = unsafe { self.device.copy_in(Stream::H2d, to, from) };
            self.wait_now(event)?;
            if !self.split() {
                self.derive_here(section, index)?;
            }
        }
        if self.split() {
            return self.load_params(section, source);
        }
        let event = self.device.newest(Stream::Compute);
        self.wait_now(event)
    }

    /// Brings the parameters of a split master to the device, by way of a shared slab.
    fn load_params(&mut self, section: SectionId, source: &Source<'_>) -> Result<()> {
        let staging = SlabPlace::Pool(self.placement.param_stage_pool(section), 0);
        match source {
            Source::New(masters) => {
                let target = self.places.get(staging).address();
                // SAFETY: nothing is under way on the slab, which holds a section.
                unsafe { update::cast_masters(masters, target, self.model.dtype) };
            }
            Source::Stored => {
                let slab = self.places.take_slab(staging);
                let slab = self.transfer(key(section, StateKind::Param, 0), slab, false)?;
                self.places.return_slab(staging, slab);
            }
        }
        self.push_now(section, staging)
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
        self.wait_now(event)
    }

    fn wait_now(&mut self, event: Event) -> Result<()> {
        while !self.device.query(event)? {
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// Writes what does not live on disk and publishes everything with the trainer's own part.
    pub(super) fn publish(&mut self, meta: &str) -> Result<u64> {
        self.settle()?;
        let mut parts = Vec::new();
        for section in (0..self.places.param.len() as u32).map(SectionId) {
            let all = (0..).zip(self.placement.parts(section));
            let volatile = all.filter(|(_, part)| part.home != Tier::Disk);
            parts.extend(volatile.map(|(index, part)| (section, index, *part)));
        }
        let mut under_way = Vec::new();
        for (section, index, part) in parts {
            let place = if part.home == Tier::Device {
                let from = Span {
                    address: self.places.states(section, index),
                    bytes: self.placement.optim_bytes(&part),
                };
                self.bring_back(self.placement.optim_stage_pool(), from, &mut under_way)?
            } else {
                SlabPlace::Optim(section, index)
            };
            let name = key(section, StateKind::Optim, index);
            self.write_out(name, place, &mut under_way)?;
        }
        if self.split() {
            self.publish_params(&mut under_way)?;
        }
        while !under_way.is_empty() {
            self.collect_one(&mut under_way)?;
        }
        let generation = self.store.publish(meta)?;
        self.telemetry.pause(self.device.busy(Stream::Compute));
        self.cut_trace();
        Ok(generation)
    }

    /// Writes the parameters of a split master that do not live on disk.
    fn publish_params(&mut self, under_way: &mut Vec<(Key, SlabPlace)>) -> Result<()> {
        for section in (0..self.places.param.len() as u32).map(SectionId) {
            if self.placement.param_home(section) == Tier::Disk {
                continue;
            }
            let place = if self.placement.param_slab(section) {
                SlabPlace::Param(section)
            } else {
                let from = Span {
                    address: self.resident(section),
                    bytes: self.section_bytes(section),
                };
                self.bring_back(self.placement.param_stage_pool(section), from, under_way)?
            };
            let name = key(section, StateKind::Param, 0);
            self.write_out(name, place, under_way)?;
        }
        Ok(())
    }

    /// Writes a state of a generation, once the store can begin another.
    fn write_out(
        &mut self,
        name: Key,
        place: SlabPlace,
        under_way: &mut Vec<(Key, SlabPlace)>,
    ) -> Result<()> {
        while !self.store.can_start() {
            self.collect_one(under_way)?;
        }
        let slab = self.places.take_slab(place);
        self.store.write_with(name, slab, Priority::Checkpoint)?;
        under_way.push((name, place));
        Ok(())
    }

    /// Copies from the device to a shared slab that is free, or gets free.
    fn bring_back(
        &mut self,
        pool: PoolId,
        from: Span,
        under_way: &mut Vec<(Key, SlabPlace)>,
    ) -> Result<SlabPlace> {
        let buffers = self.placement.pools()[pool.0 as usize].buffers as u32;
        let place = loop {
            let mut all = (0..buffers).map(|buffer| SlabPlace::Pool(pool, buffer));
            match all.find(|place| under_way.iter().all(|(_, used)| used != place)) {
                Some(place) => break place,
                None => self.collect_one(under_way)?,
            }
        };
        let target = self.places.get(place).address();
        // SAFETY: waited for at once; the slab is with nobody, and all updates are done.
        let event = unsafe { self.device.copy_out(Stream::D2h, from, target) };
        self.wait_now(event)?;
        Ok(place)
    }

    fn collect_one(&mut self, under_way: &mut Vec<(Key, SlabPlace)>) -> Result<()> {
        let done = self.next_done()?;
        let index = under_way.iter().position(|(key, _)| *key == done.key);
        let (_, place) = under_way.swap_remove(index.expect("every transfer was noted"));
        self.places.return_slab(place, done.slab);
        Ok(done.result?)
    }

    /// One transfer, waited for. Others that are under way are tasks of the plan.
    fn transfer(&mut self, key: Key, slab: Slab, write: bool) -> Result<Slab> {
        if write {
            self.store.write(key, slab)?
        } else {
            self.store.read(key, slab)?
        }
        loop {
            let done = self.next_done()?;
            if done.key == key {
                done.result?;
                return Ok(done.slab);
            }
            self.moved(done)?;
        }
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
