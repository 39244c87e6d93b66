//! Budgets as seen from outside the process's own books, and a steady step in which the runtime
//! allocates nothing. One test, in a process of its own: it counts every allocation and all memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Accumulate, create, decoder, options, with_budgets};
use forebay::{
    Ahead, DynamicScale, Init, LossScale, Model, Options, Pass, Policy, RandomInit, Section,
    SectionId, Stage, StageId, Step, Trainer, Updates,
};
use forebay_decoder::{Config, Decoder};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract, passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A line of /proc/self/status, in bytes.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .parse::<u64>()
        .unwrap()
        * 1024
}

#[test]
fn budgets_hold_from_outside_and_in_a_steady_step_the_runtime_allocates_nothing() {
    for placement in [Policy::Auto, Policy::Disk, Policy::Resident] {
        let folder = tempfile::tempdir().unwrap();
        let decoder = decoder();
        let mut options = options(folder.path());
        // A GPU's driver takes memory of its own, which no budget of ours covers.
        options.device = forebay::DeviceChoice::Host;
        (options.placement, options.threads) = (placement, 2);
        let options = with_budgets(options, &decoder);
        let (resident, locked) = (status("VmRSS"), status("VmLck"));
        let mut trainer = create(&decoder, &options);
        common::train(&mut trainer, &decoder, 10);
        for tier in &trainer.report().tiers {
            assert!(
                tier.peak_bytes <= tier.budget_bytes,
                "{placement:?}: {tier:?}"
            );
        }
        let budgets = options.device_budget.unwrap() + options.pinned_budget.unwrap();
        // Threads' stacks, the matrix product's packing buffers, the allocator's own.
        let slack = 24 << 20;
        let grown = status("VmRSS").saturating_sub(resident);
        assert!(
            grown <= budgets + slack,
            "{placement:?}: {grown} resident for {budgets}"
        );
        let grown = status("VmLck").saturating_sub(locked);
        assert!(
            grown <= options.pinned_budget.unwrap(),
            "{placement:?}: {grown} locked"
        );
    }
    let exact = Updates::Exact;
    for (placement, clip, updates) in [
        (Policy::Auto, None, exact),
        (Policy::Disk, Some(1.0), exact),
        // Updates run ahead of the norm, and stand, or are undone in every step.
        (Policy::Pinned, Some(1e9), exact),
        (Policy::Pinned, Some(1e-9), exact),
        (Policy::Pinned, Some(1e-9), Updates::Delayed),
        (Policy::Disk, Some(1.0), Updates::Delayed),
    ] {
        assert_eq!(
            steady_allocations(placement, clip, updates),
            0,
            "{placement:?}, clip {clip:?}, {updates:?}"
        );
    }
    nothing_is_in_memory_twice();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(std::hint::black_box(vec![1u8; 100]));
    assert!(
        ALLOCATIONS.load(Ordering::Relaxed) > before,
        "the counter counts"
    );
}

/// A model of 20 M parameters is made, published and resumed in little more memory than its budgets, and the
/// masters of one section.
fn nothing_is_in_memory_twice() {
    let config = Config {
        hidden: 512,
        intermediate: 1376,
        layers: 6,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 256,
        ..common::config()
    };
    let decoder = Decoder::new(config, 1, 16).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.device = forebay::DeviceChoice::Host;
    options.threads = 2;
    options.placement = Policy::Pinned;
    options.optimizer_chunk = None;
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let needs =
        |options: &Options| forebay::requirements(decoder.model(), footprint, options).unwrap();
    let least = Options {
        placement: Policy::Disk,
        ..options.clone()
    };
    options.device_budget = Some(needs(&least).device_bytes);
    let needs = needs(&options);
    options.pinned_budget = Some(needs.pinned_bytes);
    let sections = decoder.model().sections().iter();
    let masters = sections.map(|s| 4 * s.parameters()).max().unwrap();
    let states = 12 * decoder.model().parameters();
    let slack = needs.device_bytes + masters + (24 << 20);
    let most = needs.pinned_bytes + slack;
    assert!(states > 2 * slack, "it would show: {states}, {slack}");
    let before = status("VmRSS");
    let peak = |what: &str| {
        let grown = status("VmHWM").saturating_sub(before);
        assert!(grown <= most, "{what}: {grown} resident for {most}");
    };
    // The highest so far is forgotten.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let mut trainer = create(&decoder, &options);
    peak("made");
    trainer.publish("").unwrap();
    peak("published");
    drop(trainer);
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    drop(common::resume(&decoder, &options));
    peak("resumed");
}

