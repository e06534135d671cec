//! Takes a base backup into the repository: `BASE_BACKUP` stream in, data objects, manifest and, last
//! of all, the small record without which the backup does not exist.
//!
//! The order makes it safe: `started.json` first (its WAL is protected from then on), a temporary
//! slot before the backup begins (WAL cannot be recycled under it), every file compared with the
//! server's own manifest, all of its WAL seen in the repository, then the record. Killed at any
//! point, it leaves objects that nobody takes for a backup. It restores nothing and deletes nothing.
//!
//! ```no_run
//! use walship::backup::{BackupOptions, take_backup};
//! use walship::replication::ConnectOptions;
//!
//! # async fn example(repository: walship::repository::LineageRepository) -> walship::Result<()> {
//! let server = ConnectOptions::from_env_and_uri("postgresql://replicator@db1/")?;
//! let record = take_backup(&[repository], &server, &BackupOptions::default(), &|event| println!("{event:?}")).await?;
//! println!("{} is complete at {}", record.id, record.stop_lsn);
//! # Ok(())
//! # }
//! ```

mod batch;
mod cut_off;
mod intake;
mod local;
mod members;
pub mod names;
mod needed_wal;
mod pack;
mod parent;
mod progress;
mod server_damage;
mod settings;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::catalog::{BackupRecord, PreparedTransaction, SavedNames};
use crate::error::{Error, Result};
use crate::pg::backup_manifest::BackupManifest;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::replication::base_backup::{AnnouncedTablespace, BackupStart};
use crate::replication::{
    BackupPart, BaseBackup, BaseBackupOptions, Checkpoint, ConnectOptions, Connection, ManifestChecksums,
    ServerError, SessionKind, SlotLifetime, SystemIdentity, create_slot, identify_system, segment_size, show,
    upload_manifest,
};
use crate::repository::{BackupStarted, LineageRepository, RecordedBy, index, new_backup_id};
use crate::wal::event::{EventKind, ServerLimits};
use crate::wal::layout::Layout;
use crate::wal::xact::parse_prepare;

use cut_off::CutOff;
use intake::{Base, Intake, Received};
use local::{Leftovers, LocalServer, ReadOptions};
use needed_wal::{needed_segments, wait_until_stored};
use pack::{Compressing, PackSettings, Packer};
use parent::Parent;
use progress::Meter;

pub use parent::Incremental;
pub use progress::{BackupEvent, Transfer};

/// How a backup is to be taken.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The label.
    pub label: String,
    /// The checkpoint at its start.
    pub checkpoint: Checkpoint,
    /// The most kilobytes a second that the server sends.
    pub max_rate_kb: Option<u32>,
    /// How long to wait for the last WAL to be in the repository.
    pub wal_timeout: Duration,
    /// A data object is closed at the end of the first file past this many bytes of tar.
    pub object_bytes: u64,
    /// The zstd level.
    pub level: i32,
    /// From where the files are read.
    pub source: BackupSource,
    /// Whether it builds on another backup; `None` for a full one.
    pub incremental: Option<Incremental>,
    /// Whether what a backup that did not complete has stored is taken over where it is still right; only where the files are
    /// read from the data directory.
    pub resume: bool,
}

/// From where a backup reads the cluster's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupSource {
    /// The server sends them over the replication protocol, one after the other: from any host.
    Stream,
    /// They are read from the data directory, side by side: beside the server, as its user.
    Local {
        /// The data directory; `None` for the one that the server names.
        data_directory: Option<PathBuf>,
        /// How many threads read.
        workers: usize,
    },
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            label: "walship".into(),
            checkpoint: Checkpoint::Fast,
            max_rate_kb: None,
            wal_timeout: Duration::from_secs(600),
            object_bytes: 256 << 20,
            level: 1,
            source: BackupSource::Stream,
            incremental: None,
            resume: true,
        }
    }
}

