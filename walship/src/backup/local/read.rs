//! One file of a running server read, checked page by page, and handed to a packer. Blocking.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::catalog::DamagedPage;
use crate::error::{Error, Result};
use crate::pg::Lsn;
use crate::pg::page::{PAGE_BYTES, PageState, RelationFile, judge};

/// How much is read at once: whole pages.
pub(super) const READ_BYTES: usize = 1 << 20;

/// A page that is wrong is read again so often, with growing pauses: the server may be in the middle of writing it.
const READ_AGAIN: u32 = 5;

/// After so many damaged pages of a file the others are read again once, at once: a file that is damaged all over
/// must not hold the backup up for hours.
const PATIENT_PAGES: usize = 100;

/// The first pause.
const PAUSE: Duration = Duration::from_millis(10);

/// How pages are checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageCheck {
    /// Pages with an LSN at or behind this are replayed.
    pub(super) start: Lsn,
    /// How many pages a file of a relation has before the next one begins.
    pub(super) file_blocks: u32,
}

/// What was read of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReadFile {
    pub(super) listed: PathBuf,
    pub(super) bytes: u64,
    pub(super) crc: u32,
    pub(super) modified: DateTime<Utc>,
}

/// A file that is open, and its length at that moment, which is what the backup has of it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) bytes: u64,
    pub(super) mode: u32,
    pub(super) modified: DateTime<Utc>,
}

