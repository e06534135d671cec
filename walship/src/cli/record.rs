//! What was done goes into every repository's history. It is written after the deed: that it cannot be written is said,
//! and undoes nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use walship::catalog::{BackupRecord, BackupRun, ChangeRecord};
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::repository::{ClusterRepository, LineageRepository, note_configuration, record_head};

/// How long writing records may take: somebody may be waiting for the end.
const RECORDING_MAX: Duration = Duration::from_secs(30);

/// Records a change in these repositories.
pub(super) async fn change(
    lineages: &[LineageRepository],
    change: &str,
    what: impl Into<String>,
    reason: Option<&str>,
) {
    let head = record_head(Utc::now(), reason, rand::random());
    let settings = BTreeMap::new();
    let record = ChangeRecord { head, change: change.to_owned(), what: what.into(), settings };
    let puts = lineages.iter().map(|lineage| lineage.put_change_record(&record));
    say_unrecorded(lineages, within_bounds(futures_util::future::join_all(puts)).await);
}

/// Records what is configured, where that is another than before.
pub(super) async fn configuration(lineages: &[LineageRepository], overrides: &Overrides) {
    let noting = async {
        note_configuration(lineages, &Config::standing(overrides)?, None, rand::random()).await.map(drop)
    };
    match within_bounds(noting).await {
        Some(Ok(())) => {}
        Some(Err(error)) => super::say(&format!("note: what is configured is not in the history: {error}")),
        None => super::say("note: what is configured is not in the history: writing it took too long"),
    }
}

/// How a backup ended.
pub(super) enum Ended<'a> {
    Taken(&'a BackupRecord),
    Failed(&'a Error),
    /// By a signal.
    Interrupted,
}

/// Records a backup that was taken, or was to be taken.
pub(super) async fn backup(
    lineages: &[LineageRepository],
    (started, begun): (DateTime<Utc>, Instant),
    (backup, reason): (Option<String>, Option<&str>),
    ended: Ended<'_>,
) {
    let (outcome, problem, taken) = match ended {
        Ended::Taken(record) => match &record.damaged_pages {
            Some(pages) => ("damaged_pages", Some(format!("{} damaged pages", pages.total)), Some(record)),
            None => ("complete", None, Some(record)),
        },
        Ended::Failed(error) => ("failed", Some(error.to_string()), None),
        Ended::Interrupted => ("interrupted", None, None),
    };
    let record = BackupRun {
        head: record_head(started, reason, rand::random()),
        millis: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        outcome: outcome.to_owned(),
        problem,
        backup: taken.map(|record| record.id.clone()).or(backup),
        data_bytes: taken.map_or(0, |record| record.data_bytes),
        stored_bytes: taken.map_or(0, |record| record.stored_bytes),
    };
    let puts = lineages.iter().map(|lineage| lineage.put_backup_run(&record));
    say_unrecorded(lineages, within_bounds(futures_util::future::join_all(puts)).await);
}

/// Returns the newest lineage of each, as far as they can be had: where a deed failed before its own was known.
pub(super) async fn newest(clusters: &[ClusterRepository]) -> Vec<LineageRepository> {
    let newest =
        within_bounds(futures_util::future::join_all(clusters.iter().map(ClusterRepository::newest_lineage)));
    newest.await.unwrap_or_default().into_iter().flatten().collect()
}

async fn within_bounds<T>(doing: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(RECORDING_MAX, doing).await.ok()
}

fn say_unrecorded(lineages: &[LineageRepository], put: Option<Vec<Result<()>>>) {
    match put {
        None => super::say("note: this is not in the history of every repository: writing it took too long"),
        Some(put) => {
            for (lineage, put) in lineages.iter().zip(put) {
                if let Err(error) = put {
                    let place = lineage.location();
                    super::say(&format!("note: this is not in the history of {place}: {error}"));
                }
            }
        }
    }
}
