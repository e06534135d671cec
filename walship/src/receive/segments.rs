//! The open segment, encoded while it comes in, and the closed ones on their way into the repositories.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::{Backoff, Progress, ReceiveEvent};
use crate::archive::push::{
    EncodedFile, PushOptions, PushReport, SegmentEncoder, encode_stream, encoded_in_memory_max,
    push_to_lineages,
};
use crate::codec::Compression;
use crate::error::{Error, Result};
use crate::feed::{OnTheWay, Part};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::repository::LineageRepository;
use crate::spool::Spool;
use crate::storage::{ObjectKey, blocking};

/// So many bytes may wait for the encoders. With a whole segment of the usual size two of them are at work at
/// once: the next segment's begins while that of the one before has not come to its end.
const WAITING_BYTES_MAX: u32 = 16 << 20;

/// So many bytes of encoded segments are in memory at most, on their way or still being encoded; four that cannot
/// be compressed. One segment may always be there.
const ENCODED_BYTES_MAX: u64 = 66 << 20;

/// What is kept of the memory of segments that are stored.
const SPARES_MAX: usize = 2;
const SPARE_BYTES_MAX: u64 = 6 << 20;

/// How many pieces an encoder takes at once.
const PIECES_AT_ONCE: usize = 32;

/// The pauses between two attempts at a store.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(200);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What fills up a segment that ends early.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The room for bytes that wait for an encoder, of all segments together.
#[derive(Debug, Clone)]
struct Waiting(Arc<Semaphore>);

impl Waiting {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(WAITING_BYTES_MAX as usize)))
    }

    /// Waits until there is room for `bytes`, or for what of them there ever is.
    async fn room(&self, bytes: usize) -> OwnedSemaphorePermit {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(WAITING_BYTES_MAX);
        Arc::clone(&self.0).acquire_many_owned(bytes).await.expect("nobody closes it")
    }
}

/// Memory of segments that are stored, for the next ones: while one follows the other, new pages for each cost
/// more than a tenth of compressing it.
#[derive(Debug, Default)]
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    fn take(&self) -> Option<Vec<u8>> {
        self.lock().pop()
    }

    /// Keeps the memory of `file`, unless much of it is in use or enough is kept.
    fn keep(&self, file: EncodedFile) {
        if file.bytes_in_memory() <= SPARE_BYTES_MAX
            && let Some(memory) = file.into_memory()
        {
            let mut spares = self.lock();
            if spares.len() < SPARES_MAX {
                spares.push(memory);
            }
        }
    }

    /// Gives all back to the system.
    fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much memory encoded segments take.
#[derive(Debug, Default)]
struct Held {
    bytes: AtomicU64,
    /// Told when it becomes less.
    less: Notify,
}

/// A segment's share of [`Held`]: as long as it is not encoded, what it takes at most.
#[derive(Debug)]
struct Share {
    held: Arc<Held>,
    bytes: u64,
}

impl Share {
    fn new(held: &Arc<Held>, bytes: u64) -> Self {
        held.bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { held: Arc::clone(held), bytes }
    }

