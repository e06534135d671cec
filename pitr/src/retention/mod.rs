//! What of an archive stays, and why: a function of the catalog, the policy and the time.
//!
//! Starts from what a restore needs, not from ages of files: a kept backup needs its parents and the WAL that makes
//! it consistent, a moment of the window needs the newest backup before it and all WAL from there on, and so for every
//! timeline on which anything happened since. Whatever cannot be told keeps what might depend on it. It removes
//! nothing and reads nothing: `execute::expire` does.

mod backups;
mod clock;
mod policy;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
mod wal;

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use walship::catalog::{Catalog, GapRecord, Hold};
use walship::pg::{Lsn, SegmentName, TimelineId};

pub use backups::check_newest;
pub use clock::check_clock;
use clock::is_to_come;
pub use policy::Policy;

/// A backup without a record for which nothing was stored for so long, by the store's clock, was given up.
pub const GIVEN_UP_AFTER: TimeDelta = TimeDelta::days(7);

/// How far before the window's start the backup that it begins with was finished: the clocks of the server and of the
/// machine that took it may differ.
pub const CLOCK_MARGIN: TimeDelta = TimeDelta::hours(1);

/// What the catalog does not tell.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Holds that were not released.
    pub holds: Vec<Hold>,
    /// Backups without a record.
    pub recordless: Vec<Begun>,
    /// Backups that an earlier removal had begun with.
    pub expiring: BTreeSet<String>,
    /// The backup that a backup without a record builds on, by their ids; those of complete ones are in the catalog.
    pub parents: BTreeMap<String, String>,
    /// The backups in whose folders objects of a complete one lie, by its id.
    pub lenders: BTreeMap<String, BTreeSet<String>>,
    /// When the newest of a complete backup's own objects was written, by the store's clock, by its id.
    pub written: BTreeMap<String, DateTime<Utc>>,
    /// What is not stored of a complete backup, in words, by its id.
    pub flaws: BTreeMap<String, String>,
    /// When something happened last on a timeline, by its WAL; a timeline that is not here may be in use.
    pub last_times: BTreeMap<TimelineId, DateTime<Utc>>,
    /// When something happened last on a timeline before the last one of those that left it.
    pub left_times: BTreeMap<TimelineId, DateTime<Utc>>,
    /// Backups without a record that the operator says were given up.
    pub given_up: BTreeSet<String>,
    /// Stretches of WAL (numbers of segments, the end excluded) that were expired before and of which something is
    /// still stored.
    pub leftovers: Vec<(TimelineId, u64, u64)>,
    /// The whole segments that are still stored (numbers, ends excluded) of what an old record of the ledger says was expired, by
    /// the record's id.
    pub still_whole: BTreeMap<String, Vec<(u64, u64)>>,
}

impl Seen {
    /// Returns when a backup was complete. The machine that took it may have had a clock that was behind; by the store's it was
    /// not complete before its last object was written. A time that is still to come says nothing.
    pub(super) fn completed(&self, id: &str, finished: DateTime<Utc>, now: DateTime<Utc>) -> DateTime<Utc> {
        match self.written.get(id) {
            Some(written) if is_to_come(finished, now) => *written,
            Some(written) => finished.max(*written),
            None => finished,
        }
    }
}

/// A backup without a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begun {
    /// Its id.
    pub id: String,
    /// What it said at its start; `None` where that is gone already.
    pub start: Option<BegunAt>,
    /// When the newest of its objects was written, by the store's clock; `None` where the store does not say.
    pub last_written: Option<DateTime<Utc>>,
    /// Whether it has become complete since the catalog was read.
    pub complete: bool,
    /// Whether all of it is stored but the record: it may have had one.
    pub was_finishing: bool,
}

/// Where and when a backup was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BegunAt {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where replay will start.
    pub start_lsn: Lsn,
    /// When, by the clock of the machine that takes it.
    pub started: DateTime<Utc>,
}

/// What stays and what goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RetentionPlan {
    /// The policy in words.
    pub policy: String,
    /// When this holds.
    pub now: DateTime<Utc>,
    /// From when on every moment stays in reach; `None` where the policy has no window.
    pub window_from: Option<DateTime<Utc>>,
    /// The backups that stay, the newest first.
    pub backups_kept: Vec<KeptBackup>,
    /// The backups that go, the oldest first.
    pub backups_removed: Vec<RemovedBackup>,
    /// The WAL that stays, timeline by timeline.
    pub wal_kept: Vec<KeptWal>,
    /// The WAL that goes, timeline by timeline, the oldest first.
    pub wal_removed: Vec<RemovedWal>,
    /// What else is to be known.
    pub notes: Vec<String>,
    /// The timelines whose end stays in reach.
    #[serde(skip)]
    pub ends: Vec<TimelineId>,
    /// What was expired, and is needed and still there.
    #[serde(skip)]
    pub counts_again: Vec<CountsAgain>,
}

impl RetentionPlan {
    /// Returns whether nothing goes.
    pub fn is_empty(&self) -> bool {
        self.backups_removed.is_empty() && self.wal_removed.is_empty()
    }
}

/// WAL that the ledger says was expired, that is needed, and of which nothing is gone: it is to count again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountsAgain {
    /// The record that is to go.
    pub record: GapRecord,
    /// The stretches of it (numbers of segments, the end excluded) that stay expired.
    pub rest: Vec<(u64, u64)>,
}

