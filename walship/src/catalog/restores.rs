//! What restores took: for a forecast of the next one.

use serde::{Deserialize, Serialize};

use super::RecordHead;

/// A restore that was carried out (`history/restores/....json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
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
