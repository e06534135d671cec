//! What an archive holds and what of it can be reached: collected from the catalog, the index, and a bounded number
//! of summaries, so that it costs about the same whatever the archive's size.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, GapRecord, Hold, Lineage, OrphanedBackup, StoredTail};
use walship::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use walship::replication::{Archiver, ServerPosition, Slot};
use walship::repository::LineageRepository;
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::rollup::{Class, Facts};
use walship::wal::summary::{SegmentSummary, StopTime};
use walship::{Error, Result};

use crate::plan::{
    Break, Chain, Evidence, Gap, WAL_LEVEL_MINIMAL, Window, WindowEnd, build_chain, chains_of, gaps_of,
    windows,
};

/// How many summaries are read to look for restore points and changes of `wal_level` that no roll-up lists.
const LOOK_AROUND_MAX: usize = 16;

/// How many summaries are read at each end of a window to look for the end of a transaction.
const LOOK_ASIDE_MAX: usize = 8;

/// How many summaries are read at once.
const READS_MAX: usize = 16;

/// What a cluster's part of a repository holds.
#[derive(Debug, Serialize)]
pub struct Info {
    /// Where it lies.
    pub repository: String,
    /// The operator's name of the cluster.
    pub cluster: String,
    /// When this was found out, by this machine's clock.
    pub asked: DateTime<Utc>,
    /// Every lineage.
    pub lineages: Vec<Lineage>,
    /// The number of the lineage that the rest is about.
    pub lineage: u32,
    /// Its timelines, in ascending order.
    pub timelines: Vec<TimelineInfo>,
    /// Complete base backups, oldest start first; in the JSON without their data objects.
    #[serde(serialize_with = "without_objects")]
    pub backups: Vec<BackupRecord>,
    /// Incremental backups without one that they build on.
    pub orphaned_backups: Vec<OrphanedBackup>,
    /// Backups that were started and not finished.
    pub unfinished_backups: Vec<UnfinishedBackup>,
    /// Holds on backups that were not released, the oldest first; also those whose time is over.
    pub holds: Vec<Hold>,
    /// `.partial` files.
    pub partial_segments: Vec<SegmentName>,
    /// Files that had a whole segment's name and were kept apart as incomplete.
    pub incomplete_segments: Vec<SegmentName>,
    /// The open gaps of the ledger.
    pub open_gaps: Vec<GapRecord>,
    /// Segments whose summary was looked for and cannot be read.
    pub unreadable_segments: Vec<SegmentName>,
    /// How the archive compares with the server; `null` when it was not asked.
    pub server: Option<ServerInfo>,
}

/// A backup that was started and not finished.
#[derive(Debug, Serialize)]
pub struct UnfinishedBackup {
    /// Its id.
    pub id: String,
    /// When it was started.
    pub started: DateTime<Utc>,
}

/// One timeline.
#[derive(Debug, Serialize)]
pub struct TimelineInfo {
    /// Its number.
    pub timeline: TimelineId,
    /// The timeline that it left; `null` for the first, or when its history file is not stored.
    pub parent: Option<TimelineId>,
    /// Where it left it.
    pub begin_lsn: Option<Lsn>,
    /// Whether its history file is stored, or it needs none.
    pub has_history: bool,
    /// How many of its segments are stored.
    pub segments: u64,
    /// The stored size of them all.
    pub stored_bytes: u64,
    /// The first stored segment.
    pub first_segment: Option<SegmentName>,
    /// The last stored segment.
    pub last_segment: Option<SegmentName>,
    /// What is stored of the open segment behind them; `null` when nothing is.
    pub tail: Option<TailInfo>,
    /// What is stored in parts of segments inside of which WAL is lost: up to there.
    pub stranded: Vec<StoredTail>,
    /// The spans in which every commit can be reached, in WAL order.
    pub windows: Vec<WindowInfo>,
    /// What is missing, from where the timeline begins.
    pub gaps: Vec<Gap>,
    /// Restore points on it, in WAL order.
    pub restore_points: Vec<RestorePoint>,
    /// How many of its segments were not looked at for restore points and changes of `wal_level`.
    pub segments_not_looked_at: u64,
}

