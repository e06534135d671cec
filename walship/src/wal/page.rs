//! WAL page headers.
//!
//! Source: `src/include/access/xlog_internal.h`, XLogPageHeaderData and XLogLongPageHeaderData.

use super::bytes::{u16_at, u32_at, u64_at};
use super::layout::Layout;
use crate::pg::{Lsn, SegmentSize};

/// The WAL page size of every PostgreSQL that was not built with another one on purpose.
pub const PAGE_SIZE: usize = 8192;

/// The flags in a page header.
pub mod flags {
    /// The page begins with the rest of a record that began on an earlier page.
    pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
    /// The header is a long one; always so on a segment's first page.
    pub const LONG_HEADER: u16 = 0x0002;
    /// The rest of the record before never came (a crash); what follows replaces it.
    ///
    /// 0x0004 means "backup blocks are optional" in majors 14 to 18 and is never set.
    pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
    /// Every flag that exists.
    pub const ALL: u16 = 0x000F;
}

/// The header at the start of a WAL page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// Tells the WAL format, and so the major version.
    pub magic: u16,
    /// See [`flags`].
    pub flags: u16,
    /// The timeline of the first record on the page.
    pub timeline: u32,
    /// The page's own position.
    pub address: Lsn,
    /// With [`flags::FIRST_IS_CONTRECORD`], how many bytes of the record before are still to come,
    /// those on this page included.
    pub remaining: u32,
    /// The further fields of a long header.
    pub long: Option<LongHeader>,
}

/// What a long page header says besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongHeader {
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// The segment size in bytes, unchecked.
    pub segment_size: u32,
    /// The WAL page size in bytes, unchecked.
    pub page_size: u32,
}

impl PageHeader {
    /// The length of a short header, padding included.
    pub const SHORT_LEN: usize = 24;
    /// The length of a long header, padding included.
    pub const LONG_LEN: usize = 40;

    /// Returns the header at the start of `page`, or `None` when there are too few bytes for it.
    pub fn parse(page: &[u8]) -> Option<Self> {
        if page.len() < Self::SHORT_LEN {
            return None;
        }
        let flags = u16_at(page, 2)?;
        let long = if flags & flags::LONG_HEADER != 0 {
            Some(LongHeader {
                system_identifier: u64_at(page, 24)?,
                segment_size: u32_at(page, 32)?,
                page_size: u32_at(page, 36)?,
            })
        } else {
            None
        };
        Some(Self {
            magic: u16_at(page, 0)?,
            flags,
            timeline: u32_at(page, 4)?,
            address: Lsn(u64_at(page, 8)?),
            remaining: u32_at(page, 16)?,
            long,
        })
    }

    /// Returns the header's length: where the page's first record bytes are.
    pub fn len(&self) -> usize {
        if self.long.is_some() { Self::LONG_LEN } else { Self::SHORT_LEN }
    }

    /// Returns false: a header is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns whether the page begins with the rest of an earlier record.
    pub fn is_continuation(&self) -> bool {
        self.flags & flags::FIRST_IS_CONTRECORD != 0
    }

    /// Returns whether the page replaces the rest of a record that a crash cut off.
    pub fn is_overwrite(&self) -> bool {
        self.flags & flags::FIRST_IS_OVERWRITE_CONTRECORD != 0
    }

    /// Returns whether this looks like the header of a segment's first page of a known PostgreSQL or a
    /// newer one: magics only grow, so one that lies between the known ones is damage. The header is
    /// long, and its sizes are legal.
    pub fn is_plausible_first(&self) -> bool {
        let family = Layout::is_known_or_newer(self.magic);
        let sizes = self.long.is_some_and(|long| {
            SegmentSize::new(u64::from(long.segment_size)).is_some()
                && long.page_size.is_power_of_two()
                && (1 << 10..=1 << 16).contains(&long.page_size)
        });
        family && sizes && self.timeline != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_headers_parse() {
        let mut page = vec![0u8; 64];
        page[..2].copy_from_slice(&0xD110u16.to_le_bytes());
        page[4..8].copy_from_slice(&7u32.to_le_bytes());
        page[8..16].copy_from_slice(&0x0100_2000u64.to_le_bytes());
        let short = PageHeader::parse(&page).unwrap();
        assert_eq!((short.len(), short.timeline, short.address), (24, 7, Lsn(0x0100_2000)));
        assert!(!short.is_plausible_first());

        page[2] = 2;
        page[24..32].copy_from_slice(&42u64.to_le_bytes());
        page[32..36].copy_from_slice(&(16u32 << 20).to_le_bytes());
        page[36..40].copy_from_slice(&8192u32.to_le_bytes());
        let long = PageHeader::parse(&page).unwrap();
        assert_eq!(long.long.unwrap().system_identifier, 42);
        assert!(long.is_plausible_first());
        assert_eq!(long.len(), 40);
        assert!(PageHeader::parse(&page[..39]).is_none());
        assert!(PageHeader::parse(&page[..23]).is_none());
    }
}
