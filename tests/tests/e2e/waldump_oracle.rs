//! The decoder against its oracle: every record that `pg_waldump` prints, over a varied workload.
//!
//! Compared for each record: position, length with and without images, resource manager, transaction, back
//! link; and what the records that matter say: times, two-phase ids, subtransactions, dropped relations,
//! databases, tablespaces, truncations, restore points, checkpoints, parameter changes. Then the
//! segments' summaries, and what lies across two of them, are compared with the same records.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use walship::pg::{ControlData, Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::decode::decode;
use walship::wal::event::{EventKind, RelFileLocator, ServerLimits, WalEvent};
use walship::wal::events::EventReader;
use walship::wal::layout::rmgr;
use walship::wal::reader::Reader;
use walship::wal::scan::{SegmentScanner, Verdict};
use walship::wal::summary::{Joined, SegmentEnding, SegmentSummary, join};
use walship_tests::postgres::{self, PgBinaries, PgServer, StopMode};
use walship_tests::{note, process, wait};

/// The majors under test that have a `pg_waldump` of their own.
fn majors() -> Vec<u32> {
    let (with, without): (Vec<u32>, Vec<u32>) =
        postgres::majors().into_iter().partition(|major| PgBinaries::find(*major).has_waldump());
    for major in without {
        note(&format!("pg_waldump oracle: there is none for PostgreSQL {major}, not compared"));
    }
    assert!(!with.is_empty(), "none of the majors under test has a pg_waldump");
    with
}

#[test]
fn small_segments_agree_with_pg_waldump() {
    for major in majors() {
        let run = Workload { major, segment_mb: 1, rows: 40_000, wal_level: "replica" };
        run.compare(130_000, &["off", "pglz"]);
    }
}

#[test]
fn default_segments_agree_with_pg_waldump() {
    for major in majors() {
        let run = Workload { major, segment_mb: 16, rows: 60_000, wal_level: "replica" };
        run.compare(190_000, &["pglz", "off", "lz4", "zstd"]);
    }
}

#[test]
fn large_segments_agree_with_pg_waldump() {
    for major in majors() {
        let run = Workload { major, segment_mb: 64, rows: 60_000, wal_level: "logical" };
        run.compare(190_000, &["off", "pglz", "lz4"]);
    }
}

struct Workload {
    major: u32,
    segment_mb: u32,
    rows: u64,
    wal_level: &'static str,
}

impl Workload {
    fn compare(&self, at_least: u64, compressions: &[&str]) {
        let factor = if walship_tests::campaign() { 8 } else { 1 };
        let rows = self.rows * factor;
        let tablespace = tempfile::tempdir().unwrap();
        let mut server = PgServer::builder(self.major)
            .wal_segment_size_mb(self.segment_mb)
            .setting("wal_level", self.wal_level)
            .setting("max_prepared_transactions", 10)
            .setting("synchronous_commit", "off")
            .setting("autovacuum", "off")
            .setting("wal_buffers", "1MB")
            // Every segment stays, and stays as it was.
            .setting("wal_keep_size", "100GB")
            .setting("max_wal_size", "100GB")
            .setting("wal_recycle", "off")
            .start();
        for (round, compression) in compressions.iter().enumerate() {
            // Not every build has every method.
            let set = format!("ALTER SYSTEM SET wal_compression = '{compression}'");
            if server.try_psql(&set).is_err() {
                continue;
            }
            server.psql("SELECT pg_reload_conf(); CHECKPOINT");
            self.run(&server, round, rows / compressions.len() as u64, tablespace.path());
        }
        // Written by the next start: other limits.
        server.psql("ALTER SYSTEM SET max_connections = 77; ALTER SYSTEM SET track_commit_timestamp = on");
        server.restart();
        crash_in_a_large_record(&mut server);
        server.psql("INSERT INTO small VALUES (-1); SELECT pg_switch_wal(); INSERT INTO small VALUES (-2)");
        assert!(server.stop(StopMode::Fast).success());

        let mut found = compare_timeline(&server, TimelineId::FIRST);
        assert!(found.overwritten > 0, "no record was cut off by a crash");
        assert!(found.switches > 0 && found.commits > 500 && found.dropped > 10 && found.prepared >= 6);

        let forked = promote(&mut server);
        found.records += forked.records;
        assert!(found.records >= at_least, "only {} records", found.records);
        note(&format!(
            "pg_waldump oracle, PostgreSQL {}, segments of {} MiB: {} records, {} commits, {} crash-cut, no difference",
            self.major, self.segment_mb, found.records, found.commits, found.overwritten
        ));
    }

