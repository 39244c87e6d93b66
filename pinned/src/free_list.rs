//! Which ranges of the arena are free: a sorted list of runs, first fit, merged on return.
//!
//! Leases are made when a trainer opens and are few; a list is the right size of tool.

#[derive(Debug)]
pub(crate) struct FreeList {
    /// `(offset, bytes)` of each free run, sorted, never adjacent.
    runs: Vec<(u64, u64)>,
    free: u64,
}

impl FreeList {
    pub(crate) fn new(bytes: u64) -> Self {
        let mut runs = Vec::with_capacity(64);
        runs.push((0, bytes));
        Self { runs, free: bytes }
    }

    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    pub(crate) fn largest(&self) -> u64 {
        self.runs.iter().map(|r| r.1).max().unwrap_or(0)
    }

    /// The offset of a run of `bytes`, now taken.
    pub(crate) fn take(&mut self, bytes: u64) -> Option<u64> {
        let index = self.runs.iter().position(|r| r.1 >= bytes)?;
        let (offset, length) = self.runs[index];
        if length == bytes {
            self.runs.remove(index);
        } else {
            self.runs[index] = (offset + bytes, length - bytes);
        }
        self.free -= bytes;
        Some(offset)
    }

    /// Returns what `take` gave.
    pub(crate) fn give(&mut self, offset: u64, bytes: u64) {
        self.free += bytes;
        let next = self.runs.partition_point(|r| r.0 < offset);
        let joins_next = self.runs.get(next).is_some_and(|r| offset + bytes == r.0);
        let joins_previous = next
            .checked_sub(1)
            .is_some_and(|p| self.runs[p].0 + self.runs[p].1 == offset);
        match (joins_previous, joins_next) {
            (true, true) => {
                self.runs[next - 1].1 += bytes + self.runs[next].1;
                self.runs.remove(next);
            }
            (true, false) => self.runs[next - 1].1 += bytes,
            (false, true) => self.runs[next] = (offset, bytes + self.runs[next].1),
            (false, false) => self.runs.insert(next, (offset, bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_never_overlap_and_all_returned_is_one_run(
            steps in prop::collection::vec((1u64..40, any::<prop::sample::Index>(), any::<bool>()), 1..200)
        ) {
            let mut list = FreeList::new(256);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (bytes, index, take) in steps {
                if take || taken.is_empty() {
                    match list.take(bytes) {
                        Some(offset) => {
                            let fresh = taken.iter().all(|t| offset + bytes <= t.0 || t.0 + t.1 <= offset);
                            prop_assert!(fresh && offset + bytes <= 256);
                            taken.push((offset, bytes));
                        }
                        None => prop_assert!(list.largest() < bytes),
                    }
                } else {
                    let (offset, bytes) = taken.swap_remove(index.index(taken.len()));
                    list.give(offset, bytes);
                }
                let used: u64 = taken.iter().map(|t| t.1).sum();
                prop_assert_eq!(list.free(), 256 - used);
            }
            for (offset, bytes) in taken {
                list.give(offset, bytes);
            }
            prop_assert_eq!(list.runs, vec![(0, 256)]);
        }
    }
}
