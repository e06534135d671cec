//! The unbroken run of segments along a timeline path, found by LSN arithmetic and history files.

use serde::Serialize;
use walship::catalog::Catalog;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

use super::gap::{Gap, KnownBy, ending_at};
use super::walk::FOLLOW_MAX_BYTES;

/// The stored WAL from one position on, as far as it is unbroken: steps of one segment each, kept as spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Where it starts.
    pub start: Lsn,
    /// What comes after the last step.
    pub ending: ChainEnding,
    size: SegmentSize,
    spans: Vec<Span>,
}

/// Consecutive segments of one timeline in a chain; all but the first and the last are used whole.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    first: SegmentName,
    segments: usize,
    from: Lsn,
    to: Lsn,
    /// How many steps of the chain come before it.
    before: usize,
    /// Whether it is the open segment, of which parts are stored.
    open: bool,
}

impl Chain {
    fn new(start: Lsn, size: SegmentSize) -> Self {
        Self { start, ending: ChainEnding::EndOfArchive, size, spans: Vec::new() }
    }

    /// Returns the number of its steps.
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |span| span.before + span.segments)
    }

    /// Returns whether it has no step.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Returns step `at`; each begins where the one before ends.
    ///
    /// # Panics
    /// When there is no such step.
    pub fn step(&self, at: usize) -> ChainStep {
        let span = self.span(at).expect("the step is one of the chain");
        let number = span.first.number(self.size) + (at - span.before) as u64;
        let segment = SegmentName::from_number(span.first.timeline, number, self.size)
            .expect("segments of a chain lie in the LSN space");
        let from = if at == span.before { span.from } else { segment.start(self.size) };
        let to = if at + 1 == span.before + span.segments { span.to } else { segment.end(self.size) };
        ChainStep { segment, from, to }
    }

    /// Returns every step from `from` on.
    pub fn steps_from(&self, from: usize) -> impl Iterator<Item = ChainStep> + '_ {
        (from..self.len()).map(|at| self.step(at))
    }

    /// Returns the last step.
    pub fn last_step(&self) -> Option<ChainStep> {
        self.len().checked_sub(1).map(|at| self.step(at))
    }

    /// Returns the position after its last byte.
    pub fn end(&self) -> Lsn {
        self.spans.last().map_or(self.start, |span| span.to)
    }

    /// Returns the number of the step that holds the byte at `lsn`.
    pub fn step_of(&self, lsn: Lsn) -> Option<usize> {
        let span = &self.spans.get(self.spans.partition_point(|span| span.to <= lsn))?;
        let number = SegmentName::containing(span.first.timeline, lsn, self.size).number(self.size);
        let within = number.checked_sub(span.first.number(self.size))?;
        (lsn >= span.from).then(|| span.before + within as usize)
    }

    /// Returns the number of the last step that begins before `lsn`.
    pub fn last_before(&self, lsn: Lsn) -> Option<usize> {
        if self.is_empty() || lsn <= self.start { None } else { Some(self.step_reaching(lsn)) }
    }

    /// Returns the number of the first step that reaches `lsn`, at most that of the last step.
    pub(crate) fn step_reaching(&self, lsn: Lsn) -> usize {
        let found = if lsn <= self.start { Some(0) } else { self.step_of(Lsn(lsn.0 - 1)) };
        found.unwrap_or(self.len().saturating_sub(1))
    }

    /// Returns the number of the last step of the same timeline in a row with step `at`.
    pub(crate) fn last_in_span(&self, at: usize) -> usize {
        self.span(at).map_or(at, |span| span.before + span.segments - 1)
    }

    /// Returns the number of the first step of the same timeline in a row with step `at`.
    pub(crate) fn first_in_span(&self, at: usize) -> usize {
        self.span(at).map_or(at, |span| span.before)
    }

    /// Returns whether step `at` is the open segment, of which parts are stored. Nothing follows it.
    pub fn is_open(&self, at: usize) -> bool {
        self.span(at).is_some_and(|span| span.open)
    }

    fn span(&self, at: usize) -> Option<&Span> {
        self.spans.get(self.spans.partition_point(|span| span.before + span.segments <= at))
    }

    fn push(&mut self, step: ChainStep, segments: usize, to: Lsn, open: bool) {
        let before = self.len();
        match self.spans.last_mut() {
            // In a row with the last one, which then is used to its end.
            Some(span)
                if !open
                    && step.from == step.segment.start(self.size)
                    && span.to == step.from
                    && span.first.timeline == step.segment.timeline =>
            {
                span.segments += segments;
                span.to = to;
            }
            _ => self.spans.push(Span { first: step.segment, segments, from: step.from, to, before, open }),
        }
    }
}

