//! Bytes under keys: the one small interface to a folder, S3 or memory.
//!
//! A storage knows nothing of WAL, clusters or documents; [`crate::repository`] alone knows what
//! the keys mean. It never compares contents and never decides what a taken key means: it reports
//! [`PutOutcome::Exists`] and changes nothing. It tells absence from every kind of failure:
//! "not there" is said only when the store itself said exactly that about exactly this key.

#[cfg(feature = "test-util")]
pub mod conformance;
#[cfg(feature = "test-util")]
pub mod faulty;
#[cfg(feature = "store")]
pub mod fs;
#[cfg(feature = "test-util")]
pub mod memory;
#[cfg(feature = "store")]
pub mod metered;
#[cfg(feature = "store")]
pub mod retry;
#[cfg(feature = "s3")]
pub mod s3;
mod settings;

#[cfg(feature = "store")]
use std::collections::BTreeMap;
use std::fmt;
#[cfg(feature = "store")]
use std::io::Read as _;
use std::path::PathBuf;
#[cfg(feature = "store")]
use std::sync::Arc;

#[cfg(feature = "store")]
use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::error::{Error, Result};

pub use settings::{AddressingStyle, Limits, Location, S3Settings, Secret, StorageConfig};

/// Returns the storage that `config` names.
///
/// Nothing is contacted: a folder is looked at (it must exist), credentials are looked for and
/// connections made by the first call that needs them, within that call's deadline. So a network
/// mount that hangs costs one call's time, not this one without end.
///
/// # Errors
/// [`Error::Invalid`] for a URL or settings that make no sense (also `s3://` in a build without
/// the `s3` feature); [`Error::LocalIo`] when the file of certificate authorities cannot be read.
#[cfg(feature = "store")]
pub fn open(config: &StorageConfig) -> Result<Arc<dyn Storage>> {
    match config.location()? {
        Location::Folder(root) => Ok(Arc::new(fs::FsStorage::at(&root).with_limits(config.limits))),
        #[cfg(feature = "s3")]
        Location::S3 { bucket, prefix } => {
            Ok(Arc::new(s3::S3Storage::new(s3::S3Options::new(bucket, prefix, config))?))
        }
        #[cfg(not(feature = "s3"))]
        Location::S3 { .. } => {
            Err(Error::invalid(format!("{} needs a build with the s3 feature", config.url)))
        }
    }
}

/// Creates the root that `config` names where it is not there yet, then opens it.
///
/// A folder is made, its parent must exist. A bucket is never made: that is left to its owner.
///
/// # Errors
/// As [`open`]; [`Error::Denied`] or [`Error::LocalIo`] when the folder cannot be made.
#[cfg(feature = "store")]
pub fn create_root(config: &StorageConfig) -> Result<Arc<dyn Storage>> {
    if let Location::Folder(root) = config.location()? {
        fs::FsStorage::create_root(&root)?;
    }
    open(config)
}

/// The name of one stored object: relative, `/`-separated, safe on every store.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// The longest key, in bytes (S3's own limit is 1024, the root prefix needs room).
    pub const MAX_BYTES: usize = 512;

    /// Returns the key.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but non-empty parts of `[A-Za-z0-9._-]`, none of them `.` or
    /// `..`, joined by single slashes, [`ObjectKey::MAX_BYTES`] at most.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let part_ok = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if text.len() > Self::MAX_BYTES || !text.split('/').all(part_ok) {
            return Err(Error::invalid(format!("{text:?} cannot be the key of an object")));
        }
        Ok(Self(text))
    }

    /// Returns the key's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The bytes of one object that is put whole.
#[derive(Debug, Clone)]
pub enum PutBody {
    /// Pieces in memory, stored one after the other.
    Memory(Vec<Bytes>),
    /// A piece in memory followed by the whole content of a local file (a spooled large body).
    Spooled {
        /// What comes first.
        head: Bytes,
        /// The file whose whole content follows; it must not change until the put returns.
        file: PathBuf,
        /// The length of that content in bytes.
        file_bytes: u64,
    },
}

