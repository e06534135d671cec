//! A server with a database that is worth a base backup.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::{process, wait};

use super::waiting::{archive_with, archiver};
use super::world::waiting_in;
use crate::tables::Effort;
use crate::wal::target_dir;

/// What is in the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// pgbench's own, of which two thirds are blanks.
    Pgbench,
    /// The same tables, with hexadecimal digits in the place of the blanks.
    Digits,
}

/// A stopped server's data directory, made once (some minutes) and kept in cargo's target folder.
pub(super) struct Database {
    data: PathBuf,
    rows: Rows,
}

impl Database {
    /// Returns the database, made if need be: more than 2 GB, or a tenth of that for a quick run.
    pub(super) fn new(rows: Rows, effort: Effort) -> Self {
        let scale = if effort.long_rounds > 1 { "150" } else { "10" };
        let name = match rows {
            Rows::Pgbench => "pgbench",
            Rows::Digits => "digits",
        };
        let folder = target_dir().join(format!("walship-bench/database-{}-{name}-{scale}", primary_major()));
        if !folder.join("made").is_file() {
            make(&folder, rows, scale);
        }
        Self { data: folder.join("data"), rows }
    }

    /// Returns its data directory.
    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    /// Copies it to a folder, to be changed there.
    pub(super) fn copy_to(&self, folder: &Path) -> Self {
        let data = folder.join("data");
        process::run_ok(Command::new("cp").arg("-a").arg(&self.data).arg(&data));
        Self { data, rows: self.rows }
    }

    /// Starts the server. It archives what it writes to nowhere until it is told otherwise.
    pub(super) fn server(&self) -> PgServer {
        fs::write(self.data.join("postgresql.auto.conf"), "archive_command = 'true'\n")
            .expect("the folder is ours");
        let server = PgServer::from_data_dir(&self.data)
            .setting("fsync", "on")
            .setting("archive_mode", "on")
            .setting("autovacuum", "off")
            .setting("checkpoint_timeout", "1h")
            .setting("max_wal_size", "8GB")
            .start();
        rest(&server);
        server
    }

    /// What the title of a table says about it.
    pub(super) fn title(&self, server: &PgServer) -> String {
        let rows = match self.rows {
            Rows::Pgbench => "pgbench's rows",
            Rows::Digits => "pgbench's tables with digits instead of blanks",
        };
        format!("{:.2} GB of databases, {rows}", gigabytes(server))
    }
}

/// Returns the size of all databases.
pub(super) fn gigabytes(server: &PgServer) -> f64 {
    let bytes = server.psql("SELECT sum(pg_database_size(oid))::int8 FROM pg_database");
    bytes.parse::<f64>().expect("a size is a number") / 1e9
}

/// Has nothing wait for the archiver, and nothing archived from now on.
pub(super) fn rest(server: &PgServer) {
    archive_with(server, "true");
    server.archive_now();
    wait::until("nothing waits", || waiting_in(server.data_dir()) == 0);
    let archiver = archiver(server);
    wait::until("the last call has ended", || process::descendants(archiver).is_empty());
}

fn make(folder: &Path, rows: Rows, scale: &str) {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).expect("the target folder is writable");
    let mut server = PgServer::builder(primary_major())
        .setting("autovacuum", "off")
        .setting("synchronous_commit", "off")
        .setting("max_wal_size", "4GB")
        .start();
    match rows {
        Rows::Pgbench => drop(server.pgbench(&["-i", "-q", "-s", scale])),
        Rows::Digits => {
            server.pgbench(&["-i", "-q", "-I", "dt", "-s", scale]);
            // In pieces, each of which takes a psql seconds; the digits are the same in every run.
            for piece in 0..scale.parse().expect("a scale is a number") {
                server.psql(&format!(
                    "INSERT INTO pgbench_accounts SELECT aid, {piece} + 1, 0, \
                     left(md5(aid::text) || md5((-aid)::text) || md5(aid || 'x'), 84) \
                     FROM generate_series({piece} * 100000 + 1, ({piece} + 1) * 100000) aid"
                ));
            }
            server.pgbench(&["-i", "-q", "-I", "vp", "-s", scale]);
        }
    }
    server.psql("CHECKPOINT");
    server.stop(StopMode::Fast);
    process::run_ok(Command::new("mv").arg(server.data_dir()).arg(folder.join("data")));
    fs::write(folder.join("made"), "").expect("the target folder is writable");
}
