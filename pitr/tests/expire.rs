//! Removal in a made-up repository: what others do at the same moment, outages at every call, an index that is behind.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::{DateTime, TimeDelta, Utc};
use pitr::execute::expire::{Prepared, Report, Request, carry_out, prepare, take_back_old_marks};
use pitr::execute::verify;
use pitr::retention::Policy;
use walship::Error;
use walship::catalog::{BackupObject, BackupRecord, HeldWal, Hold, ParentBackup};
use walship::config::RetentionSettings;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::repository::index::complete::{Options, Task, complete};
use walship::repository::testing::{made_up_object, made_up_summary};
use walship::repository::{BackupStarted, LineageRepository, Repository, load_catalog};
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage};
use walship::wal::testing::INITDB_LIMITS;

const SIZE: SegmentSize = SegmentSize::MIN;
const SEGMENTS: u64 = 300;
/// Backups begin with these segments, and are so many days old.
const BACKUPS: [(u64, i64); 4] = [(10, 400), (100, 40), (200, 20), (290, 1)];

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SIZE).unwrap()
}

fn id(at: usize) -> String {
    format!("2026010{}T010203Z-000000000000000{}", at + 1, at + 1)
}

/// How old what happened in a segment is: as old as the backups there.
fn age_of(number: u64) -> TimeDelta {
    let known = [(0, 402)].into_iter().chain(BACKUPS).chain([(SEGMENTS, 0)]).collect::<Vec<_>>();
    let at = known.iter().position(|(segment, _)| number < *segment).unwrap();
    let ((before, older), (behind, newer)) = (known[at - 1], known[at]);
    let minutes = older * 1440 * (behind - number) as i64 + newer * 1440 * (number - before) as i64;
    TimeDelta::minutes(minutes / (behind - before) as i64)
}

/// A repository, what it lies in, and what goes wrong there.
struct Scene {
    memory: MemoryStorage,
    faulty: FaultyStorage,
    repository: LineageRepository,
    now: DateTime<Utc>,
}

