//! What was seen: plain data, gathered by `observe`.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::transactions::Ended;
use crate::catalog::{BackupRecord, DrillRecord, ExpireOutcome, ExpireRecord, VerifyOutcome, VerifyRecord};
use crate::pg::{Lsn, TimelineId};

/// Everything that was seen of one cluster at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// When, by this machine's clock.
    pub at: DateTime<Utc>,
    /// The operator's name of the cluster.
    pub cluster: String,
    /// The configured repositories, in their order.
    pub repositories: Vec<RepositoryFacts>,
    /// What the server said.
    pub server: ServerAnswer,
}

/// Whether the server answered.
#[derive(Debug, Clone, PartialEq)]
pub enum ServerAnswer {
    /// It was not to be asked.
    NotAsked,
    /// It did not answer, and why.
    Failed {
        /// What happened.
        what: String,
        /// What to do.
        next: String,
    },
    /// It did.
    Told(ServerFacts),
}

impl ServerAnswer {
    /// Returns what it told.
    pub fn told(&self) -> Option<&ServerFacts> {
        match self {
            Self::Told(facts) => Some(facts),
            _ => None,
        }
    }
}

/// What was seen of one repository.
#[derive(Debug, Clone, PartialEq)]
pub struct RepositoryFacts {
    /// Where it lies, without secrets.
    pub url: String,
    /// What happened when it was looked at last, and what to do; `None` when all could be read.
    pub failure: Option<(String, String)>,
    /// How many looks have failed since the process began.
    pub failures_total: u64,
    /// How long the store took for one small read.
    pub latency: Option<Duration>,
    /// When everything could be read last.
    pub seen: Option<DateTime<Utc>>,
    /// What it held then.
    pub contents: Option<Contents>,
    /// The disk of a repository in a folder.
    pub disk: Option<Disk>,
}

/// What a repository holds of the cluster's lineage.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// The lineage's number.
    pub lineage: u32,
    /// When it was registered.
    pub created: DateTime<Utc>,
    /// The timeline that the rest is about: the server's where WAL is stored on the way to it, or the newest with WAL.
    pub timeline: Option<TimelineId>,
    /// Complete backups, oldest start first.
    pub backups: Vec<BackupFacts>,
    /// Backups that were started and not finished.
    pub unfinished_backups: u64,
    /// Incremental backups without one that they build on.
    pub orphaned_backups: u64,
    /// Up to where WAL is durable on the way to the timeline and, where there is a backup, can be restored.
    pub durable_lsn: Option<Lsn>,
    /// When the newest transaction ended that is durable, by the server's clock.
    pub newest_commit: Option<DateTime<Utc>>,
    /// The largest number of a transaction whose end is durable in the newest WAL.
    pub newest_xid: Option<u32>,
    /// The last span in which every commit can be reached.
    pub window: Option<WindowFacts>,
    /// Whether more is stored behind it, and a record in between that no recovery crosses.
    pub is_cut: bool,
    /// Open gaps that are nobody's intention.
    pub gaps: u64,
    /// Those among them of which the ledger knows nothing.
    pub holes: u64,
    /// Those among them behind which no backup begins.
    pub gaps_without_backup: u64,
    /// Timelines of which WAL at the end is gone.
    pub lost_ends: u64,
    /// Whole segments that are stored, on all timelines.
    pub segments: u64,
    /// Their stored size.
    pub wal_bytes: u64,
    /// The last drill.
    pub drill: Option<DrillFacts>,
    /// The last drill that proved what it had to.
    pub proven: Option<DateTime<Utc>>,
    /// The last removal by retention.
    pub expire: Option<ExpireFacts>,
    /// The last verification.
    pub verification: Option<VerificationFacts>,
    /// When the last one began that read what it was to read.
    pub verified: Option<DateTime<Utc>>,
    /// Since when verifications have read everything that was stored then.
    pub all_read: Option<DateTime<Utc>>,
}

/// Full or incremental.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackupKind {
    /// It stands alone.
    Full,
    /// It builds on another.
    Incremental,
}

impl BackupKind {
    /// Returns the word for it, as labels have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// Returns both kinds.
pub fn backup_kinds() -> [BackupKind; 2] {
    [BackupKind::Full, BackupKind::Incremental]
}

/// A complete backup.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupFacts {
    /// Its id.
    pub id: String,
    /// Which kind.
    pub kind: BackupKind,
    /// When it was started.
    pub started: DateTime<Utc>,
    /// When it was complete.
    pub finished: DateTime<Utc>,
    /// Bytes of all files.
    pub data_bytes: u64,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// Pages whose checksum was wrong.
    pub damaged_pages: u64,
    /// Whether the last verification that read all of it found it sound; `None` before there was one.
    pub is_sound: Option<bool>,
}

