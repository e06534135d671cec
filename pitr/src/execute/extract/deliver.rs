//! Delivers what was found: a file by `pg_dump`, or by `pg_restore` into a live server, in one transaction.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use walship::replication::{ConnectOptions, Connection, SessionKind, options};
use walship::{Error, Result};

use super::{Found, Selection, Table, count};
use crate::execute::restore::blocking;
use crate::execute::scratch::{Environment, Scratch, Up, conninfo_value, literal, quoted, run};

/// The file in the scratch folder that is dumped to.
const DUMP: &str = "extract.dump";

/// How long the live server may take to answer a question.
const ANSWER: Duration = Duration::from_secs(60);

/// What a file is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileForm {
    /// For `pg_restore`.
    Custom,
    /// For `psql`.
    Sql,
}

impl FileForm {
    fn option(self) -> &'static str {
        match self {
            Self::Custom => "--format=custom",
            Self::Sql => "--format=plain",
        }
    }
}

/// Dumps what was found under its own names to `output`, which does not exist.
///
/// # Errors
/// [`Error::LocalIo`] when `pg_dump` fails, or the file cannot be written; [`Error::Conflict`] when it exists by now.
/// # Durability
/// After `Ok` the file is whole, and survives a crash.
pub async fn dump_to_file(
    scratch: &Scratch,
    up: &Up,
    pg_dump: &Path,
    (found, selection): (&Found, &Selection),
    (output, form): (&Path, FileForm),
    patience: Duration,
) -> Result<u64> {
    let mut arguments = vec![form.option().to_owned()];
    match selection {
        Selection::Tables(_) => arguments.extend(
            found
                .tables
                .iter()
                .map(|table| format!("--table={}.{}", quoted(&table.schema), quoted(&table.name))),
        ),
        Selection::Schema(schema) => arguments.push(format!("--schema={}", quoted(schema))),
        Selection::Database => {}
    }
    if !matches!(selection, Selection::Database) {
        arguments.push("--strict-names".to_owned());
    }
    let dumped = dump(scratch, up, pg_dump, &found.database, arguments, patience).await?;
    let output = output.to_owned();
    blocking(move || publish(&dumped, &output)).await
}

/// Runs `pg_dump` into the scratch folder.
async fn dump(
    scratch: &Scratch,
    up: &Up,
    pg_dump: &Path,
    database: &str,
    arguments: Vec<String>,
    patience: Duration,
) -> Result<PathBuf> {
    let file = scratch.folder().join(DUMP);
    let mut all = up.arguments();
    all.extend(arguments);
    all.push(format!("--file={}", file.display()));
    // A name with an = in it would be taken for a connection string.
    all.push(format!("--dbname=dbname={}", conninfo_value(database)));
    let ran = run(pg_dump, &all, Environment::Private, patience).await?;
    match ran.succeeded() {
        true => Ok(file),
        false => Err(Error::local_io(format!("pg_dump {}", ran.ended()))),
    }
}

/// Puts a file where it is to be: whole, or not at all, and over no other.
fn publish(from: &Path, output: &Path) -> Result<u64> {
    let failed = |error| Error::from_io(format!("writing {}", output.display()), error);
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary =
        tempfile::Builder::new().prefix(".pitr-extract").tempfile_in(folder).map_err(failed)?;
    let bytes = io::copy(&mut File::open(from).map_err(failed)?, temporary.as_file_mut()).map_err(failed)?;
    temporary.as_file().sync_all().map_err(failed)?;
    match temporary.persist_noclobber(output) {
        Ok(_) => {}
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::conflict(format!("{} is there already", output.display()))
                .with_next("Choose another file with --output."));
        }
        Err(error) => return Err(failed(error.error)),
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    // It is copied, and takes room.
    let _ = fs::remove_file(from);
    Ok(bytes)
}

/// A live server that tables are to arrive in.
#[derive(Debug)]
pub struct Live {
    conninfo: String,
    options: ConnectOptions,
    /// Its database.
    pub database: String,
    /// Where it is, for people and records; without secrets.
    pub shown: String,
    /// Its `server_version_num`.
    pub version: u32,
}

