//! Looks at repositories, server and disks, for what `watch` judges. Few requests, each within a bound, and never more than
//! one look at a time.
//!
//! What could not be read keeps what was seen of it last: a repository that is away does not make its last backup unknown.

mod alone;
mod disk;
mod repository;
mod server;

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::replication::options::ConnectOptions;
use crate::repository::ClusterName;
use crate::storage::{Location, StorageConfig};
use crate::watch::{Contents, Disk, DiskPlace, Facts, Limits, RepositoryFacts, ServerAnswer, Transactions};

use alone::Alone;
use repository::Memory;
pub use server::Identity;

/// How long the server may take to answer all that it is asked.
const SERVER_PATIENCE: Duration = Duration::from_secs(20);

/// How long the local file system may take to say how full it is.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

/// Looks, again and again, and remembers.
#[derive(Debug)]
pub struct Watcher {
    cluster: ClusterName,
    repositories: Vec<Watched>,
    server: Option<ConnectOptions>,
    server_disks: Alone<Vec<(DiskPlace, Disk)>>,
    transactions: Transactions,
    slot: String,
    limits: Limits,
    patience: Duration,
}

/// What a look at a repository saw that was begun at a time: what it holds, with the store's latency, and its disk.
type Seen = (DateTime<Utc>, Result<(Contents, Duration)>, Option<Disk>);

/// A repository, and what was seen of it.
#[derive(Debug)]
struct Watched {
    config: StorageConfig,
    facts: RepositoryFacts,
    memory: Arc<Mutex<Memory>>,
    looking: Alone<Seen>,
}

impl Watcher {
    /// Returns one that looks at what is configured; without `server` at the repositories only. A look at a repository that
    /// takes longer than `patience` has failed.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a cluster's name or a repository's address that is none.
    pub fn new(config: &Config, server: Option<ConnectOptions>, patience: Duration) -> Result<Self> {
        let nothing_seen = |storage: &StorageConfig| {
            let url = match storage.location()? {
                Location::Folder(root) => format!("file://{}", root.display()),
                Location::S3 { bucket, prefix } if prefix.is_empty() => format!("s3://{bucket}"),
                Location::S3 { bucket, prefix } => format!("s3://{bucket}/{prefix}"),
            };
            let facts = RepositoryFacts {
                url,
                failure: None,
                failures_total: 0,
                latency: None,
                seen: None,
                contents: None,
                disk: None,
            };
            let (memory, looking) = (Arc::default(), Alone::default());
            Ok(Watched { config: storage.clone(), facts, memory, looking })
        };
        Ok(Self {
            cluster: config.cluster.parse()?,
            repositories: config.repositories.iter().map(nothing_seen).collect::<Result<_>>()?,
            server,
            server_disks: Alone::default(),
            transactions: Transactions::default(),
            slot: config.receive.slot.clone().unwrap_or_else(|| "walship".to_owned()),
            limits: Limits::of(config),
            patience,
        })
    }

    /// Returns the cluster's name.
    pub fn cluster(&self) -> &str {
        self.cluster.as_str()
    }

