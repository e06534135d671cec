//! WAL that is given up: recorded everywhere before anything is let go, respected by every reader, closed
//! when the WAL turns out to be there.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use chrono::Utc;
use walship::Error;
use walship::archive::fetch::{FetchFailure, FetchOptions, FetchOutcome, fetch_file};
use walship::archive::give_up::{Pushed, push_or_given_up, record_lost, survey};
use walship::archive::push::{PushOptions, encode_file};
use walship::catalog::{GapKind, GapRecord};
use walship::codec::Compression;
use walship::error::Result;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::repository::index::complete::{Options, Task, complete};
use walship::repository::{
    ClusterRepository, Repository, load_catalog, load_catalog_from_listings, open_same_lineage,
};
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage as _, list_all};
use walship::wal::testing::WalBuilder;

const SIZE: SegmentSize = SegmentSize::MIN;

/// Two repositories that can be made to fail, and the WAL of a server.
struct Scene {
    memories: Vec<MemoryStorage>,
    faulty: Vec<FaultyStorage>,
    clusters: Vec<ClusterRepository>,
    folder: tempfile::TempDir,
    wal: Vec<(SegmentName, Vec<u8>)>,
}

/// Four segments of a server; the commits tell servers apart.
fn wal_of_a_server(micros: i64) -> Vec<(SegmentName, Vec<u8>)> {
    let mut wal = WalBuilder::new(17, SIZE, 7);
    for xid in 700..704 {
        wal.commit(xid, micros + i64::from(xid));
        wal.switch();
    }
    wal.segments()
}

impl Scene {
    async fn new() -> Self {
        let (mut memories, mut faulties, mut clusters) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..2 {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(Arc::new(memory.clone()));
            let repository = Repository::create(Arc::new(faulty.clone()), Utc::now()).await.unwrap();
            let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
            cluster.register_lineage(7, SIZE, 17, Utc::now()).await.unwrap();
            memories.push(memory);
            faulties.push(faulty);
            clusters.push(cluster);
        }
        let folder = tempfile::tempdir().unwrap();
        Self { memories, faulty: faulties, clusters, folder, wal: wal_of_a_server(0) }
    }

    fn name(&self, at: usize) -> SegmentName {
        self.wal[at].0
    }

