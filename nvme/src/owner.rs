//! The thread that owns the I/O of a store: it cuts transfers into requests, resumes short ones,
//! computes and verifies checksums, and holds every buffer until its last completion.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use forebay_pinned::{Arena, Slab};
use twox_hash::XxHash3_64;

use crate::files::BLOCK;
use crate::io::{Completion, Io, IoChoice, IoOp, Region, Request, Wake, open};

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From disk to memory.
    Read,
    /// From memory to disk.
    Write,
}

/// Transfers that may be under way at once.
pub(crate) const TRANSFERS: usize = 64;
/// Requests that may be under way at once.
const REQUESTS: usize = 64;
/// Bytes of a request: large enough that its cost vanishes, small enough to spread and to bound
/// the latency of what comes behind it.
const REQUEST_BYTES: u64 = 1 << 20;
/// How long closing waits for completions before it leaves their buffers behind.
const CLOSE_DEADLINE: Duration = Duration::from_secs(30);

/// Where an extent is and what makes its checksum its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Mixed into the checksum: key, place and generation.
    pub(crate) seed: u64,
}

/// A transfer to do.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// Of whoever asks; comes back.
    pub(crate) tag: u32,
    pub(crate) direction: Direction,
    pub(crate) target: Target,
    pub(crate) slab: Slab,
    /// For reads: what the checksum must be.
    pub(crate) checksum: u64,
}

/// A transfer that ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) tag: u32,
    pub(crate) direction: Direction,
    pub(crate) slab: Slab,
    pub(crate) result: Result<u64, Fault>,
}

/// Why a transfer failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The data read is not the data written.
    Checksum,
    /// The system's error, and where.
    Io { offset: u64, source: io::Error },
}

/// What the store's side and the owner's thread share.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    /// Nanoseconds in which at least one transfer was under way.
    pub(crate) busy_ns: AtomicU64,
}

