//! Why a target cannot be reached, and what can be reached instead on both sides of it.

use serde::Serialize;
use walship::catalog::BackupRecord;
use walship::pg::{Lsn, SegmentName, TimelineId};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::Class;

use super::assemble::COMMITS;
use super::chain::build_chain;
use super::reach::{Reach, aligned};
use super::walk::{Seek, Walk};
use super::{Candidate, ChainEnding, Gap, Halt, Question};
use crate::target::{TargetKind, TimelineChoice, shell_word, utc_text};

/// How many restore points a refusal lists.
const NAMES_MAX: usize = 8;

/// A target that cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// Why, for programs.
    pub kind: RefusalKind,
    /// Why, for people: a lowercase fact.
    pub reason: String,
    /// The gap that is in the way.
    pub gap: Option<Gap>,
    /// The nearest target before the one asked for.
    pub before: Option<Suggestion>,
    /// The nearest target after the one asked for.
    pub after: Option<Suggestion>,
    /// What else may help, sentences.
    pub hints: Vec<String>,
}

/// Why a target cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// No complete base backup is stored.
    NoBackup,
    /// The backup that was asked for is not stored or not complete.
    UnknownBackup,
    /// No backup, or not the one asked for, lies on the way to the timeline.
    BackupNotOnPath,
    /// Nothing of the timeline is stored.
    UnknownTimeline,
    /// The timeline's history file is not stored.
    MissingHistory,
    /// The target lies behind the end of the archived WAL.
    PastEnd,
    /// The target lies before the first moment that a backup can reach.
    BeforeFirst,
    /// WAL is missing between backup and target.
    Gap,
    /// No restore point has this name.
    UnknownName,
    /// No end of this transaction is archived.
    UnknownXid,
    /// No event of the kind and name that were asked for is archived, as far as names are known.
    UnknownEvent,
    /// Several archived events may be the one that was asked for.
    AmbiguousEvent,
    /// WAL on the way was written with `wal_level = minimal`.
    WalLevelMinimal,
    /// WAL on the way cannot be decoded, so the target cannot be checked.
    Undecoded,
}

/// A target that can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Suggestion {
    /// The options to paste.
    pub options: String,
    /// What it reaches.
    pub what: String,
}

impl Refusal {
    /// Returns a refusal without suggestions.
    pub fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), gap: None, before: None, after: None, hints: Vec::new() }
    }

    pub(crate) fn halt(kind: RefusalKind, reason: impl Into<String>) -> Halt {
        Halt::Refuse(Box::new(Self::new(kind, reason)))
    }
}

/// Returns why none of the candidates serves, or what must be known to say so.
pub(crate) fn explain(question: &Question<'_>, passed_over: &[(&BackupRecord, Reach)]) -> Halt {
    match try_explain(question, passed_over) {
        Ok(refusal) => Halt::Refuse(Box::new(refusal)),
        Err(halt) => halt,
    }
}

fn try_explain(question: &Question<'_>, passed_over: &[(&BackupRecord, Reach)]) -> Result<Refusal, Halt> {
    // Newest first: the first that was not reached ends nearest to the target.
    let short = passed_over.iter().find(|(_, reach)| matches!(reach, Reach::NotReached));
    let too_new =
        passed_over.iter().rev().find(|(_, reach)| matches!(reach, Reach::BeforeConsistency { .. }));
    let after = match too_new {
        Some((backup, _)) => consistent_point(question, &behind(question, backup))?,
        None => None,
    };
    let Some((backup, _)) = short else {
        let what = match &question.target.kind {
            TargetKind::Name(name) => format!("restore point {name:?} lies"),
            TargetKind::Xid(xid) => format!("the end of transaction {xid} lies"),
            _ => "the target lies".to_owned(),
        };
        let reason = match too_new {
            Some((backup, Reach::BeforeConsistency { lsn })) => format!(
                "{what} before the first moment that can be reached: recovery from the oldest backup {} \
                 would stop at {lsn}, and it is consistent only from {} on",
                backup.id, backup.stop_lsn
            ),
            _ => format!("{what} before the first moment that can be reached"),
        };
        let mut refusal = Refusal::new(RefusalKind::BeforeFirst, reason);
        refusal.after = after;
        return Ok(refusal);
    };
    let candidate = &behind(question, backup);
    let walk = Walk::new(question, &candidate.chain);
    let mut refusal = match &candidate.chain.ending {
        ChainEnding::Gap(gap) => Refusal {
            gap: Some(gap.clone()),
            ..Refusal::new(
                RefusalKind::Gap,
                format!("the way from backup {} to the target is broken: {gap}", candidate.backup.id),
            )
        },
        ChainEnding::EndOfArchive => past_end(question, &walk)?,
    };
    refusal.after = after;
    match last_reachable(question, candidate, &walk) {
        Ok(before) => refusal.before = before,
        Err(Halt::Unreadable(name)) => refusal.hints.push(unreadable_hint(name)),
        Err(halt) => return Err(halt),
    }
    match hints(question, &walk) {
        Ok(hints) => refusal.hints.extend(hints),
        Err(Halt::Unreadable(name)) => refusal.hints.push(unreadable_hint(name)),
        Err(halt) => return Err(halt),
    }
    refusal.hints.dedup();
    Ok(refusal)
}

