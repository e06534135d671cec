//! Reads one segment: what it holds, and whether it is what its name says and whole.

use super::decode::{decode, is_heap_delete, is_of_interest, is_time, is_transaction_end};
use super::deletes::DeleteTally;
use super::event::{EventKind, WalEvent};
use super::layout::Layout;
use super::reader::{Reader, Stop, StopReason};
use super::record::{Record, RecordHeader, UnknownLayout};
use super::summary::{Counts, Fragment, SegmentEnding, SegmentSummary, StopTime};
use super::xact::TransactionEnd;
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// What a [`SegmentScanner`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentScan {
    /// What the segment holds. With [`Verdict::Mismatch`] only as much of it as makes sense.
    pub summary: SegmentSummary,
    /// Whether it may stand under its name.
    pub verdict: Verdict,
}

/// Whether a file may stand under a segment's name.
///
/// The system identifier is not judged here; compare [`SegmentSummary::system_identifier`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Valid WAL reaches the segment's end, or a switch record.
    Whole,
    /// It is the named segment, but valid WAL ends early, without a switch record.
    Incomplete {
        /// Where it ends: after the last whole record.
        valid_to: Lsn,
        /// What is there instead.
        reason: String,
    },
    /// It is the named segment, of a version or layout that this decoder does not know; no sign of
    /// damage.
    Undecoded {
        /// Why.
        reason: String,
    },
    /// It is not the named segment.
    Mismatch {
        /// What differs.
        what: String,
    },
}

/// Scans one segment, fed in chunks of any size.
///
/// ```
/// use walship::pg::SegmentSize;
/// use walship::wal::scan::{SegmentScanner, Verdict};
///
/// let mut scanner = SegmentScanner::new("000000010000000A0000004C".parse()?, SegmentSize::DEFAULT);
/// scanner.push(&[0; 1000]);
/// assert!(matches!(scanner.finish().verdict, Verdict::Mismatch { .. }));
/// # Ok::<(), walship::pg::ParseError>(())
/// ```
#[derive(Debug)]
pub struct SegmentScanner {
    name: SegmentName,
    size: SegmentSize,
    received: u64,
    reader: Reader,
    tally: Tally,
}

impl SegmentScanner {
    /// Returns a scanner for the segment that is said to have this name and size.
    pub fn new(name: SegmentName, size: SegmentSize) -> Self {
        let reader = Reader::new(name.start(size), name.timeline, size);
        Self { name, size, received: 0, reader, tally: Tally::default() }
    }

