//! Which backups stay.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{BackupRecord, Catalog};
use walship::pg::TimelineId;

use super::wal::Way;
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

/// Returns whether a backup can be restored: its own WAL is stored.
pub(super) fn is_usable(catalog: &Catalog, backup: &BackupRecord) -> bool {
    let history = catalog.history(backup.stop_timeline);
    history.is_some_and(|history| {
        is_on_path(&history, backup)
            && build_chain(catalog, &history, backup.start_lsn).end() >= backup.stop_lsn
    })
}

/// Returns whether a backup that was only begun may still be under way.
pub(super) fn is_running(seen: &Seen, begun: &Begun, now: DateTime<Utc>) -> bool {
    !seen.expiring.contains(&begun.id)
        && begun.start.is_some_and(|start| now.signed_duration_since(start.started) < GIVEN_UP_AFTER)
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
    let mut chosen = Chosen::default();
    let usable: Vec<&BackupRecord> =
        catalog.backups.iter().filter(|backup| is_usable(catalog, backup)).collect();
    for backup in &catalog.backups {
        let known = catalog.history(backup.stop_timeline).is_some();
        if !known {
            chosen.keep(&backup.id, "the history of its timeline is not stored: nothing can be told of it");
        } else if !usable.iter().any(|other| other.id == backup.id) {
            notes.push(format!(
                "backup {} cannot be restored, WAL that it needs is missing: it does not count",
                backup.id
            ));
        }
    }
    full_backups(&mut chosen, seen, policy, &usable, now);
    for hold in seen.holds.iter().filter(|hold| hold.holds_at(now)) {
        if !catalog.backups.iter().any(|backup| backup.id == hold.backup) {
            notes.push(format!("hold {} is on backup {}, which is not there", hold.id, hold.backup));
        }
        let until = hold
            .until
            .map_or_else(String::new, |until| format!(" until {}", until.format("%Y-%m-%d %H:%MZ")));
        chosen.keep(&hold.backup, &format!("held{until} by {}: {}", hold.user, hold.reason));
    }
    windows(&mut chosen, policy, ways, &usable, now, margin, notes);
    for begun in seen.recordless.iter().filter(|begun| is_running(seen, begun, now)) {
        chosen.keep(&begun.id, "begun and not complete: it may be under way");
    }
    chosen.keep_parents(seen);
    keep_lenders(&mut chosen, catalog, seen, now);
    chosen
}

/// Keeps what backups that did not complete have stored where another has taken it over, or may be about to.
fn keep_lenders(chosen: &mut Chosen, catalog: &Catalog, seen: &Seen, now: DateTime<Utc>) {
    let lenders = seen.lenders.as_ref().filter(|_| catalog.orphaned_backups.is_empty());
    let running = seen.recordless.iter().any(|begun| is_running(seen, begun, now));
    for begun in &seen.recordless {
        let Some(lenders) = lenders else {
            chosen.keep(&begun.id, "it is not known which backups have taken over what it has stored");
            continue;
        };
        let takers = lenders.iter().filter(|(taker, lent)| chosen.keeps(taker) && lent.contains(&begun.id));
        let takers: Vec<String> = takers.map(|(taker, _)| taker.clone()).collect();
        for taker in takers {
            chosen.keep(
                &begun.id,
                &format!("not complete, but backup {taker} has taken over what it has stored"),
            );
        }
        if running && begun.start.is_some() && !seen.expiring.contains(&begun.id) {
            chosen.keep(&begun.id, "not complete, but a backup under way may take over what it has stored");
        }
    }
}

