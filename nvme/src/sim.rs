//! A seeded simulated disk: folders, files and I/O in memory, with the faults of real ones.
//!
//! Completions come out of order; transfers can be short, interrupted, failed, lost, misdirected or
//! never answered; a read can return a flipped bit; a sync can fail and lose what it was for; the
//! power can go. What was not synced then may be there, be lost or be torn, write by write and sector
//! by sector. The same seed gives the same run: [`SimDisk::trace`].
//!
//! A store is put on it by [`Options::medium`](crate::Options::medium); its I/O then runs on the thread
//! that asks for results.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use twox_hash::XxHash3_64;

use crate::Error;
use crate::io::{Completion, Io, IoOp, Region, Request, Tuning, Wake};
use crate::medium::{Access, BLOCK, IoMaker, Medium, Volume};

const SECTOR: usize = 512;
/// Writes that hit this part of a file hit what the store says of itself.
const HEADER: u64 = 64 << 10;

/// What may happen to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with EIO.
    Error,
    /// It fails with ENOSPC (writes).
    Full,
    /// It moves fewer bytes than asked.
    Short,
    /// EINTR or EAGAIN: it is to be tried again.
    Interrupted,
    /// One bit of what is read is not what is stored.
    Flip,
    /// A write is acknowledged and does not happen.
    Lost,
    /// A write is acknowledged and happens elsewhere in the file.
    Misdirected,
    /// It is never answered.
    Stuck,
    /// The power goes before it.
    PowerCut,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Error,
        Self::Full,
        Self::Short,
        Self::Interrupted,
        Self::Flip,
        Self::Lost,
        Self::Misdirected,
        Self::Stuck,
        Self::PowerCut,
    ];
}

/// A simulated disk. Clones are the same one.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    random: Random,
    files: BTreeMap<PathBuf, SimFile>,
    locked: BTreeSet<PathBuf>,
    /// Bytes of all files together.
    capacity: u64,
    chances: Vec<(Fault, f64)>,
    scheduled: BTreeMap<u64, Fault>,
    operations: u64,
    happened: Vec<(u64, Fault)>,
    header_hits: u64,
    trace: u64,
    clock: Duration,
    /// Counts power cuts: what was opened before the last one is dead.
    boot: u64,
}

#[derive(Debug, Default)]
struct SimFile {
    /// What reads see.
    cached: Vec<u8>,
    /// What survives a power cut in any case.
    durable: Vec<u8>,
    /// Writes since the last sync.
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Whether its name survives.
    named: bool,
}

/// splitmix64.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn chance(&mut self, p: f64) -> bool {
        (self.next() >> 11) as f64 / ((1u64 << 53) as f64) < p
    }
}

impl SimDisk {
    /// An empty disk of 1 GiB that does what it should.
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: Random(seed),
            files: BTreeMap::new(),
            locked: BTreeSet::new(),
            capacity: 1 << 30,
            chances: Vec::new(),
            scheduled: BTreeMap::new(),
            operations: 0,
            happened: Vec::new(),
            header_hits: 0,
            trace: 0,
            clock: Duration::ZERO,
            boot: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on each operation meets this fault with this probability.
    pub fn set_chance(&self, fault: Fault, probability: f64) {
        let mut state = self.state();
        state.chances.retain(|(other, _)| *other != fault);
        state.chances.push((fault, probability));
    }

    /// No more faults by chance or by schedule.
    pub fn heal(&self) {
        let mut state = self.state();
        state.chances.clear();
        state.scheduled.clear();
    }

    /// Operation number `operation` (the first is 0) meets this fault.
    pub fn schedule(&self, operation: u64, fault: Fault) {
        self.state().scheduled.insert(operation, fault);
    }

