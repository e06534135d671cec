//! Holds, and what is being removed: what writers and retention have to hear of each other.
//!
//! Who begins a backup, or holds one, says so first and looks for marks and expired WAL then; who removes marks first
//! and looks for backups and holds then. So one of the two sees the other, whatever the order.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::LineageRepository;
use super::backups::STARTED;
use super::document::{self, BackupStarted, DOCUMENT_BYTES_MAX, DOCUMENT_VERSION};
use super::load_catalog::{list_records, started_ids};
use crate::catalog::{BackupRecord, Hold};
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId};
use crate::storage::list_all;

/// More holds than anybody makes.
const HOLDS_MAX: usize = 100_000;

/// More backups than are ever removed at once.
const MARKS_MAX: usize = 1_000_000;

/// How many documents are read at once.
const READS_MAX: usize = 16;

/// A backup that begins looks at what so many backups have stored that did not complete and build on the same one, the newest
/// first: retention keeps them for it.
pub const REMAINS_LOOKED_AT_MAX: usize = 8;

/// The longest reason of a hold.
pub const REASON_BYTES_MAX: usize = 1000;

/// The end of a hold before its time (`holds/<id>.released.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldReleased {
    /// The format of this document; 1.
    pub format: u32,
    /// The hold's id.
    pub id: String,
    /// When it was released.
    pub released: DateTime<Utc>,
    /// The machine that it was released on.
    pub host: String,
    /// The user of that machine.
    pub user: String,
}

/// That a removal is about to remove a backup (`expiring/<backup>.<run>.json`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// The backup.
    pub backup: String,
    /// The id of the removal.
    pub run: String,
}

/// A backup whose folder is there without a record: being taken, given up, or half removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recordless {
    /// Its id.
    pub id: String,
    /// What was said when it was begun; `None` where that is removed already.
    pub started: Option<BackupStarted>,
}

impl LineageRepository {
    /// Holds a backup. To be followed by [`LineageRepository::check_not_expiring`].
    ///
    /// # Errors
    /// [`Error::Invalid`] for a reason that says nothing or cannot be shown.
    pub async fn put_hold(&self, hold: &Hold) -> Result<()> {
        let reason = &hold.reason;
        if reason.trim().is_empty() || reason.len() > REASON_BYTES_MAX || reason.chars().any(char::is_control)
        {
            return Err(Error::invalid(format!(
                "the reason of a hold is one line of at most {REASON_BYTES_MAX} bytes, and not empty"
            )));
        }
        document::put_same(&*self.storage, &self.layout.hold(&hold.id)?, hold).await
    }

    /// Ends a hold. Again is success.
    pub async fn release_hold(&self, released: &HoldReleased) -> Result<()> {
        document::put(&*self.storage, &self.layout.hold_released(&released.id)?, released).await.map(drop)
    }

    /// Returns the holds that were not released, the oldest first; also those whose time is over.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for one that cannot be read: which backup it holds is not known.
    pub async fn holds(&self) -> Result<Vec<Hold>> {
        let prefix = self.layout.holds_prefix();
        let listed = list_all(&*self.storage, &prefix, HOLDS_MAX).await?;
        let name = |key: &str| {
            key.strip_prefix(&prefix).and_then(|name| name.strip_suffix(".json")).map(str::to_owned)
        };
        let names: Vec<String> = listed.iter().filter_map(|meta| name(meta.key.as_str())).collect();
        let released: BTreeSet<&str> =
            names.iter().filter_map(|name| name.strip_suffix(".released")).collect();
        let open = names.iter().filter(|name| !name.ends_with(".released") && !released.contains(&***name));
        let reads = open.map(|id| async move {
            let key = self.layout.hold(id)?;
            let hold: Option<Hold> = document::read_listed(&*self.storage, &key, DOCUMENT_BYTES_MAX).await?;
            match hold {
                Some(hold) if hold.id != *id => {
                    Err(Error::corrupt(format!("{} is not the hold that its name says", self.shown(&key))))
                }
                // None: it was over long ago, and tidied away since.
                hold => Ok(hold),
            }
        });
        let read: Vec<Option<Hold>> =
            futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }

    /// Returns the documents that release holds.
    pub(super) async fn holds_released(&self) -> Result<Vec<HoldReleased>> {
        let prefix = self.layout.holds_prefix();
        let listed = list_all(&*self.storage, &prefix, HOLDS_MAX).await?;
        let mut released = Vec::new();
        for meta in listed.iter().filter(|meta| meta.key.as_str().ends_with(".released.json")) {
            let read = document::read_listed::<HoldReleased>(&*self.storage, &meta.key, DOCUMENT_BYTES_MAX);
            released.extend(read.await?);
        }
        Ok(released)
    }

    /// Returns the marks of backups that are being removed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for an object that is none: which backup goes is not known.
    pub async fn marks(&self) -> Result<Vec<Mark>> {
        let listed = list_all(&*self.storage, &self.layout.expiring_prefix(), MARKS_MAX).await?;
        let marks = listed.iter().map(|meta| match self.layout.parse_mark(&meta.key) {
            Some((backup, run)) => Ok(Mark { backup, run }),
            None => Err(Error::corrupt(format!("{} is not the name of a mark", self.shown(&meta.key)))
                .with_next("Look at the object: what does not belong to the repository has to be removed.")),
        });
        marks.collect()
    }

