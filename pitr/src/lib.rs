//! pitr turns "14:29:59.8, just before the DROP" into an exact restore plan, and carries it out.
//!
//! [`target`] reads what the DBA asked for, [`plan`] chooses base backup, timeline path and segment
//! chain by PostgreSQL's own stopping rules, [`log`] tells what happened, [`recovery_settings`] renders what
//! the restored server is told. These four are pure.
//!
//! ```
//! use pitr::target::TargetWords;
//!
//! let words = TargetWords { time: Some("2026-03-01 14:29:59.8 Europe/Berlin".into()), ..TargetWords::default() };
//! let target = words.parse(|_| Vec::new())?;
//! assert_eq!(target.to_string(), "time 2026-03-01 13:29:59.8Z = 2026-03-01 14:29:59.8+01:00 (Europe/Berlin)");
//! # Ok::<(), pitr::target::TargetError>(())
//! ```

#![warn(missing_docs)]

pub mod cli;
pub mod drill;
pub mod execute;
pub mod inherited;
pub mod log;
pub mod page;
pub mod plan;
pub mod recovery_settings;
pub mod retention;
pub mod target;
pub mod verify;
pub mod words;
