//! What is to be known of a cluster's archive at a glance, and what of it is wrong: one function decides for all who
//! tell it, the monitor's line, the metrics and the notices.
//!
//! Pure: `observe` fills the [`Facts`], `serve` and the commands hand out what is made of them here. Nothing here looks
//! anywhere itself, and time is an argument.

mod facts;
mod kind;
pub mod metrics;
pub mod monitor;
mod problems;
mod reach;
pub mod steady;
mod transactions;

pub use facts::{
    BackupFacts, BackupKind, Contents, Disk, DiskPlace, DrillFacts, ExpireFacts, Facts, RepositoryFacts,
    ServerAnswer, ServerFacts, SlotFacts, VerificationFacts, WindowFacts, backup_kinds,
};
pub use kind::{Absence, Kind, Problem, Severity};
pub use problems::{Limits, absence, problems};
pub use reach::{Hole, Reach, end_of_way, left_holes, reach, stored_at};
pub use transactions::{Ended, Transactions};
