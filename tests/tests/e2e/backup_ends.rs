//! Backups that are ended while they are taken: by the server, by the store, by a file that cannot be read. Each says so
//! at once, is no backup, and the next one is.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use walship::catalog::BackupRecord;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::proxy::{Mode, Proxy};
use walship_tests::s3_inprocess::S3Server;
use walship_tests::stage::Stage;
use walship_tests::{bins, process, wait};

use crate::backup::records;

const SOURCES: [&str; 2] = ["local", "stream"];

/// So soon a backup that the server has ended must be over. At the rate of [`begun`] the files take more than twice as long.
const SOON: Duration = Duration::from_secs(9);

/// The session that holds the server in backup mode, once files are read.
fn session(source: &str) -> &'static str {
    match source {
        "local" => {
            "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_is_in_recovery%' AND pid <> pg_backend_pid()"
        }
        _ => "SELECT pid FROM pg_stat_progress_basebackup WHERE phase = 'streaming database files'",
    }
}

fn archiving(stage: &Stage, major: u32) -> PgServer {
    let server = stage.archiving(PgServer::builder(major)).start();
    stage.init(&server);
    server
}

/// Starts a slow backup, and returns when files are read.
fn begun(stage: &Stage, server: &PgServer, source: &str) -> Child {
    let mut command = stage.walship_on(server, &["backup", "--source", source, "--max-rate", "1M"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = process::spawn(command).unwrap();
    server.wait_for(&format!("SELECT count(*) FROM ({}) AS it", session(source)), "1");
    std::thread::sleep(Duration::from_millis(500));
    child
}

/// Returns what a backup said that had to end since then.
fn ended(child: Child, since: Instant, what: &str) -> String {
    let output = child.wait_with_output().unwrap();
    let (took, said) = (since.elapsed(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert_eq!(output.status.code(), Some(1), "{what}: {said}");
    assert!(took < SOON, "{what}: {took:?}: {said}");
    assert!(said.contains("\nsafe:  no backup was recorded; older backups are untouched"), "{what}: {said}");
    assert!(said.contains("\nnext:  The server's log says why"), "{what}: {said}");
    said
}

#[test]
fn a_server_that_ends_a_backup_is_named_within_seconds() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = archiving(&stage, major);
        for source in SOURCES {
            for (how, words) in [
                ("restarted", "administrator command"),
                ("stopped at once", "immediate shutdown"),
                ("terminated", "administrator command"),
            ] {
                let what = format!("{major}, {source}, {how}");
                let child = begun(&stage, &server, source);
                let since = Instant::now();
                match how {
                    "restarted" => server.restart(),
                    "stopped at once" => {
                        server.stop(StopMode::Immediate);
                        server.start();
                    }
                    _ => {
                        let sql =
                            format!("SELECT pg_terminate_backend(pid) FROM ({}) AS it", session(source));
                        assert_eq!(server.psql(&sql), "t");
                    }
                }
                let said = ended(child, since, &what);
                // A walsender may have no time left for it when the server stops at once.
                let told = said.contains("error: the server ended the backup: ") && said.contains(words);
                let closed =
                    said.contains("was lost: ") && said.contains("closed the connection without a word");
                assert!(told || (how == "stopped at once" && closed), "{what}: {said}");
            }
        }
        assert_eq!(records(&stage), Vec::<String>::new());
        stage.backup(&server);
        stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
        assert_eq!(records(&stage).len(), 2);
        the_incomplete_ones_are_told(&stage, &server, 6);
    }
}

/// `walship check` names them; as advice once none of them can be a backup that runs.
fn the_incomplete_ones_are_told(stage: &Stage, server: &PgServer, count: usize) {
    let complete = records(stage).concat();
    let folders = fs::read_dir(stage.repository_dir().join("main/0001/backups")).unwrap();
    let folders =
        folders.map(|entry| entry.unwrap().path()).filter(|path| path.join("started.json").exists());
    let id = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let begun: Vec<_> = folders.filter(|path| !complete.contains(&id(path))).collect();
    assert_eq!(begun.len(), count);
    // Other things may be wrong with a server of the tests.
    let check = || String::from_utf8(stage.run(&mut stage.walship_on(server, &["check"])).stdout).unwrap();
    let line = |said: &str| said.lines().find(|line| line.contains("incomplete backups")).unwrap().to_owned();
    let said = line(&check());
    assert!(said.starts_with("ok ") && said.contains(&format!("never restored from: {count}: ")), "{said}");
    assert!(begun.iter().all(|path| said.contains(&id(path))), "{said}");

    let started = begun[0].join("started.json");
    let mut document: serde_json::Value = serde_json::from_slice(&fs::read(&started).unwrap()).unwrap();
    document["started"] = "2026-01-01T00:00:00Z".into();
    fs::write(&started, document.to_string()).unwrap();
    let said = check();
    assert!(line(&said).starts_with("advice ") && said.contains("takes over what is still right"), "{said}");
}

#[test]
fn the_promotion_of_a_standby_ends_its_backup_within_seconds() {
    for major in majors() {
        let stage = Stage::folder("main");
        let primary = archiving(&stage, major);
        for source in SOURCES {
            let copy = stage.path().join(source);
            let made = primary.run_tool(
                "pg_basebackup",
                &["-D", copy.to_str().unwrap(), "-R", "-X", "stream", "-c", "fast"],
            );
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let standby = PgServer::from_data_dir(&copy).setting("archive_mode", "off").start();
            let child = begun(&stage, &standby, source);
            let since = Instant::now();
            standby.promote();
            let what = format!("{major}, {source}");
            let said = ended(child, since, &what);
            assert!(said.contains("error: the server ended the backup: "), "{what}: {said}");
            assert!(said.contains("promoted"), "{what}: {said}");
        }
        assert_eq!(records(&stage), Vec::<String>::new());
    }
}

#[test]
fn the_end_is_told_before_what_the_server_had_warned_of() {
    let stage = Stage::folder("main");
    let mut server = archiving(&stage, primary_major());
    // In each database: nobody knows which the server sends first.
    let files = server.psql("SELECT 'base/' || oid || '/2609' FROM pg_database");
    server.stop(StopMode::Fast);
    for path in files.lines() {
        let file = server.data_dir().join(path);
        let mut bytes = fs::read(&file).unwrap();
        bytes[5000] ^= 1;
        fs::write(&file, bytes).unwrap();
    }
    server.start();
    let child = begun(&stage, &server, "stream");
    // Half of the files are sent by then.
    std::thread::sleep(Duration::from_secs(12));
    let since = Instant::now();
    server.restart();
    let said = ended(child, since, "damaged");
    let at = |words: &str| said.find(words).unwrap_or_else(|| panic!("no {words:?}: {said}"));
    assert!(at("terminating connection") < at("checksum verification failed"), "{said}");
}

#[test]
fn a_file_that_cannot_be_read_ends_a_backup() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = archiving(&stage, major);
        let database = server.psql("SELECT oid FROM pg_database WHERE datname = 'postgres'");
        let file = server.data_dir().join("base").join(database).join("99999");
        fs::write(&file, vec![0; 8192]).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
        for source in SOURCES {
            // As the server's own user: root reads everything.
            let inner = process::unprivileged(bins::walship());
            let mut command = stage.command(Path::new(inner.get_program()));
            command.args(inner.get_args()).args(["backup", "--source", source]).arg(server.uri());
            let said = stage.fails(&mut command, 1);
            assert!(
                said.contains("99999") && said.contains("Permission denied"),
                "{major}, {source}: {said}"
            );
            assert!(said.contains("\nsafe:  ") && said.contains("\nnext:  "), "{major}, {source}: {said}");
            if source == "stream" {
                assert!(said.contains("error: the server ended the backup: "), "{said}");
            }
        }
        assert_eq!(records(&stage), Vec::<String>::new());
        fs::remove_file(file).unwrap();
        stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    }
}