    fn write(&self, at: usize, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(self.name(at).to_string());
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// What archive-cmd does with a file of this content.
    async fn push(&self, at: usize, bytes: &[u8]) -> Result<Pushed> {
        self.push_into(&self.clusters, at, bytes).await
    }

    async fn push_into(&self, clusters: &[ClusterRepository], at: usize, bytes: &[u8]) -> Result<Pushed> {
        let path = self.write(at, bytes);
        push_or_given_up(clusters, encode_file(&path, &self.options()), &path, &self.options()).await
    }

    fn options(&self) -> PushOptions {
        PushOptions {
            compression: Compression::default(),
            lineage: None,
            spool_dir: self.folder.path().to_owned(),
        }
    }

    async fn give_up(&self, at: usize, bytes: &[u8]) -> Result<GapRecord> {
        let path = self.write(at, bytes);
        let local = encode_file(&path, &self.options()).ok();
        let found = survey(&self.clusters, self.name(at), Some(&path), local.as_ref(), None).await?;
        let record = found.record("the disk ate it", Utc::now());
        found.write(&record).await?;
        Ok(record)
    }

    async fn fetch(&self, at: usize) -> Result<FetchOutcome, FetchFailure> {
        let target = self.folder.path().join("fetched");
        let name = self.name(at).to_string().parse().unwrap();
        fetch_file(&self.clusters, name, &target, &FetchOptions::default()).await
    }

    async fn gap_keys(&self, repository: usize) -> Vec<ObjectKey> {
        let listed = list_all(&self.memories[repository], "main/0001/gaps/", 10).await.unwrap();
        listed.into_iter().map(|meta| meta.key).collect()
    }

    async fn open_gaps(&self, repository: usize) -> Vec<GapRecord> {
        let lineage = self.clusters[repository].newest_lineage().await.unwrap();
        let catalog = load_catalog(&lineage).await.unwrap();
        assert_eq!(catalog.gaps, load_catalog_from_listings(&lineage).await.unwrap().gaps);
        catalog.gaps
    }
}

fn damaged(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[..8192].fill(0);
    bytes
}

#[tokio::test]
async fn only_what_every_repository_has_a_record_of_is_let_go() {
    let scene = Scene::new().await;
    let good = scene.wal[1].1.clone();
    let bad = damaged(&good);
    assert!(matches!(scene.push(0, &scene.wal[0].1).await.unwrap(), Pushed::Stored(_)));
    // Without a record the archiver is held up.
    scene.push(1, &bad).await.unwrap_err();
    // The second repository is down at the second write: nothing is given up.
    scene.faulty[1].set(|call, _| (call == Call::Put).then_some(Fault::Unavailable));
    let error = scene.give_up(1, &bad).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)) && error.safe().contains("is not given up"), "{error}");
    assert_eq!((scene.gap_keys(0).await.len(), scene.gap_keys(1).await.len()), (1, 0));
    scene.faulty[1].heal();
    scene.push(1, &bad).await.unwrap_err();
    // Again, to the end: one record, the same everywhere.
    let record = scene.give_up(1, &bad).await.unwrap();
    assert_eq!(scene.gap_keys(0).await, scene.gap_keys(1).await);
    assert_eq!(scene.open_gaps(0).await, std::slice::from_ref(&record));
    assert_eq!(scene.open_gaps(1).await, std::slice::from_ref(&record));
    assert_eq!((record.cause.kind, &*record.cause.text), (GapKind::GivenUp, "the disk ate it"));
    match scene.push(1, &bad).await.unwrap() {
        Pushed::GivenUp { record: told, .. } => assert_eq!(told, record),
        other => panic!("{other:?}"),
    }
    // Another segment is as it was.
    scene.push(2, &damaged(&scene.wal[2].1)).await.unwrap_err();
    // An outage is never a reason to let go, of the ledger neither.
    for fault in [Call::Put, Call::List, Call::Get] {
        scene.faulty[1].set(move |call, _| (call == fault).then_some(Fault::Unavailable));
        let bytes = if fault == Call::Put { &good } else { &bad };
        scene.push(1, bytes).await.unwrap_err();
        scene.faulty[1].heal();
    }
    // What can be stored is stored, and closes the gap.
    assert!(matches!(scene.push(1, &good).await.unwrap(), Pushed::Stored(_)));
    assert!(scene.open_gaps(0).await.is_empty() && scene.open_gaps(1).await.is_empty());
    assert!(matches!(scene.fetch(1).await.unwrap(), FetchOutcome::Delivered { .. }));
}

#[tokio::test]
async fn a_segment_in_an_open_gap_is_never_absent() {
    let scene = Scene::new().await;
    scene.push(0, &scene.wal[0].1).await.unwrap();
    assert_eq!(scene.fetch(2).await.unwrap(), FetchOutcome::Absent);
    scene.give_up(2, &damaged(&scene.wal[2].1)).await.unwrap();
    for (at, said) in [(2, "the ledger of gaps knows of it: given up by"), (1, "knows of WAL behind it")] {
        let failure = scene.fetch(at).await.unwrap_err();
        assert!(matches!(failure.error, Error::Missing(_)), "{}", failure.error);
        assert!(failure.error.to_string().contains(said), "{}", failure.error);
        assert!(failure.error.to_string().contains("the disk ate it"), "{}", failure.error);
    }
    assert_eq!(scene.fetch(3).await.unwrap(), FetchOutcome::Absent);
    // One repository that knows is enough, and one that has the segment too.
    let (_, good) = &scene.wal[2];
    scene.push_into(&scene.clusters[..1], 2, good).await.unwrap();
    assert!(matches!(scene.fetch(2).await.unwrap(), FetchOutcome::Delivered { .. }));
    assert!(scene.open_gaps(0).await.is_empty());
    assert_eq!(scene.open_gaps(1).await.len(), 1);
}

