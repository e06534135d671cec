//! Records a store's answers in a folder, and plays them back: so that what is measured is the asking alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use walship::codec::Digest;
use walship::storage::{FolderPage, ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Storage, Upload};
use walship::{Error, Result};

/// A store that counts requests and keeps the answers.
#[derive(Debug)]
pub(super) struct Recorder {
    inner: Arc<dyn Storage>,
    folder: PathBuf,
    lists: AtomicU64,
    gets: AtomicU64,
}

impl Recorder {
    pub(super) fn new(inner: Arc<dyn Storage>, folder: &Path) -> Self {
        Self { inner, folder: folder.to_owned(), lists: AtomicU64::new(0), gets: AtomicU64::new(0) }
    }

    /// Returns how often was listed and read.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.lists.load(Ordering::Relaxed), self.gets.load(Ordering::Relaxed))
    }

    fn keep(&self, request: &str, answer: Option<&[u8]>) {
        let stored = [&[u8::from(answer.is_some())], answer.unwrap_or_default()].concat();
        std::fs::write(path(&self.folder, request), stored).expect("the folder takes it");
    }
}

/// The answers of a [`Recorder`].
#[derive(Debug)]
pub(super) struct Replay {
    folder: PathBuf,
}

impl Replay {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn answer(&self, request: &str) -> Result<Option<Bytes>> {
        let stored = std::fs::read(path(&self.folder, request))
            .map_err(|error| Error::from_io(format!("nobody asked for {request}"), error))?;
        let stored = Bytes::from(stored);
        Ok((stored.first() == Some(&1)).then(|| stored.slice(1..)))
    }

    fn lines(&self, request: &str) -> Result<(Vec<String>, Option<String>)> {
        let text = self.answer(request)?.unwrap_or_default();
        let mut lines: Vec<String> = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
        let next = lines.pop().filter(|next| !next.is_empty());
        Ok((lines, next))
    }
}

fn path(folder: &Path, request: &str) -> PathBuf {
    folder.join(Digest::of(request.as_bytes()).short())
}

/// One line for each item, the last for what comes next.
fn as_lines(items: impl Iterator<Item = String>, next: Option<&String>) -> Vec<u8> {
    let mut text: String = items.map(|item| item + "\n").collect();
    text.push_str(next.map_or("", String::as_str));
    text.push('\n');
    text.into_bytes()
}

fn read_only<T>() -> Result<T> {
    Err(Error::denied("this store is only read"))
}

#[async_trait]
impl Storage for Recorder {
    fn location(&self) -> String {
        "generated:".to_owned()
    }
    async fn put_if_absent(&self, _: &ObjectKey, _: PutBody) -> Result<PutOutcome> {
        read_only()
    }
    async fn start_upload(&self, _: &ObjectKey) -> Result<Box<dyn Upload>> {
        read_only()
    }
    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        let answer = self.inner.get(key, max_bytes).await?;
        self.keep(&format!("get {key}"), answer.as_deref());
        Ok(answer)
    }
    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        let answer = self.inner.get_range(key, offset, length).await?;
        self.keep(&format!("range {key} {offset} {length}"), answer.as_deref());
        Ok(answer)
    }
    async fn confirm(&self, _: &ObjectKey) -> Result<Option<ObjectMeta>> {
        read_only()
    }
    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        let answer = self.inner.list(prefix, page).await?;
        let items = answer.objects.iter().map(|meta| format!("{} {}", meta.bytes, meta.key));
        self.keep(&format!("list {prefix} {page:?}"), Some(&as_lines(items, answer.next.as_ref())));
        Ok(answer)
    }
    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        let answer = self.inner.list_folders(prefix, page).await?;
        let lines = as_lines(answer.names.iter().cloned(), answer.next.as_ref());
        self.keep(&format!("folders {prefix} {page:?}"), Some(&lines));
        Ok(answer)
    }
    async fn delete(&self, _: &ObjectKey) -> Result<()> {
        read_only()
    }
}

#[async_trait]
impl Storage for Replay {
    fn location(&self) -> String {
        "generated:".to_owned()
    }
    async fn put_if_absent(&self, _: &ObjectKey, _: PutBody) -> Result<PutOutcome> {
        read_only()
    }
    async fn start_upload(&self, _: &ObjectKey) -> Result<Box<dyn Upload>> {
        read_only()
    }
    async fn get(&self, key: &ObjectKey, _: u64) -> Result<Option<Bytes>> {
        self.answer(&format!("get {key}"))
    }
    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        self.answer(&format!("range {key} {offset} {length}"))
    }
    async fn confirm(&self, _: &ObjectKey) -> Result<Option<ObjectMeta>> {
        read_only()
    }
    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let (lines, next) = self.lines(&format!("list {prefix} {page:?}"))?;
        let mut objects = Vec::with_capacity(lines.len());
        for line in lines {
            let (bytes, key) = line.split_once(' ').unwrap_or(("0", &line));
            objects.push(ObjectMeta { key: ObjectKey::new(key)?, bytes: bytes.parse().unwrap_or(0) });
        }
        Ok(ListPage { objects, next })
    }
    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        let (names, next) = self.lines(&format!("folders {prefix} {page:?}"))?;
        Ok(FolderPage { names, next })
    }
    async fn delete(&self, _: &ObjectKey) -> Result<()> {
        read_only()
    }
}
