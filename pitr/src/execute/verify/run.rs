//! Does the work, piece by piece, several at a time, and notes what is proven as it goes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use walship::catalog::{Catalog, KnownDamage, ReadPlace, StoredSegments, VerifiedBackup, VerifyOutcome};
use walship::pg::{SegmentName, SegmentSize, TimelineId};
use walship::repository::LineageRepository;
use walship::storage::metered::Meter;
use walship::{Error, Result};

use super::backup::{Cases, read_documents, read_object};
use super::wal::read_wal;
use crate::verify::{
    Finding, ProvenState, RepositoryReport, Unread, VerifiedRange, Work, WorkKind, known_damage,
};

/// What was proven is noted for the first time after this long, then after twice as long each time.
const FIRST_NOTE: Duration = Duration::from_secs(2);

/// It is noted at least this often.
const NOTE_EVERY: Duration = Duration::from_secs(300);

/// How many records of verifications are looked at.
pub(super) const RECORDS_MAX: usize = 1000;

/// More is not named of what could not be read.
const UNREAD_MAX: usize = 1000;

/// After so many failures in a row, with no answer in between, the repository is left: it is not to be had.
const FAILURES_MAX: u32 = 8;

/// What every piece of work needs.
#[derive(Debug)]
pub(super) struct Job {
    /// One repository by itself, its reads counted.
    pub(super) repository: LineageRepository,
    pub(super) location: String,
    pub(super) catalog: Catalog,
    pub(super) cases: Cases,
    pub(super) meter: Arc<Meter>,
    /// Up to how many bytes of the meter more is begun.
    pub(super) until_bytes: u64,
    /// Up to how many what is known to be damaged is read before all else.
    pub(super) damaged_until_bytes: u64,
    pub(super) stopped: Arc<AtomicBool>,
    /// At least one piece is read, however small the budget.
    pub(super) begun: AtomicBool,
    /// Held while a segment that is stored in parts is in memory: one at a time is.
    pub(super) in_memory: tokio::sync::Mutex<()>,
}

impl Job {
    pub(super) fn size(&self) -> SegmentSize {
        self.catalog.lineage.segment_size
    }

    /// Returns whether the next object may be read.
    pub(super) fn is_allowed(&self) -> bool {
        let first = !self.begun.swap(true, Ordering::Relaxed);
        !self.stopped.load(Ordering::Relaxed) && (first || self.meter.bytes() < self.until_bytes)
    }
}

/// What a piece of work came to.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Objects that were read.
    pub(super) objects: u64,
    pub(super) findings: Vec<Finding>,
    /// What is sound.
    pub(super) proven: Vec<ReadPlace>,
    /// What is not, with what was found there.
    pub(super) doubted: Vec<(ReadPlace, Vec<Finding>)>,
    /// Segments that were listed and are gone.
    pub(super) vanished: Vec<SegmentName>,
    /// Segments whose parts are sound.
    pub(super) parts: Vec<SegmentName>,
    /// Backups that are gone.
    pub(super) vanished_backups: Vec<String>,
    /// What could not be read, though the repository answers.
    pub(super) unread: Vec<Unread>,
    /// Segments of the piece that were not read.
    pub(super) left: u64,
}

impl Done {
    /// Notes that a place was read, and what of the findings from the `first` on was found there.
    pub(super) fn read(&mut self, place: ReadPlace, first: usize) {
        let damage: Vec<Finding> =
            self.findings.iter().skip(first).filter(|finding| finding.is_damage()).cloned().collect();
        match damage.is_empty() {
            true => self.proven.push(place),
            false => self.doubted.push((place, damage)),
        }
    }
}

/// What all work came to.
#[derive(Debug, Default)]
pub(super) struct Worked {
    pub(super) objects: u64,
    pub(super) findings: Vec<Finding>,
    pub(super) findings_total: u64,
    /// How many of all findings are damage.
    pub(super) damages: u64,
    pub(super) unread: Vec<Unread>,
    pub(super) vanished: BTreeSet<SegmentName>,
    pub(super) vanished_backups: BTreeSet<String>,
    /// What was not read: segments, segments with parts, data objects.
    pub(super) left: u64,
    read: BTreeMap<TimelineId, BTreeMap<u64, u64>>,
    /// The pieces that were not read, with when they were last proven.
    left_at: Vec<Option<DateTime<Utc>>>,
    pub(super) interrupted: bool,
    broken_off: bool,
}

