//! WAL files in a lineage: put, get, and what a listing says of them.

use std::fs::File;

use crate::codec::{EncodedObject, ObjectHead, ObjectKind};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineHistory, TimelineId, WalFileName};
use crate::storage::list_all;
use crate::wal::SegmentSummary;

use super::LineageRepository;
use super::stored::{Expected, Target, ToFile, ToMemory};

/// More `.partial` files or incomplete segments than one name ever has.
const VARIANTS_MAX: usize = 1000;

/// What became of a WAL file that was put. In every case it is durable now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// It was stored under its key.
    Stored,
    /// The same content was stored already; that object is whole, and durable now.
    AlreadyStored,
    /// The object under its key is damaged; a good copy was stored beside it.
    StoredBesideDamaged {
        /// Where the copy is.
        copy: String,
        /// What is wrong with the object.
        damage: String,
    },
}

/// Something that `check` reports: a WAL object that is not part of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Its key, with the repository's root.
    pub location: String,
    /// PostgreSQL's name of the file.
    pub name: WalFileName,
    /// What it is.
    pub kind: ObjectKind,
    /// Whether it is a good copy beside a damaged object.
    pub is_copy: bool,
}

/// A stored segment's summary, and of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summarized {
    /// What the segment holds.
    pub summary: SegmentSummary,
    /// The digest of the segment, in hex.
    pub digest: String,
    /// The length of the object that holds it, in bytes.
    pub stored_bytes: u64,
}

impl LineageRepository {
    /// Stores an encoded WAL file under the key that its envelope says.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the key holds other content, as far as its envelope is sound; [`Error::Mismatch`] when the
    /// envelope is not this lineage's.
    /// # Durability
    /// After `Ok` the content survives a crash, whoever put it there.
    pub async fn put_wal_file(&self, object: &EncodedObject) -> Result<Put> {
        let envelope = &object.envelope;
        let ours = &self.lineage;
        if envelope.segment_size != ours.segment_size
            || ![0, ours.system_identifier].contains(&envelope.system_identifier)
        {
            return Err(Error::mismatch(format!(
                "{} belongs to system identifier {} with segments of {}, {} to {} with {}",
                envelope.name,
                envelope.system_identifier,
                envelope.segment_size,
                self.location(),
                ours.system_identifier,
                ours.segment_size
            )));
        }
        let key = self.layout.wal(envelope.name, envelope.kind, &envelope.digest)?;
        let put = self.put_object(&key, object).await?;
        if put == Put::Stored {
            self.fresh.keep(object);
        }
        Ok(put)
    }

    /// Writes a WAL file's original content into `file` (from its start, truncating it) and returns
    /// what its head says; `None` when the store says that it is not there. Everything is checked
    /// against the digest; where the object is damaged, a good copy of it is used.
    ///
    /// A `.partial` of which several are stored is refused.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no valid copy is stored; the content of `file` is worthless then.
    pub async fn get_wal_file(&self, name: WalFileName, file: &File) -> Result<Option<ObjectHead>> {
        let target = || {
            let clone =
                file.try_clone().map_err(|error| Error::from_io("duplicating a file handle", error))?;
            Ok(ToFile(clone))
        };
        Ok(self.get(name, target).await?.map(|(head, ())| head))
    }

    /// Returns a WAL file's original content, checked; `None` when it is not there. For whole
    /// segments up to 1 GiB this is as much memory as the segment is long.
    pub async fn wal_file_bytes(&self, name: WalFileName) -> Result<Option<Vec<u8>>> {
        let read = |one: Self| async move {
            let Some((head, bytes)) = one.get(name, || Ok(ToMemory)).await? else { return Ok(None) };
            if let WalFileName::Segment(name) = name {
                self.check_right(name, &head.envelope.digest.to_string(), &one)?;
            }
            Ok(Some(bytes))
        };
        self.ask_each(name.to_string(), read).await
    }

    /// Returns a segment's original content, checked; `None` when it is not there.
    pub async fn segment_bytes(&self, name: SegmentName) -> Result<Option<Vec<u8>>> {
        self.wal_file_bytes(WalFileName::Segment(name)).await
    }

    /// Returns what a segment holds, with one ranged GET; `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no readable copy of the summary is stored.
    pub async fn segment_summary(&self, name: SegmentName) -> Result<Option<SegmentSummary>> {
        Ok(self.summarized(name).await?.map(|segment| segment.summary))
    }

    /// Returns what a segment holds and which content that is said of, with one ranged GET; `None` when
    /// it is not there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no readable copy of the summary is stored.
    pub async fn summarized(&self, name: SegmentName) -> Result<Option<Summarized>> {
        let read = |one: Self| async move {
            let found = one.summarized_here(name).await?;
            found.iter().try_for_each(|found| self.check_right(name, &found.digest, &one))?;
            Ok(found)
        };
        self.ask_each(format!("the summary of segment {name}"), read).await
    }

    pub(super) async fn summarized_here(&self, name: SegmentName) -> Result<Option<Summarized>> {
        let key = self.layout.segment(name)?;
        let expected = Expected { name: WalFileName::Segment(name), kind: ObjectKind::Segment };
        let Some(head) = self.read_head(&key, expected).await? else { return Ok(None) };
        let (digest, stored_bytes) = (head.envelope.digest.to_string(), head.object_bytes());
        match head.summary {
            Some(summary) if summary.segment == name => {
                Ok(Some(Summarized { summary, digest, stored_bytes }))
            }
            _ => Err(Error::corrupt(format!("{} has no summary of its own", self.shown(&key)))),
        }
    }

