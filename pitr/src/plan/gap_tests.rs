//! Chains, gaps and windows of random archives, compared with a model that looks at every position.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use walship::catalog::{BackupRecord, Catalog, GapCause, GapKind, GapRecord};
use walship::pg::{HistoryEntry, Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};
use walship::wal::event::{EventKind, ServerLimits, WalEvent};
use walship::watch::{left_holes, reach};

use super::chain::{ChainEnding, build_chain, chains_of, gaps_of};
use super::gap::{Gap, KnownBy, is_on_path};
use super::tests::{World, at, limits, tli};
use super::{Break, WAL_LEVEL_MINIMAL, WindowEnd, windows};

const SIZE: SegmentSize = SegmentSize::MIN;

/// Positions are counted in eighths of a segment.
const UNITS: u64 = 8;

/// Segments 1 to 9.
const SEGMENTS: std::ops::Range<u64> = 1..10;

fn lsn(unit: u64) -> Lsn {
    Lsn(unit * (SIZE.bytes() / UNITS))
}

/// What an archive is made of.
#[derive(Debug, Clone)]
struct Script {
    /// The parent and the switch point of timelines 2, 3, ...: by choice among what is possible.
    forks: Vec<(prop::sample::Index, prop::sample::Index)>,
    /// Segments that are stored: timeline and number.
    stored: BTreeSet<(u32, u64)>,
    lost_histories: BTreeSet<u32>,
    gaps: Vec<(u32, u64, u64)>,
    backups: Vec<(u32, u64, u64)>,
    /// Segments of which a file is kept that is not whole.
    pieces: Vec<(u32, u64)>,
    /// Segments that the index knew last.
    indexed: Vec<(u32, u64)>,
}

fn scripts() -> impl Strategy<Value = Script> {
    let units = SEGMENTS.start * UNITS..SEGMENTS.end * UNITS;
    let span = (1_u32..5, units.clone(), 1_u64..20);
    let several = (1_u32..5, SEGMENTS, 1_u64..8);
    (
        prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..4),
        prop::collection::vec(several, 0..12),
        prop::collection::vec((1_u32..5, SEGMENTS), 0..6),
        prop::collection::btree_set(2_u32..5, 0..2),
        prop::collection::vec(span.clone(), 0..3),
        prop::collection::vec(span, 0..4),
        prop::collection::vec((1_u32..5, SEGMENTS), 0..2),
        prop::collection::vec((1_u32..5, SEGMENTS), 0..2),
    )
        .prop_map(|(forks, runs, missing, lost_histories, gaps, backups, indexed, pieces)| {
            let mut stored = BTreeSet::new();
            for (timeline, first, many) in runs {
                stored.extend((first..first + many).filter(|n| SEGMENTS.contains(n)).map(|n| (timeline, n)));
            }
            stored.retain(|one| !missing.contains(one));
            Script { forks, stored, lost_histories, gaps, backups, pieces, indexed }
        })
}

/// The archive, and the truth about its timelines (also of those whose history file is lost).
struct Scene {
    catalog: Catalog,
    histories: BTreeMap<TimelineId, TimelineHistory>,
}

