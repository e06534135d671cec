//! Removal of what retention does not keep: the one place that has stored objects deleted for good.
//!
//! Decides nothing: what is to go is said by whoever calls. Nothing else in the program asks a storage for
//! [`crate::storage::StoreRemoval`]; a test of the layers sees to that.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::document::{self, DOCUMENT_VERSION};
use super::layout::LineageLayout;
use super::{LineageRepository, RecordedBy};
use crate::catalog::{BackupRecord, ExpireOutcome, ExpireRecord, GapRecord, Hold};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId, WalFileName};
use crate::storage::{ObjectKey, ObjectMeta, PutOutcome, REMOVE_MAX, StoreRemoval, list_all};
use crate::wal::rollup::{LEVEL_MAX, span};

/// How long a lock holds that is not renewed.
const LOCK: Duration = Duration::from_secs(600);

/// A lock is renewed when it is this old.
const RENEW_AFTER: Duration = Duration::from_secs(180);

/// More locks than there ever are.
const LOCKS_MAX: usize = 10_000;

/// More objects than a backup has: four data objects for each GiB.
const OBJECTS_MAX: usize = 4_000_000;

/// How long a hold that is over stays to be looked at.
const HOLDS_STAY: chrono::TimeDelta = chrono::TimeDelta::days(30);

/// How far a store's clock and this machine's may lie apart.
const CLOCKS_DIFFER_MAX: chrono::TimeDelta = chrono::TimeDelta::minutes(15);

/// The right to remove from one lineage, and the lock that keeps others from doing so at the same time.
#[derive(Debug)]
pub struct Remover {
    repository: LineageRepository,
    run: String,
    lock: u32,
    renewed: Instant,
}

/// Who removes (`locks/expire/<number>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LockDocument {
    format: u32,
    run: String,
    host: String,
    user: String,
    pid: u32,
    taken: DateTime<Utc>,
    until: DateTime<Utc>,
}

/// The mark of a backup that is being removed (`expiring/<id>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    format: u32,
    backup: String,
    run: String,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemovedObjects {
    /// How many objects.
    pub objects: u64,
    /// Their stored size in bytes.
    pub bytes: u64,
    /// How many of them the store keeps as older versions.
    pub kept_as_versions: u64,
}

impl RemovedObjects {
    /// Adds what else was removed.
    pub fn add(&mut self, other: Self) {
        self.objects += other.objects;
        self.bytes += other.bytes;
        self.kept_as_versions += other.kept_as_versions;
    }
}

impl LineageRepository {
    /// Returns the number of objects of WAL that lie in a range of segments, whole or not, and their stored size.
    pub async fn wal_in_range(&self, timeline: TimelineId, from: u64, until: u64) -> Result<(u64, u64)> {
        let (mut objects, mut bytes) = (0, 0);
        let mut after = None;
        loop {
            let page = wal_page(self, timeline, from, until, after).await?;
            objects += page.objects.len() as u64;
            bytes += page.objects.iter().map(|meta| meta.bytes).sum::<u64>();
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok((objects, bytes)),
            }
        }
    }

    /// Returns the number of a backup's own objects and their stored size.
    pub async fn backup_size(&self, id: &str) -> Result<(u64, u64)> {
        let objects = list_all(&*self.storage, &self.layout.backup_prefix(id)?, OBJECTS_MAX).await?;
        Ok((objects.len() as u64, objects.iter().map(|meta| meta.bytes).sum()))
    }

    /// Takes the lock and returns the right to remove; first it is tried whether the store lets this user remove
    /// anything, and whether its clock agrees with `now`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while another removal is at work; [`Error::Denied`] where the store forbids removal;
    /// [`Error::Invalid`] when the clocks differ.
    pub async fn begin_removal(&self, run: &str, now: DateTime<Utc>) -> Result<Remover> {
        let lock = take_lock(self, run, now).await?;
        let remover =
            Remover { repository: self.clone(), run: run.to_owned(), lock, renewed: Instant::now() };
        match remover.try_out(now).await {
            Ok(()) => Ok(remover),
            Err(error) => {
                remover.end().await;
                Err(error)
            }
        }
    }
}

impl Remover {
    /// Returns the lineage.
    pub fn repository(&self) -> &LineageRepository {
        &self.repository
    }

    fn removal(&self) -> Result<&dyn StoreRemoval> {
        self.repository
            .storage
            .removal()
            .ok_or_else(|| Error::denied(format!("{} removes nothing", self.repository.storage.location())))
    }

    fn layout(&self) -> &LineageLayout {
        &self.repository.layout
    }

