//! Up to where the archive reaches without a hole, and from which backup on: the last window of a timeline.
//!
//! What `pitr info` shows comes from the planner, which follows each window; here only the last one is wanted, and that
//! every minute.

use std::collections::BTreeMap;

use super::facts::WindowFacts;
use crate::catalog::Catalog;
use crate::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use crate::wal::event::{EventKind, WalEvent};

/// `wal_level = minimal`, as PostgreSQL writes it into parameter changes.
const WAL_LEVEL_MINIMAL: i32 = 0;

/// What an archive reaches on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The timeline.
    pub timeline: TimelineId,
    /// From here on WAL is there without a hole.
    pub unbroken_from: Lsn,
    /// Up to here.
    pub until: Lsn,
    /// What can be reached with the backups in between; `None` without one.
    pub window: Option<WindowFacts>,
}

/// Returns what can be reached at the end of the way to `timeline`; `None` where nothing is stored of it, or its history is
/// not. `newest` are events of segments that no roll-up covers.
pub fn reach(
    catalog: &Catalog,
    timeline: TimelineId,
    newest: &BTreeMap<TimelineId, Vec<WalEvent>>,
) -> Option<Reach> {
    let size = catalog.lineage.segment_size;
    let history = catalog.history(timeline)?;
    let tail = catalog.tails.as_ref().and_then(|tails| tails.get(&timeline));
    let tail = tail.and_then(|tail| catalog.served_tail(tail.segment));
    let last = catalog.segments.last_of_timeline(timeline);
    let (until, mut number) = match (tail, last) {
        (Some(tail), _) => (tail.until_lsn, tail.segment.number(size).checked_sub(1)),
        (None, Some(last)) => (last.end(size), Some(last.number(size))),
        (None, None) => return None,
    };
    let mut unbroken_from = match (tail, last) {
        (Some(tail), _) => tail.segment.start(size),
        (None, _) => until,
    };
    // From the end back, along the timelines that lead there.
    let mut on = Some(timeline);
    while let (Some(current), Some(at)) = (on, number) {
        let begin = begin_of(&history, current);
        let first_own = begin.0 / size.bytes();
        if at < first_own {
            on = parent_of(&history, current);
            continue;
        }
        let Some(name) = SegmentName::from_number(current, at, size) else { break };
        let runs = catalog.segments.runs(current);
        let Some(run) = runs.iter().find(|run| run.first <= name && name <= run.last) else { break };
        let first = run.first.number(size).max(first_own);
        unbroken_from = Lsn(first.saturating_mul(size.bytes()));
        number = first.checked_sub(1);
        if first > first_own {
            break;
        }
        on = parent_of(&history, current);
    }
    let broken = last_break(catalog, &history, newest, until);
    let first = catalog
        .backups
        .iter()
        .filter(|backup| {
            history.timeline_of(backup.start_lsn) == backup.timeline
                && history.timeline_of(Lsn(backup.stop_lsn.0.saturating_sub(1))) == backup.stop_timeline
                && backup.start_lsn >= unbroken_from
                && backup.stop_lsn <= until
                && broken.is_none_or(|broken| backup.start_lsn >= broken)
        })
        .min_by_key(|backup| backup.stop_lsn);
    let window = first.map(|backup| WindowFacts {
        from_lsn: backup.stop_lsn,
        from: backup.finished,
        until_lsn: until,
    });
    Some(Reach { timeline, unbroken_from, until, window })
}

/// Returns where a timeline begins on the way.
fn begin_of(history: &TimelineHistory, timeline: TimelineId) -> Lsn {
    parent_of(history, timeline).and_then(|parent| history.switch_lsn_of(parent)).unwrap_or(Lsn(0))
}

fn parent_of(history: &TimelineHistory, timeline: TimelineId) -> Option<TimelineId> {
    let way = history.ancestors.iter().map(|entry| entry.timeline);
    let before = way.take_while(|ancestor| *ancestor != timeline);
    before.last()
}

