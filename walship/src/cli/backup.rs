//! `walship backup`.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use chrono::Utc;
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use walship::backup::{BackupEvent, BackupOptions, BackupSource, Incremental, server_identity, take_backup};
use walship::catalog::{BackupRecord, DamagedPages};
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::replication::{Checkpoint, ConnectOptions};
use walship::repository::{ClusterRepository, LineageRepository};

use super::open::Configured;
use super::record;

/// The exit status when damage was found.
const DAMAGED: u8 = 4;

/// So many damaged pages are shown one by one.
const PAGES_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  walship backup 'host=db1 user=replicator'
  walship backup --label nightly --max-rate 50M postgresql://replicator@db1,db2/?target_session_attrs=prefer-standby
  sudo -u postgres walship backup --source local 'host=/var/run/postgresql'
  sudo -u postgres walship backup --source local --incremental 'host=/var/run/postgresql'
  sudo -u postgres walship backup --source local --nice --checkpoint spread --max-rate 100M 'host=/var/run/postgresql'

The user needs the REPLICATION attribute and a line for \"replication\" in pg_hba.conf. The password comes
from ~/.pgpass or PGPASSWORD, never from the command line. The backup is complete, and counts, when its WAL is in
the repository too: archive_command must be at work.

--source local reads the data directory itself, with several threads: faster, on the server's own machine only, as
the user that PostgreSQL runs as. Every page is checked against its checksum, as the server does with the stream.

--incremental stores the blocks that differ from the backup before, each compared by its digest, so all files are read
with --source local, for every version of PostgreSQL. Without it the server sends what its WAL summaries say has changed:
from PostgreSQL 17 on, with summarize_wal = on, if its role may connect to a database as well; it reads no other page, so
damage in those is found by full backups, or with --source local. A restore needs the whole chain, and puts it together by itself.

--nice keeps a backup in the background of a live load: it gets the processor when nobody else wants it, and its reads
wait behind others' where the disk's scheduler heeds priorities (bfq; with none and mq-deadline they do not). It knows this
program only: with --source stream the server reads as it always does. Between containers, systemd units and sessions their own
weights count (CPUWeight=, IOWeight=). --max-rate bounds what is read in every case.

Exit status: 0 complete, 1 failed, 2 usage, 4 complete, but damaged pages were found: they are listed, and in the
backup as they are.")]
pub(super) struct Args {
    /// The server: a URI or keyword=value pairs [default: --connection, the configuration, PG* variables]
    #[arg(value_name = "CONNINFO")]
    conninfo: Vec<String>,
    /// A name for the backup, one line
    #[arg(long, default_value = "walship")]
    label: String,
    /// Why it is taken, for the repository's history
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Checkpoint at once, or spread over minutes to spare the server
    #[arg(long, value_enum, default_value_t = CheckpointArg::Fast)]
    checkpoint: CheckpointArg,
    /// At most this much a second: kilobytes, or with k or M [e.g. 50M]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    max_rate: Option<u32>,
    /// Stand back behind the server and everybody else for processor and disk [1 to 19; without a number: 19]
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "19",
        value_parser = clap::value_parser!(u8).range(1..=19))]
    nice: Option<u8>,
    /// Seconds to wait for the last WAL to be in the repository
    // A year at most: no clock can hold a time much further ahead.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(..=31_536_000))]
    wal_timeout: u64,
    /// zstd level
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Store only what has changed since the newest backup; a full one where there is none to build on
    #[arg(long)]
    incremental: bool,
    /// With --incremental: the backup to build on, by its id [default: the newest]
    #[arg(long, value_name = "ID", requires = "incremental")]
    parent: Option<String>,
    /// With --incremental: take a full backup when so many incremental ones build on the last
    #[arg(long, value_name = "N", default_value_t = 14, requires = "incremental", value_parser = clap::value_parser!(u32).range(1..=100))]
    chain_max: u32,
    /// Have the server send the files, or read them where they lie
    #[arg(long, value_enum, default_value_t = SourceArg::Stream)]
    source: SourceArg,
    /// With --source local: the data directory [default: what the server says]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// With --source local: how many threads read and compress [default: one for each core, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// With --source local: store everything anew, also what a backup that did not complete has stored
    #[arg(long)]
    no_resume: bool,
    /// Close a data object when it holds so many MiB of files
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    object_mib: u64,
    /// Print the backup's record as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CheckpointArg {
    Fast,
    Spread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SourceArg {
    Stream,
    Local,
}

impl Args {
    /// Lowers the priority of this thread, and so of all that it will start, by what `--nice` says.
    ///
    /// The kernel derives the priority of reads and writes from it, unless `ionice` has set one.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when the system does not let us.
    pub(super) fn lower_priority(&self) -> Result<()> {
        let Some(by) = self.nice else { return Ok(()) };
        rustix::process::nice(i32::from(by)).map(|_| ()).map_err(|errno| {
            Error::from_io("lowering the priority (--nice)", errno.into()).with_safe("nothing was begun")
        })
    }

