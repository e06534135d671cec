//! How to reach a server: libpq's connection parameters with libpq's meanings and precedence
//! (connection string, then service file, then `PG*` variables, then defaults).
//!
//! The environment and the files are read once, here; [`super::connection`] only carries out.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::conninfo::{self, Settings};
use super::passfile;
use crate::error::{Error, Result};

/// Where a connection string came from: decides whether it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A command line argument: every user of the machine can read it, so no password.
    Argument,
    /// A configuration file or a variable.
    Private,
}

/// A password; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Returns the password itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// One address to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The `host` parameter: a name, an address, or the folder of a Unix socket; empty for the
    /// default socket folders.
    pub name: String,
    /// The `hostaddr` parameter: connect here, but verify and look up passwords by `name`.
    pub address: Option<std::net::IpAddr>,
    /// The port, or the number in the socket's name.
    pub port: u16,
}

impl Host {
    /// Returns the folders to look for a Unix socket in; `None` for TCP.
    pub fn socket_folders(&self) -> Option<Vec<PathBuf>> {
        if self.address.is_some() {
            None
        } else if self.name.is_empty() {
            Some(vec!["/var/run/postgresql".into(), "/tmp".into()])
        } else {
            self.name.starts_with('/').then(|| vec![PathBuf::from(&self.name)])
        }
    }

    /// Returns the name that password files know this host by.
    pub(crate) fn passfile_name(&self) -> String {
        match (&self.name, self.address) {
            (name, Some(address)) if name.is_empty() => address.to_string(),
            (name, _) if name.is_empty() || name == "/var/run/postgresql" || name == "/tmp" => {
                "localhost".to_owned()
            }
            (name, _) => name.clone(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name.as_str(), self.address) {
            ("", None) => write!(f, "the local socket {}", self.port),
            (name, None) if name.starts_with('/') => write!(f, "{name}/.s.PGSQL.{}", self.port),
            ("", Some(address)) => write!(f, "{address} port {}", self.port),
            (name, Some(address)) => write!(f, "{name} ({address}) port {}", self.port),
            (name, None) => write!(f, "{name} port {}", self.port),
        }
    }
}

macro_rules! word_enum {
    ($(#[$doc:meta])* $name:ident, $keyword:literal { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(Error::invalid(format!("{}={text:?} is not understood", $keyword))
                        .with_next(concat!("Use one of:", $(" ", $word,)* "."))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word,)* })
            }
        }
    };
}

word_enum! {
    /// `sslmode`, as libpq means it.
    SslMode, "sslmode" {
        /// No TLS.
        Disable = "disable",
        /// Plain first, TLS when the server wants it.
        Allow = "allow",
        /// TLS first, plain when the server has none.
        Prefer = "prefer",
        /// TLS; the certificate is verified as with `verify-ca` when a root certificate file exists.
        Require = "require",
        /// TLS with a certificate that a trusted root signed.
        VerifyCa = "verify-ca",
        /// That, and the certificate is for this host.
        VerifyFull = "verify-full",
    }
}

word_enum! {
    /// `channel_binding`: whether SCRAM must be tied to the TLS connection.
    ChannelBinding, "channel_binding" {
        /// Never.
        Disable = "disable",
        /// When the server offers it.
        Prefer = "prefer",
        /// Always: a connection without it is refused.
        Require = "require",
    }
}

word_enum! {
    /// `target_session_attrs`: which of several servers will do.
    TargetSession, "target_session_attrs" {
        /// The first that answers.
        Any = "any",
        /// One that accepts writes by default.
        ReadWrite = "read-write",
        /// One that does not.
        ReadOnly = "read-only",
        /// Not a standby.
        Primary = "primary",
        /// A standby.
        Standby = "standby",
        /// A standby if there is one, else any.
        PreferStandby = "prefer-standby",
    }
}

word_enum! {
    /// `load_balance_hosts`: in which order hosts and their addresses are tried.
    LoadBalance, "load_balance_hosts" {
        /// As given.
        Disable = "disable",
        /// By chance.
        Random = "random",
    }
}

/// Which certificates are trusted as roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCerts {
    /// Those in this file.
    File(PathBuf),
    /// Those of the operating system (`sslrootcert=system`).
    System,
}

