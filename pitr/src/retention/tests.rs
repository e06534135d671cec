use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};
use walship::catalog::{GapCause, GapKind, GapRecord, HeldWal, Hold};
use walship::config::RetentionSettings;
use walship::pg::{Lsn, SegmentName, TimelineId};

use super::*;
use crate::plan::tests::{SIZE, World, at, commit, tli};
use crate::plan::{Outcome, PlanOptions, WindowEnd, gaps_of, windows};
use crate::target::{RecoveryTarget, TargetKind, TimelineChoice, Zone};

pub(super) const HOUR: i64 = 3_600_000_000;
pub(super) const DAY: i64 = 24 * HOUR;

pub(super) fn policy(settings: RetentionSettings) -> Policy {
    Policy::of(&settings).unwrap()
}

fn window(text: &str) -> RetentionSettings {
    RetentionSettings { window: Some(text.parse().unwrap()), ..RetentionSettings::default() }
}

fn records(plan: &RetentionPlan) -> Vec<GapRecord> {
    let record = |(at_, wal): (usize, &RemovedWal)| GapRecord {
        format: 1,
        id: format!("20270101T000000Z-{at_:016x}"),
        timeline: wal.timeline,
        start_lsn: wal.start_lsn,
        end_lsn: wal.end_lsn,
        cause: GapCause { kind: GapKind::Expired, text: "test".into() },
        segment_digest: None,
        recorded: at(0),
        host: "db1".into(),
        user: "postgres".into(),
    };
    plan.wal_removed.iter().enumerate().map(record).collect()
}

/// A history of one timeline: a backup at each of `backups` (days), a commit an hour and 100 KiB of WAL for each.
fn world(days: i64, backups: &[i64]) -> World {
    let mut world = World::new();
    for hour in 0..days * 24 {
        let micros = hour * HOUR;
        if hour % 24 == 0 && backups.contains(&(hour / 24)) {
            add_backup(&mut world, tli(1), micros, &format!("b{}", hour / 24));
        }
        world.push(tli(1), 64, commit(1000 + hour as u32, micros + HOUR / 2));
        world.push(tli(1), 100_000, None);
    }
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    world
}

/// Takes a backup of three records that is complete at `micros`.
pub(super) fn add_backup(world: &mut World, timeline: TimelineId, micros: i64, id: &str) {
    let start = world.end(timeline);
    let checkpoint = crate::plan::tests::checkpoint(start, micros - 60_000_000);
    world.push(timeline, 200, checkpoint);
    world.push(timeline, 200, None);
    let stop = world.end(timeline);
    world.backup_record(id, timeline, start, stop);
    let record = world.catalog.backups.iter_mut().find(|backup| backup.id == id).unwrap();
    (record.started, record.finished) = (at(micros - 60_000_000), at(micros));
}

pub(super) fn seen(world: &World) -> Seen {
    let last = |records: &Vec<crate::plan::tests::WalRecord>| {
        records.iter().rev().find_map(|record| record.event.as_ref()?.kind.stop_time())
    };
    let last_times = world.records.iter().filter_map(|(timeline, records)| Some((*timeline, last(records)?)));
    let left = |timeline: TimelineId| {
        let lsn =
            world.catalog.histories.values().filter_map(|history| history.switch_lsn_of(timeline)).max()?;
        let before = world.records[&timeline].iter().filter(|record| record.lsn < lsn).cloned().collect();
        Some((timeline, last(&before)?))
    };
    let left_times = world.records.keys().filter_map(|timeline| left(*timeline)).collect();
    Seen { last_times: last_times.collect(), left_times, ..Seen::default() }
}

pub(super) fn begun(id: &str, start: Option<BegunAt>, last_written: Option<i64>) -> Begun {
    Begun { id: id.into(), start, last_written: last_written.map(at), complete: false, was_finishing: false }
}

pub(super) fn planned(world: &World, seen: &Seen, policy: &Policy, now: DateTime<Utc>) -> RetentionPlan {
    retain(&world.catalog, seen, policy, now, CLOCK_MARGIN)
}

pub(super) fn kept(plan: &RetentionPlan) -> Vec<&str> {
    plan.backups_kept.iter().map(|backup| &*backup.id).collect()
}

pub(super) fn carried_out(world: &World, plan: &RetentionPlan) -> World {
    let mut world = world.clone();
    world.catalog = after(&world.catalog, plan, &records(plan));
    world
}

pub(super) fn time(micros: i64) -> RecoveryTarget {
    RecoveryTarget::new(TargetKind::Time { time: at(micros), zone: Zone::Utc })
}

pub(super) fn reaches(world: &World, target: &RecoveryTarget, backup: Option<&str>) -> Option<Lsn> {
    match world.outcome(target, &PlanOptions { backup: backup.map(str::to_owned) }) {
        Outcome::Plan(plan) => Some(plan.stop.final_lsn),
        _ => None,
    }
}

#[test]
fn a_window_keeps_what_it_begins_with_and_nothing_before() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let plan = planned(&world, &seen(&world), &policy(window("10 days")), at(30 * DAY));
    assert_eq!(kept(&plan), ["b28", "b21", "b14"], "{plan:#?}");
    assert_eq!(plan.backups_removed.iter().map(|b| &*b.id).collect::<Vec<_>>(), ["b0", "b7"]);
    let [wal] = &plan.wal_removed[..] else { panic!("{plan:#?}") };
    let base = world.catalog.backups.iter().find(|b| b.id == "b14").unwrap();
    assert_eq!(
        wal.numbers.1,
        base.start_lsn.0 / SIZE.bytes(),
        "all of it, up to the backup's own first segment"
    );
    assert!(wal.segments > 10 && plan.wal_kept[0].segments > 10);

    let after = carried_out(&world, &plan);
    assert!(reaches(&after, &time(20 * DAY), None).is_some());
    assert_eq!(reaches(&after, &time(10 * DAY), None), None);
    let history = after.catalog.history(tli(1)).unwrap();
    assert_eq!(gaps_of(&after.catalog, &history), [], "what was expired at the beginning is no gap");
    assert_eq!(windows(&after.catalog, tli(1), &[]).len(), 1);
    assert!(
        planned(&after, &seen(&after), &policy(window("10 days")), at(30 * DAY)).is_empty(),
        "once is enough"
    );
}

