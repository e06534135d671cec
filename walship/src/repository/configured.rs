//! What is kept, promised and used as a repository stands in configuration files, which anybody may change who may write them:
//! that it is another than before is put on record by the next command that writes to the repository.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{TimeDelta, Utc};

use super::LineageRepository;
use super::history::record_head;
use crate::catalog::ChangeRecord;
use crate::config::Config;
use crate::error::{Error, Result};

/// So many of the last records are looked at for the last one of this machine.
const RECORDS_MAX: usize = 20;

/// How far the clocks of machines may differ.
const AHEAD_MAX: TimeDelta = TimeDelta::hours(1);

/// Puts on record, in each of these repositories of one lineage, what is configured on this machine, where the last such record
/// says otherwise: its own last one, so that machines that are configured differently are not told apart every night; the
/// last of any where it has none. Returns the record.
///
/// # Errors
/// What the stores say. Where some say it and others have written it, that is an error as well.
pub async fn note_configuration(
    lineages: &[LineageRepository],
    config: &Config,
    reason: Option<&str>,
    random: u64,
) -> Result<Option<ChangeRecord>> {
    let Some((first, others)) = lineages.split_first() else { return Ok(None) };
    let head = record_head(Utc::now(), reason, random);
    let mut known = first.clone().with_others(others.to_vec()).recent_configurations(RECORDS_MAX).await?;
    // One of a clock that was ahead would be the last one until that time has come.
    known.retain(|record| record.head.started <= head.started + AHEAD_MAX);
    let own = known.iter().find(|record| record.head.host == head.host);
    let before = own.or(known.first());
    let settings = config.promises();
    let (change, what) = match before {
        Some(before) if before.settings == settings => return Ok(None),
        Some(before) => ("configuration_changed", differences(&before.settings, &settings)),
        None => ("configuration_noted", differences(&BTreeMap::new(), &settings)),
    };
    let record = ChangeRecord { head, change: change.to_owned(), what, settings };
    let mut failed: Option<Error> = None;
    for one in lineages {
        if let Err(error) = one.put_configuration_record(&record).await {
            failed.get_or_insert(error.context(one.location()));
        }
    }
    failed.map_or(Ok(Some(record)), Err)
}

/// Returns what is another, in words.
fn differences(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> String {
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let words = keys.into_iter().filter_map(|key| match (before.get(key), after.get(key)) {
        (before, after) if before == after => None,
        (None, Some(after)) => Some(format!("{key} = {after}")),
        (Some(before), None) => Some(format!("{key} is no longer set (was {before})")),
        (Some(before), Some(after)) => Some(format!("{key} = {after} (was {before})")),
        (None, None) => None,
    });
    words.collect::<Vec<_>>().join("; ")
}

#[cfg(feature = "test-util")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Overrides;
    use crate::pg::SegmentSize;
    use crate::repository::Repository;
    use crate::storage::memory::MemoryStorage;

    fn config(repos: &[&str], variables: &[(&str, &str)]) -> Config {
        let flags = Overrides {
            config: Some("/dev/null".into()),
            repo: repos.iter().map(|url| (*url).to_owned()).collect(),
            cluster: Some("main".to_owned()),
            ..Overrides::default()
        };
        let value = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Config::read(&flags, &|name| value(name).map(|(_, value)| value.into())).unwrap()
    }

    #[tokio::test]
    async fn a_change_is_noted_once_and_in_words() {
        let now = chrono::DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let repository = Repository::create(Arc::new(MemoryStorage::default()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let lineage = [cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap()];
        let mut random = 0;
        let mut noted = async |config: Config| {
            random += 1;
            let record = note_configuration(&lineage, &config, Some("why"), random).await.unwrap();
            record.map(|record| (record.change, record.what))
        };
        let (window, secret) =
            (("WALSHIP_RETENTION_WINDOW", "14 days"), ("WALSHIP_S3_SECRET_ACCESS_KEY", "hush"));
        let first =
            noted(config(&["s3://walship/x"], &[window, secret, ("WALSHIP_RPO", "5m")])).await.unwrap();
        assert_eq!(first.0, "configuration_noted");
        assert_eq!(first.1, "repositories = s3://walship/x; retention.window = 14 days; rpo = 300 s");
        assert_eq!(noted(config(&["s3://walship/x"], &[window, ("WALSHIP_RPO", "300s")])).await, None);
        let second =
            noted(config(&["s3://walship/x", "file:///y"], &[("WALSHIP_RETENTION_WINDOW", "7 days")])).await;
        let (change, what) = second.unwrap();
        assert_eq!(change, "configuration_changed");
        assert_eq!(
            what,
            "repositories = s3://walship/x, file:///y (was s3://walship/x); retention.window = 7 days (was 14 days); rpo is no longer \
             set (was 300 s)"
        );
    }

    #[tokio::test]
    async fn machines_that_are_configured_differently_do_not_take_turns() {
        let now = chrono::DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let repository = Repository::create(Arc::new(MemoryStorage::default()), now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        let lineage = [cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap()];
        let ours = config(&["s3://walship/x"], &[]);
        assert!(note_configuration(&lineage, &ours, None, 1).await.unwrap().is_some());
        let theirs = config(&["s3://walship/x"], &[("WALSHIP_RPO", "5m")]).promises();
        // Another machine's, and one of a time when this one's clock was ahead.
        for (after, host) in [(TimeDelta::seconds(5), Some("elsewhere")), (TimeDelta::days(365), None)] {
            let mut head = record_head(Utc::now() + after, None, 2);
            head.host = host.map_or(head.host, str::to_owned);
            let (change, what) = ("configuration_changed".to_owned(), String::new());
            let record = ChangeRecord { head, change, what, settings: theirs.clone() };
            lineage[0].put_configuration_record(&record).await.unwrap();
            assert_eq!(note_configuration(&lineage, &ours, None, 3).await.unwrap(), None);
        }
        assert_eq!(lineage[0].recent_changes(9).await.unwrap().len(), 3);
    }
}
