//! The owner over a scripted disk: short transfers, interruptions and failures.

use std::collections::VecDeque;

use forebay_pinned::Slab;

use super::*;
use crate::io::{Completion, Io, IoOp, Request};
use crate::medium::BLOCK;

const REQUEST_BYTES: u64 = 1 << 20;

/// A disk in memory whose next results are scripted: how many bytes, or which errno.
struct Scripted {
    disk: Vec<u8>,
    script: VecDeque<i32>,
    pending: Vec<Request>,
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl Io for Scripted {
    unsafe fn submit(&mut self, request: Request) -> bool {
        self.pending.push(request);
        true
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, _: Option<Duration>) {
        // The newest first: completions come in any order.
        let Some(request) = self.pending.pop() else {
            return;
        };
        let limit = self.script.pop_front().unwrap_or(i32::MAX);
        let result = if limit < 0 {
            limit
        } else {
            limit.min(request.len as i32)
        };
        let (start, len) = (request.offset as usize, result.max(0) as usize);
        let disk = &mut self.disk[start..start + len];
        // SAFETY: the owner keeps the request's memory until its completion.
        unsafe {
            match request.op {
                IoOp::Read => std::ptr::copy(disk.as_ptr(), request.memory, len),
                IoOp::Write => std::ptr::copy(request.memory, disk.as_mut_ptr(), len),
                IoOp::Sync => {}
            }
        }
        completions.push(Completion {
            id: request.id,
            result,
        });
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }

    fn describe(&self) -> String {
        "scripted".to_owned()
    }
}

const BYTES: u64 = 3 * REQUEST_BYTES + 5000;

/// Runs one transfer under a script and gives back the disk, the slab and the result.
fn transfer(
    operation: Operation,
    disk: Vec<u8>,
    fill: u8,
    script: &[i32],
    checksum: u64,
) -> (Vec<u8>, Slab, Result<u64, Fault>) {
    let arena = Arena::new(8 << 20).unwrap();
    let mut slab = arena.lease(BYTES).unwrap();
    slab.iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = fill ^ (i % 251) as u8);
    let shared = Arc::new(Shared::new());
    shared.closing.store(true, Ordering::Relaxed);
    let target = Target {
        file: 0,
        offset: BLOCK,
        bytes: BYTES,
        seed: 9,
        start: 0,
    };
    shared
        .asked
        .push(Transfer {
            tag: 4,
            number: 1,
            operation,
            priority: Priority::Normal,
            target,
            buffer: Buffer::Slab(slab),
            expected: (operation == Operation::Read).then_some(checksum),
        })
        .unwrap();
    let io = Scripted {
        disk,
        script: script.iter().copied().collect(),
        pending: Vec::new(),
    };
    // Closing is set: it runs until the transfer has ended. The disk comes back through a pointer.
    let disk: Arc<std::sync::Mutex<Vec<u8>>> = Arc::default();
    let io = Box::new(Returning(io, Arc::clone(&disk)));
    let patience = Duration::from_secs(9);
    Work::new(io, Arc::clone(&shared), Tuning::default(), patience).run();
    let ended = shared.ended.pop().unwrap();
    assert_eq!((ended.tag, ended.operation), (4, operation));
    let Buffer::Slab(slab) = ended.buffer else {
        panic!("another buffer came back");
    };
    let disk = std::mem::take(&mut *disk.lock().unwrap());
    (disk, slab, ended.result)
}

/// Hands its disk back when it is dropped.
struct Returning(Scripted, Arc<std::sync::Mutex<Vec<u8>>>);

impl Drop for Returning {
    fn drop(&mut self) {
        *self.1.lock().unwrap() = std::mem::take(&mut self.0.disk);
    }
}

