//! The records of what was done with an archive, one document each, written after it: restores, drills, extracts,
//! verifications; and
//! those of removals, which are written before.
//! The reports of drills lie beside them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::catalog::{
    BackupRun, ChangeRecord, DrillRecord, ExpireOutcome, ExpireRecord, ExpireRemoved, ExtractRecord,
    RecordHead, RestoreRecord, VerifyRecord,
};
use crate::error::{Error, Result};
use crate::storage::{PutOutcome, list_all};

use super::document;
use super::{LineageRepository, RecordedBy, new_backup_id};

/// More records of one kind than are ever written.
const RECORDS_MAX: usize = 100_000;

/// How many records are read at once.
const READS_MAX: usize = 8;

/// The longest report that is stored or read.
const REPORT_BYTES_MAX: u64 = 32 << 20;

const RESTORES: &str = "restores";
const DRILLS: &str = "drills";
const EXTRACTS: &str = "extracts";
const BACKUPS: &str = "backups";
const CHANGES: &str = "changes";
const CONFIGURATIONS: &str = "configurations";
const EXPIRES: &str = "expires";
const VERIFICATIONS: &str = "verifications";

/// The forms in which a drill's report is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrillReportForm {
    /// For programs.
    Json,
    /// For people.
    Text,
    /// One page without anything outside it.
    Html,
}

impl DrillReportForm {
    fn file(self) -> &'static str {
        match self {
            Self::Json => "report.json",
            Self::Text => "report.txt",
            Self::Html => "report.html",
        }
    }
}

/// What is below `history/expires/`.
#[derive(Deserialize)]
#[serde(untagged)]
enum ExpireDocument {
    Outcome(ExpireOutcome),
    Record(ExpireRecord),
    Removed(ExpireRemoved),
}

/// How many documents a removal has.
const EXPIRE_DOCUMENTS: usize = 3;

/// Returns what a record of something that this process does begins with.
pub fn record_head(started: DateTime<Utc>, reason: Option<&str>, random: u64) -> RecordHead {
    let RecordedBy { host, user } = RecordedBy::now();
    let id = new_backup_id(started, random);
    RecordHead { format: 1, id, started, host, user, reason: reason.map(str::to_owned) }
}

impl LineageRepository {
    /// Records a restore. The same record again is success.
    ///
    /// # Errors
    /// What the store says: where credentials allow no writing, [`Error::Denied`].
    /// # Durability
    /// After `Ok` the record survives a crash.
    pub async fn put_restore_record(&self, record: &RestoreRecord) -> Result<()> {
        self.put_record(RESTORES, &record.head.id, record).await
    }

    /// Records a drill, as [`put_restore_record`](Self::put_restore_record). Its reports come before.
    ///
    /// # Errors
    /// As there.
    pub async fn put_drill_record(&self, record: &DrillRecord) -> Result<()> {
        self.put_record(DRILLS, &record.head.id, record).await
    }

    /// Records an extract, as [`put_restore_record`](Self::put_restore_record).
    ///
    /// # Errors
    /// As there.
    pub async fn put_extract_record(&self, record: &ExtractRecord) -> Result<()> {
        self.put_record(EXTRACTS, &record.head.id, record).await
    }

    /// Records a backup that was taken or tried, as [`put_restore_record`](Self::put_restore_record).
    ///
    /// # Errors
    /// As there.
    pub async fn put_backup_run(&self, record: &BackupRun) -> Result<()> {
        self.put_record(BACKUPS, &record.head.id, record).await
    }

    /// Records a change, as [`put_restore_record`](Self::put_restore_record).
    ///
    /// # Errors
    /// As there.
    pub async fn put_change_record(&self, record: &ChangeRecord) -> Result<()> {
        self.put_record(CHANGES, &record.head.id, record).await
    }

    /// Records what is configured, as [`put_restore_record`](Self::put_restore_record).
    ///
    /// # Errors
    /// As there.
    pub(super) async fn put_configuration_record(&self, record: &ChangeRecord) -> Result<()> {
        self.put_record(CONFIGURATIONS, &record.head.id, record).await
    }

    /// Records a verification of this repository, as [`put_restore_record`](Self::put_restore_record).
    ///
    /// # Errors
    /// As there.
    pub async fn put_verify_record(&self, record: &VerifyRecord) -> Result<()> {
        self.put_record(VERIFICATIONS, &record.head.id, record).await
    }

