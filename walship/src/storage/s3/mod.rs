//! Objects in a bucket of S3 or a compatible store.
//!
//! Every write is conditional (`If-None-Match: *`) and carries a CRC32 that the store checks.
//! "Not there" is said only for the error code `NoSuchKey`: a missing bucket, a proxy's page, a
//! refused request and a delete marker are errors (see `answer`). The SDK's own retries are off:
//! [`super::retry`] is the one place that tries again.

mod answer;
mod body;
mod client;
mod removal;
mod streamed;
mod unfinished;
mod upload;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use tokio::sync::OnceCell;

use super::retry::retried;
use super::{
    FolderPage, Limits, ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, S3Settings, Storage,
    StorageConfig, StoreProbe, StoreRemoval, Unfinished, Upload, too_long,
};
use crate::error::{Error, Result};
use answer::Answer;
use body::SignedAs;
use client::Connected;
use upload::S3Upload;

/// How many objects a page of a listing holds.
const PAGE_OBJECTS: i32 = 1000;

/// What is longer is not sent from one piece of memory, but read while it is sent.
const IN_MEMORY_BYTES_MAX: u64 = 24 << 20;

/// S3 takes no more in one request.
const PUT_BYTES_MAX: u64 = 5 << 30;

/// More than any object holds (S3: 5 TiB, others up to 50).
const OBJECT_BYTES_MAX: u64 = 1 << 47;

/// What opens an [`S3Storage`].
#[derive(Debug, Clone)]
pub struct S3Options {
    /// The bucket's name.
    pub bucket: String,
    /// What all keys start with: empty, or without a slash at either end.
    pub prefix: String,
    /// Endpoint, region and credentials.
    pub settings: S3Settings,
    /// Deadlines.
    pub limits: Limits,
    /// The length of the parts of large objects; S3 wants 5 MiB at least.
    pub part_bytes: usize,
    /// How many parts may be under way at once; each is held in memory.
    pub parts_max: usize,
}

impl S3Options {
    /// Returns the options for `bucket` and `prefix` with what `config` says, and parts of 8 MiB, three at a time.
    pub fn new(bucket: impl Into<String>, prefix: impl Into<String>, config: &StorageConfig) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: prefix.into(),
            settings: config.s3.clone(),
            limits: config.limits,
            part_bytes: 8 << 20,
            parts_max: 3,
        }
    }
}

/// A bucket, or what lies under a prefix in it, as a storage. Clones share connections.
#[derive(Debug, Clone)]
pub struct S3Storage {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: S3Options,
    /// Built by the first call: looking for credentials may mean asking the network.
    connected: OnceCell<Connected>,
}

impl S3Storage {
    /// Returns the storage. Nothing is contacted before its first use.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings that contradict each other, [`Error::LocalIo`] when the file
    /// of certificate authorities cannot be read.
    pub fn new(options: S3Options) -> Result<Self> {
        client::check(&options.settings)?;
        Ok(Self { inner: Arc::new(Inner { options, connected: OnceCell::new() }) })
    }

    async fn connected(&self) -> Result<&Connected> {
        let options = &self.inner.options;
        self.inner.connected.get_or_try_init(|| client::build(&options.settings, options.limits)).await
    }

    async fn client(&self) -> Result<&Client> {
        Ok(&self.connected().await?.client)
    }

    /// Whether TLS guards the body. Then it is not hashed with SHA-256 as well: its CRC32 is among
    /// the headers that are signed.
    async fn over_tls(&self) -> Result<bool> {
        Ok(self.connected().await?.over_tls)
    }

    fn bucket(&self) -> &str {
        &self.inner.options.bucket
    }

