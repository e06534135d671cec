//! Restores over a data directory that is there already: what is in it and matches the backup stays, block by block, and
//! only the rest is fetched.
//!
//! An incremental backup is restored in the same way, also where nothing is there yet: each block is fetched from the backup that
//! has it. Which blocks match is known from the digests in the backups' indexes. Until all is in place the folder is marked, and has no
//! `pg_control`: a restore that was broken off is resumed in the same way.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::Semaphore;
use walship::catalog::BackupObject;
use walship::codec::backup_index::{BLOCK_BYTES, BackupIndex, Frame, IndexedFile, block_digests};
use walship::repository::{BackupBlocks, BlockPlace, FileBlocks};
use walship::{Error, Result};

use super::restore::{Failed, blocking, taken_from};
use super::unpack::{Destination, Place, create, damaged, is_tablespace_link, make_dir, place_of, reserve};

/// The longest range that one request fetches.
const RANGE_BYTES: u64 = 2 << 20;

/// Two ranges with less than this between them are fetched as one: a request costs more than the bytes.
const GAP_BYTES: u64 = 96 << 10;

/// How many ranges of one object are on their way at once: most are of one frame, and what they wait for is the way to the
/// store. Those of all objects together are bounded by [`RANGE_BYTES`].
const RANGES_MAX: usize = 24;

/// How many indexes are read at once before the restore begins.
const INDEXES_MAX: usize = 4;

/// How much of a file is compared at once: whole blocks.
const COMPARE_BYTES: usize = 1 << 20;

/// So many bytes of files are compared, fetched and written together; one file more, however long.
const TOGETHER_BYTES: u64 = 256 << 20;

/// A file of the backup, and where it goes.
struct Target {
    place: Place,
    blocks: FileBlocks,
    /// Kept in memory instead of written, as some small files are.
    is_held: bool,
    /// Made from several backups.
    is_put_together: bool,
}

/// Some consecutive frames of an object that are fetched together, and the blocks that are wanted of each.
struct Range {
    level: u32,
    object: u32,
    stored_at: u64,
    stored_bytes: u64,
    frames: Vec<(Frame, Vec<WantedBlock>)>,
}

#[derive(Debug, Clone, Copy)]
struct WantedBlock {
    target: usize,
    block: usize,
    place: BlockPlace,
}

/// Brings every file of an object of the backup at the top to what the backup says.
///
/// # Errors
/// What fetching fails with; [`Error::Corrupt`] for an index, a frame or a block that is not what it should be;
/// [`Error::LocalIo`] for files.
pub(super) async fn match_object(
    backup: &BackupBlocks,
    number: u32,
    destination: Arc<Destination>,
) -> Result<()> {
    let (_, object) = backup.object(0, number)?;
    let named = |error: Error| error.context(format!("backup object {}", object.name));
    let files = backup.files_of(0, number).await?;
    {
        let (destination, object, files) = (destination.clone(), object.clone(), files.clone());
        blocking(move || make_folders(&destination, &object, &files.index)).await.map_err(named)?;
    }
    let counts = |file: &&IndexedFile| destination.counts(&object.listed(&file.whole_path()), number);
    let mut listed = files.index.files().map(|(file, _)| file).filter(counts).peekable();
    while listed.peek().is_some() {
        let (mut together, mut bytes) = (Vec::new(), 0);
        while let Some(file) =
            listed.next_if(|file| bytes == 0 || bytes + file.whole_bytes() <= TOGETHER_BYTES)
        {
            bytes += file.whole_bytes().max(1);
            let blocks = backup.file_in(number, &files, &file.whole_path()).await.map_err(named)?;
            together.push((file.clone(), blocks));
        }
        match_files(backup, object, together, &destination).await.map_err(named)?;
    }
    Ok(())
}

/// Brings some files to what the backup says.
async fn match_files(
    backup: &BackupBlocks,
    object: &BackupObject,
    files: Vec<(IndexedFile, FileBlocks)>,
    destination: &Arc<Destination>,
) -> Result<()> {
    let (targets, wanted) = {
        let (destination, object) = (destination.clone(), object.clone());
        blocking(move || compare(&destination, &object, files)).await?
    };
    let targets = Arc::new(targets);
    let ranges = ranges(backup, &targets, wanted).await?;
    // A frame that is longer than a range may be takes the room of several.
    let room = Semaphore::new(RANGES_MAX);
    let fetched = ranges.into_iter().map(|range| async {
        let ranges = range.stored_bytes.div_ceil(RANGE_BYTES).clamp(1, RANGES_MAX as u64) as u32;
        let _room = room.acquire_many(ranges).await;
        fetch(backup, Arc::new(range), &targets, destination).await
    });
    let held: Vec<Held> =
        futures_util::stream::iter(fetched).buffer_unordered(RANGES_MAX).try_concat().await?;
    let destination = destination.clone();
    blocking(move || {
        put_held(&targets, held, &destination)?;
        targets
            .iter()
            .filter(|target| target.is_put_together)
            .try_for_each(|target| prove(target, &destination))
    })
    .await
}

