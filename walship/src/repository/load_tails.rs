//! The end of the archive where it is stored in parts: what they hold, put together and decoded.
//!
//! Parts come and go while a receiver runs: they are listed and read first, and then it is looked whether whole
//! segments have taken their place meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::{Catalog, StoredTail};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use crate::wal::SegmentSummary;
use crate::wal::scan::{SegmentScanner, Verdict};

use super::LineageRepository;
use super::index::ListedSegment;
use super::tails::{Assembled, Damage, ListedPart};

/// How often is looked again when whole segments take the place of parts.
const ROUNDS_MAX: usize = 4;

/// How many segments that are stored in parts only are read for each timeline. A receiver has a few under way.
const SEGMENTS_MAX: usize = 64;

/// How many segments behind the last known one are looked for.
const NEWER_SEGMENTS_MAX: u64 = 256;

/// What is stored of one timeline behind its last whole segment, and in its holes.
#[derive(Default)]
struct Found {
    /// Whole segments that were not in the catalog.
    newer: Vec<ListedSegment>,
    /// Segments of which every byte is stored in parts.
    in_parts: Vec<(u64, SegmentSummary)>,
    tail: Option<(StoredTail, SegmentSummary)>,
    /// What is stored of segments up to where the ledger says that WAL of them is lost.
    stranded: Vec<(StoredTail, SegmentSummary)>,
}

/// Adds to the catalog what is stored in parts only, and the whole segments that have come since it was loaded, and
/// returns the summaries of what parts hold.
///
/// One or two listings for each timeline, one for each of the last 64 gaps, and the parts of few segments, which are read in parallel; one segment
/// at a time is in memory. Of several repositories the one counts whose parts reach furthest.
///
/// # Errors
/// [`Error::Conflict`] when parts disagree; what a repository answers when none can be read. Damage ends a tail and
/// is noted in it.
pub async fn load_tails(
    repository: &LineageRepository,
    catalog: &mut Catalog,
) -> Result<Vec<SegmentSummary>> {
    let mut timelines: BTreeSet<TimelineId> = catalog.timelines().into_iter().collect();
    timelines.insert(TimelineId::FIRST);
    let each = repository.each();
    let (mut found, mut failure) = (Vec::new(), None);
    for one in &each {
        match load_one(one, catalog, &timelines).await {
            Ok(tails) => found.push(tails),
            Err(error @ Error::Conflict(_)) => return Err(error),
            Err(error) => {
                one.failed(&error);
                if each.len() > 1 {
                    let location = one.location();
                    repository.note(format!("the open segment in {location} is left out: {error}"));
                }
                failure = failure.or(Some(error));
            }
        }
    }
    match failure {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(unite(catalog, found)),
    }
}

/// Adds what was found in each repository.
fn unite(catalog: &mut Catalog, found: Vec<BTreeMap<TimelineId, Found>>) -> Vec<SegmentSummary> {
    let (mut tails, mut summaries) = (BTreeMap::new(), Vec::new());
    let (mut in_parts, mut stranded) = (Vec::new(), Vec::new());
    for (timeline, found) in found.into_iter().flatten() {
        for newer in found.newer {
            if !catalog.segments.contains(newer.name) {
                catalog.segments.insert(newer.name, newer.stored_bytes);
            }
        }
        in_parts.extend(found.in_parts);
        stranded.extend(found.stranded);
        let Some(tail) = found.tail else { continue };
        let reach = |(tail, _): &(StoredTail, SegmentSummary)| (tail.segment, tail.until_lsn, tail.end_lsn);
        if tails.get(&timeline).is_none_or(|known| reach(known) < reach(&tail)) {
            tails.insert(timeline, tail);
        }
    }
    let size = catalog.lineage.segment_size;
    for (stored_bytes, summary) in in_parts {
        let name = summary.segment;
        // What the ledger misses there is for an operator to judge.
        let missed = catalog.gaps.iter().any(|gap| gap.touches(name, size));
        if !missed && !catalog.segments.contains(name) {
            catalog.segments.insert(name, stored_bytes);
            catalog.in_parts.insert(name, stored_bytes);
            summaries.push(summary);
        }
    }
    let mut reached = BTreeMap::<_, (StoredTail, SegmentSummary)>::new();
    for found in stranded {
        let name = found.0.segment;
        let further = reached
            .get(&name)
            .is_none_or(|known| (known.0.until_lsn, known.0.end_lsn) < (found.0.until_lsn, found.0.end_lsn));
        if further && !catalog.segments.contains(name) {
            reached.insert(name, found);
        }
    }
    for (name, (tail, summary)) in reached {
        summaries.push(summary);
        catalog.stranded.insert(name, tail);
    }
    let last = |timeline| catalog.segments.last_of_timeline(timeline);
    tails.retain(|timeline, (tail, _)| {
        last(*timeline).is_none_or(|last| last < tail.segment)
            && !catalog.stranded.contains_key(&tail.segment)
    });
    let mut kept = BTreeMap::new();
    for (timeline, (tail, summary)) in tails {
        summaries.push(summary);
        kept.insert(timeline, tail);
    }
    catalog.tails = Some(kept);
    summaries
}

