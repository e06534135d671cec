//! Loads the evidence that the planner asks for until it has an answer.

use std::borrow::Cow;
use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _};
use walship::catalog::Catalog;
use walship::pg::{Lsn, SegmentName, SegmentSize};
use walship::repository::{LineageRepository, Summarized, load_catalog_from_listings, load_tails};
use walship::wal::events::EventReader;
use walship::wal::page::PAGE_SIZE;
use walship::wal::reader::Reader;
use walship::{Error, Result};

use super::load_index::Index;
use super::prove::{Proof, prove};
use crate::plan::{
    Evidence, Outcome, PlanOptions, RecordBounds, RecordRequest, Refusal, RestorePlan, SegmentRequest,
    decides, plan,
};
use crate::target::RecoveryTarget;

/// How many summaries are read at once.
const READS_MAX: usize = 16;

/// How often a plan is made again because something that the index speaks of is gone.
const ROUNDS_MAX: usize = 64;

/// The planner's answer.
#[derive(Debug, Clone)]
pub enum Planned {
    /// The plan.
    Plan(Box<RestorePlan>),
    /// The target cannot be reached.
    Refused(Box<Refusal>),
}

/// Returns the plan for `target`, reading what the planner needs to know from the repository.
///
/// Summaries cost one ranged GET each, roll-ups one GET; whole segments are read only where the exact record
/// decides, one at a time. Then the store is asked whether the chain's segments are there, as far as `proof`
/// says; where one that the index speaks of is gone, the plan is made again without it.
///
/// # Errors
/// What the repository answers; [`Error::Corrupt`] when WAL that decides cannot be read to its end, or an
/// object of the chain has another length than it should.
pub async fn make_plan(
    repository: &LineageRepository,
    catalog: &Catalog,
    target: &RecoveryTarget,
    options: &PlanOptions,
    proof: Proof,
) -> Result<Planned> {
    let mut catalog = Cow::Borrowed(catalog);
    let mut loader = Loader::of(repository, &catalog);
    for _ in 0..ROUNDS_MAX {
        let planned = match loader.plan(&mut catalog, target, options).await {
            Err(Error::Missing(_)) if !catalog.rollups.is_empty() => {
                catalog = Cow::Owned(load_catalog_from_listings(repository).await?);
                loader = Loader::of(repository, &catalog);
                continue;
            }
            planned => planned?,
        };
        let Planned::Plan(mut plan) = planned else { return Ok(planned) };
        let Loader { index, evidence, .. } = &mut loader;
        let gone = prove(repository, &mut plan, index, evidence, &catalog.in_parts, proof).await?;
        if gone.is_empty() {
            plan.backup = repository.whole_record(&plan.backup).await?;
            for parent in &mut plan.parents {
                *parent = repository.whole_record(parent).await?;
            }
            return Ok(Planned::Plan(plan));
        }
        for name in &gone {
            tracing::debug!(%name, "the index speaks of a segment that is gone");
            catalog.to_mut().segments.remove(name);
        }
    }
    Err(Error::unavailable(format!("segments in {} vanish while the plan is made", repository.location())))
}

/// What was read so far.
struct Loader<'a> {
    repository: &'a LineageRepository,
    evidence: Evidence,
    index: Index,
    damage: BTreeMap<SegmentName, Error>,
}

impl<'a> Loader<'a> {
    fn of(repository: &'a LineageRepository, catalog: &Catalog) -> Self {
        Self {
            repository,
            evidence: Evidence::of(catalog),
            index: Index::of(catalog),
            damage: BTreeMap::new(),
        }
    }

