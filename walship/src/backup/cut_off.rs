//! How far relations have been cut off since the backup that an incremental one builds on.
//!
//! What a relation had behind such a cut must not come back from the backup before. The server says of each file that it sends
//! in part how long the file is at least, and that is its length now (`GetFileBackupMethod` takes the larger of that and the cut,
//! where its own comment speaks of the smaller). Pages of zeros that were added behind the cut are in no WAL: the server does
//! not send them, and what was there before the cut would be taken for them.
//!
//! Source: `src/backend/backup/basebackup_incremental.c`; `src/backend/backup/walsummaryfuncs.c`.

use std::collections::HashMap;

use crate::catalog::ParentBackup;
use crate::error::{Error, Result};
use crate::pg::page::{Fork, RelationFile};
use crate::pg::{Lsn, Oid};
use crate::replication::options::Host;
use crate::replication::{ConnectOptions, Connection, SessionKind};

use super::names::field;

/// What is known of relations' lengths.
#[derive(Debug)]
pub(super) struct CutOff {
    /// So many blocks a file of a relation has before the next one begins.
    file_blocks: u32,
    /// The shortest that a fork of a relation has been.
    shortest: HashMap<(Oid, Oid, Oid, u32), u32>,
}

impl CutOff {
    /// Asks the server's WAL summaries, those that its incremental backup from `start` on comes from.
    ///
    /// # Errors
    /// What connecting and asking fail with: the role may be let into no database.
    pub(super) async fn read(
        server: &ConnectOptions,
        host: &Host,
        parent: &ParentBackup,
        start: Lsn,
    ) -> Result<Self> {
        let mut options = server.clone();
        options.hosts = vec![host.clone()];
        let mut session = Connection::connect(&options, SessionKind::Ordinary).await?;
        let size = session.query("SELECT setting FROM pg_settings WHERE name = 'segment_size'").await?;
        let file_blocks = field(&size, 0, 0)?;
        let rows = session
            .query(&format!(
                "SELECT c.reltablespace, c.reldatabase, c.relfilenode, c.relforknumber, min(c.relblocknumber) \
                 FROM pg_available_wal_summaries() s, \
                     LATERAL pg_wal_summary_contents(s.tli, s.start_lsn, s.end_lsn) c \
                 WHERE s.tli = {} AND s.start_lsn < '{start}' AND s.end_lsn > '{}' AND c.is_limit_block \
                 GROUP BY 1, 2, 3, 4",
                parent.timeline, parent.start_lsn
            ))
            .await?;
        session.close().await;
        let mut shortest = HashMap::with_capacity(rows.rows.len());
        for row in 0..rows.rows.len() {
            let key =
                (field(&rows, row, 0)?, field(&rows, row, 1)?, field(&rows, row, 2)?, field(&rows, row, 3)?);
            shortest.insert(key, field(&rows, row, 4)?);
        }
        match file_blocks {
            0 => Err(Error::corrupt("the server says that its files have no blocks")),
            _ => Ok(Self { file_blocks, shortest }),
        }
    }

    /// Returns how many blocks of a file can be as they were before, of those that it is said to have.
    pub(super) fn unchanged_blocks(&self, file: &RelationFile, said: u32) -> u32 {
        let fork = match file.fork {
            Fork::Main => 0,
            Fork::FreeSpaceMap => 1,
            Fork::VisibilityMap => 2,
            Fork::Init => 3,
        };
        let shortest = self.shortest.get(&(file.tablespace, file.database, file.filenode, fork));
        let before = u64::from(file.segment) * u64::from(self.file_blocks);
        let here = shortest.map(|blocks| u64::from(*blocks).saturating_sub(before));
        // A file that was cut off as a whole is sent as a whole.
        let here = here.filter(|blocks| *blocks > 0).and_then(|blocks| u32::try_from(blocks).ok());
        said.min(self.file_blocks).min(here.unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_counts_in_the_file_that_it_goes_through() {
        let shortest = HashMap::from([((1663, 5, 700, 0), 1500), ((1663, 5, 700, 2), 1)]);
        let cut = CutOff { file_blocks: 1000, shortest };
        let blocks = |path: &str, said| {
            cut.unchanged_blocks(&RelationFile::of(std::path::Path::new(path)).unwrap(), said)
        };
        // Where the cut lies behind the file, the file is whole; before it, it would not be sent in part.
        assert_eq!(blocks("base/5/700", 1000), 1000);
        assert_eq!(blocks("base/5/700.1", 800), 500);
        assert_eq!(blocks("base/5/700.1", 400), 400);
        assert_eq!(blocks("base/5/700.2", 800), 800);
        assert_eq!(blocks("base/5/700_vm", 3), 1);
        assert_eq!(blocks("base/5/701", 2000), 1000);
    }
}
