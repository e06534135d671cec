//! `pitr log` on the WAL of a real server: what was done is found, and undone by the target it names.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::stage::Stage;

use crate::pitr::find;

#[test]
fn what_was_dropped_is_found_and_brought_back() {
    dropped(primary_major());
}

#[test]
fn what_was_dropped_is_found_and_brought_back_on_a_newer_major() {
    dropped(newer_major());
}

/// Does something in a transaction and returns its id.
pub(crate) fn transaction(server: &PgServer, sql: &str, end: &str) -> u64 {
    let said = server.psql(&format!("begin; {sql}; select pg_current_xact_id()::text; {end}"));
    let xid = said.lines().find_map(|line| line.trim().parse().ok());
    xid.unwrap_or_else(|| panic!("no transaction id: {said}"))
}

fn number(server: &PgServer, sql: &str) -> u64 {
    server.psql(sql).trim().parse().unwrap()
}

pub(crate) fn log(stage: &Stage, args: &[&str]) -> Value {
    let mut words = vec!["log", "--json"];
    words.extend(args);
    serde_json::from_str(&stage.ok(&mut stage.pitr(&words))).unwrap()
}

/// Returns the only event that this is true of.
pub(crate) fn the_one(log: &Value, is: impl Fn(&Value) -> bool) -> Value {
    let lines = log["lines"].as_array().unwrap();
    let found: Vec<_> = lines.iter().filter(|line| line["line"] == "event" && is(line)).collect();
    assert_eq!(found.len(), 1, "{found:#?} of {log:#}");
    found[0].clone()
}

/// Restores to just before an event and starts the server.
fn just_before(stage: &Stage, event: &Value, name: &str) -> PgServer {
    let dir: PathBuf = stage.path().join(name);
    let mut args = vec!["restore", "-D", dir.to_str().unwrap()];
    args.extend(event["just_before"].as_str().unwrap().split(' '));
    stage.ok(&mut stage.pitr(&args));
    let server = stage.recovering(&dir).start();
    server.wait_for("select pg_is_in_recovery()", "f");
    server
}

