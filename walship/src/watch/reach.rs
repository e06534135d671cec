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
