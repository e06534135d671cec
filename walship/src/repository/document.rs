//! The small JSON documents: written once, bounded, versioned.

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::catalog::BackupObject;
use crate::catalog::Lineage;
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId};
use crate::storage::{ObjectKey, PutOutcome, Storage};

use super::ClusterName;

/// The version of every document that this code writes, and the highest it reads.
pub(super) const DOCUMENT_VERSION: u32 = 1;

/// The longest document that is read.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 1 << 20;

/// The longest record of a backup that is read: it lists every data object, of which there are four for each GiB.
pub(super) const RECORD_BYTES_MAX: u64 = 64 << 20;

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
    /// The id of the backup that it builds on; `None` for a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// A backup has all that it needs, and is about to become complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BackupFinishing {
    /// The format of this document; 1.
    pub(super) format: u32,
    pub(super) id: String,
    /// When, by the clock of the machine that takes it.
    pub(super) finishing: DateTime<Utc>,
}

/// That a backup's data object is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ObjectNote {
    /// The format of this document; 1.
    pub(super) format: u32,
    pub(super) object: BackupObject,
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
    read_within(storage, key, DOCUMENT_BYTES_MAX).await
}

/// Reads a document of at most `bytes_max` bytes that may have been removed since it was listed; `None` then. Where versions are kept, a
/// read of what was removed is an error and no absence: the listing tells.
///
/// # Errors
/// As [`read`].
pub(super) async fn read_listed<T: DeserializeOwned>(
    storage: &dyn Storage,
    key: &ObjectKey,
    bytes_max: u64,
) -> Result<Option<T>> {
    let missing = match read_within(storage, key, bytes_max).await {
        Ok(Some(document)) => return Ok(Some(document)),
        Ok(None) => None,
        Err(error @ Error::Missing(_)) => Some(error),
        Err(error) => return Err(error),
    };
    // The key itself comes before all that it is the beginning of.
    if !storage.list(key.as_str(), None).await?.objects.iter().any(|meta| meta.key == *key) {
        return Ok(None);
    }
    Err(missing.unwrap_or_else(|| {
        Error::unavailable(format!("{}/{key} is listed, and not there when it is read", storage.location()))
    }))
}

/// Reads a document of at most `bytes_max` bytes, as [`read`].
pub(super) async fn read_within<T: DeserializeOwned>(
    storage: &dyn Storage,
    key: &ObjectKey,
    bytes_max: u64,
) -> Result<Option<T>> {
    let Some(bytes) = storage.get(key, bytes_max).await? else { return Ok(None) };
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
    put_within(storage, key, document, DOCUMENT_BYTES_MAX).await
}

async fn put_within<T: Serialize>(
    storage: &dyn Storage,
    key: &ObjectKey,
    document: &T,
    bytes_max: u64,
) -> Result<PutOutcome> {
    let bytes = written(document, bytes_max).map_err(|error| error.context(key.to_string()))?;
    storage.put_if_absent(key, bytes.into()).await
}

/// Returns a document as it is stored.
///
/// # Errors
/// [`Error::Invalid`] for one that is longer than `bytes_max`: nobody could read it.
pub(super) fn written<T: Serialize>(document: &T, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(document)
        .map_err(|error| Error::invalid(format!("the document cannot be written as JSON: {error}")))?;
    bytes.push(b'\n');
    if bytes.len() as u64 > bytes_max {
        let length = bytes.len();
        return Err(Error::invalid(format!("the document would have {length} bytes, more than are read")));
    }
    Ok(bytes)
}

/// Writes a document whose key nobody else uses for anything else: taken with the same content is success.
pub(super) async fn put_same<T>(storage: &dyn Storage, key: &ObjectKey, document: &T) -> Result<()>
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    put_same_within(storage, key, document, DOCUMENT_BYTES_MAX).await
}

/// Writes a document of at most `bytes_max` bytes, as [`put_same`].
///
/// # Errors
/// [`Error::Invalid`] for a longer one: nobody could read it.
pub(super) async fn put_same_within<T>(
    storage: &dyn Storage,
    key: &ObjectKey,
    document: &T,
    bytes_max: u64,
) -> Result<()>
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    match put_within(storage, key, document, bytes_max).await? {
        PutOutcome::Stored => Ok(()),
        PutOutcome::Exists => {
            storage.confirm(key).await?;
            match read_within::<T>(storage, key, bytes_max).await? {
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
