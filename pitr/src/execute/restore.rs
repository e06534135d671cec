//! Restores a data directory from a plan.
//!
//! PostgreSQL cannot start from a half-restored folder: `global/pg_control` is written last, after
//! every other file is checked, in place and durable. Until then a marker file says what the folder is.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use tokio::sync::mpsc;
use walship::catalog::BackupObject;
use walship::pg::Oid;
use walship::pg::backup_manifest::BackupManifest;
use walship::pg::control::ControlData;
use walship::repository::{BackupBlocks, BackupObjects, LineageRepository};
use walship::{Error, Result};

use super::configuration;
use super::delta;
use super::existing;
use super::outside_settings;
use super::parent_segments;
use super::shared::check_unshared;
use super::unpack::{Arriving, CONTROL_FILE, Destination, create, unpack};
use super::writable;
use crate::plan::RestorePlan;
use crate::recovery_settings::{
    Recovery, RestoreAs, SIGNAL_FILES, SettingsOptions, Standby, auto_conf, overruled,
};
use crate::target::shell_word;

/// The file that marks a folder whose restore is not complete.
pub const INCOMPLETE_MARKER: &str = "walship-restore-incomplete";

/// How many objects are fetched and unpacked at once.
const OBJECTS_MAX: usize = 4;

/// How much of an object one request fetches.
const RANGE_BYTES: u64 = 4 << 20;

/// How many fetched ranges of one object wait to be unpacked.
const RANGES_WAITING: usize = 2;

/// The longest manifest that is unpacked.
const MANIFEST_BYTES_MAX: u64 = BackupManifest::MAX_BYTES as u64;

/// Space that is kept free beside the files: for the WAL that recovery fetches.
const SPARE_BYTES: u64 = 128 << 20;

/// Folders that PostgreSQL wants and whose contents are never restored.
const EMPTY_FOLDERS: &[&str] = &["pg_wal", "pg_wal/archive_status", "pg_replslot"];

/// What the operator decides about a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Where the data directory goes.
    pub data_dir: PathBuf,
    /// What becomes of a data directory that is there.
    pub existing: Existing,
    /// Where tablespaces go, by the path or oid they had.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// Whether replay may use tablespace folders that exist on this host.
    pub accept_tablespace_paths: bool,
    /// Where the server's settings files from outside the data directory go; absent or empty.
    pub settings_dir: Option<PathBuf>,
    /// The recovery settings.
    pub settings: SettingsOptions,
}

/// What becomes of a data directory that is where a restore goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// The restore is refused: the folder is to be absent or empty.
    Refuse,
    /// What of it matches the backup stays, the rest is brought to what the backup says.
    Match,
    /// It gets another name beside the new one, and so do the folders of its tablespaces.
    SetAside {
        /// The time that is part of that name.
        at: DateTime<Utc>,
    },
}

/// How far a restore is; read it at any time.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes fetched from the repository.
    pub fetched_bytes: AtomicU64,
    /// Bytes written into files, or found in place.
    pub written_bytes: AtomicU64,
    /// Bytes that were in place already, and stayed.
    pub kept_bytes: AtomicU64,
    /// Files written and checked.
    pub files: AtomicU64,
}

/// What was done, or with a dry run would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// The data directory.
    pub data_dir: PathBuf,
    /// The folders of the tablespaces by oid.
    pub tablespaces: BTreeMap<Oid, PathBuf>,
    /// Files in the backup.
    pub files: u64,
    /// Their bytes.
    pub data_bytes: u64,
    /// What a data directory that was there saved; `None` where there was none, or it was not to be used.
    pub delta: Option<Delta>,
    /// Folders that get another name, and that name.
    pub set_aside: Vec<(PathBuf, PathBuf)>,
    /// Whether it is a standby.
    pub standby: bool,
    /// What to know or do before PostgreSQL is started.
    pub notes: Vec<String>,
    /// The command that starts PostgreSQL on it.
    pub start_command: String,
}

/// What became of a data directory that a restore went over; with a dry run nothing yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Delta {
    /// Bytes that matched the backup and stayed.
    pub kept_bytes: u64,
    /// Bytes fetched from the repository, compressed.
    pub fetched_bytes: u64,
    /// Files removed, because the backup does not have them.
    pub removed_files: u64,
    /// Where the WAL was set aside that was in the data directory.
    pub old_wal: Option<PathBuf>,
    /// Other folders that were set aside, under their new names: not PostgreSQL's own, and in the backup as they were.
    pub set_aside: Vec<PathBuf>,
}

