//! One WAL record: its header, its block references, its main data.
//!
//! Source: `src/include/access/xlogrecord.h`; `src/backend/access/transam/xlogreader.c`,
//! DecodeXLogRecord.

use super::bytes::{u16_at, u32_at, u64_at};
use super::layout::{Layout, rmgr};
use crate::pg::{Lsn, Xid};

/// The fixed header of a WAL record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// The length of the whole record, this header included, page headers not.
    pub total_len: u32,
    /// The transaction that wrote it; 0 for none.
    pub xid: Xid,
    /// Where the record before starts.
    pub prev: Lsn,
    /// Flags and, in the upper four bits, the resource manager's code.
    pub info: u8,
    /// The resource manager.
    pub rmgr: u8,
    /// The CRC-32C over the record.
    pub crc: u32,
}

impl RecordHeader {
    /// The header's length.
    pub const LEN: usize = 24;
    /// How much of the header the CRC covers: all but the CRC itself.
    pub(crate) const CRC_OFFSET: usize = 20;

    /// Returns the header at the start of `bytes`, or `None` when there are fewer than
    /// [`RecordHeader::LEN`].
    #[inline]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let head = bytes.first_chunk::<{ Self::LEN }>()?;
        Some(Self {
            total_len: u32_at(head, 0)?,
            xid: u32_at(head, 4)?,
            prev: Lsn(u64_at(head, 8)?),
            info: head[16],
            rmgr: head[17],
            crc: u32_at(head, Self::CRC_OFFSET)?,
        })
    }

    /// Returns the resource manager's code: the upper four bits of `info`.
    #[inline]
    pub fn code(&self) -> u8 {
        self.info & 0xF0
    }

    /// Returns whether this is the record after which the rest of the segment holds no WAL.
    #[inline]
    pub fn is_switch(&self) -> bool {
        self.rmgr == rmgr::XLOG && self.code() == super::decode::xlog::SWITCH
    }
}

/// A WAL record as the reader gives it out: position, header, bytes. Its CRC was right.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Where it starts.
    pub lsn: Lsn,
    /// The position after its last byte, not rounded up.
    pub end_lsn: Lsn,
    /// Its header.
    pub header: RecordHeader,
    /// Its bytes from the header on, page headers removed. Of a record that crosses pages and is of
    /// no interest to recovery planning only the first bytes; see [`Record::is_whole`].
    pub bytes: &'a [u8],
}

/// A record whose CRC is right but whose contents do not have the layout that its version is known for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("record has an unknown layout: {what}")]
pub struct UnknownLayout {
    /// Which part.
    pub what: &'static str,
}

pub(crate) fn unknown(what: &'static str) -> UnknownLayout {
    UnknownLayout { what }
}

/// What the headers inside a record say about its parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parts {
    /// How many block references it has.
    pub blocks: u32,
    /// How many of them carry a full-page image.
    pub images: u32,
    /// The bytes of these images, as stored.
    pub image_bytes: u64,
    /// The replication origin.
    pub origin: Option<u16>,
    /// The top-level transaction, where it is logged with a subtransaction's record.
    pub top_xid: Option<Xid>,
    /// The length of the main data, which ends the record.
    pub main_len: usize,
}

const BLOCK_ID_MAX: u8 = 32;
const ID_TOP_XID: u8 = 252;
const ID_ORIGIN: u8 = 253;
const ID_DATA_LONG: u8 = 254;
const ID_DATA_SHORT: u8 = 255;
pub(crate) const BLOCK_HAS_IMAGE: u8 = 0x10;
pub(crate) const BLOCK_SAME_REL: u8 = 0x80;
pub(crate) const IMAGE_HAS_HOLE: u8 = 0x01;

impl<'a> Record<'a> {
    /// The most bytes that all headers inside a record can take: the reader keeps at least so many.
    pub(crate) const MAX_HEADERS: usize = 1024;

    /// Returns whether [`Record::bytes`] holds all of it.
    pub fn is_whole(&self) -> bool {
        self.bytes.len() == self.header.total_len as usize
    }