/// What is stored of the open segment of a timeline.
#[derive(Debug, Serialize)]
pub struct TailInfo {
    /// It.
    #[serde(flatten)]
    pub tail: StoredTail,
    /// Whether a server is given it: nothing later is known on its timeline.
    pub is_end: bool,
}

/// A window and the transactions at its ends.
#[derive(Debug, Serialize)]
pub struct WindowInfo {
    /// The window.
    #[serde(flatten)]
    pub window: Window,
    /// Of the first segment in it that tells of any: the earliest end of a transaction, commit or abort.
    pub earliest_transaction: Option<TransactionTime>,
    /// Of the last segment in it that tells of any: the latest end of a transaction, commit or abort.
    pub latest_transaction: Option<TransactionTime>,
    /// Seconds from `latest_transaction` until now; not below 0.
    pub latest_age_seconds: Option<i64>,
}

/// The end of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TransactionTime {
    /// When it ended, by the server's clock.
    pub time: DateTime<Utc>,
    /// Where its record starts.
    pub lsn: Lsn,
    /// The transaction.
    pub xid: u32,
}

/// A named restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestorePoint {
    /// Its name.
    pub name: String,
    /// When it was made, by the server's clock.
    pub time: DateTime<Utc>,
    /// Where its record starts.
    pub lsn: Lsn,
}

/// How the archive compares with a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerInfo {
    /// Why nothing, or not everything, could be compared.
    pub problem: Option<String>,
    /// The timeline that the server is on.
    pub timeline: Option<TimelineId>,
    /// Whether it is a standby.
    pub in_recovery: Option<bool>,
    /// The position after the last byte of WAL that it has flushed, or as a standby received or replayed.
    pub wal_lsn: Option<Lsn>,
    /// Where the archive ends on the way to that timeline.
    pub archive_until_lsn: Option<Lsn>,
    /// How many bytes of the server's WAL the archive does not hold at its end.
    pub behind_bytes: Option<u64>,
    /// How many of its full segments.
    pub behind_segments: Option<u64>,
    /// What the server says of its archiver.
    pub archiver: Option<Archiver>,
    /// Its physical replication slots.
    pub slots: Vec<Slot>,
}

impl ServerInfo {
    /// Returns that nothing could be compared, and why.
    pub fn problem(problem: String) -> Self {
        Self {
            problem: Some(problem),
            timeline: None,
            in_recovery: None,
            wal_lsn: None,
            archive_until_lsn: None,
            behind_bytes: None,
            behind_segments: None,
            archiver: None,
            slots: Vec::new(),
        }
    }

    /// Compares the archive with a server. Another cluster is said, never compared.
    pub fn compare(catalog: &Catalog, server: &ServerPosition) -> Self {
        let ours = &catalog.lineage;
        if (server.system_identifier, server.segment_size) != (ours.system_identifier, ours.segment_size) {
            return Self::problem(format!(
                "the server is another cluster: system identifier {} with segments of {}, this lineage has {} with \
                 {}",
                server.system_identifier, server.segment_size, ours.system_identifier, ours.segment_size
            ));
        }
        let mut info = Self {
            problem: None,
            timeline: Some(server.timeline),
            in_recovery: Some(server.in_recovery),
            wal_lsn: Some(server.wal_lsn),
            archiver: Some(server.archiver.clone()),
            slots: server.slots.clone(),
            ..Self::problem(String::new())
        };
        let Some(history) = catalog.history(server.timeline) else {
            info.problem = Some(format!(
                "the server is on timeline {}, whose history file is not archived: nothing can be compared",
                server.timeline
            ));
            return info;
        };
        let Some(until) = chains_of(catalog, &history).last().map(Chain::end) else {
            info.problem = Some("nothing on the way to the server's timeline is archived".to_owned());
            return info;
        };
        let behind = server.wal_lsn.0.saturating_sub(until.0);
        info.archive_until_lsn = Some(until);
        info.behind_bytes = Some(behind);
        info.behind_segments = Some(behind / ours.segment_size.bytes());
        let newest = catalog.timelines().last().copied().filter(|newest| *newest > server.timeline);
        // A segment that was switched to its end is archived whole.
        let ahead = until.0.saturating_sub(server.wal_lsn.0) > ours.segment_size.bytes();
        info.problem = match newest {
            Some(newest) => Some(format!(
                "the server is on timeline {}, the archive knows timeline {newest}: is it the right server?",
                server.timeline
            )),
            None if ahead => Some(
                "the archive is ahead of the server: a standby that lags, or a server that was set back"
                    .to_owned(),
            ),
            None => None,
        };
        info
    }
}

