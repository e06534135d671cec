//! Restores over a data directory that is there already: what is in it and matches the backup stays, block by block, and
//! only the rest is fetched.
//!
//! Which blocks match is known from the digests in the backup's indexes. Until all is in place the folder is marked, and has no
//! `pg_control`: a restore that was broken off is resumed in the same way.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::catalog::{BackupObject, ObjectIndex};
use walship::codec::backup_index::{
    BLOCK_BYTES, BackupIndex, BlockDigest, Frame, INDEX_BYTES_MAX, block_digests,
};
use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::restore::blocking;
use super::unpack::{Destination, Place, create, damaged, is_tablespace_link, make_dir, place_of};

/// The longest range that one request fetches.
const RANGE_BYTES: u64 = 4 << 20;

/// Two ranges with less than this between them are fetched as one: a request costs more than the bytes.
const GAP_BYTES: u64 = 64 << 10;

/// How many ranges of one object are on their way at once.
const RANGES_MAX: usize = 4;

/// How many indexes are read at once before the restore begins.
const INDEXES_MAX: usize = 4;

/// How much of a file is compared at once: whole blocks.
const COMPARE_BYTES: usize = 1 << 20;

/// A file of the backup, and where it goes.
struct Target {
    place: Place,
    tar_at: u64,
    bytes: u64,
    digests: Vec<BlockDigest>,
    /// Kept in memory instead of written, as some small files are.
    is_held: bool,
}

/// Some consecutive frames that are fetched together, and the blocks that are wanted of each.
struct Range {
    stored_at: u64,
    stored_bytes: u64,
    frames: Vec<(Frame, Vec<WantedBlock>)>,
}

#[derive(Debug, Clone, Copy)]
struct WantedBlock {
    target: usize,
    block: usize,
}

/// Brings every file of an object to what the backup says.
///
/// # Errors
/// What fetching fails with; [`Error::Corrupt`] for an index, a frame or a block that is not what it should be;
/// [`Error::LocalIo`] for files.
pub(super) async fn match_object(
    repository: &LineageRepository,
    id: &str,
    object: &BackupObject,
    place: &ObjectIndex,
    destination: Arc<Destination>,
) -> Result<()> {
    let named = |error: Error| error.context(format!("backup object {}", object.name));
    let index = read_index(repository, id, object, place).await.map_err(named)?;
    let compared = {
        let (destination, object) = (Arc::clone(&destination), object.clone());
        blocking(move || compare(&destination, &object, &index)).await.map_err(named)?
    };
    let (targets, ranges) = compared;
    let targets = Arc::new(targets);
    let fetched = ranges.into_iter().map(|range| {
        let (targets, destination) = (Arc::clone(&targets), Arc::clone(&destination));
        async move {
            let stored = repository
                .read_backup_object_range(id, &object.name, range.stored_at, range.stored_bytes)
                .await?;
            destination.progress.fetched_bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
            blocking(move || put_blocks(&range, &stored, &targets, &destination)).await
        }
    });
    let held: Vec<Held> =
        futures_util::stream::iter(fetched).buffer_unordered(RANGES_MAX).try_concat().await.map_err(named)?;
    blocking(move || put_held(&targets, held, &destination)).await.map_err(named)
}

/// Reads every object's index and compares it with the manifest: before anything that is there is changed.
///
/// # Errors
/// What fetching fails with; [`Error::Corrupt`] for an index that is not what it should be.
pub(super) async fn check_indexes(
    repository: &LineageRepository,
    id: &str,
    objects: &[BackupObject],
    destination: &Destination,
) -> Result<()> {
    let checked = objects.iter().map(|object| async move {
        let Some(place) = &object.index else { return Ok(()) };
        let mut failure: Option<Error> = None;
        for one in repository.each() {
            let read = async {
                let index = read_index(&one, id, object, place).await?;
                index.files().try_for_each(|(file, _)| {
                    let place = place_of(destination, object.tablespace, &file.path)?;
                    destination.check_listed(&place, file.bytes).map(|_| ())
                })
            };
            match read.await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    failure = failure.or(Some(error.context(format!("backup object {}", object.name))))
                }
            }
        }
        failure.map_or(Ok(()), Err)
    });
    futures_util::stream::iter(checked).buffer_unordered(INDEXES_MAX).try_collect::<()>().await
}

