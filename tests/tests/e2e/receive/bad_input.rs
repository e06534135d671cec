//! What an operator gets to read when the server, the user, the slot or the store is not as it should be: three
//! lines, and the status that a supervisor acts on.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use walship::pg::Lsn;
use walship::replication::{ConnectOptions, Connection, SessionKind};
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::s3_inprocess::{Fault, S3Server};
use walship_tests::stage::Stage;
use walship_tests::wait;

use super::super::replication::Certificates;
use super::{Receiving, server};

/// The reports so far, as they are held in the snapshot.
struct Reports {
    text: String,
    /// What is another one each time, and what stands for it.
    names: Vec<(String, &'static str)>,
}

impl Reports {
    /// What it says must be fatal, in three lines.
    fn fatal(&mut self, what: &str, stage: &Stage, conninfo: &str, args: &[&str]) {
        let mut receiving = Receiving::start(stage, conninfo, args);
        let status = receiving.wait();
        assert_eq!(status.code(), Some(1), "{what}: {}", receiving.said());
        assert_eq!(
            receiving.status().map_or("failed".into(), |status| status["state"].clone()),
            "failed",
            "{what}"
        );
        let said = receiving.said();
        self.add(what, &said, "status 1");
    }

    /// What may pass must be said in three lines, and tried again.
    fn passing(&mut self, what: &str, stage: &Stage, conninfo: &str, args: &[&str]) {
        let mut receiving = Receiving::start(stage, conninfo, args);
        wait::until(&format!("{what} is reported twice"), || {
            receiving.said().matches("trying again in").count() >= 2
        });
        let said = receiving.said();
        let first =
            said.split_once("\ntrying again in").unwrap_or_else(|| panic!("{what}: {said}")).0.to_owned();
        assert!(receiving.terminate().success(), "{what}: {}", receiving.said());
        self.add(what, &first, "tried again; status 0 when it is stopped");
    }

    fn add(&mut self, what: &str, said: &str, end: &str) {
        let mut said = said.trim_end().to_owned();
        for (name, placeholder) in &self.names {
            said = said.replace(name, placeholder);
        }
        // The server's own words differ between versions.
        while let Some((before, rest)) = said.split_once("the server says: ")
            && let Some((_, after)) = rest.split_once(" (SQLSTATE ")
        {
            said = format!("{before}THE SERVER'S WORDS (SQLSTATE {after}");
        }
        let words = said.split(' ').map(|word| if word.parse::<Lsn>().is_ok() { "LSN" } else { word });
        let said = words.collect::<Vec<_>>().join(" ");
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{what}: {said}");
        for (line, begin) in lines.iter().zip(["error: ", "safe:  ", "next:  "]) {
            assert!(line.starts_with(begin), "{what}: {said}");
        }
        writeln!(self.text, "# {what}\n{said}\n{end}\n").unwrap();
    }
}

fn private_file(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Says that it is PostgreSQL 13, and nothing else.
fn old_server() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut length = [0; 4];
        socket.read_exact(&mut length).unwrap();
        socket.read_exact(&mut vec![0; u32::from_be_bytes(length) as usize - 4]).unwrap();
        let mut hello = b"R\0\0\0\x08\0\0\0\0".to_vec();
        let version = b"server_version\x0013.9\0";
        hello.extend([b'S', 0, 0, 0, 4 + version.len() as u8]);
        hello.extend(version);
        hello.extend(b"Z\0\0\0\x05I");
        socket.write_all(&hello).unwrap();
        let _ = socket.read(&mut [0; 64]);
    });
    port
}

