//! Tar members packed into data objects: independent zstd frames, compressed in parallel, uploaded
//! while the next object fills.
//!
//! Memory is bounded by the number of batches that may exist at once, whatever the files' sizes.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use crate::catalog::{BackupObject, ObjectIndex};
use crate::codec::backup_index::{BackupIndex, Partial};
use crate::error::{Error, Result};
use crate::pg::Oid;
use crate::repository::LineageRepository;
use crate::storage::{PutOutcome, Upload};

use super::batch::{Batch, Compressed, Cutter, FrameCompressor};
use super::members::{BLOCK, Member};

/// How many objects of one packer may be on their way at once.
const OBJECTS_MAX: usize = 4;

/// The step in which an object is read back for comparison.
const COMPARE_BYTES: u64 = 8 << 20;

/// What the packers of one backup share.
pub(crate) struct PackSettings {
    pub(crate) repositories: Vec<LineageRepository>,
    pub(crate) id: String,
    /// An object is closed at the first end of a member past this many bytes of tar.
    pub(crate) object_bytes: u64,
    pub(crate) level: i32,
    batches: Arc<Semaphore>,
    next_number: AtomicU32,
    spare: Spare,
}

/// What batches are made with, used again: memory that is new to the process costs more than the copy into it.
#[derive(Default)]
struct Spare {
    memory: Mutex<Vec<Vec<u8>>>,
    compressors: Mutex<Vec<FrameCompressor>>,
}

impl Spare {
    /// Returns the memory of a former batch, or none.
    fn memory(&self) -> Vec<u8> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn compress(&self, batch: Batch, level: i32) -> io::Result<Compressed> {
        let spare = self.compressors.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut compressor = spare.map_or_else(|| FrameCompressor::new(level), Ok)?;
        let (compressed, memory) = batch.compress(&mut compressor)?;
        self.compressors.lock().unwrap_or_else(PoisonError::into_inner).push(compressor);
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        Ok(compressed)
    }
}

/// Where a packer compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compressing {
    /// On further threads, while what comes next arrives.
    Aside,
    /// Where [`Packer::pump`] is called: on a thread that may block and whose core has the bytes in its cache.
    Here,
}

impl PackSettings {
    pub(crate) fn new(
        repositories: Vec<LineageRepository>,
        id: String,
        object_bytes: u64,
        level: i32,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Arc::new(Self {
            repositories,
            id,
            object_bytes: object_bytes.max(1 << 20),
            level,
            batches: Arc::new(Semaphore::new((2 * cores + 4).min(24))),
            next_number: AtomicU32::new(1),
            spare: Spare::default(),
        })
    }
}

enum Work {
    Begin(Option<Oid>),
    Batch(Batch),
    End,
}

enum Piece {
    Batch { compressed: Pending, tar_bytes: u64, _permit: OwnedSemaphorePermit },
    End,
}

/// A batch that is compressed, or being compressed.
enum Pending {
    Compressed(io::Result<Compressed>),
    Aside(JoinHandle<io::Result<Compressed>>),
}

impl Pending {
    async fn compressed(self) -> Result<Compressed> {
        let compressed = match self {
            Self::Compressed(compressed) => compressed,
            Self::Aside(task) => {
                task.await.map_err(|error| Error::unavailable(format!("compressing was cut off: {error}")))?
            }
        };
        compressed.map_err(|error| Error::from_io("compressing", error))
    }
}

/// Packs a backup, or a part of one.
///
/// `begin_archive`, `header`, `data`, `padding` and `end_member` only move bytes; [`Packer::pump`] carries
/// the work out and is to be awaited after every few of them.
pub(crate) struct Packer {
    settings: Arc<PackSettings>,
    compressing: Compressing,
    tablespace: Option<Oid>,
    /// The open object's; `None` when none is open.
    cutter: Option<Cutter>,
    work: VecDeque<Work>,
    sender: Option<mpsc::Sender<Piece>>,
    objects: JoinSet<Result<BackupObject>>,
    done: Vec<BackupObject>,
}

impl Packer {
    pub(crate) fn new(settings: Arc<PackSettings>, compressing: Compressing) -> Self {
        Self {
            settings,
            compressing,
            tablespace: None,
            cutter: None,
            work: VecDeque::new(),
            sender: None,
            objects: JoinSet::new(),
            done: Vec::new(),
        }
    }

    /// Full batches are compressed there from now on.
    pub(crate) fn set_compressing(&mut self, compressing: Compressing) {
        self.compressing = compressing;
    }

    /// What follows belongs to this tablespace, and so into another object.
    pub(crate) fn begin_archive(&mut self, tablespace: Option<Oid>) {
        if self.tablespace != tablespace {
            self.close();
            self.tablespace = tablespace;
        }
    }

