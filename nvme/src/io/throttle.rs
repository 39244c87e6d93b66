//! Another I/O, slowed down to a given rate: completions come no earlier than a disk of that rate
//! would give them. For experiments and for tests of overlap.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Completion, Io, Request, Wake};

pub(crate) struct ThrottledIo {
    inner: Box<dyn Io>,
    bytes_per_s: f64,
    /// When the disk that is imagined is done with all it was given.
    free: Instant,
    /// Complete, but not yet due.
    held: VecDeque<(Instant, Completion)>,
    arrived: Vec<Completion>,
}

impl ThrottledIo {
    pub(crate) fn new(inner: Box<dyn Io>, bytes_per_s: u64) -> Self {
        Self {
            inner,
            bytes_per_s: bytes_per_s.max(1) as f64,
            free: Instant::now(),
            held: VecDeque::with_capacity(256),
            arrived: Vec::with_capacity(256),
        }
    }
}

impl Io for ThrottledIo {
    unsafe fn submit(&mut self, request: Request) -> bool {
        // SAFETY: passed on.
        unsafe { self.inner.submit(request) }
    }

    fn start(&mut self) {
        self.inner.start();
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        let now = Instant::now();
        let due = self
            .held
            .front()
            .map(|(due, _)| due.saturating_duration_since(now));
        let timeout = match (due, timeout) {
            (Some(due), Some(timeout)) => Some(due.min(timeout)),
            (due, timeout) => due.or(timeout),
        };
        if timeout != Some(Duration::ZERO) {
            self.inner.wait(&mut self.arrived, timeout);
        }
        let now = Instant::now();
        for completion in self.arrived.drain(..) {
            let bytes = f64::from(completion.result.max(0));
            self.free = self.free.max(now) + Duration::from_secs_f64(bytes / self.bytes_per_s);
            self.held.push_back((self.free, completion));
        }
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            completions.extend(self.held.pop_front().map(|h| h.1));
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn describe(&self) -> String {
        format!(
            "{}, throttled to {:.0} MB/s",
            self.inner.describe(),
            self.bytes_per_s / 1e6
        )
    }
}
