//! `pg_resetwal` on the server of a lineage: WAL begins anew, no plan crosses that, each side is restored.

use std::fs;

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, majors};
use walship_tests::stage::Stage;

use crate::log::transaction;

/// How the server came to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It crashed and lost what was not archived; its new WAL goes on with the next segment name.
    LostWal,
    /// After a clean stop, as pg_resetwal does it by itself.
    CleanStop,
    /// The same, with new WAL far ahead.
    Ahead,
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn reset(server: &mut PgServer, last_archived: &str, how: How) {
    match how {
        How::LostWal => {
            server.kill9();
            fs::remove_file(server.data_dir().join("postmaster.pid")).unwrap();
            for entry in fs::read_dir(server.data_dir().join("pg_wal")).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                if name.len() == 24 && &*name > last_archived {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
        }
        How::CleanStop | How::Ahead => assert!(server.stop(StopMode::Fast).success()),
    }
    let mut command = server.binaries().unprivileged("pg_resetwal");
    command.arg("-D").arg(server.data_dir());
    match how {
        How::LostWal => command.arg("-f"),
        How::CleanStop => &mut command,
        How::Ahead => command.args(["-l", "000000010000000000000400"]),
    };
    let output = command.output().unwrap();
    assert!(output.status.success(), "{how:?}: {output:?}");
    server.start();
}

fn rows_after(stage: &Stage, options: &str, name: &str) -> String {
    let dir = stage.path().join(name);
    let mut args = vec!["restore", "-D", dir.to_str().unwrap()];
    args.extend(options.split(' '));
    stage.ok(&mut stage.pitr(&args));
    let server = stage.recovering(&dir).start();
    server.wait_for("select pg_is_in_recovery()", "f");
    server.psql("select string_agg(n::text, ',' order by n) from t").trim().to_owned()
}

fn no_plan_crosses(major: u32, how: How) {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1)).start();
    stage.init(&server);
    server.psql("create table t (n int)");
    stage.backup(&server);
    let insert =
        |server: &PgServer, n: u32| transaction(server, &format!("insert into t values ({n})"), "commit");
    let first = insert(&server, 1);
    server.psql("checkpoint");
    let last_archived = server.archive_now();
    reset(&mut server, &last_archived, how);
    let begun = server.current_lsn();
    insert(&server, 2);
    stage.backup(&server);
    let third = insert(&server, 3);
    insert(&server, 4);
    server.archive_now();
    server.stop(StopMode::Fast);

    let info = json(&stage.ok(&mut stage.pitr(&["info", "--json"])));
    let ended = if how == How::LostWal { "wal_reset" } else { "gap" };
    let windows = info["timelines"][0]["windows"].as_array().unwrap();
    let ends: Vec<_> = windows.iter().map(|window| window["ended_by"].as_str().unwrap()).collect();
    assert_eq!(ends, [ended, "end_of_archive"], "{how:?}: {info:#}");
    let oldest = info["backups"][0]["id"].as_str().unwrap();
    // Where WAL begins anew is said, also behind a gap that pg_resetwal left.
    let reset = windows[0]["reset_lsn"].as_str().unwrap_or_else(|| panic!("{how:?}: {info:#}"));
    let text = stage.ok(&mut stage.pitr(&["info"]));
    let words =
        if how == How::LostWal { "pg_resetwal behind it" } else { "where pg_resetwal made WAL begin anew" };
    assert!(text.contains(words), "{how:?}: {text}");
    let log = json(&stage.ok(&mut stage.pitr(&["log", "--json"])));
    let begins: Vec<&Value> =
        log["lines"].as_array().unwrap().iter().filter(|line| line["line"] == "wal_begins").collect();
    assert_eq!(begins.len(), 1, "initdb is none: {log:#}");
    assert_eq!((&begins[0]["lsn"], &begins[0]["timeline"]), (&reset.into(), &1.into()), "{how:?}: {log:#}");
    let text = stage.ok(&mut stage.pitr(&["log"]));
    assert!(text.contains(&format!("WAL begins anew at {reset} on timeline 1, ")), "{text}");
    let ends = stage.ok(&mut stage.pitr(&["log", "--only", "drop"]));
    assert!(!ends.contains("WAL begins anew"), "{ends}");

    let mut offers = Vec::new();
    for words in [vec!["--to-lsn", &begun], vec!["--latest", "--backup", oldest]] {
        let output = stage.run(stage.pitr(&["plan", "--json"]).args(&words));
        assert_eq!(output.status.code(), Some(3), "{how:?} {words:?}: {output:?}");
        let refusal = &json(&String::from_utf8(output.stdout).unwrap())["refusal"];
        let kind = if how == How::LostWal { "wal_reset" } else { "gap" };
        assert_eq!(refusal["kind"], kind, "{refusal:#}");
        assert!(refusal["reason"].as_str().unwrap().contains("pg_resetwal was run"), "{refusal:#}");
        offers.push(refusal["before"]["options"].as_str().unwrap().to_owned());
        offers.extend(refusal["after"]["options"].as_str().map(str::to_owned));
    }
    let [before, after, pinned] = &offers[..] else { panic!("{how:?}: {offers:?}") };
    assert_eq!(*pinned, format!("{before} --backup {oldest}"));
    assert_eq!(rows_after(&stage, before, "before"), "1");
    assert_eq!(rows_after(&stage, after, "after"), "1,2");
    for (xid, rows) in [(first, "1"), (third, "1,2,3")] {
        assert_eq!(rows_after(&stage, &format!("--to-xid {xid}"), &format!("xid-{xid}")), rows, "{how:?}");
    }
}

#[test]
fn no_plan_crosses_a_reset_where_no_segment_name_is_missing() {
    for major in majors() {
        no_plan_crosses(major, How::LostWal);
    }
}

#[test]
fn no_plan_crosses_a_reset_after_a_clean_stop() {
    for major in majors() {
        no_plan_crosses(major, How::CleanStop);
    }
}

#[test]
fn no_plan_crosses_a_reset_that_goes_on_far_ahead() {
    for major in majors() {
        no_plan_crosses(major, How::Ahead);
    }
}
