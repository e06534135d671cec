//! What became of restores, and what they took: for a forecast of the next one.

use serde::{Deserialize, Serialize};

use super::RecordHead;

/// A restore that was carried out, or was to be (`history/restores/....json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
    /// `restored`; `refused`, before a file was written, or `failed`, after that; `interrupted`.
    #[serde(default = "restored")]
    pub outcome: String,
    /// Why it failed, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The backup; `None` without a plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The target, as options of `pitr restore`.
    pub target: String,
    /// Getting the backup's files into place; no bytes where that did not come to its end.
    pub restore: Phase,
    /// Bytes of it that were in place before, and stayed.
    pub kept_bytes: u64,
    /// What the server replayed then, as far as that was watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Phase>,
}

impl RestoreRecord {
    /// Returns whether it did what it was to do.
    pub fn succeeded(&self) -> bool {
        self.outcome == RESTORED
    }
}

const RESTORED: &str = "restored";

/// Those of before there were others.
fn restored() -> String {
    RESTORED.to_owned()
}

/// How much was done, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Bytes.
    pub bytes: u64,
    /// Milliseconds.
    pub millis: u64,
}
