//! `walship receive`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use walship::archive::own_folder;
use walship::archive::push::PushOptions;
use walship::codec::TailPart;
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::feed::{Eagerness, LeftBehind, Rules, TailRules};
use walship::pg::Lsn;
use walship::receive::{
    Emptied, ReceiveEvent, ReceiveOptions, Report, SpoolOptions, Until, empty_spool, receive,
};
use walship::replication::ConnectOptions;
use walship::repository::ClusterRepository;
use walship::spool;

use super::notify::Supervisor;
use super::open::Configured;

/// How many parts of the open segment are on their way at once where nobody waits for them: one while the
/// next one fills.
const PARTS_IN_FLIGHT_MAX: usize = 2;

/// The same where commits wait for them: so many that a store which is 30 ms away can be told of new WAL every
/// few milliseconds, each so short that together they take no more memory.
const AWAITED_PARTS_IN_FLIGHT_MAX: usize = 8;
const AWAITED_PART_BYTES_MAX: usize = TailPart::BYTES_MAX / 4;

/// What the spool may hold where nothing says otherwise.
const SPOOL_MIB_MAX: u64 = 1024;

/// How often the status file is written.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
// Each paragraph is one line: it is wrapped to the terminal's width.
#[command(after_help = "\
Examples:
  walship receive 'host=db1 user=replicator'
  walship receive --slot walship_b --status-file /run/walship/receive.json \\
      'postgresql://replicator@db1,db2/?target_session_attrs=primary'
  walship receive --flush repository

  walship receive --flush local --spool /var/lib/walship/spool
  walship receive --drain --spool /var/lib/walship/spool

With --flush repository and synchronous_standby_names = 'walship' on the server no acknowledged commit is lost; with \
--flush local none while the spool survives: when the server is gone, --drain stores what only the spool has.

Runs until SIGTERM or SIGINT: what is on its way is stored, the server is told, and it ends. The user needs the \
REPLICATION attribute and a line for \"replication\" in pg_hba.conf. The slot keeps WAL on the server until it is \
durable in every repository: bound that with max_slot_wal_keep_size. It works beside archive_command and beside \
another receiver (with a slot of its own): they store the same bytes.

Under systemd (Type=notify) it says when it streams, where it is, and answers the watchdog as long as it makes \
progress; `walship setup systemd` writes the unit.

Exit status:
  0  told to end, or what --until or --once wait for is durable
  1  it cannot go on, and waiting would not help; the message says why
  2  the command line makes no sense")]
