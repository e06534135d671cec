//! The world as a store: keys and objects made when they are asked for, a thousand keys in a page.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use walship::archive::push::{PushOptions, push_file};
use walship::catalog::{BackupObject, BackupRecord};
use walship::codec::{Compression, Digest, EncodedBody, EncodedObject};
use walship::pg::{Lsn, TimelineId};
use walship::repository::{BackupStarted, Repository, index, new_backup_id};
use walship::storage::memory::MemoryStorage;
use walship::storage::{FolderPage, ListPage, ObjectKey, ObjectMeta, PutBody, PutOutcome, Storage, Upload};
use walship::wal::rollup::{LEVEL_MAX, Place, Rollup, span};
use walship::wal::testing::INITDB_LIMITS;
use walship::{Error, Result};

use super::world::{self, Node, STORED_BYTES, Shape, World, made_up};

const PAGE: usize = 1000;

/// What exists of the world with a digest of its own, because it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Thing {
    Segment(TimelineId, u64),
    Rollup(Place, u64),
}

impl Thing {
    /// Returns whether this is a roll-up that may name the other thing, or one that does.
    fn stands_for(self, other: Self) -> bool {
        let Self::Rollup(place, _) = self else { return false };
        let (timeline, level, first) = match other {
            Self::Segment(timeline, number) => (timeline, 0, number),
            Self::Rollup(place, _) => (place.timeline, place.level, place.first),
        };
        place.timeline == timeline && place.level > level && (place.first..place.end()).contains(&first)
    }
}

#[derive(Clone)]
pub(super) struct GeneratedStore {
    world: Arc<World>,
    /// Everything but segments and roll-ups.
    rest: MemoryStorage,
    real: Arc<Mutex<Real>>,
}

#[derive(Default)]
struct Real {
    things: BTreeSet<Thing>,
    wishes: bool,
    /// What cannot be read.
    damaged: Option<(u8, u64)>,
    digests: HashMap<Thing, String>,
    /// How long segments' objects are that were made once and not kept.
    lengths: HashMap<Thing, u64>,
    objects: HashMap<Thing, Bytes>,
}

impl std::fmt::Debug for GeneratedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GeneratedStore")
    }
}

impl GeneratedStore {
    pub(super) async fn new(world: Arc<World>) -> Self {
        let rest = MemoryStorage::new();
        fill(&rest, world.shape).await.expect("memory takes everything");
        Self { world, rest, real: Arc::default() }
    }

    /// Damages the fullest roll-up of a level that stands for a segment, or none.
    pub(super) fn damage(&self, rollup: Option<(u8, u64)>) {
        let mut real = self.real();
        real.damaged = rollup;
        real.objects.clear();
    }

    /// Returns whether something was asked for whose digest was made up; from now on it has its own.
    pub(super) fn took_wishes(&self) -> bool {
        std::mem::take(&mut self.real().wishes)
    }

    pub(super) fn shape(&self) -> Shape {
        self.world.shape
    }

    /// Returns a segment's key and object, which has its own digest from now on and is not kept.
    pub(super) fn make_segment(&self, timeline: TimelineId, number: u64) -> (ObjectKey, Bytes) {
        let object = self.world.object(timeline, number);
        let thing = Thing::Segment(timeline, number);
        let digest = object.envelope.digest.to_string();
        let bytes = joined(&object);
        let mut real = self.real();
        real.things.insert(thing);
        real.digests.insert(thing, digest);
        real.lengths.insert(thing, bytes.len() as u64);
        let key = ObjectKey::new(self.segment_key(timeline, number)).expect("a sound key");
        (key, bytes)
    }

    /// Gives every roll-up a digest of its own; for when every segment has.
    pub(super) fn make_rollups(&self) {
        let shape = self.world.shape;
        for timeline in super::timelines(shape) {
            let (first, end) = shape.range(timeline);
            for level in 1..=LEVEL_MAX {
                for at in first / span(level)..end.div_ceil(span(level)) {
                    let place = Place { timeline, level, first: at * span(level) };
                    let versions = self.world.versions(place).into_iter();
                    self.real().things.extend(versions.map(|count| Thing::Rollup(place, count)));
                }
            }
        }
    }

    /// Forgets what was made of objects: they are made again when they are asked for.
    pub(super) fn forget_objects(&self) {
        self.real().objects.clear();
    }

