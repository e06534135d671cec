//! A segment that was never stored whole, put together from the parts that were shipped while it was open.

use std::path::Path;

use crate::durable::TempFile;
use crate::error::Result;
use crate::pg::SegmentName;
use crate::repository::LineageRepository;
use crate::wal::page::PageHeader;

/// What is stored of a segment in parts.
pub(super) struct Tail<'a> {
    /// Its bytes, from the start.
    pub(super) temp: TempFile,
    /// So many.
    pub(super) end: u64,
    /// From where.
    pub(super) lineage: &'a LineageRepository,
}

impl Tail<'_> {
    /// Whether that is the whole segment.
    pub(super) fn is_whole(&self) -> bool {
        self.end == self.lineage.lineage().segment_size.bytes()
    }
}

/// Returns the longest of what the lineages hold of `segment` in parts; `None` when that is not even a page's
/// header.
///
/// # Errors
/// As [`LineageRepository::tail_into`]: a repository that cannot say may be the one that has most.
pub(super) async fn longest<'a>(
    segment: SegmentName,
    lineages: &'a [LineageRepository],
    target: &Path,
) -> Result<Option<Tail<'a>>> {
    let mut longest: Option<Tail<'a>> = None;
    for lineage in lineages {
        let temp = TempFile::beside(target)?;
        let end = lineage.tail_into(segment, temp.file()).await?;
        if end >= PageHeader::LONG_LEN as u64 && longest.as_ref().is_none_or(|tail| tail.end < end) {
            longest = Some(Tail { temp, end, lineage });
        }
    }
    Ok(longest)
}
