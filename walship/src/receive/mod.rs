//! `walship receive`: a physical replication client that stores WAL as it comes.
//!
//! It connects, follows the server's timelines, hands closed segments to the same checks and the same
//! push as `archive_command`, and tells the server only what is durable in every repository. What to
//! think of the bytes is [`crate::feed`]'s part; this room waits, connects again and keeps bounds.
//! Called by the `walship` command.
//!
//! Source: `src/bin/pg_basebackup/receivelog.c`, `pg_receivewal.c`.

mod invalidated;
mod limits;
mod prepare;
mod removed;
mod segments;
mod server;
mod session;
mod ship;
mod spooled;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use crate::archive::push::PushOptions;
use crate::codec::Compression;
use crate::error::{Error, Result};
use crate::feed::{Frontier, Rules, ServerClock, Start, TailRules};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};
use crate::replication::{ConnectOptions, ServerError};
use crate::repository::{ClusterRepository, LineageRepository};
use crate::spool::SpoolFolder;
use crate::storage::ObjectKey;

use segments::{Uploads, What};
use session::Ended;
use spooled::Spooled;

pub use spooled::{Emptied, empty_spool};

/// How WAL is received.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// The replication slot; made when it is not there.
    pub slot: String,
    /// How segments are compressed.
    pub compression: Compression,
    /// Where the compressed bodies of segments above 32 MiB lie meanwhile.
    pub spool_dir: PathBuf,
    /// So many closed segments are on their way at most; then the server has to wait.
    pub uploads_max: usize,
    /// What becomes of the open segment; with a spool, of everything that is received.
    pub tail: TailRules,
    /// Where WAL is durable for the server before it is in the repositories; `None`: nowhere.
    pub spool: Option<SpoolOptions>,
    /// Receive also from a primary on a timeline that the archive knows a younger one of.
    pub accept_overtaken: bool,
    /// When to end.
    pub until: Until,
    /// How patient to be with the server.
    pub rules: Rules,
    /// How long the end may take: what is not durable then is sent again next time.
    pub drain_max: Duration,
    /// How often to report where everything is.
    pub report_interval: Duration,
}

/// A folder on this host in which WAL is durable before it is in the repositories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolOptions {
    /// The folder; its parent must exist.
    pub folder: PathBuf,
    /// So many bytes of files are taken; then the server has to wait for the repositories.
    pub bytes_max: u64,
    /// How old bytes of the open segment are when they go from the spool into the repositories; `None`: they wait
    /// for the whole segment.
    pub tail_interval: Option<Duration>,
}

/// When to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// When told to.
    Stopped,
    /// When everything before this position is durable.
    Durable(Lsn),
    /// When everything is durable that the server had flushed when it was first reached; without parts, every
    /// segment that it had closed.
    CaughtUp,
}

/// What happens meanwhile.
#[derive(Debug, Clone, PartialEq)]
pub enum ReceiveEvent {
    /// Streaming begins.
    Streaming {
        /// The server.
        host: String,
        /// The timeline.
        timeline: TimelineId,
        /// From where.
        start: Lsn,
    },
    /// The server went over to another timeline.
    Switched {
        /// The one that ended.
        from: TimelineId,
        /// The one that follows.
        to: TimelineId,
        /// Where.
        switch_lsn: Lsn,
    },
    /// The session is over; another one is tried.
    Lost {
        /// Why.
        error: String,
        /// What is still true.
        safe: String,
        /// What to do about it, if it does not pass.
        next: String,
        /// After how long.
        retry_in: Duration,
    },
    /// A store fails; the same is tried again.
    StoreFails {
        /// How.
        error: String,
        /// After how long.
        retry_in: Duration,
    },
    /// The server has removed WAL that is nowhere in the repositories; it stands in their ledger of gaps.
    WalIsLost {
        /// What is lost, what is not, and what to do: three lines.
        report: String,
    },
    /// Something to look at.
    Warning(String),
    /// Where everything is.
    Report(Report),
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether WAL is being streamed at the moment.
    pub streaming: bool,
    /// The server, when one was reached.
    pub host: Option<String>,
    /// The timeline.
    pub timeline: Option<TimelineId>,
    /// How far the server's WAL goes, as it last said.
    pub server_lsn: Lsn,
    /// How far WAL was received.
    pub received_lsn: Lsn,
    /// Before this position everything is durable, in every repository or in the spool; the server was told so.
    pub durable_lsn: Lsn,
    /// Before this position everything is in every repository.
    pub repository_lsn: Lsn,
    /// The length of what the spool holds.
    pub spool_bytes: u64,
    /// Closed segments on their way.
    pub uploads: usize,
    /// Segments stored so far.
    pub segments: u64,
    /// Parts of open segments stored so far.
    pub parts: u64,
    /// Bytes received so far.
    pub received_bytes: u64,
    /// Their length as stored.
    pub stored_bytes: u64,
    /// Sessions so far.
    pub sessions: u64,
    /// Why the last session ended.
    pub last_error: Option<String>,
}

