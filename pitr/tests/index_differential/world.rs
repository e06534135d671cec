//! Random histories as real, encoded WAL in a memory repository, with a list of every record that was written.

use std::sync::Arc;

use chrono::{DateTime, TimeZone as _, Utc};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use walship::catalog::BackupRecord;
use walship::codec::{
    Compression, EncodedBody, EncodedObject, Envelope, ObjectHead, ObjectKind, encode_body,
};
use walship::pg::{
    HistoryEntry, Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName, Xid,
};
use walship::repository::index::complete::{Options, Task, complete};
use walship::repository::index::write::extend;
use walship::repository::{LineageRepository, Put, Repository};
use walship::storage::ObjectKey;
use walship::storage::memory::MemoryStorage;
use walship::wal::scan::SegmentScanner;
use walship::wal::testing::{INITDB_LIMITS, WalBuilder};

pub(crate) const SIZE: SegmentSize = SegmentSize::MIN;
const SYSTEM: u64 = 42;
const XLOG: u8 = 0;
const TABLESPACE: u8 = 5;

/// What a record is to recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// A commit (or an abort) at so many microseconds after 2000-01-01.
    End {
        xid: Xid,
        micros: i64,
        committed: bool,
    },
    RestorePoint(String),
    Other,
}

/// A record as it was written.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) lsn: Lsn,
    pub(crate) end: Lsn,
    pub(crate) what: What,
}

/// One timeline's WAL.
pub(crate) struct Branch {
    pub(crate) history: TimelineHistory,
    wal: WalBuilder,
    /// Every record on the way to its end, its ancestors' included.
    pub(crate) records: Vec<Written>,
}

pub(crate) struct World {
    rng: StdRng,
    clock: i64,
    next_xid: Xid,
    pub(crate) branches: Vec<Branch>,
    pub(crate) backups: Vec<BackupRecord>,
    /// What can be stored, in the order in which it comes.
    arriving: Vec<(SegmentName, Vec<u8>)>,
    pub(crate) storage: MemoryStorage,
    pub(crate) lineage: LineageRepository,
}

pub(crate) fn time(micros: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(946_684_800, 0).unwrap() + chrono::TimeDelta::microseconds(micros)
}

