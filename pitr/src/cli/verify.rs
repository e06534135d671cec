//! `pitr verify`.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::Utc;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use walship::catalog::{RecordHead, VerifyOutcome};
use walship::config::Config;
use walship::replication::{ConnectOptions, Connection, ServerPosition, SessionKind, server_position};
use walship::repository::{LineageRepository, RecordedBy, new_backup_id};
use walship::{Error, Result};

use super::args::VerifyArgs;
use super::output::{self, Style};
use super::plan::{open_and_plan, refused};
use super::scratch::Told;
use super::source::{open_lineages, say_notes};
use super::{DAMAGED, DONE, FAILED, remembered};
use crate::execute::verify::{Progress, Request, Scope, verify};
use crate::plan::Refusal;
use crate::retention::Policy;
use crate::verify::{Report, text};

/// The most objects that are read side by side when nobody says otherwise.
const WORKERS_MAX: usize = 8;

/// How often the progress bar is drawn.
const DRAWN_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(args: &VerifyArgs) -> Result<u8> {
    args.check()?;
    let started = Utc::now();
    let mut told = Told::listen()?;
    let config = Config::load(&args.source.overrides)?;
    let preparing = async {
        // The server first: what it has handed over by then must be in what is looked at afterwards.
        let server = ask(args, &config).await;
        scope(args, &config).await.map(|scope| (server, scope))
    };
    let (server, scoped) = tokio::select! {
        prepared = preparing => prepared?,
        signal = told.stop() => return Err(interrupted(signal)),
    };
    let (repository, scope) = match scoped {
        Ok(found) => found,
        Err(refusal) => return refused(&refusal, args.source.json),
    };
    let unasked = match &server {
        Some(Err(error)) if args.server.is_some() => Some(error.to_string()),
        Some(Err(error)) => {
            repository.note(format!(
                "the server was not compared with the archive, it could not be asked: {error}"
            ));
            None
        }
        _ => None,
    };
    let slot = config.receive.slot.clone().unwrap_or_else(|| "walship".to_owned());
    let request = Request {
        id: new_backup_id(started, rand::random()),
        started,
        scope,
        budget: args.budget,
        bytes_per_second: args.max_rate,
        workers: args.workers.map_or_else(workers, |workers| workers as usize),
        server: server.and_then(Result::ok).map(|server| (server, Some(slot))),
        remembered: remembered::read(&config, &repository),
        anew: args.anew,
        accept_missing: args.accept_missing,
    };
    if let Some((server, _)) = &request.server {
        check_same(&repository, server)?;
    }
    let (stopped, progress) = (Arc::new(AtomicBool::new(false)), Progress::default());
    let verifying = verify(&repository, &request, Arc::clone(&stopped), &progress);
    let mut report = {
        let mut verifying = std::pin::pin!(verifying);
        let bar = bar();
        let mut ticks = tokio::time::interval(DRAWN_EVERY);
        let report = loop {
            tokio::select! {
                report = &mut verifying => break report,
                signal = told.stop() => {
                    // What is under way is read to its end, and noted; unless it is told twice.
                    if stopped.swap(true, Ordering::Relaxed) {
                        return Err(interrupted(signal));
                    }
                }
                _ = ticks.tick() => draw(bar.as_ref(), &progress),
            }
        };
        if let Some(bar) = &bar {
            bar.finish_and_clear();
        }
        report?
    };
    let found = report.outcome;
    if let Some(why) = &unasked {
        report.note_unasked(why);
    }
    remembered::write(&config, &repository, &report);
    record(&repository, &request, &report, args.reason.as_deref()).await;
    say_notes(&repository);
    finish(args, &report, found, unasked)
}

fn interrupted(signal: &str) -> Error {
    Error::unavailable(format!("interrupted by {signal}"))
        .with_safe("nothing was changed; what was proven before is noted")
        .with_next("Run it again: it goes on where this one ended.")
}

fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, |processors| processors.get().min(WORKERS_MAX))
}

type Scoped = (LineageRepository, Scope);

/// Returns the lineage and what of it is to be proven; or why no plan leads to the target.
async fn scope(args: &VerifyArgs, config: &Config) -> Result<Result<Scoped, Box<Refusal>>> {
    if args.target.is_given() {
        return Ok(match open_and_plan(&args.source, &args.target, &mut None).await? {
            Ok((source, plan)) => Ok((source.repository, Scope::Plan(plan))),
            Err(refusal) => Err(refusal),
        });
    }
    let (repository, _) = open_lineages(&args.source).await?;
    let scope = if let Some(id) = &args.target.backup {
        Scope::Backup(id.clone())
    } else if let Some(since) = args.since()? {
        Scope::Since(since)
    } else if args.window {
        let from = Policy::of(&config.retention)?.window_from(Utc::now()).ok_or_else(|| {
            Error::invalid("[retention] in the configuration has no window")
                .with_safe("nothing was read")
                .with_next("Give it one (window = \"14 days\"), or use --since TIME.")
        })?;
        Scope::Since(from)
    } else {
        Scope::Whole
    };
    Ok(Ok((repository, scope)))
}

