//! What happened in the archived WAL: events are chosen, described, and each given the target that leads to
//! just before it. Pure, like the planner: what must be known first is asked for.

mod before;
mod describe;
mod heavy;
mod names;
mod read;

#[cfg(test)]
pub(crate) mod tests;

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::pg::{Lsn, Oid, SegmentName, TimelineId, Xid};
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};

use crate::plan::Gap;
use crate::target::{TargetError, TimelineChoice};

pub use before::{Before, Choice};
pub use names::{DatabaseName, NameSource, Relation, Removed};
pub(crate) use names::{Dictionary, Documents};
pub(crate) use read::{Need, Reading};

use describe::{kinds_of, names_databases, names_relations, relations_of, subxids_of};

/// How many relations of one event are listed; the others are counted.
const RELATIONS_MAX: usize = 20;

/// A kind of event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Relations' storage removed by a commit; databases and tablespaces dropped.
    Drop,
    /// Relations' storage removed by a commit (the WAL does not tell TRUNCATE from DROP) or cut at once.
    Truncate,
    /// A transaction deleted many rows of a relation.
    DeleteHeavy,
    /// A restore point was made.
    RestorePoint,
    /// A checkpoint was completed.
    Checkpoint,
    /// A timeline began, or WAL began anew (pg_resetwal).
    Timeline,
    /// A transaction was committed.
    Commit,
    /// A transaction was rolled back.
    Abort,
    /// A transaction was prepared for two-phase commit.
    Prepare,
}

impl Kind {
    /// What is shown when nothing else is asked for.
    pub const DEFAULT: [Self; 4] = [Self::Drop, Self::Truncate, Self::RestorePoint, Self::Timeline];
    /// What is shown of one transaction.
    pub const OF_TRANSACTION: [Self; 4] = [Self::Drop, Self::Truncate, Self::Commit, Self::Abort];
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Nothing that happened before this time.
    pub since: Option<DateTime<Utc>>,
    /// Nothing that happened after this time.
    pub until: Option<DateTime<Utc>>,
    /// Only what this transaction did.
    pub xid: Option<Xid>,
    /// Only what names this database.
    pub database: Option<OidOrName>,
    /// Only what names this table, or an index or TOAST table of it.
    pub table: Option<TableFilter>,
    /// Also what names a relation or a database whose name is not known: it may be the one that is asked for.
    pub unnamed_too: bool,
    /// Only what names this relation file number.
    pub relation: Option<Oid>,
    /// From so many rows of one relation on, deleted by one transaction or subtransaction, they are many.
    pub delete_rows: u64,
    /// Only these kinds.
    pub kinds: Vec<Kind>,
    /// The timeline whose way is followed.
    pub timeline: TimelineChoice,
    /// How many lines at most.
    pub limit: usize,
    /// Whether entries tell all that a commit's record names ([`Entry::record`]).
    pub whole: bool,
}

/// What is looked for by its oid, or by a name that it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OidOrName {
    /// The oid.
    Oid(Oid),
    /// The name.
    Name(String),
}

/// A table that is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFilter {
    /// Its schema; `None` for any.
    pub schema: Option<String>,
    /// Its `pg_class` oid or its name.
    pub table: OidOrName,
}

/// Returns what a word names: an oid when it is a number.
pub fn oid_or_name(word: &str) -> OidOrName {
    word.parse().map_or_else(|_| OidOrName::Name(word.to_owned()), OidOrName::Oid)
}

/// Returns the table that `NAME`, `SCHEMA.NAME` or an oid names. Names are as they are stored, without quotes;
/// of several dots the first ends the schema.
///
/// # Errors
/// [`TargetError`] for an empty part.
pub fn parse_table(word: &str) -> Result<TableFilter, TargetError> {
    let (schema, name) = match word.split_once('.') {
        Some((schema, name)) => (Some(schema), name),
        None => (None, word),
    };
    if name.is_empty() || schema == Some("") {
        return Err(TargetError::new(
            format!("{word:?} names no table"),
            "Write NAME, SCHEMA.NAME or an oid, without quotes, in the letters that are stored.",
        ));
    }
    let table = if schema.is_none() { oid_or_name(name) } else { OidOrName::Name(name.to_owned()) };
    Ok(TableFilter { schema: schema.map(str::to_owned), table })
}

impl TableFilter {
    /// Returns whether a relation is the table, or belongs to it.
    fn matches(&self, relation: &Relation) -> bool {
        match &self.table {
            OidOrName::Oid(oid) => relation.oid == Some(*oid),
            OidOrName::Name(name) => {
                let is = |schema: Option<&str>, own: Option<&str>| {
                    own == Some(name.as_str())
                        && self.schema.as_deref().is_none_or(|wanted| schema == Some(wanted))
                };
                let owner = relation.of.as_deref().and_then(|of| of.split_once('.'));
                is(relation.schema.as_deref(), relation.name.as_deref())
                    || owner.is_some_and(|(schema, name)| is(Some(schema), Some(name)))
            }
        }
    }
}

