//! What a repository holds: its catalog, the newest WAL, and the last records of what was done with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId};
use crate::repository::{ClusterName, ClusterRepository, LineageRepository, load_catalog, load_tails};
use crate::storage::{self, StorageConfig};
use crate::wal::SegmentSummary;
use crate::wal::event::WalEvent;
use crate::wal::summary::StopTime;
use crate::watch::{BackupFacts, Contents, DrillFacts, ExpireFacts, VerificationFacts, reach};

use super::Identity;

/// How many segments are looked into, from the last back, for the end of a transaction.
const LOOK_BACK_MAX: usize = 8;

/// How many drills are read, from the last back, for one that proved something.
const DRILLS_MAX: usize = 20;

/// How many verifications are read, from the last back, for damage that stands.
const VERIFICATIONS_MAX: usize = 20;

/// Looks at a repository; returns what it holds, and how long the store took for one small read.
pub(super) async fn look(
    config: &StorageConfig,
    cluster: &ClusterName,
    server: Option<&Identity>,
) -> Result<(Contents, Duration)> {
    let cluster = ClusterRepository::open(storage::open(config)?, cluster).await?;
    let lineage = match server {
        Some(server) => cluster.lineage_of(server.system_identifier, server.segment_size).await?,
        None => cluster.newest_lineage().await?,
    };
    let began = Instant::now();
    lineage.confirm_marker().await?;
    let latency = began.elapsed();
    let mut catalog = load_catalog(&lineage).await?;
    let summaries = load_tails(&lineage, &mut catalog).await?;
    let contents = contents(&lineage, &catalog, summaries, server).await?;
    Ok((contents, latency))
}

async fn contents(
    lineage: &LineageRepository,
    catalog: &Catalog,
    summaries: Vec<SegmentSummary>,
    server: Option<&Identity>,
) -> Result<Contents> {
    let with_wal =
        |timeline: &TimelineId| catalog.has_wal_of(*timeline) && catalog.history(*timeline).is_some();
    let timeline = server
        .map(|server| server.timeline)
        .filter(with_wal)
        .or_else(|| catalog.timelines().into_iter().rev().find(with_wal));
    let newest = match timeline {
        Some(timeline) => newest(lineage, catalog, summaries, timeline).await?,
        None => Newest::default(),
    };
    let reach = timeline.and_then(|timeline| reach(catalog, timeline, &newest.events));
    let gaps: Vec<_> = catalog.gaps.iter().filter(|gap| !gap.is_expired()).collect();
    let last_start = catalog.backups.iter().map(|backup| backup.start_lsn).max();
    let bare = gaps.iter().filter(|gap| last_start.is_none_or(|start| start < gap.end_lsn)).count();
    let runs = catalog.segments.timelines().into_iter().flat_map(|timeline| catalog.segments.runs(timeline));
    let (mut segments, mut wal_bytes) = (0, 0_u64);
    for run in runs {
        let size = catalog.lineage.segment_size;
        segments += run.last.number(size) - run.first.number(size) + 1;
        wal_bytes = wal_bytes.saturating_add(run.stored_bytes);
    }
    let drills = lineage.recent_drills(DRILLS_MAX).await?;
    let proven = drills.iter().find(|drill| DrillFacts::has_proven(&drill.outcome));
    let expires = lineage.recent_expires(1).await?;
    let verifications = lineage.recent_verifications(VERIFICATIONS_MAX).await?;
    Ok(Contents {
        lineage: catalog.lineage.number,
        timeline,
        backups: catalog.backups.iter().map(|backup| BackupFacts::of(backup, &verifications)).collect(),
        unfinished_backups: catalog.unfinished_backups.len() as u64,
        orphaned_backups: catalog.orphaned_backups.len() as u64,
        durable_lsn: reach.map(|reach| reach.until),
        newest_commit: newest.commit.map(|stop| stop.time),
        newest_xid: newest.xid,
        window: reach.and_then(|reach| reach.window),
        gaps: gaps.len() as u64,
        gaps_without_backup: bare as u64,
        lost_ends: catalog.lost_ends.len() as u64,
        segments,
        wal_bytes,
        drill: drills.first().map(DrillFacts::of),
        proven: proven.map(|drill| drill.head.started),
        expire: expires.first().map(|(record, outcome)| ExpireFacts::of(record, outcome.as_ref())),
        verification: VerificationFacts::of(&verifications),
        verified: VerificationFacts::last_done(&verifications),
    })
}

/// What the newest WAL says.
#[derive(Default)]
struct Newest {
    commit: Option<StopTime>,
    xid: Option<u32>,
    events: BTreeMap<TimelineId, Vec<WalEvent>>,
}

impl Newest {
    fn add(&mut self, summary: &SegmentSummary) {
        if self.commit.is_none() {
            self.commit = summary.max_time;
        }
        if let Some((_, last)) = summary.ended_xids {
            self.xid = Some(self.xid.map_or(last, |known| known.max(last)));
        }
        self.events.entry(summary.segment.timeline).or_default().extend(summary.events.iter().cloned());
    }
}

/// Reads from the end of a timeline back, until a segment tells of the end of a transaction.
async fn newest(
    lineage: &LineageRepository,
    catalog: &Catalog,
    summaries: Vec<SegmentSummary>,
    timeline: TimelineId,
) -> Result<Newest> {
    let size = catalog.lineage.segment_size;
    let mut newest = Newest::default();
    let Some(history) = catalog.history(timeline) else { return Ok(newest) };
    let tail = catalog.tails.as_ref().and_then(|tails| tails.get(&timeline));
    let tail = tail.filter(|tail| catalog.served_tail(tail.segment).is_some());
    let in_parts = |name: SegmentName| summaries.iter().find(|summary| summary.segment == name);
    let mut number = match (tail, catalog.segments.last_of_timeline(timeline)) {
        (Some(tail), _) => {
            in_parts(tail.segment).into_iter().for_each(|summary| newest.add(summary));
            tail.segment.number(size).checked_sub(1)
        }
        (None, last) => last.map(|last| last.number(size)),
    };
    for _ in 0..LOOK_BACK_MAX {
        let Some(at) = number.filter(|_| newest.commit.is_none()) else { break };
        // The last byte of a segment tells whose it is: what a fork cuts is stored under the descendant's name.
        let last_byte = crate::pg::Lsn((at + 1).saturating_mul(size.bytes()).saturating_sub(1));
        let Some(name) = SegmentName::from_number(history.timeline_of(last_byte), at, size) else { break };
        if !catalog.segments.contains(name) {
            break;
        }
        match in_parts(name) {
            Some(summary) => newest.add(summary),
            None => match lineage.segment_summary(name).await {
                Ok(Some(summary)) => newest.add(&summary),
                // What is damaged tells nothing; `pitr verify` is for that.
                Ok(None) | Err(Error::Corrupt(_)) => {}
                Err(error) => return Err(error),
            },
        }
        number = at.checked_sub(1);
    }
    if newest.commit.is_none() {
        let on_way = catalog.rollups.iter().filter(|rollup| history.contains(rollup.timeline));
        newest.commit = on_way.filter_map(|rollup| rollup.facts().max_time).max_by_key(|stop| stop.time);
    }
    Ok(newest)
}
