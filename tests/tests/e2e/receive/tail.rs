//! The open segment: what was committed a moment ago, from the repository alone.

use std::fs;
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship_tests::postgres::{StopMode, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::{Flush, Front, Reading, Receiving, server};

#[test]
fn a_commit_is_in_the_repository_soon_and_comes_back_without_a_switch() {
    let stage = Stage::folder("main");
    let mut server = server(primary_major(), 16).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &[]);
    stage.backup(&server);
    server.psql("CREATE TABLE t AS SELECT 7 AS a");
    let end: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    receiving.wait_durable(end);
    let parts = receiving.status().unwrap()["parts"].as_u64().unwrap();
    assert!((1..100).contains(&parts), "{parts} parts");
    crate::json_docs::compare("walship receive", &[receiving.status().unwrap()], &[]);

    // A shutdown is not held up, and its checkpoint is durable too.
    let stopping = Instant::now();
    assert!(server.stop(StopMode::Fast).success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "held up for {:?}", stopping.elapsed());
    let control = process::run_ok(server.binaries().tool("pg_controldata").arg(server.data_dir()));
    let checkpoint =
        control.lines().find_map(|line| line.strip_prefix("Latest checkpoint location:")).unwrap();
    let checkpoint: Lsn = checkpoint.trim().parse().unwrap();
    wait::until("the shutdown checkpoint is durable", || receiving.position("durable_lsn") > checkpoint);
    receiving.kill9();

    // The open segment as a server would get it, and what comes of archiving that again.
    let name = walship::pg::SegmentName::containing(
        walship::pg::TimelineId::FIRST,
        checkpoint,
        walship::pg::SegmentSize::DEFAULT,
    );
    let fetched = stage.path().join(name.to_string());
    stage.ok(stage.walship(&["wal", "fetch", &name.to_string()]).arg(&fetched));
    let own = fs::read(server.data_dir().join("pg_wal").join(name.to_string())).unwrap();
    let delivered = fs::read(&fetched).unwrap();
    let valid = usize::try_from(receiving.position("durable_lsn").0 % (16 << 20)).unwrap();
    assert!(delivered.len() == own.len() && delivered[..valid] == own[..valid]);
    assert!(delivered[valid..].iter().all(|byte| *byte == 0));
    stage.ok(stage.walship(&["wal", "push"]).arg(&fetched));
    assert!(!Reading::of(&stage).has(&name.to_string()), "it took the whole segment's name");

    let restored = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&restored));
    let restored = stage.recovering(&restored).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT a FROM t"), "7");
}

#[test]
fn info_and_log_tell_of_the_open_segment() {
    let stage = Stage::folder("main");
    let server = server(primary_major(), 16).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--flush", "repository"]);
    server.psql("CREATE TABLE victim AS SELECT 7 AS a");
    stage.backup(&server);
    server.psql("SELECT pg_create_restore_point('in the open one')");
    server.psql("DROP TABLE victim");
    server.psql("CREATE TABLE t (xid text)");
    let last = server.psql("INSERT INTO t SELECT pg_current_xact_id()::text RETURNING xid");
    receiving.wait_durable(server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap());

    let json = |words: &[&str]| -> serde_json::Value {
        let mut command = stage.pitr(words);
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        serde_json::from_str(&stage.ok(&mut command)).unwrap()
    };
    let mut info = json(&["info", "--server", "--json"]);
    wait::until("nothing is missing at the archive's end", || {
        info = json(&["info", "--server", "--json"]);
        info["server"]["behind_bytes"] == 0
    });
    let timeline = &info["timelines"][0];
    let (tail, window) = (&timeline["tail"], &timeline["windows"][0]);
    assert_eq!((&tail["is_end"], &tail["flaw"]), (&true.into(), &serde_json::Value::Null), "{info:#}");
    assert_eq!(window["until_lsn"], tail["until_lsn"], "{info:#}");
    assert_eq!(window["latest_transaction"]["xid"].to_string(), last, "{info:#}");
    assert!(window["latest_age_seconds"].is_number(), "{info:#}");
    assert_eq!(timeline["restore_points"][0]["name"], "in the open one", "{info:#}");
    let text = stage.ok(&mut stage.pitr(&["info"]));
    assert!(text.contains(&format!("open     {}", tail["segment"].as_str().unwrap())), "{text}");

    let log = json(&["log", "--json"]);
    let events = log["lines"].as_array().unwrap();
    let dropped = events.iter().find(|line| line["relations"][0]["name"] == "victim");
    assert_eq!(dropped.map(|line| &line["open"]), Some(&true.into()), "{log:#}");
    assert!(stage.ok(&mut stage.pitr(&["log"])).contains("in the open segment"));
    let plan = json(&["plan", "--before", "drop:public.victim", "--json"]);
    assert_eq!(plan["plan"]["tail"]["segment"], tail["segment"], "{plan:#}");
    assert_eq!(plan["plan"]["stop"]["cut_lsn"], dropped.unwrap()["lsn"], "{plan:#}");
}

#[test]
fn parts_go_when_their_segment_is_whole() {
    for through_a_spool in [false, true] {
        parts_go(through_a_spool);
    }
}

fn parts_go(through_a_spool: bool) {
    let stage = Stage::folder("main");
    let server = server(primary_major(), 1).start();
    stage.init(&server);
    let front = Front::of(&server);
    let spool = Flush::spool(&stage);
    let mut args = vec!["--tail-interval", "10"];
    if through_a_spool {
        args.extend(["--flush", "local", "--spool", spool.to_str().unwrap()]);
    }
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &args);
    server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    server.pgbench(&["-i", "-q", "-s", "1"]);
    server.pgbench(&["-n", "-c", "2", "-t", "500"]);
    let last = server.switch_wal();
    let reading = Reading::of(&stage);
    wait::until("the last segment is stored", || reading.has(&last));
    // The status file is written once a second.
    wait::until("the status file tells of parts", || {
        receiving.status().unwrap()["parts"].as_u64().unwrap() > 3
    });
    let tails = stage.repository_dir().join("main/0001/tail/00000001");
    let left = || {
        let files = |folder: fs::DirEntry| fs::read_dir(folder.path()).map_or(0, Iterator::count);
        let folders = fs::read_dir(&tails).unwrap().map(Result::unwrap);
        folders
            .filter(|folder| folder.file_name().to_str().unwrap() <= last.as_str())
            .map(files)
            .sum::<usize>()
    };
    wait::until("parts of whole segments are gone", || left() == 0);
    assert!(receiving.terminate().success(), "{}", receiving.said());
}
