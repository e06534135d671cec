//! Which transactions deleted many rows, and of which relations.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::event::RelFileLocator;
use super::layout::Layout;
use super::record::{Parts, Record};
use crate::pg::Xid;

/// How many rows one transaction deleted of one relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeleteCount {
    /// The transaction; the top-level one where the WAL names it (`wal_level = logical`), else it may be a
    /// subtransaction.
    pub xid: Xid,
    /// The relation's storage.
    pub relation: RelFileLocator,
    /// How many rows; at least, as few deletes in a segment are not counted.
    pub rows: u64,
}

/// The largest delete counts in a stretch of WAL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletes {
    /// Those with most rows, the largest first; at most [`Deletes::MAX`].
    pub largest: Vec<DeleteCount>,
    /// Whether there were more of at least [`Deletes::ROWS_MIN`] rows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

impl Deletes {
    /// How many counts are kept.
    pub const MAX: usize = 12;
    /// Fewer rows than this in one segment are not counted.
    pub const ROWS_MIN: u64 = 100;

    /// Returns whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.largest.is_empty() && !self.more
    }

    /// Adds those of another stretch.
    pub fn add(&mut self, other: &Self) {
        self.more |= other.more;
        for count in &other.largest {
            let same = |own: &&mut DeleteCount| (own.xid, own.relation) == (count.xid, count.relation);
            match self.largest.iter_mut().find(same) {
                Some(own) => own.rows = own.rows.saturating_add(count.rows),
                None => self.largest.push(*count),
            }
        }
        self.keep_largest();
    }

    fn keep_largest(&mut self) {
        self.largest.sort_unstable_by_key(|count| (Reverse(count.rows), count.xid, count.relation));
        if self.largest.len() > Self::MAX {
            self.largest.truncate(Self::MAX);
            self.more = true;
        }
    }
}

/// Counts deletes while records come by.
#[derive(Debug, Default)]
pub(super) struct DeleteTally {
    rows: HashMap<(Xid, RelFileLocator), u64>,
    /// The last one counted, not in `rows` yet: deletes come in rows.
    last: Option<((Xid, RelFileLocator), u64)>,
}

impl DeleteTally {
    /// More than this are not remembered at once: the small ones are forgotten then.
    const KEYS_MAX: usize = 1 << 16;
    /// The first oid, and number of a relation's storage, that is no system catalog's.
    ///
    /// Source: `src/include/access/transam.h`, FirstNormalObjectId.
    const FIRST_NORMAL: u32 = 16_384;

    /// Counts a heap delete, unless it deletes no row of a user's: catalogs, rows that move to another
    /// partition, and insertions that are taken back are left out.
    ///
    /// Source: `src/include/access/heapam_xlog.h`, xl_heap_delete.
    #[inline]
    pub(super) fn add(&mut self, record: &Record<'_>, parts: &Parts, layout: &Layout) {
        const FLAGS_AT: usize = 7;
        const IS_SUPER: u8 = 1 << 3;
        const IS_PARTITION_MOVE: u8 = 1 << 4;
        let Some(relation) = record.first_relation(layout) else { return };
        // Of a record that crosses pages the flags are not at hand; nearly none of them are set.
        let flags = record.main_data(parts).ok().and_then(|main| main.get(FLAGS_AT)).copied().unwrap_or(0);
        if relation.relation < Self::FIRST_NORMAL || flags & (IS_SUPER | IS_PARTITION_MOVE) != 0 {
            return;
        }
        let key = (parts.top_xid.unwrap_or(record.header.xid), relation);
        match &mut self.last {
            Some((last, rows)) if *last == key => *rows += 1,
            last => {
                if let Some((key, rows)) = last.replace((key, 1)) {
                    self.note(key, rows);
                }
            }
        }
    }

    fn note(&mut self, key: (Xid, RelFileLocator), rows: u64) {
        *self.rows.entry(key).or_default() += rows;
        if self.rows.len() > Self::KEYS_MAX {
            self.rows.retain(|_, rows| *rows >= Deletes::ROWS_MIN);
        }
    }

