//! `pitr restore --start`: the words for starting the restored server, and for what came of it.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use walship::{Error, Result};

use super::args::StartArgs;
use super::output::{self, Style};
use super::restore::{Finish, LINE_EVERY, REDRAW};
use crate::execute::RestoreReport;
use crate::execute::start::{Awaited, Replay, StartOptions, Started, State, find_pg_ctl, start};
use crate::plan::{RestorePlan, StopKind};
use crate::recovery_settings::Recovery;
use crate::target::{shell_word, utc_text};

/// Settings that the restore decides, beside those of the target.
const DECIDED: &[&str] = &[
    "archive_command",
    "archive_library",
    "archive_mode",
    "data_directory",
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
];

/// Returns how the restored server is to be started; `None` when it is not.
///
/// # Errors
/// [`Error::Invalid`] for settings that make no sense, [`Error::Missing`] without a fitting pg_ctl.
pub(super) async fn options(
    args: &StartArgs,
    plan: &RestorePlan,
    recovery: &Recovery,
) -> Result<Option<StartOptions>> {
    if !args.start {
        return Ok(None);
    }
    let settings = args.set.iter().map(|words| setting(words)).collect::<Result<Vec<_>>>()?;
    let with_own =
        |path: &str| std::path::Path::new(path).file_name().is_some_and(|n| n == "postgresql.conf");
    let elsewhere = plan.backup.settings_files.iter().any(|file| with_own(&file.path));
    if elsewhere && !settings.iter().any(|(name, _)| name == "config_file") {
        return Err(Error::invalid(
            "the backup's postgresql.conf lies outside the data directory: --start would find none in it",
        )
        .with_safe("nothing was written")
        .with_next(
            "Name one with --set config_file=PATH (--settings-dir brings the original one along, to be looked at \
             first); or leave --start out.",
        ));
    }
    let pg_ctl = find_pg_ctl(args.pg_bin.as_deref(), plan.backup.server_version / 10_000).await?;
    let patience = Duration::from_secs(args.start_timeout);
    Ok(Some(StartOptions { pg_ctl, settings, patience, awaited: Awaited::of(recovery) }))
}

/// Refuses to start a server as root, before anything is written: PostgreSQL refuses it afterwards.
///
/// # Errors
/// [`Error::Invalid`] as root.
pub(super) fn refuse_root(args: &StartArgs) -> Result<()> {
    if !args.start || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::invalid("--start does not work as root: PostgreSQL refuses to run as root")
        .with_safe("nothing was written")
        .with_next(
            "Run it as the user that the server is to run as: sudo -u postgres pitr restore ...; or leave --start out.",
        ))
}

pub(super) fn setting(words: &str) -> Result<(String, String)> {
    let named = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
    };
    // On the command line they would outrank what is written for the plan.
    let decided = |name: &str| {
        let name = name.to_ascii_lowercase();
        name.starts_with("recovery_target") || DECIDED.contains(&name.as_str())
    };
    match words.split_once('=') {
        Some((name, _)) if decided(name) => Err(Error::invalid(format!(
            "--set {name}=... would overrule what the restore decides"
        ))
        .with_safe("nothing was written")
        .with_next(
            "Use the options for that: the target, --target-action, --as, --primary-conninfo, --restore-cmd.",
        )),
        Some((name, value)) if named(name) && !value.contains(['\0', '\n', '\r']) => {
            Ok((name.to_ascii_lowercase(), value.to_owned()))
        }
        _ => Err(Error::invalid(format!("{words:?} is no setting"))
            .with_safe("nothing was written")
            .with_next("Write NAME=VALUE, as in --set port=5433.")),
    }
}