async fn read_index(
    repository: &LineageRepository,
    id: &str,
    object: &BackupObject,
    place: &ObjectIndex,
) -> Result<BackupIndex> {
    let at = object
        .stored_bytes
        .checked_sub(place.bytes)
        .ok_or_else(|| damaged("its index is longer than itself"))?;
    if place.bytes > INDEX_BYTES_MAX {
        return Err(damaged(format!("its index has {} bytes, more than are read", place.bytes)));
    }
    let bytes = repository.read_backup_object_range(id, &object.name, at, place.bytes).await?;
    let (digest, stored_bytes, tar_bytes) = (place.digest.clone(), object.stored_bytes, object.tar_bytes);
    blocking(move || {
        let found = blake3::hash(&bytes).to_string();
        if found != digest {
            return Err(damaged(format!(
                "its index has the digest {found}, the backup's record says {digest}"
            )));
        }
        BackupIndex::decode(&bytes, stored_bytes, tar_bytes)
    })
    .await
}

/// Compares the object's files with what is there, and says what is to be fetched. Blocking.
fn compare(
    destination: &Destination,
    object: &BackupObject,
    index: &BackupIndex,
) -> Result<(Vec<Target>, Vec<Range>)> {
    let mut known_folders = HashSet::new();
    for folder in index.folders() {
        let place = place_of(destination, object.tablespace, folder)?;
        if !is_tablespace_link(destination, object.tablespace, folder) {
            sound_folder(destination, &place.local, &mut known_folders)?;
        }
    }
    let (mut targets, mut wanted) = (Vec::new(), Vec::new());
    let mut buffer = Vec::new();
    for (file, digests) in index.files() {
        let place = place_of(destination, object.tablespace, &file.path)?;
        destination.claim(&object.name, &place, file.bytes)?;
        let is_held = Destination::is_held(&place.listed, file.bytes)?;
        let target = targets.len();
        let mut want = |block| wanted.push(WantedBlock { target, block });
        if is_held {
            (0..digests.len()).for_each(&mut want);
        } else {
            if let Some(parent) = place.local.parent() {
                sound_folder(destination, parent, &mut known_folders)?;
            }
            let kept = compare_file(&place.local, file.bytes, digests, &mut buffer, &mut want)?;
            destination.progress.kept_bytes.fetch_add(kept, Ordering::Relaxed);
            destination.progress.written_bytes.fetch_add(kept, Ordering::Relaxed);
        }
        destination.progress.files.fetch_add(1, Ordering::Relaxed);
        let digests = digests.to_vec();
        targets.push(Target { place, tar_at: file.tar_at, bytes: file.bytes, digests, is_held });
    }
    let ranges = ranges(index, &targets, &wanted)?;
    Ok((targets, ranges))
}

/// Makes sure that a folder is there, and that nothing on the way to it from the data directory or the tablespace is a link.
fn sound_folder(destination: &Destination, path: &Path, known: &mut HashSet<PathBuf>) -> Result<()> {
    if destination.is_root(path) || !known.insert(path.to_owned()) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        sound_folder(destination, parent, known)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(()),
        // Where the WAL lies is the server's affair.
        Ok(meta) if meta.is_symlink() && path.ends_with("pg_wal") => Ok(()),
        Ok(_) => {
            fs::remove_file(path)
                .map_err(|error| Error::from_io(format!("removing {}", path.display()), error))?;
            make_dir(path, 0o700)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_dir(path, 0o700),
        Err(error) => Err(Error::from_io(format!("looking at {}", path.display()), error)),
    }
}