#[test]
fn backups_are_kept_by_number_age_and_rotation() {
    let daily: Vec<i64> = (0..60).collect();
    let world = world(60, &daily);
    let now = at(59 * DAY + HOUR);
    let keep = |settings: RetentionSettings| {
        let plan = planned(&world, &seen(&world), &policy(settings), now);
        kept(&plan).into_iter().map(|id| id[1..].parse().unwrap()).collect::<Vec<i64>>()
    };
    let none = RetentionSettings::default;
    assert_eq!(keep(RetentionSettings { keep_last: Some(3), ..none() }), [59, 58, 57]);
    assert_eq!(keep(RetentionSettings { keep_for: Some("2 days".parse().unwrap()), ..none() }), [59, 58]);
    assert_eq!(keep(RetentionSettings { keep_daily: Some(2), ..none() }), [59, 58]);
    // 2026-03-01, a Sunday, is day 0: weeks end on days 0, 7, 14...; March has 31 days.
    assert_eq!(keep(RetentionSettings { keep_weekly: Some(3), ..none() }), [59, 56, 49]);
    assert_eq!(keep(RetentionSettings { keep_monthly: Some(2), ..none() }), [59, 30]);
    assert_eq!(keep(RetentionSettings { keep_yearly: Some(5), ..none() }), [59]);
    assert_eq!(
        keep(RetentionSettings { keep_monthly: Some(2), keep_last: Some(2), ..window("3 days") }),
        [59, 58, 57, 56, 30],
        "rules add up"
    );
}

