//! What one segment holds, in at most 64 KiB: the part of the archive that plans are made from.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::crc::record_crc;
use super::decode::{decode, is_of_interest};
use super::deletes::Deletes;
use super::event::{EventKind, WalEvent};
use super::layout::Layout;
use super::record::{Record, RecordHeader};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId, Xid};

/// The summary of one WAL segment; stored in JSON inside the segment object.
///
/// `docs/repository-format.md` lists the fields. A record belongs to the segment it *starts* in. One
/// that ends in the next segment is not counted in either summary: its first bytes are in
/// [`SegmentSummary::unfinished`] of the one and the rest in [`SegmentSummary::leading`] of the
/// other, so that it is attributed exactly once, whatever the order of archiving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentSummary {
    /// The segment's name.
    pub segment: SegmentName,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The system identifier in the long page header, in decimal.
    #[serde(with = "decimal")]
    pub system_identifier: u64,
    /// The page magic: tells PostgreSQL's major version.
    pub page_magic: u16,
    /// The smallest timeline id in a page header: the name's, or an ancestor's.
    pub first_page_timeline: TimelineId,
    /// Where the first record that starts in this segment starts; `None` when none does.
    pub first_record: Option<Lsn>,
    /// The position after the last byte of valid WAL in this segment.
    pub end_of_wal: Lsn,
    /// Whether and why WAL ends there.
    pub ending: SegmentEnding,
    /// Bytes at the segment's start that continue a record of an earlier segment.
    pub leading: Option<Fragment>,
    /// The record that starts here and ends in a later segment.
    pub unfinished: Option<Fragment>,
    /// Counts over the records that lie whole in this segment.
    pub counts: Counts,
    /// The record with the earliest [`super::EventKind::stop_time`].
    pub min_time: Option<StopTime>,
    /// The record with the latest [`super::EventKind::stop_time`].
    pub max_time: Option<StopTime>,
    /// The smallest and the largest xid (as plain numbers) that a record here ends.
    pub ended_xids: Option<(Xid, Xid)>,
    /// The transactions that deleted most rows; `None` in summaries by releases that did not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletes: Option<Deletes>,
    /// Restore points, checkpoints, ends of recovery, backup ends, parameter changes, tablespaces
    /// created, and destructive events, in WAL order. Commits are here only when they drop relations.
    pub events: Vec<WalEvent>,
    /// Whether `events` was cut because the summary would have grown too large: "there is more".
    pub events_truncated: bool,
}

impl SegmentSummary {
    /// The largest stored summary, in bytes.
    pub const MAX_BYTES: usize = 64 << 10;
    /// The longest [`Fragment`] that is kept.
    pub const MAX_FRAGMENT_BYTES: usize = 8 << 10;
}

/// Whether a segment's WAL reaches its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SegmentEnding {
    /// Valid WAL reaches the last byte.
    Full,
    /// A switch record ends it; the rest is padding.
    Switch,
    /// Valid WAL stops before the end without a switch record: not a whole segment.
    Incomplete,
    /// The decoder cannot follow this WAL for a reason that is no sign of damage (a newer layout).
    /// Fields after `page_magic` may be missing.
    Undecoded {
        /// Why.
        reason: String,
    },
}

/// A part of a record that crosses a segment boundary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fragment {
    /// For `unfinished`, where the record starts; for `leading`, the segment's start.
    pub lsn: Lsn,
    /// How many bytes of the record (page headers not counted) lie in this segment.
    pub record_bytes: u64,
    /// Those bytes, page headers removed, when they are at most [`SegmentSummary::MAX_FRAGMENT_BYTES`];
    /// `None` means "read the segment". For `unfinished`, only the 24 bytes of the record's header when
    /// that already says that the record does not matter to planning.
    #[serde(with = "base64_option")]
    pub bytes: Option<Vec<u8>>,
    /// For `leading`: the position after its last byte, when it ends in this segment. Whether its CRC is
    /// right can only be told with the other part.
    pub end: Option<Lsn>,
}

/// How many records of each kind a segment holds whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// All records.
    pub records: u64,
    /// Commits, prepared ones included.
    pub commits: u64,
    /// Aborts, prepared ones and subtransactions included.
    pub aborts: u64,
    /// PREPARE TRANSACTIONs.
    pub prepares: u64,
    /// Full-page images.
    pub full_page_images: u64,
    /// Heap deletes.
    pub heap_deletes: u64,
}

/// A record that recovery can stop at by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopTime {
    /// Its time.
    pub time: DateTime<Utc>,
    /// Where it starts.
    pub lsn: Lsn,
    /// The transaction that it ends.
    pub xid: Xid,
}