    /// Bytes that all files together may have.
    pub fn set_capacity(&self, bytes: u64) {
        self.state().capacity = bytes;
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// The faults that happened, with the operations that met them.
    pub fn happened(&self) -> Vec<(u64, Fault)> {
        self.state().happened.clone()
    }

    /// Writes that were lost from, or misdirected to, the first 64 KiB of a file.
    pub fn header_hits(&self) -> u64 {
        self.state().header_hits
    }

    /// A hash of every operation and its result, in order.
    pub fn trace(&self) -> u64 {
        self.state().trace
    }

    /// The power goes and comes back. Everything that was open is dead.
    pub fn power_cut(&self) {
        self.state().cut(&[]);
    }

    /// Flips one bit of a file where it is stored.
    pub fn rot(&self, path: &Path, byte: u64, bit: u8) {
        if let Some(file) = self.state().files.get_mut(path) {
            file.settle();
            file.cached[byte as usize] ^= 1 << bit;
            file.durable[byte as usize] ^= 1 << bit;
        }
    }

    /// The contents of a file.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        self.state().files.get(path).map(|file| file.cached.clone())
    }
}

impl SimFile {
    fn settle(&mut self) {
        self.durable.clone_from(&self.cached);
        self.unsynced.clear();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        put(&mut self.cached, offset, data);
        self.unsynced.push((offset, data.to_vec()));
    }
}

fn put(target: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = offset as usize;
    if target.len() < start + data.len() {
        target.resize(start + data.len(), 0);
    }
    target[start..start + data.len()].copy_from_slice(data);
}

impl State {
    /// The power goes. `pending`: writes under way, as file, offset and data.
    fn cut(&mut self, pending: &[(PathBuf, u64, Vec<u8>)]) {
        self.boot += 1;
        self.locked.clear();
        for (path, offset, data) in pending {
            if let Some(file) = self.files.get_mut(path) {
                file.unsynced.push((*offset, data.clone()));
            }
        }
        let random = &mut self.random;
        self.files
            .retain(|_, file| file.named || random.chance(0.5));
        for file in self.files.values_mut() {
            let mut survived = std::mem::take(&mut file.durable);
            // Some cuts lose most, some little.
            let keep = [0.1, 0.5, 0.9][random.below(3)];
            for (offset, data) in std::mem::take(&mut file.unsynced) {
                if random.chance(keep) {
                    put(&mut survived, offset, &data);
                } else if random.chance(0.5) {
                    for (index, sector) in data.chunks(SECTOR).enumerate() {
                        if random.chance(keep) {
                            put(&mut survived, offset + (index * SECTOR) as u64, sector);
                        }
                    }
                }
            }
            file.cached.clone_from(&survived);
            file.durable = survived;
            file.named = true;
        }
    }

    /// What this operation meets.
    fn fault(&mut self, op: IoOp) -> Option<Fault> {
        let number = self.operations;
        self.operations += 1;
        let mut fault = self.scheduled.remove(&number);
        for index in 0..self.chances.len() {
            let (chosen, probability) = self.chances[index];
            if self.random.chance(probability) {
                fault.get_or_insert(chosen);
            }
        }
        let possible = match fault? {
            Fault::Flip => op == IoOp::Read,
            Fault::Full | Fault::Lost | Fault::Misdirected => op == IoOp::Write,
            Fault::Short => op != IoOp::Sync,
            _ => true,
        };
        let fault = fault.filter(|_| possible);
        if let Some(fault) = fault {
            self.happened.push((number, fault));
        }
        fault
    }

