//! What became of restores, and how long they took, goes into the repository's history; how long one will take is judged by
//! that.

use std::time::Duration;

use walship::Result;
use walship::catalog::{Phase, RestoreRecord};
use walship::repository::{LineageRepository, record_head};

use super::args::RestoreArgs;
use super::output;
use super::tried::{Ended, Tried};
use crate::execute::RestoreReport;
use crate::execute::start::{Started, State};
use crate::plan::{Forecast, RestorePlan, are_enough, forecast};
use crate::words::duration;

/// So many of the last restores are looked at; the second number, where among the first too few tell how long one takes.
const RECORDS_MAX: [usize; 2] = [5, 50];

/// Adds a forecast to a plan, where any restore is on record. A history that cannot be read is as good as none.
pub(super) async fn add(repository: &LineageRepository, plan: &mut RestorePlan) {
    match records(repository).await {
        Ok(records) => plan.forecast = forecast(plan, &records),
        Err(error) => tracing::debug!(%error, "the history of restores cannot be read"),
    }
}

async fn records(repository: &LineageRepository) -> Result<Vec<RestoreRecord>> {
    let [few, many] = RECORDS_MAX;
    let records = repository.recent_restores(few).await?;
    match records.len() == few && !are_enough(&records) {
        true => repository.recent_restores(many).await,
        false => Ok(records),
    }
}

/// Returns a forecast for people.
pub(super) fn text(plan: &RestorePlan, forecast: &Forecast) -> String {
    let replay = match forecast.replay_bytes_per_second {
        Some(rate) => {
            format!(", then {} of WAL at {}/s", output::bytes(plan.wal_replay_bytes), output::bytes(rate))
        }
        None => "; how long replay takes is not on record: --start watches it".to_owned(),
    };
    format!(
        "about {}: {} at {}/s{replay} (as in {} restores before)",
        duration(forecast.total_ms()),
        output::bytes(plan.backup.data_bytes),
        output::bytes(forecast.restore_bytes_per_second),
        forecast.restores
    )
}

/// What a restore did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    restore: Phase,
    kept_bytes: u64,
    replay: Option<Phase>,
}

impl Measured {
    pub(super) fn of(report: &RestoreReport, took: Duration, started: Option<&Started>) -> Self {
        let millis = |seconds: f64| (seconds * 1000.0) as u64;
        // A standby's replay has no end, and one that was broken off has no target.
        let ended =
            |started: &&Started| matches!(started.state, State::Open | State::Paused | State::Stopped);
        let replay = started.filter(ended).and_then(|started| {
            Some(Phase { bytes: started.replay_bytes?, millis: millis(started.replay_seconds?) })
        });
        Self {
            restore: Phase { bytes: report.data_bytes, millis: took.as_millis() as u64 },
            kept_bytes: report.delta.as_ref().map_or(0, |delta| delta.kept_bytes),
            replay,
        }
    }
}

/// Puts a restore into every repository's history; where that cannot be, a line on standard error says so.
pub(super) async fn record(args: &RestoreArgs, tried: &Tried, measured: Option<Measured>, ended: Ended) {
    let broken_off = Phase { bytes: 0, millis: tried.took().as_millis() as u64 };
    let record = RestoreRecord {
        head: record_head(tried.started, args.reason.as_deref(), rand::random()),
        outcome: ended.outcome.to_owned(),
        problem: ended.problem,
        backup: tried.backup.clone(),
        target: tried.target.clone(),
        restore: measured.map_or(broken_off, |measured| measured.restore),
        kept_bytes: measured.map_or(0, |measured| measured.kept_bytes),
        replay: measured.and_then(|measured| measured.replay),
    };
    tried.record("restore", &args.source, async |one| one.put_restore_record(&record).await).await;
}
