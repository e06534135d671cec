//! A transaction that was prepared in the segment in which a timeline forks and is still open there: while replay
//! is before the fork PostgreSQL reads its state from the parent's segment, which recovery along the child does
//! not fetch. `pitr restore` puts it into place.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;
use walship_tests::wait::PATIENCE;

/// A server with a backup and one more archived row.
fn archive(major: u32) -> (Stage, PgServer) {
    let stage = Stage::folder("main");
    let server = stage
        .archiving(PgServer::builder(major).wal_segment_size_mb(1))
        .setting("max_prepared_transactions", 10)
        .setting("autovacuum", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("wal_keep_size", "64MB")
        .start();
    stage.init(&server);
    server.psql("create table t (x int)");
    stage.backup(&server);
    server.psql("insert into t values (1)");
    server.archive_now();
    (stage, server)
}

fn restore(stage: &Stage, name: &str, args: &[&str]) -> (PathBuf, Value) {
    let dir = stage.path().join(name);
    let mut words = vec!["restore", "--json", "-D", dir.to_str().unwrap()];
    words.extend(args);
    let said = stage.ok(&mut stage.pitr(&words));
    (dir, serde_json::from_str(&said).unwrap())
}

/// Starts a server and waits for the end of its recovery; its log when it does not get there.
fn recovered(stage: &Stage, dir: &Path) -> Result<PgServer, String> {
    let mut server = stage.recovering(dir).prepare();
    server.launch();
    let ready = server.wait_until_ready();
    let deadline = Instant::now() + PATIENCE;
    while ready.is_ok() && server.is_running() && Instant::now() < deadline {
        if server.try_psql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f") {
            return Ok(server);
        }
    }
    Err(server.log())
}

/// Takes the parent's segment away from a restored folder, which is what any other tool restores; says which.
fn without_parents(dir: &Path, restored: &Value) -> String {
    let parents = restored["plan"]["parent_segments"].as_array().unwrap();
    assert_eq!(parents.len(), 1, "{restored:#}");
    let name = parents[0]["segment"].as_str().unwrap();
    fs::remove_file(dir.join("pg_wal").join(name)).unwrap();
    fs::remove_file(dir.join("pg_wal/archive_status").join(format!("{name}.done"))).unwrap();
    name.to_owned()
}

/// Recovers to a target with and without the parent's segment.
fn compare(stage: &Stage, name: &str, args: &[&str], rows: &str) {
    let (dir, restored) = restore(stage, &format!("{name}-bare"), args);
    let missing = without_parents(&dir, &restored);
    let log = recovered(stage, &dir).map(|_| "it recovered").unwrap_err();
    assert!(log.contains(&format!("{missing} has already been removed")), "{log}");

    let (dir, restored) = restore(stage, name, args);
    let server = recovered(stage, &dir).unwrap_or_else(|log| panic!("{log}"));
    let context = || format!("{restored:#}\n{}", server.log());
    assert_eq!(server.psql("select string_agg(x::text, ',' order by x) from t"), rows, "{}", context());
    assert_eq!(server.psql("select string_agg(gid, ',') from pg_prepared_xacts"), "open", "{}", context());
    assert_eq!(restored["plan"]["open_prepared"][0]["gid"], "open", "{}", context());
    server.psql("commit prepared 'open'");
    assert_eq!(server.psql("select count(*) from t where x = 2"), "1", "{}", context());
}

#[test]
fn a_timeline_that_began_at_a_recovery_target_is_recovered_along() {
    for major in majors() {
        let (stage, server) = archive(major);
        server.psql("begin; insert into t values (2); prepare transaction 'open'");
        server.psql("insert into t values (3)");
        server.psql("select pg_create_restore_point('fork')");
        server.psql("insert into t values (4)");
        server.archive_now();
        let promoted = ["--as", "production", "--target-action", "promote", "--to-name", "fork"];
        let (dir, restored) = restore(&stage, "second", &promoted);
        assert_eq!(restored["plan"]["parent_segments"], serde_json::json!([]));
        let second = recovered(&stage, &dir).unwrap_or_else(|log| panic!("{log}"));
        second.psql("insert into t values (5)");
        second.archive_now();
        second.psql("insert into t values (6)");
        second.archive_now();
        drop((server, second));
        compare(&stage, "latest", &["--latest"], "1,3,5,6");
    }
}

#[test]
fn a_target_before_the_fork_is_reached_where_only_the_child_archived_its_segment() {
    for major in majors() {
        let (stage, mut server) = archive(major);
        let (dir, _) = restore(&stage, "standby", &["--latest", "--as", "production"]);
        fs::remove_file(dir.join("recovery.signal")).unwrap();
        fs::write(dir.join("standby.signal"), "").unwrap();
        let standby = stage
            .recovering(&dir)
            .setting("primary_conninfo", server.socket_conninfo())
            .setting("recovery_target_timeline", "latest")
            .start();
        server.psql("begin; insert into t values (2); prepare transaction 'open'");
        server.psql("insert into t values (3)");
        let middle = server.psql("select pg_current_wal_insert_lsn()");
        server.psql("insert into t values (4)");
        standby.wait_for("select count(*) from t", "3");
        server.kill9();
        standby.promote();
        standby.psql("insert into t values (5)");
        standby.archive_now();
        drop((server, standby));
        compare(&stage, "before", &["--to-lsn", &middle, "--exclusive"], "1,3");
        // Behind the fork nothing is missed; what was put there is not in the way.
        let (dir, _) = restore(&stage, "latest", &["--latest"]);
        let server = recovered(&stage, &dir).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(server.psql("select string_agg(x::text, ',' order by x) from t"), "1,3,4,5");
    }
}
