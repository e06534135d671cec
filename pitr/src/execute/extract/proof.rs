//! Whether a drop of which the archive knows no name was that of a table: a server tells that was recovered to just
//! before it.

use std::collections::BTreeSet;

use walship::pg::Oid;
use walship::replication::Connection;
use walship::wal::event::RelFileLocator;
use walship::{Error, Result};

use super::Wanted;
use super::find::{LOOK, table};
use crate::execute::scratch::Up;
use crate::log::RemovalRecord;

/// What a server that was recovered to just before a drop says of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// The drop took it away; how that is known.
    This(String),
    /// It did not; why.
    Other(String),
}

/// Returns whether what `record` says was taken away is the table: it is there by that name, its storage, or that of
/// each of its partitions, is what the record removes, and where the record lists what it dropped, it is listed.
///
/// # Errors
/// [`Error::Invalid`] where the name means several tables; as a query.
pub async fn was_dropped(
    up: &Up,
    wanted: &Wanted,
    database: Option<&str>,
    record: &RemovalRecord,
) -> Result<Removed> {
    let other = |why: String| Ok(Removed::Other(why));
    let databases: BTreeSet<Oid> =
        record.storage.iter().map(|one| one.database).filter(|one| *one != 0).collect();
    let Some(oid) = databases.first().filter(|_| databases.len() == 1) else {
        return other("it removed nothing of one database".to_owned());
    };
    let mut connection = up.connect(up.any_database(), LOOK).await?;
    let sql = format!("SELECT datname FROM pg_catalog.pg_database WHERE oid = {oid}");
    let name = connection.query(&sql).await?.get(0, 0).map(str::to_owned);
    connection.close().await;
    let Some(name) = name else { return other(format!("there is no database {oid}")) };
    if database.is_some_and(|asked| asked != name) {
        return other(format!("what it removed was in database {name}"));
    }
    let mut connection = up.connect(&name, LOOK).await?;
    let found = match table(&mut connection, &name, wanted).await? {
        Some(table) => Some(storage(&mut connection, *oid, &table).await?),
        None => None,
    };
    connection.close().await;
    let Some(found) = found else {
        return other(format!("there is no such table in database {name}, where it removed something"));
    };
    let is_listed = |one: &Oid| record.dropped.as_ref().is_none_or(|dropped| dropped.contains(one));
    let Some((_, first)) = found.storage.first() else {
        return other(format!("the table of database {name} has no storage"));
    };
    if !found.storage.iter().all(|(_, storage)| record.storage.contains(storage)) {
        return other(format!("the table of database {name} has other storage than what it removed"));
    }
    if !is_listed(&found.table) || !found.storage.iter().all(|(relation, _)| is_listed(relation)) {
        return other(format!("the table of database {name} got new storage by it, and was not dropped"));
    }
    let storage = format!("{}/{}/{}", first.tablespace, first.database, first.relation);
    Ok(Removed::This(format!(
        "the drop has no name in the archive; just before it the table is there, in database {name}, and its storage ({storage}) \
         is what the drop removed"
    )))
}

/// A table and the storage of its rows.
struct Stored {
    table: Oid,
    /// Its own, or that of its partitions, each with the relation's oid.
    storage: Vec<(Oid, RelFileLocator)>,
}

async fn storage(connection: &mut Connection, database: Oid, table: &str) -> Result<Stored> {
    let sql = format!(
        "WITH RECURSIVE tree(oid, relkind) AS (SELECT c.oid, c.relkind FROM pg_catalog.pg_class c WHERE c.oid = {table} \
         UNION SELECT c.oid, c.relkind FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid \
         JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid WHERE tree.relkind = 'p') \
         SELECT c.oid, CASE c.reltablespace WHEN 0 THEN d.dattablespace ELSE c.reltablespace END, \
         pg_catalog.pg_relation_filenode(c.oid) FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid \
         JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database() \
         WHERE pg_catalog.pg_relation_filenode(c.oid) IS NOT NULL ORDER BY 1"
    );
    let rows = connection.query(&sql).await?;
    let number = |text: Option<&str>| {
        text.and_then(|text| text.parse::<Oid>().ok()).ok_or_else(|| {
            Error::corrupt(format!("the server does not say where relation {table} is stored"))
        })
    };
    let mut storage = Vec::new();
    for row in 0..rows.rows.len() {
        let (tablespace, relation) = (number(rows.get(row, 1))?, number(rows.get(row, 2))?);
        storage.push((number(rows.get(row, 0))?, RelFileLocator { tablespace, database, relation }));
    }
    Ok(Stored { table: number(Some(table))?, storage })
}
