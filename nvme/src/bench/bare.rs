//! The ceiling: a bare io_uring loop on a piece of a file. No store, no checksum, no other thread.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use forebay_pinned::Arena;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use super::stats::cpu_seconds;
use super::{EXTENT, Kind, SLICE, Slice, writes};
use crate::Error;
use crate::checksum::GRANULE;
use crate::io::{DEPTH_MAX, Tuning, build};

/// See the module.
pub(super) struct Bare<'a> {
    ring: IoUring,
    file: File,
    path: PathBuf,
    arena: &'a Arena,
    /// Where in the file its extents are, in the order of their use.
    places: Vec<u64>,
    block: u32,
    depth: u32,
    next: [u64; 2],
    started: Vec<Instant>,
}

impl<'a> Bare<'a> {
    pub(super) fn open(
        path: &Path,
        places: Vec<u64>,
        arena: &'a Arena,
        tuning: Tuning,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Folder {
            path: path.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(path).map_err(failed)?;
        let files = [file];
        let (ring, _) = build(DEPTH_MAX, &files, &tuning).map_err(failed)?;
        let [file] = files;
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(failed)?;
        let memory = libc::iovec {
            iov_base: arena.base().cast(),
            iov_len: arena.capacity() as usize,
        };
        // SAFETY: the arena is borrowed for as long as the ring lives.
        unsafe { ring.submitter().register_buffers(&[memory]) }.map_err(failed)?;
        Ok(Self {
            ring,
            file,
            path: path.to_owned(),
            arena,
            places,
            block: 1 << 20,
            depth: 32,
            next: [0; 2],
            // A place for each granule of the arena.
            started: vec![Instant::now(); (arena.capacity() / GRANULE) as usize],
        })
    }

    pub(super) fn set(&mut self, block: u32, depth: u32) {
        (self.block, self.depth) = (block, depth);
        self.next = [0; 2];
    }

    /// Goes on with other extents, once all that was written is on the disk.
    pub(super) fn move_to(&mut self, places: Vec<u64>) -> Result<(), Error> {
        self.places = places;
        self.next = [0; 2];
        self.file.sync_data().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io {
            operation: "benching",
            what: "bare I/O".into(),
            path: self.path.clone(),
            offset: self.places[0],
            source,
        }
    }

    /// One slice, the queue kept full.
    pub(super) fn slice(&mut self, kind: Kind, mix: (u32, u32)) -> Result<Slice, Error> {
        let block = u64::from(self.block);
        let count = SLICE / block;
        let (mut slice, cpu, start) = (Slice::default(), cpu_seconds(), Instant::now());
        slice.latencies.reserve(count as usize);
        // As much memory as the store's slices use, in turn: what lies in caches is no disk.
        let window = super::window(self.block, self.depth) / block;
        let mut free: VecDeque<u64> = (0..window).collect();
        let (mut asked, mut done) = (0, 0);
        while done < count {
            while asked < count
                && asked - done < u64::from(self.depth)
                && let Some(place) = free.pop_front()
            {
                let write = writes(kind, asked, mix);
                // As in the store's slices: half a turn apart.
                let next = &mut self.next[usize::from(write)];
                let bytes = self.places.len() as u64 * EXTENT;
                let ahead = if write { 0 } else { bytes / 2 };
                let at = (*next * block + ahead) % bytes;
                let offset = self.places[(at / EXTENT) as usize] + at % EXTENT;
                *next += 1;
                let memory = self.arena.base().wrapping_add((place * block) as usize);
                let file = Fixed(0);
                let entry = if write {
                    opcode::WriteFixed::new(file, memory, self.block, 0)
                        .offset(offset)
                        .build()
                } else {
                    opcode::ReadFixed::new(file, memory, self.block, 0)
                        .offset(offset)
                        .build()
                };
                self.started[place as usize] = Instant::now();
                // SAFETY: the arena outlives the ring, and this function waits for all completions;
                // what two requests may do to the same bytes is of no interest.
                let pushed = unsafe { self.ring.submission().push(&entry.user_data(place)) };
                pushed.map_err(|e| self.failed(io::Error::other(e)))?;
                asked += 1;
            }
            let waited = self.ring.submit_and_wait(1);
            if let Err(error) = waited
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(self.failed(error));
            }
            let ended: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|c| (c.user_data(), c.result()))
                .collect();
            for (place, result) in ended {
                if result != self.block as i32 {
                    let source = match result {
                        r if r < 0 => io::Error::from_raw_os_error(-r),
                        _ => io::ErrorKind::UnexpectedEof.into(),
                    };
                    // What is still under way must not outlive this call.
                    let left = asked - done - 1;
                    let _ = self.ring.submit_and_wait(left as usize);
                    return Err(self.failed(source));
                }
                slice.latencies.push(self.started[place as usize].elapsed());
                free.push_back(place);
                done += 1;
            }
        }
        slice.bytes = count * block;
        slice.seconds = start.elapsed().as_secs_f64();
        slice.cpu_seconds = cpu_seconds() - cpu;
        Ok(slice)
    }
}

/// Fills memory with what is not zeros: some disks make short work of those.
pub fn noise(bytes: &mut [u8], seed: u64) {
    for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let mixed = (i as u64 ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *word = (mixed ^ mixed >> 31).to_le_bytes();
    }
}
