//! What recovery planning needs to know of single WAL records.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, Oid, TimelineId, Xid};

/// One WAL record that matters to recovery: where it is, who wrote it, what it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalEvent {
    /// Where the record starts. This is what `recovery_target_lsn` compares.
    pub lsn: Lsn,
    /// The position after the record (not rounded up to alignment).
    pub end_lsn: Lsn,
    /// The transaction id in the record header; 0 when the record belongs to none.
    pub xid: Xid,
    /// What the record says.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What a WAL record says, as far as recovery planning cares.
///
/// Times are the server's wall clock when it wrote the record, in microseconds; never the
/// replication origin's. They need not grow along the WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A transaction, or (with `prepared_xid`) a prepared one, was committed.
    Commit {
        /// When.
        time: DateTime<Utc>,
        /// The two-phase transaction that COMMIT PREPARED committed; `None` for a plain commit.
        prepared_xid: Option<Xid>,
        /// Its committed subtransactions.
        subxids: Vec<Xid>,
        /// Relations whose storage the commit removes.
        dropped_relations: Vec<RelFileLocator>,
        /// What it dropped by oid; `None` where the record cannot say (PostgreSQL 14) or was summarised by a
        /// release that did not read it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dropped_objects: Option<DroppedObjects>,
    },
    /// A transaction, or (with `prepared_xid`) a prepared one, was rolled back. A rolled-back
    /// subtransaction (`ROLLBACK TO SAVEPOINT`) writes the same record with the subtransaction's xid.
    Abort {
        /// When.
        time: DateTime<Utc>,
        /// The two-phase transaction that ROLLBACK PREPARED ended; `None` for a plain abort.
        prepared_xid: Option<Xid>,
        /// Its subtransactions.
        subxids: Vec<Xid>,
    },
    /// A transaction was prepared; recovery does not stop at it, it stays open until its end record.
    Prepare {
        /// When.
        time: DateTime<Utc>,
        /// The prepared transaction.
        prepared_xid: Xid,
        /// The name given to PREPARE TRANSACTION.
        gid: String,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// When.
        time: DateTime<Utc>,
        /// Its name; names need not be unique.
        name: String,
    },
    /// A checkpoint was completed.
    Checkpoint {
        /// Where replay would start from it.
        redo: Lsn,
        /// When it was made.
        time: DateTime<Utc>,
        /// The timeline it was made on.
        timeline: TimelineId,
        /// Whether the server shut down with it.
        shutdown: bool,
        /// The next transaction id, 64 bits with epoch.
        next_full_xid: u64,
    },
    /// WAL begins here and continues nothing: initdb, or pg_resetwal, which writes a checkpoint without a
    /// record before it. Recovery that comes from before reads no further.
    ///
    /// Source: `src/bin/pg_resetwal/pg_resetwal.c`, WriteEmptyXLOG; `src/backend/access/transam/xlog.c`,
    /// BootStrapXLOG; `xlogreader.c`, ValidXLogRecordHeader.
    WalBegins {
        /// When.
        time: DateTime<Utc>,
    },
    /// Recovery ended and a new timeline began.
    EndOfRecovery {
        /// When.
        time: DateTime<Utc>,
        /// The new timeline.
        timeline: TimelineId,
        /// The timeline before.
        previous_timeline: TimelineId,
    },
    /// The rest of the segment holds no WAL.
    Switch,
    /// A crash left an unfinished record here that recovery overwrote; whatever began at `overwritten`
    /// never happened.
    OverwriteContrecord {
        /// Where the unfinished record began.
        overwritten: Lsn,
        /// When it was overwritten.
        time: DateTime<Utc>,
    },
    /// An online base backup ended.
    BackupEnd {
        /// Where that backup started.
        start_lsn: Lsn,
    },
    /// Settings that a standby depends on changed.
    ParameterChange {
        /// The new values.
        settings: ServerLimits,
    },
    /// A tablespace was created; replay makes its folder at this path.
    TablespaceCreate {
        /// Its oid.
        oid: Oid,
        /// Its path on the original server.
        path: String,
    },
    /// A tablespace was dropped; its files go at once, whatever becomes of the transaction.
    TablespaceDrop {
        /// Its oid.
        oid: Oid,
    },
    /// A database's files were removed; at once, whatever becomes of the transaction.
    DatabaseDrop {
        /// Its oid.
        oid: Oid,
        /// The tablespaces it lost its files in.
        tablespaces: Vec<Oid>,
    },
    /// DROP DATABASE marked a database invalid; at once. Its files are removed some time later.
    DatabaseInvalid {
        /// Its oid.
        oid: Oid,
        /// Its name.
        name: String,
    },
    /// A relation's storage was cut to `blocks` pages (vacuum does this too); at once.
    StorageTruncate {
        /// The relation.
        relation: RelFileLocator,
        /// What is left of it, in pages.
        blocks: u32,
    },
    /// SQL TRUNCATE, logged for logical decoding (only with `wal_level = logical`).
    Truncate {
        /// The database.
        database: Oid,
        /// The tables' pg_class oids.
        relations: Vec<Oid>,
    },
}

impl EventKind {
    /// Returns the time that `recovery_target_time` compares at this record: set for commits and
    /// aborts of every form, `None` for all else.
    ///
    /// Source: `src/backend/access/transam/xlogrecovery.c`, getRecordTimestamp as used by
    /// recoveryStopsBefore.
    pub fn stop_time(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Commit { time, .. } | Self::Abort { time, .. } => Some(*time),
            _ => None,
        }
    }

    /// Returns the transaction that this record ends: what `recovery_target_xid` compares.
    pub fn ended_xid(&self, header_xid: Xid) -> Option<Xid> {
        match self {
            Self::Commit { prepared_xid, .. } | Self::Abort { prepared_xid, .. } => {
                Some(prepared_xid.unwrap_or(header_xid))
            }
            _ => None,
        }
    }
}

/// What a commit dropped, as its list of dropped statistics tells: every relation and database has some.
///
/// Unlike [`EventKind::Commit::dropped_relations`], TRUNCATE and rewrites of a relation are not among them;
/// the transient relation of a rewrite is.
///
/// Source: `src/include/access/xact.h`, xl_xact_stats_items; `src/backend/catalog/heap.c`,
/// heap_drop_with_catalog.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedObjects {
    /// Relations: their `pg_class` oids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relations: Vec<Oid>,
    /// Databases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<Oid>,
}

/// Where a relation's storage lies: tablespace, database, file number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelFileLocator {
    /// The tablespace's oid.
    pub tablespace: Oid,
    /// The database's oid; 0 for shared relations.
    pub database: Oid,
    /// The relation file number.
    pub relation: Oid,
}

/// The settings a standby must not undercut, and `wal_level`.
///
/// Source: `src/include/access/xlog_internal.h`, xl_parameter_change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerLimits {
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}
