//! Everything that is done leaves a record: who, where, when, why, and what came of it.

use std::fs;
use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::Value;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

/// The history of these kinds, the newest first.
fn history(stage: &Stage, only: &str) -> Vec<Value> {
    let printed = stage.ok(&mut stage.pitr(&["history", "--json", "--only", only]));
    let history: Value = serde_json::from_str(&printed).unwrap();
    history["entries"].as_array().unwrap().clone()
}

fn texts(entries: &[Value], key: &str) -> Vec<String> {
    entries.iter().map(|entry| entry[key].as_str().unwrap_or("-").to_owned()).collect()
}

fn cluster(stage: &Stage) -> PgServer {
    let server = stage.archiving(PgServer::builder(primary_major()).wal_segment_size_mb(1)).start();
    stage.init(&server);
    server
}

#[test]
fn backups_are_on_record_also_those_that_failed_or_were_interrupted() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    stage
        .ok(&mut stage
            .walship_on(&server, &["backup", "--label", "weekly", "--reason", "before the\nmigration"]));
    // No server answers there.
    let nowhere = ["backup", "host=127.0.0.1 port=1 user=postgres", "--reason", "nightly"];
    stage.fails(&mut stage.walship(&nowhere), 1);
    // One that is ended while the server sends its files.
    let mut slow = stage.walship_on(&server, &["backup", "--max-rate", "32k", "--reason", "slow"]);
    let said = stage.path().join("said");
    slow.stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
    let mut slow = process::spawn(slow).unwrap();
    wait::until("it has begun", || fs::read_to_string(&said).unwrap().contains(" starts at "));
    process::signal(slow.id(), Signal::SIGTERM);
    let status = process::wait_within(&mut slow, wait::PATIENCE).expect("it ends when it is told to");
    assert_eq!(status.code(), Some(1));
    let said = fs::read_to_string(&said).unwrap();
    assert!(said.contains("interrupted by a signal\nsafe:  nothing of it counts as a backup"), "{said}");
    server.wait_for("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'", "0");

    let entries = history(&stage, "backup");
    assert_eq!(texts(&entries, "outcome"), ["interrupted", "failed", "complete"], "{entries:#?}");
    assert_eq!(texts(&entries, "reason"), ["slow", "nightly", "before the\nmigration"]);
    assert!(entries[1]["problems"][0].as_str().unwrap().contains("port 1"), "{}", entries[1]);
    let complete = &entries[2];
    assert!(complete["bytes"].as_u64().unwrap() > 0 && complete["millis"].is_u64(), "{complete}");
    assert_eq!(complete["what"], "weekly");
    for entry in &entries {
        assert!(!entry["user"].as_str().unwrap().is_empty(), "{entry}");
        assert!(entry["host"].is_string(), "{entry}");
    }
    // What was interrupted is no backup.
    let info: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
    assert_eq!(info["backups"].as_array().map(Vec::len), Some(1), "{info}");
    assert!(entries[0]["backup"].is_string(), "{}", entries[0]);
    let text = stage.ok(&mut stage.pitr(&["history", "--only", "backup"]));
    assert!(text.contains("reason: before the migration") && text.contains("label: weekly"), "{text}");
}

/// Backups of before there were records are shown as they always were.
#[test]
fn backups_without_a_record_are_shown() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    stage.backup(&server);
    fs::remove_dir_all(stage.repository_dir().join("main/0001/history")).unwrap();
    let entries = history(&stage, "backup");
    assert_eq!(
        (texts(&entries, "outcome"), texts(&entries, "user")),
        (vec!["complete".into()], vec!["-".into()])
    );
}

#[test]
fn changes_are_on_record() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    // Nothing is new the second time.
    stage.init(&server);
    server.psql("ALTER SYSTEM SET archive_command = 'false'");
    server.psql("SELECT pg_reload_conf()");
    stage.ok(&mut stage.walship_on(&server, &["init", "--apply"]));
    stage.backup(&server);
    let id = history(&stage, "backup")[0]["backup"].as_str().unwrap().to_owned();
    stage.ok(&mut stage.pitr(&["hold", &id, "--reason", "audit"]));
    stage.ok(&mut stage.pitr(&["release", &id]));
    let next = "0000000100000000000000FF";
    stage.ok(&mut stage.walship(&["wal", "give-up", next, "--reason", "bad block", "--yes"]));
    let entries = history(&stage, "change");
    assert_eq!(
        texts(&entries, "outcome"),
        ["wal_given_up", "released", "held", "settings_changed", "lineage_registered"],
        "{entries:#?}"
    );
    assert_eq!(texts(&entries, "reason"), ["bad block", "-", "audit", "-", "-"]);
    let what = texts(&entries, "what");
    assert!(what[0].contains(next) && what[1].contains(&id) && what[2].contains(&id), "{what:?}");
    assert!(what[3].contains("archive_command = "), "{what:?}");
    assert!(what[4].contains(&server.system_identifier().to_string()), "{what:?}");
}

/// That the history cannot be written is said, and takes nothing away from what was done.
#[test]
fn what_cannot_be_recorded_is_done_all_the_same() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    let history = stage.repository_dir().join("main/0001/history");
    let _ = fs::remove_dir_all(&history);
    fs::write(&history, "in the way").unwrap();
    let output = stage.run(&mut stage.walship_on(&server, &["backup"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("note: this is not in the history of "), "{said}");
    fs::remove_file(&history).unwrap();
    let info: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
    assert_eq!(info["backups"].as_array().map(Vec::len), Some(1), "{info}");
}
