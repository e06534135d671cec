//! `walship check` and `walship init --apply` on real servers: what they say is what is the case.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use walship_tests::bins;
use walship_tests::postgres::{PgServer, majors, primary_major};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// The findings of `walship check` as JSON, after the text form was seen to agree with the status.
fn check(stage: &Stage, server: &PgServer, status: i32) -> Vec<Value> {
    let text = stage.run(&mut stage.walship_on(server, &["check"]));
    assert_eq!(text.status.code(), Some(status), "{}", String::from_utf8_lossy(&text.stdout));
    assert_eq!(String::from_utf8_lossy(&text.stdout).contains("WRONG"), status == 1);
    let json = stage.run(&mut stage.walship_on(server, &["check", "--json"]));
    assert_eq!(json.status.code(), Some(status));
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    report["findings"].as_array().unwrap().clone()
}

/// The finding that holds `words`: its weight and its advice.
fn finding<'a>(findings: &'a [Value], words: &str) -> (&'a str, &'a str) {
    let found = findings.iter().find(|finding| finding["what"].as_str().unwrap().contains(words));
    let found = found.unwrap_or_else(|| panic!("no finding holds {words:?}: {findings:#?}"));
    (found["weight"].as_str().unwrap(), found["next"].as_str().unwrap_or_default())
}

fn weighing<'a>(findings: &'a [Value], weight: &str) -> Vec<&'a str> {
    let these = findings.iter().filter(|finding| finding["weight"] == weight);
    these.map(|finding| finding["what"].as_str().unwrap()).collect()
}

fn archiving(stage: &Stage) -> PgServer {
    let server = stage.archiving(PgServer::builder(primary_major()));
    server.setting("fsync", "on").setting("archive_timeout", "60").start()
}

#[test]
fn check_says_what_is_wrong_and_how_to_mend_it() {
    let stage = Stage::folder("main");
    let server = archiving(&stage);
    let findings = check(&stage, &server, 1);
    let (weight, next) = finding(&findings, "is not there");
    assert_eq!(weight, "needed");
    assert!(next.contains("walship init"), "{next}");

    stage.init(&server);
    server.archive_now();
    let findings = check(&stage, &server, 0);
    assert_eq!(weighing(&findings, "advice"), Vec::<&str>::new());
    for words in [
        "connected: PostgreSQL",
        "the archiver has archived",
        "holds cluster \"main\"",
        "was tried",
        "unfinished",
        "holds no incomplete backups",
    ] {
        assert_eq!(finding(&findings, words).0, "good", "{words}");
    }

    // A file of ours from a writer that died long ago, one of a writer at work, and a stranger's.
    let tmp = stage.repository_dir().join("tmp");
    for (name, days) in [("put-0000000000000001.tmp", 0), ("put-0000000000000002.tmp", 3), ("notes", 4)] {
        let file = fs::File::create(tmp.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(days * 86_400 + 60)).unwrap();
    }
    let report = stage.ok(&mut stage.walship_on(&server, &["check", "--offline", "--json"]));
    let report: Value = serde_json::from_str(&report).unwrap();
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(finding(findings, "put-0000000000000001.tmp").0, "good");
    assert!(finding(findings, "notes\" is 4 days old").1.contains("none of walship's"));

    // Another server's WAL under the name that comes next.
    let last = server.archive_now();
    let next = format!("{}{:08X}", &last[..16], u32::from_str_radix(&last[16..], 16).unwrap() + 1);
    server.psql("SELECT pg_logical_emit_message(false, 'a', 'b')");
    let log = stage.repository_dir().join("main/0001/wal").join(&last[..8]).join(&last[8..16]);
    let other = Stage::folder("main");
    let stranger = PgServer::builder(primary_major()).start();
    other.init(&stranger);
    fs::write(log.join(format!("{next}.wal")), "not an object").unwrap();
    // Damage is no conflict: the good copy goes beside it, and check knows.
    server.archive_now();
    let findings = check(&stage, &server, 0);
    assert_eq!(finding(&findings, "a stored object is damaged").0, "advice");

    // The right cluster name, and the wrong server.
    let text = stage.run(&mut stage.walship_on(&stranger, &["check"]));
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("has no lineage for system identifier"), "{text}");
    assert!(text.contains("WRONG  archive_mode is 'off': without it PostgreSQL archives nothing"), "{text}");
    assert!(text.contains("Set archive_mode = 'on', then restart the server."), "{text}");

    server.psql("ALTER SYSTEM SET archive_command = 'false'");
    server.psql("SELECT pg_reload_conf()");
    server.switch_wal();
    server.wait_for("SELECT failed_count > 0 FROM pg_stat_archiver", "t");
    let findings = check(&stage, &server, 1);
    let (weight, next) = finding(&findings, "archive_command is 'false': it does not call archive-cmd");
    assert_eq!(weight, "needed");
    assert!(next.contains("archive-cmd"), "{next}");
    assert!(finding(&findings, "the archiver failed last").1.contains("server's log"));

    // Not mounted.
    fs::rename(stage.repository_dir(), stage.path().join("elsewhere")).unwrap();
    let findings = check(&stage, &server, 1);
    assert!(finding(&findings, "is it mounted?").1.contains("Mount it"), "{findings:#?}");
}

