//! The ledger of WAL that is known to be missing: written, listed, read.
//!
//! Keys tell where the gaps are, so one listing is enough for most questions; documents tell why.

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::{GapCause, GapKind, GapRecord, StoredSegments};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use crate::storage::{ObjectKey, list_all};

use super::document::{self, DOCUMENT_BYTES_MAX, DOCUMENT_VERSION};
use super::layout::GapKey;
use super::{LineageRepository, new_backup_id};

/// More gaps than anybody can live with.
const GAPS_MAX: usize = 10_000;

/// How many records are read at once.
const READS_MAX: usize = 16;

/// The longest text of a cause.
pub const CAUSE_BYTES_MAX: usize = 1000;

/// A gap of the ledger as its key tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedGap {
    key: ObjectKey,
    told: GapKey,
}

impl ListedGap {
    /// Returns the position of its first byte.
    pub fn start_lsn(&self) -> Lsn {
        self.told.start
    }

    /// Returns the position after its last byte.
    pub fn end_lsn(&self) -> Lsn {
        self.told.end
    }

    /// Returns whether it misses a byte of this segment.
    pub fn touches(&self, segment: SegmentName, size: SegmentSize) -> bool {
        self.unread(String::new()).touches(segment, size)
    }

    /// Returns whether it misses all of `[start, end)`, whatever its content.
    pub fn misses_all_of(&self, start: Lsn, end: Lsn) -> bool {
        self.told.digest.is_none() && self.told.start <= start && end <= self.told.end
    }

    /// Returns whether it misses another content than the one with this digest (64 hex digits).
    pub fn misses_other_than(&self, digest: &str) -> bool {
        self.told.digest.is_some() && self.told.digest.as_deref() != digest.get(..32)
    }

    /// Returns what the key alone tells, with `text` in the place of the cause.
    fn unread(&self, text: String) -> GapRecord {
        GapRecord {
            format: DOCUMENT_VERSION,
            id: self.told.id.clone(),
            timeline: self.told.timeline,
            start_lsn: self.told.start,
            end_lsn: self.told.end,
            cause: GapCause { kind: GapKind::Unknown, text },
            segment_digest: self.told.digest.clone(),
            recorded: chrono::DateTime::UNIX_EPOCH,
            host: String::new(),
            user: String::new(),
        }
    }
}

/// Returns the id of a gap that is recorded at `now`; `random` makes it unlike all others.
pub fn new_gap_id(now: chrono::DateTime<chrono::Utc>, random: u64) -> String {
    new_backup_id(now, random)
}