    async fn try_out(&self, now: DateTime<Utc>) -> Result<()> {
        let key = self.layout().removal_canary(&self.run)?;
        self.repository.storage.put_if_absent(&key, b"canary\n".to_vec().into()).await?;
        let written = self.removal()?.written_at(&key).await?;
        self.removal()?.remove(std::slice::from_ref(&key)).await.map_err(|error| match error {
            Error::Denied(_) => error
                .context("nothing can be removed")
                .with_safe("nothing was removed; what is stored is as it was"),
            error => error,
        })?;
        match written {
            Some(written) if (now - written).abs() > CLOCKS_DIFFER_MAX => Err(Error::invalid(format!(
                "this machine says that it is {}, the store of {} that it is {}: what is old cannot be told",
                now.format("%Y-%m-%d %H:%M:%SZ"),
                self.repository.location(),
                written.format("%Y-%m-%d %H:%M:%SZ")
            ))
            .with_safe("nothing was removed")
            .with_next("Set this machine's clock (is NTP running?), then try again.")),
            _ => Ok(()),
        }
    }

    /// Renews the lock where that is due.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it was lost.
    pub async fn stay(&mut self) -> Result<()> {
        let age = self.renewed.elapsed();
        if age < RENEW_AFTER {
            return Ok(());
        }
        let lost = || {
            Error::unavailable("this removal was held up for too long, and its lock is lost")
                .with_safe("what is left is whole: what was to be removed does not count any more")
                .with_next("Run `pitr expire` again: it goes on where this one ended.")
        };
        if age >= LOCK {
            return Err(lost());
        }
        let (next, begun) = (self.lock + 1, Instant::now());
        let key = self.layout().expire_lock(next)?;
        let document = lock_document(&self.run, Utc::now());
        if document::put(&*self.repository.storage, &key, &document).await? == PutOutcome::Exists {
            return Err(lost());
        }
        let old = self.layout().expire_lock(self.lock)?;
        (self.lock, self.renewed) = (next, begun);
        self.removal()?.remove(&[old]).await.map(drop)
    }

    /// Gives the lock back; one that cannot be given back ends by itself.
    pub async fn end(self) {
        let given_back = async {
            let key = self.layout().expire_lock(self.lock)?;
            self.removal()?.remove(&[key]).await
        };
        if let Err(error) = given_back.await {
            tracing::debug!(%error, "the lock of a removal stays until its time is over");
        }
    }

    /// Writes what is about to be removed into the history.
    pub async fn put_record(&self, record: &ExpireRecord) -> Result<()> {
        let key = self.layout().expire_record(&record.id)?;
        document::put_same(&*self.repository.storage, &key, record).await
    }

    /// Writes what a removal came to into the history.
    pub async fn put_outcome(&self, outcome: &ExpireOutcome) -> Result<()> {
        let key = self.layout().expire_outcome(&outcome.id)?;
        document::put_same(&*self.repository.storage, &key, outcome).await
    }

    /// Marks a backup: nobody may begin to depend on it any more.
    pub async fn mark(&self, id: &str) -> Result<()> {
        let mark = Mark { format: DOCUMENT_VERSION, backup: id.to_owned(), run: self.run.clone() };
        document::put(&*self.repository.storage, &self.layout().expiring(id)?, &mark).await.map(drop)
    }