/// Gets to hear what happens.
pub type Progress = Arc<dyn Fn(ReceiveEvent) + Send + Sync>;

/// Receives WAL into every cluster repository until it is told to stop (`stop` turns true) or as
/// [`ReceiveOptions::until`] says, and returns where everything was then.
///
/// # Errors
/// What no repetition can mend: a server of another cluster or on a path that the archive does not have, a
/// refused password, a conflict. Outages of the server and of the stores are waited for; WAL that the server has
/// removed before it was received is recorded as lost.
/// # Durability
/// Everything before [`Report::durable_lsn`] survives a crash in every repository, or where there is one in the
/// spool, and the server never hears of more.
pub async fn receive(
    clusters: &[ClusterRepository],
    server: &ConnectOptions,
    options: &ReceiveOptions,
    stop: watch::Receiver<bool>,
    progress: Progress,
) -> Result<Report> {
    let mut receiver = Receiver::new(server.clone(), options.clone(), stop, progress);
    if let (Some(spool), Some(cluster)) = (&options.spool, clusters.first()) {
        receiver.spool = Some(SpoolFolder::lock(&spool.folder, cluster.name().as_str())?);
    }
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        let sessions = receiver.report.sessions;
        let failed = match receiver.one_session(clusters).await {
            Ok(Ended::Stopped) => return receiver.finish().await,
            Ok(Ended::Stalled) => {
                receiver.wait_for_an_upload().await?;
                continue;
            }
            Err(error) => match receiver.go_on_elsewhere().await {
                Ok(true) => continue,
                Ok(false) => error,
                Err(error) => error,
            },
        };
        if !may_pass(&failed) {
            return Err(failed);
        }
        if receiver.report.sessions > sessions {
            backoff.restart();
        }
        let retry_in = backoff.next();
        receiver.report.streaming = false;
        receiver.report.last_error = Some(failed.to_string());
        (receiver.progress)(ReceiveEvent::Lost {
            error: failed.to_string(),
            safe: failed.safe().to_owned(),
            next: failed.next().to_owned(),
            retry_in,
        });
        receiver.tell();
        if receiver.pause(retry_in).await? {
            return receiver.finish().await;
        }
    }
}

/// Whether another session may do better.
fn may_pass(error: &Error) -> bool {
    // A slot is in use until the server notices that its last user is gone.
    error.is_transient() || ServerError::of(error).is_some_and(|said| said.code == "55006")
}

/// Everything that outlives a session.
struct Receiver {
    server: ConnectOptions,
    options: ReceiveOptions,
    stop: watch::Receiver<bool>,
    progress: Progress,
    started: Instant,
    /// The spool that is configured, until a server was reached.
    spool: Option<SpoolFolder>,
    /// Once a server was reached.
    archive: Option<Archive>,
    report: Report,
    until: Option<Lsn>,
    /// Set where the last session ended because the server has removed what was asked of it.
    removed: Option<removed::Removed>,
    /// Set where the last session ended because the server does not let the slot be used.
    refused: Option<invalidated::Refused>,
    clock: ServerClock,
}