struct Shared {
    asked: ArrayQueue<Transfer>,
    ended: ArrayQueue<Ended>,
    closing: AtomicBool,
    counters: Counters,
    /// Called after something ended.
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// The store's side of the thread.
pub(crate) struct Owner {
    shared: Arc<Shared>,
    waker: Arc<dyn Wake>,
    thread: Option<JoinHandle<()>>,
    exited: Receiver<()>,
    description: String,
}

impl Owner {
    /// Starts the thread, which opens the I/O.
    pub(crate) fn start(
        arena: &Arena,
        files: Vec<File>,
        choice: IoChoice,
        throttle: Option<u64>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            asked: ArrayQueue::new(TRANSFERS),
            ended: ArrayQueue::new(TRANSFERS),
            closing: AtomicBool::new(false),
            counters: Counters::default(),
            notify: OnceLock::new(),
        });
        let (theirs, arena) = (Arc::clone(&shared), arena.clone());
        let (ready, opened) = sync_channel(1);
        let (alive, exited) = sync_channel::<()>(1);
        let thread = std::thread::Builder::new()
            .name("fb-disk".to_owned())
            .spawn(move || {
                // Dropped when the thread ends; the arena stays mapped as long as I/O may touch it.
                let _alive: SyncSender<()> = alive;
                let region = Region {
                    start: arena.base(),
                    bytes: arena.capacity(),
                };
                match open(choice, files, region, throttle) {
                    Ok(io) => {
                        let _ = ready.send(Ok((io.waker(), io.describe())));
                        Work::new(io, &theirs).run();
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
            waker,
            thread: Some(thread),
            exited,
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
        self.waker.wake();
    }

    /// A transfer that ended, if there is one.
    pub(crate) fn next(&self) -> Option<Ended> {
        self.shared.ended.pop()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.waker.wake();
        let ended = self.exited.recv_timeout(CLOSE_DEADLINE);
        if matches!(ended, Err(std::sync::mpsc::RecvTimeoutError::Timeout)) {
            eprintln!(
                "forebay: the disk did not answer for {CLOSE_DEADLINE:?}; its buffers are left \
                 to it until the process ends"
            );
            return;
        }
        if let Some(thread) = self.thread.take() {
            // It has ended; a panic in it was printed.
            let _ = thread.join();
        }
    }
}

/// A transfer in hand.
struct Active {
    transfer: Transfer,
    checksum: u64,
    /// Bytes to move: whole blocks.
    bytes: u64,
    /// Bytes handed out in requests.
    asked: u64,
    requests: u32,
    fault: Option<Fault>,
}

/// A request in hand, and what is left of it.
#[derive(Clone, Copy)]
struct Piece {
    active: usize,
    /// Byte in the transfer.
    start: u64,
    bytes: u64,
}

struct Work<'a> {
    io: Box<dyn Io>,
    shared: &'a Shared,
    active: Vec<Option<Active>>,
    pieces: Vec<Option<Piece>>,
    /// Pieces to submit again: the rest of short transfers.
    again: Vec<usize>,
    completions: Vec<Completion>,
    since: Option<Instant>,
}

impl<'a> Work<'a> {
    fn new(io: Box<dyn Io>, shared: &'a Shared) -> Self {
        Self {
            io,
            shared,
            active: (0..TRANSFERS).map(|_| None).collect(),
            pieces: vec![None; REQUESTS],
            again: Vec::with_capacity(REQUESTS),
            completions: Vec::with_capacity(2 * REQUESTS),
            since: None,
        }
    }

    fn run(mut self) {
        loop {
            self.accept();
            self.submit();
            let idle = self.active.iter().all(Option::is_none);
            self.account(idle);
            if idle && self.shared.asked.is_empty() && self.shared.closing.load(Ordering::Acquire) {
                return;
            }
            self.io.wait(&mut self.completions, None);
            for index in 0..self.completions.len() {
                self.completed(self.completions[index]);
            }
            self.completions.clear();
        }
    }

    fn account(&mut self, idle: bool) {
        match (self.since, idle) {
            (None, false) => self.since = Some(Instant::now()),
            (Some(since), true) => {
                let busy = since.elapsed().as_nanos() as u64;
                self.shared
                    .counters
                    .busy_ns
                    .fetch_add(busy, Ordering::Relaxed);
                self.since = None;
            }
            _ => {}
        }
    }

    fn accept(&mut self) {
        while let Some(place) = self.active.iter().position(Option::is_none) {
            let Some(mut transfer) = self.shared.asked.pop() else {
                return;
            };
            let bytes = transfer.target.bytes.next_multiple_of(BLOCK);
            let mut checksum = 0;
            if transfer.direction == Direction::Write {
                clear_padding(&mut transfer.slab, transfer.target.bytes, bytes);
                checksum = hash(&transfer.slab, &transfer.target);
            }
            self.active[place] = Some(Active {
                transfer,
                checksum,
                bytes,
                asked: 0,
                requests: 0,
                fault: None,
            });
        }
    }

    /// Keeps the device busy: the rests of short transfers first, then transfers in turn.
    fn submit(&mut self) {
        while let Some(piece) = self.again.pop() {
            if !self.submit_piece(piece) {
                self.again.push(piece);
                return;
            }
        }
        for active in 0..self.active.len() {
            while let Some(place) = self.pieces.iter().position(Option::is_none) {
                let Some(work) = &mut self.active[active] else {
                    break;
                };
                if work.asked == work.bytes || work.fault.is_some() {
                    break;
                }
                let bytes = REQUEST_BYTES.min(work.bytes - work.asked);
                self.pieces[place] = Some(Piece {
                    active,
                    start: work.asked,
                    bytes,
                });
                if !self.submit_piece(place) {
                    self.pieces[place] = None;
                    return;
                }
                if let Some(work) = &mut self.active[active] {
                    work.asked += bytes;
                    work.requests += 1;
                }
            }
        }
    }

    fn submit_piece(&mut self, place: usize) -> bool {
        let Some(piece) = self.pieces[place] else {
            return true;
        };
        let Some(work) = &mut self.active[piece.active] else {
            return true;
        };
        let Transfer {
            direction,
            target,
            slab,
            ..
        } = &work.transfer;
        let request = Request {
            id: place as u64,
            op: if *direction == Direction::Read {
                IoOp::Read
            } else {
                IoOp::Write
            },
            file: target.file,
            offset: target.offset + piece.start,
            memory: slab.address().wrapping_add(piece.start as usize),
            len: piece.bytes as u32,
        };
        // SAFETY: the slab stays in `active` until its last completion, and its padded length
        // covers the whole blocks (checked by the store).
        unsafe { self.io.submit(request) }
    }

    fn completed(&mut self, completion: Completion) {
        let place = completion.id as usize;
        let Some(mut piece) = self.pieces[place] else {
            return;
        };
        let Some(work) = &mut self.active[piece.active] else {
            return;
        };
        let finished = match completion.result {
            r if r == -libc::EINTR || r == -libc::EAGAIN => 0,
            r if r < 0 => {
                let source = io::Error::from_raw_os_error(-r);
                let offset = work.transfer.target.offset + piece.start;
                work.fault.get_or_insert(Fault::Io { offset, source });
                piece.bytes
            }
            0 => {
                let source = io::ErrorKind::UnexpectedEof.into();
                let offset = work.transfer.target.offset + piece.start;
                work.fault.get_or_insert(Fault::Io { offset, source });
                piece.bytes
            }
            moved => {
                let moved = (moved as u64).min(piece.bytes);
                // What is left must start at a block again: direct I/O takes nothing else.
                let whole = if moved == piece.bytes {
                    moved
                } else {
                    moved / BLOCK * BLOCK
                };
                self.shared.count(work.transfer.direction, whole);
                whole
            }
        };
        piece.start += finished;
        piece.bytes -= finished;
        if piece.bytes > 0 && work.fault.is_none() {
            self.pieces[place] = Some(piece);
            self.again.push(place);
            return;
        }
        self.pieces[place] = None;
        work.requests -= 1;
        if work.requests == 0 && (work.asked == work.bytes || work.fault.is_some()) {
            self.end(piece.active);
        }
    }

    fn end(&mut self, active: usize) {
        let Some(work) = self.active[active].take() else {
            return;
        };
        let Transfer {
            tag,
            direction,
            target,
            slab,
            checksum,
        } = work.transfer;
        let result = match (work.fault, direction) {
            (Some(fault), _) => Err(fault),
            (None, Direction::Write) => Ok(work.checksum),
            (None, Direction::Read) if hash(&slab, &target) == checksum => Ok(checksum),
            (None, Direction::Read) => Err(Fault::Checksum),
        };
        let ended = Ended {
            tag,
            direction,
            slab,
            result,
        };
        self.shared
            .ended
            .push(ended)
            .expect("as many may end as may be asked");
        if let Some(notify) = self.shared.notify.get() {
            notify();
        }
    }
}

impl Shared {
    fn count(&self, direction: Direction, bytes: u64) {
        let counter = match direction {
            Direction::Read => &self.counters.read_bytes,
            Direction::Write => &self.counters.written_bytes,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn hash(slab: &Slab, target: &Target) -> u64 {
    XxHash3_64::oneshot_with_seed(target.seed, &slab[..target.bytes as usize])
}

/// Zeros from the end of the data to the end of its last block: nothing else leaks to disk.
fn clear_padding(slab: &mut Slab, bytes: u64, padded: u64) {
    let within = (slab.len() as u64).min(padded);
    slab[bytes as usize..within as usize].fill(0);
    let rest = (padded - within) as usize;
    // SAFETY: the lease covers its padded length, which the store checked against `padded`.
    unsafe { std::ptr::write_bytes(slab.address().add(within as usize), 0, rest) };
}

#[cfg(test)]
mod tests;
