//! What the server says. Any role may ask the most of it; what needs `pg_monitor` is left out without.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pg::SegmentSize;
use crate::pg::control::ControlData;
use crate::replication::connection::{Connection, SessionKind};
use crate::replication::options::ConnectOptions;
use crate::replication::{StandbyRole, server_position};
use crate::watch::{Disk, DiskPlace, ServerFacts, SlotFacts, Transactions};

use super::disk;

/// Which cluster the server is, and which timeline it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its system identifier.
    pub system_identifier: u64,
    /// Its segment size.
    pub segment_size: SegmentSize,
    /// The timeline.
    pub timeline: crate::pg::TimelineId,
}

/// Asks the server; returns also where it says that its data directory is. Nothing is known of its disks by that.
pub(super) async fn ask(
    options: &ConnectOptions,
    slot: &str,
    transactions: &mut Transactions,
) -> Result<(ServerFacts, Identity, Option<PathBuf>)> {
    let mut connection = Connection::connect(options, SessionKind::Ordinary).await?;
    // First: what it has flushed later can only be more.
    let position = server_position(&mut connection).await?;
    let sql = "SELECT current_setting('archive_mode'), current_setting('synchronous_standby_names'), a.failed_count, \
               CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_snapshot()::text END, \
               CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn() END \
               FROM pg_stat_archiver a";
    let rows = connection.query(sql).await?;
    let text = |column| rows.get(0, column).unwrap_or_default().to_owned();
    // The snapshot is the statement's own, and so older than the position.
    let snapshot = rows.get(0, 3).zip(rows.get(0, 4).and_then(|text| text.parse().ok()));
    let ended =
        snapshot.and_then(|(snapshot, written)| transactions.step(position.timeline, snapshot, written));
    let facts = ServerFacts {
        timeline: position.timeline,
        in_recovery: position.in_recovery,
        wal_lsn: position.wal_lsn,
        segment_bytes: position.segment_size.bytes(),
        ended,
        archives: text(0) != "off",
        ready_files: ready_files(&mut connection).await?,
        archive_failures_total: text(2).parse().unwrap_or(0),
        failing_wal: position.archiver.failing_wal.clone(),
        last_archived: position.archiver.last_archived_time,
        slot: read_slot(&mut connection, slot).await?,
        commits_wait: StandbyRole::of(&text(1), &options.application_name) != StandbyRole::None,
        disks: Some(Vec::new()),
    };
    let identity = Identity {
        system_identifier: position.system_identifier,
        segment_size: position.segment_size,
        timeline: position.timeline,
    };
    let rows = allowed(connection.query("SELECT current_setting('data_directory')").await)?;
    let data_dir = rows.and_then(|rows| rows.get(0, 0).map(PathBuf::from));
    connection.close().await;
    Ok((facts, identity, data_dir))
}

/// Returns the answer, or `None` where the role may not ask that.
fn allowed<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Denied(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn ready_files(connection: &mut Connection) -> Result<Option<u64>> {
    let sql = "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'";
    let rows = allowed(connection.query(sql).await)?;
    Ok(rows.and_then(|rows| rows.get(0, 0)?.parse().ok()))
}

async fn read_slot(connection: &mut Connection, name: &str) -> Result<Option<SlotFacts>> {
    let sql = format!(
        "SELECT active, coalesce(wal_status, ''), pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
         THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END, restart_lsn)::bigint \
         FROM pg_replication_slots WHERE slot_type = 'physical' AND slot_name = '{}'",
        name.replace('\'', "''")
    );
    let rows = connection.query(&sql).await?;
    if rows.rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(SlotFacts {
        name: name.to_owned(),
        active: rows.get(0, 0) == Some("t"),
        lag_bytes: rows.get(0, 2).and_then(|text| text.parse::<i64>().ok()).map(|lag| lag.max(0) as u64),
        wal_status: rows.get(0, 1).unwrap_or_default().to_owned(),
    }))
}

/// Returns how full the server's disks are, where its data directory lies on this machine. On a mount that hangs it never
/// returns.
pub(super) async fn disks(path: PathBuf, system_identifier: u64) -> Vec<(DiskPlace, Disk)> {
    let look = move || {
        let is_it = control_of(&path).is_some_and(|control| control.system_identifier == system_identifier);
        let places = [(DiskPlace::DataDirectory, path.clone()), (DiskPlace::Wal, path.join("pg_wal"))];
        let room = |(place, path): (DiskPlace, PathBuf)| Some((place, disk::room(&path)?));
        if is_it { places.into_iter().filter_map(room).collect() } else { Vec::new() }
    };
    crate::storage::blocking(move || Ok(look())).await.unwrap_or_default()
}

/// Another machine's path may be here too, of another server or of none.
fn control_of(data_dir: &Path) -> Option<ControlData> {
    let bytes = std::fs::read(data_dir.join("global/pg_control")).ok()?;
    ControlData::parse(&bytes).ok()
}
