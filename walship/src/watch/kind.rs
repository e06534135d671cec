//! What can be wrong, by name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much a problem matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It should be looked at in working hours.
    Warning,
    /// What is in the archive, or is to come into it, is in danger.
    Critical,
}

/// What can be wrong. The names are stable: labels of metrics and fields of notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A repository cannot be read.
    RepositoryUnreachable,
    /// The server does not answer.
    ServerUnreachable,
    /// There is no complete backup.
    BackupMissing,
    /// The newest backup is too old.
    BackupOverdue,
    /// The newest backup is much smaller or larger than the one before.
    BackupSize,
    /// The newest backup holds pages with wrong checksums.
    BackupDamagedPages,
    /// The last verification found damage.
    VerificationFailed,
    /// The last verification is too long ago.
    VerificationOverdue,
    /// The server's WAL waits, or the archiver fails.
    WalNotArriving,
    /// The slot of `walship receive` has lost WAL, is about to, or nobody streams from it.
    Slot,
    /// WAL is missing in the archive.
    WalGap,
    /// WAL at the end of a timeline is gone.
    WalEndLost,
    /// No backup leads to what was stored last.
    WindowEnded,
    /// Something was done in the future.
    Clock,
    /// The disk of a repository is filling up.
    RepositoryDisk,
    /// A disk of the server is filling up.
    ServerDisk,
    /// More would be lost than the objective allows.
    RpoMissed,
    /// The last drill took longer than the objective allows.
    RtoMissed,
    /// The last drill did not prove that a restore works.
    DrillFailed,
    /// The last drill is too long ago.
    DrillOverdue,
    /// The last removal by retention failed or was cut off.
    RetentionFailed,
    /// Retention has not run for too long.
    RetentionOverdue,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 22] = [
        Self::RepositoryUnreachable,
        Self::ServerUnreachable,
        Self::BackupMissing,
        Self::BackupOverdue,
        Self::BackupSize,
        Self::BackupDamagedPages,
        Self::VerificationFailed,
        Self::VerificationOverdue,
        Self::WalNotArriving,
        Self::Slot,
        Self::WalGap,
        Self::WalEndLost,
        Self::WindowEnded,
        Self::Clock,
        Self::RepositoryDisk,
        Self::ServerDisk,
        Self::RpoMissed,
        Self::RtoMissed,
        Self::DrillFailed,
        Self::DrillOverdue,
        Self::RetentionFailed,
        Self::RetentionOverdue,
    ];

    /// Returns its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::RepositoryUnreachable => "repository_unreachable",
            Self::ServerUnreachable => "server_unreachable",
            Self::BackupMissing => "backup_missing",
            Self::BackupOverdue => "backup_overdue",
            Self::BackupSize => "backup_size",
            Self::BackupDamagedPages => "backup_damaged_pages",
            Self::VerificationFailed => "verification_failed",
            Self::VerificationOverdue => "verification_overdue",
            Self::WalNotArriving => "wal_not_arriving",
            Self::Slot => "slot",
            Self::WalGap => "wal_gap",
            Self::WalEndLost => "wal_end_lost",
            Self::WindowEnded => "window_ended",
            Self::Clock => "clock",
            Self::RepositoryDisk => "repository_disk",
            Self::ServerDisk => "server_disk",
            Self::RpoMissed => "rpo_missed",
            Self::RtoMissed => "rto_missed",
            Self::DrillFailed => "drill_failed",
            Self::DrillOverdue => "drill_overdue",
            Self::RetentionFailed => "retention_failed",
            Self::RetentionOverdue => "retention_overdue",
        }
    }

    /// Returns whether `walship check` says it by itself, in more words.
    pub fn is_told_by_check(self) -> bool {
        matches!(self, Self::RepositoryUnreachable | Self::ServerUnreachable | Self::Slot | Self::WalEndLost)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What it means that a problem is not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// It is not there.
    Over,
    /// Nobody could look.
    Unknown,
    /// What it is about is not in the configuration: nobody looks any more.
    Unwatched,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it is, for programs.
    pub kind: Kind,
    /// What it is about: a repository's address, a kind of backup, a slot, a disk; or `server`.
    pub subject: String,
    /// How much it matters.
    pub severity: Severity,
    /// What it is, for people: a lowercase fact.
    pub text: String,
    /// What to do.
    pub next: String,
}