impl Worked {
    fn add(&mut self, done: Done, state: &mut ProvenState, at: DateTime<Utc>, stored: &StoredSegments) {
        self.objects += done.objects;
        self.add_findings(done.findings);
        let read = done.proven.iter().chain(done.doubted.iter().map(|(place, _)| place));
        for place in read {
            if let ReadPlace::Segment(name) = place
                && stored.contains(*name)
            {
                self.note_read(*name, stored.size());
            }
        }
        for place in &done.proven {
            state.prove(place, at);
        }
        for (place, findings) in done.doubted {
            // When it was found: a run that began earlier may have read it when it was sound.
            state.doubt(known_damage(place, Utc::now().max(at), &findings));
        }
        for name in &done.parts {
            state.prove_parts(*name, at);
        }
        self.add_unread(done.unread);
        self.vanished.extend(done.vanished);
        self.vanished_backups.extend(done.vanished_backups);
    }

    pub(super) fn add_findings(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            self.findings_total += 1;
            self.damages += u64::from(finding.is_damage());
            // However many notes there are, damage has its room.
            let most = match finding.is_damage() {
                true => RepositoryReport::FINDINGS_MAX,
                false => RepositoryReport::FINDINGS_MAX / 2,
            };
            if self.findings.len() < most {
                self.findings.push(finding);
            }
        }
    }

    pub(super) fn add_unread(&mut self, unread: Vec<Unread>) {
        let room = UNREAD_MAX.saturating_sub(self.unread.len());
        self.unread.extend(unread.into_iter().take(room));
    }

    /// Forgets findings that turned out to be none.
    pub(super) fn take_back(&mut self, is_none: impl Fn(&Finding) -> bool) {
        let findings = std::mem::take(&mut self.findings);
        let (none, left): (Vec<_>, Vec<_>) = findings.into_iter().partition(is_none);
        self.findings = left;
        self.findings_total -= none.len() as u64;
        self.damages -= none.iter().filter(|finding| finding.is_damage()).count() as u64;
    }

    fn note_read(&mut self, name: SegmentName, size: SegmentSize) {
        let number = name.number(size);
        let runs = self.read.entry(name.timeline).or_default();
        let (mut from, mut until) = (number, number + 1);
        if let Some((start, end)) = runs.range(..=number).next_back().map(|(a, b)| (*a, *b))
            && end >= number
        {
            (from, until) = (start, end.max(until));
        }
        if let Some(end) = runs.remove(&until) {
            until = until.max(end);
        }
        runs.insert(from, until);
    }

    /// Returns the segments that were read.
    pub(super) fn ranges(&self, size: SegmentSize) -> Vec<VerifiedRange> {
        let runs = self.read.iter().flat_map(|(timeline, runs)| runs.iter().map(move |run| (*timeline, run)));
        let ranges = runs.filter_map(|(timeline, (from, until))| {
            Some(VerifiedRange {
                first: SegmentName::from_number(timeline, *from, size)?,
                last: SegmentName::from_number(timeline, until - 1, size)?,
                segments: until - from,
            })
        });
        ranges.collect()
    }

    /// Returns how many of the pieces that were not read were never proven, and when the oldest of the others was.
    pub(super) fn oldest_left(&self) -> (u64, Option<DateTime<Utc>>) {
        let never = self.left_at.iter().filter(|at| at.is_none()).count() as u64;
        (never, self.left_at.iter().flatten().min().copied())
    }

    /// Returns whether a repository that does not answer was left.
    pub(super) fn is_broken_off(&self) -> bool {
        self.broken_off
    }
}

/// What is shown while it works.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pieces of work in all repositories.
    pub pieces: AtomicU64,
    /// Those that are done.
    pub done: AtomicU64,
}

