//! `forebay bench pcie`: the link between pinned memory and the device, and the way there from a disk.

use std::path::PathBuf;

use forebay::bench::Duel;
use forebay::bench::pcie::{Chain, Outcome, Plan, Report, Way, run};
use forebay::{Bytes, DeviceChoice};
use serde_json::json;

use super::{array, interval, with_progress};

/// The link to the device: copies as the engine makes them, and bare ones, in turn. With a disk also the
/// way from there to the device
#[derive(clap::Args, Debug)]
pub(crate) struct Pcie {
    /// auto, host or cuda. On the host device the link is copies of memory
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Bytes of a copy, as many copies queued at once as take 40 ms; what does not fit into free memory is
    /// left out
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,256MiB,1GiB"
    )]
    sizes: Vec<Bytes>,
    /// Rounds of each size and way: three slices each
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    rounds: u32,
    /// A folder on a disk: measures verified reads that go on to the device, too
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Bytes of the file there (about 1.2 times as much is needed for the time of the run)
    #[arg(long, default_value = "2GiB", requires = "disk")]
    disk_size: Bytes,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Pcie {
    pub(super) fn run(&self) -> Result<(), String> {
        for size in &self.sizes {
            if size.0 < 4096 || !size.0.is_multiple_of(4096) {
                return Err(format!("--sizes {size}: give multiples of 4KiB"));
            }
        }
        if self.disk_size.0 < 512 << 20 {
            return Err(format!(
                "--disk-size {}: give at least 512MiB",
                self.disk_size
            ));
        }
        let plan = Plan {
            device: self.device,
            sizes: self.sizes.iter().map(|s| s.0).collect(),
            rounds: self.rounds,
            disk: self.disk.clone(),
            disk_bytes: self.disk_size.0,
        };
        let report = with_progress(|progress| run(&plan, progress));
        let report = report.map_err(|error| error.to_string())?;
        if self.json {
            println!("{}", object(&report, self.rounds));
        } else {
            table(&report, self.rounds);
        }
        Ok(())
    }
}

fn word(way: Way) -> &'static str {
    match way {
        Way::H2d => "H2D",
        Way::D2h => "D2H",
        Way::Both => "both",
    }
}

/// What the link is.
fn link(report: &Report) -> String {
    match &report.link {
        Some(link) => link.to_string(),
        None if report.memory_copies => "copies of memory, by a thread each way".to_owned(),
        None => "a link that the system does not describe".to_owned(),
    }
}

/// Whether a target is met: the interval reaches it.
fn met(duel: &Duel, target: f64) -> bool {
    duel.ratio.high >= target
}

fn verdict(duel: &Duel, target: Option<f64>) -> String {
    target.map_or_else(String::new, |target| {
        let word = if met(duel, target) { "met" } else { "missed" };
        format!("{target:.2} {word}")
    })
}

fn row(name: &str, way: &str, duel: &Duel, target: Option<f64>) {
    println!(
        "{name:>9} {way:<5} {:>7.2} {:>7.2}  {:<24} {:<24} {:<11} {:>5.3} {:>5.3}",
        duel.bare_bytes_per_s / 1e9,
        duel.ours_bytes_per_s / 1e9,
        interval(&duel.ratio),
        interval(&duel.control),
        verdict(duel, target),
        duel.bare_cpu_s_per_gb,
        duel.ours_cpu_s_per_gb
    );
}

fn table(report: &Report, rounds: u32) {
    println!("{}: {}", report.device, link(report));
    println!(
        "{rounds} rounds; copies go round in {} each way; pinned memory is {}",
        Bytes(report.window),
        report.pinned
    );
    println!(
        "{:>9} {:<5} {:>7} {:>7}  {:<24} {:<24} {:<11} {:>11}",
        "copies of",
        "",
        "bare",
        "ours",
        "ours / bare (95 %)",
        "bare / bare (95 %)",
        "target",
        "CPU s per GB"
    );
    println!(
        "{:>9} {:<5} {:>7} {:>7}  {:<24} {:<24} {:<11} {:>5} {:>5}",
        "", "", "GB/s", "GB/s", "", "", "", "bare", "ours"
    );
    for o in &report.outcomes {
        let size = Bytes(o.size).to_string();
        row(&size, word(o.way), &o.duel, o.target);
    }
    for size in &report.left_out {
        println!("{:>9} left out: it does not fit", Bytes(*size).to_string());
    }
    if let Some(chain) = &report.chain {
        println!(
            "disk to device ({}): bare reads {:.2} GB/s, bare H2D {:.2} GB/s; extents of 4 MiB, verified, \
             beside the slower of the two:",
            chain.io,
            chain.disk_bytes_per_s / 1e9,
            chain.link_bytes_per_s / 1e9
        );
        row("disk", "H2D", &chain.duel, Some(chain.target));
    }
}

fn duel(duel: &Duel, target: Option<f64>) -> serde_json::Value {
    json!({
        "bare_bytes_per_s": duel.bare_bytes_per_s,
        "ours_bytes_per_s": duel.ours_bytes_per_s,
        "ratio": array(&duel.ratio),
        "control": array(&duel.control),
        "bare_cpu_s_per_gb": duel.bare_cpu_s_per_gb,
        "ours_cpu_s_per_gb": duel.ours_cpu_s_per_gb,
        "target": target,
        "met": target.map(|t| met(duel, t)),
    })
}

fn object(report: &Report, rounds: u32) -> serde_json::Value {
    let outcome = |o: &Outcome| {
        json!({
            "size": o.size,
            "way": word(o.way).to_lowercase(),
            "copies": o.copies,
            "found": duel(&o.duel, o.target),
        })
    };
    let chain = |c: &Chain| {
        json!({
            "io": c.io,
            "bare_disk_bytes_per_s": c.disk_bytes_per_s,
            "bare_h2d_bytes_per_s": c.link_bytes_per_s,
            "found": duel(&c.duel, Some(c.target)),
        })
    };
    json!({
        "device": report.device,
        "link": link(report),
        "memory_copies": report.memory_copies,
        "pinned": report.pinned,
        "window": report.window,
        "rounds": rounds,
        "outcomes": report.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "left_out": report.left_out,
        "disk": report.chain.as_ref().map(chain),
    })
}
