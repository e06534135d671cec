//! Row counts: every row of a table is read once, which proves that it can be.

use std::time::{Duration, Instant};

use walship::replication::Connection;
use walship::{Error, Result};

use crate::drill::{Count, Proof};
use crate::execute::scratch::{Up, literal, quoted};

/// More tables than this are not counted one by one.
const TABLES_MAX: usize = 20_000;

/// How many failures are named.
const FAILURES_MAX: usize = 5;

/// Which tables' rows are counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Counted {
    /// None.
    None,
    /// Those of all tables of all databases.
    All,
    /// Those of these, each with its schema; in whatever database they are.
    Tables(Vec<(String, String)>),
}

/// A table, as it is in the catalogs.
struct Table {
    schema: String,
    name: String,
    is_partitioned: bool,
}

pub(super) async fn prove(up: &Up, counted: &Counted, patience: Duration) -> Result<(Proof, Vec<Count>)> {
    let deadline = Instant::now() + patience;
    let (mut counts, mut failures) = (Vec::new(), Vec::new());
    let mut more = false;
    for database in up.databases().await? {
        let mut connection = up.connect(&database, patience).await?;
        for table in tables(&mut connection, counted).await? {
            if counts.len() == TABLES_MAX {
                more = true;
                break;
            }
            let shown = format!("{}.{}", table.schema, table.name);
            let rows = match count(&mut connection, &table, deadline).await {
                Ok(rows) => Some(rows),
                Err(error) => {
                    failures.push(format!("{database} {shown}: {error}"));
                    // What is left of the session nobody knows.
                    connection = up.connect(&database, patience).await?;
                    None
                }
            };
            counts.push(Count { database: database.clone(), table: shown, rows });
            if Instant::now() > deadline {
                break;
            }
        }
        connection.close().await;
        if Instant::now() > deadline {
            failures.push(format!("not all tables were counted within {} s", patience.as_secs()));
            break;
        }
    }
    if let Counted::Tables(wanted) = counted {
        let found = |name: &str| counts.iter().any(|count| count.table == name);
        let absent = wanted.iter().map(|(schema, name)| format!("{schema}.{name}"));
        failures.extend(absent.filter(|name| !found(name)).map(|name| format!("{name} is in no database")));
    }
    let proof = match &*failures {
        [] => {
            let first = if more { ", the first of them" } else { "" };
            let rows = counts.iter().filter_map(|count| count.rows).fold(0u64, u64::saturating_add);
            Proof::proven("row_counts", format!("{} tables{first}, {rows} rows, all read", counts.len()))
        }
        failures => {
            let shown = failures[..failures.len().min(FAILURES_MAX)].join("; ");
            let more = failures.len().saturating_sub(FAILURES_MAX);
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            Proof::failed("row_counts", format!("{shown}{more}"))
        }
    };
    Ok((proof, counts))
}

/// Returns the tables of a database that are to be counted. Partitions are counted one by one where all are, and
/// unlogged tables are empty after every recovery.
async fn tables(connection: &mut Connection, counted: &Counted) -> Result<Vec<Table>> {
    let which = match counted {
        Counted::None => return Ok(Vec::new()),
        Counted::All => "c.relkind IN ('r', 'm') AND n.nspname <> 'information_schema' \
             AND n.nspname NOT LIKE 'pg\\_%'"
            .to_owned(),
        Counted::Tables(tables) => {
            let pairs: Vec<String> = tables
                .iter()
                .map(|(schema, name)| format!("({}, {})", literal(schema), literal(name)))
                .collect();
            format!("c.relkind IN ('r', 'm', 'p') AND (n.nspname, c.relname) IN ({})", pairs.join(", "))
        }
    };
    let rows = connection
        .query(&format!(
            "SELECT n.nspname, c.relname, c.relkind FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relpersistence = 'p' AND (c.relkind <> 'm' OR c.relispopulated) AND {which} ORDER BY 1, 2 \
             LIMIT {}",
            TABLES_MAX + 1
        ))
        .await?;
    let table = |row: &Vec<Option<String>>| match &**row {
        [Some(schema), Some(name), Some(kind)] => {
            Some(Table { schema: schema.clone(), name: name.clone(), is_partitioned: kind == "p" })
        }
        _ => None,
    };
    Ok(rows.rows.iter().filter_map(table).collect())
}

async fn count(connection: &mut Connection, table: &Table, deadline: Instant) -> Result<u64> {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
    connection.query(&format!("SET statement_timeout = {}", left.min(i32::MAX as u128))).await?;
    let only = if table.is_partitioned { "" } else { "ONLY " };
    let sql =
        format!("SELECT pg_catalog.count(*) FROM {only}{}.{}", quoted(&table.schema), quoted(&table.name));
    let rows = connection.query(&sql).await?;
    rows.get(0, 0)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::corrupt("the server does not say how many"))
}
