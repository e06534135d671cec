//! Standbys set up from the archive: they follow it, their primary where one is named, and a failover.

use std::fs;
use std::path::Path;

use serde_json::Value;
use walship_tests::postgres::{PgServer, PgServerBuilder, StopMode, majors, primary_major};
use walship_tests::stage::Stage;

/// Restores a standby and returns what was reported.
fn standby(stage: &Stage, dir: &Path, words: &[&str]) -> Value {
    let mut restore = stage.pitr(&["restore", "--latest", "--standby", "--json", "-D"]);
    let text = stage.ok(restore.arg(dir).args(words));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A standby that asks the archive again at once, not every five seconds.
fn eager(stage: &Stage, dir: &Path) -> PgServerBuilder {
    stage.recovering(dir).setting("wal_retrieve_retry_interval", "100ms")
}

fn rows(server: &PgServer) -> String {
    server.psql("select string_agg(id::text, ',' order by id) from t")
}

fn insert(server: &PgServer, id: u32) {
    server.psql(&format!("insert into t values ({id})"));
}

const ALL: &str = "select string_agg(id::text, ',' order by id) from t";

#[test]
fn standbys_follow_the_archive_their_primary_and_a_failover() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut primary = stage
            .archiving(PgServer::builder(major).wal_segment_size_mb(1))
            .setting("autovacuum", "off")
            .start();
        stage.init(&primary);
        primary.psql("create table t (id int); insert into t values (1)");
        stage.backup(&primary);
        insert(&primary, 2);
        primary.archive_now();

        // By the archive alone.
        let (alone, streams) = (stage.path().join("alone"), stage.path().join("streams"));
        let report = standby(&stage, &alone, &[]);
        assert_eq!(report["report"]["standby"], true);
        assert!(alone.join("standby.signal").exists() && !alone.join("recovery.signal").exists());
        let alone = eager(&stage, &alone).start();
        alone.wait_for(ALL, "1,2");
        assert_eq!(alone.psql("select pg_is_in_recovery()"), "t");
        insert(&primary, 3);
        primary.archive_now();
        alone.wait_for(ALL, "1,2,3");

        // And by its primary, through a slot.
        primary.psql("select pg_create_physical_replication_slot('streams')");
        let conninfo =
            format!("host={} port={} user=postgres", primary.socket_dir().display(), primary.port());
        standby(&stage, &streams, &["--primary-conninfo", &conninfo, "--primary-slot", "streams"]);
        let mut streams = eager(&stage, &streams).start();
        streams.wait_for("select status, slot_name from pg_stat_wal_receiver", "streaming|streams");
        insert(&primary, 4);
        streams.wait_for(ALL, "1,2,3,4");
        assert_eq!(rows(&alone), "1,2,3", "not archived yet");

        // The primary is lost, and the one that streamed takes over.
        primary.kill9();
        streams.promote();
        insert(&streams, 5);
        streams.archive_now();
        alone.wait_for(ALL, "1,2,3,4,5");
        assert_eq!(alone.psql("select pg_is_in_recovery()"), "t");
        // One that is set up now begins before the failover and follows it as well.
        let late = stage.path().join("late");
        let report = standby(&stage, &late, &["--as", "copy"]);
        assert_eq!(report["plan"]["timeline"], 2, "{report:#}");
        let late = eager(&stage, &late).start();
        late.wait_for(ALL, "1,2,3,4,5");
        insert(&streams, 6);
        streams.archive_now();
        for server in [&alone, &late] {
            server.wait_for(ALL, "1,2,3,4,5,6");
        }
        assert_eq!(alone.psql("show archive_mode"), "on", "it can take over in turn");
        assert_eq!(late.psql("show archive_mode"), "off");
        late.promote();
        assert_eq!(rows(&late), "1,2,3,4,5,6");
        streams.stop(StopMode::Fast);
    }
}

#[test]
fn what_a_standby_says_and_refuses() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major()).wal_segment_size_mb(1)).start();
    stage.init(&server);
    stage.backup(&server);
    server.archive_now();
    let dir = stage.path().join("standby");
    let restore = |words: &[&str]| {
        let mut restore = stage.pitr(&["restore", "-D"]);
        restore.arg(&dir).args(words);
        restore
    };
    for (words, expected) in [
        (&["--standby", "--immediate"][..], "--latest"),
        (&["--standby", "--latest", "--target-action", "pause"], "pg_ctl promote"),
        (&["--standby", "--latest", "--timeline", "1"], "newest"),
        (&["--standby", "--latest", "--primary-conninfo", "host=a password=hunter2"], ".pgpass"),
    ] {
        let error = stage.fails(&mut restore(words), 2);
        assert!(
            error.contains(expected) && error.contains("\nsafe:  ") && !error.contains("hunter2"),
            "{error}"
        );
        assert!(!dir.exists());
    }
    let said = stage.ok(&mut restore(&["--standby", "--latest", "--dry-run"]));
    for words in ["as a standby, on with what is archived later", "pg_ctl promote", "--primary-conninfo"] {
        assert!(said.contains(words), "{said}");
    }
    assert!(!dir.exists());
    stage.ok(&mut restore(&["--standby", "--latest"]));
    let conf = fs::read_to_string(dir.join("postgresql.auto.conf")).unwrap();
    assert!(conf.contains("recovery_target_timeline = 'latest'") && !conf.contains("archive_mode"), "{conf}");
}
