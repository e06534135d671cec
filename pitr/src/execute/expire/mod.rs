//! Finds out what retention removes from one repository, proves that nothing is lost by it, and removes it.
//!
//! What is removed is told first, where everybody looks: marks of backups, then their records go; stretches of WAL in
//! the ledger. So whatever is broken off half-way leaves whole chains, and the next run goes on.

mod look;
mod removal;

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, GapCause, GapKind, GapRecord};
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use walship::repository::{
    CAUSE_BYTES_MAX, LineageRepository, Mark, RecordedBy, RemovedObjects, Remover, new_gap_id,
};
use walship::wal::summary::SegmentSummary;
use walship::{Error, Result};

use super::{Planned, Proof, make_plan};
use crate::plan::{PlanOptions, build_chain, is_on_path};
use crate::retention::{
    CLOCK_MARGIN, Policy, RemovedWal, RetentionPlan, Seen, after, check_clock, check_newest, retain,
};
use crate::target::{RecoveryTarget, TargetKind, TimelineChoice, Zone};
use look::read;
use removal::Removal;
pub use removal::{note_nothing_to_do, note_refused, record_refused};

/// The margin where the clocks of the server and of the machine that takes backups seem to differ.
const WIDE_MARGIN: TimeDelta = TimeDelta::days(1);

/// How many segments are looked at to find when something happened next.
const LOOK_AHEAD_MAX: u64 = 16;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// What is to stay.
    pub policy: Policy,
    /// When.
    pub now: DateTime<Utc>,
    /// Whether an archive to which nothing comes is believed to be idle.
    pub accept_idle: bool,
    /// Backups of which all is there but a record, and that were given up.
    pub give_up: BTreeSet<String>,
    /// Why, in the operator's words.
    pub reason: Option<String>,
}

/// What would be removed from one repository.
#[derive(Debug)]
pub struct Prepared {
    /// The plan, with what the store says of sizes.
    pub plan: RetentionPlan,
    catalog: Catalog,
    seen: Seen,
    /// What other removals have marked and not removed.
    marks: Vec<Mark>,
    margin: TimeDelta,
}

impl Prepared {
    /// Returns whether there is nothing to do.
    pub fn is_done(&self) -> bool {
        self.plan.is_empty() && self.marks.is_empty() && self.plan.counts_again.is_empty()
    }

