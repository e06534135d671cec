//! One lineage in several repositories, read as one.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use chrono::{TimeDelta, TimeZone as _, Utc};
use walship::pg::{SegmentName, SegmentSize, TimelineId};
use walship::repository::index::complete::{Options, Task, complete};
use walship::repository::testing::{made_up_object, made_up_summary};
use walship::repository::{
    ClusterRepository, LineageRepository, Repository, load_catalog, load_catalog_from_listings,
    open_same_lineage,
};
use walship::storage::ObjectKey;
use walship::storage::memory::MemoryStorage;
use walship::{Error, Result};

struct Place {
    storage: MemoryStorage,
    cluster: ClusterRepository,
}

impl Place {
    async fn new() -> Self {
        let storage = MemoryStorage::new();
        let repository = Repository::create(Arc::new(storage.clone()), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        Self { storage, cluster }
    }

    async fn lineage(&self, system_identifier: u64, day: u32) -> LineageRepository {
        let created = Utc.with_ymd_and_hms(2026, 1, day, 0, 0, 0).unwrap();
        self.cluster.register_lineage(system_identifier, SegmentSize::DEFAULT, 17, created).await.unwrap()
    }

    fn opened(&self, url: &str) -> (String, Result<ClusterRepository>) {
        (url.to_owned(), Ok(self.cluster.clone()))
    }

    fn key(&self, number: u64) -> ObjectKey {
        let keys = self.storage.keys();
        let key = keys.into_iter().find(|key| key.ends_with(&format!("{}.wal", name(number)))).unwrap();
        ObjectKey::new(key).unwrap()
    }
}

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SegmentSize::DEFAULT).unwrap()
}

async fn store(lineage: &LineageRepository, numbers: impl IntoIterator<Item = u64>) {
    let time = Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap();
    for number in numbers {
        let times = [number, number + 1].map(|minutes| time + TimeDelta::minutes(minutes as i64));
        let summary = made_up_summary(lineage.lineage(), name(number), 2 * number as u32, times);
        lineage.put_wal_file(&made_up_object(&summary).unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn the_same_lineage_is_found_whatever_its_number_and_nothing_else_is() {
    let (a, b, foreign) = (Place::new().await, Place::new().await, Place::new().await);
    a.lineage(7, 1).await;
    b.lineage(5, 1).await;
    b.lineage(7, 2).await;
    foreign.lineage(9, 1).await;
    let dead = || ("s3://dead/x".to_owned(), Err(Error::unavailable("no answer")));
    let opened = || vec![dead(), a.opened("file:///a"), b.opened("file:///b"), foreign.opened("file:///f")];
    let (lineage, _) = open_same_lineage(opened(), None).await.unwrap();
    let numbers = |lineage: &LineageRepository| {
        lineage
            .each()
            .iter()
            .map(|one| (one.lineage().system_identifier, one.lineage().number))
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers(&lineage), [(7, 1), (7, 2)]);
    let notes = lineage.notes().join("\n");
    assert!(notes.contains("file:///f does not hold this lineage"), "{notes}");
    assert!(notes.contains("s3://dead/x cannot be read") && notes.contains("no answer"), "{notes}");
    assert_eq!(lineage.unreadable(), ["s3://dead/x"]);

    // A cluster that was made anew: the newest of all repositories counts, and an older copy knows nothing of it.
    b.lineage(11, 3).await;
    let (lineage, _) = open_same_lineage(opened(), None).await.unwrap();
    assert_eq!(numbers(&lineage), [(11, 3)]);
    // By number: that of the first which has it.
    let (lineage, _) = open_same_lineage(opened(), Some(1)).await.unwrap();
    assert_eq!(numbers(&lineage), [(7, 1), (7, 2)]);
    assert!(matches!(open_same_lineage(opened(), Some(9)).await, Err(Error::Unavailable(_))));
    assert!(matches!(open_same_lineage(vec![a.opened("a")], Some(9)).await, Err(Error::Missing(_))));
}

#[tokio::test]
async fn what_one_lacks_is_read_from_another_and_said() {
    let (a, b) = (Place::new().await, Place::new().await);
    let (in_a, in_b) = (a.lineage(7, 1).await, b.lineage(7, 1).await);
    store(&in_a, 1..300).await;
    store(&in_b, (1..100).chain(110..400)).await;
    let options = Options { task: Task::Complete, dry_run: false };
    complete(&in_a, options).await.unwrap();
    complete(&in_b, options).await.unwrap();
    a.storage.overwrite(&a.key(50), b"damaged".to_vec());
    let both = vec![a.opened("a"), b.opened("b")];
    let (lineage, _) = open_same_lineage(both, None).await.unwrap();
    for catalog in
        [load_catalog(&lineage).await.unwrap(), load_catalog_from_listings(&lineage).await.unwrap()]
    {
        let runs = catalog.segments.runs(TimelineId::FIRST);
        assert_eq!(runs.iter().map(|run| (run.first, run.last)).collect::<Vec<_>>(), [(name(1), name(399))]);
    }
    let notes = lineage.notes().join("\n");
    assert!(notes.contains("lacks 100 segment(s)") && notes.contains("lacks 10 segment(s)"), "{notes}");
    // Absent here, absent there, damaged here.
    for number in [350, 105, 50] {
        assert_eq!(lineage.summarized(name(number)).await.unwrap().unwrap().summary.segment, name(number));
    }
    let notes = lineage.notes();
    let taken: Vec<_> = notes.iter().filter(|note| note.contains("was taken from")).collect();
    assert!(taken.len() == 1 && taken[0].contains(&name(50).to_string()), "{notes:?}");
    assert!(lineage.is_whole_elsewhere(name(50)).await.unwrap());
    let listed = lineage.segments_listed(TimelineId::FIRST, 1, 400).await.unwrap();
    assert!(listed.is_sorted_by_key(|one| one.name) && listed.len() == 399);
    // In neither.
    b.storage.overwrite(&b.key(50), b"damaged too".to_vec());
    assert!(matches!(lineage.summarized(name(50)).await, Err(Error::Corrupt(_))));
    assert!(lineage.summarized(name(900)).await.unwrap().is_none());
}
