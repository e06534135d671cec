//! The windows of a timeline: the spans in which every commit can be reached.

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::Catalog;
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};

use super::chain::{Chain, ChainEnding, begin_of, build_chain};
use super::gap::{Gap, KnownBy, is_on_path};

/// A span on the way to one timeline in which every commit can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Window {
    /// The timeline that it ends on.
    pub timeline: TimelineId,
    /// Where it begins: the first backup is consistent there.
    pub from_lsn: Lsn,
    /// When that backup was complete.
    pub from_time: DateTime<Utc>,
    /// The first backup.
    pub first_backup: String,
    /// The newest backup in it.
    pub newest_backup: String,
    /// How many backups begin in it.
    pub backups: u64,
    /// Where it ends.
    pub until_lsn: Lsn,
    /// The last segment that is used.
    pub last_segment: Option<SegmentName>,
    /// What ends it.
    pub ended_by: WindowEnd,
    /// The gap that ends it.
    pub gap: Option<Gap>,
    /// Where `pg_resetwal` made WAL begin anew: at its end, or right behind the gap that ends it.
    pub reset_lsn: Option<Lsn>,
}

/// What ends a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowEnd {
    /// The archive.
    EndOfArchive,
    /// WAL is missing behind it; so also where `pg_resetwal` left out segments ([`Window::reset_lsn`]): whether the server
    /// had written WAL in between nobody can tell.
    Gap,
    /// WAL behind it was removed on purpose, by retention: this is what makes a kept backup consistent.
    Expired,
    /// `wal_level` was minimal from there on: PostgreSQL refuses to recover across it.
    WalLevelMinimal,
    /// `pg_resetwal` was run: WAL begins anew there, and PostgreSQL recovers from no earlier backup across it.
    WalReset,
}

/// A record that no recovery crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Break {
    /// The timeline that it is on.
    pub timeline: TimelineId,
    /// Where it starts.
    pub lsn: Lsn,
    /// Why it ends a window.
    pub ends_by: WindowEnd,
}

/// Returns the windows that end on `timeline`, in WAL order; none when its history is not stored. `breaks` are
/// the records that no recovery crosses.
///
/// A window that begins on an ancestor and leads into the timeline is one of them, a window that
/// ends before the timeline begins is the ancestor's.
pub fn windows(catalog: &Catalog, timeline: TimelineId, breaks: &[Break]) -> Vec<Window> {
    let Some(history) = catalog.history(timeline) else { return Vec::new() };
    let begin = begin_of(&history, timeline).unwrap_or(Lsn(0));
    let mut windows: Vec<Window> = Vec::new();
    for backup in &catalog.backups {
        if !is_on_path(&history, backup) {
            continue;
        }
        if let Some(window) = windows.last_mut()
            && backup.start_lsn < window.until_lsn
        {
            // Inside the run of the one before: the same window, unless it was too short for its own backup.
            if backup.stop_lsn <= window.until_lsn {
                window.newest_backup.clone_from(&backup.id);
                window.backups += 1;
                // Of two at the same time the one that ended first.
                if backup.stop_lsn < window.from_lsn {
                    window.from_lsn = backup.stop_lsn;
                    window.from_time = backup.finished;
                    window.first_backup.clone_from(&backup.id);
                }
            }
            continue;
        }
        let chain = build_chain(catalog, &history, backup.start_lsn);
        let on_path = breaks.iter().filter(|one| history.timeline_of(one.lsn) == one.timeline);
        // Recovery may start at the record with which WAL begins.
        let behind = |one: &&Break| match one.ends_by {
            WindowEnd::WalReset => one.lsn > backup.start_lsn,
            _ => one.lsn >= backup.start_lsn,
        };
        let broken = on_path.filter(behind).filter(|one| one.lsn < chain.end());
        let mut window = window_of(&history, backup, &chain, broken.min_by_key(|one| one.lsn));
        if let Some(Gap { to, known_by: KnownBy::LaterWal, .. }) = window.gap {
            let first = to.0..to.0.saturating_add(catalog.lineage.segment_size.bytes());
            let on_path = breaks.iter().filter(|one| history.timeline_of(one.lsn) == one.timeline);
            let resets =
                on_path.filter(|one| one.ends_by == WindowEnd::WalReset && first.contains(&one.lsn.0));
            window.reset_lsn = resets.map(|one| one.lsn).min();
        }
        if window.until_lsn >= backup.stop_lsn && window.until_lsn > begin {
            windows.push(window);
        }
    }
    windows
}

fn window_of(
    history: &TimelineHistory,
    backup: &walship::catalog::BackupRecord,
    chain: &Chain,
    broken: Option<&Break>,
) -> Window {
    let until_lsn = broken.map_or(chain.end(), |one| one.lsn);
    let gap = match (&chain.ending, broken) {
        (ChainEnding::Gap(gap), None) => Some(gap.clone()),
        _ => None,
    };
    Window {
        timeline: history.timeline,
        from_lsn: backup.stop_lsn,
        from_time: backup.finished,
        first_backup: backup.id.clone(),
        newest_backup: backup.id.clone(),
        backups: 1,
        until_lsn,
        last_segment: chain.last_before(until_lsn).map(|step| chain.step(step).segment),
        ended_by: match (&gap, broken) {
            (_, Some(one)) => one.ends_by,
            (Some(gap), None) if gap.expired => WindowEnd::Expired,
            (Some(_), None) => WindowEnd::Gap,
            (None, None) => WindowEnd::EndOfArchive,
        },
        gap,
        reset_lsn: broken.filter(|one| one.ends_by == WindowEnd::WalReset).map(|one| one.lsn),
    }
}
