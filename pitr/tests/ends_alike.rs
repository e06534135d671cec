//! Where the archive ends and where it has a hole: what a plan says, and what `restore-cmd` tells a server that asks for
//! one segment after the other, of random archives.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use chrono::Utc;
use pitr::plan::{ChainEnding, build_chain};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use walship::Error;
use walship::archive::fetch::{FetchOptions, FetchOutcome, fetch_file};
use walship::archive::push::{PushOptions, push_file};
use walship::catalog::{GapCause, GapKind, GapRecord, StoredTail};
use walship::codec::Compression;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};
use walship::repository::{ClusterRepository, LineageRepository, Repository, load_catalog, load_tails};
use walship::storage::memory::MemoryStorage;
use walship::wal::testing::WalBuilder;

const SIZE: SegmentSize = SegmentSize::MIN;
const SEGMENTS: usize = 6;

/// What is stored of a segment.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Nothing,
    Whole,
    /// Parts from the one offset to the other.
    Parts(usize, usize),
    /// A file with the end of a timeline.
    Partial,
    /// A file that ended early, kept apart.
    Incomplete,
}

struct Place {
    clusters: Vec<ClusterRepository>,
    lineage: LineageRepository,
    folder: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        let storage = Arc::new(MemoryStorage::default());
        let repository = Repository::create(storage, Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        let lineage = cluster.register_lineage(7, SIZE, 17, Utc::now()).await.unwrap();
        Self { clusters: vec![cluster], lineage, folder: tempfile::tempdir().unwrap() }
    }

    async fn push(&self, name: &str, bytes: &[u8]) {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let spool_dir = self.folder.path().to_owned();
        let options = PushOptions { compression: Compression::Lz4, lineage: None, spool_dir };
        push_file(&self.clusters, &path, &options).await.unwrap();
    }

    async fn store(&self, name: SegmentName, bytes: &[u8], stored: Stored) {
        match stored {
            Stored::Nothing => {}
            Stored::Whole => self.push(&name.to_string(), bytes).await,
            Stored::Partial => self.push(&format!("{name}.partial"), bytes).await,
            Stored::Incomplete => {
                let mut short = bytes.to_vec();
                short[300_000..].fill(0);
                self.push(&name.to_string(), &short).await;
            }
            Stored::Parts(from, to) => {
                let start = Lsn(name.start(SIZE).0 + from as u64);
                let part = bytes[from..to].to_vec();
                self.lineage.put_tail(name.timeline, start, part, Compression::Lz4).await.unwrap();
            }
        }
    }

    async fn lose(&self, start: Lsn, end: Lsn) {
        let gap = GapRecord {
            format: 1,
            id: "20261121T010203Z-0123456789abcdef".into(),
            timeline: TimelineId::FIRST,
            start_lsn: start,
            end_lsn: end,
            cause: GapCause { kind: GapKind::Lost, text: "a test".into() },
            segment_digest: None,
            recorded: Utc::now(),
            host: "here".into(),
            user: "nobody".into(),
        };
        self.lineage.put_gap(&gap).await.unwrap();
    }

