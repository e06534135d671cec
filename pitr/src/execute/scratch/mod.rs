//! A restore to a scratch folder, a private server on it, and the clean-up: what drills and extracts share.
//!
//! The server listens on a Unix socket in a folder of its own user alone, archives nothing, loads no library that could
//! start something, and has files of nobody else. A marker in the folder says whose it is before anything else is
//! written; it is locked as long as that program lives, so what a killed one left is known, and removed by the next.

mod folder;
mod processes;
mod server;
mod sql;
mod tool;

pub use folder::{Removed, Scratch};
pub use server::{Private, Purpose, Stage, Up, bring_up, check, settings};
pub use sql::{conninfo_value, literal, quoted};
pub use tool::{Environment, Ran, run};
