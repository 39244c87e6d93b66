#!/usr/bin/env python3
"""Plants known defects in the disk tier, one at a time, and checks that a test fails for each.

Works on a copy of the committed tree, under target/. Usage: .ci/planted.py [NUMBER...]
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPY = ROOT / "target" / "planted"
LIB, STORE, FAULTS, LIVES, KERNEL = "--lib", "--test store", "--test faults", "--test lifetimes", "--test kernel"

# What it is; the file; what stands there (a pattern where it begins with ^, else the text); the
# defect; the tests that must notice.
PLANTED = [
    ("a short transfer is taken for a whole one", "owner/work.rs",
     "let moved = (moved as u64).min(piece.bytes);", "let moved = piece.bytes.max(moved as u64);", LIB),
    ("the rest of a short transfer is dropped", "owner/work.rs",
     "let more = piece.bytes > 0 ||", "let more = false && piece.bytes > 0 ||", LIB),
    ("a failed request passes for done", "owner/work.rs",
     "(_, r) if r < 0 => fail(io::Error::from_raw_os_error(-r)),", "(_, r) if r < 0 => piece.bytes,", LIB),
    ("the rest begins in the middle of a block", "owner/work.rs",
     "moved / BLOCK * BLOCK", "moved", FAULTS),
    ("a cancelled transfer gives its buffer back at once", "owner/work.rs",
     "self.requests == 0 && self.unhashed == 0 && self.all_asked()",
     "(self.requests == 0 || self.fault.is_some()) && self.unhashed == 0 && self.all_asked()", LIVES),
    ("buffers that the disk may touch are freed on drop", "owner/work.rs",
     "work.transfer.buffer.leak();", "drop(work.transfer.buffer);", LIVES),
    ("what is read is not compared with its checksum", "owner/work.rs",
     "(None, Some(expected)) if work.checksum != expected", "(None, Some(expected)) if work.checksum != expected && false", STORE),
    ("the checksum does not know the offset", "checksum.rs",
     "bytes[16..24].copy_from_slice(&offset.to_le_bytes());", "", LIB),
    ("the checksum does not know the generation", "checksum.rs",
     "bytes[24..32].copy_from_slice(&generation.to_le_bytes());", "", LIB),
    ("granules may be swapped", "checksum.rs",
     "let seed = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));", "let _ = index;", LIB),
    ("a sync that failed is tried again and believed", "store/publish.rs",
     "self.failed = Some(error.to_string());", "let _ = error;", FAULTS),
    ("the generation is named before its data is durable", "store/publish.rs",
     "        self.sync()?;\n        // From here on", "        // From here on", FAULTS),
    ("both superblocks are written without a sync between", "store/publish.rs",
     "            self.sync()?;\n        }\n        Ok(())", "        }\n        self.sync()", KERNEL),
    ("what was published is not synced", "store/publish.rs",
     "            self.sync()?;\n        }\n        Ok(())", "        }\n        Ok(())", FAULTS),
    ("publishing does not make the files' names durable", "store/open.rs",
     "    store.volume.sync_names()?;\n    Ok(store)", "    Ok(store)", FAULTS),
    ("a stale generation is taken where the newest is lost", "store/header.rs",
     "lost.iter().find(|(_, parity)| *parity != generation % 2)",
     "lost.iter().find(|(_, parity)| *parity > 7)", FAULTS),
    ("the map's checksum is not compared", "store/header.rs",
     "if XxHash3_64::oneshot(text) != superblock.map_checksum {", "if false {", FAULTS),
    ("a superblock's checksum is not compared", "store/superblock.rs",
     "read.magic != MAGIC || XxHash3_64::oneshot(rest) != u64::from_le_bytes(*checksum)",
     "read.magic != MAGIC || checksum.len() != 8", LIB),
    ("the published version is written over", "store/catalog.rs",
     "let kept = [self.published, self.held.flatten()];", "let kept = [None, self.held.flatten()];", LIB),
    ("what is held is written over", "store/catalog.rs",
     "let kept = [self.published, self.held.flatten()];", "let kept = [self.published, None];", LIB),
    ("a write that did not happen loses the version before", "store/catalog.rs",
     "Some(replaced) => entry.current = Some(replaced),", "Some(_) => {}", LIB),
    ("a step is not undone", "store/catalog.rs",
     "std::mem::replace(&mut self.entries[index].current, held)", "held", STORE),
    ("two extents of a hostile map may overlap", "store/map.rs",
     "return Err(fail(\"two extents overlap\".into()));", "", LIB),
    ("parts that are put together are not checked", "store/gather.rs",
     "if sum != part.checksum {", "if false {", "--test faults; cargo test -q --test faults damage"),
    ("a store may have two owners", "folders.rs",
     "libc::LOCK_EX | libc::LOCK_NB", "libc::LOCK_SH | libc::LOCK_NB", STORE),
    ("links are followed", "folders.rs",
     ".custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | flags);", ".custom_flags(libc::O_CLOEXEC | flags);", STORE),
    ("files are readable by all", "folders.rs", ".mode(0o600)", ".mode(0o644)", STORE),
    ("the least urgent goes first", "owner/mod.rs",
     "(self.priority, self.number)", "(Priority::Normal, u64::MAX - self.number)", LIB),
    ("a disk that does not answer is waited for without end", "owner/work.rs",
     ">= self.patience {", ">= 1000 * self.patience {", LIVES),
]


def test(which):
    command = f"timeout 300 cargo test -q -p forebay-nvme {which}"
    return subprocess.run(command, shell=True, cwd=COPY, capture_output=True, text=True)


def main():
    wanted = [int(n) for n in sys.argv[1:]] or range(len(PLANTED))
    COPY.mkdir(parents=True, exist_ok=True)
    # With new times, so that nothing built with a defect passes for up to date.
    subprocess.run(f"git archive HEAD | tar xm -C {COPY}", shell=True, cwd=ROOT, check=True)
    for which in (LIB, STORE, FAULTS, LIVES, KERNEL):
        clean = test(which)
        if clean.returncode:
            sys.exit(f"without a defect {which} fails:\n{clean.stdout[-2000:]}{clean.stderr[-2000:]}")
    missed = 0
    for number in wanted:
        what, file, old, new, which = PLANTED[number]
        path = COPY / "nvme" / "src" / file
        text = path.read_text()
        if old not in text:
            sys.exit(f"{number}: {file} no longer holds what is to be changed: {old}")
        path.write_text(text.replace(old, new, 1))
        result = test(which)
        path.write_text(text)
        output = result.stdout + result.stderr
        if re.search(r"^error(\[|: could not compile)", output, re.M) and "test failed" not in output:
            sys.exit(f"{number}: does not compile:\n{output[-3000:]}")
        caught = result.returncode != 0
        missed += not caught
        names = re.findall(r"^    (\w[\w:]*)$", output, re.M)
        print(f"{number:2} {'caught' if caught else 'MISSED'}  {what}  {' '.join(sorted(set(names)))[:100]}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} planted defects caught")
    sys.exit(missed != 0)


main()