#[test]
fn check_names_a_conflict() {
    let stage = Stage::folder("main");
    let server = archiving(&stage);
    stage.init(&server);
    server.archive_now();
    // A copy of this server went on by itself and archived first.
    let copy = stage.path().join("copy");
    stage.ok(server.tool("pg_basebackup").args(["-X", "stream", "-c", "fast", "-D", copy.to_str().unwrap()]));
    let stray = PgServer::from_data_dir(&copy).env("WALSHIP_CONFIG", stage.config()).start();
    server.psql("ALTER SYSTEM SET archive_command = 'false'");
    server.psql("SELECT pg_reload_conf()");
    stray.psql("CREATE TABLE strays AS SELECT 1");
    let taken = stray.archive_now();
    drop(stray);
    server.psql("ALTER SYSTEM RESET archive_command");
    server.psql("SELECT pg_reload_conf()");
    while server.switch_wal() < taken {}
    server.wait_for(&format!("SELECT last_failed_wal >= '{taken}' FROM pg_stat_archiver"), "t");
    let conflict = format!("{taken}, which the archiver cannot archive, is already stored");
    let findings = check(&stage, &server, 1);
    let (weight, next) = finding(&findings, &conflict);
    assert_eq!(weight, "needed");
    assert!(next.contains("When a segment is stored with other content"), "{next}");
}

#[test]
fn check_of_a_store_that_is_dead_or_keeps_uploads() {
    let s3 = S3Server::start();
    let endpoint = s3.endpoint();
    let stage = Stage::s3("main", &endpoint).configured("[limits]\nrequest_ms = 1000\ndeadline_ms = 1500\n");
    let server = archiving(&stage);
    stage.init(&server);
    let orphans = |key: &str| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let storage = walship::storage::open(&s3.config("walship")).unwrap();
        runtime.block_on(async {
            let key = walship::storage::ObjectKey::new(key).unwrap();
            storage.probe().unwrap().start_multipart(&key).await.map(drop).unwrap();
        });
    };
    for number in 1..=5 {
        orphans(&format!("main/0001/backups/x/data/00000{number}.tar"));
    }
    orphans("other/0001/backups/x/data/000001.tar");
    let findings = check(&stage, &server, 0);
    let uploads = findings.iter().filter(|f| f["what"].as_str().unwrap().contains("unfinished upload of"));
    assert_eq!(uploads.count(), 5, "all pages of this cluster's, none of another's: {findings:#?}");
    assert_eq!(finding(&findings, "data/000005.tar is ").0, "good", "it may be under way");
    s3.age_uploads(Duration::from_secs(3 * 86_400));
    let findings = check(&stage, &server, 0);
    let (weight, next) = finding(&findings, "data/000005.tar is 3 days old, left behind");
    assert_eq!(weight, "advice");
    assert!(next.contains("abort-multipart-upload --bucket walship-test --key walship/main/"), "{next}");

    let lists_uploads = |seen: &walship_tests::s3_inprocess::Seen| {
        seen.method == "GET" && seen.query.split('&').any(|word| word == "uploads" || word == "uploads=")
    };
    for (fault, advice) in [
        (Fault::S3(501, "NotImplemented"), "does not list uploads"),
        (Fault::S3(403, "AccessDenied"), "Grant s3:ListBucketMultipartUploads"),
    ] {
        s3.set_faults(move |seen| lists_uploads(seen).then(|| fault.clone()));
        let findings = check(&stage, &server, 0);
        let (weight, next) = finding(&findings, "cannot tell whether unfinished uploads");
        assert_eq!(weight, "advice");
        assert!(next.contains(advice), "{next}");
    }
    s3.set_faults(|_| Some(Fault::S3(403, "AccessDenied")));
    assert!(finding(&check(&stage, &server, 1), "403 AccessDenied").1.contains("Grant s3:PutObject"));
    drop(s3);
    assert_eq!(finding(&check(&stage, &server, 1), "cannot be reached").0, "needed");
}