/// Returns what the catalog holds and what of it can be reached. `tails` are the summaries of what the catalog knows
/// to be stored in parts.
///
/// # Errors
/// What the repository answers; damaged summaries are named in the answer.
pub async fn read_info(
    repository: &LineageRepository,
    catalog: Catalog,
    tails: Vec<SegmentSummary>,
    lineages: Vec<Lineage>,
    server: Option<ServerInfo>,
    now: DateTime<Utc>,
) -> Result<Info> {
    let mut sources = Sources {
        repository,
        catalog: &catalog,
        evidence: Evidence::of(&catalog),
        summaries: tails.into_iter().map(|summary| (summary.segment, Some(summary))).collect(),
        damaged: Vec::new(),
    };
    let (events, not_looked_at) = sources.planning_events().await?;
    let breaks = events.iter().filter_map(|(timeline, event)| {
        Some(Break { timeline: *timeline, lsn: event.lsn, ends_by: breaks_by(event)? })
    });
    let breaks: Vec<_> = breaks.collect();
    let mut timelines = Vec::new();
    for timeline in catalog.timelines() {
        let history = catalog.history(timeline);
        let begin = history.as_ref().and_then(TimelineHistory::begin_lsn);
        let mut found = Vec::new();
        for window in windows(&catalog, timeline, &breaks) {
            found.push(sources.window_info(window, now).await?);
        }
        let own = events.iter().filter(|(on, event)| *on == timeline && Some(event.lsn) >= begin);
        let restore_points = own.filter_map(|(_, event)| restore_point(event)).collect();
        let left_out = not_looked_at.get(&timeline).copied().unwrap_or(0);
        let mut info = timeline_info(&catalog, timeline, history.as_ref());
        (info.windows, info.restore_points, info.segments_not_looked_at) = (found, restore_points, left_out);
        timelines.push(info);
    }
    let holds = holds(repository).await?;
    let mut unreadable_segments = sources.damaged;
    unreadable_segments.sort_unstable();
    let unfinished = catalog.unfinished_backups.into_iter();
    Ok(Info {
        repository: repository.location(),
        cluster: catalog.cluster,
        asked: now,
        lineages,
        lineage: catalog.lineage.number,
        timelines,
        backups: catalog.backups,
        orphaned_backups: catalog.orphaned_backups,
        unfinished_backups: unfinished.map(|(id, started)| UnfinishedBackup { id, started }).collect(),
        holds,
        partial_segments: catalog.partials,
        incomplete_segments: catalog.incomplete,
        open_gaps: catalog.gaps,
        unreadable_segments,
        server,
    })
}

/// Returns the holds of every repository that can be read; what cannot be read is a note.
async fn holds(repository: &LineageRepository) -> Result<Vec<Hold>> {
    let mut all: BTreeMap<String, Hold> = BTreeMap::new();
    for one in repository.each() {
        match one.holds().await {
            Ok(holds) => all.extend(holds.into_iter().map(|hold| (hold.id.clone(), hold))),
            Err(error) => {
                repository.note(format!("which backups are held in {} is not known: {error}", one.location()))
            }
        }
    }
    Ok(all.into_values().collect())
}

