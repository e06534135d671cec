//! What is read every time, whatever the budget: listings, small documents, open segments.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use walship::catalog::{BackupRecord, Catalog, Proven, StoredSegments, TailFlaw, VerifyOutcome};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::repository::{
    DamagedDocument, LineageRepository, Loaded, ProvenBefore, RollupState, load_tails, load_what_is_sound,
};
use walship::wal::rollup::{LEVEL_MAX, span};
use walship::{Error, Result};

use super::run::Worked;
use super::{GO_ON_WITHIN, LOOK_ASIDE_MAX, LOOKS_MAX, Request, TailEnds};
use crate::verify::{Finding, FindingKind, Needed, SeenBefore, Takes, Unlisted, VerifiedRange};

/// How many records of removals are read.
const EXPIRES_MAX: usize = 10_000;

/// What is known of a repository before its objects are read.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) catalog: Catalog,
    /// The segments of which anything is stored under `wal/`, whole or not.
    pub(super) stored: StoredSegments,
    /// How many data objects each backup has.
    pub(super) objects: BTreeMap<String, u32>,
    /// What the index tells of backups whose own record cannot be read or is gone.
    pub(super) unrecorded: Vec<BackupRecord>,
    /// What earlier verifications recorded, in the order in which they began.
    pub(super) proven: Vec<Proven>,
    /// What tells the repository from a copy of it at the same address.
    pub(super) marker: Option<String>,
    /// What listings leave out.
    pub(super) unlisted: Unlisted,
    /// How many bytes looking took.
    pub(super) bytes: u64,
    /// Segments that are stored whole and have parts as well.
    pub(super) doubled: BTreeSet<SegmentName>,
    /// Up to where parts of flawed tails are stored.
    pub(super) tail_ends: TailEnds,
    findings: Vec<Finding>,
}

impl Looked {
    /// Returns what was found that matters to what is needed.
    pub(super) fn take_findings(&mut self, needed: &Needed) -> Vec<Finding> {
        let size = self.catalog.lineage.segment_size;
        let matters = |finding: &Finding| match &finding.takes {
            Takes::Backup { id, .. } => needed.everything || needed.backups.contains(id),
            Takes::Tail(segment) => needed.to_the_end || needed.has_segment(*segment, size),
            _ => true,
        };
        std::mem::take(&mut self.findings).into_iter().filter(matters).collect()
    }

    /// Returns what is there.
    pub(super) fn seen_now(&self) -> SeenBefore {
        SeenBefore::of_catalog(&self.catalog)
    }

    /// Notes that what is stored of an open segment is not its WAL: the timeline ends before it.
    pub(super) fn end_before(&mut self, segment: SegmentName, what: &str) {
        let tails = self.catalog.tails.iter_mut().flat_map(|tails| tails.values_mut());
        let size = self.catalog.lineage.segment_size;
        for tail in tails.filter(|tail| tail.segment == segment) {
            self.tail_ends.insert(segment, tail.until_lsn);
            tail.until_lsn = segment.start(size);
            tail.flaw = Some(TailFlaw::Damaged { what: what.to_owned() });
        }
    }
}

/// Looks at a repository at `now`.
pub(super) async fn look(repository: &LineageRepository, now: DateTime<Utc>) -> Result<Looked> {
    undisturbed(repository, || look_once(repository, now)).await
}

/// Looks again where a removal has meanwhile changed what tells of it: what it removed would be missing.
async fn undisturbed<T, F: Future<Output = Result<T>>>(
    repository: &LineageRepository,
    look: impl Fn() -> F,
) -> Result<T> {
    let mut before = repository.traces_of_removals().await?;
    for _ in 1..LOOKS_MAX {
        let looked = look().await;
        let behind = repository.traces_of_removals().await?;
        if before == behind {
            return looked;
        }
        before = behind;
    }
    look().await
}

