//! WAL that was not archived when the server was lost, found in what is left of its `pg_wal`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::{ACCESS_KEY, BUCKET, Fault, S3Server, SECRET_KEY};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

fn production(stage: &Stage, major: u32) -> PgServer {
    let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
    let server = builder.setting("autovacuum", "off").start();
    stage.init(&server);
    server.psql("create table t (id int); insert into t values (1)");
    stage.backup(&server);
    server.psql("insert into t values (2)");
    server.archive_now();
    server
}

/// Fills some segments, the last record of each reaching into the next, and waits until the whole ones are archived.
fn fill(server: &PgServer) {
    server.psql(
        "select pg_logical_emit_message(false, 'fill', repeat('x', 400000)) from generate_series(1, 8)",
    );
    let open = server.psql("select pg_walfile_name(pg_current_wal_lsn())");
    let whole = format!("{:024X}", u128::from_str_radix(&open, 16).unwrap() - 1);
    server.wait_until_archived(&whole);
}

/// From now on nothing is archived; two rows go into whole segments, one into the open one, and the server is lost.
fn lose(server: &mut PgServer) {
    server.psql("alter system set archive_command = 'false'; select pg_reload_conf()");
    server.wait_for("show archive_command", "false");
    for id in [3, 4] {
        server.psql(&format!("insert into t values ({id})"));
        server.switch_wal();
    }
    server.psql("insert into t values (5)");
    server.kill9();
}

/// What a server that is restored with these words holds.
fn rows(stage: &Stage, dir: &Path, words: &[&str]) -> String {
    stage.ok(stage.pitr(&["restore", "--latest", "-D"]).arg(dir).args(words));
    let restored = stage.recovering(dir).start();
    restored.wait_for("select pg_is_in_recovery()", "f");
    restored.psql("select string_agg(id::text, ',' order by id) from t")
}

fn stored(stage: &Stage) -> Value {
    let info: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
    let timeline = &info["timelines"][0];
    assert_eq!(timeline["gaps"].as_array().unwrap().len(), 0, "{info:#}");
    serde_json::json!([timeline["last_segment"], timeline["tail"]["until_lsn"]])
}

#[test]
fn what_survives_is_offered_and_pushed_to_its_last_record() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = production(&stage, major);
        let data_dir = server.data_dir().to_owned();
        let path = |name: &str| stage.path().join(name);
        let restore = |words: &[&str]| {
            let mut restore = stage.pitr(&["restore", "-D"]);
            restore.arg(path("new")).arg("--surviving-wal").arg(&data_dir).args(words);
            restore
        };
        let running = stage.fails(&mut restore(&["--latest", "--push-surviving"]), 2);
        assert!(running.contains("a server runs on") && running.contains("nothing was pushed"), "{running}");
        fill(&server);
        lose(&mut server);

        let before = stored(&stage);
        let wrong = stage.fails(&mut restore(&["--immediate"]), 2);
        assert!(wrong.contains("--latest only"), "{wrong}");
        let offered = stage.fails(&mut restore(&["--latest"]), 1);
        for words in ["(2 segments) and the open segment", "--push-surviving", "nothing was written"] {
            assert!(offered.contains(words), "{words}: {offered}");
        }
        let would = stage.ok(&mut restore(&["--latest", "--push-surviving", "--dry-run"]));
        assert!(would.contains("would be pushed"), "{would}");
        assert_eq!(stored(&stage), before, "nothing is pushed yet");
        assert!(!path("new").exists());
        // Without it the archive ends where it ends, and that is said.
        for words in [&["plan", "--latest"][..], &["restore", "--latest", "--dry-run", "-D", "/nowhere/new"]]
        {
            let said = stage.ok(&mut stage.pitr(words));
            assert!(said.contains("unless `pitr restore --surviving-wal DIR` names it"), "{said}");
        }
        assert_eq!(rows(&stage, &path("without"), &[]), "1,2");

        // A bit of a record that begins in the segment before is wrong.
        let damaged = path("damaged");
        copy_tree(&data_dir.join("pg_wal"), &damaged);
        let last = before[0].as_str().unwrap();
        let next = format!("{:024X}", u128::from_str_radix(last, 16).unwrap() + 1);
        let mut bytes = fs::read(damaged.join(&next)).unwrap();
        bytes[100] ^= 1;
        fs::write(damaged.join(&next), bytes).unwrap();
        let from_damaged = |status| {
            let mut restore = stage.pitr(&["restore", "--latest", "--push-surviving", "-D"]);
            stage.fails(restore.arg(path("new")).arg("--surviving-wal").arg(&damaged), status)
        };
        let said = from_damaged(4);
        assert!(said.contains(&next) && said.contains("wrong checksum"), "{said}");
        fs::remove_file(damaged.join(last)).unwrap();
        let said = from_damaged(1);
        assert!(said.contains("does not continue the WAL that is stored"), "{said}");
        assert_eq!(stored(&stage), before);

        // Only pg_wal is left, and not even the segment that is stored as well: the record that lies in both
        // tells.
        let left = path("left");
        copy_tree(&data_dir.join("pg_wal"), &left);
        fs::remove_file(left.join(last)).unwrap();
        let words = ["--surviving-wal", left.to_str().unwrap(), "--push-surviving"];
        assert_eq!(rows(&stage, &path("with"), &words), "1,2,3,4,5");
        assert_ne!(stored(&stage), before);
        // All of it is stored now, for everybody, and there is nothing more to find.
        let said = stage.ok(&mut restore(&["--latest", "--push-surviving", "--dry-run"]));
        assert!(said.contains("holds no WAL of timeline 1 that is not stored"), "{said}");
        assert_eq!(rows(&stage, &path("later"), &[]), "1,2,3,4,5");

        // Of a segment that is stored in parts, more turns up.
        server.start();
        server.psql("insert into t values (6)");
        server.kill9();
        let words = ["--surviving-wal", data_dir.to_str().unwrap(), "--push-surviving", "--timeline", "1"];
        assert_eq!(rows(&stage, &path("more"), &words), "1,2,3,4,5,6");
    }
}

