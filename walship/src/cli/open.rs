//! Opens what the configuration names.

use walship::archive::fetch::OpenClusters;
use walship::config::Config;
use walship::error::Result;
use walship::repository::{ClusterName, ClusterRepository};
use walship::storage::{self, StorageConfig};

/// The cluster's part of every configured repository, opened when asked for.
pub(crate) struct Configured<'a> {
    repositories: &'a [StorageConfig],
    cluster: ClusterName,
}

impl<'a> Configured<'a> {
    pub(crate) fn new(config: &'a Config) -> Result<Self> {
        Ok(Self { repositories: &config.repositories, cluster: config.cluster.parse()? })
    }

    /// Returns them all, or the first reason why not.
    pub(crate) async fn open_all(&self) -> Result<Vec<ClusterRepository>> {
        self.open().await.into_iter().collect()
    }
}

#[async_trait::async_trait]
impl OpenClusters for Configured<'_> {
    async fn open(&self) -> Vec<Result<ClusterRepository>> {
        let open = self
            .repositories
            .iter()
            .map(async |config| ClusterRepository::open(storage::open(config)?, &self.cluster).await);
        futures_util::future::join_all(open).await
    }
}

/// Tries a store out and returns what is worth a warning.
///
/// # Errors
/// The verdict on a store that breaks an essential promise, unless `accept_unsafe`: then it is a warning.
pub(crate) async fn probe(storage: &dyn storage::Storage, accept_unsafe: bool) -> Result<Vec<String>> {
    let report = walship::repository::probe::probe(storage).await?;
    let mut warnings = report.cautions();
    match report.verdict() {
        Err(error) if accept_unsafe => warnings.push(format!("{error}; accepted by accept_unsafe_store")),
        verdict => verdict?,
    }
    Ok(warnings)
}
