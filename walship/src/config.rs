//! Configuration: one TOML file, `WALSHIP_*` variables and flags, read once into checked values.
//!
//! A flag beats a variable, a variable beats the file, the file beats the default. Every key has all
//! three forms, except secrets, which have no flag. Where `--repo` and `--cluster` say enough, no
//! file is needed; an unknown key in the file is an error.
//!
//! ```
//! use walship::config::{Config, Overrides};
//!
//! let flags = Overrides {
//!     repo: vec!["file:///srv/walship".into()],
//!     cluster: Some("main".into()),
//!     ..Overrides::default()
//! };
//! let config = Config::read(&flags, &|_| None)?;
//! assert_eq!(config.repositories[0].url, "file:///srv/walship");
//! # Ok::<(), walship::Error>(())
//! ```

mod objectives;
mod receive;
mod retention;
mod watch;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::codec::Compression;
use crate::error::{Error, Result};
use crate::storage::{AddressingStyle, Limits, S3Settings, Secret, StorageConfig};

pub use objectives::{Objectives, parse_duration};
pub use receive::ReceiveSettings;
pub use retention::{RetentionSettings, Span};
pub use watch::{NotifyLeast, NotifySettings, Overdue, WatchSettings, WebhookForm};

/// Where the file is looked for when nothing names one; it may be missing there.
pub const DEFAULT_PATH: &str = "/etc/walship/walship.toml";

/// The longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Everything that is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The repositories. All are required: a push succeeds when it did in each; reads try them in order.
    pub repositories: Vec<StorageConfig>,
    /// The cluster's name.
    pub cluster: String,
    /// How WAL is compressed.
    pub compression: Compression,
    /// Whether a store that fails the probe is used all the same.
    pub accept_unsafe_store: bool,
    /// How long a fetch for a one-shot recovery keeps trying before it stops the recovery.
    pub restore_retry_ms: u64,
    /// Where compressed bodies of segments above 32 MiB lie meanwhile; `None`: a folder of the user's own
    /// below the system's folder for temporary files.
    pub state_dir: Option<PathBuf>,
    /// How to reach the server: a libpq connection string; `None`: libpq's variables and defaults.
    pub connection: Option<ConnectionString>,
    /// Whether the thin commands may start an agent.
    pub agent: AgentUse,
    /// What `walship receive` does.
    pub receive: ReceiveSettings,
    /// What `pitr expire` keeps.
    pub retention: RetentionSettings,
    /// What recovery is to achieve.
    pub objectives: Objectives,
    /// When watching calls something overdue or full.
    pub watch: WatchSettings,
    /// Who hears of it from `walship serve`.
    pub notify: NotifySettings,
}

/// Whether `archive-cmd` and `restore-cmd` may start an agent for the calls to come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AgentUse {
    /// Never: every call does its work itself. An agent that a supervisor runs is asked all the same.
    Off,
    /// Where one can run.
    #[default]
    Auto,
}

impl FromStr for AgentUse {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            other => Err(Error::invalid(format!("agent is {other:?}; there are off and auto"))),
        }
    }
}

/// A libpq connection string and whether everybody could read it.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectionString {
    /// The text, `host=... dbname=...` or a URI.
    pub text: String,
    /// Whether it came as a command line argument, where no password may stand.
    pub is_argument: bool,
}

impl std::fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(connection string)")
    }
}

