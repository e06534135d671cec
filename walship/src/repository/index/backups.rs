//! The list of backups: their records in one object, so that a thousand need not be read one by one.

use std::collections::BTreeMap;
use std::io::Read as _;

use serde::{Deserialize, Serialize};

use crate::catalog::BackupRecord;
use crate::codec::Digest;
use crate::error::{Error, Result};
use crate::repository::LineageRepository;
use crate::storage::{ObjectKey, ObjectMeta, list_all};

/// The version of the document that this code writes, and the highest it reads.
const FORMAT: u32 = 1;

/// The longest list that is read.
const BYTES_MAX: u64 = 64 << 20;

/// More lists than there ever are.
const LISTS_MAX: usize = 100_000;

/// After so many backups the list is written again.
const WRITE_EVERY: usize = 16;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct BackupList {
    format: u32,
    backups: Vec<ListedBackup>,
}

/// A backup's record, without its data objects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ListedBackup {
    /// The last part of the record's key.
    name: String,
    /// The length of the record as stored.
    stored_bytes: u64,
    record: BackupRecord,
}

impl LineageRepository {
    /// Returns the records that the fullest list holds, by their keys, of those objects in `listed` that are
    /// still what they were; their `objects` are left out.
    pub(in crate::repository) async fn listed_records(
        &self,
        listed: &[ObjectMeta],
    ) -> Result<BTreeMap<ObjectKey, BackupRecord>> {
        let mut records = BTreeMap::new();
        if listed.len() < 2 {
            return Ok(records);
        }
        let prefix = self.layout.backup_records_prefix();
        let stored: BTreeMap<&str, &ObjectMeta> =
            listed.iter().filter_map(|meta| Some((meta.key.as_str().strip_prefix(&prefix)?, meta))).collect();
        for ListedBackup { name, stored_bytes, record } in self.fullest_list().await? {
            let Some(meta) = stored.get(name.as_str()).filter(|meta| meta.bytes == stored_bytes) else {
                continue;
            };
            let key =
                self.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn);
            if key.is_ok_and(|key| key == meta.key) {
                records.insert(meta.key.clone(), record);
            }
        }
        Ok(records)
    }

    /// Returns the records of all backups of which the fullest list tells, also of those that are gone since.
    pub(in crate::repository) async fn records_in_list(&self) -> Result<Vec<BackupRecord>> {
        Ok(self.fullest_list().await?.into_iter().map(|listed| listed.record).collect())
    }

    async fn fullest_list(&self) -> Result<Vec<ListedBackup>> {
        let lists = list_all(&*self.storage, &self.layout.backup_lists_prefix(), LISTS_MAX).await?;
        for meta in lists.iter().rev() {
            match self.read_list(&meta.key).await {
                Ok(Some(list)) => return Ok(list.backups),
                Err(error @ Error::Unavailable(_)) => return Err(error),
                // A cache: one that cannot be read is as good as none.
                Ok(None) | Err(_) => {}
            }
        }
        Ok(Vec::new())
    }

    async fn read_list(&self, key: &ObjectKey) -> Result<Option<BackupList>> {
        let Some(bytes) = self.storage.get(key, BYTES_MAX).await? else { return Ok(None) };
        let damaged = |what: String| Error::corrupt(format!("{}: {what}", self.shown(key)));
        let mut json = Vec::new();
        zstd::stream::read::Decoder::new(&*bytes)
            .and_then(|decoder| decoder.take(BYTES_MAX + 1).read_to_end(&mut json))
            .map_err(|error| damaged(error.to_string()))?;
        if json.len() as u64 > BYTES_MAX || !key.as_str().contains(&Digest::of(&json).short()) {
            return Err(damaged("its digest is not that of its key".to_owned()));
        }
        let list: BackupList = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
        if list.format > FORMAT {
            return Err(damaged(format!("format {} is newer", list.format)));
        }
        Ok(Some(list))
    }

    /// Writes the list of backups again when it lacks many of them.
    async fn extend_backup_list(&self) -> Result<()> {
        let listed = super::super::load_catalog::list_records(self).await?;
        let records = self.listed_records(&listed).await?;
        if listed.len() - records.len() >= WRITE_EVERY {
            self.put_backup_list(&listed, records).await?;
        }
        Ok(())
    }

    /// Completes the list of backups; unless it is only completed, every record is read and compared with what
    /// the stored lists say of it. Returns whether the list was missing, or behind, and the lists that lie.
    pub(in crate::repository) async fn complete_backup_list(
        &self,
        trust: bool,
        dry_run: bool,
    ) -> Result<(bool, Vec<(ObjectKey, String)>)> {
        let listed = super::super::load_catalog::list_records(self).await?;
        if listed.len() < 2 {
            return Ok((false, Vec::new()));
        }
        let known = if trust { self.listed_records(&listed).await? } else { BTreeMap::new() };
        if known.len() == listed.len() {
            return Ok((false, Vec::new()));
        }
        let (json, count) = self.backup_list_of(&listed, known).await?;
        let key = self.layout.backup_list(count, &Digest::of(&json))?;
        let mut wrong = Vec::new();
        let mut present = false;
        let lists = list_all(&*self.storage, &self.layout.backup_lists_prefix(), LISTS_MAX).await?;
        let right: BackupList = serde_json::from_slice(&json)
            .map_err(|error| Error::invalid(format!("the backups cannot be listed: {error}")))?;
        // Its own key is needed for a good one.
        for meta in lists.iter().filter(|meta| !trust || meta.key == key) {
            match self.read_list(&meta.key).await {
                Err(Error::Corrupt(error)) => wrong.push((meta.key.clone(), error.to_string())),
                Err(error) => return Err(error),
                Ok(Some(list)) if !list.says_no_other_than(&right) => {
                    wrong.push((meta.key.clone(), "the backups' records say something else".to_owned()));
                }
                Ok(_) => present |= meta.key == key,
            }
        }
        if !dry_run {
            for (key, _) in &wrong {
                self.storage.delete(key).await?;
            }
            self.put_list(&key, &json).await?;
        }
        if trust {
            wrong.clear();
        }
        Ok((!present, wrong))
    }

    async fn put_backup_list(
        &self,
        listed: &[ObjectMeta],
        known: BTreeMap<ObjectKey, BackupRecord>,
    ) -> Result<()> {
        let (json, count) = self.backup_list_of(listed, known).await?;
        self.put_list(&self.layout.backup_list(count, &Digest::of(&json))?, &json).await
    }

    async fn put_list(&self, key: &ObjectKey, json: &[u8]) -> Result<()> {
        let stored = zstd::encode_all(json, super::ZSTD_LEVEL)
            .map_err(|error| Error::from_io("compressing", error))?;
        self.storage.put_if_absent(key, stored.into()).await.map(drop)
    }

    /// Returns the list of these backups in JSON, and how many it holds; those that are not `known` are read.
    async fn backup_list_of(
        &self,
        listed: &[ObjectMeta],
        mut known: BTreeMap<ObjectKey, BackupRecord>,
    ) -> Result<(Vec<u8>, usize)> {
        for (meta, record) in super::super::load_catalog::read_records(self, listed, &known).await? {
            known.insert(meta.key, record);
        }
        let prefix = self.layout.backup_records_prefix();
        let mut backups = Vec::with_capacity(listed.len());
        for meta in listed {
            let Some(mut record) = known.remove(&meta.key) else { continue };
            record.objects.clear();
            let name = meta.key.as_str().strip_prefix(&prefix).unwrap_or_default().to_owned();
            backups.push(ListedBackup { name, stored_bytes: meta.bytes, record });
        }
        let count = backups.len();
        let json = serde_json::to_vec(&BackupList { format: FORMAT, backups })
            .map_err(|error| Error::invalid(format!("the backups cannot be listed: {error}")))?;
        Ok((json, count))
    }
}

impl BackupList {
    /// Returns whether everything that it says of a backup that the other list knows, the other says too.
    fn says_no_other_than(&self, other: &Self) -> bool {
        self.backups.iter().all(|own| {
            other.backups.iter().find(|theirs| theirs.name == own.name).is_none_or(|theirs| theirs == own)
        })
    }
}

/// Writes the list of backups again when it lacks so many that reading them takes long.
///
/// # Errors
/// What the store says. It is a cache: nobody need hear of it.
pub async fn extend_list(repository: &LineageRepository) -> Result<()> {
    repository.extend_backup_list().await
}
