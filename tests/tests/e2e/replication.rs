//! The replication client against real servers: every way to reach one and to be let in.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use walship::Error;
use walship::pg::TimelineId;
use walship::replication::options::SslMode;
use walship::replication::{
    ConnectOptions, Connection, Origin, ServerError, SessionKind, SlotLifetime, create_slot, identify_system,
    show,
};
use walship_tests::postgres::{PgServer, StopMode, majors, primary_major};
use walship_tests::process;

use super::receive::standby_of;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Resolves with nothing but these variables: the developer's own environment stays out.
fn options_with(conninfo: &str, variables: &[(&str, &str)]) -> ConnectOptions {
    let find =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    ConnectOptions::resolve(conninfo, Origin::Argument, &find).unwrap()
}

fn connect(options: &ConnectOptions, kind: SessionKind) -> Result<Connection, Error> {
    runtime().block_on(Connection::connect(options, kind))
}

fn private_file(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn sessions_over_tcp_and_unix_sockets_identify_query_and_reserve() {
    for major in majors() {
        let server = PgServer::builder(major).start();
        runtime().block_on(async {
            for conninfo in [server.uri(), server.socket_conninfo()] {
                let options = options_with(&conninfo, &[]);
                let mut session = Connection::connect(&options, SessionKind::Ordinary).await.unwrap();
                assert_eq!(session.server_version().unwrap() / 10_000, major);
                let rows = session.query("SELECT 1 AS one, NULL AS two, 'drei' AS three").await.unwrap();
                assert_eq!(rows.columns, ["one", "two", "three"]);
                assert_eq!(rows.rows, [[Some("1".to_owned()), None, Some("drei".to_owned())]]);
                let error = session.query("SELECT nothing FROM nowhere").await.unwrap_err();
                assert_eq!(ServerError::of(&error).unwrap().code, "42P01");
                let again = session.query("SELECT system_identifier FROM pg_control_system()").await.unwrap();
                let expected: u64 = again.get(0, 0).unwrap().parse().unwrap();
                session.close().await;

                let mut session = Connection::connect(&options, SessionKind::Replication).await.unwrap();
                let identity = identify_system(&mut session).await.unwrap();
                assert_eq!(identity.system_identifier, expected);
                assert_eq!(identity.timeline, TimelineId::FIRST);
                assert_eq!(show(&mut session, "wal_level").await.unwrap(), "replica");
                create_slot(&mut session, "walship_test", SlotLifetime::Temporary).await.unwrap();
                assert_eq!(
                    server.psql("SELECT temporary, restart_lsn IS NOT NULL FROM pg_replication_slots"),
                    "t|t"
                );
                let taken = create_slot(&mut session, "walship_test", SlotLifetime::Temporary).await;
                assert!(matches!(taken, Err(Error::Conflict(_))), "{taken:?}");
                session.close().await;
            }
        });
    }
}

#[test]
fn passwords_are_proven_by_scram_and_md5_is_refused_unless_allowed() {
    let server = PgServer::builder(primary_major())
        .hba_line("host replication,all scram_user 127.0.0.1/32 scram-sha-256")
        .hba_line("host replication,all md5_user 127.0.0.1/32 md5")
        .hba_line("host all clear_user 127.0.0.1/32 password")
        .hba_line("local all clear_user password")
        .hba_line("host all barred_user 127.0.0.1/32 reject")
        .start();
    server.psql(
        "CREATE ROLE scram_user LOGIN REPLICATION PASSWORD 'gehe:im\\';
         CREATE ROLE plain_user LOGIN;
         CREATE ROLE clear_user LOGIN PASSWORD 'klar';
         CREATE ROLE barred_user LOGIN;
         SET password_encryption = 'md5';
         CREATE ROLE md5_user LOGIN REPLICATION PASSWORD 'alt'",
    );
    let home = TempDir::new().unwrap();
    let port = server.port();
    private_file(
        &home.path().join(".pgpass"),
        &format!("127.0.0.1:{port}:*:scram_user:gehe\\:im\\\\\n*:*:*:md5_user:alt\n"),
    );
    let home_env = ("HOME", home.path().to_str().unwrap());
    let uri = |user: &str| format!("postgresql://{user}@127.0.0.1:{port}/postgres");

    for kind in [SessionKind::Ordinary, SessionKind::Replication] {
        connect(&options_with(&uri("scram_user"), &[home_env]), kind).unwrap();
        connect(&options_with(&uri("scram_user"), &[("PGPASSWORD", "gehe:im\\")]), kind).unwrap();
        let error =
            connect(&options_with(&uri("scram_user"), &[("PGPASSWORD", "falsch")]), kind).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error}");
        assert_eq!(ServerError::of(&error).unwrap().code, "28P01");
        assert!(!error.report().contains("falsch"));
        let error = connect(&options_with(&uri("scram_user"), &[]), kind).unwrap_err();
        assert!(matches!(error, Error::Denied(_)) && error.next().contains(".pgpass"), "{error}");

        let error = connect(&options_with(&uri("md5_user"), &[home_env]), kind).unwrap_err();
        assert!(matches!(error, Error::Denied(_)) && error.next().contains("scram-sha-256"), "{error}");
        let allowed = format!("{}?walship_allow_md5=1", uri("md5_user"));
        connect(&options_with(&allowed, &[home_env]), kind).unwrap();
    }

    let clear = [("PGPASSWORD", "klar")];
    let error = connect(&options_with(&uri("clear_user"), &clear), SessionKind::Ordinary).unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.safe().contains("no password was sent"), "{error}");
    let allowed = format!("{}?walship_allow_cleartext=1", uri("clear_user"));
    connect(&options_with(&allowed, &clear), SessionKind::Ordinary).unwrap();
    let socket =
        format!("host={} port={port} user=clear_user dbname=postgres", server.socket_dir().display());
    connect(&options_with(&socket, &clear), SessionKind::Ordinary).unwrap();

    let error = connect(&options_with(&uri("plain_user"), &[]), SessionKind::Replication).unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.next().contains("REPLICATION"), "{error}");
    let error = connect(&options_with(&uri("barred_user"), &[]), SessionKind::Ordinary).unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.next().contains("pg_hba.conf"), "{error}");
    let error = connect(
        &options_with(&format!("{}?channel_binding=require", uri("scram_user")), &clear),
        SessionKind::Ordinary,
    )
    .unwrap_err();
    assert!(error.to_string().contains("channel binding") && error.safe().contains("no password"), "{error}");
    let nowhere = format!("postgresql://postgres@127.0.0.1:{port}/nowhere");
    let error = connect(&options_with(&nowhere, &[]), SessionKind::Ordinary).unwrap_err();
    assert!(matches!(error, Error::Missing(_)), "{error}");
}