/// Asks the server where it is; `None` where there is none to be asked.
async fn ask(args: &VerifyArgs, config: &Config) -> Option<Result<ServerPosition>> {
    if args.no_server {
        return None;
    }
    let options = match (&args.server, &config.connection) {
        (Some(text), _) => ConnectOptions::from_env_and_uri(text),
        (None, Some(connection)) if connection.is_argument => {
            ConnectOptions::from_env_and_uri(&connection.text)
        }
        (None, Some(connection)) => ConnectOptions::from_private(&connection.text),
        (None, None) => return None,
    };
    let asked = async {
        let mut connection = Connection::connect(&options?, SessionKind::Ordinary).await?;
        let position = server_position(&mut connection).await?;
        connection.close().await;
        Ok(position)
    };
    Some(asked.await)
}

/// Fails when the server is another cluster than the archive's.
fn check_same(repository: &LineageRepository, server: &ServerPosition) -> Result<()> {
    let ours = repository.lineage();
    if (server.system_identifier, server.segment_size) == (ours.system_identifier, ours.segment_size) {
        return Ok(());
    }
    Err(Error::mismatch(format!(
        "the server is another cluster: system identifier {}, this lineage has {}",
        server.system_identifier, ours.system_identifier
    ))
    .with_safe("nothing was read")
    .with_next("Give the right --server, or choose the lineage with --lineage; --no-server asks none."))
}

fn bar() -> Option<ProgressBar> {
    std::io::stderr().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("  {bar:30} {pos} of {len} pieces read  {elapsed}, {eta} left");
        ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    })
}

fn draw(bar: Option<&ProgressBar>, progress: &Progress) {
    let Some(bar) = bar else { return };
    bar.set_length(progress.pieces.load(Ordering::Relaxed));
    bar.set_position(progress.done.load(Ordering::Relaxed));
}

/// Puts a record into the history of each repository; where that cannot be, a line on standard error says so.
async fn record(repository: &LineageRepository, request: &Request, report: &Report, reason: Option<&str>) {
    let RecordedBy { host, user } = RecordedBy::now();
    let (id, reason) = (report.id.clone(), reason.map(str::to_owned));
    let head = RecordHead { format: 1, id, started: report.started, host, user, reason };
    let whole = matches!(request.scope, Scope::Whole);
    for one in repository.each() {
        let location = one.location();
        let found = report.repositories.iter().find(|found| found.repository == location);
        let Some(found) = found else { continue };
        let record = found.record(report, head.clone(), whole);
        if let Err(error) = one.put_verify_record(&record).await {
            eprintln!(
                "note:  the verification is not in the history of {}: {}",
                output::clean(&location),
                output::clean(&error.to_string())
            );
        }
    }
}

/// Prints what was found and returns the exit status. `found` is what the repositories came to by themselves.
fn finish(args: &VerifyArgs, report: &Report, found: VerifyOutcome, unasked: Option<String>) -> Result<u8> {
    if args.source.json {
        let mut value = serde_json::to_value(report)
            .map_err(|error| Error::invalid(format!("what was found cannot be shown as JSON: {error}")))?;
        value["server_problem"] = json!(unasked);
        output::print_json(&value)?;
    } else {
        let style = Style::of_stdout();
        output::print(&text::text(report, &|words| style.bold(words)))?;
    }
    let status = match found {
        VerifyOutcome::Damaged => {
            let damages: usize = report.repositories.iter().map(|found| found.damages()).sum();
            let error = Error::corrupt(format!("{damages} thing(s) are damaged or missing"))
                .with_safe("nothing was changed; what is not named above is sound as far as it was read")
                .with_next(
                    "Keep the repository as it is. Take a new base backup now, so that moments from here on can be \
                     reached; look for missing segments in the server's pg_wal, and for sound copies in other \
                     repositories.",
                );
            eprintln!("{}", output::clean(&error.report()));
            DAMAGED
        }
        VerifyOutcome::Unread | VerifyOutcome::Interrupted | VerifyOutcome::Unknown => {
            let error = match found {
                VerifyOutcome::Interrupted => Error::unavailable("the verification was interrupted"),
                _ => Error::unavailable("not everything could be read"),
            };
            let error = error
                .with_safe("no damage was found in what was read; what was proven is noted")
                .with_next("Mend what is named above, then run it again: it goes on where this one ended.");
            eprintln!("{}", output::clean(&error.report()));
            FAILED
        }
        VerifyOutcome::Sound | VerifyOutcome::Partly => DONE,
    };
    match unasked {
        Some(why) if status == DONE => {
            let error = Error::unavailable(format!("the server could not be asked: {why}"))
                .with_safe("what is stored was read and is sound; whether its end is missing is not known")
                .with_next("Check --server, then run it again; --no-server asks none.");
            eprintln!("{}", output::clean(&error.report()));
            Ok(FAILED)
        }
        _ => Ok(status),
    }
}
