//! What is planned with the index, in whatever state it is, is what is planned without it, and what the plain
//! records say.

#![allow(clippy::unwrap_used)]

mod world;

use pitr::execute::{Planned, Proof, make_plan};
use pitr::plan::{ChainPart, PlanOptions, Refusal, RestorePlan};
use pitr::target::{RecoveryTarget, StopSide, TargetKind, TimelineChoice, Zone};
use rand::RngExt as _;
use walship::catalog::{BackupRecord, Catalog};
use walship::pg::{Lsn, SegmentName, TimelineHistory};
use walship::repository::index::complete::Task;
use walship::repository::{load_catalog, load_catalog_from_listings};
use walship::storage::ObjectKey;
use world::{SIZE, What, World, Written, time};

/// How many histories are made; `WALSHIP_TEST_WORLDS=100-200` makes those with these numbers.
const WORLDS: std::ops::Range<u64> = 0..10;

/// How many targets are planned in each state of the index.
const TARGETS: usize = 10;

type Answer = Result<Box<RestorePlan>, Box<Refusal>>;

async fn answer(world: &World, catalog: &Catalog, target: &RecoveryTarget) -> Result<Answer, String> {
    match make_plan(&world.lineage, catalog, target, &PlanOptions::default(), Proof::Whole).await {
        Ok(Planned::Plan(plan)) => Ok(Ok(plan)),
        Ok(Planned::Refused(refusal)) => Ok(Err(refusal)),
        Err(error) => Err(error.to_string()),
    }
}

/// Says all that must not depend on the index.
fn told(answer: &Result<Answer, String>) -> String {
    match answer {
        Ok(Ok(plan)) => {
            let mut plan = plan.clone();
            // Said as far as it is known anyway.
            plan.warnings.retain(|warning| !warning.starts_with("another restore point"));
            serde_json::to_string_pretty(&plan).unwrap()
        }
        Ok(Err(refusal)) => format!("{refusal:#?}"),
        Err(error) => error.clone(),
    }
}

fn assert_alike(with: &str, without: &str, about: &str) {
    let pairs = with.lines().zip(without.lines());
    let differing: Vec<_> = pairs.filter(|(with, without)| with != without).take(8).collect();
    assert!(with == without, "{about}\nwith the index and without it: {differing:#?}");
}

fn targets(world: &mut World) -> Vec<RecoveryTarget> {
    let mut targets = Vec::new();
    for _ in 0..TARGETS {
        let branches = world.branches.len();
        let branch = world.rng().random_range(0..branches);
        let records = world.branches[branch].records.clone();
        let timeline = world.branches[branch].history.timeline;
        let at = world.rng().random_range(0..records.len());
        let ends: Vec<_> = records.iter().filter(|record| matches!(record.what, What::End { .. })).collect();
        let end = (!ends.is_empty()).then(|| ends[world.rng().random_range(0..ends.len())]);
        let clock = world.clock();
        let kind = match (world.rng().random_range(0..9), end.map(|end| &end.what)) {
            (0..=2, Some(What::End { micros, .. })) => {
                let off = world.rng().random_range(-1..2);
                TargetKind::Time { time: time(micros + off), zone: Zone::Utc }
            }
            (3, _) => {
                let micros = world.rng().random_range(900_000_000..clock + 1_000_000);
                TargetKind::Time { time: time(micros), zone: Zone::Utc }
            }
            (4 | 5, Some(What::End { xid, .. })) => TargetKind::Xid(*xid),
            (6, _) => TargetKind::Name(if at % 2 == 0 { "even" } else { "odd" }.into()),
            (7, _) => TargetKind::Lsn(records[at].lsn),
            (8, _) if at % 2 == 0 => TargetKind::Immediate,
            _ => TargetKind::Latest,
        };
        let sided = matches!(kind, TargetKind::Time { .. } | TargetKind::Xid(_) | TargetKind::Lsn(_));
        let mut target = RecoveryTarget::new(kind);
        if sided && world.rng().random_bool(0.5) {
            target.stop = StopSide::Exclusive;
        }
        if world.rng().random_bool(0.7) {
            target.timeline = TimelineChoice::Number(timeline);
        }
        targets.push(target);
    }
    targets
}

/// Returns where the stored WAL along a timeline ends that begins at `start`.
fn stored_end(catalog: &Catalog, history: &TimelineHistory, start: Lsn) -> Lsn {
    let mut at = start;
    loop {
        let holds = |timeline, until: Lsn| {
            until > at && catalog.segments.contains(SegmentName::containing(timeline, at, SIZE))
        };
        let segment_end = SegmentName::containing(history.timeline, at, SIZE).end(SIZE);
        // Younger copies first: what a child's first segment holds of its parent counts.
        let mut next = None;
        let begins = history.ancestors.last().map_or(Lsn(0), |entry| entry.switch_lsn);
        if begins < segment_end && holds(history.timeline, Lsn(u64::MAX)) {
            next = Some(segment_end);
        }
        for (number, entry) in history.ancestors.iter().enumerate().rev() {
            let begins = number.checked_sub(1).map_or(Lsn(0), |before| history.ancestors[before].switch_lsn);
            if next.is_none() && begins < segment_end && holds(entry.timeline, entry.switch_lsn) {
                next = Some(segment_end.min(entry.switch_lsn));
            }
        }
        match next {
            Some(next) => at = next,
            None => return at,
        }
    }
}

