//! From disk to device: extents of a store are read and verified into slabs, and each is copied to a slot
//! as soon as it is there, several under way; beside the slower of bare reads and bare copies, both
//! measured in the same rounds.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_pinned::{Arena, Slab};

use super::super::{Slice, duel};
use super::bare::Bare;
use super::ours::Ours;
use super::{Chain, Plan, Way, sized};
use crate::device::{Event, Stream};
use crate::error::{Error, Result};
use crate::nvme::bench::{BareReads, EXTENT, SLICE, cpu_seconds, median, noise};
use crate::nvme::{Copies, IoChoice, Key, Layout, Options, StateKind, Store};

/// Measures, in a folder of its own that is removed.
pub(super) fn run(
    plan: &Plan,
    folder: &Path,
    ours: &mut Ours,
    bare: &mut Bare,
    progress: &mut dyn FnMut(&str),
) -> Result<Chain> {
    let scratch = folder.join(format!(".forebay-bench-{}", std::process::id()));
    std::fs::create_dir(&scratch).map_err(Error::system(format!(
        "making a folder in {}",
        folder.display()
    )))?;
    let result = measure(plan, &scratch, ours, bare, progress);
    // The figures stand whether or not the leftovers go.
    let _ = std::fs::remove_dir_all(&scratch);
    result
}

fn measure(
    plan: &Plan,
    folder: &Path,
    ours: &mut Ours,
    bare: &mut Bare,
    progress: &mut dyn FnMut(&str),
) -> Result<Chain> {
    progress("writing the file once");
    // Every other extent is for bare reads: where on a disk bytes lie changes its rate.
    let extents = (plan.disk_bytes / 2 / EXTENT).max(2 * SLICE / EXTENT);
    let keys = (0..2 * extents).map(|part| (key(part), EXTENT, "bench"));
    let layout = Layout::new("bench", 0, keys);
    let mut options = Options::new([folder]);
    options.copies = Copies::One;
    let mut tuning = options.tuned();
    tuning.io = IoChoice::Uring;
    options.tuning = Some(tuning);
    let arena = ours.pin(SLICE)?;
    let store = Store::create(&arena, &layout, &options)?;
    let notifier = Arc::clone(&ours.notifier);
    store.on_end(move || notifier.notify());
    let mut reading = Reading {
        store,
        slabs: Vec::new(),
        copying: Vec::new(),
        extents,
        next: 0,
    };
    reading.write_all(2 * extents, &arena, ours)?;
    let others = (0..extents).map(|n| key(2 * n + 1));
    let mut reads = BareReads::of(&reading.store, folder, others, &arena, tuning)?;
    reading.slabs.truncate((reads.window() / EXTENT) as usize);
    let copies = sized(Way::H2d, EXTENT, bare)?;
    let (mut disk, mut link) = (Vec::new(), Vec::new());
    progress("from disk to device");
    let duel = duel(
        plan.rounds,
        &mut || {
            let cpu = cpu_seconds();
            disk.push(reads.slice()?);
            let cpu_seconds = cpu_seconds() - cpu;
            // SAFETY: slices run in turn; ours waits for its own copies before it returns.
            link.push(unsafe { bare.slice(copies)?.rate() });
            let slower = disk[disk.len() - 1].min(link[link.len() - 1]);
            Ok(Slice {
                bytes: SLICE as f64,
                seconds: SLICE as f64 / slower,
                cpu_seconds,
            })
        },
        &mut || reading.slice(ours),
    )?;
    Ok(Chain {
        io: reading.store.describe().to_owned(),
        disk_bytes_per_s: median(disk),
        link_bytes_per_s: median(link),
        duel,
        target: 0.95,
    })
}

/// Slices of verified reads, each copied to the device.
struct Reading {
    store: Store,
    slabs: Vec<Slab>,
    /// Slabs that are being copied, oldest first.
    copying: Vec<(Event, Slab)>,
    extents: u64,
    next: u64,
}

impl Reading {
    /// Writes every extent once, from all of the arena.
    fn write_all(&mut self, extents: u64, arena: &Arena, ours: &Ours) -> Result<()> {
        for number in 0..SLICE / EXTENT {
            let mut slab = arena.lease(EXTENT)?;
            noise(&mut slab, number);
            self.slabs.push(slab);
        }
        let (mut asked, mut done) = (0, 0);
        while done < extents {
            while asked < extents
                && let Some(slab) = self.slabs.pop()
            {
                self.store.write(key(asked), slab)?;
                asked += 1;
            }
            let Some(ended) = self.store.try_next() else {
                self.store.health()?;
                ours.notifier.wait(Duration::from_millis(50));
                continue;
            };
            ended.result?;
            self.slabs.push(ended.slab);
            done += 1;
        }
        Ok(())
    }

    /// One slice: as many bytes as a bare one. On an error the device must be drained before slabs go.
    fn slice(&mut self, ours: &mut Ours) -> Result<Slice> {
        let result = self.read(ours);
        if result.is_err() {
            ours.device.drain();
        }
        result
    }

    fn read(&mut self, ours: &mut Ours) -> Result<Slice> {
        let (cpu, start) = (cpu_seconds(), Instant::now());
        let (mut asked, mut done) = (0, 0);
        while done < SLICE / EXTENT {
            // Copies of one stream end in order.
            let mut ended = 0;
            for (event, _) in &self.copying {
                if !ours.device.query(*event)? {
                    break;
                }
                ended += 1;
            }
            done += ended as u64;
            let back = self.copying.drain(..ended).map(|(_, slab)| slab);
            self.slabs.extend(back);
            while asked < SLICE / EXTENT
                && let Some(slab) = self.slabs.pop()
            {
                self.store.read(key(2 * (self.next % self.extents)), slab)?;
                (self.next, asked) = (self.next + 1, asked + 1);
            }
            let Some(read) = self.store.try_next() else {
                self.store.health()?;
                if done < SLICE / EXTENT {
                    ours.notifier.wait(Duration::from_millis(50));
                }
                continue;
            };
            read.result?;
            let slot = ours.piece(u64::from(read.key.part), EXTENT);
            let from = read.slab.address();
            // SAFETY: the slab is held until the event, the slot is the bench's, and copies of one
            // stream run in order.
            let event = unsafe { ours.device.copy_in(Stream::H2d, slot, from) };
            self.copying.push((event, read.slab));
        }
        Ok(Slice {
            bytes: SLICE as f64,
            seconds: start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - cpu,
        })
    }
}

fn key(part: u64) -> Key {
    Key {
        section: 0,
        state: StateKind::Optim,
        part: part as u32,
    }
}
