//! What retention has to know of a repository beside its catalog.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::catalog::Catalog;
use walship::pg::{SegmentName, TimelineId};
use walship::repository::{LineageRepository, Recordless, load_catalog, load_tails};
use walship::wal::event::EventKind;
use walship::wal::summary::SegmentSummary;
use walship::{Error, Result};

use crate::retention::{Begun, BegunAt, Seen};

/// How many records are read at once.
const READS_MAX: usize = 16;

/// How many segments at the end of a timeline are looked at to find when something happened last.
const LOOK_BACK_MAX: u64 = 16;

pub(super) async fn read(repository: &LineageRepository) -> Result<(Catalog, Seen)> {
    let mut catalog = load_catalog(repository).await?;
    let tails = load_tails(repository, &mut catalog).await?;
    let found = recordless(repository, &catalog).await?;
    let mut seen = Seen {
        lenders: lenders(repository, &catalog, &found).await?,
        parents: parents(&found),
        holds: repository.holds().await?,
        recordless: found.into_iter().map(begun).collect(),
        expiring: repository.expiring().await?,
        last_times: last_times(repository, &catalog, &tails).await,
        ..Seen::default()
    };
    for gap in catalog.gaps.iter().filter(|gap| gap.is_expired()) {
        let (from, until) = gap.whole_segments(catalog.lineage.segment_size);
        if repository.wal_in_range(gap.timeline, from, until).await?.0 > 0 {
            seen.leftovers.push((gap.timeline, from, until));
        }
    }
    Ok((catalog, seen))
}

pub(super) async fn recordless(repository: &LineageRepository, catalog: &Catalog) -> Result<Vec<Recordless>> {
    let complete = catalog.backups.iter().map(|backup| &*backup.id);
    let orphaned = catalog.orphaned_backups.iter().map(|backup| &*backup.id);
    repository.recordless_backups(&complete.chain(orphaned).collect()).await
}

pub(super) fn begun(found: Recordless) -> Begun {
    Begun {
        id: found.id,
        start: found.started.map(|started| BegunAt {
            timeline: started.timeline,
            start_lsn: started.start_lsn,
            started: started.started,
        }),
    }
}

pub(super) fn parents(found: &[Recordless]) -> BTreeMap<String, String> {
    let of = |one: &Recordless| Some((one.id.clone(), one.started.as_ref()?.parent.clone()?));
    found.iter().filter_map(of).collect()
}

/// Returns in whose folders objects of complete backups lie. Only where there are backups without a record the whole
/// records are read.
async fn lenders(
    repository: &LineageRepository,
    catalog: &Catalog,
    recordless: &[Recordless],
) -> Result<Option<BTreeMap<String, BTreeSet<String>>>> {
    if recordless.is_empty() {
        return Ok(Some(BTreeMap::new()));
    }
    let reads = catalog.backups.iter().map(|backup| async move {
        let whole = repository.whole_record(backup).await?;
        let lent: BTreeSet<String> = whole.objects.into_iter().filter_map(|object| object.backup).collect();
        Ok::<_, Error>((backup.id.clone(), lent))
    });
    futures_util::stream::iter(reads).buffer_unordered(READS_MAX).try_collect().await.map(Some)
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

fn last_time(summary: &SegmentSummary) -> Option<DateTime<Utc>> {
    let checkpoints = summary.events.iter().filter_map(|event| match event.kind {
        EventKind::Checkpoint { time, .. } => Some(time),
        _ => None,
    });
    summary.max_time.map(|stop| stop.time).into_iter().chain(checkpoints).max()
}
