//! `forebay inspect`: what a store holds, and whether it is whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use forebay::Bytes;
use forebay::nvme::{Folders, Inspection, StateKind, inspect};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// List what a store holds: its generation, sections and sizes; --verify checks every byte
#[derive(clap::Args, Debug)]
pub(crate) struct Inspect {
    /// The folders of the store, in any order
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Read all of it and check it (nobody else may be using it)
    #[arg(long)]
    verify: bool,
    /// Terabytes that the disk is rated to endure (TBW), as 600TB: says how long that will last
    #[arg(long)]
    tbw: Option<Bytes>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<(), String> {
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("checked {bytes} at {bytes_per_sec}") {
            bar.set_style(style);
        }
        let verify = self.verify;
        let found = inspect(&self.paths, &Folders, verify, &mut |bytes| bar.inc(bytes));
        bar.finish_and_clear();
        let found = found.map_err(|error| error.to_string())?;
        if self.json {
            println!("{}", object(&found));
        } else {
            self.table(&found);
        }
        let damaged: Vec<_> = found.damaged().collect();
        match damaged.first() {
            None => Ok(()),
            Some(first) => Err(format!(
                "{} of {} extents are damaged, the first {:?} of section '{}', part {}; restore a \
                 snapshot, or start anew in another folder",
                damaged.len(),
                found.extents.len(),
                first.key.state,
                first.section,
                first.key.part
            )),
        }
    }

    fn table(&self, found: &Inspection) {
        let age = |seconds: u64| {
            let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs());
            format!("{:.1} h ago", now.saturating_sub(seconds) as f64 / 3600.0)
        };
        println!(
            "generation {} of '{}', published {}, store made {}",
            found.generation,
            found.model,
            age(found.published),
            age(found.created)
        );
        let files: u64 = found.file_bytes.iter().sum();
        let data: u64 = found.extents.iter().map(|e| e.bytes).sum();
        println!(
            "{} of states in {} extents, files of {} ({} of {} looked at){}",
            Bytes(data),
            found.extents.len(),
            Bytes(files),
            found.file_bytes.len(),
            found.files,
            match found.damaged_superblocks {
                0 => String::new(),
                n => format!("; {n} superblocks are damaged (a copy of each is whole)"),
            }
        );
        let ledger = &found.ledger;
        println!(
            "in its life: {} read, {} written for {} of states ({:.3} x), open for {:.1} h",
            Bytes(ledger.read_bytes),
            Bytes(ledger.written_bytes),
            Bytes(ledger.payload_written_bytes),
            ledger.written_bytes as f64 / ledger.payload_written_bytes.max(1) as f64,
            ledger.open_s / 3600.0
        );
        if let Some(tbw) = self.tbw {
            let left = tbw.0.saturating_sub(ledger.written_bytes) as f64;
            let pace = ledger.written_bytes as f64 / ledger.open_s.max(1e-9);
            println!(
                "a disk of {tbw} written lasts {:.0} days of such use",
                left / pace / 86_400.0
            );
        }
        println!();
        println!(
            "{:<24} {:<7} {:>5} {:>12} {:>12}  check",
            "section", "state", "parts", "bytes", "generations"
        );
        let mut rows: BTreeMap<(u32, StateKind), Row> = BTreeMap::new();
        for extent in &found.extents {
            let row = rows
                .entry((extent.key.section, extent.key.state))
                .or_default();
            row.name.clone_from(&extent.section);
            row.parts += 1;
            row.bytes += extent.bytes;
            row.first = row.first.min(extent.generation);
            row.last = row.last.max(extent.generation);
            match &extent.checked {
                None => {}
                Some(Ok(())) => row.good += 1,
                Some(Err(why)) => row.bad = Some(format!("part {}: {why}", extent.key.part)),
            }
        }
        for ((_, state), row) in rows {
            let generations = match (row.first, row.last) {
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first} to {last}"),
            };
            let check = match (row.bad, row.good) {
                (Some(why), _) => format!("DAMAGED {why}"),
                (None, 0) => "-".to_owned(),
                (None, _) => "ok".to_owned(),
            };
            println!(
                "{:<24} {:<7} {:>5} {:>12} {generations:>12}  {check}",
                row.name,
                format!("{state:?}"),
                row.parts,
                row.bytes
            );
        }
    }
}

/// A line of the table.
struct Row {
    name: String,
    parts: u64,
    bytes: u64,
    first: u64,
    last: u64,
    good: u64,
    bad: Option<String>,
}

impl Default for Row {
    fn default() -> Self {
        Self {
            name: String::new(),
            parts: 0,
            bytes: 0,
            first: u64::MAX,
            last: 0,
            good: 0,
            bad: None,
        }
    }
}

fn object(found: &Inspection) -> serde_json::Value {
    let extents: Vec<_> = found
        .extents
        .iter()
        .map(|e| {
            json!({
                "section": e.section,
                "state": format!("{:?}", e.key.state),
                "part": e.key.part,
                "file": e.file,
                "offset": e.offset,
                "bytes": e.bytes,
                "first_element": e.elements.0,
                "elements": e.elements.1,
                "generation": e.generation,
                "check": match &e.checked {
                    None => serde_json::Value::Null,
                    Some(Ok(())) => "ok".into(),
                    Some(Err(why)) => why.as_str().into(),
                },
            })
        })
        .collect();
    json!({
        "generation": found.generation,
        "model": found.model,
        "created": found.created,
        "published": found.published,
        "files": found.files,
        "file_bytes": found.file_bytes,
        "damaged_superblocks": found.damaged_superblocks,
        "life_read_bytes": found.ledger.read_bytes,
        "life_written_bytes": found.ledger.written_bytes,
        "life_payload_written_bytes": found.ledger.payload_written_bytes,
        "life_open_s": found.ledger.open_s,
        "meta": found.meta,
        "extents": extents,
    })
}
