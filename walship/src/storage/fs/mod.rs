//! Objects as files of a folder, which may be a network mount that several hosts share.
//!
//! A file reaches its key whole or not at all: it is written and synced under a temporary name in
//! `<root>/tmp`, then linked to its key (or renamed without replacing, where there are no hard
//! links). No symbolic link below the root is followed. Nothing but [`FsStorage::create_root`]
//! makes the root and its `tmp`; without `tmp` nothing is written, because a folder that lacks it
//! is most likely the empty mount point of a repository that is not mounted. What root writes is given to the owner and
//! the group of the root folder, so that one command that was run as root locks nobody out.

mod folder;
mod list;
mod publish;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::{
    Limits, ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Removed, Storage, StoreRemoval, Unfinished,
    Upload, blocking, too_long,
};
use crate::error::{Error, Result};
use folder::{Folders, Root};
use list::Skipped;
use publish::Temporary;

/// The folder of temporaries below the root: no key starts with it.
const TMP: &str = "tmp";

/// A folder as a storage.
#[derive(Debug, Clone)]
pub struct FsStorage {
    root: Arc<Root>,
    limits: Limits,
    tidied: Arc<AtomicBool>,
    /// Where listings leave out what cannot be read, what that was.
    skipped: Option<Skipped>,
}

impl FsStorage {
    /// Returns the storage in a folder that is looked at by the first call, within that call's deadline.
    ///
    /// A folder that is not there is that call's [`Error::Unavailable`].
    pub fn at(root: &Path) -> Self {
        Self {
            root: Arc::new(Root::at(root)),
            limits: Limits::default(),
            tidied: Arc::new(AtomicBool::new(false)),
            skipped: None,
        }
    }

    /// Returns the storage in an existing folder. Blocks, on a dead network mount without end:
    /// [`FsStorage::at`] does not.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the folder is not there (it may not be mounted);
    /// [`Error::Denied`] or [`Error::LocalIo`] when it cannot be opened.
    pub fn open(root: &Path) -> Result<Self> {
        let storage = Self::at(root);
        storage.root.descriptor()?;
        Ok(storage)
    }

    /// Makes the folder where it is not there yet, and what a storage needs in it; its parent must exist.
    ///
    /// # Durability
    /// After `Ok` the folder and its name in its parent survive a crash.
    /// # Errors
    /// [`Error::Denied`] or [`Error::LocalIo`] with the path that cannot be made.
    pub fn create_root(root: &Path) -> Result<Self> {
        folder::create_root(root)?;
        Self::open(root)
    }

    /// Returns the storage with other deadlines; of [`Limits`] only that of a whole call matters here.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Runs `work` where it may block, and stops waiting at the deadline: a dead network mount
    /// hangs without end. The work itself cannot be stopped and may still succeed later.
    async fn run<T, F>(&self, what: String, bytes: u64, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Arc<Root>) -> Result<T> + Send + 'static,
    {
        let root = Arc::clone(&self.root);
        let deadline = self.limits.deadline(bytes);
        match tokio::time::timeout(deadline, blocking(move || work(&root))).await {
            Ok(result) => result,
            Err(_) => Err(Error::unavailable(format!(
                "{what} in {} took longer than {} s",
                self.location(),
                deadline.as_secs_f64()
            ))
            .with_next("Check the disk or network mount that holds this folder, then try again.")),
        }
    }

    /// Removes stale temporaries once in the life of this value; a failure of that is nobody's concern.
    fn tidy_once(&self) -> impl FnOnce(&Root) + Send + 'static {
        let tidied = Arc::clone(&self.tidied);
        move |root| {
            if !tidied.swap(true, Ordering::Relaxed)
                && let Err(error) = publish::remove_stale(root)
            {
                tracing::debug!("stale temporaries stay in {}: {error}", root.path().display());
            }
        }
    }
}

