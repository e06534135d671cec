//! Starts PostgreSQL on a restored data directory, watches it replay, and says what came of it.
//!
//! `pg_ctl` starts it, in a session of its own: it goes on whatever becomes of this program. Nothing is stopped
//! here, and no setting is written: what a start needs beside the restored files stands on the server's command line.

mod log_file;
mod pg_ctl;
mod pid_file;
mod run;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::Serialize;
use walship::Result;
use walship::pg::{Lsn, TimelineId};

use super::restore::{RestoreReport, pinned};
use crate::plan::{RestorePlan, StopKind};
use crate::recovery_settings::{Recovery, TargetAction};
use crate::target::shell_word;
use run::Run;
use watch::{Look, Watcher};

pub use pg_ctl::{find as find_pg_ctl, find_tool};

/// The server's output, below the data directory.
const LOG_FILE: &str = "log/pitr-start.log";

/// What a server that recovers comes to, and what is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// Recovery has ended, and it is open for writing.
    Open,
    /// It pauses at its target.
    Paused,
    /// It has reached its target and stopped.
    Stopped,
    /// It is consistent, answers queries, and stays a standby.
    Standby,
}

impl Awaited {
    /// Returns what recovery by this plan comes to.
    pub fn of(recovery: &Recovery) -> Self {
        match recovery {
            Recovery::ToTarget(TargetAction::Promote) => Self::Open,
            Recovery::ToTarget(TargetAction::Pause) => Self::Paused,
            Recovery::ToTarget(TargetAction::Shutdown) => Self::Stopped,
            Recovery::Standby(_) => Self::Standby,
        }
    }
}

/// How a server is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartOptions {
    /// The pg_ctl of the backup's major version; see [`find_pg_ctl`].
    pub pg_ctl: PathBuf,
    /// Settings for this start, on the server's command line.
    pub settings: Vec<(String, String)>,
    /// How long replay may make no progress.
    pub patience: Duration,
    /// What is waited for.
    pub awaited: Awaited,
}

/// How far replay is; read it at any time.
#[derive(Debug, Default)]
pub struct Replay(Mutex<Replayed>);

/// A position of replay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Everything before it is replayed; `None` before that is known.
    pub lsn: Option<Lsn>,
    /// When the last transaction ended that is replayed.
    pub last_transaction: Option<DateTime<Utc>>,
}

impl Replay {
    /// Returns how far it is now.
    pub fn now(&self) -> Replayed {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, replayed: Replayed) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = replayed;
    }
}

/// What a server that was started does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing yet: it would be started.
    WouldStart,
    /// It is open for writing.
    Open,
    /// It is paused at its target, read-only.
    Paused,
    /// It has stopped at its target.
    Stopped,
    /// It is a standby.
    Standby,
    /// It recovers, or pauses: it cannot be asked which.
    Recovering,
}

/// A server that was started on a restored data directory, and how far it has replayed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Started {
    /// The command that started it.
    pub command: String,
    /// The file that its output goes to.
    pub log: PathBuf,
    /// What it does.
    pub state: State,
    /// Its process.
    pub pid: Option<u32>,
    /// Its port.
    pub port: Option<u16>,
    /// The folder of its Unix socket.
    pub socket_dir: Option<PathBuf>,
    /// The timeline that it is on.
    pub timeline: Option<TimelineId>,
    /// The position after the last record that is replayed.
    pub replayed_lsn: Option<Lsn>,
    /// When the last transaction ended that is replayed, by commit or abort.
    pub last_transaction_time: Option<DateTime<Utc>>,
    /// Whether recovery ended where the plan says; `None` where it has not ended, or that is not known.
    pub as_planned: Option<bool>,
    /// How much WAL it has replayed.
    pub replay_bytes: Option<u64>,
    /// How long it took from the start.
    pub replay_seconds: Option<f64>,
    /// How long the restore before took.
    pub restore_seconds: Option<f64>,
    /// Why it could not be asked, where that is so.
    pub not_asked: Option<String>,
}

/// Returns what [`start`] would do.
pub fn would_start(report: &RestoreReport, options: &StartOptions) -> Started {
    let log = report.data_dir.join(LOG_FILE);
    Started {
        command: shown(report, options, &log),
        log,
        state: State::WouldStart,
        pid: None,
        port: None,
        socket_dir: None,
        timeline: None,
        replayed_lsn: None,
        last_transaction_time: None,
        as_planned: None,
        replay_bytes: None,
        replay_seconds: None,
        restore_seconds: None,
        not_asked: None,
    }
}

