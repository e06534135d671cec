use std::collections::BTreeMap;

use chrono::{DateTime, Duration, TimeZone as _, Utc};
use proptest::prelude::*;
use walship::catalog::{
    BackupRecord, Catalog, GapCause, GapKind, GapRecord, Lineage, ParentBackup, StoredSegments, StoredTail,
    TailFlaw,
};
use walship::pg::{HistoryEntry, Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, Xid};
use walship::wal::event::{EventKind, ServerLimits, WalEvent};
use walship::wal::rollup::{Block, Class, Facts};
use walship::wal::summary::{Counts, Fragment, SegmentEnding, SegmentSummary, StopTime};
use walship::wal::testing::INITDB_LIMITS;

use super::*;
use crate::target::{StopSide, Zone};

pub(crate) const SIZE: SegmentSize = SegmentSize::MIN;
const START: u64 = 0x0300_0000;

pub(crate) fn tli(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

pub(crate) fn at(micros: i64) -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 3, 1, 12, 0, 0).unwrap() + Duration::microseconds(micros)
}

pub(crate) fn limits(connections: i32) -> ServerLimits {
    ServerLimits { max_connections: connections, ..INITDB_LIMITS }
}

pub(crate) fn commit(xid: Xid, micros: i64) -> Option<(Xid, EventKind)> {
    let kind = EventKind::Commit {
        time: at(micros),
        prepared_xid: None,
        subxids: vec![],
        dropped_relations: vec![],
        dropped_objects: None,
    };
    Some((xid, kind))
}

pub(crate) fn restore_point(name: &str, micros: i64) -> Option<(Xid, EventKind)> {
    Some((0, EventKind::RestorePoint { time: at(micros), name: name.into() }))
}

pub(crate) fn checkpoint(redo: Lsn, micros: i64) -> Option<(Xid, EventKind)> {
    let kind = EventKind::Checkpoint {
        redo,
        time: at(micros),
        timeline: tli(1),
        shutdown: false,
        next_full_xid: 12,
    };
    Some((0, kind))
}

fn has_checkpoint(records: &[WalRecord], start: Lsn, stop: Lsn) -> bool {
    let is_it = |event: &WalEvent| matches!(event.kind, EventKind::Checkpoint { redo, .. } if redo == start);
    records.iter().any(|r| r.lsn >= start && r.lsn < stop && r.event.as_ref().is_some_and(is_it))
}

/// A made-up WAL: records of any length, some of which are events, on one or more timelines.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) records: BTreeMap<TimelineId, Vec<WalRecord>>,
    pub(crate) catalog: Catalog,
    pub(crate) undecoded: Vec<SegmentName>,
    /// Segments whose stored object is damaged.
    pub(crate) damaged: Vec<SegmentName>,
    /// What is found when the catalog does not tell of tails.
    pub(crate) tails: BTreeMap<TimelineId, StoredTail>,
    stranded: BTreeMap<SegmentName, StoredTail>,
}

#[derive(Debug, Clone)]
pub(crate) struct WalRecord {
    pub(crate) lsn: Lsn,
    pub(crate) end: Lsn,
    pub(crate) event: Option<WalEvent>,
}

impl World {
    pub(crate) fn new() -> Self {
        let lineage = Lineage {
            number: 1,
            system_identifier: 7_123_456_789_012_345_678,
            segment_size: SIZE,
            postgres_major: 17,
            created: at(0),
        };
        let catalog = Catalog {
            cluster: "main".into(),
            lineage,
            histories: BTreeMap::new(),
            segments: StoredSegments::new(SIZE),
            in_parts: BTreeMap::new(),
            stranded: BTreeMap::new(),
            tails: None,
            lost_ends: BTreeMap::new(),
            rollups: vec![],
            partials: vec![],
            incomplete: vec![],
            backups: vec![],
            orphaned_backups: vec![],
            unfinished_backups: vec![],
            gaps: vec![],
        };
        Self {
            records: BTreeMap::from([(tli(1), vec![])]),
            catalog,
            undecoded: vec![],
            damaged: vec![],
            tails: BTreeMap::new(),
            stranded: BTreeMap::new(),
        }
    }

    pub(crate) fn end(&self, timeline: TimelineId) -> Lsn {
        self.records[&timeline].last().map_or(Lsn(START), |record| reach::aligned(record.end))
    }

    /// Appends a record of `bytes` bytes; returns where it starts.
    pub(crate) fn push(&mut self, timeline: TimelineId, bytes: u64, event: Option<(Xid, EventKind)>) -> Lsn {
        let lsn = self.end(timeline);
        let mut end = Lsn(lsn.0 + bytes);
        // Made-up WAL has no page headers; no record ends right behind where one would be.
        if reach::end_before(reach::aligned(end), SIZE) != reach::aligned(end) {
            end = Lsn(end.0 + 8);
        }
        let event = event.map(|(xid, kind)| WalEvent { lsn, end_lsn: end, xid, kind });
        self.records.get_mut(&timeline).unwrap().push(WalRecord { lsn, end, event });
        lsn
    }

    /// Starts `child` at the end of `parent`.
    pub(crate) fn fork(&mut self, parent: TimelineId, child: TimelineId) -> Lsn {
        let switch_lsn = self.end(parent);
        let mut ancestors = self.catalog.history(parent).unwrap().ancestors;
        ancestors.push(HistoryEntry { timeline: parent, switch_lsn, reason: "test".into() });
        self.catalog.histories.insert(child, TimelineHistory { timeline: child, ancestors });
        self.records.insert(child, self.records[&parent].clone());
        switch_lsn
    }

    /// Adds a backup; one of its uneventful records becomes its checkpoint, long ago.
    pub(crate) fn backup(&mut self, id: &str, timeline: TimelineId, start: Lsn, stop: Lsn) {
        let records = self.records.get_mut(&timeline).unwrap();
        if !has_checkpoint(records, start, stop)
            && let Some(record) =
                records.iter_mut().find(|r| r.lsn >= start && r.end <= stop && r.event.is_none())
        {
            let (lsn, end_lsn) = (record.lsn, record.end);
            record.event =
                Some(WalEvent { lsn, end_lsn, xid: 0, kind: checkpoint(start, -3_600_000_000).unwrap().1 });
        }
        self.backup_record(id, timeline, start, stop);
    }

    /// Adds a backup whose WAL may be anything.
    pub(crate) fn backup_record(&mut self, id: &str, timeline: TimelineId, start: Lsn, stop: Lsn) {
        self.catalog.backups.push(BackupRecord {
            format: 1,
            id: id.into(),
            label: "walship".into(),
            timeline,
            start_lsn: start,
            stop_timeline: timeline,
            stop_lsn: stop,
            started: at(0),
            finished: at(0),
            server_version: 170_004,
            from_standby: false,
            data_bytes: 1000,
            stored_bytes: 400,
            files: 10,
            tablespaces: vec![],
            objects: vec![],
            limits: limits(100),
            data_checksums: true,
            manifest_digest: String::new(),
            settings_files: vec![],
            names: None,
            prepared: Some(Vec::new()),
            damaged_pages: None,
            parent: None,
        });
        self.catalog.backups.sort_by_key(|backup| backup.start_lsn);
    }

    /// Stores every whole segment of `timeline`, from the one that holds its beginning on.
    pub(crate) fn archive(&mut self, timeline: TimelineId) {
        let begin = self.catalog.history(timeline).unwrap().begin_lsn().unwrap_or(Lsn(START));
        let mut name = SegmentName::containing(timeline, begin, SIZE);
        let end = self.records[&timeline].last().map_or(Lsn(START), |record| record.end);
        while name.end(SIZE) <= end {
            self.catalog.segments.insert(name, 1000);
            name = name.next(SIZE).unwrap();
        }
    }

    /// Ships so many bytes of the segment that is not whole.
    pub(crate) fn ship(&mut self, timeline: TimelineId, bytes: u64) {
        let tail = self.shipped(SegmentName::containing(timeline, self.end(timeline), SIZE), bytes);
        self.tails.insert(timeline, tail);
    }

    fn shipped(&self, segment: SegmentName, bytes: u64) -> StoredTail {
        let start = segment.start(SIZE);
        let end_lsn = Lsn(self.end(segment.timeline).0.min(start.0 + bytes));
        let ends = self.records[&segment.timeline].iter().map(|record| reach::aligned(record.end));
        let until_lsn = ends.filter(|end| *end <= end_lsn && *end > start).max().unwrap_or(start);
        StoredTail { segment, until_lsn, end_lsn, parts: 3, stored_bytes: 300, flaw: None, lost_from: None }
    }

    /// Loses a segment but for its first bytes, which were shipped, and says so in the ledger.
    pub(crate) fn lose(&mut self, segment: SegmentName, but: u64) {
        self.catalog.segments.remove(&segment);
        let tail = self.shipped(segment, but);
        let lost_from = tail.end_lsn;
        self.catalog.gaps.push(GapRecord {
            format: 1,
            id: segment.to_string(),
            timeline: segment.timeline,
            start_lsn: lost_from,
            end_lsn: segment.end(SIZE),
            cause: GapCause { kind: GapKind::Lost, text: "test".into() },
            segment_digest: None,
            recorded: at(0),
            host: String::new(),
            user: String::new(),
        });
        if tail.until_lsn > segment.start(SIZE) {
            self.stranded.insert(segment, StoredTail { lost_from: Some(lost_from), ..tail });
        }
    }

