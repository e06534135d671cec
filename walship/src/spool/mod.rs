//! The spool of `walship receive --flush local`: WAL that is durable on this host and not yet in every repository.
//!
//! A file holds what was received of one segment, from its start on, as parts in the repository's own format, one
//! behind the other; `lz4 -d` or `zstd -d` gives its WAL. Each part is synced before the next one is
//! written, so that at most one at a file's end was never acknowledged. `docs/repository-format.md` describes
//! the names.
//!
//! This room keeps files; what becomes of them is for `receive`. Everything here blocks.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::codec::{Compression, TailPart};
use crate::durable::sync_folder;
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize};

use file::End;

pub use file::{Parts, SegmentReader};

/// What the name of a segment's file ends with.
const TAIL: &str = ".tail";

/// What the name of the file of a timeline's last segment ends with, behind the offset of its end.
const LAST: &str = ".last";

/// The file that whoever uses a cluster's spool holds a lock on.
const LOCK: &str = "lock";

/// More segments than fit into any spool.
const SEGMENTS_MAX: usize = 1_000_000;

/// One cluster's part of a spool folder, which nobody else uses meanwhile.
#[derive(Debug)]
pub struct SpoolFolder {
    path: PathBuf,
    _lock: Flock<File>,
}

/// What is held of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The segment.
    pub segment: SegmentName,
    /// So many of its bytes are durable, from its start.
    pub end: u64,
    /// The length of its file.
    pub file_bytes: u64,
    /// Where in it the timeline ended, if it did: what is held behind was written by a server that died.
    pub timeline_end: Option<u64>,
}

impl Held {
    /// Returns whether all of the segment is there.
    pub fn is_whole(&self, size: SegmentSize) -> bool {
        self.end == size.bytes()
    }
}

/// What a spool holds that is in no repository yet, as far as its files' names and lengths tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The cluster's folder in the spool.
    pub folder: PathBuf,
    /// So many segments, the open one among them.
    pub segments: usize,
    /// The length of their files.
    pub file_bytes: u64,
    /// Whether a receiver is at work with it, which stores them.
    pub in_use: bool,
}

/// The spool of one system identifier.
#[derive(Debug)]
pub struct Spool {
    folder: SpoolFolder,
    path: PathBuf,
    system_identifier: u64,
    size: SegmentSize,
    bytes_max: u64,
    held: Mutex<BTreeMap<SegmentName, Held>>,
    /// Held by whoever changes a file.
    changing: Mutex<()>,
}

impl SpoolFolder {
    /// Returns the part of `cluster` in the spool at `folder`, made where it is not there. The spool folder's parent
    /// must exist.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while another process uses it, [`Error::Denied`] or [`Error::LocalIo`] when it cannot be
    /// made or locked.
    pub fn lock(folder: &Path, cluster: &str) -> Result<Self> {
        make(folder)?;
        let path = folder.join(cluster);
        make(&path)?;
        let lock = path.join(LOCK);
        let failed = |error| Error::from_io(format!("locking {}", lock.display()), error);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock)
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::denied(format!(
                "another process uses the spool {}: a `walship receive` is running with it",
                path.display()
            ))
            .with_safe("nothing was changed")
            .with_next("Stop the other one, or give this one a --spool of its own.")),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// Returns the system identifiers that WAL is held of.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn system_identifiers(&self) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        for (name, metadata) in entries(&self.path)? {
            if metadata.is_dir()
                && let Ok(identifier) = name.parse()
            {
                found.push(identifier);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Returns the segment size that the parts of a system identifier tell; `None` where nothing is held of it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no file can be read, and one of them holds more than a part that was cut off.
    pub fn segment_size(&self, system_identifier: u64) -> Result<Option<SegmentSize>> {
        let path = self.path.join(system_identifier.to_string());
        let mut damage = None;
        for (name, _) in entries(&path)? {
            if parse_name(&name).is_none() {
                continue;
            }
            match Parts::open(&path.join(&name))?.next_part() {
                Ok(Some(part)) => return Ok(Some(part.segment_size)),
                Ok(None) => {}
                Err(Error::Corrupt(_)) => {
                    damage = file::check(&path.join(&name), End::MayBeTorn, |_| true).err().or(damage);
                }
                Err(error) => return Err(error),
            }
        }
        damage.map_or(Ok(None), Err)
    }

    /// Opens what is held of a system identifier; at most `bytes_max` bytes of files are taken.
    ///
    /// Every file is read and checked. A part at a file's end that was not written whole was never acknowledged:
    /// it is cut off.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a part in the middle of a file is damaged: that was acknowledged, and may be
    /// nowhere else.
    pub fn open(self, system_identifier: u64, size: SegmentSize, bytes_max: u64) -> Result<Spool> {
        let path = self.path.join(system_identifier.to_string());
        make(&path)?;
        let spool = Spool {
            folder: self,
            path,
            system_identifier,
            size,
            bytes_max,
            held: Mutex::default(),
            changing: Mutex::default(),
        };
        let names: Vec<_> = entries(&spool.path)?
            .into_iter()
            .filter_map(|(name, _)| parse_name(&name).map(|(segment, end)| (name, segment, end)))
            .collect();
        let files: BTreeSet<SegmentName> = names.iter().map(|(_, segment, _)| *segment).collect();
        for (name, segment, timeline_end) in names {
            let file = spool.path.join(&name);
            // What follows was written when all of this was acknowledged.
            let followed = segment.next(size).is_some_and(|next| files.contains(&next));
            let last = if followed || timeline_end.is_some() { End::WasWritten } else { End::MayBeTorn };
            let sound = file::check(&file, last, |part| spool.is_ours(part, segment))?;
            if sound.plain_bytes == 0 {
                // Made, and nothing came of it.
                fs::remove_file(&file)
                    .map_err(|error| Error::from_io(format!("removing {}", file.display()), error))?;
                continue;
            }
            if timeline_end.is_some_and(|end| end > sound.plain_bytes) {
                return Err(Error::corrupt(format!(
                    "{} holds {} bytes of WAL, less than its name says",
                    file.display(),
                    sound.plain_bytes
                )));
            }
            let held = Held { segment, end: sound.plain_bytes, file_bytes: sound.file_bytes, timeline_end };
            spool.held().insert(segment, held);
        }
        sync_folder(&spool.path)?;
        Ok(spool)
    }
}

