//! `pitr restore --start`: the server is started, watched until it is where it should be, and what it holds is
//! compared with the plan.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::Signal;
use serde_json::Value;
use walship_tests::postgres::{
    PgBinaries, PgServer, StopMode, free_port, majors, newer_major, primary_major,
};
use walship_tests::stage::Stage;
use walship_tests::{bins, process, wait};

/// A folder that is restored into and started on; what runs there is killed when the test is done with it.
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    socket: tempfile::TempDir,
    port: u16,
    binaries: PgBinaries,
}

impl Place {
    pub(crate) fn new(stage: &Stage, name: &str, major: u32) -> Self {
        // A socket's path has room for 107 bytes.
        let socket = tempfile::Builder::new().prefix("ws").tempdir_in("/tmp").unwrap();
        let binaries = PgBinaries::find(major);
        Self { dir: stage.path().join(name), socket, port: free_port(), binaries }
    }

    /// `pitr restore --start` into this folder.
    pub(crate) fn restore(&self, stage: &Stage, words: &[&str]) -> Command {
        let mut restore = stage.pitr_as_user(&["restore", "--start", "-D"]);
        restore.arg(&self.dir).args(words).arg("--pg-bin").arg(self.binaries.server_bin());
        restore.args(["--set", &format!("port={}", self.port), "--set", "listen_addresses=127.0.0.1"]);
        restore.args(["--set", &format!("unix_socket_directories={}", self.socket.path().display())]);
        restore
    }

    pub(crate) fn psql(&self, sql: &str) -> String {
        let mut psql = self.binaries.tool("psql");
        psql.env("PGHOST", self.socket.path()).env("PGPORT", self.port.to_string());
        process::run_ok(psql.args(["-XqAt", "-U", "postgres", "-d", "postgres", "-c", sql])).trim().to_owned()
    }

    fn pid(&self) -> Option<u32> {
        let file = fs::read_to_string(self.dir.join("postmaster.pid")).ok()?;
        file.lines().next()?.parse().ok()
    }

    fn stop(&self) {
        let pid = self.pid().expect("a server runs");
        process::signal(pid, Signal::SIGINT);
        wait::until("the server is down", || !process::is_alive(pid));
    }

    fn is_running(&self) -> bool {
        self.pid().is_some_and(process::is_alive)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(pid) = self.pid() else { return };
        // Asked to end at once it gives its shared memory back, of which the kernel has no endless number; what its
        // commands started is nobody's then.
        let below = process::descendants(pid);
        process::signal(pid, Signal::SIGQUIT);
        wait::until("the started server is gone", || !process::is_alive(pid));
        below.into_iter().for_each(|pid| process::signal(pid, Signal::SIGKILL));
    }
}

/// An archive of one timeline: a backup that holds row 1, and behind it each row in a segment of its own.
struct Origin {
    stage: Stage,
    server: PgServer,
    /// Of each row from the second on: its transaction, a moment after it, and its segment.
    rows: Vec<Row>,
}

struct Row {
    xid: String,
    after: String,
    segment: String,
}

impl Origin {
    fn make(major: u32) -> Self {
        let stage = Stage::folder("main");
        let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
        let server = builder.setting("autovacuum", "off").start();
        stage.init(&server);
        server.psql("create table t (id int); insert into t values (1)");
        stage.backup(&server);
        Self { stage, server, rows: Vec::new() }.with_rows()
    }

    fn with_rows(mut self) -> Self {
        for id in 2..=5 {
            let server = &self.server;
            server.psql(&format!("insert into t values ({id})"));
            let xid = server.psql(&format!("select xmin from t where id = {id}"));
            let after = server
                .psql("select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.USZ')");
            self.rows.push(Row { xid, after, segment: server.archive_now() });
        }
        self.server.stop(StopMode::Fast);
        self
    }

    fn place(&self, name: &str) -> Place {
        Place::new(&self.stage, name, self.server.major())
    }