#[test]
fn each_mistake_has_one_clear_report() {
    let certificates = Certificates::make();
    let path = |name: &str| certificates.path(name).display().to_string();
    let stage = Stage::folder("main");
    let main = server(primary_major(), 1)
        .setting("wal_level", "logical")
        .setting("max_wal_senders", 2)
        .setting("max_replication_slots", 1)
        .setting("ssl", "on")
        .setting("ssl_cert_file", path("server.crt"))
        .setting("ssl_key_file", path("server.key"))
        .hba_line("host replication scram_user 127.0.0.1/32 scram-sha-256")
        .hba_line("host replication barred_user 127.0.0.1/32 reject")
        .hba_line("hostssl replication tls_user 127.0.0.1/32 trust")
        .hba_line("hostnossl replication tls_user 127.0.0.1/32 reject")
        .start();
    stage.init(&main);
    main.psql(
        "CREATE ROLE scram_user LOGIN REPLICATION PASSWORD 'x'; CREATE ROLE barred_user LOGIN REPLICATION;
         CREATE ROLE tls_user LOGIN REPLICATION; CREATE ROLE plain_user LOGIN",
    );
    let minimal = PgServer::builder(primary_major())
        .setting("wal_level", "minimal")
        .setting("max_wal_senders", 0)
        .setting("archive_mode", "off")
        .start();
    let stranger = server(primary_major(), 1).start();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let old = old_server();
    let passfile = stage.path().join("passfile");
    private_file(&passfile, "*:*:*:*:falsch\n");
    let at = |port: u16, user: &str, extra: &str| {
        format!(
            "host=localhost hostaddr=127.0.0.1 port={port} user={user} passfile={} connect_timeout=30 {extra}",
            passfile.display()
        )
    };
    let plainly = |port: u16, user: &str| at(port, user, "sslmode=disable");
    let mut reports = Reports {
        text: String::new(),
        names: vec![
            (main.port().to_string(), "PORT"),
            (minimal.port().to_string(), "PORT"),
            (stranger.port().to_string(), "PORT"),
            (closed.to_string(), "PORT"),
            (old.to_string(), "PORT"),
            (main.system_identifier().to_string(), "ITS-SYSTEM-IDENTIFIER"),
            (stranger.system_identifier().to_string(), "ANOTHER-SYSTEM-IDENTIFIER"),
            (stage.path().display().to_string(), "DIR"),
        ],
    };

    let port = main.port();
    reports.fatal("a wrong password", &stage, &plainly(port, "scram_user"), &[]);
    reports.fatal("a role without REPLICATION", &stage, &plainly(port, "plain_user"), &[]);
    reports.fatal("no line in pg_hba.conf", &stage, &at(port, "barred_user", "sslmode=require"), &[]);
    reports.fatal("a server that wants TLS", &stage, &plainly(port, "tls_user"), &[]);
    reports.fatal("a server without TLS", &stage, &at(minimal.port(), "postgres", "sslmode=require"), &[]);
    let verify = format!("sslmode=verify-full sslrootcert={}", path("other-ca.crt"));
    reports.fatal("a certificate that nobody trusted signed", &stage, &at(port, "postgres", &verify), &[]);
    reports.fatal("wal_level = minimal", &stage, &plainly(minimal.port(), "postgres"), &[]);
    reports.fatal("another cluster", &stage, &plainly(stranger.port(), "postgres"), &[]);
    reports.fatal("a server that is too old", &stage, &plainly(old, "postgres"), &[]);
    let unmade = Stage::folder("main");
    reports.names.push((unmade.path().display().to_string(), "DIR"));
    reports.fatal("no repository", &unmade, &plainly(port, "postgres"), &[]);
    reports.passing("nobody at the address", &stage, &plainly(closed, "postgres"), &[]);

    // What is told of a logical slot is the same where the server does not tell of slots (before 15).
    main.psql("SELECT pg_create_logical_replication_slot('logical', 'test_decoding')");
    reports.fatal("a logical slot", &stage, &plainly(port, "postgres"), &["--slot", "logical"]);
    reports.passing("no free slot", &stage, &plainly(port, "postgres"), &[]);
    main.psql("SELECT pg_drop_replication_slot('logical')");

    let mut first = Receiving::start(&stage, &plainly(port, "postgres"), &[]);
    main.wait_for("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
    let pid = main.psql("SELECT active_pid FROM pg_replication_slots");
    reports.names.push((pid, "PID"));
    reports.passing("a slot that another receiver uses", &stage, &plainly(port, "postgres"), &[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let options = ConnectOptions::from_private(&plainly(port, "postgres")).unwrap();
    let idle = runtime.block_on(Connection::connect(&options, SessionKind::Replication)).unwrap();
    reports.passing("too few WAL senders", &stage, &plainly(port, "postgres"), &[]);
    drop(idle);
    assert!(first.terminate().success(), "{}", first.said());

    let s3 = S3Server::start();
    let skewed = Stage::s3("main", &s3.endpoint());
    skewed.init(&main);
    s3.set_faults(|_| Some(Fault::S3(403, "RequestTimeTooSkewed")));
    reports.fatal("a clock that the store does not accept", &skewed, &plainly(port, "postgres"), &[]);
    insta::assert_snapshot!("receive_bad_input", reports.text);
}

#[test]
fn a_server_that_would_wait_for_replay_is_warned_of() {
    let stage = Stage::folder("main");
    let server = server(primary_major(), 1).start();
    stage.init(&server);
    let conninfo = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", server.port());
    let once = || {
        let mut receiving = Receiving::start(&stage, &conninfo, &["--once", "--flush", "repository"]);
        assert!(receiving.wait().success(), "{}", receiving.said());
        receiving.said()
    };
    server.psql("ALTER SYSTEM SET synchronous_commit = remote_apply");
    server.psql("SELECT pg_reload_conf()");
    server.wait_for("SHOW synchronous_commit", "remote_apply");
    assert!(!once().contains("remote_apply"));
    server.psql("ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (other, walship)'");
    server.psql("SELECT pg_reload_conf()");
    server.wait_for("SHOW synchronous_standby_names", "FIRST 1 (other, walship)");
    assert!(once().contains("warning: synchronous_commit is remote_apply"));
}
