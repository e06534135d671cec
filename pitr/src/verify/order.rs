//! In which order what is to be proven is read: what was not proven for longest first.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use walship::catalog::{ReadPlace, StoredSegments};
use walship::pg::{SegmentName, TimelineId};

use super::needed::Needed;
use super::proven::ProvenState;

/// So many consecutive segments are read one after the other; such pieces are read side by side.
pub const SEGMENTS_PER_PIECE: u64 = 32;

/// A piece of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// When what it reads was last proven; `None`: some of it never, or it is damaged.
    pub at: Option<DateTime<Utc>>,
    /// When it was found damaged; `None`: it was not, when it was last read.
    pub damaged: Option<DateTime<Utc>>,
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
    /// A part of a backup.
    Backup {
        /// The backup's id.
        backup: String,
        /// The place of a data object in the record, from 0; `None`: what lies beside them.
        place: Option<u32>,
    },
}

/// Returns everything that is needed as pieces of work, in the order in which it is read: what is known to be damaged first,
/// it may be mended. `stored` are the segments of which anything is stored under `wal/`, `objects` says how many data objects
/// each backup has, `parts` which segments are stored whole and have parts.
///
/// What was read at or after `round` is left out: the verification that is gone on with has read it.
pub fn order(
    stored: &StoredSegments,
    needed: &Needed,
    proven: &ProvenState,
    objects: &BTreeMap<String, u32>,
    parts: &BTreeSet<SegmentName>,
    round: Option<DateTime<Utc>>,
) -> Vec<Work> {
    let size = stored.size();
    let damaged = |place: &ReadPlace| proven.damage().get(place).map(|damage| damage.at);
    let mut work = Vec::new();
    for timeline in stored.timelines() {
        let spans = proven.wal(timeline);
        let known: BTreeMap<u64, DateTime<Utc>> = proven
            .damage()
            .iter()
            .filter_map(|(place, damage)| match place {
                ReadPlace::Segment(name) if name.timeline == timeline => Some((name.number(size), damage.at)),
                _ => None,
            })
            .collect();
        for run in stored.runs(timeline) {
            let (first, end) = (run.first.number(size), run.last.number(size) + 1);
            for (from, until) in needed.within(timeline, first, end) {
                for piece in spans.pieces(from, until) {
                    let mut at = piece.from;
                    while at < piece.until {
                        let damaged = known.get(&at).copied();
                        // At the same borders every time, whatever was proven before; what is damaged by itself.
                        let border = match damaged {
                            Some(_) => at + 1,
                            None => (at / SEGMENTS_PER_PIECE + 1) * SEGMENTS_PER_PIECE,
                        };
                        let next = known.range(at + 1..).next().map_or(u64::MAX, |(number, _)| *number);
                        let until = border.min(piece.until).min(next);
                        let what = WorkKind::Wal { timeline, from: at, until };
                        work.push(Work { at: piece.at, damaged, what });
                        at = until;
                    }
                }
            }
        }
    }
    for name in parts.iter().filter(|name| needed.has_segment(**name, size)) {
        let number = name.number(size);
        let at = proven.parts(name.timeline).pieces(number, number + 1).first().and_then(|piece| piece.at);
        work.push(Work { at, damaged: None, what: WorkKind::Parts(*name) });
    }
    for backup in &needed.backups {
        let place = ReadPlace::Documents { backup: backup.clone() };
        let what = WorkKind::Backup { backup: backup.clone(), place: None };
        work.push(Work { at: proven.documents(backup), damaged: damaged(&place), what });
        let count = u64::from(objects.get(backup).copied().unwrap_or(0));
        for piece in proven.objects(backup).pieces(0, count) {
            let places = (piece.from..piece.until).filter_map(|place| u32::try_from(place).ok());
            work.extend(places.map(|place| {
                let damaged = damaged(&ReadPlace::Object { backup: backup.clone(), place });
                let what = WorkKind::Backup { backup: backup.clone(), place: Some(place) };
                Work { at: piece.at, damaged, what }
            }));
        }
    }
    let read = |work: &Work| work.damaged.or(work.at);
    work.retain(|work| round.is_none_or(|round| read(work).is_none_or(|at| at < round)));
    work.sort_by(|a, b| {
        (a.damaged.is_none(), read(a), &a.what).cmp(&(b.damaged.is_none(), read(b), &b.what))
    });
    work
}
