//! Where extents may go: each key has a few fixed places, so that space is exact, nothing
//! fragments and live data never moves.

use super::manifest::ManifestExtent;
use crate::files::BLOCK;
use crate::key::{Key, Layout, StateKind};

/// Places of a key: the published one, the current one, and one more where steps can be undone.
pub(crate) const PLACES: usize = 3;

/// How many places a key needs.
fn wanted(key: Key, undo: bool) -> usize {
    match (key.state, undo) {
        // A gradient is never published.
        (StateKind::Grad, _) => 1,
        (_, false) => 2,
        (_, true) => PLACES,
    }
}

/// Where a key's extents may lie.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    pub(crate) file: u32,
    pub(crate) offsets: [Option<u64>; PLACES],
}

/// Gives every key of the layout its places; those of a published generation keep theirs.
/// Returns them with the bytes that each file must have.
pub(crate) fn assign(
    layout: &Layout,
    published: &[ManifestExtent],
    files: usize,
    undo: bool,
) -> (Vec<Places>, Vec<u64>) {
    let mut free: Vec<Vec<(u64, u64)>> = vec![Vec::new(); files];
    let mut ends = vec![0u64; files];
    for (file, (free, end)) in free.iter_mut().zip(&mut ends).enumerate() {
        let mut taken: Vec<_> = published
            .iter()
            .filter(|e| e.file as usize == file)
            .map(|e| (e.offset, e.bytes.next_multiple_of(BLOCK)))
            .collect();
        taken.sort_unstable();
        for (offset, bytes) in taken {
            if offset > *end {
                free.push((*end, offset - *end));
            }
            *end = (*end).max(offset + bytes);
        }
    }
    let mut all = vec![Places::default(); layout.extents.len()];
    for (index, (key, bytes, _)) in layout.extents.iter().enumerate() {
        let kept = published
            .iter()
            .find(|e| e.key == *key && e.bytes == *bytes);
        let places = &mut all[index];
        places.file = kept.map_or((index % files) as u32, |e| e.file);
        places.offsets[0] = kept.map(|e| e.offset);
        let (free, end) = (
            &mut free[places.file as usize],
            &mut ends[places.file as usize],
        );
        let padded = bytes.next_multiple_of(BLOCK);
        for offset in &mut places.offsets[..wanted(*key, undo)] {
            offset.get_or_insert_with(|| take(free, end, padded));
        }
    }
    (all, ends)
}

fn take(free: &mut Vec<(u64, u64)>, end: &mut u64, bytes: u64) -> u64 {
    if let Some(index) = free.iter().position(|run| run.1 >= bytes) {
        let run = &mut free[index];
        let offset = run.0;
        *run = (run.0 + bytes, run.1 - bytes);
        if run.1 == 0 {
            free.swap_remove(index);
        }
        return offset;
    }
    let offset = *end;
    *end += bytes;
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_never_overlap_and_published_extents_keep_theirs() {
        let key = |section, state| Key {
            section,
            state,
            part: 0,
        };
        let layout = Layout::new(
            "m",
            0,
            (0..20).map(|i| {
                let state = [StateKind::Param, StateKind::Optim, StateKind::Grad][i as usize % 3];
                (key(i, state), 1000 + 5000 * u64::from(i), "s")
            }),
        );
        let kept = ManifestExtent {
            key: key(7, StateKind::Optim),
            file: 1,
            offset: 10 * BLOCK,
            bytes: 36_000,
            checksum: 0,
            generation: 1,
        };
        // One of another layout: its place is not given away while it is published.
        let other = ManifestExtent {
            key: key(99, StateKind::Param),
            offset: 40 * BLOCK,
            ..kept
        };
        for undo in [false, true] {
            let (places, ends) = assign(&layout, &[kept, other], 2, undo);
            let mut runs: Vec<(u32, u64, u64)> = vec![(1, other.offset, 36_864)];
            for (place, (k, bytes, _)) in places.iter().zip(&layout.extents) {
                let offsets: Vec<u64> = place.offsets.iter().flatten().copied().collect();
                assert_eq!(offsets.len(), wanted(*k, undo));
                if *k == kept.key {
                    assert_eq!((place.file, offsets[0]), (1, kept.offset));
                }
                runs.extend(
                    offsets
                        .iter()
                        .map(|o| (place.file, *o, bytes.next_multiple_of(BLOCK))),
                );
            }
            runs.sort_unstable();
            for pair in runs.windows(2) {
                assert!(
                    pair[0].0 < pair[1].0 || pair[0].1 + pair[0].2 <= pair[1].1,
                    "{pair:?}"
                );
            }
            assert!(runs.iter().all(|r| r.1 + r.2 <= ends[r.0 as usize]));
        }
    }
}