/// Returns whether a record is the one at which recovery stops, and whether before it.
fn decides(target: &RecoveryTarget, what: &What) -> Option<bool> {
    let inclusive = target.stop == StopSide::Inclusive;
    match (&target.kind, what) {
        (TargetKind::Time { time: wanted, .. }, What::End { micros, .. }) => {
            let at = time(*micros);
            (at > *wanted || (!inclusive && at == *wanted)).then_some(true)
        }
        (TargetKind::Xid(wanted), What::End { xid, .. }) => (wanted == xid).then_some(!inclusive),
        (TargetKind::Name(wanted), What::RestorePoint(name)) => (wanted == name).then_some(false),
        _ => None,
    }
}

/// Replays from a backup, record by record; returns the last commit in, and whether it gets to the target.
fn replay(
    backup: &BackupRecord,
    end: Lsn,
    records: &[Written],
    target: &RecoveryTarget,
) -> Option<Option<Lsn>> {
    let mut replayed = backup.start_lsn;
    let mut last = None;
    for record in records.iter().filter(|record| record.lsn >= backup.start_lsn) {
        if record.end > end {
            return None;
        }
        let decided = decides(target, &record.what);
        if decided == Some(true) {
            return (replayed >= backup.stop_lsn).then_some(last);
        }
        replayed = record.end;
        if matches!(record.what, What::End { committed: true, .. }) {
            last = Some(record.lsn);
        }
        if decided == Some(false) {
            return (replayed >= backup.stop_lsn).then_some(last);
        }
    }
    None
}

/// Returns which backup leads to the target, and to which last commit, by the plain records; `None` where a
/// backup was begun so late that what lies before it decides.
fn expected(
    world: &World,
    catalog: &Catalog,
    target: &RecoveryTarget,
) -> Option<Option<(String, Option<Lsn>)>> {
    let timeline = match target.timeline {
        TimelineChoice::Number(timeline) => timeline,
        TimelineChoice::Latest => *catalog.timelines().last()?,
    };
    let branch = world.branches.iter().find(|branch| branch.history.timeline == timeline)?;
    let history = &branch.history;
    let on_path = |backup: &&BackupRecord| {
        history.timeline_of(backup.start_lsn) == backup.timeline
            && history.timeline_of(Lsn(backup.stop_lsn.0 - 1)) == backup.timeline
    };
    let mut backups: Vec<_> = world.backups.iter().filter(on_path).collect();
    backups.sort_by_key(|backup| std::cmp::Reverse(backup.stop_lsn));
    for backup in backups {
        if let TargetKind::Time { time: wanted, .. } = &target.kind
            && backup.started + chrono::TimeDelta::seconds(2) > *wanted
        {
            return None;
        }
        let end = stored_end(catalog, history, backup.start_lsn);
        if let Some(last) = replay(backup, end, &branch.records, target) {
            return Some(Some((backup.id.clone(), last)));
        }
    }
    Some(None)
}

/// Spoils the index somehow.
async fn spoil(world: &mut World) {
    let index: Vec<String> = world.storage.keys().into_iter().filter(|key| key.contains("/index/")).collect();
    for text in &index {
        let key = ObjectKey::new(text.as_str()).unwrap();
        if !world.storage.keys().contains(text) {
            continue;
        }
        let mut bytes = world.storage_bytes(&key).await;
        let other = ObjectKey::new(index[world.rng().random_range(0..index.len())].as_str()).unwrap();
        match world.rng().random_range(0..12) {
            0 | 1 => world.storage.remove(&key),
            2 => {
                bytes.truncate(world.rng().random_range(0..bytes.len()));
                world.storage.overwrite(&key, bytes);
            }
            3 if !bytes.is_empty() => {
                let at = world.rng().random_range(0..bytes.len());
                bytes[at] ^= 1 << world.rng().random_range(0..8);
                world.storage.overwrite(&key, bytes);
            }
            4 => world.storage.overwrite(&other, bytes),
            5 => {
                // What a newer program would write.
                let mut json = zstd::decode_all(&*bytes).unwrap_or_default();
                let newer = String::from_utf8_lossy(&json).replacen("\"format\":1", "\"format\":2", 1);
                json = newer.into_bytes();
                let digest = walship::codec::Digest::of(&json).short();
                let named = text.rsplit_once('-').map(|(head, _)| format!("{head}-{digest}.json.zst"));
                if let Some(key) = named.and_then(|named| ObjectKey::new(named).ok()) {
                    world.storage.overwrite(&key, zstd::encode_all(&*json, 1).unwrap());
                }
            }
            _ => {}
        }
    }
}

