//! Turns a catalog and a target into a restore plan, or into a refusal that says what can be reached
//! instead. Pure: the same values in give the same answer out.
//!
//! The planner never reads anything. When it needs to know what a segment holds it says so
//! ([`Outcome::NeedRollup`], [`Outcome::NeedSummaries`], [`Outcome::NeedEvents`], [`Outcome::NeedRecord`]); the caller loads that
//! into the [`Evidence`] and calls again. Its one rule: what it predicts is what PostgreSQL then does
//! (`src/backend/access/transam/xlogrecovery.c`, recoveryStopsBefore and recoveryStopsAfter).

mod assemble;
mod chain;
mod extras;
mod forecast;
mod gap;
mod half_done;
mod offers;
mod reach;
mod refusal;
mod survey;
mod walk;
mod windows;

#[cfg(test)]
mod gap_tests;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, PreparedTransaction, StoredTail};
use walship::pg::{Lsn, Oid, SegmentName, TimelineHistory, TimelineId, Xid};
use walship::wal::event::{EventKind, ServerLimits, WalEvent};
use walship::wal::rollup::{Block, Rollup};
use walship::wal::summary::SegmentSummary;

pub use chain::{Chain, ChainEnding, ChainStep, ParentSegment, build_chain, gaps_of};
pub(crate) use chain::{begin_of, chains_of, merge};
pub(crate) use extras::WAL_LEVEL_MINIMAL;
pub use forecast::{Forecast, are_enough, forecast};
pub use gap::{Gap, KnownBy};
pub(crate) use gap::{is_on_path, wal_is_on_path};
pub use half_done::{HalfDone, Removed};
pub use reach::{Stop, StopKind};
pub use refusal::{Refusal, RefusalKind, Suggestion};
pub(crate) use survey::{Known, Surveyed, Wanted};
pub(crate) use walk::Walk;
pub use windows::{Break, Window, WindowEnd, windows};

use crate::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice};

/// How far the clocks of the server and of the machine that takes backups may lie apart without costing
/// anything.
const CLOCKS_DIFFER_MAX: TimeDelta = TimeDelta::days(1);

/// What the caller has loaded so far of what the WAL holds.
#[derive(Debug, Clone, Default)]
pub struct Evidence {
    /// Summaries by segment.
    pub summaries: BTreeMap<SegmentName, SegmentSummary>,
    /// All events whose record starts in the segment and is stored whole.
    pub events: BTreeMap<SegmentName, Vec<WalEvent>>,
    /// What the index says, by the first segment that each block covers.
    pub blocks: BTreeMap<SegmentName, Block>,
    /// Answers to [`RecordRequest`]s: the first record that starts in the segment at or after the
    /// position, `None` when none does.
    pub records: BTreeMap<(SegmentName, Lsn), Option<RecordBounds>>,
    /// Segments of which something that was asked for is stored, but damaged: nothing else that is known
    /// of them counts. One on the way ends the planning ([`Outcome::Unreadable`]), one behind the stop is no
    /// obstacle.
    pub unreadable: BTreeSet<SegmentName>,
    /// Segments that were read for [`Outcome::SearchEvents`] and hold nothing that [`decides`].
    pub searched: BTreeSet<SegmentName>,
}

impl Evidence {
    /// Returns what was read of the index together with the catalog.
    pub fn of(catalog: &Catalog) -> Self {
        let mut evidence = Self::default();
        catalog.rollups.iter().for_each(|rollup| evidence.add_rollup(rollup));
        evidence
    }

    /// Adds what a roll-up says, in the place of what was said of its segments together.
    pub fn add_rollup(&mut self, rollup: &Rollup) {
        let blocks = rollup.blocks();
        if let (Some((first, _)), Some((_, last))) = (blocks.first(), blocks.last()) {
            self.forget_blocks(*first, last.last);
        }
        self.blocks.extend(blocks);
    }

    /// Drops what the index says of the segments from `first` through `last`.
    pub fn forget_blocks(&mut self, first: SegmentName, last: SegmentName) {
        let old: Vec<_> = self.blocks.range(first..=last).map(|(name, _)| *name).collect();
        old.iter().for_each(|name| drop(self.blocks.remove(name)));
    }

    /// Adds the summaries of what the archive ends with in parts. What was read of segments before is dropped: a
    /// record that leaves the last one may end there.
    pub fn add_tails(&mut self, summaries: impl IntoIterator<Item = SegmentSummary>) {
        self.events.clear();
        self.records.clear();
        self.searched.clear();
        self.summaries.extend(summaries.into_iter().map(|summary| (summary.segment, summary)));
    }

