//! `pitr expire`, `hold`, `release`: what the policy keeps is restored on real servers, the rest is gone, and whatever
//! goes wrong on the way leaves whole chains.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;
use walship::storage::{ObjectKey, Storage, StorageConfig, list_all};
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::s3_inprocess::{ACCESS_KEY, Fault, S3Server, SECRET_KEY, Seen};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;
use walship_tests::{process, wait};

use crate::exact::history::{faketime, with_clock};
use crate::json_docs::compare;
use crate::start::Place;
use crate::verify::{damage_of, parsed};

/// The repository's objects.
pub(crate) struct Store {
    runtime: Runtime,
    storage: Arc<dyn Storage>,
    /// Not every store can be told.
    age_objects: AgeObjects,
}

/// Makes the objects whose keys hold a text so much older.
type AgeObjects = Box<dyn Fn(&str, Duration)>;

impl Store {
    pub(crate) fn open(config: &StorageConfig) -> Self {
        let runtime = Runtime::new().unwrap();
        let storage = runtime.block_on(async { walship::storage::open(config) }).unwrap();
        Self { runtime, storage, age_objects: Box::new(|_, _| {}) }
    }

    pub(crate) fn folder(stage: &Stage) -> Self {
        let cluster = stage.repository_dir().join("main");
        let age_objects = Box::new(move |part: &str, by| age_files(&cluster, part, by));
        Self { age_objects, ..Self::open(&StorageConfig::new(stage.url())) }
    }

    pub(crate) fn s3(server: &S3Server) -> Self {
        Self { age_objects: Box::new(server.ager()), ..Self::open(&server.config("walship")) }
    }

    pub(crate) fn keys(&self) -> BTreeSet<String> {
        let listed = self.runtime.block_on(list_all(&*self.storage, "main/", 100_000)).unwrap();
        listed.into_iter().map(|meta| meta.key.as_str().to_owned()).collect()
    }

    /// What retention has to do with: all but the history of what was done and who did it.
    pub(crate) fn kept_keys(&self) -> BTreeSet<String> {
        let own = |key: &String| {
            ["/history/", "/locks/", "/index/", "/gaps/", "/expiring/", "/verifications/"]
                .iter()
                .any(|part| key.contains(part))
        };
        self.keys().into_iter().filter(|key| !own(key)).collect()
    }

    /// Makes what is stored below a backup's folder so many days older.
    pub(crate) fn age_folder(&self, id: &str, days: u32) {
        (self.age_objects)(&format!("/backups/{id}/"), Duration::from_secs(86_400) * days);
    }

    /// Makes a complete backup so many days older.
    pub(crate) fn age(&self, id: &str, days: u32) {
        self.age_folder(id, days);
        let key = self
            .keys()
            .into_iter()
            .find(|key| key.ends_with(&format!("{id}.json")) && key.contains("/backups/catalog/"));
        let key = ObjectKey::new(key.unwrap()).unwrap();
        self.runtime.block_on(async {
            let bytes = self.storage.get(&key, 1 << 26).await.unwrap().unwrap();
            let mut record: Value = serde_json::from_slice(&bytes).unwrap();
            for name in ["started", "finished"] {
                let time: chrono::DateTime<chrono::Utc> =
                    serde_json::from_value(record[name].clone()).unwrap();
                record[name] = serde_json::to_value(time - chrono::TimeDelta::days(i64::from(days))).unwrap();
            }
            self.storage.delete(&key).await.unwrap();
            self.storage
                .put_if_absent(&key, serde_json::to_vec_pretty(&record).unwrap().into())
                .await
                .unwrap();
        });
    }
}

/// Makes the files so much older in whose paths, below a folder with the slash before, this text is.
pub(crate) fn age_files(folder: &Path, part: &str, by: Duration) {
    fn visit(root: &Path, folder: &Path, part: &str, by: Duration) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let below = path.strip_prefix(root).unwrap().to_str().unwrap();
            if path.is_dir() {
                visit(root, &path, part, by);
            } else if format!("/{below}").contains(part) {
                let file = File::options().append(true).open(&path).unwrap();
                let then = file.metadata().unwrap().modified().unwrap() - by;
                file.set_modified(then).unwrap();
            }
        }
    }
    visit(folder, folder, part, by);
}

/// The clock of a server, which is set as if days went by.
struct Clock(PathBuf);

impl Clock {
    fn new(stage: &Stage, days_ago: u32) -> Self {
        let clock = Self(stage.path().join("clock"));
        clock.set(days_ago);
        clock
    }

    fn set(&self, days_ago: u32) {
        std::fs::write(&self.0, if days_ago == 0 { "+0".to_owned() } else { format!("-{days_ago}d") })
            .unwrap();
    }