#[async_trait]
impl Storage for FsStorage {
    fn location(&self) -> String {
        format!("file://{}", self.root.path().display())
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        let (name, tidy) = (key.clone(), self.tidy_once());
        self.run(format!("storing {key}"), body.len(), move |root| {
            let path = KeyPath::new(&name)?;
            tidy(root);
            // A taken key costs no write. Whether it is still taken when it matters is decided by the link.
            if let Some(folders) = Folders::open(root, &path.folders)?
                && folders.exists(path.name)?
            {
                return Ok(PutOutcome::Exists);
            }
            let mut temporary = Temporary::create(root)?;
            body.each_piece(|piece| temporary.write(piece))?;
            temporary.publish(&path)
        })
        .await
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        let (name, tidy) = (key.clone(), self.tidy_once());
        let temporary = self
            .run(format!("storing {key}"), 0, move |root| {
                KeyPath::new(&name)?;
                tidy(root);
                Temporary::create(root)
            })
            .await?;
        Ok(Box::new(FsUpload { storage: self.clone(), key: key.clone(), temporary: Some(temporary) }))
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        let (name, this) = (key.clone(), self.clone());
        self.run(format!("reading {key}"), max_bytes.min(1 << 30), move |root| {
            let path = KeyPath::new(&name)?;
            let Some((_, file, bytes)) = open_object(root, &path)? else { return Ok(None) };
            if bytes > max_bytes {
                return Err(too_long(&this, &name, bytes, max_bytes));
            }
            read(&file, &path, root, 0, bytes).map(Some)
        })
        .await
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        let name = key.clone();
        self.run(format!("reading {key}"), length.min(1 << 30), move |root| {
            let path = KeyPath::new(&name)?;
            let Some((_, file, bytes)) = open_object(root, &path)? else { return Ok(None) };
            let length = length.min(bytes.saturating_sub(offset));
            read(&file, &path, root, offset, length).map(Some)
        })
        .await
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        let name = key.clone();
        let what = || format!("confirming {key}");
        let opened = self.run(what(), 0, move |root| open_object(root, &KeyPath::new(&name)?)).await?;
        let Some((folders, file, bytes)) = opened else { return Ok(None) };
        // How long a sync may take depends on the length, which is known only now.
        let name = key.clone();
        self.run(what(), bytes, move |root| {
            file.sync_all().map_err(|error| root.failed("cannot sync", name.as_str(), error))?;
            folders.sync()?;
            Ok(Some(ObjectMeta { key: name, bytes }))
        })
        .await
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let (prefix, page, skipped) = (prefix.to_owned(), page.map(str::to_owned), self.skipped.clone());
        let list = move |root: &Arc<Root>| list::page(root, &prefix, page.as_deref(), skipped.as_ref());
        self.run("listing".to_owned(), 0, list).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        let name = key.clone();
        self.run(format!("deleting {key}"), 0, move |root| {
            let path = KeyPath::new(&name)?;
            match Folders::open(root, &path.folders)? {
                Some(folders) => folders.remove(path.name),
                None => Ok(()),
            }
        })
        .await
    }

    async fn unfinished(&self, _prefix: &str) -> Result<Option<Vec<Unfinished>>> {
        // Temporaries say nothing of their keys.
        self.run("listing temporaries".to_owned(), 0, |root| publish::temporaries(root)).await.map(Some)
    }

    /// When its file came to be, which no copy keeps. Where the file system does not know that, the file's number and when it
    /// was last changed in any way.
    async fn identity(&self, key: &ObjectKey) -> Result<Option<String>> {
        let name = key.clone();
        self.run(format!("looking at {key}"), 0, move |root| {
            let Some((_, file, _)) = open_object(root, &KeyPath::new(&name)?)? else { return Ok(None) };
            let metadata =
                file.metadata().map_err(|error| root.failed("cannot look at", name.as_str(), error))?;
            Ok(Some(match metadata.created() {
                Ok(born) => format!("born {}", DateTime::<Utc>::from(born).to_rfc3339()),
                Err(_) => {
                    let (file, changed) = (metadata.ino(), (metadata.ctime(), metadata.ctime_nsec()));
                    format!("inode {file}, changed {}.{:09}", changed.0, changed.1)
                }
            }))
        })
        .await
    }

    fn skipping(&self) -> Option<Arc<dyn Storage>> {
        Some(Arc::new(Self { skipped: Some(Skipped::default()), ..self.clone() }))
    }

    fn skip(&self, path: &str, error: &Error) -> bool {
        self.skipped.as_ref().is_some_and(|skipped| list::note_skipped(skipped, path, error))
    }

