//! I/O through io_uring, with files and memory registered where the system allows.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{Completion, Io, IoOp, Region, Request, Tuning, Wake};

/// Milliseconds after which the kernel's submitting thread goes to sleep.
const SQPOLL_IDLE: u32 = 50;
/// The largest piece of memory the kernel registers as one buffer.
const BUFFER_BYTES: u64 = 1 << 30;
/// The id of the poll on the wake-up eventfd.
const WAKE: u64 = u64::MAX;

pub(crate) struct UringIo {
    ring: IoUring,
    files: Vec<File>,
    region: Region,
    registered: bool,
    wake: Arc<EventFd>,
    /// Whether the poll on the wake-up is in the ring.
    polling: bool,
    polled: Polled,
    in_flight: usize,
    /// Syncs on a ring that only reads and writes: done at once, told at the next wait.
    synced: Vec<Completion>,
}

/// Which of the two kinds of polling the ring does, and what kept it from others.
#[derive(Debug, Default)]
pub(crate) struct Polled {
    submissions: bool,
    completions: bool,
    refused: String,
}

struct EventFd(OwnedFd);

impl Wake for EventFd {
    fn wake(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a local to an eventfd; a full counter is a wake-up too.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl EventFd {
    /// Until it is written to, or the timeout.
    fn sleep(&self, timeout: Option<Duration>) {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let ms = timeout.map_or(-1, |t| {
            i32::try_from(t.as_millis()).unwrap_or(i32::MAX).max(1)
        });
        // SAFETY: one descriptor, in a local.
        unsafe { libc::poll(&mut poll, 1, ms) };
    }
}

impl UringIo {
    pub(crate) fn new(
        files: Vec<File>,
        region: Option<Region>,
        tuning: &Tuning,
    ) -> io::Result<Self> {
        let region = region.unwrap_or(Region {
            start: std::ptr::null_mut(),
            bytes: 0,
        });
        let entries = (tuning.depth + 1).next_power_of_two();
        let (ring, polled) = build(entries, &files, tuning)?;
        let fds: Vec<i32> = files.iter().map(|f| f.as_raw_fd()).collect();
        ring.submitter().register_files(&fds)?;
        let registered = register(&ring, region);
        // SAFETY: a fresh eventfd, owned from here on.
        let wake = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Arc::new(EventFd(OwnedFd::from_raw_fd(fd)))
        };
        Ok(Self {
            ring,
            files,
            region,
            registered,
            wake,
            polling: false,
            polled,
            in_flight: 0,
            synced: Vec::with_capacity(8),
        })
    }

    /// Tries one real operation: containers often refuse the calls, and some kernels only later.
    pub(crate) fn works() -> Result<(), String> {
        let mut ring = IoUring::new(2).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => "refused (EPERM): sysctl kernel.io_uring_disabled=0, and in a \
                                  container a seccomp profile that allows it"
                .to_owned(),
            Some(libc::ENOSYS) => "this kernel has none (ENOSYS), or a sandbox hides it".to_owned(),
            _ => e.to_string(),
        })?;
        let file = File::open("/proc/self/exe").map_err(|e| e.to_string())?;
        let mut bytes = [0u8; 4];
        let read = opcode::Read::new(Fd(file.as_raw_fd()), bytes.as_mut_ptr(), 4).build();
        // SAFETY: `bytes` and `file` outlive the wait for the only completion below.
        unsafe { ring.submission().push(&read) }.map_err(|e| e.to_string())?;
        ring.submit_and_wait(1).map_err(|e| e.to_string())?;
        let result = ring.completion().next().map(|c| c.result());
        match (result, &bytes) {
            (Some(4), b"\x7fELF") => Ok(()),
            (result, _) => Err(format!("a test read gave {result:?}")),
        }
    }

    fn entry(&self, request: &Request) -> squeue::Entry {
        let Request {
            offset,
            memory,
            len,
            file,
            ..
        } = *request;
        let file = Fixed(file);
        let buffer = self.buffer(request);
        let entry = match (request.op, buffer) {
            (IoOp::Sync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (IoOp::Read, Some(b)) => opcode::ReadFixed::new(file, memory, len, b)
                .offset(offset)
                .build(),
            (IoOp::Write, Some(b)) => opcode::WriteFixed::new(file, memory, len, b)
                .offset(offset)
                .build(),
            (IoOp::Read, None) => opcode::Read::new(file, memory, len).offset(offset).build(),
            (IoOp::Write, None) => opcode::Write::new(file, memory, len).offset(offset).build(),
        };
        entry.user_data(request.id)
    }

    /// The registered buffer that holds all of the request's memory.
    fn buffer(&self, request: &Request) -> Option<u16> {
        let start = (request.memory as u64).checked_sub(self.region.start as u64)?;
        let last = start.checked_add(u64::from(request.len).max(1) - 1)?;
        let inside = self.registered && last < self.region.bytes;
        let index = start / BUFFER_BYTES;
        (inside && index == last / BUFFER_BYTES).then_some(index as u16)
    }

    /// Keeps a poll on the eventfd in the ring, where the ring can hold one.
    fn poll_wake(&mut self) {
        if !self.polling && !self.polled.completions {
            let fd = Fd(self.wake.0.as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .build()
                .user_data(WAKE);
            // SAFETY: a poll refers to no memory, and the eventfd lives as long as the ring.
            self.polling = unsafe { self.ring.submission().push(&poll) }.is_ok();
        }
    }

    fn drain_wake(&mut self) {
        self.polling = false;
        let mut count = 0u64;
        // SAFETY: reads 8 bytes into a local; the eventfd does not block.
        unsafe { libc::read(self.wake.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

/// The ring that was asked for; each kind of polling only if a real read on it succeeded.
pub(crate) fn build(
    entries: u32,
    files: &[File],
    tuning: &Tuning,
) -> io::Result<(IoUring, Polled)> {
    let mut polled = Polled::default();
    let wanted = [
        (tuning.sqpoll, tuning.iopoll),
        (tuning.sqpoll, false),
        (false, tuning.iopoll),
    ];
    for (submissions, completions) in wanted {
        if !submissions && !completions {
            continue;
        }
        let mut builder = IoUring::builder();
        if submissions {
            builder.setup_sqpoll(SQPOLL_IDLE);
        }
        if completions {
            builder.setup_iopoll();
        }
        let tried = builder
            .build(entries)
            .and_then(|mut ring| try_read(&mut ring, &files[0]).map(|()| ring));
        match tried {
            Ok(ring) => {
                polled.submissions = submissions;
                polled.completions = completions;
                return Ok((ring, polled));
            }
            Err(why) => {
                let name = match (submissions, completions) {
                    (true, true) => "SQPOLL with IOPOLL",
                    (true, false) => "SQPOLL",
                    _ => "IOPOLL",
                };
                polled.refused = format!("{name} refused: {why}");
            }
        }
    }
    // Fewer interrupts and locks where the kernel has them (6.1); a plain ring elsewhere.
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries)
        .or_else(|_| IoUring::new(entries))?;
    Ok((ring, polled))
}

/// One real read of the file that the ring is for: some devices refuse polled I/O only here.
fn try_read(ring: &mut IoUring, file: &File) -> io::Result<()> {
    let mut block = crate::buffer::Blocks::new(4096);
    // A file that was never written is read without its device.
    if file.read_at(&mut block, 0)? < 4096 || block.iter().all(|byte| *byte == 0) {
        block.fill(0);
        file.write_all_at(&block, 0)?;
    }
    let read = opcode::Read::new(Fd(file.as_raw_fd()), block.address(), 4096).build();
    // SAFETY: `block` and `file` outlive the wait for the only completion below.
    unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|c| c.result()) {
        Some(result) if result >= 0 => Ok(()),
        Some(result) => Err(io::Error::from_raw_os_error(-result)),
        None => {
            // Still under way: its memory must not go.
            std::mem::forget(block);
            Err(io::Error::other("no completion"))
        }
    }
}

/// Registers the region in pieces; refused (by the memlock limit, mostly) is no error.
fn register(ring: &IoUring, region: Region) -> bool {
    let pieces = region.bytes.div_ceil(BUFFER_BYTES);
    let iovecs: Vec<libc::iovec> = (0..pieces)
        .map(|i| {
            let start = i * BUFFER_BYTES;
            libc::iovec {
                iov_base: region.start.wrapping_add(start as usize).cast(),
                iov_len: BUFFER_BYTES.min(region.bytes - start) as usize,
            }
        })
        .collect();
    // SAFETY: the region is mapped as long as the arena lives, and the owner of the ring holds it.
    pieces > 0 && unsafe { ring.submitter().register_buffers(&iovecs) }.is_ok()
}

impl Io for UringIo {
    unsafe fn submit(&mut self, request: Request) -> bool {
        if self.polled.completions && request.op == IoOp::Sync {
            let result = match self.files[request.file as usize].sync_data() {
                Ok(()) => 0,
                Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
            };
            let id = request.id;
            self.synced.push(Completion { id, result });
            return true;
        }
        let entry = self.entry(&request);
        let mut queue = self.ring.submission();
        // One place stays free for the poll.
        if queue.len() + 1 >= queue.capacity() {
            return false;
        }
        // SAFETY: the memory is valid until the completion (contract of `submit`).
        let taken = unsafe { queue.push(&entry) }.is_ok();
        self.in_flight += usize::from(taken);
        taken
    }

    fn start(&mut self) {
        // What cannot be handed over now is handed over by the next wait.
        let _ = self.ring.submit();
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        self.poll_wake();
        if !self.synced.is_empty() {
            completions.append(&mut self.synced);
            let _ = self.ring.submit();
        } else if self.polled.completions && self.in_flight == 0 {
            self.wake.sleep(timeout);
            self.drain_wake();
        } else {
            let span = timeout.map(|t| Timespec::new().sec(t.as_secs()).nsec(t.subsec_nanos()));
            let mut args = SubmitArgs::new();
            if let Some(span) = &span {
                args = args.timespec(span);
            }
            // A failure here (timeout, interrupt, a full completion queue) loses nothing: what is
            // complete is taken below, and what was not submitted is submitted next time.
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
        let mut woken = false;
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE {
                woken = true;
            } else {
                self.in_flight -= 1;
                completions.push(Completion {
                    id: entry.user_data(),
                    result: entry.result(),
                });
            }
        }
        if woken {
            self.drain_wake();
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }

    fn describe(&self) -> String {
        let mut text = String::from("io_uring");
        let parts = [
            (self.registered, "registered buffers"),
            (!self.registered, "plain buffers"),
            (self.polled.submissions, "SQPOLL"),
            (self.polled.completions, "IOPOLL"),
        ];
        let mut notes: Vec<&str> = parts.iter().filter(|p| p.0).map(|p| p.1).collect();
        if !self.polled.refused.is_empty() {
            notes.push(&self.polled.refused);
        }
        let files = format!("{} files", self.files.len());
        notes.push(if self.files.len() == 1 {
            "1 file"
        } else {
            &files
        });
        text += &format!(" ({})", notes.join(", "));
        text
    }
}
