use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use walship::catalog::{Catalog, GapCause, GapKind, GapRecord, ReadPlace, Seen, SeenRun};
use walship::pg::{Lsn, SegmentName};
use walship::replication::{Archiver, ServerPosition};

use super::affected::{Place, affected};
use super::*;
use crate::plan::tests::{SIZE, World, at, commit, tli};

const MIB: u64 = 1 << 20;

/// Timeline 1 with backups in segments `backups` of `segments` segments, all archived.
fn archive(segments: u64, backups: &[u64]) -> World {
    let mut world = World::new();
    let mut starts = Vec::new();
    for number in 0..segments {
        let lsn = world.push(tli(1), MIB / 2, commit(100 + number as u32, number as i64 * 1000));
        starts.push(lsn);
        world.push(tli(1), MIB / 2, None);
    }
    world.archive(tli(1));
    for (number, backup) in backups.iter().enumerate() {
        let start = starts[*backup as usize];
        let id = format!("20260301T1200{number:02}Z-0123456789abcdef");
        world.backup(&id, tli(1), start, Lsn(start.0 + 100));
    }
    world
}

fn lost(catalog: &Catalog, findings: &[Finding]) -> Vec<(u64, u64)> {
    let tail_ends = BTreeMap::new();
    let places =
        [Place { catalog, unrecorded: &[], findings: findings.iter().collect(), tail_ends: &tail_ends }];
    affected(&places).unreachable.iter().map(|one| (one.from_lsn.0, one.until_lsn.0)).collect()
}

fn damaged(name: SegmentName) -> Finding {
    let takes = Takes::Segments { first: name, last: name };
    Finding::damage(FindingKind::Damaged, "here", name.to_string(), "flipped", takes)
}

fn names(catalog: &Catalog) -> Vec<SegmentName> {
    catalog.segments.names().collect()
}

#[test]
fn a_damaged_segment_takes_what_lies_behind_it_up_to_the_next_backup() {
    let world = archive(12, &[1, 8]);
    let catalog = &world.catalog;
    let all = names(catalog);
    let second = catalog.backups[1].stop_lsn;
    let hit = all[5];
    assert_eq!(lost(catalog, &[damaged(hit)]), [(hit.start(SIZE).0, second.0)]);
    // Before the first backup nothing could be reached, and the last one takes its own moments only.
    assert_eq!(lost(catalog, &[damaged(all[0])]), []);
    let last = *all.last().unwrap();
    assert_eq!(
        lost(catalog, &[damaged(last)]),
        [(last.start(SIZE).0, catalog.stored_until(tli(1)).unwrap().0)]
    );
    // In the backup's own segment it takes the backup.
    let places_tail = BTreeMap::new();
    let own = SegmentName::containing(tli(1), second, SIZE);
    let finding = damaged(own);
    let found =
        affected(&[Place { catalog, unrecorded: &[], findings: vec![&finding], tail_ends: &places_tail }]);
    assert_eq!(found.backups.len(), 1, "{found:?}");
    assert_eq!(found.backups[0].id, catalog.backups[1].id);
}

#[test]
fn what_another_repository_holds_is_not_lost() {
    let world = archive(12, &[1]);
    let all = names(&world.catalog);
    let (ours, theirs) = ([damaged(all[5])], [damaged(all[7])]);
    let tail_ends = BTreeMap::new();
    let places = |a: &'_ [Finding], b: &'_ [Finding]| {
        affected(&[
            Place {
                catalog: &world.catalog,
                unrecorded: &[],
                findings: a.iter().collect(),
                tail_ends: &tail_ends,
            },
            Place {
                catalog: &world.catalog,
                unrecorded: &[],
                findings: b.iter().collect(),
                tail_ends: &tail_ends,
            },
        ])
    };
    assert!(places(&ours, &theirs).is_empty());
    assert!(!places(&ours, &ours).is_empty());
    // One that does not hold it at all is no help.
    let mut pruned = world.catalog.clone();
    pruned.segments.remove(&all[5]);
    let found = affected(&[
        Place {
            catalog: &world.catalog,
            unrecorded: &[],
            findings: ours.iter().collect(),
            tail_ends: &tail_ends,
        },
        Place { catalog: &pruned, unrecorded: &[], findings: vec![], tail_ends: &tail_ends },
    ]);
    assert_eq!(found.unreachable.len(), 1);
}

