//! Repositories that are opened once and used for a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::archive::fetch::{OpenClusters, Opening};
use crate::error::Result;
use crate::repository::{ClusterName, ClusterRepository};
use crate::storage::{self, Location, StorageConfig};

/// So long an opened repository is used before it is looked at again.
const WARM: Duration = Duration::from_secs(60);

/// The cluster's part of every configured repository.
#[derive(Debug)]
pub(super) struct Warm {
    cluster: ClusterName,
    repositories: Vec<(StorageConfig, Opened)>,
}

/// What was opened, and when.
type Opened = Mutex<Option<(Instant, ClusterRepository)>>;

impl Warm {
    pub(super) fn new(repositories: Vec<StorageConfig>, cluster: ClusterName) -> Self {
        let cold = |config| (config, Mutex::new(None));
        Self { cluster, repositories: repositories.into_iter().map(cold).collect() }
    }

    /// Opens everything anew next time: something failed, perhaps because of what was remembered (credentials
    /// that have changed, say).
    pub(super) fn forget(&self) {
        for (_, opened) in &self.repositories {
            *opened.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    async fn open_one(&self, config: &StorageConfig, opened: &Opened) -> Result<ClusterRepository> {
        let known = opened.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((since, cluster)) = known
            && since.elapsed() < WARM
        {
            return Ok(cluster);
        }
        let storage = storage::open(config)?;
        let cluster = ClusterRepository::open(storage, &self.cluster).await?;
        if is_folder(config) {
            // Opening one costs next to nothing, and one that is held open could not be unmounted.
            return Ok(cluster);
        }
        let cluster = cluster.remembering();
        *opened.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), cluster.clone()));
        Ok(cluster)
    }
}

fn is_folder(config: &StorageConfig) -> bool {
    matches!(config.location(), Ok(Location::Folder(_)))
}

impl OpenClusters for Warm {
    fn open(&self) -> Vec<Opening<'_>> {
        self.repositories
            .iter()
            .map(|(config, opened)| -> Opening<'_> { Box::pin(self.open_one(config, opened)) })
            .collect()
    }
}