impl BackupFacts {
    /// Returns what is to be known of a backup; the verifications are those of its repository, the newest first.
    pub fn of(record: &BackupRecord, verifications: &[VerifyRecord]) -> Self {
        let verdict = |verification: &VerifyRecord| {
            let found = verification.backups.iter().find(|backup| backup.id == record.id)?;
            match found.outcome {
                VerifyOutcome::Sound => Some(true),
                VerifyOutcome::Damaged => Some(false),
                _ => None,
            }
        };
        Self {
            id: record.id.clone(),
            kind: if record.parent.is_some() { BackupKind::Incremental } else { BackupKind::Full },
            started: record.started,
            finished: record.finished,
            data_bytes: record.data_bytes,
            stored_bytes: record.stored_bytes,
            damaged_pages: record.damaged_pages.as_ref().map_or(0, |pages| pages.total),
            is_sound: verifications.iter().find_map(verdict),
        }
    }
}

impl Contents {
    /// Returns the newest backup of a kind and the one of that kind before it.
    pub fn newest(&self, kind: BackupKind) -> (Option<&BackupFacts>, Option<&BackupFacts>) {
        let mut these: Vec<_> = self.backups.iter().filter(|backup| backup.kind == kind).collect();
        these.sort_by(|a, b| (b.finished, &b.id).cmp(&(a.finished, &a.id)));
        (these.first().copied(), these.get(1).copied())
    }

    /// Returns when the newest backup of any kind was complete.
    pub fn newest_backup(&self) -> Option<DateTime<Utc>> {
        self.backups.iter().map(|backup| backup.finished).max()
    }

    /// Returns since when there may have been something to drill and to verify; `None` without a backup. The oldest backup
    /// that is kept does not tell: retention keeps it young.
    pub fn since(&self) -> Option<DateTime<Utc>> {
        (!self.backups.is_empty()).then_some(self.created)
    }

    /// Returns when the oldest backup was complete.
    pub fn oldest_backup(&self) -> Option<DateTime<Utc>> {
        self.backups.iter().map(|backup| backup.finished).min()
    }
}

/// A span in which every commit can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowFacts {
    /// Where it begins: its first backup is consistent there.
    pub from_lsn: Lsn,
    /// When that backup was complete.
    pub from: DateTime<Utc>,
    /// Where it ends.
    pub until_lsn: Lsn,
}

/// A drill.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillFacts {
    /// When it began.
    pub started: DateTime<Utc>,
    /// How long it took.
    pub took: Duration,
    /// `proven`, `objective_missed`, `not_proven`, `failed`, `interrupted` or `no_plan`.
    pub outcome: String,
    /// The recovery time that it measured.
    pub recovery: Option<Duration>,
}

impl DrillFacts {
    /// Returns what is to be known of a drill.
    pub fn of(record: &DrillRecord) -> Self {
        Self {
            started: record.head.started,
            took: Duration::from_millis(record.millis),
            outcome: record.outcome.clone(),
            recovery: record.recovery_millis.map(Duration::from_millis),
        }
    }

    /// Returns whether it showed that a restore works, in time or not.
    pub fn has_proven(outcome: &str) -> bool {
        matches!(outcome, "proven" | "objective_missed")
    }
}

/// A removal by retention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpireFacts {
    /// When it began.
    pub started: DateTime<Utc>,
    /// When it ended; `None`: it was killed, or is at work.
    pub finished: Option<DateTime<Utc>>,
    /// What went wrong.
    pub failure: Option<String>,
    /// Whether it was refused: nothing was begun.
    pub refused: bool,
    /// When the last one ended that did what it was to do.
    pub done: Option<DateTime<Utc>>,
}

