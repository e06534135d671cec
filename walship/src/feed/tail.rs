//! Which bytes of the open segment to ship when.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::Piece;
use crate::pg::{Lsn, SegmentName, SegmentSize};

/// So many bytes that are not shipped yet are held at most; then the server has to wait.
const PENDING_BYTES_MAX: u64 = 8 << 20;

/// At once means: while so many parts are on their way. A further one waits for [`PACE`], so that a far store
/// has several on their way and a near one does not get many small ones.
const AT_ONCE_MAX: usize = 2;

/// The time between two parts that are shipped while others are on their way.
const PACE: Duration = Duration::from_millis(4);

/// How eager to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eagerness {
    /// Not at all: segments are stored when they are complete.
    Never,
    /// When bytes have waited this long.
    After(Duration),
    /// At once; where parts are on their way, what arrives meanwhile goes with the next one.
    AtOnce,
}

/// Bounds of [`TailCutter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailRules {
    /// How eager to be.
    pub eagerness: Eagerness,
    /// So many parts are on their way at once.
    pub in_flight_max: usize,
    /// The longest part in bytes.
    pub part_bytes_max: usize,
    /// What becomes of segments that the server has left behind.
    pub left_behind: LeftBehind,
}

/// What becomes of a segment that the server is a whole segment ahead of when it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftBehind {
    /// It has no parts: it is stored whole before they could be of use.
    Whole,
    /// It has parts like any other.
    InParts,
}

/// A part to ship: consecutive bytes of one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The segment.
    pub segment: SegmentName,
    /// Where the bytes begin.
    pub start: Lsn,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What is on its way into the repositories.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnTheWay {
    /// So many parts of open segments.
    pub parts: usize,
    /// So many whole segments.
    pub segments: usize,
}

/// Collects the bytes of the open segment and cuts them into parts.
///
/// No part is shipped while something before its segment is neither stored nor on its way in a part of the same
/// segment: what ends with an incomplete segment can be recovered up to there, but only while nothing later is stored.
#[derive(Debug)]
pub struct TailCutter {
    rules: TailRules,
    size: SegmentSize,
    /// What is to be shipped, in order; of one or, when eager, of several segments.
    pending: VecDeque<(SegmentName, Lsn, Bytes)>,
    pending_bytes: u64,
    since: Duration,
    hurry: bool,
    /// Before this position the server's WAL is complete.
    server: Lsn,
    /// Whether the segment that arrives is stored whole before its parts could be of use.
    passes: bool,
    /// The segment of the last part that was shipped.
    shipped: Option<SegmentName>,
    /// Before this position everything from the start of a segment on was shipped in parts.
    shipped_to: Lsn,
}

impl TailCutter {
    /// Returns a cutter that holds nothing.
    pub fn new(rules: TailRules, size: SegmentSize) -> Self {
        Self {
            rules,
            size,
            pending: VecDeque::new(),
            pending_bytes: 0,
            since: Duration::ZERO,
            hurry: false,
            server: Lsn::INVALID,
            passes: false,
            shipped: None,
            shipped_to: Lsn::INVALID,
        }
    }

    /// Takes note of how far the server's WAL goes. Where it is a whole segment ahead, the segment that
    /// arrives is not open any more: it is stored at once, without parts.
    pub fn server_is_at(&mut self, lsn: Lsn) {
        self.server = lsn;
    }

    /// Takes the next bytes.
    pub fn add(&mut self, piece: &Piece, now: Duration) {
        if piece.offset == 0 {
            // Decided once for a segment: parts without those before them would be of no use.
            let far = piece.segment.end(self.size).checked_add(self.size.bytes());
            self.passes =
                self.rules.left_behind == LeftBehind::Whole && far.is_some_and(|far| self.server >= far);
        }
        if self.passes || self.rules.eagerness == Eagerness::Never {
            return;
        }
        if self.pending.is_empty() {
            self.since = now;
        }
        let start = Lsn(piece.segment.start(self.size).0 + piece.offset);
        self.pending_bytes += piece.bytes.len() as u64;
        self.pending.push_back((piece.segment, start, piece.bytes.clone()));
        // The whole segment is on its way: its last bytes need no part of their own, unless somebody waits.
        if piece.completes && self.rules.eagerness != Eagerness::AtOnce {
            self.forget();
        }
        // Nobody waits for these parts, and what is before them takes longer than to fill all that may be held.
        if self.is_full() && self.rules.eagerness != Eagerness::AtOnce && self.shipped != Some(piece.segment)
        {
            self.forget();
            self.passes = true;
        }
    }

