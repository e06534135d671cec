//! A base backup and a restore of about 1 GB, beside `pg_basebackup`.

use std::fmt::Write as _;
use std::fs;

use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;

use super::Effort;
use super::process::text;
use crate::measure::{Contender, compete, process, table};

/// pgbench's scale for about 1 GB.
const SCALE: &str = "66";

/// Base backup and restore.
pub fn backups(effort: Effort) -> String {
    let stage = Stage::folder("main");
    let server = PgServer::builder(primary_major())
        .setting("archive_mode", "on")
        .setting("archive_command", "true")
        .setting("max_wal_size", "8GB")
        .setting("checkpoint_timeout", "1h")
        .env("WALSHIP_CONFIG", stage.config())
        .start();
    server.pgbench(&["-i", "-q", "-s", SCALE]);
    server.psql("CHECKPOINT");
    server.psql(&format!("ALTER SYSTEM SET archive_command = '{} %p'", text(&bins::archive_cmd())));
    server.psql("SELECT pg_reload_conf()");
    stage.init(&server);
    stage.backup(&server);
    let bytes: u64 = server
        .psql("SELECT sum(pg_database_size(oid))::int8 FROM pg_database")
        .parse()
        .expect("a size is a number");

    let port = server.port().to_string();
    let config = stage.config();
    let environment = [
        ("WALSHIP_CONFIG", text(&config)),
        ("PGHOST", text(server.socket_dir())),
        ("PGPORT", &port),
        ("PGUSER", "postgres"),
        ("PGDATABASE", "postgres"),
    ];
    let run = |argv: &[&str]| process(argv, &environment, stage.path());
    let folder = |name: &str| {
        let folder = stage.path().join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).expect("the scratch folder is ours");
        }
        folder
    };
    let tool = server.tool("pg_basebackup");
    let pg_basebackup = tool.get_program().to_str().expect("the tools' paths are UTF-8");
    let (walship, pitr) = (bins::walship(), bins::pitr());
    let rows = compete(
        effort.long_rounds,
        vec![
            Contender::new("`pg_basebackup -c fast`", |_| {
                run(&[pg_basebackup, "-c", "fast", "-D", text(&folder("base"))])
            }),
            Contender::new("`walship backup`", |_| run(&[text(&walship), "backup"])),
            Contender::new("`pitr restore --latest`", |_| {
                run(&[text(&pitr), "restore", "--latest", "-D", text(&folder("restored"))])
            }),
            Contender::new("`cp -a backup data && sync -f data`", |_| {
                let (from, to) = (stage.path().join("base"), folder("copied"));
                // The other contenders come first only in some rounds: the first one made it in the warm-up.
                run(&["sh", "-c", "cp -a \"$1\" \"$2\" && sync -f \"$2\"", "sh", text(&from), text(&to)])
            }),
        ],
    );
    let mut result = String::new();
    let _ = write!(result, "\n{} MB of databases\n\n{}", bytes / 1_000_000, table(&rows, None));
    result
}