    /// Returns the records of the last `max` restores, the newest first, of all repositories together: what was done while one
    /// of them could not be written is on record in the others.
    ///
    /// # Errors
    /// What listing and reading fail with.
    pub async fn recent_restores(&self, max: usize) -> Result<Vec<RestoreRecord>> {
        self.recent(RESTORES, max, |record: &RestoreRecord| &record.head).await
    }

    /// Returns the records of the last `max` drills, as [`recent_restores`](Self::recent_restores).
    ///
    /// # Errors
    /// As there.
    pub async fn recent_drills(&self, max: usize) -> Result<Vec<DrillRecord>> {
        self.recent(DRILLS, max, |record: &DrillRecord| &record.head).await
    }

    /// Returns the records of the last `max` extracts, as [`recent_restores`](Self::recent_restores).
    ///
    /// # Errors
    /// As there.
    pub async fn recent_extracts(&self, max: usize) -> Result<Vec<ExtractRecord>> {
        self.recent(EXTRACTS, max, |record: &ExtractRecord| &record.head).await
    }

    /// Returns the records of the last `max` verifications, the newest first, of all repositories: each has its own.
    ///
    /// # Errors
    /// As [`recent_restores`](Self::recent_restores).
    pub async fn recent_verifications(&self, max: usize) -> Result<Vec<VerifyRecord>> {
        let mut records: Vec<VerifyRecord> = Vec::new();
        for one in self.each() {
            records.extend(one.recent_here(VERIFICATIONS, max).await?);
        }
        keep_newest(&mut records, max, |record| &record.head);
        Ok(records)
    }

    /// Returns the records of the last `max` backups that were taken or tried, as
    /// [`recent_restores`](Self::recent_restores).
    ///
    /// # Errors
    /// As there.
    pub async fn recent_backup_runs(&self, max: usize) -> Result<Vec<BackupRun>> {
        self.recent(BACKUPS, max, |record: &BackupRun| &record.head).await
    }

    /// Returns the records of the last `max` changes, those of the configuration among them, as [`recent_restores`](Self::recent_restores).
    ///
    /// # Errors
    /// As there.
    pub async fn recent_changes(&self, max: usize) -> Result<Vec<ChangeRecord>> {
        let mut records = self.recent(CHANGES, max, |record: &ChangeRecord| &record.head).await?;
        records.extend(self.recent_configurations(max).await?);
        keep_newest(&mut records, max, |record| &record.head);
        Ok(records)
    }

    /// Returns the records of the last `max` configurations, as [`recent_restores`](Self::recent_restores).
    ///
    /// # Errors
    /// As there.
    pub(super) async fn recent_configurations(&self, max: usize) -> Result<Vec<ChangeRecord>> {
        self.recent(CONFIGURATIONS, max, |record: &ChangeRecord| &record.head).await
    }

    /// Returns the records of the last `max` removals, each with how it ended, as
    /// [`recent_restores`](Self::recent_restores); `None` for the end of one that was killed, or is at work.
    ///
    /// # Errors
    /// As there.
    pub async fn recent_expires(&self, max: usize) -> Result<Vec<(ExpireRecord, Option<ExpireOutcome>)>> {
        let (mut records, mut ends) = (Vec::new(), BTreeMap::new());
        // Each repository has its own removals, and the end of each has a document of its own.
        for one in self.each() {
            for document in one.recent_here(EXPIRES, max.saturating_mul(EXPIRE_DOCUMENTS)).await? {
                match document {
                    ExpireDocument::Outcome(outcome) => drop(ends.insert(outcome.id.clone(), outcome)),
                    ExpireDocument::Record(record) => records.push(record),
                    ExpireDocument::Removed(_) => {}
                }
            }
        }
        records.sort_by(|a, b| (b.started, &b.id).cmp(&(a.started, &a.id)));
        records.truncate(max);
        let with_end = |record: ExpireRecord| {
            let end = ends.remove(&record.id);
            (record, end)
        };
        Ok(records.into_iter().map(with_end).collect())
    }

