//! Writes roll-ups: one place after the other, from what is stored.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _};

use super::{Known, StoredRollup};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineHistory, TimelineId};
use crate::repository::LineageRepository;
use crate::repository::load_segments::{Using, load_segments};
use crate::storage::PutOutcome;
use crate::wal::rollup::build::{Part, build};
use crate::wal::rollup::{FANOUT, LEVEL_MAX, Place, Rollup, span};

/// How many summaries are read at once.
const READS_MAX: usize = 16;

/// After so many segments the roll-up of their log is written again.
pub const WRITE_EVERY: u64 = 16;

/// How many pushes after such a boundary try to write: one that is slower than its push is dropped.
const ATTEMPTS: u64 = 2;

/// For so many segments behind a fork, each boundary looks at the end of the timeline that was left.
const NEAR_FORK: u64 = 2 * WRITE_EVERY;

/// How many segments around a fork are listed to find where the timeline that was left ends.
const LISTED_AT_FORK: u64 = 3 * FANOUT;

/// Extends the index by what was archived before `arriving`, where that is due.
///
/// Meant to run beside the push of `arriving`: the segments before it are durable, and the caller drops
/// the future when the push is done. Whatever was not written is written by a later call.
///
/// # Errors
/// What the store says. It is a cache: nobody need hear of it.
pub async fn extend(repository: &LineageRepository, arriving: SegmentName) -> Result<()> {
    let size = repository.lineage.segment_size;
    let number = arriving.number(size);
    let Some(last) = arriving.previous(size).filter(|_| number % WRITE_EVERY < ATTEMPTS) else {
        return Ok(());
    };
    let until = number / WRITE_EVERY * WRITE_EVERY;
    extend_to(repository, last, number, until).await?;
    // Segments are pushed side by side: when the next log begins, some of this one may be on their way. So it
    // is looked at once more.
    let before =
        (number % FANOUT / WRITE_EVERY == 1).then(|| number / FANOUT * FANOUT).filter(|end| *end > 0);
    let last = before.and_then(|end| SegmentName::from_number(arriving.timeline, end - 1, size));
    match (before, last) {
        (Some(end), Some(last)) => extend_to(repository, last, end, end).await,
        _ => Ok(()),
    }
}

/// Extends the index by the end of the timeline that `arriving`'s left, where that is due: for the first segment
/// of a timeline (as its pages tell), and at the next boundaries, since that push may have been done first.
///
/// # Errors
/// As [`extend`].
pub async fn extend_parent(
    repository: &LineageRepository,
    arriving: SegmentName,
    is_first: bool,
) -> Result<()> {
    let size = repository.lineage.segment_size;
    let number = arriving.number(size);
    if arriving.timeline == TimelineId::FIRST || !(is_first || number % WRITE_EVERY < ATTEMPTS) {
        return Ok(());
    }
    let Some(history) = repository.history(arriving.timeline).await? else { return Ok(()) };
    match history.begin_lsn() {
        Some(fork) if number.saturating_sub(fork.0 / size.bytes()) <= NEAR_FORK => {
            extend_left(repository, &history).await
        }
        _ => Ok(()),
    }
}

/// Extends the index by what is stored of the end of the timeline that this one left: as no segment arrives behind
/// it any more, no other push would. What arrives late after all is not covered, and read as before.
///
/// # Errors
/// As [`extend`].
pub async fn extend_left(repository: &LineageRepository, history: &TimelineHistory) -> Result<()> {
    let size = repository.lineage.segment_size;
    let Some(left) = history.ancestors.last() else { return Ok(()) };
    // At a boundary the last segment is the one before.
    let from = (left.switch_lsn.0 / size.bytes()).saturating_sub(1) / FANOUT * FANOUT;
    let until = from + LISTED_AT_FORK;
    let near = repository.segments_between(left.timeline, from, until).await?;
    let last = match near.last() {
        // After a failover it ends at the fork.
        Some((last, _)) if last.number(size) + 1 < until => Some(*last),
        // It went on after a recovery to some moment before its end, or nothing of it is stored here.
        _ => {
            let found = load_segments(repository, left.timeline, Using::Index).await?;
            found.segments.last_of_timeline(left.timeline)
        }
    };
    let Some(last) = last else { return Ok(()) };
    let end = last.number(size) + 1;
    let log = (end - 1) / FANOUT * FANOUT;
    // Of the log before, some may have been on their way when this one began.
    if end - log <= WRITE_EVERY
        && let Some(before) = log.checked_sub(1)
        && let Some(before) = SegmentName::from_number(left.timeline, before, size)
    {
        extend_to(repository, before, log, log).await?;
    }
    extend_to(repository, last, end, end).await
}

/// Extends the roll-ups that tell of `last`, the segment before `number`, by what is stored below `until`.
async fn extend_to(repository: &LineageRepository, last: SegmentName, number: u64, until: u64) -> Result<()> {
    let size = repository.lineage.segment_size;
    extend_place(repository, Place::of(last, size, 1), until).await?;
    for level in 2..=LEVEL_MAX {
        // Only when the roll-up below has just become full.
        if number % span(level - 1) >= WRITE_EVERY {
            break;
        }
        extend_place(repository, Place::of(last, size, level), until).await?;
    }
    Ok(())
}

