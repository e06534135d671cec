//! What a file of a running server has that the backup before does not: found by reading all of it. Blocking.
//!
//! A block is unchanged when its digest is the one that the backup before has of it. What a page's LSN says, or the server's
//! summaries of the WAL, is not asked: neither tells of a page that was written without WAL.

use std::path::Path;

use crate::catalog::DamagedPage;
use crate::codec::backup_index::{PARTIAL_BLOCKS_MAX, block_digests};
use crate::error::{Error, Result};
use crate::pg::incremental::PartialFile;
use crate::pg::page::{Fork, PAGE_BYTES, RelationFile};
use crate::repository::FileBlocks;

use super::read::{Ahead, Opened, PageCheck, Pages, READ_BYTES, read_checked};

/// Where more of a file has changed than this, in percent, it is stored whole.
///
/// Source: `src/backend/backup/basebackup_incremental.c`, GetFileBackupMethod.
const CHANGED_PERCENT_MAX: u64 = 90;

/// What has changed in a file.
#[derive(Debug)]
pub(super) struct Changes {
    /// The blocks that changed, and the file's length.
    pub(super) partial: PartialFile,
    /// The CRC-32C of each stretch of unchanged blocks: before each run of changed ones, and behind the last.
    kept_crcs: Vec<u32>,
    /// Unchanged pages that are damaged.
    pub(super) damaged: Vec<DamagedPage>,
}

/// Returns whether some blocks of a file may be stored instead of all: the main fork and the visibility map of relations.
/// Free space maps are not reliably in the WAL, and nothing else is made of pages.
pub(super) fn may_be_partial(listed: &Path, bytes: u64) -> bool {
    RelationFile::of(listed).is_some_and(|file| matches!(file.fork, Fork::Main | Fork::VisibilityMap))
        && bytes > 0
        && bytes.is_multiple_of(PAGE_BYTES as u64)
        && bytes <= u64::from(PARTIAL_BLOCKS_MAX) * PAGE_BYTES as u64
}

