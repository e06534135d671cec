//! docs/json.md says what the programs print: every key that is printed stands there, every key that stands
//! there is printed, but those that it says are there sometimes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;

use crate::start::Place;

/// The keys of one section of the page, and those of them that are there sometimes.
fn documented(section: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/json.md");
    let page = fs::read_to_string(page).unwrap();
    let text = page.split(&format!("\n## `{section}`\n")).nth(1).expect("the page has the section");
    let text = text.split("\n## ").next().unwrap();
    let (mut all, mut sometimes) = (BTreeSet::new(), BTreeSet::new());
    for row in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let keys = cells[0].split('`').skip(1).step_by(2).map(str::to_owned);
        for key in keys {
            if cells.last().unwrap().contains("*sometimes*") {
                sometimes.insert(key.clone());
            }
            assert!(all.insert(key.clone()), "{key} stands there twice");
        }
    }
    (all, sometimes)
}

/// Every key with the way to it. Of what the page describes elsewhere only the key itself.
fn keys(value: &Value, way: &str, elsewhere: &[&str], found: &mut BTreeSet<String>) {
    if elsewhere.contains(&way) {
        return;
    }
    match value {
        Value::Array(values) => {
            found.insert(format!("{way}[]"));
            values.iter().for_each(|value| keys(value, &format!("{way}[]"), elsewhere, found));
        }
        Value::Object(fields) => {
            for (name, value) in fields {
                let way = if way.is_empty() { name.clone() } else { format!("{way}.{name}") };
                if !value.is_array() {
                    found.insert(way.clone());
                }
                keys(value, &way, elsewhere, found);
            }
        }
        _ => {}
    }
}

