//! A backup: its documents against each other, and each data object against its record, its index and the manifest.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use walship::catalog::{BackupObject, BackupRecord, ReadPlace};
use walship::pg::backup_manifest::{BackupManifest, ManifestFile};
use walship::repository::{BackupBlocks, BackupObjects, BackupStarted, LineageRepository};
use walship::{Error, Result};

use super::object::{Found, check_object};
use super::run::{Done, Job};
use crate::execute::restore::blocking;
use crate::execute::unpack::Arriving;
use crate::verify::{Finding, FindingKind, Takes};

/// How many backups' manifests are in memory at once.
const CASES_MAX: usize = 2;

/// How much of an object is fetched at once.
const RANGE_BYTES: u64 = 4 << 20;

/// How many ranges wait to be looked at.
const RANGES_WAITING: usize = 2;

/// How many things that are wrong with one object are told.
pub(super) const FLAWS_MAX: usize = 20;

/// The part of a backup without which nothing of it can be told.
const RECORD: &str = "its record";

/// What was said when the backup was begun.
const STARTED: &str = "started.json";

/// The server's list of a backup's files.
const MANIFEST: &str = "manifest.json.zst";

/// A backup, as it is known while its objects are read.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) record: BackupRecord,
    /// What its manifest says of each file; `None` where that is damaged.
    pub(super) manifest: Option<HashMap<PathBuf, ManifestFile>>,
    /// In which object each file counts, where objects of a backup that did not complete are among them.
    pub(super) from: Option<HashMap<PathBuf, (u32, u32)>>,
    /// Pages that were damaged when the backup read them.
    pub(super) known_pages: HashSet<(PathBuf, u32)>,
    /// Whether there were more than are named.
    pub(super) more_known_pages: bool,
}

/// What became of reading a backup's documents.
struct Opened {
    /// What is known by them; `None` when the backup is gone, or its record cannot be read.
    case: Option<Arc<Case>>,
    findings: Vec<Finding>,
    vanished: bool,
}

impl Opened {
    fn without_case(findings: Vec<Finding>, vanished: bool) -> Self {
        Self { case: None, findings, vanished }
    }
}

/// The backups that are being read.
#[derive(Debug, Default)]
pub(super) struct Cases {
    held: tokio::sync::Mutex<Vec<(String, Option<Arc<Case>>)>>,
}

impl Cases {
    /// Returns what is known of a backup; `None` when it is gone, or its record cannot be read.
    async fn get(&self, job: &Job, id: &str) -> Result<Option<Arc<Case>>> {
        let mut held = self.held.lock().await;
        if let Some((_, case)) = held.iter().find(|(known, _)| known == id) {
            return Ok(case.clone());
        }
        // What is wrong with them is told where they are read for their own sake.
        let case = open(job, id).await?.case;
        keep(&mut held, id, case.clone());
        Ok(case)
    }
}

fn keep(held: &mut Vec<(String, Option<Arc<Case>>)>, id: &str, case: Option<Arc<Case>>) {
    held.retain(|(known, _)| known != id);
    if held.len() >= CASES_MAX {
        held.remove(0);
    }
    held.push((id.to_owned(), case));
}

fn damage(job: &Job, id: &str, kind: FindingKind, part: &str, what: impl Into<String>) -> Finding {
    let takes = Takes::Backup { id: id.to_owned(), part: part.to_owned() };
    Finding::damage(kind, &job.location, format!("backup {id}, {part}"), what, takes)
}

/// Returns damage of a part that no restore needs.
fn unneeded(job: &Job, id: &str, kind: FindingKind, part: &str, what: impl Into<String>) -> Finding {
    Finding { takes: Takes::Nothing, ..damage(job, id, kind, part, what) }
}

