//! A base backup whose files are read from the data directory itself, by several threads, between
//! `pg_backup_start` and `pg_backup_stop`: for a program that runs beside the server.
//!
//! It stores what `BASE_BACKUP` would send, in the same form, with a manifest of its own making. `global/pg_control` is
//! read last, because on a standby it says up to where recovery must go. If the session breaks, the server ends the backup: that
//! is noticed while files are read, and nothing is recorded.

mod changes;
mod read;
mod resume;
mod server;
mod walk;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::runtime::Handle;

use crate::catalog::{BackupObject, DamagedPage, DamagedPages, Tablespace};
use crate::codec::backup_index::Partial;
use crate::error::{Error, Result};
use crate::pg::backup_label::{incremental_lines, tablespace_map_line};
use crate::pg::backup_manifest::{BackupManifest, ManifestWriter};
use crate::pg::control::ControlData;
use crate::pg::incremental::partial_path;
use crate::pg::page::PAGE_BYTES;
use crate::pg::{BackupLabel, Lsn, Oid, TimelineHistory, TimelineId, WalRange};
use crate::replication::base_backup::BackupStart;
use crate::storage::blocking;

use super::intake::{Received, TWO_PHASE_BYTES, TWO_PHASE_MAX};
use super::members::{BLOCK, Member, MemberKind};
use super::pack::{Compressing, PackSettings, Packer};
use super::parent::Parent;
use super::progress::{BackupEvent, Meter};

use changes::{Changes, find_changes, may_be_partial, read_changes};
use read::{Destination, Opened, PageCheck, ReadFile};
pub(super) use resume::Leftovers;
pub(super) use server::LocalServer;
use walk::{Entry, EntryKind, walk};

/// The file that makes a folder a data directory.
const CONTROL_FILE: &str = "global/pg_control";

/// `pg_control` may be read in the middle of being written: so often it is read again, with pauses.
const CONTROL_READS: u32 = 50;

/// The pause between two reads of `pg_control`.
const CONTROL_PAUSE: Duration = Duration::from_millis(20);

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(250);

/// The longest path, and the longest target of a link, that a tar header holds as PostgreSQL writes it.
const NAME_BYTES_MAX: usize = 99;

/// How the files are read.
#[derive(Debug, Clone)]
pub(super) struct ReadOptions {
    /// How many threads read.
    pub(super) workers: usize,
    /// The most bytes a second of all of them.
    pub(super) bytes_per_second: Option<u64>,
}

/// What the threads share.
struct Shared {
    settings: Arc<PackSettings>,
    queue: Mutex<VecDeque<Entry>>,
    check: Option<PageCheck>,
    parent: Option<Arc<Parent>>,
    pace: Option<Pace>,
    read_bytes: AtomicU64,
    /// How many threads have found no file left to read.
    idle: AtomicUsize,
    /// Set when the backup is being given up.
    stopped: AtomicBool,
}

impl Shared {
    /// # Errors
    /// [`Error::Unavailable`] when the backup is being given up.
    fn go_on(&self) -> Result<()> {
        match self.stopped.load(Ordering::Relaxed) {
            true => Err(Error::unavailable("the backup was given up")),
            false => Ok(()),
        }
    }

    /// Returns where a thread is to compress: the last files are large ones, and who has none left compresses for those who
    /// have.
    fn compressing(&self) -> Compressing {
        match self.idle.load(Ordering::Relaxed) {
            0 => Compressing::Here,
            _ => Compressing::Aside,
        }
    }

    /// Takes note of bytes that were read, and keeps to the rate.
    ///
    /// # Errors
    /// As [`Shared::go_on`].
    fn has_read(&self, bytes: u64) -> Result<()> {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(pace) = &self.pace {
            pace.keep(bytes, &self.stopped);
        }
        self.go_on()
    }
}

