//! What restores took is on record, and what the next one will take is judged by that.

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::stage::Stage;

use crate::start::Place;

fn plan(stage: &Stage) -> Value {
    let text = stage.ok(&mut stage.pitr(&["plan", "--latest", "--json"]));
    serde_json::from_str::<Value>(&text).unwrap()["plan"].clone()
}

#[test]
fn the_next_restore_takes_about_as_long_as_was_said() {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    server.pgbench(&["-i", "-s", "5", "-q", "postgres"]);
    stage.backup(&server);
    server.psql(
        "UPDATE pgbench_accounts SET abalance = 1; CHECKPOINT; UPDATE pgbench_accounts SET abalance = 2",
    );
    server.archive_now();
    server.stop(StopMode::Fast);
    assert_eq!(plan(&stage)["forecast"], Value::Null);

    // The machine has other work at times: it has to be right once in three times.
    let mut said = Vec::new();
    for attempt in 0..4 {
        let forecast = plan(&stage)["forecast"].clone();
        let place = Place::new(&stage, &format!("restored-{attempt}"), server.major());
        let report = stage.ok(&mut place.restore(&stage, &["--latest", "--json"]));
        let report: Value = serde_json::from_str(&report).unwrap();
        let seconds = |name: &str| report["start"][name].as_f64().unwrap();
        let took = (seconds("restore_seconds") + seconds("replay_seconds")) * 1000.0;
        if attempt == 0 {
            assert_eq!(forecast, Value::Null);
            continue;
        }
        let millis = |name: &str| forecast[name].as_f64().unwrap();
        let ratio = (millis("restore_ms") + millis("replay_ms")) / took;
        said.push(format!("{forecast} took {took} ms"));
        if (0.5..=2.0).contains(&ratio) {
            let text = stage.ok(&mut stage.pitr(&["plan", "--latest"]));
            assert!(text.contains("Forecast") && text.contains("of WAL at"), "{text}");
            return;
        }
    }
    panic!("no forecast was right within a factor of two: {said:#?}");
}

#[test]
fn credentials_that_only_read_restore_without_a_record() {
    let stage = Stage::folder("main");
    let mut server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    stage.backup(&server);
    server.archive_now();
    server.stop(StopMode::Fast);
    // What stands in the way of the record stands for a store that refuses it.
    std::fs::write(stage.repository_dir().join("main/0001/history/restores"), "").unwrap();
    let restored = stage.run(stage.pitr(&["restore", "--latest", "-D"]).arg(stage.path().join("restored")));
    assert!(restored.status.success());
    let said = String::from_utf8_lossy(&restored.stderr).into_owned();
    assert!(said.contains("note: the restore is not in the history of"), "{said}");
}
