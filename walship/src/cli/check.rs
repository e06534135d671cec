//! `walship check`: finds out what is wrong and says how to mend it.

mod monitor;

use chrono::{TimeDelta, Utc};
use serde::Serialize;
use walship::catalog::Catalog;
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::feed::{clock_ahead, clock_text};
use walship::pg::WalFileName;
use walship::replication::connection::Connection;
use walship::replication::{ServerPosition, server_position};
use walship::repository::{ClusterName, ClusterRepository, LineageRepository, load_catalog};
use walship::storage::{self, StorageConfig};

use super::server::{self, Identity, Weight};
use super::synchronous;

pub(super) use monitor::{is_for_monitor, run as monitor, unknown};

/// What is younger may be part of a backup that runs.
const UNDER_WAY: TimeDelta = TimeDelta::days(1);

/// More would hide the rest of the report.
const UNFINISHED_SHOWN_MAX: usize = 20;

/// As many full segments may wait for an archiver that keeps up.
const BEHIND_SEGMENTS_MAX: u64 = 4;

/// A receiver that runs removes parts a moment after their segment is stored.
const PARTS_LEFT_MAX: usize = 1000;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  walship check
  walship check --monitor --timeout 50

--monitor is for Nagios, Icinga and others that run plugins: one line with performance data, then one for each problem; \
beside what is found here it looks at what `rpo`, `rto` and [watch] in the configuration say (docs/monitoring.md).

Exit status:
  0  nothing is wrong (advice may be printed)
  1  something is
  2  the command line makes no sense
With --monitor: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.")]
pub(super) struct Args {
    /// Look at the repositories only, not at the server
    #[arg(long)]
    offline: bool,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// Answer as a plugin of a monitor does, with its exit statuses
    #[arg(long)]
    monitor: bool,
    /// With --monitor: seconds after which the answer is CRITICAL
    #[arg(long, value_name = "SECONDS", default_value_t = 50, requires = "monitor", value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

impl Args {
    pub(super) fn is_for_monitor(&self) -> bool {
        self.monitor
    }
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    weight: Weight,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
    /// Advice that is a matter of taste, or of the store: nothing a monitor should speak of for ever.
    #[serde(skip)]
    is_lasting: bool,
}

#[derive(Debug, Default, Serialize)]
struct Findings {
    findings: Vec<Finding>,
}

pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let mut findings = Findings::default();
    check(&config, args.offline, overrides, &mut findings).await?;
    super::print_report(&findings, args.json, || findings.text())?;
    Ok(u8::from(findings.findings.iter().any(|finding| finding.weight == Weight::Needed)))
}

async fn check(config: &Config, offline: bool, overrides: &Overrides, findings: &mut Findings) -> Result<()> {
    let name: ClusterName = config.cluster.parse()?;
    let mut server = None;
    if !offline {
        match check_server(config, overrides, findings).await {
            Ok(found) => server = Some(found),
            Err(error) => findings.failed(&error),
        }
    }
    for repository in &config.repositories {
        if let Err(error) = check_repository(repository, config, &name, server.as_ref(), findings).await {
            findings.failed(&error);
        }
    }
    Ok(())
}

/// What the server said that the repositories are compared with.
struct Server {
    identity: Identity,
    /// The file with which the archiver failed last, when nothing was archived since.
    failing: Option<WalFileName>,
    position: ServerPosition,
}

async fn check_server(config: &Config, overrides: &Overrides, findings: &mut Findings) -> Result<Server> {
    let mut connection = server::connect(config).await?;
    let identity = server::identity(&mut connection).await?;
    findings.good(format!(
        "connected: PostgreSQL {}, system identifier {}, segments of {}",
        identity.postgres_major, identity.system_identifier, identity.segment_size
    ));
    check_clock(&mut connection, findings).await?;
    let receiving = synchronous::check(config, &mut connection).await?;
    let command = server::proposed_archive_command(overrides);
    for setting in server::settings(&mut connection, &command).await? {
        let (name, value) = (setting.name, &setting.value);
        let restart = if setting.restart { ", then restart the server" } else { ", then reload" };
        let what = format!("{name} is '{value}'");
        // Who streams needs no archiver.
        let instead = receiving.streaming && setting.name.starts_with("archive_");
        match setting.weight {
            Weight::Good => findings.good(what),
            _ if instead => findings.good(format!("{what}; `walship receive` streams WAL instead")),
            weight => {
                let next = setting.wanted.map(|wanted| format!("Set {name} = '{wanted}'{restart}."));
                findings.lasting(weight, format!("{what}: {}", setting.why), next);
            }
        }
    }
    for (weight, what, next) in receiving.findings {
        findings.add(weight, what, next);
    }
    let failing = check_archiver(&mut connection, receiving.streaming, findings).await?;
    let position = server_position(&mut connection).await?;
    connection.close().await;
    Ok(Server { identity, failing, position })
}