/// Fetches a range and writes the blocks that are wanted of it; where it is missing or damaged in one repository, from
/// another.
async fn fetch(
    backup: &BackupBlocks,
    range: Arc<Range>,
    targets: &Arc<Vec<Target>>,
    destination: &Arc<Destination>,
) -> Result<Vec<Held>> {
    let (id, object) = backup.object(range.level, range.object)?;
    let mut failure: Option<(String, Error)> = None;
    for one in backup.repository().each() {
        let fetched = async {
            let stored =
                one.read_backup_object_range(id, &object.name, range.stored_at, range.stored_bytes).await;
            let stored = stored.map_err(Failed::Stored)?;
            destination.progress.fetched_bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
            let (range, targets, destination) = (range.clone(), targets.clone(), destination.clone());
            let put = blocking(move || put_blocks(&range, &stored, &targets, &destination));
            put.await.map_err(Failed::of_writing)
        };
        match fetched.await {
            Ok(held) => {
                if let Some((location, error)) = failure {
                    taken_from(backup, id, object, &one, &location, &error);
                }
                return Ok(held);
            }
            // What is wrong with the files here no other repository mends.
            Err(Failed::Here(error)) => return Err(error),
            Err(Failed::Stored(error)) => {
                one.failed(&error);
                failure.get_or_insert((one.location(), error));
            }
        }
    }
    let failure = failure.map_or_else(|| Error::invalid("no repository is configured"), |(_, error)| error);
    Err(failure.context(format!("{} of backup {id}", object.name)))
}

