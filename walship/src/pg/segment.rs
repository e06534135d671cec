//! WAL segments: their sizes, their names, and the other files PostgreSQL archives.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::timeline::HistoryFileName;
use super::{Lsn, ParseError, TimelineId};

/// A cluster's WAL segment size: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);
    /// The smallest legal size, 1 MiB.
    pub const MIN: Self = Self(1 << 20);
    /// The largest legal size, 1 GiB.
    pub const MAX: Self = Self(1 << 30);

    /// Returns the size, or `None` when PostgreSQL would not accept it.
    ///
    /// Source: `src/include/access/xlog_internal.h`, IsValidWalSegSize.
    pub fn new(bytes: u64) -> Option<Self> {
        let legal = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        legal.then_some(Self(bytes as u32))
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Returns how many segments a "log" of 4 GiB holds: 4 to 4096.
    pub fn per_log(self) -> u64 {
        (1u64 << 32) / self.bytes()
    }

    /// Returns the offset of `lsn` within its segment.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 & (self.bytes() - 1)
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = ParseError;

    fn try_from(bytes: u64) -> Result<Self, ParseError> {
        Self::new(bytes).ok_or_else(|| {
            ParseError::new(format!("{bytes} is not a WAL segment size (a power of two from 1 MiB to 1 GiB)"))
        })
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> Self {
        size.bytes()
    }
}

impl fmt::Debug for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

/// Reads exactly `digits` upper-case hex digits; PostgreSQL's names hold no lower-case ones.
pub(crate) fn upper_hex(text: &str, digits: usize) -> Option<u32> {
    let upper = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    (text.len() == digits && text.bytes().all(upper)).then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

/// The name of a WAL segment, `000000010000000A0000004C`; ordered by timeline, then position.
///
/// Any 24 digits are a name; whether one is legal depends on the segment size
/// ([`SegmentName::is_legal`]), which is therefore passed to whatever does arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline.
    pub timeline: TimelineId,
    /// The middle eight digits: the position's upper 32 bits.
    pub log: u32,
    /// The last eight digits: the segment's number within its log.
    pub seg: u32,
}

impl SegmentName {
    /// Returns the segment with this number counted from the start of the WAL; `None` when the
    /// number lies past the 64-bit LSN space.
    pub fn from_number(timeline: TimelineId, number: u64, size: SegmentSize) -> Option<Self> {
        let log = u32::try_from(number / size.per_log()).ok()?;
        Some(Self { timeline, log, seg: (number % size.per_log()) as u32 })
    }

    /// Returns the segment holding the byte at `lsn`; on a boundary, the one that starts there.
    ///
    /// For an exclusive end position use [`SegmentName::ending_at`].
    /// Source: `src/include/access/xlog_internal.h`, XLByteToSeg.
    pub fn containing(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> Self {
        Self { timeline, log: (lsn.0 >> 32) as u32, seg: ((lsn.0 & 0xFFFF_FFFF) / size.bytes()) as u32 }
    }

    /// Returns the segment holding the byte before `end`; `None` for 0/0, which ends nothing.
    ///
    /// Source: `src/include/access/xlog_internal.h`, XLByteToPrevSeg.
    pub fn ending_at(timeline: TimelineId, end: Lsn, size: SegmentSize) -> Option<Self> {
        end.0.checked_sub(1).map(|last| Self::containing(timeline, Lsn(last), size))
    }

    /// Returns whether the last eight digits are possible with this segment size.
    pub fn is_legal(self, size: SegmentSize) -> bool {
        u64::from(self.seg) < size.per_log()
    }

    /// Returns the segment's number counted from the start of the WAL.
    pub fn number(self, size: SegmentSize) -> u64 {
        u64::from(self.log) * size.per_log() + u64::from(self.seg)
    }

    /// Returns the position of the segment's first byte.
    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn((u64::from(self.log) << 32).wrapping_add(u64::from(self.seg).wrapping_mul(size.bytes())))
    }

    /// Returns the position after the segment's last byte; saturates at the end of the LSN space.
    pub fn end(self, size: SegmentSize) -> Lsn {
        Lsn(self.start(size).0.saturating_add(size.bytes()))
    }

    /// Returns the following segment on the same timeline; `None` at the end of the LSN space.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        Self::from_number(self.timeline, self.number(size).checked_add(1)?, size)
    }

    /// Returns the preceding segment on the same timeline; `None` for the first.
    pub fn previous(self, size: SegmentSize) -> Option<Self> {
        Self::from_number(self.timeline, self.number(size).checked_sub(1)?, size)
    }

    /// Returns the same position on another timeline.
    pub fn on(self, timeline: TimelineId) -> Self {
        Self { timeline, ..self }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.seg)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SegmentName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let part = |range: std::ops::Range<usize>| text.get(range).and_then(|digits| upper_hex(digits, 8));
        let parsed = (text.len() == 24)
            .then(|| Some((TimelineId::new(part(0..8)?)?, part(8..16)?, part(16..24)?)))
            .flatten();
        let (timeline, log, seg) =
            parsed.ok_or_else(|| ParseError::new(format!("{text:?} is not the name of a WAL segment")))?;
        Ok(Self { timeline, log, seg })
    }
}

