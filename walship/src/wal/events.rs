//! All events of a run of segments, those of records that cross segments included.

use super::decode::decode;
use super::event::WalEvent;
use super::reader::{Reader, Stop};
use super::record::UnknownLayout;
use crate::pg::{Lsn, SegmentName, SegmentSize};

/// What [`events_of`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentEvents {
    /// The events, in WAL order.
    pub events: Vec<WalEvent>,
    /// Where reading ended early, and why; nothing is known of what lies behind. `None` when the
    /// segments were read to their end.
    pub broken: Option<Broken>,
}

/// Where and why reading a run of segments ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The segment in which it did.
    pub segment: SegmentName,
    /// The position.
    pub lsn: Lsn,
    /// What is wrong there.
    pub what: String,
}

/// Returns every event of consecutive segments, in WAL order.
///
/// A record that crosses from one of them into the next is reported once. The record whose first part
/// lies before the first segment is not reported, nor the one whose last part lies behind the last.
/// Names may change timeline along the way (parent's segment, then the child's); where the
/// positions are not consecutive, reading starts afresh.
pub fn events_of(segments: &[(SegmentName, &[u8])], size: SegmentSize) -> SegmentEvents {
    let mut events = Vec::new();
    let mut reader = EventReader::new(size);
    for (name, bytes) in segments {
        if let Err(broken) = reader.segment(*name, bytes, |event| events.push(event)) {
            return SegmentEvents { events, broken: Some(broken) };
        }
    }
    SegmentEvents { events, broken: None }
}

/// Reads events segment by segment, so that only one segment need be in memory; see [`events_of`].
#[derive(Debug)]
pub struct EventReader {
    size: SegmentSize,
    reader: Option<Reader>,
    next: Option<Lsn>,
}

impl EventReader {
    /// Returns a reader for segments of this size.
    pub fn new(size: SegmentSize) -> Self {
        Self { size, reader: None, next: None }
    }

    /// Reads one whole segment; `give` gets each event of a record that ends in it.
    ///
    /// # Errors
    /// [`Broken`] when valid WAL ends before the segment does, or a record that matters has an unknown
    /// layout. After that the reader starts afresh.
    pub fn segment(
        &mut self,
        name: SegmentName,
        bytes: &[u8],
        mut give: impl FnMut(WalEvent),
    ) -> Result<(), Broken> {
        let start = name.start(self.size);
        let mut reader = match self.reader.take() {
            Some(reader) if self.next == Some(start) => reader,
            _ => Reader::new(start, name.timeline, self.size),
        };
        reader.set_timeline_limit(name.timeline);
        let broken = |lsn: Lsn, what: String| Broken { segment: name, lsn, what };
        let mut unknown: Option<(Lsn, UnknownLayout)> = None;
        let len = usize::try_from(self.size.bytes()).unwrap_or(usize::MAX);
        reader.push(&bytes[..bytes.len().min(len)], |record, layout| match decode(record, layout) {
            Ok(Some(event)) if unknown.is_none() => give(event),
            Ok(_) => {}
            Err(error) => unknown = unknown.or(Some((record.lsn, error))),
        });
        if let Some((lsn, error)) = unknown {
            return Err(broken(lsn, error.to_string()));
        }
        if let Some(Stop { lsn, reason }) = reader.stop() {
            return Err(broken(lsn, reason.to_string()));
        }
        if bytes.len() != len {
            let what = format!("the segment has {} bytes instead of {len}", bytes.len());
            return Err(broken(Lsn(start.0.saturating_add(bytes.len() as u64)), what));
        }
        self.next = Some(name.end(self.size));
        self.reader = Some(reader);
        Ok(())
    }
}