    /// Does what a request asks, or what the fault makes of it.
    fn execute(&mut self, path: &Path, request: &Request, fault: Option<Fault>) -> i32 {
        match fault {
            Some(Fault::Error) => {
                if request.op == IoOp::Sync
                    && let Some(file) = self.files.get_mut(path)
                {
                    // As page caches do: what could not be written is forgotten, and the next sync
                    // knows nothing of it.
                    file.unsynced.clear();
                }
                return -libc::EIO;
            }
            Some(Fault::Full) => return -libc::ENOSPC,
            Some(Fault::Interrupted) => {
                return [-libc::EINTR, -libc::EAGAIN][self.random.below(2)];
            }
            _ => {}
        }
        let mut len = request.len as usize;
        if fault == Some(Fault::Short) && len > 1 {
            len = 1 + self.random.below(len - 1);
        }
        let (offset, memory) = (request.offset, request.memory);
        let Some(file) = self.files.get_mut(path) else {
            return -libc::EIO;
        };
        match request.op {
            IoOp::Sync => {
                // Only what this file's writes brought; a name is durable on its own.
                file.settle();
                0
            }
            IoOp::Read => {
                let start = (offset as usize).min(file.cached.len());
                len = len.min(file.cached.len() - start);
                // SAFETY: the request's memory is valid until its completion (contract of `submit`).
                let target = unsafe { std::slice::from_raw_parts_mut(memory, len) };
                target.copy_from_slice(&file.cached[start..start + len]);
                if fault == Some(Fault::Flip) && len > 0 {
                    let at = self.random.below(len);
                    target[at] ^= 1 << self.random.below(8);
                }
                len as i32
            }
            IoOp::Write => {
                // SAFETY: as above.
                let data = unsafe { std::slice::from_raw_parts(memory, len) };
                let mut offset = offset;
                if fault == Some(Fault::Misdirected) {
                    let blocks = file.cached.len() as u64 / BLOCK;
                    offset = self.random.next() % blocks.max(1) * BLOCK;
                }
                if matches!(fault, Some(Fault::Lost | Fault::Misdirected))
                    && (offset < HEADER || request.offset < HEADER)
                {
                    self.header_hits += 1;
                }
                if fault != Some(Fault::Lost) {
                    file.write(offset, data);
                }
                len as i32
            }
        }
    }
}

impl Medium for SimDisk {
    fn open(&self, folders: &[PathBuf], access: Access) -> Result<Box<dyn Volume>, Error> {
        let mut state = self.state();
        let mut paths = Vec::new();
        for folder in folders {
            let path = folder.join("data.forebay");
            if !state.files.contains_key(&path) {
                if access != Access::Create {
                    return Err(Error::NoGeneration {
                        path: folder.clone(),
                    });
                }
                state.files.insert(path.clone(), SimFile::default());
            }
            paths.push(path);
        }
        if access != Access::Look {
            if let Some(path) = paths.iter().find(|path| state.locked.contains(*path)) {
                return Err(Error::Locked {
                    path: path.clone(),
                    owner: "another store of this process".into(),
                });
            }
            state.locked.extend(paths.iter().cloned());
        }
        Ok(Box::new(SimVolume {
            disk: self.clone(),
            boot: state.boot,
            owns: access != Access::Look,
            paths,
        }))
    }

    fn simulated(&self) -> bool {
        true
    }
}

struct SimVolume {
    disk: SimDisk,
    boot: u64,
    owns: bool,
    paths: Vec<PathBuf>,
}

impl Drop for SimVolume {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if self.owns && state.boot == self.boot {
            for path in &self.paths {
                state.locked.remove(path);
            }
        }
    }
}

impl Volume for SimVolume {
    fn path(&self, file: usize) -> &Path {
        &self.paths[file]
    }

    fn len(&self, file: usize) -> io::Result<u64> {
        let state = self.disk.state();
        let file = state.files.get(&self.paths[file]);
        Ok(file.map_or(0, |f| f.cached.len() as u64))
    }

    fn free(&self, _file: usize) -> Result<u64, Error> {
        let state = self.disk.state();
        let used: usize = state.files.values().map(|f| f.cached.len()).sum();
        Ok(state.capacity.saturating_sub(used as u64))
    }