/// How long a server may be silent in the middle of a backup.
const PATIENCE: Duration = Duration::from_secs(600);

/// Returns who a server is: its identity and its segment size. For choosing the lineage.
///
/// # Errors
/// What connecting or asking fails with; [`Error::Mismatch`] for a version that is not supported.
pub async fn server_identity(server: &ConnectOptions) -> Result<(SystemIdentity, SegmentSize)> {
    let mut session = Connection::connect(server, SessionKind::Replication).await?;
    session.server_version()?;
    let identity = identify_system(&mut session).await?;
    let size = segment_size(&mut session).await?;
    session.close().await;
    Ok((identity, size))
}

/// Takes a base backup into every one of `repositories` and returns its record.
///
/// # Errors
/// [`Error::Mismatch`] when the server is not the one that the lineage belongs to;
/// [`Error::Corrupt`] when what arrives differs from the server's manifest;
/// [`Error::Unavailable`] when the server or a store fails, or when the backup's WAL does not arrive
/// in time. After an error the backup does not exist, but for one case: a store failed at the very last
/// write, the record's. Then the error names the repositories in which the backup is complete.
/// # Durability
/// After `Ok` the backup, its WAL and its record survive a crash of this machine.
/// # Cancel safety
/// Dropping the future ends the backup on the server too; no record is written.
pub async fn take_backup(
    repositories: &[LineageRepository],
    server: &ConnectOptions,
    options: &BackupOptions,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<BackupRecord> {
    let started = Utc::now();
    let mut session = lasting_session(server).await?;
    let about = examine(&mut session, repositories).await?;
    if about.archive_mode == "off" {
        progress(BackupEvent::Warning(
            "archive_mode is off on this server: unless its WAL is streamed to the repository, the backup will \
             wait in vain for it"
                .into(),
        ));
    }
    let random: u64 = rand::random();
    hold_wal_back(&mut session, random, progress).await?;
    let id = new_backup_id(started, random);
    if !about.data_checksums {
        progress(BackupEvent::Warning(
            "the cluster has no data checksums: whether its pages are sound cannot be told".into(),
        ));
    }
    let parent = match &options.incremental {
        None => None,
        Some(wanted) => {
            parent::find(repositories, &about, &options.source, wanted, progress).await?.map(Arc::new)
        }
    };
    let mut taking =
        Taking { repositories, server, options, about: &about, id: &id, started, parent, progress };
    let (mut received, start, stop_lsn, stop_timeline) = match &options.source {
        BackupSource::Stream => match taking.stream(&mut session).await {
            Err(NotTaken::NotIncremental(why)) => {
                if options.incremental.as_ref().is_some_and(|wanted| wanted.parent.is_some()) {
                    return Err(why
                        .with_safe("no backup was recorded; older backups are untouched")
                        .with_next(
                            "Leave --parent out: a full backup is taken then. Or add --source local.",
                        ));
                }
                progress(BackupEvent::Note(format!("a full backup is taken: {why}")));
                taking.parent = None;
                session = Connection::connect(server, SessionKind::Replication).await?;
                hold_wal_back(&mut session, rand::random(), progress).await?;
                taking.stream(&mut session).await?
            }
            taken => taken?,
        },
        BackupSource::Local { data_directory, workers } => {
            taking.local(data_directory.as_deref(), *workers).await?
        }
    };
    check(&received, &start, &about, stop_lsn)?;
    let settings = settings::outside_files(server, &about.identity, progress).await;
    let mut settings_files = Vec::new();
    if !settings.is_empty() {
        for repository in repositories {
            settings_files = repository.put_backup_settings(&id, &settings).await?;
        }
    }
    let names = save_names(repositories, server, &mut received, &id, stop_timeline, &about, progress).await?;
    let mut manifest_digest = String::new();
    let (manifest_bytes, manifest_stored) = compress_manifest(received.manifest_bytes).await?;
    for repository in repositories {
        manifest_digest = repository.put_backup_manifest(&id, manifest_bytes.clone()).await?;
    }
    if about.from_standby {
        switch_on_primary(server, &about.identity, progress).await;
    }
    let ranges = &received.manifest.wal_ranges;
    let ranges: Vec<_> = ranges.iter().map(|range| (range.timeline, range.start, range.end)).collect();
    let needed = needed_segments(&received.manifest.wal_ranges, about.segment_size)?;
    let histories = histories(start.timeline, stop_timeline);
    wait_until_stored(repositories, needed, histories, options.wal_timeout, &mut |missing| {
        progress(BackupEvent::WaitingForWal { first: missing.first, segments: missing.segments });
    })
    .await?;
    session.close().await;
    let record = BackupRecord {
        format: 1,
        id: id.clone(),
        label: options.label.clone(),
        timeline: start.timeline,
        start_lsn: start.lsn,
        stop_timeline,
        stop_lsn,
        started,
        finished: Utc::now(),
        server_version: about.server_version,
        from_standby: received.label.from_standby,
        data_bytes: received.data_bytes,
        stored_bytes: received.objects.iter().map(|object| object.stored_bytes).sum::<u64>()
            + manifest_stored,
        files: received.manifest.files.len() as u64,
        tablespaces: received.tablespaces,
        objects: received.objects,
        limits: about.limits,
        data_checksums: about.data_checksums,
        manifest_digest,
        settings_files,
        names,
        prepared: prepared(&received.two_phase, about.server_version),
        damaged_pages: (received.damaged.total > 0).then_some(received.damaged),
        parent: taking.parent.as_ref().map(|parent| parent.link.clone()),
    };
    // In this order: retention marks first, and looks then for what is about to be complete. A backup that was taken for given up,
    // and one whose WAL or foundations were removed under it, must not look complete.
    for repository in repositories {
        repository.put_backup_finishing(&id, record.finished).await?;
    }
    for repository in repositories {
        repository.check_wal_not_expired(&ranges).await?;
        repository.check_foundations(&record).await?;
    }
    put_records(repositories, &record).await?;
    for repository in repositories {
        // Only a machine that stood still for days between these two steps ever hears of it here.
        if let Err(error @ Error::Conflict(_)) = repository.check_foundations(&record).await {
            return Err(error.context(format!("backup {id} has a record, and was removed before it had one")));
        }
    }
    Ok(record)
}

/// What taking a backup needs all the time.
struct Taking<'a> {
    repositories: &'a [LineageRepository],
    server: &'a ConnectOptions,
    options: &'a BackupOptions,
    about: &'a About,
    id: &'a str,
    started: DateTime<Utc>,
    /// What it builds on.
    parent: Option<Arc<Parent>>,
    progress: &'a (dyn Fn(BackupEvent) + Send + Sync),
}

