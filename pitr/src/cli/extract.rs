//! `pitr extract`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use tokio::sync::watch;
use walship::catalog::ExtractRecord;
use walship::repository::{LineageRepository, record_head};
use walship::{Error, Result};

use super::DONE;
use super::args::{ExtractArgs, FormWord};
use super::before::Unproven;
use super::hold::held_while;
use super::output::{self, Style};
use super::plan::{open_and_plan_to_prove, refused};
use super::scratch::{self, Broken, Told};
use super::tried::{Ended, Tried};
use crate::drill::Verdict;
use crate::execute::Progress;
use crate::execute::drill::{Clock, millis, prove_outcome};
use crate::execute::extract::{
    FileForm, Found, Live, Removed, Selection, Table, Wanted, count, dump_to_file, find, load_into, shape,
    target_names, was_dropped,
};
use crate::execute::scratch::{Private, Purpose, Scratch, Stage, Up, bring_up, check, quoted};
use crate::execute::start::{Replay, find_tool};
use crate::log::parse_table;
use crate::plan::{Refusal, RestorePlan};
use crate::words::duration;

/// The longest name that PostgreSQL does not cut.
const NAME_BYTES_MAX: usize = 63;

/// How many tables are named to people.
const TABLES_SHOWN: usize = 20;

/// Where it goes.
enum Into {
    Server { live: Box<Live>, schema: String },
    File { path: PathBuf, form: FileForm },
}

