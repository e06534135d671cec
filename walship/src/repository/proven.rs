//! What verifications have proven of a repository, kept beside it: documents that are only ever added.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::Proven;
use crate::error::{Error, Result};
use crate::storage::list_all;

use super::LineageRepository;
use super::document;

/// More documents than are ever written.
const DOCUMENTS_MAX: usize = 1_000_000;

/// So many runs' documents are read: each holds what was known when it was written.
const RUNS_MAX: usize = 32;

/// How many are read at once.
const READS_MAX: usize = 8;

/// The longest document that is read.
const BYTES_MAX: u64 = 64 << 20;

impl LineageRepository {
    /// Stores what is proven: the `number`th document of a verification.
    ///
    /// # Errors
    /// What the store says: where credentials allow no writing, [`Error::Denied`].
    /// # Durability
    /// After `Ok` it survives a crash.
    pub async fn put_proven(&self, proven: &Proven, number: u32) -> Result<()> {
        let key = self.layout.proven(&proven.id, number)?;
        document::put_same_within(&*self.storage, &key, proven, BYTES_MAX).await
    }

    /// Returns the last document of each of the last runs, the oldest first. One that cannot be read tells nothing: what
    /// it said was proven is read again.
    ///
    /// # Errors
    /// What the store says.
    pub async fn proven(&self) -> Result<Vec<Proven>> {
        let listed = list_all(&*self.storage, &self.layout.proven_prefix(), DOCUMENTS_MAX).await?;
        let mut last = BTreeMap::new();
        for meta in listed {
            let Some((id, number)) = self.layout.parse_proven(&meta.key) else { continue };
            let known = last.entry(id).or_insert((number, meta.key.clone()));
            if known.0 <= number {
                *known = (number, meta.key);
            }
        }
        let newest = last.into_values().rev().take(RUNS_MAX).collect::<Vec<_>>();
        let reads = newest.into_iter().rev().map(|(_, key)| async move {
            match document::read_within::<Proven>(&*self.storage, &key, BYTES_MAX).await {
                Err(error @ (Error::Corrupt(_) | Error::Mismatch(_))) => {
                    self.note(format!("what a verification has proven cannot be told: {error}"));
                    Ok(None)
                }
                read => read,
            }
        });
        let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }
}
