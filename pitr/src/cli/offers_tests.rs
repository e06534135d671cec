//! What refusals and warnings offer is pasted back: in random worlds, through the command line's own parser,
//! against a model that looks at every backup and every commit.

use std::collections::BTreeMap;

use chrono::{DateTime, Offset as _, TimeDelta, TimeZone as _, Utc};
use clap::Parser as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use walship::catalog::BackupRecord;
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId, Xid};
use walship::wal::event::{EventKind, ServerLimits};

use super::args::{Args, Command};
use crate::plan::tests::{SIZE, WalRecord, World, at, checkpoint, commit, limits, restore_point, tli};
use crate::plan::{ChainEnding, PlanOptions, Refusal, RefusalKind, RestorePlan, build_chain, decides};
use crate::target::{RecoveryTarget, StopSide, TargetKind, TargetWords, TimelineChoice, Zone};

const WORLDS: u64 = 250;
const TARGETS_PER_WORLD: usize = 12;
const SECOND: i64 = 1_000_000;

/// Every kind that a target can be refused with.
const KINDS: [RefusalKind; 13] = [
    RefusalKind::NoBackup,
    RefusalKind::UnknownBackup,
    RefusalKind::BackupNotOnPath,
    RefusalKind::UnknownTimeline,
    RefusalKind::MissingHistory,
    RefusalKind::PastEnd,
    RefusalKind::BeforeFirst,
    RefusalKind::Gap,
    RefusalKind::UnknownName,
    RefusalKind::UnknownXid,
    RefusalKind::WalLevelMinimal,
    RefusalKind::WalReset,
    RefusalKind::Undecoded,
];