#[test]
fn the_newest_of_an_hour_and_of_a_year_stays() {
    let keep = |ends: &[(&str, i64)], settings: RetentionSettings| {
        let mut world = World::new();
        for (id, micros) in ends {
            add_backup(&mut world, tli(1), *micros, id);
            world.push(tli(1), 64, commit(1000, *micros + 1000));
        }
        world.push(tli(1), 2 * SIZE.bytes(), None);
        world.archive(tli(1));
        let now = at(ends.last().unwrap().1 + HOUR / 2);
        let plan = planned(&world, &seen(&world), &policy(settings), now);
        kept(&plan).into_iter().map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    let hourly = |count: u32| RetentionSettings { keep_hourly: Some(count), ..RetentionSettings::default() };
    let yearly = |count: u32| RetentionSettings { keep_yearly: Some(count), ..RetentionSettings::default() };
    // Time begins at noon, 2026-03-01: 12:10, 12:59:59.999999, 13:00, 13:40, nothing from 14:00 to 15:59, 16:20.
    let minute = HOUR / 60;
    let day = [
        ("12:10", 10 * minute),
        ("12:59", HOUR - 1),
        ("13:00", HOUR),
        ("13:40", 100 * minute),
        ("16:20", 260 * minute),
    ];
    assert_eq!(keep(&day, hourly(1)), "16:20");
    assert_eq!(keep(&day, hourly(2)), "16:20 13:40", "hours without a backup do not count");
    assert_eq!(keep(&day, hourly(3)), "16:20 13:40 12:59");
    assert_eq!(keep(&day, hourly(100)), "16:20 13:40 12:59");
    // The same hour of another day is another hour, and so it is of another year.
    let days = [("first", 10 * minute), ("second", DAY + 10 * minute), ("third", 365 * DAY + 10 * minute)];
    assert_eq!(keep(&days, hourly(5)), "third second first");
    assert_eq!(keep(&days, yearly(5)), "third second");
    // 2026 ends 305 days and 12 hours later; nothing was taken in 2028.
    let end = 305 * DAY + 12 * HOUR;
    let years = [
        ("2026-03", 0),
        ("2026-12", end - 1),
        ("2027-01", end),
        ("2027-12", end + 365 * DAY - HOUR),
        ("2029-06", end + 3 * 366 * DAY - 200 * DAY),
    ];
    assert_eq!(keep(&years, yearly(1)), "2029-06");
    assert_eq!(keep(&years, yearly(2)), "2029-06 2027-12");
    assert_eq!(keep(&years, yearly(3)), "2029-06 2027-12 2026-12");
    assert_eq!(keep(&years, yearly(0x7fff_ffff)), "2029-06 2027-12 2026-12");
}

#[test]
fn between_kept_backups_wal_goes_and_is_shown_as_expired() {
    let daily: Vec<i64> = (0..60).collect();
    let world = world(60, &daily);
    let settings = RetentionSettings { keep_monthly: Some(3), ..window("3 days") };
    let plan = planned(&world, &seen(&world), &policy(settings), at(59 * DAY + HOUR));
    let after = carried_out(&world, &plan);
    let history = after.catalog.history(tli(1)).unwrap();
    let gaps = gaps_of(&after.catalog, &history);
    assert_eq!(gaps.iter().map(|gap| gap.expired).collect::<Vec<_>>(), [true]);
    let windows = windows(&after.catalog, tli(1), &[]);
    assert_eq!(
        windows.iter().map(|w| w.ended_by).collect::<Vec<_>>(),
        [WindowEnd::Expired, WindowEnd::EndOfArchive]
    );
    let immediate = RecoveryTarget::new(TargetKind::Immediate);
    assert!(reaches(&after, &immediate, Some("b30")).is_some());
    // WAL that is lost besides is told apart.
    let mut lost = after.clone();
    let name = lost.catalog.segments.runs(tli(1)).last().unwrap().first.next(SIZE).unwrap();
    lost.catalog.segments.remove(&name);
    let gaps = gaps_of(&lost.catalog, &history);
    assert_eq!(gaps.iter().map(|gap| gap.expired).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_window_longer_than_the_archive_keeps_everything() {
    let world = world(10, &[1, 5]);
    let plan = planned(&world, &seen(&world), &policy(window("30 days")), at(10 * DAY));
    assert!(plan.is_empty(), "{plan:#?}");
    assert!(plan.notes.iter().any(|note| note.contains("longer than the archive")), "{plan:#?}");
}

#[test]
fn holds_keep_a_backup_until_they_end() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let hold = |until: Option<i64>, wal: Option<HeldWal>| Hold {
        format: 1,
        id: "20260301T000000Z-0000000000000000".into(),
        backup: "b0".into(),
        with: vec![],
        reason: "audit".into(),
        until: until.map(at),
        wal,
        created: at(0),
        host: "db1".into(),
        user: "dba".into(),
    };
    let with = |hold: Hold| {
        let seen = Seen { holds: vec![hold], ..seen(&world) };
        planned(&world, &seen, &policy(window("10 days")), at(30 * DAY))
    };
    assert!(kept(&with(hold(None, None))).contains(&"b0"));
    assert!(kept(&with(hold(Some(31 * DAY), None))).contains(&"b0"));
    assert!(!kept(&with(hold(Some(29 * DAY), None))).contains(&"b0"));
    let wal = HeldWal {
        timeline: tli(1),
        start_lsn: None,
        through_lsn: Some(Lsn(world.catalog.backups[1].start_lsn.0)),
    };
    let after = carried_out(&world, &with(hold(None, Some(wal))));
    assert!(reaches(&after, &time(5 * DAY), None).is_some(), "held WAL leads there");
    assert_eq!(reaches(&after, &time(9 * DAY), None), None);
}

#[test]
fn running_backups_keep_their_wal_and_given_up_ones_go() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let start_lsn = world.catalog.backups[1].start_lsn;
    let begun_at = |started: i64| BegunAt { timeline: tli(1), start_lsn, started: at(started) };
    let told = |id: &str, started: i64, written: i64| begun(id, Some(begun_at(started)), Some(written));
    let with = |begun: Begun, expiring: &[&str]| {
        let expiring = expiring.iter().map(|id| (*id).to_owned()).collect();
        let seen = Seen { recordless: vec![begun], expiring, ..seen(&world) };
        planned(&world, &seen, &policy(window("10 days")), at(30 * DAY))
    };
    let running = [
        told("new", 29 * DAY, 29 * DAY),
        // It says that it is old, and the store that something came a moment ago.
        told("slow", 2 * DAY, 29 * DAY),
        // A store without a clock tells nothing of its age.
        begun("untold", Some(begun_at(2 * DAY)), None),
        Begun { complete: true, ..told("complete", 2 * DAY, 2 * DAY) },
    ];
    for one in running {
        let (id, plan) = (one.id.clone(), with(one, &[]));
        assert_eq!(plan.wal_removed[0].end_lsn.0 / SIZE.bytes(), start_lsn.0 / SIZE.bytes(), "{id}");
        assert!(kept(&plan).contains(&&*id));
    }
    for plan in [with(told("old", 2 * DAY, 2 * DAY), &[]), with(told("new", 29 * DAY, 29 * DAY), &["new"])] {
        assert!(plan.wal_removed[0].end_lsn > start_lsn);
        assert_eq!(plan.backups_removed.len(), 3);
    }
    let half_removed = with(begun("half", None, None), &[]);
    assert!(half_removed.backups_removed.iter().any(|backup| backup.id == "half"));
}

#[test]
fn what_others_have_taken_over_of_a_backup_that_did_not_complete_stays() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let start =
        BegunAt { timeline: tli(1), start_lsn: world.catalog.backups[1].start_lsn, started: at(2 * DAY) };
    let at_day =
        |id: &str, day: i64| begun(id, Some(BegunAt { started: at(day * DAY), ..start }), Some(day * DAY));
    let with = |world: &World, lenders: &[(&str, &str)], recordless: Vec<Begun>| {
        let lent =
            |(taker, lender): &(&str, &str)| ((*taker).to_owned(), BTreeSet::from([(*lender).to_owned()]));
        let seen = Seen { lenders: lenders.iter().map(lent).collect(), recordless, ..seen(world) };
        planned(world, &seen, &policy(window("10 days")), at(30 * DAY))
    };
    let old = || vec![at_day("old", 2)];
    assert!(!kept(&with(&world, &[], old())).contains(&"old"));
    assert!(!kept(&with(&world, &[("b0", "old")], old())).contains(&"old"), "its taker goes as well");
    let plan = with(&world, &[("b21", "old")], old());
    assert!(kept(&plan).contains(&"old"));
    assert!(plan.wal_removed[0].end_lsn > start.start_lsn, "its WAL is nobody's");
    let both = vec![at_day("old", 2), at_day("new", 29)];
    assert!(kept(&with(&world, &[], both)).contains(&"old"), "one under way may take it over");
    let mut orphaned = world.clone();
    orphaned.catalog.orphaned_backups.push(walship::catalog::OrphanedBackup {
        id: "orphan".into(),
        finished: at(0),
        missing: "gone".into(),
        wal: world.catalog.backups[1].wal(),
    });
    assert!(!kept(&with(&orphaned, &[], old())).contains(&"old"));
    assert!(
        kept(&with(&orphaned, &[("orphan", "old")], old())).contains(&"old"),
        "orphans stay, with theirs"
    );
}

