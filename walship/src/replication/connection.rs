//! One session with a server: proving who we are, simple queries. Which server that is, `reach` finds out.
//!
//! Source: PostgreSQL documentation, "Frontend/Backend Protocol"; `src/interfaces/libpq/fe-connect.c`.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::buffers::Buffers;
use super::message::{self, BackendMessage, MAX_BYTES, MAX_BYTES_STARTUP};
use super::options::{ChannelBinding, ConnectOptions, Host};
use super::server_error::ServerError;
use super::{reach, tls};
use crate::error::{Error, Result};

/// The major versions that walship works with.
pub const SUPPORTED_MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// The most bytes of rows that one query may return.
const MAX_ROWS_BYTES: usize = 64 << 20;

/// How long to wait for what a server that has closed the connection may have said before.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The most notices that are kept of one session.
const MAX_NOTICES: usize = 1000;

/// What kind of session to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionKind {
    /// A physical replication session: `BASE_BACKUP`, `START_REPLICATION`, `SHOW`, no SQL.
    Replication,
    /// An ordinary session in the database of the options.
    Ordinary,
}

/// The rows of a query, in text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    /// The columns' names.
    pub columns: Vec<String>,
    /// The rows; `None` is NULL.
    pub rows: Vec<Vec<Option<String>>>,
}

impl Rows {
    /// Returns the value in the row and column with these numbers; `None` for NULL or no such place.
    pub fn get(&self, row: usize, column: usize) -> Option<&str> {
        self.rows.get(row)?.get(column)?.as_deref()
    }
}

pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// A session with a server.
///
/// # Cancel safety
/// Dropping a future of [`Connection::query`] leaves the session in the middle of an answer: drop
/// the connection too.
pub struct Connection {
    stream: Stream,
    buffer: BytesMut,
    buffers: Buffers,
    limit: usize,
    parameters: BTreeMap<String, String>,
    notices: Vec<ServerError>,
    host: Host,
    kind: SessionKind,
    command_timeout: Duration,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("host", &self.host)
            .field("kind", &self.kind)
            .field("tls", &self.is_tls())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Returns a session with the first host that answers and is of the wanted kind.
    ///
    /// Each address of a host may take [`ConnectOptions::connect_timeout`]. A host that refuses us (wrong
    /// password, no pg_hba.conf entry) ends the search: the others would hardly differ.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when no host answers or none is of the wanted kind (with each one's
    /// reason), [`Error::Denied`] when one refuses, [`Error::Invalid`] for options that make no sense.
    pub async fn connect(options: &ConnectOptions, kind: SessionKind) -> Result<Self> {
        reach::reach(options, kind).await
    }

    /// Returns the kind of the session.
    pub(super) fn kind(&self) -> SessionKind {
        self.kind
    }

    /// Returns the host that answered.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Returns whether the session is encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }

    /// Returns whether the server was in recovery when the session began (or said so since).
    pub fn is_standby(&self) -> bool {
        self.parameter("in_hot_standby") == Some("on")
    }

    /// Returns a setting that the server reports on its own, such as `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Returns `server_version_num`: 150018 for 15.18.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the server's version is none of [`SUPPORTED_MAJORS`].
    pub fn server_version(&self) -> Result<u32> {
        let text = self.parameter("server_version").unwrap_or_default();
        let number = version_number(text)
            .ok_or_else(|| Error::mismatch(format!("the server's version {text:?} is not understood")))?;
        if !SUPPORTED_MAJORS.contains(&(number / 10_000)) {
            return Err(Error::mismatch(format!(
                "{} is PostgreSQL {text}; walship works with {} to {}",
                self.host,
                SUPPORTED_MAJORS.start(),
                SUPPORTED_MAJORS.end()
            ))
            .with_next("Upgrade PostgreSQL, or use a walship release that knows this version."));
        }
        Ok(number)
    }

    /// Returns the notices (warnings) of the session so far, and forgets them.
    pub fn take_notices(&mut self) -> Vec<ServerError> {
        std::mem::take(&mut self.notices)
    }

    /// Returns the rows of the last statement in `sql`, within the options' command timeout.
    ///
    /// # Errors
    /// What the server says, classed as in [`ServerError::into_error`]; the session stays usable
    /// unless that was fatal. [`Error::Unavailable`] when the connection breaks or the time is up.
    pub async fn query(&mut self, sql: &str) -> Result<Rows> {
        let limit = self.command_timeout;
        match timeout(limit, self.query_unbounded(sql)).await {
            Ok(rows) => rows,
            Err(_) => Err(Error::unavailable(format!(
                "{} did not answer a command within {} s",
                self.host,
                limit.as_secs()
            ))),
        }
    }