/// Does all work, `workers` pieces at a time.
pub(super) async fn work(
    job: &Job,
    work: Vec<Work>,
    workers: usize,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Worked {
    let mut worked = Worked::default();
    let mut queue = Queue::new(work);
    let mut running = FuturesUnordered::new();
    let mut failures = 0;
    loop {
        while running.len() < workers.max(1) && !worked.broken_off {
            let Some(next) = queue.next(job, running.is_empty()) else { break };
            running.push(async move {
                let done = do_one(job, &next.what).await;
                (next, done)
            });
        }
        let Some((piece, done)) = running.next().await else { break };
        progress.done.fetch_add(1, Ordering::Relaxed);
        match done {
            Ok(done) => {
                failures = 0;
                if done.left > 0 {
                    worked.left += done.left;
                    worked.left_at.push(piece.at);
                }
                worked.add(done, &mut notes.state, notes.at, &job.catalog.segments);
            }
            Err(error) => {
                // What cannot be read may be one object's affair.
                failures = if job.repository.confirm_marker().await.is_ok() { 0 } else { failures + 1 };
                worked.broken_off |= failures >= FAILURES_MAX;
                let object = shown(&piece.what, job.size());
                worked.add_unread(vec![Unread { object, why: error.to_string() }]);
                worked.left += pieces_in(&piece.what);
                worked.left_at.push(piece.at);
            }
        }
        notes.now_and_then().await;
    }
    drop(running);
    for piece in queue.left() {
        worked.left += pieces_in(&piece.what);
        worked.left_at.push(piece.at);
    }
    worked.interrupted = job.stopped.load(Ordering::Relaxed);
    worked
}

/// The pieces that were not begun.
struct Queue {
    pieces: VecDeque<Work>,
    /// Those that are known to be damaged, and that there was no room for.
    late: VecDeque<Work>,
    /// Whether one that is not known to be damaged was begun.
    begun: bool,
}

impl Queue {
    fn new(work: Vec<Work>) -> Self {
        Self { pieces: work.into(), late: VecDeque::new(), begun: false }
    }

    /// Returns the next piece that may be begun. What is known to be damaged takes neither all of the budget nor, where one
    /// piece is all that is read, the place of that.
    fn next(&mut self, job: &Job, is_idle: bool) -> Option<Work> {
        let is_damaged = |piece: &Work| piece.damaged.is_some();
        while job.meter.bytes() >= job.damaged_until_bytes && self.pieces.front().is_some_and(is_damaged) {
            self.late.extend(self.pieces.pop_front());
        }
        if !self.begun && self.pieces.front().is_some_and(|piece| !is_damaged(piece)) {
            // Those at work must not take its right to the first object.
            if !is_idle {
                return None;
            }
            self.begun = true;
            job.begun.store(false, Ordering::Relaxed);
        }
        if !is_allowed(job) {
            return None;
        }
        self.pieces.pop_front().or_else(|| self.late.pop_front())
    }

    fn left(self) -> impl Iterator<Item = Work> {
        self.pieces.into_iter().chain(self.late)
    }
}

/// Returns whether another piece may be begun; does not use up the right to the first.
fn is_allowed(job: &Job) -> bool {
    let first = !job.begun.load(Ordering::Relaxed);
    !job.stopped.load(Ordering::Relaxed) && (first || job.meter.bytes() < job.until_bytes)
}

fn pieces_in(what: &WorkKind) -> u64 {
    match what {
        WorkKind::Wal { from, until, .. } => until - from,
        WorkKind::Parts(_) | WorkKind::Backup { .. } => 1,
    }
}

fn shown(what: &WorkKind, size: SegmentSize) -> String {
    match what {
        WorkKind::Wal { timeline, from, until } => {
            let name =
                |number| SegmentName::from_number(*timeline, number, size).map(|name| name.to_string());
            match (name(*from), name(until - 1)) {
                (Some(first), Some(last)) if first == last => first,
                (Some(first), Some(last)) => format!("{first} to {last}"),
                _ => format!("timeline {timeline}"),
            }
        }
        WorkKind::Parts(name) => format!("parts of {name}"),
        WorkKind::Backup { backup, place: Some(place) } => {
            format!("data object {} of backup {backup}", place + 1)
        }
        WorkKind::Backup { backup, place: None } => format!("documents of backup {backup}"),
    }
}

async fn do_one(job: &Job, what: &WorkKind) -> Result<Done> {
    match what {
        WorkKind::Wal { timeline, from, until } => read_wal(job, *timeline, *from, *until).await,
        WorkKind::Parts(name) => read_parts(job, *name).await,
        WorkKind::Backup { backup, place: Some(place) } => read_object(job, backup, *place).await,
        WorkKind::Backup { backup, place: None } => read_documents(job, backup).await,
    }
}

/// Reads the parts of a segment that is stored whole too: nothing depends on them.
async fn read_parts(job: &Job, name: SegmentName) -> Result<Done> {
    let mut done = Done::default();
    let mut sound = true;
    for part in job.repository.tail_of(name).await? {
        if !job.is_allowed() {
            done.left = 1;
            return Ok(done);
        }
        done.objects += 1;
        match job.repository.check_part(name, &part).await {
            Ok(_) => {}
            Err(Error::Corrupt(error)) => {
                sound = false;
                let what = format!("{error}; the segment is stored whole");
                done.findings.push(Finding::note(
                    crate::verify::FindingKind::Damaged,
                    &job.location,
                    job.repository.part_location(&part),
                    what,
                ));
            }
            Err(error) => return Err(error),
        }
    }
    if sound {
        done.parts.push(name);
    }
    Ok(done)
}

/// What is proven, and where that is noted.
pub(super) struct Notes<'a> {
    pub(super) state: ProvenState,
    /// When this verification began.
    pub(super) at: DateTime<Utc>,
    pub(super) id: &'a str,
    pub(super) round: DateTime<Utc>,
    /// What tells the repository from a copy of it at the same address.
    marker: Option<String>,
    pub(super) repository: &'a LineageRepository,
    number: u32,
    noted: Instant,
    pause: Duration,
    /// Why it cannot be noted.
    pub(super) failure: Option<Error>,
}

