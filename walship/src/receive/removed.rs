//! What to do when the server does not have the WAL any more that is asked of it.

use super::Receiver;
use crate::archive::whole_from_parts;
use crate::error::{Error, Result};
use crate::feed::{start_at, younger};
use crate::pg::{Lsn, SegmentName};
use crate::replication::ServerError;

impl Receiver {
    /// Takes note of what the server says about WAL that it does not have, and says it clearly.
    pub(super) fn streaming_failed(&mut self, error: Error, from: Lsn) -> Error {
        self.wal_is_removed = ServerError::of(&error).is_some_and(|said| said.code == "58P01");
        if !self.wal_is_removed {
            return error;
        }
        Error::missing(format!("the server has removed WAL from {from} on, which is not in the repository: {error}"))
            .with_safe("nothing was skipped; what is stored is unchanged")
            .with_next(
                "Push the missing segments from an archive or a standby that has them with `walship wal push`. If \
                 they are lost, no moment behind them can be reached from an older backup: take a new base backup.",
            )
    }

    /// Goes on elsewhere when the server has removed what was asked of it; returns whether there is a place.
    ///
    /// A restored server has a segment with several forks under the youngest name only, and may not have the
    /// segment before its first one: what is stored of that in parts may be all of its WAL.
    ///
    /// # Errors
    /// What the repositories say.
    pub(super) async fn go_on_elsewhere(&mut self) -> Result<bool> {
        if !std::mem::take(&mut self.wal_is_removed) {
            return Ok(false);
        }
        let Some(archive) = &mut self.archive else { return Ok(false) };
        let (Some(path), Some(next)) = (&archive.path, archive.next) else { return Ok(false) };
        let size = archive.size;
        if let Some(younger) = younger(path, next, size) {
            archive.next = Some(younger);
            return Ok(true);
        }
        let segment = SegmentName::containing(next.timeline, next.lsn, size);
        let Some(file) = whole_from_parts(segment, &archive.lineages, &archive.push).await? else {
            return Ok(false);
        };
        archive.uploads.segment(segment, size, tokio::spawn(async { Ok(file) }));
        archive.next = Some(start_at(path, segment.number(size) + 1, size));
        Ok(true)
    }
}
