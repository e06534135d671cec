//! The reader, the scanner and the joining of summaries, on WAL made to order and on hostile bytes.

use proptest::prelude::*;

use super::event::{EventKind, WalEvent};
use super::page::PAGE_SIZE;
use super::reader::{Reader, StopReason};
use super::scan::{SegmentScan, SegmentScanner, Verdict};
use super::summary::{Joined, SegmentEnding, SegmentSummary, join};
use super::testing::WalBuilder;
use super::{Verdict as V, events_of};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

const MIB: SegmentSize = SegmentSize::MIN;

fn wal() -> WalBuilder {
    WalBuilder::new(17, MIB, 42)
}

fn scan(name: SegmentName, bytes: &[u8]) -> SegmentScan {
    scan_in(name, bytes, 1 << 20)
}

fn scan_in(name: SegmentName, bytes: &[u8], chunk: usize) -> SegmentScan {
    let mut scanner = SegmentScanner::new(name, MIB);
    bytes.chunks(chunk).for_each(|part| scanner.push(part));
    scanner.finish()
}

fn scans(wal: &WalBuilder) -> Vec<SegmentScan> {
    wal.segments().iter().map(|(name, bytes)| scan(*name, bytes)).collect()
}

fn events(wal: &WalBuilder) -> Vec<WalEvent> {
    let segments = wal.segments();
    let refs: Vec<_> = segments.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    events_of(&refs, MIB).events
}

/// Every record that a reader gives out: start, end, length, first bytes.
fn records(start: Lsn, bytes: &[u8], chunk: usize) -> (Vec<(Lsn, Lsn, u32)>, Reader) {
    let mut reader = Reader::new(start, TimelineId::FIRST, MIB);
    let mut records = Vec::new();
    for part in bytes.chunks(chunk) {
        reader.push(part, |record, _| records.push((record.lsn, record.end_lsn, record.header.total_len)));
    }
    reader.finish(|record, _| records.push((record.lsn, record.end_lsn, record.header.total_len)));
    (records, reader)
}

fn is_incomplete(verdict: &Verdict, at: Lsn) -> bool {
    matches!(verdict, V::Incomplete { valid_to, .. } if *valid_to == at)
}

#[test]
fn a_record_across_two_segments_is_attributed_once() {
    for left in [8, 16, 24, 64, 400] {
        let mut wal = wal();
        wal.fill_segment(left);
        let lsn = wal.commit_dropping(700, 5_000_000, &(1..=50).collect::<Vec<_>>());
        wal.commit(701, 1);
        wal.fill_segment(0);
        let scans = scans(&wal);
        assert_eq!(scans.len(), 2);
        assert!(scans.iter().all(|scan| scan.verdict == V::Whole), "{left}: {scans:?}");
        let (one, two) = (&scans[0].summary, &scans[1].summary);
        assert_eq!((one.counts.commits, two.counts.commits), (0, 1), "{left}");
        assert_eq!(one.unfinished.as_ref().unwrap().record_bytes, left as u64);
        assert_eq!(one.unfinished.as_ref().unwrap().lsn, lsn);
        assert_eq!(two.min_time.unwrap().xid, 701);
        let Joined::Event(event) = join(one, two) else { panic!("{left}: {:?}", join(one, two)) };
        assert_eq!((event.lsn, event.xid), (lsn, 700));
        assert_eq!(event, events(&wal)[0]);
        assert_eq!(events(&wal).len(), 2);
        assert_eq!(join(two, one), Joined::ReadSegments, "not neighbours in this order");
    }
}

#[test]
fn what_does_not_matter_is_told_by_its_header_alone() {
    let mut wal = wal();
    wal.fill_segment(48);
    wal.filler(30_000);
    wal.fill_segment(8);
    wal.filler(30_000);
    wal.fill_segment(0);
    let scans = scans(&wal);
    assert_eq!(scans[0].summary.unfinished.as_ref().unwrap().bytes.as_ref().unwrap().len(), 24);
    assert_eq!(join(&scans[0].summary, &scans[1].summary), Joined::NotOfInterest);
    // Its header was split, and the rest is too long to be kept.
    assert_eq!(scans[2].summary.leading.as_ref().unwrap().bytes, None);
    assert_eq!(join(&scans[1].summary, &scans[2].summary), Joined::ReadSegments);
}