/// Splits words as a POSIX shell does, as far as [`crate::target::shell_word`] quotes them.
fn shell_split(text: &str) -> Vec<String> {
    let mut words = vec![];
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' => words.extend(word.take()),
            '\'' => word.get_or_insert_default().extend(chars.by_ref().take_while(|c| *c != '\'')),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// What the command line makes of pasted options.
fn paste(options: &str) -> (RecoveryTarget, PlanOptions) {
    let words = ["pitr".to_owned(), "plan".to_owned()].into_iter().chain(shell_split(options));
    let parsed = Args::try_parse_from(words).unwrap_or_else(|error| panic!("{options}: {error}"));
    let Command::Plan(plan) = parsed.command else { panic!("{options}") };
    let target = plan.target.target().unwrap_or_else(|error| panic!("{options}: {error}"));
    (target, PlanOptions { backup: plan.target.backup.clone() })
}

/// The options in a sentence: each begins with a target option and ends before a bracket or the sentence's end.
fn options_in(sentence: &str) -> Vec<String> {
    let starts = ["--to-time ", "--to-lsn ", "--to-xid ", "--to-name ", "--latest", "--immediate"];
    let mut found = Vec::new();
    let mut rest = sentence;
    while let Some(from) = starts.iter().filter_map(|start| rest.find(start)).min() {
        let text = &rest[from..];
        let ends = [" (", " to reach", " stops before", ", --"].iter().filter_map(|end| text.find(end)).min();
        let end = ends.unwrap_or(text.len());
        found.push(text[..end].trim_end_matches('.').to_owned());
        rest = &text[end..];
    }
    found
}

/// A world and what was drawn for it.
struct Scene {
    world: World,
    /// Whether the clock never went back.
    steady: bool,
    last_xid: Xid,
    last_time: i64,
}

struct Maker {
    world: World,
    random: StdRng,
    clock: i64,
    xid: Xid,
    prepared: Vec<Xid>,
}

impl Maker {
    fn chance(&mut self, probability: f64) -> bool {
        self.random.random_bool(probability)
    }

    fn bytes(&mut self) -> u64 {
        match self.random.random_range(0..8) {
            0..4 => self.random.random_range(24..400),
            4..7 => self.random.random_range(20_000..200_000),
            _ => self.random.random_range(500_000..1_800_000),
        }
    }

    /// Appends one record of any kind.
    fn record(&mut self, timeline: TimelineId) {
        self.clock += self.random.random_range(0..5) * SECOND / 2;
        self.xid += 1;
        let (xid, clock) = (self.xid, self.clock);
        let event = match self.random.random_range(0..16) {
            0..5 => commit(xid, clock),
            5 => Some((xid, EventKind::Abort { time: at(clock), prepared_xid: None, subxids: vec![] })),
            6 => restore_point(&format!("it's {}", xid % 50), clock),
            7 => {
                self.prepared.push(xid);
                let kind = EventKind::Prepare { time: at(clock), prepared_xid: xid, gid: "g".into() };
                Some((xid, kind))
            }
            8 => self.prepared.pop().map(|prepared| (0, commit_of(clock, Some(prepared), vec![]))),
            9 => Some((xid, commit_of(clock, None, vec![xid + 1]))).inspect(|_| self.xid += 1),
            10 if self.random.random_bool(0.3) => {
                let kind = EventKind::DatabaseDrop { oid: 16_000 + xid, tablespaces: vec![1663] };
                Some((xid, kind))
            }
            _ => None,
        };
        let bytes = self.bytes();
        self.world.push(timeline, bytes, event);
    }

    fn backup(&mut self, timeline: TimelineId) {
        let start = self.world.push(timeline, 64, None);
        // Its time has whole seconds, rounded down.
        self.world.push(timeline, 120, checkpoint(start, self.clock.div_euclid(SECOND) * SECOND));
        for _ in 0..self.random.random_range(0..5) {
            self.record(timeline);
        }
        self.world.push(timeline, 64, None);
        let stop = self.world.end(timeline);
        let id = format!("b{}", self.world.catalog.backups.len() + 1);
        self.world.backup_record(&id, timeline, start, stop);
        let started = at(self.clock);
        let made = self.world.catalog.backups.iter_mut().find(|backup| backup.id == id).unwrap();
        (made.started, made.finished) = (started, started);
    }

    /// Some records, backups between them.
    fn stretch(&mut self, timeline: TimelineId) {
        for _ in 0..self.random.random_range(1..14) {
            if self.chance(0.12) {
                self.backup(timeline);
            }
            if self.chance(0.015) {
                let settings = ServerLimits { wal_level: 0, ..limits(100) };
                self.world.push(timeline, 64, Some((0, EventKind::ParameterChange { settings })));
            }
            if self.chance(0.015) {
                let kind = EventKind::WalBegins { time: at(self.clock) };
                self.world.push(timeline, 114, Some((0, kind)));
            }
            self.record(timeline);
        }
    }
}

fn commit_of(clock: i64, prepared_xid: Option<Xid>, subxids: Vec<Xid>) -> EventKind {
    EventKind::Commit {
        time: at(clock),
        prepared_xid,
        subxids,
        dropped_relations: vec![],
        dropped_objects: None,
    }
}

fn scene(seed: u64) -> Scene {
    let mut maker = Maker {
        world: World::new(),
        random: StdRng::seed_from_u64(seed),
        clock: 0,
        xid: 100,
        prepared: vec![],
    };
    let steady = maker.chance(0.7);
    let mut timelines = vec![tli(1)];
    maker.world.push(tli(1), 40, None);
    for _ in 0..maker.random.random_range(1..5) {
        let timeline = timelines[maker.random.random_range(0..timelines.len())];
        maker.stretch(timeline);
        if maker.chance(0.25) && timelines.len() < 3 {
            let child = tli(timelines.len() as u32 + 1);
            maker.world.fork(timeline, child);
            timelines.push(child);
        }
        if !steady {
            maker.clock -= maker.random.random_range(0..20) * SECOND;
        }
    }
    for timeline in &timelines {
        if maker.chance(0.8) {
            maker.world.push(*timeline, 2 * SIZE.bytes(), None);
        }
        maker.world.archive(*timeline);
    }
    let names: Vec<SegmentName> = maker.world.catalog.segments.names().collect();
    for name in names {
        if maker.chance(0.04) {
            maker.world.catalog.segments.remove(&name);
        } else if maker.chance(0.02) {
            maker.world.undecoded.push(name);
        }
    }
    if maker.chance(0.1) && timelines.len() > 1 {
        maker.world.catalog.histories.remove(&tli(2));
    }
    if maker.chance(0.03) {
        maker.world.catalog.backups.clear();
    }
    Scene { steady, last_xid: maker.xid, last_time: maker.clock, world: maker.world }
}

fn draw(scene: &Scene, random: &mut StdRng) -> (RecoveryTarget, PlanOptions) {
    let end =
        scene.world.records.values().filter_map(|records| records.last()).map(|r| r.end.0).max().unwrap();
    let first = scene.world.records[&tli(1)][0].lsn.0;
    let xid = random.random_range(100..scene.last_xid + 3);
    let kind = match random.random_range(0..10) {
        0..3 => {
            let micros = random.random_range(-5 * SECOND..scene.last_time.max(0) + 8 * SECOND);
            TargetKind::Time { time: at(micros / (SECOND / 2) * (SECOND / 2)), zone: Zone::Utc }
        }
        3..5 => TargetKind::Lsn(Lsn(random.random_range(first - 64..end + 1000))),
        5..7 => TargetKind::Xid(xid),
        7 => TargetKind::Name(format!("it's {}", xid % 50)),
        8 => TargetKind::Latest,
        _ => TargetKind::Immediate,
    };
    let sided = matches!(kind, TargetKind::Time { .. } | TargetKind::Lsn(_) | TargetKind::Xid(_));
    let mut target = RecoveryTarget::new(kind);
    if sided && random.random_bool(0.4) {
        target.stop = StopSide::Exclusive;
    }
    if random.random_bool(0.3) {
        target.timeline = TimelineChoice::Number(tli(random.random_range(1..5)));
    }
    let backup = random.random_bool(0.15).then(|| format!("b{}", random.random_range(1..6)));
    (target, PlanOptions { backup })
}

/// A state that can be reached: by how far commits are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    commits: usize,
    cut: Lsn,
}