#[test]
fn a_lost_backup_takes_what_only_it_leads_to() {
    let world = archive(12, &[1, 8]);
    let catalog = &world.catalog;
    let of = |backup: usize| {
        let id = catalog.backups[backup].id.clone();
        let takes = Takes::Backup { id, part: "manifest.json.zst".into() };
        Finding::damage(FindingKind::Damaged, "here", "x", "flipped", takes)
    };
    let stop = |backup: usize| catalog.backups[backup].stop_lsn.0;
    assert_eq!(lost(catalog, &[of(0)]), [(stop(0), stop(1))]);
    // What the second leads to, the first does as well.
    assert_eq!(lost(catalog, &[of(1)]), []);
    let end = catalog.stored_until(tli(1)).unwrap().0;
    assert_eq!(lost(catalog, &[of(0), of(1)]), [(stop(0), end)]);
}

#[test]
fn a_backup_without_a_record_takes_what_the_index_says_that_it_led_to() {
    let world = archive(12, &[1, 8]);
    let mut catalog = world.catalog.clone();
    let first = [catalog.backups.remove(0)];
    let tail_ends = BTreeMap::new();
    let lost = |findings: &[Finding]| -> Vec<(Lsn, Lsn)> {
        let findings = findings.iter().collect();
        let place = Place { catalog: &catalog, unrecorded: &first, findings, tail_ends: &tail_ends };
        affected(&[place]).unreachable.iter().map(|one| (one.from_lsn, one.until_lsn)).collect()
    };
    let takes = Takes::Backup { id: first[0].id.clone(), part: "its record".into() };
    let gone = Finding::damage(FindingKind::Missing, "here", "x", "gone", takes);
    assert_eq!(lost(&[gone]), [(first[0].stop_lsn, catalog.backups[0].stop_lsn)]);
    // One that retention has removed is in an older list as well.
    assert_eq!(lost(&[]), []);
}

#[test]
fn a_missing_segment_is_found_and_counts_as_there_once() {
    let world = archive(10, &[1]);
    let mut catalog = world.catalog.clone();
    let gone = names(&catalog)[5];
    catalog.segments.remove(&gone);
    let needed = Needed::everything(&catalog);
    let found = gaps_found("here", &catalog, &needed, &BTreeSet::new());
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].kind, FindingKind::Missing);
    let end = catalog.stored_until(tli(1)).unwrap().0;
    assert_eq!(lost(&catalog, &found), [(gone.start(SIZE).0, end)]);
}

#[test]
fn of_a_hole_of_which_the_ledger_tells_in_part_the_rest_is_named() {
    let world = archive(12, &[1]);
    let all = names(&world.catalog);
    let mut now = world.catalog.clone();
    now.segments.remove_range(tli(1), all[5].number(SIZE), all[9].number(SIZE));
    let record = |first: SegmentName, last: SegmentName| GapRecord {
        format: 1,
        id: first.to_string(),
        timeline: tli(1),
        start_lsn: first.start(SIZE),
        end_lsn: last.end(SIZE),
        cause: GapCause { kind: GapKind::Lost, text: "test".into() },
        segment_digest: None,
        recorded: at(0),
        host: String::new(),
        user: String::new(),
    };
    let (none, needed) = (BTreeSet::new(), Needed::everything(&world.catalog));
    let seen = SeenBefore::of_catalog(&world.catalog);
    let taken = |catalog: &Catalog| {
        let takes = |found: Vec<Finding>| -> Vec<Takes> {
            found.into_iter().filter(Finding::is_damage).map(|finding| finding.takes).collect()
        };
        let found = takes(gaps_found("here", catalog, &needed, &none));
        assert_eq!(takes(less_than_seen("here", catalog, &seen, &none, &needed, &[])), found);
        found
    };
    assert_eq!(taken(&now), [Takes::Segments { first: all[5], last: all[8] }]);
    now.gaps = vec![record(all[6], all[6])];
    let (first, last) = (all[7], all[8]);
    assert_eq!(
        taken(&now),
        [Takes::Segments { first: all[5], last: all[5] }, Takes::Segments { first, last }]
    );
    now.gaps.push(record(all[7], all[8]));
    assert_eq!(taken(&now), [Takes::Segments { first: all[5], last: all[5] }]);
    now.gaps.push(record(all[5], all[5]));
    assert_eq!(taken(&now), []);
}

