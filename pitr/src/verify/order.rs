//! In which order what is to be proven is read: what was not proven for longest first.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use walship::catalog::Catalog;
use walship::pg::{SegmentName, TimelineId};

use super::needed::Needed;
use super::proven::ProvenState;

/// So many consecutive segments are read one after the other; such pieces are read side by side.
pub const SEGMENTS_PER_PIECE: u64 = 32;

/// A piece of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// When what it reads was last proven; `None`: some of it never.
    pub at: Option<DateTime<Utc>>,
    /// What it reads.
    pub what: WorkKind,
}

/// What a piece of work reads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkKind {
    /// Everything of these consecutive segments that is stored under `wal/`.
    Wal {
        /// Their timeline.
        timeline: TimelineId,
        /// The number of the first.
        from: u64,
        /// The number behind the last.
        until: u64,
    },
    /// The parts of a segment that is stored whole too.
    Parts(SegmentName),
    /// A data object of a backup: its place in the record.
    Object {
        /// The backup's id.
        backup: String,
        /// The place, from 0.
        place: u32,
    },
}

/// Returns everything that is needed as pieces of work, in the order in which it is read. `objects` says how many data
/// objects each backup has, `parts` which segments are stored whole and have parts.
///
/// What was proven at or after `round` is left out: the verification that is gone on with has read it.
pub fn order(
    catalog: &Catalog,
    needed: &Needed,
    proven: &ProvenState,
    objects: &BTreeMap<String, u32>,
    parts: &BTreeSet<SegmentName>,
    round: Option<DateTime<Utc>>,
) -> Vec<Work> {
    let size = catalog.lineage.segment_size;
    let mut work = Vec::new();
    for timeline in catalog.segments.timelines() {
        let spans = proven.wal(timeline);
        for run in catalog.segments.runs(timeline) {
            let (first, end) = (run.first.number(size), run.last.number(size) + 1);
            for (from, until) in needed.within(timeline, first, end) {
                for piece in spans.pieces(from, until) {
                    let mut at = piece.from;
                    while at < piece.until {
                        // At the same borders every time, whatever was proven before.
                        let border = (at / SEGMENTS_PER_PIECE + 1) * SEGMENTS_PER_PIECE;
                        let until = border.min(piece.until);
                        let what = WorkKind::Wal { timeline, from: at, until };
                        work.push(Work { at: piece.at, what });
                        at = until;
                    }
                }
            }
        }
    }
    for name in parts.iter().filter(|name| needed.has_segment(**name, size)) {
        let number = name.number(size);
        let at = proven.parts(name.timeline).pieces(number, number + 1).first().and_then(|piece| piece.at);
        work.push(Work { at, what: WorkKind::Parts(*name) });
    }
    for backup in needed.backups.iter() {
        let count = u64::from(objects.get(backup).copied().unwrap_or(0));
        for piece in proven.objects(backup).pieces(0, count) {
            let places = (piece.from..piece.until).filter_map(|place| u32::try_from(place).ok());
            work.extend(places.map(|place| {
                let what = WorkKind::Object { backup: backup.clone(), place };
                Work { at: piece.at, what }
            }));
        }
    }
    work.retain(|work| round.is_none_or(|round| work.at.is_none_or(|at| at < round)));
    work.sort_by(|a, b| (a.at, &a.what).cmp(&(b.at, &b.what)));
    work
}
