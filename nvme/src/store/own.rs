//! Transfers of the store's own, one at a time: headers, maps, and extents through a small buffer.

use super::{MapExtent, OWN};
use crate::Error;
use crate::buffer::{Blocks, Buffer};
use crate::checksum::{GRANULE, partial, seed};
use crate::medium::Volume;
use crate::owner::{Ended, Fault, Operation, Owner, Priority, Target, Transfer};

/// Bytes read or written at once: a multiple of a granule.
pub(super) const PIECE: u64 = 16 * GRANULE;

/// One transfer that is the store's own, with nothing else under way.
pub(super) fn own(
    owner: &mut Owner,
    volume: &dyn Volume,
    operation: Operation,
    target: Target,
    buffer: Blocks,
) -> Result<(Blocks, u64), Error> {
    owner.ask(transfer(operation, target, buffer));
    loop {
        if let Some(ended) = owner.next() {
            return finished(volume, operation, &target, ended);
        }
        stalled(owner)?;
        std::thread::sleep(std::time::Duration::from_micros(20));
    }
}

/// Takes pieces of an extent: where they begin in it, and the bytes, not yet verified.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), Error>;

/// Reads an extent through a small buffer and hands it on in pieces; its checksum, which is to be
/// compared before the pieces are believed.
pub(super) fn stream(
    owner: &mut Owner,
    volume: &dyn Volume,
    place: usize,
    store: u64,
    extent: &MapExtent,
    to: Sink<'_>,
) -> Result<u64, Error> {
    let seed = seed(
        store,
        extent.key,
        extent.file,
        extent.offset,
        extent.generation,
    );
    let (bytes, mut start, mut sum) = (extent.bytes(), 0, 0u64);
    let mut blocks = Blocks::new(PIECE.min(bytes));
    while start < bytes {
        let length = PIECE.min(bytes - start);
        let target = plain(place, extent.offset + start, length);
        (blocks, _) = own(owner, volume, Operation::Read, target, blocks)?;
        let data = &blocks[..length as usize];
        sum = sum.wrapping_add(partial(seed, start, data));
        to(start, data)?;
        start += length;
    }
    Ok(sum)
}

pub(super) fn transfer(operation: Operation, target: Target, buffer: Blocks) -> Transfer {
    Transfer {
        tag: OWN,
        number: 0,
        operation,
        priority: Priority::Checkpoint,
        target,
        buffer: Buffer::Blocks(buffer),
        expected: None,
    }
}

pub(super) fn stalled(owner: &Owner) -> Result<(), Error> {
    match owner.stalled() {
        None => Ok(()),
        Some(stall) => Err(Error::Stalled {
            why: stall.why,
            requests: stall.requests,
            what: "of the store's map".into(),
        }),
    }
}

pub(super) fn finished(
    volume: &dyn Volume,
    operation: Operation,
    target: &Target,
    ended: Ended,
) -> Result<(Blocks, u64), Error> {
    let Buffer::Blocks(blocks) = ended.buffer else {
        unreachable!("slabs carry the tag of a key");
    };
    match ended.result {
        Ok(checksum) => Ok((blocks, checksum)),
        Err(Fault::Io { offset, source }) => Err(Error::Io {
            operation: match operation {
                Operation::Read => "reading",
                Operation::Write => "writing",
                Operation::Sync => "syncing",
            },
            what: "the store's map".into(),
            path: volume.path(target.file as usize).to_owned(),
            offset,
            source,
        }),
        Err(Fault::Checksum | Fault::Cancelled) => unreachable!("not asked for"),
    }
}

/// A piece of a file that has no checksum of its own.
pub(super) fn plain(file: usize, offset: u64, bytes: u64) -> Target {
    Target {
        file: file as u32,
        offset,
        bytes,
        seed: 0,
        start: 0,
    }
}
