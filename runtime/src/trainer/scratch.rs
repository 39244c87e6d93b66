//! Scratch memory of a step: frames grow from the bottom as a stack, what lives as long as the
//! step grows from the top.
//!
//! Memory of a dropped frame may be given out again at once, although operations on it are still
//! queued: all operations run in order on one stream.

use crate::Bytes;
use crate::device::Span;
use crate::error::{Error, Result};

/// Alignment of every allocation, as a GPU's own allocator gives it.
const ALIGN: u64 = 256;

#[derive(Debug)]
pub(crate) struct Scratch {
    span: Span,
    /// Offset of the first free byte.
    bottom: u64,
    /// Offset behind the last free byte.
    top: u64,
    frames: Vec<FrameMark>,
    peak: u64,
}

#[derive(Debug)]
struct FrameMark {
    start: u64,
    alive: bool,
}

impl Scratch {
    pub(crate) fn new(span: Span) -> Self {
        Self {
            span,
            bottom: 0,
            top: span.bytes,
            frames: Vec::with_capacity(16),
            peak: 0,
        }
    }

    pub(crate) fn reset(&mut self) {
        self.frames.clear();
        self.bottom = 0;
        self.top = self.span.bytes;
    }

    /// The most that was in use at once, uploads included.
    pub(crate) fn peak(&self) -> u64 {
        self.peak
    }

    pub(crate) fn push(&mut self) -> usize {
        self.frames.push(FrameMark {
            start: self.bottom,
            alive: true,
        });
        self.frames.len() - 1
    }

    pub(crate) fn pop(&mut self, frame: usize) {
        self.frames[frame].alive = false;
        while self.frames.last().is_some_and(|f| !f.alive) {
            if let Some(mark) = self.frames.pop() {
                self.bottom = mark.start;
            }
        }
    }

    pub(crate) fn allocate(&mut self, frame: usize, bytes: u64) -> Result<u64> {
        if frame + 1 != self.frames.len() {
            let what = "a tensor was asked of an outer frame while an inner one is alive; allocate \
                        it before opening the inner frame";
            return Err(Error::Misuse(what.to_owned()));
        }
        let start = self.bottom;
        self.bottom = self.take(bytes)?;
        self.note();
        Ok(self.span.address + start)
    }

    /// Memory until the end of the step.
    pub(crate) fn reserve(&mut self, bytes: u64) -> Result<u64> {
        self.take(bytes)?;
        self.top -= bytes.next_multiple_of(ALIGN);
        self.note();
        Ok(self.span.address + self.top)
    }

    /// The bottom after taking `bytes`, if they are free.
    fn take(&self, bytes: u64) -> Result<u64> {
        let free = self.top - self.bottom;
        let rounded = bytes.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
        if rounded <= free {
            return Ok(self.bottom + rounded);
        }
        Err(Error::Scratch {
            wanted: Bytes(bytes),
            free: Bytes(free),
            capacity: Bytes(self.span.bytes),
        })
    }

    fn note(&mut self) {
        self.peak = self.peak.max(self.bottom + (self.span.bytes - self.top));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> Scratch {
        Scratch::new(Span {
            address: 0x1000,
            bytes: 1024,
        })
    }

    #[test]
    fn frames_return_their_memory_in_stack_order_whatever_the_order_of_drops() {
        let mut s = scratch();
        let outer = s.push();
        assert_eq!(s.allocate(outer, 100).unwrap(), 0x1000);
        let inner = s.push();
        assert_eq!(s.allocate(inner, 1).unwrap(), 0x1100);
        s.pop(outer);
        assert_eq!(s.bottom, 512, "the inner frame still stands on it");
        s.pop(inner);
        assert_eq!(s.bottom, 0);
        assert_eq!(s.peak(), 512);
    }

    #[test]
    fn an_outer_frame_cannot_allocate_under_an_inner_one() {
        let mut s = scratch();
        let outer = s.push();
        let _inner = s.push();
        assert!(matches!(s.allocate(outer, 4), Err(Error::Misuse(_))));
    }

    #[test]
    fn exhaustion_says_what_was_free() {
        let mut s = scratch();
        s.reserve(300).unwrap();
        let frame = s.push();
        let error = s.allocate(frame, 600).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Scratch {
                    free: Bytes(512),
                    ..
                }
            ),
            "{error}"
        );
        assert!(s.allocate(frame, 512).is_ok());
    }
}
