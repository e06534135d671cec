//! What is not there: holes, less than was seen before, less than the server has handed over.

use std::collections::BTreeSet;

use walship::catalog::{Catalog, GapRecord};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use walship::replication::ServerPosition;

use super::affected::subtract;
use super::needed::Needed;
use super::proven::SeenBefore;
use super::{Finding, FindingKind, Takes};
use crate::plan::{Chain, ChainEnding, KnownBy, build_chain, chains_of, gaps_of};

/// An archive that ends no further behind a server than so many segments is at work on them.
const BEHIND_SEGMENTS_MAX: u64 = 2;

/// Returns the WAL that is missing between what is stored, behind it where something tells that there was more, or of what
/// makes a backup consistent that is not among those that are `going`. What the ledger knows is no damage: it is on
/// record.
pub fn gaps_found(
    repository: &str,
    catalog: &Catalog,
    needed: &Needed,
    going: &BTreeSet<String>,
) -> Vec<Finding> {
    let size = catalog.lineage.segment_size;
    let mut gaps = Vec::new();
    for history in catalog.timelines().into_iter().filter_map(|timeline| catalog.history(timeline)) {
        gaps.extend(gaps_of(catalog, &history).into_iter().filter(|gap| !gap.expired));
    }
    // The timelines of backups of which nothing at all is stored.
    let mut unknown = BTreeSet::new();
    let complete = catalog.backups.iter().filter(|backup| !going.contains(&backup.id));
    for backup in complete.filter(|backup| needed.backups.contains(&backup.id)) {
        let Some(history) = catalog.history(backup.stop_timeline) else {
            unknown.insert(backup.stop_timeline);
            continue;
        };
        let chain = build_chain(catalog, &history, backup.start_lsn);
        // Also before the first segment that is stored, of which nothing else tells.
        if let (true, ChainEnding::Gap(gap)) = (chain.end() < backup.stop_lsn, &chain.ending) {
            gaps.push(gap.clone());
        }
    }
    let timelines = catalog.timelines();
    let mut findings: Vec<Finding> = unknown
        .into_iter()
        .filter(|timeline| !timelines.contains(timeline))
        .map(|timeline| {
            let object = format!("{}.history", timeline.hex());
            let what = "a backup ended on this timeline, of which nothing is stored".to_owned();
            Finding::damage(FindingKind::Missing, repository, object, what, Takes::History(timeline))
        })
        .collect();
    let mut told = Vec::<(SegmentName, SegmentName)>::new();
    for gap in gaps {
        let (first, last) = (gap.first_missing, gap.last_missing);
        let is_told = told.iter().any(|(known, end)| *known <= first && *end == last);
        if is_told || !needed.has_any(first, last.on(first.timeline), size) {
            continue;
        }
        told.push((first, last));
        // What makes a backup consistent is missed although it was expired.
        let untold = match gap.expired {
            true => vec![(gap.from, gap.to)],
            false => untold(gap.ledger.iter(), gap.from, gap.to),
        };
        if untold.is_empty() {
            findings.push(Finding::note(
                FindingKind::Missing,
                repository,
                named(first, last),
                gap.to_string(),
            ));
        }
        for (from, to) in untold {
            let of_all = (from, to) == (gap.from, gap.to);
            let (first, last) = match of_all {
                true => (first, last),
                false => {
                    let end = SegmentName::ending_at(last.timeline, to, size).unwrap_or(last);
                    (SegmentName::containing(first.timeline, from, size), end)
                }
            };
            let what =
                if of_all { gap.to_string() } else { format!("the ledger does not tell of it: {gap}") };
            let behind = gap.known_by == KnownBy::LaterWal;
            let kind = if behind { FindingKind::Missing } else { FindingKind::MissingEnd };
            let takes = Takes::Segments { first, last };
            findings.push(Finding::damage(kind, repository, named(first, last), what, takes));
        }
    }
    findings
}