    /// Starts a server that goes by it; what it archives with goes by the machine's.
    fn server(&self, stage: &Stage, major: u32) -> PgServer {
        let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
        let server = with_clock(builder.setting("autovacuum", "off"), &self.0).start();
        let command = server.psql("show archive_command").trim().replace('\'', "''");
        server.psql(&format!("alter system set archive_command = 'env -u LD_PRELOAD {command}'"));
        server.psql("select pg_reload_conf()");
        server
    }
}

/// Three backups with four rows behind each, every row in a segment of its own: the first is 400 days old, the second
/// 20. The policy is a window of ten days.
pub(crate) struct Scene {
    pub(crate) stage: Stage,
    pub(crate) server: PgServer,
    pub(crate) store: Store,
    pub(crate) backups: Vec<String>,
    /// The transaction of each row.
    pub(crate) xids: Vec<String>,
}

impl Scene {
    /// Makes the scene with backups, and the WAL behind them, so many days old; what is behind the last one is of today.
    fn make(stage: Stage, store: impl FnOnce(&Stage) -> Store, major: u32, days: [u32; 3]) -> Self {
        let scene = Self::with_policy(stage, store, major, "window = \"10 days\"", days);
        for (id, days) in scene.backups.iter().zip(days) {
            scene.store.age(id, days);
        }
        scene
    }

    fn with_policy(
        stage: Stage,
        store: impl FnOnce(&Stage) -> Store,
        major: u32,
        policy: &str,
        days: [u32; 3],
    ) -> Self {
        let stage = stage.configured(&format!("[retention]\n{policy}\n"));
        let clock = Clock::new(&stage, days[0]);
        let server = clock.server(&stage, major);
        stage.init(&server);
        server.psql("create table t (id int)");
        let store = store(&stage);
        let (mut backups, mut xids) = (Vec::new(), Vec::new());
        for (round, days) in (0..).zip(days) {
            clock.set(days);
            let record: Value =
                serde_json::from_str(&stage.ok(&mut stage.walship_on(&server, &["backup", "--json"])))
                    .unwrap();
            backups.push(record["id"].as_str().unwrap().to_owned());
            if round == 2 {
                clock.set(0);
            }
            for row in 0..4 {
                let id = round * 4 + row;
                xids.push(
                    server.psql(&format!("insert into t values ({id}); select xmin from t where id = {id}")),
                );
                server.archive_now();
            }
        }
        Self { stage, server, store, backups, xids }
    }

    pub(crate) fn folder(major: u32) -> Self {
        Self::make(Stage::folder("main"), Store::folder, major, [400, 20, 0])
    }

    pub(crate) fn s3(server: &S3Server) -> Self {
        Self::s3_aged(server, [400, 20, 0])
    }

    fn s3_aged(server: &S3Server, days: [u32; 3]) -> Self {
        let stage = Stage::s3("main", &server.endpoint());
        Self::make(stage, |_| Store::s3(server), primary_major(), days)
    }

    pub(crate) fn expire(&self, words: &[&str]) -> Value {
        let text = self.stage.ok(self.stage.pitr(&["expire", "--json"]).args(words));
        let value: Value = serde_json::from_str(&text).unwrap();
        compare("pitr expire", std::slice::from_ref(&value), &[]);
        value["repositories"][0].clone()
    }

    pub(crate) fn hold_first(&self) -> String {
        let text = self.stage.ok(&mut self.stage.pitr(&[
            "hold",
            &self.backups[0],
            "--reason",
            "audit 17",
            "--json",
        ]));
        let held: Value = serde_json::from_str(&text).unwrap();
        compare("pitr hold", std::slice::from_ref(&held), &[]);
        held["hold"]["id"].as_str().unwrap().to_owned()
    }

    pub(crate) fn info(&self) -> Value {
        serde_json::from_str(&self.stage.ok(&mut self.stage.pitr(&["info", "--json"]))).unwrap()
    }

    pub(crate) fn plans(&self, words: &[&str]) -> bool {
        let output = self.stage.run(self.stage.pitr(&["plan"]).args(words));
        assert!([Some(0), Some(3)].contains(&output.status.code()), "{output:?}");
        output.status.success()
    }

    pub(crate) fn restored_rows(&self, name: &str, words: &[&str]) -> String {
        let place = Place::new(&self.stage, name, self.server.major());
        let mut restore = place.restore(&self.stage, words);
        self.stage.ok(restore.args(["--target-action", "promote"]));
        place.psql("select coalesce(string_agg(id::text, ' ' order by id), 'none') from t")
    }
}

pub(crate) fn ids(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect()
}