impl LineageRepository {
    /// Writes a gap into the ledger. The same record again is success.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a record that says nothing that a reader could use.
    /// # Durability
    /// After `Ok` the record survives a crash.
    pub async fn put_gap(&self, record: &GapRecord) -> Result<()> {
        let text = &record.cause.text;
        if record.format != DOCUMENT_VERSION || record.cause.kind == GapKind::Unknown {
            return Err(Error::invalid("a gap of unknown cause or format cannot be recorded"));
        }
        if text.trim().is_empty() || text.len() > CAUSE_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(Error::invalid(format!(
                "the cause of a gap is one line of at most {CAUSE_BYTES_MAX} bytes, and not empty"
            )));
        }
        let key = self.layout.gap(&key_of(record))?;
        document::put_same(&*self.storage, &key, record).await
    }

    /// Returns the gaps of one timeline, open and closed, in WAL order, as their keys tell them. One request.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a key that is not a gap's: what it says is not known.
    pub async fn gaps_of(&self, timeline: TimelineId) -> Result<Vec<ListedGap>> {
        self.list_gaps(&self.layout.timeline_gaps_prefix(timeline)).await?.into_iter().collect()
    }

    /// Returns the gaps of all timelines, open and closed, as their keys tell them; of each key that is not a gap's, that
    /// it is none.
    pub(super) async fn all_gaps(&self) -> Result<Vec<Result<ListedGap>>> {
        self.list_gaps(&self.layout.gaps_prefix()).await
    }

    /// Returns the key of a gap's record.
    pub(super) fn gap_key(&self, record: &GapRecord) -> Result<ObjectKey> {
        self.layout.gap(&key_of(record))
    }

    async fn list_gaps(&self, prefix: &str) -> Result<Vec<Result<ListedGap>>> {
        let listed = list_all(&*self.storage, prefix, GAPS_MAX).await?;
        let gaps = listed.into_iter().map(|meta| match self.layout.parse_gap(&meta.key) {
            Some(told) => Ok(ListedGap { key: meta.key, told }),
            None => Err(Error::corrupt(format!(
                "{} is not the name of a gap's record: which WAL it says is missing is not known",
                self.shown(&meta.key)
            ))
            .with_next(
                "Look at the object: what does not belong to the repository has to be removed; else use the \
                 newest walship that writes to it.",
            )),
        });
        Ok(gaps.collect())
    }

    /// Returns a gap's record. One whose document is damaged or gone has the unknown cause.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when its format is newer.
    pub async fn read_gap(&self, gap: &ListedGap) -> Result<GapRecord> {
        let read = document::read_listed::<GapRecord>(&*self.storage, &gap.key, DOCUMENT_BYTES_MAX).await;
        let shown = self.shown(&gap.key);
        Ok(match read {
            Ok(Some(record)) if key_of(&record) == gap.told => cleaned(record),
            Ok(Some(_)) => gap.unread(format!("unknown cause: {shown} is the record of another gap")),
            Ok(None) => gap.unread(format!("unknown cause: {shown} was listed a moment ago and is gone")),
            Err(error @ Error::Corrupt(_)) => gap.unread(format!("unknown cause: {error}")),
            Err(error) if self.storage.skip(gap.key.as_str(), &error) => {
                gap.unread(format!("unknown cause: {error}"))
            }
            Err(error) => return Err(error),
        })
    }

    /// Returns those of the listed gaps that are open. A stored segment that is not the WAL that a gap misses is taken out of `segments`, and
    /// so is what was expired: an index that is behind may tell of it, and what is still there goes at any moment.
    pub(super) async fn load_gaps(
        &self,
        listed: Vec<ListedGap>,
        segments: &mut StoredSegments,
    ) -> Result<Vec<GapRecord>> {
        let size = self.lineage.segment_size;
        let mut open = Vec::new();
        for gap in listed {
            let told = gap.unread(String::new());
            if told.is_covered_by(segments, size) && gap.told.digest.is_some() {
                let Some(name) = self.other_content(&gap).await? else { continue };
                segments.remove(&name);
            }
            open.push(gap);
        }
        let reads = open.iter().map(|gap| self.read_gap(gap));
        let read: Vec<GapRecord> =
            futures_util::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        for gap in read.iter().filter(|gap| gap.is_expired()) {
            let (from, until) = gap.whole_segments(size);
            segments.remove_range(gap.timeline, from, until);
        }
        let closed = |gap: &GapRecord| gap.segment_digest.is_none() && gap.is_covered_by(segments, size);
        // What was missing of WAL that was expired since is nobody's trouble any more.
        let expired: Vec<GapRecord> = read.iter().filter(|gap| gap.is_expired()).cloned().collect();
        let overtaken = |gap: &GapRecord| {
            !gap.is_expired()
                && expired.iter().any(|by| {
                    by.timeline == gap.timeline && by.start_lsn <= gap.start_lsn && gap.end_lsn <= by.end_lsn
                })
        };
        Ok(read.into_iter().filter(|gap| !closed(gap) && !overtaken(gap)).collect())
    }

    /// Returns the segment that is stored where the gap misses another content.
    async fn other_content(&self, gap: &ListedGap) -> Result<Option<SegmentName>> {
        if gap.told.digest.is_none() {
            return Ok(None);
        }
        let size = self.lineage.segment_size;
        let name = SegmentName::containing(gap.told.timeline, gap.told.start, size);
        let stored = match self.summarized(name).await {
            Ok(stored) => stored,
            // Which content it had cannot be said: then it is not known to be the missing one.
            Err(Error::Corrupt(_)) => None,
            Err(error) => return Err(error),
        };
        let same = stored.is_some_and(|stored| !gap.misses_other_than(&stored.digest));
        Ok((!same).then_some(name))
    }
}

fn key_of(record: &GapRecord) -> GapKey {
    GapKey {
        timeline: record.timeline,
        start: record.start_lsn,
        end: record.end_lsn,
        id: record.id.clone(),
        digest: record.segment_digest.as_deref().map(|digest| digest.get(..32).unwrap_or(digest).to_owned()),
    }
}

/// Returns the record with texts that cannot command a terminal or fill a log.
fn cleaned(mut record: GapRecord) -> GapRecord {
    for text in [&mut record.cause.text, &mut record.host, &mut record.user] {
        let clean = text.chars().map(|c| if c.is_control() { '?' } else { c });
        *text = clean.take(CAUSE_BYTES_MAX).collect();
    }
    record
}
