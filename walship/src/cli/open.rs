//! Opens what the configuration names.

use walship::archive::fetch::{OpenClusters, Opening};
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
        self.open_each().await.into_iter().collect()
    }

    /// Returns them all, or for each why it cannot be opened.
    pub(crate) async fn open_each(&self) -> Vec<Result<ClusterRepository>> {
        futures_util::future::join_all(self.open()).await
    }

    async fn open_one(&self, config: &StorageConfig) -> Result<ClusterRepository> {
        ClusterRepository::open(storage::open(config)?, &self.cluster).await
    }
}

impl OpenClusters for Configured<'_> {
    fn open(&self) -> Vec<Opening<'_>> {
        self.repositories.iter().map(|config| -> Opening<'_> { Box::pin(self.open_one(config)) }).collect()
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
