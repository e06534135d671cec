//! Where to go on: the first segment of the server's path that the archive does not hold.

use crate::catalog::StoredSegments;
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// How far behind the newest stored segment a hole is looked for where no slot tells. Uploads run side by
/// side, so what was killed in the middle may have left one.
const WINDOW: u64 = 64;

/// What decides where to go on.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The history of the server's timeline: its path.
    pub path: &'a TimelineHistory,
    /// What is stored.
    pub stored: &'a StoredSegments,
    /// The segment size.
    pub size: SegmentSize,
    /// What the slot holds WAL back from: everything before was durable once.
    pub slot: Option<Lsn>,
    /// How far the server's WAL goes.
    pub flushed: Lsn,
}

/// Where to start to stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The timeline.
    pub timeline: TimelineId,
    /// The start of a segment.
    pub lsn: Lsn,
}

/// Returns where to start. In an archive that holds nothing of the server's path that is where the slot
/// starts, else the first segment that is missing; where both the slot and the archive tell, the earlier.
///
/// A segment in which the path forks is begun on the older timeline, so that its last bytes are kept too.
pub fn resume(known: &Known<'_>) -> Start {
    let number = |lsn: Lsn| lsn.0 / known.size.bytes();
    let first = match newest_stored(known) {
        None => number(known.slot.unwrap_or(known.flushed)),
        Some(last) => {
            let from = match known.slot {
                Some(slot) => number(slot).min(last + 1),
                None => (last.saturating_sub(WINDOW)..=last)
                    .find(|number| is_stored(known, *number))
                    .unwrap_or(last + 1),
            };
            first_missing(known, from)
        }
    };
    start_at(known.path, first, known.size)
}

/// Returns the start of the same segment on the next younger timeline of the path that begins inside of it;
/// `None` when the segment is that of `start` alone from there on.
///
/// A server that was restored holds such a segment under the youngest name only; the older timelines' bytes
/// are the beginning of it.
pub fn younger(path: &TimelineHistory, start: Start, size: SegmentSize) -> Option<Start> {
    let switch = path.switch_lsn_of(start.timeline)?;
    let inside = start.lsn <= switch && switch.0 - start.lsn.0 < size.bytes();
    let next = path.ancestors.iter().map(|entry| entry.timeline).chain([path.timeline]);
    let next = next.skip_while(|timeline| *timeline != start.timeline).nth(1)?;
    inside.then_some(Start { timeline: next, lsn: start.lsn })
}

/// Returns the start of the segment with this number on the path, on the oldest timeline that it belongs to.
pub fn start_at(path: &TimelineHistory, number: u64, size: SegmentSize) -> Start {
    let lsn = Lsn(number.saturating_mul(size.bytes()));
    Start { timeline: path.timeline_of(lsn), lsn }
}

/// The timelines of the path with the numbers of the first and the last segment that are theirs, newest first:
/// the segment with a fork is the younger one's.
pub(super) fn owners(path: &TimelineHistory, size: SegmentSize) -> Vec<(TimelineId, u64, u64)> {
    let mut owners = Vec::new();
    let mut last = u64::MAX;
    let begins = path.ancestors.iter().map(|entry| entry.switch_lsn.0 / size.bytes()).rev();
    let timelines = path.ancestors.iter().map(|entry| entry.timeline).rev();
    let timelines = std::iter::once(path.timeline).chain(timelines);
    for (timeline, first) in timelines.zip(begins.chain(std::iter::once(0))) {
        if first <= last {
            owners.push((timeline, first, last));
        }
        match first.checked_sub(1) {
            Some(before) => last = last.min(before),
            None => break,
        }
    }
    owners
}

fn is_stored(known: &Known<'_>, number: u64) -> bool {
    stored_until(known, number).is_some()
}

/// Returns the number of the last segment of the unbroken run that a segment of the path belongs to.
fn stored_until(known: &Known<'_>, number: u64) -> Option<u64> {
    let owners = owners(known.path, known.size);
    let (timeline, _, last) = owners.into_iter().find(|(_, first, _)| *first <= number)?;
    let name = SegmentName::from_number(timeline, number, known.size)?;
    Some(known.stored.run_end(name)?.number(known.size).min(last))
}

/// Returns the number of the first segment of the path from `from` on that is not stored.
pub fn first_missing(known: &Known<'_>, from: u64) -> u64 {
    let mut number = from;
    while let Some(last) = stored_until(known, number) {
        number = last.saturating_add(1);
    }
    number
}