#[test]
fn only_what_may_be_on_its_way_is_waited_for() {
    let world = archive(120, &[1, 100]);
    let all = names(&world.catalog);
    let without = |numbers: std::ops::Range<usize>| {
        let mut catalog = world.catalog.clone();
        let from = all[numbers.start].number(SIZE);
        catalog.segments.remove_range(tli(1), from, from + numbers.len() as u64);
        catalog
    };
    let seen = SeenBefore::of_catalog(&world.catalog);
    let (none, needed) = (BTreeSet::new(), Needed::everything(&world.catalog));
    let missing = |catalog: &Catalog| less_than_seen("here", catalog, &seen, &none, &needed, &[]);
    let comes = |catalog: &Catalog| may_come(catalog, &missing(catalog));
    assert!(!comes(&world.catalog) && !comes(&without(5..9)), "long ago");
    assert!(comes(&without(80..81)) && comes(&without(100..120)));
    for (backup, newest) in [(0, false), (1, true)] {
        let mut catalog = world.catalog.clone();
        catalog.backups.remove(backup);
        assert_eq!(comes(&catalog), newest, "{backup}");
    }
    // What came meanwhile is not missing, nor what it left behind it for a moment.
    let (before, now) = (without(80..90), without(84..90));
    let gaps = |catalog: &Catalog| gaps_found("here", catalog, &needed, &none);
    let still = still_missing(&gaps(&before), gaps(&now), SIZE);
    assert_eq!(still[0].takes, Takes::Segments { first: all[84], last: all[89] });
    assert!(still_missing(&gaps(&before), gaps(&without(100..105)), SIZE).is_empty());
}

#[test]
fn less_than_was_seen_is_told_once_and_not_when_it_was_expired() {
    let world = archive(10, &[1]);
    let all = names(&world.catalog);
    let seen = SeenBefore::of_catalog(&world.catalog);
    let mut now = world.catalog.clone();
    for name in &all[7..] {
        now.segments.remove(name);
    }
    let backup = now.backups.remove(0).id;
    let needed = Needed::everything(&world.catalog);
    let found = less_than_seen("here", &now, &seen, &BTreeSet::new(), &needed, &[]);
    let kinds: Vec<_> = found.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::MissingEnd, FindingKind::Missing], "{found:?}");
    assert!(less_than_seen("here", &now, &seen, &BTreeSet::from([backup]), &needed, &found).is_empty());
    assert!(less_than_seen("here", &world.catalog, &seen, &BTreeSet::new(), &needed, &[]).is_empty());
    // Where nobody asks for it nobody is told.
    assert!(less_than_seen("here", &now, &seen, &BTreeSet::new(), &Needed::default(), &[]).is_empty());
    assert_eq!(
        seen.recorded(),
        Seen {
            wal: vec![SeenRun { first: all[0], segments: all.len() as u64 }],
            backups: world.catalog.backups.iter().map(|backup| backup.id.clone()).collect(),
            ..Seen::default()
        }
    );
}

#[test]
fn a_server_that_has_handed_over_more_is_told() {
    let world = archive(10, &[1]);
    let all = names(&world.catalog);
    let end = world.catalog.stored_until(tli(1)).unwrap();
    let server = |archived: Option<SegmentName>, ahead: u64| ServerPosition {
        system_identifier: 1,
        segment_size: SIZE,
        in_recovery: false,
        timeline: tli(1),
        wal_lsn: Lsn(end.0 + ahead * MIB + 5),
        archiver: Archiver {
            last_archived_wal: archived.map(|name| name.to_string()),
            ..Archiver::default()
        },
        slots: Vec::new(),
    };
    let last = *all.last().unwrap();
    let next = last.next(SIZE).unwrap();
    let told = |server: &ServerPosition| {
        let found = behind_server("here", &world.catalog, server, Some("walship"));
        found.first().map(Finding::is_damage)
    };
    assert_eq!(told(&server(Some(last), 0)), None);
    assert_eq!(told(&server(Some(last), 5)), Some(false), "the archiver is at work");
    assert_eq!(told(&server(Some(next), 1)), Some(true), "it was handed over");
    assert_eq!(told(&server(None, 1)), None, "the open segment");
    assert_eq!(told(&server(None, 5)), Some(true), "nothing tells that it is on its way");
    let elsewhere = ServerPosition { timeline: tli(2), ..server(Some(last), 0) };
    assert_eq!(told(&elsewhere), Some(true), "its timeline is not archived");
}