/// Reads the documents of a backup.
async fn open(job: &Job, id: &str) -> Result<Opened> {
    let known = job.catalog.backups.iter().find(|backup| backup.id == id);
    // An orphan's is told of by that.
    let Some(known) = known else { return Ok(Opened::without_case(Vec::new(), false)) };
    let repository = &job.repository;
    let record = match repository.stored_record(known).await {
        Ok(record) => record,
        Err(Error::Missing(_)) => return Ok(Opened::without_case(Vec::new(), true)),
        Err(Error::Corrupt(error)) => {
            let finding = damage(job, id, FindingKind::Damaged, RECORD, error.to_string());
            return Ok(Opened::without_case(vec![finding], false));
        }
        Err(error) => return Err(error),
    };
    let mut findings = Vec::new();
    match repository.backup_started(id).await {
        Ok(started) => findings.extend(started_flaw(job, &record, started.as_ref())),
        Err(Error::Corrupt(error)) => {
            findings.push(unneeded(job, id, FindingKind::Damaged, STARTED, error.to_string()));
        }
        Err(error) if repository.skip_backup_object(id, STARTED, &error) => {}
        Err(error) => return Err(error),
    }
    let (manifest, flaws) = read_manifest(job, &record).await?;
    findings.extend(flaws);
    for (part, read) in [
        ("settings.json", repository.get_backup_settings(&record).await.map(drop)),
        ("names.json.zst", repository.get_backup_names(&record).await.map(drop)),
    ] {
        match read {
            Ok(()) => {}
            // A restore needs neither: settings are offered, names are for `pitr log`.
            Err(Error::Corrupt(error) | Error::Missing(error)) => {
                findings.push(unneeded(job, id, FindingKind::Damaged, part, error.to_string()));
            }
            Err(error) if repository.skip_backup_object(id, part, &error) => {}
            Err(error) => return Err(error),
        }
    }
    findings.extend(note_flaws(job, &record).await?);
    let from = by_indexes(job, &record, manifest.as_ref(), &mut findings).await?;
    let pages = record.damaged_pages.clone().unwrap_or_default();
    if pages.total > 0 {
        let what = format!(
            "{} pages were damaged when the backup was taken: they are in it as they were",
            pages.total
        );
        findings.push(Finding::note(FindingKind::Page, &job.location, format!("backup {id}"), what));
    }
    let case = Case {
        manifest,
        from,
        more_known_pages: pages.total > pages.pages.len() as u64,
        known_pages: pages.pages.into_iter().map(|page| (page.path, page.block)).collect(),
        record,
    };
    Ok(Opened { case: Some(Arc::new(case)), findings, vanished: false })
}

/// Returns how what was said when a backup was begun contradicts its record. A restore reads the record alone, which is found
/// by a key that says the same of its start; of its parent nothing else tells.
fn started_flaw(job: &Job, record: &BackupRecord, started: Option<&BackupStarted>) -> Option<Finding> {
    let started = started?;
    let (id, kind) = (&record.id, FindingKind::Contradiction);
    if started.parent.as_ref() != record.parent.as_ref().map(|parent| &parent.id) {
        let what = "it names another backup to build on than started.json";
        return Some(damage(job, id, kind, RECORD, what));
    }
    let same = started.id == *id
        && started.label == record.label
        && (started.timeline, started.start_lsn) == (record.timeline, record.start_lsn)
        && started.started == record.started;
    let what = "it says something else of the backup's begin than its record";
    (!same).then(|| unneeded(job, id, kind, STARTED, what))
}

type Files = HashMap<PathBuf, ManifestFile>;

async fn read_manifest(job: &Job, record: &BackupRecord) -> Result<(Option<Files>, Vec<Finding>)> {
    let id = &record.id;
    let packed = match job.repository.get_backup_manifest(record).await {
        Ok(packed) => packed,
        Err(Error::Corrupt(error)) => {
            return Ok((None, vec![damage(job, id, FindingKind::Damaged, MANIFEST, error.to_string())]));
        }
        Err(Error::Missing(error)) => {
            return Ok((None, vec![damage(job, id, FindingKind::Missing, MANIFEST, error.to_string())]));
        }
        Err(error) => return Err(error),
    };
    let parsed = blocking(move || crate::execute::restore::read_manifest(&packed).map(|read| read.1)).await;
    let manifest: BackupManifest = match parsed {
        Ok(manifest) => manifest,
        Err(error @ (Error::Corrupt(_) | Error::Invalid(_) | Error::Mismatch(_))) => {
            return Ok((None, vec![damage(job, id, FindingKind::Damaged, MANIFEST, error.to_string())]));
        }
        Err(error) => return Err(error),
    };
    let mut findings = Vec::new();
    let start = manifest.wal_ranges.iter().map(|range| range.start).min();
    let ours = job.catalog.lineage.system_identifier;
    let foreign = manifest.system_identifier.is_some_and(|theirs| theirs != ours);
    if foreign || start != Some(record.start_lsn) {
        let what = "it is of another backup than its record: the WAL that it needs begins elsewhere";
        findings.push(damage(job, id, FindingKind::Contradiction, MANIFEST, what));
    }
    let files = manifest.files.into_iter().map(|file| (file.path.clone(), file));
    Ok((Some(files.collect()), findings))
}

