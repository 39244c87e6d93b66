//! The link as the engine uses it: slabs of a pinned arena, slots in the device's one allocation, its
//! streams, and events that are asked for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_pinned::{Arena, Slab};

use super::super::Slice;
use super::{Batch, Places};
use crate::device::{Device, Event, Span, Stream, open};
use crate::error::{Error, Result};
use crate::nvme::bench::{cpu_seconds, noise};
use crate::queue::Notifier;
use crate::target::Target;

/// See the module.
pub(super) struct Ours {
    // The device goes first: it waits for what it was given, and lets the arena go.
    pub(super) device: Box<dyn Device>,
    slabs: [Slab; 2],
    pub(super) arena: Arena,
    pub(super) notifier: Arc<Notifier>,
    window: u64,
}

impl Ours {
    pub(super) fn new(target: Target, window: u64) -> Result<Self> {
        let notifier = Arc::new(Notifier::default());
        let mut device = open(target, 2 * window, &notifier, None)?;
        let arena = Arena::new(2 * window)?;
        device.pin(&arena)?;
        let mut all = Self {
            slabs: [arena.lease(window)?, arena.lease(window)?],
            device,
            arena,
            notifier,
            window,
        };
        all.check()?;
        Ok(all)
    }

    /// Sends noise to both slots and brings it back: it must be what was sent.
    fn check(&mut self) -> Result<()> {
        noise(&mut self.slabs[0], 1);
        self.slabs[1].fill(0);
        let slots = [self.slot(0, 0, self.window), self.slot(1, 0, self.window)];
        let [from, to] = [self.slabs[0].address(), self.slabs[1].address()];
        // SAFETY: slabs and slots are this value's, and as long as the spans; events order the streams,
        // and the last is waited for.
        let last = unsafe {
            self.device.copy_in(Stream::H2d, slots[0], from);
            let sent = self.device.copy_in(Stream::H2d, slots[1], from);
            self.device.wait(Stream::D2h, sent);
            self.device.copy_out(Stream::D2h, slots[1], to)
        };
        self.wait(last)?;
        if self.slabs[0][..] == self.slabs[1][..] {
            return Ok(());
        }
        Err(Error::Measure {
            what: "copies",
            why: "what came back from the device is not what was sent".to_owned(),
        })
    }

    /// Its memory, as addresses.
    pub(super) fn places(&self) -> Places {
        Places {
            slabs: [0, 1].map(|i| self.slabs[i].address() as u64),
            slots: [0, 1].map(|i| self.slot(i, 0, 0).address),
            window: self.window,
        }
    }

    /// A piece of one of the two slots.
    fn slot(&self, number: u64, at: u64, bytes: u64) -> Span {
        Span {
            address: self.device.memory().address + number * self.window + at,
            bytes,
        }
    }

    /// One of the pieces of `bytes` bytes of the first slot, by any number.
    pub(super) fn piece(&self, number: u64, bytes: u64) -> Span {
        let pieces = (self.window / bytes).max(1);
        self.slot(0, number % pieces * bytes, bytes)
    }

    /// Another arena, pinned.
    pub(super) fn pin(&mut self, bytes: u64) -> Result<Arena> {
        let arena = Arena::new(bytes)?;
        self.device.pin(&arena)?;
        Ok(arena)
    }

    /// Sleeps until an event has come.
    fn wait(&mut self, event: Event) -> Result<()> {
        while !self.device.query(event)? {
            self.notifier.wait(Duration::from_millis(50));
        }
        Ok(())
    }

    /// One slice.
    pub(super) fn slice(&mut self, batch: Batch) -> Result<Slice> {
        let (cpu, start) = (cpu_seconds(), Instant::now());
        let [into, out] = [self.slabs[0].address(), self.slabs[1].address()];
        let mut last = [None; 2];
        for piece in 0..batch.copies {
            let at = batch.offset(piece, self.window);
            let slots = [self.slot(0, at, batch.size), self.slot(1, at, batch.size)];
            // SAFETY: each way has a slab and a slot of its own, both `window` bytes, which live as long
            // as the device; nobody looks at them before the last events, below.
            unsafe {
                if batch.way.into_device() {
                    let from = into.add(at as usize);
                    last[0] = Some(self.device.copy_in(Stream::H2d, slots[0], from));
                }
                if batch.way.out_of_device() {
                    let to = out.add(at as usize);
                    last[1] = Some(self.device.copy_out(Stream::D2h, slots[1], to));
                }
            }
        }
        for event in last.into_iter().flatten() {
            self.wait(event)?;
        }
        Ok(Slice {
            bytes: batch.bytes(),
            seconds: start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - cpu,
        })
    }
}
