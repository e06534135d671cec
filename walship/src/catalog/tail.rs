//! What is stored of a segment that was never stored whole.

use serde::Serialize;

use super::Catalog;
use crate::pg::{Lsn, SegmentName, TimelineId};

/// What is stored of the segment that WAL ends in, at the end of a timeline or before lost WAL: the parts that join
/// from its start on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredTail {
    /// The segment.
    pub segment: SegmentName,
    /// Where its last whole record ends: as far as replay gets. The segment's start when it holds none.
    pub until_lsn: Lsn,
    /// The position after its last byte.
    pub end_lsn: Lsn,
    /// How many parts that takes.
    pub parts: u64,
    /// Their stored size in bytes.
    pub stored_bytes: u64,
    /// Why it does not go on although more of the segment is stored.
    pub flaw: Option<TailFlaw>,
    /// Where the ledger says that WAL of the segment is lost from; `None` for the open segment.
    pub lost_from: Option<Lsn>,
}

/// Why parts that are stored do not count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TailFlaw {
    /// A part is damaged, and no other holds its bytes.
    Damaged {
        /// What is wrong with it.
        what: String,
    },
    /// No part holds the bytes before this position.
    Hole {
        /// Where parts are stored again.
        to: Lsn,
    },
}

impl StoredTail {
    /// Returns in words why it does not go on although more is stored.
    pub fn flaw_text(&self) -> Option<String> {
        Some(match self.flaw.as_ref()? {
            TailFlaw::Damaged { what } => format!(
                "segment {} ends at {} because a part of it is damaged where it is stored: {what}",
                self.segment, self.until_lsn
            ),
            TailFlaw::Hole { to } => format!(
                "segment {} ends at {}: parts of it are stored from {to} on, those between are not",
                self.segment, self.until_lsn
            ),
        })
    }
}

impl Catalog {
    /// Returns whether WAL of a timeline is stored, whole segments or parts of the open one.
    pub fn has_wal_of(&self, timeline: TimelineId) -> bool {
        self.segments.last_of_timeline(timeline).is_some()
            || self.tails.as_ref().is_some_and(|tails| tails.contains_key(&timeline))
    }

    /// Returns the first segment of the same timeline that is not before `name` and of which anything is stored,
    /// whole or in parts.
    pub fn first_stored_from(&self, name: SegmentName) -> Option<SegmentName> {
        let tail = self.tails.as_ref().and_then(|tails| tails.get(&name.timeline));
        let tail = tail.map(|tail| tail.segment).filter(|segment| *segment >= name);
        let stranded = self.stranded.range(name..).next().map(|(segment, _)| *segment);
        let stranded = stranded.filter(|segment| segment.timeline == name.timeline);
        [self.segments.first_from(name), tail, stranded].into_iter().flatten().min()
    }

    /// Returns where the ledger says that WAL of a segment is lost from, when that is inside of it: what is stored
    /// before that is good.
    pub fn lost_from(&self, segment: SegmentName) -> Option<Lsn> {
        let size = self.lineage.segment_size;
        let gaps = self.gaps.iter().filter(|gap| gap.touches(segment, size));
        gaps.map(|gap| gap.start_lsn).min().filter(|start| *start > segment.start(size))
    }

    /// Returns the tail of a segment if a recovery may get it: nothing later is known on that timeline, or the ledger
    /// says where inside of it WAL is lost. The latter is for a recovery alone that has a target before that.
    pub fn served_tail(&self, segment: SegmentName) -> Option<&StoredTail> {
        if let Some(stranded) = self.stranded.get(&segment) {
            return Some(stranded);
        }
        let (timeline, size) = (segment.timeline, self.lineage.segment_size);
        let tail = self.tails.as_ref()?.get(&timeline).filter(|tail| tail.segment == segment)?;
        let start = segment.start(size);
        let later = |name: &&SegmentName| name.timeline == timeline && **name > segment;
        let left_behind = self.histories.values().any(|history| {
            let switch = history.switch_lsn_of(timeline);
            switch.is_some_and(|switch| SegmentName::containing(timeline, switch, size) > segment)
        });
        let hole = self.segments.last_of_timeline(timeline).is_some_and(|last| last >= segment)
            || self.partials.iter().chain(&self.incomplete).any(|name| later(&name))
            || self.gaps.iter().any(|gap| gap.timeline == timeline && gap.end_lsn > start)
            || left_behind;
        (!hole && tail.until_lsn > start).then_some(tail)
    }
}
