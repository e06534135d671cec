//! What to do when the server does not have the WAL any more that is asked of it.

use chrono::Utc;

use super::Receiver;
use super::prepare::no_archive;
use super::{ReceiveEvent, stopped};
use crate::archive::give_up::record_lost;
use crate::archive::{stored_in_parts, whole_from_parts};
use crate::error::{Error, Result};
use crate::feed::{Known, Search, Start, Stretch, first_missing, owner, start_at, stretches, younger};
use crate::pg::{Lsn, SegmentName, TimelineHistory};
use crate::replication::stream::still_has;
use crate::replication::{ConnectOptions, Connection, ServerError, SessionKind};
use crate::repository::load_catalog;

/// A server that has removed WAL which was asked of it.
#[derive(Debug)]
pub(super) struct Removed {
    /// It alone.
    server: ConnectOptions,
    /// How far its WAL goes.
    end: Lsn,
    is_standby: bool,
}

impl Receiver {
    /// Takes note of what the server says about WAL that it does not have, and says it clearly.
    pub(super) fn streaming_failed(&mut self, connection: &Connection, error: Error, from: Lsn) -> Error {
        match ServerError::of(&error) {
            Some(said) if said.code == "58P01" => {}
            Some(said) if said.code == "55000" => return self.slot_refused(connection, &error, said),
            _ => return error,
        }
        let mut server = self.server.clone();
        server.hosts.retain(|host| host == connection.host());
        let is_standby = connection.is_standby();
        self.removed = Some(Removed { server, end: self.report.server_lsn, is_standby });
        Error::unavailable(format!(
            "the server has removed WAL from {from} on, which is not in the repository: {error}"
        ))
        .with_safe("nothing was skipped; what is stored is unchanged")
        .with_next("Name the primary, or a standby that has this WAL; it is tried again.")
    }

    /// Goes on elsewhere when the server has removed what was asked of it; returns whether there is a place.
    ///
    /// A restored server has a segment with several forks under the youngest name only, and may not have the
    /// segment before its first one: what is stored of that in parts may be all of its WAL. Others may have
    /// stored meanwhile what is asked for. What is nowhere is lost: that is recorded in every repository before
    /// streaming goes on behind it. Only a primary's word counts for that.
    ///
    /// # Errors
    /// What the repositories and the server say; the same is tried again then.
    pub(super) async fn go_on_elsewhere(&mut self) -> Result<bool> {
        let Some(removed) = self.removed.take() else { return Ok(false) };
        let Some(archive) = &mut self.archive else { return Ok(false) };
        let (Some(path), Some(next)) = (archive.path.clone(), archive.next) else { return Ok(false) };
        let size = archive.size;
        if let Some(younger) = younger(&path, next, size) {
            archive.next = Some(younger);
            return Ok(true);
        }
        let segment = SegmentName::containing(next.timeline, next.lsn, size);
        if let Some(file) = whole_from_parts(segment, &archive.lineages, &archive.push).await? {
            archive.uploads.encoded_segment(segment, size, file);
            archive.next = Some(start_at(&path, segment.number(size) + 1, size));
            return Ok(true);
        }
        let number = segment.number(size);
        let stored_to = self.stored_meanwhile(&path, number).await?;
        if stored_to > number {
            self.go_on_at(start_at(&path, stored_to, size));
            return Ok(true);
        }
        // The segment that is being written is there, whatever was said.
        if removed.is_standby || number >= removed.end.0 / size.bytes() {
            return Ok(false);
        }
        let first = first_there(&removed, &path, number, size).await?;
        if first == number {
            return Ok(false);
        }
        self.record(stretches(&path, number, first, size), &removed).await?;
        self.go_on_at(start_at(&path, first, size));
        Ok(true)
    }

    /// Goes on at `start`: from where it would have gone on to there, all is in the repositories, or recorded
    /// as lost.
    fn go_on_at(&mut self, start: Start) {
        let Some(archive) = &mut self.archive else { return };
        let from = archive.next.map_or(start.lsn, |next| next.lsn);
        archive.frontier.add(from, start.lsn);
        archive.next = Some(start);
        self.report.durable_lsn = archive.frontier.durable();
    }

    /// Returns the number of the first segment from `number` on that a repository lacks.
    async fn stored_meanwhile(&self, path: &TimelineHistory, number: u64) -> Result<u64> {
        let archive = self.archive.as_ref().ok_or_else(no_archive)?;
        let mut first = u64::MAX;
        for lineage in archive.lineages.iter() {
            let catalog = load_catalog(lineage).await?;
            let (stored, size) = (&catalog.segments, archive.size);
            let known = Known { path, stored, size, slot: None, flushed: Lsn::INVALID };
            first = first.min(first_missing(&known, number));
        }
        Ok(first)
    }

    /// Records in every repository that these stretches are lost, and says so. What came before is durable then; what is
    /// stored in parts of the first segment is not lost.
    async fn record(&mut self, mut lost: Vec<Stretch>, removed: &Removed) -> Result<()> {
        while self.archive.as_ref().is_some_and(|archive| !archive.uploads.is_empty()) {
            let archive = self.archive.as_mut().ok_or_else(no_archive)?;
            tokio::select! {
                stored = archive.next() => self.note(stored?),
                _ = stopped(&mut self.stop) => return Err(Error::unavailable("it is time to stop")),
            }
        }
        let archive = self.archive.as_ref().ok_or_else(no_archive)?;
        if let Some(first) = lost.first_mut() {
            let segment = SegmentName::containing(first.timeline, first.start, archive.size);
            let stored = stored_in_parts(segment, &archive.lineages, &archive.push).await?;
            // What the spool has follows.
            let held = archive.spooled.as_ref().and_then(|spooled| spooled.spool.segment(segment));
            let stored = stored.max(held.map_or(0, |held| held.end));
            first.start = Lsn(first.start.0 + stored);
        }
        let host = removed.server.hosts.first().map(ToString::to_string).unwrap_or_default();
        let why =
            format!("{host} had removed it before it was received through the slot {}", self.options.slot);
        for Stretch { timeline, start, end } in &lost {
            let lineages = &archive.lineages;
            record_lost(lineages, *timeline, *start, *end, &why, Utc::now()).await?;
            let told = Error::missing(format!(
                "WAL is lost: {} bytes from {start} to {end} on {timeline:?}. {why}",
                end.bytes_since(*start)
            ))
            .with_safe(
                "the loss stands in the ledger of gaps of every repository; all that is stored before it and from \
                 now on is good",
            )
            .with_next(
                "No target inside of it can be reached, and none behind it from a backup before it: take a new base \
                 backup now (`walship backup`). If an archive or a standby has the segments, push them with `walship \
                 wal push`: that closes the gap. Raise max_slot_wal_keep_size if the slot had to let go of them.",
            );
            (self.progress)(ReceiveEvent::WalIsLost { report: told.report() });
        }
        Ok(())
    }
}

/// Asks the server for the number of the first segment from `number` on that it still has.
async fn first_there(
    removed: &Removed,
    path: &TimelineHistory,
    number: u64,
    size: crate::pg::SegmentSize,
) -> Result<u64> {
    let ask = async |number: u64| {
        let mut connection = Connection::connect(&removed.server, SessionKind::Replication).await?;
        let start = Lsn(number.saturating_mul(size.bytes()));
        still_has(&mut connection, owner(path, number, size), start).await
    };
    if ask(number).await? {
        return Ok(number);
    }
    let mut search = Search::between(number, removed.end.0 / size.bytes());
    while let Some(number) = search.question() {
        let there = ask(number).await?;
        search.answer(number, there);
    }
    Ok(search.first())
}