fn timeline_info(catalog: &Catalog, timeline: TimelineId, history: Option<&TimelineHistory>) -> TimelineInfo {
    let size = catalog.lineage.segment_size;
    let runs = catalog.segments.runs(timeline);
    let parent = history.and_then(|history| history.ancestors.last());
    let begin = parent.map_or(Lsn(0), |entry| entry.switch_lsn);
    // Gaps before the fork are the ancestor's and shown there.
    let gaps = history.map(|history| gaps_of(catalog, history)).unwrap_or_default();
    TimelineInfo {
        timeline,
        parent: parent.map(|entry| entry.timeline),
        begin_lsn: parent.map(|entry| entry.switch_lsn),
        has_history: history.is_some(),
        segments: runs.iter().map(|run| run.last.number(size) - run.first.number(size) + 1).sum(),
        stored_bytes: runs.iter().map(|run| run.stored_bytes).sum(),
        first_segment: runs.first().map(|run| run.first),
        last_segment: runs.last().map(|run| run.last),
        tail: catalog
            .tails
            .as_ref()
            .and_then(|tails| tails.get(&timeline))
            .map(|tail| TailInfo { tail: tail.clone(), is_end: catalog.served_tail(tail.segment).is_some() }),
        stranded: catalog
            .stranded
            .values()
            .filter(|tail| tail.segment.timeline == timeline)
            .cloned()
            .collect(),
        windows: Vec::new(),
        gaps: gaps.into_iter().filter(|gap| gap.to > begin).collect(),
        restore_points: Vec::new(),
        segments_not_looked_at: 0,
    }
}

/// The data objects are many and, in a catalog that was read from the index, not known.
fn without_objects<S: serde::Serializer>(
    backups: &[BackupRecord],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let values = backups.iter().map(|backup| {
        let mut value = serde_json::to_value(backup).map_err(serde::ser::Error::custom)?;
        value.as_object_mut().map(|fields| fields.remove("objects"));
        Ok(value)
    });
    values.collect::<std::result::Result<Vec<_>, S::Error>>()?.serialize(serializer)
}

/// Returns how a record ends a window, if it does.
fn breaks_by(event: &WalEvent) -> Option<WindowEnd> {
    match &event.kind {
        EventKind::ParameterChange { settings } if settings.wal_level == WAL_LEVEL_MINIMAL => {
            Some(WindowEnd::WalLevelMinimal)
        }
        EventKind::WalBegins { .. } => Some(WindowEnd::WalReset),
        _ => None,
    }
}

fn restore_point(event: &WalEvent) -> Option<RestorePoint> {
    match &event.kind {
        EventKind::RestorePoint { name, time } => {
            Some(RestorePoint { name: name.clone(), time: *time, lsn: event.lsn })
        }
        _ => None,
    }
}

/// Where answers come from: the index as far as it was read with the catalog, and summaries.
struct Sources<'a> {
    repository: &'a LineageRepository,
    catalog: &'a Catalog,
    evidence: Evidence,
    /// What was read; `None` for what is damaged or gone.
    summaries: BTreeMap<SegmentName, Option<SegmentSummary>>,
    damaged: Vec<SegmentName>,
}

type TimelineEvents = Vec<(TimelineId, WalEvent)>;