    fn shrink_to(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        self.held.bytes.fetch_sub(less, Ordering::Relaxed);
        self.held.less.notify_one();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

/// A closed segment on its way through the encoder.
pub(super) struct Encoding {
    file: JoinHandle<Result<EncodedFile>>,
    share: Share,
}

/// Bytes of a segment, and the room that they take until they are encoded.
type WaitingPiece = (Bytes, OwnedSemaphorePermit);

/// A segment that is being received. Dropped unfinished, it leaves nothing behind.
pub(super) struct OpenSegment {
    name: SegmentName,
    received: u64,
    waiting: Waiting,
    pieces: mpsc::UnboundedSender<WaitingPiece>,
    encoding: Encoding,
}

impl OpenSegment {
    /// Starts a segment; its bytes are checked, digested and compressed on a thread of their own.
    fn start(
        name: SegmentName,
        size: SegmentSize,
        options: &PushOptions,
        waiting: &Waiting,
        held: &Arc<Held>,
        spares: &Arc<Spares>,
    ) -> Self {
        let share = Share::new(held, encoded_in_memory_max(size.bytes()));
        let (pieces, mut queue) = mpsc::unbounded_channel::<WaitingPiece>();
        let (options, spares) = (options.clone(), Arc::clone(spares));
        let file = tokio::task::spawn_blocking(move || {
            let mut encoder = SegmentEncoder::new(name, size, &options, spares.take())?;
            let mut taken = Vec::with_capacity(PIECES_AT_ONCE);
            while queue.blocking_recv_many(&mut taken, PIECES_AT_ONCE) > 0 {
                for (bytes, _room) in taken.drain(..) {
                    encoder.push(&bytes)?;
                }
            }
            encoder.finish()
        });
        let encoding = Encoding { file, share };
        Self { name, received: 0, waiting: waiting.clone(), pieces, encoding }
    }

    /// Takes the next bytes; waits while the encoders are behind.
    pub(super) async fn push(&mut self, bytes: Bytes) -> Result<()> {
        self.received += bytes.len() as u64;
        let room = self.waiting.room(bytes.len()).await;
        if self.pieces.send((bytes, room)).is_ok() {
            return Ok(());
        }
        // The encoder ended early: it says why.
        match (&mut self.encoding.file).await {
            Ok(Err(error)) => Err(error),
            _ => Err(Error::local_io(format!("encoding {} was broken off", self.name))),
        }
    }

    /// Returns the whole segment, on its way through the encoder.
    pub(super) fn close(self) -> Encoding {
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

/// What is durable now.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) stored_bytes: u64,
    pub(super) what: What,
}

/// Of which kind it is.
#[derive(Debug)]
pub(super) enum What {
    /// A segment, or the last one of a timeline; whether it stands under its name.
    Segment { name: SegmentName, whole: bool },
    /// A part of an open one, and its key in each lineage.
    Part { segment: SegmentName, keys: Vec<ObjectKey> },
    /// Bytes of a segment that are in the spool.
    Spooled { segment: SegmentName },
}

/// What is stored of a segment before it is stored whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// Nothing, as far as is known.
    Nothing,
    /// Parts, be it all of it or its beginning.
    Parts,
}

/// What is being stored, side by side. No segment is stored while one before it is stored in parts only: where
/// everything else is lost, WAL that ends in parts can be recovered only while nothing later is stored.
/// A store that fails for a time is asked again for as long as it takes:
/// until then nothing of this counts as durable, and the server keeps it.
pub(super) struct Uploads {
    lineages: Arc<[LineageRepository]>,
    progress: Progress,
    waiting: Waiting,
    held: Arc<Held>,
    spares: Arc<Spares>,
    tasks: JoinSet<Result<Stored>>,
    parts: usize,
    /// Of each part, and of each segment that has parts, whether it is stored, in their order.
    in_parts: Vec<watch::Receiver<bool>>,
}

impl Uploads {
    pub(super) fn new(lineages: Arc<[LineageRepository]>, progress: Progress) -> Self {
        Self {
            lineages,
            progress,
            waiting: Waiting::new(),
            held: Arc::default(),
            spares: Arc::default(),
            tasks: JoinSet::new(),
            parts: 0,
            in_parts: Vec::new(),
        }
    }

    /// Starts a segment.
    pub(super) fn open(&self, name: SegmentName, size: SegmentSize, options: &PushOptions) -> OpenSegment {
        OpenSegment::start(name, size, options, &self.waiting, &self.held, &self.spares)
    }

    /// Whether another segment may be started: no more than `uploads_max` are on their way, and there is memory for
    /// one that cannot be compressed.
    pub(super) fn have_room(&self, uploads_max: usize, size: SegmentSize) -> bool {
        let held = self.held.bytes.load(Ordering::Relaxed);
        let next = encoded_in_memory_max(size.bytes());
        self.segments() < uploads_max && (held == 0 || held + next <= ENCODED_BYTES_MAX)
    }

    /// Waits until less memory is held than before.
    pub(super) fn less_held(&self) -> impl Future<Output = ()> + Send + 'static {
        let held = Arc::clone(&self.held);
        async move { held.less.notified().await }
    }

    /// Whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Returns how many segments are on their way.
    pub(super) fn segments(&self) -> usize {
        self.tasks.len().saturating_sub(self.parts)
    }

    /// Returns how much is on its way.
    pub(super) fn under_way(&self) -> OnTheWay {
        OnTheWay { parts: self.parts, segments: self.segments() }
    }

    /// Stores a whole segment as soon as it is encoded, and those before it are more than a beginning.
    pub(super) fn segment(
        &mut self,
        name: SegmentName,
        size: SegmentSize,
        encoding: Encoding,
        before: Before,
    ) {
        self.store(name, encoding, name.end(size), size, before, |file| file);
    }

    /// Returns what is to be stored before anything that follows.
    fn earlier(&mut self) -> Vec<watch::Receiver<bool>> {
        self.in_parts.retain(|stored| !*stored.borrow());
        self.in_parts.clone()
    }

    /// Stores a whole segment that is encoded already.
    pub(super) fn encoded_segment(&mut self, name: SegmentName, size: SegmentSize, file: EncodedFile) {
        let share = Share::new(&self.held, file.bytes_in_memory());
        let encoding = Encoding { file: tokio::spawn(async { Ok(file) }), share };
        self.segment(name, size, encoding, Before::Parts);
    }

    /// Stores the last segment of a timeline that ends at `end`, as a `.partial` file.
    pub(super) fn last_segment(
        &mut self,
        name: SegmentName,
        end: Lsn,
        size: SegmentSize,
        encoding: Encoding,
    ) {
        self.store(name, encoding, end, size, Before::Parts, EncodedFile::into_partial);
    }

    fn store(
        &mut self,
        name: SegmentName,
        encoding: Encoding,
        end: Lsn,
        size: SegmentSize,
        before: Before,
        finish: fn(EncodedFile) -> EncodedFile,
    ) {
        let (lineages, progress) = (Arc::clone(&self.lineages), Arc::clone(&self.progress));
        let earlier = self.earlier();
        let (stored, is_stored) = watch::channel(false);
        if before == Before::Parts {
            self.in_parts.push(is_stored);
        }
        let spares = Arc::clone(&self.spares);
        self.tasks.spawn(async move {
            let Encoding { file, mut share } = encoding;
            let file = file
                .await
                .map_err(|error| Error::local_io(format!("encoding was broken off: {error}")))??;
            share.shrink_to(file.bytes_in_memory());
            let file = finish(file);
            for mut earlier in earlier {
                if earlier.wait_for(|stored| *stored).await.is_err() {
                    // It failed for good, and its own task says so.
                    std::future::pending::<()>().await;
                }
            }
            let report = push_patiently(&lineages, &file, &progress).await?;
            let whole = report.whole && file.name() == WalFileName::Segment(name);
            let what = What::Segment { name, whole };
            stored.send_replace(true);
            spares.keep(file);
            drop(share);
            Ok(Stored { start: name.start(size), end, stored_bytes: report.stored_bytes, what })
        });
    }

    /// Stores a part of an open segment.
    pub(super) fn part(&mut self, part: Part, compression: Compression) {
        let (lineages, progress) = (Arc::clone(&self.lineages), Arc::clone(&self.progress));
        self.parts += 1;
        let (stored, is_stored) = watch::channel(false);
        self.in_parts.retain(|stored| !*stored.borrow());
        self.in_parts.push(is_stored);
        self.tasks.spawn(async move {
            let keys = put_patiently(&lineages, &part, compression, &progress).await?;
            stored.send_replace(true);
            let (start, end) = (part.start, Lsn(part.start.0 + part.bytes.len() as u64));
            Ok(Stored { start, end, stored_bytes: 0, what: What::Part { segment: part.segment, keys } })
        });
    }

    /// Writes a part of a segment into the spool, on which alone the server's word depends then.
    pub(super) fn spool(&mut self, part: Part, compression: Compression, spool: &Arc<Spool>) {
        let (spool, progress) = (Arc::clone(spool), Arc::clone(&self.progress));
        self.parts += 1;
        self.tasks.spawn(async move {
            let (start, end) = (part.start, Lsn(part.start.0 + part.bytes.len() as u64));
            let segment = part.segment;
            append_patiently(&spool, part, compression, &progress).await?;
            Ok(Stored { start, end, stored_bytes: 0, what: What::Spooled { segment } })
        });
    }

    /// Removes parts of segments that are stored whole, in the background.
    pub(super) fn tidy(&self, parts: Vec<Vec<ObjectKey>>) {
        tidy(&self.lineages, parts);
    }

    /// Returns the next file that is durable; waits for ever when there is none on its way.
    ///
    /// # Errors
    /// What no repetition can mend: a conflict, a refusal, WAL that is not what it should be.
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Stored> {
        let stored = match self.tasks.join_next().await {
            None => std::future::pending().await,
            Some(Ok(stored)) => stored?,
            Some(Err(error)) => return Err(Error::local_io(format!("an upload was broken off: {error}"))),
        };
        if self.tasks.is_empty() {
            self.spares.clear();
        }
        if matches!(stored.what, What::Part { .. } | What::Spooled { .. }) {
            self.parts -= 1;
        }
        Ok(stored)
    }

    /// Gives up everything that is on its way.
    pub(super) async fn abort(&mut self) {
        self.tasks.shutdown().await;
        self.parts = 0;
        self.in_parts.clear();
    }
}

/// Removes parts of segments that are stored whole, in the background: for each part its keys in the lineages.
pub(super) fn tidy(lineages: &Arc<[LineageRepository]>, parts: Vec<Vec<ObjectKey>>) {
    let lineages = Arc::clone(lineages);
    tokio::spawn(async move {
        for (number, lineage) in lineages.iter().enumerate() {
            let keys: Vec<_> = parts.iter().filter_map(|keys| keys.get(number).cloned()).collect();
            lineage.tidy_tail(&keys).await;
        }
    });
}

/// Writes a part into the spool, however long its disk takes to have room or to work again.
async fn append_patiently(
    spool: &Arc<Spool>,
    part: Part,
    compression: Compression,
    progress: &Progress,
) -> Result<()> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let Part { segment, start, bytes } = part;
    loop {
        let (at, bytes) = (Arc::clone(spool), bytes.clone());
        match blocking(move || at.append(segment, start, bytes, compression)).await {
            Err(error @ Error::LocalIo(_)) => pause_for(&error, &mut backoff, progress).await,
            appended => return appended,
        }
    }
}

