//! Makes roll-ups: parts in any order, neighbours joined once, the same bytes for the same segments.

use std::collections::BTreeMap;

use super::{Class, EDGES_MAX, Entry, FANOUT, FORMAT, Facts, Place, RUNS_MAX, Rollup, Run, span};
use crate::pg::{SegmentName, SegmentSize};
use crate::wal::event::WalEvent;
use crate::wal::summary::{Edge, Joined, SegmentSummary, join_edges};

/// How much JSON the events of one class may take.
const CLASS_BYTES_MAX: usize = 64 << 10;

/// What a roll-up is made of: one entry, with all that is needed to join it with its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    entry: Entry,
    events: Vec<WalEvent>,
    edges: Vec<Edge>,
}

impl Part {
    /// Returns the part for one segment. `digest` is that of its plaintext, in hex.
    pub fn of_segment(summary: &SegmentSummary, digest: String, stored_bytes: u64) -> Self {
        let facts = Facts::of(summary, stored_bytes);
        let listed = |event: &&WalEvent| Class::of(event).is_some_and(|class| !facts.more.has(class));
        Self {
            events: summary.events.iter().filter(listed).cloned().collect(),
            entry: Entry { runs: vec![Run { first: summary.segment, segments: 1 }], digest, facts },
            edges: vec![Edge::of(summary)],
        }
    }

    /// Returns the part for a roll-up of the level below. `digest` is that of its JSON, in hex.
    pub fn of_rollup(rollup: Rollup, digest: String) -> Self {
        let entry = Entry { runs: rollup.runs(), digest, facts: rollup.facts() };
        let mut events = rollup.events;
        events.retain(|event| {
            Class::of(event).is_some_and(|class| class != Class::Checkpoints && !entry.facts.more.has(class))
        });
        Self { entry, events, edges: rollup.edges }
    }

    /// Takes a roll-up of the same place apart, so that more can be added to it.
    pub fn of_former(rollup: Rollup) -> Vec<Self> {
        let (size, below) = (rollup.segment_size, span(rollup.level - 1));
        let mut parts: BTreeMap<u64, Self> = BTreeMap::new();
        for entry in rollup.entries {
            if let Some(first) = entry.runs.first().map(|run| run.first) {
                let part = Self { entry, events: Vec::new(), edges: Vec::new() };
                parts.insert(first.number(size) / below, part);
            }
        }
        for event in rollup.events {
            if let Some(part) = parts.get_mut(&(event.lsn.0 / size.bytes() / below)) {
                part.events.push(event);
            }
        }
        for edge in rollup.edges {
            if let Some(part) = parts.get_mut(&(edge.segment.number(size) / below)) {
                part.edges.push(edge);
            }
        }
        parts.into_values().collect()
    }

    /// Returns the name of the first segment that it covers.
    pub fn first(&self) -> Option<SegmentName> {
        self.entry.runs.first().map(|run| run.first)
    }

    /// Returns the digest of what it was made of.
    pub fn digest(&self) -> &str {
        &self.entry.digest
    }
}

/// Returns the roll-up of these parts; `None` when there are none, or it would be too large to be of use.
///
/// Parts that lie elsewhere are left out; of several for one entry the last counts. A part of a former
/// roll-up whose neighbour is another than it was must not be given: it was joined with the old one.
pub fn build(
    place: Place,
    size: SegmentSize,
    system_identifier: u64,
    parts: impl IntoIterator<Item = Part>,
) -> Option<Rollup> {
    let below = span(place.level - 1);
    let mut sorted: BTreeMap<u64, Part> = BTreeMap::new();
    for part in parts {
        let Some(first) = part.first().filter(|first| first.timeline == place.timeline) else { continue };
        let number = first.number(size);
        if (place.first..place.end()).contains(&number) {
            sorted.insert(number / below, part);
        }
    }
    let mut parts: Vec<Part> = sorted.into_values().collect();
    let runs: usize = parts.iter().map(|part| part.entry.runs.len()).sum();
    if parts.is_empty() || parts.len() as u64 > FANOUT || runs > RUNS_MAX {
        return None;
    }
    for at in 1..parts.len() {
        let (before, behind) = parts.split_at_mut(at);
        if let (Some(before), Some(behind)) = (before.last_mut(), behind.first_mut()) {
            join_parts(before, behind, size);
        }
    }
    keep_what_fits(&mut parts);
    let mut rollup = Rollup {
        format: FORMAT,
        timeline: place.timeline,
        level: place.level,
        start: place.start_lsn(size),
        segment_size: size,
        system_identifier,
        entries: Vec::with_capacity(parts.len()),
        events: Vec::new(),
        edges: Vec::new(),
    };
    for part in parts {
        rollup.entries.push(part.entry);
        rollup.events.extend(part.events);
        rollup.edges.extend(part.edges);
    }
    rollup.events.sort_by_key(|event| event.lsn);
    for edge in rollup.edges.iter_mut().skip(EDGES_MAX) {
        edge.forget_bytes();
    }
    Some(rollup)
}

/// Joins the last segment of a part with the first of the next, if they are neighbours and not joined yet.
fn join_parts(before: &mut Part, behind: &mut Part, size: SegmentSize) {
    let (Some(last), Some(first)) = (before.edges.last_mut(), behind.edges.first_mut()) else { return };
    let ends_there = |run: &Run| run.first.number(size) + run.segments - 1 == last.segment.number(size);
    let begins_there = |run: &Run| run.first == first.segment;
    let at_the_ends = before.entry.runs.last().is_some_and(ends_there)
        && behind.entry.runs.first().is_some_and(begins_there);
    let open = last.open_end && first.open_start;
    if !open || !at_the_ends || last.segment.next(size) != Some(first.segment) {
        return;
    }
    match join_edges(last, first, size) {
        Joined::None => {}
        Joined::NotOfInterest => {
            before.entry.facts.counts.records = before.entry.facts.counts.records.saturating_add(1);
        }
        Joined::ReadSegments => before.entry.facts.unread = before.entry.facts.unread.saturating_add(1),
        Joined::Event(event) => {
            before.entry.facts.add_crossing(&event);
            if Class::of(&event).is_some_and(|class| !before.entry.facts.more.has(class)) {
                before.events.push(event);
            }
        }
    }
    // Nobody needs these sides any more; an edge without its other side goes.
    last.close_end();
    first.close_start();
    if last.is_closed() {
        before.edges.pop();
    }
    if first.is_closed() {
        behind.edges.remove(0);
    }
}

/// Keeps the events of each class, entry after entry, until one has no room: from there on none, so that
/// what is kept does not depend on the order in which entries came.
fn keep_what_fits(parts: &mut [Part]) {
    for class in Class::ALL {
        let mut room = CLASS_BYTES_MAX;
        for part in &mut *parts {
            let own = part.events.iter().filter(|event| Class::of(event) == Some(class));
            let bytes: usize = own
                .map(|event| serde_json::to_vec(event).map_or(usize::MAX, |json| json.len() + 1))
                .fold(0, usize::saturating_add);
            if !part.entry.facts.more.has(class) && bytes <= room {
                room -= bytes;
                continue;
            }
            if bytes > room {
                room = 0;
                part.entry.facts.more.insert(class);
            }
            part.events.retain(|event| Class::of(event) != Some(class));
        }
    }
}
