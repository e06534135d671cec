//! `walship init`: the only command that creates a repository's root.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::repository::{ClusterName, ClusterRepository, LineageRepository, Repository};
use walship::storage::{self, StorageConfig};

use super::record;
use super::server::{self, Identity, Setting};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  PGUSER=postgres walship init --repo file:///srv/walship --cluster main
  walship init --config /etc/walship/walship.toml --apply
  walship init --data-dir /var/lib/postgresql/15/main      (no connection; settings are not looked at)

Running it again is harmless.")]
pub(super) struct Args {
    /// Set what is missing with ALTER SYSTEM instead of printing it
    #[arg(long, conflicts_with = "data_dir")]
    apply: bool,
    /// Register a new lineage: after pg_upgrade, a fresh initdb, pg_resetwal, or another segment size
    #[arg(long)]
    new_lineage: bool,
    /// Read who the server is from its data directory instead of connecting to it
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    cluster: String,
    server: Identity,
    repositories: Vec<RepositoryReport>,
    /// Empty when there was no connection.
    settings: Vec<Setting>,
}

#[derive(Debug, Serialize)]
struct RepositoryReport {
    location: String,
    lineage: u32,
    /// Whether this call has registered the lineage.
    registered: bool,
    /// What the store does less well than it could.
    warnings: Vec<String>,
}

pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let name: ClusterName = config.cluster.parse()?;
    let mut connection = match &args.data_dir {
        Some(_) => None,
        None => Some(server::connect(&config).await?),
    };
    let identity = match (&args.data_dir, &mut connection) {
        (Some(data_dir), _) => server::identity_of(data_dir)?,
        (None, Some(connection)) => server::identity(connection).await?,
        (None, None) => return Err(Error::invalid("neither a server nor a data directory is named")),
    };
    let now = Utc::now();
    let (mut repositories, mut lineages) = (Vec::new(), Vec::new());
    for repository in &config.repositories {
        let (report, lineage) =
            init_one(repository, &config, &name, &identity, args.new_lineage, now).await?;
        repositories.push(report);
        lineages.push(lineage);
    }
    let (mut settings, mut applied) = (Vec::new(), Ok(()));
    if let Some(connection) = &mut connection {
        settings = server::settings(connection, &server::proposed_archive_command(overrides)).await?;
        if args.apply {
            applied = server::apply(connection, &mut settings).await;
        }
    }
    let set: Vec<String> = settings
        .iter()
        .filter(|setting| setting.applied)
        .map(|setting| format!("{} = {}", setting.name, setting.wanted.as_deref().unwrap_or_default()))
        .collect();
    if !set.is_empty() {
        let text = format!("ALTER SYSTEM: {}", set.join(", "));
        record::change(&lineages, "settings_changed", text, None).await;
    }
    applied?;
    let report = Report { cluster: config.cluster.clone(), server: identity, repositories, settings };
    super::print_report(&report, args.json, || text(&report, connection.is_some()))?;
    Ok(0)
}

async fn init_one(
    config: &StorageConfig,
    whole: &Config,
    name: &ClusterName,
    server: &Identity,
    new_lineage: bool,
    now: DateTime<Utc>,
) -> Result<(RepositoryReport, LineageRepository)> {
    let storage = storage::create_root(config)?;
    let warnings = super::open::probe(&*storage, whole.accept_unsafe_store).await?;
    let cluster = Repository::create(storage, now).await?.create_cluster(name, now).await?;
    let (lineage, registered) = lineage(&cluster, server, new_lineage, now).await?;
    if registered {
        let mut text = format!(
            "lineage {} of system identifier {}, PostgreSQL {}, segments of {}",
            lineage.lineage().number,
            server.system_identifier,
            server.postgres_major,
            server.segment_size
        );
        if new_lineage {
            text += " (--new-lineage)";
        }
        if whole.accept_unsafe_store {
            text += "; accept_unsafe_store is on";
        }
        record::change(std::slice::from_ref(&lineage), "lineage_registered", text, None).await;
    }
    let report = RepositoryReport {
        location: lineage.location(),
        lineage: lineage.lineage().number,
        registered,
        warnings,
    };
    Ok((report, lineage))
}

/// Returns the server's lineage and whether it was registered now.
async fn lineage(
    cluster: &ClusterRepository,
    server: &Identity,
    new_lineage: bool,
    now: DateTime<Utc>,
) -> Result<(LineageRepository, bool)> {
    let known = cluster.lineages().await?;
    if !new_lineage && !known.is_empty() {
        let found = cluster.lineage_of(server.system_identifier, server.segment_size).await;
        return found.map(|lineage| (lineage, false)).map_err(|error| {
            error.with_next(
                "Choose another cluster name for this server. If the server was upgraded, initialised anew or given \
                 another segment size, and only then, run `walship init --new-lineage`.",
            )
        });
    }
    let lineage = cluster
        .register_lineage(server.system_identifier, server.segment_size, server.postgres_major, now)
        .await?;
    Ok((lineage, true))
}

fn text(report: &Report, connected: bool) -> String {
    let server = &report.server;
    let mut text = format!(
        "cluster \"{}\": PostgreSQL {}, system identifier {}, segments of {}\n",
        report.cluster, server.postgres_major, server.system_identifier, server.segment_size
    );
    for repository in &report.repositories {
        let done = if repository.registered { "ready, newly registered" } else { "ready, known already" };
        text += &format!("{}: {done}\n", repository.location);
        for warning in &repository.warnings {
            text += &format!("  warning: {warning}\n");
        }
    }
    if connected {
        text += "settings of the server:\n";
        text += &server::settings_text(&report.settings);
        if report.settings.iter().any(|setting| setting.wanted.is_some() && !setting.applied) {
            text += "`walship init --apply` sets them with ALTER SYSTEM.\n";
        }
    } else {
        text += "The server's settings were not looked at; `walship check` does that.\n";
    }
    text
}
