//! The one mapping under an arena: anonymous, in huge pages where they can be had, kept out of
//! forked children, locked if the system allows.

use std::io;
use std::ptr::NonNull;

use crate::Error;

/// Whether the arena is page-locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// All of it.
    Locked,
    /// The system refused; the arena works, but the kernel may page it out.
    Refused {
        /// Bytes that were to be locked.
        wanted_bytes: u64,
        /// What the process may lock (`RLIMIT_MEMLOCK`).
        limit_bytes: u64,
    },
}

impl std::fmt::Display for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Locked => write!(f, "page-locked"),
            Self::Refused {
                wanted_bytes,
                limit_bytes,
            } => write!(
                f,
                "not page-locked: {wanted_bytes} bytes wanted, the limit is {limit_bytes}; raise it \
                 with `ulimit -l {}` (or LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a \
                 container)",
                wanted_bytes.div_ceil(1024)
            ),
        }
    }
}

pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    lock: Lock,
}

// SAFETY: a mapping belongs to the process, not to a thread; access goes through slabs.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` gives out nothing but its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(bytes: u64) -> Result<Self, Error> {
        let failed = |source| Error::Map { bytes, source };
        let length = usize::try_from(bytes)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the range was just mapped. Advice may fail without harm: without huge pages it
        // is slower, and without DONTFORK only a fork during I/O would matter.
        unsafe {
            libc::madvise(base, length, libc::MADV_HUGEPAGE);
            libc::madvise(base, length, libc::MADV_DONTFORK);
        }
        let lock = lock(base, length);
        if lock != Lock::Locked {
            // Locking would have faulted the pages in.
            // SAFETY: the range was just mapped; where the advice is unknown, pages come later.
            unsafe { libc::madvise(base, length, libc::MADV_POPULATE_WRITE) };
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
        Ok(Self {
            base,
            bytes: length,
            lock,
        })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    pub(crate) fn lock(&self) -> &Lock {
        &self.lock
    }
}

fn lock(base: *mut libc::c_void, length: usize) -> Lock {
    // SAFETY: locks a range that was just mapped.
    if unsafe { libc::mlock(base, length) } == 0 {
        return Lock::Locked;
    }
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes one rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    Lock::Refused {
        wanted_bytes: length as u64,
        limit_bytes: limit.rlim_cur,
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, and no slab is left: each keeps the arena alive.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
