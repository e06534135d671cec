//! Restores over a data directory that is there: what matches stays, what is broken off goes on, nothing is taken
//! for what it is not.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::random::Random;
use walship_tests::stage::Stage;
use walship_tests::{process, seed, wait};

const MARKER: &str = "walship-restore-incomplete";

fn production(stage: &Stage, major: u32) -> PgServer {
    let server = stage.archiving(PgServer::builder(major)).start();
    stage.init(&server);
    server.psql(
        "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 60000) g;
         CREATE INDEX ON t (g)",
    );
    server
}

/// Returns the report of a restore over `dir`, which may not have many files open.
fn over(stage: &Stage, dir: &Path, words: &[&str]) -> Value {
    let pitr = stage.pitr(&["restore", "--json", "--delta", "--yes", "-D"]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 200 && exec \"$@\"", "sh"]).arg(pitr.get_program()).args(pitr.get_args());
    for (name, value) in pitr.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg(dir).args(words);
    let report: Value = serde_json::from_str(&stage.ok(&mut command)).unwrap();
    report["report"].clone()
}

/// PostgreSQL's own tool finds every file as the backup's manifest says.
fn is_whole(server: &PgServer, dir: &Path) {
    assert!(!dir.join(MARKER).exists());
    let verify = server.run_tool("pg_verifybackup", &["-n", dir.to_str().unwrap()]);
    assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stderr));
}

#[test]
fn only_what_differs_is_fetched() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = production(&stage, major);
        let space = TempDir::new().unwrap();
        server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.path().display()));
        server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 20000) g");
        stage.backup(&server);
        server.psql("SELECT pg_create_restore_point('good')");
        let expected = server.psql("SELECT sum(g), max(t) FROM t");
        server.psql(
            "UPDATE t SET t = 'x' WHERE g % 3000 = 0; DROP TABLE there; CREATE TABLE later TABLESPACE fast AS SELECT 1 AS g;
             CREATE DATABASE later",
        );
        server.archive_now();
        server.psql("INSERT INTO t VALUES (0, 'never archived'); CHECKPOINT");
        let data_dir = server.data_dir().to_owned();
        // What is the operator's, or another cluster's from before an upgrade.
        let others = [data_dir.join("pg_dumps/after.dump"), space.path().join("PG_14_202107181/5/16384")];
        for other in &others {
            fs::create_dir_all(other.parent().unwrap()).unwrap();
            fs::write(other, "precious").unwrap();
        }
        fs::write(data_dir.join("notes.txt"), "the operator's").unwrap();
        // While it runs nothing is touched.
        let words = ["restore", "--to-name", "good", "--delta", "--yes", "-D", data_dir.to_str().unwrap()];
        let said = stage.fails(&mut stage.pitr(&words), 2);
        assert!(said.contains("a server runs on"), "{said}");
        assert_eq!(server.psql("SELECT count(*) FROM later"), "1");
        server.kill9();

        // Nobody is there to confirm; a dry run changes nothing.
        let words = ["restore", "--to-name", "good", "--delta", "-D", data_dir.to_str().unwrap()];
        let said = stage.fails(stage.pitr(&words).stdin(Stdio::null()), 2);
        assert!(said.contains("--yes") && said.contains("nothing was written"), "{said}");
        stage.ok(stage.pitr(&words).arg("--dry-run"));
        assert!(data_dir.join("global/pg_control").exists() && !data_dir.join(MARKER).exists());

        let report = over(&stage, &data_dir, &["--to-name", "good"]);
        let number = |name: &str| report["delta"][name].as_u64().unwrap();
        let total = report["data_bytes"].as_u64().unwrap();
        assert!(number("kept_bytes") > total * 8 / 10, "{report}");
        assert!(number("kept_bytes") < total && number("removed_files") > 0, "{report}");
        assert_eq!(fs::read_to_string(data_dir.join("notes.txt")).unwrap(), "the operator's");
        fs::remove_file(data_dir.join("notes.txt")).unwrap();
        for other in &others {
            assert_eq!(fs::read_to_string(other).unwrap(), "precious");
        }
        fs::remove_dir_all(data_dir.join("pg_dumps")).unwrap();
        fs::remove_dir_all(space.path().join("PG_14_202107181")).unwrap();
        is_whole(&server, &data_dir);
        // The WAL that nobody else has is still there.
        let aside = PathBuf::from(report["delta"]["old_wal"].as_str().unwrap());
        assert!(aside.starts_with(data_dir.join("pg_wal")));
        assert!(fs::read_dir(&aside).unwrap().count() > 1);
        let restored = stage.recovering(&data_dir).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT sum(g), max(t) FROM t"), expected);
        assert_eq!(restored.psql("SELECT count(*) FROM there"), "20000");
        assert_eq!(restored.psql("SELECT count(*) FROM pg_database WHERE datname = 'later'"), "0");
        assert!(restored.try_psql("SELECT * FROM later").is_err());
    }
}

