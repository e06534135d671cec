//! Roll-ups of WAL made to order: every record once, whatever the order; hostile documents refused.

use proptest::prelude::*;

use super::build::{Part, build};
use super::*;
use crate::wal::event::EventKind;
use crate::wal::scan::SegmentScanner;
use crate::wal::summary::SegmentSummary;
use crate::wal::testing::WalBuilder;

const MIB: SegmentSize = SegmentSize::MIN;
const SYSTEM: u64 = 42;

/// WAL whose segment boundaries are crossed by commits, restore points, long and short fillers or nothing.
fn wal(crossings: &[u8], first: u64) -> WalBuilder {
    let mut wal = WalBuilder::new(17, MIB, SYSTEM).starting_at(first);
    for (at, crossing) in crossings.iter().enumerate() {
        let xid = 1000 + at as u32;
        // The clock steps back now and then.
        let micros = if at % 3 == 2 { 1_000 } else { 1_000_000 * (at as i64 + 1) };
        wal.commit(xid * 2, micros);
        wal.fill_segment(if crossing % 5 == 0 { 0 } else { 24 });
        match crossing % 5 {
            1 => wal.commit(xid * 2 + 1, micros + 7),
            2 => wal.restore_point("crossing", micros),
            3 => wal.filler(300),
            4 => wal.filler(30_000),
            _ => continue,
        };
    }
    wal.commit(1, 5);
    wal.fill_segment(0);
    wal
}

fn summaries(wal: &WalBuilder) -> Vec<SegmentSummary> {
    let scan = |(name, bytes): (SegmentName, Vec<u8>)| {
        let mut scanner = SegmentScanner::new(name, MIB);
        scanner.push(&bytes);
        scanner.finish().summary
    };
    wal.segments().into_iter().map(scan).collect()
}

fn digest(name: SegmentName) -> String {
    format!("{:064x}", name.number(MIB))
}

fn part(summary: &SegmentSummary) -> Part {
    Part::of_segment(summary, digest(summary.segment), 100)
}

fn place(level: u8, first: u64) -> Place {
    Place { timeline: TimelineId::FIRST, level, first }
}

fn roll(place: Place, parts: Vec<Part>) -> Rollup {
    let rollup = build(place, MIB, SYSTEM, parts).unwrap();
    assert_eq!(rollup.check(), Ok(()));
    rollup
}

#[test]
fn a_record_across_two_logs_is_counted_by_the_level_above() {
    // Segments 254 to 258: commits cross every boundary, that between two logs included.
    let summaries = summaries(&wal(&[1, 1, 1, 1], 254));
    let (left, right) = summaries.split_at(2);
    let left = roll(place(1, 0), left.iter().map(part).collect());
    let right = roll(place(1, 256), right.iter().map(part).collect());
    let upper = |parts| roll(place(2, 0), parts);
    let parts =
        [Part::of_rollup(left.clone(), "a".repeat(64)), Part::of_rollup(right.clone(), "b".repeat(64))];
    let both = upper(parts.to_vec());
    assert_eq!(left.facts().counts.commits + right.facts().counts.commits + 1, both.facts().counts.commits);
    assert_eq!(both.facts().counts.commits, 9);
    assert_eq!(both.runs(), [Run { first: summaries[0].segment, segments: summaries.len() as u64 }]);
    assert!(left.open_end(summaries[1].segment) && !both.open_end(summaries[1].segment));
    // One after the other gives the same.
    let mut grown = Part::of_former(upper(parts[..1].to_vec()));
    grown.push(parts[1].clone());
    assert_eq!(upper(grown), both);
}

