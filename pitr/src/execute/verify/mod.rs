//! Proves what is stored: reads what `verify` says, repository by repository, and hands what was found to it.
//!
//! It writes nothing but what it has proven and a record of it, and it repairs nothing.

mod backup;
mod look;
mod object;
mod run;
mod wal;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{Catalog, ReadPlace, Seen, VerifyOutcome};
use walship::pg::{Lsn, SegmentName};
use walship::replication::ServerPosition;
use walship::repository::LineageRepository;
use walship::storage::metered::Meter;
use walship::{Error, Result};

use crate::plan::RestorePlan;
use crate::verify::affected::{Affected, Place, affected};
use crate::verify::{
    Finding, FindingKind, Needed, ProvenState, Report, RepositoryReport, SeenBefore, Takes, Unlisted, Unread,
    behind_server, gaps_found, history_flaws, less_than_seen, may_come, order, standing, still_missing,
    told_again,
};
use look::{Looked, Removals};
use run::{Job, Notes, Worked, backups, work};

pub use run::Progress;

/// A verification that was killed or interrupted is gone on with when it began no longer ago.
const GO_ON_WITHIN: TimeDelta = TimeDelta::days(7);

/// How many segments are looked at on either side of a stretch for the time of a transaction.
const LOOK_ASIDE_MAX: usize = 8;

/// How many stretches are given times.
const TIMED_MAX: usize = 100;

/// What is to be proven.
#[derive(Debug, Clone)]
pub enum Scope {
    /// Everything that is stored.
    Whole,
    /// What one backup needs.
    Backup(String),
    /// What leads to every moment from here on.
    Since(DateTime<Utc>),
    /// What a plan needs.
    Plan(Box<RestorePlan>),
}

impl Scope {
    /// Returns it in words.
    pub fn words(&self) -> String {
        match self {
            Self::Whole => "the whole lineage".to_owned(),
            Self::Backup(id) => format!("backup {id}"),
            Self::Since(from) => format!("every moment since {}", from.format("%Y-%m-%d %H:%M:%SZ")),
            Self::Plan(plan) => format!("{} from backup {}", plan.target_options, plan.backup.id),
        }
    }

    fn needed(&self, catalog: &Catalog) -> Needed {
        match self {
            Self::Whole => Needed::everything(catalog),
            // Where a repository does not have it, the repositories are compared.
            Self::Backup(id) => Needed::of_backup(catalog, id).unwrap_or_default(),
            Self::Since(from) => Needed::since(catalog, *from),
            Self::Plan(plan) => Needed::of_plan(plan, catalog.lineage.segment_size),
        }
    }
}

/// How it is done.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its id, the same in all repositories.
    pub id: String,
    /// When it began.
    pub started: DateTime<Utc>,
    /// What is to be proven.
    pub scope: Scope,
    /// How many bytes are read of each repository at most, about; the oldest proofs are renewed first.
    pub budget: Option<u64>,
    /// How many bytes are read in a second at most, of all repositories together.
    pub bytes_per_second: Option<u64>,
    /// How many objects are read side by side.
    pub workers: usize,
    /// Where the server was, asked before anything was read; and the slot of the archive's receiver.
    pub server: Option<(ServerPosition, Option<String>)>,
    /// What this machine remembers to have seen, by the repository's location: an older copy that takes a repository's
    /// place brings its own records along.
    pub remembered: BTreeMap<String, Seen>,
    /// Read also what a verification that was killed has proven.
    pub anew: bool,
    /// What was there before and is missing now is known, and is not to be told any more.
    pub accept_missing: bool,
}

