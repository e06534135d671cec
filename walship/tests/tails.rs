//! Segments put together from parts: only the end of the archive may end early.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use chrono::Utc;
use walship::Error;
use walship::archive::fetch::{FetchFailure, FetchOptions, FetchOutcome, fetch_file};
use walship::archive::push::{PushOptions, push_file};
use walship::codec::Compression;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::repository::{ClusterRepository, Damage, LineageRepository, Repository};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage as _};

const SIZE: SegmentSize = SegmentSize::MIN;
const SYSTEM_IDENTIFIER: u64 = 7;

struct Place {
    storage: Arc<MemoryStorage>,
    clusters: Vec<ClusterRepository>,
    lineage: LineageRepository,
    folder: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        let storage = Arc::new(MemoryStorage::default());
        let repository = Repository::create(storage.clone(), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        let lineage = cluster.register_lineage(SYSTEM_IDENTIFIER, SIZE, 17, Utc::now()).await.unwrap();
        Self { storage, clusters: vec![cluster], lineage, folder: tempfile::tempdir().unwrap() }
    }

    async fn put(&self, number: u64, from: usize, to: usize) {
        let bytes = segment(number)[from..to].to_vec();
        self.put_bytes(number, from, bytes).await.unwrap();
    }

    async fn put_bytes(&self, number: u64, from: usize, bytes: Vec<u8>) -> walship::Result<ObjectKey> {
        let start = Lsn(number * SIZE.bytes() + from as u64);
        self.lineage.put_tail(TimelineId::FIRST, start, bytes, Compression::Lz4).await
    }

    async fn fetch(&self, number: u64) -> Result<Option<Vec<u8>>, FetchFailure> {
        let name = name(number).to_string().parse().unwrap();
        let target = self.folder.path().join("fetched");
        match fetch_file(&self.clusters, name, &target, &FetchOptions::default()).await? {
            FetchOutcome::Absent => Ok(None),
            FetchOutcome::Delivered { .. } => Ok(Some(std::fs::read(&target).unwrap())),
        }
    }
}

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SIZE).unwrap()
}

