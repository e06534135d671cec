//! Which backups stay.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{BackupRecord, Catalog};
use walship::pg::TimelineId;
use walship::repository::REMAINS_LOOKED_AT_MAX;
use walship::{Error, Result};

use super::clock::is_to_come;
use super::wal::{Stage, Way};
use super::{Begun, GIVEN_UP_AFTER, KeptBackup, Policy, RemovedBackup, Seen};
use crate::plan::{build_chain, is_on_path};

/// The choice.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// Why backups stay, by their ids; of complete ones and of those that were only begun.
    reasons: BTreeMap<String, Vec<String>>,
    /// The backup that each way begins with.
    pub(super) bases: BTreeMap<TimelineId, String>,
    /// Ways of which all WAL stays: no backup is as old as the window.
    pub(super) whole: BTreeSet<TimelineId>,
}

/// How far the clocks of machines that take backups may differ.
const CLOCKS_DIFFER: TimeDelta = TimeDelta::days(1);

/// Returns why a backup cannot be restored, as far as can be told: its WAL, or what it is made of, is not stored.
fn flaw_of(catalog: &Catalog, seen: &Seen, backup: &BackupRecord) -> Option<String> {
    let chain = std::iter::successors(Some(&backup.id), |id| seen.parents.get(*id));
    for id in chain.take(seen.parents.len() + 1) {
        match seen.flaws.get(id) {
            Some(flaw) if *id == backup.id => return Some(flaw.clone()),
            Some(flaw) => return Some(format!("of backup {id}, which it builds on: {flaw}")),
            None => {}
        }
    }
    let Some(history) = catalog.history(backup.stop_timeline) else {
        return Some(format!("the history of timeline {} is not stored", backup.stop_timeline));
    };
    let end = build_chain(catalog, &history, backup.start_lsn).end();
    (!is_on_path(&history, backup) || end < backup.stop_lsn)
        .then(|| format!("WAL that it needs is missing from {end} on"))
}

/// Refuses to remove anything while the newest backup cannot be restored: more may be missing than that, and it is no time to
/// remove older ones.
///
/// # Errors
/// [`Error::Corrupt`] with what is missing.
pub fn check_newest(catalog: &Catalog, seen: &Seen, now: DateTime<Utc>) -> Result<()> {
    let seen = with_parents(catalog, seen);
    let complete = catalog.backups.iter().map(|backup| (backup.finished, backup.wal(), &*backup.id));
    let orphaned = catalog.orphaned_backups.iter().map(|backup| (backup.finished, backup.wal, &*backup.id));
    let all = || complete.clone().chain(orphaned.clone());
    // A clock may have been wrong, and a timeline that was left reaches far.
    let by_wal = all().max_by_key(|(_, wal, id)| (wal.stop_timeline, wal.stop_lsn, *id));
    let by_clock = all().filter(|(finished, ..)| !is_to_come(*finished, now));
    let by_clock = by_clock.max_by_key(|(finished, _, id)| (*finished, *id));
    let times = |finished: DateTime<Utc>, id: &str| {
        let completed = seen.completed(id, finished, now);
        (if is_to_come(finished, now) { completed } else { finished }, completed)
    };
    // A sound one that is newer by both clocks: the other lies on a timeline of its own.
    let is_outdated = |id: &str| {
        let Some((finished, ..)) = all().find(|(.., known)| *known == id) else { return false };
        let (own, store) = times(finished, id);
        catalog.backups.iter().any(|backup| {
            let (newer, stored) = times(backup.finished, &backup.id);
            newer > own
                && stored > store
                && !is_to_come(newer, now)
                && flaw_of(catalog, &seen, backup).is_none()
        })
    };
    for (.., id) in by_wal.into_iter().chain(by_clock) {
        let backup = catalog.backups.iter().find(|backup| backup.id == id);
        let missing = || {
            let orphan = catalog.orphaned_backups.iter().find(|orphan| orphan.id == id)?;
            Some(format!("it builds on {}, which is not there", orphan.missing))
        };
        let Some(flaw) = backup.map_or_else(missing, |backup| flaw_of(catalog, &seen, backup)) else {
            continue;
        };
        if is_outdated(id) {
            continue;
        }
        return Err(Error::corrupt(format!("the newest backup, {id}, cannot be restored: {flaw}"))
            .with_safe("nothing was removed: older backups may be needed")
            .with_next(
                "Look whether the whole repository is there (mounts, what other programs have removed). If what is missing \
                 does not come back, take a new backup: `walship backup`.",
            ));
    }
    Ok(())
}

