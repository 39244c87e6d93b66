//! The CPUs that this process may use, in the order in which threads are bound to them.

use std::collections::HashMap;
use std::io;

/// Room for as many CPUs as the kernel can have.
const WORDS: usize = 256;

/// CPUs in the order in which threads take them: a thread of each physical core first, as two on one core share
/// what it computes with; among those NUMA node by node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores {
    cpus: Vec<usize>,
    physical: usize,
    nodes: usize,
}

/// Where a CPU is: what names its physical core, and its NUMA node.
type Place = (String, usize);

impl Cores {
    /// Those that the calling thread may use, and the threads that it makes: cgroups and `taskset` hold.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn allowed() -> io::Result<Self> {
        let mut mask = [0u64; WORDS];
        // SAFETY: the mask is as long as is said, and aligned as a mask is, which is made of words.
        let done = unsafe {
            libc::sched_getaffinity(
                0,
                size_of_val(&mask),
                mask.as_mut_ptr().cast::<libc::cpu_set_t>(),
            )
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let allowed = (0..64 * WORDS).filter(|cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1);
        Ok(Self::order(allowed, place))
    }

    fn order(cpus: impl Iterator<Item = usize>, place: impl Fn(usize) -> Place) -> Self {
        let mut siblings = HashMap::<String, usize>::new();
        let mut order: Vec<_> = cpus
            .map(|cpu| {
                let (core, node) = place(cpu);
                let sibling = siblings.entry(core).or_default();
                *sibling += 1;
                (*sibling, node, cpu)
            })
            .collect();
        order.sort_unstable();
        let mut nodes: Vec<_> = order.iter().map(|(_, node, _)| *node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        Self {
            cpus: order.into_iter().map(|(_, _, cpu)| cpu).collect(),
            physical: siblings.len(),
            nodes: nodes.len(),
        }
    }

    /// Their numbers, in order.
    pub fn cpus(&self) -> &[usize] {
        &self.cpus
    }

    /// Physical cores among them.
    pub fn physical(&self) -> usize {
        self.physical
    }

    /// NUMA nodes that they are on.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

/// From sysfs; without it each is a core of its own, all on one node.
fn place(cpu: usize) -> Place {
    let folder = format!("/sys/devices/system/cpu/cpu{cpu}");
    let siblings = std::fs::read_to_string(format!("{folder}/topology/thread_siblings_list"));
    let core = siblings.unwrap_or_else(|_| cpu.to_string());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let node = entries
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("node")?
                .parse()
                .ok()
        })
        .next();
    (core, node.unwrap_or(0))
}

/// Binds the calling thread to a CPU.
///
/// # Errors
/// If the system refuses: the CPU is not there, or not allowed.
pub fn bind_this_thread(cpu: usize) -> io::Result<()> {
    // SAFETY: this thread is alive.
    unsafe {
        let this = libc::pthread_self();
        bind(this, &[cpu])
    }
}

/// Lets a thread run on these CPUs and no others.
///
/// # Safety
/// The thread was neither joined nor detached.
pub(super) unsafe fn bind(thread: libc::pthread_t, cpus: &[usize]) -> io::Result<()> {
    let mut mask = [0u64; WORDS];
    for cpu in cpus {
        let word = mask.get_mut(cpu / 64);
        *word.ok_or(io::ErrorKind::InvalidInput)? |= 1 << (cpu % 64);
    }
    // SAFETY: the mask is as long as is said; the thread by the contract above.
    let done = unsafe {
        libc::pthread_setaffinity_np(
            thread,
            size_of_val(&mask),
            mask.as_ptr().cast::<libc::cpu_set_t>(),
        )
    };
    match done {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Where the threads of a pool run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Binding {
    /// Where the system puts them.
    #[default]
    Free,
    /// Each on a CPU of its own: these, in the order of the threads.
    Bound(Vec<usize>),
    /// Where the system puts them, as they could not be bound; why.
    Refused(String),
}

impl std::fmt::Display for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Free => write!(f, "not bound to CPUs"),
            Self::Bound(cpus) => {
                let cpus: Vec<_> = cpus.iter().map(usize::to_string).collect();
                write!(f, "bound to CPUs {}", cpus.join(", "))
            }
            Self::Refused(why) => write!(f, "not bound to CPUs ({why})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_physical_core_comes_once_before_any_comes_twice_and_nodes_stay_together() {
        // Two nodes of two cores with two threads each, numbered as Linux does.
        let place = |cpu: usize| (format!("{},{}", cpu % 4, cpu % 4 + 4), cpu % 4 / 2);
        let cores = Cores::order(0..8, place);
        assert_eq!(cores.cpus(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((cores.physical(), cores.nodes()), (4, 2));
        // Siblings beside each other, and nodes in turn.
        let place = |cpu: usize| (format!("{}", cpu / 2), cpu / 2 % 2);
        let cores = Cores::order(0..8, place);
        assert_eq!(cores.cpus(), [0, 4, 2, 6, 1, 5, 3, 7]);
        // Of some a sibling is not allowed.
        let cores = Cores::order([1, 3, 4, 5].into_iter(), place);
        assert_eq!((cores.cpus(), cores.physical()), (&[1, 4, 3, 5][..], 3));
    }

    #[test]
    fn a_bound_thread_runs_where_it_was_told_and_a_cpu_that_is_not_there_is_refused() {
        let thread = std::thread::spawn(|| {
            let all = Cores::allowed().unwrap();
            for cpu in all.cpus() {
                bind_this_thread(*cpu).unwrap();
                // SAFETY: no memory is touched.
                assert_eq!(unsafe { libc::sched_getcpu() }, *cpu as i32);
                assert_eq!(Cores::allowed().unwrap().cpus(), [*cpu]);
            }
            for far in [64 * WORDS - 1, 64 * WORDS] {
                assert!(bind_this_thread(far).is_err());
            }
        });
        thread.join().unwrap();
    }
}
