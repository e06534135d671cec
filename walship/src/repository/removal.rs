//! Removal of what retention does not keep: the one place that has stored objects deleted for good.
//!
//! Decides nothing: what is to go is said by whoever calls. Nothing else in the program asks a storage for
//! [`crate::storage::StoreRemoval`]; a test of the layers sees to that.

mod lock;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::document::{self, DOCUMENT_VERSION};
use super::layout::LineageLayout;
use super::{LineageRepository, Mark};
use crate::catalog::{BackupRecord, ExpireOutcome, ExpireRecord, ExpireRemoved, GapRecord, Hold};
use crate::codec::ObjectKind;
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId, WalFileName};
use crate::storage::{ObjectKey, ObjectMeta, REMOVE_MAX, StoreRemoval, list_all};
use crate::wal::rollup::{LEVEL_MAX, span};
use lock::Lock;

/// More lists of backups than there ever are.
const LISTS_MAX: usize = 10_000;

/// More objects than a backup has: four data objects for each GiB.
const OBJECTS_MAX: usize = 4_000_000;

/// How long a hold that is over stays to be looked at.
const HOLDS_STAY: chrono::TimeDelta = chrono::TimeDelta::days(30);

/// How far a store's clock and this machine's may lie apart.
const CLOCKS_DIFFER_MAX: chrono::TimeDelta = chrono::TimeDelta::minutes(15);

/// Marks of a removal that did not end stay for so long: it may only have stood still, and looks for them before it goes on.
const MARKS_STAY: chrono::TimeDelta = chrono::TimeDelta::hours(1);

/// The right to remove from one lineage, and the lock that keeps others from doing so at the same time.
#[derive(Debug)]
pub struct Remover {
    repository: LineageRepository,
    run: String,
    lock: Lock,
}

