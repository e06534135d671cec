//! What goes wrong in the life of a receiver.

use std::fs;
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship_tests::postgres::{StopMode, primary_major};
use walship_tests::stage::Stage;
use walship_tests::wait;

use super::{Front, Reading, Receiving, server};

fn lsn(text: &str) -> Lsn {
    text.parse().unwrap()
}

#[test]
fn another_cluster_behind_the_address_is_refused() {
    let stage = Stage::folder("main");
    let own = server(primary_major(), 1).start();
    stage.init(&own);
    let stranger = server(primary_major(), 1).start();
    let front = Front::of(&stranger);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &[]);
    assert_eq!(receiving.wait().code(), Some(1));
    assert!(receiving.said().contains("has no lineage for system identifier"), "{}", receiving.said());

    // Also when it comes later.
    front.turn_to(&own);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &[]);
    own.wait_for("SELECT count(*) FROM pg_stat_replication", "1");
    front.turn_to(&stranger);
    own.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
    assert_eq!(receiving.wait().code(), Some(1));
    assert!(receiving.said().contains("has system identifier"), "{}", receiving.said());
}

#[test]
fn an_outage_of_the_store_is_waited_for_and_a_shutdown_is_not_held_up_by_it() {
    let stage = Stage::folder("main").configured("[limits]\ndeadline_ms = 500\n");
    let mut server = server(primary_major(), 1).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--uploads-max", "2"]);
    server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    let (repository, away) = (stage.repository_dir(), stage.path().join("away"));
    fs::rename(&repository, &away).unwrap();
    let mut last = String::new();
    for _ in 0..5 {
        last = server.switch_wal();
    }
    let told = lsn(&server.psql("SELECT restart_lsn FROM pg_replication_slots"));
    wait::until("the outage is noticed", || receiving.said().contains("not stored yet"));
    let stopping = Instant::now();
    assert!(server.stop(StopMode::Fast).success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "held up for {:?}", stopping.elapsed());
    server.start();
    let kept = lsn(&server.psql("SELECT restart_lsn FROM pg_replication_slots"));
    assert_eq!(kept, told, "nothing was acknowledged");
    front.turn_to(&server);
    fs::rename(&away, &repository).unwrap();
    let reading = Reading::of(&stage);
    wait::until("the last segment is stored", || reading.has(&last));
    receiving.wait_durable(Lsn(told.0 + (5 << 20)));
    assert!(receiving.terminate().success(), "{}", receiving.said());
}

#[test]
fn two_receivers_and_archive_command_store_the_same() {
    let stage = Stage::folder("main");
    let server = stage.archiving(server(primary_major(), 1)).start();
    stage.init(&server);
    let front = Front::of(&server);
    let mut first = Receiving::start(&stage, &front.conninfo(), &[]);
    let mut second = Receiving::start(&stage, &front.conninfo(), &["--slot", "walship_b"]);
    server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "2");
    server.pgbench(&["-i", "-q", "-s", "1"]);
    server.pgbench(&["-n", "-c", "2", "-t", "300"]);
    server.archive_now();
    let end = lsn(&server.psql("SELECT pg_current_wal_lsn()"));
    let closed = Lsn(end.0 >> 20 << 20);
    first.wait_durable(closed);
    second.wait_durable(closed);
    for receiving in [&mut first, &mut second] {
        assert!(receiving.terminate().success(), "{}", receiving.said());
        assert!(!receiving.said().contains("warning: "), "{}", receiving.said());
    }
    let failed = server.psql("SELECT failed_count FROM pg_stat_archiver");
    assert_eq!(failed, "0");
}