    /// Takes marks back: these backups stay, or are gone.
    pub async fn unmark<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let keys: Vec<_> = ids.into_iter().map(|id| self.layout().expiring(id)).collect::<Result<_>>()?;
        for some in keys.chunks(REMOVE_MAX) {
            self.removal()?.remove(some).await?;
        }
        Ok(())
    }

    /// Removes a backup's record: from then on it does not exist.
    pub async fn remove_record(&self, record: &BackupRecord) -> Result<()> {
        let BackupRecord { id, timeline, start_lsn, stop_lsn, .. } = record;
        let key = self.layout().backup_record(id, *timeline, *start_lsn, *stop_lsn)?;
        self.removal()?.remove(&[key]).await.map(drop)
    }

    /// Removes all that is left of a backup without a record, what tells that it was begun first.
    pub async fn remove_backup(&mut self, id: &str) -> Result<RemovedObjects> {
        let objects =
            list_all(&*self.repository.storage, &self.layout().backup_prefix(id)?, OBJECTS_MAX).await?;
        let started = self.layout().backup_object(id, "started.json")?;
        let (first, rest): (Vec<_>, Vec<_>) = objects.into_iter().partition(|meta| meta.key == started);
        let mut removed = self.remove(&first).await?;
        removed.add(self.remove(&rest).await?);
        Ok(removed)
    }

    /// Writes down that WAL was removed on purpose; whoever reads the ledger from then on counts it as removed.
    pub async fn put_expired(&self, record: &GapRecord) -> Result<()> {
        self.repository.put_gap(record).await
    }

    /// Takes records of expired WAL out of the ledger: others say the same, or it was not removed after all.
    pub async fn withdraw_expired(&self, records: &[GapRecord]) -> Result<()> {
        let keys = records.iter().filter(|record| record.is_expired());
        let keys: Vec<_> = keys.map(|record| self.repository.gap_key(record)).collect::<Result<_>>()?;
        for some in keys.chunks(REMOVE_MAX) {
            self.removal()?.remove(some).await?;
        }
        Ok(())
    }

    /// Removes what is stored of a range of segments, the oldest first, and says after each thousand objects how
    /// much that was.
    pub async fn remove_wal(
        &mut self,
        timeline: TimelineId,
        from: u64,
        until: u64,
        report: &mut (dyn FnMut(RemovedObjects) + Send),
    ) -> Result<()> {
        let mut after = None;
        loop {
            let page = wal_page(&self.repository, timeline, from, until, after).await?;
            report(self.remove(&page.objects).await?);
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// Removes the roll-ups that tell of a range of segments; returns how many.
    pub async fn remove_rollups(&mut self, timeline: TimelineId, from: u64, until: u64) -> Result<u64> {
        let mut keys = Vec::new();
        for level in 1..=LEVEL_MAX {
            let aligned = from / span(level) * span(level);
            for stored in self.repository.rollups(timeline, level, aligned, until).await? {
                keys.push(self.repository.stored_rollup_key(&stored)?);
            }
        }
        for some in keys.chunks(REMOVE_MAX) {
            self.stay().await?;
            self.removal()?.remove(some).await?;
        }
        Ok(keys.len() as u64)
    }

    /// Removes the lists of backups: the one that holds most would count, and that is the one that lags behind.
    pub async fn remove_backup_lists(&self) -> Result<()> {
        let prefix = self.layout().backup_lists_prefix();
        let listed = list_all(&*self.repository.storage, &prefix, LOCKS_MAX).await?;
        let keys: Vec<ObjectKey> = listed.into_iter().map(|meta| meta.key).collect();
        for some in keys.chunks(REMOVE_MAX) {
            self.removal()?.remove(some).await?;
        }
        Ok(())
    }

    /// Removes the documents of holds that ended, or were released, long ago.
    pub async fn tidy_holds(&self, open: &[Hold], now: DateTime<Utc>) -> Result<()> {
        let long_ago = now.checked_sub_signed(HOLDS_STAY).unwrap_or(DateTime::<Utc>::MIN_UTC);
        let mut keys = Vec::new();
        for hold in open.iter().filter(|hold| hold.until.is_some_and(|until| until < long_ago)) {
            keys.push(self.layout().hold(&hold.id)?);
        }
        for released in self.repository.holds_released().await? {
            if released.released < long_ago {
                // The hold first: without it its release says nothing, but not the other way round.
                keys.push(self.layout().hold(&released.id)?);
                keys.push(self.layout().hold_released(&released.id)?);
            }
        }
        for key in &keys {
            self.removal()?.remove(std::slice::from_ref(key)).await?;
        }
        Ok(())
    }

    async fn remove(&mut self, objects: &[ObjectMeta]) -> Result<RemovedObjects> {
        let mut all = RemovedObjects::default();
        for some in objects.chunks(REMOVE_MAX) {
            self.stay().await?;
            let keys: Vec<ObjectKey> = some.iter().map(|meta| meta.key.clone()).collect();
            let removed = self.removal()?.remove(&keys).await?;
            all.add(RemovedObjects {
                objects: some.len() as u64,
                bytes: some.iter().map(|meta| meta.bytes).sum(),
                kept_as_versions: removed.kept_as_versions,
            });
        }
        Ok(all)
    }
}

fn lock_document(run: &str, now: DateTime<Utc>) -> LockDocument {
    let RecordedBy { host, user } = RecordedBy::now();
    let until = now + LOCK;
    LockDocument {
        format: DOCUMENT_VERSION,
        run: run.to_owned(),
        host,
        user,
        pid: std::process::id(),
        taken: now,
        until,
    }
}

/// Takes the lock of a lineage; returns its number.
async fn take_lock(repository: &LineageRepository, run: &str, now: DateTime<Utc>) -> Result<u32> {
    let prefix = repository.layout.expire_locks_prefix();
    let listed = list_all(&*repository.storage, &prefix, LOCKS_MAX).await?;
    let number =
        |key: &ObjectKey| key.as_str().strip_prefix(&prefix)?.strip_suffix(".json")?.parse::<u32>().ok();
    let newest = listed.iter().filter_map(|meta| Some((number(&meta.key)?, &meta.key))).max();
    if let Some((_, key)) = newest {
        let held: Option<LockDocument> = document::read(&*repository.storage, key).await?;
        if let Some(held) = held.filter(|held| now < held.until && !has_died(held)) {
            return Err(busy(repository, &held, now));
        }
    }
    let next = newest.map_or(1, |(number, _)| number.saturating_add(1));
    let key = repository.layout.expire_lock(next)?;
    match document::put(&*repository.storage, &key, &lock_document(run, now)).await? {
        PutOutcome::Stored => {}
        PutOutcome::Exists => match document::read::<LockDocument>(&*repository.storage, &key).await? {
            // The answer to this very call's first attempt was lost.
            Some(held) if held.run == run => {}
            Some(held) => return Err(busy(repository, &held, now)),
            None => {
                return Err(
                    Error::unavailable("another removal has just ended").with_safe("nothing was removed")
                );
            }
        },
    }
    // What others left behind is over.
    let old: Vec<ObjectKey> = listed.into_iter().map(|meta| meta.key).collect();
    if let (Some(removal), false) = (repository.storage.removal(), old.is_empty())
        && let Err(error) = removal.remove(&old[..old.len().min(REMOVE_MAX)]).await
    {
        tracing::debug!(%error, "old locks stay");
    }
    Ok(next)
}

/// Returns whether the holder of a lock is known to be gone: a process of this machine that is not there any more.
fn has_died(held: &LockDocument) -> bool {
    let Ok(pid) = i32::try_from(held.pid) else { return false };
    let RecordedBy { host, .. } = RecordedBy::now();
    let asked = || nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    !host.is_empty() && host == held.host && pid > 0 && asked() == Err(nix::errno::Errno::ESRCH)
}

fn busy(repository: &LineageRepository, held: &LockDocument, now: DateTime<Utc>) -> Error {
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_control() { '?' } else { c }).take(100).collect()
    };
    let seconds = (held.until - now).num_seconds().max(1);
    Error::unavailable(format!(
        "another removal is at work in {}: of {} on {} (process {}), since {}",
        repository.location(),
        clean(&held.user),
        clean(&held.host),
        held.pid,
        held.taken.format("%Y-%m-%d %H:%M:%SZ")
    ))
    .with_safe("nothing was removed by this one")
    .with_next(format!(
        "Wait for it to end. If it was killed, its lock is over in {seconds} s, and `pitr expire` then goes on where it \
         ended."
    ))
}