impl<'a> Notes<'a> {
    pub(super) fn new(
        state: ProvenState,
        at: DateTime<Utc>,
        id: &'a str,
        round: DateTime<Utc>,
        marker: Option<String>,
        repository: &'a LineageRepository,
    ) -> Self {
        let (noted, pause) = (Instant::now(), FIRST_NOTE);
        Self { state, at, id, round, marker, repository, number: 0, noted, pause, failure: None }
    }

    async fn now_and_then(&mut self) {
        if self.noted.elapsed() >= self.pause && self.failure.is_none() {
            self.pause = (self.pause * 2).min(NOTE_EVERY);
            self.note().await;
        }
    }

    /// Remembers what is wrong with the index together with the first segment that it tells of, so that both are read again until
    /// that is mended; returns what is not told with that segment already.
    pub(super) fn of_index(&mut self, flaws: Vec<(Finding, Option<SegmentName>)>) -> Vec<Finding> {
        let mut untold = Vec::new();
        for (finding, first) in flaws {
            let place = first.map(ReadPlace::Segment);
            let known = place.as_ref().and_then(|place| self.state.damage().get(place));
            let is_old = known.is_some_and(|known| known.at < self.at);
            if is_old
                && known.iter().any(|known| known.flaws.iter().any(|flaw| flaw.object == finding.object))
            {
                continue;
            }
            if let Some(place) = place.filter(|_| !is_old) {
                let mut flaws = known.map(|known| known.flaws.clone()).unwrap_or_default();
                let mut damage = known_damage(place, Utc::now().max(self.at), std::slice::from_ref(&finding));
                damage.flaws.append(&mut flaws);
                damage.flaws.truncate(KnownDamage::FLAWS_MAX);
                self.state.doubt(damage);
            }
            untold.push(finding);
        }
        untold
    }

    /// Notes what is proven at the end, twice: what this run has found outlives a document that is damaged later.
    pub(super) async fn note_last(&mut self) {
        // That it could not be noted meanwhile is of no concern once it can.
        self.failure = None;
        self.note().await;
        if self.failure.is_none() {
            self.note().await;
        }
    }

    /// Notes what is proven by now.
    async fn note(&mut self) {
        self.number += 1;
        let mut proven = self.state.recorded(self.id, self.at);
        (proven.round, proven.marker) = (Some(self.round), self.marker.clone());
        if let Err(error) = self.repository.put_proven(&proven, self.number).await {
            self.failure.get_or_insert(error);
        }
        self.noted = Instant::now();
    }
}

/// Returns what is known of the backups of the scope.
pub(super) fn backups(
    ids: &BTreeSet<String>,
    objects: &BTreeMap<String, u32>,
    state: &ProvenState,
    findings: &[Finding],
    unread: &[Unread],
) -> Vec<VerifiedBackup> {
    let of = |id: &String| {
        let pieces = state.objects(id).pieces(0, u64::from(objects.get(id).copied().unwrap_or(0)));
        let times = pieces.iter().map(|piece| piece.at).chain([state.documents(id)]);
        let proven_since = times.min().flatten().filter(|_| !pieces.is_empty());
        let takes = |finding: &Finding| matches!(&finding.takes, crate::verify::Takes::Backup { id: known, .. } if known == id);
        let damaged = findings.iter().any(|finding| finding.is_damage() && takes(finding))
            || state.damage().keys().any(|place| place.backup() == Some(id));
        let outcome = if damaged {
            VerifyOutcome::Damaged
        } else if unread.iter().any(|unread| unread.object.contains(&**id)) {
            VerifyOutcome::Unread
        } else if proven_since.is_none() {
            VerifyOutcome::Partly
        } else {
            VerifyOutcome::Sound
        };
        VerifiedBackup { id: id.clone(), outcome, proven_since }
    };
    ids.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::{FindingKind, Takes};

    #[test]
    fn no_number_of_notes_hides_damage() {
        let mut worked = Worked::default();
        let note = || Finding::note(FindingKind::Damaged, "r", "a segment".to_owned(), "cannot be decoded");
        worked.add_findings((0..RepositoryReport::FINDINGS_MAX + 1).map(|_| note()).collect());
        let damage = Finding::damage(FindingKind::Damaged, "r", "another".to_owned(), "no", Takes::Nothing);
        worked.add_findings(vec![damage]);
        assert!(worked.findings.iter().any(Finding::is_damage) && worked.damages == 1);
        assert!(worked.findings.len() < RepositoryReport::FINDINGS_MAX);
        assert_eq!(worked.findings_total, RepositoryReport::FINDINGS_MAX as u64 + 2);
    }
}