/// Checks everything that can be checked before a byte is fetched, and says what a restore would do.
///
/// # Errors
/// [`Error::Invalid`] for a folder that is not empty or a mapping that makes no sense,
/// [`Error::LocalIo`] when space is short.
pub fn check(plan: &RestorePlan, options: &RestoreOptions) -> Result<RestoreReport> {
    let data_dir = std::path::absolute(&options.data_dir)
        .map_err(|error| Error::from_io(format!("resolving {}", options.data_dir.display()), error))?;
    let tablespaces = map_tablespaces(plan, options, &data_dir)?;
    let system_identifier = plan.system_identifier.parse().unwrap_or_default();
    let (mut delta, mut set_aside) = (None, Vec::new());
    match options.existing {
        Existing::Refuse => check_empty(&data_dir).map_err(|error| or_over(error, &data_dir))?,
        Existing::Match => {
            check_indexes(plan)?;
            delta = existing::check(&data_dir, system_identifier)?.then(Delta::default);
        }
        Existing::SetAside { at } => {
            if existing::check(&data_dir, system_identifier)? {
                set_aside.push(existing::name_aside(&data_dir, at)?);
            }
        }
    }
    for (oid, path) in &tablespaces {
        match (existing::is_linked(&data_dir, *oid, path), options.existing) {
            (true, Existing::Match) => {}
            (true, Existing::SetAside { at }) => set_aside.push(existing::name_aside(path, at)?),
            _ => check_empty(path).map_err(|error| of_tablespace(error, *oid))?,
        }
    }
    let aside = |path: &Path| set_aside.iter().any(|(from, _)| from == path);
    for path in std::iter::once(&data_dir).chain(tablespaces.values()).chain(&options.settings_dir) {
        writable::check_place(path, aside(path))?;
    }
    if delta.is_some() || !set_aside.is_empty() {
        check_unshared(&data_dir, &tablespaces)?;
    }
    let mut notes = replayed_tablespaces(plan, options)?;
    notes.extend(earlier_wal(&data_dir).map(|kept| {
        format!("WAL from before earlier restores is in {kept}: remove it when nothing of it is missed")
    }));
    // How much of it is there already is not known yet.
    if delta.is_none() {
        check_space(plan, &data_dir, &tablespaces)?;
    }
    notes.extend(outside_settings::check(plan, options)?);
    if nix::unistd::geteuid().is_root() {
        let folders = std::iter::once(&data_dir).chain(tablespaces.values());
        let folders: Vec<_> = folders.map(|path| shell_word(&path.to_string_lossy())).collect();
        notes.push(format!(
            "the files belong to root, and PostgreSQL does not run as root: chown -R postgres: {}",
            folders.join(" ")
        ));
    }
    notes.extend(role_notes(&options.settings));
    let start_command = start_command(&data_dir, false);
    Ok(RestoreReport {
        data_dir,
        tablespaces,
        files: plan.backup.files,
        data_bytes: plan.backup.data_bytes,
        delta,
        set_aside,
        standby: matches!(options.settings.recovery, Recovery::Standby(_)),
        notes,
        start_command,
    })
}

/// Leads on from a data directory that is in the way.
fn or_over(error: Error, data_dir: &Path) -> Error {
    match error {
        Error::Invalid(_) if data_dir.join(CONTROL_FILE).exists() => error.with_next(
            "Give the data directory that is there another name with --set-aside, go over it with --delta, or restore into a \
             folder that is empty or does not exist yet.",
        ),
        error => error,
    }
}

/// Leads on from a tablespace's folder that cannot be taken.
fn of_tablespace(error: Error, oid: Oid) -> Error {
    match error {
        Error::Invalid(_) => error.context(format!("the folder of tablespace {oid}")).with_next(format!(
            "Give the tablespace another folder with --tablespace-mapping {oid}=DIR, or empty that one: look first whose it is.",
        )),
        error => error,
    }
}

/// Returns the folders, in words, that keep WAL from before restores; `None` where there are none.
fn earlier_wal(data_dir: &Path) -> Option<String> {
    let own = data_dir.join("pg_wal");
    let (kept, _) = existing::wal_folders(data_dir);
    let kept = kept.iter().filter(|folder| **folder != own).map(|folder| folder.display().to_string());
    Some(kept.collect::<Vec<_>>().join(", ")).filter(|kept| !kept.is_empty())
}

