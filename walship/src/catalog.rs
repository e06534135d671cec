//! What a repository holds of one lineage, as plain data: the planner's whole input.
//!
//! Filled by `repository::load_catalog`, read by the planner. Pure: no I/O, no clock.

mod gaps;
mod history;
mod holds;
mod names;
mod restores;
mod segments;
mod tail;
mod verifications;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, Oid, SegmentName, SegmentSize, TimelineHistory, TimelineId, Xid};
use crate::wal::event::ServerLimits;
use crate::wal::rollup::Rollup;

pub use gaps::{GapCause, GapKind, GapRecord};
pub use history::{BackupRun, ChangeRecord, DrillRecord, ExtractRecord, RecordHead};
pub use holds::{ExpireOutcome, ExpireRecord, ExpireRemoved, ExpiredBackup, ExpiredWal, HeldWal, Hold};
pub use names::{DatabaseNames, Names, RelationName, SavedNames};
pub use restores::{Phase, RestoreRecord};
pub use segments::StoredSegments;
pub use tail::{StoredTail, TailFlaw};
pub use verifications::{
    KnownDamage, KnownFlaw, Proven, ProvenObjects, ProvenRun, ReadPlace, Seen, SeenRun, StandingDamage,
    VerifiedBackup, VerifyOutcome, VerifyRecord,
};

/// An incremental backup that cannot be restored: another is gone that it builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OrphanedBackup {
    /// Its id.
    pub id: String,
    /// When it was complete.
    pub finished: DateTime<Utc>,
    /// The id of the one that is gone.
    pub missing: String,
    /// From where to where it needs WAL.
    #[serde(skip)]
    pub wal: BackupWal,
}

/// The WAL that makes a backup consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupWal {
    /// The timeline that the backup started on.
    pub timeline: TimelineId,
    /// Where it started.
    pub start_lsn: Lsn,
    /// The timeline that it ended on.
    pub stop_timeline: TimelineId,
    /// Where it is consistent.
    pub stop_lsn: Lsn,
}

/// One lineage of one cluster: everything under one system identifier and segment size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    /// The operator's name for the cluster.
    pub cluster: String,
    /// The lineage.
    pub lineage: Lineage,
    /// The history files that are stored. Timeline 1 has none and is not listed.
    pub histories: BTreeMap<TimelineId, TimelineHistory>,
    /// The whole segments that are stored.
    pub segments: StoredSegments,
    /// Those among them that are stored in parts only, all of their bytes, with the stored size; found together
    /// with the tails.
    pub in_parts: BTreeMap<SegmentName, u64>,
    /// What is stored of the segment that each timeline ends in, where it was never stored whole; `None` until that
    /// was looked for (`repository::load_tails`).
    pub tails: Option<BTreeMap<TimelineId, StoredTail>>,
    /// What is stored in parts of segments inside of which the ledger says that WAL is lost: up to there. Found together
    /// with the tails.
    pub stranded: BTreeMap<SegmentName, StoredTail>,
    /// The last segment of which the index told, of timelines that have lost it since: WAL at their end is gone.
    pub lost_ends: BTreeMap<TimelineId, SegmentName>,
    /// What was read of the index to know that, those that cover most first. A cache: it may be empty.
    pub rollups: Vec<Rollup>,
    /// `.partial` files that are stored.
    pub partials: Vec<SegmentName>,
    /// Files kept apart as incomplete: present, never served as the whole.
    pub incomplete: Vec<SegmentName>,
    /// The open gaps of the ledger, by timeline and start. A segment that is stored with another content than
    /// the one that such a gap misses is not among `segments`.
    pub gaps: Vec<GapRecord>,
    /// Complete base backups, oldest start first; of an incremental one, all that it builds on are among them.
    pub backups: Vec<BackupRecord>,
    /// Incremental backups without one that they build on. Never restored from.
    pub orphaned_backups: Vec<OrphanedBackup>,
    /// Backups that were started and not finished: id and start time. Never restored from.
    pub unfinished_backups: Vec<(String, DateTime<Utc>)>,
}

/// One system identifier and segment size under a cluster's name (`lineages/0001.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Its number, from 1.
    pub number: u32,
    /// The cluster's system identifier.
    #[serde(with = "crate::wal::summary::decimal")]
    pub system_identifier: u64,
    /// The segment size in bytes.
    pub segment_size: SegmentSize,
    /// PostgreSQL's major version when the lineage was registered.
    pub postgres_major: u32,
    /// When it was registered.
    pub created: DateTime<Utc>,
}