impl Scene {
    async fn make() -> Self {
        let (memory, now) = (MemoryStorage::new(), Utc::now());
        let faulty = FaultyStorage::new(Arc::new(memory.clone()));
        let repository = Repository::create(Arc::new(faulty.clone()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let repository = cluster.register_lineage(7, SIZE, 17, now).await.unwrap();
        for number in 1..SEGMENTS {
            let time = now - age_of(number);
            let summary = made_up_summary(repository.lineage(), name(number), 2 * number as u32, [time; 2]);
            repository.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
        }
        let scene = Self { memory, faulty, repository, now };
        for (at, (number, days)) in BACKUPS.iter().enumerate() {
            scene.backup(&id(at), *number, *days, None).await;
        }
        complete(&scene.repository, Options { task: Task::Complete, dry_run: false }).await.unwrap();
        scene
    }

    /// The same once more, on its own.
    async fn copy(&self) -> Self {
        let memory = self.memory.copy();
        let faulty = FaultyStorage::new(Arc::new(memory.clone()));
        let repository = Repository::open(Arc::new(faulty.clone())).await.unwrap();
        let cluster = repository.cluster(&"main".parse().unwrap()).await.unwrap();
        Self { memory, faulty, repository: cluster.newest_lineage().await.unwrap(), now: self.now }
    }

    fn started(&self, id: &str, number: u64, days: i64) -> BackupStarted {
        BackupStarted {
            format: 1,
            id: id.into(),
            label: "walship".into(),
            timeline: TimelineId::FIRST,
            start_lsn: Lsn(name(number).start(SIZE).0 + 40),
            host: "db1".into(),
            started: self.now - TimeDelta::days(days),
            parent: None,
        }
    }

    async fn backup(&self, id: &str, number: u64, days: i64, parent: Option<ParentBackup>) {
        let started = self.started(id, number, days);
        self.repository.put_backup_started(&started).await.unwrap();
        let mut upload = self.repository.start_backup_object(id, "data/000001.tar").await.unwrap();
        upload.write(vec![1; 100].into()).await.unwrap();
        upload.finish().await.unwrap();
        let manifest_digest =
            self.repository.put_backup_manifest(id, b"a manifest".to_vec().into()).await.unwrap();
        let record = BackupRecord {
            format: 1,
            id: id.into(),
            label: "walship".into(),
            timeline: TimelineId::FIRST,
            start_lsn: started.start_lsn,
            stop_timeline: TimelineId::FIRST,
            stop_lsn: Lsn(name(number).start(SIZE).0 + 5000),
            started: started.started,
            finished: started.started,
            server_version: 170_004,
            from_standby: false,
            data_bytes: 1000,
            stored_bytes: 100,
            files: 1,
            tablespaces: vec![],
            objects: vec![BackupObject {
                name: "data/000001.tar".into(),
                tablespace: None,
                stored_bytes: 100,
                tar_bytes: 1000,
                digest: String::new(),
                index: None,
                backup: None,
            }],
            limits: INITDB_LIMITS,
            data_checksums: false,
            manifest_digest,
            settings_files: vec![],
            names: None,
            prepared: None,
            damaged_pages: None,
            parent,
        };
        self.repository.put_backup_finishing(id, started.started).await.unwrap();
        self.repository.put_backup_record(&record).await.unwrap();
        self.memory.age(&format!("/backups/{id}/"), TimeDelta::days(days));
    }

    fn request(&self) -> Request {
        let settings = RetentionSettings { window: Some("10 days".parse().unwrap()), ..Default::default() };
        Request {
            policy: Policy::of(&settings).unwrap(),
            now: self.now,
            accept_idle: false,
            give_up: BTreeSet::new(),
            reason: None,
        }
    }

    async fn shown(&self) -> Prepared {
        prepare(&self.repository, &self.request()).await.unwrap()
    }

    async fn expire(&self) -> Result<Report, Error> {
        let shown = self.shown().await;
        carry_out(&self.repository, &self.request(), &shown.plan, &|_| {}).await
    }

    fn keys(&self, part: &str) -> BTreeSet<String> {
        self.memory.keys().into_iter().filter(|key| key.contains(part)).collect()
    }

    /// Everything but the history of removals, in which each attempt leaves its own.
    fn lasting(&self) -> BTreeSet<String> {
        let passing =
            |key: &String| key.contains("/history/") || key.contains("/gaps/") || key.contains("/locks/");
        self.keys("").into_iter().filter(|key| !passing(key)).collect()
    }

    async fn segments(&self) -> (u64, u64) {
        let catalog = load_catalog(&self.repository).await.unwrap();
        let runs = catalog.segments.runs(TimelineId::FIRST);
        (runs[0].first.number(SIZE), runs.last().unwrap().last.number(SIZE))
    }

    /// Marks a backup, as a removal that was killed then.
    fn mark(&self, backup: &str) {
        let key = format!("main/0001/expiring/{backup}.20260101T000000Z-0123456789abcdef.json");
        self.memory.overwrite(&ObjectKey::new(key).unwrap(), b"{}".to_vec());
    }

    /// Lets the newest backup have taken over what another has stored.
    async fn newest_goes_on_from(&self, lender: &str) {
        let key = ObjectKey::new(self.keys("/backups/catalog/").pop_last().unwrap()).unwrap();
        let stored = self.memory.get(&key, 1 << 20).await.unwrap().unwrap();
        let mut record: serde_json::Value = serde_json::from_slice(&stored).unwrap();
        record["objects"][0]["backup"] = lender.into();
        self.memory.overwrite(&key, serde_json::to_vec(&record).unwrap());
    }

    fn hold(&self, backup: &str) -> Hold {
        Hold {
            format: 1,
            id: "20260101T000000Z-0123456789abcdef".into(),
            backup: backup.into(),
            with: vec![],
            reason: "audit".into(),
            until: None,
            wal: None,
            created: self.now,
            host: "db1".into(),
            user: "dba".into(),
        }
    }
}

#[tokio::test]
async fn what_goes_is_gone_and_looking_writes_nothing() {
    let scene = Scene::make().await;
    let before = scene.memory.keys();
    let shown = scene.shown().await;
    assert_eq!(scene.memory.keys(), before);
    let report = scene.expire().await.unwrap();
    assert_eq!((report.backups, report.objects), (2, shown.total().objects));
    assert_eq!(scene.segments().await, (200, SEGMENTS - 1));
    assert_eq!(
        scene.keys("0001/backups/").len(),
        2 * 5,
        "a record, what it said at its begin and end, its data, its manifest; of two"
    );
    assert_eq!(scene.keys("/gaps/").len(), 1);
    assert_eq!((scene.keys("/expiring/").len(), scene.keys("/locks/").len()), (0, 0));
    let index = complete(&scene.repository, Options { task: Task::Verify, dry_run: false }).await.unwrap();
    assert_eq!((index.missing, index.wrong, index.segments), (vec![], vec![], SEGMENTS - 200));
}

#[tokio::test]
async fn an_index_that_is_behind_brings_nothing_back() {
    let scene = Scene::make().await;
    let index: Vec<String> = scene.keys("/index/").into_iter().collect();
    let mut stale = Vec::new();
    for key in index {
        let key = ObjectKey::new(key).unwrap();
        let bytes = scene.memory.get(&key, 1 << 30).await.unwrap().unwrap();
        stale.push((key, bytes));
    }
    scene.expire().await.unwrap();
    // Whoever archives had read the old one, and writes it only now.
    stale.into_iter().for_each(|(key, bytes)| scene.memory.overwrite(&key, bytes));
    assert_eq!(scene.segments().await, (200, SEGMENTS - 1));
    assert_eq!(load_catalog(&scene.repository).await.unwrap().backups.len(), 2);
    assert!(scene.shown().await.plan.is_empty());
    // What an archiver stores once more there goes at the next time.
    let summary = made_up_summary(scene.repository.lineage(), name(7), 14, [scene.now; 2]);
    scene.repository.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
    assert_eq!(scene.segments().await, (200, SEGMENTS - 1));
    assert_eq!(scene.expire().await.unwrap().objects, 1);
    assert_eq!(scene.keys("/gaps/").len(), 1);
}

#[tokio::test]
async fn a_backup_that_begins_at_the_same_moment_keeps_its_wal_or_hears_of_it() {
    let scene = Scene::make().await;
    let new = scene.started("20270101T010203Z-0123456789abcdef", 150, 0);
    let document = serde_json::to_vec(&new).unwrap();
    let memory = scene.memory.clone();
    let key = ObjectKey::new(format!("main/0001/backups/{}/started.json", new.id)).unwrap();
    // It says that it has begun just before the ledger says that its WAL goes.
    scene.faulty.set(move |call, asked| {
        if call == Call::Put && asked.contains("/gaps/") {
            memory.overwrite(&key, document.clone());
        }
        None
    });
    let error = scene.expire().await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)) && error.to_string().contains("needed since"), "{error}");
    scene.faulty.heal();
    assert_eq!(scene.keys("/gaps/").len(), 0, "what was not removed is not expired");
    assert_eq!(scene.segments().await, (1, SEGMENTS - 1));
    // The next removal leaves alone what it needs, and what comes behind it.
    scene.expire().await.unwrap();
    assert_eq!(scene.segments().await, (150, SEGMENTS - 1));
    let stretch = |number: u64| [(TimelineId::FIRST, name(number).start(SIZE), Lsn(u64::MAX))];
    assert!(scene.repository.check_wal_not_expired(&stretch(150)).await.is_ok());
    // One that began before that place hears of it.
    let error = scene.repository.check_wal_not_expired(&stretch(149)).await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)) && error.to_string().contains("expired by"), "{error}");
}

