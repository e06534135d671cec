//! What retention has to know of a repository beside its catalog.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::catalog::{BackupRecord, Catalog, Hold};
use walship::pg::{Lsn, SegmentName, TimelineId};
use walship::repository::{
    LineageRepository, Mark, Recordless, load_catalog, load_catalog_from_listings, load_tails,
};
use walship::wal::event::EventKind;
use walship::wal::summary::SegmentSummary;
use walship::{Error, Result};

use super::Request;
use crate::retention::{Begun, BegunAt, Seen};

/// How many records are read at once.
const READS_MAX: usize = 16;

/// How many segments at the end of a timeline are looked at to find when something happened last.
const LOOK_BACK_MAX: u64 = 16;

/// What was asked of a store so long ago has taken effect, or never will.
const SETTLED_AFTER: TimeDelta = TimeDelta::hours(1);

/// Returns the catalog of a repository, what retention has to know beside it, and the marks of other removals.
pub(super) async fn read(
    repository: &LineageRepository,
    request: &Request,
) -> Result<(Catalog, Seen, Vec<Mark>)> {
    // What is stored is listed: an index may tell of what is gone, and hide what a plan then takes for kept. It says only when
    // things happened, and where a timeline once ended.
    let indexed = load_catalog(repository).await?;
    let mut catalog = load_catalog_from_listings(repository).await?;
    (catalog.rollups, catalog.lost_ends) = (indexed.rollups, indexed.lost_ends);
    let Catalog { lost_ends, segments, .. } = &mut catalog;
    lost_ends.retain(|_, last| !segments.contains(*last));
    let tails = load_tails(repository, &mut catalog).await?;
    let marks = repository.marks().await?;
    let mut seen = Seen {
        holds: holds(repository).await?,
        expiring: marks.iter().map(|mark| mark.backup.clone()).collect(),
        last_times: last_times(repository, &catalog, &tails).await,
        left_times: left_times(repository, &catalog).await,
        given_up: request.give_up.clone(),
        ..Seen::default()
    };
    note_backups(repository, &catalog, &mut seen).await?;
    for gap in catalog.gaps.iter().filter(|gap| gap.is_expired()) {
        let (from, until) = gap.whole_segments(catalog.lineage.segment_size);
        if repository.wal_in_range(gap.timeline, from, until).await?.0 > 0 {
            seen.leftovers.push((gap.timeline, from, until));
            // A request of a removal that was killed may still take effect for a while.
            let told = repository.gap_written_at(gap).await?.unwrap_or(gap.recorded);
            if request.now.signed_duration_since(told) > SETTLED_AFTER {
                let whole = repository.whole_segments_in_range(gap.timeline, from, until).await?;
                seen.still_whole.insert(gap.id.clone(), whole);
            }
        }
    }
    Ok((catalog, seen, marks))
}

/// Returns what is seen by now of holds and backups; the catalog is the one that was read before.
pub(super) async fn again(repository: &LineageRepository, catalog: &Catalog, before: &Seen) -> Result<Seen> {
    let mut seen = Seen { holds: holds(repository).await?, ..before.clone() };
    note_backups(repository, catalog, &mut seen).await?;
    Ok(seen)
}

/// Returns the holds that were not released. A restore's hold lasts as long as the restore meant it to, but by the store's
/// clock: the restoring machine's may be wrong.
async fn holds(repository: &LineageRepository) -> Result<Vec<Hold>> {
    let looks = repository.holds().await?.into_iter().map(|mut hold| async move {
        if let (Some(_), Some(until)) = (hold.wal, hold.until)
            && let Some(written) = repository.hold_written_at(&hold.id).await?
        {
            hold.until = written.checked_add_signed(until.signed_duration_since(hold.created)).or(hold.until);
        }
        Ok(hold)
    });
    futures_util::stream::iter(looks).buffered(READS_MAX).try_collect().await
}

