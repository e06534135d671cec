//! Gets tables out of a scratch server: finds them, and delivers them as a file or into a live server.

mod deliver;
mod find;
mod proof;
mod shape;

use serde::Serialize;
use walship::pg::Oid;

pub use deliver::{FileForm, Live, dump_to_file, load_into};
pub use find::{Found, Selection, Wanted, count, find};
pub use proof::{Removed, was_dropped};
pub use shape::{Shaped, shape, target_names};

/// A table that is extracted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Its schema and its name, as they are stored.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Its oid in the restored cluster.
    pub oid: Oid,
    /// Whether its rows are in its partitions.
    pub is_partitioned: bool,
    /// Whether it is unlogged: its rows survive no recovery.
    pub is_unlogged: bool,
    /// Its own rows, those of its children not counted.
    pub rows: Option<u64>,
    /// The schema that it arrived in.
    pub into_schema: Option<String>,
}

impl Table {
    /// Returns its name for people.
    pub fn shown(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}