fn dropped(major: u32) {
    let stage = Stage::folder("main");
    let mut server =
        stage.archiving(PgServer::builder(major)).setting("max_prepared_transactions", 10).start();
    stage.init(&server);
    server.psql("create table t (id int); create table kept (x int)");
    server.psql("create table victim as select generate_series(1, 1000) as x");
    server.psql("create table emptied as select generate_series(1, 1000) as x");
    server.psql("create database other");
    server.psql_in("other", "create table inside as select generate_series(1, 10) as x");
    stage.backup(&server);
    let node = |table: &str| number(&server, &format!("select pg_relation_filenode('{table}')"));
    let (victim, emptied, kept) = (node("victim"), node("emptied"), node("kept"));
    let database = number(&server, "select oid from pg_database where datname = 'other'");

    let early = transaction(&server, "insert into t values (1)", "commit");
    transaction(&server, "drop table kept", "rollback");
    let drop = transaction(&server, "drop table victim", "commit");
    server.psql("insert into t values (2)");
    let truncate = transaction(&server, "truncate emptied", "commit");
    server.psql("select pg_create_restore_point('after the truncate')");
    let first = server.archive_now();
    server.psql("insert into t values (3)");
    server.psql("drop database other");
    server.psql("insert into t values (4)");
    let prepare = |gid: &str| {
        let sql = format!(
            "begin; insert into kept values (1); select pg_current_xact_id()::text; prepare transaction '{gid}'"
        );
        server.psql(&sql).trim().parse::<u64>().unwrap()
    };
    let (one, two, three) = (prepare("one: it''s"), prepare("two"), prepare("three"));
    server.psql("commit prepared 'one: it''s'; rollback prepared 'two'");
    server.psql(
        "begin; insert into t values (100); savepoint s; insert into t values (101); release s; commit",
    );
    let xmin = |id: u32| number(&server, &format!("select xmin::text from t where id = {id}"));
    let (top, sub) = (xmin(100), xmin(101));
    server.archive_now();
    server.stop(StopMode::Fast);

    let all = log(&stage, &[]);
    let of_node = |line: &Value, node: u64| {
        line["relations"].as_array().unwrap().iter().any(|relation| relation["relation"] == node)
    };
    let dropped = the_one(&all, |line| of_node(line, victim));
    assert_eq!(dropped["xid"], drop, "{dropped:#}");
    assert!(dropped["time"].is_string() && dropped["at_once"] == false, "{dropped:#}");
    let truncated = the_one(&all, |line| of_node(line, emptied));
    assert_eq!(truncated["xid"], truncate, "{truncated:#}");
    let point = the_one(&all, |line| line["kinds"][0] == "restore-point");
    assert!(point["what"].as_str().unwrap().contains("after the truncate"));
    let what = |line: &Value, words: &str| line["what"].as_str().unwrap().contains(words);
    let gone =
        the_one(&all, |line| line["databases"][0]["oid"] == database && what(line, "files of database"));
    // The same target at its three records, before the first of them.
    let marked =
        the_one(&all, |line| line["databases"][0]["oid"] == database && what(line, "marked invalid"));
    let target = format!("--to-lsn {} --exclusive", marked["lsn"].as_str().unwrap());
    for event in
        all["lines"].as_array().unwrap().iter().filter(|line| line["databases"][0]["oid"] == database)
    {
        assert_eq!(event["just_before"], target, "{event:#}");
        assert_eq!(event["afterwards"], Value::Null, "{event:#}");
    }
    assert!(all["lines"].as_array().unwrap().iter().all(|line| !of_node(line, kept)), "{all:#}");

    for event in [&dropped, &truncated, &point, &gone] {
        let mut args = vec!["plan"];
        args.extend(event["just_before"].as_str().unwrap().split(' '));
        stage.ok(&mut stage.pitr(&args));
    }

    // By name: as the backup's catalog has it, or the WAL itself.
    assert_eq!(dropped["what"], "public.victim dropped", "{dropped:#}");
    assert!(truncated["what"].as_str().unwrap().starts_with("public.emptied given new storage"));
    assert_eq!(
        (&dropped["relations"][0]["removed"], &truncated["relations"][0]["removed"]),
        (&json!("dropped"), &json!("replaced"))
    );
    assert_eq!(dropped["databases"][0]["name"], "postgres");
    assert_eq!(dropped["relations"][0]["named_by"]["source"], "backup", "{dropped:#}");
    assert!(dropped["freed_bytes"].as_u64().unwrap() >= 1000 * 32, "{dropped:#}");
    assert_eq!(gone["databases"][0]["name"], "other", "{gone:#}");
    for (options, event) in [
        (vec!["--table", "public.victim"], &dropped),
        (vec!["--table", "victim", "--database", "postgres"], &dropped),
        (vec!["--table", "emptied", "--only", "truncate"], &truncated),
    ] {
        assert_eq!(&the_one(&log(&stage, &options), |_| true), event, "{options:?}");
    }
    for (words, event) in [
        ("drop:public.victim", &dropped),
        ("drop:postgres/victim", &dropped),
        ("truncate:emptied", &truncated),
        ("drop:other/", &gone),
    ] {
        let plan = |args: &[&str]| stage.ok(&mut stage.pitr(&[&["plan", "--json"], args].concat()));
        let target: Vec<&str> = event["just_before"].as_str().unwrap().split(' ').collect();
        assert_eq!(plan(&["--before", words]), plan(&target), "{words}");
    }
    for words in ["drop:emptied", "drop:public.nothing", "drop:template1/victim"] {
        let refused = stage.fails(&mut stage.pitr(&["plan", "--before", words]), 3);
        assert!(refused.contains("no such event"), "{refused}");
    }

    let found = log(&stage, &["--xid", &early.to_string()]);
    assert_eq!(the_one(&found, |_| true)["what"], "committed", "{found:#}");
    assert_ne!(top, sub);
    for xid in [top, sub] {
        assert_eq!(the_one(&log(&stage, &["--xid", &xid.to_string()]), |_| true)["xid"], top, "{xid}");
    }
    let found = log(&stage, &["--only", "prepare"]);
    for (xid, what, outcome) in [
        (one, "prepared as \"one: it's\"", json!(true)),
        (two, "prepared as \"two\"", json!(false)),
        (three, "prepared as \"three\"", Value::Null),
    ] {
        let prepared = the_one(&found, |line| line["xid"] == xid);
        assert_eq!(
            (&prepared["what"], &prepared["outcome"]["committed"]),
            (&json!(what), &outcome),
            "{prepared:#}"
        );
    }
    let found = log(&stage, &["--relation", &victim.to_string()]);
    assert_eq!(the_one(&found, |_| true), dropped);
    let found = log(&stage, &["--only", "commit", "--limit", "10000"]);
    the_one(&found, |line| line["xid"] == early);
    the_one(&found, |line| line["xid"] == drop);
    let time = dropped["time"].as_str().unwrap();
    let found = log(&stage, &["--since", time, "--until", time, "--only", "commit"]);
    assert_eq!(the_one(&found, |_| true), dropped);
    let refused = stage.fails(&mut stage.pitr(&["log", "--since", "2026-01-01 00:00"]), 2);
    assert!(refused.contains("no offset and no zone"), "{refused}");
    let text = stage.ok(&mut stage.pitr(&["log", "--limit", "1"]));
    assert!(text.contains("there is more WAL behind it"), "{text}");

    let plan = stage.ok(&mut stage.pitr(&["plan", "--before-xid", &drop.to_string()]));
    assert!(plan.contains(&format!("transaction {drop} and everything after it")), "{plan}");

    let back = just_before(&stage, &dropped, "before-the-drop");
    assert_eq!(
        back.psql("select (select count(*) from victim), string_agg(id::text, ',') from t").trim(),
        "1000|1"
    );
    let back = just_before(&stage, &gone, "before-the-database");
    assert_eq!(back.psql("select string_agg(id::text, ',' order by id) from t").trim(), "1,2,3");
    assert_eq!(back.psql_in("other", "select count(*) from inside").trim(), "10");

    fs::remove_file(find(&stage.repository_dir(), &format!("{first}.wal")).unwrap()).unwrap();
    let text = stage.ok(&mut stage.pitr(&["log"]));
    assert!(text.contains("WAL missing from") && text.contains("not known what happened"), "{text}");
    assert!(text.contains(&format!("files of database \"other\" (oid {database}) removed")), "{text}");
}