/// Notes what complete backups depend on, what is missing of them, and the backups that the catalog does not tell of.
async fn note_backups(repository: &LineageRepository, catalog: &Catalog, seen: &mut Seen) -> Result<()> {
    let complete = catalog.backups.iter().map(|backup| &*backup.id);
    let orphaned = catalog.orphaned_backups.iter().map(|backup| &*backup.id);
    let known: BTreeSet<&str> = complete.chain(orphaned).collect();
    // In this order: one that becomes complete meanwhile is found both ways.
    let found = repository.recordless_backups(&known, &seen.given_up).await?;
    seen.recordless.clear();
    for Recordless { id, started } in found {
        if let Some(parent) = started.as_ref().and_then(|started| started.parent.clone()) {
            seen.parents.insert(id.clone(), parent);
        }
        let start = started.map(|started| BegunAt {
            timeline: started.timeline,
            start_lsn: started.start_lsn,
            started: started.started,
        });
        let last_written = repository.backup_written_at(&id).await?;
        let was_finishing = repository.was_finishing(&id).await?;
        seen.recordless.push(Begun { id, start, last_written, complete: false, was_finishing });
    }
    let mut records = repository.complete_backups().await?;
    // Of what was looked at already nothing has changed: a record is written once.
    records.retain(|record| !known.contains(&*record.id) || !seen.lenders.contains_key(&record.id));
    let looks = records.iter().map(|record| async move {
        let whole = repository.whole_record(record).await?;
        let flaw = match repository.check_backup_here(&whole).await {
            Ok(()) => None,
            Err(error @ (Error::Missing(_) | Error::Corrupt(_))) => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        let lenders: BTreeSet<String> =
            whole.objects.into_iter().filter_map(|object| object.backup).collect();
        let written = repository.backup_written_at(&record.id).await?;
        Ok::<_, Error>((record, lenders, flaw, written))
    });
    let looked: Vec<_> = futures_util::stream::iter(looks).buffered(READS_MAX).try_collect().await?;
    for (record, lenders, flaw, written) in looked {
        let id = &record.id;
        seen.lenders.insert(id.clone(), lenders);
        seen.written.extend(written.map(|written| (id.clone(), written)));
        seen.flaws.extend(flaw.map(|flaw| (id.clone(), flaw)));
        seen.parents.extend(record.parent.as_ref().map(|parent| (id.clone(), parent.id.clone())));
        if !known.contains(&**id) {
            let BackupRecord { timeline, start_lsn, started, .. } = *record;
            seen.recordless.retain(|begun| begun.id != *id);
            let start = Some(BegunAt { timeline, start_lsn, started });
            seen.recordless.push(Begun {
                id: id.clone(),
                start,
                last_written: None,
                complete: true,
                was_finishing: true,
            });
        }
    }
    Ok(())
}

/// Returns when something happened last on each timeline, as far as its last segments tell. What cannot be read tells
/// nothing.
async fn last_times(
    repository: &LineageRepository,
    catalog: &Catalog,
    tails: &[SegmentSummary],
) -> BTreeMap<TimelineId, DateTime<Utc>> {
    let size = catalog.lineage.segment_size;
    let mut times: BTreeMap<TimelineId, DateTime<Utc>> = BTreeMap::new();
    let mut note = |timeline, summary: &SegmentSummary| {
        let Some(time) = last_time(summary) else { return false };
        let known = times.entry(timeline).or_insert(time);
        *known = time.max(*known);
        true
    };
    for summary in tails {
        note(summary.segment.timeline, summary);
    }
    for timeline in catalog.timelines() {
        let mut at: Option<SegmentName> = catalog.segments.last_of_timeline(timeline);
        for _ in 0..LOOK_BACK_MAX {
            let Some(name) = at.filter(|name| catalog.segments.contains(*name)) else { break };
            match repository.segment_summary(name).await {
                Ok(Some(summary)) if note(timeline, &summary) => break,
                Ok(_) => at = name.previous(size),
                Err(error) => {
                    tracing::debug!(%error, "what happened last on a timeline is not known");
                    break;
                }
            }
        }
    }
    times
}

/// Returns when something happened last on each timeline before others left it, by the segments up to there. What cannot be read
/// tells nothing.
async fn left_times(
    repository: &LineageRepository,
    catalog: &Catalog,
) -> BTreeMap<TimelineId, DateTime<Utc>> {
    let size = catalog.lineage.segment_size;
    let mut left: BTreeMap<TimelineId, Lsn> = BTreeMap::new();
    for entry in catalog.histories.values().flat_map(|history| &history.ancestors) {
        let known = left.entry(entry.timeline).or_insert(entry.switch_lsn);
        *known = entry.switch_lsn.max(*known);
    }
    let mut times = BTreeMap::new();
    for (timeline, lsn) in left {
        let mut at = Some(SegmentName::containing(timeline, lsn, size));
        for _ in 0..LOOK_BACK_MAX {
            let Some(name) = at.filter(|name| catalog.segments.contains(*name)) else { break };
            match repository.segment_summary(name).await {
                Ok(Some(summary)) => {
                    let ends = [summary.max_time, summary.min_time].into_iter().flatten();
                    if let Some(time) = ends.filter(|end| end.lsn < lsn).map(|end| end.time).max() {
                        times.insert(timeline, time);
                        break;
                    }
                    at = name.previous(size);
                }
                Ok(None) => at = name.previous(size),
                Err(error) => {
                    tracing::debug!(%error, "when a timeline was left is not known");
                    break;
                }
            }
        }
    }
    times
}

fn last_time(summary: &SegmentSummary) -> Option<DateTime<Utc>> {
    let checkpoints = summary.events.iter().filter_map(|event| match event.kind {
        EventKind::Checkpoint { time, .. } => Some(time),
        _ => None,
    });
    summary.max_time.map(|stop| stop.time).into_iter().chain(checkpoints).max()
}
