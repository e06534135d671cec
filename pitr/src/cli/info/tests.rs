use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{Catalog, GapCause, GapKind, GapRecord};
use walship::pg::{HistoryEntry, Lsn, SegmentName, SegmentSize, TimelineHistory};
use walship::replication::{Archiver, ServerPosition, Slot};
use walship::repository::{LineageRepository, Repository};
use walship::storage::memory::MemoryStorage;
use walship::wal::event::{EventKind, ServerLimits, WalEvent};
use walship::wal::rollup::{Entry, Facts, Rollup, Run};
use walship::wal::summary::StopTime;

use super::draw::{Canvas, timeline};
use super::*;
use crate::execute::info::Info;
use crate::plan::tests::{World, at, tli};

const SIZE: SegmentSize = SegmentSize::MIN;

fn lsn(segment: u64, offset: u64) -> Lsn {
    Lsn((segment << 20) + offset)
}

fn stop(segment: u64, xid: u32) -> StopTime {
    StopTime { time: at(i64::from(xid) * 1_000_000), lsn: lsn(segment, 4096), xid }
}

/// Segments 1 to 12 of timeline 1 without the eighth, which was given up; timeline 2 from the middle of segment
/// 10 on; two backups, `wal_level` minimal for a while, a restore point.
pub(super) fn catalog() -> Catalog {
    let mut world = World::new();
    world.backup_record("20261121T000000Z-0000000000000001", tli(1), lsn(2, 40), lsn(2, 5000));
    world.backup_record("20261121T000000Z-0000000000000002", tli(1), lsn(9, 40), lsn(9, 5000));
    let mut catalog = world.catalog;
    let entries = (1..=12).filter(|number| *number != 8).map(|number| {
        let first = SegmentName::from_number(tli(1), number, SIZE).unwrap();
        let (min_time, max_time) =
            (Some(stop(number, 100 + number as u32)), Some(stop(number, 200 + number as u32)));
        let facts = Facts { stored_bytes: 1000, min_time, max_time, ..Facts::default() };
        Entry { runs: vec![Run { first, segments: 1 }], digest: "0".repeat(64), facts }
    });
    let event =
        |segment, kind| WalEvent { lsn: lsn(segment, 6000), end_lsn: lsn(segment, 6100), xid: 0, kind };
    let minimal = ServerLimits { wal_level: 0, ..catalog.backups[0].limits };
    let rollup = Rollup {
        format: 1,
        timeline: tli(1),
        level: 1,
        start: Lsn(0),
        segment_size: SIZE,
        system_identifier: catalog.lineage.system_identifier,
        entries: entries.collect(),
        events: vec![
            event(3, EventKind::RestorePoint { name: "before \u{1b}[2J".into(), time: at(0) }),
            event(5, EventKind::ParameterChange { settings: minimal }),
        ],
        edges: vec![],
    };
    for entry in &rollup.entries {
        catalog.segments.insert_runs(&entry.runs, entry.facts.stored_bytes);
    }
    catalog.rollups.push(rollup);
    let switch = HistoryEntry { timeline: tli(1), switch_lsn: lsn(10, 8192), reason: "test".into() };
    catalog.histories.insert(tli(2), TimelineHistory { timeline: tli(2), ancestors: vec![switch] });
    for number in 10..=14 {
        catalog.segments.insert(SegmentName::from_number(tli(2), number, SIZE).unwrap(), 500);
    }
    catalog.gaps.push(GapRecord {
        format: 1,
        id: "20261121T010203Z-0123456789abcdef".into(),
        timeline: tli(1),
        start_lsn: lsn(8, 0),
        end_lsn: lsn(9, 0),
        cause: GapCause { kind: GapKind::GivenUp, text: "bad block".into() },
        segment_digest: None,
        recorded: at(0),
        host: "db1".into(),
        user: "postgres".into(),
    });
    catalog
}

async fn repository() -> LineageRepository {
    let now = DateTime::UNIX_EPOCH;
    let repository = Repository::create(Arc::new(MemoryStorage::new()), now).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
    cluster.register_lineage(7_123_456_789_012_345_678, SIZE, 17, now).await.unwrap()
}

fn now() -> DateTime<Utc> {
    at(0) + TimeDelta::hours(1)
}

pub(super) async fn info(server: Option<ServerInfo>) -> Info {
    let (repository, catalog) = (repository().await, catalog());
    let lineages = vec![catalog.lineage.clone()];
    read_info(&repository, catalog, vec![], lineages, server, now()).await.unwrap()
}

pub(super) fn position() -> ServerPosition {
    ServerPosition {
        system_identifier: 7_123_456_789_012_345_678,
        segment_size: SIZE,
        in_recovery: false,
        timeline: tli(2),
        wal_lsn: lsn(17, 300),
        archiver: Archiver {
            last_archived_wal: Some("00000002000000000000000E".into()),
            last_archived_time: Some(at(0)),
            failing_wal: Some("00000002000000000000000F".into()),
        },
        slots: vec![Slot { name: "walship".into(), restart_lsn: lsn(14, 0), active: true }],
    }
}