#[test]
fn a_backup_needs_its_wal_and_no_more() {
    let world = archive(10, &[2, 6]);
    let catalog = &world.catalog;
    let needed = Needed::of_backup(catalog, &catalog.backups[0].id).unwrap();
    let own = SegmentName::containing(tli(1), catalog.backups[0].start_lsn, SIZE);
    let has: Vec<_> = names(catalog).into_iter().filter(|name| needed.has_segment(*name, SIZE)).collect();
    assert_eq!(has, [own]);
    assert!(Needed::of_backup(catalog, "nothing").is_none());
    let since = Needed::since(catalog, at(0) + chrono::TimeDelta::days(3650));
    assert_eq!(since.backups.len(), 1, "the newest");
    assert_eq!(Needed::since(catalog, chrono::DateTime::UNIX_EPOCH).backups.len(), 2);
}

fn round_robin(budget: usize) -> i64 {
    let world = archive(200, &[1]);
    let catalog = &world.catalog;
    let needed = Needed::everything(catalog);
    let objects: BTreeMap<String, u32> = [(catalog.backups[0].id.clone(), 5)].into();
    let mut state = ProvenState::of(SIZE, "here", at(1000), []);
    for run in 0..100_i64 {
        let work = order(&catalog.segments, &needed, &state, &objects, &BTreeSet::new(), None);
        if work.iter().all(|work| work.at.is_some()) {
            return run;
        }
        for piece in work.into_iter().take(budget) {
            match piece.what {
                WorkKind::Wal { timeline, from, until } => (from..until).for_each(|number| {
                    let name = SegmentName::from_number(timeline, number, SIZE).unwrap();
                    state.prove(&ReadPlace::Segment(name), at(run));
                }),
                WorkKind::Parts(name) => state.prove_parts(name, at(run)),
                WorkKind::Backup { backup, place: None } => {
                    state.prove(&ReadPlace::Documents { backup }, at(run));
                }
                WorkKind::Backup { backup, place: Some(place) } => {
                    state.prove(&ReadPlace::Object { backup, place }, at(run));
                }
            }
        }
    }
    panic!("it never gets round");
}

#[test]
fn what_is_known_to_be_damaged_is_read_first_and_by_itself() {
    let world = archive(100, &[1]);
    let catalog = &world.catalog;
    let (needed, objects) =
        (Needed::everything(catalog), BTreeMap::from([(catalog.backups[0].id.clone(), 3)]));
    let mut state = ProvenState::of(SIZE, "here", at(1000), []);
    let all = names(catalog);
    let segment = ReadPlace::Segment(all[40]);
    let object = ReadPlace::Object { backup: catalog.backups[0].id.clone(), place: 1 };
    for (place, second) in [(&segment, 7), (&object, 5)] {
        state.doubt(known_damage(place.clone(), at(second), &[]));
    }
    let ordered = |round| order(&catalog.segments, &needed, &state, &objects, &BTreeSet::new(), round);
    let work = ordered(None);
    assert_eq!(work[0].what, WorkKind::Backup { backup: catalog.backups[0].id.clone(), place: Some(1) });
    let number = all[40].number(SIZE);
    assert_eq!(work[1].what, WorkKind::Wal { timeline: tli(1), from: number, until: number + 1 });
    assert!(work[2..].iter().all(|work| work.damaged.is_none()));
    let segments: u64 = work
        .iter()
        .map(|work| match work.what {
            WorkKind::Wal { from, until, .. } => until - from,
            _ => 0,
        })
        .sum();
    assert_eq!(segments, all.len() as u64, "each is read once");
    // What the run that is gone on with has found is told by what it noted.
    assert_eq!(ordered(Some(at(6))).iter().filter(|work| work.damaged.is_some()).count(), 1);
}

