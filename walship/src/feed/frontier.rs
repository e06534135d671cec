//! How far everything is durable, whatever the order in which stores say so.

use std::collections::BTreeMap;

use crate::pg::Lsn;

/// The position before which all WAL is durable. It moves only over unbroken ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontier {
    durable: Lsn,
    /// Durable ranges behind a hole: start to end.
    ahead: BTreeMap<Lsn, Lsn>,
}

impl Frontier {
    /// Returns a frontier at a position before which everything is durable.
    pub fn new(durable: Lsn) -> Self {
        Self { durable, ahead: BTreeMap::new() }
    }

    /// Returns the position before which everything is durable.
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Notes that `[start, end)` is durable now. Ranges may overlap and come in any order.
    pub fn add(&mut self, start: Lsn, end: Lsn) {
        if end <= self.durable || end <= start {
            return;
        }
        let known = self.ahead.entry(start).or_insert(end);
        *known = end.max(*known);
        while let Some(first) = self.ahead.first_entry() {
            if *first.key() > self.durable {
                break;
            }
            self.durable = self.durable.max(first.remove());
        }
    }

    /// Goes back to `position` where the WAL behind it does not belong to the server's path.
    pub fn go_back(&mut self, position: Lsn) {
        self.durable = self.durable.min(position);
        self.ahead.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_end_of_the_unbroken_range(
            start in 0u64..20,
            ranges in proptest::collection::vec((0u64..60, 0u64..8), 0..30),
        ) {
            let mut frontier = Frontier::new(Lsn(start));
            let mut durable: Vec<bool> = (0..80).map(|at| at < start).collect();
            for (from, length) in ranges {
                frontier.add(Lsn(from), Lsn(from + length));
                durable[from as usize..(from + length) as usize].fill(true);
                let expected = durable.iter().position(|durable| !durable).unwrap() as u64;
                prop_assert_eq!(frontier.durable(), Lsn(expected));
            }
        }
    }

    #[test]
    fn going_back_forgets_what_lay_ahead() {
        let mut frontier = Frontier::new(Lsn(10));
        frontier.add(Lsn(20), Lsn(30));
        frontier.go_back(Lsn(5));
        frontier.add(Lsn(5), Lsn(20));
        assert_eq!(frontier.durable(), Lsn(20));
        frontier.go_back(Lsn(40));
        assert_eq!(frontier.durable(), Lsn(20));
    }
}
