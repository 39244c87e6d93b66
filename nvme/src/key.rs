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

/// What an extent holds: some elements of a state of a section, component after component
/// (master, then first moment, then second).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The first of the section's elements that are here.
    pub first: u64,
    /// How many.
    pub elements: u64,
    /// Values of each element.
    pub components: u32,
    /// Bytes of each value.
    pub element_bytes: u32,
    /// Bytes of each value of the first component, where they are others; else 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lead_bytes: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(bytes: &u32) -> bool {
    *bytes == 0
}

impl Shape {
    /// Plain bytes.
    pub fn bytes_only(bytes: u64) -> Self {
        Self {
            first: 0,
            elements: bytes,
            components: 1,
            element_bytes: 1,
            lead_bytes: 0,
        }
    }

    /// Its size in bytes; `None` if no memory could hold it.
    pub fn bytes(&self) -> Option<u64> {
        let alike = u64::from(self.components.checked_sub(1)?);
        let alike = alike.checked_mul(u64::from(self.element_bytes))?;
        self.elements
            .checked_mul(alike.checked_add(self.width(0))?)
            .filter(|bytes| *bytes < 1 << 60)
    }

    /// Bytes of each value of a component.
    pub(crate) fn width(&self, component: u32) -> u64 {
        match (component, self.lead_bytes) {
            (0, lead @ 1..) => u64::from(lead),
            _ => u64::from(self.element_bytes),
        }
    }

    /// Whether some elements are in both.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.first < other.first.saturating_add(other.elements)
            && other.first < self.first.saturating_add(self.elements)
    }
}

/// An extent that a store may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name.
    pub key: Key,
    /// What it holds.
    pub shape: Shape,
    /// The section's name, for people.
    pub name: String,
}

impl<N: Into<String>> From<(Key, u64, N)> for Item {
    fn from((key, bytes, name): (Key, u64, N)) -> Self {
        Self {
            key,
            shape: Shape::bytes_only(bytes),
            name: name.into(),
        }
    }
}

/// Everything that a store may hold, and whose it is.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(crate) model: String,
    pub(crate) fingerprint: u64,
    /// Sorted by key.
    pub(crate) items: Vec<Item>,
}

impl Layout {
    /// A layout for a model of this name and identity.
    pub fn new<I: Into<Item>>(
        model: impl Into<String>,
        fingerprint: u64,
        items: impl IntoIterator<Item = I>,
    ) -> Self {
        let mut items: Vec<Item> = items.into_iter().map(Into::into).collect();
        items.sort_by_key(|item| item.key);
        Self {
            model: model.into(),
            fingerprint,
            items,
        }
    }

    pub(crate) fn find(&self, key: Key) -> Option<usize> {
        self.items.binary_search_by_key(&key, |item| item.key).ok()
    }

    pub(crate) fn bytes(&self, index: usize) -> u64 {
        self.items[index].shape.bytes().unwrap_or(u64::MAX / 2)
    }

    /// A key in words.
    pub(crate) fn describe(&self, key: Key) -> String {
        let name = self.find(key).map_or("?", |i| self.items[i].name.as_str());
        describe(key, name)
    }
}

/// A key in words.
pub(crate) fn describe(key: Key, name: &str) -> String {
    format!("{:?} of section '{name}', part {}", key.state, key.part)
}
