//! Metrics against what the server, `pitr info` and the file system say.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use chrono::DateTime;
use serde_json::Value;
use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;
use walship_tests::{bins, process, wait};

use super::Serving;
use crate::receive::Receiving;

/// An archiving server with a full and an incremental backup and a commit behind them.
pub(super) fn archived(stage: &Stage, major: u32) -> PgServer {
    let server = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1)).start();
    stage.init(&server);
    server.psql("CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 1000)");
    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local", "--incremental"]));
    server.psql("INSERT INTO t VALUES (0)");
    server.archive_now();
    server
}

fn info(stage: &Stage) -> Value {
    serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap()
}

fn seconds(value: &Value) -> f64 {
    DateTime::parse_from_rfc3339(value.as_str().unwrap()).unwrap().timestamp_micros() as f64 / 1e6
}

#[test]
fn metrics_are_true_on_a_folder() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = archived(&stage, major);
        true_metrics(&stage, server);
    }
}

#[test]
fn metrics_are_true_on_s3() {
    let weed = WeedServer::start();
    let stage = Stage::s3("main", &weed.endpoint());
    let server = archived(&stage, primary_major());
    true_metrics(&stage, server);
}

fn true_metrics(stage: &Stage, mut server: PgServer) {
    let mut serving = Serving::start(stage, Some(&server));
    let metrics = serving.fresh();
    let told = info(stage);
    let window = &told["timelines"][0]["windows"][0];
    for (kind, backup) in [("full", &told["backups"][0]), ("incremental", &told["backups"][1])] {
        let labels = &[("kind", kind), ("cluster", "main"), ("lineage", "0001")];
        assert_eq!(metrics.one("walship_backups", labels), 1.0);
        let close = |name: &str, expected: f64| {
            let value = metrics.one(name, labels);
            assert!((value - expected).abs() < 1e-3, "{name}: {value}, not {expected}");
        };
        close("walship_backup_last_success_timestamp_seconds", seconds(&backup["finished"]));
        let took = seconds(&backup["finished"]) - seconds(&backup["started"]);
        close("walship_backup_last_duration_seconds", took);
        close("walship_backup_last_size_bytes", backup["data_bytes"].as_f64().unwrap());
        close("walship_backup_last_stored_bytes", backup["stored_bytes"].as_f64().unwrap());
        assert_eq!(metrics.maybe("walship_backup_previous_size_bytes", labels), None);
    }
    let lsn = |value: &Value| value.as_str().unwrap().parse::<Lsn>().unwrap().0 as f64;
    let timeline = &[("timeline", "1"), ("repository", stage.url())];
    assert_eq!(metrics.one("walship_wal_durable_lsn_bytes", timeline), lsn(&window["until_lsn"]));
    let newest = seconds(&window["latest_transaction"]["time"]);
    assert!((metrics.one("walship_newest_commit_timestamp_seconds", timeline) - newest).abs() < 1e-3);
    assert!((metrics.one("walship_window_end_timestamp_seconds", timeline) - newest).abs() < 1e-3);
    let from = seconds(&window["from_time"]);
    assert!((metrics.one("walship_window_start_timestamp_seconds", timeline) - from).abs() < 1e-3);
    let segments = told["timelines"][0]["segments"].as_f64().unwrap();
    assert_eq!(metrics.one("walship_wal_segments", &[]), segments);
    assert_eq!(metrics.one("walship_rpo_seconds", timeline), 0.0, "all that was committed is there");
    for (name, expected) in [
        ("walship_server_up", 1.0),
        ("walship_repository_up", 1.0),
        ("walship_server_timeline", 1.0),
        ("walship_server_in_recovery", 0.0),
        ("walship_archiver_failing", 0.0),
        ("walship_archiver_waiting_files", 0.0),
        ("walship_wal_gaps", 0.0),
        ("walship_store_errors_total", 0.0),
    ] {
        assert_eq!(metrics.one(name, &[]), expected, "{name}");
    }
    assert!(metrics.one("walship_store_latency_seconds", &[]) < 20.0);
    assert_eq!(metrics.problems(), [], "{metrics:#?}");
    assert!(is_accepted_by_promtool(&serving.get("/metrics").1));

    // The disk is df's.
    let used = metrics.one("walship_server_disk_used_ratio", &[("place", "pg_wal")]);
    let df = process::run_ok(Command::new("df").args(["--output=pcent"]).arg(server.data_dir()));
    let percent: f64 = df.lines().last().unwrap().trim().trim_end_matches('%').parse().unwrap();
    assert!((used * 100.0 - percent).abs() < 3.0, "{used} {percent}");
    let on_disk = metrics.maybe("walship_repository_disk_used_ratio", &[]);
    assert_eq!(on_disk.is_some(), stage.url().starts_with("file:"));

    // WAL does not arrive any more.
    server.psql("ALTER SYSTEM SET archive_command = 'false'");
    server.psql("SELECT pg_reload_conf()");
    for n in 1..=6 {
        server.psql(&format!("INSERT INTO t VALUES ({n})"));
        server.switch_wal();
    }
    server.wait_for("SELECT failed_count > 0 FROM pg_stat_archiver", "t");
    let stuck = serving.wait("the archiver is seen to fail", |metrics| {
        metrics.one("walship_archiver_failing", &[]) == 1.0
            && metrics.maybe("walship_wal_behind_segments", &[]).is_some_and(|behind| behind >= 5.0)
    });
    let ready = "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'";
    let waiting = stuck.one("walship_archiver_waiting_files", &[]);
    assert_eq!(waiting.to_string(), server.psql(ready));
    let flushed: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    assert!(stuck.one("walship_server_wal_lsn_bytes", &[]) <= flushed.0 as f64);
    let failures: f64 = server.psql("SELECT failed_count FROM pg_stat_archiver").parse().unwrap();
    assert!(stuck.one("walship_archiver_failures_total", &[]) <= failures);
    assert!(stuck.problems().contains(&("wal_not_arriving".into(), "critical".into())), "{stuck:#?}");
    let first = stuck.one("walship_rpo_seconds", &[]);
    let later =
        serving.wait("the recovery point ages", |metrics| metrics.one("walship_rpo_seconds", &[]) > first);
    assert_eq!(later.one("walship_rpo_seconds", &[]), later.one("walship_newest_commit_age_seconds", &[]));

    // It arrives again.
    server.psql("ALTER SYSTEM RESET archive_command");
    server.psql("SELECT pg_reload_conf()");
    server.archive_now();
    serving.wait("all is well again", |metrics| {
        metrics.one("walship_rpo_seconds", &[]) == 0.0 && metrics.problems().is_empty()
    });

    // The server is gone; what the repository holds is still told.
    server.stop(StopMode::Fast);
    let alone = serving.wait("the server is missed", |metrics| metrics.one("walship_server_up", &[]) == 0.0);
    assert_eq!(alone.one("walship_backups", &[("kind", "full")]), 1.0);
    assert!(alone.has_problem("server_unreachable"));
    assert_eq!(alone.maybe("walship_wal_behind_bytes", &[]), None);
    assert_eq!(serving.get("/healthz").0, "HTTP/1.1 200 OK");
    assert_eq!(serving.get("/nothing").0, "HTTP/1.1 404 Not Found");
    assert!(serving.terminate().success());
}