    /// Returns what is measured by.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Looks at everything. `now` is this machine's clock.
    ///
    /// # Cancel safety
    /// What was seen before stays; what this look saw is lost.
    pub async fn look(&mut self, now: DateTime<Utc>) -> Facts {
        let (server, identity) = match &self.server {
            None => (ServerAnswer::NotAsked, None),
            Some(options) => {
                let asked =
                    timeout(SERVER_PATIENCE, server::ask(options, &self.slot, &mut self.transactions)).await;
                match asked.unwrap_or_else(|_| Err(late("the server", SERVER_PATIENCE))) {
                    Ok((mut facts, identity, data_dir)) => {
                        if let Some(path) = data_dir {
                            let look = server::disks(path, identity.system_identifier);
                            facts.disks = self.server_disks.run(DISK_PATIENCE, look).await;
                        }
                        (ServerAnswer::Told(facts), Some(identity))
                    }
                    Err(error) => {
                        let (what, next) = (error.to_string(), error.next().to_owned());
                        (ServerAnswer::Failed { what, next }, None)
                    }
                }
            }
        };
        let (cluster, patience) = (&self.cluster, self.patience);
        let looks = self.repositories.iter_mut().map(|watched| {
            let (config, memory) = (watched.config.clone(), Arc::clone(&watched.memory));
            let (cluster, url) = (cluster.clone(), watched.facts.url.clone());
            let look = async move {
                let mut memory = memory.lock().await;
                let seen = repository::look(&config, &cluster, identity.as_ref(), now, &mut memory).await;
                (now, seen, disk_of(&config).await)
            };
            let seen = watched.looking.run(patience, look);
            async move { seen.await.unwrap_or_else(|| (now, Err(late(&url, patience)), None)) }
        });
        let seen = futures_util::future::join_all(looks).await;
        for (Watched { facts, .. }, (begun, seen, disk)) in self.repositories.iter_mut().zip(seen) {
            facts.disk = disk;
            match seen {
                Ok((contents, latency)) => {
                    facts.failure = None;
                    facts.latency = Some(latency);
                    // One that hung may have read what was there long ago.
                    facts.seen = Some(begun);
                    facts.contents = Some(contents);
                }
                Err(error) => {
                    facts.failure = Some((error.to_string(), error.next().to_owned()));
                    facts.latency = None;
                    facts.failures_total += 1;
                }
            }
        }
        Facts {
            at: now,
            cluster: self.cluster.to_string(),
            repositories: self.repositories.iter().map(|watched| watched.facts.clone()).collect(),
            server,
        }
    }
}

fn late(what: &str, after: Duration) -> Error {
    Error::unavailable(format!("{what} could not be looked at within {} s", after.as_secs().max(1)))
}

/// Returns how full the disk of a repository in a folder is; `None` for others, and when that cannot be told.
async fn disk_of(config: &StorageConfig) -> Option<Disk> {
    let Ok(Location::Folder(root)) = config.location() else { return None };
    let looked = tokio::task::spawn_blocking(move || disk::room(&root));
    timeout(DISK_PATIENCE, looked).await.ok()?.ok()?
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;
    use crate::pg::SegmentSize;
    use crate::repository::Repository;

    #[tokio::test]
    async fn what_a_late_look_brings_is_of_when_it_was_begun() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}", folder.path().display());
        let flags = Overrides { repo: vec![url], cluster: Some("main".into()), ..Default::default() };
        let config = Config::read(&flags, &|_| None).unwrap();
        let at = |second: i64| DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap();
        let storage = crate::storage::create_root(&config.repositories[0]).unwrap();
        let repository = Repository::create(storage, at(0)).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), at(0)).await.unwrap();
        cluster.register_lineage(42, SegmentSize::DEFAULT, 15, at(0)).await.unwrap();

        let mut watcher = Watcher::new(&config, None, Duration::from_millis(50)).unwrap();
        let hung = Arc::clone(&watcher.repositories[0].memory).lock_owned().await;
        let facts = watcher.look(at(10)).await;
        assert!(facts.repositories[0].failure.is_some() && facts.repositories[0].seen.is_none());
        drop(hung);
        watcher.patience = Duration::from_secs(60);
        let facts = watcher.look(at(1000)).await;
        assert_eq!(facts.repositories[0].failure, None);
        assert_eq!((facts.at, facts.repositories[0].seen), (at(1000), Some(at(10))));
        assert_eq!(watcher.look(at(1060)).await.repositories[0].seen, Some(at(1060)));
    }

    #[tokio::test]
    async fn a_data_directory_that_hangs_is_looked_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("global/pg_control");
        std::fs::create_dir(folder.path().join("global")).unwrap();
        nix::unistd::mkfifo(&control, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut alone = Alone::default();
        let look = || server::disks(folder.path().to_owned(), 42);
        for _ in 0..3 {
            assert_eq!(alone.run(Duration::from_millis(20), look()).await, None);
        }
        // With a writer it is open for all that have waited to open it.
        let gate = std::fs::OpenOptions::new().write(true).open(&control).unwrap();
        assert_eq!(alone.run(Duration::from_millis(200), look()).await, None);
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let open =
            open.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == control));
        assert_eq!(open.count(), 2, "ours, and one that reads");
        drop(gate);
        assert_eq!(
            alone.run(Duration::from_secs(60), look()).await,
            Some(Vec::new()),
            "it is no control file"
        );
    }
}