impl ExpireFacts {
    /// Returns what is to be known of removals: of the one that ended last. One that was refused because another was at work
    /// does not hide that other's end.
    pub fn of(removals: &[(ExpireRecord, Option<ExpireOutcome>)]) -> Option<Self> {
        let finished = |end: &Option<ExpireOutcome>| end.as_ref().map(|end| end.finished);
        let last = removals.iter().max_by_key(|(record, end)| finished(end).unwrap_or(record.started));
        let (record, end) = last?;
        let is_good = |end: &&ExpireOutcome| end.failure.is_none();
        let good = removals.iter().filter_map(|(_, end)| end.as_ref()).filter(is_good);
        Some(Self {
            started: record.started,
            finished: finished(end),
            failure: end.as_ref().and_then(|end| end.failure.clone()),
            refused: end.as_ref().is_some_and(|end| end.refused),
            done: good.map(|end| end.finished).max(),
        })
    }
}

/// A verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerificationFacts {
    /// When it began.
    pub started: DateTime<Utc>,
    /// How long it took.
    pub took: Duration,
    /// Whether everything that was read is as it should be, and nothing is known to be damaged.
    pub is_good: bool,
    /// Whether something is damaged or missing.
    pub is_damaged: bool,
    /// How many places are known to be damaged, whatever it was to read, and since when.
    pub damage: Option<(u64, DateTime<Utc>)>,
    /// What it says in a word.
    pub outcome: String,
    /// How many bytes were read.
    pub bytes: u64,
}

impl VerificationFacts {
    /// Returns which of the verifications, the newest first, counts for the repository that lies `here`: the last one, but
    /// what one found missing stands until all of its scope, or of the whole lineage, has been proven since, there or here.
    /// Those by a clock that is ahead of `now` are left out where there are others: they would be the last ones for long.
    pub fn standing<'a>(
        records: &'a [VerifyRecord],
        here: &str,
        now: DateTime<Utc>,
    ) -> Option<&'a VerifyRecord> {
        let clears = |later: &VerifyRecord, missed: &VerifyRecord| {
            matches!(later.outcome, VerifyOutcome::Sound | VerifyOutcome::Partly)
                && (later.repository == missed.repository || later.repository == here)
                && (later.whole || later.scope == missed.scope)
                && later.proven_since.is_some_and(|since| since >= missed.ended())
        };
        let past: Vec<&VerifyRecord> = records.iter().filter(|record| record.head.started <= now).collect();
        let stands = past.iter().enumerate().find(|(at, record)| {
            Self::has_missed(record) && !past[..*at].iter().any(|later| clears(later, record))
        });
        let own = past.iter().find(|record| record.repository == here);
        let last = own.or(past.first()).copied().or(records.first());
        stands.map(|(_, record)| *record).or(last)
    }

    /// Whether it found something wrong that is no damage of one place: that is known place by place.
    fn has_missed(record: &VerifyRecord) -> bool {
        record.outcome == VerifyOutcome::Damaged && record.standing.is_none_or(|standing| standing.others > 0)
    }

    /// Returns how many places of the repository that lies `here` are known to be damaged, and since when: as the verification
    /// of it says that ended last, or, where none was made here, the last one elsewhere. Those by a clock that is ahead of
    /// `now` do not count.
    fn damage(records: &[VerifyRecord], here: &str, now: DateTime<Utc>) -> Option<(u64, DateTime<Utc>)> {
        let past = records.iter().filter(|record| record.head.started <= now);
        let known: Vec<_> = past.filter_map(|record| Some((record, record.standing?))).collect();
        let own = known.iter().filter(|(record, _)| record.repository == here);
        let last = own.max_by_key(|(record, _)| record.ended());
        let (last, _) = last.or(known.iter().max_by_key(|(record, _)| record.ended()))?;
        // It need not know what another has found that was at work at the same time, or later elsewhere.
        let beside = known.iter().filter(|(record, _)| record.ended() >= last.head.started);
        let (_, worst) = beside.max_by_key(|(_, standing)| standing.places)?;
        (worst.places > 0).then(|| (worst.places, worst.since.unwrap_or(last.head.started)))
    }

    /// Returns what is to be known of the verifications of the repository that lies `here`, the newest first.
    pub fn of(records: &[VerifyRecord], here: &str, now: DateTime<Utc>) -> Option<Self> {
        let record = Self::standing(records, here, now)?;
        let damage = Self::damage(records, here, now);
        let is_damaged = Self::has_missed(record) || damage.is_some();
        Some(Self {
            started: record.head.started,
            took: Duration::from_millis(record.millis),
            is_good: !is_damaged && !matches!(record.outcome, VerifyOutcome::Unread | VerifyOutcome::Unknown),
            is_damaged,
            damage,
            outcome: record.outcome.word().to_owned(),
            bytes: record.bytes,
        })
    }

    /// Returns when the last one began that read what it was to read.
    pub fn last_done(records: &[VerifyRecord]) -> Option<DateTime<Utc>> {
        let done = |record: &&VerifyRecord| {
            matches!(record.outcome, VerifyOutcome::Sound | VerifyOutcome::Partly | VerifyOutcome::Damaged)
        };
        records.iter().find(done).map(|record| record.head.started)
    }

    /// Returns since when everything was read, as the last one of the whole lineage says that left nothing that was never read.
    pub fn all_read(records: &[VerifyRecord]) -> Option<DateTime<Utc>> {
        records.iter().filter(|record| record.whole).find_map(|record| record.proven_since)
    }
}