    /// Drops what is known of segments before this one; what is known to be damaged stays.
    pub(crate) fn forget_before(&mut self, segment: SegmentName) {
        self.summaries = self.summaries.split_off(&segment);
        self.events = self.events.split_off(&segment);
        let first = self.block_of(segment).map_or(segment, |(first, _)| first);
        self.blocks = self.blocks.split_off(&first);
    }

    /// Returns the block that a segment belongs to, with its first segment.
    pub fn block_of(&self, segment: SegmentName) -> Option<(SegmentName, &Block)> {
        let (first, block) = self.blocks.range(..=segment).next_back()?;
        (first.timeline == segment.timeline && block.last >= segment).then_some((*first, block))
    }
}

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordBounds {
    /// Where it starts.
    pub lsn: Lsn,
    /// The position after it.
    pub end_lsn: Lsn,
}

/// A segment whose bytes are to be read, with those that its last record runs into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRequest {
    /// The segment.
    pub segment: SegmentName,
    /// The segments that follow it in the chain, as many as its last record may reach into.
    pub following: Vec<SegmentName>,
}

/// The question which record starts first at or after a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordRequest {
    /// Where to look.
    pub request: SegmentRequest,
    /// The position.
    pub at: Lsn,
}

/// What is fixed beside the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Restore from this backup and no other; `None` chooses the newest that serves.
    pub backup: Option<String>,
}

/// What the planner says.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// These summaries must be known first.
    NeedSummaries(Vec<SegmentName>),
    /// What the index says of the block that begins with this segment must be known in detail first.
    NeedRollup(SegmentName),
    /// The events of these segments must be known first.
    NeedEvents(Vec<SegmentRequest>),
    /// Whether one of this segment's events [`decides`] must be known first: its events when one does,
    /// else that it was searched.
    SearchEvents(SegmentRequest),
    /// The place of this record must be known first.
    NeedRecord(RecordRequest),
    /// What the archive ends with in parts must be known first: the catalog does not tell yet.
    NeedTails,
    /// The answer depends on this segment, and it is damaged where it is stored.
    Unreadable(SegmentName),
    /// The plan.
    Plan(Box<RestorePlan>),
    /// The target cannot be reached.
    Refused(Box<Refusal>),
}

/// How one target is reached: every choice made, with its reason.
#[derive(Debug, Clone, Serialize)]
pub struct RestorePlan {
    /// The operator's name of the cluster.
    pub cluster: String,
    /// The lineage's number.
    pub lineage: u32,
    /// The system identifier, in decimal.
    pub system_identifier: String,
    /// What was asked for.
    #[serde(skip)]
    pub target: RecoveryTarget,
    /// The options that spell the target with everything pinned.
    pub target_options: String,
    /// The timeline to recover along: a number, also when "latest" was asked for.
    pub timeline: TimelineId,
    /// The timelines on the way, oldest first, each with where it begins on this way.
    pub timeline_path: Vec<TimelinePart>,
    /// The base backup.
    pub backup: BackupRecord,
    /// The backups that it builds on, the one right below it first; none below a full one. In the JSON their ids.
    #[serde(serialize_with = "ids")]
    pub parents: Vec<BackupRecord>,
    /// The WAL segments to fetch, in order, as unbroken runs.
    pub chain: Vec<ChainPart>,
    /// WAL of the chain that must lie in `pg_wal` under the names of older timelines, so that PostgreSQL finds
    /// what was prepared in it.
    pub parent_segments: Vec<ParentSegment>,
    /// What is stored of the open segment, when the chain's last part is that.
    pub tail: Option<StoredTail>,
    /// Where and why recovery stops.
    pub stop: Stop,
    /// The last commit that will be there; `None` when none lies between backup and target.
    pub last_included: Option<TransactionEnd>,
    /// The first commit behind the stop, on the way that was planned along, that will not be there.
    pub first_excluded: Option<TransactionEnd>,
    /// Why no first excluded commit can be named although there may be one; `None` when it is named, or
    /// when no commit is archived behind the stop on this way.
    pub first_excluded_unknown: Option<String>,
    /// Timelines with stored WAL that is not on this way; commits in it are left out too.
    pub timelines_left_out: Vec<TimelineId>,
    /// Bytes of the backup to fetch, at most: of those that it builds on not all is needed.
    pub backup_fetch_bytes: u64,
    /// How many segments to fetch.
    pub wal_segments: u64,
    /// How many of them, from the first on, were looked for in the store and found, with the length they
    /// should have; their contents were not read. The planner itself looks for none.
    pub wal_segments_checked: u64,
    /// Bytes of WAL objects to fetch.
    pub wal_fetch_bytes: u64,
    /// Bytes of WAL that PostgreSQL will replay.
    pub wal_replay_bytes: u64,
    /// How long it will take, by what is on record; the planner itself knows none.
    pub forecast: Option<Forecast>,
    /// The largest value of each setting that a recovering server must not undercut.
    pub limits: ServerLimits,
    /// Tablespaces that replay will create, at the original server's paths.
    pub tablespace_paths: Vec<TablespacePath>,
    /// Prepared transactions that are open at the target; `None` when there are too many to look for, or
    /// the backup's own are not known.
    pub open_prepared: Option<Vec<PreparedTransaction>>,
    /// Removals of databases and tablespaces that are replayed although their commit is not.
    pub half_done: Vec<HalfDone>,
    /// The gap that ends the WAL behind the target; recovery must not read ahead into it.
    pub gap_behind: Option<Gap>,
    /// The segment behind the last one to fetch, when it is damaged where it is stored; recovery must not
    /// read ahead into it either.
    pub damaged_behind: Option<SegmentName>,
    /// Why this timeline, this backup, this stop.
    pub reasons: Vec<String>,
    /// What to know before restoring.
    pub warnings: Vec<String>,
}