#[test]
fn a_restore_that_was_killed_goes_on() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    server.psql("CREATE TABLE more AS SELECT g, md5(g::text) AS t FROM generate_series(1, 300000) g");
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let mut random = Random::new(seed());
    for round in 0..6 {
        let dir = stage.path().join(format!("restored-{round}"));
        // The first attempt is whole or over nothing; the others go over what is left.
        for attempt in 0..3 {
            let mut command = stage.pitr(&["restore", "--latest", "-D"]);
            command.arg(&dir).stdout(Stdio::null()).stderr(Stdio::null());
            if attempt > 0 || round % 2 == 0 {
                command.args(["--delta", "--yes"]);
            }
            let mut child = process::spawn(command).unwrap();
            std::thread::sleep(Duration::from_millis(40 + random.below(500) as u64));
            process::kill_tree(&mut child);
            if dir.join(MARKER).exists() {
                // Both are there before the first change and after the last one.
                if dir.join("global/pg_control").exists() {
                    fs::remove_file(dir.join(MARKER)).unwrap();
                    is_whole(&server, &dir);
                    fs::write(dir.join(MARKER), "").unwrap();
                }
                let refused = stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir), 2);
                assert!(refused.contains("--delta"), "{refused}");
            }
        }
        over(&stage, &dir, &["--latest"]);
        is_whole(&server, &dir);
        let again = over(&stage, &dir, &["--latest"]);
        assert!(
            again["delta"]["kept_bytes"].as_u64() > again["data_bytes"].as_u64().map(|all| all * 99 / 100),
            "{again}"
        );
        is_whole(&server, &dir);
        let restored = stage.recovering(&dir).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT count(*), count(DISTINCT t) FROM more"), "300000|300000");
        drop(restored);
        fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn what_is_no_data_directory_of_the_cluster_is_left_alone() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let refused = |dir: &Path, expected: &str, status: i32| {
        let mut command = stage.pitr(&["restore", "--latest", "--delta", "--yes", "-D"]);
        let said = stage.fails(command.arg(dir), status);
        assert!(said.contains(expected) && said.contains("nothing was written"), "{said}");
    };
    let mut stranger = PgServer::builder(primary_major()).start();
    stranger.stop(StopMode::Fast);
    refused(stranger.data_dir(), "another cluster", 1);
    stranger.start();
    assert_eq!(stranger.psql("SELECT 1"), "1");
    let papers = stage.path().join("papers");
    fs::create_dir(&papers).unwrap();
    fs::write(papers.join("precious"), "x").unwrap();
    refused(&papers, "no data directory", 2);
    assert_eq!(fs::read_dir(&papers).unwrap().count(), 1);
    let file = papers.join("precious");
    refused(&file, "not a folder", 2);

    // A file that is a link to elsewhere, or has a second name, is replaced, and what it led to stays.
    let dir = server.data_dir().to_owned();
    let outside = stage.path().join("outside");
    fs::write(&outside, "mine").unwrap();
    for (name, make) in [("PG_VERSION", 0), ("pg_ident.conf", 1)] {
        fs::remove_file(dir.join(name)).unwrap();
        match make {
            0 => std::os::unix::fs::symlink(&outside, dir.join(name)).unwrap(),
            _ => fs::hard_link(&outside, dir.join(name)).unwrap(),
        }
    }
    over(&stage, &dir, &["--latest"]);
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    is_whole(&server, &dir);
}

