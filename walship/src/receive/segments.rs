//! The open segment, encoded while it comes in, and the closed ones on their way into the repositories.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::{Backoff, Progress, ReceiveEvent};
use crate::archive::push::{EncodedFile, PushOptions, encode_stream, push_to_lineages};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::repository::LineageRepository;
use crate::wal::scan::Verdict;

/// How many pieces may wait for the encoder: at 128 KiB each, the most a server sends at once, 4 MiB.
const PIECES_MAX: usize = 32;

/// What fills up a segment that ends early.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A segment that is being received. Dropped unfinished, it leaves nothing behind.
pub(super) struct OpenSegment {
    name: SegmentName,
    received: u64,
    pieces: mpsc::Sender<Bytes>,
    encoding: JoinHandle<Result<EncodedFile>>,
}

impl OpenSegment {
    /// Starts a segment; its bytes are checked, digested and compressed on a thread of their own.
    pub(super) fn start(name: SegmentName, size: SegmentSize, options: &PushOptions) -> Self {
        let (pieces, queue) = mpsc::channel(PIECES_MAX);
        let options = options.clone();
        let encoding = tokio::task::spawn_blocking(move || {
            let mut source = Queue { queue, piece: Bytes::new() };
            encode_stream(WalFileName::Segment(name), &mut source, size.bytes(), size, &options)
        });
        Self { name, received: 0, pieces, encoding }
    }

    /// Takes the next bytes; waits while the encoder is behind.
    pub(super) async fn push(&mut self, bytes: Bytes) -> Result<()> {
        self.received += bytes.len() as u64;
        if self.pieces.send(bytes).await.is_ok() {
            return Ok(());
        }
        // The encoder ended early: it says why.
        match (&mut self.encoding).await {
            Ok(Err(error)) => Err(error),
            _ => Err(Error::local_io(format!("encoding {} was broken off", self.name))),
        }
    }

    /// Returns the whole segment, on its way through the encoder.
    pub(super) fn close(self) -> JoinHandle<Result<EncodedFile>> {
        self.encoding
    }

    /// Fills the segment up with zeros: what a timeline's last segment holds behind its end.
    pub(super) async fn fill_up(&mut self, size: SegmentSize) -> Result<()> {
        while self.received < size.bytes() {
            let length = (size.bytes() - self.received).min(ZEROS.len() as u64);
            self.push(Bytes::from_static(&ZEROS[..usize::try_from(length).unwrap_or(ZEROS.len())])).await?;
        }
        Ok(())
    }
}

/// The pieces of a segment as a blocking reader.
struct Queue {
    queue: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Queue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.queue.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// What is durable now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) stored_bytes: u64,
}

/// The files that are being stored, side by side. A store that fails for a time is asked again for as long
/// as it takes: until then nothing of this counts as durable, and the server keeps it.
pub(super) struct Uploads {
    lineages: Arc<[LineageRepository]>,
    progress: Progress,
    tasks: JoinSet<Result<Stored>>,
}

impl Uploads {
    pub(super) fn new(lineages: Arc<[LineageRepository]>, progress: Progress) -> Self {
        Self { lineages, progress, tasks: JoinSet::new() }
    }

    /// Returns how many files are on their way.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Stores a whole segment as soon as it is encoded.
    pub(super) fn segment(
        &mut self,
        name: SegmentName,
        size: SegmentSize,
        encoding: JoinHandle<Result<EncodedFile>>,
    ) {
        let (start, end) = (name.start(size), name.end(size));
        self.store(encoding, start, end, |file| file);
    }

    /// Stores the last segment of a timeline that ends at `end`, as a `.partial` file.
    pub(super) fn last_segment(
        &mut self,
        name: SegmentName,
        end: Lsn,
        size: SegmentSize,
        encoding: JoinHandle<Result<EncodedFile>>,
    ) {
        self.store(encoding, name.start(size), end, EncodedFile::into_partial);
    }

    fn store(
        &mut self,
        encoding: JoinHandle<Result<EncodedFile>>,
        start: Lsn,
        end: Lsn,
        finish: fn(EncodedFile) -> EncodedFile,
    ) {
        let (lineages, progress) = (Arc::clone(&self.lineages), Arc::clone(&self.progress));
        self.tasks.spawn(async move {
            let file = encoding
                .await
                .map_err(|error| Error::local_io(format!("encoding was broken off: {error}")))??;
            let file = finish(file);
            let stored_bytes = push_patiently(&lineages, &file, &progress).await?;
            Ok(Stored { start, end, stored_bytes })
        });
    }

    /// Returns the next file that is durable; waits for ever when there is none on its way.
    ///
    /// # Errors
    /// What no repetition can mend: a conflict, a refusal, WAL that is not what it should be.
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Stored> {
        match self.tasks.join_next().await {
            None => std::future::pending().await,
            Some(Ok(stored)) => stored,
            Some(Err(error)) => Err(Error::local_io(format!("an upload was broken off: {error}"))),
        }
    }

    /// Gives up everything that is on its way.
    pub(super) async fn abort(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// Stores a file in every lineage, however long the stores take to come back.
async fn push_patiently(
    lineages: &[LineageRepository],
    file: &EncodedFile,
    progress: &Progress,
) -> Result<u64> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        match push_to_lineages(lineages, file).await {
            Ok(report) => {
                report.warnings.into_iter().for_each(|warning| progress(ReceiveEvent::Warning(warning)));
                let whole = file.scan().map(|scan| &scan.verdict);
                if !matches!(whole, None | Some(Verdict::Incomplete { .. })) {
                    tracing::debug!(file = report.file, "stored");
                }
                return Ok(report.stored_bytes);
            }
            Err(error) if error.is_transient() => {
                let pause = backoff.next();
                progress(ReceiveEvent::StoreFails { error: error.to_string(), retry_in: pause });
                tokio::time::sleep(pause).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Stores a timeline's history file.
pub(super) async fn push_history(
    lineages: &[LineageRepository],
    timeline: TimelineId,
    text: &str,
    options: &PushOptions,
    progress: &Progress,
) -> Result<()> {
    let name = WalFileName::History(timeline);
    let size = lineages.first().map_or(SegmentSize::DEFAULT, |lineage| lineage.lineage().segment_size);
    let file = encode_stream(name, &mut text.as_bytes(), text.len() as u64, size, options)?;
    push_patiently(lineages, &file, progress).await.map(|_| ())
}