/// Returns what is seen with the parents of complete backups too.
pub(super) fn with_parents(catalog: &Catalog, seen: &Seen) -> Seen {
    let mut seen = seen.clone();
    let parents = catalog.backups.iter().filter_map(|backup| Some((&backup.id, &backup.parent.as_ref()?.id)));
    seen.parents.extend(parents.map(|(id, parent)| (id.clone(), parent.clone())));
    seen
}

/// Returns whether a backup without a record may still be under way.
fn is_young(begun: &Begun, now: DateTime<Utc>) -> bool {
    match begun.last_written {
        Some(written) => now.signed_duration_since(written) < GIVEN_UP_AFTER,
        None => begun.start.is_some(),
    }
}

/// Returns whether a backup without a record may be, or become, one with a record.
pub(super) fn may_be_complete(seen: &Seen, begun: &Begun, now: DateTime<Utc>) -> bool {
    let is_lost = begun.was_finishing && !seen.given_up.contains(&begun.id);
    begun.complete || ((is_young(begun, now) || is_lost) && !seen.expiring.contains(&begun.id))
}

pub(super) fn choose(
    catalog: &Catalog,
    seen: &Seen,
    policy: &Policy,
    ways: &[Way],
    now: DateTime<Utc>,
    margin: TimeDelta,
    notes: &mut Vec<String>,
) -> Chosen {
    let flaws: BTreeMap<&str, String> = (catalog.backups.iter())
        .filter_map(|backup| Some((&*backup.id, flaw_of(catalog, seen, backup)?)))
        .collect();
    let all: Vec<&BackupRecord> = catalog.backups.iter().collect();
    let usable: Vec<&BackupRecord> =
        all.iter().copied().filter(|backup| !flaws.contains_key(&*backup.id)).collect();
    let mut chosen = by_policy(seen, policy, ways, &usable, now, margin, notes);
    if !flaws.is_empty() {
        // What cannot be restored takes no other's place, and goes no earlier than it would if it could be.
        let as_if = by_policy(seen, policy, ways, &all, now, margin, &mut Vec::new());
        for (id, flaw) in &flaws {
            notes.push(format!("backup {id} cannot be restored, and does not count: {flaw}"));
            for reason in as_if.reasons.get(*id).into_iter().flatten() {
                chosen.keep(id, &format!("if it could be restored: {reason}"));
            }
        }
    }
    for backup in catalog.backups.iter().filter(|backup| catalog.history(backup.stop_timeline).is_none()) {
        chosen.keep(&backup.id, "the history of its timeline is not stored: nothing can be told of it");
    }
    for hold in seen.holds.iter().filter(|hold| hold.holds_at(now)) {
        // What a restore reads may come from another repository.
        if hold.wal.is_none() && !catalog.backups.iter().any(|backup| backup.id == hold.backup) {
            notes.push(format!("hold {} is on backup {}, which is not there", hold.id, hold.backup));
        }
        let until = hold
            .until
            .map_or_else(String::new, |until| format!(" until {}", until.format("%Y-%m-%d %H:%MZ")));
        for id in hold.with.iter().chain([&hold.backup]) {
            chosen.keep(id, &format!("held{until} by {}: {}", hold.user, hold.reason));
        }
    }
    keep_recordless(&mut chosen, catalog, seen, now, notes);
    chosen.keep_foundations(catalog, seen);
    if policy.window().is_none() {
        chosen.begin_with_oldest(catalog, ways);
        notes.push("the policy has no window: WAL stays from the oldest backup on that stays".to_owned());
    }
    chosen
}

/// Keeps what the policy wants, when these are all the backups that there are.
fn by_policy(
    seen: &Seen,
    policy: &Policy,
    ways: &[Way],
    backups: &[&BackupRecord],
    now: DateTime<Utc>,
    margin: TimeDelta,
    notes: &mut Vec<String>,
) -> Chosen {
    let mut chosen = Chosen::default();
    full_backups(&mut chosen, seen, policy, backups, now);
    windows(&mut chosen, seen, policy, ways, backups, now, margin, notes);
    chosen
}

/// Returns the backups without a record of which it is not known that they are being removed, or were given up.
fn recordless(seen: &Seen) -> impl Iterator<Item = &Begun> {
    let known = |begun: &&Begun| !seen.expiring.contains(&begun.id) && !seen.given_up.contains(&begun.id);
    seen.recordless.iter().filter(known)
}