#[test]
fn what_was_there_is_set_aside() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    let space = TempDir::new().unwrap();
    let inside = space.path().join("inside");
    fs::create_dir(&inside).unwrap();
    server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", inside.display()));
    server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 1000) g");
    stage.backup(&server);
    server.archive_now();
    server.psql("INSERT INTO there VALUES (-1)");
    server.stop(StopMode::Immediate);
    let dir = server.data_dir().to_owned();
    // That row is in no archive: nothing is restored over it unasked.
    let words = ["restore", "--latest", "--json", "--set-aside", "--yes", "-D", dir.to_str().unwrap()];
    let said = stage.fails(&mut stage.pitr(&words), 1);
    assert!(said.contains("the archive lacks WAL") && said.contains("--leave-surviving"), "{said}");
    assert!(dir.join("global/pg_control").exists());
    let mut command =
        stage.pitr(&["restore", "--latest", "--json", "--leave-surviving", "--set-aside", "--yes", "-D"]);
    let report: Value = serde_json::from_str(&stage.ok(command.arg(&dir))).unwrap();
    let moved = report["report"]["set_aside"].as_array().unwrap();
    assert_eq!(moved.len(), 2, "{report}");
    for pair in moved {
        assert!(Path::new(pair[1].as_str().unwrap()).is_dir());
    }
    is_whole(&server, &dir);
    let restored = stage.recovering(&dir).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*) FROM there"), "1000");
    // The old one is what it was, on files of its own.
    let old = PathBuf::from(moved[0][1].as_str().unwrap());
    let old_server = PgServer::from_data_dir(&old).setting("archive_mode", "off").start();
    assert_eq!(old_server.psql("SELECT count(*) FROM there"), "1001");
    restored.psql("INSERT INTO there VALUES (-2), (-3); CHECKPOINT");
    assert_eq!(old_server.psql("SELECT count(*) FROM there"), "1001");
    drop((old_server, restored));
    fs::remove_dir_all(&old).unwrap();
}

#[test]
fn the_last_transactions_of_a_lost_server_come_along() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    stage.backup(&server);
    server.archive_now();
    server.psql("INSERT INTO t VALUES (-1); SELECT pg_switch_wal(); INSERT INTO t VALUES (-2)");
    server.kill9();
    let dir = server.data_dir().to_owned();
    fs::write(dir.join("base/1/112"), "damage").unwrap();
    let mut command = stage.pitr(&["restore", "--latest", "--delta", "--yes", "--push-surviving", "-D"]);
    stage.ok(command.arg(&dir));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*) FROM t WHERE g < 0"), "2");
}

/// A data object of the only backup.
fn data_object(stage: &Stage) -> PathBuf {
    let mut folders = vec![stage.repository_dir()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|is| is == "tar") => return path,
                false => {}
            }
        }
    }
    panic!("there is no data object");
}

/// Damages a data object, and returns its path and what it was.
fn damage(stage: &Stage) -> (PathBuf, Vec<u8>) {
    let object = data_object(stage);
    let sound = fs::read(&object).unwrap();
    let mut damaged = sound.clone();
    // Almost all of it: the index at its end is sound.
    damaged.iter_mut().take(sound.len() / 5 * 4).step_by(1000).for_each(|byte| *byte ^= 1);
    fs::remove_file(&object).unwrap();
    fs::write(&object, damaged).unwrap();
    (object, sound)
}

/// Returns the segments in a folder.
fn segments(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> = names.filter(|name| name.len() == 24).collect();
    found.sort_unstable();
    found
}