fn ids<S: serde::Serializer>(backups: &[BackupRecord], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(backups.iter().map(|backup| &backup.id))
}

impl RestorePlan {
    /// Returns the backup and all that it builds on, from the top.
    pub fn backups(&self) -> impl Iterator<Item = &BackupRecord> {
        std::iter::once(&self.backup).chain(&self.parents)
    }
}

/// One timeline on the way to the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TimelinePart {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it begins; `None` for the first.
    pub begin_lsn: Option<Lsn>,
}

/// An unbroken run of segments of one timeline to fetch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChainPart {
    /// The first segment.
    pub first: SegmentName,
    /// The last segment (inclusive).
    pub last: SegmentName,
    /// How many.
    pub segments: u64,
    /// Their stored bytes.
    pub stored_bytes: u64,
    /// The position after the last byte that is used.
    pub until_lsn: Lsn,
    /// Whether it is the open segment, of which parts are stored.
    pub open: bool,
}

/// The end of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TransactionEnd {
    /// The transaction; of a prepared one its own id.
    pub xid: Xid,
    /// When it ended.
    pub time: DateTime<Utc>,
    /// Where its end record starts.
    pub lsn: Lsn,
    /// Whether it was committed.
    pub committed: bool,
    /// Relations whose storage it removes.
    pub dropped_relations: u64,
}

impl TransactionEnd {
    pub(crate) fn of(event: &WalEvent) -> Option<Self> {
        let xid = event.kind.ended_xid(event.xid)?;
        let time = event.kind.stop_time()?;
        let (committed, dropped_relations) = match &event.kind {
            EventKind::Commit { dropped_relations, .. } => (true, dropped_relations.len() as u64),
            _ => (false, 0),
        };
        Some(Self { xid, time, lsn: event.lsn, committed, dropped_relations })
    }
}

/// A folder that replay of CREATE TABLESPACE will use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TablespacePath {
    /// The tablespace's oid.
    pub oid: Oid,
    /// Its path on the original server.
    pub path: String,
    /// Where its record starts.
    pub lsn: Lsn,
}

/// Why planning cannot go on yet, or at all; what `?` carries through the planner.
#[derive(Debug)]
pub(crate) enum Halt {
    Summaries(Vec<SegmentName>),
    Rollup(SegmentName),
    Events(Vec<SegmentRequest>),
    Search(SegmentRequest),
    Record(RecordRequest),
    Tails,
    Unreadable(SegmentName),
    Refuse(Box<Refusal>),
}

impl From<Halt> for Outcome {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Summaries(names) => Self::NeedSummaries(names),
            Halt::Rollup(first) => Self::NeedRollup(first),
            Halt::Events(requests) => Self::NeedEvents(requests),
            Halt::Search(request) => Self::SearchEvents(request),
            Halt::Record(request) => Self::NeedRecord(request),
            Halt::Tails => Self::NeedTails,
            Halt::Unreadable(name) => Self::Unreadable(name),
            Halt::Refuse(refusal) => Self::Refused(refusal),
        }
    }
}

