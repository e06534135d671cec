//! Makes the whole index of a lineage from its segments, or compares it with them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::write::{Written, readable_parts, write_parts};
use super::{Known, StoredRollup};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId};
use crate::repository::LineageRepository;
use crate::wal::rollup::build::Part;
use crate::wal::rollup::{LEVEL_MAX, Place, Rollup, span};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Write what is missing; a roll-up that covers all that is stored is believed.
    Complete,
    /// Make every roll-up from the segments' own summaries, and replace those that differ.
    Rebuild,
    /// Compare every roll-up with the segments' own summaries; write nothing.
    Verify,
}

/// How it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub task: Task,
    /// Say what would be written, and write nothing.
    pub dry_run: bool,
}

/// What was found and done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whole segments that are stored.
    pub segments: u64,
    /// Roll-ups that are stored and right.
    pub present: u64,
    /// Roll-ups that were missing (or did not cover all that is stored): written now, unless verifying or
    /// in a dry run.
    pub missing: Vec<String>,
    /// How many of those were written.
    pub written: u64,
    /// Roll-ups that are damaged or say something else than their segments.
    pub wrong: Vec<Wrong>,
    /// Segments whose summaries cannot be read: no roll-up covers them.
    pub unreadable: Vec<Wrong>,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wrong {
    /// Where.
    pub location: String,
    /// What is wrong.
    pub what: String,
}

/// Completes, rebuilds or verifies the index of a lineage. One level-1 roll-up's segments are in memory at
/// a time.
///
/// # Errors
/// What the store says. Damage is reported, not returned.
pub async fn complete(repository: &LineageRepository, options: Options) -> Result<Report> {
    let mut report = Report::default();
    for timeline in repository.stored_timelines().await? {
        let mut worker =
            Worker { repository, options, timeline, report: &mut report, below: BTreeMap::new() };
        worker.level_one().await?;
        for level in 2..=LEVEL_MAX {
            if worker.below.is_empty() {
                break;
            }
            worker.level_above(level).await?;
        }
    }
    let dry_run = options.dry_run || options.task == Task::Verify;
    let trust = options.task == Task::Complete;
    let (missing, wrong) = repository.complete_backup_list(trust, dry_run).await?;
    if missing {
        report.missing.push(format!("list of backups in {}", repository.location()));
        report.written += u64::from(!dry_run);
    }
    let wrong = wrong.into_iter().map(|(key, what)| Wrong { location: repository.shown(&key), what });
    report.wrong.extend(wrong);
    Ok(report)
}

struct Worker<'a> {
    repository: &'a LineageRepository,
    options: Options,
    timeline: TimelineId,
    report: &'a mut Report,
    /// The right roll-up of each place of the level below; `None` when it is not stored and was not to be.
    below: BTreeMap<u64, Option<StoredRollup>>,
}

