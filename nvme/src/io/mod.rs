//! The seam below the store: requests in, completions out.
//!
//! `uring` and `threads` do real I/O; `throttle` slows another one down. A request's memory stays
//! with the caller until its completion has come back, whatever happens.

mod threads;
mod throttle;
mod uring;

use std::fs::File;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub(crate) use threads::ThreadsIo;
pub(crate) use throttle::ThrottledIo;
pub(crate) use uring::{UringIo, build};

/// Which way of doing I/O to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoChoice {
    /// io_uring if it works here, else threads. The environment's `FOREBAY_IO=threads` forces them.
    #[default]
    Auto,
    /// io_uring, or fail.
    Uring,
    /// A pool of threads with plain reads and writes.
    Threads,
}

/// How I/O is done on a disk. Defaults come from the disk's [profile](crate::profile).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Which way.
    pub io: IoChoice,
    /// Bytes of a request: a multiple of 256 KiB.
    pub block: u32,
    /// Requests under way at once.
    pub depth: u32,
    /// A kernel thread that takes requests without a system call, where it works.
    pub sqpoll: bool,
    /// Completions by polling the device, where it works.
    pub iopoll: bool,
    /// Slows the disk down to so many bytes per second.
    pub throttle: Option<u64>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            io: IoChoice::Auto,
            block: 1 << 20,
            depth: 32,
            sqpoll: false,
            iopoll: false,
            throttle: None,
        }
    }
}

/// The most requests under way at once.
pub(crate) const DEPTH_MAX: u32 = 256;

impl Tuning {
    /// Within what the engine can do, whoever wrote it.
    pub(crate) fn sane(self) -> Self {
        let granule = crate::checksum::GRANULE as u32;
        Self {
            block: (self.block / granule * granule).clamp(granule, 64 << 20),
            depth: self.depth.clamp(1, DEPTH_MAX),
            ..self
        }
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// From file to memory.
    Read,
    /// From memory to file.
    Write,
    /// All data of the file to stable storage.
    Sync,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Comes back with the completion.
    pub id: u64,
    /// What to do.
    pub op: IoOp,
    /// Index of the file among those the I/O was made with.
    pub file: u32,
    /// Byte offset in the file.
    pub offset: u64,
    /// Memory, valid until the completion.
    pub memory: *mut u8,
    /// Bytes.
    pub len: u32,
}

// SAFETY: an address; whoever submits keeps the memory for the request alone.
unsafe impl Send for Request {}

/// The end of a request: bytes moved, or a negative errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's.
    pub id: u64,
    /// Bytes moved (may be fewer than asked), or a negative errno.
    pub result: i32,
}

/// A way of doing I/O on a fixed set of files. Used by one thread.
pub trait Io: Send {
    /// Takes a request, or says that it has as many as it can hold.
    ///
    /// # Safety
    /// The request's memory is valid for its length, and nobody else touches it, until its
    /// completion was taken from [`Io::wait`].
    unsafe fn submit(&mut self, request: Request) -> bool;

    /// Hands what was submitted to the device, without waiting.
    fn start(&mut self) {}

    /// Starts what was submitted and waits for completions, a wake-up or the timeout; appends the
    /// completions. Never loses one.
    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>);

    /// Something that ends a [`Io::wait`] from any thread, the next one if none is under way.
    fn waker(&self) -> Arc<dyn Wake>;

    /// What it is, for people.
    fn describe(&self) -> String;

    /// Time since some fixed moment; a simulation has its own.
    fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}

/// Ends a wait from another thread.
pub trait Wake: Send + Sync {
    /// Does it.
    fn wake(&self);
}

/// Memory that I/O will come from and go to, to be registered where that helps.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Its start.
    pub start: *mut u8,
    /// Its length.
    pub bytes: u64,
}

// SAFETY: an address and a length; whoever makes the I/O keeps the memory mapped.
unsafe impl Send for Region {}

/// Makes the I/O that was chosen, on the thread that will use it.
pub(crate) fn open_io(
    files: Vec<File>,
    region: Option<Region>,
    tuning: Tuning,
) -> std::io::Result<Box<dyn Io>> {
    let forced = std::env::var_os("FOREBAY_IO").is_some_and(|v| v == "threads");
    let io: Box<dyn Io> = match tuning.io {
        IoChoice::Threads => Box::new(ThreadsIo::new(files, "asked for")?),
        IoChoice::Auto if forced => Box::new(ThreadsIo::new(files, "FOREBAY_IO=threads")?),
        IoChoice::Uring => Box::new(UringIo::new(files, region, &tuning)?),
        IoChoice::Auto => match UringIo::works() {
            Ok(()) => Box::new(UringIo::new(files, region, &tuning)?),
            Err(why) => Box::new(ThreadsIo::new(files, &format!("io_uring: {why}"))?),
        },
    };
    Ok(match tuning.throttle {
        Some(bytes_per_s) => Box::new(ThrottledIo::new(io, bytes_per_s)),
        None => io,
    })
}
