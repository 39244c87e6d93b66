//! Sections cut into parts, rank by rank.

use crate::{PlaceOptions, Tier};

/// Elements between the starts of parts: whole cache lines in every type.
const PART_ALIGN: u64 = 64;

/// A run of a section's elements that the optimizer updates in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First element in the section.
    pub first: u64,
    /// Number of elements.
    pub elements: u64,
    /// Where its optimizer states live.
    pub home: Tier,
}

/// The parts of a section, all at home on disk at first.
pub(crate) fn parts(elements: u64, options: &PlaceOptions) -> Vec<Part> {
    let chunk = options.chunk_elements.max(PART_ALIGN);
    let ranks = split(elements, u64::from(options.partitions.max(1)));
    let parts = ranks.flat_map(|(start, length)| {
        let parts = split(length, length.div_ceil(chunk));
        parts.map(move |(first, elements)| Part {
            first: start + first,
            elements,
            home: Tier::Disk,
        })
    });
    parts.collect()
}

/// Cuts `elements` into at most `count` runs of equal, aligned length.
fn split(elements: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let size = elements.div_ceil(count).next_multiple_of(PART_ALIGN);
    (0..count)
        .map(move |i| i * size)
        .take_while(move |first| *first < elements)
        .map(move |first| (first, size.min(elements - first)))
}
