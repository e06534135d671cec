//! Which server to talk to: the hosts in their order, their addresses, ways of encryption, and whether
//! the one that answers is of the wanted kind.
//!
//! What is said once a stream is open is for [`super::connection`].
//! Source: `src/interfaces/libpq/fe-connect.c`, PQconnectPoll.

use std::io;
use std::net::SocketAddr;

use bytes::BytesMut;
use nix::sys::socket::{setsockopt, sockopt};
use postgres_protocol::message::frontend;
use rand::seq::SliceRandom as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::connection::{Connection, SessionKind, Stream, broken, start};
use super::options::{ConnectOptions, Host, Keepalive, LoadBalance, SslMode, TargetSession};
use super::server_error::ServerError;
use super::tls;
use crate::error::{Error, Result};

/// The most addresses of one host that are tried.
const ADDRESSES_MAX: usize = 16;

/// Returns a session with the first host that answers and is of the wanted kind.
pub(super) async fn reach(options: &ConnectOptions, kind: SessionKind) -> Result<Connection> {
    let mut hosts: Vec<&Host> = options.hosts.iter().collect();
    if options.load_balance == LoadBalance::Random {
        hosts.shuffle(&mut rand::rng());
    }
    let passes: &[TargetSession] = match options.target_session {
        TargetSession::PreferStandby => &[TargetSession::Standby, TargetSession::Any],
        ref other => std::slice::from_ref(other),
    };
    let mut failures = Vec::new();
    for target in passes {
        failures.clear();
        for host in &hosts {
            let found = match connect_host(options, host, kind).await {
                Ok(connection) => check_target(connection, *target).await,
                Err(error) => Err(error),
            };
            match found {
                Ok(connection) => return Ok(connection),
                Err(error) if error.is_transient() => failures.push(error),
                Err(error) => return Err(error),
            }
        }
    }
    Err(all_failed(failures))
}

/// Says why each of several hosts would not do.
fn all_failed(mut failures: Vec<Error>) -> Error {
    let Some(last) = failures.pop() else { return Error::invalid("no host is given") };
    if failures.is_empty() {
        return last;
    }
    let each: Vec<String> = failures.iter().chain([&last]).map(ToString::to_string).collect();
    Error::unavailable(format!("none of {} hosts will do: {}", each.len(), each.join("; ")))
        .with_safe(last.safe())
        .with_next(last.next())
}

/// Returns the session if its server is of the wanted kind.
async fn check_target(mut connection: Connection, target: TargetSession) -> Result<Connection> {
    let wrong = match target {
        TargetSession::Any | TargetSession::PreferStandby => None,
        TargetSession::ReadWrite => is_read_only(&mut connection).await?.then_some("is read-only"),
        TargetSession::ReadOnly => (!is_read_only(&mut connection).await?).then_some("accepts writes"),
        TargetSession::Primary => is_standby(&mut connection).await?.then_some("is a standby"),
        TargetSession::Standby => (!is_standby(&mut connection).await?).then_some("is not a standby"),
    };
    let Some(why) = wrong else { return Ok(connection) };
    let error = Error::unavailable(format!(
        "{} {why}, and target_session_attrs={target} is asked for",
        connection.host()
    ))
    .with_next("Name all hosts of the cluster, or change target_session_attrs.");
    connection.close().await;
    Err(error)
}

/// Every version that we work with reports this by itself, in replication sessions too; who stands between may
/// not pass it on.
async fn is_standby(connection: &mut Connection) -> Result<bool> {
    if let Some(value) = connection.parameter("in_hot_standby") {
        return Ok(value == "on");
    }
    connection.server_version()?;
    if connection.kind() == SessionKind::Replication {
        return Err(Error::mismatch(format!(
            "{} does not say whether it is a standby, as every PostgreSQL since 14 does",
            connection.host()
        ))
        .with_next("Name the server itself, not a pooler in front of it."));
    }
    let rows = connection.query("SELECT pg_catalog.pg_is_in_recovery()").await?;
    Ok(rows.get(0, 0) == Some("t"))
}

