//! How long a plan will take, judged by what restores took before.

use serde::Serialize;
use walship::catalog::{Phase, RestoreRecord};

use super::RestorePlan;

/// So many of the records that are most like the plan count.
const ALIKE_MAX: usize = 3;

/// A forecast, in milliseconds and bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Forecast {
    /// Until the backup's files are in place.
    pub restore_ms: u64,
    /// How fast they get there.
    pub restore_bytes_per_second: u64,
    /// From the server's start until the target is reached; `None` while no replay is on record.
    pub replay_ms: Option<u64>,
    /// How fast WAL is replayed.
    pub replay_bytes_per_second: Option<u64>,
    /// How many restores it is judged by.
    pub restores: usize,
}

impl Forecast {
    /// Returns the whole time, as far as it is known.
    pub fn total_ms(&self) -> u64 {
        self.restore_ms.saturating_add(self.replay_ms.unwrap_or_default())
    }
}

/// Returns the forecast for a plan; `None` while no restore is on record.
///
/// The rate is the median of the restores most alike in size: what a restore costs whatever its size (the start of
/// a server, the round trips) is in it as it is in those. Restores that found files in place say nothing of one that
/// does not, and those that did not succeed nothing of one that will.
pub fn forecast(plan: &RestorePlan, records: &[RestoreRecord]) -> Option<Forecast> {
    let whole = records.iter().filter(|record| tells(record)).map(|record| record.restore);
    let (restore_rate, restores) = rate(plan.backup.data_bytes, whole)?;
    let done = records.iter().filter(|record| record.succeeded());
    let replay = rate(plan.wal_replay_bytes, done.filter_map(|record| record.replay));
    let millis = |bytes: u64, rate: f64| (bytes as f64 / rate * 1000.0) as u64;
    Some(Forecast {
        restore_ms: millis(plan.backup.data_bytes, restore_rate),
        restore_bytes_per_second: restore_rate as u64,
        replay_ms: replay.map(|(rate, _)| millis(plan.wal_replay_bytes, rate)),
        replay_bytes_per_second: replay.map(|(rate, _)| rate as u64),
        restores,
    })
}

/// Returns whether these records are as many as count.
pub fn are_enough(records: &[RestoreRecord]) -> bool {
    records.iter().filter(|record| tells(record)).count() >= ALIKE_MAX
}

/// Returns whether a record tells how long it takes to get a whole backup's files into place.
fn tells(record: &RestoreRecord) -> bool {
    record.succeeded() && record.kept_bytes == 0
}

/// Returns bytes a second of the phases most alike in size, and how many those are.
fn rate(bytes: u64, phases: impl Iterator<Item = Phase>) -> Option<(f64, usize)> {
    let mut phases: Vec<Phase> = phases.filter(|phase| phase.bytes > 0 && phase.millis > 0).collect();
    let unlike = |phase: &Phase| (phase.bytes as f64 / bytes.max(1) as f64).ln().abs();
    phases.sort_by(|a, b| unlike(a).total_cmp(&unlike(b)));
    phases.truncate(ALIKE_MAX);
    let mut rates: Vec<f64> =
        phases.iter().map(|phase| phase.bytes as f64 * 1000.0 / phase.millis as f64).collect();
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).map(|rate| (*rate, rates.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_most_alike_in_size_count() {
        let phases = |list: &[(u64, u64)]| -> Vec<Phase> {
            list.iter().map(|(bytes, millis)| Phase { bytes: *bytes, millis: *millis }).collect()
        };
        let small =
            phases(&[(1_000, 1000), (1_100, 1000), (900, 1000), (1_000_000, 1000), (2_000_000, 1000)]);
        let found = rate(1_000, small.iter().copied()).unwrap();
        assert_eq!(found, (1000.0, 3));
        let large = rate(1_500_000, small.iter().copied()).unwrap();
        assert_eq!(large, (1_000_000.0, 3), "the median of two large ones and a small one");
        assert_eq!(rate(5, std::iter::empty()), None);
        assert_eq!(rate(0, phases(&[(0, 5), (5, 0)]).into_iter()), None);
    }
}
