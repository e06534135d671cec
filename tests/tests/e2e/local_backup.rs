//! `walship backup --source local`: the data directory read beside the server, while it works.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use walship::catalog::BackupRecord;
use walship::pg::BackupManifest;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{bins, process};

use crate::backup::{records, unpack};

const LOCAL: &[&str] = &["backup", "--source", "local", "--workers", "3", "--json"];

fn started(stage: &Stage, major: u32) -> PgServer {
    let server = stage.archiving(PgServer::builder(major)).start();
    stage.init(&server);
    server
}

fn local(stage: &Stage, server: &PgServer) -> BackupRecord {
    serde_json::from_str(&stage.ok(&mut stage.walship_on(server, LOCAL))).unwrap()
}

fn stored_at(stage: &Stage, id: &str) -> PathBuf {
    stage.repository_dir().join(stage.cluster()).join("0001/backups").join(id)
}

/// Unpacks a backup with stock tools, and has PostgreSQL's own check it.
fn verified(stage: &Stage, server: &PgServer, record: &BackupRecord, name: &str) -> PathBuf {
    let (data, beside) = (stage.path().join(name), stage.path().join(format!("{name}-spaces")));
    unpack(record, &stored_at(stage, &record.id), &data, &beside);
    let verify = server.run_tool("pg_verifybackup", &["-n", data.to_str().unwrap()]);
    assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stderr));
    data
}

fn listed(manifest: &Path) -> BTreeSet<String> {
    let manifest = BackupManifest::parse(&fs::read(manifest).unwrap()).unwrap();
    manifest.files.iter().map(|file| file.path.to_str().unwrap().to_owned()).collect()
}

fn folders(below: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![below.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                found.insert(path.strip_prefix(below).unwrap().to_str().unwrap().to_owned());
                left.push(path);
            }
        }
    }
    found
}

#[test]
fn what_is_read_is_what_the_server_would_send() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = started(&stage, major);
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql(
            "CREATE TABLE here AS SELECT g, repeat(md5(g::text), 20) AS t FROM generate_series(1, 30000) g;
             CREATE TABLE there TABLESPACE fast AS SELECT g, md5(g::text) AS t FROM generate_series(1, 20000) g;
             CREATE UNLOGGED TABLE gone AS SELECT g FROM generate_series(1, 1000) g;
             CREATE UNLOGGED TABLE gone_there TABLESPACE fast AS SELECT g FROM generate_series(1, 1000) g;
             CREATE TABLE empty (); VACUUM; CHECKPOINT",
        );
        let record = local(&stage, &server);
        assert_eq!(record.server_version / 10_000, major);
        assert!(record.data_checksums && record.damaged_pages.is_none() && !record.from_standby);
        assert_eq!(record.tablespaces.len(), 1);
        assert!(record.tablespaces[0].bytes > 1 << 20);
        assert!(record.names.is_some());
        server.wait_for("SELECT count(*) FROM pg_replication_slots", "0");
        let data = verified(&stage, &server, &record, "unpacked");

        // The same files as in a backup that the server sends; and folders, empty ones too.
        let theirs = stage.path().join("theirs");
        let mapping =
            format!("--tablespace-mapping={}={}/their-space", space.path().display(), stage.path().display());
        let made = server.run_tool(
            "pg_basebackup",
            &["-D", theirs.to_str().unwrap(), "-X", "none", "-c", "fast", &mapping, "--no-sync"],
        );
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        assert_eq!(listed(&data.join("backup_manifest")), listed(&theirs.join("backup_manifest")));
        assert_eq!(folders(&data), folders(&theirs));

        // The object that holds pg_control is the last, and every index tells what is in its object.
        let last = record.objects.last().unwrap();
        assert!(record.objects.iter().all(|object| object.index.is_some()));
        let inside = process::run_ok(
            Command::new("sh")
                .arg("-c")
                .arg("zstd -dcq \"$0\" | tar t")
                .arg(stored_at(&stage, &record.id).join(&last.name)),
        );
        assert!(inside.lines().any(|line| line == "global/pg_control"), "{inside}");

        stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(stage.path().join("restored")).args([
            "--tablespace-mapping",
            &format!("{}={}/restored-space", space.path().display(), stage.path().display()),
        ]));
        let restored = stage.recovering(&stage.path().join("restored")).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(
            restored.psql("SELECT count(*), max(t) FROM here"),
            server.psql("SELECT count(*), max(t) FROM here")
        );
        assert_eq!(restored.psql("SELECT count(*) FROM there"), "20000");
        assert_eq!(restored.psql("SELECT count(*) FROM gone"), "0");
        assert_eq!(restored.psql("SELECT count(*) FROM gone_there"), "0");
    }
}