impl Serialize for SegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of any file that PostgreSQL archives or asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// A whole segment.
    Segment(SegmentName),
    /// `<segment>.partial`: the last segment of a timeline that was left by a promotion.
    Partial(SegmentName),
    /// `<timeline>.history`.
    History(TimelineId),
    /// `<segment>.<offset>.backup`: the backup history file of an online backup.
    BackupHistory(SegmentName, u32),
}

impl WalFileName {
    /// Returns the timeline in the name.
    pub fn timeline(self) -> TimelineId {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::BackupHistory(name, _) => name.timeline,
            Self::History(timeline) => timeline,
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => write!(f, "{name}"),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::History(timeline) => write!(f, "{}", HistoryFileName(*timeline)),
            Self::BackupHistory(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for WalFileName {
    type Err = ParseError;

    /// Parses a bare file name; anything with a folder, a dot segment or lower-case digits is refused.
    ///
    /// Source: `src/include/access/xlog_internal.h`, IsXLogFileName, IsPartialXLogFileName,
    /// IsTLHistoryFileName, IsBackupHistoryFileName.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.len() == 24 {
            return text.parse().map(Self::Segment);
        }
        if let Ok(HistoryFileName(timeline)) = text.parse() {
            return Ok(Self::History(timeline));
        }
        let other = || {
            let name = text.get(..24)?.parse::<SegmentName>().ok()?;
            let rest = text.get(24..)?;
            if rest == ".partial" {
                return Some(Self::Partial(name));
            }
            let offset = rest.strip_prefix('.')?.strip_suffix(".backup")?;
            Some(Self::BackupHistory(name, upper_hex(offset, 8)?))
        };
        other().ok_or_else(|| {
            ParseError::new(format!("{text:?} is not the name of a file that PostgreSQL archives"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> impl Iterator<Item = SegmentSize> {
        (20..=30).map(|bits| SegmentSize::new(1 << bits).unwrap())
    }

    #[test]
    fn only_legal_sizes_exist() {
        assert_eq!(sizes().count(), 11);
        for bytes in [0, 1, 8192, (1 << 20) - 1, 3 << 20, 1 << 31, u64::MAX] {
            assert!(SegmentSize::new(bytes).is_none(), "{bytes}");
        }
    }

    #[test]
    fn wal_file_names_round_trip_and_refuse_the_rest() {
        for text in [
            "000000010000000A0000004C",
            "000000010000000A0000004C.partial",
            "00000002.history",
            "000000010000000A0000004C.00000028.backup",
        ] {
            assert_eq!(text.parse::<WalFileName>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "..",
            "../000000010000000A0000004C",
            "000000010000000a0000004c",
            "000000000000000A0000004C",
            "000000010000000A0000004C.",
            "000000010000000A0000004C.backup",
            "00000000.history",
            "2.history",
            "000000010000000A0000004C.00000028.backup.x",
            "00000001000000\u{e9}A0000004C",
            "RECOVERYXLOG",
        ] {
            assert!(text.parse::<WalFileName>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn arithmetic_agrees_for_every_size(lsn in any::<u64>(), bits in 20u32..=30) {
            let size = SegmentSize::new(1 << bits).unwrap();
            let name = SegmentName::containing(TimelineId::FIRST, Lsn(lsn), size);
            prop_assert!(name.is_legal(size));
            prop_assert_eq!(name.number(size), lsn / size.bytes());
            prop_assert_eq!(SegmentName::from_number(TimelineId::FIRST, name.number(size), size), Some(name));
            prop_assert!(name.start(size).0 <= lsn && lsn - name.start(size).0 == size.offset_of(Lsn(lsn)));
            prop_assert_eq!(name.to_string().parse::<SegmentName>().unwrap(), name);
            if let Some(next) = name.next(size) {
                prop_assert_eq!(next.start(size), name.end(size));
                prop_assert_eq!(next.previous(size), Some(name));
                prop_assert_eq!(SegmentName::ending_at(TimelineId::FIRST, next.start(size), size), Some(name));
            }
        }
    }
}
