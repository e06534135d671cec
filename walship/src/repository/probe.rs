//! Finds out whether a store keeps the promises that a repository stands on.
//!
//! Some stores take a conditional write and ignore the condition, others look first and write
//! later: with both, one archiver silently overwrites another's segment. No document says which
//! store is which, so it is tried. What the findings mean for a command is the caller's decision.

use std::fmt;

use bytes::Bytes;
use futures_util::future::join_all;

use crate::error::{Error, Result};
use crate::storage::{ObjectKey, PutOutcome, Storage, StoreProbe};

/// How many writers race for one key.
const WRITERS: usize = 16;

/// How many uploads in parts race for one key.
const UPLOADS: usize = 4;

/// The bytes of one probe object.
const BODY_BYTES: usize = 4096;

/// One promise of a store, and whether it was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which promise.
    pub promise: Promise,
    /// What was seen instead; `None` when the promise was kept.
    pub broken: Option<String>,
}

/// What a repository relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// A key that nobody ever wrote is reported as absent, and as nothing else.
    AbsentIsSaid,
    /// Of many conditional writes to one key at once exactly one succeeds, and its content is what is read.
    OneWriterWins,
    /// An upload in parts to a taken key changes nothing.
    UploadsAreConditional,
    /// Of several uploads in parts that are completed at once exactly one succeeds.
    OneUploadWins,
    /// Content that does not match its checksum is refused.
    WrongChecksumIsRefused,
}

impl Promise {
    /// Returns whether a store that breaks it is refused.
    ///
    /// Uploads in parts that race do not refuse a store (SeaweedFS 4.48 lets two win at times): only
    /// backup data is stored in parts, under keys with random ids that no two writers share. WAL of any
    /// size goes with one conditional write.
    pub fn is_essential(self) -> bool {
        self != Self::OneUploadWins
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AbsentIsSaid => "a key that was never written is absent",
            Self::OneWriterWins => "one of many conditional writes wins",
            Self::UploadsAreConditional => "a conditional multipart completion leaves a taken key alone",
            Self::OneUploadWins => "one of many conditional multipart completions wins",
            Self::WrongChecksumIsRefused => "content with a wrong checksum is refused",
        })
    }
}

/// What a probe found, one finding for each promise that this kind of store makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// Where the store's root lies.
    pub location: String,
    /// The findings, in the order of probing.
    pub findings: Vec<Finding>,
}

impl ProbeReport {
    /// Returns whether every essential promise was kept.
    pub fn is_safe(&self) -> bool {
        self.broken(true).is_empty()
    }

    /// Returns what was seen of promises that are broken and do not refuse the store, and why they do not.
    pub fn cautions(&self) -> Vec<String> {
        let harmless =
            "this store works: WAL is never stored in parts, and backup data under keys of its own";
        self.broken(false).into_iter().map(|broken| format!("{broken}; {harmless}")).collect()
    }

    fn broken(&self, essential: bool) -> Vec<String> {
        let these = self.findings.iter().filter(|finding| finding.promise.is_essential() == essential);
        these.filter_map(|f| Some(format!("{}: {}", f.promise, f.broken.as_ref()?))).collect()
    }

    /// Returns nothing when the store is safe, else the error that refuses it.
    ///
    /// # Errors
    /// [`Error::Invalid`] with everything that was seen.
    pub fn verdict(&self) -> Result<()> {
        let broken = self.broken(true);
        if broken.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{} does not keep what a repository relies on ({})",
            self.location,
            broken.join("; ")
        ))
        .with_safe("nothing but probe objects was written")
        .with_next(
            "Use another store, or a newer release of this one; set accept_unsafe_store = true only if one \
             archiver alone ever writes here and you accept that nothing guards against a second one.",
        ))
    }
}

/// Tries the store out. Its probe objects lie under `_probe/` (no cluster can have that name) and
/// are deleted where the credentials allow it; that they stay does no harm.
///
/// # Errors
/// What the store answers when it cannot be probed at all: outage, missing bucket, refused access.
pub async fn probe(storage: &dyn Storage) -> Result<ProbeReport> {
    let mut findings = vec![absent_is_said(storage).await?, one_writer_wins(storage).await?];
    if let Some(store) = storage.probe() {
        findings.extend(uploads(storage, store).await?);
        findings.push(wrong_checksum_is_refused(storage, store).await?);
    }
    Ok(ProbeReport { location: storage.location(), findings })
}