#[test]
fn a_segment_inside_one_huge_record_is_whole() {
    let mut wal = wal();
    wal.fill_segment(400);
    let lsn = wal.commit_dropping(700, 1, &(1..=300_000).collect::<Vec<_>>());
    wal.fill_segment(0);
    let scans = scans(&wal);
    assert_eq!(scans.len(), 5);
    assert!(scans.iter().all(|scan| scan.verdict == V::Whole));
    let middle = &scans[2].summary;
    assert_eq!((middle.first_record, middle.counts.records, &middle.unfinished), (None, 0, &None));
    assert_eq!(middle.leading.as_ref().unwrap().end, None);
    assert_eq!(middle.ending, SegmentEnding::Full);
    assert_eq!(join(&scans[0].summary, &scans[1].summary), Joined::ReadSegments);
    for pair in scans[1..].windows(2) {
        assert_eq!(join(&pair[0].summary, &pair[1].summary), Joined::None);
    }
    let events = events(&wal);
    assert_eq!((events.len(), events[0].lsn), (1, lsn));
    assert!(
        matches!(&events[0].kind, EventKind::Commit { dropped_relations, .. } if dropped_relations.len() == 300_000)
    );
}

#[test]
fn switches_end_a_segment_wherever_they_stand() {
    // A switch's header is split by the segment boundary when 8 or 16 bytes are left; then the next segment is padding.
    for left in [8, 16, 24, 32, 4000] {
        let mut wal = wal();
        wal.fill_segment(left);
        let lsn = wal.switch();
        wal.commit(700, 1);
        wal.switch();
        let scans = scans(&wal);
        assert!(scans.iter().all(|scan| scan.verdict == V::Whole), "{left}: {scans:?}");
        let split = left < 24;
        assert_eq!(scans.len(), if split { 3 } else { 2 });
        let switched = scans[usize::from(split)].summary.clone();
        assert_eq!(switched.ending, SegmentEnding::Switch, "{left}");
        if split {
            assert_eq!(scans[0].summary.ending, SegmentEnding::Full);
            assert_eq!(switched.counts.records, 0);
            let joined = join(&scans[0].summary, &switched);
            assert!(matches!(joined, Joined::Event(WalEvent { kind: EventKind::Switch, .. })), "{joined:?}");
        }
        let events = events(&wal);
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].lsn, lsn);
        assert_eq!(events[1].ended(), Some(700));
    }
}

impl WalEvent {
    fn ended(&self) -> Option<u32> {
        self.kind.ended_xid(self.xid)
    }
}

#[test]
fn a_file_padded_with_zeros_is_incomplete() {
    let mut wal = wal();
    wal.commit(700, 1);
    wal.filler(20_000);
    let end = wal.position();
    let (name, bytes) = wal.segments().remove(0);
    let found = scan(name, &bytes);
    assert!(is_incomplete(&found.verdict, end), "{:?}", found.verdict);
    assert_eq!((found.summary.counts.records, found.summary.end_of_wal), (2, end));
    assert_eq!(found.summary.ending, SegmentEnding::Incomplete);
    let read = events_of(&[(name, &bytes)], MIB);
    assert_eq!((read.events.len(), read.broken.unwrap().lsn), (1, end));

    // A recycled file: behind the end lie pages of an older segment.
    let mut recycled = bytes.clone();
    let mut old = WalBuilder::new(17, MIB, 42);
    old.fill_segment(0);
    let old = old.segments().remove(0).1;
    let from = (end.0 as usize - (1 << 20)).next_multiple_of(PAGE_SIZE);
    let shift = PAGE_SIZE;
    recycled[from..(1 << 20) - shift].copy_from_slice(&old[from + shift..]);
    assert!(is_incomplete(&scan(name, &recycled).verdict, end));
}

