//! Where the blocks of a backup's files are stored: in the backup itself, or in those that it builds on.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::catalog::{BackupObject, BackupRecord};
use crate::codec::backup_index::{BLOCK_BYTES, BackupIndex, BlockDigest, INDEX_BYTES_MAX, IndexedFile};
use crate::error::{Error, Result};

use super::LineageRepository;

/// So many bytes of indexes are held, about; one more, however large, while it is used.
const HELD_BYTES_MAX: usize = 32 << 20;

/// So many indexes of each backup are in use at once, by as many threads.
const IN_USE_MAX: usize = 4;

/// So many indexes are read at once where all are.
const INDEXES_MAX: usize = 4;

/// What a file of an index takes beside its path, about.
const FILE_BYTES: usize = 200;

/// A backup's data objects.
#[derive(Debug, Clone)]
pub struct BackupObjects {
    /// The backup's id.
    pub id: String,
    /// Its objects, in its record's order.
    pub objects: Vec<BackupObject>,
}

impl From<&BackupRecord> for BackupObjects {
    fn from(record: &BackupRecord) -> Self {
        Self { id: record.id.clone(), objects: record.objects.clone() }
    }
}

/// A backup and all that it builds on, read from whichever repository has what is asked for.
#[derive(Debug)]
pub struct BackupBlocks {
    repository: LineageRepository,
    /// The backup, then what it builds on, from the top.
    levels: Arc<[BackupObjects]>,
    held: Mutex<Held>,
}

/// The indexes that were read last, the latest in front.
#[derive(Debug, Default)]
struct Held {
    indexes: VecDeque<((u32, u32), Arc<ObjectFiles>)>,
    bytes: usize,
}

/// What an object holds.
#[derive(Debug)]
pub struct ObjectFiles {
    /// Its index.
    pub index: BackupIndex,
    /// Of each whole file's path the place among the index's files.
    by_path: HashMap<PathBuf, usize>,
    held_bytes: usize,
}

impl ObjectFiles {
    fn new(index: BackupIndex) -> Self {
        let by_path: HashMap<PathBuf, usize> =
            index.files().enumerate().map(|(place, (file, _))| (file.whole_path(), place)).collect();
        let files = index
            .files()
            .map(|(file, digests)| 2 * file.path.as_os_str().len() + FILE_BYTES + size_of_val(digests));
        let held_bytes = files.sum();
        Self { index, by_path, held_bytes }
    }

    fn find(&self, path: &Path) -> Option<(&IndexedFile, &[BlockDigest])> {
        self.by_path.get(path).and_then(|place| self.index.file(*place))
    }
}

/// Where a block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockPlace {
    /// In which backup: 0 for the one at the top.
    pub level: u32,
    /// In which of its data objects, counted from 0 in the record's order.
    pub object: u32,
    /// Where in that object's tar stream.
    pub tar_at: u64,
    /// What it is.
    pub digest: BlockDigest,
}

/// A file, put together from one or more backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileBlocks {
    /// Its length.
    pub bytes: u64,
    /// Its blocks of [`BLOCK_BYTES`] bytes; `None` for one that is zeros and stored nowhere.
    pub blocks: Vec<Option<BlockPlace>>,
}

impl FileBlocks {
    /// Returns the length of a block.
    pub fn block_bytes(&self, block: usize) -> usize {
        self.bytes.saturating_sub((block * BLOCK_BYTES) as u64).min(BLOCK_BYTES as u64) as usize
    }
}

impl BackupBlocks {
    /// Returns a view on a backup and all that it builds on, from the top.
    pub fn new(repository: LineageRepository, levels: Arc<[BackupObjects]>) -> Self {
        Self { repository, levels, held: Mutex::default() }
    }

    /// Returns the repository that is read.
    pub fn repository(&self) -> &LineageRepository {
        &self.repository
    }

    /// Returns the objects of the backup at the top.
    pub fn objects(&self) -> &[BackupObject] {
        self.levels.first().map_or(&[], |level| &level.objects)
    }

