//! Which WAL stays.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{BackupWal, Catalog, GapRecord, HeldWal};
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};

use super::backups::{Chosen, may_be_complete};
use super::{CountsAgain, KeptWal, Policy, RemovedWal, Seen};
use crate::plan::{begin_of, merge, wal_is_on_path};

/// How long before the window's start something may have happened last on a timeline that is still looked at: the
/// clock is the server's.
const IN_USE_MARGIN: TimeDelta = TimeDelta::days(1);

/// The way to a timeline, from the first one on.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) history: TimelineHistory,
    pub(super) stage: Stage,
}

impl Way {
    /// Whether the end of its timeline stays in reach.
    pub(super) fn end_stays(&self) -> bool {
        self.stage != Stage::Left
    }
}

/// What becomes of a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Moments on it are in the window.
    InUse,
    /// Nothing happened on it since the window's start, and its end is the last that there is of it: it may be a server's that
    /// is idle.
    Over,
    /// The same, and it went on as another timeline, which is in use.
    Left,
}

/// How long after a timeline was left something may happen on it, until it counts as a server's that went on.
const WENT_ON: TimeDelta = TimeDelta::days(1);

/// Returns the way to every timeline whose history is known.
pub(super) fn ways(
    catalog: &Catalog,
    seen: &Seen,
    window_from: Option<DateTime<Utc>>,
    notes: &mut Vec<String>,
) -> Vec<Way> {
    let timelines = all_timelines(catalog);
    let newest = timelines.last().copied();
    let ways = timelines.into_iter().filter_map(|timeline| {
        let history = catalog.history(timeline)?;
        let last = seen.last_times.get(&timeline);
        let over = window_from.and_then(|from| from.checked_sub_signed(IN_USE_MARGIN));
        let stage = match (last, over) {
            (Some(last), Some(over)) if *last < over && Some(timeline) != newest => {
                match was_left(catalog, seen, timeline, over) {
                    true => Stage::Left,
                    false => Stage::Over,
                }
            }
            _ => Stage::InUse,
        };
        match stage {
            Stage::InUse => {}
            Stage::Over => notes.push(format!(
                "nothing happened on timeline {timeline} since the window's start, and no other went on from its end: its newest \
                 backup stays, with all WAL from there on"
            )),
            Stage::Left => notes.push(format!(
                "nothing happened on timeline {timeline} since the window's start, and others went on from its end: of its own WAL \
                 only what kept backups need stays"
            )),
        }
        Some(Way { history, stage })
    });
    ways.collect()
}

/// Returns whether a timeline on which nothing happens any more went on as another one that is in use.
fn was_left(catalog: &Catalog, seen: &Seen, timeline: TimelineId, over: DateTime<Utc>) -> bool {
    let size = catalog.lineage.segment_size;
    let left_for = |history: &TimelineHistory| Some((history.timeline, history.switch_lsn_of(timeline)?));
    let left: Vec<(TimelineId, Lsn)> = catalog.histories.values().filter_map(left_for).collect();
    let Some(last_left) = left.iter().map(|(_, lsn)| *lsn).max() else { return false };
    let goes_on = left.iter().any(|(child, _)| seen.last_times.get(child).is_some_and(|last| *last >= over));
    // That much of it may be gone already, because this was so before.
    let tail = catalog.tails.iter().flatten().find(|(on, _)| **on == timeline);
    let ends = catalog.stored_until(timeline).max(tail.map(|(_, tail)| tail.end_lsn));
    let is_shorter = ends.is_none_or(|end| end.0 <= last_left.0 / size.bytes() * size.bytes());
    let went_on = match (seen.last_times.get(&timeline), seen.left_times.get(&timeline)) {
        (Some(last), Some(left)) => last.signed_duration_since(*left) > WENT_ON,
        _ => true,
    };
    goes_on && (is_shorter || !went_on)
}

fn all_timelines(catalog: &Catalog) -> Vec<TimelineId> {
    let mut timelines = catalog.timelines();
    timelines.extend(catalog.backups.iter().flat_map(|backup| [backup.timeline, backup.stop_timeline]));
    timelines.sort_unstable();
    timelines.dedup();
    timelines
}

/// Stretches of WAL that stay, by numbers of segments, the end excluded, each with its reason.
#[derive(Debug, Default)]
pub(super) struct Needed(BTreeMap<TimelineId, Vec<(u64, u64, String)>>);

