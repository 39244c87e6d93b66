//! `forebay bench adam`: the CPU's AdamW beside its memory.

use forebay::bench::adam::{BYTES, Bind, Outcome, Plan, Report, run};
use serde_json::json;

use super::{array, interval, with_progress};

/// The CPU's AdamW, bf16 in and out, beside bare threads that go over the same memory (28 bytes a parameter)
#[derive(clap::Args, Debug)]
pub(crate) struct Adam {
    /// Parameters, in millions
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 134, 1000])]
    millions: Vec<u64>,
    /// Threads [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Bind the threads to a CPU each: off, on (those of the bare pass too), or both: free as with off, and then
    /// ours bound beside ours free
    #[arg(long, default_value = "off")]
    bind: Bind,
    /// Rounds of each size: three slices of at least 50 ms
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    rounds: u32,
    /// Log what is overwritten, as updates do that run ahead of the gradient's norm: 3 to 4 bytes more, which
    /// the ceiling does not move
    #[arg(long)]
    ahead: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Adam {
    pub(super) fn run(&self) -> Result<(), String> {
        if let Some(odd) = self.millions.iter().find(|m| !(1..=1_000_000).contains(*m)) {
            return Err(format!("--millions {odd}: give from 1 to 1000000"));
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let plan = Plan {
            sizes: self.millions.iter().map(|m| m * 1_000_000).collect(),
            threads: self.threads.map_or_else(cores, |threads| threads as usize),
            bind: self.bind,
            rounds: self.rounds,
            ahead: self.ahead,
        };
        let report = with_progress(|progress| run(&plan, progress));
        let report = report.map_err(|error| error.to_string())?;
        if self.json {
            println!("{}", object(&report));
        } else {
            table(&report, self.rounds);
        }
        Ok(())
    }
}

fn parameters(bytes_per_s: f64) -> f64 {
    bytes_per_s / BYTES as f64 / 1e9
}

fn table(report: &Report, rounds: u32) {
    let (isa, threads) = (&report.isa, report.threads);
    let beside = match report.outcomes.iter().any(|o| o.bound.is_some()) {
        true => "free beside ",
        false => "",
    };
    println!(
        "{isa}, {threads} threads, {beside}{}; {rounds} rounds; memory: {}",
        report.binding, report.memory
    );
    println!(
        "{:>12} {:>16} {:>16}  {:<24} {:<24} {:>12}",
        "parameters",
        "bare Gparam/s",
        "ours Gparam/s",
        "ours / bare (95 %)",
        "bare / bare (95 %)",
        "bare GB/s"
    );
    for Outcome {
        size,
        streams,
        duel,
        bound,
    } in &report.outcomes
    {
        println!(
            "{size:>12} {:>16.3} {:>16.3}  {:<24} {:<24} {:>12.1}{}",
            parameters(duel.bare_bytes_per_s),
            parameters(duel.ours_bytes_per_s),
            interval(&duel.ratio),
            interval(&duel.control),
            duel.bare_bytes_per_s / 1e9,
            if *streams {
                ", parameters past the caches"
            } else {
                ""
            }
        );
        if let Some(bound) = bound {
            println!(
                "{:>12} {:>16.3} {:>16.3}  {:<24} {:<24}",
                "free, bound",
                parameters(bound.bare_bytes_per_s),
                parameters(bound.ours_bytes_per_s),
                interval(&bound.ratio),
                interval(&bound.control),
            );
        }
    }
    for size in &report.left_out {
        println!("{size:>12} does not fit into half of the free memory");
    }
}

fn object(report: &Report) -> serde_json::Value {
    let outcome = |o: &Outcome| {
        json!({
            "parameters": o.size,
            "bare_params_per_s": o.duel.bare_bytes_per_s / BYTES as f64,
            "ours_params_per_s": o.duel.ours_bytes_per_s / BYTES as f64,
            "bare_bytes_per_s": o.duel.bare_bytes_per_s,
            "ours_bytes_per_s": o.duel.ours_bytes_per_s,
            "ratio": array(&o.duel.ratio),
            "control": array(&o.duel.control),
            "bare_past_caches": o.streams,
            "bound_to_free": o.bound.as_ref().map(|bound| array(&bound.ratio)),
            "free_to_free": o.bound.as_ref().map(|bound| array(&bound.control)),
        })
    };
    json!({
        "isa": report.isa,
        "threads": report.threads,
        "binding": report.binding,
        "memory": report.memory,
        "outcomes": report.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "left_out": report.left_out,
    })
}
