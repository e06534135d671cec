//! Restores that something stands in the way of: damage, faults of the store, full disks, folders and files of
//! the original server.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::s3_inprocess::{ACCESS_KEY, Fault, S3Server, SECRET_KEY};
use walship_tests::stage::Stage;
use walship_tests::tmpfs::Tmpfs;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The notes of `pitr restore --json`.
fn notes(report: &Value) -> String {
    let notes = report["report"]["notes"].as_array().unwrap();
    notes.iter().map(|note| note.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

/// A server that archives, with a table of one row.
fn production(stage: &Stage, settings: &[(&str, &str)]) -> PgServer {
    let mut builder = stage.archiving(PgServer::builder(primary_major()));
    for (name, value) in settings {
        builder = builder.setting(name, value);
    }
    let server = builder.start();
    stage.init(&server);
    server.psql("create table t (id int); insert into t values (1)");
    server
}

/// Commits a row and returns its transaction.
fn insert(server: &PgServer, id: u32) -> String {
    server.psql(&format!("insert into t values ({id}); select xmin from t where id = {id}")).trim().to_owned()
}

fn find(dir: &Path, name: &str) -> PathBuf {
    let found = walk(dir).into_iter().find(|path| path.file_name().is_some_and(|file| file == name));
    found.unwrap_or_else(|| panic!("{name} is not below {}", dir.display()))
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// What is left of a restore that failed says so, and no server starts on it.
fn cannot_be_started(dir: &Path) {
    assert!(dir.join("walship-restore-incomplete").exists());
    assert!(!dir.join("global/pg_control").exists());
    if dir.join("PG_VERSION").exists() {
        let refused = PgServer::from_data_dir(dir).try_start();
        assert!(refused.is_err(), "PostgreSQL started on half a restore");
    }
}

#[test]
fn damage_behind_the_target_is_a_warning_and_before_it_an_error() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    stage.backup(&server);
    let mut rows = Vec::new();
    for id in 2..=5 {
        rows.push((insert(&server, id), server.archive_now()));
    }
    server.stop(StopMode::Fast);
    // The damage hits the summary: the head of the object.
    flip(&find(&stage.repository_dir(), &format!("{}.wal", rows[2].1)), 100);
    let dir = stage.path().join("restored");
    let target = |row: usize| ["--to-xid".to_owned(), rows[row].0.clone()];
    let plan = json(&stage.ok(stage.pitr(&["plan", "--json"]).args(target(1))));
    let unknown = plan["plan"]["first_excluded_unknown"].as_str().unwrap();
    assert!(unknown.contains(&rows[2].1), "{unknown}");
    let text = stage.ok(stage.pitr(&["plan"]).args(target(1)));
    assert!(text.contains(&format!("segment {} is damaged", rows[2].1)), "{text}");
    stage.ok(stage.pitr(&["restore", "-D"]).arg(&dir).args(target(1)));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select max(id) from t"), "3");
    for row in [2, 3] {
        let error = stage.fails(stage.pitr(&["plan"]).args(target(row)), 4);
        assert!(error.contains(&rows[2].1), "{error}");
    }
    stage.fails(&mut stage.pitr(&["plan", "--latest"]), 4);
}

/// The configuration in the backup names the production server's own folders.
#[test]
fn a_copy_stays_away_from_the_files_of_production() {
    let outside = tempfile::tempdir().unwrap();
    let in_outside = |name: &str| outside.path().join(name).to_str().unwrap().to_owned();
    let stage = Stage::folder("main");
    let mut server = production(
        &stage,
        &[
            ("external_pid_file", &in_outside("main.pid")),
            ("log_directory", &in_outside("log")),
            ("logging_collector", "on"),
        ],
    );
    let conf = server.data_dir().join("postgresql.conf");
    let own = fs::read_to_string(&conf).unwrap();
    fs::write(&conf, format!("{own}data_directory = '{}'\n", server.data_dir().display())).unwrap();
    stage.backup(&server);
    server.archive_now();
    let pid = fs::read_to_string(in_outside("main.pid")).unwrap();
    let logs = fs::read_dir(in_outside("log")).unwrap().count();

    let dir = stage.path().join("copy");
    let report = json(&stage.ok(stage.pitr(&["restore", "--json", "--latest", "-D"]).arg(&dir)));
    let said = notes(&report);
    for words in ["data_directory", "external_pid_file was", "log_directory was"] {
        assert!(said.contains(words), "{said}");
    }
    let start = report["report"]["start_command"].as_str().unwrap();
    assert!(start.contains("-c data_directory="), "{start}");

    // The server's own word on what wins.
    let value = |name: &str, options: &[String]| {
        let mut command = server.binaries().unprivileged("postgres");
        let output = command.arg("-D").arg(&dir).args(options).args(["-C", name]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let pinned = ["-c".to_owned(), format!("data_directory={}", dir.display())];
    assert_eq!(value("data_directory", &[]), server.data_dir().to_str().unwrap(), "-D alone does not win");
    assert_eq!(value("data_directory", &pinned), dir.to_str().unwrap());
    assert_eq!(value("external_pid_file", &pinned), "postmaster.external.pid");
    assert_eq!(value("log_directory", &pinned), "log");

    let copy = stage.recovering(&dir).setting("data_directory", dir.display()).start();
    copy.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(copy.psql("show data_directory"), dir.to_str().unwrap());
    assert!(dir.join("postmaster.external.pid").exists() && dir.join("log").is_dir());
    drop(copy);
    assert_eq!(fs::read_to_string(in_outside("main.pid")).unwrap(), pid, "production's file is untouched");
    assert_eq!(fs::read_dir(in_outside("log")).unwrap().count(), logs);
    assert_eq!(server.psql("select count(*) from t"), "1");
    server.stop(StopMode::Fast);
}

#[test]
fn tablespaces_are_moved_and_those_of_replay_are_asked_about() {
    let (space, later) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |dir: &tempfile::TempDir| dir.path().to_str().unwrap().to_owned();
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    server.psql(&format!("create tablespace fast location '{}'", path(&space)));
    server.psql("create table f (id int) tablespace fast; insert into f select generate_series(1, 1000)");
    stage.backup(&server);
    let before = insert(&server, 2);
    server.psql(&format!("create tablespace later location '{}'", path(&later)));
    server.psql("create table l (id int) tablespace later; insert into l values (7)");
    server.archive_now();
    server.stop(StopMode::Fast);

    let restore = |name: &str, target: &[&str]| {
        let mut command = stage.pitr(&["restore", "-D"]);
        command.arg(stage.path().join(name)).args(target);
        command.arg("--tablespace-mapping").arg(format!(
            "{}={}/{name}-fast",
            path(&space),
            stage.path().display()
        ));
        command
    };
    let dir = stage.path().join("moved");
    stage.ok(&mut restore("moved", &["--to-xid", &before]));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select count(*), max(id) from f"), "1000|1000");
    let location =
        restored.psql("select pg_tablespace_location(oid) from pg_tablespace where spcname = 'fast'");
    assert_eq!(location, format!("{}-fast", dir.display()));
    restored.psql("insert into f values (1001); checkpoint");
    drop(restored);
    assert!(!walk(&stage.path().join("moved-fast")).is_empty());

    // Replay creates the other one at the original's path, which exists here.
    let refused = stage.fails(&mut restore("refused", &["--latest"]), 2);
    assert!(refused.contains(&path(&later)) && refused.contains("--accept-tablespace-paths"), "{refused}");
    assert!(!stage.path().join("refused").exists() && !stage.path().join("refused-fast").exists());
    // Nobody uses it any more: production is gone.
    fs::remove_dir_all(later.path()).unwrap();
    fs::create_dir(later.path()).unwrap();
    chown_like(later.path(), space.path());
    stage.ok(restore("accepted", &["--latest"]).arg("--accept-tablespace-paths"));
    let restored = stage.recovering(&stage.path().join("accepted")).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select id from l"), "7");
}

#[test]
fn what_is_in_the_way_is_named_with_the_way_on() {
    let space = tempfile::tempdir().unwrap();
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    server.psql(&format!("create tablespace fast location '{}'", space.path().display()));
    server.psql("create table f (id int) tablespace fast");
    let oid = server.psql("select oid from pg_tablespace where spcname = 'fast'");
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let refused = |dir: &Path, expected: &[&str]| {
        let said = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(dir), 2);
        for words in expected.iter().chain(&["is not empty", "nothing was written"]) {
            assert!(said.contains(words), "{words}: {said}");
        }
    };
    refused(server.data_dir(), &["--set-aside", "--delta"]);
    let new = stage.path().join("new");
    let place = space.path().to_str().unwrap();
    refused(&new, &[place, &format!("tablespace {oid}"), &format!("--tablespace-mapping {oid}=DIR")]);
    assert!(!new.exists());
}

#[test]
fn another_backup_is_named_where_one_lacks_something() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let dir = stage.path().join("restored");
    let attempt = |status: i32| {
        let said = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir), status);
        assert!(said.contains("--backup ID"), "{said}");
        assert!(!dir.exists(), "{said}");
    };
    let manifest = find(&stage.repository_dir(), "manifest.json.zst");
    let data =
        walk(&stage.repository_dir()).into_iter().find(|path| path.extension().is_some_and(|is| is == "tar"));
    flip(&manifest, 100);
    attempt(4);
    flip(&manifest, 100);
    for path in [manifest, data.unwrap()] {
        let away = stage.path().join("away");
        fs::rename(&path, &away).unwrap();
        attempt(1);
        fs::rename(&away, &path).unwrap();
    }
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir));
}

