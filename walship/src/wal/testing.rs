//! WAL made to order, for tests: pages, records, crashes, timelines.

use super::bytes::align8;
use super::crc::record_crc;
use super::event::ServerLimits;
use super::layout::{Layout, rmgr};
use super::page::{PAGE_SIZE, PageHeader, flags};
use super::record::RecordHeader;
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId, Xid};

/// The settings of a server as `initdb` leaves them.
pub const INITDB_LIMITS: ServerLimits = ServerLimits {
    max_connections: 100,
    max_worker_processes: 8,
    max_wal_senders: 10,
    max_prepared_transactions: 0,
    max_locks_per_transaction: 64,
    wal_level: 1,
    wal_log_hints: false,
    track_commit_timestamp: false,
};

/// Writes WAL as a server would, into memory.
///
/// ```
/// use walship::pg::{SegmentSize, TimelineId};
/// use walship::wal::testing::WalBuilder;
///
/// let mut wal = WalBuilder::new(17, SegmentSize::MIN, 42);
/// wal.commit(700, 1_000_000);
/// wal.switch();
/// let (name, bytes) = wal.segments().remove(0);
/// assert_eq!(name.to_string(), "000000010000000000000001");
/// assert_eq!(bytes.len(), 1 << 20);
/// ```
#[derive(Debug, Clone)]
pub struct WalBuilder {
    layout: &'static Layout,
    size: SegmentSize,
    system_identifier: u64,
    timeline: TimelineId,
    start: u64,
    bytes: Vec<u8>,
    prev: u64,
    overwrite_next_page: bool,
}

impl WalBuilder {
    /// Returns a builder that starts at the start of segment number 1 on timeline 1.
    ///
    /// # Panics
    /// When the major version is not one of 14 to 18.
    pub fn new(major: u32, size: SegmentSize, system_identifier: u64) -> Self {
        Self {
            layout: Layout::for_major(major).expect("a supported major"),
            size,
            system_identifier,
            timeline: TimelineId::FIRST,
            start: size.bytes(),
            bytes: Vec::new(),
            prev: 0,
            overwrite_next_page: false,
        }
    }

    /// Starts at the start of another segment instead; for a builder that wrote nothing yet.
    #[must_use]
    pub fn starting_at(mut self, segment_number: u64) -> Self {
        self.start = segment_number.saturating_mul(self.size.bytes());
        self
    }

    /// Goes on with another timeline: in the pages that begin from now on.
    pub fn set_timeline(&mut self, timeline: TimelineId) {
        self.timeline = timeline;
    }

    /// Returns the position where the next record starts, unless that is where a page header goes.
    pub fn position(&self) -> Lsn {
        Lsn(self.start.saturating_add(self.bytes.len() as u64))
    }

    /// Writes a record with this main data and returns where it starts.
    pub fn record(&mut self, xid: Xid, rmgr: u8, info: u8, main: &[u8]) -> Lsn {
        let record = self.build(xid, rmgr, info, main);
        self.write(&record, record.len())
    }

    /// Writes a commit at so many microseconds after 2000-01-01 UTC.
    pub fn commit(&mut self, xid: Xid, micros: i64) -> Lsn {
        self.record(xid, rmgr::XACT, 0x00, &micros.to_le_bytes())
    }

    /// Writes a commit that drops relations of database 5 in the default tablespace.
    pub fn commit_dropping(&mut self, xid: Xid, micros: i64, relations: &[u32]) -> Lsn {
        let mut main = micros.to_le_bytes().to_vec();
        main.extend_from_slice(&(1u32 << 2).to_le_bytes());
        main.extend_from_slice(&(relations.len() as u32).to_le_bytes());
        for relation in relations {
            for word in [1663, 5, *relation] {
                main.extend_from_slice(&word.to_le_bytes());
            }
        }
        self.record(xid, rmgr::XACT, 0x80, &main)
    }

    /// Writes an abort.
    pub fn abort(&mut self, xid: Xid, micros: i64) -> Lsn {
        self.record(xid, rmgr::XACT, 0x20, &micros.to_le_bytes())
    }

    /// Writes a restore point; a name longer than 63 bytes is cut.
    pub fn restore_point(&mut self, name: &str, micros: i64) -> Lsn {
        let mut main = micros.to_le_bytes().to_vec();
        main.extend_from_slice(&name.as_bytes()[..name.len().min(63)]);
        main.resize(72, 0);
        self.record(0, rmgr::XLOG, 0x70, &main)
    }

    /// Writes a record of no interest with `len` bytes of main data.
    pub fn filler(&mut self, len: usize) -> Lsn {
        self.record(0, rmgr::XLOG, 0x20, &vec![0x5A; len])
    }

    /// Writes a switch record and pads the segment.
    pub fn switch(&mut self) -> Lsn {
        let lsn = self.record(0, rmgr::XLOG, 0x40, &[]);
        let end = self.bytes.len().next_multiple_of(self.size.bytes() as usize);
        self.bytes.resize(end, 0);
        lsn
    }