/// What is known of the lineage once a server was reached.
struct Archive {
    system_identifier: u64,
    size: SegmentSize,
    lineages: Arc<[LineageRepository]>,
    push: PushOptions,
    uploads: Uploads,
    spooled: Option<Spooled>,
    frontier: Frontier,
    /// The segment to go on with; `None`: to be found out from the repositories.
    next: Option<Start>,
    /// The path of the server's timeline, once it was asked.
    path: Option<TimelineHistory>,
    /// Histories that are stored.
    histories: Vec<TimelineHistory>,
    /// The parts that this process has stored of segments that are not stored whole yet: for each part its
    /// keys in the lineages.
    parts: BTreeMap<SegmentName, Vec<Vec<ObjectKey>>>,
    /// The newest segments that are stored whole: a part of one may still come to its end.
    wholes: BTreeSet<SegmentName>,
}

/// More segments than there are on their way at once.
const WHOLES_MAX: usize = 128;

impl Archive {
    /// Returns what is durable next; `None` when the repositories have got more of the spool.
    ///
    /// # Errors
    /// As [`Uploads::next`], and why nothing more comes out of the spool.
    /// # Cancel safety
    /// Cancel safe.
    async fn next(&mut self) -> Result<Option<segments::Stored>> {
        let Some(spooled) = &mut self.spooled else { return self.uploads.next().await.map(Some) };
        tokio::select! {
            stored = self.uploads.next() => stored.map(Some),
            more = spooled.shipping.more() => more.map(|()| None),
        }
    }

    /// Removes parts that are of no more use: those of a segment that is stored whole.
    fn tidy(&mut self, what: What) {
        match what {
            What::Segment { name, whole: true } => {
                self.wholes.insert(name);
                if self.wholes.len() > WHOLES_MAX {
                    self.wholes.pop_first();
                }
                // The last segment of a timeline never becomes whole: its parts stay.
                self.parts.retain(|segment, _| segment.timeline == name.timeline);
                if let Some(parts) = self.parts.remove(&name) {
                    self.uploads.tidy(parts);
                }
            }
            What::Segment { whole: false, .. } => {}
            What::Spooled { .. } => {}
            What::Part { segment, keys } if self.wholes.contains(&segment) => self.uploads.tidy(vec![keys]),
            What::Part { segment, keys } => self.parts.entry(segment).or_default().push(keys),
        }
    }
}

impl Receiver {
    fn new(
        server: ConnectOptions,
        options: ReceiveOptions,
        stop: watch::Receiver<bool>,
        progress: Progress,
    ) -> Self {
        let report = Report {
            streaming: false,
            host: None,
            timeline: None,
            server_lsn: Lsn::INVALID,
            received_lsn: Lsn::INVALID,
            durable_lsn: Lsn::INVALID,
            repository_lsn: Lsn::INVALID,
            spool_bytes: 0,
            uploads: 0,
            segments: 0,
            parts: 0,
            received_bytes: 0,
            stored_bytes: 0,
            sessions: 0,
            last_error: None,
        };
        let started = Instant::now();
        Self {
            server,
            options,
            stop,
            progress,
            started,
            spool: None,
            archive: None,
            report,
            until: None,
            removed: None,
            refused: None,
            clock: ServerClock::default(),
        }
    }

    /// Waits until there is room for another segment.
    async fn wait_for_an_upload(&mut self) -> Result<()> {
        self.report.streaming = false;
        self.tell();
        let Some(archive) = &mut self.archive else { return Ok(()) };
        tokio::select! {
            stored = archive.next() => self.note(stored?),
            _ = stopped(&mut self.stop) => {}
        }
        Ok(())
    }

