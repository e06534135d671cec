//! What commands that restore to a scratch folder share: where that is, who may, and when to stop.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use walship::config::{Config, Overrides};
use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::args::ScratchArgs;
use super::restore::tail_arguments;
use super::source::{restore_cmd, restore_cmd_arguments};
use super::{restore, start};
use crate::execute::Progress;
use crate::execute::scratch::{self, Private, Purpose, Scratch, Stage};
use crate::execute::start::{Replay, find_pg_ctl};
use crate::plan::RestorePlan;
use crate::recovery_settings::restore_command;
use crate::target::shell_word;

/// Settings that make the server a private one: none of them may be set.
const DECIDED: &[&str] = &[
    "archive_mode",
    "cluster_name",
    "external_pid_file",
    "hba_file",
    "ident_file",
    "listen_addresses",
    "log_destination",
    "logging_collector",
    "port",
    "unix_socket_directories",
    "unix_socket_permissions",
    "unix_socket_group",
];

/// Refuses to work as root: PostgreSQL does not run as root.
///
/// # Errors
/// [`Error::Invalid`] as root.
pub(super) fn refuse_root(command: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::invalid(format!("pitr {command} does not work as root: PostgreSQL refuses to run as root"))
        .with_safe("nothing was written")
        .with_next(format!(
            "Run it as a user that may read the repository: sudo -u postgres pitr {command} ..."
        )))
}

/// Returns the operator's settings for the private server.
///
/// # Errors
/// [`Error::Invalid`] for what makes no sense, or would make it less private.
pub(super) fn settings(args: &ScratchArgs) -> Result<Vec<(String, String)>> {
    let checked = |words: &String| {
        let (name, value) = start::setting(words)?;
        match DECIDED.contains(&name.as_str()) {
            false => Ok((name, value)),
            true => Err(Error::invalid(format!(
                "--set {name}=... would make the scratch server less private than it has to be"
            ))
            .with_safe("nothing was written")
            .with_next("Leave it out.")),
        }
    };
    args.set.iter().map(checked).collect()
}

/// Returns the scratch folder's path.
///
/// # Errors
/// As [`Config::load`]; [`Error::Invalid`] for a folder in a repository.
pub(super) fn folder(args: &ScratchArgs, overrides: &Overrides) -> Result<PathBuf> {
    let config = Config::load(overrides)?;
    let folder = match (&args.scratch, &config.state_dir) {
        (Some(folder), _) => folder.clone(),
        (None, Some(state)) => state.join("scratch"),
        (None, None) => env::temp_dir().join(format!("walship-scratch-{}", nix::unistd::geteuid())),
    };
    let absolute = std::path::absolute(&folder)
        .map_err(|error| Error::from_io(format!("resolving {}", folder.display()), error))?;
    for repository in config.repositories.iter().filter_map(|one| one.url.strip_prefix("file://")) {
        if absolute.starts_with(repository) {
            return Err(Error::invalid(format!(
                "the scratch folder {} lies in the repository {repository}",
                absolute.display()
            ))
            .with_safe("nothing was written")
            .with_next("Choose another folder with --scratch."));
        }
    }
    Ok(absolute)
}

/// Returns what it takes to bring the scratch server up.
///
/// # Errors
/// [`Error::Missing`] without a fitting pg_ctl or restore-cmd.
pub(super) async fn private<'a>(
    args: &ScratchArgs,
    overrides: &Overrides,
    repository: &'a LineageRepository,
    plan: &'a RestorePlan,
    purpose: Purpose,
) -> Result<Private<'a>> {
    let program = restore_cmd(args.restore_cmd.as_deref())?;
    let mut arguments = restore_cmd_arguments(overrides, repository)?;
    arguments.extend(tail_arguments(plan));
    let major = plan.backup.server_version / 10_000;
    let pg_ctl = find_pg_ctl(args.pg_bin.as_deref(), major).await.map_err(|error| {
        error.with_next(format!(
            "Install PostgreSQL {major} on this machine, or name the folder of its programs with --pg-bin."
        ))
    })?;
    Ok(Private {
        repository,
        plan,
        purpose,
        restore_command: restore_command(&program, &arguments),
        pg_ctl,
        settings: settings(args)?,
        patience: Duration::from_secs(args.start_timeout),
    })
}

/// Returns how to start, by hand, what was kept; and how to get rid of it.
fn keep(scratch: Scratch, private: &Private<'_>) -> Result<String> {
    let data_dir = scratch.data_dir();
    let word = |text: &str| shell_word(text);
    let settings = scratch::settings(&scratch, private)?;
    let options: Vec<String> =
        settings.iter().map(|(name, value)| format!("-c {}", word(&format!("{name}={value}")))).collect();
    let start = format!(
        "{} start -D {} -l {} -o {}",
        word(&private.pg_ctl.to_string_lossy()),
        word(&data_dir.to_string_lossy()),
        word(&data_dir.join("log/pitr-start.log").to_string_lossy()),
        word(&format!("-c data_directory={} {}", word(&data_dir.to_string_lossy()), options.join(" ")))
    );
    let removed = scratch.keep()?;
    Ok(format!("{}; start it with {start}; remove it with {removed}", data_dir.display()))
}

