//! Base backups: started, data objects, manifest, and the record that makes them exist.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::catalog::{BackupObject, BackupRecord, Names, SettingsFile};
use crate::codec::Digest;
use crate::error::{Error, Result};
use crate::storage::{ObjectKey, PutOutcome, Upload, list_all};

use super::document::{
    self, BackupFinishing, BackupSettings, BackupStarted, DOCUMENT_BYTES_MAX, DOCUMENT_VERSION, ObjectNote,
    RECORD_BYTES_MAX, SavedFile,
};
use super::{LineageRepository, layout};

/// The longest stored manifest that is read: room for some ten million files.
const MANIFEST_BYTES_MAX: u64 = 1 << 30;

/// More than a backup has of data objects and of notes on them.
const DATA_OBJECTS_MAX: usize = 2_000_000;

/// The name of what is said at a backup's start.
pub(super) const STARTED: &str = "started.json";

/// What says that all of a backup is stored but its record.
const FINISHING: &str = "finishing.json";

/// The stored manifest's name below its backup's folder.
const MANIFEST: &str = "manifest.json.zst";

/// The stored settings files' name below their backup's folder.
const SETTINGS: &str = "settings.json";

/// The stored names' name below their backup's folder.
const NAMES: &str = "names.json.zst";

/// The longest document of names, in plain JSON.
const NAMES_BYTES_MAX: u64 = 128 << 20;

/// Returns the id of a backup that is begun at `now`; `random` makes it unlike all others.
pub fn new_backup_id(now: DateTime<Utc>, random: u64) -> String {
    format!("{}-{random:016x}", now.format("%Y%m%dT%H%M%SZ"))
}

/// On which machine, and by which user of it, something is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedBy {
    /// The machine's name; empty where it has none in UTF-8.
    pub host: String,
    /// The user's name, or number where it has none.
    pub user: String,
}

impl RecordedBy {
    /// Returns this machine and the user of this process.
    pub fn now() -> Self {
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let user = nix::unistd::geteuid();
        let known = nix::unistd::User::from_uid(user).ok().flatten();
        Self {
            host: host.unwrap_or_default(),
            user: known.map_or_else(|| user.to_string(), |user| user.name),
        }
    }
}

impl LineageRepository {
    /// Says that a backup was begun: WAL from its start on is needed from now on.
    pub async fn put_backup_started(&self, started: &BackupStarted) -> Result<()> {
        let key = self.layout.backup_object(&started.id, STARTED)?;
        document::put_same(&*self.storage, &key, started).await
    }

    /// Returns what was said when a backup was begun; `None` when nothing was, or it was removed.
    pub async fn backup_started(&self, id: &str) -> Result<Option<BackupStarted>> {
        let key = self.layout.backup_object(id, STARTED)?;
        document::read_listed(&*self.storage, &key, DOCUMENT_BYTES_MAX).await
    }

    /// Says that a backup is about to become complete: from now on it is not taken for given up. To be followed by
    /// [`LineageRepository::check_foundations`].
    pub async fn put_backup_finishing(&self, id: &str, now: DateTime<Utc>) -> Result<()> {
        let key = self.layout.backup_object(id, FINISHING)?;
        let document = BackupFinishing { format: DOCUMENT_VERSION, id: id.to_owned(), finishing: now };
        document::put_same(&*self.storage, &key, &document).await
    }

    /// Starts storing one of a backup's data objects, `data/000001.tar`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other name.
    pub async fn start_backup_object(&self, id: &str, name: &str) -> Result<Box<dyn Upload>> {
        self.storage.start_upload(&self.data_key(id, name)?).await
    }

    /// Returns up to `length` bytes from `offset` of a data object as stored; fewer at its end.
    ///
    /// # Errors
    /// [`Error::Missing`] when the object is not there: the backup is damaged.
    pub async fn read_backup_object_range(
        &self,
        id: &str,
        name: &str,
        offset: u64,
        length: u64,
    ) -> Result<Bytes> {
        let key = self.data_key(id, name)?;
        self.storage.get_range(&key, offset, length).await?.ok_or_else(|| {
            Error::missing(format!("{}, a part of the backup, is not there", self.shown(&key)))
        })
    }

