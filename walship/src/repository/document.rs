//! The small JSON documents: written once, bounded, versioned.

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::catalog::Lineage;
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId};
use crate::storage::{ObjectKey, PutOutcome, Storage};

use super::ClusterName;

/// The version of every document that this code writes, and the highest it reads.
pub(super) const DOCUMENT_VERSION: u32 = 1;

/// The longest document that is read.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 1 << 20;

/// `walship.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RepositoryDocument {
    pub(super) format: u32,
    pub(super) product: String,
    pub(super) created: DateTime<Utc>,
}

/// `<cluster>/cluster.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClusterDocument {
    pub(super) format: u32,
    pub(super) cluster: ClusterName,
    pub(super) created: DateTime<Utc>,
}

/// `<cluster>/lineages/<n>.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LineageDocument {
    pub(super) format: u32,
    #[serde(flatten)]
    pub(super) lineage: Lineage,
}

/// What is known when a base backup begins; from then on its WAL is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupStarted {
    /// The format of this document; 1.
    pub format: u32,
    /// The backup's id.
    pub id: String,
    /// The label given to the server.
    pub label: String,
    /// The timeline it starts on.
    pub timeline: TimelineId,
    /// Where replay will start.
    pub start_lsn: Lsn,
    /// The machine that takes it.
    pub host: String,
    /// When, by that machine's clock.
    pub started: DateTime<Utc>,
}

/// The settings files that lay outside a backed-up data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BackupSettings {
    /// The format of this document; 1.
    pub(super) format: u32,
    pub(super) files: Vec<SavedFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedFile {
    pub(super) path: String,
    /// In base64: no encoding is promised.
    pub(super) content: String,
}

/// Reads a document; `None` when the store says that exactly this key is not there.
///
/// # Errors
/// [`Error::Corrupt`] when it cannot be read, [`Error::Mismatch`] when its format is newer.
pub(super) async fn read<T: DeserializeOwned>(storage: &dyn Storage, key: &ObjectKey) -> Result<Option<T>> {
    let Some(bytes) = storage.get(key, DOCUMENT_BYTES_MAX).await? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|error| error.context(format!("{}/{key}", storage.location())))
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let unreadable = |error| Error::corrupt(format!("the document cannot be read: {error}"));
    let version: Version = serde_json::from_slice(bytes).map_err(unreadable)?;
    if version.format == 0 || version.format > DOCUMENT_VERSION {
        return Err(Error::mismatch(format!(
            "the document has format {}; this program reads up to {DOCUMENT_VERSION}",
            version.format
        ))
        .with_next("Use the newest walship that writes to this repository."));
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}

/// Writes a document unless its key is taken.
pub(super) async fn put<T: Serialize>(
    storage: &dyn Storage,
    key: &ObjectKey,
    document: &T,
) -> Result<PutOutcome> {
    let mut bytes = serde_json::to_vec_pretty(document)
        .map_err(|error| Error::invalid(format!("{key} cannot be written as JSON: {error}")))?;
    bytes.push(b'\n');
    storage.put_if_absent(key, bytes.into()).await
}

/// Writes a document whose key nobody else uses for anything else: taken with the same content is success.
pub(super) async fn put_same<T>(storage: &dyn Storage, key: &ObjectKey, document: &T) -> Result<()>
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    match put(storage, key, document).await? {
        PutOutcome::Stored => Ok(()),
        PutOutcome::Exists => {
            storage.confirm(key).await?;
            match read::<T>(storage, key).await? {
                Some(stored) if stored == *document => Ok(()),
                Some(_) => Err(Error::conflict(format!(
                    "{}/{key} is already stored with other content",
                    storage.location()
                ))),
                None => Err(Error::unavailable(format!(
                    "{}/{key} was there a moment ago and is gone",
                    storage.location()
                ))),
            }
        }
    }
}