/// Stores a file in every lineage, however long the stores take to come back.
pub(super) async fn push_patiently(
    lineages: &[LineageRepository],
    file: &EncodedFile,
    progress: &Progress,
) -> Result<PushReport> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut report = loop {
        let pushed = push_to_lineages(lineages, file).await;
        if let Some(report) = done_or_pause(pushed, &mut backoff, progress).await? {
            break report;
        }
    };
    report.warnings.drain(..).for_each(|warning| progress(ReceiveEvent::Warning(warning)));
    Ok(report)
}

/// Stores a part in every lineage, however long the stores take to come back; returns its key in each.
pub(super) async fn put_patiently(
    lineages: &[LineageRepository],
    part: &Part,
    compression: Compression,
    progress: &Progress,
) -> Result<Vec<ObjectKey>> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let puts = lineages.iter().map(|lineage| {
            lineage.put_tail(part.segment.timeline, part.start, part.bytes.clone(), compression)
        });
        let put = futures_util::future::join_all(puts).await.into_iter().collect();
        if let Some(keys) = done_or_pause(put, &mut backoff, progress).await? {
            return Ok(keys);
        }
    }
}

/// Returns what succeeded; `None`, after a pause, for a failure that may pass.
async fn done_or_pause<T>(
    outcome: Result<T>,
    backoff: &mut Backoff,
    progress: &Progress,
) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.is_transient() => {
            pause_for(&error, backoff, progress).await;
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

pub(super) async fn pause_for(error: &Error, backoff: &mut Backoff, progress: &Progress) {
    let pause = backoff.next();
    progress(ReceiveEvent::StoreFails { error: error.to_string(), retry_in: pause });
    tokio::time::sleep(pause).await;
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use chrono::Utc;

    use super::*;
    use crate::repository::Repository;
    use crate::storage::faulty::{Call, Fault, FaultyStorage};
    use crate::storage::list_all;
    use crate::storage::memory::MemoryStorage;
    use crate::wal::testing::WalBuilder;

    const SIZE: SegmentSize = SegmentSize::MIN;

    /// Stores three segments at once, the first of which has parts or not, on a store that refuses that one for as
    /// long as `held` says; returns what is stored of the others meanwhile, and in the end.
    async fn stored_behind_a_held_segment(before: Before) -> (usize, usize) {
        let storage = FaultyStorage::new(Arc::new(MemoryStorage::new()));
        let repository = Repository::create(Arc::new(storage.clone()), Utc::now()).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), Utc::now()).await.unwrap();
        let lineage = cluster.register_lineage(7, SIZE, 17, Utc::now()).await.unwrap();
        let mut wal = WalBuilder::new(17, SIZE, 7);
        for xid in 1..4 {
            wal.commit(xid, 1_000_000);
            wal.switch();
        }
        let segments = wal.segments();
        let (held, held_name) = (Arc::new(AtomicBool::new(true)), segments[0].0.to_string());
        let holds = Arc::clone(&held);
        storage.set(move |call, key| {
            let refuse = call == Call::Put && key.contains(&held_name) && holds.load(Ordering::Relaxed);
            refuse.then_some(Fault::Unavailable)
        });
        let mut uploads = Uploads::new(vec![lineage].into(), Arc::new(|_| {}));
        let options =
            PushOptions { compression: Compression::Lz4, lineage: None, spool_dir: std::env::temp_dir() };
        for (number, (name, bytes)) in segments.iter().take(3).enumerate() {
            let file =
                encode_stream(WalFileName::Segment(*name), &mut &**bytes, SIZE.bytes(), SIZE, &options)
                    .unwrap();
            let before = if number == 0 { before } else { Before::Nothing };
            let share = Share::new(&uploads.held, file.bytes_in_memory());
            let encoding = Encoding { file: tokio::spawn(async { Ok(file) }), share };
            uploads.segment(*name, SIZE, encoding, before);
        }
        // Long enough for the others, were they not kept back.
        let meanwhile = tokio::time::timeout(Duration::from_millis(300), async {
            for _ in 0..2 {
                uploads.next().await.unwrap();
            }
        });
        let _ = meanwhile.await;
        let count = async || list_all(&storage, "main/0001/wal/", 10).await.unwrap().len();
        let meanwhile = count().await;
        held.store(false, Ordering::Relaxed);
        while !uploads.is_empty() {
            uploads.next().await.unwrap();
        }
        (meanwhile, count().await)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_stored_behind_a_segment_that_is_there_in_parts_only() {
        assert_eq!(stored_behind_a_held_segment(Before::Parts).await, (0, 3));
        assert_eq!(
            stored_behind_a_held_segment(Before::Nothing).await,
            (2, 3),
            "others are stored side by side"
        );
    }

    #[tokio::test]
    async fn memory_is_bounded_by_what_segments_take_and_not_by_their_number() {
        let uploads = Uploads::new(Arc::from([]), Arc::new(|_| ()));
        let size = SegmentSize::DEFAULT;
        let most = encoded_in_memory_max(size.bytes());
        let mut shares = Vec::new();
        while uploads.have_room(64, size) {
            shares.push(Share::new(&uploads.held, most));
        }
        assert_eq!(shares.len(), 4);
        assert!(uploads.held.bytes.load(Ordering::Relaxed) <= ENCODED_BYTES_MAX);
        let large = SegmentSize::new(64 << 20).unwrap();
        assert!(uploads.have_room(64, large), "it is spooled to a file");
        // One turns out to be small: whoever waits for room hears of it, also when that was before.
        shares[0].shrink_to(1 << 20);
        uploads.less_held().await;
        assert!(!uploads.have_room(64, size));
        shares[1].shrink_to(1 << 20);
        assert!(uploads.have_room(64, size));
        assert!(!uploads.have_room(0, size));
        drop(shares);
        assert_eq!(uploads.held.bytes.load(Ordering::Relaxed), 0);
        // Whatever it takes, one is always let in.
        let in_memory = SegmentSize::new(32 << 20).unwrap();
        let _only = Share::new(&uploads.held, encoded_in_memory_max(in_memory.bytes()));
        assert!(uploads.have_room(64, in_memory));
    }
}