/// What matches is told by the indexes of the backup's objects.
fn check_indexes(plan: &RestorePlan) -> Result<()> {
    match plan.backup.objects.iter().any(|object| object.index.is_none()) {
        false => Ok(()),
        true => Err(Error::invalid(format!(
            "backup {} was taken before backups had an index: it cannot be compared with a data directory",
            plan.backup.id
        ))
        .with_safe("nothing was written")
        .with_next(
            "Restore it into an empty folder, or choose another one with --backup: `pitr info` lists them.",
        )),
    }
}

/// Returns what to know of a server that takes the original's place, or follows it.
fn role_notes(settings: &SettingsOptions) -> Vec<String> {
    let mut notes = Vec::new();
    match (&settings.recovery, settings.restore_as) {
        (Recovery::ToTarget(_), RestoreAs::Copy) => {}
        (Recovery::ToTarget(_), RestoreAs::Production) => notes
            .push("take a new base backup once the server is up, and re-create its replication slots".into()),
        (Recovery::Standby(_), RestoreAs::Copy) => notes.push(
            "archiving is off in it (--as copy), also once it is promoted: what it writes then is in no archive"
                .into(),
        ),
        (Recovery::Standby(_), RestoreAs::Production) => notes.push(
            "once it is promoted it archives as the original did: take a new base backup then, and make the \
             replication slots that others need of it"
                .into(),
        ),
    }
    if matches!(settings.recovery, Recovery::Standby(Standby { primary_conninfo: None, .. })) {
        notes.push(
            "it follows the archive alone, and is as far behind its primary as the archive is; --primary-conninfo \
             makes it stream as well"
                .into(),
        );
    }
    notes
}

/// Returns the command that starts PostgreSQL.
fn start_command(data_dir: &Path, is_moved: bool) -> String {
    let option = match is_moved {
        true => format!(" -o {}", shell_word(&pinned(data_dir))),
        false => String::new(),
    };
    format!("pg_ctl -D {} -w start{option}", shell_word(&data_dir.to_string_lossy()))
}

/// Returns the option that makes a folder the data directory, for pg_ctl's `-o`: on the command line
/// `data_directory` outranks what the configuration says.
pub(super) fn pinned(data_dir: &Path) -> String {
    format!("-c data_directory={}", shell_word(&data_dir.to_string_lossy()))
}

/// Restores the plan's backup and writes the settings that make PostgreSQL recover to its target. That the
/// backup's objects are stored is known before anything is written.
///
/// # Errors
/// As [`check`]; [`Error::Missing`] when an object of the backup is not there; [`Error::Corrupt`] when anything stored is not what the server's manifest says. After an
/// error the folder is incomplete, marked so, and PostgreSQL refuses to start from it.
/// # Durability
/// After `Ok` every file survives a crash.
/// # Cancel safety
/// Dropping the future leaves an incomplete, marked folder.
pub async fn restore(
    repository: &LineageRepository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    progress: Arc<Progress>,
) -> Result<RestoreReport> {
    let mut report = check(plan, options)?;
    match carry_out(repository, plan, options, progress, &mut report).await {
        Ok(()) => Ok(report),
        Err(error) => Err(what_is_left(error, &report)),
    }
}

/// Says of a failed restore what became of what was there, and how to go on.
fn what_is_left(error: Error, report: &RestoreReport) -> Error {
    let (mut safe, mut next) = (error.safe().to_owned(), error.next().to_owned());
    if report.data_dir.join(INCOMPLETE_MARKER).exists() {
        match error {
            Error::LocalIo(_) | Error::Unavailable(_) | Error::Denied(_) => {
                safe = "the repository is unchanged; the folder is marked as incomplete and PostgreSQL does not start from it"
                    .to_owned();
                next.push_str(" Then run it again with --delta: it goes on where it was.");
            }
            Error::Missing(_) | Error::Corrupt(_) => next.push_str(" With --delta it goes over this folder."),
            _ => {}
        }
    }
    let moved = report.set_aside.iter().filter(|(_, to)| to.is_dir());
    let moved: Vec<String> =
        moved.map(|(from, to)| format!("{} is {} now", from.display(), to.display())).collect();
    if !moved.is_empty() {
        safe.push_str(&format!("; what was there is whole under other names: {}", moved.join(", ")));
    }
    if let Some(kept) = earlier_wal(&report.data_dir) {
        safe.push_str(&format!("; WAL from before is in {kept}"));
    }
    for folder in report.delta.iter().flat_map(|delta| &delta.set_aside) {
        safe.push_str(&format!("; what else was there is in {}", folder.display()));
    }
    error.with_safe(safe).with_next(next)
}

