//! A repository whose end is gone does not look complete: the index remembers what it saw.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use walship::pg::{SegmentName, SegmentSize, TimelineId};
use walship::repository::index::write::extend;
use walship::repository::testing::{made_up_object, made_up_summary};
use walship::repository::{LineageRepository, Repository, load_catalog, load_catalog_from_listings};
use walship::storage::ObjectKey;
use walship::storage::memory::MemoryStorage;

const SEGMENTS: u64 = 300;

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SegmentSize::DEFAULT).unwrap()
}

async fn archive(segments: u64) -> (LineageRepository, MemoryStorage) {
    let storage = MemoryStorage::new();
    let repository = Repository::create(Arc::new(storage.clone()), Utc::now()).await.unwrap();
    let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
    let lineage = cluster.register_lineage(7, SegmentSize::DEFAULT, 17, Utc::now()).await.unwrap();
    for number in 1..=segments {
        extend(&lineage, name(number)).await.unwrap();
        let time = DateTime::UNIX_EPOCH + TimeDelta::minutes(number as i64);
        let summary = made_up_summary(lineage.lineage(), name(number), 2 * number as u32, [time, time]);
        lineage.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
    }
    (lineage, storage)
}

fn remove(storage: &MemoryStorage, segments: impl Iterator<Item = u64>) {
    for number in segments {
        let file = format!("/{}.wal", name(number));
        let key = storage.keys().into_iter().find(|key| key.ends_with(&file)).unwrap();
        storage.remove(&ObjectKey::new(key).unwrap());
    }
}

#[tokio::test]
async fn segments_that_the_index_tells_of_and_that_are_gone_from_the_end_are_known_to_have_been() {
    // The index lags behind by up to sixteen segments: what it never saw cannot be missed.
    let (whole, storage) = archive(SEGMENTS).await;
    assert!(load_catalog(&whole).await.unwrap().lost_ends.is_empty());
    let catalog = load_catalog(&whole).await.unwrap();
    let runs = catalog.rollups.iter().flat_map(|rollup| rollup.runs());
    let last_told = runs.map(|run| run.first.number(SegmentSize::DEFAULT) + run.segments - 1);
    let last_told = last_told.max().unwrap();
    assert!(last_told < SEGMENTS && SEGMENTS - last_told <= 16, "{last_told}");
    remove(&storage, last_told + 1..=SEGMENTS);
    assert!(load_catalog(&whole).await.unwrap().lost_ends.is_empty());

    // Later ones are known, however many are gone; what is left is what listings show.
    for gone in [1, 40, last_told - 1] {
        let (lineage, storage) = archive(SEGMENTS).await;
        remove(&storage, last_told + 1 - gone..=SEGMENTS);
        let catalog = load_catalog(&lineage).await.unwrap();
        assert_eq!(catalog.lost_ends.get(&TimelineId::FIRST), Some(&name(last_told)), "{gone}");
        assert_eq!(catalog.segments, load_catalog_from_listings(&lineage).await.unwrap().segments);
        assert_eq!(catalog.segments.last_of_timeline(TimelineId::FIRST), Some(name(last_told - gone)));
        assert!(catalog.rollups.is_empty());
    }
}