/// Keeps backups under way, those that have lost their record, and all that they may have taken over: whatever was not complete
/// when they began.
fn keep_recordless(
    chosen: &mut Chosen,
    catalog: &Catalog,
    seen: &Seen,
    now: DateTime<Utc>,
    notes: &mut Vec<String>,
) {
    for id in &seen.given_up {
        if !seen.recordless.iter().any(|begun| begun.id == *id) {
            notes.push(format!("there is no backup {id} without a record that could be given up"));
        }
    }
    if catalog.backups.is_empty() && catalog.orphaned_backups.is_empty() && !seen.recordless.is_empty() {
        notes.push("no record of any backup is there: no backup is taken for given up".to_owned());
        for begun in recordless(seen) {
            chosen.keep(&begun.id, "no record of any backup is there: it may have had one");
        }
    }
    let staying = seen.recordless.iter().filter(|begun| may_be_complete(seen, begun, now));
    let staying: Vec<&Begun> = staying.collect();
    for begun in &staying {
        let why = match (begun.complete, is_young(begun, now)) {
            (true, _) => "it has become complete a moment ago",
            (_, true) => "begun and not complete: it may be under way",
            _ => {
                notes.push(format!(
                    "all of backup {id} is there but its record: it stays, and all WAL from its start on. Bring back what is missing \
                     below backups/catalog/; or, if it never had a record, say so: `pitr expire --confirm --give-up {id}`",
                    id = begun.id
                ));
                "all of it is there but its record"
            }
        };
        chosen.keep(&begun.id, why);
    }
    // Of one that is complete it is known what it took over.
    for taker in staying.into_iter().filter(|begun| !begun.complete) {
        let Some(start) = taker.start else {
            // One that does not say any more that it has begun becomes no complete one; what one built on that was is not known.
            let all = catalog.backups.iter().map(|backup| &backup.id);
            let all = all.chain(recordless(seen).map(|begun| &begun.id)).filter(|_| taker.was_finishing);
            all.for_each(|id| chosen.keep(id, &format!("backup {} may build on it", taker.id)));
            continue;
        };
        // Of one that began long ago it is known by now what it began before.
        let until = start.started.checked_add_signed(CLOCKS_DIFFER).filter(|_| !is_young(taker, now));
        for id in lenders(seen, &taker.id, start.started, until) {
            chosen.keep(id, "not complete, but another that is not may have taken over what it has stored");
        }
        let was_open = |backup: &BackupRecord| {
            let completed =
                seen.completed(&backup.id, backup.finished, now).checked_add_signed(CLOCKS_DIFFER);
            completed.is_none_or(|completed| start.started <= completed)
                && until.is_none_or(|until| backup.started <= until)
        };
        for backup in catalog.backups.iter().filter(|backup| was_open(backup)) {
            chosen.keep(
                &backup.id,
                "it may not have been complete when one began that is not, which may have taken over what it has stored",
            );
        }
    }
}

/// Returns the backups that did not complete at which one under way may have looked when it began: the newest before it that
/// build on the same one; and those that began after it, which may be so by another machine's clock only.
fn lenders<'a>(
    seen: &'a Seen,
    taker: &str,
    begin: DateTime<Utc>,
    until: Option<DateTime<Utc>>,
) -> Vec<&'a str> {
    let lends = |begun: &&Begun| {
        begun.id != taker
            && !begun.complete
            && !seen.expiring.contains(&begun.id)
            && seen.parents.get(&begun.id) == seen.parents.get(taker)
    };
    let lenders = seen.recordless.iter().filter(lends);
    let mut lenders: Vec<(DateTime<Utc>, &str)> =
        lenders.filter_map(|begun| Some((begun.start?.started, &*begun.id))).collect();
    lenders.sort_unstable();
    lenders.retain(|(started, _)| until.is_none_or(|until| *started <= until));
    let before = lenders.partition_point(|(started, id)| (*started, *id) < (begin, taker));
    let oldest = before.saturating_sub(REMAINS_LOOKED_AT_MAX);
    lenders[oldest..].iter().map(|(_, id)| *id).collect()
}