pub(super) struct Args {
    /// The server: a URI or keyword=value pairs [default: --connection, the configuration, PG* variables]
    #[arg(value_name = "CONNINFO")]
    conninfo: Vec<String>,
    /// The replication slot; made when it is not there [env: WALSHIP_RECEIVE_SLOT] [default: walship]
    #[arg(long, value_name = "NAME")]
    slot: Option<String>,
    /// When the open segment's bytes are stored, and with that when the server hears that they are durable
    /// [env: WALSHIP_RECEIVE_FLUSH] [default: async]
    #[arg(long, value_name = "MODE", value_enum)]
    flush: Option<Flush>,
    /// Milliseconds that bytes of the open segment may wait with --flush async or local; 0: for the whole segment
    /// [env: WALSHIP_RECEIVE_TAIL_INTERVAL_MS] [default: 250]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(..=600_000))]
    tail_interval: Option<u64>,
    /// Closed segments on their way at most; then the server waits [env: WALSHIP_RECEIVE_UPLOADS_MAX] [default: 4]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..=64))]
    uploads_max: Option<u64>,
    /// The folder in which WAL is durable with --flush local until it is in every repository, on a disk of this host
    /// that outlives a restart [env: WALSHIP_RECEIVE_SPOOL]
    #[arg(long, value_name = "FOLDER")]
    spool: Option<PathBuf>,
    /// Mebibytes that the spool may hold; then the server has to wait [env: WALSHIP_RECEIVE_SPOOL_MIB_MAX]
    /// [default: 1024]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1 << 24))]
    spool_mib_max: Option<u64>,
    /// Store what the spool holds in every repository, and end; no server is asked
    #[arg(long, conflicts_with_all = ["until", "once", "conninfo"])]
    drain: bool,
    /// Keep a JSON file that says where everything is [env: WALSHIP_RECEIVE_STATUS_FILE]
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
    /// Seconds between two lines of figures on standard error [default: 60]
    #[arg(long, value_name = "SECONDS", default_value_t = 60, hide_default_value = true, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    report_interval: u64,
    /// Receive from a primary although the archive knows a younger timeline than its own
    #[arg(long)]
    accept_overtaken: bool,
    /// End when all WAL before this position is durable
    #[arg(long, value_name = "LSN", conflicts_with = "once")]
    until: Option<Lsn>,
    /// End when everything is durable that the server had flushed when it was reached
    #[arg(long)]
    once: bool,
    /// Print what was done as JSON at the end
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Flush {
    /// After --tail-interval: commits do not wait
    Async,
    /// At once in the --spool on this host, and after --tail-interval in the repositories: commits wait for this host's
    /// disk only, also while a repository cannot be reached
    Local,
    /// At once, group by group: with this receiver's application_name (walship) in the server's
    /// synchronous_standby_names, a commit returns when it is durable in every repository
    Repository,
}

/// Receives WAL.
pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    if args.drain {
        return drain(args, &config).await;
    }
    let server = if args.conninfo.is_empty() {
        super::server::options(&config)?
    } else {
        ConnectOptions::from_env_and_uri(&args.conninfo.join(" "))?
    };
    let options = options(args, &config)?;
    let status_file = args.status_file.clone().or(config.receive.status_file.clone());
    let clusters = Configured::new(&config)?.open_all().await?;
    if args.accept_overtaken {
        let text = format!("walship receive --accept-overtaken, slot {}", options.slot);
        super::record::change(&super::record::newest(&clusters).await, "overtaken_accepted", text, None)
            .await;
    }
    let stop = stop_signals()?;
    let supervisor = Arc::new(Supervisor::of_environment());
    supervisor.attend(stop.clone());
    if options.spool.is_none()
        && let Some(folder) = args.spool.as_ref().or(config.receive.spool.as_ref())
    {
        empty_left_spool(folder, &clusters, &config, stop.clone()).await?;
    }
    let view = Arc::new(View {
        slot: options.slot.clone(),
        lines_every: Duration::from_secs(args.report_interval),
        status_file,
        last_line: std::sync::Mutex::new(None),
        last_reason: std::sync::Mutex::default(),
        kept_by: if options.spool.is_some() { "the spool" } else { "the server" },
    });
    let (shown, told) = (Arc::clone(&view), Arc::clone(&supervisor));
    let progress = move |event| {
        shown.show(&event);
        told.hear(&event);
    };
    let done = receive(&clusters, &server, &options, stop, Arc::new(progress)).await;
    let report = match done {
        Ok(report) => report,
        Err(error) => {
            supervisor.leave(&format!("failed: {error}"));
            view.write_status(&Status {
                state: "failed",
                error: Some(error.to_string()),
                ..view.status(None)
            });
            return Err(error);
        }
    };
    view.write_status(&Status { state: "stopped", ..view.status(Some(&report)) });
    supervisor.leave(&format!("stopped; durable up to {}", report.durable_lsn));
    if args.json {
        super::print_report(&report, true, String::new)?;
    }
    Ok(0)
}

fn options(args: &Args, config: &Config) -> Result<ReceiveOptions> {
    let settings = &config.receive;
    let uploads_max = args.uploads_max.or(settings.uploads_max).unwrap_or(4);
    if !(1..=64).contains(&uploads_max) {
        return Err(Error::invalid(format!("receive.uploads_max is {uploads_max}; it can be 1 to 64")));
    }
    let flush = match (args.flush, settings.flush.as_deref()) {
        (Some(flush), _) => flush,
        (None, None) => Flush::Async,
        (None, Some(text)) => clap::ValueEnum::from_str(text, false).map_err(|_| {
            Error::invalid(format!("receive.flush is {text:?}; there are async, local and repository"))
        })?,
    };
    let interval = match args.tail_interval.or(settings.tail_interval_ms).unwrap_or(250) {
        0 => None,
        millis @ 1..=600_000 => Some(Duration::from_millis(millis)),
        millis => {
            return Err(Error::invalid(format!(
                "receive.tail_interval_ms is {millis}; it can be up to 600000"
            )));
        }
    };
    let (eagerness, in_flight_max, part_bytes_max) = match flush {
        Flush::Repository => (Eagerness::AtOnce, AWAITED_PARTS_IN_FLIGHT_MAX, AWAITED_PART_BYTES_MAX),
        // A file grows at its end: one part after the other.
        Flush::Local => (Eagerness::AtOnce, 1, TailPart::BYTES_MAX),
        Flush::Async => {
            let eagerness = interval.map_or(Eagerness::Never, Eagerness::After);
            (eagerness, PARTS_IN_FLIGHT_MAX, TailPart::BYTES_MAX)
        }
    };
    let left_behind = if flush == Flush::Local { LeftBehind::InParts } else { LeftBehind::Whole };
    Ok(ReceiveOptions {
        tail: TailRules { eagerness, in_flight_max, part_bytes_max, left_behind },
        spool: match flush {
            Flush::Local => Some(spool_options(args, config, interval)?),
            Flush::Async | Flush::Repository => None,
        },
        slot: args
            .slot
            .clone()
            .or(settings.slot.clone())
            .unwrap_or_else(|| super::synchronous::DEFAULT_SLOT.to_owned()),
        compression: config.compression,
        spool_dir: push_spool_dir(config)?,
        uploads_max: uploads_max as usize,
        accept_overtaken: args.accept_overtaken,
        until: match (args.until, args.once) {
            (Some(lsn), _) => Until::Durable(lsn),
            (None, true) => Until::CaughtUp,
            (None, false) => Until::Stopped,
        },
        rules: Rules {
            status_interval: Duration::from_secs(10),
            silence_max: Duration::from_secs(60),
            stop_patience: Duration::from_secs(1),
        },
        drain_max: Duration::from_secs(30),
        report_interval: STATUS_INTERVAL.min(Duration::from_secs(args.report_interval)),
    })
}

