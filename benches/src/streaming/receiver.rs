//! A running receiver, ours or PostgreSQL's.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use walship_tests::postgres::PgServer;
use walship_tests::{process, wait};

use super::site::Site;

/// A receiver that streams; dropping it ends it.
pub(super) struct Receiver {
    child: Child,
    folder: TempDir,
}

impl Receiver {
    /// Starts `walship receive` with these arguments, and returns when it streams.
    pub(super) fn walship(site: &Site, server: &PgServer, args: &[&str]) -> Self {
        let mut command = site.stage().walship_on(server, &["receive"]);
        command.args(args);
        Self::start(&command, server)
    }

    /// Starts `pg_receivewal` with these arguments beside its own folder, slot and name, and returns when it
    /// streams.
    pub(super) fn pg_receivewal(server: &PgServer, slot: &str, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut command = server.tool("pg_receivewal");
        command.args(["--no-password", "--slot", slot, "-D"]).arg(folder.path()).args(args);
        command.env("PGAPPNAME", "pg_receivewal");
        let mut receiver = Self::start(&command, server);
        receiver.folder = folder;
        receiver
    }

    fn start(command: &Command, server: &PgServer) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let errors = File::create(folder.path().join("stderr")).expect("the scratch folder has room");
        let mut guarded = guarded(command);
        guarded.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = process::spawn(guarded).expect("the receiver can be started");
        let mut receiver = Self { child, folder };
        wait::until("the receiver streams", || {
            let ended = receiver.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "{command:?} ended: {}", receiver.said());
            server.psql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == "1"
        });
        receiver
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        process::signal(self.child.id(), Signal::SIGTERM);
        if process::wait_within(&mut self.child, wait::PATIENCE).is_none() {
            process::kill_tree(&mut self.child);
        }
    }
}

/// Returns the same command as one that dies with this process.
pub(super) fn guarded(command: &Command) -> Command {
    let mut guarded = process::guarded(command.get_program());
    guarded.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => guarded.env(name, value),
            None => guarded.env_remove(name),
        };
    }
    guarded
}

/// Returns the user and system time that a process has used, in seconds.
pub(super) fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    let stat = stat.unwrap_or_default();
    // The second field is the name in parentheses; user and system time are the 14th and 15th.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let ticks: f64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    // Linux shows these in hundredths on every machine.
    ticks / 100.0
}

/// Returns the transactions a second that pgbench tells of.
pub(crate) fn tps(said: &str) -> f64 {
    let tps = said.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("pgbench tells no TPS:\n{said}"))
}
