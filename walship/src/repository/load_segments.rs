//! Which segments of a timeline are stored: from the index as far as it goes, from listings beyond.
//!
//! The index is asked from the top: at each level for what the levels above do not cover. It is believed when it
//! says that segments are there. Where they are missing, inside its roll-ups too, the store is asked.

use crate::catalog::StoredSegments;
use crate::error::Result;
use crate::pg::{SegmentName, TimelineId};
use crate::wal::rollup::{LEVEL_MAX, Place, Rollup, Run, span};

use super::LineageRepository;
use super::index::StoredRollup;
use super::index::write::fullest_readable;
use super::listing::Listed;

/// What was found of one timeline.
pub(super) struct Found {
    pub(super) segments: StoredSegments,
    pub(super) rollups: Vec<Rollup>,
    pub(super) partials: Vec<SegmentName>,
    pub(super) incomplete: Vec<SegmentName>,
    /// Segments of which a backup history file was listed.
    pub(super) backup_histories: Vec<SegmentName>,
    /// The last segment of which the index told, when it is gone.
    pub(super) lost_end: Option<SegmentName>,
}

/// Whether the index is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Using {
    /// As far as it goes.
    Index,
    /// Only listings.
    Listings,
}

/// Segments whose numbers are at least `from` and below `until`, of which nothing is known yet. Roll-ups up to
/// `level` may tell of them.
struct Unknown {
    from: u64,
    until: u64,
    level: u8,
}

/// Returns what is stored of a timeline.
pub(super) async fn load_segments(
    repository: &LineageRepository,
    timeline: TimelineId,
    using: Using,
) -> Result<Found> {
    let found = load_once(repository, timeline, using).await?;
    let Some(lost_end) = found.lost_end else { return Ok(found) };
    // An index that tells of an end that is not there is no help with this timeline.
    let listed = load_once(repository, timeline, Using::Listings).await?;
    Ok(Found { lost_end: Some(lost_end), ..listed })
}

async fn load_once(repository: &LineageRepository, timeline: TimelineId, using: Using) -> Result<Found> {
    let mut found = Found {
        segments: StoredSegments::new(repository.lineage.segment_size),
        rollups: Vec::new(),
        partials: Vec::new(),
        incomplete: Vec::new(),
        backup_histories: Vec::new(),
        lost_end: None,
    };
    let level = if using == Using::Index { LEVEL_MAX } else { 0 };
    let mut unknown = vec![Unknown { from: 0, until: u64::MAX, level }];
    while let Some(next) = unknown.pop() {
        if next.level == 0 {
            list(repository, timeline, &next, &mut found).await?;
        } else {
            read(repository, timeline, next, &mut found, &mut unknown).await?;
        }
    }
    Ok(found)
}

async fn list(
    repository: &LineageRepository,
    timeline: TimelineId,
    unknown: &Unknown,
    found: &mut Found,
) -> Result<()> {
    // The last segment that the index tells of is looked for together with what comes behind it: an older or
    // a pruned copy of a repository must not look complete.
    let told = found.segments.last_of_timeline(timeline).filter(|_| unknown.until == u64::MAX);
    let told = told.filter(|last| last.number(repository.lineage.segment_size) + 1 == unknown.from);
    let mut is_there = told.is_none();
    let from = unknown.from - u64::from(told.is_some());
    let show = |listed| match listed {
        Listed::Segment(name, _) if Some(name) == told => is_there = true,
        Listed::Segment(name, bytes) => found.segments.insert(name, bytes),
        Listed::Partial(name) => found.partials.push(name),
        Listed::Incomplete(name) => found.incomplete.push(name),
        Listed::BackupHistory(name) => found.backup_histories.push(name),
        Listed::Copy(_) => {}
    };
    repository.wal_between(timeline, from, unknown.until, show).await?;
    if !is_there {
        found.lost_end = told;
    }
    Ok(())
}

/// Reads the roll-ups of one level that tell of unknown segments, and notes what stays unknown.
async fn read(
    repository: &LineageRepository,
    timeline: TimelineId,
    unknown: Unknown,
    found: &mut Found,
    rest: &mut Vec<Unknown>,
) -> Result<()> {
    let size = repository.lineage.segment_size;
    let Unknown { from, until, level } = unknown;
    // The first place may begin before, where something is known already.
    let aligned = from / span(level) * span(level);
    let listed = repository.rollups(timeline, level, aligned, until).await?;
    let mut cursor = from;
    for versions in listed.chunk_by(|a, b| a.place() == b.place()) {
        let Some(place) = versions.first().map(StoredRollup::place) else { continue };
        if !tells_more(versions, place, found) {
            continue;
        }
        let Some(known) = fullest_readable(repository, versions).await? else { continue };
        let runs = known.rollup.runs();
        let number = |run: &Run| run.first.number(size);
        let Some(first) = runs.first().map(number) else { continue };
        if first > cursor {
            rest.push(Unknown { from: cursor, until: first, level: level - 1 });
        }
        for pair in runs.windows(2) {
            let gap = number(&pair[0]) + pair[0].segments;
            let (from, until) = (gap.max(from), number(&pair[1]));
            rest.push(Unknown { from, until, level: level_inside(from, until, level) });
        }
        let end = runs.last().map_or(first, |run| number(run) + run.segments);
        cursor = cursor.max(end);
        for entry in &known.rollup.entries {
            found.segments.insert_runs(&entry.runs, entry.facts.stored_bytes);
        }
        found.rollups.push(known.rollup);
    }
    if cursor < until {
        rest.push(Unknown { from: cursor, until, level: level - 1 });
    }
    Ok(())
}

/// Returns the level below `level` whose roll-ups may tell of a hole: a log that was not full when the roll-up above
/// was written is left out of it as a whole.
fn level_inside(from: u64, until: u64, level: u8) -> u8 {
    let fits = |level: &u8| {
        let whole = from.checked_next_multiple_of(span(*level)).and_then(|at| at.checked_add(span(*level)));
        whole.is_some_and(|end| end <= until)
    };
    (1..level).rev().find(fits).unwrap_or(0)
}

/// Returns whether the fullest roll-up of a place covers more than is known of it.
fn tells_more(versions: &[StoredRollup], place: Place, found: &Found) -> bool {
    let known = found.segments.count(place.timeline, place.first, place.end());
    versions.last().is_some_and(|fullest| fullest.segments() > known)
}