fn is_accepted_by_promtool(metrics: &str) -> bool {
    let mut promtool = Command::new(super::rules::promtool());
    promtool.args(["check", "metrics"]);
    let output =
        process::run(&mut promtool, process::RunOptions { stdin: metrics.as_bytes(), ..Default::default() });
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}

#[test]
fn a_receiver_that_stops_is_seen() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = PgServer::builder(major).wal_segment_size_mb(1).setting("wal_level", "replica").start();
        stage.init(&server);
        let mut receiver = Receiving::start(&stage, &server.socket_conninfo(), &[]);
        wait::until("it streams", || receiver.status().is_some_and(|status| status["state"] == "streaming"));
        stage.backup(&server);
        server.psql("CREATE TABLE t (n int); INSERT INTO t VALUES (1)");
        let end: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        receiver.wait_durable(end);
        let serving = Serving::start(&stage, Some(&server));
        let slot = &[("slot", "walship")];
        let well = serving.wait("the commit in the open segment is seen", |metrics| {
            metrics.one("walship_rpo_seconds", &[]) == 0.0
                && metrics.one("walship_slot_active", slot) == 1.0
                && metrics.maybe("walship_wal_behind_bytes", &[]) == Some(0.0)
        });
        assert!(!well.has_problem("slot"), "{well:#?}");
        receiver.kill9();
        server.psql("INSERT INTO t SELECT generate_series(1, 100000)");
        let alone = serving.wait("the slot is used by nobody", |metrics| {
            metrics.one("walship_slot_active", slot) == 0.0
                && metrics.one("walship_slot_lag_bytes", slot) > 1e6
                && metrics.one("walship_rpo_seconds", &[]) > 0.0
        });
        assert!(alone.has_problem("slot"), "{alone:#?}");
        let age = alone.one("walship_newest_commit_age_seconds", &[]);
        serving.wait("the newest durable commit ages", |metrics| {
            metrics.one("walship_newest_commit_age_seconds", &[]) > age + 1.0
        });
        drop(serving);
        receiver = Receiving::start(&stage, &server.socket_conninfo(), &[]);
        let end: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        receiver.wait_durable(end);
        let again = Serving::start(&stage, Some(&server));
        again.wait("nothing would be lost", |metrics| metrics.one("walship_rpo_seconds", &[]) == 0.0);
    }
}