    /// Fills the segment, up to `left` bytes before its end, with records of no interest.
    ///
    /// # Panics
    /// When `left` is no multiple of 8 below a page's room, or the segment is already too full.
    pub fn fill_segment(&mut self, left: usize) {
        assert!(
            left.is_multiple_of(8) && left <= PAGE_SIZE - PageHeader::LONG_LEN,
            "{left} bytes cannot be left"
        );
        let size = self.size.bytes() as usize;
        let end = (self.bytes.len() + 1).next_multiple_of(size) - left;
        while self.bytes.len() + 3 * PAGE_SIZE < end {
            self.filler(1000);
        }
        // One last record that ends exactly there; the headers of the pages it begins are not its own.
        let pos = self.bytes.len();
        let headers = end.div_ceil(PAGE_SIZE) - pos.div_ceil(PAGE_SIZE);
        let len = (end - pos).saturating_sub(headers * PageHeader::SHORT_LEN);
        assert!(len >= 32, "the segment is too full");
        self.filler(if len <= 281 { len - 26 } else { len - 29 });
        debug_assert_eq!(self.bytes.len(), end);
    }

    /// Begins a record of `len` bytes of main data, of which only the first pages get to disk before a
    /// crash; then what the next start writes over it. Returns where the lost record began.
    ///
    /// # Panics
    /// When the lost record would not have crossed a page.
    pub fn crash_cut(&mut self, len: usize, pages_written: usize) -> Lsn {
        let record = self.build(77, rmgr::XACT, 0x00, &vec![0xA5; len]);
        let before = self.prev;
        // Up to the end of a page: what came behind never got to disk.
        let pos = self.bytes.len();
        let stop = (pos / PAGE_SIZE + 1 + pages_written) * PAGE_SIZE;
        let lsn = self.write(&record, record.len());
        assert!(self.bytes.len() > stop, "the lost record crosses a page");
        self.bytes.truncate(stop);
        self.prev = before;
        self.overwrite_next_page = true;
        let mut main = lsn.0.to_le_bytes().to_vec();
        main.extend_from_slice(&0i64.to_le_bytes());
        self.record(0, rmgr::XLOG, 0xD0, &main);
        lsn
    }

    /// Returns the segments; the last is padded with zeros. They carry the timeline of their last page.
    pub fn segments(&self) -> Vec<(SegmentName, Vec<u8>)> {
        let size = self.size.bytes() as usize;
        let mut segments = Vec::new();
        for (number, chunk) in self.bytes.chunks(size).enumerate() {
            let last_page =
                chunk.chunks(PAGE_SIZE).filter_map(PageHeader::parse).rfind(|page| page.magic != 0);
            let timeline = last_page.and_then(|page| TimelineId::new(page.timeline)).unwrap_or(self.timeline);
            let number = self.start / self.size.bytes() + number as u64;
            let name =
                SegmentName::from_number(timeline, number, self.size).expect("far from the LSN space's end");
            let mut bytes = chunk.to_vec();
            bytes.resize(size, 0);
            segments.push((name, bytes));
        }
        segments
    }

    fn build(&self, xid: Xid, rmgr: u8, info: u8, main: &[u8]) -> Vec<u8> {
        let mut record = vec![0u8; RecordHeader::LEN];
        match main.len() {
            0 => {}
            1..256 => record.extend_from_slice(&[255, main.len() as u8]),
            len => {
                record.push(254);
                record.extend_from_slice(&(len as u32).to_le_bytes());
            }
        }
        record.extend_from_slice(main);
        let len = record.len() as u32;
        record[..4].copy_from_slice(&len.to_le_bytes());
        record[4..8].copy_from_slice(&xid.to_le_bytes());
        record[8..16].copy_from_slice(&self.prev.to_le_bytes());
        record[16] = info;
        record[17] = rmgr;
        let crc = record_crc(&record);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn write(&mut self, record: &[u8], len: usize) -> Lsn {
        let mut rest = &record[..len];
        let mut lsn = None;
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE_SIZE) {
                self.page_header(if lsn.is_some() { rest.len() } else { 0 });
            }
            lsn.get_or_insert(self.position());
            let room = PAGE_SIZE - self.bytes.len() % PAGE_SIZE;
            let (part, behind) = rest.split_at(room.min(rest.len()));
            self.bytes.extend_from_slice(part);
            rest = behind;
        }
        self.bytes.resize(align8(self.bytes.len() as u64) as usize, 0);
        let lsn = lsn.unwrap_or(self.position());
        self.prev = lsn.0;
        lsn
    }

    fn page_header(&mut self, remaining: usize) {
        let first = self.bytes.len().is_multiple_of(self.size.bytes() as usize);
        let mut flag = if first { flags::LONG_HEADER } else { 0 };
        if remaining > 0 {
            flag |= flags::FIRST_IS_CONTRECORD;
        }
        if std::mem::take(&mut self.overwrite_next_page) {
            flag |= flags::FIRST_IS_OVERWRITE_CONTRECORD;
        }
        let address = self.position().0;
        let bytes = &mut self.bytes;
        bytes.extend_from_slice(&self.layout.page_magic.to_le_bytes());
        bytes.extend_from_slice(&flag.to_le_bytes());
        bytes.extend_from_slice(&self.timeline.get().to_le_bytes());
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&(remaining as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        if first {
            bytes.extend_from_slice(&self.system_identifier.to_le_bytes());
            bytes.extend_from_slice(&(self.size.bytes() as u32).to_le_bytes());
            bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        }
    }
}