/// Everything needed to connect; printing it shows no secret.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The addresses, in the order to try.
    pub hosts: Vec<Host>,
    /// The user.
    pub user: String,
    /// The database for ordinary connections.
    pub dbname: String,
    /// The password, if the connection string or `PGPASSWORD` gave one.
    pub password: Option<Secret>,
    /// `sslmode`.
    pub sslmode: SslMode,
    /// The roots, if the file exists or was asked for.
    pub root_certs: Option<RootCerts>,
    /// The client certificate file, if it exists or was asked for.
    pub client_cert: Option<PathBuf>,
    /// The client certificate's key file.
    pub client_key: Option<PathBuf>,
    /// Whether only TLS 1.3 is accepted (`ssl_min_protocol_version=TLSv1.3`).
    pub tls13_only: bool,
    /// Whether the host's name is sent in the TLS handshake (`sslsni`).
    pub sslsni: bool,
    /// `channel_binding`.
    pub channel_binding: ChannelBinding,
    /// `target_session_attrs`.
    pub target_session: TargetSession,
    /// `load_balance_hosts`.
    pub load_balance: LoadBalance,
    /// How long each address of a host may take to be connected to.
    pub connect_timeout: Duration,
    /// How long an ordinary command may take.
    pub command_timeout: Duration,
    /// `application_name`.
    pub application_name: String,
    /// `options`: settings for the session, `-c name=value`.
    pub session_options: Option<String>,
    /// TCP keepalives: idle time, interval, count; `None` switches them off.
    pub keepalive: Option<Keepalive>,
    /// Whether MD5 authentication is accepted (`walship_allow_md5=1`); it can be cracked offline.
    pub allow_md5: bool,
    /// Whether a password may be sent in clear without TLS (`walship_allow_cleartext=1`).
    pub allow_cleartext: bool,
    passfile: Option<(PathBuf, String)>,
    /// Why the password file was not used, for the message when a password was needed.
    pub(crate) passfile_problem: Option<String>,
}

/// TCP keepalive settings; `None` leaves the system's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Seconds of silence before the first probe.
    pub idle: Option<u32>,
    /// Seconds between probes.
    pub interval: Option<u32>,
    /// Probes without an answer before the connection is given up.
    pub count: Option<u32>,
}