    /// Looks whether each of a backup's data objects is stored with the length that its record says, in at least
    /// one repository; one LIST for each thousand.
    ///
    /// # Errors
    /// [`Error::Missing`] and [`Error::Corrupt`] for the first that is not; where a repository could not be
    /// listed, its error.
    pub async fn check_backup_objects(&self, record: &BackupRecord) -> Result<()> {
        let mut failure: Option<Error> = None;
        let mut open: Vec<&BackupObject> = record.objects.iter().collect();
        let folder = |object: &BackupObject| object.backup.clone().unwrap_or_else(|| record.id.clone());
        let folders: BTreeSet<String> = record.objects.iter().map(folder).collect();
        for one in self.each() {
            let stored = match one.backup_object_lengths(&folders).await {
                Ok(stored) => stored,
                Err(error) => {
                    one.failed(&error);
                    failure.get_or_insert(error);
                    continue;
                }
            };
            let mut left = Vec::new();
            for object in open {
                let key = one.data_key(&folder(object), &object.name)?;
                let found = stored.get(key.as_str()).copied();
                if found == Some(object.stored_bytes) {
                    continue;
                }
                failure.get_or_insert_with(|| match found {
                    None => {
                        Error::missing(format!("{}, a part of the backup, is not there", one.shown(&key)))
                    }
                    Some(bytes) => Error::corrupt(format!(
                        "{} has {bytes} bytes, the backup's record says {}",
                        one.shown(&key),
                        object.stored_bytes
                    )),
                });
                left.push(object);
            }
            open = left;
            if open.is_empty() {
                return Ok(());
            }
        }
        Err(failure.unwrap_or_else(|| Error::invalid("no repository is configured")))
    }

    /// Looks whether all that a restore reads of a backup is stored in this very repository: its manifest, the settings files
    /// saved beside it, and each data object with its length, also where it lies below another backup's folder.
    ///
    /// # Errors
    /// [`Error::Missing`] and [`Error::Corrupt`] for the first that is not.
    pub async fn check_backup_here(&self, record: &BackupRecord) -> Result<()> {
        let settings = (!record.settings_files.is_empty()).then_some(SETTINGS);
        for name in std::iter::once(MANIFEST).chain(settings) {
            let key = self.layout.backup_object(&record.id, name)?;
            if !self.is_listed(&key).await? {
                return Err(Error::missing(format!(
                    "{}, a part of the backup, is not there",
                    self.shown(&key)
                )));
            }
        }
        self.alone().check_backup_objects(record).await
    }

    /// Returns whether a backup has said that all of it is stored but its record, and its manifest is there.
    pub async fn was_finishing(&self, id: &str) -> Result<bool> {
        Ok(self.is_listed(&self.layout.backup_object(id, FINISHING)?).await?
            && self.is_listed(&self.layout.backup_object(id, MANIFEST)?).await?)
    }

    /// Returns whether an object is there, by a listing: where versions are kept, a read of what was removed is an error.
    pub(super) async fn is_listed(&self, key: &ObjectKey) -> Result<bool> {
        let listed = self.storage.list(key.as_str(), None).await?;
        Ok(listed.objects.iter().any(|meta| meta.key == *key))
    }

    /// Returns the lengths of the data objects of some backups by their keys.
    async fn backup_object_lengths(&self, ids: &BTreeSet<String>) -> Result<BTreeMap<String, u64>> {
        let mut lengths = BTreeMap::new();
        for id in ids {
            let listed = list_all(&*self.storage, &self.data_prefix(id)?, DATA_OBJECTS_MAX).await?;
            lengths.extend(listed.iter().map(|meta| (meta.key.as_str().to_owned(), meta.bytes)));
        }
        Ok(lengths)
    }

    fn data_prefix(&self, id: &str) -> Result<String> {
        layout::check_backup_id(id)?;
        Ok(format!("{}{id}/data/", self.layout.backups_prefix()))
    }

    /// Notes beside an object that it is whole: what a later backup needs to know where this one does not complete.
    pub async fn put_object_note(&self, id: &str, object: &BackupObject) -> Result<()> {
        let key = self.layout.backup_object(id, &object.name.replace(".tar", ".json"))?;
        let note = ObjectNote { format: DOCUMENT_VERSION, object: object.clone() };
        document::put_same(&*self.storage, &key, &note).await
    }

