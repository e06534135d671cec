//! What readers know of the segment that the archive ends in: its parts, decoded, while a receiver goes on.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use chrono::Utc;
use futures_util::FutureExt as _;
use walship::Error;
use walship::archive::fetch::{FetchOptions, FetchOutcome, fetch_file};
use walship::catalog::{Catalog, GapCause, GapKind, GapRecord, StoredTail, TailFlaw};
use walship::codec::Compression;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::repository::{ClusterRepository, LineageRepository, Repository, load_catalog, load_tails};
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage as _, list_all};
use walship::wal::SegmentSummary;
use walship::wal::testing::WalBuilder;

const SIZE: SegmentSize = SegmentSize::MIN;
const SYSTEM_IDENTIFIER: u64 = 7;

/// Segments 1 to 4 of a WAL; in the last one some commits, and where the records end that are looked at while it
/// is open.
struct Wal {
    segments: Vec<(SegmentName, Vec<u8>)>,
    commits: Vec<Lsn>,
    end: Lsn,
}

fn wal() -> Wal {
    let mut wal = WalBuilder::new(17, SIZE, SYSTEM_IDENTIFIER);
    for xid in 700..703 {
        wal.commit(xid, 1_000_000);
        wal.fill_segment(0);
    }
    let mut commits = Vec::new();
    for xid in 710..730 {
        commits.push(wal.commit(xid, 2_000_000));
        wal.filler(5000);
    }
    let end = wal.position();
    wal.fill_segment(0);
    Wal { segments: wal.segments(), commits, end }
}

impl Wal {
    fn bytes(&self, number: usize) -> &[u8] {
        &self.segments[number - 1].1
    }

    fn open_len(&self) -> usize {
        (self.end.0 % SIZE.bytes()) as usize
    }
}

struct Place {
    memory: MemoryStorage,
    faulty: FaultyStorage,
    clusters: Vec<ClusterRepository>,
    lineage: LineageRepository,
    wal: Wal,
}

impl Place {
    async fn new() -> Self {
        let memory = MemoryStorage::default();
        let faulty = FaultyStorage::new(Arc::new(memory.clone()));
        let repository = Repository::create(Arc::new(faulty.clone()), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        let lineage = cluster.register_lineage(SYSTEM_IDENTIFIER, SIZE, 17, Utc::now()).await.unwrap();
        Self { memory, faulty, clusters: vec![cluster], lineage, wal: wal() }
    }

    async fn push(&self, numbers: &[usize]) {
        for number in numbers {
            let (name, bytes) = &self.wal.segments[number - 1];
            push(&self.clusters, *name, bytes).await;
        }
    }

    async fn ship(&self, number: usize, from: usize, to: usize) -> ObjectKey {
        ship(&self.lineage, &self.wal, number, from, to).await
    }

    async fn load(&self) -> (Catalog, Vec<SegmentSummary>) {
        let mut catalog = load_catalog(&self.lineage).await.unwrap();
        let summaries = load_tails(&self.lineage, &mut catalog).await.unwrap();
        (catalog, summaries)
    }

    async fn tail(&self) -> Option<StoredTail> {
        self.load().await.0.tails.unwrap().remove(&TimelineId::FIRST)
    }

    async fn spoil(&self, key: &ObjectKey) {
        self.memory.delete(key).await.unwrap();
        self.memory.put_if_absent(key, b"no part".to_vec().into()).await.unwrap();
    }

    async fn fetch(&self, number: usize, options: &FetchOptions) -> walship::Result<Option<Vec<u8>>> {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("fetched");
        let name = self.wal.segments[number - 1].0.to_string().parse().unwrap();
        match fetch_file(&self.clusters, name, &target, options).await {
            Ok(FetchOutcome::Absent) => Ok(None),
            Ok(FetchOutcome::Delivered { .. }) => Ok(Some(std::fs::read(&target).unwrap())),
            Err(failure) => Err(failure.error),
        }
    }

    /// Lets a receiver store the whole of segment 4 and remove its parts just before the next look at parts.
    async fn merge_at_the_next_listing(&self) {
        // The whole is made in another repository of the same lineage, and moved.
        let other = Self::new().await;
        other.push(&[4]).await;
        let listed = list_all(&other.memory, "", 100).await.unwrap();
        let whole = listed.into_iter().find(|meta| meta.key.as_str().ends_with("04.wal")).unwrap().key;
        let body = other.memory.get(&whole, u64::MAX).await.unwrap().unwrap();
        let listed = list_all(&self.memory, "", 1000).await.unwrap();
        let parts: Vec<_> =
            listed.into_iter().map(|m| m.key).filter(|k| k.as_str().contains("/tail/")).collect();
        let (memory, todo) = (self.memory.clone(), Mutex::new(Some((whole, body, parts))));
        self.faulty.set(move |call, key| {
            if call == Call::List
                && key.contains("/tail/")
                && let Some((whole, body, parts)) = todo.lock().unwrap().take()
            {
                memory.put_if_absent(&whole, body.into()).now_or_never().unwrap().unwrap();
                for part in parts {
                    memory.delete(&part).now_or_never().unwrap().unwrap();
                }
            }
            None::<Fault>
        });
    }
}

async fn push(clusters: &[ClusterRepository], name: SegmentName, bytes: &[u8]) {
    use walship::archive::push::{PushOptions, push_file};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name.to_string());
    std::fs::write(&path, bytes).unwrap();
    let options =
        PushOptions { compression: Compression::Lz4, lineage: None, spool_dir: folder.path().to_owned() };
    push_file(clusters, &path, &options).await.unwrap();
}

