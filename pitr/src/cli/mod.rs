//! The `pitr` command line: words in, words out. People and programs get the same values.

mod args;
mod before;
mod change;
mod confirm;
mod drill;
mod expire;
mod extract;
mod forecast;
mod history;
mod hold;
mod index;
mod info;
mod log;
#[cfg(test)]
mod offers_tests;
mod output;
mod pages;
mod plan;
mod remembered;
mod restore;
mod role;
mod scratch;
mod source;
mod start;
mod surviving;
mod tried;
mod verify;

use std::process::ExitCode;

use clap::Parser as _;
use walship::Error;

use args::{Args, Command};

/// Done.
const DONE: u8 = 0;
/// Something failed.
const FAILED: u8 = 1;
/// The command line or the configuration makes no sense.
const USAGE: u8 = 2;
/// No plan leads to the target.
const NO_PLAN: u8 = 3;
/// Something stored is damaged.
const DAMAGED: u8 = 4;

/// Runs the program and returns its exit status.
pub fn run() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Nothing can be done when even this cannot be printed.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { DONE });
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{}", Error::from_io("starting the runtime", error).report());
            return ExitCode::from(FAILED);
        }
    };
    let json = match &args.command {
        Command::Info(info) => info.source.json,
        Command::Plan(plan) => plan.source.json,
        Command::Restore(restore) => restore.source.json,
        Command::Drill(drill) => drill.source.json,
        Command::Extract(extract) => extract.source.json,
        Command::Verify(verify) => verify.source.json,
        Command::History(history) => history.source.json,
        Command::Log(log) => log.source.json,
        Command::Index(index) => index.source.json,
        Command::Expire(expire) => expire.source.json,
        Command::Hold(hold) => hold.source.json,
        Command::Release(release) => release.source.json,
        Command::Pages(_) => false,
    };
    let status = runtime.block_on(async {
        match args.command {
            Command::Info(info) => info::run(&info).await,
            Command::Plan(plan) => plan::run(&plan).await,
            Command::Restore(restore) => restore::run(&restore).await,
            Command::Drill(drill) => drill::run(&drill).await,
            Command::Extract(extract) => extract::run(&extract).await,
            Command::Verify(verify) => verify::run(&verify).await,
            Command::History(history) => history::run(&history).await,
            Command::Log(log) => log::run(&log).await,
            Command::Index(index) => index::run(&index).await,
            Command::Expire(expire) => expire::run(&expire).await,
            Command::Hold(hold) => hold::hold(&hold).await,
            Command::Release(release) => hold::release(&release).await,
            Command::Pages(pages) => pages::run(&pages),
        }
    });
    // Not waiting for threads that hang in a system call on a dead mount.
    runtime.shutdown_background();
    ExitCode::from(match status {
        Ok(status) => status,
        Err(error) => {
            if json {
                // The status and the text below say it as well.
                let _ = output::print_json(&output::error_json(&error));
            }
            eprintln!("{}", output::clean(&error.report()));
            status_of(&error)
        }
    })
}

/// Returns the exit status of an error.
fn status_of(error: &Error) -> u8 {
    match error {
        Error::Invalid(_) => USAGE,
        Error::Corrupt(_) | Error::Conflict(_) => DAMAGED,
        Error::Unavailable(_)
        | Error::Denied(_)
        | Error::Missing(_)
        | Error::Mismatch(_)
        | Error::LocalIo(_) => FAILED,
    }
}
