//! What a chain's WAL holds, stretch after stretch: for those who want to see everything, not to find one record.

use chrono::{DateTime, Utc};
use walship::pg::{Lsn, SegmentName};
use walship::wal::deletes::DeleteCount;
use walship::wal::event::WalEvent;
use walship::wal::rollup::{Class, Facts};
use walship::wal::summary::SegmentEnding;

use super::Halt;
use super::walk::{Crossing, Walk};

/// How many stretches are looked at for the next known time.
const LOOK_AHEAD_MAX: usize = 32;

/// What is looked for.
pub(crate) struct Wanted<'q> {
    /// The classes of events.
    pub(crate) classes: &'q [Class],
    /// Whether the end of a transaction that drops nothing may be wanted that lies whole in a stretch of WAL
    /// with these facts: only the segments themselves list them.
    pub(crate) ends: &'q dyn Fn(&Facts) -> bool,
    /// Whether counts of deleted rows are wanted.
    pub(crate) deletes: bool,
    /// Whether this event is wanted.
    pub(crate) matches: &'q dyn Fn(&WalEvent) -> bool,
}

/// What a stretch of WAL holds.
#[derive(Debug)]
pub(crate) enum Surveyed {
    /// It was decoded.
    Known(Known),
    /// What this segment holds is not known.
    Unknown {
        segment: SegmentName,
        /// Why, when it is whole but could not be decoded; `None` when it is damaged where it is stored.
        undecoded: Option<String>,
    },
}

/// What is known of a stretch of WAL.
#[derive(Debug)]
pub(crate) struct Known {
    /// The wanted events in WAL order.
    pub(crate) events: Vec<WalEvent>,
    /// Some records in it whose time is known, in WAL order.
    pub(crate) times: Vec<(Lsn, DateTime<Utc>)>,
    /// The largest counts of deleted rows, when they are wanted.
    pub(crate) deletes: Vec<DeleteCount>,
    /// Deleted rows of which it is not known who deleted them.
    pub(crate) deletes_uncounted: u64,
    /// The step behind it.
    pub(crate) next: usize,
}

impl Known {
    fn new(events: Vec<WalEvent>, facts: Option<&Facts>, wanted: &Wanted<'_>, next: usize) -> Self {
        let counted = facts.filter(|_| wanted.deletes);
        Self {
            events,
            times: facts.map(times_of).unwrap_or_default(),
            deletes: counted.map(|facts| facts.deletes.largest.clone()).unwrap_or_default(),
            deletes_uncounted: counted.map_or(0, |facts| facts.deletes_uncounted),
            next,
        }
    }
}

