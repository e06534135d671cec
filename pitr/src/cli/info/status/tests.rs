use std::time::Duration;

use chrono::TimeZone as _;
use walship::catalog::{BackupRecord, DamagedPages, Hold, OrphanedBackup, ParentBackup, StoredTail};
use walship::catalog::{RecordHead, StandingDamage, VerifyOutcome};
use walship::config::Objectives;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

use super::super::tests::{catalog, info, position};
use super::*;
use crate::execute::info::{
    RestorePoint, ServerInfo, TailInfo, TimelineInfo, TransactionTime, UnfinishedBackup, WindowInfo,
};
use crate::page::tests::{assert_sound, percent_of};
use crate::plan::tests::tli;
use crate::plan::{Gap, KnownBy, Window, WindowEnd};

const SIZE: SegmentSize = SegmentSize::DEFAULT;

/// When the made-up pages are made.
fn now() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 27, 11, 24, 5).unwrap()
}

fn lineage(number: u32) -> Lineage {
    Lineage {
        number,
        system_identifier: 7_123_456_789_012_345_678 + u64::from(number),
        segment_size: SIZE,
        postgres_major: 16 + number,
        created: now() - TimeDelta::days(400),
    }
}

/// A position that was written so many minutes before `now`: a segment each five minutes.
fn lsn_at(minutes: i64) -> Lsn {
    Lsn(((3_000_000 - minutes) as u64) * (16 << 20) / 5)
}

fn time_at(minutes: i64) -> DateTime<Utc> {
    now() - TimeDelta::minutes(minutes)
}

fn backup(
    timeline: TimelineId,
    minutes: i64,
    parent: Option<&BackupRecord>,
    like: &BackupRecord,
) -> BackupRecord {
    BackupRecord {
        id: format!("{}-{minutes:016x}", time_at(minutes + 12).format("%Y%m%dT%H%M%SZ")),
        timeline,
        stop_timeline: timeline,
        start_lsn: lsn_at(minutes + 12),
        stop_lsn: lsn_at(minutes),
        started: time_at(minutes + 12),
        finished: time_at(minutes),
        data_bytes: 48 << 30,
        stored_bytes: if parent.is_some() { 700 << 20 } else { 17 << 30 },
        parent: parent.map(|parent| ParentBackup {
            id: parent.id.clone(),
            timeline,
            start_lsn: parent.start_lsn,
            depth: 1,
        }),
        ..like.clone()
    }
}

fn window(timeline: TimelineId, from: i64, until: i64, backups: u64, ended_by: WindowEnd) -> WindowInfo {
    let end = |minutes: i64| TransactionTime {
        time: time_at(minutes),
        lsn: Lsn(lsn_at(minutes).0 - 64),
        xid: 9_000_000 - minutes as u32,
    };
    WindowInfo {
        window: Window {
            timeline,
            from_lsn: lsn_at(from),
            from_time: time_at(from),
            first_backup: "first".into(),
            newest_backup: "newest".into(),
            backups,
            until_lsn: lsn_at(until),
            last_segment: None,
            ended_by,
            gap: None,
            reset_lsn: None,
        },
        earliest_transaction: Some(end(from - 1)),
        latest_transaction: Some(end(until)),
        latest_age_seconds: Some(until * 60),
    }
}

fn gap(timeline: TimelineId, from: i64, to: i64, expired: bool) -> Gap {
    Gap {
        first_missing: SegmentName::containing(timeline, lsn_at(from), SIZE),
        last_missing: SegmentName::containing(timeline, lsn_at(to), SIZE),
        from: lsn_at(from),
        to: lsn_at(to),
        kept_incomplete: false,
        known_by: KnownBy::LaterWal,
        ledger: vec![],
        expired,
    }
}

fn timeline(number: u32) -> TimelineInfo {
    TimelineInfo {
        timeline: tli(number),
        parent: None,
        begin_lsn: None,
        has_history: true,
        segments: 8640,
        stored_bytes: 61 << 30,
        first_segment: SegmentName::from_number(tli(number), 30_000, SIZE),
        last_segment: SegmentName::from_number(tli(number), 39_000, SIZE),
        tail: None,
        stranded: vec![],
        windows: vec![],
        gaps: vec![],
        restore_points: vec![],
        segments_not_looked_at: 0,
    }
}