impl Into {
    fn shown(&self) -> String {
        match self {
            Self::Server { live, .. } => live.shown.clone(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }
}

/// What was delivered.
#[derive(Debug, Default)]
struct Delivered {
    database: Option<String>,
    tables: Vec<Table>,
    left_out: Vec<String>,
    file_bytes: Option<u64>,
    restored_bytes: u64,
    restore_millis: u64,
    recovery_millis: u64,
    notes: Vec<String>,
    /// Why what recovery ended before is not what was asked for.
    refusal: Option<Box<Refusal>>,
    /// Where it went, or was to go.
    into: Option<String>,
}

pub(super) async fn run(args: &ExtractArgs) -> Result<u8> {
    let (mut tried, mut delivered) = (Tried::new(&args.target), Delivered::default());
    let ended = extract(args, &mut tried, &mut delivered).await;
    let interrupted = matches!(ended, Err(Broken { interrupted: true, .. }));
    let result = ended.map_err(|broken| broken.error);
    record(args, &tried, delivered, tried.ended("delivered", &result, interrupted)).await;
    result
}

/// Does what was asked for; what is known of it goes into `tried` and `delivered` as it is done.
async fn extract(args: &ExtractArgs, tried: &mut Tried, delivered: &mut Delivered) -> Result<u8, Broken> {
    let clock = Clock::start();
    let mut told = Told::listen()?;
    scratch::refuse_root("extract")?;
    scratch::settings(&args.scratch)?;
    let selection = selection(args)?;
    let folder = scratch::folder(&args.scratch, &args.source.overrides)?;
    let started = tried.started;
    let preparing = async {
        let into = into(args, started).await?;
        delivered.into = Some(into.shown());
        let planned = open_and_plan_to_prove(&args.source, &args.target, &mut tried.repository).await?;
        Ok::<_, Error>((into, planned))
    };
    let (into, planned) = tokio::select! {
        prepared = preparing => prepared?,
        signal = told.stop() => return Err(scratch::interrupted(signal)),
    };
    let (source, plan, unproven) = match planned {
        Ok(planned) => planned,
        Err(refusal) => {
            tried.refused(&refusal);
            return Ok(refused(&refusal, args.source.json)?);
        }
    };
    tried.planned(&plan);
    if !args.source.json {
        eprintln!(
            "extract: {} as at {}, from backup {} ({})",
            output::clean(&selection.shown()),
            output::clean(&plan.target.to_string()),
            plan.backup.id,
            output::bytes(plan.backup.data_bytes)
        );
    }
    let work = Work { args, plan: &plan, unproven: unproven.as_ref(), selection: &selection, into: &into };
    let (ended, kept) = carry_out(&work, &source.repository, &folder, &mut told, (tried, delivered)).await;
    delivered.notes.extend(source.repository.notes());
    if let Err(broken) = ended {
        delivered.notes.iter().for_each(|note| eprintln!("note:  {}", output::clean(note)));
        kept.iter().for_each(|kept| eprintln!("note:  kept in {}", output::clean(kept)));
        if let Some(refusal) = delivered.refusal.take().filter(|_| !broken.interrupted) {
            tried.refused(&refusal);
            return Ok(refused(&refusal, args.source.json)?);
        }
        return Err(broken);
    }
    tried.is_done = true;
    let database = delivered.database.as_deref().unwrap_or_default();
    if args.source.json {
        let file = match &into {
            Into::File { path, form } => {
                json!({ "path": path, "form": form, "bytes": delivered.file_bytes })
            }
            Into::Server { .. } => json!(null),
        };
        let server = match &into {
            Into::Server { live, .. } => json!(live.shown),
            Into::File { .. } => json!(null),
        };
        output::print_json(&json!({
            "outcome": "delivered",
            "database": database,
            "what": selection.shown(),
            "target": plan.target_options,
            "target_words": plan.target.to_string(),
            "backup": plan.backup.id,
            "last_included": plan.last_included,
            "tables": delivered.tables,
            "left_out": delivered.left_out,
            "into": server,
            "file": file,
            "restored_bytes": delivered.restored_bytes,
            "restore_millis": delivered.restore_millis,
            "recovery_millis": delivered.recovery_millis,
            "millis": clock.millis(),
            "kept": kept,
            "notes": delivered.notes,
        }))?;
    } else {
        let text = text(&work, delivered, clock.millis(), kept.as_deref(), Style::of_stdout());
        output::print(&text)?;
    }
    Ok(DONE)
}

/// Returns in words what is to be had.
fn asked(args: &ExtractArgs) -> String {
    match (&args.schema, args.database) {
        (Some(schema), _) => Selection::Schema(schema.clone()).shown(),
        (None, true) => Selection::Database.shown(),
        (None, false) => format!("table {}", args.table.join(", ")),
    }
}

fn selection(args: &ExtractArgs) -> Result<Selection> {
    let wanted = |word: &String| Ok::<_, Error>(Wanted { words: word.clone(), filter: parse_table(word)? });
    match (&args.schema, args.database) {
        (Some(schema), _) if schema == "information_schema" || schema.starts_with("pg_") => {
            Err(Error::invalid(format!("schema {schema} is the server's own"))
                .with_next("Name one of yours."))
        }
        (Some(schema), _) => Ok(Selection::Schema(schema.clone())),
        (None, true) => Ok(Selection::Database),
        (None, false) => Ok(Selection::Tables(args.table.iter().map(wanted).collect::<Result<Vec<_>>>()?)),
    }
}

/// Returns where it goes, having looked whether it can.
async fn into(args: &ExtractArgs, now: DateTime<Utc>) -> Result<Into> {
    if let Some(conninfo) = &args.into {
        let schema = match &args.into_schema {
            None => now.format("pitr_extract_%Y%m%dt%H%M%Sz").to_string(),
            Some(name) if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with("pg_") => {
                return Err(Error::invalid(format!("{name:?} is no name for a schema"))
                    .with_next("Names have 1 to 63 bytes and do not begin with pg_."));
            }
            Some(name) => name.clone(),
        };
        let live = Box::new(Live::look(conninfo, &schema).await?);
        return Ok(Into::Server { live, schema });
    }
    let output = args.output.as_deref().unwrap_or(Path::new(""));
    let path = std::path::absolute(output)
        .map_err(|error| Error::from_io(format!("resolving {}", output.display()), error))?;
    if std::fs::symlink_metadata(&path).is_ok() {
        return Err(Error::invalid(format!("{} is there already", path.display()))
            .with_safe("nothing was written")
            .with_next("Choose another file with --output: none is ever written over."));
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return Err(Error::invalid(format!("the folder of {} is not there", path.display()))
            .with_safe("nothing was written")
            .with_next("Make it first."));
    }
    let is_sql = path.extension().is_some_and(|extension| extension == "sql");
    let form = match (args.format, is_sql) {
        (Some(FormWord::Sql), _) | (None, true) => FileForm::Sql,
        (Some(FormWord::Custom), _) | (None, false) => FileForm::Custom,
    };
    Ok(Into::File { path, form })
}

/// What is to be done.
struct Work<'a> {
    args: &'a ExtractArgs,
    plan: &'a RestorePlan,
    unproven: Option<&'a Unproven>,
    selection: &'a Selection,
    into: &'a Into,
}

/// Restores, recovers, delivers, and removes everything; whatever ends it, the last of these is done.
async fn carry_out(
    work: &Work<'_>,
    repository: &LineageRepository,
    folder: &Path,
    told: &mut Told,
    (tried, delivered): (&mut Tried, &mut Delivered),
) -> (Result<(), Broken>, Option<String>) {
    let args = work.args;
    let overrides = &args.source.overrides;
    let private = scratch::private(&args.scratch, overrides, repository, work.plan, Purpose::Extract);
    let private = match private.await {
        Ok(private) => private,
        Err(error) => return (Err(error.into()), None),
    };
    let held = carry_out_held(work, &private, folder, told, (tried, delivered));
    match held_while(repository, work.plan, "pitr extract", held).await {
        Ok(ended) => ended,
        Err(error) => (Err(error.into()), None),
    }
}

async fn carry_out_held(
    work: &Work<'_>,
    private: &Private<'_>,
    folder: &Path,
    told: &mut Told,
    (tried, delivered): (&mut Tried, &mut Delivered),
) -> (Result<(), Broken>, Option<String>) {
    let prepared = async {
        let tools = tools(work).await?;
        let (scratch, left) = Scratch::take(folder, "extract").await?;
        Ok::<_, Error>((tools, scratch, left))
    };
    let (tools, scratch, left) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => return (Err(error.into()), None),
    };
    tried.has_begun = true;
    delivered.notes.extend(left);
    let ended = tokio::select! {
        ended = deliver(work, &scratch, private, &tools, delivered) => ended.map_err(Broken::from),
        signal = told.stop() => Err(scratch::interrupted(signal)),
    };
    let (ended, done) = scratch::clean_up(scratch, private, work.args.scratch.keep, ended).await;
    delivered.notes.extend(done.notes);
    (ended, done.kept)
}

