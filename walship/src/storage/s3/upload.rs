//! Uploads of unknown length: one conditional PUT when they turn out short, else parts.

use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use super::answer::Answer;
use super::{S3Storage, crc32, is_answer, no_answer};
use crate::error::{Error, Result};
use crate::storage::retry::retried;
use crate::storage::{ObjectKey, PutBody, PutOutcome, Storage as _, Upload};

/// S3 takes no more.
const PARTS_MAX: usize = 10_000;

/// An upload; what has been written is in memory (less than one part) or under way in parts.
pub(super) struct S3Upload {
    storage: S3Storage,
    key: ObjectKey,
    /// The upload's id, once there is one.
    id: Option<Arc<str>>,
    buffer: BytesMut,
    started: usize,
    done: Vec<CompletedPart>,
    under_way: JoinSet<Result<CompletedPart>>,
}

impl S3Upload {
    pub(super) fn new(storage: S3Storage, key: ObjectKey) -> Self {
        Self {
            storage,
            key,
            id: None,
            buffer: BytesMut::new(),
            started: 0,
            done: Vec::new(),
            under_way: JoinSet::new(),
        }
    }

    /// Starts a multipart upload unless there is one.
    pub(super) async fn start(&mut self) -> Result<Arc<str>> {
        if let Some(id) = &self.id {
            return Ok(Arc::clone(id));
        }
        let storage = &self.storage;
        let what = storage.doing("starting the upload of", &self.key);
        let id: Arc<str> = retried(storage.inner.options.limits, 0, what, |_| async {
            let request = storage.client().await?.create_multipart_upload().bucket(storage.bucket());
            let started = request
                .key(storage.full(self.key.as_str()))
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .send()
                .await
                .map_err(|error| Answer::of(error, storage).into_error())?;
            let id = started.upload_id().filter(|id| !id.is_empty());
            id.map(Arc::from).ok_or_else(|| Error::unavailable("the store named no upload"))
        })
        .await?;
        self.id = Some(Arc::clone(&id));
        Ok(id)
    }

    /// Sends what is buffered as the next part, after waiting for a free place among those under way.
    async fn send_part(&mut self) -> Result<()> {
        if self.started == PARTS_MAX {
            let most = PARTS_MAX * self.storage.inner.options.part_bytes;
            return Err(Error::invalid(format!("{} is longer than {most} bytes", self.key)));
        }
        let id = self.start().await?;
        while self.under_way.len() >= self.storage.inner.options.parts_max {
            self.wait_for_part().await?;
        }
        self.started += 1;
        let bytes = self.buffer.split().freeze();
        let number = i32::try_from(self.started).unwrap_or(i32::MAX);
        self.under_way.spawn(put_part(self.storage.clone(), self.key.clone(), id, number, bytes));
        Ok(())
    }

    async fn wait_for_part(&mut self) -> Result<()> {
        match self.under_way.join_next().await {
            Some(Ok(part)) => self.done.push(part?),
            Some(Err(error)) => return Err(Error::unavailable(format!("a part was given up: {error}"))),
            None => {}
        }
        Ok(())
    }

    /// Publishes the object; tells a conflict from other failures.
    async fn complete(mut self: Box<Self>) -> Result<PutOutcome, Answer> {
        if self.id.is_none() {
            let bytes = self.buffer.split().freeze();
            return self.storage.put_if_absent(&self.key, PutBody::from(bytes)).await.map_err(other);
        }
        let outcome = self.complete_parts().await;
        if !matches!(outcome, Ok(PutOutcome::Stored)) {
            self.abort().await;
        }
        outcome
    }

