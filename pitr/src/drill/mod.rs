//! What a drill is judged by and reported as. Pure: the drill itself is carried out by `execute::drill`.
//!
//! One value is the report; text, JSON and the page are made from it, and so is the record in the history.

mod html;
mod moment;
mod text;

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::catalog::{BackupRecord, Catalog, DrillRecord, RecordHead};
use walship::pg::{Lsn, SegmentName};

use crate::plan::{ChainPart, RestorePlan, TransactionEnd};
use crate::words::duration;

pub use html::html;
pub use moment::{Span, moment};
pub use text::text;

/// The most problems that the record in the history names.
const PROBLEMS_MAX: usize = 20;

/// What came of a drill as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Everything that could be proven is, and the objectives are met.
    Proven,
    /// Everything is proven; an objective was missed.
    ObjectiveMissed,
    /// What was restored is not what it should be.
    NotProven,
    /// The drill could not be carried out.
    Failed,
    /// It was told to stop.
    Interrupted,
    /// No plan leads to the target.
    NoPlan,
}

impl Outcome {
    /// Returns its word in records and reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Proven => "proven",
            Self::ObjectiveMissed => "objective_missed",
            Self::NotProven => "not_proven",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::NoPlan => "no_plan",
        }
    }

    /// Returns the same for people.
    pub fn said(self) -> &'static str {
        match self {
            Self::Proven => "proven",
            Self::ObjectiveMissed => "proven, but an objective was missed",
            Self::NotProven => "NOT PROVEN",
            Self::Failed => "FAILED",
            Self::Interrupted => "interrupted",
            Self::NoPlan => "NO PLAN",
        }
    }
}

/// What came of one proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It holds.
    Proven,
    /// It does not.
    Failed,
    /// It could not be had, or was not asked for.
    Skipped,
}

/// A part of a drill that takes time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was done: `plan`, `restore`, `recovery`, `amcheck`, `row_counts`, `checks`, `stop`, `pages`, `clean_up`.
    pub name: &'static str,
    /// When it began, in milliseconds since the drill did.
    pub from_millis: u64,
    /// How long it took.
    pub millis: u64,
    /// How many bytes it was about, where that says something.
    pub bytes: Option<u64>,
}

/// One thing that was to be proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// `outcome`, `amcheck`, `row_counts`, `checks` or `pages`.
    pub what: &'static str,
    /// What came of it.
    pub verdict: Verdict,
    /// The same for people: what was compared, what was found, or why it was skipped.
    pub detail: String,
}

impl Proof {
    /// Returns one that holds.
    pub fn proven(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Proven, detail: detail.into() }
    }

    /// Returns one that does not hold.
    pub fn failed(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Failed, detail: detail.into() }
    }

    /// Returns one that could not be had.
    pub fn skipped(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Skipped, detail: detail.into() }
    }
}

/// What came of one of the user's checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Checked {
    /// The answer is the expected one.
    Passed,
    /// It is another one, or an error.
    Failed,
    /// There was none in time.
    TimedOut,
}

/// One of the user's checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its file's name, below the folder of checks.
    pub name: String,
    /// The database that it was run in.
    pub database: String,
    /// What came of it.
    pub result: Checked,
    /// How long it took.
    pub millis: u64,
    /// Expected and given answers, or the error; nothing where it passed.
    pub detail: Option<String>,
}

/// How many rows a table holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Count {
    /// The database.
    pub database: String,
    /// The table, with its schema; names as they are stored.
    pub table: String,
    /// Its rows; `None` where they could not be counted.
    pub rows: Option<u64>,
}

/// An objective and what was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Objective {
    /// What is to be achieved; `None` without an objective.
    pub objective_seconds: Option<u64>,
    /// What was measured; `None` where it was not reached.
    pub measured_millis: Option<u64>,
    /// Whether it is met; `None` without both.
    pub met: Option<bool>,
}

impl Objective {
    /// Compares what was measured with the objective.
    pub fn compare(objective_seconds: Option<u64>, measured_millis: Option<u64>) -> Self {
        let met =
            objective_seconds.zip(measured_millis).map(|(wanted, took)| took <= wanted.saturating_mul(1000));
        Self { objective_seconds, measured_millis, met }
    }
}

/// Both objectives of recovery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// From the drill's begin until the server was open.
    pub rto: Objective,
    /// The age of the newest commit that could be reached when the drill began.
    pub rpo: Objective,
}

/// What went wrong, in the three parts of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// What happened.
    pub error: String,
    /// What is still true.
    pub safe: String,
    /// What to do.
    pub next: String,
}

