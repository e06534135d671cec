//! The catalog: what one lineage holds, read from listings and small documents.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::StreamExt as _;

use crate::catalog::{BackupRecord, Catalog, StoredSegments};
use crate::codec::ObjectKind;
use crate::error::{Error, Result};
use crate::pg::{TimelineHistory, TimelineId, WalFileName};
use crate::storage::{ObjectMeta, list_all};

use super::document;
use super::{BackupStarted, Leftover, LineageRepository};

/// More backups than anybody keeps.
const BACKUPS_MAX: usize = 1_000_000;

/// How many small objects are read at once.
const READS_MAX: usize = 16;

/// Returns what the lineage holds.
///
/// # Errors
/// [`Error::Corrupt`] when a history file or a backup's record cannot be read: a plan made without
/// it could be wrong.
pub async fn load_catalog(repository: &LineageRepository) -> Result<Catalog> {
    let (wal, backups) = tokio::try_join!(list_wal(repository), load_backups(repository))?;
    let (backups, unfinished_backups) = backups;
    let mut segments = StoredSegments::new(repository.lineage.segment_size);
    wal.segments.iter().for_each(|(name, bytes)| segments.insert(*name, *bytes));
    Ok(Catalog {
        cluster: repository.cluster.to_string(),
        lineage: repository.lineage.clone(),
        histories: load_histories(repository, &wal.timelines).await?,
        segments,
        rollups: Vec::new(),
        partials: wal.partials,
        incomplete: wal.incomplete,
        backups,
        unfinished_backups,
    })
}

#[derive(Default)]
struct ListedWal {
    timelines: BTreeSet<TimelineId>,
    segments: BTreeMap<crate::pg::SegmentName, u64>,
    partials: Vec<crate::pg::SegmentName>,
    incomplete: Vec<crate::pg::SegmentName>,
}

async fn list_wal(repository: &LineageRepository) -> Result<ListedWal> {
    let mut wal = ListedWal::default();
    for_each_wal_object(repository, |meta| {
        let Some(key) = repository.layout.parse_wal(&meta.key) else { return };
        match (key.name, key.kind) {
            (WalFileName::Segment(name), ObjectKind::Segment) => {
                if !key.is_copy && name.is_legal(repository.lineage.segment_size) {
                    wal.segments.insert(name, meta.bytes);
                }
            }
            (WalFileName::Segment(name), _) => wal.incomplete.push(name),
            (WalFileName::Partial(name), _) => wal.partials.push(name),
            (WalFileName::History(timeline), _) => {
                wal.timelines.insert(timeline);
            }
            (WalFileName::BackupHistory(..), _) => {}
        }
    })
    .await?;
    wal.partials.dedup();
    wal.incomplete.dedup();
    Ok(wal)
}

async fn for_each_wal_object(
    repository: &LineageRepository,
    mut visit: impl FnMut(ObjectMeta),
) -> Result<()> {
    let prefix = repository.layout.wal_prefix();
    let mut after = None;
    loop {
        let page = repository.storage.list(&prefix, after.as_deref()).await?;
        page.objects.into_iter().for_each(&mut visit);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(()),
        }
    }
}

async fn load_histories(
    repository: &LineageRepository,
    timelines: &BTreeSet<TimelineId>,
) -> Result<BTreeMap<TimelineId, TimelineHistory>> {
    let reads =
        timelines.iter().map(|&timeline| async move { (timeline, repository.history(timeline).await) });
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
    let mut histories = BTreeMap::new();
    for (timeline, history) in read {
        let history = history?.ok_or_else(|| vanished(&WalFileName::History(timeline).to_string()))?;
        histories.insert(timeline, history);
    }
    Ok(histories)
}

type Backups = (Vec<BackupRecord>, Vec<(String, chrono::DateTime<chrono::Utc>)>);

async fn load_backups(repository: &LineageRepository) -> Result<Backups> {
    let storage = &*repository.storage;
    let listed = list_all(storage, &repository.layout.backup_records_prefix(), BACKUPS_MAX).await?;
    let reads = listed.iter().map(|meta| document::read::<BackupRecord>(storage, &meta.key));
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
    let mut records = Vec::with_capacity(read.len());
    for (meta, record) in listed.iter().zip(read) {
        let record = record?.ok_or_else(|| vanished(meta.key.as_str()))?;
        let named =
            repository.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn);
        if named.ok().as_ref() != Some(&meta.key) {
            return Err(Error::corrupt(format!(
                "{} is the record of another backup",
                repository.shown(&meta.key)
            )));
        }
        records.push(record);
    }
    records.sort_by(|a, b| (a.start_lsn, a.started, &a.id).cmp(&(b.start_lsn, b.started, &b.id)));

    let complete: BTreeSet<&str> = records.iter().map(|record| &*record.id).collect();
    let mut unfinished = Vec::new();
    for id in started_ids(repository).await? {
        if !complete.contains(&*id) {
            let started: Option<BackupStarted> = repository.backup_started(&id).await?;
            if let Some(started) = started {
                unfinished.push((id, started.started));
            }
        }
    }
    Ok((records, unfinished))
}

/// Returns the ids of all backups that were begun.
async fn started_ids(repository: &LineageRepository) -> Result<Vec<String>> {
    let prefix = repository.layout.backups_prefix();
    let mut ids = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = repository.storage.list(&prefix, after.as_deref()).await?;
        let mut next = page.next;
        for meta in &page.objects {
            if let Some(id) = repository.layout.started_backup_id(&meta.key) {
                ids.push(id);
            }
        }
        // A backup's data objects may be many, and are of no interest: go on behind the last backup seen.
        if let Some(last) = &next {
            let rest = last.strip_prefix(&prefix).unwrap_or_default();
            if let Some((id, object)) = rest.split_once('/') {
                let skip_to = if object < "started.json" { "started" } else { "t" };
                next = Some(format!("{prefix}{id}/{skip_to}").max(last.clone()));
            }
        }
        match next {
            Some(next) => after = Some(next),
            None => return Ok(ids),
        }
    }
}

impl LineageRepository {
    /// Returns every stored WAL object that is not simply part of the chain: incomplete segments and
    /// good copies beside damaged objects.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>> {
        let mut leftovers = Vec::new();
        for_each_wal_object(self, |meta| {
            if let Some(key) = self.layout.parse_wal(&meta.key)
                && (key.is_copy || key.kind == ObjectKind::Incomplete)
            {
                leftovers.push(Leftover {
                    location: self.shown(&meta.key),
                    name: key.name,
                    kind: key.kind,
                    is_copy: key.is_copy,
                });
            }
        })
        .await?;
        Ok(leftovers)
    }
}

fn vanished(what: &str) -> Error {
    Error::unavailable(format!("{what} was listed a moment ago and is not there any more"))
}
