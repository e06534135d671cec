//! What is proven of a repository, put together from what verifications have recorded, and what was seen of it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{
    Catalog, KnownDamage, Proven, ProvenObjects, ProvenRun, ReadPlace, Seen, SeenRun, StoredSegments,
};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::rollup::Run;

use super::Unlisted;
use super::spans::Spans;

/// So many spans are recorded for each timeline and each backup.
const SPANS_MAX: usize = 4096;

/// What is proven of a repository, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenState {
    size: SegmentSize,
    /// Where it lies.
    repository: String,
    /// Segments by their numbers.
    wal: BTreeMap<TimelineId, Spans>,
    /// Parts of segments that are stored whole too.
    parts: BTreeMap<TimelineId, Spans>,
    /// Data objects by their places in the backup's record.
    backups: BTreeMap<String, Spans>,
    /// What lies beside the data objects.
    documents: BTreeMap<String, DateTime<Utc>>,
    /// What was damaged when it was last read: it counts as never proven.
    damage: BTreeMap<ReadPlace, KnownDamage>,
    /// What was seen, of all that verifications recorded.
    pub seen: SeenBefore,
    /// What is known to be missing.
    pub accepted: SeenBefore,
}

/// What earlier verifications saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenBefore {
    /// Whole segments.
    pub wal: StoredSegments,
    /// Up to where parts reached.
    pub tails: BTreeMap<TimelineId, Lsn>,
    /// Timelines with a history file.
    pub histories: BTreeSet<TimelineId>,
    /// Complete backups.
    pub backups: BTreeSet<String>,
}

impl SeenBefore {
    fn new(size: SegmentSize) -> Self {
        Self {
            wal: StoredSegments::new(size),
            tails: BTreeMap::new(),
            histories: BTreeSet::new(),
            backups: BTreeSet::new(),
        }
    }

    /// Returns what a catalog holds.
    pub fn of_catalog(catalog: &Catalog) -> Self {
        let mut seen = Self::new(catalog.lineage.segment_size);
        seen.add_catalog(catalog);
        seen
    }

    /// Returns it without what others hold.
    #[must_use]
    pub fn without(&self, others: &Self) -> Self {
        let (mut left, size) = (self.clone(), self.wal.size());
        for timeline in others.wal.timelines() {
            for run in others.wal.runs(timeline) {
                left.wal.remove_range(timeline, run.first.number(size), run.last.number(size) + 1);
            }
        }
        left.tails.retain(|timeline, until| others.tails.get(timeline).is_none_or(|theirs| theirs < until));
        left.histories.retain(|timeline| !others.histories.contains(timeline));
        left.backups.retain(|id| !others.backups.contains(id));
        left
    }

    /// Adds what was seen.
    pub fn add(&mut self, seen: &Seen) {
        for run in &seen.wal {
            self.wal.insert_runs(&[Run::from(*run)], 0);
        }
        for (timeline, until) in &seen.tails {
            let known = self.tails.entry(*timeline).or_insert(*until);
            *known = (*known).max(*until);
        }
        self.histories.extend(&seen.histories);
        self.backups.extend(seen.backups.iter().cloned());
    }

    /// Adds what a catalog holds now.
    pub fn add_catalog(&mut self, catalog: &Catalog) {
        self.wal.append(catalog.segments.clone());
        for (timeline, tail) in catalog.tails.iter().flatten() {
            let known = self.tails.entry(*timeline).or_insert(tail.until_lsn);
            *known = (*known).max(tail.until_lsn);
        }
        self.histories.extend(catalog.histories.keys());
        self.backups.extend(catalog.backups.iter().map(|backup| backup.id.clone()));
        self.backups.extend(catalog.orphaned_backups.iter().map(|backup| backup.id.clone()));
    }

    /// Returns it as it is recorded.
    pub fn recorded(&self) -> Seen {
        let runs = self.wal.timelines().into_iter().flat_map(|timeline| self.wal.runs(timeline));
        let size = self.wal.size();
        let wal = runs.map(|run| SeenRun {
            first: run.first,
            segments: run.last.number(size) - run.first.number(size) + 1,
        });
        Seen {
            wal: wal.collect(),
            tails: self.tails.clone(),
            histories: self.histories.iter().copied().collect(),
            backups: self.backups.iter().cloned().collect(),
        }
    }
}

