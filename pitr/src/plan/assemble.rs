//! Puts a plan together once backup and stop are chosen: sizes, neighbours, reasons, warnings.

use walship::catalog::{BackupRecord, Catalog, DamagedPage, DamagedPages, StoredTail};
use walship::pg::{SegmentName, TimelineHistory};
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::Class;

use super::chain::{Chain, ChainEnding, begin_of, oldest_way, parent_segments};
use super::extras;
use super::half_done;
use super::reach::{Reach, Stop, StopKind};
use super::refusal;
use super::walk::{Seek, Walk};
use super::{
    Candidate, ChainPart, Gap, Halt, Question, RefusalKind, RestorePlan, TimelinePart, TransactionEnd,
};
use crate::target::{RecoveryTarget, TargetKind, TimelineChoice, utc_text};

/// Any commit, in summaries and as an event.
pub(crate) const COMMITS: Seek<'static> = Seek {
    maybe: &|facts, _| facts.counts.commits > 0,
    matches: &|event| matches!(event.kind, EventKind::Commit { .. }),
};

pub(crate) fn assemble(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
    stop: Stop,
    passed_over: &[(&BackupRecord, Reach)],
    not_tried: usize,
) -> Result<RestorePlan, Halt> {
    let catalog = question.catalog;
    let backup = candidate.backup;
    let all = Walk::new(question, &candidate.chain);
    let walk = Walk { cut: Some(stop.cut_lsn), ..all };
    let last = last_step(&candidate.chain, &stop);

    let notable = extras::notable(&walk, last, &stop, backup.limits)?;
    let before = walk.last(last, stop.cut_lsn, &COMMITS)?;
    let last_included = before.and_then(|(_, event)| TransactionEnd::of(event));
    let behind = match stop.kind {
        StopKind::EndOfWal => Behind::default(),
        _ => first_excluded(&all, last, &stop)?,
    };
    let open_prepared = extras::open_prepared(&walk, last, &stop, backup)?;
    let half_done = half_done::half_done(question, &walk, last, &stop, backup.stop_lsn)?;

    let older = match stop.kind {
        StopKind::EndOfWal => None,
        _ => oldest_way(catalog, question.history, backup.stop_timeline, backup.start_lsn, stop.through_lsn),
    };
    let older = match older {
        Some((_, chain)) if !copies_serve(question, &candidate.chain, &chain, &stop)? => None,
        older => older,
    };
    let (history, chain) =
        older.as_ref().map_or((question.history, &candidate.chain), |(history, chain)| (history, chain));
    let used = last_step(chain, &stop);
    let used_walk = Walk { chain, ..walk };
    let parts = parts(&used_walk, catalog, used)?;
    let open = parts.last().filter(|part| part.open);
    let tail = open.and_then(|part| catalog.served_tail(part.last)).cloned();
    let timeline = history.timeline;
    let pinned = RecoveryTarget { timeline: TimelineChoice::Number(timeline), ..question.target.clone() };
    let mut plan = RestorePlan {
        cluster: catalog.cluster.clone(),
        lineage: catalog.lineage.number,
        system_identifier: catalog.lineage.system_identifier.to_string(),
        target: question.target.clone(),
        target_options: pinned.options(),
        timeline,
        timeline_path: path_between(history, candidate, &stop),
        backup: backup.clone(),
        // Those without their parents are not among the catalog's.
        parents: catalog.parents_of(backup).unwrap_or_default().into_iter().cloned().collect(),
        last_included,
        first_excluded: behind.first,
        first_excluded_unknown: behind.unknown,
        timelines_left_out: refusal::elsewhere(question),
        backup_fetch_bytes: 0,
        wal_segments: parts.iter().map(|part| part.segments).sum(),
        wal_segments_checked: 0,
        wal_fetch_bytes: parts.iter().map(|part| part.stored_bytes).sum(),
        wal_replay_bytes: walk.wal_bytes(last, stop.final_lsn)?,
        forecast: None,
        chain: parts,
        tail,
        // No transaction can be prepared where the setting is 0.
        parent_segments: match notable.limits.max_prepared_transactions {
            0 => Vec::new(),
            _ => parent_segments(history, chain, used),
        },
        limits: notable.limits,
        tablespace_paths: notable.tablespace_paths,
        open_prepared,
        half_done,
        damaged_behind: damaged_after(&all, last)?,
        gap_behind: gap_of(chain).or_else(|| gap_of(&candidate.chain)),
        reasons: Vec::new(),
        warnings: Vec::new(),
        stop,
    };
    plan.backup_fetch_bytes = plan.backups().map(|backup| backup.stored_bytes).sum();
    plan.reasons = reasons(question, candidate, &plan, passed_over);
    if not_tried > 0 {
        plan.reasons.push(format!("{not_tried} newer backup(s) were started long after the target"));
    }
    plan.warnings = warnings(question, &walk, &plan, passed_over);
    if let Some(why) = &plan.first_excluded_unknown {
        plan.warnings.push(format!("which commit comes first behind the stop is not known: {why}"));
    }
    Ok(plan)
}

