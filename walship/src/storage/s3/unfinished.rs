//! Multipart uploads that nobody completed or aborted: they cost money and show in no listing of objects.

use chrono::{DateTime, Utc};

use super::S3Storage;
use super::answer::Answer;
use crate::error::Result;
use crate::storage::retry::retried;
use crate::storage::{ObjectKey, Storage as _, Unfinished};

/// More than anybody wants to read about.
const UNFINISHED_MAX: usize = 1000;

/// Where the next page begins.
type Marker = (String, Option<String>);

/// Returns the uploads under `prefix`, oldest first; `None` when the store has no such listing.
pub(super) async fn list(storage: &S3Storage, prefix: &str) -> Result<Option<Vec<Unfinished>>> {
    let mut found = Vec::new();
    let mut marker: Option<Marker> = None;
    loop {
        let what = format!("listing unfinished uploads of {}/{prefix}", storage.location());
        let page =
            retried(storage.inner.options.limits, 0, what, |_| page(storage, prefix, marker.clone())).await?;
        let Some((uploads, next)) = page else { return Ok(None) };
        found.extend(uploads);
        // A marker that does not move would be followed without end.
        if next.is_none() || next == marker || found.len() >= UNFINISHED_MAX {
            found.truncate(UNFINISHED_MAX);
            found.sort_by_key(|upload| upload.since);
            return Ok(Some(found));
        }
        marker = next;
    }
}

async fn page(
    storage: &S3Storage,
    prefix: &str,
    marker: Option<Marker>,
) -> Result<Option<(Vec<Unfinished>, Option<Marker>)>> {
    let full = storage.full(prefix);
    let mut request =
        storage.client().await?.list_multipart_uploads().bucket(storage.bucket()).prefix(full.as_str());
    if let Some((key, id)) = marker {
        request = request.key_marker(key).set_upload_id_marker(id);
    }
    let listed = match request.send().await.map_err(|error| Answer::of(error, storage)) {
        Ok(listed) => listed,
        // The store does not know the question.
        Err(Answer::Other { status: Some(405 | 501), .. }) => return Ok(None),
        Err(answer) => return Err(answer.into_error()),
    };
    let mut uploads = Vec::new();
    for upload in listed.uploads() {
        let (Some(key), Some(id)) = (upload.key(), upload.upload_id()) else { continue };
        // Some stores take the prefix for a folder's name, others leave it out of account.
        let Some(own) = key.strip_prefix(&storage.full("")).filter(|own| own.starts_with(prefix)) else {
            continue;
        };
        // What cannot be a key of ours is somebody else's upload.
        if ObjectKey::new(own).is_err() {
            continue;
        }
        let since = upload.initiated().and_then(|at| DateTime::<Utc>::from_timestamp(at.secs(), 0));
        uploads.push(Unfinished {
            what: format!("the unfinished upload of {}/{own}", storage.location()),
            since,
            mend: mend(storage.bucket(), key, id),
        });
    }
    let next = (listed.is_truncated() == Some(true))
        .then(|| {
            Some((listed.next_key_marker()?.to_owned(), listed.next_upload_id_marker().map(str::to_owned)))
        })
        .flatten();
    Ok(Some((uploads, next)))
}

fn mend(bucket: &str, key: &str, id: &str) -> String {
    // The id is the store's: nothing in it may mean something to a shell or a terminal.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-~+/=:".contains(&b);
    let abort = if id.bytes().all(plain) {
        format!("aws s3api abort-multipart-upload --bucket {bucket} --key {key} --upload-id={id}")
    } else {
        "abort it with the store's own tools".to_owned()
    };
    format!(
        "Unless a backup runs: {abort}; a lifecycle rule AbortIncompleteMultipartUpload does that for good."
    )
}