impl Worker<'_> {
    async fn level_one(&mut self) -> Result<()> {
        let listed = self.listed(1).await?;
        let mut from = 0;
        // A batch of listings at a time: ten million names need not be in memory.
        while let Some(first) = self.repository.first_segment(self.timeline, from).await? {
            let size = self.repository.lineage.segment_size;
            let place = Place::of(first, size, 1);
            let until = place.first.saturating_add(4 * span(1));
            let mut groups: BTreeMap<u64, Vec<SegmentName>> = BTreeMap::new();
            for (name, _) in self.repository.segments_between(self.timeline, place.first, until).await? {
                groups.entry(Place::of(name, size, 1).first).or_default().push(name);
            }
            for (first, names) in groups {
                let place = Place { timeline: self.timeline, level: 1, first };
                self.log(place, names, listed.get(&first).map_or(&[], Vec::as_slice)).await?;
            }
            from = until;
        }
        Ok(())
    }

    async fn log(&mut self, place: Place, names: Vec<SegmentName>, stored: &[StoredRollup]) -> Result<()> {
        self.report.segments += names.len() as u64;
        let size = self.repository.lineage.segment_size;
        let covers = |rollup: &Rollup| {
            let covered = rollup.entries.iter().filter_map(|entry| entry.runs.first());
            covered.map(|run| run.first.number(size)).eq(names.iter().map(|name| name.number(size)))
        };
        if self.believed(stored, covers).await? {
            return Ok(());
        }
        let unreadable = &mut self.report.unreadable;
        let show = |name: SegmentName, error: &Error| {
            unreadable.push(Wrong { location: name.to_string(), what: error.to_string() })
        };
        let parts = readable_parts(self.repository, names, show).await?;
        self.settle(place, parts, stored).await
    }

    async fn level_above(&mut self, level: u8) -> Result<()> {
        let listed = self.listed(level).await?;
        let mut groups: BTreeMap<u64, Vec<Option<StoredRollup>>> = BTreeMap::new();
        for (first, stored) in std::mem::take(&mut self.below) {
            groups.entry(first / span(level) * span(level)).or_default().push(stored);
        }
        // One roll-up alone answers for itself; levels above it would say the same again.
        if listed.is_empty() && groups.values().map(Vec::len).sum::<usize>() == 1 {
            return Ok(());
        }
        for (first, children) in groups {
            let place = Place { timeline: self.timeline, level, first };
            let stored = listed.get(&first).map_or(&[][..], Vec::as_slice);
            let Some(children) = children.into_iter().collect::<Option<Vec<_>>>() else {
                // What it would be cannot be told without what is below it.
                let start = place.start_lsn(self.repository.lineage.segment_size);
                self.report
                    .missing
                    .push(format!("level {level} of timeline {} from {start} on", self.timeline));
                self.below.insert(first, None);
                continue;
            };
            let covers = |rollup: &Rollup| {
                let named = rollup.entries.iter().filter_map(|entry| StoredRollup::of_entry(rollup, entry));
                named.eq(children.iter().cloned())
            };
            if self.believed(stored, covers).await? {
                continue;
            }
            let mut parts = Vec::new();
            for child in &children {
                if let Some(Known { rollup, digest }) = self.repository.read_rollup(child).await? {
                    parts.push(Part::of_rollup(rollup, digest));
                }
            }
            self.settle(place, parts, stored).await?;
        }
        Ok(())
    }

    /// Returns whether the fullest stored roll-up is to be believed: it can be read, and covers what is stored.
    async fn believed(&mut self, stored: &[StoredRollup], covers: impl Fn(&Rollup) -> bool) -> Result<bool> {
        let Some(fullest) = stored.last().filter(|_| self.options.task == Task::Complete) else {
            return Ok(false);
        };
        let known = self.repository.read_sound_rollup(fullest).await?;
        if !known.is_some_and(|known| covers(&known.rollup)) {
            return Ok(false);
        }
        self.report.present += 1;
        self.below.insert(fullest.place().first, Some(fullest.clone()));
        Ok(true)
    }

    /// Makes a place's roll-up and compares it with what is stored.
    async fn settle(&mut self, place: Place, parts: Vec<Part>, stored: &[StoredRollup]) -> Result<()> {
        if parts.is_empty() {
            return Ok(());
        }
        let verify = self.options.task == Task::Verify;
        let dry_run = verify || self.options.dry_run;
        let written = write_parts(self.repository, place, parts, stored, dry_run).await?;
        let (known, new) = match written {
            Written::Present(known) => (known, false),
            Written::New(known) => (known, true),
            Written::TooLarge => return Ok(()),
        };
        let right = self.repository.rollup_key(&known.rollup, &known.digest);
        if new {
            self.report.missing.push(self.repository.rollup_location(&right));
            self.report.written += u64::from(!dry_run);
        } else {
            self.report.present += 1;
        }
        if self.options.task != Task::Complete {
            self.judge(&right, stored).await?;
        }
        self.below.insert(place.first, (!new || !dry_run).then_some(right));
        Ok(())
    }

    /// Reports every stored roll-up of a place that lies: damaged, or as full as the right one and another.
    async fn judge(&mut self, right: &StoredRollup, stored: &[StoredRollup]) -> Result<()> {
        for other in stored {
            let what = match self.repository.read_rollup(other).await {
                Err(Error::Corrupt(error)) => error.to_string(),
                Ok(Some(_)) if other.segments() >= right.segments() && other != right => {
                    "its segments' own summaries say something else".to_owned()
                }
                Ok(_) | Err(Error::Mismatch(_)) => continue,
                Err(error) => return Err(error),
            };
            let location = self.repository.rollup_location(other);
            if self.options.task == Task::Rebuild && !self.options.dry_run {
                self.repository.remove_rollup(other).await?;
            }
            self.report.wrong.push(Wrong { location, what });
        }
        Ok(())
    }

    async fn listed(&self, level: u8) -> Result<BTreeMap<u64, Vec<StoredRollup>>> {
        let mut places: BTreeMap<u64, Vec<StoredRollup>> = BTreeMap::new();
        for stored in self.repository.rollups(self.timeline, level, 0, u64::MAX).await? {
            places.entry(stored.place().first).or_default().push(stored);
        }
        Ok(places)
    }
}
