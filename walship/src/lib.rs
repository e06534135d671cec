//! walship ships a PostgreSQL cluster's WAL to a repository (a folder or an object store), so that
//! the cluster can be brought back to any chosen commit.
//!
//! Positions and names come first; everything else is built from them:
//!
//! ```
//! use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
//!
//! let lsn: Lsn = "A/4C000028".parse()?;
//! let segment = SegmentName::containing(TimelineId::FIRST, lsn, SegmentSize::DEFAULT);
//! assert_eq!(segment.to_string(), "000000010000000A0000004C");
//! # Ok::<(), walship::pg::ParseError>(())
//! ```
//!
//! `docs/ARCHITECTURE.md` draws the rooms and how data flows through them; `docs/repository-format.md`
//! is the byte-level description of what is stored.

#![warn(missing_docs)]

pub mod agent;
pub mod archive;
#[cfg(feature = "replication")]
pub mod backup;
pub mod catalog;
pub mod codec;
pub mod config;
pub mod durable;
pub mod error;
pub mod feed;
#[cfg(feature = "replication")]
pub mod observe;
#[cfg(feature = "pages")]
pub mod pages;
pub mod pg;
#[cfg(feature = "replication")]
pub mod receive;
#[cfg(feature = "replication")]
pub mod replication;
#[cfg(feature = "store")]
pub mod repository;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(feature = "store")]
pub mod spool;
pub mod storage;
pub mod wal;
pub mod watch;

pub use error::{Error, Result};
