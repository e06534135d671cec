//! `pitr expire` beside backups and restores at the same moment, in repositories of which something is gone, and by clocks that
//! are wrong.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use walship_tests::postgres::{StopMode, primary_major};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::{process, wait};

use crate::expire::{Scene, age_files, ids, started};

const CONFIRM: [&str; 3] = ["expire", "--confirm", "--yes"];

/// A backup that has stored everything and waits for its WAL; its id, and what lets that come.
struct Waiting {
    child: Child,
    id: String,
    command: String,
}

impl Waiting {
    fn begin(scene: &Scene) -> Self {
        let command = scene.server.psql("show archive_command");
        scene.server.psql("alter system set archive_command = 'false'");
        scene.server.psql("select pg_reload_conf()");
        let mut backup = scene.stage.walship_on(&scene.server, &["backup"]);
        backup.stdout(Stdio::null()).stderr(File::create(scene.stage.path().join("backup.err")).unwrap());
        let child = process::spawn(backup).unwrap();
        let begun = || scene.info()["unfinished_backups"].as_array().unwrap().clone();
        wait::until("the backup has begun", || begun().len() == 1);
        let id = begun()[0]["id"].as_str().unwrap().to_owned();
        let manifest = format!("/backups/{id}/manifest.json.zst");
        wait::until("the backup waits for WAL", || {
            scene.store.keys().iter().any(|key| key.ends_with(&manifest))
        });
        Self { child, id, command }
    }

    /// Lets the WAL come; returns whether the backup became complete, and what it said.
    fn end(mut self, scene: &Scene) -> (bool, String) {
        let command = self.command.replace('\'', "''");
        scene.server.psql(&format!("alter system set archive_command = '{command}'"));
        scene.server.psql("select pg_reload_conf()");
        let complete = self.child.wait().unwrap().success();
        (complete, fs::read_to_string(scene.stage.path().join("backup.err")).unwrap())
    }
}

#[test]
fn a_backup_that_was_given_up_and_ends_all_the_same_is_no_backup() {
    let mut scene = Scene::folder(primary_major());
    let waiting = Waiting::begin(&scene);
    let id = waiting.id.clone();
    scene.store.age_folder(&id, 8);
    let done = scene.expire(&CONFIRM[1..]);
    assert!(ids(&done["plan"]["backups_removed"]).contains(&&*id), "{done}");
    let (complete, said) = waiting.end(&scene);
    assert!(!complete && said.contains("Take the backup again"), "{said}");
    let info = scene.info();
    assert!(!ids(&info["backups"]).contains(&&*id), "{info}");
    // What came behind it is whole, and the next backup is one.
    scene.server.archive_now();
    scene.stage.backup(&scene.server);
    // All that is left of it is what it said last, when it had heard nothing yet; that goes in a week.
    let left: Vec<String> = scene.store.keys().into_iter().filter(|key| key.contains(&id)).collect();
    assert!(left.len() == 1 && left[0].ends_with("/finishing.json"), "{left:?}");
    scene.store.age_folder(&id, 8);
    scene.expire(&CONFIRM[1..]);
    assert!(!scene.store.keys().iter().any(|key| key.contains(&id)), "nothing is left of it");
    assert!(scene.server.stop(StopMode::Fast).success());
    assert_eq!(scene.restored_rows("latest", &["--latest"]), "0 1 2 3 4 5 6 7 8 9 10 11");
}

#[test]
fn a_backup_that_began_long_ago_and_still_stores_stays() {
    let mut scene = Scene::folder(primary_major());
    let waiting = Waiting::begin(&scene);
    let id = waiting.id.clone();
    let folder = scene.stage.repository_dir().join("main/0001/backups").join(&id);
    let started_at = folder.join("started.json");
    let mut document: Value = serde_json::from_slice(&fs::read(&started_at).unwrap()).unwrap();
    let long_ago = chrono::Utc::now() - chrono::TimeDelta::days(30);
    document["started"] = serde_json::to_value(long_ago).unwrap();
    fs::write(&started_at, serde_json::to_vec(&document).unwrap()).unwrap();
    let days = |days: u64| Duration::from_secs(days * 86_400);
    age_files(&folder, "", days(6));
    for old in ["/started.json", "/manifest.json.zst"] {
        age_files(&folder, old, days(24));
    }
    let done = scene.expire(&[&CONFIRM[1..], &["--window", "1 minutes"]].concat());
    assert!(ids(&done["plan"]["backups_kept"]).contains(&&*id), "{done}");
    let (complete, said) = waiting.end(&scene);
    assert!(complete, "{said}");
    assert!(scene.server.stop(StopMode::Fast).success());
    let words = ["--latest", "--backup", &id];
    assert_eq!(scene.restored_rows("latest", &words), "0 1 2 3 4 5 6 7 8 9 10 11");
}