/// Verifies the lineage in each of its repositories. When `stopped` becomes true no more is begun.
///
/// # Errors
/// [`Error::Missing`] for a backup that no repository has; what a repository says, where none can be read.
pub async fn verify(
    repository: &LineageRepository,
    request: &Request,
    stopped: Arc<AtomicBool>,
    progress: &Progress,
) -> Result<Report> {
    let clock = Instant::now();
    let meter = Arc::new(Meter::new(request.bytes_per_second));
    let (mut looked, mut reports, mut failure) = (Vec::new(), Vec::new(), None);
    for one in repository.each() {
        let metered = one.metered(Arc::clone(&meter));
        let before = meter.bytes();
        let found = unless_stopped(&stopped, look::look(&metered, request.started)).await;
        match found.ok_or_else(interrupted)? {
            Ok(mut found) => {
                found.bytes = meter.bytes() - before;
                looked.push((metered, found));
            }
            Err(error) => {
                reports.push(unread_report(one.location(), &error));
                failure.get_or_insert(error);
            }
        }
    }
    if looked.is_empty() {
        return Err(failure.unwrap_or_else(|| Error::invalid("no repository is configured")));
    }
    if let Scope::Backup(id) = &request.scope {
        let may_have = |found: &Looked| {
            Needed::of_backup(&found.catalog, id).is_some() || found.unlisted.hides_backups()
        };
        if !looked.iter().any(|(_, found)| may_have(found)) {
            return Err(Error::missing(format!("there is no backup {id:?} in {}", repository.location()))
                .with_next("`pitr info` lists them."));
        }
    }
    let elsewhere: Vec<SeenBefore> = looked.iter().map(|(_, found)| found.seen_now()).collect();
    for (at, (metered, found)) in looked.iter_mut().enumerate() {
        let others = elsewhere.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, seen)| seen);
        let report =
            verify_one(metered, found, request, &others.collect::<Vec<_>>(), &stopped, progress, &meter)
                .await;
        match report {
            Ok(report) => reports.push(report),
            Err(error) => reports.push(unread_report(metered.location(), &error)),
        }
    }
    name_copies(&looked, &mut reports);
    let mut judged = judge(&looked, &reports);
    add_times(repository, &mut judged).await;
    let unreadable_repositories = repository.unreadable();
    let outcome = reports.iter().map(|report| report.outcome).max_by_key(|outcome| weight(*outcome));
    let outcome = outcome.unwrap_or(VerifyOutcome::Unread);
    let outcome = match unreadable_repositories.is_empty() {
        false if weight(outcome) < weight(VerifyOutcome::Unread) => VerifyOutcome::Unread,
        _ => outcome,
    };
    Ok(Report {
        id: request.id.clone(),
        started: request.started,
        millis: u64::try_from(clock.elapsed().as_millis()).unwrap_or(u64::MAX),
        cluster: repository.cluster().to_string(),
        lineage: repository.lineage().number,
        scope: request.scope.words(),
        outcome,
        repositories: reports,
        unreadable_repositories,
        affected: judged,
        notes: repository.notes(),
    })
}

/// Where a repository lacks something that may be on its way, it is looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// After so long it is not on its way any more.
const ON_ITS_WAY_MAX: Duration = Duration::from_secs(60);

/// A repository is looked at so often at most while a removal changes it.
const LOOKS_MAX: u32 = 6;

/// How often is looked whether a verification that waits is to end.
const STOPPED_WITHIN: Duration = Duration::from_millis(100);

/// Waits for work that may be given up; `None` when it was.
async fn unless_stopped<T>(stopped: &AtomicBool, work: impl Future<Output = T>) -> Option<T> {
    let stop = async {
        while !stopped.load(Ordering::Relaxed) {
            tokio::time::sleep(STOPPED_WITHIN).await;
        }
    };
    tokio::select! {
        done = work => Some(done),
        () = stop => None,
    }
}

fn interrupted() -> Error {
    Error::unavailable("the verification was interrupted before anything was read")
        .with_safe("nothing was changed; what was proven before is noted")
        .with_next("Run it again: it goes on where this one ended.")
}

/// Returns how bad an outcome is.
fn weight(outcome: VerifyOutcome) -> u8 {
    match outcome {
        VerifyOutcome::Sound => 0,
        VerifyOutcome::Partly => 1,
        VerifyOutcome::Interrupted => 2,
        VerifyOutcome::Unread | VerifyOutcome::Unknown => 3,
        VerifyOutcome::Damaged => 4,
    }
}

