//! Which bytes of a file are free. Extents of a size that is used again and again are kept apart in
//! a list of their own, so that nothing fragments and live data never moves.

use std::collections::VecDeque;

use super::superblock::HEADER;

/// The bytes of one file.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// `(offset, bytes)` of each free run below `end`, sorted, never adjacent.
    runs: Vec<(u64, u64)>,
    end: u64,
}

impl Space {
    /// All but the header and what is taken.
    pub(crate) fn new(mut taken: Vec<(u64, u64)>) -> Self {
        taken.sort_unstable();
        let mut space = Self {
            runs: Vec::new(),
            end: HEADER,
        };
        for (offset, bytes) in taken {
            if offset > space.end {
                space.runs.push((space.end, offset - space.end));
            }
            space.end = space.end.max(offset + bytes);
        }
        space
    }

    /// The length that the file must have.
    pub(crate) fn end(&self) -> u64 {
        match self.runs.last() {
            Some((offset, bytes)) if offset + bytes == self.end => *offset,
            _ => self.end,
        }
    }

    /// Takes the first run that is large enough, or more of the file.
    pub(crate) fn take(&mut self, bytes: u64) -> u64 {
        if let Some(index) = self.runs.iter().position(|run| run.1 >= bytes) {
            let run = &mut self.runs[index];
            let offset = run.0;
            *run = (run.0 + bytes, run.1 - bytes);
            if run.1 == 0 {
                self.runs.remove(index);
            }
            return offset;
        }
        // A free run at the end grows.
        if let Some(last) = self.runs.last().copied()
            && last.0 + last.1 == self.end
        {
            self.runs.pop();
            self.end = last.0 + bytes;
            return last.0;
        }
        let offset = self.end;
        self.end += bytes;
        offset
    }

    pub(crate) fn give(&mut self, offset: u64, bytes: u64) {
        let index = self.runs.partition_point(|run| run.0 < offset);
        self.runs.insert(index, (offset, bytes));
        for index in [index, index.wrapping_sub(1)] {
            if let Some(&[left, right]) = self
                .runs
                .get(index..index.saturating_add(2))
                .and_then(|w| w.first_chunk())
                && left.0 + left.1 == right.0
            {
                self.runs[index].1 += right.1;
                self.runs.remove(index + 1);
            }
        }
    }
}

/// Free extents of one size in one file.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    pub(crate) file: u32,
    pub(crate) bytes: u64,
    pub(crate) keys: u64,
    /// In the order in which they were freed: what is written in order lies in order.
    pub(crate) free: VecDeque<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again_and_nothing_overlaps() {
        let mut space = Space::new(vec![(HEADER + 8192, 4096)]);
        assert_eq!(space.end(), HEADER + 12288);
        let mut taken = vec![(HEADER + 8192, 4096)];
        let mut seed = 7u64;
        for round in 0..2000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            if round % 3 == 2 {
                let (offset, bytes) = taken.swap_remove((seed >> 33) as usize % taken.len());
                space.give(offset, bytes);
            } else {
                let bytes = 4096 * (1 + (seed >> 40) % 5);
                let offset = space.take(bytes);
                for (other, length) in &taken {
                    assert!(offset + bytes <= *other || other + length <= offset);
                }
                taken.push((offset, bytes));
            }
        }
        let used: u64 = taken.iter().map(|t| t.1).sum();
        let free: u64 = space.runs.iter().map(|r| r.1).sum();
        assert_eq!(used + free + HEADER, space.end);
        for (offset, bytes) in taken {
            space.give(offset, bytes);
        }
        assert_eq!(space.runs, [(HEADER, space.end - HEADER)]);
        assert_eq!(space.end(), HEADER, "nothing of it is needed");
    }
}