    /// Where what is stored of a segment ends.
    fn stored_end(&self, name: SegmentName) -> Lsn {
        let tail = self.tails.get(&name.timeline).filter(|tail| tail.segment == name);
        let tail = tail.or_else(|| self.stranded.get(&name));
        tail.map_or(name.end(SIZE), |tail| tail.until_lsn)
    }

    pub(crate) fn events(&self, name: SegmentName, through: Lsn) -> Vec<WalEvent> {
        let inside = |record: &&WalRecord| {
            record.lsn >= name.start(SIZE) && record.lsn < name.end(SIZE) && record.end <= through
        };
        self.records[&name.timeline].iter().filter(inside).filter_map(|record| record.event.clone()).collect()
    }

    pub(crate) fn summary(&self, name: SegmentName) -> SegmentSummary {
        let (start, end) = (name.start(SIZE), self.stored_end(name));
        let open = end < name.end(SIZE);
        let records = &self.records[&name.timeline];
        let events = self.events(name, end);
        let times: Vec<StopTime> = events
            .iter()
            .filter_map(|event| {
                let time = event.kind.stop_time()?;
                Some(StopTime { time, lsn: event.lsn, xid: event.kind.ended_xid(event.xid)? })
            })
            .collect();
        let xids: Vec<Xid> = times.iter().map(|time| time.xid).collect();
        let starts = records.iter().find(|record| record.lsn >= start && record.lsn < end);
        let leading = records.iter().find(|record| record.lsn < start && record.end > start);
        let unfinished =
            records.iter().find(|record| record.lsn >= start && record.lsn < end && record.end > end);
        let count = |is: fn(&EventKind) -> bool| events.iter().filter(|event| is(&event.kind)).count() as u64;
        SegmentSummary {
            segment: name,
            segment_size: SIZE,
            system_identifier: self.catalog.lineage.system_identifier,
            page_magic: 0xD116,
            first_page_timeline: name.timeline,
            first_record: starts.map(|record| record.lsn),
            end_of_wal: end,
            ending: match self.undecoded.contains(&name) {
                true => SegmentEnding::Undecoded { reason: "a test".into() },
                false if open => SegmentEnding::Incomplete,
                false => SegmentEnding::Full,
            },
            leading: leading.map(|record| Fragment {
                lsn: start,
                record_bytes: record.end.0.min(name.end(SIZE).0) - start.0,
                bytes: None,
                end: (record.end <= end).then_some(record.end),
            }),
            unfinished: unfinished.filter(|_| !open).map(|record| Fragment {
                lsn: record.lsn,
                record_bytes: end.0 - record.lsn.0,
                bytes: None,
                end: None,
            }),
            counts: Counts {
                commits: count(|kind| matches!(kind, EventKind::Commit { .. })),
                aborts: count(|kind| matches!(kind, EventKind::Abort { .. })),
                prepares: count(|kind| matches!(kind, EventKind::Prepare { .. })),
                ..Counts::default()
            },
            min_time: times.iter().copied().min_by_key(|time| time.time),
            max_time: times.iter().copied().max_by_key(|time| time.time),
            ended_xids: xids.iter().min().copied().zip(xids.iter().max().copied()),
            deletes: Some(Default::default()),
            events: events
                .into_iter()
                .filter(|event| match &event.kind {
                    EventKind::Commit { .. } => Class::of(event).is_some(),
                    EventKind::Abort { .. } | EventKind::Prepare { .. } => false,
                    _ => true,
                })
                .collect(),
            events_truncated: false,
        }
    }

    /// What an index would say of consecutive stored segments together.
    pub(crate) fn block(&self, first: SegmentName, last: SegmentName) -> (SegmentName, Block) {
        let (start, end) = (first.start(SIZE), last.end(SIZE));
        let inside = |record: &&WalRecord| record.lsn >= start && record.lsn < end;
        let records = self.records.get(&first.timeline).into_iter().flatten().filter(inside);
        let open_end = records.clone().any(|record| record.end > end);
        // What crosses more than one boundary is only known to be there.
        let unread = records.clone().any(|record| record.end > end && record.lsn < last.start(SIZE));
        let events: Vec<_> =
            records.filter(|record| record.end <= end).filter_map(|r| r.event.clone()).collect();
        let segments = last.number(SIZE) - first.number(SIZE) + 1;
        let mut facts = Facts {
            stored_bytes: 1000 * segments,
            wal_bytes: SIZE.bytes() * segments,
            unread: u64::from(unread),
            undecoded: self.undecoded.iter().filter(|name| (first..=last).contains(name)).count() as u64,
            ..Facts::default()
        };
        for event in &events {
            match event.kind {
                EventKind::Commit { .. } => facts.counts.commits += 1,
                EventKind::Prepare { .. } => facts.counts.prepares += 1,
                EventKind::Checkpoint { time, .. } => {
                    facts.first_checkpoint = facts.first_checkpoint.into_iter().chain([time]).min();
                }
                _ => {}
            }
            let xid = event.kind.ended_xid(event.xid);
            let stop = event.kind.stop_time().zip(xid);
            let stop = stop.map(|(time, xid)| StopTime { time, lsn: event.lsn, xid });
            let own = Facts {
                min_time: stop,
                max_time: stop,
                ended_xids: xid.map(|xid| (xid, xid)),
                ..Facts::default()
            };
            facts.add(&own);
        }
        let is_segment = first == last;
        let listed = |event: &&WalEvent| {
            Class::of(event).is_some_and(|class| is_segment || class != Class::Checkpoints)
        };
        let events = events.iter().filter(listed).cloned().collect();
        (first, Block { last, is_segment, has_gaps: false, facts, events, open_end })
    }

    /// What an index with so many segments in each block would say.
    pub(crate) fn blocks(&self, segments: u64) -> BTreeMap<SegmentName, Block> {
        let mut blocks = BTreeMap::new();
        let mut first = None;
        for name in self.catalog.segments.names().collect::<Vec<_>>() {
            let from = *first.get_or_insert(name);
            let next = name.next(SIZE).unwrap();
            let full = name.number(SIZE) - from.number(SIZE) + 1 == segments;
            if full || !self.catalog.segments.contains(next) {
                blocks.extend([self.block(from, name)]);
                first = None;
            }
        }
        blocks
    }

    pub(crate) fn outcome(&self, target: &RecoveryTarget, options: &PlanOptions) -> Outcome {
        self.outcome_from(Evidence::default(), target, options)
    }

    /// Plans, answering every request; fails when a request is repeated.
    fn outcome_from(
        &self,
        mut evidence: Evidence,
        target: &RecoveryTarget,
        options: &PlanOptions,
    ) -> Outcome {
        let known = |e: &Evidence| {
            let blocks = e.blocks.len();
            e.summaries.len()
                + e.events.len()
                + e.records.len()
                + e.unreadable.len()
                + e.searched.len()
                + blocks
        };
        let mut catalog = self.catalog.clone();
        loop {
            let before = known(&evidence);
            match plan(&catalog, &evidence, target, options) {
                Outcome::NeedTails => {
                    assert_eq!(catalog.tails, None, "tails were asked for twice");
                    catalog.tails = Some(self.tails.clone());
                    catalog.stranded = self.stranded.clone();
                    let tails = self.tails.values().chain(self.stranded.values());
                    evidence.add_tails(tails.map(|tail| self.summary(tail.segment)));
                    continue;
                }
                end @ (Outcome::Plan(_) | Outcome::Refused(_) | Outcome::Unreadable(_)) => return end,
                Outcome::NeedRollup(first) => {
                    // In two halves.
                    let last = evidence.blocks[&first].last;
                    let middle = (first.number(SIZE) + last.number(SIZE)) / 2;
                    let middle = SegmentName::from_number(first.timeline, middle, SIZE).unwrap();
                    assert!(first < last, "{first} is a single segment");
                    evidence.forget_blocks(first, last);
                    evidence
                        .blocks
                        .extend([self.block(first, middle), self.block(middle.next(SIZE).unwrap(), last)]);
                }
                Outcome::NeedSummaries(names) => {
                    for name in names {
                        assert!(self.catalog.segments.contains(name), "{name} is not stored");
                        if self.damaged.contains(&name) {
                            evidence.unreadable.insert(name);
                        } else {
                            evidence.summaries.insert(name, self.summary(name));
                        }
                    }
                }
                Outcome::NeedEvents(requests) => {
                    for SegmentRequest { segment, following } in requests {
                        assert!(!self.damaged.contains(&segment), "{segment} is known to be damaged");
                        let through = self.stored_end(*following.last().unwrap_or(&segment));
                        evidence.events.insert(segment, self.events(segment, through));
                    }
                }
                Outcome::SearchEvents(SegmentRequest { segment, following }) => {
                    let through = self.stored_end(*following.last().unwrap_or(&segment));
                    let events = self.events(segment, through);
                    if events.iter().any(|event| decides(target, event)) {
                        evidence.events.insert(segment, events);
                    } else {
                        evidence.searched.insert(segment);
                    }
                }
                Outcome::NeedRecord(RecordRequest { request, at }) => {
                    let segment = request.segment;
                    let through = self.stored_end(*request.following.last().unwrap_or(&segment));
                    let found = self.records[&segment.timeline]
                        .iter()
                        .find(|r| r.lsn >= at && r.lsn < segment.end(SIZE) && r.end <= through)
                        .map(|record| RecordBounds { lsn: record.lsn, end_lsn: record.end });
                    evidence.records.insert((segment, at), found);
                }
            }
            assert!(known(&evidence) > before, "a request was repeated");
        }
    }

