//! A storage that misbehaves on demand, for tests of what stands above it.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use chrono::{DateTime, Utc};

use super::{
    ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Removed, Storage, StoreRemoval, Unfinished, Upload,
};
use crate::error::{Error, Result};

/// What is being asked of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Storage::put_if_absent`].
    Put,
    /// [`Storage::start_upload`].
    StartUpload,
    /// [`Upload::write`].
    Write,
    /// [`Upload::finish`].
    Finish,
    /// [`Storage::get`].
    Get,
    /// [`Storage::get_range`].
    GetRange,
    /// [`Storage::confirm`].
    Confirm,
    /// [`Storage::list`]; the "key" is the prefix.
    List,
    /// [`Storage::delete`].
    Delete,
    /// [`StoreRemoval::remove`]; asked for each key, the first fault counts.
    Remove,
}

/// What happens instead of, or besides, what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// [`Error::Unavailable`]; nothing is done.
    Unavailable,
    /// [`Error::Denied`]; nothing is done.
    Denied,
    /// It is done, but the answer is [`Error::Unavailable`]: the answer was lost.
    AnswerLost,
    /// It is done after this long.
    Late(Duration),
    /// It never ends; whoever waits needs a deadline.
    Never,
    /// Of what is read, only this many bytes come.
    Truncated(usize),
    /// Of what is read, the lowest bit of the byte at this offset is flipped.
    Flipped(usize),
}

type Rule = Box<dyn FnMut(Call, &str) -> Option<Fault> + Send>;

/// A storage in front of another one, with a rule that says what goes wrong. Clones share the rule.
#[derive(Clone)]
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    rule: Arc<Mutex<Rule>>,
}

impl FaultyStorage {
    /// Returns a storage that does what `inner` does until [`FaultyStorage::set`] says otherwise.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, rule: Arc::new(Mutex::new(Box::new(|_, _| None))) }
    }

    /// Asks `rule` from now on, for every call and its key.
    pub fn set(&self, rule: impl FnMut(Call, &str) -> Option<Fault> + Send + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }

    /// Lets nothing go wrong from now on.
    pub fn heal(&self) {
        self.set(|_, _| None);
    }

    fn fault(&self, call: Call, key: &str) -> Option<Fault> {
        (self.rule.lock().unwrap_or_else(PoisonError::into_inner))(call, key)
    }

    /// Does `work` as far as the fault lets it.
    async fn with<T>(
        &self,
        call: Call,
        key: &str,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<(T, Option<Fault>)> {
        let fault = self.fault(call, key);
        match fault {
            Some(Fault::Unavailable) => return Err(Error::unavailable(format!("injected outage at {key}"))),
            Some(Fault::Denied) => return Err(Error::denied(format!("injected refusal at {key}"))),
            Some(Fault::Late(time)) => tokio::time::sleep(time).await,
            Some(Fault::Never) => std::future::pending().await,
            _ => {}
        }
        let done = work.await?;
        if fault == Some(Fault::AnswerLost) {
            return Err(Error::unavailable(format!("injected loss of the answer about {key}")));
        }
        Ok((done, fault))
    }
}

impl fmt::Debug for FaultyStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FaultyStorage").field(&self.inner).finish()
    }
}

fn spoiled((bytes, fault): (Option<Bytes>, Option<Fault>)) -> Option<Bytes> {
    let bytes = bytes?;
    Some(match fault {
        Some(Fault::Truncated(length)) => bytes.slice(..length.min(bytes.len())),
        Some(Fault::Flipped(offset)) => {
            let mut bytes = bytes.to_vec();
            if let Some(byte) = bytes.get_mut(offset) {
                *byte ^= 1;
            }
            bytes.into()
        }
        _ => bytes,
    })
}

