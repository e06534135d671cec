//! The ledger of WAL that is known to be missing.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::StoredSegments;
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// WAL that is known to be missing, and why (`gaps/....json`). Whether it still is, readers compute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapRecord {
    /// The format of this document; 1.
    pub format: u32,
    /// Its id: time and 64 random bits, `20261121T010203Z-0123456789abcdef`.
    pub id: String,
    /// The timeline whose WAL is missing.
    pub timeline: TimelineId,
    /// Where it is missing from.
    pub start_lsn: Lsn,
    /// Up to where (exclusive end).
    pub end_lsn: Lsn,
    /// Why.
    pub cause: GapCause,
    /// The BLAKE3 digest, in hex, of the one segment that is missing, where other content is stored under
    /// its name.
    #[serde(default)]
    pub segment_digest: Option<String>,
    /// When it was recorded, by that machine's clock.
    pub recorded: DateTime<Utc>,
    /// The machine that recorded it.
    pub host: String,
    /// The user of that machine.
    pub user: String,
}

/// Why WAL is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapCause {
    /// For programs.
    pub kind: GapKind,
    /// For people.
    pub text: String,
}

/// Why WAL is missing, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapKind {
    /// An operator said that it will not be archived.
    GivenUp,
    /// The server had removed it before it could be streamed.
    Lost,
    /// Retention removed it on purpose: no kept backup and no moment of the window needs it.
    Expired,
    /// The record does not say, or cannot be read.
    #[serde(other)]
    Unknown,
}

impl GapRecord {
    /// Returns the segments that hold a byte of it, as numbers: first and, inclusive, last.
    pub fn segments(&self, size: SegmentSize) -> (u64, u64) {
        let last = self.end_lsn.0.saturating_sub(1).max(self.start_lsn.0);
        (self.start_lsn.0 / size.bytes(), last / size.bytes())
    }

    /// Returns whether it misses a byte of this segment.
    pub fn touches(&self, segment: SegmentName, size: SegmentSize) -> bool {
        let (first, last) = self.segments(size);
        self.timeline == segment.timeline && (first..=last).contains(&segment.number(size))
    }

    /// Returns whether it misses all of this segment.
    pub fn covers(&self, segment: SegmentName, size: SegmentSize) -> bool {
        self.timeline == segment.timeline
            && self.start_lsn <= segment.start(size)
            && segment.end(size) <= self.end_lsn
    }

    /// Returns whether the WAL was removed on purpose.
    pub fn is_expired(&self) -> bool {
        self.cause.kind == GapKind::Expired
    }

    /// Returns the segments that lie in it whole, as numbers: first and, exclusive, last.
    pub fn whole_segments(&self, size: SegmentSize) -> (u64, u64) {
        (self.start_lsn.0.div_ceil(size.bytes()), self.end_lsn.0 / size.bytes())
    }

    /// Returns whether every segment that holds a byte of it is among `stored`. That closes it, unless it
    /// misses a certain content.
    pub fn is_covered_by(&self, stored: &StoredSegments, size: SegmentSize) -> bool {
        let (first, last) = self.segments(size);
        stored.count(self.timeline, first, last.saturating_add(1)) == last - first + 1
    }
}

/// `given up by postgres on db1 at 2026-11-21 01:02:03Z: disk error`
impl fmt::Display for GapRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cause, user, host, recorded, .. } = self;
        let at = recorded.format("%Y-%m-%d %H:%M:%SZ");
        match cause.kind {
            GapKind::GivenUp => write!(f, "given up by {user} on {host} at {at}: {}", cause.text),
            GapKind::Lost => write!(f, "lost before {host} could stream it, noted at {at}: {}", cause.text),
            GapKind::Expired => write!(f, "expired by {user} on {host} at {at}: {}", cause.text),
            GapKind::Unknown => f.write_str(&cause.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    fn gap(start: u64, end: u64) -> GapRecord {
        GapRecord {
            format: 1,
            id: "20261121T010203Z-0123456789abcdef".into(),
            timeline: TimelineId::FIRST,
            start_lsn: Lsn(start),
            end_lsn: Lsn(end),
            cause: GapCause { kind: GapKind::GivenUp, text: "why".into() },
            segment_digest: None,
            recorded: DateTime::UNIX_EPOCH,
            host: "db1".into(),
            user: "postgres".into(),
        }
    }

    #[test]
    fn every_segment_with_a_byte_of_it_has_to_be_stored() {
        let mib = 1 << 20;
        let name = |number| SegmentName::from_number(TimelineId::FIRST, number, SIZE).unwrap();
        for (start, end, needed) in [
            (5 * mib, 6 * mib, &[5][..]),
            (5 * mib + 8, 5 * mib + 16, &[5]),
            (5 * mib + 8, 7 * mib + 1, &[5, 6, 7]),
            (5 * mib - 1, 5 * mib, &[4]),
        ] {
            let gap = gap(start, end);
            for number in 3..9 {
                assert_eq!(
                    gap.touches(name(number), SIZE),
                    needed.contains(&number),
                    "{start} {end} {number}"
                );
            }
            let mut stored = StoredSegments::new(SIZE);
            for (at, number) in needed.iter().enumerate() {
                assert!(!gap.is_covered_by(&stored, SIZE), "{start} {end}, {at} stored");
                stored.insert(name(*number), 1);
                let other = name(*number).on(TimelineId::new(2).unwrap());
                assert!(!gap.touches(other, SIZE) && !gap.covers(other, SIZE));
            }
            assert!(gap.is_covered_by(&stored, SIZE), "{start} {end}");
        }
        assert!(gap(5 * mib, 6 * mib).covers(name(5), SIZE));
        assert!(!gap(5 * mib + 8, 6 * mib).covers(name(5), SIZE));
    }

    #[test]
    fn kinds_of_the_future_are_unknown() {
        let text = serde_json::to_string(&gap(0, 1)).unwrap().replace("given_up", "eaten_by_mice");
        let read: GapRecord = serde_json::from_str(&text).unwrap();
        assert_eq!(read.cause.kind, GapKind::Unknown);
        assert_eq!(read.to_string(), "why");
    }
}
