//! The removal itself, in an order in which nothing is lost wherever it ends.

use std::collections::BTreeSet;

use chrono::Utc;
use walship::catalog::{ExpireOutcome, ExpireRecord, ExpireRemoved, ExpiredBackup, ExpiredWal, GapRecord};
use walship::pg::Lsn;
use walship::repository::index::complete::{Options, Task, complete};
use walship::repository::{LineageRepository, Mark, RecordedBy, RemovedObjects, Remover, new_gap_id};
use walship::{Error, Result};

use super::look::again;
use super::{Prepared, Report, Request, expired_records, more_than, one_line};
use crate::retention::{CountsAgain, RemovedWal, RetentionPlan, retain};

/// A removal under way.
pub(super) struct Removal<'a> {
    pub(super) remover: &'a mut Remover,
    pub(super) prepared: Prepared,
    pub(super) request: &'a Request,
    pub(super) id: String,
    pub(super) progress: &'a (dyn Fn(RemovedObjects) + Send + Sync),
}

impl Removal<'_> {
    pub(super) async fn run(mut self) -> Result<Report> {
        let by = RecordedBy::now();
        let mut report = Report { id: self.id.clone(), ..Report::default() };
        let record = begun(&self.prepared, self.request, &self.id, &by);
        self.remover.repository().put_expire_record(&record).await?;
        let mut removed = RemovedObjects::default();
        let done = async {
            self.tidy_marks(&mut report).await?;
            match self.prepared.plan.is_empty() {
                true => Ok(()),
                false => self.remove(&by, &mut removed, &mut report).await,
            }
        }
        .await;
        (report.objects, report.bytes) = (removed.objects, removed.bytes);
        report.kept_as_versions = removed.kept_as_versions;
        let outcome = ended(&report, done.as_ref().err());
        if let Err(error) = self.remover.repository().put_expire_outcome(&outcome).await {
            report.notes.push(format!("what was removed is not in the history of the repository: {error}"));
        }
        done.map(|()| report)
    }

    /// Takes back the marks of backups that stay after all, and removes those of backups that are gone.
    async fn tidy_marks(&mut self, report: &mut Report) -> Result<()> {
        let (stale, of_gone) = self.marks_of_others();
        for id in &of_gone {
            self.remover.remove_marks(id).await?;
        }
        for mark in self.remover.take_back(&stale, Utc::now()).await? {
            report.notes.push(format!(
                "backup {} stays, and is still marked by a removal that may not have ended ({}): its mark is taken back in an hour",
                mark.backup, mark.run
            ));
        }
        Ok(())
    }

    /// Returns the marks of backups that stay after all, and the marked backups that are gone.
    fn marks_of_others(&self) -> (Vec<Mark>, BTreeSet<String>) {
        let Prepared { plan, marks, catalog, seen, .. } = &self.prepared;
        let complete = catalog.backups.iter().map(|backup| &*backup.id);
        let orphaned = catalog.orphaned_backups.iter().map(|backup| &*backup.id);
        let there: BTreeSet<&str> =
            complete.chain(orphaned).chain(seen.recordless.iter().map(|begun| &*begun.id)).collect();
        // The mark tells what is half removed from what has lost its record: it stays as long as its folder. What a backup that
        // stays has taken over from was never complete, and is needed.
        let half_removed = |mark: &Mark| {
            seen.recordless.iter().any(|begun| begun.id == mark.backup && !begun.complete)
                && !seen.lenders.values().any(|lenders| lenders.contains(&mark.backup))
        };
        let goes = |mark: &&Mark| {
            plan.backups_removed.iter().any(|backup| backup.id == mark.backup) || half_removed(mark)
        };
        let (stale, gone): (Vec<&Mark>, _) =
            marks.iter().filter(|mark| !goes(mark)).partition(|mark| there.contains(&*mark.backup));
        let gone = gone.into_iter().map(|mark: &Mark| mark.backup.clone()).collect();
        (stale.into_iter().cloned().collect(), gone)
    }

    /// Takes out of the ledger what was expired once, is needed, and of which nothing is gone; returns whether there was any.
    pub(super) async fn count_again(remover: &Remover, prepared: &Prepared) -> Result<bool> {
        let by = RecordedBy::now();
        for CountsAgain { record, rest } in &prepared.plan.counts_again {
            // First what stays expired: at no moment does it count.
            for (from, until) in rest {
                let size = prepared.catalog.lineage.segment_size.bytes();
                let (start_lsn, end_lsn) = (Lsn(from.saturating_mul(size)), Lsn(until.saturating_mul(size)));
                let id = new_gap_id(Utc::now(), rand::random());
                let RecordedBy { host, user } = by.clone();
                let part =
                    GapRecord { id, start_lsn, end_lsn, recorded: Utc::now(), host, user, ..record.clone() };
                remover.put_expired(&part).await?;
            }
            remover.withdraw_expired(std::slice::from_ref(record)).await?;
        }
        Ok(!prepared.plan.counts_again.is_empty())
    }

    async fn remove(
        &mut self,
        by: &RecordedBy,
        removed: &mut RemovedObjects,
        report: &mut Report,
    ) -> Result<()> {
        self.remove_records().await?;
        let backups: Vec<String> =
            self.prepared.plan.backups_removed.iter().map(|backup| backup.id.clone()).collect();
        // At every moment a backup whose record is gone is marked, or told of here.
        if !backups.is_empty() {
            let removed = backups.iter().take(ExpireRemoved::BACKUPS_MAX).cloned().collect();
            let told = ExpireRemoved { format: 1, id: self.id.clone(), removed };
            self.remover.repository().put_expire_removed(&told).await.map_err(half_way)?;
        }
        let records = self.tell_of_wal(by).await;
        // Backups do not exist any more; their objects go whatever became of the WAL.
        for id in &backups {
            let done = self.remover.remove_backup(id).await.map_err(half_way)?;
            (self.progress)(done);
            removed.add(done);
            report.backups += 1;
            self.remover.remove_marks(id).await.map_err(half_way)?;
        }
        let records = records?;
        if let Err(error) = self.remove_wal(removed).await {
            // Any other failure may hide a request that still takes effect: what it removes must not count again.
            if matches!(error, Error::Denied(_)) {
                self.withdraw_whole(&records).await.map_err(half_way)?;
            }
            return Err(error);
        }
        self.remover.remove_backup_lists().await.map_err(half_way)?;
        let superseded = self.prepared.plan.wal_removed.iter().flat_map(|wal| wal.supersedes.clone());
        let superseded: Vec<GapRecord> = superseded.collect();
        self.remover.withdraw_expired(&superseded).await.map_err(half_way)?;
        let tidied = self.remover.tidy_holds(&self.prepared.seen.holds, self.request.now).await;
        if let Err(error) = tidied {
            report.notes.push(format!("holds that are over stay where they are: {error}"));
        }
        // A cache: without it plans take longer, and are no other.
        let options = Options { task: Task::Complete, dry_run: false };
        if let Err(error) = complete(self.remover.repository(), options).await {
            report.notes.push(format!("the index is not complete (`pitr index` mends that): {error}"));
        }
        Ok(())
    }

    /// Marks the backups that go, looks again whether anybody has begun to depend on one, and removes their records:
    /// what builds on others before these.
    async fn remove_records(&mut self) -> Result<()> {
        let going: Vec<String> =
            self.prepared.plan.backups_removed.iter().map(|backup| backup.id.clone()).collect();
        let needed = async {
            for id in &going {
                self.remover.mark(id).await?;
            }
            self.needed_meanwhile().await
        };
        let needed = needed.await;
        if !matches!(needed, Ok((None, _))) {
            // Nothing of them is gone. Where this fails as well, the marks are taken back in an hour.
            if let Err(error) = self.remover.unmark(going.iter().map(String::as_str)).await {
                tracing::debug!(%error, "marks of backups that were not removed stay");
            }
        }
        if let Some(needed) = needed?.0 {
            return Err(changed(&format!("backup {needed}")));
        }
        let catalog = &self.prepared.catalog;
        let ids: BTreeSet<&str> = going.iter().map(String::as_str).collect();
        let mut records: Vec<_> = catalog.backups.iter().filter(|backup| ids.contains(&*backup.id)).collect();
        records
            .sort_by_key(|backup| std::cmp::Reverse(backup.parent.as_ref().map_or(0, |parent| parent.depth)));
        let mut any = false;
        for record in records {
            match self.remover.remove_record(record).await {
                Ok(()) => any = true,
                // Nothing is gone, and nothing goes.
                Err(error @ Error::Denied(_)) if !any => {
                    self.remover.unmark(going.iter().map(String::as_str)).await?;
                    return Err(error);
                }
                // The answer may be lost of a request that was heard: the marks stay.
                Err(error) => return Err(half_way(error)),
            }
        }
        Ok(())
    }

    /// Writes into the ledger which WAL goes, and looks again whether anybody has begun to depend on it.
    async fn tell_of_wal(&mut self, by: &RecordedBy) -> Result<Vec<GapRecord>> {
        let records = expired_records(&self.prepared.plan, by, Utc::now());
        for record in &records {
            if let Err(error) = self.remover.put_expired(record).await {
                // Nothing of it is gone. Where this fails as well, the next removal goes on from here.
                if let Err(error) = self.remover.withdraw_expired(&records).await {
                    tracing::debug!(%error, "records of WAL that was not removed stay");
                }
                return Err(error);
            }
        }
        let needed = self.needed_meanwhile().await;
        if !matches!(needed, Ok((_, None))) {
            // Nothing of it is gone.
            if let Err(error) = self.remover.withdraw_expired(&records).await {
                tracing::debug!(%error, "records of WAL that was not removed stay");
            }
        }
        if let Some(needed) = needed?.1 {
            return Err(changed(&needed));
        }
        Ok(records)
    }

    /// Takes out of the ledger what it says of WAL of which nothing is gone: that counts again.
    async fn withdraw_whole(&self, records: &[GapRecord]) -> Result<()> {
        let mut whole = Vec::new();
        for (record, wal) in records.iter().zip(&self.prepared.plan.wal_removed) {
            let (from, until) = wal.numbers;
            // How much of a batch that failed is gone is not known but by looking.
            let left = self.remover.repository().wal_in_range(wal.timeline, from, until).await?;
            if left == (wal.objects, wal.stored_bytes) {
                whole.push(record.clone());
            }
        }
        self.remover.withdraw_expired(&whole).await
    }

    /// Plans again with the backups and holds that there are now; returns a backup, and WAL in words, that would stay
    /// by now and is about to go.
    async fn needed_meanwhile(&mut self) -> Result<(Option<String>, Option<String>)> {
        let Prepared { plan, catalog, seen, margin, .. } = &self.prepared;
        let repository = self.remover.repository().clone();
        let going: BTreeSet<&str> = plan.backups_removed.iter().map(|backup| &*backup.id).collect();
        let seen = self.remover.holding(again(&repository, catalog, seen)).await?;
        let now = retain(catalog, &seen, &self.request.policy, self.request.now, *margin);
        let kept: BTreeSet<&str> = now.backups_kept.iter().map(|backup| &*backup.id).collect();
        let backup = going.iter().find(|id| kept.contains(**id)).map(|id| (*id).to_owned());
        Ok((backup, more_than(plan, &RetentionPlan { backups_removed: plan.backups_removed.clone(), ..now })))
    }

    async fn remove_wal(&mut self, removed: &mut RemovedObjects) -> Result<()> {
        let mut all: Vec<RemovedWal> = self.prepared.plan.wal_removed.clone();
        all.sort_by_key(|wal| (wal.start_lsn, wal.timeline));
        for wal in &all {
            let (from, until) = wal.numbers;
            self.remover.remove_rollups(wal.timeline, from, until).await?;
            let progress = self.progress;
            let mut note = |some: RemovedObjects| {
                progress(some);
                removed.add(some);
            };
            self.remover.remove_wal(wal.timeline, from, until, &mut note).await.map_err(half_way)?;
            // Whoever archives may have written one meanwhile that still tells of what was there.
            self.remover.remove_rollups(wal.timeline, from, until).await.map_err(half_way)?;
        }
        Ok(())
    }
}

