//! From the spool into the repositories, in WAL order: whole segments, parts of the open one, the last one of a
//! timeline.
//!
//! It goes on for as long as the stores take to come back; a file leaves the spool when every repository has all of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::segments::{FIRST_PAUSE, LONGEST_PAUSE, pause_for, push_patiently, put_patiently, tidy};
use super::{Backoff, Progress};
use crate::archive::push::{EncodedFile, PushOptions, PushReport, encode_stream};
use crate::codec::TailPart;
use crate::error::{Error, Result};
use crate::feed::Part;
use crate::pg::{Lsn, SegmentName, TimelineId, WalFileName};
use crate::repository::LineageRepository;
use crate::spool::{Held, Spool};
use crate::storage::{ObjectKey, blocking};

/// How often is looked whether a whole segment has come.
const LOOK: Duration = Duration::from_millis(250);

/// What was done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shipped {
    /// Segments stored.
    pub(super) segments: u64,
    /// Parts stored.
    pub(super) parts: u64,
    /// The length of the segments as stored.
    pub(super) stored_bytes: u64,
    /// What was stored last ends here; all of its timeline before is stored too.
    pub(super) to: Lsn,
    /// The timeline of that.
    pub(super) timeline: Option<TimelineId>,
}

/// What is asked of the shipper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// To go on.
    Following,
    /// To store all that is there, and to end.
    Everything,
}

/// The shipper at work; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Shipping {
    wanted: watch::Sender<Wanted>,
    shipped: watch::Receiver<Shipped>,
    work: JoinHandle<Result<()>>,
}

impl Shipping {
    /// Starts to ship. Parts of the open segment are stored when they are as old as `interval`; `None`: never.
    pub(super) fn start(
        spool: Arc<Spool>,
        lineages: Arc<[LineageRepository]>,
        push: PushOptions,
        interval: Option<Duration>,
        progress: Progress,
    ) -> Self {
        let (wanted, wants) = watch::channel(Wanted::Following);
        let (tell, shipped) = watch::channel(Shipped::default());
        let mut shipper = Shipper { spool, lineages, push, interval, progress, tell, open: BTreeMap::new() };
        Self { wanted, shipped, work: tokio::spawn(async move { shipper.run(wants).await }) }
    }

    /// Returns what was done so far.
    pub(super) fn so_far(&self) -> Shipped {
        *self.shipped.borrow()
    }

    /// Waits until more was done.
    ///
    /// # Errors
    /// Why nothing more will be done: what no repetition can mend.
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn more(&mut self) -> Result<()> {
        if self.shipped.changed().await.is_ok() {
            return Ok(());
        }
        ended((&mut self.work).await)
    }

    /// Ships everything that is there, the open segment's bytes too.
    ///
    /// # Errors
    /// As [`Shipping::more`].
    /// # Cancel safety
    /// Cancel safe: it goes on in the background until this is dropped.
    pub(super) async fn everything(&mut self) -> Result<()> {
        self.wanted.send_replace(Wanted::Everything);
        ended((&mut self.work).await)
    }
}

impl Drop for Shipping {
    fn drop(&mut self) {
        self.work.abort();
    }
}

fn ended(outcome: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    outcome.map_err(|error| Error::local_io(format!("storing from the spool was broken off: {error}")))?
}

/// What was shipped of a segment that is not whole yet.
#[derive(Default)]
struct Open {
    /// Before this offset every repository has it.
    to: u64,
    /// The keys of its parts in each repository.
    parts: Vec<Vec<ObjectKey>>,
}

struct Shipper {
    spool: Arc<Spool>,
    lineages: Arc<[LineageRepository]>,
    push: PushOptions,
    interval: Option<Duration>,
    progress: Progress,
    tell: watch::Sender<Shipped>,
    /// There is one, and after a failover in a store's outage more.
    open: BTreeMap<SegmentName, Open>,
}

impl Shipper {
    async fn run(&mut self, mut wants: watch::Receiver<Wanted>) -> Result<()> {
        let mut parts_went = Instant::now();
        loop {
            let all = *wants.borrow_and_update() == Wanted::Everything;
            let due = self.interval.is_some_and(|interval| parts_went.elapsed() >= interval);
            if !self.once(due || all, all).await? {
                continue;
            }
            if all {
                return Ok(());
            }
            if due {
                parts_went = Instant::now();
            }
            let look = self
                .interval
                .map_or(LOOK, |interval| interval.saturating_sub(parts_went.elapsed()).min(LOOK));
            tokio::select! {
                () = tokio::time::sleep(look) => {}
                changed = wants.changed() => if changed.is_err() { return Ok(()) },
            }
        }
    }

    /// Ships what is there, oldest first, of open segments only where `parts` are due; returns whether that is all for
    /// now.
    async fn once(&mut self, parts: bool, all: bool) -> Result<bool> {
        for held in self.spool.segments() {
            if held.is_whole(self.spool.segment_size()) {
                self.ship_whole(held).await?;
                // Others may have come meanwhile, and this one is gone.
                return Ok(false);
            }
            if parts || held.timeline_end.is_some() {
                self.ship_parts(held).await?;
            }
            if let Some(end) = held.timeline_end {
                self.ship_last(held, end).await?;
                return Ok(false);
            }
            if all {
                self.forget(held).await?;
            }
        }
        Ok(true)
    }