#[tokio::test]
async fn a_hold_at_the_same_moment_keeps_its_backup_or_hears_of_it() {
    let scene = Scene::make().await;
    let before = scene.lasting();
    let hold = scene.hold(&id(0));
    let document = serde_json::to_vec(&hold).unwrap();
    let memory = scene.memory.clone();
    let key = ObjectKey::new(format!("main/0001/holds/{}.json", hold.id)).unwrap();
    scene.faulty.set(move |call, asked| {
        if call == Call::Put && asked.contains("/expiring/") {
            memory.overwrite(&key, document.clone());
        }
        None
    });
    let error = scene.expire().await.unwrap_err();
    assert!(error.to_string().contains(&format!("backup {} was to go", id(0))), "{error}");
    scene.faulty.heal();
    let after: BTreeSet<String> = scene.lasting().difference(&before).cloned().collect();
    assert_eq!(after, scene.keys("/holds/"), "nothing was removed, no mark is left");
    assert!(scene.lasting().is_superset(&before));
    // While it is marked, who holds it hears of it.
    scene.faulty.set(|call, _| (call == Call::Remove).then_some(Fault::Unavailable));
    scene.repository.check_not_expiring(&id(1)).await.unwrap();
    scene.faulty.heal();
    let report = scene.expire().await.unwrap();
    assert_eq!(report.backups, 1);
    assert!(load_catalog(&scene.repository).await.unwrap().backups.iter().any(|backup| backup.id == id(0)));
}

#[tokio::test]
async fn outages_at_any_call_leave_what_the_next_run_ends() {
    let original = Scene::make().await;
    let expected = {
        let scene = original.copy().await;
        scene.expire().await.unwrap();
        scene.lasting()
    };
    for most in 0.. {
        let scene = original.copy().await;
        let shown = scene.shown().await;
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        // The store is gone from this call on; every other time the last answer alone is lost.
        scene.faulty.set(move |call, _| {
            let changes = matches!(call, Call::Put | Call::Remove);
            let late = changes && counted.fetch_add(1, Ordering::SeqCst) >= most;
            late.then_some(if most % 2 == 0 { Fault::Unavailable } else { Fault::AnswerLost })
        });
        let done = carry_out(&scene.repository, &scene.request(), &shown.plan, &|_| {}).await;
        let reached = count.load(Ordering::SeqCst) > most;
        scene.faulty.heal();
        if !reached {
            assert!(done.is_ok());
            assert!(most > 20, "{most}");
            return;
        }
        let catalog = load_catalog(&scene.repository).await.unwrap();
        for backup in &catalog.backups {
            assert_eq!(scene.keys(&format!("/backups/{}/", backup.id)).len(), 4, "half removed at {most}");
        }
        // Another machine's lock is over after ten minutes; this one's process is alive, so it is taken away here.
        scene
            .keys("/locks/")
            .iter()
            .for_each(|key| scene.memory.remove(&ObjectKey::new(key.clone()).unwrap()));
        scene.expire().await.unwrap();
        let left = scene.lasting();
        let differs: Vec<_> =
            left.symmetric_difference(&expected).filter(|key| !key.contains("/index/")).collect();
        assert!(differs.is_empty(), "{most}: {differs:?}");
    }
}

#[tokio::test]
async fn what_builds_on_a_backup_goes_before_it() {
    let scene = Scene::make().await;
    let parent = |at: usize, depth| ParentBackup {
        id: id(at),
        timeline: TimelineId::FIRST,
        start_lsn: Lsn(name(BACKUPS[at].0).start(SIZE).0 + 40),
        depth,
    };
    let child = "20260105T010203Z-0123456789abcdef";
    scene.backup(child, 50, 300, Some(parent(0, 1))).await;
    let memory = scene.memory.clone();
    scene.faulty.set(move |call, asked| {
        if call == Call::Remove && asked.contains("/backups/catalog/") && asked.contains(&id(0)) {
            assert!(!memory.keys().iter().any(|key| key.contains("/catalog/") && key.contains(child)));
        }
        None
    });
    assert_eq!(scene.expire().await.unwrap().backups, 3);
    let kept = load_catalog(&scene.repository).await.unwrap();
    // Who has built on one that is gone hears of it.
    let orphan = BackupRecord { parent: Some(parent(0, 1)), ..kept.backups[0].clone() };
    assert!(matches!(scene.repository.check_foundations(&orphan).await, Err(Error::Conflict(_))));
    // And who is gone itself, in one repository of several for instance.
    let swept = BackupRecord { id: id(0), parent: None, ..kept.backups[0].clone() };
    let error = scene.repository.check_foundations(&swept).await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)) && error.to_string().contains("started.json"), "{error}");
    for (name, what) in [("manifest.json.zst", "manifest"), ("data/000001.tar", "000001")] {
        let damaged = scene.copy().await;
        damaged.memory.remove(&ObjectKey::new(format!("main/0001/backups/{}/{name}", id(2))).unwrap());
        let whole = damaged.repository.whole_record(&kept.backups[0]).await.unwrap();
        let error = damaged.repository.check_foundations(&whole).await.unwrap_err();
        assert!(matches!(error, Error::Conflict(_)) && error.to_string().contains(what), "{error}");
    }
    let lender = |name: &str| {
        let mut record = kept.backups[1].clone();
        record.objects = vec![BackupObject {
            name: name.into(),
            tablespace: None,
            stored_bytes: 100,
            tar_bytes: 1000,
            digest: String::new(),
            index: None,
            backup: Some(id(2)),
        }];
        record
    };
    assert!(scene.repository.check_foundations(&lender("data/000001.tar")).await.is_ok());
    assert!(matches!(
        scene.repository.check_foundations(&lender("data/000002.tar")).await,
        Err(Error::Conflict(_))
    ));
    let sound = BackupRecord { parent: Some(parent(2, 1)), ..kept.backups[1].clone() };
    assert!(scene.repository.check_foundations(&sound).await.is_ok());
}