/// Starts the server, shows how far it is, and returns what came of it.
pub(super) async fn carry_out(
    plan: &RestorePlan,
    report: &RestoreReport,
    options: &StartOptions,
    restored_in: Duration,
) -> Result<Started> {
    let replay = Arc::new(Replay::default());
    let shown = replay.clone();
    let started = tokio::select! {
        started = start(plan, report, options, replay) => started,
        () = show(&shown, plan) => Err(Error::local_io("the progress display ended before the start")),
    };
    started.map(|started| Started { restore_seconds: Some(restored_in.as_secs_f64()), ..started })
}

/// Returns the error of a recovery that ended elsewhere than planned.
pub(super) fn unplanned(plan: &RestorePlan, report: &RestoreReport, started: &Started) -> Option<Error> {
    if started.as_planned != Some(false) {
        return None;
    }
    let ended = started.replayed_lsn.map_or_else(|| "elsewhere".to_owned(), |lsn| format!("at {lsn}"));
    let last = started.last_transaction_time.map_or_else(
        || "no transaction was replayed".to_owned(),
        |time| format!("the last transaction replayed ended {}", utc_text(time)),
    );
    let planned = plan.last_included.as_ref().map_or_else(
        || "no commit".to_owned(),
        |end| format!("transaction {} of {}", end.xid, utc_text(end.time)),
    );
    // It is left running: what it holds is the only evidence of what went wrong, and nothing else has
    // been changed by it.
    Some(
        Error::mismatch(format!(
            "recovery ended {ended}, and the plan ends at {} with {planned}; {last}",
            plan.stop.final_lsn
        ))
        .with_safe("the server is left running, to be looked at; the repository is unchanged")
        .with_next(format!(
            "Read {}, look at the data, and do not take it for what was planned. Stop it with pg_ctl -D {} stop.",
            started.log.display(),
            shell_word(&report.data_dir.to_string_lossy())
        )),
    )
}

/// Returns what came of a start, for people.
pub(super) fn text(plan: &RestorePlan, started: &Started, style: Style) -> String {
    let mut lines = Vec::new();
    if let Some(pid) = started.pid {
        let port = started.port.map_or_else(String::new, |port| format!(", port {port}"));
        let socket = started.socket_dir.as_ref();
        let socket = socket.map_or_else(String::new, |dir| format!(", socket in {}", dir.display()));
        lines.push(format!("  process {pid}{port}{socket}"));
    }
    lines.push(format!("  its output goes to {}", started.log.display()));
    if let Some(timeline) = started.timeline {
        lines.push(format!("  it is on timeline {timeline}"));
    }
    lines.extend(replayed(plan, started).map(|said| format!("  {said}")));
    if let Some(seconds) = started.restore_seconds {
        let data = plan.backup.data_bytes;
        lines.push(format!("  {} restored in {}", output::bytes(data), pace(data, seconds)));
    }
    if let (Some(bytes), Some(seconds)) = (started.replay_bytes, started.replay_seconds) {
        lines.push(format!("  {} of WAL replayed in {}", output::bytes(bytes), pace(bytes, seconds)));
    }
    if let Some(why) = &started.not_asked {
        lines.push(format!("  it runs and cannot be asked more: {why}"));
    }
    if started.state == State::WouldStart {
        lines.push(format!("  by {}", started.command));
    }
    let said: String = lines.iter().map(|line| output::clean(line) + "\n").collect();
    format!("\n{}\n{said}", style.bold(title(started.state)))
}

fn title(state: State) -> &'static str {
    match state {
        State::WouldStart => "Would start it",
        State::Open => "Started, recovered, and open for writing",
        State::Paused => "Started, and paused at the target, read-only",
        State::Stopped => "Started, recovered, and stopped at the target",
        State::Standby => "Started: a standby",
        State::Recovering => "Started, and recovering",
    }
}