    /// Returns the backups that removals have removed from this repository, the last `max` removals.
    ///
    /// # Errors
    /// As [`recent_expires`](Self::recent_expires).
    pub async fn removed_backups(&self, max: usize) -> Result<BTreeSet<String>> {
        let (mut removed, mut planned, mut done) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
        for document in self.recent_here(EXPIRES, max.saturating_mul(EXPIRE_DOCUMENTS)).await? {
            match document {
                ExpireDocument::Removed(told) => removed.extend(told.removed),
                ExpireDocument::Record(record) => planned.push(record),
                ExpireDocument::Outcome(outcome) if outcome.failure.is_none() => {
                    done.insert(outcome.id);
                }
                ExpireDocument::Outcome(_) => {}
            }
        }
        // One that came to its end has removed all that it was about to.
        for record in planned.into_iter().filter(|record| !record.tells_removed || done.contains(&record.id))
        {
            removed.extend(record.backups.into_iter().map(|backup| backup.id));
        }
        Ok(removed)
    }

    /// Stores one form of a drill's report. One that is there already, with whatever content, is a conflict.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that is longer than any that is read, and what the store says.
    pub async fn put_drill_report(&self, id: &str, form: DrillReportForm, report: Bytes) -> Result<()> {
        if report.len() as u64 > REPORT_BYTES_MAX {
            return Err(Error::invalid(format!("the report has {} bytes, more than are read", report.len())));
        }
        let key = self.layout.drill_report(id, form.file())?;
        match self.storage.put_if_absent(&key, report.into()).await? {
            PutOutcome::Stored => Ok(()),
            PutOutcome::Exists => {
                Err(Error::conflict(format!("{}/{key} is already stored", self.storage.location())))
            }
        }
    }

