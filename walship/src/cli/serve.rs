//! `walship serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use chrono::Utc;
use walship::config::{Config, Overrides};
use walship::error::Result;
use walship::observe::Watcher;
use walship::serve::{ServeOptions, exposition, serve};
use walship::watch::metrics::samples;
use walship::watch::{ServerAnswer, problems};

/// A look may take at least so long, however short the interval.
const PATIENCE_MIN: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
// Each paragraph is one line: it is wrapped to the terminal's width.
#[command(after_help = "\
Examples:
  walship serve
  walship serve --listen 0.0.0.0:19187 --interval 30
  walship serve --textfile /var/lib/prometheus/node-exporter/walship.prom

Looks at the repositories and the server every --interval, whoever scrapes and how often: /metrics answers with what was \
seen last, also while a repository is away, and /healthz whether it still looks. It listens for this machine only unless \
--listen says otherwise: whoever reaches the port reads the metrics. [notify] in the configuration says who is told of \
problems; docs/monitoring.md lists the metrics, the problems and the keys.

Runs until SIGTERM or SIGINT.

Exit status:
  0  told to end, or the file is written
  1  it cannot begin, or the file cannot be written; the message says why
  2  the command line makes no sense")]
pub(super) struct Args {
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:19187")]
    listen: SocketAddr,
    /// Seconds from one look to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Look once, write the metrics for node_exporter's textfile collector to this file, whose name ends in .prom, and end
    #[arg(long, value_name = "FILE", conflicts_with_all = ["listen", "interval"])]
    textfile: Option<PathBuf>,
    /// Look at the repositories only, not at the server
    #[arg(long)]
    offline: bool,
}

pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let interval = Duration::from_secs(args.interval);
    let patience = interval.max(PATIENCE_MIN);
    let watcher = watcher(&config, args.offline, patience)?;
    if let Some(path) = &args.textfile {
        return write_once(watcher, path.clone()).await;
    }
    let stop = super::receive::stop_signals()?;
    let state = config.state_dir.as_ref().map(|folder| folder.join(format!("serve-{}.json", config.cluster)));
    let options =
        ServeOptions { listen: args.listen, interval, patience, notify: config.notify.clone(), state };
    serve(watcher, options, stop, |address| super::say(&format!("listening on http://{address}/metrics")))
        .await?;
    Ok(0)
}

/// Returns what looks at the configured repositories and, unless `offline`, the server.
pub(super) fn watcher(config: &Config, offline: bool, patience: Duration) -> Result<Watcher> {
    let server = if offline { None } else { Some(super::server::options(config)?) };
    Watcher::new(config, server, patience)
}

async fn write_once(mut watcher: Watcher, path: PathBuf) -> Result<u8> {
    let facts = watcher.look(Utc::now()).await;
    if let ServerAnswer::Failed { what, .. } = &facts.server {
        super::say(&format!("warning: {what}"));
    }
    for failure in facts.repositories.iter().filter_map(|repository| repository.failure.as_ref()) {
        super::say(&format!("warning: {}", failure.0));
    }
    let limits = *watcher.limits();
    let problems = problems(&facts, &limits);
    exposition::write_file(&path, &exposition::text(&samples(&facts, &problems, &limits, None))?)?;
    Ok(0)
}
