//! What was done with an archive, as the repository's history tells it: backups that were taken or tried, drills,
//! extracts, changes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// What every record begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordHead {
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
}

/// A backup that was taken, or was to be taken (`history/backups/<id>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRun {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
    /// How long it took, in milliseconds.
    pub millis: u64,
    /// `complete`, `damaged_pages` (complete, with pages in it that do not match their checksums), `failed` or
    /// `interrupted`.
    pub outcome: String,
    /// Why it failed, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The backup, where it came to have an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The bytes of its files; 0 where it did not complete.
    pub data_bytes: u64,
    /// Their length as stored.
    pub stored_bytes: u64,
}

/// A change of what is kept, promised or accepted (`history/changes/<id>.json`, of the configuration
/// `history/configurations/<id>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeRecord {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
    /// `lineage_registered`, `settings_changed`, `wal_given_up`, `overtaken_accepted`, `held`, `released`;
    /// `configuration_noted` or `configuration_changed`.
    pub change: String,
    /// What exactly, for people.
    pub what: String,
    /// Of a configuration: what is kept, promised and used as a repository by it. No secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
}

/// A drill (`history/drills/<id>.json`): what is to be known of it without its report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
    /// How long it took, the clean-up too, in milliseconds.
    pub millis: u64,
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
    /// Whether the repository that holds this document was read, and nothing had to be taken from another; `None` in older
    /// records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_here: Option<bool>,
}

/// An extract (`history/extracts/<id>.json`): tables as they were at a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractRecord {
    /// Who did it, where, when and why.
    #[serde(flatten)]
    pub head: RecordHead,
    /// How long it took, the clean-up too, in milliseconds.
    pub millis: u64,
    /// `delivered`; `failed`, where the scratch server was to be set up, or `refused`, before that; `interrupted`.
    pub outcome: String,
    /// Why it failed, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The target, as options of `pitr restore`.
    pub target: String,
    /// The backup; `None` without a plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
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
