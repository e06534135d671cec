//! What happened in the archived WAL: events are chosen, described, and each given the target that leads to
//! just before it. Pure, like the planner: what must be known first is asked for.

mod describe;
mod read;

#[cfg(test)]
pub(crate) mod tests;

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::pg::{Lsn, Oid, SegmentName, TimelineId, Xid};
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};

use crate::plan::Gap;
use crate::target::TimelineChoice;

pub(crate) use read::Reading;

use describe::{kinds_of, relations_of};

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
    /// A restore point was made.
    RestorePoint,
    /// A checkpoint was completed.
    Checkpoint,
    /// A timeline began.
    Timeline,
    /// A transaction was committed.
    Commit,
    /// A transaction was rolled back.
    Abort,
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
    pub database: Option<Oid>,
    /// Only what names this relation file number.
    pub relation: Option<Oid>,
    /// Only these kinds.
    pub kinds: Vec<Kind>,
    /// The timeline whose way is followed.
    pub timeline: TimelineChoice,
    /// How many lines at most.
    pub limit: usize,
}

impl Query {
    /// Returns whether an event is asked for, its time not looked at.
    fn picks(&self, event: &WalEvent) -> bool {
        let touched = |oid: Option<Oid>, of: fn(&RelFileLocator) -> Oid| {
            oid.is_none_or(|oid| relations_of(event).iter().any(|relation| of(relation) == oid))
        };
        let database = self.database.is_none_or(|oid| match &event.kind {
            EventKind::DatabaseDrop { oid: dropped, .. }
            | EventKind::DatabaseInvalid { oid: dropped, .. } => *dropped == oid,
            EventKind::Commit { dropped_objects: Some(dropped), .. } if dropped.databases.contains(&oid) => {
                true
            }
            EventKind::Truncate { database, .. } => *database == oid,
            _ => touched(Some(oid), |relation| relation.database),
        });
        let transaction = || event.kind.ended_xid(event.xid).unwrap_or(event.xid);
        kinds_of(event).iter().any(|kind| self.kinds.contains(kind))
            && self.xid.is_none_or(|xid| transaction() == xid)
            && database
            && touched(self.relation, |relation| relation.relation)
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
        kinds && self.database.is_none() && self.relation.is_none()
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

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where its record starts.
    pub lsn: Lsn,
    /// The timeline that it happened on.
    pub timeline: TimelineId,
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
    pub databases: Vec<Oid>,
    /// How many relations lost storage.
    pub relation_count: u64,
    /// The first of them.
    pub relations: Vec<Relation>,
    /// The options that spell the target just before it.
    pub just_before: String,
    /// SQL that a server restored to there needs, to undo what came before the record and was not rolled back.
    pub afterwards: Option<String>,
}

/// A relation whose storage an event names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Relation {
    /// Where the storage lies.
    #[serde(flatten)]
    pub storage: RelFileLocator,
    /// The relation's name; the WAL does not hold it.
    pub name: Option<String>,
}
