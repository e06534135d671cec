//! The page that a record changes: which it is, what the record says of it, and the page itself where the
//! record holds it.
//!
//! Source: `src/include/access/xlogrecord.h`; `src/backend/access/transam/xlogreader.c`, DecodeXLogRecord and
//! RestoreBlockImage; `src/include/storage/bufpage.h`, `src/include/storage/itemid.h`.

use super::bytes::{u16_at, u32_at};
use super::event::RelFileLocator;
use super::layout::Layout;
use super::page::PAGE_SIZE;
use super::record::{BLOCK_HAS_IMAGE, BLOCK_SAME_REL, IMAGE_HAS_HOLE, Record, RecordHeader};
use super::xact::relation_at;

/// How much of a block's header comes before its image's header.
const BLOCK_HEADER: usize = 4;
/// The length of an image's header.
const IMAGE_HEADER: usize = 5;

/// The first page that a record changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block<'a> {
    /// Whose page it is.
    pub(crate) relation: RelFileLocator,
    /// What the record says of the page; empty when it holds the page instead.
    pub(crate) data: &'a [u8],
    image: Option<Image<'a>>,
}

/// A page as it was stored in a record: without the hole of zeros in its middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Image<'a> {
    bytes: &'a [u8],
    hole_at: usize,
    compressed: bool,
}

/// A whole page.
#[derive(Debug)]
pub(crate) struct Page(Vec<u8>);

impl<'a> Record<'a> {
    /// Returns whose page the record changes first; `None` when it changes none.
    #[inline]
    pub(crate) fn first_relation(&self, layout: &Layout) -> Option<RelFileLocator> {
        let at = RecordHeader::LEN;
        let (id, flags) = (*self.bytes.get(at)?, *self.bytes.get(at + 1)?);
        if id != 0 || flags & BLOCK_SAME_REL != 0 {
            return None;
        }
        let mut next = at + BLOCK_HEADER;
        if flags & BLOCK_HAS_IMAGE != 0 {
            let info = *self.bytes.get(next + 4)?;
            next += IMAGE_HEADER;
            if info & layout.image_compressed != 0 && info & IMAGE_HAS_HOLE != 0 {
                next += 2;
            }
        }
        relation_at(self.bytes, next)
    }

    /// Returns the page that the record changes, when it is one and the record is whole. `main_len` is the
    /// length of its main data, which is short.
    pub(crate) fn only_block(&self, layout: &Layout, main_len: usize) -> Option<Block<'a>> {
        let at = RecordHeader::LEN;
        let flags = *self.bytes.get(at + 1)?;
        if *self.bytes.get(at)? != 0 || flags & BLOCK_SAME_REL != 0 || !self.is_whole() {
            return None;
        }
        let data_len = usize::from(u16_at(self.bytes, at + 2)?);
        let mut next = at + BLOCK_HEADER;
        let mut image_head = None;
        if flags & BLOCK_HAS_IMAGE != 0 {
            let len = usize::from(u16_at(self.bytes, next)?);
            let hole_at = usize::from(u16_at(self.bytes, next + 2)?);
            let info = *self.bytes.get(next + 4)?;
            let compressed = info & layout.image_compressed != 0;
            next += IMAGE_HEADER;
            if compressed && info & IMAGE_HAS_HOLE != 0 {
                next += 2;
            }
            image_head = Some((len, hole_at, compressed));
        }
        let relation = relation_at(self.bytes, next)?;
        // Image and data lie between the inner headers and the main data, in this order.
        let end = self.bytes.len().checked_sub(main_len)?;
        let data_at = end.checked_sub(data_len)?;
        let image = match image_head {
            Some((len, hole_at, compressed)) => {
                let bytes = self.bytes.get(data_at.checked_sub(len)?..data_at)?;
                Some(Image { bytes, hole_at, compressed })
            }
            None => None,
        };
        Some(Block { relation, data: self.bytes.get(data_at..end)?, image })
    }
}

impl Block<'_> {
    /// Returns the page, where the record holds it uncompressed.
    pub(crate) fn page(&self) -> Option<Page> {
        let image = self.image.filter(|image| !image.compressed)?;
        let (before, behind) = image.bytes.split_at_checked(image.hole_at)?;
        let hole = PAGE_SIZE.checked_sub(image.bytes.len())?;
        let mut page = Vec::with_capacity(PAGE_SIZE);
        page.extend_from_slice(before);
        page.resize(before.len() + hole, 0);
        page.extend_from_slice(behind);
        Some(Page(page))
    }
}

