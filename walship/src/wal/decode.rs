//! From a record to the event that recovery planning cares for.
//!
//! Source: `src/include/access/xlog_internal.h`, `src/include/catalog/pg_control.h` (CheckPoint),
//! `src/include/catalog/storage_xlog.h`, `src/include/commands/{tablespace,dbcommands_xlog}.h`,
//! `src/include/access/heapam_xlog.h`.

use chrono::{DateTime, Utc};

use super::bytes::{c_string_at, i32_at, i64_at, u16_at, u32_at, u64_at};
use super::event::{EventKind, ServerLimits, WalEvent};
use super::layout::{Layout, rmgr};
use super::record::{Record, RecordHeader, UnknownLayout, unknown};
use super::summary::SegmentSummary;
use super::xact::{self, TransactionEnd};
use crate::pg::{Lsn, TimelineId};

/// The codes of the `XLOG` resource manager that matter here.
pub(crate) mod xlog {
    pub(crate) const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    pub(crate) const CHECKPOINT_ONLINE: u8 = 0x10;
    pub(crate) const SWITCH: u8 = 0x40;
    pub(crate) const BACKUP_END: u8 = 0x50;
    pub(crate) const PARAMETER_CHANGE: u8 = 0x60;
    pub(crate) const RESTORE_POINT: u8 = 0x70;
    pub(crate) const END_OF_RECOVERY: u8 = 0x90;
    pub(crate) const OVERWRITE_CONTRECORD: u8 = 0xD0;
}

const SMGR_TRUNCATE: u8 = 0x20;
const TABLESPACE_CREATE: u8 = 0x00;
const TABLESPACE_DROP: u8 = 0x10;
const HEAP_CODE_MASK: u8 = 0x70;
const HEAP_DELETE: u8 = 0x10;
const HEAP_TRUNCATE: u8 = 0x30;
const HEAP_INPLACE: u8 = 0x70;

/// The tablespace of the relations that all databases share.
const GLOBAL_TABLESPACE: u32 = 1664;
/// What DROP DATABASE sets `pg_database.datconnlimit` to.
const INVALID_DATABASE: i32 = -2;

/// Seconds from 1970-01-01 to PostgreSQL's epoch, 2000-01-01.
const EPOCH_SECONDS: i64 = 946_684_800;

/// Returns the moment that lies `micros` after PostgreSQL's epoch; `None` when no calendar holds it.
pub(crate) fn time_of(micros: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros.checked_add(EPOCH_SECONDS * 1_000_000)?)
}

/// Returns whether [`time_of`] has an answer, without making it: every commit is asked.
#[inline]
pub(crate) fn is_time(micros: i64) -> bool {
    const MIN: i64 = DateTime::<Utc>::MIN_UTC.timestamp_micros() - EPOCH_SECONDS * 1_000_000;
    const MAX: i64 = DateTime::<Utc>::MAX_UTC.timestamp_micros() - EPOCH_SECONDS * 1_000_000;
    (MIN..=MAX).contains(&micros)
}

/// Returns whether a record with this header decodes to an event.
#[inline]
pub fn is_of_interest(header: &RecordHeader, layout: &Layout) -> bool {
    let code = header.code();
    // Nearly every record is one of a table's rows or an index's entries.
    if header.rmgr > rmgr::TABLESPACE {
        return header.rmgr == rmgr::HEAP
            && match code & HEAP_CODE_MASK {
                HEAP_TRUNCATE => true,
                // A longer one is a page of some other catalog, as good as always; such are not kept whole.
                HEAP_INPLACE => header.total_len as usize <= SegmentSummary::MAX_FRAGMENT_BYTES,
                _ => false,
            };
    }
    match header.rmgr {
        rmgr::XACT => is_transaction_end(header) || code & xact::code::MASK == xact::code::PREPARE,
        rmgr::XLOG => matches!(
            code,
            xlog::CHECKPOINT_SHUTDOWN
                | xlog::CHECKPOINT_ONLINE
                | xlog::SWITCH
                | xlog::BACKUP_END
                | xlog::PARAMETER_CHANGE
                | xlog::RESTORE_POINT
                | xlog::END_OF_RECOVERY
                | xlog::OVERWRITE_CONTRECORD
        ),
        rmgr::SMGR => code == SMGR_TRUNCATE,
        rmgr::DATABASE => code == layout.database_drop,
        rmgr::TABLESPACE => matches!(code, TABLESPACE_CREATE | TABLESPACE_DROP),
        _ => false,
    }
}

