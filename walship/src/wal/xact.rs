//! Transaction records: commit, abort and prepare in all their forms.
//!
//! Source: `src/include/access/xact.h`; `src/backend/access/rmgrdesc/xactdesc.c`, ParseCommitRecord,
//! ParseAbortRecord, ParsePrepareRecord.

use chrono::{DateTime, Utc};

use super::bytes::{i32_at, i64_at, u16_at, u32_at};
use super::decode::time_of;
use super::event::{DroppedObjects, EventKind, RelFileLocator};
use super::layout::Layout;
use super::record::{UnknownLayout, unknown};
use crate::pg::Xid;

/// The codes of transaction records.
pub(crate) mod code {
    pub(crate) const MASK: u8 = 0x70;
    pub(crate) const COMMIT: u8 = 0x00;
    pub(crate) const PREPARE: u8 = 0x10;
    pub(crate) const ABORT: u8 = 0x20;
    pub(crate) const COMMIT_PREPARED: u8 = 0x30;
    pub(crate) const ABORT_PREPARED: u8 = 0x40;
    pub(crate) const HAS_INFO: u8 = 0x80;
}

mod info {
    pub(super) const DATABASE: u32 = 1 << 0;
    pub(super) const SUBXACTS: u32 = 1 << 1;
    pub(super) const RELATIONS: u32 = 1 << 2;
    pub(super) const INVALIDATIONS: u32 = 1 << 3;
    pub(super) const TWO_PHASE: u32 = 1 << 4;
    pub(super) const ORIGIN: u32 = 1 << 5;
    pub(super) const LOCKS: u32 = 1 << 6;
    pub(super) const GID: u32 = 1 << 7;
    pub(super) const DROPPED_STATS: u32 = 1 << 8;
    /// Wishes of the writer that add nothing to the record.
    pub(super) const COMPLETION: u32 = 0b111 << 29;
}

/// The kinds of statistics.
///
/// Source: `src/include/pgstat.h` (15 to 17) and `src/include/utils/pgstat_kind.h` (18).
mod stats {
    pub(super) const DATABASE: u32 = 1;
    pub(super) const RELATION: u32 = 2;
}

const RELATION_LEN: usize = 12;
const INVALIDATION_LEN: usize = 16;

/// A commit or abort record, as slices into its main data: nothing is copied until asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionEnd<'a> {
    /// Whether it committed.
    pub committed: bool,
    /// Microseconds since 2000-01-01 UTC, by the clock of the server that wrote the record.
    pub micros: i64,
    /// The two-phase transaction that COMMIT PREPARED or ROLLBACK PREPARED ended.
    pub prepared_xid: Option<Xid>,
    subxids: &'a [u8],
    relations: &'a [u8],
    /// The dropped statistics, and the length of each; `None` where there is no such list.
    stats: Option<(&'a [u8], usize)>,
}

impl<'a> TransactionEnd<'a> {
    /// Returns what the main data of a commit or abort record says; `info` is the record header's.
    ///
    /// # Errors
    /// [`UnknownLayout`] when the data are shorter than what they announce, or announce something that
    /// this version does not have.
    pub fn parse(info: u8, main: &'a [u8], layout: &Layout) -> Result<Self, UnknownLayout> {
        let code = info & code::MASK;
        let committed = matches!(code, code::COMMIT | code::COMMIT_PREPARED);
        let prepared = matches!(code, code::COMMIT_PREPARED | code::ABORT_PREPARED);
        let mut cursor = Cursor { main, at: 0 };
        let micros = i64_at(cursor.take(8)?, 0).unwrap_or_default();
        let mut end =
            Self { committed, micros, prepared_xid: None, subxids: &[], relations: &[], stats: None };
        end.stats = layout.dropped_stats_item.map(|item| (&[][..], item));
        if info & code::HAS_INFO != 0 {
            end.parse_items(&mut cursor, layout)?;
        }
        if prepared != end.prepared_xid.is_some() {
            return Err(unknown("its two-phase transaction id does not fit its kind"));
        }
        Ok(end)
    }

    fn parse_items(&mut self, cursor: &mut Cursor<'a>, layout: &Layout) -> Result<(), UnknownLayout> {
        let items = u32_at(cursor.take(4)?, 0).unwrap_or_default();
        let mut known = info::DATABASE
            | info::SUBXACTS
            | info::RELATIONS
            | info::INVALIDATIONS
            | info::TWO_PHASE
            | info::ORIGIN
            | info::LOCKS
            | info::GID
            | info::COMPLETION;
        if layout.dropped_stats_item.is_some() {
            known |= info::DROPPED_STATS;
        }
        if items & !known != 0 {
            return Err(unknown("it announces items that this version does not have"));
        }
        if items & info::DATABASE != 0 {
            cursor.take(8)?;
        }
        if items & info::SUBXACTS != 0 {
            self.subxids = cursor.list(4)?;
        }
        if items & info::RELATIONS != 0 {
            self.relations = cursor.list(RELATION_LEN)?;
        }
        if let (true, Some(item)) = (items & info::DROPPED_STATS != 0, layout.dropped_stats_item) {
            self.stats = Some((cursor.list(item)?, item));
        }
        if items & info::INVALIDATIONS != 0 {
            if !self.committed {
                return Err(unknown("an abort with invalidation messages"));
            }
            cursor.list(INVALIDATION_LEN)?;
        }
        if items & info::TWO_PHASE != 0 {
            self.prepared_xid = u32_at(cursor.take(4)?, 0);
        }
        // What follows, the two-phase name and the replication origin with *its* time, is not for us.
        Ok(())
    }