    /// Reads the next bytes. Chunks of whole pages, aligned to pages, are read without copying.
    pub fn push(&mut self, bytes: &[u8]) {
        let room = self.size.bytes().saturating_sub(self.received);
        self.received = self.received.saturating_add(bytes.len() as u64);
        let bytes = &bytes[..bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        let tally = &mut self.tally;
        self.reader.push(bytes, |record, layout| tally.add(record, layout));
    }

    /// Returns what was found, once every byte of the file was pushed.
    pub fn finish(self) -> SegmentScan {
        self.finish_with_reader().0
    }

    /// Returns what was found, and the reader as it stands at the end: with the next segment's bytes it tells whether
    /// WAL goes on there.
    pub fn finish_with_reader(mut self) -> (SegmentScan, Reader) {
        let tally = &mut self.tally;
        self.reader.finish(|record, layout| tally.add(record, layout));
        let verdict = self.verdict();
        let ending = match &verdict {
            Verdict::Whole if self.switched() => SegmentEnding::Switch,
            Verdict::Whole => SegmentEnding::Full,
            Verdict::Undecoded { reason } => SegmentEnding::Undecoded { reason: reason.clone() },
            Verdict::Incomplete { .. } | Verdict::Mismatch { .. } => SegmentEnding::Incomplete,
        };
        (SegmentScan { summary: self.summary(ending), verdict }, self.reader)
    }

    /// Returns what was found in the beginning of a segment that is still being written, once what there is of it
    /// was pushed: what a server finds that gets it with zeros behind. [`Verdict::Whole`] when that ends in a
    /// switch record.
    pub fn finish_open(mut self) -> SegmentScan {
        let tally = &mut self.tally;
        self.reader.finish(|record, layout| tally.add(record, layout));
        let verdict = self.misfit().unwrap_or_else(|| match (self.reader.stop(), &self.tally.unknown) {
            (_, Some((lsn, unknown))) => {
                let version = self.version();
                Verdict::Undecoded { reason: format!("{unknown}, at {lsn}, in WAL of PostgreSQL {version}") }
            }
            (None, None) if self.switched() => Verdict::Whole,
            (stop, None) => Verdict::Incomplete {
                valid_to: self.reader.valid_to(),
                reason: stop.map_or_else(|| "more is to come".to_owned(), |stop| stop.reason.to_string()),
            },
        });
        let ending = match &verdict {
            Verdict::Whole => SegmentEnding::Switch,
            Verdict::Undecoded { reason } => SegmentEnding::Undecoded { reason: reason.clone() },
            Verdict::Incomplete { .. } | Verdict::Mismatch { .. } => SegmentEnding::Incomplete,
        };
        let start = self.name.start(self.size);
        let received_to = Lsn(start.0.saturating_add(self.received));
        let mut summary = self.summary(ending);
        // Zeros that were taken for the rest of a record from the segment before are none of it.
        if let Some(leading) = &mut summary.leading
            && leading.end.is_none_or(|end| end > received_to)
        {
            (leading.end, leading.bytes) = (None, None);
            summary.end_of_wal = start;
        }
        SegmentScan { summary, verdict }
    }

    fn switched(&self) -> bool {
        self.reader.last_switch().is_some()
    }

    /// Returns why the bytes are not WAL of this segment, or none that can be read; however many there are.
    fn misfit(&self) -> Option<Verdict> {
        let mismatch = |what: String| Some(Verdict::Mismatch { what });
        let Some(first) = self.reader.first_page() else {
            return mismatch("the file is empty".to_owned());
        };
        if Layout::for_magic(first.magic).is_none() {
            if !first.is_plausible_first() {
                return mismatch(format!("page magic {:#06X} is not that of WAL", first.magic));
            }
            if let Some(what) = self.first_page_mismatch() {
                return mismatch(what);
            }
            let reason = format!("page magic {:#06X} of an unknown PostgreSQL version", first.magic);
            return Some(Verdict::Undecoded { reason });
        }
        if let Some(what) = self.first_page_mismatch() {
            return mismatch(what);
        }
        match self.reader.stop()? {
            Stop { reason: StopReason::PageSize(bytes), .. } => {
                Some(Verdict::Undecoded { reason: format!("WAL pages of {bytes} bytes") })
            }
            Stop { lsn, reason: StopReason::PageTimeline(timeline) } => mismatch(format!(
                "the page at {lsn} has timeline {timeline} in a segment named for timeline {}",
                self.name.timeline
            )),
            _ => None,
        }
    }

    /// Returns the version that wrote the WAL, in words.
    fn version(&self) -> String {
        self.reader
            .layout()
            .map_or_else(|| "an unknown version".to_owned(), |layout| layout.major.to_string())
    }

    fn verdict(&self) -> Verdict {
        let size = self.size.bytes();
        let mismatch = |what: String| Verdict::Mismatch { what };
        if !self.name.is_legal(self.size) {
            return mismatch(format!(
                "{} is not a segment name where segments have {}",
                self.name, self.size
            ));
        }
        if self.received != size {
            return mismatch(format!("the file has {} bytes, a segment has {size}", self.received));
        }
        if let Some(misfit) = self.misfit() {
            return misfit;
        }
        match self.reader.stop() {
            Some(stop) => Verdict::Incomplete {
                valid_to: self.reader.valid_to(),
                reason: format!("{} at {}", stop.reason, stop.lsn),
            },
            None => match &self.tally.unknown {
                Some((lsn, unknown)) => Verdict::Undecoded {
                    reason: format!("{unknown}, at {lsn}, in WAL of PostgreSQL {}", self.version()),
                },
                None => Verdict::Whole,
            },
        }
    }

    /// Returns what in the first page's header is not as the name and the size demand.
    fn first_page_mismatch(&self) -> Option<String> {
        let first = self.reader.first_page()?;
        let expected = self.name.start(self.size);
        if first.address != expected {
            return Some(format!("its first page is {}, the name stands for {expected}", first.address));
        }
        let Some(long) = first.long else {
            return Some("its first page has no long header".to_owned());
        };
        if u64::from(long.segment_size) != self.size.bytes() {
            return Some(format!(
                "its header says that segments have {} bytes, expected {}",
                long.segment_size,
                self.size.bytes()
            ));
        }
        let timeline = TimelineId::new(first.timeline);
        if timeline.is_none_or(|timeline| timeline > self.name.timeline) {
            return Some(format!(
                "its first page has timeline {}, the name says {}",
                first.timeline, self.name.timeline
            ));
        }
        None
    }

    fn summary(&mut self, ending: SegmentEnding) -> SegmentSummary {
        let tally = std::mem::take(&mut self.tally);
        let first = self.reader.first_page();
        let (start, end) = (self.name.start(self.size), self.name.end(self.size));
        let unfinished = (ending == SegmentEnding::Full).then(|| self.reader.unfinished()).flatten();
        let first_record = tally.first_record.or(unfinished.map(|record| record.lsn));
        let layout = self.reader.layout();
        let unfinished = unfinished.map(|record| {
            let wanted = match (record.header, layout) {
                (Some(header), Some(layout)) => is_of_interest(&header, layout),
                _ => true,
            };
            // Of a record that does not matter the header is enough to say so.
            let kept = if wanted { record.kept } else { &record.kept[..RecordHeader::LEN] };
            let small = kept.len() <= SegmentSummary::MAX_FRAGMENT_BYTES;
            Fragment {
                lsn: record.lsn,
                record_bytes: record.len,
                bytes: small.then(|| kept.to_vec()),
                end: None,
            }
        });
        SegmentSummary {
            segment: self.name,
            segment_size: self.size,
            system_identifier: first.and_then(|first| first.long).map_or(0, |long| long.system_identifier),
            page_magic: first.map_or(0, |first| first.magic),
            first_page_timeline: first
                .and_then(|first| TimelineId::new(first.timeline))
                .unwrap_or(self.name.timeline),
            first_record,
            end_of_wal: if ending == SegmentEnding::Full { end } else { self.reader.valid_to() },
            leading: self.reader.leading().map(|leading| Fragment {
                lsn: start,
                record_bytes: leading.len,
                bytes: leading.bytes.clone(),
                end: leading.end,
            }),
            unfinished,
            counts: tally.counts,
            min_time: tally.min_time.and_then(StopAt::resolve),
            max_time: tally.max_time.and_then(StopAt::resolve),
            ended_xids: tally.ended_xids,
            deletes: Some(tally.deletes.finish()),
            events: tally.events.kept,
            events_truncated: tally.events.truncated,
            ending,
        }
    }
}

/// Everything that is counted while records come by.
#[derive(Debug, Default)]
struct Tally {
    first_record: Option<Lsn>,
    counts: Counts,
    min_time: Option<StopAt>,
    max_time: Option<StopAt>,
    ended_xids: Option<(u32, u32)>,
    events: Events,
    deletes: DeleteTally,
    /// The first record that did not have its version's layout.
    unknown: Option<(Lsn, UnknownLayout)>,
}

/// A [`StopTime`] whose time was not turned into a calendar's yet.
#[derive(Debug, Clone, Copy)]
struct StopAt {
    micros: i64,
    lsn: Lsn,
    xid: u32,
}

impl StopAt {
    fn resolve(self) -> Option<StopTime> {
        let time = super::decode::time_of(self.micros)?;
        Some(StopTime { time, lsn: self.lsn, xid: self.xid })
    }
}

impl Tally {
    #[inline]
    fn add(&mut self, record: &Record<'_>, layout: &'static Layout) {
        self.first_record.get_or_insert(record.lsn);
        self.counts.records += 1;
        if let Err(unknown) = self.look_into(record, layout) {
            self.unknown.get_or_insert((record.lsn, unknown));
        }
    }