/// Returns whether the record is a commit or abort, of whatever form.
pub(crate) fn is_transaction_end(header: &RecordHeader) -> bool {
    use xact::code::{ABORT, ABORT_PREPARED, COMMIT, COMMIT_PREPARED, MASK};
    header.rmgr == rmgr::XACT
        && matches!(header.info & MASK, COMMIT | COMMIT_PREPARED | ABORT | ABORT_PREPARED)
}

/// Returns whether the record deletes a row.
pub(crate) fn is_heap_delete(header: &RecordHeader) -> bool {
    header.rmgr == rmgr::HEAP && header.info & HEAP_CODE_MASK == HEAP_DELETE
}

/// Returns the event that a record stands for; `None` for a record that does not matter to planning.
///
/// # Errors
/// [`UnknownLayout`] when it would matter but does not have the layout of its version.
pub fn decode(record: &Record<'_>, layout: &Layout) -> Result<Option<WalEvent>, UnknownLayout> {
    if !is_of_interest(&record.header, layout) {
        return Ok(None);
    }
    let main = record.main_data(&record.parts(layout)?)?;
    let header = &record.header;
    if header.rmgr == rmgr::HEAP && header.info & HEAP_CODE_MASK == HEAP_INPLACE {
        let kind = database_invalid(record, main, layout);
        return Ok(kind.map(|kind| WalEvent {
            lsn: record.lsn,
            end_lsn: record.end_lsn,
            xid: header.xid,
            kind,
        }));
    }
    let kind = match header.rmgr {
        rmgr::XACT if is_transaction_end(header) => {
            TransactionEnd::parse(header.info, main, layout)?.event()?
        }
        rmgr::XACT => xact::parse_prepare(main, layout)?,
        rmgr::XLOG => match decode_xlog(header.code(), main, layout)? {
            EventKind::Checkpoint { time, shutdown: true, .. } if header.prev == Lsn(0) => {
                EventKind::WalBegins { time }
            }
            kind => kind,
        },
        rmgr::SMGR => {
            let truncate = || {
                Some(EventKind::StorageTruncate {
                    blocks: u32_at(main, 0)?,
                    relation: xact::relation_at(main, 4)?,
                })
            };
            truncate().ok_or_else(|| unknown("a storage truncation ends early"))?
        }
        rmgr::DATABASE => EventKind::DatabaseDrop {
            oid: u32_at(main, 0).ok_or_else(|| unknown("a database drop ends early"))?,
            tablespaces: oids(main, 4, 8)?,
        },
        rmgr::TABLESPACE => decode_tablespace(header.code(), main)?,
        _ => EventKind::Truncate {
            database: u32_at(main, 0).ok_or_else(|| unknown("a truncation ends early"))?,
            relations: oids(main, 4, 12)?,
        },
    };
    Ok(Some(WalEvent { lsn: record.lsn, end_lsn: record.end_lsn, xid: header.xid, kind }))
}

/// Returns the event of a row of `pg_database` that was marked invalid in place; `None` for every other
/// update in place, and when the row is in a compressed page.
///
/// Of the relations that all databases share no other is updated in place.
///
/// Source: `src/backend/commands/dbcommands.c`, dropdb; `src/backend/access/heap/heapam.c`,
/// heap_inplace_update_and_unlock; `src/include/catalog/pg_database.h`.
fn database_invalid(record: &Record<'_>, main: &[u8], layout: &Layout) -> Option<EventKind> {
    const NAME_LEN: usize = 64;
    let block = record.only_block(layout, main.len())?;
    if block.relation.tablespace != GLOBAL_TABLESPACE || block.relation.database != 0 {
        return None;
    }
    let row = match block.data {
        [] => block.page()?.row(u16_at(main, 0)?)?.to_vec(),
        data => data.to_vec(),
    };
    if i32_at(&row, layout.database_limit_at)? != INVALID_DATABASE {
        return None;
    }
    let name = row.get(4..4 + NAME_LEN)?.split(|&byte| byte == 0).next().unwrap_or_default();
    Some(EventKind::DatabaseInvalid {
        oid: u32_at(&row, 0)?,
        name: String::from_utf8_lossy(name).into_owned(),
    })
}

