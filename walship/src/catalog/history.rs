//! What was done with an archive, as the repository's history tells it: drills and extracts.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// A drill (`history/drills/<id>.json`): what is to be known of it without its report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id: time and 64 random bits, `20261121T010203Z-0123456789abcdef`.
    pub id: String,
    /// When it began, by the clock of the machine that did it.
    pub started: DateTime<Utc>,
    /// How long it took, the clean-up too, in milliseconds.
    pub millis: u64,
    /// That machine.
    pub host: String,
    /// The user of that machine.
    pub user: String,
    /// Why it was done, in the operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `proven`, `objective_missed`, `not_proven`, `failed`, `interrupted` or `no_plan`.
    pub outcome: String,
    /// What was not proven, missed or in the way, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// The target, as options of `pitr restore`.
    pub target: String,
    /// The backup; `None` without a plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The bytes of the backup's files.
    pub restored_bytes: u64,
    /// From its begin until the server was open, in milliseconds: the recovery time; `None` where it was not reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_millis: Option<u64>,
    /// How old the newest commit was that could be reached when it began, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_commit_age_millis: Option<u64>,
}

/// An extract (`history/extracts/<id>.json`): tables as they were at a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id, as a drill's.
    pub id: String,
    /// When it began, by the clock of the machine that did it.
    pub started: DateTime<Utc>,
    /// How long it took, the clean-up too, in milliseconds.
    pub millis: u64,
    /// That machine.
    pub host: String,
    /// The user of that machine.
    pub user: String,
    /// Why it was done, in the operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `delivered`, `failed` or `interrupted`.
    pub outcome: String,
    /// Why it failed, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The target, as options of `pitr restore`.
    pub target: String,
    /// The backup.
    pub backup: String,
    /// The bytes of the backup's files.
    pub restored_bytes: u64,
    /// The database, where it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// What was asked for: tables, schemas, or the whole database.
    pub what: String,
    /// Where it went: a file, or a server's database and the fresh schemas in it. No secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
}