    /// Returns what the headers inside the record say.
    ///
    /// # Errors
    /// [`UnknownLayout`] when they contradict each other or the record's length.
    #[inline(always)]
    pub fn parts(&self, layout: &Layout) -> Result<Parts, UnknownLayout> {
        let mut parts = Parts::default();
        let mut at = RecordHeader::LEN;
        // What must still come, as `DecodeXLogRecord` counts it: headers until only announced data is left.
        let total = self.header.total_len as usize;
        let mut announced = 0usize;
        let short = || unknown("its inner headers end early");
        let mut last_block: Option<u8> = None;
        while total - at.min(total) > announced {
            let id = *self.bytes.get(at).ok_or_else(short)?;
            // Tests in the order of what is likely: a jump by the id would be mispredicted at nearly every
            // record.
            if id <= BLOCK_ID_MAX {
                if last_block.is_some_and(|last| id <= last) {
                    return Err(unknown("its block references are out of order"));
                }
                last_block = Some(id);
                let head = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).ok_or_else(short)?;
                announced += usize::from(u16::from_le_bytes([head[2], head[3]]));
                at += 4;
                parts.blocks += 1;
                if head[1] & BLOCK_HAS_IMAGE != 0 {
                    let len = u16_at(self.bytes, at).ok_or_else(short)?;
                    let image = *self.bytes.get(at + 4).ok_or_else(short)?;
                    at += 5;
                    if image & layout.image_compressed != 0 && image & IMAGE_HAS_HOLE != 0 {
                        at += 2;
                    }
                    announced += usize::from(len);
                    parts.images += 1;
                    parts.image_bytes += u64::from(len);
                }
                at += if head[1] & BLOCK_SAME_REL == 0 { 16 } else { 4 };
            } else if id == ID_DATA_SHORT {
                parts.main_len = usize::from(*self.bytes.get(at + 1).ok_or_else(short)?);
                at += 2;
                announced += parts.main_len;
                break;
            } else if id == ID_DATA_LONG {
                parts.main_len = u32_at(self.bytes, at + 1).ok_or_else(short)? as usize;
                at += 5;
                announced += parts.main_len;
                break;
            } else if id == ID_ORIGIN {
                parts.origin = Some(u16_at(self.bytes, at + 1).ok_or_else(short)?);
                at += 3;
            } else if id == ID_TOP_XID {
                parts.top_xid = Some(u32_at(self.bytes, at + 1).ok_or_else(short)?);
                at += 5;
            } else {
                return Err(unknown("it has an inner header of an unknown kind"));
            }
        }
        if at.checked_add(announced) != Some(total) {
            return Err(unknown("its length is not the sum of its parts"));
        }
        Ok(parts)
    }

    /// Returns the main data: what the resource manager wrote apart from blocks.
    ///
    /// # Errors
    /// [`UnknownLayout`] when the parts are not those of this record or only the record's beginning
    /// is at hand.
    pub fn main_data(&self, parts: &Parts) -> Result<&'a [u8], UnknownLayout> {
        let start = self.bytes.len().checked_sub(parts.main_len);
        match start.and_then(|start| self.bytes.get(start..)) {
            Some(data) if self.is_whole() => Ok(data),
            _ => Err(unknown("its main data is not at hand")),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Builds a record with a right CRC.
    pub(crate) fn build(xid: Xid, prev: u64, rmgr: u8, info: u8, headers: &[u8], main: &[u8]) -> Vec<u8> {
        let mut record = vec![0u8; RecordHeader::LEN];
        record.extend_from_slice(headers);
        if main.len() < 256 && !main.is_empty() {
            record.extend_from_slice(&[ID_DATA_SHORT, main.len() as u8]);
        } else if !main.is_empty() {
            record.push(ID_DATA_LONG);
            record.extend_from_slice(&(main.len() as u32).to_le_bytes());
        }
        record.extend_from_slice(main);
        let len = record.len() as u32;
        record[..4].copy_from_slice(&len.to_le_bytes());
        record[4..8].copy_from_slice(&xid.to_le_bytes());
        record[8..16].copy_from_slice(&prev.to_le_bytes());
        record[16] = info;
        record[17] = rmgr;
        let crc = super::super::crc::record_crc(&record);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn record(bytes: &[u8]) -> Record<'_> {
        let header = RecordHeader::parse(bytes).unwrap();
        Record { lsn: Lsn(1), end_lsn: Lsn(2), header, bytes }
    }

    #[test]
    fn inner_headers_are_followed_for_both_image_layouts() {
        // Block 0: relation, image of 3 bytes, compressed with a hole; then 2 bytes of block data; main data.
        let image_block = |image_flags: u8, hole: bool| {
            let mut headers = vec![0u8, 0x30, 2, 0, 3, 0, 9, 0, image_flags];
            if hole {
                headers.extend_from_slice(&[1, 0]);
            }
            headers.extend_from_slice(&[0; 16]);
            headers
        };
        for (major, flags, hole) in
            [(14, 0x03, true), (14, 0x05, false), (15, 0x05, true), (15, 0x03, false), (18, 0x13, true)]
        {
            let layout = Layout::for_major(major).unwrap();
            let mut bytes = build(7, 0, 10, 0, &image_block(flags, hole), b"main");
            // Block data lies between headers and main data.
            let at = bytes.len() - 4;
            bytes.splice(at..at, [1, 2, 3, 4, 5]);
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            let record = record(&bytes);
            let parts = record.parts(layout).unwrap();
            assert_eq!((parts.blocks, parts.images, parts.image_bytes, parts.main_len), (1, 1, 3, 4));
            assert_eq!(record.main_data(&parts).unwrap(), b"main");
        }
    }

    #[test]
    fn origin_and_top_xid_are_read_and_nonsense_is_refused() {
        let layout = Layout::for_major(17).unwrap();
        let bytes = build(7, 0, 1, 0, &[253, 5, 0, 252, 9, 0, 0, 0], &[1; 300]);
        let parts = record(&bytes).parts(layout).unwrap();
        assert_eq!((parts.origin, parts.top_xid, parts.main_len), (Some(5), Some(9), 300));

        for headers in [&[200u8][..], &[0, 0, 0], &[1, 0, 0, 0, 1, 2, 3]] {
            assert!(record(&build(0, 0, 0, 0, headers, &[])).parts(layout).is_err(), "{headers:?}");
        }
    }

    #[test]
    fn a_record_may_have_no_data_at_all() {
        let bytes = build(0, 0, 0, 0x40, &[], &[]);
        assert_eq!(bytes.len(), 24);
        let record = record(&bytes);
        assert!(record.header.is_switch());
        assert_eq!(record.parts(Layout::for_major(15).unwrap()), Ok(Parts::default()));
    }
}