/// Returns the plan for `target`, what must be known to make one, or why there is none.
///
/// Repeated calls with growing evidence come to an end: each request names something the evidence
/// does not hold yet.
pub fn plan(
    catalog: &Catalog,
    evidence: &Evidence,
    target: &RecoveryTarget,
    options: &PlanOptions,
) -> Outcome {
    let outcome = match try_plan(catalog, evidence, target, options) {
        Ok(plan) => Outcome::Plan(Box::new(plan)),
        Err(halt) => halt.into(),
    };
    if catalog.tails.is_none() && asks_for_the_end(&outcome) { Outcome::NeedTails } else { outcome }
}

/// Returns whether what is stored behind the last whole segments may change the answer. What recovery stops at in
/// whole segments it stops at whatever follows.
fn asks_for_the_end(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Refused(_) => true,
        Outcome::Plan(plan) => plan.first_excluded.is_none() || plan.gap_behind.is_some(),
        _ => false,
    }
}

/// Everything that one planning run looks at.
pub(crate) struct Question<'a> {
    pub(crate) catalog: &'a Catalog,
    pub(crate) evidence: &'a Evidence,
    pub(crate) target: &'a RecoveryTarget,
    pub(crate) history: &'a TimelineHistory,
}

/// A backup on the timeline path and the WAL behind it.
pub(crate) struct Candidate<'a> {
    pub(crate) backup: &'a BackupRecord,
    pub(crate) chain: Chain,
}

fn try_plan(
    catalog: &Catalog,
    evidence: &Evidence,
    target: &RecoveryTarget,
    options: &PlanOptions,
) -> Result<RestorePlan, Halt> {
    let asked = Asked { catalog, evidence, target, options };
    let tried = resolve_timeline(catalog, target.timeline).and_then(|history| {
        let question = Question { catalog, evidence, target, history: &history };
        let found = search(&question, options)?;
        match &found.stop {
            Some(served) => plan_of(&question, served, &found),
            // What can be reached is looked for once the end is known.
            None if catalog.tails.is_none() => Err(Halt::Tails),
            None => Err(refusal::explain(&question, options, &found.passed_over)),
        }
    });
    match tried {
        Err(Halt::Refuse(_)) if catalog.tails.is_none() => Err(Halt::Tails),
        Err(Halt::Refuse(refusal)) => Err(refusal::complete(&asked, *refusal)),
        tried => tried,
    }
}

/// What is asked for, before anything is resolved.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) catalog: &'a Catalog,
    pub(crate) evidence: &'a Evidence,
    pub(crate) target: &'a RecoveryTarget,
    pub(crate) options: &'a PlanOptions,
}

/// What the backups on the way say to a target.
struct Found<'a> {
    /// The one that serves.
    stop: Option<Served<'a>>,
    /// Those that do not, newest first when none does.
    passed_over: Vec<(&'a BackupRecord, reach::Reach)>,
    /// How many that were started long after the target were not asked.
    not_tried: usize,
}

/// A backup that leads to the target.
struct Served<'a> {
    backup: &'a BackupRecord,
    stop: Stop,
    /// Whether it began after the target time, and nothing was committed between them.
    late: bool,
}