    /// Returns an object of a level and the id of the backup below whose folder it lies.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when there is no such object.
    pub fn object(&self, level: u32, object: u32) -> Result<(&str, &BackupObject)> {
        let found = self.levels.get(level as usize).and_then(|level| {
            let object = level.objects.get(object as usize)?;
            Some((object.backup.as_deref().unwrap_or(&level.id), object))
        });
        found.ok_or_else(|| {
            Error::corrupt(format!(
                "a file's blocks are said to be in object {object} of a backup without one"
            ))
        })
    }

    /// Returns what an object holds.
    ///
    /// # Errors
    /// What reading fails with; [`Error::Corrupt`] for an index that is not what it should be.
    pub async fn files_of(&self, level: u32, object: u32) -> Result<Arc<ObjectFiles>> {
        let key = (level, object);
        if let Some(found) = self.held.lock().unwrap_or_else(PoisonError::into_inner).find(key) {
            return Ok(found);
        }
        let (id, of) = self.object(level, object)?;
        let what = format!("the index of {} of backup {id}", of.name);
        let read = |one: LineageRepository| async move { one.read_object_index(id, of).await.map(Some) };
        let index = self.repository.ask_each(what, read).await;
        let index = index.map_err(|error| error.context(format!("backup {id}, object {}", of.name)))?;
        let index =
            index.ok_or_else(|| Error::missing(format!("{} of backup {id} is not there", of.name)))?;
        let files = Arc::new(ObjectFiles::new(index));
        self.held.lock().unwrap_or_else(PoisonError::into_inner).add(key, &files);
        Ok(files)
    }

    /// Returns where the blocks of a file of the backup at the top are, by its path in an object's tar stream.
    ///
    /// # Errors
    /// As [`BackupBlocks::files_of`]; [`Error::Corrupt`] where a backup does not hold what another builds on.
    pub async fn file(&self, object: u32, path: &Path) -> Result<FileBlocks> {
        let files = self.files_of(0, object).await?;
        self.file_in(object, &files, path).await
    }

    /// As [`BackupBlocks::file`], for an object whose files are at hand.
    ///
    /// # Errors
    /// As there.
    pub async fn file_in(&self, mut object: u32, top: &ObjectFiles, path: &Path) -> Result<FileBlocks> {
        let (mut level, mut below, mut found) = (0, None, FileBlocks { bytes: 0, blocks: Vec::new() });
        // Behind where a file ended in one of the backups nothing is as it was before.
        let mut until = usize::MAX;
        loop {
            let files: &ObjectFiles = below.as_deref().unwrap_or(top);
            let Some((file, digests)) = files.find(path) else {
                let (id, of) = self.object(level, object)?;
                return Err(Error::corrupt(format!(
                    "{} of backup {id} does not hold {path:?}, which is to be there",
                    of.name
                )));
            };
            if level == 0 {
                found.bytes = file.whole_bytes();
                found.blocks = vec![None; found.bytes.div_ceil(BLOCK_BYTES as u64) as usize];
            }
            let open = found.blocks.iter_mut().take(until).enumerate().filter(|(_, place)| place.is_none());
            for (block, place) in open {
                let Some(at) = u32::try_from(block).ok().and_then(|block| file.place_of(block)) else {
                    continue;
                };
                let offset = (at * BLOCK_BYTES) as u64;
                // A block that was cut off in the middle is not what another backup can have left out.
                if level > 0 && file.bytes - offset < BLOCK_BYTES as u64 {
                    continue;
                }
                let digest = digests.get(at).copied();
                *place =
                    digest.map(|digest| BlockPlace { level, object, tar_at: file.tar_at + offset, digest });
            }
            let Some(partial) = &file.partial else { return Ok(found) };
            until = until.min(partial.file.length_blocks as usize);
            (level, object) = (level + 1, partial.parent_object);
            below = Some(self.files_of(level, object).await?);
        }
    }