    fn run(&self, server: &PgServer, round: usize, rows: u64, tablespace: &Path) {
        let folder = tablespace.join(round.to_string());
        std::fs::create_dir(&folder).unwrap();
        let folder = folder.display();
        let half = rows / 2;
        server.psql(&format!(
            "DROP TABLE IF EXISTS t, small, big, shapes;
             CREATE TABLE t (id bigserial PRIMARY KEY, k int, v text);
             CREATE INDEX ON t (k);
             CREATE TABLE small (a int PRIMARY KEY, b text);
             CREATE TABLE big (a int, b text);
             ALTER TABLE big ALTER b SET STORAGE EXTERNAL;
             INSERT INTO t (k, v) SELECT g % 1000, md5(g::text) FROM generate_series(1, {rows}) g;
             UPDATE t SET k = k + 1 WHERE id % 10 = 0;
             SELECT pg_create_restore_point('round {round}: \"before\"');
             DELETE FROM t WHERE id % 7 = 0 OR id > {half};
             VACUUM t;
             CHECKPOINT;
             UPDATE t SET v = v || 'x' WHERE id % 5 = 0;
             INSERT INTO big SELECT g, repeat(md5(g::text), 3000 * g) FROM generate_series(1, 12) g;
             VACUUM FULL small; REINDEX TABLE t; CLUSTER t USING t_pkey;"
        ));
        // One commit a row, subtransactions that fail, more of them than a backend caches, row locks by two.
        server.psql(
            "DO $$ BEGIN FOR i IN 1..400 LOOP INSERT INTO small VALUES (i, 'x'); COMMIT; END LOOP; END $$;
             DO $$ BEGIN FOR i IN 300..600 LOOP
                BEGIN INSERT INTO small VALUES (i); EXCEPTION WHEN unique_violation THEN NULL; END;
             END LOOP; END $$;
             BEGIN; INSERT INTO small VALUES (1001); SAVEPOINT a; INSERT INTO small VALUES (1002); ROLLBACK TO a;
             SAVEPOINT b; INSERT INTO small VALUES (1003); COMMIT;
             BEGIN; CREATE TABLE never AS SELECT 1 AS a; SAVEPOINT a; INSERT INTO small VALUES (1004); ROLLBACK;
             BEGIN; SELECT * FROM small WHERE a = 1 FOR KEY SHARE; SAVEPOINT a;
             UPDATE small SET b = 'y' WHERE a = 1; COMMIT;",
        );
        server.psql(
            "BEGIN; INSERT INTO small VALUES (2001); SAVEPOINT a; INSERT INTO small VALUES (2002);
             DROP TABLE big; CREATE TABLE big (a int, b text); PREPARE TRANSACTION 'one; of: two';
             COMMIT PREPARED 'one; of: two';
             BEGIN; INSERT INTO small VALUES (2003); CREATE TABLE never (a int); PREPARE TRANSACTION 'not';
             ROLLBACK PREPARED 'not';
             BEGIN; INSERT INTO small VALUES (2004); PREPARE TRANSACTION 'same database'; COMMIT PREPARED 'same database';",
        );
        server.psql(
            "CREATE TABLE shapes AS SELECT g AS id, point(g % 100, g % 77) AS p, ARRAY[g % 50, g % 30] AS l, \
                 md5(g::text) AS v FROM generate_series(1, 3000) g;
             CREATE INDEX ON shapes USING gist (p); CREATE INDEX ON shapes USING spgist (p);
             CREATE INDEX ON shapes USING gin (l); CREATE INDEX ON shapes USING brin (id);
             CREATE INDEX ON shapes USING hash (v);
             INSERT INTO shapes SELECT g, point(g % 10, g % 7), ARRAY[g % 50, g % 30], md5(g::text) \
                 FROM generate_series(1, 1000) g;
             DELETE FROM shapes WHERE id % 3 = 0; VACUUM shapes; TRUNCATE shapes RESTART IDENTITY;
             CREATE SEQUENCE s; SELECT nextval('s') FROM generate_series(1, 100); DROP SEQUENCE s;
             CREATE MATERIALIZED VIEW m AS SELECT * FROM small; REFRESH MATERIALIZED VIEW m;
             DROP MATERIALIZED VIEW m;",
        );
        // The origin's time is a trap: only the record's own is the commit's.
        server.psql(
            "SELECT pg_replication_origin_create('elsewhere');
             SELECT pg_replication_origin_session_setup('elsewhere');
             BEGIN; SELECT pg_replication_origin_xact_setup('0/1', '2001-02-03 04:05:06+00');
             INSERT INTO small VALUES (3001); COMMIT;
             SELECT pg_replication_origin_session_reset();
             SELECT pg_replication_origin_drop('elsewhere');",
        );
        let (file_copy, wal_log) =
            if self.major >= 15 { ("STRATEGY file_copy", "STRATEGY wal_log") } else { ("", "") };
        server.psql(&format!(
            "CREATE TABLESPACE space LOCATION '{folder}';
             CREATE TABLE there (a int) TABLESPACE space; INSERT INTO there VALUES (1);
             CREATE DATABASE copied {file_copy}; CREATE DATABASE logged {wal_log} TABLESPACE space;
             DROP TABLE there;
             ALTER DATABASE logged SET TABLESPACE pg_default;
             DROP DATABASE logged; DROP DATABASE copied; DROP TABLESPACE space;
             SELECT pg_logical_emit_message(true, 'here', 'and now');
             SELECT pg_switch_wal();
             BEGIN; INSERT INTO small VALUES (4001); SELECT pg_switch_wal(); INSERT INTO small VALUES (4002); COMMIT;"
        ));
    }
}