    /// Returns the history of `timeline` (for timeline 1 without asking the store); `None` when its
    /// file is not there.
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
        if timeline == TimelineId::FIRST {
            return Ok(Some(TimelineHistory::root(timeline)));
        }
        let name = WalFileName::History(timeline);
        let Some(bytes) = self.wal_file_bytes(name).await? else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes);
        TimelineHistory::parse(timeline, &text)
            .map(Some)
            .map_err(|error| Error::corrupt(format!("{} in {}: {error}", name, self.location())))
    }

    /// Returns a stored object that lies behind `name` on its timeline, if there is one: any later
    /// segment, whole or not, or a part of one; for a history file, any WAL of its timeline and anything of
    /// later ones. Up to two requests, for a history file up to three.
    pub async fn anything_after(&self, name: WalFileName) -> Result<Option<String>> {
        match name {
            WalFileName::Segment(segment)
            | WalFileName::Partial(segment)
            | WalFileName::BackupHistory(segment, _) => {
                let prefix = self.layout.timeline_prefix(segment.timeline);
                let page = self.storage.list(&prefix, Some(&self.layout.after_segment(segment))).await?;
                match page.objects.first() {
                    Some(meta) => Ok(Some(self.shown(&meta.key))),
                    None => self.tail_after(segment).await,
                }
            }
            WalFileName::History(timeline) => {
                let own = self.storage.list(&self.layout.timeline_prefix(timeline), None).await?;
                match own.objects.first() {
                    Some(meta) => Ok(Some(self.shown(&meta.key))),
                    None => match self.any_tail(timeline).await? {
                        Some(location) => Ok(Some(location)),
                        None => Ok(self.first_above(timeline).await?.map(|(_, location)| location)),
                    },
                }
            }
        }
    }

    /// Returns the stored histories of all timelines above `timeline`, in ascending order. One request
    /// for each timeline and one for its history file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when one of them cannot be read.
    pub async fn histories_above(&self, timeline: TimelineId) -> Result<Vec<TimelineHistory>> {
        let mut histories = Vec::new();
        let mut behind = timeline;
        while let Some((next, _)) = self.first_above(behind).await? {
            histories.extend(self.history(next).await?);
            behind = next;
        }
        Ok(histories)
    }

    /// Returns the next timeline above `timeline` of which anything is stored, and where.
    async fn first_above(&self, timeline: TimelineId) -> Result<Option<(TimelineId, String)>> {
        let prefix = self.layout.wal_prefix();
        let mut mark = self.layout.after_timeline(timeline);
        loop {
            let page = self.storage.list(&prefix, Some(&mark)).await?;
            // Stores that keep folders list `00000002/` before `00000002.history`, others after it: both
            // orders end the search at the first key of a timeline above.
            let found = page.objects.iter().find_map(|meta| {
                let above = self.layout.parse_wal(&meta.key)?.name.timeline();
                (above > timeline).then(|| (above, self.shown(&meta.key)))
            });
            match (found, page.next) {
                (Some(found), _) => return Ok(Some(found)),
                (None, Some(next)) => mark = next,
                (None, None) => return Ok(None),
            }
        }
    }

    /// Returns where a segment's bytes were put aside as incomplete, if they were.
    pub async fn incomplete_of(&self, name: SegmentName) -> Result<Vec<String>> {
        let prefix = self.layout.variants_prefix(name, ObjectKind::Incomplete);
        let listed = list_all(&*self.storage, &prefix, VARIANTS_MAX).await?;
        Ok(listed.iter().map(|meta| self.shown(&meta.key)).collect())
    }

    async fn get<T: Target>(
        &self,
        name: WalFileName,
        target: impl FnMut() -> Result<T>,
    ) -> Result<Option<(ObjectHead, T::Output)>> {
        let expected = Expected { name, kind: ObjectKind::of(name) };
        let key = match name {
            WalFileName::Segment(segment) => self.layout.segment(segment)?,
            WalFileName::History(timeline) => self.layout.history(timeline)?,
            WalFileName::BackupHistory(..) => {
                self.layout.wal(name, ObjectKind::BackupHistory, &crate::codec::Digest([0; 32]))?
            }
            WalFileName::Partial(segment) => {
                let prefix = self.layout.variants_prefix(segment, ObjectKind::Partial);
                let mut listed = list_all(&*self.storage, &prefix, VARIANTS_MAX).await?;
                listed.retain(|meta| self.layout.parse_wal(&meta.key).is_some_and(|key| !key.is_copy));
                match &*listed {
                    [] => return Ok(None),
                    [only] => only.key.clone(),
                    several => {
                        let keys: Vec<_> = several.iter().map(|meta| self.shown(&meta.key)).collect();
                        return Err(Error::conflict(format!(
                            "{name} is stored {} times with different content: {}",
                            several.len(),
                            keys.join(", ")
                        ))
                        .with_next(
                            "Decode the right one with `lz4 -d` or `zstd -d` (docs/repository-format.md).",
                        ));
                    }
                }
            }
        };
        self.read_valid(&key, expected, target).await
    }
}
