//! The session that holds a server in backup mode, and the proof that the data directory is that server's.

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::error::{Error, Result};
use crate::pg::control::ControlData;
use crate::pg::{Lsn, TimelineId};
use crate::replication::base_backup::BackupStart;
use crate::replication::{Checkpoint, ConnectOptions, Connection, ServerError, SessionKind};
use crate::storage::blocking;

use super::super::{ended, taken_away};

/// So many seconds after the time in `postmaster.pid` a server may say that it started: libraries are loaded and names
/// resolved in between.
const START_AFTER_MAX: i64 = 600;

/// And so many before it, as clocks go.
const START_BEFORE_MAX: i64 = 5;

/// What could end the session: hours may pass between two commands, and minutes until a checkpoint is done.
const ENDLESS: [&str; 4] =
    ["statement_timeout", "lock_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"];

/// How often the session is looked at while files are read.
const LOOK: Duration = Duration::from_secs(2);

/// So long what was being stored may take to end when the server has ended the backup.
const GRACE: Duration = Duration::from_secs(5);

/// A server in backup mode.
pub(in crate::backup) struct LocalServer {
    session: Connection,
    /// Whether it was a standby when the backup began.
    in_recovery: bool,
    pub(super) data_directory: PathBuf,
    pub(super) control: ControlData,
    pub(super) major: u32,
    /// What the server calls its own folder in each tablespace.
    pub(super) version_folder: String,
    /// A folder of statistics, where that has another name than usual.
    pub(super) emptied: Option<PathBuf>,
}

/// What the server says at the end of a backup.
pub(super) struct Stopped {
    pub(super) lsn: Lsn,
    pub(super) label: String,
}

impl LocalServer {
    /// Connects, and finds the server's data directory on this machine.
    ///
    /// # Errors
    /// What connecting fails with; [`Error::Mismatch`] when the folder is not that of the server that answers.
    pub(in crate::backup) async fn find(
        server: &ConnectOptions,
        data_directory: Option<&Path>,
        system_identifier: u64,
        patience: Duration,
    ) -> Result<Self> {
        let mut options = server.clone();
        // The start waits for a checkpoint.
        options.command_timeout = patience;
        let mut session = Connection::connect(&options, SessionKind::Ordinary).await?;
        let major = session.server_version()? / 10_000;
        session.query("SET search_path = pg_catalog; SET standard_conforming_strings = on").await?;
        for setting in ENDLESS {
            session.query(&format!("SET {setting} = 0")).await?;
        }
        if major >= 17 {
            session.query("SET transaction_timeout = 0").await?;
        }
        let data_directory = match data_directory {
            Some(path) => path.to_owned(),
            None => {
                let rows = session.query("SHOW data_directory").await.map_err(|error| {
                    error.with_next(
                        "Name the data directory (--data-dir), or GRANT pg_read_all_settings to the backup's role.",
                    )
                })?;
                PathBuf::from(rows.get(0, 0).unwrap_or_default())
            }
        };
        let data_directory = fs::canonicalize(&data_directory).map_err(|error| {
            Error::from_io(format!("finding the server's data directory {}", data_directory.display()), error)
                .with_safe("nothing was begun")
                .with_next(
                    "--source local runs on the server's own machine, as the user that PostgreSQL runs as; from \
                     elsewhere leave it out.",
                )
        })?;
        let control = blocking({
            let path = data_directory.join(super::CONTROL_FILE);
            move || Ok(ControlData::parse(&super::read_control(&path)?)?)
        })
        .await?;
        if control.system_identifier != system_identifier {
            return Err(Error::mismatch(format!(
                "{} belongs to system identifier {}, the server to {system_identifier}",
                data_directory.display(),
                control.system_identifier
            ))
            .with_next("Name the data directory of the server that the connection leads to (--data-dir)."));
        }
        check_running_here(&mut session, &data_directory).await?;
        let emptied = match major {
            14 => {
                let rows = session.query("SHOW stats_temp_directory").await?;
                let path = PathBuf::from(rows.get(0, 0).unwrap_or_default());
                Some(path.strip_prefix(&data_directory).map(Path::to_owned).unwrap_or(path))
            }
            _ => None,
        };
        let version_folder = format!("PG_{major}_{}", control.catalog_version);
        let in_recovery = session.is_standby();
        Ok(Self { session, in_recovery, data_directory, control, major, version_folder, emptied })
    }