fn chown_like(path: &Path, model: &Path) {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(model).unwrap();
    std::os::unix::fs::chown(path, Some(meta.uid()), Some(meta.gid())).unwrap();
}

#[test]
fn a_full_disk_ends_a_restore_clearly() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    // Seen before a byte is written.
    let small = Tmpfs::mount(&stage.path().join("small"), "size=8m");
    let dir = small.path().join("data");
    let short = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir), 1);
    assert!(short.contains("the restore needs") && short.contains("nothing was written"), "{short}");
    assert!(!dir.exists());
    // Room enough for the bytes, but not for the files: found out half way.
    let crowded = Tmpfs::mount(&stage.path().join("crowded"), "size=2g,nr_inodes=300");
    let dir = crowded.path().join("data");
    let full = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir), 1);
    assert!(full.contains("No space left on device"), "{full}");
    let lines: Vec<_> = full.lines().filter(|line| !line.starts_with("restored ")).collect();
    for (line, label) in lines.iter().zip(["error: ", "safe:  ", "next:  "]) {
        assert!(line.starts_with(label), "{full}");
    }
    assert!(walk(&dir).len() > 10, "it had begun");
    cannot_be_started(&dir);
    assert_eq!(stage.holds(), [], "what it held is released");
    // What was restored is held for its recovery, once.
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(stage.path().join("restored")));
    let reasons: Vec<String> = stage.holds().into_iter().map(|(_, reason)| reason).collect();
    assert_eq!(reasons, ["pitr restore --latest --timeline 1"]);
}