#[test]
fn seaweedfs_lists_uploads() {
    let weed = WeedServer::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let storage = walship::storage::open(&weed.config("pre/fix")).unwrap();
    let key = |text: &str| walship::storage::ObjectKey::new(text).unwrap();
    runtime.block_on(async {
        for name in ["main/0001/a", "other/0001/b"] {
            storage.probe().unwrap().start_multipart(&key(name)).await.map(drop).unwrap();
        }
        let unfinished = storage.unfinished("main/").await.unwrap().unwrap();
        assert_eq!(unfinished.len(), 1, "{unfinished:?}");
        assert!(unfinished[0].what.ends_with("/pre/fix/main/0001/a"), "{unfinished:?}");
        let age = chrono::Utc::now() - unfinished[0].since.unwrap();
        assert!(age.num_minutes().abs() < 10, "{unfinished:?}");
    });
}

#[test]
fn init_apply_sets_what_is_missing_once() {
    for major in majors() {
        let stage = Stage::folder("main");
        let mut server = PgServer::builder(major).env("WALSHIP_CONFIG", stage.config()).start();
        let told = stage.init(&server);
        assert!(told.contains("needed: archive_mode = 'on' (needs a restart)"), "{told}");
        assert!(told.contains("`walship init --apply` sets them with ALTER SYSTEM."), "{told}");
        assert_eq!(server.psql("SHOW archive_command"), "(disabled)", "only told");

        let applied = stage.ok(&mut stage.walship_on(&server, &["init", "--apply"]));
        assert!(applied.contains("ready, known already"), "{applied}");
        assert!(applied.contains("archive_mode = 'on' - set; takes effect at the next restart"), "{applied}");
        server.wait_for("SELECT setting FROM pg_settings WHERE name = 'archive_timeout'", "60");
        server.wait_for("SELECT setting FROM pg_settings WHERE name = 'fsync'", "on");
        // ALTER SYSTEM keeps no order.
        let file = || -> BTreeSet<String> {
            let text = fs::read_to_string(server.data_dir().join("postgresql.auto.conf")).unwrap();
            text.lines().map(str::to_owned).collect()
        };
        let set = file();
        let command = format!("archive_command = '{}", bins::archive_cmd().display());
        assert!(set.iter().any(|line| line.starts_with(&command)), "{set:?}");

        let again: Value =
            serde_json::from_str(&stage.ok(&mut stage.walship_on(&server, &["init", "--apply", "--json"])))
                .unwrap();
        assert_eq!(again["repositories"][0]["registered"], false);
        assert_eq!(again["repositories"][0]["lineage"], 1);
        assert_eq!(file(), set, "setting it again changes nothing");

        server.restart();
        assert_eq!(server.psql("SHOW archive_mode"), "on");
        server.archive_now();
        let last = stage.ok(&mut stage.walship_on(&server, &["init"]));
        assert!(last.contains("all as they should be"), "{last}");
        assert!(check(&stage, &server, 0).iter().all(|finding| finding["weight"] == "good"));
    }
}
