//! Removals that replay carries out although the stop leaves out the commit of their transaction.
//!
//! DROP DATABASE marks the row of the database invalid in place, then removes its files, then commits; DROP
//! TABLESPACE removes the folder, then commits. Between these a database is of no use, and after the files are
//! gone it is lost. Physical truncation is none of them: it takes away empty pages, or storage that the same
//! transaction has made. Source: `src/backend/commands/dbcommands.c`, dropdb; `tablespace.c`, DropTableSpace;
//! `tablecmds.c`, ExecuteTruncateGuts.

use std::collections::BTreeMap;

use serde::Serialize;
use walship::pg::{Lsn, Oid, Xid};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::Class;

use super::reach::{Stop, end_before};
use super::walk::{Seek, Walk};
use super::{Halt, Question};
use crate::target::{RecoveryTarget, StopSide, TargetKind};

/// How many segments before the stop are searched.
const SEGMENTS: usize = 16;

/// In how many of them whole segments are read where their summaries had no room.
const READ_SEGMENTS: usize = 4;

/// A removal that the stop cuts in two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HalfDone {
    /// What is removed.
    pub what: Removed,
    /// Its oid.
    pub oid: Oid,
    /// Whether its files are gone at the stop; else the database is marked invalid only.
    pub files_gone: bool,
    /// The transaction, where it is known.
    pub xid: Option<Xid>,
    /// The record before which everything is as it was.
    pub lsn: Lsn,
    /// The options that stop just before that record; `None` when the backup is consistent only behind it.
    pub safe_options: Option<String>,
}

/// What a removal removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// A database.
    Database,
    /// A tablespace.
    Tablespace,
}

impl HalfDone {
    /// Returns what to know, for people.
    pub(super) fn warning(&self) -> String {
        let what = match self.what {
            Removed::Database => format!("database {}", self.oid),
            Removed::Tablespace => format!("tablespace {}", self.oid),
        };
        let by = self.xid.map_or_else(String::new, |xid| format!(" (transaction {xid})"));
        let state = match self.files_gone {
            true => "its files will be gone although the removal is not committed",
            false => {
                "it will be marked invalid, and nobody can connect to it, although the removal is not committed"
            }
        };
        let safe = match &self.safe_options {
            Some(options) => format!("{options} stops before it"),
            None => "only an older backup could lead to before it".to_owned(),
        };
        format!("the stop lies inside the removal of {what}{by}: {state}; {safe}")
    }
}

/// Returns the removals that are replayed in part, in the order in which they began.
pub(crate) fn half_done(
    question: &Question<'_>,
    walk: &Walk<'_>,
    last: usize,
    stop: &Stop,
    consistent: Lsn,
) -> Result<Vec<HalfDone>, Halt> {
    let mut open: BTreeMap<(Removed, Oid), HalfDone> = BTreeMap::new();
    for event in removals(walk, last)?.into_iter().filter(|event| event.lsn < stop.cut_lsn) {
        let (what, oid, files_gone) = match &event.kind {
            EventKind::DatabaseInvalid { oid, .. } => (Removed::Database, *oid, false),
            EventKind::DatabaseDrop { oid, .. } => (Removed::Database, *oid, true),
            EventKind::TablespaceDrop { oid } => (Removed::Tablespace, *oid, true),
            EventKind::Commit { dropped_objects: Some(dropped), .. } => {
                dropped.databases.iter().for_each(|oid| drop(open.remove(&(Removed::Database, *oid))));
                continue;
            }
            _ => continue,
        };
        // Files that go outside of a transaction belong to something that is committed.
        let xid = Some(event.xid).filter(|xid| *xid != 0);
        if files_gone && xid.is_none() {
            open.remove(&(what, oid));
            continue;
        }
        let removal = open.entry((what, oid)).or_insert_with(|| HalfDone {
            what,
            oid,
            files_gone,
            xid,
            lsn: event.lsn,
            safe_options: safe(question, walk, event.lsn, consistent),
        });
        removal.files_gone |= files_gone;
        removal.xid = xid.or(removal.xid);
    }
    let mut left = Vec::new();
    for removal in open.into_values() {
        let from = walk.chain.step_of(removal.lsn).unwrap_or(0);
        let committed = match removal.xid {
            Some(xid) => committed(walk, from..=last, xid, removal.lsn, stop.cut_lsn)?,
            None => false,
        };
        if !committed {
            left.push(removal);
        }
    }
    left.sort_by_key(|removal| removal.lsn);
    Ok(left)
}

/// Returns the records of removals in the last steps before the stop, in WAL order, as far as they are listed.
fn removals(walk: &Walk<'_>, last: usize) -> Result<Vec<WalEvent>, Halt> {
    let mut found = Vec::new();
    for at in (last + 1).saturating_sub(SEGMENTS)..=last {
        match walk.notable(at, at, Class::Destructive) {
            Err(Halt::Events(_)) if at + READ_SEGMENTS <= last => {}
            events => found.extend(events?),
        }
    }
    Ok(found)
}

/// Returns the options that stop before the record at `lsn`.
fn safe(question: &Question<'_>, walk: &Walk<'_>, lsn: Lsn, consistent: Lsn) -> Option<String> {
    let target = RecoveryTarget {
        kind: TargetKind::Lsn(lsn),
        stop: StopSide::Exclusive,
        timeline: question.target.timeline,
    };
    (end_before(lsn, walk.size) >= consistent).then(|| target.options())
}

/// Returns whether a transaction was committed in these steps from `from` on and before `cut`.
fn committed(
    walk: &Walk<'_>,
    steps: std::ops::RangeInclusive<usize>,
    xid: Xid,
    from: Lsn,
    cut: Lsn,
) -> Result<bool, Halt> {
    let ends = |event: &WalEvent| {
        matches!(event.kind, EventKind::Commit { .. }) && event.kind.ended_xid(event.xid) == Some(xid)
    };
    let seek = Seek {
        maybe: &|facts, _| {
            facts.counts.commits > 0
                && facts.ended_xids.is_some_and(|(low, high)| (low..=high).contains(&xid))
        },
        matches: &ends,
    };
    let mut at = *steps.start();
    while let Some(found) = walk.next_step(at, *steps.end(), &seek)? {
        if walk.events(found)?.any(|event| event.lsn >= from && event.lsn < cut && ends(event)) {
            return Ok(true);
        }
        at = found + 1;
    }
    Ok(false)
}