/// Compares a file that was made from several backups with the manifest, where that has a checksum of it.
fn prove(target: &Target, destination: &Destination) -> Result<()> {
    let path = &target.place.local;
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let file = destination.check_listed(&target.place, target.blocks.bytes)?;
    if file.checksum.is_none() {
        return Ok(());
    }
    let mut reader = open(path)?;
    let (mut buffer, mut crc) = (vec![0; COMPARE_BYTES], 0);
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => crc = crc32c::crc32c_append(crc, &buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    match file.matches_crc32c(crc) {
        Some(false) => Err(damaged(format!(
            "{:?}, put together from several backups, does not match the checksum in the manifest",
            target.place.listed
        ))),
        _ => Ok(()),
    }
}

/// Reads every object's index and compares it with the manifest: before anything that is there is changed.
///
/// # Errors
/// What fetching fails with; [`Error::Corrupt`] for an index that is not what it should be.
pub(super) async fn check_indexes(backup: &BackupBlocks, destination: &Destination) -> Result<()> {
    let checked = backup.objects().iter().enumerate().map(|(number, object)| async move {
        if object.index.is_none() {
            return Ok(());
        }
        let number = number as u32;
        let files = backup.files_of(0, number).await?;
        let counts = |file: &&IndexedFile| destination.counts(&object.listed(&file.whole_path()), number);
        files.index.files().map(|(file, _)| file).filter(counts).try_for_each(|file| {
            let place = place_of(destination, object.tablespace, &file.whole_path())?;
            destination.check_listed(&place, file.whole_bytes()).map(|_| ())
        })
    });
    futures_util::stream::iter(checked).buffer_unordered(INDEXES_MAX).try_collect::<()>().await
}

fn make_folders(destination: &Destination, object: &BackupObject, index: &BackupIndex) -> Result<()> {
    let mut known = HashSet::new();
    for folder in index.folders() {
        let place = place_of(destination, object.tablespace, folder)?;
        if !is_tablespace_link(destination, object.tablespace, folder) {
            sound_folder(destination, &place.local, &mut known)?;
        }
    }
    Ok(())
}

/// Compares files with what is there, and says what is to be fetched. Blocking.
fn compare(
    destination: &Destination,
    object: &BackupObject,
    files: Vec<(IndexedFile, FileBlocks)>,
) -> Result<(Vec<Target>, Vec<WantedBlock>)> {
    let (mut targets, mut wanted) = (Vec::with_capacity(files.len()), Vec::new());
    let (mut buffer, mut known_folders) = (Vec::new(), HashSet::new());
    for (file, blocks) in files {
        let place = place_of(destination, object.tablespace, &file.whole_path())?;
        destination.claim(&object.name, &place, blocks.bytes)?;
        destination.note_group(file.group_reads);
        let is_held = destination.is_held(&place.listed, blocks.bytes)?;
        let target = targets.len();
        let mut want = |block: usize| {
            let place = blocks.blocks.get(block).copied().flatten();
            wanted.extend(place.map(|place| WantedBlock { target, block, place }));
        };
        if is_held {
            (0..blocks.blocks.len()).for_each(&mut want);
        } else {
            if let Some(parent) = place.local.parent() {
                sound_folder(destination, parent, &mut known_folders)?;
            }
            let mode = if file.group_reads { 0o640 } else { 0o600 };
            let kept = compare_file(&place.local, mode, &blocks, &mut buffer, &mut want)?;
            destination.progress.kept_bytes.fetch_add(kept, Ordering::Relaxed);
            destination.progress.written_bytes.fetch_add(kept, Ordering::Relaxed);
        }
        destination.progress.files.fetch_add(1, Ordering::Relaxed);
        targets.push(Target { place, blocks, is_held, is_put_together: file.partial.is_some() });
    }
    Ok((targets, wanted))
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
    mode: u32,
    blocks: &FileBlocks,
    buffer: &mut Vec<u8>,
    want: &mut impl FnMut(usize),
) -> Result<u64> {
    let bytes = blocks.bytes;
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
        let file = create(path, mode)?;
        file.set_len(bytes).map_err(failed)?;
        reserve(&file, path, bytes)?;
        (0..blocks.blocks.len()).for_each(want);
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
            match blocks.blocks.get(block).copied().flatten() {
                Some(place) if place.digest == found => kept += piece.len() as u64,
                Some(_) => want(block),
                // Zeros are stored nowhere.
                None if piece.iter().all(|byte| *byte == 0) => kept += piece.len() as u64,
                None => {
                    let zeros = vec![0; piece.len()];
                    file.write_all_at(&zeros, (block * BLOCK_BYTES) as u64).map_err(failed)?;
                }
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

/// Returns what is to be fetched for these blocks.
async fn ranges(
    backup: &BackupBlocks,
    targets: &[Target],
    mut wanted: Vec<WantedBlock>,
) -> Result<Vec<Range>> {
    wanted.sort_by_key(|WantedBlock { place, .. }| (place.level, place.object, place.tar_at));
    let mut ranges: Vec<Range> = Vec::new();
    let of_objects =
        wanted.chunk_by(|a, b| (a.place.level, a.place.object) == (b.place.level, b.place.object));
    for wanted in of_objects {
        let Some(BlockPlace { level, object, .. }) = wanted.first().map(|first| first.place) else {
            continue;
        };
        let files = backup.files_of(level, object).await?;
        let first = ranges.len();
        for block in wanted {
            let target = &targets[block.target];
            let at = block.place.tar_at;
            let [frame] = files.index.frames_of(at..at + target.blocks.block_bytes(block.block) as u64)
            else {
                return Err(damaged(format!(
                    "a block of {:?} does not lie in one frame",
                    target.place.listed
                )));
            };
            add_to_ranges(&mut ranges, first, *frame, *block);
        }
    }
    Ok(ranges)
}

/// Adds a block of a frame to the last of the ranges, or to a new one; those before `first` are of other objects.
fn add_to_ranges(ranges: &mut Vec<Range>, first: usize, frame: Frame, block: WantedBlock) {
    let end = frame.stored_at + u64::from(frame.stored_bytes);
    match ranges.get_mut(first..).and_then(<[Range]>::last_mut) {
        Some(last) if last.frames.last().is_some_and(|(known, _)| *known == frame) => {
            last.frames.last_mut().into_iter().for_each(|(_, blocks)| blocks.push(block));
        }
        Some(last)
            if frame.stored_at.saturating_sub(last.stored_at + last.stored_bytes) <= GAP_BYTES
                && end - last.stored_at <= RANGE_BYTES =>
        {
            last.stored_bytes = end - last.stored_at;
            last.frames.push((frame, vec![block]));
        }
        _ => ranges.push(Range {
            level: block.place.level,
            object: block.place.object,
            stored_at: frame.stored_at,
            stored_bytes: u64::from(frame.stored_bytes),
            frames: vec![(frame, vec![block])],
        }),
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
            let from = (wanted.place.tar_at - frame.tar_at) as usize;
            let content = tar.get(from..from + target.blocks.block_bytes(wanted.block)).unwrap_or_default();
            if block_digests(content).next() != Some(wanted.place.digest) {
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
