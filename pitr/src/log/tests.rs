use walship::catalog::{DatabaseNames, Names, RelationName, SavedNames};
use walship::wal::event::{DroppedObjects, EventKind, RelFileLocator};

use super::describe::time_of;
use super::*;
use crate::plan::tests::{SIZE, World, at, checkpoint, commit, restore_point, tli};
use crate::plan::{Evidence, Halt, PlanOptions, RefusalKind, SegmentRequest};
use crate::target::{StopSide, TargetKind, TargetWords};

const DATABASE: Oid = 16_384;

fn storage(relation: Oid) -> RelFileLocator {
    RelFileLocator { tablespace: 1663, database: DATABASE, relation }
}

fn drop_of(xid: Xid, relations: &[Oid], micros: i64) -> Option<(Xid, EventKind)> {
    let dropped_relations = relations.iter().map(|relation| storage(*relation)).collect();
    let kind = EventKind::Commit {
        time: at(micros),
        prepared_xid: None,
        subxids: vec![],
        dropped_relations,
        dropped_objects: None,
    };
    Some((xid, kind))
}

fn cut(xid: Xid, relation: Oid) -> Option<(Xid, EventKind)> {
    Some((xid, EventKind::StorageTruncate { relation: storage(relation), blocks: 0 }))
}

/// A history of every kind of event, about two records in a segment, a second apart, one clock going back.
fn busy() -> World {
    busy_of(|number| 500_000 + u64::from(number) * 100)
}

/// The same with records of these lengths.
fn busy_of(bytes: fn(u32) -> u64) -> World {
    let mut world = World::new();
    for number in 0..120 {
        let xid = 1000 + number;
        // The clock steps back by half a minute in the middle.
        let seconds = if number < 60 { number } else { number - 30 };
        let micros = i64::from(seconds) * 1_000_000;
        let event = match number % 12 {
            1 => drop_of(xid, &[20_000 + number], micros),
            3 => restore_point(&format!("point {number}"), micros),
            5 => cut(xid, 20_000 + number),
            7 => Some((xid, EventKind::DatabaseDrop { oid: 5, tablespaces: vec![1663] })),
            9 => checkpoint(Lsn(1), micros),
            11 => None,
            _ => commit(xid, micros),
        };
        world.push(tli(1), bytes(number), event);
    }
    for _ in 0..4 {
        world.push(tli(1), SIZE.bytes(), None);
    }
    world.archive(tli(1));
    world
}

/// A log with a line of every kind.
pub(crate) fn one_of_each() -> Log {
    let mut world = World::new();
    let relations: Vec<Oid> = (20_001..20_008).collect();
    let half = SIZE.bytes() / 2;
    for event in [
        commit(1000, 1_000_000),
        drop_of(1001, &relations, 2_000_000),
        Some((1002, EventKind::DatabaseDrop { oid: 5, tablespaces: vec![1663] })),
        commit(1002, 3_000_000),
        None,
        None,
        None,
        None,
        restore_point("before\u{1b}[2J", 4_000_000),
        cut(0, 20_009),
    ] {
        world.push(tli(1), half, event);
    }
    world.fork(tli(1), tli(2));
    world.push(tli(2), SIZE.bytes(), None);
    world.archive(tli(1));
    world.archive(tli(2));
    let names: Vec<_> = world.catalog.segments.names().collect();
    world.catalog.segments.remove(&names[2]);
    world.undecoded.push(names[3]);
    read(&world, &query(&Kind::DEFAULT), 0).0
}

fn query(kinds: &[Kind]) -> Query {
    Query {
        since: None,
        until: None,
        xid: None,
        database: None,
        table: None,
        unnamed_too: false,
        delete_rows: Query::DELETE_ROWS,
        relation: None,
        kinds: kinds.to_vec(),
        timeline: TimelineChoice::Latest,
        limit: 10_000,
        whole: false,
    }
}

