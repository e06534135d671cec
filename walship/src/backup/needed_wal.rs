//! The WAL that a backup cannot do without, and the wait until it is in the repository.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::pg::{SegmentName, SegmentSize, TimelineId, WalRange};
use crate::repository::LineageRepository;

/// More segments than any backup needs; a manifest that says so is not believed.
const SEGMENTS_MAX: u64 = 10_000_000;

/// How many requests ask for segments at once.
const REQUESTS_MAX: usize = 16;

/// A segment that is needed; where a timeline was left inside it, the descendant's copy will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NeededSegment {
    pub(crate) name: SegmentName,
    pub(crate) or: Option<SegmentName>,
}

/// Returns the segments that hold `ranges`, in WAL order, no segment twice. Pure.
///
/// # Errors
/// [`Error::Corrupt`] for ranges that are absurdly long.
pub(crate) fn needed_segments(ranges: &[WalRange], size: SegmentSize) -> Result<Vec<NeededSegment>> {
    let mut needed = Vec::new();
    for range in ranges {
        let first = SegmentName::containing(range.timeline, range.start, size);
        let last = SegmentName::containing(range.timeline, crate::pg::Lsn(range.end.0 - 1), size);
        if last.number(size) - first.number(size) > SEGMENTS_MAX {
            return Err(Error::corrupt(format!(
                "the backup's manifest says that it needs WAL from {} to {}",
                range.start, range.end
            )));
        }
        let successor = ranges
            .iter()
            .filter(|other| other.timeline > range.timeline && other.start == range.end)
            .map(|other| other.timeline)
            .min()
            .filter(|_| size.offset_of(range.end) != 0);
        let mut name = Some(first);
        while let Some(segment) = name {
            let or = successor.filter(|_| segment == last).map(|timeline| segment.on(timeline));
            needed.push(NeededSegment { name: segment, or });
            name = if segment == last { None } else { segment.next(size) };
        }
    }
    needed.sort_by_key(|segment| (segment.name.number(size), segment.name.timeline));
    needed.dedup();
    Ok(needed)
}

/// What is still missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) segments: usize,
    pub(crate) first: Option<SegmentName>,
    pub(crate) histories: Vec<TimelineId>,
}