fn unread_report(repository: String, error: &Error) -> RepositoryReport {
    RepositoryReport {
        unread: vec![Unread { object: repository.clone(), why: error.to_string() }],
        repository,
        outcome: VerifyOutcome::Unread,
        objects: 0,
        bytes: 0,
        objects_left: 0,
        never_proven: 0,
        proven_since: None,
        goes_on_from: None,
        wal: Vec::new(),
        backups: Vec::new(),
        findings: Vec::new(),
        findings_total: 0,
        standing: None,
        seen: None,
    }
}

async fn verify_one(
    repository: &LineageRepository,
    found: &mut Looked,
    request: &Request,
    elsewhere: &[&SeenBefore],
    stopped: &Arc<AtomicBool>,
    progress: &Progress,
    meter: &Arc<Meter>,
) -> Result<RepositoryReport> {
    let location = repository.location();
    let needed = request.scope.needed(&found.catalog);
    let read_before = meter.bytes();
    let mut findings = found.take_findings(&needed);
    findings.extend(history_flaws(&location, &found.catalog));
    let mut removals = look::removals(repository).await?;
    let (size, now) = (found.catalog.lineage.segment_size, found.seen_now());
    let mut state = ProvenState::of(size, &location, request.started, &found.proven);
    if let Some(seen) = request.remembered.get(&location) {
        state.seen.add(seen);
    }
    // What is back counts again.
    state.accepted = state.accepted.without(&now);
    // What cannot be read may be there.
    let accepts = request.accept_missing && found.unlisted.is_empty();
    if accepts {
        for seen in elsewhere.iter().copied().chain([&state.seen.clone()]) {
            state.accepted.add(&seen.without(&now).recorded());
        }
    }
    let seen = state.seen.without(&state.accepted);
    let elsewhere: Vec<_> = elsewhere.iter().map(|seen| seen.without(&state.accepted)).collect();
    let gaps_in =
        |catalog: &Catalog, removals: &Removals| gaps_found(&location, catalog, &needed, &removals.going);
    let than_elsewhere = |catalog: &Catalog, removals: &Removals, told: &[Finding]| {
        let (mut less, mut told) = (Vec::new(), told.to_vec());
        for seen in &elsewhere {
            let more = less_than_seen(&location, catalog, seen, &removals.gone, &needed, &told);
            told.extend(more.iter().cloned());
            less.extend(more);
        }
        less
    };
    let mut gaps = gaps_in(&found.catalog, &removals);
    let told: Vec<Finding> = findings.iter().chain(&gaps).cloned().collect();
    let less = less_than_seen(&location, &found.catalog, &seen, &removals.gone, &needed, &told);
    let told: Vec<Finding> = told.into_iter().chain(less.iter().cloned()).collect();
    let mut than_others = than_elsewhere(&found.catalog, &removals, &told);
    // Segments are stored side by side: one may be there before the one in front of it. And what other repositories had by
    // then may be on its way here, or have arrived.
    let waiting = Instant::now();
    while waiting.elapsed() < ON_ITS_WAY_MAX {
        let unlisted = |finding: &&Finding| found.unlisted.may_hold(finding).is_some();
        let missing = gaps.iter().chain(&than_others).filter(|finding| !unlisted(finding));
        if !may_come(&found.catalog, missing) {
            break;
        }
        let again = async {
            tokio::time::sleep(LOOK_AGAIN).await;
            let again = look::look(repository, request.started).await?.catalog;
            // A removal may have begun meanwhile.
            Ok::<_, Error>((again, look::removals(repository).await?))
        };
        // Where it cannot be looked at again, what the first look has found counts.
        let Some(Ok((again, since))) = unless_stopped(stopped, again).await else { break };
        removals = since;
        gaps = still_missing(&gaps, gaps_in(&again, &removals), size);
        than_others = than_elsewhere(&again, &removals, &told);
    }
    findings.extend(gaps.into_iter().chain(less).chain(than_others));
    if let Some((server, slot)) = request.server.as_ref().filter(|_| needed.to_the_end) {
        let behind = behind_server(&location, &found.catalog, server, slot.as_deref());
        findings.extend(behind);
    }
    let (forks, unread_forks) = wal::check_forks(repository, &found.catalog, &needed, &location).await;
    findings.extend(forks);
    let going_on = look::goes_on_from(repository, found, request).await?;
    state.seen = state.seen.without(&state.accepted);
    state.seen.add_catalog(&found.catalog);
    state.seen.backups.retain(|id| !removals.gone.contains(id));
    state.keep_only(&found.catalog, &found.stored, &found.unlisted);
    let round = going_on.filter(|_| request.budget.is_none());
    let pieces = order(&found.stored, &needed, &state, &found.objects, &found.doubled, round);
    progress.pieces.fetch_add(pieces.len() as u64, Ordering::Relaxed);
    // Looking takes half of the budget at most: something is read each time.
    let left = request.budget.map(|budget| budget - found.bytes.min(budget / 2));
    let within = |budget: Option<u64>| budget.map_or(u64::MAX, |budget| meter.bytes().saturating_add(budget));
    let job = Job {
        repository: repository.clone(),
        location: location.clone(),
        catalog: found.catalog.clone(),
        cases: backup::Cases::default(),
        meter: Arc::clone(meter),
        until_bytes: within(left),
        damaged_until_bytes: within(left.map(|budget| budget / 2)),
        stopped: Arc::clone(stopped),
        begun: AtomicBool::new(false),
        in_memory: tokio::sync::Mutex::default(),
    };
    let since = round.unwrap_or(request.started);
    let marker = found.marker.clone();
    let mut notes = Notes::new(state, request.started, &request.id, since, marker, repository);
    let mut worked = work(&job, pieces, request.workers, &mut notes, progress).await;
    worked.add_unread(unread_forks);
    if needed.everything && !worked.interrupted && !worked.is_broken_off() {
        match look::index_flaws(repository, &found.catalog, &worked.ranges(job.size())).await {
            Ok(flaws) => findings.extend(notes.of_index(flaws)),
            Err(error) => {
                worked.unread.push(Unread { object: format!("{location}/index"), why: error.to_string() })
            }
        }
    }
    // What was not read again is as it was.
    let old = notes.state.damage().values().filter(|damage| damage.at < request.started);
    let wanted = old.filter(|damage| match &damage.place {
        ReadPlace::Segment(name) => needed.has_segment(*name, size),
        place => place.backup().is_some_and(|id| needed.backups.contains(id)),
    });
    worked.add_findings(wanted.flat_map(|damage| told_again(&location, damage)).collect());
    match look::settle(repository, &mut worked, &location).await {
        Ok(gone) => findings.extend(gone),
        // What was found is told all the same.
        Err(error) => worked.unread.push(Unread { object: location.clone(), why: error.to_string() }),
    }
    notes.note_last().await;
    if let Some(error) = &notes.failure {
        repository.note(format!("what is proven of {location} cannot be noted there: {error}"));
    }
    found.unlisted = Unlisted(repository.skipped());
    let (hidden, findings): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| found.unlisted.may_hold(finding).is_some());
    worked.add_unread(unlisted(&location, &found.unlisted, &hidden));
    if request.accept_missing && !accepts {
        repository.note(format!("nothing was accepted as missing of {location}: not all of it can be read"));
    }
    // What reading finds is remembered with its place.
    let others = findings.iter().filter(|finding| finding.is_damage()).count() as u64;
    worked.add_findings(findings);
    for finding in &worked.findings {
        if let (FindingKind::Broken, Takes::Tail(segment)) = (finding.kind, &finding.takes) {
            found.end_before(*segment, &finding.what);
        }
    }
    let standing = notes.failure.is_none().then(|| standing(&notes.state, others));
    let report = report_of(location, &needed, found, &notes.state, worked, request.started, round);
    Ok(RepositoryReport { bytes: found.bytes + meter.bytes() - read_before, standing, ..report })
}

