//! What restores took is on record, and what the next one will take is judged by that.

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::stage::Stage;

use crate::start::Place;

fn plan(stage: &Stage) -> Value {
    let text = stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"]));
    serde_json::from_str::<Value>(&text).unwrap()["plan"].clone()
}

/// A repository with a backup and all of its WAL; its server is stopped.
fn backed_up() -> Stage {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    stage
}

/// What a restore of a small cluster took tells what one of a cluster several times as large will.
#[test]
fn a_restore_of_another_size_takes_about_as_long_as_was_said() {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(primary_major()).setting("autovacuum", "off")).start();
    stage.init(&server);
    let major = server.major();
    let attempt = |name: &str| -> f64 {
        let place = Place::new(&stage, name, major);
        let report = stage.ok(&mut place.restore(&stage, &["--latest", "--json"]));
        let report: Value = serde_json::from_str(&report).unwrap();
        let seconds = |name: &str| report["start"][name].as_f64().unwrap();
        (seconds("restore_seconds") + seconds("replay_seconds")) * 1000.0
    };
    let grow = |server: &PgServer, scale: &str| {
        server.pgbench(&["-i", "-s", scale, "-q", "postgres"]);
        stage.backup(server);
        server.psql(
            "UPDATE pgbench_accounts SET abalance = 1; CHECKPOINT; UPDATE pgbench_accounts SET abalance = 2",
        );
        server.archive_now();
    };
    grow(&server, "3");
    assert_eq!(plan(&stage)["forecast"], Value::Null);
    let small = plan(&stage)["backup"]["data_bytes"].as_u64().unwrap();
    for round in 0..3 {
        attempt(&format!("small-{round}"));
    }
    grow(&server, "10");
    server.stop(StopMode::Fast);
    let large = plan(&stage)["backup"]["data_bytes"].as_u64().unwrap();
    assert!(large > 2 * small, "{large} {small}");
    // The machine has other work at times: it has to be right once in six times, always by the small ones alone.
    let forecast = plan(&stage)["forecast"].clone();
    assert_eq!(forecast["restores"], 3, "{forecast}");
    let text = stage.ok(&mut stage.pitr(&["plan", "--latest"]));
    assert!(text.contains("Forecast") && text.contains("of WAL at"), "{text}");
    let millis = |name: &str| forecast[name].as_f64().unwrap();
    let said = millis("restore_ms") + millis("replay_ms");
    let mut took = Vec::new();
    for round in 0..6 {
        took.push(attempt(&format!("large-{round}")));
        if (0.5..=2.0).contains(&(said / took[round])) {
            return;
        }
    }
    panic!("no forecast was right within a factor of two: {forecast}, {took:?}");
}

/// Restores that found their files in place, and those that failed, do not hide one that tells.
#[test]
fn a_restore_that_tells_is_found_behind_others_that_do_not() {
    let stage = backed_up();
    let dir = stage.path().join("restored");
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir));
    let first = plan(&stage)["forecast"].clone();
    assert_eq!(first["restores"], 1, "{first}");
    for _ in 0..4 {
        stage.ok(stage.pitr(&["restore", "--latest", "--delta", "--yes", "-D"]).arg(&dir));
        stage.fails(stage.pitr(&["restore", "--latest", "-D"]).arg(&dir), 2);
    }
    assert_eq!(plan(&stage)["forecast"], first);
}

#[test]
fn credentials_that_only_read_restore_without_a_record() {
    let stage = backed_up();
    // What stands in the way of the record stands for a store that refuses it.
    std::fs::write(stage.repository_dir().join("main/0001/history/restores"), "").unwrap();
    let restored = stage.run(stage.pitr(&["restore", "--latest", "-D"]).arg(stage.path().join("restored")));
    assert!(restored.status.success());
    let said = String::from_utf8_lossy(&restored.stderr).into_owned();
    assert!(said.contains("note:  the restore is not in the history of"), "{said}");
}