    /// # Errors
    /// [`Error::Invalid`] for what only the other source understands.
    fn backup_source(&self) -> Result<BackupSource> {
        match self.source {
            SourceArg::Local => {
                let cores = std::thread::available_parallelism().map_or(2, usize::from).min(8);
                Ok(BackupSource::Local {
                    data_directory: self.data_dir.clone(),
                    workers: self.workers.map_or(cores, usize::from),
                })
            }
            SourceArg::Stream if self.data_dir.is_some() || self.workers.is_some() => {
                Err(Error::invalid("--data-dir and --workers go with --source local")
                    .with_safe("nothing was begun")
                    .with_next("Add --source local, or leave them out."))
            }
            SourceArg::Stream => Ok(BackupSource::Stream),
        }
    }
}

/// Reads a rate in kilobytes a second: `1024`, `1024k`, `50M`.
fn parse_rate(text: &str) -> std::result::Result<u32, String> {
    let (digits, factor) = match text.strip_suffix(['M', 'm']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['k', 'K']).unwrap_or(text), 1),
    };
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|rate| (32..=1_048_576).contains(rate))
        .ok_or_else(|| "not a rate from 32k to 1024M".to_owned())
}

/// Takes the backup.
pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let source = args.backup_source()?;
    let config = super::config(overrides)?;
    let server = connect_options(args, &config)?;
    let clusters = Configured::new(&config)?.open_all().await?;
    let mut stop = super::receive::stop_signals()?;
    let begun = (Utc::now(), Instant::now());
    let reason = args.reason.as_deref();
    let lineages = match lineages_of(&clusters, &server).await {
        Ok(lineages) => lineages,
        Err(error) => {
            let newest = record::newest(&clusters).await;
            record::backup(&newest, begun, (None, reason), record::Ended::Failed(&error)).await;
            return Err(error);
        }
    };
    let options = BackupOptions {
        label: args.label.clone(),
        checkpoint: match args.checkpoint {
            CheckpointArg::Fast => Checkpoint::Fast,
            CheckpointArg::Spread => Checkpoint::Spread,
        },
        max_rate_kb: args.max_rate,
        wal_timeout: Duration::from_secs(args.wal_timeout),
        level: args.level,
        source,
        resume: !args.no_resume,
        object_bytes: args.object_mib << 20,
        incremental: args
            .incremental
            .then(|| Incremental { parent: args.parent.clone(), chain_max: args.chain_max }),
    };
    let (view, id) = (View::new(), OnceLock::new());
    let progress = |event: BackupEvent| {
        if let BackupEvent::Started { id: this, .. } = &event {
            let _ = id.set(this.clone());
        }
        view.show(&event);
    };
    // Dropped, it lets go of the server; what it has stored stays, and counts for nothing.
    let taken = tokio::select! {
        taken = take_backup(&lineages, &server, &options, &progress) => Some(taken),
        _ = stop.wait_for(|stop| *stop) => None,
    };
    view.bar.finish_and_clear();
    let ended = match &taken {
        Some(Ok(record)) => record::Ended::Taken(record),
        Some(Err(error)) => record::Ended::Failed(error),
        None => record::Ended::Interrupted,
    };
    record::backup(&lineages, begun, (id.get().cloned(), reason), ended).await;
    record::configuration(&lineages, overrides).await;
    let record = taken.unwrap_or_else(|| {
        Err(Error::unavailable("the backup was interrupted by a signal")
            .with_safe("nothing of it counts as a backup; other backups are untouched")
            .with_next("Take it again: with --source local what it has stored is taken over."))
    })?;
    super::print_report(&record, args.json, || text(&record))?;
    Ok(if record.damaged_pages.is_some() { DAMAGED } else { 0 })
}

async fn lineages_of(
    clusters: &[ClusterRepository],
    server: &ConnectOptions,
) -> Result<Vec<LineageRepository>> {
    let (identity, segment_size) = server_identity(server).await?;
    let mut lineages = Vec::new();
    for cluster in clusters {
        lineages.push(cluster.lineage_of(identity.system_identifier, segment_size).await?);
    }
    Ok(lineages)
}

fn connect_options(args: &Args, config: &Config) -> Result<ConnectOptions> {
    if !args.conninfo.is_empty() {
        return ConnectOptions::from_env_and_uri(&args.conninfo.join(" "));
    }
    super::server::options(config)
}

