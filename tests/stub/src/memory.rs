//! Device memory, and the host memory that the device may touch.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

use crate::call::{Done, code};

/// What memory holds that nobody wrote: NaN, and no token id.
const NOTHING: u8 = 0xff;

/// The device sees host memory here and not where the host does, as CUDA does not promise that.
const MAPPED: u64 = 1 << 60;

/// Where host memory came from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    Registered,
    Allocated,
}

/// All ranges, by where they start.
#[derive(Default)]
pub(crate) struct Memory {
    device: BTreeMap<u64, u64>,
    host: BTreeMap<u64, (u64, Host)>,
}

fn layout(bytes: u64) -> Result<Layout, i32> {
    Layout::from_size_align(bytes as usize, 4096).map_err(|_| code::INVALID_VALUE)
}

fn inside(address: u64, bytes: u64, start: u64, length: u64) -> bool {
    address >= start && bytes <= length && address - start <= length - bytes
}

fn take(bytes: u64) -> Result<u64, i32> {
    let layout = layout(bytes)?;
    // SAFETY: a layout of at least one byte; filled before anybody sees it.
    let address = unsafe {
        let base = alloc(layout);
        if base.is_null() {
            return Err(code::OUT_OF_MEMORY);
        }
        base.write_bytes(NOTHING, bytes as usize);
        base
    };
    Ok(address as u64)
}

fn give(address: u64, bytes: u64) {
    if let Ok(layout) = layout(bytes) {
        // SAFETY: from `take`, given back once; its owner uses it no more.
        unsafe {
            (address as *mut u8).write_bytes(NOTHING, bytes as usize);
            dealloc(address as *mut u8, layout);
        }
    }
}

impl Memory {
    pub(crate) fn allocated(&self) -> u64 {
        self.device.values().sum()
    }

    /// Ranges of host memory that are known to the device.
    pub(crate) fn locked(&self) -> u64 {
        self.host.len() as u64
    }

    pub(crate) fn allocate(&mut self, bytes: u64, most: u64) -> Result<u64, i32> {
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        if self.allocated() + bytes > most {
            return Err(code::OUT_OF_MEMORY);
        }
        let address = take(bytes)?;
        self.device.insert(address, bytes);
        Ok(address)
    }

    pub(crate) fn free(&mut self, address: u64) -> Done {
        let bytes = self.device.remove(&address).ok_or(code::INVALID_VALUE)?;
        give(address, bytes);
        Ok(())
    }

    pub(crate) fn allocate_host(&mut self, bytes: u64) -> Result<u64, i32> {
        let address = take(bytes.max(1))?;
        self.host.insert(address, (bytes.max(1), Host::Allocated));
        Ok(address)
    }

    pub(crate) fn free_host(&mut self, address: u64) -> Done {
        match self.host.get(&address) {
            Some((bytes, Host::Allocated)) => {
                give(address, *bytes);
                self.host.remove(&address);
                Ok(())
            }
            _ => Err(code::INVALID_VALUE),
        }
    }

    pub(crate) fn register(&mut self, address: u64, bytes: u64) -> Done {
        let overlaps = |(start, (length, _)): (&u64, &(u64, Host))| {
            *start < address + bytes && address < start + length
        };
        if address == 0 || bytes == 0 || self.on_device(address, 1) {
            return Err(code::INVALID_VALUE);
        }
        if self.host.iter().any(overlaps) {
            return Err(code::ALREADY_REGISTERED);
        }
        self.host.insert(address, (bytes, Host::Registered));
        Ok(())
    }

    /// Takes a range back; how long it was.
    pub(crate) fn unregister(&mut self, address: u64) -> Result<u64, i32> {
        match self.host.get(&address) {
            Some((bytes, Host::Registered)) => {
                let bytes = *bytes;
                self.host.remove(&address);
                Ok(bytes)
            }
            _ => Err(code::NOT_REGISTERED),
        }
    }

    pub(crate) fn on_device(&self, address: u64, bytes: u64) -> bool {
        let before = self.device.range(..=address).next_back();
        before.is_some_and(|(start, length)| inside(address, bytes, *start, *length))
    }

    /// Whether it is page-locked, from end to end; half of it is an error.
    pub(crate) fn is_locked(&self, address: u64, bytes: u64) -> Result<bool, i32> {
        let whole =
            |(start, (length, _)): (&u64, &(u64, Host))| inside(address, bytes, *start, *length);
        let part = |(start, (length, _)): (&u64, &(u64, Host))| {
            *start < address + bytes && address < start + length
        };
        if self.host.iter().any(whole) {
            Ok(true)
        } else if self.host.iter().any(part) {
            Err(code::INVALID_VALUE)
        } else {
            Ok(false)
        }
    }

    /// Where the device sees a byte of page-locked memory.
    pub(crate) fn mapped(&self, host: u64) -> Result<u64, i32> {
        match self.is_locked(host, 1)? {
            true => Ok(host + MAPPED),
            false => Err(code::INVALID_VALUE),
        }
    }

    /// Whether a kernel may touch it.
    pub(crate) fn reachable(&self, address: u64, bytes: u64) -> bool {
        let locked = |host| self.is_locked(host, bytes) == Ok(true);
        self.on_device(address, bytes) || is_mapped(address) && locked(address - MAPPED)
    }
}

/// Whether the device sees host memory there.
pub(crate) fn is_mapped(address: u64) -> bool {
    address >= MAPPED
}

/// Bytes of memory that the caller of the library vouches for.
pub(crate) fn read(address: u64, bytes: u64) -> Vec<u8> {
    let mut all = vec![0; bytes as usize];
    // SAFETY: device memory that is allocated (checked by whoever asks), or host memory that the
    // caller said is readable for so long; as racy as a device's own reads.
    unsafe {
        let from = (address & !MAPPED) as *const u8;
        std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), all.len());
    }
    all
}

/// Writes it.
pub(crate) fn write(address: u64, bytes: &[u8]) {
    // SAFETY: as in `read`, writable.
    unsafe {
        let to = (address & !MAPPED) as *mut u8;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
    }
}