async fn load_one(
    repository: &LineageRepository,
    catalog: &Catalog,
    timelines: &BTreeSet<TimelineId>,
) -> Result<BTreeMap<TimelineId, Found>> {
    let size = catalog.lineage.segment_size;
    let mut all = BTreeMap::new();
    for &timeline in timelines {
        let last = catalog.segments.last_of_timeline(timeline);
        let mut found = behind(repository, timeline, last).await?;
        for hole in holes(catalog, timeline) {
            let parts = repository.tail_of(hole).await?;
            if !parts.is_empty() {
                let read = read(repository, hole, parts, None).await?;
                found.in_parts.extend(read.whole());
            }
        }
        for (segment, lost_from) in lost_inside(catalog, timeline) {
            let parts = repository.tail_of(segment).await?;
            let stored = read(repository, segment, parts, Some(lost_from)).await?;
            let stored = stored.tail(size, Some(lost_from));
            found.stranded.extend(Some(stored).filter(|(tail, _)| tail.until_lsn > segment.start(size)));
        }
        all.insert(timeline, found);
    }
    Ok(all)
}

/// Returns the segments that are missing between stored ones of a timeline, the last ones of them.
fn holes(catalog: &Catalog, timeline: TimelineId) -> Vec<SegmentName> {
    let size = catalog.lineage.segment_size;
    let runs = catalog.segments.runs(timeline);
    let missing = runs.windows(2).rev().flat_map(|pair| {
        let names = std::iter::successors(pair[1].first.previous(size), |name| name.previous(size));
        let last = pair[0].last;
        names.take_while(move |name| *name > last)
    });
    missing.take(SEGMENTS_MAX).collect()
}

/// Returns the segments of a timeline that are not stored and inside of which the ledger says that WAL is lost, with
/// from where; the last ones of them.
fn lost_inside(catalog: &Catalog, timeline: TimelineId) -> Vec<(SegmentName, Lsn)> {
    let size = catalog.lineage.segment_size;
    let gaps = catalog.gaps.iter().filter(|gap| gap.timeline == timeline);
    let segments = gaps.map(|gap| SegmentName::containing(timeline, gap.start_lsn, size));
    let segments: BTreeSet<_> = segments.filter(|name| !catalog.segments.contains(*name)).collect();
    let lost = segments.into_iter().rev().filter_map(|name| Some((name, catalog.lost_from(name)?)));
    lost.take(SEGMENTS_MAX).collect()
}

/// Returns what is stored of a timeline behind the segment `last`.
async fn behind(
    repository: &LineageRepository,
    timeline: TimelineId,
    mut last: Option<SegmentName>,
) -> Result<Found> {
    let size = repository.lineage.segment_size;
    let mut found = Found::default();
    let mut rounds = 0;
    loop {
        rounds += 1;
        let listed = repository.tails_behind(timeline, last).await?;
        let first = last.and_then(|last| last.next(size)).or_else(|| listed.keys().next().copied());
        let parts = read_all(repository, listed).await;
        let Some(first) = first else { return parts };
        let number = first.number(size);
        let newer =
            repository.segments_listed(timeline, number, number.saturating_add(NEWER_SEGMENTS_MAX)).await?;
        if newer.is_empty() || rounds == ROUNDS_MAX {
            return parts.map(|parts| Found { newer: found.newer, ..parts });
        }
        last = newer.iter().map(|listed| listed.name).max().max(last);
        found.newer.extend(newer);
    }
}

