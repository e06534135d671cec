//! Makes the WAL fixtures of one major with a real server; `scripts/make-wal-fixtures` calls it.
//!
//! Two segments of 1 MiB with every kind of event, and a summary of all their records, which the decoder
//! wrote and, where the major has a `pg_waldump`, that one confirms line by line.

// A tool for developers may fail loudly.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::decode::decode;
use walship::wal::layout::rmgr;
use walship::wal::reader::Reader;
use walship_tests::postgres::{PgServer, StopMode};

fn main() {
    let mut args = std::env::args().skip(1);
    let usage = "usage: make_wal_fixtures MAJOR FOLDER";
    let major: u32 = args.next().and_then(|major| major.parse().ok()).expect(usage);
    let folder = PathBuf::from(args.next().expect(usage));
    fs::create_dir_all(&folder).unwrap();
    let spaces = tempfile::tempdir().unwrap();
    let mut server = PgServer::builder(major)
        .wal_segment_size_mb(1)
        .setting("wal_level", "logical")
        .setting("max_prepared_transactions", 10)
        .setting("autovacuum", "off")
        .setting("full_page_writes", "off")
        .setting("wal_keep_size", "1GB")
        .setting("wal_recycle", "off")
        .start();
    let size = SegmentSize::MIN;
    let first = server.switch_wal();
    let first: SegmentName = first.parse().unwrap();
    let first = SegmentName::containing(TimelineId::FIRST, first.end(size), size);
    let second = SegmentName::containing(TimelineId::FIRST, first.end(size), size);
    work(&server, spaces.path());
    let written: Lsn = server.psql("SELECT pg_current_wal_lsn()").parse().unwrap();
    let missing = second.start(size).0.saturating_sub(written.0);
    // One record that crosses into the second segment, then little more.
    let messages = format!("SELECT pg_logical_emit_message(false, 'fill', repeat('0', {missing} + 5000))");
    server.psql(&messages);
    server.psql("CREATE TABLE last (a int); DROP TABLE last; SELECT pg_switch_wal(); CREATE TABLE behind ()");
    server.stop(StopMode::Fast);

    let wal = server.data_dir().join("pg_wal");
    for name in [first, second] {
        fs::copy(wal.join(name.to_string()), folder.join(name.to_string())).unwrap();
    }
    fs::copy(server.data_dir().join("global/pg_control"), folder.join("pg_control")).unwrap();
    let (lines, events) = records(&wal, [first, second]);
    if server.binaries().has_waldump() {
        confirm(&server, first, &lines);
    }
    let expected = serde_json::json!({
        "records": lines.len(),
        "digest": walship::codec::Digest::of(lines.concat().as_bytes()).to_string(),
        "confirmed_by_pg_waldump": server.binaries().has_waldump(),
        "events": events,
    });
    fs::write(folder.join("expected.json"), serde_json::to_string_pretty(&expected).unwrap() + "\n").unwrap();
    println!("PostgreSQL {major}: {} records, {} events", lines.len(), events.len());
}

fn work(server: &PgServer, spaces: &Path) {
    server.psql(&format!(
        "CREATE TABLESPACE space LOCATION '{}';
         CREATE TABLE t (a int PRIMARY KEY, b text); CREATE TABLE away (a int) TABLESPACE space;
         INSERT INTO t SELECT g FROM generate_series(1, 300) g; INSERT INTO away SELECT generate_series(1, 100);
         SELECT pg_create_restore_point('fixture'); DELETE FROM t WHERE a > 100; VACUUM t; CHECKPOINT;
         BEGIN; INSERT INTO t VALUES (1001); SAVEPOINT a; INSERT INTO t VALUES (1002); SAVEPOINT b;
         INSERT INTO t VALUES (1003); ROLLBACK TO b; COMMIT;
         BEGIN; INSERT INTO t VALUES (1004); ROLLBACK;
         BEGIN; CREATE TABLE two (a int); SAVEPOINT a; INSERT INTO two VALUES (1); PREPARE TRANSACTION 'two; phases';
         COMMIT PREPARED 'two; phases';
         BEGIN; INSERT INTO t VALUES (1005); PREPARE TRANSACTION 'not'; ROLLBACK PREPARED 'not';
         TRUNCATE two; DROP TABLE away; DROP TABLESPACE space; DELETE FROM t; VACUUM t;
         CREATE INDEX ON t USING hash (b); CREATE INDEX ON t USING brin (a);
         INSERT INTO t VALUES (1, repeat('x', 3000));
         SELECT pg_replication_origin_create('elsewhere');
         SELECT pg_replication_origin_session_setup('elsewhere');
         BEGIN; SELECT pg_replication_origin_xact_setup('0/1', '2001-02-03 04:05:06+00');
         INSERT INTO t VALUES (2); COMMIT;
         {backup}",
        spaces.display(),
        // 14 still has exclusive backups.
        backup = if server.major() >= 15 {
            "SELECT pg_backup_start('fixture', true); SELECT count(*) FROM pg_backup_stop(false)"
        } else {
            "SELECT pg_start_backup('fixture', true); SELECT pg_stop_backup()"
        },
    ));
}

/// One line for each record, and all events.
fn records(wal: &Path, names: [SegmentName; 2]) -> (Vec<String>, Vec<serde_json::Value>) {
    let size = SegmentSize::MIN;
    let mut reader = Reader::new(names[0].start(size), TimelineId::FIRST, size);
    let (mut lines, mut events) = (Vec::new(), Vec::new());
    for name in names {
        reader.push(&fs::read(wal.join(name.to_string())).unwrap(), |record, layout| {
            let header = &record.header;
            let mut line = String::new();
            let name = rmgr::name(header.rmgr).unwrap();
            writeln!(line, "{} {} {name} {} {}", record.lsn, header.total_len, header.xid, header.prev)
                .unwrap();
            lines.push(line);
            let event = decode(record, layout).unwrap();
            events.extend(event.map(|event| serde_json::to_value(event).unwrap()));
        });
    }
    assert!(reader.stop().is_none() && reader.last_switch().is_some());
    (lines, events)
}

/// Compares the lines with those of `pg_waldump`.
fn confirm(server: &PgServer, first: SegmentName, lines: &[String]) {
    let mut waldump = server.binaries().tool("pg_waldump");
    waldump.arg("-p").arg(server.data_dir().join("pg_wal"));
    waldump.args(["-s", &first.start(SegmentSize::MIN).to_string(), "-n", &lines.len().to_string()]);
    let output = waldump.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let theirs = text.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("rmgr:")?.split_once("len (rec/tot):")?;
        let mut fields = rest.split(',').map(str::trim);
        let total = fields.next()?.split_once('/')?.1.trim();
        let xid = fields.next()?.strip_prefix("tx:")?.trim();
        let lsn: Lsn = fields.next()?.strip_prefix("lsn:")?.trim().parse().ok()?;
        let prev: Lsn = fields.next()?.strip_prefix("prev ")?.parse().ok()?;
        Some(format!("{lsn} {total} {} {xid} {prev}\n", name.trim()))
    });
    assert!(theirs.eq(lines.iter().cloned()), "pg_waldump sees other records");
}
