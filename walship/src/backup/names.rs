//! What databases and relations are called: the WAL holds numbers only, and names change.
//!
//! Read over ordinary sessions, one in each database, which the backup's role may not be let into. Without
//! names a backup is as good as any; what is missing is said.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::catalog::{DamagedPage, DatabaseNames, Names, RelationName};
use crate::error::{Error, Result};
use crate::pg::backup_manifest::BackupManifest;
use crate::pg::page::RelationFile;
use crate::pg::{Lsn, Oid};
use crate::replication::{ConnectOptions, Connection, Rows, SessionKind};
use crate::wal::event::RelFileLocator;

/// More databases are not asked.
const DATABASES_MAX: usize = 1000;

/// More relations are not named, in all databases together.
const RELATIONS_MAX: usize = 400_000;

/// So long all databases together may take; then the rest is left out.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the server is in the WAL, and its clock.
const POSITION: &str = "
    SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END,
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

const DATABASES: &str = "
    SELECT oid, datname, datallowconn AND datconnlimit <> -2
    FROM pg_database ORDER BY oid";

/// Relations with storage of their own, and for indexes and TOAST tables whose they are; which ones comes behind it. Takes
/// no locks.
const RELATIONS: &str = "
    SELECT c.oid, coalesce(nullif(c.reltablespace, 0), d.dattablespace), pg_relation_filenode(c.oid), n.nspname,
        c.relname, c.relkind, coalesce(i.indrelid, t.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_database d ON d.datname = current_database()
        LEFT JOIN pg_index i ON i.indexrelid = c.oid
        LEFT JOIN pg_class t ON c.relkind = 't' AND t.reltoastrelid = c.oid
    WHERE c.relpersistence <> 't' AND pg_relation_filenode(c.oid) IS NOT NULL AND ";

/// Of [`RELATIONS`] those that users made.
const OF_USERS: &str = "c.oid >= 16384";

/// Of [`RELATIONS`] the system's catalogs, those that all databases share among them.
const OF_THE_SYSTEM: &str = "c.oid < 16384";

/// Names as a server told them.
#[derive(Debug, Clone)]
pub struct NamesRead {
    /// They.
    pub names: Names,
    /// The server's position in the WAL before the first of them was read: its replay position on a standby.
    pub lsn: Lsn,
    /// When, by the server's clock.
    pub time: DateTime<Utc>,
    /// The system identifier of the server that told them.
    pub system_identifier: u64,
}

/// Says of damaged pages whose they are, by the names that were read; those of the system's catalogs, which are not among
/// them, are asked for.
///
/// What the server does not tell stays open.
pub(super) async fn name_pages(server: &ConnectOptions, read: &NamesRead, pages: &mut [DamagedPage]) {
    let deadline = Instant::now() + PATIENCE;
    let mut catalogs: HashMap<Oid, Vec<RelationName>> = HashMap::new();
    for page in pages {
        let Some(storage) = RelationFile::of(&page.path).map(storage_of) else { continue };
        let database = read.names.databases.iter().find(|database| database.oid == storage.database);
        page.database = database.map(|database| database.name.clone());
        let find = |relations: &[RelationName]| {
            let relation = relations.iter().find(|one| one.storage(storage.database) == storage)?;
            let name = format!("{}.{}", relation.schema, relation.name);
            // What all databases share is in none of them.
            Some(database.map_or(name.clone(), |database| format!("{}.{name}", database.name)))
        };
        page.relation = database.and_then(|database| find(&database.relations));
        if page.relation.is_some() {
            continue;
        }
        let from = database.map_or(&server.dbname, |database| &database.name);
        if let Entry::Vacant(unasked) = catalogs.entry(storage.database) {
            let asked = match Instant::now() < deadline {
                true => relations(server, from, OF_THE_SYSTEM, RELATIONS_MAX, read.system_identifier).await,
                false => Err(Error::unavailable("there are too many databases")),
            };
            let (found, _) = asked.unwrap_or_else(|error| {
                tracing::debug!(%error, "the catalogs of database {from:?} have no names");
                Default::default()
            });
            unasked.insert(found);
        }
        page.relation = catalogs.get(&storage.database).and_then(|relations| find(relations));
    }
}

/// Returns the names of a server's databases, and of the relations in each that lets us in.
///
/// # Errors
/// What connecting fails with; a database that cannot be read is one with [`DatabaseNames::unread`].
pub async fn read_names(server: &ConnectOptions) -> Result<NamesRead> {
    let deadline = Instant::now() + PATIENCE;
    let mut session = Connection::connect(server, SessionKind::Ordinary).await?;
    let who = session.query("SELECT system_identifier FROM pg_control_system()").await?;
    let system_identifier = field(&who, 0, 0)?;
    let position = session.query(POSITION).await?;
    let lsn: Lsn = field(&position, 0, 0)?;
    let time = DateTime::from_timestamp_micros(field(&position, 0, 1)?).ok_or_else(not_understood)?;
    let databases = session.query(DATABASES).await?;
    session.close().await;
    let mut names = Names { format: 1, databases: Vec::new() };
    let mut room = RELATIONS_MAX;
    for row in 0..databases.rows.len() {
        let (oid, name): (Oid, String) = (field(&databases, row, 0)?, field(&databases, row, 1)?);
        let mut database = DatabaseNames { oid, name, unread: None, relations: Vec::new() };
        if databases.get(row, 2) != Some("t") {
            database.unread = Some("it allows no connections".to_owned());
        } else if row >= DATABASES_MAX || Instant::now() >= deadline || room == 0 {
            database.unread = Some("there are too many databases or relations".to_owned());
        } else {
            match relations(server, &database.name, OF_USERS, room, system_identifier).await {
                Ok((relations, more)) => {
                    room -= relations.len();
                    database.relations = relations;
                    database.unread = more.then(|| "it has too many relations".to_owned());
                }
                Err(error) => database.unread = Some(error.to_string()),
            }
        }
        names.databases.push(database);
    }
    Ok(NamesRead { names, lsn, time, system_identifier })
}

/// Returns a database's relations of a kind, and whether there are more.
async fn relations(
    server: &ConnectOptions,
    database: &str,
    which: &str,
    room: usize,
    system_identifier: u64,
) -> Result<(Vec<RelationName>, bool)> {
    let mut options = server.clone();
    options.dbname = database.to_owned();
    let mut session = Connection::connect(&options, SessionKind::Ordinary).await?;
    // Of several hosts another may have answered.
    let who = session.query("SELECT system_identifier FROM pg_control_system()").await?;
    if field::<u64>(&who, 0, 0)? != system_identifier {
        return Err(Error::mismatch("the server that answered is another cluster's"));
    }
    session
        .query("SET statement_timeout = '60s'; SET lock_timeout = '5s'; SET search_path = pg_catalog")
        .await?;
    let rows = session.query(&format!("{RELATIONS} {which} ORDER BY c.oid LIMIT {}", room + 1)).await?;
    session.close().await;
    let mut relations = Vec::with_capacity(rows.rows.len().min(room));
    for row in 0..rows.rows.len().min(room) {
        relations.push(RelationName {
            oid: field(&rows, row, 0)?,
            tablespace: field(&rows, row, 1)?,
            filenode: field(&rows, row, 2)?,
            schema: field(&rows, row, 3)?,
            name: field(&rows, row, 4)?,
            kind: field(&rows, row, 5)?,
            of: rows.get(row, 6).map(|_| field(&rows, row, 6)).transpose()?,
            bytes: None,
        });
    }
    Ok((relations, rows.rows.len() > room))
}

/// Returns a column of a row as what it stands for.
///
/// # Errors
/// [`Error::Mismatch`] when it does not.
pub(super) fn field<T: std::str::FromStr>(rows: &Rows, row: usize, column: usize) -> Result<T> {
    rows.get(row, column).and_then(|text| text.parse().ok()).ok_or_else(not_understood)
}

fn not_understood() -> Error {
    Error::mismatch("the server's answer about its catalog is not understood")
}

/// Says of each relation how long its files are in a backup, all forks and parts together.
pub(super) fn add_sizes(names: &mut Names, manifest: &BackupManifest) {
    let mut bytes: HashMap<RelFileLocator, u64> = HashMap::new();
    for file in &manifest.files {
        if let Some(storage) = RelationFile::of(&file.path).map(storage_of) {
            let sum = bytes.entry(storage).or_default();
            *sum = sum.saturating_add(file.bytes);
        }
    }
    for database in &mut names.databases {
        for relation in &mut database.relations {
            relation.bytes = bytes.get(&relation.storage(database.oid)).copied();
        }
    }
}

/// Returns whose file it is: of database 0 where all databases share it.
fn storage_of(file: RelationFile) -> RelFileLocator {
    let RelationFile { tablespace, database, filenode, .. } = file;
    RelFileLocator { tablespace, database, relation: filenode }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_their_relations() {
        let storage =
            |tablespace, database, relation| Some(RelFileLocator { tablespace, database, relation });
        for (path, expected) in [
            ("base/5/16384", storage(1663, 5, 16384)),
            ("base/5/16384.12", storage(1663, 5, 16384)),
            ("base/5/16384_vm", storage(1663, 5, 16384)),
            ("base/5/16384_fsm.1", storage(1663, 5, 16384)),
            ("pg_tblspc/16500/PG_17_202406281/5/16384_init", storage(16500, 5, 16384)),
            ("pg_tblspc/16500/16384", None),
            ("base/5/pg_filenode.map", None),
            ("base/5/t3_16384", None),
            ("base/5", None),
            ("base/5/16384/1", None),
            ("global/1262", storage(1664, 0, 1262)),
            ("pg_xact/0000", None),
        ] {
            assert_eq!(RelationFile::of(path.as_ref()).map(storage_of), expected, "{path}");
        }
    }
}