const ALL: [Kind; 8] = [
    Kind::Drop,
    Kind::Truncate,
    Kind::RestorePoint,
    Kind::Checkpoint,
    Kind::Timeline,
    Kind::Commit,
    Kind::Abort,
    Kind::Prepare,
];

/// Names that were saved beside a backup: `public.orders` with its index and TOAST table, and another database.
fn names() -> Names {
    let relation = |oid, filenode, name: &str, kind, of| RelationName {
        oid,
        tablespace: 1663,
        filenode,
        schema: if kind == 't' { "pg_toast" } else { "public" }.to_owned(),
        name: name.to_owned(),
        kind,
        of,
        bytes: Some(8192),
    };
    let shop = DatabaseNames {
        oid: DATABASE,
        name: "shop".to_owned(),
        unread: None,
        relations: vec![
            relation(100, 20_001, "orders", 'r', None),
            relation(101, 20_002, "orders_pkey", 'i', Some(100)),
            relation(102, 20_003, "pg_toast_100", 't', Some(100)),
            relation(110, 20_011, "people", 'r', None),
        ],
    };
    let other = DatabaseNames {
        oid: 5,
        name: "postgres".to_owned(),
        unread: Some("it said no".to_owned()),
        relations: vec![],
    };
    Names { format: 1, databases: vec![other, shop] }
}

/// Gives the world's backup names that were read at `lsn`.
fn name(world: &mut World, lsn: Lsn) -> Documents {
    let time = at(500_000);
    let backup = &mut world.catalog.backups[0];
    backup.names = Some(SavedNames { lsn, timeline: tli(1), time, digest: String::new() });
    let mut documents = Documents::default();
    let source = NameSource::Backup { id: backup.id.clone(), time };
    documents.insert(backup.id.clone(), Some(Dictionary::new(names(), source)));
    documents
}

/// A commit that removes storage and drops relations by oid.
fn removal(xid: Xid, storage: &[Oid], dropped: &[Oid], micros: i64) -> Option<(Xid, EventKind)> {
    let mut event = drop_of(xid, storage, micros);
    if let Some((_, EventKind::Commit { dropped_objects, .. })) = &mut event {
        *dropped_objects = Some(DroppedObjects { relations: dropped.to_vec(), databases: vec![] });
    }
    event
}

/// A world with a backup and these records behind it, the third of a segment each.
fn history(events: Vec<Option<(Xid, EventKind)>>) -> World {
    let mut world = World::new();
    for event in events {
        world.push(tli(1), SIZE.bytes() / 3, event);
    }
    world.push(tli(1), SIZE.bytes(), None);
    world.archive(tli(1));
    let stop = world.records[&tli(1)][0].lsn;
    world.backup("b1", tli(1), stop, stop);
    world
}

