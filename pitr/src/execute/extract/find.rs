//! Which tables of which database are meant.

use std::time::Duration;

use walship::replication::{Connection, Rows};
use walship::{Error, Result};

use super::Table;
use crate::execute::scratch::{Up, literal, quoted};
use crate::log::{OidOrName, TableFilter};

/// How long a look into the catalogs may take.
pub(super) const LOOK: Duration = Duration::from_secs(300);

/// More tables are not taken one by one: their names would not fit on a command line.
const TABLES_MAX: usize = 10_000;

/// Schemas of the server's own.
const NOT_OWN: &str = "n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'";

/// What belongs to an extension comes with the extension.
const NO_EXTENSIONS: &str = "NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass \
     AND e.objid = c.oid AND e.deptype = 'e')";

/// A table that is asked for, and how that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// As it was written.
    pub words: String,
    /// What that means.
    pub filter: TableFilter,
}

/// What is to be extracted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// These tables, with their partitions and children.
    Tables(Vec<Wanted>),
    /// Everything in a schema.
    Schema(String),
    /// A whole database.
    Database,
}

impl Selection {
    /// Returns what it is, for people and records.
    pub fn shown(&self) -> String {
        match self {
            Self::Tables(tables) => {
                let words: Vec<&str> = tables.iter().map(|wanted| wanted.words.as_str()).collect();
                format!("table {}", words.join(", "))
            }
            Self::Schema(schema) => format!("schema {schema}"),
            Self::Database => "the whole database".to_owned(),
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The database.
    pub database: String,
    /// The tables, partitions and children among them.
    pub tables: Vec<Table>,
}

/// Finds what is meant: in the database that is named, else in the only one that has it.
///
/// # Errors
/// [`Error::Missing`] where nothing is that, [`Error::Invalid`] where several things are.
pub async fn find(up: &Up, selection: &Selection, database: Option<&str>) -> Result<Found> {
    let databases = up.databases().await?;
    if let Some(named) = database
        && !databases.iter().any(|one| one == named)
    {
        return Err(Error::missing(format!("there is no database {named:?} at that target"))
            .with_next(format!("There are: {}.", databases.join(", "))));
    }
    let looked_in: Vec<&String> =
        databases.iter().filter(|one| database.is_none_or(|named| *one == named)).collect();
    let mut found = Vec::new();
    let mut absent = Vec::new();
    for name in &looked_in {
        let mut connection = up.connect(name, LOOK).await?;
        match look(&mut connection, name, selection).await? {
            Ok(tables) => found.push(Found { database: (*name).clone(), tables }),
            Err(why) => absent.push(format!("{name}: {why}")),
        }
        connection.close().await;
    }
    match (&*found, selection) {
        ([one], Selection::Database) if looked_in.len() == 1 => Ok(one.clone()),
        ([one], Selection::Tables(_) | Selection::Schema(_)) => Ok(one.clone()),
        ([], _) => Err(Error::missing(format!(
            "{} is in no database at that target ({})",
            selection.shown(),
            absent.join("; ")
        ))
        .with_next(
            "Names are as they are stored, without quotes: `pitr log` tells them. Another target may be meant: it must be \
             before the drop and after the creation.",
        )),
        (several, _) => {
            let names: Vec<&str> = several.iter().map(|one| one.database.as_str()).collect();
            Err(Error::invalid(format!("{} is in several databases: {}", selection.shown(), names.join(", ")))
                .with_next("Name one of them with --dbname."))
        }
    }
}

/// Returns the tables in a database, or why it is not the one that is meant.
///
/// # Errors
/// [`Error::Invalid`] where a name means several tables, or there are too many.
async fn look(
    connection: &mut Connection,
    database: &str,
    selection: &Selection,
) -> Result<Result<Vec<Table>, String>> {
    let oids = match selection {
        Selection::Tables(wanted) => {
            let mut oids = Vec::new();
            for wanted in wanted {
                match table(connection, database, wanted).await? {
                    Some(oid) => oids.push(oid),
                    None => return Ok(Err(format!("no table {}", wanted.words))),
                }
            }
            oids
        }
        Selection::Schema(schema) => {
            let there = format!("SELECT FROM pg_catalog.pg_namespace WHERE nspname = {}", literal(schema));
            if connection.query(&there).await?.rows.is_empty() {
                return Ok(Err("no such schema".to_owned()));
            }
            oids(
                &tables_where(connection, &format!("n.nspname = {} AND {NO_EXTENSIONS}", literal(schema)))
                    .await?,
            )
        }
        Selection::Database => {
            oids(&tables_where(connection, &format!("{NOT_OWN} AND {NO_EXTENSIONS}")).await?)
        }
    };
    let tables = with_children(connection, &oids).await?;
    if tables.len() > TABLES_MAX {
        return Err(Error::invalid(format!("these are {} tables, more than {TABLES_MAX}", tables.len()))
            .with_next("Extract fewer of them at a time."));
    }
    Ok(Ok(tables))
}

/// Returns the oid of the table that is meant; `None` where none is.
pub(super) async fn table(
    connection: &mut Connection,
    database: &str,
    wanted: &Wanted,
) -> Result<Option<String>> {
    let named = match (&wanted.filter.table, &wanted.filter.schema) {
        (OidOrName::Oid(oid), _) => format!("c.oid = {oid}"),
        (OidOrName::Name(name), Some(schema)) => {
            format!("c.relname = {} AND n.nspname = {}", literal(name), literal(schema))
        }
        (OidOrName::Name(name), None) => format!("c.relname = {}", literal(name)),
    };
    let rows = tables_where(connection, &format!("{named} AND {NOT_OWN}")).await?;
    match &*rows.rows {
        [] => Ok(None),
        [_] => Ok(rows.get(0, 0).map(str::to_owned)),
        several => {
            let names: Vec<String> = several
                .iter()
                .filter_map(|row| Some(format!("{}.{}", row.get(1)?.as_ref()?, row.get(2)?.as_ref()?)))
                .collect();
            Err(Error::invalid(format!(
                "{} means several tables of database {database}: {}",
                wanted.words,
                names.join(", ")
            ))
            .with_next("Write SCHEMA.NAME."))
        }
    }
}

async fn tables_where(connection: &mut Connection, condition: &str) -> Result<Rows> {
    let sql = format!(
        "SELECT c.oid, n.nspname, c.relname FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND {condition} ORDER BY 2, 3"
    );
    connection.query(&sql).await
}

fn oids(rows: &Rows) -> Vec<String> {
    rows.rows.iter().filter_map(|row| row.first()?.clone()).collect()
}

/// Returns tables with all their partitions and children.
async fn with_children(connection: &mut Connection, oids: &[String]) -> Result<Vec<Table>> {
    if oids.is_empty() {
        return Ok(Vec::new());
    }
    let sql = format!(
        "WITH RECURSIVE tree(oid) AS (SELECT pg_catalog.unnest(ARRAY[{}]::pg_catalog.oid[]) \
         UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid) \
         SELECT n.nspname, c.relname, c.oid, c.relkind, c.relpersistence FROM tree \
         JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p') ORDER BY 1, 2",
        oids.join(", ")
    );
    let rows = connection.query(&sql).await?;
    let table = |row: &Vec<Option<String>>| match &**row {
        [Some(schema), Some(name), Some(oid), Some(kind), Some(persistence)] => Some(Table {
            schema: schema.clone(),
            name: name.clone(),
            oid: oid.parse().ok()?,
            is_partitioned: kind == "p",
            is_unlogged: persistence == "u",
            rows: None,
            into_schema: None,
        }),
        _ => None,
    };
    Ok(rows.rows.iter().filter_map(table).collect())
}

/// Returns how many rows each of the tables itself holds, where `schema` says it is.
///
/// # Errors
/// As a query.
pub async fn count(
    connection: &mut Connection,
    tables: &[Table],
    schema: impl Fn(&Table) -> String,
) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    for table in tables {
        if table.is_partitioned {
            counts.push(0);
            continue;
        }
        let name = format!("{}.{}", quoted(&schema(table)), quoted(&table.name));
        let rows = connection.query(&format!("SELECT pg_catalog.count(*) FROM ONLY {name}")).await?;
        let count = rows.get(0, 0).and_then(|text| text.parse().ok());
        counts.push(count.ok_or_else(|| Error::corrupt(format!("the server does not count {name}")))?);
    }
    Ok(counts)
}
