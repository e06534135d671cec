//! walship beside other archivers, each as its users run it: PostgreSQL's own archiver and recovery call them.
//!
//! `benches/peers/install` fetches the peers. One that is not there has a line that says "absent".

mod backup;
mod bases;
mod calls;
mod cost;
mod database;
mod incremental;
mod load;
mod replay;
mod restored;
mod tools;
mod waiting;
mod world;

pub use backup::base_backups;
pub use calls::calls;
pub use incremental::incrementals;
pub use load::load;
pub use replay::replays;
pub use restored::restores;
pub use waiting::{first, waiting};

use std::time::Duration;

use crate::measure::median;

/// What one run of one tool cost.
#[derive(Debug, Clone, Copy)]
struct Run {
    wall: Duration,
    cpu: Duration,
    peak_bytes: u64,
}

/// The runs of one tool, or why there are none.
struct Line {
    name: String,
    settings: String,
    runs: Result<Vec<Run>, String>,
}

impl Line {
    fn runs(&self) -> &[Run] {
        self.runs.as_deref().unwrap_or(&[])
    }

    fn median_of(&self, value: impl Fn(&Run) -> f64) -> f64 {
        median(self.runs().iter().map(value).collect())
    }

    /// The median over the rounds of this line's value by the other's in the same round.
    fn beside(&self, other: &Self, value: impl Fn(&Run) -> f64) -> Option<f64> {
        let pairs = self.runs().iter().zip(other.runs());
        let ratios: Vec<f64> = pairs.map(|(own, other)| value(own) / value(other).max(1e-9)).collect();
        (!ratios.is_empty()).then(|| median(ratios))
    }
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}
