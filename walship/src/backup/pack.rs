//! Tar members packed into data objects: independent zstd frames, compressed in parallel, uploaded
//! while the next object fills.
//!
//! Memory is bounded by the number of frames that may exist at once, whatever the files' sizes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use crate::catalog::BackupObject;
use crate::error::{Error, Result};
use crate::pg::Oid;
use crate::repository::LineageRepository;
use crate::storage::{PutOutcome, Upload};

use super::members::BLOCK;

/// A frame holds at most this many bytes of tar, and ends earlier at the end of a member.
const FRAME_BYTES_MAX: usize = 4 << 20;

/// A member that ends in a frame at least this full ends the frame.
const FRAME_BYTES_MIN: usize = 2 << 20;

/// How many objects may be on their way at once.
const OBJECTS_MAX: usize = 4;

/// The step in which an object is read back for comparison.
const COMPARE_BYTES: u64 = 8 << 20;

/// What the packer needs to know.
pub(crate) struct PackSettings {
    pub(crate) repositories: Vec<LineageRepository>,
    pub(crate) id: String,
    /// An object is closed at the first end of a member past this many bytes of tar.
    pub(crate) object_bytes: u64,
    pub(crate) level: i32,
}

enum Work {
    Begin(Option<Oid>),
    Frame(Vec<u8>),
    End,
}

enum Piece {
    Frame { compressed: JoinHandle<std::io::Result<Vec<u8>>>, tar_bytes: u64, _permit: OwnedSemaphorePermit },
    End,
}

/// Packs one backup.
///
/// The `append`, `end_member` and `begin_archive` calls only move bytes; [`Packer::pump`] carries
/// the work out and is to be awaited after every few of them.
pub(crate) struct Packer {
    settings: Arc<PackSettings>,
    tablespace: Option<Oid>,
    frame: Vec<u8>,
    /// The bytes of tar in the open object; `None` when none is open.
    open: Option<u64>,
    work: VecDeque<Work>,
    next_number: u32,
    frames: Arc<Semaphore>,
    sender: Option<mpsc::Sender<Piece>>,
    objects: JoinSet<Result<BackupObject>>,
    done: Vec<BackupObject>,
}

