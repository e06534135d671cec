//! What restores took: for a forecast of the next one.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// A restore that was carried out (`history/restores/....json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id: time and 64 random bits, `20261121T010203Z-0123456789abcdef`.
    pub id: String,
    /// When it began, by the clock of the machine that did it.
    pub started: DateTime<Utc>,
    /// That machine.
    pub host: String,
    /// The user of that machine.
    pub user: String,
    /// Why it was done, in the operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The backup.
    pub backup: String,
    /// The target, as options of `pitr restore`.
    pub target: String,
    /// Getting the backup's files into place.
    pub restore: Phase,
    /// Bytes of it that were in place before, and stayed.
    pub kept_bytes: u64,
    /// What the server replayed then, as far as that was watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Phase>,
}

/// How much was done, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Bytes.
    pub bytes: u64,
    /// Milliseconds.
    pub millis: u64,
}
