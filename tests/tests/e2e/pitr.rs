//! Every kind of target, planned and restored, compared with what a real server ends with.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::stage::Stage;

/// One committed row: what the server said of its transaction.
#[derive(Debug, Clone)]
struct Row {
    id: i64,
    xid: String,
    /// The commit's time, in UTC with microseconds.
    time: String,
}

/// Commits one row and says what the server knows of it.
fn insert(server: &PgServer, id: i64) -> Row {
    let xid = server.psql(&format!("insert into t values ({id}); select xmin from t where id = {id}"));
    let xid = xid.lines().last().unwrap().to_owned();
    let time = server.psql(&format!(
        "select to_char(pg_xact_commit_timestamp('{xid}') at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || 'Z'"
    ));
    Row { id, xid, time: time.trim().to_owned() }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn xid_of(plan: &Value, which: &str) -> Option<String> {
    plan["plan"][which]["xid"].as_u64().map(|xid| xid.to_string())
}

struct History {
    stage: Stage,
    /// Rows 1 to 6; row 0 was there before the backup.
    rows: Vec<Row>,
    restored: std::cell::Cell<u32>,
}

impl History {
    /// A server archives, is backed up, and commits; an aborted transaction and a DROP among it.
    fn make(major: u32) -> Self {
        let stage = Stage::folder("main");
        let mut server = stage
            .archiving(PgServer::builder(major))
            .setting("track_commit_timestamp", "on")
            .setting("wal_level", "replica")
            .start();
        stage.init(&server);
        server.psql("create table t (id bigint primary key); create table victim (x int)");
        let mut rows = vec![insert(&server, 0)];
        stage.backup(&server);
        rows.extend((1..=3).map(|id| insert(&server, id)));
        server.psql("begin; insert into t values (99); rollback");
        server.psql("select pg_create_restore_point('before drop')");
        rows.push(insert(&server, 4));
        server.psql("drop table victim");
        rows.extend((5..=6).map(|id| insert(&server, id)));
        server.archive_now();
        server.stop(StopMode::Fast);
        Self { stage, rows, restored: std::cell::Cell::new(0) }
    }

    fn plan(&self, target: &[&str]) -> Value {
        let mut args = vec!["plan", "--json"];
        args.extend(target);
        json(&self.stage.ok(&mut self.stage.pitr(&args)))
    }

    fn restore(&self, target: &[&str]) -> PathBuf {
        let number = self.restored.get();
        self.restored.set(number + 1);
        let dir = self.stage.path().join(format!("restored-{number}"));
        let text = dir.to_str().unwrap().to_owned();
        let mut args = vec!["restore", "-D", &text];
        args.extend(target);
        self.stage.ok(&mut self.stage.pitr(&args));
        dir
    }

    /// Plans, restores, lets PostgreSQL recover, and compares the rows and the last commit.
    fn check(&self, target: &[&str], last_row: i64) {
        let plan = self.plan(target);
        let dir = self.restore(target);
        let server = self.stage.recovering(&dir).start();
        server.wait_for("select pg_is_in_recovery()", "f");
        let rows = server.psql("select string_agg(id::text, ',' order by id) from t");
        let expected: Vec<String> = (0..=last_row).map(|id| id.to_string()).collect();
        assert_eq!(rows.trim(), expected.join(","), "{target:?}\n{}", server.log());
        let last = xid_of(&plan, "last_included");
        if let Some(last) = &last {
            let committed = server.psql(&format!(
                "select to_char(pg_xact_commit_timestamp('{last}') at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
            ));
            let planned = plan["plan"]["last_included"]["time"].as_str().unwrap();
            let planned: chrono::DateTime<chrono::Utc> = planned.parse().unwrap();
            let planned = planned.format("%Y-%m-%dT%H:%M:%S%.6f").to_string();
            assert_eq!(committed.trim(), planned, "{target:?}");
        }
        if let Some(excluded) = xid_of(&plan, "first_excluded") {
            let gone = self.rows.iter().find(|row| row.xid == excluded);
            assert!(gone.is_none_or(|row| row.id > last_row), "{target:?}: {gone:?}");
        }
        let newest = self.rows.iter().rev().find(|row| row.id <= last_row).unwrap();
        if last_row > 0 && target[0] != "--latest" && target[0] != "--to-name" {
            assert_eq!(last.as_deref(), Some(&*newest.xid), "{target:?}");
        }
        // The server's own word on where it stopped.
        let log = server.log();
        assert!(log.contains("archive recovery complete"), "{log}");
        assert_eq!(server.psql("show archive_mode").trim(), "off");
    }
}

#[test]
fn every_target_ends_where_the_plan_says() {
    every_target(primary_major());
}

#[test]
fn every_target_ends_where_the_plan_says_on_a_newer_major() {
    every_target(newer_major());
}

fn every_target(major: u32) {
    let history = History::make(major);
    let row = |id: usize| history.rows[id].clone();
    history.check(&["--to-time", &row(3).time], 3);
    history.check(&["--to-time", &row(3).time, "--exclusive"], 2);
    history.check(&["--to-xid", &row(4).xid], 4);
    history.check(&["--to-xid", &row(4).xid, "--exclusive"], 3);
    let lsn =
        history.plan(&["--to-xid", &row(4).xid])["plan"]["last_included"]["lsn"].as_str().unwrap().to_owned();
    history.check(&["--to-lsn", &lsn], 4);
    history.check(&["--to-lsn", &lsn, "--exclusive"], 3);
    history.check(&["--to-name", "before drop"], 3);
    history.check(&["--immediate"], 0);
    history.check(&["--latest"], 6);
    just_before_the_drop(&history);
    refusals(&history);
    the_folder(&history);
}

/// "Just before the drop": the table is back, every earlier commit is there, no later one.
fn just_before_the_drop(history: &History) {
    let after = history.plan(&["--to-xid", &history.rows[4].xid]);
    assert_eq!(after["plan"]["first_excluded"]["dropped_relations"], 1, "{after:#}");
    let drop = after["plan"]["first_excluded"]["xid"].to_string();
    let dir = history.restore(&["--to-xid", &drop, "--exclusive"]);
    let server = history.stage.recovering(&dir).start();
    server.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(server.psql("select to_regclass('victim') is not null, max(id) from t").trim(), "t|4");
}

fn refusals(history: &History) {
    let stage = &history.stage;
    let late = stage.fails(&mut stage.pitr(&["plan", "--to-time", "2100-01-01 00:00Z"]), 3);
    assert!(late.contains("nearest before: --latest"), "{late}");
    let early = stage.fails(&mut stage.pitr(&["plan", "--to-time", "2000-01-01 00:00Z"]), 3);
    assert!(early.contains("nearest after:  --immediate --backup"), "{early}");
    let named = stage.fails(&mut stage.pitr(&["plan", "--to-name", "before"]), 3);
    assert!(named.contains("--to-name 'before drop'"), "{named}");
    let zone = stage.fails(&mut stage.pitr(&["plan", "--to-time", "2026-01-01 00:00"]), 2);
    assert!(zone.contains("no offset and no zone"), "{zone}");
    stage.fails(&mut stage.pitr(&["plan"]), 2);
    let timeline = stage.fails(&mut stage.pitr(&["plan", "--latest", "--timeline", "7"]), 3);
    assert!(timeline.contains("nothing of timeline 7 is stored"), "{timeline}");
}

/// A restored folder is what the server's manifest says, and only an empty one is written to.
fn the_folder(history: &History) {
    let stage = &history.stage;
    let dir = stage.path().join("verified");
    let text = dir.to_str().unwrap();
    let args = ["restore", "--latest", "-D", text];
    let said = stage.ok(stage.pitr(&args).arg("--dry-run"));
    assert!(said.contains("Nothing was written") && !dir.exists(), "{said}");
    stage.ok(&mut stage.pitr(&args));
    let refused = stage.fails(&mut stage.pitr(&args), 2);
    assert!(refused.contains("is not empty"), "{refused}");
    let binaries = walship_tests::postgres::PgBinaries::find(
        fs::read_to_string(dir.join("PG_VERSION")).unwrap().trim().parse().unwrap(),
    );
    let verified = stage.run(binaries.tool("pg_verifybackup").args(["-n", text]));
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    assert!(!dir.join("walship-restore-incomplete").exists());
}

#[test]
fn a_hole_in_the_archive_is_named_and_not_run_into() {
    hole(primary_major());
}

#[test]
fn a_hole_in_the_archive_is_named_and_not_run_into_on_a_newer_major() {
    hole(newer_major());
}

fn hole(major: u32) {
    let stage = Stage::folder("main");
    let mut server =
        stage.archiving(PgServer::builder(major)).setting("track_commit_timestamp", "on").start();
    stage.init(&server);
    server.psql("create table t (id bigint primary key)");
    stage.backup(&server);
    let before = insert(&server, 1);
    server.archive_now();
    let inside = insert(&server, 2);
    let missing = server.archive_now();
    let behind = insert(&server, 3);
    server.archive_now();
    server.stop(StopMode::Fast);
    let lineage = stage.repository_dir().join("main");
    let object = find(&lineage, &format!("{missing}.wal")).expect("the segment is stored");
    fs::remove_file(object).unwrap();

    stage.ok(&mut stage.pitr(&["plan", "--to-xid", &before.xid]));
    // Recovery reads ahead, but must not run into the hole behind the target.
    let dir = stage.path().join("before-the-hole");
    let args = ["restore", "--to-xid", &before.xid, "-D", dir.to_str().unwrap()];
    stage.ok(&mut stage.pitr(&args));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select string_agg(id::text, ',') from t").trim(), "1");

    for target in [["--to-xid", &inside.xid], ["--to-xid", &behind.xid], ["--to-time", &behind.time]] {
        let refused = stage.fails(&mut stage.pitr(&["plan", target[0], target[1]]), 3);
        assert!(refused.contains(&format!("segment {missing} is missing")), "{refused}");
        assert!(refused.contains(&format!("transaction {}", before.xid)), "{refused}");
    }
    stage.fails(&mut stage.pitr(&["plan", "--latest"]), 3);
    let info = json(&stage.ok(&mut stage.pitr(&["info", "--json"])));
    assert_eq!(info["timelines"][0]["gaps"][0]["first_missing"], Value::String(missing.clone()), "{info:#}");
    let text = stage.ok(&mut stage.pitr(&["info"]));
    assert!(text.contains(&format!("gap      segment {missing} is missing")), "{text}");
}

#[test]
fn a_production_restored_to_before_a_fork_goes_on_archiving() {
    let stage = Stage::folder("main");
    let mut first =
        stage.archiving(PgServer::builder(primary_major())).setting("track_commit_timestamp", "on").start();
    stage.init(&first);
    first.psql("create table t (id bigint primary key)");
    stage.backup(&first);
    let early = insert(&first, 1);
    first.archive_now();
    insert(&first, 2);
    first.archive_now();
    assert!(first.stop(StopMode::Fast).success());

    let restored = |name: &str, target: &[&str]| {
        let dir = stage.path().join(name);
        let mut args = vec!["restore", "--as", "production", "-D", dir.to_str().unwrap()];
        args.extend(target);
        stage.ok(&mut stage.pitr(&args));
        let server = stage.archiving(stage.recovering(&dir)).start();
        server.wait_for("select pg_is_in_recovery()", "f");
        server
    };
    let mut second = restored("second", &["--latest"]);
    insert(&second, 3);
    assert!(second.archive_now().starts_with("00000002"));
    assert!(second.stop(StopMode::Fast).success());

    // Before timeline 2 begins: not its child.
    let target = ["--to-xid", &*early.xid, "--target-action", "promote"];
    let third = restored("third", &target);
    insert(&third, 4);
    assert!(third.archive_now().starts_with("00000003"));
    assert_eq!(third.psql("select string_agg(id::text, ',' order by id) from t").trim(), "1,4");
    let history = find(&stage.repository_dir(), "00000003.history").expect("the history file is archived");
    assert!(fs::metadata(history).unwrap().len() > 0);
    let plan = json(&stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"])));
    let path: Vec<_> = plan["plan"]["timeline_path"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["timeline"].as_u64())
        .collect();
    assert_eq!(path, [Some(1), Some(3)], "{plan:#}");
    assert_eq!(
        plan["plan"]["last_included"]["xid"].to_string(),
        third.psql("select xmin from t where id = 4").trim()
    );
}

pub(crate) fn find(dir: &std::path::Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Some(path);
        }
    }
    None
}
