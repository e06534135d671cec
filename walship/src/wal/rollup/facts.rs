//! What a stretch of WAL holds, in a few numbers that can be added up in any order.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::pg::Xid;
use crate::wal::deletes::Deletes;
use crate::wal::event::{EventKind, WalEvent};
use crate::wal::summary::{Counts, SegmentEnding, SegmentSummary, StopTime};

/// What a stretch of WAL holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Length of the segment objects, in bytes.
    pub stored_bytes: u64,
    /// Valid WAL, in bytes: what lies behind a switch record is not counted.
    pub wal_bytes: u64,
    /// How many records of each kind start there.
    #[serde(skip_serializing_if = "is_default")]
    pub counts: Counts,
    /// The record with the earliest stop-eligible time.
    #[serde(skip_serializing_if = "is_default")]
    pub min_time: Option<StopTime>,
    /// The record with the latest stop-eligible time.
    #[serde(skip_serializing_if = "is_default")]
    pub max_time: Option<StopTime>,
    /// The smallest and the largest xid (as plain numbers) that a record ends.
    #[serde(skip_serializing_if = "is_default")]
    pub ended_xids: Option<(Xid, Xid)>,
    /// The transactions that deleted most rows.
    #[serde(skip_serializing_if = "is_default")]
    pub deletes: Deletes,
    /// Heap deletes in segments whose summaries do not say by whom.
    #[serde(skip_serializing_if = "is_default")]
    pub deletes_uncounted: u64,
    /// The earliest time of a checkpoint record; [`DateTime::UNIX_EPOCH`] where one may be unknown.
    #[serde(skip_serializing_if = "is_default")]
    pub first_checkpoint: Option<DateTime<Utc>>,
    /// How many segments could not be decoded: nothing is known of what they hold.
    #[serde(skip_serializing_if = "is_default")]
    pub undecoded: u64,
    /// How many records that cross a segment boundary are unknown: the segments must be read.
    #[serde(skip_serializing_if = "is_default")]
    pub unread: u64,
    /// The classes of events that are not all listed beside these facts.
    #[serde(skip_serializing_if = "is_default")]
    pub more: Classes,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What an event is kept for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Restore points, parameter changes, tablespaces created, ends of recovery and of backups, beginnings of WAL.
    Planning,
    /// Drops and truncations.
    Destructive,
    /// Checkpoints; listed at level 1 only.
    Checkpoints,
}

impl Class {
    /// Every class.
    pub const ALL: [Self; 3] = [Self::Planning, Self::Destructive, Self::Checkpoints];

    /// Returns what an event is kept for; `None` for what roll-ups do not list.
    pub fn of(event: &WalEvent) -> Option<Self> {
        match &event.kind {
            EventKind::RestorePoint { .. }
            | EventKind::EndOfRecovery { .. }
            | EventKind::WalBegins { .. }
            | EventKind::BackupEnd { .. }
            | EventKind::ParameterChange { .. }
            | EventKind::TablespaceCreate { .. } => Some(Self::Planning),
            EventKind::TablespaceDrop { .. }
            | EventKind::DatabaseDrop { .. }
            | EventKind::DatabaseInvalid { .. }
            | EventKind::StorageTruncate { .. }
            | EventKind::Truncate { .. } => Some(Self::Destructive),
            EventKind::Commit { dropped_relations, dropped_objects, .. } => {
                let database = dropped_objects.as_ref().is_some_and(|dropped| !dropped.databases.is_empty());
                (database || !dropped_relations.is_empty()).then_some(Self::Destructive)
            }
            EventKind::Checkpoint { .. } => Some(Self::Checkpoints),
            EventKind::Abort { .. }
            | EventKind::Prepare { .. }
            | EventKind::Switch
            | EventKind::OverwriteContrecord { .. } => None,
        }
    }
}

/// A set of classes; a list of names in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<Class>", into = "Vec<Class>")]
pub struct Classes([bool; 3]);

impl Classes {
    /// Every class.
    pub const ALL: Self = Self([true; 3]);

    /// Returns whether the class is one of them.
    pub fn has(self, class: Class) -> bool {
        self.0[class as usize]
    }

    /// Adds a class.
    pub fn insert(&mut self, class: Class) {
        self.0[class as usize] = true;
    }
}

impl From<Vec<Class>> for Classes {
    fn from(list: Vec<Class>) -> Self {
        let mut classes = Self::default();
        list.into_iter().for_each(|class| classes.insert(class));
        classes
    }
}