/// A segment's first page header as PostgreSQL 17 writes it, and noise.
fn segment(number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0xD116u16.to_le_bytes());
    bytes.extend(2u16.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend((number * SIZE.bytes()).to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(SYSTEM_IDENTIFIER.to_le_bytes());
    bytes.extend((SIZE.bytes() as u32).to_le_bytes());
    bytes.extend(8192u32.to_le_bytes());
    bytes.extend((bytes.len()..1 << 20).map(|at| (at * 31 + number as usize) as u8 | 1));
    bytes
}

fn cut(number: u64, end: usize) -> Option<Vec<u8>> {
    let mut bytes = segment(number);
    bytes[end..].fill(0);
    Some(bytes)
}

#[tokio::test]
async fn parts_of_two_receivers_join_up_to_the_first_hole() {
    let place = Place::new().await;
    assert_eq!(place.fetch(5).await.unwrap(), None);
    place.put(5, 100, 900).await;
    assert_eq!(place.fetch(5).await.unwrap(), None, "not from its start");
    place.put(5, 0, 300).await;
    place.put(5, 250, 400).await;
    place.put(5, 900, 1000).await;
    place.put(5, 1001, 2000).await;
    assert_eq!(place.fetch(5).await.unwrap(), cut(5, 1000));
    place.put(5, 1000, 1001).await;
    assert_eq!(place.fetch(5).await.unwrap(), cut(5, 2000));
    // The same again is success.
    place.put(5, 0, 300).await;
}

#[tokio::test]
async fn what_is_behind_makes_a_tail_a_hole_unless_it_is_whole() {
    let place = Place::new().await;
    place.put(5, 0, 5000).await;
    place.put(6, 0, 50).await;
    let failure = place.fetch(5).await.unwrap_err();
    assert!(matches!(failure.error, Error::Missing(_)), "{}", failure.error);
    assert_eq!(place.fetch(6).await.unwrap(), cut(6, 50));
    // Without any part of its own it is a hole as well.
    let failure = place.fetch(4).await.unwrap_err();
    assert!(matches!(failure.error, Error::Missing(_)), "{}", failure.error);
    place.put(5, 4000, 1 << 20).await;
    assert_eq!(place.fetch(5).await.unwrap(), Some(segment(5)));
}

#[tokio::test]
async fn parts_that_disagree_or_are_damaged_are_not_served() {
    let place = Place::new().await;
    place.put(5, 0, 400).await;
    let mut other = segment(5)[300..600].to_vec();
    other[50] ^= 1;
    place.put_bytes(5, 300, other.clone()).await.unwrap();
    let failure = place.fetch(5).await.unwrap_err();
    assert!(matches!(failure.error, Error::Conflict(_)), "{}", failure.error);
    let taken = place.put_bytes(5, 300, segment(5)[300..600].to_vec()).await.unwrap_err();
    assert!(matches!(taken, Error::Conflict(_)), "{taken}");

    let place = Place::new().await;
    place.put(5, 0, 400).await;
    place.put(5, 0, 300).await;
    let key = place.put_bytes(5, 400, segment(5)[400..500].to_vec()).await.unwrap();
    let damaged = b"no part".to_vec();
    place.storage.delete(&key).await.unwrap();
    place.storage.put_if_absent(&key, damaged.into()).await.unwrap();
    let failure = place.fetch(5).await.unwrap_err();
    assert!(matches!(failure.error, Error::Corrupt(_)), "{}", failure.error);
    // Another receiver's cut holds the same bytes.
    place.put(5, 350, 450).await;
    place.put(5, 420, 510).await;
    assert_eq!(place.fetch(5).await.unwrap(), cut(5, 510));
}

/// A new timeline's first segment begins with its parent's bytes, which are shipped anew under its name. When that
/// came to nothing half-way, what is stored of the parent is as good.
#[tokio::test(flavor = "multi_thread")]
async fn before_a_fork_the_parents_parts_are_as_good() {
    let place = Place::new().await;
    let young = |number| name(number).on(TimelineId::new(2).unwrap());
    let (bytes, fork) = (segment(5), 50_000_u64);
    let history = place.folder.path().join("00000002.history");
    let switch = Lsn(5 * SIZE.bytes() + fork);
    std::fs::write(&history, format!("1\t{switch}\tno recovery target specified\n")).unwrap();
    let options = PushOptions {
        compression: Compression::Lz4,
        lineage: Some(1),
        spool_dir: place.folder.path().to_owned(),
    };
    push_file(&place.clusters, &history, &options).await.unwrap();
    let put = async |timeline: u32, from: usize, bytes: &[u8]| {
        let (timeline, start) = (TimelineId::new(timeline).unwrap(), Lsn(5 * SIZE.bytes() + from as u64));
        place.lineage.put_tail(timeline, start, bytes.to_vec(), Compression::Lz4).await.unwrap()
    };
    let tail = async || {
        let file = tempfile::tempfile().unwrap();
        let end = place.lineage.tail_into(young(5), &file, Damage::IsAnError).await?;
        let mut read = vec![0; end as usize];
        file.read_exact_at(&mut read, 0).unwrap();
        Ok::<_, Error>(read)
    };
    put(1, 0, &bytes[..60_000]).await;
    assert_eq!(tail().await.unwrap(), b"", "nothing of it was shipped: its parent is asked for instead");
    put(2, 0, &bytes[..20_000]).await;
    assert!(tail().await.unwrap() == bytes[..50_000], "up to the fork, and not behind it");
    // What it has itself goes on from there.
    put(2, 40_000, &bytes[40_000..70_000]).await;
    assert!(tail().await.unwrap() == bytes[..70_000]);
    put(2, 20_000, &bytes[20_000..40_000]).await;
    assert!(tail().await.unwrap() == bytes[..70_000]);

    // Other bytes before the fork are no beginning of it.
    let place = Place::new().await;
    push_file(&place.clusters, &history, &options).await.unwrap();
    place.put_bytes(5, 0, vec![7; 60_000]).await.unwrap();
    let start = Lsn(5 * SIZE.bytes());
    let two = TimelineId::new(2).unwrap();
    place.lineage.put_tail(two, start, bytes[..20_000].to_vec(), Compression::Lz4).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = place.lineage.tail_into(young(5), &file, Damage::IsAnError).await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)), "{error}");
}