impl Spool {
    /// Returns where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the cluster's folder, still locked, when nothing more is done with this system identifier.
    pub fn into_folder(self) -> SpoolFolder {
        self.folder
    }

    /// Returns the segment size.
    pub fn segment_size(&self) -> SegmentSize {
        self.size
    }

    /// Returns what is held, in WAL order of each timeline.
    pub fn segments(&self) -> Vec<Held> {
        self.held().values().copied().collect()
    }

    /// Returns what is held of one segment.
    pub fn segment(&self, segment: SegmentName) -> Option<Held> {
        self.held().get(&segment).copied()
    }

    /// Returns the length of all files.
    pub fn file_bytes(&self) -> u64 {
        self.held().values().map(|held| held.file_bytes).sum()
    }

    /// Returns whether more may be taken.
    pub fn has_room(&self) -> bool {
        self.file_bytes() < self.bytes_max
    }

    /// Adds consecutive bytes of a segment, of which those before are held.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the bytes do not follow on those held; [`Error::LocalIo`] when they cannot be written: what
    /// was held before still is, and the same may be tried again.
    /// # Durability
    /// After `Ok` the bytes survive a crash.
    pub fn append(
        &self,
        segment: SegmentName,
        start: Lsn,
        bytes: Vec<u8>,
        compression: Compression,
    ) -> Result<()> {
        let _changing = self.changing();
        let held = self.segment(segment);
        let (end, file_bytes) = held.map_or((0, 0), |held| (held.end, held.file_bytes));
        if start.0 != segment.start(self.size).0 + end || held.is_some_and(|held| held.timeline_end.is_some())
        {
            return Err(Error::invalid(format!(
                "bytes of {segment} at {start} do not follow on the {end} that are in the spool"
            )));
        }
        let part = TailPart {
            timeline: segment.timeline,
            start,
            system_identifier: self.system_identifier,
            segment_size: self.size,
            bytes,
        };
        let object = part.encode(compression)?;
        let path = self.path.join(format!("{segment}{TAIL}"));
        let failed = |error| {
            Error::from_io(format!("writing {}", path.display()), error)
                .with_safe("nothing was acknowledged that is not durable; the server keeps the WAL")
                .with_next("Free space on the spool's disk, or check it; the same is tried again.")
        };
        let mut options = OpenOptions::new();
        options.write(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
        let file = options.create(held.is_none()).truncate(held.is_none()).open(&path).map_err(failed)?;
        let written = file.write_all_at(&object, file_bytes).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // What a sync failed for may be lost although it can be read: it is written anew next time.
            let _ = file.set_len(file_bytes);
            return Err(failed(error));
        }
        if held.is_none() {
            sync_folder(&self.path)?;
        }
        let held = Held {
            segment,
            end: end + part.bytes.len() as u64,
            file_bytes: file_bytes + object.len() as u64,
            timeline_end: None,
        };
        self.held().insert(segment, held);
        Ok(())
    }

    /// Notes that a timeline ended in this segment, at the offset `end`. A whole segment stays one: what a server
    /// that died wrote behind the end is WAL of that timeline.
    ///
    /// # Durability
    /// After `Ok` the note survives a crash.
    pub fn end_timeline(&self, segment: SegmentName, end: u64) -> Result<()> {
        let _changing = self.changing();
        let mut all = self.held();
        let Some(held) = all.get_mut(&segment) else { return Ok(()) };
        if held.timeline_end.is_some() || held.is_whole(self.size) || end > held.end {
            return Ok(());
        }
        let from = self.file_of(held);
        let noted = Held { timeline_end: Some(end), ..*held };
        // Under the lock: whoever opens the file meanwhile has to know its name.
        fs::rename(&from, self.file_of(&noted))
            .map_err(|error| Error::from_io(format!("renaming {}", from.display()), error))?;
        *held = noted;
        drop(all);
        sync_folder(&self.path)
    }