#[tokio::test]
async fn a_lock_of_another_machine_holds_until_its_time_is_over() {
    let scene = Scene::make().await;
    let lock = |until: DateTime<Utc>| {
        serde_json::json!({
            "format": 1, "run": "20260101T000000Z-0123456789abcdef", "host": "elsewhere", "user": "dba", "pid": 1,
            "taken": scene.now, "until": until
        })
    };
    let key = ObjectKey::new("main/0001/locks/expire/00000007.json").unwrap();
    scene.memory.overwrite(&key, serde_json::to_vec(&lock(scene.now + TimeDelta::minutes(5))).unwrap());
    let error = scene.expire().await.unwrap_err();
    assert!(
        error.to_string().contains("another removal is at work") && error.to_string().contains("elsewhere"),
        "{error}"
    );
    assert_eq!(scene.segments().await, (1, SEGMENTS - 1));
    // By the store's clock, whatever its own said.
    scene.memory.overwrite(&key, serde_json::to_vec(&lock(scene.now - TimeDelta::minutes(5))).unwrap());
    scene.expire().await.unwrap_err();
    scene.memory.age("/locks/", TimeDelta::minutes(11));
    scene.expire().await.unwrap();
    assert_eq!(scene.keys("/locks/").len(), 0);

    // Of a machine whose clock is ahead: after ten minutes by the store's clock nobody has renewed it.
    let ahead = |minutes: i64| {
        let mut lock = lock(scene.now + TimeDelta::minutes(minutes + 10));
        lock["taken"] = serde_json::to_value(scene.now + TimeDelta::minutes(minutes)).unwrap();
        serde_json::to_vec(&lock).unwrap()
    };
    let over = async |document: Vec<u8>, minutes_ago: i64| {
        scene.memory.overwrite(&key, document);
        scene.memory.age("/locks/", TimeDelta::minutes(minutes_ago));
        let begun = scene.repository.begin_removal("20260102T000000Z-0123456789abcdef", Utc::now()).await;
        match begun {
            Ok(remover) => {
                remover.end().await;
                assert_eq!(scene.keys("/locks/").len(), 0);
                true
            }
            Err(error) => {
                assert!(matches!(error, Error::Unavailable(_)), "{error}");
                assert!(error.safe().contains("nothing was removed"), "{error}");
                assert_eq!(scene.keys("/locks/").len(), 1, "nothing but the other's is left");
                false
            }
        }
    };
    assert!(!over(ahead(14), 9).await && over(ahead(14), 11).await);
    // So is one that cannot be read.
    for unreadable in ["{}", "{\"format\": 9}", ""] {
        assert!(!over(unreadable.into(), 9).await && over(unreadable.into(), 11).await, "{unreadable}");
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_by_a_year_removes_nothing() {
    let scene = Scene::make().await;
    let before = scene.lasting();
    for (by, idle) in [(365, false), (-365, false), (-365, true)] {
        let request = Request { now: scene.now + TimeDelta::days(by), accept_idle: idle, ..scene.request() };
        let error = prepare(&scene.repository, &request).await.unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        let shown = scene.shown().await;
        carry_out(&scene.repository, &request, &shown.plan, &|_| {}).await.unwrap_err();
        assert_eq!(scene.lasting(), before);
    }
}

#[tokio::test]
async fn more_than_was_shown_is_not_removed() {
    let scene = Scene::make().await;
    let hold = scene.hold(&id(0));
    scene.repository.put_hold(&hold).await.unwrap();
    let shown = scene.shown().await;
    scene.repository.release_hold(&walship::repository::released_now(&hold.id, scene.now)).await.unwrap();
    let before = scene.lasting();
    let error = carry_out(&scene.repository, &scene.request(), &shown.plan, &|_| {}).await.unwrap_err();
    assert!(error.to_string().contains("something changed meanwhile"), "{error}");
    assert_eq!(scene.lasting(), before);
}

/// Says what a backup that is being taken says at its start, and stores an object of it.
async fn begin(scene: &Scene, id: &str, number: u64, days: i64) {
    scene.repository.put_backup_started(&scene.started(id, number, days)).await.unwrap();
    let mut upload = scene.repository.start_backup_object(id, "data/000001.tar").await.unwrap();
    upload.write(vec![1; 100].into()).await.unwrap();
    upload.finish().await.unwrap();
}

const SLOW: &str = "20260106T010203Z-0123456789abcdef";

#[tokio::test]
async fn the_age_of_a_backup_under_way_is_that_of_what_it_stored_last_by_the_stores_clock() {
    let scene = Scene::make().await;
    // It began long ago, and still stores.
    begin(&scene, SLOW, 150, 30).await;
    scene.expire().await.unwrap();
    assert_eq!(scene.segments().await.0, 150);
    assert_eq!(scene.keys(&format!("/backups/{SLOW}/")).len(), 2);
    scene.memory.age(SLOW, TimeDelta::days(8));
    scene.expire().await.unwrap();
    assert_eq!(scene.segments().await.0, 200);
    assert_eq!(scene.keys(SLOW).len(), 0);
}

#[tokio::test]
async fn a_backup_that_was_given_up_and_ends_at_the_same_moment_stays_or_hears_of_it() {
    let original = Scene::make().await;
    begin(&original, SLOW, 150, 30).await;
    let whole = [("manifest.json.zst", b"a manifest".to_vec()), ("finishing.json", finishing())];
    let folder = |name: &str| ObjectKey::new(format!("main/0001/backups/{SLOW}/{name}")).unwrap();
    let record = {
        let scene = original.copy().await;
        scene.backup(SLOW, 150, 30, None).await;
        load_catalog(&scene.repository).await.unwrap().backups.into_iter().find(|b| b.id == SLOW).unwrap()
    };
    let record_key = original_record_key(&record);
    // Right before each of the removal's steps it says that it is about to end; or has ended already.
    for (before, ended) in [("/expiring/", false), ("/expiring/", true), ("/gaps/", false)] {
        let scene = original.copy().await;
        scene.memory.age(SLOW, TimeDelta::days(8));
        let (memory, document) = (scene.memory.clone(), serde_json::to_vec_pretty(&record).unwrap());
        let (whole, record_key) = (whole.clone(), record_key.clone());
        scene.faulty.set(move |call, asked| {
            if call == Call::Put && asked.contains(before) {
                for (name, bytes) in &whole {
                    memory.overwrite(&folder(name), bytes.clone());
                }
                if ended {
                    memory.overwrite(&record_key, document.clone());
                    // Whatever the store says of its age.
                    memory.age(SLOW, TimeDelta::days(8));
                }
            }
            None
        });
        let done = scene.expire().await;
        scene.faulty.heal();
        if before == "/gaps/" {
            // Too late for its folder, which was marked before: it hears of that.
            let heard = scene.repository.check_foundations(&record).await.unwrap_err();
            assert!(matches!(heard, Error::Conflict(_)), "{heard}");
            continue;
        }
        let error = done.unwrap_err();
        assert!(error.to_string().contains("needed since"), "{before} {ended}: {error}");
        assert_eq!(scene.keys("/expiring/").len(), 0);
        scene.repository.check_foundations(&record).await.unwrap();
        if !ended {
            scene.expire().await.unwrap();
            assert_eq!(scene.segments().await.0, 150);
            scene.repository.check_foundations(&record).await.unwrap();
        }
    }
    // Marked, it hears of it before it has a record.
    let scene = original.copy().await;
    let mark = ObjectKey::new(format!("main/0001/expiring/{SLOW}.20260101T000000Z-0123456789abcdef.json"));
    scene.memory.overwrite(&mark.unwrap(), b"{}".to_vec());
    scene.memory.overwrite(&folder("manifest.json.zst"), b"a manifest".to_vec());
    assert!(matches!(scene.repository.check_foundations(&record).await, Err(Error::Conflict(_))));
}

fn finishing() -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({ "format": 1, "id": SLOW, "finishing": Utc::now() })).unwrap()
}

