//! Memory that transfers use: slabs of the arena, or blocks of their own for what the store keeps
//! about itself.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

use forebay_pinned::Slab;

use crate::medium::BLOCK;

/// Zeroed memory in whole blocks, aligned to them.
pub(crate) struct Blocks {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: owned memory.
unsafe impl Send for Blocks {}

impl Blocks {
    /// At least `bytes` of it.
    pub(crate) fn new(bytes: u64) -> Self {
        let bytes = bytes.max(1).next_multiple_of(BLOCK) as usize;
        let layout = Self::layout(bytes);
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Self { start, bytes }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, BLOCK as usize).expect("sizes are far below the limit")
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.start
    }
}

impl Deref for Blocks {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: owned, initialized with zeros.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl DerefMut for Blocks {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start, Self::layout(self.bytes)) };
    }
}

/// What a transfer moves from or to.
pub(crate) enum Buffer {
    /// Leased from the arena.
    Slab(Slab),
    /// The store's own.
    Blocks(Blocks),
}

impl Buffer {
    pub(crate) fn address(&self) -> *mut u8 {
        match self {
            Self::Slab(slab) => slab.address(),
            Self::Blocks(blocks) => blocks.address(),
        }
    }

    /// Whole blocks of it.
    pub(crate) fn padded_len(&self) -> u64 {
        match self {
            Self::Slab(slab) => slab.padded_len(),
            Self::Blocks(blocks) => blocks.len() as u64,
        }
    }

    /// Gives the memory up for good: I/O that never ended may still write there.
    pub(crate) fn leak(self) {
        match self {
            Self::Slab(slab) => slab.leak(),
            Self::Blocks(blocks) => std::mem::forget(blocks),
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:?}", self.padded_len(), self.address())
    }
}