    pub(crate) fn plan_with(
        &self,
        target: &RecoveryTarget,
        options: &PlanOptions,
    ) -> Result<RestorePlan, Box<Refusal>> {
        let mut plans = [0, 1, 3, 64].map(|segments| {
            let blocks = if segments == 0 { BTreeMap::new() } else { self.blocks(segments) };
            match self.outcome_from(Evidence { blocks, ..Evidence::default() }, target, options) {
                Outcome::Plan(plan) => Ok(*plan),
                Outcome::Refused(refusal) => Err(refusal),
                other => panic!("{target:?}: {other:?}"),
            }
        });
        // The index makes no difference, but to what is warned of because it is known anyway.
        let told = |planned: &Result<RestorePlan, Box<Refusal>>| match planned {
            Ok(plan) => serde_json::to_value(RestorePlan { warnings: vec![], ..plan.clone() }).unwrap(),
            Err(refusal) => serde_json::to_value(refusal).unwrap(),
        };
        let plain = told(&plans[0]);
        for other in plans[1..].iter().map(told) {
            for (key, value) in plain.as_object().unwrap() {
                assert_eq!(other.get(key), Some(value), "{key} of {target:?}");
            }
        }
        std::mem::replace(&mut plans[0], Err(Box::new(Refusal::new(RefusalKind::NoBackup, ""))))
    }

    fn plan(&self, target: &RecoveryTarget) -> Result<RestorePlan, Box<Refusal>> {
        self.plan_with(target, &PlanOptions::default())
    }

    /// Stores a plain history: 40 commits at one a second, a backup of segment 1, and padding.
    fn plain() -> Self {
        let mut world = Self::new();
        let start = world.push(tli(1), 100, None);
        let mut stop = start;
        for number in 0..40u32 {
            world.push(tli(1), 64, commit(1000 + number, i64::from(number) * 1_000_000));
            world.push(tli(1), 100_000, None);
            if number == 3 {
                stop = world.end(tli(1));
            }
        }
        world.backup("b1", tli(1), start, stop);
        world.push(tli(1), SIZE.bytes(), None);
        world.archive(tli(1));
        world
    }
}

/// Returns the plan for `target` in a small made-up world, for tests of what is made from plans.
pub(crate) fn plain_plan(target: &RecoveryTarget) -> RestorePlan {
    World::plain().plan(target).unwrap()
}

/// Returns the refusal of `target` in the same world.
pub(crate) fn plain_refusal(target: &RecoveryTarget) -> Refusal {
    *World::plain().plan(target).unwrap_err()
}

fn time(micros: i64) -> RecoveryTarget {
    RecoveryTarget::new(TargetKind::Time { time: at(micros), zone: Zone::Utc })
}

fn xid(xid: Xid) -> RecoveryTarget {
    RecoveryTarget::new(TargetKind::Xid(xid))
}

fn name(name: &str) -> RecoveryTarget {
    RecoveryTarget::new(TargetKind::Name(name.into()))
}

fn exclusive(target: RecoveryTarget) -> RecoveryTarget {
    RecoveryTarget { stop: StopSide::Exclusive, ..target }
}

fn on(timeline: u32, target: RecoveryTarget) -> RecoveryTarget {
    RecoveryTarget { timeline: TimelineChoice::Number(tli(timeline)), ..target }
}

fn neighbours(plan: &RestorePlan) -> (Option<Xid>, Option<Xid>) {
    (plan.last_included.as_ref().map(|end| end.xid), plan.first_excluded.as_ref().map(|end| end.xid))
}

#[test]
fn time_keeps_equal_times_when_inclusive_and_none_when_exclusive() {
    let world = World::plain();
    assert_eq!(neighbours(&world.plan(&time(20_000_000)).unwrap()), (Some(1020), Some(1021)));
    assert_eq!(neighbours(&world.plan(&exclusive(time(20_000_000))).unwrap()), (Some(1019), Some(1020)));
    assert_eq!(neighbours(&world.plan(&time(19_999_999)).unwrap()), (Some(1019), Some(1020)));
}

#[test]
fn time_stops_at_the_first_record_in_wal_order_aborts_included() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    world.push(tli(1), 64, commit(10, 1));
    let abort = EventKind::Abort { time: at(500), prepared_xid: None, subxids: vec![] };
    world.push(tli(1), 64, Some((11, abort)));
    world.push(tli(1), 64, commit(12, 2));
    world.push(tli(1), 64, commit(13, 600));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    let plan = world.plan(&time(100)).unwrap();
    assert_eq!(plan.stop.kind, StopKind::Before);
    assert_eq!(plan.stop.record.as_ref().unwrap().xid, 11);
    // Transaction 12 committed before the target time, and is not there all the same.
    assert_eq!(neighbours(&plan), (Some(10), Some(12)));
}

#[test]
fn a_target_past_the_end_is_refused_with_the_last_commit() {
    let world = World::plain();
    for target in [time(39_000_000), time(50_000_000), xid(2), name("x")] {
        let refusal = world.plan(&target).unwrap_err();
        assert_eq!(refusal.before.as_ref().unwrap().options, "--latest");
        assert!(refusal.before.unwrap().what.contains("transaction 1039"), "{target:?}");
    }
    // The last commit itself is reachable where PostgreSQL needs no later record.
    assert_eq!(neighbours(&world.plan(&xid(1039)).unwrap()), (Some(1039), None));
    assert_eq!(neighbours(&world.plan(&exclusive(time(39_000_000))).unwrap()), (Some(1038), Some(1039)));
}

#[test]
fn a_target_before_consistency_takes_an_older_backup_or_is_refused() {
    let mut world = World::plain();
    let refusal = world.plan(&time(1_000_000)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::BeforeFirst);
    assert_eq!(refusal.after.unwrap().options, "--immediate --backup b1");
    let (start, stop) = {
        let records = &world.records[&tli(1)];
        (records[41].lsn, records[61].lsn)
    };
    world.backup("b2", tli(1), start, stop);
    assert_eq!(world.plan(&time(35_000_000)).unwrap().backup.id, "b2");
    assert_eq!(world.plan(&time(25_000_000)).unwrap().backup.id, "b1");
    assert_eq!(world.plan(&time(10_000_000)).unwrap().backup.id, "b1");
    let pinned = PlanOptions { backup: Some("b2".into()) };
    let refusal = world.plan_with(&time(10_000_000), &pinned).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::BeforeFirst);
}

#[test]
fn an_incremental_backup_is_planned_with_all_that_it_builds_on_and_never_without() {
    let mut world = World::plain();
    let place = |world: &World, at: usize| world.records[&tli(1)][at].lsn;
    for (id, first) in [("b2", 41), ("b3", 50), ("b4", 60)] {
        let (start, stop) = (place(&world, first), place(&world, first + 5));
        world.backup(id, tli(1), start, stop);
    }
    let build_on = |world: &mut World, child: &str, parent: &str, depth: u32| {
        let backups = &mut world.catalog.backups;
        let below = backups.iter().find(|backup| backup.id == parent).unwrap();
        let parent = ParentBackup {
            id: below.id.clone(),
            timeline: below.timeline,
            start_lsn: below.start_lsn,
            depth,
        };
        backups.iter_mut().find(|backup| backup.id == child).unwrap().parent = Some(parent);
    };
    build_on(&mut world, "b2", "b1", 1);
    build_on(&mut world, "b3", "b2", 2);
    world.catalog.set_orphans_aside();
    assert!(world.catalog.orphaned_backups.is_empty());
    let target = RecoveryTarget::new(TargetKind::Latest);
    let of = |id: &str| PlanOptions { backup: Some(id.into()) };
    let plan = world.plan_with(&target, &of("b3")).unwrap();
    assert_eq!(plan.backups().map(|backup| &*backup.id).collect::<Vec<_>>(), ["b3", "b2", "b1"]);
    assert_eq!(plan.backup_fetch_bytes, 3 * 400);
    assert!(plan.reasons.iter().any(|why| why.contains("comes from backup b1 and the 1 between")));

    // Depths that do not fit, and rings, are as bad as a missing one.
    for (child, parent, depth) in [("b2", "b1", 2), ("b1", "b3", 1)] {
        let mut odd = world.clone();
        build_on(&mut odd, child, parent, depth);
        odd.catalog.set_orphans_aside();
        assert!(odd.catalog.orphaned_backups.iter().any(|orphan| orphan.id == "b3"), "{child} on {parent}");
    }
    world.catalog.backups.retain(|backup| backup.id != "b1");
    world.catalog.set_orphans_aside();
    let orphans = world.catalog.orphaned_backups.iter().map(|orphan| (&*orphan.id, &*orphan.missing));
    assert_eq!(orphans.collect::<Vec<_>>(), [("b2", "b1"), ("b3", "b1")]);
    assert_eq!(world.plan(&target).unwrap().backup.id, "b4");
    let refusal = world.plan_with(&target, &of("b3")).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::UnknownBackup);
    assert!(refusal.reason.contains("builds on backup b1"), "{}", refusal.reason);
}

