//! Everything that is done leaves a record: who, where, when, why, and what came of it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::Stdio;
use std::time::Duration;

use chrono::{DateTime, Utc};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use serde_json::Value;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use crate::start::Place;

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
    stage.ok(&mut stage.pitr(&["release", &id, "--reason", "the audit is over"]));
    let next = "0000000100000000000000FF";
    stage.ok(&mut stage.walship(&["wal", "give-up", next, "--reason", "bad block", "--yes"]));
    let entries = history(&stage, "change");
    assert_eq!(
        texts(&entries, "outcome"),
        ["wal_given_up", "released", "held", "configuration_noted", "settings_changed", "lineage_registered"],
        "{entries:#?}"
    );
    assert_eq!(texts(&entries, "reason"), ["bad block", "the audit is over", "audit", "-", "-", "-"]);
    let what = texts(&entries, "what");
    assert!(what[0].contains(next) && what[1].contains(&id) && what[2].contains(&id), "{what:?}");
    assert!(what[4].contains("archive_command = "), "{what:?}");
    assert!(what[5].contains(&server.system_identifier().to_string()), "{what:?}");
}

/// What is kept and promised stands in a file that anybody may change who may write it.
#[test]
fn a_change_of_the_configuration_is_on_record() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    let plain = fs::read_to_string(stage.config()).unwrap();
    let configure = |above: &str, below: &str| {
        fs::write(stage.config(), format!("{above}{plain}{below}")).unwrap();
    };
    configure("rpo = \"5m\"\n", "[retention]\nwindow = \"14 days\"\n");
    stage.backup(&server);
    stage.backup(&server);
    // Flags of one command, and what only reads, change nothing.
    stage.ok(&mut stage.pitr(&["expire", "--keep-last", "7"]));
    stage.ok(&mut stage.pitr(&["expire", "--keep-last", "7", "--confirm", "--yes"]));
    configure("", "[retention]\nwindow = \"7 days\"\nkeep_last = 2\n");
    stage.ok(&mut stage.pitr(&["expire"]));
    stage.run(&mut stage.walship(&["check", "--monitor", "--offline"]));
    assert_eq!(history(&stage, "change").len(), 2);
    stage.ok(&mut stage.pitr(&["expire", "--confirm", "--yes", "--reason", "less room"]));
    let entries = history(&stage, "change");
    assert_eq!(
        texts(&entries, "outcome"),
        ["configuration_changed", "configuration_noted", "lineage_registered"],
        "{entries:#?}"
    );
    let what = texts(&entries, "what");
    assert_eq!(
        what[0],
        "retention.keep_last = 2; retention.window = 7 days (was 14 days); rpo is no longer set (was 300 s)"
    );
    assert!(what[1].starts_with(&format!("repositories = {}; ", stage.url())), "{what:?}");
    assert!(what[1].contains("retention.window = 14 days; rpo = 300 s"), "{what:?}");
    assert_eq!(texts(&entries, "reason"), ["less room", "-", "-"]);
}

