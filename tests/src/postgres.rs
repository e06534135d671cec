//! Scratch PostgreSQL servers of any supported major, each with its own folder, port and socket.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::process::{self, RunOptions};
use crate::{cache, wait};

/// The majors that walship supports.
pub const SUPPORTED: std::ops::RangeInclusive<u32> = 14..=18;

/// Returns the majors to test, the primary one first.
///
/// # Panics
/// When `WALSHIP_TEST_MAJORS` is malformed, or when no server is installed.
pub fn majors() -> Vec<u32> {
    if let Ok(text) = std::env::var("WALSHIP_TEST_MAJORS") {
        let majors: Option<Vec<u32>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
        return match majors {
            Some(majors) if majors.iter().all(|major| SUPPORTED.contains(major)) => majors,
            _ => panic!("WALSHIP_TEST_MAJORS is {text:?}; expected majors of {SUPPORTED:?}, such as 15,18"),
        };
    }
    let primary = std::iter::once(15)
        .chain(SUPPORTED.rev())
        .find(|major| PgBinaries::try_find(*major).is_ok())
        .expect("no PostgreSQL server is installed; run scripts/install-test-deps (./test does)");
    let newer = [18, 17].into_iter().find(|major| *major > primary && PgBinaries::try_find(*major).is_ok());
    std::iter::once(primary).chain(newer).collect()
}

/// The major that most tests run on.
pub fn primary_major() -> u32 {
    majors()[0]
}

/// The other major, for tests that must see a newer one as well.
///
/// # Panics
/// When only one major is to be tested: such a test cannot hold what its name says.
pub fn newer_major() -> u32 {
    majors().into_iter().skip(1).max().unwrap_or_else(|| {
        panic!("this test needs a second, newer PostgreSQL; run scripts/install-test-deps (./test does)")
    })
}

/// The programs of one PostgreSQL major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgBinaries {
    major: u32,
    server_bin: PathBuf,
    tools_bin: PathBuf,
    tools_major: u32,
}

impl PgBinaries {
    /// Finds the programs of `major`.
    ///
    /// # Panics
    /// When they are not installed, saying what installs them.
    pub fn find(major: u32) -> Self {
        Self::try_find(major).unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// Finds the programs of `major`; the error says where they were looked for and what installs them.
    pub fn try_find(major: u32) -> Result<Self, String> {
        let server_bin = bin_with("postgres", "server", major).ok_or_else(|| {
            format!(
                "PostgreSQL {major} was found neither in {} nor in the distribution's place; \
                 run scripts/install-test-deps --major {major} (./test does it for the majors it tests)",
                cache::dir().display()
            )
        })?;
        // Client tools of a newer major serve an older server; only pg_waldump insists on its own.
        let (tools_major, tools_bin) = (major..=*SUPPORTED.end())
            .find_map(|candidate| Some((candidate, bin_with("psql", "tools", candidate)?)))
            .ok_or_else(|| {
                format!("no client tools for PostgreSQL {major} were found; run scripts/install-test-deps --major {major}")
            })?;
        Ok(Self { major, server_bin, tools_bin, tools_major })
    }

    /// The server's major.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The major of the client tools: the server's own where they can be had, else a newer one.
    pub fn tools_major(&self) -> u32 {
        self.tools_major
    }

    /// Whether this major's own `pg_waldump` is at hand (there is none to be had for 14).
    pub fn has_waldump(&self) -> bool {
        self.tools_major == self.major && self.tools_bin.join("pg_waldump").is_file()
    }

    /// Returns a command for a client tool: `psql`, `pg_basebackup`, `pg_waldump`, `pgbench` ...
    ///
    /// # Panics
    /// When this installation lacks the tool.
    pub fn tool(&self, name: &str) -> Command {
        let path = self.tools_bin.join(name);
        assert!(path.is_file(), "{} is not there", path.display());
        let mut command = Command::new(path);
        clean_environment(&mut command);
        command
    }

    /// Returns a command for a program that refuses root: `initdb`, `pg_ctl`, `pg_rewind`,
    /// `pg_resetwal`, `postgres`.
    pub fn unprivileged(&self, name: &str) -> Command {
        let path = self.server_bin.join(name);
        let path = if path.is_file() { path } else { self.tools_bin.join(name) };
        assert!(path.is_file(), "{} is not there", path.display());
        let mut command = process::unprivileged(path);
        clean_environment(&mut command);
        command
    }

    /// The folder of the server's programs.
    pub fn server_bin(&self) -> &Path {
        &self.server_bin
    }
}

fn bin_with(program: &str, kind: &str, major: u32) -> Option<PathBuf> {
    let named = std::env::var_os(format!("WALSHIP_PG{major}_BIN")).map(PathBuf::from);
    let fetched = cache::dir().join(format!("postgresql/{major}/{kind}/bin"));
    let distribution = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    named.into_iter().chain([fetched, distribution]).find(|bin| bin.join(program).is_file())
}

/// A developer's own `PGHOST` or `PGSERVICE` must not lead a test to another server.
fn clean_environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("PG") || name.starts_with("LC_") || name == "LANG")
        {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C.UTF-8").env("PGTZ", "UTC");
}