    async fn plan(
        &mut self,
        catalog: &mut Cow<'_, Catalog>,
        target: &RecoveryTarget,
        options: &PlanOptions,
    ) -> Result<Planned> {
        let repository = self.repository;
        loop {
            let wal = Wal::of(repository, catalog);
            match plan(catalog, &self.evidence, target, options) {
                Outcome::Plan(plan) => return Ok(Planned::Plan(plan)),
                Outcome::Refused(refusal) => return Ok(Planned::Refused(refusal)),
                Outcome::NeedTails => {
                    self.evidence.add_tails(load_tails(repository, catalog.to_mut()).await?);
                }
                Outcome::NeedRollup(first) => {
                    self.index.refine(repository, first, &mut self.evidence).await?;
                }
                Outcome::NeedSummaries(names) => {
                    for (name, read) in load_summaries(repository, names).await? {
                        match read {
                            Ok(read) => {
                                self.index.check(name, &read, &mut self.evidence);
                                self.evidence.summaries.insert(name, read.summary);
                            }
                            Err(error) => self.damaged(name, error),
                        }
                    }
                }
                Outcome::NeedEvents(requests) => {
                    for request in requests {
                        match load_events(&wal, &request).await {
                            Ok(events) => drop(self.evidence.events.insert(request.segment, events)),
                            Err((name, error @ Error::Corrupt(_))) => {
                                self.damaged(name, error);
                                // Whether the rest is still wanted is for the planner to say.
                                break;
                            }
                            Err((_, error)) => return Err(error),
                        }
                    }
                }
                Outcome::SearchEvents(request) => match load_events(&wal, &request).await {
                    Ok(events) if events.iter().any(|event| decides(target, event)) => {
                        self.evidence.events.insert(request.segment, events);
                    }
                    Ok(_) => drop(self.evidence.searched.insert(request.segment)),
                    Err((name, error @ Error::Corrupt(_))) => self.damaged(name, error),
                    Err((_, error)) => return Err(error),
                },
                Outcome::Unreadable(name) => {
                    return Err(self.damage.remove(&name).unwrap_or_else(|| {
                        Error::corrupt(format!("segment {name} in {} cannot be read", repository.location()))
                    }));
                }
                Outcome::NeedRecord(request) => {
                    let at = (request.request.segment, request.at);
                    match load_record(&wal, &request).await {
                        Ok(found) => drop(self.evidence.records.insert(at, found)),
                        Err((name, error @ Error::Corrupt(_))) => self.damaged(name, error),
                        Err((_, error)) => return Err(error),
                    }
                }
            }
        }
    }

    /// Notes that a segment is damaged. Whether that matters is the planner's to say.
    fn damaged(&mut self, name: SegmentName, error: Error) {
        self.evidence.unreadable.insert(name);
        self.damage.insert(name, error);
    }
}

/// Returns the summaries, each or what is wrong with it where it is stored.
///
/// # Errors
/// Everything but [`Error::Corrupt`].
pub(super) async fn load_summaries(
    repository: &LineageRepository,
    names: Vec<SegmentName>,
) -> Result<Vec<(SegmentName, Result<Summarized>)>> {
    let reads = names.into_iter().map(|name| async move {
        let read = match repository.summarized(name).await {
            Err(error @ Error::Corrupt(_)) => return Ok((name, Err(error))),
            other => other?.ok_or_else(|| vanished(repository, name))?,
        };
        let (summary, ours) = (&read.summary, repository.lineage());
        if summary.segment_size != ours.segment_size
            || ![0, ours.system_identifier].contains(&summary.system_identifier)
        {
            return Err(Error::mismatch(format!(
                "segment {name} in {} belongs to another cluster (system identifier {})",
                repository.location(),
                summary.system_identifier
            )));
        }
        Ok((name, Ok(read)))
    });
    futures_util::stream::iter(reads).buffer_unordered(READS_MAX).try_collect().await
}

/// Where the bytes of segments come from: their objects, or where they were never stored whole, their parts.
pub(super) struct Wal<'a> {
    repository: &'a LineageRepository,
    size: SegmentSize,
    /// How many bytes are used of those that are stored in parts.
    parts: BTreeMap<SegmentName, u64>,
}

impl<'a> Wal<'a> {
    /// Returns how a catalog says that segments are stored.
    pub(super) fn of(repository: &'a LineageRepository, catalog: &Catalog) -> Self {
        let size = catalog.lineage.segment_size;
        let whole = catalog.in_parts.keys().map(|name| (*name, size.bytes()));
        let tails = catalog.tails.iter().flat_map(BTreeMap::values).chain(catalog.stranded.values());
        let open = tails.map(|tail| (tail.segment, tail.end_lsn.bytes_since(tail.segment.start(size))));
        Self { repository, size, parts: whole.chain(open).collect() }
    }

    /// Whether the segment is open: its end is no damage.
    fn is_open(&self, name: SegmentName) -> bool {
        self.parts.get(&name).is_some_and(|end| *end < self.size.bytes())
    }

