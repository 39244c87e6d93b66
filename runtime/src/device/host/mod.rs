//! The `host` device: a CPU in the shape of a GPU. Its memory is one mapping of exactly the
//! budget; its streams are threads; its copies are real copies.

use std::sync::Arc;
use std::time::Duration;

use forebay_kernels::cpu::Workers;
use forebay_pinned::Arena;

use super::{Device, Event, Span, Stream};
use crate::Bytes;
use crate::error::{Error, Result};
use crate::operation::{HostContext, Launch};
use crate::queue::{Notifier, WorkQueue, Worked};
use crate::target::Target;

mod memory;

use memory::Mapping;

/// Tasks that may wait on one stream: far more than a decoder layer queues, so that the trainer
/// runs ahead; few enough to be a bound.
const STREAM_DEPTH: usize = 256;

/// See the module.
pub(crate) struct HostDevice {
    // Before the memory: streams end (and with them every use of it) before it is unmapped.
    streams: [WorkQueue; 3],
    context: Arc<HostContext>,
    memory: Mapping,
    pinned: Vec<Arena>,
}

impl HostDevice {
    /// Maps `budget` bytes and starts the streams; operations run on `threads` threads.
    pub(crate) fn new(budget: u64, threads: usize, notifier: &Arc<Notifier>) -> Result<Self> {
        let memory = Mapping::new(budget).map_err(Error::system(format!(
            "mapping {} for the host device",
            Bytes(budget)
        )))?;
        let workers = Workers::new(threads, "fb-compute")
            .map_err(Error::system("starting the host device's worker threads"))?;
        let stream = |name: &str| {
            WorkQueue::new(name, STREAM_DEPTH, Arc::clone(notifier)).map_err(Error::system(
                format!("starting the thread of stream {name}"),
            ))
        };
        Ok(Self {
            streams: [stream("fb-stream")?, stream("fb-h2d")?, stream("fb-d2h")?],
            context: Arc::new(HostContext { workers }),
            memory,
            pinned: Vec::new(),
        })
    }

    fn stream(&mut self, stream: Stream) -> &mut WorkQueue {
        &mut self.streams[stream as usize]
    }

    fn contains(&self, span: Span) -> bool {
        self.memory().contains(span)
    }

    fn is_pinned(&self, span: Span) -> bool {
        let inside = |arena: &Arena| {
            let all = Span {
                address: arena.base() as u64,
                bytes: arena.capacity(),
            };
            all.contains(span)
        };
        self.pinned.iter().any(inside)
    }
}

impl Device for HostDevice {
    fn name(&self) -> String {
        format!("host ({} threads)", self.context.workers.threads())
    }

    fn memory(&self) -> Span {
        Span {
            address: self.memory.base() as u64,
            bytes: self.memory.bytes(),
        }
    }

    fn pin(&mut self, arena: &Arena) -> Result<()> {
        self.pinned.push(arena.clone());
        Ok(())
    }

    fn mapped(&self, host: *const u8) -> Option<u64> {
        let address = host as u64;
        let byte = Span { address, bytes: 1 };
        self.is_pinned(byte).then_some(address)
    }

    unsafe fn copy_in(&mut self, stream: Stream, to: Span, source: *const u8) -> Event {
        assert!(self.contains(to), "a copy outside device memory");
        let source = source as usize;
        let seq = self.stream(stream).push("copy in", move || {
            // SAFETY: the caller keeps both places until the event (contract of `copy_in`).
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source as *const u8,
                    to.address as *mut u8,
                    to.bytes as usize,
                );
            }
            Ok(())
        });
        Event { stream, seq }
    }

    unsafe fn copy_out(&mut self, stream: Stream, from: Span, target: *mut u8) -> Event {
        assert!(self.contains(from), "a copy outside device memory");
        let target = target as usize;
        let seq = self.stream(stream).push("copy out", move || {
            // SAFETY: the caller keeps both places until the event (contract of `copy_out`).
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from.address as *const u8,
                    target as *mut u8,
                    from.bytes as usize,
                );
            }
            Ok(())
        });
        Event { stream, seq }
    }

    unsafe fn copy(&mut self, from: u64, to: Span) {
        let source = Span {
            address: from,
            bytes: to.bytes,
        };
        assert!(
            self.contains(source) && self.contains(to),
            "a copy outside device memory"
        );
        self.stream(Stream::Compute).push("copy", move || {
            // SAFETY: both places are mapped (checked above) and ordered by the caller.
            unsafe { std::ptr::copy(from as *const u8, to.address as *mut u8, to.bytes as usize) };
            Ok(())
        });
    }

    unsafe fn launch(&mut self, launch: Launch) {
        assert!(
            launch.lies_in(self.memory(), |span| self.is_pinned(span)),
            "'{}' was given memory outside the device",
            launch.name()
        );
        let context = Arc::clone(&self.context);
        self.stream(Stream::Compute).push(launch.name(), move || {
            // SAFETY: the views lie in mapped memory (checked above) that stays mapped until this
            // stream has ended (a pinned arena is kept as well), and are ordered and disjoint by the contract of `launch`.
            unsafe { launch.run_on_host(&context) }
        });
    }

    unsafe fn zero(&mut self, span: Span) {
        assert!(self.contains(span), "zeros outside device memory");
        self.stream(Stream::Compute).push("zero", move || {
            // SAFETY: by the contract of `zero`, as in `copy_in`.
            unsafe { std::ptr::write_bytes(span.address as *mut u8, 0, span.bytes as usize) };
            Ok(())
        });
    }

    fn newest(&mut self, stream: Stream) -> Event {
        Event {
            stream,
            seq: self.streams[stream as usize].newest(),
        }
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        if stream != event.stream && !self.streams[event.stream as usize].reached(event.seq) {
            let other = self.streams[event.stream as usize].progress();
            self.stream(stream).push_wait(other, event.seq);
        }
    }

    fn query(&mut self, event: Event) -> Result<bool> {
        // Before the failures: what is done is done well only if there was none until then.
        let reached = self.streams[event.stream as usize].reached(event.seq);
        for stream in &self.streams {
            if let Some(failure) = stream.failure() {
                return Err(Error::Device {
                    operation: failure.operation,
                    what: failure.what,
                });
            }
        }
        Ok(reached)
    }

    fn drain(&mut self) {
        self.streams.iter().for_each(WorkQueue::drain);
    }

    fn target(&self) -> Target {
        Target::Host {
            threads: self.context.workers.threads(),
        }
    }

    fn busy(&self, stream: Stream) -> Duration {
        self.streams[stream as usize].busy()
    }

    fn worked(&mut self, stream: Stream) -> Vec<Worked> {
        self.streams[stream as usize].worked()
    }
}
