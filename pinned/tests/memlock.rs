//! What happens when the system does not let memory be locked. In a process of its own, for its
//! limit is lowered and its privilege dropped.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt;
use std::process::Command;

use forebay_pinned::{Arena, Lock};

const CHILD: &str = "FOREBAY_TEST_MEMLOCK_CHILD";
const LIMIT: u64 = 64 << 10;

#[test]
fn a_refused_lock_is_reported_with_the_limit_and_the_arena_still_works() {
    if std::env::var_os(CHILD).is_some() {
        let arena = Arena::new(8 << 20).unwrap();
        let refused = Lock::Refused {
            wanted_bytes: 8 << 20,
            limit_bytes: LIMIT,
        };
        assert_eq!(*arena.lock(), refused);
        assert!(arena.lock().to_string().contains("ulimit -l 8192"));
        arena.lease(8 << 20).unwrap().fill(1);
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .env(CHILD, "1")
        .args(["--exact", "--nocapture"])
        .arg("a_refused_lock_is_reported_with_the_limit_and_the_arena_still_works");
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        child.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: LIMIT,
                rlim_max: LIMIT,
            };
            if libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Root ignores the limit until its privilege to lock memory is gone.
            const CAP_IPC_LOCK: libc::c_ulong = 14;
            libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0);
            if libc::geteuid() == 0 && libc::setuid(65534) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    assert!(child.status().unwrap().success());
}

#[test]
fn as_root_the_arena_is_locked_and_the_kernel_agrees() {
    let arena = Arena::new(4 << 20).unwrap();
    if *arena.lock() != Lock::Locked {
        eprintln!("not run: {}", arena.lock());
        return;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let locked = status
        .lines()
        .find_map(|l| l.strip_prefix("VmLck:"))
        .unwrap();
    let kib: u64 = locked
        .trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .unwrap();
    assert!(kib >= 4096, "{kib} KiB locked");
}
