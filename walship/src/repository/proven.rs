//! What verifications have proven of a repository, kept beside it: documents that are only ever added.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::Proven;
use crate::error::{Error, Result};
use crate::storage::{ObjectKey, list_all};

use super::document;
use super::{LineageRepository, new_backup_id};

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

    /// Returns the last document of each of the last runs, in the order in which the runs began. Those that began later than
    /// `now` come first: the clock was ahead. One that cannot be read tells nothing: what it said was proven is read again.
    ///
    /// # Errors
    /// What the store says.
    pub async fn proven(&self, now: DateTime<Utc>) -> Result<Vec<Proven>> {
        let listed = list_all(&*self.storage, &self.layout.proven_prefix(), DOCUMENTS_MAX).await?;
        let mut last = BTreeMap::new();
        for meta in listed {
            let Some((id, number)) = self.layout.parse_proven(&meta.key) else { continue };
            let known = last.entry(id).or_insert((number, meta.key.clone()));
            if known.0 <= number {
                *known = (number, meta.key);
            }
        }
        // Ids begin with the time.
        let behind_now = new_backup_id(now + TimeDelta::seconds(1), 0);
        let ahead: Vec<_> = last.split_off(&behind_now).into_values().collect();
        let newest = |runs: Vec<(u32, ObjectKey)>| {
            let skipped = runs.len().saturating_sub(RUNS_MAX);
            runs.into_iter().skip(skipped)
        };
        let reads = newest(ahead).chain(newest(last.into_values().collect())).map(|(_, key)| async move {
            match document::read_within::<Proven>(&*self.storage, &key, BYTES_MAX).await {
                Err(error @ (Error::Corrupt(_) | Error::Mismatch(_))) => {
                    self.note(format!("what a verification has proven cannot be told: {error}"));
                    Ok(None)
                }
                read => read,
            }
        });
        let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        let mut read: Vec<Proven> = read.into_iter().flatten().collect();
        // The ids of one second are in any order.
        let order = |one: &Proven| (one.started <= now, one.started);
        read.sort_by(|a, b| (order(a), &a.id).cmp(&(order(b), &b.id)));
        Ok(read)
    }
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::catalog::Seen;
    use crate::pg::SegmentSize;
    use crate::repository::Repository;
    use crate::storage::memory::MemoryStorage;

    fn time(millis: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_700_000_000_000 + millis).unwrap()
    }

    fn began(millis: i64, random: u64) -> Proven {
        let started = time(millis);
        Proven { format: 1, id: new_backup_id(started, random), started, ..Proven::default() }
    }

    #[tokio::test]
    async fn runs_are_in_the_order_in_which_they_began() {
        let repository = Repository::create(Arc::new(MemoryStorage::default()), time(0)).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), time(0)).await.unwrap();
        let lineage = cluster.register_lineage(42, SegmentSize::DEFAULT, 15, time(0)).await.unwrap();
        let starts = |read: Vec<Proven>| -> Vec<i64> {
            read.iter().map(|one| (one.started - time(0)).num_milliseconds()).collect()
        };
        // Three of one second, whose ids are in another order; the last documents count.
        for (millis, random) in [(10, 9), (500, 1), (900, 5)] {
            lineage.put_proven(&began(millis, random), 1).await.unwrap();
        }
        let more = Proven { accepted: Seen { backups: vec!["b".into()], ..Seen::default() }, ..began(10, 9) };
        lineage.put_proven(&more, 2).await.unwrap();
        let read = lineage.proven(time(999)).await.unwrap();
        assert_eq!(read[0], more);
        assert_eq!(starts(read), [10, 500, 900]);
        // However many a clock wrote that was ahead, the others are read, and come last.
        for run in 0..40_u64 {
            let hours = 3_600_000 * (1000 + i64::try_from(run).unwrap());
            lineage.put_proven(&began(hours, run), 1).await.unwrap();
        }
        let starts = starts(lineage.proven(time(999)).await.unwrap());
        assert_eq!(starts.len(), RUNS_MAX + 3);
        assert_eq!(starts[RUNS_MAX..], [10, 500, 900]);
    }
}
