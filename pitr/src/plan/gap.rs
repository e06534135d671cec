//! WAL that is missing: found by LSN arithmetic along history files, with what tells that it existed.

use serde::Serialize;
use walship::catalog::{BackupRecord, BackupWal, Catalog, GapRecord};
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};

use super::chain::{ChainEnding, begin_of};

/// WAL that is missing, and that is known to have been there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The first segment that is missing.
    pub first_missing: SegmentName,
    /// The last segment that is missing (inclusive).
    pub last_missing: SegmentName,
    /// Where WAL is missing from.
    pub from: Lsn,
    /// Where it goes on, or up to where there is known to have been some.
    pub to: Lsn,
    /// Whether a copy of the first missing one is kept apart as incomplete.
    pub kept_incomplete: bool,
    /// What tells that there was WAL.
    pub known_by: KnownBy,
    /// What the ledger of gaps says of it.
    pub ledger: Vec<GapRecord>,
    /// Whether all of it was removed on purpose, by retention.
    pub expired: bool,
}

/// What tells that there was WAL where none is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum KnownBy {
    /// Later WAL is stored on the same way.
    LaterWal,
    /// Nothing later is stored; the ledger of gaps has it.
    Ledger,
    /// Nothing later is stored; a backup is complete only with it.
    Backup {
        /// The backup's id.
        id: String,
    },
    /// Nothing later is stored; the index tells of it.
    Index,
    /// No WAL is stored later that could be used, but a file of this later segment that is not whole.
    Piece {
        /// The segment.
        segment: SegmentName,
    },
    /// Nothing later is stored; a timeline left this way only later.
    Fork {
        /// That timeline.
        timeline: TimelineId,
    },
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (one, several) =
            if self.expired { ("was removed", "were removed") } else { ("is missing", "are missing") };
        if self.first_missing == self.last_missing {
            write!(f, "segment {} {one}", self.first_missing)?;
        } else {
            write!(f, "segments {} to {} {several}", self.first_missing, self.last_missing)?;
        }
        write!(f, " ({} to {})", self.from, self.to)?;
        match &self.known_by {
            KnownBy::LaterWal | KnownBy::Ledger => {}
            KnownBy::Index => f.write_str(", which were stored when the index was written")?,
            KnownBy::Backup { id } => write!(f, ", which backup {id} was complete with")?,
            KnownBy::Piece { segment } => {
                write!(f, ", behind which a file of {segment} is stored that is not whole")?
            }
            KnownBy::Fork { timeline } => write!(f, ", behind which timeline {timeline} begins")?,
        }
        if self.kept_incomplete {
            f.write_str("; a copy is kept apart as incomplete")?;
        }
        for record in &self.ledger {
            write!(f, "; {record}")?;
        }
        Ok(())
    }
}

/// Returns what a chain that cannot go on at `at` ends with.
pub(super) fn ending_at(catalog: &Catalog, history: &TimelineHistory, at: Lsn) -> ChainEnding {
    let size = catalog.lineage.segment_size;
    let missing = SegmentName::containing(history.timeline_of(at), at, size);
    let resumes = resumes_at(catalog, history, at).map(|to| (to, KnownBy::LaterWal));
    let Some((to, known_by)) = resumes.or_else(|| known_end(catalog, history, at)) else {
        return ChainEnding::EndOfArchive;
    };
    let last_timeline = history.timeline_of(Lsn(to.0.saturating_sub(1)));
    let last_missing = SegmentName::ending_at(last_timeline, to, size).unwrap_or(missing);
    let ledger = on_the_way(catalog, history).filter(|(_, start, end)| *start < to && *end > at);
    let ledger: Vec<_> = ledger.collect();
    let expired = ledger.iter().filter(|(record, ..)| record.is_expired());
    let mut expired: Vec<(Lsn, Lsn)> = expired.map(|(_, start, end)| (*start, *end)).collect();
    expired.sort_unstable();
    // From where on something is missing that was not removed.
    let lost = expired
        .iter()
        .fold(at, |reached, (start, end)| if *start <= reached { reached.max(*end) } else { reached });
    ChainEnding::Gap(Gap {
        first_missing: missing,
        last_missing,
        from: at,
        to,
        kept_incomplete: catalog.incomplete.contains(&missing),
        known_by,
        ledger: ledger.into_iter().map(|(record, ..)| record.clone()).collect(),
        expired: lost >= to,
    })
}