/// The flags that every command has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "args", derive(clap::Args))]
#[cfg_attr(feature = "args", command(next_help_heading = "Configuration"))]
pub struct Overrides {
    /// Configuration file [env: WALSHIP_CONFIG] [default: /etc/walship/walship.toml where it exists]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "FILE"))]
    pub config: Option<PathBuf>,
    /// Repository: file:///srv/walship or s3://bucket/prefix; repeat for several, all required
    /// [env: WALSHIP_REPO]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "URL"))]
    pub repo: Vec<String>,
    /// Leave this one of the configured repositories out; repeat for several
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "URL", hide_short_help = true))]
    pub without_repo: Vec<String>,
    /// The cluster's name in the repository [env: WALSHIP_CLUSTER]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "NAME"))]
    pub cluster: Option<String>,
    /// How WAL is compressed: lz4, zstd or zstd:1 to zstd:19 [env: WALSHIP_COMPRESSION] [default: lz4]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "CODEC", hide_short_help = true))]
    pub compression: Option<String>,
    /// Use a store that ignores or races conditional writes all the same [env: WALSHIP_ACCEPT_UNSAFE_STORE]
    #[cfg_attr(feature = "args", arg(long, global = true, hide_short_help = true))]
    pub accept_unsafe_store: bool,
    /// How long a fetch for a one-shot recovery keeps trying, in milliseconds
    /// [env: WALSHIP_RESTORE_RETRY_MS] [default: 60000]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "MS", hide_short_help = true))]
    pub restore_retry_ms: Option<u64>,
    /// Folder for the compressed bodies of segments above 32 MiB on their way [env: WALSHIP_STATE_DIR]
    /// [default: walship-UID in the system's folder for temporary files]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "FOLDER", hide_short_help = true))]
    pub state_dir: Option<PathBuf>,
    /// Whether archive-cmd and restore-cmd may start an agent that works ahead of PostgreSQL: off or auto
    /// [env: WALSHIP_AGENT] [default: auto]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "WHETHER", hide_short_help = true))]
    pub agent: Option<String>,
    /// Connection string or URI of the server, without a password; without it libpq's PG* variables apply
    /// [env: WALSHIP_CONNECTION]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "CONNINFO", hide_short_help = true))]
    pub connection: Option<String>,
    /// Endpoint of an S3 compatible store [env: WALSHIP_S3_ENDPOINT]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "URL", hide_short_help = true))]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket [env: WALSHIP_S3_REGION]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "REGION", hide_short_help = true))]
    pub s3_region: Option<String>,
    /// How requests name the bucket: auto, path or virtual [env: WALSHIP_S3_ADDRESSING]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "STYLE", hide_short_help = true))]
    pub s3_addressing: Option<String>,
    /// PEM file of further certificate authorities to trust [env: WALSHIP_S3_CA_FILE, else AWS_CA_BUNDLE]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "FILE", hide_short_help = true))]
    pub s3_ca_file: Option<PathBuf>,
    /// Profile of AWS's shared configuration files [env: WALSHIP_S3_PROFILE]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "PROFILE", hide_short_help = true))]
    pub s3_profile: Option<String>,
    /// Milliseconds to connect to a store [env: WALSHIP_CONNECT_MS] [default: 5000]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "MS", hide_short_help = true))]
    pub connect_ms: Option<u64>,
    /// Milliseconds for one request to a store [env: WALSHIP_REQUEST_MS] [default: 20000]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "MS", hide_short_help = true))]
    pub request_ms: Option<u64>,
    /// Milliseconds for one call to a store with all its retries [env: WALSHIP_DEADLINE_MS] [default: 60000]
    #[cfg_attr(feature = "args", arg(long, global = true, value_name = "MS", hide_short_help = true))]
    pub deadline_ms: Option<u64>,
}

/// The file, as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileConfig {
    repositories: Vec<FileRepository>,
    cluster: Option<String>,
    compression: Option<String>,
    accept_unsafe_store: Option<bool>,
    restore_retry_ms: Option<u64>,
    state_dir: Option<PathBuf>,
    connection: Option<String>,
    agent: Option<String>,
    rto: Option<String>,
    rpo: Option<String>,
    receive: ReceiveSettings,
    retention: RetentionSettings,
    watch: WatchSettings,
    notify: NotifySettings,
    s3: S3Settings,
    limits: FileLimits,
}

