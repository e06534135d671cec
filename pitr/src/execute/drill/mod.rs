//! Carries a drill out on a scratch server: the proofs, one after the other, each within a time of its own.
//!
//! What the server holds is proven here; what that makes of the drill is judged by `crate::drill`.

mod amcheck;
mod checks;
mod counts;
mod outcome;
mod pages;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use walship::Result;

use super::scratch::{Private, Scratch, Up};
use crate::drill::{Checked, DrillReport, Proof, Step, Verdict};

pub use checks::{CheckFile, read_checks};
pub use counts::Counted;
pub use outcome::prove as prove_outcome;

/// What is proven, and how long that may take.
#[derive(Debug, Clone)]
pub struct ProofOptions {
    /// The user's checks.
    pub checks: Vec<CheckFile>,
    /// The database of those that do not say another.
    pub checks_database: String,
    /// How long one of them may take.
    pub check_patience: Duration,
    /// Whether `pg_amcheck` is run.
    pub amcheck: bool,
    /// Which tables' rows are counted.
    pub counted: Counted,
    /// How long each of the other proofs may take.
    pub proof_patience: Duration,
    /// The folder of PostgreSQL's programs, where it was named.
    pub pg_bin: Option<PathBuf>,
}

/// Measures the steps of a drill from its begin.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Returns one that begins now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Returns the milliseconds since it began.
    pub fn millis(self) -> u64 {
        millis(self.0.elapsed())
    }

    /// Notes a step that began at `from_millis` and ends now.
    pub fn note(self, report: &mut DrillReport, name: &'static str, from_millis: u64, bytes: Option<u64>) {
        let millis = self.millis().saturating_sub(from_millis);
        report.steps.push(Step { name, from_millis, millis, bytes });
    }
}

/// Returns a time in milliseconds.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Proves what a scratch server holds, and stops it. Whatever is found goes into the report.
///
/// # Errors
/// When the proofs cannot be carried out: the server does not answer, or does not stop.
pub async fn prove(
    scratch: &Scratch,
    private: &Private<'_>,
    up: &Up,
    options: &ProofOptions,
    clock: Clock,
    report: &mut DrillReport,
) -> Result<()> {
    report.proofs.push(outcome::prove(private.plan, up).await?);
    let from = clock.millis();
    // Before anything else reads the data: what is damaged is named best there.
    report.proofs.push(amcheck::prove(private, up, options).await?);
    if options.amcheck {
        clock.note(report, "amcheck", from, None);
    }
    if options.counted != Counted::None {
        let from = clock.millis();
        let (proof, counts) = counts::prove(up, &options.counted, options.proof_patience).await?;
        report.proofs.push(proof);
        report.row_counts = counts;
        clock.note(report, "row_counts", from, None);
    }
    if !options.checks.is_empty() {
        let from = clock.millis();
        for check in &options.checks {
            report.checks.push(checks::run(up, check, options).await);
        }
        report.proofs.push(judge_checks(report));
        clock.note(report, "checks", from, None);
    }
    let from = clock.millis();
    up.stop(&private.pg_ctl).await?;
    clock.note(report, "stop", from, None);
    let from = clock.millis();
    report.proofs.push(pages::prove(&scratch.data_dir(), private.plan, options).await?);
    clock.note(report, "pages", from, None);
    Ok(())
}

fn judge_checks(report: &DrillReport) -> Proof {
    let bad: Vec<&str> = report
        .checks
        .iter()
        .filter(|check| check.result != Checked::Passed)
        .map(|check| check.name.as_str())
        .collect();
    let all = report.checks.len();
    match &*bad {
        [] => Proof::proven("checks", format!("all {all} answered as expected")),
        _ => Proof {
            what: "checks",
            verdict: Verdict::Failed,
            detail: format!("{} of {all} did not: {}", bad.len(), bad.join(", ")),
        },
    }
}

/// Returns a path for the command line of one of PostgreSQL's programs.
fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
