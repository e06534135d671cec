//! Made-up histories and policies: what retention does with them is compared with what the planner makes of it, and with a
//! model that goes by docs/retention.md alone, backup by backup and segment by segment.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use walship::catalog::{HeldWal, Hold, ParentBackup};
use walship::config::RetentionSettings;
use walship::pg::{Lsn, SegmentName, TimelineId};

use super::tests::{DAY, HOUR, add_backup, begun, carried_out, hold_on, kept, planned, reaches, seen, time};
use super::*;
use crate::plan::chains_of;
use crate::plan::tests::{SIZE, World, at, commit, tli};
use crate::target::{RecoveryTarget, TargetKind, TimelineChoice};

/// How long a step may take: what stays hourly is seen in minutes, what stays yearly in years.
const STEPS: [i64; 4] = [HOUR / 3, DAY / 4, 3 * DAY, 50 * DAY];

/// A history to be made up.
#[derive(Debug, Clone)]
struct Script {
    /// How long each step takes, of [`STEPS`].
    pace: usize,
    /// What happens in each: kind, and how much WAL.
    steps: Vec<(u8, u32)>,
    /// Whether servers fork.
    forks: bool,
    /// Segments that are lost, counted from the first.
    lost: Vec<u8>,
    /// Holds: on which backup, for how many days more (some are over), and with how many segments of WAL, where with any.
    holds: Vec<(u8, i64, Option<u8>)>,
    /// Whether a backup is under way at the end, and the steps since it began.
    under_way: Option<u8>,
}

fn scripts(lost: usize) -> impl Strategy<Value = Script> {
    let steps = proptest::collection::vec((0u8..24, 1000u32..1_500_000), 20..90);
    let holds = proptest::collection::vec((any::<u8>(), -3i64..9, proptest::option::of(0u8..5)), 0..3);
    let lost = proptest::collection::vec(any::<u8>(), 0..=lost);
    let under_way = proptest::option::weighted(0.3, 0u8..6);
    (0..STEPS.len(), steps, any::<bool>(), lost, holds, under_way).prop_map(
        |(pace, steps, forks, lost, holds, under_way)| Script { pace, steps, forks, lost, holds, under_way },
    )
}

fn settings() -> impl Strategy<Value = RetentionSettings> {
    let small = || proptest::option::of(0u32..4);
    let window = proptest::option::weighted(0.8, 1u32..200);
    let spans = (small(), small(), small(), small(), small());
    (window, small(), proptest::option::of(1u32..400), spans).prop_map(
        |(window, keep_last, keep_for, (hourly, daily, weekly, monthly, yearly))| RetentionSettings {
            window: window.map(|hours| format!("{} hours", hours * hours / 20 + 1).parse().unwrap()),
            keep_last,
            keep_for: keep_for.map(|days| {
                let hours = (days * 24).max(window.map_or(0, |hours| hours * hours / 20 + 1));
                format!("{hours} hours").parse().unwrap()
            }),
            keep_hourly: hourly,
            keep_daily: daily,
            keep_weekly: weekly,
            keep_monthly: monthly,
            keep_yearly: yearly,
        },
    )
}

/// A backup as the model knows it.
#[derive(Debug, Clone)]
struct Taken {
    id: String,
    parent: Option<String>,
    timeline: TimelineId,
    start: Lsn,
    stop: Lsn,
    finished: i64,
}

/// A commit: where its record begins and ends, and when it was.
#[derive(Debug, Clone, Copy)]
struct Committed {
    timeline: TimelineId,
    lsn: Lsn,
    end: Lsn,
    micros: i64,
}

/// What happened, as the model knows it, and the world that it made.
struct Made {
    world: World,
    seen: Seen,
    end: i64,
    taken: Vec<Taken>,
    commits: Vec<Committed>,
    /// Where each timeline but the first left which one.
    forks: BTreeMap<TimelineId, (TimelineId, Lsn)>,
    /// Where a backup that is under way began, and when.
    under_way: Option<(Lsn, i64)>,
}

