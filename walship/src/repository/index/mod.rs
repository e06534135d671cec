//! The index: roll-ups in the store, found, read, written.
//!
//! A cache. Whatever cannot be read or makes no sense is as good as not there, and nobody's failure:
//! readers answer with what is sound. [`mod@write`] extends it at its right edge while segments are archived,
//! [`mod@complete`] makes all of it.

pub mod backups;
pub mod complete;
pub mod write;

use std::io::Read as _;

use crate::codec::Digest;
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId};
use crate::storage::{ObjectKey, PutOutcome};
use crate::wal::rollup::{self, BYTES_MAX, Entry, Place, Rollup};

use super::LineageRepository;
use super::layout::RollupKey;
use super::listing::Listed;

/// The longest stored roll-up that is read.
const STORED_BYTES_MAX: u64 = BYTES_MAX;

/// How hard roll-ups are compressed: they are small, and read more often than written.
const ZSTD_LEVEL: i32 = 3;

/// A roll-up that a listing names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRollup(RollupKey);

impl StoredRollup {
    /// Returns the roll-up that an entry of the roll-up above names.
    pub fn of_entry(parent: &Rollup, entry: &Entry) -> Option<Self> {
        let level = parent.level.checked_sub(1).filter(|level| *level > 0)?;
        let place = Place::of(entry.runs.first()?.first, parent.segment_size, level);
        let digest = entry.digest.get(..32)?.to_owned();
        Some(Self(RollupKey { place, segments: entry.segments(), digest }))
    }

    /// Returns what it stands for.
    pub fn place(&self) -> Place {
        self.0.place
    }

    /// Returns how many segments it says that it covers.
    pub fn segments(&self) -> u64 {
        self.0.segments
    }

    /// Returns whether this is the roll-up with that digest.
    fn has_digest(&self, digest: &str) -> bool {
        digest.get(..32) == Some(&self.0.digest)
    }
}

/// A whole segment, as a listing shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListedSegment {
    /// Its name.
    pub name: SegmentName,
    /// The length of its object.
    pub stored_bytes: u64,
    /// Whether a good copy lies beside it: the object itself was found damaged.
    pub has_copy: bool,
}

/// A roll-up that was read or written, and the digest of its JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The roll-up.
    pub rollup: Rollup,
    /// In hex.
    pub digest: String,
}

impl LineageRepository {
    /// Returns every stored roll-up of a level of a timeline from `from` on and before `until` (numbers of
    /// segments), in WAL order, for each place the one that covers least first.
    ///
    /// One request for each thousand.
    pub async fn rollups(
        &self,
        timeline: TimelineId,
        level: u8,
        from: u64,
        until: u64,
    ) -> Result<Vec<StoredRollup>> {
        let size = self.lineage.segment_size;
        let prefix = self.layout.rollups_prefix(timeline, level);
        let mut after = self.layout.rollups_from(Place { timeline, level, first: from }, size);
        let mut found = Vec::new();
        loop {
            let page = self.storage.list(&prefix, Some(&after)).await?;
            for meta in &page.objects {
                let Some(key) = self.layout.parse_rollup(&meta.key, size) else { continue };
                if key.place.first >= until {
                    return Ok(found);
                }
                found.push(StoredRollup(key));
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(found),
            }
        }
    }

    /// Returns a roll-up, checked; `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not what its key says, [`Error::Mismatch`] when its format is newer.
    pub async fn read_rollup(&self, stored: &StoredRollup) -> Result<Option<Known>> {
        let size = self.lineage.segment_size;
        let key = self.layout.rollup(&stored.0, size)?;
        let Some(bytes) = self.storage.get(&key, STORED_BYTES_MAX).await? else { return Ok(None) };
        let damaged = |what: &str| Error::corrupt(format!("{}: {what}", self.shown(&key)));
        let mut json = Vec::new();
        zstd::stream::read::Decoder::new(&*bytes)
            .and_then(|decoder| decoder.take(BYTES_MAX + 1).read_to_end(&mut json))
            .map_err(|error| damaged(&format!("it cannot be decompressed: {error}")))?;
        if json.len() as u64 > BYTES_MAX {
            return Err(damaged("it is longer than any roll-up"));
        }
        let digest = Digest::of(&json).to_string();
        if !stored.has_digest(&digest) {
            return Err(damaged("its digest is not that of its key"));
        }
        let rollup: Rollup = serde_json::from_slice(&json).map_err(|error| damaged(&error.to_string()))?;
        if rollup.format > rollup::FORMAT {
            return Err(Error::mismatch(format!("{}: format {} is newer", self.shown(&key), rollup.format)));
        }
        rollup.check().map_err(damaged)?;
        let ours = rollup.segment_size == size && rollup.system_identifier == self.lineage.system_identifier;
        if !ours || rollup.place() != stored.place() || rollup.segments() != stored.segments() {
            return Err(damaged("it is another roll-up"));
        }
        Ok(Some(Known { rollup, digest }))
    }