#[test]
fn a_damaged_record_ends_the_valid_part_before_it() {
    let mut wal = wal();
    wal.commit(700, 1);
    let lsn = wal.commit(701, 2);
    wal.fill_segment(0);
    let (name, mut bytes) = wal.segments().remove(0);
    bytes[(lsn.0 as usize & ((1 << 20) - 1)) + 30] ^= 1;
    let found = scan(name, &bytes);
    assert!(is_incomplete(&found.verdict, lsn));
    assert_eq!(found.summary.counts.commits, 1);
    let (_, reader) = records(name.start(MIB), &bytes, 1 << 20);
    assert_eq!(reader.stop().unwrap().reason, StopReason::Crc);
}

#[test]
fn what_a_crash_cut_off_never_happened() {
    for pages in [0, 1, 3] {
        let mut wal = wal();
        wal.commit(700, 1);
        let lost = wal.crash_cut(40_000, pages);
        wal.commit(702, 3);
        wal.fill_segment(0);
        let (name, bytes) = wal.segments().remove(0);
        let found = scan(name, &bytes);
        assert_eq!(found.verdict, V::Whole);
        assert_eq!(found.summary.counts.commits, 2, "the lost commit does not count");
        assert_eq!(found.summary.ended_xids, Some((700, 702)));
        let overwritten = found.summary.events.iter().find_map(|event| match event.kind {
            EventKind::OverwriteContrecord { overwritten, .. } => Some(overwritten),
            _ => None,
        });
        assert_eq!(overwritten, Some(lost));
    }
}

#[test]
fn a_crash_may_cut_a_record_at_or_behind_a_segment_boundary() {
    // The lost record's written part ends with the segment, or goes on into the next one.
    for pages in [0, 2] {
        let mut wal = wal();
        wal.fill_segment(200);
        let lost = wal.crash_cut(60_000, pages);
        wal.commit(702, 3);
        wal.fill_segment(0);
        let scans = scans(&wal);
        assert!(scans.iter().all(|scan| scan.verdict == V::Whole), "{scans:?}");
        assert_eq!(scans[0].summary.unfinished.as_ref().unwrap().lsn, lost);
        assert_eq!(scans[1].summary.leading, None, "discarded, not waiting for its other part");
        assert_eq!(join(&scans[0].summary, &scans[1].summary), Joined::None);
        let events = events(&wal);
        assert_eq!(events.len(), 2);
        assert_eq!(events[1].ended(), Some(702));
    }
}

#[test]
fn the_first_segment_of_a_timeline_begins_with_the_parents_pages() {
    let two = TimelineId::new(2).unwrap();
    let mut wal = wal();
    wal.commit(700, 1);
    wal.filler(20_000);
    wal.set_timeline(two);
    wal.filler(20_000);
    wal.commit(701, 2);
    wal.fill_segment(0);
    let (name, bytes) = wal.segments().remove(0);
    assert_eq!(name.timeline, two);
    let found = scan(name, &bytes);
    assert_eq!((found.verdict, found.summary.counts.commits), (V::Whole, 2));
    assert_eq!(found.summary.first_page_timeline, TimelineId::FIRST);

    let what = |verdict| match verdict {
        V::Mismatch { what } => what,
        other => panic!("{other:?}"),
    };
    let as_parent = scan(name.on(TimelineId::FIRST), &bytes).verdict;
    assert!(what(as_parent).contains("timeline 2"));
    let mut down = bytes.clone();
    let last_page = bytes.len() - PAGE_SIZE;
    down[last_page + 4] = 1;
    assert!(what(scan(name, &down).verdict).contains("timeline 1"));
}

#[test]
fn the_end_of_the_lsn_space_is_no_trap() {
    let mut wal = wal().starting_at((1 << 44) - 1);
    wal.fill_segment(40);
    wal.filler(14);
    let (name, bytes) = wal.segments().remove(0);
    assert_eq!(name.to_string(), "00000001FFFFFFFF00000FFF");
    assert_eq!(scan(name, &bytes).verdict, V::Whole);
    assert_eq!(events_of(&[(name, &bytes)], MIB).broken, None);
    let mut wal = WalBuilder::new(17, MIB, 42).starting_at((1 << 44) - 1);
    wal.fill_segment(24);
    wal.switch();
    let (name, bytes) = wal.segments().remove(0);
    let _ = (scan(name, &bytes), events_of(&[(name, &bytes)], MIB));
}

