//! Memory and its limits, as Linux tells them.

use std::path::Path;

/// Free memory of the system whose file tree starts at `root`.
pub(super) fn free(root: &Path) -> u64 {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let available = read("proc/meminfo")
        .as_deref()
        .and_then(available)
        .unwrap_or(0);
    let groups = read("proc/self/cgroup").unwrap_or_default();
    control_groups(&groups)
        .filter_map(|group| match group {
            Group::V2(path) => room(&read, &path, "memory.max", "memory.current"),
            Group::V1(path) => room(
                &read,
                &path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
        })
        .fold(available, u64::min)
}

/// `MemAvailable`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A control group that may limit memory, by its folder under the root.
enum Group {
    V1(String),
    V2(String),
}

/// The groups of `/proc/self/cgroup` and all their parents.
fn control_groups(text: &str) -> impl Iterator<Item = Group> {
    text.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next(), fields.next(), fields.next());
        let kind = match controllers {
            Some("") => Some(true),
            Some(list) if list.split(',').any(|c| c == "memory") => Some(false),
            _ => None,
        };
        let path = path.unwrap_or("/").trim_matches('/').to_owned();
        kind.into_iter().flat_map(move |v2| {
            let parents: Vec<String> = std::iter::once(String::new())
                .chain(path.match_indices('/').map(|(at, _)| path[..at].to_owned()))
                .chain((!path.is_empty()).then(|| path.clone()))
                .collect();
            parents.into_iter().map(move |parent| {
                if v2 {
                    Group::V2(format!("sys/fs/cgroup/{parent}"))
                } else {
                    Group::V1(format!("sys/fs/cgroup/memory/{parent}"))
                }
            })
        })
    })
}

/// What a group's limit leaves; `None` where there is no limit.
fn room(
    read: &impl Fn(&str) -> Option<String>,
    group: &str,
    limit: &str,
    usage: &str,
) -> Option<u64> {
    let number = |name: &str| read(&format!("{group}/{name}"))?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    Some(number(limit)?.saturating_sub(number(usage).unwrap_or(0)))
}

/// The memlock limit (`None`: unlimited), and whether this process may ignore it.
pub(super) fn memlock() -> (Option<u64>, bool) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes one rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let unlimited = limit.rlim_cur == libc::RLIM_INFINITY;
    ((!unlimited).then_some(limit.rlim_cur), may_lock(&status))
}

/// `VmHWM` of `/proc/self/status`.
pub(super) fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// Whether `CAP_IPC_LOCK` is among the effective capabilities of `/proc/self/status`.
fn may_lock(status: &str) -> bool {
    const IPC_LOCK: u64 = 1 << 14;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
        .is_some_and(|c| c & IPC_LOCK != 0)
}

/// The word in brackets of a `always [madvise] never` file.
pub(super) fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?
        .1
        .split_once(']')
        .map(|(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 64000000 kB\nMemFree: 10 kB\nMemAvailable:   1000000 kB\n",
    );

    #[test]
    fn without_limits_it_is_what_the_system_has_available() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
        ]);
        assert_eq!(free(root.path()), 1_024_000_000);
        assert_eq!(free(tree(&[MEMINFO]).path()), 1_024_000_000);
    }

    #[test]
    fn a_limit_anywhere_on_the_path_counts() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "500000000\n"),
            ("sys/fs/cgroup/a/memory.current", "100000000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "800000000\n"),
            ("sys/fs/cgroup/a/b/memory.current", "100000000\n"),
        ]);
        assert_eq!(free(root.path()), 400_000_000);
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/docker/1\n"),
            (
                "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes",
                "9000000\n",
            ),
            (
                "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes",
                "10000000\n",
            ),
        ]);
        assert_eq!(free(root.path()), 0, "used beyond its limit");
    }

    #[test]
    fn capabilities_and_choices_are_read() {
        assert!(may_lock("Name: x\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_lock("CapEff:\t0000000000000000\n") && !may_lock(""));
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }
}
