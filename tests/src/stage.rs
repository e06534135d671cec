//! A repository and the configuration that leads to it: what the programs need to work in a test.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;

use crate::bins;
use crate::postgres::{PgServer, PgServerBuilder};
use crate::process::{self, RunOptions};
use crate::s3_inprocess::{ACCESS_KEY, BUCKET, SECRET_KEY};

/// A repository's address, a configuration file that names it, and the programs.
///
/// ```no_run
/// use walship_tests::postgres::{PgServer, primary_major};
/// use walship_tests::stage::Stage;
///
/// let stage = Stage::folder("main");
/// let server = stage.archiving(PgServer::builder(primary_major())).start();
/// stage.init(&server);
/// stage.backup(&server);
/// server.archive_now();
/// println!("{}", stage.ok(&mut stage.pitr(&["info"])));
/// ```
#[derive(Debug)]
pub struct Stage {
    home: TempDir,
    url: String,
    cluster: String,
}

impl Stage {
    /// A repository in a folder of its own; it is made by `walship init`.
    pub fn folder(cluster: &str) -> Self {
        let home = home();
        let url = format!("file://{}", home.path().join("repository").display());
        Self { home, url, cluster: cluster.to_owned() }.configured("")
    }

    /// A repository below a prefix of the bucket of one of the tests' S3 servers.
    pub fn s3(cluster: &str, endpoint: &str) -> Self {
        let url = format!("s3://{BUCKET}/walship");
        let s3 = format!(
            "[s3]\nendpoint = {endpoint:?}\naccess_key_id = {ACCESS_KEY:?}\nsecret_access_key = {SECRET_KEY:?}\n"
        );
        Self { home: home(), url, cluster: cluster.to_owned() }.configured(&s3)
    }

    /// Adds lines at the end of the configuration file (which ends in the table `[s3]` on S3).
    pub fn configured(self, lines: &str) -> Self {
        let path = self.config();
        let text = fs::read_to_string(&path).unwrap_or_else(|_| {
            format!(
                "repositories = [{:?}]\ncluster = {:?}\nstate_dir = {:?}\nagent = {:?}\n",
                self.url,
                self.cluster,
                self.home.path().join("state"),
                crate::agent_use()
            )
        });
        fs::write(&path, text + lines).expect("the scratch folder has room");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("the file is ours");
        self
    }

    /// The same with `auto` or `off` for `agent`, whatever the tests' environment says.
    #[must_use]
    pub fn with_agent(self, whether: &str) -> Self {
        let path = self.config();
        let text = fs::read_to_string(&path).expect("the file is ours");
        let line = |whether: &str| format!("agent = {whether:?}\n");
        let now = line(&crate::agent_use());
        assert!(text.contains(&now), "{text}");
        let text = text.replace(&now, &line(whether));
        fs::write(&path, text).expect("the scratch folder has room");
        self
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.home.path().join("walship.toml")
    }

    /// A scratch folder that goes away with the stage.
    pub fn path(&self) -> &Path {
        self.home.path()
    }

    /// The folder of a repository in a folder.
    pub fn repository_dir(&self) -> PathBuf {
        self.home.path().join("repository")
    }

    /// The repository's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Makes a server archive into this repository.
    pub fn archiving(&self, server: PgServerBuilder) -> PgServerBuilder {
        server
            .setting("archive_mode", "on")
            .setting("archive_command", format!("'{}' %p", bins::archive_cmd().display()))
            .env("WALSHIP_CONFIG", self.config())
    }

    /// Gives a server on a restored data directory the environment in which its `restore_command` finds
    /// this repository.
    pub fn recovering(&self, data_dir: &Path) -> PgServerBuilder {
        PgServer::from_data_dir(data_dir).env("WALSHIP_CONFIG", self.config())
    }

    /// Returns a command that finds the configuration.
    pub fn command(&self, program: &Path) -> Command {
        self.prepared(Command::new(program))
    }

    fn prepared(&self, mut command: Command) -> Command {
        for (name, _) in std::env::vars_os() {
            let ours = |name: &str| ["PG", "AWS_", "WALSHIP_"].iter().any(|prefix| name.starts_with(prefix));
            if name.to_str().is_some_and(ours) {
                command.env_remove(name);
            }
        }
        command.env("WALSHIP_CONFIG", self.config()).env("AWS_EC2_METADATA_DISABLED", "true");
        command
    }

    /// Returns `walship` with these arguments.
    pub fn walship(&self, args: &[&str]) -> Command {
        let mut command = self.command(&bins::walship());
        command.args(args);
        command
    }

    /// Returns `walship` with these arguments, and `server` as the one it connects to.
    pub fn walship_on(&self, server: &PgServer, args: &[&str]) -> Command {
        let mut command = self.walship(args);
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    /// Returns `pitr` with these arguments.
    pub fn pitr(&self, args: &[&str]) -> Command {
        let mut command = self.command(&bins::pitr());
        command.args(args);
        command
    }

    /// Returns `pitr` with these arguments as a user that may start PostgreSQL, whose superuser is `postgres`.
    pub fn pitr_as_user(&self, args: &[&str]) -> Command {
        let mut command = self.prepared(process::unprivileged(bins::pitr()));
        command.args(args).env("PGUSER", "postgres");
        command
    }

    /// Runs a command to its end, whatever its status.
    pub fn run(&self, command: &mut Command) -> Output {
        process::run(command, RunOptions { deadline: Duration::from_secs(300), ..RunOptions::default() })
    }

    /// Runs a command and returns its standard output.
    ///
    /// # Panics
    /// When it fails; both outputs are in the message.
    pub fn ok(&self, command: &mut Command) -> String {
        let output = self.run(command);
        assert!(
            output.status.success(),
            "{command:?}: {}\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command that must fail with this status, and returns its standard error.
    ///
    /// # Panics
    /// When it ends otherwise.
    pub fn fails(&self, command: &mut Command, status: i32) -> String {
        let output = self.run(command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            output.status.code(),
            Some(status),
            "{command:?}\n{}\n{error}",
            String::from_utf8_lossy(&output.stdout)
        );
        error
    }

    /// Returns the holds that were not released: their ids and reasons.
    ///
    /// # Panics
    /// When `pitr info` fails.
    pub fn holds(&self) -> Vec<(String, String)> {
        let info = self.ok(&mut self.pitr(&["info", "--json"]));
        let info: serde_json::Value = serde_json::from_str(&info).expect("it is JSON");
        let text =
            |hold: &serde_json::Value, field: &str| hold[field].as_str().unwrap_or_default().to_owned();
        let holds = info["holds"].as_array().expect("it lists holds");
        holds.iter().map(|hold| (text(hold, "id"), text(hold, "reason"))).collect()
    }

    /// Runs `walship init` for `server`.
    ///
    /// # Panics
    /// When it fails.
    pub fn init(&self, server: &PgServer) -> String {
        self.ok(&mut self.walship_on(server, &["init"]))
    }

    /// Runs `walship backup` of `server`.
    ///
    /// # Panics
    /// When it fails.
    pub fn backup(&self, server: &PgServer) -> String {
        self.ok(&mut self.walship_on(server, &["backup"]))
    }
}

fn home() -> TempDir {
    tempfile::Builder::new().prefix("walship-stage").tempdir().expect("a temporary folder can be made")
}