#[test]
fn a_file_that_is_not_the_named_segment_is_a_mismatch() {
    let mut wal = wal();
    wal.fill_segment(0);
    let (name, bytes) = wal.segments().remove(0);
    let mismatch = |name: SegmentName, bytes: &[u8], word: &str| match scan(name, bytes).verdict {
        V::Mismatch { what } => assert!(what.contains(word), "{what}"),
        other => panic!("{word}: {other:?}"),
    };
    mismatch(name, &bytes[..1000], "1000 bytes");
    mismatch(name, &[&bytes[..], &[0]].concat(), "1048577 bytes");
    mismatch(name, &[], "0 bytes");
    mismatch(name, &vec![0; 1 << 20], "magic 0x0000");
    mismatch(name, &vec![0xFF; 1 << 20], "magic 0xFFFF");
    mismatch(name.next(MIB).unwrap(), &bytes, "stands for 0/200000");
    let mut other_size = bytes.clone();
    other_size[34] = 0x20;
    mismatch(name, &other_size, "2097152");
    let mut short_header = bytes.clone();
    short_header[2] = 0;
    mismatch(name, &short_header, "long header");
    let illegal = SegmentName { seg: 5000, ..name };
    mismatch(illegal, &bytes, "not a segment name");
    assert_eq!(scan(name, &bytes).summary.system_identifier, 42);
}

#[test]
fn wal_of_an_unknown_version_is_undecoded_not_refused() {
    let mut wal = wal();
    wal.fill_segment(0);
    let (name, mut bytes) = wal.segments().remove(0);
    for page in bytes.chunks_mut(PAGE_SIZE) {
        page[..2].copy_from_slice(&0xD1F0u16.to_le_bytes());
    }
    let found = scan(name, &bytes);
    assert!(
        matches!(&found.verdict, V::Undecoded { reason } if reason.contains("0xD1F0")),
        "{:?}",
        found.verdict
    );
    assert_eq!((found.summary.system_identifier, found.summary.page_magic), (42, 0xD1F0));
    assert!(matches!(scan(name.next(MIB).unwrap(), &bytes).verdict, V::Mismatch { .. }));

    let mut other_pages = wal.segments().remove(0).1;
    other_pages[36..40].copy_from_slice(&16384u32.to_le_bytes());
    assert!(matches!(scan(name, &other_pages).verdict, V::Undecoded { reason } if reason.contains("16384")));
}

#[test]
fn a_record_with_a_right_crc_and_an_unknown_layout_is_undecoded() {
    let mut wal = wal();
    wal.record(700, 1, 0x00, &[1, 2, 3]);
    wal.commit(701, 1);
    wal.fill_segment(0);
    let (name, bytes) = wal.segments().remove(0);
    let found = scan(name, &bytes);
    assert!(matches!(&found.verdict, V::Undecoded { reason } if reason.contains("PostgreSQL 17")));
    assert_eq!(found.summary.counts.commits, 1, "the rest is still counted");
    assert!(events_of(&[(name, &bytes)], MIB).broken.is_some());
}

#[test]
fn times_need_not_grow_and_both_ends_are_kept() {
    let mut wal = wal();
    wal.commit(700, 50);
    let latest = wal.abort(701, 90);
    let earliest = wal.commit(699, 10);
    wal.commit(702, 60);
    wal.fill_segment(0);
    let summary = scans(&wal).remove(0).summary;
    assert_eq!((summary.min_time.unwrap().lsn, summary.max_time.unwrap().lsn), (earliest, latest));
    assert_eq!(summary.ended_xids, Some((699, 702)));
    assert_eq!((summary.counts.commits, summary.counts.aborts), (3, 1));
    let json = serde_json::to_string(&summary).unwrap();
    assert_eq!(serde_json::from_str::<SegmentSummary>(&json).unwrap(), summary);
}