impl Needed {
    fn add(&mut self, timeline: TimelineId, from: u64, until: u64, reason: &str) {
        if from < until {
            self.0.entry(timeline).or_default().push((from, until, reason.to_owned()));
        }
    }

    /// Adds the WAL from `start` on and before `end` along a way: of a segment in which a timeline was left, the
    /// copies of both.
    fn add_along(
        &mut self,
        catalog: &Catalog,
        history: &TimelineHistory,
        start: Lsn,
        end: Lsn,
        reason: &str,
    ) {
        let size = catalog.lineage.segment_size.bytes();
        let path = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
        for timeline in path {
            let begin = begin_of(history, timeline).unwrap_or(Lsn(0));
            let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
            let (from, until) = (start.max(begin), end.min(left_at));
            // A timeline's copy of the segment in which it begins may be the one that is used from `start` on.
            let from = if from >= until { continue } else { from.0 / size };
            self.add(timeline, from, until.0.div_ceil(size), reason);
        }
    }

    /// Adds the WAL that makes a backup consistent.
    fn add_backup(&mut self, catalog: &Catalog, ways: &[Way], wal: &BackupWal, reason: &str) {
        let size = catalog.lineage.segment_size.bytes();
        // That a backup is consistent is noticed at the next record, which may begin in the next segment.
        let end = Lsn(wal.stop_lsn.0.div_ceil(size).saturating_add(1).saturating_mul(size));
        for way in ways.iter().filter(|way| wal_is_on_path(&way.history, wal)) {
            self.add_along(catalog, &way.history, wal.start_lsn, end, reason);
        }
    }

    /// Adds the WAL from `start` on that a restore holds.
    fn add_held(&mut self, catalog: &Catalog, ways: &[Way], wal: &HeldWal, start: Lsn, reason: &str) {
        let size = catalog.lineage.segment_size.bytes();
        let end = wal.through_lsn.map_or(Lsn(u64::MAX), |lsn| Lsn(lsn.0.saturating_add(size)));
        match ways.iter().find(|way| way.history.timeline == wal.timeline) {
            Some(way) => self.add_along(catalog, &way.history, start, end, reason),
            // Nothing of that timeline is here, and its way is not known: it may lead over any older one.
            None => {
                for timeline in all_timelines(catalog).into_iter().filter(|older| *older <= wal.timeline) {
                    self.add(timeline, start.0 / size, end.0.div_ceil(size), reason);
                }
            }
        }
    }

    /// Returns the stretches of a timeline that stay, in order, none touching another.
    fn merged(&self, timeline: TimelineId) -> Vec<(u64, u64)> {
        merge(self.stretches(timeline).collect())
    }

    fn stretches(&self, timeline: TimelineId) -> impl Iterator<Item = (u64, u64)> {
        self.0.get(&timeline).into_iter().flatten().map(|(from, until, _)| (*from, *until))
    }

    fn reasons(&self, timeline: TimelineId, from: u64, until: u64) -> Vec<String> {
        let mut reasons: Vec<String> = Vec::new();
        for (start, end, reason) in self.0.get(&timeline).into_iter().flatten() {
            if *start < until && from < *end && !reasons.contains(reason) {
                reasons.push(reason.clone());
            }
        }
        reasons
    }
}