#[test]
fn the_page_about_json_says_what_is_printed() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major()).wal_segment_size_mb(1)).start();
    stage.init(&server);
    server.psql("create table t (n int); create table victim (n int)");
    stage.backup(&server);
    server.psql("insert into t values (1); drop table victim");
    server.psql("select pg_create_restore_point('here')");
    let segment = server.archive_now();
    // The next one is given up although it is still to come.
    let next = format!("{:024X}", u128::from_str_radix(&segment, 16).unwrap() + 1);
    stage.ok(&mut stage.walship(&["wal", "give-up", &next, "--reason", "for the page", "--yes"]));
    server.psql("insert into t values (2)");
    let mut info = stage.pitr(&["info", "--server", "--json"]);
    info.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
    info.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
    let printed: Value = serde_json::from_str(&stage.ok(&mut info)).unwrap();
    assert_eq!(printed["server"]["problem"], Value::Null, "{}", printed["server"]);
    assert!(
        printed["server"]["behind_bytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{}",
        printed["server"]
    );

    compare("pitr info", &[printed], &["timelines[].windows[].gap", "timelines[].gaps[].ledger[]"]);

    let plan = |words: &[&str]| -> Value {
        let mut plan = stage.pitr(&["plan", "--json"]);
        serde_json::from_slice(&stage.run(plan.args(words)).stdout).unwrap()
    };
    let answers = [plan(&["--to-name", "here"]), plan(&["--latest"]), plan(&["--to-name", "nowhere"])];
    let outcomes: Vec<_> = answers.iter().map(|answer| answer["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["plan", "refused", "refused"]);
    let elsewhere = [
        "plan.backup",
        "plan.limits",
        "plan.stop.record",
        "plan.first_excluded",
        "plan.gap_behind",
        "refusal.gap",
        "plan.open_prepared[]",
        "plan.tablespace_paths[]",
    ];
    compare("pitr plan", &answers, &elsewhere);

    let restore = |words: &[&str]| -> Value {
        let data_dir = stage.path().join("restored");
        let mut restore = stage.pitr(&["restore", "--json", "-D", data_dir.to_str().unwrap()]);
        serde_json::from_slice(&stage.run(restore.args(words)).stdout).unwrap()
    };
    let place = Place::new(&stage, "started", primary_major());
    let start = |words: &[&str]| -> Value {
        let mut start = place.restore(&stage, &["--to-name", "here", "--json"]);
        serde_json::from_slice(&stage.run(start.args(words)).stdout).unwrap()
    };
    let other = Place::new(&stage, "other", primary_major());
    let mut failing = other.restore(&stage, &["--to-name", "here", "--json", "--set", "no_such_setting=1"]);
    let answers = [
        restore(&["--latest"]),
        restore(&["--to-name", "here", "--dry-run"]),
        restore(&["--to-name", "here"]),
        start(&[]),
        serde_json::from_slice(&stage.run(&mut failing).stdout).unwrap(),
    ];
    let outcomes: Vec<_> = answers.iter().map(|answer| answer["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["refused", "would_restore", "restored", "started", "start_failed"]);
    compare("pitr restore", &answers, &["plan", "refusal", "report.tablespaces"]);

    let checks = stage.path().join("checks");
    fs::create_dir(&checks).unwrap();
    fs::write(checks.join("good.sql"), "select true").unwrap();
    let drill = |words: &[&str]| -> Value {
        let mut drill = stage.pitr_as_user(&["drill", "--to-name", "here", "--json", "--scratch"]);
        drill.arg(stage.path().join("scratch")).arg("--checks").arg(&checks).args(words);
        serde_json::from_slice(&stage.run(drill.args(["--reason", "for the page"])).stdout).unwrap()
    };
    let answers = [drill(&[]), drill(&["--set", "no_such_setting=1"])];
    let outcomes: Vec<_> = answers.iter().map(|answer| answer["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["proven", "failed"], "{answers:#?}");
    compare("pitr drill", &answers, &[]);
    let extract = |words: &[&str]| -> Value {
        let mut extract = stage.pitr_as_user(&["extract", "--table", "t", "--to-name", "here", "--json"]);
        let output = stage.run(extract.arg("--scratch").arg(stage.path().join("scratch")).args(words));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    };
    let into = format!("host={} port={} dbname=postgres", server.socket_dir().display(), server.port());
    let answers =
        [extract(&["--output", stage.path().join("t.sql").to_str().unwrap()]), extract(&["--into", &into])];
    compare("pitr extract", &answers, &[]);
    let history: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["history", "--json"]))).unwrap();
    let kinds: Vec<_> =
        history["entries"].as_array().unwrap().iter().map(|one| one["kind"].clone()).collect();
    assert_eq!(
        kinds,
        [
            "extract", "extract", "drill", "drill", "restore", "restore", "restore", "restore", "change",
            "change", "backup", "change"
        ]
    );
    compare("pitr history", &[history], &[]);

    let log: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["log", "--json"]))).unwrap();
    let lines = log["lines"].as_array().unwrap();
    assert!(lines.iter().any(|line| line["relations"][0]["name"] == "victim"), "{log:#}");
    compare("pitr log", &[log], &["lines[].known_by", "lines[].ledger[]"]);
}

/// Compares what was printed with a section of the page. What the page describes in another place is looked
/// into no further.
pub(crate) fn compare(section: &str, printed: &[Value], elsewhere: &[&str]) {
    let mut found = BTreeSet::new();
    printed.iter().for_each(|value| keys(value, "", elsewhere, &mut found));
    let (all, sometimes) = documented(section);
    // An array is told by its elements' keys, where these are objects.
    let told =
        |key: &String| all.contains(key) || all.iter().any(|other| other.starts_with(&format!("{key}.")));
    let untold: Vec<_> = found.iter().filter(|key| !told(key)).collect();
    assert!(untold.is_empty(), "{section}: printed and not on the page: {untold:?}");
    let unprinted: Vec<_> =
        all.iter().filter(|key| !found.contains(*key) && !sometimes.contains(*key)).collect();
    assert!(unprinted.is_empty(), "{section}: on the page and not printed: {unprinted:?}");
}

#[test]
fn a_wrong_or_dead_server_is_said_and_the_archive_shown() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major()).wal_segment_size_mb(1)).start();
    stage.init(&server);
    stage.backup(&server);
    let other = PgServer::builder(primary_major()).start();
    let ask = |server: &PgServer| {
        let mut info = stage.pitr(&["info", "--server", "--json"]);
        info.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        info.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        let printed: Value = serde_json::from_str(&stage.ok(&mut info)).unwrap();
        assert_eq!(printed["backups"].as_array().unwrap().len(), 1);
        printed["server"].clone()
    };
    let right = ask(&server);
    assert_eq!((&right["problem"], &right["in_recovery"]), (&Value::Null, &Value::Bool(false)), "{right}");
    assert!(right["archiver"]["last_archived_wal"].is_string(), "{right}");
    let wrong = ask(&other);
    assert!(wrong["problem"].as_str().unwrap().contains("another cluster"), "{wrong}");
    assert_eq!(wrong["behind_bytes"], Value::Null);
    let mut other = other;
    other.stop(walship_tests::postgres::StopMode::Fast);
    let dead = ask(&other);
    assert!(dead["problem"].as_str().unwrap().contains("could not be asked"), "{dead}");
    assert_eq!(dead["behind_bytes"], Value::Null);
}