/// Leads on from a backup that is missing something, or damaged: another one may be whole.
pub(crate) fn another_backup(error: Error) -> Error {
    match error {
        Error::Missing(_) | Error::Corrupt(_) => error.with_next(
            "Restore from another backup: `pitr restore ... --backup ID`, `pitr info` lists them.",
        ),
        error => error,
    }
}

async fn carry_out(
    repository: &LineageRepository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    progress: Arc<Progress>,
    report: &mut RestoreReport,
) -> Result<()> {
    for backup in plan.backups() {
        repository.check_backup_objects(backup).await.map_err(another_backup)?;
    }
    let stored = repository.get_backup_manifest(&plan.backup).await.map_err(another_backup)?;
    let (manifest_bytes, manifest) =
        blocking(move || read_manifest(&stored)).await.map_err(another_backup)?;
    if manifest.system_identifier.is_some_and(|id| id != repository.lineage().system_identifier) {
        return Err(Error::mismatch("the backup's manifest belongs to another cluster"));
    }

    if manifest.files.iter().any(|file| file.path.starts_with("pg_twophase")) {
        report.notes.push(
            "the backup holds prepared transactions: look into pg_prepared_xacts once the server is up"
                .to_owned(),
        );
    }

    let data_dir = report.data_dir.clone();
    let tablespaces: HashMap<Oid, PathBuf> =
        report.tablespaces.iter().map(|(oid, path)| (*oid, path.clone())).collect();
    let destination = Arc::new(Destination::new(
        data_dir.clone(),
        tablespaces,
        manifest,
        plan.backup.parent.is_some(),
        progress.clone(),
    ));
    let levels: Arc<[BackupObjects]> = plan.backups().map(BackupObjects::from).collect();
    let blocks = BackupBlocks::new(repository.clone(), levels);
    if plan.backup.went_on() {
        destination.expect_from(blocks.objects_of_files().await?);
    }
    // Until the end nobody else restores to this place.
    let lock;
    match &mut report.delta {
        None => {
            if !report.set_aside.is_empty() {
                let _old = existing::lock(&data_dir)?;
                existing::check_stopped(&data_dir)?;
                existing::set_aside(&report.set_aside)?;
            }
            make_private(&data_dir)?;
            lock = existing::lock(&data_dir)?;
            check_empty(&data_dir)?;
            prepare(&data_dir, &report.tablespaces)?;
        }
        Some(delta) => {
            delta::check_indexes(&blocks, &destination).await.map_err(another_backup)?;
            make_private(&data_dir)?;
            lock = existing::lock(&data_dir)?;
            // Since it was looked at, somebody may have started it.
            existing::check(&data_dir, repository.lineage().system_identifier)?;
            let (data_dir, tablespaces, destination) =
                (data_dir.clone(), report.tablespaces.clone(), destination.clone());
            let (cleared, gone_over) = blocking(move || {
                writable::check_existing(&data_dir, &tablespaces, &destination)?;
                let mut cleared = existing::Cleared::default();
                let gone_over = go_over(&data_dir, &tablespaces, &destination, &mut cleared);
                Ok((cleared, gone_over))
            })
            .await?;
            (delta.removed_files, delta.old_wal) = (cleared.removed, cleared.old_wal);
            delta.set_aside = cleared.set_aside;
            gone_over?;
        }
    }
    // What is stored in several backups is brought together block by block, wherever it goes.
    let way = match report.delta.is_some() || plan.backup.parent.is_some() || plan.backup.went_on() {
        true => Way::OnlyWhatDiffers,
        false => Way::Everything,
    };
    let objects = (0..plan.backup.objects.len()).map(|number| {
        let (destination, progress) = (destination.clone(), progress.clone());
        fetch_object(&blocks, number as u32, way, destination, progress)
    });
    let fetched = futures_util::stream::iter(objects).buffer_unordered(OBJECTS_MAX).try_collect::<()>().await;
    fetched.map_err(another_backup)?;
    if let Some(delta) = &mut report.delta {
        delta.kept_bytes = progress.kept_bytes.load(Ordering::Relaxed);
        delta.fetched_bytes = progress.fetched_bytes.load(Ordering::Relaxed);
    }

    let control_file = destination.finish()?;
    let control = ControlData::parse(&control_file)?;
    if control.system_identifier != repository.lineage().system_identifier {
        return Err(Error::mismatch(format!(
            "the backup's pg_control has system identifier {}, the lineage {}",
            control.system_identifier,
            repository.lineage().system_identifier
        )));
    }
    if let Some(folder) = &options.settings_dir {
        let files = repository.get_backup_settings(&plan.backup).await?;
        let folder = folder.clone();
        blocking(move || outside_settings::write(&folder, &files)).await?;
    }
    let parents = plan.parent_segments.clone();
    let (plan, settings) = (plan.clone(), options.settings.clone());
    let folders: Vec<PathBuf> = report.tablespaces.values().cloned().collect();
    let has_configuration = data_dir.join("postgresql.conf").exists();
    if !has_configuration {
        report.notes.push(
            "the backup holds no postgresql.conf (its server keeps it elsewhere): put one beside the data \
             before starting PostgreSQL"
                .to_owned(),
        );
    }
    let inherited = {
        let data_dir = data_dir.clone();
        blocking(move || configuration::read(&data_dir)).await?
    };
    report.notes.extend(inherited.notes(&overruled(&plan, &settings, &inherited), &data_dir));
    report.start_command = start_command(&data_dir, inherited.moves_data_directory(&data_dir));
    let signal_file = settings.recovery.signal_file();
    let group_reads = destination.group_reads();
    let files = SmallFiles {
        group_reads,
        auto_conf: auto_conf(&plan, &settings, &inherited),
        manifest: manifest_bytes,
        control_file,
        signal_file,
    };
    parent_segments::put(repository, &parents, &data_dir).await?;
    blocking(move || complete(&data_dir, &folders, &files)).await?;
    drop(lock);
    Ok(())
}