/// The commands of the page about the repository's format, with `pg_ctl` at their end left out.
fn by_hand() -> String {
    let page = include_str!("../../../docs/repository-format.md");
    let (_, chapter) = page.split_once("### A whole restore by hand").unwrap();
    let lines = chapter.lines().skip_while(|line| !line.starts_with("    "));
    let block = lines.take_while(|line| line.is_empty() || line.starts_with("    "));
    let commands: Vec<&str> = block.map(|line| line.strip_prefix("    ").unwrap_or_default()).collect();
    let commands = commands.join("\n");
    let (commands, start) = commands.trim_end().rsplit_once('\n').unwrap();
    assert!(start.starts_with("pg_ctl"), "{start}");
    commands.to_owned()
}

#[test]
fn the_page_about_the_format_restores_by_hand() {
    for source in ["stream", "local"] {
        let stage = Stage::folder("main");
        let mut server = started(&stage, primary_major());
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 20000) g");
        stage.ok(&mut stage.walship_on(&server, &["backup", "--source", source]));
        server.psql("INSERT INTO there VALUES (0)");
        server.archive_now();
        server.stop(StopMode::Fast);
        let new = stage.path().join("new");
        let verify = server.tool("pg_verifybackup");
        let tools = Path::new(verify.get_program()).parent().unwrap();
        let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
        let mut shell = Command::new("sh");
        shell.args(["-eu", "-c", &by_hand()]).env("NEW", &new).env("PATH", path);
        // As root `tar` would give the files to whom they belonged.
        shell.env("TAR_OPTIONS", "--no-same-owner").current_dir(stage.repository_dir().join("main/0001"));
        process::run_ok(&mut shell);
        let restored = PgServer::from_data_dir(&new.join("data")).setting("archive_mode", "off").start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT count(*) FROM there"), "20001", "{source}");
    }
}

/// pgbench in the background, until it is dropped.
struct Load(Child);

