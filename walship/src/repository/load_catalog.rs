//! The catalog: what one lineage holds, read from listings and small documents.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::{BackupRecord, Catalog, GapRecord, StoredSegments};
use crate::codec::ObjectKind;
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineHistory, TimelineId};
use crate::storage::{ObjectKey, ObjectMeta, list_all};
use crate::wal::rollup::{Rollup, Run};

use super::document::{self, RECORD_BYTES_MAX};
use super::layout::check_backup_id;
use super::load_segments::{Found, Using, load_segments};
use super::{BackupStarted, Leftover, LineageRepository, ListedGap};

/// More backups than anybody keeps.
const BACKUPS_MAX: usize = 1_000_000;

/// How many small objects are read at once.
const READS_MAX: usize = 16;

/// How many timelines are looked at at once.
const TIMELINES_MAX: usize = 8;

/// Returns what the lineage holds, from the index as far as it goes.
///
/// # Errors
/// [`Error::Corrupt`] when a history file or a backup's record cannot be read: a plan made without
/// it could be wrong.
pub async fn load_catalog(repository: &LineageRepository) -> Result<Catalog> {
    load(repository, Using::Index).await
}

/// Returns what the lineage holds, every segment listed: what the index says is not asked.
///
/// # Errors
/// As [`load_catalog`].
pub async fn load_catalog_from_listings(repository: &LineageRepository) -> Result<Catalog> {
    load(repository, Using::Listings).await
}

/// What can be read of one repository, and what cannot.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What can be read: every segment listed, the backups without their data objects.
    pub catalog: Catalog,
    /// How many data objects each backup has.
    pub objects: BTreeMap<String, u32>,
    /// The records, as the index tells them, of backups that it knows and whose own record cannot be read or is gone.
    pub unrecorded: Vec<BackupRecord>,
    /// Segments of which a backup history file is stored.
    pub backup_histories: Vec<SegmentName>,
    /// What is damaged, and so left out.
    pub damaged: Vec<DamagedDocument>,
}

/// Something small without which a catalog is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DamagedDocument {
    /// A timeline's history file.
    History {
        /// The timeline.
        timeline: TimelineId,
        /// What is wrong.
        what: String,
    },
    /// A backup's record.
    BackupRecord {
        /// The id in its key; empty where the key does not tell.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// A key among the records of gaps that is none of theirs.
    GapKey {
        /// What is wrong.
        what: String,
    },
}

/// Returns what this repository, whatever others it is read with, holds, without what is damaged of it.
///
/// # Errors
/// What the store says.
pub async fn load_what_is_sound(repository: &LineageRepository) -> Result<Loaded> {
    let mut damaged = Vec::new();
    let mut objects = BTreeMap::new();
    let listed = list_records(repository).await?;
    let reads = listed.iter().map(|meta| async move {
        let read = read_records(repository, std::slice::from_ref(meta), &BTreeMap::new()).await;
        // Lists of data objects are read again when they are wanted.
        let read = read.map(|records| {
            records.into_iter().next().map(|(_, record)| {
                let count = record.objects.len() as u32;
                (count, BackupRecord { objects: Vec::new(), ..record })
            })
        });
        (meta, read)
    });
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
    let mut backups = Vec::new();
    for (meta, read) in read {
        match read {
            Ok(Some((count, record))) => {
                objects.insert(record.id.clone(), count);
                backups.push(record);
            }
            Ok(None) => {}
            Err(Error::Corrupt(what) | Error::Mismatch(what)) => {
                let id = meta.key.as_str().strip_suffix(".json").and_then(|key| key.get(key.len() - 33..));
                let id = id.filter(|id| check_backup_id(id).is_ok()).unwrap_or_default().to_owned();
                damaged.push(DamagedDocument::BackupRecord { id, what: what.to_string() });
            }
            // Removed meanwhile.
            Err(Error::Unavailable(_))
                if repository.storage.list(meta.key.as_str(), None).await?.objects.is_empty() => {}
            Err(error) if repository.storage.skip(meta.key.as_str(), &error) => {}
            Err(error) => return Err(error),
        }
    }
    backups.sort_by(|a, b| (a.start_lsn, a.started, &a.id).cmp(&(b.start_lsn, b.started, &b.id)));
    let (timelines, found) = load_wal(repository, Using::Listings).await?;
    let mut histories = BTreeMap::new();
    for &timeline in timelines.iter().filter(|timeline| **timeline != TimelineId::FIRST) {
        match repository.history(timeline).await {
            Ok(history) => histories.extend(history.map(|history| (timeline, history))),
            Err(Error::Corrupt(what) | Error::Mismatch(what)) => {
                damaged.push(DamagedDocument::History { timeline, what: what.to_string() });
            }
            Err(error) if repository.storage.skip(repository.layout.history(timeline)?.as_str(), &error) => {}
            Err(error) => return Err(error),
        }
    }
    let backup_histories = found.iter().flat_map(|found| found.backup_histories.iter().copied()).collect();
    let mut gaps = Vec::new();
    for listed in repository.all_gaps().await? {
        match listed {
            Ok(gap) => gaps.push(gap),
            Err(what) => damaged.push(DamagedDocument::GapKey { what: what.to_string() }),
        }
    }
    let parts = Parts { backups, unfinished: Vec::new(), histories, gaps };
    let mut catalog = put_together(repository, parts, &timelines, found).await?;
    // The index tells of what was there once.
    for (timeline, indexed) in timelines.iter().zip(load_wal(repository, Using::Index).await?.1) {
        catalog.lost_ends.extend(indexed.lost_end.map(|last| (*timeline, last)));
    }
    let mut unrecorded = repository.records_in_list().await?;
    unrecorded.retain(|record| !objects.contains_key(&record.id));
    catalog.set_orphans_aside();
    Ok(Loaded { catalog, objects, unrecorded, backup_histories, damaged })
}