/// How many threads are at work for restores.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// One of them, from when it is asked for until its work is done.
struct Thread;

impl Thread {
    fn begin() -> Self {
        THREADS.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Returns whether no thread is at work: they go on with what they have in hand when the future that waits for them
/// is dropped, and may write files a moment longer.
pub(super) fn threads_are_done() -> bool {
    THREADS.load(Ordering::SeqCst) == 0
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread = Thread::begin();
    let working = tokio::task::spawn_blocking(move || {
        let _until_done = thread;
        work()
    });
    match working.await {
        Ok(result) => result,
        Err(error) => Err(Error::local_io(format!("a thread of the restore ended early: {error}"))),
    }
}

/// Returns the manifest's bytes and what they say.
pub(super) fn read_manifest(stored: &[u8]) -> Result<(Vec<u8>, BackupManifest)> {
    let unreadable =
        |error: io::Error| Error::corrupt(format!("the backup's manifest cannot be unpacked: {error}"));
    let mut bytes = Vec::new();
    let decoder = zstd::stream::read::Decoder::new(stored).map_err(unreadable)?;
    io::copy(&mut io::Read::take(decoder, MANIFEST_BYTES_MAX + 1), &mut bytes).map_err(unreadable)?;
    let manifest = BackupManifest::parse(&bytes).map_err(|error| Error::corrupt(error.to_string()))?;
    Ok((bytes, manifest))
}

/// How an object's files get to where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// All of it is fetched.
    Everything,
    /// What is in place is compared, and only the rest is fetched.
    OnlyWhatDiffers,
}

/// Fetches one object and unpacks it; where it is missing or damaged in one repository, what came of it is
/// removed and it is taken from another.
async fn fetch_object(
    blocks: &BackupBlocks,
    number: u32,
    way: Way,
    destination: Arc<Destination>,
    progress: Arc<Progress>,
) -> Result<()> {
    let (id, object) = blocks.object(0, number)?;
    if way == Way::OnlyWhatDiffers && object.index.is_some() {
        return delta::match_object(blocks, number, destination).await;
    }
    let mut failure: Option<(String, Error)> = None;
    for one in blocks.repository().each() {
        if failure.is_some() {
            let (destination, name) = (destination.clone(), object.name.clone());
            blocking(move || destination.give_back(&name)).await?;
        }
        match fetch_object_from(&one, id, object, destination.clone(), progress.clone()).await {
            Ok(()) => {
                if let Some((location, error)) = failure {
                    taken_from(blocks, id, object, &one, &location, &error);
                }
                return Ok(());
            }
            // What is wrong with the files here no other repository mends.
            Err(Failed::Here(error)) => return Err(error),
            Err(Failed::Stored(error)) => {
                one.failed(&error);
                failure.get_or_insert((one.location(), error));
            }
        }
    }
    Err(failure.map_or_else(|| Error::invalid("no repository is configured"), |(_, error)| error))
}

/// Where something went wrong with what a repository has.
pub(super) enum Failed {
    /// With the files that are written.
    Here(Error),
    /// In the repository, or with what came of it.
    Stored(Error),
}

impl Failed {
    /// Returns it of an error of what unpacks and writes.
    pub(super) fn of_writing(error: Error) -> Self {
        match error {
            Error::Corrupt(_) => Self::Stored(error),
            error => Self::Here(error),
        }
    }
}

/// Notes that an object, or a part of one, was not taken from where it was looked for first.
pub(super) fn taken_from(
    blocks: &BackupBlocks,
    id: &str,
    object: &BackupObject,
    one: &LineageRepository,
    location: &str,
    error: &Error,
) {
    let from = one.location();
    blocks.repository().note_made_up_for(format!(
        "{} of backup {id} was taken from {from}, not from {location}: {error}",
        object.name
    ));
}

/// Fetches one object range by range while a thread unpacks what has come.
async fn fetch_object_from(
    repository: &LineageRepository,
    id: &str,
    object: &BackupObject,
    destination: Arc<Destination>,
    progress: Arc<Progress>,
) -> Result<(), Failed> {
    let (sender, chunks) = mpsc::channel(RANGES_WAITING);
    let arriving = Arriving {
        chunks,
        current: Bytes::new(),
        hasher: blake3::Hasher::new(),
        failed: Arc::new(Mutex::new(None)),
    };
    let broke_off = arriving.failed.clone();
    let owned = object.clone();
    let unpacking = blocking(move || unpack(&destination, &owned, arriving));
    let fetching = async {
        let mut offset = 0;
        while offset < object.stored_bytes {
            let length = RANGE_BYTES.min(object.stored_bytes - offset);
            let chunk = repository.read_backup_object_range(id, &object.name, offset, length).await;
            let chunk = chunk.and_then(|chunk| {
                if chunk.is_empty() || chunk.len() as u64 > length {
                    return Err(Error::corrupt(format!(
                        "{} has fewer bytes than the backup's record says ({})",
                        object.name, object.stored_bytes
                    )));
                }
                Ok(chunk)
            });
            let ended = chunk.is_err();
            if let Ok(chunk) = &chunk {
                offset += chunk.len() as u64;
                progress.fetched_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
            // A closed channel means that unpacking failed; its error is the one to report.
            if sender.send(chunk).await.is_err() || ended {
                break;
            }
        }
        drop(sender);
    };
    let (unpacked, ()) = tokio::join!(unpacking, fetching);
    // When the download broke off, that is the cause, whatever the unpacking made of it.
    match broke_off.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(Failed::Stored(error)),
        None => unpacked.map_err(Failed::of_writing),
    }
}

pub(super) fn check_empty(path: &Path) -> Result<()> {
    let refused = |what: String| {
        Err(Error::invalid(what)
            .with_safe("nothing was written")
            .with_next("Restore into a folder that is empty or does not exist yet."))
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::from_io(format!("looking at {}", path.display()), error)),
        Ok(meta) if !meta.is_dir() => return refused(format!("{} is not a folder", path.display())),
        Ok(_) => {}
    }
    if path.join(INCOMPLETE_MARKER).exists() {
        return Err(Error::invalid(format!("{} holds a restore that did not complete", path.display()))
            .with_safe("nothing was written")
            .with_next(
                "Add --delta to go on with it, or restore into a folder that is empty or does not exist yet.",
            ));
    }
    let mut entries =
        fs::read_dir(path).map_err(|error| Error::from_io(format!("reading {}", path.display()), error))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => refused(format!("{} is not empty", path.display())),
    }
}