/// What lies across the boundary between two neighbouring segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Joined {
    /// No record; or one that a crash cut off and whose rest was overwritten: it never happened.
    None,
    /// A record that matters to planning, whole.
    Event(WalEvent),
    /// A record that does not matter to planning.
    NotOfInterest,
    /// The summaries do not tell: read the segments.
    ReadSegments,
}

/// What a summary says at both ends of its segment: enough to tell the records that cross them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// The segment.
    pub segment: SegmentName,
    /// As in the summary.
    pub page_magic: u16,
    /// As in the summary; `None` also when the record that it ends is known by now.
    pub leading: Option<Fragment>,
    /// As in the summary; `None` also when that record is known by now.
    pub unfinished: Option<Fragment>,
    /// Where records began that recovery overwrote in this segment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overwritten: Vec<Lsn>,
    /// Whether the segment could not be decoded.
    pub undecoded: bool,
    /// Whether the segment before it is still to be joined.
    pub open_start: bool,
    /// Whether the segment behind it is still to be joined.
    pub open_end: bool,
}

impl Edge {
    /// Returns the edge of a segment that no neighbour was joined with.
    pub fn of(summary: &SegmentSummary) -> Self {
        let overwritten = |event: &super::WalEvent| match event.kind {
            EventKind::OverwriteContrecord { overwritten, .. } => Some(overwritten),
            _ => None,
        };
        Self {
            segment: summary.segment,
            page_magic: summary.page_magic,
            leading: summary.leading.clone(),
            unfinished: summary.unfinished.clone(),
            overwritten: summary.events.iter().filter_map(overwritten).collect(),
            undecoded: matches!(summary.ending, SegmentEnding::Undecoded { .. }),
            open_start: true,
            open_end: true,
        }
    }

    /// Drops what is only needed to join the segment before.
    pub(super) fn close_start(&mut self) {
        (self.open_start, self.leading) = (false, None);
        self.overwritten.clear();
    }

    /// Drops what is only needed to join the segment behind.
    pub(super) fn close_end(&mut self) {
        (self.open_end, self.unfinished) = (false, None);
    }

    /// Returns whether both sides are joined.
    pub(super) fn is_closed(&self) -> bool {
        !self.open_start && !self.open_end
    }

    /// Drops the fragments' bytes: a record there is told by reading the segments only.
    pub(super) fn forget_bytes(&mut self) {
        for fragment in [&mut self.leading, &mut self.unfinished].into_iter().flatten() {
            fragment.bytes = None;
        }
    }
}

/// Returns the record that starts in `prev` and goes on in `next`, the segment right after it (on the
/// same timeline, or on a child's that forks later).
///
/// A record that goes on for further segments is answered here too: by [`Joined::NotOfInterest`] when its
/// header says so, else by [`Joined::ReadSegments`].
pub fn join(prev: &SegmentSummary, next: &SegmentSummary) -> Joined {
    if prev.segment_size != next.segment_size {
        return Joined::ReadSegments;
    }
    join_edges(&Edge::of(prev), &Edge::of(next), prev.segment_size)
}

/// Returns what [`join`] does, from the two edges between the segments.
pub fn join_edges(prev: &Edge, next: &Edge, size: SegmentSize) -> Joined {
    let neighbours = prev.segment.number(size).checked_add(1) == Some(next.segment.number(size))
        && prev.page_magic == next.page_magic;
    if !neighbours || prev.undecoded || next.undecoded {
        return Joined::ReadSegments;
    }
    let (Some(layout), Some(first)) = (Layout::for_magic(prev.page_magic), &prev.unfinished) else {
        return if prev.unfinished.is_none() { Joined::None } else { Joined::ReadSegments };
    };
    if next.overwritten.contains(&first.lsn) {
        return Joined::None;
    }
    let (Some(head), Some(rest)) = (&first.bytes, &next.leading) else { return Joined::ReadSegments };
    if let Some(header) = RecordHeader::parse(head)
        && !is_of_interest(&header, layout)
    {
        return Joined::NotOfInterest;
    }
    let (Some(end_lsn), Some(tail)) = (rest.end, &rest.bytes) else { return Joined::ReadSegments };
    let bytes = [head.as_slice(), tail.as_slice()].concat();
    let Some(header) = RecordHeader::parse(&bytes) else { return Joined::ReadSegments };
    if header.total_len as usize != bytes.len() || record_crc(&bytes) != header.crc {
        return Joined::ReadSegments;
    }
    match decode(&Record { lsn: first.lsn, end_lsn, header, bytes: &bytes }, layout) {
        Ok(Some(event)) => Joined::Event(event),
        Ok(None) => Joined::NotOfInterest,
        Err(_) => Joined::ReadSegments,
    }
}

pub(crate) mod decimal {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = std::borrow::Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

mod base64_option {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().map(|bytes| STANDARD.encode(bytes)).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        text.map(|text| STANDARD.decode(text.as_bytes()).map_err(serde::de::Error::custom)).transpose()
    }
}
