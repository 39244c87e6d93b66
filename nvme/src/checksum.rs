//! The checksum of an extent: a sum of hashes of its granules, so that they can be taken in any
//! order, as requests complete.

use twox_hash::XxHash3_64;

use crate::key::Key;

/// Bytes of a granule. Requests start at multiples of it.
pub(crate) const GRANULE: u64 = 256 << 10;

/// The part of the checksum that granules from byte `start` (a multiple of [`GRANULE`]) on give.
pub(crate) fn partial(seed: u64, start: u64, data: &[u8]) -> u64 {
    debug_assert!(start.is_multiple_of(GRANULE));
    let mut sum = 0u64;
    for (index, granule) in (start / GRANULE..).zip(data.chunks(GRANULE as usize)) {
        // A seed of its own for each granule: swapped granules change the sum.
        let seed = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        sum = sum.wrapping_add(XxHash3_64::oneshot_with_seed(seed, granule));
    }
    sum
}

/// Mixes what makes an extent its own into the checksum's seed: data of another key, place,
/// generation or store does not match.
pub(crate) fn seed(store: u64, key: Key, file: u32, offset: u64, generation: u64) -> u64 {
    let mut bytes = [0u8; 40];
    let fields = [key.section, key.state as u32, key.part, file];
    for (place, field) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(fields) {
        *place = field.to_le_bytes();
    }
    bytes[16..24].copy_from_slice(&offset.to_le_bytes());
    bytes[24..32].copy_from_slice(&generation.to_le_bytes());
    bytes[32..].copy_from_slice(&store.to_le_bytes());
    XxHash3_64::oneshot(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StateKind;

    #[test]
    fn it_is_the_same_in_any_order_of_pieces_and_no_other() {
        let data: Vec<u8> = (0..5 * GRANULE + 77)
            .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect();
        let whole = partial(9, 0, &data);
        let cut = (2 * GRANULE) as usize;
        let pieces =
            partial(9, 2 * GRANULE, &data[cut..]).wrapping_add(partial(9, 0, &data[..cut]));
        assert_eq!(whole, pieces);
        let mut swapped = data.clone();
        swapped[..2 * cut].rotate_left(cut);
        assert_ne!(whole, partial(9, 0, &swapped), "granules swapped");
        assert_ne!(whole, partial(10, 0, &data), "another place");
        assert_ne!(whole, partial(9, 0, &data[..data.len() - 1]), "a byte less");
    }

    #[test]
    fn every_field_of_the_place_counts() {
        let key = Key {
            section: 1,
            state: StateKind::Optim,
            part: 2,
        };
        let all = [
            seed(5, key, 0, 4096, 3),
            seed(6, key, 0, 4096, 3),
            seed(5, Key { section: 2, ..key }, 0, 4096, 3),
            seed(5, Key { part: 1, ..key }, 0, 4096, 3),
            seed(
                5,
                Key {
                    state: StateKind::Param,
                    ..key
                },
                0,
                4096,
                3,
            ),
            seed(5, key, 1, 4096, 3),
            seed(5, key, 0, 8192, 3),
            seed(5, key, 0, 4096, 4),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "field {i}");
        }
    }
}
