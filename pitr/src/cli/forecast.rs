//! How long restores took goes into the repository's history; how long one will take is judged by that.

use std::time::Duration;

use chrono::{DateTime, Utc};
use walship::catalog::{Phase, RecordHead, RestoreRecord};
use walship::repository::{LineageRepository, record_head};

use super::output;
use crate::execute::RestoreReport;
use crate::execute::start::{Started, State};
use crate::plan::{Forecast, RestorePlan, forecast};
use crate::words::duration;

/// So many of the last restores are looked at.
const RECORDS_MAX: usize = 5;

/// Adds a forecast to a plan, where any restore is on record. A history that cannot be read is as good as none.
pub(super) async fn add(repository: &LineageRepository, plan: &mut RestorePlan) {
    match repository.recent_restores(RECORDS_MAX).await {
        Ok(records) => plan.forecast = forecast(plan, &records),
        Err(error) => tracing::debug!(%error, "the history of restores cannot be read"),
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

/// Puts a restore into every repository's history; where that cannot be, a line on standard error says so.
pub(super) async fn record(
    repository: &LineageRepository,
    plan: &RestorePlan,
    report: &RestoreReport,
    begun: (DateTime<Utc>, Duration),
    started: Option<&Started>,
    reason: Option<&str>,
) {
    let record = record_of(plan, report, begun, started, record_head(begun.0, reason, rand::random()));
    for one in repository.each() {
        if let Err(error) = one.put_restore_record(&record).await {
            eprintln!(
                "note: the restore is not in the history of {}, and no forecast can be judged by it: {error}",
                one.location()
            );
        }
    }
}

fn record_of(
    plan: &RestorePlan,
    report: &RestoreReport,
    (_, took): (DateTime<Utc>, Duration),
    started: Option<&Started>,
    head: RecordHead,
) -> RestoreRecord {
    let millis = |seconds: f64| (seconds * 1000.0) as u64;
    // A standby's replay has no end, and one that was broken off has no target.
    let ended = |started: &&Started| matches!(started.state, State::Open | State::Paused | State::Stopped);
    let replay = started.filter(ended).and_then(|started| {
        Some(Phase { bytes: started.replay_bytes?, millis: millis(started.replay_seconds?) })
    });
    RestoreRecord {
        head,
        backup: plan.backup.id.clone(),
        target: plan.target_options.clone(),
        restore: Phase { bytes: report.data_bytes, millis: took.as_millis() as u64 },
        kept_bytes: report.delta.as_ref().map_or(0, |delta| delta.kept_bytes),
        replay,
    }
}
