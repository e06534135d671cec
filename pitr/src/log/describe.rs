//! One event as it is shown: what happened, in words, and the target just before it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use walship::pg::{Lsn, Oid, TimelineId, Xid};
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};

use super::names::NamesAt;
use super::{DatabaseName, Entry, Kind, NameSource, RELATIONS_MAX, Relation, RemovalRecord, Removed};
use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice};

/// How databases that are being dropped got there, as far as the WAL was read.
#[derive(Debug, Clone, Default)]
pub(super) struct Drops(BTreeMap<Oid, Began>);

/// The beginning of a DROP DATABASE.
#[derive(Debug, Clone)]
struct Began {
    /// The database's name, where its mark tells it.
    name: Option<String>,
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
            EventKind::DatabaseInvalid { oid, name } => {
                // An earlier mark that nobody undid, as far as is known: a first DROP was cut short.
                let invalid = self.0.get(oid).is_some_and(|began| began.pending);
                let name = Some(name.clone());
                self.0.insert(*oid, Began { name, lsn: event.lsn, invalid, pending: true });
            }
            EventKind::DatabaseDrop { oid, .. } => match self.0.get_mut(oid) {
                Some(began) if began.pending => began.pending = false,
                _ => {
                    let began = Began { name: None, lsn: event.lsn, invalid: true, pending: false };
                    self.0.insert(*oid, began);
                }
            },
            _ => {}
        }
    }

    /// Returns the beginning of the drop of a database that the event takes part in.
    fn of(&self, event: &WalEvent) -> Option<(Oid, &Began)> {
        let oid = match &event.kind {
            EventKind::DatabaseInvalid { oid, .. } | EventKind::DatabaseDrop { oid, .. } => *oid,
            EventKind::Commit { dropped_objects: Some(dropped), .. } => *dropped.databases.first()?,
            _ => return None,
        };
        Some((oid, self.0.get(&oid)?))
    }

    /// Returns the name of a database whose drop began, as its mark tells it.
    fn name(&self, oid: Oid) -> Option<DatabaseName> {
        let name = self.0.get(&oid)?.name.clone()?;
        Some(DatabaseName { oid, name: Some(name), named_by: Some(NameSource::Wal) })
    }
}

/// Returns the time that an event's own record holds.
pub(super) fn time_of(event: &WalEvent) -> Option<DateTime<Utc>> {
    match &event.kind {
        EventKind::RestorePoint { time, .. }
        | EventKind::Checkpoint { time, .. }
        | EventKind::EndOfRecovery { time, .. }
        | EventKind::WalBegins { time }
        | EventKind::Prepare { time, .. } => Some(*time),
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
        EventKind::EndOfRecovery { .. } | EventKind::WalBegins { .. } => &[Kind::Timeline],
        EventKind::TablespaceDrop { .. }
        | EventKind::DatabaseDrop { .. }
        | EventKind::DatabaseInvalid { .. } => &[Kind::Drop],
        EventKind::StorageTruncate { .. } | EventKind::Truncate { .. } => &[Kind::Truncate],
        EventKind::Prepare { .. } => &[Kind::Prepare],
        EventKind::Switch
        | EventKind::OverwriteContrecord { .. }
        | EventKind::BackupEnd { .. }
        | EventKind::ParameterChange { .. }
        | EventKind::TablespaceCreate { .. } => &[],
    }
}

