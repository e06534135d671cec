//! Removal of many objects: with one request where the store knows how, else one by one.

use async_trait::async_trait;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::S3Storage;
use super::answer::Answer;
use crate::error::{Error, Result};
use crate::storage::retry::retried;
use crate::storage::{ObjectKey, REMOVE_MAX, Removed, StoreRemoval};

/// How many objects are removed at once where each takes a request.
const REQUESTS_MAX: usize = 16;

/// What credentials need to remove objects.
const GRANT: &str = "Give `pitr expire` credentials that may delete (s3:DeleteObject), in expire_access_key_id and \
                     expire_secret_access_key of the repository, or let the store's own rules remove what is old.";

/// What became of a request for many.
enum Batch {
    Done(Removed),
    /// The store does not know such requests.
    Unknown,
}

#[async_trait]
impl StoreRemoval for S3Storage {
    async fn remove(&self, keys: &[ObjectKey]) -> Result<Removed> {
        match keys {
            [] => return Ok(Removed::default()),
            [one] => return self.remove_one(one).await.map_err(forbidden),
            _ => {}
        }
        if keys.len() > REMOVE_MAX {
            return Err(Error::invalid(format!("{} keys are more than one removal takes", keys.len())));
        }
        let what = format!("removing {} objects of {}", keys.len(), self.location_text());
        let limits = self.inner.options.limits;
        match retried(limits, 0, what, |_| self.remove_batch(keys)).await.map_err(forbidden)? {
            Batch::Done(removed) => Ok(removed),
            Batch::Unknown => self.remove_each(keys).await.map_err(forbidden),
        }
    }

    async fn last_written(&self, prefix: &str) -> Result<Option<DateTime<Utc>>> {
        let (full, mut newest, mut after) = (self.full(prefix), None, None::<String>);
        loop {
            let what = format!("listing {prefix} in {}", self.location_text());
            // The time of a listing is that of a HEAD, and a listing tells what is not there without a 404.
            let listed = retried(self.inner.options.limits, 0, what, |_| async {
                let request = self.client().await?.list_objects_v2().bucket(self.bucket()).prefix(&full);
                let listed = request.set_start_after(after.clone()).send().await;
                listed.map_err(|error| Answer::of(error, self).into_error())
            });
            let listed = listed.await?;
            let times = listed.contents().iter().filter_map(|object| {
                let time = object.last_modified()?;
                DateTime::from_timestamp(time.secs(), time.subsec_nanos())
            });
            newest = newest.max(times.max());
            let last = listed.contents().last().and_then(|object| object.key());
            match last.filter(|_| listed.is_truncated() == Some(true)) {
                Some(last) => after = Some(last.to_owned()),
                None => return Ok(newest),
            }
        }
    }
}

impl S3Storage {
    fn location_text(&self) -> String {
        crate::storage::Storage::location(self)
    }

    async fn remove_each(&self, keys: &[ObjectKey]) -> Result<Removed> {
        let removals = keys.iter().cloned().map(|key| async move { self.remove_one(&key).await });
        let removed: Vec<Removed> =
            futures_util::stream::iter(removals).buffer_unordered(REQUESTS_MAX).try_collect().await?;
        let kept_as_versions = removed.iter().map(|one| one.kept_as_versions).sum();
        Ok(Removed { kept_as_versions })
    }

    async fn remove_one(&self, key: &ObjectKey) -> Result<Removed> {
        retried(self.inner.options.limits, 0, self.doing("removing", key), |_| async {
            let request = self.client().await?.delete_object().bucket(self.bucket());
            match request.key(self.full(key.as_str())).send().await {
                Ok(deleted) => {
                    Ok(Removed { kept_as_versions: u64::from(deleted.delete_marker() == Some(true)) })
                }
                Err(error) => match Answer::of(error, self) {
                    Answer::NoSuchKey => Ok(Removed::default()),
                    answer => Err(answer.into_error()),
                },
            }
        })
        .await
    }

    async fn remove_batch(&self, keys: &[ObjectKey]) -> Result<Batch> {
        let unsendable = |error| Error::invalid(format!("the request cannot be made: {error}"));
        let mut objects = Vec::with_capacity(keys.len());
        for key in keys {
            let object = ObjectIdentifier::builder().key(self.full(key.as_str()));
            objects.push(object.build().map_err(unsendable)?);
        }
        let delete = Delete::builder().set_objects(Some(objects)).build().map_err(unsendable)?;
        let request = self.client().await?.delete_objects().bucket(self.bucket());
        let answer = match request.delete(delete).send().await {
            Ok(answer) => answer,
            Err(error) => {
                return match Answer::of(error, self) {
                    Answer::Other { status: Some(405 | 501), .. } => Ok(Batch::Unknown),
                    answer => Err(answer.into_error()),
                };
            }
        };
        let failed = answer.errors().iter().filter(|error| error.code() != Some("NoSuchKey"));
        let failed: Vec<_> = failed.collect();
        if let Some(first) = failed.first() {
            let code = first.code().unwrap_or("no code");
            let text = format!(
                "the store removed {} of {} objects and refused {}, the first with {}: {}",
                keys.len().saturating_sub(failed.len()),
                keys.len(),
                failed.len(),
                printable(code),
                printable(first.message().unwrap_or_default()),
            );
            return Err(match code {
                "InternalError" | "SlowDown" | "ServiceUnavailable" | "RequestTimeout"
                | "OperationAborted" => Error::unavailable(text),
                _ => Error::denied(text),
            });
        }
        let marked = answer.deleted().iter().filter(|one| one.delete_marker() == Some(true));
        Ok(Batch::Done(Removed { kept_as_versions: marked.count() as u64 }))
    }
}

fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn forbidden(error: Error) -> Error {
    match error {
        Error::Denied(_) => error.with_safe("what was not removed is as it was").with_next(GRANT),
        error => error,
    }
}
