//! The CPU's AdamW, bf16 gradient in and bf16 parameter out, beside the ceiling: bare threads that go over
//! the same memory with next to no arithmetic (28 bytes a parameter).

use std::time::Instant;

use forebay_kernels::cpu::{
    AdamW, Binding, Cores, Exchange, Isa, Kept, States, Workers, adam_traffic, adamw_ahead,
    adamw_parallel, bind_this_thread, log_bytes,
};
use forebay_pinned::Arena;

use super::{Duel, Slice, duel};
use crate::error::{Error, Result};
use crate::machine;
use crate::nvme::bench::cpu_seconds;

/// Bytes read and written for a parameter: gradient 2, master and moments 12 each way, parameter 2.
pub const BYTES: u64 = 28;
/// Bytes of memory for a parameter.
pub(super) const ROOM: u64 = 16;
/// A slice takes at least this long: what starting threads takes does not count then.
const SLICE_SECONDS: f64 = 0.05;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Parameters; sizes that do not fit into free memory are left out.
    pub sizes: Vec<u64>,
    /// Threads.
    pub threads: usize,
    /// Whether they are bound to a CPU each.
    pub bind: Bind,
    /// Rounds of each size: three slices of at least 50 ms.
    pub rounds: u32,
    /// Whether ours logs what it overwrites, as ahead of the norm.
    pub ahead: bool,
}

/// Whether threads are bound to a CPU each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bind {
    /// Neither ours nor those of the bare pass.
    #[default]
    Off,
    /// Ours and those of the bare pass.
    On,
    /// As with `Off`, and ours bound beside ours free.
    Both,
}

impl std::str::FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            "both" => Ok(Self::Both),
            _ => Err(format!("'{text}': use off, on or both")),
        }
    }
}

/// What was found for one size.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Parameters.
    pub size: u64,
    /// Whether the ceiling writes the parameters past the caches: the faster way was taken.
    pub streams: bool,
    /// Ours beside the ceiling; bytes at [`BYTES`] a parameter.
    pub duel: Duel,
    /// With [`Bind::Both`]: ours on bound threads (`ours`) beside ours on free ones (`bare`).
    pub bound: Option<Duel>,
}

/// Everything found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The instruction set.
    pub isa: String,
    /// Threads.
    pub threads: usize,
    /// Where they run, or the second pool's where there are two.
    pub binding: String,
    /// Whether the memory is page-locked, and in huge pages where they can be had.
    pub memory: String,
    /// By size.
    pub outcomes: Vec<Outcome>,
    /// Sizes that do not fit into free memory.
    pub left_out: Vec<u64>,
}

/// Measures. `progress` is told what is being done.
///
/// # Errors
/// Memory or threads refused.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let threads = plan.threads.max(1);
    let pool = Pool::new(threads, plan.bind == Bind::On)?;
    let bound = match plan.bind {
        Bind::Both => Some(Pool::new(threads, true)?),
        Bind::Off | Bind::On => None,
    };
    let cpus = cpus(threads, plan.bind == Bind::On);
    let free = machine::free_memory() / 2;
    let log = |size: u64| match plan.ahead {
        true => log_bytes(size as usize) as u64,
        false => 0,
    };
    let (fit, left_out): (Vec<u64>, Vec<u64>) = plan
        .sizes
        .iter()
        .partition(|size| *size * ROOM + log(**size) <= free);
    let mut report = Report {
        isa: format!("{:?}", Isa::best()),
        threads,
        binding: bound.as_ref().unwrap_or(&pool).binding.to_string(),
        memory: String::new(),
        outcomes: Vec::new(),
        left_out,
    };
    for size in fit {
        progress(&format!("{size} parameters"));
        let arena = Arena::new(ROOM * size + log(size) + 6 * 4096)?;
        report.memory = arena.lock().to_string();
        let mut memory = Memory::new(&arena, size)?;
        let mut log = arena.lease(log(size))?;
        log.fill(0);
        let mut bare = |streams| measure(size, |n| memory.bare(threads, &cpus, streams, n));
        // Whichever way of writing is faster here is the ceiling.
        let rates = [false, true].map(|streams| {
            let rate = |_| bare(streams).rate();
            (0..3).map(rate).fold(0.0, f64::max)
        });
        let streams = rates[1] > rates[0];
        let memory = std::cell::RefCell::new(memory);
        let duel = duel(
            plan.rounds,
            &mut || {
                Ok(measure(size, |n| {
                    memory.borrow_mut().bare(threads, &cpus, streams, n)
                }))
            },
            &mut || Ok(pool.slice(&mut memory.borrow_mut(), &mut log, size)),
        )?;
        let (memory, log) = (&memory, std::cell::RefCell::new(log));
        let slice = |pool: &Pool| {
            let (mut memory, mut log) = (memory.borrow_mut(), log.borrow_mut());
            Ok(pool.slice(&mut memory, &mut log, size))
        };
        let beside = |bound| self::duel(plan.rounds, &mut || slice(&pool), &mut || slice(bound));
        let bound = bound.as_ref().map(beside).transpose()?;
        report.outcomes.push(Outcome {
            size,
            streams,
            duel,
            bound,
        });
    }
    Ok(report)
}