impl Query {
    /// From so many deleted rows on they are many, unless another number is asked for.
    pub const DELETE_ROWS: u64 = 1000;

    /// Returns whether prepared transactions are asked for.
    fn wants_prepared(&self) -> bool {
        self.kinds.contains(&Kind::Prepare) && self.database.is_none() && self.table.is_none()
    }

    /// Returns whether mass deletes are asked for.
    fn wants_deletes(&self) -> bool {
        self.kinds.contains(&Kind::DeleteHeavy)
    }

    /// Returns whether an event is asked for as far as its record tells, its time not looked at.
    fn picks(&self, event: &WalEvent) -> bool {
        let touched = |oid: Option<Oid>, of: fn(&RelFileLocator) -> Oid| {
            oid.is_none_or(|oid| relations_of(event).iter().any(|relation| of(relation) == oid))
        };
        let by_oid = match self.database {
            Some(OidOrName::Oid(oid)) => Some(oid),
            _ => None,
        };
        let database = by_oid.is_none_or(|oid| match &event.kind {
            EventKind::DatabaseDrop { oid: dropped, .. }
            | EventKind::DatabaseInvalid { oid: dropped, .. } => *dropped == oid,
            EventKind::Commit { dropped_objects: Some(dropped), .. } if dropped.databases.contains(&oid) => {
                true
            }
            EventKind::Truncate { database, .. } => *database == oid,
            _ => touched(Some(oid), |relation| relation.database),
        });
        kinds_of(event).iter().any(|kind| self.kinds.contains(kind))
            && self.is_of_transaction(event)
            && database
            && touched(self.relation, |relation| relation.relation)
            && (self.database.is_none() || names_databases(event))
            && (self.table.is_none() || names_relations(event))
    }

    /// Returns whether an event is what the transaction did that is asked for, if one is.
    fn is_of_transaction(&self, event: &WalEvent) -> bool {
        self.xid.is_none_or(|xid| {
            event.kind.ended_xid(event.xid).unwrap_or(event.xid) == xid || subxids_of(event).contains(&xid)
        })
    }

    /// Returns whether an event is asked for by its names too.
    fn names(&self, entry: &Entry, relations: &[Relation]) -> bool {
        let kinds = entry.kinds.iter().any(|kind| self.kinds.contains(kind));
        let database = match &self.database {
            Some(OidOrName::Name(name)) => entry
                .databases
                .iter()
                .any(|one| one.name.as_ref().map_or(self.unnamed_too, |known| known == name)),
            Some(OidOrName::Oid(oid)) => entry.databases.iter().any(|one| one.oid == *oid),
            None => true,
        };
        let table = |table: &TableFilter| {
            (self.unnamed_too && entry.unnamed_count > 0)
                || relations.iter().any(|relation| table.matches(relation))
        };
        kinds && database && self.table.as_ref().is_none_or(table)
    }

    /// Returns whether an event must be known, to be shown or to describe another.
    fn needs(&self, event: &WalEvent) -> bool {
        let of_a_drop =
            matches!(event.kind, EventKind::DatabaseInvalid { .. } | EventKind::DatabaseDrop { .. });
        (of_a_drop && self.kinds.contains(&Kind::Drop)) || self.picks(event)
    }

    /// Returns whether something at this time is asked for.
    fn covers(&self, time: DateTime<Utc>) -> bool {
        self.since.is_none_or(|since| time >= since) && self.until.is_none_or(|until| time <= until)
    }

