//! Changes that go into the repository's history.

use std::collections::BTreeMap;

use chrono::Utc;
use walship::catalog::ChangeRecord;
use walship::config::{Config, Overrides};
use walship::repository::{LineageRepository, note_configuration, record_head};

use super::output;

/// Puts a change into every repository's history; where that cannot be, a line on standard error says so.
pub(super) async fn record(repository: &LineageRepository, change: &str, what: String, reason: Option<&str>) {
    let head = record_head(Utc::now(), reason, rand::random());
    let record = ChangeRecord { head, change: change.to_owned(), what, settings: BTreeMap::new() };
    for one in repository.each() {
        if let Err(error) = one.put_change_record(&record).await {
            eprintln!(
                "note: this is not in the history of {}: {}",
                one.location(),
                output::clean(&error.to_string())
            );
        }
    }
}

/// Puts what is configured into every repository's history, where it is another than before.
pub(super) async fn configuration(
    repository: &LineageRepository,
    overrides: &Overrides,
    reason: Option<&str>,
) {
    let noting = async {
        let config = Config::standing(overrides)?;
        note_configuration(&repository.each(), &config, reason, rand::random()).await
    };
    if let Err(error) = noting.await {
        eprintln!("note: what is configured is not in the history: {}", output::clean(&error.to_string()));
    }
}
