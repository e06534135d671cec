//! What a repository holds: its catalog, the newest WAL, and the last records of what was done with it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::catalog::{Catalog, DrillRecord};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use crate::repository::{ClusterName, ClusterRepository, LineageRepository, load_catalog, load_tails};
use crate::storage::{self, StorageConfig};
use crate::wal::SegmentSummary;
use crate::wal::event::WalEvent;
use crate::wal::summary::StopTime;
use crate::watch::{
    BackupFacts, Contents, DrillFacts, ExpireFacts, Hole, VerificationFacts, end_of_way, left_holes, reach,
    stored_at,
};

use super::Identity;

/// How many segments are looked into, from the last back, for the end of a transaction.
const LOOK_BACK_MAX: usize = 8;

/// How many segments are looked into, from the last back, of which no roll-up tells: one is written every sixteen.
const LOOSE_MAX: usize = 24;

/// Segments are stored side by side: WAL that is missing so near the end may be on its way.
const ON_ITS_WAY_SEGMENTS: u64 = 32;

/// How many drills are read, from the last back, for one that proved something.
const DRILLS_MAX: usize = 20;

/// So many of the last removals are looked at where the last one did not do what it was to do.
const EXPIRES_MAX: usize = 20;

/// How many verifications are read, from the last back, for what was missing and still is.
const VERIFICATIONS_MAX: usize = 20;

/// What is remembered of a repository from one look to the next.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Summaries of the newest segments: they never change.
    summaries: BTreeMap<SegmentName, SegmentSummary>,
    /// Where WAL was missing.
    holes: BTreeSet<(TimelineId, Lsn)>,
}

/// Looks at a repository at `now`; returns what it holds, and how long the store took for one small read.
pub(super) async fn look(
    config: &StorageConfig,
    cluster: &ClusterName,
    server: Option<&Identity>,
    now: DateTime<Utc>,
    memory: &mut Memory,
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
    let contents = contents(&lineage, &catalog, summaries, server, now, memory).await?;
    Ok((contents, latency))
}