async fn is_read_only(connection: &mut Connection) -> Result<bool> {
    let reported = |name: &str| connection.parameter(name).map(|value| value == "on");
    if let (Some(by_default), Some(standby)) =
        (reported("default_transaction_read_only"), reported("in_hot_standby"))
    {
        return Ok(by_default || standby);
    }
    connection.server_version()?;
    let rows = connection.query("SHOW transaction_read_only").await?;
    Ok(rows.get(0, 0) == Some("on"))
}

/// How one attempt treats TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Plain,
    TlsIfOffered,
    Tls,
}

/// Connects to one host: every address it has, each with a time limit of its own.
async fn connect_host(options: &ConnectOptions, host: &Host, kind: SessionKind) -> Result<Connection> {
    if let Some(folders) = host.socket_folders() {
        return in_time(options, host.to_string(), async {
            let stream = connect_unix(host, &folders).await?;
            start(options, host, kind, Stream::Unix(stream)).await
        })
        .await;
    }
    let mut addresses = in_time(options, host.to_string(), resolve(host)).await?;
    if options.load_balance == LoadBalance::Random {
        addresses.shuffle(&mut rand::rng());
    }
    connect_addresses(options, host, kind, &addresses).await
}

async fn connect_addresses(
    options: &ConnectOptions,
    host: &Host,
    kind: SessionKind,
    addresses: &[SocketAddr],
) -> Result<Connection> {
    let mut last = None;
    for address in addresses {
        let name = match addresses {
            [_] => host.to_string(),
            _ => format!("{host} ({address})"),
        };
        match in_time(options, name, connect_address(options, host, kind, *address)).await {
            Ok(connection) => return Ok(connection),
            Err(error) if error.is_transient() => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::unavailable(format!("{host} has no address"))))
}

async fn in_time<T>(
    options: &ConnectOptions,
    who: String,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let limit = options.connect_timeout;
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::unavailable(format!("{who} did not answer within {} s", limit.as_secs())).with_next(
            "Check the host's name, its port and the firewall between; connect_timeout is the limit.",
        ))
    })
}

/// Connects to one address in every way of encryption that `sslmode` allows.
async fn connect_address(
    options: &ConnectOptions,
    host: &Host,
    kind: SessionKind,
    address: SocketAddr,
) -> Result<Connection> {
    let (first, second) = match options.sslmode {
        SslMode::Disable => (Wish::Plain, None),
        SslMode::Allow => (Wish::Plain, Some(Wish::Tls)),
        SslMode::Prefer => (Wish::TlsIfOffered, Some(Wish::Plain)),
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => (Wish::Tls, None),
    };
    match (connect_tcp(options, host, kind, address, first).await, second) {
        (Err(Failure { other_wish_may_help: true, .. }), Some(second)) => {
            connect_tcp(options, host, kind, address, second).await
        }
        (outcome, _) => outcome,
    }
    .map_err(|failure| failure.error)
}

struct Failure {
    error: Error,
    /// Whether the same server may let us in with the other way of encryption.
    other_wish_may_help: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        // "No pg_hba.conf entry": the entry may be one for the other kind of connection.
        let other_wish_may_help = ServerError::of(&error).is_some_and(|said| said.code == "28000");
        Self { error, other_wish_may_help }
    }
}

async fn connect_tcp(
    options: &ConnectOptions,
    host: &Host,
    kind: SessionKind,
    address: SocketAddr,
    wish: Wish,
) -> std::result::Result<Connection, Failure> {
    let mut socket = TcpStream::connect(address)
        .await
        .map_err(|error| Error::unavailable(format!("{host} ({address}) cannot be reached: {error}")))?;
    socket.set_nodelay(true).map_err(|error| broken(host, &error))?;
    if let Some(keepalive) = options.keepalive {
        set_keepalive(&socket, keepalive).map_err(|error| broken(host, &error.into()))?;
    }
    if wish == Wish::Plain || !tls_offered(host, &mut socket).await? {
        if wish == Wish::Tls {
            return Err(Failure {
                error: Error::denied(format!(
                    "{host} offers no TLS, and sslmode={} needs it",
                    options.sslmode
                ))
                .with_safe("no password was sent")
                .with_next("Switch ssl on at the server, or choose another sslmode."),
                other_wish_may_help: false,
            });
        }
        return Ok(start(options, host, kind, Stream::Tcp(socket)).await?);
    }
    let stream = tls::handshake(options, host, socket)
        .await
        .map_err(|error| Failure { error, other_wish_may_help: true })?;
    Ok(start(options, host, kind, Stream::Tls(Box::new(stream))).await?)
}

