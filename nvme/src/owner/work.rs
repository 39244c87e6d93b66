//! The work itself: cuts transfers into requests, the most urgent first, resumes short ones, computes
//! and verifies checksums, and holds every buffer until its last completion.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Ended, Fault, Operation, Shared, Stall, TRANSFERS, Transfer};
use crate::buffer::Buffer;
use crate::checksum::{GRANULE, partial};
use crate::io::{Completion, Io, IoOp, Request, Tuning};
use crate::medium::{BLOCK, padded};

/// A transfer in hand.
struct Active {
    transfer: Transfer,
    checksum: u64,
    /// Bytes to move: whole blocks.
    bytes: u64,
    /// Bytes handed out in requests.
    asked: u64,
    /// Requests that have not completed.
    requests: u32,
    /// Pieces whose part of the checksum is not yet taken.
    unhashed: u32,
    fault: Option<Fault>,
}

impl Active {
    fn hash(&mut self, start: u64, bytes: u64) {
        let target = &self.transfer.target;
        let end = (start + bytes).min(target.bytes);
        if start >= end {
            return;
        }
        // SAFETY: inside the buffer (checked by the store); a read of this part has completed, and a
        // write only reads it.
        let data = unsafe {
            std::slice::from_raw_parts(
                self.transfer.buffer.address().add(start as usize),
                (end - start) as usize,
            )
        };
        let part = partial(target.seed, target.start + start, data);
        self.checksum = self.checksum.wrapping_add(part);
    }

    fn over(&self) -> bool {
        self.requests == 0 && self.unhashed == 0 && self.all_asked()
    }

    fn all_asked(&self) -> bool {
        self.asked == self.bytes || self.fault.is_some()
    }
}

/// A request in hand, and what is left of it.
#[derive(Clone, Copy)]
struct Piece {
    active: usize,
    /// First byte in the transfer that the request was for.
    first: u64,
    /// First byte that is still to be moved.
    start: u64,
    /// Bytes still to be moved.
    bytes: u64,
}

/// See the module.
pub(super) struct Work {
    io: Option<Box<dyn Io>>,
    shared: Arc<Shared>,
    tuning: Tuning,
    patience: Duration,
    active: Vec<Option<Active>>,
    /// Those with bytes to hand out, by priority and number.
    ready: Vec<usize>,
    /// What the newest request does.
    last: Operation,
    pieces: Vec<Option<Piece>>,
    free: Vec<usize>,
    /// Pieces to submit again: the rest of short transfers.
    again: Vec<usize>,
    completions: Vec<Completion>,
    /// What to take checksums of while the disk works: a transfer, and the first byte and length in it.
    unhashed: VecDeque<(usize, u64, u64)>,
    since: Option<Duration>,
    last_progress: Duration,
}

impl Work {
    pub(super) fn new(
        io: Box<dyn Io>,
        shared: Arc<Shared>,
        tuning: Tuning,
        patience: Duration,
    ) -> Self {
        let depth = tuning.depth as usize;
        Self {
            last_progress: io.now(),
            io: Some(io),
            shared,
            tuning,
            patience,
            active: (0..TRANSFERS).map(|_| None).collect(),
            ready: Vec::with_capacity(TRANSFERS),
            last: Operation::Sync,
            pieces: vec![None; depth],
            free: (0..depth).rev().collect(),
            again: Vec::with_capacity(depth),
            completions: Vec::with_capacity(2 * depth),
            unhashed: VecDeque::with_capacity(4 * depth),
            since: None,
        }
    }

    /// Until it is told to close and everything has ended.
    pub(super) fn run(mut self) {
        loop {
            while self.turn() {}
            if self.shared.stalled.load(Ordering::Acquire)
                || self.shared.closing.load(Ordering::Acquire) && self.shared.asked.is_empty()
            {
                return;
            }
            // Nothing under way: sleeps until the next transfer.
            if let Some(io) = &mut self.io {
                io.wait(&mut self.completions, None);
            }
        }
    }

    /// Takes what was asked, hands it out, takes a checksum or waits for a completion; false when there
    /// is nothing to do.
    pub(super) fn turn(&mut self) -> bool {
        if self.shared.stalled.load(Ordering::Acquire) {
            return false;
        }
        self.accept();
        self.cancel();
        self.submit();
        let idle = self.active.iter().all(Option::is_none);
        self.account(idle);
        let Some(io) = &mut self.io else {
            return false;
        };
        if idle {
            self.last_progress = io.now();
            return false;
        }
        if let Some((active, first, bytes)) = self.unhashed.pop_front() {
            // One at a time, with the disk's queue full: what completes meanwhile is not left waiting.
            io.start();
            self.hash(active, first, bytes);
            self.reap(Duration::ZERO);
            return true;
        }
        let under_way = self.pieces.len() - self.free.len() - self.again.len();
        let progress = self.reap(self.patience);
        let now = self.io.as_ref().map_or(Duration::ZERO, |io| io.now());
        if progress || under_way == 0 {
            self.last_progress = now;
        } else if now.saturating_sub(self.last_progress) >= self.patience {
            let why = format!("the disk has not answered for {:?}", self.patience);
            self.stall(why, under_way);
            return false;
        }
        true
    }