/// Returns what cannot be listed, and what may lie there.
fn unlisted(location: &str, unlisted: &Unlisted, hidden: &[Finding]) -> Vec<Unread> {
    let folders = unlisted.0.iter().map(|(path, why)| Unread {
        object: format!("{location}/{path}").trim_end_matches('/').to_owned(),
        why: why.clone(),
    });
    let hidden = hidden.iter().map(|finding| Unread {
        object: finding.object.clone(),
        why: format!("{}; it may lie in what cannot be read", finding.what),
    });
    folders.chain(hidden).collect()
}

fn report_of(
    repository: String,
    needed: &Needed,
    found: &Looked,
    state: &ProvenState,
    worked: Worked,
    at: DateTime<Utc>,
    goes_on_from: Option<DateTime<Utc>>,
) -> RepositoryReport {
    let backups = backups(&needed.backups, &found.objects, state, &worked.findings, &worked.unread);
    let (never_proven, oldest) = worked.oldest_left();
    let damaged = worked.damages > 0;
    let outcome = if damaged {
        VerifyOutcome::Damaged
    } else if !worked.unread.is_empty() {
        VerifyOutcome::Unread
    } else if worked.interrupted {
        VerifyOutcome::Interrupted
    } else if worked.left > 0 {
        VerifyOutcome::Partly
    } else {
        VerifyOutcome::Sound
    };
    let size = found.catalog.lineage.segment_size;
    // What was not left was read now, or by the run that this one went on from.
    let proven_since = oldest.into_iter().chain(goes_on_from).chain([at]).min();
    RepositoryReport {
        repository,
        outcome,
        objects: worked.objects,
        bytes: 0,
        objects_left: worked.left,
        never_proven,
        proven_since: proven_since.filter(|_| never_proven == 0 && found.unlisted.is_empty()),
        goes_on_from,
        wal: worked.ranges(size),
        backups,
        findings: worked.findings,
        findings_total: worked.findings_total,
        unread: worked.unread,
        standing: None,
        seen: Some(state.seen.recorded()),
    }
}