#[test]
fn relations_are_called_as_they_were_when_a_backup_listed_them() {
    let mut world = history(vec![
        commit(999, 1),
        removal(1000, &[20_001, 20_002, 20_003], &[], 2),
        cut(0, 20_011),
        removal(1001, &[30_001, 30_002, 30_003], &[100, 101, 102], 3),
        removal(1002, &[40_000], &[4000], 4),
        drop_of(1003, &[20_011], 5),
    ]);
    let starts: Vec<Lsn> = world.records[&tli(1)].iter().map(|record| record.lsn).collect();
    let documents = name(&mut world, starts[0]);
    let log = read_with(&world, &query(&Kind::DEFAULT), 0, &documents);
    let told: Vec<_> = events(&log).iter().map(|one| (one.what.clone(), one.kinds.clone())).collect();
    let emptied = "public.orders given new storage (TRUNCATE, VACUUM FULL, CLUSTER or another rewrite)";
    let unknown = "storage of 1 relation of unknown name removed (DROP, TRUNCATE or a rewrite)";
    let all = vec![Kind::Drop, Kind::Truncate, Kind::Commit];
    let expected = [
        (emptied, vec![Kind::Truncate, Kind::Commit]),
        ("public.people cut to 0 pages (TRUNCATE, or VACUUM of empty pages)", vec![Kind::Truncate]),
        // Its storage was made after the names were read; its oid is the same.
        ("public.orders dropped", vec![Kind::Drop, Kind::Commit]),
        (unknown, all.clone()),
        // Of PostgreSQL 14 it is not known.
        ("public.people lost its storage (DROP, TRUNCATE or a rewrite)", all),
    ];
    assert_eq!(told, expected.map(|(what, kinds)| (what.to_owned(), kinds)));
    let found = events(&log);
    assert_eq!((found[0].freed_bytes, found[2].freed_bytes), (Some(3 * 8192), None));
    assert_eq!(found.iter().map(|one| one.unnamed_count).collect::<Vec<_>>(), [0, 0, 0, 1, 0]);
    assert_eq!(found[0].databases[0].name.as_deref(), Some("shop"));
    assert_eq!(found[0].relations[1].of.as_deref(), Some("public.orders"));

    let orders = Query { table: Some(parse_table("orders").unwrap()), ..query(&Kind::DEFAULT) };
    assert_eq!(events(&read_with(&world, &orders, 0, &documents)).len(), 2);
    let drops = Query { kinds: vec![Kind::Drop], ..orders };
    assert_eq!(
        events(&read_with(&world, &drops, 0, &documents)).len(),
        1,
        "what was only emptied is no drop"
    );
    let elsewhere = Query { database: Some(oid_or_name("postgres")), ..query(&Kind::DEFAULT) };
    assert!(events(&read_with(&world, &elsewhere, 0, &documents)).is_empty());

    // Names that were read later say nothing of what was before.
    let documents = name(&mut world, starts[4]);
    let log = read_with(&world, &query(&Kind::DEFAULT), 0, &documents);
    let named: Vec<bool> = events(&log).iter().map(|one| one.relations[0].name.is_some()).collect();
    assert_eq!(named, [false, false, false, false, true]);
}

#[test]
fn before_an_event_is_the_last_that_is_known_to_be_meant_or_none() {
    let mut world = history(vec![
        commit(999, 1),
        removal(1000, &[20_001, 20_002], &[], 2),
        removal(1001, &[30_001, 30_002], &[100, 101], 3),
        removal(1002, &[20_011], &[110], 4),
        removal(1003, &[50_000], &[], 5),
        Some((0, EventKind::DatabaseInvalid { oid: 77, name: "gone".to_owned() })),
        Some((1004, EventKind::DatabaseDrop { oid: 77, tablespaces: vec![1663] })),
    ]);
    let starts: Vec<Lsn> = world.records[&tli(1)].iter().map(|record| record.lsn).collect();
    let documents = name(&mut world, starts[0]);
    let choose = |words: &str| {
        let before = Before::parse(words).unwrap();
        let log = read_with(&world, &before.query(TimelineChoice::Latest), 0, &documents);
        match before.choose(&log) {
            Ok(Choice::Known(entry)) => Ok(entry.just_before_lsn),
            Ok(Choice::Unproven(entry, _)) => panic!("{entry:?}"),
            Err(refusal) => Err(refusal),
        }
    };
    for (words, at) in [
        ("drop:public.orders", 2),
        ("drop:orders", 2),
        ("drop:shop/orders", 2),
        ("drop:16384/public.people", 3),
        ("drop:gone/", 5),
    ] {
        assert_eq!(choose(words), Ok(starts[at]), "{words}");
    }
    // Something was emptied later whose name is not known.
    let refusal = choose("truncate:public.orders").unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::AmbiguousEvent);
    for at in [1, 4] {
        let target = format!("--to-lsn {} --exclusive", starts[at]);
        assert!(refusal.hints.iter().any(|hint| hint.starts_with(&target)), "{refusal:?}");
    }
    assert_eq!(refusal.hints.len(), 2, "{refusal:?}");
    for hint in &refusal.hints {
        let words: Vec<&str> = hint.split_whitespace().collect();
        let ["--to-lsn", lsn, "--exclusive", ..] = words[..] else { panic!("{hint}") };
        let words = TargetWords { lsn: Some(lsn.into()), exclusive: true, ..TargetWords::default() };
        let target = words.parse(|_| vec![]).unwrap();
        let plan = world.plan_with(&target, &PlanOptions::default()).unwrap();
        assert_eq!(target.kind, TargetKind::Lsn(plan.stop.cut_lsn));
    }
    for words in ["drop:public.nothing", "drop:postgres/orders", "drop:other/"] {
        assert_eq!(choose(words).unwrap_err().kind, RefusalKind::UnknownEvent, "{words}");
    }
    for words in
        ["", "orders", "drop:", "drop:/", "drop:/orders", "truncate:shop/", "drop:.x", "rename:orders"]
    {
        assert!(Before::parse(words).is_err(), "{words}");
    }
}

