//! A restore into a scratch folder, and a private server that recovers on it.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::{Uid, User};
use tokio::sync::watch;
use walship::replication::{ConnectOptions, Connection, Origin, SessionKind};
use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::folder::Scratch;
use super::sql::conninfo_value;
use super::tool::{Environment, run};
use crate::execute::restore::{self, Existing, Progress, RestoreOptions, RestoreReport};
use crate::execute::start::{self, Awaited, Replay, StartOptions, Started};
use crate::plan::RestorePlan;
use crate::recovery_settings::{Recovery, RestoreAs, SettingsOptions, TargetAction};
use crate::target::shell_word;

/// The number in the socket's name: nobody else uses the folder.
const PORT: &str = "5432";

/// How long a server may take to stop cleanly.
const STOP_SECONDS: u64 = 600;

/// What a scratch server is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To measure and to prove: with the settings that the original has, but those that could do harm.
    Drill,
    /// To read from it, perhaps beside the original: small, and in a hurry.
    Extract,
}

/// How far a scratch server is; watch it to show the right progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Stage {
    /// Files are restored.
    Restoring,
    /// The server recovers.
    Recovering,
    /// It is open.
    Open,
}

/// What it takes to bring a scratch server up.
#[derive(Debug)]
pub struct Private<'a> {
    /// Where its files come from.
    pub repository: &'a LineageRepository,
    /// What is restored, and up to where.
    pub plan: &'a RestorePlan,
    /// What it is for.
    pub purpose: Purpose,
    /// The whole value of `restore_command`.
    pub restore_command: String,
    /// The pg_ctl of the backup's major version.
    pub pg_ctl: PathBuf,
    /// Settings of the operator's.
    pub settings: Vec<(String, String)>,
    /// How long replay may make no progress.
    pub patience: Duration,
}

/// A scratch server that has recovered.
#[derive(Debug)]
pub struct Up {
    /// What was restored.
    pub report: RestoreReport,
    /// What was started.
    pub started: Started,
    /// How long the restore of the files took.
    pub restored_in: Duration,
    /// How long recovery took, from the server's start until it was open.
    pub recovered_in: Duration,
    socket_dir: PathBuf,
    user: String,
}

/// Returns the options of the restore into the scratch folder.
fn restore_options(scratch: &Scratch, private: &Private<'_>) -> RestoreOptions {
    let backup = &private.plan.backup;
    let tablespace = |oid: &str| scratch.folder().join("tablespaces").join(oid);
    let oids = backup.tablespaces.iter().map(|tablespace| tablespace.oid.to_string());
    RestoreOptions {
        data_dir: scratch.data_dir(),
        existing: Existing::Refuse,
        tablespaces: oids.map(|oid| (oid.clone(), tablespace(&oid))).collect(),
        accept_tablespace_paths: false,
        settings_dir: (!backup.settings_files.is_empty()).then(|| scratch.folder().join("settings")),
        settings: SettingsOptions {
            restore_as: RestoreAs::Copy,
            recovery: Recovery::ToTarget(TargetAction::Promote),
            restore_command: private.restore_command.clone(),
        },
    }
}

/// Checks all that can be checked before a byte is fetched: the room on the disk, and that replay writes nothing outside
/// the scratch folder.
///
/// # Errors
/// [`Error::LocalIo`] when space is short; [`Error::Invalid`] when the WAL on the way creates a tablespace.
pub fn check(scratch: &Scratch, private: &Private<'_>) -> Result<()> {
    if let Some(created) = private.plan.tablespace_paths.first() {
        return Err(Error::invalid(format!(
            "replay up to the target creates tablespace {} in {:?}, outside the scratch folder",
            created.oid, created.path
        ))
        .with_safe("nothing was written: on this machine a server may be using that folder")
        .with_next(
            "Choose a backup that was taken after the tablespace was made (--backup), or a target before that.",
        ));
    }
    restore::check(private.plan, &restore_options(scratch, private)).map(drop)
}

