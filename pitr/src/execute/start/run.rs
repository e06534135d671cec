//! One start while it is watched: from pg_ctl to what is awaited, or to the words for why not.

use std::env;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use walship::pg::control::{ClusterState, ControlData};
use walship::{Error, Result};

use super::log_file::ServerLog;
use super::pid_file::PidFile;
use super::watch::{Look, Watcher};
use super::{Awaited, Replay, Replayed, StartOptions, server_options};
use crate::execute::restore::RestoreReport;
use crate::plan::RestorePlan;
use crate::target::shell_word;

/// How often the server is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long pg_ctl is told to wait, in seconds: it ends when the server does, and the wait is bounded here.
const PG_CTL_WAIT: &str = "100000000";

/// How long pg_ctl may take to say why it ended.
const PG_CTL_ENDS: Duration = Duration::from_secs(10);

/// One start, while it is watched.
pub(super) struct Run<'a> {
    pub(super) plan: &'a RestorePlan,
    pub(super) options: &'a StartOptions,
    pub(super) command: String,
    pub(super) data_dir: PathBuf,
    pub(super) log: ServerLog,
    pub(super) watcher: Watcher,
}

impl Run<'_> {
    /// Fails when the server would have no configuration: pg_ctl says it in words that lead nowhere.
    pub(super) fn check_configuration(&self) -> Result<()> {
        let elsewhere = self.options.settings.iter().any(|(name, _)| name == "config_file");
        if elsewhere || self.data_dir.join("postgresql.conf").exists() {
            return Ok(());
        }
        Err(Error::local_io("the server was not started: the backup holds no postgresql.conf")
            .with_safe(self.restored())
            .with_next(format!("Put one into the data directory, then start it: {}", self.command)))
    }

    pub(super) fn launch(&self, report: &RestoreReport) -> Result<Child> {
        let mut command = Command::new(&self.options.pg_ctl);
        command.arg("start").arg("-D").arg(&self.data_dir).arg("-l").arg(self.log.path());
        command.args(["-w", "-t", PG_CTL_WAIT, "-o", &server_options(report, self.options)]);
        // Who asks is told in variables; a standby must not take them for its primary's, and a server that is started
        // by its supervisor tomorrow does not have them.
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG")) {
                command.env_remove(name);
            }
        }
        // It prints a dot each second.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        command.spawn().map_err(|error| {
            Error::from_io(format!("running {}", self.options.pg_ctl.display()), error)
                .with_safe(self.restored())
                .with_next(format!("Start it by hand: {}", self.command))
        })
    }

    /// Looks at the server until it has come to what is awaited.
    pub(super) async fn watch(&mut self, pg_ctl: &mut Child, replay: &Replay) -> Result<Look> {
        // While pg_ctl waits, it is its parent, and tells when it ends.
        let mut waiting = true;
        let mut last = Look::default();
        let mut moved = Instant::now();
        loop {
            if waiting && let Some(status) = self.try_wait(pg_ctl)? {
                waiting = false;
                if !status.success() {
                    return self.ended(Some(pg_ctl)).await;
                }
            }
            let look = self.watcher.look(!waiting).await;
            let replayed = Replayed {
                lsn: look.replayed().max(last.replayed()),
                last_transaction: look.answer.as_ref().and_then(|answer| answer.last_transaction),
            };
            replay.set(replayed);
            if !waiting {
                if look.server.is_none() {
                    return self.ended(None).await;
                }
                if self.is_there(&look) {
                    // What the answer says of positions may be older than what it says of the state.
                    return Ok(self.watcher.look(true).await.or(look));
                }
            }
            if look.has_moved(&last) {
                moved = Instant::now();
            } else if moved.elapsed() > self.options.patience {
                return Err(self.stuck(&look));
            }
            last = look;
            sleep(LOOK_EVERY).await;
        }
    }

    fn try_wait(&self, pg_ctl: &mut Child) -> Result<Option<ExitStatus>> {
        pg_ctl.try_wait().map_err(|error| Error::from_io("waiting for pg_ctl", error))
    }

    fn is_there(&self, look: &Look) -> bool {
        match self.options.awaited {
            Awaited::Open => look.is_open(),
            Awaited::Paused => look.is_paused() || look.not_asked.is_some() && look.takes_connections(),
            Awaited::Standby => {
                look.takes_connections() || look.server.as_ref().is_some_and(PidFile::stays_closed)
            }
            Awaited::Stopped => false,
        }
    }

    /// Returns how a server ended, where that was awaited.
    async fn ended(&mut self, pg_ctl: Option<&mut Child>) -> Result<Look> {
        let mut look = self.watcher.look(false).await;
        let stopped = |control: &ControlData| control.state == ClusterState::ShutDownInRecovery;
        if self.options.awaited == Awaited::Stopped && look.control.as_ref().is_some_and(stopped) {
            look.server = None;
            return Ok(look);
        }
        let mut words = self.log.last_words().await?;
        if let (true, Some(pg_ctl)) = (words.is_empty(), pg_ctl) {
            words = said(pg_ctl).await;
        }
        let lsn = look.replayed().map_or_else(String::new, |lsn| format!(" (replayed up to about {lsn})"));
        Err(Error::local_io(format!(
            "the server ended before {}{lsn}: {}",
            self.awaited(),
            if words.is_empty() { "it does not say why".to_owned() } else { words.join("; ") }
        ))
        .with_safe(format!("{}, and was not opened for writing", self.restored()))
        .with_next(format!(
            "Read {}. When the cause is gone, it goes on where it was: {}. A port that is taken is changed with \
             --set port=PORT.",
            self.log.path().display(),
            self.command
        )))
    }

    fn stuck(&self, look: &Look) -> Error {
        let at = look.replayed().map_or_else(String::new, |lsn| format!(" at {lsn}"));
        Error::unavailable(format!(
            "replay has made no progress for {} s{at}, and {} is not reached",
            self.options.patience.as_secs(),
            self.awaited()
        ))
        .with_safe("the server is left running and goes on as soon as it can")
        .with_next(format!(
            "Read {}; look at it, or stop it with {} -D {} stop. --start-timeout gives it longer.",
            self.log.path().display(),
            shell_word(&self.options.pg_ctl.to_string_lossy()),
            shell_word(&self.data_dir.to_string_lossy())
        ))
    }

    fn awaited(&self) -> String {
        let end = self.plan.stop.final_lsn;
        match self.options.awaited {
            Awaited::Open => format!("it was open for writing (the plan ends at {end})"),
            Awaited::Paused => format!("it paused at its target ({end})"),
            Awaited::Stopped => format!("it reached its target ({end})"),
            Awaited::Standby => "it was consistent and took connections".to_owned(),
        }
    }

    fn restored(&self) -> String {
        format!("the restore is complete: {} is whole", self.data_dir.display())
    }
}

/// Returns what pg_ctl said before it ended.
async fn said(pg_ctl: &mut Child) -> Vec<String> {
    let mut text = Vec::new();
    if let Some(stderr) = pg_ctl.stderr.take() {
        let mut stderr = tokio::io::AsyncReadExt::take(stderr, 4096);
        let read = tokio::io::AsyncReadExt::read_to_end(&mut stderr, &mut text);
        // Silence is as good as a failure to read: there is nothing to show.
        let _ = timeout(PG_CTL_ENDS, read).await;
    }
    String::from_utf8_lossy(&text).lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}