#[test]
fn a_drop_without_a_name_may_be_meant_where_no_other_may() {
    let storage: Vec<Oid> = (50_000..50_030).collect();
    let choose = |more: Vec<Option<(Xid, EventKind)>>, words: &str| {
        let mut events = vec![
            commit(999, 1),
            removal(1000, &[20_001, 20_002], &[100, 101], 2),
            removal(1001, &[60_000], &[], 3),
            removal(1002, &storage, &[500, 501], 4),
        ];
        events.extend(more);
        let mut world = history(events);
        let starts: Vec<Lsn> = world.records[&tli(1)].iter().map(|record| record.lsn).collect();
        let documents = name(&mut world, starts[0]);
        let before = Before::parse(words).unwrap();
        let log = read_with(&world, &before.query(TimelineChoice::Latest), 0, &documents);
        match before.choose(&log) {
            Ok(Choice::Known(entry)) => Ok((entry.just_before_lsn == starts[1], None)),
            Ok(Choice::Unproven(entry, refusal)) => {
                assert_eq!((entry.just_before_lsn, entry.relations.len()), (starts[3], RELATIONS_MAX));
                assert_eq!(entry.record, None);
                let query = before.whole_query(TimelineChoice::Latest, entry);
                let again = read_with(&world, &query, 0, &documents);
                let Line::Event(whole) = again.lines.last().unwrap() else { panic!("{again:?}") };
                let record = whole.record.clone().unwrap();
                assert!(record.storage.iter().map(|one| one.relation).eq(storage.iter().copied()));
                assert_eq!((whole.lsn, record.dropped), (entry.lsn, Some(vec![500, 501])));
                Ok((false, Some(refusal.kind)))
            }
            Err(refusal) => Err((refusal.kind, refusal.hints.len())),
        }
    };
    // A table of that name in the backup was dropped, and the one behind it may be another of that name; or its name is new.
    for words in ["drop:public.orders", "drop:public.fresh", "drop:shop/fresh", "drop:4711"] {
        assert_eq!(choose(vec![], words), Ok((false, Some(RefusalKind::AmbiguousEvent))), "{words}");
    }
    // What was only emptied is no drop; a second drop without a name may be the one as well.
    let emptied = vec![removal(1003, &[70_000], &[], 5)];
    assert_eq!(choose(emptied, "drop:fresh"), Ok((false, Some(RefusalKind::AmbiguousEvent))));
    let second = || vec![removal(1003, &[70_000], &[700], 5)];
    assert_eq!(choose(second(), "drop:fresh"), Err((RefusalKind::AmbiguousEvent, 2)));
    assert_eq!(choose(second(), "drop:public.orders"), Err((RefusalKind::AmbiguousEvent, 3)));
    // A truncation is told by no such proof.
    assert_eq!(choose(vec![], "truncate:fresh").unwrap_err().0, RefusalKind::AmbiguousEvent);
}

