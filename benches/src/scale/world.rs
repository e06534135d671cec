//! An archive of ten million segments, every part of which can be told without the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};
use walship::archive::push::encode_segment;
use walship::codec::{Compression, Digest, EncodedObject};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walship::wal::event::EventKind;
use walship::wal::rollup::build::{Part, build};
use walship::wal::rollup::{Place, Rollup, span};
use walship::wal::scan::SegmentScanner;
use walship::wal::summary::SegmentSummary;
use walship::wal::testing::WalBuilder;

pub(super) const SYSTEM: u64 = 7_123_456_789_012_345_678;

/// How large an archive is, and what befell it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) segments: u64,
    pub(super) size: SegmentSize,
    /// Whether each segment ends with a switch after its few records, as `archive_timeout` leaves them, and is
    /// small where it is stored. Otherwise it is full of records.
    pub(super) switched: bool,
    /// A backup begins in the middle of each so many segments.
    pub(super) backup_every: u64,
    /// From this segment on the clock is behind.
    pub(super) step_back_at: u64,
    /// By the time of so many segments: of an hour, where there is room for that.
    pub(super) step_back_by: u64,
    /// Number, first segment, segment behind the last. A server begins with segment 1.
    pub(super) timelines: [(u32, u64, u64); 3],
    /// A segment that was archived when the roll-up of its log was written already: archiving alone then
    /// leaves the log, and the logs around it, out of the roll-ups above.
    pub(super) late: Option<u64>,
}

impl Shape {
    /// Ten million segments and a thousand backups.
    pub(super) const LARGE: Self = Self::of(10_000_000, 1000);
    /// What a test has time for.
    #[cfg(test)]
    pub(super) const SMALL: Self = Self::of(15_000, 150);
    /// A hundred thousand objects, small enough to be stored one by one.
    pub(super) const STORED: Self = Self::switched(94_000, 40);
    /// What a test has time to store: three pages of keys.
    #[cfg(test)]
    pub(super) const STORED_SMALL: Self = Self { step_back_by: 50, ..Self::switched(1_950, 8) };

    const fn of(segments: u64, backups: u64) -> Self {
        let (second, third) = (segments / 10 * 4, segments / 10 * 7);
        Self {
            segments,
            size: SegmentSize::DEFAULT,
            switched: false,
            backup_every: segments / backups,
            step_back_at: segments / 2,
            step_back_by: 900,
            timelines: [(1, 1, second), (2, second, third), (3, third, segments + 1)],
            late: None,
        }
    }

    const fn switched(segments: u64, backups: u64) -> Self {
        Self { size: SegmentSize::MIN, switched: true, ..Self::of(segments, backups) }
    }

    /// Returns how many backups there are.
    pub(super) fn backups(self) -> u64 {
        self.segments / self.backup_every
    }

    /// Returns whether a backup was begun while the clock ran through some time for the first or second time.
    pub(super) fn has_backup_at_repeated_times(self) -> bool {
        let repeated = self.step_back_at - self.step_back_by..self.step_back_at + self.step_back_by;
        repeated.into_iter().any(|number| self.is_backup(number))
    }

    pub(super) fn is_backup(self, number: u64) -> bool {
        number % self.backup_every == self.backup_every / 2
    }

    fn has_checkpoint(self, number: u64) -> bool {
        number.is_multiple_of(75) || self.is_backup(number)
    }

    /// Returns the time of the first commit in a segment; the second is two seconds later.
    pub(super) fn commit_time(self, number: u64) -> DateTime<Utc> {
        let back = if number >= self.step_back_at { self.step_back_by } else { 0 };
        DateTime::from_timestamp(START + (number - back) as i64 * SECONDS, 0).expect("a time of this century")
    }

    pub(super) fn name(self, timeline: TimelineId, number: u64) -> SegmentName {
        SegmentName::from_number(timeline, number, self.size).expect("far from the LSN space's end")
    }

    /// Returns the first segment of a timeline and the one behind its last.
    pub(super) fn range(self, timeline: TimelineId) -> (u64, u64) {
        let found = self.timelines.iter().find(|(number, ..)| *number == timeline.get());
        found.map_or((0, 0), |(_, first, end)| (*first, *end))
    }
}
/// Seconds from one segment to the next.
const SECONDS: i64 = 4;
/// 2026-01-01 in seconds after 1970, and 2000-01-01.
const START: i64 = 1_767_225_600;
const POSTGRES_EPOCH: i64 = 946_684_800;
/// What every segment object is said to take.
pub(super) const STORED_BYTES: u64 = 5_000_000;