/// A backup that stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeptBackup {
    /// Its id.
    pub id: String,
    /// The backup that it builds on; `None` for a full one.
    pub parent: Option<String>,
    /// The timeline that it ended on; `None` for one that was only begun.
    pub timeline: Option<TimelineId>,
    /// When it was complete; `None` for one that was only begun.
    pub finished: Option<DateTime<Utc>>,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// Why it stays.
    pub reasons: Vec<String>,
}

/// A backup that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RemovedBackup {
    /// Its id.
    pub id: String,
    /// When it was complete; `None` for one that never was, or is half removed.
    pub finished: Option<DateTime<Utc>>,
    /// Bytes as stored, as its record says; the store is asked before anything is removed.
    pub stored_bytes: u64,
    /// How many objects it has; 0 until the store was asked.
    pub objects: u64,
    /// Why it goes.
    pub reason: String,
}

/// WAL that stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeptWal {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first stored segment.
    pub first: SegmentName,
    /// The last stored segment (inclusive).
    pub last: SegmentName,
    /// How many are stored.
    pub segments: u64,
    /// Why it stays.
    pub reasons: Vec<String>,
}

/// WAL that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RemovedWal {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The position of its first byte.
    pub start_lsn: Lsn,
    /// The position after its last byte.
    pub end_lsn: Lsn,
    /// The first segment that goes.
    pub first: SegmentName,
    /// The last segment that goes (inclusive).
    pub last: SegmentName,
    /// How many whole segments are stored.
    pub segments: u64,
    /// How many objects that is; 0 until the store was asked.
    pub objects: u64,
    /// Their stored size in bytes; 0 until the store was asked.
    pub stored_bytes: u64,
    /// Why it goes.
    pub reason: String,
    /// The numbers of the segments, the end excluded.
    #[serde(skip)]
    pub numbers: (u64, u64),
    /// The records of the ledger that say the same of a part of it.
    #[serde(skip)]
    pub supersedes: Vec<GapRecord>,
}

/// Returns what stays and what goes; the clock was checked before.
///
/// `margin` is how long before the window's start the backup was finished that it begins with.
pub fn retain(
    catalog: &Catalog,
    seen: &Seen,
    policy: &Policy,
    now: DateTime<Utc>,
    margin: TimeDelta,
) -> RetentionPlan {
    let window_from = policy.window_from(now);
    let mut notes = Vec::new();
    let seen = &backups::with_parents(catalog, seen);
    for orphan in &catalog.orphaned_backups {
        notes.push(format!(
            "backup {} cannot be restored, because it builds on {}, which is not there: it stays, and does not count",
            orphan.id, orphan.missing
        ));
    }
    let ways = wal::ways(catalog, seen, window_from, &mut notes);
    let chosen = backups::choose(catalog, seen, policy, &ways, now, margin, &mut notes);
    let needed = wal::needed(catalog, seen, policy, &ways, &chosen, now, &mut notes);
    let (wal_kept, wal_removed) = wal::split(catalog, seen, &needed, policy, window_from);
    let counts_again = wal::counts_again(catalog, seen, &needed);
    for CountsAgain { record, .. } in &counts_again {
        notes.push(format!(
            "WAL of timeline {} from {} to {} was to be removed, is needed, and is still there: what is needed of it counts again",
            record.timeline, record.start_lsn, record.end_lsn
        ));
    }
    RetentionPlan {
        policy: policy.to_string(),
        now,
        window_from,
        backups_kept: chosen.kept(catalog, seen),
        backups_removed: chosen.removed(catalog, seen, now),
        wal_kept,
        wal_removed,
        notes,
        ends: ways.iter().filter(|way| way.end_stays()).map(|way| way.history.timeline).collect(),
        counts_again,
    }
}

/// Returns what the catalog will be when the plan was carried out, and `expired` is in the ledger in the place of what
/// it supersedes.
pub fn after(catalog: &Catalog, plan: &RetentionPlan, expired: &[GapRecord]) -> Catalog {
    let mut after = catalog.clone();
    let removed: BTreeSet<&str> = plan.backups_removed.iter().map(|backup| &*backup.id).collect();
    after.backups.retain(|backup| !removed.contains(&*backup.id));
    after.unfinished_backups.retain(|(id, _)| !removed.contains(&**id));
    let size = catalog.lineage.segment_size;
    for wal in &plan.wal_removed {
        let (from, until) = wal.numbers;
        let stays =
            |name: &SegmentName| name.timeline != wal.timeline || !(from..until).contains(&name.number(size));
        after.segments.remove_range(wal.timeline, from, until);
        after.in_parts.retain(|name, _| stays(name));
        after.stranded.retain(|name, _| stays(name));
        after.partials.retain(stays);
        after.incomplete.retain(stays);
        if let Some(tails) = &mut after.tails {
            tails.retain(|_, tail| stays(&tail.segment));
        }
        after.gaps.retain(|gap| !wal.supersedes.iter().any(|old| old.id == gap.id));
    }
    after.gaps.extend(expired.iter().cloned());
    after.gaps.sort_by(|a, b| (a.timeline, a.start_lsn, &a.id).cmp(&(b.timeline, b.start_lsn, &b.id)));
    after
}
