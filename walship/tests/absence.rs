//! When a WAL file may be called absent: never while the archive itself says that there was more.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use chrono::Utc;
use walship::Error;
use walship::archive::fetch::{FetchOptions, FetchOutcome, fetch_file};
use walship::archive::push::{PushOptions, push_file};
use walship::codec::Compression;
use walship::pg::SegmentSize;
use walship::repository::Repository;
use walship::storage::memory::MemoryStorage;

/// The parent's last segments before a fork are a hole when they are missing, although nothing later
/// is stored on the parent itself.
#[tokio::test]
async fn a_segment_before_a_fork_is_a_hole_and_not_the_end() {
    let repository = Repository::create(Arc::new(MemoryStorage::default()), Utc::now()).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    cluster.register_lineage(7, SegmentSize::MIN, 17, Utc::now()).await.unwrap();
    let clusters = vec![cluster];

    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("fetched");
    let options = FetchOptions::default();
    let fetch = async |name: &str| fetch_file(&clusters, name.parse().unwrap(), &target, &options).await;

    // Before anybody knows of the fork, nothing says that there was more.
    assert_eq!(fetch("000000010000000000000002").await.unwrap(), FetchOutcome::Absent);

    let history = folder.path().join("00000003.history");
    std::fs::write(&history, "1\t0/300000\tno recovery target specified\n").unwrap();
    let push = PushOptions {
        compression: Compression::default(),
        lineage: None,
        spool_dir: folder.path().to_owned(),
    };
    push_file(&clusters, &history, &push).await.unwrap();

    let failure = fetch("000000010000000000000002").await.unwrap_err();
    assert!(matches!(failure.error, Error::Missing(_)), "{}", failure.error);
    assert!(failure.error.to_string().contains("timeline 3 left timeline 1"), "{}", failure.error);
    // The fork lies at the start of this one: the parent need not have it.
    assert_eq!(fetch("000000010000000000000003").await.unwrap(), FetchOutcome::Absent);
    assert!(!target.exists());
}