/// Kills the server with SIGKILL while it writes records of many megabytes, again and again until one
/// was cut off: the next start must have overwritten it.
fn crash_in_a_large_record(server: &mut PgServer) {
    for _ in 0..20 {
        let wal = server.data_dir().join("pg_wal");
        let before: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        let size = segment_size(server);
        let first = SegmentName::containing(TimelineId::FIRST, before, size);
        let enough = Lsn(before.0 + (40 << 20));
        let mut psql = server.tool("psql");
        let messages = "SELECT pg_logical_emit_message(false, 'large', repeat('0123456789', 3000000)) FROM generate_series(1, 40)";
        psql.args(["-X", "-q", "-c", messages]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut writer = process::spawn(psql).unwrap();
        // Once this much is written, a record is under way or the next one soon is.
        wait::until("large records are being written", || {
            let written: Lsn = server.psql("SELECT pg_current_wal_lsn()").parse().unwrap();
            written > enough
        });
        server.kill9();
        process::kill_tree(&mut writer);
        server.start();
        let mut reader = EventReader::new(size);
        let mut cut = false;
        for (name, path) in wal_files(&wal, TimelineId::FIRST) {
            if name >= first {
                let bytes = std::fs::read(path).unwrap();
                let look =
                    |event: WalEvent| cut |= matches!(event.kind, EventKind::OverwriteContrecord { .. });
                if reader.segment(name, &bytes, look).is_err() {
                    break;
                }
            }
        }
        if cut {
            return;
        }
    }
    panic!("20 crashes did not cut off one record");
}

/// Makes the stopped server a standby, promotes it, writes a little and compares the new timeline.
fn promote(server: &mut PgServer) -> Found {
    std::fs::write(server.data_dir().join("standby.signal"), "").unwrap();
    server.start();
    server.promote();
    server.psql("INSERT INTO small SELECT g FROM generate_series(10000, 20000) g; DROP TABLE t");
    assert!(server.stop(StopMode::Fast).success());
    let timeline = TimelineId::new(2).unwrap();
    let found = compare_timeline(server, timeline);
    assert_eq!(found.ends_of_recovery, 1);
    found
}

fn segment_size(server: &PgServer) -> SegmentSize {
    let control = std::fs::read(server.data_dir().join("global/pg_control")).unwrap();
    let control = ControlData::parse(&control).unwrap();
    assert_eq!(control.major(), Some(server.major()));
    control.segment_size
}

/// The segments of a timeline, in order.
fn wal_files(folder: &Path, timeline: TimelineId) -> Vec<(SegmentName, PathBuf)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let name: SegmentName = path.file_name()?.to_str()?.parse().ok()?;
            (name.timeline == timeline).then_some((name, path))
        })
        .collect();
    files.sort();
    files
}

