//! WAL decoding: pages, records, transactions, segment summaries. Pure, incremental, total.
//!
//! Nothing here does I/O or trusts a byte: any input gives an answer, never a panic or a loop.

pub mod event;
pub mod summary;

pub use event::{EventKind, WalEvent};
pub use summary::SegmentSummary;