fn what_is_kept_is_restored(mut scene: Scene) {
    let hold = scene.hold_first();
    let keys = || -> BTreeSet<String> {
        scene.store.keys().into_iter().filter(|key| !key.contains("/history/")).collect()
    };
    let before = scene.store.keys();
    let shown = scene.expire(&[]);
    assert_eq!(scene.store.keys(), before, "without --confirm nothing is removed");
    assert_eq!(shown["report"], Value::Null);
    assert_eq!(shown["plan"]["backups_removed"], Value::Array(vec![]));
    assert!(!shown["plan"]["wal_removed"].as_array().unwrap().is_empty(), "{shown}");
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire", "--confirm"]), 2);
    assert!(refused.contains("has to be confirmed"), "{refused}");
    let before: BTreeSet<String> = before.into_iter().filter(|key| !key.contains("/history/")).collect();
    assert_eq!(keys(), before, "nobody said yes: that is on record");

    let done = scene.expire(&["--confirm", "--yes", "--reason", "weekly"]);
    assert!(done["report"]["objects"].as_u64().unwrap() > 0, "{done}");
    assert_eq!(
        done["report"]["objects"],
        shown["plan"]["wal_removed"]
            .as_array()
            .unwrap()
            .iter()
            .map(|wal| wal["objects"].as_u64().unwrap())
            .sum::<u64>()
    );
    let gone: Vec<String> = before.difference(&scene.store.keys()).cloned().collect();
    assert!(gone.iter().all(|key| key.contains("/wal/") || key.contains("/index/")), "{gone:?}");
    assert!(gone.iter().filter(|key| key.ends_with(".wal")).count() >= 2, "{gone:?}");

    // What was expired is told apart from what is missing.
    let info = scene.info();
    let gaps = info["timelines"][0]["gaps"].as_array().unwrap();
    assert!(gaps.len() == 1 && gaps[0]["expired"] == true, "{gaps:?}");
    assert_eq!(info["timelines"][0]["windows"][0]["ended_by"], "expired");
    assert_eq!(info["holds"][0]["id"], Value::String(hold.clone()));
    let text = scene.stage.ok(&mut scene.stage.pitr(&["info"]));
    assert!(text.contains("  expired  segment") && text.contains("what is behind it was expired"), "{text}");
    assert!(text.contains("audit 17") && !text.contains("  gap  "), "{text}");
    let check = scene.stage.run(&mut scene.stage.walship_on(&scene.server, &["check"]));
    let check = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.contains("has no open one"), "{check}");

    // A moment in the window, the end, and the old backup.
    assert!(scene.server.stop(StopMode::Fast).success());
    assert_eq!(scene.restored_rows("window", &["--to-xid", scene.xids[5].trim()]), "0 1 2 3 4 5");
    assert_eq!(scene.restored_rows("latest", &["--latest"]), "0 1 2 3 4 5 6 7 8 9 10 11");
    assert_eq!(scene.restored_rows("old", &["--immediate", "--backup", &scene.backups[0]]), "none");
    assert!(!scene.plans(&["--to-xid", scene.xids[3].trim()]), "its WAL was expired");
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["plan", "--to-xid", scene.xids[3].trim()]), 3);
    assert!(refused.contains("expired by"), "{refused}");
    assert_eq!(scene.expire(&[])["plan"]["wal_removed"], Value::Array(vec![]), "once is enough");

    // Without its holds (the restore had one as well) the old backup goes, with all that it needed.
    let released = scene.stage.ok(&mut scene.stage.pitr(&["release", &scene.backups[0], "--json"]));
    compare("pitr release", &[serde_json::from_str(&released).unwrap()], &[]);
    let done = scene.expire(&["--confirm", "--yes"]);
    assert_eq!(ids(&done["plan"]["backups_removed"]), [&scene.backups[0]]);
    assert_eq!(done["report"]["backups"], 1);
    let keys = scene.store.keys();
    assert!(!keys.iter().any(|key| key.contains("/backups/") && key.contains(&scene.backups[0])), "{keys:?}");
    assert!(!keys.iter().any(|key| key.contains("/expiring/") || key.contains("/locks/")), "{keys:?}");
    let ledger = keys.iter().filter(|key| key.contains("/gaps/")).count();
    assert_eq!(ledger, 1, "records of what was expired become one: {keys:?}");
    let history = keys.iter().filter(|key| key.contains("/history/expires/")).count();
    assert_eq!(history, 7, "begun and done, three times, and once which backup was removed: {keys:?}");
    let history: Value = serde_json::from_str(
        &scene.stage.ok(&mut scene.stage.pitr(&["history", "--only", "expire", "--json"])),
    )
    .unwrap();
    let entries = history["entries"].as_array().unwrap();
    let outcomes: Vec<_> = entries.iter().map(|entry| entry["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["removed", "removed", "refused"], "{history}");
    assert_eq!(entries[0]["bytes"], done["report"]["bytes"]);
    assert!(entries[0]["what"].as_str().unwrap().starts_with("1 backups, "), "{history}");
    let info = scene.info();
    assert_eq!(info["timelines"][0]["gaps"], Value::Array(vec![]));
    assert_eq!(ids(&info["backups"]), [&scene.backups[1], &scene.backups[2]]);
    assert!(scene.plans(&["--to-xid", scene.xids[5].trim()]));
    scene.stage.ok(&mut scene.stage.pitr(&["index", "--verify"]));
}

#[test]
fn what_is_kept_is_restored_from_a_folder() {
    for major in majors() {
        what_is_kept_is_restored(Scene::folder(major));
    }
}

#[test]
fn what_is_kept_is_restored_from_s3() {
    what_is_kept_is_restored(Scene::s3(&S3Server::start()));
}

#[test]
fn what_is_kept_is_restored_from_a_server_for_s3() {
    let weed = WeedServer::start();
    let config = weed.config("walship");
    let stage = Stage::s3("main", &weed.endpoint());
    // Nobody can tell it that something is old: what stays is counted.
    let store = |_: &Stage| Store::open(&config);
    let mut scene = Scene::with_policy(stage, store, primary_major(), "keep_last = 1", [0; 3]);
    let done = scene.expire(&["--confirm", "--yes"]);
    assert_eq!(ids(&done["plan"]["backups_kept"]), [&scene.backups[2]]);
    assert_eq!(done["report"]["backups"], 2);
    let keys = scene.store.keys();
    for gone in &scene.backups[..2] {
        assert!(!keys.iter().any(|key| key.contains("/backups/") && key.contains(gone)), "{keys:?}");
    }
    assert!(!keys.iter().any(|key| key.contains("/expiring/") || key.contains("/locks/")), "{keys:?}");
    assert!(scene.expire(&[])["plan"]["wal_removed"] == Value::Array(vec![]), "once is enough");
    scene.stage.ok(&mut scene.stage.pitr(&["index", "--verify"]));
    assert!(scene.server.stop(StopMode::Fast).success());
    assert!(!scene.plans(&["--to-xid", scene.xids[5].trim()]), "its WAL was expired");
    assert_eq!(scene.restored_rows("latest", &["--latest"]), "0 1 2 3 4 5 6 7 8 9 10 11");
}

fn changes(seen: &Seen) -> bool {
    seen.method == "PUT"
        || seen.method == "DELETE"
        || (seen.method == "POST" && seen.query.contains("delete"))
}

pub(crate) fn removes(seen: &Seen) -> bool {
    seen.method == "DELETE" || (seen.method == "POST" && seen.query.contains("delete"))
}

pub(crate) fn started(stage: &Stage, words: &[&str]) -> Child {
    let mut command = process::guarded(walship_tests::bins::pitr());
    command.args(words).env("WALSHIP_CONFIG", stage.config()).env("AWS_EC2_METADATA_DISABLED", "true");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    process::spawn(command).unwrap()
}

#[test]
fn killed_at_any_request_it_leaves_whole_chains_and_goes_on() {
    killed_at_any_request(&S3Server::start());
}

#[test]
fn killed_at_any_request_where_versions_are_kept_it_leaves_whole_chains_and_goes_on() {
    let server = S3Server::start();
    server.set_versioned(true);
    killed_at_any_request(&server);
}

fn killed_at_any_request(server: &S3Server) {
    let days = [400, 380, 20];
    let scene = Scene::s3_aged(server, days);
    scene.hold_first();
    // A verification has seen everything: what a removal removes is not missed, wherever it ends.
    let missed = || {
        let words = ["verify", "--json", "--no-server", "--budget", "1kB"];
        let report = parsed(&scene.stage.run(&mut scene.stage.pitr(&words)));
        [damage_of(&report, "missing"), damage_of(&report, "missing_end")].concat()
    };
    assert_eq!(missed(), Vec::<String>::new());
    let all: BTreeMap<_, _> = server.objects();
    let put_back = || {
        server.objects().keys().for_each(|key| assert!(server.remove(key)));
        all.iter().for_each(|(key, bytes)| server.put(key, bytes.clone()));
        // These were new again.
        for (id, days) in scene.backups.iter().zip(days) {
            scene.store.age_folder(id, days);
        }
    };
    let shown = scene.expire(&[]);
    assert_eq!(ids(&shown["plan"]["backups_removed"]), [&scene.backups[1]]);
    scene.expire(&["--confirm", "--yes"]);
    let expected = scene.store.kept_keys();
    assert!(expected.len() < all.len());

    let mut killed = 0;
    for most in 1.. {
        put_back();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        server.set_faults(move |seen| {
            let late = changes(seen) && counted.fetch_add(1, Ordering::SeqCst) >= most;
            late.then_some(Fault::S3(503, "SlowDown"))
        });
        let mut child = started(&scene.stage, &["expire", "--confirm", "--yes"]);
        let ended = || count.load(Ordering::SeqCst) > most;
        let mut status = None;
        wait::until("the removal comes to the request or to its end", || {
            status = child.try_wait().unwrap();
            ended() || status.is_some()
        });
        if let Some(status) = status.filter(|_| !ended()) {
            assert!(status.success());
            break;
        }
        process::signal(child.id(), Signal::SIGKILL);
        child.wait().unwrap();
        server.heal();
        killed += 1;
        assert_eq!(missed(), Vec::<String>::new(), "killed at change {most}");
        assert!(scene.plans(&["--immediate", "--backup", &scene.backups[0]]), "killed at change {most}");
        assert!(scene.plans(&["--to-xid", scene.xids[9].trim()]), "killed at change {most}");
        assert!(scene.plans(&["--latest"]), "killed at change {most}");
        for backup in scene.info()["backups"].as_array().unwrap() {
            let id = backup["id"].as_str().unwrap();
            let whole = scene.store.keys().iter().any(|key| key.contains(&format!("/backups/{id}/data/")));
            assert!(whole, "{id} is shown, and half removed, at change {most}");
        }
        scene.expire(&["--confirm", "--yes"]);
        assert_eq!(missed(), Vec::<String>::new(), "killed at change {most}");
        assert_eq!(scene.store.kept_keys(), expected, "killed at change {most}");
        let keys = scene.store.keys();
        assert!(!keys.iter().any(|key| key.contains("/expiring/")), "{most}: {keys:?}");
    }
    assert!(killed > 10, "{killed}");
}

/// As one leaves it that was killed after its last backup and before its mark.
#[test]
fn a_run_that_finds_nothing_but_a_mark_is_on_record() {
    let scene = Scene::folder(primary_major());
    let records = || {
        let keys = scene.store.keys().into_iter();
        keys.filter(|key| key.contains("/history/expires/")).collect::<Vec<_>>()
    };
    let shown = scene.expire(&["--confirm", "--yes"]);
    assert_eq!(ids(&shown["plan"]["backups_removed"]), [&scene.backups[0]]);
    let first = records();
    assert_eq!(first.len(), 3, "begun, removed and done: {first:?}");
    let (base, name) = first[0].split_once("/history/expires/").unwrap();
    let (run, _) = name.split_once('.').unwrap();
    let mark = format!("{base}/expiring/{}.{run}.json", scene.backups[0]);
    let folder = scene.stage.repository_dir().join(&mark).parent().unwrap().to_owned();
    std::fs::create_dir_all(&folder).unwrap();
    let owner = std::fs::metadata(folder.parent().unwrap()).unwrap();
    std::os::unix::fs::chown(&folder, Some(owner.uid()), Some(owner.gid())).unwrap();
    std::fs::write(scene.stage.repository_dir().join(&mark), "").unwrap();
    assert!(scene.store.keys().contains(&mark));
    scene.expire(&["--confirm", "--yes"]);
    assert!(!scene.store.keys().contains(&mark));
    assert_eq!(records().len(), first.len() + 2, "{:?}", records());
}

#[test]
fn an_incremental_backup_in_the_window_keeps_what_it_builds_on() {
    let stage = Stage::folder("main").configured("[retention]\nwindow = \"10 days\"\n");
    let ages = [400, 380, 360, 300, 40, 20, 0];
    let clock = Clock::new(&stage, ages[0]);
    let server = clock.server(&stage, primary_major());
    stage.init(&server);
    server.psql("create table t (id int)");
    let store = Store::folder(&stage);
    let (mut backups, mut xids) = (Vec::new(), Vec::new());
    // Two chains of a full and two incremental backups, and a full one.
    for (round, days) in ages.into_iter().enumerate() {
        clock.set(days);
        let words = ["backup", "--source", "local", "--json", "--incremental"];
        let full = round % 3 == 0;
        let taken = stage.ok(&mut stage.walship_on(&server, if full { &words[..4] } else { &words }));
        let record: Value = serde_json::from_str(&taken).unwrap();
        assert_eq!(record["parent"].is_null(), full, "{record}");
        backups.push(record["id"].as_str().unwrap().to_owned());
        xids.push(
            server.psql(&format!("insert into t values ({round}); select xmin from t where id = {round}")),
        );
        server.archive_now();
    }
    for (id, days) in backups.iter().zip(ages) {
        store.age(id, days);
    }
    let mut scene = Scene { stage, server, store, backups, xids };
    let done = scene.expire(&["--confirm", "--yes"]);
    let kept: BTreeSet<&str> = ids(&done["plan"]["backups_kept"]).into_iter().collect();
    assert_eq!(
        kept,
        scene.backups[3..].iter().map(String::as_str).collect(),
        "the window begins with the sixth"
    );
    assert_eq!(done["report"]["backups"], 3);
    assert_eq!(scene.info()["orphaned_backups"], Value::Array(vec![]));
    assert!(scene.server.stop(StopMode::Fast).success());
    assert_eq!(scene.restored_rows("window", &["--to-xid", scene.xids[5].trim()]), "0 1 2 3 4 5");
    let old = ["--immediate", "--backup", &scene.backups[4]];
    assert_eq!(scene.restored_rows("old", &old), "0 1 2 3");
}

#[test]
fn killed_at_any_moment_in_a_folder_it_leaves_whole_chains_and_goes_on() {
    let scene = Scene::make(Stage::folder("main"), Store::folder, primary_major(), [400, 380, 20]);
    scene.hold_first();
    let (now, before) = (scene.stage.repository_dir(), scene.stage.path().join("before"));
    process::copy_tree(&now, &before);
    let clock = std::time::Instant::now();
    scene.expire(&["--confirm", "--yes"]);
    let took = clock.elapsed().as_millis() as usize;
    let step = (took / 60).max(3);
    let expected = scene.store.kept_keys();
    let mut broken_off = 0;
    for millis in (0..).step_by(step) {
        std::fs::remove_dir_all(&now).unwrap();
        process::copy_tree(&before, &now);
        let mut child = started(&scene.stage, &["expire", "--confirm", "--yes"]);
        std::thread::sleep(Duration::from_millis(millis));
        process::signal(child.id(), Signal::SIGKILL);
        let whole = child.wait().unwrap().success();
        broken_off +=
            usize::from(!whole && scene.store.keys().iter().any(|key| key.contains("/history/expires/")));
        assert!(scene.plans(&["--immediate", "--backup", &scene.backups[0]]), "killed after {millis} ms");
        assert!(scene.plans(&["--to-xid", scene.xids[9].trim()]), "killed after {millis} ms");
        scene.expire(&["--confirm", "--yes"]);
        assert_eq!(scene.store.kept_keys(), expected, "killed after {millis} ms");
        if whole || millis as usize > 1000 + 4 * took {
            break;
        }
    }
    assert!(broken_off > 0, "it was never killed while it removed");
}

#[test]
fn a_store_that_forbids_removal_is_reported_and_nothing_changes() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let before = scene.store.kept_keys();
    server.set_faults(|seen| removes(seen).then_some(Fault::S3(403, "AccessDenied")));
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire", "--confirm", "--yes"]), 1);
    assert!(
        refused.contains("nothing can be removed") && refused.contains("expire_access_key_id"),
        "{refused}"
    );
    server.heal();
    assert_eq!(scene.store.kept_keys(), before);
    assert!(!scene.store.keys().iter().any(|key| key.contains("/gaps/") || key.contains("/expiring/")));
    assert!(scene.plans(&["--to-xid", scene.xids[1].trim()]), "all can be reached as before");

    // Objects that are locked one by one: what can go goes, the rest is told of and tried again.
    server.set_locked(Some("/wal/"));
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire", "--confirm", "--yes"]), 1);
    assert!(refused.contains("AccessDenied"), "{refused}");
    assert!(scene.plans(&["--to-xid", scene.xids[5].trim()]) && scene.plans(&["--latest"]));
    server.set_locked(None);
    server.set_versioned(true);
    let done = scene.expire(&["--confirm", "--yes"]);
    assert!(done["report"]["kept_as_versions"].as_u64().unwrap() > 0, "{done}");
    assert!(scene.plans(&["--to-xid", scene.xids[5].trim()]) && scene.plans(&["--latest"]));
}