#[test]
fn room_for_a_long_file_is_made_before_it_is_fetched() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, &[]);
    server.psql("create table long as select g, repeat(md5(g::text), 10) from generate_series(1, 60000) g");
    let long = server.psql("select pg_relation_filepath('long')");
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let disk = Tmpfs::mount(&stage.path().join("disk"), "size=200m");
    let dir = disk.path().join("data");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir));
    // A restore over it needs the room of what is gone, which somebody else has taken meanwhile.
    let bytes = fs::metadata(dir.join(&long)).unwrap().len();
    assert!(bytes > 16 << 20, "{bytes}");
    fs::remove_file(dir.join(&long)).unwrap();
    let free = nix::sys::statvfs::statvfs(disk.path()).unwrap();
    let free = free.blocks_available() as u64 * free.fragment_size() as u64;
    fs::write(disk.path().join("ballast"), vec![1; (free - bytes / 2) as usize]).unwrap();
    let mut over = stage.pitr(&["restore", "--latest", "--delta", "--yes", "-D"]);
    let full = stage.fails(over.arg(&dir), 1);
    let file = dir.join(&long);
    let expected = format!("making room for the {bytes} bytes of {}", file.display());
    assert!(full.contains(&expected) && full.contains("No space left on device"), "{full}");
    assert!(full.contains("\nsafe:  ") && full.contains("\nnext:  "), "{full}");
    cannot_be_started(&dir);
    fs::remove_file(disk.path().join("ballast")).unwrap();
    let mut over = stage.pitr(&["restore", "--latest", "--delta", "--yes", "-D"]);
    stage.ok(over.arg(&dir));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select count(*) from long"), "60000");
}