/// Asks whether the server speaks TLS. One byte is read and no more, so that nothing sent in clear
/// can be taken for part of the encrypted session.
async fn tls_offered(host: &Host, socket: &mut TcpStream) -> Result<bool> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await.map_err(|error| broken(host, &error))?;
    match socket.read_u8().await.map_err(|error| broken(host, &error))? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        b'E' => Err(Error::unavailable(format!("{host} failed when it was asked for TLS"))
            .with_next("See the server's log: it may be out of processes or memory.")),
        _ => Err(Error::mismatch(format!("{host} does not speak PostgreSQL's protocol"))
            .with_next("Check that host and port are those of a PostgreSQL server.")),
    }
}

fn set_keepalive(socket: &TcpStream, keepalive: Keepalive) -> nix::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    if let Some(idle) = keepalive.idle {
        setsockopt(socket, sockopt::TcpKeepIdle, &idle)?;
    }
    if let Some(interval) = keepalive.interval {
        setsockopt(socket, sockopt::TcpKeepInterval, &interval)?;
    }
    if let Some(count) = keepalive.count {
        setsockopt(socket, sockopt::TcpKeepCount, &count)?;
    }
    Ok(())
}

async fn connect_unix(host: &Host, folders: &[std::path::PathBuf]) -> Result<UnixStream> {
    let mut last = None;
    for folder in folders {
        let path = folder.join(format!(".s.PGSQL.{}", host.port));
        match UnixStream::connect(&path).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Error::from_io(format!("the socket {}", path.display()), error));
            }
            Err(error) => {
                let error =
                    Error::unavailable(format!("the socket {} cannot be reached: {error}", path.display()))
                        .with_next("Check that the server runs, and its unix_socket_directories and port.");
                // The first folder's answer is the interesting one unless there was no socket at all.
                last.get_or_insert(error);
            }
        }
    }
    Err(last.unwrap_or_else(|| Error::invalid("no socket folder is known")))
}