/// Returns the backup that serves a target, if one does.
fn search<'a>(question: &Question<'a>, options: &PlanOptions) -> Result<Found<'a>, Halt> {
    let (catalog, target, history) = (question.catalog, question.target, question.history);
    let (backups, much_newer) = in_order(usable_backups(question, options)?, target);
    let mut passed_over = Vec::new();
    // An older backup may reach the target before WAL that cannot be decoded.
    let content_decides = matches!(target.kind, TargetKind::Xid(_) | TargetKind::Name(_));
    let mut undecoded = Vec::new();
    let mut unknown = None;
    let mut in_vain = reach::InVain::default();
    for backup in backups {
        let candidate = Candidate { backup, chain: build_chain(catalog, history, backup.start_lsn) };
        match reach::too_new(question, &candidate, &mut in_vain) {
            Ok(None) => {}
            Ok(Some(failed)) => {
                passed_over.push((backup, failed));
                continue;
            }
            Err(halt @ (Halt::Refuse(_) | Halt::Unreadable(_))) => {
                passed_over.push((backup, reach::Reach::Unknown));
                unknown = unknown.or(Some(halt));
                continue;
            }
            Err(halt) => return Err(halt),
        }
        match reach::reach(question, &candidate, &mut in_vain) {
            Ok(reach::Reach::Stop(stop)) => {
                end_is_known(catalog, &passed_over)?;
                let tried_all = much_newer.contains(&&*backup.id);
                let not_tried = if tried_all { 0 } else { much_newer.len() };
                let served = Served { backup, stop, late: false };
                return Ok(Found { stop: Some(served), passed_over, not_tried });
            }
            Ok(failed) => passed_over.push((backup, failed)),
            Err(Halt::Refuse(refusal)) if content_decides && refusal.kind == RefusalKind::Undecoded => {
                undecoded.push((backup, refusal));
                passed_over.push((backup, reach::Reach::NotReached));
            }
            Err(halt) => return Err(halt),
        }
    }
    if let Some(halt) = unknown
        && passed_over.iter().all(|(_, reach)| matches!(reach, reach::Reach::Unknown))
    {
        return Err(halt);
    }
    end_is_known(catalog, &passed_over)?;
    passed_over.sort_by(|(a, _), (b, _)| newest_first(a, b));
    // What was found, only too early, does not lie behind a newer backup.
    let too_new = |(_, reach): &&(_, _)| matches!(reach, reach::Reach::BeforeConsistency { .. });
    let found = passed_over.iter().rfind(too_new).map(|(backup, _)| backup.stop_lsn);
    let mut in_the_way =
        undecoded.into_iter().filter(|(backup, _)| found.is_none_or(|at| backup.stop_lsn < at));
    if let Some((_, refusal)) = in_the_way.next() {
        return Err(Halt::Refuse(refusal));
    }
    let late = reach::late(question, &passed_over, &mut in_vain)?;
    if let Some((backup, _)) = &late {
        passed_over.retain(|(other, _)| other.id != backup.id);
    }
    let stop = late.map(|(backup, stop)| Served { backup, stop, late: true });
    Ok(Found { stop, passed_over, not_tried: 0 })
}

/// Returns whether what is asked for leads to a plan, as far as what is stored there is not damaged.
pub(crate) fn serves(asked: &Asked<'_>) -> Result<bool, Halt> {
    let Asked { catalog, evidence, target, options } = *asked;
    let tried = resolve_timeline(catalog, target.timeline).and_then(|history| {
        let question = Question { catalog, evidence, target, history: &history };
        let Some(served) = search(&question, options)?.stop else { return Ok(false) };
        let chain = build_chain(catalog, &history, served.backup.start_lsn);
        let walk = Walk { cut: Some(served.stop.cut_lsn), ..Walk::new(&question, &chain) };
        let last = chain.step_reaching(served.stop.through_lsn);
        extras::notable(&walk, last, &served.stop, served.backup.limits)?;
        Ok(true)
    });
    match tried {
        Err(Halt::Refuse(_) | Halt::Unreadable(_)) => Ok(false),
        tried => tried,
    }
}

fn plan_of(question: &Question<'_>, served: &Served<'_>, found: &Found<'_>) -> Result<RestorePlan, Halt> {
    let backup = served.backup;
    let chain = build_chain(question.catalog, question.history, backup.start_lsn);
    let candidate = Candidate { backup, chain };
    let stop = served.stop.clone();
    let mut plan = assemble::assemble(question, &candidate, stop, &found.passed_over, found.not_tried)?;
    if served.late {
        plan.reasons.push(format!(
            "backup {} began after the target time, and nothing was committed between them",
            backup.id
        ));
    }
    Ok(plan)
}

/// Asks for what is stored behind the last whole segments where it may be that a backup leads to the target only there.
fn end_is_known(catalog: &Catalog, passed_over: &[(&BackupRecord, reach::Reach)]) -> Result<(), Halt> {
    let short = passed_over.iter().any(|(_, reach)| matches!(reach, reach::Reach::NotReached));
    if short && catalog.tails.is_none() { Err(Halt::Tails) } else { Ok(()) }
}