/// Returns a backup with the WAL behind it.
fn behind<'a>(question: &Question<'_>, backup: &'a BackupRecord) -> Candidate<'a> {
    Candidate { backup, chain: build_chain(question.catalog, question.history, backup.start_lsn) }
}

fn past_end(question: &Question<'_>, walk: &Walk<'_>) -> Result<Refusal, Halt> {
    let end = walk.end_of_records()?;
    Ok(match &question.target.kind {
        TargetKind::Name(name) => Refusal::new(
            RefusalKind::UnknownName,
            format!("no restore point {name:?} is in the archived WAL, which ends at {end}"),
        ),
        TargetKind::Xid(xid) => Refusal::new(
            RefusalKind::UnknownXid,
            format!("transaction {xid} neither commits nor aborts in the archived WAL, which ends at {end}"),
        ),
        TargetKind::Time { time, .. } => Refusal::new(
            RefusalKind::PastEnd,
            format!(
                "no record past {} is archived: the WAL ends at {end}, and PostgreSQL refuses a target that \
                 it does not reach",
                utc_text(*time)
            ),
        ),
        TargetKind::Lsn(lsn) => Refusal::new(
            RefusalKind::PastEnd,
            format!("no record starts at or after {lsn}: the archived WAL ends at {end}"),
        ),
        TargetKind::Latest | TargetKind::Immediate => Refusal::new(
            RefusalKind::PastEnd,
            format!("the archived WAL ends at {end}, before the backup is consistent"),
        ),
    })
}

/// Returns the first moment that can be reached from a backup, as a target.
fn consistent_point(question: &Question<'_>, candidate: &Candidate<'_>) -> Result<Option<Suggestion>, Halt> {
    let backup = candidate.backup;
    let walk = Walk::new(question, &candidate.chain);
    if candidate.chain.end() < backup.stop_lsn {
        return Ok(None);
    }
    let what = format!("the backup of {}, consistent at {}", utc_text(backup.finished), backup.stop_lsn);
    // Recovery notices consistency when it reads the record behind it.
    if walk.record_at(backup.stop_lsn)?.is_some() {
        let options = format!("--immediate --backup {}{}", backup.id, asked_timeline(question));
        return Ok(Some(Suggestion { options, what }));
    }
    let ends =
        candidate.chain.ending == ChainEnding::EndOfArchive && walk.end_of_records()? >= backup.stop_lsn;
    let options = format!("--latest --backup {}{}", backup.id, asked_timeline(question));
    Ok(ends.then_some(Suggestion { options, what }))
}

/// Returns the option that keeps a suggestion on the timeline that was asked for.
fn asked_timeline(question: &Question<'_>) -> String {
    match question.target.timeline {
        TimelineChoice::Number(timeline) => format!(" --timeline {timeline}"),
        TimelineChoice::Latest => String::new(),
    }
}