impl Sources<'_> {
    /// Returns restore points and parameter changes in WAL order, and how many segments of each timeline were not
    /// looked at for them.
    async fn planning_events(&mut self) -> Result<(TimelineEvents, BTreeMap<TimelineId, u64>)> {
        let size = self.catalog.lineage.segment_size;
        let (mut loose, mut not_looked_at) = (Vec::new(), BTreeMap::new());
        for timeline in self.catalog.segments.timelines() {
            let unknown = not_looked_at.entry(timeline).or_insert(0_u64);
            for run in self.catalog.segments.runs(timeline) {
                let mut at = Some(run.first);
                while let Some(first) = at.filter(|first| *first <= run.last) {
                    let (behind, many) = match self.evidence.block_of(first) {
                        Some((_, block)) => {
                            let last = block.last.min(run.last);
                            let many = last.number(size) - first.number(size) + 1;
                            (last.next(size), if block.lists(Class::Planning) { 0 } else { many })
                        }
                        None => {
                            let next = self.evidence.blocks.range(first..).next().map(|(next, _)| *next);
                            let last = next
                                .and_then(|next| next.previous(size))
                                .map_or(run.last, |last| last.min(run.last));
                            loose.push((first, last));
                            (last.next(size), last.number(size) - first.number(size) + 1)
                        }
                    };
                    *unknown += many;
                    at = behind;
                }
            }
        }
        // The newest first: they are what nobody has looked at yet.
        loose.sort_by_key(|(_, last)| std::cmp::Reverse((last.start(size), last.timeline)));
        let newest = loose.iter().flat_map(|(first, last)| {
            std::iter::successors(Some(*last), |name| name.previous(size))
                .take_while(move |name| name >= first)
        });
        let newest: Vec<SegmentName> = newest.take(LOOK_AROUND_MAX).collect();
        self.read(&newest).await?;
        let mut events: TimelineEvents = Vec::new();
        for (first, block) in &self.evidence.blocks {
            events.extend(block.events.iter().map(|event| (first.timeline, event.clone())));
        }
        let tails = self.catalog.tails.iter().flat_map(BTreeMap::values);
        for tail in tails.chain(self.catalog.stranded.values()) {
            let Some(Some(summary)) = self.summaries.get(&tail.segment) else { continue };
            if self.catalog.served_tail(tail.segment).is_some() {
                events.extend(summary.events.iter().map(|event| (tail.segment.timeline, event.clone())));
            }
        }
        for name in &newest {
            let Some(Some(summary)) = self.summaries.get(name) else { continue };
            events.extend(summary.events.iter().map(|event| (name.timeline, event.clone())));
            if !summary.events_truncated {
                not_looked_at.entry(name.timeline).and_modify(|count| *count = count.saturating_sub(1));
            }
        }
        events.retain(|(timeline, event)| {
            let own =
                self.catalog.history(*timeline).is_some_and(|history| history.begin_lsn() <= Some(event.lsn));
            own && (breaks_by(event).is_some() || restore_point(event).is_some())
        });
        events.sort_by_key(|(timeline, event)| (*timeline, event.lsn));
        events.dedup_by_key(|(timeline, event)| (*timeline, event.lsn));
        Ok((events, not_looked_at))
    }

    async fn window_info(&mut self, window: Window, now: DateTime<Utc>) -> Result<WindowInfo> {
        let (mut earliest, mut latest) = (None, None);
        let history = self.catalog.history(window.timeline);
        let backup = self.catalog.backups.iter().find(|backup| backup.id == window.first_backup);
        if let (Some(history), Some(backup)) = (history, backup) {
            let chain = build_chain(self.catalog, &history, backup.start_lsn);
            latest = self.latest(&chain, &window).await?;
            earliest = self.earliest(&chain, &window).await?;
        }
        let age = latest.map(|latest| now.signed_duration_since(latest.time).num_seconds().max(0));
        Ok(WindowInfo {
            window,
            earliest_transaction: earliest,
            latest_transaction: latest,
            latest_age_seconds: age,
        })
    }

    async fn latest(&mut self, chain: &Chain, window: &Window) -> Result<Option<TransactionTime>> {
        let size = self.catalog.lineage.segment_size;
        let Some(mut at) = chain.last_before(window.until_lsn) else { return Ok(None) };
        let mut reads_left = LOOK_ASIDE_MAX;
        loop {
            let segment = chain.step(at).segment;
            let first = match self.look(segment, window, Side::Latest, &mut reads_left).await? {
                None => return Ok(None),
                Some(Told::Found(stop)) => return Ok(Some(stop)),
                Some(Told::Nothing { first, .. }) => first,
            };
            let steps = (segment.number(size) - first.number(size) + 1) as usize;
            match at.checked_sub(steps).filter(|at| chain.step(*at).to > window.from_lsn) {
                Some(before) => at = before,
                None => return Ok(None),
            }
        }
    }

    async fn earliest(&mut self, chain: &Chain, window: &Window) -> Result<Option<TransactionTime>> {
        let size = self.catalog.lineage.segment_size;
        let mut at = chain.step_of(window.from_lsn).unwrap_or(chain.len());
        let mut reads_left = LOOK_ASIDE_MAX;
        while at < chain.len() && chain.step(at).from < window.until_lsn {
            let segment = chain.step(at).segment;
            let last = match self.look(segment, window, Side::Earliest, &mut reads_left).await? {
                None => return Ok(None),
                Some(Told::Found(stop)) => return Ok(Some(stop)),
                Some(Told::Nothing { last, .. }) => last,
            };
            at += (last.number(size) - segment.number(size) + 1) as usize;
        }
        Ok(None)
    }

    /// Returns what the index or else the segment's summary tells; `None` when no more summaries may be read.
    async fn look(
        &mut self,
        segment: SegmentName,
        window: &Window,
        side: Side,
        reads_left: &mut usize,
    ) -> Result<Option<Told>> {
        if let Some(told) = self.told(segment, window, side) {
            return Ok(Some(told));
        }
        let Some(left) = reads_left.checked_sub(1) else { return Ok(None) };
        *reads_left = left;
        let summary = self.summary(segment).await?;
        let stops =
            summary.map_or([None, None], |summary| side.nearest_first(summary.min_time, summary.max_time));
        Ok(Some(Told::of_segment(stops, segment, window)))
    }

    /// Returns what the index says of a segment and its neighbours.
    fn told(&self, segment: SegmentName, window: &Window, side: Side) -> Option<Told> {
        let (first, block) = self.evidence.block_of(segment)?;
        let facts = &block.facts;
        if !tells_times(facts) {
            return None;
        }
        let stops = side.nearest_first(facts.min_time, facts.max_time);
        if block.is_segment {
            return Some(Told::of_segment(stops, segment, window));
        }
        match (stops[0], side) {
            (None, _) => Some(Told::Nothing { first, last: block.last }),
            // Of many segments the earliest time may lie anywhere.
            (Some(stop), Side::Latest) if is_inside(&stop, window) => Some(Told::Found(shown(stop))),
            _ => None,
        }
    }

    async fn summary(&mut self, name: SegmentName) -> Result<Option<&SegmentSummary>> {
        self.read(&[name]).await?;
        Ok(self.summaries.get(&name).and_then(Option::as_ref))
    }

    async fn read(&mut self, names: &[SegmentName]) -> Result<()> {
        let wanted: Vec<_> = names.iter().filter(|name| !self.summaries.contains_key(name)).collect();
        let reads =
            wanted.into_iter().map(|name| async { (*name, self.repository.segment_summary(*name).await) });
        let read: Vec<_> = futures_util::stream::iter(reads).buffered(READS_MAX).collect().await;
        for (name, summary) in read {
            let summary = match summary {
                Err(Error::Corrupt(_)) => {
                    self.damaged.push(name);
                    None
                }
                summary => summary?,
            };
            self.summaries.insert(name, summary);
        }
        Ok(())
    }
}