    /// Returns one form of a drill's report, from the first repository that has it; `None` where none has.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no drill's id, and what the store says.
    pub async fn get_drill_report(&self, id: &str, form: DrillReportForm) -> Result<Option<Bytes>> {
        for one in self.each() {
            let key = one.layout.drill_report(id, form.file())?;
            if let Some(report) = one.storage.get(&key, REPORT_BYTES_MAX).await? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    async fn put_record<T>(&self, deeds: &str, id: &str, record: &T) -> Result<()>
    where
        T: Serialize + DeserializeOwned + PartialEq,
    {
        document::put_same(&*self.storage, &self.layout.history_record(deeds, id)?, record).await
    }

    /// Returns the last `max` records of a kind of which each repository is to have a copy. Where the copies differ, that of
    /// the first repository counts. One that cannot be read does not hide what the others tell; that is noted.
    async fn recent<T: DeserializeOwned>(
        &self,
        deeds: &str,
        max: usize,
        head: fn(&T) -> &RecordHead,
    ) -> Result<Vec<T>> {
        let (mut records, mut known, mut unread) = (Vec::new(), BTreeSet::new(), Vec::new());
        let each = self.each();
        for one in &each {
            match one.recent_here::<T>(deeds, max).await {
                Ok(read) => {
                    records.extend(read.into_iter().filter(|record| known.insert(head(record).id.clone())))
                }
                Err(error) => unread.push((one.location(), error)),
            }
        }
        if unread.len() == each.len()
            && let Some((_, error)) = unread.pop()
        {
            return Err(error);
        }
        for (place, error) in unread {
            self.note(format!("the history of {place} cannot be read: {error}"));
        }
        keep_newest(&mut records, max, head);
        Ok(records)
    }

    /// Returns the last `max` documents of a kind in this repository, the newest first, without those that are damaged: nothing
    /// depends on them, and one must not hide the others.
    async fn recent_here<T: DeserializeOwned>(&self, deeds: &str, max: usize) -> Result<Vec<T>> {
        let listed = list_all(&*self.storage, &self.layout.history_prefix(deeds), RECORDS_MAX).await?;
        let reads = listed.iter().rev().take(max).map(|meta| async move {
            match document::read::<T>(&*self.storage, &meta.key).await {
                Err(error @ (Error::Corrupt(_) | Error::Mismatch(_))) => {
                    self.note(format!("a record of the history is left out: {error}"));
                    Ok(None)
                }
                Err(error) if self.storage.skip(meta.key.as_str(), &error) => Ok(None),
                read => read,
            }
        });
        let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }
}

/// Leaves the last `max` records, the newest first.
fn keep_newest<T>(records: &mut Vec<T>, max: usize, head: fn(&T) -> &RecordHead) {
    records.sort_by(|one, other| {
        let (one, other) = (head(one), head(other));
        (other.started, &other.id).cmp(&(one.started, &one.id))
    });
    records.truncate(max);
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::{TimeZone as _, Utc};

    use super::*;
    use crate::pg::SegmentSize;
    use crate::repository::Repository;
    use crate::repository::testing::made_up_drill;
    use crate::storage::memory::MemoryStorage;

    async fn lineage() -> LineageRepository {
        let now = Utc.timestamp_opt(1_700_000_000, 0).unwrap();
        let repository = Repository::create(Arc::new(MemoryStorage::default()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap()
    }

    fn record(second: i64) -> DrillRecord {
        let started = Utc.timestamp_opt(1_700_000_000 + second, 0).unwrap();
        made_up_drill(started, "proven")
    }

    #[tokio::test]
    async fn what_only_one_of_several_repositories_has_on_record_is_told() {
        let (first, second) = (lineage().await, lineage().await);
        for second_of_day in [1, 3] {
            first.put_drill_record(&record(second_of_day)).await.unwrap();
        }
        for second_of_day in [2, 3, 4] {
            let elsewhere = DrillRecord { read_here: Some(false), ..record(second_of_day) };
            second.put_drill_record(&elsewhere).await.unwrap();
        }
        let both = first.with_others(vec![second]);
        let told = async |max| {
            let drills = both.recent_drills(max).await.unwrap();
            let seconds = drills.iter().map(|drill| drill.head.started.timestamp() - 1_700_000_000);
            (seconds.collect::<Vec<_>>(), drills.iter().filter(|drill| drill.read_here.is_none()).count())
        };
        assert_eq!(told(9).await, (vec![4, 3, 2, 1], 2));
        assert_eq!(told(2).await, (vec![4, 3], 1));
    }

    #[tokio::test]
    async fn records_are_read_newest_first_and_reports_by_their_id() {
        let repository = lineage().await;
        for second in [5, 1, 9] {
            repository.put_drill_record(&record(second)).await.unwrap();
        }
        repository.put_drill_record(&record(5)).await.unwrap();
        let seconds = |records: Vec<DrillRecord>| -> Vec<i64> {
            records.iter().map(|record| record.head.started.timestamp() - 1_700_000_000).collect()
        };
        assert_eq!(seconds(repository.recent_drills(9).await.unwrap()), [9, 5, 1]);
        assert_eq!(seconds(repository.recent_drills(2).await.unwrap()), [9, 5]);
        assert!(repository.recent_extracts(9).await.unwrap().is_empty());
        let id = record(5).head.id;
        let form = DrillReportForm::Html;
        assert_eq!(repository.get_drill_report(&id, form).await.unwrap(), None);
        repository.put_drill_report(&id, form, Bytes::from_static(b"<p>")).await.unwrap();
        assert_eq!(repository.get_drill_report(&id, form).await.unwrap().unwrap(), &b"<p>"[..]);
        let again = repository.put_drill_report(&id, form, Bytes::from_static(b"<b>")).await;
        assert!(matches!(again, Err(Error::Conflict(_))), "{again:?}");
        // A damaged one does not hide the others; it is told of.
        let damaged = repository.layout.history_record(DRILLS, &record(5).head.id).unwrap();
        repository.storage.delete(&damaged).await.unwrap();
        repository.storage.put_if_absent(&damaged, b"{".to_vec().into()).await.unwrap();
        assert_eq!(seconds(repository.recent_drills(9).await.unwrap()), [9, 1]);
        assert!(repository.notes().iter().any(|note| note.contains(damaged.as_str())));
        // So is one of which a bit of the format's number is flipped.
        repository.storage.delete(&damaged).await.unwrap();
        repository.storage.put_if_absent(&damaged, b"{\"format\": 9}".to_vec().into()).await.unwrap();
        assert_eq!(seconds(repository.recent_drills(9).await.unwrap()), [9, 1]);
        for bad in ["", "..", "../x", "20261121T010203Z-0123456789abcdeF"] {
            assert!(matches!(repository.get_drill_report(bad, form).await, Err(Error::Invalid(_))), "{bad}");
        }
    }
}