fn drill(minutes: i64, outcome: &str, recovery: Option<u64>) -> Entry {
    Entry {
        kind: Deed::Drill,
        id: format!("{}-{minutes:016x}", time_at(minutes).format("%Y%m%dT%H%M%SZ")),
        started: time_at(minutes),
        millis: Some(754_000),
        host: Some("backup1".into()),
        user: Some("postgres".into()),
        reason: Some("monthly drill".into()),
        outcome: outcome.into(),
        problems: if outcome == "proven" {
            vec![]
        } else {
            vec!["SQL checks: 1 of 2 did not pass: orders.sql".into()]
        },
        target: Some("--latest".into()),
        what: None,
        backup: None,
        bytes: 48 << 30,
        recovery_millis: recovery,
    }
}

/// A verification of one repository; those of one run have one id.
fn verification(minutes: i64, outcome: VerifyOutcome, bucket: &str) -> VerifyRecord {
    VerifyRecord {
        head: RecordHead {
            format: 1,
            id: format!("{}-{minutes:016x}", time_at(minutes).format("%Y%m%dT%H%M%SZ")),
            started: time_at(minutes),
            host: "backup1".into(),
            user: "postgres".into(),
            reason: None,
        },
        millis: 1000,
        repository: format!("s3://{bucket}/prefix"),
        scope: "the whole lineage".into(),
        whole: true,
        outcome,
        problems: if outcome == VerifyOutcome::Damaged {
            vec!["a segment is damaged".into()]
        } else {
            vec![]
        },
        problems_total: 0,
        objects: 812,
        bytes: 1,
        objects_left: 0,
        proven_since: (outcome == VerifyOutcome::Sound).then(|| time_at(minutes)),
        backups: vec![],
        unreachable: 0,
        standing: None,
    }
}

/// What is on record in two repositories.
fn in_each(records: [Vec<VerifyRecord>; 2]) -> Vec<(String, Vec<VerifyRecord>)> {
    let [one, two] = records;
    vec![("s3://one/prefix".to_owned(), one), ("s3://two/prefix".to_owned(), two)]
}

fn status(info: Info, history: Vec<Entry>) -> Status {
    let shown = info.lineages.iter().find(|lineage| lineage.number == info.lineage).unwrap().clone();
    Status {
        cluster: info.cluster.clone(),
        asked: info.asked,
        limits: Limits {
            objectives: Objectives {
                recovery_time: Some(Duration::from_secs(900)),
                recovery_point: Some(Duration::from_secs(300)),
            },
            ..Limits::default()
        },
        lineages: vec![LineageStatus {
            lineage: shown,
            info,
            history,
            verifications: vec![],
            more_history: false,
            notes: vec![],
        }],
        not_read: vec![],
    }
}

async fn empty() -> Info {
    let mut info = info(None).await;
    (info.timelines, info.backups, info.holds) = (vec![], vec![], vec![]);
    (info.open_gaps, info.asked, info.lineages) = (vec![], now(), vec![lineage(1)]);
    info.repository = "s3://backups/walship/main/0001".into();
    info
}