/// Returns whether the segments that only the older way uses can be read as far as those they stand for.
fn copies_serve(question: &Question<'_>, own: &Chain, older: &Chain, stop: &Stop) -> Result<bool, Halt> {
    let walk = Walk::new(question, older);
    for at in (0..=last_step(older, stop)).rev() {
        let step = older.step(at);
        let same = own.step_of(step.from).is_some_and(|at| own.step(at).segment == step.segment);
        if same {
            break;
        }
        match walk.notable(at, at, Class::Planning) {
            Ok(_) => {}
            Err(Halt::Refuse(_) | Halt::Unreadable(_)) => return Ok(false),
            Err(halt) => return Err(halt),
        }
    }
    Ok(true)
}

/// What is known of the WAL behind the stop.
#[derive(Default)]
struct Behind {
    first: Option<TransactionEnd>,
    /// Why the first commit is not known.
    unknown: Option<String>,
}

/// Returns the first commit behind the stop. Recovery does not need that WAL: where it is missing, damaged
/// or cannot be decoded the search ends, and says why.
fn first_excluded(walk: &Walk<'_>, last: usize, stop: &Stop) -> Result<Behind, Halt> {
    let after = |event: &WalEvent| event.lsn >= stop.cut_lsn && (COMMITS.matches)(event);
    let from = walk.chain.step_of(stop.cut_lsn).unwrap_or(last);
    let unknown = match walk.first(from, &Seek { maybe: COMMITS.maybe, matches: &after }) {
        Ok(Some((_, event))) => return Ok(Behind { first: TransactionEnd::of(event), unknown: None }),
        Ok(None) => match &walk.chain.ending {
            ChainEnding::EndOfArchive => None,
            ChainEnding::Gap(gap) => Some(format!("none lies before a gap ({gap}) that WAL follows")),
        },
        Err(Halt::Refuse(refusal)) if refusal.kind == RefusalKind::Undecoded => {
            Some(format!("{}; recovery does not read so far", refusal.reason))
        }
        Err(Halt::Unreadable(name)) => Some(format!(
            "segment {name} is damaged where it is stored; recovery to this target does not need it"
        )),
        Err(halt) => return Err(halt),
    };
    Ok(Behind { first: None, unknown })
}

/// Returns the number of the last step that recovery reads.
fn last_step(chain: &Chain, stop: &Stop) -> usize {
    chain.step_reaching(stop.through_lsn)
}

/// Returns the segment behind step `last` if its stored object is damaged.
fn damaged_after(walk: &Walk<'_>, last: usize) -> Result<Option<SegmentName>, Halt> {
    if last + 1 >= walk.chain.len() {
        return Ok(None);
    }
    match walk.summary(last + 1) {
        Ok(_) => Ok(None),
        Err(Halt::Unreadable(name)) => Ok(Some(name)),
        Err(halt) => Err(halt),
    }
}

fn gap_of(chain: &Chain) -> Option<Gap> {
    match &chain.ending {
        ChainEnding::Gap(gap) => Some(gap.clone()),
        ChainEnding::EndOfArchive => None,
    }
}

/// Returns the steps `0..=last` as runs of one timeline each.
fn parts(walk: &Walk<'_>, catalog: &Catalog, last: usize) -> Result<Vec<ChainPart>, Halt> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at <= last && at < walk.chain.len() {
        let to = walk.chain.last_in_span(at).min(last);
        let (first_step, last_step) = (walk.chain.step(at), walk.chain.step(to));
        parts.push(ChainPart {
            first: first_step.segment,
            last: last_step.segment,
            segments: (to - at) as u64 + 1,
            stored_bytes: match catalog.served_tail(last_step.segment) {
                Some(tail) => tail.stored_bytes,
                None => walk.stored_bytes(&catalog.segments, at, to)?,
            },
            until_lsn: last_step.to,
            open: walk.chain.is_open(at),
        });
        at = to + 1;
    }
    Ok(parts)
}

