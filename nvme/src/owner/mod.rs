//! Who owns the I/O of a store: a thread of its own, or, in a simulation, whoever asks.

mod work;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use forebay_pinned::Arena;

use crate::buffer::Buffer;
use crate::io::{Region, Tuning, Wake};
use crate::medium::Volume;
use work::Work;

/// Transfers that may be under way at once.
pub(crate) const TRANSFERS: usize = 64;

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From disk to memory.
    Read,
    /// From memory to disk.
    Write,
}

/// What a transfer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    /// Everything written to the file so far, to stable storage.
    Sync,
}

/// Whose requests go first, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for it: parameters, on their way to the device.
    Urgent,
    /// States on their way to and from the optimizer.
    Normal,
    /// Gradients that make room.
    Spill,
    /// Writes of a generation.
    Checkpoint,
}

/// Where an extent is and what makes its checksum its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Mixed into the checksum: store, key, place and generation.
    pub(crate) seed: u64,
    /// Where in its extent it begins: a multiple of a granule.
    pub(crate) start: u64,
}

/// A transfer to do.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// Of whoever asks; comes back.
    pub(crate) tag: u32,
    /// Which of those with this tag it is.
    pub(crate) number: u64,
    pub(crate) operation: Operation,
    pub(crate) priority: Priority,
    pub(crate) target: Target,
    pub(crate) buffer: Buffer,
    /// For reads: what the checksum must be, if it is to be checked here.
    pub(crate) expected: Option<u64>,
}

impl Transfer {
    /// The most urgent first, in the order of arrival.
    fn urgency(&self) -> (Priority, u64) {
        (self.priority, self.number)
    }
}

/// A transfer that ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) tag: u32,
    pub(crate) operation: Operation,
    pub(crate) buffer: Buffer,
    pub(crate) result: Result<u64, Fault>,
}

/// Why a transfer failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The data read is not the data written.
    Checksum,
    /// The system's error, and where.
    Io { offset: u64, source: io::Error },
    /// It was told to.
    Cancelled,
}

/// A disk that does not answer.
#[derive(Clone, Debug)]
pub(crate) struct Stall {
    pub(crate) why: String,
    pub(crate) requests: usize,
    /// The tag of one of the transfers.
    pub(crate) tag: u32,
}

/// What the store's side and the owner share.
#[derive(Default)]
pub(crate) struct Counters {
    /// Bytes moved, whole blocks.
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    /// Nanoseconds in which at least one transfer was under way.
    pub(crate) busy_ns: AtomicU64,
}

struct Shared {
    asked: ArrayQueue<Transfer>,
    ended: ArrayQueue<Ended>,
    /// Numbers of transfers to give up.
    cancelled: ArrayQueue<u64>,
    closing: AtomicBool,
    counters: Counters,
    stalled: AtomicBool,
    stall: Mutex<Option<Stall>>,
    /// Called after something ended.
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Shared {
    fn new() -> Self {
        Self {
            asked: ArrayQueue::new(TRANSFERS),
            ended: ArrayQueue::new(TRANSFERS),
            cancelled: ArrayQueue::new(TRANSFERS),
            closing: AtomicBool::new(false),
            counters: Counters::default(),
            stalled: AtomicBool::new(false),
            stall: Mutex::new(None),
            notify: OnceLock::new(),
        }
    }

    fn stall(&self) -> MutexGuard<'_, Option<Stall>> {
        self.stall.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long to wait for a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For one completion, while requests are under way.
    pub(crate) stall: Duration,
    /// For everything under way to end, on close.
    pub(crate) close: Duration,
}

/// The store's side.
pub(crate) struct Owner {
    shared: Arc<Shared>,
    form: Form,
    patience: Patience,
    description: String,
}

enum Form {
    Thread {
        waker: Arc<dyn Wake>,
        thread: Option<JoinHandle<()>>,
        exited: Receiver<()>,
    },
    /// Driven by [`Owner::next`].
    Inline(Box<Work>),
}

impl Owner {
    /// Starts it, which opens the I/O. With an arena, transfers may be from and to slabs of it.
    pub(crate) fn start(
        volume: &dyn Volume,
        arena: Option<&Arena>,
        tuning: Tuning,
        patience: Patience,
        inline: bool,
    ) -> io::Result<Self> {
        let tuning = tuning.sane();
        let region = arena.map(|arena| Region {
            start: arena.base(),
            bytes: arena.capacity(),
        });
        let make = volume.io(region, tuning)?;
        let shared = Arc::new(Shared::new());
        if inline {
            let io = make()?;
            let description = io.describe();
            let work = Work::new(io, Arc::clone(&shared), tuning, patience.stall);
            return Ok(Self {
                shared,
                form: Form::Inline(Box::new(work)),
                patience,
                description,
            });
        }
        let (theirs, arena) = (Arc::clone(&shared), arena.cloned());
        let (ready, opened) = sync_channel(1);
        let (alive, exited) = sync_channel::<()>(1);
        let thread = std::thread::Builder::new()
            .name("fb-disk".to_owned())
            .spawn(move || {
                // Dropped when the thread ends; the arena stays mapped as long as I/O may touch it.
                let (_alive, _arena): (SyncSender<()>, _) = (alive, arena);
                match make() {
                    Ok(io) => {
                        let _ = ready.send(Ok((io.waker(), io.describe())));
                        Work::new(io, theirs, tuning, patience.stall).run();
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })?;
        let (waker, description) = opened
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the disk thread ended at once")))?;
        Ok(Self {
            shared,
            form: Form::Thread {
                waker,
                thread: Some(thread),
                exited,
            },
            patience,
            description,
        })
    }

    pub(crate) fn describe(&self) -> &str {
        &self.description
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    pub(crate) fn on_end(&self, notify: Box<dyn Fn() + Send + Sync>) {
        // Only the first is kept: a store has one driver.
        let _ = self.shared.notify.set(notify);
    }

    /// Hands a transfer over. The caller keeps to [`TRANSFERS`].
    pub(crate) fn ask(&self, transfer: Transfer) {
        self.shared
            .asked
            .push(transfer)
            .expect("the store keeps to the number of transfers");
        self.wake();
    }

    /// Gives a transfer up: what was not handed to the disk never is, and it ends when the rest has
    /// completed.
    pub(crate) fn cancel(&self, number: u64) {
        // A full queue holds the numbers of all that can be under way.
        let _ = self.shared.cancelled.push(number);
        self.wake();
    }

    fn wake(&self) {
        if let Form::Thread { waker, .. } = &self.form {
            waker.wake();
        }
    }

    /// A transfer that ended, if there is one.
    pub(crate) fn next(&mut self) -> Option<Ended> {
        if let Form::Inline(work) = &mut self.form {
            while self.shared.ended.is_empty() && work.turn() {}
        }
        self.shared.ended.pop()
    }

    /// Whether the disk has stopped answering. Cheap.
    pub(crate) fn stalled(&self) -> Option<Stall> {
        if self.shared.stalled.load(Ordering::Acquire) {
            self.shared.stall().clone()
        } else {
            None
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        match &mut self.form {
            Form::Inline(work) => while work.turn() {},
            Form::Thread {
                waker,
                thread,
                exited,
            } => {
                waker.wake();
                let ended = exited.recv_timeout(self.patience.close);
                if matches!(ended, Err(RecvTimeoutError::Timeout)) {
                    eprintln!(
                        "forebay: the disk did not answer for {:?}; its buffers are left to it \
                         until the process ends",
                        self.patience.close
                    );
                    return;
                }
                if let Some(thread) = thread.take() {
                    // It has ended; a panic in it was printed.
                    let _ = thread.join();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