/// Returns the history of the timeline to follow.
pub(crate) fn resolve_timeline(catalog: &Catalog, choice: TimelineChoice) -> Result<TimelineHistory, Halt> {
    let known = catalog.timelines();
    let timeline = match choice {
        TimelineChoice::Number(timeline) => timeline,
        TimelineChoice::Latest => known
            .last()
            .copied()
            .or_else(|| catalog.backups.iter().map(|backup| backup.stop_timeline).max())
            .unwrap_or(TimelineId::FIRST),
    };
    let stored = known.contains(&timeline)
        || catalog.backups.iter().any(|b| b.timeline == timeline || b.stop_timeline == timeline);
    if !stored && (catalog.backups.is_empty() && choice == TimelineChoice::Latest) {
        return Err(Refusal::halt(RefusalKind::NoBackup, "the repository holds no complete base backup"));
    }
    if !stored {
        let list: Vec<String> = known.iter().map(ToString::to_string).collect();
        return Err(Refusal::halt(
            RefusalKind::UnknownTimeline,
            format!(
                "nothing of timeline {timeline} is stored; the repository holds timeline(s) {}",
                list.join(", ")
            ),
        ));
    }
    catalog.history(timeline).ok_or_else(|| {
        Refusal::halt(
            RefusalKind::MissingHistory,
            format!(
                "{}.history is not stored: the way to timeline {timeline} is unknown, and PostgreSQL would \
                 not follow it",
                timeline.hex()
            ),
        )
    })
}

/// Returns the backups that lie on the timeline path, newest first.
fn usable_backups<'a>(question: &Question<'a>, options: &PlanOptions) -> Result<Vec<&'a BackupRecord>, Halt> {
    let history = question.history;
    let mut backups: Vec<_> = question.catalog.backups.iter().collect();
    if let Some(id) = &options.backup {
        backups.retain(|backup| &backup.id == id);
        let Some(backup) = backups.first() else {
            let orphan = question.catalog.orphaned_backups.iter().find(|orphan| &orphan.id == id);
            let why = match orphan {
                Some(orphan) => {
                    format!("backup {id} builds on backup {}, which is not there", orphan.missing)
                }
                None => format!("the repository holds no complete base backup {id:?}"),
            };
            return Err(Refusal::halt(RefusalKind::UnknownBackup, why));
        };
        if !gap::is_on_path(history, backup) {
            return Err(Refusal::halt(
                RefusalKind::BackupNotOnPath,
                format!(
                    "backup {id} was taken on timeline {} at {}, which is not on the way to timeline {}",
                    backup.timeline, backup.start_lsn, history.timeline
                ),
            ));
        }
    }
    if backups.is_empty() {
        return Err(Refusal::halt(RefusalKind::NoBackup, "the repository holds no complete base backup"));
    }
    backups.retain(|backup| gap::is_on_path(history, backup));
    if backups.is_empty() {
        return Err(Refusal::halt(
            RefusalKind::BackupNotOnPath,
            format!("no complete base backup lies on the way to timeline {}", history.timeline),
        ));
    }
    backups.sort_by(|a, b| newest_first(a, b));
    Ok(backups)
}

fn newest_first(a: &BackupRecord, b: &BackupRecord) -> std::cmp::Ordering {
    (b.stop_lsn, b.start_lsn, &b.id).cmp(&(a.stop_lsn, a.start_lsn, &a.id))
}

/// Returns the backups in the order in which they are tried, and the ids of those that come last although
/// they are newer: for a time, what was started long after it.
///
/// That is only a hint, by the clock of the machine that took the backup: where no other backup serves,
/// what the WAL says of these decides as well.
fn in_order<'a>(
    backups: Vec<&'a BackupRecord>,
    target: &RecoveryTarget,
) -> (Vec<&'a BackupRecord>, Vec<&'a str>) {
    let TargetKind::Time { time, .. } = &target.kind else { return (backups, Vec::new()) };
    let long_after = |backup: &&BackupRecord| backup.started.signed_duration_since(time) > CLOCKS_DIFFER_MAX;
    let (later, mut first): (Vec<_>, Vec<_>) = backups.into_iter().partition(long_after);
    let ids = later.iter().map(|backup| &*backup.id).collect();
    first.extend(later);
    (first, ids)
}

/// Returns whether this event, looked at alone, is one at which recovery to `target` stops.
pub fn decides(target: &RecoveryTarget, event: &WalEvent) -> bool {
    match &target.kind {
        TargetKind::Time { time, .. } => event.kind.stop_time().is_some_and(|at| match target.stop {
            StopSide::Inclusive => at > *time,
            StopSide::Exclusive => at >= *time,
        }),
        TargetKind::Xid(xid) => event.kind.ended_xid(event.xid) == Some(*xid),
        TargetKind::Name(wanted) => {
            matches!(&event.kind, EventKind::RestorePoint { name, .. } if name == wanted)
        }
        TargetKind::Lsn(_) | TargetKind::Immediate | TargetKind::Latest => false,
    }
}