impl PutBody {
    /// Returns the object's length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(pieces) => pieces.iter().map(|piece| piece.len() as u64).sum(),
            Self::Spooled { head, file_bytes, .. } => head.len() as u64 + file_bytes,
        }
    }

    /// Returns whether the object would hold no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(feature = "store")]
impl PutBody {
    /// Returns the whole content in one piece of memory: for short bodies.
    #[cfg(any(feature = "s3", feature = "test-util"))]
    pub(crate) async fn read(self) -> Result<Bytes> {
        match self {
            Self::Memory(mut pieces) if pieces.len() == 1 => Ok(pieces.remove(0)),
            Self::Memory(pieces) => Ok(pieces.concat().into()),
            spooled @ Self::Spooled { .. } => {
                blocking(move || {
                    let mut bytes = Vec::with_capacity(usize::try_from(spooled.len()).unwrap_or(0));
                    spooled.each_piece(|piece| {
                        bytes.extend_from_slice(piece);
                        Ok(())
                    })?;
                    Ok(bytes.into())
                })
                .await
            }
        }
    }

    /// Hands the content to `take` piece by piece. Blocks: it may read a file.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when the spooled file cannot be read or is not as long as was said; what
    /// `take` returns.
    pub(crate) fn each_piece(&self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (head, file, file_bytes) = match self {
            Self::Memory(pieces) => return pieces.iter().try_for_each(|piece| take(piece)),
            Self::Spooled { head, file, file_bytes } => (head, file, *file_bytes),
        };
        take(head)?;
        let failed = |error| Error::from_io(format_args!("cannot read {}", file.display()), error);
        let mut source = std::fs::File::open(file).map_err(failed)?;
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0_u64;
        loop {
            let bytes = source.read(&mut buffer).map_err(failed)?;
            done += bytes as u64;
            if done > file_bytes || (bytes == 0 && done < file_bytes) {
                return Err(Error::local_io(format!(
                    "{} changed while it was being stored: {file_bytes} bytes were expected",
                    file.display()
                )));
            }
            if bytes == 0 {
                return Ok(());
            }
            take(&buffer[..bytes])?;
        }
    }
}

/// Runs what blocks on a thread where it may.
#[cfg(feature = "store")]
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::local_io(format!("a worker thread ended early: {error}"))),
    }
}

/// The error of a bounded read whose object is longer than the bound.
#[cfg(feature = "store")]
pub(crate) fn too_long(storage: &dyn Storage, key: &ObjectKey, bytes: u64, max_bytes: u64) -> Error {
    Error::corrupt(format!(
        "{}/{key} holds {bytes} bytes where at most {max_bytes} make sense",
        storage.location()
    ))
}

impl From<Bytes> for PutBody {
    fn from(bytes: Bytes) -> Self {
        Self::Memory(vec![bytes])
    }
}

impl From<Vec<u8>> for PutBody {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Memory(vec![bytes.into()])
    }
}

/// What became of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is stored under its key and durable.
    Stored,
    /// The key was taken already; nothing was changed. Whether the content is the same is for the
    /// caller to find out (it may even be one's own earlier attempt whose answer was lost).
    Exists,
}

/// What a store says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Its key.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub bytes: u64,
}

/// One page of a listing, in ascending byte order of keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    /// The objects of this page.
    pub objects: Vec<ObjectMeta>,
    /// The last key of this page when there are more; `None` after the last.
    pub next: Option<String>,
}

/// What a writer began and has not ended: it may still be at it, or have died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// What it is and where, for messages; no control characters.
    pub what: String,
    /// When it was begun, or last written to, where the store says that.
    pub since: Option<DateTime<Utc>>,
    /// How to remove it.
    pub mend: String,
}

/// One page of the folders in a folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FolderPage {
    /// Their names, without a slash.
    pub names: Vec<String>,
    /// The last name of this page when there are more.
    pub next: Option<String>,
}