#[test]
fn while_the_newest_backup_cannot_be_restored_nothing_goes() {
    let scene = Scene::folder(primary_major());
    let lineage = scene.stage.repository_dir().join("main/0001");
    let before = scene.store.kept_keys();
    let refused = |hidden: &Path| {
        let aside = scene.stage.path().join("aside");
        fs::rename(hidden, &aside).unwrap();
        let error = scene.stage.fails(&mut scene.stage.pitr(&CONFIRM), 4);
        assert!(error.contains("cannot be restored") && error.contains("nothing was removed"), "{error}");
        fs::rename(&aside, hidden).unwrap();
        assert_eq!(scene.store.kept_keys(), before);
        error
    };
    let newest = lineage.join("backups").join(&scene.backups[2]);
    assert!(refused(&newest.join("data/000001.tar")).contains("000001.tar"));
    assert!(refused(&newest.join("manifest.json.zst")).contains("manifest"));
    // As if a mount were missing.
    assert!(refused(&lineage.join("wal")).contains(&scene.backups[2]));
    assert!(refused(&lineage.join("backups").join(&scene.backups[2])).contains(&scene.backups[2]));

    // Without their records complete backups look like ones that were given up long ago.
    scene.backups.iter().for_each(|id| scene.store.age_folder(id, 30));
    let aside = scene.stage.path().join("aside");
    fs::rename(lineage.join("backups/catalog"), &aside).unwrap();
    let hidden = scene.store.kept_keys();
    let done = scene.expire(&CONFIRM[1..]);
    assert_eq!(ids(&done["plan"]["backups_kept"]).len(), 3, "{done}");
    assert!(done["plan"]["notes"].to_string().contains("is there but its record"), "{done}");
    assert_eq!(scene.store.kept_keys(), hidden);
    fs::rename(&aside, lineage.join("backups/catalog")).unwrap();

    // Another one that is damaged takes no sound one's place, and stays.
    fs::remove_file(lineage.join("backups").join(&scene.backups[1]).join("data/000001.tar")).unwrap();
    let done = scene.expire(&CONFIRM[1..]);
    let kept = ids(&done["plan"]["backups_kept"]);
    assert_eq!(kept, [&scene.backups[2], &scene.backups[1], &scene.backups[0]], "{done}");
    assert!(done["plan"]["notes"].to_string().contains("does not count"), "{done}");
    assert!(scene.plans(&["--to-xid", scene.xids[1].trim()]), "the window begins with the oldest now");
}

#[test]
fn a_restore_whose_wal_is_expired_before_it_holds_it_hears_of_it() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    server.set_faults(move |seen| {
        let hold = seen.method == "PUT" && seen.path.contains("/holds/");
        (hold && counted.fetch_add(1, Ordering::SeqCst) == 0).then_some(Fault::Late(Duration::from_secs(15)))
    });
    let folder = scene.stage.path().join("restored");
    let words = ["restore", "--to-xid", scene.xids[1].trim(), "-D", folder.to_str().unwrap()];
    let mut restore = scene.stage.pitr(&words);
    restore.stdout(Stdio::null()).stderr(File::create(scene.stage.path().join("restore.err")).unwrap());
    let mut restore = process::spawn(restore).unwrap();
    wait::until("the restore is about to hold", || count.load(Ordering::SeqCst) == 1);
    let done = scene.expire(&CONFIRM[1..]);
    assert_eq!(ids(&done["plan"]["backups_removed"]), [&scene.backups[0]]);
    assert!(!restore.wait().unwrap().success());
    let said = fs::read_to_string(scene.stage.path().join("restore.err")).unwrap();
    assert!(said.contains("expired by") && said.contains("nothing was restored"), "{said}");
    assert!(!folder.exists() || fs::read_dir(&folder).unwrap().next().is_none(), "nothing was written");
}

#[test]
fn what_a_restore_holds_stays_until_it_has_ended() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    // The restore holds, and then waits for the backup's first object.
    server.set_faults(move |seen| {
        let data = seen.method == "GET" && seen.path.contains("/data/000001.tar");
        (data && counted.fetch_add(1, Ordering::SeqCst) == 0).then_some(Fault::Late(Duration::from_secs(10)))
    });
    let folder = scene.stage.path().join("restored");
    let words = ["restore", "--to-xid", scene.xids[1].trim(), "-D", folder.to_str().unwrap()];
    let mut restore = started(&scene.stage, &words);
    wait::until("the restore reads", || count.load(Ordering::SeqCst) == 1);
    let done = scene.expire(&CONFIRM[1..]);
    assert_eq!(done["plan"]["backups_removed"], Value::Array(vec![]), "{done}");
    assert!(restore.wait().unwrap().success());
    assert!(scene.plans(&["--to-xid", scene.xids[1].trim()]), "recovery fetches its WAL later");
}

#[test]
fn a_clock_that_is_wrong_by_a_year_removes_nothing() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let before = scene.store.kept_keys();
    let year = 365 * 86_400;
    for ahead in [year, -year] {
        server.set_clock_ahead(ahead);
        let refused = scene.stage.fails(&mut scene.stage.pitr(&CONFIRM), 2);
        assert!(refused.contains("what is old cannot be told") && refused.contains("NTP"), "{refused}");
        assert_eq!(scene.store.kept_keys(), before);
    }
    server.set_clock_ahead(0);
    assert!(scene.expire(&CONFIRM[1..])["report"]["objects"].as_u64().unwrap() > 0);
}
