//! The tables of `docs/benchmarks.md`, one function each.

mod codec;

pub use codec::{codecs, decoding, encoding};

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Rounds of things that take milliseconds.
    pub rounds: usize,
    /// Rounds of things that take seconds.
    pub long_rounds: usize,
}
