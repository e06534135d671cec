//! `pitr hold` and `pitr release`; and the hold that a restore has on what it reads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tokio::task::JoinHandle;
use walship::catalog::{BackupRecord, HeldWal, Hold};
use walship::pg::SegmentName;
use walship::repository::{LineageRepository, RecordedBy, load_catalog, new_gap_id, released_now};
use walship::{Error, Result};

use super::DONE;
use super::args::{HoldArgs, ReleaseArgs};
use super::change;
use super::output;
use super::source::{Source, open_lineages, say_notes};
use crate::plan::{RestorePlan, StopKind};

/// How long a restore holds what it reads, unless it says so again.
const RESTORE_HOLDS: TimeDelta = TimeDelta::days(1);

/// How long what was restored is held for a recovery that nobody watches: it fetches WAL when the command has ended.
const RECOVERY_HOLDS: TimeDelta = TimeDelta::days(7);

/// How often a restore that is under way holds again what it reads.
const HOLD_AGAIN_EVERY: Duration = Duration::from_secs(6 * 3600);

/// How long a command that has ended tries to release what it held: it is over within a day by itself.
const RELEASE_PATIENCE: Duration = Duration::from_secs(20);

/// Holds again and again what a restore reads, until it is dropped.
#[derive(Debug)]
#[must_use = "what is not released is held for a day"]
pub(super) struct RestoreHold {
    repositories: Vec<LineageRepository>,
    hold: Hold,
    /// The ids of all holds that were made, or are being made.
    made: Arc<Mutex<Vec<String>>>,
    renewal: JoinHandle<()>,
}

impl RestoreHold {
    fn keep(repositories: Vec<LineageRepository>, hold: Hold, every: Duration) -> Self {
        let made = Arc::new(Mutex::new(vec![hold.id.clone()]));
        let (everywhere, again, ids) = (repositories.clone(), hold.clone(), Arc::clone(&made));
        let renewal = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let again = renewed(&again, RESTORE_HOLDS);
                // Noted first: a request that is broken off may have been carried out.
                ids.lock().unwrap_or_else(PoisonError::into_inner).push(again.id.clone());
                put_everywhere(&everywhere, &again).await;
            }
        });
        Self { repositories, hold, made, renewal }
    }

    /// Ends it: what was held is not needed any more.
    pub(super) async fn release(self) {
        self.release_in(self.repositories.clone()).await;
    }

    /// Holds it all for a recovery that goes on where nobody watches it.
    pub(super) async fn leave_to_recovery(self) {
        let held = put_everywhere(&self.repositories, &renewed(&self.hold, RECOVERY_HOLDS)).await;
        self.release_in(held).await;
    }

    async fn release_in(&self, repositories: Vec<LineageRepository>) {
        self.renewal.abort();
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let release = async {
            for one in &repositories {
                for id in &made {
                    if let Err(error) = one.release_hold(&released_now(id, Utc::now())).await {
                        tracing::debug!(%error, "what was restored is not released before its time");
                        break;
                    }
                }
            }
        };
        if tokio::time::timeout(RELEASE_PATIENCE, release).await.is_err() {
            tracing::debug!("what was restored is not released before its time: the store does not answer");
        }
    }
}

/// Does some work while what it reads is held; however it ends, all is released then. `by` is the command.
///
/// # Errors
/// As [`hold_for_restore`]: nothing was done then.
pub(super) async fn held_while<T>(
    repository: &LineageRepository,
    plan: &RestorePlan,
    by: &str,
    work: impl Future<Output = T>,
) -> Result<T> {
    let held = hold_for_restore(repository, plan, by).await?;
    let done = work.await;
    held.release().await;
    Ok(done)
}

