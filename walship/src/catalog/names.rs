//! Which names databases and relations had at a moment: what the WAL's object ids stand for.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, Oid, TimelineId};
use crate::wal::event::RelFileLocator;

/// Where a backup's names are stored, as its record tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedNames {
    /// The server's position in the WAL before the first of them was read: later events can be named.
    pub lsn: Lsn,
    /// The timeline that the position is on.
    pub timeline: TimelineId,
    /// When they were read, by the server's clock.
    pub time: DateTime<Utc>,
    /// The BLAKE3 digest of the stored object, in hex.
    pub digest: String,
}

/// The names of a server's databases and of the relations in them (`backups/<id>/names.json.zst`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The format of this document; 1.
    pub format: u32,
    /// Every database.
    pub databases: Vec<DatabaseNames>,
}

/// One database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseNames {
    /// Its oid.
    pub oid: Oid,
    /// Its name.
    pub name: String,
    /// Why its relations are not listed, or not all of them; `None` when they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
    /// Its relations with storage; those of the system catalogs and temporary ones left out.
    #[serde(default)]
    pub relations: Vec<RelationName>,
}

/// One relation with storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationName {
    /// Its `pg_class` oid.
    pub oid: Oid,
    /// Its tablespace's oid; never 0.
    pub tablespace: Oid,
    /// The number of its storage.
    pub filenode: Oid,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// `pg_class.relkind`: `r` table, `i` index, `S` sequence, `t` TOAST table, `m` materialized view.
    pub kind: char,
    /// Of an index or a TOAST table, the oid of the relation that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<Oid>,
    /// The bytes of its files in the backup; `None` where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

impl RelationName {
    /// Returns where its storage lies.
    pub fn storage(&self, database: Oid) -> RelFileLocator {
        RelFileLocator { tablespace: self.tablespace, database, relation: self.filenode }
    }
}