    fn skipped(&self) -> BTreeMap<String, String> {
        let skipped = self.skipped.as_ref();
        skipped
            .map(|skipped| skipped.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .unwrap_or_default()
    }

    fn removal(&self) -> Option<&dyn StoreRemoval> {
        Some(self)
    }
}

#[async_trait]
impl StoreRemoval for FsStorage {
    async fn remove(&self, keys: &[ObjectKey]) -> Result<Removed> {
        let keys = keys.to_vec();
        self.run(format!("removing {} objects", keys.len()), 0, move |root| {
            // One folder after the other, each synced once; a folder that becomes empty stays: somebody may be about
            // to put something there.
            let mut at: Option<(Vec<&str>, Folders)> = None;
            for key in &keys {
                let path = KeyPath::new(key)?;
                if at.as_ref().is_none_or(|(names, _)| *names != path.folders) {
                    if let Some((_, folders)) = at.take() {
                        folders.sync_last()?;
                    }
                    at = Folders::open(root, &path.folders)?.map(|folders| (path.folders.clone(), folders));
                }
                if let Some((_, folders)) = &at {
                    folders.remove(path.name)?;
                }
            }
            at.map_or(Ok(()), |(_, folders)| folders.sync_last())?;
            Ok(Removed::default())
        })
        .await
    }

    async fn last_written(&self, prefix: &str) -> Result<Option<DateTime<Utc>>> {
        let (mut newest, mut after) = (None, None);
        loop {
            let (prefix, from) = (prefix.to_owned(), after.take());
            let looked = self.run("listing".to_owned(), 0, move |root| {
                let page = list::page(root, &prefix, from.as_deref(), None)?;
                let mut newest = None;
                for meta in &page.objects {
                    newest = newest.max(modified(root, &meta.key)?);
                }
                Ok((newest, page.next))
            });
            let (written, next) = looked.await?;
            newest = newest.max(written);
            match next {
                Some(next) => after = Some(next),
                None => return Ok(newest),
            }
        }
    }
}

/// A key's folders and its own name.
struct KeyPath<'a> {
    folders: Vec<&'a str>,
    name: &'a str,
}

impl<'a> KeyPath<'a> {
    fn new(key: &'a ObjectKey) -> Result<Self> {
        let mut folders: Vec<&str> = key.as_str().split('/').collect();
        let name = folders.pop().unwrap_or_default();
        if folders.first().copied().unwrap_or(name) == TMP {
            return Err(Error::invalid(format!("{key} cannot be the key of an object: {TMP}/ is reserved")));
        }
        Ok(Self { folders, name })
    }
}

/// The object's folders, its file and its length.
fn open_object(root: &Arc<Root>, path: &KeyPath<'_>) -> Result<Option<(Folders, File, u64)>> {
    let Some(folders) = Folders::open(root, &path.folders)? else { return Ok(None) };
    let Some((file, bytes)) = folders.open_file(path.name)? else { return Ok(None) };
    Ok(Some((folders, file, bytes)))
}

/// Returns when an object was written; `None` when it is gone.
fn modified(root: &Arc<Root>, key: &ObjectKey) -> Result<Option<DateTime<Utc>>> {
    let Some((_, file, _)) = open_object(root, &KeyPath::new(key)?)? else { return Ok(None) };
    let written = file.metadata().and_then(|metadata| metadata.modified());
    written
        .map(|time| Some(DateTime::<Utc>::from(time)))
        .map_err(|error| root.failed("cannot look at", key.as_str(), error))
}

fn read(file: &File, path: &KeyPath<'_>, root: &Root, offset: u64, length: u64) -> Result<Bytes> {
    let failed = |error| root.failed("cannot read", &path.folders.join("/"), error);
    let length = usize::try_from(length).map_err(|_| Error::invalid("a read does not fit into memory"))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).map_err(failed)?;
    Ok(bytes.into())
}

/// A temporary that grows until it is published.
struct FsUpload {
    storage: FsStorage,
    key: ObjectKey,
    temporary: Option<Temporary>,
}

#[async_trait]
impl Upload for FsUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        // After an error or a cancelled call the temporary is gone, and with it the upload.
        let mut temporary = self.temporary.take().ok_or_else(|| broken(&self.key))?;
        let what = format!("storing {}", self.key);
        let written = self.storage.run(what, bytes.len() as u64, move |_| {
            temporary.write(&bytes)?;
            Ok(temporary)
        });
        self.temporary = Some(written.await?);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<PutOutcome> {
        let temporary = self.temporary.take().ok_or_else(|| broken(&self.key))?;
        let key = self.key.clone();
        let bytes = temporary.bytes();
        self.storage
            .run(format!("storing {}", self.key), bytes, move |_| temporary.publish(&KeyPath::new(&key)?))
            .await
    }

    async fn abort(mut self: Box<Self>) {
        let temporary = self.temporary.take();
        // Dropping it removes the file; that may block.
        let _ = blocking(move || {
            drop(temporary);
            Ok(())
        })
        .await;
    }
}