    /// Asks as a server does that recovers to the end: how many whole segments it gets, and whether it ends there,
    /// or is told of a hole.
    async fn asked(&self, first: SegmentName) -> (u64, bool) {
        let target = self.folder.path().join("fetched");
        let (mut name, mut whole) = (first, 0);
        loop {
            let fetched = fetch(&self.clusters, name, &target, None).await;
            match fetched {
                Ok(FetchOutcome::Delivered { from, .. }) => {
                    let zeros = std::fs::read(&target).unwrap().iter().rev().take_while(|b| **b == 0).count();
                    if from.contains("in parts") && zeros > 1000 {
                        return (whole, true);
                    }
                    whole += 1;
                    name = name.next(SIZE).unwrap();
                }
                Ok(FetchOutcome::Absent) => return (whole, true),
                Err(Error::Missing(_)) => return (whole, false),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}

async fn fetch(
    clusters: &Vec<ClusterRepository>,
    name: SegmentName,
    target: &Path,
    up_to_gap: Option<Lsn>,
) -> walship::Result<FetchOutcome> {
    let name = name.to_string().parse().unwrap();
    let options = FetchOptions { up_to_gap, ..FetchOptions::default() };
    fetch_file(clusters, name, target, &options).await.map_err(|failure| failure.error)
}

/// What a plan says is stored before lost WAL is what its restore gets, and makes no other segment look different.
async fn is_served_as_planned(place: &Place, segments: &[(SegmentName, Vec<u8>)], tail: &StoredTail) {
    let lost_from = tail.lost_from.unwrap();
    assert!(tail.until_lsn <= tail.end_lsn && tail.end_lsn <= lost_from, "{tail:?}");
    let target = place.folder.path().join("planned");
    for (name, bytes) in segments {
        let planned = fetch(&place.clusters, *name, &target, Some(lost_from)).await;
        if *name == tail.segment {
            assert!(matches!(planned, Ok(FetchOutcome::Delivered { .. })), "{planned:?}");
            let end = SIZE.offset_of(tail.end_lsn) as usize;
            let served = std::fs::read(&target).unwrap();
            assert!(served[..end] == bytes[..end] && served[end..].iter().all(|byte| *byte == 0));
        } else {
            let told = |fetched: walship::Result<FetchOutcome>| fetched.map_err(|error| error.to_string());
            assert_eq!(told(planned), told(fetch(&place.clusters, *name, &target, None).await), "{name}");
        }
    }
}

#[tokio::test]
async fn a_plan_and_restore_cmd_see_the_same_end() {
    let mut wal = WalBuilder::new(17, SIZE, 7);
    for xid in 0..SEGMENTS as u32 {
        wal.commit(700 + xid, 1_000_000);
        // No zeros at the end of a segment, by which a server would take it for the last one.
        for _ in 0..5 {
            wal.filler(200_000);
        }
        wal.fill_segment(0);
    }
    let segments: Vec<_> = wal.segments().into_iter().take(SEGMENTS).collect();
    let mut told = std::collections::BTreeMap::<(bool, bool), u32>::new();
    for seed in 0..150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let place = Place::new().await;
        let mut script = vec![Stored::Whole];
        // Most archives are whole up to somewhere.
        let whole = rng.random_range(1..SEGMENTS);
        for number in 1..SEGMENTS {
            let any = [
                Stored::Nothing,
                Stored::Nothing,
                Stored::Whole,
                Stored::Parts(0, rng.random_range(1000..900_000)),
                Stored::Parts(0, 1 << 20),
                Stored::Parts(rng.random_range(1..1000), 5000),
                Stored::Partial,
                Stored::Incomplete,
            ];
            let odd =
                if rng.random_bool(0.4) { any[rng.random_range(0..any.len())] } else { Stored::Nothing };
            script.push(match number {
                _ if number < whole => Stored::Whole,
                _ if number == whole && rng.random_bool(0.3) => any[3],
                _ => odd,
            });
        }
        for ((name, bytes), stored) in segments.iter().zip(&script) {
            place.store(*name, bytes, *stored).await;
        }
        let gap = rng.random_bool(0.3).then(|| {
            let segment = if rng.random_bool(0.5) { whole } else { rng.random_range(1..SEGMENTS) };
            let start = segments[segment].0.start(SIZE).0 + u64::from(rng.random_bool(0.8)) * 100_000;
            (Lsn(start), Lsn(start + rng.random_range(1..3 << 20)))
        });
        if let Some((start, end)) = gap {
            place.lose(start, end).await;
        }
        let switch =
            rng.random_bool(0.2).then(|| segments[rng.random_range(1..SEGMENTS)].0.start(SIZE).0 + 5000);
        if let Some(switch) = switch {
            place.push("00000002.history", format!("1\t{}\tno reason\n", Lsn(switch)).as_bytes()).await;
        }

        let mut catalog = load_catalog(&place.lineage).await.unwrap();
        load_tails(&place.lineage, &mut catalog).await.unwrap();
        let first = segments[0].0;
        let chain = build_chain(&catalog, &TimelineHistory::root(TimelineId::FIRST), first.start(SIZE));
        let steps = chain.steps_from(0).enumerate();
        let planned = steps.filter(|(at, _)| !chain.is_open(*at)).count() as u64;
        let is_end = chain.ending == ChainEnding::EndOfArchive;
        let asked = place.asked(first).await;
        assert_eq!(
            (planned, is_end),
            asked,
            "seed {seed}: {script:?}, gap {gap:?}, switch {switch:?}: {:?}",
            chain.ending
        );
        let open = chain.last_step().is_some_and(|_| chain.is_open(chain.len() - 1));
        if let Some(tail) = chain.last_step().and_then(|step| catalog.stranded.get(&step.segment)) {
            assert!(open && !is_end, "seed {seed}");
            is_served_as_planned(&place, &segments, tail).await;
        }
        *told.entry((is_end, open)).or_default() += 1;
    }
    // Each was there, an open segment also before a gap that begins in it.
    assert!(told.len() == 4 && told.values().all(|count| *count >= 3), "{told:?}");
}