/// Compares an open file with what the backup before has of it, and checks its pages; `None` when so much of it has changed
/// that it is to be stored whole. `pass` hears of every byte that was read.
///
/// # Errors
/// [`Error::LocalIo`] when reading fails; what `pass` fails with.
pub(super) fn find_changes(
    opened: &Opened,
    source: &Path,
    listed: &Path,
    check: Option<PageCheck>,
    before: &FileBlocks,
    buffer: &mut Vec<u8>,
    pass: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Option<Changes>> {
    let failed = |error| Error::from_io(format!("reading {}", source.display()), error);
    let pages = Pages::of(listed, check);
    let length_blocks = opened.bytes / PAGE_BYTES as u64;
    let mut partial = PartialFile { blocks: Vec::new(), length_blocks: length_blocks as u32 };
    let (mut kept_crcs, mut damaged, mut kept_crc) = (Vec::new(), Vec::new(), 0);
    let (mut at, mut ahead) = (0, Ahead::default());
    while at < opened.bytes {
        ahead.keep(opened, at);
        let length = (opened.bytes - at).min(READ_BYTES as u64) as usize;
        buffer.resize(length, 0);
        let found = damaged.len();
        read_checked(opened, pages.as_ref(), buffer, at, &mut damaged).map_err(failed)?;
        let first = at / PAGE_BYTES as u64;
        for (number, digest) in block_digests(buffer).enumerate() {
            let block = first + number as u64;
            let known = before.blocks.get(block as usize).copied().flatten();
            if known.is_some_and(|known| known.digest == digest) {
                kept_crc = crc32c::crc32c_append(kept_crc, &buffer[number * PAGE_BYTES..][..PAGE_BYTES]);
            } else {
                if partial.blocks.last().is_none_or(|last| u64::from(*last) + 1 < block) {
                    kept_crcs.push(std::mem::take(&mut kept_crc));
                }
                partial.blocks.push(block as u32);
            }
        }
        if let Some(pages) = &pages {
            // Those that changed are judged again when they are stored.
            let new = damaged.split_off(found).into_iter();
            damaged.extend(new.filter(|page: &DamagedPage| {
                partial.blocks.binary_search(&pages.in_file(page.block)).is_err()
            }));
        }
        if partial.blocks.len() as u64 * 100 > length_blocks * CHANGED_PERCENT_MAX {
            return Ok(None);
        }
        at += length as u64;
        pass(length as u64)?;
    }
    kept_crcs.push(kept_crc);
    Ok(Some(Changes { partial, kept_crcs, damaged }))
}

/// Reads the blocks that changed once more, as they are now, and hands them to `take`; returns the CRC-32C of the whole file as
/// it is in the backup, and those among them that are damaged.
///
/// # Errors
/// As [`find_changes`].
pub(super) fn read_changes(
    opened: &Opened,
    source: &Path,
    listed: &Path,
    check: Option<PageCheck>,
    changes: &Changes,
    buffer: &mut Vec<u8>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<(u32, Vec<DamagedPage>)> {
    let failed = |error| Error::from_io(format!("reading {}", source.display()), error);
    let pages = Pages::of(listed, check);
    let Changes { partial, kept_crcs, .. } = changes;
    let (mut crc, mut next_block, mut damaged) = (0, 0, Vec::new());
    let mut runs = partial.blocks.chunk_by(|a, b| a + 1 == *b);
    for kept_crc in kept_crcs {
        let run = runs.next().unwrap_or_default();
        let first = run.first().copied().unwrap_or(partial.length_blocks);
        crc = crc32c::crc32c_combine(crc, *kept_crc, (first - next_block) as usize * PAGE_BYTES);
        next_block = first + run.len() as u32;
        for part in run.chunks(READ_BYTES / PAGE_BYTES) {
            buffer.resize(part.len() * PAGE_BYTES, 0);
            let at = part.first().map_or(0, |block| u64::from(*block) * PAGE_BYTES as u64);
            read_checked(opened, pages.as_ref(), buffer, at, &mut damaged).map_err(failed)?;
            crc = crc32c::crc32c_append(crc, buffer);
            take(buffer)?;
        }
    }
    Ok((crc, damaged))
}

#[cfg(test)]
mod tests {
    use super::super::read::open;
    use super::*;
    use crate::pg::Lsn;
    use crate::repository::BlockPlace;
    use proptest::prelude::*;
    use std::fs;

    fn blocks_of(content: &[u8]) -> FileBlocks {
        let place = |digest| Some(BlockPlace { level: 0, object: 0, tar_at: 0, digest });
        FileBlocks { bytes: content.len() as u64, blocks: block_digests(content).map(place).collect() }
    }

    /// Pages of the given bytes, each all of one.
    fn pages(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|byte| [*byte; PAGE_BYTES]).collect()
    }

    fn changes(before: &[u8], path: &Path) -> (Opened, Option<Changes>) {
        let opened = open(path).unwrap().unwrap();
        let listed = Path::new("base/5/700");
        let mut passed = 0;
        let mut pass = |bytes| {
            passed += bytes;
            Ok(())
        };
        let found = find_changes(&opened, path, listed, None, &blocks_of(before), &mut Vec::new(), &mut pass)
            .unwrap();
        assert!(passed == opened.bytes || found.is_none());
        (opened, found)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_stored_and_what_is_kept_make_the_file(
            before in proptest::collection::vec(0u8..3, 0..300),
            now in proptest::collection::vec(0u8..3, 1..300),
            later in proptest::collection::vec(0u8..3, 1..300),
        ) {
            let home = tempfile::tempdir().unwrap();
            let path = home.path().join("1");
            // Mostly as it was.
            let now: Vec<u8> = now.iter().zip(before.iter().map(Some).chain(std::iter::repeat(None)))
                .enumerate()
                .map(|(at, (new, old))| if at % 5 == 0 { *new } else { *old.unwrap_or(new) })
                .collect();
            let content = pages(&now);
            fs::write(&path, &content).unwrap();
            let before = pages(&before);
            let (opened, Some(found)) = changes(&before, &path) else { return Ok(()) };
            let differ: Vec<u32> = (0..now.len())
                .filter(|at| before.get(at * PAGE_BYTES) != Some(&now[*at]))
                .map(|at| at as u32)
                .collect();
            prop_assert_eq!(&found.partial.blocks, &differ);
            // The server goes on writing, also to pages that are not read again.
            let moved: Vec<u8> = (0..now.len()).map(|at| *later.get(at).unwrap_or(&now[at])).collect();
            fs::write(&path, pages(&moved)).unwrap();
            let mut stored = Vec::new();
            let mut take = |bytes: &[u8]| {
                stored.extend_from_slice(bytes);
                Ok(())
            };
            let listed = Path::new("base/5/700");
            let (crc, damaged) =
                read_changes(&opened, &path, listed, None, &found, &mut Vec::new(), &mut take).unwrap();
            let mut whole = content;
            for (block, page) in found.partial.blocks.iter().zip(stored.chunks(PAGE_BYTES)) {
                whole[*block as usize * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
            }
            prop_assert_eq!(stored.len(), found.partial.blocks.len() * PAGE_BYTES);
            prop_assert_eq!(crc, crc32c::crc32c(&whole));
            prop_assert!(damaged.is_empty());
        }
    }

    #[test]
    fn what_changed_nearly_everywhere_is_stored_whole_and_damage_is_told_once() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("1");
        fs::write(&path, pages(&[1; 10])).unwrap();
        assert!(changes(&pages(&[2; 10]), &path).1.is_none());
        assert!(changes(&pages(&[1, 2, 2, 2, 2, 2, 2, 2, 2, 2]), &path).1.is_some());
        let check = Some(PageCheck { start: Lsn(u64::MAX), file_blocks: 131_072 });
        let listed = Path::new("base/5/700.1");
        let before = blocks_of(&pages(&[1, 1, 1, 2, 2, 1, 1, 1, 1, 1]));
        let opened = open(&path).unwrap().unwrap();
        let mut buffer = Vec::new();
        let found = find_changes(&opened, &path, listed, check, &before, &mut buffer, &mut |_| Ok(()))
            .unwrap()
            .unwrap();
        let kept: Vec<u32> = found.damaged.iter().map(|page| page.block - 131_072).collect();
        assert_eq!(kept, [0, 1, 2, 5, 6, 7, 8, 9]);
        let (_, damaged) =
            read_changes(&opened, &path, listed, check, &found, &mut buffer, &mut |_| Ok(())).unwrap();
        assert_eq!(damaged.iter().map(|page| page.block - 131_072).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn only_files_of_pages_that_the_wal_tells_of_may_be_partial() {
        for (path, bytes, may) in [
            ("base/5/700", 8192, true),
            ("base/5/700_vm.1", 16_384, true),
            ("base/5/700_fsm", 8192, false),
            ("base/5/700_init", 8192, false),
            ("base/5/700", 0, false),
            ("base/5/700", 8191, false),
            ("pg_xact/0000", 8192, false),
        ] {
            assert_eq!(may_be_partial(Path::new(path), bytes), may, "{path}");
        }
    }
}