#[test]
fn credentials_that_may_delete_are_for_expire_alone() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let config = std::fs::read_to_string(scene.stage.config()).unwrap();
    let rewrite = |from: &str, to: &str| {
        assert!(config.contains(from), "{config}");
        std::fs::write(scene.stage.config(), config.replace(from, to)).unwrap();
    };
    let own = format!("access_key_id = {ACCESS_KEY:?}\nsecret_access_key = {SECRET_KEY:?}\n");
    rewrite(&own, &format!("{own}expire_access_key_id = \"AKOTHER\"\nexpire_secret_access_key = \"psst\"\n"));
    scene.info();
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire"]), 1);
    assert!(refused.contains("403") && !refused.contains("psst"), "{refused}");
    rewrite(
        &own,
        &format!(
            "access_key_id = \"AKOTHER\"\nsecret_access_key = \"psst\"\nexpire_access_key_id = {ACCESS_KEY:?}\nexpire_secret_access_key = {SECRET_KEY:?}\n"
        ),
    );
    scene.stage.fails(&mut scene.stage.pitr(&["info"]), 1);
    assert!(scene.expire(&["--confirm", "--yes"])["report"]["objects"].as_u64().unwrap() > 0);
}

#[test]
fn two_removals_at_once_are_one() {
    let server = S3Server::start();
    let scene = Scene::s3(&server);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    // The first removal has the lock, and has to wait when it says what it is about to do; the other says why it does nothing.
    let of_first = std::sync::OnceLock::new();
    server.set_faults(move |seen| {
        let says = seen.method == "PUT" && seen.path.contains("/history/expires/");
        let waits = says && *of_first.get_or_init(|| seen.path.clone()) == seen.path;
        waits.then(|| counted.fetch_add(1, Ordering::SeqCst)).map(|_| Fault::S3(503, "SlowDown"))
    });
    let mut first = started(&scene.stage, &["expire", "--confirm", "--yes"]);
    wait::until("the first removal waits", || count.load(Ordering::SeqCst) > 0);
    let refused = scene.stage.fails(&mut scene.stage.pitr(&["expire", "--confirm", "--yes"]), 1);
    assert!(refused.contains("another removal is at work"), "{refused}");
    server.heal();
    assert!(first.wait().unwrap().success());
    assert_eq!(scene.expire(&["--confirm", "--yes"])["plan"]["wal_removed"], Value::Array(vec![]));
    // That it was run is on record, though there was nothing to do.
    let history = scene.stage.ok(&mut scene.stage.pitr(&["history", "--json", "--only", "expire"]));
    let history: Value = serde_json::from_str(&history).unwrap();
    let outcomes =
        history["entries"].as_array().unwrap().iter().map(|entry| entry["outcome"].as_str().unwrap());
    let outcomes: Vec<_> = outcomes.collect();
    assert_eq!(outcomes, ["nothing_to_remove", "refused", "removed"], "{history:#}");
}