async fn look_once(repository: &LineageRepository, now: DateTime<Utc>) -> Result<Looked> {
    let location = repository.location();
    let ProvenBefore { marker, documents: proven, damaged: damaged_proofs } = repository.proven(now).await?;
    let Loaded { mut catalog, objects, unrecorded, backup_histories, damaged } =
        load_what_is_sound(repository).await?;
    let records = damaged.iter().filter_map(|damaged| match damaged {
        DamagedDocument::BackupRecord { id, .. } => Some(&**id),
        _ => None,
    });
    let records = records.chain(objects.keys().map(|id| &**id)).collect();
    let starts = repository.unreadable_starts(&records).await?;
    let mut findings: Vec<Finding> =
        damaged.into_iter().map(|damaged| document_finding(&location, damaged)).collect();
    for (object, what) in damaged_proofs {
        let what = format!(
            "{what}; what it alone said was proven is read again, and nothing else depends on it: it can be removed"
        );
        findings.push(Finding::damage(FindingKind::Damaged, &location, object, what, Takes::Nothing));
    }
    for (object, what) in starts {
        let what = format!("{what}; retention removes nothing while it is so");
        findings.push(Finding::damage(FindingKind::Damaged, &location, object, what, Takes::Nothing));
    }
    match load_tails(repository, &mut catalog).await {
        Ok(_) => {}
        Err(Error::Conflict(error)) => {
            catalog.tails.get_or_insert_default();
            let what = error.to_string();
            findings.push(Finding::damage(
                FindingKind::Contradiction,
                &location,
                "parts of an open segment",
                what,
                Takes::Nothing,
            ));
        }
        Err(error) => return Err(error),
    }
    for (object, what) in repository.unreadable_documents(&catalog).await? {
        findings.push(Finding::damage(FindingKind::Damaged, &location, object, what, Takes::Nothing));
    }
    for orphan in &catalog.orphaned_backups {
        findings.push(Finding::damage(
            FindingKind::Missing,
            &location,
            format!("backup {}", orphan.id),
            format!("backup {}, which it builds on, is not there", orphan.missing),
            Takes::Backup { id: orphan.id.clone(), part: format!("backup {}", orphan.missing) },
        ));
    }
    let mut stored = catalog.segments.clone();
    for name in catalog.partials.iter().chain(&catalog.incomplete).chain(&backup_histories) {
        stored.insert(*name, 0);
    }
    let (doubled, tail_ends) = (BTreeSet::new(), TailEnds::new());
    let unlisted = Unlisted::default();
    let mut looked = Looked {
        catalog,
        stored,
        objects,
        unrecorded,
        proven,
        marker,
        unlisted,
        bytes: 0,
        doubled,
        tail_ends,
        findings,
    };
    check_histories(repository, &mut looked).await?;
    check_tails(repository, &mut looked).await?;
    looked.unlisted = Unlisted(repository.skipped());
    Ok(looked)
}

fn document_finding(location: &str, damaged: DamagedDocument) -> Finding {
    let kind = FindingKind::Damaged;
    match damaged {
        DamagedDocument::History { timeline, what } => {
            let object = format!("{}.history", timeline.hex());
            Finding::damage(kind, location, object, what, Takes::History(timeline))
        }
        DamagedDocument::BackupRecord { id, what } => {
            let takes = Takes::Backup { id: id.clone(), part: "its record".to_owned() };
            Finding::damage(kind, location, format!("backup {id}, its record"), what, takes)
        }
        DamagedDocument::GapKey { what } => {
            let what = format!("{what}; no plan can be made while it lies there");
            Finding::damage(kind, location, format!("{location}/gaps"), what, Takes::Nothing)
        }
    }
}

