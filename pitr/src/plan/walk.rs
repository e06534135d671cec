//! Questions to the WAL of a chain, answered from summaries where they suffice and from events where
//! they do not; what is not known yet becomes a request.

use walship::pg::{Lsn, SegmentName, SegmentSize};
use walship::wal::event::WalEvent;
use walship::wal::summary::{Joined, SegmentEnding, SegmentSummary, join};

use super::chain::Chain;
use super::{Evidence, Halt, Question, RecordBounds, RecordRequest, Refusal, RefusalKind, SegmentRequest};

/// How many summaries one request names at most.
const SUMMARIES_PER_REQUEST: usize = 256;

/// The most WAL that is read to follow one record, in bytes: no record is longer than 1 GiB, and its
/// pages' headers come on top.
const FOLLOW_MAX_BYTES: u64 = 5 << 28;

/// A chain and what is known of it.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub(crate) chain: &'a Chain,
    pub(crate) evidence: &'a Evidence,
    pub(crate) size: SegmentSize,
    /// Records that start here or later are of no interest; WAL that only they need is not asked for.
    pub(crate) cut: Option<Lsn>,
}

/// A question about single events.
pub(crate) struct Seek<'q> {
    /// Whether a record that lies whole in a segment with this summary may match.
    pub(crate) maybe: &'q dyn Fn(&SegmentSummary) -> bool,
    /// Whether this event matches.
    pub(crate) matches: &'q dyn Fn(&WalEvent) -> bool,
}

/// What is known of the record that starts in one step and ends in a later one.
enum Crossing {
    /// There is none, or it says nothing of interest.
    Nothing,
    Event(WalEvent),
    ReadSegments,
}

impl<'a> Walk<'a> {
    /// Returns the walk over this chain.
    pub(crate) fn new(question: &Question<'a>, chain: &'a Chain) -> Self {
        let size = question.catalog.lineage.segment_size;
        Self { chain, evidence: question.evidence, size, cut: None }
    }