fn spool_options(args: &Args, config: &Config, tail_interval: Option<Duration>) -> Result<SpoolOptions> {
    let mib_max = args.spool_mib_max.or(config.receive.spool_mib_max).unwrap_or(SPOOL_MIB_MAX);
    if !(16..=1 << 24).contains(&mib_max) {
        return Err(Error::invalid(format!(
            "receive.spool_mib_max is {mib_max}; it can be 16 to {}",
            1 << 24
        )));
    }
    Ok(SpoolOptions { folder: spool_folder(args, config)?, bytes_max: mib_max << 20, tail_interval })
}

fn spool_folder(args: &Args, config: &Config) -> Result<PathBuf> {
    args.spool.clone().or(config.receive.spool.clone()).ok_or_else(|| {
        Error::invalid("no folder is named for the spool")
            .with_safe("nothing was received or changed")
            .with_next(
                "Name one with --spool or receive.spool: on a disk of this host, not in a folder for temporary files. \
                 It holds the only copy of what was acknowledged and is not in the repositories yet.",
            )
    })
}

fn push_spool_dir(config: &Config) -> Result<PathBuf> {
    match &config.state_dir {
        Some(folder) => own_folder(Some(folder)),
        None => Ok(std::env::temp_dir()),
    }
}

/// Stores what the spool holds.
async fn drain(args: &Args, config: &Config) -> Result<u8> {
    let folder = spool_folder(args, config)?;
    let clusters = Configured::new(config)?.open_all().await?;
    let emptied = empty(&folder, &clusters, config, stop_signals()?).await?;
    super::print_report(&emptied, args.json, || {
        match (emptied.segments, emptied.parts, emptied.left_bytes) {
            (0, 0, 0) => format!("the spool {} holds nothing that is not stored", folder.display()),
            (segments, parts, 0) => {
                format!("stored {segments} segments and {parts} parts of open ones; the spool is empty")
            }
            (segments, parts, left) => format!(
                "stopped: {segments} segments and {parts} parts of open ones are stored, {} are still in the spool",
                HumanBytes(left)
            ),
        }
    })?;
    Ok(u8::from(emptied.left_bytes > 0))
}

/// Stores what is left in a spool that is not used any more: it was acknowledged, and may be nowhere else.
async fn empty_left_spool(
    folder: &Path,
    clusters: &[ClusterRepository],
    config: &Config,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    if spool::waiting(folder, &config.cluster)?.is_none() {
        return Ok(());
    }
    super::say(&format!("the spool {} holds WAL from before: it is stored first", folder.display()));
    empty(folder, clusters, config, stop).await.map(|_| ())
}

async fn empty(
    folder: &Path,
    clusters: &[ClusterRepository],
    config: &Config,
    stop: watch::Receiver<bool>,
) -> Result<Emptied> {
    let push =
        PushOptions { compression: config.compression, lineage: None, spool_dir: push_spool_dir(config)? };
    let fails = |event| {
        if let ReceiveEvent::StoreFails { error, retry_in } = event {
            not_stored_yet(&error, retry_in, "the spool");
        }
    };
    empty_spool(folder, clusters, &push, stop, Arc::new(fails)).await
}