#[test]
fn events_that_do_not_fit_are_announced() {
    let mut wal = WalBuilder::new(17, MIB, SYSTEM).starting_at(256);
    for segment in 0..24 {
        for point in 0..20 {
            wal.restore_point(&format!("{segment}-{point}-{}", "x".repeat(40)), 1);
        }
        wal.fill_segment(0);
        wal.commit(9, 9);
    }
    wal.fill_segment(0);
    let summaries = summaries(&wal);
    let rollup = roll(place(1, 256), summaries.iter().map(part).collect());
    let full = |entry: &Entry| !entry.facts.more.has(Class::Planning);
    let kept = rollup.entries.iter().take_while(|entry| full(entry)).count();
    assert!(kept > 5 && kept < 24, "{kept}");
    assert!(rollup.entries[kept..24].iter().all(|entry| !full(entry)), "none behind the first without room");
    assert_eq!(rollup.events.len(), kept * 20);
    // In another order the same.
    let mut parts: Vec<Part> = summaries.iter().map(part).collect();
    parts.reverse();
    let half = roll(place(1, 256), parts[..12].to_vec());
    let mut grown = Part::of_former(half);
    grown.extend_from_slice(&parts[12..]);
    assert_eq!(roll(place(1, 256), grown), rollup);
    assert!(serde_json::to_vec(&rollup).unwrap().len() < 200_000);
}

#[test]
fn what_a_reader_relies_on_is_checked() {
    let good = roll(place(1, 256), summaries(&wal(&[0, 1], 256)).iter().map(part).collect());
    let broken: [fn(&mut Rollup); 9] = [
        |r| r.level = 0,
        |r| r.level = 9,
        |r| r.start = Lsn(5),
        |r| r.start = Lsn(0),
        |r| r.entries.clear(),
        |r| r.entries.reverse(),
        |r| r.entries[0].digest = "xyz".into(),
        |r| r.entries[0].runs[0].segments = u64::MAX,
        |r| r.timeline = TimelineId::new(2).unwrap(),
    ];
    for (number, breaks) in broken.iter().enumerate() {
        let mut rollup = good.clone();
        breaks(&mut rollup);
        assert!(rollup.check().is_err(), "{number}");
    }
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Rollup>(&json).unwrap(), good);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_record_counts_once_whatever_the_order(
        crossings in proptest::collection::vec(0u8..5, 1..7),
        order in Just((0..8usize).collect::<Vec<_>>()).prop_shuffle(),
        cut in 0usize..8, missing in 0usize..16,
    ) {
        let wal = wal(&crossings, 256);
        let mut summaries = summaries(&wal);
        let whole = missing >= summaries.len();
        if !whole {
            summaries.remove(missing);
        }
        prop_assume!(!summaries.is_empty());
        let order: Vec<usize> = order.into_iter().filter(|at| *at < summaries.len()).collect();
        let at_once = roll(place(1, 256), summaries.iter().map(part).collect());
        let (first, rest) = order.split_at(cut.min(order.len() - 1).max(1));
        let mut grown = roll(place(1, 256), first.iter().map(|at| part(&summaries[*at])).collect());
        for at in rest {
            let mut parts = Part::of_former(grown);
            parts.push(part(&summaries[*at]));
            grown = roll(place(1, 256), parts);
        }
        prop_assert_eq!(&grown, &at_once);
        prop_assert!(at_once.edges.len() <= 2 * at_once.runs().len());
        if whole {
            let segments = wal.segments();
            let refs: Vec<_> = segments.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
            let events = crate::wal::events_of(&refs, MIB).events;
            let facts = at_once.facts();
            let times = events.iter().filter_map(|event| event.kind.stop_time());
            prop_assert_eq!(facts.unread, 0);
            prop_assert_eq!(facts.max_time.map(|stop| stop.time), times.clone().max());
            prop_assert_eq!(facts.min_time.map(|stop| stop.time), times.clone().min());
            prop_assert_eq!(facts.counts.commits, times.count() as u64);
            let points = events.iter().filter(|event| matches!(event.kind, EventKind::RestorePoint { .. }));
            prop_assert_eq!(at_once.events.iter().collect::<Vec<_>>(), points.collect::<Vec<_>>());
        }
    }
}