/// Returns where backups may start behind the last record on the way that no recovery crosses: `wal_level` became
/// minimal, or WAL was reset.
fn last_break(
    catalog: &Catalog,
    history: &TimelineHistory,
    newest: &BTreeMap<TimelineId, Vec<WalEvent>>,
    until: Lsn,
) -> Option<Lsn> {
    // Recovery may start at the record with which WAL begins: nothing before it can be crossed.
    let broken_from = |event: &WalEvent| match &event.kind {
        EventKind::ParameterChange { settings } if settings.wal_level == WAL_LEVEL_MINIMAL => {
            Some(Lsn(event.lsn.0 + 1))
        }
        EventKind::WalBegins { .. } => Some(event.lsn),
        _ => None,
    };
    let rolled_up = catalog.rollups.iter().map(|rollup| (rollup.timeline, &rollup.events));
    let all = rolled_up.chain(newest.iter().map(|(timeline, events)| (*timeline, events)));
    let on_way = all.flat_map(|(timeline, events)| {
        let is_on_way =
            move |event: &&WalEvent| history.timeline_of(event.lsn) == timeline && event.lsn < until;
        events.iter().filter(is_on_way)
    });
    on_way.filter_map(broken_from).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{BackupRecord, Lineage, StoredSegments, StoredTail};
    use crate::pg::SegmentSize;
    use crate::wal::event::ServerLimits;
    use chrono::DateTime;

    const SIZE: SegmentSize = SegmentSize::MIN;
    const MIB: u64 = 1 << 20;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// Segments as (timeline, first number, how many); backups as (timeline, start, stop) in MiB.
    fn catalog(segments: &[(u32, u64, u64)], backups: &[(u32, u64, u64)]) -> Catalog {
        let lineage = Lineage {
            number: 1,
            system_identifier: 1,
            segment_size: SIZE,
            postgres_major: 15,
            created: DateTime::UNIX_EPOCH,
        };
        let mut stored = StoredSegments::new(SIZE);
        for (on, first, many) in segments {
            for number in *first..first + many {
                stored.insert(SegmentName::from_number(timeline(*on), number, SIZE).unwrap(), 1);
            }
        }
        let backup = |(on, start, stop): &(u32, u64, u64)| BackupRecord {
            format: 1,
            id: format!("{on}-{start}"),
            label: String::new(),
            timeline: timeline(*on),
            start_lsn: Lsn(start * MIB),
            stop_timeline: timeline(*on),
            stop_lsn: Lsn(stop * MIB),
            started: DateTime::UNIX_EPOCH,
            finished: DateTime::from_timestamp(*start as i64, 0).unwrap(),
            server_version: 150_000,
            from_standby: false,
            data_bytes: 1,
            stored_bytes: 1,
            files: 1,
            tablespaces: Vec::new(),
            objects: Vec::new(),
            limits: limits(1),
            data_checksums: true,
            manifest_digest: String::new(),
            settings_files: Vec::new(),
            names: None,
            prepared: None,
            damaged_pages: None,
            parent: None,
        };
        // Timeline 2 leaves 1 in the middle of segment 10.
        let history = TimelineHistory::parse(timeline(2), "1\t0/A80000\twhy\n").unwrap();
        Catalog {
            cluster: "main".into(),
            lineage,
            histories: [(timeline(2), history)].into(),
            segments: stored,
            in_parts: BTreeMap::new(),
            tails: Some(BTreeMap::new()),
            stranded: BTreeMap::new(),
            lost_ends: BTreeMap::new(),
            rollups: Vec::new(),
            partials: Vec::new(),
            incomplete: Vec::new(),
            gaps: Vec::new(),
            backups: backups.iter().map(backup).collect(),
            orphaned_backups: Vec::new(),
            unfinished_backups: Vec::new(),
        }
    }

    fn limits(wal_level: i32) -> ServerLimits {
        ServerLimits {
            max_connections: 1,
            max_worker_processes: 1,
            max_wal_senders: 1,
            max_prepared_transactions: 1,
            max_locks_per_transaction: 1,
            wal_level,
            wal_log_hints: false,
            track_commit_timestamp: false,
        }
    }

    /// In MiB: unbroken from, until, and where the window begins.
    fn reached(catalog: &Catalog, on: u32, newest: &[WalEvent]) -> Option<(u64, u64, Option<u64>)> {
        let newest = BTreeMap::from([(TimelineId::FIRST, newest.to_vec())]);
        let reach = reach(catalog, timeline(on), &newest)?;
        let window = reach.window.map(|window| window.from_lsn.0 / MIB);
        Some((reach.unbroken_from.0 / MIB, reach.until.0 / MIB, window))
    }

    #[test]
    fn the_last_window_ends_at_holes_and_leads_across_forks() {
        let backups = &[(1, 2, 3), (1, 6, 7)];
        assert_eq!(reached(&catalog(&[], backups), 1, &[]), None);
        assert_eq!(reached(&catalog(&[(1, 1, 9)], backups), 1, &[]), Some((1, 10, Some(3))));
        assert_eq!(reached(&catalog(&[(1, 1, 3), (1, 5, 5)], backups), 1, &[]), Some((5, 10, Some(7))));
        assert_eq!(reached(&catalog(&[(1, 8, 2)], backups), 1, &[]), Some((8, 10, None)), "no backup there");
        // Along the fork: segment 10 is stored under the descendant's name.
        let forked = &[(1, 1, 9), (2, 10, 3)];
        assert_eq!(reached(&catalog(forked, backups), 2, &[]), Some((1, 13, Some(3))));
        assert_eq!(reached(&catalog(&[(1, 1, 8), (2, 10, 3)], backups), 2, &[]), Some((10, 13, None)));
        // What the old timeline wrote behind the fork is not on the way.
        let behind = &[(1, 11, 12)];
        assert_eq!(reached(&catalog(&[(1, 1, 20), (2, 10, 3)], behind), 2, &[]), Some((1, 13, None)));
        assert_eq!(reached(&catalog(forked, backups), 3, &[]), None, "its history is not stored");
    }

    #[test]
    fn the_open_segment_counts_and_no_window_crosses_a_break() {
        let backups = &[(1, 2, 3), (1, 6, 7)];
        let mut with_tail = catalog(&[(1, 1, 9)], backups);
        let tail = StoredTail {
            segment: SegmentName::from_number(TimelineId::FIRST, 10, SIZE).unwrap(),
            until_lsn: Lsn(10 * MIB + 8),
            end_lsn: Lsn(10 * MIB + 16),
            parts: 1,
            stored_bytes: 1,
            flaw: None,
            lost_from: None,
        };
        with_tail.tails = Some([(TimelineId::FIRST, tail)].into());
        let reach = reach(&with_tail, TimelineId::FIRST, &BTreeMap::new()).unwrap();
        // Timeline 2 leaves timeline 1 inside of that segment: it is served.
        assert_eq!((reach.unbroken_from, reach.until), (Lsn(MIB), Lsn(10 * MIB + 8)));
        let minimal = WalEvent {
            lsn: Lsn(4 * MIB),
            end_lsn: Lsn(4 * MIB + 8),
            xid: 0,
            kind: EventKind::ParameterChange { settings: limits(WAL_LEVEL_MINIMAL) },
        };
        let catalog = catalog(&[(1, 1, 9)], backups);
        assert_eq!(reached(&catalog, 1, &[minimal]), Some((1, 10, Some(7))));
    }
}