#[test]
fn a_dead_store_leaves_what_was_seen() {
    let s3 = S3Server::start();
    let stage =
        Stage::s3("main", &s3.endpoint()).configured("[limits]\nrequest_ms = 500\ndeadline_ms = 700\n");
    let server = archived(&stage, primary_major());
    let serving = Serving::start(&stage, Some(&server));
    let before = serving.fresh();
    assert_eq!(before.one("walship_store_errors_total", &[]), 0.0);
    for fault in [Fault::S3(503, "SlowDown"), Fault::S3(403, "AccessDenied")] {
        let was = serving.metrics().one("walship_store_errors_total", &[]);
        s3.set_faults(move |_| Some(fault.clone()));
        let dead = serving.wait("the store is missed", |metrics| {
            metrics.one("walship_repository_up", &[]) == 0.0
                && metrics.one("walship_store_errors_total", &[]) >= was + 2.0
        });
        for name in ["walship_backups", "walship_backup_last_success_timestamp_seconds"] {
            let labels = &[("kind", "full")];
            assert_eq!(dead.one(name, labels), before.one(name, labels), "{name}");
        }
        assert!(dead.has_problem("repository_unreachable"));
        assert_eq!(serving.get("/healthz").0, "HTTP/1.1 200 OK");
        s3.heal();
        serving.wait("the store is back", |metrics| metrics.one("walship_repository_up", &[]) == 1.0);
    }
    // Scrapes do not reach the store.
    let slow = Serving::start_with(&stage, None, &["--interval", "3600"]);
    s3.take_log();
    drop(serving);
    wait::until("the other one has ended its requests", || {
        std::thread::sleep(Duration::from_millis(300));
        s3.take_log().is_empty()
    });
    (0..50).for_each(|_| drop(slow.metrics()));
    assert!(s3.take_log().is_empty());
}

#[test]
fn a_port_that_is_taken_and_a_folder_that_is_read_only_are_said() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    let serving = Serving::start(&stage, None);
    let address = serving.address.to_string();
    let error = stage.fails(&mut stage.walship(&["serve", "--offline", "--listen", &address]), 1);
    assert_eq!(error.lines().count(), 3, "{error}");
    assert!(error.starts_with(&format!("error: {address} cannot be listened on")), "{error}");
    assert!(error.contains("--listen"), "{error}");

    let folder = stage.path().join("textfiles");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("walship.prom");
    stage.ok(stage.walship_on(&server, &["serve", "--textfile"]).arg(&file));
    let text = fs::read_to_string(&file).unwrap();
    assert!(is_accepted_by_promtool(&text), "{text}");
    assert!(text.contains("walship_server_up{cluster=\"main\"} 1"), "{text}");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);

    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = process::unprivileged(bins::walship());
    command.env("WALSHIP_CONFIG", stage.config()).args(["serve", "--offline", "--textfile"]).arg(&file);
    let error = stage.fails(&mut command, 1);
    assert_eq!(error.lines().count(), 3, "{error}");
    assert!(error.contains("the file that was there before is unchanged"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let error = stage.fails(stage.walship(&["serve", "--textfile"]).arg(Path::new("x.txt")), 1);
    assert!(error.contains(".prom"), "{error}");
}