#[test]
fn wal_that_earlier_restores_set_aside_is_found_and_pushed() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = production(&stage, major);
        stage.backup(&server);
        server.archive_now();
        server.psql("ALTER SYSTEM SET archive_command = 'false'; SELECT pg_reload_conf()");
        server.wait_for("SHOW archive_command", "false");
        server.psql("INSERT INTO t VALUES (-7)");
        server.switch_wal();
        server.psql("INSERT INTO t VALUES (-8)");
        let open = server.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        server.kill9();
        let dir = server.data_dir().to_owned();
        let restore = |words: &[&str]| {
            let mut command = stage.pitr(&["restore", "--yes", "-D", dir.to_str().unwrap()]);
            command.args(words);
            command
        };
        let offered = |words: &[&str], place: &str| {
            let said = stage.fails(&mut restore(words), 1);
            for expected in ["the archive lacks WAL", place, "--push-surviving", "--leave-surviving"] {
                assert!(said.contains(expected), "{expected}: {said}");
            }
        };
        // A restore to another target sets the WAL aside, and fails: it says where.
        let (object, sound) = damage(&stage);
        fs::remove_dir_all(dir.join("base")).unwrap();
        let said = stage.fails(&mut restore(&["--immediate", "--delta"]), 4);
        let aside = dir.join("pg_wal/walship-before-");
        assert!(said.contains(aside.to_str().unwrap()) && said.contains("--backup ID"), "{said}");
        assert!(said.contains("With --delta it goes over this folder"), "{said}");
        fs::write(&object, sound).unwrap();
        offered(&["--latest", "--delta"], aside.to_str().unwrap());
        offered(&["--latest", "--set-aside"], aside.to_str().unwrap());

        // One that succeeds loses sight of it no more than that.
        let report = over(&stage, &dir, &["--immediate"]);
        assert!(report["notes"].to_string().contains(aside.to_str().unwrap()), "{report}");
        offered(&["--latest", "--delta"], aside.to_str().unwrap());

        // With the whole directory set aside, it lies beside the new one.
        stage.ok(&mut restore(&["--latest", "--set-aside", "--leave-surviving"]));
        let beside = format!("{}.before-", dir.display());
        offered(&["--latest", "--delta"], &beside);
        offered(&["--latest", "--set-aside"], &beside);
        fs::remove_dir_all(&dir).unwrap();
        offered(&["--latest"], &beside);

        // The move of the WAL was broken off in between.
        let parent = dir.parent().unwrap();
        let old = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().path());
        let old = old.filter(|path| path.to_str().unwrap().starts_with(&beside)).collect::<Vec<_>>();
        let [old] = &old[..] else { panic!("{old:?}") };
        let aside = fs::read_dir(old.join("pg_wal")).unwrap().map(|entry| entry.unwrap().path());
        let aside = aside.filter(|path| path.is_dir() && !segments(path).is_empty()).collect::<Vec<_>>();
        let [aside] = &aside[..] else { panic!("{aside:?}") };
        for name in segments(aside).into_iter().filter(|name| *name >= open) {
            fs::hard_link(aside.join(&name), old.join("pg_wal").join(&name)).unwrap();
        }
        offered(&["--latest"], &beside);
        stage.ok(&mut restore(&["--latest", "--push-surviving"]));
        let restored = stage.recovering(&dir).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT string_agg(g::text, ' ' ORDER BY g) FROM t WHERE g < 0"), "-8 -7");
        drop(restored);
        fs::remove_dir_all(old).unwrap();
    }
}

#[test]
fn a_copy_that_went_on_hides_no_wal_from_before() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    stage.backup(&server);
    server.archive_now();
    server.psql("ALTER SYSTEM SET archive_command = 'false'; SELECT pg_reload_conf()");
    server.wait_for("SHOW archive_command", "false");
    server.psql("INSERT INTO t VALUES (-7)");
    server.kill9();
    let dir = server.data_dir().to_owned();
    let restore = |words: &[&str]| {
        let mut command = stage.pitr(&["restore", "--delta", "--yes", "-D", dir.to_str().unwrap()]);
        command.args(words);
        command
    };
    // A look at the data as they were once, on a timeline that is in no archive.
    stage.ok(&mut restore(&["--immediate"]));
    let mut copy = stage.recovering(&dir).start();
    copy.wait_for("SELECT pg_is_in_recovery()", "f");
    copy.psql("INSERT INTO t VALUES (-9)");
    copy.stop(StopMode::Fast);
    let aside = dir.join("pg_wal/walship-before-");
    let offered = stage.fails(&mut restore(&["--latest"]), 1);
    for words in [aside.to_str().unwrap(), "holds timeline 2", "--push-surviving"] {
        assert!(offered.contains(words), "{words}: {offered}");
    }
    // What is known is pushed; what is not is decided by the operator.
    let pushed = stage.fails(&mut restore(&["--latest", "--push-surviving"]), 2);
    for words in
        ["holds timeline 2", "pushed into every repository", aside.to_str().unwrap(), "--leave-surviving"]
    {
        assert!(pushed.contains(words), "{words}: {pushed}");
    }
    stage.fails(&mut restore(&["--latest", "--push-surviving", "--leave-surviving"]), 2);
    stage.ok(&mut restore(&["--latest", "--leave-surviving"]));
    let restored = stage.recovering(&dir).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT string_agg(g::text, ' ') FROM t WHERE g < 0"), "-7");
}

