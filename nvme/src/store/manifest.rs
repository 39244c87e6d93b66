//! The manifest of a generation: one line that says what it is and its checksum, then JSON.

use std::path::Path;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::Error;
use crate::files::{BLOCK, MANIFEST};
use crate::key::Key;

/// Version of the format. A store of an older one is opened if this code can read it; of a newer
/// one, never.
const VERSION: u32 = 1;
const MAGIC: &str = "forebay generation";

/// A published generation.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) generation: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: u64,
    /// Folders that the store is spread over.
    pub(crate) paths: usize,
    pub(crate) extents: Vec<ManifestExtent>,
    /// Bytes written in the store's life until then.
    pub(crate) written_bytes: u64,
    /// The user's own part.
    pub(crate) meta: String,
}

/// One extent of it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ManifestExtent {
    pub(crate) key: Key,
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) checksum: u64,
    /// The generation that wrote it.
    pub(crate) generation: u64,
}

impl Manifest {
    pub(crate) fn to_text(&self) -> String {
        let body = serde_json::to_string(self).expect("plain data always serializes");
        let hash = XxHash3_64::oneshot(body.as_bytes());
        format!("{MAGIC} {VERSION} {hash:016x}\n{body}\n")
    }

    /// Reads a manifest that anyone may have written.
    pub(crate) fn parse(folder: &Path, text: &str) -> Result<Self, Error> {
        let fail = |what: &str| Error::Manifest {
            path: folder.join(MANIFEST),
            what: what.into(),
        };
        let (head, body) = text
            .split_once('\n')
            .ok_or_else(|| fail("not a manifest"))?;
        let head = head
            .strip_prefix(MAGIC)
            .ok_or_else(|| fail("not a manifest"))?;
        let (version, hash) = head
            .trim()
            .split_once(' ')
            .ok_or_else(|| fail("a damaged first line"))?;
        let version: u32 = version.parse().map_err(|_| fail("a damaged first line"))?;
        if version > VERSION {
            return Err(fail("written by a newer version of Forebay"));
        }
        let body = body.strip_suffix('\n').unwrap_or(body);
        if format!("{:016x}", XxHash3_64::oneshot(body.as_bytes())) != hash {
            return Err(fail("its checksum does not match: it is damaged"));
        }
        let manifest: Self = serde_json::from_str(body).map_err(|e| fail(&e.to_string()))?;
        let sane = |e: &ManifestExtent| {
            (e.file as usize) < manifest.paths
                && e.offset.is_multiple_of(BLOCK)
                && e.bytes
                    .checked_add(BLOCK)
                    .and_then(|b| b.checked_add(e.offset))
                    .is_some()
        };
        if !manifest.extents.iter().all(sane) {
            return Err(fail("an extent lies outside its file"));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StateKind;

    fn manifest() -> Manifest {
        let key = Key {
            section: 1,
            state: StateKind::Optim,
            part: 2,
        };
        let extent = ManifestExtent {
            key,
            file: 0,
            offset: 8192,
            bytes: 100,
            checksum: 7,
            generation: 3,
        };
        Manifest {
            generation: 3,
            model: "m".into(),
            fingerprint: 9,
            paths: 1,
            extents: vec![extent],
            written_bytes: 5,
            meta: "{\"step\":1}".into(),
        }
    }

    #[test]
    fn a_manifest_survives_its_text() {
        let parsed = Manifest::parse(Path::new("."), &manifest().to_text()).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", manifest()));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let text = manifest().to_text();
        for byte in 0..text.len() - 1 {
            for bit in 0..8 {
                let mut damaged = text.clone().into_bytes();
                damaged[byte] ^= 1 << bit;
                let Ok(damaged) = String::from_utf8(damaged) else {
                    continue;
                };
                // A digit of the version may turn into an older version's; nothing else may pass.
                if let Ok(parsed) = Manifest::parse(Path::new("."), &damaged) {
                    assert_eq!(format!("{parsed:?}"), format!("{:?}", manifest()));
                    assert!(byte < MAGIC.len() + 2, "bit {bit} of byte {byte}");
                }
            }
        }
    }

    #[test]
    fn a_hostile_manifest_is_an_error() {
        let mut hostile = manifest();
        hostile.extents[0].bytes = u64::MAX;
        assert!(Manifest::parse(Path::new("."), &hostile.to_text()).is_err());
        hostile = manifest();
        hostile.extents[0].file = 1;
        assert!(Manifest::parse(Path::new("."), &hostile.to_text()).is_err());
        for text in [
            "",
            "\n",
            "forebay generation\n{}",
            "forebay generation 9 0\n{}",
        ] {
            assert!(Manifest::parse(Path::new("."), text).is_err(), "{text:?}");
        }
    }
}