#[async_trait]
impl Storage for FaultyStorage {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        Ok(self.with(Call::Put, key.as_str(), self.inner.put_if_absent(key, body)).await?.0)
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        let (upload, _) = self.with(Call::StartUpload, key.as_str(), self.inner.start_upload(key)).await?;
        Ok(Box::new(FaultyUpload { storage: self.clone(), key: key.clone(), upload }))
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        Ok(spoiled(self.with(Call::Get, key.as_str(), self.inner.get(key, max_bytes)).await?))
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        Ok(spoiled(self.with(Call::GetRange, key.as_str(), self.inner.get_range(key, offset, length)).await?))
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        Ok(self.with(Call::Confirm, key.as_str(), self.inner.confirm(key)).await?.0)
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        Ok(self.with(Call::List, prefix, self.inner.list(prefix, page)).await?.0)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.with(Call::Delete, key.as_str(), self.inner.delete(key)).await.map(drop)
    }

    async fn unfinished(&self, prefix: &str) -> Result<Option<Vec<Unfinished>>> {
        Ok(self.with(Call::List, prefix, self.inner.unfinished(prefix)).await?.0)
    }

    async fn identity(&self, key: &ObjectKey) -> Result<Option<String>> {
        self.inner.identity(key).await
    }

    fn removal(&self) -> Option<&dyn StoreRemoval> {
        self.inner.removal().map(|_| self as _)
    }
}

#[async_trait]
impl StoreRemoval for FaultyStorage {
    /// Removes one after the other up to the key with a fault.
    async fn remove(&self, keys: &[ObjectKey]) -> Result<Removed> {
        let Some(removal) = self.inner.removal() else { return Err(Error::denied("nothing is removed")) };
        let mut all = Removed::default();
        for key in keys {
            let work = removal.remove(std::slice::from_ref(key));
            let (removed, _) = self.with(Call::Remove, key.as_str(), work).await?;
            all.kept_as_versions += removed.kept_as_versions;
        }
        Ok(all)
    }

    async fn last_written(&self, prefix: &str) -> Result<Option<DateTime<Utc>>> {
        match self.inner.removal() {
            Some(removal) => removal.last_written(prefix).await,
            None => Ok(None),
        }
    }
}

struct FaultyUpload {
    storage: FaultyStorage,
    key: ObjectKey,
    upload: Box<dyn Upload>,
}

#[async_trait]
impl Upload for FaultyUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.storage.with(Call::Write, self.key.as_str(), self.upload.write(bytes)).await.map(drop)
    }

    async fn finish(self: Box<Self>) -> Result<PutOutcome> {
        Ok(self.storage.with(Call::Finish, self.key.as_str(), self.upload.finish()).await?.0)
    }

    async fn abort(self: Box<Self>) {
        self.upload.abort().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[tokio::test]
    async fn faults_happen_as_the_rule_says() {
        let memory = MemoryStorage::new();
        let storage = FaultyStorage::new(Arc::new(memory.clone()));
        let key = ObjectKey::new("a").unwrap();
        let mut calls = 0;
        storage.set(move |call, _| {
            calls += 1;
            match (call, calls) {
                (Call::Put, 1) => Some(Fault::Unavailable),
                (Call::Put, 2) => Some(Fault::AnswerLost),
                (Call::Get, 4) => Some(Fault::Truncated(2)),
                (Call::Get, 5) => Some(Fault::Flipped(0)),
                _ => None,
            }
        });
        let put = || storage.put_if_absent(&key, Bytes::from_static(b"abc").into());
        assert!(put().await.unwrap_err().is_transient());
        assert!(memory.keys().is_empty());
        assert!(put().await.unwrap_err().is_transient());
        assert_eq!(put().await.unwrap(), PutOutcome::Exists);
        assert_eq!(storage.get(&key, 9).await.unwrap().unwrap(), "ab");
        assert_eq!(storage.get(&key, 9).await.unwrap().unwrap(), "`bc");
        assert_eq!(storage.get(&key, 9).await.unwrap().unwrap(), "abc");
    }
}