/// The variables libpq reads, and the keyword each one stands for.
const VARIABLES: &[(&str, &str)] = &[
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGUSER", "user"),
    ("PGDATABASE", "dbname"),
    ("PGPASSWORD", "password"),
    ("PGPASSFILE", "passfile"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGOPTIONS", "options"),
    ("PGAPPNAME", "application_name"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGSSLCERTMODE", "sslcertmode"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
    ("PGSSLSNI", "sslsni"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMAXPROTOCOLVERSION", "ssl_max_protocol_version"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGGSSENCMODE", "gssencmode"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
];

/// Keywords that libpq knows and that need nothing of us.
const HARMLESS: &[&str] = &[
    "client_encoding",
    "fallback_application_name",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "sslcompression",
    "sslpassword",
    "replication",
    "tcp_user_timeout",
    "service",
    "servicefile",
    "sslcertmode",
    "min_protocol_version",
    "max_protocol_version",
];

/// Keywords of settings that tighten security and that we do not carry out: ignoring one would betray its author.
const UNSUPPORTED: &[&str] =
    &["sslcrl", "sslcrldir", "requirepeer", "require_auth", "ssl_max_protocol_version"];

/// Returns what a connection string on the command line sets.
///
/// # Errors
/// [`Error::Invalid`] when the text makes no sense or holds a password.
pub fn argument_settings(conninfo: &str) -> Result<Settings> {
    let settings = conninfo::parse(conninfo)?;
    if ["password", "sslpassword"].iter().any(|key| settings.get(*key).is_some_and(|p| !p.is_empty())) {
        return Err(Error::invalid("the connection string on the command line holds a password")
            .with_safe("it was not used; but other users of this machine could read it in the process list")
            .with_next(
                "Put the password into ~/.pgpass (mode 0600) or PGPASSWORD, and change it if it was exposed.",
            ));
    }
    Ok(settings)
}

impl ConnectOptions {
    /// Returns the options of a command line argument, completed from the environment.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the text makes no sense or holds a password.
    pub fn from_env_and_uri(conninfo: &str) -> Result<Self> {
        Self::resolve(conninfo, Origin::Argument, &|name| std::env::var(name).ok())
    }

    /// Returns the options of a connection string from a private place (a configuration file or a
    /// variable), completed from the environment.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the text makes no sense.
    pub fn from_private(conninfo: &str) -> Result<Self> {
        Self::resolve(conninfo, Origin::Private, &|name| std::env::var(name).ok())
    }

    /// Returns the options in `conninfo`, completed from the variables that `variable` returns, the
    /// service file and defaults.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what libpq would refuse, for a password in an argument, and for
    /// settings that promise a protection which this client does not have.
    pub fn resolve(
        conninfo: &str,
        origin: Origin,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut settings = match origin {
            Origin::Argument => argument_settings(conninfo)?,
            Origin::Private => conninfo::parse(conninfo)?,
        };
        if let Some(service) = settings.get("service").cloned().or_else(|| variable("PGSERVICE")) {
            let named = settings.get("servicefile").cloned();
            for (keyword, value) in service_settings(&service, named, &variable)? {
                settings.entry(keyword).or_insert(value);
            }
        }
        check_keywords(&settings)?;
        for (name, keyword) in VARIABLES {
            if let Some(value) = variable(name) {
                settings.entry((*keyword).into()).or_insert(value);
            }
        }
        settings.retain(|_, value| !value.is_empty());
        for keyword in UNSUPPORTED {
            if settings.contains_key(*keyword) {
                return Err(Error::invalid(format!("{keyword} is set, and walship does not support it"))
                    .with_next("Remove the setting, or set it to an empty value for this command."));
            }
        }
        Self::from_settings(&settings, &variable)
    }

    fn from_settings(settings: &Settings, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |keyword: &str| settings.get(keyword).map(String::as_str);
        if get("gssencmode") == Some("require") {
            return Err(Error::invalid("gssencmode=require is set, and walship does not speak GSSAPI"));
        }
        if get("sslnegotiation").is_some_and(|mode| mode != "postgres") {
            return Err(Error::invalid("sslnegotiation is set, and walship knows only \"postgres\""));
        }
        let home = variable("HOME").map(PathBuf::from);
        let own_file = |name: &str| home.as_ref().map(|home| home.join(".postgresql").join(name));
        let user = match get("user") {
            Some(user) => user.to_owned(),
            None => operating_system_user()?,
        };
        let (root_certs, sslmode) = tls_roots(get("sslrootcert"), get("sslmode"), own_file("root.crt"))?;
        if matches!(sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && get("sslrootcert") != Some("system")
        {
            refuse_revocations(own_file("root.crl"))?;
        }
        let client_cert = match (get("sslcert"), get("sslcertmode")) {
            (_, Some("disable")) => None,
            (Some(path), _) => Some(PathBuf::from(path)),
            (None, _) => own_file("postgresql.crt").filter(|path| path.exists()),
        };
        let client_key = match get("sslkey") {
            Some(path) => Some(PathBuf::from(path)),
            None => own_file("postgresql.key"),
        };
        let mut options = Self {
            hosts: hosts(get("host"), get("hostaddr"), get("port"))?,
            dbname: get("dbname").unwrap_or(&user).to_owned(),
            user,
            password: get("password").map(|text| Secret(text.to_owned())),
            sslmode,
            root_certs,
            client_key: client_cert.as_ref().and(client_key),
            client_cert,
            tls13_only: min_tls13(get("ssl_min_protocol_version"))?,
            sslsni: get("sslsni") != Some("0"),
            channel_binding: get("channel_binding").unwrap_or("prefer").parse()?,
            target_session: get("target_session_attrs").unwrap_or("any").parse()?,
            load_balance: get("load_balance_hosts").unwrap_or("disable").parse()?,
            connect_timeout: connect_timeout(get("connect_timeout"))?,
            command_timeout: Duration::from_secs(60),
            application_name: get("application_name").unwrap_or("walship").to_owned(),
            session_options: get("options").map(str::to_owned),
            keepalive: keepalive(settings)?,
            allow_md5: flag(settings, "walship_allow_md5")?,
            allow_cleartext: flag(settings, "walship_allow_cleartext")?,
            passfile: None,
            passfile_problem: None,
        };
        if options.password.is_none() {
            let path = match get("passfile") {
                Some(path) => Some(PathBuf::from(path)),
                None => home.map(|home| home.join(".pgpass")),
            };
            match path.as_deref().map(read_passfile) {
                Some(Ok(Some(text))) => options.passfile = path.map(|path| (path, text)),
                Some(Err(problem)) => {
                    tracing::warn!("{problem}");
                    options.passfile_problem = Some(problem);
                }
                Some(Ok(None)) | None => {}
            }
        }
        Ok(options)
    }

    /// Returns the password for one host: the given one, else the password file's.
    pub(crate) fn password_for(&self, host: &Host, database: &str) -> Option<Secret> {
        if let Some(password) = &self.password {
            return Some(password.clone());
        }
        let (_, text) = self.passfile.as_ref()?;
        passfile::password(text, &host.passfile_name(), host.port, database, &self.user).map(Secret)
    }

    /// Returns the options narrowed to a primary, if they allow looking for one on several hosts.
    pub fn for_primary(&self) -> Self {
        Self { target_session: TargetSession::Primary, ..self.clone() }
    }
}

impl fmt::Display for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {} at ", self.user)?;
        for (number, host) in self.hosts.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{host}")?;
        }
        Ok(())
    }
}

/// Refuses the list of revoked certificates that libpq would use: an ignored list betrays its author.
fn refuse_revocations(list: Option<PathBuf>) -> Result<()> {
    match list {
        Some(list) if list.exists() => Err(Error::invalid(format!(
            "{} is there, and walship does not support lists of revoked certificates",
            list.display()
        ))
        .with_next("Move the file away, or set HOME to another folder for this command.")),
        _ => Ok(()),
    }
}

fn check_keywords(settings: &Settings) -> Result<()> {
    const OWN: &[&str] = &[
        "walship_allow_md5",
        "walship_allow_cleartext",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
    ];
    for keyword in settings.keys() {
        let known = VARIABLES.iter().any(|(_, known)| known == keyword)
            || HARMLESS.contains(&keyword.as_str())
            || OWN.contains(&keyword.as_str());
        if !known {
            return Err(Error::invalid(format!("{keyword:?} is no connection parameter"))
                .with_next("Use libpq's names: host, port, user, dbname, sslmode, passfile, ..."));
        }
    }
    Ok(())
}

fn hosts(host: Option<&str>, hostaddr: Option<&str>, port: Option<&str>) -> Result<Vec<Host>> {
    fn split(text: Option<&str>) -> Vec<&str> {
        text.map(|text| text.split(',').map(str::trim).collect()).unwrap_or_default()
    }
    let (names, addresses, ports) = (split(host), split(hostaddr), split(port));
    let count = names.len().max(addresses.len()).max(1);
    if count > 64 {
        return Err(Error::invalid(format!("{count} hosts are given; 64 at most are tried")));
    }
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err(Error::invalid(format!(
            "{} host names do not match {} hostaddr values",
            names.len(),
            addresses.len()
        )));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(Error::invalid(format!("{} ports do not match {count} hosts", ports.len())));
    }
    (0..count)
        .map(|index| {
            let port = ports.get(index).or(if ports.len() == 1 { ports.first() } else { None });
            let port = match port.copied().filter(|port| !port.is_empty()) {
                None => 5432,
                Some(text) => text
                    .parse::<u16>()
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| Error::invalid(format!("{text:?} is not a port")))?,
            };
            let address = match addresses.get(index).copied().filter(|text| !text.is_empty()) {
                None => None,
                Some(text) => Some(
                    text.parse()
                        .map_err(|_| Error::invalid(format!("hostaddr {text:?} is not an IP address")))?,
                ),
            };
            let name = names.get(index).copied().unwrap_or_default();
            if name.starts_with('@') {
                return Err(Error::invalid("abstract Unix sockets (host=@...) are not supported"));
            }
            Ok(Host { name: name.to_owned(), address, port })
        })
        .collect()
}