    /// Returns the objects of a backup that are noted to be whole, and stored with that length, in their order.
    ///
    /// # Errors
    /// What the repository answers; a note that cannot be read is none.
    pub async fn stored_objects(&self, id: &str) -> Result<Vec<BackupObject>> {
        let listed = list_all(&*self.storage, &self.data_prefix(id)?, DATA_OBJECTS_MAX).await?;
        let lengths: BTreeMap<&str, u64> =
            listed.iter().map(|meta| (meta.key.as_str(), meta.bytes)).collect();
        let mut objects = Vec::new();
        for meta in listed.iter().filter(|meta| meta.key.as_str().ends_with(".json")) {
            let object = match document::read::<ObjectNote>(&*self.storage, &meta.key).await {
                Ok(Some(note)) => note.object,
                Ok(None) | Err(Error::Corrupt(_) | Error::Mismatch(_)) => continue,
                Err(error) => return Err(error),
            };
            let Ok(key) = self.data_key(id, &object.name) else { continue };
            if lengths.get(key.as_str()) == Some(&object.stored_bytes)
                && key.as_str().strip_suffix(".tar") == meta.key.as_str().strip_suffix(".json")
            {
                objects.push(object);
            }
        }
        Ok(objects)
    }

    /// Stores a backup's manifest, already compressed (one zstd frame), and returns the digest of the
    /// stored bytes in hex, for [`BackupRecord::manifest_digest`].
    pub async fn put_backup_manifest(&self, id: &str, stored: Bytes) -> Result<String> {
        self.put_beside(id, MANIFEST, stored).await
    }

    /// Stores an object beside a backup and returns its digest; taken with the same content is success.
    async fn put_beside(&self, id: &str, name: &str, stored: Bytes) -> Result<String> {
        let key = self.layout.backup_object(id, name)?;
        let digest = Digest::of(&stored);
        if self.storage.put_if_absent(&key, stored.into()).await? == PutOutcome::Exists {
            self.storage.confirm(&key).await?;
            let existing = self.storage.get(&key, MANIFEST_BYTES_MAX).await?;
            if existing.is_none_or(|existing| Digest::of(&existing) != digest) {
                return Err(Error::conflict(format!(
                    "{} is already stored with other content",
                    self.shown(&key)
                )));
            }
        }
        Ok(digest.to_string())
    }

    /// Returns a backup's manifest as stored (one zstd frame), checked against the record's digest.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not there, [`Error::Corrupt`] when it is another.
    pub async fn get_backup_manifest(&self, record: &BackupRecord) -> Result<Bytes> {
        let read = |one: Self| async move { one.backup_manifest_here(record).await.map(Some) };
        let found = self.ask_each(format!("the manifest of backup {}", record.id), read).await?;
        found.ok_or_else(|| Error::missing(format!("the manifest of backup {} is not there", record.id)))
    }

    async fn backup_manifest_here(&self, record: &BackupRecord) -> Result<Bytes> {
        let key = self.layout.backup_object(&record.id, MANIFEST)?;
        let stored = self.storage.get(&key, MANIFEST_BYTES_MAX).await?;
        let stored = stored.ok_or_else(|| Error::missing(format!("{} is not there", self.shown(&key))))?;
        let digest = Digest::of(&stored).to_string();
        if digest != record.manifest_digest {
            return Err(Error::corrupt(format!(
                "{} has the digest {digest}, the backup's record says {}",
                self.shown(&key),
                record.manifest_digest
            )));
        }
        Ok(stored)
    }

    /// Stores settings files (path and content) beside a backup and returns what its record is to say of
    /// them. They must be [`LineageRepository::SETTINGS_BYTES_MAX`] at most in all.
    pub async fn put_backup_settings(
        &self,
        id: &str,
        files: &[(String, Vec<u8>)],
    ) -> Result<Vec<SettingsFile>> {
        let saved = files.iter().map(|(path, content)| SavedFile {
            path: path.clone(),
            content: BASE64_STANDARD.encode(content),
        });
        let document = BackupSettings { format: DOCUMENT_VERSION, files: saved.collect() };
        document::put_same(&*self.storage, &self.layout.backup_object(id, SETTINGS)?, &document).await?;
        let told = files.iter().map(|(path, content)| SettingsFile {
            path: path.clone(),
            bytes: content.len() as u64,
            digest: Digest::of(content).to_string(),
        });
        Ok(told.collect())
    }

    /// How much all settings files of one backup may hold: with base64 they stay within a document.
    pub const SETTINGS_BYTES_MAX: usize = 640 << 10;

    /// Returns the settings files that a backup's record tells of: path and content, each checked.
    ///
    /// # Errors
    /// [`Error::Missing`] when they are not there, [`Error::Corrupt`] when they are others.
    pub async fn get_backup_settings(&self, record: &BackupRecord) -> Result<Vec<(String, Vec<u8>)>> {
        if record.settings_files.is_empty() {
            return Ok(Vec::new());
        }
        let read = |one: Self| async move { one.backup_settings_here(record).await.map(Some) };
        let found = self.ask_each(format!("the settings files of backup {}", record.id), read).await?;
        Ok(found.unwrap_or_default())
    }

