//! `forebay bench kernels`: what each kernel of a GPU takes, beside the device's ceilings.

use forebay::bench::kernels::{Report, Row, Shapes, Work, run};
use serde_json::json;

use super::with_progress;

/// The kernels of a training step on a GPU, beside the device's ceilings: time, rate, and share of a step.
/// The shapes are those of a Llama of 1.3 B parameters unless others are given
#[derive(clap::Args, Debug)]
pub(crate) struct Kernels {
    /// Elements of a token's state
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Heads of attention
    #[arg(long, default_value_t = 16)]
    heads: usize,
    /// Elements inside a feed-forward layer
    #[arg(long, default_value_t = 5504)]
    ffn: usize,
    /// Token ids
    #[arg(long, default_value_t = 50304)]
    vocabulary: usize,
    /// Layers, for the shares of a step
    #[arg(long, default_value_t = 24)]
    layers: usize,
    /// Tokens of a step
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 1024)]
    seq: usize,
    /// Counts the optimizer to a step, as where its states stay on the device
    #[arg(long)]
    resident: bool,
    /// Launches of each kernel that are timed
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    launches: u32,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Kernels {
    pub(super) fn run(&self) -> Result<(), String> {
        let shapes = Shapes {
            hidden: self.hidden,
            heads: self.heads,
            ffn: self.ffn,
            vocabulary: self.vocabulary,
            layers: self.layers,
            tokens: self.tokens,
            seq: self.seq,
            resident: self.resident,
        };
        let report = with_progress(|progress| run(shapes, self.launches, progress));
        let report = report.map_err(|error| error.to_string())?;
        if self.json {
            println!("{}", object(&report));
        } else {
            table(&report, self.launches);
        }
        Ok(())
    }
}

fn table(report: &Report, launches: u32) {
    let ([copy, copy_after], [product, product_after]) =
        (report.copy_bytes_per_s, report.product_flops);
    println!(
        "{}: copy {:.0} and {:.0} GB/s (read and write counted), product of 8192 cubed {:.0} and {:.0} \
         TFLOP/s in bf16, before and after",
        report.device,
        copy / 1e9,
        copy_after / 1e9,
        product / 1e12,
        product_after / 1e12
    );
    println!(
        "median of {launches} launches on random data that is in no cache; operations in bf16"
    );
    println!(
        "{:<18} {:<34} {:>9} {:>14} {:>8} {:>6} {:>7}",
        "", "", "us", "", "ceiling", "a step", "share"
    );
    for row in &report.rows {
        let (share, launches) = match row.launches {
            0 => (String::new(), "-".to_owned()),
            n => (format!("{:.1} %", 100.0 * row.share), n.to_string()),
        };
        println!(
            "{:<18} {:<34} {:>9.1} {:>14} {:>8.3} {:>6} {:>7}",
            row.name,
            row.shape,
            row.seconds * 1e6,
            rate(row),
            row.ratio,
            launches,
            share
        );
    }
    println!(
        "kernels of a step with recomputation, one after the other: {:.1} ms",
        report.step_seconds * 1e3
    );
}

fn rate(row: &Row) -> String {
    match row.work {
        Work::Bytes(bytes) => format!("{:.0} GB/s", bytes / row.seconds / 1e9),
        Work::Flops(flops) => format!("{:.1} TFLOP/s", flops / row.seconds / 1e12),
    }
}

fn object(report: &Report) -> serde_json::Value {
    let row = |row: &Row| {
        let (bytes, flops) = match row.work {
            Work::Bytes(bytes) => (Some(bytes), None),
            Work::Flops(flops) => (None, Some(flops)),
        };
        json!({
            "name": row.name,
            "shape": row.shape,
            "seconds": row.seconds,
            "bytes": bytes,
            "flops": flops,
            "ratio": row.ratio,
            "launches": row.launches,
            "share": row.share,
        })
    };
    json!({
        "device": report.device,
        "copy_bytes_per_s": report.copy_bytes_per_s,
        "product_flops": report.product_flops,
        "rows": report.rows.iter().map(row).collect::<Vec<_>>(),
        "step_seconds": report.step_seconds,
    })
}
