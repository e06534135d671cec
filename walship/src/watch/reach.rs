//! Up to where the archive reaches, and from which backup on: the last window of a timeline.
//!
//! What `pitr info` shows comes from the planner, which follows each window; here only the last one is wanted, and that
//! every minute.

use std::collections::BTreeMap;

use super::facts::WindowFacts;
use crate::catalog::{BackupRecord, Catalog, GapRecord};
use crate::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use crate::wal::event::{EventKind, WalEvent};

/// `wal_level = minimal`, as PostgreSQL writes it into parameter changes.
const WAL_LEVEL_MINIMAL: i32 = 0;

/// What an archive reaches on one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// The timeline.
    pub timeline: TimelineId,
    /// Up to here a restore gets: the end of the last window; without any, the end of what is stored.
    pub until: Lsn,
    /// The last window; `None` without a backup that is of use.
    pub window: Option<WindowFacts>,
    /// Whether more is stored behind a record there that no recovery crosses, and no backup behind it: `wal_level` became
    /// minimal, or WAL was reset.
    pub is_cut: bool,
    /// WAL that is missing behind the first backup, and of which the ledger knows nothing.
    pub holes: Vec<Hole>,
    /// How many gaps of the ledger that are nobody's intention lie where no backup of use begins behind them.
    pub bare_gaps: u64,
}

/// WAL that is missing although nobody said so. What is stored side by side looks like that for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// Where it begins.
    pub from: Lsn,
    /// How many bytes lie between it and the end of what is stored.
    pub behind_bytes: u64,
    /// Whether no backup of use begins behind it.
    pub is_bare: bool,
}

/// WAL in a row, or what of it recovery crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    from: Lsn,
    to: Lsn,
}

/// Returns what can be reached at the end of the way to `timeline`; `None` where nothing is stored on it, or its history is
/// not. `newest` are events of segments that no roll-up covers.
pub fn reach(
    catalog: &Catalog,
    timeline: TimelineId,
    newest: &BTreeMap<TimelineId, Vec<WalEvent>>,
) -> Option<Reach> {
    let history = catalog.history(timeline)?;
    let stored = spans(catalog, &history);
    let end = stored.last()?.to;
    let crossed = crossed(&stored, &breaks(catalog, &history, newest));
    let first_in = |span: &Span| {
        let inside = |backup: &&BackupRecord| {
            backup.start_lsn >= span.from && backup.stop_lsn <= span.to && is_on_way(&history, backup)
        };
        catalog.backups.iter().filter(inside).min_by_key(|backup| backup.stop_lsn)
    };
    let found = crossed.iter().rev().find_map(|span| Some((span, first_in(span)?)));
    let window = found.map(|(span, backup)| WindowFacts {
        from_lsn: backup.stop_lsn,
        from: backup.finished,
        until_lsn: span.to,
    });
    let until = window.map_or(end, |window| window.until_lsn);
    let window_ends_before = |lsn: Lsn| window.is_none_or(|window| window.until_lsn <= lsn);
    // What lies on a timeline that was left before takes nothing away from where the way leads.
    let way = way(&history);
    let on_way_of = catalog.gaps.iter().filter(|gap| !gap.is_expired()).filter_map(|gap| part_of(&way, gap));
    // Parts of the segment in which one begins may lead into it, and no restore through it.
    let is_bare = |part: &Span| window.is_none_or(|window| window.until_lsn < part.to);
    let bare_gaps = on_way_of.filter(is_bare).count() as u64;
    let holes = missing(catalog, &history, &stored).into_iter().map(|hole| Hole {
        from: hole.from,
        behind_bytes: end.0.saturating_sub(hole.to.0),
        is_bare: window_ends_before(hole.from),
    });
    Some(Reach {
        timeline,
        until,
        window,
        is_cut: window.is_some() && until < end && !stored.iter().any(|span| span.to == until),
        holes: holes.collect(),
        bare_gaps,
    })
}

