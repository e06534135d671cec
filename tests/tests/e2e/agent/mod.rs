//! The agent behind the two thin commands, on real servers. Every other test of them holds with one
//! and without: `WALSHIP_TEST_AGENT`.

mod kills;
mod life;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::process;
use walship_tests::stage::Stage;
use walship_tests::{bins, wait};

/// A stage whose thin commands may start agents.
fn stage() -> Stage {
    Stage::folder("main").with_agent("auto")
}

/// Returns the agents that work for a data directory.
fn agents(data_dir: &Path) -> Vec<u32> {
    let data_dir = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let is = |word: &[u8]| words.contains(&word);
        if is(b"agent") && is(data_dir.as_os_str().as_encoded_bytes()) {
            found.push(pid);
        }
    }
    found
}

fn the_agent(data_dir: &Path) -> u32 {
    wait::some("an agent is at work", || agents(data_dir).first().copied())
}

/// A server whose archiver waits until it is told to go on, with segments that wait.
fn server_with_waiting(stage: &Stage, major: u32, segments: usize) -> (PgServer, Vec<PathBuf>) {
    let gate = stage.path().join("gate");
    let command = format!("test -e '{}' && '{}' %p", gate.display(), bins::archive_cmd().display());
    let server = PgServer::builder(major)
        .wal_segment_size_mb(1)
        .setting("archive_mode", "on")
        .setting("archive_command", command)
        .env("WALSHIP_CONFIG", stage.config())
        .start();
    stage.init(&server);
    server.psql("CREATE TABLE t (a int, b text)");
    let mut waiting = Vec::new();
    for number in 0..segments {
        server.psql(&format!(
            "INSERT INTO t SELECT {number}, repeat(md5(i::text), 20) FROM generate_series(1, 500) i"
        ));
        waiting.push(server.data_dir().join("pg_wal").join(server.switch_wal()));
    }
    (server, waiting)
}

fn open_gate(stage: &Stage) {
    fs::write(stage.path().join("gate"), "").unwrap();
}

fn all_archived(server: &PgServer, waiting: &[PathBuf]) {
    server.wait_until_archived(waiting.last().unwrap().file_name().unwrap().to_str().unwrap());
}

/// Fetches every one of these files without an agent, and compares.
fn assert_stored(stage: &Stage, waiting: &[PathBuf]) {
    let target = stage.path().join("fetched");
    for path in waiting {
        let name = path.file_name().unwrap().to_str().unwrap();
        stage.ok(&mut stage.walship(&["wal", "fetch", name, target.to_str().unwrap()]));
        assert!(fs::read(&target).unwrap() == fs::read(path).unwrap(), "{name}");
    }
}