    /// Returns whether ends of transactions are asked for that drop nothing.
    fn wants_ends(&self) -> bool {
        let kinds = [Kind::Commit, Kind::Abort].iter().any(|kind| self.kinds.contains(kind));
        kinds && self.database.is_none() && self.relation.is_none() && self.table.is_none()
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Log {
    /// The operator's name of the cluster.
    pub cluster: String,
    /// The lineage's number.
    pub lineage: u32,
    /// The timeline whose way was followed; `None` when nothing is stored.
    pub timeline: Option<TimelineId>,
    /// Where the stored WAL on this way begins.
    pub from_lsn: Option<Lsn>,
    /// How far it was looked at.
    pub until_lsn: Option<Lsn>,
    /// What happened, in WAL order.
    pub lines: Vec<Line>,
    /// Whether the limit ended the log before the WAL did.
    pub more: bool,
    /// Timelines with stored WAL that is not on this way.
    pub timelines_left_out: Vec<TimelineId>,
    /// Rows deleted in segments whose summaries, of an earlier release, do not say by whom; 0 when that was not
    /// asked for.
    pub deletes_uncounted: u64,
    /// Backups whose saved names cannot be read, and why: what they would name is not named.
    pub names_unread: Vec<(String, String)>,
}

impl Log {
    /// Says what became of a prepared transaction that is among the lines.
    fn end_prepared(&mut self, xid: Xid, end: PreparedEnd) {
        let prepared = self.lines.iter_mut().rev().find_map(|line| match line {
            Line::Event(entry)
                if entry.kinds.contains(&Kind::Prepare) && entry.xid == Some(xid) && entry.lsn < end.lsn =>
            {
                Some(entry)
            }
            _ => None,
        });
        if let Some(entry) = prepared {
            entry.outcome.get_or_insert(end);
        }
    }

    /// Returns whether it is unknown what happened in some WAL behind `lsn`.
    pub fn is_unknown_behind(&self, lsn: Lsn) -> bool {
        self.lines.iter().any(|line| match line {
            Line::Gap(gap) => gap.to > lsn,
            Line::Unknown { to, .. } => *to > lsn,
            Line::Event(_) | Line::Fork { .. } | Line::WalBegins { .. } => false,
        })
    }
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// Something happened.
    Event(Box<Entry>),
    /// WAL is missing: what happened in it is not known.
    Gap(Gap),
    /// A stored segment cannot be read: what happened in it is not known.
    Unknown {
        /// The segment.
        segment: SegmentName,
        /// Where it is used from.
        from: Lsn,
        /// The position after it.
        to: Lsn,
        /// Whether it is damaged, and not merely of a layout that cannot be decoded.
        damaged: bool,
        /// Why.
        why: String,
    },
    /// WAL begins here and continues nothing: `pg_resetwal` was run. No target of its own: none leads to just before it.
    WalBegins {
        /// Where its first record starts.
        lsn: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// When.
        time: DateTime<Utc>,
    },
    /// The way leaves one timeline for the next, as the history file says.
    Fork {
        /// The timeline that it leaves.
        from: TimelineId,
        /// The timeline that it goes on along.
        to: TimelineId,
        /// Where.
        lsn: Lsn,
        /// Why, as the history file says.
        reason: String,
    },
}

/// The end of a prepared transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PreparedEnd {
    /// Whether it was committed, not rolled back.
    pub committed: bool,
    /// When.
    pub time: DateTime<Utc>,
    /// Where the record of its end starts.
    pub lsn: Lsn,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where its record starts.
    pub lsn: Lsn,
    /// The timeline that it happened on.
    pub timeline: TimelineId,
    /// Whether it lies in the open segment, of which parts are stored.
    pub open: bool,
    /// The transaction; `None` when it belongs to none.
    pub xid: Option<Xid>,
    /// When it happened; `None` when its record does not say.
    pub time: Option<DateTime<Utc>>,
    /// Of an event without a time: the time of a record before it.
    pub after: Option<DateTime<Utc>>,
    /// Of an event without a time: the time of a record behind it.
    pub before: Option<DateTime<Utc>>,
    /// What kinds it is asked for by.
    pub kinds: Vec<Kind>,
    /// What happened.
    pub what: String,
    /// Whether it took effect at its record, before its transaction was committed, and stays when that is
    /// rolled back.
    pub at_once: bool,
    /// The databases that it names.
    pub databases: Vec<DatabaseName>,
    /// How many relations it names.
    pub relation_count: u64,
    /// The first of them: tables before what belongs to them.
    pub relations: Vec<Relation>,
    /// How many of all lost storage and cannot be named.
    pub unnamed_count: u64,
    /// Bytes of the files that it took away, as long as they were in the backup that names them; of those
    /// that are not named nothing is counted. `None` when nothing is known.
    pub freed_bytes: Option<u64>,
    /// What became of a prepared transaction; `None` of all else, and when its end is not in the log's WAL.
    pub outcome: Option<PreparedEnd>,
    /// The position of the record just before which it is undone: its own, or where it began.
    pub just_before_lsn: Lsn,
    /// The options that spell the target just before it.
    pub just_before: String,
    /// SQL that a server restored to there needs, to undo what came before the record and was not rolled back.
    pub afterwards: Option<String>,
    /// All that a commit's record names, where [`Query::whole`] asks for it.
    #[serde(skip)]
    pub record: Option<RemovalRecord>,
}

/// What the record of a commit says it took away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemovalRecord {
    /// The storage of relations: dropped, or replaced.
    pub storage: Vec<RelFileLocator>,
    /// The oids of what was dropped; `None` where the record does not say (PostgreSQL 14).
    pub dropped: Option<Vec<Oid>>,
}
