//! `walship check` of a server that is received from: what commits that returned are sure of.

use serde_json::Value;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;

use super::{Receiving, server};

/// The weight of the finding that holds `words`, and its advice.
fn finding(stage: &Stage, server: &PgServer, words: &str) -> (String, String) {
    let output = stage.run(&mut stage.walship_on(server, &["check", "--json"]));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["what"].as_str().unwrap().contains(words));
    let found = found.unwrap_or_else(|| panic!("no finding holds {words:?}: {findings:#?}"));
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (text("weight"), text("next"))
}

fn set(server: &PgServer, name: &str, value: &str) {
    // Waiting for nobody: what is set is what commits would wait for.
    server.psql(&format!("SET synchronous_commit = local; ALTER SYSTEM SET {name} = '{value}'"));
    server.psql("SELECT pg_reload_conf()");
    server.wait_for(&format!("SHOW {name}"), value);
}

#[test]
fn check_says_what_commits_are_sure_of_and_what_the_slot_holds() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = server(major, 1).setting("max_slot_wal_keep_size", "-1").start();
        stage.init(&server);
        set(&server, "synchronous_standby_names", "walship");
        let (weight, next) = finding(&stage, &server, "there is no replication slot \"walship\"");
        assert!(weight == "needed" && next.contains("walship receive"), "{weight} {next}");

        let conninfo = server.socket_conninfo();
        let mut receiving = Receiving::start(&stage, &conninfo, &["--flush", "repository"]);
        server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", "1");
        server.psql("CREATE TABLE t AS SELECT 1 AS a");
        assert_eq!(finding(&stage, &server, "durable in every repository;").0, "good");
        assert_eq!(finding(&stage, &server, "max_slot_wal_keep_size is -1").0, "good");
        assert_eq!(finding(&stage, &server, "archive_mode is 'off'; `walship receive` streams").0, "good");
        assert_eq!(finding(&stage, &server, "0 parts of segments that are stored whole").0, "good");

        server.psql("SET synchronous_commit = local; CREATE ROLE hasty; ALTER ROLE hasty SET synchronous_commit = off");
        assert_eq!(finding(&stage, &server, "role hasty has synchronous_commit = off").0, "advice");
        for (name, value, words, expected) in [
            ("synchronous_commit", "remote_apply", "wait for ever", "needed"),
            ("synchronous_commit", "local", "before they are in the repository", "advice"),
            ("synchronous_commit", "on", "durable in every repository;", "good"),
            (
                "synchronous_standby_names",
                "ANY 1 (walship, other)",
                "not sure to be in the repository",
                "advice",
            ),
            ("synchronous_standby_names", "other", "no commit waits for \"walship\"", "good"),
        ] {
            set(&server, name, value);
            assert_eq!(finding(&stage, &server, words).0, expected, "{name} = {value}");
        }
        set(&server, "synchronous_standby_names", "");
        assert!(receiving.terminate().success(), "{}", receiving.said());
        assert_eq!(finding(&stage, &server, "nobody streams through it").0, "advice");
        assert_eq!(finding(&stage, &server, "archive_mode is 'off'").0, "needed");
    }
}
