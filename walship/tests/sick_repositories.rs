//! Repositories of which one is away, or damaged.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use walship::Error;
use walship::archive::fetch::{FetchOptions, FetchOutcome, OpenClusters, Opening, fetch_file};
use walship::archive::push::{PushOptions, PushReport, push_file};
use walship::codec::Compression;
use walship::error::Result;
use walship::pg::SegmentSize;
use walship::repository::{ClusterRepository, Repository};
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage};

const NAME: &str = "00000003.history";

async fn cluster(storage: Arc<dyn Storage>) -> ClusterRepository {
    let repository = Repository::create(storage, Utc::now()).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    cluster.register_lineage(7, SegmentSize::MIN, 17, Utc::now()).await.unwrap();
    cluster
}

/// Pushes a history file that gives this reason.
async fn push(cluster: &ClusterRepository, reason: &str) -> Result<PushReport> {
    let folder = tempfile::tempdir().unwrap();
    let history = folder.path().join(NAME);
    std::fs::write(&history, format!("1\t0/300000\t{reason}\n")).unwrap();
    let options = PushOptions {
        compression: Compression::default(),
        lineage: None,
        spool_dir: folder.path().to_owned(),
    };
    push_file(std::slice::from_ref(cluster), &history, &options).await
}

/// Returns the keys of the history file and of its copies.
fn keys(storage: &MemoryStorage) -> Vec<ObjectKey> {
    let keys = storage.keys().into_iter().filter(|key| key.contains(NAME));
    keys.map(|key| ObjectKey::new(key).unwrap()).collect()
}

/// The first repository never opens, the second one is there.
struct SecondOpens(ClusterRepository);

impl OpenClusters for SecondOpens {
    fn open(&self) -> Vec<Opening<'_>> {
        vec![Box::pin(std::future::pending()), Box::pin(async { Ok(self.0.clone()) })]
    }
}

#[tokio::test]
async fn a_repository_that_does_not_open_keeps_none_waiting_but_is_not_taken_for_empty() {
    let second = cluster(Arc::new(MemoryStorage::default())).await;
    push(&second, "no reason").await.unwrap();
    let clusters = SecondOpens(second);
    let folder = tempfile::tempdir().unwrap();
    let fetch = async |name: &str, target: &Path, patience_ms: u64| {
        let options = FetchOptions::default();
        let fetch = fetch_file(&clusters, name.parse().unwrap(), target, &options);
        tokio::time::timeout(Duration::from_millis(patience_ms), fetch).await.map(|fetched| fetched.unwrap())
    };
    let target = folder.path().join("fetched");
    let fetched = fetch(NAME, &target, 30_000).await.unwrap();
    assert!(matches!(fetched, FetchOutcome::Delivered { .. }), "{fetched:?}");
    assert_eq!(std::fs::read(&target).unwrap(), b"1\t0/300000\tno reason\n");
    fetch("00000004.history", &target, 300).await.unwrap_err();
}

/// Returns the copy that a push of the file that gives this reason stores beside damage.
async fn copy_of(reason: &str) -> (ObjectKey, Bytes) {
    let storage = Arc::new(MemoryStorage::default());
    let cluster = cluster(storage.clone()).await;
    push(&cluster, reason).await.unwrap();
    storage.overwrite(&keys(&storage)[0], "damage");
    push(&cluster, reason).await.unwrap();
    let copy = keys(&storage).pop().unwrap();
    let bytes = storage.get_range(&copy, 0, 1 << 20).await.unwrap().unwrap();
    (copy, bytes)
}

#[tokio::test]
async fn of_two_different_files_over_a_damaged_key_none_is_accepted_silently() {
    let (memory, copies) = (Arc::new(MemoryStorage::default()), [copy_of("one").await, copy_of("two").await]);
    let faulty = FaultyStorage::new(memory.clone());
    let cluster = cluster(Arc::new(faulty.clone())).await;
    push(&cluster, "one").await.unwrap();
    memory.overwrite(&keys(&memory)[0], "damage");

    // The other archiver's copy comes after ours was looked for and before ours is stored.
    let (other, storage) = (copies[1].clone(), memory.clone());
    faulty.set(move |call, key| {
        if call == Call::Put && key.contains(".r") {
            storage.overwrite(&other.0, other.1.clone());
        }
        None
    });
    let error = push(&cluster, "one").await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)), "{error}");
    assert_eq!(keys(&memory).len(), 3);
    faulty.heal();
    for reason in ["one", "two"] {
        let error = push(&cluster, reason).await.unwrap_err();
        assert!(matches!(error, Error::Conflict(_)), "{reason}: {error}");
    }
}

#[tokio::test]
async fn one_bad_read_is_no_damage() {
    let memory = Arc::new(MemoryStorage::default());
    let faulty = FaultyStorage::new(memory.clone());
    let cluster = cluster(Arc::new(faulty.clone())).await;
    push(&cluster, "one").await.unwrap();
    let mut bad_reads = 1;
    faulty.set(move |call, key| {
        let bad = call == Call::GetRange && key.contains(NAME) && bad_reads > 0;
        bad_reads -= i32::from(bad);
        bad.then_some(Fault::Flipped(3))
    });
    let report = push(&cluster, "one").await.unwrap();
    assert_eq!(report.repositories[0].outcome, "already stored");
    assert_eq!(keys(&memory).len(), 1);
}