/// Gives a file its length and says which of its blocks are wrong; returns how many bytes are right.
fn compare_file(
    path: &Path,
    bytes: u64,
    digests: &[BlockDigest],
    buffer: &mut Vec<u8>,
    want: &mut impl FnMut(usize),
) -> Result<u64> {
    let failed = |error| Error::from_io(format!("comparing {}", path.display()), error);
    let there = match fs::symlink_metadata(path) {
        // A file with another name elsewhere is not ours to change.
        Ok(meta) if meta.is_file() && meta.nlink() == 1 => true,
        Ok(meta) if meta.is_dir() => {
            return Err(Error::invalid(format!("{} is a folder, and a file in the backup", path.display()))
                .with_safe("the repository is unchanged; the folder is marked as incomplete")
                .with_next("Move it away, and run the restore again."));
        }
        Ok(_) => {
            fs::remove_file(path).map_err(failed)?;
            false
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(failed(error)),
    };
    if !there {
        create(path, 0o600)?.set_len(bytes).map_err(failed)?;
        (0..digests.len()).for_each(want);
        return Ok(0);
    }
    let file = open(path)?;
    if file.metadata().map_err(failed)?.len() != bytes {
        file.set_len(bytes).map_err(failed)?;
    }
    let (mut at, mut block, mut kept) = (0, 0, 0);
    while at < bytes {
        buffer.resize((bytes - at).min(COMPARE_BYTES as u64) as usize, 0);
        file.read_exact_at(buffer, at).map_err(failed)?;
        for (piece, found) in buffer.chunks(BLOCK_BYTES).zip(block_digests(buffer)) {
            match digests.get(block) {
                Some(digest) if *digest == found => kept += piece.len() as u64,
                _ => want(block),
            }
            block += 1;
        }
        at += buffer.len() as u64;
    }
    Ok(kept)
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
        .open(path)
        .map_err(|error| Error::from_io(format!("opening {}", path.display()), error))
}

/// Returns what is to be fetched for these blocks, which are in the order of the tar stream.
fn ranges(index: &BackupIndex, targets: &[Target], wanted: &[WantedBlock]) -> Result<Vec<Range>> {
    let mut ranges: Vec<Range> = Vec::new();
    for block in wanted {
        let target = &targets[block.target];
        let at = target.tar_at + (block.block * BLOCK_BYTES) as u64;
        let [frame] = index.frames_of(at..at + target.block_bytes(block.block) as u64) else {
            return Err(damaged(format!("a block of {:?} does not lie in one frame", target.place.listed)));
        };
        let end = frame.stored_at + u64::from(frame.stored_bytes);
        match ranges.last_mut() {
            Some(last) if last.frames.last().is_some_and(|(known, _)| known == frame) => {
                last.frames.last_mut().into_iter().for_each(|(_, blocks)| blocks.push(*block));
            }
            Some(last)
                if frame.stored_at.saturating_sub(last.stored_at + last.stored_bytes) <= GAP_BYTES
                    && end - last.stored_at <= RANGE_BYTES =>
            {
                last.stored_bytes = end - last.stored_at;
                last.frames.push((*frame, vec![*block]));
            }
            _ => ranges.push(Range {
                stored_at: frame.stored_at,
                stored_bytes: u64::from(frame.stored_bytes),
                frames: vec![(*frame, vec![*block])],
            }),
        }
    }
    Ok(ranges)
}

impl Target {
    fn block_bytes(&self, block: usize) -> usize {
        (self.bytes - (block * BLOCK_BYTES) as u64).min(BLOCK_BYTES as u64) as usize
    }
}

/// A block of a file that is kept in memory.
struct Held {
    wanted: WantedBlock,
    content: Vec<u8>,
}

/// Unpacks the frames of a fetched range and writes the blocks that are wanted. Blocking.
fn put_blocks(
    range: &Range,
    stored: &Bytes,
    targets: &[Target],
    destination: &Destination,
) -> Result<Vec<Held>> {
    if stored.len() as u64 != range.stored_bytes {
        return Err(damaged(format!("it is shorter than the backup's record says, at {}", range.stored_at)));
    }
    let mut held = Vec::new();
    // Blocks come file by file: one open file at a time.
    let mut open_file: Option<(usize, File)> = None;
    for (frame, blocks) in &range.frames {
        let from = (frame.stored_at - range.stored_at) as usize;
        let packed = stored.get(from..from + frame.stored_bytes as usize).unwrap_or_default();
        let tar = zstd::bulk::decompress(packed, frame.tar_bytes as usize).map_err(|error| {
            damaged(format!("the frame at {} cannot be unpacked: {error}", frame.stored_at))
        })?;
        for wanted in blocks {
            let target = &targets[wanted.target];
            let offset = (wanted.block * BLOCK_BYTES) as u64;
            let from = (target.tar_at + offset - frame.tar_at) as usize;
            let content = tar.get(from..from + target.block_bytes(wanted.block)).unwrap_or_default();
            if block_digests(content).next().as_ref() != target.digests.get(wanted.block) {
                return Err(damaged(format!(
                    "block {} of {:?} is not what its index says",
                    wanted.block, target.place.listed
                )));
            }
            if target.is_held {
                held.push(Held { wanted: *wanted, content: content.to_vec() });
                continue;
            }
            let file = match open_file.take() {
                Some((number, file)) if number == wanted.target => file,
                _ => open(&target.place.local)?,
            };
            file.write_all_at(content, offset).map_err(|error| {
                Error::from_io(format!("writing {}", target.place.local.display()), error)
            })?;
            open_file = Some((wanted.target, file));
            destination.progress.written_bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
        }
    }
    Ok(held)
}

/// Hands over the files that are kept in memory.
fn put_held(targets: &[Target], mut held: Vec<Held>, destination: &Destination) -> Result<()> {
    held.sort_by_key(|one| (one.wanted.target, one.wanted.block));
    for (number, target) in targets.iter().enumerate().filter(|(_, target)| target.is_held) {
        let content: Vec<u8> = held
            .iter()
            .filter(|one| one.wanted.target == number)
            .flat_map(|one| one.content.clone())
            .collect();
        remove(&target.place.local)?;
        destination.take_held(&target.place, content, 0o600)?;
    }
    Ok(())
}

/// Removes a file, if there is one.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::from_io(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}