impl ProvenState {
    /// Returns what documents say together of the repository that lies there, in the order in which they were begun. What was
    /// proven later than `now` was so by a clock that was ahead: nobody can tell when.
    pub fn of<'a>(
        size: SegmentSize,
        repository: &str,
        now: DateTime<Utc>,
        documents: impl IntoIterator<Item = &'a Proven>,
    ) -> Self {
        let mut state = Self {
            size,
            repository: repository.to_owned(),
            wal: BTreeMap::new(),
            parts: BTreeMap::new(),
            backups: BTreeMap::new(),
            documents: BTreeMap::new(),
            damage: BTreeMap::new(),
            seen: SeenBefore::new(size),
            accepted: SeenBefore::new(size),
        };
        for document in documents {
            state.seen.add(&document.seen);
            state.accepted = SeenBefore::new(size);
            state.accepted.add(&document.accepted);
            if document.repository == repository {
                state.add_proven(document, now);
            }
            // Wherever it was found: it may be so here as well, and must not be forgotten before it is read.
            state.add_damage(document, now);
        }
        let damage = std::mem::take(&mut state.damage);
        for (place, damage) in damage {
            if state.proven_at(&place).is_none_or(|proven| proven <= damage.at) {
                state.doubt(damage);
            }
        }
        state
    }

    fn add_proven(&mut self, document: &Proven, now: DateTime<Utc>) {
        let size = self.size;
        for (runs, spans) in [(&document.wal, &mut self.wal), (&document.parts, &mut self.parts)] {
            for ProvenRun { run, at } in runs.iter().filter(|run| run.at <= now) {
                let first = run.first.number(size);
                let until = first.saturating_add(run.segments);
                spans.entry(run.first.timeline).or_default().put(first, until, *at);
            }
        }
        for (id, objects) in &document.backups {
            let spans = self.backups.entry(id.clone()).or_default();
            for ProvenObjects { first, objects, at } in objects.iter().filter(|objects| objects.at <= now) {
                spans.put(u64::from(*first), u64::from(*first) + u64::from(*objects), *at);
            }
        }
        for (id, at) in document.documents.iter().filter(|(_, at)| **at <= now) {
            let known = self.documents.entry(id.clone()).or_insert(*at);
            *known = (*known).max(*at);
        }
    }

    fn add_damage(&mut self, document: &Proven, now: DateTime<Utc>) {
        // By a clock that was ahead as well it was found before now.
        let latest = now - TimeDelta::microseconds(1);
        for damage in &document.damage {
            let damage = KnownDamage { at: damage.at.min(latest), ..damage.clone() };
            if self.damage.get(&damage.place).is_none_or(|known| known.at <= damage.at) {
                self.damage.insert(damage.place.clone(), damage);
            }
        }
    }

    /// Returns when the segments of a timeline were last proven.
    pub fn wal(&self, timeline: TimelineId) -> Spans {
        self.wal.get(&timeline).cloned().unwrap_or_default()
    }

    /// Returns when the parts of segments of a timeline were last proven.
    pub fn parts(&self, timeline: TimelineId) -> Spans {
        self.parts.get(&timeline).cloned().unwrap_or_default()
    }

    /// Returns when a backup's data objects were last proven.
    pub fn objects(&self, backup: &str) -> Spans {
        self.backups.get(backup).cloned().unwrap_or_default()
    }

    /// Returns when what lies beside a backup's data objects was last proven.
    pub fn documents(&self, backup: &str) -> Option<DateTime<Utc>> {
        self.documents.get(backup).copied()
    }

    /// Returns what was damaged when it was last read.
    pub fn damage(&self) -> &BTreeMap<ReadPlace, KnownDamage> {
        &self.damage
    }

    fn proven_at(&self, place: &ReadPlace) -> Option<DateTime<Utc>> {
        let of = |spans: Option<&Spans>, number: u64| {
            spans.and_then(|spans| spans.pieces(number, number + 1).first().and_then(|piece| piece.at))
        };
        match place {
            ReadPlace::Segment(name) => of(self.wal.get(&name.timeline), name.number(self.size)),
            ReadPlace::Documents { backup } => self.documents(backup),
            ReadPlace::Object { backup, place } => of(self.backups.get(backup), u64::from(*place)),
        }
    }

    /// Notes that what was read is sound.
    pub fn prove(&mut self, place: &ReadPlace, at: DateTime<Utc>) {
        self.damage.remove(place);
        match place {
            ReadPlace::Segment(name) => {
                let number = name.number(self.size);
                self.wal.entry(name.timeline).or_default().put(number, number + 1, at);
            }
            ReadPlace::Documents { backup } => drop(self.documents.insert(backup.clone(), at)),
            ReadPlace::Object { backup, place } => {
                let place = u64::from(*place);
                self.backups.entry(backup.clone()).or_default().put(place, place + 1, at);
            }
        }
    }

    /// Notes that what was read is damaged: it is as if it was never proven, until it is found sound.
    pub fn doubt(&mut self, damage: KnownDamage) {
        match &damage.place {
            ReadPlace::Segment(name) => {
                let number = name.number(self.size);
                if let Some(spans) = self.wal.get_mut(&name.timeline) {
                    spans.carve(number, number + 1);
                }
            }
            ReadPlace::Documents { backup } => drop(self.documents.remove(backup)),
            ReadPlace::Object { backup, place } => {
                if let Some(spans) = self.backups.get_mut(backup) {
                    spans.carve(u64::from(*place), u64::from(*place) + 1);
                }
            }
        }
        self.damage.insert(damage.place.clone(), damage);
    }

    /// Notes that the parts of a segment are proven.
    pub fn prove_parts(&mut self, name: SegmentName, at: DateTime<Utc>) {
        let number = name.number(self.size);
        self.parts.entry(name.timeline).or_default().put(number, number + 1, at);
    }

    /// Forgets what is not stored any more; `stored` are the segments of which anything is. What may lie in what cannot be read
    /// stays as it was.
    pub fn keep_only(&mut self, catalog: &Catalog, stored: &StoredSegments, unlisted: &Unlisted) {
        let mut stored = stored.clone();
        stored.append(unlisted.among(&self.seen.wal));
        for (timeline, spans) in &mut self.wal {
            let mut at = 0;
            for run in stored.runs(*timeline) {
                spans.carve(at, run.first.number(self.size));
                at = run.last.number(self.size) + 1;
            }
            spans.carve(at, u64::MAX);
        }
        let complete: BTreeSet<&str> = catalog.backups.iter().map(|backup| &*backup.id).collect();
        // One that was seen and is not removed may have a record that cannot be read.
        let is_kept =
            |id: &str| complete.contains(id) || self.seen.backups.contains(id) || unlisted.hides_backups();
        self.backups.retain(|id, _| is_kept(id));
        self.documents.retain(|id, _| is_kept(id));
        self.damage.retain(|place, _| match place {
            ReadPlace::Segment(name) => stored.contains(*name),
            place => place.backup().is_some_and(is_kept),
        });
    }

    /// Returns it as it is recorded by a verification that began then.
    pub fn recorded(&self, id: &str, started: DateTime<Utc>) -> Proven {
        let runs = |of: &BTreeMap<TimelineId, Spans>| {
            let mut runs = Vec::new();
            for (timeline, spans) in of {
                let mut spans = spans.clone();
                spans.bound(SPANS_MAX);
                runs.extend(spans.all().filter_map(|piece| {
                    let first = SegmentName::from_number(*timeline, piece.from, self.size)?;
                    let run = SeenRun { first, segments: piece.until - piece.from };
                    Some(ProvenRun { run, at: piece.at? })
                }));
            }
            runs
        };
        let objects = self.backups.iter().map(|(id, spans)| {
            let mut spans = spans.clone();
            spans.bound(SPANS_MAX);
            let objects = spans.all().filter_map(|piece| {
                Some(ProvenObjects {
                    first: u32::try_from(piece.from).ok()?,
                    objects: u32::try_from(piece.until - piece.from).ok()?,
                    at: piece.at?,
                })
            });
            (id.clone(), objects.collect::<Vec<_>>())
        });
        Proven {
            format: 1,
            id: id.to_owned(),
            started,
            repository: self.repository.clone(),
            wal: runs(&self.wal),
            parts: runs(&self.parts),
            backups: objects.filter(|(_, objects)| !objects.is_empty()).collect(),
            documents: self.documents.clone(),
            damage: self.damage.values().take(Proven::DAMAGE_MAX).cloned().collect(),
            seen: self.seen.recorded(),
            accepted: self.accepted.recorded(),
            ..Proven::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
    }

    fn name(number: u64) -> SegmentName {
        SegmentName::from_number(TimelineId::FIRST, number, SegmentSize::MIN).unwrap()
    }

    const ID: &str = "20261121T010203Z-0123456789abcdef";

    fn segment(number: u64) -> ReadPlace {
        ReadPlace::Segment(name(number))
    }

    fn damaged(place: ReadPlace, second: i64) -> KnownDamage {
        KnownDamage { place, at: time(second), flaws: Vec::new() }
    }

    fn object(place: u32) -> ReadPlace {
        ReadPlace::Object { backup: ID.to_owned(), place }
    }

    fn empty() -> ProvenState {
        ProvenState::of(SegmentSize::MIN, "here", time(99), [])
    }

    fn together<'a>(documents: impl IntoIterator<Item = &'a Proven>) -> ProvenState {
        ProvenState::of(SegmentSize::MIN, "here", time(99), documents)
    }

    #[test]
    fn what_is_recorded_is_read_back() {
        let mut state = empty();
        (3..9).for_each(|number| state.prove(&segment(number), time(1)));
        state.prove(&segment(5), time(2));
        state.doubt(damaged(segment(7), 1));
        state.prove_parts(name(9), time(1));
        (0..4).for_each(|place| state.prove(&object(place), time(1)));
        state.doubt(damaged(object(2), 1));
        state.prove(&ReadPlace::Documents { backup: ID.to_owned() }, time(1));
        state.seen.add(&Seen {
            wal: vec![SeenRun { first: name(3), segments: 6 }],
            tails: BTreeMap::from([(TimelineId::FIRST, Lsn(77))]),
            histories: vec![TimelineId::new(2).unwrap()],
            backups: vec![ID.to_owned()],
        });
        let recorded = state.recorded(ID, time(1));
        let json = serde_json::to_string(&recorded).unwrap();
        let read: Proven = serde_json::from_str(&json).unwrap();
        assert_eq!(read, recorded, "{json}");
        assert_eq!(together([&read]), state);
        assert_eq!(recorded.wal.len(), 4, "{json}");
        // Nothing of it is proven of a copy that lies elsewhere; what was there, and what was damaged, is known there as well.
        let copy = ProvenState::of(SegmentSize::MIN, "there", time(99), [&read]);
        assert!(copy.wal(TimelineId::FIRST).all().next().is_none(), "{copy:?}");
        assert_eq!(copy.damage(), state.damage());
        assert!(copy.objects(ID).all().next().is_none() && copy.documents(ID).is_none(), "{copy:?}");
        assert_eq!(copy.seen, state.seen);
    }

    #[test]
    fn damage_stands_until_it_is_read_again() {
        let (mut first, mut second, mut third) = (empty(), empty(), empty());
        first.prove(&segment(3), time(1));
        second.doubt(damaged(segment(3), 2));
        third.prove(&segment(3), time(3));
        let [first, second, third] =
            [(first, 1), (second, 2), (third, 3)].map(|(state, second)| state.recorded(ID, time(second)));
        let standing = together([&first, &second]);
        assert_eq!(standing.damage().len(), 1);
        assert_eq!(
            standing.wal(TimelineId::FIRST).pieces(3, 4)[0].at,
            None,
            "it is as if it was never proven"
        );
        for order in [[&first, &second, &third], [&third, &second, &first]] {
            let mended = together(order);
            assert!(mended.damage().is_empty(), "{mended:?}");
            assert_eq!(mended.wal(TimelineId::FIRST).pieces(3, 4)[0].at, Some(time(3)));
        }
    }

    #[test]
    fn a_clock_that_was_ahead_proves_nothing() {
        let mut state = empty();
        state.prove(&segment(3), time(500));
        state.prove(&object(0), time(500));
        state.prove(&ReadPlace::Documents { backup: ID.to_owned() }, time(500));
        state.doubt(damaged(segment(4), 500));
        let ahead = state.recorded(ID, time(500));
        let read = together([&ahead]);
        assert!(read.wal(TimelineId::FIRST).all().next().is_none(), "{read:?}");
        assert!(read.objects(ID).all().next().is_none() && read.documents(ID).is_none(), "{read:?}");
        assert_eq!(read.damage().len(), 1, "damage stands whatever the clock");
    }

    #[test]
    fn what_was_accepted_is_missed_again_only_after_it_was_back() {
        let seen = |numbers: std::ops::Range<u64>| {
            let mut seen = SeenBefore::new(SegmentSize::MIN);
            let first = name(numbers.start);
            seen.add(&Seen {
                wal: vec![SeenRun { first, segments: numbers.end - numbers.start }],
                tails: BTreeMap::from([(TimelineId::FIRST, Lsn(numbers.end << 20))]),
                ..Seen::default()
            });
            seen
        };
        let numbers = |seen: &SeenBefore| -> Vec<u64> {
            seen.wal.names().map(|name| name.number(SegmentSize::MIN)).collect()
        };
        let missing = seen(3..9).without(&seen(3..6));
        assert_eq!((numbers(&missing), missing.tails.len()), (vec![6, 7, 8], 1));
        let known = seen(3..9).without(&missing);
        assert_eq!((numbers(&known), known.tails.len()), (vec![3, 4, 5], 0));
        assert_eq!(numbers(&missing.without(&seen(3..8))), [8], "what is back counts again");
    }
}