/// Reads a log, answering every request, from an index with so many segments in each block; says how many
/// segments were read.
fn read(world: &World, query: &Query, segments: u64) -> (Log, usize) {
    read_all(world, query, segments, &Documents::default())
}

fn read_with(world: &World, query: &Query, segments: u64, documents: &Documents) -> Log {
    read_all(world, query, segments, documents).0
}

fn read_all(world: &World, query: &Query, segments: u64, documents: &Documents) -> (Log, usize) {
    let blocks = if segments == 0 { Default::default() } else { world.blocks(segments) };
    let mut evidence = Evidence { blocks, ..Evidence::default() };
    let mut reading = Reading::new(&world.catalog, query.clone()).unwrap();
    let mut bodies = 0;
    for _ in 0..10_000 {
        match reading.advance(&world.catalog, &evidence, documents) {
            Ok(true) => {
                if let Some(segment) = reading.at() {
                    evidence.forget_before(segment);
                }
            }
            Ok(false) => return (reading.into_log(), bodies),
            Err(Need::Halt(Halt::Rollup(first))) => {
                let last = evidence.blocks[&first].last;
                evidence.forget_blocks(first, last);
                let names = std::iter::successors(Some(first), |name| name.next(SIZE));
                evidence
                    .blocks
                    .extend(names.take_while(|name| *name <= last).map(|name| world.block(name, name)));
            }
            Err(Need::Halt(Halt::Summaries(names))) => {
                for name in names {
                    if world.damaged.contains(&name) {
                        evidence.unreadable.insert(name);
                    } else {
                        evidence.summaries.insert(name, world.summary(name));
                    }
                }
            }
            Err(Need::Halt(Halt::Events(requests))) => {
                for SegmentRequest { segment, following } in requests {
                    bodies += 1;
                    let through = following.last().unwrap_or(&segment).end(SIZE);
                    evidence.events.insert(segment, world.events(segment, through));
                }
            }
            Err(halt) => panic!("{halt:?}"),
        }
    }
    panic!("the log does not come to an end");
}

fn events(log: &Log) -> Vec<&Entry> {
    let events = log.lines.iter().filter_map(|line| match line {
        Line::Event(entry) => Some(&**entry),
        _ => None,
    });
    events.collect()
}

/// The events that a look at every record finds, those without a time left out where times are asked for.
fn expected(world: &World, query: &Query) -> Vec<Lsn> {
    let records = world.records[&tli(1)].iter().filter_map(|record| record.event.as_ref());
    let timed = query.since.is_some() || query.until.is_some();
    let wanted = records
        .filter(|event| query.picks(event) && time_of(event).map_or(!timed, |time| query.covers(time)));
    wanted.map(|event| event.lsn).collect()
}

#[test]
fn every_event_is_found_whatever_the_index_says() {
    let world = busy();
    let second = |number: i64| Some(at(number * 1_000_000));
    let queries = [
        query(&Kind::DEFAULT),
        query(&ALL),
        query(&[Kind::Checkpoint]),
        query(&[Kind::Commit]),
        Query { since: second(20), until: second(40), ..query(&ALL) },
        Query { since: second(35), ..query(&Kind::DEFAULT) },
        Query { xid: Some(1037), ..query(&Kind::OF_TRANSACTION) },
        Query { relation: Some(20_041), ..query(&Kind::DEFAULT) },
        Query { database: Some(OidOrName::Oid(5)), ..query(&Kind::DEFAULT) },
        Query { database: Some(OidOrName::Oid(DATABASE)), ..query(&ALL) },
    ];
    for query in &queries {
        let expected = expected(&world, query);
        assert!(!expected.is_empty(), "{query:?}");
        let timed = query.since.is_some() || query.until.is_some();
        for segments in [0, 1, 3, 64] {
            let (log, _) = read(&world, query, segments);
            let mut found = events(&log);
            assert!(found.is_sorted_by_key(|entry| entry.lsn));
            if timed {
                found.retain(|entry| entry.time.is_some());
            }
            let found: Vec<_> = found.iter().map(|entry| entry.lsn).collect();
            assert_eq!(found, expected, "{query:?} with blocks of {segments}");
            assert!(!log.more && log.lines.iter().all(|line| matches!(line, Line::Event(_))));
        }
    }
}