impl From<Classes> for Vec<Class> {
    fn from(classes: Classes) -> Self {
        Class::ALL.into_iter().filter(|class| classes.has(*class)).collect()
    }
}

impl Facts {
    /// Returns what a segment holds, without the record that leaves it.
    pub fn of(summary: &SegmentSummary, stored_bytes: u64) -> Self {
        if matches!(summary.ending, SegmentEnding::Undecoded { .. }) {
            return Self {
                stored_bytes,
                wal_bytes: summary.segment_size.bytes(),
                first_checkpoint: Some(DateTime::UNIX_EPOCH),
                undecoded: 1,
                more: Classes::ALL,
                ..Self::default()
            };
        }
        let mut facts = Self {
            stored_bytes,
            wal_bytes: summary.end_of_wal.bytes_since(summary.segment.start(summary.segment_size)),
            counts: summary.counts,
            min_time: summary.min_time,
            max_time: summary.max_time,
            ended_xids: summary.ended_xids,
            deletes: summary.deletes.clone().unwrap_or_default(),
            deletes_uncounted: if summary.deletes.is_none() { summary.counts.heap_deletes } else { 0 },
            ..Self::default()
        };
        summary.events.iter().for_each(|event| facts.note_checkpoint(event));
        if summary.events_truncated {
            facts.more = Classes::ALL;
            facts.first_checkpoint = Some(DateTime::UNIX_EPOCH);
        }
        facts
    }

    /// Adds what another stretch of WAL holds.
    pub fn add(&mut self, other: &Self) {
        self.stored_bytes = self.stored_bytes.saturating_add(other.stored_bytes);
        self.wal_bytes = self.wal_bytes.saturating_add(other.wal_bytes);
        self.undecoded = self.undecoded.saturating_add(other.undecoded);
        self.unread = self.unread.saturating_add(other.unread);
        let (sum, more) = (&mut self.counts, &other.counts);
        for (sum, more) in [
            (&mut sum.records, more.records),
            (&mut sum.commits, more.commits),
            (&mut sum.aborts, more.aborts),
            (&mut sum.prepares, more.prepares),
            (&mut sum.full_page_images, more.full_page_images),
            (&mut sum.heap_deletes, more.heap_deletes),
        ] {
            *sum = sum.saturating_add(more);
        }
        self.deletes.add(&other.deletes);
        self.deletes_uncounted = self.deletes_uncounted.saturating_add(other.deletes_uncounted);
        // Of equal times the first in WAL order, whatever the order of adding.
        let key = |time: &StopTime| (time.time, time.lsn);
        self.min_time = self.min_time.into_iter().chain(other.min_time).min_by_key(key);
        let key = |time: &StopTime| (time.time, std::cmp::Reverse(time.lsn));
        self.max_time = self.max_time.into_iter().chain(other.max_time).max_by_key(key);
        self.ended_xids = match (self.ended_xids, other.ended_xids) {
            (Some((low, high)), Some((other_low, other_high))) => {
                Some((low.min(other_low), high.max(other_high)))
            }
            (own, other) => own.or(other),
        };
        self.first_checkpoint = self.first_checkpoint.into_iter().chain(other.first_checkpoint).min();
        for class in Class::ALL {
            if other.more.has(class) {
                self.more.insert(class);
            }
        }
    }

    /// Adds one record that crosses into the next segment.
    pub(super) fn add_crossing(&mut self, event: &WalEvent) {
        self.counts.records = self.counts.records.saturating_add(1);
        let count = match event.kind {
            EventKind::Commit { .. } => Some(&mut self.counts.commits),
            EventKind::Abort { .. } => Some(&mut self.counts.aborts),
            EventKind::Prepare { .. } => Some(&mut self.counts.prepares),
            _ => None,
        };
        if let Some(count) = count {
            *count = count.saturating_add(1);
        }
        let xid = event.kind.ended_xid(event.xid);
        let stop = event.kind.stop_time().zip(xid).map(|(time, xid)| StopTime { time, lsn: event.lsn, xid });
        let own =
            Self { min_time: stop, max_time: stop, ended_xids: xid.map(|xid| (xid, xid)), ..Self::default() };
        self.add(&own);
        self.note_checkpoint(event);
    }

    fn note_checkpoint(&mut self, event: &WalEvent) {
        if let EventKind::Checkpoint { time, .. } = event.kind {
            self.first_checkpoint = Some(self.first_checkpoint.map_or(time, |first| first.min(time)));
        }
    }
}