    /// The key's name in the bucket.
    fn full(&self, key: &str) -> String {
        match self.inner.options.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// What is being done, for messages.
    fn doing(&self, what: &str, key: &ObjectKey) -> String {
        format!("{what} {}/{key}", self.location())
    }

    async fn put_once(
        &self,
        key: &ObjectKey,
        body: ByteStream,
        length: u64,
        checksum: &str,
        sha256: Option<String>,
    ) -> Result<PutOutcome> {
        let request = self
            .client()
            .await?
            .put_object()
            .bucket(self.bucket())
            .key(self.full(key.as_str()))
            .if_none_match("*")
            .checksum_crc32(checksum)
            .content_length(i64::try_from(length).unwrap_or(i64::MAX))
            .body(body)
            .customize();
        let request = match sha256 {
            _ if self.over_tls().await? => request.disable_payload_signing(),
            Some(sha256) => request.interceptor(SignedAs(sha256)),
            None => request,
        };
        match request.send().await {
            Ok(stored) => match stored.checksum_crc32() {
                _ if !is_answer(stored.e_tag()) => Err(no_answer()),
                Some(other) if other != checksum => Err(Error::corrupt(format!(
                    "the store says that it stored {key} with checksum {other}, sent was {checksum}"
                ))),
                _ => Ok(PutOutcome::Stored),
            },
            Err(error) => match Answer::of(error, self) {
                // Perhaps by an earlier attempt of this very call: the caller compares.
                Answer::Taken => Ok(PutOutcome::Exists),
                answer => Err(answer.into_error()),
            },
        }
    }

    /// One GET with all its body: the range as asked for, or everything.
    async fn get_once(
        &self,
        key: &ObjectKey,
        range: Option<(u64, u64)>,
        max_bytes: u64,
    ) -> Result<Option<Bytes>> {
        let mut request =
            self.client().await?.get_object().bucket(self.bucket()).key(self.full(key.as_str()));
        if let Some((offset, length)) = range {
            request = request.range(format!("bytes={offset}-{}", offset + length - 1));
        }
        // Set beside the SDK, so that the sum is checked here: the SDK's own check has no error of its own.
        let request = request.customize().mutate_request(|request| {
            request.headers_mut().insert("x-amz-checksum-mode", "ENABLED");
        });
        let mut got = match request.send().await {
            Ok(got) => got,
            Err(error) => {
                return match Answer::of(error, self) {
                    Answer::NoSuchKey => Ok(None),
                    // The object is there, and ends before the range.
                    Answer::RangePastEnd if range.is_some() => Ok(Some(Bytes::new())),
                    answer => Err(answer.into_error()),
                };
            }
        };
        let stated = got.content_length().and_then(|bytes| u64::try_from(bytes).ok());
        if let Some((offset, _)) = range {
            let honoured = got.content_range().is_some_and(|r| r.starts_with(&format!("bytes {offset}-")));
            if !honoured {
                return Err(Error::invalid(format!(
                    "the store at {} ignores ranges: it cannot hold a repository",
                    self.location()
                )));
            }
        }
        if let Some(bytes) = stated.filter(|bytes| *bytes > max_bytes) {
            return Err(too_long(self, key, bytes, max_bytes));
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(stated.unwrap_or(0)).unwrap_or(0));
        while let Some(chunk) = got.body.next().await {
            let chunk = chunk.map_err(|error| {
                Error::unavailable(format!("the answer broke off after {} bytes", bytes.len()))
                    .with_source(error)
            })?;
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > max_bytes {
                return Err(too_long(self, key, bytes.len() as u64, max_bytes));
            }
        }
        if stated.is_some_and(|stated| stated != bytes.len() as u64) {
            return Err(Error::unavailable(format!(
                "the answer holds {} bytes where {} were announced",
                bytes.len(),
                stated.unwrap_or(0)
            )));
        }
        match got.checksum_crc32() {
            // A sum of sums ("...-3") is that of a multipart upload and says nothing about the whole.
            Some(sum) if range.is_none() && !sum.contains('-') && sum != crc32(&bytes) => {
                Err(Error::corrupt(format!(
                    "{}/{key} does not match the checksum it was stored with",
                    self.location()
                )))
            }
            _ => Ok(Some(bytes.freeze())),
        }
    }

    async fn head_once(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        let head = self
            .client()
            .await?
            .head_object()
            .bucket(self.bucket())
            .key(self.full(key.as_str()))
            .send()
            .await;
        match head {
            Ok(head) => match head.content_length().and_then(|bytes| u64::try_from(bytes).ok()) {
                Some(bytes) => Ok(Some(ObjectMeta { key: key.clone(), bytes })),
                None => Err(Error::unavailable("the store named no length")),
            },
            Err(error) => match Answer::of(error, self) {
                // An answer to HEAD has no body, so nobody knows who says "404": ask for the first byte.
                Answer::Other { status: Some(404), .. } | Answer::NoSuchKey => {
                    match self.get_once(key, Some((0, 1)), 1).await? {
                        None => Ok(None),
                        Some(_) => Err(Error::unavailable("the object appeared just now")),
                    }
                }
                answer => Err(answer.into_error()),
            },
        }
    }

    async fn list_folders_once(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        let request = self.client().await?.list_objects_v2().bucket(self.bucket());
        // Behind everything in that folder: no key holds a tilde.
        let after = page.map(|name| self.full(&format!("{prefix}{name}/~")));
        let request = request.prefix(self.full(prefix)).delimiter("/").max_keys(PAGE_OBJECTS);
        let listed = request
            .set_start_after(after)
            .send()
            .await
            .map_err(|error| Answer::of(error, self).into_error())?;
        let full = self.full(prefix);
        let grouped = listed.common_prefixes().iter().filter_map(|group| group.prefix());
        // A store that does not group shows the objects.
        let objects = listed.contents().iter().filter_map(|object| object.key());
        let folder = |key: &str| Some(key.strip_prefix(&full)?.split_once('/')?.0.to_owned());
        let mut names: Vec<String> = grouped.chain(objects).filter_map(folder).collect();
        names.dedup();
        names.retain(|name| page != Some(name));
        match (listed.is_truncated(), names.last().cloned()) {
            (Some(true), None) => {
                Err(Error::unavailable("the store says that there is more and lists nothing"))
            }
            (Some(true), next) => Ok(FolderPage { names, next }),
            (_, _) => Ok(FolderPage { names, next: None }),
        }
    }

    async fn list_once(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let mut request = self
            .client()
            .await?
            .list_objects_v2()
            .bucket(self.bucket())
            .prefix(self.full(prefix))
            .max_keys(PAGE_OBJECTS);
        if let Some(page) = page.filter(|page| !page.is_empty()) {
            request = request.start_after(self.full(page));
        }
        let listed = request.send().await.map_err(|error| Answer::of(error, self).into_error())?;
        let root = self.full("");
        let mut objects = Vec::with_capacity(listed.contents().len());
        let mut last: Option<&str> = page;
        for object in listed.contents() {
            let key = object.key().and_then(|key| key.strip_prefix(&root));
            let Some(key) = key.filter(|key| key.starts_with(prefix)) else {
                return Err(Error::invalid(format!(
                    "the store at {} lists what was not asked for",
                    self.location()
                )));
            };
            if last.is_some_and(|last| last >= key && by_folder(last) >= by_folder(key)) {
                return Err(Error::invalid(format!(
                    "the store at {} lists keys in no order: it cannot hold a repository",
                    self.location()
                )));
            }
            last = Some(key);
            // What cannot be a key of ours was put there by somebody else.
            if let Ok(key) = ObjectKey::new(key) {
                objects.push(ObjectMeta {
                    key,
                    bytes: object.size().and_then(|b| u64::try_from(b).ok()).unwrap_or(0),
                });
            }
        }
        let next = match listed.is_truncated() {
            Some(true) if listed.contents().is_empty() => {
                return Err(Error::unavailable("the store says that there is more and lists nothing"));
            }
            Some(true) => last.map(str::to_owned),
            _ => None,
        };
        objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(ListPage { objects, next })
    }
}

/// Whether what was answered to a write comes from a store: it names an entity tag, which the page
/// of a proxy or load balancer between does not, even with status 200.
fn is_answer(e_tag: Option<&str>) -> bool {
    e_tag.is_some_and(|tag| !tag.trim_matches('"').is_empty())
}

/// The error of a write that nobody knows to have reached the store.
fn no_answer() -> Error {
    Error::unavailable("the answer to the write is no S3 answer: it names no ETag")
}

#[async_trait]
impl Storage for S3Storage {
    fn location(&self) -> String {
        format!("s3://{}", self.full_location())
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        let length = body.len();
        if length > IN_MEMORY_BYTES_MAX {
            return self.put_streamed(key, body).await;
        }
        let pieces = match body {
            PutBody::Memory(pieces) => pieces,
            spooled @ PutBody::Spooled { .. } => vec![spooled.read().await?],
        };
        let sums = body::sums(&pieces, !self.over_tls().await?).await?;
        let checksum = header_crc32(sums.crc);
        retried(self.inner.options.limits, length, self.doing("storing", key), |_| {
            self.put_once(key, body::stream(&pieces), length, &checksum, sums.sha256.clone())
        })
        .await
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        Ok(Box::new(S3Upload::new(self.clone(), key.clone())))
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        let moved = max_bytes.min(1 << 30);
        retried(self.inner.options.limits, moved, self.doing("reading", key), |_| {
            self.get_once(key, None, max_bytes)
        })
        .await
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        // S3 knows no empty range: one byte tells whether the object is there. Numbers that no
        // object reaches are not sent: a store that cannot read them may answer "past the end".
        let (offset, asked) = (offset.min(OBJECT_BYTES_MAX), length.clamp(1, OBJECT_BYTES_MAX));
        let got = retried(self.inner.options.limits, length.min(1 << 30), self.doing("reading", key), |_| {
            self.get_once(key, Some((offset, asked)), asked)
        })
        .await?;
        Ok(got.map(|bytes| if length == 0 { Bytes::new() } else { bytes }))
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        retried(self.inner.options.limits, 0, self.doing("confirming", key), |_| self.head_once(key)).await
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let what = format!("listing {}/{prefix}", self.location());
        retried(self.inner.options.limits, 0, what, |_| self.list_once(prefix, page)).await
    }

    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        let what = format!("listing {}/{prefix}", self.location());
        retried(self.inner.options.limits, 0, what, |_| self.list_folders_once(prefix, page)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        retried(self.inner.options.limits, 0, self.doing("deleting", key), |_| async {
            let request = self.client().await?.delete_object().bucket(self.bucket());
            match request.key(self.full(key.as_str())).send().await {
                Ok(_) => Ok(()),
                Err(error) => match Answer::of(error, self) {
                    Answer::NoSuchKey => Ok(()),
                    answer => Err(answer.into_error()),
                },
            }
        })
        .await
    }

