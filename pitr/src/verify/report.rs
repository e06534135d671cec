//! What a verification came to.

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::{RecordHead, Seen, StandingDamage, VerifiedBackup, VerifyOutcome, VerifyRecord};

use super::Finding;
use super::affected::Affected;

/// What a verification came to, in all repositories.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Its id; the same in all repositories.
    pub id: String,
    /// When it began.
    pub started: DateTime<Utc>,
    /// How long it took, in milliseconds.
    pub millis: u64,
    /// The operator's name of the cluster.
    pub cluster: String,
    /// The lineage's number.
    pub lineage: u32,
    /// What was to be proven, in words.
    pub scope: String,
    /// The worst of what the repositories came to.
    pub outcome: VerifyOutcome,
    /// Each repository by itself.
    pub repositories: Vec<RepositoryReport>,
    /// The configured repositories that could not be opened.
    pub unreadable_repositories: Vec<String>,
    /// What can no longer be reached, whichever repository is read.
    pub affected: Affected,
    /// What else is to be known.
    pub notes: Vec<String>,
}

impl Report {
    /// Notes that the server was to be asked and could not be: whether the end of what is stored is missing is not known, however
    /// sound it is.
    pub fn note_unasked(&mut self, why: &str) {
        let unread = |outcome: &mut VerifyOutcome| {
            if matches!(outcome, VerifyOutcome::Sound | VerifyOutcome::Partly) {
                *outcome = VerifyOutcome::Unread;
            }
        };
        for found in &mut self.repositories {
            found.unread.push(Unread { object: "the server's position".to_owned(), why: why.to_owned() });
            unread(&mut found.outcome);
        }
        unread(&mut self.outcome);
    }
}

/// What was found in one repository.
#[derive(Debug, Serialize)]
pub struct RepositoryReport {
    /// The lineage's folder.
    pub repository: String,
    /// What it came to.
    pub outcome: VerifyOutcome,
    /// Objects that were read whole in this run.
    pub objects: u64,
    /// Bytes that were read in this run.
    pub bytes: u64,
    /// Pieces of the scope that were not read in this run.
    pub objects_left: u64,
    /// How many of them were never proven.
    pub never_proven: u64,
    /// When the object of the scope was last proven that was not read for longest; `null` where one never was.
    pub proven_since: Option<DateTime<Utc>>,
    /// From when on the run is that this one went on from, which was killed or interrupted; `null` for one that began anew.
    pub goes_on_from: Option<DateTime<Utc>>,
    /// Segments that were read, by timeline and in order.
    pub wal: Vec<VerifiedRange>,
    /// The backups in the scope.
    pub backups: Vec<VerifiedBackup>,
    /// What is not as it should be; at most [`RepositoryReport::FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How many findings there are in all.
    pub findings_total: u64,
    /// What could not be read, for a reason that is no damage.
    pub unread: Vec<Unread>,
    /// What is wrong with it at the end, also where that was not to be read; `None` where that cannot be noted.
    #[serde(skip)]
    pub standing: Option<StandingDamage>,
    /// What was seen in it, by now and before; `None` where it could not be looked at.
    #[serde(skip)]
    pub seen: Option<Seen>,
}

impl RepositoryReport {
    /// So many findings are kept one by one.
    pub const FINDINGS_MAX: usize = 20_000;

    /// Returns how many findings are damage.
    pub fn damages(&self) -> usize {
        self.findings.iter().filter(|finding| finding.is_damage()).count()
    }

    /// Returns the record of it for the repository's history.
    pub fn record(&self, report: &Report, head: RecordHead, whole: bool) -> VerifyRecord {
        let damages = self.findings.iter().filter(|finding| finding.is_damage());
        let damages = damages.map(|finding| format!("{}: {}", finding.object, finding.what));
        let unread =
            self.unread.iter().map(|unread| format!("{} could not be read: {}", unread.object, unread.why));
        let problems: Vec<String> = damages.chain(unread).collect();
        VerifyRecord {
            head,
            millis: report.millis,
            repository: self.repository.clone(),
            scope: report.scope.clone(),
            whole,
            outcome: self.outcome,
            problems_total: problems.len() as u64,
            problems: problems.into_iter().take(VerifyRecord::PROBLEMS_MAX).collect(),
            objects: self.objects,
            bytes: self.bytes,
            objects_left: self.objects_left,
            proven_since: self.proven_since,
            backups: self.backups.clone(),
            unreachable: report.affected.unreachable.len() as u64,
            standing: self.standing,
        }
    }
}

/// Consecutive segments that were read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedRange {
    /// The first segment.
    pub first: walship::pg::SegmentName,
    /// The last segment (inclusive).
    pub last: walship::pg::SegmentName,
    /// How many.
    pub segments: u64,
}

/// Something that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unread {
    /// What.
    pub object: String,
    /// Why.
    pub why: String,
}
