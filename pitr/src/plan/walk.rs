//! Questions to the WAL of a chain, answered from summaries where they suffice and from events where
//! they do not; what is not known yet becomes a request. Where the index tells of many steps at once they are
//! passed over together.

use chrono::{DateTime, Utc};
use walship::catalog::StoredSegments;
use walship::pg::{Lsn, SegmentName, SegmentSize};
use walship::wal::event::WalEvent;
use walship::wal::rollup::{Block, Class, Facts};
use walship::wal::summary::{Joined, SegmentEnding, SegmentSummary, join};

use super::chain::Chain;
use super::{Evidence, Halt, Question, RecordBounds, RecordRequest, Refusal, RefusalKind, SegmentRequest};

/// How many summaries one request names at most.
const SUMMARIES_PER_REQUEST: usize = 256;

/// The most WAL that is read to follow one record, in bytes: no record is longer than 1 GiB, and its
/// pages' headers come on top.
pub(super) const FOLLOW_MAX_BYTES: u64 = 5 << 28;

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
    /// Whether a record may match that lies whole in a stretch of WAL with these facts and listed events.
    pub(crate) maybe: &'q dyn Fn(&Facts, &[WalEvent]) -> bool,
    /// Whether this event matches.
    pub(crate) matches: &'q dyn Fn(&WalEvent) -> bool,
}

/// What is known of the record that starts in one step and ends in a later one.
pub(super) enum Crossing {
    /// There is none, or it says nothing of interest.
    Nothing,
    Event(WalEvent),
    ReadSegments,
}

/// Steps that the index tells of together.
#[derive(Clone, Copy)]
pub(super) struct Stretch<'a> {
    /// The segment that the block is known by.
    first: SegmentName,
    pub(super) block: &'a Block,
    /// The first and the last of the steps that are meant.
    from: usize,
    pub(super) to: usize,
}

impl Stretch<'_> {
    /// Whether the facts tell of every record but the one that leaves the last segment.
    pub(super) fn is_known(&self) -> bool {
        let block = self.block;
        // Where there was a gap a segment may have come late.
        block.facts.undecoded == 0 && block.facts.unread == 0 && !block.has_gaps
    }

    fn rules_out(&self, seek: &Seek<'_>) -> bool {
        self.is_known() && !(seek.maybe)(&self.block.facts, &self.block.events)
    }
}

impl<'a> Walk<'a> {
    /// Returns the walk over this chain.
    pub(crate) fn new(question: &Question<'a>, chain: &'a Chain) -> Self {
        let size = question.catalog.lineage.segment_size;
        Self { chain, evidence: question.evidence, size, cut: None }
    }