    fn forget(&mut self) {
        self.pending.clear();
        self.pending_bytes = 0;
        self.hurry = false;
    }

    /// Returns whether parts of this segment were shipped, or will be.
    pub fn ships(&self, segment: SegmentName) -> bool {
        self.shipped == Some(segment) || self.pending.iter().any(|(of, ..)| *of == segment)
    }

    /// Ships what is there as soon as may be: the server wants to know, or it is the end.
    pub fn hurry(&mut self) {
        self.hurry = !self.pending.is_empty();
    }

    /// Returns the next part to ship now, when so much is on its way.
    pub fn take(&mut self, now: Duration, under_way: OnTheWay) -> Option<Part> {
        if !self.may_go(under_way) || !self.is_due(now, under_way.parts) {
            return None;
        }
        let (segment, start, _) = self.pending.front()?;
        let (segment, start) = (*segment, *start);
        let mut bytes = Vec::new();
        while let Some((of, at, piece)) = self.pending.front_mut() {
            let room = self.rules.part_bytes_max - bytes.len();
            if *of != segment || room == 0 {
                break;
            }
            let taken = piece.split_to(room.min(piece.len()));
            *at = Lsn(at.0 + taken.len() as u64);
            bytes.extend_from_slice(&taken);
            if piece.is_empty() {
                self.pending.pop_front();
            }
        }
        self.pending_bytes -= bytes.len() as u64;
        self.hurry &= !self.pending.is_empty();
        self.since = now;
        let end = Lsn(start.0 + bytes.len() as u64);
        if start == self.shipped_to || start == segment.start(self.size) {
            self.shipped_to = end;
        }
        self.shipped = Some(segment);
        Some(Part { segment, start, bytes })
    }

    /// Whether the next part may go, whatever the time.
    fn may_go(&self, under_way: OnTheWay) -> bool {
        let Some((segment, start, _)) = self.pending.front() else { return false };
        if self.shipped == Some(*segment) {
            return under_way.parts < self.rules.in_flight_max;
        }
        // The first part of a segment: all before it is stored, be it whole or in parts.
        under_way.parts == 0 && (under_way.segments == 0 || self.shipped_to == *start)
    }

    fn is_due(&self, now: Duration, in_flight: usize) -> bool {
        match self.rules.eagerness {
            Eagerness::Never => false,
            Eagerness::AtOnce => {
                in_flight < AT_ONCE_MAX || self.hurry || now.saturating_sub(self.since) >= PACE
            }
            Eagerness::After(interval) => {
                self.hurry || self.is_full() || now.saturating_sub(self.since) >= interval
            }
        }
    }

    /// Whether no more bytes should be taken until parts are durable.
    pub fn is_full(&self) -> bool {
        self.pending_bytes >= PENDING_BYTES_MAX
    }

