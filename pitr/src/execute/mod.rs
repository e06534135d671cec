//! Carries plans out: loads what the planner asks for, and restores data directories.
//!
//! Nothing is chosen here. What a plan says is done as it says it, or fails.

mod configuration;
pub mod load;
mod load_index;
mod outside_settings;
pub mod restore;
mod unpack;

pub use load::{Planned, make_plan};
pub use restore::{Progress, RestoreOptions, RestoreReport, restore};