/// PostgreSQL's programs that are needed.
struct Tools {
    pg_dump: PathBuf,
    pg_restore: PathBuf,
}

async fn tools(work: &Work<'_>) -> Result<Tools> {
    let major = work.plan.backup.server_version / 10_000;
    let find = async |name: &str| {
        find_tool(name, work.args.scratch.pg_bin.as_deref(), major).await.map_err(|why| {
            Error::missing(why).with_safe("nothing was written").with_next(format!(
                "Install the client programs of PostgreSQL {major}, or name their folder with --pg-bin."
            ))
        })
    };
    Ok(Tools { pg_dump: find("pg_dump").await?, pg_restore: find("pg_restore").await? })
}

async fn deliver(
    work: &Work<'_>,
    scratch: &Scratch,
    private: &Private<'_>,
    tools: &Tools,
    delivered: &mut Delivered,
) -> Result<()> {
    check(scratch, private)?;
    let (progress, replay) = (Arc::new(Progress::default()), Arc::new(Replay::default()));
    let (stage, watched) = watch::channel(Stage::Restoring);
    let up = tokio::select! {
        up = bring_up(scratch, private, progress.clone(), replay.clone(), &stage) => up?,
        () = scratch::show(&progress, &replay, work.plan, watched) => {
            return Err(Error::local_io("the progress display ended before the extract"));
        }
    };
    delivered.restored_bytes = up.report.data_bytes;
    (delivered.restore_millis, delivered.recovery_millis) = (millis(up.restored_in), millis(up.recovered_in));
    let proof = prove_outcome(work.plan, &up).await?;
    if proof.verdict != Verdict::Proven {
        return Err(Error::mismatch(format!("what was recovered is not what was planned: {}", proof.detail))
            .with_safe("nothing was delivered")
            .with_next("Run `pitr drill` with the same target: it shows what is wrong."));
    }
    if let Some(unproven) = work.unproven {
        prove_drop(unproven, &up, delivered).await?;
    }
    let before = work.args.target.before()?;
    let named = before.as_ref().and_then(|(before, _)| before.database());
    let mut found = find(&up, work.selection, work.args.dbname.as_deref().or(named)).await?;
    delivered.database = Some(found.database.clone());
    take(work, scratch, tools, &up, &mut found, delivered).await
}