impl Drop for RestoreHold {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// Returns a hold that says the same again: a document is written once.
fn renewed(hold: &Hold, length: TimeDelta) -> Hold {
    let now = Utc::now();
    let id = new_gap_id(now, rand::random());
    Hold { id, until: Some(now + length), created: now, ..hold.clone() }
}

/// Writes a hold wherever this user may: who may only read restores as well. Returns where it is.
async fn put_everywhere(repositories: &[LineageRepository], hold: &Hold) -> Vec<LineageRepository> {
    let mut held = Vec::new();
    for one in repositories {
        match one.put_hold(hold).await {
            Ok(()) => held.push(one.clone()),
            Err(error) => tracing::debug!(%error, "what is restored is not held"),
        }
    }
    held
}

pub(super) async fn hold(args: &HoldArgs) -> Result<u8> {
    let now = Utc::now();
    let until = args.until()?;
    if let Some(until) = until.filter(|until| *until <= now) {
        return Err(Error::invalid(format!("a hold until {} is over", output::short_time(until)))
            .with_next("Give --until a time to come, or leave it out."));
    }
    let source = Source::open(&args.source).await?;
    say_notes(&source.repository);
    let orphaned = source.catalog.orphaned_backups.iter().find(|backup| backup.id == args.backup);
    let complete = source.catalog.backups.iter().find(|backup| backup.id == args.backup);
    let with = match (complete, orphaned) {
        (Some(backup), _) => {
            let parents = source.catalog.parents_of(backup).unwrap_or_default();
            foundations(&source.repository, backup, parents).await
        }
        (None, Some(backup)) => vec![backup.missing.clone()],
        (None, None) => {
            return Err(Error::missing(format!("there is no complete backup {:?}", args.backup))
                .with_next("`pitr info` lists the backups."));
        }
    };
    let hold = Hold { with, ..new_hold(&args.backup, args.reason.clone(), until, now) };
    for one in source.repository.each() {
        // In this order: retention marks first, and looks for holds then.
        one.put_hold(&hold).await?;
        if let Err(error) = check_not_expiring(&one, &hold).await {
            one.release_hold(&released_now(&hold.id, now)).await?;
            return Err(error);
        }
    }
    let what = format!(
        "backup {}, {}",
        hold.backup,
        until.map_or_else(
            || "until it is released".to_owned(),
            |until| format!("until {}", output::short_time(until))
        )
    );
    change::record(&source.repository, "held", what, Some(&hold.reason)).await;
    if args.source.json {
        output::print_json(&json!({ "hold": hold }))?;
    } else {
        let until = until.map_or_else(|| "it is released".to_owned(), output::short_time);
        let text = format!("Backup {} is held until {until} (hold {}).\n", hold.backup, hold.id);
        output::print(&output::clean(&text))?;
    }
    everywhere(&source.repository, "the backup is held")
}

/// Fails when not every configured repository was reached.
fn everywhere(repository: &LineageRepository, what: &str) -> Result<u8> {
    match repository.unreadable() {
        unread if unread.is_empty() => Ok(DONE),
        unread => {
            Err(Error::unavailable(format!("{what}, but not in {}: it was not reached", unread.join(", ")))
                .with_safe("what was reached is as said above")
                .with_next("Run it again when it is reached."))
        }
    }
}

pub(super) async fn release(args: &ReleaseArgs) -> Result<u8> {
    let (repository, _) = open_lineages(&args.source).await?;
    say_notes(&repository);
    let mut released: Vec<Hold> = Vec::new();
    for one in repository.each() {
        for hold in one.holds().await?.into_iter().filter(|hold| hold.id == args.id || hold.backup == args.id)
        {
            one.release_hold(&released_now(&hold.id, Utc::now())).await?;
            if !released.iter().any(|known| known.id == hold.id) {
                released.push(hold);
            }
        }
    }
    if released.is_empty() {
        return Err(Error::missing(format!(
            "there is no hold {:?}, and no hold on a backup of that id",
            args.id
        ))
        .with_next("`pitr info` lists the holds."));
    }
    for hold in &released {
        let what = format!("backup {}, held because: {}", hold.backup, hold.reason);
        change::record(&repository, "released", what, args.reason.as_deref()).await;
    }
    if args.source.json {
        output::print_json(&json!({ "released": released }))?;
    } else {
        let lines = released
            .iter()
            .map(|hold| format!("Hold {} on backup {} is released: {}\n", hold.id, hold.backup, hold.reason));
        output::print(&output::clean(&lines.collect::<String>()))?;
    }
    everywhere(&repository, "the hold is released")
}

/// Holds what a restore by a command reads, where this user may write, so that retention does not remove it meanwhile: until that
/// is released, or, where it never is, for eighteen hours at least.
///
/// # Errors
/// [`Error::Conflict`] when it is being removed already, or WAL that it needs was since the plan was made.
pub(super) async fn hold_for_restore(
    repository: &LineageRepository,
    plan: &RestorePlan,
    by: &str,
) -> Result<RestoreHold> {
    let now = Utc::now();
    let through_lsn = (plan.stop.kind != StopKind::EndOfWal).then_some(plan.stop.through_lsn);
    let wal = HeldWal { timeline: plan.timeline, start_lsn: Some(plan.backup.start_lsn), through_lsn };
    let reason = format!(
        "{by} {}",
        plan.target_options.chars().filter(|c| !c.is_control()).take(200).collect::<String>()
    );
    let hold = Hold {
        with: foundations(repository, &plan.backup, &plan.parents).await,
        wal: Some(wal),
        ..new_hold(&plan.backup.id, reason, Some(now + RESTORE_HOLDS), now)
    };
    let size = repository.lineage().segment_size;
    let stretches: Vec<_> = (plan.chain.iter())
        .map(|part| (part.first.timeline, part.first.start(size), part.last.end(size)))
        .collect();
    let (mut sound, mut gone) = (Vec::new(), None);
    let repositories = repository.each();
    put_everywhere(&repositories, &hold).await;
    let held = RestoreHold::keep(repositories.clone(), hold.clone(), HOLD_AGAIN_EVERY);
    for one in repositories {
        // In this order: retention says first what it removes, and looks for holds then.
        match check_not_expiring(&one, &hold).await {
            Ok(()) => match one.check_wal_not_expired(&stretches).await {
                Ok(()) => sound.push(one),
                Err(error @ Error::Conflict(_)) => {
                    // Others may have it.
                    sound.push(one);
                    gone = Some(error);
                }
                Err(error) => one.failed(&error),
            },
            Err(error @ Error::Conflict(_)) => gone = Some(error),
            Err(error) => one.failed(&error),
        }
    }
    let Some(error) = gone else { return Ok(held) };
    let there = if sound.is_empty() { Ok(false) } else { is_still_there(sound, plan).await };
    if !matches!(there, Ok(true)) {
        held.release().await;
        there?;
        return Err(error
            .with_safe("nothing was restored, and the repository is as retention keeps it")
            .with_next(
                "Run it again: the plan is made from what is there now. What retention keeps is the policy's: [retention] in the \
                 configuration.",
            ));
    }
    Ok(held)
}

/// Returns what a backup builds on, and what these and it have taken over from.
async fn foundations<'a>(
    repository: &LineageRepository,
    backup: &BackupRecord,
    parents: impl IntoIterator<Item = &'a BackupRecord>,
) -> Vec<String> {
    let mut ids = Vec::new();
    let mut open = vec![backup];
    for parent in parents {
        ids.push(parent.id.clone());
        open.push(parent);
    }
    for record in open {
        match repository.whole_record(record).await {
            Ok(whole) => ids.extend(whole.objects.into_iter().filter_map(|object| object.backup)),
            Err(error) => tracing::debug!(%error, "what a backup has taken over is not known"),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Fails when anything that is held is being removed.
async fn check_not_expiring(repository: &LineageRepository, hold: &Hold) -> Result<()> {
    for id in hold.with.iter().chain([&hold.backup]) {
        repository.check_not_expiring(id).await?;
    }
    Ok(())
}

/// Returns whether these repositories together still hold what a plan needs.
async fn is_still_there(mut repositories: Vec<LineageRepository>, plan: &RestorePlan) -> Result<bool> {
    let first = repositories.remove(0);
    let size = first.lineage().segment_size;
    let catalog = load_catalog(&first.with_others(repositories)).await?;
    let backups = plan.backups().all(|needed| catalog.backups.iter().any(|backup| backup.id == needed.id));
    let wal = plan.chain.iter().filter(|part| !part.open).all(|part| {
        let (from, until) = (part.first.number(size), part.last.number(size) + 1);
        // What is stored in parts alone is not expired, else it were not looked for here.
        let in_parts = (from..until).filter(|number| {
            let name = SegmentName::from_number(part.first.timeline, *number, size);
            name.is_some_and(|name| {
                !catalog.segments.contains(name) && !catalog.gaps.iter().any(|gap| gap.touches(name, size))
            })
        });
        catalog.segments.count(part.first.timeline, from, until) + in_parts.count() as u64 == until - from
    });
    Ok(backups && wal)
}

fn new_hold(backup: &str, reason: String, until: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Hold {
    let RecordedBy { host, user } = RecordedBy::now();
    let id = new_gap_id(now, rand::random());
    let (backup, with) = (backup.to_owned(), Vec::new());
    Hold { format: 1, id, backup, with, reason, until, wal: None, created: now, host, user }
}

#[cfg(test)]
mod tests {
    use walship::pg::{Lsn, SegmentSize, TimelineId};
    use walship::repository::Repository;
    use walship::storage::memory::MemoryStorage;

    use super::*;

    #[tokio::test]
    async fn a_restore_holds_again_while_it_runs_and_releases_it_then() {
        let now = Utc::now();
        let repository = Repository::create(Arc::new(MemoryStorage::new()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let lineage = cluster.register_lineage(7, SegmentSize::MIN, 17, now).await.unwrap();
        let wal = HeldWal { timeline: TimelineId::FIRST, start_lsn: Some(Lsn(1 << 20)), through_lsn: None };
        let backup = "20260101T010203Z-0123456789abcdef";
        let hold = Hold {
            wal: Some(wal),
            ..new_hold(backup, "pitr restore --latest".into(), Some(now + RESTORE_HOLDS), now)
        };
        let others = Hold { reason: "audit".into(), ..new_hold(backup, "audit".into(), None, now) };
        lineage.put_hold(&others).await.unwrap();
        let length = |hold: &Hold| hold.until.map(|until| until - hold.created);
        for recovers in [true, false] {
            let hold = Hold { id: new_gap_id(now, rand::random()), ..hold.clone() };
            lineage.put_hold(&hold).await.unwrap();
            let held = RestoreHold::keep(vec![lineage.clone()], hold.clone(), Duration::from_millis(5));
            while lineage.holds().await.unwrap().len() < 5 {
                tokio::task::yield_now().await;
            }
            let mut holds = lineage.holds().await.unwrap();
            holds.retain(|one| one.id != others.id);
            for again in &holds {
                assert_eq!((&*again.backup, again.wal, &again.reason), (backup, hold.wal, &hold.reason));
            }
            assert!(holds.iter().any(|again| again.created > hold.created));
            match recovers {
                true => held.leave_to_recovery().await,
                false => held.release().await,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mut left: Vec<_> = lineage.holds().await.unwrap().iter().map(length).collect();
            left.sort();
            // What is held for the recovery stays, and what others hold.
            assert_eq!(left, [None, Some(RECOVERY_HOLDS)]);
        }
    }
}