/// What one thread has done.
#[derive(Default)]
struct Share {
    objects: Vec<BackupObject>,
    files: Vec<ReadFile>,
    damaged: DamagedPages,
    two_phase: Vec<Vec<u8>>,
    /// Why files were stored whole of which some blocks would have done: how many, and the first reason.
    stored_anew: (u64, Option<String>),
}

/// Stops the threads when the backup ends early, however it does.
struct StopAtDrop(Arc<Shared>);

impl Drop for StopAtDrop {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }
}

/// Reads everything and stores it; returns what was stored, where the backup ends, and on which timeline.
///
/// `start` was said by [`LocalServer::start`].
///
/// # Errors
/// [`Error::LocalIo`] for files that cannot be read, what storing fails with, and what the server says when the backup
/// ends: that it was promoted meanwhile, for one.
pub(super) async fn take(
    server: &mut LocalServer,
    start: &BackupStart,
    settings: Arc<PackSettings>,
    options: &ReadOptions,
    parent: Option<Arc<Parent>>,
    leftovers: Option<Leftovers>,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<(Received, Lsn, TimelineId)> {
    let data_directory = server.data_directory.clone();
    let control = server.control.clone();
    let walked = {
        let (folder, version, emptied) =
            (data_directory.clone(), server.version_folder.clone(), server.emptied.clone());
        blocking(move || walk(&folder, &version, emptied.as_deref())).await?
    };
    for path in &walked.odd {
        progress(BackupEvent::Warning(format!(
            "{} is neither file nor folder and is not in the backup",
            path.display()
        )));
    }
    if control.data_checksum_version != 0 && control.block_size as usize != PAGE_BYTES {
        progress(BackupEvent::Warning(format!(
            "pages of {} bytes are not checked: walship knows those of {PAGE_BYTES}",
            control.block_size
        )));
    }
    check_locations(&walked.tablespaces)?;
    let check = (control.data_checksum_version != 0 && control.block_size as usize == PAGE_BYTES)
        .then_some(PageCheck { start: start.lsn, file_blocks: control.relation_file_blocks });
    let (mut files, places): (Vec<Entry>, Vec<Entry>) =
        walked.entries.into_iter().partition(|entry| matches!(entry.kind, EntryKind::File { .. }));
    let total_bytes = files.iter().map(length).sum();
    progress(BackupEvent::Started {
        id: settings.id.clone(),
        start_lsn: start.lsn,
        timeline: start.timeline,
        total_bytes,
    });
    // Large ones first, so that no thread is left with one at the end; with a parent in its order, so that each of its
    // indexes is read once.
    files.sort_by_cached_key(|entry| {
        let place = parent.as_ref().and_then(|parent| parent.place_of(&entry.listed()));
        (entry.tablespace, place, std::cmp::Reverse(length(entry)))
    });
    let shared = Arc::new(Shared {
        settings: Arc::clone(&settings),
        queue: Mutex::default(),
        check,
        parent: parent.clone(),
        pace: options.bytes_per_second.map(Pace::new),
        read_bytes: AtomicU64::new(0),
        idle: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
    });
    let _stop = StopAtDrop(Arc::clone(&shared));
    let long_links = walked.tablespaces.iter().any(|(_, place)| place.as_os_str().len() > NAME_BYTES_MAX);
    let reading = async {
        let mut share = Share::default();
        if let Some(leftovers) = leftovers {
            let kept = keep(&shared, leftovers, &files, options.workers, total_bytes, progress).await?;
            let seen: HashSet<&Path> = kept.files.iter().map(|file| &*file.listed).collect();
            files.retain(|entry| !seen.contains(&*entry.listed()));
            share.add(kept);
        }
        *shared.queue.lock().unwrap_or_else(PoisonError::into_inner) = files.into();
        share.add(put_folders(&settings, places, long_links).await?);
        for read in read_all(&shared, options.workers, total_bytes, progress, work).await? {
            share.add(read);
        }
        Ok(share)
    };
    let mut share = server.during(reading, || shared.stopped.store(true, Ordering::Relaxed)).await?;
    if let (count, Some(why)) = &share.stored_anew {
        progress(BackupEvent::Warning(format!(
            "{count} files are stored whole, because a backup below cannot be read: {why}"
        )));
    }
    {
        // A file system that was unmounted meanwhile looks as if every file in it had been dropped.
        let (folder, version, found) =
            (data_directory.clone(), server.version_folder.clone(), walked.tablespaces.clone());
        blocking(move || {
            found.iter().try_for_each(|(oid, place)| {
                let link = folder.join("pg_tblspc").join(oid.to_string());
                walk::is_seen(&link, place, &version).map(|_| ())
            })
        })
        .await?;
    }

    let control_file = {
        let path = data_directory.join(CONTROL_FILE);
        blocking(move || read_control(&path)).await?
    };
    let stopped = server.stop().await?;
    let label = BackupLabel::parse(&stopped.label).map_err(Error::from)?;
    let now = Utc::now();
    let mut packer = Packer::new(Arc::clone(&settings), Compressing::Aside);
    let mut stored_label = stopped.label.clone();
    if let Some(parent) = &parent {
        stored_label += &incremental_lines(parent.link.start_lsn, parent.link.timeline);
    }
    let mut small = vec![("backup_label", stored_label.into_bytes())];
    if long_links {
        // The server's own map may name one that was dropped since.
        let lines = walked.tablespaces.iter().flat_map(|(oid, place)| tablespace_map_line(*oid, place));
        small.push(("tablespace_map", lines.collect()));
    }
    small.push((CONTROL_FILE, control_file.clone()));
    for (path, content) in small {
        share.files.push(put_small(&mut packer, path, &content, now).await?);
    }
    // The manifest is that of the directory that is put together.
    if let Some(file) = share.files.iter_mut().find(|file| file.listed == Path::new("backup_label")) {
        (file.bytes, file.crc) = (stopped.label.len() as u64, crc32c::crc32c(stopped.label.as_bytes()));
    }
    share.objects.extend(packer.finish().await?);
    // Those that were taken over come first, as they are: of a file that is in several the last one counts.
    let own = share.objects.iter().take_while(|object| object.backup.is_some()).count();
    share.objects[own..].sort_by(|a, b| a.name.cmp(&b.name));

    let stop_timeline = match label.from_standby {
        // Read anew: the standby may have followed its primary to another timeline since.
        true => {
            let path = data_directory.join(CONTROL_FILE);
            let control = blocking(move || read_control(&path)).await?;
            ControlData::parse(&control)?.min_recovery_timeline.unwrap_or(label.timeline)
        }
        false => label.timeline,
    };
    let ranges = wal_ranges(&data_directory, &label, stopped.lsn, stop_timeline)?;
    let major = server.major;
    let system_identifier = control.system_identifier;
    share.files.sort_by(|a, b| a.listed.cmp(&b.listed));
    share.damaged.pages.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
    let files = std::mem::take(&mut share.files);
    let data_bytes = files.iter().map(|file| file.bytes).sum();
    let tablespaces = tablespaces(&walked.tablespaces, &files);
    let (manifest_bytes, manifest) = blocking(move || {
        let mut writer = ManifestWriter::new((major >= 17).then_some(system_identifier));
        for file in &files {
            writer.add(&file.listed, file.bytes, file.modified, Some(file.crc));
        }
        let bytes = writer.finish(&ranges);
        let manifest = BackupManifest::parse(&bytes)?;
        Ok((bytes, manifest))
    })
    .await?;
    let received = Received {
        objects: share.objects,
        manifest,
        manifest_bytes,
        label,
        two_phase: (share.two_phase.len() <= TWO_PHASE_MAX).then_some(share.two_phase),
        tablespaces,
        data_bytes,
        damaged: share.damaged,
    };
    Ok((received, stopped.lsn, stop_timeline))
}

fn length(entry: &Entry) -> u64 {
    match entry.kind {
        EntryKind::File { bytes } => bytes,
        EntryKind::Folder { .. } | EntryKind::Link(_) => 0,
    }
}

impl Share {
    fn add(&mut self, other: Self) {
        self.objects.extend(other.objects);
        self.files.extend(other.files);
        self.damaged.add(other.damaged);
        self.two_phase.extend(other.two_phase);
        let (count, why) = other.stored_anew;
        self.stored_anew.0 += count;
        self.stored_anew.1 = self.stored_anew.1.take().or(why);
    }
}

/// Stores folders and links, before every file: an object unpacked by hand finds them there.
async fn put_folders(
    settings: &Arc<PackSettings>,
    mut places: Vec<Entry>,
    long_links: bool,
) -> Result<Share> {
    // The sort is stable: a folder stays before what is in it.
    places.sort_by_key(|entry| entry.tablespace);
    let mut packer = Packer::new(Arc::clone(settings), Compressing::Aside);
    for place in places {
        let (kind, mode, link) = match &place.kind {
            EntryKind::Folder { mode } => (MemberKind::Folder, 0o700 | (mode & 0o050), None),
            EntryKind::Link(_) if long_links => continue,
            EntryKind::Link(target) => (MemberKind::Link, 0o777, Some(target.as_path())),
            EntryKind::File { .. } => continue,
        };
        packer.begin_archive(place.tablespace);
        let member = Member { path: place.path, kind, bytes: 0 };
        packer.header(&header(&member, mode, DateTime::UNIX_EPOCH, link)?, member, None);
        packer.end_member();
        packer.pump().await?;
    }
    let objects = packer.finish().await?;
    Ok(Share { objects, ..Share::default() })
}

/// Has the objects of backups that did not complete compared with what is on disk.
async fn keep(
    shared: &Arc<Shared>,
    leftovers: Leftovers,
    files: &[Entry],
    workers: usize,
    total_bytes: u64,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<Share> {
    // Of what is prepared more is to be known than what is stored.
    let files = files.iter().filter(|entry| !entry.path.starts_with("pg_twophase"));
    let entries: HashMap<PathBuf, Entry> = files.map(|entry| (entry.listed(), entry.clone())).collect();
    let leftovers = Arc::new(leftovers);
    let compare = {
        let leftovers = leftovers.clone();
        move |shared: &Shared, handle: &Handle| leftovers.compare(shared, handle, &entries)
    };
    let kept = read_all(shared, workers, total_bytes, progress, compare).await?;
    let share = leftovers.take_over(kept.into_iter().flatten().collect());
    if !share.objects.is_empty() {
        let bytes: u64 = share.objects.iter().map(|object| object.stored_bytes).sum();
        progress(BackupEvent::Note(format!(
            "{} data objects ({} MB stored) are taken over from a backup that did not complete",
            share.objects.len(),
            bytes / 1_000_000
        )));
    }
    Ok(share)
}

/// Has `workers` threads do some work, and returns what each has done.
async fn read_all<T: Send + 'static>(
    shared: &Arc<Shared>,
    workers: usize,
    total_bytes: u64,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
    work: impl Fn(&Shared, &Handle) -> Result<T> + Send + Sync + 'static,
) -> Result<Vec<T>> {
    let work = Arc::new(work);
    let mut working = tokio::task::JoinSet::new();
    for _ in 0..workers.max(1) {
        let (shared, work) = (Arc::clone(shared), Arc::clone(&work));
        let handle = Handle::current();
        working.spawn_blocking(move || {
            let done = work(&shared, &handle);
            if done.is_err() {
                shared.stopped.store(true, Ordering::Relaxed);
            }
            done
        });
    }
    let mut meter = Meter::new(total_bytes, Instant::now());
    let mut told = 0;
    let mut tick = tokio::time::interval(TICK);
    let (mut all, mut failure) = (Vec::new(), None);
    loop {
        tokio::select! {
            joined = working.join_next() => match joined {
                None => break,
                Some(Ok(Ok(done))) => all.push(done),
                Some(Ok(Err(error))) => failure = failure.or(Some(error)),
                Some(Err(error)) => {
                    let error = Error::unavailable(format!("a thread that reads files ended early: {error}"));
                    failure = failure.or(Some(error));
                }
            },
            _ = tick.tick() => {
                let read = shared.read_bytes.load(Ordering::Relaxed);
                if let Some(transfer) = meter.add(read - told, Instant::now()) {
                    progress(BackupEvent::Data(transfer));
                }
                told = read;
            }
        }
    }
    progress(BackupEvent::Data(meter.now()));
    match failure {
        None => Ok(all),
        Some(error) => Err(error),
    }
}

/// Reads files until there are none left. Blocking.
fn work(shared: &Shared, handle: &Handle) -> Result<Share> {
    let mut packer = Packer::new(Arc::clone(&shared.settings), Compressing::Here);
    let mut share = Share::default();
    let read = read_files(shared, handle, &mut packer, &mut share);
    match read {
        Ok(()) => {
            share.objects = handle.block_on(packer.finish())?;
            Ok(share)
        }
        Err(error) => {
            handle.block_on(packer.abandon());
            Err(error)
        }
    }
}

fn read_files(shared: &Shared, handle: &Handle, packer: &mut Packer, share: &mut Share) -> Result<()> {
    let mut buffer = Vec::new();
    loop {
        let next = shared.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(entry) = next else {
            shared.idle.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        // What is gone was dropped since the backup began: replay knows.
        let Some(opened) = read::open(&entry.source)? else { continue };
        if entry.is_unlogged() {
            continue;
        }
        let (file, damaged) = put_file(shared, handle, packer, &entry, &opened, &mut buffer, share)?;
        share.files.push(file);
        share.damaged.add(damaged.into());
    }
}

fn put_file(
    shared: &Shared,
    handle: &Handle,
    packer: &mut Packer,
    entry: &Entry,
    opened: &Opened,
    buffer: &mut Vec<u8>,
    share: &mut Share,
) -> Result<(ReadFile, Vec<DamagedPage>)> {
    let listed = entry.listed();
    packer.begin_archive(entry.tablespace);
    if let Some(changes) = changes_of(shared, handle, entry, opened, buffer, share)? {
        return put_changes(shared, handle, packer, entry, opened, buffer, changes);
    }
    let member = Member { path: entry.path.clone(), kind: MemberKind::File, bytes: opened.bytes };
    packer.header(&header(&member, opened.mode, opened.modified, None)?, member, None);
    let two_phase = &mut share.two_phase;
    if listed.parent() == Some(Path::new("pg_twophase")) && two_phase.len() <= TWO_PHASE_MAX {
        let failed = |error| Error::from_io(format!("reading {}", entry.source.display()), error);
        two_phase.push(opened.beginning(TWO_PHASE_BYTES).map_err(failed)?);
    }
    let mut into = IntoPacker { shared, handle, packer };
    let (crc, damaged) = read::read(opened, &entry.source, &listed, shared.check, &mut into)?;
    packer.padding(&padding(opened.bytes));
    packer.end_member();
    handle.block_on(packer.pump())?;
    Ok((ReadFile { listed, bytes: opened.bytes, crc, modified: opened.modified }, damaged))
}

/// Compares a file with what the parent has of it; returns what has changed, and in which object the parent has it. `None` when
/// it is to be stored whole.
fn changes_of(
    shared: &Shared,
    handle: &Handle,
    entry: &Entry,
    opened: &Opened,
    buffer: &mut Vec<u8>,
    share: &mut Share,
) -> Result<Option<(Changes, u32)>> {
    let listed = entry.listed();
    let Some(parent) = &shared.parent else { return Ok(None) };
    let Some(object) = parent.object_of(&listed).filter(|_| may_be_partial(&listed, opened.bytes)) else {
        return Ok(None);
    };
    let before = match handle.block_on(parent.file(object, &entry.path)) {
        Ok(before) => before,
        // What cannot be built on is stored anew.
        Err(error @ (Error::Corrupt(_) | Error::Missing(_))) => {
            share.stored_anew.0 += 1;
            share.stored_anew.1.get_or_insert_with(|| error.to_string());
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut pass = |bytes| shared.has_read(bytes);
    let found = find_changes(opened, &entry.source, &listed, shared.check, &before, buffer, &mut pass)?;
    Ok(found.map(|changes| (changes, object)))
}

/// Stores the blocks of a file that changed.
fn put_changes(
    shared: &Shared,
    handle: &Handle,
    packer: &mut Packer,
    entry: &Entry,
    opened: &Opened,
    buffer: &mut Vec<u8>,
    (changes, parent_object): (Changes, u32),
) -> Result<(ReadFile, Vec<DamagedPage>)> {
    let listed = entry.listed();
    let bytes = changes.partial.stored_bytes();
    let member = Member { path: partial_path(&entry.path), kind: MemberKind::File, bytes };
    let partial = Partial { file: changes.partial.clone(), parent_object };
    packer.header(&header(&member, opened.mode, opened.modified, None)?, member, Some(partial));
    packer.data(&changes.partial.header());
    let mut take = |bytes: &[u8]| {
        shared.go_on()?;
        packer.data(bytes);
        packer.set_compressing(shared.compressing());
        handle.block_on(packer.pump())
    };
    let (crc, mut damaged) =
        read_changes(opened, &entry.source, &listed, shared.check, &changes, buffer, &mut take)?;
    damaged.extend(changes.damaged);
    packer.padding(&padding(bytes));
    packer.end_member();
    handle.block_on(packer.pump())?;
    Ok((ReadFile { listed, bytes: opened.bytes, crc, modified: opened.modified }, damaged))
}

/// A file's way into its object.
struct IntoPacker<'a> {
    shared: &'a Shared,
    handle: &'a Handle,
    packer: &'a mut Packer,
}

impl Destination for IntoPacker<'_> {
    fn room(&mut self, wanted: usize) -> &mut [u8] {
        self.packer.room(wanted)
    }

    fn took(&mut self, length: usize) -> Result<()> {
        let shared = self.shared;
        shared.go_on()?;
        self.packer.took(length);
        self.packer.set_compressing(shared.compressing());
        self.handle.block_on(self.packer.pump())?;
        shared.has_read(length as u64)
    }
}

async fn put_small(packer: &mut Packer, path: &str, content: &[u8], now: DateTime<Utc>) -> Result<ReadFile> {
    let (path, bytes) = (PathBuf::from(path), content.len() as u64);
    let member = Member { path: path.clone(), kind: MemberKind::File, bytes };
    packer.header(&header(&member, 0o600, now, None)?, member, None);
    packer.data(content);
    packer.padding(&padding(bytes));
    packer.end_member();
    packer.pump().await?;
    Ok(ReadFile { listed: path, bytes, crc: crc32c::crc32c(content), modified: now })
}

fn padding(bytes: u64) -> Vec<u8> {
    vec![0; (bytes.next_multiple_of(BLOCK as u64) - bytes) as usize]
}

/// Returns a tar header as PostgreSQL writes it.
///
/// Source: `src/port/tar.c`, tarCreateHeader.
fn header(member: &Member, mode: u32, modified: DateTime<Utc>, link: Option<&Path>) -> Result<[u8; BLOCK]> {
    let path = &member.path;
    let too_long = |_| Error::invalid(format!("{path:?} is too long for a base backup"));
    if path.as_os_str().len() > NAME_BYTES_MAX {
        return Err(too_long(()));
    }
    let mut header = tar::Header::new_ustar();
    header.set_path(path).map_err(|_| too_long(()))?;
    if let Some(link) = link {
        header.set_link_name(link).map_err(|_| too_long(()))?;
    }
    header.set_entry_type(match member.kind {
        MemberKind::File => tar::EntryType::Regular,
        MemberKind::Folder => tar::EntryType::Directory,
        MemberKind::Link => tar::EntryType::Symlink,
    });
    header.set_mode(mode);
    header.set_size(member.bytes);
    header.set_mtime(u64::try_from(modified.timestamp()).unwrap_or_default());
    header.set_cksum();
    Ok(*header.as_bytes())
}

/// Reads `pg_control` whole: the server writes it in place.
fn read_control(path: &Path) -> Result<Vec<u8>> {
    let mut last = None;
    for _ in 0..CONTROL_READS {
        let bytes =
            fs::read(path).map_err(|error| Error::from_io(format!("reading {}", path.display()), error))?;
        match ControlData::parse(&bytes) {
            Ok(_) => return Ok(bytes),
            Err(error) => last = Some(error),
        }
        sleep(CONTROL_PAUSE);
    }
    Err(last.map_or_else(|| Error::corrupt("pg_control cannot be read"), Error::from))
}

/// Returns the WAL that the backup needs. A standby may have followed its primary to another timeline meanwhile.
///
/// Source: `src/backend/backup/backup_manifest.c`, AddWALInfoToBackupManifest.
fn wal_ranges(
    data_directory: &Path,
    label: &BackupLabel,
    end: Lsn,
    end_timeline: TimelineId,
) -> Result<Vec<WalRange>> {
    if end <= label.start_lsn {
        return Err(Error::corrupt(format!(
            "the server's backup ends at {end}, where it starts at {}",
            label.start_lsn
        )));
    }
    if end_timeline == label.timeline {
        return Ok(vec![WalRange { timeline: label.timeline, start: label.start_lsn, end }]);
    }
    let path = data_directory.join("pg_wal").join(format!("{}.history", end_timeline.hex()));
    let text = fs::read_to_string(&path)
        .map_err(|error| Error::from_io(format!("reading {}", path.display()), error))?;
    let history = TimelineHistory::parse(end_timeline, &text)?;
    ranges_along(&history, label.timeline, label.start_lsn, end).ok_or_else(|| {
        Error::mismatch(format!(
            "the standby has left timeline {} during the backup, and timeline {end_timeline} does not come from it",
            label.timeline
        ))
        .with_safe("no backup was recorded; older backups are untouched")
        .with_next("Take the backup again.")
    })
}

fn ranges_along(history: &TimelineHistory, first: TimelineId, start: Lsn, end: Lsn) -> Option<Vec<WalRange>> {
    let from = history.ancestors.iter().position(|entry| entry.timeline == first)?;
    let mut ranges = Vec::new();
    let mut at = start;
    for entry in &history.ancestors[from..] {
        if entry.switch_lsn > at {
            ranges.push(WalRange { timeline: entry.timeline, start: at, end: entry.switch_lsn });
            at = entry.switch_lsn;
        }
    }
    if end > at {
        ranges.push(WalRange { timeline: history.timeline, start: at, end });
    }
    Some(ranges)
}

fn check_locations(found: &[(Oid, PathBuf)]) -> Result<()> {
    match found.iter().find(|(_, place)| place.to_str().is_none()) {
        None => Ok(()),
        Some((oid, place)) => {
            Err(Error::invalid(format!("the location {place:?} of tablespace {oid} is no UTF-8")))
        }
    }
}

fn tablespaces(found: &[(Oid, PathBuf)], files: &[ReadFile]) -> Vec<Tablespace> {
    let one = |(oid, place): &(Oid, PathBuf)| {
        let folder = Path::new("pg_tblspc").join(oid.to_string());
        let bytes = files.iter().filter(|file| file.listed.starts_with(&folder)).map(|file| file.bytes).sum();
        Tablespace { oid: *oid, path: place.to_string_lossy().into_owned(), bytes }
    };
    found.iter().map(one).collect()
}

/// Keeps several threads below a number of bytes a second.
struct Pace {
    bytes_per_second: u64,
    /// When all that was taken by now is due.
    due: Mutex<Instant>,
}

/// What was not used for longer than this, by a store or a machine that stood still, is not made up for.
const PACE_MEMORY: Duration = Duration::from_secs(1);

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), due: Mutex::new(Instant::now()) }
    }

    /// Takes note of bytes, and sleeps until they were due, or the backup is given up.
    fn keep(&self, bytes: u64, stopped: &AtomicBool) {
        let due = self.due(bytes, Instant::now());
        while !stopped.load(Ordering::Relaxed) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sleep(left.min(TICK));
        }
    }

    /// Returns when bytes that are taken now are due.
    fn due(&self, bytes: u64, now: Instant) -> Instant {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let from = now.checked_sub(PACE_MEMORY).map_or(*due, |memory| memory.max(*due));
        *due = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_is_needed_along_the_path() {
        let timeline = |number| TimelineId::new(number).unwrap();
        let history = TimelineHistory::parse(timeline(3), "1\t0/5000000\tx\n2\t0/7000000\tx\n").unwrap();
        let found = ranges_along(&history, timeline(1), Lsn(0x400_0000), Lsn(0x900_0000)).unwrap();
        let found: Vec<_> =
            found.iter().map(|range| (range.timeline.get(), range.start.0, range.end.0)).collect();
        assert_eq!(
            found,
            [(1, 0x400_0000, 0x500_0000), (2, 0x500_0000, 0x700_0000), (3, 0x700_0000, 0x900_0000)]
        );
        assert_eq!(ranges_along(&history, timeline(4), Lsn(1), Lsn(2)), None);
    }

    #[test]
    fn headers_are_read_by_the_splitter() {
        use super::super::members::{Splitter, Step};
        let member = |path: &str, kind, bytes| Member { path: path.into(), kind, bytes };
        let file = header(&member("base/5/1", MemberKind::File, 3), 0o600, Utc::now(), None).unwrap();
        let mut stream = file.to_vec();
        stream.extend(b"abc");
        stream.extend(padding(3));
        let link = Some(Path::new("/srv/space"));
        let space = member("pg_tblspc/16400", MemberKind::Link, 0);
        stream.extend(header(&space, 0o777, Utc::now(), link).unwrap());
        let mut seen = Vec::new();
        Splitter::new()
            .push::<crate::pg::ParseError>(&stream, &mut |step| {
                if let Step::Header(_, member) = step {
                    seen.push((member.path, member.bytes));
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [("base/5/1".into(), 3), (space.path, 0)]);
        let long = "x".repeat(100);
        assert!(header(&member(&long, MemberKind::File, 0), 0, Utc::now(), None).is_err());
    }

    #[test]
    fn a_pace_is_kept() {
        let pace = Pace::new(1_000_000);
        let (started, stopped) = (Instant::now(), AtomicBool::new(false));
        pace.keep(50_000, &stopped);
        pace.keep(50_000, &stopped);
        assert!(started.elapsed() >= Duration::from_millis(90));
        stopped.store(true, Ordering::Relaxed);
        pace.keep(1 << 40, &stopped);
    }

    #[test]
    fn a_pace_makes_up_for_a_second_and_no_more() {
        let pace = Pace::new(1_000_000);
        let begun = *pace.due.lock().unwrap();
        let at = |millis| begun + Duration::from_millis(millis);
        assert_eq!(pace.due(500_000, at(0)), at(500));
        // Late by less than a second: made up for, so that the rate is reached.
        assert_eq!(pace.due(500_000, at(1_400)), at(1_000));
        // After a minute's stall it goes on as before, a second ahead.
        assert_eq!(pace.due(500_000, at(61_000)), at(60_500));
        assert_eq!(pace.due(1_000_000, at(61_000)), at(61_500));
    }
}