/// One entry of `repositories`: a URL, or a table with settings of its own.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a repository is a URL, or a table with url and optionally s3 and limits")]
enum FileRepository {
    Url(String),
    Table(Box<FileRepositoryTable>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRepositoryTable {
    url: String,
    #[serde(default)]
    s3: S3Settings,
    #[serde(default)]
    limits: FileLimits,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileLimits {
    connect_ms: Option<u64>,
    request_ms: Option<u64>,
    deadline_ms: Option<u64>,
}

/// The variables, looked up by name.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Config {
    /// Reads file, environment and flags.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown key, a value that makes no sense, or when no repository or
    /// cluster is configured; [`Error::Denied`] or [`Error::LocalIo`] when the file cannot be read.
    pub fn load(flags: &Overrides) -> Result<Self> {
        Self::read(flags, &|name| std::env::var_os(name))
    }

    /// As [`Config::load`], with the environment as an argument.
    pub fn read(flags: &Overrides, environment: Environment<'_>) -> Result<Self> {
        let environment = Variables(environment);
        let file = read_file(flags, &environment)?;
        let limits = FileLimits {
            connect_ms: flags.connect_ms.or(environment.number("WALSHIP_CONNECT_MS")?),
            request_ms: flags.request_ms.or(environment.number("WALSHIP_REQUEST_MS")?),
            deadline_ms: flags.deadline_ms.or(environment.number("WALSHIP_DEADLINE_MS")?),
        };
        let s3 = outer_s3(flags, &environment)?;
        let repositories = repositories(flags, &environment, file.repositories)?
            .into_iter()
            .filter(|own| !flags.without_repo.contains(&own.url))
            .map(|own| {
                let limits = limits.or(own.limits).or(file.limits);
                let mut s3 = s3_or(s3_or(s3.clone(), own.s3), file.s3.clone());
                // AWS's own variable, which the SDK for Rust does not read.
                s3.ca_file = s3.ca_file.or(environment.path("AWS_CA_BUNDLE"));
                let config = StorageConfig { url: own.url, s3, limits: limits.or_default()? };
                config.location().map(|_| config)
            })
            .collect::<Result<Vec<_>>>()?;
        if repositories.is_empty() {
            return Err(Error::invalid("no repository is configured").with_next(format!(
                "Name one with --repo, WALSHIP_REPO, or `repositories` in {DEFAULT_PATH}."
            )));
        }
        let cluster = flags.cluster.clone().or(environment.text("WALSHIP_CLUSTER")?).or(file.cluster);
        let cluster = cluster.ok_or_else(|| {
            Error::invalid("no cluster is configured").with_next(format!(
                "Name it with --cluster, WALSHIP_CLUSTER, or `cluster` in {DEFAULT_PATH}."
            ))
        })?;
        let compression =
            flags.compression.clone().or(environment.text("WALSHIP_COMPRESSION")?).or(file.compression);
        let argument = |text: &String| ConnectionString { text: text.clone(), is_argument: true };
        let private = |text: String| ConnectionString { text, is_argument: false };
        Ok(Self {
            repositories,
            cluster,
            compression: compression.map_or(Ok(Compression::default()), |text| text.parse())?,
            accept_unsafe_store: flags.accept_unsafe_store
                || environment
                    .flag("WALSHIP_ACCEPT_UNSAFE_STORE")?
                    .or(file.accept_unsafe_store)
                    .unwrap_or(false),
            restore_retry_ms: flags
                .restore_retry_ms
                .or(environment.number("WALSHIP_RESTORE_RETRY_MS")?)
                .or(file.restore_retry_ms)
                .unwrap_or(60_000),
            state_dir: absolute(
                flags.state_dir.clone().or(environment.path("WALSHIP_STATE_DIR")).or(file.state_dir),
            )?,
            connection: flags
                .connection
                .as_ref()
                .map(argument)
                .or(environment.text("WALSHIP_CONNECTION")?.map(private))
                .or(file.connection.map(private)),
            agent: flags
                .agent
                .clone()
                .or(environment.text("WALSHIP_AGENT")?)
                .or(file.agent)
                .map_or(Ok(AgentUse::default()), |text| text.parse())?,
            receive: file.receive.with_environment(&environment)?,
            retention: file.retention.with_environment(&environment)?,
            objectives: Objectives::read(&environment, file.rto, file.rpo)?,
            watch: file.watch.with_environment(&environment)?,
            notify: file.notify.with_environment(&environment)?,
        })
    }

    /// Returns what is configured by file and environment alone, without the flags of one command; where that is no whole
    /// configuration, with them.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn standing(flags: &Overrides) -> Result<Self> {
        let file_only = Overrides { config: flags.config.clone(), ..Overrides::default() };
        Self::load(&file_only).or_else(|_| Self::load(flags))
    }

    /// Returns what is kept, promised and used as a repository, by the names of the keys: what a change of it is noted by. No
    /// secrets.
    pub fn promises(&self) -> BTreeMap<String, String> {
        let urls: Vec<&str> = self.repositories.iter().map(|repository| &*repository.url).collect();
        let seconds = |time: Option<Duration>| time.map(|time| format!("{} s", time.as_secs()));
        let kept = &self.retention;
        let span = |span: Option<Span>| span.map(|span| span.to_string());
        let count = |count: Option<u32>| count.map(|count| count.to_string());
        let all = [
            ("repositories", Some(urls.join(", "))),
            ("rto", seconds(self.objectives.recovery_time)),
            ("rpo", seconds(self.objectives.recovery_point)),
            ("retention.window", span(kept.window)),
            ("retention.keep_last", count(kept.keep_last)),
            ("retention.keep_for", span(kept.keep_for)),
            ("retention.keep_hourly", count(kept.keep_hourly)),
            ("retention.keep_daily", count(kept.keep_daily)),
            ("retention.keep_weekly", count(kept.keep_weekly)),
            ("retention.keep_monthly", count(kept.keep_monthly)),
            ("retention.keep_yearly", count(kept.keep_yearly)),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

fn absolute(path: Option<PathBuf>) -> Result<Option<PathBuf>> {
    match path {
        Some(path) if !path.is_absolute() => {
            Err(Error::invalid(format!("state_dir is {path:?}; it has to be an absolute path")))
        }
        path => Ok(path),
    }
}

fn repositories(
    flags: &Overrides,
    environment: &Variables<'_>,
    file: Vec<FileRepository>,
) -> Result<Vec<FileRepositoryTable>> {
    let plain =
        |url: String| FileRepositoryTable { url, s3: S3Settings::default(), limits: FileLimits::default() };
    if !flags.repo.is_empty() {
        return Ok(flags.repo.iter().cloned().map(plain).collect());
    }
    if let Some(text) = environment.text("WALSHIP_REPO")? {
        return Ok(text
            .split([',', ' '])
            .filter(|url| !url.is_empty())
            .map(str::to_owned)
            .map(plain)
            .collect());
    }
    let table = |entry| match entry {
        FileRepository::Url(url) => plain(url),
        FileRepository::Table(table) => *table,
    };
    Ok(file.into_iter().map(table).collect())
}

/// The S3 settings of flags and environment.
fn outer_s3(flags: &Overrides, environment: &Variables<'_>) -> Result<S3Settings> {
    let secret = |name| Ok::<_, Error>(environment.text(name)?.map(Secret::new));
    let addressing = flags.s3_addressing.clone().or(environment.text("WALSHIP_S3_ADDRESSING")?);
    let addressing = match addressing.as_deref() {
        None | Some("auto") => AddressingStyle::Auto,
        Some("path") => AddressingStyle::Path,
        Some("virtual") => AddressingStyle::Virtual,
        Some(other) => {
            return Err(Error::invalid(format!(
                "{other:?} is no addressing style; there are auto, path and virtual"
            )));
        }
    };
    Ok(S3Settings {
        endpoint: flags.s3_endpoint.clone().or(environment.text("WALSHIP_S3_ENDPOINT")?),
        region: flags.s3_region.clone().or(environment.text("WALSHIP_S3_REGION")?),
        addressing,
        ca_file: flags.s3_ca_file.clone().or(environment.path("WALSHIP_S3_CA_FILE")),
        profile: flags.s3_profile.clone().or(environment.text("WALSHIP_S3_PROFILE")?),
        access_key_id: environment.text("WALSHIP_S3_ACCESS_KEY_ID")?,
        secret_access_key: secret("WALSHIP_S3_SECRET_ACCESS_KEY")?,
        session_token: secret("WALSHIP_S3_SESSION_TOKEN")?,
        expire_profile: environment.text("WALSHIP_S3_EXPIRE_PROFILE")?,
        expire_access_key_id: environment.text("WALSHIP_S3_EXPIRE_ACCESS_KEY_ID")?,
        expire_secret_access_key: secret("WALSHIP_S3_EXPIRE_SECRET_ACCESS_KEY")?,
        expire_session_token: secret("WALSHIP_S3_EXPIRE_SESSION_TOKEN")?,
    })
}

/// Fills what `first` leaves open from `second`. Credentials come from one place as a whole.
fn s3_or(first: S3Settings, second: S3Settings) -> S3Settings {
    let expires_as_another = first.expires_as_another();
    let credentials = if first.access_key_id.is_some() || first.secret_access_key.is_some() {
        (first.access_key_id, first.secret_access_key, first.session_token)
    } else {
        (second.access_key_id, second.secret_access_key, second.session_token)
    };
    let expire = if expires_as_another {
        (
            first.expire_profile,
            first.expire_access_key_id,
            first.expire_secret_access_key,
            first.expire_session_token,
        )
    } else {
        (
            second.expire_profile,
            second.expire_access_key_id,
            second.expire_secret_access_key,
            second.expire_session_token,
        )
    };
    S3Settings {
        endpoint: first.endpoint.or(second.endpoint),
        region: first.region.or(second.region),
        addressing: match first.addressing {
            AddressingStyle::Auto => second.addressing,
            chosen => chosen,
        },
        ca_file: first.ca_file.or(second.ca_file),
        profile: first.profile.or(second.profile),
        access_key_id: credentials.0,
        secret_access_key: credentials.1,
        session_token: credentials.2,
        expire_profile: expire.0,
        expire_access_key_id: expire.1,
        expire_secret_access_key: expire.2,
        expire_session_token: expire.3,
    }
}

impl FileLimits {
    fn or(self, other: Self) -> Self {
        Self {
            connect_ms: self.connect_ms.or(other.connect_ms),
            request_ms: self.request_ms.or(other.request_ms),
            deadline_ms: self.deadline_ms.or(other.deadline_ms),
        }
    }

    fn or_default(self) -> Result<Limits> {
        let default = Limits::default();
        let limits = Limits {
            connect_ms: self.connect_ms.unwrap_or(default.connect_ms),
            request_ms: self.request_ms.unwrap_or(default.request_ms),
            deadline_ms: self.deadline_ms.unwrap_or(default.deadline_ms),
        };
        let day = 86_400_000;
        if [limits.connect_ms, limits.request_ms, limits.deadline_ms].iter().any(|ms| !(1..=day).contains(ms))
        {
            return Err(Error::invalid(
                "connect_ms, request_ms and deadline_ms are from 1 to 86400000 (a day)",
            ));
        }
        Ok(limits)
    }
}

fn read_file(flags: &Overrides, environment: &Variables<'_>) -> Result<FileConfig> {
    let named = flags.config.clone().or(environment.path("WALSHIP_CONFIG"));
    let path = named.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    let shown = path.display();
    let failed = |error| {
        Error::from_io(format!("the configuration {shown} cannot be read"), error)
            .with_safe("nothing was started")
            .with_next("Check the file's path and permissions: the user that runs PostgreSQL must be able to read it.")
    };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
            return Ok(FileConfig::default());
        }
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    let config: FileConfig = toml::from_str(&text).map_err(|error| {
        // Never the offending line itself: it may hold a secret.
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
        Error::invalid(format!(
            "the configuration {shown} is wrong{line}: {}",
            error.message().replace('\n', " ")
        ))
        .with_next("Correct the file; the README lists the keys.")
    })?;
    let private = metadata.mode() & 0o077 == 0 || (metadata.uid() == 0 && metadata.mode() & 0o037 == 0);
    if config.holds_secrets() && !private {
        return Err(Error::denied(format!(
            "the configuration {shown} holds a secret and others may read it (mode {:04o})",
            metadata.mode() & 0o7777
        ))
        .with_safe("nothing was started")
        .with_next(format!("Run `chmod 0600 {shown}` (or 0640 when root owns it), and change the secret.")));
    }
    Ok(config)
}

impl FileConfig {
    fn holds_secrets(&self) -> bool {
        let s3_secret = |s3: &S3Settings| {
            [&s3.secret_access_key, &s3.session_token, &s3.expire_secret_access_key, &s3.expire_session_token]
                .iter()
                .any(|secret| secret.is_some())
        };
        let own = |entry: &FileRepository| match entry {
            FileRepository::Url(_) => false,
            FileRepository::Table(table) => s3_secret(&table.s3),
        };
        let password = |text: &String| {
            text.contains("password") || text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'))
        };
        s3_secret(&self.s3)
            || self.notify.webhook.is_some()
            || self.repositories.iter().any(own)
            || self.connection.as_ref().is_some_and(password)
    }
}

/// The environment, typed. Empty variables count as unset.
struct Variables<'a>(Environment<'a>);

impl Variables<'_> {
    fn path(&self, name: &str) -> Option<PathBuf> {
        (self.0)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        let value = (self.0)(name).filter(|value| !value.is_empty());
        value
            .map(|value| value.into_string().map_err(|_| Error::invalid(format!("{name} is not UTF-8"))))
            .transpose()
    }

    fn number(&self, name: &str) -> Result<Option<u64>> {
        let number = |text: String| {
            text.parse()
                .map_err(|_| Error::invalid(format!("{name} is {text:?}, not a number of milliseconds")))
        };
        self.text(name)?.map(number).transpose()
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.text(name)?.as_deref() {
            None => Ok(None),
            Some("1" | "true" | "on" | "yes") => Ok(Some(true)),
            Some("0" | "false" | "off" | "no") => Ok(Some(false)),
            Some(other) => Err(Error::invalid(format!("{name} is {other:?}, neither true nor false"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn read(file: Option<&str>, variables: &[(&str, &str)], mut flags: Overrides) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walship.toml");
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            flags.config = Some(path);
        }
        Config::read(&flags, &|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    const FULL: &str = r#"
        cluster = "main"
        compression = "zstd:3"
        restore_retry_ms = 5
        repositories = ["file:///srv/walship", { url = "s3://bucket/x", s3 = { region = "eu" }, limits = { request_ms = 7 } }]
        [s3]
        endpoint = "https://h"
        secret_access_key = "hush"
        access_key_id = "AK"
        [limits]
        deadline_ms = 9
    "#;

    #[test]
    fn flags_beat_variables_beat_the_file_beats_defaults() {
        let config = read(Some(FULL), &[], Overrides::default()).unwrap();
        assert_eq!(config.cluster, "main");
        assert_eq!(config.compression, Compression::Zstd(3));
        assert_eq!(config.restore_retry_ms, 5);
        let second = &config.repositories[1];
        assert_eq!(second.s3.region.as_deref(), Some("eu"));
        assert_eq!(second.s3.endpoint.as_deref(), Some("https://h"));
        assert_eq!(second.limits, Limits { connect_ms: 5000, request_ms: 7, deadline_ms: 9 });
        assert_eq!(config.repositories[0].limits.request_ms, Limits::default().request_ms);

        let variables =
            [("WALSHIP_CLUSTER", "two"), ("WALSHIP_COMPRESSION", "lz4"), ("WALSHIP_REQUEST_MS", "8")];
        let config = read(Some(FULL), &variables, Overrides::default()).unwrap();
        assert_eq!((&*config.cluster, config.compression), ("two", Compression::Lz4));
        assert_eq!(config.repositories[1].limits.request_ms, 8);

        let flags = Overrides {
            cluster: Some("three".into()),
            repo: vec!["/a".into(), "/b".into()],
            ..Overrides::default()
        };
        let config = read(Some(FULL), &variables, flags).unwrap();
        assert_eq!(config.cluster, "three");
        assert_eq!(config.repositories.iter().map(|c| &*c.url).collect::<Vec<_>>(), ["/a", "/b"]);
    }

    #[test]
    fn repo_and_cluster_are_enough() {
        let variables = [("WALSHIP_REPO", "/a,/b"), ("WALSHIP_CLUSTER", "main"), ("WALSHIP_CONFIG", "")];
        let config = read(None, &variables, Overrides::default()).unwrap();
        assert_eq!(config.repositories.len(), 2);
        assert_eq!(config.restore_retry_ms, 60_000);
    }

    #[test]
    fn nonsense_is_refused() {
        for (file, what) in [
            ("cluster = 'main'", "no repository"),
            ("repositories = ['/a']", "no cluster"),
            ("repositories = ['/a']\ncluster = 'x'\nretires = 1", "line 3: unknown field `retires`"),
            ("repositories = ['/a']\ncluster = 'x'\n[s3]\nendpiont = 'y'", "endpiont"),
            ("repositories = [{ url = '/a', x = 1 }]\ncluster = 'x'", "a repository is a URL"),
            ("repositories = ['http://a']\ncluster = 'x'", "cannot be a repository"),
            ("repositories = ['/a']\ncluster = 'x'\ncompression = 'gzip'", "gzip"),
            ("repositories = ['/a']\ncluster = 'x'\nlimits = { request_ms = 0 }", "from 1 to"),
            ("repositories = ['/a']\ncluster = 'x'\nstate_dir = 'x'", "absolute"),
            ("[s3]\nsecret_access_key = hush", "line 2"),
        ] {
            let error = read(Some(file), &[], Overrides::default()).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{file}: {error}");
            assert!(error.to_string().contains(what), "{file}: {error}");
            assert!(!error.to_string().contains("hush"), "{error}");
        }
        let variables = [("WALSHIP_REQUEST_MS", "soon")];
        assert!(read(Some(FULL), &variables, Overrides::default()).unwrap_err().to_string().contains("soon"));
    }

    #[test]
    fn a_file_that_cannot_be_read_or_lets_others_read_secrets_is_refused() {
        let flags = Overrides { config: Some("/nowhere/walship.toml".into()), ..Overrides::default() };
        let error = Config::read(&flags, &|_| None).unwrap_err();
        assert!(error.to_string().contains("/nowhere/walship.toml cannot be read"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walship.toml");
        fs::write(&path, FULL).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let flags = Overrides { config: Some(path), ..Overrides::default() };
        let error = Config::read(&flags, &|_| None).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error}");
        assert!(error.to_string().contains("mode 0644"), "{error}");
    }
}