/// Returns the transaction that commits first in a segment; the next one commits second, the third never ends.
pub(super) fn xid(number: u64) -> u64 {
    1000 + 3 * number
}

/// A roll-up: its place and how many segments there were when it was written, from the first that an
/// archiver put into it.
pub(super) type Node = (Place, u64);

pub(super) struct World {
    pub(super) shape: Shape,
    /// A scanned segment without and with a checkpoint, on number 1.
    templates: [SegmentSummary; 2],
    nodes: Mutex<HashMap<Node, Arc<Rollup>>>,
}

impl World {
    pub(super) fn new(shape: Shape) -> Self {
        let scanned = |checkpoint| {
            let bytes = bytes_of(shape, TimelineId::FIRST, 1, checkpoint);
            let mut scanner = SegmentScanner::new(shape.name(TimelineId::FIRST, 1), shape.size);
            scanner.push(&bytes);
            scanner.finish().summary
        };
        Self { shape, templates: [scanned(false), scanned(true)], nodes: Mutex::default() }
    }

    /// Returns what a scan of the segment would say.
    pub(super) fn summary(&self, timeline: TimelineId, number: u64) -> SegmentSummary {
        let segment = self.shape.name(timeline, number);
        let size = self.shape.size.bytes();
        let shift = |lsn: Lsn| Lsn(lsn.0 - size + number * size);
        let mut summary = self.templates[usize::from(self.shape.has_checkpoint(number))].clone();
        let [first, second] = [0, 1].map(|at| (xid(number) + at) as u32);
        summary.segment = segment;
        summary.first_page_timeline = timeline;
        summary.first_record = summary.first_record.map(shift);
        summary.end_of_wal = shift(summary.end_of_wal);
        summary.ended_xids = Some((first, second));
        if let (Some(min), Some(max)) = (&mut summary.min_time, &mut summary.max_time) {
            (min.lsn, min.xid, min.time) = (shift(min.lsn), first, self.shape.commit_time(number));
            (max.lsn, max.xid) = (shift(max.lsn), second);
            max.time = self.shape.commit_time(number) + chrono::TimeDelta::seconds(2);
        }
        for event in &mut summary.events {
            (event.lsn, event.end_lsn) = (shift(event.lsn), shift(event.end_lsn));
            if let EventKind::Checkpoint { redo, time, timeline: own, .. } = &mut event.kind {
                (*redo, *time, *own) = (shift(*redo), self.shape.commit_time(number), timeline);
            }
        }
        summary
    }

    /// Returns the segment as it is stored.
    pub(super) fn object(&self, timeline: TimelineId, number: u64) -> EncodedObject {
        let bytes = bytes_of(self.shape, timeline, number, self.shape.has_checkpoint(number));
        let mut scanner = SegmentScanner::new(self.shape.name(timeline, number), self.shape.size);
        scanner.push(&bytes);
        assert_eq!(scanner.finish().summary, self.summary(timeline, number), "{number}");
        encode_segment(self.shape.name(timeline, number), &bytes, Compression::default())
            .expect("it is that segment")
    }

    /// Returns the first segment that the roll-up of a place covers and how many it covers when it is fullest,
    /// as archiving alone leaves it: of level 1 each sixteen and the end of a timeline that was left, above only
    /// what is full below.
    pub(super) fn coverage(&self, place: Place) -> Option<(u64, u64)> {
        let (first, end) = self.shape.range(place.timeline);
        let below = if place.level == 1 { 1 } else { span(place.level - 1) };
        let from = place.first.max(first).next_multiple_of(below);
        // A boundary is passed when the segment behind it arrives.
        let was_left = end <= self.shape.segments;
        let passed = if was_left { end } else { end - 1 }.min(place.end());
        let written = if place.level > 1 {
            below
        } else if was_left {
            1
        } else {
            16
        };
        let to = passed / written * written;
        (to > from).then(|| (from, to - from))
    }

