//! The command line as it is typed.

mod drill;
mod extract;
mod verify;

use std::path::PathBuf;

use chrono::{DateTime, FixedOffset, Local, NaiveDateTime, Offset as _, TimeZone as _, Utc};
use clap::{Parser, Subcommand, ValueEnum};
use walship::Result;
use walship::config::{Overrides, RetentionSettings};

use crate::log::{Before, Kind, Query, oid_or_name, parse_table};
use crate::recovery_settings::{RestoreAs, TargetAction};
use crate::target::{
    RecoveryTarget, TargetError, TargetWords, TimelineChoice, Zone, parse_time, parse_timeline, parse_xid,
    shell_word,
};

pub(super) use drill::{Deed, DrillArgs, HistoryArgs, ScratchArgs};
pub(super) use extract::{ExtractArgs, FormWord};
pub(super) use verify::VerifyArgs;

const STATUSES: &str = "Exit status:
  0  done
  1  failed: store not reachable, access denied, disk full
  2  usage: the command line or the configuration makes no sense
  3  no valid plan: the target cannot be reached (the nearest ones that can are named)
  4  damage found: something stored is not what it was";

const PLAN_EXAMPLES: &str = "Examples:
  pitr plan --to-time '2026-03-01 14:29:59.8 Europe/Berlin'
  pitr plan --to-xid 48213 --exclusive
  pitr plan --to-lsn 16/B374D848 --timeline 2
  pitr plan --before drop:public.orders
  pitr plan --latest --json | jq .plan.last_included
";

const RESTORE_EXAMPLES: &str = "Examples:
  pitr restore --to-time '2026-03-01 14:29:59.8+01' -D /srv/restored
  pitr restore --to-xid 48213 --exclusive -D /srv/restored --tablespace-mapping 16385=/srv/ts1
  pitr restore --to-time '2026-03-01 14:29:59.8Z' -D /var/lib/postgresql/17/main --as production
  pitr restore --before drop:public.orders -D /srv/restored --start --set port=5433
  pitr restore --latest --surviving-wal /mnt/old/pg_wal --push-surviving -D /srv/restored
  pitr restore --latest --standby --primary-conninfo 'host=db1 user=replicator' -D /srv/standby
";

const INFO_EXAMPLES: &str = "Examples:
  pitr info
  pitr info --server --connection 'host=db1 user=monitor'
  pitr info --json | jq '.timelines[].windows'
  pitr info --server --html /var/www/html/archive.html
";

const LOG_EXAMPLES: &str = "Examples:
  pitr log --since '2026-03-01 14:00 Europe/Berlin' --only drop,truncate
  pitr log --table public.orders
  pitr log --xid 48213
  pitr log --json | jq -r '.lines[] | select(.at_once) | .just_before'
";

const INDEX_EXAMPLES: &str = "Examples:
  pitr index
  pitr index --verify --json | jq .wrong
";

const EXPIRE_EXAMPLES: &str = "Examples:
  pitr expire
  pitr expire --window '7 days' --keep-last 2
  pitr expire --confirm --reason 'the disk is full'
  pitr expire --confirm --yes --json

It shows what the policy would keep and remove, with reasons and bytes. Nothing is removed without --confirm.

[retention] in the configuration says what stays; the flags above stand in for its keys:
  window = \"14 days\"     any moment of the last 14 days stays in reach
  keep_last = 2          the last two full backups
  keep_monthly = 12      the newest full backup of each of 12 months, with the WAL that it needs
";

const HOLD_EXAMPLES: &str = "Examples:
  pitr hold 20260301T020000Z-0123456789abcdef --reason 'audit 2026-17' --until '2026-12-31 00:00Z'
  pitr hold 20260301T020000Z-0123456789abcdef --reason 'before the migration'
";

const RELEASE_EXAMPLES: &str = "Examples:
  pitr release 20260301T020000Z-0123456789abcdef
  pitr release 20260301T020000Z-0123456789abcdef --reason 'the audit is over'
";