/// Keeps full backups by number, age and rotation.
fn full_backups(
    chosen: &mut Chosen,
    seen: &Seen,
    policy: &Policy,
    usable: &[&BackupRecord],
    now: DateTime<Utc>,
) {
    let full: Vec<&BackupRecord> =
        usable.iter().copied().filter(|backup| !seen.parents.contains_key(&backup.id)).collect();
    let completed = |backup: &BackupRecord| seen.completed(&backup.id, backup.finished, now);
    let said = |backup: &BackupRecord| match is_to_come(backup.finished, now) {
        true => completed(backup),
        false => backup.finished,
    };
    let mut with_children = BTreeSet::new();
    let stored = |backup: &BackupRecord| seen.written.get(&backup.id).copied().unwrap_or(backup.finished);
    // By each clock: of a copied repository the store knows only when it was copied, and a machine's own may have been wrong.
    for time in [&said as &dyn Fn(&BackupRecord) -> DateTime<Utc>, &completed, &stored] {
        let mut ordered = full.clone();
        ordered.sort_by(|a, b| (time(b), b.finished, &b.id).cmp(&(time(a), a.finished, &a.id)));
        for (at, backup) in ordered.iter().take(policy.keep_last()).enumerate() {
            let which = match at {
                0 => "the last full backup".to_owned(),
                _ => format!("full backup {} of the last {}", at + 1, policy.keep_last()),
            };
            chosen.keep(&backup.id, &which);
            with_children.insert(&*backup.id);
        }
        for (rotation, spans) in policy.rotations() {
            let mut spans_seen = BTreeSet::new();
            for backup in &ordered {
                if spans_seen.len() < spans && spans_seen.insert(rotation.span_of(time(backup))) {
                    chosen.keep(&backup.id, &format!("the newest full backup of its {}", rotation.noun()));
                }
            }
        }
    }
    if let Some(keep_for) = policy.keep_for() {
        let young =
            |backup: &&&BackupRecord| now.signed_duration_since(completed(backup)) <= keep_for.length();
        for backup in full.iter().filter(young) {
            chosen.keep(&backup.id, &format!("a full backup not older than {keep_for}"));
            with_children.insert(&*backup.id);
        }
    }
    // Counted by number or age, a full backup counts with what builds on it.
    for backup in usable {
        let roots = std::iter::successors(seen.parents.get(&backup.id), |id| seen.parents.get(*id));
        if let Some(root) = roots.take(seen.parents.len()).find(|id| with_children.contains(&***id)) {
            chosen.keep(&backup.id, &format!("builds on full backup {root}, which stays by number or age"));
        }
    }
}

/// Keeps, for each way on which anything happens, what its window begins with and all backups in it; and the newest of each
/// whose end stays.
#[allow(
    clippy::too_many_arguments,
    reason = "each is one thing that the choice depends on, and they meet only here"
)]
fn windows(
    chosen: &mut Chosen,
    seen: &Seen,
    policy: &Policy,
    ways: &[Way],
    usable: &[&BackupRecord],
    now: DateTime<Utc>,
    margin: TimeDelta,
    notes: &mut Vec<String>,
) {
    for way in ways.iter().filter(|way| way.end_stays()) {
        let mut on_way: Vec<&BackupRecord> =
            usable.iter().copied().filter(|backup| is_on_path(&way.history, backup)).collect();
        on_way.sort_by(|a, b| (b.stop_lsn, b.start_lsn, &b.id).cmp(&(a.stop_lsn, a.start_lsn, &a.id)));
        let timeline = way.history.timeline;
        let Some(newest) = on_way.first() else {
            chosen.whole.insert(timeline);
            continue;
        };
        chosen.keep(&newest.id, &format!("the newest backup on the way to timeline {timeline}"));
        if way.stage == Stage::Over {
            chosen.bases.insert(timeline, newest.id.clone());
            continue;
        }
        let Some(from) = policy.window_from(now) else { continue };
        let base = on_way.iter().position(|backup| {
            let completed = seen.completed(&backup.id, backup.finished, now);
            completed.checked_add_signed(margin).is_some_and(|at| at <= from)
        });
        match base {
            Some(base) => {
                for backup in &on_way[..base] {
                    chosen.keep(&backup.id, "in the window");
                }
                chosen.keep(
                    &on_way[base].id,
                    &format!("the window begins with it on the way to timeline {timeline}"),
                );
                chosen.bases.insert(timeline, on_way[base].id.clone());
            }
            None => {
                for backup in &on_way {
                    chosen.keep(&backup.id, "in the window");
                }
                chosen.whole.insert(timeline);
                notes.push(format!(
                    "on the way to timeline {timeline} no backup is as old as the window: it is longer than the archive, \
                     and all its WAL stays"
                ));
            }
        }
    }
}

impl Chosen {
    fn keep(&mut self, id: &str, reason: &str) {
        let reasons = self.reasons.entry(id.to_owned()).or_default();
        if !reasons.iter().any(|known| known == reason) {
            reasons.push(reason.to_owned());
        }
    }