fn text(record: &BackupRecord) -> String {
    let took = (record.finished - record.started).to_std().unwrap_or_default();
    let mut text = format!(
        "backup {} is complete\n  from {} to {} on timeline {}\n  {} files, {}, stored as {} in {:.1} s",
        record.id,
        record.start_lsn,
        record.stop_lsn,
        record.stop_timeline,
        record.files,
        HumanBytes(record.data_bytes),
        HumanBytes(record.stored_bytes),
        took.as_secs_f64(),
    );
    if let Some(parent) = &record.parent {
        text += &format!(
            "\n  incremental: it builds on {}, {} backup(s) below it in all",
            parent.id, parent.depth
        );
    }
    if let Some(damaged) = &record.damaged_pages {
        text += &format!("\n{}", damage_text(damaged));
    }
    text
}

/// Names the damaged pages, and what to do about them.
fn damage_text(damaged: &DamagedPages) -> String {
    let mut text = format!("damage: {} pages do not match their checksums\n", damaged.total);
    for page in damaged.pages.iter().take(PAGES_SHOWN) {
        let relation = match (&page.relation, &page.database) {
            (Some(name), _) => format!(" of {name}"),
            (None, Some(database)) => format!(" of a relation in database {database}"),
            (None, None) => String::new(),
        };
        text += &format!(
            "  block {}{relation}, {} (checksum {:04X}, should be {:04X})\n",
            page.block,
            page.path.display(),
            page.stored,
            page.computed
        );
    }
    let more = damaged.total.saturating_sub(damaged.pages.len().min(PAGES_SHOWN) as u64);
    if damaged.pages.len() > PAGES_SHOWN {
        text += &format!("  and {more} more: --json lists up to {}\n", DamagedPages::PAGES_MAX);
    } else if more > 0 {
        text += &format!("  and {more} more that the server only counts: it names five of each file\n");
    }
    text + "safe:  the backup is complete, the damaged pages are in it as they are; older backups are untouched\n\
            next:  Look into the server's disk and memory; restore an older backup to a scratch folder and compare: \
            its WAL may bring the pages back whole."
}

/// A bar on a terminal, a few lines elsewhere.
struct View {
    bar: ProgressBar,
    is_terminal: bool,
}

impl View {
    fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = if is_terminal { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        Self { bar, is_terminal }
    }

    fn show(&self, event: &BackupEvent) {
        match event {
            BackupEvent::Checkpoint => self.say("waiting for the server's checkpoint".into()),
            BackupEvent::Started { id, start_lsn, total_bytes, .. } => {
                let total = HumanBytes(*total_bytes);
                if self.is_terminal {
                    self.bar.println(format!("backup {id} starts at {start_lsn}, about {total}"));
                    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent:>3} %  {msg}") {
                        self.bar.set_style(style);
                    }
                    self.bar.set_length(*total_bytes);
                } else {
                    super::say(&format!("backup {id} starts at {start_lsn}, about {total}"));
                }
            }
            BackupEvent::Data(transfer) => {
                self.bar.set_length(transfer.total_bytes.max(transfer.done_bytes));
                self.bar.set_position(transfer.done_bytes);
                let left =
                    transfer.left.map(|left| format!(", {} left", HumanDuration(left))).unwrap_or_default();
                self.bar.set_message(format!(
                    "{} of about {}, {}/s{left}",
                    HumanBytes(transfer.done_bytes),
                    HumanBytes(transfer.total_bytes),
                    HumanBytes(transfer.bytes_per_second)
                ));
            }
            BackupEvent::WaitingForWal { first, segments } => self.say(match first {
                Some(first) => format!("waiting for WAL in the repository: {first} ({segments} missing)"),
                None => "waiting for the timeline's history file in the repository".to_owned(),
            }),
            BackupEvent::Warning(warning) => self.line(&format!("warning: {warning}")),
            BackupEvent::Note(note) => self.line(note),
        }
    }

    /// Says something that stays.
    fn line(&self, line: &str) {
        if self.is_terminal { self.bar.println(line) } else { super::say(line) }
    }

    fn say(&self, text: String) {
        if self.is_terminal {
            self.bar.set_message(text);
            self.bar.tick();
        } else {
            super::say(&text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_pg_basebackup_does() {
        assert_eq!(parse_rate("1024"), Ok(1024));
        assert_eq!(parse_rate("32k"), Ok(32));
        assert_eq!(parse_rate("50M"), Ok(51_200));
        for text in ["", "31", "2000M", "1G", "-5", "99999999999M"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_wait_for_wal_is_bounded() {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            args: Args,
        }
        let parse = |text: &str| <Alone as clap::Parser>::try_parse_from(["backup", "--wal-timeout", text]);
        assert_eq!(parse("31536000").map(|alone| alone.args.wal_timeout).unwrap_or(0), 31_536_000);
        for text in ["31536001", "18446744073709551615", "-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