fn broken(key: &ObjectKey) -> Error {
    Error::local_io(format!("the upload of {key} failed before and cannot go on"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn it_conforms() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("repository");
        let storage = FsStorage::create_root(&root).unwrap();
        crate::storage::conformance::run(&storage).await;
        crate::storage::conformance::byte_order_across_folders(&storage).await;
        crate::storage::conformance::one_upload_wins(&storage).await;
        let left = std::fs::read_dir(root.join(TMP)).unwrap().count();
        assert_eq!(left, 0, "no temporary is left behind");
    }

    #[tokio::test]
    async fn a_copy_is_told_from_the_original() {
        let folder = tempfile::tempdir().unwrap();
        let (root, key) = (folder.path().join("repository"), ObjectKey::new("a/b").unwrap());
        let storage = FsStorage::create_root(&root).unwrap();
        assert_eq!(storage.identity(&key).await.unwrap(), None);
        storage.put_if_absent(&key, Bytes::from_static(b"abc").into()).await.unwrap();
        let original = storage.identity(&key).await.unwrap().unwrap();
        assert_eq!(storage.identity(&key).await.unwrap().as_ref(), Some(&original));
        // With all that a copy can take along.
        let (path, copy) = (root.join("a/b"), root.join("a/copy"));
        std::fs::copy(&path, &copy).unwrap();
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        File::options().write(true).open(&copy).unwrap().set_modified(modified).unwrap();
        std::fs::rename(&path, root.join("a/away")).unwrap();
        std::fs::rename(&copy, &path).unwrap();
        assert_ne!(storage.identity(&key).await.unwrap().unwrap(), original);
        std::fs::rename(root.join("a/away"), &path).unwrap();
        assert_eq!(storage.identity(&key).await.unwrap().unwrap(), original);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_left_out_only_where_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("repository");
        let storage = FsStorage::create_root(&root).unwrap();
        for key in ["a/1", "b/2", "c/3"] {
            let key = ObjectKey::new(key).unwrap();
            storage.put_if_absent(&key, Bytes::from_static(b"abc").into()).await.unwrap();
        }
        let listed = async |storage: &dyn Storage| -> Result<Vec<String>> {
            Ok(storage.list("", None).await?.objects.iter().map(|meta| meta.key.to_string()).collect())
        };
        let skipping = storage.skipping().unwrap();
        assert_eq!(listed(&*skipping).await.unwrap().len(), 3);
        assert!(skipping.skipped().is_empty());
        std::os::unix::fs::symlink(root.join("a"), root.join("b/link")).unwrap();
        assert!(matches!(listed(&storage).await, Err(Error::Denied(_))));
        assert_eq!(listed(&*skipping).await.unwrap(), ["a/1", "b/2", "c/3"]);
        assert_eq!(skipping.skipped().into_keys().collect::<Vec<_>>(), ["b/link"]);
        // Only of one thing it is said, not of an outage, and of no other handle.
        assert!(skipping.skip("c/3", &Error::denied("no")) && !skipping.skip("d", &Error::unavailable("no")));
        assert!(!storage.skip("c/3", &Error::denied("no")) && storage.skipped().is_empty());
        assert_eq!(skipping.skipped().into_keys().collect::<Vec<_>>(), ["b/link", "c/3"]);
        // Without the root nothing is known.
        std::fs::rename(&root, folder.path().join("away")).unwrap();
        assert!(matches!(listed(&*skipping).await, Err(Error::Unavailable(_))));
    }

    #[tokio::test]
    async fn a_folder_is_looked_at_by_the_first_call() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("repository");
        let config = crate::storage::StorageConfig::new(format!("file://{}", root.display()));
        let storage = crate::storage::open(&config).unwrap();
        let key = ObjectKey::new("a").unwrap();
        assert!(matches!(storage.get(&key, 1).await, Err(Error::Unavailable(_))));
        FsStorage::create_root(&root).unwrap();
        assert_eq!(storage.get(&key, 1).await.unwrap(), None);
        std::fs::remove_dir(root.join(TMP)).unwrap();
        assert!(matches!(storage.get(&key, 1).await, Err(Error::Unavailable(_))), "unmounted since");
    }
}