    /// Returns a segment's bytes; of the open one whole pages, with zeros where they are not stored.
    pub(super) async fn bytes(&self, name: SegmentName) -> Result<Vec<u8>> {
        let read = match self.parts.get(&name) {
            Some(end) => self.repository.tail_bytes(name, *end).await?,
            None => self.repository.segment_bytes(name).await?,
        };
        let mut bytes = read.ok_or_else(|| vanished(self.repository, name))?;
        bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
        Ok(bytes)
    }
}

/// Returns all events that start in the segment, following its last record into the next ones.
///
/// # Errors
/// What went wrong, and with which of the segments.
pub(super) async fn load_events(
    wal: &Wal<'_>,
    request: &SegmentRequest,
) -> Result<Vec<walship::wal::WalEvent>, (SegmentName, Error)> {
    let size = wal.size;
    let mut reader = EventReader::new(size);
    let mut events = Vec::new();
    let end = request.segment.end(size);
    let bytes = wal.bytes(request.segment).await.map_err(|error| (request.segment, error))?;
    let read = reader.segment(request.segment, &bytes, |event| events.push(event));
    if let Err(broken) = read
        && !wal.is_open(request.segment)
    {
        let error = unreadable(wal.repository, broken.segment, broken.lsn, &broken.what);
        return Err((request.segment, error));
    }
    drop(bytes);
    for &name in &request.following {
        let bytes = wal.bytes(name).await.map_err(|error| (name, error))?;
        let mut past = false;
        let read = reader.segment(name, &bytes, |event| {
            if event.lsn < end {
                events.push(event);
            } else {
                past = true;
            }
        });
        // What lies behind the record that was followed is of no interest here, damage included.
        if past || read.is_err() {
            break;
        }
    }
    Ok(events)
}

/// Returns the first record that starts in the segment at or after a position.
///
/// # Errors
/// What went wrong, and with which of the segments.
async fn load_record(
    wal: &Wal<'_>,
    request: &RecordRequest,
) -> Result<Option<RecordBounds>, (SegmentName, Error)> {
    let size = wal.size;
    let first = request.request.segment;
    let mut search = RecordSearch::new(first, size, request.at);
    for &name in std::iter::once(&first).chain(&request.request.following) {
        let bytes = wal.bytes(name).await.map_err(|error| (name, error))?;
        if search.segment(name, &bytes) {
            break;
        }
    }
    if search.found.is_none()
        && !wal.is_open(first)
        && let Some(stop) = search.reader.stop()
        && stop.lsn < first.end(size)
    {
        let error = unreadable(wal.repository, first, stop.lsn, &stop.reason.to_string());
        return Err((first, error));
    }
    Ok(search.found)
}

struct RecordSearch {
    reader: Reader,
    at: Lsn,
    end: Lsn,
    found: Option<RecordBounds>,
}

impl RecordSearch {
    fn new(first: SegmentName, size: SegmentSize, at: Lsn) -> Self {
        let reader = Reader::new(first.start(size), first.timeline, size);
        Self { reader, at, end: first.end(size), found: None }
    }

    /// Reads one segment; returns whether there is nothing more to look for.
    fn segment(&mut self, name: SegmentName, bytes: &[u8]) -> bool {
        let Self { reader, at, end, found } = self;
        let mut past = false;
        reader.set_timeline_limit(name.timeline);
        reader.push(bytes, |record, _| {
            if record.lsn >= *end {
                past = true;
            } else if record.lsn >= *at && found.is_none() {
                *found = Some(RecordBounds { lsn: record.lsn, end_lsn: record.end_lsn });
            }
        });
        past || found.is_some() || reader.stop().is_some()
    }
}

fn vanished(repository: &LineageRepository, name: SegmentName) -> Error {
    Error::missing(format!(
        "segment {name} was listed in {} a moment ago and is not there any more",
        repository.location()
    ))
}

fn unreadable(repository: &LineageRepository, name: SegmentName, lsn: Lsn, what: &str) -> Error {
    Error::corrupt(format!("segment {name} in {} cannot be read past {lsn}: {what}", repository.location()))
        .with_next("Plan for a target before this position, or use another copy of the repository.")
}