/// Returns what is put on record before anything goes.
fn begun(prepared: &Prepared, request: &Request, id: &str, by: &RecordedBy) -> ExpireRecord {
    let plan = &prepared.plan;
    let backups = plan.backups_removed.iter().take(ExpireRecord::BACKUPS_MAX);
    let wal = plan.wal_removed.iter().map(|wal| ExpiredWal {
        timeline: wal.timeline,
        start_lsn: wal.start_lsn,
        end_lsn: wal.end_lsn,
        reason: wal.reason.clone(),
    });
    ExpireRecord {
        format: 1,
        id: id.to_owned(),
        started: Utc::now(),
        host: by.host.clone(),
        user: by.user.clone(),
        reason: request.reason.clone(),
        policy: plan.policy.clone(),
        window_from: plan.window_from,
        backups: backups
            .map(|backup| ExpiredBackup { id: backup.id.clone(), reason: backup.reason.clone() })
            .collect(),
        backups_total: plan.backups_removed.len() as u64,
        wal: wal.collect(),
        tells_removed: true,
    }
}

/// Puts on record that there was nothing to remove: who watches sees that retention is carried out.
///
/// # Errors
/// What the store says.
pub async fn note_nothing_to_do(
    repository: &LineageRepository,
    request: &Request,
    prepared: &Prepared,
) -> Result<()> {
    let report = Report { id: new_gap_id(Utc::now(), rand::random()), ..Report::default() };
    let record = begun(prepared, request, &report.id, &RecordedBy::now());
    repository.put_expire_record(&record).await?;
    repository.put_expire_outcome(&ended(&report, None)).await
}