/// A backup whose checkpoint began in second 10, with two commits before it when `before` says so, and the
/// commit of transaction 12 behind it.
fn backup_of_second_10(before: bool, twelve: i64) -> World {
    let mut world = World::new();
    if before {
        world.push(tli(1), 64, commit(10, 1_000_000));
        world.push(tli(1), 64, commit(11, 9_000_000));
    }
    let start = world.push(tli(1), 64, None);
    world.push(tli(1), 120, checkpoint(start, 10_000_000));
    world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    world.push(tli(1), 64, commit(12, twelve));
    world.push(tli(1), 64, commit(13, 20_000_000));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    world
}

#[test]
fn a_backup_that_began_after_the_target_time_does_not_serve_it() {
    let world = backup_of_second_10(true, 20_000_000);
    // Transaction 11 is in the backup: a state of second 5 cannot be had from it.
    let refusal = world.plan(&time(5_000_000)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::BeforeFirst);
    assert_eq!(refusal.after.unwrap().options, "--immediate --backup b1");
    let refusal = world.plan(&on(1, time(5_000_000))).unwrap_err();
    assert_eq!(refusal.after.unwrap().options, "--immediate --backup b1 --timeline 1");
    assert_eq!(neighbours(&world.plan(&time(15_000_000)).unwrap()), (None, Some(12)));
    // Where nothing ended between the target and the backup it holds what was there.
    assert_eq!(world.plan(&time(8_999_999)).unwrap_err().kind, RefusalKind::BeforeFirst);
    assert_eq!(world.plan(&exclusive(time(9_000_000))).unwrap_err().kind, RefusalKind::BeforeFirst);
    for micros in [9_000_000, 9_500_000, 10_500_000, 11_999_999] {
        assert_eq!(neighbours(&world.plan(&time(micros)).unwrap()), (None, Some(12)), "{micros}");
    }
    let plan = world.plan(&time(9_500_000)).unwrap();
    assert!(
        plan.reasons.iter().any(|reason| reason.contains("began after the target")),
        "{:?}",
        plan.reasons
    );
    // An older one that reaches the target comes first.
    let mut world = World::plain();
    let records = &world.records[&tli(1)];
    let (start, stop) = (records[41].lsn, records[61].lsn);
    world.backup("b2", tli(1), start, stop);
    for record in world.records.get_mut(&tli(1)).unwrap() {
        if let Some(EventKind::Checkpoint { redo, time, .. }) = record.event.as_mut().map(|e| &mut e.kind)
            && *redo == start
        {
            *time = at(20_700_000);
        }
    }
    assert_eq!(world.plan(&time(20_500_000)).unwrap().backup.id, "b1");
}

#[test]
fn where_nothing_ended_before_a_backup_only_wal_behind_it_tells_when_it_began() {
    let world = backup_of_second_10(false, 20_000_000);
    // The checkpoint's time is rounded down, and taken a moment before redo is fixed.
    for micros in [5_000_000, 9_500_000, 11_999_999] {
        assert_eq!(world.plan(&time(micros)).unwrap_err().kind, RefusalKind::BeforeFirst, "{micros}");
    }
    assert_eq!(neighbours(&world.plan(&time(12_000_000)).unwrap()), (None, Some(12)));
    // A commit behind the redo position tells that it was fixed before that.
    let mut world = backup_of_second_10(false, 10_500_000);
    assert_eq!(neighbours(&world.plan(&time(10_600_000)).unwrap()), (Some(12), Some(13)));
    assert_eq!(world.plan(&time(10_400_000)).unwrap_err().kind, RefusalKind::BeforeFirst);
    // Nobody can tell when a backup began whose checkpoint is not there.
    for record in world.records.get_mut(&tli(1)).unwrap() {
        record.event.take_if(|event| matches!(event.kind, EventKind::Checkpoint { .. }));
    }
    assert_eq!(world.plan(&time(15_000_000)).unwrap_err().kind, RefusalKind::BeforeFirst);
    assert!(world.plan(&xid(12)).is_ok());
}

#[test]
fn a_gap_is_named_and_both_sides_are_offered() {
    let mut world = World::plain();
    let records = world.records[&tli(1)].clone();
    world.backup("b2", tli(1), records[65].lsn, records[67].lsn);
    let missing = SegmentName::containing(tli(1), records[40].lsn, SIZE);
    world.catalog.segments.remove(&missing);
    let refusal = world.plan(&time(25_000_000)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Gap);
    let gap = refusal.gap.unwrap();
    assert_eq!((gap.first_missing, gap.last_missing), (missing, missing));
    assert_eq!((gap.from, gap.to), (missing.start(SIZE), missing.end(SIZE)));
    assert_eq!(refusal.after.unwrap().options, "--immediate --backup b2");
    let before = refusal.before.unwrap();
    assert!(before.what.contains("the last before the gap"), "{}", before.what);
    // What it offers is a target that works.
    let lsn: Lsn = before.options.strip_prefix("--to-lsn ").unwrap().parse().unwrap();
    let plan = world.plan(&RecoveryTarget::new(TargetKind::Lsn(lsn))).unwrap();
    assert_eq!(plan.last_included.unwrap().lsn, lsn);
    // Behind the gap the newer backup serves, before it the older.
    assert_eq!(world.plan(&time(36_000_000)).unwrap().backup.id, "b2");
    assert_eq!(world.plan(&time(6_000_000)).unwrap().backup.id, "b1");
    assert_eq!(world.plan(&RecoveryTarget::new(TargetKind::Latest)).unwrap().backup.id, "b2");
    world.catalog.backups.pop();
    assert_eq!(world.plan(&RecoveryTarget::new(TargetKind::Latest)).unwrap_err().kind, RefusalKind::Gap);
    assert_eq!(gaps_of(&world.catalog, &TimelineHistory::root(tli(1))), vec![gap]);
}

#[test]
fn xid_matches_the_end_of_that_transaction_only() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    let with_sub = EventKind::Commit {
        time: at(1),
        prepared_xid: None,
        subxids: vec![21, 22],
        dropped_relations: vec![],
        dropped_objects: None,
    };
    world.push(tli(1), 64, Some((20, with_sub)));
    let prepared = EventKind::Prepare { time: at(2), prepared_xid: 30, gid: "g".into() };
    world.push(tli(1), 64, Some((30, prepared)));
    world.push(tli(1), 64, commit(31, 3));
    let finish = EventKind::Commit {
        time: at(4),
        prepared_xid: Some(30),
        subxids: vec![],
        dropped_relations: vec![],
        dropped_objects: None,
    };
    world.push(tli(1), 64, Some((0, finish)));
    let rolled_back = EventKind::Abort { time: at(5), prepared_xid: None, subxids: vec![] };
    world.push(tli(1), 64, Some((33, rolled_back)));
    world.push(tli(1), 64, commit(32, 6));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    assert_eq!(neighbours(&world.plan(&xid(30)).unwrap()), (Some(30), Some(32)));
    assert_eq!(neighbours(&world.plan(&exclusive(xid(30))).unwrap()), (Some(31), Some(30)));
    // A rolled-back subtransaction has an end record of its own.
    assert_eq!(neighbours(&world.plan(&xid(33)).unwrap()), (Some(30), Some(32)));
    let refusal = world.plan(&xid(21)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::UnknownXid);
    assert!(refusal.hints[0].contains("--to-xid 20"), "{:?}", refusal.hints);
    // Between PREPARE and COMMIT PREPARED the transaction is open.
    let plan = world.plan(&xid(31)).unwrap();
    assert_eq!(plan.open_prepared.unwrap()[0].gid, "g");
    assert_eq!(world.plan(&xid(32)).unwrap().open_prepared.unwrap(), vec![]);
}

#[test]
fn prepared_transactions_are_seen_across_segment_boundaries() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    let to_the_end = |world: &mut World| {
        let at = world.end(tli(1));
        let end = SegmentName::containing(tli(1), at, SIZE).end(SIZE);
        world.push(tli(1), end.0 - at.0 - 32, None);
    };
    to_the_end(&mut world);
    let prepare = EventKind::Prepare { time: at(1), prepared_xid: 31, gid: "g".into() };
    world.push(tli(1), 64, Some((31, prepare)));
    world.push(tli(1), 64, commit(40, 2));
    to_the_end(&mut world);
    let ended = EventKind::Commit {
        time: at(3),
        prepared_xid: Some(31),
        subxids: vec![],
        dropped_relations: vec![],
        dropped_objects: None,
    };
    world.push(tli(1), 64, Some((0, ended)));
    world.push(tli(1), 64, commit(41, 4));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    assert_eq!(world.plan(&xid(40)).unwrap().open_prepared.unwrap().len(), 1);
    assert_eq!(world.plan(&xid(41)).unwrap().open_prepared.unwrap(), vec![]);
}