#[derive(Debug, Default)]
struct Found {
    records: u64,
    commits: u64,
    prepared: u64,
    dropped: u64,
    switches: u64,
    overwritten: u64,
    ends_of_recovery: u64,
}

/// One record as the decoder sees it.
struct Ours {
    lsn: Lsn,
    end: Lsn,
    total: u64,
    /// Without images.
    own: u64,
    rmgr: u8,
    xid: u32,
    prev: Lsn,
    event: Option<WalEvent>,
}

/// Compares every record of a timeline's segments with `pg_waldump`, and their summaries with the records.
fn compare_timeline(server: &PgServer, timeline: TimelineId) -> Found {
    let size = segment_size(server);
    let wal = server.data_dir().join("pg_wal");
    let files = wal_files(&wal, timeline);
    let (first, _) = files[0];
    let mut oracle = Oracle::start(server, timeline, first.start(size));
    let mut reader = Reader::new(first.start(size), timeline, size);
    let mut events = EventReader::new(size);
    let mut found = Found::default();
    let mut previous: Option<SegmentSummary> = None;
    // Records that end in a later segment than they start in, by start.
    let mut crossing: BTreeMap<Lsn, Option<WalEvent>> = BTreeMap::new();
    for (name, path) in &files {
        let bytes = std::fs::read(path).unwrap();
        let mut records = Vec::new();
        // Chunks of an odd size: the cuts must not matter.
        let chunk = if name.seg % 2 == 0 { 100_003 } else { 1 << 20 };
        for part in bytes.chunks(chunk) {
            reader.push(part, |record, layout| {
                let parts = record.parts(layout).unwrap();
                records.push(Ours {
                    lsn: record.lsn,
                    end: record.end_lsn,
                    total: u64::from(record.header.total_len),
                    own: u64::from(record.header.total_len) - parts.image_bytes,
                    rmgr: record.header.rmgr,
                    xid: record.header.xid,
                    prev: record.header.prev,
                    event: decode(record, layout).unwrap(),
                });
            });
        }
        for ours in &records {
            let theirs = oracle.next().unwrap_or_else(|| panic!("pg_waldump does not know {}", ours.lsn));
            theirs.compare(ours);
            found.count(ours);
            if SegmentName::containing(timeline, ours.lsn, size) != *name {
                crossing.insert(ours.lsn, ours.event.clone());
            }
        }
        let mut again = Vec::new();
        let read = events.segment(*name, &bytes, |event| again.push(event));
        assert!(records.iter().filter_map(|ours| ours.event.as_ref()).eq(again.iter()), "events of {name}");

        let mut scanner = SegmentScanner::new(*name, size);
        bytes.chunks(70_001).for_each(|part| scanner.push(part));
        let scan = scanner.finish();
        if reader.stop().is_some() {
            assert!(read.is_err());
            assert!(
                matches!(scan.verdict, Verdict::Incomplete { valid_to, .. } if valid_to == reader.valid_to()),
                "{name}: {:?}, valid to {}",
                scan.verdict,
                reader.valid_to()
            );
            break;
        }
        assert!(read.is_ok());
        assert_eq!(scan.verdict, Verdict::Whole, "{name}");
        check_summary(&scan.summary, &records, server.system_identifier_on_disk());
        if let Some(previous) = &previous {
            check_join(previous, &scan.summary, &crossing);
        }
        previous = Some(scan.summary);
    }
    if let Some(extra) = oracle.next() {
        panic!("pg_waldump goes on with {}, the decoder stopped: {:?}", extra.lsn, reader.stop());
    }
    found
}

