//! DROP DATABASE acts before it commits: a stop in between gives a broken copy. The plan says so and names the
//! target that does not.

use std::thread;

use serde_json::Value;
use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, newer_major, primary_major};
use walship_tests::stage::Stage;

#[test]
fn a_stop_inside_drop_database_is_told_with_the_target_before_it() {
    dropped(primary_major());
}

#[test]
fn a_stop_inside_drop_database_is_told_with_the_target_before_it_on_a_newer_major() {
    dropped(newer_major());
}

/// How many databases are dropped at most until a restore point lies between the mark of one and the removal of
/// its files: a checkpoint comes between them.
const DATABASES: usize = 20;

fn json(stage: &Stage, words: &[&str]) -> Value {
    serde_json::from_str(&stage.ok(&mut stage.pitr(words))).unwrap()
}

/// Returns the events of the log.
fn events(stage: &Stage, only: &str) -> Vec<Value> {
    let log = json(stage, &["log", "--json", "--only", only, "--limit", "100000"]);
    let lines = log["lines"].as_array().unwrap().iter();
    lines.filter(|line| line["line"] == "event").cloned().collect()
}

fn lsn(value: &Value) -> Lsn {
    value["lsn"].as_str().unwrap().parse().unwrap()
}

fn what(line: &Value, words: &str) -> bool {
    line["what"].as_str().unwrap().contains(words)
}

/// One drop: its records, and a restore point between the first two.
struct Drop {
    database: u64,
    mark: Value,
    files: Value,
    commit: Value,
    point: String,
}

/// Returns a drop into which a restore point fell.
fn interrupted(stage: &Stage) -> Option<Drop> {
    let (drops, points) = (events(stage, "drop"), events(stage, "restore-point"));
    drops.iter().filter(|line| what(line, "files of database")).find_map(|files| {
        let database = files["databases"][0]["oid"].as_u64().unwrap();
        let mark =
            drops.iter().find(|line| line["databases"][0]["oid"] == database && what(line, "marked invalid"));
        let mark = mark.unwrap_or_else(|| panic!("no mark of {database}: {drops:#?}"));
        let between = |point: &&Value| lsn(point) > lsn(mark) && lsn(point) < lsn(files);
        let point = points.iter().find(between)?;
        let name = point["what"].as_str().unwrap().split('"').nth(1).unwrap();
        let commits = json(stage, &["log", "--json", "--xid", &files["xid"].to_string()]);
        let mut commits = commits["lines"].as_array().unwrap().iter();
        let commit = commits
            .find(|line| line["kinds"].as_array().is_some_and(|kinds| kinds.contains(&"commit".into())));
        Some(Drop {
            database,
            mark: mark.clone(),
            files: files.clone(),
            commit: commit.unwrap_or_else(|| panic!("{files:#}")).clone(),
            point: name.to_owned(),
        })
    })
}

fn dropped(major: u32) {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(major)).setting("autovacuum", "off").start();
    stage.init(&server);
    server.psql("create database shop");
    server.psql_in("shop", "create table t as select generate_series(1, 1000) as x");
    stage.backup(&server);
    let mut found = None;
    for number in 0..DATABASES {
        let name = format!("shop{number}");
        server.psql(&format!("create database {name} template shop"));
        thread::scope(|scope| {
            let points = format!(
                "select pg_create_restore_point('p{number}-' || g), pg_sleep(0.001) from generate_series(1, 400) g"
            );
            let server = &server;
            scope.spawn(move || server.psql(&points));
            server.wait_for(
                "select count(*) from pg_stat_activity where query like '%generate_series(1, 400)%' and state = 'active' and pid <> pg_backend_pid()",
                "1",
            );
            server.psql(&format!("drop database {name}"));
        });
        server.archive_now();
        found = interrupted(&stage);
        if found.is_some() {
            break;
        }
    }
    let one = found.expect("a restore point falls into one of so many drops");
    server.psql("select pg_create_restore_point('after')");
    server.psql("create table later ()");
    server.archive_now();
    let text = |value: &Value, key: &str| value[key].as_str().unwrap().to_owned();

    // Every kind of target that can stop between: before the commit of the drop itself, at the record that
    // removes the files, at a restore point.
    let xid = one.files["xid"].to_string();
    let time = text(&one.commit, "time");
    let files = text(&one.files, "lsn");
    let safe = format!("--to-lsn {} --exclusive", text(&one.mark, "lsn"));
    let stops = [
        (vec!["--to-time", &*time, "--exclusive"], true),
        (vec!["--to-xid", &*xid, "--exclusive"], true),
        (vec!["--to-lsn", &*files], true),
        (vec!["--to-lsn", &*files, "--exclusive"], false),
        (vec!["--to-name", &*one.point], false),
    ];
    for (options, gone) in stops {
        let plan = json(&stage, &[&["plan", "--json"][..], &options].concat())["plan"].clone();
        let half = &plan["half_done"].as_array().unwrap();
        assert_eq!(half.len(), 1, "{options:?}: {plan:#}");
        assert_eq!(half[0]["oid"], one.database, "{options:?}: {plan:#}");
        assert_eq!(half[0]["files_gone"], gone, "{options:?}: {plan:#}");
        assert_eq!(half[0]["safe_options"], safe, "{options:?}: {plan:#}");
        let words = stage.ok(&mut stage.pitr(&[&["plan"][..], &options].concat()));
        let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(&format!("{safe} stops before it")), "{words}");
    }
    for whole in
        [vec!["--to-time", &*time], vec!["--to-xid", &*xid], vec!["--to-name", "after"], vec!["--latest"]]
    {
        let plan = json(&stage, &[&["plan", "--json"][..], &whole].concat())["plan"].clone();
        assert_eq!(plan["half_done"], serde_json::json!([]), "{whole:?}: {plan:#}");
    }

    // What it warns of happens, and the safe target is safe.
    let restored = |name: &str, options: &[&str]| {
        let dir = stage.path().join(name);
        stage.ok(&mut stage.pitr(&[&["restore", "-D", dir.to_str().unwrap()], options].concat()));
        let server = stage.recovering(&dir).start();
        server.wait_for("select pg_is_in_recovery()", "f");
        server
    };
    let name = |server: &PgServer| {
        server.psql(&format!("select datname from pg_database where oid = {}", one.database))
    };
    for (folder, options) in
        [("broken", vec!["--to-time", &*time, "--exclusive"]), ("marked", vec!["--to-name", &*one.point])]
    {
        let broken = restored(folder, &options);
        let name = name(&broken);
        assert!(!name.is_empty(), "the catalog still names it");
        let refused = broken.try_psql_in(&name, "select 1").unwrap_err();
        assert!(
            refused.contains("invalid database") || refused.contains("is missing"),
            "{folder}: {refused}"
        );
    }
    let sound = restored("sound", &safe.split(' ').collect::<Vec<_>>());
    assert_eq!(sound.psql_in(&name(&sound), "select count(*) from t"), "1000");
}