/// Decides `sslmode` and the roots together, since each has a say in the other.
fn tls_roots(
    rootcert: Option<&str>,
    sslmode: Option<&str>,
    default_file: Option<PathBuf>,
) -> Result<(Option<RootCerts>, SslMode)> {
    let system = rootcert == Some("system");
    let sslmode: SslMode = match sslmode {
        Some(text) => text.parse()?,
        None if system => SslMode::VerifyFull,
        None => SslMode::Prefer,
    };
    if system && sslmode != SslMode::VerifyFull {
        return Err(Error::invalid(format!("sslmode={sslmode} is too weak for sslrootcert=system"))
            .with_next("Use sslmode=verify-full: anyone can get a certificate that the system trusts."));
    }
    let roots = match rootcert {
        Some("system") => Some(RootCerts::System),
        Some(path) => Some(PathBuf::from(path)).filter(|path| path.exists()).map(RootCerts::File),
        None => default_file.filter(|path| path.exists()).map(RootCerts::File),
    };
    match (sslmode, &roots) {
        (SslMode::VerifyCa | SslMode::VerifyFull, None) => Err(Error::invalid(format!(
            "sslmode={sslmode} needs a root certificate file, and {} does not exist",
            rootcert.unwrap_or("~/.postgresql/root.crt")
        ))
        .with_next("Give the file with sslrootcert, or sslrootcert=system for the system's roots.")),
        (SslMode::Require, Some(_)) => Ok((roots, SslMode::VerifyCa)),
        _ => Ok((roots, sslmode)),
    }
}