    async fn ship_whole(&mut self, held: Held) -> Result<()> {
        let file = self.encode(held.segment).await?;
        let report = push_patiently(&self.lineages, &file, &self.progress).await?;
        // Under another name it would not be served: its parts are then.
        if !report.whole {
            self.ship_parts(held).await?;
        }
        let parts = self.open.remove(&held.segment).map(|open| open.parts);
        if let Some(parts) = parts.filter(|_| report.whole) {
            tidy(&self.lineages, parts);
        }
        self.shipped(held, &report, held.end).await
    }

    /// Stores the last segment of a timeline. Its parts stay: they are what is served of it, and hold what a server
    /// that died had written behind the end.
    async fn ship_last(&mut self, held: Held, end: u64) -> Result<()> {
        let file = self.encode(held.segment).await?.into_partial();
        let report = push_patiently(&self.lineages, &file, &self.progress).await?;
        self.open.remove(&held.segment);
        self.shipped(held, &report, end).await
    }

    async fn shipped(&self, held: Held, report: &PushReport, end: u64) -> Result<()> {
        self.remove(held.segment).await?;
        self.tell.send_modify(|shipped| {
            shipped.segments += 1;
            shipped.stored_bytes += report.stored_bytes;
            shipped.to = Lsn(held.segment.start(self.spool.segment_size()).0 + end);
            shipped.timeline = Some(held.segment.timeline);
        });
        Ok(())
    }

    /// Encodes a segment; waits where the folder for temporary files has no room for the body of a large one.
    async fn encode(&self, segment: SegmentName) -> Result<EncodedFile> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            let (spool, push) = (Arc::clone(&self.spool), self.push.clone());
            let encoded = blocking(move || {
                let size = spool.segment_size();
                let mut reader = spool.reader(segment)?;
                encode_stream(WalFileName::Segment(segment), &mut reader, size.bytes(), size, &push)
            });
            match encoded.await {
                Err(error @ Error::LocalIo(_)) => {
                    let spool = Arc::clone(&self.spool);
                    blocking(move || check(&spool, segment)).await?;
                    pause_for(&error, &mut backoff, &self.progress).await;
                }
                encoded => return encoded,
            }
        }
    }

    /// Stores what is held of a segment behind what is stored of it.
    async fn ship_parts(&mut self, held: Held) -> Result<()> {
        let segment = held.segment;
        // What an earlier process stored of it is stored again: nobody has looked whether that is sound.
        let mut open = self.open.remove(&segment).unwrap_or_default();
        loop {
            let from = open.to;
            if from >= held.end {
                self.open.insert(segment, open);
                return Ok(());
            }
            let spool = Arc::clone(&self.spool);
            let bytes = blocking(move || read(&spool, segment, from, held.end)).await?;
            let start = Lsn(segment.start(self.spool.segment_size()).0 + from);
            let end = from + bytes.len() as u64;
            let part = Part { segment, start, bytes };
            let keys = put_patiently(&self.lineages, &part, self.push.compression, &self.progress).await?;
            open.to = end;
            open.parts.push(keys);
            self.tell.send_modify(|shipped| {
                shipped.parts += 1;
                shipped.to = Lsn(start.0 + end - from);
                shipped.timeline = Some(segment.timeline);
            });
        }
    }

    /// Lets go of a segment that is not whole: all of it is stored.
    async fn forget(&mut self, held: Held) -> Result<()> {
        if self.spool.segment(held.segment) == Some(held) {
            self.remove(held.segment).await?;
            self.open.remove(&held.segment);
        }
        Ok(())
    }

    async fn remove(&self, segment: SegmentName) -> Result<()> {
        let spool = Arc::clone(&self.spool);
        blocking(move || spool.remove(segment)).await
    }
}

/// Fails where a segment that cannot be read is damaged, and waiting would not help.
fn check(spool: &Spool, segment: SegmentName) -> Result<()> {
    let Some(mut parts) = spool.parts(segment)? else { return Ok(()) };
    loop {
        match parts.next_part() {
            Ok(Some(_)) => {}
            Err(damage @ Error::Corrupt(_)) => return Err(damage),
            Ok(None) | Err(_) => return Ok(()),
        }
    }
}

/// Returns bytes of a segment from `from` on: at most as many as one part may have, and none behind `until`.
fn read(spool: &Spool, segment: SegmentName, from: u64, until: u64) -> Result<Vec<u8>> {
    let less = || Error::corrupt(format!("the spool holds less of {segment} than it should"));
    let mut parts = spool.parts(segment)?.ok_or_else(less)?;
    let mut bytes = Vec::new();
    let mut at = 0;
    let until = until.min(from + TailPart::BYTES_MAX as u64);
    while at < until
        && let Some(part) = parts.next_part()?
    {
        let end = at + part.bytes.len() as u64;
        let cut = |offset: u64| usize::try_from(offset.clamp(at, end) - at).unwrap_or(usize::MAX);
        bytes.extend_from_slice(&part.bytes[cut(from)..cut(until)]);
        at = end;
    }
    if bytes.is_empty() {
        return Err(less());
    }
    Ok(bytes)
}
