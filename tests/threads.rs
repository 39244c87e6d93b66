//! The optimizer's threads bound to CPUs: they and no others are, and no bit depends on it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{create, decoder, options, train, with_budgets};

/// By name of a thread of this process: the CPUs that the kernel lets it run on.
fn allowed() -> BTreeMap<String, String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let each = tasks.filter_map(|task| {
        // It may have ended since.
        let text = std::fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().to_owned())
        };
        Some((field("Name:")?, field("Cpus_allowed_list:")?))
    });
    each.collect()
}

#[test]
fn bound_threads_of_the_optimizer_have_a_cpu_each_and_all_others_stay_free() {
    let decoder = decoder();
    let cpus = std::thread::available_parallelism().unwrap().get();
    let this = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
    let free = allowed()[this.trim()].clone();
    let mut losses = Vec::new();
    for (threads, bind) in [(cpus, true), (cpus, false), (cpus + 1, true)] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        (options.threads, options.bind_threads) = (threads, bind);
        let options = with_budgets(options, &decoder);
        let mut trainer = create(&decoder, &options);
        losses.push(train(&mut trainer, &decoder, 3));
        let said = trainer.report().threads;
        let of = allowed();
        let own = |name: &str| name == "fb-optimizer" || name.starts_with("fb-adam");
        let bound: Vec<_> = of
            .iter()
            .filter(|(name, _)| own(name))
            .map(|(_, cpus)| cpus)
            .collect();
        assert_eq!(bound.len(), threads, "{of:?}");
        if bind && threads == cpus && cpus > 1 {
            let mut each: Vec<usize> = bound.iter().map(|cpu| cpu.parse().unwrap()).collect();
            each.sort_unstable();
            each.dedup();
            assert_eq!(each.len(), cpus, "{of:?}");
            assert!(
                said.starts_with(&format!("{threads}, bound to CPUs ")),
                "{said}"
            );
        } else {
            assert!(bound.iter().all(|cpus| **cpus == free), "{of:?}");
            assert!(said.contains("not bound to CPUs"), "{said}");
            assert_eq!(
                said.contains(&format!("{} threads on {cpus} CPUs", cpus + 1)),
                bind,
                "{said}"
            );
        }
        let others = of.iter().filter(|(name, _)| !own(name));
        assert!(others.clone().count() > 2, "{of:?}");
        assert!(others.into_iter().all(|(_, cpus)| *cpus == free), "{of:?}");
    }
    assert!(
        losses.windows(2).all(|pair| pair[0] == pair[1]),
        "{losses:?}"
    );
}