/// Returns the subtransactions that end with a transaction.
pub(super) fn subxids_of(event: &WalEvent) -> &[Xid] {
    match &event.kind {
        EventKind::Commit { subxids, .. } | EventKind::Abort { subxids, .. } => subxids,
        _ => &[],
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

/// Returns all that a commit took away.
pub(super) fn record_of(event: &WalEvent) -> Option<RemovalRecord> {
    match &event.kind {
        EventKind::Commit { dropped_relations, dropped_objects, .. } => Some(RemovalRecord {
            storage: dropped_relations.clone(),
            dropped: dropped_objects.as_ref().map(|dropped| dropped.relations.clone()),
        }),
        _ => None,
    }
}

/// Returns whether an event names a database.
pub(super) fn names_databases(event: &WalEvent) -> bool {
    match &event.kind {
        EventKind::DatabaseInvalid { .. } | EventKind::DatabaseDrop { .. } => true,
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => true,
        _ => names_relations(event),
    }
}

/// Returns whether an event names a relation.
pub(super) fn names_relations(event: &WalEvent) -> bool {
    matches!(event.kind, EventKind::Truncate { .. }) || !relations_of(event).is_empty()
}

/// Returns the relations that an event names, tables before what belongs to them, and how many lost storage
/// and have no name.
fn relations(event: &WalEvent, names: &NamesAt<'_>) -> (Vec<Relation>, u64) {
    let mut relations: Vec<Relation> =
        relations_of(event).iter().map(|storage| names.stored(*storage)).collect();
    let mut unnamed = relations.iter().filter(|relation| relation.name.is_none()).count();
    match &event.kind {
        EventKind::Commit { dropped_objects: Some(dropped), .. } => {
            let gone: BTreeSet<Oid> = dropped.relations.iter().copied().collect();
            for relation in &mut relations {
                relation.removed = match relation.oid {
                    Some(oid) if gone.contains(&oid) => Some(Removed::Dropped),
                    Some(_) => Some(Removed::Replaced),
                    None if gone.is_empty() => Some(Removed::Replaced),
                    None => None,
                };
            }
            // Whose storage is not listed by then may be known by its oid: it had other storage before.
            let known: BTreeSet<Oid> = relations.iter().filter_map(|relation| relation.oid).collect();
            let database = relations.iter().map(|relation| relation.database).find(|oid| *oid != 0);
            for oid in gone.difference(&known) {
                let relation = database.map(|database| names.oid(database, *oid));
                if let Some(mut relation) = relation.filter(|relation| relation.name.is_some()) {
                    relation.removed = Some(Removed::Dropped);
                    // The bytes were those of the other storage.
                    relation.bytes = None;
                    relations.push(relation);
                    unnamed = unnamed.saturating_sub(1);
                }
            }
            if unnamed == 0 {
                // Each of the rest is the storage of one of these.
                let rest = relations.iter_mut().filter(|relation| relation.name.is_none());
                rest.for_each(|relation| relation.removed = Some(Removed::Dropped));
            }
        }
        EventKind::Truncate { database, relations: oids } => {
            relations.extend(oids.iter().map(|oid| names.oid(*database, *oid)));
        }
        _ => {}
    }
    let rank = |relation: &Relation| match relation.kind {
        Some('r' | 'm' | 'p') => 0,
        Some('S') => 1,
        Some('i') => 2,
        Some(_) => 3,
        None => 4,
    };
    relations.sort_by_key(rank);
    (relations, unnamed as u64)
}

/// Returns the kinds by which an event is asked for, as narrow as is known of its relations.
fn narrow_kinds(event: &WalEvent, relations: &[Relation]) -> Vec<Kind> {
    let mut kinds = kinds_of(event).to_vec();
    if matches!(event.kind, EventKind::Commit { .. }) && !relations.is_empty() {
        let may_be = |what| relations.iter().any(|one| one.removed.is_none_or(|removed| removed == what));
        kinds.retain(|kind| match kind {
            Kind::Drop => may_be(Removed::Dropped),
            Kind::Truncate => may_be(Removed::Replaced),
            _ => true,
        });
    }
    kinds
}

/// How many relations are named in one phrase.
const NAMED_MAX: usize = 3;

/// Returns what a commit did to relations, in words.
fn commit_words(event: &WalEvent, relations: &[Relation], unnamed: u64) -> String {
    let EventKind::Commit { dropped_relations, dropped_objects, .. } = &event.kind else {
        return "committed".to_owned();
    };
    let mut phrases = Vec::new();
    for (removed, phrase) in [
        (Some(Removed::Dropped), "dropped"),
        (Some(Removed::Replaced), "given new storage (TRUNCATE, VACUUM FULL, CLUSTER or another rewrite)"),
        (None, "lost its storage (DROP, TRUNCATE or a rewrite)"),
    ] {
        let of_this: Vec<&Relation> =
            relations.iter().filter(|one| one.removed == removed && one.name.is_some()).collect();
        // What belongs to a table goes with it and need not be said.
        let own = |one: &&&Relation| one.of.is_none();
        let alone = of_this.iter().all(|one| one.of.is_some());
        let told: Vec<String> =
            of_this.iter().filter(|one| alone || own(one)).filter_map(|one| one.full_name()).collect();
        if told.is_empty() {
            continue;
        }
        let mut text = told.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        if let Some(more) = told.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
            text.push_str(&format!(" and {more} more"));
        }
        phrases.push(format!("{text} {phrase}"));
    }
    let cause = match dropped_objects {
        Some(dropped) if dropped.relations.is_empty() => "TRUNCATE or a rewrite, nothing was dropped",
        _ => "DROP, TRUNCATE or a rewrite",
    };
    match (unnamed, dropped_relations.len()) {
        (_, 0) => phrases.push("committed".to_owned()),
        (0, _) => {}
        (1, _) => phrases.push(format!("storage of 1 relation of unknown name removed ({cause})")),
        (count, _) => phrases.push(format!("storage of {count} relations of unknown name removed ({cause})")),
    }
    phrases.join("; ")
}

/// Returns what happened, in words.
fn words(event: &WalEvent, relations: &[Relation], unnamed: u64, databases: &[DatabaseName]) -> String {
    let called =
        |oid: &Oid| match databases.iter().find(|one| one.oid == *oid).and_then(|one| one.name.as_ref()) {
            Some(name) => format!("{name:?} (oid {oid})"),
            None => format!("{oid}"),
        };
    let table = || match relations.first().and_then(Relation::full_name) {
        Some(name) if relations.len() == 1 => name,
        _ => format!("{} relation{}", relations.len(), if relations.len() == 1 { "" } else { "s" }),
    };
    match &event.kind {
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => {
            let list: Vec<_> = dropped.databases.iter().map(called).collect();
            format!("database {} dropped", list.join(", "))
        }
        EventKind::Commit { .. } => commit_words(event, relations, unnamed),
        EventKind::Abort { .. } => "rolled back".to_owned(),
        EventKind::Prepare { gid, .. } => format!("prepared as {gid:?}"),
        EventKind::RestorePoint { name, .. } => format!("restore point {name:?}"),
        EventKind::Checkpoint { redo, shutdown, .. } => {
            format!("checkpoint{}, redo {redo}", if *shutdown { " at shutdown" } else { "" })
        }
        EventKind::EndOfRecovery { timeline, previous_timeline, .. } => {
            format!("recovery along timeline {previous_timeline} ended: timeline {timeline} began")
        }
        EventKind::TablespaceDrop { oid } => format!("tablespace {oid} dropped"),
        EventKind::DatabaseDrop { oid, tablespaces } => {
            format!("files of database {} removed from tablespace {}", called(oid), list(tablespaces))
        }
        EventKind::DatabaseInvalid { oid, name } => {
            format!("DROP DATABASE of {name:?} (oid {oid}) began: marked invalid")
        }
        EventKind::StorageTruncate { blocks, .. } => {
            format!("{} cut to {blocks} pages (TRUNCATE, or VACUUM of empty pages)", table())
        }
        EventKind::Truncate { .. } => format!("TRUNCATE of {}", table()),
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

/// What an event is described by, beside itself.
pub(super) struct Surroundings<'a> {
    /// The timeline that it happened on.
    pub(super) timeline: TimelineId,
    /// The timeline that targets name, where there is more than one.
    pub(super) pinned: Option<TimelineId>,
    pub(super) drops: &'a Drops,
    pub(super) names: NamesAt<'a>,
}

/// Returns the entry of a transaction's end that deleted so many rows, and the relations that it deleted of.
pub(super) fn deletes_of(
    event: &WalEvent,
    deleted: &[(RelFileLocator, u64)],
    around: &Surroundings<'_>,
) -> (Entry, Vec<Relation>) {
    let mut relations: Vec<Relation> = Vec::new();
    for (storage, rows) in deleted {
        let relation = around.names.stored(*storage);
        relations.push(Relation { deleted_rows: Some(*rows), bytes: None, ..relation });
    }
    relations.sort_by_key(|relation| std::cmp::Reverse(relation.deleted_rows));
    let unknown = || "a relation of unknown name".to_owned();
    let phrases: Vec<String> = relations
        .iter()
        .take(NAMED_MAX)
        .map(|one| {
            format!("{} rows of {}", one.deleted_rows.unwrap_or(0), one.full_name().unwrap_or_else(unknown))
        })
        .collect();
    let more = match relations.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and of {more} more relations"),
    };
    let mut oids: Vec<Oid> = relations.iter().map(|relation| relation.database).collect();
    oids.sort_unstable();
    oids.dedup();
    let mut entry = entry_of(event, around).0;
    entry.kinds = vec![Kind::DeleteHeavy, Kind::Commit];
    entry.what = format!("about {}{more} deleted", phrases.join(", "));
    entry.databases = oids.iter().map(|oid| around.names.database(*oid)).collect();
    entry.relation_count = relations.len() as u64;
    entry.relations = relations.iter().take(RELATIONS_MAX).cloned().collect();
    entry.unnamed_count = relations.iter().filter(|relation| relation.name.is_none()).count() as u64;
    entry.freed_bytes = None;
    (entry, relations)
}

/// Returns an event as it is shown, and all relations that it names.
pub(super) fn entry_of(event: &WalEvent, around: &Surroundings<'_>) -> (Entry, Vec<Relation>) {
    let names = &around.names;
    let (relations, unnamed_count) = relations(event, names);
    let mut oids: Vec<Oid> = match &event.kind {
        EventKind::DatabaseDrop { oid, .. } | EventKind::DatabaseInvalid { oid, .. } => vec![*oid],
        EventKind::Commit { dropped_objects: Some(dropped), .. } if !dropped.databases.is_empty() => {
            dropped.databases.clone()
        }
        EventKind::Truncate { database, .. } => vec![*database],
        _ => relations.iter().map(|relation| relation.database).collect(),
    };
    oids.sort_unstable();
    oids.dedup();
    let database_bytes = match &event.kind {
        EventKind::Commit { dropped_objects: Some(dropped), .. } => {
            dropped.databases.first().and_then(|oid| names.database_bytes(*oid))
        }
        EventKind::DatabaseDrop { oid, .. } => names.database_bytes(*oid),
        _ => None,
    };
    let databases: Vec<DatabaseName> =
        oids.iter().map(|oid| around.drops.name(*oid).unwrap_or_else(|| names.database(*oid))).collect();
    let taken_away = matches!(event.kind, EventKind::Commit { .. });
    let bytes = relations.iter().filter(|_| taken_away).filter_map(|relation| relation.bytes);
    let freed_bytes = bytes.chain(database_bytes).reduce(u64::saturating_add);
    // The record's own position: exact also where a transaction id was used twice, and never behind
    // something that does not wait for its commit; of a database the position where its drop began.
    let began = around.drops.of(event);
    let just_before_lsn = began.map_or(event.lsn, |(_, began)| began.lsn);
    let target = RecoveryTarget {
        kind: TargetKind::Lsn(just_before_lsn),
        stop: StopSide::Exclusive,
        timeline: around.pinned.map_or(TimelineChoice::Latest, TimelineChoice::Number),
    };
    let entry = Entry {
        lsn: event.lsn,
        timeline: around.timeline,
        open: false,
        xid: event.kind.ended_xid(event.xid).or(Some(event.xid)).filter(|xid| *xid != 0),
        time: time_of(event),
        after: None,
        before: None,
        kinds: narrow_kinds(event, &relations),
        what: words(event, &relations, unnamed_count, &databases),
        at_once: acts_at_once(event),
        databases,
        relation_count: relations.len() as u64,
        relations: relations.iter().take(RELATIONS_MAX).cloned().collect(),
        unnamed_count,
        freed_bytes,
        outcome: None,
        just_before_lsn,
        just_before: target.options(),
        afterwards: began.filter(|(_, began)| began.invalid).map(|(oid, _)| revive(oid)),
        record: None,
    };
    (entry, relations)
}