    fn real(&self) -> std::sync::MutexGuard<'_, Real> {
        self.real.lock().expect("nobody panicked")
    }

    fn digest(&self, thing: Thing) -> String {
        if !self.real().things.contains(&thing) {
            return match thing {
                Thing::Segment(timeline, number) => made_up(&format!("{timeline} {number}")),
                Thing::Rollup(place, count) => made_up(&format!("{:?}", (place, count))),
            };
        }
        if let Some(known) = self.real().digests.get(&thing) {
            return known.clone();
        }
        let digest = match thing {
            Thing::Segment(timeline, number) => {
                self.world.object(timeline, number).envelope.digest.to_string()
            }
            Thing::Rollup(place, count) => Digest::of(&json(&self.rollup((place, count)))).to_string(),
        };
        self.real().digests.insert(thing, digest.clone());
        digest
    }

    /// Returns a roll-up with the digests that its children have.
    fn rollup(&self, node: Node) -> Rollup {
        let mut rollup = (*self.world.node(node)).clone();
        let (timeline, size) = (node.0.timeline, self.world.shape.size);
        for entry in &mut rollup.entries {
            let Some(run) = entry.runs.first() else { continue };
            let first = run.first.number(size);
            let child = match node.0.level {
                1 => Thing::Segment(timeline, first),
                level => {
                    let below = Place::of(run.first, size, level - 1);
                    let count = self.world.version_of(below, entry.segments());
                    Thing::Rollup(below, count.expect("what a roll-up names was written"))
                }
            };
            entry.digest = self.digest(child);
            if let Thing::Segment(timeline, number) = child {
                entry.facts.stored_bytes = self.stored_bytes(timeline, number);
            }
        }
        rollup
    }

    /// Returns an object of the world; an error when it is to get a digest of its own first.
    fn object(&self, thing: Thing) -> Result<Bytes> {
        if !self.real().things.contains(&thing) {
            let mut real = self.real();
            real.things.insert(thing);
            real.wishes = true;
            // What names it changes with it.
            let sound = |other: &Thing| !other.stands_for(thing);
            real.digests.retain(|other, _| sound(other));
            real.objects.retain(|other, _| sound(other));
            // Not an error that readers of the index go on after.
            return Err(Error::unavailable("it is not there yet"));
        }
        if let Some(known) = self.real().objects.get(&thing) {
            return Ok(known.clone());
        }
        let damaged = match thing {
            Thing::Rollup(place, count) => {
                let fullest = self.world.versions(place).last() == Some(&count);
                let of = |(level, number): (u8, u64)| {
                    place.level == level && (place.first..place.end()).contains(&number)
                };
                let damaged = self.real().damaged;
                fullest && damaged.is_some_and(of)
            }
            Thing::Segment(..) => false,
        };
        if damaged {
            return Ok(Bytes::from_static(b"not what it was"));
        }
        let bytes: Bytes = match thing {
            Thing::Segment(timeline, number) => joined(&self.world.object(timeline, number)),
            Thing::Rollup(place, count) => {
                zstd::encode_all(&*json(&self.rollup((place, count))), 3).expect("memory").into()
            }
        };
        self.real().objects.insert(thing, bytes.clone());
        Ok(bytes)
    }

    fn segment_key(&self, timeline: TimelineId, number: u64) -> String {
        let name = self.world.shape.name(timeline, number);
        format!("main/0001/wal/{}/{:08X}/{name}.wal", timeline.hex(), name.log)
    }

    fn rollup_key(&self, place: Place, count: u64) -> String {
        let digest = self.digest(Thing::Rollup(place, count));
        let (timeline, level) = (place.timeline.hex(), place.level);
        let start = place.start_lsn(self.world.shape.size).0;
        let covered = self.world.covered((place, count));
        format!("main/0001/index/{timeline}/{level}/{start:016X}-{covered:010X}-{}.json.zst", &digest[..32])
    }

    /// Returns what a key names, and of roll-ups whatever digest it says.
    fn thing(&self, key: &str) -> Option<Thing> {
        let rest = key.strip_prefix("main/0001/")?;
        if let Some(rest) = rest.strip_prefix("wal/") {
            let segment: walship::pg::SegmentName =
                rest.rsplit('/').next()?.strip_suffix(".wal")?.parse().ok()?;
            let (first, end) = self.world.shape.range(segment.timeline);
            let number = segment.number(self.world.shape.size);
            return (first..end).contains(&number).then_some(Thing::Segment(segment.timeline, number));
        }
        let mut parts = rest.strip_prefix("index/")?.split('/');
        let timeline = TimelineId::new(u32::from_str_radix(parts.next()?, 16).ok()?)?;
        let level = parts.next()?.parse().ok()?;
        let mut words = parts.next()?.split('-');
        let first = u64::from_str_radix(words.next()?, 16).ok()? / self.world.shape.size.bytes();
        let count = u64::from_str_radix(words.next()?, 16).ok()?;
        let place = Place { timeline, level, first };
        Some(Thing::Rollup(place, self.world.version_of(place, count)?))
    }

    /// Returns the keys of segments behind `after`, a page and one more.
    fn segments_behind(&self, timeline: TimelineId, after: &str) -> Vec<ObjectMeta> {
        let (first, end) = self.world.shape.range(timeline);
        let (mut low, mut high) = (first, end);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.segment_key(timeline, middle).as_str() > after { high = middle } else { low = middle + 1 }
        }
        let page = low..end.min(low + PAGE as u64 + 1);
        let listed = |number| meta(self.segment_key(timeline, number), self.stored_bytes(timeline, number));
        page.map(listed).collect()
    }

    /// Returns how long a segment's object is, or is said to be while nobody looks at it.
    fn stored_bytes(&self, timeline: TimelineId, number: u64) -> u64 {
        let thing = Thing::Segment(timeline, number);
        let (known, is_real) = {
            let real = self.real();
            (real.lengths.get(&thing).copied(), real.things.contains(&thing))
        };
        if known.is_some() || !is_real {
            return known.unwrap_or(STORED_BYTES);
        }
        self.object(thing).map_or(STORED_BYTES, |bytes| bytes.len() as u64)
    }

    fn rollups_behind(&self, timeline: TimelineId, level: u8, after: &str) -> Vec<ObjectMeta> {
        let (first, end) = self.world.shape.range(timeline);
        let places = first / span(level)..end.div_ceil(span(level));
        let place = |at: u64| Place { timeline, level, first: at * span(level) };
        let prefix = |at: u64| {
            let start = place(at).start_lsn(self.world.shape.size).0;
            format!("main/0001/index/{}/{level}/{start:016X}~", timeline.hex())
        };
        let (mut low, mut high) = (places.start, places.end);
        while low < high {
            let middle = low + (high - low) / 2;
            if prefix(middle).as_str() > after { high = middle } else { low = middle + 1 }
        }
        let mut found = Vec::new();
        for place in (low..places.end).map(place) {
            for count in self.world.versions(place) {
                let key = self.rollup_key(place, count);
                if key.as_str() > after {
                    found.push(meta(key, 20_000));
                }
            }
            if found.len() > PAGE {
                break;
            }
        }
        found
    }
}