/// Returns the WAL that is missing on timelines that the way to `main` does not lead along, or leaves before, behind the first
/// backup, and of which the ledger knows nothing. No backup can be taken there any more.
pub fn left_holes(catalog: &Catalog, main: &TimelineHistory) -> Vec<(TimelineId, Hole)> {
    let others = catalog.timelines().into_iter().filter(|timeline| catalog.has_wal_of(*timeline));
    let of_one = |timeline: TimelineId| {
        let history = catalog.history(timeline)?;
        let stored = spans(catalog, &history);
        let end = stored.last()?.to;
        let begin = history.begin_lsn().unwrap_or(Lsn(0));
        // What is told of the main way is not told again.
        let left = match main.contains(timeline) {
            true => main.switch_lsn_of(timeline)?,
            false => Lsn(0),
        };
        let is_left = |hole: &Span| hole.to > begin && hole.from >= left;
        let holes = missing(catalog, &history, &stored).into_iter().filter(is_left).map(|hole| Hole {
            from: hole.from,
            behind_bytes: end.0.saturating_sub(hole.to.0),
            is_bare: false,
        });
        Some(holes.map(|hole| (timeline, hole)).collect::<Vec<_>>())
    };
    others.filter_map(of_one).flatten().collect()
}

/// Returns what is missing between what is stored on a way, behind its first backup, and of which the ledger does not know.
fn missing(catalog: &Catalog, history: &TimelineHistory, stored: &[Span]) -> Vec<Span> {
    let backups = catalog.backups.iter().filter(|backup| is_on_way(history, backup));
    let Some(oldest) = backups.map(|backup| backup.start_lsn).min() else { return Vec::new() };
    let way = way(history);
    let between = stored.windows(2).map(|pair| Span { from: pair[0].to, to: pair[1].from });
    between.filter(|hole| oldest < hole.to && !is_in_ledger(catalog, &way, hole.from, hole.to)).collect()
}

fn is_on_way(history: &TimelineHistory, backup: &BackupRecord) -> bool {
    history.timeline_of(backup.start_lsn) == backup.timeline
        && history.timeline_of(Lsn(backup.stop_lsn.0.saturating_sub(1))) == backup.stop_timeline
}

/// Returns where the last WAL ends that is stored on the way to a timeline.
pub fn end_of_way(catalog: &Catalog, history: &TimelineHistory) -> Option<Lsn> {
    spans(catalog, history).last().map(|span| span.to)
}

/// Returns the segment that holds the byte at `lsn` on the way, as a server asks for it: of the youngest timeline that has it.
pub fn stored_at(catalog: &Catalog, history: &TimelineHistory, lsn: Lsn) -> Option<SegmentName> {
    let size = catalog.lineage.segment_size;
    let mut way = way(history).into_iter().rev();
    way.find_map(|(timeline, begin, end)| {
        let name = SegmentName::containing(timeline, lsn, size);
        let is_own = begin < name.end(size) && lsn < end;
        let is_there = || catalog.segments.contains(name) || catalog.served_tail(name).is_some();
        (is_own && is_there()).then_some(name)
    })
}

/// Returns the timelines on the way, the oldest first, each with where it begins and where it is left.
fn way(history: &TimelineHistory) -> Vec<OnWay> {
    let ancestors = history.ancestors.iter().map(|entry| (entry.timeline, entry.switch_lsn));
    let mut begin = Lsn(0);
    let all = ancestors.chain([(history.timeline, Lsn(u64::MAX))]);
    all.map(|(timeline, end)| (timeline, std::mem::replace(&mut begin, end), end)).collect()
}

/// Returns what is stored on the way, in WAL order, with holes in between.
fn spans(catalog: &Catalog, history: &TimelineHistory) -> Vec<Span> {
    let size = catalog.lineage.segment_size;
    let mut stored = Vec::new();
    for (timeline, begin, end) in way(history) {
        // The segment with the fork is stored whole under the descendant's name.
        let begin = Lsn(begin.0 / size.bytes() * size.bytes());
        let whole = catalog.segments.runs(timeline).into_iter();
        let whole = whole.map(|run| Span { from: run.first.start(size), to: run.last.end(size) });
        let open = catalog.tails.iter().flatten().map(|(_, tail)| tail).chain(catalog.stranded.values());
        let open = open.filter(|tail| tail.segment.timeline == timeline);
        let open = open.filter_map(|tail| catalog.served_tail(tail.segment));
        let open = open.map(|tail| Span { from: tail.segment.start(size), to: tail.until_lsn });
        let own = whole.chain(open).map(|span| Span { from: span.from.max(begin), to: span.to.min(end) });
        stored.extend(own.filter(|span| span.from < span.to));
    }
    stored.sort_unstable();
    let mut joined: Vec<Span> = Vec::new();
    for span in stored {
        match joined.last_mut().filter(|last| span.from <= last.to) {
            Some(last) => last.to = last.to.max(span.to),
            None => joined.push(span),
        }
    }
    joined
}

