//! Proves that the segments of a plan are stored: the planner believes the index that they are.
//!
//! Exactly the key ranges of the chain are listed, a thousand names a request. Lengths are compared with what
//! index and summaries say; contents are not read.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::pg::{SegmentName, SegmentSize, TimelineId};
use walship::repository::LineageRepository;
use walship::repository::index::ListedSegment;
use walship::wal::rollup::FANOUT;
use walship::{Error, Result};

use super::load_index::Index;
use crate::plan::{ChainPart, Evidence, RestorePlan};

/// How many segments one request lists: whole logs, and a page of names with some to spare.
const SEGMENTS_PER_LIST: u64 = 3 * FANOUT;

/// How many listings run at once.
const LISTS_MAX: usize = 4;

/// How much of a plan's chain is looked for in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// The first [`Proof::BOUNDED_SEGMENTS`] of its segments: at most some forty requests.
    Bounded,
    /// Every segment.
    Whole,
}

impl Proof {
    /// How many segments are looked for when a plan is only shown: half a terabyte of WAL at 16 MiB.
    pub const BOUNDED_SEGMENTS: u64 = 40 * SEGMENTS_PER_LIST;

    fn segments_max(self) -> u64 {
        match self {
            Self::Bounded => Self::BOUNDED_SEGMENTS,
            Self::Whole => u64::MAX,
        }
    }
}

/// Looks for the segments of the plan, notes in it how many were there and how long their objects are, and
/// returns those that are missing.
///
/// # Errors
/// [`Error::Corrupt`] when an object has another length than it should.
pub(super) async fn prove(
    repository: &LineageRepository,
    plan: &mut RestorePlan,
    index: &mut Index,
    evidence: &mut Evidence,
    in_parts: &BTreeMap<SegmentName, u64>,
    proof: Proof,
) -> Result<Vec<SegmentName>> {
    let size = repository.lineage().segment_size;
    let mut gone = Vec::new();
    let mut left = proof.segments_max();
    for part in &mut plan.chain {
        if part.open {
            // It was read a moment ago. Whatever becomes of its parts, there is never less of it.
            plan.wal_segments_checked += part.segments;
            continue;
        }
        let from = part.first.number(size);
        let until = from.saturating_add(part.segments.min(left));
        let (timeline, ranges) = (part.first.timeline, ranges(from, until));
        let lists = ranges.into_iter().map(|(from, until)| async move {
            let listed = repository.segments_listed(timeline, from, until).await?;
            Ok::<_, Error>((from, until, listed))
        });
        let mut lists = futures_util::stream::iter(lists).buffered(LISTS_MAX);
        let mut stored_bytes = 0u64;
        while let Some((from, until, listed)) = lists.try_next().await? {
            stored_bytes = listed.iter().fold(stored_bytes, |sum, one| sum.saturating_add(one.stored_bytes));
            let mut absent = Vec::new();
            missing(timeline, size, (from, until), &listed, &mut absent);
            // All parts of a segment are as good as the segment.
            let parts = absent.iter().filter_map(|name| in_parts.get(name));
            stored_bytes = parts.fold(stored_bytes, |sum, bytes| sum.saturating_add(*bytes));
            gone.extend(absent.into_iter().filter(|name| !in_parts.contains_key(name)));
            judge(repository, &listed, index, evidence, &mut gone).await?;
        }
        drop(lists);
        plan.wal_segments_checked += until - from;
        left -= until - from;
        if until - from == part.segments {
            part.stored_bytes = stored_bytes;
        }
    }
    plan.wal_fetch_bytes =
        plan.chain.iter().fold(0, |sum, part: &ChainPart| sum.saturating_add(part.stored_bytes));
    Ok(gone)
}

/// Returns the ranges that are listed one by one: whole logs together.
fn ranges(from: u64, until: u64) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = from;
    while at < until {
        let end = (at / SEGMENTS_PER_LIST + 1).saturating_mul(SEGMENTS_PER_LIST).min(until);
        ranges.push((at, end));
        at = end;
    }
    ranges
}

fn missing(
    timeline: TimelineId,
    size: SegmentSize,
    (from, until): (u64, u64),
    listed: &[ListedSegment],
    gone: &mut Vec<SegmentName>,
) {
    if listed.len() as u64 == until - from {
        return;
    }
    let there: BTreeSet<SegmentName> = listed.iter().map(|one| one.name).collect();
    let wanted = (from..until).filter_map(|number| SegmentName::from_number(timeline, number, size));
    gone.extend(wanted.filter(|name| !there.contains(name)));
}

/// Compares the lengths of consecutive segments' objects with what is known of them.
async fn judge(
    repository: &LineageRepository,
    listed: &[ListedSegment],
    index: &mut Index,
    evidence: &mut Evidence,
    gone: &mut Vec<SegmentName>,
) -> Result<()> {
    let (Some(first), Some(last)) = (listed.first(), listed.last()) else { return Ok(()) };
    for block in index.lengths_that_differ(evidence, first.name, last.name, listed) {
        index.refine(repository, block, evidence).await?;
    }
    for one in listed.iter().filter(|one| !one.has_copy) {
        let expected = index.stored_bytes(one.name, evidence);
        if expected.is_none_or(|expected| expected == one.stored_bytes) {
            continue;
        }
        // The index may be wrong, the object's own head is not.
        let length = match repository.summarized(one.name).await {
            Ok(Some(read)) => read.stored_bytes,
            Ok(None) => {
                gone.push(one.name);
                continue;
            }
            Err(error) => return Err(error),
        };
        if length != one.stored_bytes && !repository.is_whole_elsewhere(one.name).await? {
            return Err(Error::corrupt(format!(
                "segment {} in {} is damaged: its object has {} bytes instead of {length}",
                one.name,
                repository.location(),
                one.stored_bytes
            ))
            .with_next("Plan for a target before this segment, or use another copy of the repository."));
        }
    }
    Ok(())
}