/// Returns the number of the newest stored segment of the path.
fn newest_stored(known: &Known<'_>) -> Option<u64> {
    owners(known.path, known.size).into_iter().find_map(|(timeline, first, last)| {
        let runs = known.stored.runs(timeline);
        runs.iter().rev().find_map(|run| {
            let end = run.last.number(known.size).min(last);
            (end >= first && run.first.number(known.size) <= end).then_some(end)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::MIN;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(segment: u64, offset: u64) -> Lsn {
        Lsn(segment * SIZE.bytes() + offset)
    }

    fn stored(names: &[(u32, u64)]) -> StoredSegments {
        let mut stored = StoredSegments::new(SIZE);
        for (timeline, number) in names {
            stored.insert(SegmentName::from_number(tli(*timeline), *number, SIZE).unwrap(), 1);
        }
        stored
    }

    fn at(path: &TimelineHistory, names: &[(u32, u64)], slot: Option<Lsn>, flushed: Lsn) -> (u32, u64) {
        let stored = stored(names);
        let start = resume(&Known { path, stored: &stored, size: SIZE, slot, flushed });
        assert_eq!(SIZE.offset_of(start.lsn), 0);
        (start.timeline.get(), start.lsn.0 / SIZE.bytes())
    }

    #[test]
    fn on_one_timeline_it_is_the_first_missing_segment() {
        let path = TimelineHistory::root(tli(1));
        let flushed = lsn(90, 5);
        for (names, slot, expected) in [
            (vec![], None, 90),
            (vec![], Some(lsn(80, 7)), 80),
            // The archive goes less far than the slot: what is before the slot is tried all the same.
            (vec![(1, 70)], Some(lsn(80, 7)), 71),
            (vec![(1, 79), (1, 80), (1, 81)], Some(lsn(80, 7)), 82),
            // Uploads side by side, killed: a hole behind the slot's position.
            (vec![(1, 79), (1, 80), (1, 82)], Some(lsn(80, 7)), 81),
            (vec![(1, 80), (1, 82)], None, 81),
            // A hole of old, before the slot or far away, is not ours to fill.
            (vec![(1, 60), (1, 80), (1, 81)], Some(lsn(80, 7)), 82),
            (vec![(1, 3), (1, 80), (1, 81)], None, 82),
        ] {
            assert_eq!(at(&path, &names, slot, flushed), (1, expected), "{names:?} {slot:?}");
        }
    }

    #[test]
    fn a_segment_with_several_forks_has_several_names() {
        let path = TimelineHistory::parse(tli(5), "1\t0/1400100\n3\t0/1450000\n4\t0/2000000\n").unwrap();
        let younger = |timeline, segment| {
            let start = Start { timeline: tli(timeline), lsn: lsn(segment, 0) };
            younger(&path, start, SIZE).map(|next| {
                assert_eq!(next.lsn, start.lsn);
                next.timeline.get()
            })
        };
        assert_eq!(younger(1, 20), Some(3));
        assert_eq!(younger(3, 20), Some(4));
        assert_eq!((younger(4, 20), younger(1, 19), younger(2, 20)), (None, None, None));
        assert_eq!((younger(4, 31), younger(4, 32), younger(5, 32)), (None, Some(5), None));
    }

    #[test]
    fn a_fork_is_begun_on_the_older_timeline() {
        let path = TimelineHistory::parse(tli(5), "1\t0/1400100\n3\t0/2000000\n").unwrap();
        // Timeline 3 begins inside segment 20, timeline 5 at the very start of segment 32.
        let flushed = lsn(40, 5);
        for (names, slot, expected) in [
            (vec![(1, 18), (1, 19)], Some(lsn(19, 3)), (1, 20)),
            (vec![(1, 19), (3, 20)], Some(lsn(20, 9)), (3, 21)),
            // The parent's own segment 20 and what it went on to write are not on the path.
            (vec![(1, 19), (1, 20), (1, 21)], Some(lsn(19, 3)), (1, 20)),
            (vec![(3, 30), (3, 31)], Some(lsn(30, 0)), (5, 32)),
            (vec![(3, 31), (3, 32), (5, 32)], None, (5, 33)),
            (vec![(1, 19), (3, 20), (3, 22)], None, (3, 21)),
            (vec![(2, 19), (9, 50)], Some(lsn(33, 1)), (5, 33)),
        ] {
            assert_eq!(at(&path, &names, slot, flushed), expected, "{names:?} {slot:?}");
        }
    }
}
