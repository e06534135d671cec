//! SIGKILL of the agent at random moments, while a server archives and while one recovers: nobody notices.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::random::Random;
use walship_tests::{bins, process};

use super::{agents, stage};

/// How many kills each of the two tests wants.
fn kills() -> usize {
    if walship_tests::campaign() { 250 } else { 25 }
}

/// Kills the agents of a data directory, after a moment of up to so many milliseconds that may be anywhere in their
/// work; returns how many.
fn kill(data_dir: &std::path::Path, millis: usize, random: &mut Random) -> usize {
    std::thread::sleep(Duration::from_micros(random.below(1000 * millis) as u64));
    let found = agents(data_dir);
    found.iter().for_each(|agent| process::signal(*agent, Signal::SIGKILL));
    found.len()
}

#[test]
fn killed_while_a_server_archives_it_costs_nothing() {
    let stage = stage();
    let copies = stage.path().join("copies");
    fs::create_dir(&copies).unwrap();
    let command = format!("cp %p '{}/%f' && '{}' %p", copies.display(), bins::archive_cmd().display());
    let server = PgServer::builder(primary_major())
        .wal_segment_size_mb(1)
        .setting("archive_mode", "on")
        .setting("archive_command", command)
        .env("WALSHIP_CONFIG", stage.config())
        .start();
    stage.init(&server);
    server.psql("SELECT pg_stat_reset_shared('archiver'); CREATE TABLE t (a int, b text)");
    let (seed, mut killed, mut last) = (walship_tests::seed(), 0, String::new());
    let mut random = Random::new(seed);
    while killed < kills() {
        for _ in 0..1 + random.below(4) {
            server.psql("INSERT INTO t SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 300) i");
            last = server.switch_wal();
        }
        killed += kill(server.data_dir(), 40, &mut random);
    }
    server.wait_until_archived(&last);
    assert_eq!(server.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", server.log());
    let target = stage.path().join("fetched");
    let mut compared = 0;
    for entry in fs::read_dir(&copies).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.len() != 24 || name > last {
            continue;
        }
        stage.ok(&mut stage.walship(&["wal", "fetch", &name, target.to_str().unwrap()]));
        assert!(fs::read(&target).unwrap() == fs::read(entry.path()).unwrap(), "{name} differs");
        compared += 1;
    }
    assert!(compared > 20, "only {compared} segments");
    assert!(!server.log().contains("terminating any other active server processes"), "{}", server.log());
    walship_tests::note(&format!(
        "agent killed {killed} times while a server archived, seed {seed}: {compared} segments the same, no call failed"
    ));
}

#[test]
fn killed_while_a_server_recovers_it_ends_no_recovery() {
    let stage = stage();
    let mut server = stage.archiving(PgServer::builder(newer_major()).wal_segment_size_mb(1)).start();
    stage.init(&server);
    server.psql("CREATE TABLE t (a int, b text)");
    stage.backup(&server);
    let mut last = String::new();
    for number in 0..40 {
        server
            .psql(&format!("INSERT INTO t SELECT {number}, repeat('x', 1000) FROM generate_series(1, 100)"));
        last = server.switch_wal();
    }
    server.wait_until_archived(&last);
    let rows = server.psql("SELECT count(*), sum(a) FROM t");
    server.stop(StopMode::Fast);
    let (seed, mut killed, mut recoveries) = (walship_tests::seed(), 0, 0);
    let mut random = Random::new(seed);
    while killed < kills() {
        recoveries += 1;
        assert!(recoveries <= 4 * kills(), "only {killed} kills in {recoveries} recoveries");
        let data = stage.path().join(format!("restored-{recoveries}"));
        stage.ok(&mut stage.pitr(&["restore", "--latest", "-D", data.to_str().unwrap()]));
        let mut restored = stage.recovering(&data).prepare();
        restored.launch();
        while data.join("recovery.signal").exists() && restored.is_running() {
            killed += kill(&data, 150, &mut random);
        }
        restored.wait_until_ready().unwrap_or_else(|status| panic!("{status}:\n{}", restored.log()));
        restored.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(restored.psql("SELECT count(*), sum(a) FROM t"), rows, "{}", restored.log());
        drop(restored);
        agents(&data).into_iter().for_each(|agent| process::signal(agent, Signal::SIGKILL));
        fs::remove_dir_all(&data).unwrap();
    }
    walship_tests::note(&format!(
        "agent killed {killed} times in {recoveries} recoveries, seed {seed}: each came to the end of the archive"
    ));
}