#[test]
fn a_summary_never_outgrows_its_limit() {
    let mut wal = wal();
    wal.fill_segment(8000);
    wal.commit_dropping(1, 1, &(1..=1200).collect::<Vec<_>>());
    for round in 0..1500u32 {
        wal.commit_dropping(700 + round, i64::MAX / 8, &[u32::MAX - round; 4]);
        wal.restore_point(&"\u{1}".repeat(63), i64::MAX / 8);
    }
    wal.commit_dropping(5000, 1, &(1..=30_000).collect::<Vec<_>>());
    wal.fill_segment(8000);
    wal.commit_dropping(1, 1, &(1..=1200).collect::<Vec<_>>());
    wal.fill_segment(0);
    for scan in scans(&wal) {
        let json = serde_json::to_vec(&scan.summary).unwrap();
        assert!(json.len() <= SegmentSummary::MAX_BYTES, "{} bytes", json.len());
        if scan.summary.counts.commits > 1000 {
            assert!(scan.summary.events_truncated);
            let restore_points = scan
                .summary
                .events
                .iter()
                .filter(|e| matches!(e.kind, EventKind::RestorePoint { .. }))
                .count();
            assert!(restore_points > 20, "drops do not crowd out what plans need");
        }
    }
}

/// A few segments with everything that can happen, to be mutated.
fn varied() -> WalBuilder {
    let mut wal = wal();
    wal.commit(700, 1);
    wal.filler(9000);
    wal.crash_cut(30_000, 1);
    wal.restore_point("here", 5);
    wal.filler(70_000);
    wal.commit_dropping(701, 9, &(1..900).collect::<Vec<_>>());
    for xid in 702..760 {
        wal.commit(xid, i64::from(xid));
        wal.filler(xid as usize % 300);
    }
    wal.switch();
    wal.abort(800, 7);
    wal
}

#[test]
fn the_beginning_of_a_segment_ends_where_it_would_for_a_server() {
    let mut wal = wal();
    wal.fill_segment(200);
    wal.filler(20_000);
    for xid in 700..740 {
        wal.commit(xid, 1_000_000 + i64::from(xid));
        wal.filler(700);
    }
    let end = usize::try_from(wal.position().0 % (1 << 20)).unwrap();
    let (name, bytes) = wal.segments().remove(1);
    let leading_end = scan(name, &bytes).summary.leading.unwrap().end.unwrap();
    for cut in (1..64).chain((64..end + 8).step_by(37)).chain([8192, 16384, end]) {
        let mut scanner = SegmentScanner::new(name, MIB);
        scanner.push(&bytes[..cut]);
        let open = scanner.finish_open();
        let mut padded = bytes[..cut].to_vec();
        padded.resize(1 << 20, 0);
        let whole = scan(name, &padded);
        let received_to = Lsn(name.start(MIB).0 + cut as u64);
        if received_to < leading_end {
            let unusable = matches!(open.verdict, Verdict::Mismatch { .. });
            assert!(unusable || open.summary.end_of_wal == name.start(MIB), "{cut}: {open:?}");
            assert!(open.summary.leading.is_none_or(|leading| leading.end.is_none()), "{cut}");
            continue;
        }
        let Verdict::Incomplete { valid_to, .. } = whole.verdict else { panic!("{cut}: {whole:?}") };
        assert_eq!(open.summary.end_of_wal, valid_to, "{cut}");
        assert_eq!(open.summary.counts, whole.summary.counts, "{cut}");
        assert_eq!(open.summary.max_time, whole.summary.max_time, "{cut}");
        assert!(matches!(open.verdict, Verdict::Incomplete { .. }), "{cut}: {open:?}");
    }
}

