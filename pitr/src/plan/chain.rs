//! The unbroken run of segments along a timeline path, found by LSN arithmetic and history files.

use serde::Serialize;
use walship::catalog::Catalog;
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};

/// The stored WAL from one position on, as far as it is unbroken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Where it starts.
    pub start: Lsn,
    /// Its segments; each begins where the one before ends.
    pub steps: Vec<ChainStep>,
    /// What comes after the last.
    pub ending: ChainEnding,
}

impl Chain {
    /// Returns the position after its last byte.
    pub fn end(&self) -> Lsn {
        self.steps.last().map_or(self.start, |step| step.to)
    }

    /// Returns the number of the step that holds the byte at `lsn`.
    pub fn step_of(&self, lsn: Lsn) -> Option<usize> {
        let at = self.steps.partition_point(|step| step.to <= lsn);
        (at < self.steps.len() && lsn >= self.steps[at].from).then_some(at)
    }
}

/// One segment of a chain: the stored copy that recovery will use, and which of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainStep {
    /// The stored segment.
    pub segment: SegmentName,
    /// Its stored size.
    pub stored_bytes: u64,
    /// The first byte that is used.
    pub from: Lsn,
    /// The position after the last byte that is used: the segment's end, or for a parent's copy of
    /// the segment that holds a fork, the switch point.
    pub to: Lsn,
}

/// Why a chain ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChainEnding {
    /// Nothing later is stored on this path.
    EndOfArchive,
    /// Segments are missing and later ones are stored.
    Gap(Gap),
}

/// WAL that is missing between stored WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The first segment that is missing.
    pub first_missing: SegmentName,
    /// The last segment that is missing (inclusive).
    pub last_missing: SegmentName,
    /// Where WAL is missing from.
    pub from: Lsn,
    /// Where it goes on.
    pub to: Lsn,
    /// Whether a copy of the first missing one is kept apart as incomplete.
    pub kept_incomplete: bool,
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.first_missing == self.last_missing {
            write!(f, "segment {} is missing", self.first_missing)?;
        } else {
            write!(f, "segments {} to {} are missing", self.first_missing, self.last_missing)?;
        }
        write!(f, " ({} to {})", self.from, self.to)?;
        if self.kept_incomplete {
            f.write_str("; a copy is kept apart as incomplete")?;
        }
        Ok(())
    }
}

/// Returns the chain of stored segments from `start` along `history`.
///
/// In the segment that holds a fork the child's copy is used when it is stored, else the parent's up
/// to the switch point: both hold the same bytes up to there. An ancestor's segment that starts at or
/// after the point where the path left it belongs to another history and is never used.
/// Source: `src/backend/access/transam/xlogrecovery.c`, XLogFileReadAnyTLI.
pub fn build_chain(catalog: &Catalog, history: &TimelineHistory, start: Lsn) -> Chain {
    build_chain_until(catalog, history, start, Lsn(u64::MAX))
}

/// Returns the chain from `start`, built no further than the segment that holds the byte before `until`;
/// how it ends is not looked for when it gets so far.
pub(crate) fn build_chain_until(
    catalog: &Catalog,
    history: &TimelineHistory,
    start: Lsn,
    until: Lsn,
) -> Chain {
    let size = catalog.lineage.segment_size;
    let mut chain = Chain { start, steps: Vec::new(), ending: ChainEnding::EndOfArchive };
    let mut at = start;
    loop {
        let owner = history.timeline_of(at);
        let name = SegmentName::containing(owner, at, size);
        let Some(step) = stored_copy(catalog, history, name, at) else {
            chain.ending = ending_at(catalog, history, at);
            return chain;
        };
        at = step.to;
        let last_possible = step.to == step.from || step.to.0 == u64::MAX;
        chain.steps.push(step);
        if last_possible || at >= until {
            return chain;
        }
    }
}