    /// Returns the backups that are being removed.
    pub async fn expiring(&self) -> Result<BTreeSet<String>> {
        Ok(self.marks().await?.into_iter().map(|mark| mark.backup).collect())
    }

    /// Returns the backups without a record, in the order of their ids; `complete` are those with one. What those of `given_up` said at
    /// their start may be damaged: it counts as gone.
    pub async fn recordless_backups(
        &self,
        complete: &BTreeSet<&str>,
        given_up: &BTreeSet<String>,
    ) -> Result<Vec<Recordless>> {
        let ids = started_ids(self).await?;
        let reads = ids.into_iter().filter(|id| !complete.contains(&**id)).map(|id| async move {
            let started = match self.backup_started(&id).await {
                Err(Error::Corrupt(_) | Error::Mismatch(_)) if given_up.contains(&id) => None,
                Err(error @ Error::Corrupt(_)) => {
                    let next = format!("Put it back from a copy; or, if that backup was given up, say so: `pitr expire --confirm --give-up {id}`.");
                    return Err(error.with_next(next));
                }
                read => read?,
            };
            Ok::<_, Error>(Recordless { id, started })
        });
        let mut found: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        found.sort_by(|a: &Recordless, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// Fails when a backup is being removed.
    ///
    /// # Errors
    /// [`Error::Conflict`]: it is marked.
    pub async fn check_not_expiring(&self, id: &str) -> Result<()> {
        // A listing, not a read: where versions are kept, a mark that was taken back leaves a delete marker.
        let listed = self.storage.list(&self.layout.marks_prefix(id)?, None).await?;
        match listed.objects.is_empty() {
            true => Ok(()),
            false => Err(Error::conflict(format!("backup {id} in {} is being removed by retention", self.location()))
                .with_safe("nothing depends on it any more")
                .with_next("Choose another backup: `pitr info` lists them. What a removal has marked that was killed `pitr expire --confirm` takes back, an hour later.")),
        }
    }

    /// Fails when a backup that is about to become complete, what it builds on, or what it has taken over from one that did
    /// not complete, is being removed, or gone.
    ///
    /// # Errors
    /// [`Error::Conflict`]: the backup could not be restored.
    pub async fn check_foundations(&self, record: &BackupRecord) -> Result<()> {
        if let Some(parent) = &record.parent {
            self.check_not_expiring(&parent.id).await?;
            let ending = format!("-{}.json", parent.id);
            if !list_records(self).await?.iter().any(|meta| meta.key.as_str().ends_with(&ending)) {
                return Err(self.foundation_gone(&format!("backup {}, which it builds on,", parent.id)));
            }
        }
        let lenders: BTreeSet<&str> =
            record.objects.iter().filter_map(|object| object.backup.as_deref()).collect();
        for id in lenders.into_iter().chain([&*record.id]) {
            self.check_not_expiring(id).await?;
        }
        let started = self.layout.backup_object(&record.id, STARTED)?;
        if !self.is_listed(&started).await? {
            return Err(self.foundation_gone(&format!("{started}, of this very backup,")));
        }
        match self.check_backup_here(record).await {
            Err(error @ (Error::Missing(_) | Error::Corrupt(_))) => Err(not_restorable(error.to_string())),
            checked => checked,
        }
    }

    fn foundation_gone(&self, what: &str) -> Error {
        not_restorable(format!("{what} is not in {} any more", self.location()))
    }

    /// Fails when WAL of one of these stretches was expired: what needs it is not restorable.
    ///
    /// # Errors
    /// [`Error::Conflict`] with the record that says so.
    pub async fn check_wal_not_expired(&self, stretches: &[(TimelineId, Lsn, Lsn)]) -> Result<()> {
        for (timeline, start, end) in stretches {
            for gap in self.gaps_of(*timeline).await? {
                if gap.end_lsn() <= *start || *end <= gap.start_lsn() {
                    continue;
                }
                let record = self.read_gap(&gap).await?;
                if record.is_expired() {
                    return Err(Error::conflict(format!(
                        "WAL of timeline {timeline} from {start} on is not in {} any more: {record}",
                        self.location()
                    ))
                    .with_safe("what is kept by retention can be restored as before; this backup does not exist")
                    .with_next("Take the backup again. From a standby it begins at its last restartpoint: a CHECKPOINT on the primary moves that on."));
                }
            }
        }
        Ok(())
    }
}

fn not_restorable(what: String) -> Error {
    Error::conflict(what)
        .with_safe("others are as they were; this backup cannot be restored")
        .with_next("Take the backup again.")
}

/// Returns the document that releases a hold now.
pub fn released_now(id: &str, now: DateTime<Utc>) -> HoldReleased {
    let by = super::RecordedBy::now();
    HoldReleased { format: DOCUMENT_VERSION, id: id.to_owned(), released: now, host: by.host, user: by.user }
}
