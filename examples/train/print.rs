//! What a run prints: a progress bar and a table for people, objects for programs.

use std::path::PathBuf;

use anyhow::Result;
use forebay::{Bound, Bytes, Ceilings, DType, Options, Report, Trainer, Updates};
use forebay_decoder::Decoder;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args::{Args, When};
use crate::data::Data;
use crate::run::{LAST, Moved};

pub(crate) struct Printer {
    bar: Option<ProgressBar>,
}

pub(crate) struct Summary<'s> {
    pub(crate) report: &'s Report,
    pub(crate) bound: Bound,
    pub(crate) ceilings: &'s Ceilings,
    pub(crate) parameters: u64,
    pub(crate) dtype: DType,
    pub(crate) checkpoint_every: usize,
    pub(crate) steps_done: u64,
    pub(crate) last_losses: f64,
    pub(crate) unigram: f64,
    pub(crate) held_out: f64,
    pub(crate) skipped: u64,
    pub(crate) loss_scale: Option<f64>,
    pub(crate) tbw: Option<Bytes>,
    pub(crate) moved: Moved,
    pub(crate) steps_here: u64,
    pub(crate) sample: Option<String>,
}

impl Printer {
    pub(crate) fn new(json: bool, steps: u64, done: u64) -> Self {
        if json {
            return Self { bar: None };
        }
        let bar = ProgressBar::new(steps).with_position(done);
        let style = "{bar:24} {pos}/{len} {msg} {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Self { bar: Some(bar) }
    }

    pub(crate) fn json(&self) -> bool {
        self.bar.is_none()
    }

    pub(crate) fn start(
        &self,
        trainer: &Trainer,
        decoder: &Decoder,
        data: &Data,
        options: &Options,
        args: &Args,
    ) -> Result<()> {
        if self.json() {
            return Ok(());
        }
        let report = trainer.report();
        let config = decoder.config();
        println!(
            "{:?} decoder: {:.2} M parameters in {}, {} layers of {} ({} from step {})",
            config.family,
            trainer.model().parameters() as f64 / 1e6,
            trainer.model().dtype(),
            config.layers,
            config.hidden,
            if trainer.steps() == 0 {
                "new,"
            } else {
                "resumed"
            },
            trainer.steps(),
        );
        println!(
            "data: {} files, {} to train on, {:.4} nats a byte without context",
            data.files,
            Bytes(data.train_bytes() as u64),
            data.unigram_entropy()
        );
        let [device, pinned, _] = &report.tiers;
        println!(
            "device: {}, budget {}; pinned memory: budget {}, {}",
            device_words(&report.device, args),
            Bytes(device.budget_bytes),
            Bytes(pinned.budget_bytes),
            report.lock
        );
        println!("the device has room for {}", report.keeps);
        if decoder.checkpoints_every() > 1 {
            println!(
                "checkpoints: the input of every {} layers; those between are computed again",
                decoder.checkpoints_every()
            );
        }
        println!(
            "disk: {} in {}, {}; placement {:?}, look-ahead {}",
            Bytes(report.tiers[2].peak_bytes),
            options.disk[0].display(),
            report.disk,
            options.placement,
            options.lookahead
        );
        println!("optimizer: {}", report.states);
        if report.updates != Updates::Exact {
            println!("updates: {}", report.updates);
        }
        if args.bind_threads {
            println!("the optimizer's threads: {}", report.threads);
        }
        println!("{}", publish_line(&report, args.when()?));
        Ok(())
    }