    /// A `restore_command` that does this instead for one segment.
    fn broken(&self, segment: &str, instead: &str) -> String {
        let path = self.stage.path().join(format!("broken-{segment}"));
        let real = bins::restore_cmd();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *{segment}*) {instead};; esac\nexec '{}' \"$@\"\n",
            real.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// Runs a restore with `--json` that must end with this status; returns what it printed and said.
fn json(stage: &Stage, command: &mut Command, status: i32) -> (Value, String) {
    let output = stage.run(command.arg("--json"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(status), "{command:?}\n{printed}\n{said}");
    (serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}")), said)
}

/// The server is where the plan ends, and says so.
fn assert_as_planned(value: &Value, state: &str) {
    let (start, plan) = (&value["start"], &value["plan"]);
    assert_eq!((&value["outcome"], &start["state"]), (&"started".into(), &state.into()), "{value:#}");
    assert_eq!(start["as_planned"], true, "{value:#}");
    assert_eq!(start["replayed_lsn"], plan["stop"]["final_lsn"], "{value:#}");
    assert!(start["replay_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{value:#}");
    assert!(Path::new(start["log"].as_str().unwrap()).is_file(), "{value:#}");
}

#[test]
fn a_started_server_holds_what_was_planned() {
    for major in majors() {
        let origin = Origin::make(major);
        let stage = &origin.stage;
        // To a moment, opened.
        let place = origin.place("open");
        let (value, _) = json(stage, &mut place.restore(stage, &["--to-time", &origin.rows[1].after]), 0);
        assert_as_planned(&value, "open");
        assert_eq!(value["start"]["timeline"], 2);
        assert_eq!(
            value["start"]["last_transaction_time"], value["plan"]["last_included"]["time"],
            "{value:#}"
        );
        assert_eq!(place.psql("select max(id), pg_is_in_recovery() from t"), "3|f");
        let place = origin.place("immediate");
        let (value, _) = json(stage, &mut place.restore(stage, &["--immediate"]), 0);
        assert_as_planned(&value, "open");
        // Just before a transaction, paused.
        let place = origin.place("paused");
        let words = ["--before-xid", &origin.rows[2].xid, "--target-action", "pause"];
        let (value, _) = json(stage, &mut place.restore(stage, &words), 0);
        assert_as_planned(&value, "paused");
        assert_eq!(value["start"]["timeline"], 1);
        assert_eq!(place.psql("select max(id), pg_is_in_recovery() from t"), "3|t");
        // All of it, in words.
        let place = origin.place("latest");
        let said = stage.ok(&mut place.restore(stage, &["--latest"]));
        for words in ["open for writing", "as planned: transaction", "timeline 2", "log/pitr-start.log"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert_eq!(place.psql("select max(id) from t"), "5");
        // And stopped there.
        let place = origin.place("stopped");
        let words = ["--to-xid", &origin.rows[0].xid, "--target-action", "shutdown"];
        let (value, _) = json(stage, &mut place.restore(stage, &words), 0);
        assert_eq!((&value["start"]["state"], &value["start"]["pid"]), (&"stopped".into(), &Value::Null));
        assert!(!place.is_running());
        // A standby.
        let place = origin.place("standby");
        let (value, _) = json(stage, &mut place.restore(stage, &["--latest", "--standby"]), 0);
        assert_eq!((&value["outcome"], &value["start"]["state"]), (&"started".into(), &"standby".into()));
        assert_eq!(place.psql("select pg_is_in_recovery()"), "t");
    }
}

#[test]
fn a_recovery_that_ends_too_early_is_told() {
    let origin = Origin::make(primary_major());
    let stage = &origin.stage;
    let missing = origin.broken(&origin.rows[1].segment, "exit 1");
    // With a target PostgreSQL notices, and ends.
    let place = origin.place("target");
    let words = ["--to-xid", &origin.rows[2].xid, "--restore-cmd", &missing, "--set", "logging_collector=on"];
    let (value, said) = json(stage, &mut place.restore(stage, &words), 1);
    assert_eq!(
        (&value["outcome"], &value["kind"]),
        (&"start_failed".into(), &"local_io".into()),
        "{value:#}"
    );
    assert!(value["report"]["data_dir"].is_string() && value["plan"].is_object(), "{value:#}");
    assert!(said.contains("recovery ended before configured recovery target was reached"), "{said}");
    assert!(said.contains("\nsafe:  the restore is complete") && said.contains("\nnext:  Read "), "{said}");
    assert!(!place.is_running());
    // Without one it opens, with less in it.
    let place = origin.place("latest");
    let (value, said) = json(stage, &mut place.restore(stage, &["--latest", "--restore-cmd", &missing]), 1);
    assert_eq!((&value["outcome"], &value["start"]["as_planned"]), (&"not_as_planned".into(), &false.into()));
    assert!(said.contains("error: recovery ended at") && said.contains("left running"), "{said}");
    assert!(said.contains(&format!("transaction {}", origin.rows[3].xid)), "{said}");
    assert_eq!(place.psql("select max(id) from t"), "2", "it is there to be looked at");
    // A target behind all that is archived: nothing is started.
    let place = origin.place("behind");
    stage.fails(&mut place.restore(stage, &["--to-lsn", "7F/0"]), 3);
    assert!(!place.dir.exists());
    // Replay that goes nowhere.
    let place = origin.place("stuck");
    let stuck = origin.broken(&origin.rows[2].segment, "exec sleep 1000");
    let words = ["--latest", "--start-timeout", "2", "--restore-cmd", &stuck];
    let said = stage.fails(&mut place.restore(stage, &words), 1);
    assert!(said.contains("no progress for 2 s") && said.contains("left running"), "{said}");
    assert!(place.is_running());
}

/// Runs a command on a terminal; returns its status and what the terminal was sent until `end` was there.
fn on_terminal(mut command: Command, end: &str) -> (ExitStatus, String) {
    let size = Winsize { ws_row: 40, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
    let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
    command.env("TERM", "xterm").stdin(Stdio::null());
    command.stdout(slave.try_clone().unwrap()).stderr(slave);
    let sent = Arc::new(Mutex::new(Vec::new()));
    let kept = sent.clone();
    // It ends when nobody has the terminal open any more.
    std::thread::spawn(move || {
        let (mut master, mut buffer) = (fs::File::from(master), [0; 4096]);
        while let Ok(length @ 1..) = master.read(&mut buffer) {
            kept.lock().unwrap().extend_from_slice(&buffer[..length]);
        }
    });
    let mut child = process::spawn(command).unwrap();
    let status = process::wait_within(&mut child, Duration::from_secs(120)).expect("the restore ends");
    let text = || String::from_utf8_lossy(&sent.lock().unwrap()).into_owned();
    wait::until(end, || text().contains(end));
    (status, text())
}

#[test]
fn replay_is_watched_on_a_terminal() {
    let origin = Origin::make(primary_major());
    let place = origin.place("watched");
    let slow = origin.broken(&origin.rows[2].segment, "sleep 2");
    let restore = place.restore(&origin.stage, &["--latest", "--restore-cmd", &slow]);
    let (status, shown) = on_terminal(restore, "as planned: transaction");
    assert!(status.success(), "{shown}");
    // A bar that is drawn again and again in one place, and wiped in the end; no lines as for a log.
    let bars: Vec<&str> = shown.split(['\r', '\n']).filter(|line| line.contains(" replayed  ")).collect();
    assert!(bars.len() > 3, "{shown:?}");
    assert!(bars.iter().any(|bar| bar.contains("/s") && bar.contains(" left  ")), "{bars:?}");
    assert!(bars.iter().any(|bar| bar.contains("up to 0/")), "{bars:?}");
    assert!(shown.contains("\u{1b}[2K") && !shown.contains(" s left"), "{shown:?}");
    assert!(shown.rfind(" replayed  ") < shown.find("open for writing"), "{shown:?}");
    assert_eq!(place.psql("select max(id) from t"), "5");
}

/// The server goes on by itself; that nobody has seen where it ended is on record.
#[test]
fn what_is_told_to_stop_while_it_watches_leaves_the_server_alone() {
    let origin = Origin::make(primary_major());
    let place = origin.place("left");
    let slow = origin.broken(&origin.rows[2].segment, "sleep 600");
    let mut restore = place.restore(&origin.stage, &["--latest", "--restore-cmd", &slow]);
    let said = origin.stage.path().join("said");
    restore.stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
    let mut restore = process::spawn(restore).unwrap();
    wait::until("the server has started", || place.is_running());
    process::signal(restore.id(), Signal::SIGTERM);
    let status = process::wait_within(&mut restore, wait::PATIENCE).expect("it ends when it is told to");
    assert_eq!(status.code(), Some(1));
    let said = fs::read_to_string(&said).unwrap();
    assert!(said.contains("interrupted by SIGTERM") && said.contains("pg_ctl -D "), "{said}");
    assert!(place.is_running());
    let history = origin.stage.ok(&mut origin.stage.pitr(&["history", "--json", "--only", "restore"]));
    let history: Value = serde_json::from_str(&history).unwrap();
    assert_eq!(history["entries"][0]["outcome"], "interrupted", "{history:#}");
    assert!(history["entries"][0]["bytes"].as_u64().unwrap() > 0, "the files are in place: {history:#}");
}

#[test]
fn a_server_that_is_restored_over_is_started() {
    for major in majors() {
        let origin = Origin::make(major);
        let stage = &origin.stage;
        let place = origin.place("over");
        let (value, _) = json(stage, &mut place.restore(stage, &["--to-xid", &origin.rows[1].xid]), 0);
        assert_as_planned(&value, "open");
        place.psql("insert into t values (100); checkpoint");
        let over = ["--to-time", &origin.rows[2].after, "--delta", "--yes", "--leave-surviving"];
        // Not while it runs.
        let said = stage.fails(&mut place.restore(stage, &over), 2);
        assert!(said.contains("a server runs on"), "{said}");
        assert_eq!(place.psql("select max(id) from t"), "100");
        place.stop();
        let (value, _) = json(stage, &mut place.restore(stage, &over), 0);
        assert_as_planned(&value, "open");
        let kept = value["report"]["delta"]["kept_bytes"].as_u64().unwrap();
        assert!(kept > value["report"]["data_bytes"].as_u64().unwrap() / 2, "{value:#}");
        assert_eq!(value["start"]["timeline"], 2, "{value:#}");
        assert_eq!(place.psql("select max(id), pg_is_in_recovery() from t"), "4|f");
    }
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let origin = Origin::make(primary_major());
    let stage = &origin.stage;
    // Its port is another's.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut place = origin.place("port");
    place.port = taken.local_addr().unwrap().port();
    let said = stage.fails(&mut place.restore(stage, &["--latest"]), 1);
    assert!(said.contains("could not bind") && said.contains("--set port="), "{said}");
    // Its configuration makes no sense.
    let place = origin.place("setting");
    let said = stage.fails(place.restore(stage, &["--latest"]).args(["--set", "no_such_setting=1"]), 1);
    assert!(said.contains("no_such_setting"), "{said}");

    // What is known before anything is written.
    let place = origin.place("before");
    let mut other = stage.pitr_as_user(&["restore", "--start", "--latest", "-D"]);
    other.arg(&place.dir).arg("--pg-bin").arg(PgBinaries::find(newer_major()).server_bin());
    let said = stage.fails(&mut other, 1);
    assert!(
        said.contains(&format!("is of {}", newer_major())) && said.contains("nothing was written"),
        "{said}"
    );
    let said = stage.fails(place.restore(stage, &["--latest"]).args(["--set", "port"]), 2);
    assert!(said.contains("NAME=VALUE"), "{said}");
    if nix::unistd::geteuid().is_root() {
        let said = stage.fails(stage.pitr(&["restore", "--start", "--latest", "-D"]).arg(&place.dir), 2);
        assert!(said.contains("as root") && said.contains("nothing was written"), "{said}");
    }
    let (value, _) = json(stage, &mut place.restore(stage, &["--latest", "--dry-run"]), 0);
    assert_eq!(
        (&value["outcome"], &value["start"]["state"]),
        (&"would_restore".into(), &"would_start".into())
    );
    let command = value["start"]["command"].as_str().unwrap();
    assert!(command.contains("pg_ctl start") && command.contains("-c port="), "{command}");
    assert!(!place.dir.exists());
}

#[test]
fn a_server_that_lets_nobody_in_is_watched_all_the_same() {
    let mut origin = Origin::make(primary_major());
    // In the backup to come, and not in the running server.
    origin.server.start();
    fs::write(
        origin.server.data_dir().join("pg_hba.conf"),
        "local all all reject\nhost all all all reject\n",
    )
    .unwrap();
    origin.stage.backup(&origin.server);
    origin.server.psql("insert into t values (6)");
    origin.server.archive_now();
    let stage = &origin.stage;
    let place = origin.place("closed");
    let (value, _) = json(stage, &mut place.restore(stage, &["--latest"]), 0);
    assert_as_planned(&value, "open");
    assert_eq!(value["start"]["timeline"], 2, "{value:#}");
    assert!(value["start"]["not_asked"].as_str().unwrap().contains("pg_hba.conf"), "{value:#}");
    for (name, setting, why) in
        [("standby", "hot_standby=on", "pg_hba.conf"), ("cold", "hot_standby=off", "hot_standby is off")]
    {
        let place = origin.place(name);
        let said = stage.ok(place.restore(stage, &["--latest", "--standby"]).args(["--set", setting]));
        assert!(said.contains("Started: a standby") && said.contains(why), "{said}");
    }
}

/// Debian's layout. The original's configuration names the original's data directory, and that wins over `-D`.
#[test]
fn a_configuration_elsewhere_does_not_lead_to_another_data_directory() {
    let mut origin = Origin::make(primary_major());
    let data_dir = origin.server.data_dir().to_owned();
    let elsewhere = origin.stage.path().join("postgresql.conf");
    let text = fs::read_to_string(data_dir.join("postgresql.conf")).unwrap();
    fs::write(&elsewhere, format!("{text}data_directory = '{}'\n", data_dir.display())).unwrap();
    fs::remove_file(data_dir.join("postgresql.conf")).unwrap();
    let server = origin.stage.recovering(&data_dir).setting("config_file", elsewhere.display()).start();
    origin.stage.backup(&server);
    server.archive_now();
    drop(server);
    origin.rows.clear();

    let stage = &origin.stage;
    let place = origin.place("restored");
    let said = stage.fails(&mut place.restore(stage, &["--latest"]), 2);
    assert!(said.contains("--set config_file=") && said.contains("nothing was written"), "{said}");
    assert!(!place.dir.exists());
    let setting = format!("config_file={}", elsewhere.display());
    let (value, _) = json(stage, place.restore(stage, &["--latest"]).args(["--set", &setting]), 0);
    assert_as_planned(&value, "open");
    assert_eq!(place.psql("show data_directory"), place.dir.to_str().unwrap());
    assert_eq!(place.psql("select max(id) from t"), "5");
}