fn build(script: &Script) -> Scene {
    let mut histories = BTreeMap::from([(tli(1), TimelineHistory::root(tli(1)))]);
    for (number, (parent, switch)) in (2..).zip(&script.forks) {
        let parent = *parent.get(&histories.keys().copied().collect::<Vec<_>>());
        let mut ancestors = histories[&parent].ancestors.clone();
        // Not before the parent begins; right there is possible.
        let first = ancestors.last().map_or(SEGMENTS.start * UNITS, |entry| entry.switch_lsn.0 / lsn(1).0);
        let switch = first + switch.index((SEGMENTS.end * UNITS - first) as usize) as u64;
        ancestors.push(HistoryEntry { timeline: parent, switch_lsn: lsn(switch), reason: "test".into() });
        histories.insert(tli(number), TimelineHistory { timeline: tli(number), ancestors });
    }
    let mut catalog = World::new().catalog;
    for (timeline, history) in &histories {
        if *timeline != tli(1) && !script.lost_histories.contains(&timeline.get()) {
            catalog.histories.insert(*timeline, history.clone());
        }
    }
    for (timeline, number) in &script.stored {
        catalog.segments.insert(SegmentName::from_number(tli(*timeline), *number, SIZE).unwrap(), 1);
    }
    for (at_, (timeline, start, units)) in script.gaps.iter().enumerate() {
        let record = GapRecord {
            format: 1,
            id: format!("gap {at_}"),
            timeline: tli(*timeline),
            start_lsn: lsn(*start),
            end_lsn: lsn(start + units),
            cause: GapCause { kind: GapKind::GivenUp, text: "test".into() },
            segment_digest: None,
            recorded: at(0),
            host: String::new(),
            user: String::new(),
        };
        // The catalog holds open ones.
        if !record.is_covered_by(&catalog.segments, SIZE) {
            catalog.gaps.push(record);
        }
    }
    for (at_, (timeline, start, units)) in script.backups.iter().enumerate() {
        let mut world = World::new();
        world.backup_record(&format!("b{at_}"), tli(*timeline), lsn(*start), lsn(start + units));
        catalog.backups.append(&mut world.catalog.backups);
    }
    for (timeline, number) in &script.indexed {
        let last = SegmentName::from_number(tli(*timeline), *number, SIZE).unwrap();
        if catalog.segments.first_from(last).is_none() {
            catalog.lost_ends.insert(tli(*timeline), last);
        }
    }
    for (at_, (timeline, number)) in script.pieces.iter().enumerate() {
        let name = SegmentName::from_number(tli(*timeline), *number, SIZE).unwrap();
        let kept = if at_ % 2 == 0 { &mut catalog.partials } else { &mut catalog.incomplete };
        kept.push(name);
    }
    catalog.backups.sort_by_key(|backup| (backup.start_lsn, backup.id.clone()));
    Scene { catalog, histories }
}

/// The way to one timeline, position by position.
struct Model<'a> {
    catalog: &'a Catalog,
    history: &'a TimelineHistory,
}

