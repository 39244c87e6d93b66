//! The seam between the engine and a device: one block of memory, three streams, events, copies
//! and launches. The engine never asks which device it has.
//!
//! Everything a stream is given runs in order on that stream and nothing else orders anything:
//! two streams are ordered by [`Device::wait`] alone. `cuda` is a GPU; `host` gives a CPU its shape.

pub(crate) mod cuda;
pub(crate) mod host;

use std::sync::Arc;
use std::time::Duration;

use forebay_pinned::Arena;

use crate::error::{Error, Result};
use crate::operation::Launch;
use crate::queue::{Notifier, Worked};
use crate::target::{ExternalStream, Target};

/// Opens the device of a target with a block of `budget` bytes, to compute on a stream of the caller's if
/// one is given.
pub(crate) fn open(
    target: Target,
    budget: u64,
    notifier: &Arc<Notifier>,
    stream: Option<ExternalStream>,
) -> Result<Box<dyn Device>> {
    Ok(match (target, stream) {
        (Target::Host { threads }, None) => {
            Box::new(host::HostDevice::new(budget, threads, notifier)?)
        }
        (Target::Host { .. }, Some(_)) => {
            let what =
                "a CUDA stream was given, and the host device computes; ask for the cuda device";
            return Err(Error::Misuse(what.to_owned()));
        }
        (Target::Cuda, stream) => Box::new(cuda::CudaDevice::new(budget, notifier, stream)?),
    })
}

/// The streams of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Operations.
    Compute,
    /// Copies from pinned memory to the device.
    H2d,
    /// Copies from the device to pinned memory.
    D2h,
}

/// All that was queued on a stream up to some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) stream: Stream,
    pub(crate) seq: u64,
}

impl Span {
    /// Whether the two share a byte.
    pub(crate) fn overlaps(&self, other: Span) -> bool {
        self.address < other.address + other.bytes && other.address < self.address + self.bytes
    }

    /// Whether `other` lies inside.
    pub(crate) fn contains(&self, other: Span) -> bool {
        other.address >= self.address
            && other.bytes <= self.bytes
            && other.address - self.address <= self.bytes - other.bytes
    }
}

/// A place in device memory, by address and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
}

/// What a device is and does. One object drives one device; calls come from one thread at a time.
pub(crate) trait Device: Send {
    /// Its name, for people.
    fn name(&self) -> String;

    /// The one block of memory that is its budget.
    fn memory(&self) -> Span;

    /// Makes page-locked memory known to the device, so that copies from and to it run by themselves.
    /// A device that ends without an answer keeps it mapped for good.
    fn pin(&mut self, arena: &Arena) -> Result<()>;

    /// Where operations find memory that was pinned, to read it; `None` for any other.
    fn mapped(&self, host: *const u8) -> Option<u64>;

    /// Queues a copy into device memory on `stream` and returns the event of its end.
    ///
    /// # Safety
    /// `source` is readable for `to.bytes` bytes and nobody writes it until the event; `to` lies in
    /// [`Device::memory`] and nothing unordered with `stream` touches it.
    unsafe fn copy_in(&mut self, stream: Stream, to: Span, source: *const u8) -> Event;

    /// Queues a copy out of device memory on `stream` and returns the event of its end.
    ///
    /// # Safety
    /// `target` is writable for `from.bytes` bytes and nobody else touches it until the event;
    /// `from` lies in [`Device::memory`] and nothing unordered with `stream` writes it.
    unsafe fn copy_out(&mut self, stream: Stream, from: Span, target: *mut u8) -> Event;

    /// Queues a copy within device memory on the compute stream; [`Device::newest`] gives its event.
    ///
    /// # Safety
    /// As for [`Device::launch`].
    unsafe fn copy(&mut self, from: u64, to: Span);

    /// Queues an operation on the compute stream; [`Device::newest`] gives its event.
    ///
    /// # Safety
    /// Its views lie in [`Device::memory`], or, where they are only read, in memory that was pinned; what
    /// it writes overlaps no other view of it; and nothing unordered with the compute stream touches
    /// what it writes, or writes what it reads.
    unsafe fn launch(&mut self, launch: Launch);

    /// Queues zeros into `span` on the compute stream; [`Device::newest`] gives its event.
    ///
    /// # Safety
    /// As for [`Device::launch`].
    unsafe fn zero(&mut self, span: Span);

    /// Everything queued so far on `stream`.
    fn newest(&mut self, stream: Stream) -> Event;

    /// What is queued on `stream` from here on starts after `event`.
    fn wait(&mut self, stream: Stream, event: Event);

    /// Whether `event` has happened.
    ///
    /// # Errors
    /// [`crate::Error::Device`], from the first failure on for ever (a lost device is sticky).
    fn query(&mut self, event: Event) -> Result<bool>;

    /// Blocks until all streams are empty. Returns on a failed device too, and on one that does not
    /// answer for a while: what that one may still touch is kept for good when it is dropped.
    fn drain(&mut self);

    /// What operations run on, for the sizes of workspaces.
    fn target(&self) -> Target;

    /// Time that `stream` has spent working so far.
    fn busy(&self, stream: Stream) -> Duration;

    /// What `stream` did since this was called last, in order, and when by the device's own clock; from
    /// the first call on it is kept for it.
    fn worked(&mut self, stream: Stream) -> Vec<Worked>;
}

#[cfg(test)]
pub(crate) mod tests;
