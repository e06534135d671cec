//! Roll-ups: what many segments hold, in one bounded document; a tree of them answers for millions.
//!
//! A [`Rollup`] of level 1 stands for 256 consecutive segments of a timeline (a *log*), one of level 2 for
//! 256 logs, and so on. It is a cache: everything in it comes from the segments' own summaries.
//! [`build::build`] makes one from [`build::Part`]s, in any order; this file says what it is and checks what
//! was read. `docs/repository-format.md` lists the fields.

pub mod build;
mod facts;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::event::WalEvent;
use super::summary::Edge;
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

pub use facts::{Class, Classes, Facts};

/// The version of the document that this code writes, and the highest it reads.
pub const FORMAT: u32 = 1;

/// How many segments a log has, and how many roll-ups of one level the next has.
pub const FANOUT: u64 = 256;

/// The highest level.
pub const LEVEL_MAX: u8 = 4;

/// The longest document in plain JSON, in bytes.
pub const BYTES_MAX: u64 = 4 << 20;

/// The most unbroken runs that one document names.
pub const RUNS_MAX: usize = 4096;

/// How many edges keep their fragments.
const EDGES_MAX: usize = 64;

/// Returns how many segments a roll-up of this level stands for.
pub fn span(level: u8) -> u64 {
    FANOUT.pow(u32::from(level.min(LEVEL_MAX)))
}

/// What a roll-up stands for: its place in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The timeline.
    pub timeline: TimelineId,
    /// The level, from 1.
    pub level: u8,
    /// The number of the first segment that it stands for.
    pub first: u64,
}

impl Place {
    /// Returns the place of the roll-up that stands for this segment.
    pub fn of(segment: SegmentName, size: SegmentSize, level: u8) -> Self {
        Self { timeline: segment.timeline, level, first: segment.number(size) / span(level) * span(level) }
    }

    /// Returns the place above; `None` at the highest level.
    pub fn parent(self) -> Option<Self> {
        let level = self.level + 1;
        (level <= LEVEL_MAX).then(|| Self { level, first: self.first / span(level) * span(level), ..self })
    }

    /// Returns the number behind the last segment that it stands for.
    pub fn end(self) -> u64 {
        self.first.saturating_add(span(self.level))
    }

    /// Returns the position of the first byte that it stands for.
    pub fn start_lsn(self, size: SegmentSize) -> Lsn {
        Lsn(self.first.saturating_mul(size.bytes()))
    }
}

/// Consecutive segments of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(SegmentName, u64)", into = "(SegmentName, u64)")]
pub struct Run {
    /// The first.
    pub first: SegmentName,
    /// How many; at least one.
    pub segments: u64,
}

impl From<(SegmentName, u64)> for Run {
    fn from((first, segments): (SegmentName, u64)) -> Self {
        Self { first, segments }
    }
}

impl From<Run> for (SegmentName, u64) {
    fn from(run: Run) -> Self {
        (run.first, run.segments)
    }
}

/// One segment (level 1) or one roll-up of the level below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The unbroken runs of segments that it covers, in WAL order.
    pub runs: Vec<Run>,
    /// In hex: the digest of the segment, or of the roll-up's JSON.
    pub digest: String,
    /// What they hold.
    #[serde(flatten)]
    pub facts: Facts,
}

impl Entry {
    /// Returns how many segments it covers.
    pub fn segments(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.segments))
    }
}

/// What one entry of a roll-up says, by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The last segment that it covers; there may be gaps before it.
    pub last: SegmentName,
    /// Whether it is a single segment.
    pub is_segment: bool,
    /// Whether segments before the last are not covered: they may be stored by now.
    pub has_gaps: bool,
    /// What its segments hold; without the record that leaves the last one when `open_end` says so.
    pub facts: Facts,
    /// Their events, without those of classes that [`Facts::more`] names.
    pub events: Vec<WalEvent>,
    /// Whether a record begins in the last segment whose end the roll-up does not cover.
    pub open_end: bool,
}

impl Block {
    /// Returns whether `events` holds all events of this class.
    pub fn lists(&self, class: Class) -> bool {
        !self.facts.more.has(class) && (class != Class::Checkpoints || self.is_segment)
    }
}