/// Loads what the lineage holds in each repository, and puts it together.
async fn load(repository: &LineageRepository, using: Using) -> Result<Catalog> {
    let mut catalog = load_all(repository, using).await?;
    catalog.set_orphans_aside();
    Ok(catalog)
}

async fn load_all(repository: &LineageRepository, using: Using) -> Result<Catalog> {
    if !repository.has_others() {
        return load_one(repository, using).await;
    }
    let each = repository.each();
    let loads = futures_util::future::join_all(each.iter().map(|one| load_one(one, using))).await;
    let (mut catalogs, mut failure) = (Vec::new(), None);
    for (one, loaded) in each.iter().zip(loads) {
        match loaded {
            Ok(catalog) => catalogs.push((one, catalog)),
            Err(error) => {
                one.failed(&error);
                repository.note(format!("{} is left out of what is planned with: {error}", one.location()));
                failure = failure.or(Some(error));
            }
        }
    }
    let Some(mut all) = catalogs.first().map(|(_, catalog)| catalog.clone()) else {
        return Err(failure.unwrap_or_else(|| Error::invalid("no repository is configured")));
    };
    all.lineage = repository.lineage.clone();
    // What is said last of the index counts: that of the fullest.
    catalogs.sort_by_key(|(_, catalog)| stored(catalog));
    all.rollups.clear();
    let missed = judge_contents(repository, &mut catalogs).await;
    for (_, catalog) in &catalogs {
        unite(&mut all, catalog);
    }
    for name in &missed {
        all.segments.remove(name);
    }
    unite_gaps(&mut all, catalogs.iter().map(|(_, catalog)| catalog));
    let whole = (stored(&all), all.backups.len());
    for (one, catalog) in catalogs {
        // One that holds what counts as missing may hold more.
        let (segments, backups) =
            (whole.0.saturating_sub(stored(&catalog)), whole.1.saturating_sub(catalog.backups.len()));
        if segments > 0 || backups > 0 {
            repository.note(format!(
                "{} lacks {segments} segment(s) and {backups} backup(s) that others hold",
                one.location()
            ));
        }
    }
    Ok(all)
}

/// Returns how many segments a catalog holds.
fn stored(catalog: &Catalog) -> u64 {
    let timelines = catalog.segments.timelines();
    timelines.into_iter().map(|timeline| catalog.segments.count(timeline, 0, u64::MAX)).sum()
}

