//! `walship check`: finds out what is wrong and says how to mend it.

use serde::Serialize;
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::replication::connection::Connection;
use walship::repository::{ClusterName, ClusterRepository, LineageRepository};
use walship::storage::{self, StorageConfig};

use super::server::{self, Identity, Weight};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status:
  0  nothing is wrong (advice may be printed)
  1  something is
  2  the command line makes no sense")]
pub(super) struct Args {
    /// Look at the repositories only, not at the server
    #[arg(long)]
    offline: bool,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    weight: Weight,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct Findings {
    findings: Vec<Finding>,
}

pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let name: ClusterName = config.cluster.parse()?;
    let mut findings = Findings::default();
    let mut identity = None;
    if !args.offline {
        match check_server(&config, overrides, &mut findings).await {
            Ok(found) => identity = Some(found),
            Err(error) => findings.failed(&error),
        }
    }
    for repository in &config.repositories {
        if let Err(error) =
            check_repository(repository, &config, &name, identity.as_ref(), &mut findings).await
        {
            findings.failed(&error);
        }
    }
    super::print_report(&findings, args.json, || findings.text())?;
    Ok(u8::from(findings.findings.iter().any(|finding| finding.weight == Weight::Needed)))
}

async fn check_server(config: &Config, overrides: &Overrides, findings: &mut Findings) -> Result<Identity> {
    let mut connection = server::connect(config).await?;
    let identity = server::identity(&mut connection).await?;
    findings.good(format!(
        "connected: PostgreSQL {}, system identifier {}, segments of {}",
        identity.postgres_major, identity.system_identifier, identity.segment_size
    ));
    let command = server::proposed_archive_command(overrides);
    for setting in server::settings(&mut connection, &command).await? {
        let (name, value) = (setting.name, &setting.value);
        let restart = if setting.restart { ", then restart the server" } else { ", then reload" };
        let what = format!("{name} is '{value}'");
        match setting.weight {
            Weight::Good => findings.good(what),
            weight => findings.add(
                weight,
                format!("{what}: {}", setting.why),
                setting.wanted.map(|wanted| format!("Set {name} = '{wanted}'{restart}.")),
            ),
        }
    }
    check_archiver(&mut connection, findings).await?;
    connection.close().await;
    Ok(identity)
}

async fn check_archiver(connection: &mut Connection, findings: &mut Findings) -> Result<()> {
    let sql = "SELECT archived_count, coalesce(last_archived_wal, ''), failed_count, \
               coalesce(last_failed_wal, ''), \
               coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false), \
               coalesce(last_failed_time::text, '') FROM pg_stat_archiver";
    let rows = connection.query(sql).await?;
    let text = |column| rows.get(0, column).unwrap_or_default().to_owned();
    if text(4) == "t" {
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
    } else if text(1).is_empty() {
        findings.add(
            Weight::Advice,
            "the archiver has archived nothing yet".to_owned(),
            Some("Run `SELECT pg_switch_wal()` and check again.".to_owned()),
        );
    } else {
        findings.good(format!("the archiver has archived {} files, the last is {}", text(0), text(1)));
    }
    Ok(())
}

async fn check_repository(
    config: &StorageConfig,
    whole: &Config,
    name: &ClusterName,
    server: Option<&Identity>,
    findings: &mut Findings,
) -> Result<()> {
    let storage = storage::open(config)?;
    let location = storage.location();
    let cluster = ClusterRepository::open(storage, name).await?;
    findings.good(format!("{location} holds cluster \"{name}\""));
    for warning in super::open::probe(&**cluster.storage(), whole.accept_unsafe_store).await? {
        findings.add(Weight::Advice, format!("{location}: {warning}"), None);
    }
    findings.good(format!("{location} was tried: conditional writes, checksums, what is absent"));
    let lineage = match server {
        Some(server) => cluster.lineage_of(server.system_identifier, server.segment_size).await?,
        None => cluster.newest_lineage().await?,
    };
    check_leftovers(&lineage, findings).await
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
        findings.good(format!("{} holds no damaged and no incomplete objects", lineage.location()));
    }
    Ok(())
}

impl Findings {
    fn add(&mut self, weight: Weight, what: String, next: Option<String>) {
        self.findings.push(Finding { weight, what, next });
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