/// Returns how far it has replayed, and whether that is as planned.
fn replayed(plan: &RestorePlan, started: &Started) -> Option<String> {
    let lsn = started.replayed_lsn?;
    let last = match started.last_transaction_time {
        Some(time) => format!(", the last transaction of {}", utc_text(time)),
        None => String::new(),
    };
    let planned = match (started.as_planned, started.state) {
        (Some(true), _) if plan.stop.kind == StopKind::EndOfWal && lsn > plan.stop.final_lsn => {
            format!("all that was planned ({}), and what was archived since", plan.stop.final_lsn)
        }
        (Some(true), _) => match &plan.last_included {
            Some(end) => format!("as planned: transaction {} is the last commit in it", end.xid),
            None => "as planned".to_owned(),
        },
        (Some(false), _) => format!("NOT as planned: the plan ends at {}", plan.stop.final_lsn),
        (None, State::Standby) => format!("the archive ended at {} when it was planned", plan.stop.final_lsn),
        (None, _) => format!("the plan ends at {}", plan.stop.final_lsn),
    };
    let further = if started.replay_bytes.is_none() { " or further" } else { "" };
    Some(format!("replayed up to {lsn}{further}{last}; {planned}"))
}

/// Returns a time and what is done in each second of it.
fn pace(bytes: u64, seconds: f64) -> String {
    format!("{seconds:.1} s ({}/s)", output::bytes((bytes as f64 / seconds.max(0.001)) as u64))
}

/// Returns the JSON of a restore, but what it is about.
pub(super) fn outcome(dry_run: bool, started: Option<&Started>, failed: Option<&Error>) -> Value {
    let outcome = match (started, failed) {
        _ if dry_run => "would_restore",
        (None, None) => "restored",
        (Some(_), None) => "started",
        (Some(_), Some(_)) => "not_as_planned",
        (None, Some(_)) => "start_failed",
    };
    let mut value = json!({ "outcome": outcome, "start": started });
    if let Some(error) = failed {
        let told = output::error_json(error);
        for key in ["kind", "error", "safe", "next"] {
            value[key] = told[key].clone();
        }
    }
    value
}

/// Shows how far replay is until it is dropped: a bar on a terminal, now and then a line elsewhere.
pub(super) async fn show(replay: &Replay, plan: &RestorePlan) {
    let started = Instant::now();
    let from = plan.backup.start_lsn;
    let total = plan.stop.final_lsn.bytes_since(from);
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(
            "  {bar:30} {bytes} of {total_bytes} replayed  {bytes_per_sec}  {eta} left  {msg}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Finish(bar)
    });
    let mut next_line = started + LINE_EVERY;
    loop {
        tokio::time::sleep(REDRAW).await;
        let now = replay.now();
        let at = now.lsn.map_or_else(|| "nothing yet".to_owned(), |lsn| format!("up to {lsn}"));
        let commits = now.last_transaction.map_or_else(String::new, |time| format!(", {}", utc_text(time)));
        let done = now.lsn.map_or(0, |lsn| lsn.bytes_since(from)).min(total);
        match &bar {
            Some(bar) => {
                bar.0.set_position(done);
                bar.0.set_message(format!("{at}{commits}"));
            }
            None if Instant::now() >= next_line => {
                next_line += LINE_EVERY;
                let rate = done / started.elapsed().as_secs().max(1);
                let left = total.saturating_sub(done) / rate.max(1);
                let percent = done.saturating_mul(100) / total.max(1);
                eprintln!(
                    "replayed {at}{commits}: {percent} % of {}, {}/s, about {left} s left",
                    output::bytes(total),
                    output::bytes(rate)
                );
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_a_name_and_a_value() {
        assert_eq!(setting("port=5433").unwrap(), ("port".to_owned(), "5433".to_owned()));
        assert_eq!(setting("Cluster_Name=a=b").unwrap(), ("cluster_name".to_owned(), "a=b".to_owned()));
        assert_eq!(setting("my.setting=").unwrap().1, "");
        for words in
            ["port", "=1", "a b=1", "port=1\n", "-c port=1", "Archive_Mode=on", "recovery_target=immediate"]
        {
            assert!(setting(words).is_err(), "{words:?}");
        }
    }
}