/// Adds to a catalog what the same lineage holds elsewhere.
fn unite(all: &mut Catalog, other: &Catalog) {
    all.segments.append(other.segments.clone());
    all.rollups.extend(other.rollups.iter().cloned());
    for (timeline, history) in &other.histories {
        all.histories.entry(*timeline).or_insert_with(|| history.clone());
    }
    all.lost_ends.extend(&other.lost_ends);
    let Catalog { lost_ends, segments, .. } = &mut *all;
    lost_ends.retain(|_, last| !segments.contains(*last));
    all.partials.extend(&other.partials);
    all.incomplete.extend(&other.incomplete);
    for names in [&mut all.partials, &mut all.incomplete] {
        names.sort_unstable();
        names.dedup();
    }
    for backup in &other.backups {
        if !all.backups.iter().any(|known| known.id == backup.id) {
            all.backups.push(backup.clone());
        }
    }
    all.backups.sort_by(|a, b| (a.start_lsn, a.started, &a.id).cmp(&(b.start_lsn, b.started, &b.id)));
    all.unfinished_backups.extend(other.unfinished_backups.iter().cloned());
    all.unfinished_backups.sort();
    all.unfinished_backups.dedup();
    let complete: BTreeSet<&str> = all.backups.iter().map(|backup| &*backup.id).collect();
    all.unfinished_backups.retain(|(id, _)| !complete.contains(&**id));
}

/// Finds out, where a ledger says that a segment with a certain content is missing, which repositories hold that
/// content. Where one does, and every other that holds another one has the record and so delivers nothing, that
/// content is what is read from now on. Returns the other such segments: they are missing, since recovery may be given
/// the wrong one.
async fn judge_contents(
    repository: &LineageRepository,
    catalogs: &mut [(&LineageRepository, Catalog)],
) -> BTreeSet<SegmentName> {
    let size = repository.lineage.segment_size;
    let mut wanted: BTreeMap<SegmentName, String> = BTreeMap::new();
    let gaps: Vec<GapRecord> = catalogs.iter().flat_map(|(_, catalog)| catalog.gaps.clone()).collect();
    let mut missed = BTreeSet::new();
    for gap in gaps {
        let Some(digest) = gap.segment_digest.as_deref().and_then(|digest| digest.get(..32)) else {
            continue;
        };
        let name = SegmentName::containing(gap.timeline, gap.start_lsn, size);
        let (mut right, mut may_mislead, mut wrong) = (false, false, Vec::new());
        // Two servers miss two contents under one name: nobody can say which one is right.
        may_mislead |= wanted.insert(name, digest.to_owned()).is_some_and(|other| other != digest);
        for (at, (one, catalog)) in catalogs.iter().enumerate() {
            match one.summarized_here(name).await {
                Ok(Some(found)) if found.digest.starts_with(digest) => right = true,
                Ok(None) => {}
                // What cannot be read is not delivered either; what it was is not known.
                Err(Error::Corrupt(_)) => wrong.push(at),
                Ok(Some(_)) => {
                    may_mislead |= !catalog.gaps.iter().any(|known| known.id == gap.id);
                    wrong.push(at);
                }
                Err(error) => {
                    one.failed(&error);
                    may_mislead = true;
                }
            }
        }
        if !right || may_mislead {
            missed.insert(name);
            continue;
        }
        repository.note_right(name, digest.to_owned());
        for at in wrong {
            // What its index says of the segment is said of the wrong content.
            catalogs[at].1.rollups.retain(|rollup| !covers(rollup, name));
        }
    }
    missed
}

/// Returns whether the roll-up tells of a segment.
fn covers(rollup: &Rollup, name: SegmentName) -> bool {
    let (size, number) = (rollup.segment_size, name.number(rollup.segment_size));
    let holds = |run: &Run| (run.first.number(size)..run.first.number(size) + run.segments).contains(&number);
    rollup.timeline == name.timeline && rollup.runs().iter().any(holds)
}