    /// Takes completions; whether there were any.
    fn reap(&mut self, timeout: Duration) -> bool {
        if let Some(io) = &mut self.io {
            io.wait(&mut self.completions, Some(timeout));
        }
        for index in 0..self.completions.len() {
            self.completed(self.completions[index]);
        }
        let some = !self.completions.is_empty();
        self.completions.clear();
        some
    }

    fn hash(&mut self, active: usize, first: u64, bytes: u64) {
        let Some(work) = &mut self.active[active] else {
            return;
        };
        work.unhashed -= 1;
        if work.fault.is_none() {
            work.hash(first, bytes);
        }
        if work.over() {
            self.end(active);
        }
    }

    fn stall(&mut self, why: String, requests: usize) {
        let tag = self.active.iter().flatten().find(|a| a.requests > 0);
        *self.shared.stall() = Some(Stall {
            why,
            requests,
            tag: tag.map_or(0, |a| a.transfer.tag),
        });
        self.shared.stalled.store(true, Ordering::Release);
        if let Some(notify) = self.shared.notify.get() {
            notify();
        }
    }

    fn account(&mut self, idle: bool) {
        let Some(io) = &self.io else { return };
        match (self.since, idle) {
            (None, false) => self.since = Some(io.now()),
            (Some(since), true) => {
                let busy = io.now().saturating_sub(since).as_nanos() as u64;
                let counter = &self.shared.counters.busy_ns;
                counter.fetch_add(busy, Ordering::Relaxed);
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
            let bytes = match transfer.operation {
                Operation::Sync => 0,
                _ => padded(transfer.target.bytes),
            };
            if transfer.operation == Operation::Write {
                clear_padding(&mut transfer.buffer, transfer.target.bytes, bytes);
            }
            let urgency = transfer.urgency();
            self.active[place] = Some(Active {
                transfer,
                checksum: 0,
                bytes,
                asked: 0,
                requests: 0,
                unhashed: 0,
                fault: None,
            });
            let behind = self.ready.iter().position(|other| {
                let other = self.active[*other].as_ref();
                other.is_some_and(|o| o.transfer.urgency() > urgency)
            });
            self.ready.insert(behind.unwrap_or(self.ready.len()), place);
        }
    }

    /// What is cancelled hands out no more requests, and ends with its last completion.
    fn cancel(&mut self) {
        while let Some(number) = self.shared.cancelled.pop() {
            let mine = |a: &Option<Active>| a.as_ref().is_some_and(|a| a.transfer.number == number);
            let Some(index) = self.active.iter().position(mine) else {
                continue;
            };
            let Some(work) = &mut self.active[index] else {
                continue;
            };
            work.fault.get_or_insert(Fault::Cancelled);
            let over = work.over();
            self.ready.retain(|other| *other != index);
            if over {
                self.end(index);
            }
        }
    }

    /// Keeps the device busy: the rests of short transfers first, then the most urgent.
    fn submit(&mut self) {
        while let Some(piece) = self.again.pop() {
            if !self.submit_piece(piece) {
                self.again.push(piece);
                return;
            }
        }
        while let Some(chosen) = self.next_ready() {
            let active = self.ready[chosen];
            let Some(work) = &mut self.active[active] else {
                self.ready.remove(chosen);
                continue;
            };
            if work.all_asked() && work.transfer.operation != Operation::Sync {
                self.ready.remove(chosen);
                continue;
            }
            let Some(place) = self.free.pop() else { return };
            let bytes = u64::from(self.tuning.block).min(work.bytes - work.asked);
            let first = work.asked;
            if work.transfer.operation == Operation::Write {
                work.unhashed += 1;
                self.unhashed.push_back((active, first, bytes));
            }
            work.asked += bytes;
            work.requests += 1;
            self.last = work.transfer.operation;
            if work.all_asked() {
                self.ready.remove(chosen);
            }
            self.pieces[place] = Some(Piece {
                active,
                first,
                start: first,
                bytes,
            });
            if !self.submit_piece(place) {
                self.again.push(place);
                return;
            }
        }
    }

    /// The most urgent that is ready; among equals a read after a write and a write after a read, as
    /// disks and their links can do both at once.
    fn next_ready(&self) -> Option<usize> {
        let of = |place: &usize| self.active[*place].as_ref().map(|a| &a.transfer);
        let first = of(self.ready.first()?).map(|t| t.priority);
        let other = self.ready.iter().position(|place| {
            of(place).is_some_and(|t| Some(t.priority) == first && t.operation != self.last)
        });
        Some(other.unwrap_or(0))
    }

    fn submit_piece(&mut self, place: usize) -> bool {
        let (Some(piece), Some(io)) = (self.pieces[place], &mut self.io) else {
            return true;
        };
        let Some(work) = &mut self.active[piece.active] else {
            return true;
        };
        let Transfer {
            operation,
            target,
            buffer,
            ..
        } = &work.transfer;
        let request = Request {
            id: place as u64,
            op: match operation {
                Operation::Read => IoOp::Read,
                Operation::Write => IoOp::Write,
                Operation::Sync => IoOp::Sync,
            },
            file: target.file,
            offset: target.offset + piece.start,
            memory: buffer.address().wrapping_add(piece.start as usize),
            len: piece.bytes as u32,
        };
        // SAFETY: the buffer stays in `active` until its last completion, and its padded length
        // covers the whole blocks (checked by the store).
        unsafe { io.submit(request) }
    }

    fn completed(&mut self, completion: Completion) {
        let place = completion.id as usize;
        let Some(mut piece) = self.pieces[place] else {
            return;
        };
        let Some(work) = &mut self.active[piece.active] else {
            return;
        };
        let operation = work.transfer.operation;
        let mut fail = |source: io::Error| {
            let offset = work.transfer.target.offset + piece.start;
            work.fault.get_or_insert(Fault::Io { offset, source });
            piece.bytes
        };
        let retry = [-libc::EINTR, -libc::EAGAIN].contains(&completion.result);
        let finished = match (operation, completion.result) {
            _ if retry => 0,
            (_, r) if r < 0 => fail(io::Error::from_raw_os_error(-r)),
            (Operation::Sync, _) => 0,
            (_, 0) => fail(io::ErrorKind::UnexpectedEof.into()),
            (_, moved) => {
                let moved = (moved as u64).min(piece.bytes);
                // What is left must start at a block again: direct I/O takes nothing else.
                let whole = if moved == piece.bytes {
                    moved
                } else {
                    moved / BLOCK * BLOCK
                };
                let counters = &self.shared.counters;
                let counter = match operation {
                    Operation::Read => &counters.read_bytes,
                    _ => &counters.written_bytes,
                };
                counter.fetch_add(whole, Ordering::Relaxed);
                whole
            }
        };
        piece.start += finished;
        piece.bytes -= finished;
        let more = piece.bytes > 0 || operation == Operation::Sync && retry;
        if more && work.fault.is_none() {
            self.pieces[place] = Some(piece);
            self.again.push(place);
            return;
        }
        if operation == Operation::Read && work.fault.is_none() {
            debug_assert!(piece.first.is_multiple_of(GRANULE));
            work.unhashed += 1;
            let bytes = piece.start - piece.first;
            self.unhashed.push_back((piece.active, piece.first, bytes));
        }
        self.pieces[place] = None;
        self.free.push(place);
        work.requests -= 1;
        if work.over() {
            self.end(piece.active);
        }
    }

    fn end(&mut self, active: usize) {
        let Some(work) = self.active[active].take() else {
            return;
        };
        self.ready.retain(|other| *other != active);
        let Transfer {
            tag,
            operation,
            buffer,
            expected,
            ..
        } = work.transfer;
        let result = match (work.fault, expected) {
            (Some(fault), _) => Err(fault),
            (None, Some(expected)) if work.checksum != expected => Err(Fault::Checksum),
            (None, _) => Ok(work.checksum),
        };
        let ended = Ended {
            tag,
            operation,
            buffer,
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

impl Drop for Work {
    fn drop(&mut self) {
        // With requests under way (a disk that does not answer, a panic) the kernel may still touch
        // their memory: it is given up for good, and so is what waits for them.
        if std::thread::panicking() {
            let under_way = self.pieces.len() - self.free.len();
            self.stall(
                "the thread that drives the disk has panicked".into(),
                under_way,
            );
        }
        let mut left = false;
        for work in self.active.iter_mut().filter_map(Option::take) {
            if work.requests > 0 {
                left = true;
                work.transfer.buffer.leak();
            }
        }
        if left {
            std::mem::forget(self.io.take());
        }
    }
}

/// Zeros from the end of the data to the end of its last block: nothing else leaks to disk.
fn clear_padding(buffer: &mut Buffer, bytes: u64, padded: u64) {
    debug_assert!(padded <= buffer.padded_len());
    // SAFETY: the buffer covers its padded length, which the store checked against `padded`.
    unsafe {
        let rest = buffer.address().add(bytes as usize);
        std::ptr::write_bytes(rest, 0, (padded - bytes) as usize);
    }
}