    /// Whether everything was shipped.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Returns how long the next part has to wait yet for its time, when so much is on its way; `None` when
    /// there is none, or no time at which it could go.
    pub fn next_look(&self, now: Duration, under_way: OnTheWay) -> Option<Duration> {
        let wait = match self.rules.eagerness {
            Eagerness::Never => return None,
            Eagerness::After(interval) => interval,
            Eagerness::AtOnce => PACE,
        };
        self.may_go(under_way).then(|| (self.since + wait).saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::TimelineId;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn piece(offset: u64, bytes: &'static [u8], completes: bool) -> Piece {
        let segment = SegmentName::from_number(TimelineId::FIRST, 5, SIZE).unwrap();
        Piece { segment, offset, bytes: Bytes::from_static(bytes), completes }
    }

    fn cutter(eagerness: Eagerness) -> TailCutter {
        TailCutter::new(
            TailRules { eagerness, in_flight_max: 2, part_bytes_max: 4, left_behind: LeftBehind::Whole },
            SIZE,
        )
    }

    fn parts(parts: usize) -> OnTheWay {
        OnTheWay { parts, segments: 0 }
    }

    fn start(offset: u64) -> Lsn {
        Lsn(5 * SIZE.bytes() + offset)
    }

    #[test]
    fn bytes_wait_for_their_time_or_for_somebody_who_asks() {
        let mut tail = cutter(Eagerness::After(ms(250)));
        tail.add(&piece(0, b"ab", false), ms(1000));
        tail.add(&piece(2, b"c", false), ms(1200));
        assert_eq!(tail.take(ms(1249), parts(0)), None);
        assert_eq!(tail.next_look(ms(1200), parts(0)), Some(ms(50)));
        let part = tail.take(ms(1250), parts(0)).unwrap();
        assert_eq!((part.start, &*part.bytes), (start(0), &b"abc"[..]));
        assert!(tail.is_empty() && tail.next_look(ms(1250), parts(0)).is_none(), "none without new bytes");
        tail.add(&piece(3, b"defghi", false), ms(2000));
        tail.hurry();
        assert_eq!(tail.next_look(ms(2000), parts(2)), None, "enough are on their way");
        assert_eq!(tail.take(ms(2000), parts(2)), None, "enough are on their way");
        assert_eq!(tail.take(ms(2000), parts(1)).unwrap().bytes, b"defg");
        assert_eq!(tail.take(ms(2000), parts(0)).unwrap().bytes, b"hi");
        tail.hurry();
        tail.add(&piece(9, b"j", false), ms(2000));
        assert_eq!(tail.take(ms(2000), parts(0)), None, "there was nothing to hurry");
        // The whole segment follows.
        tail.add(&piece(10, b"k", true), ms(2000));
        assert!(tail.is_empty());
    }

    #[test]
    fn one_after_the_other_goes_at_once_and_more_at_a_pace() {
        let mut tail = TailCutter::new(
            TailRules {
                eagerness: Eagerness::AtOnce,
                in_flight_max: 4,
                part_bytes_max: 4,
                left_behind: LeftBehind::Whole,
            },
            SIZE,
        );
        tail.add(&piece(0, b"ab", false), ms(1000));
        assert_eq!(tail.take(ms(1000), parts(0)).unwrap().bytes, b"ab");
        tail.add(&piece(2, b"c", false), ms(1001));
        assert_eq!(tail.take(ms(1001), parts(AT_ONCE_MAX)), None, "two are on their way");
        assert_eq!(tail.next_look(ms(1002), parts(AT_ONCE_MAX)), Some(PACE - ms(1)));
        tail.add(&piece(3, b"d", false), ms(1004));
        assert_eq!(tail.take(ms(1001) + PACE, parts(AT_ONCE_MAX)).unwrap().bytes, b"cd");
        tail.add(&piece(4, b"e", false), ms(2000));
        assert_eq!(tail.take(ms(3000), parts(4)), None, "enough are on their way");
    }

    #[test]
    fn a_segment_has_no_part_while_one_before_it_is_incomplete() {
        let next = |bytes: &'static [u8]| {
            let segment = SegmentName::from_number(TimelineId::FIRST, 6, SIZE).unwrap();
            Piece { segment, offset: 0, bytes: Bytes::from_static(bytes), completes: false }
        };
        let under_way = |parts, segments| OnTheWay { parts, segments };
        let end = SIZE.bytes() - 2;
        for from_the_start in [true, false] {
            let mut tail = cutter(Eagerness::AtOnce);
            if from_the_start {
                // As if all before were shipped.
                tail.shipped_to = start(end);
            }
            tail.add(&piece(end, b"yz", true), ms(0));
            tail.add(&next(b"ab"), ms(0));
            assert_eq!(tail.take(ms(0), under_way(0, 0)).unwrap().bytes, b"yz");
            assert_eq!(tail.take(ms(9), under_way(1, 0)), None, "the last part before is on its way");
            assert_eq!(tail.next_look(ms(9), under_way(1, 0)), None);
            // Whole it is on its way as well: its parts are enough where they are all of it.
            let part = tail.take(ms(9), under_way(0, 1));
            assert_eq!(part.is_some(), from_the_start);
        }
        // The last bytes of a segment have no part where nobody waits for them: it is to be stored whole before.
        let mut tail = cutter(Eagerness::After(ms(250)));
        tail.add(&piece(0, b"ab", false), ms(0));
        assert!(tail.take(ms(250), under_way(0, 0)).is_some());
        tail.add(&piece(2, b"cd", true), ms(300));
        tail.add(&next(b"ef"), ms(300));
        assert_eq!(tail.take(ms(999), under_way(0, 1)), None);
        assert!(tail.take(ms(999), under_way(0, 0)).is_some());
    }

    #[test]
    fn where_nobody_waits_a_slow_store_gets_whole_segments_only() {
        static MUCH: [u8; PENDING_BYTES_MAX as usize] = [7; PENDING_BYTES_MAX as usize];
        let large = SegmentSize::DEFAULT;
        let segment = SegmentName::from_number(TimelineId::FIRST, 5, large).unwrap();
        let much = Piece { segment, offset: 0, bytes: Bytes::from_static(&MUCH), completes: false };
        for (eagerness, goes_on) in [(Eagerness::After(ms(250)), true), (Eagerness::AtOnce, false)] {
            let mut tail = TailCutter::new(
                TailRules { eagerness, in_flight_max: 2, part_bytes_max: 4, left_behind: LeftBehind::Whole },
                large,
            );
            tail.add(&much, ms(0));
            assert_eq!((tail.is_full(), tail.ships(segment)), (!goes_on, !goes_on));
        }
    }

    #[test]
    fn a_segment_that_the_server_has_left_behind_has_no_parts() {
        for eagerness in [Eagerness::AtOnce, Eagerness::After(ms(250))] {
            let mut tail = cutter(eagerness);
            let end = |segments: u64| Lsn((5 + segments) * SIZE.bytes());
            tail.server_is_at(end(2));
            tail.add(&piece(0, b"ab", false), ms(0));
            tail.add(&piece(2, b"cd", true), ms(0));
            assert!(tail.is_empty() && tail.next_look(ms(0), parts(0)).is_none());
            // Only just behind: its first bytes have parts, and so have all.
            tail.server_is_at(Lsn(end(2).0 - 1));
            tail.add(&piece(0, b"ab", false), ms(0));
            tail.server_is_at(end(9));
            tail.add(&piece(2, b"cd", false), ms(0));
            assert_eq!(tail.take(ms(999), parts(0)).unwrap().bytes, b"abcd");
        }
        let mut all = cutter(Eagerness::AtOnce);
        all.rules.left_behind = LeftBehind::InParts;
        all.server_is_at(Lsn(99 * SIZE.bytes()));
        all.add(&piece(0, b"ab", false), ms(0));
        assert_eq!(all.take(ms(0), parts(0)).unwrap().bytes, b"ab");
    }

    #[test]
    fn nothing_is_shipped_where_nobody_wants_it() {
        let mut never = cutter(Eagerness::Never);
        never.add(&piece(0, b"abc", false), ms(0));
        never.hurry();
        assert_eq!(never.take(ms(9999), parts(0)), None);
    }

    proptest! {
        #[test]
        fn parts_are_all_bytes_in_order_within_segments(
            steps in proptest::collection::vec((1usize..10, 0u64..300, 0usize..3, any::<bool>()), 1..40),
            at_once in any::<bool>(),
        ) {
            static BYTES: [u8; 16] = *b"0123456789abcdef";
            let eagerness = if at_once { Eagerness::AtOnce } else { Eagerness::After(ms(250)) };
            let mut tail = cutter(eagerness);
            let (mut now, mut fed, mut shipped) = (0, 0, 0);
            let check = |part: Part, shipped: &mut u64| {
                assert_eq!(part.start, start(*shipped));
                let expected: Vec<u8> = (*shipped..).map(|at| BYTES[at as usize % 16]).take(part.bytes.len()).collect();
                assert_eq!(part.bytes, expected);
                assert!((1..=4).contains(&part.bytes.len()));
                *shipped += part.bytes.len() as u64;
            };
            for (length, pause, in_flight, hurry) in steps {
                let bytes: Vec<u8> = (fed..fed + length).map(|at| BYTES[at % 16]).collect();
                let segment = SegmentName::from_number(TimelineId::FIRST, 5, SIZE).unwrap();
                let piece = Piece { segment, offset: fed as u64, bytes: bytes.into(), completes: false };
                tail.add(&piece, ms(now));
                fed += length;
                now += pause;
                if hurry {
                    tail.hurry();
                }
                while let Some(part) = tail.take(ms(now), parts(in_flight)) {
                    check(part, &mut shipped);
                }
            }
            while let Some(part) = { tail.hurry(); tail.take(ms(now), parts(0)) } {
                check(part, &mut shipped);
            }
            prop_assert_eq!(shipped, fed as u64);
        }
    }
}