    pub(crate) fn step(
        &self,
        step: u64,
        loss: f32,
        tokens_per_s: f64,
        step_s: f64,
        trainer: &Trainer,
    ) {
        match &self.bar {
            Some(bar) => {
                let report = trainer.report();
                let compute: f64 = report.stage_s.iter().sum();
                let binds = if compute < 0.8 * report.step_s {
                    "memory traffic"
                } else {
                    "compute"
                };
                let scaled = trainer.loss_scale().map_or(String::new(), |scale| {
                    format!("  scale {scale}, {} skipped", trainer.skipped())
                });
                bar.set_message(format!(
                    "loss {loss:.4}{scaled}  {tokens_per_s:.0} tokens/s  bound by {binds}"
                ));
                bar.set_position(step + 1);
            }
            None => println!(
                "{}",
                json!({
                    "step": step,
                    "loss": loss,
                    "loss_bits": format!("{:08x}", loss.to_bits()),
                    "tokens_per_s": tokens_per_s,
                    "step_s": step_s,
                    "loss_scale": trainer.loss_scale(),
                    "skipped_steps": trainer.skipped(),
                })
            ),
        }
    }

    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
            println!();
        }
    }

    pub(crate) fn summary(&self, s: &Summary<'_>) {
        if self.json() {
            self.summary_json(s);
        } else {
            summary_table(s);
        }
    }

    fn summary_json(&self, s: &Summary<'_>) {
        let Report {
            tiers,
            hops,
            traffic,
            ..
        } = s.report;
        println!(
            "{}",
            json!({"summary": {
                "device": s.report.device,
                "threads": s.report.threads,
                "dtype": s.dtype.to_string(),
                "params": s.parameters,
                "steps": s.steps_done,
                "device_budget_bytes": tiers[0].budget_bytes,
                "device_peak_bytes": tiers[0].peak_bytes,
                "checkpoint_every": s.checkpoint_every,
                "device_keeps": {
                    "params": s.report.keeps.params,
                    "checkpoints": s.report.keeps.checkpoints,
                    "optim": s.report.keeps.optim,
                },
                "pinned_budget_bytes": tiers[1].budget_bytes,
                "pinned_peak_bytes": tiers[1].peak_bytes,
                "resident_peak_bytes": forebay::machine::peak_resident(),
                "disk_bytes": tiers[2].peak_bytes,
                "h2d_bytes": hops[0].bytes,
                "d2h_bytes": hops[1].bytes,
                "read_bytes": hops[2].bytes,
                "written_bytes": hops[3].bytes,
                "payload_read_bytes": s.report.disk_stats.payload_read_bytes,
                "payload_written_bytes": s.report.disk_stats.payload_written_bytes,
                "steps_payload_bytes": s.moved.payload,
                "steps_kernel_bytes": s.moved.kernel,
                "steps_here": s.steps_here,
                "publish_bytes": s.report.publish.bytes,
                "life_written_bytes": s.report.disk_stats.life.written_bytes,
                "step_read_bytes": traffic.disk_read,
                "step_written_bytes": traffic.disk_write,
                "step_states_bytes": traffic.disk_states,
                "step_s": s.report.step_s,
                "bound_s": s.bound.seconds,
                "bound_by": s.bound.by,
                "mean_loss_last": s.last_losses,
                "unigram_entropy": s.unigram,
                "held_out_loss": s.held_out,
                "skipped_steps": s.skipped,
                "optimizer": s.report.states,
                "updates": s.report.updates.to_string(),
                "loss_scale": s.loss_scale,
                "ahead_steps": s.report.ahead.steps,
                "undone_steps": s.report.ahead.undone,
            }})
        );
    }

    pub(crate) fn resume(&self, folders: &[PathBuf], whole: bool) {
        let flags: Vec<_> = folders
            .iter()
            .map(|f| format!("--disk {}", f.display()))
            .collect();
        let flags = flags.join(" ");
        self.note(&if whole {
            format!("states kept; to train further: --resume {flags} --steps N")
        } else {
            format!("stopped and published; to go on: --resume {flags}")
        });
    }

    /// A line for people, on standard error where standard output is for programs.
    pub(crate) fn note(&self, text: &str) {
        if self.json() {
            eprintln!("{text}")
        } else {
            println!("{text}")
        }
    }
}

/// The device, and why it is not a GPU where that was not ruled out.
fn device_words(device: &str, args: &Args) -> String {
    match args.device.fallback() {
        Some(why) => format!("{device}, for {why}"),
        None => device.to_owned(),
    }
}

/// What the choice of --publish costs, and what else there is.
fn publish_line(report: &Report, when: When) -> String {
    let [often, end, never] = report.publish.space.map(Bytes);
    let each = Bytes(report.publish.bytes);
    match when {
        When::Every(steps) => format!(
            "publish every {steps} steps: {often} of disk (end: {end}, never: {never}), each writes {each} \
             and a map; a crash loses at most {steps} steps"
        ),
        When::End => format!(
            "publish at the end: {end} of disk (every N: {often}), {each} written then; a crash before \
             loses the run"
        ),
        When::Never => format!(
            "publish never: {never} of disk (every N: {often}, end: {end}); NOT crash-safe, and nothing \
             survives the run"
        ),
    }
}