fn min_tls13(text: Option<&str>) -> Result<bool> {
    match text.map(str::to_ascii_lowercase).as_deref() {
        None | Some("tlsv1" | "tlsv1.1" | "tlsv1.2") => Ok(false),
        Some("tlsv1.3") => Ok(true),
        Some(other) => Err(Error::invalid(format!("ssl_min_protocol_version={other:?} is not understood"))),
    }
}

/// libpq waits for ever by default; a bound is better for a program nobody watches.
fn connect_timeout(text: Option<&str>) -> Result<Duration> {
    let Some(text) = text else { return Ok(Duration::from_secs(30)) };
    let seconds: i64 = text
        .trim()
        .parse()
        .map_err(|_| Error::invalid(format!("connect_timeout={text:?} is not a number of seconds")))?;
    Ok(match seconds {
        ..=0 => Duration::from_secs(600),
        // libpq too rounds 1 up to 2.
        seconds => Duration::from_secs(seconds.clamp(2, 600).unsigned_abs()),
    })
}

fn keepalive(settings: &Settings) -> Result<Option<Keepalive>> {
    let number = |keyword: &str| -> Result<Option<u32>> {
        let Some(text) = settings.get(keyword) else { return Ok(None) };
        let number: u32 =
            text.trim().parse().map_err(|_| Error::invalid(format!("{keyword}={text:?} is not a number")))?;
        Ok((number > 0).then_some(number.min(32767)))
    };
    if settings.get("keepalives").is_some_and(|text| text.trim() == "0") {
        return Ok(None);
    }
    Ok(Some(Keepalive {
        idle: number("keepalives_idle")?,
        interval: number("keepalives_interval")?,
        count: number("keepalives_count")?,
    }))
}

fn flag(settings: &Settings, keyword: &str) -> Result<bool> {
    match settings.get(keyword).map(String::as_str) {
        None | Some("0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => Err(Error::invalid(format!("{keyword}={other:?} is neither 0 nor 1"))),
    }
}

fn operating_system_user() -> Result<String> {
    let uid = nix::unistd::geteuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => Ok(user.name),
        _ => Err(Error::invalid(format!("no user is given, and uid {uid} has no name on this machine"))
            .with_next("Give the user in the connection string or in PGUSER.")),
    }
}

fn service_settings(
    service: &str,
    named: Option<String>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Settings> {
    let explicit = named.or_else(|| variable("PGSERVICEFILE")).map(PathBuf::from);
    let user_file =
        explicit.clone().or_else(|| variable("HOME").map(|home| Path::new(&home).join(".pg_service.conf")));
    let system_file = Path::new(&variable("PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".into()))
        .join("pg_service.conf");
    for path in user_file.into_iter().chain([system_file]) {
        let text = match read_small(&path) {
            Ok(Some((_, text))) => text,
            Ok(None) if explicit.as_ref() == Some(&path) => {
                return Err(Error::invalid(format!("the service file {} does not exist", path.display())));
            }
            Ok(None) => continue,
            Err(problem) => return Err(Error::invalid(problem)),
        };
        if let Some(settings) = passfile::service(&text, service)? {
            return Ok(settings);
        }
    }
    Err(Error::invalid(format!("no service file defines the service {service:?}"))
        .with_next("Add a section of that name to ~/.pg_service.conf or the file named by PGSERVICEFILE."))
}

/// Returns the file's permission bits and text; `None` when there is no such file.
fn read_small(path: &Path) -> std::result::Result<Option<(u32, String)>, String> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    if !metadata.is_file() {
        return Err(format!("{} is not a plain file", path.display()));
    }
    if metadata.len() > passfile::MAX_BYTES {
        return Err(format!("{} is too large", path.display()));
    }
    let bytes = std::fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8", path.display()))?;
    Ok(Some((metadata.mode() & 0o777, text)))
}