#[test]
fn segments_are_read_for_ordinary_commits_only() {
    // Records that fit into their segments: of made-up ones that do not, the segments alone tell.
    let world = busy_of(|_| SIZE.bytes() / 2);
    let default = query(&Kind::DEFAULT);
    for segments in [0, 1, 64] {
        assert_eq!(read(&world, &default, segments).1, 0, "blocks of {segments}");
        assert!(read(&world, &query(&[Kind::Commit]), segments).1 > 10);
    }
    let late = Query { since: Some(at(3_600_000_000)), ..query(&[Kind::Commit]) };
    assert_eq!(read(&world, &late, 3), (Log { lines: vec![], ..read(&world, &late, 0).0 }, 0));
}

#[test]
fn just_before_is_the_record_itself() {
    let world = busy();
    let (log, _) = read(&world, &query(&Kind::DEFAULT), 3);
    for entry in events(&log) {
        let words: Vec<_> = entry.just_before.split(' ').collect();
        let ["--to-lsn", lsn, "--exclusive"] = *words else { panic!("{words:?}") };
        let words = TargetWords { lsn: Some(lsn.into()), exclusive: true, ..TargetWords::default() };
        let target = words.parse(|_| Vec::new()).unwrap();
        assert_eq!((target.kind, target.stop), (TargetKind::Lsn(entry.lsn), StopSide::Exclusive));
    }
    let at_once: Vec<_> = events(&log).into_iter().filter(|entry| entry.at_once).collect();
    assert_eq!(at_once.len(), 20);
    assert!(at_once.iter().all(|entry| entry.time.is_none()));
}

#[test]
fn just_before_a_dropped_database_is_before_it_was_marked() {
    let mut world = World::new();
    let mark = |oid| Some((0, EventKind::DatabaseInvalid { oid, name: format!("db{oid}") }));
    let files = |xid, oid| Some((xid, EventKind::DatabaseDrop { oid, tablespaces: vec![1663] }));
    let gone = |xid, oid, micros| {
        let mut event = drop_of(xid, &[], micros);
        if let Some((_, EventKind::Commit { dropped_objects, .. })) = &mut event {
            let dropped = DroppedObjects { relations: vec![], databases: vec![oid] };
            *dropped_objects = Some(dropped);
        }
        event
    };
    for event in [
        commit(999, 1),
        mark(5),
        commit(1000, 2),
        files(1001, 5),
        gone(1001, 5, 3),
        // An older release: no mark. Then one whose first DROP was cut short.
        files(1002, 6),
        mark(7),
        commit(1003, 4),
        mark(7),
        files(1004, 7),
        gone(1004, 7, 5),
    ] {
        world.push(tli(1), SIZE.bytes() / 3, event);
    }
    world.push(tli(1), SIZE.bytes(), None);
    world.archive(tli(1));
    for segments in [0, 1, 3] {
        let log = read(&world, &query(&[Kind::Drop]), segments).0;
        let starts: Vec<Lsn> = world.records[&tli(1)].iter().map(|record| record.lsn).collect();
        let found: Vec<_> = events(&log)
            .iter()
            .map(|one| (one.lsn, one.just_before.clone(), one.afterwards.is_some()))
            .collect();
        let expected =
            [(1, 1, false), (3, 1, false), (4, 1, false), (5, 5, true), (6, 6, false), (8, 8, true)]
                .into_iter()
                .chain([(9, 8, true), (10, 8, true)])
                .map(|(at, before, sql)| {
                    (starts[at], format!("--to-lsn {} --exclusive", starts[before]), sql)
                });
        assert_eq!(found, expected.collect::<Vec<_>>());
        let log = read(&world, &Query { xid: Some(1001), ..query(&[Kind::Drop]) }, segments).0;
        assert_eq!(events(&log).len(), 2);
        assert!(events(&log)[0].just_before.contains(&starts[1].to_string()));
    }
}

