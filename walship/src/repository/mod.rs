//! What is stored where: the only room that knows object keys and stored document formats.
//!
//! A [`Repository`] is a storage with a `walship.json`; a [`ClusterRepository`] is one cluster's
//! part of it, a [`LineageRepository`] what belongs to one system identifier. Everything is
//! append-only: writes are put-if-absent, and a taken key is compared, never overwritten.
//! `docs/repository-format.md` is the specification. This room decides nothing about recovery.
//!
//! ```
//! use std::sync::Arc;
//! use walship::pg::SegmentSize;
//! use walship::repository::Repository;
//!
//! # async fn example(storage: Arc<dyn walship::storage::Storage>) -> walship::Result<()> {
//! let now = chrono::Utc::now();
//! let repository = Repository::create(storage, now).await?;
//! let cluster = repository.create_cluster(&"main".parse()?, now).await?;
//! let lineage = cluster.register_lineage(7_123_456_789, SegmentSize::DEFAULT, 15, now).await?;
//! assert_eq!(lineage.lineage().number, 1);
//! # Ok(())
//! # }
//! ```

mod backup_blocks;
mod backups;
mod configured;
mod document;
mod fresh;
mod gaps;
mod history;
mod holds;
pub mod index;
mod layout;
mod listing;
mod load_catalog;
mod load_segments;
mod load_tails;
mod others;
pub mod probe;
mod proven;
mod removal;
mod segments;
mod stored;
mod tails;
#[cfg(feature = "test-util")]
pub mod testing;
mod verify;

use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio::sync::OnceCell;

use crate::catalog::Lineage;
use crate::error::{Error, Result};
use crate::pg::SegmentSize;
use crate::storage::{PutOutcome, Storage, list_all};

pub use backup_blocks::{BackupBlocks, BackupObjects, BlockPlace, FileBlocks, ObjectFiles};
pub use backups::{RecordedBy, new_backup_id};
pub use configured::note_configuration;
pub use document::BackupStarted;
pub use gaps::{CAUSE_BYTES_MAX, ListedGap, new_gap_id};
pub use history::{DrillReportForm, record_head};
pub use holds::{HoldReleased, Mark, REASON_BYTES_MAX, REMAINS_LOOKED_AT_MAX, Recordless, released_now};
pub use layout::ClusterName;
pub use load_catalog::{
    DamagedDocument, Loaded, load_catalog, load_catalog_from_listings, load_what_is_sound,
};
pub use load_tails::load_tails;
pub use others::open_same_lineage;
pub use proven::ProvenBefore;
pub use removal::{RemovedObjects, Remover};
pub use segments::{Leftover, Put, Summarized};
pub use tails::{Damage, ListedPart};
pub use verify::{ListedWal, RollupState, WalObject};

use document::{ClusterDocument, DOCUMENT_VERSION, LineageDocument, RepositoryDocument};
use layout::LineageLayout;

/// More lineages than any cluster ever has.
const LINEAGES_MAX: usize = 10_000;

/// A storage that holds a repository.
#[derive(Debug, Clone)]
pub struct Repository {
    storage: Arc<dyn Storage>,
}

/// One cluster's part of a repository.
#[derive(Debug, Clone)]
pub struct ClusterRepository {
    storage: Arc<dyn Storage>,
    name: ClusterName,
    /// The lineages as they were first read, where they are to be read only once.
    remembered: Option<Arc<OnceCell<Vec<LineageRepository>>>>,
}

/// One lineage's part of a repository: WAL and backups of one system identifier.
#[derive(Debug, Clone)]
pub struct LineageRepository {
    storage: Arc<dyn Storage>,
    cluster: ClusterName,
    lineage: Lineage,
    layout: LineageLayout,
    others: others::Others,
    fresh: fresh::Fresh,
}