/// Names segments in a row.
fn named(first: SegmentName, last: SegmentName) -> String {
    if first == last { first.to_string() } else { format!("{first} to {last}") }
}

/// Returns the parts of a stretch of which no record of the ledger tells.
fn untold<'a>(ledger: impl Iterator<Item = &'a GapRecord>, from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
    let mut told: Vec<(Lsn, Lsn)> = ledger.map(|record| (record.start_lsn, record.end_lsn)).collect();
    told.sort_unstable();
    subtract((from, to), &told)
}

/// How many segments are stored side by side at most: what is missing further before the end is not on its way.
const SIDE_BY_SIDE: u64 = 64;

/// Returns whether any of what is missing may be on its way: it is at the end of its timeline, or is the newest backup or
/// timeline.
pub fn may_come<'a>(catalog: &Catalog, missing: impl IntoIterator<Item = &'a Finding>) -> bool {
    let size = catalog.lineage.segment_size;
    missing.into_iter().filter(|finding| finding.is_damage()).any(|finding| match &finding.takes {
        Takes::Segments { last, .. } => {
            let end = catalog.segments.last_of_timeline(last.timeline).map_or(0, |end| end.number(size));
            last.number(size).saturating_add(SIDE_BY_SIDE) >= end
        }
        Takes::Backup { id, .. } => catalog.backups.iter().all(|backup| backup.id < *id),
        Takes::History(timeline) => catalog.timelines().iter().all(|known| known <= timeline),
        Takes::Tail(_) => true,
        Takes::Nothing => false,
    })
}

/// Returns what of `now` was missing before: what came after that may have left others behind it for a moment.
pub fn still_missing(before: &[Finding], now: Vec<Finding>, size: SegmentSize) -> Vec<Finding> {
    let same = |one: &Finding, other: &Finding| match (&one.takes, &other.takes) {
        (Takes::Segments { first, last }, Takes::Segments { first: from, last: to }) => {
            first.timeline == from.timeline
                && first.number(size) <= to.number(size)
                && from.number(size) <= last.number(size)
        }
        _ => one == other,
    };
    now.into_iter().filter(|finding| before.iter().any(|known| same(known, finding))).collect()
}

/// Returns what was seen by earlier verifications, or in other repositories, and is not there now. `gone` are the
/// backups that retention has removed or is removing; WAL that it removed is in the ledger. `told` was found already.
pub fn less_than_seen(
    repository: &str,
    catalog: &Catalog,
    seen: &SeenBefore,
    gone: &BTreeSet<String>,
    needed: &Needed,
    told: &[Finding],
) -> Vec<Finding> {
    let size = catalog.lineage.segment_size;
    let mut findings = Vec::new();
    for timeline in seen.wal.timelines() {
        for run in seen.wal.runs(timeline) {
            for (from, until) in
                missing_of(catalog, timeline, run.first.number(size), run.last.number(size) + 1)
            {
                for (from, until) in needed.within(timeline, from, until) {
                    findings.extend(missing_runs(repository, catalog, timeline, (from, until), told));
                }
            }
        }
    }
    for (timeline, until) in &seen.tails {
        let tail = catalog.tails.as_ref().and_then(|tails| tails.get(timeline)).map(|tail| tail.until_lsn);
        let reached = catalog.stored_until(*timeline).max(tail).unwrap_or(Lsn(0));
        let segment = SegmentName::ending_at(*timeline, *until, size);
        let Some(segment) = segment.filter(|_| *until > reached) else { continue };
        let known = catalog.gaps.iter().any(|gap| gap.touches(segment, size));
        if needed.to_the_end && !known && !already_told(told.iter().chain(&findings), segment, segment, size)
        {
            findings.push(Finding::damage(
                FindingKind::MissingEnd,
                repository,
                segment.to_string(),
                format!("parts of it reached to {until}, now timeline {timeline} ends at {reached}"),
                Takes::Segments { first: segment, last: segment },
            ));
        }
    }
    for timeline in &seen.histories {
        let object = format!("{}.history", timeline.hex());
        let known = catalog.histories.contains_key(timeline);
        if !known && !told.iter().any(|finding| finding.takes == Takes::History(*timeline)) {
            let what = "it was there, and is gone; retention keeps history files for ever".to_owned();
            findings.push(Finding::damage(
                FindingKind::Missing,
                repository,
                object,
                what,
                Takes::History(*timeline),
            ));
        }
    }
    let stored: BTreeSet<&str> = catalog
        .backups
        .iter()
        .map(|backup| &*backup.id)
        .chain(catalog.orphaned_backups.iter().map(|backup| &*backup.id))
        .collect();
    let lost = |takes: &Takes, id: &str| matches!(takes, Takes::Backup { id: known, .. } if known == id);
    for id in seen.backups.iter().filter(|id| !stored.contains(&***id) && !gone.contains(&***id)) {
        if (needed.everything || needed.backups.contains(id))
            && !told.iter().any(|finding| lost(&finding.takes, id))
        {
            findings.push(Finding::damage(
                FindingKind::Missing,
                repository,
                format!("backup {id}"),
                "it was there, and is gone; no removal by retention is on record",
                Takes::Backup { id: id.clone(), part: "record".to_owned() },
            ));
        }
    }
    findings
}