/// Builds the history.
fn build(script: &Script) -> Made {
    let mut world = World::new();
    let (mut timeline, mut newest, mut micros) = (tli(1), 1, DAY);
    let (mut taken, mut commits, mut forks) = (Vec::<Taken>::new(), Vec::new(), BTreeMap::new());
    let begins = script.under_way.map(|before| script.steps.len().saturating_sub(usize::from(before) + 1));
    let (mut under_way, mut recordless) = (None, Vec::new());
    for (number, (kind, bytes)) in script.steps.iter().enumerate() {
        micros += STEPS[script.pace];
        match kind {
            0..=6 => {
                let id = format!("b{number:02}");
                let start = world.end(timeline);
                add_backup(&mut world, timeline, micros, &id);
                let last = taken.iter().rev().find(|one| one.timeline == timeline);
                let parent = last.filter(|_| *kind > 3).cloned();
                if let Some(below) = &parent {
                    let backups = &mut world.catalog.backups;
                    let depth = backups.iter().find(|one| one.id == below.id).unwrap().parent.as_ref();
                    let depth = depth.map_or(1, |parent| parent.depth + 1);
                    let own = backups.iter_mut().find(|one| one.id == id).unwrap();
                    own.parent = Some(ParentBackup {
                        id: below.id.clone(),
                        timeline: below.timeline,
                        start_lsn: below.start,
                        depth,
                    });
                }
                let (parent, stop) = (parent.map(|one| one.id), world.end(timeline));
                taken.push(Taken { id, parent, timeline, start, stop, finished: micros });
            }
            7 if script.forks => {
                newest += 1;
                forks.insert(tli(newest), (timeline, world.fork(timeline, tli(newest))));
                timeline = tli(newest);
            }
            // Somebody goes on with an older timeline.
            8 if newest > 1 => timeline = tli(1 + u32::from(*bytes as u16) % newest),
            _ => {}
        }
        if begins == Some(number) {
            let start_lsn = world.end(timeline);
            under_way = Some((start_lsn, micros));
            let start = BegunAt { timeline, start_lsn, started: at(micros) };
            recordless.push(begun("x", Some(start), None));
        }
        let mut push = |world: &mut World, xid: usize, later: i64| {
            let micros = micros + later;
            let lsn = world.push(timeline, 64, commit(xid as u32, micros));
            let end = world.records[&timeline].last().unwrap().end;
            commits.push(Committed { timeline, lsn, end, micros });
        };
        let (first, second) = (STEPS[script.pace] / 6, STEPS[script.pace] / 3);
        push(&mut world, 100 + number, first);
        world.push(timeline, u64::from(*bytes), None);
        push(&mut world, 1100 + number, second);
    }
    for timeline in world.records.keys().copied().collect::<Vec<_>>() {
        world.push(timeline, SIZE.bytes() + 100, None);
        world.archive(timeline);
    }
    let names: Vec<SegmentName> = world.catalog.segments.names().collect();
    for lost in &script.lost {
        world.catalog.segments.remove(&names[usize::from(*lost) % names.len()]);
    }
    let end = micros + STEPS[script.pace] / 2;
    let hold = |(which, days, wal): &(u8, i64, Option<u8>)| {
        let on = taken.get(usize::from(*which) % taken.len().max(1))?;
        let wal = wal.map(|segments| HeldWal {
            timeline: on.timeline,
            start_lsn: Some(on.start),
            through_lsn: Some(Lsn(on.stop.0 + u64::from(segments) * SIZE.bytes())),
        });
        Some(Hold { until: Some(at(end + days * DAY)), ..hold_on(&on.id, wal) })
    };
    let holds = script.holds.iter().filter_map(hold).collect();
    let seen = Seen { holds, recordless, ..seen(&world) };
    Made { world, seen, end, taken, commits, forks, under_way }
}