/// Returns where the first segment begins that is stored behind `at` on this way.
fn resumes_at(catalog: &Catalog, history: &TimelineHistory, at: Lsn) -> Option<Lsn> {
    let size = catalog.lineage.segment_size;
    let path = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
    let stored = path.filter_map(|timeline| {
        let begin = begin_of(history, timeline).unwrap_or(Lsn(0));
        let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
        // The first that starts behind `at` and does not end before the timeline begins.
        let behind = SegmentName::containing(timeline, at, size).next(size)?;
        let own = SegmentName::containing(timeline, begin, size);
        let first = catalog.first_stored_from(behind.max(own))?;
        (first.start(size) < left_at).then_some(first.start(size))
    });
    stored.min()
}

/// Returns the open gaps of the ledger that lie on this way, each with the part that does: what lies behind
/// the point where the way left a timeline, or before the timeline begins, is another way's.
fn on_the_way<'a>(
    catalog: &'a Catalog,
    history: &TimelineHistory,
) -> impl Iterator<Item = (&'a GapRecord, Lsn, Lsn)> {
    catalog.gaps.iter().filter_map(|record| {
        if !history.contains(record.timeline) {
            return None;
        }
        let begin = begin_of(history, record.timeline).unwrap_or(Lsn(0));
        let left_at = history.switch_lsn_of(record.timeline).unwrap_or(Lsn(u64::MAX));
        let (start, end) = (record.start_lsn.max(begin), record.end_lsn.min(left_at));
        (start < end).then_some((record, start, end))
    })
}

/// Returns up to where there is known to have been WAL on this way behind `at`, behind which none is stored.
fn known_end(catalog: &Catalog, history: &TimelineHistory, at: Lsn) -> Option<(Lsn, KnownBy)> {
    let ledger = on_the_way(catalog, history).map(|(_, _, end)| (end, KnownBy::Ledger));
    let backups = catalog.backups.iter().filter(|backup| is_on_path(history, backup));
    let backups = backups.map(|backup| (backup.stop_lsn, KnownBy::Backup { id: backup.id.clone() }));
    // The segment that holds a fork need not be stored on the timeline that is left: the server may have
    // ended before it was full.
    let segment = |lsn: Lsn| lsn.0 / catalog.lineage.segment_size.bytes();
    let forks = catalog.histories.values().flat_map(|other| {
        let left = other.ancestors.iter().filter_map(|entry| {
            // Both have this WAL as far as they have come the same way.
            let end = entry.switch_lsn.min(history.switch_lsn_of(entry.timeline).unwrap_or(Lsn(u64::MAX)));
            let same = history.contains(entry.timeline)
                && begin_of(other, entry.timeline) == begin_of(history, entry.timeline);
            (same && segment(end) > segment(at)).then_some((end, KnownBy::Fork { timeline: other.timeline }))
        });
        left.collect::<Vec<_>>()
    });
    let indexed = catalog.lost_ends.iter().filter_map(|(timeline, last)| {
        let left_at = history.switch_lsn_of(*timeline).unwrap_or(Lsn(u64::MAX));
        let end = last.end(catalog.lineage.segment_size).min(left_at);
        history.contains(*timeline).then_some((end, KnownBy::Index))
    });
    // `restore-cmd` takes them for a proof as well. Of the segment at `at` itself they prove nothing behind it.
    let pieces = catalog.partials.iter().chain(&catalog.incomplete).filter_map(|&segment| {
        let start = segment.start(catalog.lineage.segment_size);
        let begin = begin_of(history, segment.timeline).unwrap_or(Lsn(0));
        let left_at = history.switch_lsn_of(segment.timeline).unwrap_or(Lsn(u64::MAX));
        let ours = history.contains(segment.timeline)
            && start < left_at
            && segment.end(catalog.lineage.segment_size) > begin;
        ours.then_some((start, KnownBy::Piece { segment }))
    });
    let ledger = ledger.filter(|(end, _)| *end > at).max_by_key(|(end, _)| *end);
    let others = backups
        .chain(forks)
        .chain(indexed)
        .chain(pieces)
        .filter(|(end, _)| *end > at)
        .max_by_key(|(end, _)| *end);
    match (ledger, others) {
        // The ledger tells why.
        (Some(ledger), Some(other)) if ledger.0 < other.0 => Some((other.0, ledger.1)),
        (Some(ledger), _) => Some(ledger),
        (None, others) => others,
    }
}

/// Returns whether a backup was taken on this way, to its end.
pub(crate) fn is_on_path(history: &TimelineHistory, backup: &BackupRecord) -> bool {
    wal_is_on_path(history, &backup.wal())
}

/// Returns whether the WAL that makes a backup consistent lies on this way.
pub(crate) fn wal_is_on_path(history: &TimelineHistory, wal: &BackupWal) -> bool {
    // A backup's last byte must still lie on its timeline: one that ended after the fork holds pages
    // that this path never wrote.
    history.timeline_of(wal.start_lsn) == wal.timeline
        && history.timeline_of(Lsn(wal.stop_lsn.0.saturating_sub(1))) == wal.stop_timeline
}
