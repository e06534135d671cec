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

use super::assemble::COMMITS;
use super::chain::{Chain, build_chain, build_chain_until};
use super::walk::{Seek, Walk};
use super::{Candidate, ChainEnding, Halt, Question, decides};
use crate::target::{StopSide, TargetKind};

/// How long after a checkpoint's time its redo position may be fixed: the time has whole seconds,
/// rounded down, and is taken a moment before.
///
/// Source: `src/backend/access/transam/xlog.c`, CreateCheckPoint.
const CHECKPOINT_LAG: TimeDelta = TimeDelta::seconds(2);

/// How far before a backup's redo position is looked for the last commits, in segments; what is missing there
/// makes it less.
const LOOK_BACK_SEGMENTS: [u64; 4] = [256, 16, 1, 0];

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
    /// The backup's own WAL cannot be read, and so not when it began.
    Unknown,
}

/// Returns the position after a record, as PostgreSQL counts it: records end at a multiple of eight.
///
/// Source: `src/include/access/xlogrecord.h`, MAXALIGN of xl_tot_len.
pub(crate) fn aligned(lsn: Lsn) -> Lsn {
    Lsn(lsn.0.saturating_add(7) & !7)
}

/// The WAL that was last searched to its end without finding where recovery stops. Chains along the same way
/// differ only in where they begin: what is behind that for one is behind it for all.
#[derive(Debug, Default)]
pub(crate) struct InVain(Option<(Lsn, Lsn)>);

impl InVain {
    /// Returns the first event that [`decides`], with its step.
    fn search<'a>(
        &mut self,
        walk: &Walk<'a>,
        seek: &Seek<'_>,
    ) -> Result<Option<(usize, &'a WalEvent)>, Halt> {
        let chain: &Chain = walk.chain;
        let to = match self.0 {
            Some((from, to)) if (from..to).contains(&chain.start) => return Ok(None),
            Some((from, _)) => chain.step_of(from).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let found = walk.decisive(to, seek)?;
        if found.is_none() {
            self.0 = Some((chain.start, chain.end()));
        }
        Ok(found)
    }
}

/// Returns that a backup does not serve when that can be said without knowing where recovery would stop.
pub(crate) fn too_new(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
    in_vain: &mut InVain,
) -> Result<Option<Reach>, Halt> {
    let backup = candidate.backup;
    match &question.target.kind {
        // The first record would decide; a backup never becomes consistent at its first record.
        TargetKind::Lsn(target) if *target < backup.start_lsn => {
            Ok(Some(Reach::BeforeConsistency { lsn: *target }))
        }
        // What was committed before the redo position is in the backup whatever its time, and replay does
        // not look at it: a backup that began after the target would silently give too much. A backup whose
        // checkpoint is not found cannot tell, and does not serve.
        TargetKind::Time { time, .. } => {
            if candidate.chain.end() < backup.stop_lsn {
                return Ok(None);
            }
            // The search for what passes the target comes first where the backup's own clock lets expect that
            // it serves: it is needed then, and where it is in vain for one backup it is for all older ones.
            // When each began would be a request for each.
            if backup.started <= *time {
                let walk = Walk::new(question, &candidate.chain);
                match passing(question, &walk, *time, in_vain) {
                    Ok(None) => return Ok(Some(Reach::NotReached)),
                    Ok(Some(_)) | Err(Halt::Unreadable(_) | Halt::Refuse(_)) => {}
                    Err(halt) => return Err(halt),
                }
            }
            let began = began(question, backup, *time)?;
            Ok(match began.filter(|began| began <= time) {
                Some(_) => None,
                None => Some(Reach::BeforeConsistency { lsn: backup.start_lsn }),
            })
        }
        _ => Ok(None),
    }
}

/// Returns the first record whose time is past the target's, with its step.
fn passing<'a>(
    question: &Question<'_>,
    walk: &Walk<'a>,
    time: DateTime<Utc>,
    in_vain: &mut InVain,
) -> Result<Option<(usize, &'a WalEvent)>, Halt> {
    let seek = Seek {
        maybe: &|facts, _| facts.max_time.is_some_and(|max| past(question, max.time, time)),
        matches: &|event| decides(question.target, event),
    };
    in_vain.search(walk, &seek)
}

/// Returns whether a record of this time is past the target time.
fn past(question: &Question<'_>, record: DateTime<Utc>, target: DateTime<Utc>) -> bool {
    match question.target.stop {
        StopSide::Inclusive => record > target,
        StopSide::Exclusive => record >= target,
    }
}