/// Whatever the clock of the machine says that is wrong: the record is of when it was, and whoever watches hears of it at once.
#[test]
fn a_removal_that_is_refused_is_on_record_and_told_of() {
    let scene = Scene::folder(primary_major());
    let stage = &scene.stage;
    let entries = || -> Vec<Value> {
        let history = stage.ok(&mut stage.pitr(&["history", "--json", "--only", "expire"]));
        serde_json::from_str::<Value>(&history).unwrap()["entries"].as_array().unwrap().clone()
    };
    let told = || {
        let output = stage.run(&mut stage.walship(&["check", "--monitor", "--offline"]));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let sound = scene.store.kept_keys();
    scene.expire(&[]);
    assert_eq!(entries(), [] as [Value; 0], "without --confirm it only looks");
    for (round, clock) in ["-365d", "+365d"].iter().enumerate() {
        let mut expire = stage.pitr(&["expire", "--confirm", "--yes", "--reason", "nightly"]);
        expire.env("LD_PRELOAD", faketime()).env("FAKETIME", clock).env("NO_FAKE_STAT", "1");
        expire.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
        let said = stage.fails(&mut expire, 2);
        assert!(said.contains("this machine says that it is"), "{said}");
        let entries = entries();
        assert_eq!(entries.len(), round + 1, "{entries:#?}");
        assert_eq!((&entries[0]["outcome"], &entries[0]["reason"]), (&"refused".into(), &"nightly".into()));
        assert!(entries[0]["problems"][0].as_str().unwrap().contains("this machine says"), "{entries:#?}");
        let at: chrono::DateTime<chrono::Utc> = entries[0]["started"].as_str().unwrap().parse().unwrap();
        assert!((chrono::Utc::now() - at).abs() < chrono::TimeDelta::minutes(10), "{at}");
        assert!(told().contains("was refused: "), "{}", told());
    }
    // A policy that makes no sense, and one that nobody confirms.
    stage.fails(&mut stage.pitr(&["expire", "--confirm", "--yes", "--keep-for", "3 days"]), 2);
    stage.fails(stage.pitr(&["expire", "--confirm"]).stdin(Stdio::null()), 2);
    let problems: Vec<String> =
        entries().iter().map(|entry| entry["problems"][0].as_str().unwrap().to_owned()).collect();
    assert!(problems[0].contains("has to be confirmed"), "{problems:?}");
    assert!(problems[1].contains("contradicts itself"), "{problems:?}");
    assert_eq!(scene.store.kept_keys(), sound);
    // Once one does its work it is over.
    scene.expire(&["--confirm", "--yes"]);
    assert_eq!(entries()[0]["outcome"], "removed");
    assert!(!told().contains("removal by retention"), "{}", told());
    scene.expire(&["--confirm", "--yes"]);
    assert_eq!(entries()[0]["outcome"], "nothing_to_remove");
    assert!(!told().contains("removal by retention"), "{}", told());
}

#[test]
fn a_backup_under_way_keeps_its_wal() {
    let mut scene = Scene::folder(primary_major());
    let command = scene.server.psql("show archive_command");
    scene.server.psql("alter system set archive_command = 'false'");
    scene.server.psql("select pg_reload_conf()");
    let mut backup = scene.stage.walship_on(&scene.server, &["backup"]);
    backup.stdout(Stdio::null()).stderr(Stdio::null());
    let mut backup = process::spawn(backup).unwrap();
    wait::until("the backup has begun", || scene.info()["unfinished_backups"].as_array().unwrap().len() == 1);
    let id = scene.info()["unfinished_backups"][0]["id"].as_str().unwrap().to_owned();
    for row in 12..15 {
        scene.server.psql(&format!("insert into t values ({row}); select pg_switch_wal()"));
    }
    let done = scene.expire(&["--confirm", "--yes", "--window", "1 minutes", "--keep-last", "1"]);
    let kept = done["plan"]["backups_kept"].as_array().unwrap();
    let own = kept.iter().find(|backup| backup["id"] == Value::String(id.clone())).unwrap();
    assert!(own["reasons"][0].as_str().unwrap().contains("under way"), "{own}");
    scene.server.psql(&format!("alter system set archive_command = '{}'", command.replace('\'', "''")));
    scene.server.psql("select pg_reload_conf()");
    assert!(backup.wait().unwrap().success());
    scene.server.archive_now();
    assert!(scene.server.stop(StopMode::Fast).success());
    assert_eq!(
        scene.restored_rows("new", &["--latest", "--backup", &id]),
        "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14"
    );
}

#[test]
fn what_is_asked_wrongly_is_refused_with_nothing_lost() {
    let scene = Scene::folder(primary_major());
    let before = scene.store.keys();
    let fails = |words: &[&str], status: i32| scene.stage.fails(&mut scene.stage.pitr(words), status);
    let confirm = ["expire", "--confirm", "--yes"];
    let refused = fails(&[&confirm[..], &["--keep-for", "3 days"]].concat(), 2);
    assert!(refused.contains("contradicts itself"), "{refused}");
    let refused = fails(&[&confirm[..], &["--window", "fortnight"]].concat(), 2);
    assert!(refused.contains("no length of time"), "{refused}");
    assert!(fails(&["expire", "--yes"], 2).contains("--confirm"));
    assert!(
        fails(&["hold", "20260101T000000Z-0123456789abcdef", "--reason", "x"], 1)
            .contains("no complete backup")
    );
    assert!(fails(&["hold", &scene.backups[0], "--reason", " "], 2).contains("not empty"));
    assert!(
        fails(&["hold", &scene.backups[0], "--reason", "x", "--until", "2020-01-01 00:00Z"], 2)
            .contains("is over")
    );
    assert!(fails(&["release", &scene.backups[0]], 1).contains("no hold"));
    // All that comes is on record.
    let but_records = |mut keys: BTreeSet<String>| {
        keys.retain(|key| !key.contains("/history/"));
        keys
    };
    let before = but_records(before);
    let now = || but_records(scene.store.keys());
    assert_eq!(now(), before);

    // A hold that cannot be read may be on any backup; a record that cannot be read, of any.
    let holds = scene.stage.repository_dir().join("main/0001/holds");
    std::fs::create_dir_all(&holds).unwrap();
    let bad = holds.join("20260101T000000Z-0123456789abcdef.json");
    std::fs::write(&bad, "{").unwrap();
    assert!(fails(&confirm, 4).contains("nothing was removed"));
    std::fs::remove_file(&bad).unwrap();
    let record = scene.store.keys().into_iter().find(|key| key.contains("/backups/catalog/")).unwrap();
    let record = scene.stage.repository_dir().join(record);
    let sound = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    assert!(fails(&confirm, 4).contains("nothing was removed"));
    std::fs::write(&record, sound).unwrap();
    assert_eq!(now(), before);

    // A window longer than the archive.
    let shown = scene.expire(&["--window", "500 days", "--confirm", "--yes"]);
    assert_eq!(
        (&shown["plan"]["wal_removed"], &shown["report"]),
        (&Value::Array(vec![]), &Value::Null),
        "{shown}"
    );
}
