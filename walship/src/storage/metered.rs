//! A storage whose reads are counted, and slowed down to a rate.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use super::{FolderPage, ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Storage, Unfinished, Upload};
use crate::error::{Error, Result};

/// Counts what is read from the storages that share it, and holds them to a rate together.
#[derive(Debug)]
pub struct Meter {
    bytes: AtomicU64,
    bytes_per_second: Option<u64>,
    /// When what was read so far may have been read.
    free_at: Mutex<Instant>,
}

impl Meter {
    /// Returns a meter; `None` is no bound.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let bytes_per_second = bytes_per_second.map(|rate| rate.max(1));
        Self { bytes: AtomicU64::new(0), bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Returns how many bytes were read.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts bytes that were read, and waits until so much may have been read.
    async fn took(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let Some(rate) = self.bytes_per_second else { return };
        let free_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free_at = (*free_at).max(Instant::now()) + takes;
            *free_at
        };
        sleep_until(free_at).await;
    }
}

/// A storage in front of another one.
#[derive(Clone)]
pub struct MeteredStorage {
    inner: Arc<dyn Storage>,
    meter: Arc<Meter>,
}

impl MeteredStorage {
    /// Returns a storage that does what `inner` does, and tells `meter` what is read.
    pub fn new(inner: Arc<dyn Storage>, meter: Arc<Meter>) -> Self {
        Self { inner, meter }
    }

    async fn metered(&self, read: Result<Option<Bytes>>) -> Result<Option<Bytes>> {
        if let Ok(Some(bytes)) = &read {
            self.meter.took(bytes.len() as u64).await;
        }
        read
    }
}

impl fmt::Debug for MeteredStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MeteredStorage").field(&self.inner).finish()
    }
}

#[async_trait]
impl Storage for MeteredStorage {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        self.inner.put_if_absent(key, body).await
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        self.inner.start_upload(key).await
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        self.metered(self.inner.get(key, max_bytes).await).await
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        self.metered(self.inner.get_range(key, offset, length).await).await
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        self.inner.confirm(key).await
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        self.inner.list(prefix, page).await
    }

    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        self.inner.list_folders(prefix, page).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.inner.delete(key).await
    }

    async fn unfinished(&self, prefix: &str) -> Result<Option<Vec<Unfinished>>> {
        self.inner.unfinished(prefix).await
    }

    async fn identity(&self, key: &ObjectKey) -> Result<Option<String>> {
        self.inner.identity(key).await
    }

    fn skip(&self, path: &str, error: &Error) -> bool {
        self.inner.skip(path, error)
    }

    fn skipped(&self) -> BTreeMap<String, String> {
        self.inner.skipped()
    }
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[tokio::test]
    async fn reads_are_counted_and_held_to_the_rate() {
        let inner = Arc::new(MemoryStorage::default());
        let meter = Arc::new(Meter::new(Some(20_000)));
        let storage = MeteredStorage::new(inner, meter.clone());
        let key = ObjectKey::new("x").unwrap();
        storage.put_if_absent(&key, vec![7; 500].into()).await.unwrap();
        let begun = Instant::now();
        for _ in 0..4 {
            storage.get(&key, 1000).await.unwrap().unwrap();
        }
        storage.get_range(&key, 400, 1000).await.unwrap().unwrap();
        assert_eq!(storage.get(&ObjectKey::new("y").unwrap(), 1).await.unwrap(), None);
        assert_eq!(meter.bytes(), 2100);
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    }
}
