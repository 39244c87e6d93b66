//! What the machine has for us: memory that is really free, limits, threads, disks.
//!
//! `forebay doctor` prints these facts with the line that mends what is amiss, and the default
//! budgets come from the same numbers.

mod link;
mod memory;

use std::path::{Path, PathBuf};

use forebay_kernels::cpu::Isa;
use forebay_nvme::probe::{self, DiskRate};
use forebay_nvme::profile::Profile;

use crate::{Budgets, Bytes, DeviceChoice, Target};
pub use link::Link;

/// How a fact stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As it should be.
    Good,
    /// Works, but slower or smaller than it could.
    Poor,
    /// Keeps a run from working.
    Bad,
}

/// One thing found out about the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is about.
    pub name: String,
    /// What was found.
    pub value: String,
    /// How that stands.
    pub standing: Standing,
    /// What mends it, where something is amiss.
    pub mend: Option<String>,
}

impl Fact {
    fn good(name: &str, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
            standing: Standing::Good,
            mend: None,
        }
    }

    fn poor(name: &str, value: impl Into<String>, mend: impl Into<String>) -> Self {
        let mend = Some(mend.into());
        Self {
            name: name.into(),
            value: value.into(),
            standing: Standing::Poor,
            mend,
        }
    }

    fn bad(name: &str, value: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            standing: Standing::Bad,
            ..Self::poor(name, value, mend)
        }
    }
}

/// Bytes of memory that this process can still get: what the system has available, or less where a
/// control group limits it. (`MemTotal` says neither.)
pub fn free_memory() -> u64 {
    memory::free(Path::new("/"))
}

/// The most memory that this process held at once, in bytes, as the system counts it: pinned memory, the host
/// device's, and everything else.
pub fn peak_resident() -> Option<u64> {
    memory::peak_resident()
}

/// Budgets for a machine that nothing is known of but its free memory. On the host device: a quarter
/// of it for the device, a quarter for pinned memory. With a GPU: what is free there, less what its
/// driver and libraries take besides; and half of the machine's memory to pin. The rest stays for the
/// page cache, for whatever else runs, and for the trainer's own data; too much locked memory makes a
/// machine unusable.
pub fn default_budgets(target: Target) -> Budgets {
    let quarter = (free_memory() / 4).max(1 << 20) & !0xfff;
    match target {
        Target::Cuda => Budgets {
            device_bytes: gpu_budget().unwrap_or(quarter),
            pinned_bytes: 2 * quarter,
        },
        Target::Host { .. } => Budgets {
            device_bytes: quarter,
            pinned_bytes: quarter,
        },
    }
}

/// GPU memory that is not asked for: a context with kernels and cuBLASLt takes about half of it.
const GPU_RESERVE_BYTES: u64 = 1 << 30;

fn gpu_budget() -> Option<u64> {
    let free = forebay_kernels::cuda::free_bytes().ok()?;
    Some(free.saturating_sub(GPU_RESERVE_BYTES) & !0xfff)
}

fn own_target() -> Target {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let host = Target::Host { threads };
    DeviceChoice::Auto.target(threads).unwrap_or(host)
}

/// The link of the first GPU, where there is one and the system says.
pub fn link() -> Option<Link> {
    let found = forebay_kernels::cuda::probe().ok()?;
    link::link(Path::new("/"), &found.bus?)
}

/// Looks at everything, the given disk folders included: writes and reads 64 MiB in each.
pub fn examine(disks: &[PathBuf]) -> Vec<Fact> {
    let mut facts = vec![
        gpu(),
        cpu(),
        memory_fact(),
        memlock(),
        huge_pages(),
        uring(),
    ];
    facts.extend(disks.iter().flat_map(|folder| disk(folder)));
    let budgets = default_budgets(own_target());
    let value = format!(
        "device {}, pinned {}",
        Bytes(budgets.device_bytes),
        Bytes(budgets.pinned_bytes)
    );
    facts.push(Fact::good("default budgets", value));
    facts
}

