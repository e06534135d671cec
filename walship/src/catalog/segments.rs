//! Which segments are stored: runs, not names, so that ten million take no room.

use std::collections::{BTreeMap, BTreeSet};

use super::SegmentRun;
use crate::pg::{SegmentName, SegmentSize, TimelineId};
use crate::wal::rollup::Run;

/// The whole segments that are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSegments {
    size: SegmentSize,
    /// Unbroken runs: first to last.
    runs: BTreeMap<SegmentName, SegmentName>,
    /// What is known of their stored bytes, in pieces that may span gaps.
    pieces: BTreeMap<SegmentName, Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    last: SegmentName,
    stored_bytes: u64,
    has_gaps: bool,
}

impl StoredSegments {
    /// Returns an empty set of segments of this size.
    pub fn new(size: SegmentSize) -> Self {
        Self { size, runs: BTreeMap::new(), pieces: BTreeMap::new() }
    }

    /// Returns the segments' size.
    pub fn size(&self) -> SegmentSize {
        self.size
    }

    /// Adds one segment with its stored size in bytes.
    pub fn insert(&mut self, name: SegmentName, stored_bytes: u64) {
        self.insert_runs(&[Run { first: name, segments: 1 }], stored_bytes);
    }

    /// Adds runs of one timeline, in WAL order, with the stored size of all their segments together.
    pub fn insert_runs(&mut self, runs: &[Run], stored_bytes: u64) {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return };
        for run in runs {
            self.insert_run(run.first, self.last_of(run));
        }
        let last = self.last_of(last);
        self.pieces.insert(first.first, Piece { last, stored_bytes, has_gaps: runs.len() > 1 });
    }

    /// Adds all segments of another set.
    pub fn append(&mut self, other: Self) {
        other.runs.into_iter().for_each(|(first, last)| self.insert_run(first, last));
        self.pieces.extend(other.pieces);
    }

    fn last_of(&self, run: &Run) -> SegmentName {
        let number = run.first.number(self.size).saturating_add(run.segments.saturating_sub(1));
        SegmentName::from_number(run.first.timeline, number, self.size).unwrap_or(run.first)
    }

    fn insert_run(&mut self, mut first: SegmentName, mut last: SegmentName) {
        let before = self.runs.range(..=first).next_back().map(|(from, to)| (*from, *to));
        if let Some((from, to)) = before
            && from.timeline == first.timeline
            && (to >= first || to.next(self.size) == Some(first))
        {
            first = from;
            last = last.max(to);
        }
        // Everything that begins inside, or right behind, becomes one with it.
        let reach = last.next(self.size).unwrap_or(last);
        let swallowed: Vec<_> = self.runs.range(first..=reach).map(|(from, to)| (*from, *to)).collect();
        for (from, to) in swallowed {
            if from.timeline == first.timeline {
                self.runs.remove(&from);
                last = last.max(to);
            }
        }
        self.runs.insert(first, last);
    }

    /// Takes one segment out; returns the stored size that was known of it alone.
    pub fn remove(&mut self, name: &SegmentName) -> Option<u64> {
        let (first, last) = self.run_of(*name)?;
        self.runs.remove(&first);
        if let Some(before) = name.previous(self.size).filter(|before| *before >= first) {
            self.runs.insert(first, before);
        }
        if let Some(behind) = name.next(self.size).filter(|behind| *behind <= last) {
            self.runs.insert(behind, last);
        }
        let alone = self.pieces.get(name).is_some_and(|piece| piece.last == *name);
        alone.then(|| self.pieces.remove(name)).flatten().map(|piece| piece.stored_bytes)
    }

    /// Takes out every segment of a timeline whose number is at least `from` and below `until`. What their stored
    /// sizes are in pieces that reach beyond the range is not known any more.
    pub fn remove_range(&mut self, timeline: TimelineId, from: u64, until: u64) {
        let name = |number| SegmentName::from_number(timeline, number, self.size);
        let (Some(first), Some(last)) = (name(from), until.checked_sub(1).and_then(name)) else { return };
        if last < first {
            return;
        }
        let touched: Vec<_> = self
            .runs
            .range(SegmentName { timeline, log: 0, seg: 0 }..=last)
            .filter(|(_, end)| **end >= first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touched {
            self.runs.remove(&start);
            if let Some(before) = first.previous(self.size).filter(|before| *before >= start) {
                self.runs.insert(start, before);
            }
            if let Some(behind) = last.next(self.size).filter(|behind| *behind <= end) {
                self.runs.insert(behind, end);
            }
        }
        let pieces: Vec<_> = self.pieces.range(first..=last).map(|(start, _)| *start).collect();
        for start in &pieces {
            self.pieces.remove(start);
        }
        let before = self.pieces.range_mut(SegmentName { timeline, log: 0, seg: 0 }..first);
        before.filter(|(_, piece)| piece.last >= first).for_each(|(_, piece)| piece.has_gaps = true);
    }

    fn run_of(&self, name: SegmentName) -> Option<(SegmentName, SegmentName)> {
        let (&first, &last) = self.runs.range(..=name).next_back()?;
        (first.timeline == name.timeline && last >= name).then_some((first, last))
    }

    /// Returns whether a segment is stored.
    pub fn contains(&self, name: SegmentName) -> bool {
        self.run_of(name).is_some()
    }

    /// Returns the last segment of the unbroken run that a stored segment belongs to.
    pub fn run_end(&self, name: SegmentName) -> Option<SegmentName> {
        self.run_of(name).map(|(_, last)| last)
    }

    /// Returns the first stored segment of the same timeline that is not before `name`.
    pub fn first_from(&self, name: SegmentName) -> Option<SegmentName> {
        if self.contains(name) {
            return Some(name);
        }
        let next = *self.runs.range(name..).next()?.0;
        (next.timeline == name.timeline).then_some(next)
    }

    /// Returns the last stored segment of a timeline.
    pub fn last_of_timeline(&self, timeline: TimelineId) -> Option<SegmentName> {
        let first = SegmentName { timeline, log: 0, seg: 0 };
        let last = SegmentName { timeline, log: u32::MAX, seg: u32::MAX };
        self.runs.range(first..=last).next_back().map(|(_, last)| *last)
    }

    /// Returns the stored size of the segments of an unbroken piece that begins here and ends before or at
    /// `last`, and the piece's last segment.
    pub fn piece(&self, first: SegmentName, last: SegmentName) -> Option<(SegmentName, u64)> {
        let piece = self.pieces.get(&first).filter(|piece| piece.last <= last && !piece.has_gaps)?;
        Some((piece.last, piece.stored_bytes))
    }

    /// Returns how many segments of a timeline are stored whose numbers are at least `from` and below `until`.
    pub fn count(&self, timeline: TimelineId, from: u64, until: u64) -> u64 {
        let first = SegmentName { timeline, log: 0, seg: 0 };
        let last = SegmentName { timeline, log: u32::MAX, seg: u32::MAX };
        let overlaps = self.runs.range(first..=last).map(|(run_first, run_last)| {
            let end = run_last.number(self.size).saturating_add(1).min(until);
            end.saturating_sub(run_first.number(self.size).max(from))
        });
        overlaps.sum()
    }

    /// Returns every timeline of which a segment is stored.
    pub fn timelines(&self) -> BTreeSet<TimelineId> {
        self.runs.keys().map(|first| first.timeline).collect()
    }

    /// Returns the unbroken runs of a timeline in WAL order. What a piece that spans gaps takes is counted
    /// to the run that it begins in.
    pub fn runs(&self, timeline: TimelineId) -> Vec<SegmentRun> {
        let from = SegmentName { timeline, log: 0, seg: 0 };
        let to = SegmentName { timeline, log: u32::MAX, seg: u32::MAX };
        let runs = self.runs.range(from..=to).map(|(&first, &last)| {
            let pieces = self.pieces.range(first..=last);
            let stored_bytes = pieces.fold(0, |sum: u64, (_, piece)| sum.saturating_add(piece.stored_bytes));
            SegmentRun { first, last, stored_bytes }
        });
        runs.collect()
    }

    /// Returns every stored segment's name.
    pub fn names(&self) -> impl Iterator<Item = SegmentName> + '_ {
        self.runs.iter().flat_map(|(first, last)| {
            let names = std::iter::successors(Some(*first), |name| name.next(self.size));
            names.take_while(move |name| name <= last)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_what_a_set_of_names_is(
            adds in proptest::collection::vec((1u32..3, 0u64..40, 1u64..6), 0..30),
            removes in proptest::collection::vec((1u32..3, 0u64..40), 0..10),
            ranges in proptest::collection::vec((1u32..3, 0u64..40, 0u64..12), 0..4),
        ) {
            let size = SegmentSize::MAX;
            let name = |tli: u32, number| SegmentName::from_number(TimelineId::new(tli).unwrap(), number, size).unwrap();
            let (mut stored, mut set) = (StoredSegments::new(size), BTreeSet::new());
            for (tli, number, segments) in adds {
                stored.insert_runs(&[Run { first: name(tli, number), segments }], segments);
                set.extend((number..number + segments).map(|number| name(tli, number)));
            }
            for (tli, number) in removes {
                stored.remove(&name(tli, number));
                set.remove(&name(tli, number));
            }
            for (tli, from, length) in ranges {
                stored.remove_range(TimelineId::new(tli).unwrap(), from, from + length);
                for number in from..from + length {
                    set.remove(&name(tli, number));
                }
            }
            prop_assert_eq!(stored.names().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
            for number in 0..50 {
                let asked = name(1, number);
                prop_assert_eq!(stored.contains(asked), set.contains(&asked));
                let next = set.range(asked..).next().filter(|next| next.timeline == asked.timeline);
                prop_assert_eq!(stored.first_from(asked), next.copied());
            }
            for pair in stored.runs(TimelineId::FIRST).windows(2) {
                prop_assert!(pair[0].last.next(size).unwrap() < pair[1].first);
            }
        }
    }
}
