//! A push whose key is taken: by the same file, by another, by damage, by what cannot be read.
//! Whatever is there stays as it is; what is acknowledged can be read back.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use chrono::Utc;
use walship::Error;
use walship::archive::push::{PushOptions, PushReport, push_file};
use walship::catalog::Catalog;
use walship::error::Result;
use walship::pg::{SegmentName, SegmentSize};
use walship::repository::{ClusterRepository, LineageRepository, Repository, load_catalog};
use walship::storage::faulty::{Call, Fault, FaultyStorage};
use walship::storage::memory::MemoryStorage;
use walship::storage::{ObjectKey, Storage as _};
use walship::wal::testing::WalBuilder;

const STORED: &str = "stored";
const ALREADY: &str = "already stored";
const BESIDE: &str = "stored beside a damaged object";

/// A repository whose storage can be made to misbehave and to hold anything.
struct Scene {
    memory: MemoryStorage,
    faulty: FaultyStorage,
    cluster: ClusterRepository,
    folder: tempfile::TempDir,
}

/// A segment of system identifier 7 that holds one commit, at this time.
fn segment(micros: i64) -> (SegmentName, Vec<u8>) {
    let mut wal = WalBuilder::new(17, SegmentSize::MIN, 7);
    wal.commit(700, micros);
    wal.switch();
    wal.segments().remove(0)
}

impl Scene {
    async fn new() -> Self {
        let memory = MemoryStorage::new();
        let faulty = FaultyStorage::new(Arc::new(memory.clone()));
        let repository = Repository::create(Arc::new(faulty.clone()), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        cluster.register_lineage(7, SegmentSize::MIN, 17, Utc::now()).await.unwrap();
        Self { memory, faulty, cluster, folder: tempfile::tempdir().unwrap() }
    }

    async fn lineage(&self) -> LineageRepository {
        self.cluster.newest_lineage().await.unwrap()
    }

    async fn push_as(&self, name: &str, bytes: &[u8], codec: &str) -> Result<PushReport> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let options = PushOptions {
            compression: codec.parse().unwrap(),
            lineage: None,
            spool_dir: self.folder.path().to_owned(),
        };
        push_file(std::slice::from_ref(&self.cluster), &path, &options).await
    }