    async fn unfinished(&self, prefix: &str) -> Result<Option<Vec<Unfinished>>> {
        unfinished::list(self, prefix).await
    }

    fn probe(&self) -> Option<&dyn StoreProbe> {
        Some(self)
    }

    /// When it was written: a copy is younger.
    async fn identity(&self, key: &ObjectKey) -> Result<Option<String>> {
        let written = self.last_written(key.as_str()).await?;
        Ok(written.map(|time| format!("written {}", time.to_rfc3339())))
    }

    fn removal(&self) -> Option<&dyn StoreRemoval> {
        Some(self)
    }
}

#[async_trait]
impl StoreProbe for S3Storage {
    async fn put_with_wrong_checksum(&self, key: &ObjectKey, bytes: Bytes) -> Result<bool> {
        let wrong = STANDARD.encode((crc32fast::hash(&bytes) ^ 1).to_be_bytes());
        retried(self.inner.options.limits, 0, self.doing("probing with", key), |_| async {
            let request = self.client().await?.put_object().bucket(self.bucket());
            let request = request
                .key(self.full(key.as_str()))
                .if_none_match("*")
                .checksum_crc32(&wrong)
                .body(ByteStream::from(bytes.clone()))
                .send();
            match request.await {
                Ok(_) => Ok(false),
                Err(error) => match Answer::of(error, self) {
                    Answer::WrongChecksum(_) => Ok(true),
                    answer => Err(answer.into_error()),
                },
            }
        })
        .await
    }

