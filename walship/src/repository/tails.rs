//! Parts of open segments: put, listed, put together.
//!
//! Two receivers cut differently: parts are joined by position, and where they overlap they have to agree.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::LineageRepository;
use crate::catalog::{Catalog, TailFlaw};
use crate::codec::{Compression, TailPart};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, TimelineId};
use crate::storage::{ObjectKey, ObjectMeta, PutOutcome, blocking, list_all};

/// More parts than a segment ever has.
const PARTS_MAX: usize = 200_000;

/// From this length on a part is encoded on a thread where nobody else waits meanwhile.
const ENCODED_ASIDE_FROM: usize = 64 << 10;

/// How many parts are read at once.
const READS_MAX: usize = 16;

/// A part as its key tells it: offsets in its segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPart {
    /// Where it begins.
    pub start: u64,
    /// Where it ends (exclusive).
    pub end: u64,
    /// The length of its object.
    pub stored_bytes: u64,
    pub(super) key: ObjectKey,
}

/// What becomes of a damaged part whose bytes no other holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// There is no tail then: what is damaged is no end of the archive.
    IsAnError,
    /// What lies before it will do.
    EndsIt,
}

/// What came of putting parts together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assembled {
    /// So many bytes, from the segment's start.
    pub(super) end: u64,
    /// So many parts.
    pub(super) parts: u64,
    /// The length of their objects.
    pub(super) stored_bytes: u64,
    /// Why it does not go on although more is stored.
    pub(super) flaw: Option<TailFlaw>,
}

/// Where parts are put together.
pub(super) trait Assembly {
    /// Forgets what was written.
    fn clear(&mut self) -> io::Result<()>;
    /// Returns whether these bytes were written there.
    fn holds(&mut self, at: u64, bytes: &[u8]) -> io::Result<bool>;
    /// Writes behind what was written.
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

impl Assembly for &File {
    fn clear(&mut self) -> io::Result<()> {
        self.set_len(0)
    }

    fn holds(&mut self, at: u64, bytes: &[u8]) -> io::Result<bool> {
        let mut written = vec![0; bytes.len()];
        self.read_exact_at(&mut written, at)?;
        Ok(written == bytes)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }
}

impl Assembly for Vec<u8> {
    fn clear(&mut self) -> io::Result<()> {
        Self::clear(self);
        Ok(())
    }

    fn holds(&mut self, at: u64, bytes: &[u8]) -> io::Result<bool> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        Ok(self.get(at..).and_then(|written| written.get(..bytes.len())) == Some(bytes))
    }