    /// Pushes the segment of [`segment`] and returns what was done.
    async fn push(&self, micros: i64, codec: &str) -> Result<&'static str> {
        let (name, bytes) = segment(micros);
        Ok(self.push_as(&name.to_string(), &bytes, codec).await?.repositories[0].outcome)
    }

    /// The key that a whole segment takes.
    fn key(&self) -> ObjectKey {
        let name = segment(1).0.to_string();
        ObjectKey::new(format!("main/0001/wal/{}/{}/{name}.wal", &name[..8], &name[8..16])).unwrap()
    }

    fn stored(&self) -> Vec<String> {
        let keys = self.memory.keys();
        keys.into_iter().filter(|key| key.starts_with(self.key().as_str())).collect()
    }

    async fn object(&self) -> Bytes {
        self.memory.get(&self.key(), 1 << 30).await.unwrap().unwrap()
    }

    async fn damage(&self, change: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut bytes = self.object().await.to_vec();
        change(&mut bytes);
        self.memory.overwrite(&self.key(), bytes.clone());
        bytes.into()
    }

    async fn reads(&self, micros: i64) -> bool {
        let (name, bytes) = segment(micros);
        self.lineage().await.segment_bytes(name).await.unwrap().unwrap() == bytes
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_file_is_success_whatever_its_codec() {
    let scene = Scene::new().await;
    assert_eq!(scene.push(1, "lz4").await.unwrap(), STORED);
    let first = scene.object().await;
    for codec in ["lz4", "zstd", "zstd:9"] {
        assert_eq!(scene.push(1, codec).await.unwrap(), ALREADY, "{codec}");
    }
    assert_eq!((scene.stored().len(), scene.object().await), (1, first), "nothing is written again");
    assert!(scene.reads(1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_lost_is_found_to_be_ones_own_success() {
    let scene = Scene::new().await;
    let mut lose = true;
    scene.faulty.set(move |call, key| {
        (call == Call::Put && key.ends_with(".wal") && std::mem::take(&mut lose)).then_some(Fault::AnswerLost)
    });
    assert!(scene.push(1, "lz4").await.unwrap_err().is_transient());
    assert_eq!(scene.push(1, "zstd").await.unwrap(), ALREADY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_file_is_a_conflict_with_both_digests_and_changes_nothing() {
    let scene = Scene::new().await;
    scene.push(1, "lz4").await.unwrap();
    let before = scene.object().await;
    let error = scene.push(2, "lz4").await.unwrap_err();
    assert!(matches!(error, Error::Conflict(_)), "{error}");
    for micros in [1, 2] {
        let digest = blake3::hash(&segment(micros).1).to_hex();
        assert!(error.to_string().contains(digest.as_str()), "{error}");
    }
    assert!(error.safe().contains("nothing was overwritten"), "{}", error.report());
    assert!(error.next().contains("other content"), "{}", error.report());
    assert_eq!((scene.stored().len(), scene.object().await), (1, before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_no_conflict_and_a_good_copy_goes_beside_it_once() {
    type Change = fn(&mut Vec<u8>);
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 5);
    let longer = |bytes: &mut Vec<u8>| bytes.push(0);
    let flipped = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    let envelope = |bytes: &mut Vec<u8>| bytes[40] ^= 1;
    let empty = |bytes: &mut Vec<u8>| bytes.clear();
    let foreign = |bytes: &mut Vec<u8>| *bytes = b"<html>welcome</html>".to_vec();
    let changes: [(&str, Change); 6] = [
        ("cut", cut),
        ("longer", longer),
        ("flipped", flipped),
        ("envelope", envelope),
        ("empty", empty),
        ("foreign", foreign),
    ];
    for (how, change) in changes {
        let scene = Scene::new().await;
        scene.push(1, "lz4").await.unwrap();
        let damaged = scene.damage(change).await;
        assert_eq!(scene.push(1, "zstd").await.unwrap(), BESIDE, "{how}");
        assert_eq!(scene.object().await, damaged, "{how}: what is there stays");
        assert_eq!(scene.stored().len(), 2, "{how}");
        assert!(scene.reads(1).await, "{how}: the good copy is read");
        assert_eq!(scene.push(1, "lz4").await.unwrap(), ALREADY, "{how}: the copy is known");
        // A file that differs from the sound copy is a conflict still.
        assert!(matches!(scene.push(2, "lz4").await, Err(Error::Conflict(_))), "{how}");
        assert_eq!(scene.stored().len(), 2, "{how}");
        let leftovers = scene.lineage().await.leftovers().await.unwrap();
        assert!(matches!(leftovers.as_slice(), [copy] if copy.is_copy), "{how}: {leftovers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_that_says_it_is_another_file_is_a_conflict() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, bool, Change); 7] = [
        ("cut", true, |bytes| bytes.truncate(bytes.len() - 5)),
        ("no more than the envelope", true, |bytes| bytes.truncate(160)),
        ("longer", true, |bytes| bytes.push(0)),
        ("body", true, |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("summary", true, |bytes| bytes[170] ^= 1),
        // Nothing tells any more what it was.
        ("digest in the envelope", false, |bytes| bytes[64] ^= 1),
        ("envelope cut", false, |bytes| bytes.truncate(150)),
    ];
    for (how, is_named, change) in changes {
        let scene = Scene::new().await;
        scene.push(1, "lz4").await.unwrap();
        let damaged = scene.damage(change).await;
        let pushed = scene.push(2, "lz4").await;
        assert_eq!(scene.object().await, damaged, "{how}: what is there stays");
        if !is_named {
            assert_eq!(pushed.unwrap(), BESIDE, "{how}");
            assert!(scene.reads(2).await, "{how}");
            continue;
        }
        let error = pushed.unwrap_err();
        assert!(matches!(error, Error::Conflict(_)), "{how}: {error}");
        assert!(error.to_string().contains("damaged, too"), "{how}: {error}");
        assert_eq!(scene.stored().len(), 1, "{how}: nothing is put beside it");
        // The file that it was is welcome, and is the segment again.
        assert_eq!(scene.push(1, "zstd").await.unwrap(), BESIDE, "{how}");
        assert!(scene.reads(1).await, "{how}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn object_and_copy_damaged_is_a_failure() {
    let scene = Scene::new().await;
    scene.push(1, "lz4").await.unwrap();
    scene.damage(|bytes| bytes.truncate(200)).await;
    scene.push(1, "lz4").await.unwrap();
    let copy = ObjectKey::new(scene.stored().pop().unwrap()).unwrap();
    scene.memory.overwrite(&copy, "nothing");
    let error = scene.push(1, "lz4").await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
    assert!(error.to_string().contains("both damaged"), "{error}");
    assert_eq!(scene.stored().len(), 2, "no third copy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_neither_success_nor_damage() {
    for call in [Call::Confirm, Call::GetRange] {
        for (fault, transient) in [(Fault::Unavailable, true), (Fault::Denied, false)] {
            let scene = Scene::new().await;
            scene.push(1, "lz4").await.unwrap();
            scene.faulty.set(move |asked, key| (asked == call && key.ends_with(".wal")).then_some(fault));
            let error = scene.push(1, "lz4").await.unwrap_err();
            assert_eq!(error.is_transient(), transient, "{call:?} {fault:?}: {error}");
            assert_eq!(scene.stored().len(), 1, "{call:?} {fault:?}: no copy beside it");
            scene.faulty.heal();
            assert_eq!(scene.push(1, "lz4").await.unwrap(), ALREADY);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_on_the_way_is_read_again() {
    let scene = Scene::new().await;
    scene.push(1, "lz4").await.unwrap();
    let mut once = true;
    scene.faulty.set(move |call, key| {
        let spoil = call == Call::GetRange && key.ends_with(".wal") && std::mem::take(&mut once);
        spoil.then_some(Fault::Flipped(300))
    });
    assert_eq!(scene.push(1, "lz4").await.unwrap(), ALREADY);
    assert_eq!(scene.stored().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_goes_away_in_between_is_stored_again() {
    let scene = Scene::new().await;
    scene.push(1, "lz4").await.unwrap();
    let (memory, key) = (scene.memory.clone(), scene.key());
    let mut once = true;
    scene.faulty.set(move |call, asked| {
        if call == Call::Confirm && asked == key.as_str() && std::mem::take(&mut once) {
            memory.remove(&key);
        }
        None
    });
    assert_eq!(scene.push(1, "lz4").await.unwrap(), STORED);
    assert!(scene.reads(1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incomplete_file_takes_no_ones_key() {
    let scene = Scene::new().await;
    let (name, whole) = segment(1);
    let mut wal = WalBuilder::new(17, SegmentSize::MIN, 7);
    wal.commit(700, 1);
    let padded = wal.segments().remove(0).1;
    for outcome in [STORED, ALREADY] {
        let report = scene.push_as(&name.to_string(), &padded, "lz4").await.unwrap();
        assert!(!report.whole && report.warnings[0].contains("not a whole segment"), "{report:?}");
        assert_eq!(report.repositories[0].outcome, outcome);
    }
    assert_eq!(scene.stored().len(), 0, "the segment's own key is free");
    let lineage = scene.lineage().await;
    assert_eq!(lineage.segment_bytes(name).await.unwrap(), None, "and nothing is served under it");
    assert_eq!(lineage.incomplete_of(name).await.unwrap().len(), 1);
    let report = scene.push_as(&name.to_string(), &whole, "lz4").await.unwrap();
    assert_eq!((report.whole, report.repositories[0].outcome), (true, STORED));
    assert!(scene.reads(1).await);
    let catalog = load_catalog(&lineage).await.unwrap();
    assert_eq!(catalog.segments.names().collect::<Vec<_>>(), [name]);
    assert_eq!(catalog.incomplete, [name]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_catalog_is_whole_or_an_error() {
    let scene = Scene::new().await;
    scene.push(1, "lz4").await.unwrap();
    let history = b"1\t0/300000\tno reason\n";
    scene.push_as("00000002.history", history, "lz4").await.unwrap();
    let lineage = scene.lineage().await;
    // It is written beside a push, and may be done a moment later.
    let without_index = |catalog: Catalog| Catalog { rollups: Vec::new(), ..catalog };
    let catalog = without_index(load_catalog(&lineage).await.unwrap());
    assert_eq!((catalog.segments.names().count(), catalog.histories.len(), catalog.backups.len()), (1, 1, 0));

    // An outage at any place is no shorter catalog.
    for at in ["main/0001/wal", "main/0001/backups", "00000002.history"] {
        scene.faulty.set(move |_, key| key.contains(at).then_some(Fault::Unavailable));
        assert!(load_catalog(&lineage).await.unwrap_err().is_transient(), "{at}");
    }
    scene.faulty.heal();
    // What strangers put there is not taken for ours.
    for key in ["main/0001/wal/notes", "main/0001/backups/catalog/notes.json", "main/0001/wal/00000001/x.wal"]
    {
        scene.memory.overwrite(&ObjectKey::new(key).unwrap(), "{}");
        let loaded = load_catalog(&lineage).await;
        match key.contains("catalog") {
            // It may be a backup's record that was damaged: a plan without it could be wrong.
            true => assert!(matches!(loaded, Err(Error::Corrupt(_))), "{key}: {loaded:?}"),
            false => assert_eq!(without_index(loaded.unwrap()), catalog, "{key}"),
        }
        scene.memory.remove(&ObjectKey::new(key).unwrap());
    }
    let name = scene.memory.keys().into_iter().find(|key| key.ends_with(".history")).unwrap();
    scene.memory.overwrite(&ObjectKey::new(name).unwrap(), "damaged");
    assert!(matches!(load_catalog(&lineage).await, Err(Error::Corrupt(_))));
}