impl Repository {
    /// Returns the repository in `storage`.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none, [`Error::Mismatch`] when its format is newer.
    pub async fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let key = layout::repository_document()?;
        match document::read::<RepositoryDocument>(&*storage, &key).await? {
            Some(_) => Ok(Self { storage }),
            None => Err(Error::missing(format!(
                "there is no repository at {}: {key} is not there",
                storage.location()
            ))
            .with_next(
                "Check the repository's address and that it is mounted; `walship init` creates a new one.",
            )),
        }
    }

    /// Returns the repository in `storage`, made now unless it is there already.
    pub async fn create(storage: Arc<dyn Storage>, now: DateTime<Utc>) -> Result<Self> {
        let key = layout::repository_document()?;
        let document =
            RepositoryDocument { format: DOCUMENT_VERSION, product: "walship".to_owned(), created: now };
        match document::put(&*storage, &key, &document).await? {
            PutOutcome::Stored => Ok(Self { storage }),
            PutOutcome::Exists => Self::open(storage).await,
        }
    }

    /// Returns the storage underneath.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns a cluster's part.
    ///
    /// # Errors
    /// [`Error::Missing`] when the cluster was never created here.
    pub async fn cluster(&self, name: &ClusterName) -> Result<ClusterRepository> {
        let key = layout::cluster_document(name)?;
        match document::read::<ClusterDocument>(&*self.storage, &key).await? {
            Some(document) if document.cluster == *name => Ok(self.cluster_unchecked(name)),
            Some(document) => Err(Error::corrupt(format!(
                "{}/{key} says that it belongs to cluster \"{}\"",
                self.storage.location(),
                document.cluster
            ))),
            None => Err(Error::missing(format!("{} holds no cluster \"{name}\"", self.storage.location()))
                .with_next("Check the cluster's name; `walship init` creates a new one.")),
        }
    }

    /// Returns a cluster's part, made now unless it is there already.
    pub async fn create_cluster(&self, name: &ClusterName, now: DateTime<Utc>) -> Result<ClusterRepository> {
        let key = layout::cluster_document(name)?;
        let document = ClusterDocument { format: DOCUMENT_VERSION, cluster: name.clone(), created: now };
        match document::put(&*self.storage, &key, &document).await? {
            PutOutcome::Stored => Ok(self.cluster_unchecked(name)),
            PutOutcome::Exists => self.cluster(name).await,
        }
    }

    fn cluster_unchecked(&self, name: &ClusterName) -> ClusterRepository {
        ClusterRepository { storage: self.storage.clone(), name: name.clone(), remembered: None }
    }
}

impl ClusterRepository {
    /// Returns the cluster `name` of the repository in `storage`, all three documents checked with
    /// requests that run side by side.
    ///
    /// # Errors
    /// [`Error::Missing`] when repository or cluster are not there.
    pub async fn open(storage: Arc<dyn Storage>, name: &ClusterName) -> Result<Self> {
        let cluster = Self { storage: storage.clone(), name: name.clone(), remembered: None };
        let repository = Repository { storage: storage.clone() };
        let (opened, found) = tokio::join!(Repository::open(storage), repository.cluster(name));
        opened?;
        found?;
        Ok(cluster)
    }

    /// Returns the cluster's name.
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// Returns the storage underneath.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns the same, but reads its lineages only once: for a caller that drops it after a while, and
    /// after every failure.
    #[must_use]
    pub fn remembering(self) -> Self {
        Self { remembered: Some(Arc::default()), ..self }
    }

    /// Returns the lineages, oldest first.
    pub async fn lineages(&self) -> Result<Vec<LineageRepository>> {
        match &self.remembered {
            Some(known) => known.get_or_try_init(|| self.list_lineages()).await.cloned(),
            None => self.list_lineages().await,
        }
    }

    async fn list_lineages(&self) -> Result<Vec<LineageRepository>> {
        let prefix = layout::lineages_prefix(&self.name);
        let listed = list_all(&*self.storage, &prefix, LINEAGES_MAX).await?;
        let numbers = listed.iter().filter_map(|meta| layout::lineage_number(&self.name, &meta.key));
        let lineages = futures_util::future::join_all(numbers.map(|number| self.read_lineage(number))).await;
        let mut lineages = lineages.into_iter().collect::<Result<Vec<_>>>()?;
        lineages.sort_by_key(|repository| repository.lineage.number);
        Ok(lineages)
    }

    /// Returns the lineage with this number.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none.
    pub async fn lineage(&self, number: u32) -> Result<LineageRepository> {
        self.read_lineage(number).await
    }

    /// Returns the newest lineage.
    ///
    /// # Errors
    /// [`Error::Missing`] when none was ever registered.
    pub async fn newest_lineage(&self) -> Result<LineageRepository> {
        self.lineages().await?.pop().ok_or_else(|| {
            Error::missing(format!("cluster \"{}\" in {} has no lineage", self.name, self.storage.location()))
                .with_next("Run `walship init` on the database server.")
        })
    }

    /// Returns the newest lineage with this system identifier and segment size.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there is none: this WAL belongs to another cluster.
    pub async fn lineage_of(&self, system_identifier: u64, size: SegmentSize) -> Result<LineageRepository> {
        let lineages = self.lineages().await?;
        self.pick(lineages, system_identifier, Some(size))
    }