/// Returns the segments of a stretch that is missing, without those of which the ledger tells whole.
fn missing_runs(
    repository: &str,
    catalog: &Catalog,
    timeline: TimelineId,
    (from, until): (u64, u64),
    told: &[Finding],
) -> Vec<Finding> {
    let bytes = catalog.lineage.segment_size.bytes();
    let ledger = catalog.gaps.iter().filter(|gap| gap.timeline == timeline);
    let start = |number: u64| Lsn(number.saturating_mul(bytes));
    let untold = untold(ledger, start(from), start(until));
    let runs = untold.into_iter().map(|(from, until)| (from.0 / bytes, until.0.div_ceil(bytes)));
    runs.filter_map(|run| missing_run(repository, catalog, timeline, run, told)).collect()
}

fn missing_run(
    repository: &str,
    catalog: &Catalog,
    timeline: TimelineId,
    (from, until): (u64, u64),
    told: &[Finding],
) -> Option<Finding> {
    let size = catalog.lineage.segment_size;
    let first = SegmentName::from_number(timeline, from, size)?;
    let last = SegmentName::from_number(timeline, until - 1, size)?;
    if already_told(told.iter(), first, last, size) {
        return None;
    }
    let at_end = catalog.stored_until(timeline).is_none_or(|end| end <= first.start(size));
    let kind = if at_end { FindingKind::MissingEnd } else { FindingKind::Missing };
    let object = named(first, last);
    let segments = until - from;
    let what = format!(
        "{} there, and {} gone: {segments} segment(s); no removal by retention is on record",
        if segments == 1 { "it was" } else { "they were" },
        if segments == 1 { "is" } else { "are" }
    );
    Some(Finding::damage(kind, repository, object, what, Takes::Segments { first, last }))
}

fn already_told<'a>(
    mut told: impl Iterator<Item = &'a Finding>,
    first: SegmentName,
    last: SegmentName,
    size: SegmentSize,
) -> bool {
    told.any(|finding| match &finding.takes {
        Takes::Segments { first: a, last: b } => {
            a.timeline == first.timeline
                && a.number(size) <= last.number(size)
                && first.number(size) <= b.number(size)
                && finding.kind != FindingKind::Damaged
        }
        _ => false,
    })
}

/// Returns the numbers in a range of a timeline that are not stored, as ranges.
fn missing_of(catalog: &Catalog, timeline: TimelineId, from: u64, until: u64) -> Vec<(u64, u64)> {
    let size = catalog.lineage.segment_size;
    let (mut missing, mut at) = (Vec::new(), from);
    for run in catalog.segments.runs(timeline) {
        let (first, end) = (run.first.number(size), run.last.number(size) + 1);
        if end <= at {
            continue;
        }
        if first >= until {
            break;
        }
        if at < first {
            missing.push((at, first));
        }
        at = end;
    }
    if at < until {
        missing.push((at, until));
    }
    missing
}

