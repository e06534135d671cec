//! Transactions that deleted many rows: what summaries and the index count is added up until the transaction ends.

use std::collections::BTreeMap;

use walship::pg::Xid;
use walship::wal::deletes::DeleteCount;
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};
use walship::wal::rollup::Facts;

/// More counts than this are not held; the smallest go.
const COUNTS_MAX: usize = 2000;

/// Deletes of transactions whose end was not read yet, as far as the WAL was read.
#[derive(Debug, Clone, Default)]
pub(super) struct Heavy(BTreeMap<(Xid, RelFileLocator), u64>);

impl Heavy {
    /// Adds what a stretch of WAL holds.
    pub(super) fn add(&mut self, counts: &[DeleteCount]) {
        for count in counts {
            let rows = self.0.entry((count.xid, count.relation)).or_default();
            *rows = rows.saturating_add(count.rows);
        }
        if self.0.len() > COUNTS_MAX {
            let mut rows: Vec<u64> = self.0.values().copied().collect();
            rows.sort_unstable();
            let least = rows.get(rows.len() / 2).copied().unwrap_or_default();
            self.0.retain(|_, rows| *rows > least);
        }
    }

    /// Returns whether a transaction that deleted so many rows, those in WAL with these facts included, may end
    /// there. A subtransaction ends with its top-level transaction, whose id is smaller.
    pub(super) fn may_end_in(&self, facts: &Facts, rows_min: u64) -> bool {
        let Some((low, _)) = facts.ended_xids else { return false };
        let before = self.0.iter().any(|((xid, _), rows)| *rows >= rows_min && low <= *xid);
        before
            || facts.deletes.largest.iter().any(|count| {
                let before = self.0.get(&(count.xid, count.relation)).copied().unwrap_or_default();
                before.saturating_add(count.rows) >= rows_min && low <= count.xid
            })
    }

    /// Forgets a transaction that ends; returns of which relations it deleted so many rows, if it was committed.
    pub(super) fn end(&mut self, event: &WalEvent, rows_min: u64) -> Vec<(RelFileLocator, u64)> {
        let (committed, subxids) = match &event.kind {
            EventKind::Commit { subxids, .. } => (true, subxids),
            EventKind::Abort { subxids, .. } => (false, subxids),
            _ => return Vec::new(),
        };
        let mut sums: BTreeMap<RelFileLocator, u64> = BTreeMap::new();
        for xid in event.kind.ended_xid(event.xid).iter().chain(subxids) {
            let least = RelFileLocator { tablespace: 0, database: 0, relation: 0 };
            let own: Vec<_> = self.0.range((*xid, least)..).take_while(|((of, _), _)| of == xid).collect();
            let own: Vec<RelFileLocator> = own.into_iter().map(|((_, relation), _)| *relation).collect();
            for relation in own {
                let rows = self.0.remove(&(*xid, relation)).unwrap_or_default();
                let sum = sums.entry(relation).or_default();
                *sum = sum.saturating_add(rows);
            }
        }
        sums.into_iter().filter(|(_, rows)| committed && *rows >= rows_min).collect()
    }
}

#[cfg(test)]
mod tests {
    use walship::pg::Lsn;
    use walship::wal::deletes::Deletes;

    use super::*;
    use crate::plan::tests::at;

    const ORDERS: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 20_001 };
    const PEOPLE: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 20_002 };

    fn count(xid: Xid, relation: RelFileLocator, rows: u64) -> DeleteCount {
        DeleteCount { xid, relation, rows }
    }

    fn end(xid: Xid, subxids: Vec<Xid>, committed: bool) -> WalEvent {
        let time = at(1);
        let kind = if committed {
            let (dropped_relations, dropped_objects) = (Vec::new(), None);
            EventKind::Commit { time, prepared_xid: None, subxids, dropped_relations, dropped_objects }
        } else {
            EventKind::Abort { time, prepared_xid: None, subxids }
        };
        WalEvent { lsn: Lsn(8), end_lsn: Lsn(16), xid, kind }
    }

    #[test]
    fn counts_of_many_segments_add_up_until_the_transaction_is_committed() {
        let mut heavy = Heavy::default();
        heavy.add(&[count(700, ORDERS, 600), count(701, ORDERS, 5000)]);
        heavy.add(&[count(700, ORDERS, 300), count(702, ORDERS, 200), count(702, PEOPLE, 999)]);
        assert_eq!(heavy.end(&end(701, vec![], false), 1000), [], "rolled back");
        // 702 is a subtransaction of 700.
        assert_eq!(heavy.end(&end(700, vec![702], true), 1000), [(ORDERS, 1100)]);
        assert_eq!(heavy.end(&end(700, vec![702], true), 1), [], "told once");
    }

    #[test]
    fn segments_are_read_only_where_a_heavy_transaction_may_end() {
        let mut heavy = Heavy::default();
        heavy.add(&[count(700, ORDERS, 600)]);
        let facts = |ended: Option<(Xid, Xid)>, rows: u64| Facts {
            ended_xids: ended,
            deletes: Deletes { largest: vec![count(700, ORDERS, rows)], more: false },
            ..Facts::default()
        };
        assert!(heavy.may_end_in(&facts(Some((690, 710)), 400), 1000), "with those of this segment");
        assert!(heavy.may_end_in(&facts(Some((690, 699)), 400), 1000), "it may be a subtransaction of 690's");
        assert!(!heavy.may_end_in(&facts(Some((690, 710)), 399), 1000), "too few");
        assert!(!heavy.may_end_in(&facts(Some((701, 710)), 400), 1000), "what ends here began later");
        assert!(!heavy.may_end_in(&facts(None, 400), 1000), "nothing ends here");
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut heavy = Heavy::default();
        for xid in 3..10_000 {
            heavy.add(&[count(xid, ORDERS, u64::from(xid))]);
        }
        assert!(heavy.0.len() <= COUNTS_MAX && heavy.0.contains_key(&(9999, ORDERS)));
    }
}
