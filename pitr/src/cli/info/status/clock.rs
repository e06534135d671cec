//! When WAL was written, as far as an archive's own records tell: between which moments a position lies.

use chrono::{DateTime, Utc};
use walship::pg::{Lsn, TimelineId};

use crate::execute::info::{Info, TimelineInfo};

/// Positions on the way to one timeline whose time is known, in WAL order; their times never decrease.
pub(super) struct Clock {
    known: Vec<(Lsn, DateTime<Utc>)>,
}

impl Clock {
    /// Collects what an archive tells of the way to a timeline.
    pub(super) fn of(info: &Info, timeline: &TimelineInfo) -> Self {
        let way = way_to(info, timeline);
        let on_way = |on: TimelineId, lsn: Lsn| way.iter().any(|(part, until)| *part == on && lsn <= *until);
        let mut known = Vec::new();
        for backup in &info.backups {
            if on_way(backup.timeline, backup.start_lsn) {
                known.push((backup.start_lsn, backup.started));
            }
            if on_way(backup.stop_timeline, backup.stop_lsn) {
                known.push((backup.stop_lsn, backup.finished));
            }
        }
        for other in info.timelines.iter().filter(|other| way.iter().any(|(part, _)| *part == other.timeline))
        {
            let own = |lsn: &Lsn| on_way(other.timeline, *lsn);
            let points = other.restore_points.iter().map(|point| (point.lsn, point.time));
            known.extend(points.filter(|(lsn, _)| own(lsn)));
            for window in &other.windows {
                let transactions =
                    [window.earliest_transaction, window.latest_transaction].into_iter().flatten();
                known.extend(transactions.map(|end| (end.lsn, end.time)).filter(|(lsn, _)| own(lsn)));
            }
        }
        known.sort_unstable();
        // Several machines' clocks: what comes later in WAL is drawn no earlier.
        let mut latest = DateTime::<Utc>::MIN_UTC;
        for (_, time) in &mut known {
            latest = latest.max(*time);
            *time = latest;
        }
        Self { known }
    }

    /// Returns the last moment that is known to lie before what is written at `lsn`, or at it.
    pub(super) fn before(&self, lsn: Lsn) -> Option<DateTime<Utc>> {
        let at = self.known.partition_point(|(known, _)| *known <= lsn);
        at.checked_sub(1).map(|at| self.known[at].1)
    }

    /// Returns the first moment that is known to lie behind it, or at it.
    pub(super) fn behind(&self, lsn: Lsn) -> Option<DateTime<Utc>> {
        let at = self.known.partition_point(|(known, _)| *known < lsn);
        self.known.get(at).map(|(_, time)| *time)
    }

    /// Returns the first and the last moment that is known behind `from`.
    pub(super) fn extent(&self, from: Lsn) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
        self.behind(from).zip(self.known.last().map(|(_, time)| *time))
    }
}

/// Returns the timelines on the way to one, each with where the way leaves it.
fn way_to(info: &Info, timeline: &TimelineInfo) -> Vec<(TimelineId, Lsn)> {
    let mut way = vec![(timeline.timeline, Lsn(u64::MAX))];
    let mut at = timeline;
    while let (Some(parent), Some(begin)) = (at.parent, at.begin_lsn) {
        way.push((parent, begin));
        match info.timelines.iter().find(|other| other.timeline == parent) {
            // A parent has a lower number, so that this ends whatever is stored.
            Some(next) if next.timeline < at.timeline => at = next,
            _ => break,
        }
    }
    way
}