/// A timeline on the way, where it begins and where it is left.
type OnWay = (TimelineId, Lsn, Lsn);

/// Returns what of a gap lies on the way.
fn part_of(way: &[OnWay], gap: &GapRecord) -> Option<Span> {
    let (_, begin, left) = way.iter().find(|(timeline, ..)| *timeline == gap.timeline)?;
    let part = Span { from: gap.start_lsn.max(*begin), to: gap.end_lsn.min(*left) };
    (part.from < part.to).then_some(part)
}

/// Returns whether the ledger knows of all segments between two positions; of one with a fork, of each timeline's own part.
fn is_in_ledger(catalog: &Catalog, way: &[OnWay], from: Lsn, to: Lsn) -> bool {
    let size = catalog.lineage.segment_size;
    let of_way = |gap: &GapRecord| {
        let (_, begin, left) = way.iter().find(|(timeline, ..)| *timeline == gap.timeline)?;
        let part = part_of(way, gap)?;
        let first = Lsn(part.from.0 / size.bytes() * size.bytes());
        let last = Lsn(part.to.0.div_ceil(size.bytes()).saturating_mul(size.bytes()));
        Some((first.max(*begin), last.min(*left)))
    };
    let known: Vec<_> = catalog.gaps.iter().filter_map(of_way).collect();
    let mut at = from;
    while at < to {
        match known.iter().filter(|(first, end)| (*first..*end).contains(&at)).map(|(_, end)| *end).max() {
            Some(end) => at = end,
            None => return false,
        }
    }
    true
}

/// Where recovery gets no further, and where a backup may start behind it.
struct Break {
    ends: Lsn,
    goes_on: Lsn,
}

/// Returns spans as they are cut by breaks.
fn crossed(stored: &[Span], breaks: &[Break]) -> Vec<Span> {
    let mut crossed = Vec::new();
    for span in stored {
        let mut from = span.from;
        for Break { ends, goes_on } in breaks.iter().filter(|one| span.from <= one.ends && one.ends < span.to)
        {
            crossed.push(Span { from, to: *ends });
            from = *goes_on;
        }
        crossed.push(Span { from, to: span.to });
    }
    crossed
}