/// Returns where the notes beside the data objects contradict the record. Whether the record is right the objects tell.
async fn note_flaws(job: &Job, record: &BackupRecord) -> Result<Vec<Finding>> {
    let noted = job.repository.stored_objects(&record.id).await?;
    let contradicts = |note: &&BackupObject| {
        let known = record.objects.iter().find(|object| object.name == note.name && object.backup.is_none());
        known.is_some_and(|known| known != *note)
    };
    let flaws = noted.iter().filter(contradicts).map(|note| {
        let part = format!("the note beside {}", note.name);
        let what = "it says something else than the backup's record";
        unneeded(job, &record.id, FindingKind::Contradiction, &part, what)
    });
    Ok(flaws.take(FLAWS_MAX).collect())
}

/// Asks the indexes of all objects whether every file of the manifest is there, and of an incremental backup whether the
/// backups that it builds on hold the rest. Returns in which object each file counts, where that is to be known.
async fn by_indexes(
    job: &Job,
    record: &BackupRecord,
    manifest: Option<&Files>,
    findings: &mut Vec<Finding>,
) -> Result<Option<HashMap<PathBuf, (u32, u32)>>> {
    let id = &record.id;
    if record.objects.iter().any(|object| object.index.is_none()) {
        return Ok(None);
    }
    let mut levels = vec![BackupObjects::from(record)];
    for parent in job.catalog.parents_of(record).unwrap_or_default() {
        match job.repository.whole_record(parent).await {
            Ok(parent) => levels.push(BackupObjects::from(&parent)),
            // It is told of where that backup is read itself.
            Err(Error::Corrupt(_) | Error::Missing(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let blocks = BackupBlocks::new(job.repository.clone(), levels.into());
    let from = match blocks.objects_of_files().await {
        Ok(from) => from,
        // So is an object whose index is damaged.
        Err(Error::Corrupt(_) | Error::Missing(_) | Error::Invalid(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let lacking = manifest.into_iter().flatten().filter(|(path, _)| !from.contains_key(*path));
    for (path, _) in lacking.take(FLAWS_MAX) {
        let what = format!("it lists {}, which no data object holds", path.display());
        findings.push(damage(job, id, FindingKind::Missing, MANIFEST, what));
    }
    if record.parent.is_some() {
        for (object, of) in record.objects.iter().enumerate() {
            findings.extend(incomplete_files(job, record, &blocks, object as u32, of).await?);
        }
    }
    Ok(record.went_on().then_some(from))
}

/// Returns the files of an object whose other blocks are in none of the backups below.
async fn incomplete_files(
    job: &Job,
    record: &BackupRecord,
    blocks: &BackupBlocks,
    object: u32,
    of: &BackupObject,
) -> Result<Vec<Finding>> {
    let files = match blocks.files_of(0, object).await {
        Ok(files) => files,
        Err(Error::Corrupt(_) | Error::Missing(_) | Error::Invalid(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut findings = Vec::new();
    for (file, _) in files.index.files().filter(|(file, _)| file.partial.is_some()) {
        match blocks.file_in(object, &files, &file.whole_path()).await {
            Ok(_) => {}
            Err(Error::Corrupt(error) | Error::Missing(error)) => {
                findings.push(damage(job, &record.id, FindingKind::Missing, &of.name, error.to_string()));
            }
            Err(error) => return Err(error),
        }
        if findings.len() >= FLAWS_MAX {
            break;
        }
    }
    Ok(findings)
}

/// Reads what lies beside a backup's data objects, and compares it.
///
/// # Errors
/// What is no damage: an outage.
pub(super) async fn read_documents(job: &Job, id: &str) -> Result<Done> {
    let mut done = Done::default();
    if !job.is_allowed() {
        done.left = 1;
        return Ok(done);
    }
    // Its objects wait: they are compared with the same.
    let mut held = job.cases.held.lock().await;
    let opened = open(job, id).await?;
    if opened.vanished {
        done.vanished_backups.push(id.to_owned());
    }
    let is_read = opened.case.is_some() || !opened.findings.is_empty();
    keep(&mut held, id, opened.case);
    done.findings = opened.findings;
    if is_read {
        done.objects = 1;
        done.read(ReadPlace::Documents { backup: id.to_owned() }, 0);
    }
    Ok(done)
}

/// Reads one data object of a backup whole.
///
/// # Errors
/// What is no damage: an outage.
pub(super) async fn read_object(job: &Job, id: &str, place: u32) -> Result<Done> {
    let mut done = Done::default();
    if !job.is_allowed() {
        done.left = 1;
        return Ok(done);
    }
    // Why there is nothing to compare it with is told where the documents are read.
    let Some(case) = job.cases.get(job, id).await? else { return Ok(done) };
    let Some(object) = case.record.objects.get(place as usize) else { return Ok(done) };
    done.objects = 1;
    let mut found = fetch(job, id, &case, place).await;
    if found.as_ref().is_ok_and(|found| found.is_damaged()) {
        // It may have been on its way alone.
        found = fetch(job, id, &case, place).await;
    }
    match found {
        Ok(found) => done.findings.extend(flaws(job, id, object, found)),
        Err(Error::Missing(error)) => {
            done.findings.push(damage(job, id, FindingKind::Missing, &object.name, error.to_string()));
        }
        Err(error) => return Err(error),
    }
    done.read(ReadPlace::Object { backup: id.to_owned(), place }, 0);
    Ok(done)
}

/// Returns what was found in an object as findings.
fn flaws(job: &Job, id: &str, object: &BackupObject, found: Found) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(what) = found.damage {
        // What is in it says nothing then.
        findings.push(damage(job, id, FindingKind::Damaged, &object.name, what));
        return findings;
    }
    let more = found.flaws.len().saturating_sub(FLAWS_MAX);
    for what in found.flaws.into_iter().take(FLAWS_MAX) {
        findings.push(damage(job, id, FindingKind::Contradiction, &object.name, what));
    }
    if more > 0 {
        let what = format!("{more} more of its files are not what they should be");
        findings.push(damage(job, id, FindingKind::Contradiction, &object.name, what));
    }
    if found.pages_total > 0 {
        let named: Vec<String> =
            found.pages.iter().map(|(path, block)| format!("block {block} of {}", path.display())).collect();
        // The backup can be restored; what is on these pages is lost.
        findings.push(Finding::damage(
            FindingKind::Page,
            &job.location,
            format!("backup {id}, {}", object.name),
            format!("{} data pages have a wrong checksum: {}", found.pages_total, named.join(", ")),
            Takes::Nothing,
        ));
    }
    findings
}

/// Fetches an object range by range while a thread looks at what has come.
async fn fetch(job: &Job, id: &str, case: &Arc<Case>, place: u32) -> Result<Found> {
    let Some(object) = case.record.objects.get(place as usize) else { return Ok(Found::default()) };
    let folder = object.backup.as_deref().unwrap_or(id);
    let (sender, chunks) = mpsc::channel(RANGES_WAITING);
    let failed = Arc::new(Mutex::new(None));
    let arriving = Arriving {
        chunks,
        current: Bytes::new(),
        hasher: blake3::Hasher::new(),
        failed: Arc::clone(&failed),
    };
    let looked_at = Arc::clone(case);
    let looking = blocking(move || Ok(check_object(&looked_at, place, arriving)));
    let fetching = send_ranges(&job.repository, folder, object, sender);
    let (looked, ()) = tokio::join!(looking, fetching);
    let failure = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut found = match failure {
        Some(error) => return Err(error),
        None => looked?,
    };
    if found.damage.is_none() {
        index_flaws(&job.repository, folder, object, &mut found).await?;
    }
    Ok(found)
}

async fn send_ranges(
    repository: &LineageRepository,
    folder: &str,
    object: &BackupObject,
    sender: mpsc::Sender<Result<Bytes>>,
) {
    let mut offset = 0;
    // One byte more than it should have tells whether it is longer.
    while offset <= object.stored_bytes {
        let length = RANGE_BYTES.min(object.stored_bytes + 1 - offset);
        let chunk = repository.read_backup_object_range(folder, &object.name, offset, length).await;
        let (read, ends) = match &chunk {
            Ok(chunk) => (chunk.len() as u64, (chunk.len() as u64) < length),
            Err(_) => (0, true),
        };
        offset += read;
        let is_empty = chunk.as_ref().is_ok_and(Bytes::is_empty);
        if (!is_empty && sender.send(chunk).await.is_err()) || ends {
            return;
        }
    }
}

/// Compares an object's index with what is in the object.
async fn index_flaws(
    repository: &LineageRepository,
    folder: &str,
    object: &BackupObject,
    found: &mut Found,
) -> Result<()> {
    if object.index.is_none() {
        return Ok(());
    }
    let index = match repository.read_object_index(folder, object).await {
        Ok(index) => index,
        Err(Error::Corrupt(error)) => {
            found.flaws.push(error.to_string());
            return Ok(());
        }
        // One of a newer format.
        Err(Error::Invalid(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let listed = index.files().map(|(file, digests)| (&file.path, file.tar_at, file.bytes, digests));
    let there = found.files.iter().map(|file| (&file.path, file.tar_at, file.bytes, &*file.digests));
    if !listed.eq(there) {
        found.flaws.push("its index lists other files or blocks than it holds".to_owned());
    }
    Ok(())
}
