//! Everybody at once into one repository: the primary's `archive_command`, that of a standby with
//! `archive_mode = always`, and two receivers whose parts are cut elsewhere.

use std::fs;

use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship_tests::postgres::{PgServer, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::wait;
use walship_tests::weed::WeedServer;

use super::{Front, Receiving, server, standby_of};

/// Returns a stored WAL file as a server would get it; `None` when it is not there.
fn fetched(stage: &Stage, name: &str) -> Option<Vec<u8>> {
    let path = stage.path().join(format!("fetched-{name}"));
    let output = stage.run(stage.walship(&["wal", "fetch", name]).arg(&path));
    match output.status.code() {
        Some(0) => {}
        Some(1) => return None,
        _ => panic!("{name}: {output:?}"),
    }
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    Some(bytes)
}

fn everybody_stores_the_same(stage: &Stage, major: u32) {
    // All of its WAL stays where it is: what is stored is compared with that.
    let primary = stage.archiving(server(major, 1)).setting("wal_keep_size", "1GB").start();
    stage.init(&primary);
    let first = primary.switch_wal();
    stage.backup(&primary);
    let (_folder, data) = standby_of(&primary);
    let standby = stage
        .recovering(&data)
        .setting("primary_conninfo", format!("host=127.0.0.1 port={} user=postgres", primary.port()))
        .setting("archive_mode", "always")
        .start();
    let front = Front::of(&primary);
    let mut receivers = [("walship", "10"), ("walship_b", "70")].map(|(slot, interval)| {
        Receiving::start(stage, &front.conninfo(), &["--slot", slot, "--tail-interval", interval])
    });
    primary.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "3");
    primary.pgbench(&["-i", "-q", "-s", "1"]);
    let mut last = String::new();
    for _ in 0..6 {
        primary.pgbench(&["-n", "-c", "4", "-t", "60"]);
        last = primary.switch_wal();
    }
    primary.wait_until_archived(&last);
    standby.wait_until_archived(&last);

    // The open segment: parts of both, until one of them dies in the middle.
    primary.pgbench(&["-n", "-c", "2", "-t", "20"]);
    let half: Lsn = primary.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    receivers[0].wait_durable(half);
    receivers[0].kill9();
    primary.pgbench(&["-n", "-c", "2", "-t", "20"]);
    let end: Lsn = primary.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    receivers[1].wait_durable(end);
    for receiving in &mut receivers {
        for word in ["warning: ", "conflict", "error: "] {
            assert!(!receiving.said().contains(word), "{}", receiving.said());
        }
    }
    assert!(receivers[1].terminate().success(), "{}", receivers[1].said());
    for server in [&primary, &standby] {
        assert_eq!(server.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", server.log());
    }

    let size = SegmentSize::MIN;
    let open = SegmentName::containing(TimelineId::FIRST, end, size);
    let begin = first.parse::<SegmentName>().unwrap().number(size);
    let own = |name: SegmentName| fs::read(primary.data_dir().join("pg_wal").join(name.to_string())).unwrap();
    let mut compared = 0;
    for number in begin..open.number(size) {
        let name = SegmentName::from_number(TimelineId::FIRST, number, size).unwrap();
        let stored = fetched(stage, &name.to_string()).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(stored == own(name), "{name} differs");
        compared += 1;
    }
    assert!(compared >= 20, "{compared}");
    let valid = usize::try_from(end.0 % size.bytes()).unwrap();
    let assembled = fetched(stage, &open.to_string()).expect("the tail joins");
    assert!(assembled[..valid] == own(open)[..valid], "the tail differs");

    let restored = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&restored));
    let restored = stage.recovering(&restored).start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(count(&restored), count(&primary));
    walship_tests::note(&format!(
        "two receivers, archive_command and a standby's with archive_mode = always, PostgreSQL {major}, {}: {compared} \
         segments the same as the server's own",
        stage.url()
    ));
}

fn count(server: &PgServer) -> String {
    server.psql("SELECT count(*), sum(delta) FROM pgbench_history")
}

#[test]
fn everybody_stores_the_same_in_a_folder() {
    everybody_stores_the_same(&Stage::folder("main"), primary_major());
}

#[test]
fn everybody_stores_the_same_on_s3() {
    let weed = WeedServer::start();
    everybody_stores_the_same(&Stage::s3("main", &weed.endpoint()), newer_major());
}

#[test]
fn a_receiver_goes_on_behind_what_archive_command_has_stored() {
    let stage = Stage::folder("main");
    let primary = stage.archiving(server(primary_major(), 1)).start();
    stage.init(&primary);
    let front = Front::of(&primary);
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--once"]);
    assert!(receiving.wait().success(), "{}", receiving.said());
    // What it would have sent next is there already, and more than that.
    primary.pgbench(&["-i", "-q", "-s", "1"]);
    let last = primary.archive_now();
    primary.wait_until_archived(&last);
    primary.psql("CREATE TABLE t AS SELECT 7 AS a");
    let mut receiving = Receiving::start(&stage, &front.conninfo(), &["--once"]);
    assert!(receiving.wait().success(), "{}", receiving.said());
    let end: Lsn = primary.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    wait::until("it says so", || receiving.position("durable_lsn") >= end);
    let begun = format!("from {} on", Lsn(end.0 / (1 << 20) * (1 << 20)));
    assert!(receiving.said().contains(&begun), "it began elsewhere than {begun}: {}", receiving.said());
}