#[tokio::test]
async fn other_content_under_the_name_closes_nothing_and_is_not_served() {
    let scene = Scene::new().await;
    let stranger = wal_of_a_server(1_000_000);
    let ours = scene.wal[1].1.clone();
    for at in [0, 2] {
        scene.push(at, &scene.wal[at].1).await.unwrap();
    }
    // Only in one of the two.
    scene.push_into(&scene.clusters[..1], 1, &stranger[1].1).await.unwrap();
    assert!(matches!(scene.push(1, &ours).await.unwrap_err(), Error::Conflict(_)));
    let record = scene.give_up(1, &ours).await.unwrap();
    assert!(record.segment_digest.is_some());
    assert!(matches!(scene.push(1, &ours).await.unwrap(), Pushed::GivenUp { .. }));
    // The other repository has it: closed there, and the file comes from there.
    assert_eq!(scene.open_gaps(0).await, [record]);
    assert!(scene.open_gaps(1).await.is_empty());
    assert!(matches!(scene.fetch(1).await.unwrap(), FetchOutcome::Delivered { .. }));
    let fetched = std::fs::read(scene.folder.path().join("fetched")).unwrap();
    assert_eq!(fetched, ours);
    // Where only the stranger's is, nothing is delivered.
    let target = scene.folder.path().join("fetched");
    let name = scene.name(1).to_string().parse().unwrap();
    let only = scene.clusters[..1].to_vec();
    let failure = fetch_file(&only, name, &target, &FetchOptions::default()).await.unwrap_err();
    assert!(failure.error.to_string().contains("with other content"), "{}", failure.error);
    let catalog = load_catalog(&scene.clusters[0].newest_lineage().await.unwrap()).await.unwrap();
    assert!(!catalog.segments.contains(scene.name(1)) && catalog.segments.contains(scene.name(2)));

    // Of both together the right one counts, whichever is asked first; the index of the wrong one does not.
    for cluster in &scene.clusters {
        let lineage = cluster.newest_lineage().await.unwrap();
        complete(&lineage, Options { task: Task::Complete, dry_run: false }).await.unwrap();
    }
    let opened = |cluster: &ClusterRepository| ("of this test".to_owned(), Ok(cluster.clone()));
    for first in [0, 1] {
        let both = vec![opened(&scene.clusters[first]), opened(&scene.clusters[1 - first])];
        let (united, _) = open_same_lineage(both, None).await.unwrap();
        let catalog = load_catalog(&united).await.unwrap();
        assert!(catalog.segments.contains(scene.name(1)) && catalog.gaps.is_empty(), "{:?}", catalog.gaps);
        assert_eq!(united.segment_bytes(scene.name(1)).await.unwrap().unwrap(), ours);
        let read = united.summarized(scene.name(1)).await.unwrap().unwrap();
        let digest = blake3::hash(&ours).to_hex();
        assert_eq!(read.digest, digest.as_str());
        let entries = catalog.rollups.iter().flat_map(|rollup| &rollup.entries);
        let mut told = entries.filter(|entry| entry.runs[0].first == scene.name(1));
        assert!(told.all(|entry| entry.digest == digest.as_str()), "the index speaks of the right one");
    }

    // A third one that holds the wrong one and has no record of it would deliver it.
    let third = Repository::create(Arc::new(MemoryStorage::new()), Utc::now()).await.unwrap();
    let third = third.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    third.register_lineage(7, SIZE, 17, Utc::now()).await.unwrap();
    scene.push_into(std::slice::from_ref(&third), 1, &stranger[1].1).await.unwrap();
    let all = vec![opened(&scene.clusters[0]), opened(&scene.clusters[1]), opened(&third)];
    let (united, _) = open_same_lineage(all, None).await.unwrap();
    let catalog = load_catalog(&united).await.unwrap();
    assert!(!catalog.segments.contains(scene.name(1)), "recovery may be given the wrong one");
    assert_eq!(catalog.gaps.len(), 1);
}

