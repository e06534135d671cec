//! SIGKILL of the receiver at random moments, under load that waits for it.

use std::fs;
use std::time::Duration;

use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::random::Random;
use walship_tests::stage::Stage;
use walship_tests::wait;

use super::clients::{Acknowledged, Clients, commits, lost};
use super::{Flush, Front, Reading, names, server};

/// Restores what the repository holds beside the running server, and looks for what must be there.
fn is_all_there(flush: Flush, stage: &Stage, number: usize, acknowledged: &[Acknowledged]) {
    flush.rescue(stage);
    let data = stage.path().join(format!("restored-{number}"));
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&data));
    let restored = stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(lost(&restored, acknowledged), "", "{}", restored.log());
    drop(restored);
    fs::remove_dir_all(&data).unwrap();
}

/// How many of the server's own copies in `kept`, from `first` on, are stored byte for byte.
fn compare(reading: &Reading, kept: &std::path::Path, first: &str) -> usize {
    let archived = names(kept);
    let segments: Vec<&String> =
        archived.iter().filter(|name| name.len() == 24 && name.as_str() > first).collect();
    for name in &segments {
        let stored = reading.file(name.parse().unwrap()).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(stored == fs::read(kept.join(name)).unwrap(), "{name} differs");
    }
    segments.len()
}

fn primary(kept: &std::path::Path) -> PgServer {
    server(primary_major(), 1)
        .setting("archive_mode", "on")
        .setting("archive_command", format!("cp %p '{}/%f'", kept.display()))
        .start()
}

#[test]
fn killed_at_any_moment_it_leaves_no_hole_no_wrong_byte_and_loses_nothing() {
    killed(Flush::Repository);
}

#[test]
fn killed_at_any_moment_with_a_spool_it_leaves_no_hole_no_wrong_byte_and_loses_nothing() {
    killed(Flush::Local);
}

fn killed(flush: Flush) {
    let rounds = if walship_tests::campaign() { 300 } else { 30 };
    let seed = walship_tests::seed();
    let mut random = Random::new(seed);
    let stage = Stage::folder("main");
    let kept = tempfile::tempdir().unwrap();
    let server = primary(kept.path());
    stage.init(&server);
    Clients::table(&server);
    let front = Front::of(&server);
    // The first one makes the slot: from here on nothing may be missing.
    let first = server.switch_wal();
    let mut receiving = flush.receive(&stage, &front.conninfo());
    stage.backup(&server);
    server.psql("ALTER SYSTEM SET synchronous_standby_names = 'walship'");
    server.psql("SELECT pg_reload_conf()");

    let notes = tempfile::tempdir().unwrap();
    let (mut acknowledged, mut restores) = (Vec::new(), 0);
    let mut clients = Clients::start(&server, notes.path(), 0);
    for round in 0..rounds {
        if random.chance(0.5) {
            // Else it is killed anywhere in its beginning.
            wait::until("it streams", || receiving.said().contains("receiving timeline"));
        }
        std::thread::sleep(Duration::from_millis(random.below(500) as u64));
        if random.chance(0.3) {
            server.switch_wal();
        }
        receiving.kill9();
        if random.chance(0.1) {
            restores += 1;
            let known = [acknowledged.clone(), clients.so_far()].concat();
            is_all_there(flush, &stage, round, &known);
        }
        receiving = flush.receive(&stage, &front.conninfo());
        if round % 20 == 19 {
            // New sessions before the old ones have run out of work.
            acknowledged.extend(clients.so_far());
            clients = Clients::start(&server, notes.path(), round);
        }
    }
    acknowledged.extend(clients.so_far());
    drop(clients);
    let last = server.switch_wal();
    let reading = Reading::of(&stage);
    wait::until("the last segment is stored", || reading.has(&last));
    assert!(receiving.terminate().success(), "{}", receiving.said());
    server.wait_until_archived(&last);
    let compared = compare(&reading, kept.path(), &first);
    assert!(compared >= 3, "only {compared} segments");
    is_all_there(flush, &stage, rounds, &acknowledged);
    assert!(commits(&acknowledged) > rounds as u64, "{acknowledged:?}");
    walship_tests::note(&format!(
        "receive, {flush:?}, killed {rounds} times, seed {seed}: {compared} segments whole and the same as the server's own, {} \
         acknowledged commits found in {} restores",
        commits(&acknowledged),
        restores + 1
    ));
}