    /// Returns of each file of the backup at the top, as its manifest names it, in which object it is: the last, where
    /// several have one of that name.
    ///
    /// # Errors
    /// As [`BackupBlocks::files_of`].
    pub async fn objects_of_files(&self) -> Result<HashMap<PathBuf, (u32, u32)>> {
        let reads = (0..self.objects().len()).map(|number| async move {
            let files = self.files_of(0, number as u32).await?;
            Ok::<_, Error>((number as u32, files))
        });
        let mut reads = std::pin::pin!(futures_util::stream::iter(reads).buffered(INDEXES_MAX));
        let mut found = HashMap::new();
        while let Some((number, files)) = reads.try_next().await? {
            let Some(object) = self.objects().get(number as usize) else { continue };
            let places =
                files.by_path.iter().map(|(path, place)| (object.listed(path), (number, *place as u32)));
            found.extend(places);
        }
        Ok(found)
    }
}

impl Held {
    fn find(&mut self, key: (u32, u32)) -> Option<Arc<ObjectFiles>> {
        let at = self.indexes.iter().position(|(known, _)| *known == key)?;
        let found = self.indexes.remove(at)?;
        self.indexes.push_front(found);
        self.indexes.front().map(|(_, files)| Arc::clone(files))
    }

    fn add(&mut self, key: (u32, u32), files: &Arc<ObjectFiles>) {
        if self.find(key).is_some() {
            return;
        }
        self.bytes += files.held_bytes;
        self.indexes.push_front((key, Arc::clone(files)));
        let mut seen: HashMap<u32, usize> = HashMap::new();
        let Self { indexes, bytes } = self;
        // From the latest on: those of each level that may be in use stay, however large they are.
        let (mut kept, mut all) = (VecDeque::new(), 0);
        for (key, files) in indexes.drain(..) {
            let of_level = seen.entry(key.0).or_default();
            *of_level += 1;
            if *of_level <= IN_USE_MAX || all + files.held_bytes <= HELD_BYTES_MAX {
                all += files.held_bytes;
                kept.push_back((key, files));
            }
        }
        (*indexes, *bytes) = (kept, all);
    }
}

impl LineageRepository {
    /// Reads the index at the end of a backup's data object.
    ///
    /// # Errors
    /// What reading fails with; [`Error::Corrupt`] for one that is not what the record says; [`Error::Invalid`] for an
    /// object that has none, or one of a newer format.
    pub async fn read_object_index(&self, id: &str, object: &BackupObject) -> Result<BackupIndex> {
        let place = object.index.as_ref().ok_or_else(|| Error::invalid("the object has no index"))?;
        let at = object.stored_bytes.checked_sub(place.bytes);
        let at = at.ok_or_else(|| Error::corrupt("its index is longer than itself"))?;
        if place.bytes > INDEX_BYTES_MAX {
            return Err(Error::corrupt(format!("its index has {} bytes, more than are read", place.bytes)));
        }
        let bytes = self.read_backup_object_range(id, &object.name, at, place.bytes).await?;
        let (digest, stored_bytes, tar_bytes) = (place.digest.clone(), object.stored_bytes, object.tar_bytes);
        crate::storage::blocking(move || {
            let found = blake3::hash(&bytes).to_string();
            if found != digest {
                return Err(Error::corrupt(format!(
                    "its index has the digest {found}, the backup's record says {digest}"
                )));
            }
            BackupIndex::decode(&bytes, stored_bytes, tar_bytes)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_in_use_stay_and_the_others_are_bounded() {
        let files = |held_bytes| {
            Arc::new(ObjectFiles { index: BackupIndex::default(), by_path: HashMap::new(), held_bytes })
        };
        let mut held = Held::default();
        // Large ones, as of clusters with very many files: each level keeps what its threads use.
        for object in 0..20 {
            for level in 0..3 {
                held.add((level, object), &files(HELD_BYTES_MAX));
            }
        }
        for level in 0..3 {
            let known = (0..20).filter(|object| held.find((level, *object)).is_some()).count();
            assert_eq!(known, IN_USE_MAX);
            assert!(held.find((level, 19)).is_some());
        }
        assert_eq!(held.bytes, 3 * IN_USE_MAX * HELD_BYTES_MAX);
        // Small ones: as many as have room.
        let mut held = Held::default();
        (0..1000).for_each(|object| held.add((0, object), &files(HELD_BYTES_MAX / 100)));
        assert_eq!(held.indexes.len(), 100);
        assert!(held.bytes <= HELD_BYTES_MAX);
    }
}