/// Returns the oldest timeline on the way along `history` whose own WAL leads from `start` through
/// `through`, with that WAL; `None` when only `history`'s own timeline does.
///
/// A server that recovers along a timeline and stops before it begins writes that timeline into its new
/// history as an ancestor, which it never was.
pub(crate) fn oldest_way(
    catalog: &Catalog,
    history: &TimelineHistory,
    from: TimelineId,
    start: Lsn,
    through: Lsn,
) -> Option<(TimelineHistory, Chain)> {
    let older =
        history.ancestors.iter().filter(|entry| entry.timeline >= from && entry.switch_lsn >= through);
    older.filter_map(|entry| catalog.history(entry.timeline)).find_map(|older| {
        let same_way = older.ancestors.iter().all(|entry| {
            history
                .switch_lsn_of(entry.timeline)
                .is_some_and(|lsn| lsn.min(through) == entry.switch_lsn.min(through))
        });
        let chain = build_chain(catalog, &older, start);
        (same_way && chain.end() >= through).then_some((older, chain))
    })
}

/// Returns the copy of the segment at `at` that recovery uses, if one that holds `at` is stored.
fn stored_copy(
    catalog: &Catalog,
    history: &TimelineHistory,
    name: SegmentName,
    at: Lsn,
) -> Option<ChainStep> {
    let size = catalog.lineage.segment_size;
    let (start, end) = (name.start(size), name.end(size));
    let timelines =
        std::iter::once(history.timeline).chain(history.ancestors.iter().rev().map(|entry| entry.timeline));
    for timeline in timelines {
        let begins_here_or_before = begin_of(history, timeline).is_none_or(|begin| begin < end);
        let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
        if !begins_here_or_before || left_at <= start {
            continue;
        }
        let copy = name.on(timeline);
        if let Some(&stored_bytes) = catalog.segments.get(&copy)
            && left_at > at
        {
            return Some(ChainStep { segment: copy, stored_bytes, from: at, to: end.min(left_at) });
        }
    }
    None
}

/// Returns where `timeline` begins on the path: the switch point of the ancestor before it.
pub(crate) fn begin_of(history: &TimelineHistory, timeline: TimelineId) -> Option<Lsn> {
    let before = history.ancestors.iter().rev().find(|entry| entry.timeline < timeline)?;
    Some(before.switch_lsn)
}

/// Returns what a chain that cannot go on at `at` ends with.
fn ending_at(catalog: &Catalog, history: &TimelineHistory, at: Lsn) -> ChainEnding {
    let size = catalog.lineage.segment_size;
    let missing = SegmentName::containing(history.timeline_of(at), at, size);
    let path = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
    let resumes = path
        .filter_map(|timeline| {
            let begin = begin_of(history, timeline).unwrap_or(Lsn(0));
            let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
            let last = SegmentName { timeline, log: u32::MAX, seg: u32::MAX };
            let mut later = catalog.segments.range(missing.on(timeline)..=last).map(|(name, _)| *name);
            later.find(|name| {
                let start = name.start(size);
                start > at && start < left_at && begin < name.end(size)
            })
        })
        .min_by_key(|name| name.start(size));
    let Some(resumes) = resumes else { return ChainEnding::EndOfArchive };
    let to = resumes.start(size);
    let last_timeline = history.timeline_of(Lsn(to.0.saturating_sub(1)));
    let last_missing = SegmentName::ending_at(last_timeline, to, size).unwrap_or(missing);
    ChainEnding::Gap(Gap {
        first_missing: missing,
        last_missing,
        from: at,
        to,
        kept_incomplete: catalog.incomplete.contains(&missing),
    })
}

/// Returns every gap along `history` between the first and the last stored segment of the path.
pub fn gaps_of(catalog: &Catalog, history: &TimelineHistory) -> Vec<Gap> {
    let size = catalog.lineage.segment_size;
    let path = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
    let first = path
        .filter_map(|timeline| {
            let first = SegmentName { timeline, log: 0, seg: 0 };
            let last = SegmentName { timeline, log: u32::MAX, seg: u32::MAX };
            let name = *catalog.segments.range(first..=last).next()?.0;
            let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
            (name.start(size) < left_at).then_some(name.start(size))
        })
        .min();
    let mut gaps = Vec::new();
    let mut at = first;
    while let Some(start) = at {
        match build_chain(catalog, history, start).ending {
            ChainEnding::Gap(gap) if gap.to > start => {
                at = Some(gap.to);
                gaps.push(gap);
            }
            _ => at = None,
        }
    }
    gaps
}