/// A page of objects that belong to a range of segments.
struct WalPage {
    objects: Vec<ObjectMeta>,
    next: Option<After>,
}

/// Where the next page begins.
enum After {
    Wal(String),
    Tail(Option<String>),
}

/// Returns what is stored of the segments from `from` on and before `until` (numbers): the oldest first, then their
/// parts.
async fn wal_page(
    repository: &LineageRepository,
    timeline: TimelineId,
    from: u64,
    until: u64,
    after: Option<After>,
) -> Result<WalPage> {
    let (size, layout) = (repository.lineage.segment_size, &repository.layout);
    let inside = |name: SegmentName| (from..until).contains(&name.number(size));
    let Some(first) = SegmentName::from_number(timeline, from, size) else {
        return Ok(WalPage { objects: Vec::new(), next: None });
    };
    match after {
        Some(After::Tail(after)) => {
            let prefix = layout.timeline_tails_prefix(timeline);
            let page = repository.storage.list(&prefix, after.as_deref()).await?;
            let of_range =
                |meta: &ObjectMeta| layout.parse_tail(&meta.key).is_some_and(|(name, ..)| inside(name));
            let objects = page.objects.into_iter().filter(of_range).collect();
            Ok(WalPage { objects, next: page.next.map(|next| After::Tail(Some(next))) })
        }
        after => {
            let after = match after {
                Some(After::Wal(after)) => after,
                _ => layout.before_segment(first),
            };
            let page = repository.storage.list(&layout.timeline_prefix(timeline), Some(&after)).await?;
            let segment = |meta: &ObjectMeta| match layout.parse_wal(&meta.key)?.name {
                WalFileName::Segment(name)
                | WalFileName::Partial(name)
                | WalFileName::BackupHistory(name, _) => Some(name),
                WalFileName::History(_) => None,
            };
            let past =
                page.objects.iter().any(|meta| segment(meta).is_some_and(|name| name.number(size) >= until));
            let objects = page.objects.into_iter().filter(|meta| segment(meta).is_some_and(inside)).collect();
            let next = match page.next {
                Some(next) if !past => After::Wal(next),
                _ => After::Tail(None),
            };
            Ok(WalPage { objects, next: Some(next) })
        }
    }
}