const LAYERS: u32 = 12;
const WIDTH: usize = 96;

/// A step in which every section is used twice, with a checkpoint and a gradient each.
fn walk(step: &Step<'_>) -> forebay::Result<()> {
    let frame = step.frame();
    let mut x = frame.tensor([WIDTH, WIDTH])?;
    step.upload(&[1, 2, 3], [3])?;
    for layer in 0..LAYERS {
        let lease = step.enter(StageId::from(layer))?;
        lease.save(&x.as_ref())?;
        step.launch(
            Accumulate,
            &[lease.param(SectionId(layer), "w")?],
            &[x.reborrow()],
        )?;
    }
    step.loss(&x.as_ref().rows(0, 1)?.reshape([WIDTH])?.rows(0, 1)?)?;
    // Its gradients stand for whatever was multiplied by it.
    step.loss_scale()?;
    for layer in (0..LAYERS).rev() {
        let lease = step.enter(StageId::from(2 * LAYERS - 1 - layer))?;
        let grad = lease.grad(SectionId(layer), "w")?;
        step.launch(Accumulate, &[lease.param(SectionId(layer), "w")?], &[grad])?;
    }
    Ok(())
}

fn steady_allocations(placement: Policy, clip: Option<f64>, updates: Updates) -> u64 {
    let mut model = Model::new("accumulate");
    for layer in 0..LAYERS {
        let normal = Init::Normal(1e-3);
        let section = Section::new(format!("{layer}")).tensor("w", [WIDTH, WIDTH], normal);
        let id = model.section(section);
        model.train_stage(
            Stage::new(format!("{layer}"))
                .params([id])
                .saves([WIDTH, WIDTH]),
        );
    }
    for layer in (0..LAYERS).rev() {
        let stage = Stage::new(format!("{layer} backward"));
        let id = SectionId(layer);
        model.train_stage(
            stage
                .params([id])
                .grads([id])
                .restores(StageId::from(layer)),
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let mut options = Options::new([folder.path().to_owned()]);
    // Its operation has no other version.
    options.device = forebay::DeviceChoice::Host;
    (options.placement, options.clip, options.threads) = (placement, clip, 2);
    options.updates = updates;
    options.optimizer_chunk = Some(4096);
    options.loss_scale = LossScale::Dynamic(DynamicScale::default());
    let pinned = if placement == Policy::Pinned {
        options.ahead = match updates {
            Updates::Exact => Ahead::Always,
            Updates::Delayed => Ahead::Auto,
        };
        4000 << 10
    } else {
        1600 << 10
    };
    (options.device_budget, options.pinned_budget) = (Some(600 << 10), Some(pinned));
    let footprint = forebay::footprint(
        &model,
        Pass::Train,
        forebay::Target::Host { threads: 2 },
        walk,
    )
    .unwrap();
    let mut seed = RandomInit { seed: 1 };
    let mut trainer = Trainer::create(model, footprint, &options, &mut seed).unwrap();
    let mut start = 0;
    for step in 0..40 {
        if step == 10 {
            trainer.settle().unwrap();
            start = ALLOCATIONS.load(Ordering::Relaxed);
        }
        let step = trainer.begin(1e-3).unwrap();
        walk(&step).unwrap();
        step.finish().unwrap();
    }
    trainer.settle().unwrap();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - start;
    let report = trainer.report();
    let ahead = (report.ahead.steps, report.ahead.undone);
    if placement == Policy::Pinned {
        let undone = if clip == Some(1e9) { 0 } else { 40 };
        let delayed = updates == Updates::Delayed;
        assert_eq!(ahead, if delayed { (0, 0) } else { (40, undone) });
    }
    let hops = match placement {
        Policy::Pinned => &report.hops[..2],
        _ => &report.hops[..],
    };
    assert!(
        hops.iter().all(|h| h.bytes > 0),
        "all hops were used: {report:?}"
    );
    allocations
}