#[test]
fn a_restore_that_fails_says_where_the_old_data_is() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    let space = TempDir::new().unwrap();
    let inside = space.path().join("inside");
    fs::create_dir(&inside).unwrap();
    server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", inside.display()));
    server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 1000) g");
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    let dir = server.data_dir().to_owned();
    let (object, sound) = damage(&stage);
    let said = stage.fails(
        &mut stage.pitr(&["restore", "--latest", "--set-aside", "--yes", "-D", dir.to_str().unwrap()]),
        4,
    );
    let mut old = None;
    for folder in [&dir, &inside] {
        let parent = fs::read_dir(folder.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
        let prefix = format!("{}.before-", folder.display());
        let aside = parent.filter(|path| path.to_str().unwrap().starts_with(&prefix)).collect::<Vec<_>>();
        let [aside] = &aside[..] else { panic!("{aside:?}") };
        assert!(said.contains(&format!("{} is {} now", folder.display(), aside.display())), "{said}");
        old.get_or_insert(aside.clone());
    }
    // It is whole there, and the restore goes on beside it.
    fs::write(&object, sound).unwrap();
    over(&stage, &dir, &["--latest"]);
    is_whole(&server, &dir);
    let old = old.unwrap();
    let old_server = PgServer::from_data_dir(&old).setting("archive_mode", "off").start();
    assert_eq!(old_server.psql("SELECT count(*) FROM there"), "1000");
    drop(old_server);
    fs::remove_dir_all(&old).unwrap();
}

#[test]
fn what_belongs_to_others_is_found_before_anything_is_changed() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    stage.backup(&server);
    let file = server.psql("SELECT pg_relation_filepath('t')");
    server.archive_now();
    server.stop(StopMode::Fast);
    let dir = server.data_dir().to_owned();
    let restore = |dir: &Path| {
        let mut command = stage.pitr_as_user(&["restore", "--immediate", "--delta", "--yes", "-D"]);
        command.arg(dir);
        command
    };
    let wal = segments(&dir.join("pg_wal"));
    let pg_xact = dir.join("pg_xact");
    for (path, mode) in [(dir.join(&file), 0o400), (pg_xact, 0o500), (dir.join("PG_VERSION"), 0o000)] {
        let before = fs::metadata(&path).unwrap().permissions();
        let owner = nix::unistd::geteuid();
        match owner.is_root() {
            // As a restore by root would have left it.
            true => std::os::unix::fs::chown(&path, Some(4711), None).unwrap(),
            false => fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap(),
        }
        let said = stage.fails(&mut restore(&dir), 1);
        let expected = format!("cannot change {}", path.display());
        for words in [&*expected, "nothing was written", "chown -R"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert!(dir.join("global/pg_control").exists() && !dir.join(MARKER).exists(), "{said}");
        assert_eq!(segments(&dir.join("pg_wal")), wal);
        std::os::unix::fs::chown(&path, Some(owner.as_raw()), None).unwrap();
        fs::set_permissions(&path, before).unwrap();
    }
    // A folder above that nobody may write to.
    let closed = stage.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    let said = stage.fails(&mut restore(&closed.join("data")), 1);
    assert!(said.contains("cannot be made") && said.contains("nothing was written"), "{said}");
    // One that cannot be listed: whether WAL was set aside there is not known, and that is said.
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o300)).unwrap();
    let mut dry = stage.pitr_as_user(&["restore", "--latest", "--dry-run", "-D"]);
    let said = stage.ok(dry.arg(closed.join("data")));
    assert!(said.contains("whether there is more WAL than the archive has is not known"), "{said}");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    stage.ok(&mut restore(&dir));
    is_whole(&server, &dir);
}