fn original_record_key(record: &BackupRecord) -> ObjectKey {
    let BackupRecord { id, timeline, start_lsn, stop_lsn, .. } = record;
    ObjectKey::new(format!(
        "main/0001/backups/catalog/{}-{:016X}-{:016X}-{id}.json",
        timeline.hex(),
        start_lsn.0,
        stop_lsn.0
    ))
    .unwrap()
}

#[tokio::test]
async fn a_complete_backup_whose_objects_another_took_over_stays_with_it() {
    let scene = Scene::make().await;
    // The first backup was being taken when the newest began, and completed later.
    let newest = load_catalog(&scene.repository).await.unwrap().backups.pop().unwrap();
    let mut record = scene.repository.whole_record(&newest).await.unwrap();
    record.objects.push(BackupObject { backup: Some(id(0)), ..record.objects[0].clone() });
    let key = original_record_key(&record);
    scene.memory.overwrite(&key, serde_json::to_vec_pretty(&record).unwrap());
    for list in scene.keys("/index/") {
        scene.memory.remove(&ObjectKey::new(list).unwrap());
    }
    assert_eq!(scene.expire().await.unwrap().backups, 1, "the second alone");
    scene.repository.check_backup_here(&record).await.unwrap();
    assert_eq!(scene.keys(&format!("/backups/{}/", id(0))).len(), 4);
    assert_eq!(scene.keys("/backups/catalog/").len(), 3);
}

#[tokio::test]
async fn backups_whose_objects_are_gone_push_out_no_others() {
    for part in ["data/000001.tar", "manifest.json.zst"] {
        let scene = Scene::make().await;
        let gone = |at: usize| ObjectKey::new(format!("main/0001/backups/{}/{part}", id(at))).unwrap();
        // With the one that the window begins with broken, it begins with the one before.
        scene.memory.remove(&gone(2));
        let shown = scene.shown().await;
        let kept: Vec<&str> = shown.plan.backups_kept.iter().map(|backup| &*backup.id).collect();
        assert_eq!(kept, [id(3), id(2), id(1)], "{part}");
        assert_eq!(scene.expire().await.unwrap().backups, 1);
        assert_eq!(scene.segments().await.0, 100);
        // The newest broken: nothing goes any more.
        scene.memory.remove(&gone(3));
        let before = scene.lasting();
        let error = prepare(&scene.repository, &scene.request()).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains(&id(3)), "{error}");
        assert_eq!(scene.lasting(), before);
    }
}