/// Reads the system identifier of a server that does not run.
trait SystemIdentifierOnDisk {
    fn system_identifier_on_disk(&self) -> u64;
}

impl SystemIdentifierOnDisk for PgServer {
    fn system_identifier_on_disk(&self) -> u64 {
        let control = std::fs::read(self.data_dir().join("global/pg_control")).unwrap();
        ControlData::parse(&control).unwrap().system_identifier
    }
}

fn check_summary(summary: &SegmentSummary, records: &[Ours], system_identifier: u64) {
    let (start, end) =
        (summary.segment.start(summary.segment_size), summary.segment.end(summary.segment_size));
    let inside: Vec<&Ours> = records.iter().filter(|ours| ours.lsn >= start).collect();
    assert_eq!(summary.system_identifier, system_identifier);
    assert!(serde_json::to_vec(summary).unwrap().len() <= SegmentSummary::MAX_BYTES);
    assert_eq!(summary.counts.records, inside.len() as u64, "{}", summary.segment);
    let first = inside.first().map(|ours| ours.lsn).or(summary.unfinished.as_ref().map(|part| part.lsn));
    assert_eq!(summary.first_record, first);
    let ends =
        || inside.iter().filter_map(|ours| ours.event.as_ref()).filter(|e| e.kind.stop_time().is_some());
    assert_eq!(summary.counts.commits + summary.counts.aborts, ends().count() as u64);
    let times = |stop: &Option<walship::wal::summary::StopTime>| stop.map(|stop| stop.time);
    assert_eq!(times(&summary.min_time), ends().filter_map(|e| e.kind.stop_time()).min());
    assert_eq!(times(&summary.max_time), ends().filter_map(|e| e.kind.stop_time()).max());
    let xids = || ends().filter_map(|event| event.kind.ended_xid(event.xid));
    assert_eq!(summary.ended_xids, xids().min().zip(xids().max()));
    match summary.ending {
        SegmentEnding::Full => assert_eq!(summary.end_of_wal, end),
        SegmentEnding::Switch => {
            let last = records.last().expect("a switch is a record");
            assert!(matches!(last.event, Some(WalEvent { kind: EventKind::Switch, .. })));
            assert_eq!(summary.end_of_wal.0, last.end.0.next_multiple_of(8));
        }
        ref other => panic!("{other:?}"),
    }
    let kept = |event: &&&WalEvent| match &event.kind {
        EventKind::Commit { dropped_relations, dropped_objects, .. } => {
            let database = dropped_objects.as_ref().is_some_and(|dropped| !dropped.databases.is_empty());
            database || !dropped_relations.is_empty()
        }
        EventKind::Abort { .. } | EventKind::Prepare { .. } => false,
        _ => true,
    };
    let events: Vec<&WalEvent> = inside.iter().filter_map(|ours| ours.event.as_ref()).collect();
    let expected: Vec<&WalEvent> = events.iter().filter(kept).copied().collect();
    if summary.events_truncated {
        assert!(summary.events.iter().all(|event| expected.contains(&event)));
    } else {
        assert!(summary.events.iter().eq(expected), "{}", summary.segment);
    }
}

fn check_join(previous: &SegmentSummary, next: &SegmentSummary, crossing: &BTreeMap<Lsn, Option<WalEvent>>) {
    let joined = join(previous, next);
    let Some(unfinished) = &previous.unfinished else {
        assert_eq!(joined, Joined::None);
        return;
    };
    let goes_on = next.leading.as_ref().is_some_and(|part| part.end.is_none());
    match crossing.get(&unfinished.lsn) {
        Some(Some(event)) => {
            assert!(joined == Joined::Event(event.clone()) || joined == Joined::ReadSegments, "{joined:?}");
        }
        Some(None) => assert_eq!(joined, Joined::NotOfInterest, "{}", unfinished.lsn),
        None if goes_on => assert_eq!(joined, Joined::NotOfInterest, "a message of many segments"),
        // Cut off by a crash.
        None => assert!(matches!(joined, Joined::None | Joined::NotOfInterest), "{joined:?}"),
    }
}

