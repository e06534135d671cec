//! Follows WAL records through pages and segments, checking what PostgreSQL checks.
//!
//! The reader is fed bytes in chunks of any size, from a segment's first byte on, and gives out each
//! record once its CRC is known to be right. A record that lies on one page is given out in place;
//! only one that crosses pages is copied, and of that only as much as anyone needs. It ends for good at
//! the first thing that is not valid WAL: that is how WAL ends.
//!
//! Source: `src/backend/access/transam/xlogreader.c`, XLogDecodeNextRecord, ValidXLogRecordHeader,
//! XLogReaderValidatePageHeader.

use std::fmt;

use super::bytes::{align8, u32_at};
use super::crc::{finish_crc, record_crc};
use super::decode::is_of_interest;
use super::layout::Layout;
use super::page::{PAGE_SIZE, PageHeader, flags};
use super::record::{Record, RecordHeader};
use super::summary::SegmentSummary;
use crate::pg::{Lsn, SegmentSize, TimelineId};

/// An incremental WAL reader; see the module.
#[derive(Debug)]
pub struct Reader {
    segment_size: SegmentSize,
    timeline_limit: TimelineId,
    layout: Option<&'static Layout>,
    first_page: Option<PageHeader>,
    /// Where the next page to be read starts.
    page_at: u64,
    /// What has come of that page.
    partial: Vec<u8>,
    state: State,
    /// Where the last record started; unknown before the first.
    prev: Option<Lsn>,
    /// The timeline in the last page header.
    timeline: u32,
    valid_to: Lsn,
    leading: Option<Leading>,
    last_switch: Option<Lsn>,
    stop: Option<Stop>,
    /// An empty buffer kept for the next record that crosses pages.
    spare: Vec<u8>,
}

/// Where valid WAL ended, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// The page or record that is not valid.
    pub lsn: Lsn,
    /// What is wrong with it.
    pub reason: StopReason,
}

/// Why a reader went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The page magic of an unknown version.
    UnknownMagic(u16),
    /// A page magic that differs from the first page's.
    OtherMagic(u16),
    /// Flags in a page header that do not exist.
    PageFlags(u16),
    /// A page header with another position: an older page in a recycled file, or zeros.
    PageAddress(Lsn),
    /// A timeline that goes down, is 0, or is above the one in the segment's name.
    PageTimeline(u32),
    /// Another segment size in a long page header.
    PageSegmentSize(u32),
    /// A WAL page size other than 8 KiB.
    PageSize(u32),
    /// Another system identifier than on the first page.
    PageSystem(u64),
    /// A segment's first page without a long header.
    ShortHeader,
    /// A page that does not go on with the record before, or goes on with one that is not there.
    Continuation,
    /// No record: zeros.
    Zeros,
    /// A record length that is too small or too large.
    RecordLength(u32),
    /// A resource manager that cannot exist.
    ResourceManager(u8),
    /// A record that does not name the one before it.
    BackLink(Lsn),
    /// A record with a wrong CRC.
    Crc,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownMagic(magic) => write!(f, "page magic {magic:#06X} of an unknown version"),
            Self::OtherMagic(magic) => write!(f, "page magic {magic:#06X} differs from the first page's"),
            Self::PageFlags(flags) => write!(f, "page header has unknown flags {flags:#06X}"),
            Self::PageAddress(lsn) => write!(f, "page header says {lsn}"),
            Self::PageTimeline(timeline) => write!(f, "page header has timeline {timeline}"),
            Self::PageSegmentSize(size) => write!(f, "page header says a segment has {size} bytes"),
            Self::PageSize(size) => write!(f, "WAL pages have {size} bytes"),
            Self::PageSystem(id) => write!(f, "page header has system identifier {id}"),
            Self::ShortHeader => write!(f, "first page of a segment has no long header"),
            Self::Continuation => write!(f, "page does not continue the record before it"),
            Self::Zeros => write!(f, "no record there, only zeros"),
            Self::RecordLength(len) => write!(f, "record length {len} is impossible"),
            Self::ResourceManager(id) => write!(f, "resource manager {id} does not exist"),
            Self::BackLink(lsn) => write!(f, "record names {lsn} as the one before it"),
            Self::Crc => write!(f, "record has a wrong CRC"),
        }
    }
}

