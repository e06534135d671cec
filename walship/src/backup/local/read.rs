//! One file of a running server read, checked page by page, and handed to a packer. Blocking.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use chrono::{DateTime, Utc};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::catalog::DamagedPage;
use crate::error::{Error, Result};
use crate::pg::Lsn;
use crate::pg::page::{PAGE_BYTES, PageState, RelationFile, judge};

/// How much is read at once where it is only looked at: whole pages.
pub(super) const READ_BYTES: usize = 1 << 20;

/// So far ahead of what is being worked on the kernel is told to read: a disk does not wait for the processor then.
const AHEAD_BYTES: u64 = 2 << 20;

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

impl Opened {
    /// Returns what the file begins with, at most `most` bytes.
    ///
    /// # Errors
    /// What reading fails with.
    pub(super) fn beginning(&self, most: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.bytes).unwrap_or(most).min(most)];
        let there = read_up_to(&self.file, &mut bytes, 0)?;
        bytes.truncate(there);
        Ok(bytes)
    }
}

/// Where a file's bytes go.
pub(super) trait Destination {
    /// Returns room for the next bytes, whole pages or `wanted`.
    fn room(&mut self, wanted: usize) -> &mut [u8];

    /// So many bytes of the room are the file's.
    ///
    /// # Errors
    /// Why no more is wanted.
    fn took(&mut self, length: usize) -> Result<()>;
}

/// Reads an open file into its destination; where the file has become shorter, zeros: what was cut off is cut off again
/// by replay. Returns its CRC-32C and the pages that are damaged.
///
/// # Errors
/// [`Error::LocalIo`] when reading fails; what the destination fails with.
pub(super) fn read(
    opened: &Opened,
    source: &Path,
    listed: &Path,
    check: Option<PageCheck>,
    into: &mut dyn Destination,
) -> Result<(u32, Vec<DamagedPage>)> {
    let failed = |error| Error::from_io(format!("reading {}", source.display()), error);
    let pages = Pages::of(listed, check);
    let (mut at, mut crc, mut damaged) = (0u64, 0, Vec::new());
    let mut ahead = Ahead::default();
    while at < opened.bytes {
        ahead.keep(opened, at);
        let wanted = usize::try_from(opened.bytes - at).unwrap_or(usize::MAX);
        let buffer = into.room(wanted);
        let length = buffer.len();
        if length == 0 {
            return Err(Error::invalid(format!("there is no room for {}", listed.display())));
        }
        read_checked(opened, pages.as_ref(), buffer, at, &mut damaged).map_err(failed)?;
        crc = crc32c::crc32c_append(crc, buffer);
        into.took(length)?;
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
                damaged.push(DamagedPage { path, block, stored, computed, database: None, relation: None });
            }
        }
    }
}

/// Up to where the kernel was told to read.
#[derive(Default)]
pub(super) struct Ahead(u64);

impl Ahead {
    /// Has the kernel read ahead of `at`. Advice: where it is not taken, reading waits for the disk.
    pub(super) fn keep(&mut self, opened: &Opened, at: u64) {
        while self.0 < opened.bytes.min(at + AHEAD_BYTES) {
            let (Ok(from), Ok(length)) = (i64::try_from(self.0), i64::try_from(AHEAD_BYTES)) else { return };
            let _ = posix_fadvise(&opened.file, from, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            self.0 += AHEAD_BYTES;
        }
    }
}

/// A destination that hands on what it was given.
pub(super) struct Passing<'a> {
    pub(super) buffer: &'a mut Vec<u8>,
    pub(super) take: &'a mut dyn FnMut(&[u8]) -> Result<()>,
}

impl Destination for Passing<'_> {
    fn room(&mut self, wanted: usize) -> &mut [u8] {
        self.buffer.resize(wanted.min(READ_BYTES), 0);
        self.buffer
    }

    fn took(&mut self, length: usize) -> Result<()> {
        (self.take)(&self.buffer[..length])
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

/// Fills the buffer from `at` on, with zeros where the file has become shorter, and checks the pages that are there.
///
/// # Errors
/// What reading fails with.
pub(super) fn read_checked(
    opened: &Opened,
    pages: Option<&Pages<'_>>,
    buffer: &mut [u8],
    at: u64,
    damaged: &mut Vec<DamagedPage>,
) -> io::Result<()> {
    let there = read_up_to(&opened.file, buffer, at)?;
    buffer[there..].fill(0);
    if let Some(pages) = pages {
        // What the file has lost meanwhile is no page, and neither is an end that is shorter than one.
        pages.check(&opened.file, &mut buffer[..there], at, damaged);
    }
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
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

    const PIECE_BYTES: usize = 15 * PAGE_BYTES;

    /// Keeps everything; its room has something in it.
    #[derive(Default)]
    struct Whole {
        room: Vec<u8>,
        bytes: Vec<u8>,
    }

    impl Destination for Whole {
        fn room(&mut self, wanted: usize) -> &mut [u8] {
            self.room = vec![0xEE; wanted.min(PIECE_BYTES)];
            &mut self.room
        }

        fn took(&mut self, length: usize) -> Result<()> {
            self.bytes.extend_from_slice(&self.room[..length]);
            Ok(())
        }
    }

    #[test]
    fn a_file_that_shrinks_is_filled_up_and_one_that_grows_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("1");
        fs::write(&path, vec![7; 2 * PIECE_BYTES + 10_000]).unwrap();
        let opened = open(&path).unwrap().unwrap();
        fs::write(&path, vec![7; PIECE_BYTES + 100]).unwrap();
        let listed = Path::new("pg_xact/0000");
        let mut whole = Whole::default();
        let (crc, damaged) = read(&opened, &path, listed, None, &mut whole).unwrap();
        let whole = whole.bytes;
        assert_eq!(whole.len(), 2 * PIECE_BYTES + 10_000);
        assert!(whole[..PIECE_BYTES + 100].iter().all(|byte| *byte == 7));
        assert!(whole[PIECE_BYTES + 100..].iter().all(|byte| *byte == 0));
        assert_eq!(crc, crc32c::crc32c(&whole));
        assert!(damaged.is_empty());
        assert_eq!(opened.beginning(5000).unwrap(), [7; 5000]);
        assert_eq!(opened.beginning(1 << 30).unwrap().len(), PIECE_BYTES + 100);
        fs::write(&path, vec![7; 4 * PIECE_BYTES]).unwrap();
        let mut whole = Whole::default();
        read(&opened, &path, listed, None, &mut whole).unwrap();
        assert_eq!(whole.bytes.len(), 2 * PIECE_BYTES + 10_000);
        assert!(open(&home.path().join("gone")).unwrap().is_none());
    }

    #[test]
    fn wrong_pages_of_relations_are_named_by_their_block_in_the_relation() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("1");
        let mut pages = vec![0; 40 * PAGE_BYTES + 100];
        pages[PAGE_BYTES + 1000] = 1;
        pages[33 * PAGE_BYTES + 1000] = 1;
        fs::write(&path, &pages).unwrap();
        let opened = open(&path).unwrap().unwrap();
        let check = Some(PageCheck { start: Lsn(1 << 40), file_blocks: 131_072 });
        let damaged = |listed: &str| {
            let listed = Path::new(listed);
            read(&opened, &path, listed, check, &mut Whole::default()).unwrap().1
        };
        let found: Vec<u32> = damaged("base/5/700.2").iter().map(|page| page.block).collect();
        assert_eq!(found, [2 * 131_072 + 1, 2 * 131_072 + 33]);
        assert!(damaged("base/5/pg_filenode.map").is_empty());
        assert!(damaged("pg_xact/0000").is_empty());
    }
}
