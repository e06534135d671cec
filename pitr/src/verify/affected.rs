//! Which moments can no longer be reached: what could be with everything that was stored, less what can be without
//! what is damaged or missing.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, StoredTail};
use walship::pg::{Lsn, SegmentName, TimelineId};
use walship::wal::rollup::Run;

use super::{Finding, Takes};
use crate::plan::{build_chain, windows};

/// One repository: what it holds, and what was found there.
#[derive(Debug)]
pub struct Place<'a> {
    /// What it holds.
    pub catalog: &'a Catalog,
    /// What the index tells of backups whose own record cannot be read or is gone.
    pub unrecorded: &'a [BackupRecord],
    /// What was found there.
    pub findings: Vec<&'a Finding>,
    /// Up to where parts of the segments are stored whose tails are flawed.
    pub tail_ends: &'a BTreeMap<SegmentName, Lsn>,
}

/// What cannot be reached, restored, or relied on any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Affected {
    /// Stretches of WAL positions whose moments no restore leads to any more, whichever repository is read.
    pub unreachable: Vec<Unreachable>,
    /// Windows that had to be given up in part or whole.
    pub windows: Vec<BrokenWindow>,
    /// Backups that cannot be restored any more, whichever repository is read.
    pub backups: Vec<UnusableBackup>,
}

impl Affected {
    /// Returns whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.unreachable.is_empty() && self.windows.is_empty() && self.backups.is_empty()
    }
}

/// A stretch whose moments cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreachable {
    /// On the way to this timeline.
    pub timeline: TimelineId,
    /// From here.
    pub from_lsn: Lsn,
    /// To here (the end excluded).
    pub until_lsn: Lsn,
    /// The last time of a transaction's end that is known before it; `null` where none is.
    pub from_time: Option<DateTime<Utc>>,
    /// The first that is known behind it; `null` where none is.
    pub until_time: Option<DateTime<Utc>>,
}

/// A window that is not whole any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BrokenWindow {
    /// The timeline that it ends on.
    pub timeline: TimelineId,
    /// Where it began.
    pub from_lsn: Lsn,
    /// Where it ended.
    pub until_lsn: Lsn,
    /// What is left of it: pairs of begin and end.
    pub left: Vec<(Lsn, Lsn)>,
}

/// A backup that cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnusableBackup {
    /// Its id.
    pub id: String,
    /// Why.
    pub why: String,
}

