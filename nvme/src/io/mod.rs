//! The seam below the store: requests in, completions out.
//!
//! `uring` and `threads` do real I/O; `throttle` slows another one down. A request's memory stays
//! with the caller until its completion has come back, whatever happens.

mod threads;
mod throttle;
mod uring;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use threads::ThreadsIo;
pub(crate) use throttle::ThrottledIo;
pub(crate) use uring::UringIo;

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
pub trait Io {
    /// Takes a request, or says that it has as many as it can hold.
    ///
    /// # Safety
    /// The request's memory is valid for its length, and nobody else touches it, until its
    /// completion was taken from [`Io::wait`].
    unsafe fn submit(&mut self, request: Request) -> bool;

    /// Starts what was submitted and waits for completions, a wake-up or the timeout; appends the
    /// completions. Never loses one.
    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>);

    /// Something that ends a [`Io::wait`] from any thread, the next one if none is under way.
    fn waker(&self) -> Arc<dyn Wake>;

    /// What it is, for people.
    fn describe(&self) -> String;
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

/// Makes the I/O that was chosen, on the thread that will use it.
pub(crate) fn open(
    choice: IoChoice,
    files: Vec<File>,
    region: Region,
    throttle: Option<u64>,
) -> std::io::Result<Box<dyn Io>> {
    let forced = std::env::var_os("FOREBAY_IO").is_some_and(|v| v == "threads");
    let io: Box<dyn Io> = match choice {
        IoChoice::Threads => Box::new(ThreadsIo::new(files, "asked for")?),
        IoChoice::Auto if forced => Box::new(ThreadsIo::new(files, "FOREBAY_IO=threads")?),
        IoChoice::Uring => Box::new(UringIo::new(files, region)?),
        IoChoice::Auto => match UringIo::works() {
            Ok(()) => Box::new(UringIo::new(files, region)?),
            Err(why) => Box::new(ThreadsIo::new(files, &format!("io_uring: {why}"))?),
        },
    };
    Ok(match throttle {
        Some(bytes_per_s) => Box::new(ThrottledIo::new(io, bytes_per_s)),
        None => io,
    })
}
