//! How far a server's WAL and its archiver are: what an archive is compared with.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::connection::{Connection, Rows};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentSize, TimelineId};

/// How many slots are asked for.
const SLOTS_MAX: usize = 20;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerPosition {
    /// Its system identifier.
    pub system_identifier: u64,
    /// Its segment size.
    pub segment_size: SegmentSize,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// The timeline that it writes, or as a standby replays.
    pub timeline: TimelineId,
    /// The position after the last byte of WAL that it has flushed, or as a standby received or replayed.
    pub wal_lsn: Lsn,
    /// What its archiver says.
    pub archiver: Archiver,
    /// Its physical replication slots that hold WAL back, by name; at most 20.
    pub slots: Vec<Slot>,
}

/// `pg_stat_archiver`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Archiver {
    /// The last file that was archived.
    pub last_archived_wal: Option<String>,
    /// When.
    pub last_archived_time: Option<DateTime<Utc>>,
    /// The last file that could not be archived, when nothing was archived since.
    pub failing_wal: Option<String>,
}

/// A physical replication slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// The oldest WAL that it keeps.
    pub restart_lsn: Lsn,
    /// Whether somebody streams from it.
    pub active: bool,
}

/// Returns where the server of an ordinary session is. Two queries; any role may ask them.
///
/// # Errors
/// What the connection says, and [`Error::Mismatch`] for answers that make no sense.
pub async fn server_position(connection: &mut Connection) -> Result<ServerPosition> {
    // pg_walfile_name() is refused during recovery, where the control file's timeline is the replayed one's.
    let sql = "SELECT s.system_identifier, i.bytes_per_wal_segment, r.in_recovery, \
               CASE WHEN r.in_recovery THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
               ELSE pg_current_wal_flush_lsn() END, \
               CASE WHEN r.in_recovery THEN lpad(to_hex(c.timeline_id), 8, '0') \
               ELSE left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) END, \
               a.last_archived_wal, \
               to_char(a.last_archived_time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
               CASE WHEN a.last_failed_time > coalesce(a.last_archived_time, '-infinity') \
               THEN a.last_failed_wal END \
               FROM pg_control_system() s, pg_control_init() i, pg_control_checkpoint() c, pg_stat_archiver a, \
               (SELECT pg_is_in_recovery() AS in_recovery) r";
    let rows = connection.query(sql).await?;
    let mut position = read_position(&rows)
        .ok_or_else(|| Error::mismatch("what the server says about its position makes no sense"))?;
    let sql = format!(
        "SELECT slot_name, restart_lsn, active FROM pg_replication_slots \
         WHERE slot_type = 'physical' AND restart_lsn IS NOT NULL AND wal_status IS DISTINCT FROM 'lost' ORDER BY slot_name LIMIT {SLOTS_MAX}"
    );
    let rows = connection.query(&sql).await?;
    let slots = (0..rows.rows.len()).filter_map(|row| {
        let (name, restart_lsn) = (rows.get(row, 0)?.to_owned(), rows.get(row, 1)?.parse().ok()?);
        Some(Slot { name, restart_lsn, active: rows.get(row, 2)? == "t" })
    });
    position.slots = slots.collect();
    Ok(position)
}

fn read_position(rows: &Rows) -> Option<ServerPosition> {
    let text = |column| rows.get(0, column).filter(|text| !text.is_empty());
    let time = |text: &str| DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc());
    Some(ServerPosition {
        // The server shows it as a signed number.
        system_identifier: text(0)?.parse::<i64>().ok()? as u64,
        segment_size: SegmentSize::new(text(1)?.parse().ok()?)?,
        in_recovery: text(2)? == "t",
        wal_lsn: text(3)?.parse().ok()?,
        timeline: TimelineId::new(u32::from_str_radix(text(4)?, 16).ok()?)?,
        archiver: Archiver {
            last_archived_wal: text(5).map(str::to_owned),
            last_archived_time: text(6).and_then(time),
            failing_wal: text(7).map(str::to_owned),
        },
        slots: Vec::new(),
    })
}
