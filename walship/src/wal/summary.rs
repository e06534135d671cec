//! What one segment holds, in at most 64 KiB: the part of the archive that plans are made from.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::event::WalEvent;
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
    /// `None` means "read the segment".
    #[serde(with = "base64_option")]
    pub bytes: Option<Vec<u8>>,
    /// For `leading`: whether the record ends in this segment and its CRC is known to be right
    /// can only be told with the other part; this says where its last byte ends, when it ends here.
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