fn decode_xlog(code: u8, main: &[u8], layout: &Layout) -> Result<EventKind, UnknownLayout> {
    let short = || unknown("a control record ends early");
    let lsn = |at| u64_at(main, at).map(Lsn).ok_or_else(short);
    let time = |at| i64_at(main, at).and_then(time_of).ok_or_else(|| unknown("its time is impossible"));
    let timeline = |at| {
        u32_at(main, at).and_then(TimelineId::new).ok_or_else(|| unknown("a control record names timeline 0"))
    };
    Ok(match code {
        xlog::CHECKPOINT_SHUTDOWN | xlog::CHECKPOINT_ONLINE => {
            const LEN: usize = 88;
            if main.len() < LEN {
                return Err(short());
            }
            let seconds = i64_at(main, 64).ok_or_else(short)?;
            EventKind::Checkpoint {
                redo: lsn(0)?,
                time: DateTime::from_timestamp(seconds, 0)
                    .ok_or_else(|| unknown("its time is impossible"))?,
                timeline: timeline(8)?,
                shutdown: code == xlog::CHECKPOINT_SHUTDOWN,
                next_full_xid: u64_at(main, 24).ok_or_else(short)?,
            }
        }
        xlog::SWITCH => EventKind::Switch,
        xlog::BACKUP_END => EventKind::BackupEnd { start_lsn: lsn(0)? },
        xlog::PARAMETER_CHANGE => EventKind::ParameterChange { settings: limits(main).ok_or_else(short)? },
        xlog::RESTORE_POINT => {
            const NAME_LEN: usize = 64;
            let name = main.get(8..8 + NAME_LEN).ok_or_else(short)?;
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            EventKind::RestorePoint { time: time(0)?, name: String::from_utf8_lossy(name).into_owned() }
        }
        xlog::END_OF_RECOVERY => {
            if main.len() < layout.end_of_recovery_len {
                return Err(short());
            }
            EventKind::EndOfRecovery {
                time: time(0)?,
                timeline: timeline(8)?,
                previous_timeline: timeline(12)?,
            }
        }
        _ => EventKind::OverwriteContrecord { overwritten: lsn(0)?, time: time(8)? },
    })
}

fn decode_tablespace(code: u8, main: &[u8]) -> Result<EventKind, UnknownLayout> {
    let short = || unknown("a tablespace record ends early");
    let oid = u32_at(main, 0).ok_or_else(short)?;
    if code == TABLESPACE_DROP {
        return Ok(EventKind::TablespaceDrop { oid });
    }
    let path = c_string_at(main, 4).ok_or_else(short)?;
    Ok(EventKind::TablespaceCreate { oid, path: String::from_utf8_lossy(path).into_owned() })
}

fn limits(main: &[u8]) -> Option<ServerLimits> {
    Some(ServerLimits {
        max_connections: i32_at(main, 0)?,
        max_worker_processes: i32_at(main, 4)?,
        max_wal_senders: i32_at(main, 8)?,
        max_prepared_transactions: i32_at(main, 12)?,
        max_locks_per_transaction: i32_at(main, 16)?,
        wal_level: i32_at(main, 20)?,
        wal_log_hints: *main.get(24)? != 0,
        track_commit_timestamp: *main.get(25)? != 0,
    })
}

/// Reads a list of oids: its count at `count_at`, the oids from `at` on.
fn oids(main: &[u8], count_at: usize, at: usize) -> Result<Vec<u32>, UnknownLayout> {
    let short = || unknown("a list of object ids ends early");
    let count = u32_at(main, count_at).ok_or_else(short)? as usize;
    let bytes = count.checked_mul(4).and_then(|len| at.checked_add(len)).and_then(|end| main.get(at..end));
    Ok(bytes.ok_or_else(short)?.chunks_exact(4).filter_map(|chunk| u32_at(chunk, 0)).collect())
}

#[cfg(test)]
mod tests {
    use super::super::event::RelFileLocator;
    use super::super::record::tests::build;
    use super::*;