    /// Returns the summary of step `at`.
    pub(crate) fn summary(&self, at: usize) -> Result<&'a SegmentSummary, Halt> {
        let name = self.chain.steps[at].segment;
        if self.evidence.unreadable.contains(&name) {
            return Err(Halt::Unreadable(name));
        }
        if let Some(summary) = self.evidence.summaries.get(&name) {
            return Ok(summary);
        }
        let known = |name: &SegmentName| {
            self.evidence.summaries.contains_key(name) || self.evidence.unreadable.contains(name)
        };
        let missing = self.chain.steps[at..]
            .iter()
            .map(|step| step.segment)
            .filter(|name| !known(name))
            .take(SUMMARIES_PER_REQUEST);
        Err(Halt::Summaries(missing.collect()))
    }

    /// Returns the summary of step `at`, refusing WAL that the decoder could not follow.
    pub(crate) fn decoded(&self, at: usize) -> Result<&'a SegmentSummary, Halt> {
        let summary = self.summary(at)?;
        if let SegmentEnding::Undecoded { reason } = &summary.ending {
            return Err(Refusal::halt(
                RefusalKind::Undecoded,
                format!("the WAL in segment {} cannot be decoded: {reason}", summary.segment),
            ));
        }
        Ok(summary)
    }

    /// Returns the events that start in step `at` and are stored whole, when they are loaded.
    pub(crate) fn loaded(
        &self,
        at: usize,
    ) -> Option<impl DoubleEndedIterator<Item = &'a WalEvent> + use<'a>> {
        let step = self.chain.steps[at];
        let end = self.chain.end();
        let events = self.evidence.events.get(&step.segment)?;
        Some(
            events
                .iter()
                .filter(move |event| event.lsn >= step.from && event.lsn < step.to && event.end_lsn <= end),
        )
    }

    /// Returns the events that start in step `at`, asking for them when they are not loaded.
    pub(crate) fn events(
        &self,
        at: usize,
    ) -> Result<impl DoubleEndedIterator<Item = &'a WalEvent> + use<'a>, Halt> {
        match self.loaded(at) {
            Some(events) => Ok(events),
            None => Err(Halt::Events(vec![self.request(at)?])),
        }
    }

    /// Returns the request for the events of step `at`.
    pub(crate) fn request(&self, at: usize) -> Result<SegmentRequest, Halt> {
        Ok(SegmentRequest { segment: self.chain.steps[at].segment, following: self.following(at)? })
    }

    /// Returns the segments that the last record of step `at` may reach into.
    fn following(&self, at: usize) -> Result<Vec<SegmentName>, Halt> {
        let mut following = Vec::new();
        let summary = self.summary(at)?;
        let undecoded = matches!(summary.ending, SegmentEnding::Undecoded { .. });
        if summary.unfinished.is_none() && !undecoded {
            return Ok(following);
        }
        let most = (FOLLOW_MAX_BYTES / self.size.bytes()).max(1) as usize;
        for next in at + 1..self.chain.steps.len().min(at + 1 + most) {
            following.push(self.chain.steps[next].segment);
            let summary = match self.summary(next) {
                // Its own step will say so to whoever goes on behind this one.
                Err(Halt::Unreadable(_)) => {
                    following.pop();
                    break;
                }
                other => other?,
            };
            let ends_there = summary.leading.as_ref().is_none_or(|leading| leading.end.is_some());
            if ends_there {
                break;
            }
        }
        Ok(following)
    }

    fn crossing(&self, at: usize) -> Result<Crossing, Halt> {
        let summary = self.decoded(at)?;
        if summary.unfinished.is_none() || at + 1 >= self.chain.steps.len() {
            return Ok(Crossing::Nothing);
        }
        if let (Some(record), Some(cut)) = (&summary.unfinished, self.cut)
            && record.lsn >= cut
        {
            return Ok(Crossing::Nothing);
        }
        let step = self.chain.steps[at];
        let next = self.summary(at + 1)?;
        if matches!(next.ending, SegmentEnding::Undecoded { .. }) {
            // The record may still be read; who goes on behind it is refused there.
            return Ok(Crossing::ReadSegments);
        }
        Ok(match join(summary, next) {
            Joined::Event(event) if event.lsn >= step.from && event.lsn < step.to => Crossing::Event(event),
            Joined::Event(_) | Joined::None | Joined::NotOfInterest => Crossing::Nothing,
            Joined::ReadSegments => Crossing::ReadSegments,
        })
    }

    /// Returns the first event that matches one of those at which recovery to the target stops, with its
    /// step. Of segments that were read in vain no events are kept.
    pub(crate) fn decisive(&self, seek: &Seek<'_>) -> Result<Option<(usize, &'a WalEvent)>, Halt>
    where
        Self: 'a,
    {
        let mut from = 0;
        loop {
            match self.first(from, seek) {
                Err(Halt::Events(mut requests)) if requests.len() == 1 => {
                    let Some(request) = requests.pop() else { return Ok(None) };
                    if !self.evidence.searched.contains(&request.segment) {
                        return Err(Halt::Search(request));
                    }
                    let behind = self.chain.steps[from..]
                        .iter()
                        .position(|step| step.segment == request.segment)
                        .map_or(self.chain.steps.len(), |at| from + at + 1);
                    from = behind;
                }
                other => return other,
            }
        }
    }

    /// Returns the first event from step `from` on that matches, with its step.
    pub(crate) fn first(&self, from: usize, seek: &Seek<'_>) -> Result<Option<(usize, &'a WalEvent)>, Halt>
    where
        Self: 'a,
    {
        for at in from..self.chain.steps.len() {
            if let Some(mut events) = self.loaded(at) {
                if let Some(event) = events.find(|event| (seek.matches)(event)) {
                    return Ok(Some((at, event)));
                }
                continue;
            }
            if self.must_read(at, seek)? {
                return Err(Halt::Events(vec![self.request(at)?]));
            }
        }
        Ok(None)
    }

    /// Returns the last event that starts before `cut` and matches, looking back from step `from`.
    pub(crate) fn last(
        &self,
        from: usize,
        cut: Lsn,
        seek: &Seek<'_>,
    ) -> Result<Option<(usize, &'a WalEvent)>, Halt> {
        for at in (0..=from).rev() {
            if let Some(events) = self.loaded(at) {
                let found = events.rev().find(|event| event.lsn < cut && (seek.matches)(event));
                if let Some(event) = found {
                    return Ok(Some((at, event)));
                }
                continue;
            }
            if self.must_read(at, seek)? {
                return Err(Halt::Events(vec![self.request(at)?]));
            }
        }
        Ok(None)
    }

    /// Returns whether only the events of step `at` can tell whether one matches.
    pub(crate) fn must_read(&self, at: usize, seek: &Seek<'_>) -> Result<bool, Halt> {
        if (seek.maybe)(self.decoded(at)?) {
            return Ok(true);
        }
        Ok(match self.crossing(at)? {
            Crossing::Nothing => false,
            Crossing::Event(event) => (seek.matches)(&event),
            Crossing::ReadSegments => true,
        })
    }

    /// Returns the events of step `at` that summaries keep (all but ordinary commits and aborts),
    /// asking for all of them when the summary had no room.
    pub(crate) fn notable(&self, at: usize) -> Result<Vec<WalEvent>, Halt> {
        if let Some(events) = self.loaded(at) {
            return Ok(events.cloned().collect());
        }
        let summary = self.decoded(at)?;
        let crossing = self.crossing(at)?;
        if summary.events_truncated || matches!(crossing, Crossing::ReadSegments) {
            return Err(Halt::Events(vec![self.request(at)?]));
        }
        let step = self.chain.steps[at];
        let inside = |event: &&WalEvent| event.lsn >= step.from && event.lsn < step.to;
        let mut events: Vec<_> = summary.events.iter().filter(inside).cloned().collect();
        if let Crossing::Event(event) = crossing {
            events.push(event);
        }
        Ok(events)
    }

    /// Returns the first record that starts at or after `at`, `None` when no whole one is stored.
    pub(crate) fn record_at(&self, at: Lsn) -> Result<Option<RecordBounds>, Halt> {
        let Some(first_step) = self.chain.step_of(at.max(self.chain.start)) else { return Ok(None) };
        for number in first_step..self.chain.steps.len() {
            let step = self.chain.steps[number];
            let from = at.max(step.from);
            let known = self.evidence.records.get(&(step.segment, from));
            let Some(known) = known else {
                return Err(Halt::Record(RecordRequest { request: self.request(number)?, at: from }));
            };
            if let Some(bounds) = known
                && bounds.lsn < step.to
            {
                return Ok((bounds.end_lsn <= self.chain.end()).then_some(*bounds));
            }
        }
        Ok(None)
    }

    /// Returns where the last record that is stored whole ends.
    pub(crate) fn end_of_records(&self) -> Result<Lsn, Halt> {
        for at in (0..self.chain.steps.len()).rev() {
            let step = self.chain.steps[at];
            let summary = self.decoded(at)?;
            if step.to < step.segment.end(self.size) {
                // A parent's copy that is used up to a switch point: a record ends there.
                return Ok(step.to);
            }
            if let Some(unfinished) = &summary.unfinished {
                return Ok(unfinished.lsn.max(self.chain.start));
            }
            let inside_a_record = summary.first_record.is_none()
                && summary.leading.as_ref().is_some_and(|leading| leading.end.is_none());
            if !inside_a_record {
                return Ok(summary.end_of_wal.min(step.to).max(step.from));
            }
        }
        Ok(self.chain.start)
    }
}