#[test]
fn a_store_that_dies_ends_a_backup_and_the_next_one_goes_on() {
    let s3 = S3Server::start();
    let proxy = Proxy::start(s3.address());
    let stage = Stage::s3("main", &proxy.endpoint())
        .configured("[limits]\nconnect_ms = 500\nrequest_ms = 2000\ndeadline_ms = 4000\n");
    let server = archiving(&stage, primary_major());
    let records = || s3.objects().keys().filter(|key| key.contains("/backups/catalog/")).count();
    let objects =
        || s3.objects().keys().filter(|key| key.contains("/backups/") && key.ends_with(".tar")).count();
    for source in SOURCES {
        proxy.set(Mode::Pass);
        let before = objects();
        let mut command = stage.walship_on(&server, &["backup", "--source", source, "--object-mib", "1"]);
        command.args(["--max-rate", "4M"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = process::spawn(command).unwrap();
        wait::until("some of it is stored", || objects() >= before + 2);
        proxy.set(Mode::Refuse);
        let since = Instant::now();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{source}: {said}");
        assert!(since.elapsed() < Duration::from_secs(60), "{source}: {:?}", since.elapsed());
        assert!(
            said.contains("\nerror: ") && said.contains("the store cannot be reached"),
            "{source}: {said}"
        );
        assert!(!said.contains("the server ended"), "{source}: {said}");
        assert!(said.contains("\nsafe:  ") && said.contains("\nnext:  "), "{source}: {said}");
        server.wait_for("SELECT count(*) FROM pg_replication_slots", "0");
    }
    assert_eq!(records(), 0);
    proxy.set(Mode::Pass);
    let output = stage.run(&mut stage.walship_on(&server, &["backup", "--source", "local", "--json"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("taken over"), "{said}");
    assert_eq!(records(), 1);
    server.archive_now();
    stage.ok(stage.pitr(&["restore", "--immediate", "-D"]).arg(stage.path().join("restored")));
    let restored = stage.recovering(&stage.path().join("restored")).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
}

/// Sends a signal to the program, not to the `unshare` or the shell around it.
fn signal(child: &Child, name: &str) {
    process::run_ok(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]));
}

#[test]
fn a_rate_is_kept_and_what_a_stall_left_over_is_not_made_up_for() {
    let stage = Stage::folder("main");
    let server = archiving(&stage, primary_major());
    let stall = Duration::from_secs(6);
    for source in SOURCES {
        let mut command = stage.walship_on(&server, &["backup", "--source", source, "--json"]);
        command.args(["--max-rate", "4M"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let child = process::spawn(command).unwrap();
        server.wait_for(&format!("SELECT count(*) FROM ({}) AS it", session(source)), "1");
        if source == "local" {
            signal(&child, "STOP");
            std::thread::sleep(stall);
            signal(&child, "CONT");
        }
        let output = child.wait_with_output().unwrap();
        let took = began.elapsed();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
        let wanted = Duration::from_secs_f64(record.data_bytes as f64 / f64::from(4 << 20));
        let lost = if source == "local" { stall } else { Duration::ZERO };
        // A second may be made up for.
        let least = wanted + lost - Duration::from_millis(1_200);
        assert!(took >= least, "{source}: {} bytes in {took:?}, {least:?} at least", record.data_bytes);
    }
}