    fn event(major: u32, rmgr: u8, info: u8, main: &[u8]) -> Result<Option<EventKind>, UnknownLayout> {
        let bytes = build(3, 0, rmgr, info, &[], main);
        let header = RecordHeader::parse(&bytes).unwrap();
        let record = Record { lsn: Lsn(8), end_lsn: Lsn(16), header, bytes: &bytes };
        decode(&record, Layout::for_major(major).unwrap()).map(|event| event.map(|event| event.kind))
    }

    fn words(values: &[u32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn times_are_those_that_a_calendar_holds() {
        let mut edges = [i64::MIN, 0, i64::MAX].to_vec();
        for edge in [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC] {
            let micros = edge.timestamp_micros() - EPOCH_SECONDS * 1_000_000;
            edges.extend((-3..=3).map(|by| micros + by));
        }
        for micros in edges {
            assert_eq!(is_time(micros), time_of(micros).is_some(), "{micros}");
        }
    }

    #[test]
    fn database_drop_moved_in_15() {
        let main = words(&[16400, 2, 1663, 16500]);
        let dropped = Some(EventKind::DatabaseDrop { oid: 16400, tablespaces: vec![1663, 16500] });
        assert_eq!(event(14, rmgr::DATABASE, 0x10, &main), Ok(dropped.clone()));
        assert_eq!(event(14, rmgr::DATABASE, 0x20, &main), Ok(None));
        for major in 15..=18 {
            assert_eq!(event(major, rmgr::DATABASE, 0x20, &main), Ok(dropped.clone()));
            assert_eq!(event(major, rmgr::DATABASE, 0x10, &main), Ok(None));
        }
        assert!(event(15, rmgr::DATABASE, 0x20, &main[..12]).is_err());
        assert!(event(15, rmgr::DATABASE, 0x20, &words(&[1, u32::MAX])).is_err());
    }

    #[test]
    fn tablespaces_truncations_and_backup_ends() {
        let mut create = words(&[16500]);
        create.extend(b"/srv/ts\0");
        let path = "/srv/ts".to_owned();
        assert_eq!(
            event(16, rmgr::TABLESPACE, 0, &create),
            Ok(Some(EventKind::TablespaceCreate { oid: 16500, path }))
        );
        assert_eq!(
            event(16, rmgr::TABLESPACE, 0x10, &words(&[16500])),
            Ok(Some(EventKind::TablespaceDrop { oid: 16500 }))
        );
        assert!(event(16, rmgr::TABLESPACE, 0, &create[..8]).is_err(), "path without its end");
        let relation = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
        assert_eq!(
            event(16, rmgr::SMGR, 0x20, &words(&[3, 1663, 5, 16384, 7])),
            Ok(Some(EventKind::StorageTruncate { relation, blocks: 3 }))
        );
        assert_eq!(
            event(16, rmgr::HEAP, 0x30, &words(&[5, 2, 0, 16384, 16387])),
            Ok(Some(EventKind::Truncate { database: 5, relations: vec![16384, 16387] }))
        );
        assert_eq!(
            event(16, rmgr::XLOG, 0x50, &0x0200_0028u64.to_le_bytes()),
            Ok(Some(EventKind::BackupEnd { start_lsn: Lsn(0x0200_0028) }))
        );
    }

    #[test]
    fn end_of_recovery_is_longer_from_17() {
        let main = words(&[0, 0, 2, 1]);
        assert!(matches!(event(16, rmgr::XLOG, 0x90, &main), Ok(Some(EventKind::EndOfRecovery { .. }))));
        assert!(event(17, rmgr::XLOG, 0x90, &main).is_err());
        assert!(event(16, rmgr::XLOG, 0x90, &words(&[0, 0, 0, 1])).is_err(), "timeline 0");
    }

    #[test]
    fn what_does_not_matter_is_no_event() {
        for (rmgr, info) in
            [(0, 0x20), (0, 0xB0), (0, 0xE0), (1, 0x50), (1, 0x60), (2, 0x10), (10, 0), (200, 0)]
        {
            assert_eq!(event(17, rmgr, info, &[1, 2, 3]), Ok(None), "{rmgr} {info:#x}");
        }
    }
}
