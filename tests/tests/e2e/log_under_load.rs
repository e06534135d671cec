//! `pitr log` under load: fifty sessions write while tables are dropped, emptied and mass-deleted and a database
//! is dropped. Each is found by name, and a restore to just before it holds what `pg_waldump` puts before it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::Value;
use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::process;
use walship_tests::stage::Stage;

use crate::log::{log, the_one, transaction};
use crate::waldump_oracle::Theirs;

#[test]
fn what_was_destroyed_under_load_is_found_and_brought_back() {
    destroyed(primary_major());
}

#[test]
fn what_was_destroyed_under_load_is_found_and_brought_back_on_a_newer_major() {
    destroyed(newer_major());
}

/// How many rows each of the tables has that are destroyed.
const ROWS: u64 = 20_000;

/// Where each transaction was committed and when, as `pg_waldump` says.
fn commits(server: &PgServer) -> BTreeMap<u32, (Lsn, String)> {
    let wal = server.data_dir().join("pg_wal");
    let is_segment = |name: &str| name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let names =
        std::fs::read_dir(&wal).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let first = names.filter(|name| is_segment(name)).min().unwrap();
    let mut waldump = server.tool("pg_waldump");
    waldump.env("TZ", "UTC").arg("-p").arg(&wal).args(["-r", "Transaction"]).arg(&first);
    // From its first segment on to the end of WAL, which it calls an error.
    let last =
        std::fs::read_dir(&wal).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    waldump.arg(last.filter(|name| is_segment(name)).max().unwrap());
    let mut child = waldump.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut commits = BTreeMap::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some(record) = Theirs::parse(&line) else { continue };
        if let Some(time) = record.desc.strip_prefix("COMMIT ") {
            let time = time.split(';').next().unwrap().trim_end_matches(" UTC").to_owned();
            assert!(commits.insert(record.xid, (record.lsn, time)).is_none(), "{} twice", record.xid);
        }
    }
    child.wait().unwrap();
    commits
}

/// What fifty sessions wrote: each row holds the transaction that wrote it.
fn load_rows(server: &PgServer) -> BTreeSet<u32> {
    server.psql("select x from load").lines().map(|line| line.parse().unwrap()).collect()
}

fn sum(server: &PgServer, database: &str, table: &str) -> String {
    server.psql_in(database, &format!("select count(*), sum(x), sum(length(note)) from {table}"))
}

fn destroyed(major: u32) {
    let stage = Stage::folder("main");
    let mut server = stage
        .archiving(PgServer::builder(major).wal_segment_size_mb(4))
        .setting("max_connections", 120)
        .setting("wal_keep_size", "100GB")
        .setting("wal_recycle", "off")
        .start();
    stage.init(&server);
    let create = |table: &str| {
        format!(
            "create table {table} (x bigint primary key, note text); \
             insert into {table} select g, repeat('n', 20) from generate_series(1, {ROWS}) g;"
        )
    };
    server.psql("create table load (x bigint); create schema shop; create database other");
    server.psql(&format!("{}{}{}", create("shop.victim"), create("emptied"), create("culled")));
    server.psql_in("other", &create("inside"));
    stage.backup(&server);
    let whole = sum(&server, "postgres", "culled");

    let script = stage.path().join("load.sql");
    std::fs::write(&script, "insert into load values (pg_current_xact_id()::text::bigint);\n").unwrap();
    let mut pgbench = server.tool("pgbench");
    pgbench.args(["-n", "-c", "50", "-j", "2", "-R", "600", "-T", "600", "-f"]).arg(&script);
    pgbench.stdout(Stdio::null()).stderr(Stdio::null());
    let mut pgbench = process::spawn(pgbench).unwrap();
    let go_on = || {
        let written: u64 = server.psql("select count(*) from load").parse().unwrap();
        server.wait_for(&format!("select count(*) > {} from load", written + 300), "t");
    };
    server.wait_for("select count(*) = 50 from pg_stat_activity where application_name = 'pgbench'", "t");
    go_on();
    transaction(&server, "delete from culled; drop table shop.victim; truncate emptied", "rollback");
    go_on();
    let drop = transaction(&server, "drop table shop.victim", "commit");
    go_on();
    let truncate = transaction(&server, "truncate emptied", "commit");
    go_on();
    // Part of it in a subtransaction.
    let culled = format!(
        "delete from culled where x <= {0}; savepoint s; delete from culled where x > {0} and x <= {1}; release s",
        ROWS / 2,
        ROWS - 100
    );
    let delete = transaction(&server, &culled, "commit");
    go_on();
    server.psql("drop database other");
    go_on();
    // The same name again, after all of it.
    server.psql("create table shop.victim (x int)");
    process::kill_tree(&mut pgbench);
    server.archive_now();
    let written = load_rows(&server);
    server.stop(StopMode::Fast);
    let commits = commits(&server);
    assert!(written.len() > 1500 && written.iter().all(|xid| commits.contains_key(xid)));

    let all = log(&stage, &["--only", "drop,truncate,delete-heavy", "--limit", "10000"]);
    let what = |line: &Value| line["what"].as_str().unwrap().to_owned();
    let dropped = the_one(&all, |line| what(line) == "shop.victim dropped");
    let truncated = the_one(&all, |line| what(line).starts_with("public.emptied given new storage"));
    let deleted = the_one(&all, |line| line["kinds"][0] == "delete-heavy");
    assert!(what(&deleted).ends_with(" rows of public.culled deleted"), "{deleted:#}");
    // Records that cross from one segment into the next are not counted, nor few in one segment.
    let rows = deleted["relations"][0]["deleted_rows"].as_u64().unwrap();
    assert!((ROWS - 400..=ROWS - 100).contains(&rows), "{deleted:#}");
    let gone = the_one(&all, |line| what(line).starts_with("database \"other\" (oid"));
    for (event, xid) in [(&dropped, drop), (&truncated, truncate), (&deleted, delete)] {
        let (lsn, time) = &commits[&u32::try_from(xid).unwrap()];
        assert_eq!(event["xid"], xid, "{event:#}");
        assert_eq!(event["lsn"], lsn.to_string(), "{event:#}");
        let told: chrono::DateTime<chrono::Utc> = event["time"].as_str().unwrap().parse().unwrap();
        assert_eq!(told.format("%Y-%m-%d %H:%M:%S%.6f").to_string(), *time, "{event:#}");
    }

    let restored = |words: &str, event: &Value, database: &str, table: &str| {
        let dir = stage.path().join(words.replace([':', '/', '.'], "-"));
        stage.ok(&mut stage.pitr(&["restore", "-D", dir.to_str().unwrap(), "--before", words]));
        let back = stage.recovering(&dir).start();
        back.wait_for("select pg_is_in_recovery()", "f");
        assert_eq!(sum(&back, database, table), whole, "{words}");
        let stop: Lsn = event["just_before"].as_str().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let expected: BTreeSet<u32> = written.iter().copied().filter(|xid| commits[xid].0 < stop).collect();
        assert!(expected.len() > 300 && expected.len() < written.len());
        let found = load_rows(&back);
        let (lost, extra): (Vec<_>, Vec<_>) =
            (expected.difference(&found).collect(), found.difference(&expected).collect());
        assert!(lost.is_empty() && extra.is_empty(), "{words}: lost {lost:?}, extra {extra:?}");
    };
    restored("drop:shop.victim", &dropped, "postgres", "shop.victim");
    restored("truncate:public.emptied", &truncated, "postgres", "emptied");
    restored("delete:public.culled", &deleted, "postgres", "culled");
    restored("drop:other/", &gone, "other", "inside");
}