async fn ship(lineage: &LineageRepository, wal: &Wal, number: usize, from: usize, to: usize) -> ObjectKey {
    let (name, bytes) = &wal.segments[number - 1];
    let start = Lsn(name.start(SIZE).0 + from as u64);
    lineage.put_tail(TimelineId::FIRST, start, bytes[from..to].to_vec(), Compression::Lz4).await.unwrap()
}

#[tokio::test]
async fn the_tail_is_known_with_its_records_up_to_the_last_whole_one() {
    let place = Place::new().await;
    place.push(&[1, 2, 3]).await;
    assert_eq!(place.tail().await, None);
    let end = place.wal.open_len();
    let mut from = 0;
    while from < end {
        let to = (from + 9000).min(end);
        place.ship(4, from, to).await;
        let (catalog, summaries) = place.load().await;
        let tail = &catalog.tails.as_ref().unwrap()[&TimelineId::FIRST];
        let name = place.wal.segments[3].0;
        assert_eq!((tail.segment, tail.flaw.clone()), (name, None));
        assert_eq!(tail.end_lsn, Lsn(name.start(SIZE).0 + to as u64));
        assert!(tail.until_lsn <= tail.end_lsn && tail.end_lsn.0 - tail.until_lsn.0 < 5100, "{tail:?}");
        let commits = place.wal.commits.iter().filter(|lsn| **lsn < tail.until_lsn).count();
        assert_eq!(summaries[0].counts.commits, commits as u64);
        assert_eq!(catalog.served_tail(name), Some(tail));
        from = to;
    }
    let tail = place.tail().await.unwrap();
    assert_eq!(tail.until_lsn, place.wal.end);
    assert_eq!(tail.parts, end.div_ceil(9000) as u64);
    assert!(tail.stored_bytes > 0);
    // Parts that are left of segments which are whole by now say nothing.
    place.ship(3, 0, 5000).await;
    assert_eq!(place.tail().await, Some(tail));
}