async fn contents(
    lineage: &LineageRepository,
    catalog: &Catalog,
    in_parts: Vec<SegmentSummary>,
    server: Option<&Identity>,
    now: DateTime<Utc>,
    memory: &mut Memory,
) -> Result<Contents> {
    let mut summaries = Summaries { lineage, in_parts, known: &mut memory.summaries, asked: BTreeSet::new() };
    let with_wal = |timeline: &TimelineId| catalog.has_wal_of(*timeline);
    let newest_first = catalog.timelines().into_iter().rev().filter(with_wal);
    let (mut found, mut newest) = (None, Newest::default());
    for timeline in server.map(|server| server.timeline).into_iter().chain(newest_first) {
        let Some(history) = catalog.history(timeline) else { continue };
        let events = loose_events(&mut summaries, catalog, &history).await?;
        found = reach(catalog, timeline, &events);
        if let Some(reach) = &found {
            newest = newest_before(&mut summaries, catalog, &history, reach.until).await?;
            break;
        }
    }
    summaries.forget_others();
    let reach = found.as_ref();
    let gaps = catalog.gaps.iter().filter(|gap| !gap.is_expired()).count() as u64;
    let mut all_holes: Vec<(TimelineId, Hole)> = Vec::new();
    if let Some(reach) = reach {
        all_holes.extend(reach.holes.iter().map(|hole| (reach.timeline, *hole)));
        let main = catalog.history(reach.timeline);
        all_holes.extend(main.map(|main| left_holes(catalog, &main)).unwrap_or_default());
    }
    let stays = |(timeline, hole): &&(TimelineId, Hole)| {
        hole.behind_bytes / catalog.lineage.segment_size.bytes() >= ON_ITS_WAY_SEGMENTS
            || memory.holes.contains(&(*timeline, hole.from))
    };
    let holes: Vec<_> = all_holes.iter().filter(stays).map(|(_, hole)| *hole).collect();
    memory.holes = all_holes.iter().map(|(timeline, hole)| (*timeline, hole.from)).collect();
    let bare_holes = holes.iter().filter(|hole| hole.is_bare).count() as u64;
    let runs = catalog.segments.timelines().into_iter().flat_map(|timeline| catalog.segments.runs(timeline));
    let (mut segments, mut wal_bytes) = (0, 0_u64);
    for run in runs {
        let size = catalog.lineage.segment_size;
        segments += run.last.number(size) - run.first.number(size) + 1;
        wal_bytes = wal_bytes.saturating_add(run.stored_bytes);
    }
    let drills = lineage.recent_drills(DRILLS_MAX).await?;
    // With several repositories it proves nothing of those that it had no need to read; that it failed is told of all.
    let proves =
        |drill: &&DrillRecord| drill.read_here != Some(false) && DrillFacts::has_proven(&drill.outcome);
    let proven = drills.iter().find(proves);
    let mut expires = lineage.recent_expires(1).await?;
    if expires.iter().any(|(_, end)| end.as_ref().is_none_or(|end| end.failure.is_some())) {
        expires = lineage.recent_expires(EXPIRES_MAX).await?;
    }
    let verifications = lineage.recent_verifications(VERIFICATIONS_MAX).await?;
    Ok(Contents {
        lineage: catalog.lineage.number,
        created: catalog.lineage.created,
        timeline: reach.map(|reach| reach.timeline),
        backups: catalog.backups.iter().map(|backup| BackupFacts::of(backup, &verifications)).collect(),
        unfinished_backups: catalog.unfinished_backups.len() as u64,
        orphaned_backups: catalog.orphaned_backups.len() as u64,
        durable_lsn: reach.map(|reach| reach.until),
        newest_commit: newest.commit.map(|stop| stop.time),
        newest_xid: newest.xid,
        window: reach.and_then(|reach| reach.window),
        is_cut: reach.is_some_and(|reach| reach.is_cut),
        gaps: gaps + holes.len() as u64,
        holes: holes.len() as u64,
        gaps_without_backup: reach.map_or(0, |reach| reach.bare_gaps) + bare_holes,
        lost_ends: catalog.lost_ends.len() as u64,
        segments,
        wal_bytes,
        drill: drills.first().map(DrillFacts::of),
        proven: proven.map(|drill| drill.head.started),
        expire: ExpireFacts::of(&expires),
        verification: VerificationFacts::of(&verifications, &lineage.location(), now),
        verified: VerificationFacts::last_done(&verifications),
        all_read: VerificationFacts::all_read(&verifications),
    })
}

/// The summaries of segments, each read once.
struct Summaries<'a> {
    lineage: &'a LineageRepository,
    /// Those of segments of which only parts are stored.
    in_parts: Vec<SegmentSummary>,
    known: &'a mut BTreeMap<SegmentName, SegmentSummary>,
    asked: BTreeSet<SegmentName>,
}