/// Returns the last commit that can be reached on this chain, as a target.
fn last_reachable(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
    walk: &Walk<'_>,
) -> Result<Option<Suggestion>, Halt> {
    let chain = &candidate.chain;
    if chain.end() < candidate.backup.stop_lsn || chain.is_empty() {
        return Ok(None);
    }
    let timeline = asked_timeline(question);
    let last = walk.last(chain.len() - 1, chain.end(), &COMMITS)?;
    let commit =
        last.map(|(_, event)| event).filter(|event| aligned(event.end_lsn) >= candidate.backup.stop_lsn);
    let named = |event: &WalEvent| {
        let time = event.kind.stop_time().map(utc_text).unwrap_or_default();
        let xid = event.kind.ended_xid(event.xid).unwrap_or(event.xid);
        format!("the commit of transaction {xid} at {time}")
    };
    Ok(Some(match (commit, &chain.ending) {
        (Some(event), ChainEnding::EndOfArchive) => Suggestion {
            options: format!("--latest{timeline}"),
            what: format!("everything archived; the last is {}", named(event)),
        },
        (None, ChainEnding::EndOfArchive) => {
            Suggestion { options: format!("--latest{timeline}"), what: "everything archived".to_owned() }
        }
        (Some(event), ChainEnding::Gap(_)) => Suggestion {
            options: format!("--to-lsn {}{timeline}", event.lsn),
            what: format!("{}, the last before the gap", named(event)),
        },
        (None, ChainEnding::Gap(_)) => return consistent_point(question, candidate),
    }))
}

fn unreadable_hint(name: SegmentName) -> String {
    format!("Segment {name} is damaged where it is stored: what lies near it cannot be offered.")
}

fn hints(question: &Question<'_>, walk: &Walk<'_>) -> Result<Vec<String>, Halt> {
    let mut hints = Vec::new();
    match &question.target.kind {
        TargetKind::Name(_) => {
            let mut names: Vec<String> = Vec::new();
            walk.latest(Class::Planning, |event| {
                if let EventKind::RestorePoint { name, time } = &event.kind {
                    names.push(format!("--to-name {} ({})", shell_word(name), utc_text(*time)));
                }
                names.len() == NAMES_MAX
            })?;
            if names.is_empty() {
                hints.push("There is no restore point in this WAL.".to_owned());
            } else {
                hints.push(format!("The latest restore points: {}.", names.join(", ")));
            }
        }
        TargetKind::Xid(xid) => {
            if let Some(parent) = parent_of(walk, *xid)? {
                hints.push(format!(
                    "{xid} is a committed subtransaction of {parent}; recovery stops only at the whole \
                     transaction: --to-xid {parent}."
                ));
            }
        }
        _ => {}
    }
    let elsewhere = elsewhere(question);
    if !elsewhere.is_empty() {
        let list: Vec<String> = elsewhere.iter().map(|timeline| format!("--timeline {timeline}")).collect();
        hints.push(format!(
            "Commits after a fork are on other timelines, which this path does not follow: try {}.",
            list.join(" or ")
        ));
    }
    Ok(hints)
}

/// Returns the timelines of which WAL is stored that does not lie on the way to the one asked for.
pub(super) fn elsewhere(question: &Question<'_>) -> Vec<TimelineId> {
    let mut stored: Vec<_> = question.catalog.segments.timelines().into_iter().collect();
    stored.retain(|timeline| !question.history.contains(*timeline) || left(question, *timeline));
    stored
}

/// Returns whether WAL of this ancestor is stored behind the point where the path left it.
fn left(question: &Question<'_>, timeline: TimelineId) -> bool {
    let Some(switch) = question.history.switch_lsn_of(timeline) else { return false };
    let size = question.catalog.lineage.segment_size;
    let from = SegmentName::containing(timeline, Lsn(switch.0), size);
    question.catalog.segments.first_from(from).is_some()
}

/// Returns the top-level transaction of a committed subtransaction, as far as loaded segments or
/// segments whose ended transactions come shortly before it can tell.
fn parent_of(walk: &Walk<'_>, xid: u32) -> Result<Option<u32>, Halt> {
    let holds =
        |event: &WalEvent| matches!(&event.kind, EventKind::Commit { subxids, .. } if subxids.contains(&xid));
    // A subtransaction's id is larger than its parent's and is taken soon after it.
    let near = |low: u32, high: u32| low <= xid && xid.saturating_sub(high) <= 64;
    let found = walk.first(
        0,
        &Seek {
            maybe: &|facts, _| {
                facts.counts.commits > 0 && facts.ended_xids.is_some_and(|(low, high)| near(low, high))
            },
            matches: &holds,
        },
    )?;
    Ok(found.and_then(|(_, event)| event.kind.ended_xid(event.xid)))
}