/// The bytes at the start that continue a record whose beginning the reader was not given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leading {
    /// How many there are so far, page headers not counted.
    pub len: u64,
    /// They themselves, when they are at most [`SegmentSummary::MAX_FRAGMENT_BYTES`].
    pub bytes: Option<Vec<u8>>,
    /// The position after the last of them; `None` while more are to come.
    pub end: Option<Lsn>,
}

/// A record whose end has not come yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfinished<'a> {
    /// Where it starts.
    pub lsn: Lsn,
    /// How many of its bytes have come, page headers not counted.
    pub len: u64,
    /// Those of them that were kept: all, when the record is of interest to recovery planning or they
    /// are few.
    pub kept: &'a [u8],
    /// Its header, when that has come whole.
    pub header: Option<RecordHeader>,
}

#[derive(Debug)]
enum State {
    /// Nothing was read yet.
    Start,
    /// The next page begins with a record.
    Boundary,
    /// In the middle of a record.
    Record(Pending),
    /// In the middle of a record whose beginning was not given; so many bytes of it are to come.
    Leading(u32),
    /// After a switch record: nothing to read before this position.
    Skip(u64),
    /// Not valid WAL any more.
    Ended,
}

#[derive(Debug)]
struct Pending {
    lsn: Lsn,
    total: u32,
    got: u32,
    /// Over the bytes behind the header.
    crc: u32,
    header: Option<RecordHeader>,
    kept: Vec<u8>,
    keep: usize,
}

impl Reader {
    /// Returns a reader for WAL that starts at `start`, the first byte of a segment. Pages of timelines
    /// above `timeline_limit` end it.
    pub fn new(start: Lsn, timeline_limit: TimelineId, segment_size: SegmentSize) -> Self {
        Self {
            segment_size,
            timeline_limit,
            layout: None,
            first_page: None,
            page_at: start.0,
            partial: Vec::new(),
            state: State::Start,
            prev: None,
            timeline: 0,
            valid_to: start,
            leading: None,
            last_switch: None,
            stop: None,
            spare: Vec::new(),
        }
    }

    /// Reads on; `give` gets each record that ends in `bytes`, and its layout. Chunks may be cut anywhere.
    pub fn push(&mut self, mut bytes: &[u8], mut give: impl FnMut(&Record<'_>, &'static Layout)) {
        if self.stop.is_some() {
            return;
        }
        if !self.partial.is_empty() {
            let missing = PAGE_SIZE - self.partial.len().min(PAGE_SIZE);
            let (part, rest) = bytes.split_at(missing.min(bytes.len()));
            self.partial.extend_from_slice(part);
            bytes = rest;
            if self.partial.len() < PAGE_SIZE {
                return;
            }
            let page = std::mem::take(&mut self.partial);
            self.page(&page, &mut give);
            self.partial = page;
            self.partial.clear();
        }
        let mut pages = bytes.chunks_exact(PAGE_SIZE);
        for page in pages.by_ref() {
            self.page(page, &mut give);
        }
        self.partial.extend_from_slice(pages.remainder());
    }

    /// Reads what is left of a file that ends within a page.
    pub fn finish(&mut self, mut give: impl FnMut(&Record<'_>, &'static Layout)) {
        if !self.partial.is_empty() && self.stop.is_none() {
            let mut page = std::mem::take(&mut self.partial);
            page.resize(PAGE_SIZE, 0);
            self.page(&page, &mut give);
        }
    }

    /// Sets the timeline above which pages are not accepted: the one in the name of the segment that
    /// is pushed next.
    pub fn set_timeline_limit(&mut self, timeline: TimelineId) {
        self.timeline_limit = timeline;
    }