/// Bytes written: by step, in the store's life, and how long a disk lasts.
fn ledger(s: &Summary<'_>) {
    let (stats, traffic) = (&s.report.disk_stats, &s.report.traffic);
    let per = |bytes: u64| bytes as f64 / s.parameters.max(1) as f64;
    let counted = match s.moved.payload {
        0 => String::new(),
        payload => {
            let ratio = s.moved.kernel as f64 / payload as f64;
            format!(", the kernel counts {ratio:.3} x that")
        }
    };
    println!(
        "disk ledger: a step reads {} and writes {} ({:.2} + {:.2} bytes a parameter){counted}; in the \
         store's life {} written, {:.3} x the states",
        Bytes(traffic.disk_read),
        Bytes(traffic.disk_write),
        per(traffic.disk_read),
        per(traffic.disk_write),
        Bytes(stats.life.written_bytes),
        stats.life.written_bytes as f64 / stats.life.payload_written_bytes.max(1) as f64,
    );
    if let Some(tbw) = s.tbw {
        let left = tbw.0.saturating_sub(stats.life.written_bytes) as f64;
        let days = left * s.report.step_s / (traffic.disk_write.max(1) as f64 * 86_400.0);
        println!("a disk of {tbw} written lasts {days:.0} days of such steps");
    }
}

fn summary_table(s: &Summary<'_>) {
    let r = s.report;
    println!("{:<18} {:>12} {:>12}", "tier", "budget", "peak");
    for tier in &r.tiers {
        let (budget, peak) = (Bytes(tier.budget_bytes), Bytes(tier.peak_bytes));
        println!(
            "{:<18} {:>12} {:>12}",
            tier.name,
            budget.to_string(),
            peak.to_string()
        );
    }
    if let Some(peak) = forebay::machine::peak_resident() {
        println!(
            "{:<18} {:>12} {:>12}",
            "process",
            "",
            Bytes(peak).to_string()
        );
    }
    println!(
        "{:<18} {:>12} {:>12} {:>14}",
        "hop", "moved", "GB/s", "GB/s, bare"
    );
    let bare = [
        s.ceilings.h2d,
        s.ceilings.d2h,
        s.ceilings.disk_read,
        s.ceilings.disk_write,
    ];
    for (hop, bare) in r.hops.iter().zip(bare) {
        let rate = if hop.busy_s > 0.0 {
            hop.bytes as f64 / hop.busy_s / 1e9
        } else {
            0.0
        };
        let moved = Bytes(hop.bytes).to_string();
        println!(
            "{:<18} {moved:>12} {rate:>12.2} {:>14.2}",
            hop.name,
            bare / 1e9
        );
    }
    println!(
        "(reads and writes share the disk: each rate is over the time in which it did either)"
    );
    println!(
        "step {:.1} ms, bound {:.1} ms by {} ({:.2} x); compute {:.1}, link {:.1}, disk {:.1}, \
         optimizer {:.1} ms",
        r.step_s * 1e3,
        s.bound.seconds * 1e3,
        s.bound.by,
        r.step_s / s.bound.seconds.max(1e-9),
        s.bound.compute * 1e3,
        s.bound.link * 1e3,
        s.bound.disk * 1e3,
        s.bound.cpu * 1e3
    );
    if r.updates != Updates::Exact {
        println!("updates were {}", r.updates);
    }
    let ahead = r.ahead;
    if ahead.steps > 0 {
        println!(
            "updates ran ahead of the gradient's norm in {} of {} steps; {} of them were clipped or skipped \
             and done anew",
            ahead.steps, r.steps, ahead.undone
        );
    }
    ledger(s);
    let scaled = s.loss_scale.map_or(String::new(), |scale| {
        format!("; the next step's loss scale is {scale}")
    });
    println!("{} steps done, {} skipped{scaled}", s.steps_done, s.skipped);
    println!(
        "loss: mean of the last {LAST} steps {:.4}, held out {:.4}; single bytes {:.4}",
        s.last_losses, s.held_out, s.unigram
    );
    if let Some(sample) = &s.sample {
        println!("\na sample (the model goes on after the bar):\n{sample}\n");
    }
}