    /// Begins the backup: the server makes a checkpoint and writes whole pages from then on.
    ///
    /// # Errors
    /// What the server says.
    pub(in crate::backup) async fn start(
        &mut self,
        label: &str,
        checkpoint: Checkpoint,
    ) -> Result<BackupStart> {
        if label.len() > 1000 || label.contains(['\0', '\n', '\r']) {
            return Err(Error::invalid("the label of a backup is one line of at most 1000 bytes"));
        }
        let label = label.replace('\'', "''");
        let fast = checkpoint == Checkpoint::Fast;
        let command = match self.major {
            14 => format!("SELECT pg_start_backup('{label}', {fast}, false)"),
            _ => format!("SELECT pg_backup_start('{label}', {fast})"),
        };
        let rows = self.session.query(&command).await.map_err(|error| {
            error.with_next(
                "The backup's role must be a superuser, or be granted EXECUTE on pg_backup_start and pg_backup_stop \
                 (pg_start_backup and pg_stop_backup before PostgreSQL 15).",
            )
        })?;
        let lsn = rows.get(0, 0).unwrap_or_default().parse()?;
        // The redo position lies on the timeline that is current now: a standby's from its control file, which the
        // checkpoint that was just awaited has written.
        let rows = self
            .session
            .query("SELECT timeline_id, pg_is_in_recovery() FROM pg_control_checkpoint()")
            .await?;
        self.in_recovery = rows.get(0, 1) == Some("t");
        let timeline = rows.get(0, 0).and_then(|text| text.parse().ok()).and_then(TimelineId::new);
        let timeline = timeline.ok_or_else(|| Error::mismatch("the server names no timeline"))?;
        Ok(BackupStart { lsn, timeline, tablespaces: Vec::new() })
    }

    /// Carries out `work`, which `stop` ends early, and looks again and again whether the server is still in backup mode:
    /// what it has ended by a restart or a promotion is given up then, not after hours of reading.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Unavailable`] when the server has ended the backup.
    pub(super) async fn during<T>(
        &mut self,
        work: impl Future<Output = Result<T>>,
        stop: impl FnOnce(),
    ) -> Result<T> {
        let mut work = pin!(work);
        let ended = loop {
            tokio::select! {
                done = &mut work => return done,
                () = sleep(LOOK) => {}
            }
            let mut looking = pin!(self.look());
            // The answer is awaited in any case: the next command would take it for its own.
            let (looked, done) = tokio::select! {
                looked = &mut looking => (looked, None),
                done = &mut work => (looking.await, Some(done)),
            };
            match (looked, done) {
                (Ok(()), None) => {}
                (Ok(()), Some(done)) => return done,
                (Err(error), Some(_)) => return Err(error),
                (Err(error), None) => break error,
            }
        };
        stop();
        let _ = timeout(GRACE, work).await;
        Err(ended)
    }

    /// # Errors
    /// [`Error::Unavailable`] when the session is gone, or the standby was promoted.
    async fn look(&mut self) -> Result<()> {
        let rows = self.session.query("SELECT pg_is_in_recovery()").await.map_err(ended)?;
        if self.in_recovery && rows.get(0, 0) == Some("f") {
            return Err(taken_away(Error::unavailable(format!(
                "the server ended the backup: the standby on {} was promoted",
                self.session.host()
            ))));
        }
        Ok(())
    }

    /// Ends the backup.
    ///
    /// # Errors
    /// What the server says.
    pub(super) async fn stop(&mut self) -> Result<Stopped> {
        let function = match self.major {
            14 => "pg_stop_backup(false, false)",
            _ => "pg_backup_stop(false)",
        };
        let rows =
            self.session.query(&format!("SELECT lsn, labelfile FROM {function}")).await.map_err(|error| {
                match ServerError::of(&error) {
                    // What the role may not do has advice of its own.
                    Some(said) if said.code == "42501" => {
                        error.with_safe("no backup was recorded; older backups are untouched")
                    }
                    _ => ended(error),
                }
            })?;
        let text = |column| rows.get(0, column).unwrap_or_default().to_owned();
        Ok(Stopped { lsn: text(0).parse()?, label: text(1) })
    }
}

/// Compares what the server says of itself with what the data directory says of the server that runs on it: a copy of
/// the cluster beside it has the same system identifier.
///
/// Source: `src/include/utils/pidfile.h`.
async fn check_running_here(session: &mut Connection, data_directory: &Path) -> Result<()> {
    let rows = session
        .query("SELECT extract(epoch FROM pg_postmaster_start_time())::bigint, current_setting('port')")
        .await?;
    let started: Option<i64> = rows.get(0, 0).and_then(|text| text.parse().ok());
    let path = data_directory.join("postmaster.pid");
    let file = fs::read_to_string(&path).map_err(|error| {
        Error::from_io(format!("reading {}", path.display()), error)
            .with_safe("nothing was begun")
            .with_next("Name the data directory of the server that the connection leads to (--data-dir).")
    })?;
    let line = |number| file.lines().nth(number).unwrap_or_default().trim();
    let noted: Option<i64> = line(2).parse().ok();
    let same_start = started.zip(noted).is_some_and(|(said, noted)| {
        (-START_BEFORE_MAX..=START_AFTER_MAX).contains(&said.saturating_sub(noted))
    });
    if same_start && rows.get(0, 1) == Some(line(3)) {
        return Ok(());
    }
    Err(Error::mismatch(format!(
        "the server that answers does not run on {}: another one does",
        data_directory.display()
    ))
    .with_safe("nothing was begun")
    .with_next("Name the data directory of the server that the connection leads to (--data-dir)."))
}