/// Returns what is affected by what was found in the repositories of a lineage, read together as restores read them.
pub fn affected(places: &[Place<'_>]) -> Affected {
    let Some(full) = everything(places) else { return Affected::default() };
    let (broken, lost_backups) = without_what_is_lost(&full, places);
    let mut affected = Affected::default();
    for (id, why) in lost_backups {
        affected.backups.push(UnusableBackup { id, why });
    }
    for backup in &full.backups {
        let known = affected.backups.iter().any(|lost| lost.id == backup.id);
        if !known && is_consistent(&full, backup) && !is_consistent(&broken, backup) {
            let why = "WAL that makes it consistent is damaged or missing".to_owned();
            affected.backups.push(UnusableBackup { id: backup.id.clone(), why });
        }
    }
    affected.backups.sort_by(|a, b| a.id.cmp(&b.id));
    let mut told = BTreeSet::new();
    for timeline in full.timelines() {
        let reach = |catalog: &Catalog| -> Vec<(Lsn, Lsn)> {
            let windows = windows(catalog, timeline, &[]);
            windows.iter().map(|window| (window.from_lsn, window.until_lsn)).filter(|(a, b)| a < b).collect()
        };
        let (whole, left) = (reach(&full), reach(&broken));
        for (from, until) in whole {
            let lost = subtract((from, until), &left);
            if lost.is_empty() {
                continue;
            }
            let left: Vec<_> =
                left.iter().map(|(a, b)| ((*a).max(from), (*b).min(until))).filter(|(a, b)| a < b).collect();
            // What lies before a fork is told once, for the first timeline that it leads to.
            let news = lost.iter().filter(|stretch| told.insert(**stretch));
            let news: Vec<_> = news.copied().collect();
            if news.is_empty() {
                continue;
            }
            affected.windows.push(BrokenWindow { timeline, from_lsn: from, until_lsn: until, left });
            affected.unreachable.extend(news.into_iter().map(|(from_lsn, until_lsn)| Unreachable {
                timeline,
                from_lsn,
                until_lsn,
                from_time: None,
                until_time: None,
            }));
        }
    }
    for timeline in lost_ways(&full, places) {
        let first = full.segments.runs(timeline).first().map(|run| run.first);
        let (Some(first), Some(until_lsn)) = (first, full.stored_until(timeline)) else { continue };
        let from_lsn = first.start(full.lineage.segment_size);
        affected.unreachable.push(Unreachable {
            timeline,
            from_lsn,
            until_lsn,
            from_time: None,
            until_time: None,
        });
    }
    affected
}

/// Returns what of a stretch lies in none of `others`, which are in order.
pub(super) fn subtract((from, until): (Lsn, Lsn), others: &[(Lsn, Lsn)]) -> Vec<(Lsn, Lsn)> {
    let (mut left, mut at) = (Vec::new(), from);
    for (start, end) in others {
        if *start > at {
            left.push((at, (*start).min(until)));
        }
        at = at.max(*end);
        if at >= until {
            break;
        }
    }
    if at < until {
        left.push((at, until));
    }
    left.retain(|(a, b)| a < b);
    left
}

/// Returns all repositories together, with what is missing in all of them put back.
fn everything(places: &[Place<'_>]) -> Option<Catalog> {
    let (first, others) = places.split_first()?;
    let mut all = first.catalog.clone();
    all.rollups.clear();
    for place in others {
        let other = place.catalog;
        all.segments.append(other.segments.clone());
        for (timeline, history) in &other.histories {
            all.histories.entry(*timeline).or_insert_with(|| history.clone());
        }
        for backup in &other.backups {
            if !all.backups.iter().any(|known| known.id == backup.id) {
                all.backups.push(backup.clone());
            }
        }
        let gaps = other.gaps.iter().filter(|gap| !all.gaps.iter().any(|known| known.id == gap.id));
        let gaps: Vec<_> = gaps.cloned().collect();
        all.gaps.extend(gaps);
        for (timeline, tail) in other.tails.iter().flatten() {
            let tails = all.tails.get_or_insert_default();
            let reach = |tail: &StoredTail| (tail.segment, tail.until_lsn);
            if tails.get(timeline).is_none_or(|known| reach(known) < reach(tail)) {
                tails.insert(*timeline, tail.clone());
            }
        }
    }
    // What retention has removed is not found missing.
    let taken = taken_from(places);
    for record in places.iter().flat_map(|place| place.unrecorded) {
        if taken.contains(&*record.id) && !all.backups.iter().any(|known| known.id == record.id) {
            all.backups.push(record.clone());
        }
    }
    all.backups.sort_by(|a, b| (a.start_lsn, a.started, &a.id).cmp(&(b.start_lsn, b.started, &b.id)));
    let size = all.lineage.segment_size;
    for finding in places.iter().flat_map(|place| &place.findings) {
        if let Takes::Segments { first, last } = finding.takes {
            let segments = last.number(size).saturating_sub(first.number(size)) + 1;
            // Of two timelines the first one's numbers are those of the way.
            all.segments.insert_runs(&[Run { first, segments }], 0);
        }
    }
    all.lost_ends.clear();
    let Catalog { gaps, segments, .. } = &mut all;
    gaps.retain(|gap| gap.is_expired() || !gap.is_covered_by(segments, size));
    for (segment, end) in places.iter().flat_map(|place| place.tail_ends) {
        let tails = all.tails.get_or_insert_default();
        if let Some(tail) = tails.get_mut(&segment.timeline).filter(|tail| tail.segment == *segment) {
            tail.flaw = None;
            tail.until_lsn = tail.until_lsn.max(*end);
            tail.end_lsn = tail.end_lsn.max(*end);
        }
    }
    Some(all)
}

/// Returns the ids of the backups of which something is damaged or missing.
fn taken_from<'a>(places: &'a [Place<'_>]) -> BTreeSet<&'a str> {
    let findings = places.iter().flat_map(|place| &place.findings);
    let ids = findings.filter_map(|finding| match &finding.takes {
        Takes::Backup { id, .. } => Some(&**id),
        _ => None,
    });
    ids.collect()
}

/// Returns a catalog without what no repository has sound, and the backups that are lost, with why.
fn without_what_is_lost(full: &Catalog, places: &[Place<'_>]) -> (Catalog, BTreeMap<String, String>) {
    let size = full.lineage.segment_size;
    let mut broken = full.clone();
    for place in places {
        for finding in &place.findings {
            match &finding.takes {
                Takes::Segments { first, last } => {
                    for number in first.number(size)..=last.number(size).max(first.number(size)) {
                        let Some(name) = SegmentName::from_number(first.timeline, number, size) else {
                            break;
                        };
                        if !places.iter().any(|place| holds_segment(place, name)) {
                            broken.segments.remove_range(name.timeline, number, number + 1);
                        }
                    }
                }
                Takes::History(timeline) if !places.iter().any(|place| holds_history(place, *timeline)) => {
                    broken.histories.remove(timeline);
                }
                Takes::Tail(segment) => {
                    let sound = places.iter().filter(|place| !takes_tail(place, *segment));
                    let reach =
                        sound.filter_map(|place| place.catalog.tails.as_ref()?.get(&segment.timeline));
                    let flawed = place.catalog.tails.as_ref().and_then(|tails| tails.get(&segment.timeline));
                    let best = reach.chain(flawed).max_by_key(|tail| (tail.segment, tail.until_lsn)).cloned();
                    let tails = broken.tails.get_or_insert_default();
                    match best {
                        Some(best) => drop(tails.insert(segment.timeline, best)),
                        None => drop(tails.remove(&segment.timeline)),
                    }
                }
                _ => {}
            }
        }
    }
    let mut lost = BTreeMap::new();
    for id in taken_from(places) {
        if let Some(part) = lost_part(places, id) {
            lost.insert(id.to_owned(), part);
        }
    }
    // What builds on it is lost as well.
    loop {
        let building = full.backups.iter().find_map(|backup| {
            let parent = backup.parent.as_ref().filter(|parent| lost.contains_key(&parent.id))?;
            (!lost.contains_key(&backup.id)).then(|| (backup.id.clone(), parent.id.clone()))
        });
        let Some((id, parent)) = building else { break };
        lost.insert(id, format!("it builds on backup {parent}"));
    }
    broken.backups.retain(|backup| !lost.contains_key(&backup.id));
    (broken, lost)
}

/// Returns whether a repository has sound what a finding takes from another.
pub fn holds(place: &Place<'_>, takes: &Takes) -> bool {
    match takes {
        Takes::Nothing => false,
        Takes::Segments { first, last } => {
            let size = place.catalog.lineage.segment_size;
            (first.number(size)..=last.number(size).max(first.number(size))).all(|number| {
                SegmentName::from_number(first.timeline, number, size)
                    .is_some_and(|name| holds_segment(place, name))
            })
        }
        Takes::Tail(segment) => {
            let has = |tail: &StoredTail| tail.segment == *segment;
            !takes_tail(place, *segment)
                && (holds_segment(place, *segment)
                    || place.catalog.tails.iter().flatten().any(|(_, tail)| has(tail)))
        }
        Takes::History(timeline) => holds_history(place, *timeline),
        Takes::Backup { id, part } => {
            let damaged = place.findings.iter().any(|finding| match &finding.takes {
                Takes::Backup { id: known, part: other } => known == id && other == part,
                _ => false,
            });
            !damaged && place.catalog.backups.iter().any(|backup| backup.id == *id)
        }
    }
}

fn takes_segment(place: &Place<'_>, name: SegmentName) -> bool {
    place.findings.iter().any(|finding| match finding.takes {
        Takes::Segments { first, last } => {
            first.timeline == name.timeline && first <= name && name <= last.on(first.timeline)
        }
        _ => false,
    })
}

fn holds_segment(place: &Place<'_>, name: SegmentName) -> bool {
    place.catalog.segments.contains(name) && !takes_segment(place, name)
}

fn holds_history(place: &Place<'_>, timeline: TimelineId) -> bool {
    place.catalog.histories.contains_key(&timeline)
        && !place.findings.iter().any(|finding| finding.takes == Takes::History(timeline))
}

fn takes_tail(place: &Place<'_>, segment: SegmentName) -> bool {
    place.findings.iter().any(|finding| finding.takes == Takes::Tail(segment))
}

/// Returns a part of a backup that no repository has sound.
fn lost_part(places: &[Place<'_>], id: &str) -> Option<String> {
    let parts = |place: &Place<'_>| -> BTreeSet<String> {
        let parts = place.findings.iter().filter_map(|finding| match &finding.takes {
            Takes::Backup { id: known, part } if known == id => Some(part.clone()),
            _ => None,
        });
        parts.collect()
    };
    let holding = places.iter().filter(|place| place.catalog.backups.iter().any(|backup| backup.id == id));
    let damaged: Vec<BTreeSet<String>> = holding.map(parts).collect();
    match damaged.split_first() {
        // No repository has its record.
        None => Some("its record is damaged or missing".to_owned()),
        Some((first, others)) => {
            let part = first.iter().find(|part| others.iter().all(|parts| parts.contains(*part)));
            part.map(|part| format!("{part} is damaged or missing"))
        }
    }
}

/// Returns the timelines that nothing leads to any more, because no repository has their history file.
fn lost_ways(full: &Catalog, places: &[Place<'_>]) -> BTreeSet<TimelineId> {
    let taken = places.iter().flat_map(|place| &place.findings).filter_map(|finding| match finding.takes {
        Takes::History(timeline) => Some(timeline),
        _ => None,
    });
    let lost = taken.filter(|timeline| !places.iter().any(|place| holds_history(place, *timeline)));
    lost.filter(|timeline| !full.histories.contains_key(timeline)).collect()
}

/// Returns whether the WAL is there that makes a backup consistent.
fn is_consistent(catalog: &Catalog, backup: &BackupRecord) -> bool {
    let Some(history) = catalog.history(backup.stop_timeline) else { return false };
    build_chain(catalog, &history, backup.start_lsn).end() >= backup.stop_lsn
}