/// A month of daily backups, a failover, a gap; drills, a restore, a hold.
pub(super) async fn month() -> Status {
    const DAY: i64 = 1440;
    let like = catalog().backups.remove(0);
    let mut info = empty().await;
    let (mut old, mut new) = (timeline(1), timeline(2));
    old.windows = vec![
        window(tli(1), 31 * DAY, 19 * DAY + 300, 12, WindowEnd::Gap),
        window(tli(1), 19 * DAY, 6 * DAY + 40, 13, WindowEnd::EndOfArchive),
    ];
    old.gaps =
        vec![gap(tli(1), 38 * DAY, 31 * DAY + 12, true), gap(tli(1), 19 * DAY + 300, 19 * DAY + 270, false)];
    let point = |minutes: i64, name: &str| RestorePoint {
        name: name.into(),
        time: time_at(minutes),
        lsn: lsn_at(minutes),
    };
    old.restore_points = vec![point(12 * DAY, "before release 4.2")];
    (new.parent, new.begin_lsn) = (Some(tli(1)), Some(lsn_at(6 * DAY + 40)));
    new.windows = vec![window(tli(2), 19 * DAY, 2, 19, WindowEnd::EndOfArchive)];
    new.restore_points = vec![point(2 * DAY, "before migration"), point(400, "nightly batch")];
    new.tail = Some(TailInfo {
        tail: StoredTail {
            segment: SegmentName::containing(tli(2), lsn_at(2), SIZE),
            until_lsn: lsn_at(1),
            end_lsn: lsn_at(1),
            parts: 14,
            stored_bytes: 3 << 20,
            flaw: None,
            lost_from: None,
        },
        is_end: true,
    });
    info.timelines = vec![old, new];
    let mut full: Option<BackupRecord> = None;
    for day in (0..=31).rev() {
        let on = if day >= 7 { tli(1) } else { tli(2) };
        let parent = full.as_ref().filter(|full| day % 7 != 3 && full.timeline == on);
        let mut made = backup(on, day * DAY + 500, parent, &like);
        if day == 9 {
            made.damaged_pages = Some(DamagedPages { total: 2, pages: vec![] });
        }
        if made.parent.is_none() {
            full = Some(made.clone());
        }
        info.backups.push(made);
    }
    info.unfinished_backups =
        vec![UnfinishedBackup { id: "20261115T020000Z-00000000000000aa".into(), started: time_at(12 * DAY) }];
    info.holds = vec![Hold {
        format: 1,
        id: "20261120T080000Z-00000000000000bb".into(),
        backup: info.backups[20].id.clone(),
        with: vec![],
        reason: "audit 2026-17".into(),
        until: Some(now() + TimeDelta::days(34)),
        wal: None,
        created: time_at(7 * DAY),
        host: "db1".into(),
        user: "anna".into(),
    }];
    let restore = Entry {
        kind: Deed::Restore,
        outcome: "recovered".into(),
        target: Some("--to-xid 731 --exclusive".into()),
        problems: vec![],
        ..drill(9 * DAY, "proven", Some(410_000))
    };
    let history = vec![
        drill(DAY, "proven", Some(600_800)),
        Entry {
            kind: Deed::Extract,
            outcome: "delivered".into(),
            what: Some("public.orders of database shop, into db1".into()),
            ..drill(3 * DAY, "proven", None)
        },
        drill(8 * DAY, "objective_missed", Some(1_200_000)),
        restore,
        drill(15 * DAY, "not_proven", Some(700_000)),
        drill(22 * DAY, "proven", Some(720_000)),
    ];
    status(info, history)
}

/// Three years, a backup each day, and as many gaps.
pub(super) async fn years() -> Status {
    const DAY: i64 = 1440;
    let like = catalog().backups.remove(0);
    let mut info = empty().await;
    let mut only = timeline(1);
    for day in (0..60).rev() {
        let from = day * 18 * DAY;
        only.windows.push(window(
            tli(1),
            from + 17 * DAY,
            from + 20,
            17,
            if day == 0 { WindowEnd::EndOfArchive } else { WindowEnd::Gap },
        ));
    }
    for hours in (0..1000).rev() {
        only.gaps.push(gap(tli(1), (hours * 25 + 80) * 60, (hours * 25 + 79) * 60, hours % 9 == 0));
    }
    for number in 0..800 {
        only.restore_points.push(RestorePoint {
            name: format!("point {number}"),
            time: time_at((800 - number) * 900),
            lsn: lsn_at((800 - number) * 900),
        });
    }
    info.timelines = vec![only];
    for day in (0..1000).rev() {
        let parent = info.backups.last().filter(|_| day % 7 != 0).cloned();
        let made = backup(tli(1), day * DAY + 500, parent.as_ref(), &like);
        info.backups.push(made);
    }
    info.backups.truncate(999);
    info.orphaned_backups = vec![OrphanedBackup {
        id: "20261115T020000Z-00000000000000aa".into(),
        finished: time_at(12 * DAY),
        missing: "20261114T020000Z-00000000000000aa".into(),
        wal: like.wal(),
    }];
    let history = (0..100).map(|number| {
        drill(number * 10 * DAY, if number % 5 == 0 { "not_proven" } else { "proven" }, Some(650_000))
    });
    status(info, history.collect())
}

/// One hour, and a server that is asked.
pub(super) async fn hour() -> Status {
    let like = catalog().backups.remove(0);
    let mut info = empty().await;
    let mut only = timeline(1);
    only.windows = vec![window(tli(1), 55, 0, 1, WindowEnd::EndOfArchive)];
    info.timelines = vec![only];
    info.backups = vec![backup(tli(1), 55, None, &like)];
    info.server = Some(ServerInfo::compare(&catalog(), &position()));
    status(info, vec![drill(20, "proven", Some(41_000))])
}