    fn reserve(&mut self, file: usize, bytes: u64) -> Result<(), Error> {
        let free = self.free(file)?;
        let path = &self.paths[file];
        let mut state = self.disk.state();
        let alive = self.boot == state.boot;
        let needed = match state.files.get_mut(path) {
            Some(found) if alive => {
                let needed = bytes.saturating_sub(found.cached.len() as u64);
                if needed <= free {
                    let len = found.cached.len().max(bytes as usize);
                    found.cached.resize(len, 0);
                    return Ok(());
                }
                needed
            }
            _ => {
                return Err(Error::Folder {
                    path: path.clone(),
                    source: io::Error::from_raw_os_error(libc::EIO),
                });
            }
        };
        Err(Error::Space {
            path: path.clone(),
            needed,
            free,
            instead: String::new(),
        })
    }

    fn sync_names(&mut self) -> Result<(), Error> {
        let mut state = self.disk.state();
        for path in &self.paths {
            if let Some(file) = state.files.get_mut(path) {
                file.named = true;
            }
        }
        Ok(())
    }

    fn io(&self, _region: Option<Region>, _tuning: Tuning) -> io::Result<IoMaker> {
        let io = SimIo {
            disk: self.disk.clone(),
            boot: self.boot,
            paths: self.paths.clone(),
            pending: Vec::new(),
            stuck: 0,
        };
        Ok(Box::new(move || Ok(Box::new(io))))
    }
}

struct SimIo {
    disk: SimDisk,
    boot: u64,
    paths: Vec<PathBuf>,
    pending: Vec<Request>,
    stuck: usize,
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl Io for SimIo {
    unsafe fn submit(&mut self, request: Request) -> bool {
        self.pending.push(request);
        true
    }

    fn wait(&mut self, completions: &mut Vec<Completion>, timeout: Option<Duration>) {
        let mut state = self.disk.state();
        if self.pending.is_empty() {
            // Time passes until whoever waits gives up.
            state.clock += timeout.unwrap_or_default();
            return;
        }
        let several = 1 + state.random.below(3);
        for _ in 0..several.min(self.pending.len()) {
            let micros = 1 + state.random.below(200) as u64;
            state.clock += Duration::from_micros(micros);
            let chosen = state.random.below(self.pending.len());
            let request = self.pending.swap_remove(chosen);
            let path = &self.paths[request.file as usize];
            let blocks = [
                request.offset,
                request.memory as u64,
                u64::from(request.len),
            ];
            let aligned = blocks.iter().all(|n| n.is_multiple_of(BLOCK));
            let result = if state.boot != self.boot {
                -libc::EIO
            } else if request.op != IoOp::Sync && !aligned {
                // As direct I/O.
                -libc::EINVAL
            } else {
                match state.fault(request.op) {
                    Some(Fault::PowerCut) => {
                        let others = self.pending.iter().chain([&request]);
                        let writes = others.filter(|r| r.op == IoOp::Write);
                        let pending: Vec<_> = writes
                            .map(|r| {
                                // SAFETY: valid until the completion (contract of `submit`).
                                let data =
                                    unsafe { std::slice::from_raw_parts(r.memory, r.len as usize) };
                                (self.paths[r.file as usize].clone(), r.offset, data.to_vec())
                            })
                            .collect();
                        state.cut(&pending);
                        -libc::EIO
                    }
                    Some(Fault::Stuck) => {
                        self.stuck += 1;
                        continue;
                    }
                    fault => state.execute(path, &request, fault),
                }
            };
            let mut line = [0u8; 32];
            line[..8].copy_from_slice(&state.trace.to_le_bytes());
            line[8..16].copy_from_slice(&request.offset.to_le_bytes());
            line[16..20].copy_from_slice(&request.len.to_le_bytes());
            line[20..24].copy_from_slice(&result.to_le_bytes());
            line[24] = request.op as u8;
            line[25] = request.file as u8;
            state.trace = XxHash3_64::oneshot(&line);
            completions.push(Completion {
                id: request.id,
                result,
            });
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }

    fn describe(&self) -> String {
        format!("simulated ({} files)", self.paths.len())
    }

    fn now(&self) -> Duration {
        self.disk.state().clock
    }
}