#[tokio::test]
async fn a_complete_backup_whose_record_is_gone_is_not_taken_for_one_that_was_given_up() {
    let original = Scene::make().await;
    let records: Vec<ObjectKey> =
        original.keys("/backups/catalog/").into_iter().map(|key| ObjectKey::new(key).unwrap()).collect();
    let own_object =
        |at: usize, name: &str| ObjectKey::new(format!("main/0001/backups/{}/{name}", id(at))).unwrap();
    let stays = async |scene: &Scene, at: usize| {
        let plan = scene.shown().await.plan;
        assert!(plan.backups_kept.iter().any(|backup| backup.id == id(at)), "{plan:#?}");
        assert!(plan.notes.iter().any(|note| note.contains(&id(at)) && note.contains("backups/catalog/")));
        plan.wal_kept.iter().map(|wal| wal.segments).sum::<u64>()
    };
    // A copy was broken off: some records have come, and no index.
    let scene = original.copy().await;
    let index = scene.keys("/index/").into_iter().map(|key| ObjectKey::new(key).unwrap());
    records[1..=1].iter().cloned().chain(index).for_each(|key| scene.memory.remove(&key));
    scene.memory.age("", TimeDelta::days(30));
    assert_eq!(stays(&scene, 1).await, SEGMENTS - BACKUPS[1].0, "its WAL stays as well");
    // What it said at its start is gone too: all WAL may be needed.
    scene.memory.remove(&own_object(1, "started.json"));
    assert_eq!(stays(&scene, 1).await, SEGMENTS - 1);
    // Unless somebody says that it was given up.
    scene.repository.put_backup_started(&scene.started(&id(1), BACKUPS[1].0, BACKUPS[1].1)).await.unwrap();
    scene.memory.age("", TimeDelta::days(30));
    let request = Request { give_up: BTreeSet::from([id(1)]), ..scene.request() };
    let plan = prepare(&scene.repository, &request).await.unwrap().plan;
    assert!(plan.backups_removed.iter().any(|backup| backup.id == id(1)), "{plan:#?}");
    // One that never came so far was given up.
    let scene = original.copy().await;
    scene.memory.remove(&records[1]);
    scene.memory.remove(&own_object(1, "finishing.json"));
    scene.memory.age("", TimeDelta::days(30));
    let plan = scene.shown().await.plan;
    assert!(plan.backups_removed.iter().any(|backup| backup.id == id(1)), "{plan:#?}");

    // One that a removal had marked is half removed.
    let scene = original.copy().await;
    scene.memory.remove(&records[2]);
    scene.memory.age("", TimeDelta::days(30));
    scene.mark(&id(2));
    let plan = scene.shown().await.plan;
    assert!(plan.backups_removed.iter().any(|backup| backup.id == id(2)), "{plan:#?}");
    // A hold keeps that, and the mark stays, which tells it from what has lost its record.
    scene.repository.put_hold(&scene.hold(&id(2))).await.unwrap();
    scene.memory.age("/expiring/", TimeDelta::days(1));
    scene.expire().await.unwrap();
    assert_eq!(scene.keys("/expiring/").len(), 1);
    scene.shown().await;
}

#[tokio::test]
async fn a_lost_record_stops_retention_of_nothing_that_came_later() {
    let scene = Scene::make().await;
    // A backup whose last step failed, a year ago; the next one went on from it.
    let failed = "20251201T000000Z-00000000000000aa";
    scene.backup(failed, 9, 401, None).await;
    let record = scene.keys("/backups/catalog/").into_iter().find(|key| key.contains(failed)).unwrap();
    scene.memory.remove(&ObjectKey::new(record).unwrap());
    let plan = scene.shown().await.plan;
    let reasons = |id: &str| -> String {
        let kept = plan.backups_kept.iter().find(|backup| backup.id == id);
        kept.map_or_else(String::new, |kept| kept.reasons.join("; "))
    };
    assert!(reasons(failed).contains("but its record"), "{plan:#?}");
    assert!(reasons(&id(0)).contains("may have taken over"), "it was under way then: {plan:#?}");
    assert_eq!(reasons(&id(1)), "", "{plan:#?}");
    assert!(plan.notes.iter().any(|note| note.contains("--give-up")), "{plan:#?}");
}

#[tokio::test]
async fn old_marks_of_whole_backups_are_taken_back_also_while_nothing_can_go() {
    let scene = Scene::make().await;
    for at in [0, 1] {
        scene.mark(&id(at));
    }
    scene.memory.age(&format!("/expiring/{}", id(0)), TimeDelta::hours(2));
    let data = format!("main/0001/backups/{}/data/000001.tar", id(3));
    scene.memory.remove(&ObjectKey::new(data).unwrap());
    assert!(matches!(prepare(&scene.repository, &scene.request()).await, Err(Error::Corrupt(_))));
    // With that of one that never became complete, from which the newest went on.
    let lender = "20251201T000000Z-00000000000000aa";
    scene.newest_goes_on_from(lender).await;
    scene.mark(lender);
    scene.memory.age(&format!("/expiring/{lender}"), TimeDelta::hours(2));
    take_back_old_marks(&scene.repository).await.unwrap();
    for whole in [&id(0), lender] {
        assert!(scene.repository.check_not_expiring(whole).await.is_ok(), "{whole}");
    }
    assert!(scene.repository.check_not_expiring(&id(1)).await.is_err(), "its removal may not have ended");
    assert_eq!(scene.keys("/locks/").len(), 0);
}

#[tokio::test]
async fn the_mark_of_what_a_kept_backup_has_taken_over_is_taken_back() {
    let scene = Scene::make().await;
    // The newest has taken over what one stored that never became complete; a removal that was killed had marked that.
    let given_up = "20260101T000000Z-00000000000000aa";
    scene.repository.put_backup_started(&scene.started(given_up, 100, 200)).await.unwrap();
    let mut upload = scene.repository.start_backup_object(given_up, "data/000001.tar").await.unwrap();
    upload.write(vec![1; 100].into()).await.unwrap();
    upload.finish().await.unwrap();
    scene.newest_goes_on_from(given_up).await;
    scene.mark(given_up);
    scene.memory.age("/expiring/", TimeDelta::days(1));
    scene.expire().await.unwrap();
    assert!(scene.keys("/expiring/").is_empty());
    assert!(!scene.keys(given_up).is_empty());
    assert!(scene.repository.check_not_expiring(given_up).await.is_ok());
}

#[tokio::test]
async fn what_is_stored_is_listed_and_not_taken_from_the_index() {
    let scene = Scene::make().await;
    // A segment behind the backup that the window begins with; the index still tells of it.
    let lost = scene.keys("/wal/").into_iter().find(|key| key.contains(&name(250).to_string())).unwrap();
    scene.memory.remove(&ObjectKey::new(lost).unwrap());
    assert!(load_catalog(&scene.repository).await.unwrap().segments.contains(name(250)));
    let kept = scene.shown().await.plan.wal_kept;
    assert_eq!(kept.iter().map(|wal| wal.segments).sum::<u64>(), SEGMENTS - 200 - 1, "{kept:#?}");
    // One that makes the newest backup consistent.
    let lost = scene.keys("/wal/").into_iter().find(|key| key.contains(&name(290).to_string())).unwrap();
    scene.memory.remove(&ObjectKey::new(lost).unwrap());
    let error = prepare(&scene.repository, &scene.request()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains(&id(3)), "{error}");
}