fn meta(key: String, bytes: u64) -> ObjectMeta {
    ObjectMeta { key: ObjectKey::new(key).expect("a sound key"), bytes }
}

fn joined(object: &EncodedObject) -> Bytes {
    let EncodedBody::Memory(body) = &object.body else { unreachable!("it is short") };
    [&*object.head, body].concat().into()
}

fn json(rollup: &Rollup) -> Vec<u8> {
    serde_json::to_vec(rollup).expect("plain data")
}

/// Stores the documents, the histories and the backups.
async fn fill(rest: &MemoryStorage, shape: Shape) -> Result<()> {
    let now = shape.commit_time(1);
    let repository = Repository::create(Arc::new(rest.clone()), now).await?;
    let cluster = repository.create_cluster(&"main".parse()?, now).await?;
    let lineage = cluster.register_lineage(world::SYSTEM, shape.size, 17, now).await?;
    let folder = tempfile::tempdir().expect("a folder");
    let options = PushOptions {
        compression: Compression::default(),
        lineage: Some(1),
        spool_dir: folder.path().to_owned(),
    };
    let mut history = String::new();
    for (number, first, _) in &shape.timelines[1..] {
        history.push_str(&format!("{}\t{}\tpromoted\n", number - 1, Lsn(first * shape.size.bytes())));
        let path = folder.path().join(format!("{number:08X}.history"));
        std::fs::write(&path, &history).expect("a small file");
        push_file(std::slice::from_ref(&cluster), &path, &options).await?;
    }
    let numbers = (1..shape.segments).filter(|number| shape.is_backup(*number));
    for (at, number) in numbers.enumerate() {
        let timelines = super::timelines(shape);
        let timeline = timelines.into_iter().find(|timeline| {
            let (first, end) = shape.range(*timeline);
            (first..end).contains(&number)
        });
        let timeline = timeline.expect("every segment has a timeline");
        let started = shape.commit_time(number);
        let id = new_backup_id(started, number);
        let start_lsn = Lsn(number * shape.size.bytes() + 40);
        lineage
            .put_backup_started(&BackupStarted {
                format: 1,
                id: id.clone(),
                label: "walship".into(),
                timeline,
                start_lsn,
                host: "db".into(),
                started,
                parent: None,
            })
            .await?;
        let stop_lsn = Lsn(start_lsn.0 + 2 * shape.size.bytes());
        lineage.put_backup_record(&record(id, timeline, (start_lsn, stop_lsn), started)).await?;
        // As the backups themselves do; the last eight are not in the list.
        if at % 16 == 15 {
            index::backups::extend_list(&lineage).await?;
        }
    }
    Ok(())
}

