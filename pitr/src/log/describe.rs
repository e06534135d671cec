//! One event as it is shown: what happened, in words, and the target just before it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use walship::pg::{Lsn, Oid, TimelineId};
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};

use super::{Entry, Kind, RELATIONS_MAX, Relation};
use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice};

/// How databases that are being dropped got there, as far as the WAL was read.
#[derive(Debug, Clone, Default)]
pub(super) struct Drops(BTreeMap<Oid, Began>);

/// The beginning of a DROP DATABASE.
#[derive(Debug, Clone, Copy)]
struct Began {
    /// The record before which the database is as it was.
    lsn: Lsn,
    /// Whether it was marked invalid before that record already, or may have been.
    invalid: bool,
    /// Whether that record is a mark and no files were removed since.
    pending: bool,
}

impl Drops {
    /// Notes what an event does to databases; to be called in WAL order, before the event is described.
    ///
    /// DROP DATABASE marks the row in place, outside of its transaction, then removes files, then commits.
    /// Releases before 14.9, 15.4 and 16 did not mark it.
    ///
    /// Source: `src/backend/commands/dbcommands.c`, dropdb.
    pub(super) fn note(&mut self, event: &WalEvent) {
        match &event.kind {
            EventKind::DatabaseInvalid { oid, .. } => {
                // An earlier mark that nobody undid, as far as is known: a first DROP was cut short.
                let invalid = self.0.get(oid).is_some_and(|began| began.pending);
                self.0.insert(*oid, Began { lsn: event.lsn, invalid, pending: true });
            }
            EventKind::DatabaseDrop { oid, .. } => match self.0.get_mut(oid) {
                Some(began) if began.pending => began.pending = false,
                _ => {
                    self.0.insert(*oid, Began { lsn: event.lsn, invalid: true, pending: false });
                }
            },
            _ => {}
        }
    }

    /// Returns the beginning of the drop of a database that the event takes part in.
    fn of(&self, event: &WalEvent) -> Option<(Oid, Began)> {
        let oid = match &event.kind {
            EventKind::DatabaseInvalid { oid, .. } | EventKind::DatabaseDrop { oid, .. } => *oid,
            EventKind::Commit { dropped_objects: Some(dropped), .. } => *dropped.databases.first()?,
            _ => return None,
        };
        Some((oid, *self.0.get(&oid)?))
    }
}

/// Returns the time that an event's own record holds.
pub(super) fn time_of(event: &WalEvent) -> Option<DateTime<Utc>> {
    match &event.kind {
        EventKind::RestorePoint { time, .. }
        | EventKind::Checkpoint { time, .. }
        | EventKind::EndOfRecovery { time, .. } => Some(*time),
        kind => kind.stop_time(),
    }
}

/// Returns the kinds by which an event is asked for; none of those that are no part of a log.
pub(super) fn kinds_of(event: &WalEvent) -> &'static [Kind] {
    match &event.kind {
        EventKind::Commit { dropped_relations, .. } if !dropped_relations.is_empty() => {
            &[Kind::Drop, Kind::Truncate, Kind::Commit]
        }
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => {
            &[Kind::Drop, Kind::Commit]
        }
        EventKind::Commit { .. } => &[Kind::Commit],
        EventKind::Abort { .. } => &[Kind::Abort],
        EventKind::RestorePoint { .. } => &[Kind::RestorePoint],
        EventKind::Checkpoint { .. } => &[Kind::Checkpoint],
        EventKind::EndOfRecovery { .. } => &[Kind::Timeline],
        EventKind::TablespaceDrop { .. }
        | EventKind::DatabaseDrop { .. }
        | EventKind::DatabaseInvalid { .. } => &[Kind::Drop],
        EventKind::StorageTruncate { .. } | EventKind::Truncate { .. } => &[Kind::Truncate],
        EventKind::Prepare { .. }
        | EventKind::Switch
        | EventKind::OverwriteContrecord { .. }
        | EventKind::BackupEnd { .. }
        | EventKind::ParameterChange { .. }
        | EventKind::TablespaceCreate { .. } => &[],
    }
}

/// Returns the relations whose storage an event takes away.
pub(super) fn relations_of(event: &WalEvent) -> &[RelFileLocator] {
    match &event.kind {
        EventKind::Commit { dropped_relations, .. } => dropped_relations,
        EventKind::StorageTruncate { relation, .. } => std::slice::from_ref(relation),
        _ => &[],
    }
}