#[test]
fn a_complete_backup_stays_while_others_have_its_objects() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let with = |lenders: &[(&str, &str)], parents: &[(&str, &str)], recordless: Vec<Begun>| {
        let mut lent: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (taker, lender) in lenders {
            lent.entry((*taker).to_owned()).or_default().insert((*lender).to_owned());
        }
        let parents = parents.iter().map(|(id, parent)| ((*id).to_owned(), (*parent).to_owned())).collect();
        let seen = Seen { lenders: lent, parents, recordless, ..seen(&world) };
        planned(&world, &seen, &policy(window("5 days")), at(30 * DAY))
    };
    assert_eq!(kept(&with(&[], &[], vec![])), ["b28", "b21"]);
    // b0 was being taken when b21 took its objects over, and completed later; and b7 builds on what b0 has.
    let plan = with(&[("b21", "b0")], &[], vec![]);
    assert_eq!(kept(&plan), ["b28", "b21", "b0"]);
    let after = carried_out(&world, &plan);
    let immediate = RecoveryTarget::new(TargetKind::Immediate);
    assert!(reaches(&after, &immediate, Some("b0")).is_some(), "what stays can be restored");
    assert_eq!(kept(&with(&[("b21", "b14"), ("b7", "b0")], &[("b14", "b7")], vec![])).len(), 5, "and so on");
    // One under way began when b14 was not complete yet.
    let start = BegunAt {
        timeline: tli(1),
        start_lsn: world.catalog.backups[4].start_lsn,
        started: at(14 * DAY - HOUR),
    };
    let slow = with(&[], &[], vec![begun("slow", Some(start), Some(29 * DAY))]);
    assert_eq!(kept(&slow), ["slow", "b28", "b21", "b14"]);
    // What is left of one that was removed becomes complete no more; one that has just become complete takes over no more.
    let rest = with(&[], &[], vec![begun("rest", None, Some(29 * DAY))]);
    assert_eq!(kept(&rest), ["rest", "b28", "b21"]);
    let done = Begun { complete: true, ..begun("done", Some(start), None) };
    assert_eq!(kept(&with(&[("done", "b7")], &[], vec![done])), ["done", "b28", "b21", "b7"]);
}

#[test]
fn incrementals_keep_their_parents_and_count_with_their_full_backup() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let with = |parents: &[(&str, &str)], settings: RetentionSettings| {
        let parents = parents.iter().map(|(id, parent)| ((*id).to_owned(), (*parent).to_owned()));
        let seen = Seen { parents: parents.collect(), ..seen(&world) };
        let plan = planned(&world, &seen, &policy(settings), at(30 * DAY));
        kept(&plan).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let chain = [("b7", "b0"), ("b14", "b7"), ("b28", "b21")];
    assert_eq!(with(&chain, window("10 days")), ["b28", "b21", "b14", "b7", "b0"]);
    let last = |count| RetentionSettings { keep_last: Some(count), ..RetentionSettings::default() };
    assert_eq!(with(&chain, last(1)), ["b28", "b21"], "one full backup with what builds on it");
    assert_eq!(with(&chain, last(2)).len(), 5);
    // Of a rotation the full backup alone stays: b7, without b21.
    let rotated = RetentionSettings { keep_yearly: Some(1), ..RetentionSettings::default() };
    assert_eq!(with(&[("b21", "b14"), ("b28", "b14"), ("b14", "b0")], rotated), ["b28", "b14", "b7", "b0"]);
    // A chain that bites its tail is no reason to go on for ever.
    assert!(!with(&[("b28", "b21"), ("b21", "b28")], window("10 days")).is_empty());
}

#[test]
fn a_timeline_that_was_left_goes_when_nothing_happened_on_it_in_the_window() {
    let mut world = world(20, &[0, 15]);
    world.fork(tli(1), tli(2));
    for hour in 20 * 24..50 * 24_i64 {
        if hour % 240 == 0 {
            add_backup(&mut world, tli(2), hour * HOUR, &format!("c{}", hour / 24));
        }
        world.push(tli(2), 64, commit(5000 + hour as u32, hour * HOUR));
        world.push(tli(2), 50_000, None);
    }
    // The old server went on for a while.
    world.push(tli(1), 64, commit(4000, 20 * DAY));
    world.push(tli(1), 3 * SIZE.bytes(), None);
    world.archive(tli(1));
    world.archive(tli(2));
    let now = at(50 * DAY);
    let plan = planned(&world, &seen(&world), &policy(window("10 days")), now);
    let after = carried_out(&world, &plan);
    assert_eq!(after.catalog.segments.timelines(), BTreeSet::from([tli(2)]), "{plan:#?}");
    assert!(after.catalog.histories.contains_key(&tli(2)));
    // Nothing that is not known to be over goes.
    let unknown = Seen { last_times: BTreeMap::new(), ..seen(&world) };
    let careful = planned(&world, &unknown, &policy(window("10 days")), now);
    assert!(
        kept(&careful).contains(&"b15")
            && carried_out(&world, &careful).catalog.segments.timelines().len() == 2
    );
    // Without the history file nothing is known of where timeline 2 comes from.
    let mut blind = world.clone();
    blind.catalog.histories.clear();
    let plan = planned(&blind, &seen(&blind), &policy(window("10 days")), now);
    assert!(plan.wal_removed.is_empty(), "{plan:#?}");
    assert!(["c20", "c30", "c40"].iter().all(|id| kept(&plan).contains(id)), "{plan:#?}");
}