    /// Returns the objects and bytes that would be removed.
    pub fn total(&self) -> RemovedObjects {
        let mut total = RemovedObjects::default();
        let backups = self.plan.backups_removed.iter().map(|backup| (backup.objects, backup.stored_bytes));
        let wal = self.plan.wal_removed.iter().map(|wal| (wal.objects, wal.stored_bytes));
        for (objects, bytes) in backups.chain(wal) {
            total.add(RemovedObjects { objects, bytes, kept_as_versions: 0 });
        }
        total
    }
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct Report {
    /// The id of its records in the repository's history.
    pub id: String,
    /// How many backups.
    pub backups: u64,
    /// How many objects, of WAL and of backups.
    pub objects: u64,
    /// Their stored size in bytes.
    pub bytes: u64,
    /// How many of them the store keeps as older versions: their room is not free yet.
    pub kept_as_versions: u64,
    /// What else is to be known.
    pub notes: Vec<String>,
}

/// Returns what would be removed from a repository, looked at alone.
///
/// # Errors
/// [`Error::Invalid`] for a clock that cannot be right; whatever cannot be read: nothing is removed then.
pub async fn prepare(repository: &LineageRepository, request: &Request) -> Result<Prepared> {
    let read = read(repository, request).await.map_err(|error| match error {
        Error::Corrupt(_) | Error::Mismatch(_) => {
            error.with_safe("nothing was removed: what cannot be read may be needed")
        }
        error => error,
    });
    let (catalog, seen, marks) = read?;
    let Request { policy, now, accept_idle, .. } = request;
    check_clock(&catalog, &seen, policy, *now, *accept_idle)?;
    check_newest(&catalog, &seen, *now)?;
    let mut margin = CLOCK_MARGIN;
    let mut plan = retain(&catalog, &seen, policy, *now, margin);
    if let Err(lost) = prove(repository, &catalog, &plan).await? {
        margin = WIDE_MARGIN;
        plan = retain(&catalog, &seen, policy, *now, margin);
        if let Err(still) = prove(repository, &catalog, &plan).await? {
            return Err(Error::conflict(format!("{still} could not be reached any more"))
                .with_safe("nothing was removed")
                .with_next(
                    "Compare the clocks of the server and of the machines that take backups. If they agree, this is a \
                     fault of this program: report it with the output of `pitr info --json`.",
                ));
        }
        plan.notes.push(format!(
            "the clocks of the server and of the machine that takes backups differ: for {lost} an older backup stays"
        ));
    }
    for backup in &mut plan.backups_removed {
        (backup.objects, backup.stored_bytes) = repository.backup_size(&backup.id).await?;
    }
    for wal in &mut plan.wal_removed {
        let (from, until) = wal.numbers;
        (wal.objects, wal.stored_bytes) = repository.wal_in_range(wal.timeline, from, until).await?;
    }
    Ok(Prepared { plan, catalog, seen, marks, margin })
}

/// Makes plans for what has to stay in reach, as if all was removed already. Returns, in words, what could be reached
/// before and not any more.
async fn prove(
    repository: &LineageRepository,
    catalog: &Catalog,
    plan: &RetentionPlan,
) -> Result<std::result::Result<(), String>> {
    if plan.wal_removed.is_empty() && plan.backups_removed.is_empty() {
        return Ok(Ok(()));
    }
    let records = expired_records(plan, &RecordedBy { host: String::new(), user: String::new() }, plan.now);
    let after = after(catalog, plan, &records);
    let mut targets =
        vec![("the end of the archive".to_owned(), RecoveryTarget::new(TargetKind::Latest), None)];
    if let Some(from) = plan.window_from {
        let target = RecoveryTarget::new(TargetKind::Time { time: from, zone: Zone::Utc });
        targets.push(("the start of the window".to_owned(), target, None));
    }
    for timeline in &plan.ends {
        let on = TimelineChoice::Number(*timeline);
        let target = RecoveryTarget { timeline: on, ..RecoveryTarget::new(TargetKind::Latest) };
        targets.push((format!("the end of timeline {timeline}"), target, None));
    }
    for timeline in &plan.ends {
        match window_start(repository, catalog, plan, *timeline).await? {
            Ok(start) => targets.extend(start),
            Err(lost) => return Ok(Err(lost)),
        }
    }
    let size = catalog.lineage.segment_size;
    for kept in &plan.backups_kept {
        let Some(backup) = catalog.backups.iter().find(|backup| backup.id == kept.id) else { continue };
        let (start, stop) = (backup.start_lsn.0 / size.bytes(), backup.stop_lsn.0 / size.bytes());
        // Others do not come near to what goes.
        let near = |wal: &&RemovedWal| wal.numbers.0 <= stop + 3 && start <= wal.numbers.1;
        if plan.wal_removed.iter().any(|wal| near(&wal)) {
            let timeline = TimelineChoice::Number(backup.stop_timeline);
            let target = RecoveryTarget { timeline, ..RecoveryTarget::new(TargetKind::Immediate) };
            targets.push((format!("backup {}", backup.id), target, Some(backup.id.clone())));
        }
    }
    for (what, target, backup) in targets {
        let reached = async |catalog: &Catalog| reach(repository, catalog, &target, backup.as_deref()).await;
        // In this order: what comes to the archive meanwhile is no loss. Nothing reached is less than anything.
        let before = reached(catalog).await?;
        if reached(&after).await? < before {
            return Ok(Err(what));
        }
    }
    Ok(Ok(()))
}

/// What is to stay in reach: in words, the target, and the backup that it is reached from where that matters.
type Wanted = (String, RecoveryTarget, Option<String>);

/// Returns where a target leads; `None`: nowhere.
async fn reach(
    repository: &LineageRepository,
    catalog: &Catalog,
    target: &RecoveryTarget,
    backup: Option<&str>,
) -> Result<Option<Lsn>> {
    let options = PlanOptions { backup: backup.map(str::to_owned) };
    match make_plan(repository, catalog, target, &options, Proof::Bounded).await {
        Ok(Planned::Plan(plan)) => Ok(Some(plan.stop.final_lsn)),
        Ok(Planned::Refused(_)) | Err(Error::Corrupt(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the start of the window on the way to a timeline, if it is in reach. Where it is not, the first moment after it that is stays:
/// where the oldest backup is consistent that is newer by its WAL, whatever it and the store say of its age.
///
/// # Errors
/// What cannot be read. Within: that the first moment goes, in words.
async fn window_start(
    repository: &LineageRepository,
    catalog: &Catalog,
    plan: &RetentionPlan,
    timeline: TimelineId,
) -> Result<std::result::Result<Option<Wanted>, String>> {
    let (Some(time), Some(history)) = (plan.window_from, catalog.history(timeline)) else {
        return Ok(Ok(None));
    };
    let on_way = TimelineChoice::Number(timeline);
    let start = RecoveryTarget {
        timeline: on_way,
        ..RecoveryTarget::new(TargetKind::Time { time, zone: Zone::Utc })
    };
    if reach(repository, catalog, &start, None).await?.is_some() {
        return Ok(Ok(Some((format!("the start of the window on timeline {timeline}"), start, None))));
    }
    // One whose own WAL is not whole leads nowhere.
    let whole = |backup: &&BackupRecord| {
        is_on_path(&history, backup)
            && build_chain(catalog, &history, backup.start_lsn).end() >= backup.stop_lsn
    };
    let mut backups: Vec<_> = catalog.backups.iter().filter(whole).collect();
    backups.sort_by_key(|backup| (backup.stop_lsn, backup.start_lsn));
    // WAL goes on in time: what is behind one that is newer is newer.
    let (mut first, mut end) = (0, backups.len());
    while first < end {
        let middle = first.midpoint(end);
        match first_time(repository, catalog, &history, backups[middle].stop_lsn).await? {
            Some(first_time) if first_time > time => end = middle,
            _ => first = middle + 1,
        }
    }
    let goes = |backup: &&&BackupRecord| plan.backups_removed.iter().any(|removed| removed.id == backup.id);
    Ok(match backups.get(first).filter(goes) {
        Some(backup) => {
            Err(format!("the first moment of the window on timeline {timeline}, at {},", backup.stop_lsn))
        }
        None => Ok(None),
    })
}

/// Returns when something happened first behind a position, as far as its segment and some next ones tell.
async fn first_time(
    repository: &LineageRepository,
    catalog: &Catalog,
    history: &TimelineHistory,
    lsn: Lsn,
) -> Result<Option<DateTime<Utc>>> {
    let size = catalog.lineage.segment_size;
    let first = lsn.0 / size.bytes();
    for number in first..first.saturating_add(LOOK_AHEAD_MAX) {
        // Of a segment in which a timeline was left its successor's copy may be the one that is stored.
        let start = Lsn(number.saturating_mul(size.bytes()));
        let ends = [lsn.max(start), Lsn(start.0.saturating_add(size.bytes() - 1))];
        let names =
            ends.iter().filter_map(|at| SegmentName::from_number(history.timeline_of(*at), number, size));
        let Some(name) = names.into_iter().find(|name| catalog.segments.contains(*name)) else { break };
        match repository.segment_summary(name).await {
            Ok(Some(SegmentSummary { min_time, max_time, .. })) => {
                let ends = [min_time, max_time].into_iter().flatten().filter(|end| end.lsn >= lsn);
                if let Some(time) = ends.map(|end| end.time).min() {
                    return Ok(Some(time));
                }
            }
            Ok(None) | Err(Error::Corrupt(_) | Error::Mismatch(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Returns the records of the ledger for WAL that goes.
fn expired_records(plan: &RetentionPlan, by: &RecordedBy, now: DateTime<Utc>) -> Vec<GapRecord> {
    let record = |wal: &RemovedWal| GapRecord {
        format: 1,
        id: new_gap_id(now, rand::random()),
        timeline: wal.timeline,
        start_lsn: wal.start_lsn,
        end_lsn: wal.end_lsn,
        cause: GapCause { kind: GapKind::Expired, text: one_line(&plan.policy) },
        segment_digest: None,
        recorded: now,
        host: by.host.clone(),
        user: by.user.clone(),
    };
    plan.wal_removed.iter().map(record).collect()
}

fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    while line.len() > CAUSE_BYTES_MAX {
        line.pop();
    }
    line
}

/// Returns what would be removed, to be removed then: where that is refused, this goes on record.
///
/// # Errors
/// As [`prepare`].
pub async fn prepare_to_remove(repository: &LineageRepository, request: &Request) -> Result<Prepared> {
    let prepared = prepare(repository, request).await;
    if let Err(error) = &prepared {
        note_refused(repository, request, error).await;
    }
    prepared
}

/// Removes what was shown, from the same repository, after another look at it under the lock.
///
/// # Errors
/// [`Error::Unavailable`] when another removal is at work, or more would go than was shown; [`Error::Denied`] where the
/// store forbids removal.
pub async fn carry_out(
    repository: &LineageRepository,
    request: &Request,
    shown: &RetentionPlan,
    progress: &(dyn Fn(RemovedObjects) + Send + Sync),
) -> Result<Report> {
    let id = new_gap_id(Utc::now(), rand::random());
    let mut remover = match repository.begin_removal(&id, Utc::now()).await {
        Ok(remover) => remover,
        Err(error) => {
            note_refused(repository, request, &error).await;
            return Err(error);
        }
    };
    let done = match look_again(&mut remover, repository, request, shown).await {
        Ok(prepared) => Removal { remover: &mut remover, prepared, request, id, progress }.run().await,
        Err(error) => {
            note_refused(repository, request, &error).await;
            Err(error)
        }
    };
    remover.end().await;
    done
}

/// Returns what is to be removed now that nobody else removes.
async fn look_again(
    remover: &mut Remover,
    repository: &LineageRepository,
    request: &Request,
    shown: &RetentionPlan,
) -> Result<Prepared> {
    let mut prepared = remover.holding(prepare(repository, request)).await?;
    if Removal::count_again(remover, &prepared).await? {
        // What counts again may stand in the place of what was to stay.
        prepared = remover.holding(prepare(repository, request)).await?;
    }
    match more_than(&prepared.plan, shown) {
        None => Ok(prepared),
        Some(more) => {
            Err(Error::unavailable(format!("something changed meanwhile: {more} would go as well"))
                .with_safe("nothing was removed")
                .with_next("Run `pitr expire` again, and look at what it shows."))
        }
    }
}

/// Takes back what removals have marked that were killed long ago, of backups that are whole: while nothing can go, these could not be
/// restored.
///
/// # Errors
/// As of [`carry_out`]; what cannot be read.
pub async fn take_back_old_marks(repository: &LineageRepository) -> Result<()> {
    if repository.marks().await?.is_empty() {
        return Ok(());
    }
    let id = new_gap_id(Utc::now(), rand::random());
    let mut remover = repository.begin_removal(&id, Utc::now()).await?;
    let taken = async {
        // Under the lock: no other removal makes a whole backup a half one now.
        let (marks, whole) = remover.holding(marks_and_whole(repository)).await?;
        let old: Vec<Mark> = marks.into_iter().filter(|mark| whole.contains(&mark.backup)).collect();
        remover.take_back(&old, Utc::now()).await
    }
    .await;
    remover.end().await;
    taken.map(drop)
}

/// Returns the marks that there are, and the backups with a record, with what these have taken over from.
async fn marks_and_whole(repository: &LineageRepository) -> Result<(Vec<Mark>, BTreeSet<String>)> {
    let marks = repository.marks().await?;
    let mut whole = BTreeSet::new();
    for record in repository.complete_backups().await? {
        let record = repository.whole_record(&record).await?;
        whole.extend(record.objects.into_iter().filter_map(|object| object.backup));
        whole.insert(record.id);
    }
    Ok((marks, whole))
}

/// Returns something that one plan removes and the other does not.
fn more_than(plan: &RetentionPlan, shown: &RetentionPlan) -> Option<String> {
    let backup =
        plan.backups_removed.iter().find(|one| !shown.backups_removed.iter().any(|other| other.id == one.id));
    let covers = |one: &RemovedWal, other: &RemovedWal| {
        other.timeline == one.timeline && other.numbers.0 <= one.numbers.0 && one.numbers.1 <= other.numbers.1
    };
    let wal = plan.wal_removed.iter().find(|one| !shown.wal_removed.iter().any(|other| covers(one, other)));
    let backup = backup.map(|backup| format!("backup {}", backup.id));
    backup.or_else(|| {
        wal.map(|wal| format!("WAL of timeline {} from {} to {}", wal.timeline, wal.start_lsn, wal.end_lsn))
    })
}