/// The CPUs for so many bound threads; none where they are not to be bound, or cannot be.
pub(super) fn cpus(threads: usize, bind: bool) -> Vec<usize> {
    let allowed = Cores::allowed().ok().filter(|_| bind);
    let enough = allowed.filter(|cores| cores.cpus().len() >= threads);
    enough.map_or_else(Vec::new, |cores| cores.cpus()[..threads].to_vec())
}

/// Worker threads, bound or free.
struct Pool {
    workers: Workers,
    binding: Binding,
}

impl Pool {
    fn new(threads: usize, bind: bool) -> Result<Self> {
        let refused = Error::system("starting threads");
        let workers = Workers::new(threads, "fb-adam").map_err(refused)?;
        let binding = match bind {
            // On a thread that goes: the caller's own stays free.
            true => std::thread::scope(|scope| {
                let bound = scope.spawn(|| workers.bind(None)).join();
                bound.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }),
            false => Binding::Free,
        };
        Ok(Self { workers, binding })
    }

    /// Called from a thread that is bound as the others are.
    fn slice(&self, memory: &mut Memory, log: &mut [u8], size: u64) -> Slice {
        let mut work = || measure(size, |n| memory.ours(&self.workers, log, n));
        let Binding::Bound(cpus) = &self.binding else {
            return work();
        };
        std::thread::scope(|scope| {
            let slice = scope.spawn(|| {
                // It could be when the others were.
                let _ = bind_this_thread(cpus[0]);
                work()
            });
            slice
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// As many passes as a slice takes.
fn measure(size: u64, mut passes: impl FnMut(u32)) -> Slice {
    let (cpu, start) = (cpu_seconds(), Instant::now());
    let mut done = 0;
    // Twice as many each time, so that looking at the clock costs nothing.
    let mut next = 1;
    while start.elapsed().as_secs_f64() < SLICE_SECONDS {
        passes(next);
        done += next;
        next = done;
    }
    Slice {
        bytes: (BYTES * size * u64::from(done)) as f64,
        seconds: start.elapsed().as_secs_f64(),
        cpu_seconds: cpu_seconds() - cpu,
    }
}

/// Parameters that the optimizer updates in a second, without the log of what it overwrites and with it: the best
/// of a few passes over so many parameters, or as many as fit into an eighth of what is free.
pub(crate) fn rates(threads: usize, elements: u64) -> Result<[f64; 2]> {
    let most = machine::free_memory() / 8 / (2 * ROOM);
    let size = elements.min(most).max(1);
    let workers = Workers::new(threads, "fb-rates").map_err(Error::system("starting threads"))?;
    let log_size = log_bytes(size as usize) as u64;
    let arena = Arena::new(ROOM * size + log_size + 6 * 4096)?;
    let mut memory = Memory::new(&arena, size)?;
    let mut log = arena.lease(log_size)?;
    log.fill(0);
    let mut best = |log: &mut [u8]| {
        let rate = |_| {
            let start = Instant::now();
            memory.ours(&workers, log, 1);
            size as f64 / start.elapsed().as_secs_f64()
        };
        (0..3).map(rate).fold(0.0, f64::max)
    };
    Ok([best(&mut []), best(&mut log)])
}

pub(super) struct Memory {
    states: [forebay_pinned::Slab; 3],
    grad: forebay_pinned::Slab,
    param: forebay_pinned::Slab,
}

impl Memory {
    pub(super) fn new(arena: &Arena, size: u64) -> Result<Self> {
        let take = |each: u64| -> Result<_> {
            let mut slab = arena.lease(each * size)?;
            // In either type a number of a common size.
            slab.fill(0x3c);
            Ok(slab)
        };
        Ok(Self {
            states: [take(4)?, take(4)?, take(4)?],
            grad: take(2)?,
            param: take(2)?,
        })
    }

    /// With a `log`, if that is not empty.
    fn ours(&mut self, workers: &Workers, log: &mut [u8], passes: u32) {
        let adam = AdamW {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        };
        for _ in 0..passes {
            let [master, m, v] = self.states.each_mut().map(|s| bytemuck::cast_slice_mut(s));
            let states = States { master, m, v };
            let exchange = Exchange::Bf16 {
                grad: bytemuck::cast_slice(&self.grad),
                param: bytemuck::cast_slice_mut(&mut self.param),
            };
            let (isa, scalars) = (Isa::best(), adam.at(100, 1e-4, 1.0));
            if log.is_empty() {
                adamw_parallel(workers, isa, &scalars, states, exchange);
                continue;
            }
            let kept = Kept {
                log: &mut *log,
                grad: &mut [],
            };
            adamw_ahead(workers, isa, &scalars, states, exchange, kept);
        }
    }

    /// The same memory by threads of their own, each with a run of it, bound to these CPUs if there are any.
    pub(super) fn bare(&mut self, threads: usize, cpus: &[usize], streams: bool, passes: u32) {
        let [p, m, v] = self
            .states
            .each_mut()
            .map(|s| bytemuck::cast_slice_mut::<u8, f32>(s));
        let grad: &[half::bf16] = bytemuck::cast_slice(&self.grad);
        let param: &mut [half::bf16] = bytemuck::cast_slice_mut(&mut self.param);
        let share = grad.len().div_ceil(threads).next_multiple_of(1024);
        std::thread::scope(|scope| {
            let parts = p
                .chunks_mut(share)
                .zip(m.chunks_mut(share))
                .zip(v.chunks_mut(share));
            let each = parts.zip(grad.chunks(share).zip(param.chunks_mut(share)));
            for (index, (((p, m), v), (grad, param))) in each.enumerate() {
                scope.spawn(move || {
                    if let Some(cpu) = cpus.get(index) {
                        let _ = bind_this_thread(*cpu);
                    }
                    for _ in 0..passes {
                        let states = States {
                            master: &mut *p,
                            m: &mut *m,
                            v: &mut *v,
                        };
                        adam_traffic(Isa::best(), states, grad, param, streams);
                    }
                });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_that_log_are_no_faster_by_much_and_both_have_a_rate() {
        let [plain, logged] = rates(1, 4 << 20).unwrap();
        assert!(logged > 1e6 && logged < 1.5 * plain, "{plain} {logged}");
    }

    #[test]
    fn a_small_size_gives_plausible_rates_and_one_that_does_not_fit_is_left_out() {
        let plan = Plan {
            sizes: vec![100_000, u64::MAX / 64],
            threads: 2,
            bind: Bind::Both,
            rounds: 3,
            ahead: false,
        };
        let before = Cores::allowed().unwrap();
        let report = run(&plan, &mut |_| {}).unwrap();
        assert_eq!(Cores::allowed().unwrap(), before, "this thread stays free");
        let bound = report.outcomes[0].bound.as_ref().unwrap();
        assert!(bound.ours_bytes_per_s > 1e8, "{bound:?}");
        let enough = before.cpus().len() >= 2;
        assert_eq!(report.binding.starts_with("bound to CPUs "), enough);
        assert_eq!((report.outcomes.len(), report.left_out.len()), (1, 1));
        let duel = &report.outcomes[0].duel;
        assert!(
            duel.bare_bytes_per_s > 1e8 && duel.ours_bytes_per_s > 1e8,
            "{duel:?}"
        );
    }
}