/// Writes the roll-up of one place again when more segments below `until` are stored than its fullest
/// roll-up covers.
async fn extend_place(repository: &LineageRepository, place: Place, until: u64) -> Result<()> {
    let until = until.min(place.end());
    let listed = repository.rollups(place.timeline, place.level, place.first, place.end()).await?;
    let former = fullest_readable(repository, &listed).await?;
    let covered: BTreeMap<u64, u64> = former
        .iter()
        .flat_map(|known| &known.rollup.entries)
        .filter_map(|entry| Some((group(repository, place, entry.runs.first()?.first), entry.segments())))
        .collect();
    let mut parts = former.map_or_else(Vec::new, |known| Part::of_former(known.rollup));
    let before = parts.len();
    if place.level == 1 {
        let stored = repository.segments_between(place.timeline, place.first, until).await?;
        let new = stored.into_iter().map(|(name, _)| name);
        let new = new.filter(|name| !covered.contains_key(&group(repository, place, *name)));
        // One whose summary is damaged is left out, as in what `pitr index` writes.
        parts.extend(readable_parts(repository, new.collect(), |_, _| ()).await?);
    } else {
        // What is behind the last one: earlier ones that grew are for `pitr index`.
        let from =
            covered.last_key_value().map_or(place.first, |(last, _)| (last + 1) * span(place.level - 1));
        let below = repository.rollups(place.timeline, place.level - 1, from, place.end()).await?;
        for stored in fullest(below) {
            // One that is still growing would be stale soon.
            if stored.segments() == span(place.level - 1) {
                parts.extend(rollup_part(repository, &stored).await?);
            }
        }
    }
    if parts.len() > before
        && let Some(rollup) = build_here(repository, place, parts)
    {
        repository.put_rollup(&rollup).await?;
    }
    Ok(())
}

/// What was done about one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// The right one is stored already.
    Present(Known),
    /// It was stored now, or would be.
    New(Known),
    /// It is too large to be of use.
    TooLarge,
}

/// Makes the roll-up of one place from these parts and stores it, unless `dry_run`.
pub(super) async fn write_parts(
    repository: &LineageRepository,
    place: Place,
    parts: Vec<Part>,
    stored: &[StoredRollup],
    dry_run: bool,
) -> Result<Written> {
    let Some(rollup) = build_here(repository, place, parts) else { return Ok(Written::TooLarge) };
    let Ok((digest, _)) = super::encode(&rollup) else { return Ok(Written::TooLarge) };
    let own = stored.iter().find(|other| other.has_digest(&digest));
    let mut sound = false;
    if let Some(own) = own {
        match repository.read_rollup(own).await {
            Ok(known) => sound = known.is_some(),
            // Its key is needed for a good one.
            Err(Error::Corrupt(_)) if !dry_run => repository.remove_rollup(own).await?,
            Err(Error::Corrupt(_)) => {}
            Err(error) => return Err(error),
        }
    }
    if sound {
        return Ok(Written::Present(Known { rollup, digest }));
    }
    if !dry_run && repository.put_rollup(&rollup).await?.1 == PutOutcome::Exists {
        // Another writer was faster.
        return Ok(Written::Present(Known { rollup, digest }));
    }
    Ok(Written::New(Known { rollup, digest }))
}

/// Returns the parts for these segments, their summaries read; those that vanished are left out.
async fn segment_parts(repository: &LineageRepository, names: Vec<SegmentName>) -> Result<Vec<Part>> {
    let reads = names.into_iter().map(|name| async move {
        let found = repository.summarized_fresh(name).await?;
        Ok::<_, Error>(found.map(|found| Part::of_segment(&found.summary, found.digest, found.stored_bytes)))
    });
    let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
    Ok(read.into_iter().flatten().collect())
}

/// Returns the parts of those segments whose summaries can be read, and shows what is wrong with the others.
pub(super) async fn readable_parts(
    repository: &LineageRepository,
    names: Vec<SegmentName>,
    mut unreadable: impl FnMut(SegmentName, &Error),
) -> Result<Vec<Part>> {
    match segment_parts(repository, names.clone()).await {
        Err(Error::Corrupt(_)) => {}
        read => return read,
    }
    let mut parts = Vec::new();
    for name in names {
        match segment_parts(repository, vec![name]).await {
            Ok(part) => parts.extend(part),
            Err(error @ Error::Corrupt(_)) => unreadable(name, &error),
            Err(error) => return Err(error),
        }
    }
    Ok(parts)
}

async fn rollup_part(repository: &LineageRepository, stored: &StoredRollup) -> Result<Option<Part>> {
    let known = repository.read_sound_rollup(stored).await?;
    Ok(known.map(|known| Part::of_rollup(known.rollup, known.digest)))
}

/// Returns the fullest of these roll-ups of one place that can be read.
///
/// # Errors
/// What the store says; not that one cannot be read.
pub async fn fullest_readable(
    repository: &LineageRepository,
    listed: &[StoredRollup],
) -> Result<Option<Known>> {
    for stored in listed.iter().rev() {
        if let Some(known) = repository.read_sound_rollup(stored).await? {
            return Ok(Some(known));
        }
    }
    Ok(None)
}

/// Returns the last of the roll-ups of each place: that which covers most.
pub(super) fn fullest(listed: Vec<StoredRollup>) -> Vec<StoredRollup> {
    let places: BTreeMap<u64, StoredRollup> =
        listed.into_iter().map(|stored| (stored.place().first, stored)).collect();
    places.into_values().collect()
}

fn build_here(repository: &LineageRepository, place: Place, parts: Vec<Part>) -> Option<Rollup> {
    build(place, repository.lineage.segment_size, repository.lineage.system_identifier, parts)
}

/// Returns the number of the entry of `place` that a segment belongs to, counted from the start of the WAL.
fn group(repository: &LineageRepository, place: Place, name: SegmentName) -> u64 {
    name.number(repository.lineage.segment_size) / span(place.level - 1)
}

const _: () = assert!(FANOUT.is_multiple_of(WRITE_EVERY));