fn gpu() -> Fact {
    use forebay_kernels::cuda;
    let present = Path::new("/dev/nvidia0").exists();
    let found = match cuda::probe() {
        Ok(found) => found,
        Err(_) if !present => return Fact::good("GPU", "none; everything runs on the host device"),
        Err(error) => {
            let mend =
                "install the NVIDIA driver (525 or newer); until then the host device computes";
            return Fact::poor("GPU", error.to_string(), mend);
        }
    };
    let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
    let link = link().map_or_else(String::new, |link| format!(", {link}"));
    let value = format!(
        "{}{link}, {} free of {}, compute capability {}.{}; driver for CUDA {}",
        found.name,
        Bytes(found.free_bytes),
        Bytes(found.total_bytes),
        found.capability.0,
        found.capability.1,
        version(found.driver)
    );
    if found.capability.0 < 8 {
        let mend = "kernels need compute capability 8.0 (Ampere); the host device computes";
        return Fact::poor("GPU", value, mend);
    }
    match cuda::libraries() {
        Ok(()) => {
            let libraries = cuda::versions().map_or_else(
                || "NVRTC and cuBLASLt found".to_owned(),
                |[nvrtc, blas]| format!("NVRTC {nvrtc}, cuBLASLt {blas}"),
            );
            Fact::good("GPU", format!("{value}; {libraries}"))
        }
        Err(error) => Fact::poor("GPU", value, error.to_string()),
    }
}

fn cpu() -> Fact {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let value = format!("{threads} threads, {:?}", Isa::best());
    match Isa::best() {
        Isa::Scalar => Fact::poor(
            "CPU",
            value,
            "a CPU with AVX2 updates parameters much faster",
        ),
        _ => Fact::good("CPU", value),
    }
}

fn memory_fact() -> Fact {
    let free = free_memory();
    let value = format!("{} really free (control groups included)", Bytes(free));
    if free < 256 << 20 {
        let mend = "stop other programs, or raise the container's memory limit";
        return Fact::poor("memory", value, mend);
    }
    Fact::good("memory", value)
}

fn memlock() -> Fact {
    let (limit, privileged) = memory::memlock();
    let wanted = default_budgets(own_target()).pinned_bytes;
    let mend = "ulimit -l unlimited; LimitMEMLOCK=infinity in a unit; --ulimit memlock=-1 for a \
                container";
    match limit {
        _ if privileged => Fact::good("memlock limit", "none for this user (CAP_IPC_LOCK)"),
        None => Fact::good("memlock limit", "unlimited"),
        Some(limit) if limit >= wanted => Fact::good("memlock limit", Bytes(limit).to_string()),
        Some(limit) => {
            let value = format!("{}: pinned memory will not be page-locked", Bytes(limit));
            Fact::poor("memlock limit", value, mend)
        }
    }
}

fn huge_pages() -> Fact {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    match memory::chosen(&text) {
        Some(mode @ ("always" | "madvise")) => Fact::good("huge pages", mode),
        Some(mode) => Fact::poor("huge pages", mode, format!("echo madvise > {path}")),
        None => Fact::poor(
            "huge pages",
            "this kernel has none",
            "a kernel with them is faster",
        ),
    }
}

fn uring() -> Fact {
    match probe::io_uring() {
        Ok(()) => Fact::good("io_uring", "works (a real read was done)"),
        Err(why) => {
            let mend = "sysctl kernel.io_uring_disabled=0; in a container a seccomp profile that \
                        allows it; until then a thread pool is used";
            Fact::poor("io_uring", why, mend)
        }
    }
}

fn disk(folder: &Path) -> [Fact; 3] {
    let name = |what: &str| format!("disk {what} {}", folder.display());
    let mend = "give --disk an existing, writable folder with room";
    let space = match probe::free_bytes(folder) {
        Ok(free) if free < 1 << 30 => Fact::poor(
            &name("space"),
            Bytes(free).to_string(),
            "free some, or give another --disk",
        ),
        Ok(free) => Fact::good(&name("space"), Bytes(free).to_string()),
        Err(error) => Fact::bad(&name("space"), error.to_string(), mend),
    };
    let speed = match probe::disk(folder, 64 << 20) {
        Ok(DiskRate {
            read_bytes_per_s,
            write_bytes_per_s,
        }) => {
            let (read, write) = (read_bytes_per_s / 1e9, write_bytes_per_s / 1e9);
            Fact::good(
                &name("speed"),
                format!("read {read:.2} GB/s, write {write:.2} GB/s"),
            )
        }
        Err(error) => Fact::bad(&name("speed"), error.to_string(), mend),
    };
    let tuning = match Profile::of(folder) {
        Some(profile) => Fact::good(
            &name("tuning"),
            format!(
                "requests of {}, {} at once",
                Bytes(u64::from(profile.block)),
                profile.depth
            ),
        ),
        None => Fact::poor(
            &name("tuning"),
            "not measured: requests of 1 MiB, 32 at once",
            format!("forebay bench nvme --disk {}", folder.display()),
        ),
    };
    [space, speed, tuning]
}