#[test]
fn an_open_segment_that_was_switched_is_at_its_end() {
    let mut wal = wal();
    wal.commit(700, 1);
    wal.switch();
    let (name, bytes) = wal.segments().remove(0);
    let mut scanner = SegmentScanner::new(name, MIB);
    scanner.push(&bytes[..500]);
    let open = scanner.finish_open();
    assert_eq!((open.verdict, open.summary.ending), (Verdict::Whole, SegmentEnding::Switch));
    assert_eq!(open.summary.counts.commits, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn cuts_between_chunks_do_not_matter(chunk in prop_oneof![1usize..64, 64usize..40_000]) {
        let wal = varied();
        let bytes: Vec<u8> = wal.segments().into_iter().flat_map(|(_, bytes)| bytes).collect();
        let start = wal.segments()[0].0.start(MIB);
        // Byte by byte through everything would take long: the first pages hold every kind of crossing.
        let bytes = &bytes[..if chunk < 64 { 200_000 } else { bytes.len() }];
        prop_assert_eq!(records(start, bytes, chunk).0, records(start, bytes, 1 << 20).0);
    }

    #[test]
    fn damage_shortens_wal_and_never_invents_any(
        at in 0usize..170_000, flip in 1u8.., len in 1usize..20, keep in 0usize..170_000,
    ) {
        let wal = varied();
        let (name, good) = wal.segments().remove(0);
        let start = name.start(MIB);
        let truth = records(start, &good, 1 << 20).0;
        let mut bad = good.clone();
        bad[at..at + len].iter_mut().for_each(|byte| *byte ^= flip);
        let read = records(start, &bad, 1 << 20).0;
        prop_assert!(truth.starts_with(&read) || read == truth, "{:?}", read.last());
        // A file that ends early.
        let read = records(start, &good[..keep], 5000).0;
        prop_assert!(truth.starts_with(&read));
        let found = scan(name, &bad);
        let again = scan_in(name, &bad, 8191);
        prop_assert_eq!(&found, &again);
        let _ = events_of(&[(name, &bad), wal.segments().get(1).map(|(n, b)| (*n, b.as_slice())).unwrap()], MIB);
    }

    #[test]
    fn records_with_right_crcs_but_hostile_contents_are_survived(
        parts in proptest::collection::vec(
            (any::<u32>(), 0u8..24, any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)), 1..60),
        major in 14u32..=18,
    ) {
        let mut wal = WalBuilder::new(major, MIB, 1);
        for (xid, rmgr, info, main) in &parts {
            // A switch would end the segment; all else may come.
            if (*rmgr, info & 0xF0) != (0, 0x40) {
                wal.record(*xid, *rmgr, *info, main);
            }
        }
        wal.fill_segment(16);
        wal.record(1, 1, 0x80, &[0xFF; 100]);
        wal.fill_segment(0);
        let scans: Vec<_> = wal.segments().iter().map(|(name, bytes)| scan(*name, bytes).summary).collect();
        for summary in &scans {
            prop_assert!(serde_json::to_vec(summary).unwrap().len() <= SegmentSummary::MAX_BYTES);
        }
        let _ = join(&scans[0], &scans[1]);
        let _ = events(&wal);
    }

    #[test]
    fn random_bytes_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0..40_000), headers in any::<bool>(),
    ) {
        let name = SegmentName::from_number(TimelineId::FIRST, 1, MIB).unwrap();
        let mut bytes = bytes;
        if headers {
            // Right headers, hostile pages.
            let mut wal = wal();
            wal.fill_segment(0);
            for (page, good) in bytes.chunks_mut(PAGE_SIZE).zip(wal.segments()[0].1.chunks(PAGE_SIZE)) {
                let len = page.len().min(16);
                page[..len].copy_from_slice(&good[..len]);
            }
        }
        let _ = scan_in(name, &bytes, 777);
        let mut whole = bytes.clone();
        whole.resize(1 << 20, 0);
        let _ = scan(name, &whole);
        let _ = records(Lsn(u64::MAX - 8191), &bytes, 8192);
        let _ = TimelineHistory::parse(TimelineId::FIRST, &String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn history_files_are_survived(text in "[0-9A-F/\t\n# ]{0,200}", timeline in 1u32..20) {
        if let Ok(history) = TimelineHistory::parse(TimelineId::new(timeline).unwrap(), &text) {
            prop_assert!(history.ancestors.iter().all(|entry| entry.timeline.get() < timeline));
        }
    }

    #[test]
    fn hostile_summaries_join_to_something(
        head in proptest::collection::vec(any::<u8>(), 0..60), tail in proptest::collection::vec(any::<u8>(), 0..60),
        lsn in any::<u64>(),
    ) {
        let mut wal = wal();
        wal.fill_segment(200);
        wal.commit(1, 1);
        wal.filler(400);
        wal.fill_segment(0);
        let mut scans = scans(&wal);
        let mut next = scans.remove(1).summary;
        let mut prev = scans.remove(0).summary;
        if let (Some(first), Some(rest)) = (&mut prev.unfinished, &mut next.leading) {
            first.bytes = Some(head);
            first.lsn = Lsn(lsn);
            rest.bytes = Some(tail);
        }
        let _ = join(&prev, &next);
    }
}
