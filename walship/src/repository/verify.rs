//! What verification reads: every stored object by its own key, none in another's place.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;

use crate::catalog::{BackupRecord, Catalog};
use crate::codec::{ObjectHead, ObjectKind};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, TimelineId, WalFileName};
use crate::storage::metered::{Meter, MeteredStorage};
use crate::storage::{ObjectKey, ObjectMeta, list_all};
use crate::wal::rollup::build::{Part, build};

use super::LineageRepository;
use super::backups::STARTED;
use super::document::{self, RECORD_BYTES_MAX};
use super::index::StoredRollup;
use super::load_catalog::started_ids;
use super::stored::{Expected, Target};
use super::tails::ListedPart;

/// More records of the ledger and marks than there ever are.
const TRACES_MAX: usize = 1_000_000;

/// One object below `wal/`, as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalObject {
    /// The file's name.
    pub name: WalFileName,
    /// What its key says that it holds.
    pub kind: ObjectKind,
    /// Whether it is a good copy beside a damaged object.
    pub is_copy: bool,
    /// The length that the listing says.
    pub stored_bytes: u64,
    key: ObjectKey,
}

/// What a listing of WAL shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListedWal {
    /// The objects, in the order of their keys.
    pub objects: Vec<WalObject>,
    /// Keys that the format does not name.
    pub strangers: Vec<String>,
}

/// What a roll-up turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RollupState {
    /// It says what it is made from.
    Sound,
    /// It is gone.
    Gone,
    /// What it was made from is gone, or cannot be read.
    CannotTell,
    /// It is damaged, or says something else.
    Wrong(String),
}

/// Decodes into a writer that is given back.
struct Into<W>(Option<W>);

impl<W: Write + Send + 'static> Target for Into<W> {
    type Output = W;

    fn run(&mut self, decode: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<W> {
        let mut writer =
            self.0.take().ok_or_else(|| Error::invalid("an object is decoded into a writer only once"))?;
        decode(&mut writer)?;
        Ok(writer)
    }
}

impl LineageRepository {
    /// Returns this repository alone, with every read told to the meter. Its listings leave out folders that cannot be read, and
    /// name them in [`LineageRepository::skipped`].
    #[must_use]
    pub fn metered(&self, meter: Arc<Meter>) -> Self {
        let inner = self.storage.skipping().unwrap_or_else(|| Arc::clone(&self.storage));
        Self { storage: Arc::new(MeteredStorage::new(inner, meter)), ..self.clone() }
    }

    /// Returns what listings have left out because it cannot be read, with why: paths below the lineage's folder, an empty
    /// one where that is all of it. What lies elsewhere is none of its concern.
    pub fn skipped(&self) -> BTreeMap<String, String> {
        let base = self.layout.base();
        let below = |path: &str| match path.strip_prefix(base) {
            Some(rest) => {
                rest.is_empty().then(String::new).or_else(|| Some(rest.strip_prefix('/')?.to_owned()))
            }
            None => base.starts_with(&format!("{path}/")).then(String::new),
        };
        self.storage.skipped().into_iter().filter_map(|(path, why)| Some((below(&path)?, why))).collect()
    }

    /// Returns everything that is stored under `wal/` of the segments of a timeline from `from` on and before `until`
    /// (their numbers). One request for each thousand objects.
    pub async fn wal_objects(&self, timeline: TimelineId, from: u64, until: u64) -> Result<ListedWal> {
        let size = self.lineage.segment_size;
        let mut found = ListedWal::default();
        let Some(first) = SegmentName::from_number(timeline, from, size) else { return Ok(found) };
        let prefix = self.layout.timeline_prefix(timeline);
        let mut after = self.layout.before_segment(first);
        loop {
            let page = self.storage.list(&prefix, Some(&after)).await?;
            for meta in page.objects {
                let Some(object) = self.wal_object(&meta) else {
                    found.strangers.push(self.shown(&meta.key));
                    continue;
                };
                let (WalFileName::Segment(name)
                | WalFileName::Partial(name)
                | WalFileName::BackupHistory(name, _)) = object.name
                else {
                    continue;
                };
                if name.number(size) >= until {
                    return Ok(found);
                }
                found.objects.push(object);
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(found),
            }
        }
    }

    /// Returns the history files that are stored, good copies of damaged ones among them. One or two requests for each
    /// timeline.
    pub async fn history_objects(&self) -> Result<Vec<WalObject>> {
        let mut found = Vec::new();
        for timeline in self.stored_timelines().await? {
            let key = self.layout.history(timeline)?;
            let page = self.storage.list(key.as_str(), None).await?;
            let objects = page.objects.iter().filter_map(|meta| self.wal_object(meta));
            found.extend(objects.filter(|object| object.kind == ObjectKind::History));
        }
        Ok(found)
    }