/// A complete base backup (`backups/catalog/....json`): written last, small, enough to plan with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// The backup's id: time and 64 random bits, `20261121T010203Z-0123456789abcdef`.
    pub id: String,
    /// The label given to the server.
    pub label: String,
    /// The timeline it started on.
    pub timeline: TimelineId,
    /// Where replay starts: the redo location of its checkpoint.
    pub start_lsn: Lsn,
    /// The timeline it ended on.
    pub stop_timeline: TimelineId,
    /// Where the backup becomes consistent (exclusive end).
    pub stop_lsn: Lsn,
    /// When it was started, by the clock of the machine that took it.
    pub started: DateTime<Utc>,
    /// When it was complete.
    pub finished: DateTime<Utc>,
    /// The server's full version, `server_version_num`.
    pub server_version: u32,
    /// Whether it was taken from a standby.
    pub from_standby: bool,
    /// Bytes of all files.
    pub data_bytes: u64,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// How many files it holds.
    pub files: u64,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// The data objects in restore order; left out (there is at least one) in a catalog that was read from
    /// the index.
    pub objects: Vec<BackupObject>,
    /// Settings of the server at the start of the backup that a recovering server must not undercut.
    pub limits: ServerLimits,
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
    /// The BLAKE3 digest, in hex, of the stored manifest object.
    pub manifest_digest: String,
    /// Settings files that lay outside the data directory, saved beside the backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings_files: Vec<SettingsFile>,
    /// The names of databases and relations, saved beside the backup; `None` where they could not be read,
    /// and in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<SavedNames>,
    /// Transactions whose two-phase state the backup holds: prepared before its checkpoint or while it was
    /// taken, and perhaps ended since. `None` where that was not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Vec<PreparedTransaction>>,
    /// Data pages whose checksum was wrong when the backup read them. They are in it as they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged_pages: Option<DamagedPages>,
    /// The backup that an incremental one builds on; `None` for a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentBackup>,
}

/// The backup without which an incremental one cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentBackup {
    /// Its id.
    pub id: String,
    /// The timeline that it started on.
    pub timeline: TimelineId,
    /// Where it started.
    pub start_lsn: Lsn,
    /// How many backups the incremental one builds on in all: 1 where this one is full.
    pub depth: u32,
}

/// Data pages that are not what PostgreSQL wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPages {
    /// How many there are.
    pub total: u64,
    /// They, up to [`DamagedPages::PAGES_MAX`].
    pub pages: Vec<DamagedPage>,
}

/// A data page whose checksum is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPage {
    /// The file that it lies in, below the data directory.
    pub path: PathBuf,
    /// Its number in the whole relation, from 0: PostgreSQL's block number.
    pub block: u32,
    /// The checksum that it says.
    pub stored: u16,
    /// The checksum that it should say.
    pub computed: u16,
    /// The database, where the page is one's and its name is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// The relation as `database.schema.name`, or `schema.name` where all databases share it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relation: Option<String>,
}

impl DamagedPages {
    /// So many pages are named one by one.
    pub const PAGES_MAX: usize = 1000;

    /// Adds others to these.
    pub fn add(&mut self, other: Self) {
        self.total += other.total;
        let room = Self::PAGES_MAX - self.pages.len().min(Self::PAGES_MAX);
        self.pages.extend(other.pages.into_iter().take(room));
    }
}

impl From<Vec<DamagedPage>> for DamagedPages {
    fn from(mut pages: Vec<DamagedPage>) -> Self {
        let total = pages.len() as u64;
        pages.truncate(Self::PAGES_MAX);
        Self { total, pages }
    }
}

/// A settings file that is not among a backup's own: `postgresql.conf`, `pg_hba.conf` in Debian's layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsFile {
    /// Its absolute path on the server that was backed up.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// The BLAKE3 digest of its content, in hex.
    pub digest: String,
}

/// A prepared transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedTransaction {
    /// Its transaction id.
    pub xid: Xid,
    /// The name given to PREPARE TRANSACTION.
    pub gid: String,
    /// When it was prepared.
    pub time: DateTime<Utc>,
}

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its oid: the name of its link in `pg_tblspc`.
    pub oid: Oid,
    /// Its path on the server that was backed up.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// One tar object of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupObject {
    /// Its name below the backup's folder: `data/000001.tar`.
    pub name: String,
    /// The tablespace it belongs to; `None` for the data directory itself.
    pub tablespace: Option<Oid>,
    /// Its length as stored.
    pub stored_bytes: u64,
    /// The length of the tar stream in it.
    pub tar_bytes: u64,
    /// The BLAKE3 digest of the stored bytes, in hex.
    pub digest: String,
    /// Its index; `None` in backups taken before there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<ObjectIndex>,
    /// The id of the backup below whose folder it lies, where that is another one: one that did not complete, and that this
    /// one went on from. Of a file that is in several objects of a backup only the last counts, and of such an object only
    /// what the manifest lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
}