    /// Returns whether a backup stays.
    pub(super) fn keeps(&self, id: &str) -> bool {
        self.reasons.contains_key(id)
    }

    /// Keeps what stays builds on, and what it has taken over from backups that were not complete then; and so on from there.
    /// Backups that lack what they build on stay too: it may be in another repository.
    fn keep_foundations(&mut self, catalog: &Catalog, seen: &Seen) {
        let mut open: Vec<String> = self.reasons.keys().cloned().collect();
        open.extend(catalog.orphaned_backups.iter().map(|backup| backup.id.clone()));
        let mut done = BTreeSet::new();
        while let Some(id) = open.pop() {
            if !done.insert(id.clone()) {
                continue;
            }
            if let Some(parent) = seen.parents.get(&id) {
                self.keep(parent, &format!("backup {id} builds on it"));
                open.push(parent.clone());
            }
            for lender in seen.lenders.get(&id).into_iter().flatten() {
                self.keep(lender, &format!("backup {id} has taken over what it has stored"));
                open.push(lender.clone());
            }
        }
    }

    /// Lets each way begin with the oldest backup that stays, whatever keeps it.
    fn begin_with_oldest(&mut self, catalog: &Catalog, ways: &[Way]) {
        for way in ways.iter().filter(|way| way.end_stays()) {
            let on_way = catalog.backups.iter().filter(|backup| is_on_path(&way.history, backup));
            let kept = on_way.filter(|backup| self.keeps(&backup.id));
            if let Some(oldest) = kept.min_by_key(|backup| (backup.start_lsn, backup.stop_lsn)) {
                self.bases.insert(way.history.timeline, oldest.id.clone());
            }
        }
    }

    pub(super) fn kept(&self, catalog: &Catalog, seen: &Seen) -> Vec<KeptBackup> {
        let reasons = |id: &str| self.reasons.get(id).cloned().unwrap_or_default();
        let complete = catalog.backups.iter().filter(|backup| self.keeps(&backup.id));
        let mut kept: Vec<KeptBackup> = complete
            .map(|backup| KeptBackup {
                id: backup.id.clone(),
                parent: seen.parents.get(&backup.id).cloned(),
                timeline: Some(backup.stop_timeline),
                finished: Some(backup.finished),
                stored_bytes: backup.stored_bytes,
                reasons: reasons(&backup.id),
            })
            .collect();
        kept.sort_by(|a, b| (b.finished, &b.id).cmp(&(a.finished, &a.id)));
        let begun = seen.recordless.iter().filter(|begun| self.keeps(&begun.id));
        let begun = begun.map(|begun| KeptBackup {
            id: begun.id.clone(),
            parent: seen.parents.get(&begun.id).cloned(),
            timeline: None,
            finished: None,
            stored_bytes: 0,
            reasons: reasons(&begun.id),
        });
        begun.chain(kept).collect()
    }

    pub(super) fn removed(&self, catalog: &Catalog, seen: &Seen, now: DateTime<Utc>) -> Vec<RemovedBackup> {
        let complete = catalog.backups.iter().filter(|backup| !self.keeps(&backup.id));
        let mut removed: Vec<RemovedBackup> = complete
            .map(|backup| RemovedBackup {
                id: backup.id.clone(),
                finished: Some(backup.finished),
                stored_bytes: backup.stored_bytes,
                objects: 0,
                reason: format!(
                    "finished {} ago, and no rule of the policy keeps it",
                    days(now.signed_duration_since(seen.completed(&backup.id, backup.finished, now)))
                ),
            })
            .collect();
        removed.sort_by(|a, b| (a.finished, &a.id).cmp(&(b.finished, &b.id)));
        let begun = seen.recordless.iter().filter(|begun| !self.keeps(&begun.id));
        removed.extend(begun.map(|begun| {
            let reason = match begun.last_written {
                Some(written) if !seen.expiring.contains(&begun.id) => format!(
                    "not complete, and nothing was stored for it since {}: it was given up",
                    days(now.signed_duration_since(written))
                ),
                _ => "an earlier removal did not come to its end".to_owned(),
            };
            RemovedBackup { id: begun.id.clone(), finished: None, stored_bytes: 0, objects: 0, reason }
        }));
        removed
    }
}

/// Returns a length of time in words.
fn days(age: TimeDelta) -> String {
    match (age.num_days(), age.num_hours()) {
        (days @ 2.., _) => format!("{days} days"),
        (_, hours) => format!("{} h", hours.max(0)),
    }
}