#[test]
fn names_are_those_of_the_backup_or_of_the_live_server_and_none_is_guessed() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    server.psql("create table orders (n int)");
    stage.backup(&server);
    let rows = "select generate_series(1, 1500) as n";
    server.psql(&format!("alter table orders rename to archive; insert into archive {rows}"));
    server.psql(&format!("create table late as {rows}"));
    server.psql(&format!("create table fleeting as {rows}"));
    let renamed = transaction(&server, "drop table archive", "commit");
    let cleared = transaction(&server, "delete from late", "commit");
    server.psql("alter table late rename to later");
    let unknown = transaction(&server, "drop table fleeting", "commit");
    server.archive_now();

    let kinds = ["--only", "drop,delete-heavy"];
    let of = |log: &Value, xid: u64| {
        let event = the_one(log, |line| line["xid"] == xid);
        let first = &event["relations"][0];
        let source = first["named_by"]["source"].clone();
        (first["name"].clone(), source, event["unnamed_count"].clone(), event["what"].clone())
    };
    let archived = log(&stage, &kinds);
    // What was dropped is called as it was when the backup was taken.
    let (name, source, unnamed, _) = of(&archived, renamed);
    assert_eq!((name, source, unnamed), (json!("orders"), json!("backup"), json!(0)));
    let (name, source, ..) = of(&archived, cleared);
    assert_eq!((name, source), (Value::Null, Value::Null));

    // The live server knows what is left, by the name that it has now.
    let conninfo = server.socket_conninfo();
    let asked = log(&stage, &[&kinds[..], &["--server", &conninfo]].concat());
    assert_eq!(of(&asked, renamed), of(&archived, renamed), "a backup before the event comes first");
    let (name, source, ..) = of(&asked, cleared);
    assert_eq!((name, source), (json!("later"), json!("server")));
    for log in [&archived, &asked] {
        let (name, source, unnamed, what) = of(log, unknown);
        assert_eq!((name, source, unnamed), (Value::Null, Value::Null, json!(1)));
        assert!(what.as_str().unwrap().contains("unknown"), "{what}");
    }
    // By that name it is found where the server is asked, and nowhere else.
    let only = ["--only", "delete-heavy", "--table", "later"];
    the_one(&log(&stage, &[&only[..], &["--server", &conninfo]].concat()), |line| line["xid"] == cleared);
    assert_eq!(log(&stage, &only)["lines"], json!([]));
}