/// The mark of a backup that is being removed (`expiring/<backup>.<run>.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MarkDocument {
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

    /// Returns when the newest of a backup's own objects was written, by the store's clock; `None` where there is none or
    /// the store has no clock.
    pub async fn backup_written_at(&self, id: &str) -> Result<Option<DateTime<Utc>>> {
        match self.storage.removal() {
            Some(removal) => removal.last_written(&self.layout.backup_prefix(id)?).await,
            None => Ok(None),
        }
    }

    /// Returns when a hold was written, by the store's clock; `None` where it is gone or the store has no clock.
    pub async fn hold_written_at(&self, id: &str) -> Result<Option<DateTime<Utc>>> {
        self.written_at(&self.layout.hold(id)?).await
    }

    /// Returns when a record of the ledger was written, by the store's clock; `None` where it is gone or the store has no clock.
    pub async fn gap_written_at(&self, record: &GapRecord) -> Result<Option<DateTime<Utc>>> {
        self.written_at(&self.gap_key(record)?).await
    }

    async fn written_at(&self, key: &ObjectKey) -> Result<Option<DateTime<Utc>>> {
        match self.storage.removal() {
            Some(removal) => removal.last_written(key.as_str()).await,
            None => Ok(None),
        }
    }

    /// Returns the runs of whole segments (numbers, ends excluded) that are stored in a range, whatever the ledger says of them.
    pub async fn whole_segments_in_range(
        &self,
        timeline: TimelineId,
        from: u64,
        until: u64,
    ) -> Result<Vec<(u64, u64)>> {
        let size = self.lineage.segment_size;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut after = None;
        loop {
            let page = wal_page(self, timeline, from, until, after).await?;
            let keys = page.objects.iter().filter_map(|meta| self.layout.parse_wal(&meta.key));
            for key in keys.filter(|key| key.kind == ObjectKind::Segment && !key.is_copy) {
                let WalFileName::Segment(name) = key.name else { continue };
                let number = name.number(size);
                match runs.last_mut() {
                    Some((_, end)) if *end > number => {}
                    Some((_, end)) if *end == number => *end += 1,
                    _ => runs.push((number, number + 1)),
                }
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(runs),
            }
        }
    }

    /// Takes the lock and returns the right to remove; first it is tried whether the store lets this user remove
    /// anything, and whether its clock agrees with `now`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while another removal is at work; [`Error::Denied`] where the store forbids removal;
    /// [`Error::Invalid`] when the clocks differ.
    pub async fn begin_removal(&self, run: &str, now: DateTime<Utc>) -> Result<Remover> {
        let store_now = self.try_out(run, now).await?;
        let (lock, over) = Lock::take(self, run, now, store_now).await?;
        let remover = Remover { repository: self.clone(), run: run.to_owned(), lock };
        if !over.is_empty()
            && let Err(error) = remover.remove_keys(&over).await
        {
            tracing::debug!(%error, "old locks stay");
        }
        Ok(remover)
    }

    /// Writes what is about to be removed into the history.
    pub async fn put_expire_record(&self, record: &ExpireRecord) -> Result<()> {
        document::put_same(&*self.storage, &self.layout.expire_record(&record.id)?, record).await
    }

    /// Writes what a removal came to into the history.
    pub async fn put_expire_outcome(&self, outcome: &ExpireOutcome) -> Result<()> {
        document::put_same(&*self.storage, &self.layout.expire_outcome(&outcome.id)?, outcome).await
    }

    /// Writes which backups a removal has removed into the history.
    pub async fn put_expire_removed(&self, removed: &ExpireRemoved) -> Result<()> {
        document::put_same(&*self.storage, &self.layout.expire_removed(&removed.id)?, removed).await
    }

    /// Returns what time it is by the store's clock, where it has one, found out with an object of its own.
    ///
    /// # Errors
    /// What the store says.
    pub async fn store_now(&self, run: &str) -> Result<Option<DateTime<Utc>>> {
        let removal = self.removal()?;
        let key = self.layout.removal_canary(run)?;
        self.storage.put_if_absent(&key, b"canary\n".to_vec().into()).await?;
        let written = removal.last_written(key.as_str()).await?;
        removal.remove(std::slice::from_ref(&key)).await?;
        Ok(written)
    }

    /// Tries with an object of its own whether anything can be removed; returns what time it is by the store's clock, where it has
    /// one.
    async fn try_out(&self, run: &str, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>> {
        let removal = self.removal()?;
        let key = self.layout.removal_canary(run)?;
        self.storage.put_if_absent(&key, b"canary\n".to_vec().into()).await?;
        let written = removal.last_written(key.as_str()).await?;
        removal.remove(std::slice::from_ref(&key)).await.map_err(|error| match error {
            Error::Denied(_) => error
                .context("nothing can be removed")
                .with_safe("nothing was removed; what is stored is as it was"),
            error => error,
        })?;
        match written {
            Some(written) if (now - written).abs() > CLOCKS_DIFFER_MAX => Err(Error::invalid(format!(
                "this machine says that it is {}, the store of {} that it is {}: what is old cannot be told",
                now.format("%Y-%m-%d %H:%M:%SZ"),
                self.location(),
                written.format("%Y-%m-%d %H:%M:%SZ")
            ))
            .with_safe("nothing was removed")
            .with_next("Set this machine's clock (is NTP running?), then try again.")),
            written => Ok(written),
        }
    }

    fn removal(&self) -> Result<&dyn StoreRemoval> {
        self.storage
            .removal()
            .ok_or_else(|| Error::denied(format!("{} removes nothing", self.storage.location())))
    }
}

impl Remover {
    /// Returns the lineage.
    pub fn repository(&self) -> &LineageRepository {
        &self.repository
    }

    fn removal(&self) -> Result<&dyn StoreRemoval> {
        self.repository.removal()
    }

    fn layout(&self) -> &LineageLayout {
        &self.repository.layout
    }

    async fn remove_keys(&self, keys: &[ObjectKey]) -> Result<()> {
        for some in keys.chunks(REMOVE_MAX) {
            self.removal()?.remove(some).await?;
        }
        Ok(())
    }

    /// Renews the lock where that is due.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it was lost.
    async fn stay(&mut self) -> Result<()> {
        match self.lock.stay(&self.repository).await? {
            Some(old) => self.remove_keys(&[old]).await,
            None => Ok(()),
        }
    }