/// Puts on record that a removal was refused, with what it was refused for: who watches hears of it at once. `policy` is in
/// words, and empty where there is none that makes sense.
///
/// # Errors
/// What the store says.
pub async fn record_refused(
    repository: &LineageRepository,
    policy: &str,
    reason: Option<&str>,
    why: &Error,
) -> Result<()> {
    let RecordedBy { host, user } = RecordedBy::now();
    let mut started = Utc::now();
    // Where it is this machine's clock that is wrong, the record would be taken for an old one, or for the newest for years.
    if let Error::Invalid(_) = why
        && let Ok(Some(now)) = repository.store_now(&new_gap_id(started, rand::random())).await
    {
        started = now;
    }
    let id = new_gap_id(started, rand::random());
    let record = ExpireRecord {
        format: 1,
        id: id.clone(),
        started,
        host,
        user,
        reason: reason.map(str::to_owned),
        policy: policy.to_owned(),
        window_from: None,
        backups: Vec::new(),
        backups_total: 0,
        wal: Vec::new(),
        tells_removed: true,
    };
    repository.put_expire_record(&record).await?;
    let report = Report { id, ..Report::default() };
    let outcome = ExpireOutcome { refused: true, finished: started, ..ended(&report, Some(why)) };
    repository.put_expire_outcome(&outcome).await
}

