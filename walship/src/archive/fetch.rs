//! Fetch: one WAL file from the repositories to where the server wants it; or the proven statement
//! that it is not there; or an error. The three are never mixed up.
//!
//! *Absent* needs all of: the store says exactly that this key is not there; after that the lineage
//! marker is read through the same root and is the same; nothing later is stored on that timeline, and the
//! ledger knows of no WAL that is missing there or behind (a hole is an error, not an end).

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::codec::ObjectHead;
use crate::durable::TempFile;
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, TimelineHistory, TimelineId, WalFileName};
use crate::repository::{ClusterRepository, Damage, LineageRepository, ListedGap};
use crate::wal::page::PageHeader;

use super::DataDirectory;
use super::asked::{Answer, Asked, Order, Share, forks_inside, share_of};
use super::tail::Tail;

/// The pause between two attempts.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How a file is fetched.
#[derive(Debug, Clone, Default)]
pub struct FetchOptions {
    /// The lineage; `None`: that of the data directory that the file is for, else the newest.
    pub lineage: Option<u32>,
    /// How long to try again after errors that may pass.
    pub retry: Duration,
    /// Whether a damaged part of the segment that the archive ends in ends it, instead of being an error: for a
    /// restore that was planned so.
    pub up_to_damage: bool,
    /// Serve the segment in which the ledger says that WAL is lost from this position on, as far as that is stored in
    /// parts: for a restore that was planned to stop before it.
    pub up_to_gap: Option<Lsn>,
    /// Whether the asker is a standby, which may still follow a timeline that turns up now.
    pub standby: bool,
    /// Where to put the file instead of where the server wants it: for an agent, which leaves the last step to
    /// who was asked.
    pub deliver_to: Option<PathBuf>,
}

/// What became of a fetch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum FetchOutcome {
    /// The file is in place, whole and checked.
    Delivered {
        /// Its length.
        bytes: u64,
        /// Where it came from.
        from: String,
        /// Set when the file was cut at this offset: WAL behind it belongs to another timeline, and is zero.
        cut_at: Option<u64>,
    },
    /// The file is proven not to be in any repository, and nothing behind it is; or nothing of it
    /// belongs to the timeline that the server follows.
    Absent,
}

/// Why a fetch gave no answer.
#[derive(Debug)]
pub struct FetchFailure {
    /// What happened.
    pub error: Error,
    /// Whether the recovery has to stop even on a standby, because the failure could not be noted: the
    /// server would take "not now" for leave to ask an older timeline.
    pub must_stop: bool,
}

/// The cluster's part of one repository, while it is being opened.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<ClusterRepository>> + Send + 'a>>;

/// Gives the cluster's part of each repository; asked again for every attempt. They are opened side by
/// side and tried in the order in which they are open.
pub trait OpenClusters: Send + Sync {
    /// Returns one future for each repository.
    fn open(&self) -> Vec<Opening<'_>>;
}

impl OpenClusters for Vec<ClusterRepository> {
    fn open(&self) -> Vec<Opening<'_>> {
        self.iter().map(|cluster| -> Opening<'_> { Box::pin(async { Ok(cluster.clone()) }) }).collect()
    }
}

/// Fetches the WAL file `name` to `target`.
///
/// # Errors
/// Anything but a delivered file or proven absence: outages, refusals, damage, a hole
/// ([`Error::Missing`]), and an older timeline's segment while a newer one's answer is unknown.
/// # Durability
/// After [`FetchOutcome::Delivered`] the file has its name and survives a crash.
pub async fn fetch_file(
    clusters: &dyn OpenClusters,
    name: WalFileName,
    target: &Path,
    options: &FetchOptions,
) -> Result<FetchOutcome, FetchFailure> {
    let directory = DataDirectory::of_wal_file(target);
    let failed = |error: Error, must_stop| FetchFailure {
        error: error.context(format!("fetching {name}")),
        must_stop,
    };
    let mut asked = match &directory {
        Some(directory) => Some(Asked::load(directory.path()).map_err(|error| failed(error, true))?),
        None => None,
    };
    let place = options.deliver_to.as_deref().unwrap_or(target);
    let request =
        Request { name, target, place, options, directory: directory.as_ref(), asked: asked.as_ref() };
    let outcome = request.with_retries(clusters).await;
    if let Some(asked) = &mut asked {
        let answer = match &outcome {
            Ok(FetchOutcome::Delivered { .. }) => Answer::Delivered,
            Ok(FetchOutcome::Absent) => Answer::Absent,
            Err(_) => Answer::Unknown,
        };
        asked.note(name, answer).map_err(|error| failed(error, true))?;
    }
    outcome.map_err(|error| failed(error, false))
}

