//! PostgreSQL's own words and small files as types: pure, total, and free of any I/O.
//!
//! Everything above stands on this module. It never reads a clock, a file or the environment.

pub mod backup_label;
#[cfg(feature = "store")]
pub mod backup_manifest;
pub mod control;
pub mod incremental;
pub mod lsn;
pub mod page;
pub mod segment;
pub mod timeline;

pub use backup_label::BackupLabel;
#[cfg(feature = "store")]
pub use backup_manifest::{BackupManifest, ManifestFile, WalRange};
pub use control::ControlData;
pub use lsn::Lsn;
pub use segment::{SegmentName, SegmentSize, WalFileName};
pub use timeline::{HistoryEntry, TimelineHistory, TimelineId};

/// A transaction id as PostgreSQL's WAL writes it: 32 bits, wrapping, 0 is "none".
pub type Xid = u32;

/// A PostgreSQL object id (database, tablespace, relation file number).
pub type Oid = u32;

/// What was wrong with a small text or binary file of PostgreSQL's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct ParseError {
    what: String,
}

impl ParseError {
    /// Returns an error that says `what` was found instead of what was expected.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}