fn path_between(history: &TimelineHistory, candidate: &Candidate<'_>, stop: &Stop) -> Vec<TimelinePart> {
    let last = history.timeline_of(stop.final_lsn);
    let all = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
    all.filter(|timeline| (candidate.backup.timeline..=last).contains(timeline))
        .map(|timeline| TimelinePart { timeline, begin_lsn: begin_of(history, timeline) })
        .collect()
}

fn reasons(
    question: &Question<'_>,
    candidate: &Candidate<'_>,
    plan: &RestorePlan,
    passed_over: &[(&BackupRecord, Reach)],
) -> Vec<String> {
    let mut reasons = Vec::new();
    let others = question.catalog.timelines().len() > 1;
    let asked = question.history.timeline;
    match question.target.timeline {
        TimelineChoice::Latest if others => reasons.push(format!(
            "timeline {asked} is the latest that is stored; a recovery that ends is pinned to it by number"
        )),
        TimelineChoice::Latest => reasons.push(format!("timeline {asked} is the only one")),
        TimelineChoice::Number(_) => reasons.push(format!("timeline {asked} was asked for")),
    }
    if plan.timeline != asked {
        reasons.push(format!(
            "recovery stops before timeline {asked} leaves timeline {older}: {older} is pinned, so that the new \
             timeline does not name {asked} as its ancestor",
            older = plan.timeline
        ));
    }
    let backup = candidate.backup;
    reasons.push(match passed_over.first() {
        None => format!(
            "backup {} is the newest on this path; it is consistent from {} on",
            backup.id, backup.stop_lsn
        ),
        Some(_) => format!(
            "backup {} is the newest that serves this target; it is consistent from {} on",
            backup.id, backup.stop_lsn
        ),
    });
    if let [.., full] = &plan.parents[..] {
        let between = plan.parents.len() - 1;
        reasons.push(format!(
            "it is incremental: what it does not hold comes from backup {}{}",
            full.id,
            match between {
                0 => String::new(),
                count => format!(" and the {count} between"),
            }
        ));
    }
    for (other, reach) in passed_over.iter().take(3) {
        reasons.push(match reach {
            Reach::BeforeConsistency { lsn } => format!(
                "backup {} is too new: recovery would stop at {lsn}, before it is consistent ({})",
                other.id, other.stop_lsn
            ),
            Reach::Unknown => format!("backup {} cannot be used: its own WAL cannot be read", other.id),
            _ => format!("backup {} does not lead to the target", other.id),
        });
    }
    if passed_over.len() > 3 {
        reasons.push(format!("{} more backups are too new", passed_over.len() - 3));
    }
    reasons.push(stop_reason(question, &plan.stop));
    reasons.extend(plan.tail.as_ref().map(|tail| {
        let StoredTail { segment, end_lsn, parts, .. } = tail;
        let start = segment.start(question.catalog.lineage.segment_size);
        match tail.lost_from {
            None => format!(
                "WAL from {start} on comes from the open segment {segment}, which was shipped up to {end_lsn} in {parts} part(s)"
            ),
            Some(lost_from) => format!(
                "WAL from {start} on comes from {parts} part(s) of segment {segment}, which are stored up to {end_lsn}; \
                 from {lost_from} on it is lost"
            ),
        }
    }));
    reasons
}

fn stop_reason(question: &Question<'_>, stop: &Stop) -> String {
    let record = stop.record.as_ref();
    let ended = record.and_then(TransactionEnd::of);
    let side = if stop.kind == StopKind::Before { "before" } else { "after" };
    match (&question.target.kind, ended) {
        (TargetKind::Latest, _) => format!("the archived WAL ends at {}", stop.final_lsn),
        (TargetKind::Immediate, _) => format!("the backup is consistent at {}", stop.final_lsn),
        (TargetKind::Name(name), _) => {
            format!("restore point {name:?} ends at {}; recovery stops after it", stop.final_lsn)
        }
        (_, Some(end)) => format!(
            "recovery stops {side} the {} of transaction {} at {} (record at {})",
            if end.committed { "commit" } else { "abort" },
            end.xid,
            utc_text(end.time),
            end.lsn
        ),
        _ => format!(
            "recovery stops {side} the WAL record that {} {}",
            if stop.kind == StopKind::Before { "starts at" } else { "ends at" },
            stop.final_lsn
        ),
    }
}