#[test]
fn prepared_transactions_are_shown_with_what_became_of_them() {
    let prepare = |xid: Xid, micros| {
        let gid = format!("gid {xid}");
        Some((xid, EventKind::Prepare { time: at(micros), prepared_xid: xid, gid }))
    };
    let finish = |xid: Xid, committed, micros| {
        let (time, prepared_xid, subxids) = (at(micros), Some(xid), vec![]);
        let (dropped_relations, dropped_objects) = (vec![], None);
        let kind = match committed {
            true => EventKind::Commit { time, prepared_xid, subxids, dropped_relations, dropped_objects },
            false => EventKind::Abort { time, prepared_xid, subxids },
        };
        Some((0, kind))
    };
    let events_of_it = vec![
        prepare(1000, 1),
        prepare(1001, 2),
        commit(1002, 3),
        None,
        None,
        None,
        finish(1001, false, 4),
        prepare(1003, 5),
        None,
        None,
        None,
        None,
        finish(1000, true, 9_000_000),
    ];
    let world = history(events_of_it);
    for segments in [0, 1, 2] {
        let asked = Query { until: Some(at(1_000_000)), ..query(&[Kind::Prepare]) };
        let log = read(&world, &asked, segments).0;
        let told: Vec<_> = events(&log)
            .iter()
            .map(|one| (one.xid, one.what.clone(), one.outcome.as_ref().map(|end| end.committed)))
            .collect();
        let expected = [(1000, Some(true)), (1001, Some(false)), (1003, None)]
            .map(|(xid, outcome)| (Some(xid), format!("prepared as \"gid {xid}\""), outcome));
        assert_eq!(told, expected, "{segments}");
    }
}

#[test]
fn a_subtransaction_is_found_by_the_end_of_its_transaction() {
    let with_sub = |top: Xid, subxids: Vec<Xid>, micros| {
        let mut event = commit(top, micros);
        if let Some((_, EventKind::Commit { subxids: own, .. })) = &mut event {
            *own = subxids;
        }
        event
    };
    let world = history(vec![
        commit(1000, 1),
        None,
        None,
        with_sub(1001, vec![1002, 1040], 2),
        None,
        None,
        commit(1050, 3),
    ]);
    for (xid, what) in [
        (1001, Some("committed")),
        (1002, Some("committed; 1002 is a subtransaction of it")),
        (1040, Some("committed; 1040 is a subtransaction of it")),
        (1041, None),
    ] {
        for segments in [0, 1] {
            let asked = Query { xid: Some(xid), ..query(&Kind::OF_TRANSACTION) };
            let log = read(&world, &asked, segments).0;
            let told: Vec<_> = events(&log).iter().map(|one| (one.xid, one.what.clone())).collect();
            let expected: Vec<_> = what.map(|what| (Some(1001), what.to_owned())).into_iter().collect();
            assert_eq!(told, expected, "{xid}, {segments}");
        }
    }
}

#[test]
fn what_has_no_time_of_its_own_is_shown_between_two() {
    let world = busy();
    let (log, _) = read(&world, &query(&[Kind::Truncate]), 0);
    let found = events(&log);
    let of = |xid: Xid| *found.iter().find(|entry| entry.xid == Some(xid)).unwrap();
    let entry = of(1029);
    let (after, before) = (entry.after.unwrap(), entry.before.unwrap());
    assert!(after <= at(29_000_000) && at(29_000_000) <= before, "{after} {before}");
    assert!(before - after < chrono::TimeDelta::seconds(12), "{after} {before}");
    // A time that lies far from both excludes it, one that lies between them does not.
    let asked = |since, until| {
        let query = Query { since: Some(at(since)), until: Some(at(until)), ..query(&[Kind::Truncate]) };
        let (log, _) = read(&world, &query, 3);
        events(&log).iter().any(|entry| entry.xid == Some(1029))
    };
    assert!(asked(29_000_000, 29_100_000));
    assert!(!asked(50_000_000, 51_000_000) && !asked(0, 5_000_000));
}