    /// Returns the layout of the version that wrote the WAL, once the first page was read.
    pub fn layout(&self) -> Option<&'static Layout> {
        self.layout
    }

    /// Returns the first page's header, unchecked.
    pub fn first_page(&self) -> Option<&PageHeader> {
        self.first_page.as_ref()
    }

    /// Returns why and where the reader stopped; `None` while everything was valid.
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    /// Returns the position up to which whole records reach; after a switch, the switch's end.
    pub fn valid_to(&self) -> Lsn {
        self.valid_to
    }

    /// Returns the bytes at the start that continue an earlier record. `None` also when a crash cut
    /// that record off and its rest was overwritten.
    pub fn leading(&self) -> Option<&Leading> {
        self.leading.as_ref()
    }

    /// Returns the record that has begun and not ended.
    pub fn unfinished(&self) -> Option<Unfinished<'_>> {
        match &self.state {
            State::Record(pending) => Some(Unfinished {
                lsn: pending.lsn,
                len: u64::from(pending.got),
                kept: &pending.kept,
                header: pending.header,
            }),
            _ => None,
        }
    }

    /// Returns the end of the last switch record.
    pub fn last_switch(&self) -> Option<Lsn> {
        self.last_switch
    }

    fn stop_at(&mut self, lsn: u64, reason: StopReason) {
        self.stop = Some(Stop { lsn: Lsn(lsn), reason });
        self.state = State::Ended;
        self.partial = Vec::new();
    }

    /// Reads one page of exactly [`PAGE_SIZE`] bytes.
    fn page(&mut self, page: &[u8], give: &mut impl FnMut(&Record<'_>, &'static Layout)) {
        let at = self.page_at;
        // The last page of the LSN space has no successor; no server gets there.
        self.page_at = at.saturating_add(PAGE_SIZE as u64);
        match self.state {
            State::Ended => return,
            State::Skip(until) if at < until => return,
            State::Skip(_) => self.state = State::Boundary,
            _ => {}
        }
        let Some(header) = PageHeader::parse(page) else {
            return self.stop_at(at, StopReason::Zeros);
        };
        self.first_page.get_or_insert(header);
        if header.magic == 0 && header.address == Lsn::INVALID {
            return self.stop_at(at, StopReason::Zeros);
        }
        let layout = match self.check_page(at, &header) {
            Ok(layout) => layout,
            Err(reason) => return self.stop_at(at, reason),
        };
        self.timeline = header.timeline;
        let start = header.len();
        match self.continuation(at, &header, page, layout, give) {
            Ok(Some(pos)) => self.records(at, pos, start, page, layout, give),
            Ok(None) => {}
            Err((lsn, reason)) => self.stop_at(lsn, reason),
        }
    }

    fn check_page(&mut self, at: u64, header: &PageHeader) -> Result<&'static Layout, StopReason> {
        let layout = match self.layout {
            Some(layout) => layout,
            None => Layout::for_magic(header.magic).ok_or(StopReason::UnknownMagic(header.magic))?,
        };
        if header.magic != layout.page_magic {
            return Err(StopReason::OtherMagic(header.magic));
        }
        if header.flags & !flags::ALL != 0 {
            return Err(StopReason::PageFlags(header.flags));
        }
        if header.address.0 != at {
            return Err(StopReason::PageAddress(header.address));
        }
        match header.long {
            Some(long) => {
                if u64::from(long.segment_size) != self.segment_size.bytes() {
                    return Err(StopReason::PageSegmentSize(long.segment_size));
                }
                if long.page_size as usize != PAGE_SIZE {
                    return Err(StopReason::PageSize(long.page_size));
                }
                let first = self.first_page.and_then(|first| first.long);
                if first.is_some_and(|first| first.system_identifier != long.system_identifier) {
                    return Err(StopReason::PageSystem(long.system_identifier));
                }
            }
            None if self.segment_size.offset_of(Lsn(at)) == 0 => return Err(StopReason::ShortHeader),
            None => {}
        }
        let timeline = header.timeline;
        if timeline == 0 || timeline < self.timeline || timeline > self.timeline_limit.get() {
            return Err(StopReason::PageTimeline(timeline));
        }
        self.layout = Some(layout);
        Ok(layout)
    }

    /// Deals with the start of a page: the rest of a record, if there is one. Returns where the first
    /// record starts on the page, or `None` when it holds none.
    fn continuation(
        &mut self,
        at: u64,
        header: &PageHeader,
        page: &[u8],
        layout: &'static Layout,
        give: &mut impl FnMut(&Record<'_>, &'static Layout),
    ) -> Result<Option<usize>, (u64, StopReason)> {
        let start = header.len();
        let remaining = header.remaining;
        let bad = Err((at, StopReason::Continuation));
        // How far the page goes on with the record before.
        let len = (remaining as usize).min(PAGE_SIZE - start);
        let rest = &page[start..start + len];
        match std::mem::replace(&mut self.state, State::Boundary) {
            State::Start if header.is_continuation() => {
                if remaining == 0 || remaining > layout.max_record_len {
                    return bad;
                }
                self.leading = Some(Leading { len: 0, bytes: Some(Vec::new()), end: None });
                Ok(self.leading_part(at, start, rest, remaining, page))
            }
            // PostgreSQL's reader ignores the overwrite flag where it is in no record.
            State::Start | State::Boundary if !header.is_continuation() => {
                // After a leading fragment that reached the page's end there is nothing new to note.
                Ok(Some(start))
            }
            State::Leading(_) | State::Record(_) if header.is_overwrite() => {
                // A crash cut the record off: it never happened.
                self.leading = self.leading.take().filter(|leading| leading.end.is_some());
                Ok(Some(start))
            }
            State::Leading(missing) if header.is_continuation() && remaining == missing => {
                Ok(self.leading_part(at, start, rest, remaining, page))
            }
            State::Record(mut pending) => {
                let missing = pending.total - pending.got;
                if !header.is_continuation() || remaining == 0 || remaining != missing {
                    return bad;
                }
                pending.append(rest, self, layout)?;
                if pending.got < pending.total {
                    self.state = State::Record(pending);
                    return Ok(None);
                }
                let end = start + len;
                self.complete(pending, plus(at, end).0, layout, give)?;
                Ok(self.after_record(at, end))
            }
            _ => bad,
        }
    }

    fn leading_part(
        &mut self,
        at: u64,
        start: usize,
        rest: &[u8],
        remaining: u32,
        page: &[u8],
    ) -> Option<usize> {
        let leading = self.leading.as_mut()?;
        leading.len += rest.len() as u64;
        if leading.len <= SegmentSummary::MAX_FRAGMENT_BYTES as u64 {
            if let Some(bytes) = &mut leading.bytes {
                bytes.extend_from_slice(rest);
            }
        } else {
            leading.bytes = None;
        }
        let missing = remaining - rest.len() as u32;
        if missing > 0 {
            self.state = State::Leading(missing);
            return None;
        }
        let end = start + rest.len();
        leading.end = Some(plus(at, end));
        // A switch record whose header was split by the segment boundary: what is here ends with its info
        // code, resource manager and CRC, and no record follows.
        let tail = rest.len().checked_sub(8).and_then(|from| rest.get(from..));
        let is_switch = leading.len == rest.len() as u64
            && matches!(leading.len, 8 | 16)
            && tail.is_some_and(|tail| tail[0] == super::decode::xlog::SWITCH && tail[1..4] == [0; 3])
            && u32_at(page, align8(end as u64) as usize) == Some(0);
        if is_switch {
            self.skip_segment(plus(at, end));
        }
        self.after_record(at, end)
    }

    /// Moves on behind a record that ends at `end` of the page at `at`; returns where the next one starts
    /// on this page.
    fn after_record(&mut self, at: u64, end: usize) -> Option<usize> {
        let next = align8(end as u64);
        self.valid_to = plus(at, next as usize);
        if matches!(self.state, State::Skip(_)) {
            return None;
        }
        self.state = State::Boundary;
        (next < PAGE_SIZE as u64).then_some(next as usize)
    }

    /// Notes that the rest of the segment holding the byte before `end` is padding.
    fn skip_segment(&mut self, end: Lsn) {
        let size = self.segment_size.bytes();
        let until = align8(end.0).saturating_add(size - 1) & !(size - 1);
        self.last_switch = Some(end);
        self.state = State::Skip(until);
    }

    /// Reads the records that start on a page, from `pos` on.
    fn records(
        &mut self,
        at: u64,
        mut pos: usize,
        start: usize,
        page: &[u8],
        layout: &'static Layout,
        give: &mut impl FnMut(&Record<'_>, &'static Layout),
    ) {
        debug_assert!(pos >= start);
        while let Some(total) = u32_at(page, pos) {
            let lsn = plus(at, pos);
            let rest = &page[pos..];
            if total == 0 {
                return self.stop_at(lsn.0, StopReason::Zeros);
            }
            if (total as usize) < RecordHeader::LEN || total > layout.max_record_len {
                return self.stop_at(lsn.0, StopReason::RecordLength(total));
            }
            let Some(bytes) = rest.get(..total as usize) else {
                let mut pending = Pending {
                    lsn,
                    total,
                    got: 0,
                    crc: 0,
                    header: None,
                    kept: std::mem::take(&mut self.spare),
                    keep: SegmentSummary::MAX_FRAGMENT_BYTES,
                };
                match pending.append(rest, self, layout) {
                    Ok(()) => self.state = State::Record(pending),
                    Err((lsn, reason)) => self.stop_at(lsn, reason),
                }
                return;
            };
            let header = match self.check_header(lsn, bytes, layout) {
                Ok(header) => header,
                Err(reason) => return self.stop_at(lsn.0, reason),
            };
            if record_crc(bytes) != header.crc {
                return self.stop_at(lsn.0, StopReason::Crc);
            }
            let end = pos + bytes.len();
            let end_lsn = plus(at, end);
            self.prev = Some(lsn);
            give(&Record { lsn, end_lsn, header, bytes }, layout);
            // What `after_record` does, without its look at the state: on a page it is a boundary.
            pos = align8(end as u64) as usize;
            self.valid_to = plus(at, pos);
            if header.is_switch() {
                return self.skip_segment(end_lsn);
            }
            if pos >= PAGE_SIZE {
                return;
            }
        }
    }

    #[inline]
    fn check_header(&self, lsn: Lsn, bytes: &[u8], layout: &Layout) -> Result<RecordHeader, StopReason> {
        let header =
            RecordHeader::parse(bytes).ok_or(StopReason::RecordLength(bytes.len().min(23) as u32))?;
        if !layout.is_rmgr(header.rmgr) {
            return Err(StopReason::ResourceManager(header.rmgr));
        }
        let linked = match self.prev {
            Some(prev) => header.prev == prev,
            None => header.prev < lsn,
        };
        if linked { Ok(header) } else { Err(StopReason::BackLink(header.prev)) }
    }

    fn complete(
        &mut self,
        pending: Pending,
        end: u64,
        layout: &'static Layout,
        give: &mut impl FnMut(&Record<'_>, &'static Layout),
    ) -> Result<(), (u64, StopReason)> {
        let lsn = pending.lsn;
        let Some(header) = pending.header else {
            return Err((lsn.0, StopReason::RecordLength(pending.total)));
        };
        if finish_crc(pending.crc, &pending.kept) != header.crc {
            return Err((lsn.0, StopReason::Crc));
        }
        self.prev = Some(lsn);
        if header.is_switch() {
            self.skip_segment(Lsn(end));
        }
        give(&Record { lsn, end_lsn: Lsn(end), header, bytes: &pending.kept }, layout);
        // One huge record must not hold its memory for ever.
        if pending.kept.capacity() <= 1 << 20 {
            self.spare = pending.kept;
            self.spare.clear();
        }
        Ok(())
    }
}