/// Says of each finding in which other repository that lies which it takes.
fn name_copies(looked: &[(LineageRepository, Looked)], reports: &mut [RepositoryReport]) {
    let mut places = places(looked, reports);
    // Nobody knows whether that is sound which was not read.
    places.retain(|(location, _)| {
        let report = reports.iter().find(|report| report.repository == *location);
        report.is_some_and(|report| report.unread.is_empty() && report.never_proven == 0)
    });
    let mut copies = Vec::new();
    for report in reports.iter() {
        let of_report: Vec<Vec<String>> = report
            .findings
            .iter()
            .map(|finding| {
                let others = places.iter().filter(|(location, _)| **location != report.repository);
                let holding =
                    others.filter(|(_, place)| crate::verify::affected::holds(place, &finding.takes));
                holding.map(|(location, _)| location.clone()).collect()
            })
            .collect();
        copies.push(of_report);
    }
    drop(places);
    for (report, copies) in reports.iter_mut().zip(copies) {
        for (finding, also_in) in report.findings.iter_mut().zip(copies) {
            finding.also_in = also_in;
        }
    }
}

fn places<'a>(
    looked: &'a [(LineageRepository, Looked)],
    reports: &'a [RepositoryReport],
) -> Vec<(String, Place<'a>)> {
    let with_report = looked.iter().map(|(one, found)| {
        let location = one.location();
        let report = reports.iter().find(|report| report.repository == location);
        let findings = report.into_iter().flat_map(|report| &report.findings);
        let findings = findings.filter(|finding| finding.is_damage()).collect();
        (
            location,
            Place {
                catalog: &found.catalog,
                unrecorded: &found.unrecorded,
                findings,
                tail_ends: &found.tail_ends,
            },
        )
    });
    with_report.collect()
}

fn judge(looked: &[(LineageRepository, Looked)], reports: &[RepositoryReport]) -> Affected {
    if reports.iter().all(|report| report.damages() == 0) {
        return Affected::default();
    }
    let places: Vec<Place<'_>> = places(looked, reports).into_iter().map(|(_, place)| place).collect();
    affected(&places)
}

/// Gives stretches that cannot be reached the times around them, where summaries tell.
async fn add_times(repository: &LineageRepository, affected: &mut Affected) {
    let size = repository.lineage().segment_size;
    for stretch in affected.unreachable.iter_mut().take(TIMED_MAX) {
        stretch.from_time =
            look::time_near(repository, stretch.timeline, stretch.from_lsn, false, size).await;
        stretch.until_time =
            look::time_near(repository, stretch.timeline, stretch.until_lsn, true, size).await;
    }
}

/// Where parts of a flawed tail are stored up to.
type TailEnds = BTreeMap<SegmentName, Lsn>;