/// Keeps full backups by number, age and rotation.
fn full_backups(
    chosen: &mut Chosen,
    seen: &Seen,
    policy: &Policy,
    usable: &[&BackupRecord],
    now: DateTime<Utc>,
) {
    let mut full: Vec<&BackupRecord> =
        usable.iter().copied().filter(|backup| !seen.parents.contains_key(&backup.id)).collect();
    full.sort_by(|a, b| (b.finished, &b.id).cmp(&(a.finished, &a.id)));
    let mut with_children = BTreeSet::new();
    for (at, backup) in full.iter().take(policy.keep_last()).enumerate() {
        let which = if at == 0 {
            "the last full backup".to_owned()
        } else {
            format!("full backup {} of the last {}", at + 1, policy.keep_last())
        };
        chosen.keep(&backup.id, &which);
        with_children.insert(&*backup.id);
    }
    if let Some(keep_for) = policy.keep_for() {
        let young = |backup: &&&BackupRecord| now.signed_duration_since(backup.finished) <= keep_for.length();
        for backup in full.iter().filter(young) {
            chosen.keep(&backup.id, &format!("a full backup not older than {keep_for}"));
            with_children.insert(&*backup.id);
        }
    }
    for (rotation, spans) in policy.rotations() {
        let mut spans_seen = BTreeSet::new();
        for backup in &full {
            let span = rotation.span_of(backup.finished);
            if spans_seen.len() < spans && spans_seen.insert(span) {
                chosen.keep(&backup.id, &format!("the newest full backup of its {}", rotation.noun()));
            }
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

/// Keeps, for each way on which anything happens, what its window begins with and all backups in it; and the newest.
fn windows(
    chosen: &mut Chosen,
    policy: &Policy,
    ways: &[Way],
    usable: &[&BackupRecord],
    now: DateTime<Utc>,
    margin: TimeDelta,
    notes: &mut Vec<String>,
) {
    for way in ways.iter().filter(|way| way.in_use) {
        let mut on_way: Vec<&BackupRecord> =
            usable.iter().copied().filter(|backup| is_on_path(&way.history, backup)).collect();
        on_way.sort_by(|a, b| (b.stop_lsn, b.start_lsn, &b.id).cmp(&(a.stop_lsn, a.start_lsn, &a.id)));
        let timeline = way.history.timeline;
        let Some(newest) = on_way.first() else {
            chosen.whole.insert(timeline);
            continue;
        };
        chosen.keep(&newest.id, &format!("the newest backup on the way to timeline {timeline}"));
        let Some(from) = policy.window_from(now) else { continue };
        let base = on_way
            .iter()
            .position(|backup| backup.finished.checked_add_signed(margin).is_some_and(|at| at <= from));
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
    if policy.window().is_some() {
        return;
    }
    // Without a window WAL stays from the oldest backup on that stays.
    for way in ways.iter().filter(|way| way.in_use) {
        let kept =
            usable.iter().filter(|backup| is_on_path(&way.history, backup) && chosen.keeps(&backup.id));
        if let Some(oldest) = kept.min_by_key(|backup| (backup.start_lsn, backup.stop_lsn)) {
            chosen.bases.insert(way.history.timeline, oldest.id.clone());
        }
    }
    notes.push("the policy has no window: WAL stays from the oldest backup on that stays".to_owned());
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

    /// Keeps whatever a kept backup builds on.
    fn keep_parents(&mut self, seen: &Seen) {
        let kept: Vec<String> = self.reasons.keys().cloned().collect();
        for id in kept {
            let parents = std::iter::successors(seen.parents.get(&id), |id| seen.parents.get(*id));
            for parent in parents.take(seen.parents.len()) {
                self.keep(parent, &format!("backup {id} builds on it"));
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
                    days(now.signed_duration_since(backup.finished))
                ),
            })
            .collect();
        removed.sort_by(|a, b| (a.finished, &a.id).cmp(&(b.finished, &b.id)));
        let begun = seen.recordless.iter().filter(|begun| !self.keeps(&begun.id));
        removed.extend(begun.map(|begun| {
            let reason = match begun.start {
                Some(start) if !seen.expiring.contains(&begun.id) => format!(
                    "begun {} ago and never complete: it was given up",
                    days(now.signed_duration_since(start.started))
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