/// One segment of a chain: the stored copy that recovery will use, and which of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainStep {
    /// The stored segment.
    pub segment: SegmentName,
    /// The first byte that is used.
    pub from: Lsn,
    /// The position after the last byte that is used: the segment's end, or for a parent's copy of
    /// the segment that holds a fork, the switch point, or in the open segment the end of its last record.
    pub to: Lsn,
}

/// Why a chain ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChainEnding {
    /// Nothing later is stored on this path, and nothing says that there was more.
    EndOfArchive,
    /// Segments are missing, and there was WAL behind or in them.
    Gap(Gap),
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

/// Returns the chain from `start`, built no further than records reach that begin before `until`; how it ends is not
/// looked for when it gets so far.
pub(crate) fn build_chain_until(
    catalog: &Catalog,
    history: &TimelineHistory,
    start: Lsn,
    until: Lsn,
) -> Chain {
    let size = catalog.lineage.segment_size;
    let mut chain = Chain::new(start, size);
    let until = Lsn(until.0.saturating_add(FOLLOW_MAX_BYTES));
    let mut at = start;
    loop {
        let owner = history.timeline_of(at);
        let name = SegmentName::containing(owner, at, size);
        let (step, open) = match stored_copy(catalog, history, name, at) {
            Some(Copy::Whole(step)) => (step, false),
            Some(Copy::Open(step)) if step.to > at => (step, true),
            _ => {
                chain.ending = ending_at(catalog, history, at);
                return chain;
            }
        };
        if open {
            // A server that is given it looks for nothing else in its place.
            chain.push(step, 1, step.to, true);
            if step.to < until {
                chain.ending = ending_at(catalog, history, step.to);
            }
            return chain;
        }
        let last_possible = step.to == step.from || step.to.0 == u64::MAX;
        let (segments, to) = run_from(catalog, history, step);
        chain.push(step, segments, to, false);
        at = to;
        if last_possible || to.0 == u64::MAX || at >= until {
            return chain;
        }
    }
}

/// Returns how many segments from that of `step` on are in the chain for the same reason: stored in a row,
/// and with no fork inside; and where the last of them ends.
fn run_from(catalog: &Catalog, history: &TimelineHistory, step: ChainStep) -> (usize, Lsn) {
    let (size, segment) = (catalog.lineage.segment_size, step.segment);
    let whole = step.to == segment.end(size);
    let stored = catalog.segments.run_end(segment).filter(|_| whole);
    let Some(last) = stored else { return (1, step.to) };
    let left_at = history.switch_lsn_of(segment.timeline).unwrap_or(Lsn(u64::MAX));
    let behind = (last.number(size) + 1).min(left_at.0 / size.bytes()).max(segment.number(size) + 1);
    let last = SegmentName::from_number(segment.timeline, behind - 1, size).unwrap_or(segment);
    ((behind - segment.number(size)) as usize, last.end(size))
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

/// A copy of a segment that recovery uses.
enum Copy {
    Whole(ChainStep),
    /// The open segment; perhaps not even up to where it is wanted from.
    Open(ChainStep),
}

/// Returns the copy of the segment at `at` that recovery uses, if one that holds `at` is stored. PostgreSQL asks
/// for the newest timeline's first, and is given what there is of that.
fn stored_copy(catalog: &Catalog, history: &TimelineHistory, name: SegmentName, at: Lsn) -> Option<Copy> {
    let size = catalog.lineage.segment_size;
    let (start, end) = (name.start(size), name.end(size));
    let timelines =
        std::iter::once(history.timeline).chain(history.ancestors.iter().rev().map(|entry| entry.timeline));
    for timeline in timelines {
        let begins_here_or_before = begin_of(history, timeline).is_none_or(|begin| begin < end);
        let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
        if !begins_here_or_before || left_at <= start || left_at <= at {
            continue;
        }
        let copy = name.on(timeline);
        if catalog.segments.contains(copy) {
            return Some(Copy::Whole(ChainStep { segment: copy, from: at, to: end.min(left_at) }));
        }
        if let Some(tail) = catalog.served_tail(copy) {
            let to = tail.until_lsn.min(left_at);
            return Some(Copy::Open(ChainStep { segment: copy, from: at, to }));
        }
    }
    None
}

/// A piece of WAL that PostgreSQL may look for in `pg_wal` under a name that recovery never fetches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParentSegment {
    /// The name: the segment of the timeline that was left inside it.
    pub segment: SegmentName,
    /// The segment of the chain that holds the same bytes.
    pub stored: SegmentName,
    /// The position after the last of them: where the timeline was left.
    pub until: Lsn,
}

