//! `walship check --monitor`: the states, and the form that monitors read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::stage::Stage;

/// Runs it and checks the form: one line with figures, then others, and a status that is the state's.
fn monitor(stage: &Stage, command: &mut Command) -> (i32, String, Vec<String>) {
    let output = stage.run(command);
    let lines = form(&output);
    let (first, figures) = lines[0].split_once(" | ").unwrap_or((&lines[0], ""));
    for figure in figures.split(' ').filter(|figure| !figure.is_empty()) {
        let (label, rest) = figure.split_once('=').unwrap();
        assert!(label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{figure}");
        let fields: Vec<&str> = rest.split(';').collect();
        assert_eq!(fields.len(), 5, "{figure}");
        let number = fields[0].trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == '%');
        assert!(["", "s", "B", "%"].contains(&&fields[0][number.len()..]), "{figure}");
        number.parse::<f64>().unwrap_or_else(|_| panic!("{figure}"));
        assert!(fields[1..].iter().all(|field| field.is_empty() || field.parse::<f64>().is_ok()), "{figure}");
    }
    let labels = figures.split(' ').filter_map(|figure| Some(figure.split_once('=')?.0.to_owned()));
    (output.status.code().unwrap(), first.to_owned(), labels.collect())
}

fn form(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let state = ["OK", "WARNING", "CRITICAL", "UNKNOWN"][output.status.code().unwrap() as usize];
    assert!(lines[0].starts_with(&format!("WALSHIP {state} - ")), "{output:?}");
    assert!(lines[1..].iter().all(|line| !line.contains('|')), "{output:?}");
    lines
}

#[test]
fn every_state_has_its_status() {
    // How full this machine's disk is does not matter.
    let stage = Stage::folder("main")
        .configured("[watch]\ndisk_warning_percent = 100\ndisk_critical_percent = 100\n");
    let mut server = stage
        .archiving(PgServer::builder(primary_major()).wal_segment_size_mb(1))
        .setting("fsync", "on")
        .start();
    let ask = |server: &PgServer, args: &[&str]| {
        let args: Vec<&str> = ["check", "--monitor"].iter().chain(args).copied().collect();
        monitor(&stage, &mut stage.walship_on(server, &args))
    };
    let (status, first, _) = ask(&server, &[]);
    assert_eq!(status, 2);
    assert!(first.contains("is not there"), "{first}");

    stage.init(&server);
    let (status, first, _) = ask(&server, &[]);
    assert_eq!(status, 2, "{first}");
    stage.backup(&server);
    server.psql("CREATE TABLE t AS SELECT 1");
    server.archive_now();
    // Advice that is a matter of taste (archive_timeout) makes no state.
    let (status, first, labels) = ask(&server, &[]);
    assert_eq!((status, &*first), (0, "WALSHIP OK - main: the newest backup is 0 s old"), "{first}");
    for label in
        ["backup_age", "full_backup_size", "newest_commit_age", "rpo", "waiting_files", "repository_disk"]
    {
        assert!(labels.contains(&label.to_owned()), "{labels:?}");
    }
    let warned = |name: &str, value: &str| {
        monitor(&stage, stage.walship_on(&server, &["check", "--monitor"]).env(name, value))
    };
    let (status, first, _) = warned("WALSHIP_WATCH_DISK_WARNING_PERCENT", "1");
    assert_eq!(status, 1, "{first}");
    assert!(first.contains("% full"), "{first}");
    let json = stage.run(
        stage
            .walship_on(&server, &["check", "--monitor", "--json"])
            .env("WALSHIP_WATCH_DISK_WARNING_PERCENT", "1"),
    );
    assert_eq!(json.status.code(), Some(1));
    let printed: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&printed["state"], &printed["cluster"]), (&"WARNING".into(), &"main".into()));
    assert!(
        printed["problems"].as_array().unwrap().iter().any(|one| one["kind"] == "server_disk"),
        "{printed}"
    );
    crate::json_docs::compare("walship check --monitor", &[printed], &[]);
    let plain: Value =
        serde_json::from_str(&stage.ok(&mut stage.walship_on(&server, &["check", "--json"]))).unwrap();
    crate::json_docs::compare("walship check", &[plain], &[]);

    // What cannot be asked for is unknown, whatever the reason.
    for (name, value) in [("WALSHIP_WATCH_BACKUP_OVERDUE", "soon"), ("WALSHIP_CONFIG", "/nowhere.toml")] {
        assert_eq!(warned(name, value).0, 3, "{name}");
    }
    assert_eq!(ask(&server, &["--bogus"]).0, 3);
    assert_eq!(ask(&server, &["--timeout", "0"]).0, 3);

    server.stop(StopMode::Fast);
    let (status, first, _) = ask(&server, &[]);
    assert_eq!(status, 2, "{first}");
    assert_eq!(ask(&server, &["--offline"]).0, 0);
}

#[test]
fn the_answer_comes_in_time_whatever_hangs() {
    // It takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stage = Stage::s3("main", &format!("http://{}", silent.local_addr().unwrap()));
    let began = Instant::now();
    let (status, first, _) =
        monitor(&stage, &mut stage.walship(&["check", "--monitor", "--offline", "--timeout", "2"]));
    assert_eq!(status, 2, "{first}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_repository_that_hangs_leaves_time_for_the_others() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    stage.backup(&server);
    let one = fs::read_to_string(stage.config()).unwrap();
    let two =
        one.replace(&format!("[{:?}]", stage.url()), &format!("[{:?}, \"s3://bucket/prefix\"]", stage.url()));
    assert_ne!(one, two);
    let s3 = format!(
        "[s3]\nendpoint = \"http://{}\"\naccess_key_id = \"a\"\nsecret_access_key = \"b\"\n",
        silent.local_addr().unwrap()
    );
    let config = stage.path().join("two.toml");
    fs::write(&config, two + &s3).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = stage.walship_on(&server, &["check", "--monitor", "--timeout", "10"]);
    let output = stage.run(command.env("WALSHIP_CONFIG", &config));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let lines = form(&output);
    assert!(lines[0].contains("backup_age_1="), "{lines:#?}");
    let hangs = |line: &String| line.contains("s3://bucket/prefix could not be looked at within 5 s");
    assert_eq!(lines[1..].iter().filter(|line| hangs(line)).count(), 1, "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("not everything could be looked at")), "{lines:#?}");
}
