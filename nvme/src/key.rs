//! What is stored: states of sections, in parts, of exact sizes.

use serde::{Deserialize, Serialize};

/// A state of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StateKind {
    /// Parameters in the compute type.
    Param,
    /// A gradient on its way to the optimizer; never part of a generation.
    Grad,
    /// Optimizer states.
    Optim,
}

/// The name of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The section's number.
    pub section: u32,
    /// Which of its states.
    pub state: StateKind,
    /// Which part of it.
    pub part: u32,
}

/// Everything that a store may hold, and whose it is.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(crate) model: String,
    pub(crate) fingerprint: u64,
    /// Sorted by key: size in bytes and the section's name.
    pub(crate) extents: Vec<(Key, u64, String)>,
}

impl Layout {
    /// A layout for a model of this name and identity.
    pub fn new<N: Into<String>>(
        model: impl Into<String>,
        fingerprint: u64,
        extents: impl IntoIterator<Item = (Key, u64, N)>,
    ) -> Self {
        let mut extents: Vec<_> = extents
            .into_iter()
            .map(|(k, b, n)| (k, b, n.into()))
            .collect();
        extents.sort_by_key(|e| e.0);
        Self {
            model: model.into(),
            fingerprint,
            extents,
        }
    }

    pub(crate) fn find(&self, key: Key) -> Option<usize> {
        self.extents.binary_search_by_key(&key, |e| e.0).ok()
    }

    /// A key in words.
    pub(crate) fn describe(&self, key: Key) -> String {
        let name = self.find(key).map_or("?", |i| self.extents[i].2.as_str());
        format!("{:?} of section '{name}', part {}", key.state, key.part)
    }
}
