//! What was measured of a disk, kept for the user who measured it: stores on it are tuned by it.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::io::Tuning;

/// The fastest way found to drive a disk, and its rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Bytes of a request.
    pub block: u32,
    /// Requests under way at once.
    pub depth: u32,
    /// Bare reads.
    pub read_bytes_per_s: f64,
    /// Bare writes.
    pub write_bytes_per_s: f64,
    /// Seconds since 1970 when it was measured.
    pub measured: u64,
}

impl Profile {
    /// The profile of the disk that a folder is on, if there is one.
    pub fn of(folder: &Path) -> Option<Self> {
        let text = std::fs::read(Self::place(folder)?).ok()?;
        let profile: Self = serde_json::from_slice(&text).ok()?;
        let rates = [profile.read_bytes_per_s, profile.write_bytes_per_s];
        rates
            .iter()
            .all(|r| r.is_finite() && *r > 0.0)
            .then_some(profile)
    }

    /// Keeps it for the disk that a folder is on; says where.
    ///
    /// # Errors
    /// No home to keep it in, or a file that cannot be written.
    pub fn keep(&self, folder: &Path) -> std::io::Result<PathBuf> {
        let place = Self::place(folder).ok_or_else(|| {
            std::io::Error::other("neither FOREBAY_PROFILES, XDG_CACHE_HOME nor HOME is set")
        })?;
        if let Some(parent) = place.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let new = place.with_extension(format!("{}.new", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        std::io::Write::write_all(&mut file, &serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(&new, &place)?;
        Ok(place)
    }

    /// `$FOREBAY_PROFILES`, else `forebay` in the user's cache: a file for each device.
    fn place(folder: &Path) -> Option<PathBuf> {
        let device = std::fs::metadata(folder).ok()?.dev();
        let set = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let cache = set("FOREBAY_PROFILES")
            .or_else(|| Some(set("XDG_CACHE_HOME")?.join("forebay")))
            .or_else(|| Some(set("HOME")?.join(".cache/forebay")))?;
        Some(cache.join(format!("disk-{device:x}.json")))
    }

    /// The tuning that it calls for.
    pub fn tuning(&self) -> Tuning {
        Tuning {
            block: self.block,
            depth: self.depth,
            ..Tuning::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_from_anyone_is_within_what_the_engine_can_do() {
        let profile = Profile {
            block: 7,
            depth: 0,
            read_bytes_per_s: 1e9,
            write_bytes_per_s: 1e9,
            measured: 0,
        };
        let tuning = profile.tuning().sane();
        assert_eq!((tuning.block, tuning.depth), (256 << 10, 1));
        let tuning = Profile {
            block: u32::MAX,
            depth: u32::MAX,
            ..profile
        }
        .tuning()
        .sane();
        assert_eq!((tuning.block, tuning.depth), (64 << 20, 256));
    }
}
