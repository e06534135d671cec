//! What goes wrong in the life of a receiver.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::proxy::{Mode, Proxy};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;
use walship_tests::{process, wait};

use super::{Flush, Front, Reading, Receiving, server};

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

/// A store that answers nobody, or not at all, again and again: a commit waits for it, nothing else does, and the
/// server's stop least of all.
#[test]
fn an_outage_of_s3_holds_back_commits_that_wait_for_it_and_no_shutdown() {
    let weed = WeedServer::start();
    let store = Proxy::start(weed.address());
    let stage = Stage::s3("main", &store.endpoint())
        .configured("[limits]\nconnect_ms = 500\nrequest_ms = 500\ndeadline_ms = 1500\n");
    let mut server = server(primary_major(), 1).start();
    stage.init(&server);
    server.psql("CREATE TABLE t (round int)");
    let front = Front::of(&server);
    let mut receiving = Flush::Repository.receive(&stage, &front.conninfo());
    stage.backup(&server);
    server.psql("ALTER SYSTEM SET synchronous_standby_names = 'walship'");
    server.psql("SELECT pg_reload_conf()");
    server.wait_for("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", "1");
    let told = |server: &PgServer| lsn(&server.psql("SELECT flush_lsn FROM pg_stat_replication"));
    let commit = |server: &PgServer, round: usize| {
        let mut psql = server.tool("psql");
        psql.args(["-qXAt", "-c", &format!("INSERT INTO t VALUES ({round})")]).stdout(Stdio::null());
        let client = process::spawn(psql).unwrap();
        server.wait_for("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'", "1");
        client
    };
    let failures = |receiving: &Receiving| receiving.said().matches("not stored yet").count();
    for (round, outage) in [Mode::Refuse, Mode::BlackHole, Mode::ResetUploadAfter(50)].into_iter().enumerate()
    {
        wait::until("all is durable", || {
            told(&server) == lsn(&server.psql("SELECT pg_current_wal_flush_lsn()"))
        });
        store.set(outage);
        let (before, failed) = (told(&server), failures(&receiving));
        let mut client = commit(&server, round);
        wait::until("it was tried twice", || failures(&receiving) >= failed + 2);
        assert!(client.try_wait().unwrap().is_none(), "the commit returned in an outage ({outage:?})");
        assert_eq!(told(&server), before, "{outage:?}");
        store.set(Mode::Pass);
        let status = process::wait_within(&mut client, wait::PATIENCE);
        assert!(status.is_some_and(|status| status.success()), "{outage:?}: {status:?}");
    }

    store.set(Mode::BlackHole);
    let mut client = commit(&server, 7);
    let before = lsn(&server.psql("SELECT restart_lsn FROM pg_replication_slots"));
    let stopping = Instant::now();
    assert!(server.stop(StopMode::Fast).success());
    let held_up = stopping.elapsed();
    assert!(held_up < Duration::from_secs(5), "held up for {held_up:?}");
    let _ = process::wait_within(&mut client, wait::PATIENCE);
    server.start();
    let slot = "SELECT restart_lsn FROM pg_replication_slots";
    assert_eq!(lsn(&server.psql(slot)), before, "it was told that something is durable that is not");
    store.set(Mode::Pass);
    front.turn_to(&server);
    receiving.wait_durable(lsn(&server.psql("SELECT pg_current_wal_flush_lsn()")));
    assert!(receiving.terminate().success(), "{}", receiving.said());
    let data = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&data));
    let restored = stage.recovering(&data).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT string_agg(round::text, ' ' ORDER BY round) FROM t"), "0 1 2 7");
    walship_tests::note(&format!(
        "a server's fast stop during an outage of S3, commits waiting: {held_up:?}"
    ));
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