/// Returns the records on the way that no recovery crosses, in WAL order: `wal_level` became minimal, or WAL was reset.
fn breaks(
    catalog: &Catalog,
    history: &TimelineHistory,
    newest: &BTreeMap<TimelineId, Vec<WalEvent>>,
) -> Vec<Break> {
    let break_by = |event: &WalEvent| match &event.kind {
        EventKind::ParameterChange { settings } if settings.wal_level == WAL_LEVEL_MINIMAL => {
            Some(Break { ends: event.lsn, goes_on: Lsn(event.lsn.0 + 1) })
        }
        // Recovery may start at the record with which WAL begins: nothing before it can be crossed.
        EventKind::WalBegins { .. } => Some(Break { ends: event.lsn, goes_on: event.lsn }),
        _ => None,
    };
    let rolled_up = catalog.rollups.iter().map(|rollup| (rollup.timeline, &rollup.events));
    let all = rolled_up.chain(newest.iter().map(|(timeline, events)| (*timeline, events)));
    let on_way = all.flat_map(|(timeline, events)| {
        events.iter().filter(move |event| history.timeline_of(event.lsn) == timeline)
    });
    let mut breaks: Vec<_> = on_way.filter_map(break_by).collect();
    // Of two at the same place the one that also stops a backup which begins right there.
    breaks.sort_by_key(|one| (one.ends, std::cmp::Reverse(one.goes_on)));
    breaks.dedup_by_key(|one| one.ends);
    breaks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{GapCause, GapKind, Lineage, StoredSegments, StoredTail};
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

    fn events(events: &[WalEvent]) -> BTreeMap<TimelineId, Vec<WalEvent>> {
        BTreeMap::from([(TimelineId::FIRST, events.to_vec())])
    }

    /// In MiB: until, where the window begins, and where holes are, bare ones negative.
    fn reached(catalog: &Catalog, on: u32) -> Option<(u64, Option<u64>, Vec<i64>)> {
        let reach = reach(catalog, timeline(on), &BTreeMap::new())?;
        assert!(!reach.is_cut);
        let window = reach.window.map(|window| window.from_lsn.0 / MIB);
        let holes = reach.holes.iter().map(|hole| {
            let from = (hole.from.0 / MIB) as i64;
            if hole.is_bare { -from } else { from }
        });
        Some((reach.until.0 / MIB, window, holes.collect()))
    }

    fn ledger(on: u32, start: u64, end: u64, kind: GapKind) -> GapRecord {
        GapRecord {
            format: 1,
            id: String::new(),
            timeline: timeline(on),
            start_lsn: Lsn(start * MIB),
            end_lsn: Lsn(end * MIB),
            cause: GapCause { kind, text: String::new() },
            segment_digest: None,
            recorded: DateTime::UNIX_EPOCH,
            host: String::new(),
            user: String::new(),
        }
    }

    #[test]
    fn the_last_window_ends_at_holes_and_leads_across_forks() {
        let backups = &[(1, 2, 3), (1, 6, 7)];
        assert_eq!(reached(&catalog(&[], backups), 1), None);
        assert_eq!(reached(&catalog(&[(1, 1, 9)], backups), 1), Some((10, Some(3), vec![])));
        assert_eq!(reached(&catalog(&[(1, 1, 3), (1, 5, 5)], backups), 1), Some((10, Some(7), vec![4])));
        assert_eq!(reached(&catalog(&[(1, 8, 2)], backups), 1), Some((10, None, vec![])), "no backup there");
        // Along the fork: segment 10 is stored under the descendant's name.
        let forked = &[(1, 1, 9), (2, 10, 3)];
        assert_eq!(reached(&catalog(forked, backups), 2), Some((13, Some(3), vec![])));
        // What the old timeline wrote behind the fork is not on the way.
        let behind = &[(1, 11, 12)];
        assert_eq!(reached(&catalog(&[(1, 1, 20), (2, 10, 3)], behind), 2), Some((13, None, vec![])));
        assert_eq!(reached(&catalog(forked, backups), 3), None, "its history is not stored");
    }

    #[test]
    fn a_restore_gets_to_the_hole_behind_which_no_backup_begins() {
        let backups = &[(1, 2, 3)];
        let mut holed = catalog(&[(1, 1, 7), (1, 9, 3)], backups);
        assert_eq!(reached(&holed, 1), Some((8, Some(3), vec![-8])));
        assert_eq!(
            reach(&holed, TimelineId::FIRST, &BTreeMap::new()).unwrap().holes[0].behind_bytes,
            3 * MIB
        );
        // Across a fork.
        assert_eq!(reached(&catalog(&[(1, 1, 8), (2, 11, 3)], backups), 2), Some((9, Some(3), vec![-9])));
        // What lies before the first backup takes nothing away.
        assert_eq!(reached(&catalog(&[(1, 1, 1), (1, 3, 6)], &[(1, 4, 5)]), 1), Some((9, Some(5), vec![])));
        // What the ledger knows is counted there, all of it or nothing.
        let bare = |catalog: &Catalog, on| reach(catalog, timeline(on), &BTreeMap::new()).unwrap().bare_gaps;
        for (kind, expected) in [(GapKind::GivenUp, 1), (GapKind::Expired, 0)] {
            holed.gaps = vec![ledger(1, 8, 9, kind)];
            assert_eq!((reached(&holed, 1), bare(&holed, 1)), (Some((8, Some(3), vec![])), expected));
        }
        let mut behind = catalog(&[(1, 1, 3), (1, 5, 5)], &[(1, 6, 7)]);
        behind.gaps = vec![ledger(1, 4, 5, GapKind::Lost)];
        assert_eq!(bare(&behind, 1), 0, "a backup begins behind it");
        let mut left = catalog(&[(1, 1, 12), (1, 14, 3), (2, 10, 2)], backups);
        left.gaps = vec![ledger(1, 13, 14, GapKind::Lost)];
        assert_eq!((bare(&left, 1), bare(&left, 2)), (1, 0), "timeline 2 left before it");
        // It begins inside a segment of which the beginning is stored.
        let mut inside = catalog(&[(1, 1, 7)], backups);
        inside.gaps = vec![GapRecord { start_lsn: Lsn(8 * MIB - 16), ..ledger(1, 7, 9, GapKind::Lost) }];
        assert_eq!((reached(&inside, 1), bare(&inside, 1)), (Some((8, Some(3), vec![])), 1));
        let mut wide = catalog(&[(1, 1, 7), (1, 12, 3)], backups);
        wide.gaps = vec![ledger(1, 8, 9, GapKind::GivenUp), ledger(1, 11, 12, GapKind::Lost)];
        assert_eq!(reached(&wide, 1), Some((8, Some(3), vec![-8])));
        wide.gaps.push(ledger(1, 9, 11, GapKind::Lost));
        assert_eq!(reached(&wide, 1), Some((8, Some(3), vec![])));
        // A gap of the timeline that was left says nothing of what the next one wrote into the segment with the fork.
        let mut forked = catalog(&[(1, 1, 10), (2, 11, 3)], backups);
        forked.gaps = vec![ledger(1, 10, 12, GapKind::Lost)];
        let holes = reach(&forked, timeline(2), &BTreeMap::new()).unwrap().holes;
        assert_eq!(holes.iter().map(|hole| hole.from).collect::<Vec<_>>(), [Lsn(0xA8_0000)]);
        forked.gaps.push(ledger(2, 10, 11, GapKind::Lost));
        assert_eq!(reach(&forked, timeline(2), &BTreeMap::new()).unwrap().holes, []);
    }

    #[test]
    fn what_is_missing_on_a_timeline_that_was_left_is_found() {
        let backups = &[(1, 2, 3)];
        let found = |catalog: &Catalog, main| {
            let holes = left_holes(catalog, &catalog.history(timeline(main)).unwrap());
            assert!(holes.iter().all(|(_, hole)| !hole.is_bare));
            holes.iter().map(|(on, hole)| (on.get(), hole.from.0 / MIB)).collect::<Vec<_>>()
        };
        // Timeline 2 has left 1 in the middle of segment 10.
        let segments = &[(1, 1, 4), (1, 6, 6), (1, 13, 3), (2, 10, 2)];
        let mut left = catalog(segments, backups);
        assert_eq!(found(&left, 2), [(1, 12)], "what lies before the fork is on the way");
        assert_eq!(found(&left, 1), [], "all of timeline 2 is there");
        left.gaps = vec![ledger(1, 12, 13, GapKind::Lost)];
        assert_eq!(found(&left, 2), []);
        assert_eq!(found(&catalog(segments, &[(1, 14, 15)]), 2), [], "nothing leads there");
        // Seen from the old timeline, the new one is the other.
        assert_eq!(found(&catalog(&[(1, 1, 12), (2, 12, 2)], backups), 1), [(2, 10)]);
    }

    #[test]
    fn a_timeline_of_which_nothing_is_stored_is_reached_up_to_its_fork() {
        let backups = &[(1, 2, 3)];
        let fork = reach(&catalog(&[(1, 1, 20)], backups), timeline(2), &BTreeMap::new()).unwrap();
        assert_eq!((fork.timeline, fork.until), (timeline(2), Lsn(0xA8_0000)));
        assert_eq!(fork.window.unwrap().until_lsn, fork.until);
        assert_eq!(reached(&catalog(&[(1, 1, 5)], backups), 2), Some((6, Some(3), vec![])));
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
        // Timeline 2 leaves timeline 1 inside of that segment: it is served.
        let on_first = reach(&with_tail, TimelineId::FIRST, &BTreeMap::new()).unwrap();
        assert_eq!((on_first.until, on_first.holes.len()), (Lsn(10 * MIB + 8), 0));
        let history = with_tail.history(TimelineId::FIRST).unwrap();
        let at = |lsn| stored_at(&with_tail, &history, Lsn(lsn)).map(|name| name.number(SIZE));
        assert_eq!([at(10 * MIB), at(10 * MIB - 1), at(11 * MIB)], [Some(10), Some(9), None]);
        let minimal = |mib| WalEvent {
            lsn: Lsn(mib * MIB),
            end_lsn: Lsn(mib * MIB + 8),
            xid: 0,
            kind: EventKind::ParameterChange { settings: limits(WAL_LEVEL_MINIMAL) },
        };
        let catalog = catalog(&[(1, 1, 9)], backups);
        let broken = |at| {
            let reach = reach(&catalog, TimelineId::FIRST, &events(&[minimal(at)])).unwrap();
            (reach.until.0 / MIB, reach.window.map(|window| window.from_lsn.0 / MIB), reach.is_cut)
        };
        assert_eq!(broken(4), (10, Some(7), false));
        assert_eq!(broken(8), (8, Some(3), true), "no backup behind it");
    }
}