#[tokio::test]
async fn damage_of_the_ledger_hides_no_gap_and_lets_nothing_go() {
    let scene = Scene::new().await;
    let bad = damaged(&scene.wal[1].1);
    scene.give_up(1, &bad).await.unwrap();
    let key = scene.gap_keys(0).await.remove(0);
    let whole = scene.memories[0].get(&key, 1 << 20).await.unwrap().unwrap();
    let text = String::from_utf8(whole.to_vec()).unwrap();
    let newer = text.replace("\"format\": 1", "\"format\": 2");
    let elsewhere = text.replace("\"timeline\": 1", "\"timeline\": 2");
    assert!(newer != text && elsewhere != text);
    for (content, is_newer) in
        [("", false), (&text[..text.len() / 2], false), (&*elsewhere, false), (&*newer, true)]
    {
        scene.memories[0].overwrite(&key, Bytes::copy_from_slice(content.as_bytes()));
        scene.push(1, &bad).await.unwrap_err();
        let failure = scene.fetch(1).await.unwrap_err();
        let lineage = scene.clusters[0].newest_lineage().await.unwrap();
        let loaded = load_catalog(&lineage).await;
        if is_newer {
            assert!(matches!(failure.error, Error::Mismatch(_)), "{}", failure.error);
            assert!(matches!(loaded, Err(Error::Mismatch(_))), "{loaded:?}");
        } else {
            assert!(matches!(failure.error, Error::Missing(_)), "{}", failure.error);
            let gaps = loaded.unwrap().gaps;
            assert_eq!((gaps.len(), gaps[0].cause.kind), (1, GapKind::Unknown), "{content:?}");
            assert!(gaps[0].covers(scene.name(1), SIZE), "{gaps:?}");
        }
    }
    // A key that says nothing could hide anything.
    scene.memories[0].overwrite(&key, whole);
    let strange = ObjectKey::new("main/0001/gaps/00000001/somewhere.json").unwrap();
    scene.memories[0].put_if_absent(&strange, Bytes::from_static(b"{}").into()).await.unwrap();
    let lineage = scene.clusters[0].newest_lineage().await.unwrap();
    assert!(matches!(load_catalog(&lineage).await, Err(Error::Corrupt(_))));
    assert!(matches!(scene.fetch(1).await.unwrap_err().error, Error::Corrupt(_)));
    scene.push(1, &bad).await.unwrap_err();
}

#[tokio::test]
async fn a_stretch_that_a_server_removed_is_recorded_everywhere_and_closed_by_its_segments() {
    let scene = Scene::new().await;
    let mut lineages = Vec::new();
    for cluster in &scene.clusters {
        lineages.push(cluster.newest_lineage().await.unwrap());
    }
    let (start, end) = (Lsn(scene.name(1).start(SIZE).0 + 4096), Lsn(scene.name(2).start(SIZE).0 + 24));
    for why in ["", "two\nlines", &"x".repeat(1001)] {
        record_lost(&lineages, TimelineId::FIRST, start, end, why, Utc::now()).await.unwrap_err();
    }
    record_lost(&lineages, TimelineId::FIRST, end, start, "backwards", Utc::now()).await.unwrap_err();
    assert!(scene.gap_keys(0).await.is_empty());
    let why = "slot walship was invalidated";
    let record = record_lost(&lineages, TimelineId::FIRST, start, end, why, Utc::now()).await.unwrap();
    assert_eq!(scene.open_gaps(1).await, [record]);
    // A call that was broken off is made again, perhaps for less: nothing is added.
    record_lost(&lineages, TimelineId::FIRST, start, Lsn(end.0 - 1), why, Utc::now()).await.unwrap();
    assert_eq!((scene.gap_keys(0).await.len(), scene.gap_keys(1).await.len()), (1, 1));
    // Nobody gave it up: the archiver is held up by what it cannot store.
    scene.push(1, &damaged(&scene.wal[1].1)).await.unwrap_err();
    scene.push(2, &scene.wal[2].1).await.unwrap();
    assert_eq!(scene.open_gaps(0).await.len(), 1);
    scene.push(1, &scene.wal[1].1).await.unwrap();
    assert!(scene.open_gaps(0).await.is_empty() && scene.open_gaps(1).await.is_empty());
}