#[test]
fn outages_are_transient_and_the_next_host_is_tried() {
    let mut server = PgServer::builder(primary_major()).setting("max_wal_senders", 1).start();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let several = format!("postgresql://postgres@127.0.0.1:{closed},127.0.0.1:{}/postgres", server.port());
    let first = connect(&options_with(&several, &[]), SessionKind::Replication).unwrap();
    assert_eq!(first.host().port, server.port());
    let error = connect(&options_with(&several, &[]), SessionKind::Replication).unwrap_err();
    assert!(error.is_transient() && error.next().contains("max_wal_senders"), "{error}");
    drop(first);
    let standby_wanted = format!("{several}?target_session_attrs=standby");
    let error = connect(&options_with(&standby_wanted, &[]), SessionKind::Ordinary).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("not a standby"), "{error}");
    let preferred = format!("{several}?target_session_attrs=prefer-standby");
    connect(&options_with(&preferred, &[]), SessionKind::Ordinary).unwrap();

    // Somebody who listens and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let uri = format!("postgresql://postgres@127.0.0.1:{port}/?connect_timeout=2");
    let error = connect(&options_with(&uri, &[]), SessionKind::Ordinary).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("within 2 s"), "{error}");

    server.stop(StopMode::Fast);
    let error = connect(&options_with(&several, &[]), SessionKind::Ordinary).unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[test]