    /// Returns what the index says of step `at` and its neighbours among the steps `from..=to`.
    pub(super) fn stretch(&self, at: usize, from: usize, to: usize) -> Option<Stretch<'a>> {
        let segment = self.chain.step(at).segment;
        let (first, block) = self.evidence.block_of(segment)?;
        let number = |name: SegmentName| name.number(self.size);
        let before = (number(segment) - number(first)) as usize;
        let behind = (number(block.last) - number(segment)) as usize;
        Some(Stretch {
            first,
            block,
            from: from.max(self.chain.first_in_span(at)).max(at.saturating_sub(before)),
            to: to.min(self.chain.last_in_span(at)).min(at.saturating_add(behind)),
        })
    }

    /// Returns whether the record that leaves the last step of a stretch is not among its facts.
    pub(super) fn leaves_open(&self, stretch: &Stretch<'_>) -> bool {
        let ends = self.chain.step(stretch.to).segment == stretch.block.last;
        let last_of_span = stretch.to == self.chain.last_in_span(stretch.to);
        stretch.to + 1 < self.chain.len() && ((ends && stretch.block.open_end) || last_of_span)
    }

    /// Returns the events that the index lists of a stretch; without the record that leaves it where the way
    /// goes on with another timeline, or ends: the index followed that record along the segment's own timeline.
    pub(super) fn listed(&self, stretch: &Stretch<'a>) -> impl Iterator<Item = &'a WalEvent> + use<'a> {
        let (start, end) = (self.chain.step(stretch.from).from, self.chain.step(stretch.to).to);
        let turns = stretch.to == self.chain.last_in_span(stretch.to);
        let inside = move |event: &&WalEvent| event.lsn >= start && event.lsn < end;
        let stays = move |event: &&WalEvent| !turns || event.end_lsn <= end;
        stretch.block.events.iter().filter(inside).filter(stays)
    }

    /// Returns the last of the steps from `at` on, `last` at most, of which the index lists every event of one
    /// class together.
    pub(super) fn listed_together(&self, at: usize, last: usize, class: Class) -> usize {
        let stretch = self.stretch(at, at, last);
        let listed = stretch.filter(|stretch| stretch.is_known() && stretch.block.lists(class));
        listed.map_or(at, |stretch| stretch.to)
    }

    /// Asks for what the index says in detail.
    pub(super) fn refine(stretch: &Stretch<'_>) -> Halt {
        Halt::Rollup(stretch.first)
    }

    /// Returns the first of the steps `from..=to` that may hold a match: its events are loaded, or they alone
    /// can tell.
    pub(crate) fn next_step(&self, from: usize, to: usize, seek: &Seek<'_>) -> Result<Option<usize>, Halt> {
        let mut at = from;
        while at <= to && at < self.chain.len() {
            if self.loaded(at).is_some() {
                return Ok(Some(at));
            }
            match self.stretch(at, at, to) {
                Some(stretch) if stretch.rules_out(seek) => {
                    if self.leaves_open(&stretch) && self.crossing_matches(stretch.to, seek)? {
                        return Ok(Some(stretch.to));
                    }
                    at = stretch.to + 1;
                }
                Some(stretch) if !stretch.block.is_segment => return Err(Self::refine(&stretch)),
                _ => {
                    if self.must_read(at, seek)? {
                        return Ok(Some(at));
                    }
                    at += 1;
                }
            }
        }
        Ok(None)
    }

    /// Returns the last of the steps `0..=from` that may hold a match.
    fn previous_step(&self, from: usize, seek: &Seek<'_>) -> Result<Option<usize>, Halt> {
        let mut next = Some(from);
        while let Some(at) = next {
            if self.loaded(at).is_some() {
                return Ok(Some(at));
            }
            match self.stretch(at, 0, at) {
                Some(stretch) if stretch.rules_out(seek) => {
                    if self.leaves_open(&stretch) && self.crossing_matches(stretch.to, seek)? {
                        return Ok(Some(stretch.to));
                    }
                    next = stretch.from.checked_sub(1);
                }
                Some(stretch) if !stretch.block.is_segment => return Err(Self::refine(&stretch)),
                _ => {
                    if self.must_read(at, seek)? {
                        return Ok(Some(at));
                    }
                    next = at.checked_sub(1);
                }
            }
        }
        Ok(None)
    }

    fn crossing_matches(&self, at: usize, seek: &Seek<'_>) -> Result<bool, Halt> {
        Ok(match self.crossing(at)? {
            Crossing::Nothing => false,
            Crossing::Event(event) => (seek.matches)(&event),
            Crossing::ReadSegments => true,
        })
    }

    /// Returns the summary of step `at`.
    pub(crate) fn summary(&self, at: usize) -> Result<&'a SegmentSummary, Halt> {
        let name = self.chain.step(at).segment;
        if self.evidence.unreadable.contains(&name) {
            return Err(Halt::Unreadable(name));
        }
        if let Some(summary) = self.evidence.summaries.get(&name) {
            return Ok(summary);
        }
        // One that the index tells of is wanted for itself, others probably with those that follow.
        let alone = self.evidence.block_of(name).is_some();
        let wanted = if alone { 1 } else { SUMMARIES_PER_REQUEST };
        let unknown = |name: &SegmentName| {
            !self.evidence.summaries.contains_key(name)
                && !self.evidence.unreadable.contains(name)
                && (alone || self.evidence.block_of(*name).is_none())
        };
        let following = self.chain.steps_from(at).take(SUMMARIES_PER_REQUEST).map(|step| step.segment);
        Err(Halt::Summaries(following.filter(unknown).take(wanted).collect()))
    }

    /// Returns the summary of step `at`, refusing WAL that the decoder could not follow.
    pub(crate) fn decoded(&self, at: usize) -> Result<&'a SegmentSummary, Halt> {
        let summary = self.summary(at)?;
        if let SegmentEnding::Undecoded { reason } = &summary.ending {
            return Err(Refusal::halt_at(
                self.chain.step(at).from,
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
        let step = self.chain.step(at);
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
        Ok(SegmentRequest { segment: self.chain.step(at).segment, following: self.following(at)? })
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
        for next in at + 1..self.chain.len().min(at + 1 + most) {
            following.push(self.chain.step(next).segment);
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

    pub(super) fn crossing(&self, at: usize) -> Result<Crossing, Halt> {
        let summary = self.decoded(at)?;
        if summary.unfinished.is_none() || at + 1 >= self.chain.len() {
            return Ok(Crossing::Nothing);
        }
        if let (Some(record), Some(cut)) = (&summary.unfinished, self.cut)
            && record.lsn >= cut
        {
            return Ok(Crossing::Nothing);
        }
        let step = self.chain.step(at);
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

    /// Returns the first event in the steps `0..=to` that matches one of those at which recovery to the target
    /// stops, with its step. Of segments that were read in vain no events are kept.
    pub(crate) fn decisive(&self, to: usize, seek: &Seek<'_>) -> Result<Option<(usize, &'a WalEvent)>, Halt>
    where
        Self: 'a,
    {
        let mut from = 0;
        while let Some(at) = self.next_step(from, to, seek)? {
            match self.loaded(at) {
                Some(mut events) => {
                    if let Some(event) = events.find(|event| (seek.matches)(event)) {
                        return Ok(Some((at, event)));
                    }
                }
                None if self.evidence.searched.contains(&self.chain.step(at).segment) => {}
                None => return Err(Halt::Search(self.request(at)?)),
            }
            from = at + 1;
        }
        Ok(None)
    }

    /// Returns the first event from step `from` on that matches, with its step.
    pub(crate) fn first(&self, from: usize, seek: &Seek<'_>) -> Result<Option<(usize, &'a WalEvent)>, Halt>
    where
        Self: 'a,
    {
        let mut from = from;
        while let Some(at) = self.next_step(from, usize::MAX, seek)? {
            if let Some(event) = self.events(at)?.find(|event| (seek.matches)(event)) {
                return Ok(Some((at, event)));
            }
            from = at + 1;
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
        let mut next = (!self.chain.is_empty()).then_some(from);
        while let Some(from) = next {
            let Some(at) = self.previous_step(from, seek)? else { return Ok(None) };
            let found = self.events(at)?.rev().find(|event| event.lsn < cut && (seek.matches)(event));
            if let Some(event) = found {
                return Ok(Some((at, event)));
            }
            next = at.checked_sub(1);
        }
        Ok(None)
    }

    /// Returns whether only the events of step `at` can tell whether one matches.
    fn must_read(&self, at: usize, seek: &Seek<'_>) -> Result<bool, Halt> {
        let known = self.stretch(at, at, at).filter(|stretch| stretch.block.is_segment && stretch.is_known());
        if let Some(stretch) = known {
            let block = stretch.block;
            let open = self.leaves_open(&stretch);
            return Ok(
                (seek.maybe)(&block.facts, &block.events) || (open && self.crossing_matches(at, seek)?)
            );
        }
        let summary = self.decoded(at)?;
        Ok((seek.maybe)(&Facts::of(summary, 0), &summary.events) || self.crossing_matches(at, seek)?)
    }

    /// Returns the events of one class in the steps `from..=to`, those of a commit or an abort that drops
    /// nothing not among them; asks for all events of a segment whose summary had no room.
    pub(crate) fn notable(&self, from: usize, to: usize, class: Class) -> Result<Vec<WalEvent>, Halt> {
        let mut found = Vec::new();
        let mut at = from;
        while at <= to && at < self.chain.len() {
            match self.stretch(at, at, to) {
                Some(stretch) if stretch.is_known() && stretch.block.lists(class) => {
                    found.extend(self.listed(&stretch).cloned());
                    if self.leaves_open(&stretch) {
                        match self.crossing(stretch.to)? {
                            Crossing::Nothing => {}
                            Crossing::Event(event) => found.push(event),
                            Crossing::ReadSegments => {
                                found.retain(|event| event.lsn < self.chain.step(stretch.to).from);
                                found.extend(self.events(stretch.to)?.cloned());
                            }
                        }
                    }
                    at = stretch.to + 1;
                }
                Some(stretch) if !stretch.block.is_segment => return Err(Self::refine(&stretch)),
                _ => {
                    found.extend(self.notable_of(at)?);
                    at += 1;
                }
            }
        }
        found.retain(|event| Class::of(event) == Some(class));
        Ok(found)
    }

    fn notable_of(&self, at: usize) -> Result<Vec<WalEvent>, Halt> {
        if let Some(events) = self.loaded(at) {
            return Ok(events.cloned().collect());
        }
        let summary = self.decoded(at)?;
        let crossing = self.crossing(at)?;
        if summary.events_truncated || matches!(crossing, Crossing::ReadSegments) {
            return Err(Halt::Events(vec![self.request(at)?]));
        }
        let step = self.chain.step(at);
        let inside = |event: &&WalEvent| event.lsn >= step.from && event.lsn < step.to;
        let mut events: Vec<_> = summary.events.iter().filter(inside).cloned().collect();
        if let Crossing::Event(event) = crossing {
            events.push(event);
        }
        Ok(events)
    }

    /// Returns the latest events of one class, newest first, until `enough` says so.
    pub(crate) fn latest(&self, class: Class, mut enough: impl FnMut(&WalEvent) -> bool) -> Result<(), Halt> {
        let seek = Seek {
            maybe: &|facts, events| {
                facts.more.has(class) || events.iter().any(|event| Class::of(event) == Some(class))
            },
            matches: &|event| Class::of(event) == Some(class),
        };
        let mut next = self.chain.len().checked_sub(1);
        while let Some(from) = next {
            // A whole block's list serves as well as that of a single step.
            let listed = self.stretch(from, 0, from).filter(|stretch| stretch.block.lists(class));
            let (begin, stop) = match listed {
                Some(stretch) => (stretch.from, from),
                None => match self.previous_step(from, &seek)? {
                    Some(at) => (at, at),
                    None => return Ok(()),
                },
            };
            for event in self.notable(begin, stop, class)?.iter().rev() {
                if enough(event) {
                    return Ok(());
                }
            }
            next = begin.checked_sub(1);
        }
        Ok(())
    }

    /// Returns whether the index says that every checkpoint in the steps `0..=last` was made after `latest`.
    pub(crate) fn began_after(&self, last: usize, latest: DateTime<Utc>) -> bool {
        let mut at = 0;
        while at <= last && at < self.chain.len() {
            let known = self.stretch(at, at, last).filter(Stretch::is_known);
            // Whether a record that leaves the block is a checkpoint is not asked here.
            let Some(stretch) = known.filter(|stretch| !self.leaves_open(stretch)) else { return false };
            if stretch.block.facts.first_checkpoint.is_some_and(|first| first <= latest) {
                return false;
            }
            at = stretch.to + 1;
        }
        true
    }

    /// Returns the position after the last byte of valid WAL in step `at`.
    fn end_of_wal(&self, at: usize) -> Result<Lsn, Halt> {
        let segment = self.chain.step(at).segment;
        match (self.evidence.summaries.get(&segment), self.stretch(at, at, at)) {
            (Some(summary), _) => Ok(summary.end_of_wal),
            (None, Some(stretch)) if stretch.block.is_segment => {
                Ok(Lsn(segment.start(self.size).0.saturating_add(stretch.block.facts.wal_bytes)))
            }
            (None, Some(stretch)) => Err(Self::refine(&stretch)),
            (None, None) => Ok(self.summary(at)?.end_of_wal),
        }
    }

    /// Returns how much WAL the steps `0..=last` hold before `end`; what a switch left empty is not counted.
    pub(crate) fn wal_bytes(&self, last: usize, end: Lsn) -> Result<u64, Halt> {
        let mut bytes = 0;
        let mut at = 0;
        while at <= last && at < self.chain.len() {
            let step = self.chain.step(at);
            let whole =
                |stretch: &Stretch<'_>| self.is_whole(stretch) && self.chain.step(stretch.to).to <= end;
            match self.stretch(at, at, last).filter(whole) {
                Some(stretch) => {
                    bytes = u64::saturating_add(bytes, stretch.block.facts.wal_bytes);
                    at = stretch.to + 1;
                }
                None => {
                    let end = self.end_of_wal(at)?.min(step.to).min(end);
                    bytes = u64::saturating_add(bytes, end.bytes_since(step.from));
                    at += 1;
                }
            }
        }
        Ok(bytes)
    }

    /// Returns whether a stretch is all that its block covers, every segment used from start to end.
    fn is_whole(&self, stretch: &Stretch<'_>) -> bool {
        let (first, last) = (self.chain.step(stretch.from), self.chain.step(stretch.to));
        self.is_covered(stretch)
            && first.from == first.segment.start(self.size)
            && last.to == last.segment.end(self.size)
    }

    /// Returns whether an event that is known belongs to this segment.
    pub(crate) fn tells_of(&self, segment: SegmentName, event: &WalEvent) -> bool {
        let in_block = self.evidence.block_of(segment).is_some_and(|(_, block)| block.events.contains(event));
        let in_summary =
            self.evidence.summaries.get(&segment).is_some_and(|summary| summary.events.contains(event));
        let in_events = self.evidence.events.get(&segment).is_some_and(|events| events.contains(event));
        in_block || in_summary || in_events
    }

    /// Returns whether a stretch is all that its block covers.
    fn is_covered(&self, stretch: &Stretch<'_>) -> bool {
        let (first, last) = (self.chain.step(stretch.from).segment, self.chain.step(stretch.to).segment);
        !stretch.block.has_gaps && first == stretch.first && last == stretch.block.last
    }

    /// Returns how much the objects of the steps `from..=to` take.
    pub(crate) fn stored_bytes(
        &self,
        segments: &StoredSegments,
        from: usize,
        to: usize,
    ) -> Result<u64, Halt> {
        let mut bytes = 0;
        let mut at = from;
        while at <= to && at < self.chain.len() {
            let first = self.chain.step(at).segment;
            let last = self.chain.step(to.min(self.chain.last_in_span(at))).segment;
            if let Some((end, piece)) = segments.piece(first, last) {
                bytes = u64::saturating_add(bytes, piece);
                at += (end.number(self.size) - first.number(self.size)) as usize + 1;
                continue;
            }
            match self.stretch(at, at, to) {
                Some(stretch) if self.is_covered(&stretch) => {
                    bytes = u64::saturating_add(bytes, stretch.block.facts.stored_bytes);
                    at = stretch.to + 1;
                }
                Some(stretch) if !stretch.block.is_segment => return Err(Self::refine(&stretch)),
                // Where nothing is known of a single one, nothing is counted.
                _ => at += 1,
            }
        }
        Ok(bytes)
    }

    /// Returns the first record that starts at or after `at`, `None` when no whole one is stored.
    pub(crate) fn record_at(&self, at: Lsn) -> Result<Option<RecordBounds>, Halt> {
        let Some(first_step) = self.chain.step_of(at.max(self.chain.start)) else { return Ok(None) };
        for number in first_step..self.chain.len() {
            let step = self.chain.step(number);
            let from = at.max(step.from);
            let known = self.evidence.records.get(&(step.segment, from));
            let Some(known) = known else {
                self.decoded(number)?;
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
        for at in (0..self.chain.len()).rev() {
            let step = self.chain.step(at);
            let summary = self.decoded(at)?;
            if step.to < step.segment.end(self.size) {
                // A parent's copy that is used up to a switch point: a record ends there.
                return Ok(step.to);
            }
            if summary.ending == SegmentEnding::Switch {
                // The switch record reaches to the segment's end.
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