    /// Returns the segment's parts, as they were written; `None` where nothing is held of it.
    ///
    /// # Errors
    /// When its file cannot be opened.
    pub fn parts(&self, segment: SegmentName) -> Result<Option<Parts>> {
        let all = self.held();
        all.get(&segment).map(|held| Parts::open(&self.file_of(held))).transpose()
    }

    /// Returns the segment's bytes from its start to its end; behind what is held of it, or behind the end of its
    /// timeline, zeros.
    ///
    /// # Errors
    /// When nothing is held of it, or its file cannot be opened.
    pub fn reader(&self, segment: SegmentName) -> Result<SegmentReader> {
        let (Some(held), Some(parts)) = (self.segment(segment), self.parts(segment)?) else {
            return Err(Error::local_io(format!("the spool holds nothing of {segment}")));
        };
        Ok(SegmentReader::new(parts, held.timeline_end.unwrap_or(held.end), self.size.bytes()))
    }

    /// Removes a segment: all of it is in every repository.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn remove(&self, segment: SegmentName) -> Result<()> {
        let _changing = self.changing();
        let mut all = self.held();
        let Some(path) = all.get(&segment).map(|held| self.file_of(held)) else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::from_io(format!("removing {}", path.display()), error));
            }
            _ => {}
        }
        all.remove(&segment);
        Ok(())
    }

    fn file_of(&self, held: &Held) -> PathBuf {
        let segment = held.segment;
        self.path.join(match held.timeline_end {
            Some(end) => format!("{segment}.{end:08X}{LAST}"),
            None => format!("{segment}{TAIL}"),
        })
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ours(&self, part: &TailPart, segment: SegmentName) -> bool {
        part.system_identifier == self.system_identifier
            && part.segment_size == self.size
            && part.segment() == segment
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<SegmentName, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns what the spool at `folder` holds of a cluster, without reading its files; `None` where that is nothing.
///
/// # Errors
/// When the folder is there and cannot be read.
pub fn waiting(folder: &Path, cluster: &str) -> Result<Option<Waiting>> {
    let folder = folder.join(cluster);
    // Let go of at once: a receiver may start at any moment.
    let lock = File::open(folder.join(LOCK)).ok();
    let in_use = lock.is_some_and(|file| {
        matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
    });
    let mut waiting = Waiting { folder: folder.clone(), segments: 0, file_bytes: 0, in_use };
    for (name, metadata) in entries(&folder)? {
        if !metadata.is_dir() || name.parse::<u64>().is_err() {
            continue;
        }
        for (name, metadata) in entries(&folder.join(name))? {
            if parse_name(&name).is_some() && metadata.len() > 0 {
                waiting.segments += 1;
                waiting.file_bytes += metadata.len();
            }
        }
    }
    Ok(Some(waiting).filter(|waiting| waiting.segments > 0))
}

/// Returns the segment that a file is of, and where its timeline ends if it does in it.
fn parse_name(name: &str) -> Option<(SegmentName, Option<u64>)> {
    if let Some(segment) = name.strip_suffix(TAIL) {
        return Some((segment.parse().ok()?, None));
    }
    let (segment, end) = name.strip_suffix(LAST)?.split_once('.')?;
    Some((segment.parse().ok()?, Some(u64::from_str_radix(end, 16).ok()?)))
}

/// Returns the names in a folder, none where it is not there.
fn entries(folder: &Path) -> Result<Vec<(String, fs::Metadata)>> {
    let failed = |error| Error::from_io(format!("reading the spool {}", folder.display()), error);
    let read = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in read {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        match entry.metadata() {
            Ok(metadata) => found.push((name, metadata)),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        if found.len() > SEGMENTS_MAX {
            return Err(Error::invalid(format!(
                "more than {SEGMENTS_MAX} files lie in {}",
                folder.display()
            )));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Makes a folder for this user alone where it is not there, durable in its parent.
fn make(folder: &Path) -> Result<()> {
    let advise = |error: Error| {
        error.with_next("Name a folder for --spool that this user can write to; its parent must exist.")
    };
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(advise(Error::from_io(format!("making the spool {}", folder.display()), error)));
        }
    }
    let metadata = fs::metadata(folder)
        .map_err(|error| advise(Error::from_io(format!("looking at {}", folder.display()), error)))?;
    if !metadata.is_dir() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(advise(Error::denied(format!(
            "{} has to be a folder of this user (its owner is {})",
            folder.display(),
            metadata.uid()
        ))));
    }
    // Also where it was there: whoever made it may have died before this.
    sync_folder(crate::durable::folder_of(folder))
}

#[cfg(test)]
mod tests;
