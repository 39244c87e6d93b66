//! Stores past the caches: for what is not read again soon, and so that a line that is only written need not be
//! read first.

/// Bytes of a line of the caches.
pub(in crate::cpu) const LINE: usize = 64;

/// A line, aligned as lines are.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(in crate::cpu) struct Line(pub(in crate::cpu) [u8; LINE]);

/// Elements of `to` before its first whole line.
pub(in crate::cpu) fn head<T>(to: &[T]) -> usize {
    to.as_ptr().align_offset(LINE).min(to.len())
}

/// Stores a line. [`fence`] makes it seen.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(in crate::cpu) fn store(to: &mut [u8; LINE], from: &[u8; LINE]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let (to, from) = (
        to.as_mut_ptr().cast::<__m128i>(),
        from.as_ptr().cast::<__m128i>(),
    );
    assert!(to.is_aligned(), "a line begins where lines do");
    for part in 0..4 {
        // SAFETY: 64 bytes each; what is stored to is aligned (checked, and so are the parts behind it).
        unsafe { _mm_stream_si128(to.add(part), _mm_loadu_si128(from.add(part))) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(in crate::cpu) fn store(to: &mut [u8; LINE], from: &[u8; LINE]) {
    *to = *from;
}

/// Copies as much of `from` as `to` is long, whole lines of it past the caches. [`fence`] makes it seen.
pub(in crate::cpu) fn copy(to: &mut [u8], from: &[u8]) {
    let head = head(to);
    let from = &from[..to.len()];
    to[..head].copy_from_slice(&from[..head]);
    let (to, from) = (&mut to[head..], &from[head..]);
    let (lines, tail) = to.as_chunks_mut::<LINE>();
    let (from, from_tail) = from.as_chunks::<LINE>();
    for (to, from) in lines.iter_mut().zip(from) {
        store(to, from);
    }
    tail.copy_from_slice(from_tail);
}

/// What went past the caches is seen by others in order with what comes next.
pub(in crate::cpu) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: an instruction of every x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