    /// Returns the largest counts.
    pub(super) fn finish(mut self) -> Deletes {
        if let Some((key, rows)) = self.last.take() {
            self.note(key, rows);
        }
        let counted = self.rows.into_iter().filter(|(_, rows)| *rows >= Deletes::ROWS_MIN);
        let largest = counted.map(|((xid, relation), rows)| DeleteCount { xid, relation, rows }).collect();
        let mut deletes = Deletes { largest, more: false };
        deletes.keep_largest();
        deletes
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::RecordHeader;
    use super::super::record::tests::build;
    use super::*;
    use crate::pg::Lsn;
    use crate::wal::layout::rmgr;

    const HEAP_DELETE: u8 = 0x10;

    fn relation(number: u32) -> RelFileLocator {
        RelFileLocator { tablespace: 1663, database: 5, relation: number }
    }

    fn count(tally: &mut DeleteTally, xid: Xid, number: u32, flags: u8, top: Option<Xid>, rows: u64) {
        let mut headers = vec![0, 0x20, 0, 0];
        for word in [1663, 5, number, 0] {
            headers.extend(u32::to_le_bytes(word));
        }
        if let Some(top) = top {
            headers.push(252);
            headers.extend(top.to_le_bytes());
        }
        let bytes = build(xid, 0, rmgr::HEAP, HEAP_DELETE, &headers, &[0, 0, 0, 0, 0, 0, 0, flags]);
        let layout = Layout::for_major(17).unwrap();
        let header = RecordHeader::parse(&bytes).unwrap();
        let record = Record { lsn: Lsn(8), end_lsn: Lsn(16), header, bytes: &bytes };
        let parts = record.parts(layout).unwrap();
        (0..rows).for_each(|_| tally.add(&record, &parts, layout));
    }

    #[test]
    fn only_many_rows_of_users_count() {
        let mut tally = DeleteTally::default();
        count(&mut tally, 700, 16_400, 0, None, 60);
        count(&mut tally, 701, 16_400, 0, None, 99);
        count(&mut tally, 700, 16_400, 0x02, None, 60);
        count(&mut tally, 702, 1249, 0, None, 5000);
        count(&mut tally, 703, 16_400, 1 << 4, None, 5000);
        count(&mut tally, 703, 16_400, 1 << 3, None, 5000);
        count(&mut tally, 705, 16_401, 0, Some(704), 300);
        count(&mut tally, 704, 16_401, 0, None, 1);
        let deletes = tally.finish();
        let expected = [(704, relation(16_401), 301), (700, relation(16_400), 120)];
        let found: Vec<_> = deletes.largest.iter().map(|one| (one.xid, one.relation, one.rows)).collect();
        assert_eq!(found, expected);
        assert!(!deletes.more);
    }

    #[test]
    fn many_small_transactions_do_not_hide_a_large_one() {
        let mut tally = DeleteTally::default();
        for xid in 3..(DeleteTally::KEYS_MAX as u32 + 5000) {
            if xid % 1000 == 0 {
                count(&mut tally, 1, 16_400, 0, None, 10);
            }
            tally.note((xid, relation(16_400)), 1);
        }
        assert!(tally.rows.len() <= DeleteTally::KEYS_MAX);
        let deletes = tally.finish();
        assert_eq!(deletes.largest.len(), 1);
        assert!(deletes.largest[0].xid == 1 && deletes.largest[0].rows >= 600);
    }

    #[test]
    fn stretches_add_up_and_keep_the_largest() {
        let stretch = |range: std::ops::Range<u32>| {
            let one = |xid| DeleteCount { xid, relation: relation(16_400), rows: 100 * u64::from(xid) };
            let mut deletes = Deletes { largest: range.map(one).collect(), more: false };
            deletes.keep_largest();
            deletes
        };
        let mut sum = stretch(1..4);
        sum.add(&stretch(3..5));
        let found: Vec<_> = sum.largest.iter().map(|one| (one.xid, one.rows)).collect();
        assert_eq!(found, [(3, 600), (4, 400), (2, 200), (1, 100)]);
        assert!(!sum.more);
        sum.add(&stretch(10..30));
        assert!(sum.more && sum.largest.len() == Deletes::MAX && sum.largest[0].xid == 29);
        let json = serde_json::to_string(&sum).unwrap();
        assert_eq!(serde_json::from_str::<Deletes>(&json).unwrap(), sum);
        let widest = DeleteCount { xid: u32::MAX, relation: relation(u32::MAX), rows: u64::MAX };
        let full = Deletes { largest: vec![widest; Deletes::MAX], more: true };
        assert!(serde_json::to_vec(&full).unwrap().len() < 2 << 10, "a summary has room for it");
    }
}
