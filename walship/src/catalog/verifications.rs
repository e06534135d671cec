//! What a verification came to, and what is proven of a repository since when.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::history::RecordHead;
use crate::pg::{Lsn, SegmentName, TimelineId};
use crate::wal::rollup::Run;

/// What a verification of one repository came to (`history/verifications/<id>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRecord {
    /// Who did it, where, when and why; the id is the same in all repositories that it read.
    #[serde(flatten)]
    pub head: RecordHead,
    /// How long it took in milliseconds.
    pub millis: u64,
    /// The lineage's folder that was read, with the repository's address.
    pub repository: String,
    /// What was to be proven, in words: `the whole lineage`, `backup ID`, `--latest`.
    pub scope: String,
    /// Whether that was the whole lineage.
    pub whole: bool,
    /// What it came to.
    pub outcome: VerifyOutcome,
    /// What is wrong, for people; at most [`VerifyRecord::PROBLEMS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// How many problems there are in all.
    pub problems_total: u64,
    /// Objects that were read whole in this run.
    pub objects: u64,
    /// Bytes that were read in this run.
    pub bytes: u64,
    /// Objects of the scope that were not read in this run: the budget ended, or it was interrupted.
    pub objects_left: u64,
    /// When the object of the scope was last proven that was not read for longest; `None` where one never was.
    pub proven_since: Option<DateTime<Utc>>,
    /// The backups in the scope.
    pub backups: Vec<VerifiedBackup>,
    /// Stretches of WAL positions that can no longer be reached from any repository, all timelines together.
    pub unreachable: u64,
    /// What was wrong with the repository at its end; `None` where that could not be noted, and by an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<StandingDamage>,
}

/// What was wrong with a repository at the end of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingDamage {
    /// How many places are known to be damaged, of all that is stored: also those that it was not to read.
    pub places: u64,
    /// When the first of them was found.
    pub since: Option<DateTime<Utc>>,
    /// How much else is wrong with what it was to read: something is missing, or does not go on where what is before it ends.
    pub others: u64,
}

impl VerifyRecord {
    /// So many problems are told one by one.
    pub const PROBLEMS_MAX: usize = 21;

    /// Returns when it ended.
    pub fn ended(&self) -> DateTime<Utc> {
        let took = i64::try_from(self.millis).ok().and_then(TimeDelta::try_milliseconds).unwrap_or_default();
        self.head.started.checked_add_signed(took).unwrap_or(self.head.started)
    }
}

/// How a verification ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyOutcome {
    /// Everything in the scope was read and is sound.
    Sound,
    /// What was read is sound; the budget did not reach for all.
    Partly,
    /// It was interrupted; what was read is sound.
    Interrupted,
    /// Something could not be read for a reason that is no damage: an outage, missing rights.
    Unread,
    /// Something is damaged or missing.
    Damaged,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl VerifyOutcome {
    /// Returns its word, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Sound => "sound",
            Self::Partly => "partly",
            Self::Interrupted => "interrupted",
            Self::Unread => "unread",
            Self::Damaged => "damaged",
            Self::Unknown => "unknown",
        }
    }
}

/// A backup, as a verification found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedBackup {
    /// Its id.
    pub id: String,
    /// `sound`: all of its objects were read in this run or one before; `partly`: not all of them yet; `damaged`;
    /// `unread`.
    pub outcome: VerifyOutcome,
    /// When its object was last proven that was not read for longest; `None` where one never was.
    pub proven_since: Option<DateTime<Utc>>,
}

