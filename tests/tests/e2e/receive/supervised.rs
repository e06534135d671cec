//! What systemd hears of `walship receive`: on a real socket, as systemd names it to a service.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walship::pg::Lsn;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

use super::{Receiving, server};

/// The end of a notification socket that systemd holds.
struct Listening {
    socket: UnixDatagram,
    _folder: TempDir,
    name: String,
}

impl Listening {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, name: path.to_str().unwrap().to_owned(), _folder: folder }
    }

    /// The next message, within a time.
    fn next(&self, patience: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(patience)).unwrap();
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    /// Waits for a message that has this in it.
    fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + wait::PATIENCE;
        let mut heard = Vec::new();
        while Instant::now() < deadline {
            let Some(message) = self.next(Duration::from_secs(1)) else { continue };
            if message.contains(part) {
                return message;
            }
            heard.push(message);
        }
        panic!("no {part} among {heard:?}");
    }

    /// How many messages of this kind come within a time.
    fn count(&self, part: &str, time: Duration) -> usize {
        let end = Instant::now() + time;
        let mut count = 0;
        while let left = end.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            count += usize::from(self.next(left).is_some_and(|message| message.contains(part)));
        }
        count
    }
}

fn conninfo(server: &PgServer) -> String {
    format!("host=127.0.0.1 port={} user=postgres sslmode=disable", server.port())
}

fn primary(stage: &Stage) -> PgServer {
    let server = server(primary_major(), 1).start();
    stage.init(&server);
    server
}

/// Has the server write and waits until it is durable.
fn is_received(server: &PgServer, receiving: &mut Receiving) {
    server.psql("CREATE TABLE IF NOT EXISTS t (a int); INSERT INTO t VALUES (1)");
    let lsn: Lsn = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    receiving.wait_durable(lsn);
}

#[test]
fn systemd_hears_when_it_streams_that_it_lives_and_when_it_stops() {
    let stage = Stage::folder("main").configured("[limits]\ndeadline_ms = 500\n");
    let server = primary(&stage);
    let systemd = Listening::new();
    let variables = [("NOTIFY_SOCKET", systemd.name.as_str()), ("WATCHDOG_USEC", "900000")];
    let mut receiving = Receiving::start_in(&stage, &conninfo(&server), &[], &variables);
    assert_eq!(systemd.wait_for("READY=1"), "READY=1\n");
    let status = systemd.wait_for("STATUS=streaming timeline 1 from");
    assert_eq!(status.lines().count(), 1, "{status:?}");
    systemd.wait_for("; durable up to ");
    let second = Duration::from_secs(1);
    assert!(systemd.count("WATCHDOG=1", 2 * second) >= 4, "three times in 900 ms");

    // A store that is away is no hang: it is waited for.
    let (repository, away) = (stage.repository_dir(), stage.path().join("away"));
    fs::rename(&repository, &away).unwrap();
    server.psql("CREATE TABLE u AS SELECT generate_series(1, 1000)");
    systemd.wait_for("STATUS=a store fails: ");
    assert!(systemd.count("WATCHDOG=1", 2 * second) >= 4);
    fs::rename(&away, &repository).unwrap();
    is_received(&server, &mut receiving);

    // A socket holds ten messages of which nobody has taken any; more are lost.
    systemd.count("WATCHDOG=1", second);
    assert_eq!(receiving.terminate().code(), Some(0));
    systemd.wait_for("STOPPING=1");
    systemd.wait_for("STATUS=stopped; durable up to ");
}

/// The thread that receives hangs in the opening of a pipe that nobody reads; the process lives, and so does the thread
/// that sends the messages.
#[test]
fn a_receiver_that_hangs_does_not_answer_the_watchdog() {
    let stage = Stage::folder("main");
    let server = primary(&stage);
    let systemd = Listening::new();
    let variables = [("NOTIFY_SOCKET", systemd.name.as_str()), ("WATCHDOG_USEC", "300000")];
    let mut receiving = Receiving::start_in(&stage, &conninfo(&server), &[], &variables);
    systemd.wait_for("READY=1");
    systemd.wait_for("WATCHDOG=1");
    // The status file is written beside its place first.
    let pipe = receiving.status_file().with_extension("json.new");
    wait::until("the pipe is there", || Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let second = Duration::from_secs(1);
    systemd.count("WATCHDOG=1", 2 * second);
    assert_eq!(systemd.count("WATCHDOG=1", 2 * second), 0, "it hangs, and says that it does not");
    fs::read(&pipe).unwrap();
    let status = receiving.status_file();
    wait::until("the status file is a file again", || {
        fs::symlink_metadata(&status).is_ok_and(|it| it.is_file())
    });
    systemd.wait_for("WATCHDOG=1");
    is_received(&server, &mut receiving);
    assert_eq!(receiving.terminate().code(), Some(0));
}

#[test]
fn without_a_watchdog_none_is_answered() {
    let stage = Stage::folder("main");
    let server = primary(&stage);
    for variables in [&[][..], &[("WATCHDOG_USEC", "300000"), ("WATCHDOG_PID", "1")]] {
        let systemd = Listening::new();
        let variables = [&[("NOTIFY_SOCKET", systemd.name.as_str())], variables].concat();
        let mut receiving = Receiving::start_in(&stage, &conninfo(&server), &[], &variables);
        systemd.wait_for("READY=1");
        assert_eq!(systemd.count("WATCHDOG", Duration::from_secs(2)), 0, "{variables:?}");
        is_received(&server, &mut receiving);
        assert_eq!(receiving.terminate().code(), Some(0));
    }
}

#[test]
fn why_it_cannot_go_on_is_shown() {
    let stage = Stage::folder("main");
    let own = primary(&stage);
    let stranger = server(primary_major(), 1).start();
    let systemd = Listening::new();
    let variables = [("NOTIFY_SOCKET", systemd.name.as_str())];
    let mut receiving = Receiving::start_in(&stage, &conninfo(&stranger), &[], &variables);
    assert_eq!(receiving.wait().code(), Some(1));
    let status = systemd.wait_for("STATUS=failed: ");
    assert!(status.contains("has no lineage for system identifier"), "{status}");
    drop(own);
}

/// A supervisor that has stopped reading holds nothing up: neither the WAL nor the end.
#[test]
fn a_supervisor_that_does_not_listen_holds_nothing_up() {
    let stage = Stage::folder("main");
    let server = primary(&stage);
    let systemd = Listening::new();
    // Every millisecond one: whatever net.unix.max_dgram_qlen is, the queue is full in no time.
    let variables = [("NOTIFY_SOCKET", systemd.name.as_str()), ("WATCHDOG_USEC", "3000")];
    let mut receiving = Receiving::start_in(&stage, &conninfo(&server), &[], &variables);
    is_received(&server, &mut receiving);
    let sending = UnixDatagram::unbound().unwrap();
    sending.connect(&systemd.name).unwrap();
    sending.set_nonblocking(true).unwrap();
    wait::until("the queue is full", || sending.send(b"X=1").is_err());
    is_received(&server, &mut receiving);
    let asked = Instant::now();
    assert_eq!(receiving.terminate().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(30));
    // None of them is lost on the process that was asked to end: it has ended.
    assert!(!process::is_alive(receiving.child.id()));
}