fn not_stored_yet(error: &str, retry_in: Duration, kept_by: &str) {
    super::say(&format!(
        "not stored yet: {error}; trying again in {:.1} s, {kept_by} keeps the WAL",
        retry_in.as_secs_f64()
    ));
}

/// Returns what turns true at SIGTERM or SIGINT.
pub(super) fn stop_signals() -> Result<watch::Receiver<bool>> {
    let failed = |error| Error::from_io("waiting for signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (stop_in, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop_in.send(true);
        // The receivers may outlive this: "nobody can say stop any more" is not to be heard.
        stop_in.closed().await;
    });
    Ok(stop)
}

/// The status file's content.
#[derive(Debug, Clone, Serialize)]
struct Status<'a> {
    format: u32,
    state: &'static str,
    time: String,
    pid: u32,
    slot: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten)]
    report: Option<&'a Report>,
}

/// Lines on standard error, and the status file.
struct View {
    slot: String,
    lines_every: Duration,
    status_file: Option<PathBuf>,
    last_line: std::sync::Mutex<Option<std::time::Instant>>,
    /// Why the last session ended.
    last_reason: std::sync::Mutex<String>,
    /// Who has what is not in the repositories yet.
    kept_by: &'static str,
}

impl View {
    fn show(&self, event: &ReceiveEvent) {
        match event {
            ReceiveEvent::Streaming { host, timeline, start } => {
                self.is_news("");
                super::say(&format!("receiving timeline {timeline} from {start} on from {host}"));
            }
            ReceiveEvent::Switched { from, to, switch_lsn } => {
                super::say(&format!("timeline {from} ended at {switch_lsn}; timeline {to} follows"));
            }
            ReceiveEvent::Lost { error, safe, next, retry_in } => {
                let again = format!("trying again in {:.1} s", retry_in.as_secs_f64());
                // All of it once; while the reason stays the same, one line tells that it does.
                if self.is_news(error) {
                    super::say(&format!("error: {error}\nsafe:  {safe}\nnext:  {next}\n{again}"));
                } else {
                    super::say(&format!("{error}; {again}"));
                }
            }
            ReceiveEvent::StoreFails { error, retry_in } => {
                not_stored_yet(error, *retry_in, self.kept_by);
            }
            ReceiveEvent::WalIsLost { report } => super::say(report),
            ReceiveEvent::Warning(warning) => super::say(&format!("warning: {warning}")),
            ReceiveEvent::Report(report) => {
                let state = if report.streaming { "streaming" } else { "waiting" };
                self.write_status(&Status { state, ..self.status(Some(report)) });
                self.line(report);
            }
        }
    }

    /// Returns whether the reason is another one than last time.
    fn is_news(&self, reason: &str) -> bool {
        let mut last = self.last_reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let news = *last != reason;
        if news {
            reason.clone_into(&mut last);
        }
        news
    }

    fn status<'a>(&'a self, report: Option<&'a Report>) -> Status<'a> {
        Status {
            format: 1,
            state: "starting",
            time: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
            pid: std::process::id(),
            slot: &self.slot,
            error: None,
            report,
        }
    }

    /// A line of figures now and then, for logs and whoever reads them.
    fn line(&self, report: &Report) {
        let mut last = self.last_line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < self.lines_every) {
            return;
        }
        *last = Some(std::time::Instant::now());
        super::say(&format!(
            "received={} durable={} server={} not_durable_bytes={} uploads={} segments={} parts={} received_bytes={} ({}) \
             stored_bytes={} repository={} spool_bytes={} sessions={}",
            report.received_lsn,
            report.durable_lsn,
            report.server_lsn,
            report.server_lsn.bytes_since(report.durable_lsn),
            report.uploads,
            report.segments,
            report.parts,
            report.received_bytes,
            HumanBytes(report.received_bytes),
            report.stored_bytes,
            report.repository_lsn,
            report.spool_bytes,
            report.sessions,
        ));
    }

    /// Writes the status file, whole or not at all; that it cannot be written is no reason to end.
    fn write_status(&self, status: &Status<'_>) {
        let Some(path) = &self.status_file else { return };
        let Ok(json) = serde_json::to_vec(status) else { return };
        if let Err(error) = replace(path, &json) {
            tracing::warn!("{} cannot be written: {error}", path.display());
        }
    }
}

/// Puts a file in the place of another, without asking that it survive a crash of the machine.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    std::fs::write(&name, bytes)?;
    std::fs::rename(&name, path)
}