impl Load {
    fn start(server: &PgServer) -> Self {
        let mut command = server.tool("pgbench");
        command.args(["-n", "-c", "4", "-T", "600", "postgres"]).stdout(Stdio::null()).stderr(Stdio::null());
        Self(process::spawn(command).unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        process::kill_tree(&mut self.0);
    }
}

#[test]
fn a_backup_under_load_recovers_to_any_later_moment() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = started(&stage, major);
        server.pgbench(&["-i", "-s", "10", "-q", "postgres"]);
        let load = Load::start(&server);
        // Tables come, grow, shrink and go while the files are read.
        let churn = "DO $$ BEGIN FOR i IN 1..40 LOOP
            EXECUTE format('CREATE TABLE churn_%s AS SELECT g, md5(g::text) FROM generate_series(1, 5000) g', i);
            EXECUTE format('DELETE FROM churn_%s WHERE g > 100', i); COMMIT;
            EXECUTE format('TRUNCATE churn_%s', i); COMMIT;
            EXECUTE format('DROP TABLE churn_%s', i); COMMIT; END LOOP; END $$";
        let mut churning = server.tool("psql");
        churning.args(["-X", "-q", "-c", churn, "postgres"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut churning = process::spawn(churning).unwrap();
        let mut command = stage.walship_on(&server, LOCAL);
        command.args(["--max-rate", "60M"]);
        let record: BackupRecord = serde_json::from_str(&stage.ok(&mut command)).unwrap();
        assert!(record.damaged_pages.is_none(), "{:?}", record.damaged_pages);
        process::kill_tree(&mut churning);
        drop(load);
        verified(&stage, &server, &record, "unpacked");
        server.psql("SELECT pg_create_restore_point('after')");
        let sums = "SELECT sum(abalance), count(*) FROM pgbench_accounts";
        let history = "SELECT sum(delta), count(*) FROM pgbench_history";
        let (expected, expected_history) = (server.psql(sums), server.psql(history));
        server.archive_now();
        stage.ok(stage.pitr(&["restore", "--to-name", "after", "-D"]).arg(stage.path().join("restored")));
        let restored = stage.recovering(&stage.path().join("restored")).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!((restored.psql(sums), restored.psql(history)), (expected, expected_history));
    }
}

#[test]
fn damaged_pages_are_named_and_the_backup_is_kept() {
    let stage = Stage::folder("main");
    let mut server = started(&stage, primary_major());
    server.psql(
        "CREATE TABLE bad AS SELECT g FROM generate_series(1, 10000) g;
         CREATE TABLE good AS SELECT g FROM generate_series(1, 10000) g; CHECKPOINT",
    );
    let path = server.psql("SELECT pg_relation_filepath('bad')");
    server.stop(StopMode::Fast);
    let file = server.data_dir().join(&path);
    let mut bytes = fs::read(&file).unwrap();
    for block in [3, 7] {
        bytes[block * 8192 + 5000] ^= 1;
    }
    fs::write(&file, bytes).unwrap();
    server.start();
    let output = stage.run(&mut stage.walship_on(&server, LOCAL));
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
    let record: BackupRecord = serde_json::from_slice(&output.stdout).unwrap();
    let damaged = record.damaged_pages.clone().unwrap();
    assert_eq!(damaged.total, 2);
    let found: Vec<_> = damaged.pages.iter().map(|page| (page.path.to_str().unwrap(), page.block)).collect();
    assert_eq!(found, [(&*path, 3), (&*path, 7)]);
    assert_eq!(damaged.pages[0].relation.as_deref(), Some("postgres.public.bad"));
    // pg_checksums says the same of the checksums.
    let data = verified(&stage, &server, &record, "unpacked");
    fs::write(data.join("backup_label"), "").unwrap();
    assert_eq!(fs::read(data.join(&path)).unwrap(), fs::read(&file).unwrap());

    let text = stage.run(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    assert_eq!(text.status.code(), Some(4));
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("block 7 of postgres.public.bad"), "{text}");
    assert!(text.contains("\nsafe:  ") && text.contains("\nnext:  "), "{text}");
    let plan: Value =
        serde_json::from_str(&stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"]))).unwrap();
    assert!(plan.to_string().contains("2 damaged pages"), "{plan}");

    // Without them the next one is sound.
    server.psql("TRUNCATE bad; CHECKPOINT");
    let record = local(&stage, &server);
    assert!(record.damaged_pages.is_none());
}

#[test]
fn damaged_catalogs_are_named_with_their_database() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = started(&stage, major);
        server.psql("CREATE TABLE t (a int, b int); CREATE STATISTICS s ON a, b FROM t");
        server.psql("COMMENT ON DATABASE postgres IS 'x'");
        server.psql("CREATE DATABASE other");
        server.psql("CHECKPOINT");
        let path_in = |database: &str, relation: &str| {
            server.psql(&format!(
                "SELECT 'base/' || oid || '/{relation}' FROM pg_database WHERE datname = '{database}'"
            ))
        };
        let damaged = [
            (
                server.psql("SELECT pg_relation_filepath('pg_statistic_ext')"),
                "of postgres.pg_catalog.pg_statistic_ext",
            ),
            (
                server.psql("SELECT pg_relation_filepath('pg_shdescription')"),
                "of pg_catalog.pg_shdescription",
            ),
            (path_in("other", "2609"), "of other.pg_catalog.pg_description"),
            // Nobody is let into that one.
            (path_in("template0", "2609"), "of a relation in database template0"),
        ];
        server.stop(StopMode::Fast);
        for (path, _) in &damaged {
            let file = server.data_dir().join(path);
            let mut bytes = fs::read(&file).unwrap();
            bytes[5000] ^= 1;
            fs::write(&file, bytes).unwrap();
        }
        server.start();
        for source in ["local", "stream"] {
            let output = stage.run(&mut stage.walship_on(&server, &["backup", "--source", source]));
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(output.status.code(), Some(4), "{major}, {source}: {text}");
            for (path, whose) in &damaged {
                assert!(text.contains(&format!("block 0 {whose}, {path} (")), "{major}, {source}: {text}");
            }
        }
    }
}