/// Which end of a window is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Earliest,
    Latest,
}

impl Side {
    fn nearest_first(self, min: Option<StopTime>, max: Option<StopTime>) -> [Option<StopTime>; 2] {
        match self {
            Self::Earliest => [min, max],
            Self::Latest => [max, min],
        }
    }
}

/// What is known of the ends of transactions near one end of a window.
enum Told {
    Found(TransactionTime),
    /// None lies in these segments (inclusive) and the window.
    Nothing {
        first: SegmentName,
        last: SegmentName,
    },
}

impl Told {
    fn of_segment(stops: [Option<StopTime>; 2], segment: SegmentName, window: &Window) -> Self {
        let found = stops.into_iter().flatten().find(|stop| is_inside(stop, window));
        found.map_or(Self::Nothing { first: segment, last: segment }, |stop| Self::Found(shown(stop)))
    }
}

fn is_inside(stop: &StopTime, window: &Window) -> bool {
    window.from_lsn <= stop.lsn && stop.lsn < window.until_lsn
}

/// Whether the facts tell of the ends of all transactions.
fn tells_times(facts: &Facts) -> bool {
    facts.undecoded == 0 && facts.unread == 0
}

fn shown(stop: StopTime) -> TransactionTime {
    TransactionTime { time: stop.time, lsn: stop.lsn, xid: stop.xid }
}