/// Proves that what recovery ended just before is the drop that was asked for.
async fn prove_drop(unproven: &Unproven, up: &Up, delivered: &mut Delivered) -> Result<()> {
    let Unproven { before, record, refusal } = unproven;
    let Some((words, filter)) = before.table() else { return Ok(()) };
    let wanted = Wanted { words: words.to_owned(), filter: filter.clone() };
    match was_dropped(up, &wanted, before.database(), record).await? {
        Removed::This(how) => {
            delivered.notes.push(format!("{words}: {how}"));
            Ok(())
        }
        Removed::Other(why) => {
            let reason = format!("{}; recovered to just before the last of them: {why}", refusal.reason);
            delivered.refusal = Some(Box::new(Refusal { reason: reason.clone(), ..(**refusal).clone() }));
            Err(Error::missing(reason))
        }
    }
}

/// Counts, and delivers, what was found.
async fn take(
    work: &Work<'_>,
    scratch: &Scratch,
    tools: &Tools,
    up: &Up,
    found: &mut Found,
    delivered: &mut Delivered,
) -> Result<()> {
    let patience = Duration::from_secs(work.args.dump_timeout);
    let mut connection = up.connect(&found.database, patience).await?;
    let counts = count(&mut connection, &found.tables, |table| table.schema.clone()).await?;
    connection.close().await;
    for (table, rows) in found.tables.iter_mut().zip(counts) {
        table.rows = (!table.is_partitioned).then_some(rows);
    }
    let unlogged: Vec<String> =
        found.tables.iter().filter(|table| table.is_unlogged).map(Table::shown).collect();
    if !unlogged.is_empty() {
        delivered
            .notes
            .push(format!("unlogged, and so without rows after every recovery: {}", unlogged.join(", ")));
    }
    match work.into {
        Into::File { path, form } => {
            let what = (&*found, work.selection);
            let bytes = dump_to_file(scratch, up, &tools.pg_dump, what, (path, *form), patience).await?;
            delivered.file_bytes = Some(bytes);
        }
        Into::Server { live, schema } => {
            let schemas: BTreeSet<String> = found.tables.iter().map(|table| table.schema.clone()).collect();
            if schemas.is_empty() {
                return Err(Error::missing(format!("{} holds no table", work.selection.shown()))
                    .with_next("Write a file with --output: it has everything else that is in it."));
            }
            let targets = target_names(schema, &schemas);
            let shaped = shape(up, found, work.selection, &targets).await?;
            for table in &mut found.tables {
                table.into_schema = targets.get(&table.schema).cloned();
            }
            delivered.left_out = shaped.left_out;
            load_into(scratch, up, (&tools.pg_dump, &tools.pg_restore), live, found, patience).await?;
        }
    }
    delivered.tables = found.tables.clone();
    Ok(())
}

/// Puts the extract into every repository's history; where that cannot be, a line on standard error says so.
async fn record(args: &ExtractArgs, tried: &Tried, delivered: Delivered, ended: Ended) {
    let record = ExtractRecord {
        head: record_head(tried.started, args.scratch.reason.as_deref(), rand::random()),
        millis: millis(tried.took()),
        outcome: ended.outcome.to_owned(),
        problem: ended.problem,
        target: tried.target.clone(),
        backup: tried.backup.clone(),
        restored_bytes: delivered.restored_bytes,
        database: delivered.database,
        what: asked(args),
        into: delivered.into,
    };
    tried.record("extract", &args.source, async |one| one.put_extract_record(&record).await).await;
}