/// Why the server's stream did not become a backup.
enum NotTaken {
    /// The server does not send an incremental one, and says why; nothing was begun.
    NotIncremental(Error),
    Failed(Error),
}

impl From<Error> for NotTaken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NotTaken> for Error {
    fn from(not_taken: NotTaken) -> Self {
        match not_taken {
            NotTaken::NotIncremental(error) | NotTaken::Failed(error) => error,
        }
    }
}

/// What was stored, where it starts, where it ends and on which timeline.
type Taken = (Received, BackupStart, Lsn, TimelineId);

impl Taking<'_> {
    fn settings(&self) -> Arc<PackSettings> {
        let Self { repositories, id, options, .. } = self;
        PackSettings::new(repositories.to_vec(), (*id).to_owned(), options.object_bytes, options.level)
    }

    fn patience(&self) -> Duration {
        self.about.checkpoint_patience.max(PATIENCE)
    }

    async fn put_started(&self, start: &BackupStart) -> Result<()> {
        for repository in self.repositories {
            let document = BackupStarted {
                format: 1,
                id: self.id.to_owned(),
                label: self.options.label.clone(),
                timeline: start.timeline,
                start_lsn: start.lsn,
                host: RecordedBy::now().host,
                started: self.started,
                parent: self.parent.as_ref().map(|parent| parent.link.id.clone()),
            };
            repository.put_backup_started(&document).await?;
        }
        // In this order: retention says first what it removes, and looks for backups then.
        for repository in self.repositories {
            repository.check_wal_not_expired(&[(start.timeline, start.lsn, Lsn(u64::MAX))]).await?;
            if let Some(parent) = &self.parent {
                repository.check_not_expiring(&parent.link.id).await?;
            }
        }
        Ok(())
    }

    /// Has the server send everything.
    async fn stream(&self, session: &mut Connection) -> Result<Taken, NotTaken> {
        let Self { server, options, progress, .. } = self;
        progress(BackupEvent::Checkpoint);
        let mut command = BaseBackupOptions {
            label: options.label.clone(),
            checkpoint: options.checkpoint,
            max_rate_kb: options.max_rate_kb,
            // Links in the tar stream, not a file: a restore puts them where it wants, and the
            // manifest then still describes every file.
            tablespace_map: false,
            manifest_checksums: ManifestChecksums::Crc32c,
            verify_checksums: true,
            incremental: self.parent.is_some(),
        };
        let manifest = self.parent_manifest().await?;
        let host = session.host().clone();
        let (mut start, mut stream) = self.begin(session, &command, &manifest).await.map_err(|error| {
            match ServerError::of(&error) {
                Some(said) if command.incremental && said.severity == "ERROR" => {
                    NotTaken::NotIncremental(error)
                }
                _ => NotTaken::Failed(error),
            }
        })?;
        let mut another;
        if start.tablespaces.iter().any(has_long_location) {
            // The server would fail at that link, after having sent everything before it. It says where the
            // tablespaces are as soon as it begins: begin again, on a session of its own.
            drop(stream);
            another = lasting_session(server).await?;
            hold_wal_back(&mut another, rand::random(), *progress).await?;
            command.tablespace_map = true;
            (start, stream) = self.begin(&mut another, &command, &manifest).await?;
        }
        let base = match &self.parent {
            None => None,
            Some(parent) => {
                let cut_off = CutOff::read(server, &host, &parent.link, start.lsn).await;
                let cut_off = cut_off.map_err(|error| {
                    NotTaken::NotIncremental(error.context("asking the server's WAL summaries"))
                })?;
                progress(BackupEvent::Note(
                    "the server reads what its WAL summaries say has changed, and no other page: damage in those is \
                     found by a full backup, or with --source local"
                        .into(),
                ));
                Some(Base::new(parent.clone(), cut_off, manifest)?)
            }
        };
        self.put_started(&start).await?;
        let (received, stop_lsn, stop_timeline) =
            receive(stream, &start, self.settings(), base, *progress).await?;
        Ok((received, start, stop_lsn, stop_timeline))
    }

    /// Returns the manifest of what the backup builds on; an empty one for a full backup.
    async fn parent_manifest(&self) -> Result<Vec<u8>> {
        let Some(record) = self.parent.as_ref().map(|parent| &parent.record) else {
            return Ok(Vec::new());
        };
        let first = self.repositories.first().ok_or_else(|| Error::invalid("no repository is given"))?;
        let stored = first.get_backup_manifest(record).await?;
        crate::storage::blocking(move || {
            let mut manifest = Vec::new();
            zstd::stream::read::Decoder::new(&*stored)
                .and_then(|decoder| decoder.take(BackupManifest::MAX_BYTES as u64).read_to_end(&mut manifest))
                .map_err(|error| {
                    Error::corrupt(format!("the manifest of the backup before cannot be unpacked: {error}"))
                })?;
            Ok(manifest)
        })
        .await
    }

    /// Has the server begin, with the manifest of what the backup builds on.
    async fn begin<'a>(
        &self,
        session: &'a mut Connection,
        command: &BaseBackupOptions,
        manifest: &[u8],
    ) -> Result<(BackupStart, BaseBackup<'a>)> {
        if command.incremental {
            upload_manifest(session, manifest, self.patience()).await?;
        }
        BaseBackup::start(session, command, self.patience(), PATIENCE).await
    }

    /// Reads everything from the data directory.
    async fn local(&self, data_directory: Option<&Path>, workers: usize) -> Result<Taken> {
        let Self { server, options, about, progress, .. } = self;
        let identity = about.identity.system_identifier;
        let leftovers = match options.resume {
            true => Leftovers::find(self.repositories, self.parent.as_deref()).await?,
            false => None,
        };
        let mut local = LocalServer::find(server, data_directory, identity, self.patience()).await?;
        progress(BackupEvent::Checkpoint);
        let mut start = local.start(&options.label, options.checkpoint).await?;
        self.put_started(&start).await?;
        let read = ReadOptions {
            workers,
            bytes_per_second: options.max_rate_kb.map(|kilobytes| u64::from(kilobytes) * 1024),
        };
        let (received, stop_lsn, stop_timeline) = local::take(
            &mut local,
            &start,
            self.settings(),
            &read,
            self.parent.clone(),
            leftovers,
            *progress,
        )
        .await?;
        // What a standby said of its timeline at the start may have been a moment younger.
        start.timeline = received.label.timeline;
        Ok((received, start, stop_lsn, stop_timeline))
    }
}