impl Packer {
    pub(crate) fn new(settings: PackSettings) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            settings: Arc::new(settings),
            tablespace: None,
            frame: Vec::with_capacity(FRAME_BYTES_MAX),
            open: None,
            work: VecDeque::new(),
            next_number: 1,
            frames: Arc::new(Semaphore::new((cores + 2).min(10))),
            sender: None,
            objects: JoinSet::new(),
            done: Vec::new(),
        }
    }

    /// What follows belongs to this tablespace, and so into another object.
    pub(crate) fn begin_archive(&mut self, tablespace: Option<Oid>) {
        self.close();
        self.tablespace = tablespace;
    }

    /// Takes the next bytes of the tar stream.
    pub(crate) fn append(&mut self, mut bytes: &[u8]) {
        if self.open.is_none() {
            self.open = Some(0);
            self.work.push_back(Work::Begin(self.tablespace));
        }
        if let Some(open) = &mut self.open {
            *open += bytes.len() as u64;
        }
        while !bytes.is_empty() {
            let take = (FRAME_BYTES_MAX - self.frame.len()).min(bytes.len());
            self.frame.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.frame.len() == FRAME_BYTES_MAX {
                self.cut();
            }
        }
    }

    /// A member is whole: the place for frames and objects to end.
    pub(crate) fn end_member(&mut self) {
        if self.open.is_some_and(|open| open >= self.settings.object_bytes) {
            self.close();
        } else if self.frame.len() >= FRAME_BYTES_MIN {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if !self.frame.is_empty() {
            let frame = std::mem::replace(&mut self.frame, Vec::with_capacity(FRAME_BYTES_MAX));
            self.work.push_back(Work::Frame(frame));
        }
    }

    fn close(&mut self) {
        if self.open.take().is_some() {
            self.frame.extend_from_slice(&[0; 2 * BLOCK]);
            self.cut();
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
                Work::Frame(frame) => self.send_frame(frame).await?,
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
        if self.next_number > 999_999 {
            return Err(Error::invalid("the backup needs more than 999999 data objects")
                .with_next("Choose a larger object size."));
        }
        let name = format!("data/{:06}.tar", self.next_number);
        self.next_number += 1;
        let (sender, receiver) = mpsc::channel(16);
        self.sender = Some(sender);
        self.objects.spawn(store_object(Arc::clone(&self.settings), name, tablespace, receiver));
        Ok(())
    }

    async fn send_frame(&mut self, frame: Vec<u8>) -> Result<()> {
        let permit = Arc::clone(&self.frames)
            .acquire_owned()
            .await
            .map_err(|_| Error::invalid("the backup is being ended"))?;
        let tar_bytes = frame.len() as u64;
        let level = self.settings.level;
        let compressed = tokio::task::spawn_blocking(move || compress(&frame, level));
        self.send(Piece::Frame { compressed, tar_bytes, _permit: permit }).await
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

fn joined(
    finished: std::result::Result<Result<BackupObject>, tokio::task::JoinError>,
) -> Result<BackupObject> {
    finished.map_err(|error| Error::unavailable(format!("storing a data object was cut off: {error}")))?
}

fn compress(frame: &[u8], level: i32) -> std::io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    compressor.include_checksum(true)?;
    compressor.compress(frame)
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
    let mut table = SeekTable::default();
    let mut tar_bytes = 0;
    let whole = loop {
        match pieces.recv().await {
            None => break Ok(false),
            Some(Piece::End) => break Ok(true),
            Some(Piece::Frame { compressed, tar_bytes: frame_bytes, _permit }) => {
                let frame = match compressed.await {
                    Ok(Ok(frame)) => frame,
                    Ok(Err(error)) => break Err(Error::from_io("compressing", error)),
                    Err(error) => break Err(Error::unavailable(format!("compressing was cut off: {error}"))),
                };
                table.add(frame.len(), frame_bytes);
                tar_bytes += frame_bytes;
                if let Err(error) = object.write(frame.into()).await {
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
    if let Err(error) = object.write(table.encode().into()).await {
        object.abort().await;
        return Err(error);
    }
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
    Ok(BackupObject { name, tablespace, stored_bytes, tar_bytes, digest: digest.to_hex().to_string() })
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

/// The index of an object's frames, in zstd's "seekable format": a skippable frame at the end that
/// every decompressor passes over.
///
/// Source: facebook/zstd, `contrib/seekable_format/zstd_seekable_compression_format.md`.
#[derive(Default)]
struct SeekTable {
    entries: Vec<u8>,
    frames: u32,
}

impl SeekTable {
    fn add(&mut self, compressed: usize, plain: u64) {
        // Both are at most a few MiB.
        self.entries.extend((compressed as u32).to_le_bytes());
        self.entries.extend((plain as u32).to_le_bytes());
        self.frames += 1;
    }

    fn encode(self) -> Vec<u8> {
        let mut bytes = 0x184D_2A5Eu32.to_le_bytes().to_vec();
        bytes.extend((self.entries.len() as u32 + 9).to_le_bytes());
        bytes.extend(self.entries);
        bytes.extend(self.frames.to_le_bytes());
        bytes.push(0);
        bytes.extend(0x8F92_EAB1u32.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_their_index_decompress_as_one_stream() {
        let mut object = Vec::new();
        let mut table = SeekTable::default();
        for part in [&[1u8; 100_000][..], &[2; 5], &[3; 70_000]] {
            let frame = compress(part, 1).unwrap();
            table.add(frame.len(), part.len() as u64);
            object.extend(frame);
        }
        object.extend(table.encode());
        let plain = zstd::stream::decode_all(&object[..]).unwrap();
        assert_eq!(plain.len(), 170_005);
        assert_eq!((plain[99_999], plain[100_000], plain[100_005]), (1, 2, 3));
        assert_eq!(&object[object.len() - 9..object.len() - 5], 3u32.to_le_bytes());
    }
}