/// Notes every gap that the segments of all together do not close.
fn unite_gaps<'a>(all: &mut Catalog, catalogs: impl Iterator<Item = &'a Catalog>) {
    let size = all.lineage.segment_size;
    let gaps = catalogs.flat_map(|catalog| &catalog.gaps).map(|gap| (gap.id.clone(), gap.clone()));
    let gaps: BTreeMap<String, GapRecord> = gaps.collect();
    all.gaps = gaps.into_values().filter(|gap| !gap.is_covered_by(&all.segments, size)).collect();
    all.gaps.sort_by(|a, b| (a.timeline, a.start_lsn, &a.id).cmp(&(b.timeline, b.start_lsn, &b.id)));
}

async fn load_one(repository: &LineageRepository, using: Using) -> Result<Catalog> {
    // In this order: a backup's WAL is stored before its record, so that none seems to lack it.
    let (backups, unfinished) = load_backups(repository).await?;
    let (timelines, found) = load_wal(repository, using).await?;
    let histories = load_histories(repository, &timelines).await?;
    let gaps = repository.all_gaps().await?.into_iter().collect::<Result<Vec<_>>>()?;
    put_together(repository, Parts { backups, unfinished, histories, gaps }, &timelines, found).await
}

/// What a catalog holds beside segments.
struct Parts {
    backups: Vec<BackupRecord>,
    unfinished: Vec<BackupStarted>,
    histories: BTreeMap<TimelineId, TimelineHistory>,
    gaps: Vec<ListedGap>,
}

async fn put_together(
    repository: &LineageRepository,
    parts: Parts,
    timelines: &[TimelineId],
    found: Vec<Found>,
) -> Result<Catalog> {
    let Parts { backups, unfinished, histories, gaps } = parts;
    let mut catalog = Catalog {
        cluster: repository.cluster.to_string(),
        lineage: repository.lineage.clone(),
        histories,
        segments: StoredSegments::new(repository.lineage.segment_size),
        in_parts: BTreeMap::new(),
        stranded: BTreeMap::new(),
        tails: None,
        lost_ends: BTreeMap::new(),
        rollups: Vec::new(),
        partials: Vec::new(),
        incomplete: Vec::new(),
        gaps: Vec::new(),
        backups,
        orphaned_backups: Vec::new(),
        unfinished_backups: unfinished.into_iter().map(|started| (started.id, started.started)).collect(),
    };
    for (timeline, found) in timelines.iter().zip(found) {
        catalog.lost_ends.extend(found.lost_end.map(|last| (*timeline, last)));
        catalog.segments.append(found.segments);
        catalog.rollups.extend(found.rollups);
        catalog.partials.extend(found.partials);
        catalog.incomplete.extend(found.incomplete);
    }
    catalog.gaps = repository.load_gaps(gaps, &mut catalog.segments).await?;
    catalog.partials.sort_unstable();
    catalog.partials.dedup();
    catalog.incomplete.sort_unstable();
    catalog.incomplete.dedup();
    Ok(catalog)
}

async fn load_wal(repository: &LineageRepository, using: Using) -> Result<(Vec<TimelineId>, Vec<Found>)> {
    let timelines = repository.stored_timelines().await?;
    let loads = timelines.iter().map(|timeline| load_segments(repository, *timeline, using));
    let found = futures_util::stream::iter(loads).buffered(TIMELINES_MAX).try_collect().await?;
    Ok((timelines, found))
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
    timelines: &[TimelineId],
) -> Result<BTreeMap<TimelineId, TimelineHistory>> {
    let others = timelines.iter().filter(|timeline| **timeline != TimelineId::FIRST);
    let reads = others.map(|&timeline| async move { (timeline, repository.history(timeline).await) });
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
    let mut histories = BTreeMap::new();
    for (timeline, history) in read {
        histories.extend(history?.map(|history| (timeline, history)));
    }
    Ok(histories)
}

type Backups = (Vec<BackupRecord>, Vec<BackupStarted>);

/// Lists the records of all complete backups.
pub(super) async fn list_records(repository: &LineageRepository) -> Result<Vec<ObjectMeta>> {
    list_all(&*repository.storage, &repository.layout.backup_records_prefix(), BACKUPS_MAX).await
}

