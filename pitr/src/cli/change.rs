//! Changes that go into the repository's history.

use chrono::Utc;
use walship::catalog::ChangeRecord;
use walship::repository::{LineageRepository, record_head};

use super::output;

/// Puts a change into every repository's history; where that cannot be, a line on standard error says so.
pub(super) async fn record(repository: &LineageRepository, change: &str, what: String, reason: Option<&str>) {
    let head = record_head(Utc::now(), reason, rand::random());
    let record = ChangeRecord { head, change: change.to_owned(), what };
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
