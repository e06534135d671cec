//! Our own client of PostgreSQL's wire protocol: ordinary queries, physical replication sessions
//! and base backups.
//!
//! It decides nothing about backups or WAL: it hands on what the server sends. `message`,
//! `conninfo` and `passfile` are pure; `options` reads the environment once; `reach` finds the
//! server, `connection` is the socket loop. Called by `backup` and `receive`.
//!
//! ```no_run
//! use walship::replication::{ConnectOptions, Connection, SessionKind, identify_system};
//!
//! # async fn example() -> walship::Result<()> {
//! let options = ConnectOptions::from_env_and_uri("postgresql://replicator@db1:5432/")?;
//! let mut session = Connection::connect(&options, SessionKind::Replication).await?;
//! println!("{:?}", identify_system(&mut session).await?);
//! # Ok(())
//! # }
//! ```

pub mod base_backup;
mod buffers;
pub mod connection;
pub mod conninfo;
pub mod message;
pub mod options;
pub mod passfile;
pub mod position;
mod reach;
pub mod server_error;
pub mod slot;
pub mod stream;
mod synchronous;
mod tls;

pub use base_backup::{
    BackupPart, BackupStart, BaseBackup, BaseBackupOptions, Checkpoint, ManifestChecksums, upload_manifest,
};
pub use connection::{Connection, Rows, SUPPORTED_MAJORS, SessionKind};
pub use options::{ConnectOptions, Host, Origin};
pub use position::{Archiver, ServerPosition, Slot, server_position};
pub use server_error::ServerError;
pub use slot::{
    SlotLifetime, SlotState, SystemIdentity, check_slot_name, create_slot, drop_slot, identify_system,
    read_slot, segment_size, show, show_bytes, timeline_history,
};
pub use synchronous::StandbyRole;