    /// Takes a member's header, and what the member lacks where it is some blocks of a file only.
    pub(crate) fn header(&mut self, block: &[u8; BLOCK], member: Member, partial: Option<Partial>) {
        let Self { cutter, work, tablespace, settings, .. } = self;
        let cutter = cutter.get_or_insert_with(|| {
            work.push_back(Work::Begin(*tablespace));
            Cutter::new(settings.spare.memory())
        });
        cutter.header(block, member, partial, &mut full(work, settings));
    }

    /// Takes the next bytes of the open member.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        let Self { cutter, work, settings, .. } = self;
        if let Some(cutter) = cutter {
            cutter.data(bytes, &mut full(work, settings));
        }
    }

    /// Returns room for the next bytes of the open member, at most `wanted`, whole blocks or up to the end of one. What is
    /// in it means nothing; [`Packer::took`] says that it was filled.
    pub(crate) fn room(&mut self, wanted: usize) -> &mut [u8] {
        let Self { cutter, work, settings, .. } = self;
        match cutter {
            Some(cutter) => cutter.room(wanted, &mut full(work, settings)),
            None => &mut [],
        }
    }

    /// The first `length` bytes of the room are the open member's next ones.
    pub(crate) fn took(&mut self, length: usize) {
        if let Some(cutter) = &mut self.cutter {
            cutter.took(length);
        }
    }

    /// Takes what fills up the open member's last tar block.
    pub(crate) fn padding(&mut self, bytes: &[u8]) {
        if let Some(cutter) = &mut self.cutter {
            cutter.padding(bytes);
        }
    }

    /// A member is whole: the place for frames and objects to end.
    pub(crate) fn end_member(&mut self) {
        let Some(cutter) = &mut self.cutter else { return };
        cutter.end_member();
        if cutter.tar_bytes() >= self.settings.object_bytes {
            self.close();
        }
    }

    fn close(&mut self) {
        if let Some(cutter) = self.cutter.take() {
            self.work.push_back(Work::Batch(cutter.finish()));
            self.work.push_back(Work::End);
        }
    }

    /// Carries out what was appended so far.
    ///
    /// # Errors
    /// What storing an object failed with.
    pub(crate) async fn pump(&mut self) -> Result<()> {
        while let Some(work) = self.work.pop_front() {
            match work {
                Work::Begin(tablespace) => self.open_object(tablespace).await?,
                Work::Batch(batch) => self.send_batch(batch).await?,
                Work::End => {
                    self.send(Piece::End).await?;
                    self.sender = None;
                }
            }
        }
        while let Some(finished) = self.objects.try_join_next() {
            self.done.push(joined(finished)?);
        }
        Ok(())
    }

    async fn open_object(&mut self, tablespace: Option<Oid>) -> Result<()> {
        while self.objects.len() >= OBJECTS_MAX {
            if let Some(finished) = self.objects.join_next().await {
                self.done.push(joined(finished)?);
            }
        }
        let number = self.settings.next_number.fetch_add(1, Ordering::Relaxed);
        if number > 999_999 {
            return Err(Error::invalid("the backup needs more than 999999 data objects")
                .with_next("Choose a larger object size."));
        }
        let name = format!("data/{number:06}.tar");
        let (sender, receiver) = mpsc::channel(16);
        self.sender = Some(sender);
        self.objects.spawn(store_object(Arc::clone(&self.settings), name, tablespace, receiver));
        Ok(())
    }

    async fn send_batch(&mut self, batch: Batch) -> Result<()> {
        let permit = Arc::clone(&self.settings.batches)
            .acquire_owned()
            .await
            .map_err(|_| Error::invalid("the backup is being ended"))?;
        let tar_bytes = batch.tar_bytes();
        let settings = Arc::clone(&self.settings);
        let compress = move || settings.spare.compress(batch, settings.level);
        let compressed = match self.compressing {
            Compressing::Here => Pending::Compressed(compress()),
            Compressing::Aside => Pending::Aside(tokio::task::spawn_blocking(compress)),
        };
        self.send(Piece::Batch { compressed, tar_bytes, _permit: permit }).await
    }

    async fn send(&mut self, piece: Piece) -> Result<()> {
        let sent = match &self.sender {
            Some(sender) => sender.send(piece).await.is_ok(),
            None => false,
        };
        if sent {
            return Ok(());
        }
        // The object's task has ended early: it says why.
        self.sender = None;
        while let Some(finished) = self.objects.join_next().await {
            self.done.push(joined(finished)?);
        }
        Err(Error::unavailable("a data object could not be stored"))
    }

    /// Returns the objects in restore order once all of them are durable.
    ///
    /// # Errors
    /// What storing an object failed with.
    pub(crate) async fn finish(mut self) -> Result<Vec<BackupObject>> {
        self.close();
        self.pump().await?;
        while let Some(finished) = self.objects.join_next().await {
            self.done.push(joined(finished)?);
        }
        self.done.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(self.done)
    }

    /// Gives up: lets the open uploads remove what they can, for some seconds.
    pub(crate) async fn abandon(mut self) {
        self.sender = None;
        let _ = tokio::time::timeout(std::time::Duration::from_secs(10), async {
            while self.objects.join_next().await.is_some() {}
        })
        .await;
    }
}