/// As [`record_refused`]; that it cannot be written takes nothing away, and is noted.
pub async fn note_refused(repository: &LineageRepository, request: &Request, why: &Error) {
    let policy = request.policy.to_string();
    if let Err(error) = record_refused(repository, &policy, request.reason.as_deref(), why).await {
        let place = repository.location();
        repository.note(format!("that nothing was removed is not in the history of {place}: {error}"));
    }
}

/// Returns what is put on record of a removal that has ended.
fn ended(report: &Report, failure: Option<&Error>) -> ExpireOutcome {
    ExpireOutcome {
        format: 1,
        id: report.id.clone(),
        finished: Utc::now(),
        failure: failure.map(|error| one_line(&error.to_string())),
        refused: false,
        backups: report.backups,
        objects: report.objects,
        bytes: report.bytes,
        kept_as_versions: report.kept_as_versions,
    }
}

fn changed(what: &str) -> Error {
    Error::unavailable(format!("{what} was to go, and is needed since a moment ago"))
        .with_safe("it was not removed")
        .with_next("Run `pitr expire` again.")
}

fn half_way(error: Error) -> Error {
    error
        .with_safe("what stays is whole: what was to be removed does not count any more, gone or not")
        .with_next("Mend what is said above, then run `pitr expire` again: it goes on where this one ended.")
}