    async fn query_unbounded(&mut self, sql: &str) -> Result<Rows> {
        if let Err(error) = self.send_query(sql).await {
            return Err(self.last_words(sql).await.unwrap_or(error));
        }
        let mut rows = Rows::default();
        let mut bytes = 0;
        let mut failure = None;
        loop {
            match self.next_message(self.command_timeout).await? {
                BackendMessage::RowDescription(columns) => rows = Rows { columns, rows: Vec::new() },
                BackendMessage::DataRow(row) => {
                    bytes += row.iter().flatten().map(|text| text.len() + 24).sum::<usize>();
                    if bytes > MAX_ROWS_BYTES {
                        return Err(Error::corrupt(format!(
                            "{} sends more rows than can be held",
                            self.host
                        )));
                    }
                    rows.rows.push(row);
                }
                BackendMessage::Error(error) => {
                    let fatal = matches!(error.severity.as_str(), "FATAL" | "PANIC");
                    let error = error.into_error(&format!("{:?} on {}", shorten(sql), self.host));
                    if fatal {
                        return Err(error);
                    }
                    failure = Some(error);
                }
                BackendMessage::ReadyForQuery => {
                    return match failure {
                        None => Ok(rows),
                        Some(error) => Err(error),
                    };
                }
                BackendMessage::CopyBoth | BackendMessage::CopyOut | BackendMessage::CopyIn => {
                    return Err(Error::invalid(format!("{:?} is no plain query", shorten(sql))));
                }
                _ => {}
            }
        }
    }

    /// Returns why the server has ended the session, where it said so before it closed the connection.
    async fn last_words(&mut self, sql: &str) -> Option<Error> {
        loop {
            match self.next_message(LAST_WORDS).await {
                Ok(BackendMessage::Error(error)) => {
                    return Some(error.into_error(&format!("{:?} on {}", shorten(sql), self.host)));
                }
                Ok(_) => {}
                Err(error) => return ServerError::of(&error).is_some().then_some(error),
            }
        }
    }

    /// Ends the session politely; a failure to do so does not matter.
    pub async fn close(mut self) {
        let mut bytes = BytesMut::new();
        frontend::terminate(&mut bytes);
        let _ = timeout(Duration::from_secs(5), async {
            let _ = self.stream.write_all(&bytes).await;
            let _ = self.stream.shutdown().await;
        })
        .await;
    }

    pub(crate) async fn send_query(&mut self, sql: &str) -> Result<()> {
        let mut bytes = BytesMut::new();
        message::query(sql, &mut bytes)?;
        self.send(&bytes).await
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let host = &self.host;
        let broken = |error: io::Error| broken(host, &error);
        let sent = timeout(self.command_timeout, async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        });
        match sent.await {
            Ok(sent) => sent.map_err(broken),
            Err(_) => Err(Error::unavailable(format!("{host} does not read what it is sent"))),
        }
    }

    /// Returns the next message, having noted parameters and notices; waits at most `patience`
    /// between two arrivals of bytes.
    pub(crate) async fn next_message(&mut self, patience: Duration) -> Result<BackendMessage> {
        loop {
            let decoded = message::decode(&mut self.buffer, self.limit).map_err(|error| {
                Error::corrupt(format!("{} does not speak PostgreSQL's protocol: {error}", self.host))
                    .with_next("Check that host and port are those of a PostgreSQL server.")
            })?;
            match decoded {
                Some(BackendMessage::ParameterStatus(name, value)) => {
                    if self.parameters.len() < 1000 {
                        self.parameters.insert(name, value);
                    }
                }
                Some(BackendMessage::Notice(notice)) => {
                    tracing::debug!("{}: {notice}", self.host);
                    if self.notices.len() < MAX_NOTICES {
                        self.notices.push(notice);
                    }
                }
                Some(message) => return Ok(message),
                None => self.read_more(patience).await?,
            }
        }
    }

    async fn read_more(&mut self, patience: Duration) -> Result<()> {
        let missing = message::missing(&self.buffer);
        self.buffers.make_room(&mut self.buffer, missing);
        match timeout(patience, self.stream.read_buf(&mut self.buffer)).await {
            Ok(Ok(0)) => Err(self.announced_end().unwrap_or_else(|| {
                Error::unavailable(format!("{} closed the connection without a word", self.host))
                    .with_next("See the server's log; try again when it is up.")
            })),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.announced_end().unwrap_or_else(|| broken(&self.host, &error))),
            Err(_) => {
                Err(Error::unavailable(format!("{} has been silent for {} s", self.host, patience.as_secs())))
            }
        }
    }
}