/// How a server is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits for all clients.
    Smart,
    /// Disconnects clients, then stops cleanly.
    Fast,
    /// Stops without a checkpoint; the next start recovers.
    Immediate,
}

/// What a scratch server is to be like.
#[derive(Debug, Clone)]
pub struct PgServerBuilder {
    binaries: PgBinaries,
    existing_dir: Option<PathBuf>,
    segment_size_mb: u32,
    checksums: bool,
    settings: Vec<(String, String)>,
    hba_lines: Vec<String>,
    initdb_args: Vec<String>,
    environment: Vec<(String, String)>,
}

impl PgServerBuilder {
    /// Sets the WAL segment size of a new cluster (a power of two, 1 to 1024).
    pub fn wal_segment_size_mb(mut self, size_mb: u32) -> Self {
        self.segment_size_mb = size_mb;
        self
    }

    /// Makes the new cluster with or without page checksums; with, unless told.
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.checksums = checksums;
        self
    }

    /// Sets a configuration parameter: in `postgresql.conf` of a new cluster (a backup inherits it),
    /// on the command line for an existing data directory (whose files stay as they are).
    pub fn setting(mut self, name: &str, value: impl ToString) -> Self {
        self.settings.push((name.to_owned(), value.to_string()));
        self
    }

    /// Puts a line before all others in `pg_hba.conf` of a new cluster; without any, everyone is trusted.
    pub fn hba_line(mut self, line: &str) -> Self {
        self.hba_lines.push(line.to_owned());
        self
    }

    /// Adds an argument of `initdb`.
    pub fn initdb_arg(mut self, arg: &str) -> Self {
        self.initdb_args.push(arg.to_owned());
        self
    }

    /// Sets an environment variable of the server, and so of its `archive_command` and `restore_command`.
    pub fn env(mut self, name: &str, value: impl AsRef<Path>) -> Self {
        let value = value.as_ref().to_str().expect("the tests' values are UTF-8");
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the cluster and starts it; returns when it takes connections.
    ///
    /// # Panics
    /// When any of it fails; the server's log is in the message.
    pub fn start(self) -> PgServer {
        self.try_start().unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// As [`PgServerBuilder::start`], but a server that does not come up is an answer: its log.
    ///
    /// # Errors
    /// The server ended before it took connections.
    pub fn try_start(self) -> Result<PgServer, String> {
        let mut server = self.prepare();
        server.try_start()?;
        Ok(server)
    }

    /// Makes the cluster without starting it.
    ///
    /// # Panics
    /// When `initdb` fails.
    pub fn prepare(self) -> PgServer {
        let temp =
            tempfile::Builder::new().prefix("walship-pg").tempdir().expect("a temporary folder can be made");
        // A socket's path has room for 107 bytes, whatever the temporary folder is called.
        let socket_dir = tempfile::Builder::new().prefix("ws").tempdir_in("/tmp").expect("/tmp is writable");
        let data_dir = self.existing_dir.clone().unwrap_or_else(|| temp.path().join("data"));
        if self.existing_dir.is_none() {
            self.initdb(&data_dir);
        }
        PgServer {
            data_dir,
            log_path: temp.path().join("log"),
            _temp: temp,
            socket_dir,
            port: 0,
            child: None,
            binaries: self.binaries,
            command_line_settings: if self.existing_dir.is_some() { self.settings } else { Vec::new() },
            environment: self.environment,
        }
    }

    fn initdb(&self, data_dir: &Path) {
        let mut initdb = self.binaries.unprivileged("initdb");
        initdb.args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
            "--no-instructions",
        ]);
        initdb.arg(format!("--wal-segsize={}", self.segment_size_mb));
        match (self.checksums, self.binaries.major) {
            (true, _) => drop(initdb.arg("--data-checksums")),
            (false, 18..) => drop(initdb.arg("--no-data-checksums")),
            (false, _) => {}
        }
        initdb.args(&self.initdb_args).arg("-D").arg(data_dir);
        process::run_ok(&mut initdb);
        let mut settings = String::from("\n# Scratch server of walship's tests.\n");
        // The tests kill processes, never the machine: what was written survives without fsync, and
        // memory that a killed server shared lies in its own folder, which goes with it.
        let defaults = [
            ("fsync", "off"),
            ("dynamic_shared_memory_type", "mmap"),
            ("timezone", "UTC"),
            ("log_timezone", "UTC"),
            ("log_line_prefix", "%m [%p] "),
        ];
        let own = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in defaults.into_iter().chain(own) {
            let _ = writeln!(settings, "{name} = '{}'", value.replace('\\', "\\\\").replace('\'', "''"));
        }
        append(&data_dir.join("postgresql.conf"), &settings);
        if !self.hba_lines.is_empty() {
            let hba = data_dir.join("pg_hba.conf");
            let old = fs::read_to_string(&hba).expect("initdb writes pg_hba.conf");
            fs::write(&hba, format!("{}\n{old}", self.hba_lines.join("\n"))).expect("pg_hba.conf is ours");
        }
    }
}