#[tokio::test]
async fn a_backup_is_as_old_as_the_store_says() {
    let scene = Scene::make().await;
    // The machine that took it had a clock that was weeks behind.
    scene.backup("20260105T010203Z-0123456789abcdef", 295, 300, None).await;
    scene.memory.age("20260105T010203Z-0123456789abcdef", -TimeDelta::days(300));
    let kept: Vec<String> =
        scene.shown().await.plan.backups_kept.into_iter().map(|backup| backup.id).collect();
    assert!(kept.contains(&id(2)) && kept.contains(&id(3)), "the window does not begin with it: {kept:?}");
    // One from the future blocks nothing where the store knows better.
    scene.backup("20260106T010203Z-0123456789abcdef", 297, -3000, None).await;
    scene.memory.age("20260106T010203Z-0123456789abcdef", TimeDelta::days(3000));
    assert_eq!(scene.expire().await.unwrap().backups, 2);
}

#[tokio::test]
async fn where_all_clocks_were_wrong_the_first_moment_of_the_window_stays() {
    let scene = Scene::make().await;
    let settings = RetentionSettings { window: Some("500 days".parse().unwrap()), ..Default::default() };
    let request = Request { policy: Policy::of(&settings).unwrap(), ..scene.request() };
    let shown = prepare(&scene.repository, &request).await.unwrap();
    assert!(shown.plan.is_empty(), "the window is longer than the archive");
    // A backup of today, by its host and by the store older than all.
    scene.backup("20240105T010203Z-0123456789abcdef", 295, 600, None).await;
    let error = prepare(&scene.repository, &request).await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)), "{error}");
    assert!(error.to_string().contains("the first moment of the window on timeline 1"), "{error}");
}

#[tokio::test]
async fn a_restores_hold_lasts_a_day_by_the_stores_clock() {
    let original = Scene::make().await;
    let wal = HeldWal {
        timeline: TimelineId::FIRST,
        start_lsn: Some(name(10).start(SIZE)),
        through_lsn: Some(name(20).start(SIZE)),
    };
    let kept = async |clock: i64, hours_ago: i64| {
        let scene = original.copy().await;
        let created = scene.now + TimeDelta::days(clock);
        let hold =
            Hold { until: Some(created + TimeDelta::days(1)), wal: Some(wal), created, ..scene.hold(&id(0)) };
        scene.repository.put_hold(&hold).await.unwrap();
        scene.memory.age("/holds/", TimeDelta::hours(hours_ago));
        let plan = scene.shown().await.plan;
        plan.backups_kept.iter().any(|backup| backup.id == id(0))
    };
    for clock in [0, -30, 3000] {
        assert!(kept(clock, 23).await, "{clock}");
        assert!(!kept(clock, 25).await, "{clock}");
    }
}

#[tokio::test]
async fn a_hold_that_came_when_a_removal_was_killed_brings_back_its_wal() {
    let scene = Scene::make().await;
    for at in [0, 1] {
        let hold = Hold { id: format!("2026010{}T000000Z-0123456789abcdef", at + 1), ..scene.hold(&id(at)) };
        scene.repository.put_hold(&hold).await.unwrap();
    }
    // Both old backups are held, and nothing but WAL goes; killed when the ledger tells of it, and nothing is gone yet.
    scene
        .faulty
        .set(|call, asked| (call == Call::Remove && asked.contains("/index/")).then_some(Fault::Unavailable));
    scene.expire().await.unwrap_err();
    scene.faulty.heal();
    let stored = async || {
        load_catalog(&scene.repository).await.unwrap().segments.count(TimelineId::FIRST, 0, SEGMENTS)
    };
    assert!(stored().await < 150 && scene.keys("/gaps/").len() == 3);
    // A restore from the first backup begins, and needs what is behind it.
    let wal = HeldWal {
        timeline: TimelineId::FIRST,
        start_lsn: Some(name(10).start(SIZE)),
        through_lsn: Some(name(50).start(SIZE)),
    };
    let restore =
        Hold { id: "20260104T000000Z-0123456789abcdef".into(), wal: Some(wal), ..scene.hold(&id(0)) };
    scene.repository.put_hold(&restore).await.unwrap();
    // A request of the one that was killed may still take effect: not before an hour is over.
    assert!(scene.shown().await.plan.counts_again.is_empty());
    scene.memory.age("/gaps/", TimeDelta::hours(2));
    let shown = scene.shown().await;
    assert!(shown.plan.notes.iter().any(|note| note.contains("counts again")) && !shown.is_done());
    scene.expire().await.unwrap();
    let catalog = load_catalog(&scene.repository).await.unwrap();
    assert_eq!(catalog.segments.count(TimelineId::FIRST, 10, 51), 41, "what is held counts");
    assert!(catalog.gaps.iter().all(|gap| gap.is_expired()), "the rest is expired, and not lost");
    let stretch = [(TimelineId::FIRST, name(60).start(SIZE), name(61).start(SIZE))];
    let checked = scene.repository.check_wal_not_expired(&stretch).await;
    assert!(matches!(checked, Err(Error::Conflict(_))));
}

#[tokio::test]
async fn an_emptied_wal_folder_costs_nothing() {
    let scene = Scene::make().await;
    for key in scene.keys("/wal/").into_iter().chain(scene.keys("/index/")) {
        scene.memory.remove(&ObjectKey::new(key).unwrap());
    }
    let error = prepare(&scene.repository, &scene.request()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains("WAL"), "{error}");
}