pub(crate) fn tli(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

impl World {
    /// Makes a history and stores all of it but what got lost, by several archivers.
    pub(crate) async fn new(seed: u64) -> Self {
        let storage = MemoryStorage::new();
        let repository = Repository::create(Arc::new(storage.clone()), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        let lineage = cluster.register_lineage(SYSTEM, SIZE, 17, Utc::now()).await.unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let first = if rng.random_bool(0.8) { rng.random_range(246..256) } else { 1 };
        // Near the end of the xids: they wrap in the middle of the history.
        let next_xid = if rng.random_bool(0.5) { u32::MAX - rng.random_range(0..120) } else { 700 };
        let mut wal = WalBuilder::new(17, SIZE, SYSTEM).starting_at(first);
        wal.set_timeline(TimelineId::FIRST);
        let history = TimelineHistory::root(TimelineId::FIRST);
        let mut world = Self {
            rng,
            clock: 1_000_000_000,
            next_xid,
            branches: vec![Branch { history, wal, records: Vec::new() }],
            backups: Vec::new(),
            arriving: Vec::new(),
            storage,
            lineage,
        };
        world.make();
        world.archive().await;
        world
    }

    fn make(&mut self) {
        let segments = self.rng.random_range(5..16);
        for segment in 0..segments {
            if segment == 0 || self.rng.random_bool(0.25) {
                self.backup(0);
            }
            self.segment(0);
        }
        // Timelines skip numbers; one may leave a child.
        let mut number = 1;
        for _ in 0..self.rng.random_range(0..3) {
            number += self.rng.random_range(1..3);
            let parent = self.rng.random_range(0..self.branches.len());
            self.fork(parent, tli(number));
            let (own, segments) = (self.branches.len() - 1, self.rng.random_range(1..6));
            for _ in 0..segments {
                if self.rng.random_bool(0.2) {
                    self.backup(own);
                }
                self.segment(own);
            }
            // The parent went on for a while.
            for _ in 0..self.rng.random_range(0..3) {
                self.segment(parent);
            }
        }
        for branch in &self.branches {
            let own = branch.history.timeline;
            let begin = branch.history.begin_lsn().unwrap_or(Lsn(0));
            let stored = branch.wal.segments().into_iter().filter(|(name, _)| {
                let begun = name.end(SIZE) > begin;
                begun && name.end(SIZE) <= branch.wal.position()
            });
            let named = stored.map(|(name, bytes)| (name.on(own), bytes));
            self.arriving.extend(named);
        }
    }

    fn note(&mut self, branch: usize, lsn: Lsn, what: What) {
        let end = self.branches[branch].wal.position();
        self.branches[branch].records.push(Written { lsn, end, what });
    }

    fn filler(&mut self, branch: usize, bytes: usize) -> Lsn {
        let lsn = self.branches[branch].wal.filler(bytes);
        self.note(branch, lsn, What::Other);
        lsn
    }

    fn left_in_segment(&self, branch: usize) -> u64 {
        let position = self.branches[branch].wal.position();
        SIZE.bytes() - position.0 % SIZE.bytes()
    }

    /// Writes one random record.
    fn record(&mut self, branch: usize) {
        let kind = self.rng.random_range(0..16);
        self.record_of(branch, kind);
    }

    fn record_of(&mut self, branch: usize, kind: u32) {
        self.clock += self.rng.random_range(0..2_000_000);
        if self.rng.random_bool(0.05) {
            self.clock -= self.rng.random_range(0..20_000_000);
        }
        let micros = self.clock;
        self.next_xid = self.next_xid.checked_add(1).unwrap_or(3);
        let xid = self.next_xid;
        let wal = &mut self.branches[branch].wal;
        let end = |committed| What::End { xid, micros, committed };
        let (lsn, what) = match kind {
            0..=5 => (wal.commit(xid, micros), end(true)),
            6 => (wal.abort(xid, micros), end(false)),
            7 => (wal.commit_dropping(xid, micros, &[16384, 16385]), end(true)),
            8 | 9 => {
                let name = if kind == 8 { "even" } else { "odd" };
                (wal.restore_point(name, micros), What::RestorePoint(name.to_owned()))
            }
            10 => {
                let words = [100 + (micros % 100) as i32, 8, 10, 0, 64, 1, 0];
                let main: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                (wal.record(0, XLOG, 0x60, &main), What::Other)
            }
            11 => {
                let mut main = (16_000 + (micros % 1000) as u32).to_le_bytes().to_vec();
                main.extend(format!("/srv/ts{micros}\0").bytes());
                (wal.record(xid, TABLESPACE, 0x00, &main), What::Other)
            }
            12 => (wal.record(xid, TABLESPACE, 0x10, &16_001u32.to_le_bytes()), What::Other),
            // A commit so long that summaries cannot hold its ends.
            13 => {
                let relations: Vec<u32> = (0..1500).collect();
                (wal.commit_dropping(xid, micros, &relations), end(true))
            }
            _ => (wal.filler(self.rng.random_range(8..3000)), What::Other),
        };
        self.note(branch, lsn, what);
    }

    /// Fills the segment that is begun, with a record of some kind across its end.
    fn segment(&mut self, branch: usize) {
        for _ in 0..self.rng.random_range(0..6) {
            self.record(branch);
        }
        while self.left_in_segment(branch) > 300_000 {
            self.filler(branch, 250_000);
            if self.rng.random_bool(0.3) {
                self.record(branch);
            }
        }
        while self.left_in_segment(branch) > 60_000 {
            self.filler(branch, 30_000);
        }
        if self.left_in_segment(branch) < 28_000 {
            self.filler(branch, 30_000);
            return;
        }
        match self.rng.random_range(0..12) {
            0 => {
                let lsn = self.branches[branch].wal.switch();
                self.note(branch, lsn, What::Other);
            }
            1 => {
                // Across two boundaries.
                self.filler(branch, 1_200_000);
            }
            2 => {
                let before = self.left_in_segment(branch);
                if before > 30_000 {
                    // A crash cuts a commit off; the next start writes over what was to come.
                    self.branches[branch].wal.fill_segment(64);
                    let lsn = self.branches[branch].wal.position();
                    self.note(branch, lsn, What::Other);
                    self.branches[branch].wal.crash_cut(9_000, 0);
                    let lsn = self.branches[branch].wal.position();
                    self.note(branch, lsn, What::Other);
                }
            }
            other => {
                let left = [0, 8, 16, 24, 32, 40, 64, 256][other % 8];
                let lsn = self.branches[branch].wal.position();
                self.branches[branch].wal.fill_segment(left);
                self.note(branch, lsn, What::Other);
                // What is listed, and what is counted.
                let kind = [0, 4, 7, 8, 10, 11, 11, 12, 13, 15][self.rng.random_range(0..10)];
                self.record_of(branch, kind);
            }
        }
    }

    /// Writes what a base backup leaves in the WAL, and its record.
    fn backup(&mut self, branch: usize) {
        let start = self.filler(branch, 16);
        for _ in 0..self.rng.random_range(0..3) {
            self.record(branch);
        }
        if self.rng.random_bool(0.3) {
            self.segment(branch);
        }
        let mut main = vec![0u8; 88];
        main[..8].copy_from_slice(&start.0.to_le_bytes());
        let timeline = self.branches[branch].history.timeline;
        main[8..12].copy_from_slice(&timeline.get().to_le_bytes());
        main[64..72].copy_from_slice(&time(self.clock).timestamp().to_le_bytes());
        let lsn = self.branches[branch].wal.record(0, XLOG, 0x10, &main);
        self.note(branch, lsn, What::Other);
        let lsn = self.branches[branch].wal.record(0, XLOG, 0x50, &start.0.to_le_bytes());
        self.note(branch, lsn, What::Other);
        let stop = self.branches[branch].wal.position();
        let began = time(self.clock);
        self.backups.push(record(&format!("b{}", self.backups.len()), timeline, start, stop, began));
    }

    /// Begins a timeline where its parent is now.
    fn fork(&mut self, parent: usize, timeline: TimelineId) {
        let mut wal = self.branches[parent].wal.clone();
        let before = self.branches[parent].history.timeline;
        let switch_lsn = wal.position();
        wal.set_timeline(timeline);
        let mut ancestors = self.branches[parent].history.ancestors.clone();
        ancestors.push(HistoryEntry { timeline: before, switch_lsn, reason: "test".into() });
        let history = TimelineHistory { timeline, ancestors };
        let records = self.branches[parent].records.clone();
        self.branches.push(Branch { history, wal, records });
        let mut main = self.clock.to_le_bytes().to_vec();
        for word in [timeline.get(), before.get(), 1] {
            main.extend_from_slice(&word.to_le_bytes());
        }
        let own = self.branches.len() - 1;
        let lsn = self.branches[own].wal.record(0, XLOG, 0x90, &main);
        self.note(own, lsn, What::Other);
    }

    async fn archive(&mut self) {
        let histories = self.branches.iter().filter(|branch| !branch.history.ancestors.is_empty());
        for branch in histories {
            let lines = branch.history.ancestors.iter();
            let text: String =
                lines.map(|entry| format!("{}\t{}\ttest\n", entry.timeline, entry.switch_lsn)).collect();
            let name = WalFileName::History(branch.history.timeline);
            let object = encoded(name, text.as_bytes());
            self.lineage.put_wal_file(&object).await.unwrap();
        }
        for record in &self.backups {
            self.lineage.put_backup_record(record).await.unwrap();
        }
        let mut arriving = std::mem::take(&mut self.arriving);
        // Some are lost, some come late, some are pushed by two.
        for _ in 0..self.rng.random_range(0..3) {
            if self.rng.random_bool(0.4) && arriving.len() > 4 {
                arriving.remove(self.rng.random_range(0..arriving.len()));
            }
            let late = self.rng.random_range(0..arriving.len());
            let late = arriving.remove(late);
            arriving.push(late);
        }
        if self.rng.random_bool(0.2) {
            arriving.shuffle(&mut self.rng);
        }
        let completed_at = self.rng.random_range(0..=arriving.len());
        for (at, (name, bytes)) in arriving.iter().enumerate() {
            if at == completed_at && self.rng.random_bool(0.7) {
                self.index(Task::Complete).await;
            }
            let _ = extend(&self.lineage, *name).await;
            let object = encoded(WalFileName::Segment(*name), bytes);
            self.lineage.put_wal_file(&object).await.unwrap();
            if self.rng.random_bool(0.1) {
                let again = self.lineage.put_wal_file(&object).await.unwrap();
                assert_eq!(again, Put::AlreadyStored);
            }
            if self.rng.random_bool(0.05) {
                self.damage_segment(*name, &object).await;
            }
        }
        if self.rng.random_bool(0.7) {
            self.index(Task::Complete).await;
        }
    }

    pub(crate) async fn index(&self, task: Task) {
        complete(&self.lineage, Options { task, dry_run: false }).await.unwrap();
    }

    /// Flips a bit of a stored segment, and lets an archiver store a good copy beside it.
    async fn damage_segment(&mut self, name: SegmentName, object: &EncodedObject) {
        let key = self.key_of(name);
        let mut bytes = self.storage_bytes(&key).await;
        let at = self.rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << self.rng.random_range(0..8);
        self.storage.overwrite(&key, bytes);
        self.lineage.put_wal_file(object).await.unwrap();
    }

    pub(crate) fn any_segment(&mut self) -> (SegmentName, ObjectKey) {
        let keys: Vec<_> = self.storage.keys().into_iter().filter(|key| key.ends_with(".wal")).collect();
        let at = self.rng.random_range(0..keys.len());
        let name = keys[at].rsplit('/').next().and_then(|name| name.strip_suffix(".wal"));
        (name.unwrap().parse().unwrap(), ObjectKey::new(keys[at].as_str()).unwrap())
    }

    fn key_of(&self, name: SegmentName) -> ObjectKey {
        let keys = self.storage.keys();
        let key = keys.into_iter().find(|key| key.ends_with(&format!("{name}.wal"))).unwrap();
        ObjectKey::new(key).unwrap()
    }

    pub(crate) async fn storage_bytes(&self, key: &ObjectKey) -> Vec<u8> {
        self.lineage.storage().get(key, 1 << 30).await.unwrap().unwrap().to_vec()
    }

    pub(crate) fn rng(&mut self) -> &mut StdRng {
        &mut self.rng
    }

    pub(crate) fn clock(&self) -> i64 {
        self.clock
    }
}

fn record(id: &str, timeline: TimelineId, start: Lsn, stop: Lsn, began: DateTime<Utc>) -> BackupRecord {
    BackupRecord {
        format: 1,
        id: walship::repository::new_backup_id(began, id[1..].parse().unwrap()),
        label: "walship".into(),
        timeline,
        start_lsn: start,
        stop_timeline: timeline,
        stop_lsn: stop,
        started: began,
        finished: began,
        server_version: 170_004,
        from_standby: false,
        data_bytes: 1000,
        stored_bytes: 400,
        files: 10,
        tablespaces: vec![],
        objects: vec![walship::catalog::BackupObject {
            name: "data/000001.tar".into(),
            tablespace: None,
            stored_bytes: 1,
            tar_bytes: 1,
            digest: "0".repeat(64),
            index: None,
            backup: None,
        }],
        limits: INITDB_LIMITS,
        data_checksums: true,
        manifest_digest: String::new(),
        settings_files: vec![],
        names: None,
        prepared: Some(Vec::new()),
        damaged_pages: None,
        parent: None,
    }
}

/// Returns a WAL file as a push stores it.
fn encoded(name: WalFileName, bytes: &[u8]) -> EncodedObject {
    let mut body = Vec::new();
    let mut scanner = match name {
        WalFileName::Segment(segment) => Some(SegmentScanner::new(segment, SIZE)),
        _ => None,
    };
    let mut observe = |chunk: &[u8]| {
        if let Some(scanner) = &mut scanner {
            scanner.push(chunk);
        }
    };
    let found =
        encode_body(&mut &*bytes, bytes.len() as u64, Compression::default(), &mut body, &mut observe)
            .unwrap();
    let scan = scanner.map(SegmentScanner::finish);
    if let Some(scan) = &scan {
        assert_eq!(scan.verdict, walship::wal::scan::Verdict::Whole, "{name}");
    }
    let envelope = Envelope {
        kind: ObjectKind::of(name),
        name,
        codec: Compression::default().codec(),
        segment_size: SIZE,
        system_identifier: SYSTEM,
        plain_bytes: found.plain_bytes,
        body_bytes: found.body_bytes,
        body_crc: found.body_crc,
        digest: found.digest,
    };
    let head = ObjectHead::encode(&envelope, scan.as_ref().map(|scan| &scan.summary)).unwrap();
    EncodedObject { envelope, head: head.into(), body: EncodedBody::Memory(body.into()) }
}