/// A scratch server. Dropping it kills it with everything that it started and removes its folder
/// (an existing data directory that it was given stays).
#[derive(Debug)]
pub struct PgServer {
    binaries: PgBinaries,
    data_dir: PathBuf,
    socket_dir: TempDir,
    log_path: PathBuf,
    port: u16,
    child: Option<Child>,
    command_line_settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    _temp: TempDir,
}

impl PgServer {
    /// Starts the description of a new cluster of `major`.
    ///
    /// # Panics
    /// When that major is not installed, saying what installs it.
    pub fn builder(major: u32) -> PgServerBuilder {
        PgServerBuilder {
            binaries: PgBinaries::find(major),
            existing_dir: None,
            segment_size_mb: 16,
            checksums: true,
            settings: Vec::new(),
            hba_lines: Vec::new(),
            initdb_args: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Starts the description of a server on an existing data directory, such as a restored one.
    /// Its major is read from `PG_VERSION`.
    ///
    /// # Panics
    /// When the folder holds no cluster, or one whose major is not installed.
    pub fn from_data_dir(data_dir: &Path) -> PgServerBuilder {
        let version = fs::read_to_string(data_dir.join("PG_VERSION"))
            .unwrap_or_else(|e| panic!("{} is no data directory: {e}", data_dir.display()));
        let major = version.trim().parse().expect("PG_VERSION holds a major");
        PgServerBuilder { existing_dir: Some(data_dir.to_owned()), ..Self::builder(major) }
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The TCP port on 127.0.0.1; another one after each start.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of the Unix socket, as libpq's `host`.
    pub fn socket_dir(&self) -> &Path {
        self.socket_dir.path()
    }

    /// The server's major.
    pub fn major(&self) -> u32 {
        self.binaries.major
    }

    /// The programs that it runs with.
    pub fn binaries(&self) -> &PgBinaries {
        &self.binaries
    }

    /// A connection URI over TCP, for the superuser `postgres`.
    pub fn uri(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// A connection string over the Unix socket, for the superuser `postgres`.
    pub fn socket_conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.socket_dir().display(), self.port)
    }

    /// The postmaster's process id.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// What the server has logged since it was made, all starts included.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log_path).unwrap_or_default()).into_owned()
    }

    /// Starts a server that is not running and returns when it takes connections.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(&mut self) {
        self.try_start().unwrap_or_else(|reason| panic!("{reason}"));
    }

    /// Starts a server that is not running and returns when it takes connections (read-only ones, if it is
    /// a standby or stands still at its recovery target).
    ///
    /// # Errors
    /// The server ended before that; its status and log.
    ///
    /// # Panics
    /// When it neither ends nor comes up in time.
    pub fn try_start(&mut self) -> Result<(), String> {
        let mut attempts_left = 5;
        loop {
            let log_before = self.log().len();
            self.launch();
            match self.wait_until_ready() {
                Ok(()) => return Ok(()),
                // Another process took the port between our look and the server's bind.
                Err(_)
                    if attempts_left > 0 && self.log()[log_before..].contains("Address already in use") =>
                {
                    attempts_left -= 1;
                }
                Err(status) => return Err(format!("the server ended ({status}); its log:\n{}", self.log())),
            }
        }
    }