/// The way along one timeline, and what each backup on it leads to.
struct Model<'a> {
    scene: &'a Scene,
    history: TimelineHistory,
    records: &'a [WalRecord],
}

impl<'a> Model<'a> {
    fn of(scene: &'a Scene, target: &RecoveryTarget) -> Option<Self> {
        let catalog = &scene.world.catalog;
        let timeline = match target.timeline {
            TimelineChoice::Latest => *catalog.timelines().last()?,
            TimelineChoice::Number(timeline) => timeline,
        };
        let history = catalog.history(timeline)?;
        let records = scene.world.records.get(&timeline)?;
        Some(Self { scene, history, records })
    }

    fn backups(&self, options: &PlanOptions) -> Vec<&'a BackupRecord> {
        let on_path = |backup: &&BackupRecord| {
            self.history.timeline_of(backup.start_lsn) == backup.timeline
                && self.history.timeline_of(Lsn(backup.stop_lsn.0 - 1)) == backup.timeline
                && options.backup.as_ref().is_none_or(|id| *id == backup.id)
        };
        self.scene.world.catalog.backups.iter().filter(on_path).collect()
    }

    fn state(&self, cut: Lsn) -> State {
        let is_commit = |r: &&WalRecord| {
            r.lsn < cut && r.event.as_ref().is_some_and(|e| matches!(e.kind, EventKind::Commit { .. }))
        };
        State { commits: self.records.iter().filter(is_commit).count(), cut }
    }

    /// The records that recovery from a backup can replay, in order, the first that it can read but not apply,
    /// and whether nothing is known to be missing behind them.
    fn replayable(&self, backup: &BackupRecord) -> (Vec<&'a WalRecord>, Option<Lsn>, bool) {
        let chain = build_chain(&self.scene.world.catalog, &self.history, backup.start_lsn);
        let undecoded = |name: &SegmentName| self.scene.world.undecoded.contains(name);
        let torn = chain.steps_from(0).find(|step| undecoded(&step.segment)).map(|step| step.from);
        let end = torn.unwrap_or(chain.end());
        let inside = |r: &&WalRecord| r.lsn >= backup.start_lsn && r.end <= end;
        let mut records = Vec::new();
        for record in self.records.iter().filter(inside) {
            if let Some(EventKind::ParameterChange { settings }) = record.event.as_ref().map(|e| &e.kind)
                && settings.wal_level == 0
            {
                return (records, Some(record.lsn), false);
            }
            if matches!(record.event.as_ref().map(|e| &e.kind), Some(EventKind::WalBegins { .. })) {
                return (records, None, false);
            }
            records.push(record);
        }
        (records, None, torn.is_none() && chain.ending == ChainEnding::EndOfArchive)
    }

    /// Every state that a backup leads to.
    fn states(&self, backup: &BackupRecord) -> Vec<State> {
        let aligned = |lsn: Lsn| Lsn((lsn.0 + 7) & !7);
        let (records, unapplied, open) = self.replayable(backup);
        let mut replayed = backup.start_lsn;
        let mut states = Vec::new();
        for record in &records {
            if replayed >= backup.stop_lsn && states.is_empty() {
                states.push(self.state(record.lsn));
            }
            replayed = aligned(record.end);
            let ends = record.event.as_ref().is_some_and(|e| matches!(e.kind, EventKind::Commit { .. }));
            if replayed >= backup.stop_lsn && ends {
                states.push(self.state(Lsn(record.lsn.0 + 1)));
            }
        }
        if replayed >= backup.stop_lsn && (open || (states.is_empty() && unapplied.is_some())) {
            states.push(self.state(replayed));
        }
        states
    }

    /// The record that the target means, as far as any of the backups leads to it.
    fn meant(&self, target: &RecoveryTarget, backups: &[&BackupRecord]) -> Option<Lsn> {
        let is_it = |record: &&&WalRecord| match target.kind {
            TargetKind::Lsn(lsn) => record.lsn >= lsn,
            _ => record.event.as_ref().is_some_and(|event| decides(target, event)),
        };
        match target.kind {
            // Time and position have an order with WAL that is missing.
            TargetKind::Lsn(_) | TargetKind::Time { .. } => {
                self.records.iter().find(|r| is_it(&r)).map(|r| r.lsn)
            }
            TargetKind::Xid(_) | TargetKind::Name(_) => {
                let reads = backups.iter().flat_map(|backup| self.replayable(backup).0);
                reads.filter(|r| is_it(&r)).map(|r| r.lsn).min()
            }
            TargetKind::Latest | TargetKind::Immediate => None,
        }
    }

    /// When the checkpoint of a backup began.
    fn began(&self, backup: &BackupRecord) -> Option<DateTime<Utc>> {
        let events = self.records.iter().filter_map(|record| record.event.as_ref());
        events.filter(|event| event.lsn >= backup.start_lsn && event.lsn < backup.stop_lsn).find_map(
            |event| match event.kind {
                EventKind::Checkpoint { redo, time, .. } if redo == backup.start_lsn => Some(time),
                _ => None,
            },
        )
    }

    /// The nearest states on both sides of a target that was refused.
    fn nearest(
        &self,
        target: &RecoveryTarget,
        options: &PlanOptions,
        refusal: &Refusal,
    ) -> (Option<State>, Option<State>) {
        let backups = self.backups(options);
        let meant = self.meant(target, &backups);
        let lies_before = |backup: &BackupRecord| {
            if let Some(at) = refusal.at {
                return backup.stop_lsn > at;
            }
            let chain = build_chain(&self.scene.world.catalog, &self.history, backup.start_lsn);
            // When redo was fixed is not known to the second.
            let whole =
                |lsn: Lsn| self.records.iter().any(|record| record.lsn == lsn && record.end <= chain.end());
            let maybe = TimeDelta::seconds(if meant.is_some_and(whole) { 2 } else { 0 });
            let late = match target.kind {
                TargetKind::Time { time, .. } => self.began(backup).is_some_and(|began| began + maybe > time),
                TargetKind::Lsn(lsn) => lsn < backup.start_lsn,
                _ => false,
            };
            let reads = |lsn: Lsn| self.replayable(backup).0.iter().any(|record| record.lsn == lsn);
            late || meant.is_some_and(|lsn| lsn < backup.start_lsn || reads(lsn))
        };
        let (after, before): (Vec<_>, Vec<_>) = backups.into_iter().partition(|backup| lies_before(backup));
        let before = before.into_iter().flat_map(|backup| self.states(backup)).max();
        let after = after.into_iter().flat_map(|backup| self.states(backup)).min();
        (before, after)
    }
}

