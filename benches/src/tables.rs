//! The tables of `docs/benchmarks.md`, one function each.

mod backup;
mod codec;
mod process;

pub use backup::backups;
pub use codec::{codecs, decoding, encoding};
pub use process::processes;

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Rounds of things that take milliseconds.
    pub rounds: usize,
    /// Rounds of things that take seconds.
    pub long_rounds: usize,
}
