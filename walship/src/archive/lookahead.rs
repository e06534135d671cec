//! Which files PostgreSQL's archiver will ask for next: those that it marks as waiting in `archive_status`,
//! which is read and never changed.
//!
//! Source: `src/backend/postmaster/pgarch.c`: history files come first, then the others by name.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::pg::SegmentName;

/// As many names are remembered; then the folder is read again.
const NAMES_MAX: usize = 512;

/// The segments that wait behind the one that was asked for.
#[derive(Debug, Default)]
pub struct Waiting {
    names: VecDeque<SegmentName>,
    last: Option<SegmentName>,
}

impl Waiting {
    /// Returns the next `max` segments that will be asked for after `asked`, where `pg_wal` is the folder that
    /// it lies in. The folder is read when what is known of it is used up or does not fit.
    ///
    /// # Errors
    /// When `archive_status` cannot be read.
    pub fn behind(&mut self, asked: SegmentName, pg_wal: &Path, max: usize) -> Result<Vec<SegmentName>> {
        let in_order = self.last.is_some_and(|last| last <= asked) || self.names.front() == Some(&asked);
        while self.names.front().is_some_and(|name| *name <= asked) {
            self.names.pop_front();
        }
        if !in_order || self.names.len() < max {
            self.names = waiting(&pg_wal.join("archive_status"), asked)?;
        }
        self.last = Some(asked);
        Ok(self.names.iter().copied().take(max).collect())
    }
}

/// Returns the first [`NAMES_MAX`] whole segments behind `asked` that are marked as ready.
fn waiting(status: &Path, asked: SegmentName) -> Result<VecDeque<SegmentName>> {
    let failed = |error| Error::from_io(format!("reading {}", status.display()), error);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(status).map_err(failed)? {
        let file_name = entry.map_err(failed)?.file_name();
        let name = file_name.to_str().and_then(|name| name.strip_suffix(".ready"));
        if let Some(name) = name.and_then(|name| name.parse::<SegmentName>().ok())
            && name > asked
        {
            names.insert(name);
            if names.len() > NAMES_MAX {
                names.pop_last();
            }
        }
    }
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u64) -> SegmentName {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    fn names(numbers: &[u64]) -> Vec<SegmentName> {
        numbers.iter().copied().map(name).collect()
    }

    #[test]
    fn waiting_segments_come_in_the_archivers_order() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("archive_status");
        fs::create_dir(&status).unwrap();
        let mark =
            |number: u64, how: &str| fs::write(status.join(format!("{}.{how}", name(number))), "").unwrap();
        for number in [9, 3, 5, 4, 7] {
            mark(number, "ready");
        }
        mark(6, "done");
        fs::write(status.join("00000002.history.ready"), "").unwrap();
        fs::write(status.join("000000010000000000000008.partial.ready"), "").unwrap();
        let mut waiting = Waiting::default();
        assert_eq!(waiting.behind(name(3), folder.path(), 2).unwrap(), names(&[4, 5]));
        assert_eq!(waiting.behind(name(4), folder.path(), 9).unwrap(), names(&[5, 7, 9]));
        // What turned up meanwhile is seen when the known ones are used up.
        mark(10, "ready");
        assert_eq!(waiting.behind(name(7), folder.path(), 2).unwrap(), names(&[9, 10]));
        // An earlier one again.
        assert_eq!(waiting.behind(name(4), folder.path(), 1).unwrap(), names(&[5]));
        assert!(waiting.behind(name(4), Path::new("/nowhere"), 9).is_err());
    }
}