impl Pending {
    /// Takes the next bytes of the record; `bytes` never goes beyond its end, or is cut there.
    fn append(&mut self, bytes: &[u8], reader: &Reader, layout: &Layout) -> Result<(), (u64, StopReason)> {
        let missing = (self.total - self.got) as usize;
        let bytes = &bytes[..bytes.len().min(missing)];
        // Before the header is whole, `kept` holds every byte that came.
        let mut data = bytes;
        if self.header.is_none() {
            let head = RecordHeader::LEN - (self.got as usize).min(RecordHeader::LEN);
            let (part, rest) = bytes.split_at(head.min(bytes.len()));
            self.kept.extend_from_slice(part);
            data = rest;
            if self.kept.len() == RecordHeader::LEN {
                let header = reader
                    .check_header(self.lsn, &self.kept, layout)
                    .map_err(|reason| (self.lsn.0, reason))?;
                self.header = Some(header);
                self.keep = how_much_to_keep(&header, layout);
            }
        }
        self.crc = crc32c::crc32c_append(self.crc, data);
        let room = self.keep.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&data[..data.len().min(room)]);
        self.got += bytes.len() as u32;
        Ok(())
    }
}

/// Returns the position `offset` bytes into the page at `at`; stays at the end of the LSN space.
fn plus(at: u64, offset: usize) -> Lsn {
    Lsn(at.saturating_add(offset as u64))
}

/// Returns how many of a record's bytes anyone may ask for: all, when it matters to planning; else the
/// headers inside it, from which images are counted.
fn how_much_to_keep(header: &RecordHeader, layout: &Layout) -> usize {
    if is_of_interest(header, layout) { header.total_len as usize } else { Record::MAX_HEADERS }
}
