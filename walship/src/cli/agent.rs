//! `walship agent`: the worker behind the two thin commands.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use walship::agent::meeting::{Meeting, SOCKET_VARIABLE, WANTED_VARIABLE};
use walship::agent::server::detach::{detach, is_adopted_safely, postmaster_would_adopt};
use walship::agent::server::{Ended, Settings, SideBySide, serve};
use walship::archive::DataDirectory;
use walship::config::{AgentUse, Config, Overrides};
use walship::error::{Error, Result};

pub(super) const HELP: &str = "\
`archive-cmd` and `restore-cmd` ask it over a Unix socket: files are pushed and fetched before PostgreSQL asks
for them, and connections stay open. They start one by themselves unless `agent = \"off\"` is configured, and work
without one where there is none; it ends by itself when nobody asks.

Under a supervisor, as in a container where PostgreSQL is the first process, give both sides the same socket:

    WALSHIP_AGENT_SOCKET=/run/walship/main.sock walship agent --data-dir /var/lib/postgresql/18/main

It may be stopped and killed at any time: nothing is lost, the commands do the work themselves.

Exit status:
  0  it was stopped, nobody asked, or another one is at work at this socket
  1  failed; the message says what happened, what is still safe and what to do";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The data directory of the server that it works for
    #[arg(long, short = 'D', value_name = "FOLDER")]
    data_dir: PathBuf,
    /// The socket; its folder must be this user's alone [env: WALSHIP_AGENT_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// End after so many seconds without a question; 0: never [default: 60 when started by a thin command, else 0]
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u64>,
    /// Push into and fetch from this lineage, by number, instead of finding it by the system identifier
    #[arg(long, value_name = "NUMBER")]
    lineage: Option<u32>,
    /// The process that started this one and ends soon
    #[arg(long, value_name = "PID", hide = true)]
    detached_from: Option<i32>,
}

/// Longer than any agent runs.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// How long an agent that a thin command started waits for questions.
const IDLE: Duration = Duration::from_secs(60);

/// To be called before anything is opened: leaves the server that started this process.
pub(super) fn leave(args: &Args) -> Result<()> {
    match (&args.detached_from, &args.socket) {
        (Some(_), Some(socket)) => detach(&socket.with_extension("log")),
        _ => Ok(()),
    }
}

/// Answers until it is stopped, or not asked any more.
pub(super) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = super::config(overrides)?;
    let socket = args.socket.clone().or_else(|| env::var_os(SOCKET_VARIABLE).map(PathBuf::from));
    let socket = socket.filter(|socket| socket.is_absolute()).ok_or_else(|| {
        Error::invalid("no socket is named, or not by its absolute path").with_next(format!(
            "Name it with --socket or {SOCKET_VARIABLE}, and set {SOCKET_VARIABLE} for the server as well."
        ))
    })?;
    let data_directory = std::fs::canonicalize(&args.data_dir)
        .map_err(|error| Error::from_io(format!("finding {}", args.data_dir.display()), error))?;
    let idle = args.idle.map(Duration::from_secs).unwrap_or(match args.detached_from {
        Some(_) => IDLE,
        None => Duration::ZERO,
    });
    let cores = std::thread::available_parallelism().map_or(2, usize::from).clamp(1, 7);
    let settings = Settings {
        repositories: config.repositories.clone(),
        cluster: config.cluster.parse()?,
        push: super::wal::push_options(&config, args.lineage)?,
        restore_retry: Duration::from_millis(config.restore_retry_ms),
        // A core compresses while others of its segments are on their way.
        pushed: SideBySide { encoding: cores, ahead: 3 * cores },
        fetched: cores + 1,
        idle_max: if idle.is_zero() { FOR_EVER } else { idle },
        meeting: Meeting { socket: socket.clone(), data_directory: data_directory.clone() },
    };
    let mut told = super::receive::stop_signals()?;
    let stop = async {
        let adopted = async {
            match args.detached_from {
                Some(starter) if !is_adopted_safely(starter, &data_directory).await => {}
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = told.wait_for(|stop| *stop) => {}
            () = adopted => {}
        }
    };
    let ended = serve(settings, stop).await?;
    if args.detached_from.is_none() {
        super::say(match ended {
            Ended::Taken => "another agent is at work at this socket",
            Ended::Idle => "nobody asked any more",
            Ended::Replaced => "the socket or the data directory is gone, or another's",
            Ended::Told => "stopped",
        });
    }
    Ok(0)
}

/// Starts an agent for the calls to come where a thin command looked for one in vain and the configuration
/// allows it. `positional` of this program's arguments, at their end, are not options. That none can be started
/// is nobody's concern: the work is done without.
pub(super) fn start_if_wanted(config: &Config, file: &Path, positional: usize) {
    let Some(socket) = env::var_os(WANTED_VARIABLE).filter(|value| !value.is_empty()) else { return };
    if config.agent == AgentUse::Off || config.repositories.iter().any(has_relative_path) {
        return;
    }
    let directory = DataDirectory::of_wal_file(file).and_then(|own| std::fs::canonicalize(own.path()).ok());
    let Some(directory) = directory.filter(|directory| !postmaster_would_adopt(directory)) else { return };
    let arguments: Vec<OsString> = env::args_os().collect();
    // The program's name, `wal`, `push`.
    let Some(options) = arguments.get(3..arguments.len().saturating_sub(positional)) else { return };
    let Ok(program) = env::current_exe() else { return };
    let started = Command::new(program)
        .args(["agent", "--detached-from", &std::process::id().to_string()])
        .arg("--socket")
        .arg(socket)
        .arg("--data-dir")
        .arg(directory)
        .args(options)
        .env_remove(WANTED_VARIABLE)
        .env_remove(walship::agent::client::ABSENT_STATUS_VARIABLE)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Err(error) = started {
        tracing::debug!(%error, "no agent was started");
    }
}

/// The agent has another working folder.
fn has_relative_path(storage: &walship::storage::StorageConfig) -> bool {
    storage.s3.ca_file.as_ref().is_some_and(|path| path.is_relative())
}