fn planned(scene: &Scene, options: &str) -> RestorePlan {
    let (target, pinned) = paste(options);
    scene.world.plan_with(&target, &pinned).unwrap_or_else(|refusal| panic!("{options}: {refusal:?}"))
}

/// Checks what a refusal offers; returns how many options it names.
fn check_refusal(scene: &Scene, target: &RecoveryTarget, options: &PlanOptions, refusal: &Refusal) -> usize {
    let mut count = 0;
    for hint in &refusal.hints {
        for offered in options_in(hint) {
            planned(scene, &offered);
            count += 1;
        }
    }
    let plans = [&refusal.before, &refusal.after]
        .map(|offer| offer.as_ref().map(|offer| planned(scene, &offer.options)));
    count += plans.iter().flatten().count();
    let decided = match target.kind {
        // Without a target there is no other side.
        TargetKind::Immediate => false,
        // What a clock that went back shows twice lies on both sides.
        TargetKind::Time { .. } => scene.steady,
        // The first of a name is meant, from wherever recovery starts.
        TargetKind::Name(_) => refusal.kind == RefusalKind::UnknownName,
        _ => true,
    };
    let model = Model::of(scene, target).filter(|model| decided && !model.backups(options).is_empty());
    let Some(model) = model else { return count };
    let [before, after] = plans.map(|plan| plan.map(|plan| model.state(plan.stop.cut_lsn).commits));
    let nearest = model.nearest(target, options, refusal);
    let commits = |state: Option<State>| state.map(|state| state.commits);
    assert_eq!((before, after), (commits(nearest.0), commits(nearest.1)), "{nearest:?}");
    if let Some(lsn) = model.meant(target, &model.backups(options)) {
        let asked = model.state(lsn).commits;
        assert!(before.is_none_or(|before| before <= asked), "before {asked}");
        assert!(after.is_none_or(|after| after >= asked || refusal.at.is_some()), "after {asked}");
    }
    count
}