#[test]
fn wal_that_cannot_be_decoded_is_no_obstacle_behind_the_stop() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("old", tli(1), start, stop);
    world.push(tli(1), 64, commit(10, 1));
    world.push(tli(1), 64, restore_point("here", 2));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("new", tli(1), start, stop);
    world.push(tli(1), 64, commit(11, 100));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    world.undecoded.push(SegmentName::containing(tli(1), start, SIZE));
    for target in [xid(10), name("here")] {
        let plan = world.plan(&target).unwrap();
        assert_eq!((&*plan.backup.id, &plan.first_excluded), ("old", &None), "{target:?}");
        let warned = plan.warnings.iter().any(|warning| warning.contains("is not known"));
        assert!(warned, "{target:?}: {:?}", plan.warnings);
    }
    assert_eq!(world.plan(&xid(11)).unwrap_err().kind, RefusalKind::Undecoded);
    assert_eq!(world.plan(&xid(99)).unwrap_err().kind, RefusalKind::Undecoded);
}

#[test]
fn what_cannot_be_crossed_is_named_with_what_lies_on_both_sides() {
    let mut world = a_commit_in_each_segment();
    let first = world.catalog.segments.names().next().unwrap();
    let number = |number| SegmentName::from_number(tli(1), first.number(SIZE) + number, SIZE).unwrap();
    let record = world.records[&tli(1)].iter().find(|record| record.lsn >= number(5).start(SIZE)).unwrap();
    let (start, stop) = (record.lsn, reach::aligned(record.end));
    world.backup("b2", tli(1), start, stop);
    world.undecoded.push(number(3));
    let options = |refusal: Refusal| {
        let Refusal { before, after, hints, .. } = refusal;
        (before.map(|one| one.options), after.map(|one| one.options), hints)
    };
    let refusal = *world.plan(&xid(13)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Undecoded);
    let (before, after, _) = options(refusal);
    let twelve =
        world.records[&tli(1)].iter().find(|r| r.event.as_ref().is_some_and(|e| e.xid == 12)).unwrap();
    assert_eq!(before, Some(format!("--to-lsn {}", twelve.lsn)));
    assert_eq!(after.as_deref(), Some("--immediate --backup b2"));
    // A newer backup whose own WAL cannot be read is no obstacle for an older one.
    world.undecoded = vec![SegmentName::containing(tli(1), start, SIZE)];
    assert_eq!(world.plan(&time(2_500_000)).unwrap().backup.id, "b1");
    // What was asked for beside the target is kept, and it is said what would serve without it.
    world.undecoded.clear();
    let pinned = PlanOptions { backup: Some("b2".into()) };
    let (_, after, hints) = options(*world.plan_with(&on(1, xid(11)), &pinned).unwrap_err());
    assert_eq!(after, None, "the end of transaction 11 is not found from b2");
    assert_eq!(hints, ["Another backup leads to it: --to-xid 11 --timeline 1."]);
    let unknown = PlanOptions { backup: Some("b9".into()) };
    let (.., hints) = options(*world.plan_with(&xid(11), &unknown).unwrap_err());
    assert_eq!(hints, ["Another backup leads to it: --to-xid 11."]);
    let (.., hints) = options(*world.plan(&on(9, xid(11))).unwrap_err());
    assert_eq!(hints, ["Timeline 1 leads to it: --to-xid 11 --timeline 1."]);
}

/// A commit in each of eight segments, the backup in the first.
fn a_commit_in_each_segment() -> World {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    for number in 0..8u32 {
        world.push(tli(1), 64, commit(10 + number, i64::from(number) * 1_000_000));
        world.push(tli(1), SIZE.bytes() - 64, None);
    }
    world.archive(tli(1));
    world
}

#[test]
fn a_damaged_segment_is_no_obstacle_behind_the_stop_and_ends_the_planning_before_it() {
    let mut world = a_commit_in_each_segment();
    let segment_of = |world: &World, wanted: Xid| {
        let record =
            world.records[&tli(1)].iter().find(|r| r.event.as_ref().is_some_and(|e| e.xid == wanted));
        SegmentName::containing(tli(1), record.unwrap().lsn, SIZE)
    };
    let damaged = segment_of(&world, 15);
    world.damaged.push(damaged);
    for (target, neighbours_are) in [
        (xid(13), (Some(13), Some(14))),
        (time(3_500_000), (Some(13), Some(14))),
        (name("none"), (None, None)),
        (RecoveryTarget::new(TargetKind::Immediate), (None, Some(10))),
        (exclusive(xid(14)), (Some(13), Some(14))),
        // The first commit behind the stop lies in the damaged one.
        (xid(14), (Some(14), None)),
        (xid(16), (None, None)),
        (time(5_500_000), (None, None)),
        (RecoveryTarget::new(TargetKind::Latest), (None, None)),
    ] {
        match world.outcome(&target, &PlanOptions::default()) {
            Outcome::Plan(plan) => {
                assert_eq!(neighbours(&plan), neighbours_are, "{target:?}");
                let unknown = plan.first_excluded_unknown.as_deref();
                assert_eq!(unknown.is_some(), target == xid(14), "{target:?}: {unknown:?}");
                assert!(unknown.is_none_or(|why| why.contains(&damaged.to_string())), "{unknown:?}");
                let next = plan.chain.last().unwrap().last.next(SIZE).unwrap();
                assert_eq!(plan.damaged_behind, (next == damaged).then_some(damaged), "{target:?}");
                assert_eq!(plan.warnings.len(), usize::from(target == xid(14)), "{:?}", plan.warnings);
            }
            Outcome::Unreadable(name) => {
                assert_eq!((name, neighbours_are), (damaged, (None, None)), "{target:?}");
            }
            other => panic!("{target:?}: {other:?}"),
        }
    }
}

#[test]
fn backups_started_long_after_a_time_are_tried_last() {
    let mut world = a_commit_in_each_segment();
    for (id, segment, started) in [("b2", 3u64, 5), ("b3", 5, 5)] {
        let lsn = Lsn(START + segment * SIZE.bytes());
        let record = world.records[&tli(1)].iter().find(|record| record.lsn >= lsn).unwrap();
        let (start, stop) = (record.lsn, Lsn(record.lsn.0 + 2 * SIZE.bytes()));
        world.backup(id, tli(1), start, stop);
        world.catalog.backups.iter_mut().find(|b| b.id == id).unwrap().started =
            at(0) + Duration::days(started);
    }
    // What was started long after the target is not even looked at: their segments are damaged here.
    let all: Vec<_> = world.catalog.segments.names().collect();
    world.damaged.extend(&all[4..]);
    let plan = world.plan(&time(1_500_000)).unwrap();
    assert_eq!((&*plan.backup.id, neighbours(&plan)), ("b1", (Some(11), Some(12))));
    assert!(plan.reasons.iter().any(|r| r.starts_with("2 newer backup")), "{:?}", plan.reasons);
    // A wrong clock costs nothing but that: where no other serves, the WAL decides.
    world.damaged.clear();
    world.catalog.backups.retain(|backup| backup.id == "b2");
    let plan = world.plan(&time(6_500_000)).unwrap();
    assert_eq!((&*plan.backup.id, neighbours(&plan)), ("b2", (Some(16), Some(17))));
    assert!(!plan.reasons.iter().any(|r| r.contains("newer backup")), "{:?}", plan.reasons);
}

#[test]
fn what_lies_behind_the_stop_is_said_no_more_surely_than_it_is_known() {
    // Up to the end of the archive, and nothing else is stored.
    let mut world = a_commit_in_each_segment();
    let plan = world.plan(&xid(17)).unwrap();
    assert_eq!(neighbours(&plan), (Some(17), None));
    assert_eq!((&plan.first_excluded_unknown, &*plan.timelines_left_out), (&None, &[][..]));
    // A gap behind the stop.
    let gap = world.catalog.segments.names().nth(3).unwrap();
    let stored = world.catalog.segments.remove(&gap).unwrap();
    let last = world.plan(&xid(12)).unwrap();
    assert_eq!(neighbours(&last), (Some(12), None));
    let why = last.first_excluded_unknown.unwrap();
    assert!(why.contains(&format!("segment {gap} is missing")), "{why}");
    assert_eq!(world.plan(&xid(11)).unwrap().first_excluded_unknown, None);
    world.catalog.segments.insert(gap, stored);
    // Another timeline's WAL.
    world.catalog.segments.insert(gap.on(tli(2)), 1000);
    let plan = world.plan(&on(1, RecoveryTarget::new(TargetKind::Latest))).unwrap();
    assert_eq!((&plan.first_excluded_unknown, &*plan.timelines_left_out), (&None, &[tli(2)][..]));
    let (world, _) = forked();
    assert_eq!(world.plan(&xid(6010)).unwrap().timelines_left_out, [tli(1)], "behind the fork");
    assert_eq!(world.plan(&on(1, xid(5010))).unwrap().timelines_left_out, [tli(2)]);
}

#[test]
fn names_stop_at_the_first_match_after_the_backup() {
    let mut world = World::plain();
    let mut other = World::new();
    let start = other.push(tli(1), 64, None);
    let stop = other.end(tli(1));
    other.backup("b1", tli(1), start, stop);
    let first = other.push(tli(1), 64, restore_point("before", 10));
    other.push(tli(1), 64, commit(10, 20));
    let second = other.push(tli(1), 64, restore_point("before", 30));
    other.push(tli(1), 64, commit(11, 40));
    other.push(tli(1), 2 * SIZE.bytes(), None);
    other.archive(tli(1));
    let plan = other.plan(&name("before")).unwrap();
    assert_eq!(plan.stop.record.as_ref().unwrap().lsn, first);
    assert!(plan.warnings[0].contains(&second.to_string()), "{:?}", plan.warnings);
    let refusal = other.plan(&name("befor")).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::UnknownName);
    assert!(refusal.hints[0].contains("--to-name before"), "{:?}", refusal.hints);
    world.catalog.backups.clear();
    assert_eq!(world.plan(&name("before")).unwrap_err().kind, RefusalKind::NoBackup);
}