#[test]
fn waiting_segments_are_pushed_ahead_and_kills_of_the_agent_lose_nothing() {
    for major in majors() {
        let stage = stage();
        let (mut server, waiting) = server_with_waiting(&stage, major, 40);
        // What the archiver has done must still be there to be compared.
        let copies = stage.path().join("copies");
        fs::create_dir(&copies).unwrap();
        let copied: Vec<PathBuf> = waiting
            .iter()
            .map(|path| {
                let copy = copies.join(path.file_name().unwrap());
                fs::copy(path, &copy).unwrap();
                copy
            })
            .collect();
        open_gate(&stage);
        let mut killed = 0;
        let last = waiting.last().unwrap().file_name().unwrap().to_str().unwrap();
        wait::until("everything is archived", || {
            if killed < 5
                && let Some(agent) = agents(server.data_dir()).first()
            {
                process::signal(*agent, Signal::SIGKILL);
                killed += 1;
            }
            server.psql(&format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver")) == "t"
        });
        assert!(killed > 0, "an agent was at work");
        assert_stored(&stage, &copied);
        assert!(server.is_running(), "no backend was restarted");
        assert!(!server.log().contains("terminating any other active server processes"), "{}", server.log());
        assert_eq!(server.stop(StopMode::Fast).code(), Some(0));
    }
}

#[test]
fn what_waits_is_stored_before_it_is_asked_for() {
    let stage = stage();
    let (server, waiting) = server_with_waiting(&stage, primary_major(), 4);
    let repository = stage.repository_dir().join("main/0001/wal/00000001/00000000");
    let last = waiting.last().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let stored = repository.join(format!("{last}.wal"));
    // The archiver is held up; the first one is asked for by hand, again and again, and no other.
    let mut first = stage.command(&bins::archive_cmd());
    first.arg(&waiting[0]).current_dir(server.data_dir());
    wait::until("the last one is stored", || {
        stage.ok(&mut first);
        stored.exists()
    });
    assert_stored(&stage, &waiting);
}

#[test]
fn recovery_fetches_ahead_and_leaves_nothing_behind() {
    for major in majors() {
        let stage = stage();
        let (mut server, _) = server_with_waiting(&stage, major, 0);
        open_gate(&stage);
        stage.backup(&server);
        let mut last = String::new();
        for number in 0..30 {
            server.psql(&format!(
                "INSERT INTO t SELECT {number}, repeat('x', 1000) FROM generate_series(1, 100)"
            ));
            last = server.switch_wal();
        }
        server.wait_until_archived(&last);
        let rows = server.psql("SELECT count(*), sum(a) FROM t");
        server.stop(StopMode::Fast);

        let data = stage.path().join("restored");
        stage.ok(&mut stage.pitr(&["restore", "--latest", "-D", data.to_str().unwrap()]));
        let restored = stage.recovering(&data).start();
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT count(*), sum(a) FROM t"), rows);
        let log = restored.log();
        let fetched = log.matches("restored log file").count();
        assert!(fetched >= 30, "{fetched} files were fetched\n{log}");
        the_agent(&data);
        wait::until("the spool is gone after the recovery", || {
            !data.join("pgsql_tmp_walship_spool").exists()
        });
        drop(restored);
        fs::remove_dir_all(&data).unwrap();
        wait::until("the agent ends with its data directory", || agents(&data).is_empty());
    }
}

#[test]
fn a_hole_that_pushing_ahead_left_is_no_end_of_the_archive() {
    let stage = stage();
    let (mut server, waiting) = server_with_waiting(&stage, primary_major(), 5);
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let last = format!("main/0001/wal/00000001/00000000/{}.wal", name(&waiting[4]));
    // The first one is never asked for.
    let mut second = stage.command(&bins::archive_cmd());
    second.arg(&waiting[1]).current_dir(server.data_dir());
    wait::until("the last one is stored", || {
        stage.ok(&mut second);
        stage.repository_dir().join(&last).exists()
    });
    server.kill9();
    let data = stage.path().join("data");
    process::copy_tree(server.data_dir(), &data);
    fs::write(data.join("recovery.signal"), "").unwrap();
    let target = data.join("pg_wal/RECOVERYXLOG");
    let ask = |path: &Path| {
        let mut command = stage.command(&bins::restore_cmd());
        command.arg(name(path)).arg(&target).current_dir(&data).env("WALSHIP_RESTORE_RETRY_MS", "0");
        stage.run(&mut command)
    };
    // First the foreground's answer, then those of the agent that it starts.
    for round in 0..3 {
        let hole = ask(&waiting[0]);
        assert_eq!(hole.status.code(), Some(126), "{round}: {hole:?}");
        assert!(!target.exists());
        the_agent(&data);
    }
    for path in &waiting[1..] {
        let output = ask(path);
        assert!(output.status.success(), "{output:?}");
        assert!(fs::read(&target).unwrap() == fs::read(path).unwrap(), "{}", name(path));
    }
    assert_eq!(ask(&waiting[0]).status.code(), Some(126), "also after what lies behind it");
}

#[test]
fn another_file_of_the_same_name_is_read_again() {
    let stage = stage();
    let (server, waiting) = server_with_waiting(&stage, primary_major(), 3);
    open_gate(&stage);
    all_archived(&server, &waiting);
    the_agent(server.data_dir());
    // A snapshot that was put back, say: other bytes under a name that is known as durable.
    let copy = stage.path().join("saved");
    fs::copy(&waiting[1], &copy).unwrap();
    let mut bytes = fs::read(&copy).unwrap();
    let middle = bytes.len() / 4;
    bytes[middle..middle + 8].copy_from_slice(b"changed!");
    fs::write(&waiting[1], bytes).unwrap();
    let mut again = stage.command(&bins::archive_cmd());
    again.arg(&waiting[1]).current_dir(server.data_dir());
    let output = stage.run(&mut again);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is not a whole segment"), "read, not remembered: {said}");
    fs::copy(&copy, &waiting[1]).unwrap();
    let output = stage.run(&mut again);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_socket_in_a_folder_of_others_and_a_missing_agent_lead_to_the_foreground() {
    let stage = stage();
    let (server, waiting) = server_with_waiting(&stage, primary_major(), 2);
    let push = |variables: &[(&str, &str)], path: &Path| {
        let mut command: Command = stage.command(&bins::archive_cmd());
        command.arg(path).current_dir(server.data_dir()).envs(variables.iter().copied());
        stage.ok(&mut command);
    };
    // Nobody listens there, and nobody can be started there: the path is too long for a socket.
    push(&[("WALSHIP_AGENT_SOCKET", "/nowhere/at/all.sock")], &waiting[0]);
    let long = format!("/tmp/{}", "x".repeat(120));
    push(&[("TMPDIR", &long)], &waiting[1]);
    assert_stored(&stage, &waiting);
}