pub(super) fn needed(
    catalog: &Catalog,
    seen: &Seen,
    policy: &Policy,
    ways: &[Way],
    chosen: &Chosen,
    now: DateTime<Utc>,
    notes: &mut Vec<String>,
) -> Needed {
    let size = catalog.lineage.segment_size;
    let (mut needed, all) = (Needed::default(), Lsn(u64::MAX));
    for timeline in all_timelines(catalog) {
        if catalog.history(timeline).is_none() {
            notes.push(format!(
                "{}.history is not stored: where timeline {timeline} comes from is not known, and no WAL of it and of \
                 older timelines is removed",
                timeline.hex()
            ));
            for other in all_timelines(catalog).into_iter().filter(|other| *other <= timeline) {
                needed.add(other, 0, u64::MAX, &format!("the history of timeline {timeline} is not stored"));
            }
        }
    }
    for way in ways.iter().filter(|way| way.end_stays()) {
        let timeline = way.history.timeline;
        let base = chosen.bases.get(&timeline);
        let base = base.and_then(|id| catalog.backups.iter().find(|backup| backup.id == *id));
        let (start, reason) = match base {
            Some(base) if way.stage == Stage::Over => {
                (base.start_lsn, format!("the end of timeline {timeline}, from backup {} on", base.id))
            }
            Some(base) if policy.window().is_some() => {
                (base.start_lsn, format!("the window, from backup {} on", base.id))
            }
            Some(base) => (base.start_lsn, format!("from backup {} on, the oldest that stays", base.id)),
            None => (Lsn(0), format!("no backup on the way to timeline {timeline} is as old as the window")),
        };
        needed.add_along(catalog, &way.history, start, all, &reason);
    }
    for backup in catalog.backups.iter().filter(|backup| chosen.keeps(&backup.id)) {
        let reason = format!("backup {} is consistent with it", backup.id);
        needed.add_backup(catalog, ways, &backup.wal(), &reason);
    }
    for orphan in &catalog.orphaned_backups {
        let reason = format!("backup {} is consistent with it, if what it builds on comes back", orphan.id);
        needed.add_backup(catalog, ways, &orphan.wal, &reason);
    }
    for begun in seen.recordless.iter().filter(|begun| may_be_complete(seen, begun, now)) {
        let reason = format!("backup {} was begun and may be under way", begun.id);
        let Some(start) = begun.start else {
            // Without it none becomes complete; one that is may have lost it with its record.
            for timeline in all_timelines(catalog).into_iter().filter(|_| begun.was_finishing) {
                needed.add(timeline, 0, u64::MAX, &reason);
            }
            continue;
        };
        needed.add(start.timeline, start.start_lsn.0 / size.bytes(), u64::MAX, &reason);
        for way in ways.iter().filter(|way| way.history.timeline_of(start.start_lsn) == start.timeline) {
            needed.add_along(catalog, &way.history, start.start_lsn, all, &reason);
        }
    }
    for hold in seen.holds.iter().filter(|hold| hold.holds_at(now)) {
        let backup = catalog.backups.iter().find(|backup| backup.id == hold.backup);
        let Some(wal) = hold.wal else { continue };
        // The backup may lie in another repository; where the restore did not say from where on, all may be needed.
        let start = wal.start_lsn.or(backup.map(|backup| backup.start_lsn)).unwrap_or(Lsn(0));
        needed.add_held(catalog, ways, &wal, start, &format!("held by {}: {}", hold.user, hold.reason));
    }
    needed
}

/// Returns what the ledger says was expired, that is needed, and still there as far as it is.
pub(super) fn counts_again(catalog: &Catalog, seen: &Seen, needed: &Needed) -> Vec<CountsAgain> {
    let size = catalog.lineage.segment_size;
    let mut again = Vec::new();
    for record in catalog.gaps.iter().filter(|gap| gap.is_expired()) {
        let Some(whole) = seen.still_whole.get(&record.id) else { continue };
        let (first, end) = record.whole_segments(size);
        // Of a stretch of which anything is gone the rest may lead nowhere: it stays what it is.
        let there = |(from, until): &(u64, u64)| whole.iter().any(|(a, b)| a <= from && until <= b);
        let in_record = |(from, until): (u64, u64)| (from.max(first), until.min(end));
        let wanted = needed.stretches(record.timeline).map(in_record).filter(|(from, until)| from < until);
        let wanted = merge(wanted.filter(there).collect());
        if wanted.is_empty() {
            continue;
        }
        let (mut rest, mut at) = (Vec::new(), first);
        for (from, until) in wanted {
            rest.extend((at < from).then_some((at, from)));
            at = until;
        }
        rest.extend((at < end).then_some((at, end)));
        again.push(CountsAgain { record: record.clone(), rest });
    }
    again
}

/// Returns the WAL of each timeline that stays and that goes.
pub(super) fn split(
    catalog: &Catalog,
    seen: &Seen,
    needed: &Needed,
    policy: &Policy,
    window_from: Option<DateTime<Utc>>,
) -> (Vec<KeptWal>, Vec<RemovedWal>) {
    let (mut kept, mut removed) = (Vec::new(), Vec::new());
    for timeline in all_timelines(catalog) {
        let stored = Stored::of(catalog, seen, timeline);
        let Some((first, end)) = stored.extent() else { continue };
        let mut at = first;
        for (from, until) in needed.merged(timeline) {
            let (from, until) = (from.clamp(first, end), until.clamp(first, end));
            removed.extend(stored.removal(at, from, policy, window_from));
            kept.extend(stored.keeping(from, until, needed));
            at = at.max(until);
        }
        removed.extend(stored.removal(at, end, policy, window_from));
    }
    (kept, removed)
}

