//! Hands out what is watched: metrics over HTTP and in a file, notices by webhook and command.
//!
//! One loop looks, at its own pace; whoever scrapes gets what was seen last. So no scrape reaches a repository, and a
//! repository that hangs makes no scrape wait.

pub mod exposition;
mod http;
mod notify;
mod webhook;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::sync::watch;

use crate::config::NotifySettings;
use crate::error::{Error, Result};
use crate::observe::Watcher;
use crate::watch::metrics::samples;
use crate::watch::problems;

use notify::Notifier;

/// A look that is late by so many intervals and the patience of one makes `/healthz` say so.
const LATE_INTERVALS: u32 = 3;

/// What is served, and how often is looked.
#[derive(Debug)]
pub struct ServeOptions {
    /// The address to listen on.
    pub listen: SocketAddr,
    /// From one look to the next.
    pub interval: Duration,
    /// How long one look may take: what the watcher was given.
    pub patience: Duration,
    /// Who is told.
    pub notify: NotifySettings,
    /// Where it is kept what was told; `None`: nowhere, and a restart tells again.
    pub state: Option<PathBuf>,
}

/// What is seen by all connections.
#[derive(Debug)]
struct Shown {
    metrics: Mutex<Arc<str>>,
    looked: Mutex<Instant>,
    /// `/healthz` is well so long after a look.
    fresh: Duration,
}

impl Shown {
    fn metrics(&self) -> Arc<str> {
        Arc::clone(&self.metrics.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_fresh(&self) -> bool {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner).elapsed() <= self.fresh
    }

    fn show(&self, metrics: &str) {
        *self.metrics.lock().unwrap_or_else(PoisonError::into_inner) = metrics.into();
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Serves until `stop` says so. `ready` hears the address once it is listened on and everything was looked at once.
///
/// # Errors
/// [`Error::Invalid`] for a webhook that is none, and for an address that another has; what reading the state says.
pub async fn serve(
    mut watcher: Watcher,
    options: ServeOptions,
    mut stop: watch::Receiver<bool>,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let listener = http::listen(options.listen).await?;
    let address = listener.local_addr().map_err(|error| Error::from_io("listening", error))?;
    let mut notifier = Notifier::new(&options.notify, watcher.cluster(), options.state).await?;
    let shown = Arc::new(Shown {
        metrics: Mutex::new("".into()),
        looked: Mutex::new(Instant::now()),
        fresh: options.interval * LATE_INTERVALS + options.patience * 2,
    });
    let (mut first, mut server) = (Some((listener, ready)), None);
    loop {
        let began = Instant::now();
        let facts = tokio::select! {
            facts = watcher.look(Utc::now()) => facts,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let limits = *watcher.limits();
        let problems = problems(&facts, &limits);
        let notices = match &mut notifier {
            Some(notifier) => {
                notifier.step(&problems, &facts).await;
                Some(notifier.notices())
            }
            None => None,
        };
        shown.show(&exposition::text(&samples(&facts, &problems, &limits, notices))?);
        // What is scraped is never empty: the first look comes first.
        if let Some((listener, ready)) = first.take() {
            server = Some(tokio::spawn(http::serve(listener, Arc::clone(&shown))));
            ready(address);
        }
        let rest = options.interval.saturating_sub(began.elapsed()).max(options.interval / 10);
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    if let Some(server) = server {
        server.abort();
    }
    if let Some(notifier) = notifier {
        notifier.end().await;
    }
    Ok(())
}