/// Names that would be more than names.
pub(super) async fn hostile() -> Status {
    let evil = "</title><script>alert('1')</script>\" onload=\"x\u{1b}[2J";
    let mut status = month().await;
    status.cluster = evil.into();
    let not_read = (lineage(7), evil.to_owned());
    status.not_read.push(not_read);
    let mut older = hour().await.lineages.remove(0);
    older.lineage.number = 2;
    let current = &mut status.lineages[0];
    current.notes.push(evil.into());
    let info = &mut current.info;
    info.repository = evil.into();
    for backup in &mut info.backups {
        backup.id = format!("{evil}{}", backup.id);
        backup.label = evil.into();
    }
    (info.holds[0].reason, info.holds[0].user, info.holds[0].host) = (evil.into(), evil.into(), evil.into());
    info.timelines[1].restore_points[0].name = evil.repeat(400);
    let mut failing = ServerInfo::problem(evil.into());
    failing.archiver = Some(position().archiver);
    failing.archiver.as_mut().unwrap().failing_wal = Some(evil.into());
    failing.slots = position().slots;
    failing.slots[0].name = evil.into();
    info.server = Some(failing);
    for entry in &mut current.history {
        entry.id = evil.into();
        (entry.user, entry.host, entry.reason) =
            (Some(evil.into()), Some(evil.into()), Some(evil.repeat(100)));
        (entry.outcome, entry.problems) = (evil.into(), vec![evil.into(); 20]);
        (entry.target, entry.what) = (Some(evil.into()), Some(evil.into()));
    }
    status.lineages.push(older);
    status
}

#[tokio::test]
async fn a_page_reads_well() {
    let mut info = info(Some(ServerInfo::compare(&catalog(), &position()))).await;
    info.repository = "memory:/main/0001".into();
    insta::assert_snapshot!(
        "page",
        html(&status(info, vec![])).replace(env!("CARGO_PKG_VERSION"), "VERSION")
    );
}

#[tokio::test]
async fn nothing_of_a_name_becomes_part_of_the_page() {
    let page = html(&hostile().await);
    assert_sound(&page);
    for hostile in ["<script", "\u{1b}", "onload=\"", "alert('"] {
        assert!(!page.contains(hostile), "{hostile}");
    }
    assert!(page.contains("&lt;script&gt;alert(&#39;1&#39;)"));
}

#[tokio::test]
async fn every_page_is_sound_and_has_an_end() {
    for (name, status, bytes_max) in [
        ("empty", status(empty().await, vec![]), 20_000),
        ("hour", hour().await, 30_000),
        ("month", month().await, 120_000),
        ("years", years().await, 700_000),
        ("hostile", hostile().await, 900_000),
    ] {
        let page = html(&status);
        assert_sound(&page);
        assert!(page.len() < bytes_max, "{name}: {}", page.len());
        // Nothing is drawn outside.
        let rects = page.split("<rect ").skip(1).filter_map(|rest| rest.split('>').next());
        for rect in rects.filter(|rect| rect.contains('%')) {
            let number = |name: &str| percent_of(rect, name);
            assert!(number("x") >= 0.0 && number("x") + number("width") <= 100.02, "{name}: {rect:.200}");
        }
    }
}