    /// Starts the process and returns at once: for servers that are expected to end by themselves or to
    /// stay in recovery ([`PgServer::wait_until_ready`], [`PgServer::wait_for_exit`]).
    ///
    /// # Panics
    /// When it runs already or cannot be started.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        self.port = free_port();
        let log = OpenOptions::new().create(true).append(true).open(&self.log_path).expect("the log is ours");
        // setpriv comes last before the server: the signal that it asks for does not survive a
        // change of user namespace.
        let path = self.binaries.server_bin.join("postgres");
        let inner = process::guarded(path);
        let mut command = process::unprivileged(inner.get_program());
        command.args(inner.get_args());
        clean_environment(&mut command);
        command.arg("-D").arg(&self.data_dir).args(["-c", "listen_addresses=127.0.0.1"]);
        command.arg("-p").arg(self.port.to_string());
        command.arg("-c").arg(format!("unix_socket_directories={}", self.socket_dir.path().display()));
        for (name, value) in &self.command_line_settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let errors = log.try_clone().expect("a log file can be shared");
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        self.child =
            Some(process::spawn(command).unwrap_or_else(|e| panic!("the server cannot be started: {e}")));
    }

    /// Waits until a launched server takes connections.
    ///
    /// # Errors
    /// The status of a server that ended instead.
    ///
    /// # Panics
    /// When neither happens in time.
    pub fn wait_until_ready(&mut self) -> Result<(), ExitStatus> {
        let pid_file = self.data_dir.join("postmaster.pid");
        let own_pid = self.pid().to_string();
        let deadline = Instant::now() + 2 * wait::PATIENCE;
        loop {
            if let Some(status) = self.exited() {
                return Err(status);
            }
            // Line 1 is the postmaster's pid (a killed server leaves an old file), line 8 its state.
            let state = fs::read_to_string(&pid_file).unwrap_or_default();
            let mut lines = state.lines();
            if lines.next() == Some(own_pid.as_str())
                && lines.nth(6).is_some_and(|state| matches!(state.trim(), "ready" | "standby"))
            {
                return Ok(());
            }
            assert!(
                Instant::now() < deadline,
                "the server neither came up nor ended; its log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exited().is_none()
    }

    /// Waits until the server ends by itself (a recovery that must stop, a target action `shutdown`).
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait_for_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + 2 * wait::PATIENCE;
        loop {
            if let Some(status) = self.exited() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server did not end; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn exited(&mut self) -> Option<ExitStatus> {
        let child = self.child.as_mut().expect("the server was started");
        let status = child.try_wait().expect("a child can be waited for")?;
        self.child = None;
        Some(status)
    }

    /// Stops the server and returns its status when it is gone.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn stop(&mut self, mode: StopMode) -> ExitStatus {
        let signal = match mode {
            StopMode::Smart => Signal::SIGTERM,
            StopMode::Fast => Signal::SIGINT,
            StopMode::Immediate => Signal::SIGQUIT,
        };
        process::signal(self.pid(), signal);
        self.wait_for_exit()
    }

    /// Kills the postmaster and everything below it with SIGKILL, as a crash does, and returns when
    /// all of them are gone.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("the server runs");
        process::kill_tree(&mut child);
    }

    /// Stops (fast) and starts again, on another port.
    pub fn restart(&mut self) {
        self.stop(StopMode::Fast);
        self.start();
    }

    /// Promotes a standby and returns when it takes writes.
    pub fn promote(&self) {
        assert_eq!(self.psql("SELECT pg_promote(true, 60)"), "t", "promotion failed; log:\n{}", self.log());
    }

    /// Runs SQL in the database `postgres` and returns its rows: fields joined by `|`, rows by newlines,
    /// nothing else.
    ///
    /// # Panics
    /// When a statement fails.
    pub fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql)
    }

    /// As [`PgServer::psql`], in another database.
    ///
    /// # Panics
    /// When a statement fails.
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        self.try_psql_in(database, sql)
            .unwrap_or_else(|error| panic!("{error}\nwhile running: {}", head(sql)))
    }

    /// As [`PgServer::psql`]; the error is what `psql` said.
    ///
    /// # Errors
    /// A statement failed, or the server could not be reached.
    pub fn try_psql(&self, sql: &str) -> Result<String, String> {
        self.try_psql_in("postgres", sql)
    }

    /// As [`PgServer::try_psql`], in another database. Statements run one by one, so that `VACUUM` and
    /// `CREATE DATABASE` may be among them; the first failure ends the run.
    ///
    /// # Errors
    /// A statement failed, or the server could not be reached.
    pub fn try_psql_in(&self, database: &str, sql: &str) -> Result<String, String> {
        let mut psql = self.tool("psql");
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-f", "-"]);
        let output =
            process::run(&mut psql, RunOptions { stdin: sql.as_bytes(), deadline: Duration::from_secs(300) });
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Returns a command for a client tool that finds this server by its environment.
    pub fn tool(&self, name: &str) -> Command {
        let mut command = self.binaries.tool(name);
        command.env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    /// Runs a client tool to its end, whatever its status.
    pub fn run_tool(&self, name: &str, args: &[&str]) -> Output {
        process::run(
            self.tool(name).args(args),
            RunOptions { deadline: Duration::from_secs(600), ..RunOptions::default() },
        )
    }

    /// Runs `pgbench` with these arguments.
    ///
    /// # Panics
    /// When it fails.
    pub fn pgbench(&self, args: &[&str]) -> String {
        let output = self.run_tool("pgbench", args);
        assert!(output.status.success(), "pgbench: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Returns the cluster's system identifier.
    pub fn system_identifier(&self) -> u64 {
        let text = self.psql("SELECT system_identifier FROM pg_control_system()");
        text.parse().expect("a system identifier is a number")
    }

    /// Returns the current insert position (the replay position of a server in recovery), as `X/X`.
    pub fn current_lsn(&self) -> String {
        self.psql(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END",
        )
    }

    /// Finishes the current segment and returns its name. It writes a record first, so that there is
    /// always a segment to finish.
    pub fn switch_wal(&self) -> String {
        self.psql(
            "SELECT pg_logical_emit_message(false, 'walship', 'switch');\n\
             SELECT pg_walfile_name(pg_switch_wal());",
        )
        .lines()
        .last()
        .expect("a row for each statement")
        .to_owned()
    }

    /// Finishes the current segment, waits until it is archived and returns its name.
    ///
    /// # Panics
    /// When it is not archived in time; the server's log is in the message.
    pub fn archive_now(&self) -> String {
        let segment = self.switch_wal();
        self.wait_until_archived(&segment);
        segment
    }

    /// Waits until the server has `file` (a segment, a history file ...) marked as archived.
    ///
    /// # Panics
    /// When that does not happen in time; the server's log is in the message.
    pub fn wait_until_archived(&self, file: &str) {
        let status = self.data_dir.join("pg_wal/archive_status");
        let deadline = Instant::now() + 2 * wait::PATIENCE;
        // A checkpoint may remove segment and mark together: then the archiver's own count tells.
        while !status.join(format!("{file}.done")).exists() {
            let never_marked = !status.join(format!("{file}.ready")).exists();
            if never_marked
                && self.psql(&format!("SELECT last_archived_wal >= '{file}' FROM pg_stat_archiver")) == "t"
            {
                return;
            }
            assert!(Instant::now() < deadline, "{file} was not archived; the server's log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the SQL query answers `expected`.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn wait_for(&self, query: &str, expected: &str) {
        let mut last = String::new();
        let deadline = Instant::now() + wait::PATIENCE;
        while Instant::now() < deadline {
            last = self.try_psql(query).unwrap_or_else(|error| error);
            if last == expected {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{query} still answers {last:?} instead of {expected:?}; the server's log:\n{}", self.log());
    }
}

impl PgServer {
    /// Frees the piece of shared memory that a killed server leaves behind: the system has room for some thousands.
    ///
    /// Source: `src/include/utils/pidfile.h`: the seventh line holds its key and id.
    fn free_shared_memory(&self) {
        let Ok(file) = fs::read_to_string(self.data_dir.join("postmaster.pid")) else { return };
        let pid = file.lines().next().and_then(|line| line.trim().parse().ok());
        let id = file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        if let (Some(pid), Some(id)) = (pid, id)
            && !process::is_alive(pid)
        {
            let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for PgServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::kill_tree(&mut child);
        }
        self.free_shared_memory();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().rev().nth(4000).map_or(0, |(at, _)| at);
            eprintln!("--- end of the log of the server on {}:\n{}", self.data_dir.display(), &log[from..]);
        }
    }
}

/// Returns a TCP port on 127.0.0.1 that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("127.0.0.1 has free ports");
    listener.local_addr().expect("a bound socket has an address").port()
}

fn append(path: &Path, text: &str) {
    use std::io::Write as _;
    let mut file: File = OpenOptions::new().append(true).open(path).expect("initdb writes its files");
    file.write_all(text.as_bytes()).expect("the scratch folder has room");
}

fn head(text: &str) -> &str {
    text.char_indices().nth(500).map_or(text, |(at, _)| &text[..at])
}
