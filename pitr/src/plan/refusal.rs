//! Why a target cannot be reached, and what can be reached instead on both sides of it.

use std::collections::BTreeSet;

use serde::Serialize;
use walship::catalog::BackupRecord;
use walship::pg::{Lsn, SegmentName, TimelineId};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::Class;

use super::chain::{build_chain_until, gaps_of};
use super::extras::begins_anew;
use super::gap::KnownBy;
use super::offers::Offers;
use super::reach::{Reach, aligned};
use super::walk::{Seek, Walk};
use super::{Asked, Candidate, ChainEnding, Gap, Halt, PlanOptions, Question, resolve_timeline, serves};
use crate::target::{RecoveryTarget, TargetKind, TimelineChoice, shell_word, utc_text};

/// How many restore points a refusal lists.
const NAMES_MAX: usize = 8;

/// How many gaps a refusal lists beside the one in the way.
const GAPS_MAX: usize = 2;

/// On how many other timelines a refusal looks for the target.
const TIMELINES_MAX: usize = 2;

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
    /// Where the WAL begins that cannot be crossed.
    #[serde(skip)]
    pub(crate) at: Option<Lsn>,
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
    /// `pg_resetwal` was run on the server on the way: WAL begins anew there.
    WalReset,
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
        Self {
            kind,
            reason: reason.into(),
            gap: None,
            before: None,
            after: None,
            hints: Vec::new(),
            at: None,
        }
    }

    pub(crate) fn halt(kind: RefusalKind, reason: impl Into<String>) -> Halt {
        Halt::Refuse(Box::new(Self::new(kind, reason)))
    }

    /// Returns a refusal for WAL that begins at `at` and cannot be crossed.
    pub(crate) fn halt_at(at: Lsn, kind: RefusalKind, reason: impl Into<String>) -> Halt {
        Halt::Refuse(Box::new(Self { at: Some(at), ..Self::new(kind, reason) }))
    }
}

/// Returns why none of the candidates serves, or what must be known to say so; newest first.
pub(crate) fn explain(
    question: &Question<'_>,
    options: &PlanOptions,
    passed_over: &[(&BackupRecord, Reach)],
) -> Halt {
    match try_explain(question, options, passed_over) {
        Ok(refusal) => Halt::Refuse(Box::new(refusal)),
        Err(halt) => halt,
    }
}

