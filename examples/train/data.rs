//! Text as bytes: what is read, what is held out, and which bytes a step trains on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use memmap2::Mmap;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One part in this many is held out.
const HELD_OUT: usize = 16;
/// Files beyond this size are not the text that the default looks for.
const DEFAULT_FILE_BYTES_MAX: u64 = 1 << 20;
const DEFAULT_SUFFIXES: [&str; 5] = ["rs", "md", "toml", "py", "sh"];

/// The bytes of all files, in order of path.
pub(crate) struct Data {
    train: Vec<u8>,
    held_out: Vec<u8>,
    pub(crate) files: usize,
}

/// A batch of `[batch, seq]` ids and their successors.
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    pub(crate) targets: Vec<u32>,
}

impl Data {
    /// Reads files and folders; of folders, the sources and documents in them.
    pub(crate) fn read(paths: &[PathBuf], sequence: usize) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths {
            collect(path, &mut files)?;
        }
        files.sort();
        files.dedup();
        let mut data = Self {
            train: Vec::new(),
            held_out: Vec::new(),
            files: files.len(),
        };
        for path in &files {
            data.add(path)?;
        }
        let least = sequence + 2;
        if data.train.len() < least || data.held_out.len() < least {
            let names: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
            bail!(
                "--data {} holds {} bytes of text; at least {} are needed for sequences of {sequence}: \
                 give more text with --data, or a shorter --seq",
                names.join(" "),
                data.train.len() + data.held_out.len(),
                least * HELD_OUT,
            );
        }
        Ok(data)
    }

    /// The last part of each file is held out, so that both sides hold every kind of text.
    fn add(&mut self, path: &Path) -> Result<()> {
        let show = || format!("reading --data {}", path.display());
        let file = File::open(path).with_context(show)?;
        if file.metadata().with_context(show)?.len() == 0 {
            return Ok(());
        }
        // SAFETY: the map is read once, here; a file cut short meanwhile would be a SIGBUS, which
        // a training run's own input does not meet.
        let bytes = unsafe { Mmap::map(&file) }.with_context(show)?;
        let (train, held_out) = bytes.split_at(bytes.len() - bytes.len() / HELD_OUT);
        self.train.extend_from_slice(train);
        self.held_out.extend_from_slice(held_out);
        Ok(())
    }

    pub(crate) fn train_bytes(&self) -> usize {
        self.train.len()
    }

    /// Entropy of single bytes of the training text, in nats: the loss of the best model that
    /// looks at no context.
    pub(crate) fn unigram_entropy(&self) -> f64 {
        let mut counts = [0u64; 256];
        self.train.iter().for_each(|b| counts[usize::from(*b)] += 1);
        let total = self.train.len() as f64;
        counts
            .iter()
            .filter(|c| **c > 0)
            .map(|c| *c as f64 / total)
            .map(|p| -p * p.ln())
            .sum()
    }

    /// The batch of a step: windows at random places, from the seed and the step's number alone,
    /// so that a resumed run sees what the uninterrupted one saw.
    pub(crate) fn batch(&self, seed: u64, step: u64, batch: usize, sequence: usize) -> Tokens {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step + 1);
        let last = self.train.len() - sequence - 1;
        windows(
            &self.train,
            sequence,
            (0..batch).map(|_| rng.random_range(0..=last)),
        )
    }

    /// Batches that cover the held-out text once, as far as whole windows go, at most `most`.
    pub(crate) fn held_out(
        &self,
        batch: usize,
        sequence: usize,
        most: usize,
    ) -> impl Iterator<Item = Tokens> {
        let windows_in_all = (self.held_out.len() - 1) / sequence;
        let batches = (windows_in_all / batch).clamp(1, most);
        // Spread over the text; windows may overlap only where the text is shorter than a batch.
        let stride = ((self.held_out.len() - 1 - sequence) / (batches * batch)).max(1);
        let last = self.held_out.len() - sequence - 1;
        (0..batches).map(move |b| {
            let starts = (0..batch).map(|i| ((b * batch + i) * stride).min(last));
            windows(&self.held_out, sequence, starts)
        })
    }

    /// The beginning of the held-out text, for a sample to continue.
    pub(crate) fn prompt(&self, bytes: usize) -> &[u8] {
        &self.held_out[..bytes.min(self.held_out.len())]
    }
}

fn windows(text: &[u8], sequence: usize, starts: impl Iterator<Item = usize>) -> Tokens {
    let mut tokens = Tokens {
        ids: Vec::new(),
        targets: Vec::new(),
    };
    for start in starts {
        let window = &text[start..start + sequence + 1];
        tokens
            .ids
            .extend(window[..sequence].iter().map(|b| u32::from(*b)));
        tokens
            .targets
            .extend(window[1..].iter().map(|b| u32::from(*b)));
    }
    tokens
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let show = || format!("--data {}: no such file or folder", path.display());
    let kind = fs::metadata(path).with_context(show)?;
    if kind.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with('.') || name == "target" {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&path, files)?;
        } else if kind.is_file()
            && path
                .extension()
                .is_some_and(|e| DEFAULT_SUFFIXES.iter().any(|s| e == *s))
            && entry.metadata()?.len() <= DEFAULT_FILE_BYTES_MAX
        {
            files.push(path);
        }
    }
    Ok(())
}
