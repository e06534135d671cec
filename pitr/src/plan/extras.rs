//! What else a plan must know of the WAL it replays: settings that must not be undercut, folders that
//! replay creates, transactions left half done at the target.

use std::collections::BTreeMap;

use walship::catalog::{BackupRecord, PreparedTransaction};
use walship::pg::{Lsn, Xid};
use walship::wal::event::{EventKind, ServerLimits, WalEvent};
use walship::wal::rollup::Class;

use super::reach::Stop;
use super::walk::{Seek, Walk};
use super::{Halt, Refusal, RefusalKind, TablespacePath};

/// How many segments are read at most to find prepared transactions that stay open.
const PREPARED_SEGMENTS_MAX: usize = 16;

/// `wal_level = minimal` as WAL writes it.
pub(crate) const WAL_LEVEL_MINIMAL: i32 = 0;

/// Returns whether this record continues no record before it, as seen by recovery that starts at `start`.
pub(crate) fn begins_anew(event: &WalEvent, start: Lsn) -> bool {
    matches!(event.kind, EventKind::WalBegins { .. }) && event.lsn > start
}

/// Returns whether WAL behind this record lacks what a recovery needs.
pub(crate) fn is_minimal(settings: &ServerLimits) -> bool {
    settings.wal_level == WAL_LEVEL_MINIMAL
}

/// What the notable records between backup and stop say.
pub(crate) struct Notable {
    pub(crate) limits: ServerLimits,
    pub(crate) tablespace_paths: Vec<TablespacePath>,
}

/// Returns what the notable records of steps `0..=last` before the stop say.
pub(crate) fn notable(
    walk: &Walk<'_>,
    last: usize,
    stop: &Stop,
    start: ServerLimits,
) -> Result<Notable, Halt> {
    let mut found = Notable { limits: start, tablespace_paths: Vec::new() };
    let events = walk.notable(0, last, Class::Planning)?;
    for event in &events {
        // The record that decides is read, too.
        if begins_anew(event, walk.chain.start) && event.lsn < stop.through_lsn {
            return Err(Refusal::halt_at(
                event.lsn,
                RefusalKind::WalReset,
                format!(
                    "WAL begins anew at {}, where pg_resetwal was run: PostgreSQL recovers from no backup across it",
                    event.lsn
                ),
            ));
        }
    }
    for event in events.into_iter().filter(|event| event.lsn < stop.cut_lsn) {
        match event.kind {
            EventKind::ParameterChange { settings } => {
                if is_minimal(&settings) {
                    return Err(Refusal::halt_at(
                        event.lsn,
                        RefusalKind::WalLevelMinimal,
                        format!(
                            "wal_level was set to minimal at {}: changes after that are not in the WAL, \
                             and PostgreSQL refuses to recover across it",
                            event.lsn
                        ),
                    ));
                }
                found.limits = larger(found.limits, settings);
            }
            EventKind::TablespaceCreate { oid, path } => {
                found.tablespace_paths.push(TablespacePath { oid, path, lsn: event.lsn });
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Returns the larger of each limit.
fn larger(a: ServerLimits, b: ServerLimits) -> ServerLimits {
    ServerLimits {
        max_connections: a.max_connections.max(b.max_connections),
        max_worker_processes: a.max_worker_processes.max(b.max_worker_processes),
        max_wal_senders: a.max_wal_senders.max(b.max_wal_senders),
        max_prepared_transactions: a.max_prepared_transactions.max(b.max_prepared_transactions),
        max_locks_per_transaction: a.max_locks_per_transaction.max(b.max_locks_per_transaction),
        wal_level: a.wal_level.max(b.wal_level),
        wal_log_hints: a.wal_log_hints || b.wal_log_hints,
        track_commit_timestamp: a.track_commit_timestamp || b.track_commit_timestamp,
    }
}

/// Returns the prepared transactions of the backup and of the WAL of steps `0..=last` that are open at the
/// stop, or `None` when more segments than [`PREPARED_SEGMENTS_MAX`] would have to be read, or the backup's
/// are not known.
pub(crate) fn open_prepared(
    walk: &Walk<'_>,
    last: usize,
    stop: &Stop,
    backup: &BackupRecord,
) -> Result<Option<Vec<PreparedTransaction>>, Halt> {
    let Some(held) = &backup.prepared else { return Ok(None) };
    let prepares = Seek {
        maybe: &|facts, _| facts.counts.prepares > 0,
        matches: &|event| matches!(event.kind, EventKind::Prepare { .. }),
    };
    let mut wanted = Vec::new();
    let mut from = 0;
    while let Some(at) = walk.next_step(from, last, &prepares)? {
        // Steps that are loaded anyway cost nothing.
        if walk.loaded(at).is_none_or(|mut events| events.any(|event| (prepares.matches)(event))) {
            wanted.push(at);
        }
        if wanted.len() > PREPARED_SEGMENTS_MAX {
            return Ok(None);
        }
        from = at + 1;
    }
    load(walk, &wanted)?;
    let mut read = wanted.len();
    let mut open: BTreeMap<Xid, PreparedTransaction> =
        held.iter().map(|prepared| (prepared.xid, prepared.clone())).collect();
    let mut from = 0;
    loop {
        // The next step that prepares one, or that may end one of those that are open.
        let ends = Seek {
            maybe: &|facts, _| {
                facts.ended_xids.is_some_and(|(low, high)| open.range(low..=high).next().is_some())
            },
            matches: &|event| event.kind.ended_xid(event.xid).is_some_and(|xid| open.contains_key(&xid)),
        };
        let prepared = wanted.iter().copied().find(|at| *at >= from);
        let ended = if open.is_empty() { None } else { walk.next_step(from, last, &ends)? };
        let Some(at) = prepared.into_iter().chain(ended).min() else {
            return Ok(Some(open.into_values().collect()));
        };
        if walk.loaded(at).is_none() {
            read += 1;
            if read > PREPARED_SEGMENTS_MAX {
                return Ok(None);
            }
            return Err(Halt::Events(vec![walk.request(at)?]));
        }
        for event in walk.events(at)?.filter(|event| event.lsn < stop.cut_lsn) {
            match &event.kind {
                EventKind::Prepare { time, prepared_xid, gid } => {
                    let prepared = PreparedTransaction { xid: *prepared_xid, gid: gid.clone(), time: *time };
                    open.insert(*prepared_xid, prepared);
                }
                EventKind::Commit { prepared_xid: Some(xid), .. }
                | EventKind::Abort { prepared_xid: Some(xid), .. } => {
                    open.remove(xid);
                }
                _ => {}
            }
        }
        from = at + 1;
    }
}

/// Asks for the events of those of `steps` that are not loaded.
fn load(walk: &Walk<'_>, steps: &[usize]) -> Result<(), Halt> {
    let mut requests = Vec::new();
    for &at in steps {
        if walk.loaded(at).is_none() {
            requests.push(walk.request(at)?);
        }
    }
    if requests.is_empty() { Ok(()) } else { Err(Halt::Events(requests)) }
}