#[tokio::test]
async fn a_hole_and_a_damaged_part_end_it_and_are_told() {
    let place = Place::new().await;
    place.push(&[1, 2, 3]).await;
    place.ship(4, 0, 20_000).await;
    place.ship(4, 30_000, 40_000).await;
    let start = place.wal.segments[3].0.start(SIZE).0;
    let tail = place.tail().await.unwrap();
    assert_eq!(tail.end_lsn, Lsn(start + 20_000));
    assert_eq!(tail.flaw, Some(TailFlaw::Hole { to: Lsn(start + 30_000) }));
    assert!(tail.flaw_text().unwrap().contains("are not"));

    let key = place.ship(4, 20_000, 30_000).await;
    assert_eq!(place.tail().await.unwrap().end_lsn, Lsn(start + 40_000));
    place.spoil(&key).await;
    let tail = place.tail().await.unwrap();
    assert_eq!(tail.end_lsn, Lsn(start + 20_000));
    assert!(matches!(tail.flaw, Some(TailFlaw::Damaged { .. })), "{tail:?}");
    // A restore is led up to the damage only when its plan has said so.
    let error = place.fetch(4, &FetchOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
    let options = FetchOptions { up_to_damage: true, ..FetchOptions::default() };
    let fetched = place.fetch(4, &options).await.unwrap().unwrap();
    assert_eq!(fetched[..20_000], place.wal.bytes(4)[..20_000]);
    assert!(fetched[20_000..].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn what_is_behind_it_makes_it_no_end() {
    let place = Place::new().await;
    place.push(&[1, 2]).await;
    place.ship(3, 0, 20_000).await;
    let name = place.wal.segments[2].0;
    let (mut catalog, _) = place.load().await;
    assert!(catalog.served_tail(name).is_some());
    let gap = GapRecord {
        format: 1,
        id: "20261121T010203Z-0123456789abcdef".into(),
        timeline: TimelineId::FIRST,
        start_lsn: name.start(SIZE),
        end_lsn: name.end(SIZE),
        cause: GapCause { kind: GapKind::Lost, text: "a test".into() },
        segment_digest: None,
        recorded: Utc::now(),
        host: "here".into(),
        user: "nobody".into(),
    };
    catalog.gaps.push(gap);
    assert_eq!(catalog.served_tail(name), None, "the ledger misses it");

    place.ship(4, 0, 5000).await;
    let (catalog, _) = place.load().await;
    assert_eq!(catalog.served_tail(name), None);
    assert!(catalog.served_tail(place.wal.segments[3].0).is_some());
    assert!(!catalog.segments.contains(name));
    assert!(matches!(place.fetch(3, &FetchOptions::default()).await, Err(Error::Missing(_))));
}

#[tokio::test]
async fn before_lost_wal_it_is_the_end_of_what_a_planned_recovery_may_get() {
    let place = Place::new().await;
    place.push(&[1, 2]).await;
    place.ship(3, 0, 20_000).await;
    place.ship(3, 20_000, 50_000).await;
    let name = place.wal.segments[2].0;
    let start = name.start(SIZE).0;
    let lost_from = Lsn(start + 40_000);
    let gap = GapRecord {
        format: 1,
        id: "20261121T010203Z-0123456789abcdef".into(),
        timeline: TimelineId::FIRST,
        start_lsn: lost_from,
        end_lsn: place.wal.segments[3].0.start(SIZE),
        cause: GapCause { kind: GapKind::Lost, text: "a test".into() },
        segment_digest: None,
        recorded: Utc::now(),
        host: "here".into(),
        user: "nobody".into(),
    };
    let options = |lsn: u64| FetchOptions { up_to_gap: Some(Lsn(start + lsn)), ..FetchOptions::default() };
    // What the ledger does not say is no leave.
    place.ship(4, 0, 5000).await;
    assert!(matches!(place.fetch(3, &options(40_000)).await, Err(Error::Missing(_))));
    place.lineage.put_gap(&gap).await.unwrap();
    for stored_behind in [false, true] {
        if stored_behind {
            place.push(&[4]).await;
        }
        let (catalog, summaries) = place.load().await;
        let tail = &catalog.stranded[&name];
        assert_eq!((tail.end_lsn, tail.lost_from, tail.flaw.clone()), (lost_from, Some(lost_from), None));
        assert!(tail.until_lsn <= tail.end_lsn && tail.until_lsn.0 > start, "{tail:?}");
        assert!(
            summaries.iter().any(|summary| summary.segment == name && summary.end_of_wal == tail.until_lsn)
        );
        assert_eq!(catalog.served_tail(name), Some(tail));
        // Nobody gets it who has not planned to stop in it, nor further than the ledger allows.
        for options in [FetchOptions::default(), options(40_008), options(0), options(SIZE.bytes() + 40_000)]
        {
            let error = place.fetch(3, &options).await.unwrap_err();
            assert!(matches!(error, Error::Missing(_)) && error.to_string().contains("a hole"), "{error}");
        }
        let standby = FetchOptions { standby: true, ..options(40_000) };
        assert!(matches!(place.fetch(3, &standby).await, Err(Error::Missing(_))));
        let fetched = place.fetch(3, &options(40_000)).await.unwrap().unwrap();
        assert_eq!(fetched[..40_000], place.wal.bytes(3)[..40_000]);
        assert!(fetched.len() == 1 << 20 && fetched[40_000..].iter().all(|byte| *byte == 0));
    }
    // What follows is a hole for everybody.
    assert!(place.fetch(4, &options(40_000)).await.unwrap().is_some());
    // The whole segment closes it.
    place.push(&[3]).await;
    let (catalog, _) = place.load().await;
    assert!(catalog.stranded.is_empty() && catalog.served_tail(name).is_none());
    assert_eq!(place.fetch(3, &options(40_000)).await.unwrap().as_deref(), Some(place.wal.bytes(3)));
}

#[tokio::test]
async fn a_recovery_without_a_target_gets_no_tail_before_lost_wal() {
    let place = Place::new().await;
    place.push(&[1, 2, 4]).await;
    place.ship(3, 0, 20_000).await;
    let name = place.wal.segments[2].0;
    let lost_from = Lsn(name.start(SIZE).0 + 20_000);
    let gap = GapRecord {
        format: 1,
        id: "20261121T010203Z-0123456789abcdef".into(),
        timeline: TimelineId::FIRST,
        start_lsn: lost_from,
        end_lsn: name.end(SIZE),
        cause: GapCause { kind: GapKind::Lost, text: "a test".into() },
        segment_digest: None,
        recorded: Utc::now(),
        host: "here".into(),
        user: "nobody".into(),
    };
    place.lineage.put_gap(&gap).await.unwrap();
    let data = tempfile::tempdir().unwrap();
    let pg_wal = data.path().join("pg_wal");
    std::fs::create_dir(&pg_wal).unwrap();
    let options = FetchOptions { up_to_gap: Some(lost_from), ..FetchOptions::default() };
    for (settings, served) in [
        (None, false),
        (Some("restore_command = 'x'\n# recovery_target_xid = '7'\n"), false),
        (
            Some("recovery_target_xid = '7'\nrecovery_target_time = ''\nrecovery_target_timeline = '1'\n"),
            false,
        ),
        (Some("recovery_target = ''\nrecovery_target_xid = ''\nrecovery_target_action = 'promote'\n"), false),
        (
            Some("recovery_target_time = ''\nrecovery_target_xid = '7'\nrecovery_target_inclusive = 'on'\n"),
            true,
        ),
        (Some("Recovery_Target_Lsn '0/3000000'\n"), true),
    ] {
        if let Some(settings) = settings {
            std::fs::write(data.path().join("postgresql.auto.conf"), settings).unwrap();
        }
        let target = pg_wal.join("RECOVERYXLOG");
        let fetched = fetch_file(&place.clusters, name.to_string().parse().unwrap(), &target, &options).await;
        assert_eq!(fetched.is_ok(), served, "{settings:?}: {fetched:?}");
        if let Err(failure) = fetched {
            assert!(failure.error.to_string().contains("has no target before that"), "{}", failure.error);
        }
    }
}

#[tokio::test]
async fn all_parts_of_a_segment_are_the_segment() {
    let place = Place::new().await;
    place.push(&[1, 4]).await;
    // Behind the last whole one, and in a hole.
    for (from, to) in [(0, 500_000), (400_000, 1 << 20)] {
        place.ship(2, from, to).await;
        place.ship(3, from, to).await;
    }
    let (catalog, summaries) = place.load().await;
    let names: Vec<_> = place.wal.segments[1..3].iter().map(|(name, _)| *name).collect();
    assert_eq!(catalog.in_parts.keys().copied().collect::<Vec<_>>(), names);
    assert!(names.iter().all(|name| catalog.segments.contains(*name)));
    assert_eq!(summaries.len(), 2);
    assert_eq!(place.fetch(3, &FetchOptions::default()).await.unwrap().unwrap(), place.wal.bytes(3));
    let read = place.lineage.tail_bytes(names[1], SIZE.bytes()).await.unwrap().unwrap();
    assert_eq!(read, place.wal.bytes(3));
}

#[tokio::test]
async fn a_segment_that_is_merged_meanwhile_is_read_whole() {
    let end = wal().open_len();
    // The catalog was loaded before.
    let place = Place::new().await;
    place.push(&[1, 2, 3]).await;
    place.ship(4, 0, end).await;
    let mut catalog = load_catalog(&place.lineage).await.unwrap();
    place.merge_at_the_next_listing().await;
    load_tails(&place.lineage, &mut catalog).await.unwrap();
    assert!(catalog.segments.contains(place.wal.segments[3].0));
    assert_eq!(catalog.tails.unwrap().len(), 0);
    // What was known of the tail is in the whole segment too.
    let bytes = place.lineage.tail_bytes(place.wal.segments[3].0, end as u64).await.unwrap().unwrap();
    assert_eq!(bytes, place.wal.bytes(4)[..end]);

    // Between the two questions of a fetch: not an end, not a shorter file.
    let place = Place::new().await;
    place.push(&[1, 2, 3]).await;
    place.ship(4, 0, end / 2).await;
    place.merge_at_the_next_listing().await;
    let fetched = place.fetch(4, &FetchOptions::default()).await.unwrap();
    assert_eq!(fetched.as_deref(), Some(place.wal.bytes(4)));
}

#[tokio::test]
async fn of_several_repositories_the_one_that_has_most_counts() {
    let (short, long) = (Place::new().await, Place::new().await);
    for place in [&short, &long] {
        place.push(&[1, 2, 3]).await;
    }
    short.ship(4, 0, 10_000).await;
    long.ship(4, 0, 60_000).await;
    let start = short.wal.segments[3].0.start(SIZE).0;
    let both = short.lineage.clone().with_others(vec![long.lineage.clone()]);
    let load = async || {
        let mut catalog = load_catalog(&both).await.unwrap();
        let read = load_tails(&both, &mut catalog).await;
        read.map(|_| catalog.tails.unwrap()[&TimelineId::FIRST].end_lsn)
    };
    assert_eq!(load().await.unwrap(), Lsn(start + 60_000));
    let outage =
        |call, key: &str| (call == Call::List && key.contains("/tail/")).then_some(Fault::Unavailable);
    long.faulty.set(outage);
    assert_eq!(load().await.unwrap(), Lsn(start + 10_000));
    assert!(both.notes().iter().any(|note| note.contains("left out")), "{:?}", both.notes());
    short.faulty.set(outage);
    assert!(matches!(load().await, Err(Error::Unavailable(_))));
}
