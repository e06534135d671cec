//! Objects in memory, for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use chrono::{DateTime, TimeDelta, Utc};

use super::{ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Removed, Storage, StoreRemoval, Upload};
use crate::error::{Error, Result};

/// How many objects a page of a listing holds.
const PAGE_OBJECTS: usize = 1000;

type Objects = BTreeMap<String, Bytes>;

/// A storage that lives as long as its process; clones share their objects.
#[derive(Debug, Clone, Default)]
pub struct MemoryStorage {
    objects: Arc<Mutex<Objects>>,
    /// When each was written.
    written: Arc<Mutex<BTreeMap<String, DateTime<Utc>>>>,
}

impl MemoryStorage {
    /// Returns an empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns all keys in byte order.
    pub fn keys(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Replaces or adds an object whatever the rules say, to play a damaged store.
    pub fn overwrite(&self, key: &ObjectKey, bytes: impl Into<Bytes>) {
        self.lock().insert(key.as_str().to_owned(), bytes.into());
        self.note_written(key);
    }

    /// Returns a storage of its own with the same objects, as old as these.
    #[must_use]
    pub fn copy(&self) -> Self {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Self { objects: Arc::new(Mutex::new(self.lock().clone())), written: Arc::new(Mutex::new(written)) }
    }

    /// Makes the objects whose keys hold this text so much older.
    pub fn age(&self, part_of_key: &str, by: TimeDelta) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let aged = written.iter_mut().filter(|(key, _)| key.contains(part_of_key));
        aged.for_each(|(_, time)| *time -= by);
    }

    fn note_written(&self, key: &ObjectKey) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.insert(key.as_str().to_owned(), Utc::now());
    }

    /// Removes an object behind everybody's back.
    pub fn remove(&self, key: &ObjectKey) {
        self.lock().remove(key.as_str());
    }

    fn lock(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, key: &ObjectKey, bytes: Bytes) -> PutOutcome {
        let mut objects = self.lock();
        if objects.contains_key(key.as_str()) {
            return PutOutcome::Exists;
        }
        objects.insert(key.as_str().to_owned(), bytes);
        self.note_written(key);
        PutOutcome::Stored
    }
}

#[async_trait]
impl Storage for MemoryStorage {
    fn location(&self) -> String {
        "memory:".to_owned()
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        let bytes = body.read().await?;
        Ok(self.insert(key, bytes))
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        Ok(Box::new(MemoryUpload { storage: self.clone(), key: key.clone(), bytes: Vec::new() }))
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        let found = self.lock().get(key.as_str()).cloned();
        match found {
            Some(bytes) if bytes.len() as u64 > max_bytes => {
                Err(super::too_long(self, key, bytes.len() as u64, max_bytes))
            }
            found => Ok(found),
        }
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        Ok(self.lock().get(key.as_str()).map(|bytes| {
            let clamp = |position: u64| position.min(bytes.len() as u64) as usize;
            bytes.slice(clamp(offset)..clamp(offset.saturating_add(length)))
        }))
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        let objects = self.lock();
        Ok(objects.get(key.as_str()).map(|bytes| ObjectMeta { key: key.clone(), bytes: bytes.len() as u64 }))
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let objects = self.lock();
        let after = page.unwrap_or("");
        let mut listed = ListPage::default();
        let from = if after >= prefix { after } else { prefix };
        for (key, bytes) in objects.range(from.to_owned()..) {
            if page.is_some_and(|page| key.as_str() <= page) {
                continue;
            }
            if !key.starts_with(prefix) {
                break;
            }
            if listed.objects.len() == PAGE_OBJECTS {
                listed.next = listed.objects.last().map(|last: &ObjectMeta| last.key.to_string());
                break;
            }
            let key = ObjectKey::new(key.clone())?;
            listed.objects.push(ObjectMeta { key, bytes: bytes.len() as u64 });
        }
        Ok(listed)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.lock().remove(key.as_str());
        Ok(())
    }

    async fn identity(&self, key: &ObjectKey) -> Result<Option<String>> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(written.get(key.as_str()).map(|time| format!("written {}", time.to_rfc3339())))
    }

    fn removal(&self) -> Option<&dyn StoreRemoval> {
        Some(self)
    }
}

#[async_trait]
impl StoreRemoval for MemoryStorage {
    async fn remove(&self, keys: &[ObjectKey]) -> Result<Removed> {
        let mut objects = self.lock();
        keys.iter().for_each(|key| drop(objects.remove(key.as_str())));
        Ok(Removed::default())
    }

    async fn last_written(&self, prefix: &str) -> Result<Option<DateTime<Utc>>> {
        let objects = self.lock();
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let there = written.iter().filter(|(key, _)| key.starts_with(prefix) && objects.contains_key(*key));
        Ok(there.map(|(_, time)| *time).max())
    }
}

struct MemoryUpload {
    storage: MemoryStorage,
    key: ObjectKey,
    bytes: Vec<u8>,
}

/// No test needs more.
const UPLOAD_BYTES_MAX: usize = 1 << 30;

#[async_trait]
impl Upload for MemoryUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if self.bytes.len() + bytes.len() > UPLOAD_BYTES_MAX {
            return Err(Error::local_io("an upload into memory is longer than 1 GiB"));
        }
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<PutOutcome> {
        Ok(self.storage.insert(&self.key, self.bytes.into()))
    }

    async fn abort(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_conforms() {
        crate::storage::conformance::run(&MemoryStorage::new()).await;
        crate::storage::conformance::byte_order_across_folders(&MemoryStorage::new()).await;
        crate::storage::conformance::one_upload_wins(&MemoryStorage::new()).await;
    }
}