/// Saves what databases and relations are called; what cannot be had is a warning. Damaged pages get the names of
/// their relations.
async fn save_names(
    repositories: &[LineageRepository],
    server: &ConnectOptions,
    received: &mut Received,
    id: &str,
    timeline: TimelineId,
    about: &About,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<Option<SavedNames>> {
    let warn = |why: String| {
        progress(BackupEvent::Warning(format!(
            "the names of relations are not saved beside the backup, and `pitr log` will show numbers: {why}"
        )));
        Ok(None)
    };
    let mut read = match names::read_names(server).await {
        Ok(read) if read.system_identifier == about.identity.system_identifier => read,
        Ok(_) => return warn("the server that answered is another cluster's".into()),
        Err(error) => return warn(error.to_string()),
    };
    for database in &read.names.databases {
        // Of the one that is made so nobody wants to know.
        if let Some(why) = database.unread.as_ref().filter(|_| database.name != "template0") {
            progress(BackupEvent::Warning(format!(
                "relations of database {:?} are not all saved by name beside the backup: {why}",
                database.name
            )));
        }
    }
    names::name_pages(server, &read, &mut received.damaged.pages).await;
    names::add_sizes(&mut read.names, &received.manifest);
    let names = read.names;
    let packed = tokio::task::spawn_blocking(move || LineageRepository::pack_backup_names(&names)).await;
    let Some(packed) =
        packed.map_err(|error| Error::unavailable(format!("packing was cut off: {error}")))??
    else {
        return warn("there are too many of them".into());
    };
    let mut digest = String::new();
    for repository in repositories {
        digest = repository.put_backup_names(id, packed.clone()).await?;
    }
    Ok(Some(SavedNames { lsn: read.lsn, timeline, time: read.time, digest }))
}

/// Returns the prepared transactions of the files in `pg_twophase`; `None` when one is not understood: a
/// partial list would be taken for the whole.
///
/// Source: `src/backend/access/transam/twophase.c`, EndPrepare: the record in WAL holds what the file does.
fn prepared(files: &Option<Vec<Vec<u8>>>, server_version: u32) -> Option<Vec<PreparedTransaction>> {
    let layout = Layout::for_major(server_version / 10_000)?;
    let one = |file: &Vec<u8>| match parse_prepare(file, layout) {
        Ok(EventKind::Prepare { time, prepared_xid, gid }) => {
            Some(PreparedTransaction { xid: prepared_xid, gid, time })
        }
        _ => None,
    };
    files.as_ref()?.iter().map(one).collect()
}

/// Returns whether the link to a tablespace does not fit into a tar header.
///
/// Source: `src/port/tar.c`, tarCreateHeader: 99 bytes and a NUL.
fn has_long_location(tablespace: &AnnouncedTablespace) -> bool {
    tablespace.outside.as_ref().is_some_and(|(_, path)| path.len() > 99)
}

/// Puts the record into every repository, which makes the backup exist there.
async fn put_records(repositories: &[LineageRepository], record: &BackupRecord) -> Result<()> {
    let (mut complete, mut failure) = (Vec::new(), None);
    for repository in repositories {
        match repository.put_backup_record(record).await {
            Ok(()) => {
                complete.push(repository.location());
                // Only a cache, and the backup exists.
                if let Err(error) = index::backups::extend_list(repository).await {
                    tracing::debug!(%error, "the list of backups was not extended");
                }
            }
            Err(error) => {
                let error =
                    error.context(format!("storing the backup's record in {}", repository.location()));
                failure = failure.or(Some(error));
            }
        }
    }
    match failure {
        None => Ok(()),
        Some(error) if complete.is_empty() => Err(error),
        Some(error) => {
            let complete = complete.join(" and ");
            Err(error.with_safe(format!("backup {} is complete in {complete}, and only there", record.id)))
        }
    }
}

/// What is asked of the server before anything begins.
struct About {
    identity: SystemIdentity,
    server_version: u32,
    segment_size: SegmentSize,
    limits: ServerLimits,
    block_size: u32,
    data_checksums: bool,
    from_standby: bool,
    archive_mode: String,
    checkpoint_patience: Duration,
}

async fn examine(session: &mut Connection, repositories: &[LineageRepository]) -> Result<About> {
    let server_version = session.server_version()?;
    let identity = identify_system(session).await?;
    let segment_size = segment_size(session).await?;
    if repositories.is_empty() {
        return Err(Error::invalid("no repository is given"));
    }
    for repository in repositories {
        let lineage = repository.lineage();
        if lineage.system_identifier != identity.system_identifier || lineage.segment_size != segment_size {
            return Err(Error::mismatch(format!(
                "the server has system identifier {} and segments of {segment_size}; {} is for {} with {}",
                identity.system_identifier,
                repository.location(),
                lineage.system_identifier,
                lineage.segment_size
            ))
            .with_next("Check that connection and cluster belong together; `walship init` shows both."));
        }
    }
    let limits = ServerLimits {
        max_connections: number(session, "max_connections").await?,
        max_worker_processes: number(session, "max_worker_processes").await?,
        max_wal_senders: number(session, "max_wal_senders").await?,
        max_prepared_transactions: number(session, "max_prepared_transactions").await?,
        max_locks_per_transaction: number(session, "max_locks_per_transaction").await?,
        wal_level: match show(session, "wal_level").await?.as_str() {
            "minimal" => 0,
            "replica" => 1,
            _ => 2,
        },
        wal_log_hints: show(session, "wal_log_hints").await? == "on",
        track_commit_timestamp: show(session, "track_commit_timestamp").await? == "on",
    };
    let checkpoint_timeout = show(session, "checkpoint_timeout").await?;
    Ok(About {
        identity,
        server_version,
        segment_size,
        limits,
        block_size: number(session, "block_size").await?.unsigned_abs(),
        data_checksums: show(session, "data_checksums").await? == "on",
        from_standby: session.is_standby(),
        archive_mode: show(session, "archive_mode").await?,
        checkpoint_patience: 2 * parse_seconds(&checkpoint_timeout).unwrap_or(PATIENCE),
    })
}

async fn number(session: &mut Connection, setting: &str) -> Result<i32> {
    let text = show(session, setting).await?;
    text.parse().map_err(|_| Error::mismatch(format!("{setting} = {text:?} is not understood")))
}

/// Makes a temporary slot, so that the server cannot recycle WAL before it is archived. A server
/// without a free slot still keeps what `archive_command` has not yet taken.
/// Returns a replication session that the server does not end for being idle: its slot would go with it.
async fn lasting_session(server: &ConnectOptions) -> Result<Connection> {
    let mut session = Connection::connect(server, SessionKind::Replication).await?;
    session.server_version()?;
    if show(&mut session, "idle_session_timeout").await? == "0" {
        return Ok(session);
    }
    // Such a session understands no SET: it must begin with the setting. Poolers may not let that pass, so it is said only
    // where it matters.
    session.close().await;
    let mut options = server.clone();
    let others = options.session_options.as_deref().unwrap_or_default();
    options.session_options = Some(format!("{others} -c idle_session_timeout=0").trim_start().to_owned());
    Connection::connect(&options, SessionKind::Replication).await
}

async fn hold_wal_back(
    session: &mut Connection,
    random: u64,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<()> {
    match create_slot(session, &format!("walship_backup_{random:016x}"), SlotLifetime::Temporary).await {
        Ok(()) => Ok(()),
        // The server said no; the session is still good. Anything else is a broken connection.
        Err(error) if ServerError::of(&error).is_some_and(|said| said.severity == "ERROR") => {
            progress(BackupEvent::Warning(format!("no slot holds WAL back during the backup: {error}")));
            Ok(())
        }
        Err(error) => Err(error),
    }
}

async fn receive(
    mut stream: BaseBackup<'_>,
    start: &BackupStart,
    settings: Arc<PackSettings>,
    base: Option<Base>,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Result<(Received, Lsn, TimelineId)> {
    let total_bytes = start.tablespaces.iter().map(|space| space.estimated_bytes).sum();
    progress(BackupEvent::Started {
        id: settings.id.clone(),
        start_lsn: start.lsn,
        timeline: start.timeline,
        total_bytes,
    });
    let mut meter = Meter::new(total_bytes, Instant::now());
    let mut intake = Intake::new(Packer::new(settings, Compressing::Aside), &start.tablespaces, base);
    let (lsn, timeline, damage) = loop {
        let taken = match stream.next().await {
            Ok(BackupPart::Archive(tablespace)) => intake.begin_archive(tablespace),
            Ok(BackupPart::Data(bytes)) => {
                if let Some(transfer) = meter.add(bytes.len() as u64, Instant::now()) {
                    progress(BackupEvent::Data(transfer));
                }
                intake.data(&bytes).await
            }
            Ok(BackupPart::Manifest) => intake.end_archive(),
            Ok(BackupPart::ManifestData(bytes)) => intake.manifest_data(&bytes),
            Ok(BackupPart::End { lsn, timeline, damage }) => break (lsn, timeline, damage),
            Err(error) => Err(ended(error)),
        };
        if let Err(error) = taken {
            intake.abandon().await;
            return Err(error);
        }
    };
    progress(BackupEvent::Data(meter.now()));
    let mut received = intake.finish().await?;
    if !damage.is_empty() {
        received.damaged = server_damage::damaged_pages(&damage);
    }
    Ok((received, lsn, timeline))
}

/// Returns the error of a backup under way whose server, or the session with it, is gone.
fn ended(error: Error) -> Error {
    let what = match (ServerError::of(&error), &error) {
        (Some(_), _) => "the server ended the backup",
        (None, Error::Unavailable(_)) => "the session with the server, which the backup needs, was lost",
        _ => return error,
    };
    taken_away(error.context(what))
}

fn taken_away(error: Error) -> Error {
    error.with_safe("no backup was recorded; older backups are untouched").with_next(
        "The server's log says why: a restart, a promotion, an administrator, a file that it cannot read. Take the \
         backup again when that is over; with --source local what was stored is taken over.",
    )
}

/// Compares the three places that say where the backup starts and ends, and whose it is.
fn check(received: &Received, start: &BackupStart, about: &About, stop_lsn: Lsn) -> Result<()> {
    let disagree =
        |what: String| Err(Error::corrupt(format!("the server's base backup contradicts itself: {what}")));
    if received.label.start_lsn != start.lsn || received.label.timeline != start.timeline {
        return disagree(format!(
            "backup_label starts at {} on {:?}, the stream at {} on {:?}",
            received.label.start_lsn, received.label.timeline, start.lsn, start.timeline
        ));
    }
    if received.manifest.system_identifier.is_some_and(|found| found != about.identity.system_identifier) {
        return disagree("its manifest names another system identifier".into());
    }
    let ranges = &received.manifest.wal_ranges;
    let first = ranges.iter().map(|range| range.start).min();
    let last = ranges.iter().map(|range| range.end).max();
    if first != Some(start.lsn) || last != Some(stop_lsn) {
        return disagree(format!("its manifest's WAL is not the WAL from {} to {stop_lsn}", start.lsn));
    }
    Ok(())
}

async fn compress_manifest(bytes: Vec<u8>) -> Result<(bytes::Bytes, u64)> {
    let compressed = tokio::task::spawn_blocking(move || zstd::bulk::compress(&bytes, 3)).await;
    let compressed = match compressed {
        Ok(compressed) => compressed.map_err(|error| Error::from_io("compressing the manifest", error))?,
        Err(error) => return Err(Error::unavailable(format!("compressing was cut off: {error}"))),
    };
    let stored = compressed.len() as u64;
    Ok((compressed.into(), stored))
}

/// The history files without which this backup's timelines cannot be followed.
fn histories(start: TimelineId, stop: TimelineId) -> Vec<TimelineId> {
    let mut needed = vec![start, stop];
    needed.dedup();
    needed.retain(|timeline| *timeline != TimelineId::FIRST);
    needed
}

/// A standby cannot make its primary finish a segment. Where the connection string leads to the
/// primary too, ask it; a failure only means that the wait lasts until the segment is full.
async fn switch_on_primary(
    server: &ConnectOptions,
    identity: &SystemIdentity,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) {
    let switch = async {
        let mut primary = Connection::connect(&server.for_primary(), SessionKind::Ordinary).await?;
        let rows = primary.query("SELECT system_identifier FROM pg_control_system()").await?;
        if rows.get(0, 0) != Some(identity.system_identifier.to_string().as_str()) {
            return Err(Error::mismatch("the primary that was found is another cluster's"));
        }
        primary.query("SELECT pg_switch_wal()").await?;
        primary.close().await;
        Ok(())
    };
    if let Err(error) = switch.await {
        progress(BackupEvent::Warning(format!(
            "the backup from a standby is complete when its primary ends the current segment; run SELECT \
             pg_switch_wal() there ({error})"
        )));
    }
}

/// Reads `5min`, `30s`, `1h`, `1d`, `100ms`.
fn parse_seconds(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    let unit = match &text[digits.len()..] {
        "ms" => return Some(Duration::from_millis(number)),
        "s" | "" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return None,
    };
    number.checked_mul(unit).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_with_units_are_understood() {
        assert_eq!(parse_seconds("5min"), Some(Duration::from_secs(300)));
        assert_eq!(parse_seconds("1d"), Some(Duration::from_secs(86400)));
        assert_eq!(parse_seconds("5 weeks"), None);
    }

    #[test]
    fn only_timelines_with_a_past_need_a_history() {
        let tli = |number| TimelineId::new(number).unwrap();
        assert_eq!(histories(tli(1), tli(1)), []);
        assert_eq!(histories(tli(2), tli(2)), [tli(2)]);
        assert_eq!(histories(tli(1), tli(2)), [tli(2)]);
    }
}
