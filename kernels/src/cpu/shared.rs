//! Memory that several workers write, each its own part.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice that can be handed out in disjoint pieces from several threads.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, and pieces are only had by the promise of disjointness.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            memory: PhantomData,
        }
    }

    /// A piece.
    ///
    /// # Safety
    /// No two pieces that are alive at once overlap.
    #[expect(clippy::mut_from_ref, reason = "disjoint by contract")]
    pub(crate) unsafe fn piece(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "a piece outside its slice"
        );
        // SAFETY: inside the slice (checked) and disjoint (contract).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The address of an element, for strided access by the matrix product.
    ///
    /// # Safety
    /// What is written through it overlaps no piece that is alive at once.
    pub(crate) unsafe fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "an address outside its slice");
        // SAFETY: at most one past the end (checked).
        unsafe { self.start.add(index) }
    }
}