/// Lists folders with one listing of objects for each.
#[cfg(feature = "store")]
async fn folders_one_by_one<S: Storage + ?Sized>(
    storage: &S,
    prefix: &str,
    page: Option<&str>,
) -> Result<FolderPage> {
    let mut names: Vec<String> = Vec::new();
    // Behind everything in a folder: no key holds a tilde.
    let behind = |name: &str| format!("{prefix}{name}/~");
    let mut after = page.map(behind);
    loop {
        let listed = storage.list(prefix, after.as_deref()).await?;
        let folders = listed.objects.iter().filter_map(|meta| {
            let (name, _) = meta.key.as_str().strip_prefix(prefix)?.split_once('/')?;
            Some(name)
        });
        for name in folders {
            if names.last().is_none_or(|last| last != name) {
                names.push(name.to_owned());
            }
        }
        if listed.next.is_none() {
            return Ok(FolderPage { names, next: None });
        }
        after = names.last().map(|name| behind(name)).max(listed.next);
    }
}

/// A store of objects.
///
/// Every call has a deadline of its own and retries transient failures within it (see
/// [`retry`]); an [`Error::Unavailable`] means that this was in vain.
#[cfg(feature = "store")]
#[async_trait]
pub trait Storage: Send + Sync + fmt::Debug {
    /// Returns the root for messages: `file:///srv/walship`, `s3://bucket/prefix`. No secrets.
    fn location(&self) -> String;

    /// Stores an object unless its key is taken.
    ///
    /// # Durability
    /// After [`PutOutcome::Stored`] the object survives a crash of this machine (folder: file and
    /// all its folders up to the root are synced) and readers see all of it or nothing.
    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome>;

    /// Starts storing an object whose length is not yet known.
    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>>;

    /// Returns the whole object, or `None` when the store says that exactly this key is not there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the object is longer than `max_bytes` (nothing is read then).
    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>>;

    /// Returns up to `length` bytes from `offset` (fewer at the object's end, none past it), or
    /// `None` when the store says that exactly this key is not there.
    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>>;

    /// Makes sure that an existing object is durable and says what it is; `None` when it is not there.
    ///
    /// # Durability
    /// After `Some`, an object that another process put there survives a crash as if this call's
    /// process had put it (folder: fsync of the file and of every folder up to the root).
    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>>;

    /// Returns one page of the objects whose keys start with `prefix` and, with `page`, sort after it
    /// in byte order. `prefix` may be empty or end within a name.
    ///
    /// `page` is a key, not a token: a former page's `next` (which is the last key of that page), or
    /// any text at all, whether such a key exists or not (S3: `start-after`). So "is anything stored
    /// after this one?" is a single request.
    ///
    /// Some S3 stores keep folders and sort name by name (SeaweedFS: `a/b` before `a.b`). There a page
    /// is sorted, and paging leaves nothing out, but "after" is meant in the store's own order. Where
    /// no folder's name is the beginning of a file's beside it, the two orders are the same.
    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage>;