#[tokio::test]
async fn what_is_wrong_is_said_first() {
    let word = |status: &Status| {
        let page = html(status);
        page.split("<h1>").nth(1).unwrap().split("</h1>").next().unwrap().to_owned()
    };
    let judged = |status: &Status| health::judge(&status.lineages[0], &status.limits);
    let nothing = status(empty().await, vec![]);
    assert!(word(&nothing).contains("something is wrong"), "{}", word(&nothing));
    assert!(judged(&nothing).findings[0].what.contains("no complete backup"));
    let mut good = hour().await;
    good.lineages[0].info.server = None;
    use VerifyOutcome::{Damaged, Partly, Sound, Unread};
    let verified = |outcome: VerifyOutcome| {
        in_each([vec![verification(40, Sound, "one")], vec![verification(40, outcome, "two")]])
    };
    for (outcome, tone) in [(Partly, Tone::Soft), (Unread, Tone::Warn), (Damaged, Tone::Bad)] {
        good.lineages[0].verifications = verified(outcome);
        let judged = judged(&good);
        let figure = judged.figures.iter().find(|figure| figure.name == "Last verification").unwrap();
        assert_eq!((&*figure.value, figure.tone), (outcome.word(), tone), "the worst repository");
        assert_eq!(judged.findings.is_empty(), tone == Tone::Soft, "{:?}", judged.findings);
    }
    // Damage stands until what was damaged is proven: neither by what was read elsewhere, nor by another part.
    let damaged = || verification(40, Damaged, "two");
    for (one, two, tone) in [
        (vec![verification(5, Sound, "one")], vec![damaged()], Tone::Bad),
        (vec![], vec![verification(5, Partly, "two"), damaged()], Tone::Bad),
        (vec![], vec![verification(5, Sound, "two"), damaged()], Tone::Good),
        // It has moved since.
        (vec![], vec![verification(5, Partly, "two"), verification(40, Damaged, "before")], Tone::Bad),
        (vec![], vec![verification(5, Sound, "two"), verification(40, Damaged, "before")], Tone::Good),
    ] {
        good.lineages[0].verifications = in_each([one, two]);
        assert_eq!(judged(&good).tone(), tone, "{:?}", judged(&good).findings);
    }
    // What is known to be damaged is told whatever the last one was to read.
    let standing = Some(StandingDamage { places: 3, since: Some(time_at(1)), others: 0 });
    let knowing = VerifyRecord { standing, ..verification(5, Sound, "one") };
    good.lineages[0].verifications = in_each([vec![knowing], vec![verification(5, Sound, "two")]]);
    let found = judged(&good).findings;
    assert!(
        found.iter().any(|one| one.tone == Tone::Bad
            && one.what.contains("s3://one/prefix damage is known")
            && one.what.contains("3 objects")),
        "{found:?}"
    );
    good.lineages[0].verifications = verified(Sound);
    // As the configuration has it, not after a number of hours of its own.
    for (limit, tone) in [(3600, Tone::Good), (3000, Tone::Warn), (1600, Tone::Bad)] {
        good.limits.watch.backup_overdue.0 = Some(Duration::from_secs(limit));
        assert_eq!(judged(&good).tone(), tone, "{limit}");
    }
    good.limits.watch = Default::default();
    assert!(word(&good).contains("in order"), "{:?}", judged(&good).findings);
    // The newest commit is older than the objective: what that means the server tells.
    let info = &mut good.lineages[0].info;
    info.timelines[0].windows[0].latest_age_seconds = Some(301);
    assert_eq!(judged(&good).tone(), Tone::Warn);
    for (behind, tone) in [(0, Tone::Good), (1 << 20, Tone::Bad)] {
        let mut server = ServerInfo::compare(&catalog(), &position());
        (server.behind_bytes, server.behind_segments, server.archiver) = (Some(behind), Some(0), None);
        good.lineages[0].info.server = Some(server);
        assert_eq!(judged(&good).tone(), tone, "{behind}: {:?}", judged(&good).findings);
    }
    // A gap behind which no backup was taken keeps the end out of reach.
    let mut cut = hour().await;
    let only = &mut cut.lineages[0].info.timelines[0];
    only.windows[0].window.ended_by = WindowEnd::Gap;
    only.gaps = vec![gap(tli(1), 30, 25, false)];
    let judged_cut = judged(&cut);
    assert_eq!(judged_cut.tone(), Tone::Bad);
    assert!(
        judged_cut.findings.iter().any(|finding| finding.next.contains("walship backup")),
        "{judged_cut:?}"
    );
    let mut undrilled = hour().await;
    (undrilled.lineages[0].history, undrilled.lineages[0].info.server) = (vec![], None);
    assert!(word(&undrilled).contains("not all is known"));
    let mut failed = hour().await;
    failed.lineages[0].info.server = None;
    failed.lineages[0].history = vec![drill(5, "not_proven", None), drill(20, "proven", Some(41_000))];
    assert!(judged(&failed).findings[0].what.contains("not proven"));
    // The time of recovery is that of the last drill that got so far.
    let figures = judged(&failed).figures;
    assert!(
        figures.iter().any(|figure| figure.name == "Recovery time" && figure.value == "41 s"),
        "{figures:?}"
    );
}

#[tokio::test]
async fn a_gap_lies_between_the_moments_that_are_known() {
    let status = month().await;
    let info = &status.lineages[0].info;
    let clock = clock::Clock::of(info, &info.timelines[0]);
    let gap = &info.timelines[0].gaps[1];
    let (before, behind) = (clock.before(gap.from).unwrap(), clock.behind(gap.to).unwrap());
    assert!(before <= time_at(19 * 1440 + 300) && behind >= time_at(19 * 1440 + 270), "{before} {behind}");
    // Behind the fork the parent's records are another way's.
    let other = clock::Clock::of(info, &info.timelines[1]);
    assert_eq!(other.behind(Lsn(lsn_at(0).0 + 1)), None);
    assert!(other.before(lsn_at(20 * 1440)).is_some());
}