/// Returns where each of the backup's tablespaces goes.
fn map_tablespaces(
    plan: &RestorePlan,
    options: &RestoreOptions,
    data_dir: &Path,
) -> Result<BTreeMap<Oid, PathBuf>> {
    let mut unused = options.tablespaces.clone();
    let mut mapped = BTreeMap::new();
    for tablespace in &plan.backup.tablespaces {
        let asked = unused.remove(&tablespace.oid.to_string()).or_else(|| unused.remove(&tablespace.path));
        let path = asked.unwrap_or_else(|| PathBuf::from(&tablespace.path));
        let sound = path.is_absolute() && !path.components().any(|part| part.as_os_str() == "..");
        if !sound || path.starts_with(data_dir) || data_dir.starts_with(&path) {
            return Err(Error::invalid(format!(
                "tablespace {} cannot go to {}: it needs an absolute path outside the data directory",
                tablespace.oid,
                path.display()
            )));
        }
        if mapped.values().any(|other: &PathBuf| other.starts_with(&path) || path.starts_with(other)) {
            return Err(Error::invalid(format!(
                "tablespace {} cannot go to {}: another one goes there",
                tablespace.oid,
                path.display()
            )));
        }
        mapped.insert(tablespace.oid, path);
    }
    match unused.keys().next() {
        None => Ok(mapped),
        Some(name) => Err(Error::invalid(format!("the backup has no tablespace {name:?}"))
            .with_next("Give the oid or the exact path; `pitr plan --json` lists the backup's tablespaces.")),
    }
}