    async fn complete_parts(&mut self) -> Result<PutOutcome, Answer> {
        if !self.buffer.is_empty() || self.started == 0 {
            self.send_part().await.map_err(other)?;
        }
        while !self.under_way.is_empty() {
            self.wait_for_part().await.map_err(other)?;
        }
        self.done.sort_by_key(|part| part.part_number());
        let parts = CompletedMultipartUpload::builder().set_parts(Some(self.done.clone())).build();
        let (storage, key, id) = (&self.storage, &self.key, self.id.as_deref().unwrap_or_default());
        let what = storage.doing("completing", key);
        retried(storage.inner.options.limits, 0, what, |attempt| {
            let parts = parts.clone();
            async move {
                let request = storage.client().await?.complete_multipart_upload().bucket(storage.bucket());
                let answer = request
                    .key(storage.full(key.as_str()))
                    .upload_id(id)
                    .multipart_upload(parts)
                    .if_none_match("*")
                    .send()
                    .await;
                match answer.map_err(|error| Answer::of(error, storage)) {
                    Ok(stored) if !is_answer(stored.e_tag()) => Err(no_answer()),
                    Ok(_) => Ok(Ok(PutOutcome::Stored)),
                    Err(Answer::Taken) => Ok(Ok(PutOutcome::Exists)),
                    // Completed by an earlier attempt whose answer was lost? Then something is there now.
                    Err(Answer::NoSuchUpload(error)) if attempt > 1 => match storage.head_once(key).await? {
                        Some(_) => Ok(Ok(PutOutcome::Exists)),
                        None => Ok(Err(other(error))),
                    },
                    // Trying to complete it again is in vain: it has to be uploaded again.
                    Err(conflict @ (Answer::Conflict(_) | Answer::NoSuchUpload(_))) => Ok(Err(conflict)),
                    Err(answer) => Err(answer.into_error()),
                }
            }
        })
        .await
        .map_err(other)?
    }
}

fn other(error: Error) -> Answer {
    Answer::Other { status: None, error }
}

async fn put_part(
    storage: S3Storage,
    key: ObjectKey,
    id: Arc<str>,
    number: i32,
    bytes: Bytes,
) -> Result<CompletedPart> {
    let checksum = crc32(&bytes);
    let what = format!("{} (part {number})", storage.doing("storing", &key));
    retried(storage.inner.options.limits, bytes.len() as u64, what, |_| async {
        let request = storage
            .client()
            .await?
            .upload_part()
            .bucket(storage.bucket())
            .key(storage.full(key.as_str()))
            .upload_id(id.as_ref())
            .part_number(number)
            .checksum_crc32(&checksum)
            .content_length(i64::try_from(bytes.len()).unwrap_or(i64::MAX))
            .body(ByteStream::from(bytes.clone()))
            .customize();
        let request = if storage.over_tls().await? { request.disable_payload_signing() } else { request };
        let stored = request.send().await.map_err(|error| Answer::of(error, &storage).into_error())?;
        if !is_answer(stored.e_tag()) {
            return Err(no_answer());
        }
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(stored.e_tag().map(str::to_owned))
            .checksum_crc32(&checksum)
            .build())
    })
    .await
}

#[async_trait]
impl Upload for S3Upload {
    async fn write(&mut self, mut bytes: Bytes) -> Result<()> {
        let part_bytes = self.storage.inner.options.part_bytes;
        while !bytes.is_empty() {
            // A full buffer is sent only when more comes: what fits into one part is put whole.
            if self.buffer.len() == part_bytes {
                self.send_part().await?;
            }
            let taken = bytes.split_to(bytes.len().min(part_bytes - self.buffer.len()));
            self.buffer.extend_from_slice(&taken);
        }
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<PutOutcome> {
        let what = self.storage.doing("storing", &self.key);
        self.complete().await.map_err(|answer| match answer {
            Answer::Conflict(error) => error
                .context(what)
                .with_next("Another upload to the same name ended at the same moment: start this one again."),
            answer => answer.into_error(),
        })
    }

    async fn abort(mut self: Box<Self>) {
        self.under_way.shutdown().await;
        let Some(id) = self.id.take() else { return };
        let storage = &self.storage;
        let what = storage.doing("aborting the upload of", &self.key);
        let aborted = retried(storage.inner.options.limits, 0, what, |_| async {
            let request = storage.client().await?.abort_multipart_upload().bucket(storage.bucket());
            match request.key(storage.full(self.key.as_str())).upload_id(id.as_ref()).send().await {
                Ok(_) => Ok(()),
                Err(error) => match Answer::of(error, storage) {
                    Answer::NoSuchUpload(_) => Ok(()),
                    answer => Err(answer.into_error()),
                },
            }
        })
        .await;
        if let Err(error) = aborted {
            tracing::warn!("an unfinished upload stays in the store: {error}");
        }
    }
}
