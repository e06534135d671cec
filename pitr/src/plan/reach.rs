//! PostgreSQL's stopping rules, applied to one backup and the WAL behind it.
//!
//! Replay starts at the backup's redo position and looks at every record in WAL order: before a record
//! is applied (`recoveryStopsBefore`: exclusive targets, and time always) and after
//! (`recoveryStopsAfter`: inclusive LSN and xid, names). A stop before the backup's end is an error:
//! "requested recovery stop point is before consistent recovery point".

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use walship::catalog::BackupRecord;
use walship::pg::{Lsn, SegmentSize};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::page::{PAGE_SIZE, PageHeader};
use walship::wal::rollup::Class;

use super::chain::build_chain_until;
use super::walk::{Seek, Walk};
use super::{Candidate, ChainEnding, Halt, Question, decides};
use crate::target::{StopSide, TargetKind};

/// How long after a checkpoint's time its redo position may be fixed: the time has whole seconds,
/// rounded down, and is taken a moment before.
///
/// Source: `src/backend/access/transam/xlog.c`, CreateCheckPoint.
const CHECKPOINT_LAG: TimeDelta = TimeDelta::seconds(2);

/// Where and why recovery stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stop {
    /// On which side of which record.
    pub kind: StopKind,
    /// Records that start before this position are replayed, none that start at or after it.
    pub cut_lsn: Lsn,
    /// Where replay ends.
    pub final_lsn: Lsn,
    /// WAL must be whole up to here: the record that decides is read to its end.
    pub through_lsn: Lsn,
    /// The record that decides, where its content matters.
    pub record: Option<WalEvent>,
}

/// On which side of a record recovery stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopKind {
    /// Before the record at `cut_lsn` is applied.
    Before,
    /// After the record that ends at `final_lsn` is applied.
    After,
    /// When the backup is consistent.
    Consistent,
    /// Where the archived WAL ends.
    EndOfWal,
}

/// What a target means for one backup.
#[derive(Debug)]
pub(crate) enum Reach {
    /// Recovery stops here.
    Stop(Stop),
    /// Recovery would stop before the backup is consistent, which PostgreSQL refuses.
    BeforeConsistency {
        /// Where it would stop.
        lsn: Lsn,
    },
    /// The unbroken WAL behind the backup ends before the target.
    NotReached,
}

/// Returns the position after a record, as PostgreSQL counts it: records end at a multiple of eight.
///
/// Source: `src/include/access/xlogrecord.h`, MAXALIGN of xl_tot_len.
pub(crate) fn aligned(lsn: Lsn) -> Lsn {
    Lsn(lsn.0.saturating_add(7) & !7)
}

/// Returns that a backup is too new when that can be said without looking at the WAL behind its end.
pub(crate) fn too_new(question: &Question<'_>, backup: &BackupRecord) -> Result<Option<Reach>, Halt> {
    match &question.target.kind {
        // The first record would decide; a backup never becomes consistent at its first record.
        TargetKind::Lsn(target) if *target < backup.start_lsn => {
            Ok(Some(Reach::BeforeConsistency { lsn: *target }))
        }
        // What was committed before the redo position is in the backup whatever its time, and replay does
        // not look at it: a backup that began after the target would silently give too much. A backup whose
        // checkpoint is not found cannot tell, and does not serve.
        TargetKind::Time { time, .. } => {
            let chain =
                build_chain_until(question.catalog, question.history, backup.start_lsn, backup.stop_lsn);
            if chain.end() < backup.stop_lsn {
                return Ok(None);
            }
            let began = began(&Walk::new(question, &chain), backup, *time)?;
            Ok(match began.filter(|began| began <= time) {
                Some(_) => None,
                None => Some(Reach::BeforeConsistency { lsn: backup.start_lsn }),
            })
        }
        _ => Ok(None),
    }
}