    /// Returns the time; `None` when it lies outside of what a calendar can hold.
    pub fn time(&self) -> Option<DateTime<Utc>> {
        time_of(self.micros)
    }

    /// Returns the committed or aborted subtransactions.
    pub fn subxids(&self) -> impl ExactSizeIterator<Item = Xid> + 'a {
        self.subxids.chunks_exact(4).map(|chunk| u32_at(chunk, 0).unwrap_or_default())
    }

    /// Returns the relations whose storage goes with this record.
    pub fn relations(&self) -> impl ExactSizeIterator<Item = RelFileLocator> + 'a {
        self.relations.chunks_exact(RELATION_LEN).map(|chunk| relation_at(chunk, 0).unwrap_or(NO_RELATION))
    }

    /// Returns what it dropped by oid; `None` where the version has no such list.
    pub fn dropped_objects(&self) -> Option<DroppedObjects> {
        let (list, item) = self.stats?;
        let mut dropped = DroppedObjects::default();
        for chunk in list.chunks_exact(item) {
            match (u32_at(chunk, 0), u32_at(chunk, 4), u32_at(chunk, 8)) {
                (Some(stats::RELATION), _, Some(relation)) => dropped.relations.push(relation),
                (Some(stats::DATABASE), Some(database), _) => dropped.databases.push(database),
                _ => {}
            }
        }
        Some(dropped)
    }

    /// Returns how many items its lists have.
    pub fn items(&self) -> usize {
        let stats = self.stats.map_or(0, |(list, item)| list.len() / item);
        self.subxids.len() / 4 + self.relations.len() / RELATION_LEN + stats
    }

    /// Returns whether it removes storage or drops a database.
    pub fn is_destructive(&self) -> bool {
        let database = |(list, item): (&[u8], usize)| {
            list.chunks_exact(item).any(|chunk| u32_at(chunk, 0) == Some(stats::DATABASE))
        };
        self.committed && (!self.relations.is_empty() || self.stats.is_some_and(database))
    }

    /// Returns the event, with copies of the lists.
    ///
    /// # Errors
    /// [`UnknownLayout`] when the time is impossible.
    pub fn event(&self) -> Result<EventKind, UnknownLayout> {
        let time = self.time().ok_or_else(|| unknown("its time is impossible"))?;
        let (prepared_xid, subxids) = (self.prepared_xid, self.subxids().collect());
        Ok(if self.committed {
            let dropped_relations = self.relations().collect();
            let dropped_objects = self.dropped_objects();
            EventKind::Commit { time, prepared_xid, subxids, dropped_relations, dropped_objects }
        } else {
            EventKind::Abort { time, prepared_xid, subxids }
        })
    }
}

const NO_RELATION: RelFileLocator = RelFileLocator { tablespace: 0, database: 0, relation: 0 };

/// Reads a relation's place: tablespace, database, file number.
pub(crate) fn relation_at(bytes: &[u8], offset: usize) -> Option<RelFileLocator> {
    Some(RelFileLocator {
        tablespace: u32_at(bytes, offset)?,
        database: u32_at(bytes, offset + 4)?,
        relation: u32_at(bytes, offset + 8)?,
    })
}

/// Returns the event in the main data of a PREPARE TRANSACTION record.
///
/// # Errors
/// [`UnknownLayout`] when the data are too short or do not begin with the two-phase magic.
pub fn parse_prepare(main: &[u8], layout: &Layout) -> Result<EventKind, UnknownLayout> {
    const MAGIC: u32 = 0x57F9_4534;
    let short = || unknown("a prepare record ends early");
    if u32_at(main, 0).ok_or_else(short)? != MAGIC {
        return Err(unknown("a prepare record without its magic"));
    }
    let prepared_xid = u32_at(main, 8).ok_or_else(short)?;
    let micros = i64_at(main, 16).ok_or_else(short)?;
    // From 15 on, two counts of dropped statistics lie before the name's length.
    let (gid_len_at, gid_at) = if layout.prepare_has_stats { (54, 72) } else { (46, 64) };
    let gid_len = usize::from(u16_at(main, gid_len_at).ok_or_else(short)?);
    let gid = main.get(gid_at..gid_at + gid_len).ok_or_else(short)?;
    let gid = gid.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(EventKind::Prepare {
        time: time_of(micros).ok_or_else(|| unknown("its time is impossible"))?,
        prepared_xid,
        gid: String::from_utf8_lossy(gid).into_owned(),
    })
}