impl Model<'_> {
    /// Each timeline on the way: from where up to where the way is its.
    fn parts(history: &TimelineHistory) -> Vec<(TimelineId, u64, u64)> {
        let unit = |lsn: Lsn| lsn.0 / (SIZE.bytes() / UNITS);
        let mut begin = 0;
        let mut parts = Vec::new();
        for entry in &history.ancestors {
            parts.push((entry.timeline, begin, unit(entry.switch_lsn)));
            begin = unit(entry.switch_lsn);
        }
        parts.push((history.timeline, begin, u64::MAX));
        parts
    }

    /// Whether the WAL of this way is stored at a position: a segment of any timeline on the way holds the
    /// way's bytes from its start to where the way leaves that timeline, unless the timeline begins later.
    fn is_stored(&self, unit: u64) -> bool {
        Self::parts(self.history).iter().any(|(timeline, begin, left)| {
            let number = unit / UNITS;
            let name = SegmentName::from_number(*timeline, number, SIZE).unwrap();
            *begin < (number + 1) * UNITS && unit < *left && self.catalog.segments.contains(name)
        })
    }

    /// The position behind the last one of an unbroken run from `start`.
    fn end(&self, start: u64) -> u64 {
        (start..).find(|unit| !self.is_stored(*unit)).unwrap()
    }

    fn is_owned(&self, timeline: TimelineId, unit: u64) -> bool {
        Self::parts(self.history)
            .iter()
            .any(|(own, begin, left)| *own == timeline && (*begin..*left).contains(&unit))
    }

    /// The ids of the gaps of the ledger that lie on this way from `from` to before `to`, and the last such
    /// position, plus one.
    fn ledger(&self, from: u64, to: u64) -> (BTreeSet<&str>, Option<u64>) {
        let mut ids = BTreeSet::new();
        let mut last = None;
        for gap in &self.catalog.gaps {
            for unit in from..to {
                if gap.start_lsn <= lsn(unit) && lsn(unit) < gap.end_lsn && self.is_owned(gap.timeline, unit)
                {
                    ids.insert(&*gap.id);
                    last = last.max(Some(unit + 1));
                }
            }
        }
        (ids, last)
    }

    fn is_on_path(&self, backup: &BackupRecord) -> bool {
        let unit = |lsn: Lsn| lsn.0 / (SIZE.bytes() / UNITS);
        (unit(backup.start_lsn)..unit(backup.stop_lsn)).all(|at| self.is_owned(backup.timeline, at))
    }

    /// Up to where something else says that there was WAL of this way behind `end`.
    fn proven(&self, end: u64) -> Option<u64> {
        let all = end..(SEGMENTS.end + 4) * UNITS;
        let backups = self.catalog.backups.iter().filter(|backup| self.is_on_path(backup));
        let of_backups =
            backups.map(|backup| backup.stop_lsn.0 / (SIZE.bytes() / UNITS)).filter(|stop| *stop > end);
        let of_forks = self.catalog.histories.values().filter_map(|other| {
            let parts = Self::parts(other);
            let shared = |unit: &u64| {
                parts[..parts.len() - 1].iter().any(|(timeline, begin, left)| {
                    let same = |part: &(TimelineId, u64, u64)| part.0 == *timeline && part.1 == *begin;
                    (*begin..*left).contains(unit)
                        && Self::parts(self.history)
                            .iter()
                            .any(|part| same(part) && (part.1..part.2).contains(unit))
                })
            };
            let last = all.clone().filter(shared).max()? + 1;
            (last / UNITS > end / UNITS).then_some(last)
        });
        let of_index = self.catalog.lost_ends.iter().filter_map(|(timeline, last)| {
            let told = |unit: &u64| {
                let parts = Self::parts(self.history);
                let left = parts.iter().find(|(own, ..)| own == timeline).map(|(.., left)| *left);
                lsn(*unit) < last.end(SIZE) && left.is_some_and(|left| *unit < left)
            };
            all.clone().filter(told).max().map(|unit| unit + 1)
        });
        let of_pieces = self.catalog.partials.iter().chain(&self.catalog.incomplete).filter_map(|name| {
            let start = name.start(SIZE).0 / (SIZE.bytes() / UNITS);
            let own = Self::parts(self.history).into_iter().find(|(timeline, ..)| *timeline == name.timeline);
            let (_, begin, left) = own?;
            // A byte of the way lies in the file, and so there was all before it.
            (start..start + UNITS)
                .any(|unit| begin <= unit && start < left && unit < left.max(begin + 1))
                .then_some(start)
        });
        let of_pieces = of_pieces.filter(|start| *start > end);
        of_backups.chain(of_forks).chain(of_index).chain(of_pieces).max()
    }

    /// The gap behind `end`: up to where, and which of the ledger's it is.
    fn gap(&self, end: u64) -> Option<(u64, BTreeSet<&str>)> {
        let space = (SEGMENTS.end + 4) * UNITS;
        let resumes = (end..space).find(|unit| self.is_stored(*unit));
        let to = resumes.or_else(|| self.ledger(end, space).1.max(self.proven(end)))?;
        Some((to, self.ledger(end, to).0))
    }
}