/// Compares the server's clock with this machine's.
async fn check_clock(connection: &mut Connection, findings: &mut Findings) -> Result<()> {
    let now = || chrono::Utc::now().timestamp_micros();
    let asked = now();
    let rows = connection.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").await?;
    let ahead = rows
        .get(0, 0)
        .and_then(|text| text.parse().ok())
        .and_then(|server| clock_ahead(server, asked, now()));
    if let Some(ahead) = ahead {
        let next = "Set both clocks right (NTP); until then take times for targets from `pitr log`.";
        findings.add(Weight::Advice, clock_text("the server", ahead), Some(next.to_owned()));
    }
    Ok(())
}

/// Looks at the archiver's statistics; returns the file that it cannot archive, if there is one.
async fn check_archiver(
    connection: &mut Connection,
    streaming: bool,
    findings: &mut Findings,
) -> Result<Option<WalFileName>> {
    let sql = "SELECT archived_count, coalesce(last_archived_wal, ''), failed_count, \
               coalesce(last_failed_wal, ''), \
               coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false), \
               coalesce(last_failed_time::text, '') FROM pg_stat_archiver";
    let rows = connection.query(sql).await?;
    let text = |column| rows.get(0, column).unwrap_or_default().to_owned();
    let failing = text(4) == "t";
    if failing {
        findings.add(
            Weight::Needed,
            format!(
                "the archiver failed last, with {} at {} ({} failures so far)",
                text(3),
                text(5),
                text(2)
            ),
            Some("Look into the server's log: archive-cmd says there what happened.".to_owned()),
        );
    } else if text(1).is_empty() && streaming {
        findings.good("the archiver has archived nothing yet, `walship receive` streams WAL".to_owned());
    } else if text(1).is_empty() {
        findings.add(
            Weight::Advice,
            "the archiver has archived nothing yet".to_owned(),
            Some("Run `SELECT pg_switch_wal()` and check again.".to_owned()),
        );
    } else {
        findings.good(format!("the archiver has archived {} files, the last is {}", text(0), text(1)));
    }
    Ok(if failing { text(3).parse().ok() } else { None })
}

async fn check_repository(
    config: &StorageConfig,
    whole: &Config,
    name: &ClusterName,
    server: Option<&Server>,
    findings: &mut Findings,
) -> Result<()> {
    let storage = storage::open(config)?;
    let location = storage.location();
    let cluster = ClusterRepository::open(storage, name).await?;
    findings.good(format!("{location} holds cluster \"{name}\""));
    for warning in super::open::probe(&**cluster.storage(), whole.accept_unsafe_store).await? {
        findings.lasting(Weight::Advice, format!("{location}: {warning}"), None);
    }
    findings.good(format!("{location} was tried: conditional writes, checksums, what is absent"));
    let lineage = match server {
        Some(Server { identity, .. }) => {
            cluster.lineage_of(identity.system_identifier, identity.segment_size).await?
        }
        None => cluster.newest_lineage().await?,
    };
    check_conflict(&lineage, server.and_then(|server| server.failing), findings).await?;
    check_leftovers(&lineage, findings).await?;
    check_recordless(&lineage, findings).await?;
    let catalog = load_catalog(&lineage).await?;
    check_parts(&lineage, &catalog, findings).await?;
    check_gaps(&lineage, &catalog, findings);
    if let Some(server) = server {
        check_tail(&lineage, &catalog, &server.position, findings);
    }
    check_unfinished(&cluster, findings).await
}

