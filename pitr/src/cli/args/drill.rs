//! The words of `pitr drill`, and what it shares with other commands that restore to a scratch folder.

use std::path::PathBuf;

use super::{SourceArgs, TargetArgs};

pub(super) const DRILL_EXAMPLES: &str = "Examples:
  pitr drill --scratch /srv/drill
  pitr drill --scratch /srv/drill --latest --checks /etc/walship/checks --reason 'monthly drill'
  pitr drill --scratch /srv/drill --to-time '2026-03-01 14:29:59.8 Europe/Berlin' --rto 15m --rpo 5m
  pitr drill --json | jq '.outcome, .objectives.rto'

What is proven: recovery ends where the plan says and the last planned transaction is in it; pg_amcheck finds tables
and indexes sound; every row can be read; the checks answer as expected; page checksums are right. The report goes into
the repository: `pitr history` lists it, `pitr history --drill ID` shows it.

A check is a file NAME.sql, run in a read-only transaction of its own. Its answer is one true, or what NAME.expected
beside it says: a line for each row, columns separated by | (as psql -At prints them). A folder among the checks is
called like the database that its files are for.

A failed proof ends with status 4, as damage does. Status 1: the drill could not be carried out, or was interrupted; or
all is proven and an objective (rto, rpo) was missed.
";

/// How a private server in a scratch folder is made.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Scratch server")]
pub(in crate::cli) struct ScratchArgs {
    /// Where to restore to: a folder that is empty or does not exist, with room for the backup; what a killed run left
    /// there is removed first [default: scratch in state_dir, else walship-scratch-UID in the system's folder for
    /// temporary files]
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) scratch: Option<PathBuf>,
    /// Leave the restored data directory where it is, stopped
    #[arg(long)]
    pub(in crate::cli) keep: bool,
    /// The folder of pg_ctl and PostgreSQL's other programs, of the backup's major version [default: on the PATH when of
    /// that version, else /usr/lib/postgresql/VERSION/bin, /usr/pgsql-VERSION/bin]
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) pg_bin: Option<PathBuf>,
    /// A setting of the private server, such as shared_buffers=1GB; may be repeated. It loads no shared_preload_libraries
    /// but those named here: they may run jobs
    #[arg(long, value_name = "NAME=VALUE")]
    pub(in crate::cli) set: Vec<String>,
    /// Give up when replay makes no progress for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(in crate::cli) start_timeout: u64,
    /// The restore-cmd program for restore_command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) restore_cmd: Option<PathBuf>,
    /// Why, for the history (`pitr history`)
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) reason: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(
    override_usage = "pitr drill [OPTIONS]    (without a target: a moment by chance out of all that can be reached)"
)]
pub(in crate::cli) struct DrillArgs {
    /// A folder of SQL checks
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) checks: Option<PathBuf>,
    /// The database of the checks whose folder does not say another
    #[arg(long, value_name = "DATABASE", default_value = "postgres")]
    pub(in crate::cli) dbname: String,
    /// How long a check may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(in crate::cli) check_timeout: u64,
    /// Count the rows of this table only: SCHEMA.NAME, as it is stored; may be repeated [default: all tables]
    #[arg(long, value_name = "TABLE", conflicts_with = "no_count")]
    pub(in crate::cli) count: Vec<String>,
    /// Count no rows
    #[arg(long)]
    pub(in crate::cli) no_count: bool,
    /// Do not run pg_amcheck
    #[arg(long)]
    pub(in crate::cli) no_amcheck: bool,
    /// How long pg_amcheck, the row counts, and the look at page checksums may take, each
    #[arg(long, value_name = "SECONDS", default_value_t = 21_600, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub(in crate::cli) proof_timeout: u64,
    /// How long it may take until the server is open, such as 15m [default: rto of the configuration]
    #[arg(long, value_name = "TIME")]
    pub(in crate::cli) rto: Option<String>,
    /// How old the newest commit may be that can be reached, such as 5m [default: rpo of the configuration]
    #[arg(long, value_name = "TIME")]
    pub(in crate::cli) rpo: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) target: TargetArgs,
    #[command(flatten)]
    pub(in crate::cli) scratch: ScratchArgs,
    #[command(flatten)]
    pub(in crate::cli) source: SourceArgs,
}

pub(super) const HISTORY_EXAMPLES: &str = "Examples:
  pitr history
  pitr history --only drill,restore --limit 10
  pitr history --drill 20261121T010203Z-0123456789abcdef --html > drill.html
  pitr history --json | jq '.entries[] | select(.kind == \"drill\" and .outcome != \"proven\")'
";

/// What is in the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::cli) enum Deed {
    Backup,
    Restore,
    Drill,
    Extract,
    Expire,
    Verify,
    Change,
}

impl Deed {
    /// Returns its word.
    pub(in crate::cli) fn word(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Drill => "drill",
            Self::Extract => "extract",
            Self::Expire => "expire",
            Self::Verify => "verify",
            Self::Change => "change",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct HistoryArgs {
    /// Only these kinds
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KINDS")]
    pub(in crate::cli) only: Vec<Deed>,
    /// How many entries at most, the newest first
    #[arg(long, value_name = "ENTRIES", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(in crate::cli) limit: u32,
    /// Show the report of this drill
    #[arg(long, value_name = "ID", conflicts_with_all = ["only", "limit"])]
    pub(in crate::cli) drill: Option<String>,
    /// As the page that needs nothing else
    #[arg(long, requires = "drill", conflicts_with = "json")]
    pub(in crate::cli) html: bool,
    #[command(flatten)]
    pub(in crate::cli) source: SourceArgs,
}