    async fn start_multipart(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        let mut upload = S3Upload::new(self.clone(), key.clone());
        upload.start().await?;
        Ok(Box::new(upload))
    }
}

impl S3Storage {
    fn full_location(&self) -> String {
        match self.inner.options.prefix.as_str() {
            "" => self.bucket().to_owned(),
            prefix => format!("{}/{prefix}", self.bucket()),
        }
    }

    /// Stores a long body with one conditional request, reading it while it is sent.
    ///
    /// Never in parts: there are stores that let two racing conditional completions both win.
    async fn put_streamed(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        let length = body.len();
        if length > PUT_BYTES_MAX {
            return Err(Error::invalid(format!("{key} has {length} bytes, more than S3 takes at once")));
        }
        let body = Arc::new(body);
        let checksum = header_crc32(streamed::crc32(Arc::clone(&body)).await?);
        retried(self.inner.options.limits, length, self.doing("storing", key), |_| async {
            // A taken key costs no transfer. Whether it is still taken when it matters is decided by the PUT.
            if self.head_once(key).await?.is_some() {
                return Ok(PutOutcome::Exists);
            }
            let (stream, failure) = streamed::stream(Arc::clone(&body));
            self.put_once(key, stream, length, &checksum, None)
                .await
                .map_err(|error| failure.take().unwrap_or(error))
        })
        .await
    }
}

/// What sorts a key as stores do that keep folders (SeaweedFS): name by name, so that `a/b` comes
/// before `a.b`.
fn by_folder(key: &str) -> Vec<&str> {
    key.split('/').collect()
}

/// The CRC32 of `bytes` as S3's headers spell it.
fn crc32(bytes: &[u8]) -> String {
    header_crc32(crc32fast::hash(bytes))
}

fn header_crc32(sum: u32) -> String {
    STANDARD.encode(sum.to_be_bytes())
}