impl Io for Returning {
    unsafe fn submit(&mut self, request: Request) -> bool {
        // SAFETY: passed on.
        unsafe { self.0.submit(request) }
    }
    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        self.0.wait(completions, timeout);
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.0.waker()
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

fn empty() -> Vec<u8> {
    vec![0xee; 6 << 20]
}

#[test]
fn short_and_interrupted_transfers_are_finished() {
    for script in [
        &[][..],
        &[4096, 4096, 8192],
        // Not whole blocks, and less than one: direct I/O must start at a block again.
        &[5000, 100, 1, 4096, 70_000],
        &[-libc::EINTR, -libc::EAGAIN, 12_288, -libc::EINTR],
    ] {
        let (disk, slab, written) = transfer(Operation::Write, empty(), 7, script, 0);
        let checksum = written.unwrap();
        let start = BLOCK as usize;
        assert_eq!(disk[start..start + BYTES as usize], slab[..]);
        let end = start + BYTES.next_multiple_of(BLOCK) as usize;
        assert!(
            disk[start + BYTES as usize..end].iter().all(|b| *b == 0),
            "zeros to the block"
        );
        assert!(
            disk[..start].iter().chain(&disk[end..]).all(|b| *b == 0xee),
            "and no further"
        );
        let (_, back, read) = transfer(Operation::Read, disk, 0, script, checksum);
        assert_eq!(read.unwrap(), checksum);
        assert_eq!(back[..], slab[..]);
    }
}

#[test]
fn a_failed_or_ended_transfer_is_an_error_with_its_place() {
    for (script, kind) in [
        (
            &[-libc::EIO][..],
            io::Error::from_raw_os_error(libc::EIO).kind(),
        ),
        (&[4096, -libc::ENOSPC], io::ErrorKind::StorageFull),
        (&[8192, 0], io::ErrorKind::UnexpectedEof),
    ] {
        for operation in [Operation::Write, Operation::Read] {
            let (.., result) = transfer(operation, empty(), 1, script, 0);
            let Err(Fault::Io { offset, source }) = result else {
                panic!("{script:?} passed")
            };
            assert_eq!(source.kind(), kind);
            assert!((BLOCK..BLOCK + BYTES + BLOCK).contains(&offset));
        }
    }
}

#[test]
fn one_flipped_bit_anywhere_is_noticed() {
    let (disk, _, written) = transfer(Operation::Write, empty(), 3, &[], 0);
    let checksum = written.unwrap();
    for at in [0, 1, 4095, 4096, REQUEST_BYTES + 17, BYTES - 1] {
        let mut damaged = disk.clone();
        damaged[(BLOCK + at) as usize] ^= 0x10;
        let (.., result) = transfer(Operation::Read, damaged, 0, &[], checksum);
        assert!(matches!(result, Err(Fault::Checksum)), "byte {at}");
    }
}

#[test]
fn what_is_urgent_goes_first_and_equals_take_turns_by_direction() {
    let arena = Arena::new(16 << 20).unwrap();
    let shared = Arc::new(Shared::new());
    shared.closing.store(true, Ordering::Relaxed);
    let ask = |tag: u32, operation, priority| {
        let transfer = Transfer {
            tag,
            number: u64::from(tag),
            operation,
            priority,
            target: Target {
                file: 0,
                offset: u64::from(tag) << 24,
                bytes: 2 * REQUEST_BYTES,
                seed: 0,
                start: 0,
            },
            buffer: Buffer::Slab(arena.lease(2 * REQUEST_BYTES).unwrap()),
            expected: None,
        };
        shared.asked.push(transfer).unwrap();
    };
    ask(1, Operation::Write, Priority::Checkpoint);
    ask(2, Operation::Write, Priority::Normal);
    ask(3, Operation::Read, Priority::Normal);
    ask(4, Operation::Write, Priority::Spill);
    ask(5, Operation::Read, Priority::Urgent);
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let tuning = Tuning {
        depth: 1,
        ..Tuning::default()
    };
    let io = Box::new(Ordered(Arc::clone(&order), None));
    Work::new(io, Arc::clone(&shared), tuning, Duration::from_secs(9)).run();
    assert_eq!(*order.lock().unwrap(), [5, 5, 2, 3, 2, 3, 4, 4, 1, 1]);
}

/// Notes which transfer each request is of.
struct Ordered(Arc<std::sync::Mutex<Vec<u64>>>, Option<Request>);

impl Io for Ordered {
    unsafe fn submit(&mut self, request: Request) -> bool {
        self.0.lock().unwrap().push(request.offset >> 24);
        self.1 = Some(request);
        true
    }
    fn wait(&mut self, completions: &mut Vec<Completion>, _: Option<Duration>) {
        if let Some(request) = self.1.take() {
            completions.push(Completion {
                id: request.id,
                result: request.len as i32,
            });
        }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }
    fn describe(&self) -> String {
        "ordered".to_owned()
    }
}
