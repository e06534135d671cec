//! A segment that was never stored whole, put together from the parts that were shipped while it was open.

use std::io::{Seek as _, SeekFrom};
use std::path::Path;

use super::push::{EncodedFile, PushOptions, encode_stream};
use crate::durable::TempFile;
use crate::error::{Error, Result};
use crate::pg::{SegmentName, WalFileName};
use crate::repository::{Damage, LineageRepository};
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
    damage: Damage,
) -> Result<Option<Tail<'a>>> {
    let mut longest: Option<Tail<'a>> = None;
    for lineage in lineages {
        let temp = TempFile::beside(target)?;
        let end = lineage.tail_into(segment, temp.file(), damage).await?;
        if end >= PageHeader::LONG_LEN as u64 && longest.as_ref().is_none_or(|tail| tail.end < end) {
            longest = Some(Tail { temp, end, lineage });
        }
    }
    Ok(longest)
}

/// Returns how many bytes from the segment's start are stored in parts in the repository that has most; 0 when that is
/// no WAL, or all of the segment. A damaged part ends them.
///
/// # Errors
/// What the repositories and the spool folder say.
pub async fn stored_in_parts(
    segment: SegmentName,
    lineages: &[LineageRepository],
    options: &PushOptions,
) -> Result<u64> {
    let target = options.spool_dir.join(segment.to_string());
    let tail = longest(segment, lineages, &target, Damage::EndsIt).await?;
    Ok(tail.filter(|tail| !tail.is_whole()).map_or(0, |tail| tail.end))
}

/// Returns the whole segment, put together from its parts; `None` where parts hold less than all of its WAL.
///
/// A segment that ends in a switch record holds no WAL behind that: it is whole although the empty rest was
/// never shipped.
///
/// # Errors
/// What the repositories and the spool folder say.
pub async fn whole_from_parts(
    segment: SegmentName,
    lineages: &[LineageRepository],
    options: &PushOptions,
) -> Result<Option<EncodedFile>> {
    let target = options.spool_dir.join(segment.to_string());
    let Some(tail) = longest(segment, lineages, &target, Damage::IsAnError).await? else { return Ok(None) };
    let (temp, size, options) = (tail.temp, tail.lineage.lineage().segment_size, options.clone());
    let encoding = tokio::task::spawn_blocking(move || {
        let mut bytes = temp.file();
        bytes
            .set_len(size.bytes())
            .and_then(|()| bytes.seek(SeekFrom::Start(0)))
            .map_err(|error| Error::from_io(format!("reading {segment}"), error))?;
        encode_stream(WalFileName::Segment(segment), &mut bytes, size.bytes(), size, &options)
    });
    let encoded =
        encoding.await.map_err(|error| Error::local_io(format!("encoding was broken off: {error}")))??;
    Ok(Some(encoded).filter(EncodedFile::is_whole))
}
