//! From a stream of WAL to pieces of segments.

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Consecutive bytes of one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The segment.
    pub segment: SegmentName,
    /// Where in it the bytes begin.
    pub offset: u64,
    /// The bytes; never empty.
    pub bytes: Bytes,
    /// Whether the segment is complete with them.
    pub completes: bool,
}

/// Cuts the WAL of one timeline at segment boundaries; insists that no byte is missing or comes twice.
#[derive(Debug)]
pub struct Cutter {
    timeline: TimelineId,
    size: SegmentSize,
    next: Lsn,
}

impl Cutter {
    /// Returns a cutter for WAL from `start` on.
    pub fn new(timeline: TimelineId, start: Lsn, size: SegmentSize) -> Self {
        Self { timeline, size, next: start }
    }

    /// Returns the position of the next byte.
    pub fn position(&self) -> Lsn {
        self.next
    }

    /// Returns the timeline.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Returns the segment of the next byte.
    pub fn segment(&self) -> SegmentName {
        SegmentName::containing(self.timeline, self.next, self.size)
    }

    /// Returns the next piece of what `bytes` holds, which begins at `start`, and takes it off; `None` when
    /// nothing is left.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the bytes do not follow on those before.
    pub fn take(&mut self, start: &mut Lsn, bytes: &mut Bytes) -> Result<Option<Piece>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let wrong = |what: String| {
            Error::corrupt(what).with_safe("the bytes were not used").with_next(
                "The connection is made anew. If it happens again, check the server's storage and network.",
            )
        };
        if *start != self.next {
            return Err(wrong(format!("the server sends WAL from {start} where {} is next", self.next)));
        }
        let offset = self.size.offset_of(self.next);
        let room = self.size.bytes() - offset;
        let length = room.min(bytes.len() as u64);
        let Some(next) = self.next.checked_add(length) else {
            return Err(wrong("the server sends WAL past the end of all positions".to_owned()));
        };
        let segment = self.segment();
        // At most as long as the bytes themselves.
        let taken = bytes.split_to(usize::try_from(length).unwrap_or(bytes.len()));
        self.next = next;
        *start = next;
        Ok(Some(Piece { segment, offset, bytes: taken, completes: length == room }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    fn take_all(cutter: &mut Cutter, start: Lsn, bytes: Bytes) -> Result<Vec<Piece>> {
        let (mut start, mut bytes, mut pieces) = (start, bytes, Vec::new());
        while let Some(piece) = cutter.take(&mut start, &mut bytes)? {
            pieces.push(piece);
        }
        Ok(pieces)
    }

    #[test]
    fn a_jump_or_a_repetition_is_refused() {
        for wrong in [0, SIZE.bytes() - 1, SIZE.bytes() + 1] {
            let mut cutter = Cutter::new(TimelineId::FIRST, Lsn(SIZE.bytes()), SIZE);
            let error = take_all(&mut cutter, Lsn(wrong), Bytes::from_static(b"x")).unwrap_err();
            assert!(matches!(error, Error::Corrupt(_)), "{error}");
            assert_eq!(cutter.position(), Lsn(SIZE.bytes()));
        }
        let mut end = Cutter::new(TimelineId::FIRST, Lsn(u64::MAX), SIZE);
        assert!(take_all(&mut end, Lsn(u64::MAX), Bytes::from_static(b"xy")).is_err());
    }

    proptest! {
        #[test]
        fn pieces_are_the_stream(
            skip in 0u64..3 << 20,
            lengths in proptest::collection::vec(0usize..3 << 20, 0..5),
        ) {
            let (mut cutter, mut position) = (Cutter::new(TimelineId::FIRST, Lsn(skip), SIZE), skip);
            for (number, length) in lengths.into_iter().enumerate() {
                let bytes = Bytes::from(vec![number as u8; length]);
                let pieces = take_all(&mut cutter, Lsn(position), bytes).unwrap();
                for piece in &pieces {
                    prop_assert_eq!(piece.segment.start(SIZE).0 + piece.offset, position);
                    position += piece.bytes.len() as u64;
                    prop_assert!(!piece.bytes.is_empty() && position <= piece.segment.end(SIZE).0);
                    prop_assert_eq!(piece.completes, position == piece.segment.end(SIZE).0);
                }
                prop_assert_eq!(pieces.iter().map(|piece| piece.bytes.len()).sum::<usize>(), length);
                prop_assert_eq!(cutter.position(), Lsn(position));
            }
        }
    }
}