/// Returns what to know about the tablespaces that replay creates.
fn replayed_tablespaces(plan: &RestorePlan, options: &RestoreOptions) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for tablespace in &plan.tablespace_paths {
        let path = Path::new(&tablespace.path);
        if fs::symlink_metadata(path).is_ok() {
            if !options.accept_tablespace_paths {
                return Err(Error::invalid(format!(
                    "replay creates tablespace {} in {:?}, and that exists on this host: a server may be using it",
                    tablespace.oid, tablespace.path
                ))
                .with_safe("nothing was written")
                .with_next(
                    "Restore on another host, or confirm with --accept-tablespace-paths that nobody uses it.",
                ));
            }
        } else {
            notes.push(format!(
                "replay creates tablespace {} in {:?}: make that folder, empty and owned by the server's user, \
                 before starting PostgreSQL",
                tablespace.oid, tablespace.path
            ));
        }
    }
    Ok(notes)
}

fn check_space(plan: &RestorePlan, data_dir: &Path, tablespaces: &BTreeMap<Oid, PathBuf>) -> Result<()> {
    let mut needs: BTreeMap<u64, (u64, PathBuf)> = BTreeMap::new();
    let in_tablespaces =
        plan.backup.tablespaces.iter().fold(0u64, |sum, tablespace| sum.saturating_add(tablespace.bytes));
    let own = plan.backup.data_bytes.saturating_sub(in_tablespaces);
    let wal = SPARE_BYTES.min(plan.wal_replay_bytes);
    let mut need = |path: &Path, bytes: u64| -> Result<()> {
        let existing = nearest_existing(path);
        let meta = fs::metadata(&existing)
            .map_err(|error| Error::from_io(format!("looking at {}", existing.display()), error))?;
        let entry = needs.entry(meta.dev()).or_insert((0, existing));
        entry.0 = entry.0.saturating_add(bytes);
        Ok(())
    };
    need(data_dir, own.saturating_add(wal))?;
    for tablespace in &plan.backup.tablespaces {
        if let Some(path) = tablespaces.get(&tablespace.oid) {
            need(path, tablespace.bytes)?;
        }
    }
    for (bytes, path) in needs.values() {
        let space = nix::sys::statvfs::statvfs(path).map_err(|error| {
            Error::from_io(format!("asking for free space at {}", path.display()), error.into())
        })?;
        #[allow(clippy::useless_conversion, reason = "the types differ between platforms")]
        let free = u64::from(space.blocks_available()).saturating_mul(u64::from(space.fragment_size()));
        if free < *bytes {
            return Err(Error::local_io(format!(
                "the restore needs {bytes} bytes at {}, and {free} are free",
                path.display()
            ))
            .with_safe("nothing was written")
            .with_next("Free space, or restore to another file system."));
        }
    }
    Ok(())
}

pub(super) fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Marks a data directory as incomplete.
fn mark(data_dir: &Path) -> Result<()> {
    let mut marker = create(&data_dir.join(INCOMPLETE_MARKER), 0o600)?;
    marker
        .write_all(
            b"This folder holds a restore by pitr that has not completed. Do not start PostgreSQL here.\n",
        )
        .and_then(|()| marker.sync_all())
        .map_err(|error| Error::from_io(format!("writing {INCOMPLETE_MARKER}"), error))
}

/// Takes a data directory over: it is marked, PostgreSQL cannot start from it any more, and what the backup does not have
/// goes.
fn go_over(
    data_dir: &Path,
    tablespaces: &BTreeMap<Oid, PathBuf>,
    destination: &Destination,
    cleared: &mut existing::Cleared,
) -> Result<()> {
    let failed = |error| Error::from_io("taking the data directory over", error);
    let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed);
    if !data_dir.join(INCOMPLETE_MARKER).exists() {
        mark(data_dir)?;
        // The mark is there before what it stands for.
        sync(data_dir)?;
    }
    match fs::remove_file(data_dir.join(CONTROL_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let global = data_dir.join("global");
    if global.exists() {
        sync(&global)?;
    }
    existing::check_stopped(data_dir)?;
    check_unshared(data_dir, tablespaces)?;
    existing::clear(data_dir, tablespaces, destination, Utc::now(), cleared)
}

/// Makes the folders and links, and marks the data directory as incomplete.
fn prepare(data_dir: &Path, tablespaces: &BTreeMap<Oid, PathBuf>) -> Result<()> {
    make_private(data_dir)?;
    mark(data_dir)?;
    let links = data_dir.join("pg_tblspc");
    make_private(&links)?;
    for (oid, path) in tablespaces {
        make_private(path)?;
        std::os::unix::fs::symlink(path, links.join(oid.to_string()))
            .map_err(|error| Error::from_io(format!("linking tablespace {oid}"), error))?;
    }
    Ok(())
}

/// Makes a folder of mode 0700, or takes one that is there and gives it that mode. Folders above it that
/// do not exist are made as the umask allows: PostgreSQL's user has to get through them.
pub(super) fn make_private(path: &Path) -> Result<()> {
    let failed = |error| Error::from_io(format!("creating {}", path.display()), error);
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)
}