#[tokio::test]
async fn an_archive_reads_well() {
    let info = info(Some(ServerInfo::compare(&catalog(), &position()))).await;
    insta::assert_snapshot!("info", text(&info, Style::Plain));
    insta::assert_snapshot!("info_json", serde_json::to_string_pretty(&info).unwrap());
    for (name, columns, is_utf8) in [("80", 80, true), ("ascii", 80, false), ("narrow", 32, false)] {
        let drawn = timeline(&info, Canvas { columns, is_utf8 });
        assert!(drawn.lines().all(|line| line.chars().count() <= columns), "{drawn}");
        insta::assert_snapshot!(format!("draw_{name}"), drawn);
    }
}

#[tokio::test]
async fn an_empty_archive_is_drawn_as_nothing() {
    let repository = repository().await;
    let catalog = load_catalog(&repository).await.unwrap();
    let info = read_info(&repository, catalog, vec![], vec![], None, now()).await.unwrap();
    assert_eq!(timeline(&info, Canvas { columns: 80, is_utf8: true }), "");
    assert!(text(&info, Style::Plain).contains("none: `walship backup` takes one"));
}

#[tokio::test]
async fn windows_end_at_minimal_wal_and_gaps_and_name_transactions_within() {
    let info = info(None).await;
    let windows = &info.timelines[0].windows;
    let ends: Vec<_> =
        windows.iter().map(|w| (w.window.from_lsn, w.window.until_lsn, w.window.ended_by)).collect();
    let expected = [
        (lsn(2, 5000), lsn(5, 6000), WindowEnd::WalLevelMinimal),
        (lsn(9, 5000), lsn(13, 0), WindowEnd::EndOfArchive),
    ];
    assert_eq!(ends, expected);
    // The commit of segment 2 comes before the backup's end, that of segment 5 before the break.
    let xids = |w: &WindowInfo| (w.earliest_transaction.map(|t| t.xid), w.latest_transaction.map(|t| t.xid));
    assert_eq!(
        windows.iter().map(xids).collect::<Vec<_>>(),
        [(Some(103), Some(205)), (Some(110), Some(212))]
    );
    // Of timeline 2 nothing is known but its parent's part, up to the fork.
    assert_eq!(info.timelines[1].windows.iter().map(xids).collect::<Vec<_>>(), [(None, None)]);
    assert_eq!(info.timelines[1].segments_not_looked_at, 5);
}

#[tokio::test]
async fn idle_segments_that_the_index_tells_of_are_passed_over() {
    let mut catalog = catalog();
    for entry in &mut catalog.rollups[0].entries {
        if entry.runs[0].first.number(SIZE) != 9 {
            (entry.facts.min_time, entry.facts.max_time) = (None, None);
        }
    }
    catalog.rollups[0].entries.iter_mut().for_each(|entry| {
        // Behind the backup's end.
        entry.facts.max_time.iter_mut().for_each(|stop| stop.lsn = lsn(9, 7000));
    });
    let info = read_info(&repository().await, catalog, vec![], vec![], None, now()).await.unwrap();
    let window = info.timelines[0].windows.last().unwrap();
    let xids = [window.earliest_transaction, window.latest_transaction].map(|stop| stop.map(|stop| stop.xid));
    assert_eq!(xids, [Some(209), Some(209)]);
}

#[test]
fn a_server_that_is_another_is_said_and_not_compared() {
    let catalog = catalog();
    let good = ServerInfo::compare(&catalog, &position());
    assert_eq!((good.problem, good.behind_segments), (None, Some(2)));
    assert_eq!(good.archive_until_lsn, Some(lsn(15, 0)));
    let compare = |change: fn(&mut ServerPosition)| {
        let mut position = position();
        change(&mut position);
        ServerInfo::compare(&catalog, &position)
    };
    for (other, said) in [
        (compare(|server| server.system_identifier = 5), "another cluster: system identifier 5"),
        (compare(|server| server.segment_size = SegmentSize::DEFAULT), "another cluster"),
        (compare(|server| server.timeline = tli(3)), "timeline 3, whose history file is not archived"),
    ] {
        assert!(other.problem.as_ref().is_some_and(|problem| problem.contains(said)), "{other:?}");
        assert_eq!((other.behind_bytes, other.archive_until_lsn), (None, None));
    }
    let older = compare(|server| (server.timeline, server.wal_lsn) = (tli(1), lsn(13, 8)));
    assert!(older.problem.unwrap().contains("knows timeline 2"));
    assert_eq!(older.behind_bytes, Some(8));
    let lags = compare(|server| (server.in_recovery, server.wal_lsn) = (true, lsn(11, 0)));
    assert!(lags.problem.unwrap().contains("ahead of the server"));
    assert_eq!(lags.behind_bytes, Some(0));
}

#[test]
fn ages_read_well() {
    let said =
        [-5, 0, 119, 120, 7199, 7200, 172_799, 172_800].map(|seconds| age(TimeDelta::seconds(seconds)));
    assert_eq!(said, ["0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 days"]);
}