    async fn backup_settings_here(&self, record: &BackupRecord) -> Result<Vec<(String, Vec<u8>)>> {
        let key = self.layout.backup_object(&record.id, SETTINGS)?;
        let document: Option<BackupSettings> = document::read(&*self.storage, &key).await?;
        let document =
            document.ok_or_else(|| Error::missing(format!("{} is not there", self.shown(&key))))?;
        let told = record.settings_files.iter().map(|told| {
            let saved = document.files.iter().find(|saved| saved.path == told.path);
            let content = saved.and_then(|saved| BASE64_STANDARD.decode(&saved.content).ok());
            let content = content.filter(|content| Digest::of(content).to_string() == told.digest);
            content.map(|content| (told.path.clone(), content)).ok_or_else(|| {
                Error::corrupt(format!("{} does not hold {:?} as it was", self.shown(&key), told.path))
            })
        });
        told.collect()
    }

    /// Returns names as they are stored: one zstd frame of JSON; `None` when that would be too long to be read.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when packing fails.
    pub fn pack_backup_names(names: &Names) -> Result<Option<Bytes>> {
        let json = serde_json::to_vec(names)
            .map_err(|error| Error::invalid(format!("the names cannot be written as JSON: {error}")))?;
        if json.len() as u64 > NAMES_BYTES_MAX {
            return Ok(None);
        }
        let packed =
            zstd::bulk::compress(&json, 3).map_err(|error| Error::from_io("packing names", error))?;
        Ok(Some(packed.into()))
    }

    /// Stores packed names beside a backup and returns the digest of the stored bytes in hex.
    pub async fn put_backup_names(&self, id: &str, packed: Bytes) -> Result<String> {
        self.put_beside(id, NAMES, packed).await
    }

    /// Returns the names that a backup's record tells of; `None` when it tells of none.
    ///
    /// # Errors
    /// [`Error::Missing`] when they are not there, [`Error::Corrupt`] when they are others, [`Error::Mismatch`]
    /// when their format is newer.
    pub async fn get_backup_names(&self, record: &BackupRecord) -> Result<Option<Names>> {
        let Some(saved) = &record.names else { return Ok(None) };
        let key = self.layout.backup_object(&record.id, NAMES)?;
        let stored = self.storage.get(&key, NAMES_BYTES_MAX).await?;
        let stored = stored.ok_or_else(|| Error::missing(format!("{} is not there", self.shown(&key))))?;
        let damaged = |what: &dyn std::fmt::Display| Error::corrupt(format!("{}: {what}", self.shown(&key)));
        if Digest::of(&stored).to_string() != saved.digest {
            return Err(damaged(&"its digest is not the one in the backup's record"));
        }
        let mut json = Vec::new();
        zstd::stream::read::Decoder::new(&*stored)
            .and_then(|decoder| decoder.take(NAMES_BYTES_MAX + 1).read_to_end(&mut json))
            .map_err(|error| damaged(&error))?;
        if json.len() as u64 > NAMES_BYTES_MAX {
            return Err(damaged(&"it is too long"));
        }
        let names: Names =
            document::parse(&json).map_err(|error| error.context(format!("reading {}", self.shown(&key))))?;
        Ok(Some(names))
    }

    /// Writes a backup's record: from now on the backup exists. To be called last.
    pub async fn put_backup_record(&self, record: &BackupRecord) -> Result<()> {
        if record.format != DOCUMENT_VERSION {
            return Err(Error::invalid(format!(
                "a backup record of format {} cannot be written",
                record.format
            )));
        }
        let key =
            self.layout.backup_record(&record.id, record.timeline, record.start_lsn, record.stop_lsn)?;
        document::put_same_within(&*self.storage, &key, record, RECORD_BYTES_MAX).await
    }

    fn data_key(&self, id: &str, name: &str) -> Result<ObjectKey> {
        let number = name.strip_prefix("data/").and_then(|rest| rest.strip_suffix(".tar"));
        if number.is_none_or(|number| number.len() != 6 || !number.bytes().all(|b| b.is_ascii_digit())) {
            return Err(Error::invalid(format!("{name:?} is not the name of a backup's data object")));
        }
        layout::check_backup_id(id)?;
        self.layout.backup_object(id, name)
    }
}