    /// Waits, while uploads go on; returns whether the time to stop has come meanwhile.
    async fn pause(&mut self, duration: Duration) -> Result<bool> {
        let end = tokio::time::Instant::now() + duration;
        loop {
            let Some(archive) = &mut self.archive else {
                tokio::select! {
                    () = tokio::time::sleep_until(end) => return Ok(false),
                    _ = stopped(&mut self.stop) => return Ok(true),
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(end) => return Ok(false),
                _ = stopped(&mut self.stop) => return Ok(true),
                stored = archive.next() => self.note(stored?),
            }
            if self.is_done() {
                return Ok(true);
            }
        }
    }

    /// Takes note of what is durable now; of nothing, where only the repositories have got more of the spool.
    fn note(&mut self, stored: Option<segments::Stored>) {
        let (Some(archive), Some(stored)) = (&mut self.archive, stored) else { return };
        archive.frontier.add(stored.start, stored.end);
        self.report.durable_lsn = archive.frontier.durable();
        self.report.stored_bytes += stored.stored_bytes;
        match stored.what {
            What::Segment { .. } => self.report.segments += 1,
            What::Part { .. } => self.report.parts += 1,
            What::Spooled { segment } if stored.end == segment.end(archive.size) => {
                archive.next = Some(Start { timeline: segment.timeline, lsn: stored.end });
            }
            What::Spooled { .. } => {}
        }
        archive.tidy(stored.what);
        self.report.uploads = archive.uploads.segments();
    }

    fn is_done(&self) -> bool {
        self.until.is_some_and(|until| self.report.durable_lsn >= until)
    }

    fn tell(&self) {
        (self.progress)(ReceiveEvent::Report(self.report()));
    }

    /// Returns where everything is, in the spool and behind it too.
    fn report(&self) -> Report {
        let report = self.report.clone();
        let Some(spooled) = self.archive.as_ref().and_then(|archive| archive.spooled.as_ref()) else {
            return Report { repository_lsn: report.durable_lsn, ..report };
        };
        let shipped = spooled.shipping.so_far();
        let held = spooled.spool.segments();
        let mut of_this = held.iter().filter(|held| Some(held.segment.timeline) == report.timeline);
        let repository_lsn = match of_this.next() {
            None => report.durable_lsn,
            Some(_) if shipped.timeline == report.timeline => shipped.to.min(report.durable_lsn),
            Some(first) => first.segment.start(spooled.spool.segment_size()).min(report.durable_lsn),
        };
        Report {
            repository_lsn,
            spool_bytes: spooled.spool.file_bytes(),
            segments: report.segments + shipped.segments,
            parts: report.parts + shipped.parts,
            stored_bytes: report.stored_bytes + shipped.stored_bytes,
            ..report
        }
    }

    /// Lets what is on its way come to its end, within bounds.
    async fn finish(mut self) -> Result<Report> {
        let deadline = tokio::time::Instant::now() + self.options.drain_max;
        while let Some(archive) = &mut self.archive
            && !archive.uploads.is_empty()
        {
            match tokio::time::timeout_at(deadline, archive.uploads.next()).await {
                Ok(Ok(stored)) => self.note(Some(stored)),
                Ok(Err(error)) => (self.progress)(ReceiveEvent::Warning(error.to_string())),
                Err(_) => {
                    archive.uploads.abort().await;
                    (self.progress)(ReceiveEvent::Warning(
                        "not everything was stored in time; the server keeps it and sends it again"
                            .to_owned(),
                    ));
                }
            }
        }
        if let Some(spooled) = self.archive.as_mut().and_then(|archive| archive.spooled.as_mut()) {
            match tokio::time::timeout_at(deadline, spooled.shipping.everything()).await {
                Ok(done) => done?,
                Err(_) => (self.progress)(ReceiveEvent::Warning(spooled.left())),
            }
        }
        self.report.streaming = false;
        self.report.uploads = 0;
        self.tell();
        Ok(self.report())
    }
}

/// Waits until it is time to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left who could say so.
        std::future::pending::<()>().await;
    }
}

/// Pauses that double, with some chance in them so that many do not come back at once.
struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause.mul_f64(rand::random_range(0.5..=1.0))
    }

    fn restart(&mut self) {
        self.next = self.first;
    }
}