#[test]
fn lsn_compares_where_records_start() {
    let world = World::plain();
    let records = &world.records[&tli(1)];
    let commit = records.iter().find(|record| record.event.as_ref().is_some_and(|e| e.xid == 1020)).unwrap();
    let lsn = |lsn: u64| RecoveryTarget::new(TargetKind::Lsn(Lsn(lsn)));
    let at = commit.lsn.0;
    assert_eq!(neighbours(&world.plan(&lsn(at)).unwrap()), (Some(1020), Some(1021)));
    assert_eq!(neighbours(&world.plan(&exclusive(lsn(at))).unwrap()), (Some(1019), Some(1020)));
    // Within the record before: the commit is the first record that starts there or later.
    assert_eq!(neighbours(&world.plan(&lsn(at - 8)).unwrap()), (Some(1020), Some(1021)));
    assert_eq!(neighbours(&world.plan(&exclusive(lsn(at - 8))).unwrap()), (Some(1019), Some(1020)));
    // One byte on, the next record decides.
    let next = world.plan(&exclusive(lsn(at + 1))).unwrap();
    assert_eq!(neighbours(&next), (Some(1020), Some(1021)));
    assert_eq!(next.stop.final_lsn, reach::aligned(commit.end));
    let refusal = world.plan(&lsn(0xFFFF_0000_0000)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::PastEnd);
}

#[test]
fn immediate_and_latest_frame_the_window() {
    let world = World::plain();
    let plan = world.plan(&RecoveryTarget::new(TargetKind::Immediate)).unwrap();
    assert_eq!(neighbours(&plan), (Some(1003), Some(1004)));
    assert_eq!(plan.stop.final_lsn, plan.backup.stop_lsn);
    let plan = world.plan(&RecoveryTarget::new(TargetKind::Latest)).unwrap();
    assert_eq!(neighbours(&plan), (Some(1039), None));
    // The padding record runs past the last whole segment: recovery ends where it starts.
    assert_eq!(plan.stop.final_lsn, world.records[&tli(1)].last().unwrap().lsn);
}

fn forked() -> (World, Lsn) {
    let mut world = World::plain();
    world.records.get_mut(&tli(1)).unwrap().pop();
    let switch = world.fork(tli(1), tli(2));
    for number in 0..20u32 {
        world.push(tli(1), 64, commit(5000 + number, 60_000_000 + i64::from(number)));
        world.push(tli(1), 100_000, None);
        world.push(tli(2), 64, commit(6000 + number, 60_000_000 + i64::from(number)));
        world.push(tli(2), 100_000, None);
    }
    for timeline in [tli(1), tli(2)] {
        world.push(timeline, SIZE.bytes(), None);
        world.archive(timeline);
    }
    (world, switch)
}

#[test]
fn a_plan_follows_one_path_through_a_fork() {
    let (mut world, switch) = forked();
    let plan = world.plan(&xid(6010)).unwrap();
    assert_eq!(plan.timeline, tli(2));
    assert_eq!(neighbours(&plan), (Some(6010), Some(6011)));
    assert_eq!(plan.chain.len(), 2);
    // The child's copy of the segment that holds the fork.
    assert_eq!(plan.chain[1].first, SegmentName::containing(tli(2), switch, SIZE));
    assert_eq!(plan.target_options, "--to-xid 6010 --timeline 2");
    assert_eq!(neighbours(&world.plan(&on(1, xid(5010))).unwrap()), (Some(5010), Some(5011)));
    let refusal = world.plan(&xid(5010)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::UnknownXid);
    assert!(refusal.hints.iter().any(|hint| hint.contains("--timeline 1")), "{:?}", refusal.hints);
    // Without the child's copy the parent's serves up to the switch point, and no further.
    world.catalog.segments.remove(&SegmentName::containing(tli(2), switch, SIZE));
    assert_eq!(neighbours(&world.plan(&xid(1039)).unwrap()).0, Some(1039));
    let refusal = world.plan(&xid(6010)).unwrap_err();
    assert_eq!(refusal.gap.unwrap().from, switch);
    world.catalog.histories.clear();
    assert_eq!(world.plan(&xid(6010)).unwrap_err().kind, RefusalKind::MissingHistory);
    assert_eq!(world.plan(&on(9, xid(6010))).unwrap_err().kind, RefusalKind::UnknownTimeline);
}

#[test]
fn a_stop_before_the_fork_pins_the_older_timeline() {
    let (mut world, switch) = forked();
    let fork = SegmentName::containing(tli(2), switch, SIZE);
    for target in [xid(1020), on(2, xid(1020)), time(20_000_000), exclusive(xid(1039))] {
        let plan = world.plan(&target).unwrap();
        assert_eq!(plan.timeline, tli(1), "{target:?}");
        assert!(plan.target_options.ends_with("--timeline 1"), "{}", plan.target_options);
        assert!(plan.chain.iter().all(|part| part.first.timeline == tli(1)), "{:?}", plan.chain);
        assert_eq!(plan.timeline_path.len(), 1);
        assert!(plan.reasons.iter().any(|reason| reason.contains("1 is pinned")), "{:?}", plan.reasons);
    }
    // The first commit behind the stop is that of the path that was asked for.
    assert_eq!(neighbours(&world.plan(&xid(1039)).unwrap()), (Some(1039), Some(6000)));
    assert_eq!(world.plan(&exclusive(xid(6000))).unwrap().timeline, tli(2));
    assert_eq!(world.plan(&RecoveryTarget::new(TargetKind::Latest)).unwrap().timeline, tli(2));
    // PostgreSQL asks for the child's copy first, which is a hole: the parent's serves up to the switch.
    let child = world.catalog.segments.remove(&fork).unwrap();
    assert_eq!(world.plan(&xid(1039)).unwrap().timeline, tli(1));
    // Only the child's copy of the segment with the fork is stored.
    world.catalog.segments.insert(fork, child);
    world.catalog.segments.remove(&fork.on(tli(1)));
    assert_eq!(world.plan(&xid(1039)).unwrap().timeline, tli(2));
}

#[test]
fn a_backup_beyond_the_fork_is_not_on_the_path() {
    let (mut world, switch) = forked();
    let late = world.records[&tli(1)].iter().find(|record| record.lsn > switch).unwrap().lsn;
    world.backup("late", tli(1), late, Lsn(late.0 + 200_000));
    assert_eq!(world.plan(&xid(6010)).unwrap().backup.id, "b1");
    assert_eq!(world.plan(&on(1, xid(5010))).unwrap().backup.id, "late");
    let pinned = PlanOptions { backup: Some("late".into()) };
    assert_eq!(world.plan_with(&xid(6010), &pinned).unwrap_err().kind, RefusalKind::BackupNotOnPath);
}

#[test]
fn what_replay_does_on_the_way_is_told() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    let create = EventKind::TablespaceCreate { oid: 16_500, path: "/mnt/fast".into() };
    world.push(tli(1), 64, Some((7, create)));
    world.push(tli(1), 64, commit(7, 1));
    world.push(tli(1), 64, Some((0, EventKind::ParameterChange { settings: limits(300) })));
    let drop = EventKind::DatabaseDrop { oid: 16_600, tablespaces: vec![1663] };
    let drop_lsn = world.push(tli(1), 64, Some((8, drop)));
    world.push(tli(1), 64, commit(9, 10));
    world.push(tli(1), 64, commit(8, 20));
    let minimal = ServerLimits { wal_level: 0, ..limits(100) };
    world.push(tli(1), 64, Some((0, EventKind::ParameterChange { settings: minimal })));
    world.push(tli(1), 64, commit(10, 30));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    let plan = world.plan(&time(15)).unwrap();
    assert_eq!(plan.limits.max_connections, 300);
    assert_eq!(plan.tablespace_paths[0].path, "/mnt/fast");
    assert!(plan.warnings[0].contains(&format!("--to-lsn {drop_lsn} --exclusive")), "{:?}", plan.warnings);
    let safe = world.plan(&exclusive(RecoveryTarget::new(TargetKind::Lsn(drop_lsn)))).unwrap();
    assert!(!safe.warnings.iter().any(|warning| warning.contains("removal")), "{:?}", safe.warnings);
    let whole = world.plan(&xid(8)).unwrap();
    assert!(!whole.warnings.iter().any(|warning| warning.contains("removal")), "{:?}", whole.warnings);
    assert_eq!(world.plan(&xid(10)).unwrap_err().kind, RefusalKind::WalLevelMinimal);
}