/// Returns the parents' names of segments with forks in the steps `0..=last`, where the chain holds a younger
/// timeline's copy.
///
/// While replay is before the fork PostgreSQL reads the state of a transaction prepared in that segment from the
/// parent's file, and ends recovery when it is not in `pg_wal`. It does so at the end of a recovery that stops
/// there, and with `hot_standby` at a shutdown checkpoint, with which a timeline begins whose server was promoted
/// at its recovery target.
/// Source: `src/backend/access/transam/twophase.c`, XlogReadTwoPhaseData; `xlogutils.c`,
/// XLogReadDetermineTimeline and wal_segment_open; the same in 14 to 18.
pub(crate) fn parent_segments(history: &TimelineHistory, chain: &Chain, last: usize) -> Vec<ParentSegment> {
    let size = chain.size;
    let inside = history.ancestors.iter().filter(|entry| size.offset_of(entry.switch_lsn) != 0);
    let found = inside.filter_map(|entry| {
        let segment = SegmentName::containing(entry.timeline, entry.switch_lsn, size);
        if entry.switch_lsn <= chain.start {
            // What was prepared before replay begins is a file of the backup.
            return None;
        }
        let at = chain.step_of(segment.start(size).max(chain.start)).filter(|at| *at <= last)?;
        let stored = chain.step(at).segment;
        (stored.timeline > entry.timeline).then_some(ParentSegment {
            segment,
            stored,
            until: entry.switch_lsn,
        })
    });
    found.collect()
}

/// Returns the same stretches (numbers of segments, ends excluded) in order, none touching another.
pub(crate) fn merge(mut stretches: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    stretches.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (from, until) in stretches {
        match merged.last_mut() {
            Some((_, end)) if *end >= from => *end = (*end).max(until),
            _ => merged.push((from, until)),
        }
    }
    merged
}

/// Returns where `timeline` begins on the path: the switch point of the ancestor before it.
pub(crate) fn begin_of(history: &TimelineHistory, timeline: TimelineId) -> Option<Lsn> {
    let before = history.ancestors.iter().rev().find(|entry| entry.timeline < timeline)?;
    Some(before.switch_lsn)
}

/// Returns the stored WAL along `history` from its first segment to its last, gap after gap.
pub(crate) fn chains_of(catalog: &Catalog, history: &TimelineHistory) -> Vec<Chain> {
    let size = catalog.lineage.segment_size;
    let path = history.ancestors.iter().map(|entry| entry.timeline).chain([history.timeline]);
    let first = path
        .filter_map(|timeline| {
            // What lies before its first segment is none of its WAL, whatever is stored.
            let begin = begin_of(history, timeline).unwrap_or(Lsn(0));
            let name = catalog.first_stored_from(SegmentName::containing(timeline, begin, size))?;
            let left_at = history.switch_lsn_of(timeline).unwrap_or(Lsn(u64::MAX));
            (name.start(size) < left_at).then_some(name.start(size))
        })
        .min();
    let mut chains = Vec::new();
    let mut at = first;
    while let Some(start) = at {
        let chain = build_chain(catalog, history, start);
        at = match &chain.ending {
            // Behind all other gaps nothing is stored.
            ChainEnding::Gap(gap) if gap.known_by == KnownBy::LaterWal => Some(gap.to),
            _ => None,
        };
        chains.push(chain);
    }
    chains
}

/// Returns every gap along `history` from the first stored segment of the path on; also behind the last one,
/// where there is known to have been WAL.
pub fn gaps_of(catalog: &Catalog, history: &TimelineHistory) -> Vec<Gap> {
    let endings = chains_of(catalog, history).into_iter().map(|chain| chain.ending);
    let gaps = endings.filter_map(|ending| match ending {
        ChainEnding::Gap(gap) => Some(gap),
        ChainEnding::EndOfArchive => None,
    });
    gaps.collect()
}