#[test]
fn the_wal_of_another_history_is_not_pushed() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    // A copy that went on by itself, on the same timeline.
    server.stop(StopMode::Fast);
    let (copy, bare) = (stage.path().join("copy"), stage.path().join("bare"));
    copy_tree(server.data_dir(), &copy);
    server.start();
    server.psql("insert into t values (3)");
    let last = server.archive_now();
    server.stop(StopMode::Fast);
    {
        let mut other = PgServer::from_data_dir(&copy).setting("archive_command", "false").start();
        lose(&mut other);
    }
    copy_tree(&copy.join("pg_wal"), &bare);
    fs::remove_file(bare.join(&last)).unwrap();

    let before = stored(&stage);
    let push = |from: &Path, status: i32| {
        let mut restore = stage.pitr(&["restore", "--latest", "--push-surviving", "-D"]);
        restore.arg(stage.path().join("new")).arg("--surviving-wal").arg(from);
        stage.fails(&mut restore, status)
    };
    let conflict = push(&copy, 4);
    assert!(conflict.contains("other content"), "{conflict}");
    let unproven = push(&bare, 2);
    assert!(unproven.contains("nothing shows that"), "{unproven}");
    let foreign = PgServer::builder(primary_major()).wal_segment_size_mb(1).start();
    let (foreign_dir, mut foreign) = (foreign.data_dir().to_owned(), foreign);
    foreign.stop(StopMode::Fast);
    let mismatch = push(&foreign_dir, 1);
    assert!(mismatch.contains("system identifier"), "{mismatch}");
    assert_eq!(stored(&stage), before);
    assert!(!stage.path().join("new").exists());
}

