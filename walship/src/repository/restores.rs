//! The records of restores: written after each, read for a forecast.

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::RestoreRecord;
use crate::error::Result;
use crate::storage::list_all;

use super::LineageRepository;
use super::document;

/// More restores than are ever recorded.
const RESTORES_MAX: usize = 100_000;

/// How many records are read at once.
const READS_MAX: usize = 8;

impl LineageRepository {
    /// Records a restore. The same record again is success.
    ///
    /// # Errors
    /// What the store says: where credentials allow no writing, [`Error::Denied`](crate::Error::Denied).
    /// # Durability
    /// After `Ok` the record survives a crash.
    pub async fn put_restore_record(&self, record: &RestoreRecord) -> Result<()> {
        document::put_same(&*self.storage, &self.layout.restore_record(&record.id)?, record).await
    }

    /// Returns the records of the last `max` restores, the newest first; from the first repository that has any.
    ///
    /// # Errors
    /// What listing and reading fail with.
    pub async fn recent_restores(&self, max: usize) -> Result<Vec<RestoreRecord>> {
        for one in self.each() {
            let listed = list_all(&*one.storage, &one.layout.restore_records_prefix(), RESTORES_MAX).await?;
            let reads = listed
                .iter()
                .rev()
                .take(max)
                .map(|meta| document::read::<RestoreRecord>(&*one.storage, &meta.key));
            let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
            if !read.is_empty() {
                return Ok(read.into_iter().flatten().collect());
            }
        }
        Ok(Vec::new())
    }
}