#[test]
fn policies_that_make_no_sense_are_refused() {
    let refused = |settings: RetentionSettings| Policy::of(&settings).unwrap_err().to_string();
    assert!(refused(RetentionSettings::default()).contains("no policy"));
    let zero = RetentionSettings { keep_last: Some(0), keep_daily: Some(0), ..RetentionSettings::default() };
    assert!(refused(zero).contains("keeps nothing"));
    let short = RetentionSettings { keep_for: Some("7 days".parse().unwrap()), ..window("14 days") };
    assert!(refused(short).contains("contradicts"));
}

#[test]
fn a_clock_that_cannot_be_right_is_refused() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let check = |now: DateTime<Utc>, settings: RetentionSettings, idle: bool| {
        check_clock(&world.catalog, &seen(&world), &policy(settings), now, idle)
    };
    let count = || RetentionSettings { keep_last: Some(2), ..RetentionSettings::default() };
    assert!(check(at(30 * DAY), window("14 days"), false).is_ok());
    let year = Utc.with_ymd_and_hms(2027, 3, 31, 12, 0, 0).unwrap();
    for settings in [window("14 days"), count()] {
        let error = check(year, settings.clone(), false).unwrap_err().to_string();
        assert!(error.contains("2027-03-31"), "{error}");
        assert!(check(year, settings.clone(), true).is_ok(), "the operator knows that it is idle");
        let behind = year - TimeDelta::days(730);
        assert!(
            check(behind, settings, true).is_err(),
            "what comes from the future is no matter of idleness"
        );
    }
    // The shorter the window, the less may be believed.
    assert!(check(at(34 * DAY), window("14 days"), false).is_ok());
    assert!(check(at(34 * DAY), window("2 days"), false).is_err());
}

#[test]
fn backups_that_cannot_be_restored_do_not_count_and_go_no_earlier_than_others() {
    let whole = world(30, &[0, 7, 14, 21, 28]);
    let mut world = whole.clone();
    let broken = world.catalog.backups[3].clone();
    world.catalog.segments.remove(&SegmentName::containing(tli(1), broken.start_lsn, SIZE));
    let settings = || RetentionSettings { keep_last: Some(2), ..RetentionSettings::default() };
    let plan = planned(&world, &seen(&world), &policy(settings()), at(30 * DAY));
    assert_eq!(kept(&plan), ["b28", "b21", "b14"], "b14 in the place of b21, which stays too: {plan:#?}");
    assert!(
        plan.notes.iter().any(|note| note.contains("b21") && note.contains("does not count")),
        "{plan:#?}"
    );
    assert!(check_newest(&world.catalog, &seen(&world), at(30 * DAY)).is_ok());
    // When the rules would let it go if it were whole, it goes.
    let last = RetentionSettings { keep_last: Some(1), ..RetentionSettings::default() };
    assert_eq!(kept(&planned(&world, &seen(&world), &policy(last), at(30 * DAY))), ["b28"]);

    // What it is made of is gone, or that of what it builds on.
    let flawed = |id: &str| Seen {
        flaws: BTreeMap::from([(id.to_owned(), "data/000001.tar is not there".to_owned())]),
        parents: BTreeMap::from([("b28".to_owned(), "b21".to_owned())]),
        ..seen(&whole)
    };
    let plan = planned(&whole, &flawed("b21"), &policy(window("1 days")), at(30 * DAY));
    assert_eq!(kept(&plan), ["b28", "b21", "b14"], "{plan:#?}");
    for id in ["b28", "b21"] {
        let error = check_newest(&whole.catalog, &flawed(id), at(30 * DAY)).unwrap_err().to_string();
        assert!(error.contains("b28") && error.contains("data/000001.tar"), "{error}");
    }
    assert!(check_newest(&whole.catalog, &flawed("b14"), at(30 * DAY)).is_ok());

    // An unmounted or emptied wal/ costs nothing.
    let mut emptied = whole.clone();
    emptied.catalog.segments = walship::catalog::StoredSegments::new(SIZE);
    let error = check_newest(&emptied.catalog, &seen(&emptied), at(30 * DAY)).unwrap_err();
    assert!(matches!(error, walship::Error::Corrupt(_)) && error.to_string().contains("b28"), "{error}");
    let plan = planned(&emptied, &seen(&emptied), &policy(window("10 days")), at(30 * DAY));
    assert_eq!(kept(&plan), ["b28", "b21", "b14"]);
    // A chain that is broken is no newest backup either.
    let mut orphaned = whole.clone();
    orphaned.catalog.orphaned_backups.push(walship::catalog::OrphanedBackup {
        id: "orphan".into(),
        finished: at(29 * DAY),
        missing: "gone".into(),
        wal: whole.catalog.backups[1].wal(),
    });
    assert!(check_newest(&orphaned.catalog, &seen(&orphaned), at(30 * DAY)).is_err());
}