/// Reads the records of those backups that are not `known`.
pub(super) async fn read_records(
    repository: &LineageRepository,
    listed: &[ObjectMeta],
    known: &BTreeMap<ObjectKey, BackupRecord>,
) -> Result<Vec<(ObjectMeta, BackupRecord)>> {
    let wanted: Vec<&ObjectMeta> = listed.iter().filter(|meta| !known.contains_key(&meta.key)).collect();
    let reads = wanted
        .iter()
        .map(|meta| document::read_listed::<BackupRecord>(&*repository.storage, &meta.key, RECORD_BYTES_MAX));
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
    let mut records = Vec::with_capacity(read.len());
    for (meta, record) in wanted.into_iter().zip(read) {
        // Removed since: then the backup does not exist.
        let Some(record) = record? else { continue };
        let named =
            repository.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn);
        if named.ok().as_ref() != Some(&meta.key) {
            return Err(Error::corrupt(format!(
                "{} is the record of another backup",
                repository.shown(&meta.key)
            )));
        }
        records.push((meta.clone(), record));
    }
    Ok(records)
}

async fn load_backups(repository: &LineageRepository) -> Result<Backups> {
    let listed = list_records(repository).await?;
    let known = repository.listed_records(&listed).await?;
    let read = read_records(repository, &listed, &known).await?;
    let mut records: Vec<_> = known.into_values().chain(read.into_iter().map(|(_, record)| record)).collect();
    records.sort_by(|a, b| (a.start_lsn, a.started, &a.id).cmp(&(b.start_lsn, b.started, &b.id)));

    let complete: BTreeSet<&str> = records.iter().map(|record| &*record.id).collect();
    let mut unfinished = Vec::new();
    for id in started_ids(repository).await? {
        if complete.contains(&*id) {
            continue;
        }
        match repository.backup_started(&id).await {
            Ok(started) => unfinished.extend(started),
            // No restore reads it. Retention, which has to know what it says, reads it itself.
            Err(error @ (Error::Corrupt(_) | Error::Mismatch(_))) => {
                repository.note(format!("a backup that did not complete is left out: {error}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((records, unfinished))
}

/// Returns the ids of all backups that were begun.
pub(super) async fn started_ids(repository: &LineageRepository) -> Result<Vec<String>> {
    let prefix = repository.layout.backups_prefix();
    let mut ids = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = repository.storage.list_folders(&prefix, after.as_deref()).await?;
        ids.extend(page.names.into_iter().filter(|name| check_backup_id(name).is_ok()));
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(ids),
        }
    }
}

impl LineageRepository {
    /// Returns the records of the complete backups in this repository, oldest start first, without their data objects
    /// where the index tells of them.
    ///
    /// # Errors
    /// As [`load_catalog`].
    pub async fn complete_backups(&self) -> Result<Vec<BackupRecord>> {
        load_backups(self).await.map(|(records, _)| records)
    }

    /// Returns what was said of the backups that were begun in this repository and are not complete.
    pub async fn unfinished_backups(&self) -> Result<Vec<BackupStarted>> {
        load_backups(self).await.map(|(_, unfinished)| unfinished)
    }

    /// Returns a complete backup's record with its data objects, which the catalog may have left out.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not there any more, [`Error::Corrupt`] when it says something else.
    pub async fn whole_record(&self, record: &BackupRecord) -> Result<BackupRecord> {
        if !record.objects.is_empty() {
            return Ok(record.clone());
        }
        let read = |one: Self| async move { one.whole_record_here(record).await.map(Some) };
        let found = self.ask_each(format!("the record of backup {}", record.id), read).await?;
        found.ok_or_else(|| Error::missing(format!("the record of backup {} is gone", record.id)))
    }

    async fn whole_record_here(&self, record: &BackupRecord) -> Result<BackupRecord> {
        let key =
            self.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn)?;
        let whole = document::read_within::<BackupRecord>(&*self.storage, &key, RECORD_BYTES_MAX).await?;
        let whole = whole
            .ok_or_else(|| Error::missing(format!("{}, a backup's record, is gone", self.shown(&key))))?;
        if (BackupRecord { objects: Vec::new(), ..whole.clone() }) != *record {
            return Err(Error::corrupt(format!("{} is not what the index says of it", self.shown(&key)))
                .with_next("Run `pitr index --rebuild`."));
        }
        Ok(whole)
    }

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