/// Returns where recovery from this backup stops; to be asked when it is not [`too_new`].
pub(crate) fn reach(question: &Question<'_>, candidate: &Candidate<'_>) -> Result<Reach, Halt> {
    let walk = Walk::new(question, &candidate.chain);
    let consistent = candidate.backup.stop_lsn;
    if candidate.chain.end() < consistent {
        return Ok(Reach::NotReached);
    }
    let inclusive = question.target.stop == StopSide::Inclusive;
    match &question.target.kind {
        TargetKind::Latest => {
            if candidate.chain.ending != ChainEnding::EndOfArchive {
                return Ok(Reach::NotReached);
            }
            let end = walk.end_of_records()?;
            if end < consistent {
                return Ok(Reach::NotReached);
            }
            Ok(Reach::Stop(Stop {
                kind: StopKind::EndOfWal,
                cut_lsn: end,
                final_lsn: end,
                through_lsn: candidate.chain.end(),
                record: None,
            }))
        }
        TargetKind::Immediate => {
            // Consistency is noticed when the next record is read, so there must be one.
            let Some(next) = walk.record_at(consistent)? else { return Ok(Reach::NotReached) };
            Ok(Reach::Stop(Stop {
                kind: StopKind::Consistent,
                cut_lsn: next.lsn,
                final_lsn: consistent,
                through_lsn: next.end_lsn,
                record: None,
            }))
        }
        TargetKind::Lsn(target) => {
            let Some(bounds) = walk.record_at(*target)? else { return Ok(Reach::NotReached) };
            let stop = match inclusive {
                true => Stop {
                    kind: StopKind::After,
                    cut_lsn: Lsn(bounds.lsn.0.saturating_add(1)),
                    final_lsn: aligned(bounds.end_lsn),
                    through_lsn: bounds.end_lsn,
                    record: None,
                },
                false => Stop {
                    kind: StopKind::Before,
                    cut_lsn: bounds.lsn,
                    final_lsn: end_before(bounds.lsn, walk.size),
                    through_lsn: bounds.end_lsn,
                    record: None,
                },
            };
            Ok(checked(stop, consistent))
        }
        TargetKind::Time { time, .. } => {
            let Some(began) = began(&walk, candidate.backup, *time)?.filter(|began| began <= time) else {
                return Ok(Reach::BeforeConsistency { lsn: candidate.backup.start_lsn });
            };
            let past = |t: DateTime<Utc>| if inclusive { t > *time } else { t >= *time };
            let found = walk.decisive(&Seek {
                maybe: &|facts, _| facts.max_time.is_some_and(|max| past(max.time)),
                matches: &|event| decides(question.target, event),
            })?;
            let Some((at, event)) = found else { return Ok(Reach::NotReached) };
            if began.checked_add_signed(CHECKPOINT_LAG).is_none_or(|fixed| fixed > *time) {
                // Only WAL can tell that redo was fixed by then: a record behind it that is no later.
                let earlier = Seek {
                    maybe: &|facts, _| facts.min_time.is_some_and(|min| !past(min.time)),
                    matches: &|event| event.kind.stop_time().is_some_and(|t| !past(t)),
                };
                if walk.last(at, event.lsn, &earlier)?.is_none() {
                    return Ok(Reach::BeforeConsistency { lsn: candidate.backup.start_lsn });
                }
            }
            Ok(checked(before(event, walk.size), consistent))
        }
        TargetKind::Xid(xid) => {
            let found = walk.decisive(&Seek {
                maybe: &|facts, _| facts.ended_xids.is_some_and(|(low, high)| (low..=high).contains(xid)),
                matches: &|event| decides(question.target, event),
            })?;
            Ok(found.map_or(Reach::NotReached, |(_, event)| {
                checked(if inclusive { after(event) } else { before(event, walk.size) }, consistent)
            }))
        }
        TargetKind::Name(_) => {
            let is_it = |event: &WalEvent| decides(question.target, event);
            let found = walk.decisive(&Seek {
                maybe: &|facts, events| facts.more.has(Class::Planning) || events.iter().any(is_it),
                matches: &is_it,
            })?;
            Ok(found.map_or(Reach::NotReached, |(_, event)| checked(after(event), consistent)))
        }
    }
}

/// Returns when the backup's checkpoint began, by the server's clock; what was committed before its redo
/// position is not later than that by more than [`CHECKPOINT_LAG`]. `None` when it is not found, or (as the
/// index says without looking closer) began after `latest`.
fn began(
    walk: &Walk<'_>,
    backup: &BackupRecord,
    latest: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, Halt> {
    let last = walk.chain.step_reaching(backup.stop_lsn);
    if walk.began_after(last, latest) {
        return Ok(None);
    }
    let checkpoints = walk.notable(0, last, Class::Checkpoints)?;
    let mut inside = checkpoints.into_iter().filter(|event| event.lsn < backup.stop_lsn);
    Ok(inside.find_map(|event| match event.kind {
        EventKind::Checkpoint { redo, time, .. } if redo == backup.start_lsn => Some(time),
        _ => None,
    }))
}

/// Returns where the record before the one at `lsn` ends: there, or at the end of its page when `lsn` is the
/// first position behind a page's header.
///
/// Source: `src/backend/access/transam/xlogreader.c`, XLogDecodeNextRecord: NextRecPtr.
pub(crate) fn end_before(lsn: Lsn, size: SegmentSize) -> Lsn {
    let in_page = lsn.0 % PAGE_SIZE as u64;
    let header = match size.offset_of(lsn) - in_page {
        0 => PageHeader::LONG_LEN,
        _ => PageHeader::SHORT_LEN,
    };
    if in_page == header as u64 { Lsn(lsn.0 - in_page) } else { lsn }
}

fn before(event: &WalEvent, size: SegmentSize) -> Stop {
    Stop {
        kind: StopKind::Before,
        cut_lsn: event.lsn,
        final_lsn: end_before(event.lsn, size),
        through_lsn: event.end_lsn,
        record: Some(event.clone()),
    }
}

fn after(event: &WalEvent) -> Stop {
    Stop {
        kind: StopKind::After,
        cut_lsn: Lsn(event.lsn.0.saturating_add(1)),
        final_lsn: aligned(event.end_lsn),
        through_lsn: event.end_lsn,
        record: Some(event.clone()),
    }
}

/// Returns the stop unless it comes before the backup is consistent.
fn checked(stop: Stop, consistent: Lsn) -> Reach {
    if stop.final_lsn < consistent {
        Reach::BeforeConsistency { lsn: stop.final_lsn }
    } else {
        Reach::Stop(stop)
    }
}