impl Walk<'_> {
    /// Returns what the steps from `at` on hold, as many as are known together.
    pub(crate) fn survey(&self, at: usize, wanted: &Wanted<'_>) -> Result<Surveyed, Halt> {
        let known = match self.survey_index(at, wanted)? {
            Some(known) => known,
            None => match self.survey_step(at, wanted)? {
                Surveyed::Known(known) => known,
                unknown => return Ok(unknown),
            },
        };
        Ok(Surveyed::Known(self.trimmed(at, known, wanted)))
    }

    /// Drops what lies outside the steps, and what is not wanted.
    fn trimmed(&self, at: usize, mut known: Known, wanted: &Wanted<'_>) -> Known {
        let (from, to) = (self.chain.step(at).from, self.chain.step(known.next - 1).to);
        let inside = |lsn: Lsn| lsn >= from && lsn < to;
        for event in &known.events {
            known.times.extend(event.kind.stop_time().map(|time| (event.lsn, time)));
        }
        known.events.retain(|event| inside(event.lsn) && (wanted.matches)(event));
        known.times.retain(|(lsn, _)| inside(*lsn));
        known.times.sort_unstable();
        known.times.dedup();
        known
    }

    /// Returns what the index says of the steps from `at` on, where that is enough.
    fn survey_index(&self, at: usize, wanted: &Wanted<'_>) -> Result<Option<Known>, Halt> {
        let Some(stretch) = self.stretch(at, at, usize::MAX).filter(|_| self.loaded(at).is_none()) else {
            return Ok(None);
        };
        let block = stretch.block;
        let listed = wanted.classes.iter().all(|class| block.lists(*class));
        let enough = stretch.is_known() && listed && !(wanted.ends)(&block.facts);
        // Of many segments together it is known too little of when something happened.
        let found = block.events.iter().any(|event| (wanted.matches)(event));
        if !block.is_segment && (!enough || found) {
            return Err(Self::refine(&stretch));
        }
        if !enough {
            return Ok(None);
        }
        // Counts of a block count once, and only when all of it is passed.
        let (first, last) = (self.chain.step(at).segment, self.chain.step(stretch.to).segment);
        let whole = last == block.last && self.evidence.blocks.contains_key(&first);
        let counted = wanted.deletes && block.facts.counts.heap_deletes > 0;
        if counted && !block.is_segment && !whole {
            return Err(Self::refine(&stretch));
        }
        let events = self.listed(&stretch).cloned().collect();
        let mut known = Known::new(events, Some(&block.facts), wanted, stretch.to + 1);
        if self.leaves_open(&stretch) {
            // Nothing is left out when the last step alone must tell: it comes next.
            let damaged = self.evidence.unreadable.contains(&self.chain.step(stretch.to).segment);
            let crossing = if damaged { Crossing::ReadSegments } else { self.leaving(stretch.to)? };
            match crossing {
                Crossing::Nothing => {}
                Crossing::Event(event) => known.events.push(event),
                Crossing::ReadSegments if stretch.to == at => return Ok(None),
                Crossing::ReadSegments if counted => return Err(Self::refine(&stretch)),
                Crossing::ReadSegments => known.next = stretch.to,
            }
        }
        Ok(Some(known))
    }

    /// Returns what one step holds, by its segment's summary or by all its events.
    fn survey_step(&self, at: usize, wanted: &Wanted<'_>) -> Result<Surveyed, Halt> {
        let segment = self.chain.step(at).segment;
        if self.evidence.unreadable.contains(&segment) {
            return Ok(Surveyed::Unknown { segment, undecoded: None });
        }
        if let Some(events) = self.loaded(at) {
            let events = events.cloned().collect();
            let facts = if wanted.deletes { Some(Facts::of(self.summary(at)?, 0)) } else { None };
            return Ok(Surveyed::Known(Known::new(events, facts.as_ref(), wanted, at + 1)));
        }
        let summary = self.summary(at)?;
        if let SegmentEnding::Undecoded { reason } = &summary.ending {
            return Ok(Surveyed::Unknown { segment, undecoded: Some(reason.clone()) });
        }
        let facts = Facts::of(summary, 0);
        let mut events = summary.events.clone();
        let missing = summary.events_truncated || (wanted.ends)(&facts);
        match self.leaving(at)? {
            Crossing::Nothing if !missing => {}
            Crossing::Event(event) if !missing => events.push(event),
            _ => return Err(Halt::Events(vec![self.request(at)?])),
        }
        Ok(Surveyed::Known(Known::new(events, Some(&facts), wanted, at + 1)))
    }

    /// Returns the record that leaves step `at`; one that ends in a damaged segment is not known, and that
    /// segment's own step says so.
    fn leaving(&self, at: usize) -> Result<Crossing, Halt> {
        match self.crossing(at) {
            Err(Halt::Unreadable(_)) => Ok(Crossing::Nothing),
            other => other,
        }
    }

    /// Returns the first time that is known of a record in the steps from `at` on.
    pub(crate) fn next_time(&self, at: usize) -> Result<Option<DateTime<Utc>>, Halt> {
        let mut at = at;
        for _ in 0..LOOK_AHEAD_MAX {
            if at >= self.chain.len() {
                return Ok(None);
            }
            let from = self.chain.step(at).from;
            let (times, next) = match self.stretch(at, at, usize::MAX) {
                Some(stretch) if stretch.block.facts.undecoded == 0 => {
                    (times_of(&stretch.block.facts), stretch.to + 1)
                }
                _ => match self.summary(at) {
                    Ok(summary) if matches!(summary.ending, SegmentEnding::Undecoded { .. }) => {
                        return Ok(None);
                    }
                    Err(Halt::Unreadable(_)) => return Ok(None),
                    summary => (times_of(&Facts::of(summary?, 0)), at + 1),
                },
            };
            if let Some((_, time)) = times.into_iter().find(|(lsn, _)| *lsn >= from) {
                return Ok(Some(time));
            }
            at = next;
        }
        Ok(None)
    }
}

/// Returns the records whose times the facts name, in WAL order.
fn times_of(facts: &Facts) -> Vec<(Lsn, DateTime<Utc>)> {
    let mut times: Vec<_> =
        facts.min_time.into_iter().chain(facts.max_time).map(|stop| (stop.lsn, stop.time)).collect();
    times.sort_unstable();
    times
}