/// What many segments hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollup {
    /// The format of the document: [`FORMAT`].
    pub format: u32,
    /// The timeline.
    pub timeline: TimelineId,
    /// The level, from 1.
    pub level: u8,
    /// The position of the first byte that it stands for.
    pub start: Lsn,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The cluster's system identifier.
    #[serde(with = "super::summary::decimal")]
    pub system_identifier: u64,
    /// What it covers, in WAL order.
    pub entries: Vec<Entry>,
    /// The entries' events in WAL order, without those of classes that an entry's [`Facts::more`] names.
    pub events: Vec<WalEvent>,
    /// What is needed to join the ends of unbroken runs with their neighbours once these are there.
    pub edges: Vec<Edge>,
}

impl Rollup {
    /// Returns its place in the tree.
    pub fn place(&self) -> Place {
        Place { timeline: self.timeline, level: self.level, first: self.start.0 / self.segment_size.bytes() }
    }

    /// Returns how many segments it covers.
    pub fn segments(&self) -> u64 {
        self.entries.iter().fold(0, |sum, entry| sum.saturating_add(entry.segments()))
    }

    /// Returns the unbroken runs that it covers, those of neighbouring entries joined.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for run in self.entries.iter().flat_map(|entry| &entry.runs) {
            match runs.last_mut() {
                Some(last)
                    if last.first.number(self.segment_size) + last.segments
                        == run.first.number(self.segment_size) =>
                {
                    last.segments += run.segments;
                }
                _ => runs.push(*run),
            }
        }
        runs
    }

    /// Returns what all its segments hold.
    pub fn facts(&self) -> Facts {
        let mut all = Facts::default();
        self.entries.iter().for_each(|entry| all.add(&entry.facts));
        all
    }

    /// Returns whether a record begins in this segment whose end is not covered.
    pub fn open_end(&self, segment: SegmentName) -> bool {
        self.edges.iter().any(|edge| edge.segment == segment && edge.unfinished.is_some())
    }

    /// Returns its entries one by one, each with the first segment that it covers.
    pub fn blocks(&self) -> Vec<(SegmentName, Block)> {
        let size = self.segment_size;
        let mut blocks = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let (Some(first), Some(run)) = (entry.runs.first(), entry.runs.last()) else { continue };
            let number = run.first.number(size).saturating_add(run.segments.saturating_sub(1));
            let Some(last) = SegmentName::from_number(self.timeline, number, size) else { continue };
            let from = self.events.partition_point(|event| event.lsn < first.first.start(size));
            let to = self.events.partition_point(|event| event.lsn < last.end(size));
            let block = Block {
                last,
                is_segment: self.level == 1,
                has_gaps: entry.runs.len() > 1,
                facts: entry.facts.clone(),
                events: self.events.get(from..to).unwrap_or_default().to_vec(),
                open_end: self.open_end(last),
            };
            blocks.push((first.first, block));
        }
        blocks
    }

    /// Checks everything that readers rely on.
    ///
    /// # Errors
    /// What is wrong, a lowercase fact.
    pub fn check(&self) -> Result<(), &'static str> {
        let (size, place) = (self.segment_size, self.place());
        if !(1..=LEVEL_MAX).contains(&self.level) {
            return Err("its level does not exist");
        }
        if place.start_lsn(size) != self.start || !place.first.is_multiple_of(span(self.level)) {
            return Err("it starts where no roll-up does");
        }
        if self.entries.is_empty() || self.entries.len() as u64 > FANOUT {
            return Err("it has no entries, or more than there can be");
        }
        if self.entries.iter().map(|entry| entry.runs.len()).sum::<usize>() > RUNS_MAX {
            return Err("it has more runs than there can be");
        }
        let below = span(self.level - 1);
        let (mut next, mut group) = (place.first, None);
        for entry in &self.entries {
            let Some(first) = entry.runs.first() else { return Err("an entry covers nothing") };
            let own = first.first.number(size) / below;
            if group.is_some_and(|group| group >= own) {
                return Err("its entries are not in order");
            }
            group = Some(own);
            for run in &entry.runs {
                let number = run.first.number(size);
                if run.first.timeline != self.timeline || !run.first.is_legal(size) || run.segments == 0 {
                    return Err("a run is not of its timeline");
                }
                // Runs lie behind each other, and in the range of their entry.
                let end = number.saturating_add(run.segments);
                if number < next || end > (own + 1).saturating_mul(below) || end > place.end() {
                    return Err("its runs are not in order");
                }
                next = end;
            }
            let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            if entry.digest.len() != 64 || !entry.digest.bytes().all(hex) {
                return Err("an entry has no digest");
            }
        }
        if !self.events.is_sorted_by_key(|event| event.lsn) {
            return Err("its events are not in order");
        }
        Ok(())
    }
}
