//! WAL that no restore gets to, and transactions that would be lost although numbers say otherwise.

use std::fs;
use std::process::Command;

use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::Serving;
use super::metrics::archived;
use crate::pitr::find;

fn problem(kind: &str, severity: &str) -> (String, String) {
    (kind.to_owned(), severity.to_owned())
}

#[test]
fn a_timeline_of_which_nothing_is_archived_is_told() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = archived(&stage, major);
        server.psql("ALTER SYSTEM SET archive_mode = 'off'");
        server.stop(StopMode::Fast);
        fs::write(server.data_dir().join("standby.signal"), "").unwrap();
        server.start();
        server.promote();
        let serving = Serving::start(&stage, Some(&server));
        let metrics = serving.fresh();
        assert_eq!(metrics.one("walship_server_timeline", &[]), 2.0);
        assert!(metrics.problems().contains(&problem("wal_not_arriving", "critical")), "{metrics:#?}");
    }
}

#[test]
fn a_hole_is_told_until_it_is_known_and_a_backup_lies_behind_it() {
    let stage = Stage::folder("main");
    let server = archived(&stage, primary_major());
    let mut stored = Vec::new();
    for n in 1..=4 {
        server.psql(&format!("INSERT INTO t VALUES ({n})"));
        stored.push(server.archive_now());
    }
    let serving = Serving::start(&stage, Some(&server));
    let before = serving.fresh();
    assert_eq!(before.problems(), [], "{before:#?}");
    let end = before.one("walship_wal_durable_lsn_bytes", &[]);

    fs::remove_file(find(&stage.repository_dir(), &format!("{}.wal", stored[1])).unwrap()).unwrap();
    let holed = serving.wait("the hole is told", |metrics| metrics.one("walship_wal_gaps", &[]) == 1.0);
    assert_eq!(holed.one("walship_wal_gaps_without_backup", &[]), 1.0);
    assert!(holed.problems().contains(&problem("wal_gap", "critical")), "{holed:#?}");
    // No restore gets behind it: what is stored there is as good as lost.
    assert_eq!(holed.one("walship_wal_durable_lsn_bytes", &[]), end - f64::from(3 << 20));
    assert!(holed.one("walship_wal_behind_segments", &[]) >= 3.0);
    assert!(holed.one("walship_rpo_seconds", &[]) > 0.0);

    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    server.archive_now();
    let behind = serving.wait("the backup behind it is seen", |metrics| {
        metrics.one("walship_wal_gaps_without_backup", &[]) == 0.0
    });
    assert_eq!(behind.problems(), [problem("wal_gap", "warning")], "{behind:#?}");

    let mut give_up =
        stage.walship(&["wal", "give-up", &stored[1], "--reason", "removed by a test", "--yes"]);
    stage.ok(&mut give_up);
    serving.wait("nothing is wrong any more", |metrics| metrics.problems().is_empty());
}

#[test]
fn a_hole_on_a_timeline_that_was_left_is_told_until_it_is_known() {
    let stage = Stage::folder("main");
    let mut old = archived(&stage, primary_major());
    old.stop(StopMode::Fast);
    let copy = stage.path().join("copy");
    process::run_ok(Command::new("cp").arg("-a").args([old.data_dir(), &copy]));
    // The old server writes on; the new one leaves its timeline before that.
    old.start();
    let insert = |server: &PgServer, n: u32| {
        server.psql(&format!("INSERT INTO t VALUES ({n})"));
        server.archive_now()
    };
    let stored: Vec<_> = (1..=3).map(|n| insert(&old, n)).collect();
    old.stop(StopMode::Fast);
    fs::write(copy.join("standby.signal"), "").unwrap();
    let new = stage.archiving(PgServer::from_data_dir(&copy)).start();
    new.promote();
    insert(&new, 5);
    let serving = Serving::start(&stage, Some(&new));
    let before = serving.fresh();
    assert_eq!(before.one("walship_server_timeline", &[]), 2.0);
    assert_eq!(before.problems(), [], "{before:#?}");

    // What the index has of a timeline that was left tells of what was there once. It is made beside pushes,
    // where there is time for it.
    let index = stage.repository_dir().join("main/0001/index");
    if index.exists() {
        fs::remove_dir_all(index).unwrap();
    }
    fs::remove_file(find(&stage.repository_dir(), &format!("{}.wal", stored[1])).unwrap()).unwrap();
    let holed = serving.wait("the hole is told", |metrics| metrics.has_problem("wal_gap"));
    assert_eq!(holed.problems(), [problem("wal_gap", "warning")], "{holed:#?}");
    assert_eq!(holed.one("walship_wal_gaps", &[]), 1.0);
    assert_eq!(holed.one("walship_wal_gaps_without_backup", &[]), 0.0, "none can be taken there any more");
    let mut give_up =
        stage.walship(&["wal", "give-up", &stored[1], "--reason", "removed by a test", "--yes"]);
    stage.ok(&mut give_up);
    serving.wait("nothing is wrong any more", |metrics| metrics.problems().is_empty());
}

#[test]
fn an_end_behind_minimal_wal_is_told_until_there_is_a_backup() {
    let stage = Stage::folder("main");
    let mut server = archived(&stage, primary_major());
    for (level, senders, archiving) in [("minimal", "0", "off"), ("replica", "10", "on")] {
        for (name, value) in [("wal_level", level), ("max_wal_senders", senders), ("archive_mode", archiving)]
        {
            server.psql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        }
        server.restart();
    }
    server.psql("INSERT INTO t VALUES (1)");
    server.archive_now();
    let serving = Serving::start(&stage, Some(&server));
    let cut = serving.fresh();
    assert!(cut.problems().contains(&problem("window_ended", "critical")), "{cut:#?}");
    stage.ok(&mut stage.walship_on(&server, &["backup", "--source", "local"]));
    server.archive_now();
    serving.wait("nothing is wrong any more", |metrics| metrics.problems().is_empty());
}

#[test]
fn what_would_be_lost_is_told_in_spite_of_the_numbers_of_transactions() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = stage
            .archiving(PgServer::builder(major).wal_segment_size_mb(1))
            .setting("max_prepared_transactions", 5)
            .setting("autovacuum", "off")
            .start();
        stage.init(&server);
        stage.backup(&server);
        server.psql("CREATE TABLE t (n int)");
        // One that begins first, and ends last.
        server.psql("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'long'");
        server.psql("INSERT INTO t VALUES (2)");
        server.archive_now();
        let serving = Serving::start(&stage, Some(&server));
        let point = |what: &str, is_lost: bool| {
            wait::until(what, || (serving.fresh().one("walship_rpo_seconds", &[]) > 0.0) == is_lost);
        };
        point("all that has ended is there", false);
        server.psql("COMMIT PREPARED 'long'");
        let lost = serving.fresh();
        assert!(lost.one("walship_rpo_seconds", &[]) > 0.0, "it is nowhere but on the server: {lost:#?}");
        server.archive_now();
        point("it is there", false);

        // The numbers of savepoints come after that of their transaction, which is the one that ends.
        server.psql(
            "BEGIN; INSERT INTO t VALUES (3); SAVEPOINT s; INSERT INTO t VALUES (4); RELEASE s; COMMIT",
        );
        let lost = serving.fresh();
        assert!(lost.one("walship_rpo_seconds", &[]) > 0.0, "{lost:#?}");
        server.archive_now();
        // An idle server writes, too.
        server.psql("CHECKPOINT");
        point("nothing has ended since", false);
    }
}