/// The last segment is mostly on its way already: the first pauses between two looks are short.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// The longest pause between two looks.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Waits until every needed segment and history file is in every repository.
///
/// # Errors
/// [`Error::Unavailable`] when `patience` is over, saying what is missing; errors of the store that
/// are not transient.
pub(crate) async fn wait_until_stored(
    repositories: &[LineageRepository],
    needed: Vec<NeededSegment>,
    histories: Vec<TimelineId>,
    patience: Duration,
    report: &mut (dyn FnMut(&Missing) + Send),
) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut last = Missing { segments: 0, first: None, histories: Vec::new() };
    for repository in repositories {
        let (mut needed, mut histories) = (needed.clone(), histories.clone());
        let mut pause = PAUSE_MIN;
        loop {
            let mut trouble = None;
            match missing_of(repository, &needed).await {
                Ok(missing) => needed = missing,
                Err(error) if error.is_transient() => trouble = Some(error),
                Err(error) => return Err(error),
            }
            let mut still = Vec::new();
            for timeline in &histories {
                match repository.history(*timeline).await {
                    Ok(Some(_)) => {}
                    Ok(None) => still.push(*timeline),
                    Err(error) if error.is_transient() => {
                        still.push(*timeline);
                        trouble = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            histories = still;
            if needed.is_empty() && histories.is_empty() {
                break;
            }
            let missing = Missing {
                segments: needed.len(),
                first: needed.first().map(|segment| segment.name),
                histories: histories.clone(),
            };
            if missing != last {
                report(&missing);
                last = missing.clone();
            }
            if Instant::now() >= deadline {
                return Err(too_late(repository, &missing, patience, trouble));
            }
            tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
            pause = (pause * 3 / 2).min(PAUSE_MAX);
        }
    }
    Ok(())
}

async fn missing_of(repository: &LineageRepository, needed: &[NeededSegment]) -> Result<Vec<NeededSegment>> {
    let answers: Vec<Result<bool>> = stream::iter(needed.to_vec())
        .map(|segment| async move {
            if repository.segment_summary(segment.name).await?.is_some() {
                return Ok(true);
            }
            match segment.or {
                Some(other) => Ok(repository.segment_summary(other).await?.is_some()),
                None => Ok(false),
            }
        })
        .buffered(REQUESTS_MAX)
        .collect()
        .await;
    let mut missing = Vec::new();
    for (segment, stored) in needed.iter().zip(answers) {
        if !stored? {
            missing.push(*segment);
        }
    }
    Ok(missing)
}

fn too_late(
    repository: &LineageRepository,
    missing: &Missing,
    patience: Duration,
    trouble: Option<Error>,
) -> Error {
    let what = match (missing.first, missing.histories.first()) {
        (Some(first), _) => format!("segment {first} ({} in all)", missing.segments),
        (None, Some(timeline)) => format!("{}.history", timeline.hex()),
        (None, None) => "WAL".to_owned(),
    };
    let text = format!(
        "the backup's WAL is not in {} after {} s: {what} is missing",
        repository.location(),
        patience.as_secs()
    );
    let error = Error::unavailable(match &trouble {
        Some(trouble) => format!("{text}; {trouble}"),
        None => text,
    })
    .with_safe("the backup's files are stored, but it does not count as a backup; older backups are untouched")
    .with_next(
        "Check archive_mode, archive_command and pg_stat_archiver on the server (after a backup from a standby \
         run SELECT pg_switch_wal() on the primary), then take the backup again or wait longer with --wal-timeout.",
    );
    match trouble {
        Some(trouble) => error.with_source(trouble),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Lsn;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn names(ranges: &[(u32, u64, u64)]) -> Vec<String> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(timeline, start, end)| WalRange {
                timeline: tli(*timeline),
                start: Lsn(*start),
                end: Lsn(*end),
            })
            .collect();
        let needed = needed_segments(&ranges, SegmentSize::MIN).unwrap();
        let text = |segment: &NeededSegment| match segment.or {
            Some(or) => format!("{}|{}", segment.name, or),
            None => segment.name.to_string(),
        };
        needed.iter().map(text).collect()
    }

    #[test]
    fn every_segment_of_every_range_is_needed_once() {
        const MIB: u64 = 1 << 20;
        assert_eq!(
            names(&[(1, 2 * MIB + 40, 4 * MIB)]),
            ["000000010000000000000002", "000000010000000000000003"]
        );
        assert_eq!(names(&[(1, 2 * MIB + 40, 2 * MIB + 41)]), ["000000010000000000000002"]);
        // Newest timeline first, as the manifest lists them; left within segment 3.
        assert_eq!(
            names(&[(2, 3 * MIB + 100, 4 * MIB + 1), (1, 2 * MIB + 40, 3 * MIB + 100)]),
            [
                "000000010000000000000002",
                "000000010000000000000003|000000020000000000000003",
                "000000020000000000000003",
                "000000020000000000000004"
            ]
        );
        // Left exactly at a boundary: the parent's last segment is whole and needed itself.
        assert_eq!(
            names(&[(2, 3 * MIB, 3 * MIB + 1), (1, 2 * MIB + 40, 3 * MIB)]),
            ["000000010000000000000002", "000000020000000000000003"]
        );
    }

    #[test]
    fn absurd_ranges_are_not_believed() {
        let range = WalRange { timeline: tli(1), start: Lsn(1), end: Lsn(u64::MAX) };
        assert!(matches!(needed_segments(&[range], SegmentSize::MIN), Err(Error::Corrupt(_))));
    }
}