    /// Returns a roll-up, checked; `None` when it is not there or cannot be read for whatever reason of its own:
    /// damaged, of a newer format, on a bad sector, not to be read by this user.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: the store may not answer for anything else either.
    pub async fn read_sound_rollup(&self, stored: &StoredRollup) -> Result<Option<Known>> {
        let read = |one: Self| async move { one.read_rollup(stored).await };
        match self.ask_each(String::new(), read).await {
            Err(error @ Error::Unavailable(_)) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "a roll-up cannot be read");
                Ok(None)
            }
            read => read,
        }
    }

    /// Stores a roll-up, unless it is stored already, and returns the digest of its JSON.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is larger than any may be.
    pub async fn put_rollup(&self, rollup: &Rollup) -> Result<(String, PutOutcome)> {
        let (digest, json) = encode(rollup)?;
        let stored = zstd::encode_all(&*json, ZSTD_LEVEL)
            .map_err(|error| Error::from_io("compressing a roll-up", error))?;
        let key = self.rollup_key(rollup, &digest);
        let key = self.layout.rollup(&key.0, self.lineage.segment_size)?;
        let outcome = self.storage.put_if_absent(&key, stored.into()).await?;
        Ok((digest, outcome))
    }

    pub(in crate::repository) fn stored_rollup_key(&self, stored: &StoredRollup) -> Result<ObjectKey> {
        self.layout.rollup(&stored.0, self.lineage.segment_size)
    }

    /// Removes a roll-up: one that is damaged, so that a good one can take its key.
    async fn remove_rollup(&self, stored: &StoredRollup) -> Result<()> {
        self.storage.delete(&self.layout.rollup(&stored.0, self.lineage.segment_size)?).await
    }

    fn rollup_key(&self, rollup: &Rollup, digest: &str) -> StoredRollup {
        let digest = digest.get(..32).unwrap_or(digest).to_owned();
        StoredRollup(RollupKey { place: rollup.place(), segments: rollup.segments(), digest })
    }

    /// Returns where a roll-up lies, for messages.
    pub fn rollup_location(&self, stored: &StoredRollup) -> String {
        match self.layout.rollup(&stored.0, self.lineage.segment_size) {
            Ok(key) => self.shown(&key),
            Err(_) => self.location(),
        }
    }

    /// Returns the whole segments that are stored on a timeline from `from` on and before `until` (numbers
    /// of segments), with their stored size. One request for each thousand objects.
    pub async fn segments_between(
        &self,
        timeline: TimelineId,
        from: u64,
        until: u64,
    ) -> Result<Vec<(SegmentName, u64)>> {
        let found = self.segments_listed(timeline, from, until).await?;
        Ok(found.into_iter().map(|listed| (listed.name, listed.stored_bytes)).collect())
    }

    /// Returns what [`LineageRepository::segments_between`] does, and which of them have a good copy beside
    /// a damaged object.
    pub async fn segments_listed(
        &self,
        timeline: TimelineId,
        from: u64,
        until: u64,
    ) -> Result<Vec<ListedSegment>> {
        if !self.has_others() {
            return self.listed_here(timeline, from, until).await;
        }
        let (mut found, mut failure, mut answered) = (Vec::new(), None, false);
        for one in self.each() {
            match one.listed_here(timeline, from, until).await {
                Ok(listed) => {
                    answered = true;
                    Self::join_lists(&mut found, listed);
                }
                Err(error) => {
                    one.failed(&error);
                    failure = Some(error);
                }
            }
            if found.len() as u64 == until.saturating_sub(from) {
                return Ok(found);
            }
        }
        match failure {
            Some(error) if !answered => Err(error),
            Some(error) => {
                self.note(format!("a repository could not be asked for all segments: {error}"));
                Ok(found)
            }
            None => Ok(found),
        }
    }

    async fn listed_here(&self, timeline: TimelineId, from: u64, until: u64) -> Result<Vec<ListedSegment>> {
        let mut found: Vec<ListedSegment> = Vec::new();
        self.wal_between(timeline, from, until, |listed| match listed {
            Listed::Segment(name, stored_bytes) => {
                found.push(ListedSegment { name, stored_bytes, has_copy: false })
            }
            // In key order a copy comes right behind its object.
            Listed::Copy(name) => {
                if let Some(last) = found.last_mut().filter(|last| last.name == name) {
                    last.has_copy = true;
                }
            }
            Listed::Partial(_) | Listed::Incomplete(_) | Listed::BackupHistory(_) => {}
        })
        .await?;
        Ok(found)
    }
}

/// Returns a roll-up's digest and JSON.
fn encode(rollup: &Rollup) -> Result<(String, Vec<u8>)> {
    let json = serde_json::to_vec(rollup)
        .map_err(|error| Error::invalid(format!("a roll-up cannot be written as JSON: {error}")))?;
    if json.len() as u64 > BYTES_MAX {
        return Err(Error::invalid(format!("a roll-up of {} bytes is larger than any may be", json.len())));
    }
    Ok((Digest::of(&json).to_string(), json))
}