impl Summaries<'_> {
    /// Returns a segment's summary; `None` for one that is damaged, which is `pitr verify`'s to tell.
    async fn get(&mut self, name: SegmentName) -> Result<Option<&SegmentSummary>> {
        self.asked.insert(name);
        if let Some(found) = self.in_parts.iter().find(|summary| summary.segment == name) {
            return Ok(Some(found));
        }
        if !self.known.contains_key(&name) {
            match self.lineage.segment_summary(name).await {
                Ok(Some(summary)) => drop(self.known.insert(name, summary)),
                Ok(None) | Err(Error::Corrupt(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.known.get(&name))
    }

    /// Forgets what was not asked for this time.
    fn forget_others(self) {
        let Self { known, asked, .. } = self;
        known.retain(|name, _| asked.contains(name));
    }
}

/// Returns the events of the last segments on the way of which no roll-up tells.
async fn loose_events(
    summaries: &mut Summaries<'_>,
    catalog: &Catalog,
    history: &TimelineHistory,
) -> Result<BTreeMap<TimelineId, Vec<WalEvent>>> {
    let size = catalog.lineage.segment_size;
    let is_rolled_up = |name: SegmentName| {
        let runs =
            catalog.rollups.iter().flat_map(|rollup| rollup.entries.iter().flat_map(|entry| &entry.runs));
        runs.filter(|run| run.first.timeline == name.timeline).any(|run| {
            name.number(size).checked_sub(run.first.number(size)).is_some_and(|at| at < run.segments)
        })
    };
    let mut events: BTreeMap<TimelineId, Vec<WalEvent>> = BTreeMap::new();
    let mut at = end_of_way(catalog, history);
    for _ in 0..LOOSE_MAX {
        let last_byte = at.and_then(|at| at.0.checked_sub(1)).map(Lsn);
        let name = last_byte.and_then(|lsn| stored_at(catalog, history, lsn));
        let Some(name) = name.filter(|name| !is_rolled_up(*name)) else { break };
        if let Some(summary) = summaries.get(name).await? {
            events.entry(name.timeline).or_default().extend(summary.events.iter().cloned());
        }
        at = Some(name.start(size));
    }
    Ok(events)
}

/// What the newest WAL says.
#[derive(Default)]
struct Newest {
    commit: Option<StopTime>,
    xid: Option<u32>,
}

/// Reads from a position on the way back, until a segment tells of the end of a transaction.
async fn newest_before(
    summaries: &mut Summaries<'_>,
    catalog: &Catalog,
    history: &TimelineHistory,
    until: Lsn,
) -> Result<Newest> {
    let size = catalog.lineage.segment_size;
    let mut newest = Newest::default();
    let is_before = |stop: &StopTime| stop.lsn < until;
    let mut at = until;
    for _ in 0..LOOK_BACK_MAX {
        let name = at.0.checked_sub(1).and_then(|lsn| stored_at(catalog, history, Lsn(lsn)));
        let Some(name) = name.filter(|_| newest.commit.is_none()) else { break };
        if let Some(summary) = summaries.get(name).await? {
            newest.commit = summary.max_time.filter(is_before).or(summary.min_time.filter(is_before));
            // In a segment with a break inside, or a hole behind what is stored of it, it is not known which lie before.
            if let Some((_, last)) = summary.ended_xids.filter(|_| summary.end_of_wal <= until) {
                newest.xid = Some(newest.xid.map_or(last, |known| known.max(last)));
            }
        }
        at = name.start(size);
    }
    if newest.commit.is_none() {
        let on_way = catalog.rollups.iter().filter(|rollup| history.contains(rollup.timeline));
        let stops = on_way.filter_map(|rollup| rollup.facts().max_time).filter(is_before);
        newest.commit = stops.max_by_key(|stop| stop.time);
    }
    Ok(newest)
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::TimeDelta;

    use super::*;
    use crate::pg::SegmentSize;
    use crate::repository::Repository;
    use crate::repository::testing::made_up_drill;
    use crate::storage::memory::MemoryStorage;

    #[tokio::test]
    async fn a_drill_counts_for_the_repository_that_it_read() {
        let now = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let repository = Repository::create(Arc::new(MemoryStorage::default()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let lineage = cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap();
        for (hour, read_here, outcome) in [
            (1, None, "proven"),
            (2, Some(true), "proven"),
            (3, Some(false), "proven"),
            (4, Some(false), "failed"),
        ] {
            let record = DrillRecord { read_here, ..made_up_drill(now + TimeDelta::hours(hour), outcome) };
            lineage.put_drill_record(&record).await.unwrap();
            let catalog = load_catalog(&lineage).await.unwrap();
            let seen =
                contents(&lineage, &catalog, Vec::new(), None, now, &mut Memory::default()).await.unwrap();
            assert_eq!(seen.proven, Some(now + TimeDelta::hours(hour.min(2))));
            assert_eq!(seen.drill.unwrap().outcome, outcome, "that it failed is told of all");
            assert_eq!((seen.created, seen.timeline), (now, None));
        }
    }
}