/// Returns how an archive falls short of a server that was asked before the archive was looked at. `slot` is the one
/// that a receiver of this archive streams through.
///
/// What the server's archiver has handed over, and what a receiver has acknowledged, must be there. WAL that the server
/// still has to hand over is no damage while its archiver is at work.
pub fn behind_server(
    repository: &str,
    catalog: &Catalog,
    server: &ServerPosition,
    slot: Option<&str>,
) -> Vec<Finding> {
    let size = catalog.lineage.segment_size;
    let timeline = server.timeline;
    let missing = |kind, object: String, what: String, takes| {
        vec![Finding::damage(kind, repository, object, what, takes)]
    };
    let Some(history) = catalog.history(timeline) else {
        return missing(
            FindingKind::MissingEnd,
            format!("timeline {timeline}"),
            format!("the server is on timeline {timeline}, whose history file is not archived"),
            Takes::History(timeline),
        );
    };
    let until = chains_of(catalog, &history).last().map_or(Lsn(0), Chain::end);
    let takes = |end: Lsn| {
        let first = SegmentName::containing(timeline, until, size);
        let last = SegmentName::ending_at(timeline, end, size).unwrap_or(first);
        Takes::Segments { first, last: last.max(first) }
    };
    if let Some(archived) = handed_over(server).filter(|name| !is_there(catalog, *name)) {
        let expired = catalog.gaps.iter().any(|gap| gap.covers(archived, size));
        if !expired {
            return missing(
                FindingKind::MissingEnd,
                archived.to_string(),
                format!(
                    "the server's archiver has handed it over, the archive ends at {until}: this is an older copy of \
                     the repository, or the server archives elsewhere"
                ),
                takes(archived.end(size)),
            );
        }
    }
    let acknowledged =
        server.slots.iter().find(|known| slot == Some(&*known.name)).map(|known| known.restart_lsn);
    if let Some(lsn) = acknowledged.filter(|lsn| *lsn > until) {
        return missing(
            FindingKind::MissingEnd,
            format!("timeline {timeline}"),
            format!("the receiver has acknowledged WAL up to {lsn}, the archive ends at {until}"),
            takes(lsn),
        );
    }
    let behind = server.wal_lsn.0.saturating_sub(until.0) / size.bytes();
    if behind < BEHIND_SEGMENTS_MAX {
        return Vec::new();
    }
    let object = format!("timeline {timeline}");
    let what =
        format!("the archive ends at {until}, {behind} segments before the server's {}", server.wal_lsn);
    match handed_over(server) {
        Some(_) => vec![Finding::note(
            FindingKind::MissingEnd,
            repository,
            object,
            format!("{what}: its archiver has yet to hand them over"),
        )],
        None => missing(
            FindingKind::MissingEnd,
            object,
            format!(
                "{what}, and nothing tells that they are on their way: this is an older copy of the repository, or \
                 nothing is archived any more"
            ),
            takes(server.wal_lsn),
        ),
    }
}

/// Returns the last whole segment that the server's archiver has handed over.
fn handed_over(server: &ServerPosition) -> Option<SegmentName> {
    match server.archiver.last_archived_wal.as_deref()?.parse().ok()? {
        WalFileName::Segment(name) => Some(name),
        // Of the others it is known that the segment before was handed over.
        WalFileName::Partial(name) | WalFileName::BackupHistory(name, _) => {
            name.previous(server.segment_size)
        }
        WalFileName::History(_) => None,
    }
}

fn is_there(catalog: &Catalog, name: SegmentName) -> bool {
    catalog.segments.contains(name) || catalog.incomplete.contains(&name)
}
