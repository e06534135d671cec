//! Numbers and when each was last proven, as spans that do not overlap.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

/// Consecutive numbers (the end excluded) that were proven at the same time, or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The first.
    pub from: u64,
    /// The one behind the last.
    pub until: u64,
    /// When; `None`: never.
    pub at: Option<DateTime<Utc>>,
}

/// When each number was last proven.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans(BTreeMap<u64, (u64, DateTime<Utc>)>);

impl Spans {
    /// Notes that these numbers were proven; what was proven later stays so.
    pub fn put(&mut self, from: u64, until: u64, at: DateTime<Utc>) {
        if from >= until {
            return;
        }
        let pieces = self.pieces(from, until);
        self.carve(from, until);
        for piece in pieces {
            let at = piece.at.map_or(at, |known| known.max(at));
            self.0.insert(piece.from, (piece.until, at));
        }
        self.join(from, until);
    }

    /// Forgets these numbers.
    pub fn carve(&mut self, from: u64, until: u64) {
        if from >= until {
            return;
        }
        let touched: Vec<_> = self
            .0
            .range(..until)
            .rev()
            .take_while(|(_, (end, _))| *end > from)
            .map(|(start, (end, at))| (*start, *end, *at))
            .collect();
        for (start, end, at) in touched {
            self.0.remove(&start);
            if start < from {
                self.0.insert(start, (from, at));
            }
            if until < end {
                self.0.insert(until, (end, at));
            }
        }
    }

    /// Joins neighbours of one time, from the one before `from` to the one behind `until`.
    fn join(&mut self, from: u64, until: u64) {
        let first = self.0.range(..from).next_back().map_or(from, |(start, _)| *start);
        let spans: Vec<_> =
            self.0.range(first..=until).map(|(start, (end, at))| (*start, *end, *at)).collect();
        let mut last: Option<(u64, u64, DateTime<Utc>)> = None;
        for (start, end, at) in spans {
            match last {
                Some((begin, reach, time)) if reach == start && time == at => {
                    self.0.remove(&start);
                    self.0.insert(begin, (end, at));
                    last = Some((begin, end, at));
                }
                _ => last = Some((start, end, at)),
            }
        }
    }

    /// Returns a range in pieces of one time each, in order; nothing is left out.
    pub fn pieces(&self, from: u64, until: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut at = from;
        let first = self.0.range(..=from).next_back().map_or(from, |(start, _)| *start);
        for (start, (end, time)) in self.0.range(first..until) {
            let (start, end) = ((*start).max(at), (*end).min(until));
            if start >= end {
                continue;
            }
            if at < start {
                pieces.push(Piece { from: at, until: start, at: None });
            }
            pieces.push(Piece { from: start, until: end, at: Some(*time) });
            at = end;
        }
        if at < until {
            pieces.push(Piece { from: at, until, at: None });
        }
        pieces
    }

    /// Returns all spans in order.
    pub fn all(&self) -> impl Iterator<Item = Piece> + '_ {
        self.0.iter().map(|(from, (until, at))| Piece { from: *from, until: *until, at: Some(*at) })
    }

    /// Makes neighbours one, as old as the older, until at most so many spans are left. Numbers between that were never
    /// proven stay so: then there may be more.
    pub fn bound(&mut self, spans_max: usize) {
        while self.0.len() > spans_max {
            let before = self.0.len();
            let old = std::mem::take(&mut self.0);
            let mut last: Option<Piece> = None;
            let mut joined = false;
            for (from, (until, at)) in old {
                match &mut last {
                    Some(piece) if piece.until == from && !joined => {
                        piece.until = until;
                        piece.at = piece.at.map(|time| time.min(at));
                        joined = true;
                    }
                    _ => {
                        self.take(last.take());
                        last = Some(Piece { from, until, at: Some(at) });
                        joined = false;
                    }
                }
            }
            self.take(last);
            if self.0.len() == before {
                return;
            }
        }
    }

    fn take(&mut self, piece: Option<Piece>) {
        if let Some(Piece { from, until, at: Some(at) }) = piece {
            self.0.insert(from, (until, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).unwrap()
    }

    proptest! {
        #[test]
        fn spans_are_what_a_map_of_numbers_is(
            steps in proptest::collection::vec((0u64..60, 0u64..12, 0i64..6, any::<bool>()), 0..40),
            spans_max in 1usize..20,
        ) {
            let (mut spans, mut map) = (Spans::default(), BTreeMap::new());
            for (from, count, at, carve) in steps {
                if carve && at == 0 {
                    spans.carve(from, from + count);
                    map.retain(|number, _| !(from..from + count).contains(number));
                    continue;
                }
                spans.put(from, from + count, time(at));
                for number in from..from + count {
                    let known = map.entry(number).or_insert(time(at));
                    *known = (*known).max(time(at));
                }
            }
            let numbers = |spans: &Spans| -> BTreeMap<u64, DateTime<Utc>> {
                spans.all().flat_map(|piece| (piece.from..piece.until).map(move |number| (number, piece.at.unwrap()))).collect()
            };
            prop_assert_eq!(&numbers(&spans), &map);
            let all: Vec<_> = spans.all().collect();
            for pair in all.windows(2) {
                prop_assert!(pair[0].until < pair[1].from || pair[0].at != pair[1].at, "neighbours are joined");
            }
            let pieces = spans.pieces(3, 70);
            prop_assert_eq!((pieces[0].from, pieces.last().unwrap().until), (3, 70));
            for piece in pieces {
                for number in piece.from..piece.until {
                    prop_assert_eq!(map.get(&number).copied(), piece.at);
                }
            }
            // Fewer spans say no more than was proven, and nothing newer.
            spans.bound(spans_max);
            let fewer = numbers(&spans);
            prop_assert_eq!(fewer.keys().collect::<Vec<_>>(), map.keys().collect::<Vec<_>>());
            prop_assert!(fewer.iter().all(|(number, at)| *at <= map[number]));
        }
    }
}