async fn compare(seed: u64, world: &mut World, state: &str) -> (usize, usize, usize) {
    let listed = load_catalog_from_listings(&world.lineage).await.unwrap();
    let indexed = load_catalog(&world.lineage).await.unwrap();
    let (mut plans, mut refusals, mut modelled) = (0, 0, 0);
    for target in targets(world) {
        let without = answer(world, &listed, &target).await;
        let with = answer(world, &indexed, &target).await;
        assert_alike(&told(&with), &told(&without), &format!("seed {seed}, index {state}: {target:?}"));
        match &without {
            Ok(Ok(_)) => plans += 1,
            Ok(Err(_)) => refusals += 1,
            Err(_) => {}
        }
        if !matches!(target.kind, TargetKind::Time { .. } | TargetKind::Xid(_) | TargetKind::Name(_)) {
            continue;
        }
        let planned = match &without {
            Ok(Ok(plan)) => Some((plan.backup.id.clone(), plan.last_included.as_ref().map(|last| last.lsn))),
            Ok(Err(_)) => None,
            Err(error) => panic!("seed {seed}: {target:?}: {error}"),
        };
        if let Some(expected) = expected(world, &listed, &target) {
            assert_eq!(planned, expected, "seed {seed}: {target:?}\n{without:#?}");
            modelled += 1;
        }
    }
    (plans, refusals, modelled)
}

/// Checks that what is wrong with a segment that the index speaks of is seen with the index as without it.
async fn compare_flawed(seed: u64, world: &mut World, flawed: SegmentName, state: &str) {
    let listed = load_catalog_from_listings(&world.lineage).await.unwrap();
    let indexed = load_catalog(&world.lineage).await.unwrap();
    for target in targets(world) {
        let without = answer(world, &listed, &target).await;
        let with = answer(world, &indexed, &target).await;
        // What is said of the WAL behind the stop is not looked into, but for the next segment.
        let needed = |answer: &Result<Answer, String>| match answer {
            Ok(Ok(plan)) => {
                let behind = plan.gap_behind.as_ref().map(|gap| gap.first_missing);
                let last = plan.chain.last().map(|part| part.last);
                let next = behind.filter(|name| last.and_then(|last| last.next(SIZE)) == Some(*name));
                format!(
                    "{:#?}",
                    (&plan.backup, &plan.chain, &plan.stop, &plan.last_included, &plan.limits, next)
                )
            }
            _ => "no plan".to_owned(),
        };
        let about = format!("seed {seed}, {state}: {target:?}");
        match (&with, &without) {
            // The index may know what else had to be read, of WAL that recovery does not need.
            (Ok(Ok(plan)), Err(_)) => {
                let holds = |part: &ChainPart| (part.first..=part.last).contains(&flawed);
                assert!(!plan.chain.iter().any(holds), "{about}: {flawed} in {:?}", plan.chain);
            }
            _ => assert_alike(&needed(&with), &needed(&without), &about),
        }
    }
}

fn worlds() -> std::ops::Range<u64> {
    let asked = std::env::var("WALSHIP_TEST_WORLDS").ok();
    let range = asked.as_deref().and_then(|text| text.split_once('-'));
    range.map_or(WORLDS, |(from, to)| from.parse().unwrap()..to.parse().unwrap())
}

#[tokio::test]
async fn the_index_never_changes_an_answer() {
    let (mut plans, mut refusals, mut modelled) = (0, 0, 0);
    let mut count = |(more_plans, more_refusals, more_modelled)| {
        plans += more_plans;
        refusals += more_refusals;
        modelled += more_modelled;
    };
    for seed in worlds() {
        let mut world = World::new(seed).await;
        count(compare(seed, &mut world, "as archivers left it").await);
        spoil(&mut world).await;
        count(compare(seed, &mut world, "spoiled").await);
        world.index(Task::Complete).await;
        count(compare(seed, &mut world, "completed").await);
        world.index(Task::Rebuild).await;
        count(compare(seed, &mut world, "rebuilt").await);
        // Now the segments.
        let (flawed, key) = world.any_segment();
        let bytes = world.storage_bytes(&key).await;
        world.storage.remove(&key);
        compare_flawed(seed, &mut world, flawed, "a segment vanished").await;
        world.storage.overwrite(&key, bytes[..bytes.len() - 1].to_vec());
        compare_flawed(seed, &mut world, flawed, "a segment was cut").await;
        let longer = [&*bytes, b"x"].concat();
        world.storage.overwrite(&key, longer);
        compare_flawed(seed, &mut world, flawed, "a segment grew").await;
    }
    let worlds = worlds().count();
    let enough = plans > 10 * worlds && refusals > 2 * worlds && modelled > 5 * worlds;
    assert!(enough, "{plans} plans, {refusals} refusals, {modelled} compared with the records");
}