/// Starts PostgreSQL on the restored data directory and waits until it has come to what is awaited.
///
/// # Errors
/// [`walship::Error::LocalIo`] with the server's own last words when it ends before that, and when it cannot be started;
/// [`walship::Error::Unavailable`] when replay makes no progress for [`StartOptions::patience`]: the server is left running.
/// # Cancel safety
/// Dropping the future leaves the server running.
pub async fn start(
    plan: &RestorePlan,
    report: &RestoreReport,
    options: &StartOptions,
    replay: Arc<Replay>,
) -> Result<Started> {
    let mut started = would_start(report, options);
    let log = started.log.clone();
    let mut run = Run {
        plan,
        options,
        command: started.command.clone(),
        data_dir: report.data_dir.clone(),
        log: log_file::ServerLog::open(&report.data_dir, &log)?,
        watcher: Watcher::of(&report.data_dir),
    };
    run.check_configuration()?;
    let begun = Instant::now();
    let mut pg_ctl = run.launch(report)?;
    let look = run.watch(&mut pg_ctl, &replay).await?;
    started.replay_seconds = Some(begun.elapsed().as_secs_f64());
    started.state = state(options.awaited, &look);
    if let Some(server) = &look.server {
        started.pid = Some(server.pid);
        started.port = server.port;
        started.socket_dir = server.socket_dir(&report.data_dir);
    }
    started.timeline = look.timeline();
    started.replayed_lsn = look.replayed();
    started.last_transaction_time = look.answer.as_ref().and_then(|answer| answer.last_transaction);
    started.replay_bytes = look.exactly_replayed().map(|lsn| lsn.bytes_since(plan.backup.start_lsn));
    started.as_planned = match started.state {
        State::Open | State::Paused => look.exactly_replayed().map(|lsn| is_as_planned(plan, lsn)),
        State::WouldStart | State::Stopped | State::Standby | State::Recovering => None,
    };
    started.not_asked = look.not_asked;
    Ok(started)
}

/// Returns what a server does of which no more is to be awaited.
fn state(awaited: Awaited, look: &Look) -> State {
    match awaited {
        Awaited::Stopped if look.server.is_none() => State::Stopped,
        Awaited::Standby => State::Standby,
        _ if look.is_open() => State::Open,
        _ if look.is_paused() => State::Paused,
        _ => State::Recovering,
    }
}

/// Returns whether a recovery that ended at this position ended where the plan says. What has been archived
/// since the plan was made is replayed as well, when the end of the archive was the target.
fn is_as_planned(plan: &RestorePlan, ended: Lsn) -> bool {
    match plan.stop.kind {
        StopKind::EndOfWal => ended >= plan.stop.final_lsn,
        StopKind::Before | StopKind::After | StopKind::Consistent => ended == plan.stop.final_lsn,
    }
}

/// Returns the options of the server's command line, as pg_ctl hands them to a shell.
fn server_options(report: &RestoreReport, options: &StartOptions) -> String {
    // Whatever file its configuration is in, and whatever data directory that names.
    let mut words = vec![pinned(&report.data_dir)];
    // Else it could not be asked while it recovers. What is restored is not changed by it.
    let hot_standby = ("hot_standby".to_owned(), "on".to_owned());
    let told = options.settings.iter().any(|(name, _)| *name == hot_standby.0);
    let settings = (!told).then_some(&hot_standby).into_iter().chain(&options.settings);
    words.extend(settings.map(|(name, value)| format!("-c {}", shell_word(&format!("{name}={value}")))));
    words.join(" ")
}

/// Returns the command that starts the server, for people.
fn shown(report: &RestoreReport, options: &StartOptions, log: &Path) -> String {
    let word = |path: &Path| shell_word(&path.to_string_lossy());
    format!(
        "{} start -D {} -l {} -o {}",
        word(&options.pg_ctl),
        word(&report.data_dir),
        word(log),
        shell_word(&server_options(report, options))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plain_plan;
    use crate::target::{RecoveryTarget, TargetKind};

    #[test]
    fn a_recovery_to_the_end_may_find_more_and_to_a_target_not() {
        for (kind, more) in [(TargetKind::Latest, true), (TargetKind::Xid(1020), false)] {
            let plan = plain_plan(&RecoveryTarget::new(kind));
            let end = plan.stop.final_lsn;
            assert!(is_as_planned(&plan, end));
            assert!(!is_as_planned(&plan, Lsn(end.0 - 8)));
            assert_eq!(is_as_planned(&plan, Lsn(end.0 + 8)), more);
        }
    }

    #[test]
    fn settings_survive_the_shell_that_pg_ctl_uses() {
        let report = RestoreReport {
            data_dir: "/srv/it's".into(),
            tablespaces: Default::default(),
            files: 1,
            data_bytes: 1,
            delta: None,
            set_aside: Vec::new(),
            standby: false,
            notes: Vec::new(),
            start_command: String::new(),
        };
        let options = |settings: &[(&str, &str)]| StartOptions {
            pg_ctl: "/usr/bin/pg_ctl".into(),
            settings: settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            patience: Duration::from_secs(1),
            awaited: Awaited::Open,
        };
        let words = server_options(&report, &options(&[("port", "5433"), ("cluster_name", "a b")]));
        assert_eq!(
            words,
            r"-c data_directory='/srv/it'\''s' -c hot_standby=on -c port=5433 -c 'cluster_name=a b'"
        );
        let words = server_options(&report, &options(&[("hot_standby", "off")]));
        assert_eq!(words, r"-c data_directory='/srv/it'\''s' -c hot_standby=off");
    }
}
