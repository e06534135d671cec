//! What is to be known of a cluster's archive at a glance, and what of it is wrong: one function decides for all who
//! tell it, the monitor's line, the metrics and the notices.
//!
//! Pure: `observe` fills the [`Facts`], `serve` and the commands hand out what is made of them here. Nothing here looks
//! anywhere itself, and time is an argument.

mod facts;
pub mod metrics;
pub mod monitor;
mod problems;
mod reach;
pub mod steady;

pub use facts::{
    BackupFacts, BackupKind, Contents, Disk, DiskPlace, DrillFacts, ExpireFacts, Facts, RepositoryFacts,
    ServerAnswer, ServerFacts, SlotFacts, VerificationFacts, WindowFacts, backup_kinds,
};
pub use problems::{Kind, Limits, Problem, Severity, is_known, problems};
pub use reach::{Reach, reach};
