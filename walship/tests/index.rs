//! The index: written by whoever archives, in any order, by several at once; completed, verified, rebuilt.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use walship::archive::push::{PushOptions, push_file};
use walship::pg::{SegmentName, SegmentSize, TimelineHistory, TimelineId};
use walship::repository::index::complete::{Options, Report, Task, complete};
use walship::repository::index::write::{extend, extend_left};
use walship::repository::testing::{made_up_object, made_up_summary};
use walship::repository::{LineageRepository, Repository, load_catalog, load_catalog_from_listings};
use walship::storage::ObjectKey;
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::wal::rollup::Place;
use walship::wal::testing::WalBuilder;

const SEGMENTS: u64 = 600;
const FIRST: u64 = 200;

async fn lineage() -> (LineageRepository, MemoryStorage) {
    let storage = MemoryStorage::new();
    let repository = Repository::create(Arc::new(storage.clone()), Utc::now()).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    let lineage = cluster.register_lineage(7, SegmentSize::DEFAULT, 17, Utc::now()).await.unwrap();
    (lineage, storage)
}

fn time(number: u64) -> DateTime<Utc> {
    // An hour back in the middle.
    let back = if number > 500 { TimeDelta::hours(1) } else { TimeDelta::zero() };
    Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap() + TimeDelta::minutes(number as i64) - back
}

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SegmentSize::DEFAULT).unwrap()
}

/// Stores a segment as a push does, the index extended beside it.
async fn archive(lineage: &LineageRepository, number: u64) {
    extend(lineage, name(number)).await.unwrap();
    let times = [time(number), time(number) + TimeDelta::seconds(30)];
    let summary = made_up_summary(lineage.lineage(), name(number), 2 * number as u32, times);
    lineage.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
}

async fn run(lineage: &LineageRepository, task: Task) -> Report {
    complete(lineage, Options { task, dry_run: false }).await.unwrap()
}

/// Checks that the fullest roll-ups say what the segments say.
async fn is_right(lineage: &LineageRepository) {
    let report = run(lineage, Task::Verify).await;
    assert_eq!((report.wrong, report.unreadable, report.missing), (vec![], vec![], vec![]));
    let levels = async |level| lineage.rollups(TimelineId::FIRST, level, 0, u64::MAX).await.unwrap();
    let top = levels(2).await.pop().unwrap();
    let known = lineage.read_rollup(&top).await.unwrap().unwrap();
    assert_eq!(known.rollup.segments(), SEGMENTS);
    let facts = known.rollup.facts();
    assert_eq!(facts.counts.commits, 2 * SEGMENTS);
    assert_eq!(facts.min_time.unwrap().time, time(FIRST));
    assert_eq!(facts.max_time.unwrap().time, time(FIRST + SEGMENTS - 1) + TimeDelta::seconds(30));
}