    /// Waits for something that takes long and removes nothing, and keeps the lock meanwhile.
    ///
    /// # Errors
    /// Its own; [`Error::Unavailable`] when the lock was lost.
    pub async fn holding<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(lock::LOOKED_AT_EVERY, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.stay().await?,
            }
        }
    }

    /// Makes sure, right before something goes, that the lock is still held and, for a backup, that its mark is still there:
    /// while this process stood still another removal may have gone on, and somebody may depend on the backup by now.
    async fn confirm(&mut self, backup: Option<&str>) -> Result<()> {
        self.stay().await?;
        self.lock.confirm(&self.repository).await?;
        let Some(id) = backup else { return Ok(()) };
        match self.repository.is_listed(&self.layout().mark(id, &self.run)?).await? {
            true => Ok(()),
            false => Err(Error::unavailable(format!("the mark of backup {id} was taken back meanwhile"))
                .with_safe("the backup was not removed")
                .with_next("Run `pitr expire` again.")),
        }
    }

    /// Gives the lock back; one that cannot be given back ends by itself.
    pub async fn end(self) {
        let given_back = async {
            let key = self.lock.key(&self.repository)?;
            self.remove_keys(&[key]).await
        };
        if let Err(error) = given_back.await {
            tracing::debug!(%error, "the lock of a removal stays until its time is over");
        }
    }

    /// Marks a backup: nobody may begin to depend on it any more.
    pub async fn mark(&mut self, id: &str) -> Result<()> {
        self.stay().await?;
        let mark = MarkDocument { format: DOCUMENT_VERSION, backup: id.to_owned(), run: self.run.clone() };
        document::put(&*self.repository.storage, &self.layout().mark(id, &self.run)?, &mark).await.map(drop)
    }

    /// Takes this removal's own marks back: these backups stay.
    pub async fn unmark<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let keys: Result<Vec<_>> = ids.into_iter().map(|id| self.layout().mark(id, &self.run)).collect();
        self.remove_keys(&keys?).await
    }

    /// Removes all marks of a backup that is gone.
    pub async fn remove_marks(&self, id: &str) -> Result<()> {
        let listed = list_all(&*self.repository.storage, &self.layout().marks_prefix(id)?, LISTS_MAX).await?;
        let keys: Vec<ObjectKey> = listed.into_iter().map(|meta| meta.key).collect();
        self.remove_keys(&keys).await
    }

    /// Takes back marks that other removals have left behind; returns those that may not have ended yet.
    pub async fn take_back(&self, marks: &[Mark], now: DateTime<Utc>) -> Result<Vec<Mark>> {
        let mut left = Vec::new();
        for mark in marks {
            let key = self.layout().mark(&mark.backup, &mark.run)?;
            let written = self.removal()?.last_written(key.as_str()).await?;
            if written.is_some_and(|written| now.signed_duration_since(written) < MARKS_STAY) {
                left.push(mark.clone());
            } else {
                self.remove_keys(&[key]).await?;
            }
        }
        Ok(left)
    }

    /// Removes the record of a backup that this removal has marked: from then on it does not exist.
    pub async fn remove_record(&mut self, record: &BackupRecord) -> Result<()> {
        let BackupRecord { id, timeline, start_lsn, stop_lsn, .. } = record;
        let key = self.layout().backup_record(id, *timeline, *start_lsn, *stop_lsn)?;
        self.confirm(Some(id)).await?;
        self.remove_keys(&[key]).await
    }

    /// Removes all that is left of a backup without a record that this removal has marked, what tells that it was begun first.
    pub async fn remove_backup(&mut self, id: &str) -> Result<RemovedObjects> {
        let objects =
            list_all(&*self.repository.storage, &self.layout().backup_prefix(id)?, OBJECTS_MAX).await?;
        let started = self.layout().backup_object(id, "started.json")?;
        let (first, rest): (Vec<_>, Vec<_>) = objects.into_iter().partition(|meta| meta.key == started);
        self.confirm(Some(id)).await?;
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
        let keys: Result<Vec<_>> = keys.map(|record| self.repository.gap_key(record)).collect();
        self.remove_keys(&keys?).await
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
        self.confirm(None).await?;
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
        let listed = list_all(&*self.repository.storage, &prefix, LISTS_MAX).await?;
        let keys: Vec<ObjectKey> = listed.into_iter().map(|meta| meta.key).collect();
        self.remove_keys(&keys).await
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