#[test]
fn a_backup_whose_wal_is_gone_is_found_though_nothing_tells_of_a_hole() {
    let none = BTreeSet::new();
    let world = archive(10, &[2, 6]);
    let all = names(&world.catalog);
    // The archive begins too late for the first backup.
    let mut late = world.catalog.clone();
    late.segments.remove_range(tli(1), 0, all[4].number(SIZE));
    let found = gaps_found("here", &late, &Needed::everything(&late), &none);
    let takes: Vec<_> = found.iter().map(|finding| (finding.is_damage(), finding.takes.clone())).collect();
    assert_eq!(takes, [(true, Takes::Segments { first: all[2], last: all[3] })], "{found:?}");
    let second = late.backups[1].stop_lsn.0;
    assert_eq!(lost(&late, &found), [(late.backups[0].stop_lsn.0, second)]);
    let only_second = Needed::of_backup(&late, &late.backups[1].id).unwrap();
    assert!(gaps_found("here", &late, &only_second, &none).is_empty());
    // One that is being removed needs nothing any more.
    let gone = BTreeSet::from([late.backups[0].id.clone()]);
    assert!(gaps_found("here", &late, &Needed::everything(&late), &gone).is_empty());
    assert!(gaps_found("here", &world.catalog, &Needed::everything(&world.catalog), &none).is_empty());
    // A hole that a backup begins in is told once.
    let mut hole = world.catalog.clone();
    hole.segments.remove_range(tli(1), all[5].number(SIZE), all[8].number(SIZE));
    let found = gaps_found("here", &hole, &Needed::everything(&hole), &none);
    assert_eq!(found.len(), 1, "{found:?}");
    // All of the timeline that a backup ended on is gone, its history file too.
    let mut gone = world.catalog.clone();
    gone.backups[1].stop_timeline = tli(2);
    let found = gaps_found("here", &gone, &Needed::everything(&gone), &none);
    let takes: Vec<_> = found.iter().map(|finding| (finding.is_damage(), finding.takes.clone())).collect();
    assert_eq!(takes, [(true, Takes::History(tli(2)))], "{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn whatever_the_budget_it_gets_round_to_everything(budget in 1usize..12) {
        let runs = round_robin(budget);
        prop_assert!(runs as usize <= 20usize.div_ceil(budget) + 1, "{runs}");
    }

    #[test]
    fn what_is_lost_is_what_windows_say(hits in proptest::collection::btree_set(0usize..20, 0..4), second in 2u64..19) {
        let world = archive(20, &[1, second]);
        let all = names(&world.catalog);
        let findings: Vec<Finding> = hits.iter().map(|hit| damaged(all[*hit])).collect();
        let lost = lost(&world.catalog, &findings);
        let mut broken = world.catalog.clone();
        for hit in &hits {
            broken.segments.remove(&all[*hit]);
        }
        let reach = |catalog: &Catalog, lsn: u64| {
            crate::plan::windows(catalog, tli(1), &[])
                .iter()
                .any(|window| (window.from_lsn.0..window.until_lsn.0).contains(&lsn))
        };
        let begin = all[0].start(SIZE).0;
        for step in 0..40 {
            let lsn = begin + step * MIB / 2 + 77;
            let is_lost = lost.iter().any(|(from, until)| (*from..*until).contains(&lsn));
            prop_assert_eq!(is_lost, reach(&world.catalog, lsn) && !reach(&broken, lsn), "{}", lsn);
        }
    }
}

#[test]
fn timelines_that_nothing_leads_to_are_told() {
    let mut world = archive(10, &[1]);
    let child = tli(2);
    world.fork(tli(1), child);
    for _ in 0..6 {
        world.push(child, MIB / 2, None);
    }
    world.archive(child);
    let mut catalog = world.catalog.clone();
    catalog.histories.remove(&child);
    let found = history_flaws("here", &catalog);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].takes, Takes::History(child));
    assert!(lost(&catalog, &found).len() == 1);
    assert!(history_flaws("here", &world.catalog).is_empty());
}
