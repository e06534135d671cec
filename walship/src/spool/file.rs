//! One file of a spool: parts, one behind the other.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::codec::{TailPart, fill};
use crate::error::{Error, Result};

/// Reads a file's parts in their order.
#[derive(Debug)]
pub struct Parts {
    path: PathBuf,
    file: BufReader<File>,
}

impl Parts {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file =
            File::open(path).map_err(|error| Error::from_io(format!("opening {}", path.display()), error))?;
        Ok(Self { path: path.to_owned(), file: BufReader::with_capacity(128 << 10, file) })
    }

    /// Returns the next part; `None` at the end, where the file ends or was not written on.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when what follows is no whole part, [`Error::LocalIo`] when it cannot be read.
    pub fn next_part(&mut self) -> Result<Option<TailPart>> {
        let mut object = vec![0; TailPart::HEAD_BYTES];
        match fill(&mut self.file, &mut object) {
            Ok(0) => return Ok(None),
            Ok(read) if read < object.len() => return Err(self.damaged("its end is cut off")),
            Ok(_) => {}
            Err(error) => return Err(self.failed(error)),
        }
        let body_bytes = TailPart::body_bytes(&object).map_err(|error| self.damaged(&error.to_string()))?;
        object.resize(TailPart::HEAD_BYTES + body_bytes, 0);
        match fill(&mut self.file, &mut object[TailPart::HEAD_BYTES..]) {
            Ok(read) if read < body_bytes => return Err(self.damaged("its end is cut off")),
            Ok(_) => {}
            Err(error) => return Err(self.failed(error)),
        }
        match TailPart::decode(&object) {
            Err(error @ Error::Corrupt(_)) => Err(self.damaged(&error.to_string())),
            Err(error) => Err(error.context(self.path.display())),
            Ok(part) => Ok(Some(part)),
        }
    }

    fn damaged(&self, what: &str) -> Error {
        Error::corrupt(format!("{}: {what}", self.path.display()))
            .with_safe("nothing was removed or acknowledged because of it; what is in the repositories is unchanged")
            .with_next(
                "Keep the file. Look for its segment in the pg_wal of the server or of a standby, and store it with \
                 `walship wal push`; then move the file away.",
            )
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::from_io(format!("reading {}", self.path.display()), error)
    }
}

/// How far a file is sound.
pub(super) struct Sound {
    pub(super) plain_bytes: u64,
    pub(super) file_bytes: u64,
}

/// What a part at a file's end may be that is not sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// One that was being written when this host died: never acknowledged.
    MayBeTorn,
    /// Damaged: something was acknowledged behind it.
    WasWritten,
}

/// Reads a file to its end, cuts off a last part that was not written whole, and makes the rest durable.
///
/// # Errors
/// [`Error::Corrupt`] for any other damage: each part was synced before the next one was written.
/// # Durability
/// After `Ok` what is sound survives a crash, also when the process that wrote it died before it was synced.
pub(super) fn check(path: &Path, end: End, is_ours: impl Fn(&TailPart) -> bool) -> Result<Sound> {
    let mut parts = Parts::open(path)?;
    let mut sound = Sound { plain_bytes: 0, file_bytes: 0 };
    let mut last_start = 0;
    let damage = loop {
        match parts.next_part() {
            Ok(None) => break None,
            Ok(Some(part)) if is_ours(&part) && part.offset() == sound.plain_bytes => {
                sound.plain_bytes += part.bytes.len() as u64;
                last_start = sound.file_bytes;
                sound.file_bytes = io::Seek::stream_position(&mut parts.file)
                    .map_err(|error| Error::from_io(format!("reading {}", path.display()), error))?;
            }
            Ok(Some(_)) => return Err(parts.damaged("it holds a part that does not belong there")),
            Err(damage @ Error::Corrupt(_)) => break Some(damage),
            Err(error) => return Err(error),
        }
    };
    let failed = |error| Error::from_io(format!("mending {}", path.display()), error);
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    if let Some(damage) = damage {
        let rest = file.metadata().map_err(failed)?.len().saturating_sub(sound.file_bytes);
        if end == End::WasWritten
            || rest > TailPart::OBJECT_BYTES_MAX
            || another_follows(&file, sound.file_bytes, rest).map_err(failed)?
        {
            return Err(damage);
        }
        tracing::warn!("{damage}: the last part was never acknowledged, and is cut off");
        file.set_len(sound.file_bytes).map_err(failed)?;
    }
    // Whoever wrote the last part may have died before it was synced, or after a sync had failed: then it would be
    // believed to be on the disk. All before it were synced.
    let mut last = vec![0; usize::try_from(sound.file_bytes - last_start).unwrap_or(0)];
    file.read_exact_at(&mut last, last_start)
        .and_then(|()| file.write_all_at(&last, last_start))
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    Ok(sound)
}

/// Whether what is damaged at `from` was written whole: it is there as it was written, or the head of a part stands
/// anywhere in the `length` bytes behind.
fn another_follows(file: &File, from: u64, length: u64) -> io::Result<bool> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, from)?;
    Ok(TailPart::was_written(&bytes) || (1..bytes.len()).any(|at| TailPart::body_bytes(&bytes[at..]).is_ok()))
}

/// A segment's bytes as a reader.
#[derive(Debug)]
pub struct SegmentReader {
    parts: Parts,
    bytes: Vec<u8>,
    taken: usize,
    /// So many bytes come from parts yet, and so many zeros behind them.
    left: u64,
    zeros: u64,
}

impl SegmentReader {
    pub(super) fn new(parts: Parts, end: u64, size: u64) -> Self {
        Self { parts, bytes: Vec::new(), taken: 0, left: end, zeros: size.saturating_sub(end) }
    }
}

impl Read for SegmentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let length = buffer.len().min(usize::try_from(self.zeros).unwrap_or(usize::MAX));
            buffer[..length].fill(0);
            self.zeros -= length as u64;
            return Ok(length);
        }
        while self.taken == self.bytes.len() {
            match self.parts.next_part() {
                Ok(Some(part)) => (self.bytes, self.taken) = (part.bytes, 0),
                Ok(None) => return Err(io::Error::other("the spool holds less of a segment than it should")),
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
        let there = (self.bytes.len() - self.taken).min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let length = buffer.len().min(there);
        buffer[..length].copy_from_slice(&self.bytes[self.taken..self.taken + length]);
        self.taken += length;
        self.left -= length as u64;
        Ok(length)
    }
}