/// Restores into the scratch folder, starts the private server, and waits until it is open at the target.
///
/// # Errors
/// As [`restore::restore`] and [`start::start`].
/// # Cancel safety
/// Dropping the future leaves whatever there is for [`Scratch::remove`].
pub async fn bring_up(
    scratch: &Scratch,
    private: &Private<'_>,
    progress: Arc<Progress>,
    replay: Arc<Replay>,
    stage: &watch::Sender<Stage>,
) -> Result<Up> {
    let plan = private.plan;
    let begun = Instant::now();
    let report =
        restore::restore(private.repository, plan, &restore_options(scratch, private), progress).await?;
    let restored_in = begun.elapsed();
    stage.send_replace(Stage::Recovering);
    let begun = Instant::now();
    let options = StartOptions {
        pg_ctl: private.pg_ctl.clone(),
        settings: settings(scratch, private)?,
        patience: private.patience,
        awaited: Awaited::Open,
    };
    let started = start::start(plan, &report, &options, replay).await?;
    let recovered_in = begun.elapsed();
    let socket_dir = scratch.socket_dir();
    let user = superuser(&socket_dir).await?;
    stage.send_replace(Stage::Open);
    Ok(Up { report, started, restored_in, recovered_in, socket_dir, user })
}

impl Up {
    /// Returns a session of a superuser in a database; a command of it may take so long.
    ///
    /// # Errors
    /// As [`Connection::connect`].
    pub async fn connect(&self, database: &str, patience: Duration) -> Result<Connection> {
        connect(&self.socket_dir, Some(&self.user), database, patience).await
    }

    /// Returns the arguments that lead one of PostgreSQL's programs to the server.
    pub fn arguments(&self) -> Vec<String> {
        let socket = self.socket_dir.to_string_lossy().into_owned();
        ["-h", &socket, "-p", PORT, "-U", &self.user, "-w"].map(str::to_owned).to_vec()
    }

    /// Returns the names of the databases that can be connected to, but templates.
    ///
    /// # Errors
    /// As a query.
    pub async fn databases(&self) -> Result<Vec<String>> {
        let mut connection = self.connect(self.any_database(), Duration::from_secs(60)).await?;
        let rows = connection
            .query(
                "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate \
                 AND datconnlimit <> -2 ORDER BY datname",
            )
            .await?;
        connection.close().await;
        Ok(rows.rows.iter().filter_map(|row| row.first()?.clone()).collect())
    }

    /// Returns a database that every cluster has.
    pub fn any_database(&self) -> &'static str {
        "template1"
    }

    /// Stops the server cleanly.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when it does not stop.
    pub async fn stop(&self, pg_ctl: &Path) -> Result<()> {
        let data_dir = self.report.data_dir.to_string_lossy().into_owned();
        let seconds = STOP_SECONDS.to_string();
        let arguments = ["stop", "-D", &data_dir, "-m", "fast", "-w", "-t", &seconds];
        let patience = Duration::from_secs(STOP_SECONDS + 30);
        let ran = run(pg_ctl, arguments, Environment::Private, patience).await?;
        match ran.succeeded() {
            true => Ok(()),
            false => {
                Err(Error::local_io(format!("the scratch server was not stopped: pg_ctl {}", ran.ended())))
            }
        }
    }
}