fn target_session_attrs_choose_among_hosts_as_libpq_does() {
    for major in majors() {
        let primary = PgServer::builder(major).wal_segment_size_mb(1).start();
        let (_folder, data) = standby_of(&primary);
        let standby = PgServer::from_data_dir(&data).start();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let choose = |ports: [u16; 3], target: &str, kind: SessionKind| {
            let [a, b, c] = ports;
            let text = format!(
                "host=127.0.0.1,127.0.0.1,127.0.0.1 port={a},{b},{c} user=postgres dbname=postgres \
                 target_session_attrs={target}"
            );
            let libpq = process::run(
                standby.tool("psql").args(["-X", "-A", "-t", "-c", "SHOW port", "-d", &text]),
                process::RunOptions::default(),
            );
            let found = connect(&options_with(&text, &[]), kind).map(|session| session.host().port).ok();
            let expected: Option<u16> = String::from_utf8(libpq.stdout).unwrap().trim().parse().ok();
            assert_eq!(found, expected, "{major}, {kind:?}, {target}: psql found another");
            found
        };
        let (p, s) = (primary.port(), standby.port());
        for kind in [SessionKind::Ordinary, SessionKind::Replication] {
            for (target, found) in [
                ("any", [p, s, p]),
                ("read-write", [p, p, p]),
                ("primary", [p, p, p]),
                ("read-only", [s, s, s]),
                ("standby", [s, s, s]),
                ("prefer-standby", [s, s, s]),
            ] {
                let orders = [[closed, p, s], [closed, s, p], [p, closed, s]];
                assert_eq!(orders.map(|order| choose(order, target, kind)), found.map(Some), "{target}");
            }
            assert_eq!(choose([closed, p, p], "prefer-standby", kind), Some(p));
            assert_eq!(choose([closed, p, p], "standby", kind), None);
            assert_eq!(choose([closed, s, s], "primary", kind), None);
        }
        // A primary that takes no writes by default, and a standby that becomes a primary.
        primary.psql("ALTER SYSTEM SET default_transaction_read_only = on");
        primary.psql("SELECT pg_reload_conf()");
        primary.wait_for("SHOW default_transaction_read_only", "on");
        standby.promote();
        for kind in [SessionKind::Ordinary, SessionKind::Replication] {
            for (target, found) in
                [("read-write", Some(s)), ("read-only", Some(p)), ("primary", Some(p)), ("standby", None)]
            {
                assert_eq!(choose([closed, p, s], target, kind), found, "{target}");
            }
        }
    }
}

/// Two authorities and a server certificate for the name `localhost` by the first of them.
pub(super) struct Certificates {
    folder: TempDir,
}

impl Certificates {
    pub(super) fn make() -> Self {
        let folder = TempDir::new().unwrap();
        let this = Self { folder };
        for name in ["ca", "other-ca"] {
            this.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN={name} \
                 -keyout {name}.key -out {name}.crt"
            ));
        }
        fs::write(this.path("server.ext"), "subjectAltName=DNS:localhost").unwrap();
        fs::write(this.path("client.ext"), "extendedKeyUsage=clientAuth").unwrap();
        for (name, subject) in [("server", "localhost"), ("client", "cert_user")] {
            this.openssl(&format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={subject} \
                 -keyout {name}.key -out {name}.csr"
            ));
            this.openssl(&format!(
                "x509 -req -in {name}.csr -days 30 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile {name}.ext \
                 -out {name}.crt"
            ));
        }
        // Self-signed, as PostgreSQL's documentation begins with; only a common name.
        this.openssl("req -new -x509 -days 30 -nodes -newkey rsa:2048 -subj /CN=localhost -keyout self.key -out self.crt");
        for key in ["server.key", "client.key", "self.key"] {
            fs::set_permissions(this.path(key), fs::Permissions::from_mode(0o600)).unwrap();
        }
        this
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        process::run_ok(
            Command::new("openssl").args(arguments.split_whitespace()).current_dir(self.folder.path()),
        );
    }
}