    /// Returns the versions of a place's roll-up, by how many segments there were.
    pub(super) fn versions(&self, place: Place) -> Vec<u64> {
        let Some((from, most)) = self.coverage(place) else { return Vec::new() };
        let step = if place.level == 1 { 16 } else { span(place.level - 1) };
        let end = from + most;
        let boundaries = (from / step * step..=end).step_by(step as usize).filter(|at| *at > from);
        let boundaries = boundaries.chain(Some(end).filter(|end| !end.is_multiple_of(step)));
        // One that would say nothing new is not written.
        let news = |at: &u64| place.level == 1 || self.left_out(place).is_none_or(|(_, end)| end != *at);
        boundaries.filter(news).map(|at| at - from).collect()
    }

    /// Returns the segments that the roll-ups of a place leave out because one of them came late.
    fn left_out(&self, place: Place) -> Option<(u64, u64)> {
        let late = self.shape.late.filter(|late| (place.first..place.end()).contains(late))?;
        let (first, end) = self.shape.range(place.timeline);
        if !(first..end).contains(&late) {
            return None;
        }
        // Only what is full goes into the roll-up above.
        let below = span(place.level - 1);
        Some((late / below * below, late / below * below + below))
    }

    /// Returns how many segments a roll-up covers.
    pub(super) fn covered(&self, (place, count): Node) -> u64 {
        let (from, _) = self.coverage(place).expect("only what was written is asked for");
        let out = self
            .left_out(place)
            .map_or(0, |(first, end)| end.min(from + count).saturating_sub(first.max(from)));
        count - out
    }

    /// Returns the roll-up of a place that covers so many segments.
    pub(super) fn version_of(&self, place: Place, covered: u64) -> Option<u64> {
        self.versions(place).into_iter().find(|count| self.covered((place, *count)) == covered)
    }

    /// Returns a roll-up, the digests in it made up.
    pub(super) fn node(&self, node: Node) -> Arc<Rollup> {
        let known = |nodes: &HashMap<Node, Arc<Rollup>>| nodes.get(&node).cloned();
        if let Some(found) = known(&self.nodes.lock().expect("no test panicked")) {
            return found;
        }
        let (place, count) = node;
        let (from, _) = self.coverage(place).expect("only what was written is asked for");
        let timeline = place.timeline;
        let out = self.left_out(place).unwrap_or((0, 0));
        let covered = |number: &u64| !(out.0..out.1).contains(number);
        let rollup = if place.level == 1 {
            let parts = (from..from + count).filter(covered).map(|number| {
                let digest = made_up(&format!("{timeline} {number}"));
                Part::of_segment(&self.summary(timeline, number), digest, STORED_BYTES)
            });
            build(place, self.shape.size, SYSTEM, parts)
        } else {
            let below = span(place.level - 1);
            let parts = (from..from + count).step_by(below as usize).filter(covered).map(|first| {
                let child = (Place { timeline, level: place.level - 1, first }, below);
                Part::of_rollup((*self.node(child)).clone(), made_up(&format!("{child:?}")))
            });
            build(place, self.shape.size, SYSTEM, parts)
        };
        let rollup = Arc::new(rollup.expect("it has parts"));
        if place.level > 1 {
            self.nodes.lock().expect("no test panicked").insert(node, rollup.clone());
        }
        rollup
    }
}

/// Returns a digest of content that nobody made.
pub(super) fn made_up(of: &str) -> String {
    Digest::of(of.as_bytes()).to_string()
}

fn bytes_of(shape: Shape, timeline: TimelineId, number: u64, checkpoint: bool) -> Vec<u8> {
    let mut wal = WalBuilder::new(17, shape.size, SYSTEM).starting_at(number);
    wal.set_timeline(timeline);
    let seconds = shape.commit_time(number).timestamp();
    let micros = (seconds - POSTGRES_EPOCH) * 1_000_000;
    wal.commit(xid(number) as u32, micros);
    if checkpoint {
        let mut main = [0; 88];
        let redo = number * shape.size.bytes() + 40;
        main[..8].copy_from_slice(&redo.to_le_bytes());
        main[8..12].copy_from_slice(&timeline.get().to_le_bytes());
        main[24..32].copy_from_slice(&1000u64.to_le_bytes());
        main[64..72].copy_from_slice(&seconds.to_le_bytes());
        wal.record(0, 0, 0x10, &main);
    }
    wal.commit(xid(number) as u32 + 1, micros + 2_000_000);
    if shape.switched {
        wal.switch();
    } else {
        wal.fill_segment(0);
    }
    wal.segments().remove(0).1
}
