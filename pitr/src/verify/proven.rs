//! What is proven of a repository, put together from what verifications have recorded, and what was seen of it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use walship::catalog::{Catalog, Proven, ProvenObjects, ProvenRun, Seen, SeenRun, StoredSegments};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::rollup::Run;

use super::spans::Spans;

/// So many spans are recorded for each timeline and each backup.
const SPANS_MAX: usize = 4096;

/// What is proven of a repository, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenState {
    size: SegmentSize,
    /// Segments by their numbers.
    wal: BTreeMap<TimelineId, Spans>,
    /// Parts of segments that are stored whole too.
    parts: BTreeMap<TimelineId, Spans>,
    /// Data objects by their places in the backup's record.
    backups: BTreeMap<String, Spans>,
    /// What was seen, of all that verifications recorded.
    pub seen: SeenBefore,
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
    /// Returns what documents say together.
    pub fn of<'a>(size: SegmentSize, documents: impl IntoIterator<Item = &'a Proven>) -> Self {
        let mut state = Self {
            size,
            wal: BTreeMap::new(),
            parts: BTreeMap::new(),
            backups: BTreeMap::new(),
            seen: SeenBefore::new(size),
        };
        for document in documents {
            for (runs, spans) in [(&document.wal, &mut state.wal), (&document.parts, &mut state.parts)] {
                for ProvenRun { run, at } in runs {
                    let first = run.first.number(size);
                    let until = first.saturating_add(run.segments);
                    spans.entry(run.first.timeline).or_default().put(first, until, *at);
                }
            }
            for (id, objects) in &document.backups {
                let spans = state.backups.entry(id.clone()).or_default();
                for ProvenObjects { first, objects, at } in objects {
                    spans.put(u64::from(*first), u64::from(*first) + u64::from(*objects), *at);
                }
            }
            if document.accepts_missing {
                state.seen = SeenBefore::new(size);
            }
            state.seen.add(&document.seen);
        }
        state
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

    /// Notes that a segment is proven.
    pub fn prove_segment(&mut self, name: SegmentName, at: DateTime<Utc>) {
        let number = name.number(self.size);
        self.wal.entry(name.timeline).or_default().put(number, number + 1, at);
    }

    /// Notes that a segment is damaged: it is as if it was never proven.
    pub fn doubt_segment(&mut self, name: SegmentName) {
        let number = name.number(self.size);
        if let Some(spans) = self.wal.get_mut(&name.timeline) {
            spans.carve(number, number + 1);
        }
    }

    /// Notes that the parts of a segment are proven.
    pub fn prove_parts(&mut self, name: SegmentName, at: DateTime<Utc>) {
        let number = name.number(self.size);
        self.parts.entry(name.timeline).or_default().put(number, number + 1, at);
    }

    /// Notes that a backup's data object is proven, or with `None` that it is damaged.
    pub fn set_object(&mut self, backup: &str, place: u32, at: Option<DateTime<Utc>>) {
        let spans = self.backups.entry(backup.to_owned()).or_default();
        let place = u64::from(place);
        match at {
            Some(at) => spans.put(place, place + 1, at),
            None => spans.carve(place, place + 1),
        }
    }

    /// Forgets what is not stored any more.
    pub fn keep_only(&mut self, catalog: &Catalog) {
        for (timeline, spans) in &mut self.wal {
            let mut at = 0;
            for run in catalog.segments.runs(*timeline) {
                spans.carve(at, run.first.number(self.size));
                at = run.last.number(self.size) + 1;
            }
            spans.carve(at, u64::MAX);
        }
        let complete: BTreeSet<&str> = catalog.backups.iter().map(|backup| &*backup.id).collect();
        self.backups.retain(|id, _| complete.contains(&**id));
    }

    /// Returns it as it is recorded by a verification.
    pub fn recorded(&self, id: &str) -> Proven {
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
            wal: runs(&self.wal),
            parts: runs(&self.parts),
            backups: objects.filter(|(_, objects)| !objects.is_empty()).collect(),
            seen: self.seen.recorded(),
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

    #[test]
    fn what_is_recorded_is_read_back() {
        let mut state = ProvenState::of(SegmentSize::MIN, []);
        (3..9).for_each(|number| state.prove_segment(name(number), time(1)));
        state.prove_segment(name(5), time(2));
        state.doubt_segment(name(7));
        state.prove_parts(name(9), time(1));
        let id = "20261121T010203Z-0123456789abcdef";
        (0..4).for_each(|place| state.set_object(id, place, Some(time(1))));
        state.set_object(id, 2, None);
        state.seen.add(&Seen {
            wal: vec![SeenRun { first: name(3), segments: 6 }],
            tails: BTreeMap::from([(TimelineId::FIRST, Lsn(77))]),
            histories: vec![TimelineId::new(2).unwrap()],
            backups: vec![id.to_owned()],
        });
        let recorded = state.recorded(id);
        let json = serde_json::to_string(&recorded).unwrap();
        let read: Proven = serde_json::from_str(&json).unwrap();
        assert_eq!(read, recorded, "{json}");
        assert_eq!(ProvenState::of(SegmentSize::MIN, [&read]), state);
        assert_eq!(recorded.wal.len(), 4, "{json}");
        // What was accepted starts anew.
        let accepted = Proven { accepts_missing: true, seen: Seen::default(), ..read.clone() };
        let later = ProvenState::of(SegmentSize::MIN, [&read, &accepted]);
        assert!(later.seen.backups.is_empty() && later.seen.wal.names().next().is_none());
        assert_eq!(later.wal, state.wal);
    }
}