/// What is written last.
struct SmallFiles {
    group_reads: bool,
    auto_conf: Vec<u8>,
    manifest: Vec<u8>,
    control_file: Vec<u8>,
    signal_file: &'static str,
}

/// Writes settings and signal file, syncs all, and only then lets PostgreSQL start.
fn complete(data_dir: &Path, tablespaces: &[PathBuf], files: &SmallFiles) -> Result<()> {
    for folder in EMPTY_FOLDERS {
        let path = data_dir.join(folder);
        if !path.exists() {
            make_private(&path)?;
        }
    }
    write(&data_dir.join("backup_manifest"), &files.manifest)?;
    for name in ["postgresql.auto.conf"].into_iter().chain(SIGNAL_FILES) {
        match fs::remove_file(data_dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::from_io(format!("removing the backup's {name}"), error));
            }
            _ => {}
        }
    }
    write(&data_dir.join("postgresql.auto.conf"), &files.auto_conf)?;
    write(&data_dir.join(files.signal_file), b"")?;
    let global = data_dir.join("global");
    let temporary = global.join("pg_control.walship");
    write(&temporary, &files.control_file)?;
    if files.group_reads {
        let small = ["backup_manifest", "postgresql.auto.conf", files.signal_file, "backup_label"];
        let small = small.iter().map(|name| data_dir.join(name)).chain([temporary.clone()]);
        small.filter(|path| path.exists()).try_for_each(|path| set_mode(&path, 0o640))?;
        std::iter::once(data_dir).chain(tablespaces.iter().map(|path| &**path)).try_for_each(let_group_in)?;
    }
    sync_file_system(data_dir)?;
    // It may be a link to another file system.
    sync_file_system(&data_dir.join("pg_wal"))?;
    for folder in tablespaces {
        sync_file_system(folder)?;
    }
    let marker = data_dir.join(INCOMPLETE_MARKER);
    fs::rename(&temporary, data_dir.join(CONTROL_FILE))
        .and_then(|()| File::open(&global)?.sync_all())
        .and_then(|()| fs::remove_file(&marker))
        .and_then(|()| File::open(data_dir)?.sync_all())
        .map_err(|error| Error::from_io("completing the restore", error))
}

/// Lets the group into a folder and all folders below; links are not followed.
fn let_group_in(folder: &Path) -> Result<()> {
    let failed = |error| Error::from_io(format!("reading {}", folder.display()), error);
    set_mode(folder, 0o750)?;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            let_group_in(&entry.path())?;
        }
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| Error::from_io(format!("giving {} the mode {mode:o}", path.display()), error))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = create(path, 0o600)?;
    file.write_all(content).map_err(|error| Error::from_io(format!("writing {}", path.display()), error))
}

/// Makes everything on the folder's file system durable, once for all files.
pub(super) fn sync_file_system(folder: &Path) -> Result<()> {
    let failed = |error| Error::from_io(format!("syncing {}", folder.display()), error);
    let file = File::open(folder).map_err(failed)?;
    nix::unistd::syncfs(&file).map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_here_is_no_fault_of_a_repository() {
        for error in [Error::local_io("full"), Error::denied("not yours"), Error::invalid("a folder")] {
            assert!(matches!(Failed::of_writing(error), Failed::Here(_)));
        }
        assert!(matches!(Failed::of_writing(Error::corrupt("a flipped bit")), Failed::Stored(_)));
    }

    #[test]
    fn only_the_folder_itself_is_private() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a/b/data");
        make_private(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        for parent in ["a", "a/b"] {
            let probe = home.path().join("probe");
            DirBuilder::new().mode(0o755).create(&probe).unwrap();
            assert_eq!(mode(&home.path().join(parent)), mode(&probe));
            fs::remove_dir(&probe).unwrap();
        }
    }
}