/// What is proven of a repository, and what was seen of it (`verifications/<id>/<number>.json`). Each document holds all that
/// was known when it was written, so the last one of a run stands for the run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proven {
    /// The format of this document; 1.
    pub format: u32,
    /// The verification that wrote it.
    pub id: String,
    /// When that began, by the clock of the machine that did it.
    #[serde(default)]
    pub started: DateTime<Utc>,
    /// The lineage's folder that was read, with the repository's address. What was read elsewhere is not proven of a copy
    /// that brings this document along.
    #[serde(default)]
    pub repository: String,
    /// What tells that repository's marker from a copy of it at the same address; `None` where the store cannot tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marker: Option<String>,
    /// From when on objects count as read by that verification: its begin, or that of one that was killed and that it goes
    /// on from.
    pub round: Option<DateTime<Utc>>,
    /// Whole segments, with all that is stored of them under `wal/`: runs, and when each was last proven.
    pub wal: Vec<ProvenRun>,
    /// Parts of segments that are stored whole too.
    pub parts: Vec<ProvenRun>,
    /// Data objects of backups, by the backup's id.
    pub backups: BTreeMap<String, Vec<ProvenObjects>>,
    /// When what lies beside a backup's data objects was last proven, by the backup's id.
    #[serde(default)]
    pub documents: BTreeMap<String, DateTime<Utc>>,
    /// What was damaged when it was last read; at most [`Proven::DAMAGE_MAX`], the rest is as if it was never read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<KnownDamage>,
    /// What was there.
    pub seen: Seen,
    /// What was missing, and an operator said that it is known: it is not told again until it is there again.
    #[serde(default, skip_serializing_if = "Seen::is_empty")]
    pub accepted: Seen,
}

impl Proven {
    /// So much damage is remembered.
    pub const DAMAGE_MAX: usize = 2000;
}

/// What is read at once, and is proven or damaged as one. Backups come first: where not all damage can be remembered, theirs is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadPlace {
    /// What lies beside a backup's data objects.
    Documents {
        /// The backup's id.
        backup: String,
    },
    /// A backup's data object.
    Object {
        /// The backup's id.
        backup: String,
        /// Its place in the record, from 0.
        place: u32,
    },
    /// A segment, with all that is stored of it under `wal/`.
    Segment(SegmentName),
}

impl ReadPlace {
    /// Returns the id of the backup that it belongs to; `None` for WAL.
    pub fn backup(&self) -> Option<&str> {
        match self {
            Self::Segment(_) => None,
            Self::Documents { backup } | Self::Object { backup, .. } => Some(backup),
        }
    }
}

/// Something that was damaged when it was last read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDamage {
    /// What has to be read to find out whether it still is.
    pub place: ReadPlace,
    /// When it was found.
    pub at: DateTime<Utc>,
    /// What is wrong; at most [`KnownDamage::FLAWS_MAX`].
    pub flaws: Vec<KnownFlaw>,
}

impl KnownDamage {
    /// So much of what is wrong in one place is remembered.
    pub const FLAWS_MAX: usize = 20;
}

/// Something that is wrong with what is damaged, as it was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFlaw {
    /// What kind of thing it is, as in JSON.
    pub kind: String,
    /// What it concerns.
    pub object: String,
    /// What is wrong.
    pub what: String,
    /// The part of the backup, or the segment, that cannot be used because of it; `None` where all can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takes: Option<String>,
}

/// Consecutive segments that were proven at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenRun {
    /// The segments.
    #[serde(flatten)]
    pub run: SeenRun,
    /// When, by the clock of the machine that did it: when that run began.
    pub at: DateTime<Utc>,
}

/// Consecutive segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SeenRun {
    /// The first.
    pub first: SegmentName,
    /// How many.
    pub segments: u64,
}

impl From<SeenRun> for Run {
    fn from(run: SeenRun) -> Self {
        Self { first: run.first, segments: run.segments }
    }
}

/// Consecutive data objects of a backup, as its record numbers them, that were proven at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenObjects {
    /// The place of the first in the record, from 0.
    pub first: u32,
    /// How many.
    pub objects: u32,
    /// When.
    pub at: DateTime<Utc>,
}

/// What a repository held: a later look that finds less, without a record that retention removed it, looks at an older
/// or a pruned copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Whole segments.
    pub wal: Vec<SeenRun>,
    /// Up to where parts of the segment reached in which each timeline ended.
    pub tails: BTreeMap<TimelineId, Lsn>,
    /// Timelines whose history file was stored.
    pub histories: Vec<TimelineId>,
    /// Complete backups.
    pub backups: Vec<String>,
}

impl Seen {
    /// Returns whether it is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
