//! Carries plans out: loads what the planner and the log ask for, and restores data directories.
//!
//! Nothing is chosen here. What a plan says is done as it says it, or fails.

mod configuration;
mod delta;
pub mod drill;
mod existing;
pub mod expire;
pub mod extract;
pub mod info;
pub mod load;
mod load_index;
mod outside_settings;
mod parent_segments;
mod prove;
mod read_log;
pub mod restore;
pub mod scratch;
mod shared;
pub mod start;
pub mod surviving;
mod unpack;
pub mod verify;
mod writable;

pub(crate) use existing::{old_wal, wal_folders};
pub use load::{Planned, make_plan};
pub use prove::Proof;
pub use read_log::{Logged, read_log};
pub use restore::{Progress, RestoreOptions, RestoreReport, restore};