/// The report of a drill.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DrillReport {
    /// The format of this document; 1.
    pub format: u32,
    /// The drill's id.
    pub id: String,
    /// What came of it.
    pub outcome: Outcome,
    /// The cluster and the lineage.
    pub cluster: String,
    /// The lineage's number.
    pub lineage: u32,
    /// The machine that did it, and its user.
    pub host: String,
    /// The user.
    pub user: String,
    /// Why, in the operator's words.
    pub reason: Option<String>,
    /// When it began, by that machine's clock.
    pub started: DateTime<Utc>,
    /// How long it took, the clean-up too.
    pub millis: u64,
    /// Whether the target was chosen by chance.
    pub target_by_chance: bool,
    /// The target, as options.
    pub target: String,
    /// The same in words.
    pub target_words: String,
    /// The backup.
    pub backup: Option<String>,
    /// The bytes of its files.
    pub restored_bytes: u64,
    /// The server's version.
    pub server_version: Option<u32>,
    /// The last commit that is to be there.
    pub last_included: Option<TransactionEnd>,
    /// Where recovery is to end.
    pub planned_lsn: Option<Lsn>,
    /// Where it ended.
    pub ended_lsn: Option<Lsn>,
    /// What was done, in order.
    pub steps: Vec<Step>,
    /// What was to be proven.
    pub proofs: Vec<Proof>,
    /// The user's checks.
    pub checks: Vec<Check>,
    /// The rows of tables.
    pub row_counts: Vec<Count>,
    /// What was measured.
    pub objectives: Compared,
    /// Why it could not be carried out, where that is so.
    pub trouble: Option<Trouble>,
    /// Where what was restored is left, when it is to be kept.
    pub kept: Option<String>,
    /// What else is to be known.
    pub notes: Vec<String>,
}

impl DrillReport {
    /// Judges the drill by what is in the report; [`Outcome::Failed`] and its like are set by whoever knows them.
    pub fn judged(&self) -> Outcome {
        let missed = |objective: &Objective| objective.met == Some(false);
        if self.proofs.iter().any(|proof| proof.verdict == Verdict::Failed) {
            Outcome::NotProven
        } else if missed(&self.objectives.rto) || missed(&self.objectives.rpo) {
            Outcome::ObjectiveMissed
        } else {
            Outcome::Proven
        }
    }

    /// Returns what was not proven, missed or in the way, for people.
    pub fn problems(&self) -> Vec<String> {
        let failed = self.proofs.iter().filter(|proof| proof.verdict == Verdict::Failed);
        let mut problems: Vec<String> =
            failed.map(|proof| format!("{}: {}", title(proof.what), proof.detail)).collect();
        for (name, objective) in [("RTO", &self.objectives.rto), ("RPO", &self.objectives.rpo)] {
            if let (Some(false), Some(wanted), Some(took)) =
                (objective.met, objective.objective_seconds, objective.measured_millis)
            {
                problems.push(format!(
                    "{name}: {} instead of {}",
                    duration(took),
                    duration(wanted.saturating_mul(1000))
                ));
            }
        }
        problems.extend(self.trouble.as_ref().map(|trouble| trouble.error.clone()));
        problems
    }

    /// Returns what the history of a repository keeps of it; `read_here` says whether it proves that one.
    pub fn record(&self, read_here: bool) -> DrillRecord {
        let mut problems = self.problems();
        if problems.len() > PROBLEMS_MAX {
            let more = problems.len() - PROBLEMS_MAX;
            problems.truncate(PROBLEMS_MAX);
            problems.push(format!("and {more} more"));
        }
        DrillRecord {
            head: RecordHead {
                format: 1,
                id: self.id.clone(),
                started: self.started,
                host: self.host.clone(),
                user: self.user.clone(),
                reason: self.reason.clone(),
            },
            millis: self.millis,
            outcome: self.outcome.word().to_owned(),
            problems,
            target: self.target.clone(),
            backup: self.backup.clone(),
            restored_bytes: self.restored_bytes,
            recovery_millis: self.objectives.rto.measured_millis,
            newest_commit_age_millis: self.objectives.rpo.measured_millis,
            read_here: Some(read_here),
        }
    }
}

/// Returns whether a repository holds all that a plan takes, by its own catalog.
pub fn is_held(plan: &RestorePlan, own: &Catalog) -> bool {
    let size = own.lineage.segment_size;
    let has_part = |part: &ChainPart| {
        let numbers = part.first.number(size)..=part.last.number(size);
        numbers.into_iter().all(|number| {
            let Some(name) = SegmentName::from_number(part.first.timeline, number, size) else {
                return false;
            };
            let has_tail = || own.served_tail(name).is_some_and(|tail| part.until_lsn <= tail.until_lsn);
            own.segments.contains(name) || has_tail()
        })
    };
    let has_backup = |backup: &BackupRecord| own.backups.iter().any(|known| known.id == backup.id);
    let mut path = plan.timeline_path.iter();
    path.all(|part| own.history(part.timeline).is_some())
        && plan.backups().all(has_backup)
        && plan.chain.iter().all(has_part)
}

