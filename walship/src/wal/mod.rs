//! WAL decoding: pages, records, transactions, segment summaries. Pure, incremental, total.
//!
//! Nothing here does I/O or trusts a byte: any input gives an answer, never a panic or a loop.
//!
//! [`reader::Reader`] turns bytes into records, [`decode::decode`] records into [`WalEvent`]s,
//! [`scan::SegmentScanner`] a segment into a [`SegmentSummary`] and a verdict,
//! [`summary::join`] two neighbours into the record that lies across them, and [`events::events_of`]
//! segments into all their events.
//! [`rollup`] adds summaries up, 256 at a time.

mod block;
mod bytes;
mod crc;
pub mod decode;
pub mod deletes;
pub mod event;
pub mod events;
pub mod layout;
pub mod page;
pub mod reader;
pub mod record;
pub mod rollup;
pub mod scan;
pub mod summary;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
pub mod xact;

pub use event::{EventKind, WalEvent};
pub use events::events_of;
pub use scan::{SegmentScan, SegmentScanner, Verdict};
pub use summary::SegmentSummary;

#[cfg(test)]
mod tests;