#[test]
fn every_option_of_every_refusal_leads_to_a_plan_and_the_nearest_are_offered() {
    let mut met: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let (mut warned, mut plans) = (0, 0);
    for seed in 0..WORLDS {
        let scene = scene(seed);
        let mut random = StdRng::seed_from_u64(seed ^ 0xA5A5);
        for _ in 0..TARGETS_PER_WORLD {
            let (target, options) = draw(&scene, &mut random);
            let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                match scene.world.plan_with(&target, &options) {
                    Ok(plan) => (None, check_plan(&scene, &plan)),
                    Err(refusal) => {
                        let count = check_refusal(&scene, &target, &options, &refusal);
                        (Some(refusal.kind), count)
                    }
                }
            }));
            let Ok((kind, count)) = told else {
                let refused = scene.world.plan_with(&target, &options).err();
                panic!("seed {seed}, {} {options:?}: {refused:#?}", target.options());
            };
            match kind {
                None => (warned, plans) = (warned + count, plans + 1),
                Some(kind) => {
                    let entry = met.entry(format!("{kind:?}")).or_default();
                    *entry = (entry.0 + 1, entry.1 + count);
                }
            }
        }
    }
    for kind in KINDS {
        let (times, offers) = met.get(&format!("{kind:?}")).copied().unwrap_or_default();
        assert!(times > 0, "{kind:?} was not met: {met:?}");
        assert!(offers > 0 || kind == RefusalKind::NoBackup, "{kind:?} offers nothing: {met:?}");
    }
    assert!(warned > 0 && plans > 0, "{warned} {plans}");
}