/// Reads the parts of segments: the last one may be open, those before count when they are whole.
async fn read_all(
    repository: &LineageRepository,
    mut listed: BTreeMap<SegmentName, Vec<ListedPart>>,
) -> Result<Found> {
    let mut found = Found::default();
    let Some((open, parts)) = listed.pop_last() else { return Ok(found) };
    for (segment, parts) in listed.into_iter().rev().take(SEGMENTS_MAX) {
        found.in_parts.extend(read(repository, segment, parts, None).await?.whole());
    }
    let read = read(repository, open, parts, None).await?;
    match read.whole() {
        Some(whole) => found.in_parts.push(whole),
        None => found.tail = Some(read.tail(repository.lineage.segment_size, None)),
    }
    Ok(found)
}

/// A segment as its parts hold it.
struct Read {
    assembled: Assembled,
    summary: SegmentSummary,
    verdict: Verdict,
    is_whole: bool,
}

impl Read {
    /// Returns the stored size and what the segment holds when the parts are all of it.
    fn whole(&self) -> Option<(u64, SegmentSummary)> {
        let sound = matches!(self.verdict, Verdict::Whole | Verdict::Undecoded { .. });
        (self.is_whole && sound).then(|| (self.assembled.stored_bytes, self.summary.clone()))
    }

    fn tail(self, size: SegmentSize, lost_from: Option<Lsn>) -> (StoredTail, SegmentSummary) {
        let segment = self.summary.segment;
        let start = segment.start(size);
        let until_lsn = match self.verdict {
            Verdict::Mismatch { .. } => start,
            // Behind a switch a server goes on with the next segment.
            Verdict::Whole => segment.end(size),
            _ => self.summary.end_of_wal,
        };
        let Assembled { end, parts, stored_bytes, flaw } = self.assembled;
        let end_lsn = Lsn(start.0.saturating_add(end));
        (StoredTail { segment, until_lsn, end_lsn, parts, stored_bytes, flaw, lost_from }, self.summary)
    }
}

/// Reads what is stored of a segment, at most up to where WAL of it is lost.
async fn read(
    repository: &LineageRepository,
    segment: SegmentName,
    parts: Vec<ListedPart>,
    lost_from: Option<Lsn>,
) -> Result<Read> {
    let size = repository.lineage.segment_size;
    let mut bytes = Vec::new();
    let mut assembled = repository.assemble(segment, parts, &mut bytes, Damage::EndsIt).await?;
    if let Some(lost) = lost_from.map(|lsn| size.offset_of(lsn)).filter(|lost| *lost <= assembled.end) {
        bytes.truncate(usize::try_from(lost).unwrap_or(usize::MAX));
        assembled.end = lost;
        assembled.flaw = None;
    }
    let mut scanner = SegmentScanner::new(segment, size);
    scanner.push(&bytes);
    let is_whole = assembled.end == size.bytes();
    let scan = if is_whole { scanner.finish() } else { scanner.finish_open() };
    let ours = repository.lineage.system_identifier;
    let foreign = ![0, ours].contains(&scan.summary.system_identifier);
    let verdict = match scan.verdict {
        _ if foreign => Verdict::Mismatch { what: "it belongs to another cluster".to_owned() },
        verdict => verdict,
    };
    Ok(Read { assembled, summary: scan.summary, verdict, is_whole })
}

impl LineageRepository {
    /// Returns the first bytes of a segment that is stored in parts, up to the offset `end`; of the whole segment
    /// where that has taken their place. `None` when less is stored than that.
    ///
    /// At most one segment is in memory.
    ///
    /// # Errors
    /// [`Error::Conflict`] when parts disagree; what a repository answers when none has so much.
    pub async fn tail_bytes(&self, segment: SegmentName, end: u64) -> Result<Option<Vec<u8>>> {
        let read = |one: Self| async move {
            let parts = one.tail_of(segment).await?;
            let mut bytes = Vec::new();
            let assembled = one.assemble(segment, parts, &mut bytes, Damage::EndsIt).await;
            match assembled {
                Ok(assembled) if assembled.end >= end => {}
                Ok(_) | Err(Error::Unavailable(_)) => match one.segment_bytes(segment).await? {
                    Some(whole) => bytes = whole,
                    None => return assembled.map(|_| None),
                },
                Err(error) => return Err(error),
            }
            bytes.truncate(usize::try_from(end).unwrap_or(usize::MAX));
            Ok(Some(bytes))
        };
        self.ask_each(format!("what is stored of segment {segment}"), read).await
    }
}