#[test]
fn the_end_of_a_timeline_that_nobody_left_stays_however_old() {
    // Production is idle on timeline 1; a copy has gone on as timeline 2.
    let history = |went_on_days: i64| {
        let mut world = world(20, &[0, 7, 15]);
        world.fork(tli(1), tli(2));
        for hour in 0..went_on_days * 24 {
            world.push(tli(1), 64, commit(4000 + hour as u32, 20 * DAY + hour * HOUR));
            world.push(tli(1), 100_000, None);
        }
        for hour in 20 * 24..60 * 24_i64 {
            if hour % 240 == 0 {
                add_backup(&mut world, tli(2), hour * HOUR, &format!("c{}", hour / 24));
            }
            world.push(tli(2), 64, commit(9000 + hour as u32, hour * HOUR));
            world.push(tli(2), 50_000, None);
        }
        world.push(tli(1), 3 * SIZE.bytes(), None);
        world.archive(tli(1));
        world.archive(tli(2));
        world
    };
    let now = at(60 * DAY);
    let end = |world: &World| {
        let latest = RecoveryTarget {
            timeline: TimelineChoice::Number(tli(1)),
            ..RecoveryTarget::new(TargetKind::Latest)
        };
        reaches(world, &latest, None)
    };
    let world = history(5);
    let plan = planned(&world, &seen(&world), &policy(window("10 days")), now);
    assert!(kept(&plan).contains(&"b15") && !kept(&plan).contains(&"b7"), "{plan:#?}");
    let after = carried_out(&world, &plan);
    assert!(end(&world).is_some());
    assert_eq!(end(&after), end(&world), "it went on for days after it was left: {plan:#?}");
    assert!(planned(&after, &seen(&world), &policy(window("10 days")), now).is_empty(), "once is enough");
    // Nothing is left of it when the copy is what went on: it ended where the other begins.
    let world = history(0);
    let plan = planned(&world, &seen(&world), &policy(window("10 days")), now);
    assert!(!kept(&plan).contains(&"b15"), "{plan:#?}");
    // Unless the copy is over as well, and proves nothing.
    let mut dead = history(0);
    dead.fork(tli(2), tli(3));
    dead.push(tli(3), 64, commit(1, 110 * DAY));
    dead.push(tli(3), 3 * SIZE.bytes(), None);
    dead.archive(tli(3));
    let mut told = seen(&dead);
    let plan = planned(&dead, &told, &policy(window("10 days")), at(110 * DAY));
    assert!(!kept(&plan).contains(&"b15"), "{plan:#?}");
    told.last_times.remove(&tli(3));
    let plan = planned(&dead, &told, &policy(window("10 days")), at(110 * DAY));
    assert!(kept(&plan).contains(&"b15"), "{plan:#?}");
}

pub(super) fn hold_on(backup: &str, wal: Option<HeldWal>) -> Hold {
    Hold {
        format: 1,
        id: "20260301T000000Z-0000000000000000".into(),
        backup: backup.into(),
        with: vec![],
        reason: "audit".into(),
        until: None,
        wal,
        created: at(0),
        host: "db1".into(),
        user: "dba".into(),
    }
}

#[test]
fn a_backup_was_complete_no_earlier_than_the_store_had_it() {
    // The clock of the machine that took b21 was half a month behind; b28's was years ahead.
    let mut world = world(30, &[0, 7, 14, 21, 28]);
    world.catalog.backups[3].finished = at(6 * DAY);
    let now = at(30 * DAY);
    let believed = planned(&world, &seen(&world), &policy(window("10 days")), now);
    assert_eq!(kept(&believed), ["b28", "b21"], "as its record says the window begins with it");
    let days = [0, 7, 14, 21, 28].map(|day| (format!("b{day}"), at(day * DAY)));
    let told = seen(&world);
    let by_store = || Seen { written: days.clone().into(), ..told.clone() };
    let plan = planned(&world, &by_store(), &policy(window("10 days")), now);
    assert_eq!(kept(&plan), ["b28", "b14", "b21"], "{plan:#?}");
    // Nor is it older than others, or as old as it says.
    let last = RetentionSettings { keep_last: Some(2), ..RetentionSettings::default() };
    assert_eq!(kept(&planned(&world, &by_store(), &policy(last), now)), ["b28", "b14", "b21"]);
    let young =
        RetentionSettings { keep_for: Some("10 days".parse().unwrap()), ..RetentionSettings::default() };
    assert_eq!(kept(&planned(&world, &by_store(), &policy(young), now)), ["b28", "b21"]);
    let flawed = |id: &str| Seen {
        flaws: BTreeMap::from([(id.to_owned(), "data/000001.tar is not there".to_owned())]),
        ..by_store()
    };
    world.catalog.backups[4].finished = at(5 * DAY);
    assert!(check_newest(&world.catalog, &flawed("b28"), now).is_err(), "the newest by its WAL");
    assert!(check_newest(&world.catalog, &flawed("b14"), now).is_err(), "the newest by their own clocks");
    assert!(check_newest(&world.catalog, &flawed("b7"), now).is_ok());
}

#[test]
fn a_time_from_the_future_blocks_removals_only_while_it_may_be_right() {
    let mut ahead = world(30, &[0, 7, 14, 21, 28]);
    ahead.catalog.backups[2].finished = at(3000 * DAY);
    let check = |world: &World, seen: &Seen, now: i64| {
        check_clock(&world.catalog, seen, &policy(window("10 days")), at(now), false)
    };
    assert!(check(&ahead, &seen(&ahead), 30 * DAY).is_err(), "nobody says otherwise");
    let written = BTreeMap::from([("b14".to_owned(), at(14 * DAY))]);
    let by_store = Seen { written, ..seen(&ahead) };
    assert!(check(&ahead, &by_store, 30 * DAY).is_ok());
    assert_eq!(
        kept(&planned(&ahead, &by_store, &policy(window("10 days")), at(30 * DAY))),
        ["b14", "b28", "b21"],
        "it counts for as old as the store says"
    );
    assert!(check(&ahead, &by_store, 60 * DAY).is_err(), "an archive that is idle is seen as that");
    // The store says it too: this machine's clock is behind.
    let both = Seen { written: BTreeMap::from([("b14".to_owned(), at(3000 * DAY))]), ..seen(&ahead) };
    assert!(check(&ahead, &both, 30 * DAY).is_err());
    let start = BegunAt { timeline: tli(1), start_lsn: Lsn(0), started: at(3000 * DAY) };
    let sound = world(30, &[0, 7, 14, 21, 28]);
    for (written, right) in [(None, false), (Some(29 * DAY), true)] {
        let seen = Seen { recordless: vec![begun("new", Some(start), written)], ..seen(&sound) };
        assert_eq!(check(&sound, &seen, 30 * DAY).is_ok(), right);
    }
    // A dead timeline's server was ahead; that of the one that is written now is not to be.
    let mut forked = world(20, &[0, 15]);
    forked.fork(tli(1), tli(2));
    forked.push(tli(2), 64, commit(5000, 29 * DAY));
    forked.push(tli(2), 3 * SIZE.bytes(), None);
    forked.archive(tli(2));
    for (timeline, right) in [(1, true), (2, false)] {
        let mut told = seen(&forked);
        told.last_times.insert(tli(timeline), at(3000 * DAY));
        assert_eq!(check(&forked, &told, 30 * DAY).is_ok(), right, "{timeline}");
    }
}