fn read_passfile(path: &Path) -> std::result::Result<Option<String>, String> {
    // A password file of /dev/null is a common way to say "none".
    if path == Path::new("/dev/null") {
        return Ok(None);
    }
    match read_small(path)? {
        Some((mode, _)) if mode & 0o077 != 0 => Err(format!(
            "the password file {} was ignored: others may read it (mode {mode:04o}, need 0600)",
            path.display()
        )),
        Some((_, text)) => Ok(Some(text)),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn resolve(conninfo: &str, variables: &[(&str, &str)]) -> Result<ConnectOptions> {
        let variables: HashMap<String, String> =
            variables.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        ConnectOptions::resolve(conninfo, Origin::Argument, &|name| variables.get(name).cloned())
    }

    #[test]
    fn the_connection_string_wins_over_the_environment() {
        let options = resolve(
            "postgresql://alice@db1:5433,db2/app",
            &[("PGUSER", "bob"), ("PGHOST", "x"), ("PGAPPNAME", "me"), ("PGCONNECT_TIMEOUT", "1")],
        )
        .unwrap();
        assert_eq!(options.user, "alice");
        assert_eq!(options.dbname, "app");
        assert_eq!(options.application_name, "me");
        assert_eq!(options.connect_timeout, Duration::from_secs(2));
        let hosts: Vec<_> = options.hosts.iter().map(ToString::to_string).collect();
        assert_eq!(hosts, ["db1 port 5433", "db2 port 5432"]);
        let options = resolve("", &[("PGUSER", "bob"), ("PGHOST", "/run/pg"), ("PGPORT", "5439")]).unwrap();
        assert_eq!(options.hosts[0].to_string(), "/run/pg/.s.PGSQL.5439");
        assert_eq!((options.user.as_str(), options.dbname.as_str()), ("bob", "bob"));
    }

    #[test]
    fn lists_of_hosts_are_read_as_libpq_reads_them() {
        for (text, expected) in [
            ("host=a,b port=1", vec!["a port 1", "b port 1"]),
            ("host=a,b port=1,2", vec!["a port 1", "b port 2"]),
            ("host=a,b port=,2", vec!["a port 5432", "b port 2"]),
            ("host=a,,/run port=1,2,3", vec!["a port 1", "the local socket 2", "/run/.s.PGSQL.3"]),
            ("host=a,b hostaddr=127.0.0.1,", vec!["a (127.0.0.1) port 5432", "b port 5432"]),
            ("hostaddr=127.0.0.1,::1 port=7", vec!["127.0.0.1 port 7", "::1 port 7"]),
            ("", vec!["the local socket 5432"]),
        ] {
            let options = resolve(&format!("user=u {text}"), &[]).unwrap();
            let hosts: Vec<_> = options.hosts.iter().map(ToString::to_string).collect();
            assert_eq!(hosts, expected, "{text}");
            assert_eq!(options.load_balance, LoadBalance::Disable);
        }
        let options = resolve("postgresql://u@a:1,b/?load_balance_hosts=random", &[]).unwrap();
        assert_eq!(options.load_balance, LoadBalance::Random);
        let options = resolve("user=u", &[("PGLOADBALANCEHOSTS", "random")]).unwrap();
        assert_eq!(options.load_balance, LoadBalance::Random);
    }

    #[test]
    fn a_password_in_an_argument_is_refused_and_never_shown() {
        for text in ["postgresql://u:hunter2@h", "host=h password=hunter2", "postgresql://h?password=hunter2"]
        {
            let error = resolve(text, &[]).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)) && !error.report().contains("hunter2"));
            assert!(error.next().contains(".pgpass"));
        }
        let options = resolve("user=u", &[("PGPASSWORD", "hunter2")]).unwrap();
        assert_eq!(options.password.as_ref().unwrap().reveal(), "hunter2");
        assert!(!format!("{options:?} {options}").contains("hunter2"));
        assert!(ConnectOptions::resolve("user=u password=x", Origin::Private, &|_| None).is_ok());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for text in [
            "user=u nonsense=1",
            "user=u sslmode=maybe",
            "user=u sslcrl=/x",
            "user=u requirepeer=postgres",
            "user=u gssencmode=require",
            "user=u sslmode=verify-full",
            "user=u sslrootcert=system sslmode=require",
            "user=u port=0",
            "user=u port=x",
            "user=u host=a,b port=1,2,3",
            "user=u host=a,b hostaddr=127.0.0.1",
            "user=u hostaddr=localhost",
            "user=u host=@abstract",
            "user=u target_session_attrs=x",
            "user=u load_balance_hosts=x",
            "user=u hostaddr=127.0.0.1,127.0.0.2 port=1,2,3",
            "user=u connect_timeout=x",
        ] {
            assert!(matches!(resolve(text, &[]), Err(Error::Invalid(_))), "{text}");
        }
        assert_eq!(resolve("user=u sslrootcert=system", &[]).unwrap().sslmode, SslMode::VerifyFull);
    }

    #[test]
    fn require_with_a_root_file_verifies() {
        let home = tempfile::tempdir().unwrap();
        let env = [("HOME", home.path().to_str().unwrap())];
        assert_eq!(resolve("user=u sslmode=require", &env).unwrap().sslmode, SslMode::Require);
        std::fs::create_dir(home.path().join(".postgresql")).unwrap();
        std::fs::write(home.path().join(".postgresql/root.crt"), "").unwrap();
        assert_eq!(resolve("user=u sslmode=require", &env).unwrap().sslmode, SslMode::VerifyCa);
        assert_eq!(resolve("user=u", &env).unwrap().sslmode, SslMode::Prefer);
    }

    #[test]
    fn a_default_list_of_revoked_certificates_is_refused_where_the_server_is_verified() {
        let home = tempfile::tempdir().unwrap();
        let env = [("HOME", home.path().to_str().unwrap())];
        std::fs::create_dir(home.path().join(".postgresql")).unwrap();
        std::fs::write(home.path().join(".postgresql/root.crt"), "").unwrap();
        assert!(resolve("user=u sslmode=verify-full", &env).is_ok());
        std::fs::write(home.path().join(".postgresql/root.crl"), "").unwrap();
        for text in ["user=u sslmode=verify-full", "user=u sslmode=verify-ca", "user=u sslmode=require"] {
            assert!(matches!(resolve(text, &env), Err(Error::Invalid(_))), "{text}");
        }
        for text in ["user=u", "user=u sslmode=disable", "user=u sslrootcert=system"] {
            assert!(resolve(text, &env).is_ok(), "{text}");
        }
    }

    #[test]
    fn sslcertmode_disable_sends_no_certificate() {
        let home = tempfile::tempdir().unwrap();
        let env = [("HOME", home.path().to_str().unwrap())];
        std::fs::create_dir(home.path().join(".postgresql")).unwrap();
        std::fs::write(home.path().join(".postgresql/postgresql.crt"), "").unwrap();
        assert!(resolve("user=u", &env).unwrap().client_cert.is_some());
        for text in ["user=u sslcertmode=disable", "user=u sslcert=/x sslcertmode=disable"] {
            let options = resolve(text, &env).unwrap();
            assert!(options.client_cert.is_none() && options.client_key.is_none(), "{text}");
        }
    }

    #[test]
    fn the_password_file_is_used_only_when_private() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(".pgpass");
        std::fs::write(&path, "h:5432:*:u:secret\nlocalhost:5432:replication:u:local\n").unwrap();
        let env = [("HOME", home.path().to_str().unwrap())];
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let options = resolve("user=u host=h", &env).unwrap();
        assert!(options.password_for(&options.hosts[0], "db").is_none());
        assert!(options.passfile_problem.unwrap().contains("0600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let options = resolve("user=u host=h", &env).unwrap();
        assert_eq!(options.password_for(&options.hosts[0], "db").unwrap().reveal(), "secret");
        let options = resolve("user=u", &env).unwrap();
        assert_eq!(options.password_for(&options.hosts[0], "replication").unwrap().reveal(), "local");
        assert!(options.password_for(&options.hosts[0], "db").is_none());
    }

    #[test]
    fn a_service_fills_what_the_string_leaves_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("services");
        std::fs::write(&path, "[main]\nhost=db7\nport=5440\nuser=carol\n").unwrap();
        let env = [("PGSERVICEFILE", path.to_str().unwrap()), ("PGUSER", "bob")];
        let options = resolve("service=main port=5441", &env).unwrap();
        assert_eq!(options.to_string(), "user carol at db7 port 5441");
        assert!(resolve("service=other", &env).is_err());
    }
}