#[test]
fn a_stop_inside_a_removal_is_told_for_every_kind_of_target() {
    let mut world = World::new();
    let start = world.push(tli(1), 64, None);
    let stop = world.end(tli(1));
    world.backup("b1", tli(1), start, stop);
    world.push(tli(1), 64, commit(6, 0));
    let marked = EventKind::DatabaseInvalid { oid: 16_600, name: "shop".into() };
    let mark = world.push(tli(1), 64, Some((0, marked)));
    world.push(tli(1), 64, restore_point("marked", 1));
    // As far apart as a checkpoint in between makes them.
    world.push(tli(1), 6 * SIZE.bytes(), None);
    let dropped = EventKind::DatabaseDrop { oid: 16_600, tablespaces: vec![1663] };
    let files = world.push(tli(1), 64, Some((8, dropped)));
    world.push(tli(1), 64, restore_point("gone", 9));
    world.push(tli(1), 64, commit(7, 10));
    let end = world.end(tli(1));
    world.push(tli(1), 64, commit(8, 20));
    world.push(tli(1), 64, commit(9, 30));
    world.push(tli(1), 2 * SIZE.bytes(), None);
    world.archive(tli(1));
    let safe = format!("--to-lsn {mark} --exclusive");
    let lsn = |lsn| RecoveryTarget::new(TargetKind::Lsn(lsn));
    let gone = [
        (time(10), true),
        (exclusive(time(20)), true),
        (xid(7), true),
        (exclusive(xid(8)), true),
        (lsn(files), true),
        (name("gone"), true),
        (exclusive(lsn(files)), false),
        (name("marked"), false),
    ];
    for (target, files_gone) in gone {
        let plan = world.plan(&target).unwrap();
        let [half] = &plan.half_done[..] else { panic!("{target:?}: {:?}", plan.half_done) };
        assert_eq!((half.what, half.oid, half.lsn), (Removed::Database, 16_600, mark), "{target:?}");
        assert_eq!((half.files_gone, half.xid), (files_gone, files_gone.then_some(8)), "{target:?}");
        assert_eq!(half.safe_options.as_ref(), Some(&safe), "{target:?}");
        assert!(plan.warnings[0].contains(&safe), "{:?}", plan.warnings);
    }
    assert_eq!(
        world.plan(&on(1, xid(7))).unwrap().half_done[0].safe_options,
        Some(format!("{safe} --timeline 1"))
    );
    for target in [xid(8), time(20), xid(9), exclusive(lsn(mark)), RecoveryTarget::new(TargetKind::Latest)] {
        assert_eq!(world.plan(&target).unwrap().half_done, [], "{target:?}");
    }
    // The archive ends inside of it; a mark that lies before the backup is consistent cannot be avoided with it.
    let mut ended = world.clone();
    ended.records.get_mut(&tli(1)).unwrap().retain(|record| record.lsn < end);
    ended.push(tli(1), 2 * SIZE.bytes(), None);
    assert!(ended.plan(&RecoveryTarget::new(TargetKind::Latest)).unwrap().half_done[0].files_gone);
    world.catalog.backups[0].stop_lsn = Lsn(mark.0 + 64);
    assert_eq!(world.plan(&xid(7)).unwrap().half_done[0].safe_options, None);
}

#[test]
fn a_fork_on_the_way_needs_its_segment_under_the_parents_name() {
    let (mut world, switch) = forked();
    let fork = SegmentName::containing(tli(2), switch, SIZE);
    assert_eq!(world.plan(&xid(6010)).unwrap().parent_segments, [], "nothing can be prepared");
    world.catalog.backups[0].limits.max_prepared_transactions = 10;
    let parent = ParentSegment { segment: fork.on(tli(1)), stored: fork, until: switch };
    assert_eq!(world.plan(&xid(6010)).unwrap().parent_segments, std::slice::from_ref(&parent));
    // Along the parent its own segment is fetched.
    assert_eq!(world.plan(&on(1, xid(5010))).unwrap().parent_segments, []);
    assert_eq!(world.plan(&xid(1010)).unwrap().parent_segments, []);
    // Of the child's first segment alone recovery reads what lies before the fork, too.
    world.catalog.segments.remove(&fork.on(tli(1)));
    let before = world.records[&tli(2)].iter().rfind(|record| record.end < switch).unwrap().lsn;
    let plan = world.plan(&exclusive(RecoveryTarget::new(TargetKind::Lsn(before)))).unwrap();
    assert_eq!((plan.timeline, plan.parent_segments), (tli(2), vec![parent]));
}

#[test]
fn what_was_shipped_of_the_open_segment_is_planned_with() {
    let mut world = World::plain();
    let latest = RecoveryTarget::new(TargetKind::Latest);
    let (whole_end, whole) = (world.plan(&latest).unwrap().stop.final_lsn, world.plan(&latest).unwrap());
    assert_eq!((whole.tail, whole.chain.len()), (None, 1));
    let first = world.push(tli(1), 40, commit(2001, 90_000_000));
    let second = world.push(tli(1), 40, commit(2002, 91_000_000));
    let end = world.end(tli(1));
    world.ship(tli(1), SIZE.bytes());
    assert!(first > whole_end);

    let plan = world.plan(&latest).unwrap();
    assert_eq!((plan.stop.final_lsn, neighbours(&plan)), (end, (Some(2002), None)));
    let part = plan.chain.last().unwrap();
    assert_eq!((part.segments, part.until_lsn, part.open, part.stored_bytes), (1, end, true, 300));
    assert!(plan.reasons.iter().any(|reason| reason.contains("open segment")), "{:?}", plan.reasons);
    for (target, expected) in [
        (xid(2001), (Some(2001), Some(2002))),
        (exclusive(xid(2002)), (Some(2001), Some(2002))),
        (time(90_500_000), (Some(2001), Some(2002))),
        (RecoveryTarget::new(TargetKind::Lsn(second)), (Some(2002), None)),
    ] {
        let plan = world.plan(&target).unwrap();
        assert_eq!(neighbours(&plan), expected, "{target:?}");
        assert_eq!(plan.tail.map(|tail| tail.until_lsn), Some(end));
    }
    // The first one out lies in it, recovery does not need it.
    let last = plan.backup.id;
    let before = world.plan(&time(60_000_000)).err().map(|refusal| refusal.kind);
    assert_eq!(before, None, "{last}");
    let refusal = world.plan(&time(92_000_000)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::PastEnd);
    assert!(refusal.before.unwrap().what.contains("2002"));
    assert!(refusal.reason.contains(&end.to_string()), "{}", refusal.reason);

    let flaw = Some(TailFlaw::Damaged { what: "a test".into() });
    world.tails.get_mut(&tli(1)).unwrap().flaw = flaw;
    let plan = world.plan(&xid(2001)).unwrap();
    assert!(plan.warnings.iter().any(|warning| warning.contains("is damaged")), "{:?}", plan.warnings);
}

#[test]
fn what_was_shipped_before_lost_wal_is_the_end_of_a_window() {
    let mut world = World::plain();
    let records = world.records[&tli(1)].clone();
    let lost = SegmentName::containing(tli(1), records[40].lsn, SIZE);
    world.lose(lost, 300_000);
    let tail = world.stranded[&lost].clone();
    let held: Vec<_> =
        records.iter().filter(|r| r.end <= tail.until_lsn).filter_map(|r| r.event.clone()).collect();
    let (last, before) = (held.last().unwrap(), &held[held.len() - 2]);
    assert!(before.lsn > lost.start(SIZE));
    for target in [xid(last.xid), exclusive(xid(last.xid)), RecoveryTarget::new(TargetKind::Lsn(before.lsn))]
    {
        let plan = world.plan(&target).unwrap();
        assert_eq!(plan.tail.as_ref(), Some(&tail), "{target:?}");
        assert_eq!(plan.gap_behind.as_ref().map(|gap| gap.from), Some(tail.until_lsn));
        assert!(plan.reasons.iter().any(|reason| reason.contains("it is lost")), "{:?}", plan.reasons);
    }
    // Behind its last record is no end: there was more.
    for target in [RecoveryTarget::new(TargetKind::Latest), xid(last.xid + 1)] {
        let refusal = world.plan(&target).unwrap_err();
        assert_eq!((refusal.kind, refusal.gap.unwrap().from), (RefusalKind::Gap, tail.until_lsn));
        let before = refusal.before.unwrap();
        assert!(before.what.contains(&last.xid.to_string()), "{}", before.what);
    }
}

