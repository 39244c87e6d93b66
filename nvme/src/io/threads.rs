//! I/O by a few threads with plain positioned reads and writes: where io_uring is refused.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Completion, Io, IoOp, Request, Wake};

const THREADS: usize = 8;
const DEPTH: usize = 128;

pub(crate) struct ThreadsIo {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    reason: String,
}

struct Shared {
    files: Vec<File>,
    state: Mutex<State>,
    asked: Condvar,
    answered: Condvar,
}

struct State {
    requests: VecDeque<Request>,
    completions: Vec<Completion>,
    woken: bool,
    closing: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.state().woken = true;
        self.answered.notify_all();
    }
}

impl ThreadsIo {
    /// `reason`: why it is used instead of io_uring.
    pub(crate) fn new(files: Vec<File>, reason: &str) -> io::Result<Self> {
        let state = State {
            requests: VecDeque::with_capacity(DEPTH),
            completions: Vec::with_capacity(DEPTH),
            woken: false,
            closing: false,
        };
        let shared = Arc::new(Shared {
            files,
            state: Mutex::new(state),
            asked: Condvar::new(),
            answered: Condvar::new(),
        });
        let mut io = Self {
            shared,
            threads: Vec::new(),
            reason: reason.to_owned(),
        };
        for index in 0..THREADS {
            let shared = Arc::clone(&io.shared);
            let builder = std::thread::Builder::new().name(format!("fb-disk-{index}"));
            io.threads.push(builder.spawn(move || serve(&shared))?);
        }
        Ok(io)
    }
}

impl Io for ThreadsIo {
    unsafe fn submit(&mut self, request: Request) -> bool {
        let mut state = self.shared.state();
        if state.requests.len() == DEPTH {
            return false;
        }
        state.requests.push_back(request);
        drop(state);
        self.shared.asked.notify_one();
        true
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        let mut state = self.shared.state();
        if state.completions.is_empty() && !state.woken {
            state = match timeout {
                None => self
                    .shared
                    .answered
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(timeout) => {
                    self.shared
                        .answered
                        .wait_timeout(state, timeout)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        state.woken = false;
        completions.append(&mut state.completions);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared) as Arc<dyn Wake>
    }

    fn describe(&self) -> String {
        format!("{THREADS} threads ({})", self.reason)
    }
}

impl Drop for ThreadsIo {
    fn drop(&mut self) {
        self.shared.state().closing = true;
        self.shared.asked.notify_all();
        for thread in self.threads.drain(..) {
            // Nothing in `serve` panics.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared) {
    let mut state = shared.state();
    loop {
        if let Some(request) = state.requests.pop_front() {
            drop(state);
            let result = execute(&shared.files[request.file as usize], &request);
            state = shared.state();
            state.completions.push(Completion {
                id: request.id,
                result,
            });
            shared.answered.notify_all();
        } else if state.closing {
            return;
        } else {
            state = shared
                .asked
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn execute(file: &File, request: &Request) -> i32 {
    let Request {
        memory,
        len,
        offset,
        ..
    } = *request;
    let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
    // SAFETY: the memory is valid until the completion (contract of `submit`).
    let result = unsafe {
        match request.op {
            IoOp::Read => libc::pread(fd, memory.cast(), len as usize, offset),
            IoOp::Write => libc::pwrite(fd, memory.cast(), len as usize, offset),
            IoOp::Sync => libc::fdatasync(fd) as isize,
        }
    };
    if result < 0 {
        -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    } else {
        result as i32
    }
}