fn told(gap: &Gap) -> (u64, u64, BTreeSet<&str>) {
    let unit = |lsn: Lsn| lsn.0 / (SIZE.bytes() / UNITS);
    assert_eq!((lsn(unit(gap.from)), lsn(unit(gap.to))), (gap.from, gap.to));
    (unit(gap.from), unit(gap.to), gap.ledger.iter().map(|record| &*record.id).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn chains_and_gaps_are_those_of_the_positions(script in scripts(), start in 0_u64..80) {
        let scene = build(&script);
        let start = SEGMENTS.start * UNITS + start % ((SEGMENTS.end - SEGMENTS.start) * UNITS);
        for history in scene.histories.values() {
            let model = Model { catalog: &scene.catalog, history };
            let chain = build_chain(&scene.catalog, history, lsn(start));
            let end = model.end(start);
            prop_assert_eq!(chain.end(), lsn(end), "timeline {}", history.timeline);
            // Each step begins where the one before ends and is stored.
            let mut next = lsn(start);
            for step in chain.steps_from(0) {
                prop_assert_eq!(step.from, next);
                prop_assert!(step.to > step.from && scene.catalog.segments.contains(step.segment));
                prop_assert!(history.contains(step.segment.timeline));
                next = step.to;
            }
            match (&chain.ending, model.gap(end)) {
                (ChainEnding::EndOfArchive, None) => {}
                (ChainEnding::Gap(gap), Some((to, ledger))) => {
                    prop_assert_eq!(told(gap), (end, to, ledger), "timeline {}", history.timeline);
                    prop_assert!(gap.first_missing.number(SIZE) <= gap.last_missing.number(SIZE));
                    prop_assert_eq!(gap.known_by == KnownBy::LaterWal, model.is_stored(to));
                }
                (ending, expected) => prop_assert!(false, "{:?}, expected {:?}", ending, expected),
            }
        }
    }

    #[test]
    fn all_gaps_of_a_way_are_found_in_turn(script in scripts()) {
        let scene = build(&script);
        for history in scene.histories.values() {
            let model = Model { catalog: &scene.catalog, history };
            let space = 0..(SEGMENTS.end + 4) * UNITS;
            let mut expected = Vec::new();
            let mut at = space.clone().find(|unit| model.is_stored(*unit));
            while let Some(start) = at {
                let end = model.end(start);
                let gap = model.gap(end);
                at = gap.as_ref().map(|(to, _)| *to).filter(|to| model.is_stored(*to));
                expected.extend(gap.map(|(to, ledger)| (end, to, ledger)));
            }
            let gaps = gaps_of(&scene.catalog, history);
            prop_assert_eq!(gaps.iter().map(told).collect::<Vec<_>>(), expected, "timeline {}", history.timeline);
            // What is in no gap and between the first and the last chain is in a chain.
            let chains = chains_of(&scene.catalog, history);
            for unit in space.filter(|unit| model.is_stored(*unit)) {
                let inside = chains.iter().any(|chain| chain.start <= lsn(unit) && lsn(unit) < chain.end());
                prop_assert!(inside, "timeline {}: {}", history.timeline, lsn(unit));
            }
        }
    }

    #[test]
    fn windows_hold_what_backups_lead_to_and_nothing_else(script in scripts()) {
        let scene = build(&script);
        for (timeline, history) in &scene.histories {
            let model = Model { catalog: &scene.catalog, history };
            let found = windows(&scene.catalog, *timeline, &[]);
            if scene.catalog.history(*timeline).is_none() {
                prop_assert!(found.is_empty());
                continue;
            }
            let begin = Model::parts(history).last().unwrap().1;
            let unit = |lsn: Lsn| lsn.0 / (SIZE.bytes() / UNITS);
            let mut led_to = BTreeSet::new();
            for backup in scene.catalog.backups.iter().filter(|backup| model.is_on_path(backup)) {
                let end = model.end(unit(backup.start_lsn));
                if lsn(end) >= backup.stop_lsn && end > begin {
                    led_to.extend(unit(backup.stop_lsn)..=end);
                }
            }
            let in_windows: BTreeSet<u64> =
                found.iter().flat_map(|window| unit(window.from_lsn)..=unit(window.until_lsn)).collect();
            prop_assert_eq!(in_windows, led_to, "timeline {}", timeline);
            for window in &found {
                let gap = model.gap(unit(window.until_lsn)).map(|(to, _)| lsn(to));
                prop_assert_eq!(window.gap.as_ref().map(|gap| gap.to), gap);
            }
        }
    }

    /// It does so each minute, and below the planner.
    #[test]
    fn watching_finds_the_last_window_and_every_hole_by_itself(
        script in scripts(),
        breaks in prop::collection::vec((1_u32..5, SEGMENTS.start * UNITS..SEGMENTS.end * UNITS, any::<bool>()), 0..3),
    ) {
        let scene = build(&script);
        let mut events: BTreeMap<TimelineId, Vec<WalEvent>> = BTreeMap::new();
        let breaks: Vec<Break> = breaks.into_iter().map(|(timeline, unit, is_reset)| {
            let (timeline, lsn) = (tli(timeline), lsn(unit));
            let minimal = ServerLimits { wal_level: WAL_LEVEL_MINIMAL, ..limits(1) };
            let (kind, ends_by) = match is_reset {
                true => (EventKind::WalBegins { time: at(0) }, WindowEnd::WalReset),
                false => (EventKind::ParameterChange { settings: minimal }, WindowEnd::WalLevelMinimal),
            };
            events.entry(timeline).or_default().push(WalEvent { lsn, end_lsn: lsn, xid: 0, kind });
            Break { timeline, lsn, ends_by }
        }).collect();
        for (timeline, history) in &scene.histories {
            let found = windows(&scene.catalog, *timeline, &breaks);
            let watched = reach(&scene.catalog, *timeline, &events);
            let begin = lsn(Model::parts(history).last().unwrap().1);
            // One that ends before the timeline begins is the ancestor's to the planner; here it is the end of the way.
            let window = watched.as_ref().and_then(|watched| watched.window);
            let window = window.map(|window| (window.from_lsn, window.until_lsn)).filter(|(_, until)| *until > begin);
            let last = found.last().map(|window| (window.from_lsn, window.until_lsn));
            prop_assert_eq!(window, last, "timeline {}", timeline);
            let Some(watched) = watched else { continue };
            prop_assert!(window.is_none_or(|(_, until)| until == watched.until));
            let until = watched.window.map_or(0, |window| window.until_lsn.0 / lsn(1).0);
            let model = Model { catalog: &scene.catalog, history };
            let (behind, _) = model.ledger(until, (SEGMENTS.end + 4) * UNITS);
            prop_assert_eq!(watched.bare_gaps, behind.len() as u64, "nothing behind it can be restored");
            let oldest = scene.catalog.backups.iter().filter(|backup| is_on_path(history, backup));
            let oldest = oldest.map(|backup| backup.start_lsn).min();
            for gap in gaps_of(&scene.catalog, history).iter().filter(|gap| gap.known_by == KnownBy::LaterWal) {
                let is_hole = watched.holes.iter().any(|hole| hole.from == gap.from);
                let counts = oldest.is_some_and(|oldest| oldest < gap.to);
                prop_assert!(counts || !is_hole);
                prop_assert!(is_hole || !counts || !gap.ledger.is_empty(), "{:?}", gap);
            }
        }
    }

    /// What it cannot tell by the way to the server's timeline.
    #[test]
    fn watching_finds_every_hole_of_the_timelines_that_were_left(script in scripts()) {
        let scene = build(&script);
        let read = |timeline: &TimelineId| scene.catalog.history(*timeline).is_some();
        for main in scene.histories.values().filter(|main| read(&main.timeline)) {
            let holes = left_holes(&scene.catalog, main);
            let mut all = 0;
            for other in scene.histories.values().filter(|other| read(&other.timeline)) {
                let begin = lsn(Model::parts(other).last().unwrap().1);
                let is_told = |gap: &Gap| main.contains(other.timeline)
                    && main.switch_lsn_of(other.timeline).is_none_or(|left| gap.from < left);
                let oldest = scene.catalog.backups.iter().filter(|backup| is_on_path(other, backup));
                let oldest = oldest.map(|backup| backup.start_lsn).min();
                for gap in gaps_of(&scene.catalog, other) {
                    let is_own = gap.known_by == KnownBy::LaterWal && gap.to > begin && !is_told(&gap);
                    let counts = is_own && scene.catalog.has_wal_of(other.timeline)
                        && oldest.is_some_and(|oldest| oldest < gap.to);
                    let is_hole = holes.iter().any(|(on, hole)| (*on, hole.from) == (other.timeline, gap.from));
                    prop_assert!(counts || !is_hole, "{:?}", gap);
                    prop_assert!(is_hole || !counts || !gap.ledger.is_empty(), "{:?}", gap);
                    all += usize::from(is_hole);
                }
            }
            prop_assert_eq!(all, holes.len(), "each is one of the planner's");
        }
    }
}