/// Reads every copy of every history file.
async fn check_histories(repository: &LineageRepository, looked: &mut Looked) -> Result<()> {
    let location = repository.location();
    for object in repository.history_objects().await? {
        match repository.read_wal_object(&object, std::io::sink()).await {
            Ok(_) => {}
            Err(Error::Corrupt(error)) => {
                let timeline = object.name.timeline();
                // That no copy is sound was told when the catalog was read.
                if looked.catalog.histories.contains_key(&timeline) {
                    looked.findings.push(Finding::note(
                        FindingKind::Damaged,
                        &location,
                        repository.wal_location(&object),
                        format!("{error}; another copy is sound and is read in its place"),
                    ));
                }
            }
            Err(error) if repository.skip_wal_object(&object, &error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads every part of segments that are not stored whole, and finds out which others have parts.
async fn check_tails(repository: &LineageRepository, looked: &mut Looked) -> Result<()> {
    let location = repository.location();
    let mut timelines: BTreeSet<TimelineId> = looked.catalog.timelines().into_iter().collect();
    timelines.insert(TimelineId::FIRST);
    let size = looked.catalog.lineage.segment_size;
    for timeline in timelines {
        for name in repository.segments_with_parts(timeline).await? {
            if looked.catalog.segments.contains(name) && !looked.catalog.in_parts.contains_key(&name) {
                looked.doubled.insert(name);
                continue;
            }
            let mut end = 0;
            let tail = looked.catalog.tails.iter().flatten().map(|(_, tail)| tail);
            let tail =
                tail.chain(looked.catalog.stranded.values()).find(|tail| tail.segment == name).cloned();
            let mut damaged = false;
            for part in repository.tail_of(name).await? {
                end = end.max(part.end);
                let Err(error) = repository.check_part(name, &part).await else { continue };
                damaged = true;
                if repository.skip_part(&part, &error) {
                    continue;
                }
                let Error::Corrupt(error) = error else { return Err(error) };
                let needed = tail.as_ref().is_none_or(|tail| tail.flaw.is_some());
                let object = repository.part_location(&part);
                looked.findings.push(if needed && !looked.catalog.in_parts.contains_key(&name) {
                    let takes = Takes::Tail(name);
                    Finding::damage(FindingKind::Damaged, &location, object, error.to_string(), takes)
                } else {
                    let what = format!("{error}; other parts hold its bytes");
                    Finding::note(FindingKind::Damaged, &location, object, what)
                });
            }
            let Some(tail) = tail else { continue };
            if let Some(flaw) = tail.flaw_text() {
                looked.tail_ends.insert(name, Lsn(name.start(size).0.saturating_add(end)));
                if !damaged {
                    let takes = Takes::Tail(name);
                    let object = format!("parts of {name}");
                    looked.findings.push(Finding::damage(
                        FindingKind::Missing,
                        &location,
                        object,
                        flaw,
                        takes,
                    ));
                }
            } else if tail.until_lsn == name.start(size) && tail.end_lsn > tail.until_lsn {
                let what = "the bytes that are stored of it are not its WAL".to_owned();
                let object = format!("parts of {name}");
                // A record that began before it may fill all that is stored.
                looked.findings.push(Finding::note(FindingKind::Broken, &location, object, what));
            }
        }
    }
    Ok(())
}

/// What retention has to do with backups.
pub(super) struct Removals {
    /// Those that it is removing.
    pub(super) going: BTreeSet<String>,
    /// Those that it has removed, or is removing.
    pub(super) gone: BTreeSet<String>,
}

/// Returns what removals have to do with backups. The marks come first: what is told as removed is marked until then.
pub(super) async fn removals(repository: &LineageRepository) -> Result<Removals> {
    let going = match repository.expiring().await {
        // It is told of among the documents that cannot be read.
        Err(Error::Corrupt(_)) => BTreeSet::new(),
        going => going?,
    };
    let mut gone = repository.removed_backups(EXPIRES_MAX).await?;
    gone.extend(going.iter().cloned());
    Ok(Removals { going, gone })
}

/// Returns from when on the last verification counts what it has read, when that was killed or interrupted.
pub(super) async fn goes_on_from(
    repository: &LineageRepository,
    looked: &Looked,
    request: &Request,
) -> Result<Option<DateTime<Utc>>> {
    let here = looked.proven.last().filter(|last| last.repository == repository.location());
    let Some(last) = here.filter(|_| !request.anew) else { return Ok(None) };
    let recent = |round: &DateTime<Utc>| *round <= request.started && request.started - *round < GO_ON_WITHIN;
    let Some(round) = last.round.filter(recent) else { return Ok(None) };
    let records = repository.recent_verifications(super::run::RECORDS_MAX).await?;
    let ended = records.iter().find(|record| record.head.id == last.id);
    let unended = ended.is_none_or(|record| record.outcome == VerifyOutcome::Interrupted);
    Ok(unended.then_some(round))
}

/// Compares the roll-ups of what was read with the segments' summaries, those above with those below, and the lists of
/// backups with the backups' records. The index is a cache: no restore fails by it, but plans are made from it. With what is
/// compared only where its segments are read, the first of these.
pub(super) async fn index_flaws(
    repository: &LineageRepository,
    catalog: &Catalog,
    read: &[VerifiedRange],
) -> Result<Vec<(Finding, Option<SegmentName>)>> {
    let location = repository.location();
    let size = catalog.lineage.segment_size;
    let mut findings = Vec::new();
    let index =
        |object, what: String| Finding::damage(FindingKind::Index, &location, object, what, Takes::Nothing);
    for timeline in catalog.segments.timelines() {
        for level in 1..=LEVEL_MAX {
            let listed = repository.rollups(timeline, level, 0, u64::MAX).await?;
            for stored in listed {
                let (first, end) = (stored.place().first, stored.place().first.saturating_add(span(level)));
                let overlaps = |range: &VerifiedRange| {
                    range.first.timeline == timeline
                        && range.first.number(size) < end
                        && range.last.number(size) >= first
                };
                if level == 1 && !read.iter().any(overlaps) {
                    continue;
                }
                if let RollupState::Wrong(what) = repository.check_rollup(&stored).await? {
                    let name = SegmentName::from_number(timeline, first, size).filter(|_| level == 1);
                    let name = name.and_then(|name| catalog.segments.first_from(name));
                    let name = name.filter(|name| name.number(size) < end);
                    findings.push((index(repository.rollup_location(&stored), what), name));
                }
            }
        }
    }
    match repository.wrong_backup_lists().await {
        Ok(wrong) => findings.extend(wrong.into_iter().map(|(object, what)| (index(object, what), None))),
        // Records that cannot be read are told of already.
        Err(Error::Corrupt(_)) => {}
        Err(error) => return Err(error),
    }
    Ok(findings)
}

/// Returns what was gone when it was to be read, and that no removal accounts for; takes back what was found in backups that
/// retention has removed meanwhile.
pub(super) async fn settle(
    repository: &LineageRepository,
    worked: &mut Worked,
    location: &str,
) -> Result<Vec<Finding>> {
    let of_backup = |finding: &Finding| finding.is_damage() && concerns(finding, "");
    let is_asked = worked.findings.iter().any(of_backup);
    if worked.vanished.is_empty() && worked.vanished_backups.is_empty() && !is_asked {
        return Ok(Vec::new());
    }
    let Removals { gone, .. } = removals(repository).await?;
    let mut findings = Vec::new();
    let now = undisturbed(repository, || load_what_is_sound(repository)).await?;
    // A record that cannot be read is there.
    let broken = |id: &str| {
        now.damaged.iter().any(|damaged| match damaged {
            DamagedDocument::BackupRecord { id: known, .. } => known == id,
            _ => false,
        })
    };
    let now = &now.catalog;
    let is_there = |id: &str| {
        let orphaned = now.orphaned_backups.iter().any(|backup| backup.id == id);
        orphaned || broken(id) || now.backups.iter().any(|backup| backup.id == id)
    };
    // Its record goes first.
    worked.take_back(|finding| gone.iter().any(|id| concerns(finding, id) && !is_there(id)));
    let size = now.lineage.segment_size;
    for name in &worked.vanished {
        let expired = now.gaps.iter().any(|gap| gap.is_expired() && gap.covers(*name, size));
        // Whole segments take the place of parts.
        if !expired && !now.segments.contains(*name) {
            let takes = Takes::Segments { first: *name, last: *name };
            let what = "it was listed, and is gone; no removal by retention is on record";
            findings.push(Finding::damage(FindingKind::Missing, location, name.to_string(), what, takes));
        }
    }
    for id in worked.vanished_backups.iter().filter(|id| !gone.contains(*id) && !is_there(id)) {
        findings.push(Finding::damage(
            FindingKind::Missing,
            location,
            format!("backup {id}"),
            "its record was listed, and is gone; no removal by retention is on record",
            Takes::Backup { id: id.clone(), part: "its record".to_owned() },
        ));
    }
    Ok(findings)
}

/// Returns whether a finding is one of a backup whose id begins so.
fn concerns(finding: &Finding, id: &str) -> bool {
    match &finding.takes {
        Takes::Backup { id: known, .. } => known.starts_with(id),
        // What no restore needs of it.
        _ => finding.object.strip_prefix("backup ").is_some_and(|object| object.starts_with(id)),
    }
}

/// Returns the time of a transaction's end near a position: the last known before it, or the first behind it.
pub(super) async fn time_near(
    repository: &LineageRepository,
    timeline: TimelineId,
    lsn: Lsn,
    behind: bool,
    size: SegmentSize,
) -> Option<DateTime<Utc>> {
    let history = repository.history(timeline).await.ok().flatten()?;
    let mut number = lsn.0 / size.bytes();
    for _ in 0..LOOK_ASIDE_MAX {
        let start = Lsn(number.saturating_mul(size.bytes()));
        let owner = if behind {
            history.timeline_of(lsn.max(start))
        } else {
            history.timeline_of(Lsn(start.0.min(lsn.0.saturating_sub(1))))
        };
        let name = SegmentName::from_number(owner, number, size)?;
        if let Ok(Some(summary)) = repository.segment_summary(name).await {
            let stops = [summary.min_time, summary.max_time].into_iter().flatten();
            let near = stops.filter(|stop| if behind { stop.lsn >= lsn } else { stop.lsn < lsn });
            let times = near.map(|stop| stop.time);
            if let Some(time) = if behind { times.min() } else { times.max() } {
                return Some(time);
            }
        }
        number = if behind { number + 1 } else { number.checked_sub(1)? };
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use walship::catalog::{GapCause, GapKind, GapRecord};
    use walship::pg::TimelineId;
    use walship::repository::{Repository, new_gap_id};
    use walship::storage::faulty::{Call, FaultyStorage};
    use walship::storage::memory::MemoryStorage;
    use walship::storage::{ObjectKey, Storage as _};

    use super::*;

    fn time(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
    }

    fn expired(second: i64) -> GapRecord {
        GapRecord {
            format: 1,
            id: new_gap_id(time(second), 7),
            timeline: TimelineId::FIRST,
            start_lsn: Lsn(1 << 24),
            end_lsn: Lsn(3 << 24),
            cause: GapCause { kind: GapKind::Expired, text: "test".into() },
            segment_digest: None,
            recorded: time(second),
            host: "host".into(),
            user: "user".into(),
        }
    }

    #[tokio::test]
    async fn a_record_that_a_removal_replaces_meanwhile_is_not_damaged() {
        let memory = MemoryStorage::new();
        let storage = FaultyStorage::new(Arc::new(memory.clone()));
        let repository = Repository::create(Arc::new(storage.clone()), time(0)).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), time(0)).await.unwrap();
        let lineage = cluster.register_lineage(42, SegmentSize::DEFAULT, 17, time(0)).await.unwrap();
        let stored = |memory: &MemoryStorage| {
            let key = memory.keys().into_iter().find(|key| key.contains("/gaps/")).unwrap();
            ObjectKey::new(key).unwrap()
        };
        lineage.put_gap(&expired(2)).await.unwrap();
        let newer = stored(&memory);
        let document = memory.get(&newer, 1 << 20).await.unwrap().unwrap();
        memory.remove(&newer);
        lineage.put_gap(&expired(1)).await.unwrap();
        let older = stored(&memory);
        // It is listed, and replaced when it is read.
        let removal = memory.clone();
        storage.set(move |call, key| {
            if call == Call::Get && key == older.as_str() {
                removal.overwrite(&newer, document.clone());
                removal.remove(&older);
            }
            None
        });
        let looked = look(&lineage, time(9)).await.unwrap();
        assert!(looked.findings.is_empty(), "{:?}", looked.findings);
        assert_eq!(looked.catalog.gaps, [expired(2)]);
    }
}