#[test]
fn two_ways_on_from_one_archive_are_not_chosen_between() {
    let stage = Stage::folder("main");
    let mut server = production(&stage, primary_major());
    fill(&server);
    server.kill9();
    let dir = stage.path().join("data");
    let copy = |day: &str| stage.path().join(format!("data.before-202601{day}T000000Z"));
    for (day, row) in [("01", 11), ("02", 12)] {
        copy_tree(server.data_dir(), &copy(day));
        let mut copy = PgServer::from_data_dir(&copy(day)).setting("archive_command", "false").start();
        copy.psql(&format!("insert into t values ({row})"));
        copy.kill9();
    }
    let before = stored(&stage);
    let mut push = stage.pitr(&["restore", "--latest", "--push-surviving", "-D"]);
    let said = stage.fails(push.arg(&dir), 4);
    for expected in
        ["are different WAL", "before-20260101", "before-20260102", "nothing was pushed", "--leave-surviving"]
    {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert_eq!(stored(&stage), before);
    assert!(!dir.exists());
    // Named, it is chosen.
    let chosen = copy("01");
    let words = ["--surviving-wal", chosen.to_str().unwrap(), "--push-surviving", "--leave-surviving"];
    assert_eq!(rows(&stage, &dir, &words), "1,2,11");
}

/// Two repositories: a folder, and S3 or a second folder.
fn both(stage: &Stage, second: &str) -> Vec<String> {
    let first = format!("{:?}", format!("file://{}", stage.repository_dir().display()));
    vec![first, second.to_owned()]
}

fn configure(stage: &Stage, repositories: &[String]) {
    let text = format!(
        "repositories = [{}]\ncluster = \"main\"\nstate_dir = {:?}\n\
         limits = {{ connect_ms = 500, request_ms = 3000, deadline_ms = 4000 }}\n",
        repositories.join(", "),
        stage.path().join("state")
    );
    fs::write(stage.config(), text).unwrap();
    fs::set_permissions(stage.config(), fs::Permissions::from_mode(0o600)).unwrap();
}

/// What survives goes into every repository, and each alone has it then.
fn goes_everywhere(stage: &Stage, repositories: &[String]) {
    configure(stage, repositories);
    let mut server = production(stage, primary_major());
    fill(&server);
    lose(&mut server);
    // One of them has a segment more than the other, as after an outage.
    let pg_wal = server.data_dir().join("pg_wal");
    configure(stage, &repositories[..1]);
    let last = stored(stage)[0].as_str().unwrap().to_owned();
    let next = format!("{:024X}", u128::from_str_radix(&last, 16).unwrap() + 1);
    stage.ok(stage.walship(&["wal", "push"]).arg(pg_wal.join(&next)));
    assert_eq!(stored(stage)[0], next.as_str());
    configure(stage, repositories);
    let words = ["--surviving-wal", server.data_dir().to_str().unwrap(), "--push-surviving"];
    assert_eq!(rows(stage, &stage.path().join("with-both"), &words), "1,2,3,4,5");
    for (number, repository) in repositories.iter().enumerate() {
        configure(stage, std::slice::from_ref(repository));
        let dir = stage.path().join(format!("with-{number}"));
        assert_eq!(rows(stage, &dir, &["--timeline", "1"]), "1,2,3,4,5", "{repository}");
    }
}

#[test]
fn what_survives_goes_into_every_repository() {
    let stage = Stage::folder("main");
    let second = format!("{:?}", format!("file://{}", stage.path().join("second").display()));
    goes_everywhere(&stage, &both(&stage, &second));
}

#[test]
fn what_survives_goes_to_a_folder_and_to_s3() {
    let stage = Stage::folder("main");
    let weed = WeedServer::start();
    let s3 = format!(
        "{{ url = \"s3://{BUCKET}/walship\", s3 = {{ endpoint = {:?}, access_key_id = {ACCESS_KEY:?}, \
         secret_access_key = {SECRET_KEY:?} }} }}",
        weed.endpoint()
    );
    goes_everywhere(&stage, &both(&stage, &s3));
}

#[test]
fn while_one_repository_is_away_nothing_is_pushed_by_halves() {
    let s3 = S3Server::start();
    let stage = Stage::folder("main");
    let entry = format!(
        "{{ url = \"s3://{BUCKET}/walship\", s3 = {{ endpoint = {:?}, access_key_id = {ACCESS_KEY:?}, \
         secret_access_key = {SECRET_KEY:?} }} }}",
        s3.endpoint()
    );
    let repositories = both(&stage, &entry);
    configure(&stage, &repositories);
    let mut server = production(&stage, primary_major());
    fill(&server);
    lose(&mut server);
    s3.set_faults(|seen| {
        (seen.method == "PUT" && seen.path.contains("/wal/")).then_some(Fault::S3(503, "SlowDown"))
    });
    let mut restore = stage.pitr(&["restore", "--latest", "--push-surviving", "-D"]);
    restore.arg(stage.path().join("new")).arg("--surviving-wal").arg(server.data_dir());
    let said = stage.fails(&mut restore, 1);
    assert!(said.contains("s3://") && said.contains("\nsafe:  ") && said.contains("\nnext:  "), "{said}");
    assert!(!stage.path().join("new").exists(), "nothing is restored without it");
    // The store is back: the same words go on from there.
    s3.heal();
    let words = ["--surviving-wal", server.data_dir().to_str().unwrap(), "--push-surviving"];
    assert_eq!(rows(&stage, &stage.path().join("new"), &words), "1,2,3,4,5");
}
