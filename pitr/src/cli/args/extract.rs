//! The words of `pitr extract`.

use std::path::PathBuf;

use super::{ScratchArgs, SourceArgs, TargetArgs};

pub(super) const EXTRACT_EXAMPLES: &str = "Examples:
  pitr extract --table public.orders --before drop:public.orders --into 'host=db1 dbname=shop user=admin'
  pitr extract --table public.orders --table public.items --to-time '2026-03-01 14:29 Europe/Berlin' --output orders.dump
  pitr extract --schema sales --dbname shop --latest --output sales.sql
  pitr extract --database --dbname shop --before drop:shop/ --output shop.dump

With --into the tables arrive in a fresh schema, all of it in one transaction; nothing that is there is written over.
Along come columns with their defaults, rows, owned sequences and where they stand, indexes, primary keys, unique, check
and exclusion constraints, partitions and children, comments, and foreign keys between tables that are extracted together.
Left out, and said: other foreign keys, triggers, rules, row level security, extended statistics; owners and privileges
too. Types, extensions and functions that the tables need must be there. A file of --output has all that pg_dump takes.

Status 4: something stored is damaged. Status 1: nothing was delivered.
";

/// What a file is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum FormWord {
    /// For pg_restore
    Custom,
    /// For psql
    Sql,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").args(["table", "schema", "database"]).required(true)))]
#[command(group(clap::ArgGroup::new("where").args(["into", "output"]).required(true)))]
pub(in crate::cli) struct ExtractArgs {
    /// A table, with its partitions and children: SCHEMA.NAME or NAME as it is stored, without quotes, or its oid; may be
    /// repeated
    #[arg(long, value_name = "TABLE", conflicts_with_all = ["schema", "database"])]
    pub(in crate::cli) table: Vec<String>,
    /// Everything in a schema; with --into its tables, sequences, views, domains, enums and composite types
    #[arg(long, value_name = "SCHEMA", conflicts_with = "database")]
    pub(in crate::cli) schema: Option<String>,
    /// A whole database; with --into each of its schemas as with --schema
    #[arg(long)]
    pub(in crate::cli) database: bool,
    /// The database that it is in [default: the one that --before names, else the only one that has it]
    #[arg(long, value_name = "DATABASE")]
    pub(in crate::cli) dbname: Option<String>,
    /// Into a live server: a connection string or URI, without a password, which belongs into ~/.pgpass or PGPASSWORD
    #[arg(long, value_name = "CONNINFO", conflicts_with_all = ["output", "format"])]
    pub(in crate::cli) into: Option<String>,
    /// The fresh schema that the tables arrive in, which must not exist; where they come from several schemas, each
    /// one's name is added [default: pitr_extract_TIME]
    #[arg(long, value_name = "SCHEMA", conflicts_with = "output")]
    pub(in crate::cli) into_schema: Option<String>,
    /// Into a file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) output: Option<PathBuf>,
    /// What the file is to be [default: sql for FILE.sql, else custom]
    #[arg(long, value_enum, value_name = "FORM", requires = "output")]
    pub(in crate::cli) format: Option<FormWord>,
    /// How long the dump, the load, and counting a table's rows may take, each
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub(in crate::cli) dump_timeout: u64,
    #[command(flatten)]
    pub(in crate::cli) target: TargetArgs,
    #[command(flatten)]
    pub(in crate::cli) scratch: ScratchArgs,
    #[command(flatten)]
    pub(in crate::cli) source: SourceArgs,
}
