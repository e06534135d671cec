//! What keeps a backup whatever the policy says: holds, with a reason and an end.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, TimelineId};

/// A hold on a backup (`holds/....json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id: time and 64 random bits, `20261121T010203Z-0123456789abcdef`.
    pub id: String,
    /// The backup that is held.
    pub backup: String,
    /// What it builds on, and what these have taken over from: it may lie in a repository that lacks the backup itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub with: Vec<String>,
    /// Why, in somebody's own words.
    pub reason: String,
    /// When it ends by itself; `None`: when it is released.
    pub until: Option<DateTime<Utc>>,
    /// WAL that is held beside what makes the backup consistent; a restore's hold has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal: Option<HeldWal>,
    /// When it was made, by that machine's clock.
    pub created: DateTime<Utc>,
    /// The machine that it was made on.
    pub host: String,
    /// The user of that machine.
    pub user: String,
}

/// How far WAL behind a held backup is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldWal {
    /// Along the way to this timeline.
    pub timeline: TimelineId,
    /// From this position on; `None`, in holds of older versions: from the backup's start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_lsn: Option<Lsn>,
    /// Up to this position; `None`: all that is stored.
    pub through_lsn: Option<Lsn>,
}

impl Hold {
    /// Returns whether it holds at `now`.
    pub fn holds_at(&self, now: DateTime<Utc>) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// A removal by retention as it begins (`history/expires/<id>.json`): written before anything is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpireRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id: time and 64 random bits.
    pub id: String,
    /// When it began, by the clock of the machine that did it.
    pub started: DateTime<Utc>,
    /// That machine.
    pub host: String,
    /// The user of that machine.
    pub user: String,
    /// Why it was run, in the operator's words, where any were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The policy in words.
    pub policy: String,
    /// From when on every moment stays in reach, where the policy has a window.
    pub window_from: Option<DateTime<Utc>>,
    /// The backups to remove, up to [`ExpireRecord::BACKUPS_MAX`].
    pub backups: Vec<ExpiredBackup>,
    /// How many there are.
    pub backups_total: u64,
    /// The WAL to remove.
    pub wal: Vec<ExpiredWal>,
    /// Whether it says which backups it has removed ([`ExpireRemoved`]). One of an older version does not: what it was about
    /// to remove counts as removed.
    #[serde(default)]
    pub tells_removed: bool,
}

impl ExpireRecord {
    /// So many backups are named one by one.
    pub const BACKUPS_MAX: usize = 2000;
}

/// The backups that a removal has removed (`history/expires/<id>.backups.json`): written when their records are gone, before
/// their marks are. Of one that came to remove none there is no such document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpireRemoved {
    /// The format of this document; 1.
    pub format: u32,
    /// The removal's id.
    pub id: String,
    /// The ids of the backups, up to [`ExpireRemoved::BACKUPS_MAX`].
    pub removed: Vec<String>,
}

impl ExpireRemoved {
    /// So many backups are named.
    pub const BACKUPS_MAX: usize = 10_000;
}

/// A backup that retention removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiredBackup {
    /// Its id.
    pub id: String,
    /// Why.
    pub reason: String,
}

/// WAL that retention removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiredWal {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The position of its first byte.
    pub start_lsn: Lsn,
    /// The position after its last byte.
    pub end_lsn: Lsn,
    /// Why.
    pub reason: String,
}

/// How a removal ended (`history/expires/<id>.done.json`); one that was killed has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpireOutcome {
    /// The format of this document; 1.
    pub format: u32,
    /// The removal's id.
    pub id: String,
    /// When it ended.
    pub finished: DateTime<Utc>,
    /// What went wrong; `None` when all was removed.
    pub failure: Option<String>,
    /// Whether it was refused: nothing was begun, and nothing removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refused: bool,
    /// How many backups were removed.
    pub backups: u64,
    /// How many objects, of WAL and of backups.
    pub objects: u64,
    /// Their stored size in bytes.
    pub bytes: u64,
    /// How many of them the store keeps as older versions.
    pub kept_as_versions: u64,
}