/// Puts the stored segment `name` at [`FetchOptions::deliver_to`], before a server that follows its timeline
/// asks for it at `target`; returns whether it is there now. Whether that server may have it
/// when it asks is for [`give_prefetched`] to say.
///
/// # Errors
/// Anything but a delivered segment and one that is not stored whole.
/// # Durability
/// As [`fetch_file`].
pub async fn prefetch_segment(
    clusters: &dyn OpenClusters,
    name: SegmentName,
    target: &Path,
    options: &FetchOptions,
) -> Result<bool> {
    let directory = DataDirectory::of_wal_file(target);
    let place = options.deliver_to.as_deref().unwrap_or(target);
    let name = WalFileName::Segment(name);
    let request = Request { name, target, place, options, directory: directory.as_ref(), asked: None };
    let mut failure = None;
    for opening in clusters.open() {
        let tried = async {
            let lineage = request.lineage_in(opening).await?;
            request.deliver_from(&lineage).await
        };
        match tried.await {
            Ok(Tried::Delivered(_)) => return Ok(true),
            Ok(Tried::NotThere | Tried::NotOnThePath) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    failure.map_or(Ok(false), Err)
}

/// Returns whether a segment that [`prefetch_segment`] got may be given to the server now that it asks: no
/// earlier answer restricts it, and no timeline that the server looked for in vain has turned up
/// since. Then it counts as delivered.
///
/// # Errors
/// As [`fetch_file`]; nothing was noted then.
pub async fn give_prefetched(
    clusters: &dyn OpenClusters,
    name: SegmentName,
    target: &Path,
    options: &FetchOptions,
) -> Result<bool> {
    let Some(directory) = DataDirectory::of_wal_file(target) else { return Ok(false) };
    let mut asked = Asked::load(directory.path())?;
    if asked.order(WalFileName::Segment(name)) != Order::AsStored {
        return Ok(false);
    }
    if options.standby && asked.newest_timeline_sought(name).is_some() {
        let request = Request {
            name: WalFileName::Segment(name),
            target,
            place: target,
            options,
            directory: Some(&directory),
            asked: Some(&asked),
        };
        for opening in clusters.open() {
            let lineage = request.lineage_in(opening).await?;
            request.check_no_new_fork(&lineage).await?;
        }
    }
    asked.note(WalFileName::Segment(name), Answer::Delivered)?;
    Ok(true)
}

/// What one repository has to say.
enum Tried {
    Delivered(FetchOutcome),
    NotThere,
    /// Nothing of the segment belongs to the timeline that the server follows.
    NotOnThePath,
}

struct Request<'a> {
    name: WalFileName,
    /// Where the server wants the file.
    target: &'a Path,
    /// Where it is put.
    place: &'a Path,
    options: &'a FetchOptions,
    directory: Option<&'a DataDirectory>,
    asked: Option<&'a Asked>,
}

impl Request<'_> {
    async fn with_retries(&self, clusters: &dyn OpenClusters) -> Result<FetchOutcome> {
        if let Some(Order::Unknown { because_of }) = self.asked.map(|asked| asked.order(self.name)) {
            return Err(Error::unavailable(format!(
                "{because_of}, asked for before, could not be read: whether the server belongs on this timeline \
                 is unknown"
            ))
            .with_safe("no server was led past a fork")
            .with_next("See the error before this one; the server will ask again."));
        }
        let started = Instant::now();
        loop {
            let error = match self.attempt(clusters).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => error,
            };
            // What makes no sense now makes none later.
            let lasting = matches!(error, Error::Invalid(_) | Error::Mismatch(_));
            if lasting || started.elapsed() + RETRY_PAUSE > self.options.retry {
                return Err(error);
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn lineage_in(&self, opening: Opening<'_>) -> Result<LineageRepository> {
        super::place::lineage(&opening.await?, self.directory, self.options.lineage).await
    }

    async fn attempt(&self, clusters: &dyn OpenClusters) -> Result<FetchOutcome> {
        let mut failure = None;
        let mut lineages = Vec::new();
        let open = clusters.open().into_iter().map(|opening| self.lineage_in(opening));
        // A repository that keeps everybody waiting does not keep the others from delivering.
        let mut open: FuturesUnordered<_> = open.collect();
        while let Some(opened) = open.next().await {
            let tried = match opened {
                Ok(lineage) => {
                    let tried = self.deliver_from(&lineage).await;
                    lineages.push(lineage);
                    tried
                }
                Err(error) => Err(error),
            };
            match tried {
                Ok(Tried::Delivered(outcome)) => return Ok(outcome),
                Ok(Tried::NotOnThePath) => return Ok(FetchOutcome::Absent),
                Ok(Tried::NotThere) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        // One repository that cannot say is enough: it may be the one that has it.
        if let Some(error) = failure {
            return Err(error);
        }
        if lineages.is_empty() {
            return Err(Error::invalid("no repository is configured"));
        }
        let tail = match self.name {
            WalFileName::Segment(segment) => {
                let damage = if self.options.up_to_damage { Damage::EndsIt } else { Damage::IsAnError };
                let tail = super::tail::longest(segment, &lineages, self.place, damage).await;
                if !matches!(&tail, Ok(Some(tail)) if tail.is_whole())
                    && let Some(outcome) = self.whole_meanwhile(&lineages).await?
                {
                    return Ok(outcome);
                }
                tail?
            }
            _ => None,
        };
        let mut lost_from = None;
        for lineage in &lineages {
            // All parts of a segment are as good as the segment, whatever is stored behind it.
            let whole = tail.as_ref().is_some_and(Tail::is_whole) && self.gaps(lineage).await?.is_empty();
            if whole {
                continue;
            }
            match self.planned_end(lineage).await? {
                Some(offset) if tail.is_some() => {
                    lineage.confirm_marker().await?;
                    lost_from = Some(offset);
                }
                _ => self.check_absence(lineage).await?,
            }
        }
        match tail {
            None => Ok(FetchOutcome::Absent),
            Some(tail) => self.deliver_tail(tail, lost_from).await,
        }
    }

    /// Returns the offset up to where parts of this segment are served although WAL is lost behind them: the plan of
    /// the restore said so, and the ledger says that nothing before is missing.
    ///
    /// What follows reads as the end of WAL. A recovery with a target stops before, or PostgreSQL ends it as failed;
    /// one without a target would promote there, and is refused, as is a standby, which would wait there for ever.
    async fn planned_end(&self, lineage: &LineageRepository) -> Result<Option<u64>> {
        let WalFileName::Segment(segment) = self.name else { return Ok(None) };
        let Some(planned) = self.options.up_to_gap.filter(|_| !self.options.standby) else { return Ok(None) };
        let size = lineage.lineage().segment_size;
        if planned <= segment.start(size)
            || SegmentName::containing(segment.timeline, planned, size) != segment
        {
            return Ok(None);
        }
        let gaps = self.gaps(lineage).await?;
        if gaps.is_empty() || gaps.iter().any(|gap| gap.start_lsn() < planned) {
            return Ok(None);
        }
        match self.directory {
            Some(directory) if !directory.has_recovery_target()? => Err(Error::invalid(format!(
                "WAL of {segment} is lost from {planned} on, and this recovery has no target before that: \
                 postgresql.auto.conf sets none"
            ))
            .with_safe("recovery was not ended early; nothing was promoted")
            .with_next("Restore anew with a target: `pitr info` shows up to where one can be reached.")),
            _ => Ok(Some(size.offset_of(planned))),
        }
    }

    /// Delivers the whole segment if it was stored since it was first asked for: its parts are removed then, and
    /// what was found of them is no end of the archive.
    async fn whole_meanwhile(&self, lineages: &[LineageRepository]) -> Result<Option<FetchOutcome>> {
        for lineage in lineages {
            if let Tried::Delivered(outcome) = self.deliver_from(lineage).await? {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// Puts an assembled segment in place; behind its end it reads as zeros, which PostgreSQL takes for the
    /// end of WAL.
    async fn deliver_tail(&self, tail: Tail<'_>, lost_from: Option<u64>) -> Result<FetchOutcome> {
        let Tail { temp, end, lineage } = tail;
        let end = lost_from.map_or(end, |lost_from| end.min(lost_from));
        let size = lineage.lineage().segment_size;
        self.check_no_new_fork(lineage).await?;
        check_first_page(self.name, temp.file(), lineage)
            .map_err(|error| error.context(format!("the parts in {}", lineage.location())))?;
        let cut_at = match self.share(lineage).await? {
            Share::First(offset) => Some(offset),
            Share::All | Share::Nothing => None,
        };
        let failed = |error| Error::from_io("ending the segment", error);
        temp.file().set_len(cut_at.map_or(end, |cut_at| end.min(cut_at))).map_err(failed)?;
        temp.file().set_len(size.bytes()).map_err(failed)?;
        temp.publish()?;
        let from = format!("{} (the first {end} bytes, in parts)", lineage.location());
        Ok(FetchOutcome::Delivered { bytes: size.bytes(), from, cut_at })
    }

    async fn deliver_from(&self, lineage: &LineageRepository) -> Result<Tried> {
        let share = match self.share(lineage).await? {
            Share::Nothing => return Ok(Tried::NotOnThePath),
            share => share,
        };
        let temp = TempFile::beside(self.place)?;
        let (head, gaps) = tokio::join!(lineage.get_wal_file(self.name, temp.file()), self.gaps(lineage));
        let Some(head) = head? else { return Ok(Tried::NotThere) };
        self.check_not_missed(lineage, &head, &gaps?).await?;
        // Only now: a timeline that turned up while the segment was read has to be seen.
        self.check_no_new_fork(lineage).await?;
        let checked = check_delivery(self.name, temp.file(), &head, lineage);
        checked.map_err(|error| error.context(format!("the object in {}", lineage.location())))?;
        let cut_at = match share {
            Share::First(offset) => {
                let failed = |error| Error::from_io("cutting the segment at the fork", error);
                temp.file().set_len(offset).map_err(failed)?;
                temp.file().set_len(head.envelope.plain_bytes).map_err(failed)?;
                Some(offset)
            }
            Share::All | Share::Nothing => None,
        };
        temp.publish()?;
        let bytes = head.envelope.plain_bytes;
        Ok(Tried::Delivered(FetchOutcome::Delivered { bytes, from: lineage.location(), cut_at }))
    }

    /// Returns the gaps of the ledger that this segment lies in, open or closed.
    async fn gaps(&self, lineage: &LineageRepository) -> Result<Vec<ListedGap>> {
        let WalFileName::Segment(segment) = self.name else { return Ok(Vec::new()) };
        let mut gaps = lineage.gaps_of(segment.timeline).await?;
        gaps.retain(|gap| gap.touches(segment, lineage.lineage().segment_size));
        Ok(gaps)
    }

    /// Fails when other content than that of the stored segment is known to be missing in its place.
    async fn check_not_missed(
        &self,
        lineage: &LineageRepository,
        head: &ObjectHead,
        gaps: &[ListedGap],
    ) -> Result<()> {
        let digest = head.envelope.digest.to_string();
        match gaps.iter().find(|gap| gap.misses_other_than(&digest)) {
            Some(gap) => Err(Error::missing(format!(
                "{} is stored in {} with other content than the server's, which was {}",
                self.name,
                lineage.location(),
                lineage.read_gap(gap).await?
            ))
            .with_safe("recovery was not led through WAL of another history")
            .with_next("`pitr info` shows which moments can be reached without it.")),
            None => Ok(()),
        }
    }

    /// Returns how much of this segment may be delivered after newer timelines' ones were absent.
    async fn share(&self, lineage: &LineageRepository) -> Result<Share> {
        let (WalFileName::Segment(segment), Some(Order::UpToSwitch(followed))) =
            (self.name, self.asked.map(|asked| asked.order(self.name)))
        else {
            return Ok(Share::All);
        };
        let history = self.history_of(followed, lineage).await?.ok_or_else(|| {
            Error::missing(format!(
                "the server follows timeline {followed}, whose history file is stored nowhere: where that \
                 timeline begins is unknown"
            ))
            .with_next(format!(
                "Push {} from the pg_wal of a server that has it with `walship wal push`.",
                WalFileName::History(followed)
            ))
        })?;
        Ok(share_of(&history, segment, lineage.lineage().segment_size))
    }

    /// A standby that looked in vain for a newer timeline must hear of one that turned up since and
    /// leaves this one inside this very segment, before it replays past the fork.
    async fn check_no_new_fork(&self, lineage: &LineageRepository) -> Result<()> {
        let WalFileName::Segment(segment) = self.name else { return Ok(()) };
        let sought = self.asked.and_then(|asked| asked.newest_timeline_sought(segment));
        let Some(sought) = sought.filter(|_| self.options.standby) else { return Ok(()) };
        match lineage.history(sought).await? {
            Some(history) if forks_inside(&history, segment, lineage.lineage().segment_size) => {
                Err(Error::unavailable(format!(
                    "timeline {sought} has turned up and begins inside this segment: the server has to look for \
                     it first"
                ))
                .with_safe("the standby was not led past the fork")
                .with_next("Nothing: the standby asks for the timeline's history file in its next round."))
            }
            _ => Ok(()),
        }
    }

    /// Returns a history from the server's own pg_wal, else from the repository.
    async fn history_of(
        &self,
        timeline: TimelineId,
        lineage: &LineageRepository,
    ) -> Result<Option<TimelineHistory>> {
        let mut text = Vec::new();
        let beside = self.target.with_file_name(WalFileName::History(timeline).to_string());
        let read = File::open(beside)
            .and_then(|file| file.take(TimelineHistory::MAX_BYTES as u64 + 1).read_to_end(&mut text));
        let local =
            read.ok().and_then(|_| TimelineHistory::parse(timeline, &String::from_utf8_lossy(&text)).ok());
        match local {
            Some(history) => Ok(Some(history)),
            None => lineage.history(timeline).await,
        }
    }

    /// Succeeds when the file may be called absent from this lineage.
    async fn check_absence(&self, lineage: &LineageRepository) -> Result<()> {
        lineage.confirm_marker().await?;
        match self.name {
            WalFileName::Segment(segment) => check_no_hole(segment, lineage).await,
            // Timeline 1 has no history file.
            WalFileName::History(timeline) if timeline != TimelineId::FIRST => {
                match lineage.anything_after(self.name).await? {
                    None => Ok(()),
                    Some(later) => Err(Error::missing(format!(
                        "{} is not in {}, but {later} is: without it the server would follow an older timeline",
                        self.name,
                        lineage.location()
                    ))
                    .with_safe("recovery was not led to an older timeline")
                    .with_next(format!(
                        "Push {} from the pg_wal of a server that has it with `walship wal push`.",
                        self.name
                    ))),
                }
            }
            _ => Ok(()),
        }
    }
}

/// Fails when WAL of the segment or behind it is known: in the ledger of what is missing, stored on its own
/// timeline, or by the history of a timeline that left this one in a later segment.
async fn check_no_hole(segment: SegmentName, lineage: &LineageRepository) -> Result<()> {
    let name = WalFileName::Segment(segment);
    let size = lineage.lineage().segment_size;
    let mut gaps = lineage.gaps_of(segment.timeline).await?;
    gaps.retain(|gap| gap.end_lsn() > segment.start(size));
    let later = lineage.anything_after(name).await?;
    // Before a timeline begins, its segments belong to its parent.
    if (later.is_some() || !gaps.is_empty())
        && segment.timeline != TimelineId::FIRST
        && let Some(begin) = lineage.history(segment.timeline).await?.and_then(|history| history.begin_lsn())
        && segment.number(size) < SegmentName::containing(segment.timeline, begin, size).number(size)
    {
        return Ok(());
    }
    let own = gaps.iter().find(|gap| gap.touches(segment, size));
    let proof = match (own, later, gaps.first()) {
        (Some(gap), ..) => format!("the ledger of gaps knows of it: {}", lineage.read_gap(gap).await?),
        (None, Some(later), _) => format!("{later} is"),
        (None, None, Some(gap)) => {
            format!("the ledger of gaps knows of WAL behind it: {}", lineage.read_gap(gap).await?)
        }
        (None, None, None) => match left_behind(segment, lineage).await? {
            Some(descendant) => {
                format!("timeline {descendant} left timeline {} only behind it", segment.timeline)
            }
            None => return Ok(()),
        },
    };
    let aside = lineage.incomplete_of(segment).await?;
    let aside = match aside.first() {
        Some(incomplete) => format!(" (an incomplete file of that name was kept apart as {incomplete})"),
        None => String::new(),
    };
    Err(Error::missing(format!(
        "segment {segment} is not in {}, but {proof}: a hole, not the end of the archive{aside}",
        lineage.location()
    ))
    .with_safe("recovery was not ended early; nothing was promoted")
    .with_next(format!(
        "Look for {segment} in the pg_wal of the old primary or a standby and push it with `walship wal push`; \
         `pitr info` shows which moments can be reached without it."
    )))
}

/// Returns a timeline that left the segment's own in a later segment: the parent had WAL up to there.
async fn left_behind(segment: SegmentName, lineage: &LineageRepository) -> Result<Option<TimelineId>> {
    let size = lineage.lineage().segment_size;
    let histories = lineage.histories_above(segment.timeline).await?;
    let behind = |switch| SegmentName::containing(segment.timeline, switch, size) > segment;
    let descendant =
        histories.iter().find(|history| history.switch_lsn_of(segment.timeline).is_some_and(behind));
    Ok(descendant.map(|history| history.timeline))
}

/// Checks a decoded file once more against what it is delivered as.
fn check_delivery(
    name: WalFileName,
    file: &File,
    head: &ObjectHead,
    lineage: &LineageRepository,
) -> Result<()> {
    if !matches!(name, WalFileName::Segment(_) | WalFileName::Partial(_)) {
        return Ok(());
    }
    let ours = lineage.lineage();
    if head.envelope.plain_bytes != ours.segment_size.bytes() {
        return Err(Error::corrupt(format!(
            "{name} has {} bytes, a segment {}",
            head.envelope.plain_bytes,
            ours.segment_size.bytes()
        )));
    }
    check_first_page(name, file, lineage)
}

/// Checks that a segment begins as that segment of that lineage.
fn check_first_page(name: WalFileName, file: &File, lineage: &LineageRepository) -> Result<()> {
    let (WalFileName::Segment(segment) | WalFileName::Partial(segment)) = name else { return Ok(()) };
    let ours = lineage.lineage();
    let mut start = [0; PageHeader::LONG_LEN];
    file.read_exact_at(&mut start, 0).map_err(|error| Error::from_io("reading back a segment", error))?;
    let header = PageHeader::parse(&start).filter(PageHeader::is_plausible_first);
    let fits = header.is_some_and(|header| {
        header.address == segment.start(ours.segment_size)
            && header.long.is_some_and(|long| {
                long.system_identifier == ours.system_identifier
                    && u64::from(long.segment_size) == ours.segment_size.bytes()
            })
    });
    if !fits {
        return Err(Error::corrupt(format!("the first page of {name} is not that segment's")));
    }
    Ok(())
}