impl Found {
    fn count(&mut self, ours: &Ours) {
        self.records += 1;
        match ours.event.as_ref().map(|event| &event.kind) {
            Some(EventKind::Commit { prepared_xid, dropped_relations, .. }) => {
                self.commits += 1;
                self.prepared += u64::from(prepared_xid.is_some());
                self.dropped += dropped_relations.len() as u64;
            }
            Some(EventKind::Abort { prepared_xid: Some(_), .. }) => self.prepared += 1,
            Some(EventKind::Switch) => self.switches += 1,
            Some(EventKind::OverwriteContrecord { .. }) => self.overwritten += 1,
            Some(EventKind::EndOfRecovery { .. }) => self.ends_of_recovery += 1,
            _ => {}
        }
    }
}

/// `pg_waldump`, line by line.
struct Oracle {
    child: std::process::Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Oracle {
    fn start(server: &PgServer, timeline: TimelineId, start: Lsn) -> Self {
        let mut command = server.tool("pg_waldump");
        command.env("TZ", "UTC").arg("-p").arg(server.data_dir().join("pg_wal"));
        command.args(["-t", &timeline.to_string(), "-s", &start.to_string()]);
        // It ends with an error where WAL ends: expected, and not looked at.
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Iterator for Oracle {
    type Item = Theirs;

    fn next(&mut self) -> Option<Theirs> {
        loop {
            let line = self.lines.next()?.unwrap();
            // The only other line says how far the first record is from the start.
            if line.starts_with("rmgr:") {
                return Some(Theirs::parse(&line).unwrap_or_else(|| panic!("not understood: {line}")));
            }
        }
    }
}

/// One line of `pg_waldump`.
pub(crate) struct Theirs {
    pub(crate) rmgr: String,
    own: u64,
    total: u64,
    pub(crate) xid: u32,
    pub(crate) lsn: Lsn,
    prev: Lsn,
    pub(crate) desc: String,
}

impl Theirs {
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (rmgr, rest) = line.strip_prefix("rmgr:")?.split_once("len (rec/tot):")?;
        let (len, rest) = rest.split_once(", tx:")?;
        let (xid, rest) = rest.split_once(", lsn:")?;
        let (lsn, rest) = rest.split_once(", prev ")?;
        let (prev, desc) = rest.split_once(", desc: ")?;
        let (own, total) = len.split_once('/')?;
        Some(Self {
            rmgr: rmgr.trim().to_owned(),
            own: own.trim().parse().ok()?,
            total: total.trim().parse().ok()?,
            xid: xid.trim().parse().ok()?,
            lsn: lsn.trim().parse().ok()?,
            prev: prev.trim().parse().ok()?,
            desc: desc.trim_end().to_owned(),
        })
    }

    fn compare(&self, ours: &Ours) {
        let name = rmgr::name(ours.rmgr).unwrap();
        assert_eq!(
            (self.lsn, self.own, self.total, self.rmgr.as_str(), self.xid, self.prev),
            (ours.lsn, ours.own, ours.total, name, ours.xid, ours.prev),
            "pg_waldump: {}",
            self.desc
        );
        match (&ours.event, self.expected()) {
            (None, None) => {}
            (Some(event), Some(expected)) => assert_eq!(told(&event.kind), expected, "{}", self.lsn),
            // It says of no update in place what was written.
            (Some(WalEvent { kind: EventKind::DatabaseInvalid { .. }, .. }), None) => {
                assert!(
                    self.desc.starts_with("INPLACE") && self.desc.contains("rel 1664/0/"),
                    "{}",
                    self.desc
                );
            }
            (event, expected) => panic!("{}: {expected:?}, decoded as {event:?}", self.lsn),
        }
    }

    /// What the line says, in the words of [`told`]; `None` for a record that is no event.
    fn expected(&self) -> Option<String> {
        let (kind, rest) = self.desc.split_once(' ').unwrap_or((&self.desc, ""));
        let parts: Vec<&str> = rest.split("; ").collect();
        let item = |key: &str| parts.iter().find_map(|part| part.strip_prefix(key)).map(str::trim);
        let list = |key: &str| item(key).unwrap_or_default().to_owned();
        Some(match (self.rmgr.as_str(), kind) {
            ("Transaction", "COMMIT" | "COMMIT_PREPARED" | "ABORT" | "ABORT_PREPARED") => {
                let (xid, time) = match parts[0].split_once(": ") {
                    Some((xid, time)) => (xid, time),
                    None => ("-", parts[0]),
                };
                let committed = kind.starts_with("COMMIT");
                // An abort's relations are those it made itself; they are of no interest.
                let relations =
                    if committed { without_version_folder(&list("rels:")) } else { String::new() };
                // Kind, database, object: 1 is a database, 2 a relation.
                let stats = if committed { list("dropped stats:") } else { String::new() };
                let dropped = |kind: &str, at: usize| {
                    let mut items = stats.split(' ').map(|item| item.split('/').collect::<Vec<_>>());
                    let mut oids: Vec<String> = Vec::new();
                    items
                        .by_ref()
                        .filter(|item| item[0] == kind)
                        .for_each(|item| oids.push(item[at].to_owned()));
                    oids.join(" ")
                };
                let word = if committed { "commit" } else { "abort" };
                format!(
                    "{word} {time} of {xid} [{}] [{relations}] [{}] [{}]",
                    list("subxacts:"),
                    dropped("2", 2),
                    dropped("1", 1)
                )
            }
            ("Transaction", "PREPARE") => {
                // The name itself may hold what separates the parts.
                let at = rest.find(" UTC")?;
                let (gid, time) = rest[..at].rsplit_once(": ")?;
                format!("prepare {} at {time} UTC", gid.strip_prefix("gid ")?)
            }
            ("XLOG", "CHECKPOINT_SHUTDOWN") if self.prev.0 == 0 => "wal begins".to_owned(),
            ("XLOG", "CHECKPOINT_SHUTDOWN" | "CHECKPOINT_ONLINE") => {
                let redo: Lsn = item("redo")?.parse().ok()?;
                let (epoch, xid) = item("xid")?.split_once(':')?;
                let xid = (epoch.parse::<u64>().ok()? << 32) | xid.parse::<u64>().ok()?;
                format!("checkpoint {redo} {} {xid} {}", item("tli")?, kind.ends_with("SHUTDOWN"))
            }
            ("XLOG", "SWITCH") => "switch".to_owned(),
            ("XLOG", "RESTORE_POINT") => format!("restore point {rest}"),
            ("XLOG", "PARAMETER_CHANGE") => format!("limits {rest}"),
            ("XLOG", "BACKUP_END") => format!("backup end {}", rest.parse::<Lsn>().ok()?),
            ("XLOG", "END_OF_RECOVERY") => {
                format!("end of recovery {} from {} at {}", item("tli")?, item("prev tli")?, item("time")?)
            }
            ("XLOG", "OVERWRITE_CONTRECORD") => {
                format!("overwrote {} at {}", item("lsn")?.parse::<Lsn>().ok()?, item("time")?)
            }
            ("Database", "DROP") => format!("database drop {}", rest.strip_prefix("dir ")?),
            ("Tablespace", "CREATE" | "DROP") => format!("tablespace {kind} {rest}"),
            ("Storage", "TRUNCATE") => {
                let (relation, rest) = rest.split_once(" to ")?;
                let relation = without_version_folder(relation);
                format!("storage truncate {relation} to {}", rest.split(' ').next()?)
            }
            ("Heap", "TRUNCATE" | "TRUNCATE+INIT") => {
                let (_, relations) = rest.rsplit_once("relids")?;
                let digits = |c: char| c.is_ascii_digit();
                let oids: Vec<&str> =
                    relations.split(|c| !digits(c)).filter(|part| !part.is_empty()).collect();
                format!("truncate {}", oids.join(" "))
            }
            _ => return None,
        })
    }
}

/// A tablespace's path goes on with a folder named for the version, `PG_15_202209061`: not part of a relation.
fn without_version_folder(paths: &str) -> String {
    let path = |path: &str| {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.starts_with("PG_")).collect();
        parts.join("/")
    };
    paths.split(' ').map(path).collect::<Vec<_>>().join(" ")
}

/// Says an event in the words of `pg_waldump`, as far as it knows them.
fn told(kind: &EventKind) -> String {
    macro_rules! at {
        ($time:expr) => {
            $time.format("%Y-%m-%d %H:%M:%S%.6f UTC")
        };
    }
    let numbers = |xids: &[u32]| xids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let of = |xid: &Option<u32>| xid.map_or("-".to_owned(), |xid| xid.to_string());
    match kind {
        EventKind::Commit { time, prepared_xid, subxids, dropped_relations, dropped_objects } => {
            let relations: Vec<_> = dropped_relations.iter().map(path).collect();
            let dropped = dropped_objects.clone().unwrap_or_default();
            format!(
                "commit {} of {} [{}] [{}] [{}] [{}]",
                at!(time),
                of(prepared_xid),
                numbers(subxids),
                relations.join(" "),
                numbers(&dropped.relations),
                numbers(&dropped.databases)
            )
        }
        EventKind::Abort { time, prepared_xid, subxids } => {
            format!("abort {} of {} [{}] [] [] []", at!(time), of(prepared_xid), numbers(subxids))
        }
        EventKind::Prepare { time, gid, .. } => format!("prepare {gid} at {}", at!(time)),
        EventKind::Checkpoint { redo, timeline, shutdown, next_full_xid, .. } => {
            format!("checkpoint {redo} {timeline} {next_full_xid} {shutdown}")
        }
        EventKind::Switch => "switch".to_owned(),
        EventKind::RestorePoint { name, .. } => format!("restore point {name}"),
        EventKind::WalBegins { .. } => "wal begins".to_owned(),
        EventKind::ParameterChange { settings } => format!("limits {}", limits(settings)),
        EventKind::BackupEnd { start_lsn } => format!("backup end {start_lsn}"),
        EventKind::EndOfRecovery { time, timeline, previous_timeline } => {
            format!("end of recovery {timeline} from {previous_timeline} at {}", at!(time))
        }
        EventKind::OverwriteContrecord { overwritten, time } => {
            format!("overwrote {overwritten} at {}", at!(time))
        }
        EventKind::DatabaseDrop { oid, tablespaces } => {
            let folders: Vec<_> = tablespaces.iter().map(|space| format!("{space}/{oid}")).collect();
            format!("database drop {}", folders.join(" "))
        }
        EventKind::DatabaseInvalid { oid, name } => format!("database {oid} {name:?} marked invalid"),
        EventKind::TablespaceCreate { oid, path } => format!("tablespace CREATE {oid} \"{path}\""),
        EventKind::TablespaceDrop { oid } => format!("tablespace DROP {oid}"),
        EventKind::StorageTruncate { relation, blocks } => {
            format!("storage truncate {} to {blocks}", path(relation))
        }
        EventKind::Truncate { relations, .. } => format!("truncate {}", numbers(relations)),
    }
}

/// A relation's path, as `pg_waldump` prints it; the version folder of a tablespace is left out of both.
fn path(relation: &RelFileLocator) -> String {
    let RelFileLocator { tablespace, database, relation } = relation;
    match tablespace {
        1663 => format!("base/{database}/{relation}"),
        1664 => format!("global/{relation}"),
        space => format!("pg_tblspc/{space}/{database}/{relation}"),
    }
}

fn limits(limits: &ServerLimits) -> String {
    let level = ["minimal", "replica", "logical"][limits.wal_level as usize];
    let switch = |on: bool| if on { "on" } else { "off" };
    format!(
        "max_connections={} max_worker_processes={} max_wal_senders={} max_prepared_xacts={} \
         max_locks_per_xact={} wal_level={level} wal_log_hints={} track_commit_timestamp={}",
        limits.max_connections,
        limits.max_worker_processes,
        limits.max_wal_senders,
        limits.max_prepared_transactions,
        limits.max_locks_per_transaction,
        switch(limits.wal_log_hints),
        switch(limits.track_commit_timestamp)
    )
}