/// Uploads and temporary files that nobody has ended.
async fn check_unfinished(cluster: &ClusterRepository, findings: &mut Findings) -> Result<()> {
    let storage = cluster.storage();
    let location = storage.location();
    let cannot_tell = format!("{location}: cannot tell whether unfinished uploads take room");
    let unfinished = match storage.unfinished(&format!("{}/", cluster.name())).await {
        Ok(Some(unfinished)) => unfinished,
        Ok(None) => {
            let next = "The store does not list uploads; look at the room it uses.".to_owned();
            findings.lasting(Weight::Advice, cannot_tell, Some(next));
            return Ok(());
        }
        Err(error @ Error::Denied(_)) => {
            let next =
                "Grant s3:ListBucketMultipartUploads on the bucket to the credentials that check with.";
            findings.lasting(Weight::Advice, format!("{cannot_tell}: {error}"), Some(next.to_owned()));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let now = Utc::now();
    for unfinished in unfinished.iter().take(UNFINISHED_SHOWN_MAX) {
        let age = unfinished.since.map(|since| now.signed_duration_since(since).max(TimeDelta::zero()));
        let (weight, text) = match age {
            Some(age) if age < UNDER_WAY => {
                (Weight::Good, format!("{} old, probably under way", age_text(age)))
            }
            Some(age) => (Weight::Advice, format!("{} old, left behind", age_text(age))),
            None => (Weight::Advice, "of unknown age".to_owned()),
        };
        let next = (weight != Weight::Good).then(|| unfinished.mend.clone());
        findings.add(weight, format!("{} is {text}", unfinished.what), next);
    }
    match unfinished.len() {
        0 => findings.good(format!("{location} holds no unfinished uploads of this cluster")),
        many if many > UNFINISHED_SHOWN_MAX => {
            let more = many - UNFINISHED_SHOWN_MAX;
            findings.add(Weight::Advice, format!("{location} holds {more} more unfinished uploads"), None);
        }
        _ => {}
    }
    Ok(())
}

fn age_text(age: TimeDelta) -> String {
    match (age.num_days(), age.num_hours(), age.num_minutes()) {
        (0, 0, 0) => format!("{} s", age.num_seconds()),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, _) => format!("{hours} h"),
        (days, ..) => format!("{days} days"),
    }
}

/// A segment that the server cannot archive and that is stored already: most likely with other content.
async fn check_conflict(
    lineage: &LineageRepository,
    failing: Option<WalFileName>,
    findings: &mut Findings,
) -> Result<()> {
    let Some(WalFileName::Segment(name)) = failing else { return Ok(()) };
    let Some(stored) = lineage.summarized(name).await? else { return Ok(()) };
    findings.add(
        Weight::Needed,
        format!(
            "{name}, which the archiver cannot archive, is already stored in {} (digest {}): a conflict, if the \
             server's log says \"other content\"",
            lineage.location(),
            stored.digest
        ),
        Some(
            "Find out which server archived it; \"When a segment is stored with other content\" in \
             docs/repository-format.md has the steps."
                .to_owned(),
        ),
    );
    Ok(())
}

/// Gaps of the ledger whose WAL is not there.
fn check_gaps(lineage: &LineageRepository, catalog: &Catalog, findings: &mut Findings) {
    let newest = catalog.backups.iter().map(|backup| backup.start_lsn).max();
    // What was removed on purpose is nobody's trouble.
    let open = || catalog.gaps.iter().filter(|gap| !gap.is_expired());
    for gap in open() {
        let (from, to) = (gap.start_lsn, gap.end_lsn);
        let what = format!(
            "{}: WAL of timeline {} from {from} to {to} is missing: {gap}",
            lineage.location(),
            gap.timeline
        );
        // Whatever is wanted from behind it is restored from a backup behind it.
        let next = if newest.is_some_and(|start| start >= to) {
            "If the segment turns up, push it with `walship wal push`: that closes the gap."
        } else {
            "Take a base backup (`walship backup`): nothing behind the gap can be restored without. If the segment \
             turns up, push it with `walship wal push`: that closes the gap."
        };
        findings.add(Weight::Advice, what, Some(next.to_owned()));
    }
    if open().next().is_none() {
        findings.good(format!("the ledger of gaps in {} has no open one", lineage.location()));
    }
    for (timeline, last) in &catalog.lost_ends {
        findings.add(
            Weight::Needed,
            format!(
                "{}: the end of timeline {timeline} is gone: the index knows of WAL up to segment {last}, which is \
                 not stored",
                lineage.location()
            ),
            Some("Find out who removed it, or whether this is an older copy of the repository.".to_owned()),
        );
    }
}

/// What the server has written and the repository does not hold.
fn check_tail(
    lineage: &LineageRepository,
    catalog: &Catalog,
    server: &ServerPosition,
    findings: &mut Findings,
) {
    let location = lineage.location();
    let ServerPosition { timeline, wal_lsn, .. } = server;
    let Some(end) = catalog.stored_until(*timeline) else {
        let next = "Run `SELECT pg_switch_wal()` and check again.".to_owned();
        let what = format!("{location} holds no WAL yet of timeline {timeline}, which the server is on");
        return findings.add(Weight::Advice, what, Some(next));
    };
    let behind = wal_lsn.0.saturating_sub(end.0);
    let segments = behind / server.segment_size.bytes();
    let what = format!(
        "{location} ends at {end} on timeline {timeline}, the server at {wal_lsn}: {segments} full segments behind"
    );
    if segments < BEHIND_SEGMENTS_MAX {
        return findings.good(what);
    }
    let next = "Look at the archiver's findings above, and at how long one segment takes to be archived.";
    findings.add(Weight::Advice, what, Some(next.to_owned()));
}

/// Parts of segments that are stored whole: nobody reads them any more.
async fn check_parts(lineage: &LineageRepository, catalog: &Catalog, findings: &mut Findings) -> Result<()> {
    let parts = lineage.parts_of_whole_segments(catalog).await?;
    let what = format!("{}: {parts} parts of segments that are stored whole", lineage.location());
    if parts < PARTS_LEFT_MAX {
        findings.good(what);
    } else {
        let next = "Nobody reads them; remove them below tail/ where their segment lies below wal/, by whoever may delete.";
        findings.add(Weight::Advice, what, Some(next.to_owned()));
    }
    Ok(())
}

async fn check_leftovers(lineage: &LineageRepository, findings: &mut Findings) -> Result<()> {
    let leftovers = lineage.leftovers().await?;
    for leftover in &leftovers {
        let (what, next) = if leftover.is_copy {
            (
                format!("a stored object is damaged; {} is its good copy", leftover.location),
                "Nothing is lost; look for the cause in the store.".to_owned(),
            )
        } else {
            (
                format!("{} is no whole segment and is never served", leftover.location),
                format!(
                    "If {} is missing in the repository, push the whole file from a server that has it.",
                    leftover.name
                ),
            )
        };
        findings.add(Weight::Advice, what, Some(next));
    }
    if leftovers.is_empty() {
        findings.good(format!("{} holds no damaged and no incomplete segments", lineage.location()));
    }
    Ok(())
}

/// Backups without a record: under way, or ended early.
async fn check_recordless(lineage: &LineageRepository, findings: &mut Findings) -> Result<()> {
    let begun = lineage.unfinished_backups().await?;
    let location = lineage.location();
    let Some(oldest) = begun.iter().map(|backup| backup.started).min() else {
        findings.good(format!("{location} holds no incomplete backups"));
        return Ok(());
    };
    let shown: Vec<_> = begun.iter().take(UNFINISHED_SHOWN_MAX).map(|backup| &*backup.id).collect();
    let more = if begun.len() > shown.len() { ", ..." } else { "" };
    let what = format!(
        "{location} holds incomplete backups, never restored from: {}: {}{more}",
        begun.len(),
        shown.join(", ")
    );
    if Utc::now().signed_duration_since(oldest) < UNDER_WAY {
        findings.good(format!("{what}; a backup that runs is one of them until it ends"));
        return Ok(());
    }
    let next = "`walship backup --source local` takes over what is still right of them, and `pitr expire` removes them \
                when nothing was stored for them for a week.";
    findings.lasting(Weight::Advice, what, Some(next.to_owned()));
    Ok(())
}

impl Findings {
    fn add(&mut self, weight: Weight, what: String, next: Option<String>) {
        self.findings.push(Finding { weight, what, next, is_lasting: false });
    }

    fn lasting(&mut self, weight: Weight, what: String, next: Option<String>) {
        self.findings.push(Finding { weight, what, next, is_lasting: true });
    }

    fn good(&mut self, what: String) {
        self.add(Weight::Good, what, None);
    }

    fn failed(&mut self, error: &Error) {
        self.add(Weight::Needed, error.to_string(), Some(error.next().to_owned()));
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let word = match finding.weight {
                Weight::Good => "ok     ",
                Weight::Advice => "advice ",
                Weight::Needed => "WRONG  ",
            };
            text += &format!("{word}{}\n", finding.what);
            if let Some(next) = &finding.next {
                text += &format!("       {next}\n");
            }
        }
        text
    }
}