fn random_key() -> Result<ObjectKey> {
    ObjectKey::new(format!("_probe/{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>()))
}

/// Content that tells writers apart.
fn body(writer: usize) -> Bytes {
    let id: u64 = rand::random();
    format!("walship probe {writer:02} {id:016x}\n").into_bytes().repeat(BODY_BYTES / 34).into()
}

async fn absent_is_said(storage: &dyn Storage) -> Result<Finding> {
    let found = storage.get(&random_key()?, 1 << 20).await?;
    let broken = found.map(|bytes| format!("{} bytes were read under a random key", bytes.len()));
    Ok(Finding { promise: Promise::AbsentIsSaid, broken })
}

async fn one_writer_wins(storage: &dyn Storage) -> Result<Finding> {
    let key = random_key()?;
    let bodies: Vec<Bytes> = (0..WRITERS).map(body).collect();
    let puts = bodies.iter().map(|body| storage.put_if_absent(&key, body.clone().into()));
    let outcomes = join_all(puts).await;
    let broken = judged(storage, &key, &bodies, outcomes).await;
    tidy(storage, &key).await;
    Ok(Finding { promise: Promise::OneWriterWins, broken: broken? })
}

async fn uploads(storage: &dyn Storage, store: &dyn StoreProbe) -> Result<[Finding; 2]> {
    let key = random_key()?;
    let bodies: Vec<Bytes> = (0..UPLOADS).map(body).collect();
    let mut uploads = Vec::new();
    for body in &bodies {
        let mut upload = store.start_multipart(&key).await?;
        upload.write(body.clone()).await?;
        uploads.push(upload);
    }
    let outcomes = join_all(uploads.into_iter().map(|upload| upload.finish())).await;
    // A store may answer "conflict, start again" to a completion that meets another one.
    let outcomes = outcomes.into_iter().map(|outcome| match outcome {
        Err(error) if error.is_transient() => Ok(PutOutcome::Exists),
        outcome => outcome,
    });
    let raced = judged(storage, &key, &bodies, outcomes.collect()).await?;
    let before = storage.get(&key, 1 << 20).await?;
    let mut late = store.start_multipart(&key).await?;
    late.write(body(UPLOADS)).await?;
    let outcome = late.finish().await?;
    let kept = before == storage.get(&key, 1 << 20).await?;
    tidy(storage, &key).await;
    let overwritten =
        (outcome == PutOutcome::Stored || !kept).then(|| "an upload replaced what was there".to_owned());
    Ok([
        Finding { promise: Promise::UploadsAreConditional, broken: overwritten },
        Finding { promise: Promise::OneUploadWins, broken: raced },
    ])
}

async fn wrong_checksum_is_refused(storage: &dyn Storage, store: &dyn StoreProbe) -> Result<Finding> {
    let key = random_key()?;
    let refused = store.put_with_wrong_checksum(&key, body(0)).await?;
    let broken = (!refused).then(|| "it was stored".to_owned());
    if !refused {
        tidy(storage, &key).await;
    }
    Ok(Finding { promise: Promise::WrongChecksumIsRefused, broken })
}

/// What was wrong with a race for one key, if anything.
async fn judged(
    storage: &dyn Storage,
    key: &ObjectKey,
    bodies: &[Bytes],
    outcomes: Vec<Result<PutOutcome>>,
) -> Result<Option<String>> {
    let mut winners = Vec::new();
    for (writer, outcome) in outcomes.into_iter().enumerate() {
        if outcome? == PutOutcome::Stored {
            winners.push(writer);
        }
    }
    let stored = storage.get(key, 1 << 20).await?;
    Ok(match (winners.as_slice(), stored) {
        ([winner], Some(stored)) if stored == bodies[*winner] => None,
        ([_], Some(_)) => Some("the content that is read is not the winner's".to_owned()),
        ([_], None) => Some("the key is absent after a write succeeded".to_owned()),
        // The answer to the first write may have been lost and its repetition told that the key is taken.
        ([], Some(stored)) if bodies.contains(&stored) => None,
        (winners, _) => {
            Some(format!("{} of {} writers were told that they won", winners.len(), bodies.len()))
        }
    })
}

async fn tidy(storage: &dyn Storage, key: &ObjectKey) {
    if let Err(error) = storage.delete(key).await {
        tracing::debug!("a probe object stays: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[tokio::test]
    async fn a_sound_storage_passes_and_is_left_clean() {
        let storage = MemoryStorage::new();
        let report = probe(&storage).await.unwrap();
        assert!(report.is_safe());
        report.verdict().unwrap();
        assert_eq!(report.findings.len(), 2, "a storage in memory makes no promises about uploads");
        assert!(storage.keys().is_empty());
    }

    #[test]
    fn the_verdict_names_what_is_broken() {
        let finding = |promise, broken: Option<&str>| Finding { promise, broken: broken.map(str::to_owned) };
        let report = ProbeReport {
            location: "s3://bucket".into(),
            findings: vec![
                finding(Promise::AbsentIsSaid, None),
                finding(Promise::OneWriterWins, Some("16 of 16 writers were told that they won")),
            ],
        };
        let error = report.verdict().unwrap_err();
        assert_eq!(
            error.to_string(),
            "s3://bucket does not keep what a repository relies on (one of many conditional writes wins: \
             16 of 16 writers were told that they won)"
        );
        assert!(error.next().contains("accept_unsafe_store"));
    }
}