#[test]
fn sslmode_means_what_libpq_says_and_scram_is_bound_to_the_channel() {
    let certificates = Certificates::make();
    let path = |name: &str| certificates.path(name).display().to_string();
    let mut server = PgServer::builder(primary_major())
        .hba_line("hostssl all scram_user 127.0.0.1/32 scram-sha-256")
        .hba_line("hostssl replication scram_user 127.0.0.1/32 scram-sha-256")
        .hba_line("hostssl all cert_user 127.0.0.1/32 cert")
        .hba_line("hostnossl all plain_user 127.0.0.1/32 trust")
        .hba_line("host all scram_user,cert_user,plain_user 127.0.0.1/32 reject")
        .setting("ssl", "on")
        .setting("ssl_cert_file", path("server.crt"))
        .setting("ssl_key_file", path("server.key"))
        .setting("ssl_ca_file", path("ca.crt"))
        .start();
    server.psql(
        "CREATE ROLE scram_user LOGIN REPLICATION PASSWORD 'x'; CREATE ROLE cert_user LOGIN; CREATE ROLE plain_user LOGIN",
    );
    let port = server.port();
    let try_with = |user: &str, extra: &str| {
        let text =
            format!("host=localhost hostaddr=127.0.0.1 port={port} dbname=postgres user={user} {extra}");
        connect(&options_with(&text, &[("PGPASSWORD", "x")]), SessionKind::Ordinary)
    };
    let root = format!("sslrootcert={}", path("ca.crt"));
    let other = format!("sslrootcert={}", path("other-ca.crt"));

    for mode in ["allow", "prefer", "require"] {
        assert!(try_with("scram_user", &format!("sslmode={mode}")).unwrap().is_tls(), "{mode}");
    }
    let error = try_with("scram_user", "sslmode=disable").unwrap_err();
    assert!(matches!(error, Error::Denied(_)), "{error}");
    // The server takes this user only without TLS: prefer falls back, require does not.
    assert!(!try_with("plain_user", "sslmode=prefer").unwrap().is_tls());
    assert!(matches!(try_with("plain_user", "sslmode=require"), Err(Error::Denied(_))));

    for mode in ["require", "verify-ca", "verify-full"] {
        assert!(try_with("scram_user", &format!("sslmode={mode} {root}")).unwrap().is_tls(), "{mode}");
        let error = try_with("scram_user", &format!("sslmode={mode} {other}")).unwrap_err();
        assert!(
            matches!(error, Error::Denied(_)) && error.safe().contains("no password was sent"),
            "{error}"
        );
    }
    let wrong_name = format!(
        "host=db.example.com hostaddr=127.0.0.1 port={port} dbname=postgres user=scram_user {root} sslmode="
    );
    let named = |mode: &str| {
        connect(&options_with(&format!("{wrong_name}{mode}"), &[("PGPASSWORD", "x")]), SessionKind::Ordinary)
    };
    assert!(named("verify-ca").is_ok());
    let error = named("verify-full").unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.to_string().contains("another host name"), "{error}");

    // Channel binding, also for replication sessions.
    assert!(try_with("scram_user", "sslmode=require channel_binding=require").unwrap().is_tls());
    let text = format!("host=127.0.0.1 port={port} user=scram_user sslmode=require channel_binding=require");
    connect(&options_with(&text, &[("PGPASSWORD", "x")]), SessionKind::Replication).unwrap();
    connect(
        &options_with(
            &text.replace("=require channel_binding=require", "=require channel_binding=disable"),
            &[("PGPASSWORD", "x")],
        ),
        SessionKind::Replication,
    )
    .unwrap();

    // Client certificates: used when private, refused when others may read the key.
    let identity =
        format!("sslmode=verify-full {root} sslcert={} sslkey={}", path("client.crt"), path("client.key"));
    assert!(try_with("cert_user", &identity).unwrap().is_tls());
    assert!(try_with("cert_user", &format!("sslmode=verify-full {root}")).is_err());
    fs::set_permissions(certificates.path("client.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = try_with("cert_user", &identity).unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.next().contains("0600"), "{error}");

    // A self-signed certificate that is its own root, found by its common name alone.
    server.psql(&format!("ALTER SYSTEM SET ssl_cert_file = '{}'", path("self.crt")));
    server.psql(&format!("ALTER SYSTEM SET ssl_key_file = '{}'", path("self.key")));
    server.restart();
    let port = server.port();
    let own = format!("sslrootcert={}", path("self.crt"));
    let text = format!(
        "host=localhost hostaddr=127.0.0.1 port={port} dbname=postgres user=scram_user {own} sslmode=verify-full channel_binding=require"
    );
    assert!(connect(&options_with(&text, &[("PGPASSWORD", "x")]), SessionKind::Ordinary).unwrap().is_tls());

    // A server without TLS: prefer goes on in clear, require ends before anything is sent.
    server.psql("ALTER SYSTEM SET ssl = off");
    server.restart();
    let port = server.port();
    let text = |mode: SslMode| {
        format!("host=localhost hostaddr=127.0.0.1 port={port} dbname=postgres user=postgres sslmode={mode}")
    };
    assert!(!connect(&options_with(&text(SslMode::Prefer), &[]), SessionKind::Ordinary).unwrap().is_tls());
    let error = connect(&options_with(&text(SslMode::Require), &[]), SessionKind::Ordinary).unwrap_err();
    assert!(matches!(error, Error::Denied(_)) && error.to_string().contains("offers no TLS"), "{error}");
}

#[test]
fn what_is_not_postgresql_is_told_apart_from_an_outage() {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = [0; 8];
            socket.read_exact(&mut request).unwrap();
            socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        }
    });
    for mode in ["prefer", "disable"] {
        let uri = format!("postgresql://postgres@127.0.0.1:{port}/?sslmode={mode}");
        let error = connect(&options_with(&uri, &[]), SessionKind::Ordinary).unwrap_err();
        assert!(!error.is_transient() && error.next().contains("PostgreSQL server"), "{mode}: {error}");
    }
    server.join().unwrap();
}
