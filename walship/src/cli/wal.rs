//! `walship wal push PATH` and `walship wal fetch NAME PATH`; `wal give-up` is in its own file.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use walship::agent::client::{self, Asker};
use walship::archive::fetch::{FetchFailure, FetchOptions, FetchOutcome, fetch_file};
use walship::archive::give_up::{Pushed, push_where_open};
use walship::archive::own_folder;
use walship::archive::push::PushOptions;
use walship::config::{Config, Overrides};
use walship::error::{Error, Result};
use walship::pg::{Lsn, WalFileName};

use super::open::Configured;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Store one WAL file in every repository
    #[command(after_help = "\
Exit status:
  0      the file is durable in every repository; or it cannot be stored, and
         every repository has the record by which an operator gave it up
         (`walship wal give-up`): a warning says so each time
  1-125  it is not; PostgreSQL keeps it and asks again")]
    Push(PushArgs),
    /// Fetch one WAL file, or prove that it is not there
    #[command(after_help = "\
Exit status:
  0    the file is in place, whole and checked
  1    the file is proven not to be in any repository, and nothing behind it is
  75   no answer, and standby.signal lies beside the pg_wal of PATH: the standby asks again
  126  no answer (outage, hole, damage, configuration, usage): PostgreSQL stops the recovery")]
    Fetch(FetchArgs),
    /// Give up a segment that cannot be archived, so that the archiver goes on: restores will not cross it
    #[command(after_help = super::give_up::HELP)]
    GiveUp(super::give_up::Args),
}

#[derive(Debug, clap::Args)]
pub(super) struct PushArgs {
    /// The file: %p of archive_command
    path: PathBuf,
    /// Push into this lineage, by number, instead of finding it by the system identifier
    #[arg(long, value_name = "NUMBER")]
    lineage: Option<u32>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct FetchArgs {
    /// The file's name: %f of restore_command
    name: OsString,
    /// Where to put it: %p of restore_command
    path: PathBuf,
    /// Fetch from this lineage, by number, instead of that of PATH's data directory, else the newest
    #[arg(long, value_name = "NUMBER")]
    lineage: Option<u32>,
    /// Take a damaged part of the open segment, which the archive ends in, for its end; `pitr restore` sets this
    /// where its plan said so
    #[arg(long)]
    up_to_damage: bool,
    /// Serve the parts of the segment in which the ledger of gaps says that WAL is lost from this LSN on, up to there:
    /// for a recovery with a target before it. `pitr restore` sets this where its plan said so
    #[arg(long, value_name = "LSN")]
    up_to_gap: Option<Lsn>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// Pushes one file. Silent when nothing needs to be said: PostgreSQL's log holds the output.
pub(super) async fn push(args: &PushArgs, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let options = push_options(&config, args.lineage)?;
    let pushed = push_where_open(&Configured::new(&config)?, &args.path, &options).await?;
    for warning in pushed.warnings(&args.path) {
        super::say(&warning);
    }
    match &pushed {
        Pushed::Stored(report) if args.json => super::print_report(report, true, String::new)?,
        Pushed::GivenUp { failure, record } if args.json => {
            let file = args.path.file_name().unwrap_or_default().display().to_string();
            let report = serde_json::json!({
                "file": file, "given_up": record, "failure": failure.to_string(),
            });
            super::print_report(&report, true, String::new)?;
        }
        _ => {}
    }
    super::agent::start_if_wanted(&config, &args.path, 1);
    Ok(0)
}

pub(super) fn push_options(config: &Config, lineage: Option<u32>) -> Result<PushOptions> {
    let spool_dir = match &config.state_dir {
        Some(folder) => own_folder(Some(folder))?,
        None => std::env::temp_dir(),
    };
    Ok(PushOptions { compression: config.compression, lineage, spool_dir })
}

/// Fetches one file and returns the exit status, which is the answer.
pub(super) fn fetch(args: &FetchArgs, overrides: &Overrides) -> u8 {
    let bound = client::bound_to_starter();
    match bound.and_then(|absent| Ok((absent, try_fetch(args, overrides)?))) {
        Ok((absent, Fetched::Answered(outcome))) => {
            if args.json {
                let _ = super::print_report(&outcome, true, String::new);
            }
            match outcome {
                FetchOutcome::Delivered { .. } => 0,
                FetchOutcome::Absent => {
                    if Asker::of(&args.path) != Asker::Standby && !args.json {
                        super::say(&format!("{} is not in the repository", args.name.display()));
                    }
                    absent
                }
            }
        }
        Ok((_, Fetched::Failed(failure))) => {
            super::say_error(&failure.error);
            if failure.must_stop { client::STATUS_STOP } else { Asker::of(&args.path).unanswered() }
        }
        Err(error) => {
            super::say_error(&error);
            client::unanswered(Some(&args.name), Some(&args.path))
        }
    }
}

enum Fetched {
    Answered(FetchOutcome),
    Failed(FetchFailure),
}

/// An `Err` is a failure that was not noted yet.
fn try_fetch(args: &FetchArgs, overrides: &Overrides) -> Result<Fetched> {
    let name = args.name.to_str().ok_or_else(|| Error::invalid("the file's name is not UTF-8"))?;
    let name: WalFileName = name.parse()?;
    let config = super::config(overrides)?;
    let asker = Asker::of(&args.path);
    let options = FetchOptions {
        lineage: args.lineage,
        retry: asker.retry(Duration::from_millis(config.restore_retry_ms)),
        up_to_damage: args.up_to_damage,
        up_to_gap: args.up_to_gap,
        standby: asker == Asker::Standby,
        deliver_to: None,
    };
    if asker != Asker::Other {
        super::agent::start_if_wanted(&config, &args.path, 2);
    }
    let clusters = Configured::new(&config)?;
    super::block_on(async {
        Ok(match fetch_file(&clusters, name, &args.path, &options).await {
            Ok(outcome) => Fetched::Answered(outcome),
            Err(failure) => Fetched::Failed(failure),
        })
    })
}

/// Whether these are arguments of `wal push`, even if they make no sense otherwise.
pub(super) fn is_push(arguments: &[OsString]) -> bool {
    arguments.windows(2).any(|pair| pair[0] == "wal" && pair[1] == "push")
}

/// A `wal fetch` in arguments that may make no sense otherwise: its failure must not read as "absent".
pub(super) struct FetchCall {
    name: Option<OsString>,
    target: Option<PathBuf>,
}

impl FetchCall {
    /// Returns the call, if the arguments hold one.
    pub(super) fn in_arguments(arguments: &[OsString]) -> Option<Self> {
        let at = arguments.windows(2).position(|pair| pair[0] == "wal" && pair[1] == "fetch")?;
        let mut rest = arguments.get(at + 2..)?.iter().rev();
        let target = rest.next().map(PathBuf::from);
        Some(Self { target, name: rest.next().cloned() })
    }

    /// Returns the status for a call that could not be carried out.
    pub(super) fn unanswered(&self) -> u8 {
        client::unanswered(self.name.as_deref().map(OsStr::new), self.target.as_deref().map(Path::new))
    }
}