#[test]
fn faults_of_the_store_end_a_restore_or_are_outlasted() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint())
        .configured("[limits]\nconnect_ms = 500\nrequest_ms = 2000\ndeadline_ms = 6000\n");
    let mut server = production(&stage, &[]);
    stage.backup(&server);
    let last = insert(&server, 2);
    server.archive_now();
    server.stop(StopMode::Fast);
    let attempt = |name: &str| {
        let mut command = stage.pitr(&["restore", "--to-xid", &last, "-D"]);
        command.arg(stage.path().join(name));
        command
    };
    let is_data = |path: &str| path.contains("/backups/") && path.ends_with(".tar");
    let broken = [
        ("denied", Fault::S3(403, "AccessDenied"), 1),
        ("proxy", Fault::Proxy(502), 1),
        ("truncated", Fault::Truncated(1000), 1),
        ("flipped", Fault::Flipped(5000), 4),
    ];
    for (name, fault, status) in broken {
        s3.set_faults(move |seen| (seen.method == "GET" && is_data(&seen.path)).then(|| fault.clone()));
        let error = stage.fails(&mut attempt(name), status);
        assert!(error.contains("\nsafe:  ") && error.contains("\nnext:  "), "{name}: {error}");
        cannot_be_started(&stage.path().join(name));
    }
    // An outage that passes.
    let left = Arc::new(AtomicUsize::new(3));
    let counted = left.clone();
    s3.set_faults(move |seen| {
        let fails = seen.method == "GET"
            && is_data(&seen.path)
            && counted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        fails.then_some(Fault::S3(503, "SlowDown"))
    });
    stage.ok(&mut attempt("outlasted"));
    assert_eq!(left.load(Ordering::SeqCst), 0);
    s3.heal();
    let restored = stage.recovering(&stage.path().join("outlasted")).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("select max(id) from t"), "2");
    drop(restored);

    // A store that is gone: nothing is begun.
    let dead = stage.path().join("dead");
    let text = fs::read_to_string(stage.config()).unwrap();
    fs::write(stage.config(), text.replace(&s3.endpoint(), "http://127.0.0.1:9")).unwrap();
    let error = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dead), 1);
    assert!(error.contains("cannot be reached"), "{error}");
    assert!(!dead.exists());
}

/// Secrets that only this command has do not reach `restore_command`, and it says so.
#[test]
fn credentials_of_the_environment_are_not_promised_to_the_server() {
    let s3 = S3Server::start();
    let stage = Stage::s3("main", &s3.endpoint());
    let mut server = production(&stage, &[]);
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let config = fs::read_to_string(stage.config()).unwrap();
    let open: Vec<_> = config.lines().filter(|line| !line.contains("access_key")).collect();
    fs::write(stage.config(), open.join("\n")).unwrap();

    let dir = stage.path().join("restored");
    let mut command = stage.pitr(&["restore", "--json", "--latest", "-D"]);
    command
        .arg(&dir)
        .env("WALSHIP_S3_ACCESS_KEY_ID", ACCESS_KEY)
        .env("WALSHIP_S3_SECRET_ACCESS_KEY", SECRET_KEY);
    let said = notes(&json(&stage.ok(&mut command)));
    assert!(said.contains("WALSHIP_S3_SECRET_ACCESS_KEY") && said.contains("restore_command"), "{said}");
    let auto_conf = fs::read_to_string(dir.join("postgresql.auto.conf")).unwrap();
    assert!(!auto_conf.contains(SECRET_KEY) && !auto_conf.contains(ACCESS_KEY), "secrets stay out of files");
    // As it was said: recovery stops, and with the variables set it goes through.
    assert!(stage.recovering(&dir).env("WALSHIP_RESTORE_RETRY_MS", "1000").try_start().is_err());
    let server = stage
        .recovering(&dir)
        .env("WALSHIP_S3_ACCESS_KEY_ID", ACCESS_KEY)
        .env("WALSHIP_S3_SECRET_ACCESS_KEY", SECRET_KEY)
        .start();
    server.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(server.psql("select count(*) from t"), "1");
}