#[test]
fn a_restores_hold_keeps_its_wal_where_the_backup_is_not() {
    let mut world = world(30, &[0, 7, 14, 21, 28]);
    let elsewhere = world.catalog.backups.remove(1);
    let through = Lsn(elsewhere.stop_lsn.0 + 3 * SIZE.bytes());
    let first_kept = |timeline: u32, start_lsn: Option<Lsn>| {
        let through_lsn = Some(through);
        let wal = HeldWal { timeline: tli(timeline), start_lsn, through_lsn };
        let seen = Seen { holds: vec![hold_on("b7", Some(wal))], ..seen(&world) };
        let plan = planned(&world, &seen, &policy(window("10 days")), at(30 * DAY));
        let held = |number: u64| {
            !plan.wal_removed.iter().any(|wal| (wal.numbers.0..wal.numbers.1).contains(&number))
        };
        let (from, until) = (elsewhere.start_lsn.0 / SIZE.bytes(), through.0 / SIZE.bytes());
        assert!((from..=until).all(held) && !held(until + 2), "{plan:#?}");
        world.catalog.segments.names().map(|name| name.number(SIZE)).find(|number| held(*number)).unwrap()
    };
    let stored = world.catalog.segments.names().next().unwrap().number(SIZE);
    assert_eq!(first_kept(1, Some(elsewhere.start_lsn)), elsewhere.start_lsn.0 / SIZE.bytes());
    assert_eq!(first_kept(1, None), stored, "where it does not say from where on, all may be needed");
    // The timeline that it restores to may lie elsewhere too.
    assert_eq!(first_kept(5, Some(elsewhere.start_lsn)), elsewhere.start_lsn.0 / SIZE.bytes());
}

#[test]
fn backups_that_lack_what_they_build_on_keep_the_wal_that_makes_them_consistent() {
    let mut world = world(30, &[0, 7, 14, 21, 28]);
    let orphan = world.catalog.backups.remove(1);
    world.catalog.orphaned_backups.push(walship::catalog::OrphanedBackup {
        id: orphan.id.clone(),
        finished: orphan.finished,
        missing: "gone".into(),
        wal: orphan.wal(),
    });
    let plan = planned(&world, &seen(&world), &policy(window("10 days")), at(30 * DAY));
    let mut after = carried_out(&world, &plan);
    assert!(plan.wal_removed.len() == 2, "before it and behind it: {plan:#?}");
    // What it builds on comes back.
    after.catalog.backups.insert(0, orphan);
    assert!(reaches(&after, &RecoveryTarget::new(TargetKind::Immediate), Some("b7")).is_some());
}

#[test]
fn without_a_window_wal_stays_from_whatever_stays() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let last = || policy(RetentionSettings { keep_last: Some(1), ..RetentionSettings::default() });
    let held = Seen { holds: vec![hold_on("b7", None)], ..seen(&world) };
    let built_on = Seen { parents: BTreeMap::from([("b28".to_owned(), "b7".to_owned())]), ..seen(&world) };
    for seen in [held, built_on] {
        let plan = planned(&world, &seen, &last(), at(30 * DAY));
        let after = carried_out(&world, &plan);
        assert!(kept(&plan).contains(&"b7"));
        for day in [8, 13, 20, 29] {
            assert!(reaches(&after, &time(day * DAY), None).is_some(), "{day}: {plan:#?}");
        }
        assert_eq!(reaches(&after, &time(6 * DAY), None), None);
    }
}

#[test]
fn wal_that_was_to_go_and_is_needed_counts_again_where_nothing_of_it_is_gone() {
    let whole = world(30, &[0, 7, 14, 21, 28]);
    let policy = policy(window("10 days"));
    let plan = planned(&whole, &seen(&whole), &policy, at(30 * DAY));
    let [wal] = &plan.wal_removed[..] else { panic!("{plan:#?}") };
    // Killed between the ledger and the removal, when a hold came.
    let mut killed = carried_out(&whole, &plan);
    killed.catalog.backups = whole.catalog.backups.clone();
    let b7 = &whole.catalog.backups[1];
    let (from, until) = (b7.start_lsn.0 / SIZE.bytes(), b7.stop_lsn.0.div_ceil(SIZE.bytes()) + 1);
    let record = killed.catalog.gaps[0].id.clone();
    let with = |still: &[(u64, u64)], holds: Vec<Hold>| {
        let still_whole = BTreeMap::from([(record.clone(), still.to_vec())]);
        let leftovers = vec![(tli(1), wal.numbers.0, wal.numbers.1)];
        let seen = Seen { holds, still_whole, leftovers, ..seen(&whole) };
        planned(&killed, &seen, &policy, at(30 * DAY))
    };
    let held = || vec![hold_on("b7", None)];
    let plan = with(&[wal.numbers], held());
    let [again] = &plan.counts_again[..] else { panic!("{plan:#?}") };
    assert_eq!(
        (&again.record.id, &again.rest),
        (&record, &vec![(wal.numbers.0, from), (until, wal.numbers.1)])
    );
    assert!(plan.notes.iter().any(|note| note.contains("counts again")), "{plan:#?}");
    // What is needed is there, whatever became of the rest.
    assert_eq!(with(&[(from, until)], held()).counts_again.len(), 1);
    assert!(with(&[(wal.numbers.0, from + 1), (until - 1, wal.numbers.1)], held()).counts_again.is_empty());
    assert!(with(&[wal.numbers], vec![]).counts_again.is_empty(), "nobody needs it");
}