#[tokio::test]
async fn archiving_in_order_leaves_little_for_later() {
    let (lineage, _) = lineage().await;
    for number in FIRST..FIRST + SEGMENTS {
        archive(&lineage, number).await;
    }
    let fullest = async |level| {
        let all = lineage.rollups(TimelineId::FIRST, level, 0, u64::MAX).await.unwrap();
        all.iter()
            .map(|stored| (stored.place().first, stored.segments()))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    // 200 to 255, 256 to 511, 512 to 767, and what the last boundary saw of 768 to 799.
    assert_eq!(
        fullest(1).await.into_iter().collect::<Vec<_>>(),
        [(0, 56), (256, 256), (512, 256), (768, 16)]
    );
    // The log that did not begin with its first segment is never full: `pitr index` adds it.
    assert_eq!(fullest(2).await.into_iter().collect::<Vec<_>>(), [(0, 512)]);
    let report = run(&lineage, Task::Complete).await;
    assert_eq!((report.written, report.segments), (2, SEGMENTS));
    assert_eq!(run(&lineage, Task::Complete).await.written, 0);
    is_right(&lineage).await;
}

#[tokio::test]
async fn any_order_and_two_archivers_end_in_the_same_index() {
    let mut stores = Vec::new();
    for seed in 0..2 {
        let (lineage, storage) = lineage().await;
        let mut numbers: Vec<u64> = (FIRST..FIRST + SEGMENTS).collect();
        numbers.shuffle(&mut StdRng::seed_from_u64(seed));
        for pair in numbers.chunks(2) {
            // Both are archived by both.
            let both = pair.iter().chain(pair.iter().rev()).map(|number| archive(&lineage, *number));
            futures_util::future::join_all(both).await;
        }
        tokio::join!(run(&lineage, Task::Complete), run(&lineage, Task::Complete));
        is_right(&lineage).await;
        let fullest = lineage.rollups(TimelineId::FIRST, 2, 0, u64::MAX).await.unwrap().pop().unwrap();
        stores.push(lineage.rollup_location(&fullest));
        drop(storage);
    }
    assert!(stores.windows(2).all(|two| two[0] == two[1]), "{stores:?}");
}

#[tokio::test]
async fn late_segments_are_taken_in() {
    let (lineage, _) = lineage().await;
    let late = [FIRST, 255, 256, 400, 511, 512];
    for number in (FIRST..FIRST + SEGMENTS).filter(|number| !late.contains(number)) {
        archive(&lineage, number).await;
    }
    run(&lineage, Task::Complete).await;
    for number in late {
        archive(&lineage, number).await;
    }
    let report = run(&lineage, Task::Verify).await;
    assert!(report.wrong.is_empty() && !report.missing.is_empty());
    run(&lineage, Task::Complete).await;
    is_right(&lineage).await;
}

#[tokio::test]
async fn damaged_and_lying_roll_ups_are_found_and_replaced() {
    let (lineage, storage) = lineage().await;
    for number in FIRST..FIRST + SEGMENTS {
        archive(&lineage, number).await;
    }
    run(&lineage, Task::Complete).await;
    // One is cut short, another's segments are not what they were.
    let full = lineage.rollups(TimelineId::FIRST, 1, 256, 512).await.unwrap().pop().unwrap();
    let key = lineage.rollup_location(&full).strip_prefix("memory:/").unwrap().to_owned();
    storage.overwrite(&ObjectKey::new(key).unwrap(), b"xyz".to_vec());
    let times = [time(600), time(700)];
    let other = made_up_object(&made_up_summary(lineage.lineage(), name(600), 3, times)).unwrap();
    let key = storage.keys().into_iter().find(|key| key.ends_with(&format!("{}.wal", name(600)))).unwrap();
    let walship::codec::EncodedBody::Memory(body) = &other.body else { unreachable!() };
    storage.overwrite(&ObjectKey::new(key).unwrap(), [&*other.head, body].concat());

    let report = run(&lineage, Task::Verify).await;
    assert!(report.wrong.iter().any(|wrong| wrong.what.contains("decompressed")), "{:?}", report.wrong);
    assert!(report.wrong.iter().any(|wrong| wrong.what.contains("something else")), "{:?}", report.wrong);
    let dry = complete(&lineage, Options { task: Task::Rebuild, dry_run: true }).await.unwrap();
    assert_eq!(dry.written, 0);
    let report = run(&lineage, Task::Rebuild).await;
    assert!(report.written >= 3 && report.wrong.len() >= 2, "{report:?}");
    let report = run(&lineage, Task::Verify).await;
    assert_eq!((report.wrong, report.missing), (vec![], vec![]));
    let place = Place::of(name(600), SegmentSize::DEFAULT, 1);
    let stored = lineage.rollups(place.timeline, 1, place.first, place.end()).await.unwrap().pop().unwrap();
    let known = lineage.read_rollup(&stored).await.unwrap().unwrap();
    assert_eq!(known.rollup.facts().max_time.unwrap().time, time(767) + TimeDelta::seconds(30));
}

/// Checks that the catalog is the same whether the index is asked or not, and says how many requests it took.
async fn loads_alike(lineage: &LineageRepository) -> (usize, usize) {
    let from_index = load_catalog(lineage).await.unwrap();
    let listed = load_catalog_from_listings(lineage).await.unwrap();
    assert!(listed.rollups.is_empty());
    assert_eq!(from_index.segments.names().collect::<Vec<_>>(), listed.segments.names().collect::<Vec<_>>());
    let bytes = |catalog: &walship::catalog::Catalog| {
        catalog.segments.runs(TimelineId::FIRST).iter().map(|run| run.stored_bytes).sum::<u64>()
    };
    assert_eq!(bytes(&from_index), bytes(&listed));
    (from_index.rollups.len(), listed.segments.names().count())
}

#[tokio::test]
async fn a_catalog_from_the_index_is_that_from_listings_whatever_is_missing() {
    let (lineage, storage) = lineage().await;
    let late = [FIRST + 3, 300, 301, 511, 512, 799];
    for number in (FIRST..FIRST + SEGMENTS).filter(|number| !late.contains(number)) {
        archive(&lineage, number).await;
    }
    assert!(loads_alike(&lineage).await.0 > 0);
    run(&lineage, Task::Complete).await;
    // One roll-up of level 2 tells of all.
    assert_eq!(loads_alike(&lineage).await.0, 1);
    for number in late {
        archive(&lineage, number).await;
        loads_alike(&lineage).await;
    }
    // Damaged and removed roll-ups, one by one: what is below or the listing takes their place.
    let mut left: Vec<String> = storage.keys().into_iter().filter(|key| key.contains("/index/")).collect();
    left.shuffle(&mut StdRng::seed_from_u64(7));
    for (at, key) in left.iter().enumerate() {
        let key = ObjectKey::new(key.as_str()).unwrap();
        if at % 2 == 0 {
            storage.overwrite(&key, b"damaged".to_vec());
        } else {
            lineage.storage().delete(&key).await.unwrap();
        }
        if at % 8 == 0 {
            loads_alike(&lineage).await;
        }
    }
    assert_eq!(loads_alike(&lineage).await, (0, SEGMENTS as usize));
    run(&lineage, Task::Rebuild).await;
    assert_eq!(loads_alike(&lineage).await.0, 1);
}

/// Stores a segment of timeline 1 or 2 without looking at the index.
async fn store(lineage: &LineageRepository, timeline: u32, number: u64) {
    let segment =
        SegmentName::from_number(TimelineId::new(timeline).unwrap(), number, SegmentSize::DEFAULT).unwrap();
    let times = [time(number), time(number) + TimeDelta::seconds(30)];
    let summary = made_up_summary(lineage.lineage(), segment, 2 * number as u32, times);
    lineage.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
}

/// Returns how many segments of timeline 1 no roll-up that is read tells of.
async fn not_rolled_up(lineage: &LineageRepository) -> u64 {
    loads_alike(lineage).await;
    let catalog = load_catalog(lineage).await.unwrap();
    let rollups = catalog.rollups.iter().filter(|rollup| rollup.timeline == TimelineId::FIRST);
    // None of them tells of what another one does where segments came in order.
    let told: u64 = rollups.map(walship::wal::rollup::Rollup::segments).sum();
    catalog.segments.count(TimelineId::FIRST, 0, u64::MAX) - told
}

#[tokio::test]
async fn a_timeline_that_was_left_is_rolled_up_to_its_end() {
    // The last segment before the fork: in a log, the last of one, the first of one, and soon after a boundary.
    for end in [440, 511, 512, 513, 520] {
        let (lineage, _) = lineage().await;
        for number in FIRST..=end {
            archive(&lineage, number).await;
        }
        let before = not_rolled_up(&lineage).await;
        assert!((1..=16).contains(&before), "{end}: {before}");
        let size = SegmentSize::DEFAULT;
        let fork = walship::pg::Lsn(name(end).end(size).0 + if end == 512 { 0 } else { 4096 });
        let second = TimelineId::new(2).unwrap();
        let history = TimelineHistory::parse(second, &format!("1\t{fork}\tpromoted\n")).unwrap();
        extend_left(&lineage, &history).await.unwrap();
        assert_eq!(not_rolled_up(&lineage).await, 0, "{end}");
        let report = run(&lineage, Task::Verify).await;
        assert_eq!(report.wrong, [], "{end}");
        // Again is nothing new, and late WAL of the parent is seen, before and after the next look.
        let rollups = lineage.rollups(TimelineId::FIRST, 1, 0, u64::MAX).await.unwrap().len();
        extend_left(&lineage, &history).await.unwrap();
        assert_eq!(lineage.rollups(TimelineId::FIRST, 1, 0, u64::MAX).await.unwrap().len(), rollups);
        store(&lineage, 1, end + 1).await;
        assert_eq!(not_rolled_up(&lineage).await, 1, "{end}");
        extend_left(&lineage, &history).await.unwrap();
        assert_eq!(not_rolled_up(&lineage).await, 0, "{end}");
    }
}

#[tokio::test]
async fn segments_that_come_after_their_timeline_was_left_are_read_and_rolled_up() {
    let (lineage, _) = lineage().await;
    let late = [425, 438, 440];
    for number in (FIRST..=440).filter(|number| !late.contains(number)) {
        archive(&lineage, number).await;
    }
    let fork = walship::pg::Lsn(name(441).start(SegmentSize::DEFAULT).0 + 4096);
    let second = TimelineId::new(2).unwrap();
    let history = TimelineHistory::parse(second, &format!("1\t{fork}\tpromoted\n")).unwrap();
    extend_left(&lineage, &history).await.unwrap();
    assert_eq!(not_rolled_up(&lineage).await, 0);
    for number in late {
        store(&lineage, 1, number).await;
        loads_alike(&lineage).await;
    }
    assert_eq!(not_rolled_up(&lineage).await, 3, "late segments are stored, and told of by nobody");
    extend_left(&lineage, &history).await.unwrap();
    assert_eq!(not_rolled_up(&lineage).await, 0);
    assert_eq!(run(&lineage, Task::Verify).await.wrong, []);
}

#[tokio::test]
async fn a_timeline_that_went_on_behind_the_fork_is_rolled_up_to_where_it_ends_now() {
    let (lineage, _) = lineage().await;
    for number in 1..=1500 {
        archive(&lineage, number).await;
    }
    assert!(not_rolled_up(&lineage).await > 0);
    // Somebody recovered to a moment long ago, and archives that too.
    let fork = walship::pg::Lsn(name(40).start(SegmentSize::DEFAULT).0 + 4096);
    let history =
        TimelineHistory::parse(TimelineId::new(2).unwrap(), &format!("1\t{fork}\trecovered\n")).unwrap();
    extend_left(&lineage, &history).await.unwrap();
    assert_eq!(not_rolled_up(&lineage).await, 0);
    assert_eq!(run(&lineage, Task::Verify).await.wrong, []);
}

/// A push of a file of timeline 2 that waits for the store until the end of timeline 1 is rolled up.
async fn push_beside(name: &str, bytes: Vec<u8>) {
    let memory = MemoryStorage::new();
    let faulty = FaultyStorage::new(Arc::new(memory.clone()));
    let repository = Repository::create(Arc::new(faulty.clone()), Utc::now()).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    let lineage = cluster.register_lineage(7, SegmentSize::MIN, 17, Utc::now()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options =
        PushOptions { compression: Default::default(), lineage: None, spool_dir: folder.path().to_owned() };
    let mut wal = WalBuilder::new(17, SegmentSize::MIN, 7);
    for at in 0..5u32 {
        wal.commit(700 + at, 1);
        wal.switch();
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let clusters = [cluster];
    for (name, bytes) in wal.segments() {
        push_file(&clusters, &write(&name.to_string(), &bytes), &options).await.unwrap();
    }
    let rolled_up = async || {
        let stored = lineage.rollups(TimelineId::FIRST, 1, 0, u64::MAX).await.unwrap();
        stored.last().is_some_and(|fullest| fullest.segments() == 5)
    };
    let history = write("00000002.history", b"1\t0/640000\tpromoted\n");
    if name != "00000002.history" {
        // Too fast for the index to be extended beside it.
        push_file(&clusters, &history, &options).await.unwrap();
        for key in memory.keys().into_iter().filter(|key| key.contains("/index/")) {
            memory.remove(&ObjectKey::new(key).unwrap());
        }
    }
    assert!(!rolled_up().await);
    let pushed = name.to_owned();
    faulty.set(move |call, key| (call == Call::Put && key.contains(&pushed)).then_some(Fault::Never));
    let path = write(name, &bytes);
    let push = tokio::spawn(async move { push_file(&clusters, &path, &options).await });
    tokio::time::timeout(std::time::Duration::from_secs(60), async {
        while !rolled_up().await {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the index is extended while the file is put");
    assert!(!push.is_finished(), "the push waits for the file");
    push.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_of_a_new_timeline_rolls_up_the_end_of_the_one_that_was_left() {
    push_beside("00000002.history", b"1\t0/640000\tpromoted\n".to_vec()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_segment_of_a_new_timeline_rolls_up_the_end_of_the_one_that_was_left() {
    // Its first page is the parent's.
    let mut wal = WalBuilder::new(17, SegmentSize::MIN, 7).starting_at(6);
    wal.commit(710, 2);
    wal.filler(16 << 10);
    wal.set_timeline(TimelineId::new(2).unwrap());
    wal.filler(16 << 10);
    wal.switch();
    let (name, bytes) = wal.segments().remove(0);
    push_beside(&name.to_string(), bytes).await;
}

#[tokio::test]
async fn backups_are_read_from_their_list_and_whole_when_they_are_used() {
    let (lineage, storage) = lineage().await;
    let object = walship::catalog::BackupObject {
        name: "data/000001.tar".into(),
        tablespace: None,
        stored_bytes: 1,
        tar_bytes: 1,
        digest: "0".repeat(64),
        index: Some(walship::catalog::ObjectIndex { bytes: 1, digest: "0".repeat(64) }),
        backup: None,
    };
    // One of them is of some terabytes.
    let objects_of = |number: u32| if number == 39 { 20_000 } else { 1 };
    for number in 0..40u32 {
        let lsn = |offset: u64| walship::pg::Lsn(u64::from(number) * 0x100_0000 + offset);
        let started = time(u64::from(number));
        let record = walship::catalog::BackupRecord {
            format: 1,
            id: walship::repository::new_backup_id(started, u64::from(number)),
            label: "walship".into(),
            timeline: TimelineId::FIRST,
            start_lsn: lsn(0x28),
            stop_timeline: TimelineId::FIRST,
            stop_lsn: lsn(0x100),
            started,
            finished: started,
            server_version: 170_004,
            from_standby: false,
            data_bytes: 1,
            stored_bytes: 1,
            files: 1,
            tablespaces: vec![],
            objects: vec![object.clone(); objects_of(number)],
            limits: walship::wal::testing::INITDB_LIMITS,
            data_checksums: true,
            manifest_digest: String::new(),
            settings_files: vec![],
            names: None,
            prepared: Some(Vec::new()),
            damaged_pages: None,
            parent: None,
        };
        lineage.put_backup_record(&record).await.unwrap();
        walship::repository::index::backups::extend_list(&lineage).await.unwrap();
    }
    let lists =
        || storage.keys().into_iter().filter(|key| key.contains("/index/backups/")).collect::<Vec<_>>();
    assert_eq!(lists().len(), 2, "after 16 and 32");
    let catalog = load_catalog(&lineage).await.unwrap();
    assert_eq!(catalog.backups.iter().filter(|record| record.objects.is_empty()).count(), 32);
    for record in &catalog.backups {
        let whole = lineage.whole_record(record).await.unwrap();
        let number = u32::try_from(record.start_lsn.0 >> 24).unwrap();
        assert_eq!((whole.objects.len(), &whole.id), (objects_of(number), &record.id));
    }
    // A damaged list: the one before it; none: every record.
    for left in [16, 0] {
        storage.overwrite(&ObjectKey::new(lists().pop().unwrap()).unwrap(), b"damaged".to_vec());
        if left == 0 {
            lists()
                .iter()
                .for_each(|key| storage.overwrite(&ObjectKey::new(key.as_str()).unwrap(), b"x".to_vec()));
        }
        let catalog = load_catalog(&lineage).await.unwrap();
        assert_eq!(catalog.backups.iter().filter(|record| record.objects.is_empty()).count(), left);
        assert_eq!(catalog.backups.len(), 40);
    }
    assert_eq!(run(&lineage, Task::Complete).await.written, 1);
    assert_eq!(
        run(&lineage, Task::Complete).await.written,
        0,
        "the damaged list of the same name was replaced"
    );

    // One that lies under its own digest.
    let fullest = ObjectKey::new(lists().pop().unwrap()).unwrap();
    let stored = lineage.storage().get(&fullest, 1 << 20).await.unwrap().unwrap();
    let json = String::from_utf8(zstd::decode_all(&*stored).unwrap()).unwrap();
    let lie = json.replacen("\"data_bytes\":1,", "\"data_bytes\":2,", 1);
    let short = walship::codec::Digest::of(lie.as_bytes()).short();
    let (head, tail) = fullest.as_str().split_once('-').unwrap();
    let (_, suffix) = tail.split_once('.').unwrap();
    let key = ObjectKey::new(format!("{head}-{short}.{suffix}")).unwrap();
    lineage.storage().delete(&fullest).await.unwrap();
    storage.overwrite(&key, zstd::encode_all(lie.as_bytes(), 1).unwrap());
    let report = run(&lineage, Task::Verify).await;
    assert!(report.wrong.iter().any(|wrong| wrong.what.contains("something else")), "{report:?}");
    run(&lineage, Task::Rebuild).await;
    let report = run(&lineage, Task::Verify).await;
    assert_eq!((report.wrong, report.missing), (vec![], vec![]));
    let catalog = load_catalog(&lineage).await.unwrap();
    assert!(catalog.backups.iter().all(|record| record.data_bytes == 1));
}