/// Also where it is refused before anything is read; only dry runs, and what was not asked for in earnest, leave none.
#[test]
fn restores_are_on_record_however_they_end() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint());
    let server = cluster(&stage);
    let backup = stage.backup(&server);
    server.archive_now();
    let dir = |name: &str| stage.path().join(name);
    let restore = |name: &str, words: &[&str]| {
        let mut command = stage.pitr(&["restore", "--reason", name, "-D"]);
        command.arg(dir(name)).args(words);
        command
    };
    stage.ok(&mut restore("looked", &["--latest", "--dry-run"]));
    stage.fails(&mut restore("looked", &["--to-name", "nowhere", "--dry-run"]), 3);
    stage.ok(&mut stage.pitr(&["plan", "--latest"]));
    assert_eq!(history(&stage, "restore"), [] as [Value; 0]);

    // Words that make no sense, a target that leads nowhere, a folder that is in use.
    stage.fails(&mut restore("words", &["--to-name", "x", "--surviving-wal", "/nowhere"]), 2);
    stage.fails(&mut restore("no plan", &["--to-name", "nowhere"]), 3);
    fs::create_dir(dir("in use")).unwrap();
    fs::write(dir("in use").join("file"), "mine").unwrap();
    stage.fails(&mut restore("in use", &["--latest"]), 2);
    // An object of the backup that turns out to be damaged half-way.
    let is_data = |path: &str| path.contains("/backups/") && path.ends_with(".tar");
    s3.set_faults(move |seen| (seen.method == "GET" && is_data(&seen.path)).then_some(Fault::Flipped(5000)));
    stage.fails(&mut restore("damaged", &["--latest"]), 4);
    // One that is told to stop while it waits for the store.
    s3.set_faults(move |seen| {
        (seen.method == "GET" && is_data(&seen.path)).then_some(Fault::Late(Duration::from_secs(60)))
    });
    let mut slow = restore("told to stop", &["--latest"]);
    let said = dir("said");
    slow.stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
    let mut slow = process::spawn(slow).unwrap();
    wait::until("it has begun", || dir("told to stop").join("walship-restore-incomplete").exists());
    process::signal(slow.id(), Signal::SIGTERM);
    let status = process::wait_within(&mut slow, wait::PATIENCE).expect("it ends when it is told to");
    assert_eq!(status.code(), Some(1));
    let said = fs::read_to_string(&said).unwrap();
    assert!(said.contains("interrupted by SIGTERM") && said.contains("--delta"), "{said}");
    s3.heal();
    // Nothing is forecast by what did not succeed.
    let plan: Value =
        serde_json::from_str(&stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"]))).unwrap();
    assert_eq!(plan["plan"]["forecast"], Value::Null);
    // A server that does not come up on what was restored, and a restore that succeeds.
    let place = Place::new(&stage, "started", server.major());
    let words = ["--latest", "--reason", "no server", "--set", "no_such_setting=1"];
    stage.fails(&mut place.restore(&stage, &words), 1);
    stage.ok(&mut restore("restored", &["--latest"]));

    let entries = history(&stage, "restore");
    let reasons = ["restored", "no server", "told to stop", "damaged", "in use", "no plan", "words"];
    assert_eq!(texts(&entries, "reason"), reasons, "{entries:#?}");
    assert_eq!(
        texts(&entries, "outcome"),
        ["restored", "failed", "interrupted", "failed", "refused", "refused", "refused"],
        "{entries:#?}"
    );
    let problems: Vec<&str> =
        entries.iter().map(|entry| entry["problems"][0].as_str().unwrap_or_default()).collect();
    let told = ["", "no_such_setting", "SIGTERM", "", "is not empty", "nowhere", "--surviving-wal"];
    for (problem, told) in problems.iter().zip(told) {
        assert!(problem.contains(told) && !problem.contains('\n'), "{problem:?} {told:?}");
        assert_eq!(problem.is_empty(), told.is_empty() && problem == &problems[0], "{problems:?}");
    }
    for entry in &entries {
        assert!(
            entry["host"].is_string() && entry["user"].is_string() && entry["millis"].is_u64(),
            "{entry}"
        );
    }
    assert_eq!(entries[6]["target"], "--to-name x");
    assert_eq!((&entries[5]["target"], &entries[5]["backup"]), (&"--to-name nowhere".into(), &Value::Null));
    assert!(backup.contains(entries[3]["backup"].as_str().unwrap()), "{}", entries[3]);
    let plan: Value =
        serde_json::from_str(&stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"]))).unwrap();
    assert_eq!(plan["plan"]["forecast"]["restores"], 1, "only the one that succeeded");
    let text = stage.ok(&mut stage.pitr(&["history", "--only", "restore"]));
    assert!(
        text.contains("refused") && text.contains("problem: ") && text.contains("is not empty"),
        "{text}"
    );

    // A record that cannot be written is said, and changes no status.
    s3.set_faults(|seen| {
        let is_record = seen.method == "PUT" && seen.path.contains("/history/restores/");
        is_record.then_some(Fault::S3(403, "AccessDenied"))
    });
    let said = stage.fails(&mut restore("in use", &["--latest"]), 2);
    assert!(
        said.contains("note:  the restore is not in the history of ") && said.contains("is not empty"),
        "{said}"
    );
    s3.heal();
    assert_eq!(history(&stage, "restore").len(), entries.len());
}

/// How long an operator thinks is no part of how long a restore takes.
#[test]
fn a_restore_begins_when_it_is_confirmed() {
    let stage = Stage::folder("main");
    let server = cluster(&stage);
    stage.backup(&server);
    server.archive_now();
    let dir = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir));
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    let mut over = stage.pitr(&["restore", "--latest", "--delta", "-D"]);
    over.arg(&dir).stdin(slave.try_clone().unwrap()).stdout(Stdio::null()).stderr(slave);
    let mut over = process::spawn(over).unwrap();
    let mut master = fs::File::from(master);
    let (mut shown, mut buffer) = (String::new(), [0; 4096]);
    while !shown.contains("Type main to go on") {
        let length = master.read(&mut buffer).unwrap();
        shown.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    let answered = Utc::now();
    master.write_all(b"main\n").unwrap();
    // What is said is read, lest it wait for that.
    std::thread::spawn(move || while master.read(&mut buffer).is_ok_and(|length| length > 0) {});
    let status = process::wait_within(&mut over, wait::PATIENCE).expect("it ends");
    assert!(status.success());
    let entries = history(&stage, "restore");
    assert_eq!(texts(&entries, "outcome"), ["restored", "restored"]);
    let begun: DateTime<Utc> = entries[0]["started"].as_str().unwrap().parse().unwrap();
    assert!(begun >= answered, "{begun} {answered}");
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