/// Names the first of the relations, or files, that damaged pages are in.
fn damaged_where(damaged: &DamagedPages) -> String {
    const NAMED_MAX: usize = 5;
    let name = |page: &DamagedPage| page.relation.clone().unwrap_or_else(|| page.path.display().to_string());
    let mut names: Vec<String> = damaged.pages.iter().map(name).collect();
    names.dedup();
    let more = if names.len() > NAMED_MAX { ", ..." } else { "" };
    names.truncate(NAMED_MAX);
    names.join(", ") + more
}

fn warnings(
    question: &Question<'_>,
    walk: &Walk<'_>,
    plan: &RestorePlan,
    passed_over: &[(&BackupRecord, Reach)],
) -> Vec<String> {
    let mut warnings: Vec<String> = plan.half_done.iter().map(half_done::HalfDone::warning).collect();
    for tablespace in &plan.tablespace_paths {
        warnings.push(format!(
            "replay creates tablespace {} in {:?}, the original server's folder",
            tablespace.oid, tablespace.path
        ));
    }
    for backup in plan.backups() {
        let Some(damaged) = &backup.damaged_pages else { continue };
        warnings.push(format!(
            "backup {} holds {} damaged pages ({}): what is on them is lost unless the WAL writes them anew; an older \
             backup (--backup) may have them whole",
            backup.id,
            damaged.total,
            damaged_where(damaged)
        ));
    }
    match &plan.open_prepared {
        None => warnings.push(
            "which prepared transactions are open at the target is not known (there are many, or the backup does not \
             say which it holds): look into pg_prepared_xacts after the restore".to_owned(),
        ),
        Some(open) => warnings.extend(open.iter().map(|prepared| {
            format!(
                "prepared transaction {:?} (xid {}, prepared {}) is open at the target: commit it or roll it \
                 back after the restore",
                prepared.gid,
                prepared.xid,
                utc_text(prepared.time)
            )
        })),
    }
    if matches!(question.target.kind, TargetKind::Time { .. })
        && passed_over.iter().any(|(other, reach)| {
            matches!(reach, Reach::NotReached) && other.start_lsn > plan.backup.start_lsn
        })
    {
        warnings.push(
            "the server's clock went backwards: recovery stops at the first record past the target time, \
             which later WAL with earlier times follows"
                .to_owned(),
        );
    }
    warnings.extend(plan.tail.as_ref().and_then(StoredTail::flaw_text));
    if let TargetKind::Name(wanted) = &question.target.kind {
        warnings.extend(same_name(question, walk, plan, wanted));
    }
    warnings
}

/// Returns a warning when a later restore point has the same name, as far as the summaries tell that are
/// known anyway.
fn same_name(question: &Question<'_>, walk: &Walk<'_>, plan: &RestorePlan, wanted: &str) -> Option<String> {
    let cut = plan.stop.cut_lsn;
    let again = |event: &&WalEvent| {
        event.lsn >= cut && matches!(&event.kind, EventKind::RestorePoint { name, .. } if name == wanted)
    };
    let known = walk.evidence.events.values().flatten();
    let known = known.chain(walk.evidence.summaries.values().flat_map(|summary| &summary.events));
    let known = known.chain(walk.evidence.blocks.values().flat_map(|block| &block.events));
    // Of the same position on other timelines nothing can be said: those are not on the way.
    let on_the_way = |event: &&WalEvent| {
        let step = walk.chain.step_of(event.lsn).map(|at| walk.chain.step(at).segment);
        step.is_some_and(|segment| walk.tells_of(segment, event))
    };
    let event = known.filter(again).filter(on_the_way).min_by_key(|event| event.lsn)?;
    let other = RecoveryTarget {
        timeline: question.target.timeline,
        ..RecoveryTarget::new(TargetKind::Lsn(event.lsn))
    };
    Some(format!(
        "another restore point has this name, at {}; recovery stops at the first: use {} to reach the other",
        event.lsn,
        other.options()
    ))
}