    #[inline]
    fn look_into(&mut self, record: &Record<'_>, layout: &'static Layout) -> Result<(), UnknownLayout> {
        let parts = record.parts(layout)?;
        self.counts.full_page_images += u64::from(parts.images);
        let header = &record.header;
        if !is_of_interest(header, layout) {
            if is_heap_delete(header) {
                self.counts.heap_deletes += 1;
                self.deletes.add(record, &parts, layout);
            }
            return Ok(());
        }
        if is_transaction_end(header) {
            let end = TransactionEnd::parse(header.info, record.main_data(&parts)?, layout)?;
            return self.transaction_end(record, &end);
        }
        match decode(record, layout)? {
            Some(WalEvent { kind: EventKind::Prepare { .. }, .. }) => self.counts.prepares += 1,
            Some(event) => self.events.add(event),
            None => {}
        }
        Ok(())
    }

    fn transaction_end(
        &mut self,
        record: &Record<'_>,
        end: &TransactionEnd<'_>,
    ) -> Result<(), UnknownLayout> {
        if !is_time(end.micros) {
            return Err(super::record::unknown("its time is impossible"));
        }
        if end.committed {
            self.counts.commits += 1;
        } else {
            self.counts.aborts += 1;
        }
        let xid = end.prepared_xid.unwrap_or(record.header.xid);
        let (low, high) = self.ended_xids.unwrap_or((xid, xid));
        self.ended_xids = Some((low.min(xid), high.max(xid)));
        let stop = StopAt { micros: end.micros, lsn: record.lsn, xid };
        if self.min_time.is_none_or(|min| stop.micros < min.micros) {
            self.min_time = Some(stop);
        }
        if self.max_time.is_none_or(|max| stop.micros > max.micros) {
            self.max_time = Some(stop);
        }
        if end.is_destructive() {
            // Lists too long for any summary are not even copied.
            if end.items() > Events::MAX_ITEMS {
                self.events.truncated = true;
            } else {
                let kind = end.event()?;
                let (lsn, end_lsn, xid) = (record.lsn, record.end_lsn, record.header.xid);
                self.events.add(WalEvent { lsn, end_lsn, xid, kind });
            }
        }
        Ok(())
    }
}

/// The events that fit into a summary.
#[derive(Debug, Default)]
struct Events {
    kept: Vec<WalEvent>,
    truncated: bool,
    planning_bytes: usize,
    destructive_bytes: usize,
}

impl Events {
    /// How much JSON the events that plans are made from may take, and so many the destructive ones.
    /// Twice this, two fragments in base64 and the fixed fields stay below
    /// [`SegmentSummary::MAX_BYTES`].
    const BUDGET: usize = 18 << 10;
    /// More relations, subtransactions and dropped objects than this in one commit take more than the budget.
    const MAX_ITEMS: usize = Self::BUDGET / 2;

    fn add(&mut self, event: WalEvent) {
        let destructive = matches!(
            event.kind,
            EventKind::Commit { .. }
                | EventKind::TablespaceDrop { .. }
                | EventKind::DatabaseDrop { .. }
                | EventKind::DatabaseInvalid { .. }
                | EventKind::StorageTruncate { .. }
                | EventKind::Truncate { .. }
        );
        let bytes = serde_json::to_vec(&event).map_or(usize::MAX, |json| json.len() + 1);
        let used = if destructive { &mut self.destructive_bytes } else { &mut self.planning_bytes };
        let total = used.saturating_add(bytes);
        if total > Self::BUDGET {
            self.truncated = true;
        } else {
            *used = total;
            self.kept.push(event);
        }
    }
}
