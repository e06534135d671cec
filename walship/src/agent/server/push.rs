//! Pushes: what PostgreSQL asks for, and before it does, what waits behind that.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, watch};

use crate::archive::give_up::push_encoding_where_open;
use crate::archive::lookahead::Waiting;
use crate::archive::push::{EncodedFile, PushOptions, encode_aside};
use crate::error::Result;
use crate::pg::{SegmentName, WalFileName};
use crate::wal::page::PageHeader;

use super::Said;
use super::warm::Warm;

/// The status of a push that failed.
const STATUS_FAILED: u8 = 1;

/// As many finished pushes are remembered.
const FINISHED_MAX: usize = 256;

/// As many compressed bytes are held in memory, in KiB: what is on its way into the repositories.
const ROOM_KIB: u32 = 40 << 10;

/// How much is done side by side.
#[derive(Debug, Clone, Copy)]
pub struct SideBySide {
    /// So many segments are compressed.
    pub encoding: usize,
    /// So many are pushed ahead: compressed, or on their way into the repositories.
    pub ahead: usize,
}

/// The pushes of one data directory.
#[derive(Debug)]
pub(super) struct Pushes {
    warm: Arc<Warm>,
    options: PushOptions,
    ahead_max: usize,
    ahead: Arc<Semaphore>,
    encoding: Semaphore,
    room: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    jobs: BTreeMap<SegmentName, Job>,
    waiting: Waiting,
}

/// One segment's push, on its way or at its end.
#[derive(Debug, Clone)]
struct Job {
    file: FileIdentity,
    outcome: watch::Receiver<Option<Outcome>>,
    /// Whether what is to be said of it was said.
    told: Arc<AtomicBool>,
}

#[derive(Debug, Clone)]
enum Outcome {
    Durable(String),
    Failed(String),
}

/// What a file is: while nothing of this changes, it is the file that was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    system_identifier: Option<u64>,
}

impl FileIdentity {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?;
        let mut start = [0; PageHeader::LONG_LEN];
        fs::File::open(path).and_then(|file| file.read_exact_at(&mut start, 0)).ok()?;
        let long = PageHeader::parse(&start).and_then(|header| header.long);
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            system_identifier: long.map(|long| long.system_identifier),
        })
    }
}

impl Pushes {
    pub(super) fn new(warm: Arc<Warm>, options: PushOptions, side_by_side: SideBySide) -> Self {
        Self {
            warm,
            options,
            ahead_max: side_by_side.ahead,
            ahead: Arc::new(Semaphore::new(side_by_side.ahead)),
            encoding: Semaphore::new(side_by_side.encoding),
            room: Arc::new(Semaphore::new(ROOM_KIB as usize)),
            state: Mutex::default(),
        }
    }

    /// Returns what PostgreSQL is to be told about the file at `path`: success only when it is durable in
    /// every repository as it is now.
    pub(super) async fn asked(self: &Arc<Self>, path: PathBuf) -> Said {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let Some(WalFileName::Segment(segment)) = name else {
            // History files and .partial files are few and decide what a recovery follows: one by one.
            return said(self.push(&path).await);
        };
        // A file may be replaced while it is pushed: then once more.
        for _ in 0..3 {
            let Some(file) = FileIdentity::of(&path) else { break };
            let job = self.job(segment, file, &path);
            self.push_ahead(segment, &path);
            let mut outcome = job.outcome;
            let outcome = match outcome.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone(),
                Err(_) => None,
            };
            if FileIdentity::of(&path) != Some(file) {
                continue;
            }
            match outcome {
                Some(Outcome::Durable(text)) => {
                    let text = if job.told.swap(true, Ordering::Relaxed) { String::new() } else { text };
                    return Said { status: 0, text };
                }
                Some(Outcome::Failed(text)) => return Said { status: STATUS_FAILED, text },
                None => break,
            }
        }
        said(self.push(&path).await)
    }

    /// Whether anything is on its way.
    pub(super) fn is_busy(&self) -> bool {
        self.state().jobs.values().any(|job| job.outcome.borrow().is_none())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the push of this very file: the one that is on its way or succeeded, else a new one.
    fn job(self: &Arc<Self>, segment: SegmentName, file: FileIdentity, path: &Path) -> Job {
        let mut state = self.state();
        if let Some(job) = state.jobs.get(&segment)
            && job.file == file
            && !matches!(*job.outcome.borrow(), Some(Outcome::Failed(_)))
        {
            return job.clone();
        }
        let job = self.start(file, path.to_owned(), None);
        state.jobs.insert(segment, job.clone());
        job
    }

    /// Starts the pushes of what waits behind `segment`.
    fn push_ahead(self: &Arc<Self>, segment: SegmentName, path: &Path) {
        let Some(pg_wal) = path.parent() else { return };
        let mut state = self.state();
        let behind = match state.waiting.behind(segment, pg_wal, 2 * self.ahead_max) {
            Ok(behind) => behind,
            Err(error) => return tracing::debug!(%error, "nothing is pushed ahead"),
        };
        for next in behind {
            let path = pg_wal.join(next.to_string());
            if let Some(job) = state.jobs.get(&next) {
                // What failed is tried again when it is asked for.
                let done = job.outcome.borrow().is_some();
                if !done || FileIdentity::of(&path) == Some(job.file) {
                    continue;
                }
            }
            if let Some(file) = FileIdentity::of(&path) {
                let job = self.start(file, path, Some(Arc::clone(&self.ahead)));
                state.jobs.insert(next, job);
            }
        }
        // Those before the one that is asked for are not asked for again, but after a crash.
        while state.jobs.len() > FINISHED_MAX + 2 * self.ahead_max {
            let Some(first) = state.jobs.keys().next().copied() else { break };
            state.jobs.remove(&first);
        }
    }

    fn start(self: &Arc<Self>, file: FileIdentity, path: PathBuf, turn: Option<Arc<Semaphore>>) -> Job {
        let (sender, outcome) = watch::channel(None);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = match turn {
                Some(turn) => turn.acquire_owned().await.ok(),
                None => None,
            };
            let said = said(this.push(&path).await);
            let outcome = match said.status {
                0 => Outcome::Durable(said.text),
                _ => Outcome::Failed(said.text),
            };
            let _ = sender.send(Some(outcome));
        });
        Job { file, outcome, told: Arc::default() }
    }

    /// Compresses the file at `path`. More than a core each does not make it faster, and where the store is slow, what is
    /// compressed waits for the room that it takes.
    async fn encode(&self, path: &Path) -> Result<EncodedFile> {
        let _turn = self.encoding.acquire().await;
        let mut encoded = encode_aside(path, &self.options).await?;
        let kib = u32::try_from(encoded.bytes_in_memory() >> 10).unwrap_or(ROOM_KIB).min(ROOM_KIB);
        if let Ok(room) = Arc::clone(&self.room).acquire_many_owned(kib).await {
            encoded.hold(room);
        }
        Ok(encoded)
    }

    /// Pushes the file at `path`, as `walship wal push` does; returns what is to be said.
    async fn push(&self, path: &Path) -> Result<String> {
        let encoding = self.encode(path);
        let pushed = push_encoding_where_open(&*self.warm, encoding, path, &self.options).await;
        if pushed.is_err() {
            self.warm.forget();
        }
        let warnings = pushed?.warnings(path);
        Ok(warnings.into_iter().map(|warning| warning + "\n").collect())
    }
}

fn said(pushed: Result<String>) -> Said {
    match pushed {
        Ok(text) => Said { status: 0, text },
        Err(error) => Said { status: STATUS_FAILED, text: error.report() + "\n" },
    }
}
