//! Reading a state that was stored in other parts than the layout's: by more ranks, or in larger
//! pieces. The parts that overlap are streamed through a small buffer, and verified whole.

use super::Store;
use super::map::MapExtent;
use super::own::stream;
use crate::Error;
use crate::key::{Key, Shape};

impl Store {
    /// Whether the opened generation holds a key in the layout's own part, or all of its elements in
    /// other parts. (Not gradients.)
    pub fn holds(&self, key: Key) -> bool {
        self.contains(key) || self.scattered(key)
    }

    fn scattered(&self, key: Key) -> bool {
        let Some(index) = self.catalog.layout.find(key) else {
            return false;
        };
        let shape = self.catalog.layout.items[index].shape;
        let parts = self.catalog.foreign_of(key);
        let parts = parts.filter(|e| alike(&e.shape, &shape));
        let mut ranges: Vec<(u64, u64)> = parts
            .map(|e| (e.shape.first, e.shape.first + e.shape.elements))
            .collect();
        ranges.sort_unstable();
        let mut covered = shape.first;
        for (first, end) in ranges {
            if first <= covered {
                covered = covered.max(end);
            }
        }
        covered >= shape.first + shape.elements
    }

    /// Reads a key that the opened generation holds in other parts into `out`, verified; waits.
    /// No transfer may be under way.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Checksum`], [`Error::Io`], [`Error::Misuse`].
    pub fn gather(&mut self, key: Key, out: &mut [u8]) -> Result<(), Error> {
        if self.in_flight > 0 {
            return Err(Error::Misuse("gather while transfers are under way".into()));
        }
        let missing = || Error::Missing {
            what: self.catalog.layout.describe(key),
        };
        let index = self.catalog.layout.find(key).ok_or_else(missing)?;
        let shape = self.catalog.layout.items[index].shape;
        if !self.scattered(key) || (out.len() as u64) < self.catalog.layout.bytes(index) {
            return Err(missing());
        }
        let parts = self.catalog.foreign_of(key);
        let parts: Vec<MapExtent> = parts
            .filter(|e| alike(&e.shape, &shape) && e.shape.overlaps(&shape))
            .copied()
            .collect();
        for part in parts {
            self.gather_part(&part, &shape, out)?;
        }
        self.payload_read += self.catalog.layout.bytes(index);
        Ok(())
    }

    fn gather_part(
        &mut self,
        part: &MapExtent,
        shape: &Shape,
        out: &mut [u8],
    ) -> Result<(), Error> {
        let (store, place) = (self.catalog.store, part.file as usize);
        let (owner, volume) = (&mut self.owner, &*self.volume);
        let sum = stream(owner, volume, place, store, part, &mut |start, data| {
            copy_overlap(&part.shape, shape, start, data, out);
            Ok(())
        })?;
        if sum != part.checksum {
            return Err(Error::Checksum {
                what: self.catalog.layout.describe(part.key),
                path: self.volume.path(place).to_owned(),
                offset: part.offset,
                generation: part.generation,
            });
        }
        Ok(())
    }
}

/// Whether elements of one can stand for elements of the other.
fn alike(a: &Shape, b: &Shape) -> bool {
    let kind = |s: &Shape| (s.components, s.element_bytes, s.width(0));
    kind(a) == kind(b)
}

/// Copies what bytes `start..` of an extent of shape `from` hold of `to`.
fn copy_overlap(from: &Shape, to: &Shape, start: u64, data: &[u8], out: &mut [u8]) {
    // Where the component begins, beside one element.
    let mut before = 0;
    let (first, end) = (
        from.first.max(to.first),
        (from.first + from.elements).min(to.first + to.elements),
    );
    for component in 0..from.components {
        let width = from.width(component);
        // Where the common elements lie in either extent.
        let source = before * from.elements + (first - from.first) * width;
        let target = before * to.elements + (first - to.first) * width;
        before += width;
        let length = (end - first) * width;
        let from_byte = source.max(start);
        let to_byte = (source + length).min(start + data.len() as u64);
        if from_byte < to_byte {
            let at = (target + from_byte - source) as usize;
            let piece = &data[(from_byte - start) as usize..(to_byte - start) as usize];
            out[at..at + piece.len()].copy_from_slice(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_find_their_places_whatever_the_parts_and_pieces() {
        for lead_bytes in [0, 2, 8] {
            elements_find_their_places(lead_bytes);
        }
    }

    fn elements_find_their_places(lead_bytes: u32) {
        let shape = |first, elements| Shape {
            first,
            elements,
            components: 3,
            element_bytes: 4,
            lead_bytes,
        };
        // Element e of component c is the number 1000 c + e.
        let fill = |shape: &Shape| -> Vec<u8> {
            let mut bytes = Vec::new();
            for c in 0..3 {
                for e in shape.first..shape.first + shape.elements {
                    let value = (1000 * u64::from(c) + e).to_le_bytes();
                    bytes.extend(&value[..shape.width(c) as usize]);
                }
            }
            bytes
        };
        let parts = [shape(0, 17), shape(17, 50), shape(67, 33)];
        for wanted in [shape(0, 100), shape(10, 20), shape(60, 40), shape(99, 1)] {
            for piece in [8, 60, 4096] {
                let mut out = vec![0; wanted.bytes().unwrap() as usize];
                for part in &parts {
                    if part.overlaps(&wanted) {
                        let data = fill(part);
                        for (i, data) in data.chunks(piece).enumerate() {
                            copy_overlap(part, &wanted, (i * piece) as u64, data, &mut out);
                        }
                    }
                }
                assert_eq!(out, fill(&wanted), "{wanted:?} in pieces of {piece}");
            }
        }
    }
}
