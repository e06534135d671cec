//! Words in, words out: arguments to calls, reports to text or JSON, errors to exit statuses.

mod agent;
mod backup;
mod check;
mod give_up;
mod init;
mod notify;
mod open;
mod receive;
mod record;
mod serve;
mod server;
mod setup;
mod synchronous;
mod wal;

use std::ffi::OsString;
use std::future::Future;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};

/// `walship wal push --help`: what is longer stands in `archive_command` and moves WAL.
const WAL_HELP_ARGUMENTS: usize = 4;

const STATUSES: &str = "\
Exit status:
  0  done
  1  failed; the message says what happened, what is still safe and what to do
  2  the command line makes no sense
`walship wal push --help` and `walship wal fetch --help` have their own.";

/// PostgreSQL WAL archiving and point-in-time recovery you can prove.
#[derive(Debug, Parser)]
#[command(name = "walship", version, after_help = STATUSES)]
struct Cli {
    #[command(flatten)]
    overrides: Overrides,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create the repository and the cluster in it, and check the server's settings
    Init(init::Args),
    /// Take a base backup into every repository
    Backup(backup::Args),
    /// Stream WAL from the server into every repository
    Receive(receive::Args),
    /// Find out what is wrong, and say how to mend it
    Check(check::Args),
    /// Serve metrics to Prometheus, and tell of problems
    Serve(serve::Args),
    /// Answer archive-cmd and restore-cmd, and work ahead of them
    #[command(after_help = agent::HELP)]
    Agent(agent::Args),
    /// Push, fetch or give up one WAL file: what archive-cmd and restore-cmd do, and what helps where they cannot
    #[command(subcommand)]
    Wal(wal::Command),
    /// Write what belongs around the programs: systemd's units, man pages, completions
    #[command(subcommand)]
    Setup(setup::Command),
}

/// Runs the command in the arguments.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let fetch = wal::FetchCall::in_arguments(&arguments);
    let status = catch_unwind(AssertUnwindSafe(|| run(&arguments, fetch.as_ref())));
    // 101, the status of a panic, would read as "absent".
    let failed = || match fetch {
        Some(_) => walship::agent::client::STATUS_STOP,
        None if check::is_for_monitor(&arguments) => check::unknown("a mistake in walship ended the check"),
        None => 1,
    };
    let status = status.unwrap_or_else(|_| failed());
    let _ = std::io::stdout().flush();
    // Not waiting for threads that hang in a system call on a dead mount.
    std::process::exit(i32::from(status))
}

fn run(arguments: &[OsString], fetch: Option<&wal::FetchCall>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // `archive_command` with a stray -h in it must not give WAL away by status 0.
            let moves_wal = fetch.is_some() || wal::is_push(arguments);
            let only_asked = !error.use_stderr() && (!moves_wal || arguments.len() == WAL_HELP_ARGUMENTS);
            return match fetch {
                _ if only_asked => 0,
                Some(call) => call.unanswered(),
                None if check::is_for_monitor(arguments) => check::unknown("the command line makes no sense"),
                None => 2,
            };
        }
    };
    if let Command::Agent(args) = &cli.command
        && let Err(error) = agent::leave(args)
    {
        say_error(&error);
        return 1;
    }
    log_to_stderr();
    let overrides = &cli.overrides;
    let done = match cli.command {
        Command::Init(args) => block_on(init::run(&args, overrides)),
        // Threads have the priority of the one that starts them: before there are others.
        Command::Backup(args) => {
            args.lower_priority().and_then(|()| block_on_threads(backup::run(&args, overrides)))
        }
        // One thread reads, decides and sends; encoding and disks have threads of their own. More would only hand over.
        Command::Receive(args) => block_on(receive::run(&args, overrides)),
        Command::Agent(args) => block_on_threads(agent::run(&args, overrides)),
        Command::Serve(args) => block_on_threads(serve::run(&args, overrides)),
        Command::Check(args) if args.is_for_monitor() => block_on(check::monitor(&args, overrides)),
        Command::Check(args) => block_on(check::run(&args, overrides)),
        Command::Wal(wal::Command::GiveUp(args)) => block_on(give_up::run(&args, overrides)),
        Command::Wal(wal::Command::Push(args)) => block_on(wal::push(&args, overrides)),
        Command::Setup(command) => setup::run(&command, overrides),
        Command::Wal(wal::Command::Fetch(args)) => return wal::fetch(&args, overrides),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            say_error(&error);
            1
        }
    }
}

/// Runs a future to its end on this thread.
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::from_io("starting the runtime", error))?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    result
}

/// Runs a future that spawns tasks, on a few threads.
fn block_on_threads<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::from_io("starting the runtime", error))?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    result
}

/// Prints an error's three lines; a closed standard error is no second error.
fn say_error(error: &Error) {
    say(&error.report());
}

/// Prints a line to standard error.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints a report: as JSON, or the text.
fn print_report(report: &impl serde::Serialize, json: bool, text: impl FnOnce() -> String) -> Result<()> {
    let text = if json {
        serde_json::to_string_pretty(report)
            .map_err(|error| Error::invalid(format!("the report cannot be written as JSON: {error}")))?
    } else {
        text()
    };
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(())
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("WALSHIP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("walship=warn"));
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Reads the configuration.
fn config(overrides: &Overrides) -> Result<Config> {
    Config::load(overrides)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
