//! The decoder against the server's own memory, on every major: needs no `pg_waldump`.
//!
//! With `track_commit_timestamp` the server knows when each transaction committed, its catalog knows which
//! files a table has before it is dropped, and its control file where WAL ends. The WAL must say the same.

use std::collections::{BTreeMap, BTreeSet};

use walship::pg::{ControlData, Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::decode::decode;
use walship::wal::event::{EventKind, RelFileLocator, WalEvent};
use walship::wal::reader::{Reader, StopReason};
use walship_tests::note;
use walship_tests::postgres::{self, PgServer, StopMode};

#[test]
fn every_major_s_wal_says_what_the_server_remembers() {
    for major in postgres::majors() {
        let tablespace = tempfile::tempdir().unwrap();
        let mut server = PgServer::builder(major)
            .wal_segment_size_mb(1)
            .setting("wal_level", "logical")
            .setting("track_commit_timestamp", "on")
            .setting("max_prepared_transactions", 10)
            .setting("autovacuum", "off")
            .setting("wal_keep_size", "10GB")
            .setting("max_wal_size", "10GB")
            .setting("wal_recycle", "off")
            .start();
        let first_xid = xid(&server.psql("SELECT pg_current_xact_id()"));
        let expected = work(&mut server, &tablespace.path().display().to_string());
        let next_xid = xid(&server.psql("SELECT pg_snapshot_xmax(pg_current_snapshot())"));
        let last: String = server.psql("SELECT xid FROM pg_last_committed_xact()");
        assert!(server.stop(StopMode::Fast).success());

        let wal = Wal::read(&server);
        assert_eq!(wal.last_commit, Some(xid(&last)), "PostgreSQL {major}");
        server.start();
        wal.compare_times(&server, first_xid, next_xid, expected.origin_xid);
        expected.compare(&wal, major);
        note(&format!(
            "catalog oracle, PostgreSQL {major}: {} records, {} transactions, no difference",
            wal.records,
            next_xid - first_xid
        ));
    }
}

fn xid(text: &str) -> u32 {
    text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is no transaction id"))
}

/// What the server said while it worked.
struct Expected {
    /// Relation files that a transaction's commit removes, as the catalog had them before.
    dropped: Vec<(u32, BTreeSet<RelFileLocator>)>,
    committed_two_phase: Vec<(u32, &'static str)>,
    aborted: Vec<u32>,
    /// A subtransaction that was rolled back, below one that committed.
    aborted_sub: u32,
    /// A top-level transaction and its committed subtransactions.
    with_subs: (u32, BTreeSet<u32>),
    truncated_table: u32,
    vacuumed: RelFileLocator,
    tablespace: (u32, String),
    database: u32,
    /// A transaction that was replayed from elsewhere and carries that server's time as well.
    origin_xid: u32,
}

/// The files of a table, its indexes and its TOAST table: what `pg_class` says.
fn files_of(server: &PgServer, table: &str) -> BTreeSet<RelFileLocator> {
    let rows = server.psql(&format!(
        "SELECT CASE c.reltablespace WHEN 0 THEN d.dattablespace ELSE c.reltablespace END, d.oid, c.relfilenode
         FROM pg_class c, pg_database d WHERE d.datname = current_database() AND c.oid IN (
             SELECT '{table}'::regclass UNION SELECT indexrelid FROM pg_index WHERE indrelid = '{table}'::regclass
             UNION SELECT reltoastrelid FROM pg_class WHERE oid = '{table}'::regclass
             UNION SELECT i.indexrelid FROM pg_index i, pg_class t
                 WHERE t.oid = '{table}'::regclass AND i.indrelid = t.reltoastrelid)"
    ));
    let files: BTreeSet<_> = rows
        .lines()
        .map(|row| {
            let fields: Vec<u32> = row.split('|').map(|field| field.parse().unwrap()).collect();
            RelFileLocator { tablespace: fields[0], database: fields[1], relation: fields[2] }
        })
        .collect();
    assert!(!files.is_empty() && files.iter().all(|file| file.relation > 0));
    files
}

fn work(server: &mut PgServer, tablespace: &str) -> Expected {
    server.psql(&format!(
        "CREATE TABLESPACE space LOCATION '{tablespace}';
         CREATE TABLE small (a int PRIMARY KEY, b text);
         CREATE TABLE plain (a int PRIMARY KEY, b text); CREATE INDEX ON plain (b);
         CREATE TABLE away (a int, b text) TABLESPACE space;
         CREATE TABLE cut (a int PRIMARY KEY, b text);
         CREATE TABLE emptied (a int);
         INSERT INTO plain SELECT g, md5(g::text) FROM generate_series(1, 5000) g;
         INSERT INTO away SELECT g, md5(g::text) FROM generate_series(1, 5000) g;
         INSERT INTO emptied SELECT generate_series(1, 5000);
         INSERT INTO cut VALUES (1, repeat('x', 10000));
         DO $$ BEGIN FOR i IN 1..500 LOOP INSERT INTO small VALUES (i); COMMIT; END LOOP; END $$;
         DO $$ BEGIN FOR i IN 400..600 LOOP
             BEGIN INSERT INTO small VALUES (i); EXCEPTION WHEN unique_violation THEN NULL; END;
         END LOOP; END $$;"
    ));
    let mut dropped = Vec::new();
    let mut drop_in = |server: &PgServer, table: &str, statement: &str| {
        let files = files_of(server, table);
        let top = xid(&server.psql(&format!("BEGIN; SELECT pg_current_xact_id(); {statement}; COMMIT")));
        dropped.push((top, files));
    };
    drop_in(server, "plain", "DROP TABLE plain");
    drop_in(server, "away", "DROP TABLE away");
    let truncated_table = xid(&server.psql("SELECT 'cut'::regclass::oid"));
    drop_in(server, "cut", "SAVEPOINT a; TRUNCATE cut");
    let subs = server.psql(
        "BEGIN; INSERT INTO small VALUES (1001); SAVEPOINT a; INSERT INTO small VALUES (1002);
         SAVEPOINT b; INSERT INTO small VALUES (1003); RELEASE b; SAVEPOINT c; INSERT INTO small VALUES (1004);
         SELECT xmin FROM small WHERE a = 1004; ROLLBACK TO c; COMMIT;
         SELECT xmin FROM small WHERE a BETWEEN 1001 AND 1003 ORDER BY a",
    );
    let subs: Vec<u32> = subs.lines().map(xid).collect();
    let rolled_back = server.psql(
        "BEGIN; INSERT INTO small VALUES (2001); SELECT pg_current_xact_id(); ROLLBACK;
         BEGIN; CREATE TABLE never (a int); SELECT pg_current_xact_id(); PREPARE TRANSACTION 'not';
         ROLLBACK PREPARED 'not'",
    );
    server.psql("SELECT pg_create_restore_point('before: \"the\" crash')");
    let two_phase = "BEGIN; INSERT INTO small VALUES (3001); SELECT pg_current_xact_id(); SAVEPOINT a;
         INSERT INTO small VALUES (3002); PREPARE TRANSACTION 'over; the crash'";
    let over_the_crash = xid(&server.psql(two_phase));
    server.kill9();
    server.start();
    server.psql("COMMIT PREPARED 'over; the crash'");
    let dropping = files_of(server, "small");
    let drops = xid(&server.psql(
        "BEGIN; SELECT pg_current_xact_id(); DROP TABLE small; PREPARE TRANSACTION 'drops';
         COMMIT PREPARED 'drops'",
    ));
    dropped.push((drops, dropping));
    let vacuumed = *files_of(server, "emptied").first().unwrap();
    server.psql("DELETE FROM emptied; VACUUM emptied");
    let origin = server.psql(
        "SELECT FROM pg_replication_origin_create('elsewhere');
         SELECT FROM pg_replication_origin_session_setup('elsewhere');
         BEGIN; SELECT FROM pg_replication_origin_xact_setup('0/1', '2001-02-03 04:05:06+00');
         SELECT pg_current_xact_id(); INSERT INTO cut VALUES (2); COMMIT;
         SELECT FROM pg_replication_origin_session_reset(); SELECT FROM pg_replication_origin_drop('elsewhere')",
    );
    let oids = server.psql(
        "CREATE DATABASE gone; SELECT oid FROM pg_database WHERE datname = 'gone'; DROP DATABASE gone;
         SELECT oid FROM pg_tablespace WHERE spcname = 'space'; DROP TABLESPACE space;
         SELECT FROM pg_switch_wal(); INSERT INTO cut VALUES (4)",
    );
    let oids: Vec<u32> = oids.lines().filter(|line| !line.is_empty()).map(xid).collect();
    Expected {
        dropped,
        committed_two_phase: vec![(over_the_crash, "over; the crash"), (drops, "drops")],
        aborted: rolled_back.lines().map(xid).collect(),
        aborted_sub: subs[0],
        with_subs: (subs[1], subs[2..].iter().copied().collect()),
        truncated_table,
        vacuumed,
        tablespace: (oids[1], tablespace.to_owned()),
        database: oids[0],
        origin_xid: origin.lines().find(|line| !line.is_empty()).map(xid).unwrap(),
    }
}

/// What the decoder finds in a stopped server's WAL.
struct Wal {
    records: u64,
    events: Vec<WalEvent>,
    last_commit: Option<u32>,
}

impl Wal {
    /// Reads all WAL of a server that was stopped cleanly; its last record is the one that the control
    /// file names, and every one before it is valid.
    fn read(server: &PgServer) -> Self {
        let control = std::fs::read(server.data_dir().join("global/pg_control")).unwrap();
        let control = ControlData::parse(&control).unwrap();
        assert_eq!(control.major(), Some(server.major()));
        let size: SegmentSize = control.segment_size;
        let wal_folder = server.data_dir().join("pg_wal");
        let names = std::fs::read_dir(&wal_folder).unwrap().map(|entry| entry.unwrap().file_name());
        let names = names.filter_map(|name| name.to_str()?.parse::<SegmentName>().ok());
        let mut name = names.min().unwrap();
        let mut reader = Reader::new(name.start(size), TimelineId::FIRST, size);
        let mut wal = Self { records: 0, events: Vec::new(), last_commit: None };
        let mut last_record = Lsn(0);
        while reader.stop().is_none() {
            let path = wal_folder.join(name.to_string());
            let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            reader.push(&bytes, |record, layout| {
                wal.records += 1;
                last_record = record.lsn;
                wal.events.extend(decode(record, layout).unwrap());
            });
            name = SegmentName::containing(TimelineId::FIRST, name.end(size), size);
        }
        let stop = reader.stop().unwrap();
        assert_eq!(last_record, control.checkpoint, "WAL ends early: {}", stop.reason);
        assert_eq!(stop.lsn, reader.valid_to());
        assert!(matches!(stop.reason, StopReason::Zeros | StopReason::PageAddress(_)), "{}", stop.reason);
        assert!(wal.records > 20_000, "only {} records", wal.records);
        wal.last_commit = wal.events.iter().rev().find_map(|event| match event.kind {
            EventKind::Commit { .. } => event.kind.ended_xid(event.xid),
            _ => None,
        });
        wal
    }

    /// Every transaction id that was given out ended in one record, and committed when the server says.
    fn compare_times(&self, server: &PgServer, first_xid: u32, next_xid: u32, origin_xid: u32) {
        let major = server.major();
        let mut committed: BTreeMap<u32, i64> = BTreeMap::new();
        let mut aborted: BTreeSet<u32> = BTreeSet::new();
        for event in &self.events {
            let Some(top) = event.kind.ended_xid(event.xid) else { continue };
            match &event.kind {
                EventKind::Commit { time, subxids, .. } => {
                    for xid in subxids.iter().chain([&top]) {
                        assert_eq!(committed.insert(*xid, time.timestamp_micros()), None, "{xid}");
                    }
                }
                EventKind::Abort { subxids, .. } => aborted.extend(subxids.iter().chain([&top])),
                _ => {}
            }
        }
        committed.retain(|xid, _| (first_xid..next_xid).contains(xid));
        aborted.retain(|xid| (first_xid..next_xid).contains(xid));
        let ended: BTreeSet<u32> = committed.keys().copied().chain(aborted.iter().copied()).collect();
        assert!(ended.iter().copied().eq(first_xid..next_xid), "PostgreSQL {major}: {ended:?}");
        assert_eq!(ended.len(), committed.len() + aborted.len(), "one both committed and aborted");

        let rows = server.psql(&format!(
            "SELECT x, (extract(epoch FROM pg_xact_commit_timestamp(x::text::xid)) * 1000000)::bigint
             FROM generate_series({first_xid}, {next_xid} - 1) x
             WHERE pg_xact_commit_timestamp(x::text::xid) IS NOT NULL ORDER BY x"
        ));
        let mut remembered: BTreeMap<u32, i64> = rows
            .lines()
            .map(|row| row.split_once('|').unwrap())
            .map(|(xid, micros)| (xid.parse().unwrap(), micros.parse().unwrap()))
            .collect();
        // The server remembers the origin's time for this one, and stops recovery by its own.
        let origin_time = remembered.get_mut(&origin_xid).unwrap();
        assert_eq!(*origin_time, 981_173_106_000_000);
        *origin_time = committed[&origin_xid];
        assert!(*origin_time > 981_173_106_000_000 && remembered.len() > 600);
        assert_eq!(committed, remembered, "PostgreSQL {major}");
    }

    /// The event that ended a transaction.
    fn end_of(&self, xid: u32) -> &EventKind {
        let mut ends = self.events.iter().filter(|event| event.kind.ended_xid(event.xid) == Some(xid));
        let end = ends.next().unwrap_or_else(|| panic!("transaction {xid} did not end"));
        assert!(ends.next().is_none(), "transaction {xid} ended twice");
        &end.kind
    }

    fn has(&self, wanted: &EventKind) -> bool {
        self.events.iter().any(|event| event.kind == *wanted)
    }
}

impl Expected {
    fn compare(&self, wal: &Wal, major: u32) {
        for (xid, files) in &self.dropped {
            let EventKind::Commit { dropped_relations, .. } = wal.end_of(*xid) else { panic!("{xid}") };
            assert_eq!(dropped_relations.iter().copied().collect::<BTreeSet<_>>(), *files, "{major}: {xid}");
        }
        for (xid, name) in &self.committed_two_phase {
            assert!(
                matches!(wal.end_of(*xid), EventKind::Commit { prepared_xid, .. } if *prepared_xid == Some(*xid))
            );
            let prepared = |event: &WalEvent| matches!(&event.kind, EventKind::Prepare { prepared_xid, gid, .. } if prepared_xid == xid && gid == name);
            assert_eq!(wal.events.iter().filter(|event| prepared(event)).count(), 1, "{major}: {name}");
        }
        assert_eq!(self.aborted.len(), 2);
        for xid in self.aborted.iter().chain([&self.aborted_sub]) {
            assert!(matches!(wal.end_of(*xid), EventKind::Abort { .. }), "{major}: {xid}");
        }
        let (top, subs) = &self.with_subs;
        let EventKind::Commit { subxids, .. } = wal.end_of(*top) else { panic!("{top}") };
        assert_eq!(subxids.iter().copied().collect::<BTreeSet<_>>(), *subs, "{major}");

        let (oid, path) = &self.tablespace;
        assert!(wal.has(&EventKind::TablespaceCreate { oid: *oid, path: path.clone() }), "{major}");
        assert!(wal.has(&EventKind::TablespaceDrop { oid: *oid }), "{major}");
        let database = self.vacuumed.database;
        assert!(wal.has(&EventKind::Truncate { database, relations: vec![self.truncated_table] }), "{major}");
        assert!(wal.has(&EventKind::StorageTruncate { relation: self.vacuumed, blocks: 0 }), "{major}");
        let gone = |event: &WalEvent| matches!(&event.kind, EventKind::DatabaseDrop { oid, tablespaces } if *oid == self.database && *tablespaces == [1663]);
        assert!(wal.events.iter().any(gone), "{major}");
        let listed = |event: &WalEvent| match &event.kind {
            EventKind::Commit { dropped_objects: Some(dropped), .. } => dropped.databases == [self.database],
            _ => false,
        };
        assert_eq!(wal.events.iter().any(listed), major > 14, "{major}");
        let marked = |event: &WalEvent| matches!(&event.kind, EventKind::DatabaseInvalid { oid, .. } if *oid == self.database);
        assert_eq!(wal.events.iter().filter(|event| marked(event)).count(), 1, "{major}");
        let named = |event: &WalEvent| matches!(&event.kind, EventKind::RestorePoint { name, .. } if name == "before: \"the\" crash");
        assert_eq!(wal.events.iter().filter(|event| named(event)).count(), 1, "{major}");
        assert!(wal.has(&EventKind::Switch), "{major}");
    }
}
