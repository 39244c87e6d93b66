//! How a store is made or opened.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::folders::Folders;
use crate::io::Tuning;
use crate::medium::Medium;
use crate::owner::Patience;
use crate::profile::Profile;

/// Bytes written and read to find a disk's rate, where it has no profile.
const RATE_BYTES: u64 = 32 << 20;

/// How many copies of each extent have a place from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Copies {
    /// The published version and the next: for a store that publishes while it is used.
    #[default]
    Two,
    /// The published version only if there is one, and the current: for a store that publishes at
    /// the end or never. A version's place is free once the next one is written.
    One,
}

/// How a store is made or opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folders, each on a disk of its own.
    pub paths: Vec<PathBuf>,
    /// How to do I/O; `None`: as the profiles of the disks say (see [`Profile`]).
    pub tuning: Option<Tuning>,
    /// What the folders are on.
    pub medium: Arc<dyn Medium>,
    /// Whether steps are to be undone ([`Store::hold`](super::Store::hold)): costs a place more for each extent.
    pub undo: bool,
    /// Copies of each extent.
    pub copies: Copies,
    /// With one copy: extents of each size that are written at once.
    pub slack: u64,
    /// Bandwidth of each folder, in any unit: new extents are spread in proportion. Empty: from the
    /// profiles, or measured when several folders are opened.
    pub rates: Vec<f64>,
    /// Whether the space of a new store is written once, so that later writes find it real.
    pub prewrite: bool,
    /// How long one completion may take before the disk counts as stalled.
    pub stall: Duration,
    /// How long closing waits for what is under way.
    pub close: Duration,
}

impl Options {
    /// Defaults, for these folders.
    pub fn new<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        Self {
            paths: paths.into_iter().map(Into::into).collect(),
            tuning: None,
            medium: Arc::new(Folders),
            undo: false,
            copies: Copies::Two,
            slack: 16,
            rates: Vec::new(),
            prewrite: true,
            stall: Duration::from_secs(120),
            close: Duration::from_secs(30),
        }
    }

    pub(super) fn patience(&self) -> Patience {
        Patience {
            stall: self.stall,
            close: self.close,
        }
    }

    /// The tuning given, or that of the slowest folder's profile.
    pub fn tuned(&self) -> Tuning {
        if let Some(tuning) = self.tuning {
            return tuning;
        }
        if self.medium.simulated() {
            return Tuning::default();
        }
        let profiles = self.paths.iter().filter_map(|p| Profile::of(p));
        let slowest = profiles.min_by(|a, b| a.read_bytes_per_s.total_cmp(&b.read_bytes_per_s));
        slowest.map_or_else(Tuning::default, |p| p.tuning())
    }

    /// With the rates of the folders' disks: of their profiles, or measured now where one has none.
    pub(super) fn with_rates(&self) -> Self {
        let mut options = self.clone();
        if options.rates.is_empty() && self.paths.len() > 1 && !self.medium.simulated() {
            let profiles: Option<Vec<_>> = self.paths.iter().map(|p| Profile::of(p)).collect();
            let slower = |read: f64, write: f64| read.min(write);
            options.rates = match profiles {
                Some(profiles) => profiles
                    .iter()
                    .map(|p| slower(p.read_bytes_per_s, p.write_bytes_per_s))
                    .collect(),
                // All of them alike, so that the figures are of one kind.
                None => self
                    .paths
                    .iter()
                    .map_while(|path| crate::probe::disk(path, RATE_BYTES).ok())
                    .map(|rate| slower(rate.read_bytes_per_s, rate.write_bytes_per_s))
                    .collect(),
            };
            if options.rates.len() < self.paths.len() {
                // A folder that cannot be measured is met again when it is used, and named then.
                options.rates.clear();
            }
        }
        options
    }
}