/// Checks what a plan's warnings offer; returns how many options they name.
fn check_plan(scene: &Scene, plan: &RestorePlan) -> usize {
    let again = planned(scene, &format!("{} --backup {}", plan.target_options, plan.backup.id));
    assert_eq!(again.stop, plan.stop);
    let offered: Vec<String> = plan.warnings.iter().flat_map(|warning| options_in(warning)).collect();
    for options in &offered {
        planned(scene, options);
    }
    for half in &plan.half_done {
        let Some(safe) = &half.safe_options else { continue };
        assert!(!planned(scene, safe).half_done.iter().any(|other| other.lsn == half.lsn), "{safe}");
    }
    offered.len()
}

/// The readings that a refused time is answered with.
fn readings(text: &str) -> Vec<DateTime<Utc>> {
    let words = ["pitr", "plan", "--to-time", text];
    let parsed = Args::try_parse_from(words).unwrap();
    let Command::Plan(plan) = parsed.command else { panic!("{text}") };
    let refused = walship::Error::from(
        TargetWords { time: Some(text.into()), ..TargetWords::default() }.parse(|_| vec![]).unwrap_err(),
    );
    assert_eq!(plan.target.target().unwrap_err().to_string(), refused.to_string());
    let next = refused.next().to_string();
    let quoted = next.split('\'').skip(1).step_by(2);
    let times = quoted.map(|quoted| match paste(&format!("--to-time '{quoted}'")).0.kind {
        TargetKind::Time { time, .. } => time,
        other => panic!("{other:?}"),
    });
    times.collect()
}

#[test]
fn the_readings_of_times_that_clock_changes_made_unclear_lie_on_both_sides_of_the_change() {
    let mut random = StdRng::seed_from_u64(3);
    let (mut twice, mut never) = (0, 0);
    for zone in chrono_tz::TZ_VARIANTS {
        // A name that PostgreSQL takes for an abbreviation is refused as such.
        if !zone.name().contains('/') {
            continue;
        }
        let offset =
            |time: DateTime<Utc>| zone.offset_from_utc_datetime(&time.naive_utc()).fix().local_minus_utc();
        let first = Utc.with_ymd_and_hms(random.random_range(1880..2036), 1, 1, 0, 0, 0).unwrap();
        for day in 0..730 {
            let (mut low, mut high) = (first + TimeDelta::days(day), first + TimeDelta::days(day + 1));
            if offset(low) == offset(high) {
                continue;
            }
            while high - low > TimeDelta::seconds(1) {
                let middle = low + TimeDelta::seconds((high - low).num_seconds() / 2);
                if offset(middle) == offset(low) { low = middle } else { high = middle }
            }
            let change = i64::from(offset(high) - offset(low));
            // A local time among those that were skipped or came twice.
            let within = random.random_range(0..change.abs());
            let local = match change {
                ..0 => high + TimeDelta::seconds(i64::from(offset(high)) + within),
                _ => high + TimeDelta::seconds(i64::from(offset(low)) + within),
            };
            let text = format!("{} {zone}", local.format("%Y-%m-%d %H:%M:%S"));
            let named = readings(&text);
            let [one, other] = named[..] else { panic!("{text}: {named:?}") };
            match change {
                ..0 => {
                    assert!(one < high && other >= high, "{text}: {named:?}");
                    twice += 1;
                }
                _ => {
                    assert!(one >= high && other < high, "{text}: {named:?}");
                    never += 1;
                }
            }
        }
    }
    assert!(twice > 100 && never > 100, "{twice} {never}");
}
