//! Which WAL is lost when a server has removed it: found in few questions, told timeline by timeline.

use crate::pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};

use super::resume::owners;

/// WAL of one timeline, `[start, end)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The timeline.
    pub timeline: TimelineId,
    /// Its first byte.
    pub start: Lsn,
    /// The position after its last byte.
    pub end: Lsn,
}

/// Looks for the first segment that a server still has: it removes them from the oldest on.
///
/// ```
/// use walship::feed::Search;
///
/// let (mut search, mut questions) = (Search::between(10, 500), 0);
/// while let Some(number) = search.question() {
///     questions += 1;
///     search.answer(number, number >= 321);
/// }
/// assert_eq!((search.first(), questions), (321, 9));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Search {
    missing: u64,
    there: u64,
}

impl Search {
    /// Returns a search: the server does not have the segment with number `missing`, and has `there`.
    pub fn between(missing: u64, there: u64) -> Self {
        Self { missing, there: there.max(missing.saturating_add(1)) }
    }

    /// Returns the number of the segment to ask for next; `None` when the answer is known.
    pub fn question(&self) -> Option<u64> {
        (self.there - self.missing > 1).then(|| self.missing + (self.there - self.missing) / 2)
    }

    /// Notes whether the server has the segment that was asked for.
    pub fn answer(&mut self, number: u64, there: bool) {
        if there {
            self.there = self.there.min(number);
        } else {
            self.missing = self.missing.max(number);
        }
    }

    /// Returns the number of the first segment that is there, as far as that is known.
    pub fn first(&self) -> u64 {
        self.there
    }
}

/// Returns the youngest timeline of the path that the segment with this number belongs to: it holds all
/// bytes of the path.
pub fn owner(path: &TimelineHistory, number: u64, size: SegmentSize) -> TimelineId {
    let owners = owners(path, size);
    owners.into_iter().find(|(_, first, _)| *first <= number).map_or(path.timeline, |(timeline, ..)| timeline)
}

/// Returns the segments with the numbers `from` to below `to` as stretches of the timelines that they belong
/// to, oldest first.
pub fn stretches(path: &TimelineHistory, from: u64, to: u64, size: SegmentSize) -> Vec<Stretch> {
    let start = |number: u64| Lsn(number.saturating_mul(size.bytes()));
    let owners = owners(path, size).into_iter().rev();
    let parts = owners.map(|(timeline, first, last)| Stretch {
        timeline,
        start: start(first.max(from)),
        end: start(last.saturating_add(1).min(to)),
    });
    parts.filter(|stretch| stretch.start < stretch.end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    #[test]
    fn what_is_lost_is_told_timeline_by_timeline() {
        let tli = |number| TimelineId::new(number).unwrap();
        let path = TimelineHistory::parse(tli(5), "1\t0/1400100\n3\t0/2000000\n").unwrap();
        let at = |number: u64| Lsn(number * SIZE.bytes());
        // The segment with the fork is the younger one's.
        let told = |from, to| -> Vec<(u32, u64, u64)> {
            stretches(&path, from, to, SIZE)
                .into_iter()
                .map(|s| (s.timeline.get(), s.start.0 / SIZE.bytes(), s.end.0 / SIZE.bytes()))
                .collect()
        };
        assert_eq!(told(18, 40), [(1, 18, 20), (3, 20, 32), (5, 32, 40)]);
        assert_eq!(told(20, 21), [(3, 20, 21)]);
        assert_eq!(told(21, 21), []);
        assert_eq!(stretches(&path, 33, 34, SIZE)[0].start, at(33));
        for (number, expected) in [(0, 1), (19, 1), (20, 3), (31, 3), (32, 5), (99, 5)] {
            assert_eq!(owner(&path, number, SIZE), tli(expected), "{number}");
        }
    }

    proptest! {
        #[test]
        fn the_first_segment_is_found_in_few_questions(
            missing in 0u64..1000,
            length in 1u64..100_000,
            fraction in 0.0..1.0f64,
        ) {
            let first = missing + 1 + (length as f64 * fraction) as u64;
            let first = first.min(missing + length);
            let mut search = Search::between(missing, missing + length);
            let mut questions = 0;
            while let Some(number) = search.question() {
                prop_assert!(number > missing && number < missing + length);
                search.answer(number, number >= first);
                questions += 1;
            }
            prop_assert_eq!(search.first(), first);
            prop_assert!(questions <= 17, "{} questions", questions);
        }
    }
}