    fn wal_object(&self, meta: &ObjectMeta) -> Option<WalObject> {
        let key = self.layout.parse_wal(&meta.key)?;
        Some(WalObject {
            name: key.name,
            kind: key.kind,
            is_copy: key.is_copy,
            stored_bytes: meta.bytes,
            key: meta.key.clone(),
        })
    }

    /// Returns where an object lies, for messages.
    pub fn wal_location(&self, object: &WalObject) -> String {
        self.shown(&object.key)
    }

    /// Reads an object whole, checks it in every way in which the format can be checked, and decodes it into `sink`, which is
    /// given back. `None` when it is not there any more.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for damage; then the sink is lost.
    pub async fn read_wal_object<W: Write + Send + 'static>(
        &self,
        object: &WalObject,
        sink: W,
    ) -> Result<Option<(ObjectHead, W)>> {
        let expected = Expected { name: object.name, kind: object.kind };
        let read = self.read_one(&object.key, expected, Into(Some(sink))).await?;
        let Some((head, sink)) = read else { return Ok(None) };
        if head.object_bytes() != object.stored_bytes {
            return Err(Error::corrupt(format!(
                "{} has {} bytes, its envelope says {}",
                self.shown(&object.key),
                object.stored_bytes,
                head.object_bytes()
            )));
        }
        // Variants and copies name the digest of their content.
        let named = object.key.as_str().rsplit_once('.').map(|(_, digest)| digest.trim_start_matches('r'));
        let has_digest =
            object.is_copy || matches!(object.kind, ObjectKind::Partial | ObjectKind::Incomplete);
        if has_digest && named != Some(&*head.envelope.digest.short()) {
            return Err(Error::corrupt(format!(
                "{} holds content with the digest {}",
                self.shown(&object.key),
                head.envelope.digest
            )));
        }
        Ok(Some((head, sink)))
    }

    /// Returns the segments of a timeline of which parts are stored, in order. One request for each thousand.
    pub async fn segments_with_parts(&self, timeline: TimelineId) -> Result<BTreeSet<SegmentName>> {
        let prefix = self.layout.timeline_tails_prefix(timeline);
        let (mut found, mut after) = (BTreeSet::new(), None::<String>);
        loop {
            let page = self.storage.list_folders(&prefix, after.as_deref()).await?;
            let names = page.names.iter().filter_map(|name| name.parse::<SegmentName>().ok());
            found.extend(names.filter(|name| name.timeline == timeline));
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(found),
            }
        }
    }

    /// Reads a part whole and checks it; `false` when it is not there any more.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for damage.
    pub async fn check_part(&self, segment: SegmentName, part: &ListedPart) -> Result<bool> {
        Ok(self.tail_part_if_there(segment, part).await?.is_some())
    }

    /// Notes that a part cannot be read and is left out, as listings leave out folders; returns whether it may be.
    pub fn skip_part(&self, part: &ListedPart, error: &Error) -> bool {
        self.storage.skip(part.key.as_str(), error)
    }

    /// As [`LineageRepository::skip_part`], for an object below `wal/`.
    pub fn skip_wal_object(&self, object: &WalObject, error: &Error) -> bool {
        self.storage.skip(object.key.as_str(), error)
    }

    /// As [`LineageRepository::skip_part`], for one of a backup's own objects.
    pub fn skip_backup_object(&self, id: &str, name: &str, error: &Error) -> bool {
        self.layout.backup_object(id, name).is_ok_and(|key| self.storage.skip(key.as_str(), error))
    }

    /// Returns where a part lies, for messages.
    pub fn part_location(&self, part: &ListedPart) -> String {
        self.shown(&part.key)
    }

    /// Compares a roll-up with what it was made from: at the first level with the summaries of its segments as they are
    /// stored, above with the roll-ups below.
    ///
    /// # Errors
    /// What the store says; damage is an answer.
    pub async fn check_rollup(&self, stored: &StoredRollup) -> Result<RollupState> {
        let known = match self.read_rollup(stored).await {
            Ok(Some(known)) => known,
            Ok(None) => return Ok(RollupState::Gone),
            Err(Error::Corrupt(error)) => return Ok(RollupState::Wrong(error.to_string())),
            Err(Error::Mismatch(_)) => return Ok(RollupState::CannotTell),
            Err(error) => return Err(error),
        };
        let rollup = known.rollup;
        let mut parts = Vec::new();
        for entry in &rollup.entries {
            let part = if rollup.level == 1 {
                let Some(run) = entry.runs.first() else { continue };
                match self.summarized_here(run.first).await {
                    Ok(found) => {
                        found.map(|found| Part::of_segment(&found.summary, found.digest, found.stored_bytes))
                    }
                    Err(Error::Corrupt(_)) => None,
                    Err(error) => return Err(error),
                }
            } else {
                let Some(below) = StoredRollup::of_entry(&rollup, entry) else { continue };
                match self.read_rollup(&below).await {
                    Ok(found) => found.map(|known| Part::of_rollup(known.rollup, known.digest)),
                    Err(Error::Corrupt(_) | Error::Mismatch(_)) => None,
                    Err(error) => return Err(error),
                }
            };
            match part {
                Some(part) => parts.push(part),
                None => return Ok(RollupState::CannotTell),
            }
        }
        let made = build(rollup.place(), rollup.segment_size, rollup.system_identifier, parts);
        Ok(match made {
            Some(made) if made == rollup => RollupState::Sound,
            _ => RollupState::Wrong("it says something else than what it was made from".to_owned()),
        })
    }

    /// Returns the lists of backups that are damaged, or say something else than the backups' records: where, and what.
    ///
    /// # Errors
    /// What the store says; [`Error::Corrupt`] when a record cannot be read: then nothing can be compared.
    pub async fn wrong_backup_lists(&self) -> Result<Vec<(String, String)>> {
        let (_, wrong) = self.complete_backup_list(false, true).await?;
        Ok(wrong.into_iter().map(|(key, what)| (self.shown(&key), what)).collect())
    }

    /// Returns a complete backup's record as this repository stores it, its data objects too.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it cannot be read; [`Error::Missing`] when it is gone.
    pub async fn stored_record(&self, record: &BackupRecord) -> Result<BackupRecord> {
        let key =
            self.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn)?;
        let whole = document::read_within::<BackupRecord>(&*self.storage, &key, RECORD_BYTES_MAX).await?;
        whole.ok_or_else(|| Error::missing(format!("{} is gone", self.shown(&key))))
    }

    /// Returns what backups that did not complete said when they were begun, where that cannot be read: where, and what is
    /// wrong. `records` are the ids of all backups with a record, whether that can be read or not.
    ///
    /// # Errors
    /// What the store says.
    pub async fn unreadable_starts(&self, records: &BTreeSet<&str>) -> Result<Vec<(String, String)>> {
        let mut unreadable = Vec::new();
        for id in started_ids(self).await?.into_iter().filter(|id| !records.contains(&**id)) {
            match self.backup_started(&id).await {
                Err(Error::Corrupt(error) | Error::Mismatch(error)) => {
                    unreadable.push((format!("backup {id}"), error.to_string()));
                }
                Err(error) if self.skip_backup_object(&id, STARTED, &error) => {}
                other => drop(other?),
            }
        }
        Ok(unreadable)
    }

    /// Returns the keys of what a removal writes before it removes, and takes back: records of the ledger, marks of backups.
    /// What was looked at while they stayed the same was not looked at between two steps of one.
    ///
    /// # Errors
    /// What the store says.
    pub async fn traces_of_removals(&self) -> Result<Vec<ObjectKey>> {
        let mut keys = Vec::new();
        for prefix in [self.layout.gaps_prefix(), self.layout.expiring_prefix()] {
            let listed = list_all(&*self.storage, &prefix, TRACES_MAX).await?;
            keys.extend(listed.into_iter().map(|meta| meta.key));
        }
        Ok(keys)
    }

    /// Returns the documents of gaps and holds, and the marks of backups that are being removed, that cannot be read: where,
    /// and what is wrong.
    ///
    /// # Errors
    /// What the store says.
    pub async fn unreadable_documents(&self, catalog: &Catalog) -> Result<Vec<(String, String)>> {
        let (mut unreadable, skipped) = (Vec::new(), self.storage.skipped());
        for gap in &catalog.gaps {
            // A document that cannot be read is a gap of unknown cause.
            if gap.cause.kind == crate::catalog::GapKind::Unknown
                && !skipped.contains_key(self.gap_key(gap)?.as_str())
            {
                unreadable.push((format!("{}/gaps", self.location()), gap.cause.text.clone()));
            }
        }
        match self.holds().await {
            Err(Error::Corrupt(error) | Error::Mismatch(error)) => {
                unreadable.push((format!("{}/holds", self.location()), error.to_string()));
            }
            Err(error) if self.storage.skip(self.layout.holds_prefix().trim_end_matches('/'), &error) => {}
            other => drop(other?),
        }
        match self.marks().await {
            Err(Error::Corrupt(error) | Error::Mismatch(error)) => {
                unreadable.push((format!("{}/expiring", self.location()), error.to_string()));
            }
            other => drop(other?),
        }
        Ok(unreadable)
    }
}