impl Connection {
    /// Returns why the session has ended, where a warning said so: at an immediate shutdown, and after a crash.
    ///
    /// Source: `src/backend/tcop/postgres.c`, quickdie.
    fn announced_end(&mut self) -> Option<Error> {
        let warning = self.notices.pop_if(|last| last.code.starts_with("57P"))?;
        Some(warning.into_error(&format!("the session with {}", self.host)))
    }
}

pub(super) fn broken(host: &Host, error: &io::Error) -> Error {
    Error::unavailable(format!("the connection to {host} broke: {error}"))
}

fn shorten(sql: &str) -> String {
    match sql.char_indices().nth(60) {
        Some((cut, _)) => format!("{}...", &sql[..cut]),
        None => sql.to_owned(),
    }
}

/// Returns the number for `15.18 (Debian ...)`, `19beta1`.
fn version_number(text: &str) -> Option<u32> {
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    let major = digits(text);
    let minor = text[major.len()..].strip_prefix('.').map(digits).unwrap_or_default();
    let minor = if minor.is_empty() { 0 } else { minor.parse().ok().filter(|minor| *minor < 10_000)? };
    major.parse::<u32>().ok().filter(|major| (1..1000).contains(major)).map(|major| major * 10_000 + minor)
}

/// Starts the session on an open stream: startup packet, authentication, parameters.
pub(super) async fn start(
    options: &ConnectOptions,
    host: &Host,
    kind: SessionKind,
    stream: Stream,
) -> Result<Connection> {
    let mut connection = Connection {
        stream,
        buffer: BytesMut::new(),
        buffers: Buffers::default(),
        limit: MAX_BYTES_STARTUP,
        parameters: BTreeMap::new(),
        notices: Vec::new(),
        host: host.clone(),
        kind,
        command_timeout: options.command_timeout,
    };
    let mut parameters = vec![
        ("user", options.user.as_str()),
        ("client_encoding", "UTF8"),
        ("application_name", options.application_name.as_str()),
        // Texts that we parse must not depend on the server's settings.
        ("DateStyle", "ISO"),
        ("TimeZone", "UTC"),
    ];
    match kind {
        SessionKind::Replication => parameters.push(("replication", "true")),
        SessionKind::Ordinary => parameters.push(("database", options.dbname.as_str())),
    }
    if let Some(session_options) = &options.session_options {
        parameters.push(("options", session_options));
    }
    let mut bytes = BytesMut::new();
    frontend::startup_message(parameters, &mut bytes)
        .map_err(|_| Error::invalid("a connection parameter holds a zero byte"))?;
    connection.send(&bytes).await?;
    connection.authenticate(options).await?;
    connection.limit = MAX_BYTES;
    loop {
        match connection.next_message(options.connect_timeout).await? {
            BackendMessage::ReadyForQuery => return Ok(connection),
            BackendMessage::Error(error) => {
                return Err(error.into_error(&format!("connecting to {host} as {}", options.user)));
            }
            _ => {}
        }
    }
}

impl Connection {
    async fn authenticate(&mut self, options: &ConnectOptions) -> Result<()> {
        let database = match self.kind {
            SessionKind::Replication => "replication",
            SessionKind::Ordinary => options.dbname.as_str(),
        };
        let host = self.host.clone();
        let password = options.password_for(&host, database);
        let mut bound = false;
        loop {
            let message = self.next_message(options.connect_timeout).await?;
            let mut answer = BytesMut::new();
            let needed = || {
                password.as_ref().map(|password| password.reveal().as_bytes()).ok_or_else(|| {
                    let error = Error::denied(format!(
                        "{host} asks for the password of {}, and none is known",
                        options.user
                    ));
                    match &options.passfile_problem {
                        Some(problem) => error.with_next(format!("Note: {problem}.")),
                        None => error.with_next("Put it into ~/.pgpass (mode 0600) or PGPASSWORD."),
                    }
                })
            };
            match message {
                BackendMessage::AuthenticationOk if options.channel_binding == ChannelBinding::Require && !bound => {
                    return Err(no_binding(&host));
                }
                BackendMessage::AuthenticationOk => return Ok(()),
                BackendMessage::Sasl(mechanisms) => {
                    bound = self.scram(options, &mechanisms, needed()?).await?;
                    continue;
                }
                _ if options.channel_binding == ChannelBinding::Require
                    && !matches!(message, BackendMessage::Error(_)) =>
                {
                    return Err(no_binding(&host));
                }
                BackendMessage::CleartextPassword => {
                    let protected = self.is_tls() || matches!(self.stream, Stream::Unix(_));
                    if !protected && !options.allow_cleartext {
                        return Err(Error::denied(format!(
                            "{host} wants the password in clear over an unencrypted connection"
                        ))
                        .with_safe("no password was sent")
                        .with_next("Use sslmode=require or better, or let the server ask for scram-sha-256."));
                    }
                    frontend::password_message(needed()?, &mut answer)
                }
                BackendMessage::Md5Password(salt) => {
                    if !options.allow_md5 {
                        return Err(Error::denied(format!(
                            "{host} wants MD5 authentication, which can be broken by whoever listens"
                        ))
                        .with_safe("no password was sent")
                        .with_next(
                            "Set password_encryption = 'scram-sha-256' and the password anew; or add walship_allow_md5=1 to the connection string.",
                        ));
                    }
                    let digest = md5_hash(options.user.as_bytes(), needed()?, salt);
                    frontend::password_message(digest.as_bytes(), &mut answer)
                }
                BackendMessage::UnsupportedAuthentication(name) => {
                    return Err(Error::denied(format!("{host} wants {name} authentication, which walship does not speak"))
                        .with_next("Let pg_hba.conf ask this user for scram-sha-256 or a client certificate."));
                }
                BackendMessage::Error(error) => {
                    return Err(error.into_error(&format!("connecting to {host} as {}", options.user)));
                }
                _ => continue,
            }
            .map_err(|_| Error::invalid("the password holds a zero byte"))?;
            self.send(&answer).await?;
        }
    }

