//! `pitr hold` and `pitr release`; and the hold that a restore has on what it reads.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use walship::catalog::{HeldWal, Hold};
use walship::repository::{LineageRepository, RecordedBy, new_gap_id, released_now};
use walship::{Error, Result};

use super::DONE;
use super::args::{HoldArgs, ReleaseArgs};
use super::change;
use super::output;
use super::source::{Source, open_lineages, say_notes};
use crate::plan::{RestorePlan, StopKind};

/// How long a restore holds what it reads: recovery goes on fetching WAL when the command has ended.
const RESTORE_HOLDS: TimeDelta = TimeDelta::days(1);

pub(super) async fn hold(args: &HoldArgs) -> Result<u8> {
    let now = Utc::now();
    let until = args.until()?;
    if let Some(until) = until.filter(|until| *until <= now) {
        return Err(Error::invalid(format!("a hold until {} is over", output::short_time(until)))
            .with_next("Give --until a time to come, or leave it out."));
    }
    let source = Source::open(&args.source).await?;
    say_notes(&source.repository);
    let orphaned = source.catalog.orphaned_backups.iter().any(|backup| backup.id == args.backup);
    if !orphaned && !source.catalog.backups.iter().any(|backup| backup.id == args.backup) {
        return Err(Error::missing(format!("there is no complete backup {:?}", args.backup))
            .with_next("`pitr info` lists the backups."));
    }
    let hold = new_hold(&args.backup, args.reason.clone(), until, None, now);
    for one in source.repository.each() {
        // In this order: retention marks first, and looks for holds then.
        one.put_hold(&hold).await?;
        if let Err(error) = one.check_not_expiring(&hold.backup).await {
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
        change::record(&repository, "released", what, None).await;
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

/// Holds what a restore reads, where this user may write, so that retention does not remove it meanwhile.
///
/// # Errors
/// [`Error::Conflict`] when it is being removed already.
pub(super) async fn hold_for_restore(repository: &LineageRepository, plan: &RestorePlan) -> Result<()> {
    let now = Utc::now();
    let through_lsn = (plan.stop.kind != StopKind::EndOfWal).then_some(plan.stop.through_lsn);
    let wal = HeldWal { timeline: plan.timeline, through_lsn };
    let hold = new_hold(
        &plan.backup.id,
        format!(
            "a restore to {}",
            plan.target_options.chars().filter(|c| !c.is_control()).take(200).collect::<String>()
        ),
        Some(now + RESTORE_HOLDS),
        Some(wal),
        now,
    );
    for one in repository.each() {
        // Who may only read restores as well.
        if let Err(error) = one.put_hold(&hold).await {
            tracing::debug!(%error, "what is restored is not held");
            continue;
        }
        one.check_not_expiring(&plan.backup.id).await?;
    }
    Ok(())
}

fn new_hold(
    backup: &str,
    reason: String,
    until: Option<DateTime<Utc>>,
    wal: Option<HeldWal>,
    now: DateTime<Utc>,
) -> Hold {
    let RecordedBy { host, user } = RecordedBy::now();
    let id = new_gap_id(now, rand::random());
    Hold { format: 1, id, backup: backup.to_owned(), reason, until, wal, created: now, host, user }
}
