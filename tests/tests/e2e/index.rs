//! The index on real WAL: whatever becomes of it, plans are the same, and `pitr index` says and mends what is wrong.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tokio::runtime::Runtime;
use walship::storage::{ObjectKey, Storage, StorageConfig, list_all};
use walship_tests::postgres::{PgServer, PgServerBuilder, StopMode, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// The repository's objects, to be spoilt.
struct Store {
    runtime: Runtime,
    storage: std::sync::Arc<dyn Storage>,
}

impl Store {
    fn open(config: &StorageConfig) -> Self {
        let runtime = Runtime::new().unwrap();
        let storage = runtime.block_on(async { walship::storage::open(config) }).unwrap();
        Self { runtime, storage }
    }

    /// The keys and contents of all roll-ups and lists.
    fn index(&self) -> Vec<(ObjectKey, Vec<u8>)> {
        self.runtime.block_on(async {
            let listed = list_all(&*self.storage, "main/0001/index/", 10_000).await.unwrap();
            let mut index = Vec::new();
            for meta in listed {
                let bytes = self.storage.get(&meta.key, 1 << 30).await.unwrap().unwrap();
                index.push((meta.key, bytes.to_vec()));
            }
            index
        })
    }

    fn put(&self, key: &ObjectKey, bytes: Vec<u8>) {
        self.runtime.block_on(async {
            self.storage.delete(key).await.unwrap();
            self.storage.put_if_absent(key, bytes.into()).await.unwrap();
        });
    }

    fn delete(&self, key: &ObjectKey) {
        self.runtime.block_on(self.storage.delete(key)).unwrap();
    }

    /// Leaves exactly these in the index.
    fn restore(&self, index: &[(ObjectKey, Vec<u8>)]) {
        self.index().iter().for_each(|(key, _)| self.delete(key));
        index.iter().for_each(|(key, bytes)| self.put(key, bytes.clone()));
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Commits a row, and returns its transaction and commit time.
fn insert(server: &PgServer) -> (String, String) {
    let row = server.psql(
        "insert into t default values; select xmin, pg_xact_commit_timestamp(xmin) at time zone 'UTC' || 'Z' \
         from t order by id desc limit 1",
    );
    let (xid, time) = row.trim().split_once('|').unwrap();
    (xid.to_owned(), time.to_owned())
}

/// Archives a history of two timelines, and returns targets in it.
fn history(stage: &Stage, major: u32) -> Vec<Vec<String>> {
    let small = |server: PgServerBuilder| server.setting("track_commit_timestamp", "on");
    let mut first = small(stage.archiving(PgServer::builder(major).wal_segment_size_mb(1))).start();
    stage.init(&first);
    first.psql("create table t (id bigint generated always as identity)");
    stage.backup(&first);
    let mut targets: Vec<Vec<String>> = Vec::new();
    let mut add = |words: &[&str]| targets.push(words.iter().map(|word| (*word).to_owned()).collect());
    for round in 0..36 {
        let (xid, time) = insert(&first);
        if round % 12 == 3 {
            first.psql(&format!("select pg_create_restore_point('point {round}')"));
            add(&["--to-name", &format!("point {round}"), "--timeline", "1"]);
        }
        first.archive_now();
        if round % 12 == 5 {
            add(&["--to-xid", &xid, "--timeline", "1"]);
            add(&["--to-time", &time, "--timeline", "1", "--exclusive"]);
        }
        if round == 20 {
            stage.backup(&first);
        }
    }
    assert!(first.stop(StopMode::Fast).success());
    let dir = stage.path().join("second");
    stage.ok(stage.pitr(&["restore", "--latest", "--as", "production", "-D"]).arg(&dir));
    let mut second = small(stage.archiving(stage.recovering(&dir))).start();
    second.wait_for("select pg_is_in_recovery()", "f");
    for _ in 0..4 {
        let (xid, _) = insert(&second);
        second.archive_now();
        add(&["--to-xid", &xid]);
    }
    add(&["--latest"]);
    add(&["--latest", "--timeline", "1"]);
    assert!(second.stop(StopMode::Fast).success());
    targets
}

fn plans(stage: &Stage, targets: &[Vec<String>]) -> Vec<Value> {
    targets.iter().map(|target| json(&stage.ok(stage.pitr(&["plan", "--json"]).args(target)))).collect()
}

#[test]
fn plans_do_not_depend_on_the_index_in_a_folder() {
    let stage = Stage::folder("main");
    let config =
        StorageConfig { url: stage.url().to_owned(), s3: Default::default(), limits: Default::default() };
    plans_do_not_depend_on_the_index(&stage, &config, primary_major());
}

#[test]
fn plans_do_not_depend_on_the_index_on_s3() {
    let weed = WeedServer::start();
    let stage = Stage::s3("main", &weed.endpoint());
    plans_do_not_depend_on_the_index(&stage, &weed.config("walship"), newer_major());
}

fn plans_do_not_depend_on_the_index(stage: &Stage, config: &StorageConfig, major: u32) {
    let targets = history(stage, major);
    let store = Store::open(config);
    stage.ok(&mut stage.pitr(&["index"]));
    stage.ok(&mut stage.pitr(&["index", "--verify"]));
    let sound = store.index();
    assert!(sound.len() > 2, "{:?}", sound.iter().map(|(key, _)| key).collect::<Vec<_>>());
    let expected = plans(stage, &targets);
    for plan in &expected {
        let plan = &plan["plan"];
        assert_eq!(plan["wal_segments_checked"], plan["wal_segments"], "{plan:#}");
    }
    store.restore(&[]);
    assert_eq!(plans(stage, &targets), expected, "without an index");

    // Each kind of damage: what becomes of an object, and whether that is damage or only less.
    type Spoil = fn(usize, &[(ObjectKey, Vec<u8>)]) -> Option<Vec<u8>>;
    let kinds: [(&str, bool, Spoil); 5] = [
        ("cut", true, |at, index| Some(index[at].1[..index[at].1.len() / 2].to_vec())),
        ("flipped", true, |at, index| {
            let mut bytes = index[at].1.clone();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            Some(bytes)
        }),
        ("swapped", true, |at, index| Some(index[(at + 1) % index.len()].1.clone())),
        ("taken away here and there", false, |at, index| (at % 2 == 0).then(|| index[at].1.clone())),
        // Roll-ups of a place differ in how much they cover, in key order: only the first of each is left.
        ("set back", false, |at, index| {
            let place = |key: &ObjectKey| {
                key.as_str().rsplitn(3, ['-', '.']).last().map(|text| text[..text.len().min(40)].to_owned())
            };
            let first = at == 0 || place(&index[at - 1].0) != place(&index[at].0);
            first.then(|| index[at].1.clone())
        }),
    ];
    for (kind, is_damage, spoil) in kinds {
        let spoilt =
            sound.iter().enumerate().filter_map(|(at, (key, _))| Some((key.clone(), spoil(at, &sound)?)));
        store.restore(&spoilt.collect::<Vec<_>>());
        assert_eq!(plans(stage, &targets), expected, "index {kind}");
        let verified = stage.run(&mut stage.pitr(&["index", "--verify", "--json"]));
        let report = json(&String::from_utf8_lossy(&verified.stdout));
        let wrong = report["wrong"].as_array().unwrap().len();
        assert_eq!(verified.status.code(), Some(if is_damage { 4 } else { 0 }), "{kind}: {report:#}");
        assert_eq!(wrong, if is_damage { sound.len() } else { 0 }, "{kind}: {report:#}");
        if is_damage {
            stage.ok(&mut stage.pitr(&["index", "--rebuild"]));
        } else {
            stage.ok(&mut stage.pitr(&["index"]));
        }
        let mended = json(&stage.ok(&mut stage.pitr(&["index", "--verify", "--json"])));
        assert_eq!(mended["missing"], Value::Array(vec![]), "{kind}");
        assert_eq!(plans(stage, &targets), expected, "index {kind} and mended");
    }
}

#[test]
fn two_archivers_and_pitr_index_at_once_leave_a_sound_index() {
    let keep = Stage::folder("main");
    let server = PgServer::builder(primary_major())
        .wal_segment_size_mb(1)
        .setting("archive_mode", "on")
        .setting("archive_command", format!("cp %p {}/%f", keep.path().display()))
        .start();
    keep.init(&server);
    server.psql("create table t (id int)");
    let mut names: Vec<String> = Vec::new();
    for id in 0..48 {
        server.psql(&format!("insert into t values ({id})"));
        names.push(server.archive_now());
    }
    let push = |names: &[String]| {
        for name in names {
            // The path decides what it is; pushed from anywhere.
            let path = keep.path().join(name);
            keep.ok(keep.walship(&["wal", "push"]).arg(&path));
        }
    };
    let (even, odd): (Vec<_>, Vec<_>) = names.iter().cloned().enumerate().partition(|(at, _)| at % 2 == 0);
    let plain = |list: Vec<(usize, String)>| list.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    let (first, mut second) = (plain(even.clone()), plain(odd));
    // Every fourth comes twice.
    second.extend(first.iter().step_by(2).cloned());
    std::thread::scope(|scope| {
        let pushes = [scope.spawn(|| push(&first)), scope.spawn(|| push(&second))];
        while pushes.iter().any(|push| !push.is_finished()) {
            keep.ok(&mut keep.pitr(&["index"]));
        }
        pushes.into_iter().for_each(|push| push.join().unwrap());
    });
    keep.ok(&mut keep.pitr(&["index"]));
    let report = json(&keep.ok(&mut keep.pitr(&["index", "--verify", "--json"])));
    assert_eq!((&report["missing"], &report["wrong"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    assert_eq!(report["segments"], names.len());
    let index = Path::new(&keep.repository_dir()).join("main/0001/index");
    assert!(fs::read_dir(index).unwrap().count() > 0);
}