#[tokio::test]
async fn a_removal_that_stood_still_looks_at_its_mark_and_its_lock_before_it_goes_on() {
    let original = Scene::make().await;
    for taken in ["mark", "lock"] {
        let scene = original.copy().await;
        let memory = scene.memory.clone();
        // It has looked who needs the backups, and stands still. Another removal comes and takes what is left behind back.
        scene.faulty.set(move |call, asked| {
            let looked = call == Call::List && asked.contains("/backups/catalog/");
            if looked && memory.keys().iter().any(|key| key.contains("/expiring/")) {
                let own: Vec<String> = memory.keys();
                match taken {
                    "mark" => own.iter().filter(|key| key.contains("/expiring/")).for_each(|key| {
                        memory.remove(&ObjectKey::new(key.clone()).unwrap());
                    }),
                    _ => memory.overwrite(
                        &ObjectKey::new("main/0001/locks/expire/00000002.json").unwrap(),
                        b"{}".to_vec(),
                    ),
                }
            }
            None
        });
        let error = scene.expire().await.unwrap_err();
        assert!(
            error.to_string().contains(if taken == "mark" { "was taken back" } else { "its lock is lost" }),
            "{error}"
        );
        assert_eq!(scene.keys("/backups/catalog/").len(), 4, "{taken}");
        assert_eq!(scene.segments().await.0, 1);
    }
}

#[tokio::test]
async fn marks_of_others_stay_until_they_are_old() {
    let scene = Scene::make().await;
    let run = "20260101T000000Z-0123456789abcdef";
    let mark = |at: usize| ObjectKey::new(format!("main/0001/expiring/{}.{run}.json", id(at))).unwrap();
    // Of one that goes by this policy too, and of one that stays.
    for at in [0, 3] {
        scene.mark(&id(at));
    }
    let report = scene.expire().await.unwrap();
    assert_eq!(report.backups, 2);
    assert!(report.notes.iter().any(|note| note.contains(&id(3)) && note.contains(run)), "{report:?}");
    assert_eq!(scene.keys("/expiring/"), BTreeSet::from([mark(3).as_str().to_owned()]));
    scene.repository.check_not_expiring(&id(3)).await.unwrap_err();
    scene.memory.age("/expiring/", TimeDelta::hours(2));
    assert!(!scene.shown().await.is_done());
    scene.expire().await.unwrap();
    assert_eq!(scene.keys("/expiring/").len(), 0);
    // One that finds a backup needed takes its own marks back, and no others.
    let scene = Scene::make().await;
    scene.memory.overwrite(&mark(0), b"{}".to_vec());
    let (memory, hold) = (scene.memory.clone(), serde_json::to_vec(&scene.hold(&id(0))).unwrap());
    let key = ObjectKey::new("main/0001/holds/20260101T000000Z-0123456789abcdef.json").unwrap();
    scene.faulty.set(move |call, asked| {
        if call == Call::Put && asked.contains("/expiring/") {
            memory.overwrite(&key, hold.clone());
        }
        None
    });
    scene.expire().await.unwrap_err();
    assert_eq!(scene.keys("/expiring/"), BTreeSet::from([mark(0).as_str().to_owned()]));
}

#[tokio::test]
async fn what_is_gone_of_a_batch_that_failed_is_expired_and_not_lost() {
    let original = Scene::make().await;
    // Only a store that answered has done nothing more: what got no answer may still be done.
    let cases = [
        (0, Fault::Denied, true),
        (1, Fault::Denied, false),
        (0, Fault::Unavailable, false),
        (150, Fault::Unavailable, false),
    ];
    for (at, fault, whole) in cases {
        let scene = original.copy().await;
        // A hold on every backup that would go: nothing but WAL goes.
        scene.repository.put_hold(&scene.hold(&id(0))).await.unwrap();
        let other = Hold { id: "20260102T000000Z-0123456789abcdef".into(), ..scene.hold(&id(1)) };
        scene.repository.put_hold(&other).await.unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        scene.faulty.set(move |call, asked| {
            let late =
                call == Call::Remove && asked.contains("/wal/") && count.fetch_add(1, Ordering::SeqCst) >= at;
            late.then_some(fault)
        });
        scene.expire().await.unwrap_err();
        scene.faulty.heal();
        let catalog = load_catalog(&scene.repository).await.unwrap();
        let stored = catalog.segments.count(TimelineId::FIRST, 0, SEGMENTS);
        if whole {
            assert_eq!(stored, SEGMENTS - 1, "nothing is gone, and all of it counts");
            assert_eq!(scene.keys("/gaps/").len(), 0);
        } else {
            assert!(catalog.gaps.iter().all(|gap| gap.is_expired()) && !catalog.gaps.is_empty());
        }
        scene.expire().await.unwrap();
        assert!(load_catalog(&scene.repository).await.unwrap().gaps.iter().all(|gap| gap.is_expired()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_goes_while_it_is_verified_is_not_damaged() {
    let scene = Scene::make().await;
    let (memory, gone) = (scene.memory.clone(), id(0));
    scene.faulty.set(move |call, asked| {
        if call == Call::GetRange && asked.contains(&format!("{gone}/data/")) {
            let mark = format!("main/0001/expiring/{gone}.20260301T010203Z-0000000000000009.json");
            memory.overwrite(&ObjectKey::new(mark).unwrap(), b"{}".to_vec());
            for key in
                memory.keys().into_iter().filter(|key| key.contains("/backups/") && key.contains(&gone))
            {
                memory.remove(&ObjectKey::new(key).unwrap());
            }
        }
        None
    });
    let found = |report: &pitr::verify::Report, id: &str| {
        report.repositories[0].findings.iter().filter(|finding| finding.object.contains(id)).count()
    };
    let request = verify::Request {
        id: "20260301T010203Z-0000000000000008".into(),
        started: scene.now,
        scope: verify::Scope::Whole,
        budget: None,
        bytes_per_second: None,
        workers: 1,
        server: None,
        remembered: BTreeMap::new(),
        anew: false,
        accept_missing: false,
    };
    let report =
        verify::verify(&scene.repository, &request, Arc::default(), &Default::default()).await.unwrap();
    assert_eq!(found(&report, &id(0)), 0, "{:?}", report.repositories[0].findings);
    assert!(found(&report, &id(1)) > 0, "its manifest is none, and it stays");
}
