//! `pg_amcheck`, where there is one: tables and indexes of all databases.

use std::time::Duration;

use walship::Result;

use super::ProofOptions;
use crate::drill::Proof;
use crate::execute::scratch::{Environment, Private, Up, run};
use crate::execute::start::find_tool;

/// How many connections it uses.
const JOBS: &str = "--jobs=2";

/// Its status when it found something.
const FOUND: i32 = 2;

pub(super) async fn prove(private: &Private<'_>, up: &Up, options: &ProofOptions) -> Result<Proof> {
    if !options.amcheck {
        return Ok(Proof::skipped("amcheck", "left out (--no-amcheck)"));
    }
    let major = private.plan.backup.server_version / 10_000;
    let program = match find_tool("pg_amcheck", options.pg_bin.as_deref(), major).await {
        Ok(program) => program,
        Err(why) => return Ok(Proof::skipped("amcheck", why)),
    };
    let mut connection = up.connect(up.any_database(), Duration::from_secs(60)).await?;
    let rows = connection
        .query("SELECT pg_catalog.count(*) FROM pg_catalog.pg_available_extensions WHERE name = 'amcheck'")
        .await?;
    connection.close().await;
    if rows.get(0, 0) != Some("1") {
        return Ok(Proof::skipped("amcheck", "this machine's PostgreSQL has no extension amcheck"));
    }
    let mut arguments = up.arguments();
    arguments.extend(["--all", "--install-missing", JOBS].map(str::to_owned));
    arguments.push(format!("--maintenance-db={}", up.any_database()));
    let ran = run(&program, &arguments, Environment::Private, options.proof_patience).await?;
    Ok(match ran.code {
        Some(0) => Proof::proven("amcheck", "tables and B-tree indexes of all databases are sound"),
        Some(FOUND) => Proof::failed("amcheck", format!("it found damage: {}", ran.last_lines(6))),
        _ => Proof::failed("amcheck", format!("pg_amcheck {}", ran.ended())),
    })
}