/// What tells the program to stop.
pub(super) struct Told {
    signals: Vec<(&'static str, Signal)>,
}

impl Told {
    /// From now on these signals are heard here, and end nothing by themselves. One that whoever started this program
    /// had it ignore (`nohup`) stays ignored.
    pub(super) fn listen() -> Result<Self> {
        let ignored = ignored_signals();
        let mut signals = Vec::new();
        for (name, kind) in [
            ("SIGTERM", SignalKind::terminate()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGHUP", SignalKind::hangup()),
        ] {
            if ignored >> (kind.as_raw_value() - 1) & 1 == 0 {
                let heard = signal(kind).map_err(|error| Error::from_io("waiting for signals", error))?;
                signals.push((name, heard));
            }
        }
        Ok(Self { signals })
    }

    /// Returns the signal's name, once there is one.
    pub(super) async fn stop(&mut self) -> &'static str {
        let heard = self.signals.iter_mut().map(|(name, signal)| {
            Box::pin(async {
                signal.recv().await;
                *name
            })
        });
        match heard.collect::<Vec<_>>() {
            none if none.is_empty() => std::future::pending().await,
            some => futures_util::future::select_all(some).await.0,
        }
    }
}

/// Returns the signals that this process ignores, a bit for each; none where the system does not say.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Returns what a program that was told to stop ended with.
pub(super) fn interrupted(signal: &str) -> Broken {
    let error = Error::unavailable(format!("interrupted by {signal}"))
        .with_safe("the scratch server was ended and everything it had was removed")
        .with_next("Run it again when there is time for it.");
    Broken { interrupted: true, error }
}

/// How the work on a scratch server ended that did not succeed.
#[derive(Debug)]
pub(super) struct Broken {
    /// Whether it was told to stop.
    pub(super) interrupted: bool,
    /// Why.
    pub(super) error: Error,
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self { interrupted: false, error }
    }
}

/// What became of a scratch folder.
#[derive(Debug, Default)]
pub(super) struct CleanUp {
    /// Where what was restored is left, how to start it, how to remove it.
    pub(super) kept: Option<String>,
    /// What is to be known.
    pub(super) notes: Vec<String>,
}

/// Ends the server and removes everything, or leaves it stopped where that is asked for; however the work ended.
pub(super) async fn clean_up<T>(
    scratch: Scratch,
    private: &Private<'_>,
    asked_to_keep: bool,
    ended: Result<T, Broken>,
) -> (Result<T, Broken>, CleanUp) {
    let keeps = asked_to_keep && !ended.as_ref().is_err_and(|broken| broken.interrupted);
    let mut done = CleanUp::default();
    let cleaned_up = match keeps {
        true => scratch.end().await.and_then(|()| keep(scratch, private)).map(|kept| done.kept = Some(kept)),
        false => scratch.remove().await.map(|removed| {
            let left = removed.left.join(", ");
            done.notes.extend((!left.is_empty()).then(|| format!("left in the scratch folder: {left}")));
        }),
    };
    let ended = match (ended, cleaned_up) {
        (Ok(value), Ok(())) => Ok(value),
        (Ok(_), Err(error)) => Err(error.context("cleaning up the scratch folder").into()),
        (Err(Broken { interrupted: false, error }), Ok(())) => Err(cleaned(error, keeps).into()),
        (Err(broken), Ok(())) => Err(broken),
        (Err(Broken { interrupted, error }), Err(left)) => {
            done.notes.push(format!("the clean-up failed as well: {left}"));
            let error = error.with_safe("the repository is unchanged").with_next(left.next().to_owned());
            Err(Broken { interrupted, error })
        }
    };
    (ended, done)
}

/// Returns an error as it is after the clean-up: what the restore or the server said of its folder no longer holds.
fn cleaned(error: Error, kept: bool) -> Error {
    if kept {
        return error;
    }
    if let Error::Mismatch(_) | Error::Conflict(_) = &error {
        // It is about another place than the folder.
        return error;
    }
    let next = match &error {
        Error::Invalid(_) | Error::Missing(_) | Error::Denied(_) => error.next().to_owned(),
        _ => {
            "Mend what the first line says, then run it again; with --keep what was restored stays, and the \
              server's log lies in log/ of its data directory."
                .to_owned()
        }
    };
    error.with_safe("nothing but the scratch folder was written, and that was cleaned up").with_next(next)
}

/// Shows how far a scratch server is until it is open, and then waits without end.
pub(super) async fn show(
    progress: &Progress,
    replay: &Replay,
    plan: &RestorePlan,
    mut stage: watch::Receiver<Stage>,
) {
    tokio::select! {
        () = restore::show(progress, plan.backup.data_bytes) => {}
        _ = stage.wait_for(|stage| *stage >= Stage::Recovering) => {}
    }
    tokio::select! {
        () = start::show(replay, plan) => {}
        _ = stage.wait_for(|stage| *stage >= Stage::Open) => {}
    }
    std::future::pending::<()>().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_of_a_folder_does_not_outlive_it() {
        let error = Error::local_io("the server ended").with_safe("the data is whole").with_next("Start it.");
        let error = cleaned(error, false);
        assert!(error.safe().contains("cleaned up") && error.next().contains("--keep"), "{error:?}");
        let error = cleaned(Error::missing("no pg_ctl").with_next("Install it."), false);
        assert_eq!(error.next(), "Install it.");
        assert_eq!(cleaned(Error::missing("x").with_next("y"), true).next(), "y");
    }
}