fn try_explain<'b>(
    question: &Question<'_>,
    options: &PlanOptions,
    passed_over: &[(&'b BackupRecord, Reach)],
) -> Result<Refusal, Halt> {
    let mut offers = Offers::new(question, options);
    // A backup whose own WAL is not whole leads nowhere.
    let (whole, torn): (Vec<_>, Vec<_>) =
        passed_over.iter().partition(|(backup, _)| offers.behind(backup).chain.end() >= backup.stop_lsn);
    let is_too_new = |reach: &Reach| matches!(reach, Reach::BeforeConsistency { .. });
    let too_new: Vec<_> = whole.iter().copied().rev().filter(|(_, reach)| is_too_new(reach)).collect();
    // What was found by its content before one backup is consistent does not lie behind a newer one.
    let content_decides = matches!(question.target.kind, TargetKind::Name(_) | TargetKind::Xid(_));
    let older = |backup: &BackupRecord| match too_new.first() {
        Some((oldest, _)) if content_decides => backup.stop_lsn < oldest.stop_lsn,
        _ => true,
    };
    let short = |(backup, reach): &(&'b BackupRecord, Reach)| {
        (matches!(reach, Reach::NotReached) && older(backup)).then_some(*backup)
    };
    let torn: Vec<_> = torn.into_iter().filter_map(short).collect();
    let short: Vec<_> = whole.iter().copied().filter_map(short).collect();
    let after = offers.first_after(too_new.iter().map(|(backup, _)| *backup))?;
    // The newest ends nearest to the target.
    let Some(&backup) = short.first().or(torn.first()) else {
        return Ok(Refusal { after, ..before_first(question, too_new.first().copied()) });
    };
    let candidate = &offers.behind(backup);
    let walk = Walk::new(question, &candidate.chain);
    let mut refusal = match &candidate.chain.ending {
        ChainEnding::Gap(gap) => {
            let mut reason =
                format!("the way from backup {} to the target is broken: {gap}", candidate.backup.id);
            if let Some(lsn) = reset_behind(question, gap)? {
                reason.push_str(&format!(
                    "; pg_resetwal was run on the server: WAL begins anew at {lsn}, and no recovery leads there from before"
                ));
            }
            Refusal { gap: Some(gap.clone()), ..Refusal::new(RefusalKind::Gap, reason) }
        }
        ChainEnding::EndOfArchive => past_end(question, &walk)?,
    };
    refusal.after = after;
    refusal.before = offers.first_before(short)?;
    match hints(&mut offers, question, candidate) {
        Ok(hints) => refusal.hints.extend(hints),
        Err(Halt::Unreadable(name)) => offers.damaged.push(name),
        Err(halt) => return Err(halt),
    }
    refusal.hints.extend(damage_hints(offers));
    Ok(refusal)
}

/// Returns where WAL begins anew when it does so right behind a gap.
fn reset_behind(question: &Question<'_>, gap: &Gap) -> Result<Option<Lsn>, Halt> {
    if gap.known_by != KnownBy::LaterWal {
        return Ok(None);
    }
    let chain =
        build_chain_until(question.catalog, question.history, gap.to, Lsn(gap.to.0.saturating_add(1)));
    let walk = Walk::new(question, &chain);
    match walk.notable(0, 0, Class::Planning) {
        Ok(events) => Ok(events.iter().find(|event| begins_anew(event, gap.to)).map(|event| event.lsn)),
        Err(Halt::Refuse(_) | Halt::Unreadable(_)) => Ok(None),
        Err(halt) => Err(halt),
    }
}

/// Returns that the target lies before what the oldest backup can reach.
fn before_first(question: &Question<'_>, too_new: Option<&(&BackupRecord, Reach)>) -> Refusal {
    let what = match &question.target.kind {
        TargetKind::Name(name) => format!("restore point {name:?} lies"),
        TargetKind::Xid(xid) => format!("the end of transaction {xid} lies"),
        _ => "the target lies".to_owned(),
    };
    let reason = match too_new {
        Some((backup, Reach::BeforeConsistency { lsn })) => format!(
            "{what} before the first moment that can be reached: recovery from the oldest backup {} would stop at \
             {lsn}, and it is consistent only from {} on",
            backup.id, backup.stop_lsn
        ),
        _ => format!("{what} before the first moment that can be reached"),
    };
    Refusal::new(RefusalKind::BeforeFirst, reason)
}

fn damage_hints(offers: Offers<'_>) -> impl Iterator<Item = String> {
    let damaged: BTreeSet<SegmentName> = offers.damaged.into_iter().collect();
    damaged.into_iter().map(|name| {
        format!("Segment {name} is damaged where it is stored: what lies near it cannot be offered.")
    })
}

/// Returns a refusal with what can be reached instead, as far as it does not say that yet.
pub(crate) fn complete(asked: &Asked<'_>, refusal: Refusal) -> Halt {
    match try_complete(asked, refusal) {
        Ok(refusal) => Halt::Refuse(Box::new(refusal)),
        Err(halt) => halt,
    }
}

fn try_complete(asked: &Asked<'_>, mut refusal: Refusal) -> Result<Refusal, Halt> {
    match refusal.kind {
        RefusalKind::NoBackup => {}
        RefusalKind::WalLevelMinimal | RefusalKind::WalReset | RefusalKind::Undecoded => {
            if let (Some(at), Ok(history)) =
                (refusal.at, resolve_timeline(asked.catalog, asked.target.timeline))
            {
                let Asked { catalog, evidence, target, options } = *asked;
                let question = Question { catalog, evidence, target, history: &history };
                let mut offers = Offers::new(&question, options);
                (refusal.before, refusal.after) = offers.around(at)?;
                refusal.hints.extend(damage_hints(offers));
            }
        }
        RefusalKind::UnknownTimeline | RefusalKind::MissingHistory | RefusalKind::BackupNotOnPath => {
            refusal.hints.extend(on_other_timelines(asked, &asked.catalog.timelines())?);
        }
        _ => {
            if let Ok(history) = resolve_timeline(asked.catalog, asked.target.timeline) {
                let Asked { catalog, evidence, target, .. } = *asked;
                let question = Question { catalog, evidence, target, history: &history };
                refusal.hints.extend(on_other_timelines(asked, &elsewhere(&question))?);
            }
        }
    }
    if asked.options.backup.is_some() {
        refusal.hints.extend(without_the_pin(asked)?);
    }
    Ok(refusal)
}

/// Returns what another timeline than the one that was followed has to offer.
fn on_other_timelines(asked: &Asked<'_>, timelines: &[TimelineId]) -> Result<Vec<String>, Halt> {
    let mut hints = Vec::new();
    let newest_first =
        timelines.iter().rev().filter(|timeline| asked.target.timeline != TimelineChoice::Number(**timeline));
    let mut unasked = Vec::new();
    for (at, &timeline) in newest_first.enumerate() {
        if at >= TIMELINES_MAX {
            unasked.push(timeline.to_string());
            continue;
        }
        let target = RecoveryTarget { timeline: TimelineChoice::Number(timeline), ..asked.target.clone() };
        if serves(&Asked { target: &target, ..*asked })? {
            hints.push(format!("Timeline {timeline} leads to it: {}.", options_of(&target, asked.options)));
        }
    }
    if !unasked.is_empty() {
        hints.push(format!("It was not looked for on timeline {}.", unasked.join(", ")));
    }
    Ok(hints)
}

/// Returns whether another backup leads to the target.
fn without_the_pin(asked: &Asked<'_>) -> Result<Option<String>, Halt> {
    let options = PlanOptions::default();
    let served = serves(&Asked { options: &options, ..*asked })?;
    Ok(served.then(|| format!("Another backup leads to it: {}.", asked.target.options())))
}

fn options_of(target: &RecoveryTarget, options: &PlanOptions) -> String {
    let backup = options.backup.as_ref();
    let backup = backup.map_or_else(String::new, |id| format!(" --backup {}", shell_word(id)));
    format!("{}{backup}", target.options())
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

fn hints(
    offers: &mut Offers<'_>,
    question: &Question<'_>,
    candidate: &Candidate<'_>,
) -> Result<Vec<String>, Halt> {
    let mut hints = Vec::new();
    let walk = Walk::new(question, &candidate.chain);
    match &question.target.kind {
        TargetKind::Name(_) => {
            let names = restore_points(offers, &walk, candidate.backup.stop_lsn)?;
            if names.is_empty() {
                hints.push("No restore point can be reached in this WAL.".to_owned());
            } else {
                hints.push(format!("The latest restore points: {}.", names.join(", ")));
            }
        }
        TargetKind::Xid(xid) => {
            let usable = offers.usable(&walk, candidate.chain.len().saturating_sub(1))?.end;
            let parent = parent_of(&walk, *xid)?;
            let parent = parent.filter(|event| {
                aligned(event.end_lsn) >= candidate.backup.stop_lsn && event.end_lsn <= usable
            });
            if let Some(parent) = parent.and_then(|event| event.kind.ended_xid(event.xid)) {
                hints.push(format!(
                    "{xid} is a committed subtransaction of {parent}; recovery stops only at the whole \
                     transaction: --to-xid {parent}{}.",
                    offers.pinned()
                ));
            }
        }
        _ => {}
    }
    if matches!(question.target.kind, TargetKind::Name(_) | TargetKind::Xid(_)) {
        let gaps = gaps_of(question.catalog, question.history);
        hints.extend(
            gaps.iter().rev().take(GAPS_MAX).map(|gap| format!("It may lie where WAL is missing: {gap}.")),
        );
    }
    Ok(hints)
}

/// Returns the latest restore points that this backup leads to, as options.
fn restore_points(offers: &mut Offers<'_>, walk: &Walk<'_>, consistent: Lsn) -> Result<Vec<String>, Halt> {
    let usable = offers.usable(walk, walk.chain.len().saturating_sub(1))?.end;
    let name_of = |event: &WalEvent| match &event.kind {
        EventKind::RestorePoint { name, time } => Some((name.clone(), *time)),
        _ => None,
    };
    // Recovery stops at the first of a name, and would do so before it is consistent.
    let early = walk.notable(0, walk.chain.step_reaching(consistent), Class::Planning)?;
    let early: BTreeSet<String> = early
        .iter()
        .filter(|event| aligned(event.end_lsn) < consistent)
        .filter_map(|event| name_of(event).map(|(name, _)| name))
        .collect();
    let mut names = Vec::new();
    walk.latest(Class::Planning, |event| {
        let reached = aligned(event.end_lsn) >= consistent && event.end_lsn <= usable;
        if let Some((name, time)) = name_of(event).filter(|(name, _)| reached && !early.contains(name)) {
            names.push(format!("--to-name {}{} ({})", shell_word(&name), offers.pinned(), utc_text(time)));
        }
        names.len() == NAMES_MAX
    })?;
    Ok(names)
}

/// Returns the timelines of which WAL is stored that does not lie on the way to the one asked for.
pub(super) fn elsewhere(question: &Question<'_>) -> Vec<TimelineId> {
    let mut stored = question.catalog.segments.timelines();
    stored.extend(question.catalog.tails.iter().flatten().map(|(timeline, _)| *timeline));
    let mut stored: Vec<_> = stored.into_iter().collect();
    stored.retain(|timeline| !question.history.contains(*timeline) || left(question, *timeline));
    stored
}

/// Returns whether WAL of this ancestor is stored behind the point where the path left it.
fn left(question: &Question<'_>, timeline: TimelineId) -> bool {
    let Some(switch) = question.history.switch_lsn_of(timeline) else { return false };
    let size = question.catalog.lineage.segment_size;
    let from = SegmentName::containing(timeline, Lsn(switch.0), size);
    let tail = question.catalog.tails.as_ref().and_then(|tails| tails.get(&timeline));
    question.catalog.segments.first_from(from).is_some() || tail.is_some_and(|tail| tail.until_lsn > switch)
}

/// Returns the commit of the top-level transaction of a committed subtransaction, as far as loaded segments or
/// segments whose ended transactions come shortly before it can tell.
fn parent_of<'a>(walk: &Walk<'a>, xid: u32) -> Result<Option<&'a WalEvent>, Halt> {
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
    Ok(found.map(|(_, event)| event))
}