    /// Returns one page of the names that follow `prefix` up to the next slash, of objects that have one
    /// there: the folders in a folder, in the order of [`Storage::list`]. With `page`, those behind that name.
    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        folders_one_by_one(self, prefix, page).await
    }

    /// Removes an object; success also when it is not there. Tidying only: nothing relies on it. What was stored to be
    /// kept is removed by [`StoreRemoval`] alone.
    async fn delete(&self, key: &ObjectKey) -> Result<()>;

    /// Returns what takes room without being an object: uploads neither completed nor aborted whose keys start with
    /// `prefix`, and files that never reached a key. `None` where the store cannot tell.
    async fn unfinished(&self, _prefix: &str) -> Result<Option<Vec<Unfinished>>> {
        Ok(Some(Vec::new()))
    }

    /// Returns what tells an object from a copy of it that lies under the same key elsewhere, as long as nobody touches it; `None`
    /// where it is not there, or the store cannot tell.
    async fn identity(&self, _key: &ObjectKey) -> Result<Option<String>> {
        Ok(None)
    }

    /// Returns the same storage, whose listings leave out folders that cannot be read and name them in [`Storage::skipped`];
    /// `None` for one without folders of its own. For those alone who take nothing for absent because of it.
    fn skipping(&self) -> Option<Arc<dyn Storage>> {
        None
    }

    /// Notes that what lies at a path cannot be read and is left out, where that is an answer; returns whether it is.
    fn skip(&self, _path: &str, _error: &Error) -> bool {
        false
    }

    /// Returns what was left out, without a slash at its end, with why.
    fn skipped(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Returns what only a probe asks of a store; `None` where there is nothing more to ask.
    fn probe(&self) -> Option<&dyn StoreProbe> {
        None
    }

    /// Returns what removes objects for good; `None` for a storage that does not. For retention alone.
    fn removal(&self) -> Option<&dyn StoreRemoval> {
        None
    }
}

/// How many keys one call of [`StoreRemoval::remove`] takes.
pub const REMOVE_MAX: usize = 1000;

/// Removes what was stored to be kept: for retention alone.
#[cfg(feature = "store")]
#[async_trait]
pub trait StoreRemoval: Send + Sync {
    /// Removes up to [`REMOVE_MAX`] objects; success also for those that are not there.
    ///
    /// # Errors
    /// [`Error::Denied`] where the store forbids it. Some of them may be removed all the same.
    /// # Durability
    /// After `Ok` they are gone after a crash too (folder: fsync of every folder that held one).
    async fn remove(&self, keys: &[ObjectKey]) -> Result<Removed>;

    /// Returns when the newest of the objects whose keys start with `prefix` was written, by the store's own clock;
    /// `None` where there is none or the store has no clock.
    async fn last_written(&self, prefix: &str) -> Result<Option<DateTime<Utc>>>;
}

/// What a removal came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many objects the store hides and still keeps as older versions: their room is not free yet.
    pub kept_as_versions: u64,
}

/// What a probe does to find out whether an object store keeps its promises.
#[cfg(feature = "store")]
#[async_trait]
pub trait StoreProbe: Send + Sync {
    /// Tries to store `bytes` with a checksum that is not theirs; returns whether the store refused.
    async fn put_with_wrong_checksum(&self, key: &ObjectKey, bytes: Bytes) -> Result<bool>;

    /// Starts an upload that is completed in parts however short it is.
    async fn start_multipart(&self, key: &ObjectKey) -> Result<Box<dyn Upload>>;
}

/// An object that is being stored piece by piece; invisible until [`Upload::finish`].
#[cfg(feature = "store")]
#[async_trait]
pub trait Upload: Send {
    /// Appends bytes of any length. Returns when they are accepted into a bounded buffer.
    async fn write(&mut self, bytes: Bytes) -> Result<()>;

    /// Publishes the object unless the key is taken by now; durable after [`PutOutcome::Stored`].
    async fn finish(self: Box<Self>) -> Result<PutOutcome>;

    /// Gives up: removes what was stored so far, as far as the store lets it.
    async fn abort(self: Box<Self>);
}

/// Returns every object under `prefix`, all pages, in byte order of keys.
///
/// # Errors
/// [`Error::Invalid`] when there are more than `max_objects`.
#[cfg(feature = "store")]
pub async fn list_all(storage: &dyn Storage, prefix: &str, max_objects: usize) -> Result<Vec<ObjectMeta>> {
    let mut objects = Vec::new();
    let mut page = None;
    loop {
        let mut listed = storage.list(prefix, page.as_deref()).await?;
        objects.append(&mut listed.objects);
        if objects.len() > max_objects {
            return Err(Error::invalid(format!(
                "more than {max_objects} objects lie under {}/{prefix}",
                storage.location()
            )));
        }
        match listed.next {
            Some(next) => page = Some(next),
            None => {
                objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
                return Ok(objects);
            }
        }
    }
}