/// Opens a file; `None` when it is gone.
///
/// # Errors
/// [`Error::LocalIo`] for one that cannot be read.
pub(super) fn open(path: &Path) -> Result<Option<Opened>> {
    let failed = |error| {
        Error::from_io(format!("reading {}", path.display()), error)
            .with_safe("the server is untouched; no backup was recorded")
            .with_next("Run the backup as the user that PostgreSQL runs as.")
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let meta = file.metadata().map_err(failed)?;
    let modified = DateTime::from_timestamp(meta.mtime(), 0).unwrap_or_default();
    Ok(Some(Opened { file, bytes: meta.len(), mode: meta.mode() & 0o777, modified }))
}

/// Reads an open file in pieces of [`READ_BYTES`] and hands each to `take`; where the file has become shorter, zeros:
/// what was cut off is cut off again by replay. Returns its CRC-32C and the pages that are damaged.
///
/// # Errors
/// [`Error::LocalIo`] when reading fails; what `take` fails with.
pub(super) fn read(
    opened: &Opened,
    source: &Path,
    listed: &Path,
    check: Option<PageCheck>,
    buffer: &mut Vec<u8>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<(u32, Vec<DamagedPage>)> {
    let failed = |error| Error::from_io(format!("reading {}", source.display()), error);
    let pages = Pages::of(listed, check);
    let (mut at, mut crc, mut damaged) = (0u64, 0, Vec::new());
    while at < opened.bytes {
        let length = (opened.bytes - at).min(READ_BYTES as u64) as usize;
        buffer.resize(length, 0);
        let there = read_up_to(&opened.file, buffer, at).map_err(failed)?;
        buffer[there..].fill(0);
        if let Some(pages) = &pages {
            // What the file has lost meanwhile is no page, and neither is an end that is shorter than one.
            pages.check(&opened.file, &mut buffer[..there], at, &mut damaged);
        }
        crc = crc32c::crc32c_append(crc, buffer);
        take(buffer)?;
        at += length as u64;
    }
    Ok((crc, damaged))
}

/// A file that is made of pages, and how they are checked.
pub(super) struct Pages<'a> {
    listed: &'a Path,
    start: Lsn,
    /// The number, in the whole relation, of the file's first page.
    first: u32,
}

impl<'a> Pages<'a> {
    /// `None` for a file that is not made of pages, and where pages are not checked.
    pub(super) fn of(listed: &'a Path, check: Option<PageCheck>) -> Option<Self> {
        let (check, file) = check.zip(RelationFile::of(listed))?;
        Some(Self { listed, start: check.start, first: file.segment.wrapping_mul(check.file_blocks) })
    }

    /// Returns the number in the file of a page with that number in the relation.
    pub(super) fn in_file(&self, block: u32) -> u32 {
        block.wrapping_sub(self.first)
    }

    /// Judges the whole pages that were read `at` a place of the file; one that is wrong is read again.
    pub(super) fn check(&self, file: &File, read: &mut [u8], at: u64, damaged: &mut Vec<DamagedPage>) {
        for (number, page) in read.chunks_exact_mut(PAGE_BYTES).enumerate() {
            let place = at + (number * PAGE_BYTES) as u64;
            let block = self.first.wrapping_add((place / PAGE_BYTES as u64) as u32);
            let pause = if damaged.len() < PATIENT_PAGES { PAUSE } else { Duration::ZERO };
            if let Some((stored, computed)) = judge_again(file, page, place, block, self.start, pause) {
                let path = self.listed.to_owned();
                damaged.push(DamagedPage { path, block, stored, computed, relation: None });
            }
        }
    }
}

/// Judges a page, and reads it again while it is wrong; returns its checksums when it stays so.
fn judge_again(
    file: &File,
    page: &mut [u8],
    place: u64,
    block: u32,
    start: Lsn,
    pause: Duration,
) -> Option<(u16, u16)> {
    let reads = if pause.is_zero() { 2 } else { READ_AGAIN };
    for attempt in 1..=reads {
        let PageState::Damaged { stored, computed } = judge(page, block, start) else { return None };
        if attempt == reads {
            return Some((stored, computed));
        }
        sleep(pause * attempt);
        match read_up_to(file, page, place) {
            Ok(length) if length == page.len() => {}
            // Cut off meanwhile: what was read first is as good as zeros.
            _ => return None,
        }
    }
    None
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_that_shrinks_is_filled_up_and_one_that_grows_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("1");
        fs::write(&path, vec![7; READ_BYTES + 10_000]).unwrap();
        let opened = open(&path).unwrap().unwrap();
        fs::write(&path, vec![7; READ_BYTES + 100]).unwrap();
        let mut whole = Vec::new();
        let listed = Path::new("pg_xact/0000");
        let mut take = |bytes: &[u8]| {
            whole.extend_from_slice(bytes);
            Ok(())
        };
        let (crc, damaged) = read(&opened, &path, listed, None, &mut Vec::new(), &mut take).unwrap();
        assert_eq!(whole.len(), READ_BYTES + 10_000);
        assert!(whole[..READ_BYTES + 100].iter().all(|byte| *byte == 7));
        assert!(whole[READ_BYTES + 100..].iter().all(|byte| *byte == 0));
        assert_eq!(crc, crc32c::crc32c(&whole));
        assert!(damaged.is_empty());
        fs::write(&path, vec![7; 2 * READ_BYTES]).unwrap();
        let mut length = 0;
        let mut take = |bytes: &[u8]| {
            length += bytes.len();
            Ok(())
        };
        read(&opened, &path, listed, None, &mut Vec::new(), &mut take).unwrap();
        assert_eq!(length, READ_BYTES + 10_000);
        assert!(open(&home.path().join("gone")).unwrap().is_none());
    }

    #[test]
    fn wrong_pages_of_relations_are_named_by_their_block_in_the_relation() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("1");
        let mut pages = vec![0; 3 * PAGE_BYTES + 100];
        pages[PAGE_BYTES + 1000] = 1;
        fs::write(&path, &pages).unwrap();
        let opened = open(&path).unwrap().unwrap();
        let check = Some(PageCheck { start: Lsn(1 << 40), file_blocks: 131_072 });
        let damaged = |listed: &str| {
            let listed = Path::new(listed);
            read(&opened, &path, listed, check, &mut Vec::new(), &mut |_| Ok(())).unwrap().1
        };
        let found = damaged("base/5/700.2");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].block, 2 * 131_072 + 1);
        assert!(damaged("base/5/pg_filenode.map").is_empty());
        assert!(damaged("pg_xact/0000").is_empty());
    }
}