/// Returns what a step or a proof is called for people.
fn title(name: &str) -> &str {
    match name {
        "plan" => "plan",
        "restore" => "restore of the files",
        "recovery" => "recovery to the target",
        "outcome" => "ends where the plan says",
        "amcheck" => "pg_amcheck",
        "row_counts" => "row counts",
        "checks" => "SQL checks",
        "stop" => "stop",
        "pages" => "page checksums",
        "clean_up" => "clean-up",
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use chrono::TimeZone as _;

    use super::*;

    /// A report of a drill that something is wrong with, and whose names are hostile.
    pub(crate) fn report() -> DrillReport {
        let step = |name, from_millis, millis, bytes| Step { name, from_millis, millis, bytes };
        let check = |name: &str, result, detail: Option<&str>| Check {
            name: name.into(),
            database: "shop".into(),
            result,
            millis: 12,
            detail: detail.map(str::to_owned),
        };
        DrillReport {
            format: 1,
            id: "20270201T030000Z-00000000000000ff".into(),
            outcome: Outcome::NotProven,
            cluster: "main".into(),
            lineage: 1,
            host: "backup1".into(),
            user: "postgres".into(),
            reason: Some("monthly <drill> & \"more\"".into()),
            started: Utc.with_ymd_and_hms(2027, 2, 1, 3, 0, 0).unwrap(),
            millis: 754_000,
            target_by_chance: true,
            target: "--to-time '2027-01-20 10:00:00Z' --timeline 1".into(),
            target_words: "time 2027-01-20 10:00:00Z".into(),
            backup: Some("20270119T010000Z-0123456789abcdef".into()),
            restored_bytes: 48 << 30,
            server_version: Some(170_004),
            last_included: Some(TransactionEnd {
                xid: 4711,
                time: Utc.with_ymd_and_hms(2027, 1, 20, 9, 59, 59).unwrap(),
                lsn: Lsn(0x16_B374_D848),
                committed: true,
                dropped_relations: 0,
            }),
            planned_lsn: Some(Lsn(0x16_B374_D880)),
            ended_lsn: Some(Lsn(0x16_B374_D880)),
            steps: vec![
                step("plan", 0, 800, None),
                step("restore", 800, 420_000, Some(48 << 30)),
                step("recovery", 420_800, 180_000, Some(6 << 30)),
                step("amcheck", 600_800, 90_000, None),
                step("row_counts", 690_800, 1_000, None),
                step("checks", 691_800, 30_000, None),
                step("stop", 721_800, 2_000, None),
                step("pages", 723_800, 30_000, None),
                step("clean_up", 753_800, 200, None),
            ],
            proofs: vec![
                Proof::proven("outcome", "recovery ended at 16/B374D880; transaction 4711 is the last in it"),
                Proof::skipped("amcheck", "there is no pg_amcheck of PostgreSQL 17"),
                Proof::proven("row_counts", "2 tables counted"),
                Proof::failed("checks", "1 of 2 failed: <script>alert(1)</script>.sql"),
                Proof::proven("pages", "all page checksums are right"),
            ],
            checks: vec![
                check("orders.sql", Checked::Passed, None),
                check(
                    "<script>alert(1)</script>.sql",
                    Checked::TimedOut,
                    Some("no answer within 30 s: ]]> & '\"\u{1b}[2J"),
                ),
            ],
            row_counts: vec![
                Count { database: "shop".into(), table: "public.orders".into(), rows: Some(1_234_567) },
                Count { database: "shop".into(), table: "public.we\"ird <Name>".into(), rows: Some(0) },
            ],
            objectives: Compared {
                rto: Objective::compare(Some(900), Some(600_800)),
                rpo: Objective::compare(Some(300), Some(301_000)),
            },
            trouble: None,
            kept: None,
            notes: vec!["restored from the second repository".into()],
        }
    }

    #[test]
    fn a_drill_is_judged_by_its_proofs_then_by_its_objectives() {
        let mut report = report();
        assert_eq!(report.judged(), Outcome::NotProven);
        assert_eq!(report.problems().len(), 2, "{:?}", report.problems());
        report.proofs.retain(|proof| proof.verdict != Verdict::Failed);
        assert_eq!(report.judged(), Outcome::ObjectiveMissed);
        assert_eq!(report.problems(), ["RPO: 5 min 1 s instead of 5 min 0 s"]);
        report.objectives.rpo = Objective::compare(None, Some(301_000));
        assert_eq!(report.judged(), Outcome::Proven);
        assert!(report.problems().is_empty());
    }

    #[test]
    fn an_objective_is_met_up_to_its_last_millisecond() {
        for (wanted, took, met) in [
            (Some(900), Some(900_000), Some(true)),
            (Some(900), Some(900_001), Some(false)),
            (None, Some(1), None),
            (Some(1), None, None),
        ] {
            assert_eq!(Objective::compare(wanted, took).met, met, "{wanted:?} {took:?}");
        }
    }

    #[test]
    fn a_record_is_bounded() {
        let mut report = report();
        for number in 0..100 {
            report.proofs.push(Proof::failed("checks", format!("{number}")));
        }
        let record = report.record(true);
        assert_eq!(record.problems.len(), PROBLEMS_MAX + 1);
        assert_eq!((record.recovery_millis, record.outcome.as_str()), (Some(600_800), "not_proven"));
    }
}