/// What becomes of a full batch: it waits for [`Packer::pump`], and another one's memory takes its place.
fn full(work: &mut VecDeque<Work>, settings: &PackSettings) -> impl FnMut(Batch) -> Vec<u8> {
    |batch| {
        work.push_back(Work::Batch(batch));
        settings.spare.memory()
    }
}

fn joined(
    finished: std::result::Result<Result<BackupObject>, tokio::task::JoinError>,
) -> Result<BackupObject> {
    finished.map_err(|error| Error::unavailable(format!("storing a data object was cut off: {error}")))?
}

async fn store_object(
    settings: Arc<PackSettings>,
    name: String,
    tablespace: Option<Oid>,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<BackupObject> {
    let mut object = StoredObject { uploads: Vec::new(), hasher: blake3::Hasher::new(), stored_bytes: 0 };
    for repository in &settings.repositories {
        match repository.start_backup_object(&settings.id, &name).await {
            Ok(upload) => object.uploads.push(upload),
            Err(error) => {
                object.abort().await;
                return Err(error);
            }
        }
    }
    let mut index = BackupIndex::default();
    let mut tar_bytes = 0;
    let whole = loop {
        match pieces.recv().await {
            None => break Ok(false),
            Some(Piece::End) => break Ok(true),
            Some(Piece::Batch { compressed, tar_bytes: batch_bytes, _permit }) => {
                let batch = match compressed.compressed().await {
                    Ok(batch) => batch,
                    Err(error) => break Err(error),
                };
                batch.frames.iter().for_each(|(stored, tar)| index.add_frame(*stored, *tar));
                batch.folders.into_iter().for_each(|folder| index.add_folder(folder));
                batch.files.into_iter().for_each(|file| index.add_file(file));
                index.add_digests(&batch.digests);
                tar_bytes += batch_bytes;
                if let Err(error) = object.write(batch.bytes.into()).await {
                    break Err(error);
                }
            }
        }
    };
    let whole = match whole {
        Ok(whole) => whole,
        Err(error) => {
            object.abort().await;
            return Err(error);
        }
    };
    if !whole {
        object.abort().await;
        return Err(Error::unavailable("the backup was given up"));
    }
    let written = match index.encode() {
        Ok(Some(bytes)) => {
            let place = ObjectIndex { bytes: bytes.len() as u64, digest: blake3::hash(&bytes).to_string() };
            object.write(bytes.into()).await.map(|()| Some(place))
        }
        Ok(None) if index.has_partial() => {
            Err(Error::invalid(format!("{name} holds files that are too long to store some of their blocks"))
                .with_next("Take a full backup: without --incremental."))
        }
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    let index = match written {
        Ok(index) => index,
        Err(error) => {
            object.abort().await;
            return Err(error);
        }
    };
    let (stored_bytes, digest) = (object.stored_bytes, object.hasher.finalize());
    let mut failure = None;
    for (upload, repository) in object.uploads.into_iter().zip(&settings.repositories) {
        if failure.is_some() {
            upload.abort().await;
            continue;
        }
        let finished = match upload.finish().await {
            Ok(PutOutcome::Stored) => Ok(()),
            Ok(PutOutcome::Exists) => compare(repository, &settings.id, &name, stored_bytes, digest).await,
            Err(error) => Err(error),
        };
        failure = finished.err();
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let digest = digest.to_hex().to_string();
    let object = BackupObject { name, tablespace, stored_bytes, tar_bytes, digest, index, backup: None };
    for repository in &settings.repositories {
        repository.put_object_note(&settings.id, &object).await?;
    }
    Ok(object)
}

struct StoredObject {
    uploads: Vec<Box<dyn Upload>>,
    hasher: blake3::Hasher,
    stored_bytes: u64,
}

impl StoredObject {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.hasher.update(&bytes);
        self.stored_bytes += bytes.len() as u64;
        for upload in &mut self.uploads {
            upload.write(bytes.clone()).await?;
        }
        Ok(())
    }

    async fn abort(self) {
        for upload in self.uploads {
            upload.abort().await;
        }
    }
}

/// The key was taken: by our own earlier attempt whose answer was lost, or this is a conflict.
async fn compare(
    repository: &LineageRepository,
    id: &str,
    name: &str,
    stored_bytes: u64,
    digest: blake3::Hash,
) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while offset <= stored_bytes {
        let bytes = repository.read_backup_object_range(id, name, offset, COMPARE_BYTES).await?;
        if bytes.is_empty() {
            break;
        }
        hasher.update(&bytes);
        offset += bytes.len() as u64;
    }
    if offset != stored_bytes || hasher.finalize() != digest {
        return Err(Error::conflict(format!("{name} of backup {id} is already stored with other content")));
    }
    Ok(())
}
