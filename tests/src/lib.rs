//! What the tests on real servers stand on: scratch PostgreSQL servers of several majors, the built
//! programs, bounded waits, and (beside them) object stores and a proxy that misbehaves on demand.
//!
//! ```no_run
//! use walship_tests::postgres::{self, PgServer};
//!
//! let server = PgServer::builder(postgres::primary_major())
//!     .wal_segment_size_mb(1)
//!     .setting("archive_mode", "on")
//!     .setting("archive_command", "cp %p /somewhere/%f")
//!     .start();
//! server.psql("CREATE TABLE t AS SELECT 1 AS a");
//! assert_eq!(server.psql("SELECT count(*) FROM t"), "1");
//! // Dropping the server kills it and removes its folder.
//! ```
//!
//! Nothing here is skipped silently: what a test needs and does not find makes it fail, with the
//! command that installs it (`scripts/install-test-deps`, which `./test` calls).
//!
//! # Environment
//!
//! | variable | meaning | without it |
//! |---|---|---|
//! | `WALSHIP_TEST_MAJORS` | PostgreSQL majors to test, the primary one first: `15,18` | 15 (or the distribution's own) and the newest of 18 and 17 that is installed |
//! | `WALSHIP_CACHE` | where the fetched servers and tools live | `$XDG_CACHE_HOME/walship-test`, else `~/.cache/walship-test` |
//! | `WALSHIP_PG<major>_BIN` | the folder of that major's programs, tried first | the cache, then `/usr/lib/postgresql/<major>/bin` |
//! | `WALSHIP_BIN_DIR` | the folder of `walship`, `pitr`, `archive-cmd`, `restore-cmd` | the target folder of the running test |
//! | `WALSHIP_CAMPAIGN` | set to `1` by `./test --campaign`: full counts instead of a seeded tenth | quick counts |
//! | `WALSHIP_TEST_AGENT` | `auto`: the thin commands of nearly every test may start an agent, as users' do; else only those of the main job and of the tests of agents | `off` |
//! | `WALSHIP_SEED` | seed of everything random | a fixed seed |
//!
//! # The cache
//!
//! | path | what |
//! |---|---|
//! | `postgresql/<major>/server/bin/` | `initdb`, `postgres`, `pg_ctl` |
//! | `postgresql/<major>/tools/bin/` | `psql`, `pg_basebackup`, `pg_waldump` ... of that major, where they exist |
//! | `seaweedfs/weed` | SeaweedFS, the S3 server of the end-to-end tests |
//!
//! PostgreSQL refuses to run as root: as root, servers are started inside a user namespace
//! (`unshare`) in which they see themselves as an ordinary user while their files stay root's.

#![warn(missing_docs)]

pub mod bins;
pub mod cache;
pub mod fake_http;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod random;
pub mod requests;
pub mod s3_inprocess;
pub mod stage;
pub mod tls;
pub mod tmpfs;
pub mod wait;
pub mod weed;

/// Whether the full counts of the campaign are asked for, rather than the quick ones.
pub fn campaign() -> bool {
    std::env::var("WALSHIP_CAMPAIGN").is_ok_and(|value| value == "1")
}

/// Whether the thin commands may start an agent, as `agent` in the configuration says it.
pub fn agent_use() -> String {
    std::env::var("WALSHIP_TEST_AGENT").unwrap_or_else(|_| "off".to_owned())
}

/// Notes what a test has counted ("kill test, folder: 1000 rounds, seed 7, no byte lost"): printed, and
/// kept for the result that `./test --campaign` writes into `docs/`.
///
/// # Panics
/// When the file of notes cannot be written.
pub fn note(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os("WALSHIP_NOTES") {
        let mut file =
            std::fs::OpenOptions::new().create(true).append(true).open(path).expect("notes are kept");
        std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes()).expect("notes are kept");
    }
}

/// Returns the seed of everything random in a test run; printed by whoever uses it.
///
/// # Panics
/// When `WALSHIP_SEED` is no number.
pub fn seed() -> u64 {
    match std::env::var("WALSHIP_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("WALSHIP_SEED is {text:?}, not a number")),
        Err(_) => 0x5eed_0001,
    }
}