/// What the server told.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerFacts {
    /// The timeline that it is on.
    pub timeline: TimelineId,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// The position after the last byte of WAL that it has flushed, or as a standby received or replayed.
    pub wal_lsn: Lsn,
    /// The size of its segments.
    pub segment_bytes: u64,
    /// Which transactions have ended; `None` on a standby.
    pub ended: Option<Ended>,
    /// Whether an archiver is to archive: `archive_mode` is not off.
    pub archives: bool,
    /// How many files wait in `archive_status`; `None` where the role may not look.
    pub ready_files: Option<u64>,
    /// How many times the archiver failed.
    pub archive_failures_total: u64,
    /// The file with which the archiver failed last, when nothing was archived since.
    pub failing_wal: Option<String>,
    /// When something was archived last.
    pub last_archived: Option<DateTime<Utc>>,
    /// The slot that `walship receive` uses, where it is there.
    pub slot: Option<SlotFacts>,
    /// Whether commits wait for `walship receive`.
    pub commits_wait: bool,
    /// The server's disks, where this is its machine; `None` when they do not answer.
    pub disks: Option<Vec<(DiskPlace, Disk)>>,
}

/// A replication slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotFacts {
    /// Its name.
    pub name: String,
    /// Whether somebody streams from it.
    pub active: bool,
    /// Bytes of WAL that it holds back.
    pub lag_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
}

/// What of the server lies on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskPlace {
    /// The data directory.
    DataDirectory,
    /// `pg_wal`.
    Wal,
}

impl DiskPlace {
    /// Returns the word for it, as labels have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::DataDirectory => "data_directory",
            Self::Wal => "pg_wal",
        }
    }
}

/// A file system's room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// All of it that an ordinary user may use.
    pub total_bytes: u64,
    /// What is left for one.
    pub free_bytes: u64,
}

impl Disk {
    /// Returns how full it is, from 0 to 1, as `df` has it.
    pub fn used_ratio(&self) -> f64 {
        if self.total_bytes == 0 {
            return 0.0;
        }
        1.0 - self.free_bytes.min(self.total_bytes) as f64 / self.total_bytes as f64
    }
}

impl Facts {
    /// Returns how old what would be lost could be, were the server gone now, with the repository: nothing, or as old as
    /// the newest transaction that is durable; `None` where that is not known.
    pub fn recovery_point(&self, contents: &Contents) -> Option<Duration> {
        let newest = contents.newest_commit?;
        let age = self.at.signed_duration_since(newest).to_std().unwrap_or_default();
        let nothing_newer = self.server.told().is_some_and(|server| {
            let reaches = |lsn: Lsn| {
                contents.timeline == Some(server.timeline)
                    && contents.durable_lsn.is_some_and(|durable| durable >= lsn)
            };
            // Numbers wrap around: the later is the one that is less than half the circle ahead.
            let not_later = |server: u32, durable: u32| durable.wrapping_sub(server) < 1 << 31;
            let all_ended_are_there = |ended: Ended| {
                reaches(ended.by)
                    || contents.newest_xid.is_some_and(|durable| not_later(ended.newest_xid, durable))
                        && ended.late.is_none_or(reaches)
            };
            reaches(server.wal_lsn) || server.ended.is_some_and(all_ended_are_there)
        });
        Some(if nothing_newer { Duration::ZERO } else { age })
    }

    /// Returns how many bytes of the server's WAL cannot be restored from a repository; `None` without both.
    pub fn behind_bytes(&self, contents: &Contents) -> Option<u64> {
        let server = self.server.told()?;
        if contents.timeline != Some(server.timeline) {
            return None;
        }
        Some(server.wal_lsn.0.saturating_sub(contents.durable_lsn?.0))
    }
}