/// Returns where recovery from this backup stops; to be asked when it is not [`too_new`].
pub(crate) fn reach(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
    in_vain: &mut InVain,
) -> Result<Reach, Halt> {
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
            let Some((at, event)) = passing(question, &walk, *time, in_vain)? else {
                return Ok(Reach::NotReached);
            };
            let began = began(question, candidate.backup, *time)?;
            let fixed = began.and_then(|began| began.checked_add_signed(CHECKPOINT_LAG));
            if fixed.is_none_or(|fixed| fixed > *time) {
                // Only WAL can tell that redo was fixed by then: a record behind it that is no later.
                let earlier = Seek {
                    maybe: &|facts, _| facts.min_time.is_some_and(|min| !past(question, min.time, *time)),
                    matches: &|event| event.kind.stop_time().is_some_and(|t| !past(question, t, *time)),
                };
                let told = began.is_some_and(|began| began <= *time)
                    && walk.last(at, event.lsn, &earlier)?.is_some();
                if !told && !holds_nothing_past(question, candidate.backup, *time)? {
                    return Ok(Reach::BeforeConsistency { lsn: candidate.backup.start_lsn });
                }
            }
            Ok(checked(before(event, walk.size), consistent))
        }
        TargetKind::Xid(xid) => {
            let seek = Seek {
                maybe: &|facts, _| facts.ended_xids.is_some_and(|(low, high)| (low..=high).contains(xid)),
                matches: &|event| decides(question.target, event),
            };
            let found = in_vain.search(&walk, &seek)?;
            Ok(found.map_or(Reach::NotReached, |(_, event)| {
                checked(if inclusive { after(event) } else { before(event, walk.size) }, consistent)
            }))
        }
        TargetKind::Name(_) => {
            let is_it = |event: &WalEvent| decides(question.target, event);
            let seek = Seek {
                maybe: &|facts, events| facts.more.has(Class::Planning) || events.iter().any(is_it),
                matches: &is_it,
            };
            let found = in_vain.search(&walk, &seek)?;
            Ok(found.map_or(Reach::NotReached, |(_, event)| checked(after(event), consistent)))
        }
    }
}

/// Returns the oldest of the backups that began after the target time, if it serves all the same: when nothing
/// was committed between the target and the backup, it holds what was there at the target. To be asked when no other
/// backup serves.
pub(crate) fn late<'a>(
    question: &Question<'a>,
    newest_first: &[(&'a BackupRecord, Reach)],
    in_vain: &mut InVain,
) -> Result<Option<(&'a BackupRecord, Stop)>, Halt> {
    let TargetKind::Time { time, .. } = question.target.kind else { return Ok(None) };
    let began_late = newest_first.iter().rev().find(
        |(backup, reach)| matches!(reach, Reach::BeforeConsistency { lsn } if *lsn == backup.start_lsn),
    );
    let Some((backup, _)) = began_late else { return Ok(None) };
    let candidate =
        Candidate { backup, chain: build_chain(question.catalog, question.history, backup.start_lsn) };
    let mut look = || {
        // The cheapest question comes first; a checkpoint must be there in any case.
        if !holds_nothing_past(question, backup, time)?
            || began(question, backup, DateTime::<Utc>::MAX_UTC)?.is_none()
        {
            return Ok(None);
        }
        Ok(match reach(question, &candidate, in_vain)? {
            Reach::Stop(stop) => Some((*backup, stop)),
            _ => None,
        })
    };
    match look() {
        // What cannot be read there makes the target no less unreachable than it was.
        Err(Halt::Unreadable(_) | Halt::Refuse(_)) => Ok(None),
        found => found,
    }
}

/// Returns when the backup's checkpoint began, by the server's clock; what was committed before its redo
/// position is not later than that by more than [`CHECKPOINT_LAG`]. `None` when it is not found, or (as the
/// index says without looking closer) began after `latest`.
fn began(
    question: &Question<'_>,
    backup: &BackupRecord,
    latest: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, Halt> {
    let chain = build_chain_until(question.catalog, question.history, backup.start_lsn, backup.stop_lsn);
    let walk = Walk::new(question, &chain);
    let last = chain.step_reaching(backup.stop_lsn);
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

/// Returns whether the WAL before a backup's redo position shows that it holds nothing which was committed past
/// the target time: the last commits there were not. Where none is archived nobody knows.
fn holds_nothing_past(
    question: &Question<'_>,
    backup: &BackupRecord,
    time: DateTime<Utc>,
) -> Result<bool, Halt> {
    let (catalog, redo) = (question.catalog, backup.start_lsn);
    let size = catalog.lineage.segment_size;
    let own = redo.0 / size.bytes();
    let starts = LOOK_BACK_SEGMENTS.iter().filter_map(|back| own.checked_sub(*back));
    let mut chains = starts.map(|first| {
        let start = Lsn(first * size.bytes());
        build_chain_until(catalog, question.history, start, Lsn(redo.0.saturating_add(1)))
    });
    let Some(chain) = chains.find(|chain| chain.end() > redo) else { return Ok(false) };
    let walk = Walk { cut: Some(redo), ..Walk::new(question, &chain) };
    let at = chain.step_reaching(Lsn(redo.0.saturating_add(1)));
    let later = Seek {
        maybe: &|facts, events| {
            (COMMITS.maybe)(facts, events) && facts.max_time.is_some_and(|max| past(question, max.time, time))
        },
        matches: &|event| {
            (COMMITS.matches)(event) && event.kind.stop_time().is_some_and(|t| past(question, t, time))
        },
    };
    let told = (|| Ok(walk.last(at, redo, &COMMITS)?.is_some() && walk.last(at, redo, &later)?.is_none()))();
    match told {
        Err(Halt::Unreadable(_) | Halt::Refuse(_)) => Ok(false),
        told => told,
    }
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