impl Made {
    /// The timelines that lead to one, itself first, each with where it is left on that way.
    fn path(&self, timeline: TimelineId) -> Vec<(TimelineId, Lsn)> {
        let mut path = vec![(timeline, Lsn(u64::MAX))];
        let mut left_at = Lsn(u64::MAX);
        while let Some((parent, lsn)) = self.forks.get(&path.last().unwrap().0) {
            left_at = left_at.min(*lsn);
            path.push((*parent, left_at));
        }
        path
    }

    /// Whether something of a timeline lies on the way to another.
    fn lies_on(&self, path: &[(TimelineId, Lsn)], timeline: TimelineId, end: Lsn) -> bool {
        path.iter().any(|(on, left_at)| *on == timeline && end <= *left_at)
    }

    /// Whether a restore to just behind a commit can be made of what is stored: some complete backup, all that it builds on,
    /// and each segment from there on, of the youngest timeline that has begun in it.
    fn is_reached(&self, stored: &World, timeline: TimelineId, commit: &Committed) -> bool {
        let path = self.path(timeline);
        let is_stored = |number: u64| {
            let begun = |on: &TimelineId| {
                self.forks.get(on).is_none_or(|(_, begin)| begin.0 / SIZE.bytes() <= number)
            };
            let on = path.iter().map(|(on, _)| *on).find(begun);
            on.and_then(|on| SegmentName::from_number(on, number, SIZE))
                .is_some_and(|name| stored.catalog.segments.contains(name))
        };
        let is_there = |id: &str| stored.catalog.backups.iter().any(|backup| backup.id == id);
        self.taken.iter().any(|backup| {
            backup.stop <= commit.lsn
                && self.lies_on(&path, backup.timeline, backup.stop)
                && self.chain_of(&backup.id).iter().all(|id| is_there(id))
                && (backup.start.0 / SIZE.bytes()..commit.end.0.div_ceil(SIZE.bytes())).all(is_stored)
        })
    }

    /// A backup and all that it builds on.
    fn chain_of(&self, id: &str) -> Vec<String> {
        let mut chain = vec![id.to_owned()];
        while let Some(parent) =
            self.taken.iter().find(|one| one.id == chain[chain.len() - 1]).and_then(|one| one.parent.clone())
        {
            chain.push(parent);
        }
        chain
    }

    /// The backups that the rules keep that go by backups alone: number, age, rotation, holds, and what those build on.
    fn ruled(&self, settings: &RetentionSettings, now: i64) -> BTreeSet<String> {
        let mut newest_first: Vec<&Taken> = self.taken.iter().filter(|one| one.parent.is_none()).collect();
        newest_first.sort_by_key(|one| std::cmp::Reverse(one.finished));
        let mut stays = BTreeSet::new();
        let mut with_children: Vec<&str> = Vec::new();
        let last = settings.keep_last.unwrap_or(0) as usize;
        with_children.extend(newest_first.iter().take(last).map(|one| &*one.id));
        if let Some(age) = settings.keep_for {
            let age = age.length().num_microseconds().unwrap();
            with_children
                .extend(newest_first.iter().filter(|one| now - one.finished <= age).map(|one| &*one.id));
        }
        for one in &self.taken {
            let chain = self.chain_of(&one.id);
            if with_children.iter().any(|root| chain.iter().any(|id| id == root)) {
                stays.extend(chain);
            }
        }
        // A span is what a calendar prints.
        for (count, form) in [
            (settings.keep_hourly, "%Y-%m-%d %H"),
            (settings.keep_daily, "%Y-%m-%d"),
            (settings.keep_weekly, "%G week %V"),
            (settings.keep_monthly, "%Y-%m"),
            (settings.keep_yearly, "%Y"),
        ] {
            let mut spans: Vec<String> = Vec::new();
            for one in &newest_first {
                let span = at(one.finished).format(form).to_string();
                if !spans.contains(&span) {
                    spans.push(span);
                    if spans.len() <= count.unwrap_or(0) as usize {
                        stays.insert(one.id.clone());
                    }
                }
            }
        }
        for hold in self.seen.holds.iter().filter(|hold| hold.until.is_none_or(|until| at(now) < until)) {
            stays.extend(self.chain_of(&hold.backup));
        }
        stays
    }
}