impl Page {
    /// Returns the columns of the row with this number, its header left out.
    pub(crate) fn row(&self, number: u16) -> Option<&[u8]> {
        const PAGE_HEADER: usize = 24;
        const ITEM: usize = 4;
        const HEADER_LEN_AT: usize = 22;
        let at = PAGE_HEADER + ITEM * usize::from(number.checked_sub(1)?);
        let item = u32_at(&self.0, at)?;
        let (offset, len) = ((item & 0x7FFF) as usize, (item >> 17) as usize);
        let row = self.0.get(offset..offset.checked_add(len)?)?;
        row.get(usize::from(*row.get(HEADER_LEN_AT)?)..)
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::build;
    use super::*;
    use crate::pg::Lsn;
    use crate::wal::decode::decode;
    use crate::wal::event::EventKind;
    use crate::wal::layout::rmgr;

    const HEAP_INPLACE: u8 = 0x70;

    /// A row of `pg_database` as far as it matters, with this connection limit.
    fn row(major: u32, limit: i32) -> Vec<u8> {
        let mut row = vec![0; 260];
        row[..4].copy_from_slice(&16_400u32.to_le_bytes());
        row[4..8].copy_from_slice(b"shop");
        let at = Layout::for_major(major).unwrap().database_limit_at;
        row[at..at + 4].copy_from_slice(&limit.to_le_bytes());
        row
    }

    /// A record of an update in place of row 2 of a relation's first page.
    fn in_place(relation: [u32; 3], row: &[u8], image: Option<u8>) -> Vec<u8> {
        let mut page = vec![0u8; PAGE_SIZE];
        let at = PAGE_SIZE - 24 - row.len();
        page[at + 22] = 24;
        page[at + 24..at + 24 + row.len()].copy_from_slice(row);
        let item = (at as u32) | 1 << 15 | ((24 + row.len()) as u32) << 17;
        page[28..32].copy_from_slice(&item.to_le_bytes());
        let (hole_at, hole_end) = (40, at & !7);
        let stored = [&page[..hole_at], &page[hole_end..]].concat();

        let data_len = if image.is_some() { 0 } else { row.len() as u16 };
        let flags = if image.is_some() { BLOCK_HAS_IMAGE } else { 0x20 };
        let mut headers = vec![0, flags];
        headers.extend(data_len.to_le_bytes());
        if let Some(info) = image {
            headers.extend((stored.len() as u16).to_le_bytes());
            headers.extend((hole_at as u16).to_le_bytes());
            headers.push(info);
            if info & !IMAGE_HAS_HOLE & 0x1C != 0 {
                headers.extend([1, 0]);
            }
        }
        for word in relation.into_iter().chain([0]) {
            headers.extend(word.to_le_bytes());
        }
        let mut bytes = build(0, 0, rmgr::HEAP, HEAP_INPLACE, &headers, &2u16.to_le_bytes());
        let at = bytes.len() - 2;
        bytes.splice(at..at, if image.is_some() { stored } else { row.to_vec() });
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    fn event(major: u32, bytes: &[u8]) -> Option<EventKind> {
        let header = RecordHeader::parse(bytes).unwrap();
        let record = Record { lsn: Lsn(8), end_lsn: Lsn(16), header, bytes };
        decode(&record, Layout::for_major(major).unwrap()).unwrap().map(|event| event.kind)
    }

    #[test]
    fn a_database_marked_invalid_is_told_from_every_other_update_in_place() {
        const SHARED: [u32; 3] = [1664, 0, 1262];
        let marked = Some(EventKind::DatabaseInvalid { oid: 16_400, name: "shop".to_owned() });
        for major in [14, 15, 16, 17, 18] {
            let row = |limit| row(major, limit);
            assert_eq!(event(major, &in_place(SHARED, &row(-2), None)), marked, "{major}");
            assert_eq!(event(major, &in_place([1664, 0, 20_000], &row(-2), None)), marked, "moved");
            assert_eq!(event(major, &in_place(SHARED, &row(-1), None)), None);
            assert_eq!(event(major, &in_place([1663, 5, 1259], &row(-2), None)), None);
            assert_eq!(event(major, &in_place(SHARED, &row(-2)[..40], None)), None, "too short");
            // A page with a hole; then one that is compressed.
            assert_eq!(event(major, &in_place(SHARED, &row(-2), Some(IMAGE_HAS_HOLE))), marked, "{major}");
            assert_eq!(event(major, &in_place(SHARED, &row(-1), Some(IMAGE_HAS_HOLE))), None);
            if major > 14 {
                assert_eq!(event(major, &in_place(SHARED, &row(-2), Some(IMAGE_HAS_HOLE | 0x08))), None);
            }
        }
    }

    #[test]
    fn rows_lie_where_their_pages_say_or_nowhere() {
        let page = Page(vec![0xFF; PAGE_SIZE]);
        assert!(page.row(0).is_none() && page.row(1).is_none() && page.row(u16::MAX).is_none());
        let image = Image { bytes: &[0; 100], hole_at: 101, compressed: false };
        let relation = RelFileLocator { tablespace: 0, database: 0, relation: 0 };
        assert!(Block { relation, data: &[], image: Some(image) }.page().is_none());
        let long = Image { bytes: &[0; PAGE_SIZE + 1], hole_at: 1, compressed: false };
        assert!(Block { relation, data: &[], image: Some(long) }.page().is_none());
    }
}
