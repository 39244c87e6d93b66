//! `forebay bench nvme`: a disk, bare and through the store.

use std::path::{Path, PathBuf};
use std::process::Command;

use forebay::Bytes;
use forebay::nvme::bench::{Outcome, Percentiles, Plan, Report, block_fits, run};
use serde_json::json;

use super::{array, interval, with_progress};

/// A disk: bare io_uring, and the store with checksums verified, in turn on the same file. Finds the
/// fastest block and depth and keeps them for the stores on that disk
#[derive(clap::Args, Debug)]
pub(crate) struct Nvme {
    /// A folder on the disk
    #[arg(long, default_value = ".")]
    disk: PathBuf,
    /// Bytes of the file (about 1.2 times as much is needed for the time of the run)
    #[arg(long, default_value = "4GiB")]
    size: Bytes,
    /// Bytes of a request, a multiple of 256KiB [default: the fastest]
    #[arg(long)]
    block: Option<Bytes>,
    /// Requests under way at once [default: the fastest]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    depth: Option<u32>,
    /// Reads to writes of the mixed slices
    #[arg(long, default_value = "1:1", value_parser = mix)]
    mix: (u32, u32),
    /// Rounds of each kind: three slices of 128 MiB each
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    rounds: u32,
    /// A kernel thread that takes requests, where it works
    #[arg(long)]
    sqpoll: bool,
    /// Completions by polling, where the device can
    #[arg(long)]
    iopoll: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

fn mix(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once(':');
    let parsed = parts.and_then(|(r, w)| Some((r.parse().ok()?, w.parse().ok()?)));
    match parsed {
        Some((reads, writes)) if reads + writes > 0 && reads < 1000 && writes < 1000 => {
            Ok((reads, writes))
        }
        _ => Err(format!(
            "'{text}' is not a mix: use READS:WRITES, as 1:1 or 3:1"
        )),
    }
}

impl Nvme {
    pub(super) fn run(&self) -> Result<(), String> {
        let block = match self.block {
            None => None,
            Some(b) if block_fits(b.0) => Some(b.0 as u32),
            Some(b) => {
                return Err(format!(
                    "--block {b}: give 256KiB, 512KiB, 1MiB, 2MiB or 4MiB"
                ));
            }
        };
        if let (Some(block), Some(depth)) = (block, self.depth)
            && u64::from(block) * u64::from(depth) > forebay::nvme::bench::SLICE
        {
            return Err("--block times --depth: at most 128MiB can be under way".to_owned());
        }
        if self.size.0 < 256 << 20 {
            return Err(format!("--size {}: give at least 256MiB", self.size));
        }
        let plan = Plan {
            folder: self.disk.clone(),
            size: self.size.0,
            block,
            depth: self.depth,
            mix: self.mix,
            rounds: self.rounds,
            sqpoll: self.sqpoll,
            iopoll: self.iopoll,
        };
        let report = with_progress(|progress| run(&plan, progress));
        let report = report.map_err(|error| error.to_string())?;
        let fio = fio(&self.disk, &report, self.mix);
        if self.json {
            println!("{}", object(&report, fio.as_deref()));
        } else {
            table(&report, self, fio.as_deref());
        }
        Ok(())
    }
}

fn table(report: &Report, nvme: &Nvme, fio: Option<&[f64]>) {
    for t in &report.trials {
        println!(
            "tried blocks of {:>5} KiB, depth {:>3}: read {:.2}, write {:.2} GB/s",
            t.block >> 10,
            t.depth,
            t.read_bytes_per_s / 1e9,
            t.write_bytes_per_s / 1e9
        );
    }
    println!(
        "{}; blocks of {} KiB, depth {}; {} rounds of 128 MiB slices in {}",
        report.io,
        report.block >> 10,
        report.depth,
        nvme.rounds,
        nvme.disk.display()
    );
    if let Some(path) = &report.profile {
        println!("kept for stores on this disk: {}", path.display());
    }
    println!(
        "{:<6} {:>7} {:>7}  {:<24} {:<24} {:>6} {:>6}",
        "", "bare", "store", "store / bare (95 %)", "bare / bare (95 %)", "bare", "store"
    );
    println!(
        "{:<6} {:>7} {:>7}  {:<24} {:<24} {:>13}",
        "", "GB/s", "GB/s", "", "", "CPU s per GB"
    );
    for o in &report.outcomes {
        println!(
            "{:<6} {:>7.2} {:>7.2}  {:<24} {:<24} {:>6.3} {:>6.3}",
            format!("{:?}", o.kind).to_lowercase(),
            o.bare_bytes_per_s / 1e9,
            o.store_bytes_per_s / 1e9,
            interval(&o.ratio),
            interval(&o.control),
            o.bare_cpu_s_per_gb,
            o.store_cpu_s_per_gb
        );
    }
    println!(
        "latency, ms (p50 / p99 / p99.9): bare by request, store by extent of 4 MiB, verified"
    );
    let ms = |p: &Percentiles| {
        let [a, b, c] = [p.p50, p.p99, p.p999].map(|d| d.as_secs_f64() * 1e3);
        format!("{a:.2} / {b:.2} / {c:.2}")
    };
    for o in &report.outcomes {
        println!(
            "{:<6} bare {:<24} store {}",
            format!("{:?}", o.kind).to_lowercase(),
            ms(&o.bare_latency),
            ms(&o.store_latency)
        );
    }
    match fio {
        Some([read, write, mixed]) => {
            println!(
                "fio, same block and depth: read {read:.2}, write {write:.2}, mixed {mixed:.2} GB/s"
            );
        }
        _ => println!("fio is not installed: no second opinion on the ceiling"),
    }
}

fn object(report: &Report, fio: Option<&[f64]>) -> serde_json::Value {
    let latency = |p: &Percentiles| json!([p.p50, p.p99, p.p999].map(|d| d.as_secs_f64()));
    let outcome = |o: &Outcome| {
        json!({
            "kind": format!("{:?}", o.kind).to_lowercase(),
            "bare_bytes_per_s": o.bare_bytes_per_s,
            "store_bytes_per_s": o.store_bytes_per_s,
            "ratio": array(&o.ratio),
            "control": array(&o.control),
            "bare_cpu_s_per_gb": o.bare_cpu_s_per_gb,
            "store_cpu_s_per_gb": o.store_cpu_s_per_gb,
            "bare_latency_s": latency(&o.bare_latency),
            "store_latency_s": latency(&o.store_latency),
        })
    };
    json!({
        "io": report.io,
        "block": report.block,
        "depth": report.depth,
        "profile": report.profile,
        "outcomes": report.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "fio_gb_per_s": fio,
    })
}

/// What fio reaches with the same block and depth, in GB/s, if it is installed.
fn fio(folder: &Path, report: &Report, mix: (u32, u32)) -> Option<Vec<f64>> {
    let file = folder.join(format!(".forebay-fio-{}", std::process::id()));
    let share = 100 * mix.0 / (mix.0 + mix.1);
    let run = |kind: &str| {
        let output = Command::new("fio")
            .args([
                "--name=forebay",
                "--direct=1",
                "--ioengine=io_uring",
                "--size=1G",
            ])
            .args(["--runtime=5", "--time_based", "--output-format=json"])
            .arg(format!("--filename={}", file.display()))
            .arg(format!("--rw={kind}"))
            .arg(format!("--rwmixread={share}"))
            .arg(format!("--bs={}", report.block))
            .arg(format!("--iodepth={}", report.depth))
            .output()
            .ok()?;
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let job = json.get("jobs")?.get(0)?;
        let rate = |way: &str| job.get(way)?.get("bw_bytes")?.as_f64();
        Some((rate("read")? + rate("write")?) / 1e9)
    };
    // Writing first makes the file real.
    let write = run("write");
    let rates = [run("read"), write, run("rw")];
    let _ = std::fs::remove_file(&file);
    rates.into_iter().collect()
}