impl Live {
    /// Connects to the server of a connection string and looks whether tables can arrive there, in a schema of this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a connection string that makes no sense or holds a password, a server in recovery, or a
    /// schema that exists; [`Error::Denied`] where no schema may be made; as [`Connection::connect`].
    pub async fn look(conninfo: &str, schema: &str) -> Result<Self> {
        if options::argument_settings(conninfo)?.is_empty() {
            return Err(Error::invalid("--into names no server")
                .with_next("Name it, as in --into 'host=db1 dbname=shop user=admin'."));
        }
        let mut options = ConnectOptions::from_env_and_uri(conninfo)?;
        options.command_timeout = ANSWER;
        options.application_name = "pitr extract".to_owned();
        let mut connection = Connection::connect(&options, SessionKind::Ordinary)
            .await
            .map_err(|error| error.context("connecting to the server of --into"))?;
        let rows = connection
            .query(
                "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_database(), \
                 pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')",
            )
            .await?;
        let shown = format!("{}, database {}", connection.host(), rows.get(0, 1).unwrap_or_default());
        let refused = |what: String, next: &str| {
            Err(Error::invalid(what).with_safe("nothing was started").with_next(next))
        };
        if rows.get(0, 0) != Some("f") {
            return refused(
                format!("{shown} is a standby: nothing can be made in it"),
                "Name its primary with --into.",
            );
        }
        if rows.get(0, 2) != Some("t") {
            return Err(Error::denied(format!("user {} may make no schema in {shown}", options.user))
                .with_safe("nothing was started")
                .with_next("Connect as the owner of the database, or GRANT CREATE ON DATABASE."));
        }
        let live = Self {
            conninfo: conninfo.to_owned(),
            database: rows.get(0, 1).unwrap_or_default().to_owned(),
            version: connection.server_version()?,
            options,
            shown,
        };
        let taken = existing(&mut connection, [schema]).await?;
        connection.close().await;
        match taken.first() {
            None => Ok(live),
            Some(taken) => refused(
                format!("schema {taken:?} is there already in {}", live.shown),
                "Choose a name that is not taken with --into-schema, or leave it out. Nothing is ever written over.",
            ),
        }
    }
}

async fn existing<'a>(
    connection: &mut Connection,
    schemas: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<String>> {
    let names: Vec<String> = schemas.into_iter().map(literal).collect();
    let sql = format!("SELECT nspname FROM pg_catalog.pg_namespace WHERE nspname IN ({})", names.join(", "));
    let rows = connection.query(&sql).await?;
    Ok(rows.rows.iter().filter_map(|row| row.first()?.clone()).collect())
}

/// Dumps the fresh schemas and loads them into a live server, in one transaction; then compares the rows.
///
/// # Errors
/// [`Error::Mismatch`] when the live server refuses anything: nothing arrives then; or when rows differ.
pub async fn load_into(
    scratch: &Scratch,
    up: &Up,
    (pg_dump, pg_restore): (&Path, &Path),
    live: &Live,
    found: &Found,
    patience: Duration,
) -> Result<()> {
    let schemas: BTreeSet<&str> =
        found.tables.iter().filter_map(|table| table.into_schema.as_deref()).collect();
    let mut arguments = vec![FileForm::Custom.option().to_owned(), "--strict-names".to_owned()];
    arguments.extend(schemas.iter().map(|schema| format!("--schema={}", quoted(schema))));
    arguments.extend(
        [
            "--no-owner",
            "--no-privileges",
            "--no-publications",
            "--no-subscriptions",
            "--no-security-labels",
            "--no-tablespaces",
        ]
        .map(str::to_owned),
    );
    let file = dump(scratch, up, pg_dump, &found.database, arguments, patience).await?;
    let unchanged = "nothing arrived in it: all of it is one transaction, and that was rolled back";
    let arguments = [
        "--single-transaction".to_owned(),
        "--exit-on-error".to_owned(),
        "--no-owner".to_owned(),
        "--no-privileges".to_owned(),
        "--no-tablespaces".to_owned(),
        "-w".to_owned(),
        format!("--dbname={}", live.conninfo),
        file.display().to_string(),
    ];
    let ran = run(pg_restore, &arguments, Environment::Ours, patience).await?;
    if !ran.succeeded() {
        return Err(Error::mismatch(format!("{} took nothing: pg_restore {}", live.shown, ran.ended()))
            .with_safe(unchanged)
            .with_next(
                "What the tables need and is not there (a type, an extension, a function) has to be made first; or \
                 write a file with --output and load that as it suits.",
            ));
    }
    let mut options = live.options.clone();
    options.command_timeout = patience;
    let mut connection = Connection::connect(&options, SessionKind::Ordinary).await?;
    let schema = |table: &Table| table.into_schema.clone().unwrap_or_else(|| table.schema.clone());
    let counts = count(&mut connection, &found.tables, schema).await?;
    connection.close().await;
    for (table, arrived) in found.tables.iter().zip(counts) {
        if !table.is_partitioned && table.rows != Some(arrived) {
            return Err(Error::mismatch(format!(
                "{} has {arrived} rows where it arrived, and had {} at the target",
                table.shown(),
                table.rows.unwrap_or(0)
            ))
            .with_safe("nothing that was there before was changed")
            .with_next(
                "Do not use what arrived: drop the fresh schema, and look into the live server's log.",
            ));
        }
    }
    Ok(())
}