#[test]
fn two_restores_do_not_meet_in_one_folder() {
    let stage = Stage::folder("main");
    let server = production(&stage, primary_major());
    server.psql("CREATE TABLE more AS SELECT g, md5(g::text) AS t FROM generate_series(1, 300000) g");
    stage.backup(&server);
    server.archive_now();
    let dir = stage.path().join("restored");
    let mut command = stage.pitr(&["restore", "--latest", "-D"]);
    command.arg(&dir).stdout(Stdio::null()).stderr(Stdio::null());
    let mut first = process::spawn(command).unwrap();
    wait::until("the restore has begun", || dir.join(MARKER).exists());
    process::signal(first.id(), Signal::SIGSTOP);
    let mut command = stage.pitr(&["restore", "--latest", "--delta", "--yes", "-D"]);
    let said = stage.fails(command.arg(&dir), 2);
    assert!(said.contains("another restore is at work"), "{said}");
    process::signal(first.id(), Signal::SIGCONT);
    assert!(first.wait().unwrap().success());
    is_whole(&server, &dir);
}

#[test]
fn a_copy_that_leads_to_the_originals_folders_is_refused() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    let space = TempDir::new().unwrap();
    let inside = space.path().join("inside");
    fs::create_dir(&inside).unwrap();
    server.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", inside.display()));
    server.psql("CREATE TABLE there TABLESPACE fast AS SELECT g FROM generate_series(1, 1000) g");
    stage.backup(&server);
    server.psql("INSERT INTO there VALUES (-1); CHECKPOINT");
    server.archive_now();
    // Copied as cp -a does it: links stay links.
    let copy = stage.path().join("copy");
    process::copy_tree(server.data_dir(), &copy);
    fs::remove_file(copy.join("postmaster.pid")).unwrap();
    let options = fs::read_to_string(copy.join("postmaster.opts")).unwrap();
    assert!(options.contains(server.data_dir().to_str().unwrap()), "{options}");
    let restore = |existing: &str| {
        let mut command = stage.pitr(&["restore", "--latest", "--leave-surviving", "--yes", existing, "-D"]);
        command.arg(&copy);
        command
    };
    let refused = |existing: &str, expected: &[&str]| {
        let said = stage.fails(&mut restore(existing), 2);
        let original = server.data_dir().to_str().unwrap().to_owned();
        for words in expected.iter().chain(&["nothing was written", "--tablespace-mapping", &original]) {
            assert!(said.contains(words), "{words}: {said}");
        }
    };
    let running = format!("on which a server runs (process {})", server.pid());
    for existing in ["--delta", "--set-aside"] {
        refused(existing, &[&running]);
    }
    // Nothing but the server itself tells, where the copy does not know from where it is.
    fs::remove_file(copy.join("postmaster.opts")).unwrap();
    refused("--delta", &[&running]);
    assert_eq!(server.psql("SELECT count(*) FROM there"), "1001");
    fs::write(copy.join("postmaster.opts"), options).unwrap();
    // The original is down, and its data is as dear as before.
    server.stop(StopMode::Fast);
    let said = stage.fails(&mut restore("--delta"), 2);
    assert!(said.contains("also that of the data directory") && !said.contains("a server runs"), "{said}");
    server.start();
    assert_eq!(server.psql("SELECT count(*) FROM there"), "1001");
    // With folders of its own the copy is gone over, and the original knows nothing of it.
    let mapping = format!("{}={}", inside.display(), stage.path().join("own").display());
    stage.ok(restore("--delta").args(["--tablespace-mapping", &mapping]));
    let restored = stage.recovering(&copy).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*) FROM there"), "1001");
    restored.psql("DELETE FROM there; CHECKPOINT");
    assert_eq!(server.psql("SELECT count(*) FROM there"), "1001");
}