    fn write(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

impl LineageRepository {
    /// Stores a part of a segment and returns its key. The same part again is success.
    ///
    /// # Errors
    /// [`Error::Conflict`] when other bytes are stored for the same place, [`Error::Corrupt`] when what is
    /// stored there is damaged, [`Error::Invalid`] for what is no part.
    /// # Durability
    /// After `Ok` the part survives a crash.
    pub async fn put_tail(
        &self,
        timeline: TimelineId,
        start: Lsn,
        bytes: Vec<u8>,
        compression: Compression,
    ) -> Result<ObjectKey> {
        let part = TailPart {
            timeline,
            start,
            system_identifier: self.lineage.system_identifier,
            segment_size: self.lineage.segment_size,
            bytes,
        };
        let (segment, offset) = (part.segment(), part.offset());
        let key = self.layout.tail(segment, offset, offset + part.bytes.len() as u64)?;
        let (part, object) = if part.bytes.len() < ENCODED_ASIDE_FROM {
            let object = part.encode(compression)?;
            (part, object)
        } else {
            let encode = move || part.encode(compression).map(|object| (part, object));
            blocking(encode).await?
        };
        let object = Bytes::from(object);
        if self.storage.put_if_absent(&key, object.into()).await? == PutOutcome::Stored {
            return Ok(key);
        }
        self.storage.confirm(&key).await?;
        if self.tail_part(segment, &listed(&key, &part)).await?.bytes == part.bytes {
            return Ok(key);
        }
        Err(Error::conflict(format!("other WAL is stored as {}, a part of {segment}", self.shown(&key)))
            .with_next(
                "Two servers write different WAL on one timeline: check that only one cluster streams to this name.",
            ))
    }

    /// Returns how many parts are stored of segments that the catalog knows as stored whole. One request for
    /// each 1,000 parts; of more than 200,000 the first ones are counted.
    pub async fn parts_of_whole_segments(&self, catalog: &Catalog) -> Result<usize> {
        let (mut parts, mut seen, mut page) = (0, 0, None);
        loop {
            let listed = self.storage.list(&self.layout.all_tails_prefix(), page.as_deref()).await?;
            seen += listed.objects.len();
            let keys = listed.objects.iter().filter_map(|meta| self.layout.parse_tail(&meta.key));
            parts += keys.filter(|(segment, ..)| catalog.segments.contains(*segment)).count();
            page = listed.next;
            if page.is_none() || seen >= PARTS_MAX {
                return Ok(parts);
            }
        }
    }

    /// Returns the parts of a segment, by where they begin.
    pub async fn tail_of(&self, segment: SegmentName) -> Result<Vec<ListedPart>> {
        let objects = list_all(&*self.storage, &self.layout.tails_prefix(segment), PARTS_MAX).await?;
        let parts = objects.into_iter().filter_map(|meta| self.part_listed(meta));
        let mut parts: Vec<_> = parts.map(|(_, part)| part).collect();
        parts.sort_by_key(|part| (part.start, part.end));
        Ok(parts)
    }

    /// Returns the parts of the segments of a timeline behind `last`, of each by where they begin.
    pub(super) async fn tails_behind(
        &self,
        timeline: TimelineId,
        last: Option<SegmentName>,
    ) -> Result<BTreeMap<SegmentName, Vec<ListedPart>>> {
        let prefix = self.layout.timeline_tails_prefix(timeline);
        let mut after = last.map(|last| format!("{}~", self.layout.tails_prefix(last)));
        let mut segments: BTreeMap<SegmentName, Vec<ListedPart>> = BTreeMap::new();
        let mut count = 0;
        loop {
            let page = self.storage.list(&prefix, after.as_deref()).await?;
            count += page.objects.len();
            for meta in page.objects {
                let Some((segment, part)) = self.part_listed(meta) else { continue };
                if last.is_none_or(|last| last < segment) {
                    segments.entry(segment).or_default().push(part);
                }
            }
            match page.next {
                Some(_) if count > PARTS_MAX => {
                    return Err(Error::invalid(format!(
                        "more than {PARTS_MAX} parts of open segments are stored in {} on timeline {timeline}",
                        self.location()
                    )));
                }
                Some(next) => after = Some(next),
                None => break,
            }
        }
        segments.values_mut().for_each(|parts| parts.sort_by_key(|part| (part.start, part.end)));
        Ok(segments)
    }

    fn part_listed(&self, meta: ObjectMeta) -> Option<(SegmentName, ListedPart)> {
        let (segment, start, end) = self.layout.parse_tail(&meta.key)?;
        Some((segment, ListedPart { start, end, stored_bytes: meta.bytes, key: meta.key }))
    }

    /// Writes what is stored of an open segment into `file`, from its start and as far as parts are
    /// contiguous, and returns that length; 0 when there is nothing.
    ///
    /// # Errors
    /// [`Error::Conflict`] when parts disagree; [`Error::Corrupt`] when a damaged one leaves a hole and `damage`
    /// does not say that what lies before will do.
    pub async fn tail_into(&self, segment: SegmentName, file: &File, damage: Damage) -> Result<u64> {
        let parts = self.tail_of(segment).await?;
        Ok(self.assemble(segment, parts, &mut &*file, damage).await?.end)
    }

    /// Puts parts together, from the segment's start and as far as they are contiguous. In the first segment of a
    /// timeline the parent's parts hold the same bytes up to where it begins: they are used where its own end before.
    pub(super) async fn assemble(
        &self,
        segment: SegmentName,
        parts: Vec<ListedPart>,
        to: &mut impl Assembly,
        damage: Damage,
    ) -> Result<Assembled> {
        if parts.is_empty() {
            return self.assemble_own(segment, parts, to, damage).await;
        }
        let mut own = self.assemble_own(segment, parts.clone(), to, damage).await?;
        let Some((parent, begin)) = self.parent_inside(segment).await?.filter(|(_, begin)| own.end < *begin)
        else {
            return Ok(own);
        };
        let mut bytes = Vec::new();
        let theirs = self.tail_of(parent).await?;
        let theirs = Box::pin(self.assemble(parent, theirs, &mut bytes, damage)).await?;
        let end = theirs.end.min(begin);
        if end <= own.end {
            return Ok(own);
        }
        let failed = |error| Error::from_io("putting a segment together", error);
        let cut = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let (same, more) = bytes[..cut(end)].split_at(cut(own.end));
        if !to.holds(0, same).map_err(failed)? {
            return Err(Error::conflict(format!(
                "parts of {segment} and of {parent} in {} hold different bytes before the fork between them",
                self.location()
            ))
            .with_next("Two servers wrote different WAL on one timeline: find out which one is right."));
        }
        to.write(own.end, more).map_err(failed)?;
        own = Assembled {
            end,
            parts: own.parts + theirs.parts,
            stored_bytes: own.stored_bytes + theirs.stored_bytes,
            flaw: own.flaw,
        };
        // What lay behind a hole may go on from there.
        for part in &parts {
            if part.start <= own.end && own.end < part.end {
                let read = self.tail_part(segment, part).await?;
                let (overlap, new) = read.bytes.split_at(cut(own.end - part.start));
                if !to.holds(part.start, overlap).map_err(failed)? {
                    break;
                }
                to.write(own.end, new).map_err(failed)?;
                own.end = part.end;
                own.flaw = None;
            }
        }
        Ok(own)
    }

    /// Returns the same segment of the timeline from which this one's comes, and at which offset that begins; `None`
    /// where it does not begin inside of this segment.
    async fn parent_inside(&self, segment: SegmentName) -> Result<Option<(SegmentName, u64)>> {
        let size = self.lineage.segment_size;
        let history = self.history(segment.timeline).await?;
        let Some(fork) = history.as_ref().and_then(|history| history.ancestors.last()) else {
            return Ok(None);
        };
        let inside = SegmentName::containing(segment.timeline, fork.switch_lsn, size) == segment;
        let begin = size.offset_of(fork.switch_lsn);
        Ok((inside && begin > 0).then(|| (segment.on(fork.timeline), begin)))
    }

    async fn assemble_own(
        &self,
        segment: SegmentName,
        mut parts: Vec<ListedPart>,
        to: &mut impl Assembly,
        damage: Damage,
    ) -> Result<Assembled> {
        let promised = chain(&parts).last().map_or(0, |part| part.end);
        let mut flaw = None;
        loop {
            let chosen = chain(&parts);
            let end = chosen.last().map_or(0, |part| part.end);
            if end < promised && damage == Damage::IsAnError {
                return Err(Error::corrupt(format!(
                    "a part of {segment} in {} is damaged, and no other holds its bytes",
                    self.location()
                ))
                .with_next(
                    "Keep the repository as it is, and look for the segment in the pg_wal of a server.",
                ));
            }
            match self.write_parts(segment, &chosen, to).await? {
                None => {
                    let hole = parts.iter().map(|part| part.start).find(|start| *start > end);
                    let hole = hole.map(|to| TailFlaw::Hole {
                        to: Lsn(segment.start(self.lineage.segment_size).0.saturating_add(to)),
                    });
                    return Ok(Assembled {
                        end,
                        parts: chosen.len() as u64,
                        stored_bytes: chosen.iter().map(|part| part.stored_bytes).sum(),
                        flaw: flaw.filter(|_| end < promised).or(hole),
                    });
                }
                Some((damaged, what)) => {
                    parts.retain(|part| part.key != damaged);
                    flaw.get_or_insert(TailFlaw::Damaged { what });
                }
            }
        }
    }

    /// Writes parts that form a chain; returns the key of the first that is damaged, and how.
    async fn write_parts(
        &self,
        segment: SegmentName,
        chain: &[ListedPart],
        to: &mut impl Assembly,
    ) -> Result<Option<(ObjectKey, String)>> {
        let failed = |error| Error::from_io("putting a segment together", error);
        to.clear().map_err(failed)?;
        let reads = chain.iter().cloned().map(|part| async move {
            match self.tail_part(segment, &part).await {
                Ok(read) => Ok((part, Ok(read))),
                Err(error @ Error::Corrupt(_)) => {
                    tracing::warn!("{error}");
                    Ok((part, Err(error.to_string())))
                }
                Err(error) if self.storage.skip(part.key.as_str(), &error) => {
                    Ok((part, Err(error.to_string())))
                }
                Err(error) => Err(error),
            }
        });
        let mut reads = futures_util::stream::iter(reads).buffered(READS_MAX);
        let mut written = 0;
        while let Some((part, read)) = reads.try_next().await? {
            let read = match read {
                Ok(read) => read,
                Err(what) => return Ok(Some((part.key.clone(), what))),
            };
            let known = usize::try_from(written - part.start).unwrap_or(usize::MAX).min(read.bytes.len());
            let (overlap, new) = read.bytes.split_at(known);
            if !to.holds(part.start, overlap).map_err(failed)? {
                return Err(Error::conflict(format!(
                    "parts of {segment} in {} hold different bytes for the same place, {} among them",
                    self.location(),
                    self.shown(&part.key)
                ))
                .with_next("Two servers wrote different WAL on one timeline: find out which one is right."));
            }
            to.write(written, new).map_err(failed)?;
            written = written.max(part.end);
        }
        Ok(None)
    }

    /// Returns a stored part, checked.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is damaged or not what its key says; [`Error::Unavailable`] also when it is
    /// not there any more.
    pub async fn tail_part(&self, segment: SegmentName, part: &ListedPart) -> Result<TailPart> {
        let read = self.tail_part_if_there(segment, part).await?;
        read.ok_or_else(|| Error::unavailable(format!("{} was there a moment ago", self.shown(&part.key))))
    }

    /// Returns a stored part, checked; `None` when it is not there.
    pub(super) async fn tail_part_if_there(
        &self,
        segment: SegmentName,
        part: &ListedPart,
    ) -> Result<Option<TailPart>> {
        let object = self.storage.get(&part.key, TailPart::OBJECT_BYTES_MAX).await?;
        let Some(object) = object else { return Ok(None) };
        let read = TailPart::decode(&object).map_err(|error| error.context(self.shown(&part.key)))?;
        let fits = read.segment() == segment
            && read.offset() == part.start
            && read.bytes.len() as u64 == part.end - part.start
            && read.segment_size == self.lineage.segment_size
            && read.system_identifier == self.lineage.system_identifier;
        if !fits {
            return Err(Error::corrupt(format!("{} holds something else", self.shown(&part.key))));
        }
        Ok(Some(read))
    }

    /// Returns a stored part of a later segment of the same timeline, if there is one. One request.
    pub(super) async fn tail_after(&self, segment: SegmentName) -> Result<Option<String>> {
        let prefix = self.layout.timeline_tails_prefix(segment.timeline);
        let after = format!("{}~", self.layout.tails_prefix(segment));
        let page = self.storage.list(&prefix, Some(&after)).await?;
        Ok(page.objects.first().map(|meta| self.shown(&meta.key)))
    }

    /// Returns a stored part of any segment of a timeline. One request.
    pub(super) async fn any_tail(&self, timeline: TimelineId) -> Result<Option<String>> {
        let page = self.storage.list(&self.layout.timeline_tails_prefix(timeline), None).await?;
        Ok(page.objects.first().map(|meta| self.shown(&meta.key)))
    }

    /// Removes parts of a segment that is stored whole: tidying, of which nothing depends. Stops where the
    /// store does not allow it.
    pub async fn tidy_tail(&self, parts: &[ObjectKey]) {
        for key in parts {
            if let Err(error) = self.storage.delete(key).await {
                tracing::debug!(%error, "a part that is not needed any more stays");
                return;
            }
        }
    }
}

fn listed(key: &ObjectKey, part: &TailPart) -> ListedPart {
    let start = part.offset();
    ListedPart { start, end: start + part.bytes.len() as u64, stored_bytes: 0, key: key.clone() }
}

/// Returns the fewest parts that lead from the segment's start as far as parts are contiguous.
fn chain(parts: &[ListedPart]) -> Vec<ListedPart> {
    let (mut chosen, mut end, mut best) = (Vec::new(), 0, None::<&ListedPart>);
    for part in parts {
        if part.start > end {
            match best.take() {
                Some(found) => {
                    end = found.end;
                    chosen.push(found.clone());
                }
                None => break,
            }
        }
        if part.start > end {
            break;
        }
        if part.end > best.map_or(end, |best| best.end) {
            best = Some(part);
        }
    }
    chosen.extend(best.filter(|best| best.end > end).cloned());
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_chain_reaches_as_far_as_all_parts_do(mut ranges in proptest::collection::vec((0u64..40, 1u64..9), 0..20)) {
            ranges.sort_unstable();
            let part = |(start, length): &(u64, u64)| ListedPart {
                start: *start,
                end: start + length,
                stored_bytes: 0,
                key: ObjectKey::new(format!("x/{start}-{length}")).unwrap(),
            };
            let parts: Vec<_> = ranges.iter().map(part).collect();
            let held = |at: u64| parts.iter().any(|part| (part.start..part.end).contains(&at));
            let expected = (0..).find(|at| !held(*at)).unwrap();
            let chain = chain(&parts);
            prop_assert_eq!(chain.last().map_or(0, |part| part.end), expected);
            let mut end = 0;
            for part in &chain {
                prop_assert!(part.start <= end && part.end > end);
                end = part.end;
            }
        }
    }
}