#[test]
fn of_backups_that_did_not_complete_only_those_stay_that_one_under_way_may_have_looked_at() {
    let world = world(200, &[0, 190, 195]);
    let start_lsn = world.catalog.backups[2].start_lsn;
    let remains = |id: String, day: i64| {
        let start = BegunAt { timeline: tli(1), start_lsn, started: at(day * DAY) };
        Begun {
            id,
            start: Some(start),
            last_written: Some(at(day * DAY)),
            complete: false,
            was_finishing: false,
        }
    };
    // One each week, each failed; every other one builds on b190.
    let recordless: Vec<Begun> = (0..28).map(|week| remains(format!("w{week:02}"), 3 + week * 7)).collect();
    let parents = (0..28).step_by(2).map(|week| (format!("w{week:02}"), "b190".to_owned())).collect();
    let with = |mut recordless: Vec<Begun>, id: &str, parent: Option<&str>| {
        recordless.push(remains(id.to_owned(), 199));
        let mut parents: BTreeMap<String, String> = Clone::clone(&parents);
        parents.extend(parent.map(|parent| (id.to_owned(), parent.to_owned())));
        let seen = Seen { recordless, parents, ..seen(&world) };
        let plan = planned(&world, &seen, &policy(window("10 days")), at(200 * DAY));
        let weeks = kept(&plan).into_iter().filter_map(|id| id.strip_prefix('w')?.parse::<u32>().ok());
        weeks.collect::<Vec<u32>>()
    };
    assert_eq!(with(recordless.clone(), "x", None), [13, 15, 17, 19, 21, 23, 25, 27]);
    assert_eq!(with(recordless.clone(), "x", Some("b190")), [12, 14, 16, 18, 20, 22, 24, 26]);
    // One that began a moment later by another machine's clock is no reason to let one of these go.
    let mut later = recordless;
    later.push(Begun { last_written: Some(at(180 * DAY)), ..remains("w99".into(), 199) });
    assert_eq!(with(later, "a", None), [13, 15, 17, 19, 21, 23, 25, 27, 99]);
}

#[test]
fn a_copied_repository_keeps_what_the_original_would() {
    let world = world(400, &[0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 395]);
    let with = |settings: RetentionSettings, written: Option<i64>| {
        let ids = world.catalog.backups.iter().map(|backup| backup.id.clone());
        let written = written.map(|day| ids.map(|id| (id, at(day * DAY))).collect()).unwrap_or_default();
        let seen = Seen { written, ..seen(&world) };
        let plan = planned(&world, &seen, &policy(settings), at(400 * DAY));
        kept(&plan).into_iter().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    for settings in [
        RetentionSettings { keep_monthly: Some(12), keep_yearly: Some(3), ..window("10 days") },
        RetentionSettings { keep_last: Some(3), ..RetentionSettings::default() },
    ] {
        let original = with(settings.clone(), None);
        assert!(original.len() >= 3);
        // By the store's clock all are of the day of the copy.
        assert!(with(settings, Some(385)).is_superset(&original));
    }
}

#[test]
fn a_clock_that_was_ahead_takes_no_others_place() {
    let mut world = world(30, &[0, 7, 14, 21, 28]);
    // b7 said that it was of day 29.
    world.catalog.backups[1].finished = at(29 * DAY);
    let written = [0, 7, 14, 21, 28].map(|day| (format!("b{day}"), at(day * DAY))).into();
    let seen = Seen { written, ..seen(&world) };
    let last = RetentionSettings { keep_last: Some(2), ..window("1 days") };
    let plan = planned(&world, &seen, &policy(last), at(30 * DAY));
    for id in ["b28", "b21", "b7"] {
        assert!(kept(&plan).contains(&id), "{plan:#?}");
    }
}

#[test]
fn a_flawed_backup_on_a_timeline_of_its_own_stops_nothing_once_there_is_a_newer_one() {
    let mut world = world(20, &[0, 15]);
    world.fork(tli(1), tli(2));
    add_backup(&mut world, tli(2), 16 * DAY, "test");
    world.archive(tli(2));
    let flawed = Seen {
        flaws: BTreeMap::from([("test".to_owned(), "data/000001.tar is not there".to_owned())]),
        ..seen(&world)
    };
    assert!(check_newest(&world.catalog, &flawed, at(30 * DAY)).is_err());
    add_backup(&mut world, tli(1), 25 * DAY, "newer");
    world.push(tli(1), 3 * SIZE.bytes(), None);
    world.archive(tli(1));
    let flawed = Seen { last_times: seen(&world).last_times, ..flawed };
    assert!(check_newest(&world.catalog, &flawed, at(30 * DAY)).is_ok());
}

#[test]
fn holds_keep_what_a_backup_of_another_repository_builds_on() {
    let world = world(30, &[0, 7, 14, 21, 28]);
    let wal = HeldWal { timeline: tli(1), start_lsn: Some(Lsn(0)), through_lsn: Some(Lsn(0)) };
    let hold = Hold { with: vec!["b0".into()], ..hold_on("elsewhere", Some(wal)) };
    let seen = Seen { holds: vec![hold], ..seen(&world) };
    let plan = planned(&world, &seen, &policy(window("10 days")), at(30 * DAY));
    assert!(kept(&plan).contains(&"b0") && !kept(&plan).contains(&"b7"), "{plan:#?}");
    assert!(!plan.notes.iter().any(|note| note.contains("is not there")), "{plan:#?}");
}