/// What PostgreSQL would do with this backup, record by record: the planner's oracle.
fn simulate(world: &World, backup: &BackupRecord, target: &RecoveryTarget) -> Option<(Lsn, Lsn)> {
    let mut end = SegmentName::containing(tli(1), backup.start_lsn, SIZE);
    while world.catalog.segments.contains(end) {
        end = end.next(SIZE).unwrap();
    }
    let tail = world.tails.get(&tli(1));
    let later =
        world.catalog.segments.names().any(|name| name > end) || tail.is_some_and(|tail| tail.segment > end);
    let later = later || world.stranded.keys().any(|name| *name > end);
    let later = later || world.catalog.gaps.iter().any(|gap| gap.end_lsn > end.start(SIZE));
    // What was shipped of the open segment, or of one before lost WAL, ends with its last whole record.
    let tail = tail.filter(|tail| tail.segment == end && !later).or_else(|| world.stranded.get(&end));
    let end = tail.map_or(end.start(SIZE), |tail| tail.until_lsn);
    // What a newer backup was complete with was there: the archive does not end before it.
    let later = later || world.catalog.backups.iter().any(|backup| backup.stop_lsn > end);
    let consistent = backup.stop_lsn;
    let by_time = matches!(target.kind, TargetKind::Time { .. });
    if by_time && !has_checkpoint(&world.records[&tli(1)], backup.start_lsn, backup.stop_lsn) {
        return None;
    }
    let inclusive = target.stop == StopSide::Inclusive;
    let mut replayed = backup.start_lsn;
    for record in &world.records[&tli(1)] {
        if record.lsn < backup.start_lsn {
            continue;
        }
        if record.end > end {
            break;
        }
        let event = record.event.as_ref();
        let stop_time = event.and_then(|event| event.kind.stop_time());
        let ended = event.and_then(|event| event.kind.ended_xid(event.xid));
        let stops_before = match &target.kind {
            TargetKind::Immediate => replayed >= consistent,
            TargetKind::Lsn(lsn) => !inclusive && record.lsn >= *lsn,
            TargetKind::Xid(xid) => !inclusive && ended == Some(*xid),
            TargetKind::Time { time, .. } if inclusive => stop_time.is_some_and(|t| t > *time),
            TargetKind::Time { time, .. } => stop_time.is_some_and(|t| t >= *time),
            _ => false,
        };
        if stops_before {
            return (replayed >= consistent).then_some((record.lsn, replayed));
        }
        replayed = reach::aligned(record.end);
        let stops_after = match &target.kind {
            TargetKind::Lsn(lsn) => inclusive && record.lsn >= *lsn,
            TargetKind::Xid(xid) => inclusive && ended == Some(*xid),
            TargetKind::Name(wanted) => {
                matches!(event.map(|e| &e.kind), Some(EventKind::RestorePoint { name, .. }) if name == wanted)
            }
            _ => false,
        };
        if stops_after {
            return (replayed >= consistent).then_some((Lsn(record.lsn.0 + 1), replayed));
        }
    }
    let whole = target.kind == TargetKind::Latest && !later && replayed >= consistent;
    whole.then_some((Lsn(replayed.0), replayed))
}

#[derive(Debug, Clone)]
struct Script {
    steps: Vec<(u8, u64, i64)>,
    backups: Vec<(usize, usize)>,
    missing: Vec<usize>,
    /// A segment that is lost but for so many bytes.
    lost: Option<(usize, u64)>,
    /// How much of the last segment is shipped.
    shipped: Option<u64>,
}

fn scripts() -> impl Strategy<Value = Script> {
    let step = (
        0u8..12,
        prop_oneof![4 => 24u64..400, 3 => 20_000u64..200_000, 1 => 500_000u64..2_500_000],
        -20i64..60,
    );
    (
        proptest::collection::vec(step, 5..60),
        proptest::collection::vec((0usize..50, 1usize..6), 1..4),
        proptest::collection::vec(0usize..20, 0..2),
        proptest::option::of((0usize..8, 1..SIZE.bytes())),
        proptest::option::of(prop_oneof![2 => Just(SIZE.bytes()), 1 => 0..SIZE.bytes()]),
    )
        .prop_map(|(steps, backups, missing, lost, shipped)| Script {
            steps,
            backups,
            missing,
            lost,
            shipped,
        })
}

fn build(script: &Script) -> World {
    let mut world = World::new();
    world.push(tli(1), 40, None);
    let mut clock = 0;
    let mut next_xid = 100;
    let mut open: Vec<Xid> = Vec::new();
    for (kind, bytes, tick) in &script.steps {
        clock += tick;
        next_xid += 1;
        let event = match kind {
            0..=3 => commit(next_xid, clock),
            4 => Some((next_xid, EventKind::Abort { time: at(clock), prepared_xid: None, subxids: vec![] })),
            5 => restore_point(if tick % 2 == 0 { "even" } else { "odd" }, clock),
            6 => {
                open.push(next_xid);
                let prepared =
                    EventKind::Prepare { time: at(clock), prepared_xid: next_xid, gid: "g".into() };
                Some((next_xid, prepared))
            }
            7 => open.pop().map(|xid| {
                let kind = EventKind::Commit {
                    time: at(clock),
                    prepared_xid: Some(xid),
                    subxids: vec![],
                    dropped_relations: vec![],
                    dropped_objects: None,
                };
                (0, kind)
            }),
            _ => None,
        };
        world.push(tli(1), *bytes, event);
    }
    let records = world.records[&tli(1)].clone();
    for (number, (first, length)) in script.backups.iter().enumerate() {
        let first = first % (records.len() - 1);
        let last = (first + length).min(records.len() - 1);
        world.backup(&format!("b{number}"), tli(1), records[first].lsn, reach::aligned(records[last].end));
    }
    world.archive(tli(1));
    let names: Vec<_> = world.catalog.segments.names().collect();
    for missing in &script.missing {
        if let Some(name) = names.get(*missing) {
            world.catalog.segments.remove(name);
        }
    }
    if let Some((lost, but)) = script.lost
        && let Some(name) = names.get(lost)
    {
        world.lose(*name, but);
    }
    if let Some(bytes) = script.shipped {
        world.ship(tli(1), bytes);
    }
    world
}

fn targets() -> impl Strategy<Value = RecoveryTarget> {
    let kind = prop_oneof![
        3 => (-50i64..1200).prop_map(|micros| TargetKind::Time { time: at(micros), zone: Zone::Utc }),
        3 => (START - 100..START + 6_000_000).prop_map(|lsn| TargetKind::Lsn(Lsn(lsn))),
        3 => (100u32..165).prop_map(TargetKind::Xid),
        1 => Just(TargetKind::Name("even".into())),
        1 => Just(TargetKind::Name("odd".into())),
        1 => Just(TargetKind::Latest),
        1 => Just(TargetKind::Immediate),
    ];
    (kind, any::<bool>()).prop_map(|(kind, inclusive)| {
        let sided = matches!(kind, TargetKind::Time { .. } | TargetKind::Lsn(_) | TargetKind::Xid(_));
        let target = RecoveryTarget::new(kind);
        if sided && !inclusive { exclusive(target) } else { target }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_plan_says_what_replay_does(script in scripts(), targets in proptest::collection::vec(targets(), 8)) {
        let world = build(&script);
        for target in targets {
            let mut backups: Vec<_> = world.catalog.backups.iter().collect();
            backups.sort_by(|a, b| (b.stop_lsn, b.start_lsn, &b.id).cmp(&(a.stop_lsn, a.start_lsn, &a.id)));
            let expected =
                backups.into_iter().find_map(|backup| Some((backup, simulate(&world, backup, &target)?)));
            match (world.plan(&target), expected) {
                (Ok(plan), Some((backup, (cut, end)))) => {
                    prop_assert_eq!(&plan.backup.id, &backup.id, "{:?}", target);
                    prop_assert_eq!((plan.stop.cut_lsn, reach::aligned(plan.stop.final_lsn)), (cut, end), "{:?}", target);
                    let commits = || world.records[&tli(1)].iter().filter_map(|r| r.event.as_ref()).filter(|e| {
                        matches!(e.kind, EventKind::Commit { .. }) && e.lsn >= backup.start_lsn
                    });
                    let last = commits().rfind(|e| e.lsn < cut).map(|e| e.lsn);
                    prop_assert_eq!(plan.last_included.map(|e| e.lsn), last);
                    if let Some(first) = plan.first_excluded {
                        prop_assert_eq!(Some(first.lsn), commits().find(|e| e.lsn >= cut).map(|e| e.lsn));
                    }
                    // The chain starts at the backup's redo, is unbroken, stored, and covers the target.
                    let first = plan.chain[0].first;
                    prop_assert_eq!(first, SegmentName::containing(tli(1), backup.start_lsn, SIZE));
                    let mut next = first;
                    for part in &plan.chain {
                        prop_assert_eq!(part.first, next);
                        let mut name = part.first;
                        while name <= part.last {
                            prop_assert!(world.catalog.segments.contains(name) != part.open);
                            name = name.next(SIZE).unwrap();
                        }
                        next = name;
                    }
                    let last = plan.chain.last().unwrap();
                    prop_assert!(last.until_lsn >= plan.stop.through_lsn);
                    prop_assert_eq!(plan.tail.map(|tail| tail.segment), last.open.then_some(last.last));
                }
                (Err(_), None) => {}
                (plan, expected) => {
                    let plan = plan.map(|plan| (plan.backup.id, plan.stop));
                    prop_assert!(false, "{:?}: planned {:?}, expected {:?}", target, plan, expected);
                }
            }
        }
    }

    #[test]
    fn what_a_refusal_offers_can_be_reached(script in scripts(), target in targets()) {
        let world = build(&script);
        let Err(refusal) = world.plan(&target) else { return Ok(()) };
        for suggestion in [refusal.before, refusal.after].into_iter().flatten() {
            let mut words = suggestion.options.split_whitespace();
            let target = match words.next().unwrap() {
                "--latest" => RecoveryTarget::new(TargetKind::Latest),
                "--immediate" => RecoveryTarget::new(TargetKind::Immediate),
                "--to-lsn" => RecoveryTarget::new(TargetKind::Lsn(words.next().unwrap().parse().unwrap())),
                other => panic!("{other}"),
            };
            let backup = words.next().map(|option| {
                prop_assert_eq!(option, "--backup");
                Ok(words.next().unwrap().to_owned())
            });
            let backup = backup.transpose()?;
            let planned = world.plan_with(&target, &PlanOptions { backup });
            prop_assert!(planned.is_ok(), "{}: {:?}", suggestion.options, planned);
        }
    }
}