    /// Carries out SCRAM and returns whether it was bound to the TLS channel.
    async fn scram(
        &mut self,
        options: &ConnectOptions,
        mechanisms: &[String],
        password: &[u8],
    ) -> Result<bool> {
        let offers = |name: &str| mechanisms.iter().any(|offered| offered == name);
        let end_point = match &self.stream {
            Stream::Tls(stream) if options.channel_binding != ChannelBinding::Disable => {
                let (_, session) = stream.get_ref();
                session.peer_certificates().and_then(|certs| tls::server_end_point(certs.first()?))
            }
            _ => None,
        };
        let host = self.host.clone();
        let (mechanism, binding, bound) = match end_point {
            Some(end_point) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(end_point), true)
            }
            _ if options.channel_binding == ChannelBinding::Require => return Err(no_binding(&host)),
            // "We could have, you did not offer": the server notices when somebody removed its offer.
            Some(_) if offers(sasl::SCRAM_SHA_256) => {
                (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested(), false)
            }
            None if offers(sasl::SCRAM_SHA_256) => {
                (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported(), false)
            }
            _ => {
                return Err(Error::denied(format!(
                    "{host} offers none of the SASL mechanisms that walship speaks: {}",
                    mechanisms.join(", ")
                ))
                .with_next("Let pg_hba.conf ask this user for scram-sha-256."));
            }
        };
        let bad = |error: io::Error| {
            Error::denied(format!("SCRAM with {host} failed: {error}")).with_next(
                "Check that this is the right server: it does not prove that it knows the password.",
            )
        };
        let mut scram = sasl::ScramSha256::new(password, binding);
        let mut answer = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut answer).map_err(bad)?;
        self.send(&answer).await?;
        let data = self.sasl_step(options, SaslStep::Continue).await?;
        scram.update(&data).map_err(bad)?;
        let mut answer = BytesMut::new();
        frontend::sasl_response(scram.message(), &mut answer).map_err(bad)?;
        self.send(&answer).await?;
        let data = self.sasl_step(options, SaslStep::Final).await?;
        scram.finish(&data).map_err(bad)?;
        Ok(bound)
    }

    /// Waits for the server's next SASL message; anything else, "you are in" above all, is refused.
    async fn sasl_step(&mut self, options: &ConnectOptions, step: SaslStep) -> Result<bytes::Bytes> {
        match (self.next_message(options.connect_timeout).await?, step) {
            (BackendMessage::SaslContinue(data), SaslStep::Continue)
            | (BackendMessage::SaslFinal(data), SaslStep::Final) => Ok(data),
            (BackendMessage::Error(error), _) => {
                Err(error.into_error(&format!("connecting to {} as {}", self.host, options.user)))
            }
            _ => Err(Error::denied(format!("{} broke off SCRAM authentication", self.host)).with_next(
                "Check that this is the right server: it did not prove that it knows the password.",
            )),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum SaslStep {
    Continue,
    Final,
}

fn no_binding(host: &Host) -> Error {
    Error::denied(format!("{host} does not authenticate with channel binding, and channel_binding=require"))
        .with_safe("no password was sent")
        .with_next("Use TLS and scram-sha-256 on the server, or channel_binding=prefer.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_servers_write_them() {
        for (text, number) in [
            ("15.18 (Debian 15.18-0+deb12u1)", Some(150_018)),
            ("14.0", Some(140_000)),
            ("18beta2", Some(180_000)),
            ("17.10", Some(170_010)),
            ("", None),
            ("x", None),
            ("99999999999.1", None),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
    }
}
