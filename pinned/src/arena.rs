//! The arena and its leases.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::free_list::FreeList;
use crate::mapping::{Lock, Mapping};

/// Slabs start at, and are accounted in, multiples of this: what direct I/O wants of memory.
pub const ALIGN: u64 = 4096;

/// A fixed amount of page-locked memory, leased in slabs. Clones share it.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

struct Shared {
    mapping: Mapping,
    leases: Mutex<Leases>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.mapping.bytes() - self.leases().free.free();
        write!(f, "{used} of {} bytes used", self.mapping.bytes())
    }
}

#[derive(Debug)]
struct Leases {
    free: FreeList,
    peak: u64,
}

impl Shared {
    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arena {
    /// Maps `capacity` bytes (rounded up to [`ALIGN`]), faults them in and locks them. Where
    /// locking is refused the arena goes on unlocked, and [`Arena::lock`] says so.
    ///
    /// # Errors
    /// [`Error::Map`] if the system has not that much memory.
    pub fn new(capacity: u64) -> Result<Self, Error> {
        let capacity = capacity
            .max(1)
            .checked_next_multiple_of(ALIGN)
            .unwrap_or(u64::MAX);
        let mapping = Mapping::new(capacity)?;
        let leases = Mutex::new(Leases {
            free: FreeList::new(capacity),
            peak: 0,
        });
        Ok(Self {
            shared: Arc::new(Shared { mapping, leases }),
        })
    }

    /// Leases `bytes`, contiguous and aligned to [`ALIGN`]. Its contents are undefined: what an
    /// earlier lease left there.
    ///
    /// # Errors
    /// [`Error::Exhausted`]: the cap is hard.
    pub fn lease(&self, bytes: u64) -> Result<Slab, Error> {
        let mut leases = self.shared.leases();
        let rounded = bytes
            .max(1)
            .checked_next_multiple_of(ALIGN)
            .unwrap_or(u64::MAX);
        let Some(offset) = leases.free.take(rounded) else {
            return Err(Error::Exhausted {
                wanted: rounded,
                free: leases.free.free(),
                largest_free: leases.free.largest(),
                capacity: self.capacity(),
            });
        };
        leases.peak = leases.peak.max(self.capacity() - leases.free.free());
        drop(leases);
        Ok(Slab {
            arena: self.clone(),
            offset,
            bytes,
            rounded,
        })
    }

    /// Whether it is page-locked, and if not, what to do.
    pub fn lock(&self) -> &Lock {
        self.shared.mapping.lock()
    }

    /// Its size in bytes.
    pub fn capacity(&self) -> u64 {
        self.shared.mapping.bytes()
    }

    /// Bytes leased now.
    pub fn used(&self) -> u64 {
        self.capacity() - self.shared.leases().free.free()
    }

    /// The most bytes that were leased at once.
    pub fn peak(&self) -> u64 {
        self.shared.leases().peak
    }

    /// Where it starts, for registering all of it with io_uring or a GPU driver.
    pub fn base(&self) -> *mut u8 {
        self.shared.mapping.base()
    }
}

/// A leased piece of an [`Arena`], returned on drop.
pub struct Slab {
    arena: Arena,
    offset: u64,
    bytes: u64,
    rounded: u64,
}

impl Slab {
    /// Its distance from the start of the arena.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its address. The memory stays mapped as long as the slab or its arena lives.
    pub fn address(&self) -> *mut u8 {
        // SAFETY: a lease lies inside the mapping.
        unsafe { self.arena.base().add(self.offset as usize) }
    }

    /// All bytes up to the next multiple of [`ALIGN`]: direct I/O moves whole blocks.
    pub fn padded_len(&self) -> u64 {
        self.rounded
    }

    /// Gives the memory up for good: it is never leased again nor unmapped. For I/O that never
    /// completes, and may still write here.
    pub fn leak(self) {
        std::mem::forget(self.arena.clone());
        std::mem::forget(self);
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the lease is exclusive and inside the mapping; the kernel zeroed it at first.
        unsafe { std::slice::from_raw_parts(self.address(), self.bytes as usize) }
    }
}

impl DerefMut for Slab {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.bytes as usize) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        self.arena
            .shared
            .leases()
            .free
            .give(self.offset, self.rounded);
    }
}

impl std::fmt::Debug for Slab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slab of {} bytes at {}", self.bytes, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_is_hard_and_the_error_has_the_numbers() {
        let arena = Arena::new(8 * ALIGN).unwrap();
        let a = arena.lease(5 * ALIGN).unwrap();
        let error = arena.lease(3 * ALIGN + 1).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Exhausted {
                    wanted: 16384,
                    free: 12288,
                    capacity: 32768,
                    ..
                }
            ),
            "{error}"
        );
        assert!(arena.lease(3 * ALIGN).is_ok());
        drop(a);
        assert_eq!((arena.used(), arena.peak()), (0, 8 * ALIGN));
    }

    #[test]
    fn sizes_are_exact_and_slabs_keep_the_arena_alive() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut slab = arena.lease(5000).unwrap();
        assert_eq!((slab.len(), slab.padded_len()), (5000, 8192));
        assert_eq!(slab.address() as u64 % ALIGN, 0);
        drop(arena);
        slab.fill(3);
        assert!(slab.iter().all(|b| *b == 3));
    }

    #[test]
    fn a_leaked_slab_stays_taken() {
        let arena = Arena::new(4 * ALIGN).unwrap();
        arena.lease(ALIGN).unwrap().leak();
        assert_eq!(arena.used(), ALIGN);
    }
}