fn text(work: &Work<'_>, delivered: &Delivered, took: u64, kept: Option<&str>, style: Style) -> String {
    let mut lines = Vec::new();
    lines.push(style.bold(&output::clean(&format!("Delivered to {}", work.into.shown()))));
    lines.push(format!(
        "  from database {} as at {}",
        delivered.database.as_deref().unwrap_or_default(),
        work.plan.target
    ));
    if let Some(last) = &work.plan.last_included {
        lines.push(format!("  transaction {} is the last commit in it", last.xid));
    }
    for table in delivered.tables.iter().take(TABLES_SHOWN) {
        let rows = table.rows.map_or_else(|| "in partitions".to_owned(), |rows| format!("{rows} rows"));
        let place = table
            .into_schema
            .as_ref()
            .map_or_else(String::new, |schema| format!(" -> {}.{}", quoted(schema), quoted(&table.name)));
        lines.push(format!("  {}: {rows}{place}", table.shown()));
    }
    if let Some(more) = delivered.tables.len().checked_sub(TABLES_SHOWN).filter(|more| *more > 0) {
        lines.push(format!("  and {more} more tables"));
    }
    if let Some(bytes) = delivered.file_bytes {
        lines.push(format!("  {}", output::bytes(bytes)));
    }
    lines.push(format!(
        "  in {}: {} to restore {}, {} to recover",
        duration(took),
        duration(delivered.restore_millis),
        output::bytes(delivered.restored_bytes),
        duration(delivered.recovery_millis)
    ));
    let mut list = |title: &str, items: &[String]| {
        if !items.is_empty() {
            lines.push(String::new());
            lines.push(title.to_owned());
            lines.extend(items.iter().map(|item| format!("  - {item}")));
        }
    };
    list("Left out", &delivered.left_out);
    list("Notes", &delivered.notes);
    list("Kept", &kept.map(str::to_owned).into_iter().collect::<Vec<_>>());
    list("Next", &next(work, delivered));
    let mut text = lines.remove(0) + "\n";
    lines.iter().for_each(|line| text += &(output::clean(line) + "\n"));
    text
}

/// Returns what to do with what arrived.
fn next(work: &Work<'_>, delivered: &Delivered) -> Vec<String> {
    match work.into {
        Into::File { path, form } => {
            let path = crate::target::shell_word(&path.to_string_lossy());
            vec![match form {
                FileForm::Custom => format!("pg_restore --list {path}   shows what is in it"),
                FileForm::Sql => format!("psql --single-transaction -v ON_ERROR_STOP=1 -f {path} ..."),
            }]
        }
        Into::Server { .. } => {
            let first = delivered.tables.first().and_then(|table| Some((table, table.into_schema.as_ref()?)));
            let Some((table, schema)) = first else { return Vec::new() };
            let (arrived, own) = (
                format!("{}.{}", quoted(schema), quoted(&table.name)),
                format!("{}.{}", quoted(&table.schema), quoted(&table.name)),
            );
            vec![
                format!(
                    "where the original is gone: ALTER TABLE {arrived} SET SCHEMA {};",
                    quoted(&table.schema)
                ),
                format!("where rows are missing: INSERT INTO {own} SELECT * FROM {arrived} WHERE ...;"),
                format!("when it is no longer needed: DROP SCHEMA {} CASCADE;", quoted(schema)),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Args, Command};

    fn parsed(words: &[&str]) -> Option<Selection> {
        let words = [&["pitr", "extract", "--latest"], words].concat();
        match Args::try_parse_from(words).ok()?.command {
            Command::Extract(args) => selection(&args).ok(),
            _ => None,
        }
    }

    #[test]
    fn it_is_said_what_and_where_to() {
        let tables = parsed(&["--table", "public.we\"ird Name", "--table", "42", "--output", "x"]).unwrap();
        assert_eq!(tables.shown(), "table public.we\"ird Name, 42");
        assert_eq!(parsed(&["--schema", "s", "--into", "host=a"]), Some(Selection::Schema("s".into())));
        assert_eq!(parsed(&["--database", "--output", "x"]), Some(Selection::Database));
        for words in [
            &["--table", "t"][..],
            &["--output", "x"],
            &["--table", "t", "--schema", "s", "--output", "x"],
            &["--table", "t", "--output", "x", "--into", "host=a"],
            &["--table", "t", "--into", "host=a", "--format", "sql"],
            &["--table", "t", "--output", "x", "--into-schema", "s"],
            &["--table", ".t", "--output", "x"],
            &["--schema", "pg_catalog", "--output", "x"],
        ] {
            assert_eq!(parsed(words), None, "{words:?}");
        }
    }
}