    /// Returns the newest lineage with this system identifier, whatever its segment size.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there is none.
    pub async fn lineage_of_system(&self, system_identifier: u64) -> Result<LineageRepository> {
        let lineages = self.lineages().await?;
        self.pick(lineages, system_identifier, None)
    }

    fn pick(
        &self,
        lineages: Vec<LineageRepository>,
        system_identifier: u64,
        size: Option<SegmentSize>,
    ) -> Result<LineageRepository> {
        let known: Vec<String> = lineages
            .iter()
            .map(|known| format!("{} ({})", known.lineage.system_identifier, known.lineage.segment_size))
            .collect();
        let fits = |known: &LineageRepository| {
            known.lineage.system_identifier == system_identifier
                && size.is_none_or(|size| known.lineage.segment_size == size)
        };
        lineages.into_iter().rev().find(fits).ok_or_else(|| {
            let size = size.map(|size| format!(" with segments of {size}")).unwrap_or_default();
            Error::mismatch(format!(
                "cluster \"{}\" in {} has no lineage for system identifier {system_identifier}{size}; it knows {}",
                self.name,
                self.storage.location(),
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            ))
            .with_next(
                "Check that the configured cluster is this server's. After pg_upgrade, a fresh initdb or a new \
                 segment size run `walship init --new-lineage` on the server.",
            )
        })
    }

    /// Registers a new lineage under the next free number.
    pub async fn register_lineage(
        &self,
        system_identifier: u64,
        segment_size: SegmentSize,
        postgres_major: u32,
        now: DateTime<Utc>,
    ) -> Result<LineageRepository> {
        let mut number = self.lineages().await?.last().map_or(1, |newest| newest.lineage.number + 1);
        // Somebody may take the number first: then the next one is tried.
        for _ in 0..16 {
            let lineage = Lineage { number, system_identifier, segment_size, postgres_major, created: now };
            let document = LineageDocument { format: DOCUMENT_VERSION, lineage: lineage.clone() };
            let key = layout::lineage_document(&self.name, number)?;
            match document::put(&*self.storage, &key, &document).await? {
                PutOutcome::Stored => return Ok(self.lineage_repository(lineage)),
                PutOutcome::Exists => number += 1,
            }
        }
        Err(Error::unavailable(format!("others keep registering lineages of \"{}\"", self.name)))
    }

    async fn read_lineage(&self, number: u32) -> Result<LineageRepository> {
        let key = layout::lineage_document(&self.name, number)?;
        let document = document::read::<LineageDocument>(&*self.storage, &key).await?;
        match document {
            Some(document) if document.lineage.number == number => {
                Ok(self.lineage_repository(document.lineage))
            }
            Some(_) => Err(Error::corrupt(format!(
                "{}/{key} says that it is another lineage",
                self.storage.location()
            ))),
            None => Err(Error::missing(format!(
                "cluster \"{}\" in {} has no lineage {number}",
                self.name,
                self.storage.location()
            ))),
        }
    }

    fn lineage_repository(&self, lineage: Lineage) -> LineageRepository {
        LineageRepository {
            storage: self.storage.clone(),
            cluster: self.name.clone(),
            layout: LineageLayout::new(&self.name, lineage.number),
            lineage,
            others: others::Others::default(),
            fresh: fresh::Fresh::default(),
        }
    }
}

impl LineageRepository {
    /// Returns what the lineage is.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// Returns the cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Returns the storage underneath.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns where this lineage lies, for messages: `s3://bucket/prefix/main/0001`.
    pub fn location(&self) -> String {
        format!("{}/{}/{:04}", self.storage.location(), self.cluster, self.lineage.number)
    }

    /// Reads the lineage marker again and compares: proof that this is still the same repository
    /// (not an empty mount point, another bucket, a purged prefix).
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the marker is gone or another: nothing may be called absent then.
    pub async fn confirm_marker(&self) -> Result<()> {
        let key = layout::lineage_document(&self.cluster, self.lineage.number)?;
        let location = self.storage.location();
        match document::read::<LineageDocument>(&*self.storage, &key).await? {
            Some(document) if document.lineage == self.lineage => Ok(()),
            Some(_) => {
                Err(Error::unavailable(format!("{location}/{key} has changed: this is another repository")))
            }
            None => Err(Error::unavailable(format!(
                "{location}/{key}, the lineage marker, is not there: this is not the repository it was"
            ))
            .with_next("Check that the repository is mounted and that nothing was removed from it.")),
        }
    }
}
