//! What is to be proven: which WAL and which backups.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{BackupRecord, Catalog};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

use crate::plan::{RestorePlan, build_chain, merge};

/// How far before a moment the backup was finished that leads to it: the clocks of the server and of the machine that took
/// it may differ.
const CLOCK_MARGIN: TimeDelta = TimeDelta::hours(1);

/// What is to be proven, by numbers of segments and ids of backups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Everything, whatever else is said here: also what no backup and no chain needs.
    pub everything: bool,
    /// Whether all that is archived later belongs to it: then its end is looked at.
    pub to_the_end: bool,
    /// Ranges of segments' numbers by timeline, the end excluded.
    pub wal: BTreeMap<TimelineId, Vec<(u64, u64)>>,
    /// Backups.
    pub backups: BTreeSet<String>,
}

impl Needed {
    /// Returns the whole lineage.
    pub fn everything(catalog: &Catalog) -> Self {
        let backups = catalog.backups.iter().map(|backup| backup.id.clone());
        let orphaned = catalog.orphaned_backups.iter().map(|backup| backup.id.clone());
        Self {
            everything: true,
            to_the_end: true,
            backups: backups.chain(orphaned).collect(),
            ..Self::default()
        }
    }

    /// Returns what a plan needs.
    pub fn of_plan(plan: &RestorePlan, size: SegmentSize) -> Self {
        let mut needed = Self::default();
        for part in &plan.chain {
            let from = part.first.number(size);
            needed.add(part.first.timeline, from, from.saturating_add(part.segments));
        }
        needed.backups = plan.backups().map(|backup| backup.id.clone()).collect();
        needed
    }

    /// Returns what a backup needs to be restored by itself: all that it builds on, and the WAL that makes it consistent.
    /// `None` when there is no such backup.
    pub fn of_backup(catalog: &Catalog, id: &str) -> Option<Self> {
        let backup = catalog.backups.iter().find(|backup| backup.id == id);
        let mut needed = Self { backups: BTreeSet::from([id.to_owned()]), ..Self::default() };
        let Some(backup) = backup else {
            let orphaned = catalog.orphaned_backups.iter().any(|backup| backup.id == id);
            return orphaned.then_some(needed);
        };
        let parents = catalog.parents_of(backup).unwrap_or_default();
        needed.backups.extend(parents.iter().map(|parent| parent.id.clone()));
        needed.add_way(catalog, backup);
        Some(needed)
    }

    /// Returns what leads to every moment from `from` on: the newest backup that was complete before it, all later ones,
    /// and all WAL from there on.
    pub fn since(catalog: &Catalog, from: DateTime<Utc>) -> Self {
        let mut needed = Self { to_the_end: true, ..Self::default() };
        let early = |backup: &&BackupRecord| backup.finished + CLOCK_MARGIN <= from;
        // One for each timeline: which of them leads to a moment, its own way tells.
        let mut newest: BTreeMap<TimelineId, &BackupRecord> = BTreeMap::new();
        for backup in catalog.backups.iter().filter(early) {
            let known = newest.entry(backup.stop_timeline).or_insert(backup);
            if known.stop_lsn <= backup.stop_lsn {
                *known = backup;
            }
        }
        let later = catalog.backups.iter().filter(|backup| !early(backup));
        let mut start = Lsn(u64::MAX);
        for backup in newest.into_values().chain(later) {
            let parents = catalog.parents_of(backup).unwrap_or_default();
            needed.backups.extend(parents.iter().map(|parent| parent.id.clone()));
            needed.backups.insert(backup.id.clone());
            start = start.min(backup.start_lsn);
        }
        let size = catalog.lineage.segment_size;
        for timeline in catalog.segments.timelines() {
            needed.add(timeline, start.0 / size.bytes(), u64::MAX);
        }
        needed
    }

    fn add(&mut self, timeline: TimelineId, from: u64, until: u64) {
        self.wal.entry(timeline).or_default().push((from, until));
    }

    fn add_way(&mut self, catalog: &Catalog, backup: &BackupRecord) {
        let Some(history) = catalog.history(backup.stop_timeline) else { return };
        let size = catalog.lineage.segment_size;
        let chain = build_chain(catalog, &history, backup.start_lsn);
        for step in chain.steps_from(0).take_while(|step| step.from < backup.stop_lsn) {
            let number = step.segment.number(size);
            self.add(step.segment.timeline, number, number + 1);
        }
        // What is missing is looked for where it should be.
        for (timeline, from, until) in stretches(&history, backup.start_lsn, backup.stop_lsn) {
            let last = Lsn(until.0.saturating_sub(1).max(from.0));
            self.add(timeline, from.0 / size.bytes(), last.0 / size.bytes() + 1);
        }
    }

    /// Returns the needed ranges within one, in order and without overlaps.
    pub fn within(&self, timeline: TimelineId, from: u64, until: u64) -> Vec<(u64, u64)> {
        if self.everything {
            return vec![(from, until)];
        }
        let ranges = self.wal.get(&timeline).into_iter().flatten();
        let mut cut: Vec<_> = ranges.map(|(a, b)| ((*a).max(from), (*b).min(until))).collect();
        cut.retain(|(a, b)| a < b);
        merge(cut)
    }

    /// Returns whether a segment is needed.
    pub fn has_segment(&self, name: SegmentName, size: SegmentSize) -> bool {
        let number = name.number(size);
        !self.within(name.timeline, number, number + 1).is_empty()
    }

    /// Returns whether any segment of a range (the last one included) is needed.
    pub fn has_any(&self, first: SegmentName, last: SegmentName, size: SegmentSize) -> bool {
        !self.within(first.timeline, first.number(size), last.number(size).saturating_add(1)).is_empty()
    }
}

/// Returns the stretches of timelines that lie on a way between two positions.
fn stretches(history: &TimelineHistory, start: Lsn, stop: Lsn) -> Vec<(TimelineId, Lsn, Lsn)> {
    let mut found = Vec::new();
    let mut at = start;
    while at < stop {
        let timeline = history.timeline_of(at);
        let until = history.switch_lsn_of(timeline).unwrap_or(stop).min(stop).max(Lsn(at.0 + 1));
        found.push((timeline, at, until));
        at = until;
    }
    found
}