#[test]
fn what_is_not_known_is_a_line() {
    let mut world = busy();
    let names: Vec<_> = world.catalog.segments.names().collect();
    let missing = [names[10], names[11]];
    for name in &missing {
        world.catalog.segments.remove(name);
    }
    world.undecoded.push(names[20]);
    world.damaged.push(names[30]);
    let (log, _) = read(&world, &query(&Kind::DEFAULT), 0);
    let unknown: Vec<_> = log.lines.iter().filter(|line| !matches!(line, Line::Event(_))).cloned().collect();
    let [
        Line::Gap(gap),
        Line::Unknown { segment, damaged: false, why, .. },
        Line::Unknown { segment: third, damaged: true, .. },
    ] = &unknown[..]
    else {
        panic!("{unknown:#?}")
    };
    assert_eq!((gap.first_missing, gap.last_missing), (names[10], names[11]));
    assert_eq!((gap.from, gap.to), (names[10].start(SIZE), names[12].start(SIZE)));
    assert_eq!((*segment, &**why, *third), (names[20], "a test", names[30]));
    // On both sides of each everything is told.
    for name in [names[5], names[15], names[25], names[35]] {
        let inside = |lsn: Lsn| lsn >= name.start(SIZE) && lsn < names[names.len() - 1].end(SIZE);
        assert!(events(&log).iter().any(|entry| inside(entry.lsn)), "{name}");
    }
}

#[test]
fn the_limit_ends_a_log_and_says_so() {
    let world = busy();
    let all = read(&world, &query(&Kind::DEFAULT), 3).0;
    let (log, _) = read(&world, &Query { limit: 7, ..query(&Kind::DEFAULT) }, 3);
    assert!(log.more && log.lines == all.lines[..7]);
    assert!(log.until_lsn < all.until_lsn);
    let empty = read(&World::new(), &query(&ALL), 0).0;
    assert!(empty.lines.is_empty() && !empty.more && empty.until_lsn.is_none());
}

#[test]
fn a_fork_is_told_and_targets_name_the_timeline() {
    let mut world = busy();
    let fork = world.fork(tli(1), tli(2));
    world.push(tli(1), 3_000_000, drop_of(5000, &[1], 200_000_000));
    world.push(tli(1), 3_000_000, None);
    world.push(tli(2), 3_000_000, drop_of(6000, &[2], 200_000_000));
    world.push(tli(2), 3_000_000, None);
    world.archive(tli(1));
    world.archive(tli(2));
    for segments in [0, 3] {
        let (log, _) = read(&world, &query(&Kind::DEFAULT), segments);
        let at = log.lines.iter().position(|line| matches!(line, Line::Fork { lsn, .. } if *lsn == fork));
        assert_eq!(at, Some(log.lines.len() - 2), "{:#?}", log.lines.last());
        let last = *events(&log).last().unwrap();
        assert_eq!((last.xid, last.timeline), (Some(6000), tli(2)));
        assert!(events(&log).iter().all(|entry| entry.just_before.ends_with("--exclusive --timeline 2")));
        assert!(log.timelines_left_out.is_empty());
        let parent = Query { timeline: TimelineChoice::Number(tli(1)), ..query(&Kind::DEFAULT) };
        let (log, _) = read(&world, &parent, segments);
        assert_eq!(events(&log).last().unwrap().xid, Some(5000));
        assert_eq!(log.timelines_left_out, [tli(2)]);
    }
    let unknown = Query { timeline: TimelineChoice::Number(tli(7)), ..query(&ALL) };
    assert!(matches!(Reading::new(&world.catalog, unknown), Err(Halt::Refuse(_))));
}