#[test]
fn a_standby_is_read_and_its_promotion_ends_the_backup() {
    for major in majors() {
        let stage = Stage::folder("main");
        let primary = started(&stage, major);
        primary.psql(
            "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 100000) g",
        );
        let copy = stage.path().join("standby");
        let made = primary
            .run_tool("pg_basebackup", &["-D", copy.to_str().unwrap(), "-R", "-X", "stream", "-c", "fast"]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let standby = PgServer::from_data_dir(&copy).setting("archive_mode", "off").start();
        primary.psql("INSERT INTO t SELECT generate_series(1, 1000)");
        let lsn = primary.current_lsn();
        standby.wait_for(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"), "t");
        standby.psql("CHECKPOINT");
        // The switch happens on the primary: in a moment, by hand, as the warning says.
        let switching = std::thread::scope(|scope| {
            let taking = scope.spawn(|| local(&stage, &standby));
            for _ in 0..30 {
                std::thread::sleep(Duration::from_millis(500));
                primary.switch_wal();
                if taking.is_finished() {
                    break;
                }
            }
            taking.join().unwrap()
        });
        assert!(switching.from_standby);
        verified(&stage, &primary, &switching, "unpacked");
        primary.archive_now();
        stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(stage.path().join("restored")));
        let restored = stage.recovering(&stage.path().join("restored")).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT count(*) FROM t"), "101000");
        drop(restored);

        let before = records(&stage);
        let mut command = stage.walship_on(&standby, LOCAL);
        command.args(["--max-rate", "4M"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = process::spawn(command).unwrap();
        standby.wait_for("SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE '%pg_is_in_recovery%' AND pid <> pg_backend_pid()", "t");
        std::thread::sleep(Duration::from_millis(500));
        standby.promote();
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(said.contains("promoted") && said.contains("\nsafe:  "), "{said}");
        assert_eq!(records(&stage), before);
    }
}

#[test]
fn what_cannot_be_read_is_said_before_anything_is_begun() {
    let stage = Stage::folder("main");
    let mut server = started(&stage, primary_major());
    let refused = |server: &PgServer, words: &[&str], status: i32, expected: &str| {
        let mut command = stage.walship_on(server, &["backup"]);
        let said = stage.fails(command.args(words), status);
        assert!(said.contains(expected), "{said}");
        assert!(said.contains("\nsafe:  ") && said.contains("\nnext:  "), "{said}");
    };
    refused(&server, &["--workers", "2"], 1, "go with --source local");
    let other = PgServer::builder(primary_major()).start();
    let data_dir = |server: &PgServer| server.data_dir().to_str().unwrap().to_owned();
    refused(
        &server,
        &["--source", "local", "--data-dir", &data_dir(&other)],
        1,
        "belongs to system identifier",
    );
    refused(&server, &["--source", "local", "--data-dir", "/nowhere"], 1, "/nowhere");
    // A copy with the same identifier, on which nobody or another server runs.
    let copy = stage.path().join("copy");
    let made =
        server.run_tool("pg_basebackup", &["-D", copy.to_str().unwrap(), "-X", "stream", "-c", "fast"]);
    assert!(made.status.success());
    refused(&server, &["--source", "local", "--data-dir", copy.to_str().unwrap()], 1, "postmaster.pid");
    let running = PgServer::from_data_dir(&copy).setting("archive_mode", "off").start();
    refused(&server, &["--source", "local", "--data-dir", copy.to_str().unwrap()], 1, "another one does");
    drop(running);
    server.psql("CREATE ROLE weak LOGIN REPLICATION");
    let mut command = stage.walship(&["backup", "--source", "local", "--data-dir", &data_dir(&server)]);
    command.arg(server.uri().replace("postgres@", "weak@"));
    let said = stage.fails(&mut command, 1);
    assert!(
        said.contains("permission denied") && said.contains("GRANT") | said.contains("granted"),
        "{said}"
    );
    assert_eq!(records(&stage), Vec::<String>::new());
    assert!(!stage.repository_dir().join("main/0001/backups").exists());

    // A server that is restarted meanwhile, and a program that is killed: no record, and the next backup is whole.
    server
        .psql("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 100000) g");
    let slow = |server: &PgServer| {
        let mut command = stage.walship_on(server, LOCAL);
        command.args(["--max-rate", "4M"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        process::spawn(command).unwrap()
    };
    let begun = "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE '%pg_is_in_recovery%' AND pid <> pg_backend_pid()";
    let child = slow(&server);
    server.wait_for(begun, "t");
    std::thread::sleep(Duration::from_millis(500));
    server.restart();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{}", String::from_utf8_lossy(&ended.stderr));
    let mut child = slow(&server);
    server.wait_for(begun, "t");
    std::thread::sleep(Duration::from_millis(500));
    process::kill_tree(&mut child);
    assert_eq!(records(&stage), Vec::<String>::new());
    server.wait_for("SELECT count(*) FROM pg_replication_slots", "0");
    // Two at the same time do not know each other.
    std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| local(&stage, &server))).collect();
        let ids: BTreeSet<String> = both.into_iter().map(|taking| taking.join().unwrap().id).collect();
        assert_eq!(ids.len(), 2);
    });
    assert_eq!(records(&stage).len(), 2);
}

#[test]
fn no_timeout_of_the_server_ends_a_backup() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = started(&stage, major);
        server.psql(
            "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 60000) g",
        );
        let mut timeouts = vec![
            "idle_session_timeout",
            "statement_timeout",
            "lock_timeout",
            "idle_in_transaction_session_timeout",
        ];
        if major >= 17 {
            timeouts.push("transaction_timeout");
        }
        let set: String = timeouts.iter().map(|name| format!("ALTER SYSTEM SET {name} = '1s';")).collect();
        // A spread checkpoint takes three seconds.
        server.psql("ALTER SYSTEM SET checkpoint_timeout = '30s'");
        server.psql("ALTER SYSTEM SET checkpoint_completion_target = 0.1");
        server.psql(&format!("{set} SELECT pg_reload_conf()"));
        server.wait_for("SHOW idle_session_timeout", "1s");
        let slots = "SELECT count(*) FROM pg_replication_slots";
        for source in ["local", "stream"] {
            // It has something to write.
            server.psql("UPDATE t SET g = g + 1 WHERE g % 3 = 0");
            let mut command = stage.walship_on(&server, &["backup", "--source", source, "--json"]);
            command.args(["--checkpoint", "spread", "--max-rate", "10M"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let child = process::spawn(command).unwrap();
            server.wait_for(slots, "1");
            std::thread::sleep(Duration::from_millis(2500));
            assert_eq!(server.psql(slots), "1", "{major}, {source}: nothing holds WAL back any more");
            let ended = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "{major}, {source}: {said}");
            server.wait_for(slots, "0");
        }
    }
}

/// Returns the niceness of each thread of a process.
fn niceness(pid: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else { continue };
        // Behind the name in brackets the fields are counted from the third on.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        found.push(fields.split_whitespace().nth(19 - 3).unwrap().parse().unwrap());
    }
    found
}

#[test]
fn a_nice_backup_stands_back_with_every_thread() {
    let stage = Stage::folder("main");
    let server = started(&stage, primary_major());
    server.psql("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 50000) g");
    let own = niceness(std::process::id())[0];
    for (word, by) in [("--nice", 19), ("--nice=5", 5)] {
        let mut command = process::guarded(bins::walship());
        command.args(LOCAL).args(["--max-rate", "20M", word]).env("WALSHIP_CONFIG", stage.config());
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = process::spawn(command).unwrap();
        server.wait_for("SELECT count(*) FROM pg_replication_slots", "1");
        let threads = walship_tests::wait::some("the files are read", || {
            let threads = niceness(child.id());
            (threads.len() > 4).then_some(threads)
        });
        assert!(threads.iter().all(|nice| *nice == (own + by).min(19)), "{word}: {threads:?}");
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
    let mut wrong = stage.walship_on(&server, &["backup", "--nice=-5"]);
    stage.fails(&mut wrong, 2);
}