impl BackupRecord {
    /// Returns the WAL that makes it consistent.
    pub fn wal(&self) -> BackupWal {
        let Self { timeline, start_lsn, stop_timeline, stop_lsn, .. } = *self;
        BackupWal { timeline, start_lsn, stop_timeline, stop_lsn }
    }

    /// Returns whether some of its objects are those of a backup that did not complete.
    pub fn went_on(&self) -> bool {
        self.objects.iter().any(|object| object.backup.is_some())
    }
}

impl BackupObject {
    /// Returns the path below the data directory of what stands in its tar stream as `path`: as manifests name it.
    pub fn listed(&self, path: &Path) -> PathBuf {
        listed(self.tablespace, path)
    }
}

/// Returns the path below the data directory of what lies in a tablespace, or in the data directory itself.
pub fn listed(tablespace: Option<Oid>, path: &Path) -> PathBuf {
    match tablespace {
        Some(oid) => Path::new("pg_tblspc").join(oid.to_string()).join(path),
        None => path.to_owned(),
    }
}

/// The end of a data object: which files it holds, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectIndex {
    /// The length of that end.
    pub bytes: u64,
    /// The BLAKE3 digest of it, in hex.
    pub digest: String,
}

/// An unbroken run of whole segments on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRun {
    /// The first segment.
    pub first: SegmentName,
    /// The last segment (inclusive).
    pub last: SegmentName,
    /// Their stored size in bytes.
    pub stored_bytes: u64,
}

/// Returns those of `backups` that one builds on, the one right below it first; none for a full one.
///
/// # Errors
/// The id of the first that is not there, or is another than the one that was built on.
pub fn parents_of<'a>(
    backups: &'a [BackupRecord],
    backup: &'a BackupRecord,
) -> Result<Vec<&'a BackupRecord>, &'a str> {
    let mut parents = Vec::new();
    let mut above = backup;
    while let Some(parent) = &above.parent {
        let is_it = |known: &&BackupRecord| {
            known.id == parent.id
                && (known.timeline, known.start_lsn) == (parent.timeline, parent.start_lsn)
                && known.parent.as_ref().map_or(0, |next| next.depth).checked_add(1) == Some(parent.depth)
        };
        above = backups.iter().find(is_it).ok_or(&*parent.id)?;
        parents.push(above);
    }
    Ok(parents)
}

impl Catalog {
    /// Returns the backups that one builds on, the one right below it first; none for a full one.
    ///
    /// # Errors
    /// The id of the first that is not there, or is another than the one that was built on.
    pub fn parents_of<'a>(&'a self, backup: &'a BackupRecord) -> Result<Vec<&'a BackupRecord>, &'a str> {
        parents_of(&self.backups, backup)
    }

    /// Sets the incremental backups aside that lack one of those that they build on.
    pub fn set_orphans_aside(&mut self) {
        let orphan = |backup: &BackupRecord| {
            let missing = self.parents_of(backup).err()?.to_owned();
            Some(OrphanedBackup {
                id: backup.id.clone(),
                finished: backup.finished,
                missing,
                wal: backup.wal(),
            })
        };
        self.orphaned_backups = self.backups.iter().filter_map(orphan).collect();
        let Self { backups, orphaned_backups, .. } = self;
        backups.retain(|backup| !orphaned_backups.iter().any(|orphan| orphan.id == backup.id));
    }

    /// Returns every timeline of which anything is stored, in ascending order.
    pub fn timelines(&self) -> Vec<TimelineId> {
        let mut timelines = self.segments.timelines();
        timelines.extend(self.histories.keys());
        timelines.extend(self.tails.iter().flatten().map(|(timeline, _)| *timeline));
        timelines.into_iter().collect()
    }

    /// Returns the position after the last stored segment of a timeline.
    pub fn stored_until(&self, timeline: TimelineId) -> Option<Lsn> {
        self.segments.last_of_timeline(timeline).map(|last| last.end(self.lineage.segment_size))
    }

    /// Returns the history of `timeline`: its stored file, or for timeline 1 the empty one; `None`
    /// when the file is not stored.
    pub fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        match self.histories.get(&timeline) {
            Some(history) => Some(history.clone()),
            None => (timeline == TimelineId::FIRST).then(|| TimelineHistory::root(timeline)),
        }
    }
}