fn record(
    id: String,
    timeline: TimelineId,
    (start_lsn, stop_lsn): (Lsn, Lsn),
    started: chrono::DateTime<chrono::Utc>,
) -> BackupRecord {
    // A terabyte in objects of a quarter of a gigabyte would have four thousand; forty stand for them.
    let object = |at: u32| BackupObject {
        name: format!("data/{at:06}.tar"),
        tablespace: None,
        stored_bytes: 100 << 20,
        tar_bytes: 256 << 20,
        digest: made_up(&format!("{id} {at}")),
        index: None,
        backup: None,
    };
    let objects = (1..=40).map(object).collect();
    BackupRecord {
        format: 1,
        id,
        label: "walship".into(),
        timeline,
        start_lsn,
        stop_timeline: timeline,
        stop_lsn,
        started,
        finished: started + chrono::TimeDelta::seconds(9),
        server_version: 170_004,
        from_standby: false,
        data_bytes: 10 << 30,
        stored_bytes: 4 << 30,
        files: 20_000,
        tablespaces: vec![],
        objects,
        limits: INITDB_LIMITS,
        data_checksums: true,
        manifest_digest: made_up("manifest"),
        settings_files: vec![],
        names: None,
        prepared: None,
        damaged_pages: None,
        parent: None,
    }
}

#[async_trait]
impl Storage for GeneratedStore {
    fn location(&self) -> String {
        "generated:".to_owned()
    }

    async fn put_if_absent(&self, key: &ObjectKey, body: PutBody) -> Result<PutOutcome> {
        self.rest.put_if_absent(key, body).await
    }

    async fn start_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>> {
        self.rest.start_upload(key).await
    }

    async fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Option<Bytes>> {
        match self.thing(key.as_str()) {
            Some(thing) => self.object(thing).map(Some),
            None => self.rest.get(key, max_bytes).await,
        }
    }

    async fn get_range(&self, key: &ObjectKey, offset: u64, length: u64) -> Result<Option<Bytes>> {
        let Some(thing) = self.thing(key.as_str()) else {
            return self.rest.get_range(key, offset, length).await;
        };
        let bytes = self.object(thing)?;
        let from = (offset as usize).min(bytes.len());
        let to = offset.saturating_add(length).min(bytes.len() as u64) as usize;
        Ok(Some(bytes.slice(from..to)))
    }

    async fn confirm(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        self.rest.confirm(key).await
    }

    async fn list(&self, prefix: &str, page: Option<&str>) -> Result<ListPage> {
        let after = page.unwrap_or("").max(prefix);
        let mut found = self.rest.list(prefix, page).await?.objects;
        for timeline in super::timelines(self.world.shape) {
            let own = format!("main/0001/wal/{}/", timeline.hex());
            if own.starts_with(prefix) || prefix.starts_with(&own) {
                found.extend(self.segments_behind(timeline, after));
            }
            for level in 1..=LEVEL_MAX {
                let own = format!("main/0001/index/{}/{level}/", timeline.hex());
                // Only what can be in the page is made.
                if own.starts_with(prefix) || prefix.starts_with(&own) {
                    found.extend(self.rollups_behind(timeline, level, after));
                }
            }
        }
        found.retain(|meta| meta.key.as_str().starts_with(prefix) && meta.key.as_str() > page.unwrap_or(""));
        found.sort_by(|a, b| a.key.cmp(&b.key));
        let more = found.len() > PAGE;
        found.truncate(PAGE);
        let next = found.last().filter(|_| more).map(|meta| meta.key.to_string());
        Ok(ListPage { objects: found, next })
    }

    async fn list_folders(&self, prefix: &str, page: Option<&str>) -> Result<FolderPage> {
        let all = self.rest.list_folders(prefix, page).await?.names;
        let more = all.len() > PAGE;
        let names: Vec<String> = all.into_iter().take(PAGE).collect();
        let next = names.last().filter(|_| more).cloned();
        Ok(FolderPage { names, next })
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.rest.delete(key).await
    }
}