/// Returns what happened, in words.
fn words(event: &WalEvent) -> String {
    match &event.kind {
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => {
            format!("database {} dropped", list(&dropped.databases))
        }
        EventKind::Commit { dropped_relations, .. } => match dropped_relations.len() {
            0 => "committed".to_owned(),
            1 => "storage of 1 relation removed at commit (DROP, TRUNCATE or a rewrite)".to_owned(),
            count => format!("storage of {count} relations removed at commit (DROP, TRUNCATE or a rewrite)"),
        },
        EventKind::Abort { .. } => "rolled back".to_owned(),
        EventKind::RestorePoint { name, .. } => format!("restore point {name:?}"),
        EventKind::Checkpoint { redo, shutdown, .. } => {
            format!("checkpoint{}, redo {redo}", if *shutdown { " at shutdown" } else { "" })
        }
        EventKind::EndOfRecovery { timeline, previous_timeline, .. } => {
            format!("recovery along timeline {previous_timeline} ended: timeline {timeline} began")
        }
        EventKind::TablespaceDrop { oid } => format!("tablespace {oid} dropped"),
        EventKind::DatabaseDrop { oid, tablespaces } => {
            format!("files of database {oid} removed from tablespace {}", list(tablespaces))
        }
        EventKind::DatabaseInvalid { oid, name } => {
            format!("DROP DATABASE of {name:?} (database {oid}) began: marked invalid")
        }
        EventKind::StorageTruncate { blocks, .. } => {
            format!("storage of 1 relation cut to {blocks} pages (TRUNCATE, or VACUUM of empty pages)")
        }
        EventKind::Truncate { relations, .. } => format!("TRUNCATE of {} table(s)", relations.len()),
        // Not shown: see `kinds_of`.
        _ => "other".to_owned(),
    }
}

fn list(oids: &[Oid]) -> String {
    oids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Returns whether replay of the event changes files at once, whatever becomes of its transaction.
fn acts_at_once(event: &WalEvent) -> bool {
    matches!(
        event.kind,
        EventKind::TablespaceDrop { .. }
            | EventKind::DatabaseDrop { .. }
            | EventKind::DatabaseInvalid { .. }
            | EventKind::StorageTruncate { .. }
    )
}

/// Returns the SQL that makes a database valid again. Its former connection limit is gone with the mark.
///
/// Source: `src/backend/commands/dbcommands.c`, dropdb; in 14.9, 15.4 and from 16 on.
fn revive(database: Oid) -> String {
    format!("UPDATE pg_database SET datconnlimit = -1 WHERE oid = {database} AND datconnlimit = -2")
}

/// Returns an event as it is shown. `pinned` is the timeline that the target names.
pub(super) fn entry_of(
    event: &WalEvent,
    timeline: TimelineId,
    pinned: Option<TimelineId>,
    drops: &Drops,
) -> Entry {
    let relations = relations_of(event);
    let mut databases: Vec<Oid> = match &event.kind {
        EventKind::DatabaseDrop { oid, .. } | EventKind::DatabaseInvalid { oid, .. } => vec![*oid],
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => {
            dropped.databases.clone()
        }
        EventKind::Truncate { database, .. } => vec![*database],
        _ => relations.iter().map(|relation| relation.database).collect(),
    };
    databases.sort_unstable();
    databases.dedup();
    // The record's own position: exact also where a transaction id was used twice, and never behind
    // something that does not wait for its commit; of a database the position where its drop began.
    let began = drops.of(event);
    let target = RecoveryTarget {
        kind: TargetKind::Lsn(began.map_or(event.lsn, |(_, began)| began.lsn)),
        stop: StopSide::Exclusive,
        timeline: pinned.map_or(TimelineChoice::Latest, TimelineChoice::Number),
    };
    Entry {
        lsn: event.lsn,
        timeline,
        xid: event.kind.ended_xid(event.xid).or(Some(event.xid)).filter(|xid| *xid != 0),
        time: time_of(event),
        after: None,
        before: None,
        kinds: kinds_of(event).to_vec(),
        what: words(event),
        at_once: acts_at_once(event),
        databases,
        relation_count: relations.len() as u64,
        relations: relations
            .iter()
            .take(RELATIONS_MAX)
            .map(|storage| Relation { storage: *storage, name: None })
            .collect(),
        just_before: target.options(),
        afterwards: began.filter(|(_, began)| began.invalid).map(|(oid, _)| revive(oid)),
    }
}