/// Returns what the private server is told on its command line, where nothing outranks it; the files that this names are
/// written.
///
/// # Errors
/// [`Error::LocalIo`] when they cannot be.
pub fn settings(scratch: &Scratch, private: &Private<'_>) -> Result<Vec<(String, String)>> {
    let folder = scratch.folder();
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    write(&folder.join("hba.conf"), "local all all trust\n")?;
    write(&folder.join("ident.conf"), "")?;
    let mut settings = private.settings.clone();
    let given = |name: &str| private.settings.iter().any(|(own, _)| own == name);
    let backup = &private.plan.backup;
    if !given("config_file") && !scratch.data_dir().join("postgresql.conf").exists() {
        let outside = backup
            .settings_files
            .iter()
            .find(|file| Path::new(&file.path).file_name().is_some_and(|name| name == "postgresql.conf"));
        let path = match outside {
            Some(saved) => folder
                .join("settings")
                .join(saved.path.trim_start_matches('/'))
                .to_string_lossy()
                .into_owned(),
            // Recovery wants no more than what postgresql.auto.conf says.
            None => {
                write(&folder.join("postgresql.conf"), "")?;
                file("postgresql.conf")
            }
        };
        settings.push(("config_file".to_owned(), path));
    }
    let fixed = private_settings(backup.server_version / 10_000, private.purpose);
    settings.extend(
        fixed
            .into_iter()
            .filter(|(name, _)| !given(name))
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    settings.extend([
        ("unix_socket_directories".to_owned(), scratch.socket_dir().to_string_lossy().into_owned()),
        ("hba_file".to_owned(), file("hba.conf")),
        ("ident_file".to_owned(), file("ident.conf")),
        ("cluster_name".to_owned(), scratch.server_name()),
    ]);
    Ok(settings)
}

/// Returns the settings that make a server of this major version a private one.
fn private_settings(major: u32, purpose: Purpose) -> Vec<(&'static str, &'static str)> {
    let mut settings = vec![
        // Nobody else reaches it.
        ("listen_addresses", ""),
        ("port", PORT),
        ("unix_socket_permissions", "0700"),
        ("unix_socket_group", ""),
        ("ssl", "off"),
        // It reaches nobody: a library that is loaded at its start may run jobs, connect, and write elsewhere.
        ("archive_mode", "off"),
        ("shared_preload_libraries", ""),
        ("session_preload_libraries", ""),
        ("local_preload_libraries", ""),
        ("max_logical_replication_workers", "0"),
        // No trigger fires, on events neither, but those that are to fire always.
        ("session_replication_role", "replica"),
        ("autovacuum", "off"),
        // It writes nothing outside its folder.
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
        ("external_pid_file", "postmaster.external.pid"),
        ("huge_pages", "try"),
        ("restart_after_crash", "off"),
    ];
    if major >= 17 {
        // Those at a log-in too.
        settings.push(("event_triggers", "off"));
        settings.push(("summarize_wal", "off"));
    }
    if purpose == Purpose::Extract {
        // What is lost in a crash of the machine is done again.
        settings.extend([("fsync", "off"), ("shared_buffers", "256MB"), ("huge_pages", "off")]);
    }
    settings
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| Error::from_io(format!("writing {}", path.display()), error))
}

async fn connect(
    socket_dir: &Path,
    user: Option<&str>,
    database: &str,
    patience: Duration,
) -> Result<Connection> {
    let place = conninfo_value(&socket_dir.to_string_lossy());
    let mut conninfo = format!("host={place} port={PORT} dbname={}", conninfo_value(database));
    if let Some(user) = user {
        conninfo.push_str(&format!(" user={}", conninfo_value(user)));
    }
    // Nothing of the environment leads anywhere else.
    let mut options = ConnectOptions::resolve(&conninfo, Origin::Private, &|_| None)?;
    options.application_name = "pitr".to_owned();
    options.command_timeout = patience;
    Connection::connect(&options, SessionKind::Ordinary).await
}

/// Returns a superuser that may log in. Anyone who can get in can ask who that is.
async fn superuser(socket_dir: &Path) -> Result<String> {
    let own = User::from_uid(Uid::effective()).ok().flatten().map(|user| user.name);
    let variable = env::var("PGUSER").ok().filter(|user| !user.is_empty());
    let mut failure = None;
    for user in variable.into_iter().chain(own).chain(["postgres".to_owned()]) {
        let mut connection =
            match connect(socket_dir, Some(&user), "template1", Duration::from_secs(60)).await {
                Ok(connection) => connection,
                Err(error) => {
                    failure.get_or_insert(error);
                    continue;
                }
            };
        let rows = connection
            .query(
                "SELECT rolname FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin \
                 ORDER BY rolname <> current_user, oid LIMIT 1",
            )
            .await?;
        connection.close().await;
        if let Some(found) = rows.get(0, 0) {
            return Ok(found.to_owned());
        }
        return Err(Error::missing("the restored cluster has no superuser that may log in"));
    }
    let failure = failure.unwrap_or_else(|| Error::missing("there is nobody to ask the restored server as"));
    Err(failure
        .context("asking the restored server")
        .with_next(format!("Name a role that exists in it: {}.", shell_word("PGUSER=ROLE") + " pitr ...")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_exist_in_their_major_version() {
        let has =
            |major, purpose, name: &str| private_settings(major, purpose).iter().any(|(own, _)| *own == name);
        for (major, name, expected) in [
            (14, "event_triggers", false),
            (16, "summarize_wal", false),
            (17, "event_triggers", true),
            (18, "summarize_wal", true),
            (14, "archive_mode", true),
        ] {
            assert_eq!(has(major, Purpose::Drill, name), expected, "{major} {name}");
        }
        assert!(!has(18, Purpose::Drill, "fsync") && has(18, Purpose::Extract, "fsync"));
    }
}