struct Cursor<'a> {
    main: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], UnknownLayout> {
        let end = self.at.checked_add(len);
        let part = end.and_then(|end| self.main.get(self.at..end));
        let part = part.ok_or_else(|| unknown("a transaction record ends early"))?;
        self.at += len;
        Ok(part)
    }

    /// Takes a list: a signed count, then so many items.
    fn list(&mut self, item: usize) -> Result<&'a [u8], UnknownLayout> {
        let count = i32_at(self.take(4)?, 0).unwrap_or_default();
        let count = usize::try_from(count).map_err(|_| unknown("a list with a negative count"))?;
        self.take(count.checked_mul(item).ok_or_else(|| unknown("a list without end"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(values: &[u32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// All items at once; the origin's time must not be taken for the commit's.
    fn full_commit(stats_item: usize) -> Vec<u8> {
        let mut main = 1_000_000i64.to_le_bytes().to_vec();
        main.extend(words(&[0x1BF | (1 << 30), 5, 1663, 2, 101, 102, 1, 1663, 5, 16384]));
        main.extend(words(&[3]));
        for (kind, oid) in [(2, 16384), (1, 0), (3, 99)] {
            main.extend(words(&[kind, 5, oid, 0]).get(..stats_item).unwrap());
        }
        main.extend(words(&[1]));
        main.extend([0xDD; 16]);
        main.extend(words(&[77]));
        main.extend(b"gid\0");
        main.extend([0xFF; 16]);
        main
    }

    #[test]
    fn a_commit_with_every_item_is_followed() {
        for (major, stats_item) in [(15, 12), (16, 12), (17, 12), (18, 16)] {
            let main = full_commit(stats_item);
            let layout = Layout::for_major(major).unwrap();
            let end = TransactionEnd::parse(0xB0, &main, layout).unwrap();
            assert_eq!(end.prepared_xid, Some(77), "{major}");
            assert_eq!(end.time().unwrap().to_rfc3339(), "2000-01-01T00:00:01+00:00");
            assert_eq!(end.subxids().collect::<Vec<_>>(), [101, 102]);
            let relation = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
            assert_eq!(end.relations().collect::<Vec<_>>(), [relation]);
            let dropped = DroppedObjects { relations: vec![16384], databases: vec![5] };
            assert_eq!(end.dropped_objects(), Some(dropped), "{major}");
            assert!(end.is_destructive() && end.items() == 6);
        }
    }

    #[test]
    fn what_a_version_does_not_have_is_not_guessed() {
        let v14 = Layout::for_major(14).unwrap();
        assert!(TransactionEnd::parse(0xB0, &full_commit(12), v14).is_err(), "no dropped statistics in 14");
        let v15 = Layout::for_major(15).unwrap();
        let main = full_commit(12);
        for len in 0..main.len() - 20 {
            assert!(TransactionEnd::parse(0xB0, &main[..len], v15).is_err(), "{len}");
        }
        assert!(TransactionEnd::parse(0x30, &main, v15).is_err(), "commit prepared without its xid");
        let mut negative = 0i64.to_le_bytes().to_vec();
        negative.extend(words(&[2, u32::MAX]));
        assert!(TransactionEnd::parse(0x80, &negative, v15).is_err());
    }

    #[test]
    fn a_minimal_commit_has_only_a_time() {
        let layout = Layout::for_major(14).unwrap();
        let main = (-5i64).to_le_bytes();
        let end = TransactionEnd::parse(0x00, &main, layout).unwrap();
        assert!(end.committed && end.items() == 0 && !end.is_destructive());
        assert_eq!(end.dropped_objects(), None, "14 does not say");
        assert_eq!(end.time().unwrap().to_rfc3339(), "1999-12-31T23:59:59.999995+00:00");
        let end = TransactionEnd::parse(0x20, &main, layout).unwrap();
        assert!(!end.committed);
    }

    #[test]
    fn prepare_records_of_both_layouts() {
        for (major, gid_len_at, gid_at) in [(14, 46, 64), (15, 54, 72), (18, 54, 72)] {
            let mut main = vec![0u8; 120];
            main[..4].copy_from_slice(&0x57F9_4534u32.to_le_bytes());
            main[8] = 99;
            main[16] = 1;
            main[gid_len_at] = 4;
            main[gid_at..gid_at + 4].copy_from_slice(b"two\0");
            let layout = Layout::for_major(major).unwrap();
            match parse_prepare(&main, layout).unwrap() {
                EventKind::Prepare { prepared_xid, gid, .. } => {
                    assert_eq!((prepared_xid, gid.as_str()), (99, "two"));
                }
                other => panic!("{other:?}"),
            }
            assert!(parse_prepare(&main[..gid_at], layout).is_err());
            main[0] = 0;
            assert!(parse_prepare(&main, layout).is_err());
        }
    }
}