/// Recover PostgreSQL to a chosen commit from a walship repository
#[derive(Debug, Parser)]
#[command(name = "pitr", version, after_help = STATUSES, disable_help_subcommand = true)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show lineages, timelines, backups, and from when to when every commit can be reached
    #[command(after_help = [INFO_EXAMPLES, STATUSES].join("\n"))]
    Info(InfoArgs),
    /// Say how a target would be reached: what will be there, what not, from which backup
    #[command(after_help = [PLAN_EXAMPLES, STATUSES].join("\n"))]
    Plan(PlanArgs),
    /// Restore a data directory that PostgreSQL recovers from to exactly the planned transaction
    #[command(after_help = [RESTORE_EXAMPLES, STATUSES].join("\n"))]
    Restore(Box<RestoreArgs>),
    /// Restore to a scratch folder, recover, prove what came of it, measure it, and remove everything
    #[command(after_help = [drill::DRILL_EXAMPLES, STATUSES].join("\n"))]
    Drill(Box<DrillArgs>),
    /// Get tables, a schema or a database back as they were at a target: into a live server, beside what is there, or as a file
    #[command(after_help = [extract::EXTRACT_EXAMPLES, STATUSES].join("\n"))]
    Extract(Box<ExtractArgs>),
    /// Read every byte of the archive, or of a part of it, and say what is damaged and which moments that takes away
    #[command(after_help = [verify::VERIFY_EXAMPLES, STATUSES].join("\n"))]
    Verify(Box<VerifyArgs>),
    /// List backups, restores, drills, extracts, removals, verifications and changes, the newest first, or show a drill's report
    #[command(after_help = [drill::HISTORY_EXAMPLES, STATUSES].join("\n"))]
    History(HistoryArgs),
    /// Show what happened in the archived WAL, each event with the target that leads to just before it
    #[command(after_help = [LOG_EXAMPLES, STATUSES].join("\n"))]
    Log(LogArgs),
    /// Complete the index that plans are made from quickly, rebuild it, or compare it with the segments
    #[command(after_help = [INDEX_EXAMPLES, STATUSES].join("\n"))]
    Index(IndexArgs),
    /// Show which backups and which WAL the policy keeps, and remove the rest when told to
    #[command(after_help = [EXPIRE_EXAMPLES, STATUSES].join("\n"))]
    Expire(ExpireArgs),
    /// Hold a backup: it is not removed, whatever the policy says, until the hold ends or is released
    #[command(after_help = [HOLD_EXAMPLES, STATUSES].join("\n"))]
    Hold(HoldArgs),
    /// Release a hold, or all holds on a backup
    #[command(after_help = [RELEASE_EXAMPLES, STATUSES].join("\n"))]
    Release(ReleaseArgs),
    /// Write this program's man pages or completions; `walship setup` calls it
    #[command(hide = true)]
    Pages(PagesArgs),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub(super) struct PagesArgs {
    /// The folder of man pages
    #[arg(long, value_name = "FOLDER")]
    pub(super) man: Option<PathBuf>,
    /// The folder of completions
    #[arg(long, value_name = "FOLDER")]
    pub(super) completions: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ExpireArgs {
    /// Remove what is shown, after a confirmation
    #[arg(long)]
    pub(super) confirm: bool,
    /// Do not ask before it is removed
    #[arg(long, requires = "confirm")]
    pub(super) yes: bool,
    /// Why, for the repository's history
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// This backup never had a record, though all the rest of it is there: it was given up
    #[arg(long, value_name = "BACKUP")]
    pub(super) give_up: Vec<String>,
    /// Nothing comes to this archive any more, and this machine's clock is right: believe it
    #[arg(long)]
    pub(super) accept_idle: bool,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

/// Keys of the table `[retention]` by flag.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Policy (instead of what [retention] in the configuration says)")]
pub(super) struct PolicyArgs {
    /// How far back every moment stays in reach, "14 days" [env: WALSHIP_RETENTION_WINDOW]
    #[arg(long, value_name = "SPAN")]
    window: Option<String>,
    /// How many of the newest full backups stay [env: WALSHIP_RETENTION_KEEP_LAST]
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,
    /// How old full backups become, "90 days" [env: WALSHIP_RETENTION_KEEP_FOR]
    #[arg(long, value_name = "SPAN")]
    keep_for: Option<String>,
    /// For how many hours the newest full backup of each stays [env: WALSHIP_RETENTION_KEEP_HOURLY]
    #[arg(long, value_name = "N")]
    keep_hourly: Option<u32>,
    /// For how many days [env: WALSHIP_RETENTION_KEEP_DAILY]
    #[arg(long, value_name = "N")]
    keep_daily: Option<u32>,
    /// For how many weeks [env: WALSHIP_RETENTION_KEEP_WEEKLY]
    #[arg(long, value_name = "N")]
    keep_weekly: Option<u32>,
    /// For how many months [env: WALSHIP_RETENTION_KEEP_MONTHLY]
    #[arg(long, value_name = "N")]
    keep_monthly: Option<u32>,
    /// For how many years [env: WALSHIP_RETENTION_KEEP_YEARLY]
    #[arg(long, value_name = "N")]
    keep_yearly: Option<u32>,
}

impl PolicyArgs {
    /// Returns what is configured, with what the flags say in its place.
    pub(super) fn over(&self, configured: &RetentionSettings) -> Result<RetentionSettings> {
        let span = |text: &Option<String>| text.as_deref().map(str::parse).transpose();
        Ok(RetentionSettings {
            window: span(&self.window)?.or(configured.window),
            keep_last: self.keep_last.or(configured.keep_last),
            keep_for: span(&self.keep_for)?.or(configured.keep_for),
            keep_hourly: self.keep_hourly.or(configured.keep_hourly),
            keep_daily: self.keep_daily.or(configured.keep_daily),
            keep_weekly: self.keep_weekly.or(configured.keep_weekly),
            keep_monthly: self.keep_monthly.or(configured.keep_monthly),
            keep_yearly: self.keep_yearly.or(configured.keep_yearly),
        })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct HoldArgs {
    /// The backup's id, as `pitr info` shows it
    #[arg(value_name = "BACKUP")]
    pub(super) backup: String,
    /// Why it has to stay
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: String,
    /// When the hold ends by itself, with an offset or a zone [default: when it is released]
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

impl HoldArgs {
    /// Returns when the hold ends.
    pub(super) fn until(&self) -> Result<Option<DateTime<Utc>>> {
        let until = self.until.as_deref().map(|text| parse_time(text, local_offset)).transpose()?;
        Ok(until.map(|(time, _)| time))
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ReleaseArgs {
    /// The id of a hold, or of a backup all of whose holds are released
    #[arg(value_name = "HOLD|BACKUP")]
    pub(super) id: String,
    /// Why, for the repository's history
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct IndexArgs {
    /// Compare every roll-up with the segments' own summaries, and write nothing
    #[arg(long, conflicts_with = "rebuild")]
    pub(super) verify: bool,
    /// Make every roll-up from the segments' own summaries, and replace those that differ
    #[arg(long)]
    pub(super) rebuild: bool,
    /// Say what would be written, but write nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct LogArgs {
    /// Nothing that happened before this time, which has an offset or a zone
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Nothing that happened after this time, which has an offset or a zone
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only what this transaction did; its commit or abort too. A subtransaction's is that of its top-level one
    #[arg(long, value_name = "XID")]
    xid: Option<String>,
    /// Only what names this database, by name or oid
    #[arg(long, value_name = "DATABASE")]
    database: Option<String>,
    /// Only what names this table, its indexes or its TOAST table: NAME, SCHEMA.NAME or its oid
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Only what names this relation file number: pg_class.relfilenode as it was then
    #[arg(long, value_name = "FILENODE")]
    relation: Option<u32>,
    /// Only these kinds: drop, truncate, delete-heavy, restore-point, checkpoint, timeline, commit, abort, prepare
    /// [default:
    /// drop, truncate, restore-point, timeline; with --xid drop, truncate, commit, abort]. checkpoint reads the index
    /// of every 256 segments; delete-heavy, commit, abort and prepare read segments too, where there was such a transaction
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KINDS", hide_possible_values = true)]
    only: Vec<Kind>,
    /// delete-heavy is a transaction that deleted about so many rows of one relation or more
    #[arg(long, value_name = "ROWS", default_value_t = Query::DELETE_ROWS, value_parser = clap::value_parser!(u64).range(100..))]
    delete_rows: u64,
    /// The timeline whose way is followed: a number or "latest" [default: latest]
    #[arg(long, value_name = "N")]
    timeline: Option<String>,
    /// Also ask this server what its databases and relations are called now: a connection string or URI, without
    /// a password
    #[arg(long, value_name = "CONNINFO")]
    pub(super) server: Option<String>,
    /// How many lines at most, the oldest first
    #[arg(long, value_name = "LINES", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

impl LogArgs {
    /// Returns the query, and the zone that times are shown in.
    pub(super) fn query(&self) -> Result<(Query, Zone)> {
        let time =
            |text: &Option<String>| text.as_deref().map(|text| parse_time(text, local_offset)).transpose();
        let (since, until) = (time(&self.since)?, time(&self.until)?);
        let zone = since.or(until).map_or(Zone::Utc, |(_, zone)| zone);
        let kinds = match (&*self.only, &self.xid) {
            ([], None) => Kind::DEFAULT.to_vec(),
            ([], Some(_)) => Kind::OF_TRANSACTION.to_vec(),
            (only, _) => only.to_vec(),
        };
        let timeline = timeline(self.timeline.as_deref())?;
        let query = Query {
            since: since.map(|(time, _)| time),
            until: until.map(|(time, _)| time),
            xid: self.xid.as_deref().map(parse_xid).transpose()?,
            database: self.database.as_deref().map(oid_or_name),
            table: self.table.as_deref().map(parse_table).transpose()?,
            unnamed_too: false,
            delete_rows: self.delete_rows,
            relation: self.relation,
            kinds,
            timeline,
            limit: self.limit as usize,
            whole: false,
        };
        Ok((query, zone))
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct InfoArgs {
    /// Ask the server how far the archive is behind it: the one of --connection, else of libpq's PG* variables
    #[arg(long)]
    pub(super) server: bool,
    /// Write a status page to this file instead ("-": to standard output): the time line drawn, all figures, in one file
    /// that loads nothing. Without --lineage of all lineages
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) html: Option<PathBuf>,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub(super) target: TargetArgs,
    #[command(flatten)]
    pub(super) source: SourceArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct RestoreArgs {
    /// Where to restore to: a folder that is empty or does not exist, but with --delta or --set-aside
    #[arg(short = 'D', long, value_name = "DIR")]
    pub(super) data_dir: PathBuf,
    /// Go over the data directory that is there: what matches the backup stays, only the rest is fetched. It also
    /// goes on with a restore that was broken off
    #[arg(long)]
    pub(super) delta: bool,
    /// Give the data directory that is there, and the folders of its tablespaces, other names beside the new ones
    #[arg(long, conflicts_with = "delta")]
    pub(super) set_aside: bool,
    /// Do not ask before --delta or --set-aside changes what is there
    #[arg(long)]
    pub(super) yes: bool,
    #[command(flatten)]
    pub(super) target: TargetArgs,
    /// What the restored server is to be: a copy archives nothing and subscribes to nothing; production does as the
    /// original did [default: copy; with --standby production: a standby that takes over has to archive, and
    /// archive_mode cannot be turned on without a restart]
    #[arg(long = "as", value_enum, value_name = "WHAT")]
    pub(super) restore_as: Option<AsWord>,
    /// What PostgreSQL does at the target [default: promote for a copy, pause for production; at --latest it
    /// always promotes]
    #[arg(long, value_enum, value_name = "ACTION")]
    pub(super) target_action: Option<ActionWord>,
    /// With --latest: set up a standby. It replays what is archived now and later, follows the newest timeline, and
    /// answers queries, until it is promoted (pg_ctl promote)
    #[arg(long)]
    pub(super) standby: bool,
    /// The standby also streams from this primary: a connection string or URI, without a password, which belongs into
    /// the .pgpass of the server's user [default: none, the standby follows the archive alone]
    #[arg(long, value_name = "CONNINFO", requires = "standby")]
    pub(super) primary_conninfo: Option<String>,
    /// The replication slot of the primary that the standby streams through; it must exist
    #[arg(long, value_name = "NAME", requires = "primary_conninfo")]
    pub(super) primary_slot: Option<String>,
    /// With --latest: first look into the pg_wal (or data directory) that is left of the lost server for WAL that was not
    /// archived any more, down to the last record of the open segment. Finds it, says how to push it, and stops there;
    /// the server must be stopped, or gone
    #[arg(long, value_name = "DIR")]
    pub(super) surviving_wal: Option<PathBuf>,
    /// Push the WAL that --surviving-wal finds, or that --latest finds where it goes (in the data directory there, and in what
    /// earlier restores set aside in it or beside it), into every repository, then restore up to its end
    #[arg(long)]
    pub(super) push_surviving: bool,
    /// Restore with --latest although the data directory there, or what earlier restores set aside, holds transactions that
    /// are not archived. With --surviving-wal nothing but that is looked at then
    #[arg(long)]
    pub(super) leave_surviving: bool,
    /// Put a tablespace elsewhere, by its path or oid; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub(super) tablespace_mapping: Vec<String>,
    /// Let replay use tablespace folders that exist on this host
    #[arg(long)]
    pub(super) accept_tablespace_paths: bool,
    /// Where to write the server's settings files from outside the data directory: an empty or new folder
    #[arg(long, value_name = "DIR")]
    pub(super) settings_dir: Option<PathBuf>,
    /// The restore-cmd program for restore_command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub(super) restore_cmd: Option<PathBuf>,
    /// Why, for the history (`pitr history`)
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Check everything and say what would be done, but write nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) source: SourceArgs,
    #[command(flatten)]
    pub(super) starting: StartArgs,
}

/// What comes after the restore.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Start")]
pub(super) struct StartArgs {
    /// Then start PostgreSQL on it, show how far replay is, and wait until it is open for writing, or paused or stopped at
    /// its target (--target-action); a standby, until it takes connections. Says which transaction is the last one in
    /// it, and fails where that is not as planned. PostgreSQL runs as the user of this command, which cannot be root, goes
    /// on when this command ends or is interrupted, and writes to log/pitr-start.log in the data directory. Where
    /// pg_hba.conf asks for a password it is taken from ~/.pgpass or PGPASSWORD, the user from PGUSER
    #[arg(long)]
    pub(super) start: bool,
    /// The folder of pg_ctl and PostgreSQL's other programs, of the backup's major version [default: pg_ctl on the PATH
    /// when it is of that version, else /usr/lib/postgresql/VERSION/bin, /usr/pgsql-VERSION/bin]
    #[arg(long, value_name = "DIR", requires = "start")]
    pub(super) pg_bin: Option<PathBuf>,
    /// A setting for this start, on the server's command line, as a copy beside the original needs --set port=5433; may
    /// be repeated
    #[arg(long, value_name = "NAME=VALUE", requires = "start")]
    pub(super) set: Vec<String>,
    /// Give up when replay makes no progress for so long; the server is left running
    #[arg(long, value_name = "SECONDS", requires = "start", default_value_t = 600,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(super) start_timeout: u64,
}

/// What every command has.
#[derive(Debug, clap::Args)]
pub(super) struct SourceArgs {
    /// The lineage [default: the newest]
    #[arg(long, value_name = "NUMBER")]
    pub(super) lineage: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) overrides: Overrides,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Target (exactly one)")]
pub(super) struct TargetArgs {
    /// The last moment to keep, with an offset or a zone
    #[arg(long, value_name = "TIME")]
    to_time: Option<String>,
    /// The WAL record that starts at this position or first after it
    #[arg(long, value_name = "LSN")]
    to_lsn: Option<String>,
    /// The end of this transaction
    #[arg(long, value_name = "XID")]
    to_xid: Option<String>,
    /// Just before the end of this transaction: --to-xid XID --exclusive
    #[arg(long, value_name = "XID", conflicts_with_all = ["to_xid", "exclusive"])]
    before_xid: Option<String>,
    /// Just before the last such event: drop:TABLE, truncate:TABLE, delete:TABLE (1000 rows or more), drop:DATABASE/TABLE or, of a whole database,
    /// drop:DATABASE/. A name that could mean several is refused, and each named
    #[arg(long, value_name = "EVENT", conflicts_with_all = ["to_time", "to_lsn", "to_xid", "before_xid", "to_name",
        "latest", "immediate", "exclusive"])]
    before: Option<String>,
    /// A restore point made with pg_create_restore_point()
    #[arg(long, value_name = "NAME")]
    to_name: Option<String>,
    /// Everything that is archived
    #[arg(long)]
    latest: bool,
    /// The moment the backup is consistent
    #[arg(long)]
    immediate: bool,
    /// Stop just before the target (time, LSN, xid)
    #[arg(long, help_heading = "Target details")]
    exclusive: bool,
    /// The timeline to follow: a number or "latest" [default: latest]
    #[arg(long, value_name = "N", help_heading = "Target details")]
    timeline: Option<String>,
    /// Restore from this backup [default: the newest that serves the target]
    #[arg(long, value_name = "ID", help_heading = "Target details")]
    pub(super) backup: Option<String>,
}

impl TargetArgs {
    /// Returns the event to stop before, when that is how the target is given, and the timeline to follow.
    pub(super) fn before(&self) -> Result<Option<(Before, TimelineChoice)>> {
        let Some(text) = &self.before else { return Ok(None) };
        Ok(Some((Before::parse(text)?, timeline(self.timeline.as_deref())?)))
    }

    /// Returns whether any target is given.
    pub(super) fn is_given(&self) -> bool {
        let options =
            [&self.to_time, &self.to_lsn, &self.to_xid, &self.before_xid, &self.before, &self.to_name];
        self.latest || self.immediate || self.exclusive || options.iter().any(|option| option.is_some())
    }

    /// Returns the options as they were typed.
    pub(super) fn shown(&self) -> String {
        let values = [
            ("--to-time", &self.to_time),
            ("--to-lsn", &self.to_lsn),
            ("--to-xid", &self.to_xid),
            ("--before-xid", &self.before_xid),
            ("--before", &self.before),
            ("--to-name", &self.to_name),
        ];
        let flags =
            [("--latest", self.latest), ("--immediate", self.immediate), ("--exclusive", self.exclusive)];
        let details = [("--timeline", &self.timeline), ("--backup", &self.backup)];
        let with_value = |(option, value): (&str, &Option<String>)| {
            value.as_ref().map(|value| format!("{option} {}", shell_word(value)))
        };
        let mut words: Vec<String> = values.into_iter().filter_map(with_value).collect();
        words.extend(flags.iter().filter(|(_, given)| *given).map(|(option, _)| (*option).to_owned()));
        words.extend(details.into_iter().filter_map(with_value));
        words.join(" ")
    }

    /// Returns whether everything that is archived is asked for.
    pub(super) fn is_latest(&self) -> bool {
        self.latest
    }

    /// Returns the timeline to follow.
    pub(super) fn timeline(&self) -> Result<TimelineChoice> {
        Ok(timeline(self.timeline.as_deref())?)
    }

    /// Returns whether one timeline is asked for by its number.
    pub(super) fn names_timeline(&self) -> bool {
        self.timeline.as_deref().is_some_and(|timeline| timeline != "latest")
    }

    /// Returns the target, unless [`TargetArgs::before`] gives it.
    pub(super) fn target(&self) -> Result<RecoveryTarget> {
        let words = TargetWords {
            time: self.to_time.clone(),
            lsn: self.to_lsn.clone(),
            xid: self.to_xid.clone().or_else(|| self.before_xid.clone()),
            name: self.to_name.clone(),
            latest: self.latest,
            immediate: self.immediate,
            timeline: self.timeline.clone(),
            exclusive: self.exclusive || self.before_xid.is_some(),
        };
        Ok(words.parse(local_offset)?)
    }
}

fn timeline(text: Option<&str>) -> Result<TimelineChoice, TargetError> {
    match text {
        None | Some("latest") => Ok(TimelineChoice::Latest),
        Some(text) => parse_timeline(text).map(TimelineChoice::Number),
    }
}

/// Returns the offsets of this machine's zone at a local time, to name likely readings.
fn local_offset(naive: NaiveDateTime) -> Vec<FixedOffset> {
    let local = Local.from_local_datetime(&naive);
    let mut offsets: Vec<FixedOffset> =
        [local.earliest(), local.latest()].into_iter().flatten().map(|time| time.offset().fix()).collect();
    offsets.dedup();
    offsets
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AsWord {
    Copy,
    Production,
}

impl From<AsWord> for RestoreAs {
    fn from(word: AsWord) -> Self {
        match word {
            AsWord::Copy => Self::Copy,
            AsWord::Production => Self::Production,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ActionWord {
    Pause,
    Promote,
    Shutdown,
}

impl From<ActionWord> for TargetAction {
    fn from(word: ActionWord) -> Self {
        match word {
            ActionWord::Pause => Self::Pause,
            ActionWord::Promote => Self::Promote,
            ActionWord::Shutdown => Self::Shutdown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn before_a_transaction_is_its_end_excluded() {
        let target = |words: &str| match Args::try_parse_from(words.split(' ')).map(|args| args.command) {
            Ok(Command::Plan(plan)) => plan.target.target().ok(),
            _ => None,
        };
        let before = target("pitr plan --before-xid 731");
        assert!(before.is_some() && before == target("pitr plan --to-xid 731 --exclusive"));
        for words in
            ["--before-xid 731 --to-xid 731", "--before-xid 731 --latest", "--before-xid 731 --exclusive"]
        {
            assert_eq!(target(&format!("pitr plan {words}")), None, "{words}");
        }
    }

    #[test]
    fn every_help_ends_with_an_example_and_the_statuses() {
        for name in [
            "info", "plan", "restore", "drill", "extract", "history", "log", "index", "expire", "hold",
            "release",
        ] {
            let mut command = Args::command();
            let help = command.find_subcommand_mut(name).unwrap().render_help().to_string();
            assert!(help.contains(&format!("\n  pitr {name}")), "{help}");
            assert!(help.trim_end().ends_with("not what it was"), "{help}");
        }
    }
}