/// What is stored of a timeline.
struct Stored<'a> {
    catalog: &'a Catalog,
    timeline: TimelineId,
    /// Segments of which something is stored that is no whole segment.
    pieces: Vec<u64>,
    leftovers: Vec<(u64, u64)>,
    expired: Vec<&'a GapRecord>,
}

impl<'a> Stored<'a> {
    fn of(catalog: &'a Catalog, seen: &Seen, timeline: TimelineId) -> Self {
        let size = catalog.lineage.segment_size;
        let tails = catalog.tails.iter().flatten().map(|(_, tail)| &tail.segment);
        let all =
            catalog.partials.iter().chain(&catalog.incomplete).chain(tails).chain(catalog.stranded.keys());
        let own = all.chain(catalog.in_parts.keys()).filter(|name| name.timeline == timeline);
        let leftovers = seen.leftovers.iter().filter(|(on, ..)| *on == timeline);
        Self {
            catalog,
            timeline,
            pieces: own.map(|name| name.number(size)).collect(),
            leftovers: leftovers.map(|(_, from, until)| (*from, *until)).collect(),
            expired: catalog.gaps.iter().filter(|gap| gap.timeline == timeline && gap.is_expired()).collect(),
        }
    }

    /// Returns the numbers from the first segment of which anything is, or was, stored to behind the last.
    fn extent(&self) -> Option<(u64, u64)> {
        let size = self.catalog.lineage.segment_size;
        let runs = self.catalog.segments.runs(self.timeline);
        let runs = runs.iter().map(|run| (run.first.number(size), run.last.number(size).saturating_add(1)));
        let pieces = self.pieces.iter().map(|number| (*number, number.saturating_add(1)));
        let expired = self.expired.iter().map(|gap| gap.whole_segments(size));
        let all: Vec<_> = runs.chain(pieces).chain(self.leftovers.iter().copied()).chain(expired).collect();
        Some((all.iter().map(|range| range.0).min()?, all.iter().map(|range| range.1).max()?))
    }

    fn removal(
        &self,
        from: u64,
        until: u64,
        policy: &Policy,
        window_from: Option<DateTime<Utc>>,
    ) -> Option<RemovedWal> {
        let size = self.catalog.lineage.segment_size;
        let segments = self.catalog.segments.count(self.timeline, from, until);
        let pieces = self.pieces.iter().any(|number| (from..until).contains(number));
        let leftover = self.leftovers.iter().any(|(start, end)| *start < until && from < *end);
        if from >= until || (segments == 0 && !pieces && !leftover) {
            return None;
        }
        let first = SegmentName::from_number(self.timeline, from, size)?;
        let last = SegmentName::from_number(self.timeline, until - 1, size)?;
        let inside = |gap: &&&GapRecord| {
            let (start, end) = gap.whole_segments(size);
            from <= start && end <= until
        };
        let reason = match (segments, window_from) {
            (0, _) => "an earlier removal did not come to its end".to_owned(),
            (_, Some(from)) => format!(
                "no backup that stays and no moment since {} needs it",
                from.format("%Y-%m-%d %H:%M:%SZ")
            ),
            (_, None) => format!("no backup that stays needs it ({policy})"),
        };
        Some(RemovedWal {
            timeline: self.timeline,
            start_lsn: first.start(size),
            end_lsn: last.end(size),
            first,
            last,
            segments,
            objects: 0,
            stored_bytes: 0,
            reason,
            numbers: (from, until),
            supersedes: self.expired.iter().filter(inside).map(|gap| (*gap).clone()).collect(),
        })
    }

    fn keeping(&self, from: u64, until: u64, needed: &Needed) -> Option<KeptWal> {
        let size = self.catalog.lineage.segment_size;
        let segments = self.catalog.segments.count(self.timeline, from, until);
        if from >= until || segments == 0 {
            return None;
        }
        let name = |number| SegmentName::from_number(self.timeline, number, size);
        let first = self.catalog.segments.first_from(name(from)?)?;
        let runs = self.catalog.segments.runs(self.timeline);
        let ends = runs.iter().filter(|run| run.first.number(size) < until);
        let last = ends.map(|run| run.last.number(size).min(until - 1)).max()?;
        Some(KeptWal {
            timeline: self.timeline,
            first,
            last: name(last)?,
            segments,
            reasons: needed.reasons(self.timeline, from, until),
        })
    }
}