/// What the model says of a history without forks and losses: what stays, and where it is free to let more stay.
struct Model {
    backups: BTreeSet<String>,
    /// Backups that may stay for one that is under way, which may have taken over what they had stored.
    backups_free: BTreeSet<String>,
    /// The numbers of the segments.
    segments: BTreeSet<u64>,
    /// Beside them one more behind each stretch: that a backup is consistent is noticed at the next record.
    segments_free: BTreeSet<u64>,
}

impl Model {
    fn of(made: &Made, settings: &RetentionSettings, now: i64) -> Self {
        let mut backups = made.ruled(settings, now);
        // In the order in which they were taken, which is that of the WAL.
        let window = settings.window.map(|window| now - window.length().num_microseconds().unwrap());
        backups.extend(made.taken.last().map(|newest| newest.id.clone()));
        let base = window.and_then(|from| made.taken.iter().rposition(|one| one.finished + HOUR <= from));
        if window.is_some() {
            backups.extend(made.taken[base.unwrap_or(0)..].iter().map(|one| one.id.clone()));
        }
        backups = backups.iter().flat_map(|id| made.chain_of(id)).collect();
        let of = |id: &String| made.taken.iter().find(|one| one.id == *id).unwrap();
        let number = |lsn: Lsn| lsn.0 / SIZE.bytes();
        let mut stretches: Vec<(u64, u64)> =
            backups.iter().map(|id| (number(of(id).start), of(id).stop.0.div_ceil(SIZE.bytes()))).collect();
        let all_from = match (window, base) {
            (Some(_), Some(base)) => made.taken[base].start,
            (Some(_), None) => Lsn(0),
            // From the oldest on that stays.
            (None, _) => backups.iter().map(|id| of(id).start).min().unwrap_or(Lsn(0)),
        };
        stretches.push((number(all_from), u64::MAX));
        stretches.extend(made.under_way.map(|(start, _)| (number(start), u64::MAX)));
        for hold in made.seen.holds.iter().filter(|hold| hold.until.is_none_or(|until| at(now) < until)) {
            let wal = hold.wal.map(|wal| (wal.start_lsn.unwrap(), wal.through_lsn.unwrap()));
            stretches.extend(wal.map(|(start, through)| (number(start), number(through) + 1)));
        }
        let stored: Vec<u64> = made.world.catalog.segments.names().map(|name| name.number(SIZE)).collect();
        let within = |more: u64| {
            let is_in = |number: &u64| {
                stretches.iter().any(|(from, until)| (*from..until.saturating_add(more)).contains(number))
            };
            stored.iter().copied().filter(is_in).collect()
        };
        let may_lend = |one: &&Taken| made.under_way.is_some_and(|(_, begun)| begun <= one.finished + DAY);
        let backups_free: BTreeSet<String> =
            made.taken.iter().filter(may_lend).flat_map(|one| made.chain_of(&one.id)).collect();
        Self { backups, backups_free, segments: within(0), segments_free: within(2) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever led to a plan before leads to the same one after: every kept backup, every moment of the window.
    #[test]
    fn what_is_kept_can_be_restored(script in scripts(1), settings in settings(), later in 0i64..3) {
        let Ok(policy) = Policy::of(&settings) else { return Ok(()) };
        let made = build(&script);
        let (world, end) = (&made.world, made.end);
        let now = at(end + later * DAY);
        let plan = planned(world, &made.seen, &policy, now);
        let after = carried_out(world, &plan);
        let removed: BTreeSet<&str> = plan.backups_removed.iter().map(|backup| &*backup.id).collect();
        let mut kept: BTreeSet<&str> = kept(&plan).into_iter().collect();
        prop_assert_eq!(kept.remove("x"), script.under_way.is_some(), "what is under way stays");
        prop_assert!(removed.is_disjoint(&kept));
        prop_assert_eq!(removed.len() + kept.len(), world.catalog.backups.len());

        // Every kept backup is consistent on its own way, and the newest of all is one of them.
        let usable = |world: &World, id: &str| {
            let backup = world.catalog.backups.iter().find(|backup| backup.id == id).unwrap();
            let on = TimelineChoice::Number(backup.stop_timeline);
            let immediate = RecoveryTarget { timeline: on, ..RecoveryTarget::new(TargetKind::Immediate) };
            reaches(world, &immediate, Some(id))
        };
        for id in &kept {
            prop_assert_eq!(usable(world, id), usable(&after, id), "{}", id);
        }
        // Every moment of the window that could be reached on a timeline in use can still be.
        let from = policy.window_from(now);
        for timeline in world.catalog.timelines() {
            let last = made.seen.last_times.get(&timeline).copied();
            let on = TimelineChoice::Number(timeline);
            // Some commits and moments behind them; each of all commits has a property of its own below.
            let step = made.commits.len() / 6 + 1;
            for (at_, one) in made.commits.iter().step_by(step).enumerate() {
                let micros = one.micros + at_ as i64 % 2;
                if from.is_none_or(|from| at(micros) < from) || last.is_none_or(|last| last < from.unwrap_or(last)) {
                    continue;
                }
                let target = RecoveryTarget { timeline: on, ..time(micros) };
                let before = reaches(world, &target, None);
                prop_assert!(
                    before.is_none() || reaches(&after, &target, None) == before,
                    "{} on {}: {:?}, then {:?}; {:#?}", at(micros), timeline, before, reaches(&after, &target, None), plan
                );
            }
        }
        // So can the end of every timeline that nobody left, however old.
        for timeline in world.catalog.timelines() {
            let left = world.catalog.histories.values().any(|other| other.switch_lsn_of(timeline).is_some());
            let on = TimelineChoice::Number(timeline);
            let target = RecoveryTarget { timeline: on, ..RecoveryTarget::new(TargetKind::Latest) };
            let before = reaches(world, &target, None);
            prop_assert!(left || before.is_none() || reaches(&after, &target, None) == before, "{}", timeline);
        }
        // The end of what is in use stays in reach.
        let latest = RecoveryTarget::new(TargetKind::Latest);
        let before = reaches(world, &latest, None);
        prop_assert!(before.is_none() || reaches(&after, &latest, None) == before);

        // What was expired is told apart from what is lost.
        for timeline in after.catalog.timelines() {
            let history = after.catalog.history(timeline).unwrap();
            for chain in chains_of(&after.catalog, &history) {
                if let crate::plan::ChainEnding::Gap(gap) = chain.ending
                    && script.lost.is_empty()
                {
                    prop_assert!(gap.expired, "{}", gap);
                }
            }
        }
        // Carried out once, there is nothing more to do.
        let again = planned(&after, &made.seen, &policy, now);
        prop_assert!(again.is_empty(), "{:#?}", again);
    }

    /// Killed at any place, what is left plans as well: marks come first, then backups, then WAL from the oldest on.
    #[test]
    fn broken_off_anywhere_it_leaves_whole_chains(script in scripts(1), settings in settings(), cut in 0usize..40) {
        let Ok(policy) = Policy::of(&settings) else { return Ok(()) };
        let made = build(&script);
        let world = &made.world;
        let now = at(made.end);
        let plan = planned(world, &made.seen, &policy, now);
        // Of the backups some are gone, of the WAL nothing or, once it is in the ledger, all that counts.
        let mut partly = plan.clone();
        let backups = partly.backups_removed.len();
        partly.backups_removed.truncate(cut);
        if cut <= backups {
            partly.wal_removed.clear();
        } else {
            partly.wal_removed.truncate(cut - backups);
        }
        let left = carried_out(world, &partly);
        for backup in plan.backups_kept.iter().filter(|backup| backup.id != "x") {
            let immediate = RecoveryTarget::new(TargetKind::Immediate);
            prop_assert_eq!(reaches(world, &immediate, Some(&backup.id)), reaches(&left, &immediate, Some(&backup.id)));
        }
        let resumed = planned(&left, &made.seen, &policy, now);
        let (once, twice) = (carried_out(world, &plan), carried_out(&left, &resumed));
        prop_assert_eq!(once.catalog.backups, twice.catalog.backups);
        prop_assert_eq!(once.catalog.segments.names().collect::<Vec<_>>(), twice.catalog.segments.names().collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// What stays of a history without forks is what docs/retention.md says, no less and no more.
    #[test]
    fn what_stays_is_what_the_rules_say(script in scripts(0), settings in settings(), later in 0i64..3) {
        let Ok(policy) = Policy::of(&settings) else { return Ok(()) };
        let made = build(&Script { forks: false, ..script });
        let now = made.end + later * DAY;
        let plan = planned(&made.world, &made.seen, &policy, at(now));
        let model = Model::of(&made, &settings, now);
        let kept: BTreeSet<String> = kept(&plan).into_iter().filter(|id| *id != "x").map(str::to_owned).collect();
        let lacking: Vec<_> = model.backups.difference(&kept).collect();
        prop_assert!(lacking.is_empty(), "have to stay: {:?}: {:#?}", lacking, plan);
        let wrong: Vec<_> = kept.difference(&model.backups).filter(|id| !model.backups_free.contains(*id)).collect();
        prop_assert!(wrong.is_empty(), "have to go: {:?}: {:#?}", wrong, plan);
        let after = carried_out(&made.world, &plan);
        let stored: BTreeSet<u64> = after.catalog.segments.names().map(|name| name.number(SIZE)).collect();
        let lacking: Vec<_> = model.segments.difference(&stored).collect();
        prop_assert!(lacking.is_empty(), "have to stay: {:?}: {:#?}", lacking, plan);
        // For what stays only because of one that is under way, WAL may stay too.
        if kept == model.backups {
            let wrong: Vec<_> = stored.difference(&model.segments_free).collect();
            prop_assert!(wrong.is_empty(), "have to go: {:?}: {:#?}", wrong, plan);
        }
    }

    /// Whatever forks and is lost: what the rules name stays, and each commit of the window that was in reach is so still.
    #[test]
    fn each_commit_of_the_window_stays_in_reach(script in scripts(1), settings in settings(), later in 0i64..3) {
        let Ok(policy) = Policy::of(&settings) else { return Ok(()) };
        let made = build(&script);
        let now = made.end + later * DAY;
        let plan = planned(&made.world, &made.seen, &policy, at(now));
        let after = carried_out(&made.world, &plan);
        if script.lost.is_empty() {
            let kept: BTreeSet<&str> = kept(&plan).into_iter().collect();
            for id in made.ruled(&settings, now) {
                prop_assert!(kept.contains(&*id), "{} has to stay: {:#?}", id, plan);
            }
        }
        let from = settings.window.map(|window| now - window.length().num_microseconds().unwrap());
        for timeline in made.world.records.keys().copied() {
            let path = made.path(timeline);
            let on_it = |one: &&Committed| made.lies_on(&path, one.timeline, one.end);
            let last = made.commits.iter().filter(on_it).map(|one| one.micros).max();
            let Some(from) = from.filter(|from| last.is_some_and(|last| last >= *from)) else { continue };
            for commit in made.commits.iter().filter(on_it).filter(|one| one.micros >= from) {
                if made.is_reached(&made.world, timeline, commit) {
                    prop_assert!(
                        made.is_reached(&after, timeline, commit),
                        "{:?} on {}: {:#?}", commit, timeline, plan
                    );
                }
            }
        }
    }
}