async fn resolve(host: &Host) -> Result<Vec<SocketAddr>> {
    if let Some(address) = host.address {
        return Ok(vec![SocketAddr::new(address, host.port)]);
    }
    let found = tokio::net::lookup_host((host.name.as_str(), host.port)).await.map_err(|error| {
        Error::unavailable(format!("the host name {:?} cannot be resolved: {error}", host.name))
            .with_next("Check the host's name and this machine's name service.")
    })?;
    Ok(found.take(ADDRESSES_MAX).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::BufMut as _;
    use tokio::net::TcpListener;

    use super::*;
    use crate::replication::options::Origin;

    fn options(conninfo: &str) -> ConnectOptions {
        ConnectOptions::resolve(conninfo, Origin::Argument, &|_| None).unwrap()
    }

    /// A server that lets everyone in, reports these parameters, and answers every query with `answer`.
    async fn serve(listener: TcpListener, parameters: &'static [(&str, &str)], answer: &'static str) {
        let message = |kind: u8, body: &[u8]| {
            let mut bytes = vec![kind];
            bytes.put_u32(4 + u32::try_from(body.len()).unwrap());
            bytes.extend_from_slice(body);
            bytes
        };
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let length = socket.read_u32().await.unwrap() as usize;
            socket.read_exact(&mut vec![0; length - 4]).await.unwrap();
            let mut hello = message(b'R', &[0; 4]);
            for (name, value) in parameters {
                hello.extend(message(b'S', format!("{name}\0{value}\0").as_bytes()));
            }
            hello.extend(message(b'Z', b"I"));
            socket.write_all(&hello).await.unwrap();
            while socket.read_u8().await.is_ok_and(|kind| kind == b'Q') {
                let length = socket.read_u32().await.unwrap() as usize;
                socket.read_exact(&mut vec![0; length - 4]).await.unwrap();
                let mut column = b"\0\x01a\0".to_vec();
                column.extend([0; 18]);
                let mut row = vec![0, 1];
                row.put_u32(u32::try_from(answer.len()).unwrap());
                row.extend_from_slice(answer.as_bytes());
                let mut said = message(b'T', &column);
                said.extend(message(b'D', &row));
                said.extend(message(b'C', b"SHOW\0"));
                said.extend(message(b'Z', b"I"));
                socket.write_all(&said).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn an_address_that_is_silent_leaves_the_next_one_its_own_time() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [silent.local_addr().unwrap(), good.local_addr().unwrap()];
        tokio::spawn(serve(good, &[("server_version", "18.1")], ""));
        let mut options = options("user=u host=db sslmode=disable");
        options.connect_timeout = Duration::from_secs(2);
        let host = &options.hosts[0];
        let found = connect_addresses(&options, host, SessionKind::Ordinary, &addresses).await.unwrap();
        assert_eq!(found.parameter("server_version"), Some("18.1"));
        let error =
            connect_addresses(&options, host, SessionKind::Ordinary, &addresses[..1]).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("2 s"), "{error}");
    }

    /// Asks for a kind of server through someone who passes nothing on; says what came of it.
    async fn through_a_pooler(version: &'static [(&str, &str)], answer: &'static str, how: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(serve(listener, version, answer));
        let (kind, target) = how.split_once(' ').unwrap();
        let kind = if kind == "replication" { SessionKind::Replication } else { SessionKind::Ordinary };
        let text = format!("user=u host=127.0.0.1 port={port} sslmode=disable target_session_attrs={target}");
        reach(&options(&text), kind).await.map_or_else(|error| error.to_string(), |_| "taken".to_owned())
    }

    #[tokio::test]
    async fn what_is_not_reported_is_asked_for_and_never_guessed() {
        const NEW: &[(&str, &str)] = &[("server_version", "16.2")];
        for (answer, how, expected) in [
            ("t", "ordinary primary", "is a standby"),
            ("f", "ordinary primary", "taken"),
            ("t", "ordinary standby", "taken"),
            ("on", "ordinary read-write", "is read-only"),
            ("off", "replication read-write", "taken"),
            ("on", "replication read-only", "taken"),
            ("f", "replication primary", "does not say whether it is a standby"),
            ("f", "replication any", "taken"),
        ] {
            let came = through_a_pooler(NEW, answer, how).await;
            assert!(came.contains(expected), "{how}, {answer}: {came}");
        }
        const OLD: &[(&str, &str)] = &[("server_version", "13.9")];
        for how in ["replication primary", "ordinary read-write"] {
            let came = through_a_pooler(OLD, "f", how).await;
            assert!(came.contains("PostgreSQL 13.9; walship works with 14"), "{how}: {came}");
        }
    }

    #[tokio::test]
    async fn why_each_host_will_not_do_is_said() {
        let closed = |listener: TcpListener| listener.local_addr().unwrap().port();
        let first = closed(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let second = closed(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let text = format!("user=u host=127.0.0.1,127.0.0.1 port={first},{second}");
        for extra in ["", " load_balance_hosts=random", " target_session_attrs=prefer-standby"] {
            let error = reach(&options(&(text.clone() + extra)), SessionKind::Ordinary).await.unwrap_err();
            let said = error.to_string();
            assert!(error.is_transient() && said.contains("none of 2 hosts will do"), "{said}");
            for port in [first, second] {
                assert_eq!(said.matches(&format!("port {port} ")).count(), 1, "{said}");
            }
        }
    }
}
